"""The shipped configs, each trained three times by the same seed in processes of their own.

`python -m tests.faults.repeats CONFIG DIRECTORY` is one such process: ten steps, then a hash of the
state. All that differs from the config as it is shipped are its data and what they make necessary.
But for the digits, images are noise of the right shape and number of classes, in an npz file or a
folder of JPEGs, so that the row runs anywhere; a batch has 8 of them, or 2 where they are large; readers
are 2 processes; a baseline has 20 images a class. Weights to start from are those of one step of the
same config from fresh ones (of transfer_source, for transfer_target).
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fit, results, sweep
from jaxcls import workdir as workdir_lib

from . import launch
from .rows import Row

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path for path in (ROOT / 'experiments').glob('*.py') if 'get_config' in path.read_text()
)
# Those that take seconds; the default test suite draws from them.
SMALL = ('lenet_digits',)
STEPS, PROCESSES = 10, 3
FLAG = 'XLA_FLAGS=--xla_gpu_deterministic_ops=true'
# Of noise: image shape, classes, training images of each.
_ARRAYS = {'tfds:mnist': ((28, 28), 10, 120), 'tfds:cifar10': ((32, 32, 3), 10, 120)}
_FOLDERS = {'tfds:imagenet2012': ((240, 256, 3), 1000, 1), 'folder:photos': ((150, 140, 3), 10, 8)}


def _noise(shape, classes: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(classes), each)
    return rng.integers(0, 256, (len(labels), *shape), np.uint8), labels


def _write_arrays(path: Path, name: str):
    images, labels = _noise(*_ARRAYS[name])
    np.savez(path, x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])


def _write_folder(path: Path, name: str):
    (*size, channels), classes, each = _FOLDERS[name]
    images, labels = _noise((16, 16, channels), classes, each)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        for split in ('train', 'val')[: 2 if i < classes else 1]:
            file = path / split / f'{label:04}' / f'{i}.jpg'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize(size[::-1]).save(file)


def prepared(path: Path, directory: Path) -> ConfigDict:
    """A shipped config on data that are made here."""
    config = config_lib.load_file(path)
    name = config.data.name
    if name in _ARRAYS:
        _write_arrays(directory / 'data.npz', name)
        config.data.name = f'npz:{directory / "data.npz"}'
        config.data.train = re.sub(r'\[:\d+\]', '', config.data.train)  # it has more than there are
    elif name in _FOLDERS:
        _write_folder(directory / 'data', name)
        config.data.name, config.data.validation = f'folder:{directory / "data"}', 'val'
    config.data.per_class = min(config.data.per_class, 20)
    config.data.workers = min(config.data.workers, 2)
    if not experiment_lib.is_baseline(config):
        large = config.model.name.startswith(('resnet50', 'wrn', 'airbench'))
        config.batch_size = 2 if large else 8
        config.log_every_steps = 1
    return config


def _train(config: ConfigDict, workdir: Path, steps: int):
    """The state after some steps of a network, and its log, of each seed; the predictions of a baseline."""
    resolved = experiment_lib.resolve(config)
    if experiment_lib.is_baseline(resolved):
        fit(config, workdir)
        with np.load(workdir / 'predictions.npz') as found:
            return dict(found), []
    examples = len(experiment_lib.open_data(resolved).reader.split.source)
    outcome = sweep.fit_seeds(config, workdir, until_epoch=steps * config.batch_size / examples)
    assert outcome.stopped == 'paused', outcome.stopped
    runs = results.member_directories(workdir, resolved)
    states = [launch.restored(run) for run in runs]
    assert {int(state.step) for state, _ in states} == {steps}
    logs = [workdir_lib.read_metrics(run) for run in runs]
    return states, [[record['loss'] for record in log] for log in logs]


def _digest(tree) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.update(f'{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}'.encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def once(path: Path, directory: Path) -> dict[str, str]:
    """Trains a config for ten steps: the hash of what comes out, and on what it ran."""
    config = prepared(path, directory)
    if config.model.get('init_from'):
        other = path.with_stem('transfer_source') if path.stem == 'transfer_target' else path
        source = prepared(other, directory)
        source.model = {**source.model.to_dict(), 'init_from': '', 'norm': 'batch'}
        _train(source, directory / 'source', 1)
        config.model.init_from = str(directory / 'source')
    state, losses = _train(config, directory / 'run', STEPS)
    digest = hashlib.sha256(f'{_digest(state)} {losses}'.encode()).hexdigest()
    return {'hash': digest, 'backend': jax.default_backend()}


def _in_processes(path: Path, places: list[Path]) -> list[dict[str, str]]:
    """`once` in fresh processes, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(functools.partial(_in_a_process, path), places))


def _in_a_process(path: Path, directory: Path) -> dict[str, str]:
    directory.mkdir(parents=True)
    # Nothing is shared: no compiled programs, no decoded images.
    more = {
        'JAXCLS_CACHE': str(directory / 'cache'),
        'JAX_NUM_CPU_DEVICES': '1',
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }
    words = [sys.executable, '-m', 'tests.faults.repeats', str(path), str(directory)]
    pipes = {'capture_output': True, 'text': True}
    ended = subprocess.run(words, cwd=ROOT, env={**os.environ, **more}, **pipes)
    assert ended.returncode == 0, f'{path.stem}: {ended.stderr[-2000:]}'
    return json.loads(ended.stdout.splitlines()[-1])


def repeats(count: int, seed: int, directory: Path) -> str:
    """Ten steps of each config, three times in fresh processes, end in the same bits on CPU."""
    processes = PROCESSES if count > 1 else 2
    small = [path for path in CONFIGS if path.stem in SMALL]
    random.Random(seed).shuffle(small)
    chosen = CONFIGS if count >= len(CONFIGS) else small[:count]
    different, backends = [], set()
    for path in chosen:
        places = [directory / path.stem / str(i) for i in range(processes)]
        found = _in_processes(path, places)
        backends |= {each['backend'] for each in found}
        if len({each['hash'] for each in found}) > 1:
            different.append(path.stem)
    backend = backends.pop()
    exact = backend == 'cpu' or 'xla_gpu_deterministic_ops=true' in os.environ.get('XLA_FLAGS', '')
    assert not (different and exact), f'{", ".join(different)} differ on {backend}'
    note = f'; {", ".join(different)} differ without {FLAG}' if different else ''
    equal = len(chosen) - len(different)
    return f'{equal} of {len(chosen)} configs the same in {processes} processes on {backend}{note}'


ROWS = (
    Row(
        16,
        f'{{count}} of {len(CONFIGS)} configs, {STEPS} steps, {PROCESSES} times the same seed',
        repeats,
        full=len(CONFIGS),
        share=1,
    ),
)

if __name__ == '__main__':
    print(json.dumps(once(Path(sys.argv[1]), Path(sys.argv[2]))))
