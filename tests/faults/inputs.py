"""Inputs that are damaged or made up: images, configs, overrides, weights, data sets, checkpoints.

Each is a whole one with edits that Hypothesis draws, or bytes that it draws. It is read, or refused by one
UserError with the file, the reason and the remedy, within seconds; nothing else is raised.
"""

import contextlib
import gc
import io
import itertools
import json
import logging
import re
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from PIL import Image

from jaxcls import config as config_lib
from jaxcls import datasets, experiment, predictions, sharding, weight_files, workdir
from jaxcls.errors import UserError

from .rows import Row

SECONDS = 2.0
# Messages end with what to do, or with what was expected.
REMEDY = re.compile(
    r'expected|must be|Did you mean|Known: |one of|less than|choose|[Gg]ive |[Gg]et it again|Restore '
    r'|[Ss]et |Choose|Convert|Save |Start |Make it|Check |Write|exactly|multiple of|freezes all|decide it'
)
Edit = tuple[str, int, int, bytes]
Use = Callable[[], None]


def check(count: int, seed: int, directory: Path) -> str:
    """Tries `count` inputs of each kind."""
    seen = []
    logging.getLogger('absl').setLevel(
        logging.CRITICAL
    )  # Orbax repeats what a file has in place of JSON
    for name, make in KINDS.items():
        place = directory / name
        place.mkdir()
        strategy, use = make(place)
        with _no_tracebacks():
            tried, refused, slowest = _fuzz(count, seed, strategy, use)
        seen.append(f'{tried} {name} ({refused} refused, at most {slowest:.2f} s)')
    return ', '.join(seen)


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Fails where Python would print an exception that nothing caught, such as one of a background task."""
    raised = []
    with mock.patch.object(
        sys, 'unraisablehook', lambda found: raised.append(repr(found.exc_value))
    ):
        yield
        gc.collect()
    assert not raised, f'{len(raised)} tracebacks are printed, such as {raised[0][:300]}'


def _fuzz(count: int, seed: int, strategy, use: Callable[[Any], Use]) -> tuple[int, int, float]:
    """`use(case)` prepares an input and returns what reads it; the inputs follow from the seed."""
    tried, refused, slowest = 0, 0, 0.0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def once(case):
        nonlocal tried, refused, slowest
        read = use(case)
        said, seconds = _timed(read, case)
        if seconds > SECONDS:  # the first of a kind imports what it needs; other programs may run
            said, seconds = _timed(read, case)
        assert seconds < SECONDS, f'{seconds:.1f} s for {case!r}'
        tried, refused, slowest = tried + 1, refused + said, max(slowest, seconds if tried else 0)

    with _seed_alone():
        once()
    return tried, refused, slowest


@contextlib.contextmanager
def _seed_alone() -> Iterator[None]:
    """Keeps Hypothesis from drawing constants of the modules, too, that happen to be loaded."""
    providers.CONSTANTS_CACHE.cache.clear()
    with mock.patch.object(providers, '_get_local_constants', lambda: providers.GLOBAL_CONSTANTS):
        yield
    providers.CONSTANTS_CACHE.cache.clear()


def _timed(read: Use, case) -> tuple[bool, float]:
    begin = time.perf_counter()
    return _refusal(read, case), time.perf_counter() - begin


def _refusal(read: Use, case) -> bool:
    """Whether the input was refused, in the way of all mistakes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            read()
    except UserError as error:
        chain = [error, error.__cause__, error.__context__]
        assert not any(isinstance(e, MemoryError) for e in chain), f'out of memory: {case!r}'
        assert REMEDY.search(str(error)), f'no remedy in {str(error)!r} of {case!r}'
        file = getattr(read, 'file', '')
        assert str(file) in str(error), f'no {file} in {str(error)!r}'
        return True
    except (KeyboardInterrupt, AssertionError):
        raise
    except BaseException as error:  # extensions raise more than Exceptions
        raise AssertionError(f'{type(error).__name__}: {error} of {case!r}') from error
    return False


# Edits

