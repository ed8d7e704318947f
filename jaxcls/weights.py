"""Trained weights from other libraries and for them: state dicts as named arrays, in files.

A family's rule table (`NAMES` in its file under models/) says what each of our modules is called
elsewhere. The same rows serve both directions, so what is read can be written back bit for bit.
"""

import contextlib
import functools
import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from jaxcls import download, registry
from jaxcls.errors import UserError
from jaxcls.models import WEIGHT_NAMES
from jaxcls.models.references import CONV, DENSE, SAME, Transform

Flat = dict[str, Any]  # 'params/stage1_block1/conv1/conv/kernel' -> array or shape


class Tensor(NamedTuple):
    """An array in a file, not read yet.

    Attributes:
      shape: as in the file.
      dtype: its NumPy dtype.
      read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


State = Mapping[str, Tensor]


class Weights(NamedTuple):
    """An opened source of weights.

    Attributes:
      state: arrays by their names there.
      normalization: (mean, std) per channel of the images that they were trained on, where it is known.
      class_names: of the head, where they are known.
    """

    state: State
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    class_names: tuple[str, ...] | None = None


def flatten(variables: Any) -> Flat:
    """Leaves of 'params' and 'batch_stats' by path, in the order of the tree."""
    return traverse_util.flatten_dict(dict(variables), sep='/')


def unflatten(flat: Flat) -> dict[str, Any]:
    """The tree of `flatten`, its empty collections included."""
    return {'params': {}, 'batch_stats': {}} | traverse_util.unflatten_dict(flat, sep='/')


# Reading


def read(source: str | Path) -> Weights:
    """Opens a safetensors file, a PyTorch state dict or a hub's repository, 'hf:OWNER/NAME[@REVISION]'.

    Only names, shapes and dtypes are read now. A PyTorch file is opened with `weights_only`: no code
    in it runs.

    Raises:
      UserError: nothing there, damaged, or in a format that is not one of these.
    """
    source = str(source)
    if source.startswith('hf:'):
        repository, _, revision = source.removeprefix('hf:').partition('@')
        weights = _safetensors(_download(repository, revision))
        return weights._replace(normalization=_published_normalization(repository, revision))
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f'No weights at {source!r}: expected a jaxcls workdir, a .safetensors file, a PyTorch '
            "state dict (.pth, .pt, .bin) or a hub's repository such as hf:timm/resnet50.a1_in1k."
        )
    if path.suffix == '.safetensors':
        return _safetensors(path)
    if path.suffix in ('.pth', '.pt', '.th', '.bin', '.tar'):
        return Weights(_torch(path))
    raise UserError(f'{path} is {path.suffix or "without suffix"}; expected .safetensors or .pth.')


_SAFETENSORS_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}  # fmt: skip


def _safetensors(path: Path) -> Weights:
    try:
        file = safetensors.safe_open(path, framework='numpy')
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f'{path} is damaged or no safetensors file: {error}. Get it again.'
        ) from None

    def tensor(name):
        part = file.get_slice(name)
        kind = part.get_dtype()
        if kind not in _SAFETENSORS_DTYPES:
            raise UserError(f'{name} in {path} is of type {kind}; expected floats or integers.')
        dtype = np.dtype(_SAFETENSORS_DTYPES[kind])
        return Tensor(tuple(part.get_shape()), dtype, lambda: read_(name, dtype))

    def read_(name, dtype):
        if dtype != ml_dtypes.bfloat16:
            return file.get_tensor(name)
        with safetensors.safe_open(path, framework='flax') as other:  # numpy's has no bfloat16
            return np.asarray(other.get_tensor(name))

    state = {name: tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = file.metadata() or {}
    names = json.loads(metadata.get('class_names', 'null'))
    return Weights(_unwrapped(state), _normalization(metadata), names and tuple(names))


def _normalization(known: Mapping[str, Any]):
    """(mean, std) out of the metadata that `write` leaves, or of a hub's description; else None."""
    try:
        pair = [json.loads(v) if isinstance(v, str) else v for v in (known['mean'], known['std'])]
        mean, std = (tuple(map(float, values)) for values in pair)
    except (KeyError, TypeError, ValueError):
        return None
    return mean, std


