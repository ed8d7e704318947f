"""A small share of each other row of the table; two files, so that two processes share the work."""

import pytest

from . import runs
from .table import ROWS

pytestmark = pytest.mark.usefixtures('optimized')
OTHERS = [row for row in ROWS if row not in runs.ROWS]


@pytest.mark.parametrize('row', OTHERS, ids=lambda row: f'{row.number}-{row.check.__name__}')
def test_a_share_of_each_row_holds(row, tmp_path):
    assert row.check(row.share, 0, tmp_path)
