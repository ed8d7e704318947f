"""States that move between numbers of devices, and runs of two processes that lose one of them."""

import contextlib
import itertools
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fingerprints, sharding, workdir

from . import launch
from .rows import Row

SIZES = (1, 2, 4, 8)
SURVIVOR_SECONDS = 30
# A process that is killed before they have met has never come: the other waits so long for it.
_START_SECONDS = 15
_FIELDS = {'epochs': '2', 'validate_every_epochs': '2', 'log_every_steps': '2'}  # 38 steps
# The command line, whose processes all say from which step they go on.
TELLING = f"""
from jaxcls import console

shown = console.Reporter.__call__

def tell(self, event):
    if event['kind'] == 'start':
        print('starts at step', event['step'], flush=True)
    shown(self, event)

console.Reporter.__call__ = tell
{launch.PROGRAM}
"""


def _experiment(**fields):
    """A network one of whose kernels fsdp splits, with all that a state can have."""
    config = config_lib.get_config()
    config.update(precision='bfloat16', ema_decay=0.9, **fields)
    config.model = {'name': 'mlp', 'hidden': (256,), 'norm': 'batch'}
    return experiment_lib.build(experiment_lib.resolve(config), (8, 8, 1), 10, 100)


def _filled(like, seed: int):
    """Arrays of every shape, dtype and placement in `like`; any bits will do."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.key(seed)
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            value = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        else:
            value = rng.integers(0, 1000, leaf.shape).astype(leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    return jax.tree.map(fill, like)


def _bits(tree) -> dict[str, bytes]:
    """The bytes of every array."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _splits(tree, devices: int, placement: str) -> int:
    """How many arrays are split: into as many equal parts as there are devices, under fsdp alone."""
    parts = [leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree)]
    split = [part for part in parts if part > 1]
    assert set(split) <= {devices}, f'{split} parts on {devices} devices'
    assert bool(split) == (placement == 'fsdp' and devices > 1), f'{len(split)} under {placement}'
    return len(split)


def moves(count: int, seed: int, directory: Path) -> str:
    """A state is saved on some devices and restored on others: the same bits."""
    cases = list(itertools.product(config_lib.PLACEMENTS, SIZES, SIZES))
    random.Random(seed).shuffle(cases)
    saved, most = {}, 0
    for placement, before, after in sorted(cases[:count]):
        experiment = _experiment(parameters=placement)
        path = directory / f'{placement}-{before}'
        if path not in saved:
            like = experiment_lib.abstract_checkpoint(experiment, _mesh(before))
            tree = _filled(like, seed)
            most = max(most, _splits(tree, before, placement))
            with contextlib.closing(workdir.Checkpoints(path)) as checkpoints:
                checkpoints.save(1, tree)
                checkpoints.wait()
            saved[path] = fingerprints.manifest(tree), _bits(tree)
        like = experiment_lib.abstract_checkpoint(experiment, _mesh(after))
        with contextlib.closing(workdir.Checkpoints(path)) as checkpoints:
            restored = checkpoints.restore(like)
        case = f'{placement}, {before} to {after} devices'
        _splits(restored.tree, after, placement)
        assert (fingerprints.manifest(restored.tree), _bits(restored.tree)) == saved[path], case
        for leaf, wanted in zip(jax.tree.leaves(restored.tree), jax.tree.leaves(like), strict=True):
            assert leaf.sharding == wanted.sharding, case
    return f'{len(cases[:count])} of {len(cases)} moves: the same bits, up to {most} arrays split'