_PLACES = st.one_of(st.integers(0, 400), st.integers(0, 2**20))
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(['flip', 'set', 'insert', 'cut', 'end', 'repeat']),
        _PLACES,
        st.integers(0, 40),
        st.one_of(
            st.binary(max_size=9),
            st.sampled_from(
                [b'\0' * 4, b'\xff' * 4, b'\xff' * 8, b'\x7f\xff\xff\xff', b'9' * 20, b'-1']
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


def _edited(data: bytes, edits: list[Edit]) -> bytes:
    found = bytearray(data)
    for kind, place, size, fill in edits:
        at = place % (len(found) + 1)
        if kind == 'flip' and at < len(found):
            found[at] ^= 1 << size % 8
        elif kind == 'set':
            found[at : at + len(fill)] = fill
        elif kind == 'insert':
            found[at:at] = fill
        elif kind == 'cut':
            del found[at : at + size]
        elif kind == 'end':
            del found[at:]
        elif kind == 'repeat':
            found[at:at] = found[at : at + size] * 50
    return bytes(found)


def _bytes(count: int):
    """(which of `count` whole inputs, edits), or (None, bytes)."""
    edited = st.tuples(st.integers(0, count - 1), _EDITS)
    return st.integers(0, 19).flatmap(
        lambda n: edited if n else st.tuples(st.none(), st.binary(max_size=200))
    )


def _damaged(wholes: list[bytes], case, repair: Callable[[bytes], bytes] = bytes) -> bytes:
    which, edits = case
    return edits if which is None else repair(_edited(wholes[which], edits))


def _reading(file: Path | str, read: Use) -> Use:
    """A reader whose mistakes name the file."""

    def reading():
        read()

    reading.file = file
    return reading


# Images


def _images(directory: Path):
    del directory
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 4), np.uint8)
    photo = Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    wholes = [
        _encoded(photo, 'PNG'),
        _encoded(Image.fromarray(pixels), 'PNG'),
        _encoded(photo.convert('P'), 'PNG', transparency=3),
        _encoded(deep, 'PNG'),
        _encoded(photo, 'JPEG', exif=exif),
        _encoded(photo.convert('CMYK'), 'JPEG'),
        _encoded(photo, 'JPEG', progressive=True),
        _encoded(photo, 'GIF', save_all=True, append_images=[photo.convert('L')]),
        _encoded(photo, 'WEBP'),
        _encoded(Image.fromarray(pixels), 'WEBP', lossless=True),
        _encoded(photo, 'BMP'),
        _encoded(photo.convert('P'), 'BMP'),
        _encoded(photo, 'TIFF', compression='tiff_lzw'),
        _encoded(deep, 'TIFF'),
        _encoded(photo, 'PPM'),
        _encoded(photo, 'JPEG2000'),
    ]

    def use(case):
        (which, edits), channels, repaired = case
        repair = _repaired_png if repaired and which is not None and which < 4 else bytes
        data = _damaged(wholes, (which, edits), repair)

        def read():
            image = datasets.decode(data, channels)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == channels

        return read

    return st.tuples(_bytes(len(wholes)), st.sampled_from([1, 3, 4]), st.booleans()), use


