"""Weights in files and in other libraries' names: there and back, and what does not fit."""

import hashlib

import jax
import numpy as np
import optax
import pytest

from jaxcls import weight_files, weights
from jaxcls.errors import UserError
from jaxcls.models import make_model
from parity import state_of


def model_and_state(dtype=np.float32, **fields):
    model = make_model('resnet18', num_classes=3, num_filters=4, stage_sizes=(1, 1), **fields)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    )
    like = weights.flatten(shapes)
    rng = np.random.default_rng(0)
    values = {k: rng.standard_normal(v.shape).astype(dtype) for k, v in like.items()}
    return model, like, weights.state_dict(model, weights.unflatten(values), 'torchvision')


def test_there_and_back_is_exact_in_memory_and_in_a_file(tmp_path):
    model, like, there = model_and_state()
    weight_files.write(tmp_path / 'a.safetensors', there, {})
    found = weights.convert(model, like, weight_files.read(tmp_path / 'a.safetensors').state)
    again = weights.state_dict(model, weights.unflatten(found.arrays), 'timm')
    assert again.keys() == there.keys()
    for name, array in there.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_half_precision_widens_exactly(tmp_path):
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        model, like, there = model_and_state(dtype)
        path = tmp_path / f'{np.dtype(dtype)}.safetensors'
        weight_files.write(path, there, {})
        found = weights.convert(model, like, weight_files.read(path).state).arrays
        kernel = found['params/head/kernel']
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, there['fc.weight'].T.astype(np.float32))


def test_a_mismatch_lists_both_sides():
    model, like, there = model_and_state()
    del there['bn1.weight']
    there['layer9.conv.weight'] = np.zeros(3, np.float32)
    there['conv1.weight'] = np.zeros((4, 3, 3, 3), np.float32)
    there['bn1.bias'] = np.zeros(4, np.int32)
    with pytest.raises(UserError) as caught:
        weights.convert(model, like, state_of(there))
    message = str(caught.value)
    assert '1 in the model and not in the weights: params/stem/norm/scale (bn1.weight)' in message
    assert '1 in the weights and not in the model: layer9.conv.weight' in message
    assert 'conv1.weight: model [4, 3, 7, 7], weights [4, 3, 3, 3]' in message
    assert 'bn1.bias: model float32, weights int32' in message


@pytest.mark.parametrize('shape', [(9, 99), (3, 99)])
def test_a_head_of_another_width_is_no_new_head(shape):
    model, like, there = model_and_state()
    there['fc.weight'] = np.zeros(shape, np.float32)
    there['fc.bias'] = np.zeros(shape[0], np.float32)
    with pytest.raises(UserError, match=r'fc.weight: model \[3, 8\], weights \[\d, 99\]'):
        weights.convert(model, like, state_of(there))


def test_weights_without_a_head_give_a_fresh_one():
    model, like, there = model_and_state()
    del there['fc.weight'], there['fc.bias']
    fresh = weights.convert(model, like, state_of(there)).fresh
    assert fresh == ['params/head/bias', 'params/head/kernel']


def test_a_network_without_counterpart_says_so():
    model = make_model('resnet20', stage_sizes=(1, 1), squeeze=4)
    like = weights.flatten(
        jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)))
    )
    with pytest.raises(UserError, match=r'no counterpart in torchvision.*stage1_block1/se/expand'):
        weights.names(model, like, 'torchvision')
    with pytest.raises(UserError, match='No other library has a MLP'):
        weights.names(make_model('mlp'), {}, 'timm')


