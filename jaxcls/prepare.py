"""TFDS data sets on disk: found there, or prepared from their original archives.

MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and CIFAR-100 are prepared without TensorFlow. Where there is
no network TFDS blocks for minutes; here that is one message within seconds.
"""

import contextlib
import difflib
import functools
import gzip
import importlib.util
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxcls.download import Archive, fetch, unreachable
from jaxcls.errors import UserError


class Original(NamedTuple):
    """What archives hold.

    Attributes:
      images: uint8 [N, H, W, C] of each split.
      labels: uint8 [N] of each label feature of each split.
      names: the class names of each label feature whose names TFDS does not know itself.
    """

    images: dict[str, np.ndarray]
    labels: dict[str, dict[str, np.ndarray]]
    names: dict[str, list[str]]


def prepared(name: str, data_dir: Path):
    """Returns a TFDS builder whose data are on disk, after preparing them if need be.

    Args:
      name: of TFDS: 'cifar10', 'name/config', 'name:version'. Without a version the newest on disk.
      data_dir: the directory of all TFDS data sets.

    Raises:
      UserError: unknown name, no network, a wrong archive, or TensorFlow is needed and missing.
    """
    with _quiet():
        builder = _find(name, data_dir)
        if not builder.is_prepared():
            _prepare(builder, name, data_dir)
            builder = _find(name, data_dir)
    return builder


def find(name: str, data_dir: Path):
    """The TFDS builder of a data set, prepared or not; raises as `prepared` does."""
    with _quiet():
        return _find(name, data_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the warnings, notices and progress bars of TFDS to itself."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _find(name: str, data_dir: Path):
    """The builder of what is on disk, else of TFDS's code; some of its code needs TensorFlow."""
    import tensorflow_datasets as tfds
    from google.protobuf import json_format
    from tensorflow_datasets.core import read_only_builder, registered

    if ':' in name.split('/')[0] and not name.split(':')[1][:1].isdigit():
        raise UserError(f'tfds:{name} is a community data set of TFDS, which jaxcls does not read.')
    try:
        with contextlib.suppress(registered.DatasetNotFoundError), _own_features_only(data_dir):
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
        return tfds.builder(name, data_dir=data_dir)
    except registered.DatasetNotFoundError as e:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split('/')[0], known, n=3)
        hint = f'Did you mean {" or ".join(close)}? ' if close else ''
        raise UserError(
            f'Unknown TFDS data set {name!r}: neither TFDS knows it nor is it in {data_dir}. {hint}'
            'All names: https://www.tensorflow.org/datasets/catalog/overview'
        ) from e
    except ImportError as e:
        raise _needs_tensorflow(name, data_dir) from e
    except (AssertionError, ValueError, OSError, json_format.ParseError) as e:
        raise UserError(f'TFDS cannot open {name!r}: {e}') from e


