"""Batches of a split: `resident` keeps the split in device memory, `stream` reads it as it goes.

Batch *i* is a pure function of (seed, step, process), whatever the pipeline and the number of
workers, so there is no iterator state to save. Training draws from the concatenation of each epoch's
permutation: every example once an epoch, every batch full; a batch that crosses the end of an epoch
takes its last examples from the next one. Evaluation goes through a split in order, padded and masked.
An image that cannot be decoded is masked in training, up to a share of the split, and an error in
evaluation.
"""

import contextlib
import functools
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from filelock import FileLock
from jax.sharding import Mesh
from PIL import Image
from rich.console import Console
from rich.progress import track

from jaxcls import datasets, sharding
from jaxcls.errors import UserError
from jaxcls.sources import ArraySource, name_of

# A split above this size, decoded, is streamed under `pipeline='auto'`.
RESIDENT_LIMIT = 4 * 2**30  # bytes
# Part of the cache key: raise it when decoding or resizing changes what a pixel is.
_CACHE_VERSION = 1
# Below this many images, starting worker processes costs more than it saves.
_MIN_PARALLEL = 10_000
# So many images are decoded at a time, where all are.
_CHUNK = 256
# So many bad images are named in an error, and in warnings; the others are counted.
_LISTED, _NAMED = 10, 100

VARYING_SIZES = (
    'The images of this data set differ in size: set config.data.image_size, the pixels of the '
    'squares to crop and resize them to, such as --config.data.image_size=128.'
)

Order = Callable[[int], dict[str, np.ndarray]]


class Feed(NamedTuple):
    """What a compiled program reads its batches from.

    Attributes:
      data: arrays on the device that every call is given; never donated.
      items: `items(step, count)` returns device arrays with a leading axis of `count` steps.
      fetch: pure, under jit: `fetch(data, item)` makes one item a raw batch with `image` uint8
        [B, H, W, C], `label` int32 [B], `mask` bool [B] (False: padding), `index` int32 [B] (place in
        the split) and `epoch` int32 [B].
      close: ends the worker processes.
      resident: whether the split lies on the device.
    """

    data: Any
    items: Callable[[int, int], Any]
    fetch: Callable[[Any, Any], dict[str, jax.Array]]
    close: Callable[[], None] = lambda: None
    resident: bool = False


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of the examples in one epoch: int64 [examples]."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)


def training_order(seed: int, examples: int, batch_size: int, step: int) -> dict[str, np.ndarray]:
    """Which examples the global batch of a step holds: `index`, `epoch` int32 [B], `mask` bool [B]."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch, place = np.divmod(position, examples)
    index = np.empty(batch_size, np.int32)
    for e in np.unique(epoch):
        index[epoch == e] = permutation(seed, int(e), examples)[place[epoch == e]]
    return {'index': index, 'epoch': epoch.astype(np.int32), 'mask': np.ones(batch_size, bool)}


def evaluation_order(examples: int, batch_size: int, step: int) -> dict[str, np.ndarray]:
    """Like `training_order`: the split in order, once, the last batch padded with `mask` False."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    mask = position < examples
    index = np.where(mask, position, 0).astype(np.int32)
    return {'index': index, 'epoch': np.zeros(batch_size, np.int32), 'mask': mask}


