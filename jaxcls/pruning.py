"""Pruning while training: the smallest weights become zero, and stay it.

`make_pruning` is the last part of an Optax chain. The masks are arrays of its state, so that checkpoints,
resuming and sharding need nothing more.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcls import optimizers, registry
from jaxcls.errors import UserError, require, require_expression

Params = Any


class PruningState(NamedTuple):
    """Steps taken, and bool arrays like those parameters that are pruned, by path: False is zero."""

    count: jax.Array
    masks: dict[str, jax.Array]


def magnitude(
    total_steps: int,
    freeze: str,
    *,
    sparsity: float = 0.9,
    begin: float = 0.2,
    end: float = 0.8,
    every: int = 100,
    scope: str = 'adaptive',
    keep: str = '',
) -> optax.GradientTransformation | None:
    """Zeros the kernels' smallest weights, a growing share of them (Han et al., 2015; Zhu & Gupta, 2017).

    https://arxiv.org/abs/1506.02626, https://arxiv.org/abs/1710.01878. The share is 0 up to `begin`, then
    `sparsity_at`. What is zero has no update any more, whatever the optimiser and its momentum say.

    Args:
      total_steps: of the run.
      freeze: of the config: what it fixes is not pruned, and does not count.
      sparsity: share of zeros in the end, in [0, 1). 0 is off.
      begin, end: shares of the run between which it grows. Alike, it is all pruned at once.
      every: steps from one growth to the next.
      scope: 'global' ranks all kernels' weights together, 'layer' each kernel's alone; 'adaptive' all
        together by w^2 over the sum of the larger ones' of their kernel (Lee et al., 2021, LAMP,
        https://arxiv.org/abs/2010.07611).
      keep: regular expression; kernels whose path it is found in stay dense, such as '^head'.

    Returns:
      A transformation to put last into a chain, or None where it is off.
    """
    require(0 <= sparsity < 1, 'config.pruning.sparsity', sparsity, 'at least 0 and below 1')
    require(
        0 <= begin <= end <= 1, 'config.pruning.begin', begin, f'in [0, end], and end={end} <= 1'
    )
    require(every >= 1, 'config.pruning.every', every, 'at least 1')
    masks_of = registry.lookup(SCOPES, scope, 'config.pruning.scope')
    require_expression('config.pruning.keep', keep, "'^head' leaves the head dense")
    if not sparsity:
        return None
    first, last = round(begin * total_steps), max(round(end * total_steps), 1)

    def init(params):
        kernels = _kernels(params, freeze, keep)
        if not kernels:
            raise UserError(
                'config.pruning finds no kernel to prune: config.freeze and config.pruning.keep leave '
                'none. Narrow them.'
            )
        masks = {path: jnp.ones(leaf.shape, bool) for path, leaf in kernels.items()}
        return PruningState(jnp.zeros((), jnp.int32), masks)

    def update(updates, state, params):
        count = state.count + 1
        moved = optax.apply_updates(params, updates)
        kernels = {path: leaf for path, leaf in _by_path(moved).items() if path in state.masks}
        due = (
            (count >= first) & (((count - first) % every == 0) | (count == last)) & (count <= last)
        )
        share = sparsity_at(count, sparsity, first, last)
        masks = jax.lax.cond(
            due, lambda masks: masks_of(kernels, masks, share), lambda masks: masks, state.masks
        )

        def zeroed(path, update, p):
            mask = masks.get(optimizers.param_path(path))
            return update if mask is None else jnp.where(mask, update, -p)

        updates = jax.tree_util.tree_map_with_path(zeroed, updates, params)
        return updates, PruningState(count, masks)

    return optax.GradientTransformation(init, update)


PRUNINGS = {'none': lambda _total_steps, _freeze: None, 'magnitude': magnitude}


def make_pruning(
    *, name: str, total_steps: int, freeze: str = '', **kwargs
) -> optax.GradientTransformation | None:
    """The pruning by name for a run of so many steps; None where there is none.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    return registry.bind(PRUNINGS, 'pruning', name=name, **kwargs)(total_steps, freeze)