def _torch(path: Path) -> State:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is PyTorch's format, and PyTorch is not installed: pip install 'jaxcls[torch]', "
            'or save it as .safetensors where PyTorch is.'
        ) from None
    try:
        recent = zipfile.is_zipfile(path)  # PyTorch's older format cannot be mapped
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=recent)
    except Exception as error:  # zip, pickle and torch raise all kinds
        reason = 'it holds more than tensors, such as a whole model'
        if 'weights_only' not in str(error).lower():
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f'{path} cannot be read as a PyTorch state dict: {reason}. Save model.state_dict().'
        ) from None
    for key in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not (named and state and all(isinstance(v, torch.Tensor) for v in state.values())):
        raise UserError(f'{path} holds no state dict (names to tensors); save model.state_dict().')
    dtypes = {getattr(torch, name): name for name in _TORCH_DTYPES}

    def tensor(name, value):
        if value.dtype not in dtypes or value.layout != torch.strided or value.is_meta:
            raise UserError(
                f'{name} in {path} is a {value.layout} tensor of {value.dtype}; expected a plain one of '
                'floats or integers.'
            )
        dtype = np.dtype(dtypes[value.dtype])
        raw = value.detach().view(torch.uint16) if dtype == ml_dtypes.bfloat16 else value.detach()
        return Tensor(tuple(value.shape), dtype, lambda: raw.numpy().view(dtype))

    return _unwrapped({name: tensor(name, value) for name, value in state.items()})


_TORCH_DTYPES = (
    'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool',
)  # fmt: skip
# What trainers keep a state dict under, and what wrappers (parallel, compiled, Lightning) put before
# every name.
_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_PREFIXES = ('module.', '_orig_mod.', 'model.')


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return _unwrapped({name.removeprefix(prefix): leaf for name, leaf in state.items()})
    return state