class Reader(NamedTuple):
    """Decodes and sizes one image of a split; picklable, for worker processes.

    Attributes:
      split: the data.
      size: pixels of the square result; 0 keeps images as they are.
      crop: 'center' or 'random_resized'.
      crop_fraction: of the short side, that a centre crop keeps.
      seed: of the random crops.
      max_bad: the share of the examples that may be undecodable, which training leaves out; None:
        none may, since an evaluation is of all.
    """

    split: datasets.Split
    size: int = 0
    crop: str = 'center'
    crop_fraction: float = 1.0
    seed: int = 0
    max_bad: float | None = None

    def __call__(self, index: int, position: int = 0) -> tuple[np.ndarray, int]:
        """Returns the image, uint8 [H, W, C], and its label; `position` keys the random crop.

        Raises:
          UserError: it cannot be read or decoded; names the file.
        """
        decode = datasets.decode_picture if self.size else datasets.decode
        try:
            encoded, label = self.split.source[index]
            image = decode(encoded, self.split.shape[2])
        except (UserError, OSError) as error:
            raise UserError(f'{name_of(self.split.source, index)}: {_why(error)}') from error
        if self.size and self.crop == 'random_resized':
            rng = np.random.Generator(np.random.Philox(key=[self.seed, position]))
            image = resize(image, self.shape[:2], random_box(rng, image.height, image.width))
        elif self.size:
            box = center_box(image.height, image.width, self.crop_fraction)
            image = resize(image, self.shape[:2], box)
        return image, label

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image it returns."""
        height, width, channels = self.split.shape
        return (self.size or height, self.size or width, channels)


def _why(error: Exception) -> str:
    return str(getattr(error, 'strerror', None) or error)  # all of an OSError has the path again


def read(reader: Reader, index: int, position: int = 0) -> dict[str, Any]:
    """An example, or a blank one in place of one that cannot be decoded.

    Returns:
      `image` uint8 [H, W, C], `label` int32, `bad`: why it cannot be decoded, or '', and `unread`:
      whether its file could not even be read, which may pass.
    """
    try:
        image, label = reader(index, position)
    except UserError as error:
        why, unread = _why(error.__cause__), isinstance(error.__cause__, OSError)
        blank = np.zeros(reader.shape, np.uint8)
        return {'image': blank, 'label': np.int32(0), 'bad': why, 'unread': unread}
    return {'image': image, 'label': np.int32(label), 'bad': '', 'unread': False}


def _check_bad(reader: Reader, bad: Mapping[int, str]):
    """Warns of the bad examples of a split; raises UserError where they are more than it may have."""
    source = reader.split.source
    examples = len(source)
    allowed = int((reader.max_bad or 0) * examples + 1e-9)  # 0.29 * 100 is a little below 29
    named = [f'{name_of(source, i)}: {why}' for i, why in itertools.islice(bad.items(), _NAMED)]
    if len(bad) <= allowed:
        for line in named:
            _warn(f'Left out of training: {line}')
        return
    known = f'{len(bad):,} of {examples:,} images cannot be decoded'
    mend = 'Mend or remove them'
    if reader.max_bad is None:
        known += ', and an evaluation leaves none out'
    else:
        known += f', and config.data.max_bad_images={reader.max_bad:g} allows {allowed:,}'
        mend += ', or raise config.data.max_bad_images'
    lines = [f'  {line}' for line in named[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f'  and {len(bad) - _LISTED:,} more')
    raise UserError(f'{known}:\n' + '\n'.join(lines) + f'\n{mend}.')


def _count_unnamed(bad: Mapping[int, str]):
    if len(bad) > _NAMED:
        _warn(f'Left out of training: {len(bad) - _NAMED:,} more images that cannot be decoded.')


@functools.cache  # once a process
def _warn(message: str):
    warnings.warn(message, stacklevel=3)


Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def center_box(height: int, width: int, fraction: float) -> Box:
    """The square in the middle, `fraction` of the short side wide."""
    side = min(height, width) * fraction
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def boxes_in_crop(
    boxes: np.ndarray, sizes: Sequence[tuple[int, int]], fraction: float
) -> np.ndarray:
    """Boxes of images as shares of `center_box` of each: [N, 4] top, left, bottom, right.

    What lies outside is cut off; an object that does altogether has a box without area.
    """
    moved = []
    for box, (height, width) in zip(boxes, sizes, strict=True):
        left, top, right, _ = center_box(height, width, fraction)
        pixels = box * np.array([height, width, height, width]) - np.array([top, left, top, left])
        moved.append(np.clip(pixels / (right - left), 0, 1))
    return np.float32(moved).reshape(-1, 4)


def random_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A box of 8% to 100% of the area and an aspect of 3/4 to 4/3 (Szegedy et al. 2015, 'Going deeper')."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    return center_box(height, width, 1.0)


def resize(picture: Image.Image, size: tuple[int, int], box: Box) -> np.ndarray:
    """The box of a picture as uint8 [*size, C], through an antialiased triangle filter."""
    if picture.size != size[::-1] or box != (0, 0, *picture.size):
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    return datasets.to_array(picture)


def check_size(split: datasets.Split, image_size: int):
    """Raises UserError where images of different sizes would have to share a batch."""
    if not image_size and not split.shape[0]:
        raise UserError(VARYING_SIZES)


def choose(pipeline: str, reader: Reader, train: bool) -> str:
    """'resident' or 'stream' for `pipeline='auto'`, by size; otherwise the pipeline itself."""
    if pipeline != 'auto':
        return pipeline
    size = len(reader.split.source) * int(np.prod(reader.shape))
    random_crop = train and reader.crop == 'random_resized'
    return 'stream' if random_crop or size > RESIDENT_LIMIT else 'resident'


def load_arrays(reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """The good examples of a split as images uint8 [N, H, W, C] and labels int32 [N]: see `load_all`."""
    images, labels, good = load_all(reader)
    return (images, labels) if good.all() else (images[good], labels[good])


def load_all(reader: Reader) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A whole split as images uint8 [N, H, W, C], labels int32 [N], and which of them are good, bool [N].

    It is decoded once, on all cores, and kept as a file under `$JAXCLS_CACHE` (else ~/.cache/jaxcls),
    named after the fingerprint of the data; later calls map that file. What could not be decoded is
    zero, and named in a warning.

    Raises:
      UserError: more than `reader.max_bad` allows could not be decoded.
    """
    source = reader.split.source
    good = np.ones(len(source), bool)
    if isinstance(source, ArraySource) and not reader.size:
        return np.asarray(source.images), np.asarray(source.labels, np.int32), good
    cached = _cache_root() / _cache_key(reader)
    if any(bad.unread and _can_be_read(source, bad.index) for bad in _cached_bad(cached)):
        shutil.rmtree(cached, ignore_errors=True)
    if not cached.exists():
        _decode_to(cached, reader)
    bad = {index: why for index, why, _ in _cached_bad(cached)}
    _check_bad(reader, bad)
    _count_unnamed(bad)
    good[list(bad)] = False
    return np.load(cached / 'images.npy', mmap_mode='r'), np.load(cached / 'labels.npy'), good


