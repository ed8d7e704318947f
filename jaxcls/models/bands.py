"""One convolution of many networks at once, with a kernel for each, as a batched product of matrices.

Under `vmap` over networks (`seeds.py`) XLA makes groups of it, for which cuDNN has nothing fast. One H200,
float32, a train step of eight LeNet-5 with 1,024 images each: 0.92 ms in this form, of one 0.49 (in groups it
was 4.4 when one took 0.70). ResNet-20's convolutions of 16 to 64 features are slower so: eight of each, with
their gradients, take 10.0 ms one after another, 8.6 in groups, 12.4 here; and its whole step in groups 152,
one after another 73.
What a block of outputs reads is a row of a matrix, and the block's features are the columns of another: the
kernel, once for each output, each a stride further, with zeros round it.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls.models.slices import output_size

ROWS = 2  # of outputs in a block: row by row, LeNet-5's two convolutions take 0.88 ms, and 0.74 like this
COLUMNS = 168  # features of a row of a block, at most; half as many are slower
PARTS = 8  # of the rows, in which the kernel's gradient is added up
MOST_COPIED = 2  # numbers for each output: LeNet-5's second has 1.6, most of ResNet-20's 3.3


def pays_in_bands(place, x, kernel) -> bool:
    """Whether to take this form, for x [E, B, H, W, C] and kernel [E, h, w, C, F]."""
    _, _, groups = place
    block, reads, _ = _sizes(place, x, kernel)
    copied = math.prod(reads) * kernel.shape[3] / (math.prod(block) * kernel.shape[4])
    return groups == 1 and copied <= MOST_COPIED


def _sizes(place, x, kernel) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Height and width of the outputs that are taken together, of what they read, of all outputs."""
    stride, padding, _ = place
    size = kernel.shape[1:3]
    height, width = output_size(x.shape[2:4], size, stride, padding)
    columns = max(1, min(width, COLUMNS // kernel.shape[-1]))
    block = min(height, ROWS if columns == width else 1), columns
    reads = tuple((n - 1) * stride + k for n, k in zip(block, size, strict=True))
    return block, reads, (height, width)


def convolve_each(place, x, kernel) -> jax.Array:
    """x [E, B, H, W, C] * kernel [E, h, w, C, F] -> [E, B, H', W', F].

    Args:
      place: stride, padding of height and width, groups (1).
    """
    (stride, padding, _), features = place, kernel.shape[-1]
    block, reads, outputs = _sizes(place, x, kernel)
    steps = [n * stride for n in block]
    counts = [-(-n // k) for n, k in zip(outputs, block, strict=True)]
    sizes = [(n - 1) * step + k for n, step, k in zip(counts, steps, reads, strict=True)]
    none = (0, 0, 0)
    edges = ((p, n - p - m, 0) for p, n, m in zip(padding, sizes, x.shape[2:4], strict=True))
    # Else XLA would pad, and compute a pool before, again for each window.
    x = _kept(jax.lax.pad(x, jnp.zeros((), x.dtype), [none, none, *edges, none]))
    tall = sizes[0] - reads[0] + 1

    def windows(start):
        parts = (
            x[:, :, i : i + tall : steps[0], start : start + reads[1]] for i in range(reads[0])
        )
        return jnp.concatenate([part.reshape(*x.shape[:2], counts[0], 1, -1) for part in parts], -1)

    blocks = jnp.concatenate([windows(j * steps[1]) for j in range(counts[1])], 3)
    # Rows of one matrix: else XLA would transpose what it adds up of several axes for the kernel's gradient.
    rows = blocks.reshape(len(kernel), -1, blocks.shape[-1])
    # Else XLA adds a bias within the product, as a matrix of its size.
    y = _kept(_times_band((stride, block, reads), rows, kernel))
    # A block has one row or the whole width: else it would have to be transposed.
    whole = [n * k for n, k in zip(counts, block, strict=True)]
    return y.reshape(*x.shape[:2], *whole, features)[:, :, : outputs[0], : outputs[1]]


@jax.custom_vjp
def _kept(x):
    """x, which XLA writes to memory: its gradient may be part of what is computed with it."""
    return jax.lax.optimization_barrier(x)


_kept.defvjp(lambda x: (_kept(x), None), lambda _, gradient: (gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _times_band(place, rows, kernel):
    """What blocks read, [E, R, h' * w' * C], times the band of a kernel [E, h, w, C, F] -> [E, R, n * F]."""
    return jnp.einsum('erk,ekf->erf', rows, _band(place, kernel))


def _band(place, kernel):
    stride, block, _ = place
    shifts = [[(i * stride, (n - 1 - i) * stride) for i in range(n)] for n in block]
    shifted = [
        jnp.pad(kernel, ((0, 0), *shift, (0, 0), (0, 0))) for shift in itertools.product(*shifts)
    ]
    return jnp.stack(shifted, -2).reshape(len(kernel), -1, len(shifted) * kernel.shape[-1])


def _gradients(place, saved, gradient):
    (stride, block, reads), (rows, kernel) = place, saved
    of_rows = jnp.einsum('erf,ekf->erk', gradient, _band(place, kernel))
    count = math.gcd(PARTS, rows.shape[1])
    parts = (x.reshape(len(x), count, -1, x.shape[-1]) for x in (rows, gradient))
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    of_band = jnp.einsum('esrk,esrf->eskf', *parts, preferred_element_type=wide)
    # Else XLA adds up the parts anew for each place of the kernel.
    of_band = jax.lax.optimization_barrier(of_band.sum(1))
    each, height, width, channels, features = kernel.shape
    of_band = of_band.reshape(each, *reads, channels, *block, features)
    i, row, j, column = np.ogrid[:height, : block[0], :width, : block[1]]
    met = of_band[:, row * stride + i, column * stride + j, :, row, column]
    return of_rows, met.sum((1, 3)).transpose(2, 0, 1, 3, 4).astype(kernel.dtype)


_times_band.defvjp(lambda place, *args: (_times_band(place, *args), args), _gradients)
