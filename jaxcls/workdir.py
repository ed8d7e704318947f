"""A run's directory: config, metrics, checkpoints, and the lock that keeps it to one run.

config.json          the resolved config
environment.json     versions, git commit, devices
data.json            class names, image shape, sizes of the splits
metrics.jsonl        one JSON object a line: 'train' and 'validation' records
events.out.tfevents* the same for TensorBoard
checkpoints/STEP/    Orbax, each with a fingerprint of every array, verified on restore
result.json, *.png   written at the end
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import reprlib
import secrets
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from jaxcls import config as config_lib
from jaxcls import fingerprints
from jaxcls.errors import UserError

_PACKAGES = ('jaxcls', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the directory for this process; the system lets go of it when the process ends, however.

    Raises:
      UserError: another run holds it.
    """
    with writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / '.lock', timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f'{workdir} is in use by another run. Wait for it to end, or choose another --workdir.'
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writable(workdir: Path) -> Iterator[None]:
    """Makes what the system says against writing in a directory a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(_not_written(workdir, error.strerror or str(error))) from None


def _not_written(workdir: Path, reason: str) -> str:
    return (
        f'{workdir} cannot be written: {reason}. Make room there, or mend its permissions, and repeat the '
        'command; or choose another --workdir.'
    )


def write_json(path: Path, value: Any):
    """Writes JSON so that a reader finds the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + '\n')


