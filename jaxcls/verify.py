"""Proofs: that a run's checkpoints are intact, and that a config's run resumes bit for bit here.

The second trains a few steps twice in processes of their own, once without a break and once killed and
started again, and compares all that they leave.
"""

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fingerprints, results, sharding
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError

_TIMED = ('seconds', 'images_per_second')  # what differs between two equal runs
_STEPS, _SAVES, _KILLS = 12, 4, 2  # of the short run


def verify(workdir: str | Path) -> list[dict[str, Any]]:
    """Reads every checkpoint of a run, or of its seeds, and compares it with its fingerprints.

    Returns:
      For each checkpoint `workdir`, `step`, `arrays` (how many) and `problem`, '' where it is intact.

    Raises:
      UserError: no run there, or its other files are damaged, or it has no checkpoints.
    """
    workdir = Path(workdir)
    config = experiment_lib.resolve(workdir_lib.read_config(workdir))
    rows = []
    for directory in results.member_directories(workdir, config):
        if (directory / 'config.json').is_file():
            rows += _verify(directory)
    for directory, seeds in workdir_lib.shared_directories(workdir).items():
        experiment = _experiment(workdir / f'seed-{seeds[0]}')
        like = experiment_lib.abstract_seeds(experiment, sharding.make_mesh(), len(seeds))
        rows += _read(directory, like)
    if not rows:
        raise workdir_lib.no_checkpoint(workdir)
    return rows


def _verify(directory: Path) -> list[dict[str, Any]]:
    experiment = _experiment(directory)
    workdir_lib.read_metrics(directory)
    return _read(directory, experiment_lib.abstract_checkpoint(experiment, sharding.make_mesh()))


def _experiment(directory: Path) -> experiment_lib.Experiment:
    config = experiment_lib.resolve(workdir_lib.read_config(directory))
    if experiment_lib.is_baseline(config):
        raise UserError(f'{directory} is a run of {config.model.name}, which has no checkpoints.')
    return experiment_lib.build_for(config, workdir_lib.read_data(directory))


def _read(directory: Path, like) -> list[dict[str, Any]]:
    with _opened(directory) as checkpoints:
        return [
            {
                'workdir': str(directory),
                'step': step,
                'arrays': len(fingerprints.shapes(like)),
                'problem': checkpoints.read(step, like)[1],
            }
            for step in sorted(checkpoints.manager.all_steps())
        ]


def _opened(directory: Path):
    return contextlib.closing(workdir_lib.Checkpoints(directory, read_only=True))


def differences(workdir: Path, other: Path) -> list[str]:
    """What differs between two runs of a config: lines of the log, and arrays of the last checkpoint."""
    logs = [
        [{k: v for k, v in r.items() if k not in _TIMED} for r in workdir_lib.read_metrics(path)]
        for path in (workdir, other)
    ]
    found = [f'{len(logs[0])} and {len(logs[1])} log lines'] if len(logs[0]) != len(logs[1]) else []
    found += [
        f'the {a["kind"]} record of step {a["step"]}' for a, b in zip(*logs, strict=False) if a != b
    ]
    saved = []
    for path in (workdir, other):
        with _opened(path) as checkpoints:
            step = checkpoints.manager.latest_step()
            saved.append({} if step is None else {'step': step, **checkpoints.manifest(step)})
    names = sorted(saved[0].keys() | saved[1].keys())
    return found + [name for name in names if saved[0].get(name) != saved[1].get(name)]


def resumes(config: ConfigDict, directory: Path, seed: int = 0) -> dict[str, Any]:
    """Whether a run of a config that is killed and started again ends as one that is not.

    The run is cut to 12 steps, with a checkpoint after every third. One is killed by SIGKILL after two
    of its steps, at random.

    Args:
      config: resolved.
      directory: empty; the two runs are left there, `whole` and `killed`.

    Returns:
      `steps`, `killed` (the last step logged before each kill), `arrays` compared, and what
      `differs`, [] where nothing does.

    Raises:
      UserError: the run itself fails; its message is on stderr.
    """
    reader, _, _ = experiment_lib.open_data(config)
    file = directory / 'short.py'
    workdir_lib.write_json(directory / 'short.json', _short(config, len(reader.split.source)))
    file.write_text(
        'from pathlib import Path\n\nfrom jaxcls import config\n\n\ndef get_config():\n'
        '    return config.from_json(Path(__file__).with_suffix(".json").read_text())\n'
    )
    whole, killed = directory / 'whole', directory / 'killed'
    _end(_start(file, whole))
    random_ = random.Random(seed)
    stops = sorted(random_.sample(range(1, _STEPS), _KILLS))
    reached = [_kill_after(_start(file, killed), killed, step) for step in stops]
    _end(_start(file, killed))
    with _opened(whole) as checkpoints:
        arrays = len(checkpoints.manifest(checkpoints.manager.latest_step()))
    found = differences(whole, killed)
    return {'steps': _STEPS, 'killed': reached, 'arrays': arrays, 'differs': found}


def _short(config: ConfigDict, examples: int) -> dict[str, Any]:
    epochs = _STEPS * config.batch_size / examples
    short = ConfigDict(config.to_dict())
    short.update(
        epochs=epochs,
        warmup_epochs=min(config.warmup_epochs, epochs / 4),
        log_every_steps=1,
        validate_every_epochs=epochs,
        checkpoint_every_epochs=epochs / _SAVES,
        early_stopping_epochs=0.0,
        seeds=1,
    )
    return config_lib.as_json(short)


def _start(file: Path, workdir: Path) -> subprocess.Popen:
    command = [sys.executable, '-m', 'jaxcls.main', f'--config={file}', f'--workdir={workdir}']
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _end(process: subprocess.Popen):
    try:
        failed = process.wait()
    except KeyboardInterrupt:
        process.kill()
        raise
    if failed:
        raise UserError(
            f'A run of the config ended with status {process.returncode}; its own message is above. '
            'Mend that first.'
        )


def _kill_after(process: subprocess.Popen, workdir: Path, step: int) -> int:
    """Kills a run once it has logged a step; returns the last that it had."""
    while process.poll() is None and _logged(workdir) < step:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return _logged(workdir)


def _logged(workdir: Path) -> int:
    records = workdir_lib.read_metrics(workdir)
    return records[-1]['step'] if records else 0
