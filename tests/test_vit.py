"""Vision Transformers against torchvision and timm; positions of another image size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parity
from jaxcls import weights
from jaxcls.errors import UserError
from jaxcls.models import make_model, vit
from parity import Pair, check_evaluation, check_training
from parity import timm_model as tm
from parity import torchvision_model as tv

TINY = {'patch_size': 8, 'depth': 2, 'width': 32, 'heads': 4}
TIMM_TINY = {'patch_size': 8, 'depth': 2, 'embed_dim': 32, 'num_heads': 4, 'img_size': 32}
TV_TINY = {
    'patch_size': 8, 'num_layers': 2, 'hidden_dim': 32, 'num_heads': 4, 'mlp_dim': 128,
    'image_size': 32,
}  # fmt: skip
TOKEN = Pair('vit_ti16', tm('vit_tiny_patch16_224', **TIMM_TINY), TINY, 32, 'timm')
MEAN = Pair(
    'vit_s16',
    tm('vit_small_patch16_224', global_pool='avg', **TIMM_TINY),
    {**TINY, 'pooling': 'mean'},
    32,
    'timm',
)
EVALUATION = {
    'torchvision': Pair('vit_b16', tv('VisionTransformer', **TV_TINY), TINY, 32),
    'timm': TOKEN,
    'timm, mean': MEAN,
}


@pytest.mark.parametrize('kind', EVALUATION)
def test_logits_equal_the_reference(kind):
    check_evaluation(EVALUATION[kind])


def test_a_step_of_sgd_equals_the_reference():
    check_training(TOKEN)


FULL = {
    'vit_ti16': Pair('vit_ti16', tm('vit_tiny_patch16_224'), {}, 224, 'timm'),
    'vit_s16': Pair('vit_s16', tm('vit_small_patch16_224'), {}, 224, 'timm'),
    'vit_b16': Pair('vit_b16', tv('vit_b_16'), {}, 224),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', vit.MODELS)
def test_full_size_logits_equal_the_reference(name):
    check_evaluation(FULL[name])


# Positions


def embedding(n, width=6):
    return np.random.default_rng(n).standard_normal((1, 1 + n * n, width), np.float32)


@pytest.mark.parametrize(('old', 'new'), [(4, 7), (7, 4), (14, 24), (6, 2)])
def test_positions_are_interpolated_as_in_timm(old, new):
    torch = pytest.importorskip('torch')
    resample = parity.import_or_skip('timm.layers').resample_abs_pos_embed
    theirs = resample(torch.from_numpy(embedding(old)), [new, new]).numpy()
    ours = weights.resize_positions(embedding(old), 1 + new * new)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_positions_of_the_same_size_are_kept_bit_for_bit():
    np.testing.assert_array_equal(weights.resize_positions(embedding(5), 26), embedding(5))


def random_variables(model, size):
    rng = np.random.default_rng(0)
    shapes = parity.shapes_of(model, size)
    return {path: rng.standard_normal(s.shape, np.float32) for path, s in shapes.items()}


@pytest.mark.parametrize('scheme', ['jaxcls', 'timm', 'torchvision'])
def test_weights_of_a_larger_image_size_load_with_interpolated_positions(scheme):
    model, path = make_model('vit_ti16', **TINY), 'params/position_embedding'
    large = random_variables(model, 64)
    state = weights.state_dict(model, weights.unflatten(large), scheme)
    found = weights.convert(model, parity.shapes_of(model, 32), parity.state_of(state))
    assert not found.fresh
    expected = {**large, path: weights.resize_positions(large[path], 1 + 4 * 4)}
    assert found.arrays.keys() == expected.keys()
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert found.arrays[path].shape == (1, 17, 32)


def test_without_positions_the_order_of_the_patches_is_of_no_account():
    model, path = make_model('vit_ti16', **TINY), 'params/position_embedding'
    flat = {path: 0.3 * array for path, array in random_variables(model, 16).items()}
    images = parity.images_of(16)
    rolled = np.roll(images, TINY['patch_size'], axis=2)

    @jax.jit
    def logits(positions, images):
        return model.apply(weights.unflatten({**flat, path: positions}), images)[0]

    def effect(positions):
        return parity.relative(logits(positions, rolled), logits(positions, images))

    assert effect(flat[path]) > 1e-3
    assert effect(0 * flat[path]) < 1e-5


# Settings


def test_it_starts_as_deit_does():
    model = make_model('vit_ti16', **{**TINY, 'width': 64, 'depth': 1}, num_classes=100)
    init = jax.jit(model.init)
    variables = init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    for path, leaf in weights.flatten(jax.device_get(variables)).items():
        kind = path.rpartition('/')[2]
        if kind in ('bias', 'scale'):
            assert (leaf == (kind == 'scale')).all(), path
        else:
            np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.25, err_msg=path)
            assert abs(leaf).max() < 0.05


def test_features_are_maps_tokens_and_what_the_head_reads():
    model = make_model('vit_ti16', **TINY)
    images = jax.ShapeDtypeStruct((3, 16, 24, 1), jnp.float32)
    (_, features), _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), images
    )
    assert {name: f.shape for name, f in features.items()} == {
        'patches': (3, 2, 3, 32), 'block1': (3, 7, 32), 'block2': (3, 7, 32), 'pooled': (3, 32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'heads': 5}, 'width is 192; it must be a multiple of heads=5'),
        ({'pooling': 'avg'}, "Unknown pooling 'avg'. Known: mean, token"),
        ({'patch_size': 0}, 'patch_size=0'),
        ({'mlp_ratio': 0.0}, 'mlp_ratio is 0.0; it must be at least 1 / width'),
        (
            {'patch_size': 5},
            'The size of the images is (32, 32); it must be a multiple of patch_size=5',
        ),
    ],
)
def test_a_mistake_is_named(fields, message):
    with pytest.raises(UserError) as error:
        parity.shapes_of(make_model('vit_ti16', **fields), 32)
    assert message in str(error.value)
