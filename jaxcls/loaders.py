"""Loaders of data sets: from TFDS, a folder of images, an npz file, or scikit-learn's digits."""

import functools
import hashlib
import importlib.util
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxcls.errors import UserError
from jaxcls.sources import ArraySource, FileSource, RecordSource

SPLIT_DIRECTORIES = ('train', 'val', 'valid', 'validation', 'test')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif')


class Dataset(NamedTuple):
    """What a loader returns.

    Attributes:
      sizes: the number of examples of each split.
      open: `split -> source`.
      class_names: [K].
      shape: (H, W, C) of all images; H = W = 0 where sizes vary.
      boxes: `split -> float32 [N, 4]`, where the object is: top, left, bottom, right, as shares of the
        image's height and width; None where the data set has none.
    """

    sizes: dict[str, int]
    open: Callable[[str], Any]
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    boxes: Callable[[str], np.ndarray] | None = None


def digest(parts: Iterable[Any]) -> str:
    """32 hex digits that change when any of the parts' representations does."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(f'{part!r}\n'.encode())
    return hashed.hexdigest()


def data_root(data_dir: str = '') -> Path:
    """The directory of the TFDS data sets."""
    root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return _absolute(root)


def _absolute(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as e:
        raise UserError(f'{path}: {e} Write the path in full.') from None


def tfds(location: str, data_dir: str, seed: int) -> Dataset:
    """A TFDS data set of image classification, prepared as array_record or tfrecord."""
    from jaxcls.prepare import prepared

    del seed  # the splits of TFDS are fixed
    return _from_info(location, prepared(location, data_root(data_dir)).info)


def known_tfds(location: str, data_dir: str) -> Dataset:
    """A TFDS data set as far as TFDS knows it: where it is not prepared, without splits."""
    from jaxcls.prepare import find

    return _from_info(location, find(location, data_root(data_dir)).info)


def _from_info(location: str, info) -> Dataset:
    keys = _image_and_label(location, info)
    image, label = (info.features[key] for key in keys)
    format = info.file_format.value if info.file_format else 'tfrecord'
    still = len(image.shape) == 3 and np.dtype(image.np_dtype).itemsize <= 2
    if not still or format not in ('array_record', 'tfrecord'):
        raise UserError(
            f'TFDS data set {location!r} holds {image} as {format}, expected images [H, W, C] of 8 '
            'or 16 bits as array_record or tfrecord. Prepare it with file_format="array_record".'
        )
    height, width, channels = image.shape
    size = (height, width) if height and width else (0, 0)
    shape = (*size, channels if channels in (1, 3, 4) else 3)

    def open_split(split: str) -> RecordSource:
        paths = info.splits[split].filepaths
        ends = tuple(np.cumsum(info.splits[split].shard_lengths).tolist())
        content = _content(Path(info.data_dir), [path.name for path in paths])
        files = tuple(str(path) for path in paths)
        return RecordSource(format, files, ends, keys, label.num_classes, content)

    def read_boxes(split: str) -> np.ndarray:
        source = open_split(split)
        return np.float32([source.box(i, box) for i in range(len(source))]).reshape(-1, 4)

    sizes = {name: split.num_examples for name, split in info.splits.items()}
    box = _box_feature(info)
    return Dataset(sizes, open_split, tuple(label.names), shape, read_boxes if box else None)


def _box_feature(info) -> str:
    """The name, in records, of the feature that holds the box or the boxes of an image; '' is none."""
    from tensorflow_datasets import features as kinds

    for key, feature in info.features.items():
        inner = dict(getattr(getattr(feature, 'feature', None), 'items', dict)())
        for path, kind in (
            (key, feature),
            *((f'{key}/{name}', item) for name, item in inner.items()),
        ):
            if isinstance(kind, kinds.BBoxFeature):
                return path
    return ''


def _image_and_label(location: str, info) -> tuple[str, str]:
    """The features to classify: those supervised, else the only ones of their kind."""
    from tensorflow_datasets import features as kinds

    features = dict(info.features.items()) if isinstance(info.features, kinds.FeaturesDict) else {}
    supervised = info.supervised_keys or ()
    found = []
    for kind in (kinds.Image, kinds.ClassLabel):
        keys = [key for key, feature in features.items() if isinstance(feature, kind)]
        keys = [key for key in keys if key in supervised] or keys
        if len(keys) != 1:
            listed = ', '.join(f'{k} ({type(f).__name__})' for k, f in sorted(features.items()))
            raise UserError(
                f'TFDS data set {location!r} is not for image classification: expected one Image '
                f'and one ClassLabel to supervise, got {listed or info.features}.'
            )
        found.append(keys[0])
    return found[0], found[1]


def _content(root: Path, names: Sequence[str]) -> str:
    """A digest of the names, sizes and modification times of files."""
    try:
        stats = [(name, (root / name).stat()) for name in names]
    except FileNotFoundError as e:
        raise UserError(f'{e.filename} is missing: the data set is incomplete.') from e
    return digest((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def digits(location: str, data_dir: str, seed: int) -> Dataset:
    """scikit-learn's 1,797 digits, 8x8, in a fixed stratified split: 1,437 train, 360 test."""
    del location, data_dir, seed
    # Read from its file: to import scikit-learn takes seconds.
    [place] = importlib.util.find_spec('sklearn').submodule_search_locations
    rows = np.loadtxt(Path(place, 'datasets', 'data', 'digits.csv.gz'), delimiter=',')
    pixels, labels = rows[:, :-1], rows[:, -1].astype(int)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    shuffle = np.random.RandomState(0).permutation  # NumPy keeps its stream for good
    order = shuffle(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    test = np.zeros(len(labels), bool)
    test[order[::5]] = True
    chosen = {
        name: shuffle(np.flatnonzero(mask)) for name, mask in (('train', ~test), ('test', test))
    }

    def open_split(split: str) -> ArraySource:
        index = chosen[split]
        content = hashlib.sha256(images[index].tobytes()).hexdigest()
        return ArraySource(images[index], labels[index].astype(np.int32), content)

    sizes = {name: len(index) for name, index in chosen.items()}
    return Dataset(sizes, open_split, tuple('0123456789'), (8, 8, 1))


_CANVAS, _COPIES = 40, 4


def canvas(location: str, data_dir: str, seed: int) -> Dataset:
    """Each of the digits on four canvases of 40x40, of 12 to 24 pixels, among scraps of others.

    A box is that of the digit's ink. A split of scikit-learn's digits makes one of canvases, which are
    the same every time.
    """
    plain = digits(location, data_dir, seed)

    def open_split(split: str) -> ArraySource:
        pixels, labels, _ = _draw_canvases(split)
        return ArraySource(pixels, labels, hashlib.sha256(pixels.tobytes()).hexdigest())

    sizes = {name: _COPIES * size for name, size in plain.sizes.items()}
    shape = (_CANVAS, _CANVAS, 1)
    return Dataset(
        sizes, open_split, plain.class_names, shape, lambda split: _draw_canvases(split)[2]
    )


@functools.cache
def _draw_canvases(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 1], labels and boxes of one of the digits' splits."""
    source = digits('', '', 0).open(split)
    pictures = [Image.fromarray(image) for image in source.images[..., 0]]
    random = np.random.RandomState(len(pictures))  # NumPy keeps its stream for good

    @functools.cache
    def resized(i: int, side: int) -> np.ndarray:
        return np.asarray(pictures[i].resize((side, side), Image.Resampling.BILINEAR))

    count = len(pictures)
    drawn = [_place(resized, count, i, random) for i in range(count) for _ in range(_COPIES)]
    pixels, boxes = map(np.stack, zip(*drawn, strict=True))
    return pixels[..., None], np.repeat(source.labels, _COPIES), np.float32(boxes)


def _place(
    resized: Callable[[int, int], np.ndarray], count: int, i: int, random: np.random.RandomState
) -> tuple[np.ndarray, list]:
    """A canvas with image i and its box, over six scraps of any of `count` images and some noise."""
    pixels = random.randint(0, 32, (_CANVAS, _CANVAS)).astype(np.uint8)
    for other in random.randint(0, count, 6):
        scrap = resized(other, random.randint(12, 25))[: random.randint(4, 8), :6]
        top, left = (random.randint(0, _CANVAS - n + 1) for n in scrap.shape)
        region = pixels[top : top + scrap.shape[0], left : left + scrap.shape[1]]
        np.maximum(region, scrap, out=region)
    digit = resized(i, random.randint(12, 25))
    top, left = random.randint(0, _CANVAS - len(digit) + 1, 2)
    region = pixels[top : top + len(digit), left : left + len(digit)]
    np.maximum(region, digit, out=region)
    rows, columns = (np.flatnonzero((digit > 64).any(axis)) for axis in (1, 0))
    edges = [top + rows[0], left + columns[0], top + rows[-1] + 1, left + columns[-1] + 1]
    return pixels, [edge / _CANVAS for edge in edges]


def folder(location: str, data_dir: str, seed: int) -> Dataset:
    """PATH/SPLIT/CLASS/*.jpg, or PATH/CLASS/*.jpg of which a seeded, stratified 10% are 'test'.

    Images lie anywhere below the directory of their class. Classes are sorted by name, those of
    'train' if there is one. Examples are in a fixed pseudo-random order, so that slices are fair.
    """
    del data_dir
    root = _absolute(location)
    if not root.is_dir():
        raise UserError(f'folder:{location}: there is no directory {root}.')
    groups = {d.name: d for d in _subdirectories(root) if d.name in SPLIT_DIRECTORIES}
    groups = {name: d for name, d in groups.items() if _subdirectories(d)}
    images = {split: _images_by_class(directory, root) for split, directory in groups.items()}
    if groups:
        classes = _merge([images['train']] if 'train' in images else images.values())
    else:
        classes = _images_by_class(root, root)
        images = _hold_out(classes, seed)
    _check_classes(root, classes, images)
    labels = {name: label for label, name in enumerate(sorted(classes))}
    files = {
        split: _shuffled([path for paths in images[split].values() for path in paths], 0)
        for split in images
    }
    label_of = {p: labels[c] for group in images.values() for c, ps in group.items() for p in ps}

    def open_split(split: str) -> FileSource:
        paths = tuple(files[split])
        index = np.array([label_of[path] for path in paths], np.int32)
        return FileSource(str(root), paths, index, _content(root, paths))

    return Dataset({k: len(v) for k, v in files.items()}, open_split, tuple(labels), (0, 0, 3))


def _subdirectories(directory: Path) -> list[Path]:
    visible = (d for d in directory.iterdir() if not d.name.startswith(('.', '__')))
    return sorted(d for d in visible if d.is_dir())


def _images_by_class(directory: Path, root: Path) -> dict[str, list[str]]:
    """The image files below each subdirectory, relative to the root."""
    found = {}
    for subdirectory in _subdirectories(directory):
        paths = found[subdirectory.name] = []
        for parent, directories, files in os.walk(subdirectory, followlinks=True):
            directories[:] = [d for d in directories if not d.startswith('.')]
            names = [f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith('.')]
            place = Path(parent).relative_to(root).as_posix()
            paths.extend(f'{place}/{name}' for name in names)
    return found


def _merge(groups: Iterable[Mapping[str, list[str]]]) -> dict[str, list[str]]:
    merged = {}
    for group in groups:
        for name, paths in group.items():
            merged.setdefault(name, []).extend(paths)
    return merged


def _hold_out(classes: Mapping[str, list[str]], seed: int) -> dict[str, dict[str, list[str]]]:
    """Every tenth image, class by class, to 'test'; the others to 'train'."""
    images = {'train': {}, 'test': {}}
    ordered = [(name, path) for name in sorted(classes) for path in _shuffled(classes[name], seed)]
    for i, (name, path) in enumerate(ordered):
        images['train' if i % 10 else 'test'].setdefault(name, []).append(path)
    return images


def _shuffled(paths: Sequence[str], seed: int) -> list[str]:
    """In the order of a hash of their names: the same everywhere, whatever joins or leaves."""
    return sorted(paths, key=lambda path: (digest([seed, path]), path))


def _check_classes(root: Path, classes, images):
    expected = f'expected {root}/train/CLASS/*.jpg or {root}/CLASS/*.jpg with'
    if len(classes) < 2:
        got = ', '.join(classes) or 'none'
        raise UserError(f'{expected} at least 2 class directories, got {got}.')
    empty = sorted(name for name, paths in classes.items() if not paths)
    if empty:
        kinds = ', '.join(SUFFIXES)
        raise UserError(
            f'{expected} images ({kinds}) of every class, got none of {", ".join(empty)}. '
            'Remove these directories or fill them.'
        )
    for split, group in images.items():
        unknown = sorted(name for name in group if name not in classes)
        if unknown:
            raise UserError(
                f'{root}/{split} has the classes {", ".join(unknown)}, which {root}/train lacks: '
                f'it has {", ".join(sorted(classes))}. Their names must agree.'
            )


def npz(location: str, data_dir: str, seed: int) -> Dataset:
    """`x_SPLIT` and `y_SPLIT` as Keras writes them, in the order of the file.

    Images are uint8 [N, H, W] or [N, H, W, C], labels integers [N] or [N, 1] from 0; an array
    `class_names` of strings may name the classes.
    """
    del data_dir, seed
    path = _absolute(location)
    headers = _npz_headers(path)
    names = [k[2:] for k in headers if k.startswith('x_') and f'y_{k[2:]}' in headers]
    if not names:
        raise UserError(
            f'{path} has the arrays {", ".join(headers) or "none"}, expected x_train, y_train, '
            'x_test and y_test.'
        )
    for name in names:
        _check_npz(path, name, headers)
    shapes = {(*headers[f'x_{name}'][0][1:], 1)[:3] for name in names}
    if len(shapes) > 1:
        raise UserError(f'{path} has splits with images of {sorted(shapes)}, expected one shape.')
    labels = {name: _npz_array(path, f'y_{name}').reshape(-1).astype(np.int64) for name in names}
    class_names = _npz_classes(path, headers, labels)

    def open_split(split: str) -> ArraySource:
        images = _npz_array(path, f'x_{split}')
        images = images if images.ndim == 4 else images[..., None]
        content = repr([headers[f'{key}_{split}'] for key in 'xy'])
        return ArraySource(images, labels[split].astype(np.int32), content)

    sizes = {name: len(labels[name]) for name in names}
    return Dataset(sizes, open_split, class_names, shapes.pop())


Header = tuple[tuple[int, ...], np.dtype, int]
_AGAIN = 'Get it again, or write it with numpy.savez.'
_DEFLATED = 1100  # no byte of a deflated file becomes more; lies of a header about its size may


def _npz_headers(path: Path) -> dict[str, Header]:
    """The shape, the dtype and the CRC of each array, without reading it.

    Raises:
      UserError: no npz file; or an array is of another size than its header says, which would have
        NumPy ask for memory that no data are for.
    """
    headers = {}
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith('.npy'):
                    key = entry.filename.removesuffix('.npy')
                    headers[key] = _npy_header(archive, entry, size)
    except FileNotFoundError as e:
        raise UserError(f'npz:{path}: there is no such file. Check the path.') from e
    except Exception as e:  # NumPy and zipfile raise all kinds on damaged files
        raise UserError(f'{path} is not an npz file: {e}. {_AGAIN}') from e
    return headers


def _npy_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> Header:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{entry.filename} is compressed in a way that NumPy does not write')
    if not entry.file_size <= _DEFLATED * entry.compress_size <= _DEFLATED * size:
        raise ValueError(f'{entry.filename} would have {entry.file_size:,} bytes')
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):  # a later one may have a header of any length
            raise ValueError(f'{entry.filename} is of version {version}, not of plain numbers')
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin = file.tell()
    wanted = begin + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or (not dtype.hasobject and wanted != entry.file_size):
        raise ValueError(
            f'{entry.filename} is {dtype} {list(shape)} by its header, in {entry.file_size:,} bytes'
        )
    return shape, dtype, entry.CRC


