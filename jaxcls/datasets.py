"""Data sets by name: tfds:NAME, folder:PATH, npz:PATH, digits or canvas, as splits of images and labels.

Nothing here needs TensorFlow, or JAX: worker processes import this module.
"""

import contextlib
import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxcls import loaders
from jaxcls.errors import UserError
from jaxcls.sources import ArraySource, read_labels, select, subset

DATASETS: dict[str, Callable[[str, str, int], loaders.Dataset]] = {
    'tfds': loaders.tfds,
    'folder': loaders.folder,
    'npz': loaders.npz,
    'digits': loaders.digits,
    'canvas': loaders.canvas,
}
_BUILT_IN = ('digits', 'canvas')
MAX_PIXELS = 50_000_000
# Above this many pixels, which take 10 bytes each to decode, the threads of a process take turns.
_LARGE = 8_000_000
_one_large = threading.Lock()
# Pillow reads more, such as EPS, for which it runs the file as a program of Ghostscript's.
FORMATS = ('BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')


@dataclass(frozen=True)
class Split:
    """A split of a data set, or a slice or subset of one.

    Attributes:
      source: random access, picklable: `len(source)` and `source[i] -> (image, label)`, where the
        image is encoded bytes (PNG, JPEG, WebP, ...) or uint8 [H, W, C], the label an int.
      class_names: [K].
      shape: (H, W, C) of all images; H = W = 0 where sizes vary.
      fingerprint: a hex digest that changes when the data, the slice or the subset change. It covers
        names, sizes and modification times of files (CRCs in npz files), not every pixel.
    """

    source: Any
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    fingerprint: str


def load(
    name: str,
    split: str,
    data_dir: str = '',
    seed: int = 0,
    classes: tuple[int, ...] = (),
    per_class: int = 0,
    imbalance: float = 1.0,
    label_noise: float = 0.0,
    share: float = 1.0,
) -> Split:
    """Opens a split of a data set, and prepares a TFDS data set that is not yet.

    Args:
      name: 'tfds:NAME' ('tfds:NAME/CONFIG:VERSION'), 'folder:PATH', 'npz:PATH', 'digits' or 'canvas'.
      split: 'train', 'train[:90%]', 'test[-100:]', 'train+test', 'all': the grammar of TFDS.
      data_dir: of TFDS; '' is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      seed: of the split of a folder that is not split itself, and of what is drawn below.
      classes: indices of those to keep, which are labelled 0, 1, ... in this order; () keeps all.
      per_class: examples to keep of each class, drawn without replacement; those of a smaller number
        are among them, and those of one class do not depend on `classes`. 0 keeps all.
      imbalance: the largest class over the last; then cuts to a long tail (`tail_sizes`), drawn as
        for `per_class`: those of a greater imbalance are among them. 1 keeps all.
      label_noise: last, the share of labels to replace by those of other classes (`noisy_indices`).
      share: before that, how much of what is left to keep, in (0, 1] (`share_indices`).

    Raises:
      UserError: the data set, the split or a file of it is not there or not what it should be; the
        data have one class; or the split lacks the classes, or has too few examples of one.
    """
    dataset = _open(name, data_dir, seed)
    names = _kept_names(name, dataset.class_names, classes)
    ranges = parse_split(split, dataset.sizes)
    opened = {part: dataset.open(part) for part, _, _ in ranges}
    source = select([(opened[part], start, stop) for part, start, stop in ranges])
    identity = [(opened[part].content, start, stop) for part, start, stop in ranges]
    fingerprint = loaders.digest([dataset.class_names, dataset.shape, identity])
    if classes or per_class or imbalance > 1 or label_noise or share < 1:
        kept = dict(zip(classes or range(len(names)), names, strict=True))
        indices, labels = _choose(read_labels(source), kept, split, per_class, imbalance, seed)
        if share < 1:
            drawn = share_indices(len(indices), share, seed)
            indices, labels = indices[drawn], labels[drawn]
        labels = _mislabel(labels, len(names), label_noise, seed)
        source = subset(source, indices, labels)
        fingerprint = loaders.digest([fingerprint, names, indices.tolist(), labels.tolist()])
    if name.startswith('npz:'):  # worker processes read the file, rather than be sent the pixels
        cut = (classes, per_class, imbalance, label_noise, share)
        remake = (_remake, (name, split, data_dir, seed, *cut))
        source = ArraySource(source.images, source.labels, remake=remake)
    return Split(source, names, dataset.shape, fingerprint)


