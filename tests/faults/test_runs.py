"""A small share of each row about runs that are killed, stopped or resumed."""

import pytest

from .runs import ROWS

pytestmark = pytest.mark.usefixtures('optimized')


@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row.number}-{row.check.__name__}')
def test_a_share_of_each_row_holds(row, tmp_path):
    assert row.check(row.share, 0, tmp_path)
