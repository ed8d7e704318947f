"""Files of weights: safetensors, PyTorch's state dicts, repositories on the Hugging Face hub.

Opening one reads names, shapes and dtypes; an array is read when it is asked for.
"""

import contextlib
import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxcls import download
from jaxcls.errors import UserError


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
    if not _is_file(path):
        raise UserError(
            f'No weights at {source!r}: expected a jaxcls workdir, a .safetensors file, a PyTorch '
            "state dict (.pth, .pt, .bin) or a hub's repository such as hf:timm/resnet50.a1_in1k."
        )
    if path.suffix == '.safetensors':
        return _safetensors(path)
    if path.suffix in ('.pth', '.pt', '.th', '.bin', '.tar'):
        return Weights(_torch(path))
    raise UserError(f'{path} is {path.suffix or "without suffix"}; expected .safetensors or .pth.')


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a directory that may not be read
        return False


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
            raise UserError(
                f'{name} in {path} is of type {kind}; expected floats or integers. Convert it.'
            )
        dtype = np.dtype(_SAFETENSORS_DTYPES[kind])
        return Tensor(tuple(part.get_shape()), dtype, lambda: read_(name, dtype))

    def read_(name, dtype):
        if dtype != ml_dtypes.bfloat16:
            return file.get_tensor(name)
        with safetensors.safe_open(path, framework='flax') as other:  # numpy's has no bfloat16
            return np.asarray(other.get_tensor(name))

    state = {name: tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = file.metadata() or {}
    return Weights(_unwrapped(state), _normalization(metadata), _class_names(metadata))


def _normalization(known: Mapping[str, Any]):
    """(mean, std) out of the metadata that `write` leaves, or of a hub's description; else None."""
    try:
        pair = [json.loads(v) if isinstance(v, str) else v for v in (known['mean'], known['std'])]
        mean, std = (tuple(map(float, values)) for values in pair)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    return mean, std


def _class_names(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Those that `write` was given; None of a file whose field of this name is something else."""
    try:
        return tuple(map(str, json.loads(metadata['class_names'])))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


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
    except (UserError, OSError, ValueError, RecursionError):
        return None
    return _normalization(known.get('pretrained_cfg', known)) if isinstance(known, dict) else None


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
