"""Eight virtual devices for the tests of sharding, one for all others; real data where they are."""

import contextlib
import gc
import os
from pathlib import Path

import jax
import pytest
from jax._src import compiler

from jaxcls import results, sharding
from jaxcls.commands import common

jax.config.update('jax_num_cpu_devices', 8)
gc.set_threshold(100_000, 50, 100)  # tracing makes objects by the million: 5% of the time was this


# Halve the time of compiling without optimisations, in versions of XLA that have them.
QUICK = {'xla_cpu_use_fusion_emitters': False, 'xla_cpu_parallel_codegen_split_count': 1}


def is_known(option):
    try:
        jax.jit(lambda: 0, compiler_options={option: QUICK[option]})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(scope='session', autouse=True)
def compile_quickly(pytestconfig):
    """Without XLA's optimisations, and once: for all workers, and for later sessions too."""
    jax.config.update('jax_disable_most_optimizations', True)
    jax.config.update('jax_compilation_cache_dir', str(pytestconfig.cache.mkdir('programs')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    quick = {option: value for option, value in QUICK.items() if is_known(option)}
    make_options = compiler.get_compile_options

    def make_quick_options(*args, env_options_overrides=None, **kwargs):
        more = quick if jax.config.read('jax_disable_most_optimizations') else {}
        overrides = {**more, **(env_options_overrides or {})}
        return make_options(*args, env_options_overrides=overrides, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, 'get_compile_options', make_quick_options)
        yield


@pytest.fixture(scope='session', autouse=True)
def one_device():
    """Meshes of one device, unless a test asks for more by name."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, 'make_mesh', lambda devices=None: make_mesh(devices or jax.devices()[:1])
        )
        yield


@pytest.fixture(scope='session', autouse=True)
def no_start():
    """Commands do not touch the process: no cache of compiled programs, no warnings format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, 'start', lambda: None)
        yield


@pytest.fixture(scope='module')
def optimized():
    """For files whose laws are about bits: programs are those that users have."""
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session', autouse=True)
def pictures():
    """Runs draw none, which is half of the time of short ones, but `with pictures():`."""
    draw = results._draw

    @contextlib.contextmanager
    def drawn():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, '_draw', draw)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, '_draw', lambda *args: None)
        yield drawn


@pytest.fixture(scope='session')
def data_dir() -> str:
    """The directory of real data: mnist and cifar10 of TFDS, and imagenette160/{train,val}."""
    directory = os.environ.get('JAXCLS_TEST_DATA', '')
    if not directory:
        pytest.skip('needs real data: set JAXCLS_TEST_DATA to their directory')
    if not Path(directory).is_dir():
        pytest.skip(f'needs real data: JAXCLS_TEST_DATA={directory} is not a directory')
    return directory
