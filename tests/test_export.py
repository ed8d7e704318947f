"""Exported files: the run's own outputs, without this package, and never a file that differs."""

import json
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import classify, config, datasets, export, fit, make_model, onnx_graph, runs, steps
from jaxcls.errors import UserError

# What the documentation gives: nothing of this package.
LOADER = """
import json, sys, zipfile
import jax, numpy as np
from jax import export
with zipfile.ZipFile(sys.argv[1]) as archive:
    about = json.loads(archive.read('model.json'))
    program = export.deserialize(bytearray(archive.read('model.stablehlo')))
images = np.load(sys.argv[2])
found = np.asarray(jax.jit(program.call)(images))
assert not [name for name in sys.modules if name.split('.')[0] in ('jaxcls', 'flax')]
np.save(sys.argv[3], found)
print(about['class_names'][found[0].argmax()])
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    c = config.get_config()
    c.update({'model': {'name': 'mlp', 'hidden': (16,)}, 'epochs': 2, 'learning_rate': 0.01})
    fit(c, path)
    return path


@pytest.fixture(scope='module')
def images():
    return datasets.load('digits', 'test[:7]').source.images


@pytest.fixture(scope='module')
def expected(run, images):
    return classify.make_classifier(runs.open_run(run))(images)


def test_stablehlo_runs_in_a_process_without_this_package(run, images, expected, tmp_path):
    result = export.export(run, tmp_path / 'm.zip')
    assert result['max_difference'] < 1e-6 and result['images'] == 64
    np.save(tmp_path / 'images.npy', images)
    (tmp_path / 'load.py').write_text(LOADER)
    command = [sys.executable, '-I', 'load.py', 'm.zip', 'images.npy', 'out.npy']
    ran = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), expected, atol=1e-6)
    assert ran.stdout.strip() == str(expected[0].argmax())


def test_a_program_is_for_all_platforms_and_any_batch(run, tmp_path):
    export.export(run, tmp_path / 'm.zip', output='logits', images=1)
    with zipfile.ZipFile(tmp_path / 'm.zip') as archive:
        program = jax.export.deserialize(bytearray(archive.read('model.stablehlo')))
        about = json.loads(archive.read('model.json'))
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    assert [str(d) for d in program.in_avals[0].shape] == ['batch', '8', '8', '1']
    assert program.in_avals[0].dtype == np.uint8
    assert about['output'] == {'dtype': 'float32', 'shape': ['batch', 10], 'values': 'logits'}


# Nothing of JAX either.
ONNX_LOADER = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession('m.onnx')
about = json.loads(session.get_modelmeta().custom_metadata_map['jaxcls'])
found = session.run(['probabilities'], {'image': np.load('images.npy')})[0]
"""
LITERT_LOADER = """
import json, sys, zipfile
import numpy as np
from ai_edge_litert.interpreter import Interpreter
about = json.loads(zipfile.ZipFile('m.tflite').read('model.json'))
run = Interpreter('m.tflite').get_signature_runner()
found = np.stack([run(image=image[None])['probabilities'][0] for image in np.load('images.npy')])
"""
SHOW = """
assert not [name for name in sys.modules if name.split('.')[0] in ('jaxcls', 'jax')]
np.save('out.npy', found)
print(json.dumps(about))
"""


@pytest.mark.parametrize('format, loader', [('onnx', ONNX_LOADER), ('tflite', LITERT_LOADER)])
def test_files_for_elsewhere_run_in_a_process_without_jax(
    format, loader, run, images, expected, tmp_path
):
    for package in export.FORMATS[format].packages:
        pytest.importorskip(package)
    result = export.export(run, tmp_path / f'm.{format}', format)
    assert result['max_difference'] < 1e-5
    np.save(tmp_path / 'images.npy', images)
    (tmp_path / 'load.py').write_text(loader + SHOW)
    command = [sys.executable, '-I', 'load.py']
    ran = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    np.testing.assert_allclose(np.load(tmp_path / 'out.npy'), expected, atol=1e-6)
    about = json.loads(ran.stdout)
    assert about['class_names'] == [str(i) for i in range(10)]
    assert about['input'] == {'dtype': 'uint8', 'shape': ['batch', 8, 8, 1]}


