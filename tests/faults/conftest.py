import pytest

from . import launch


@pytest.fixture(scope='package', autouse=True)
def compiled_once(pytestconfig):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, 'CACHE', pytestconfig.cache.mkdir('faults'))
        yield
