"""(e) How time and memory grow: with the images, their size, the batch, the devices, the seeds.

    python experiments/benchmarks/growth.py [images size batch devices seeds] [--out=growth.json]

Each point is a fresh process, which says the seconds of a step (the median of 7 rounds), its peak memory,
and seconds to compile. A line's exponent is the slope between it and the one before on logarithmic axes: 1
is linear. LeNet-5 on random images; of `seeds`, all in one program, seconds a step of one seed.
"""

import argparse
import json
import math
import time

import pairs

# What varies: its values, of a run that is otherwise the first of each.
PLAIN = {'images': 10_000, 'size': 28, 'batch': 128, 'devices': 1, 'seeds': 1}
AXES = {
    'images': (10_000, 40_000, 160_000, 640_000),
    'size': (28, 56, 112, 224),
    'batch': (32, 128, 512, 2048),
    'devices': (1, 2, 4, 8),
    'seeds': (1, 2, 4, 8, 16),
}


def measure(images: int, size: int, batch: int, devices: int, seeds: int) -> dict:
    """One point, in this process."""
    import functools
    import os

    os.environ['JAX_NUM_CPU_DEVICES'] = str(devices)
    import jax
    import numpy as np

    from jaxcls import config as config_lib
    from jaxcls import experiment as experiment_lib
    from jaxcls import inspection, loop, pipeline, sharding
    from jaxcls import seeds as seeds_lib
    from jaxcls.datasets import Split
    from jaxcls.sources import ArraySource

    config = config_lib.get_config()
    config.model, config.augment = {'name': 'lenet5'}, []
    config.batch_size = batch
    config = experiment_lib.resolve(config)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, size, size, 1), np.uint8)
    source = ArraySource(pixels, rng.integers(0, 10, images, np.int32))
    reader = pipeline.Reader(Split(source, tuple('0123456789'), pixels.shape[1:], 'random'))
    experiment = experiment_lib.build(config, (size, size, 1), 10, images)
    like = experiment_lib.abstract_checkpoint(experiment, mesh)
    train_step = experiment.train_step
    orders = [
        functools.partial(pipeline.training_order, seed, images, batch) for seed in range(seeds)
    ]
    order = orders[0]
    tree = experiment_lib.initial_state(experiment, like[0])
    if seeds > 1:
        like = experiment_lib.stack_shapes(like, seeds)
        tree = jax.tree.map(lambda x: jax.numpy.stack([x] * seeds), tree)
        train_step = jax.vmap(train_step)
        order = functools.partial(seeds_lib.orders, orders)
    feed = pipeline.resident(reader, order, mesh)
    compiled = []
    clock, note = loop.Clock([]), lambda event: compiled.append(event['seconds'])
    advance = loop.make_advance(train_step, feed, like, clock, note)
    tree, at, rounds = (tree, loop.make_zeros(like[1])()), 0, []
    steps = max(1, 2**22 // (batch * size * size * seeds))
    for _ in range(8):
        begin = time.perf_counter()
        for _ in range(steps):
            tree = advance(at, 1, *tree)
            at += 1
        jax.block_until_ready(tree)
        rounds.append((time.perf_counter() - begin) / steps / seeds)
    return {
        'seconds': sorted(rounds[1:])[3],
        'compile': sum(compiled),
        'peak_bytes': inspection.peak_bytes(),
    }


def main():
    """Prints the tables, or is one of their points."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('axes', nargs='*', type=pairs.one_of(AXES), default=list(AXES))
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--point', type=json.loads, default=None)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(**args.point)))
        return
    rows = []
    for axis in args.axes:
        print(f'{axis:<10}{"ms a step":>10}{"exponent":>10}{"peak MB":>9}{"compile":>10}')
        before = None
        for value in AXES[axis]:
            point = json.dumps({**PLAIN, axis: value})
            found = pairs.last_line([__file__, '--point', point], f'{axis} {value}')
            row = {'axis': axis, 'value': value, **json.loads(found)}
            slope = ''
            if before:
                times = math.log(row['seconds'] / before['seconds'])
                slope = f'{times / math.log(value / before["value"]):.2f}'
            print(
                f'{value:<10,}{1000 * row["seconds"]:>10.2f}{slope:>10}'
                f'{row["peak_bytes"] / 1e6:>9,.0f}{row["compile"]:>8.1f} s',
                flush=True,
            )
            rows.append(row)
            before = row
    if args.out:
        args.out.write_text(json.dumps({'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
