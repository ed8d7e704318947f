"""Where arrays live: processes, the mesh of devices, batches split and parameters copied or split."""

import os
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcls import terminal
from jaxcls.errors import UserError, first_line

# Seconds in which all processes of a run have to start, unless JAXCLS_START_TIMEOUT says otherwise.
_START_TIMEOUT = '300'
# Seconds more that JAX has: after its own limit it ends a process by SIGABRT as often as it raises.
_MARGIN = 30
# Seconds without a sign of life after which a process is taken for lost, and JAX ends the others.
_HEARTBEAT_TIMEOUT = 15
# FSDP leaves arrays below this many elements whole: gathering them costs more than storing them.
MIN_SHARDED_SIZE = 2**14


def start_processes():
    """Joins the processes of a run on many hosts, found in the environment; one process: does nothing.

    Read are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what SLURM, Open MPI
    and TPU pods on GKE set, which `jax.distributed` understands by itself; elsewhere (TPU VMs)
    JAXCLS_DISTRIBUTED=1 lets it look. Where a process is lost, the others end: see `lost`.

    Raises:
      UserError: the variables are wrong, or JAX cannot reach the others. Where one does not come within
        JAXCLS_START_TIMEOUT seconds, the process ends with status 2 and a message.
    """
    env = os.environ
    if 'JAX_COORDINATOR_ADDRESS' in env and 'JAX_NUM_PROCESSES' in env:
        _initialize(
            coordinator_address=env['JAX_COORDINATOR_ADDRESS'],
            num_processes=_number(env, 'JAX_NUM_PROCESSES'),
            process_id=_number(env, 'JAX_PROCESS_ID'),
        )
        return
    several = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
    tasks = max(_number(env, name) if name in env else 1 for name in several)
    pod = ',' in env.get('TPU_WORKER_HOSTNAMES', '') or env.get('JAXCLS_DISTRIBUTED') == '1'
    if tasks > 1 or pod:
        _initialize()


def _initialize(**processes):
    timeout = _number(
        {'JAXCLS_START_TIMEOUT': _START_TIMEOUT, **os.environ}, 'JAXCLS_START_TIMEOUT'
    )
    remedy = (
        'Start all of them, with the same JAX_COORDINATOR_ADDRESS, which their hosts must reach, and each '
        'with its own JAX_PROCESS_ID; to wait longer, set JAXCLS_START_TIMEOUT.'
    )
    late = f'The processes of the run did not meet within {timeout} s. {remedy}'
    watch = threading.Timer(timeout, _end, [late])
    watch.start()
    try:
        jax.distributed.initialize(
            **processes,
            initialization_timeout=timeout + _MARGIN,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f'The processes of the run cannot meet: {first_line(error)}. {remedy}'
        ) from None
    finally:
        watch.cancel()


def _end(message: str):
    """Ends the process from another thread, as the command line does on a mistake."""
    terminal.refuse(message)
    os._exit(2)


def lost(error: Exception) -> str:
    """The message where one of several processes cannot work with the others; '' for any other error.

    When a process is lost, an operation that the others share with it fails, and they end by this
    message; or JAX notices it first, and ends them by its own and SIGABRT. Either takes seconds.
    """
    told = any(word in str(error) for word in ('Gloo', 'barrier'))  # by JAX, by Orbax
    shared = isinstance(error, jax.errors.JaxRuntimeError) or told
    if not shared or jax.process_count() == 1:
        return ''
    return (
        f'This is one of {jax.process_count()} processes, and it cannot go on: {first_line(error)}. If '
        'another one has ended, its own message says why. To go on from the last checkpoint, repeat the '
        'command in every process.'
    )


def _number(env, name: str) -> int:
    if not env.get(name, '').isdigit():
        raise UserError(f'${name} is {env.get(name)!r}; set it to a whole number.')
    return int(env[name])


def make_mesh(devices=None) -> Mesh:
    """A mesh with one axis, 'data', over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ('data',), axis_types=(AxisType.Auto,))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1):
    """Raises UserError unless every device gets the same number of examples."""
    parts = mesh.size * accumulate_steps
    if batch_size % parts:
        raise UserError(
            f'config.batch_size {batch_size} cannot be divided over {mesh.size} devices times '
            f'{accumulate_steps} accumulated steps; choose a multiple of {parts}, such as '
            f'{-(-batch_size // parts) * parts}.'
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis split over the devices, the others whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'data'))


def state_sharding(shapes, mesh: Mesh, placement: str):
    """A sharding a leaf: copied everywhere, or, for 'fsdp', split along the largest axis that divides.

    Splitting parameters and optimiser state over the devices that split the batch is fully sharded
    data parallelism (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054); XLA adds the gathers.
    """

    def leaf_sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0 and size]
        if placement == 'replicated' or leaf.size < MIN_SHARDED_SIZE or not axes:
            return replicated(mesh)
        return split_batch(mesh, max(axes, key=lambda axis: leaf.shape[axis]))

    return jax.tree.map(leaf_sharding, shapes)


def put_local(tree, sharding: NamedSharding):
    """Global arrays from each process's own rows."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def local_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process reads."""
    size = batch_size // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def on_first_process(action: Callable[[], None]):
    """Runs an action on the first process alone; where it raises a UserError, all processes do."""
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and not error:
            error = UserError('The first process ended the run; its message says why.')
    if error:
        raise error
