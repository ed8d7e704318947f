"""Runs that are killed, stopped, resumed, started twice, or die again and again."""

import os
import random
import re
import signal
import time
from pathlib import Path

from jaxcls import config as config_lib
from jaxcls import fingerprints, fit, verify

from . import launch
from .rows import Row


def kills(count: int, seed: int, directory: Path) -> str:
    """SIGKILL at a random moment, or while a checkpoint or a log line is being written."""
    random_ = random.Random(seed)
    whole, seconds = launch.reference()
    killed, finished, phases = 0, 0, {}
    while killed < count or not finished:
        path = directory / f'run{finished}'
        if killed == count:
            launch.whole(path)
        elif _kill(path, random_, seconds, phases):
            killed += 1
            continue
        launch.assert_same(whole, path)
        finished += 1
    where = ', '.join(f'{n} {phase}' for phase, n in sorted(phases.items()))
    return f'{killed} kills ({where}), {finished} runs equal to the one left alone'


def _kill(path: Path, random_: random.Random, seconds: float, phases: dict[str, int]) -> bool:
    """Starts or goes on with a run and kills it, unless it ends before."""
    before = launch.logged(path)
    process = launch.start(launch.command(path))
    kind = random_.choice(['any time', 'any time', 'in a save', 'in a log line'])
    if kind == 'any time':
        moment = time.monotonic() + random_.uniform(0, seconds)
        alive = launch.wait_until(lambda: time.monotonic() > moment, process)
    elif kind == 'in a save':
        alive = launch.wait_until(
            lambda: any(path.glob('checkpoints/*.orbax-checkpoint-tmp*')), process
        )
        time.sleep(random_.uniform(0, 0.05))
    else:
        alive = launch.wait_until(lambda: launch.logged(path) > before + 3, process)
    if not alive:
        status, _, err = launch.end(process)
        assert status == 0, err
        return False
    launch.kill(process)
    phase = 'before a step' if launch.logged(path) <= before else 'at a step'
    phase = kind if kind != 'any time' else phase
    phases[phase] = phases.get(phase, 0) + 1
    return True


def signals(count: int, seed: int, directory: Path) -> str:
    """SIGTERM or Ctrl-C once the run is compiled, sometimes a second one right after."""
    random_ = random.Random(seed)
    whole, _ = launch.reference()
    longest, run, path = 0.0, 0, directory / 'run'
    for i in range(count):
        number, second = random_.choice([signal.SIGTERM, signal.SIGINT]), i % 5 == 4
        process = launch.start(launch.command(path))
        before = launch.logged(path)
        step = before + random_.randint(1, 12)
        if launch.wait_until(lambda p=path, step=step: launch.logged(p) >= step, process):
            time.sleep(random_.uniform(0, 0.05))
            process.send_signal(number)
            if second:
                time.sleep(0.005)
                process.send_signal(signal.SIGTERM)
            longest = max(longest, _assert_stopped(process, path, number, second))
        else:
            status, _, err = launch.end(process)
            assert status == 0, err
            launch.assert_same(whole, path)
            run += 1
            path = directory / f'run{run}'
    launch.whole(path)
    launch.assert_same(whole, path)
    return f'{count} signals, the longest exit {longest:.1f} s, {run + 1} runs equal'


def _assert_stopped(process, path: Path, number: signal.Signals, second: bool) -> float:
    """Its status is the documented one, in time, and no step is lost; returns the seconds."""
    begin = time.monotonic()
    status, out, err = launch.end(process, seconds=5)
    seconds = time.monotonic() - begin
    if status == 0:  # it had ended already
        return seconds
    if second and status < 0:
        assert seconds < 1.5, f'the second signal took {seconds:.1f} s'
        return seconds
    assert status == 128 + number or (second and status == 128 + signal.SIGTERM), (status, err)
    assert 'To go on, run:' in out, out
    saved = max(int(step.name) for step in path.glob('checkpoints/*') if step.name.isdigit())
    assert saved >= launch.logged(path), 'a completed step is lost'
    return seconds


