"""Programs timed against each other: each in its own process, on the same work, in turn.

A worker calls `serve(prepare)`. Its parent calls `interleave(commands)`, which starts one process after
another, and then lets each run alone, one after the other and so on. A turn is the work twice (`times`),
and the last is timed: what a worker gave back to the system meanwhile it has to get anew in the first (a
virtual machine may even give it back to its host), which took up to as long as the work itself. Between its
turns a worker is stopped, with the processes it has started: it would read ahead, and be timed at reading a
buffer.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Seconds of each round (or what its work returned), and what the worker says of itself."""

    seconds: list[Any]
    about: dict[str, Any]


def serve(prepare: Callable[[], tuple[Callable[[], Any], dict[str, Any]]], times: int = 2):
    """In the worker: prepares (compiles, warms up) once, then runs as often as it is asked to.

    Args:
      prepare: returns the work, which has ended when it returns, and what to say about it. Where the work
        returns something, as what it has timed itself, that takes the place of the seconds.
      times: how often a turn does the work, the last of which is timed. Once is enough for whole trainings.
    """
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # whatever the libraries print
    begin = time.perf_counter()
    with refusals():
        work, about = prepare()
    print(json.dumps({'prepare': time.perf_counter() - begin, **about}), file=out, flush=True)
    for _ in sys.stdin:
        for _ in range(times - 1):
            work()
        begin = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - begin
        print(json.dumps(seconds if found is None else found), file=out, flush=True)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """In the worker: what the user can mend, such as data that are not there, is said without a traceback."""
    from jaxcls.errors import UserError

    try:
        yield
    except UserError as error:
        raise SystemExit(str(error)) from None


def interleave(
    commands: dict[str, Sequence[str]],
    rounds: int,
    env: dict[str, dict[str, str]] | None = None,
    uncounted: int = 1,
    on_news: Callable[[str, Any], None] = lambda name, news: None,
) -> dict[str, Timing]:
    """Times workers in turn.

    Args:
      commands: by name: the worker's script and arguments.
      env: by name: more variables of its environment.
      uncounted: rounds before those that count.
      on_news: told the name and what a worker says of itself when it is ready, and then of each turn.

    Raises:
      SystemExit: a worker ended.
    """
    workers, about, seconds = {}, {}, {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            worker = workers[name] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=_environment((env or {}).get(name, {})),
                    text=True,
                    process_group=0,
                )
            )
            stack.callback(_signal, worker, signal.SIGKILL)
            about[name] = json.loads(_line(worker, name))
            _signal(worker, signal.SIGSTOP)
            on_news(name, about[name])
        for i in range(uncounted + rounds):
            for name, worker in workers.items():
                _signal(worker, signal.SIGCONT)
                print('go', file=worker.stdin, flush=True)
                took = json.loads(_line(worker, name))
                _signal(worker, signal.SIGSTOP)
                on_news(name, took)
                if i >= uncounted:
                    seconds[name].append(took)
    return {name: Timing(seconds[name], about[name]) for name in workers}


def last_line(command: Sequence[str], name: str) -> str:
    """What a worker that runs once prints last.

    Raises:
      SystemExit: it failed.
    """
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_environment({}))
    if done.returncode:
        _give_up(name, done.returncode)
    return done.stdout.splitlines()[-1]


def _environment(more: dict[str, str]) -> dict[str, str]:
    """A worker's: with the large pages that `python -m jaxcls.main` starts itself with, for all alike.

    Workers share an accelerator: JAX, which takes most of its memory at once, leaves them room.
    """
    defaults = {
        'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
        'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.35',
    }
    return {**defaults, **os.environ, **more}


def _signal(worker: subprocess.Popen, which: int):
    """To a worker and the processes it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, which)


def _line(worker: subprocess.Popen, name: str) -> str:
    line = worker.stdout.readline()
    if not line:
        _give_up(name, worker.wait())
    return line


def _give_up(name: str, status: int):
    lacks = not importlib.util.find_spec('torch')
    hint = " The peers are in the extra: pip install -e '.[bench]'." if lacks else ''
    raise SystemExit(
        f'The worker {name!r} ended with status {status}; its own message is above.{hint}'
    )


def one_of(known) -> Callable[[str], str]:
    """The `type` of an argument that must be one of some names."""

    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f'{text!r} is not one of {", ".join(known)}')
        return text

    return check


def at_least_1(text: str) -> int:
    """The `type` of an argument that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def share(text: str) -> float:
    """The `type` of an argument that is between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not between 0 and 1')
    return value


def new_file(text: str) -> Path:
    """The `type` of an argument that is a file to write, once all is measured."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is no file in a folder that exists')
    return path


def some_of(known) -> Callable[[str], list[str]]:
    """The `type` of an argument that is several names, with commas between."""
    return lambda text: [one_of(known)(word) for word in text.split(',')]


def forever(batches):
    """The batches of epoch after epoch."""
    while True:
        yield from batches


def summary(timings: dict[str, Timing]) -> dict[str, Any]:
    """What is printed and written of timings: of each worker seconds of a unit of its work, and our ratio.

    A worker says in `units` how many its work has: steps, images. `ratio` is the median, the smallest
    and the largest of our time over that of the fastest peer, round by round; below 1 is faster.
    """
    row = {}
    for name, (seconds, about) in timings.items():
        each = [s / about['units'] for s in seconds]
        row[name] = {**about, 'seconds': each, 'median': statistics.median(each)}
    peers = [name for name in timings if name != 'ours']
    if 'ours' in row and peers:
        best = min(peers, key=lambda name: row[name]['median'])
        row |= {
            'fastest peer': best,
            'ratio': ratio(row['ours']['seconds'], row[best]['seconds']),
        }
    return row


def ratio(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of two workers' rounds: the median of their ratios, the smallest, the largest."""
    ratios = [a / b for a, b in zip(seconds, others, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def show_ratio(row: dict[str, Any]) -> str:
    """Such as ' 0.93 (0.90 to 0.97)'; blank without a peer."""
    text = '{:5.2f} ({:.2f} to {:.2f})'.format(*row['ratio']) if 'ratio' in row else ''
    return f'{text:<23}'
