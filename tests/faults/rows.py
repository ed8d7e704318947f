"""What a row is."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A promise and its check.

    Attributes:
      number: in the table.
      title: what is done to a run, and how often: `{count}` stands for that.
      check: `(count, seed, directory) -> what was seen`, a short line; raises AssertionError.
      full: the count of `--full`.
      share: the count in the default test suite.
    """

    number: int
    title: str
    check: Callable[[int, int, Path], str]
    full: int
    share: int
