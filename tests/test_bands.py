"""A convolution of many networks at once: the products against XLA's groups, and where they are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.models import convolutions
from jaxcls.models.bands import convolve_each, pays_in_bands

# size, channels, kernel, features, stride, padding
SHAPES = [
    (12, 1, 5, 6, 1, 2),
    (8, 1, 5, 6, 1, 2),  # four blocks of each of 3 images: the kernel's gradient in four parts
    (14, 6, 5, 16, 1, 0),
    (9, 1, 3, 6, 1, 1),  # two rows together, and one left over
    (9, 3, 3, 100, 1, 1),  # an output alone
    (9, 3, 3, 60, 1, 1),  # two together, and one left over
    (9, 3, 3, 60, 2, 1),
    (11, 2, 7, 4, 2, 3),
    (8, 3, 1, 4, 2, 0),
    ((7, 12), 2, (3, 5), 4, 1, (1, 0)),
    ((3, 9), 2, (3, 1), 4, 1, 0),  # one row of outputs
]


def sides(size):
    return size if isinstance(size, tuple) else (size, size)


def inputs(size, channels, kernel, features, images=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, images, *sides(size), channels))
    kernel = rng.standard_normal((2, *sides(kernel), channels, features))
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_it_is_the_convolution_of_each_with_its_gradients(shape):
    *sizes, stride, padding = shape
    place = stride, sides(padding), 1
    forms = (
        functools.partial(convolve_each, place),
        jax.vmap(functools.partial(convolutions._convolution, place)),
    )

    def weighted(form, x, kernel):
        y = form(x, kernel)
        return jnp.sin(y).sum(), y

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(weighted, form), (0, 1), has_aux=True))(
            *inputs(*sizes)
        )
        for form in forms
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4)


def lowered(function, *args):
    """The program for a GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=('cuda',)).as_text()


def gradients(x, kernel):
    return jax.grad(lambda *args: convolutions.convolve(*args, 1, (0, 0)).sum(), (0, 1))(x, kernel)


def test_on_a_gpu_many_networks_take_it_and_one_takes_the_convolution():
    x, kernel = inputs(14, 6, 5, 16)
    many, one = lowered(jax.vmap(gradients), x, kernel), lowered(gradients, x[0], kernel[0])
    assert 'stablehlo.convolution' not in many and 'stablehlo.dot_general' in many
    assert 'stablehlo.convolution' in one and 'stablehlo.dot_general' not in one


@pytest.mark.parametrize('axes', [(0, 0), (0, None), (None, 0)])
def test_under_vmap_each_network_has_its_own(axes, monkeypatch):
    monkeypatch.setattr(convolutions, '_on_device', lambda plain, *args, **forms: plain(*args))
    args = [a if axis == 0 else a[0] for a, axis in zip(inputs(14, 6, 5, 16), axes, strict=True)]
    found = jax.vmap(gradients, axes)(*args)
    for i in range(2):
        alone = gradients(
            *(a if axis is None else a[i] for a, axis in zip(args, axes, strict=True))
        )
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-4)


def test_what_would_copy_much_keeps_its_groups():
    place = 1, (1, 1), 1
    shapes = [((8, 64, 32, 32, 16), (8, 3, 3, 16, 16)), ((8, 64, 28, 28, 1), (8, 3, 3, 1, 8))]
    wide, narrow = ([jax.ShapeDtypeStruct(s, jnp.float32) for s in pair] for pair in shapes)
    assert pays_in_bands(place, *narrow) and not pays_in_bands(place, *wide)
    assert not pays_in_bands((1, (1, 1), 2), *narrow)


def test_only_what_is_read_is_kept_and_no_gradient():
    x, kernel = jnp.ones((2, 3, 9, 9, 2)), jnp.ones((2, 3, 3, 2, 4))
    convolve = functools.partial(convolve_each, (1, (1, 1), 1))

    def kept(function):
        return jax.jit(function).lower(x, kernel).as_text().count('optimization_barrier')

    gradient = jax.grad(lambda *args: convolve(*args).sum())
    assert (kept(convolve), kept(gradient)) == (2, 0)  # the padded image, the products


def test_the_kernels_gradient_is_added_up_in_eight_parts_and_float32():
    x, kernel = (a.astype(jnp.bfloat16) for a in inputs(6, 1, 3, 4, images=8))

    def of_kernel(x, kernel):
        total = lambda k: convolve_each((1, (1, 1), 1), x, k).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(total)(kernel)

    assert '-> tensor<2x8x32x48xf32>' in lowered(of_kernel, x, kernel)
    wide = [a.astype(jnp.float32) for a in (x, kernel)]
    found, expected = of_kernel(x, kernel), of_kernel(*wide)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8)
