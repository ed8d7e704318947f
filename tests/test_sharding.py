import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import fit, sharding, workdir
from jaxcls.errors import UserError

pytestmark = pytest.mark.usefixtures('optimized')

TWO_PROCESSES = Path(__file__).parent / 'two_processes.py'


def config(**fields):
    config = config_lib.get_config()
    config.update(
        {
            'epochs': 1.6,  # 10 steps
            'batch_size': 16,
            'log_every_steps': 1,
            'data': {'train': 'train[:100]', 'validation': 'test[:50]'},
            'augment': [{'name': 'pad_crop', 'padding': 1}],
            **fields,
        }
    )
    config.optimizer = {'name': 'sgd'}
    config.model = {'name': 'mlp', 'hidden': (256,), 'norm': 'batch'}
    return config


def losses(path):
    return [r['loss'] for r in workdir.read_metrics(path) if r['kind'] == 'train']


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    path = tmp_path_factory.mktemp('one')
    fit(config(), path)
    assert len(losses(path)) == 10
    return path


@pytest.mark.parametrize('parameters', ['replicated', 'fsdp'])
def test_eight_devices_give_the_losses_of_one(one, tmp_path, monkeypatch, parameters):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, 'make_mesh', lambda: make_mesh(jax.devices()))
    result = fit(config(parameters=parameters), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(one), rtol=1e-5)
    kernel = max(jax.tree.leaves(result.state.params), key=jnp.size)
    assert kernel.is_fully_replicated == (parameters == 'replicated')


def run_two_processes(directory, *pipelines):
    """Exit statuses and what the two printed on standard error."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    variables = {
        'JAX_COORDINATOR_ADDRESS': address,
        'JAX_NUM_PROCESSES': '2',
        'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(TWO_PROCESSES), str(directory), *pipelines],
            env={**os.environ, **variables, 'JAX_PROCESS_ID': str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], errors


def test_two_processes_give_the_losses_of_one(one, tmp_path):
    statuses, errors = run_two_processes(tmp_path, 'resident', 'stream', 'seeds')
    assert statuses == [0, 0], errors
    for pipeline in ('resident', 'stream', 'seeds/seed-0'):
        np.testing.assert_allclose(losses(tmp_path / pipeline), losses(one), rtol=1e-5)
    assert (tmp_path / 'seeds' / 'result.json').is_file()


def test_a_mistake_that_one_process_finds_ends_both(tmp_path):
    with workdir.locked(tmp_path / 'resident'):
        begin = time.monotonic()
        statuses, errors = run_two_processes(tmp_path, 'resident')
    assert statuses == [2, 2], errors
    assert 'in use by another run' in errors[0] and 'first process ended the run' in errors[1]
    assert time.monotonic() - begin < 60  # not a time-out of the other's collectives


def test_processes_with_different_configs_do_not_train(tmp_path):
    statuses, errors = run_two_processes(tmp_path, 'differ')
    assert statuses == [2, 2], errors
    rate = config().learning_rate
    message = f'config.learning_rate is {rate} in the first process and {2 * rate} in process 1'
    assert all(message in error for error in errors)
    assert not (tmp_path / 'differ' / 'config.json').exists()


def test_batches_must_divide_over_the_devices():
    mesh = sharding.make_mesh(jax.devices())
    sharding.check_batch_size(16, mesh)
    with pytest.raises(UserError, match='choose a multiple of 8, such as 24'):
        sharding.check_batch_size(17, mesh)
    with pytest.raises(UserError, match='choose a multiple of 16, such as 32'):
        sharding.check_batch_size(24, mesh, accumulate_steps=2)


def test_fsdp_splits_large_arrays_along_the_largest_axis_that_divides():
    mesh = sharding.make_mesh(jax.devices())
    shapes = {
        'kernel': jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.float32),
        'odd': jax.ShapeDtypeStruct((7, 12345), jnp.float32),
        'bias': jax.ShapeDtypeStruct((128,), jnp.float32),
    }
    split = sharding.state_sharding(shapes, mesh, 'fsdp')
    assert tuple(split['kernel'].spec) == (None, None, None, 'data')
    assert split['odd'].is_fully_replicated and split['bias'].is_fully_replicated
    whole = sharding.state_sharding(shapes, mesh, 'replicated')
    assert all(place.is_fully_replicated for place in whole.values())


@pytest.mark.parametrize(
    ('environment', 'arguments'),
    [
        ({}, None),
        ({'SLURM_STEP_NUM_TASKS': '1'}, None),
        ({'SLURM_STEP_NUM_TASKS': '4'}, {}),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, {}),
        ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'host0,host1'}, {}),
        (
            {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'},
            {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 1},
        ),
    ],
)
def test_processes_are_found_in_the_environment(monkeypatch, environment, arguments):
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **k: calls.append(k))
    monkeypatch.setattr(os, 'environ', environment)
    sharding.start_processes()
    times = {'initialization_timeout': 330, 'heartbeat_timeout_seconds': 15}
    assert calls == ([] if arguments is None else [arguments | times])


def test_processes_that_do_not_meet_in_time_end_by_a_message(monkeypatch):
    told, ended = [], threading.Event()
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **k: ended.wait(10))
    monkeypatch.setattr(sharding, '_end', lambda message: (told.append(message), ended.set()))
    monkeypatch.setattr(os, 'environ', {'SLURM_STEP_NUM_TASKS': '2', 'JAXCLS_START_TIMEOUT': '0'})
    sharding.start_processes()
    assert len(told) == 1 and 'did not meet within 0 s. Start all of them' in told[0]
