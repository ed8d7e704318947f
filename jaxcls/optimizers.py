"""Optimisers: clipping, an Optax optimiser on a schedule, and weight decay as one chain.

`weight_decay` is of kernels only (`decay_mask`) and, where the method allows it, decoupled:
`p -= lr(step) * weight_decay * p`. L2 in the gradient, which momentum accumulates (PyTorch's
`SGD(weight_decay=)`, most papers before 2018), is another thing: `penalty(l2=)` in the loss.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxcls import registry
from jaxcls.errors import UserError, require

Params = Any
Schedule = Callable[[jax.Array], jax.Array]


# Leaves of several axes that are no kernels: a ViT's, and a convolution that is set from the data.
_NO_KERNELS = ('position_embedding', 'class_token', 'whitening')


def decay_mask(params: Params) -> Params:
    """True for kernels, False for biases, norm scales and embeddings: a tree like `params`."""

    def is_kernel(path, p):
        return p.ndim >= 2 and getattr(path[-1], 'key', None) not in _NO_KERNELS

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def penalty(params: Params, l1: float, l2: float) -> jax.Array:
    """`l1 * sum |w| + l2 / 2 * sum w^2` over the leaves of `decay_mask`: float32 `[]`."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(decay_mask(params)), strict=True)
    kernels = [p.astype(jnp.float32) for p, is_kernel in pairs if is_kernel]
    total = jnp.float32(0.0)
    for weight, norm in ((l1, jnp.abs), (l2 / 2, jnp.square)):
        if weight:
            total += weight * sum(jnp.sum(norm(kernel)) for kernel in kernels)
    return total


