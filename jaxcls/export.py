"""A trained run as one file that runs without this package: StableHLO for JAX, ONNX, or TFLite.

The file takes raw images, uint8 [B, H, W, C] of any B: preprocessing and weights are inside. What it
returns is compared with the run's own outputs before it is there.
"""

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import experiment as experiment_lib
from jaxcls import onnx_graph, pipeline, runs
from jaxcls.errors import UserError, require

OUTPUTS = ('probabilities', 'logits')
# Largest difference to the run's own outputs, over the largest of those: by config.precision.
TOLERANCES = {'float32': 1e-4, 'mixed': 3e-2, 'bfloat16': 3e-2}
PLATFORMS = ('cpu', 'cuda', 'tpu')
_PROGRAM, _ABOUT = 'model.stablehlo', 'model.json'


def export(
    workdir: str | Path,
    path: str | Path,
    format: str = 'stablehlo',
    output: str = 'probabilities',
    images: int = 64,
    checkpoint: str = 'latest',
) -> dict[str, Any]:
    """Writes a run as one file, after comparing it with the run on images of its validation split.

    Args:
      format: 'stablehlo', a zip archive of `model.stablehlo` (`jax.export`, for CPU, CUDA and TPU) and
        `model.json`; 'onnx', with what `model.json` has in its metadata, under 'jaxcls'; or 'tflite', for
        LiteRT, which is a zip archive of `model.json` too.
      output: 'probabilities' (softmax) or 'logits', float32 [B, K].
      images: how many to compare on.

    Returns:
      `path`, `format`, `bytes`, `images` and `max_difference`: over the largest output of the run.

    Raises:
      UserError: no such format or output, a file there already, a package that is missing, an
        operation that ONNX does not have, or outputs that differ by more than TOLERANCES.
    """
    path = Path(path)
    _check(path, format, output, images)
    run = runs.open_run(workdir, checkpoint)
    quantized = run.experiment.config.quantization.name
    if format != 'stablehlo' and quantized != 'none':
        raise UserError(
            f'{workdir} has config.quantization.name={quantized}, whose integers --format={format} cannot '
            'hold; use --format=stablehlo.'
        )
    write, load = FORMATS[format].write, FORMATS[format].load
    function = _function(run, output)
    examples = _examples(run, images)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        write(function, run.experiment.image_shape, _about(run, output), partial)
        difference = _difference(function, load(partial), examples)
        allowed = TOLERANCES[run.experiment.config.precision]
        if not difference <= allowed:
            raise UserError(
                f'The exported file differs from the run by {difference:.2g} of its largest output on '
                f'{len(examples)} images, expected at most {allowed:.2g}; nothing was written. Please '
                f'report it, with the config of {workdir}.'
            )
        os.link(partial, path)  # fails where a file has come to be
    except FileExistsError:
        raise UserError(_exists(path)) from None
    finally:
        partial.unlink(missing_ok=True)
    return {
        'path': str(path),
        'format': format,
        'bytes': path.stat().st_size,
        'images': len(examples),
        'max_difference': difference,
    }


def _check(path: Path, format: str, output: str, images: int):
    require(format in FORMATS, '--format', format, f'one of {", ".join(FORMATS)}')
    require(output in OUTPUTS, '--output', output, f'one of {", ".join(OUTPUTS)}')
    require(images >= 1, '--images', images, 'at least 1')
    known = FORMATS[format]
    if path.suffix != known.suffix:
        raise UserError(
            f'{path} must end in {known.suffix} for --format={format}. '
            + ', '.join(f'{name} ends in {each.suffix}' for name, each in FORMATS.items())
            + '.'
        )
    if path.exists():
        raise UserError(_exists(path))
    if not path.parent.is_dir():
        raise UserError(f'There is no directory {path.parent}. Make it, or choose another file.')
    missing = [name for name in known.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'--format={format} needs {" and ".join(missing)}: pip install "jaxcls[{known.extra}]".'
        )


def _exists(path: Path) -> str:
    return f'{path} exists already. Remove it, or choose another file.'


def _function(run: runs.Run, output: str) -> Callable[[jax.Array], jax.Array]:
    """uint8 [B, H, W, C] to float32 [B, K], with the weights on the host as constants."""
    variables = jax.tree.map(np.asarray, jax.device_get(run.variables))

    def function(image):
        logits = run.experiment.predict(jax.tree.map(jnp.asarray, variables), image)
        return jax.nn.softmax(logits) if output == 'probabilities' else logits

    return function


