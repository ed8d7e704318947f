"""The train step and its four seams: `prepare`, `objective`, `gradients`, `tx`.

`make_train_step` composes one pure function; `make_run_steps` puts many steps into one program. Each
seam has a plain form here; a new idea replaces one of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from jaxcls import augment, losses, metrics, optimizers, pruning

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that a run changes, as arrays.

    Attributes:
      step: int32 [], steps taken.
      params: the model's parameters.
      batch_stats: running statistics of its norms, or {}.
      opt_state: Optax's state, float32 where `params` are bfloat16.
      ema: moving average of `params`, float32 too, or {} where there is none.
      bad_steps: int32 [], non-finite steps in a row up to now.
      key: typed PRNG key of the run; a step uses `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    bad_steps: jax.Array
    key: jax.Array


def init_state(
    variables: Any, tx: optax.GradientTransformation, key: jax.Array, ema_decay: float
) -> TrainState:
    """The state of step 0 of a model's variables; `key` is the run's."""
    params = variables['params']
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables.get('batch_stats', {}),
        opt_state=tx.init(_wide(params)),
        ema=jax.tree.map(jnp.copy, _wide(params)) if ema_decay else {},
        bad_steps=jnp.int32(0),
        key=key,
    )


def _wide(tree):
    """bfloat16 leaves as float32: averages and small updates need the digits."""
    narrow = jnp.bfloat16
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == narrow else x, tree)


def make_prepare(
    augmentation: Callable,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    dtype,
    attack: Callable[[jax.Array, Batch, TrainState], Batch] | None = None,
) -> Callable[[jax.Array, Batch, TrainState | None], Batch]:
    """Seam 1. `prepare(key, batch, state)` augments and normalises a raw batch.

    The result has `image` of `dtype` [B, H, W, C], `target` float32 [B, K] (soft labels), `label` int32 [B],
    `mask` bool [B]. In between, `attack(key, batch, state)` replaces the augmented images, or adds
    `adversarial` ones, which are normalised alike.
    """

    def prepare(key, batch, state):
        target = jax.nn.one_hot(batch['label'], num_classes, dtype=jnp.float32)
        batch = {**batch, 'image': augment.to_float(batch['image']), 'target': target}
        batch = augmentation(key, batch)
        if attack:
            batch = attack(jax.random.fold_in(key, 1), batch, state)
        images = {
            name: augment.normalize(batch[name], mean, std).astype(dtype)
            for name in ('image', 'adversarial')
            if name in batch
        }
        return {**batch, **images}

    return prepare


def make_objective(
    model: nn.Module,
    loss: Callable,
    l1: float = 0.0,
    l2: float = 0.0,
    freeze: str = '',
    penalty: Callable | None = None,
    blend: Callable | None = None,
) -> Callable:
    """Seam 2. `objective(params, batch_stats, batch, key) -> (loss, aux)`.

    The loss is the mean over the examples of the mask, plus penalties, plus `model.aux_weight` times
    that of each auxiliary head of a model that has them (features 'aux_logits...'). `aux` holds the
    new `batch_stats` and the masked `sums` to log, which are of the main head alone. Parameters that
    `freeze` names (`optimizers.frozen_mask`) have no gradient, and cost none.

    `penalty(apply, logits, batch_stats, batch) -> ([B], batch_stats)` is added to the loss of the
    examples; `apply(image, batch_stats) -> ((logits, features), updates)` is the network. Before,
    `blend(values, logits, features, batch) -> [B]` may change it (distillation).
    """

    def objective(params, batch_stats, batch, key):
        if freeze:
            frozen = optimizers.frozen_mask(params, freeze)
            stop = jax.lax.stop_gradient
            params = jax.tree.map(lambda p, fixed: stop(p) if fixed else p, params, frozen)

        def apply(image, batch_stats):
            return model.apply(
                {'params': params, 'batch_stats': batch_stats},
                image,
                train=True,
                rngs={'dropout': key},
                mutable=['batch_stats'],
            )

        (logits, features), updates = apply(batch['image'], batch_stats)
        batch_stats = updates.get('batch_stats', {})
        values = loss(logits, batch['target'])
        sums = metrics.batch_sums(logits, batch['label'], values, batch['mask'])
        for name, aux_logits in features.items():
            if name.startswith('aux_logits'):
                values = values + model.aux_weight * loss(aux_logits, batch['target'])
        if blend:
            values = blend(values, logits, features, batch)
        if penalty:
            more, batch_stats = penalty(apply, logits, batch_stats, batch)
            values = values + more
        mean = losses.masked_mean(values, batch['mask'])
        if l1 or l2:
            mean = mean + optimizers.penalty(params, l1, l2)
        return mean, {'batch_stats': batch_stats, 'sums': sums}

    return objective


def plain_gradients(objective, params, batch_stats, batch, key):
    """Seam 3. `gradients(objective, params, batch_stats, batch, key) -> ((loss, aux), grads)`."""
    return jax.value_and_grad(objective, has_aux=True)(params, batch_stats, batch, key)


def accumulated_gradients(accumulate_steps: int, gradients: Callable = plain_gradients) -> Callable:
    """The mean gradient over equal parts of the batch, one after the other, to save memory.

    Part *i* takes rows i, i + n, ..., so that every device keeps its own rows. Batch statistics are
    updated part by part.
    """

    def split(x):
        return jnp.swapaxes(x.reshape(-1, accumulate_steps, *x.shape[1:]), 0, 1)

    def accumulated(objective, params, batch_stats, batch, key):
        def body(carry, inputs):
            batch_stats, total = carry
            part, key = inputs
            out = gradients(objective, params, batch_stats, part, key)
            batch_stats = out[0][1]['batch_stats']
            count = part['mask'].sum().astype(jnp.float32)
            (loss, aux), grads = out
            weighted = jax.tree.map(lambda x: x * count, _wide((loss, grads)))
            total = jax.tree.map(jnp.add, total, (weighted, aux['sums'], count))
            return (batch_stats, total), None

        parts = jax.tree.map(split, batch)
        keys = jax.random.split(key, accumulate_steps)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        ((loss, aux), grads) = jax.eval_shape(
            lambda part, key: gradients(objective, params, batch_stats, part, key), *first
        )
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype),
            ((loss, grads), aux['sums'], jax.ShapeDtypeStruct((), jnp.float32)),
        )
        # On CPU, XLA's convolutions are slow inside a loop.
        unroll = accumulate_steps if jax.default_backend() == 'cpu' else 1
        (batch_stats, total), _ = jax.lax.scan(
            body, (batch_stats, zero), (parts, keys), unroll=unroll
        )
        weighted, sums, count = total
        count = jnp.maximum(count, 1)
        loss, grads = jax.tree.map(lambda x: x / count, weighted)
        return (loss, {'batch_stats': batch_stats, 'sums': sums}), grads

    return accumulated


def sam_gradients(rho: float, gradients: Callable = plain_gradients) -> Callable:
    """The gradient at `params + rho * g / |g|`: sharpness-aware minimisation.

    Foret et al. 2021, https://arxiv.org/abs/2010.01412. The loss, the statistics and the sums are
    those of the unperturbed parameters.
    """

    def perturbed(objective, params, batch_stats, batch, key):
        out, grads = gradients(objective, params, batch_stats, batch, key)
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        ascended = jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, grads)
        _, grads = gradients(objective, ascended, batch_stats, batch, key)
        return out, grads

    return perturbed


def make_train_step(
    prepare: Callable,
    objective: Callable,
    gradients: Callable,
    tx: optax.GradientTransformationExtraArgs,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """One pure step, `train_step(state, raw_batch) -> (state, sums)`.

    A step whose loss, gradient or new state is not finite changes nothing but the counters: its sums
    are zero but for `bad_steps`.
    """

    def train_step(state, batch):
        prepare_key, model_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = prepare(prepare_key, batch, state)
        (loss, aux), grads = gradients(objective, state.params, state.batch_stats, batch, model_key)
        grads = _wide(grads)
        updates, opt_state = tx.update(grads, state.opt_state, _wide(state.params), value=loss)
        params = optax.apply_updates(state.params, updates)
        ema = optimizers.ema_update(state.ema, params, ema_decay, state.step) if ema_decay else {}
        old = (state.params, state.batch_stats, state.opt_state, state.ema)
        new = (params, aux['batch_stats'], opt_state, ema)
        good = _all_finite(grads, (loss, new))
        params, batch_stats, opt_state, ema = jax.tree.map(
            lambda n, o: jnp.where(good, n, o), new, old
        )
        sums = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), aux['sums'])
        sums['bad_steps'] = 1 - good.astype(jnp.int32)
        state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=ema,
            bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        )
        return state, sums

    return train_step


def _all_finite(grads, more) -> jax.Array:
    # 0 * x is NaN where x is not finite. XLA fuses an `all` with the layers that made x, which takes it
    # five times as long to compile; sums it leaves alone. What there is of each parameter (its gradient,
    # its moments) is added up first: on a GPU every sum is a kernel or two.
    shapes = jax.tree.map(jnp.shape, grads)
    is_alike = lambda node: jax.tree.map(jnp.shape, node) == shapes  # noqa: E731
    nodes = jax.tree.leaves(more, is_leaf=is_alike)
    alike = [grads, *filter(is_alike, nodes)]
    rest = [node for node in nodes if not is_alike(node)]
    each = jax.tree.map(lambda *parts: sum(0 * x for x in parts), *alike)
    leaves = [x for x in jax.tree.leaves((each, rest)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.isfinite(jnp.stack([(0 * x).sum().astype(jnp.float32) for x in leaves])).all()


def make_run_steps(train_step: Callable, fetch: Callable) -> Callable:
    """Many steps as one program: `run_steps(state, totals, data, items) -> (state, totals)`.

    `data` and `items` are a `pipeline.Feed`'s, `items` with a leading axis of steps; `totals` are sums
    so far. One step is compiled without a loop: on CPU, XLA's convolutions are slow inside one.
    """

    def body(data, carry, item):
        state, totals = carry
        state, sums = train_step(state, fetch(data, item))
        return state, jax.tree.map(jnp.add, totals, sums)

    def run_steps(state, totals, data, items):
        if jax.tree.leaves(items)[0].shape[0] == 1:
            return body(data, (state, totals), jax.tree.map(lambda x: x[0], items))
        carry, _ = jax.lax.scan(lambda c, item: (body(data, c, item), None), (state, totals), items)
        return carry

    return run_steps


def make_float_forward(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """`forward(variables, image) -> (logits, features)`, in evaluation mode.

    The image is float [B, H, W, C] in [0, 1], to take gradients by it.
    """

    def forward(variables, image):
        image = augment.normalize(image, mean, std).astype(model.dtype)
        return model.apply(variables, image, train=False)

    return forward


def make_forward(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """`make_float_forward` of uint8 [B, H, W, C]."""
    forward = make_float_forward(model, mean, std)
    return lambda variables, image: forward(variables, augment.to_float(image))


def make_predict(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """`predict(variables, image) -> logits`: uint8 [B, H, W, C] to float32 [B, K], in evaluation mode."""
    forward = make_forward(model, mean, std)
    return lambda variables, image: forward(variables, image)[0]


def evaluation_variables(state: TrainState) -> dict[str, Any]:
    """What to evaluate with: the moving average where there is one, else the parameters."""
    params = state.ema or optimizers.evaluation_params(state.opt_state, state.params)
    params = pruning.masked(state.opt_state, params)
    return {'params': params, 'batch_stats': state.batch_stats}