def _npz_array(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key]
    except Exception as e:  # NumPy and zipfile raise all kinds on damaged files
        raise UserError(f'The array {key} of {path} cannot be read: {e}. {_AGAIN}') from e


def _check_npz(path: Path, name: str, headers: Mapping[str, Header]):
    (x_shape, x_type, _), (y_shape, y_type, _) = headers[f'x_{name}'], headers[f'y_{name}']
    channels = (*x_shape[1:], 1)[2] if len(x_shape) in (3, 4) else 0
    images = x_type == np.uint8 and channels in (1, 3, 4) and min(x_shape[1:]) > 0
    labels = y_type.kind in 'iu' and y_shape in (x_shape[:1], (*x_shape[:1], 1))
    if images and labels:
        return
    hint = ''
    if x_type.kind == 'f':
        hint = ' Convert images in [0, 1] with (x * 255).round().astype("uint8").'
    raise UserError(
        f'{path}: got x_{name} {x_type} {list(x_shape)} and y_{name} {y_type} {list(y_shape)}, '
        'expected uint8 [N, H, W] or [N, H, W, C] with C of 1, 3 or 4, and integers [N] or [N, 1].'
        f'{hint}'
    )


def _npz_classes(
    path: Path, headers: Mapping[str, Header], labels: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    values = np.concatenate(list(labels.values()))
    classes, known = int(values.max(initial=0)) + 1, f', K at most {_CLASSES:,}'
    names = tuple(str(i) for i in range(min(classes, _CLASSES)))
    if 'class_names' in headers:
        names = _npz_names(path)
        known = f' for the {len(names)} class_names'
    if values.min(initial=0) < 0 or classes > len(names):
        raise UserError(
            f'{path} has labels from {values.min()} to {values.max()}, expected 0 to K - 1{known}.'
        )
    return names


def _npz_names(path: Path) -> tuple[str, ...]:
    array = _npz_array(path, 'class_names').reshape(-1)
    try:
        return tuple(map(str, array))
    except Exception as e:  # NumPy raises SystemErrors where four bytes are no character
        raise UserError(f'The class_names of {path} cannot be read: {e}. {_AGAIN}') from e


_CLASSES = 1_000_000  # without names: more is a label that is no class
