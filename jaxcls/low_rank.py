"""Kernels as products of two thin ones: a layer becomes two, with fewer numbers and fewer products.

By the singular value decomposition of a kernel as a matrix from what a layer reads to its outputs (Denton
et al., 2014, https://arxiv.org/abs/1404.0736; Zhang et al., 2015, https://arxiv.org/abs/1505.06798).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxcls import weights
from jaxcls.errors import require
from jaxcls.models.convolutions import convolve
from jaxcls.models.layers import Conv, max_pool, pair

_IN, _OUT = 'kernel_in', 'kernel_out'


def choose_ranks(model: nn.Module, variables: Any, image_shape, energy: float) -> dict[str, int]:
    """The rank of each kernel, by path, that keeps a share of its energy where that makes it smaller.

    Args:
      image_shape: (H, W, C).
      energy: share of the sum of squared singular values, in (0, 1].
    """
    require(0 < energy <= 1, 'the energy to keep', energy, 'more than 0 and at most 1')
    flat, ranks = weights.flatten(variables), {}
    for path in _kernels(model, image_shape):
        matrix = _matrix(flat[path])
        squares = np.linalg.svd(matrix, compute_uv=False) ** 2
        kept = np.cumsum(squares) / max(squares.sum(), np.finfo(np.float64).tiny)
        rank = min(int(np.searchsorted(kept, energy - 1e-12)) + 1, len(squares))
        if rank * sum(matrix.shape) < matrix.size:
            ranks[path] = rank
    return ranks


def factorize(variables: Any, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The variables, each kernel of `ranks` replaced by two: `kernel_in` [..., r], `kernel_out` [r, F]."""
    flat = {path: np.asarray(leaf) for path, leaf in weights.flatten(variables).items()}
    for path, rank in ranks.items():
        kernel, module = flat.pop(path), path.rpartition('/')[0]
        u, s, v = np.linalg.svd(_matrix(kernel), full_matrices=False)
        root = np.sqrt(s[:rank])
        first = (u[:, :rank] * root).reshape(*kernel.shape[:-1], rank)
        flat[f'{module}/{_IN}'] = first.astype(kernel.dtype)
        flat[f'{module}/{_OUT}'] = (root[:, None] * v[:rank]).astype(kernel.dtype)
    return weights.unflatten(flat)


class Factorized(NamedTuple):
    """A network of factorised variables, for `apply` alone."""

    model: nn.Module

    @property
    def dtype(self) -> Any:
        """That of the computation."""
        return self.model.dtype

    def apply(self, variables, *args, **kwargs):
        """As the model's own."""
        with nn.intercept_methods(_in_two):
            return self.model.apply(variables, *args, **kwargs)


def _in_two(call, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or not module.has_variable('params', _IN):
        return call(*args, **kwargs)
    (x,) = args
    first, second = (module.get_variable('params', name) for name in (_IN, _OUT))
    if isinstance(module, Conv):
        size, dtype = pair(module.kernel_size), module.style.dtype
        half = tuple((k - 1) // 2 for k in size)
        padding = half if module.padding is None else pair(module.padding)
        x = convolve(x.astype(dtype), first.astype(dtype), module.stride, padding)
        x = convolve(x, second.astype(dtype)[None, None], 1, (0, 0))
        x = (x, max_pool(x, *module.pool)) if module.pool else x
    else:
        dtype = module.dtype or x.dtype
        x = x.astype(dtype) @ first.astype(dtype) @ second.astype(dtype)
    if module.has_variable('params', 'bias'):
        bias = module.get_variable('params', 'bias').astype(dtype)
        x = jax.tree.map(lambda x: x + bias, x)
    return x


def _kernels(model: nn.Module, image_shape) -> list[str]:
    """The paths of the kernels of dense layers and of convolutions that are not grouped."""
    found = []

    def record(call, args, kwargs, context):
        module = context.module
        plain = isinstance(module, nn.Dense) or (isinstance(module, Conv) and module.groups == 1)
        if plain and context.method_name == '__call__':
            found.append('/'.join(('params', *module.path, 'kernel')))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        image = jnp.zeros((1, *image_shape), model.dtype)
        jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    return list(dict.fromkeys(found))


def _matrix(kernel: Any) -> np.ndarray:
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