@pytest.mark.parametrize(
    'place, more, message',
    [
        ('m.onnx', {}, 'must end in .zip'),
        ('m.zip', {'format': 'tf'}, 'it must be one of stablehlo, onnx, tflite'),
        ('m.zip', {'output': 'classes'}, 'it must be one of probabilities, logits'),
        ('none/m.zip', {}, 'There is no directory'),
        ('there.zip', {}, 'exists already'),
    ],
)
def test_mistakes_are_named_before_the_work(tmp_path, place, more, message):
    (tmp_path / 'there.zip').write_text('mine')
    with pytest.raises(UserError, match=message):
        export.export('nowhere', tmp_path / place, **more)
    assert (tmp_path / 'there.zip').read_text() == 'mine'


@pytest.mark.parametrize('format', ['onnx', 'tflite'])
def test_a_run_in_int8_is_exported_as_stablehlo_alone(run, format, tmp_path, monkeypatch):
    for package in export.FORMATS[format].packages:
        pytest.importorskip(package)
    quantized = runs.open_run(run)
    c = quantized.experiment.config.copy_and_resolve_references().unlock()
    c.quantization.name = 'int8'
    experiment = quantized.experiment._replace(config=c)
    monkeypatch.setattr(runs, 'open_run', lambda *args: quantized._replace(experiment=experiment))
    with pytest.raises(UserError, match='name=int8, whose integers .* use --format=stablehlo'):
        export.export(run, tmp_path / f'run.{format}', format)


def test_a_file_that_differs_is_not_left(run, tmp_path, monkeypatch):
    known = export.FORMATS['stablehlo']

    def worse(path):
        return lambda images: known.load(path)(images) + 0.01

    monkeypatch.setitem(export.FORMATS, 'stablehlo', known._replace(load=worse))
    with pytest.raises(UserError, match='differs from the run by 0.01'):
        export.export(run, tmp_path / 'm.zip')
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'needs flatbuffers: pip install "jaxcls\[export\]"'):
        export.export('nowhere', tmp_path / 'm.zip')


def write(function, format, shape, tmp_path):
    """A file of a function that gives logits."""
    path = tmp_path / f'f{export.FORMATS[format].suffix}'
    export.FORMATS[format].write(function, shape, {'output': {'values': 'logits'}}, path)
    return path


def compare(function, format, shape, tmp_path, rtol=1e-5):
    """What a file gives beside what JAX does, for two sizes of batch."""
    for package in export.FORMATS[format].packages:
        pytest.importorskip(package)
    run = export.FORMATS[format].load(write(function, format, shape, tmp_path))
    for batch in (1, 5):
        images = np.random.default_rng(batch).integers(0, 256, (batch, *shape), np.uint8)
        expected = np.asarray(jax.jit(function)(images))
        np.testing.assert_allclose(run(images), expected, rtol, rtol * np.abs(expected).max())


def f32(x):
    return x.astype(jnp.float32) / 255 - 0.4


OPERATIONS = {
    'activations': lambda x: sum(
        f(f32(x)) for f in (jax.nn.elu, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jnp.tanh, jax.nn.relu6)
    ),
    'broadcasts': lambda x: jnp.concatenate(
        [f32(x), jnp.broadcast_to(jnp.arange(2.0), x.shape), jnp.ones_like(f32(x))], -1
    ),
    'even rows': lambda x: jax.lax.slice_in_dim(f32(x), 0, None, 2, 1),
    'one row': lambda x: jax.lax.index_in_dim(f32(x), 4, 1, keepdims=False),
    'pad': lambda x: jnp.pad(f32(x), ((0, 0), (1, 2), (0, 3), (0, 0))),
    'softmax': lambda x: jax.nn.softmax(f32(x).reshape(x.shape[0], -1)),
    'products': lambda x: jnp.einsum('bhwc,bkwc->bhk', f32(x), f32(x) ** 2),
    'statistics': lambda x: jax.lax.rsqrt(f32(x).var((1, 2)) + 1e-3) * jnp.max(f32(x), (1, 2)),
    'a choice': lambda x: jnp.where(f32(x) > 0.1, f32(x), -1.0),
    'average pool': lambda x: jax.lax.reduce_window(
        f32(x), 0.0, jax.lax.add, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 1), (0, 0))
    ),
    'max pool': lambda x: jax.lax.reduce_window(
        f32(x), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 1), (0, 0))
    ),
}  # fmt: skip


