"""A look at a config before it trains: the size of its network and the samples of its data."""

import collections
import fnmatch
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from jaxcls import augment, datasets, pipeline, steps
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS, REFERENCES, make_model
from jaxcls.registry import did_you_mean
from jaxcls.sources import read_labels


def summarize(config: ConfigDict) -> dict[str, Any]:
    """Layers, parameters, FLOPs and memory of a config's network; the data are not read.

    Returns:
      `model`, `image_shape`, `num_classes`, `parameters`, `flops` (of one image forward, see
      `count_flops`),
      `state_bytes` (parameters, statistics, optimiser state), `activation_bytes` (what the forward
      pass of one batch keeps for the backward pass, before XLA saves some), and `layers`, a dict each.
    """
    config = experiment_lib.resolve(config)
    shape, num_classes, examples = _shape(config)
    experiment = experiment_lib.build(config, shape, num_classes, examples)
    state = jax.eval_shape(lambda: experiment_lib.init(experiment, 0))
    image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
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
        'flops': count_flops(experiment.predict, variables, image),
        'state_bytes': _bytes(state),
        'activation_bytes': _activation_bytes(experiment, state),
        'layers': _layers(experiment, state),
    }


def _bytes(tree) -> int:
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _activation_bytes(experiment: experiment_lib.Experiment, state: steps.TrainState) -> int:
    """The residuals of the model's derivative at one batch: a `vjp` function is a pytree of them."""
    config = experiment.config
    size = (config.batch_size // config.accumulate_steps, *experiment.image_shape)

    def residuals(params, batch_stats, image):
        def forward(params):
            variables = {'params': params, 'batch_stats': batch_stats}
            rngs = {'dropout': jax.random.key(0)}
            outputs, _ = experiment.model.apply(
                variables, image, train=True, rngs=rngs, mutable=['batch_stats']
            )
            return outputs[0]

        return jax.vjp(forward, params)[1]

    image = jax.ShapeDtypeStruct(size, experiment.model.dtype)
    kept = _bytes(jax.eval_shape(residuals, state.params, state.batch_stats, image))
    return max(kept - _bytes(state.params), 0)


def _shape(config: ConfigDict) -> tuple[tuple[int, int, int], int, int]:
    """Image shape, classes and training examples, from the data set's description."""
    data = config.data
    info = datasets.describe(
        data.name, data.train, data.dir, config.seed, data.classes, data.per_class,
        data.imbalance, data.label_noise, data.share,
    )  # fmt: skip
    height, width, channels = info.shape
    if not (height or data.image_size):
        raise UserError(pipeline.VARYING_SIZES)
    size = data.image_size
    examples = info.examples or 100 * config.batch_size  # only a schedule's length depends on it
    return (size or height, size or width, channels), len(info.class_names), examples


def _layers(experiment: experiment_lib.Experiment, state: steps.TrainState) -> list[dict]:
    """The modules that hold parameters, in the order of the forward pass, with their output shapes."""
    image = jax.ShapeDtypeStruct((1, *experiment.image_shape), experiment.model.dtype)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    order = []  # a traced dict comes back sorted

    def outputs(variables, image):
        _, captured = experiment.model.apply(
            variables, image, train=False, capture_intermediates=True, mutable=['intermediates']
        )
        flat = traverse_util.flatten_dict(captured['intermediates'])
        order.extend(path[:-1] for path in flat)
        return {path[:-1]: jax.tree.leaves(value)[0] for path, value in flat.items()}

    shapes = jax.eval_shape(outputs, variables, image)
    parameters = collections.Counter()
    for path, leaf in traverse_util.flatten_dict(state.params).items():
        parameters[path[:-1]] += leaf.size
    return [
        {
            'name': '/'.join(path),
            'output': list(shapes[path].shape[1:]),
            'parameters': parameters[path],
        }
        for path in order
        if path in parameters
    ]


def summary_text(summary: dict[str, Any]) -> str:
    """`summarize` for people."""
    shape = ' x '.join(map(str, summary['image_shape']))
    rows = [
        f'{layer["name"]:<40} {" x ".join(map(str, layer["output"])):>18} {layer["parameters"]:>14,}'
        for layer in summary['layers']
    ]
    return '\n'.join([f'{"layer":<40} {"output":>18} {"parameters":>14}', *rows, '']) + (
        f'{summary["model"]}, images {shape}, {summary["num_classes"]} classes\n'
        f'parameters            {summary["parameters"]:,}\n'
        f'FLOPs, forward        {summary["flops"]:,} an image\n'
        f'memory of the state   {summary["state_bytes"] / 2**20:,.1f} MiB\n'
        f'memory of activations {summary["activation_bytes"] / 2**20:,.1f} MiB at batch '
        f'{summary["batch_size"]}'
    )


MODELS_HEADER = (
    f'{"model":<22} {"parameters":>12} {"MFLOPs":>9} {"image":>11}  {"top-1":>6}  '
    'reported by; paper'
)


def describe_models(pattern: str = '*') -> Iterator[dict[str, Any]]:
    """What is known of each network whose name fits the pattern, in the order of MODELS.

    Yields:
      `model`, `parameters`, `flops` (of one image forward: multiplications and additions of
      convolutions and matrix products), `image_shape`, `num_classes`, `top1` in per cent (0: none
      known), `source` and `paper`; sizes are those of the published setting.

    Raises:
      UserError: no name fits.
    """
    names = fnmatch.filter(MODELS, pattern)
    if not names:
        raise UserError(f'No model is called {pattern!r}. {did_you_mean(pattern, MODELS)}')
    for name in names:
        known = REFERENCES[name]
        model = make_model(name, num_classes=known.num_classes)
        image = jax.ShapeDtypeStruct((1, *known.image_shape), jnp.float32)
        shapes = jax.eval_shape(
            lambda image, model=model: model.init(jax.random.key(0), image, train=False), image
        )
        yield {
            'model': name,
            'parameters': sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])),
            'flops': count_flops(functools.partial(model.apply, train=False), shapes, image),
            'image_shape': list(known.image_shape),
            'num_classes': known.num_classes,
            'top1': known.top1,
            'source': known.source,
            'paper': known.paper,
        }


