"""(d) How long until something happens: import, `--help`, the first step without and with compiled programs.

    python experiments/benchmarks/startup.py [--rounds=5] [--out=startup.json]

Each is a fresh process; medians of the rounds, in turn. The first steps are those of the default run, LeNet
on the digits, until its first log line is written; cold is with an empty compilation cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import pairs

FIRST_STEP = """
import sys
from jaxcls import console
from jaxcls.main import main

class First(Exception):
    pass

def first(self, event):
    if event['kind'] == 'train':
        raise First

console.Reporter.__call__ = first
try:
    main(['train', '--workdir', sys.argv[1], '--config.log_every_steps=1'])
except First:
    pass
"""


def commands(folder: str) -> dict[str, list[str]]:
    """What is timed, by name."""
    return {
        'python': ['-c', 'pass'],
        'import jax': ['-c', 'import jax'],
        'import jaxcls': ['-c', 'import jaxcls'],
        'jaxcls --help': ['-m', 'jaxcls.main', '--help'],
        'first step, cold': ['-c', FIRST_STEP, f'{folder}/cold-run'],
        'first step, cached': ['-c', FIRST_STEP, f'{folder}/warm-run'],
    }


def seconds(name: str, command: list[str], folder: str, i: int) -> float:
    """Of one process, from its start to its end."""
    cache = f'{folder}/cold-{i}' if 'cold' in name else f'{folder}/warm'
    if 'step' in name:
        command = [*command[:-1], f'{command[-1]}-{i}']
    env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache}
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], env=env, check=True, capture_output=True)
    return time.perf_counter() - begin


def main():
    """Times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=pairs.at_least_1, default=5)
    parser.add_argument('--out', type=pairs.new_file, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        todo = commands(folder)
        for name, command in todo.items():  # files into the system's cache, programs into ours
            seconds(name, command, folder, -1)
        times = {name: [] for name in todo}
        for i in range(args.rounds):
            for name, command in todo.items():
                times[name].append(seconds(name, command, folder, i))
    rows = [
        {'what': name, 'median': statistics.median(found), 'seconds': found}
        for name, found in times.items()
    ]
    for row in rows:
        low, high = min(row['seconds']), max(row['seconds'])
        print(f'{row["what"]:<20}{row["median"]:>7.2f} s  ({low:.2f} to {high:.2f})')
    if args.out:
        args.out.write_text(json.dumps({'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
