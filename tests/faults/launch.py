"""Runs in processes of their own, small ones of many steps on the built-in digits."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxcls import experiment as experiment_lib
from jaxcls import sharding, verify, workdir

# Batch statistics, dropout, a moving average, augmentation: all that a state can have. A log line each
# step, and a checkpoint about every tenth.
FIELDS = {
    'model.name': 'mlp',
    'model.hidden': '(32,)',
    'model.norm': 'batch',
    'model.dropout': '0.1',
    'ema_decay': '0.9',
    'augment': "[{'name': 'pad_crop', 'padding': 1}]",
    'data.train': 'train[:300]',
    'data.validation': 'test[:100]',
    'batch_size': '16',
    'epochs': '4',
    'log_every_steps': '1',
    'checkpoint_every_epochs': '0.5',
    'validate_every_epochs': '1',
}
# The command line, but for what takes seconds at the end of each run, most of them to import packages.
PROGRAM = """
from jaxcls import main, predictions, results

results._draw = lambda *args: None
predictions.ranking = lambda found: {'roc_auc': [], 'average_precision': []}
predictions.temperature = lambda found: 1.0
main.console()
"""
# Programs are compiled once for all runs; in tests, for all sessions.
_OWN = tempfile.TemporaryDirectory(prefix='jaxcls-faults-')
CACHE = Path(_OWN.name)


def command(directory: Path, *words: str, **fields: str) -> list[str]:
    """A `jaxcls train` of the small run; a field's dots are written as two underscores."""
    named = {key.replace('__', '.'): value for key, value in fields.items()}
    values = [f'--config.{key}={value}' for key, value in {**FIELDS, **named}.items()]
    return [sys.executable, '-c', PROGRAM, f'--workdir={directory}', *words, *values]


def environment() -> dict[str, str]:
    """Of a run: one device, and programs that are compiled once."""
    return {
        **os.environ,
        'JAXCLS_CACHE': str(CACHE),
        'JAX_NUM_CPU_DEVICES': '1',
        'PYTHONUNBUFFERED': '1',
        'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',  # else it would start itself once more
    }


def start(words: list[str], more: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a program, its output in pipes, with `more` variables in its environment."""
    return open_process(words, {**environment(), **(more or {})})


def open_process(words: list[str], env: dict[str, str]) -> subprocess.Popen:
    """A new process; the default test suite forks one instead."""
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(words, env=env, **pipes)


def end(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Status, output and errors of a program that has to end by itself."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f'it did not end within {seconds} s') from None
    return process.returncode, out, err


def run(words: list[str]) -> tuple[int, str, str]:
    """Starts a program and waits for it."""
    return end(start(words))


def whole(directory: Path, **fields: str) -> Path:
    """The small run, left alone."""
    status, _, err = run(command(directory, **fields))
    assert status == 0, err
    return directory


@functools.cache
def reference() -> tuple[Path, float]:
    """The small run, left alone, once for all rows, and the seconds that it took."""
    begin = time.monotonic()
    return whole(Path(_OWN.name) / 'reference'), time.monotonic() - begin


def kill(process: subprocess.Popen):
    """Ends a program by SIGKILL."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_until(true: Callable[[], bool], process: subprocess.Popen, seconds: float = 180) -> bool:
    """Whether something came true before the program ended."""
    limit = time.monotonic() + seconds
    while process.poll() is None:
        if true():
            return True
        assert time.monotonic() < limit, 'nothing happened'
        time.sleep(0.002)
    return False


def logged(directory: Path) -> int:
    """The step of the last log line, 0 before."""
    records = workdir.read_metrics(directory)
    return records[-1]['step'] if records else 0


def restored(directory: Path):
    """The last checkpoint of a run, on one device."""
    experiment = experiment_lib.build_for(
        experiment_lib.resolve(workdir.read_config(directory)), workdir.read_data(directory)
    )
    like = experiment_lib.abstract_checkpoint(experiment, sharding.make_mesh(jax.devices()[:1]))
    with contextlib.closing(workdir.Checkpoints(directory, read_only=True)) as checkpoints:
        return checkpoints.restore(like).tree


def assert_same(directory: Path, other: Path):
    """That two runs have left the same log and the same arrays."""
    found = verify.differences(directory, other)
    assert not found, f'{directory} differs: {found[:5]}'