def test_pytorch_files_are_read_without_running_code_in_them(tmp_path):
    torch = pytest.importorskip('torch')
    model, like, there = model_and_state()
    tensors = {f'module.{k}': torch.from_numpy(np.ascontiguousarray(v)) for k, v in there.items()}
    tensors['module.bn1.num_batches_tracked'] = torch.tensor(3)
    torch.save({'state_dict': tensors, 'epoch': 3}, tmp_path / 'a.pth')
    found = weights.convert(model, like, weight_files.read(tmp_path / 'a.pth').state).arrays
    np.testing.assert_array_equal(found['params/head/kernel'], there['fc.weight'].T)
    torch.save({'w': torch.ones(2, dtype=torch.bfloat16)}, tmp_path / 'b.pt')
    assert weight_files.read(tmp_path / 'b.pt').state['w'].read().astype(np.float32).tolist() == [
        1,
        1,
    ]
    parameters = {
        f'_orig_mod.model.{k}': torch.nn.Parameter(v) for k, v in tensors.items() if 'num' not in k
    }
    torch.save(parameters, tmp_path / 'd.pt')
    assert 'fc.weight' in {
        k.removeprefix('module.') for k in weight_files.read(tmp_path / 'd.pt').state
    }
    assert weight_files.read(tmp_path / 'd.pt').state['fc.weight'].read().shape == (3, 8)
    for i, wrong in enumerate(
        ({1: torch.ones(2)}, {'w': torch.ones(2, dtype=torch.complex64)}, {})
    ):
        torch.save(wrong, tmp_path / f'wrong{i}.pt')
        with pytest.raises(UserError):
            weight_files.read(tmp_path / f'wrong{i}.pt')
    torch.save(optax.sgd, tmp_path / 'c.pth')
    with pytest.raises(UserError, match='cannot be read as a PyTorch state dict'):
        weight_files.read(tmp_path / 'c.pth')


def test_fields_of_the_metadata_that_mean_something_else_are_not_taken_for_ours(tmp_path):
    other = {'class_names': 'cat, dog', 'mean': 'of all pixels', 'std': '1'}
    weight_files.write(tmp_path / 'a.safetensors', {'w': np.ones(2, np.float32)}, other)
    found = weight_files.read(tmp_path / 'a.safetensors')
    assert found.normalization is None and found.class_names is None
    assert found.state['w'].read().tolist() == [1, 1]


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.safetensors', b'', 'is damaged'),
        ('a.safetensors', b'\x08\0\0\0\0\0\0\0{"a":1}x', 'is damaged'),
        ('a.h5', b'x', 'expected .safetensors or .pth'),
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        weight_files.read(tmp_path / name)


class Hub:
    """A cache like huggingface_hub's: files named by their SHA-256, links by their names."""

    def __init__(self, root, **contents):
        self.root = root
        for name, content in contents.items():
            blob = root / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (root / name.replace('_', '.')).symlink_to(blob)

    def __call__(self, repository, filename, **_):
        assert repository == 'timm/net'
        return str(self.root / filename)


def test_a_hubs_weights_are_checked_against_their_digest_and_bring_their_normalisation(
    tmp_path, monkeypatch
):
    hub = pytest.importorskip('huggingface_hub')
    model, like, there = model_and_state()
    weight_files.write(tmp_path / 'a.safetensors', there, {})
    content = (tmp_path / 'a.safetensors').read_bytes()
    config = b'{"pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}}'
    files = Hub(tmp_path, model_safetensors=content, config_json=config)
    monkeypatch.setattr(hub, 'hf_hub_download', files)
    found = weight_files.read('hf:timm/net')
    assert found.normalization == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert weights.convert(model, like, found.state).arrays.keys() == like.keys()
    blob = (tmp_path / 'model.safetensors').resolve()
    blob.write_bytes(content[:-1] + b'\x01')
    with pytest.raises(UserError, match='is damaged: its SHA-256'):
        weight_files.read('hf:timm/net')


def test_heads_in_the_middle_follow_the_number_of_classes_too():
    model = make_model('googlenet', num_classes=3, width=0.06, stem='small')
    other = make_model('googlenet', num_classes=7, width=0.06, stem='small')
    like, theirs = (
        weights.flatten(
            jax.eval_shape(
                lambda m=m: m.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
            )
        )
        for m in (model, other)
    )
    arrays = {k: np.ones(v.shape, v.dtype) for k, v in theirs.items()}
    there = weights.state_dict(other, weights.unflatten(arrays), 'torchvision')
    fresh = weights.convert(model, like, state_of(there)).fresh
    assert {path.rpartition('/')[0] for path in fresh} == {
        'params/aux1/head', 'params/aux2/head', 'params/head',
    }  # fmt: skip
    without = {k: v for k, v in there.items() if not k.startswith('aux')}
    fresh = weights.convert(model, like, state_of(without)).fresh
    assert {path.split('/')[1] for path in fresh} == {'aux1', 'aux2', 'head'}


def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path, monkeypatch):
    pytest.importorskip('huggingface_hub')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(
        UserError, match=r'hf:timm/net is not in the cache .*127.0.0.1:9: .*refused'
    ):
        weight_files.read('hf:timm/net')
    with pytest.raises(UserError, match='Write it hf:OWNER/NAME'):
        weight_files.read('hf:a/b/c')
