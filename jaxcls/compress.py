"""A trained run made smaller in several ways, and what each costs: size, FLOPs, latency and accuracy.

A method is a text of steps, 'channels:0.5+magnitude:0.8+int8': each works on what the one before leaves.
With epochs to train, a step that removes weights is followed by a run of its own, in its own directory.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcls import (
    channels,
    datasets,
    footprint,
    loop,
    low_rank,
    pruning,
    quantization,
    runs,
    train,
    weight_files,
    weights,
)
from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.footprint import Variant
from jaxcls.registry import lookup

METHODS = (
    'magnitude:0.5', 'magnitude:0.8', 'magnitude:0.9', 'channels:0.5', 'low_rank:0.9', 'int8',
    'magnitude:0.8+int8', 'channels:0.5+int8', 'channels:0.5+magnitude:0.5+int8',
)  # fmt: skip


class _Work(NamedTuple):
    """What all methods share."""

    run: runs.Run
    split: datasets.Split  # to measure on
    out: Path  # for runs
    epochs: float
    overrides: tuple[tuple[str, str], ...]
    teacher: str  # a run's directory, or ''
    on_event: loop.OnEvent


def compress(
    workdir: str | Path,
    methods: Sequence[str] = METHODS,
    split: str = '',
    checkpoint: str = 'latest',
    epochs: float = 0.0,
    out: str | Path = 'compressed',
    overrides: Sequence[tuple[str, str]] = (),
    distill: bool = False,
    rounds: int = 15,
    on_event: loop.OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Makes a trained run smaller by each method and measures the results, the original first.

    Args:
      methods: see STEPS.
      split: to measure on; '' is the run's validation split.
      epochs: to train with a step that removes weights; 0 is not at all. The runs are in `out`, and are
        gone on with where they are there; every other command takes them.
      overrides: of the config of those runs, such as `('learning_rate', '0.001')`. It is that of the
        run, its learning rate and schedule, which does better than a low rate (Renda et al., 2020,
        https://arxiv.org/abs/2003.02389), over these epochs.
      distill: the original is the teacher of those runs.
      rounds: of timing; each times every method once, one after the other.

    Returns:
      `workdir`, `split`, `device` and `rows`, one a method: `method`; `parameters`, those that are not
      zero; `bytes` of all arrays as they are, and `deflated_bytes` of a compressed .npz; `smaller`,
      the original's deflated bytes over its own; `flops` of an image; `top1` with `top1_interval`
      (Wilson, 95%), and `top1_before` training; `difference` to the original in accuracy, and
      McNemar's `p_value` of it; `latency`, of batches of 1 and of 64 images: `milliseconds`, the
      median, and `ratio` to the original, the median over the rounds with its `quartiles`; and
      `workdir` of its run.

    Raises:
      UserError: no run, an unknown method, or one that the network does not go with.
    """
    plans = [parse(method, epochs) for method in methods]
    for path, _ in overrides:
        if any(config_lib.overlap(path, own) for own in _OWN):
            raise UserError(
                f'config.{path} cannot be set: the methods, the epochs or the teacher set it. Leave it out.'
            )
    run = runs.open_run(workdir, checkpoint)
    config = run.experiment.config
    _check(run.experiment, plans, epochs)
    _changed(config, overrides)
    split, loaded = runs.load_split(run, split)
    teacher = str(workdir) if distill else ''
    work = _Work(run, loaded, Path(out), epochs, tuple(overrides), teacher, on_event)
    original = Variant(run.experiment, run.experiment.model, run.variables)
    made = {(): original}
    for plan in plans:
        for i in range(len(plan)):
            if plan[: i + 1] not in made:
                on_event({'kind': 'method', 'method': _text(plan[: i + 1])})
                made[plan[: i + 1]] = _step(work, made[plan[:i]], plan, i)
    names = {'original': original, **{_text(plan): made[plan] for plan in plans}}
    on_event({'kind': 'measure', 'methods': list(names)})
    rows = footprint.measure(run, loaded, names, rounds)
    return {
        'workdir': str(workdir),
        'split': split,
        'device': jax.devices()[0].device_kind,
        'rows': rows,
    }


