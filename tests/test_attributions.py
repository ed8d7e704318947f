"""Attributions against Captum on the same weights, and the laws that they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import attributions
from jaxcls.errors import UserError
from jaxcls.models import make_model

SHAPE, LABEL = (8, 8, 3), 2
SMALL = {
    'lenet_small': {'activation': 'tanh', 'pool': 'avg'},
    'vit_ti16': {'depth': 1, 'width': 12, 'heads': 2, 'patch_size': 4},
}


def weights():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 3, 3, 6)).astype(np.float32) / 3
    return {'conv': kernel, 'head': {'kernel': random.normal(size=(6, 4)).astype(np.float32)}}


def forward(variables, images):
    """Convolution, ReLU, mean, head."""
    params = variables['params']
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    x = jax.lax.conv_general_dilated(
        images, params['conv'], (1, 1), 'SAME', dimension_numbers=dimensions
    )
    features = {'conv': jax.nn.relu(x)}
    features['pooled'] = features['conv'].mean((1, 2))
    return features['pooled'] @ params['head']['kernel'], features


@pytest.fixture(scope='module')
def network():
    return attributions.make_network(forward, {'params': weights()}, SHAPE)


@pytest.fixture(scope='module')
def image():
    return np.random.default_rng(1).random(SHAPE, np.float32)


@pytest.fixture(scope='module')
def peer():
    """The same network in PyTorch: (module, its convolution and ReLU, captum.attr)."""
    torch = pytest.importorskip('torch')
    captum = pytest.importorskip('captum.attr')
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, padding=1, bias=False), torch.nn.ReLU())
    params = weights()
    layers[0].weight.data = torch.tensor(params['conv'].transpose(3, 2, 0, 1))
    head = torch.nn.Linear(6, 4, bias=False)
    head.weight.data = torch.tensor(params['head']['kernel'].T)
    pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(layers, *pool, head), layers, captum


def to_torch(image):
    torch = pytest.importorskip('torch')
    return torch.tensor(image.transpose(2, 0, 1)[None])


def from_torch(tensor):
    return tensor.detach().numpy()[0].transpose(1, 2, 0)


def test_saliency_is_captums(network, image, peer):
    theirs = peer[2].Saliency(peer[0]).attribute(to_torch(image).requires_grad_(), target=LABEL)
    ours = attributions.saliency(network, image, LABEL)
    np.testing.assert_allclose(ours, from_torch(theirs).max(-1), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_captums(network, image, peer):
    theirs = (
        peer[2]
        .IntegratedGradients(peer[0])
        .attribute(to_torch(image), target=LABEL, n_steps=64, baselines=0.2)
    )
    ours = attributions.integrated_gradients(network, image, LABEL, baseline=0.2, steps=64)
    np.testing.assert_allclose(ours, from_torch(theirs), rtol=1e-3, atol=1e-5)


def test_occlusion_is_captums(network, image, peer):
    theirs = (
        peer[2]
        .Occlusion(peer[0])
        .attribute(to_torch(image), (3, 3, 3), strides=(3, 1, 1), target=LABEL, baselines=0.5)
    )
    ours = attributions.occlusion(network, image, LABEL, window=3)
    np.testing.assert_allclose(ours, from_torch(theirs)[..., 0], rtol=1e-3, atol=1e-5)


def test_grad_cam_is_captums(network, image, peer):
    theirs = (
        peer[2]
        .LayerGradCam(peer[0], peer[1])
        .attribute(to_torch(image), target=LABEL, relu_attributions=True)
    )
    ours = attributions.grad_cam(network, image, LABEL)
    np.testing.assert_allclose(ours, from_torch(theirs)[..., 0], rtol=1e-4, atol=1e-6)


def test_attributions_sum_to_the_difference_of_the_logits(network, image):
    found = attributions.integrated_gradients(network, image, LABEL)
    logits = network.logits(np.stack([image, np.zeros_like(image)]))[:, LABEL]
    np.testing.assert_allclose(found.sum(), logits[0] - logits[1], rtol=0.01)
    assert attributions.completeness(network, image, LABEL, found) < 0.01
    assert attributions.completeness(network, image, LABEL, 2 * found) > 0.9


def test_a_linear_network_is_explained_by_its_weights():
    weight = np.random.default_rng(2).normal(size=(48, 3)).astype(np.float32)

    def linear(variables, images):
        return images.reshape(len(images), -1) @ variables['params']['head']['kernel'], {}

    variables, image = {'params': {'head': {'kernel': weight}}}, np.full((4, 4, 3), 0.5, np.float32)
    network = attributions.make_network(linear, variables, (4, 4, 3), maps=False)
    template = weight[:, 1].reshape(4, 4, 3)
    ours = attributions.integrated_gradients(network, image, 1)
    np.testing.assert_allclose(ours, 0.5 * template, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        attributions.saliency(network, image, 1), np.abs(template).max(-1), rtol=1e-5
    )


def test_no_noise_is_plain_saliency(network, image):
    smooth = attributions.smooth_grad(network, image, LABEL, noise=0.0)
    np.testing.assert_allclose(smooth, attributions.saliency(network, image, LABEL), rtol=1e-5)
    noisy = attributions.smooth_grad(network, image, LABEL, noise=0.5)
    assert not np.allclose(noisy, smooth, rtol=0.01)


def test_cam_is_grad_cam_times_the_size_of_the_maps(network, image):
    cam, grad_cam = (f(network, image, LABEL) for f in (attributions.cam, attributions.grad_cam))
    np.testing.assert_allclose(cam, 64 * grad_cam, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', SMALL)
def test_a_feature_on_the_way_has_the_gradient_that_a_finite_difference_finds(name):
    model = make_model(name, num_classes=3, **SMALL[name])
    image = np.random.default_rng(3).random((1, 8, 8, 1), np.float32)
    variables = model.init(jax.random.key(0), jnp.asarray(image))

    def apply(variables, images):
        return model.apply(variables, images, train=False)

    head = variables['params']['head']
    head['kernel'] = jax.random.normal(jax.random.key(1), head['kernel'].shape)
    network = attributions.make_network(apply, variables, (8, 8, 1))
    activation, gradient = network.maps(image, 1)
    assert activation.shape == gradient.shape and activation.ndim == 4 and gradient.any()
    # The logit moves with the image as its gradient by the feature times the feature's move says.
    moved = image + 1e-3 * np.random.default_rng(4).standard_normal(image.shape).astype(np.float32)
    expected = np.sum(gradient * (network.maps(moved, 1)[0] - activation))
    difference = network.logits(moved)[0, 1] - network.logits(image)[0, 1]
    if name == 'lenet_small':  # all of the logit's way leads through it
        np.testing.assert_allclose(expected, difference, rtol=0.03, atol=1e-6)


def test_a_transformers_feature_is_one_whose_patches_have_a_say():
    def made(feature='', **fields):
        model = make_model('vit_ti16', num_classes=3, **{**SMALL['vit_ti16'], 'depth': 2, **fields})
        variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        apply = functools.partial(model.apply, train=False)
        network = attributions.make_network(apply, variables, (8, 8, 1), feature)
        return network.maps(np.ones((1, 8, 8, 1), np.float32), 1)

    # The head reads the class token, which the last block reads the patches of the first for.
    for a, b in ((made(), made('block1')), (made(pooling='mean'), made('block2', pooling='mean'))):
        assert b[1].any()
        jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(UserError, match="'block2' has rows and columns, and none has a say"):
        made('block2')


def test_a_map_of_nan_is_one_of_nothing():
    assert not attributions.heat_map(np.full((4, 4), np.nan, np.float32)).any()


def test_images_are_asked_in_any_number(network):
    images = np.random.default_rng(5).random((37, *SHAPE), np.float32)
    together = network.logits(images)
    assert together.shape == (37, 4)
    alone = np.concatenate([network.logits(image[None]) for image in images[:3]])
    np.testing.assert_allclose(together[:3], alone, rtol=1e-5)


def test_what_has_no_maps_is_refused():
    variables = {'params': weights()}
    with pytest.raises(UserError, match="'pooled' is no feature with rows and columns.*conv"):
        attributions.make_network(forward, variables, SHAPE, 'pooled')

    def flat(variables, images):
        features = {'pooled': images.reshape(len(images), -1)}
        return features['pooled'][:, :6] @ variables['params']['head']['kernel'], features

    with pytest.raises(UserError, match='no feature with rows and columns, which Grad-CAM needs'):
        attributions.make_network(flat, variables, SHAPE)


def test_cam_wants_a_head_on_the_mean(image):
    def of_a_corner(variables, images):
        features = {'conv': images @ jnp.ones((3, 6))}
        return features['conv'][:, 0, 0] @ variables['params']['head']['kernel'], features

    network = attributions.make_network(of_a_corner, {'params': weights()}, SHAPE)
    with pytest.raises(UserError, match="Take 'grad_cam'"):
        attributions.cam(network, image, LABEL)
    assert attributions.grad_cam(network, image, LABEL).shape == (8, 8)


def test_heat_maps_are_between_0_and_1():
    found = attributions.heat_map(np.array([[[1.0, 2.0]], [[-4.0, 1.0]]]))
    np.testing.assert_allclose(found, [[1.0], [0.0]])
    assert not attributions.heat_map(np.zeros((2, 2))).any()
