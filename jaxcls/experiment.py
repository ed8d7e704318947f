"""A config made into what it names: data, model, losses, optimiser and the compiled functions' parts.

The only module that reads a config's sections. Training, evaluation and every command after training
build on it, so that a run means the same wherever it is opened.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxcls import (
    adversary,
    augment,
    datasets,
    distillation,
    estimators,
    losses,
    optimizers,
    pipeline,
    privacy,
    pruning,
    quantization,
    registry,
    schedules,
    sharding,
    steps,
)
from jaxcls import config as config_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS

TABLES = {
    'model': MODELS | estimators.BASELINES,
    'loss': losses.LOSSES,
    'optimizer': optimizers.OPTIMIZERS,
    'schedule': schedules.SCHEDULES,
    'augment': augment.AUGMENTATIONS,
    'adversary': adversary.ADVERSARIES,
    'privacy': privacy.PRIVACIES,
    'teacher': distillation.TEACHERS,
    'pruning': pruning.PRUNINGS,
    'quantization': quantization.QUANTIZATIONS,
}
# Names of config.precision to (computation, parameters).
_DTYPES = {
    'float32': (jnp.float32, jnp.float32),
    'mixed': (jnp.bfloat16, jnp.float32),
    'bfloat16': (jnp.bfloat16, jnp.bfloat16),
}


class Experiment(NamedTuple):
    """Everything that a config and the shape of its data decide, and no arrays.

    Attributes:
      config: complete and locked.
      image_shape: (H, W, C).
      num_classes: K.
      examples: of the training split.
      model: the network.
      tx: the Optax chain.
      learning_rate: step -> rate.
      train_step: `(state, raw batch) -> (state, sums)`.
      predict: `(variables, uint8 images) -> logits`.
      loss: `(logits, target) -> [B]`.
      total_steps: of the whole run; no more than `config.privacy` allows.
      teacher: its variables, which every raw batch carries as `teacher`; None without.
      private: what `config.privacy` means for the run; None without.
    """

    config: ConfigDict
    image_shape: tuple[int, int, int]
    num_classes: int
    examples: int
    model: nn.Module
    tx: optax.GradientTransformationExtraArgs
    learning_rate: Callable
    train_step: Callable
    predict: Callable
    loss: Callable
    total_steps: int
    teacher: Any = None
    private: privacy.Plan | None = None

    @property
    def rows(self) -> int:
        """Of the arrays of a training batch."""
        return self.private.rows if self.private else self.config.batch_size

    def order(self, seed: int) -> pipeline.Order:
        """Which examples each training batch of a seed holds."""
        if self.private:
            return functools.partial(self.private.order, seed)
        return functools.partial(
            pipeline.training_order, seed, self.examples, self.config.batch_size
        )

    def steps(self, epochs: float) -> int:
        """Epochs to steps."""
        return config_lib.epoch_steps(epochs, self.examples, self.config.batch_size)


def resolve(config: ConfigDict) -> ConfigDict:
    """A complete, checked and locked copy.

    Raises:
      UserError: the first mistake in it.
    """
    config = ConfigDict(config.to_dict() if isinstance(config, ConfigDict) else config)
    config_lib.validate(config)
    config_lib.complete(config, TABLES)
    augment.make_augment(config.augment)
    losses.make_loss(**config.loss)
    adversary.make_adversary(**config.adversary)
    distillation.make_lesson(**config.teacher)
    pruning.make_pruning(**config.pruning, total_steps=1)
    if privacy.make_privacy(**config.privacy):
        _check_private(config)
    return config.lock()


def _check_private(config: ConfigDict):
    """Raises UserError for what privacy does not cover, before anything is built."""
    model, optimizer = MODELS.get(config.model.name), config.optimizer.name
    own_start = hasattr(getattr(model, 'func', model), 'start_from_data')
    mixing = [item['name'] for item in config.augment if item['name'] in augment.MIXING]
    privacy.refuse([
        ('model.name', model is None, 'it is no network that is trained by gradients'),
        ('model.name', own_start, 'it starts from the training examples themselves'),
        ('augment', mixing, f'{mixing} mixes examples, and each must be clipped alone'),
        ('teacher.name', config.teacher.name != 'none', 'nothing is known of what the teacher saw'),
        ('loss.balance', losses.needs_counts(**config.loss), 'it counts the labels, without noise'),
        ('optimizer.name', optimizer in optimizers.NEED_LOSS, f'{optimizer} reads the loss, without noise'),
        ('accumulate_steps', config.accumulate_steps > 1, 'privacy.microbatch saves memory in its place'),
        ('sam_rho', config.sam_rho, 'it would need the gradients of two steps'),
        ('clip_norm', config.clip_norm, 'privacy.clip_norm clips each example, which is enough'),
    ])  # fmt: skip


def is_baseline(config: ConfigDict) -> bool:
    """Whether the model is a classical one, not a network."""
    return config.model.name in estimators.BASELINES


def load_split(config: ConfigDict, split: str) -> datasets.Split:
    """A split of the config's data set and classes, its image size checked.

    What `data.train` names is cut to `data.per_class`, `data.imbalance` and `data.share`, and has
    `data.label_noise`; other splits, slices of it included, are whole and right.
    """
    data = config.data
    cut = (data.per_class, data.imbalance, data.label_noise, data.share)
    cut = cut if split == data.train else ()
    loaded = datasets.load(data.name, split, data.dir, config.seed, data.classes, *cut)
    pipeline.check_size(loaded, data.image_size)
    return loaded


def _load_splits(config: ConfigDict) -> tuple[datasets.Split, datasets.Split]:
    """The training and the validation split.

    Raises:
      UserError: they have different classes.
    """
    train, validation = (load_split(config, s) for s in (config.data.train, config.data.validation))
    ours, theirs = train.class_names, validation.class_names
    if ours != theirs:
        raise UserError(
            f'The training split has {len(ours)} classes and the validation split '
            f'{len(theirs)}; only in training: {sorted(set(ours) - set(theirs))[:5]}, only '
            f'in validation: {sorted(set(theirs) - set(ours))[:5]}. Give both the same classes.'
        )
    return train, validation


class OpenedData(NamedTuple):
    """The reader of a run's training split, its validation split, and what it keeps about both."""

    reader: pipeline.Reader
    validation: datasets.Split
    description: dict[str, Any]


