"""The learning-rate range test: the loss while the rate rises, and a rate to train with.

Smith 2017, https://arxiv.org/abs/1506.01186, in Gugger's form (2018, "How do you find a good learning
rate"): the rate rises by one factor a step, and the smoothed loss says which rates are too high.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from jaxcls import experiment as experiment_lib
from jaxcls import runs, sharding
from jaxcls.errors import UserError, require

# The loss is smoothed over about a twentieth of the steps: its lag is the same part of any range.
_PARTS = 20
# Diverged: the smoothed loss has risen by so many times the size of the lowest.
_DIVERGED = 3.0
_MIN_STEPS = 2 * _PARTS
_RAW, _SMOOTH, _CHOICE = '#bbbbbb', '#0b62a4', '#c2410c'


def lr_find(
    config: ConfigDict, *, low: float = 1e-6, high: float = 10.0, steps: int = 100
) -> dict[str, Any]:
    """Trains for some steps from the start of a run while the learning rate rises from low to high.

    Everything is the config's own (network and `init_from`, data, augmentation, loss, optimiser,
    clipping, batch size) but schedule and warm-up. It ends early where the smoothed loss has risen from
    its lowest by 3 times that, or 0.3 times the first where that is more (losses may fall to 0 and
    below), or where a step is not finite. Too few steps find too high a rate: give each power of ten
    at least ten.

    Returns:
      A number each a step: `learning_rate`; `raw`, the training loss before its update; `loss`, the
      same smoothed: an exponential mean, corrected for its bias to the start. And rates: `diverged_at`
      (or None) and those of `choose`.

    Raises:
      UserError: a mistake in the config or the range, or as `choose`.
    """
    require(0 < low < high < math.inf, '--low', low, f'above 0 and below --high, {high:g}')
    require(steps >= _MIN_STEPS, '--steps', steps, f'at least {_MIN_STEPS}')
    rates, decay = np.geomspace(low, high, steps), 1 - _PARTS / steps
    raw, smooth, average, diverged = [], [], 0.0, None
    for step, loss in enumerate(_losses(config, rates)):
        if loss is None:
            diverged = float(rates[step])
            break
        average = decay * average + (1 - decay) * loss
        raw.append(loss)
        smooth.append(average / (1 - decay ** (step + 1)))
        lowest = min(smooth)
        if smooth[-1] - lowest > _DIVERGED * max(abs(lowest), abs(smooth[0]) / 10):
            diverged = float(rates[step])
            break
    return {
        'learning_rate': rates[: len(raw)].tolist(),
        'raw': raw,
        'loss': smooth,
        'diverged_at': diverged,
        **choose(rates, smooth),
    }


def choose(rates: np.ndarray, loss: Sequence[float]) -> dict[str, float]:
    """What the smoothed loss at the first of some rates says.

    Returns:
      `minimum`, the rate of the lowest loss; `steepest`, the rate before it at which the loss falls
      most over the logarithm of the rate, its slope being fitted to a tenth of all steps at a time;
      `suggestion`, the lower of `steepest` and a tenth of `minimum`, the two rules in use: where the
      loss falls late, the steepest fall comes close to divergence.

    Raises:
      UserError: it does not fall, or a tenth of `minimum` is below the rates, so not tried.
    """
    half = len(rates) // _PARTS
    bottom = int(np.argmin(loss)) if len(loss) else 0
    if bottom < 2 * half:
        raise UserError(
            f'The loss does not fall: after {len(loss)} of {len(rates)} steps it was lowest at a '
            f'learning rate of {rates[bottom]:.1e}. Start from a lower --low, or look at the config.'
        )
    if rates[bottom] / 10 < rates[0]:
        raise UserError(
            f'The loss is lowest at a learning rate of {rates[bottom]:.1e}, and a tenth of it, '
            f'{rates[bottom] / 10:.1e}, was not tried. Start from a --low of at most that.'
        )
    offsets = np.arange(-half, half + 1)
    windows = np.lib.stride_tricks.sliding_window_view(loss[: bottom + 1], len(offsets))
    steepest = int(np.argmin(windows @ offsets))
    found = {'minimum': float(rates[bottom]), 'steepest': float(rates[half + steepest])}
    return {**found, 'suggestion': min(found['steepest'], found['minimum'] / 10)}


def _losses(config: ConfigDict, rates: np.ndarray) -> Iterator[float | None]:
    """The training loss of each step at its rate; None where a step is not finite."""
    config = experiment_lib.resolve(config)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    reader, _, data = experiment_lib.open_data(config)
    examples = len(reader.split.source)
    teacher = runs.open_teacher(config, data)
    experiment = experiment_lib.build_for(_rising(config, rates, examples), data, teacher)
    experiment_lib.check_rows(experiment, mesh)
    abstract = experiment_lib.abstract_state(experiment, mesh)
    start = runs.make_start(experiment, abstract, reader, lambda event: None)
    feed = experiment_lib.make_training_feed(experiment, reader, mesh, len(rates))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, data, items):
        batch = feed.fetch(data, jax.tree.map(lambda x: x[0], items))
        return experiment.train_step(state, batch)

    state = experiment_lib.initial_state(experiment, abstract, start)
    try:
        for i in range(len(rates)):
            state, sums = train_step(state, feed.data, feed.items(i, 1))
            sums = jax.device_get(sums)
            yield None if sums['bad_steps'] else float(sums['loss'] / sums['examples'])
    finally:
        feed.close()


def _rising(config: ConfigDict, rates: np.ndarray, examples: int) -> ConfigDict:
    """The config with the schedule of these rates, a step each."""
    epoch = config.batch_size / examples  # of one step
    rising = ConfigDict(config.to_dict())
    factor = float(rates[1] / rates[0])
    rising.schedule = {
        'name': 'exponential', 'factor': factor, 'every_epochs': epoch, 'staircase': False,
    }  # fmt: skip
    rising.learning_rate, rising.warmup_epochs = float(rates[0]), 0.0
    rising.epochs = len(rates) * epoch
    return experiment_lib.resolve(rising)


def text(result: dict[str, Any]) -> str:
    """`lr_find`'s result for people."""
    columns = result['learning_rate'], result['raw'], result['loss']
    rows = list(zip(*columns, strict=True))
    shown = rows[:: max(1, len(rows) // 12)]
    diverged = result['diverged_at']
    end = 'not reached' if diverged is None else f'{diverged:.1e}'
    return '\n'.join(
        [
            f'{"learning rate":>13} {"loss":>10} {"smoothed":>10}',
            *(f'{rate:>13.1e} {raw:>10.4f} {loss:>10.4f}' for rate, raw, loss in shown),
            f'the loss falls most steeply at  {result["steepest"]:.1e}',
            f'a tenth of the rate of the lowest loss  {result["minimum"] / 10:.1e}',
            f'divergence  {end}',
            f'suggested learning rate, the lower of the two  {result["suggestion"]:.1e}',
        ]
    )


def plot(result: dict[str, Any]) -> Figure:
    """The loss against the rate; the two rates to choose from are marked, the suggestion filled."""
    rates, raw, loss = (np.array(result[key]) for key in ('learning_rate', 'raw', 'loss'))
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    axes.plot(rates, raw, '.', color=_RAW, label='loss of a step')
    axes.plot(rates, loss, color=_SMOOTH, label='smoothed')
    for name, rate, marker in (
        ('steepest fall', result['steepest'], 's'),
        ('a tenth of the rate of the lowest loss', result['minimum'] / 10, 'D'),
    ):
        suggested = rate == result['suggestion']
        axes.plot(
            rate,
            np.interp(np.log(rate), np.log(rates), loss),
            marker,
            color=_CHOICE,
            markerfacecolor=_CHOICE if suggested else 'white',
            label=f'{name}, {rate:.1e}{": suggested" if suggested else ""}',
        )
    if result['diverged_at']:
        axes.axvline(result['diverged_at'], color=_RAW, ls=':', label='diverged')
    falling = loss[: loss.argmin() + 1]
    margin = 0.15 * np.ptp(falling)
    axes.set(xscale='log', xlabel='learning rate', ylabel='training loss')
    axes.set_ylim(raw.min() - margin, falling.max() + 3 * margin)  # not up to where it diverges
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def write(result: dict[str, Any], picture: Path):
    """Draws `plot` to a file, such as lr_find.png.

    Raises:
      UserError: it cannot be written.
    """
    try:
        plot(result).savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f'{picture} cannot be written: {error}. Choose another --picture.'
        ) from None