def resumes(count: int, seed: int, directory: Path) -> str:
    """A run of 40 steps, across epochs, stopped at `count` of them, by each way to read the data.

    Where it is done once, by worker processes alone.
    """
    chosen = sorted(random.Random(seed).sample(range(1, 41), count))
    config = _forty_steps()
    whole = fit(config, directory / 'whole')
    ways = [('resident', 0), ('stream', 0), ('stream', 1), ('stream', 2), ('stream', 4)]
    ways = ways if count > 1 else [('stream', 1)]
    for pipeline, workers in ways:
        config.data.pipeline, config.data.workers = pipeline, workers
        path = directory / f'{pipeline}{workers}'

        def stop(event):
            if event['kind'] == 'progress' and event['step'] in chosen:
                os.kill(os.getpid(), signal.SIGTERM)

        for step in chosen:
            assert int(fit(config, path, stop).state.step) == step
        end = fit(config, path)
        assert fingerprints.manifest(end.state) == fingerprints.manifest(whole.state), (
            pipeline,
            workers,
        )
        found = verify.differences(whole.workdir, path)
        assert not found, (pipeline, workers, found[:5])
    return f'{count} steps x {len(ways)} ways to read the data, all equal'


def _forty_steps():
    config = config_lib.get_config()
    config.model = {'name': 'mlp', 'hidden': (16,), 'norm': 'batch', 'dropout': 0.1}
    config.data.train, config.data.validation = 'train[:210]', 'test[:50]'
    config.augment = [{'name': 'pad_crop', 'padding': 1}]
    config.batch_size, config.epochs, config.ema_decay = 16, 40 * 16 / 210, 0.9
    config.log_every_steps, config.checkpoint_every_epochs = 1, 1.0
    return config


def two_at_once(count: int, seed: int, directory: Path) -> str:
    """A second run on a directory in use, and one on a directory whose run was killed."""
    fields = {'epochs': '2000', 'checkpoint_every_epochs': '2000', 'validate_every_epochs': '2000'}
    for i in range(count):
        path = directory / f'run{i}'
        first = launch.start(launch.command(path, **fields))
        assert launch.wait_until(lambda path=path: launch.logged(path) > 0, first)
        status, _, err = launch.run(launch.command(path, **fields))
        assert status == 2 and 'in use by another run' in err and 'Traceback' not in err, err
        launch.kill(first)
        third = launch.start(launch.command(path, **fields))
        before = launch.logged(path)
        assert launch.wait_until(lambda p=path, n=before: 0 < launch.logged(p) < n, third)
        launch.kill(third)
    return f'{count} second runs refused, {count} locks of killed runs taken over'


# A config whose run dies in step 7, as a driver or a decoder may.
_DIES = """
import os, signal

from jaxcls import config, workdir

append = workdir.append_metrics


def append_metrics(path, record):
    if record['step'] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, record)


def get_config():
    workdir.append_metrics = append_metrics
    return config.get_config()
"""


def crash_loop(count: int, seed: int, directory: Path) -> str:
    """Three starts that die at one step; the fourth explains, until its note is deleted."""
    (directory / 'dies.py').write_text(_DIES)
    words = launch.command(directory / 'run', f'--config={directory / "dies.py"}')
    for _ in range(count):
        for _ in range(3):
            status, _, err = launch.run(words)
            assert status == -signal.SIGKILL, (status, err)
        status, _, err = launch.run(words)
        assert status == 2 and 'The last 3 starts' in err and 'Traceback' not in err, err
        note = Path(re.search(r'delete (\S+\.attempts)', err)[1])
        note.unlink()
    return f'{count} loops stopped after three deaths'


ROWS = (
    Row(1, '{count} SIGKILLs at random moments of runs', kills, full=50, share=1),
    Row(2, '{count} SIGTERMs and Ctrl-Cs at random phases', signals, full=20, share=1),
    Row(3, 'resume at {count} steps of a run of 40, each pipeline', resumes, full=40, share=1),
    Row(13, 'two runs on one workdir, {count} times; locks left by SIGKILL', two_at_once, 20, 1),
    Row(15, 'crash loop: three restarts that die at one step, {count} times', crash_loop, 5, 1),
)