def open_data(config: ConfigDict, train: bool = True) -> OpenedData:
    """Opens both splits.

    Args:
      train: the training images are cropped at random, where the config says so.

    Raises:
      UserError: a split that is not there, or different classes.
    """
    training, validation = _load_splits(config)
    reader = make_reader(config, training, train)._replace(max_bad=config.data.max_bad_images)
    return OpenedData(reader, validation, _describe_data(config, reader, validation))


def _describe_data(
    config: ConfigDict, reader: pipeline.Reader, validation: datasets.Split
) -> dict[str, Any]:
    """What a run keeps about its data: class names, image shape, sizes of its splits."""
    data, split = config.data, reader.split
    described = {
        'class_names': split.class_names,
        'image_shape': reader.shape,
        'examples': {data.train: len(split.source), data.validation: len(validation.source)},
    }
    if losses.needs_counts(**config.loss):
        described['class_counts'] = datasets.class_counts(split)
    return described


def build_for(
    config: ConfigDict, data: Mapping[str, Any], teacher: distillation.Teacher | None = None
) -> Experiment:
    """`build` for data as `open_data` describes them, and a run's data.json."""
    return build(
        config,
        tuple(data['image_shape']),
        len(data['class_names']),
        data['examples'][config.data.train],
        data.get('class_counts'),
        teacher=teacher,
    )


def make_reader(config: ConfigDict, split: datasets.Split, train: bool) -> pipeline.Reader:
    """How the config wants images decoded; random crops in training only."""
    data = config.data
    crop = data.crop if train else 'center'
    return pipeline.Reader(split, data.image_size, crop, data.crop_fraction, config.seed)