def ema_update(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """The moving average of the parameters after one more update, in the dtypes of `ema`.

    The decay is `min(decay, (1 + step) / (10 + step))`, `step` being the int32 number of earlier
    updates, so that the average soon forgets the initial values. 0 gives `params` themselves.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, params)


def evaluation_params(opt_state: Any, params: Params) -> Params:
    """The parameters to evaluate: the averaged ones of a schedule-free optimiser, else `params`."""

    def averages(node):
        return isinstance(node, contrib.ScheduleFreeState)

    for node in filter(averages, jax.tree.leaves(opt_state, is_leaf=averages)):
        return contrib.schedule_free_eval_params(node, params)
    return params


def param_path(path: tuple) -> str:
    """A leaf's place in the tree of parameters as text: 'stage1_block1/conv1/conv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def frozen_mask(params: Params, freeze: str) -> Params:
    """True for the leaves in whose path (`param_path`) the regular expression is found; '' is none."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(freeze and re.search(freeze, param_path(path))), params
    )


def layer_scales(params: Params, layers: Sequence[str], layer_decay: float) -> Params:
    """Factors on the learning rate of each leaf: 1 in the last layer, `layer_decay` less each before.

    Howard & Ruder 2018, Clark 2020 (section 3.2 of https://arxiv.org/abs/2003.10555).

    Args:
      layers: the top-level modules in the order of the forward pass. What is in none of them, such
        as a position embedding, goes with the first.
    """
    depth = {name: i for i, name in enumerate(layers)}
    last = len(layers) - 1

    def scale(path, _):
        return layer_decay ** (last - depth.get(param_path(path).split('/')[0], 0))

    return jax.tree_util.tree_map_with_path(scale, params)


# An entry of OPTIMIZERS is `build(learning_rate, weight_decay, **arguments)`, where `learning_rate`
# is a schedule. The adapters below make one of an Optax factory and differ in where decay goes.


def _like(factory: Callable, build: Callable) -> Callable:
    """Gives `build` those arguments of `factory` that a config can hold, as its signature.

    Others keep Optax's default: None, functions, dtypes, masks, names, and the decay, set here.
    """
    kept = [
        p.replace(kind=p.KEYWORD_ONLY)
        for p in inspect.signature(factory).parameters.values()
        if isinstance(p.default, (bool, int, float, tuple))
        and p.name != 'learning_rate'
        and 'weight_decay' not in p.name
    ]
    build.__signature__ = inspect.Signature(kept)
    return build


def _decay(learning_rate: Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Decoupled decay (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101)."""
    if not weight_decay:
        return optax.identity()
    return optax.add_decayed_weights(lambda count: -weight_decay * learning_rate(count), decay_mask)


def _decayed(factory: Callable) -> Callable:
    """The optimiser, then decoupled decay."""

    def build(learning_rate, weight_decay, **kwargs):
        return optax.chain(factory(learning_rate, **kwargs), _decay(learning_rate, weight_decay))

    return _like(factory, build)


def _decay_inside(factory: Callable) -> Callable:
    """Decay where Optax puts it: within the ratio that scales each layer's update."""

    def build(learning_rate, weight_decay, **kwargs):
        return factory(learning_rate, weight_decay=weight_decay, **kwargs)

    return _like(factory, build)


def _decay_in_gradient(factory: Callable) -> Callable:
    """Decay added to the gradient: the optimiser counts its steps from the initial parameters."""

    def build(learning_rate, weight_decay, **kwargs):
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        return optax.chain(decay, factory(learning_rate, **kwargs))

    return _like(factory, build)


def _decay_estimated(factory: Callable) -> Callable:
    """Decoupled decay at the rate that the optimiser estimates, times `learning_rate`."""

    def build(learning_rate, weight_decay, **kwargs):
        inner = factory(learning_rate, **kwargs)

        def update(grads, state, params, **extra):
            updates, new_state = inner.update(grads, state, params, **extra)
            shrink = weight_decay * learning_rate(state.count) * state.estim_lr

            def decayed(u, p, kernel):
                return u - shrink.astype(p.dtype) * p if kernel else u

            return jax.tree.map(decayed, updates, params, decay_mask(params)), new_state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return _like(factory, build)


def _sgd(learning_rate, *, momentum=0.9, nesterov=False):
    return optax.sgd(learning_rate, momentum or None, nesterov)


def _rmsprop(learning_rate, *, decay=0.9, momentum=0.0, eps=1e-8, centered=False, nesterov=False):
    return optax.rmsprop(
        learning_rate, decay, eps, momentum=momentum or None, centered=centered, nesterov=nesterov
    )


def _noisy_sgd(learning_rate, *, eta=0.01, gamma=0.55, seed=0):
    return optax.noisy_sgd(learning_rate, eta, gamma, key=seed)


def _sm3(learning_rate, *, momentum=0.9):
    # optax.sm3 takes a number for the rate, not a schedule; so does optax.rprop.
    return optax.chain(optax.scale_by_sm3(momentum), optax.scale_by_learning_rate(learning_rate))


def _rprop(learning_rate, *, eta_minus=0.5, eta_plus=1.2, min_step=1e-6, max_step=50.0):
    # For full batches. Each weight's own step starts at 1, and is a factor on the learning rate.
    steps = optax.scale_by_rprop(1.0, eta_minus, eta_plus, min_step, max_step)
    return optax.chain(steps, optax.scale_by_learning_rate(learning_rate))


def _polyak_sgd(learning_rate, *, f_min=0.0):
    # Steps of (loss - f_min) / |grad|^2, at most the learning rate (https://arxiv.org/abs/2002.10542).
    # With gradients scaled by sqrt(lr), a cap of 1 on the step is a cap of lr on the whole.
    def root(count):
        return jnp.sqrt(learning_rate(count))

    polyak = optax.scale_by_polyak(f_min=f_min)
    return optax.chain(optax.scale_by_schedule(root), polyak, optax.scale_by_learning_rate(root))


def _dog(learning_rate, *, init_step=1e-6, eps=1e-8):
    return contrib.dog(learning_rate, ('heuristic', init_step), eps)


def _mechanic_adam(learning_rate, weight_decay, *, b1=0.9, b2=0.999, eps=1e-8, s_init=1e-6):
    adam = optax.adam(learning_rate, b1, b2, eps)
    return contrib.mechanize(optax.chain(adam, _decay(learning_rate, weight_decay)), s_init=s_init)


def _schedule_free_sgd(learning_rate, weight_decay, *, b1=0.9, weight_lr_power=2.0):
    sgd = optax.sgd(learning_rate)
    return _schedule_free(sgd, learning_rate, weight_decay, b1, weight_lr_power)


def _schedule_free_adamw(
    learning_rate, weight_decay, *, b1=0.9, b2=0.999, eps=1e-8, weight_lr_power=2.0
):
    # Adam without momentum, which the averaging replaces.
    adam = optax.rmsprop(learning_rate, b2, eps, eps_in_sqrt=False, bias_correction=True)
    return _schedule_free(adam, learning_rate, weight_decay, b1, weight_lr_power)


def _schedule_free(base, learning_rate, weight_decay, b1, weight_lr_power):
    require(b1 > 0, 'optimizer.b1', b1, 'more than 0 and below 1')
    base = optax.chain(base, _decay(learning_rate, weight_decay))
    return contrib.schedule_free(base, learning_rate, b1, weight_lr_power)


def muon_axes(params: Params) -> Params:
    """Dense kernels [I, O] as they are, convolutions [H, W, I, O] as [H * W * I, O], no others."""
    axes = {2: contrib.MuonDimensionNumbers(0, 1), 4: contrib.MuonDimensionNumbers((0, 1, 2), 3)}
    return jax.tree.map(lambda p: axes.get(p.ndim), params)


# The scale makes Muon's updates as large as those of Adam, which takes the other leaves: one rate
# serves both (Liu et al., 2025, https://arxiv.org/abs/2502.16982).
_muon = functools.partial(contrib.muon, muon_weight_dimension_numbers=muon_axes, consistent_rms=0.2)
_lamb = functools.partial(optax.lamb, mask=decay_mask)
_lars = functools.partial(optax.lars, weight_decay_mask=decay_mask, trust_ratio_mask=decay_mask)
_lion = functools.partial(optax.lion, weight_decay=0.0)

# Those whose steps depend on the value of the loss.
NEED_LOSS = ('momo', 'momo_adam', 'polyak_sgd')
# Left out of Optax's: lbfgs (its line search needs one batch's loss many times in a step), sophia
# (needs Hessian products of the loss), galore (saves memory on the matrices of language models). Names
# in w are those without it, whose decay is decoupled here, under the names people look for.
OPTIMIZERS = {
    'acprop': _decayed(contrib.acprop),
    'adabelief': _decayed(optax.adabelief),
    'adadelta': _decayed(optax.adadelta),
    'adafactor': _decayed(optax.adafactor),
    'adagrad': _decayed(optax.adagrad),
    'adam': _decayed(optax.adam),
    'adamax': _decayed(optax.adamax),
    'adamaxw': _decayed(optax.adamax),
    'adamw': _decayed(optax.adam),
    'adan': _decayed(optax.adan),
    'ademamix': _decayed(contrib.ademamix),
    'adopt': _decayed(contrib.adopt),
    'amsgrad': _decayed(optax.amsgrad),
    'cocob': _decay_in_gradient(contrib.cocob),
    'dadapt_adamw': _decay_estimated(contrib.dadapt_adamw),
    'dog': _decay_in_gradient(_dog),
    'dowg': _decay_in_gradient(contrib.dowg),
    'fromage': _decayed(optax.fromage),
    'lamb': _decay_inside(_lamb),
    'lars': _decay_inside(_lars),
    'lion': _decayed(_lion),
    'madgrad': _decay_in_gradient(contrib.madgrad),
    'mechanic_adam': _mechanic_adam,
    'momo': _decayed(contrib.momo),
    'momo_adam': _decayed(contrib.momo_adam),
    'muon': _decayed(_muon),
    'nadam': _decayed(optax.nadam),
    'nadamw': _decayed(optax.nadam),
    'noisy_sgd': _decayed(_noisy_sgd),
    'novograd': _decayed(optax.novograd),
    'optimistic_adam': _decayed(optax.optimistic_adam_v2),
    'optimistic_gradient_descent': _decayed(optax.optimistic_gradient_descent),
    'polyak_sgd': _decayed(_polyak_sgd),
    'prodigy': _decay_estimated(contrib.prodigy),
    'radam': _decayed(optax.radam),
    'rmsprop': _decayed(_rmsprop),
    'rprop': _decayed(_rprop),
    'schedule_free_adamw': _schedule_free_adamw,
    'schedule_free_sgd': _schedule_free_sgd,
    'sgd': _decayed(_sgd),
    'sign_sgd': _decayed(optax.sign_sgd),
    'signum': _decayed(optax.signum),
    'simplified_ademamix': _decayed(contrib.simplified_ademamix),
    'sm3': _decayed(_sm3),
    'yogi': _decayed(optax.yogi),
}

# Methods that would catch up with what is taken off their steps.
_SCHEDULE_FREE = ('schedule_free_adamw', 'schedule_free_sgd')
_MOVE_TOGETHER = {
    'freeze': _SCHEDULE_FREE,
    'layer_decay': (*_SCHEDULE_FREE, 'cocob', 'dadapt_adamw', 'madgrad', 'mechanic_adam'),
}

_BELOW_ONE = ('adam_b1', 'adam_b2', 'b1', 'b2', 'b3', 'beta', 'betas', 'decay', 'momentum', 'rho')


def make_optimizer(
    *,
    name: str,
    schedule: Schedule,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    adaptive_clip: float = 0.0,
    freeze: str = '',
    layer_decay: float = 1.0,
    layers: Sequence[str] = (),
    **kwargs,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, the optimiser by name, decay. Its state is arrays, none shared with the parameters.

    Some methods need the loss: call `tx.update(grads, opt_state, params, value=loss)` for all.

    Args:
      schedule: the rate of each step. For methods that find their own (cocob, dadapt_adamw, dog,
        dowg, mechanic_adam, prodigy) it is a factor: let it peak at 1. For momo, momo_adam and
        polyak_sgd it is the longest step. The schedule-free ones want it constant after warm-up,
        and `evaluation_params` to evaluate.
      weight_decay: of kernels only; 0 is off.
      clip_norm: the largest norm of the whole gradient; 0 is off.
      adaptive_clip: the largest norm of a unit's gradient, as a part of the norm of its weights
        (Brock et al., 2021, https://arxiv.org/abs/2102.06171); 0 is off.
      freeze: regular expression; parameters whose path it is found in stay as they are, and have no
        state (`frozen_mask`).
      layer_decay, layers: see `layer_scales`; 1 is off.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    build = registry.bind(OPTIMIZERS, 'optimizer', name=name, **kwargs)
    for field, value in kwargs.items():
        _check_argument(field, value, registry.defaults(OPTIMIZERS[name])[field])
    ours = {'weight_decay': weight_decay, 'clip_norm': clip_norm, 'adaptive_clip': adaptive_clip}
    for field, value in ours.items():
        require(0 <= value < math.inf, field, value, 'at least 0 and finite')
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    adaptive = optax.adaptive_grad_clip(adaptive_clip) if adaptive_clip else optax.identity()
    tx = optax.chain(clip, adaptive, build(schedule, weight_decay))
    refused = {'freeze': bool(freeze), 'layer_decay': layer_decay != 1}
    for field in (field for field, given in refused.items() if given):
        if name in _MOVE_TOGETHER[field]:
            raise UserError(
                f'optimizer {name!r} does not go with {field}: it takes each step from where its own '
                "steps alone would have led. Take 'adamw' or 'sgd'."
            )
    if layer_decay != 1:
        tx = optax.chain(tx, _scale_layers(layers, layer_decay))
    if freeze:
        parts = {False: tx, True: optax.set_to_zero()}
        tx = optax.partition(parts, lambda params: frozen_mask(params, freeze))
    return optax.GradientTransformationExtraArgs(
        lambda p: jax.tree.map(_own, tx.init(p)), tx.update
    )


def _scale_layers(layers: Sequence[str], layer_decay: float) -> optax.GradientTransformation:
    def update(updates, _params):
        scales = layer_scales(updates, layers, layer_decay)
        return jax.tree.map(lambda u, scale: u * jnp.asarray(scale, u.dtype), updates, scales)

    return optax.stateless(update)


def _own(leaf: Any) -> jax.Array:
    """A copy of a leaf, of one fixed type: buffers that the parameters share cannot be donated."""
    return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype)


def _check_argument(field: str, value: Any, default: Any):
    """A decay rate below 1, every other number at least 0, as many of them as in the default."""
    sizes = [len(v) if isinstance(v, (tuple, list)) else 0 for v in (value, default)]
    require(sizes[0] == sizes[1], f'optimizer.{field}', value, f'{sizes[1]} values, as {default}')
    values = value if sizes[0] else (value,)
    if field in _BELOW_ONE and default != 1.0:
        require(all(0 <= v < 1 for v in values), f'optimizer.{field}', value, 'in [0, 1)')
    elif field != 'ns_coeffs':
        require(all(0 <= v < math.inf for v in values), f'optimizer.{field}', value, 'at least 0')
