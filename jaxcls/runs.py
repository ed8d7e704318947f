"""What a run starts from, and what it leaves: weights, or a network that starts from its data.

`open_run` is where every command after training begins.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcls import augment, datasets, distillation, pipeline, sharding, steps, weight_files, weights
from jaxcls import experiment as experiment_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError


class Run(NamedTuple):
    """A run opened after training: its config, its model and one checkpoint's variables."""

    experiment: experiment_lib.Experiment
    variables: Any
    step: int
    class_names: tuple[str, ...]
    mesh: Mesh


def open_run(directory: str | Path, checkpoint: str = 'latest') -> Run:
    """Opens a workdir to evaluate, predict or explain; nothing in it is executed or changed.

    Args:
      checkpoint: 'latest', 'best' (by validation accuracy) or a step.

    Raises:
      UserError: no run there, no such checkpoint, or none intact.
    """
    directory = Path(directory)
    config = experiment_lib.resolve(workdir_lib.read_config(directory))
    if config.seeds > 1:
        raise UserError(
            f'{directory} has the runs of {config.seeds} seeds; give one of them, such as '
            f'{directory / f"seed-{config.seed}"}.'
        )
    data = workdir_lib.read_data(directory)
    mesh = sharding.make_mesh()
    experiment = experiment_lib.build_for(config, data)
    like = experiment_lib.abstract_checkpoint(experiment, mesh)
    checkpoints = workdir_lib.Checkpoints(directory, config.keep_checkpoints, read_only=True)
    try:
        step = checkpoints.find(checkpoint, workdir_lib.read_metrics(directory))
        restored = checkpoints.restore(like, step)
    finally:
        checkpoints.close()
    if restored is None:
        raise workdir_lib.no_checkpoint(directory)
    variables = steps.evaluation_variables(restored.tree[0])
    return Run(experiment, variables, restored.step, tuple(data['class_names']), mesh)


def load_split(run: Run, split: str = '') -> tuple[str, datasets.Split]:
    """A split of an opened run's data and its name; '' is the validation split.

    Raises:
      UserError: no such split, or other classes than the run's.
    """
    config = run.experiment.config
    split = split or config.data.validation
    loaded = experiment_lib.load_split(config, split)
    if loaded.class_names != run.class_names:
        raise UserError(
            f'The classes of {split} are {_listed(loaded.class_names)}; the run was trained on '
            f'{_listed(run.class_names)}. Restore the data set, or evaluate a run of this one.'
        )
    return split, loaded


def open_teacher(config: ConfigDict, data: Mapping[str, Any]) -> distillation.Teacher | None:
    """The teacher that a resolved config names, for data as `experiment.open_data` describes them.

    None where there is none, or where it has no say (`alpha` 0).

    Raises:
      UserError: no run there, or one of other images or classes.
    """
    if distillation.make_lesson(**config.teacher) is None:
        return None
    workdir = config.teacher.workdir
    if not workdir:
        raise UserError(
            f'config.teacher.name is {config.teacher.name!r} and config.teacher.workdir is empty: give '
            'the directory of a trained run.'
        )
    run = open_run(workdir, config.teacher.checkpoint)
    ours = (data['image_shape'], data['class_names'])
    distillation.check_pupil(ours, (run.experiment.image_shape, run.class_names), workdir)
    theirs = run.experiment.config.data
    forward = steps.make_float_forward(run.experiment.model, theirs.mean, theirs.std)
    variables = jax.device_put(run.variables, sharding.replicated(run.mesh))
    return distillation.Teacher(forward, variables)


def open_weights(config: ConfigDict, split: str = '') -> Run:
    """A config's network with the weights of `config.model.init_from`, as if trained: at step 0.

    Args:
      split: whose classes they are for; '' is the config's validation split.

    Raises:
      UserError: no weights given, or they fit neither the network nor the number of classes.
    """
    config = experiment_lib.resolve(config)
    source = config.model.init_from
    if not source:
        raise UserError(
            'There is nothing to evaluate: give the directory of a run, or trained weights by '
            '--config.model.init_from.'
        )
    split = experiment_lib.load_split(config, split or config.data.validation)
    reader, mesh = experiment_lib.make_reader(config, split, train=False), sharding.make_mesh()
    classes = len(split.class_names)
    experiment = experiment_lib.build(config, reader.shape, classes, max(len(split.source), 1))
    abstract = experiment_lib.abstract_state(experiment, mesh)
    events = []
    start = make_start(experiment, abstract, reader, events.append)
    fresh = [path for path in events[0]['fresh'] if not weights.is_auxiliary(path)]
    if fresh:
        raise UserError(
            f'{source} has no head for the {classes} classes of {config.data.name} '
            f'({", ".join(fresh)}); train it on them first.'
        )
    like = {'params': abstract.params, 'batch_stats': abstract.batch_stats}
    variables = start(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like))
    variables = jax.device_put(variables, jax.tree.map(lambda leaf: leaf.sharding, like))
    return Run(experiment, variables, 0, split.class_names, mesh)