def read_image(experiment: Experiment, path: str | Path) -> np.ndarray:
    """An image file, cropped and resized as in evaluation: uint8 of `image_shape`.

    Raises:
      UserError: no such file, or no image.
    """
    try:
        encoded = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f'{path} cannot be read: {error.strerror}. Give the path of an image.'
        ) from None
    try:
        return decode_image(experiment, encoded)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None


def decode_image(experiment: Experiment, encoded: bytes) -> np.ndarray:
    """`read_image` of a file's content. A run that took images of one size has others resized to it.

    Raises:
      UserError: no image.
    """
    height, width, channels = experiment.image_shape
    picture = datasets.decode_picture(encoded, channels)
    data = experiment.config.data
    if height == width:
        fraction = data.crop_fraction if data.image_size else 1.0
        box = pipeline.center_box(picture.height, picture.width, fraction)
    else:
        box = (0, 0, *picture.size)
    return pipeline.resize(picture, (height, width), box)


def make_feed(
    config: ConfigDict, reader: pipeline.Reader, order, mesh: Mesh, steps_: int, train: bool
) -> pipeline.Feed:
    """The resident or streamed feed that the config asks for."""
    if pipeline.choose(config.data.pipeline, reader, train) == 'resident':
        return pipeline.resident(reader, order, mesh)
    return pipeline.stream(reader, order, mesh, steps_, config.data.workers)


def make_training_feed(
    experiment: Experiment, reader: pipeline.Reader, mesh: Mesh, steps_: int
) -> pipeline.Feed:
    """The batches of a run's seed, with its teacher where it has one."""
    config = experiment.config
    order = experiment.order(config.seed)
    feed = make_feed(config, reader, order, mesh, steps_, train=True)
    if experiment.teacher is None:
        return feed
    return pipeline.carrying(feed, 'teacher', experiment.teacher)


