"""The whole program against its bare step, interleaved: what the data path costs.

    python experiments/benchmarks/throughput.py --config=experiments/lenet_mnist.py --steps=100

Bare is the compiled train step on one batch that stays on the device. Whole is the same step fed as
`fit` feeds it. For a streamed config the reader alone is timed too. Prints medians of the pairs,
images/s, and their ratio with its spread.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import pipeline, sharding, steps


def main():
    """Times the pairs and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--config', required=True)
    parser.add_argument('--steps', type=int, default=50, help='in one timing')
    parser.add_argument('--pairs', type=int, default=7)
    args, rest = parser.parse_known_args()
    config = config_lib.load_file(args.config)
    overrides = [tuple(word.removeprefix('--config.').split('=', 1)) for word in rest]
    config_lib.apply_overrides(config, overrides, experiment_lib.TABLES)
    config = experiment_lib.resolve(config)
    mesh = sharding.make_mesh()
    split = experiment_lib.load_split(config, config.data.train)
    reader = experiment_lib.make_reader(config, split, train=True)
    examples, batch_size = len(split.source), config.batch_size
    order = functools.partial(pipeline.training_order, config.seed, examples, batch_size)
    experiment = experiment_lib.build(config, reader.shape, len(split.class_names), examples)
    like = experiment_lib.abstract_checkpoint(experiment, mesh)
    total = args.steps * (args.pairs + 2)
    feed = experiment_lib.make_feed(config, reader, order, mesh, total, train=True)
    state = experiment_lib.initial_state(experiment, like[0])
    totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like[1])
    batch = jax.jit(feed.fetch)(feed.data, jax.tree.map(lambda x: x[0], feed.items(0, 1)))
    bare_step = jax.jit(experiment.train_step, donate_argnums=0)
    run_steps = jax.jit(steps.make_run_steps(experiment.train_step, feed.fetch), donate_argnums=0)
    step = 1

    def bare(state):
        for _ in range(args.steps):
            state, sums = bare_step(state, batch)
        jax.block_until_ready((state, sums))
        return state

    def whole(state):
        nonlocal totals, step
        for _ in range(args.steps):
            state, totals = run_steps(state, totals, feed.data, feed.items(step, 1))
            step += 1
        jax.block_until_ready((state, totals))
        return state

    def timed(function, state):
        begin = time.perf_counter()
        state = function(state)
        return state, args.steps * batch_size / (time.perf_counter() - begin)

    state = whole(bare(state))  # compiles
    speeds = {bare: [], whole: []}
    for _ in range(args.pairs):
        for function in (bare, whole):
            state, speed = timed(function, state)
            speeds[function].append(speed)
    ratios = sorted(w / b for w, b in zip(speeds[whole], speeds[bare], strict=True))
    print(f'{config.model.name} on {config.data.name}, batch {batch_size}, {mesh.size} devices')
    print(f'bare step     {statistics.median(speeds[bare]):10,.1f} images/s')
    print(f'whole program {statistics.median(speeds[whole]):10,.1f} images/s')
    print(f'ratio         {statistics.median(ratios):.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})')
    feed.close()
    if not feed.resident:
        time_reading(config, reader, order, mesh)


def time_reading(config, reader, order, mesh, batches=60, ahead=20):
    """The stream without a network to feed, and the decoder without a stream."""
    alone = pipeline.stream(reader, order, mesh, 10**6, config.data.workers)
    for step in range(ahead):  # what was read ahead while nobody asked
        alone.items(step, 1)
    begin = time.perf_counter()
    for step in range(ahead, ahead + batches):
        alone.items(step, 1)
    speed = batches * config.batch_size / (time.perf_counter() - begin)
    alone.close()
    print(f'stream alone  {speed:10,.1f} images/s, {config.data.workers or "no"} workers')
    index = np.concatenate([order(step)['index'] for step in range(10)])
    begin = time.perf_counter()
    for place, i in enumerate(index):
        reader(int(i), place)
    speed = len(index) / (time.perf_counter() - begin)
    print(f'decoder alone {speed:10,.1f} images/s, one thread')


if __name__ == '__main__':
    main()
