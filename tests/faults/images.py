"""A folder some of whose images are damaged, in training and in evaluation."""

import io
import multiprocessing
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from jaxcls import UserError, evaluate, fit, get_config, results, verify

from .rows import Row

_WAYS = {'resident': ('resident', 0), 'stream': ('stream', 0), 'workers': ('stream', 2)}
_MEMORY = 300  # megabytes above those of the same run on the undamaged folder


def bad_images(count: int, seed: int, directory: Path) -> str:
    """An epoch on an undamaged and on a damaged folder in each way, then evaluations."""
    clean, damaged, runs = directory / 'clean', directory / 'damaged', directory / 'runs'
    bad = _write_folders(clean, damaged, count, np.random.default_rng(seed))
    with mock.patch.dict(os.environ, JAXCLS_CACHE=str(directory / 'cache')):
        # Worker processes take seconds to start: a share leaves them to tests/test_pipeline.py.
        ways = [way for way in _WAYS if way != 'workers' or count >= 1000]
        normal = {way: _train(clean, way, directory / 'normal', count) for way in ways}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            used = {way: _train(damaged, way, runs, count - len(bad)) for way in ways}
        _assert_named_once(bad, [str(warning.message) for warning in seen])
        above = np.max([np.subtract(used[way], normal[way]) for way in ways], axis=0)
        assert above.max() < _MEMORY, (used, normal)
        _assert_budget(damaged, directory, count, bad)
        _assert_evaluation(damaged, runs)
    memory = f'{above[0]:+.0f} MB' + (f', workers {above[1]:+.0f} MB' if 'workers' in ways else '')
    return f'{len(bad)} left out and named once, {len(ways)} ways equal, memory {memory}'


def _assert_named_once(bad: list[str], said: list[str]):
    assert len(said) == len(bad), said
    for path in bad:
        assert sum(path in message for message in said) == 1, (path, said)


def _train(folder: Path, way: str, runs: Path, good: int) -> tuple[float, float]:
    """An epoch, which sees each good image once; the growth to its peak in MB, and workers' peaks."""
    workers = [0.0]

    def watch(event):
        if event['kind'] == 'validation':
            workers.extend(_memory(child.pid, 'HWM') for child in multiprocessing.active_children())

    # Not `getrusage`, which starts at the peak of the process that started this one.
    Path('/proc/self/clear_refs').write_text('5')
    before = _memory('self', 'RSS')
    result = fit(_config(folder, way), runs / way, watch, until_epoch=1)
    growth = _memory('self', 'HWM') - before
    records = results.of_kind(result.records, 'train')
    assert sum(record['examples'] for record in records) == good, (way, records)
    assert not sum(record['bad_steps'] for record in records), (way, records)
    found = verify.differences(runs / 'resident', runs / way)
    assert not found, (way, found)
    return growth, max(workers)


def _memory(process: int | str, kind: str) -> float:
    """Of a process now ('RSS') or at its peak ('HWM'), in MB."""
    lines = Path(f'/proc/{process}/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f'Vm{kind}'))


def _config(folder: Path, way: str, max_bad_images: float = 0.1):
    config = get_config()
    config.model = {'name': 'linear'}
    config.update(batch_size=8, epochs=2.0)
    pipeline, workers = _WAYS[way]
    config.data.update(
        name=f'folder:{folder}', validation='val', image_size=16, pipeline=pipeline,
        workers=workers, max_bad_images=max_bad_images,
    )  # fmt: skip
    return config


def _assert_budget(folder: Path, place: Path, count: int, bad: list[str]):
    """A budget that is too small ends in one message, of a resident split before it is compiled."""
    for way in ('resident', 'stream'):
        compiled = []

        def watch(event, compiled=compiled):
            compiled.append(event['kind'] == 'compiled')

        message = _refusal(lambda way=way: fit(_config(folder, way, 0.01), place / way, watch))
        met = int(message.split()[0])
        assert met == len(bad) if way == 'resident' else count // 100 < met <= len(bad), message
        assert f'{met} of {count:,} images cannot be decoded' in message, message
        assert f'max_bad_images=0.01 allows {count // 100}:' in message, message
        assert sum(path in message for path in bad) == min(met, 10), message
        assert not (way == 'resident' and any(compiled)), 'compiled first'


def _assert_evaluation(folder: Path, runs: Path):
    path = next((folder / 'val').rglob('*.png'))
    path.write_bytes(path.read_bytes()[:100])
    for way in ('resident', 'stream'):
        message = _refusal(lambda way=way: evaluate(runs / way))
        assert str(path) in message and 'leaves none out' in message, message


def _refusal(act: Callable) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    raise AssertionError('it went on')


def _write_folders(clean: Path, damaged: Path, count: int, rng: np.random.Generator) -> list[str]:
    """Two folders alike, but for a tenth of the second's training images; those that are no images."""
    chosen, bad = {int(i) for i in rng.permutation(count)[: count // 10]}, []
    kinds = _kinds(rng)
    for i in range(count + 10):
        place = f'{"train" if i < count else "val"}/class{i % 2}/{i}.png'
        data = _encode(_photo(rng), 'PNG')
        for root in (clean, damaged):
            path = root / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if i in chosen:
            content, is_bad = next(kinds)
            path.write_bytes(content)
            bad += [str(path)] if is_bad else []
    return bad


def _kinds(rng: np.random.Generator) -> Iterator[tuple[bytes, bool]]:
    """One file after another of each kind, and whether it is bad, without end."""
    bomb = _header(20_000, 20_000, zlib.compress(bytes(20_000 * 2_501), 1))
    while True:
        photo = _photo(rng)
        png, jpeg = _encode(photo, 'PNG'), _encode(photo, 'JPEG')
        yield png[:41] + bytes(2) + rng.bytes(38) + png[81:], True
        yield jpeg[: len(jpeg) // 2], True
        yield b'', True
        yield b'<!DOCTYPE html><title>404 Not Found</title>', True
        yield _header(0, 0, b''), True
        yield bomb, True
        yield _encode(Image.fromarray(rng.integers(0, 2**16, (24, 24), np.uint16)), 'PNG'), False
        yield _encode(photo.convert('CMYK'), 'JPEG'), False
        frames = [_photo(rng) for _ in range(3)]
        yield _encode(photo, 'GIF', save_all=True, append_images=frames), False
        yield _encode(photo.convert('P'), 'PNG', transparency=0), False


def _photo(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))


def _encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _header(width: int, height: int, content: bytes) -> bytes:
    """A PNG of one bit a pixel."""

    def chunk(kind, data):
        checksum = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + checksum

    ihdr = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + ihdr + chunk(b'IDAT', content) + chunk(b'IEND', b'')


ROWS = (Row(10, 'a tenth of a folder of {count} images damaged', bad_images, full=1000, share=120),)
