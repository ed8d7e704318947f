"""Numbers that are not finite, and what the checks cost."""

import random
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import fingerprints, fit, loop, steps, workdir

from .rows import Row
from .runs import _forty_steps


def _poisoned(value: float, bad_steps):
    """`steps.make_prepare` whose images have a value in them at some steps."""
    make_prepare = steps.make_prepare

    def make(*args):
        prepare = make_prepare(*args)

        def poisoned(key, batch, state):
            batch = prepare(key, batch, state)
            bad = jnp.isin(state.step, jnp.asarray(sorted(bad_steps)))
            first = batch['image'][0, 0, 0, 0]
            image = batch['image'].at[0, 0, 0, 0].set(jnp.where(bad, value, first))
            return {**batch, 'image': image}

        return poisoned

    return mock.patch.object(steps, 'make_prepare', make)


def non_finite(count: int, seed: int, directory: Path) -> str:
    """NaN or infinity at one step, at some, in a row; an update that leaves the range of float32."""
    random_ = random.Random(seed)
    skipped = stopped = 0
    for i in range(count):
        value = random_.choice([np.nan, np.inf, -np.inf, 1e38])
        how = random_.choice(['once', 'some', 'row', 'spike'])
        config = _forty_steps()
        config.max_bad_steps, config.checkpoint_every_epochs = 5, 0.25
        first = random_.randrange(1, 30)
        bad = {'once': {first}, 'some': set(random_.sample(range(1, 40), 9))}.get(how, set())
        bad = set(range(first, 40)) if how == 'row' else bad
        if how == 'spike':
            config.learning_rate, config.optimizer = 1e38, {'name': 'sgd'}
        path = directory / f'run{i}'
        try:
            with _poisoned(value, bad):
                result = fit(config, path)
        except loop.Diverged as error:
            _assert_explained(str(error), path, how)
            stopped += 1
        else:
            assert how != 'row' or value == 1e38, 'it should have stopped'
            counted = sum(r['bad_steps'] for r in result.records if r['kind'] == 'train')
            assert value == 1e38 or how == 'spike' or counted == len(bad), (how, counted, bad)
            skipped += counted
        _assert_finite(config, path)
    return (
        f'{count} runs: {skipped} steps skipped and counted, {stopped} stopped; all saved is finite'
    )


def _assert_explained(message: str, path: Path, how: str):
    assert how in ('row', 'spike', 'some'), how
    for words in ('Stopped at step', 'since step', 'last finite loss', 'is saved in', 'Try'):
        assert words in message, message


def _assert_finite(config, path: Path):
    from jaxcls import experiment, sharding

    built = experiment.build_for(experiment.resolve(config), workdir.read_data(path))
    like = experiment.abstract_checkpoint(built, sharding.make_mesh(jax.devices()[:1]))
    checkpoints = workdir.Checkpoints(path, keep=99, read_only=True)
    try:
        for step in checkpoints.manager.all_steps():
            state = checkpoints.restore(like, step).tree[0]
            for leaf in jax.tree.leaves(state):
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    assert bool(jnp.isfinite(leaf).all()), f'step {step} of {path} is not finite'
    finally:
        checkpoints.close()


def cost(count: int, seed: int, directory: Path) -> str:
    """The time of fingerprints, the lock, checks and the note of each step, of the default run's."""
    from jaxcls import config as config_lib

    names = ('check', 'start', 'rewind_metrics')
    spent = dict.fromkeys((*names, 'manifest', 'FileLock', 'pwrite'), 0.0)

    def timed(name, place=workdir):
        function = getattr(place, name)

        def call(*args, **kwargs):
            jax.block_until_ready(args)  # what a step still takes is not the cost of these
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begin

        return mock.patch.object(place, name, call)

    config = config_lib.get_config()
    config.epochs = float(count)
    begin = time.perf_counter()
    others = (('manifest', fingerprints), ('FileLock', workdir.filelock), ('pwrite', workdir.os))
    patches = [*map(timed, names), *(timed(*other) for other in others)]
    for patch in patches:
        patch.start()
    try:
        fit(config, directory / 'run')
    finally:
        for patch in patches:
            patch.stop()
    total = time.perf_counter() - begin
    share = sum(spent.values()) / total
    assert spent['manifest'] > 0 and (count < 20 or share <= 0.01), f'{share:.2%}: {spent}'
    return f'{share:.2%} of the {total:.0f} s of the default run at {count} epochs'


ROWS = (
    Row(9, 'NaN, infinity, loss spikes in {count} runs', non_finite, full=40, share=2),
    Row(17, 'cost of fingerprints, lock and checks, default run of {count} epochs', cost, 20, 1),
)
