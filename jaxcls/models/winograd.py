"""Convolutions of 3x3 by Winograd's minimal filtering (Lavin & Gray 2016), with tiles of 4 or of 4x4 outputs.

Down the columns alone, four rows of outputs are sums of six convolutions of one row, in place of twelve.
Along both, a tile takes 36 products of features in place of 144. Both take more sums, which do not grow with
the features. In float32 results differ from plain sums by up to 1e-5 of the largest value in rows, 2e-5 in
tiles. Times of 2 cores with AVX2, from XLA's convolution to these, in ms, batch 128 (8 from 28 pixels on):

| features, pixels | form | forwards, and for x | for the kernel |
|---|---|---|---|
| 32, 16 | rows | 4.9 to 4.0 | 8.1 to 6.7 |
| 64, 56 | rows | 11.8 to 8.1 | 14.4 to 11.3 |
| 128, 28 | rows | 9.0 to 7.4 | 9.3 to 8.6 |
| 128, 16 | tiles | 72 to 48 | 89 to 57 |
| 256, 8 | tiles | 72 to 43 | 79 to 35 |
| 512, 4 | tiles | 72 to 47 | 68 to 37 |

With 16 features rows take longer. A network compiles longer: ResNet-18 in 19 s, not 7, most of it for tiles.
"""

import math

import jax
import jax.numpy as jnp

TILE = 4
# Of the tile's inputs, of the kernel and of the products, along one axis: the points 0, 1, -1, 2, -2 and
# infinity.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
# Backwards.
_OF_OUTPUT, _OF_KERNEL = (tuple(zip(*m, strict=True)) for m in (_OUTPUT, _KERNEL))


def pays_in_rows(shape, kernel_shape, padding: tuple[int, int], stride: int, groups: int) -> bool:
    """Whether rows are at hand and likely to be faster: from 32 features on, where few rows are left over.

    The kernel's own sums decide in small batches, and a batch of any size, as exports have it, may be one.
    """
    height = shape[1] + 2 * padding[0] - 2
    return (
        _applies(shape, kernel_shape, stride, groups, 32)
        and 2 * _tiles(height) <= 0.6 * height
        and shape[0] * height * shape[2] >= 256
    )


def in_rows(x, kernel, padding: tuple[int, int], convolve_rows, apart) -> jax.Array:
    """x [B, H, W, C] * kernel [3, w, C, F] -> [B, H', W', F], at stride 1.

    Args:
      padding: zeros on both sides of the height and of the width.
      convolve_rows: x [B, R, W, C] * kernel [1, w, C, F] -> [B, R, W', F], with that padding of the width.
      apart: makes a function of arrays one that is not fused with what is round it.
    """
    height = x.shape[1] + 2 * padding[0] - 2
    tiles = _tiles(height)

    def outputs(*products):
        rows = jnp.stack(_combine(_OUTPUT, products), 2)
        return rows.reshape(len(x), TILE * tiles, *rows.shape[3:])[:, :height]

    kernels = [row[None] for row in _combine(_KERNEL, list(kernel))]
    pairs = zip(_spread_rows(_INPUT, x, padding[0], tiles, apart), kernels, strict=True)
    return apart(outputs)(*[convolve_rows(*pair) for pair in pairs])


def kernel_gradient_in_rows(x, gradient, padding: tuple[int, int], of_rows, apart) -> jax.Array:
    """The gradient by the kernel of `in_rows`: x [B, H, W, C], gradient [B, H', W', F] -> [3, w, C, F].

    Args:
      of_rows: the gradient by the kernel of `convolve_rows`: [B, R, W, C], [B, R, W', F] -> [1, w, C, F].
    """
    tiles = _tiles(gradient.shape[1])
    inputs = _spread_rows(_INPUT, x, padding[0], tiles, apart)
    pairs = zip(inputs, _spread_rows(_OF_OUTPUT, gradient, 0, tiles, apart), strict=True)
    return jnp.concatenate(_combine(_OF_KERNEL, [of_rows(*pair) for pair in pairs]))


def cost_of_tiles(shape, kernel_shape, padding: tuple[int, int], stride: int, groups: int) -> float:
    """About the part of the plain form's products that this takes; infinite where it does not apply.

    What the kernel's own sums take, 64 tiles' products, decides in small batches. A batch of any size, as
    exports have it, may be a small one.
    """
    if not _applies(shape, kernel_shape, stride, groups, 128):
        return math.inf
    size = [n + 2 * p - 2 for n, p in zip(shape[1:3], padding, strict=True)]
    return 4 * (shape[0] * math.prod(map(_tiles, size)) + 64) / (shape[0] * math.prod(size))


