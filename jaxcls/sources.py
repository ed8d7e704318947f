"""Random access to the examples of a split, in record files, image files or arrays.

Every source has `len(source)` and `source[i] -> (image, label)`. Sources are picklable and hold no
open file: files open at the first read, once a process, so processes and threads may share one.
"""

import bisect
import functools
import itertools
import mmap
import operator
import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcls.errors import UserError

# Open files per process: data sets have up to a few thousand shards, systems often allow 1024.
_OPEN_FILES = 512


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
      content: changes when the data do.
      remake: a function and its arguments that make this source in another process; without them,
        pickling copies the pixels.
    """

    images: np.ndarray
    labels: np.ndarray
    content: str = ''
    remake: tuple[Callable, tuple] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = _in_range(index, len(self))
        return self.images[index], int(self.labels[index])

    def __reduce__(self):
        return self.remake or (ArraySource, (self.images, self.labels, self.content))


@dataclass(frozen=True, eq=False)
class FileSource:
    """One encoded image a file.

    Attributes:
      root: the directory that `paths` are relative to.
      paths: [N].
      labels: int32 [N].
      content: changes when the data do.
    """

    root: str
    paths: tuple[str, ...]
    labels: np.ndarray
    content: str

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        index = _in_range(index, len(self))
        return Path(self.root, self.paths[index]).read_bytes(), int(self.labels[index])


@dataclass(frozen=True)
class RecordSource:
    """tf.train.Example records in the files that TFDS writes: images are encoded bytes.

    Attributes:
      format: 'array_record' or 'tfrecord'.
      files: the paths, in order.
      ends: the number of records up to the end of each file.
      keys: the features that hold the image and the label.
      num_classes: labels outside 0..num_classes-1 raise UserError.
      content: changes when the data do.
    """

    format: str
    files: tuple[str, ...]
    ends: tuple[int, ...]
    keys: tuple[str, str]
    num_classes: int
    content: str

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        def take(image, label):
            return image.bytes_list.value[0], label.int64_list.value[0]

        (image, label), place = self._read(index, self.keys, take)
        if not 0 <= label < self.num_classes:
            raise UserError(
                f'{place} has the label {label}, expected 0 to {self.num_classes - 1}. A split without '
                'labels cannot be used.'
            )
        return image, label

    def box(self, index: int, key: str) -> tuple[float, ...]:
        """The first box of a record, as TFDS writes it: top, left, bottom, right in [0, 1]."""
        values, place = self._read(index, (key,), lambda boxes: tuple(boxes.float_list.value[:4]))
        if len(values) < 4:
            raise UserError(f'{place} has no box: take a split in which every example has one.')
        return values

    def _read(self, index: int, keys: tuple[str, ...], take: Callable) -> tuple[Any, str]:
        """What `take` takes from some features of a record, and what to call that in a message."""
        index = _in_range(index, len(self))
        shard = bisect.bisect_right(self.ends, index)
        start = self.ends[shard - 1] if shard else 0
        path, count = self.files[shard], self.ends[shard] - start
        place = f'Record {index - start} of {path}'
        try:
            record = _open_records(self.format, path, count, os.getpid())(index - start)
            return take(*_parse(record, keys)), place
        except (RuntimeError, ValueError, IndexError) as e:
            raise UserError(f'{place} is damaged: {e}. {_AGAIN}') from e


@dataclass(frozen=True)
class SliceSource:
    """Ranges of sources, one after the other: `parts` holds (source, start, stop)."""

    parts: tuple[tuple[Any, int, int], ...]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        source, place = self.locate(index)
        return source[place]

    def locate(self, index: int) -> tuple[Any, int]:
        """The source that an example comes from, and its place in that one."""
        index = _in_range(index, len(self))
        part = bisect.bisect_right(self._ends, index)
        source, _, stop = self.parts[part]
        return source, stop - self._ends[part] + index

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], of sources that know their labels without reading."""
        return np.concatenate([source.labels[start:stop] for source, start, stop in self.parts])

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(stop - start for _, start, stop in self.parts))


def select(parts: Sequence[tuple[Any, int, int]]):
    """A source of ranges (source, start, stop), as plain as it can be: arrays stay arrays."""
    if all(isinstance(source, ArraySource) for source, _, _ in parts):
        images = [source.images[start:stop] for source, start, stop in parts]
        labels = [source.labels[start:stop] for source, start, stop in parts]
        if len(parts) == 1:
            return ArraySource(images[0], labels[0])
        return ArraySource(np.concatenate(images), np.concatenate(labels))
    source, start, stop = parts[0]
    if len(parts) == 1 and (start, stop) == (0, len(source)):
        return source
    return SliceSource(tuple(parts))