def _encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _repaired_png(data: bytes) -> bytes:
    """With right CRCs, so that what they protect is read."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        size = min(int.from_bytes(data[at : at + 4], 'big'), len(data) - at - 12)
        body = data[at + 4 : at + 8 + size]
        parts += [data[at : at + 4], body, struct.pack('>I', zlib.crc32(body))]
        at += 12 + size
    return b''.join(parts)


# Configs

_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), st.text(max_size=8),
        st.sampled_from([10**400, -1, 0, 'relu', 'name', '(', '(?:a{9999}){9999}', 'x' * 3000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6) | st.just('name'), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
_CHANGES = st.lists(
    st.tuples(st.sampled_from(['set', 'delete', 'add']), st.integers(0, 500), _JSON),
    min_size=1,
    max_size=4,
)


def _whole_configs() -> list[config_lib.ConfigDict]:
    found = []
    for fields in (
        [],
        [('model.name', 'mlp'), ('optimizer.name', 'adamw'), ('data.classes', '(1, 2)')],
        [('model.name', 'resnet20'), ('schedule.name', 'step'), ('schedule.boundaries', '(1, 2)')],
        [
            ('augment', "[{'name': 'flip'}, {'name': 'cutout'}, {'name': 'mixup'}]"),
            ('loss.name', 'focal'),
        ],
        [('model.name', 'knn'), ('optimizer.name', 'sgd')],
    ):
        config = config_lib.get_config()
        config_lib.apply_overrides(config, fields, experiment.TABLES)
        found.append(experiment.resolve(config))
    return found


def _configs(directory: Path):
    wholes = [config_lib.to_json(config).encode() for config in _whole_configs()]
    path = directory / 'config.json'
    changed = st.tuples(st.just('changes'), st.integers(0, len(wholes) - 1), _CHANGES)
    edited = st.tuples(st.just('edits'), _bytes(len(wholes)), st.none())

    def use(case):
        kind, first, changes = case
        if kind == 'changes':
            value = json.loads(wholes[first])
            for change in changes:
                _change(value, *change)
            path.write_text(json.dumps(value))
        else:
            path.write_bytes(_damaged(wholes, first))
        return read

    def read():
        try:
            config = workdir.read_config(directory)
        except UserError as error:
            assert str(path) in str(error)
            raise
        experiment.resolve(config)

    return changed | edited, use


def _change(value, kind: str, place: int, new):
    """Sets, deletes or adds one of all fields."""
    places = list(_places(value))
    node, key = places[place % len(places)]
    if kind == 'delete':
        del node[key]
    elif kind == 'add' and isinstance(node, dict):
        node[f'{key}{place % 7}' if place % 2 else 'lock'] = new
    else:
        node[key] = new


def _places(value) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


_NAMES = [*experiment.TABLES['model'], *experiment.TABLES['optimizer'], *experiment.TABLES['loss']]
_FIELDS = [
    'augment', 'augment[0].padding', 'augment[0].name', 'augment[1].name', 'model.name', 'loss.name',
    'optimizer.name', 'schedule.name', 'model.hidden', 'model', 'data.name', 'data.mean', 'data.classes',
    'data.train', 'seed', 'epochs', 'batch_size', 'freeze', 'learning_rate', 'precision', 'seeds',
    'data.image_size', 'model.init_from', 'clip_norm', 'loss.label_smoothing', 'optimizer.momentum',
]  # fmt: skip
_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(_NAMES),
    _JSON.map(repr),
    st.sampled_from([
        '', '0x' + 'f' * 5000, '9' * 5000, '[' * 300, '(' * 99 + ')' * 99, "[{'name': 'flip'}]",
        "[{'name': 'flip', 1: 2}]", "[{'name': ['flip']}]", "[{'name': 'pad_crop', 'padding': -1}]",
        '1e999', '-0.0', 'None', 'b"x"', '{1}', '1j', '...', 'a{99999999999}', '(' * 5000,
    ]),
)  # fmt: skip


def _overrides(directory: Path):
    del directory
    paths = st.one_of(
        st.sampled_from(_FIELDS),
        st.tuples(st.sampled_from(_FIELDS), _EDITS).map(
            lambda pair: _edited(pair[0].encode(), pair[1]).decode('utf-8', 'surrogateescape')
        ),
        st.text(max_size=12),
        st.sampled_from(
            ['augment[²].padding', f'augment[{"9" * 5000}].name', 'augment[-1].name', '..', 'lock']
        ),
    )

    def use(overrides):
        def read():
            config = config_lib.get_config()
            config_lib.apply_overrides(config, overrides, experiment.TABLES)
            experiment.resolve(config)

        return read

    return st.lists(st.tuples(paths, _TEXTS), min_size=1, max_size=4), use


# Weights and data sets


def _safetensors(directory: Path):
    arrays = {
        'params/head/kernel': np.arange(12, dtype=np.float32).reshape(3, 4),
        'params/head/bias': np.zeros(4, jnp.bfloat16),
        'steps': np.array([3], np.int64),
    }
    metadata = {'mean': '[0.5]', 'std': '[0.25]', 'class_names': '["a", "b"]'}
    wholes = []
    for i, known in enumerate((metadata, {}, {'mean': '[' * 5000, 'class_names': '[' * 5000})):
        weight_files.write(directory / f'{i}.safetensors', arrays, known)
        wholes.append((directory / f'{i}.safetensors').read_bytes())
    path = directory / 'weights.safetensors'

    def use(case):
        (which, edits), repaired = case
        path.unlink(missing_ok=True)  # an opened file is mapped: it is not to change
        path.write_bytes(_damaged(wholes, (which, edits), _repaired_header if repaired else bytes))
        return _reading(path, read)

    def read():
        for tensor in weight_files.read(path).state.values():
            assert tensor.read().shape == tensor.shape

    return st.tuples(_bytes(len(wholes)), st.booleans()), use


def _repaired_header(data: bytes) -> bytes:
    """With the right length of the header, so that it is parsed."""
    end = data.rfind(b'}') + 1
    return struct.pack('<Q', max(end - 8, 0)) + data[8:]


def _npz(directory: Path):
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 4), np.uint8)
    labels = np.arange(20) % 3
    split = {'x_train': images, 'y_train': labels, 'x_test': images[:6], 'y_test': labels[:6]}
    named = {**split, 'class_names': np.array(['a', 'b', 'c'])}
    logits = {'logits': np.zeros((6, 3), np.float32), 'label': labels[:6].astype(np.int32)}
    wholes = [_zipped(save, arrays) for save, arrays in itertools.product(
        (np.savez, np.savez_compressed), (split, named, logits)
    )]  # fmt: skip
    path = directory / 'data.npz'

    def use(case):
        (which, edits), inner = case
        if which is not None and inner >= 0:
            path.write_bytes(_edited_member(wholes[which], inner, edits))
        else:
            path.write_bytes(_damaged(wholes, (which, edits)))
        return _reading(path, read_logits if which in (2, 5) else read_split)

    def read_split():
        found = datasets.load(f'npz:{path}', 'train')
        for i in (0, -1):
            image, label = found.source[i]
            assert image.shape == found.shape and 0 <= label < len(found.class_names)

    def read_logits():
        found = predictions.load(path)
        assert len(found.logits) == len(found.label)

    return st.tuples(_bytes(len(wholes)), st.integers(-2, 4)), use


def _zipped(save: Callable, arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def _edited_member(data: bytes, which: int, edits: list[Edit]) -> bytes:
    """An archive with right CRCs of one array that is damaged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, 'w') as new:
        for i, entry in enumerate(old.infolist()):
            content = old.read(entry)
            new.writestr(
                entry, _edited(content, edits) if i == which % len(old.infolist()) else content
            )
    return buffer.getvalue()


