"""A small share of each row of the table."""

import pytest

from .table import ROWS


@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row.number}-{row.check.__name__}')
def test_a_share_of_each_row_holds(row, tmp_path):
    assert row.check(row.share, 0, tmp_path)