def in_tiles(x, kernel, padding: tuple[int, int], apart) -> jax.Array:
    """x [B, H, W, C] * kernel [3, 3, C, F] -> [B, H', W', F], at stride 1.

    Args:
      padding: zeros on both sides of the height and of the width.
      apart: makes a function of arrays one that is not fused with what is round it.
    """
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[1:3], padding, strict=True))
    tiles, features = (_tiles(height), _tiles(width)), kernel.shape[3]

    def outputs(*products):
        products = [p.reshape(len(x), *tiles, features) for p in products]
        y = jnp.stack([jnp.stack(row, 3) for row in _gather(_OUTPUT, products)], 2)
        return y.reshape(len(x), TILE * tiles[0], TILE * tiles[1], features)

    inputs = _spread(_INPUT, x, padding, tiles, apart)
    pairs = zip(inputs, _kernels(kernel, apart), strict=True)
    return apart(outputs)(*[a @ b for a, b in pairs])[:, :height, :width]


def kernel_gradient_in_tiles(x, gradient, padding: tuple[int, int], apart) -> jax.Array:
    """The gradient by the kernel of `in_tiles`: x [B, H, W, C], gradient [B, H', W', F] -> [3, 3, C, F]."""
    tiles = [_tiles(n) for n in gradient.shape[1:3]]

    def kernels(*products):
        return jnp.stack([jnp.stack(row) for row in _gather(_OF_KERNEL, products)])

    inputs = _spread(_INPUT, x, padding, tiles, apart)
    pairs = zip(inputs, _spread(_OF_OUTPUT, gradient, (0, 0), tiles, apart), strict=True)
    # XLA transposes what is on the left.
    return apart(kernels)(*[jnp.einsum('nf,nc->fc', b, a).T for a, b in pairs])


def _applies(shape, kernel_shape, stride: int, groups: int, features: int) -> bool:
    plain = isinstance(shape[0], int) and stride == groups == 1
    return plain and kernel_shape[:2] == (3, 3) and min(kernel_shape[2:]) >= features


def _tiles(size: int) -> int:
    return -(-size // TILE)


def _spread(matrix, x, padding, tiles, apart) -> list:
    """The matrix from both sides of each tile of x [B, H, W, C]: 36 arrays [tiles of all images, C]."""

    def columns(*rows):
        parts = [part for row in rows for part in _along(2, matrix, row, tiles[1])]
        return [part.reshape(-1, x.shape[3]) for part in parts]

    sides = _edges(matrix, x.shape[2], padding[1], tiles[1])
    return apart(columns)(*_spread_rows(matrix, x, padding[0], tiles[0], apart, sides))


def _spread_rows(matrix, x, padding: int, tiles: int, apart, sides=(0, 0, 0)) -> list:
    """The matrix times the rows of each tile of x [B, H, W, C], padded: arrays [B, tiles, W', C]."""

    def rows(x):
        edges = ((0, 0, 0), _edges(matrix, x.shape[1], padding, tiles), sides, (0, 0, 0))
        return _along(1, matrix, jax.lax.pad(x, jnp.zeros((), x.dtype), edges), tiles)

    return apart(rows)(x)


def _edges(matrix, size: int, padding: int, tiles: int) -> tuple[int, int, int]:
    """For `lax.pad`: the padding, and what the last tile lacks."""
    return padding, TILE * (tiles - 1) + len(matrix[0]) - padding - size, 0


def _along(axis: int, matrix, x, tiles: int) -> list:
    """The matrix times what lies at each of its places in so many tiles."""
    starts, reach = range(len(matrix[0])), TILE * (tiles - 1) + 1
    parts = [jax.lax.slice_in_dim(x, i, i + reach, TILE, axis) for i in starts]
    return _combine(matrix, parts)


def _gather(matrix, products):
    """The matrix from both sides of 6 by 6 products: rows of columns."""
    rows = [_combine(matrix, products[i : i + 6]) for i in range(0, 36, 6)]
    columns = [_combine(matrix, column) for column in zip(*rows, strict=True)]
    return zip(*columns, strict=True)


def _kernels(kernel, apart):
    """36 arrays [C, F]."""
    rows = apart(lambda kernel: _combine(_KERNEL, list(kernel)))(kernel)
    return apart(lambda *rows: [p for row in rows for p in _combine(_KERNEL, list(row))])(*rows)


def _combine(matrix, parts):
    """The matrix times a list of arrays."""
    return [
        sum(factor * part for factor, part in zip(row, parts, strict=True) if factor)
        for row in matrix
    ]
