"""Learning-rate schedules: warm-up, then a curve over the steps that remain.

An entry of SCHEDULES is `build(learning_rate, span, **arguments) -> schedule`, which counts steps
from the end of warm-up. `make_schedule` puts the two together.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcls import registry
from jaxcls.errors import require

Schedule = Callable[[jax.Array | int], jax.Array]


class Span(NamedTuple):
    """Where a schedule runs: its first step after warm-up, its number of steps, steps an epoch."""

    begin: int
    steps: int
    steps_per_epoch: float


def constant(learning_rate: float, _span: Span) -> Schedule:
    """Always the learning rate."""
    return optax.constant_schedule(learning_rate)


def step(
    learning_rate: float, span: Span, *, boundaries: tuple = (), factor: float = 0.1
) -> Schedule:
    """Multiplies the rate by `factor` at each boundary, in epochs from the start of training."""
    require(0 < factor < math.inf, 'schedule.factor', factor, 'more than 0 and finite')
    steps = [round(epoch * span.steps_per_epoch) - span.begin for epoch in boundaries]
    end = (span.begin + span.steps) / span.steps_per_epoch
    require(
        bool(steps) and all(a < b for a, b in zip([0, *steps], [*steps, span.steps], strict=True)),
        'schedule.boundaries',
        boundaries,
        f'rising epochs after the warm-up and before the end, which is at epoch {end:g}, such as '
        f'({end / 2:g}, {end * 3 / 4:g})',
    )
    return optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(steps, factor))


def exponential(
    learning_rate: float,
    span: Span,
    *,
    factor: float = 0.94,
    every_epochs: float = 2.0,
    staircase: bool = True,
) -> Schedule:
    """Multiplies the rate by `factor` every few epochs: at once, or evenly if not `staircase`."""
    require(0 < factor < math.inf, 'schedule.factor', factor, 'more than 0 and finite')
    require(every_epochs > 0, 'schedule.every_epochs', every_epochs, 'more than 0')
    steps = every_epochs * span.steps_per_epoch
    return optax.exponential_decay(learning_rate, steps, factor, staircase=staircase)


def polynomial(
    learning_rate: float, span: Span, *, power: float = 2.0, final_fraction: float = 0.0
) -> Schedule:
    """Falls as `(1 - t)^power` to `final_fraction` of the rate, t from 0 to 1."""
    require(0 < power < math.inf, 'schedule.power', power, 'more than 0 and finite')
    _require_fraction('final_fraction', final_fraction)
    return optax.polynomial_schedule(
        learning_rate, learning_rate * final_fraction, power, span.steps
    )


def linear(learning_rate: float, span: Span, *, final_fraction: float = 0.0) -> Schedule:
    """Falls evenly to `final_fraction` of the rate."""
    return polynomial(learning_rate, span, power=1.0, final_fraction=final_fraction)


def cosine(learning_rate: float, span: Span, *, final_fraction: float = 0.0) -> Schedule:
    """Falls along half a cosine to `final_fraction` of the rate (https://arxiv.org/abs/1608.03983)."""
    _require_fraction('final_fraction', final_fraction)
    return optax.cosine_decay_schedule(learning_rate, span.steps, final_fraction)


def one_cycle(
    learning_rate: float,
    span: Span,
    *,
    peak_fraction: float = 0.3,
    start_fraction: float = 0.04,
    final_fraction: float = 4e-6,
) -> Schedule:
    """Rises from `start_fraction` of the rate to the rate, then falls: two half cosines.

    Smith and Topin, 2017, https://arxiv.org/abs/1708.07120. It takes the place of warm-up.

    Args:
      peak_fraction: the part of training before the peak, in (0, 1).
      start_fraction, final_fraction: of the rate, in [0, 1].
    """
    require(span.begin == 0, 'warmup_epochs', span.begin / span.steps_per_epoch, '0 with one_cycle')
    require(0 < peak_fraction < 1, 'schedule.peak_fraction', peak_fraction, 'between 0 and 1')
    _require_fraction('start_fraction', start_fraction)
    _require_fraction('final_fraction', final_fraction)
    peak = max(1, round(peak_fraction * span.steps))
    fall = max(1, span.steps - peak)

    def schedule(count):
        distance = jnp.where(count < peak, (peak - count) / peak, (count - peak) / fall)
        low = jnp.where(count < peak, start_fraction, final_fraction)
        height = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(distance, 1.0)))
        return learning_rate * (low + (1 - low) * height)

    return schedule


def _require_fraction(field: str, value: float):
    require(0 <= value <= 1, f'schedule.{field}', value, 'at least 0 and at most 1')


SCHEDULES = {
    'constant': constant,
    'step': step,
    'exponential': exponential,
    'polynomial': polynomial,
    'linear': linear,
    'cosine': cosine,
    'one_cycle': one_cycle,
}


def make_schedule(
    *,
    name: str,
    learning_rate: float,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0.0,
    **kwargs,
) -> Schedule:
    """The learning rate of each step, by name: int32 `[]` (traced or not) -> float32 `[]`.

    Warm-up of w steps comes first: step i has `learning_rate * (i + 1) / (w + 1)`, so that no step
    is wasted on a rate of 0. The schedule then runs over the steps that remain, from the full rate
    at step w to its end at step `total_steps`.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    factory = registry.bind(SCHEDULES, 'schedule', name=name, **kwargs)
    require(0 < learning_rate < math.inf, 'learning_rate', learning_rate, 'more than 0 and finite')
    require(total_steps >= 1, 'total_steps', total_steps, 'at least 1: train for longer')
    epochs = total_steps / steps_per_epoch
    require(
        0 <= warmup_epochs < math.inf and round(warmup_epochs * steps_per_epoch) < total_steps,
        'warmup_epochs',
        warmup_epochs,
        f'at least 0 and less than the {epochs:g} epochs of training',
    )
    warmup = round(warmup_epochs * steps_per_epoch)
    schedule = factory(learning_rate, Span(warmup, total_steps - warmup, steps_per_epoch))
    if warmup:
        ramp = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
        schedule = optax.join_schedules([ramp, schedule], [warmup])

    @functools.partial(jax.jit, inline=True)  # one program where it is called by itself, not eight
    def learning_rate_at(count):
        # Compiled, a fall to 0 may end a rounding error below it.
        return jnp.maximum(jnp.asarray(schedule(count), jnp.float32), 0.0)

    return learning_rate_at
