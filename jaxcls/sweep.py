"""Many runs as one: the seeds of a config, and a list or grid of settings, each with its seeds.

Every member is an ordinary run in a directory of its own. So a sweep that is killed goes on where it
was, several processes may each run some of its members, and every command that takes a run takes a
member.
"""

import hashlib
import itertools
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxcls import baselines, loop, results, sharding, train
from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import seeds as seeds_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError

SIGNALS = ('SIGINT', 'SIGTERM')
# What may differ when the seeds of a config are added to.
_GROUP_FIELDS = {'seeds', 'seeds_per_program'}


class Setting(NamedTuple):
    """One config of a sweep; `name` is its label and its directory."""

    name: str
    config: ConfigDict


class Outcome(NamedTuple):
    """What became of the seeds of one setting.

    Attributes:
      name: of the setting.
      group: the runs.
      stopped: 'done', 'paused' (one of them before its last epoch), or the signal that stopped it.
    """

    name: str
    group: results.Group
    stopped: str

    def values(self, key: str, until_epoch: float = math.inf) -> list[float]:
        """A number of each seed's last validation up to an epoch; those that diverged have none."""
        alive = [member for member in self.group.members if not member.diverged]
        found = [_validations(member, until_epoch) for member in alive]
        values = [records[-1][key] for records in found if records]
        return [value for value in values if value is not None]

    def mean(self, key: str, until_epoch: float = math.inf) -> tuple[float, float]:
        """Mean and half-width of `values`; NaN where there is none."""
        return results.mean_interval(self.values(key, until_epoch))

    def diverged(self) -> list[str]:
        """The messages of the seeds that diverged."""
        return [member.diverged for member in self.group.members if member.diverged]


def _validations(member: results.Member, until_epoch: float) -> list[dict[str, Any]]:
    found = member.of_kind('validation')
    if math.isinf(until_epoch):
        return found
    config = member.config
    examples = member.data['examples'][config.data.train]
    last = config_lib.epoch_steps(until_epoch, examples, config.batch_size)
    return [record for record in found if record['step'] <= last]


def fit_seeds(
    config: ConfigDict,
    workdir: str | Path,
    on_event: loop.OnEvent = lambda event: None,
    until_epoch: float = math.inf,
) -> Outcome:
    """Trains `config.seeds` networks, with the seeds `config.seed`, `config.seed + 1`, ....

    Seed s is the run `workdir/seed-s`; one seed is a run in the workdir itself. Complete runs are left
    alone, so more seeds can be asked for later. A run that diverges is noted in its diverged.json, and
    the others go on.

    Args:
      on_event: as of `train.fit`; each run is announced by a 'member' event with its workdir.
      until_epoch: where to pause all of them.

    Raises:
      UserError: as `train.fit`; or runs of another config are there.
    """
    workdir, config = Path(workdir), experiment_lib.resolve(config)
    members, size = members_of(config, workdir), seeds_lib.per_program(config)
    if config.seeds > 1:
        _claim(workdir, config)
    programs = seeds_lib.programs(members, workdir, size, _is_over)
    if not programs:
        on_event({'kind': 'complete', 'workdir': workdir})
    stopped = 'done'
    for program in programs:
        if config.seeds > 1:
            on_event({'kind': 'member', 'workdirs': [directory for _, directory in program]})
        ended = _fit(program, workdir, on_event, until_epoch)
        stopped = ended if ended != 'done' else stopped
        if stopped in SIGNALS:
            break
    group = results.read(workdir)
    if config.seeds > 1 and stopped == 'done':
        summary = group.summary()
        sharding.on_first_process(lambda: workdir_lib.write_json(workdir / 'result.json', summary))
    return Outcome(workdir.name, group, stopped)


def members_of(config: ConfigDict, workdir: Path) -> list[tuple[ConfigDict, Path]]:
    """The config and the directory of each seed."""
    directories = results.member_directories(workdir, config)
    configs = []
    for i in range(config.seeds):
        member = ConfigDict(config.to_dict())
        member.update(seed=config.seed + i, seeds=1, seeds_per_program=0)
        configs.append(member.lock())
    return list(zip(configs, directories, strict=True))


