"""Many seeds of a config in one program: `vmap` over the state, and over each seed's own batches.

The split lies on the device once. Every seed gets the batches, the random numbers and the log that it
has alone; only the rounding of batched products differs. Its best state stays on the device beside the last.
Each ends as a run in its own directory.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxcls import evaluation, inspection, loop, metrics, pipeline, results, sharding, steps
from jaxcls import experiment as experiment_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS

Members = list[tuple[ConfigDict, Path]]

# Whose seeds an accelerator trains faster together: on an H200 eight LeNet-5 with 1,024 images each take 0.24
# of the time of one after another. Eight ResNet-20, whose convolutions become groups, take 2.1 times as long.
SMALL = ('linear', 'mlp', 'lenet5', 'lenet5_1998', 'lenet_small')


def per_program(config: ConfigDict) -> int:
    """How many seeds of a resolved config share a program.

    `config.seeds_per_program`; where that is 0, all of them if the network is `SMALL`, and otherwise one. So
    it is on CPU, whose convolutions are slow with a kernel for each seed, and where something of the run is
    made for one network.

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
    if obstacle or jax.default_backend() == 'cpu' or config.model.name not in SMALL:
        return 1
    return config.seeds


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
            data.per_class
            or data.imbalance > 1
            or data.share < 1
            or data.label_noise
            or data.name[:7] == 'folder:'
        ),
        'a streamed split': data.pipeline == 'stream' or data.crop == 'random_resized',
        'config.parameters=fsdp': config.parameters != 'replicated',
        'config.teacher': config.teacher.name != 'none',
    }
    return next((name for name, there in obstacles.items() if there), '')


def programs(members: Members, workdir: Path, size: int, is_over: Callable) -> list[Members]:
    """Which of a group's runs that are not over train next, and which in one program.

    Those that began in one program go on in it, those that began alone alone; the others are `size` at a
    time.

    Args:
      is_over: `(config, workdir) -> whether the run has ended`.
    """
    begun = workdir_lib.shared_directories(workdir).values()
    chunks = [[m for m in members if m[0].seed in seeds] for seeds in begun]
    placed = {config.seed for chunk in chunks for config, _ in chunk}
    left = [m for m in members if m[0].seed not in placed and not is_over(*m)]
    alone = [m for m in left if workdir_lib.has_checkpoints(m[1])]
    fresh = [m for m in left if m not in alone]
    gaps = [config.seed - i for i, (config, _) in enumerate(fresh)]  # the same of neighbours
    for gap in dict.fromkeys(gaps):
        neighbours = [member for member, its in zip(fresh, gaps, strict=True) if its == gap]
        chunks += [neighbours[i : i + size] for i in range(0, len(neighbours), size)]
    chunks += [[member] for member in alone]
    open_ = [chunk for chunk in chunks if not all(is_over(*member) for member in chunk)]
    return sorted(open_, key=lambda chunk: chunk[0][0].seed)


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
    writers: list[Any]  # as in `train`
    diverged: set[int]  # places in `members`


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
    workdir_lib.check_same(config, data)
    if pipeline.choose('auto', reader, train=True) != 'resident':
        raise UserError(
            'The split is too large to lie on the device; set config.seeds_per_program=1.'
        )
    experiment = experiment_lib.build_for(config, data)
    experiment_lib.check_rows(experiment, mesh)
    like = experiment_lib.abstract_seeds(experiment, mesh, len(members))
    first, last = members[0][0].seed, members[-1][0].seed
    directory = workdir_lib.shared_directory(workdir, first, last)
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(workdir_lib.locked(directory))
            for member, place in members:
                stack.enter_context(workdir_lib.locked(place))
                workdir_lib.start(place, member, data, experiment_lib.TABLES)

        sharding.on_first_process(claim)
        checkpoints = workdir_lib.Checkpoints(directory, config.keep_checkpoints)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore(like)
        step = restored.step if restored else 0
        sharding.on_first_process(lambda: _rewind_notes(members, step))
        rewound = [workdir_lib.rewind_metrics(place, step) for _, place in members]
        histories, dropped = [records for records, _ in rewound], sum(n for _, n in rewound)
        if dropped and not restored:
            on_event({'kind': 'restart', 'workdir': directory, 'dropped': dropped})
        zeros = loop.make_zeros(like[1])
        if restored:
            *tree, best = restored.tree
        else:
            tree = _initial_state(experiment, configs, like[0]), zeros()
            best = jax.tree.map(jnp.copy, tree[0])
        examples = jax.device_get(tree[1]['examples'])
        order = functools.partial(orders, [experiment.order(c.seed) for c in configs])
        feed = pipeline.resident(reader, order, mesh)
        many = _Many(
            members=members,
            directory=directory,
            experiment=experiment,
            evaluator=evaluation.make_evaluator(experiment, validation, mesh, many=True),
            checkpoints=checkpoints,
            events=loop.Events.of(experiment, feed),
            clock=loop.Clock(max(histories, key=len), int(examples.max()), len(members)),
            on_event=on_event,
            histories=histories,
            writers=[loop.tensorboard(place, restored, stack) for _, place in members],
            diverged={
                i for i, (_, place) in enumerate(members) if (place / results.DIVERGED).is_file()
            },
        )
        on_event({'kind': 'together', 'step': step, 'run': many})
        begin_step = stack.enter_context(workdir_lib.attempt(directory, step))
        stopped = _train(many, tree, best, step, feed, like[:2], zeros, begin_step, until_epoch)
    if stopped == 'done' and jax.process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    return stopped


