import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.models import convolutions

# batch, size, channels, kernel, features, stride, padding, groups
SHAPES = [
    (4, 9, 3, 3, 5, 1, 1, 1),
    (4, 12, 6, 5, 16, 1, 0, 1),
    (2, 6, 2, 3, 40, 1, 2, 1),
    (2, 8, 30, 3, 40, 1, 1, 1),
    (2, 8, 40, 3, 34, 1, 1, 1),
    (2, 8, 10, 3, 20, 1, 1, 1),  # two outputs as one with 40 features
    (2, 9, 12, 3, 12, 1, 1, 1),
    (2, 7, 5, 3, 10, 1, 1, 1),  # four, and a place left over
    (2, 3, 5, 3, 10, 1, 1, 1),  # fewer places than that
    (4, 6, 8, 5, 6, 1, 4, 1),  # rows of the kernel as features
    (4, 9, 3, 3, 5, 2, 1, 1),  # a stride that does not divide, and one that leaves a row over
    (4, 8, 3, 3, 5, 2, 1, 1),
    (2, 11, 3, 7, 4, 2, 3, 1),
    (2, 10, 4, 5, 3, 2, 0, 1),
    (4, 9, 5, 3, 5, 2, 1, 1),
    (2, 11, 20, 3, 18, 2, 1, 1),
    (2, 12, 3, 4, 18, 4, 0, 1),
    (2, 11, 3, 5, 4, 1, 0, 1),
    (2, 6, 3, 1, 4, 1, 1, 1),
    (4, 8, 6, 1, 5, 1, 0, 1),
    (4, 9, 6, 1, 5, 2, 0, 1),
    (4, 8, 6, 3, 6, 1, 1, 6),
    (4, 8, 6, 3, 6, 2, 1, 6),
    (4, 8, 4, 3, 4, 2, 1, 4),
    (4, 8, 4, 3, 6, 2, 1, 2),
    (4, 7, 6, 1, 6, 2, 0, 6),
    (2, 9, 6, 7, 6, 1, 3, 6),
    (2, 11, 6, 3, 6, 3, 0, 6),
    (4, 9, 6, 5, 6, 2, 2, 6),
    (4, 8, 6, 3, 4, 1, 1, 2),
]


def inputs(batch, size, channels, kernel, features, groups, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, size, size, channels))
    kernel = rng.standard_normal((kernel, kernel, channels // groups, features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_every_form_of_a_convolution_is_that_of_xla(shape):
    *sizes, stride, padding, groups = shape
    x, kernel = inputs(*sizes, groups)
    place = stride, (padding, padding), groups

    def ours(x, kernel):
        y = convolutions.convolve(x, kernel, *place)
        return jnp.sin(y).sum(), y

    def plain(x, kernel):
        y = convolutions._convolution(place, x, kernel)
        return jnp.sin(y).sum(), y

    (found, expected) = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, kernel) for f in (ours, plain)
    )
    _, _, channels, size, features = sizes  # where few are, sums are taken in another order
    few = channels <= {1: 16, 2: 4}.get(stride, 0) or (stride == 1 and features <= 20)
    same = groups == 1 and size > 1 and not few
    same_for_kernel = same and (stride > 1 or features >= channels)
    # The loss, y, and the gradients by x and by the kernel.
    exactly = [same, same, same, same_for_kernel]
    leaves = zip(*map(jax.tree.leaves, (found, expected)), exactly, strict=True)
    for a, b, exact in leaves:
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 1e-4)