# Methods

Plan = tuple[tuple[str, float], ...]
# What the methods and the options set in the config of a run that trains.
_OWN = ('epochs', 'seeds', 'pruning', 'quantization', 'teacher', 'model.name', 'model.init_from')


def _magnitude(work: _Work, variant: Variant, share: float) -> Variant:
    params, _ = pruning.prune(variant.variables['params'], share)
    return variant._replace(variables={**variant.variables, 'params': params})


def _channels(work: _Work, variant: Variant, share: float) -> Variant:
    fields, variables = channels.remove(variant.model, variant.variables, share)
    config = ConfigDict(variant.experiment.config.to_dict())
    config.model.update(fields)
    experiment = _build(work, config)
    return Variant(experiment, experiment.model, variables)


def _low_rank(work: _Work, variant: Variant, energy: float) -> Variant:
    shape = variant.experiment.image_shape
    ranks = low_rank.choose_ranks(variant.model, variant.variables, shape, energy)
    factors = low_rank.factorize(variant.variables, ranks)
    return variant._replace(model=low_rank.Factorized(variant.model), variables=factors)


def _int8(work: _Work, variant: Variant, _: float) -> Variant:
    shape = variant.experiment.image_shape
    model, variables = quantization.after_training(variant.model, variant.variables, shape)
    return variant._replace(model=model, variables=variables)


class Step(NamedTuple):
    """A way to make a network smaller.

    Attributes:
      make: `(work, variant, value) -> Variant`.
      value: what the number after the colon is; '' where there is none.
      trains: whether a run follows, where there are epochs.
      place: steps go from the lowest to the highest.
    """

    make: Callable
    value: str
    trains: bool
    place: int


STEPS = {
    'channels': Step(_channels, 'the share of channels to remove', True, 0),
    'low_rank': Step(_low_rank, 'the share of energy to keep', False, 3),
    'magnitude': Step(_magnitude, 'the share of weights to set to zero', True, 1),
    'int8': Step(_int8, '', False, 2),
    'int8_trained': Step(_int8, '', True, 2),
}


def parse(method: str, epochs: float = 0.0) -> Plan:
    """A method as its steps and their numbers.

    Raises:
      UserError: an unknown step, a number that is missing or out of range, or steps that do not go
        together.
    """
    plan = []
    for text in method.split('+'):
        name, _, number = text.partition(':')
        step = lookup(STEPS, name, 'method')
        expected = f'{name}:0.5, with {step.value} between 0 and 1' if step.value else name
        try:
            value = float(number) if number or step.value else 0.5
        except ValueError:
            value = -1.0
        if not 0 < value < 1 or (number and not step.value):
            raise UserError(f'The method {text!r} must be {expected}.')
        if name == 'int8_trained' and not epochs:
            raise UserError('The method int8_trained trains: give --epochs, or take int8.')
        plan.append((name, value))
    places = [STEPS[name].place for name, _ in plan]
    if places != sorted(set(places)) or {2, 3} <= set(places):
        raise UserError(
            f'The steps of {method!r} do not go together: channels come first, then magnitude, then '
            'int8 or low_rank, each once.'
        )
    return tuple(plan)


def _check(experiment: experiment_lib.Experiment, plans: Sequence[Plan], epochs: float):
    """Before anything is made."""
    names = {name for plan in plans for name, _ in plan}
    if names & {'int8', 'int8_trained'}:
        quantization.check_installed()
    if 'channels' in names:
        channels.check(experiment.model)
    if 'low_rank' in names and experiment.config.quantization.name != 'none':
        raise UserError('The run was trained in int8, which low_rank is not for: leave that out.')
    if epochs and experiment.config.privacy.name != 'none':
        raise UserError(
            'The run was trained with privacy, and more epochs would spend more of it: leave out --epochs.'
        )


def _text(plan: Plan) -> str:
    return '+'.join(f'{name}:{value:g}' if STEPS[name].value else name for name, value in plan)


