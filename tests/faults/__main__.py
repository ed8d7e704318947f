"""`python -m tests.faults [--full] [--only 1 4] [--seed 0]`: runs the table and prints it with counts."""

import argparse
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax

from .table import ROWS


def main() -> int:
    """Runs the rows one after another; 1 where one of them does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = [row.number for row in ROWS]
    parser.add_argument('--full', action='store_true', help='the full counts, which take hours')
    parser.add_argument('--only', nargs='+', type=int, choices=numbers, default=numbers)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    jax.config.update('jax_num_cpu_devices', 8)
    for name in ('absl', 'asyncio'):  # as the command line has it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    broken = 0
    print(f'{"":>3} {"test":<72} {"seconds":>8}  result (seed {args.seed})')
    for row in ROWS:
        if row.number not in args.only:
            continue
        count = row.full if args.full else row.share
        begin, failure = time.perf_counter(), ''
        with tempfile.TemporaryDirectory() as directory:
            try:
                seen = row.check(count, args.seed, Path(directory))
            except Exception:  # whatever it is, the other rows run
                failure = traceback.format_exc()
        broken += bool(failure)
        result = 'BROKEN' if failure else seen
        seconds = time.perf_counter() - begin
        print(f'{row.number:>3} {row.title.format(count=count):<72} {seconds:>8.0f}  {result}')
        print(failure, end='', file=sys.stderr, flush=True)
        sys.stdout.flush()
    return 1 if broken else 0


if __name__ == '__main__':
    sys.exit(main())