class _Bad(NamedTuple):
    """An example that could not be decoded, as `read` has it."""

    index: int
    why: str
    unread: bool


def _cached_bad(directory: Path) -> list[_Bad]:
    path = directory / 'bad.json'
    return [_Bad(*bad) for bad in json.loads(path.read_text())] if path.exists() else []


def _can_be_read(source, index: int) -> bool:
    try:
        source[index]
    except (UserError, OSError):
        return False
    return True


def _cache_root() -> Path:
    return Path(os.environ.get('JAXCLS_CACHE') or Path.home() / '.cache' / 'jaxcls') / 'splits'


def _cache_key(reader: Reader) -> str:
    parts = (_CACHE_VERSION, reader.split.fingerprint, reader.shape, reader.crop_fraction)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _decode_to(directory: Path, reader: Reader):
    """Writes the arrays beside the directory and renames at the end: never a part is taken for all.

    Another process that wants the same waits. What a kill leaves behind, the next call removes.
    """
    part = directory.with_name(f'.{directory.name}.part')
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f'.{directory.name}.lock')):
            if directory.exists():
                return
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            _decode_into(part, reader)
            _free_shared_memory()
            part.rename(directory)
    except OSError as error:
        raise UserError(
            f'The decoded images cannot be kept in {directory.parent}: {error.strerror}. '
            'Set $JAXCLS_CACHE to a directory with room, or config.data.pipeline=stream.'
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _decode_into(directory: Path, reader: Reader):
    examples = len(reader.split.source)
    shape = (examples, *reader.shape)
    images = np.lib.format.open_memmap(directory / 'images.npy', 'w+', np.uint8, shape)
    _reserve(directory / 'images.npy')
    labels, bad = np.empty(examples, np.int32), []
    workers = (os.cpu_count() or 1) if examples >= _MIN_PARALLEL else 0
    dataset = grain.MapDataset.range(-(-examples // _CHUNK)).map(_Numbered(reader))
    console = Console(stderr=True)
    with contextlib.closing(_iterate(dataset, workers)) as batches:
        for batch in track(
            batches,
            f'Decoding {examples:,} images, once',
            total=len(dataset),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            images[batch['index']], labels[batch['index']] = batch['image'], batch['label']
            bad += batch['bad']
    images.flush()
    np.save(directory / 'labels.npy', labels)
    (directory / 'bad.json').write_text(json.dumps(bad))


def _reserve(path: Path):
    """Raises OSError where a file has no room: writing to a map of it would end the process."""
    if hasattr(os, 'posix_fallocate'):
        with path.open('r+b') as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class _Numbered(NamedTuple):
    """_CHUNK examples of a split, in its order, by the number of their batch."""

    reader: Reader

    def __call__(self, number: int) -> dict[str, Any]:
        examples = len(self.reader.split.source)
        index = range(number * _CHUNK, min((number + 1) * _CHUNK, examples))
        return {'index': np.array(index), **_read_all(self.reader, index, index)}


class _Ordered(NamedTuple):
    """This process's rows of a step's batch."""

    reader: Reader
    order: Order
    rows: slice

    def __call__(self, step: int) -> dict[str, Any]:
        batch = self.order(step)
        start = step * len(batch['index'])
        places = range(start + self.rows.start, start + self.rows.stop)
        batch = {key: values[self.rows] for key, values in batch.items()}
        found = _read_all(self.reader, batch['index'].tolist(), places)
        bad = [bad.index for bad in found['bad']]
        return {**batch, **found, 'mask': batch['mask'] & ~np.isin(batch['index'], bad)}


def _read_all(reader: Reader, indices: Iterable[int], places: Iterable[int]) -> dict[str, Any]:
    """`image` uint8 [B, H, W, C], `label` int32 [B], and of those that are bad, `bad`: [_Bad]."""
    pairs = [(i, read(reader, i, place)) for i, place in zip(indices, places, strict=True)]
    return {
        'image': np.stack([example['image'] for _, example in pairs]),
        'label': np.array([example['label'] for _, example in pairs]),
        'bad': [_Bad(i, e['bad'], e['unread']) for i, e in pairs if e['bad']],
    }


def _iterate(dataset: grain.MapDataset, workers: int):
    """The elements in order, read ahead by threads, or by worker processes."""
    # More threads than cores that decode wait for Python's lock and slow down who holds it.
    threads = min(8, 1 + (os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8)
    elements = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which we have none of
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        elements = elements.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(elements)


def _free_shared_memory():
    """What worker processes handed over last, which Grain's closed iterators hold in cycles.

    Left for the end of the program, Python warns of it there.
    """
    gc.collect()


def _start_worker(_index: int, _count: int):
    """In a worker process: Ctrl-C is the parent's to handle, and where the parent dies, so it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def resident(reader: Reader, order: Order, mesh: Mesh) -> Feed:
    """A feed over a split in device memory: the host sends indices, the program gathers."""
    images, labels, good = load_all(reader)
    data = sharding.put_local((images, labels), sharding.replicated(mesh))
    items = functools.partial(_index_items, _masked(order, good), mesh)
    return Feed(data, items, _gather, resident=True)


def carrying(feed: Feed, name: str, arrays: Any) -> Feed:
    """The feed whose batches have arrays under a name, the same in all: not constants of the program."""
    return feed._replace(
        data=(feed.data, arrays),
        fetch=lambda data, item: {**feed.fetch(data[0], item), name: data[1]},
    )


def _masked(order: Order, good: np.ndarray) -> Order:
    """The order with `mask` False where an example is not good."""

    def masked(step):
        batch = order(step)
        return {**batch, 'mask': batch['mask'] & good[batch['index']]}

    return order if good.all() else masked


def _index_items(order: Order, mesh: Mesh, step: int, count: int):
    batches = [order(s) for s in range(step, step + count)]
    *many, size = batches[0]['index'].shape  # many: runs in one program, each with its own batch
    rows = sharding.local_rows(size)
    stacked = {key: np.stack([batch[key][..., rows] for batch in batches]) for key in batches[0]}
    return sharding.put_local(stacked, sharding.split_batch(mesh, axis=1 + len(many)))


def _gather(data, item):
    images, labels = data
    return {'image': images[item['index']], 'label': labels[item['index']], **item}


def stream(reader: Reader, order: Order, mesh: Mesh, steps: int, workers: int = 0) -> Feed:
    """A feed that reads ahead in threads or worker processes, in constant host memory.

    Its `items` raise UserError at the batch with which the bad examples that it has met, in this process
    and since it began, are more than `reader.max_bad` allows.
    """
    rows = sharding.local_rows(len(order(0)['index']))
    place = sharding.split_batch(mesh, axis=1)
    state, bad = {'next': -1, 'batches': None}, {}

    def close():
        if state['batches']:
            state['batches'].close()
            _count_unnamed(bad)
            state.update(next=-1, batches=None)
            if workers:
                _free_shared_memory()

    def items(step: int, count: int):
        if step != state['next']:
            close()
            dataset = grain.MapDataset.range(step, steps).map(_Ordered(reader, order, rows))
            state['batches'] = _iterate(dataset, workers)
        batches = [next(state['batches']) for _ in range(count)]
        found = {bad.index: bad.why for batch in batches for bad in batch.pop('bad')}
        if found.keys() - bad.keys():
            _check_bad(reader, bad | found)
            bad.update(found)
        state['next'] = step + count
        if state['next'] == steps:
            close()
        return sharding.put_local(jax.tree.map(lambda *rows: np.stack(rows), *batches), place)

    return Feed((), items, lambda _, item: item, close)