def _step(work: _Work, variant: Variant, plan: Plan, i: int) -> Variant:
    name, value = plan[i]
    step = STEPS[name]
    made = step.make(work, variant, value)
    if not (work.epochs and step.trains):
        return made
    before, _ = footprint.evaluate(work.run, work.split, {'': made})['']
    # Channels go before it trains; weights in its course; rounding comes after it once more.
    trained = _trained(work, made if name == 'channels' else variant, plan[: i + 1])
    made = step.make(work, trained, value) if name == 'int8_trained' else trained
    return made._replace(before=before)


# Training


def _trained(work: _Work, variant: Variant, plan: Plan) -> Variant:
    """A run that starts from a variant's weights."""
    place = work.out / re.sub(r'[^a-z0-9.+_]', '-', _text(plan))
    source = work.out / f'{place.name}.safetensors'
    _write_weights(source, variant.variables)
    own = variant.experiment.config
    config = ConfigDict(own.to_dict())
    config.update({
        'epochs': work.epochs,
        'seeds': 1,
        'early_stopping_epochs': 0.0,
        'warmup_epochs': min(own.warmup_epochs, work.epochs / 4),
        'validate_every_epochs': min(own.validate_every_epochs, work.epochs),
        'freeze': '',
        'layer_decay': 1.0,
    })  # fmt: skip
    for section, value in _sections(work, plan).items():
        config[section] = ConfigDict(value)
    config.model.update({'init_from': str(source), 'new_head': False})
    result = train.fit(_changed(config, work.overrides), place, work.on_event)
    if result.stopped not in ('done', 'early'):
        raise UserError(f'Stopped by {result.stopped}; repeat the command to go on.')
    opened = runs.open_run(place)
    plain = ConfigDict(opened.experiment.config.to_dict())
    plain.quantization = ConfigDict({'name': 'none'})
    experiment = _build(work, plain)
    return Variant(experiment, experiment.model, opened.variables, place)


def _changed(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    config_lib.apply_overrides(config, overrides, experiment_lib.TABLES)
    return experiment_lib.resolve(config)


def _sections(work: _Work, plan: Plan) -> dict[str, dict[str, Any]]:
    """Of the config of the run of a plan's last step."""
    share, last = dict(plan).get('magnitude'), plan[-1][0]
    own = work.run.experiment
    count = config_lib.epoch_steps(work.epochs, own.examples, own.config.batch_size)
    # What begins with its zeros keeps them by a mask at once, which a ramp would not.
    end = 0.5 if last == 'magnitude' else 0.0
    ramp = {'sparsity': share, 'begin': 0.0, 'end': end, 'every': max(1, count // 50)}
    teacher = {'name': 'logits', 'workdir': work.teacher}
    return {
        'pruning': {'name': 'magnitude', **ramp} if share else {'name': 'none'},
        'quantization': {'name': 'int8' if last == 'int8_trained' else 'none'},
        'teacher': teacher if work.teacher else {'name': 'none'},
    }


def _write_weights(path: Path, variables: Any):
    """Writes a variant's weights for a run to start from; the same ones may be there already.

    Raises:
      UserError: others are there.
    """
    state = {k: np.asarray(v) for k, v in weights.flatten(jax.device_get(variables)).items()}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        weight_files.write(path, state, {'format': 'pt'})
        return
    there = weight_files.read(path).state
    same = there.keys() == state.keys() and all(
        np.array_equal(there[name].read(), state[name]) for name in state
    )
    if not same:
        raise UserError(f'{path} has the weights of another run. Choose another --out.')


def _build(work: _Work, config: ConfigDict) -> experiment_lib.Experiment:
    """The experiment of a changed config, on the data of the run."""
    own = work.run.experiment
    config, size = experiment_lib.resolve(config), (own.num_classes, own.examples)
    # A loss that is weighted by the classes' counts needs the right ones in training alone.
    return experiment_lib.build(config, own.image_shape, *size, class_counts=[1] * size[0])