def _kept_names(name: str, known: tuple[str, ...], classes: tuple[int, ...]) -> tuple[str, ...]:
    if len(set(classes)) < len(classes) or not all(0 <= k < len(known) for k in classes):
        raise UserError(
            f'config.data.classes is {classes}; {name} has the classes 0 to {len(known) - 1}: give '
            'each of those to keep once, or () to keep all.'
        )
    names = tuple(known[k] for k in classes) or known
    if len(names) < 2:
        listed = ', '.join(names) or 'none'
        raise UserError(
            f'{name} has the classes {listed}; there must be two or more to tell apart.'
        )
    return names


def _choose(
    labels: np.ndarray,
    kept: dict[int, str],
    split: str,
    per_class: int,
    imbalance: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The examples of the classes that `kept` names by index, in order, and their new labels."""
    indices = draw(labels, kept, per_class, seed, split, imbalance)
    if not len(indices):
        raise UserError(
            f'Split {split!r} has no example of config.data.classes {tuple(kept)}: '
            f'{", ".join(kept.values())}. Choose others, or another split.'
        )
    relabelled = np.zeros(max(kept) + 1, np.int32)
    relabelled[list(kept)] = np.arange(len(kept))
    return indices, relabelled[labels[indices]]


def draw(
    labels: np.ndarray,
    kept: dict[int, str],
    per_class: int,
    seed: int,
    split: str,
    imbalance: float = 1.0,
) -> np.ndarray:
    """The examples of some classes, or some drawn from each: sorted indices into `labels`.

    Args:
      kept: the classes' names by label, the head of a long tail first.
      per_class: how many of each; 0 is all.
      split: its name, for the message.
      imbalance: of the long tail, cut last; see `tail_sizes`.

    Raises:
      UserError: a class has fewer.
    """
    places = {k: np.flatnonzero(labels == k) for k in kept}
    fewest = min(kept, key=lambda k: len(places[k]))
    if len(places[fewest]) < per_class:
        raise UserError(
            f'{per_class:,} examples a class are asked for (config.data.per_class, --shots), and class '
            f'{kept[fewest]!r} has only {len(places[fewest]):,} in {split!r}. Take fewer, or name the '
            'other classes in config.data.classes.'
        )
    sizes = tail_sizes([per_class or len(found) for found in places.values()], imbalance)
    drawn = [  # RandomState: NumPy keeps its stream for good
        np.random.RandomState([seed, k]).permutation(found)[:size]
        for (k, found), size in zip(places.items(), sizes, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def tail_sizes(sizes: Sequence[int], imbalance: float) -> list[int]:
    """How many examples of K classes a long tail keeps, the first class being its head.

    Class k keeps `n * imbalance^(-k / (K - 1))`, rounded down, n being the largest class: at least 1,
    and no more than it has. Cui et al. 2019, https://arxiv.org/abs/1901.05555; of CIFAR-10 and an
    imbalance of 100, the 12,406 examples that others train on. 1 keeps all.
    """
    # The small number is for powers that come out a rounding error below a whole one.
    wanted = (
        int(max(sizes) * imbalance ** (-k / max(len(sizes) - 1, 1)) + 1e-9)
        for k in range(len(sizes))
    )
    return [min(size, max(1, n)) for size, n in zip(sizes, wanted, strict=True)]


def share_indices(examples: int, share: float, seed: int) -> np.ndarray:
    """Which examples of a split `load` keeps: sorted indices, `round(share * N)` and at least 1.

    Those of a smaller share are among them. Over many seeds an example is in about this share of
    the draws.
    """
    random = np.random.RandomState([seed, 0, 2])  # of no class of `draw`, and not that of the noise
    return np.sort(random.permutation(examples)[: max(1, round(share * examples))])


def noisy_indices(examples: int, label_noise: float, seed: int) -> np.ndarray:
    """Which examples of a split `load` gives a wrong label: sorted indices, `round(label_noise * N)`.

    The noise is symmetric: every label drawn is replaced by one of the K - 1 other classes, all as
    probable, so that just this share is wrong. (Zhang et al. 2017, https://arxiv.org/abs/1611.03530,
    draw from all K, which leaves one in K as it was.) Those of a smaller share are among them, with the
    same wrong labels. The true labels are those of the split without noise.
    """
    return np.sort(_noise(examples, label_noise, seed)[0])


def _noise(
    examples: int, label_noise: float, seed: int
) -> tuple[np.ndarray, np.random.RandomState]:
    """The examples to mislabel, and the stream after they are drawn."""
    random = np.random.RandomState([seed, 0, 1])  # of no class of `draw`
    return random.permutation(examples)[: round(label_noise * examples)], random


def _mislabel(labels: np.ndarray, classes: int, label_noise: float, seed: int) -> np.ndarray:
    chosen, random = _noise(len(labels), label_noise, seed)
    if not len(chosen):
        return labels
    noisy = labels.copy()
    noisy[chosen] = (
        labels[chosen] + random.randint(1, classes, len(labels))[: len(chosen)]
    ) % classes
    return noisy


def class_counts(split: Split) -> tuple[int, ...]:
    """The number of examples of each class, [K], by their labels (`sources.read_labels`)."""
    counts = np.bincount(read_labels(split.source), minlength=len(split.class_names))
    return tuple(counts.tolist())


class Description(NamedTuple):
    """What is known of a split without opening its files; see `Split`."""

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    examples: int


def describe(
    name: str,
    split: str,
    data_dir: str = '',
    seed: int = 0,
    classes: tuple[int, ...] = (),
    per_class: int = 0,
    imbalance: float = 1.0,
    label_noise: float = 0.0,
    share: float = 1.0,
) -> Description:
    """Describes what `load` with the same arguments opens; nothing is prepared.

    A TFDS data set that is not prepared is described from TFDS's code, with 0 examples unless
    `per_class` says how many. The records of a prepared one are not read: of `classes` or `imbalance`
    without it, the number of examples is estimated, as if classes were of one size.
    """
    del label_noise  # it moves no example
    kind, _, location = name.partition(':')
    if kind == 'tfds' and location:
        dataset = loaders.known_tfds(location, data_dir)
    else:
        dataset = _open(name, data_dir, seed)
    names = _kept_names(name, dataset.class_names, classes)
    ranges = parse_split(split, dataset.sizes) if dataset.sizes else []
    examples = sum(stop - start for _, start, stop in ranges)
    if per_class or kind == 'tfds':
        if classes:
            examples = round(examples * len(names) / len(dataset.class_names))
        if per_class or imbalance > 1:
            each = per_class or -(-examples // len(names))
            examples = sum(tail_sizes([each] * len(names), imbalance))
    elif classes or imbalance > 1:
        examples = len(load(name, split, data_dir, seed, classes, 0, imbalance).source)
    if examples:
        examples = max(1, round(share * examples))
    return Description(dataset.shape, names, examples)


def load_boxes(name: str, split: str, data_dir: str = '', seed: int = 0) -> np.ndarray | None:
    """Where the object of each example of a split is, as `loaders.Dataset.boxes`; None without boxes.

    Args:
      name, split, data_dir, seed: as in `load`.

    Raises:
      UserError: as `load`.
    """
    dataset = _open(name, data_dir, seed)
    ranges = parse_split(split, dataset.sizes)
    if dataset.boxes is None:
        return None
    return np.concatenate([dataset.boxes(part)[start:stop] for part, start, stop in ranges])


def splits(name: str, data_dir: str = '') -> dict[str, int]:
    """The number of examples of each split; prepares a TFDS data set that is not yet."""
    return _open(name, data_dir, 0).sizes


def _open(name: str, data_dir: str, seed: int) -> loaders.Dataset:
    kind, _, location = name.partition(':')
    if kind not in DATASETS or bool(location) != (kind not in _BUILT_IN):
        hint = '' if kind in DATASETS else f" A data set of TFDS is written 'tfds:{name}'."
        raise UserError(
            f'Unknown data set {name!r}, expected tfds:NAME, folder:PATH, npz:PATH, digits or canvas.{hint}'
        )
    try:
        return DATASETS[kind](location, data_dir, seed)
    except OSError as e:
        raise UserError(f'{name} cannot be read: {e}. Check the path and its permissions.') from e


def _remake(*arguments) -> ArraySource:
    return load(*arguments).source


_PART = re.compile(r'([\w-]+)(?:\[(-?[\d_.]+%?)?:(-?[\d_.]+%?)?\])?')


def parse_split(spec: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """The ranges (split, start, stop) of a specification in TFDS's grammar.

    'train', 'train[10:]', 'train[:-10]', 'train[25%:75%]', sums of them with '+', and 'all'.
    Percents are rounded to the closest example.

    Raises:
      UserError: unknown split, no such slice, or no example in it.
    """
    parts = [part.strip() for part in spec.split('+')]
    parts = [name for part in parts for name in (sizes if part == 'all' else [part])]
    ranges = [_parse_part(part, spec, sizes) for part in parts]
    if not sum(stop - start for _, start, stop in ranges):
        raise _split_error(spec, sizes, 'selects no example')
    return [(name, start, stop) for name, start, stop in ranges if start < stop]


def _parse_part(part: str, spec: str, sizes: dict[str, int]) -> tuple[str, int, int]:
    match = _PART.fullmatch(part)
    if not match:
        raise _split_error(spec, sizes, 'is not written as train, train[:90%] or train[-100:]')
    name, first, last = match.groups()
    if name not in sizes:
        raise _split_error(spec, sizes, f'names the split {name!r}, which is not there')
    size = sizes[name]
    percent = '%' in f'{first}{last}'  # as in TFDS, of one bound is of both
    bounds = []
    for bound, default in ((first, 0), (last, size)):
        if bound is None:
            bounds.append(default)
            continue
        try:
            value = float(bound.rstrip('%')) if percent else int(bound)
        except ValueError:
            raise _split_error(spec, sizes, f'has the bound {bound!r}, not a number') from None
        if abs(value) > (100 if percent else size):
            raise _split_error(spec, sizes, f'has the bound {bound!r}, beyond the split')
        position = round(value * size / 100) if percent else value
        bounds.append(position + size if position < 0 else position)
    start, stop = bounds
    return name, start, max(start, stop)


def _split_error(spec: str, sizes: dict[str, int], problem: str) -> UserError:
    known = ', '.join(f'{name} ({size:,} examples)' for name, size in sizes.items())
    return UserError(f'Split {spec!r} {problem}. The data set has {known or "no splits"}.')


_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def decode(image: bytes | np.ndarray, channels: int) -> np.ndarray:
    """`decode_picture` as uint8 [H, W, channels]."""
    if isinstance(image, np.ndarray):
        return _match_channels(image, channels)
    return to_array(decode_picture(image, channels))


def decode_picture(image: bytes | np.ndarray, channels: int) -> Image.Image:
    """Decodes an image to a picture of Pillow's with `channels` of 8 bits.

    Grey, palette, CMYK and 16-bit images are converted. Transparent ones are laid on white, as a
    browser shows them, unless there are 4 channels. EXIF orientation is applied: photos stand as
    people see them. Of an animation it is the first frame.

    Args:
      image: a file of one of FORMATS, or uint8 [H, W, C].
      channels: 1 (luminance), 3 (RGB) or 4 (RGBA); for an array also its own number.

    Raises:
      UserError: damaged, above MAX_PIXELS by its header (nothing is decoded then), or 32-bit.
    """
    if isinstance(image, np.ndarray):
        return to_picture(_match_channels(image, channels))
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels <= MAX_PIXELS:
                with _one_large if pixels > _LARGE else contextlib.nullcontext():
                    picture.load()  # after this block there is no file to load it from
                    return _converted(picture, _MODES[channels])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = MAX_PIXELS + 1
    except UserError:
        raise
    except Exception as e:  # Pillow's decoders raise all kinds on damaged files
        kind = f'{image[:8]!r}... of {len(image):,} bytes'
        # Pillow's own words have an address in memory: another one each time.
        why = 'unknown format' if isinstance(e, UnidentifiedImageError) else e
        raise UserError(
            f'Not an image that can be decoded: {kind}: {why}. Get it again, or leave it out; '
            f'{", ".join(FORMATS)} are read.'
        ) from e
    raise UserError(
        f'Image of {pixels:,} pixels or more, expected at most {MAX_PIXELS:,}. Make it smaller.'
    )


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width of an image as `decode` returns it, without decoding it where it need not be."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
        turned = picture.getexif().get(0x0112, 1) >= 5
        return picture.size if turned else (picture.height, picture.width)


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if 'exif' in picture.info:
        with contextlib.suppress(Exception):  # many cameras write broken EXIF
            picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith('I;16'):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ('I', 'F'):
        raise UserError('Image with 32 bits a pixel, expected 8 or 16: convert it to PNG or JPEG.')
    if picture.has_transparency_data and mode != 'RGBA':
        picture = picture.convert('RGBA')
        white = Image.new('RGBA', picture.size, 'white')
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == mode else picture.convert(mode)


def to_array(picture: Image.Image) -> np.ndarray:
    """The pixels of a picture, uint8 [H, W, C]."""
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def to_picture(image: np.ndarray) -> Image.Image:
    """A picture of the pixels, uint8 [H, W, C]."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def _match_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[-1] == channels:
        return image
    if image.shape[-1] == 1:
        return np.repeat(image, channels, axis=-1)
    return to_array(_converted(to_picture(image), _MODES[channels]))