def write_text(path: Path, text: str):
    """Like `write_json`, for any text."""
    # Another process, which may write the same file, has its own.
    part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.part')
    try:
        with part.open('w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check(workdir: Path, config: ConfigDict, tables: config_lib.Tables | None = None):
    """Raises UserError unless a run of the config may start, or go on, in the directory.

    `tables` complete the config of a run of an earlier version, as in `read_config`.
    """
    if set('[]*?') & set(str(workdir.absolute())):
        raise UserError(
            f'{workdir} has one of the characters []*? in its path, which Orbax takes for a '
            'pattern. Choose another --workdir.'
        )
    if (workdir / 'config.json').exists():
        changes = config_lib.differences(read_config(workdir, tables), config)
        if changes and _has_begun(workdir):
            raise UserError(another_config(workdir, changes))
    elif workdir.is_dir() and any(map(_is_foreign, workdir.iterdir())):
        raise UserError(
            f'{workdir} holds files but no run (no config.json). Choose an empty or new --workdir.'
        )


def check_same(config: ConfigDict, data: dict[str, Any]):
    """Raises UserError in every one of several processes unless all have this config and these data."""
    if jax.process_count() == 1:
        return
    known = {'config': config_lib.as_json(config), 'data': data}
    text = json.dumps(config_lib.flat(known)).encode()
    longest = multihost_utils.process_allgather(np.int32(len(text))).max()
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    first, *others = (json.loads(bytes(text)) for text in texts)
    for i, other in enumerate(others, 1):
        for field, values in config_lib.flat_differences(first, other).items():
            ours, theirs = map(reprlib.repr, values)
            raise UserError(
                f'{field} is {ours} in the first process and {theirs} in process {i}. Start all with the '
                'same config and the same data.'
            )


def another_config(workdir: Path, changes: dict[str, tuple[Any, Any]]) -> str:
    """The message where a directory has a run whose config differs, by `config.differences`."""
    lines = [f'  {key}: {old!r} there, {new!r} now' for key, (old, new) in changes.items()]
    return (
        f'{workdir} holds a run of a different config:\n' + '\n'.join(lines) + '\n'
        'Choose another --workdir (of `compress`, --out), or the same config to continue that run.'
    )


def _has_begun(workdir: Path) -> bool:
    """Whether there is anything to lose, here or in the runs of several seeds: a record or a checkpoint."""
    log = workdir / 'metrics.jsonl'
    return (
        (log.exists() and log.stat().st_size > 0)
        or has_checkpoints(workdir)
        or any(map(_has_begun, workdir.glob('seed*-*')))
    )


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run in the directory has saved a step."""
    # Orbax's directories of a save under way begin with the step, too.
    return any(path.name.isdigit() for path in workdir.glob('checkpoints/*'))


def shared_directory(workdir: Path, first: int, last: int) -> Path:
    """Where the checkpoints of seeds that train in one program are meanwhile, one for all of them."""
    return workdir / f'seeds-{first}-{last}'


def shared_directories(workdir: Path) -> dict[Path, range]:
    """Those directories that have checkpoints, and which seeds are in them."""
    names = {
        path: re.fullmatch(r'seeds-(\d+)-(\d+)', path.name) for path in workdir.glob('seeds-*')
    }
    return {
        path: range(int(name[1]), int(name[2]) + 1)
        for path, name in sorted(names.items())
        if name and has_checkpoints(path)
    }


def no_checkpoint(workdir: Path) -> UserError:
    """What to say of a run that has none: it has not saved one yet, or it has ended and they are gone."""
    if (workdir / 'result.json').is_file():
        return UserError(
            f'{workdir} has the result of a run whose checkpoints are gone. Restore them from a copy, '
            'or choose another --workdir.'
        )
    return UserError(f'{workdir} has no checkpoint yet. Train on: repeat its `jaxcls train`.')


def _is_foreign(path: Path) -> bool:
    return not (path.name.startswith('.') or path.name in ('environment.json', 'data.json'))


def start(
    workdir: Path,
    config: ConfigDict,
    data: dict[str, Any],
    tables: config_lib.Tables | None = None,
):
    """Claims a directory for a config and its data, or checks that the run in it has the same.

    Args:
      data: class names, image shape and sizes of the splits.
      tables: as of `check`.

    Raises:
      UserError: a run of another config or other data is there, or files that are no run; or the
        directory cannot be written.
    """
    check(workdir, config, tables)
    if _has_begun(workdir):
        _check_data(workdir, data)
        return
    with writable(workdir):
        write_json(workdir / 'environment.json', _environment())
        write_json(workdir / 'data.json', data)
        write_text(workdir / 'config.json', config_lib.to_json(config) + '\n')


def _check_data(workdir: Path, data: dict[str, Any]):
    """Raises UserError where the data are no longer those that the run began with."""
    before, now = read_data(workdir), json.loads(json.dumps(data))
    changed = [
        f'  {key}: {before[key]} then, {now[key]} now' for key in now if before[key] != now[key]
    ]
    if changed:
        raise UserError(
            f'The data set is no longer the one that the run in {workdir} began with:\n'
            + '\n'.join(changed)
            + '\nRestore the data, or choose another --workdir.'
        )


def read_data(workdir: Path) -> dict[str, Any]:
    """What a run knows of its data: `class_names`, `image_shape`, `examples` of its splits.

    Raises:
      UserError: data.json is missing or damaged.
    """
    path = workdir / 'data.json'
    data = read_json(path)
    if not isinstance(data, dict) or not {'class_names', 'image_shape', 'examples'} <= data.keys():
        raise UserError(f'{path} is damaged: its fields are missing. Restore it from a copy.')
    return data


def read_config(workdir: Path, tables: config_lib.Tables | None = None) -> ConfigDict:
    """The resolved config of a run.

    Args:
      tables: the factories of its sections, whose defaults it has where an earlier version wrote it.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / 'config.json'
    if not path.is_file():
        raise UserError(
            f'{workdir} is not a run: it has no config.json. '
            'Give the --workdir of an earlier `jaxcls train`.'
        )
    return _read(path, lambda text: config_lib.from_json(text, tables))


def read_json(path: Path) -> Any:
    """A JSON file of a run; UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f'{path} is missing; was the run stopped before it began?')
    return _read(path, json.loads)


def _read(path: Path, parse) -> Any:
    try:
        return parse(path.read_text(encoding='utf-8'))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f'{path} is damaged: {error}. Restore it from a copy.') from None


def _environment() -> dict[str, Any]:
    versions = {name: _version(name) for name in _PACKAGES}
    devices = sorted({device.device_kind for device in jax.devices()})
    return {
        'python': sys.version.split()[0],
        'command': sys.argv,
        'commit': _git_commit(),
        'devices': devices,
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
        **versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'unknown'


def _git_commit() -> str:
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        return subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 'unknown'


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order; a line cut short by a kill is left out."""
    path = workdir / 'metrics.jsonl'
    if not path.exists():
        return []
    return _read(path, lambda text: [json.loads(line) for line in text.split('\n')[:-1]])


def append_metrics(workdir: Path, record: dict[str, Any]):
    """Adds one record, on disk before this returns.

    Raises:
      UserError: it cannot be written; nothing of it is left.
    """
    path = workdir / 'metrics.jsonl'
    size = path.stat().st_size if path.exists() else 0
    with writable(workdir):
        try:
            with path.open('a') as file:
                file.write(json.dumps(record) + '\n')
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


def rewind_metrics(workdir: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Drops the records after a step, so that a run that resumes there writes each once.

    Returns:
      The records up to the step, and how many were dropped.

    Raises:
      UserError: metrics.jsonl is damaged or cannot be written.
    """
    records = read_metrics(workdir)
    kept = [record for record in records if record['step'] <= step]
    if jax.process_index() == 0:
        with writable(workdir):
            write_text(workdir / 'metrics.jsonl', ''.join(json.dumps(r) + '\n' for r in kept))
    return kept, len(records) - len(kept)


_DEATHS = 3  # at one step, after which a run is not started again


@contextlib.contextmanager
def attempt(workdir: Path, step: int) -> Iterator[Callable[[int], None]]:
    """Finds a run that dies at the same step each time it is started.

    `.attempts` has a line for each start that ended in no way known here (killed, a crash), `STEP UNDER_WAY`:
    the step that it went on from, and the last that it began. Yields `begin_step(step)`, which writes
    the second of this start: it costs microseconds, and a kill leaves it there. A start that ends well,
    by a signal or with a message removes the file.

    Raises:
      UserError: the last three starts from this step all died in the same one.
    """
    if jax.process_index():
        yield lambda step: None
        return
    path = workdir / '.attempts'
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    last = [line for line in lines if re.fullmatch(rf'{step} \d+', line)][-_DEATHS:]
    if len(last) == _DEATHS and len(set(last)) == 1:
        raise UserError(
            f'The last {_DEATHS} starts of {workdir} went on from step {step} and died in step '
            f'{last[0].split()[1]}, each without a message of ours: what they printed last may say why. '
            'Out of memory is the most frequent reason: start anew in another --workdir with a smaller '
            f'config.batch_size. To try this run once more, delete {path}.'
        )
    before = ''.join(f'{line}\n' for line in last)
    with writable(workdir):
        write_text(path, before)
        file = path.open('r+b', buffering=0)

    def begin_step(under_way: int):
        os.pwrite(file.fileno(), f'{step} {under_way}\n'.encode(), len(before))

    with file:
        try:
            yield begin_step
        except (UserError, KeyboardInterrupt):
            path.unlink(missing_ok=True)
            raise
    path.unlink(missing_ok=True)


_SECONDS_TO_SAVE = 300  # a step, at most
_PART = '*.orbax-checkpoint-tmp*'  # what Orbax calls a step that it has not finished


class Restored(NamedTuple):
    """A verified checkpoint."""

    step: int
    tree: Any


class Checkpoints:
    """Orbax checkpoints of a pytree: the newest ones and the best are kept, all are verified.

    Orbax restores flipped bits without noticing, so each step carries a fingerprint of every array.
    """

    def __init__(self, workdir: Path, keep: int = 2, read_only: bool = False):
        newest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics['top1'],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            enable_async_checkpointing=not read_only,
            # Where one of several processes cannot write, the others wait for it.
            async_options=ocp.AsyncOptions(timeout_secs=_SECONDS_TO_SAVE),
        )
        self.read_only = read_only
        self.directory = (workdir / 'checkpoints').absolute()
        try:
            self.manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=('tree', 'manifest')
            )
        except OSError:
            raise
        except Exception as error:  # Orbax raises many kinds where a step's metadata are damaged
            raise UserError(
                f'The checkpoints in {self.directory} cannot be opened: {_first_line(error)}. Restore them '
                'from a copy, or move the damaged step elsewhere.'
            ) from None

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None):
        """Starts saving in the background; the arrays may be donated once this returns.

        Raises:
          UserError: this step, or the one before, cannot be saved.
        """
        args = ocp.args.Composite(
            tree=ocp.args.PyTreeSave(fingerprints.plain(tree)),
            manifest=ocp.args.JsonSave(fingerprints.manifest(tree)),
        )
        _silence_closed_loops()
        with self._saving():
            self.manager.save(step, args=args, metrics=metrics, force=True)

    @contextlib.contextmanager
    def _saving(self):
        """Makes what keeps a step from being saved a UserError."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds when a disk is full
            if jax.process_count() > 1:
                while 'barrier' in str(error).lower() and error.__context__:
                    error = error.__context__  # why this process did not come to it
                if 'barrier' in str(error).lower():
                    raise  # another one did not
            steps = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit()]
            saved = max(steps, default=None)
            kept = 'No step is saved yet.' if saved is None else f'Step {saved} is saved.'
            system = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore has it
            reason = os.strerror(int(system[1])) if system else _first_line(error)
            raise UserError(f'{_not_written(self.directory.parent, reason)} {kept}') from None

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """The newest checkpoint whose arrays match their fingerprint, or exactly `step`.

        Args:
          like: pytree of ShapeDtypeStructs with shardings.
          step: one step, and no other.

        Returns:
          The step and the tree; None where there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints, and none is intact.
        """
        steps = sorted(self.manager.all_steps(), reverse=True) if step is None else [step]
        bad = []
        for candidate in steps:
            tree, reason = self.read(candidate, like)
            if _everywhere(tree is not None):
                for damaged in bad:
                    self._set_aside(*damaged)
                return Restored(candidate, tree)
            bad.append((candidate, reason or 'damaged for another process'))
        if not bad:
            return None
        raise UserError(
            f'No intact checkpoint that fits this run in {self.directory}:\n'
            + '\n'.join(f'  step {step}: {reason}' for step, reason in bad)
            + '\nRestore the directory from a copy, or start anew in another --workdir.'
        )

    def read(self, step: int, like: Any) -> tuple[Any, str]:
        """The tree of a step and '', or None and why it is not what was saved; `like` as for `restore`."""
        _silence_closed_loops()
        try:
            return self._restore_verified(step, like), ''
        except Exception as error:  # Orbax and TensorStore raise many kinds on damage
            return None, _first_line(error)

    def manifest(self, step: int) -> dict[str, list]:
        """The `manifest` that was saved with a step."""
        args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args).manifest

    def _restore_verified(self, step: int, like: Any) -> Any:
        plain = fingerprints.plain(like)
        saved = self.manifest(step)
        shapes = {key: value[:2] for key, value in saved.items()}
        fingerprints.compare(fingerprints.shapes(like), shapes)
        tree_args = ocp.args.PyTreeRestore(
            plain, restore_args=ocp.checkpoint_utils.construct_restore_args(plain)
        )
        restored = self.manager.restore(step, args=ocp.args.Composite(tree=tree_args))
        tree = _like(like, restored.tree)
        fingerprints.compare(fingerprints.manifest(tree), saved)
        return tree

    def _set_aside(self, step: int, reason: str):
        """Renames a damaged step out of the way, by one process of all."""
        bad = self.directory / str(step)
        renamed = ''
        if not self.read_only and not jax.process_index() and bad.exists():
            names = (f'damaged-{step}-{i}' for i in itertools.count())
            target = next(p for p in map(self.directory.with_name, names) if not p.exists())
            bad.rename(target)
            renamed = f'; it is now {target.name}'
        if _everywhere(True) and not self.read_only:
            self.manager.reload()
        warnings.warn(f'Checkpoint of step {step} is damaged ({reason}){renamed}.', stacklevel=3)

    def find(self, which: str | int, records: list[dict[str, Any]]) -> int | None:
        """The step of 'latest' (None: the newest intact one), of 'best', or of a number, if kept.

        Raises:
          UserError: there is no such checkpoint.
        """
        which = str(which)
        if which == 'latest':
            return None
        kept = self.manager.all_steps()
        scores = {r['step']: r['top1'] for r in records if r['kind'] == 'validation'}
        if which == 'best' and (scored := [step for step in kept if step in scores]):
            return max(scored, key=lambda step: (scores[step], step))
        if which.isdigit() and int(which) in kept:
            return int(which)
        raise UserError(
            f'No checkpoint {which!r} in {self.directory}. '
            f"Give 'latest', 'best' or one of the steps {sorted(kept)}."
        )

    def wait(self):
        """Returns when all that was saved is on disk; UserError where it cannot be."""
        with self._saving():
            self.manager.wait_until_finished()

    def check(self):
        """UserError where a step that is being saved in the background cannot be."""
        with self._saving():
            self.manager.check_for_errors()

    def close(self):
        """Waits, then lets go of Orbax's threads; UserError where what it waits for cannot be saved."""
        try:
            with self._saving():
                self.manager.close()
        finally:
            if not self.read_only and not jax.process_index():
                self._remove_parts()

    def _remove_parts(self):
        """Removes what there is of a step that could not be saved; TensorStore may still write to it."""
        limit = time.monotonic() + 5
        while (parts := [*self.directory.glob(_PART)]) and time.monotonic() < limit:
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)
            time.sleep(0.1)


def _first_line(error: Exception) -> str:
    text = getattr(error, 'strerror', None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _everywhere(ok: bool) -> bool:
    """Whether all processes say so; each must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.int32(ok)).all())


def _silence_closed_loops():
    """After a failure, TensorStore reports its other reads or writes to a loop that Orbax has closed.

    Python prints a traceback for each, and a warning for each that had not begun; they say nothing
    that the failure did not.
    """
    warnings.filterwarnings(
        'ignore', r"coroutine '.*_get_array_metadatas' was never awaited", RuntimeWarning
    )
    hook = sys.unraisablehook

    def quiet(unraisable):
        if not re.search('Event loop is closed|reading array index', str(unraisable.exc_value)):
            hook(unraisable)

    if getattr(hook, '__name__', '') != 'quiet':
        sys.unraisablehook = quiet


def _like(like: Any, plain: dict[str, Any]) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    values = [
        jax.random.wrap_key_data(plain[jax.tree_util.keystr(path)])
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else plain[jax.tree_util.keystr(path)]
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(treedef, values)
