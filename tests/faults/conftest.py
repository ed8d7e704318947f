import pytest

from . import forks, launch


@pytest.fixture(scope='package', autouse=True)
def quickly(pytestconfig):
    """Programs are compiled once for all sessions, and packages imported once for all processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, 'CACHE', pytestconfig.cache.mkdir('faults'))
        with forks.forking(launch.open_process, launch.environment()) as fork:
            patch.setattr(launch, 'open_process', fork)
            yield