def make_start(
    experiment: experiment_lib.Experiment,
    abstract: steps.TrainState,
    reader: pipeline.Reader,
    report: Callable[[dict[str, Any]], None],
) -> Callable[[Any], Any] | None:
    """`start` of `initial_state`: from `config.model.init_from`, or from the data; None for neither.

    Weights are found and checked now, before anything is allocated or compiled. A model that starts
    from data has `start_examples`, how many images it wants (0: all), and `start_from_data(key,
    params, images, report) -> params`, on images as it sees them; it may have `check_pixels(low,
    high)`, which raises a UserError for a range of their values that it cannot use.

    Args:
      report: is told what happens, in dicts.

    Raises:
      UserError: no weights there, or they do not fit.
    """
    config, model = experiment.config, experiment.model
    if config.model.init_from:
        return _start_from_weights(experiment, abstract, reader.split.class_names, report)
    if not hasattr(model, 'start_from_data'):
        return None
    if hasattr(model, 'check_pixels'):
        mean, std = np.array(config.data.mean), np.array(config.data.std)
        model.check_pixels(np.min(-mean / std), np.max((1 - mean) / std))

    def start(variables):
        images = _training_images(config, reader, model.start_examples)
        images = augment.normalize(augment.to_float(images), config.data.mean, config.data.std)
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        params = model.start_from_data(key, variables['params'], images, report)
        return {**variables, 'params': params}

    return start


def _training_images(config: ConfigDict, reader: pipeline.Reader, count: int) -> np.ndarray:
    """`count` images uint8 [N, H, W, C], at random, or (0) all of them."""
    examples = len(reader.split.source)
    # A data set's own order may have one class after the other.
    order = pipeline.permutation(config.seed, 0, examples)
    if pipeline.choose(config.data.pipeline, reader, train=True) == 'resident':
        images, _, good = pipeline.load_all(reader)
        return images[np.sort(order[good[order]][: count or examples])]
    found = (pipeline.read(reader, int(i)) for i in order)
    good = (example['image'] for example in found if not example['bad'])
    return np.stack(list(itertools.islice(good, count or examples)))


def _start_from_weights(experiment, abstract, class_names, report) -> Callable[[Any], Any]:
    config = experiment.config
    source, data = config.model.init_from, config.data
    like = {'params': abstract.params, 'batch_stats': abstract.batch_stats}
    theirs = _weights_of_run(source) or weight_files.read(source)
    found = weights.convert(
        experiment.model, weights.flatten(like), theirs.state, config.model.new_head
    )
    known, channels = theirs.normalization, experiment.image_shape[2]

    def per_channel(normalization):
        return [np.broadcast_to(values, channels).tolist() for values in normalization]

    if known and per_channel(known) != per_channel((data.mean, data.std)):
        warnings.warn(
            f'{source} was trained on images of mean {known[0]} and std {known[1]}, and config.data has '
            f'{data.mean} and {data.std}: set config.data.mean and std to its own.',
            stacklevel=2,
        )
    kept_head = not any(map(weights.is_head, found.fresh))
    if kept_head and theirs.class_names and theirs.class_names != class_names:
        warnings.warn(
            f'The head of {source} is for the classes {first_names(theirs.class_names)}, and the data have '
            f'{first_names(class_names)}: set config.model.new_head=True to train another.',
            stacklevel=2,
        )
    report({'loaded': len(found.arrays), 'source': source, 'fresh': found.fresh})

    def start(variables):
        return weights.unflatten({**weights.flatten(variables), **found.arrays})

    return start


def _weights_of_run(source: str) -> weight_files.Weights | None:
    """The weights of a workdir, or of one of its checkpoints; None where the path is neither."""
    path, checkpoint = Path(source), 'latest'
    if path.parent.name == 'checkpoints':
        path, checkpoint = path.parent.parent, path.name
    if not (path / 'config.json').is_file():
        return None
    run = open_run(path, checkpoint)
    # Of several processes each has all of it then.
    variables = jax.device_put(run.variables, sharding.replicated(run.mesh))
    flat = weights.flatten(jax.device_get(variables))
    state = {k: weight_files.Tensor(a.shape, a.dtype, lambda a=a: a) for k, a in flat.items()}
    data = run.experiment.config.data
    return weight_files.Weights(state, (data.mean, data.std), run.class_names)


def _listed(names: tuple[str, ...]) -> str:
    return f'{len(names)} ({first_names(names)})'


def first_names(names: tuple[str, ...]) -> str:
    """At most five names of classes, for a message."""
    return f'{", ".join(names[:5])}{", ..." if len(names) > 5 else ""}'