def _download(repository: str, revision: str, file: str = 'model.safetensors') -> Path:
    """A file of a repository on the Hugging Face hub, cached; the SHA-256 of a large one is checked."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"hf:{repository} needs the hub's client: pip install 'jaxcls[hub]'."
        ) from None
    fetch = functools.partial(
        huggingface_hub.hf_hub_download, repository, file, revision=revision or None
    )
    try:
        path = Path(fetch(local_files_only=True))
    except HFValidationError as error:
        raise UserError(f'hf:{repository}: {error} Write it hf:OWNER/NAME.') from None
    except (LocalEntryNotFoundError, OSError):
        path = Path(_fetched(repository, file, fetch, huggingface_hub.constants.ENDPOINT))
    digest = path.resolve().name  # the cache names large files by their SHA-256
    if re.fullmatch('[0-9a-f]{64}', digest):
        with path.open('rb') as stream:
            found = hashlib.file_digest(stream, 'sha256').hexdigest()
        if found != digest:
            raise UserError(
                f'{path} is damaged: its SHA-256 is {found}. Delete it and start again.'
            )
    return path


def _fetched(repository: str, file: str, fetch: Callable[[], str], endpoint: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    reason = download.unreachable(endpoint)  # the client itself would try for half a minute
    if not reason:
        try:
            return fetch()
        except (HfHubHTTPError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
        f'hf:{repository} is not in the cache and cannot be downloaded from {endpoint}: {reason}. Check '
        f'the name, the network and HF_HOME (the cache), or download {file} by hand and give its path.'
    )


def _published_normalization(repository: str, revision: str):
    """What the repository's description (timm's config.json) says of the images; None if nothing."""
    try:
        known = json.loads(_download(repository, revision, 'config.json').read_text())
    except (UserError, OSError, ValueError):
        return None
    return _normalization(known.get('pretrained_cfg', known)) if isinstance(known, dict) else None


# Names


class Layout:
    """What a rule may ask about the network that it names.

    Attributes:
      model: the module, for its fields.
    """

    def __init__(self, model: nn.Module, paths: list[str]):
        self.model = model
        self._modules = {
            '/'.join(parts[:i])
            for parts in (p.split('/')[1:] for p in paths)
            for i in range(1, len(parts))
        }

    def has(self, module: str) -> bool:
        """Whether there is a module of that path."""
        return module in self._modules

    def rank(self, module: str) -> int:
        """The place, from 0, of a top-level module among those of its kind, such as all the blocks."""
        kind = re.sub(r'\d+', '#', module)
        same = [m for m in self._modules if '/' not in m and re.sub(r'\d+', '#', m) == kind]
        return sorted(same, key=_natural).index(module)


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', text)]


_LEAVES = {
    'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var',
}  # fmt: skip
_LAYOUTS = {('kernel', 4): CONV, ('kernel', 2): DENSE}


def names(
    model: nn.Module, paths: Mapping[str, Any], scheme: str
) -> dict[str, tuple[str, Transform]]:
    """Each of our leaves' name elsewhere, and how its array is laid out there.

    Args:
      paths: our leaves by path, with shapes.
      scheme: 'timm' or 'torchvision', a key of the family's NAMES.

    Raises:
      UserError: a leaf that the table has no row for.
    """
    rules = registry.lookup(_tables(model), scheme, 'naming scheme')
    layout = Layout(model, list(paths))
    found = {path: _rename(path, leaf, rules, layout) for path, leaf in paths.items()}
    missing = [path for path, name in found.items() if name is None]
    if missing:
        raise UserError(
            f'{type(model).__name__} with these fields has no counterpart in {scheme}: it has no name '
            f'for {_some(missing)}. Use the fields of the published network.'
        )
    return found


def _tables(model: nn.Module) -> Mapping[str, Any]:
    if type(model) not in WEIGHT_NAMES:
        known = ', '.join(family.__name__ for family in WEIGHT_NAMES)
        raise UserError(
            f'No other library has a {type(model).__name__}; weights are exchanged for: {known}.'
        )
    return WEIGHT_NAMES[type(model)]


def _rename(path: str, leaf: Any, rules, layout: Layout) -> tuple[str, Transform] | None:
    module, _, kind = path.partition('/')[2].rpartition('/')
    usual = _LAYOUTS.get((kind, len(leaf.shape)), SAME)
    for pattern, rule in rules:
        for text, suffix in ((module, f'.{_LEAVES.get(kind, kind)}'), (path.partition('/')[2], '')):
            match = re.fullmatch(pattern, text)
            if match:
                groups = (int(g) if g and g.isdigit() else g for g in match.groups())
                named = rule(layout, *groups)
                name, special = named if isinstance(named, tuple) else (named, usual)
                return name + suffix, special if kind == 'kernel' or not suffix else usual
    return None


# Converting

_HEAD = re.compile(r'(.*/)?head/.*')
# What only training uses: heads in the middle of GoogLeNet and Inception.
_AUXILIARY = re.compile(r'\w+/aux\d*(_\w+)?/.*')
# Their names there, and the counters that PyTorch keeps beside batch statistics.
_UNUSED = re.compile(r'(.*\.)?num_batches_tracked|(aux\d|AuxLogits)\..*')
_POSITIONS = re.compile(r'.*position_embedding')


class Converted(NamedTuple):
    """What `convert` found.

    Attributes:
      arrays: NumPy arrays by path, of the model's shapes and dtypes.
      fresh: paths of the leaves that keep their initial values: a new head.
    """

    arrays: Flat
    fresh: list[str]


def convert(model: nn.Module, like: Flat, state: State, new_head: bool = False) -> Converted:
    """Finds our leaves in a state dict, checks all of them and only then reads them.

    A head stays fresh where the weights have one for another number of classes, or none.
    Position embeddings of another image size are interpolated.

    Args:
      like: our leaves by path, with shapes and dtypes.
      state: of `read`, in our own names or those of one of the family's schemes.
      new_head: leave the head fresh even where it would fit.

    Raises:
      UserError: names, shapes or dtypes that do not match; the message lists both sides.
    """
    own = bool(set(like) & set(state))
    table = {path: (path, SAME) for path in like} if own else _closest(model, like, state)

    def is_fresh(path):
        name, transform = table[path]
        if name not in state:
            return bool(_AUXILIARY.fullmatch(path) or _HEAD.fullmatch(path))
        return bool(_HEAD.fullmatch(path)) and (
            new_head or _other_classes(like[path], state[name], transform)
        )

    fresh = [path for path in like if is_fresh(path)]
    wanted = {path: leaf for path, leaf in like.items() if path not in fresh}
    _check(wanted, table, state, {table[path][0] for path in fresh})
    return Converted({p: _read(leaf, *table[p], state) for p, leaf in wanted.items()}, fresh)


def _other_classes(leaf: Any, tensor: Tensor, transform: Transform) -> bool:
    """Whether a leaf of a head, [..., K], differs in the number of classes and in nothing else."""
    if len(tensor.shape) != len(_shape_there(leaf, transform)):
        return False
    theirs = transform.to_ours(np.broadcast_to(np.zeros((), np.float32), tensor.shape), leaf.shape)
    return theirs.shape[:-1] == leaf.shape[:-1] and theirs.shape[-1] != leaf.shape[-1]


def _shape_there(leaf: Any, transform: Transform) -> tuple[int, ...]:
    return transform.to_theirs(np.broadcast_to(np.zeros((), np.float32), leaf.shape)).shape


def _read(leaf: Any, name: str, transform: Transform, state: State) -> np.ndarray:
    array = state[name].read()
    if array.shape != _shape_there(leaf, transform):
        array = resize_positions(array, leaf.shape[1])
    return np.ascontiguousarray(transform.to_ours(array, leaf.shape)).astype(leaf.dtype)


def resize_positions(embedding: np.ndarray, count: int) -> np.ndarray:
    """Interpolates position embeddings [1, 1 + n * n, D] to [1, count, D], count = 1 + m * m.

    Bicubic over the grid, the class token's kept (Dosovitskiy 2020, section 3.2).
    """
    old, new = (math.isqrt(n - 1) for n in (embedding.shape[1], count))
    grid = embedding[:, 1:].reshape(1, old, old, -1).astype(np.float32)
    grid = np.asarray(jax.image.resize(grid, (1, new, new, grid.shape[-1]), 'bicubic'))
    grid = grid.reshape(1, new * new, -1)
    return np.concatenate([embedding[:, :1].astype(np.float32), grid], axis=1)


def _is_grid(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def _closest(model: nn.Module, like: Flat, state: State) -> dict[str, tuple[str, Transform]]:
    """The names of the scheme that shares most of them with the state dict."""
    tables, reasons = [], []
    for scheme in _tables(model):
        try:
            tables.append(names(model, like, scheme))
        except UserError as error:
            reasons.append(str(error))
    if not tables:
        raise UserError('\n'.join(reasons))
    return max(tables, key=lambda table: len({name for name, _ in table.values()} & set(state)))


def _check(wanted: Flat, table, state: State, used: set[str]):
    """Raises a UserError that lists what is missing on either side, and what differs."""
    lacking, wrong = [], []
    for path, leaf in wanted.items():
        name, transform = table[path]
        if name not in state:
            lacking.append(path if name == path else f'{path} ({name})')
            continue
        ours, theirs = _shape_there(leaf, transform), state[name].shape
        grids = _POSITIONS.fullmatch(path) and _is_grid(ours) and _is_grid(theirs)
        if ours != theirs and not (grids and ours[2] == theirs[2]):
            wrong.append(f'{name}: model {list(ours)}, weights {list(theirs)}')
        elif not jax.numpy.issubdtype(state[name].dtype, jax.numpy.floating):
            wrong.append(f'{name}: model {leaf.dtype}, weights {state[name].dtype}')
    known = used | {table[path][0] for path in wanted}
    surplus = [name for name in state if name not in known and not _UNUSED.fullmatch(name)]
    sides = {
        'in the model and not in the weights': lacking,
        'in the weights and not in the model': surplus,
        'of another shape or type': wrong,
    }
    problems = [f'{len(v)} {what}: {_some(v)}' for what, v in sides.items() if v]
    if problems:
        raise UserError(
            'These weights do not fit the model:\n  '
            + '\n  '.join(problems)
            + '\nSet config.model.name and its fields to those of the network that was trained.'
        )


def is_head(path: str) -> bool:
    """Whether a leaf belongs to the last layer, the one that predictions are made with."""
    return bool(_HEAD.fullmatch(path)) and not is_auxiliary(path)


def is_auxiliary(path: str) -> bool:
    """Whether a leaf belongs to a head that only training uses."""
    return bool(_AUXILIARY.fullmatch(path))


def _some(items: list[str], limit: int = 8) -> str:
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + more


# Writing


def state_dict(model: nn.Module, variables: Any, scheme: str) -> dict[str, np.ndarray]:
    """A model's variables in another library's names and layouts; 'jaxcls' keeps ours.

    Raises:
      UserError: the scheme does not know the family or one of its leaves.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    if scheme == 'jaxcls':
        return flat
    table = names(model, flat, scheme)
    return {name: change.to_theirs(flat[path]) for path, (name, change) in table.items()}


def write(path: str | Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]):
    """Writes a safetensors file, whole or not at all.

    Raises:
      UserError: there is a file of that name, or it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f'{path} exists; nothing is overwritten. Choose another name.')
    partial = path.with_name(f'.{path.name}.partial')
    try:
        arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
        safetensors.numpy.save_file(arrays, partial, dict(metadata))
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f'{path} cannot be written: {error}.') from None
