"""A disk that is full while a run saves, logs or keeps decoded images."""

import os
import random
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from . import launch
from .rows import Row

# (name, the largest file that the run may write, fields): the log and TensorBoard's events reach their
# limit after some hundred steps, a checkpoint of a wide network its own at once.
_LIMITS = {
    'logging': (12_000, {'checkpoint_every_epochs': '4'}),
    'saving': (100_000, {'model__hidden': '(300,)', 'epochs': '2'}),
}


def full_disk(count: int, seed: int, directory: Path) -> str:
    """A limit on the size of files, and where they can be had file systems of a few megabytes."""
    random_ = random.Random(seed)
    seen = []
    for i in range(count):
        name = ['saving', 'logging'][i % 2]
        _file_too_large(directory / f'{name}{i}', name, random_)
        seen.append(name)
    if count >= 4:
        seen += _small_file_systems(directory)
    return ', '.join(f'{n} x{seen.count(n)}' for n in dict.fromkeys(seen)) + ': reported, went on'


def _file_too_large(path: Path, name: str, random_: random.Random):
    limit, fields = _LIMITS[name]
    limit = int(limit * random_.uniform(0.8, 1.2))
    whole = launch.whole(path.with_name(f'whole-{name}'), **fields)  # its programs are kept
    limited = ['bash', '-c', f'ulimit -f {limit // 1024}; exec "$@"', 'bash']
    status, _, err = launch.run([*limited, *launch.command(path, **fields)])
    _assert_reported(status, err, path)
    launch.whole(path, **fields)
    launch.assert_same(whole, path)


def _assert_reported(status: int, err: str, path: Path):
    assert status == 2, (status, err)
    assert err.count('cannot be') == 1 and 'Traceback' not in err, err
    debris = [str(p) for p in path.glob('checkpoints/*tmp*/**/*')]
    assert not debris, f'{debris}: {err}'
    assert not list(path.glob('.*.part')), 'debris'


def _small_file_systems(directory: Path) -> list[str]:
    """As root: a run on a file system that fills up, and images that do not fit the cache."""
    place = directory / 'small'
    place.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', place]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return ['(no tmpfs could be mounted)']
    try:
        return [_full_run(place, directory), _full_cache(place, directory)]
    finally:
        subprocess.run(['umount', '-l', place], check=True)


def _full_run(place: Path, directory: Path) -> str:
    filler = place / 'filler'
    fields = {'model__hidden': '(300, 300)'}
    whole = launch.whole(directory / 'wide', **fields)
    process = launch.start(launch.command(place / 'run', **fields))
    assert launch.wait_until(lambda: any((place / 'run').glob('checkpoints/1*')), process)
    _fill(filler)
    status, _, err = launch.end(process)
    _assert_reported(status, err, place / 'run')
    filler.unlink()
    launch.whole(place / 'run', **fields)
    launch.assert_same(whole, place / 'run')
    return 'full file system'


def _fill(path: Path):
    with path.open('wb', buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def _full_cache(place: Path, directory: Path) -> str:
    rng, photos = np.random.default_rng(0), directory / 'photos'
    for i in range(200):
        folder = photos / 'train' / f'class{i % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).save(folder / f'{i}.png')
    fields = {'data__name': f'folder:{photos}', 'data__train': 'train', 'model__name': 'linear'}
    words = launch.command(directory / 'photo-run', **fields, data__validation='train[:10]')
    words = [word for word in words if not word.startswith(('--config.model.', '--config.augment'))]
    words += ['--config.model.name=linear', '--config.epochs=0.2', '--config.data.mean=(0.5,)']
    words += ['--config.data.std=(0.25,)', '--config.data.image_size=80']
    _fill(place / 'filler')
    env = {**launch.environment(), 'JAXCLS_CACHE': str(place / 'cache')}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and 'JAXCLS_CACHE' in done.stderr, (done.returncode, done.stderr)
    assert 'Traceback' not in done.stderr, done.stderr
    assert not list((place / 'cache' / 'splits').glob('.*.part')), 'debris'
    status, _, err = launch.run(words)
    assert status == 0, err
    return 'full cache'


ROWS = (Row(8, 'disk full while saving, logging, caching, {count} times', full_disk, 8, 1),)