def _claim(workdir: Path, config: ConfigDict):
    """Writes the config of a group, which may gain seeds and change in nothing else."""
    path, text = workdir / 'config.json', config_lib.to_json(config) + '\n'
    if not (path.is_file() and _grows(_read_config(workdir), config)):
        workdir_lib.check(workdir, config, experiment_lib.TABLES)
    if not path.is_file() or path.read_text(encoding='utf-8') != text:
        with workdir_lib.writable(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            workdir_lib.write_text(path, text)


def _read_config(workdir: Path) -> ConfigDict:
    return workdir_lib.read_config(workdir, experiment_lib.TABLES)


def _grows(old: ConfigDict, config: ConfigDict) -> bool:
    """Whether a group of several seeds is the same or gains some."""
    return (
        config_lib.differences(old, config).keys() <= _GROUP_FIELDS
        and 1 < old.seeds <= config.seeds
    )


def _is_over(config: ConfigDict, directory: Path) -> bool:
    """Whether a run of this config has ended there, well or badly."""
    ended = any((directory / name).is_file() for name in ('result.json', results.DIVERGED))
    return ended and not config_lib.differences(_read_config(directory), config)


def _fit(members, workdir: Path, on_event, until_epoch: float) -> str:
    """Trains the members, in one program where they are several, and returns how they stopped."""
    try:
        if len(members) > 1:
            return seeds_lib.fit_together(members, workdir, on_event, until_epoch)
        [(config, directory)] = members
        stopped = train.fit(config, directory, on_event, until_epoch).stopped
    except loop.Diverged as error:
        if len(members) == 1:  # several have noted it, each when it did
            [(_, directory)] = members
            workdir_lib.write_json(directory / results.DIVERGED, {'message': str(error)})
        stopped = 'diverged'
    return {'early': 'done', 'diverged': 'done'}.get(stopped, stopped)


def settings(
    load: Callable[[list[tuple[str, str]]], ConfigDict],
    grid: Sequence[str] = (),
    listed: Sequence[str] = (),
) -> list[Setting]:
    """The settings that the command line describes: each listed one, with each point of the grid.

    Args:
      load: overrides to a resolved config.
      grid: such as 'learning_rate=0.1,0.03' or 'model.hidden=[(64,), (64, 64)]'.
      listed: overrides that go together, 'model.name=mlp learning_rate=0.01'.

    Raises:
      UserError: a text that is not written so, a mistake in a config, the same setting twice.
    """
    axes = [_parse_axis(text) for text in grid]
    rows = [[_parse_pair(word) for word in _words(text)] for text in listed] or [[]]
    points = [[*row, *point] for row in rows for point in itertools.product(*axes)]
    names = [', '.join(f'{path}={value}' for path, value in point) or 'plain' for point in points]
    for name, point in zip(names, points, strict=True):
        fields = [path for path, _ in point]
        if twice := next((path for path in fields if fields.count(path) > 1), ''):
            raise UserError(f'The setting {name!r} gives {twice} twice; give it once.')
    found = [Setting(name, load(point)) for name, point in zip(names, points, strict=True)]
    first = {}
    for name, config in found:
        text = config_lib.to_json(config)
        if text in first:
            other = f', first as {first[text]!r}' if first[text] != name else ''
            raise UserError(f'The setting {name!r} is there twice{other}; give each once.')
        first[text] = name
        if experiment_lib.is_baseline(config):
            baselines.make_baseline(config)  # a conflict is told before another is trained
    return found


def _parse_axis(text: str) -> list[tuple[str, str]]:
    path, values = _parse_pair(text)
    items = config_lib.literal(values) if values.startswith('[') else values.split(',')
    if not isinstance(items, list) or not items:
        raise UserError(f'--grid {text!r} has no values; write --grid {path}=VALUE,VALUE.')
    return [(path, str(item).strip()) for item in items]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f'--setting {text!r} cannot be read: {error}. Write "FIELD=VALUE FIELD=VALUE".'
        ) from None


def _parse_pair(text: str) -> tuple[str, str]:
    path, equals, value = text.partition('=')
    if not (path and equals and value):
        raise UserError(f'{text!r} is not written FIELD=VALUE, such as learning_rate=0.1.')
    return path.removeprefix('--').removeprefix('config.'), value


def members(settings: Sequence[Setting]) -> list[tuple[str, ConfigDict]]:
    """Every run of a sweep, a seed of a setting: the setting's name and the run's config."""
    return [
        (setting.name, config)
        for setting in settings
        for config, _ in members_of(setting.config, Path())
    ]


def run_member(
    settings: Sequence[Setting], workdir: str | Path, number: int, on_event: loop.OnEvent
) -> Outcome:
    """Trains one run of a sweep, by its number in `members`, and returns what became of it.

    Many processes may do so at once, on one host or many, for the same workdir; then `run` finds all
    runs complete.

    Raises:
      UserError: no such member; as `train.fit`.
    """
    owners = [(s, i) for s in settings for i in range(s.config.seeds)]
    if not 0 <= number < len(owners):
        raise UserError(
            f'Member {number} of a sweep of {len(owners)}; give 0 to {len(owners) - 1}.'
        )
    setting, i = owners[number]
    directory = Path(workdir) / directory_name(setting.name)
    if setting.config.seeds > 1:
        _claim(directory, setting.config)
    member = members_of(setting.config, directory)[i]
    stopped = 'done' if _is_over(*member) else _fit([member], directory, on_event, math.inf)
    return Outcome(setting.name, results.read(member[1]), stopped)


def directory_name(name: str) -> str:
    """A setting's name as that of a directory: short, without characters that systems forbid."""
    plain = re.sub(r'[^\w.=+-]+', '_', name)
    if plain == name and len(plain) <= 100:
        return plain
    return f'{plain[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}'