def _mesh(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(jax.devices()[:devices])


def _command(path: Path) -> list[str]:
    return launch.command(path, **_FIELDS)


def _start(path: Path, number: int, port: int, tell: bool, timeout: int) -> subprocess.Popen:
    """One of two processes of the small run."""
    words = _command(path)
    if tell:
        words[1:3] = ['-c', TELLING]
    variables = {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(number),
        'JAXCLS_START_TIMEOUT': str(timeout),
    }
    return launch.start(words, variables)


def _pair(path: Path, tell: bool, timeout: int) -> list[subprocess.Popen]:
    port = _free_port()
    return [_start(path, number, port, tell, timeout) for number in range(2)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def _finish(path: Path) -> int:
    """Both processes start or go on, and end well; the step that they agreed on."""
    steps = set()
    for process in _pair(path, tell=True, timeout=120):
        status, out, err = launch.end(process)
        assert (status, err) == (0, ''), (status, err)
        steps.add(int(out.partition('starts at step ')[2].split()[0]))
    assert len(steps) == 1, f'they start at steps {steps}'
    return steps.pop()


def lost(count: int, seed: int, directory: Path) -> str:
    """One of two processes is killed, anywhere or while the other waits for it; the other says so.

    Where it is done more than once, both go on, and a copy of the run as one process.
    """
    random_, begin = random.Random(seed), time.monotonic()
    if count == 1:
        killed = _kill(directory / 'run', seed % 2, 'blocked', 0, random_)
        return f'1 kill, told in {killed.seconds:.1f} s'
    whole = directory / 'whole'
    assert _finish(whole) == 0
    seconds, i, slowest, resumed = time.monotonic() - begin, 0, 0.0, []
    while len(resumed) < count:
        path, alone = directory / f'run{i}', directory / f'alone{i}'
        kind = ('blocked', 'any time', 'training')[len(resumed) % 3]
        killed = _kill(path, (len(resumed) + seed) % 2, kind, seconds, random_)
        i += 1
        if not killed:  # it ended before
            continue
        slowest = max(slowest, killed.seconds)
        path.mkdir(exist_ok=True)
        shutil.copytree(path, alone)
        resumed.append(_finish(path))
        launch.assert_same(whole, path)
        assert _bits(launch.restored(whole)) == _bits(launch.restored(path))
        _go_on_alone(alone, resumed[-1], whole)
    _never_starts(directory / 'unused')
    steps = ', '.join(map(str, resumed))
    return (
        f'{count} kills, told in {slowest:.1f} s; both go on from {steps} to the same bits, and one '
        'alone too'
    )


class _Killed(NamedTuple):
    """How one process was lost: the exit status of the other, and how long that took to end."""

    status: int
    seconds: float


def _kill(
    path: Path, victim: int, kind: str, seconds: float, random_: random.Random
) -> _Killed | None:
    """Kills one of two processes, and checks how the other ends; None where both had ended before."""
    pair = _pair(path, tell=False, timeout=_START_SECONDS)
    last = random_.randrange(1, 30)
    moment = time.monotonic() + random_.uniform(0, seconds)
    reached = (
        (lambda: time.monotonic() > moment)
        if kind == 'any time'
        else (lambda: launch.logged(path) >= last)
    )
    alive = launch.wait_until(reached, pair[victim])
    if alive and kind == 'blocked':
        pair[victim].send_signal(signal.SIGSTOP)
        time.sleep(1)  # the other now waits for it in a collective operation
    launch.kill(pair[victim])
    begin = time.monotonic()
    status, _, err = launch.end(pair[1 - victim])
    killed = _Killed(status, time.monotonic() - begin)
    if not alive or status == 0:
        return None
    known = {
        75: 'repeat the command in every process',
        -signal.SIGABRT: 'another task died',  # JAX's own message
        2: 'did not meet within',
    }
    assert known.get(status, 'no such status') in err, (killed, err)
    assert 'Traceback' not in err, err
    assert killed.seconds < SURVIVOR_SECONDS, killed
    return killed


def _go_on_alone(path: Path, step: int, whole: Path):
    """The run goes on as one process, from the same step, to nearly the same numbers."""
    status, out, err = launch.run(_command(path))
    assert (status, err) == (0, ''), (status, err)
    found = f'Resuming after step {step}.' in out
    assert found == (step > 0), out
    ends = [workdir.read_metrics(p)[-1] for p in (whole, path)]
    assert ends[0]['step'] == ends[1]['step'] and abs(ends[0]['loss'] - ends[1]['loss']) < 0.02


def _never_starts(path: Path):
    """The first process, and the second, wait for the other in vain."""
    waiting = [_start(path, i, _free_port(), tell=False, timeout=2) for i in range(2)]
    for number, process in enumerate(waiting):
        status, _, err = launch.end(process)
        assert status == 2 and 'did not meet within 2 s' in err, (number, status, err)


ROWS = (
    Row(6, 'saved and restored on 1, 2, 4, 8 devices, {count} moves', moves, full=32, share=4),
    Row(7, 'one of two processes killed, {count} times', lost, full=6, share=1),
)
