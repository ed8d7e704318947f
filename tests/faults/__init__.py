"""What a run survives and what a program refuses: `python -m tests.faults --full` runs all of it.

A row is a promise with a check, `check(count, seed, directory) -> what was seen`, which raises
AssertionError where the promise is broken. The default test suite runs a small count of each.
"""

import sys
from pathlib import Path

# The makers of test data lie beside this package, where pytest finds them and `python -m` does not.
TESTS = str(Path(__file__).parent.parent)
if TESTS not in sys.path:
    sys.path.append(TESTS)