def make_evaluation_feed(
    config: ConfigDict, split: datasets.Split, mesh: Mesh, batch_size: int
) -> tuple[pipeline.Feed, int]:
    """A feed of every example of a split once, in order, and the number of its batches.

    The batch size is rounded up to a multiple of the devices; the last batch is padded and masked.
    """
    examples = len(split.source)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    count = -(-examples // batch_size)
    order = functools.partial(pipeline.evaluation_order, examples, batch_size)
    reader = make_reader(config, split, train=False)
    return make_feed(config, reader, order, mesh, count, train=False), count


def build(
    config: ConfigDict,
    image_shape,
    num_classes: int,
    examples: int,
    class_counts: Sequence[int] | None = None,
    change_tx: Callable[[optax.GradientTransformation], Any] = lambda tx: tx,
    teacher: distillation.Teacher | None = None,
) -> Experiment:
    """Composes a resolved config for images of shape (H, W, C), K classes and N training examples.

    Args:
      class_counts: training examples of each class, for a loss that is weighted by them.
      change_tx: what becomes of the config's Optax chain: seam 4.
      teacher: of `config.teacher`, to train with; all else of a run needs none.

    Raises:
      UserError: a value that does not fit the model, the data or the length of the run.
    """
    if is_baseline(config):
        raise UserError(f'{config.model.name} is no network; choose one of `jaxcls models`.')
    dtype, param_dtype = _DTYPES[config.precision]
    data = config.data
    augment.check_normalization(data.mean, data.std, image_shape[2])
    model = registry.bind(MODELS, 'model', **config_lib.arguments('model', config.model))(
        num_classes=num_classes, dtype=dtype, param_dtype=param_dtype
    )
    layers = _layers(config, model, image_shape)
    model = quantization.quantize(model, image_shape, **config.quantization)
    total_steps = config_lib.epoch_steps(config.epochs, examples, config.batch_size)
    private = privacy.make_privacy(**config.privacy)
    if private:
        _check_batch_stats(config, model, image_shape)
        private = private(examples, config.batch_size, total_steps)
        total_steps = private.total_steps
    learning_rate = schedules.make_schedule(
        **config.schedule,
        learning_rate=config.learning_rate,
        total_steps=total_steps,
        steps_per_epoch=examples / config.batch_size,
        warmup_epochs=config.warmup_epochs,
    )
    tx = optimizers.make_optimizer(
        **config.optimizer,
        schedule=learning_rate,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        adaptive_clip=config.adaptive_clip,
        freeze=config.freeze,
        layer_decay=config.layer_decay,
        layers=layers,
    )
    prune = pruning.make_pruning(**config.pruning, total_steps=total_steps, freeze=config.freeze)
    tx = change_tx(optax.chain(tx, prune) if prune else tx)
    loss = losses.make_loss(**config.loss, class_counts=class_counts)
    lesson = distillation.make_lesson(**config.teacher) if teacher else None
    # Traced once, for `abstract_checkpoint` and for what is compiled.
    train_step = jax.jit(
        _train_step(config, model, loss, tx, private, lesson, teacher), inline=True
    )
    predict = steps.make_predict(model, data.mean, data.std)
    return Experiment(
        config, tuple(image_shape), num_classes, examples, model, tx, learning_rate, train_step,
        predict, loss, total_steps, teacher.variables if lesson else None, private,
    )  # fmt: skip


def _train_step(
    config: ConfigDict, model: nn.Module, loss, tx, private, lesson, teacher
) -> Callable:
    """The seams, as the config's sections and fields fill them."""
    data = config.data
    gradients = steps.plain_gradients
    if config.accumulate_steps > 1:
        gradients = steps.accumulated_gradients(config.accumulate_steps, gradients)
    if config.sam_rho:
        gradients = steps.sam_gradients(config.sam_rho, gradients)
    l1, l2 = config.l1, config.l2
    if private:
        gradients, l1, l2 = privacy.make_gradients(private, l1, l2), 0.0, 0.0
    forward = steps.make_float_forward(model, data.mean, data.std)
    attack, penalty = adversary.make_parts(config.adversary, forward, loss)
    if lesson:
        attack = distillation.teach(lesson, teacher, attack)
    augmentation = augment.make_augment(config.augment)
    return steps.make_train_step(
        steps.make_prepare(
            augmentation, data.mean, data.std, model.num_classes, model.dtype, attack
        ),
        steps.make_objective(model, loss, l1, l2, config.freeze, penalty, lesson and lesson.blend),
        gradients,
        tx,
        config.ema_decay,
    )


def _layers(config: ConfigDict, model: nn.Module, image_shape) -> list[str]:
    """The model's top-level modules in the order of the forward pass; [] where the config names none.

    Raises:
      UserError: `freeze` is found in no parameter, or in all of them.
    """
    if not config.freeze and config.layer_decay == 1:
        return []
    order = []

    def record(next_fun, args, kwargs, context):
        path = context.module.path
        if path and path[0] not in order:
            order.append(path[0])
        return next_fun(*args, **kwargs)

    initialize = functools.partial(_variables.__wrapped__, model, image_shape)
    with nn.intercept_methods(record):
        shapes = jax.eval_shape(initialize, jax.random.key(0))
    params = shapes['params']
    frozen = jax.tree.leaves(optimizers.frozen_mask(params, config.freeze))
    if (config.freeze and not any(frozen)) or all(frozen):
        paths = [optimizers.param_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise UserError(
            f'config.freeze={config.freeze!r} is found in {"all" if all(frozen) else "none"} of the '
            f'{len(paths)} parameters: {", ".join(paths[:3])}, ..., {paths[-1]}. For example '
            "'^(?!head)' freezes all but the head."
        )
    return [name for name in order if name in params]


def _check_batch_stats(config: ConfigDict, model: nn.Module, image_shape):
    variables = jax.eval_shape(lambda: _variables(model, image_shape, jax.random.key(0)))
    # Frozen statistics are no batch's.
    if variables.get('batch_stats') and getattr(model, 'norm', '') != 'frozen_batch':
        raise UserError(
            f'config.privacy does not go with {config.model.name} and its batch norm, which mixes the '
            'examples of a batch, and each must be clipped alone: set config.model.norm=group where the '
            'model has that field, or choose another model.'
        )


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)  # shapes and values need one trace
def _variables(model: nn.Module, image_shape, key: jax.Array) -> dict[str, Any]:
    return model.init(key, jnp.zeros((1, *image_shape), model.dtype), train=False)


def init(
    experiment: Experiment,
    seed: jax.Array | int,
    change: Callable[[Any], Any] = lambda variables: variables,
) -> steps.TrainState:
    """A fresh state; pure, to be compiled or only traced. `change` has a say in its variables."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = change(_variables(experiment.model, experiment.image_shape, init_key))
    return steps.init_state(variables, experiment.tx, run_key, experiment.config.ema_decay)


def abstract_state(experiment: Experiment, mesh: Mesh) -> steps.TrainState:
    """Shapes, dtypes and shardings of a state, without computing any."""
    shapes = jax.eval_shape(lambda: init(experiment, 0))
    placed = sharding.state_sharding(shapes, mesh, experiment.config.parameters)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        placed,
    )


def initial_state(
    experiment: Experiment,
    abstract: steps.TrainState,
    start: Callable[[Any], Any] | None = None,
) -> steps.TrainState:
    """The state of step 0, placed on the devices.

    Args:
      abstract: of `abstract_state`.
      start: `variables -> variables`, on the host: trained weights in place of the fresh ones.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # The seed is an argument, so that another one finds the same program in the cache.
    seed, ema_decay = np.int32(experiment.config.seed), experiment.config.ema_decay
    # It runs once, and on CPU most of it is compiling random numbers, which optimised takes seconds.
    options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    if start is None:
        fresh = jax.jit(
            lambda seed: init(experiment, seed), out_shardings=placed, compiler_options=options
        )
        return fresh(seed)
    state = jax.jit(lambda seed: init(experiment, seed), compiler_options=options)(seed)
    key = jax.random.key_data(state.key)
    variables = start(jax.device_get({'params': state.params, 'batch_stats': state.batch_stats}))
    begin = jax.jit(
        lambda variables, key: steps.init_state(
            variables, experiment.tx, jax.random.wrap_key_data(key), ema_decay
        ),
        out_shardings=placed,
        compiler_options=options,
    )
    return begin(variables, np.asarray(key))


def abstract_checkpoint(experiment: Experiment, mesh: Mesh) -> tuple[steps.TrainState, Any]:
    """Shapes of what a checkpoint holds: the state, and the training sums since the last log line."""
    abstract, place = abstract_state(experiment, mesh), sharding.replicated(mesh)

    def on_mesh(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    # On the mesh, as the step is compiled: else it would be traced once more there.
    batch = jax.tree.map(on_mesh, raw_batch(experiment))
    _, sums = jax.eval_shape(experiment.train_step, abstract, batch)
    return abstract, jax.tree.map(on_mesh, sums)


def abstract_seeds(experiment: Experiment, mesh: Mesh, count: int) -> tuple:
    """Of seeds that train in one program: as `abstract_checkpoint`, stacked, and their best states."""
    like = stack_shapes(abstract_checkpoint(experiment, mesh), count)
    return *like, like[0]


def stack_shapes(like, count: int):
    """The shapes of `count` runs' trees as one."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=leaf.sharding),
        like,
    )


def check_rows(experiment: Experiment, mesh: Mesh):
    """Raises UserError where the padded batches of `config.privacy` do not divide over the devices."""
    if experiment.private and experiment.rows % mesh.size:
        raise UserError(
            f'With config.privacy, batches are padded to {experiment.rows} rows, which do not divide '
            f'over {mesh.size} devices; use 1, 2, 4 or 8.'
        )


def raw_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a raw batch of `pipeline.Feed`."""
    size = experiment.rows
    row = {'label': jnp.int32, 'index': jnp.int32, 'epoch': jnp.int32, 'mask': jnp.bool_}
    shapes = {name: jax.ShapeDtypeStruct((size,), dtype) for name, dtype in row.items()}
    shapes['image'] = jax.ShapeDtypeStruct((size, *experiment.image_shape), jnp.uint8)
    if experiment.teacher is None:
        return shapes
    teacher = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experiment.teacher)
    return {**shapes, 'teacher': teacher}