# Checkpoints


def _checkpoints(directory: Path):
    saved = workdir.Checkpoints(directory, keep=3)
    trees = {
        step: {'w': jnp.arange(12.0).reshape(3, 4) + step, 'step': jnp.int32(step)}
        for step in (1, 2)
    }
    for step, tree in trees.items():
        saved.save(step, tree, {'top1': 0.5})
    saved.close()
    place = sharding.replicated(sharding.make_mesh())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), trees[1]
    )
    files = sorted(
        p for p in (directory / 'checkpoints').rglob('*') if p.is_file() and p.parent.name != 'd'
    )
    wholes = [path.read_bytes() for path in files]

    def use(case):
        for path, whole in zip(files, wholes, strict=True):
            if path.read_bytes() != whole:
                path.write_bytes(whole)
        for which, edits in case:
            data = edits if isinstance(edits, bytes) else _edited(wholes[which], edits)
            files[which].write_bytes(data)
        return _reading(directory, read)

    def read():
        opened = workdir.Checkpoints(directory, keep=3, read_only=True)
        try:
            found = opened.restore(like)
        finally:
            opened.close()
        for key, leaf in trees[found.step].items():
            np.testing.assert_array_equal(found.tree[key], leaf)

    damage = st.tuples(st.integers(0, len(files) - 1), _EDITS | st.binary(max_size=200))
    return st.lists(damage, min_size=1, max_size=4), use


KINDS = {
    'images': _images,
    'configs': _configs,
    'overrides': _overrides,
    'safetensors': _safetensors,
    'npz': _npz,
    'checkpoints': _checkpoints,
}
ROWS = (
    Row(
        11,
        '{count} damaged images, configs, overrides, safetensors, npz, checkpoint metadata each',
        check,
        full=1000,
        share=20,
    ),
)
