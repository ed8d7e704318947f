"""(g) Eight seeds: one after another, by `vmap` in one program, or spread over the devices in one program.

    python experiments/benchmarks/together.py [lenet5 resnet20 ...] [--seeds=8] [--out=together.json]

Milliseconds of one step of all seeds, each with its own batch, interleaved; and the ratio to one after
another, with its spread. On an accelerator a program has ten steps. Spread: every device has its share of
the seeds, unrolled; on CPU there is one virtual device per core. Because of this table `seeds.per_program`
takes one at a time on CPU, and elsewhere all together where the network is small: on an H200 eight LeNet-5
take 0.92 ms by `vmap` and 3.91 one after another, eight ResNet-20 152.2 and 73.3.
"""

import argparse
import json
import math
import os

import pairs
import step as step_lib

KINDS = ('loop', 'vmap', 'devices')


def work(name: str, kind: str, seeds: int):
    """A step of all seeds."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxcls import experiment as experiment_lib

    experiment, batch = step_lib.case(name, 'float32')
    step = experiment.train_step
    per_call = 1 if jax.default_backend() == 'cpu' else step_lib.STEPS_PER_CALL
    if kind == 'loop':
        init = jax.jit(lambda seed: experiment_lib.init(experiment, seed))
        states = [init(seed) for seed in range(seeds)]
        batches = [jax.device_put(batch) for _ in range(seeds)]
        run = jax.jit(step_lib.repeat(step, per_call), donate_argnums=0)

        def all_seeds():
            for i in range(seeds):
                states[i], sums = run(states[i], batches[i])
            return sums
    else:
        share = math.gcd(seeds, len(jax.devices()))  # devices that can have as many seeds each
        mesh = Mesh(np.array(jax.devices()[:share]), 'seeds')
        many = NamedSharding(mesh, PartitionSpec('seeds'))
        init = jax.vmap(lambda seed: experiment_lib.init(experiment, seed))
        state = jax.jit(init, out_shardings=many)(np.arange(seeds))
        batch = {key: np.stack([value] * seeds) for key, value in batch.items()}
        batch = jax.device_put(batch, many)

        def unrolled(state, batch):
            count = len(batch['label'])
            found = [step(*jax.tree.map(lambda x: x[i], (state, batch))) for i in range(count)]  # noqa: B023
            return jax.tree.map(lambda *x: jax.numpy.stack(x), *found)

        inner = jax.vmap(step) if kind == 'vmap' else unrolled
        spec = PartitionSpec('seeds')
        inner = step_lib.repeat(inner, per_call)
        run = jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        run = jax.jit(run, donate_argnums=0)

        def all_seeds():
            nonlocal state
            state, sums = run(state, batch)
            return sums

    repeated, count = step_lib.repeated(all_seeds, jax.block_until_ready)
    return repeated, {'units': count * per_call, 'devices': len(jax.devices())}


def main():
    """Prints the table, or is one of its workers."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    nets = ('lenet5', 'resnet20')
    parser.add_argument('networks', nargs='*', type=pairs.one_of(step_lib.CASES), default=nets)
    parser.add_argument('--seeds', type=pairs.at_least_1, default=8)
    parser.add_argument('--rounds', type=pairs.at_least_1, default=7)
    parser.add_argument('--kinds', type=pairs.some_of(KINDS), default=list(KINDS))
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--worker', default='')
    args = parser.parse_args()
    kinds = dict.fromkeys(['loop', *args.kinds])  # what the others are compared with
    if args.worker:
        [name] = args.networks
        pairs.serve(lambda: work(name, args.worker, args.seeds))
        return
    rows = []
    print(f'{"network":<10}' + ''.join(f'{kind:>28}' for kind in kinds))
    for name in args.networks:
        commands = {
            kind: [__file__, name, '--worker', kind, '--seeds', args.seeds] for kind in kinds
        }
        spread = {'JAX_NUM_CPU_DEVICES': str(os.cpu_count())}
        found = pairs.interleave(commands, args.rounds, {'devices': spread})
        row, cells = {'network': name, 'seeds': args.seeds, **pairs.summary(found)}, ''
        for kind in kinds:
            row[kind]['ratio'] = pairs.ratio(row[kind]['seconds'], row['loop']['seconds'])
            cell = f'{1000 * row[kind]["median"]:.2f} {pairs.show_ratio(row[kind]).rstrip()}'
            cells += f'{cell:>28}'
        rows.append(row)
        print(f'{name:<10}{cells}', flush=True)
    if args.out:
        args.out.write_text(json.dumps({'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