def run(
    settings: Sequence[Setting],
    workdir: str | Path,
    on_event: loop.OnEvent = lambda event: None,
    rungs: int = 1,
    keep: float = 0.5,
) -> list[Outcome]:
    """Trains every setting with its seeds, or successively halves them.

    With several rungs all settings are trained up to a first epoch and paused; the best `keep` of
    them, by the mean of their last validation accuracy, go on to an epoch `1 / keep` times as late,
    and so on to the last one. Every run has the schedule of its whole length, and goes on where it
    was paused. Choose by a validation split that is not the test split.

    Jamieson & Talwalkar, 2016, https://arxiv.org/abs/1502.07943.

    Returns:
      The outcome of each setting, best first; those that were dropped are 'paused'.

    Raises:
      UserError: as `fit_seeds`; rungs or keep out of range.
    """
    if rungs < 1 or not 0 < keep < 1:
        raise UserError(
            f'rungs is {rungs} and keep {keep}; give at least 1 rung, and keep between 0 and 1.'
        )
    if rungs > 1:
        _check_rungs(settings, keep ** (rungs - 1))
    # The last rung of each setting, and its epoch.
    reached: dict[str, tuple[int, float, Outcome]] = {}
    alive = list(settings)
    for rung in range(rungs):
        last = rung == rungs - 1
        for number, setting in enumerate(alive, 1):
            until = math.inf if last else setting.config.epochs * keep ** (rungs - 1 - rung)
            directory = Path(workdir) / directory_name(setting.name)
            name = setting.name if rungs == 1 else f'{setting.name}, rung {rung + 1} of {rungs}'
            on_event({'kind': 'setting', 'name': name, 'number': number, 'count': len(alive)})
            outcome = fit_seeds(setting.config, directory, on_event, until)
            reached[setting.name] = rung, until, outcome._replace(name=setting.name)
            if outcome.stopped in SIGNALS:
                return _ranked(reached)
        best = [outcome.name for outcome in _ranked(reached)][: math.ceil(len(alive) * keep)]
        alive = [setting for setting in alive if setting.name in best]
    return _ranked(reached)


def _check_rungs(settings: Sequence[Setting], share: float):
    """Raises UserError where a setting would be judged before its first validation."""
    for name, config in settings:
        first = config.epochs * share
        if first < config.validate_every_epochs and not experiment_lib.is_baseline(config):
            raise UserError(
                f'The first rung of {name} ends at epoch {first:g}, before its first validation, at '
                f'epoch {config.validate_every_epochs:g}. Give fewer --rungs, a larger --keep or '
                f'--config.validate_every_epochs={first:g}.'
            )


def _ranked(reached: dict[str, tuple[int, float, Outcome]]) -> list[Outcome]:
    """Best first, as they were at their last rung; a later rung before an earlier one."""

    def key(item):
        rung, until, outcome = item
        top1 = outcome.mean('top1', until)[0]
        return rung, -math.inf if math.isnan(top1) else top1

    return [outcome for *_, outcome in sorted(reached.values(), key=key, reverse=True)]


def seeds_table(outcome: Outcome) -> dict[str, Any]:
    """The seeds of one setting as a section of `page`: each run, and their mean."""
    keys = ('top1', 'loss', 'f1_macro', 'ece', 'seconds')
    group = outcome.group
    rows = [
        [member.workdir.name, *(member.result.get(key) for key in keys)] for member in group.members
    ]
    n = int(np.isfinite(group.values('top1')).sum())
    cells = [{'mean': mean, 'half': half, 'n': n} for mean, half in map(group.mean, keys)]
    return {
        'kind': 'table',
        'title': f'{group.name}: mean and 95% t-interval over {n} seeds',
        'columns': ['run', 'validation accuracy', 'loss', 'macro F1', 'ECE', 'time'],
        'formats': ['text', 'percent', 'number', 'number', 'number', 'seconds'],
        'rows': [*rows, ['mean', *cells]],
    }


def table(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The outcomes as a section of `page`: accuracy, loss, epochs and how each ended."""
    rows = []
    for outcome in outcomes:
        numbers = [
            {'mean': mean, 'half': half, 'n': len(outcome.values(key))}
            for key in ('top1', 'loss')
            for mean, half in [outcome.mean(key)]
        ]
        lost, all_ = len(outcome.diverged()), len(outcome.group.members)
        epochs = max((r['epoch'] for m in outcome.group.members for r in m.records), default=0.0)
        rows.append(
            [
                outcome.name,
                *numbers,
                epochs,
                f'{lost} of {all_} diverged' if lost else outcome.stopped,
            ]
        )
    return {
        'kind': 'table',
        'title': 'Settings, best first',
        'columns': ['setting', 'validation accuracy', 'loss', 'epochs', 'ended'],
        'formats': ['text', 'percent', 'number', 'number', 'text'],
        'rows': rows,
    }