@pytest.mark.parametrize('shape', [SHAPES[0], SHAPES[10], SHAPES[21], SHAPES[19]], ids=str)
def test_second_derivatives_are_those_of_xlas_convolution(shape):
    *sizes, stride, padding, groups = shape
    x, kernel = inputs(*sizes, groups)
    place = stride, (padding, padding), groups

    def penalty(convolve, x, kernel):
        return (jax.grad(lambda x: jnp.sin(convolve(x, kernel)).sum())(x) ** 2).sum()

    ours = functools.partial(penalty, lambda x, k: convolutions.convolve(x, k, *place))
    plain = functools.partial(penalty, functools.partial(convolutions._convolution, place))
    found, expected = (jax.jit(jax.grad(f, (0, 1)))(x, kernel) for f in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize(
    'shape', [(4, 12, 64, 7, 64, 1, 3, 64), (4, 12, 64, 3, 64, 2, 1, 64)], ids=str
)
def test_sums_of_a_depthwise_convolution_in_bfloat16_are_rounded_once(shape):
    *sizes, stride, padding, groups = shape
    x, kernel = inputs(*sizes, groups, jnp.bfloat16)
    place = stride, (padding, padding), groups

    def value_and_gradient(dtype):
        convolve = lambda x: convolutions.convolve(x, kernel.astype(dtype), *place)  # noqa: E731
        y, back = jax.vjp(convolve, x.astype(dtype))
        return y, back(jnp.ones_like(y))[0]

    for narrow, wide in zip(*map(value_and_gradient, ('bfloat16', 'float32')), strict=True):
        error = jnp.linalg.norm(narrow.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
        assert error < 0.0025  # half a unit of 8 bits; rounded at each tap 0.004 to 0.008


def test_the_gradient_of_a_convolution_is_right_in_bfloat16_and_for_many_kernels():
    x, kernel = inputs(4, 8, 3, 3, 5, 1, jnp.bfloat16)
    gradient = jax.grad(lambda k: convolutions.convolve(x, k, 1, (1, 1)).astype(jnp.float32).sum())(
        kernel
    )
    assert gradient.dtype == jnp.bfloat16
    x, kernel = inputs(4, 8, 3, 3, 5, 1)
    kernels = jnp.stack([kernel, 2 * kernel])
    loss = lambda k, convolve: jnp.sin(convolve(x, k)).sum()  # noqa: E731
    ours = functools.partial(loss, convolve=lambda x, k: convolutions.convolve(x, k, 1, (1, 1)))
    plain = functools.partial(
        loss, convolve=functools.partial(convolutions._convolution, (1, (1, 1), 1))
    )
    found, expected = (jax.vmap(jax.grad(f))(kernels) for f in (ours, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [SHAPES[1], SHAPES[5], SHAPES[6]], ids=str)
def test_the_kernel_gradient_of_each_example_is_that_of_a_batch_of_one(shape):
    *sizes, stride, padding, groups = shape
    x, kernel = inputs(*sizes, groups)
    place = stride, (padding, padding), groups

    def gradient(convolve, x):
        return jax.grad(lambda kernel: jnp.sin(convolve(x[None], kernel)).sum())(kernel)

    ours = functools.partial(gradient, lambda x, k: convolutions.convolve(x, k, *place))
    plain = functools.partial(gradient, functools.partial(convolutions._convolution, place))
    found, expected = jax.jit(jax.vmap(ours))(x), np.stack([plain(row) for row in x])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('size', 'stride', 'features', 'on_gpu'),
    [(7, 2, 8, '4x4x12x8'), (3, 1, 32, '3x2x24x256'), (3, 1, 16, '3x3x3x16')],
    ids=['squares of pixels at stride 2', 'eight columns at stride 1', 'few features'],
)
def test_on_a_gpu_alone_a_stem_takes_pixels_as_features(size, stride, features, on_gpu):
    x, kernel = inputs(2, 32, 3, size, features, 1)
    padding = (size // 2, size // 2)
    plain = f'tensor<{size}x{size}x3x{features}xf32>'

    def convolve(x, kernel):
        return convolutions.convolve(x, kernel, stride, padding)

    def lowered(function, platform):
        return jax.jit(function).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    for function in (convolve, jax.grad(lambda *args: jnp.sin(convolve(*args)).sum(), 1)):
        assert f'tensor<{on_gpu}xf32>' in lowered(function, 'cuda')
        others = lowered(function, 'tpu')
        assert plain in others and (on_gpu in plain or on_gpu not in others)


def test_on_a_gpu_narrow_images_and_kernel_gradients_of_each_example_take_no_blocks():
    narrow, kernel = inputs(2, 7, 3, 3, 32, 1)
    wide, _ = inputs(2, 32, 3, 3, 32, 1)

    def convolve(kernel, x):
        return convolutions.convolve(x, kernel, 1, (1, 1))

    def of_each(kernel, x):
        gradient = jax.grad(lambda kernel, x: convolve(kernel, x[None]).sum())
        return jax.vmap(gradient, (None, 0))(kernel, x)

    for function, x in ((convolve, narrow), (of_each, wide)):
        lowered = jax.jit(function).trace(kernel, x).lower(lowering_platforms=('cuda',))
        assert '3x2x24x256' not in lowered.as_text()


@pytest.mark.parametrize('padding', [0, 1])
def test_columns_in_blocks_of_eight_are_the_same_convolution(padding):
    x, kernel = inputs(2, 13, 3, 3, 24, 1)
    place = 1, (padding, padding), 1

    def weighted(form, *args):
        y = form(place, *args)
        return jnp.sin(y).sum(), y

    found, expected = (
        jax.value_and_grad(functools.partial(weighted, form), (0, 1), has_aux=True)(x, kernel)
        for form in (functools.partial(convolutions._in_blocks, 8), convolutions._convolution)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_parts_of_a_kernels_gradient_in_blocks_are_added_up_in_float32():
    x, kernel = (a.astype(jnp.bfloat16) for a in inputs(16, 32, 3, 3, 24, 1))
    gradient = jax.grad(
        lambda k: convolutions._in_blocks(8, (1, (1, 1), 1), x, k).astype(jnp.float32).sum()
    )
    wide = jax.make_jaxpr(gradient)(kernel)
    sums = [e for e in wide.eqns if e.primitive.name == 'add_any']
    assert sums and all(e.outvars[0].aval.dtype == jnp.float32 for e in sums)


@pytest.mark.parametrize(('size', 'stride'), [(8, 2), (9, 2), (8, 3), (7, 3)])
def test_the_gradients_of_a_strided_pointwise_convolution_are_those_of_xla(size, stride):
    x, kernel = inputs(2, size, 3, 1, 5, 1)
    place = stride, (0, 0), 1
    form = functools.partial(convolutions._convolution, place)
    gradient = jnp.sin(form(x, kernel))
    found = convolutions._gradients_of_strided_pointwise(place, x, kernel, gradient)
    expected = convolutions._gradients(form)(x, kernel, gradient)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_on_a_gpu_alone_the_gradient_of_a_strided_pointwise_convolution_is_no_dilated_one():
    x, kernel = inputs(2, 8, 5, 1, 6, 1)
    gradient = jax.grad(lambda x, k: jnp.sin(convolutions.convolve(x, k, 2, (0, 0))).sum())
    of_each = jax.vmap(gradient, (None, 0))

    def dilated(function, kernel, platform):
        lowered = jax.jit(function).trace(x, kernel).lower(lowering_platforms=(platform,))
        return 'lhs_dilate = [2, 2]' in lowered.as_text()

    assert not dilated(gradient, kernel, 'cuda')
    assert dilated(gradient, kernel, 'tpu')
    assert dilated(of_each, kernel[None], 'cuda')