def sparsity_at(step, sparsity: float, first: int, last: int) -> jax.Array:
    """`sparsity (1 - (1 - t)^3)`, t going from 0 at step `first` to 1 at `last`: float32 [] (Zhu & Gupta)."""
    t = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
    t = jnp.where(step >= last, 1.0, t)
    return sparsity * (1 - (1 - t) ** 3)


def masked(opt_state: Any, params: Params) -> Params:
    """The parameters with what is pruned at exact zero: for averages, which only come near it."""
    for state in filter(_is_state, jax.tree.leaves(opt_state, is_leaf=_is_state)):
        return apply_masks(state.masks, params)
    return params


def apply_masks(masks: dict[str, jax.Array], params: Params) -> Params:
    """The parameters, zero where a mask is False."""

    def zeroed(path, p):
        mask = masks.get(optimizers.param_path(path))
        return p if mask is None else jnp.where(mask, p, jnp.zeros((), p.dtype))

    return jax.tree_util.tree_map_with_path(zeroed, params)


def prune(
    params: Params, sparsity: float, scope: str = 'adaptive', keep: str = ''
) -> tuple[Params, dict[str, jax.Array]]:
    """Prunes trained parameters at once: the pruned ones, and their masks."""
    kernels = _kernels(params, '', keep)
    old = {path: jnp.ones(leaf.shape, bool) for path, leaf in kernels.items()}
    masks = registry.lookup(SCOPES, scope, 'scope')(kernels, old, jnp.float32(sparsity))
    return apply_masks(masks, params), masks


def _is_state(node: Any) -> bool:
    return isinstance(node, PruningState)


def _by_path(params: Params) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {optimizers.param_path(path): leaf for path, leaf in leaves}


def _kernels(params: Params, freeze: str, keep: str) -> dict[str, jax.Array]:
    """Those of `optimizers.decay_mask` whose path neither expression is found in."""
    left_out = [expression for expression in (freeze, keep) if expression]
    is_kernel = _by_path(optimizers.decay_mask(params))
    return {
        path: leaf
        for path, leaf in _by_path(params).items()
        if is_kernel[path] and not any(re.search(e, path) for e in left_out)
    }


def _threshold(size: jax.Array, share: jax.Array) -> jax.Array:
    """The largest of the smallest `share` of the sizes [N]; below all of them where that is none."""
    count = jnp.round(share * size.size).astype(jnp.int32)
    return jnp.where(count > 0, jnp.sort(size)[jnp.maximum(count - 1, 0)], -1.0)


def _ranked_masks(score, kernels, masks, share):
    scores = {path: score(kernel) for path, kernel in kernels.items()}
    limit = _threshold(jnp.concatenate([s.ravel() for s in scores.values()]), share)
    return {path: masks[path] & (s > limit) for path, s in scores.items()}


def _layer_masks(kernels, masks, share):
    return {
        path: _ranked_masks(_size, {path: k}, masks, share)[path] for path, k in kernels.items()
    }


def _size(kernel: jax.Array) -> jax.Array:
    return jnp.abs(kernel).astype(jnp.float32)


def _adaptive(kernel: jax.Array) -> jax.Array:
    """w^2 over the sum of those of its layer that are no smaller, so that no layer is lost whole."""
    squares = jnp.square(_size(kernel)).ravel()
    order = jnp.argsort(squares)
    tails = jnp.cumsum(squares[order][::-1])[::-1]
    scores = squares[order] / jnp.maximum(tails, jnp.finfo(jnp.float32).tiny)
    return jnp.zeros_like(squares).at[order].set(scores).reshape(kernel.shape)


SCOPES: dict[str, Callable] = {
    'global': functools.partial(_ranked_masks, _size),
    'layer': _layer_masks,
    'adaptive': functools.partial(_ranked_masks, _adaptive),
}


def density(params: Params) -> tuple[int, int]:
    """How many of the parameters are not zero, and how many there are; of int8 without the scales."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: hasattr(node, 'qvalue'))
    leaves = [np.asarray(getattr(leaf, 'qvalue', leaf)) for leaf in leaves]
    count = functools.reduce(lambda n, leaf: n + int(np.count_nonzero(leaf)), leaves, 0)
    return count, sum(leaf.size for leaf in leaves)
