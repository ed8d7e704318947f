"""A look at a config before it trains: the size of its network and the samples of its data."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from jaxcls import augment, datasets, pipeline, report, steps
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError


def summarize(config: ConfigDict) -> dict[str, Any]:
    """Layers, parameters, FLOPs and memory of a config's network; the data are not read.

    Returns:
      `model`, `image_shape`, `num_classes`, `parameters`, `flops` (of one image forward),
      `train_step_bytes` (parameters, optimiser state and buffers of one step, as compiled), and
      `table`, text of one line a layer.
    """
    config = experiment_lib.resolve(config)
    shape, num_classes, examples = _shape(config)
    experiment = experiment_lib.build(config, shape, num_classes, examples)
    state = jax.eval_shape(lambda: experiment_lib.init(experiment, 0))
    image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    forward = jax.jit(experiment.predict).lower(variables, image)
    step = jax.jit(experiment.train_step, donate_argnums=0)
    memory = step.lower(state, experiment_lib.raw_batch(experiment)).compile().memory_analysis()
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    return {
        'model': config.model.name,
        'image_shape': list(shape),
        'num_classes': num_classes,
        'batch_size': config.batch_size,
        'parameters': sum(int(np.prod(size)) for size in sizes.values()),
        'flops': int(forward.cost_analysis()['flops']),
        'train_step_bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        'table': _table(experiment),
    }


def _shape(config: ConfigDict) -> tuple[tuple[int, int, int], int, int]:
    """Image shape, classes and training examples, from the data set's description."""
    info = datasets.describe(config.data.name, config.data.train, config.data.dir, config.seed)
    height, width, channels = info.shape
    if not (height or config.data.image_size):
        raise UserError(pipeline.VARYING_SIZES)
    size = config.data.image_size
    return (size or height, size or width, channels), len(info.class_names), info.examples


def _table(experiment: experiment_lib.Experiment) -> str:
    """Flax's table of the layers, without colours."""
    image = jax.ShapeDtypeStruct((1, *experiment.image_shape), experiment.model.dtype)
    tabulate = nn.tabulate(
        experiment.model,
        jax.random.key(0),
        console_kwargs={'width': 120, 'no_color': True},
        column_kwargs={'overflow': 'fold'},
    )
    return tabulate(image, train=False)


def summary_text(summary: dict[str, Any]) -> str:
    """`summarize` for people."""
    shape = ' x '.join(map(str, summary['image_shape']))
    return (
        f'{summary["table"]}\n'
        f'{summary["model"]}, images {shape}, {summary["num_classes"]} classes\n'
        f'parameters            {summary["parameters"]:,}\n'
        f'FLOPs, forward        {summary["flops"]:,} an image\n'
        f'memory, training step {summary["train_step_bytes"] / 2**20:,.1f} MiB at batch '
        f'{summary["batch_size"]}, without the data set'
    )


def describe_data(config: ConfigDict, sheet: Path, samples: int) -> dict[str, Any]:
    """What a config's data hold; draws augmented training samples to a PNG.

    Args:
      sheet: the file to write.
      samples: how many images are on it, the first of epoch 0 and as many of epoch 1.
    """
    config = experiment_lib.resolve(config)
    split = experiment_lib.load_split(config, config.data.train)
    reader = experiment_lib.make_reader(config, split, train=True)
    count = np.bincount(_labels(split), minlength=len(split.class_names))
    figure = report.sheet(*_augmented(config, reader, samples))
    try:
        figure.savefig(sheet, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f'{sheet} cannot be written: {error}. Choose another --sheet.') from None
    return {
        'name': config.data.name,
        'splits': datasets.splits(config.data.name, config.data.dir),
        'train': config.data.train,
        'validation': config.data.validation,
        'image_shape': list(reader.shape),
        'class_names': list(split.class_names),
        'train_examples_per_class': count.tolist(),
        'sheet': str(sheet),
    }


def _labels(split: datasets.Split) -> np.ndarray:
    labels = getattr(split.source, 'labels', None)
    if labels is None:
        labels = [split.source[i][1] for i in range(len(split.source))]
    return np.asarray(labels)


def _augmented(config, reader: pipeline.Reader, samples: int) -> tuple[np.ndarray, list[str]]:
    """Images [N, H, W, C] in [0, 1] as the network sees them, but for the normalisation, and titles."""
    examples = len(reader.split.source)
    order = pipeline.training_order(config.seed, examples, samples, 0)
    images, labels = zip(*map(reader, map(int, order['index']), range(samples)), strict=True)
    batch = {'image': np.stack(images), 'label': np.array(labels, np.int32), **order}
    classes = len(reader.split.class_names)
    prepare = steps.make_prepare(
        augment.make_augment(config.augment), (0.0,), (1.0,), classes, jnp.float32
    )
    prepared = jax.jit(lambda key, batch: prepare(key, batch, None))(jax.random.key(config.seed), batch)
    return np.asarray(prepared['image']), [reader.split.class_names[label] for label in labels]


def data_text(description: dict[str, Any]) -> str:
    """`describe_data` for people."""
    counts = description['train_examples_per_class']
    lines = [
        f'{description["name"]}: images {" x ".join(map(str, description["image_shape"]))}, '
        f'{len(counts)} classes',
        *(f'  split {name:<12} {size:>10,}' for name, size in description['splits'].items()),
        f'training on {description["train"]}, validation on {description["validation"]}',
        f'examples a class: {min(counts):,} to {max(counts):,}',
        *(
            f'  {name[:30]:<30} {count:>8,}'
            for name, count in list(zip(description['class_names'], counts, strict=True))[:20]
        ),
    ]
    if len(counts) > 20:
        lines.append(f'  and {len(counts) - 20} more')
    return '\n'.join([*lines, f'augmented samples: {description["sheet"]}'])
