"""Many seeds of a config in one program: `vmap` over the state, and over each seed's own batches.

The split lies on the device once. Every seed gets the batches, the random numbers and the log that it
has alone; only the rounding of batched products differs. Each ends as a run in its own directory.
"""

import contextlib
import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxcls import evaluation, inspection, loop, metrics, pipeline, results, sharding, steps
from jaxcls import experiment as experiment_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS

Members = list[tuple[ConfigDict, Path]]


def per_program(config: ConfigDict) -> int:
    """How many seeds of a resolved config share a program.

    All of them, or `config.seeds_per_program`; one on CPU, whose convolutions are slow with a kernel
    for each seed, and where something of the run is made for one network.

    Raises:
      UserError: several are asked for and they cannot be.
    """
    obstacle = _obstacle(config)
    if config.seeds_per_program > 1 and obstacle:
        raise UserError(
            f'config.seeds_per_program is {config.seeds_per_program}, but runs with {obstacle} cannot '
            'share a program. Set it to 1.'
        )
    if config.seeds_per_program:
        return config.seeds_per_program
    return 1 if obstacle or jax.default_backend() == 'cpu' else config.seeds


def _obstacle(config: ConfigDict) -> str:
    """What of a config keeps its seeds apart; '' where nothing does."""
    data, model = config.data, MODELS.get(config.model.name)
    model = getattr(model, 'func', model)  # of a partial
    obstacles = {
        'config.early_stopping_epochs': config.early_stopping_epochs > 0,
        'config.model.init_from': bool(config.model.init_from),
        f'config.model.name={config.model.name}, which starts from its data,': hasattr(
            model, 'start_from_data'
        ),
        f'config.model.name={config.model.name}, which is no network,': model is None,
        'training examples drawn by the seed': bool(
            data.per_class or data.imbalance > 1 or data.label_noise or data.name[:7] == 'folder:'
        ),
        'a streamed split': data.pipeline == 'stream' or data.crop == 'random_resized',
        'config.parameters=fsdp': config.parameters != 'replicated',
    }
    return next((name for name, there in obstacles.items() if there), '')


class _Many(NamedTuple):
    """What stays the same while several seeds train together."""

    members: Members
    directory: Path  # of the checkpoints of all together
    experiment: experiment_lib.Experiment
    evaluator: evaluation.Evaluator
    checkpoints: workdir_lib.Checkpoints
    events: loop.Events
    clock: loop.Clock
    on_event: loop.OnEvent
    histories: list[list[dict[str, Any]]]


def fit_together(
    members: Members, workdir: Path, on_event: loop.OnEvent, until_epoch: float
) -> str:
    """Trains runs that differ in their seed alone in one program, or goes on with them.

    Args:
      members: the config and the directory of each.
      workdir: of the group; while they train, their checkpoints are in a directory of it.

    Returns:
      'done', 'paused' or the signal.

    Raises:
      UserError: as `train.fit`.
    """
    configs = [config for config, _ in members]
    config, mesh = configs[0], sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    reader, validation, data = experiment_lib.open_data(config)
    if pipeline.choose('auto', reader, train=True) != 'resident':
        raise UserError(
            'The split is too large to lie on the device; set config.seeds_per_program=1.'
        )
    experiment = experiment_lib.build_for(config, data)
    like = _stack_shapes(experiment_lib.abstract_checkpoint(experiment, mesh), len(members))
    directory = workdir / f'seeds-{configs[0].seed}-{configs[-1].seed}'
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(workdir_lib.locked(directory))
            for member, place in members:
                stack.enter_context(workdir_lib.locked(place))
                workdir_lib.start(place, member, data)

        sharding.on_first_process(claim)
        checkpoints = workdir_lib.Checkpoints(directory, config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(like)
        step = restored.step if restored else 0
        histories = [workdir_lib.rewind_metrics(place, step) for _, place in members]
        order = functools.partial(
            _orders, [c.seed for c in configs], experiment.examples, config.batch_size
        )
        feed = pipeline.resident(reader, order, mesh)
        many = _Many(
            members=members,
            directory=directory,
            experiment=experiment,
            evaluator=evaluation.make_evaluator(experiment, validation, mesh, many=True),
            checkpoints=checkpoints,
            events=loop.Events.of(experiment, feed),
            clock=loop.Clock(histories[0][-1]['seconds'] if histories[0] else 0.0),
            on_event=on_event,
            histories=histories,
        )
        zeros = loop.make_zeros(like[1])
        tree = (
            restored.tree if restored else (_initial_state(experiment, configs, like[0]), zeros())
        )
        on_event({'kind': 'together', 'step': step, 'run': many})
        stopped = _train(many, tree, step, feed, like, zeros, until_epoch)
    if stopped == 'done' and jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    return stopped


def _stack_shapes(like, count: int):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=leaf.sharding),
        like,
    )