@contextlib.contextmanager
def _own_features_only(data_dir: Path) -> Iterator[None]:
    """Has TFDS import none of the classes that a features.json names, but its own.

    It would import a module of any name, which may be a file of the data set itself.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    method, found = vars(connector)['cls_from_name'], connector.cls_from_name

    def own(name: str):
        if not str(name).startswith('tensorflow_datasets.'):
            raise UserError(
                f'A features.json in {data_dir} names the class {name!r}, expected one of '
                'tensorflow_datasets. It would be run as code: get the data set from whom you trust.'
            )
        return found(name)

    connector.cls_from_name = staticmethod(own)
    try:
        yield
    finally:
        connector.cls_from_name = method


def _needs_tensorflow(name: str, data_dir: Path) -> UserError:
    return UserError(
        f'TFDS data set {name!r} is not prepared in {data_dir}, and preparing it needs TensorFlow, '
        "which is not installed. Run pip install 'jaxcls[tensorflow]' once and this command "
        'again, or prepare it on another machine with\n'
        f'  tfds build {name} --data_dir={data_dir}\n'
        'and copy it: reading needs no TensorFlow.'
    )


def _prepare(builder, name: str, data_dir: Path):
    read = _READERS.get(builder.name)
    tensorflow = importlib.util.find_spec('tensorflow') is not None
    if not read and not tensorflow:
        raise _needs_tensorflow(name, data_dir)
    downloads = data_dir / 'downloads'
    archives = _archives(builder)
    missing = [a for a in archives if not _place(downloads, builder.name, a).exists()]
    if missing and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        reason = unreachable(missing[0].url)
        if reason:
            raise UserError(_offline_message(builder, data_dir, missing, reason))
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / f'.{builder.name}.lock'):
            if builder.is_prepared():  # by another process, meanwhile
                return
            if read:
                paths = {a.name: _place(downloads, builder.name, a) for a in archives}
                fetch([(a, paths[a.name]) for a in archives])
                _write(builder, read(paths))
            else:
                _prepare_with_tensorflow(builder)
    except OSError as e:
        raise UserError(f'Cannot prepare {name!r} in {data_dir}: {e}') from e


def _archives(builder) -> list[Archive]:
    infos = builder.url_infos or {}
    return [Archive(url, i.filename, int(i.size), i.checksum) for url, i in infos.items()]


def _place(downloads: Path, name: str, archive: Archive) -> Path:
    """Where an archive is: manual/NAME/FILE (MNIST's relatives share file names) or manual/FILE."""
    own = downloads / 'manual' / name / archive.name
    shared = downloads / 'manual' / archive.name
    return shared if shared.exists() and not own.exists() else own


def _offline_message(builder, data_dir: Path, missing: list[Archive], reason: str) -> str:
    host = urlsplit(missing[0].url).hostname
    exists = '' if data_dir.exists() else ', a directory that does not exist'
    here = data_dir / builder.name
    others = sorted(str(p.parent.relative_to(data_dir)) for p in here.glob('**/features.json'))
    found = f' (prepared there: {", ".join(others)})' if others else ''
    folder = data_dir / 'downloads' / 'manual'
    files = '\n'.join(f'  {a.url} ({a.size:,} bytes)\n    as {folder / a.name}' for a in missing)
    return (
        f'TFDS data set {builder.name!r} is not prepared in {data_dir}{exists}: no '
        f'{builder.data_dir}{found}. It cannot be downloaded either: {host}: {reason}.\n'
        'If you have it elsewhere, set --config.data.dir or $TFDS_DATA_DIR. To prepare it here by '
        f'hand, place\n{files}\nand run this again. '
        'Without any download: python -m jaxcls.main --config.data.name=digits'
    )


def _write(builder, original: Original):
    """Writes the directory that TFDS itself would, as array_record."""
    features = builder.info.features
    for key, names in original.names.items():
        features[key].names = names
    columns = TextColumn('Preparing {task.description}'), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = sum(len(images) for images in original.images.values())
        task = progress.add_task(builder.name, total=total)
        # The method that every TFDS builder defines; this builder's own would need TensorFlow.
        builder._split_generators = lambda _: {
            split: _examples(features, split, original, lambda: progress.advance(task))
            for split in original.images
        }
        _download_and_prepare(builder)


def _examples(features, split: str, original: Original, advance: Callable[[], Any]):
    """(key, example) pairs; TFDS shuffles by the key, which is the one that its own code uses."""
    for i, image in enumerate(original.images[split]):
        # TFDS has Pillow encode Pillow's images, TensorFlow encode arrays.
        example = {'image': Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)}
        example |= {key: int(labels[i]) for key, labels in original.labels[split].items()}
        if 'id' in features:
            example['id'] = f'{split}_{i:05d}'
        advance()
        yield i, example


def _download_and_prepare(builder):
    """Writes beside the final directory, then renames: broken off, nothing is left."""
    import tensorflow_datasets as tfds

    directory, downloads = Path(builder.data_dir), Path(builder.data_dir_root, 'downloads')
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config, file_format='array_record')
    finally:
        for parent in (directory.parent, downloads / 'extracted'):
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if empty


