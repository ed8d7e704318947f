"""Programs forked from one process that has imported what they import, so that they start at once.

`python -m tests.faults.forks` is that process: each line of its input is a program to start, and it ends
with its input. The full table starts programs as users do.
"""

import contextlib
import gc
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a run imports in the end.
IMPORTS = ('jaxcls.main', 'jaxcls.sweep', 'jaxcls.console', 'jaxcls.report.page', 'tensorboardX')


class Fork:
    """A program that was forked; as much of `subprocess.Popen` as the rows use."""

    def __init__(self, place: Path):
        self.place, self.returncode = place, None
        self.pid = int((place / 'pid').read_text())

    def poll(self) -> int | None:
        if self.returncode is None and (self.place / 'status').exists():
            self.returncode = int((self.place / 'status').read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        limit = time.monotonic() + (timeout or float('inf'))
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(str(self.place), timeout)
            time.sleep(0.002)
        return (self.place / 'out').read_text(), (self.place / 'err').read_text()

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def forking(open_process: Callable, environment: dict[str, str]) -> Iterator[Callable]:
    """An `open_process` that forks programs of Python, and leaves others to the given one.

    Args:
      environment: while modules are imported; some of JAX's variables are read then, and only then.
    """
    words = [sys.executable, '-m', 'tests.faults.forks']
    numbers = itertools.count()
    with (
        tempfile.TemporaryDirectory(prefix='jaxcls-forks-') as places,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, cwd=ROOT, env=environment, text=True
        ) as parent,
    ):

        def fork(words: list[str], env: dict[str, str]):
            if words[:2] != [sys.executable, '-c']:
                return open_process(words, env)
            place = Path(places, str(next(numbers)))
            place.mkdir()
            request = {'program': words[2], 'argv': ['-c', *words[3:]], 'env': env}
            print(json.dumps({**request, 'place': str(place)}), file=parent.stdin, flush=True)
            while not (place / 'pid').exists():
                assert parent.poll() is None, 'the process that forks has ended'
                time.sleep(0.002)
            return Fork(place)

        yield fork


def serve():
    """Starts a program for each line of the input."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # a collection writes to every object, and so would copy all memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch are not waited for
    for line in sys.stdin:
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(**json.loads(line))


def _watch(program: str, argv: list[str], env: dict[str, str], place: str):
    """Runs a program in a process of its own, and notes its number and how it ended."""
    place = Path(place)
    number = os.fork()
    if number:
        _note(place / 'pid', number)
        _note(place / 'status', os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
        os._exit(0)
    for stream, name in ((0, os.devnull), (1, place / 'out'), (2, place / 'err')):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), stream)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    exec(program, {'__name__': '__main__'})
    sys.exit()


def _note(path: Path, number: int):
    part = path.with_suffix('.part')
    part.write_text(str(number))
    part.rename(path)


if __name__ == '__main__':
    serve()
