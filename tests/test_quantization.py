"""int8: near the float network, alike while and after training, and the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import inspection, quantization, steps, weights
from jaxcls.errors import UserError
from jaxcls.models import make_model
from small_nets import build, logits

pytest.importorskip('qwix')


@pytest.fixture(scope='module', params=['lenet_small', 'vgg11_bn'])
def network(request):
    model, flat, image = build(request.param, batch=32)
    return model, weights.unflatten(jax.tree.map(jnp.asarray, flat)), image


def test_int8_is_near_float_and_the_same_while_and_after_training(network):
    model, variables, image = network
    shape = image.shape[1:]
    expected = logits(model, variables, image)
    training = quantization.quantize(model, shape, name='int8')
    after, stored = quantization.after_training(model, variables, shape)
    found, again = logits(training, variables, image), logits(after, stored, image)
    np.testing.assert_array_equal(found, again)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.85
    # A whole example is rounded by itself: what else is in the batch does not matter.
    np.testing.assert_allclose(
        logits(training, variables, image[:5]), found[:5], rtol=1e-5, atol=1e-6
    )
    kernels = sum(leaf.size for leaf in jax.tree.leaves(stored) if leaf.dtype == jnp.int8)
    flat = weights.flatten(variables)
    assert kernels == sum(leaf.size for path, leaf in flat.items() if path.endswith('kernel'))


def test_the_values_are_those_of_rounding_by_hand():
    model = make_model('linear', num_classes=3)
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(4, 2, 2, 1)), rng.normal(size=(4, 3))
    image[:, 0, 0], kernel[0] = 3, 3  # the largest is positive: -127.5 may round either way
    variables = {'params': {'head': {'kernel': np.float32(kernel), 'bias': np.ones(3, 'f')}}}
    scale = np.abs(kernel).max(0) / 127.5
    rows = image.reshape(4, 4)
    row_scale = np.abs(rows).max(1, keepdims=True) / 127.5
    limit = lambda x: np.clip(np.round(x), -128, 127)  # noqa: E731
    expected = (limit(rows / row_scale) @ limit(kernel / scale)) * row_scale * scale + 1
    quantized = quantization.quantize(model, (2, 2, 1), name='int8')
    found = logits(quantized, variables, jnp.asarray(image, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_as_if_nothing_were_rounded(network):
    model, variables, image = network
    quantized = quantization.quantize(model, image.shape[1:], name='int8')

    def gradient(network_):
        loss = lambda params: jnp.square(  # noqa: E731
            network_.apply({**variables, 'params': params}, image)[0]
        ).sum()
        return weights.flatten({'params': jax.jit(jax.grad(loss))(variables['params'])})

    ours, plain = gradient(quantized), gradient(model)
    assert ours.keys() == plain.keys()
    for path, leaf in plain.items():
        near = np.vdot(leaf, ours[path]) / np.linalg.norm(leaf) / np.linalg.norm(ours[path])
        assert near > 0.95, path


def test_modules_that_are_kept_stay_in_float(network):
    model, variables, image = network
    _, stored = quantization.after_training(model, variables, image.shape[1:], keep='^head')
    assert isinstance(stored['params']['head']['kernel'], jax.Array)
    assert not isinstance(stored['params']['hidden1']['dense']['kernel'], jax.Array)


def test_a_config_trains_in_int8_and_counts_the_same():
    config = config_lib.get_config()
    config.model = {'name': 'lenet_small', 'filters': (4, 6), 'hidden': (8,)}
    plain = experiment_lib.build(experiment_lib.resolve(config), (8, 8, 1), 10, 100)
    config.quantization = {'name': 'int8'}
    int8 = experiment_lib.build(experiment_lib.resolve(config), (8, 8, 1), 10, 100)
    states = [jax.eval_shape(lambda e=e: experiment_lib.init(e, 0)) for e in (plain, int8)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8)
    costs = [
        inspection.count_flops(e.predict, steps.evaluation_variables(states[0]), image)
        for e in (plain, int8)
    ]
    assert costs[0] == costs[1]
    step = jax.make_jaxpr(int8.train_step)(states[1], experiment_lib.raw_batch(int8))
    assert 'i8[' in str(step)


def test_what_cannot_be_quantised_says_so():
    with pytest.raises(UserError, match='LeNet1998 computes a kernel from its parameters'):
        quantization.quantize(make_model('lenet5_1998'), (32, 32, 1), name='int8')
    with pytest.raises(UserError, match='no regular expression'):
        quantization.quantize(make_model('linear'), (8, 8, 1), name='int8', keep='(')


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match="pip install 'jaxcls\\[compress\\]'"):
        quantization.quantize(make_model('linear'), (8, 8, 1), name='int8')
