"""A small share of each row of the table."""

import pytest

from . import launch
from .table import ROWS

pytestmark = pytest.mark.usefixtures('optimized')


@pytest.fixture(scope='module', autouse=True)
def compiled_once(pytestconfig):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, 'CACHE', pytestconfig.cache.mkdir('faults'))
        yield


@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row.number}-{row.check.__name__}')
def test_a_share_of_each_row_holds(row, tmp_path):
    assert row.check(row.share, 0, tmp_path)
