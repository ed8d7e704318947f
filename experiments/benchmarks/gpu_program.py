"""The kernels of a train step on a GPU and what they read and write, without a GPU.

    pip install 'jax[cuda12]'    # beside the rest
    python experiments/benchmarks/gpu_program.py [resnet18 ...] [--precision=mixed] [--seeds=8] [--kernels]

XLA compiles for a device that is described to it, here an H200, on a machine that has none, and the program
that comes out tells how often a step goes over memory. Of ResNet-18 in bfloat16 the program that an H200
compiled itself had as many kernels, 480, and its fusions moved the same bytes, 13.46 GB: so forms of a layer
are compared in half a minute, and a GPU is wanted for times alone. Not as on the card are the algorithms of
cuDNN and cuBLAS, which are chosen there by timing; what their kernels move is not counted.

A line gives the kernels of a step, how many of them are XLA's own (fusions), the GB that those read and
write, and the GB that the program holds besides its arguments.
"""

import argparse
import collections
import json
import math
import os
import re
from typing import NamedTuple
from unittest import mock

import pairs
import step as step_lib

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
"""
BITS = {'pred': 8, 'bf16': 16}  # of others the name says it
OWN = ('fusion', 'copy', 'reduce', 'transpose', 'convert', 'sort')
COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$')


class Kernel(NamedTuple):
    """An instruction that the device runs: what it is, and the bytes of its operands and its results."""

    name: str
    kind: str
    read: int
    written: int


def size_of(shape: str) -> int:
    """Bytes of 'f32[8,128]{1,0}', or of all in a tuple."""
    total = 0
    for dtype, sides in re.findall(r'(\w+)\[([\d,]*)\]', shape):
        bits = BITS.get(dtype) or int((re.search(r'\d+', dtype) or '0')[0])  # a token has none
        total += bits * math.prod(int(side) for side in sides.split(',') if side) // 8
    return total


def kernels_of(text: str) -> list[Kernel]:
    """Those of the computation that has the most: the body of the loop over steps."""
    found, sizes, computation = collections.defaultdict(list), {}, ''
    for line in text.splitlines():
        if began := COMPUTATION.match(line):
            computation = began[1]
        elif instruction := INSTRUCTION.match(line):
            name, shape, kind, operands, rest = instruction.groups()
            sizes[name] = size_of(shape)
            if target := re.search(r'custom_call_target="([^"]*)"', rest):
                kind = target[1]
            names = re.findall(r'%([\w.\-]+)', operands)
            kernel = Kernel(name, kind, sum(sizes.get(n, 0) for n in names), sizes[name])
            if kind in OWN or target:
                found[computation].append(kernel)
    # What a fusion is made of is no kernel.
    bodies = [k for name, k in found.items() if not name.startswith(('fused_', 'wrapped_'))]
    return max(bodies, key=len, default=[])


def compiled(name: str, precision: str, seeds: int):
    """A train step of `step.py`'s case for an H200, ten in a loop; of so many networks at once, or of one."""
    import jax
    from jax.experimental import topologies

    from jaxcls import experiment as experiment_lib
    from jaxcls import sharding
    from jaxcls.errors import UserError

    try:
        described = topologies.get_topology_desc(
            '1x1x1', 'cuda', topology='1x1x1', target_config=H200
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"XLA's compiler for NVIDIA GPUs is not here ({error}): pip install 'jax[cuda12]'."
        ) from None
    place = jax.sharding.SingleDeviceSharding(described.devices[0])
    lead = (seeds,) if seeds > 1 else ()
    with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
        experiment, batch = step_lib.case(name, precision)
        state, _ = experiment_lib.abstract_checkpoint(experiment, sharding.make_mesh())
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=place),
            (state, batch),
        )
        step = jax.vmap(experiment.train_step) if lead else experiment.train_step
        run = jax.jit(step_lib.repeat(step, step_lib.STEPS_PER_CALL), donate_argnums=0)
        return run.trace(*shapes).lower(lowering_platforms=('cuda',)).compile()


def main():
    """Prints a line for each network, and with --kernels one for each kernel."""
    from jaxcls import config

    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    nets = list(step_lib.CASES)
    parser.add_argument('networks', nargs='*', type=pairs.one_of(step_lib.CASES), default=nets)
    parser.add_argument('--precision', choices=config.PRECISIONS, default='mixed')
    parser.add_argument('--seeds', type=pairs.at_least_1, default=1)
    parser.add_argument('--kernels', action='store_true')
    parser.add_argument('--out', type=pairs.new_file, default=None)
    args = parser.parse_args()
    # Before JAX is imported: its compiler for GPUs, though there is none, which could time nothing.
    os.environ['JAX_PLATFORMS'], os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = 'cpu,cuda', '1'
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'.strip()
    rows = []
    print(f'{"network":<13}{"kernels":>9}{"own":>6}{"GB":>9}{"held":>8}')
    for name in args.networks:
        with pairs.refusals():
            program = compiled(name, args.precision, args.seeds)
        kernels = kernels_of(program.as_text())
        own = [kernel for kernel in kernels if kernel.kind in OWN]
        moved = sum(kernel.read + kernel.written for kernel in own)
        held = program.memory_analysis().temp_size_in_bytes
        counts = {'kernels': len(kernels), 'own': len(own), 'bytes': moved, 'held': held}
        rows.append({'network': name, 'seeds': args.seeds, **counts})
        print(
            f'{name:<13}{len(kernels):>9}{len(own):>6}{moved / 1e9:>9.2f}{held / 1e9:>8.2f}',
            flush=True,
        )
        for kernel in kernels if args.kernels else ():
            sizes = f'{kernel.read / 1e6:>10.2f}{kernel.written / 1e6:>10.2f} MB'
            print(f'  {kernel.name:<45}{sizes}  {kernel.kind}')
    if args.out:
        args.out.write_text(
            json.dumps({'precision': args.precision, 'rows': rows}, indent=1) + '\n'
        )


if __name__ == '__main__':
    main()
