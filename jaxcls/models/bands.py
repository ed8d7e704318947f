"""One convolution of many networks at once, with a kernel for each, as a batched product of matrices.

Under `vmap` over networks (`seeds.py`) XLA makes groups of it, for which cuDNN has nothing fast. One H200,
float32, a train step of eight LeNet-5 with 1,024 images each: 4.4 ms in groups, 1.4 to 2.0 in this form
(beside other programs), of one 0.6 to 0.7. What `count` outputs of a row read is a row of a matrix, and
these outputs' features are its columns: the kernel, `count` times, each a stride further, with zeros round
it.
"""

import jax
import jax.numpy as jnp

from jaxcls.models.slices import output_size

COLUMNS = 168  # with half as many, the eight take 1.7 to 1.8 ms
MOST_COPIED = 3  # numbers for each output; what needs more was not measured


def pays_in_bands(place, x, kernel) -> bool:
    """Whether to take this form, for x [E, B, H, W, C] and kernel [E, h, w, C, F]."""
    (_, _, groups), (rows, _, channels, features) = place, kernel.shape[1:]
    count, span, _ = _sizes(place, x, kernel)
    copied = rows * span * channels / (count * features)
    return groups == 1 and copied <= MOST_COPIED


def _sizes(place, x, kernel) -> tuple[int, int, tuple[int, int]]:
    """How many outputs are taken together, how many columns they read, and height and width of all."""
    stride, padding, _ = place
    height, width = output_size(x.shape[2:4], kernel.shape[1:3], stride, padding)
    count = max(1, min(width, COLUMNS // kernel.shape[-1]))
    return count, (count - 1) * stride + kernel.shape[2], (height, width)


def convolve_each(place, x, kernel) -> jax.Array:
    """x [E, B, H, W, C] * kernel [E, h, w, C, F] -> [E, B, H', W', F].

    Args:
      place: stride, padding of height and width, groups (1).
    """
    (stride, padding, _), (rows, _, _, features) = place, kernel.shape[1:]
    count, span, (height, width) = _sizes(place, x, kernel)
    starts = range(0, width * stride, count * stride)
    right = starts[-1] + span - padding[1] - x.shape[3]
    edges = (0, 0), (0, 0), (padding[0], padding[0]), (padding[1], right), (0, 0)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(*edge, 0) for edge in edges])
    tall = (height - 1) * stride + 1

    def windows(start):
        parts = (x[:, :, i : i + tall : stride, start : start + span] for i in range(rows))
        return jnp.concatenate([part.reshape(*x.shape[:2], height, 1, -1) for part in parts], -1)

    blocks = jnp.concatenate([windows(start) for start in starts], 3)
    shifts = [((0, 0), (i * stride, (count - 1 - i) * stride), (0, 0)) for i in range(count)]
    band = jnp.stack([jnp.pad(kernel, ((0, 0), *shift, (0, 0))) for shift in shifts], -2)
    band = band.reshape(len(kernel), -1, count * features)
    # Else XLA adds a bias within the product, as a matrix of its size.
    y = jax.lax.optimization_barrier(jnp.einsum('ebhwk,ekf->ebhwf', blocks, band))
    return y.reshape(*y.shape[:3], -1, features)[:, :, :, :width]