def _about(run: runs.Run, output: str) -> dict[str, Any]:
    height, width, channels = run.experiment.image_shape
    config = run.experiment.config
    return {
        'input': {'dtype': 'uint8', 'shape': ['batch', height, width, channels]},
        'output': {'dtype': 'float32', 'shape': ['batch', len(run.class_names)], 'values': output},
        'class_names': list(run.class_names),
        # Of the short side of an image, before it is resized.
        'crop_fraction': config.data.crop_fraction if config.data.image_size else 1.0,
        'model': config.model.name,
        'step': run.step,
    }


def _examples(run: runs.Run, count: int) -> np.ndarray:
    """The first images of the validation split that can be decoded, uint8 [N, H, W, C]."""
    _, split = runs.load_split(run)
    reader = experiment_lib.make_reader(run.experiment.config, split, train=False)
    found = (pipeline.read(reader, i) for i in range(min(count, len(split.source))))
    return np.stack([example['image'] for example in found if not example['bad']])


def _difference(function: Callable, exported: Callable, examples: np.ndarray) -> float:
    """The largest difference over the largest value, for all examples at once and the first alone."""
    ours = np.asarray(jax.jit(function)(examples))
    if not np.isfinite(ours).all():
        raise UserError(
            'What the run itself makes of its images is not finite: did it diverge? Export another run or '
            '--checkpoint.'
        )
    theirs = exported(examples)
    alone = exported(examples[:1])
    if theirs.shape != ours.shape or alone.shape != ours[:1].shape:
        return float('inf')
    gap = max(np.abs(theirs - ours).max(), np.abs(alone - ours[:1]).max())
    return float(gap / max(np.abs(ours).max(), np.finfo(np.float32).tiny))


def _program(function, image_shape, platforms):
    from jax import export as jax_export

    (batch,) = jax_export.symbolic_shape('batch')
    image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    return jax_export.export(jax.jit(function), platforms=platforms)(image)


def _write_stablehlo(function, image_shape, about, path: Path):
    exported = _program(function, image_shape, PLATFORMS)
    about = {**about, 'jax': jax.__version__, 'platforms': PLATFORMS}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_PROGRAM, bytes(exported.serialize()))
        archive.writestr(_ABOUT, json.dumps(about, indent=1))


def _load_stablehlo(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from jax import export as jax_export

    with zipfile.ZipFile(path) as archive:
        exported = jax_export.deserialize(bytearray(archive.read(_PROGRAM)))
    call = jax.jit(exported.call)
    return lambda images: np.asarray(call(images))


def _write_onnx(function, image_shape, about, path: Path):
    model = onnx_graph.convert(function, image_shape, about['output']['values'])
    onnx_graph.save(model, {'jaxcls': json.dumps(about)}, path)


def _write_tflite(function, image_shape, about, path: Path):
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    # A platform that has XLA's own convolutions, not the forms for CPU.
    program = _program(function, image_shape, ('tpu',)).mlir_module()
    try:
        with ir.Context() as context:
            converter.prepare_mlir_context(context)
            module = ir.Module.parse(program)
            names = ['image'], [about['output']['values']]
            converter.set_signature(module.operation, 'serving_default', *names)
            passes = passmanager.PassManager()
            converter.run_convert_to_tfl_passes(module, passes, converter.ConvertToTFLConfig())
            path.write_bytes(converter.export_flatbuffer_to_bytes(module.operation))
    except (ValueError, ir.MLIRError) as error:
        raise UserError(
            f'LiteRT cannot convert this network ({str(error).splitlines()[0]}). Of a batch of any size it '
            'takes jax.lax.slice_in_dim, and not x[:, 0]. Change the network, or use --format=onnx.'
        ) from None
    # Behind the model, which is a zip archive by that, as TFLite's own metadata make it.
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_ABOUT, json.dumps(about, indent=1))


def _load_tflite(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(images):
        interpreter.resize_tensor_input(image['index'], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(image['index'], images)
        interpreter.invoke()
        return interpreter.get_tensor(output['index'])

    return call


class Format(NamedTuple):
    """A kind of file.

    Attributes:
      write: `(function, image_shape, about, path)`.
      load: a path to a function of uint8 [B, H, W, C].
      suffix: of the file's name.
      extra: to install.
      packages: of the extra.
    """

    write: Callable
    load: Callable[[Path], Callable[[np.ndarray], np.ndarray]]
    suffix: str
    extra: str
    packages: tuple[str, ...]


FORMATS = {
    'stablehlo': Format(_write_stablehlo, _load_stablehlo, '.zip', 'export', ('flatbuffers',)),
    'onnx': Format(_write_onnx, onnx_graph.load, '.onnx', 'export', ('onnx', 'onnxruntime')),
    'tflite': Format(
        _write_tflite, _load_tflite, '.tflite', 'tflite', ('litert_converter', 'ai_edge_litert')
    ),
}