INDEXED = {
    'even rows': lambda x: f32(x)[:, ::2, 1::3],
    'one row': lambda x: f32(x)[:, 4],
    'negative pad': lambda x: jnp.pad(f32(x), ((0, 0), (1, 2), (0, 3), (0, 0)))[:, 2:-1, 1:],
}


@pytest.mark.parametrize('name', INDEXED)
def test_indexing_is_that_of_jax_in_onnx_and_refused_by_litert(name, tmp_path):
    compare(INDEXED[name], 'onnx', (9, 9, 2), tmp_path)
    pytest.importorskip('litert_converter')
    with pytest.raises(UserError, match=r'LiteRT cannot convert .* takes jax.lax.slice_in_dim'):
        write(INDEXED[name], 'tflite', (9, 9, 2), tmp_path)


@pytest.mark.parametrize('format', ['onnx', 'tflite'])
@pytest.mark.parametrize('name', OPERATIONS)
def test_operations_are_those_of_jax(name, format, tmp_path):
    compare(OPERATIONS[name], format, (9, 9, 2), tmp_path)


def test_an_operation_that_onnx_lacks_is_refused_by_name():
    pytest.importorskip('onnx')
    with pytest.raises(UserError, match="operation 'sort', which is not written as ONNX"):
        onnx_graph.convert(lambda x: jnp.sort(f32(x)), (4, 4, 1))


def network(name, shape, **fields):
    model = make_model(name, **fields)
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    )
    rng = np.random.default_rng(0)
    # Variances must be positive, and weights small enough for values to stay in range.
    draw = {'var': (1, 0.1), 'scale': (1, 0.1)}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(
            np.abs(rng.normal(*draw.get(path[-1].key, (0, np.prod(x.shape[:-1]) ** -0.5)), x.shape))
            if path[-1].key in draw
            else rng.normal(0, np.prod(x.shape[:-1], dtype=float) ** -0.5, x.shape)
        ),
        like,
    )
    predict = steps.make_predict(model, [0.5], [0.5])
    return lambda image: predict(variables, image)


@pytest.mark.parametrize('format', ['onnx', 'tflite'])
@pytest.mark.parametrize('name, shape', [('lenet_small', (8, 8, 1)), ('lenet5', (28, 28, 1))])
def test_networks_are_the_same(name, shape, format, tmp_path):
    compare(network(name, shape), format, shape, tmp_path, 1e-4)


def test_bfloat16_is_float32_in_onnx(tmp_path):
    predict = network('lenet_small', (8, 8, 1), dtype=jnp.bfloat16)
    compare(predict, 'onnx', (8, 8, 1), tmp_path, export.TOLERANCES['mixed'])


def test_a_run_whose_outputs_are_not_finite_is_not_exported(images):
    with pytest.raises(UserError, match='is not finite: did it diverge'):
        export._difference(lambda x: x / 0.0, lambda x: x, images)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['stablehlo', 'onnx', 'tflite'])
@pytest.mark.parametrize(
    'name, size',
    [
        ('airbench94', 32), ('alexnet_small', 32), ('convnext_tiny', 32), ('dbn', 8), ('densenet_40_12', 32),
        ('efficientnet_b0', 32), ('googlenet', 64), ('inception_v3', 96), ('lenet5_1998', 32),
        ('mobilenet_v2', 32), ('mobilenet_v3_small', 32), ('preact_resnet20', 32), ('resnet20', 32),
        ('resnet50d', 64), ('resnext50_32x4d', 64), ('se_resnet18', 32), ('vgg11_bn', 32), ('vit_ti16', 32),
    ],
)  # fmt: skip
def test_a_network_of_each_family_is_the_same_in_every_format(name, size, format, tmp_path):
    shape = (size, size, 1 if name in ('dbn', 'lenet5_1998') else 3)
    compare(network(name, shape), format, shape, tmp_path, 1e-3)