def _prepare_with_tensorflow(builder):
    try:
        _download_and_prepare(builder)
    except Exception as e:  # builders raise all kinds
        raise UserError(f'TFDS could not prepare {builder.info.full_name}: {e}') from e


def _read_mnist(paths: Mapping[str, Path]) -> Original:
    images, labels = {}, {}
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        images[split] = _idx(paths[f'{prefix}-images-idx3-ubyte.gz'])[..., None]
        labels[split] = {'label': _idx(paths[f'{prefix}-labels-idx1-ubyte.gz'])}
    return Original(images, labels, {})


def _idx(path: Path) -> np.ndarray:
    """IDX: two zeros, the type (8: uint8), the rank, the shape as big-endian int32, the data."""
    with _readable(path), gzip.open(path) as file:
        data = _limited(file, path).read()
        rank = data[3]
        shape = np.frombuffer(data, '>i4', count=rank, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
UNPACKED = 2**28  # bytes; of the archives here CIFAR's are the largest, with 186 million


def unpack(path: Path) -> dict[str, bytes]:
    """The files of a .tar.gz, by their names without directories. Nothing is written to disk.

    Raises:
      UserError: damaged, more than UNPACKED bytes, or a member that is neither a plain file nor a
        directory below the archive's own, which is stricter than `tarfile`'s filter 'data'.
    """
    content = {}
    with (
        _readable(path),
        gzip.open(path) as file,
        tarfile.open(fileobj=_limited(file, path), mode='r|') as tar,
    ):
        for member in tar:
            parts = PurePosixPath(member.name.replace('\\', '/')).parts
            inside = not {'..', '/'} & set(parts) and member.name[1:2] != ':'
            if not inside or member.type not in _PLAIN:
                raise ValueError(f'{member.name!r} is no plain file inside of it')
            if not member.isdir():
                content[parts[-1]] = tar.extractfile(member).read()
    return content


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, IndexError) as e:
        raise UserError(f'{path} cannot be unpacked: {e}. Delete it and get it again.') from e


def _limited(file, path: Path) -> SimpleNamespace:
    """A file that no more than UNPACKED bytes can be read from."""
    left = UNPACKED

    def read(size: int = -1) -> bytes:
        nonlocal left
        data = file.read(left + 1 if size < 0 else min(size, left + 1))
        left -= len(data)
        if left < 0:
            raise UserError(
                f'{path} has more than {UNPACKED:,} bytes when unpacked: it is not what its name says. '
                'Delete it and get it again.'
            )
        return data

    return SimpleNamespace(read=read)


def _read_cifar(
    split_files: Mapping[str, list[str]], name_files: Mapping[str, str], paths: Mapping[str, Path]
) -> Original:
    """A row is one byte for each label feature, in the order of `name_files`, and a CHW image."""
    (path,) = paths.values()
    content = unpack(path)
    images, labels = {}, {}
    for split, files in split_files.items():
        rows = np.frombuffer(b''.join(content[file] for file in files), np.uint8)
        rows = rows.reshape(-1, len(name_files) + 3 * 32 * 32)
        images[split] = rows[:, len(name_files) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[split] = {key: rows[:, i] for i, key in enumerate(name_files)}
    names = {key: content[file].decode().split() for key, file in name_files.items()}
    return Original(images, labels, names)


_READERS: dict[str, Callable[[Mapping[str, Path]], Original]] = {
    'mnist': _read_mnist,
    'fashion_mnist': _read_mnist,
    'kmnist': _read_mnist,
    'cifar10': functools.partial(
        _read_cifar,
        {'train': [f'data_batch_{i}.bin' for i in range(1, 6)], 'test': ['test_batch.bin']},
        {'label': 'batches.meta.txt'},
    ),
    'cifar100': functools.partial(
        _read_cifar,
        {'train': ['train.bin'], 'test': ['test.bin']},
        {'coarse_label': 'coarse_label_names.txt', 'label': 'fine_label_names.txt'},
    ),
}