def _rewind_notes(members: Members, step: int):
    """Removes the notes of divergence that were written after a step."""
    for _, place in members:
        note = place / results.DIVERGED
        if note.is_file() and workdir_lib.read_json(note).get('step', 0) > step:
            note.unlink()


def orders(each: list[pipeline.Order], step: int) -> dict[str, np.ndarray]:
    """The order of each seed, stacked: [seeds, B]."""
    found = [order(step) for order in each]
    return {key: np.stack([order[key] for order in found]) for key in found[0]}


def _initial_state(experiment, configs: list[ConfigDict], like) -> steps.TrainState:
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    init = jax.vmap(lambda seed: experiment_lib.init(experiment, seed))
    seeds = np.array([config.seed for config in configs], np.int32)
    return jax.jit(init, out_shardings=places)(seeds)


@functools.partial(jax.jit, donate_argnums=2)
def _better(chosen, state, best):
    """Of each seed the state if it is chosen, or else the best so far."""

    def of_leaf(new, old):
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(of_leaf, state, best)


def _train(
    many: _Many, tree, best, step: int, feed, like, zeros, begin_step: Callable, until_epoch: float
) -> str:
    """Args: `best`, the state of each seed at its best validation, which is saved with the tree."""
    evaluated = None

    def log(step, state, totals):
        totals, bad = jax.device_get((totals, state.bad_steps))
        speed = many.clock.speed(int(totals['examples'].max()))  # of one that skipped none
        for i in _alive(many):
            record = loop.train_record(
                many.experiment, step, many.clock, _at(totals, i), many.histories[i], speed
            )
            _write(many, i, record)
            # It stays where it was; the others go on until none is left.
            message = loop.divergence(many.experiment, step, int(bad[i]), many.histories[i])
            if message:
                many.diverged.add(i)
                if jax.process_index() == 0:
                    note = {'message': message, 'step': step}
                    workdir_lib.write_json(many.members[i][1] / results.DIVERGED, note)
        if not _alive(many):
            raise loop.Diverged(message)

    def validate(step, state):
        nonlocal evaluated, best
        with many.clock.pause():
            evaluated = _evaluate(many, state)
            sums = jax.device_get(evaluated.sums)
        chosen = np.zeros(len(many.members), bool)
        for i in _alive(many):
            summary = metrics.summarize(_at(sums, i))
            _write(many, i, loop.validation_record(many.experiment, step, many.clock, summary))
            chosen[i] = loop.is_best(many.histories[i])
        best = _better(chosen, state, best)
        return False, False

    def save(step, tree):
        with many.clock.pause():
            many.checkpoints.save(step, (*tree, best))

    def progress(step):
        many.checkpoints.check()
        many.on_event({'kind': 'progress', 'step': step})

    advance = loop.make_advance(
        jax.vmap(many.experiment.train_step), feed, like, many.clock, many.on_event, begin_step
    )
    until = loop.last_step(many.experiment, until_epoch)
    hooks = loop.Hooks(log, validate, save, many.checkpoints.wait, progress)
    many.clock.start()
    state, stopped = loop.drive(tree, step, until, many.events, advance, zeros, hooks)
    if stopped == 'done':
        evaluated = evaluated or _evaluate(many, state)
        _finish(many, best, state, zeros(), evaluated)
    return stopped


def _evaluate(many: _Many, state: steps.TrainState) -> evaluation.Evaluation:
    return many.evaluator(jax.vmap(steps.evaluation_variables)(state))


def _alive(many: _Many) -> list[int]:
    """The places of those that have not diverged."""
    return [i for i in range(len(many.members)) if i not in many.diverged]


def _at(tree, i: int):
    """The i-th run's part."""
    return jax.tree.map(lambda x: x[i], tree)


def _write(many: _Many, i: int, record: dict[str, Any]):
    many.histories[i].append(record)
    many.on_event({**record, 'seed': many.members[i][0].seed})
    loop.write(many.members[i][1], many.writers[i], record)


def _finish(many: _Many, best, state, totals, evaluated: evaluation.Evaluation):
    """Gives each seed its own checkpoints and result: from here on it is a run like any other."""
    ended = [(place / 'result.json').is_file() for _, place in many.members]
    sharding.on_first_process(lambda: None)  # before one is written, all have looked
    for i in _alive(many):
        if ended[i]:
            continue
        config, place = many.members[i]
        scores = {r['step']: r['top1'] for r in results.of_kind(many.histories[i], 'validation')}
        with contextlib.closing(workdir_lib.Checkpoints(place, config.keep_checkpoints)) as own:
            for one in (_at(best, i), _at(state, i)):
                step = int(one.step)
                if step not in own.manager.all_steps():
                    own.save(step, (one, _at(totals, i)), {'top1': scores[step]})
                    own.wait()

        def write(place=place, i=i):
            cost = inspection.cost(many.experiment, _at(state, i))
            results.write(place, evaluated.of(i).predictions(), many.histories[i], cost)

        sharding.on_first_process(write)