def count_flops(function, *args) -> int:
    """Multiplications and additions in the convolutions and matrix products of a traced function."""

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            inner = [count(part) for part in jax.extend.core.jaxprs_in_params(equation.params)]
            # Of branches one runs. Of a convolution's forms the last is XLA's own, on any platform: others
            # multiply by zeros too, or have fewer products.
            if equation.primitive.name == 'cond':
                of_platforms = equation.params.get('branches_platforms')
                inner = [inner[-1] if of_platforms else max(inner)]
            total += sum(inner)
            total += _flops(equation)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def cost(experiment: experiment_lib.Experiment, state: steps.TrainState) -> dict[str, Any]:
    """What the network costs: parameters, FLOPs of one image, and the memory of a device at its peak."""
    variables = steps.evaluation_variables(state)
    image = jax.ShapeDtypeStruct((1, *experiment.image_shape), jnp.uint8)
    return {
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        'flops': count_flops(experiment.predict, variables, image),
        'peak_bytes': peak_bytes(),
    }


def peak_bytes() -> int:
    """Of the device's memory; on CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in stats:
        return stats['peak_bytes_in_use']
    import resource  # not on Windows

    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _flops(equation) -> int:
    name, output = equation.primitive.name, equation.outvars[0].aval
    if name == 'conv_general_dilated':
        kernel = equation.invars[1].aval.shape
        features = equation.params['dimension_numbers'].rhs_spec[0]
        return 2 * output.size * (int(np.prod(kernel)) // kernel[features])
    if name == 'dot_general':
        (contracted, _), _ = equation.params['dimension_numbers']
        shape = equation.invars[0].aval.shape
        return 2 * output.size * int(np.prod([shape[axis] for axis in contracted]))
    return 0


def model_line(row: dict[str, Any]) -> str:
    """A line under MODELS_HEADER."""
    top1 = f'{row["top1"]:.2f}%' if row['top1'] else ''
    source = f'{row["source"]}; ' if row['source'] else ''
    return (
        f'{row["model"]:<22} {row["parameters"]:>12,} {row["flops"] / 1e6:>9,.1f} '
        f'{"x".join(map(str, row["image_shape"])):>11}  {top1:>6}  {source}{row["paper"]}'
    )


def describe_data(config: ConfigDict, sheet: Path, samples: int) -> dict[str, Any]:
    """What a config's data hold; draws augmented training samples to a PNG.

    Args:
      sheet: the file to write.
      samples: how many images are on it: the first batch of so many.
    """
    from jaxcls import pictures  # slow to import

    config = experiment_lib.resolve(config)
    split = experiment_lib.load_split(config, config.data.train)
    experiment_lib.load_split(config, config.data.validation)  # a UserError where it is not there
    reader = experiment_lib.make_reader(config, split, train=True)
    count = np.bincount(read_labels(split.source), minlength=len(split.class_names))
    figure = pictures.sheet(*_augmented(config, reader, samples))
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
    prepared = jax.jit(lambda key, batch: prepare(key, batch, None))(
        jax.random.key(config.seed), batch
    )
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
