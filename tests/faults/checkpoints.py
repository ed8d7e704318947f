"""Checkpoints that are damaged, all of them, and those of an earlier version."""

import random
import re
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import UserError, evaluate, fingerprints, fit, workdir

from .rows import Row

EARLIER = Path(__file__).parent / 'earlier'


def _tree(seed: int):
    rng = np.random.default_rng(seed)
    return {
        'kernel': jnp.asarray(rng.standard_normal((64, 33)), jnp.float32),
        'scale': jnp.asarray(rng.standard_normal(33), jnp.bfloat16),
        'step': jnp.int32(seed),
        'key': jax.random.key(seed),
    }


def _like():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), _tree(0)
    )


def _save(directory: Path, steps) -> dict[int, dict]:
    """Saves a tree at each step; returns their manifests."""
    checkpoints = workdir.Checkpoints(directory, keep=9)
    for step in steps:
        checkpoints.save(step, _tree(step))
    checkpoints.wait()
    checkpoints.close()
    return {step: fingerprints.manifest(_tree(step)) for step in steps}


def _files(directory: Path, step: int) -> list[Path]:
    found = (directory / 'checkpoints' / str(step)).rglob('*')
    return sorted(path for path in found if path.is_file())


def damage(path: Path, how: str, random_: random.Random):
    """Damages a file."""
    data = bytearray(path.read_bytes())
    if how == 'delete':
        path.unlink()
        return
    if how == 'flip' and data:
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
    elif how == 'truncate':
        del data[random_.randrange(len(data) + 1) :]
    elif how == 'empty':
        data = b''
    elif how == 'zero':
        data = bytes(len(data))
    path.write_bytes(data)


def _restore(directory: Path):
    """What is restored, and the warnings."""
    checkpoints = workdir.Checkpoints(directory, keep=9)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            restored = checkpoints.restore(_like())
    finally:
        checkpoints.close()
    return restored, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def corruptions(count: int, seed: int, directory: Path) -> str:
    """One file of the newest of two steps is flipped, cut, emptied, zeroed or deleted."""
    random_ = random.Random(seed)
    manifests = _save(directory / 'good', (1, 2))
    harmless = set_aside = 0
    for i in range(count):
        path = directory / f'bad{i}'
        shutil.copytree(directory / 'good', path)
        file = random_.choice(_files(path, 2))
        how = random_.choice(['flip', 'truncate', 'empty', 'zero', 'delete'])
        damage(file, how, random_)
        restored, messages = _restore(path)
        what = f'{how} {file.relative_to(path)} (number {i}): {messages}'
        assert restored, f'lost: {what}'
        assert fingerprints.manifest(restored.tree) == manifests[restored.step], f'wrong: {what}'
        if restored.step == 2:
            assert not messages, what
            harmless += 1
        else:
            assert len(messages) == 1, what
            assert re.match(r'Checkpoint of step 2 is damaged \(.+\); it is now', messages[0]), what
            assert any((path / 'checkpoints').parent.glob('damaged-2-*')), what
            set_aside += 1
        shutil.rmtree(path)
    return f'{set_aside} set aside for the step before, {harmless} harmless, none wrong, none lost'


def all_bad(count: int, seed: int, directory: Path) -> str:
    """A file of every step of a run is damaged, or all steps are gone from a run that had ended."""
    from .runs import _forty_steps

    random_, config = random.Random(seed), _forty_steps()
    fit(config, directory / 'good')
    for i in range(count):
        path = directory / f'bad{i}'
        shutil.copytree(directory / 'good', path)
        steps = sorted(int(p.name) for p in (path / 'checkpoints').iterdir() if p.name.isdigit())
        for step in steps:
            kind = random_.choice(['manifest', 'd'])
            files = [f for f in _files(path, step) if f.parent.name == kind]
            for file in files:
                damage(file, random_.choice(['empty', 'zero', 'delete']), random_)
        log = (path / 'metrics.jsonl').read_text()
        try:
            fit(config, path)
        except UserError as error:
            assert 'No intact checkpoint that fits' in str(error), error
        else:
            raise AssertionError(f'it started without an intact checkpoint (number {i})')
        assert (path / 'metrics.jsonl').read_text() == log
        assert not list(path.glob('damaged-*')), 'renamed although nothing was found to restore'
    shutil.rmtree(directory / 'good' / 'checkpoints')
    try:
        fit(config, directory / 'good')
    except UserError as error:
        assert 'checkpoints are gone' in str(error)
    else:
        raise AssertionError('an ended run without checkpoints started again')
    return f'{count} runs without an intact step refused, each by one message'


def earlier(count: int, seed: int, directory: Path) -> str:
    """Frozen workdirs, named after commits, are evaluated as they were then, and go on to the same end.

    Each was stopped after step 7 of 13; expected.json is the result that it had when it was not. The
    checkpoints of TensorStore are the same on any machine; sums may be rounded otherwise.
    """
    paths = sorted(EARLIER.iterdir())[:count]
    for frozen in paths:
        path = directory / frozen.name
        shutil.copytree(frozen, path)
        expected = workdir.read_json(path / 'expected.json')
        (path / 'expected.json').unlink()
        [then] = [
            r for r in workdir.read_metrics(path) if r['kind'] == 'validation' and r['step'] == 7
        ]
        assert abs(evaluate(path)['loss'] - then['loss']) < 1e-4, frozen
        result = fit(workdir.read_config(path), path)
        assert int(result.state.step) == expected['step'] == 13
        assert abs(result.metrics['loss'] - expected['loss']) < 1e-2, frozen
    return f'{len(paths)} workdirs evaluated as then, and run to the same end'


ROWS = (
    Row(4, '{count} corruptions of the newest checkpoint', corruptions, full=1000, share=12),
    Row(5, 'every checkpoint bad, {count} times', all_bad, full=50, share=2),
    Row(14, 'workdirs of {count} earlier versions', earlier, full=9, share=9),
)