@dataclass(frozen=True, eq=False)
class SubsetSource:
    """Some examples of a source, with labels of their own.

    Attributes:
      source: the whole.
      indices: int64 [N], the examples' places in it.
      labels: int32 [N], in place of the source's.
    """

    source: Any
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = _in_range(index, len(self))
        image, _ = self.source[self.indices[index]]
        return image, int(self.labels[index])


def subset(source, indices: np.ndarray, labels: np.ndarray):
    """A source of some examples, relabelled, as plain as it can be: arrays and files stay such."""
    if isinstance(source, ArraySource):
        return ArraySource(source.images[indices], labels)
    if isinstance(source, FileSource):
        paths = tuple(source.paths[i] for i in indices)
        return FileSource(source.root, paths, labels, source.content)
    return SubsetSource(source, indices, labels)


def name_of(source, index: int) -> str:
    """What a message calls an example: the path of its file, where it has its own, else its number."""
    if isinstance(source, SliceSource):
        return name_of(*source.locate(index))
    if isinstance(source, SubsetSource):
        return name_of(source.source, source.indices[index])
    if isinstance(source, FileSource):
        return str(Path(source.root, source.paths[index]))
    return f'example {index}'


def read_labels(source) -> np.ndarray:
    """The labels of a source, int32 [N]; records are read for them, at 100,000 small ones a second."""
    labels = getattr(source, 'labels', None)
    if labels is None:
        labels = [source[i][1] for i in range(len(source))]
    return np.asarray(labels, np.int32)


def _in_range(index: int, length: int) -> int:
    index = operator.index(index)
    if not -length <= index < length:
        raise IndexError(f'example {index} of {length}')
    return index % length


def _parse(record: bytes, keys: tuple[str, ...]) -> list[Any]:
    """Features of a serialised tf.train.Example, none of them empty."""
    parse, error = _example_parser()
    try:
        features = parse(record).features.feature
    except error as e:
        raise ValueError('not a tf.train.Example') from e
    if not all(key in features for key in keys):
        raise ValueError(f'it has the features {sorted(features)}, expected {list(keys)}')
    return [features[key] for key in keys]


# Threads that import TFDS at the same time block each other for good: its lazy modules have locks too.
_IMPORT = threading.Lock()


@functools.cache
def _example_parser() -> tuple[Callable[[bytes], Any], type[Exception]]:
    with _IMPORT:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example.FromString, DecodeError


_AGAIN = 'Delete the directory of the data set and prepare it again, or copy it again.'


@functools.lru_cache(maxsize=_OPEN_FILES)
def _open_records(format: str, path: str, count: int, pid: int) -> Callable[[int], bytes]:
    """A function that reads the record of a number; `pid` keeps handles apart after a fork."""
    del pid
    found, read = _FORMATS[format](path)
    if found != count:
        raise UserError(f'{path} has {found} records, expected {count}: it is damaged. {_AGAIN}')
    return read


def _array_record(path: str) -> tuple[int, Callable[[int], bytes]]:
    from array_record.python.array_record_module import ArrayRecordReader

    # The options for random access. A missing or cut file has no records. Reading a range of one
    # record is 20 times as fast as reading a list of one.
    options = 'readahead_buffer_size:0,max_parallelism:0'
    reader = ArrayRecordReader(path, options=options, file_reader_buffer_size=32768)
    return reader.num_records(), lambda i: reader.read(i, i + 1)[0]


def _tfrecord(path: str) -> tuple[int, Callable[[int], bytes]]:
    spans = _tfrecord_spans(path)
    if not len(spans):
        return 0, spans.__getitem__
    with Path(path).open('rb') as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return len(spans), lambda i: data[spans[i, 0] : spans[i, 1]]


_FORMATS = {'array_record': _array_record, 'tfrecord': _tfrecord}


@functools.cache
def _tfrecord_spans(path: str) -> np.ndarray:
    """Where the data of each record start and end in a TFRecord file: int64 [N, 2].

    A record is its length (uint64), a masked CRC-32C of the length (uint32), the data, and their
    masked CRC-32C. The lengths are checked, the data are not.
    """
    size = Path(path).stat().st_size
    spans = []
    position = 0
    with Path(path).open('rb', buffering=0) as file:
        while position < size:
            file.seek(position)
            header = file.read(12)
            intact = len(header) == 12 and _masked_crc(header[:8]) == header[8:]
            end = position + 12 + int.from_bytes(header[:8], 'little')
            if not intact or end + 4 > size:
                raise UserError(f'{path} is damaged at byte {position} of {size}. {_AGAIN}')
            spans.append((position + 12, end))
            position = end + 4
    return np.array(spans, np.int64).reshape(-1, 2)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _crc_table()[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc_table() -> list[int]:
    """CRC-32C (Castagnoli) of each byte."""
    table = list(range(256))
    for _ in range(8):
        table = [(crc >> 1) ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table