def _orders(seeds: list[int], examples: int, batch_size: int, step: int) -> dict[str, np.ndarray]:
    """`pipeline.training_order` of each seed, stacked: [seeds, B]."""
    orders = [pipeline.training_order(seed, examples, batch_size, step) for seed in seeds]
    return {key: np.stack([order[key] for order in orders]) for key in orders[0]}


def _initial_state(experiment, configs: list[ConfigDict], like) -> steps.TrainState:
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    init = jax.vmap(lambda seed: experiment_lib.init(experiment, seed))
    seeds = np.array([config.seed for config in configs], np.int32)
    return jax.jit(init, out_shardings=places)(seeds)


def _train(many: _Many, tree, step: int, feed, like, zeros, until_epoch: float) -> str:
    evaluated = None

    def log(step, state, totals):
        seconds, totals, bad = many.clock.lap(), *jax.device_get((totals, state.bad_steps))
        for i in range(len(many.members)):
            record = loop.train_record(
                many.experiment, step, many.clock, _at(totals, i), many.histories[i], seconds
            )
            _write(many, i, record)
        # One that diverged stays where it was; the others go on until none is left.
        loop.check_finite(many.experiment, step, int(bad.min()), many.checkpoints)

    def validate(step, state):
        nonlocal evaluated
        with many.clock.pause():
            evaluated = many.evaluator(steps.evaluation_variables(state))
            sums = jax.device_get(evaluated.sums)
        for i in range(len(many.members)):
            summary = metrics.summarize(_at(sums, i))
            _write(many, i, loop.validation_record(many.experiment, step, many.clock, summary))
        return False, False

    def save(step, tree):
        with many.clock.pause():
            many.checkpoints.save(step, tree)

    def progress(step):
        many.on_event({'kind': 'progress', 'step': step})

    advance = loop.make_advance(
        jax.vmap(many.experiment.train_step), feed, like, many.clock, many.on_event
    )
    until = loop.last_step(many.experiment, until_epoch)
    hooks = loop.Hooks(log, validate, save, progress)
    many.clock.lap()
    state, stopped = loop.drive(tree, step, until, many.events, advance, zeros, hooks)
    many.checkpoints.wait()
    if stopped == 'done':
        evaluated = evaluated or many.evaluator(steps.evaluation_variables(state))
        _finish(many, state, zeros(), evaluated)
    return stopped


def _at(tree, i: int):
    """The i-th run's part."""
    return jax.tree.map(lambda x: x[i], tree)


def _write(many: _Many, i: int, record: dict[str, Any]):
    many.histories[i].append(record)
    many.on_event({**record, 'seed': many.members[i][0].seed})
    if jax.process_index() == 0:
        workdir_lib.append_metrics(many.members[i][1], record)


def _finish(many: _Many, state: steps.TrainState, totals, evaluated: evaluation.Evaluation):
    """Gives each seed its own checkpoint and result: from here on it is a run like any other."""
    for i, (config, place) in enumerate(many.members):
        one, history = _at(state, i), many.histories[i]
        checkpoints = workdir_lib.Checkpoints(place, config.keep_checkpoints)
        with contextlib.closing(checkpoints):
            top1 = {'top1': history[-1]['top1']}
            checkpoints.save(many.experiment.total_steps, (one, _at(totals, i)), top1)
            checkpoints.wait()
        if jax.process_index() == 0:
            cost = inspection.cost(many.experiment, one)
            results.write(place, evaluated.of(i).predictions(), history, cost)
