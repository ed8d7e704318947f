"""A question as data: a config, axes of overrides, what to measure. The answer is a table and a chart.

A study file has `get_study(data) -> Study`. `run` trains every combination of the axes with its seeds,
as a sweep, and writes the answer as study.json, report.html and pictures.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxcls import config as config_lib
from jaxcls import estimators, evaluation, intervals, loop, registry, results, sweep
from jaxcls import experiment as experiment_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError
from jaxcls.report import page

Overrides = Mapping[str, Any]


class Measure(NamedTuple):
    """What is measured of a run.

    Attributes:
      of: `results.Member -> float | None`; or a dict {x: float} for a curve.
      format: of `page`: 'percent', 'number', 'integer', 'seconds'.
      x: label of a curve's x; '' for a single number.
      log_x, log_y: logarithmic axes of its chart.
      group: `of` takes the `results.Group` of all seeds and returns {x: [values]}; [values] without x.
      chart: False leaves a single number to the table.
      facet: of a curve: the axis that has a chart for each of its labels; '' is the first of several.
    """

    of: Callable[[Any], Any]
    format: str = 'percent'
    x: str = ''
    log_x: bool = False
    log_y: bool = False
    group: bool = False
    chart: bool = True
    facet: str = ''


class Study(NamedTuple):
    """A question and the runs that answer it.

    Attributes:
      question: one or two sentences.
      config: what all runs share.
      axes: for each axis, its labels and what each sets, by dotted field: `{'loss': {'focal': {'loss':
        {'name': 'focal'}}, ...}, 'layers': {'2': {'model.hidden': (64, 64)}, ...}}`. Labels that are
        numbers make a numeric axis. A section, or `augment`, is set whole.
      measures: by name.
      tune: a field and the values to choose from for each setting, by the accuracy on `tune_split`
        with one seed: `{'learning_rate': (0.1, 0.01)}`; or the values for each label of an axis,
        `{'learning_rate': {'SGD': (0.1, 0.01), 'Adam': (0.001,)}}`.
      tune_split: validation examples that neither training nor the measures use.
      log_x: the numeric axis of the charts is logarithmic.
      against: names of measures; each makes a chart of the first measure against it, with a point for
        each setting. Its x is logarithmic where that measure's `log_y` is.
    """

    question: str
    config: ConfigDict
    axes: Mapping[str, Mapping[str, Overrides]]
    measures: Mapping[str, Measure]
    tune: Mapping[str, Sequence | Mapping[str, Sequence]] = {}
    tune_split: str = ''
    log_x: bool = False
    against: Sequence[str] = ()


class Stopped(Exception):
    """A signal has stopped the runs, of which all are saved; its name is the message."""


class Row(NamedTuple):
    """A setting, measured: label of each axis, what was tuned, values of each measure over the seeds.

    The values of a single number are a list; those of a curve {x: list}. `seconds` are of all its runs
    together, whenever they were trained.
    """

    labels: dict[str, str]
    tuned: dict[str, Any]
    values: dict[str, Any]
    seeds: int
    seconds: float


def load(name: str, data: str) -> Study:
    """Runs a study's file and returns its study; the file is code.

    Args:
      name: a path, or the name of a file in experiments/studies.
      data: 'digits', 'mnist', 'cifar10' or what else the study knows.

    Raises:
      UserError: no such study, an error in it, or data that it does not know.
    """
    folder = Path('experiments/studies')
    path = Path(name) if name.endswith('.py') else folder / f'{name}.py'
    if not path.is_file():
        known = [file.stem for file in folder.glob('*.py') if 'get_study' in file.read_text()]
        raise UserError(
            f'No study {name!r}. {registry.did_you_mean(name, known)} Run it where '
            f'{folder} is, or give the path of a file.'
        )
    study = config_lib.run_file(path, 'get_study', data)
    if not isinstance(study, Study):
        raise UserError(
            f'get_study of {path} returned {type(study).__name__}; return a jaxcls.study.Study.'
        )
    return study


def check_free(study: Study, paths: Iterable[str]):
    """Raises UserError where the study itself sets, or chooses, a field that was overridden."""
    taken = {
        field: axis
        for axis, labels in study.axes.items()
        for fields in labels.values()
        if not _is_baseline(fields)
        for field in fields
    } | dict.fromkeys(study.tune, 'tune')
    for path in paths:
        for field, axis in taken.items():
            if config_lib.overlap(path, field):
                raise UserError(
                    f'config.{path} cannot be set: the study varies config.{field} ({axis!r}). '
                    'Leave it out, or change a copy of the study.'
                )


def _is_baseline(fields: Overrides) -> bool:
    return fields.get('model', {}).get('name') in estimators.BASELINES


def settings(study: Study) -> list[tuple[dict[str, str], sweep.Setting]]:
    """Every combination of the axes: its labels and its resolved config.

    What an axis sets and only networks read, such as `epochs`, is reset for a classical baseline.

    Raises:
      UserError: a mistake in a config, or labels that give two settings one name.
    """
    names, found = list(study.axes), []
    for labels in itertools.product(*study.axes.values()):
        config = ConfigDict(study.config.to_dict())
        for axis, label in zip(names, labels, strict=True):
            override(config, study.axes[axis][label])
        if experiment_lib.is_baseline(config):
            override(config, classical(**config.model))
        found.append(
            (
                dict(zip(names, labels, strict=True)),
                sweep.Setting(', '.join(labels), experiment_lib.resolve(config)),
            )
        )
    counts = collections.Counter(setting.name for _, setting in found)
    twice = next((name for name, count in counts.items() if count > 1), '')
    if twice:
        raise UserError(
            f'Two settings of the study are named {twice!r}; change a label of an axis.'
        )
    return found


def override(config: ConfigDict, fields: Overrides):
    """Sets dotted fields in place; a mapping replaces a section whole."""
    for path, value in fields.items():
        node = config
        *parents, last = path.split('.')
        for part in parents:
            if part not in node:
                raise UserError(
                    f'A study sets config.{path}, and there is no {part!r}. '
                    f'{registry.did_you_mean(part, node)}'
                )
            node = node[part]
        node[last] = ConfigDict(value) if isinstance(value, (Mapping, ConfigDict)) else value


def run(
    study: Study, workdir: str | Path, on_event: loop.OnEvent = lambda event: None
) -> list[dict[str, Any]]:
    """Runs a study, or goes on with it, and returns the sections of its page.

    Raises:
      UserError: a mistake in a config, found before the first run.
      Stopped: by a signal, after saving.
    """
    workdir, todo, rows = Path(workdir), settings(study), []
    for i, (labels, setting) in enumerate(todo):
        on_event({'kind': 'setting', 'name': setting.name, 'number': i + 1, 'count': len(todo)})
        config, tuned = _tune(study, labels, setting, workdir / 'tuning', on_event)
        outcome = sweep.fit_seeds(
            config, workdir / 'runs' / sweep.directory_name(setting.name), on_event
        )
        if outcome.stopped in sweep.SIGNALS:
            raise Stopped(outcome.stopped)
        for message in outcome.diverged():
            on_event({'kind': 'diverged', 'text': message})
        rows.append(_measure(study, labels, tuned, outcome.group))
        on_event({'kind': 'row', 'text': _row_text(study, rows[-1])})
    sections = answer(study, rows)
    _write(study, sections, rows, workdir)
    return sections


def _tune(study: Study, labels, setting: sweep.Setting, workdir: Path, on_event):
    """The setting's config with the best value of each point of `study.tune`, and what that is.

    Classical baselines have nothing to tune: None of each.
    """
    if not study.tune or experiment_lib.is_baseline(setting.config):
        return setting.config, dict.fromkeys(study.tune)
    choices = [_choices(field, values, labels) for field, values in study.tune.items()]
    scores = {}
    for values in itertools.product(*choices):
        tuned = dict(zip(study.tune, values, strict=True))
        config = ConfigDict(setting.config.to_dict())
        override(config, {**tuned, 'data.validation': study.tune_split, 'seeds': 1})
        label = ', '.join(f'{field}={value}' for field, value in tuned.items())
        name = sweep.directory_name(f'{setting.name}, {label}')
        outcome = sweep.fit_seeds(config, workdir / name, on_event)
        if outcome.stopped in sweep.SIGNALS:
            raise Stopped(outcome.stopped)
        score = outcome.mean('top1')[0]
        scores[values] = -math.inf if math.isnan(score) else score
    best = dict(zip(study.tune, max(scores, key=scores.get), strict=True))
    config = ConfigDict(setting.config.to_dict())
    override(config, best)
    return experiment_lib.resolve(config), best


def _choices(field: str, values, labels: dict[str, str]) -> Sequence:
    """The values of a tuned field for a setting."""
    if not isinstance(values, Mapping):
        return values
    found = [values[label] for label in labels.values() if label in values]
    if not found:
        raise UserError(
            f'The study tunes {field} for {", ".join(values)}; none is a label of '
            f'{", ".join(labels.values())!r}. Name one label of an axis for each.'
        )
    return found[0]


def _measure(study: Study, labels, tuned, group: results.Group) -> Row:
    """Runs that diverged count for nothing; a setting of which none is left has no values."""
    alive = [member for member in group.members if member.result]
    values = {}
    for name, measure in study.measures.items():
        if measure.group:
            values[name] = measure.of(group) if alive else {}
            continue
        found = [measure.of(member) for member in alive]
        if measure.x:
            keys = sorted({x for curve in found for x in curve})
            values[name] = {x: [curve[x] for curve in found if x in curve] for x in keys}
        else:
            values[name] = [value for value in found if value is not None]
    seconds = math.fsum(member.records[-1]['seconds'] for member in alive)
    return Row(labels, tuned, values, len(alive), seconds)


def answer(study: Study, rows: list[Row]) -> list[dict[str, Any]]:
    """The sections of a study's page: the charts, then the table of all settings."""
    charts = []
    for name, measure in study.measures.items():
        if measure.x:
            charts += _curve_charts(study, name, measure, rows)
        elif measure.chart and any(row.values[name] for row in rows):
            charts.append(_chart(study, name, measure, rows))
    charts += [_scatter(study, name, rows) for name in study.against]
    return [*charts, _table(study, rows)]


def _cell(values: Sequence[float]) -> dict[str, Any] | None:
    if not len(values):
        return None
    mean, half = intervals.mean_interval(values)
    return {'mean': mean, 'half': half if math.isfinite(half) else None, 'n': len(values)}


def _series(name: str, points: list[tuple[float, Sequence[float]]], style='line') -> dict[str, Any]:
    cells = [(x, _cell(values)) for x, values in points if len(values)]
    return {
        'name': name,
        'x': [x for x, _ in cells],
        'y': [cell['mean'] for _, cell in cells],
        'half': [cell['half'] for _, cell in cells],
        'style': style,
        'group': name,
    }


def _chart(study: Study, name: str, measure: Measure, rows: list[Row]) -> dict[str, Any]:
    """A number against the last axis, with a series for each combination of the others."""
    *others, last = study.axes
    labels = list(study.axes[last])
    numeric = all(_number(label) is not None for label in labels)
    grouped: dict[str, list] = {}
    for row in rows:
        series = ', '.join(row.labels[axis] for axis in others) or name
        x = _number(row.labels[last]) if numeric else float(labels.index(row.labels[last]))
        grouped.setdefault(series, []).append((x, row.values[name]))
    style = 'line' if numeric else 'points'
    drawn = [_series(series, points, style) for series, points in grouped.items()]
    log, categories = study.log_x and numeric, None if numeric else labels
    return _axes(name, name, measure, drawn, last, log, categories)


def _axes(title, name, measure, series, x, log, categories=None) -> dict[str, Any]:
    """A chart section: a measure by its name against x."""
    return {
        'kind': 'chart',
        'title': title,
        'x': {'label': x, 'log': log, 'categories': categories},
        'y': {'label': name, 'format': measure.format, 'log': measure.log_y},
        'series': series,
    }


def _scatter(study: Study, against: str, rows: list[Row]) -> dict[str, Any]:
    """The first measure against another one, a point for each setting that has both."""
    name, measure = next(iter(study.measures.items()))
    series = [
        _series(', '.join(row.labels.values()), [(_cell(xs)['mean'], row.values[name])], 'points')
        for row in rows
        if len(xs := row.values[against]) and len(row.values[name])
    ]
    log = study.measures[against].log_y
    return _axes(f'{name} against {against}', name, measure, series, against, log)


def _number(label: str) -> float | None:
    try:
        return float(label.replace(',', '').rstrip('%'))
    except ValueError:
        return None


def _curve_charts(study: Study, name: str, measure: Measure, rows: list[Row]) -> list[dict]:
    """Curves, a series for each setting; with two axes or more a chart for each label of one."""
    axes = list(study.axes)
    by = (measure.facet or axes[0]) if len(axes) > 1 else ''
    charts = []
    for facet in study.axes[by] if by else ['']:
        chosen = [row for row in rows if not by or row.labels[by] == facet]
        series = [
            _series(
                ', '.join(row.labels[axis] for axis in axes if axis != by), list(points.items())
            )
            for row in chosen
            if (points := row.values[name])
        ]
        if series:
            title = f'{name}: {facet}' if facet else name
            charts.append(_axes(title, name, measure, series, measure.x, measure.log_x))
    return charts


def _table(study: Study, rows: list[Row]) -> dict[str, Any]:
    numbers = {name: m for name, m in study.measures.items() if not m.x}

    def numeric(field):
        return all(isinstance(row.tuned[field], (int, float, type(None))) for row in rows)

    return {
        'kind': 'table',
        'title': 'All settings',
        'note': 'Mean over the seeds, with the 95% t-interval of the mean.',
        'columns': [*study.axes, *study.tune, *numbers, 'runs'],
        'formats': [
            *['text'] * len(study.axes),
            *['number' if numeric(field) else 'text' for field in study.tune],
            *[measure.format for measure in numbers.values()],
            'integer',
        ],
        'rows': [
            [
                *row.labels.values(),
                *[v if v is None or numeric(k) else _text(v) for k, v in row.tuned.items()],
                *[_cell(row.values[name]) for name in numbers],
                row.seeds,
            ]
            for row in rows
        ],
    }


def _row_text(study: Study, row: Row) -> str:
    """A setting's line on the terminal."""
    parts = [', '.join(row.labels.values())]
    tuned = {field: value for field, value in row.tuned.items() if value is not None}
    parts += [f'{field} {_text(value)}' for field, value in tuned.items()]
    for name, measure in study.measures.items():
        if not measure.x:
            parts.append(f'{name} {page.show(_cell(row.values[name]), measure.format)}')
    return '  '.join(parts)


def _text(value) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)


def _write(study: Study, sections, rows: list[Row], workdir: Path):
    """study.json, report.html and a picture of each chart."""
    data, seconds = study.config.data, math.fsum(row.seconds for row in rows)
    subtitle = (
        f'{data.name}, {data.train}; {study.config.seeds} seeds a setting; '
        f'{sum(row.seeds for row in rows)} runs of {seconds / 60:.1f} minutes together.'
    )
    workdir_lib.write_json(
        workdir / 'study.json',
        {
            'question': study.question,
            'seconds': seconds,
            'rows': [row._asdict() for row in rows],
        },
    )
    title = {'kind': 'text', 'title': '', 'paragraphs': [study.question]}
    html = page.render(workdir.absolute().name, [title, *sections], subtitle=subtitle)
    workdir_lib.write_text(workdir / 'report.html', html)
    charts = [section for section in sections if section['kind'] == 'chart']
    for i, section in enumerate(charts, 1):
        page.figure(section).savefig(workdir / f'chart-{i}.png', dpi=120)


# What many studies share: data sets and measures.

# Name -> config.data, and examples of the training split to tune on, which none trains with.
_DATA = {
    'digits': ({'name': 'digits', 'train': 'train[:90%]'}, 'train[90%:]'),
    'mnist': (
        {'name': 'tfds:mnist', 'train': 'train[:10000]', 'mean': (0.1307,), 'std': (0.3081,)},
        'train[50000:]',
    ),
    'cifar10': (
        {
            'name': 'tfds:cifar10',
            'train': 'train[:45000]',
            'mean': (0.4914, 0.4822, 0.4465),
            'std': (0.247, 0.2435, 0.2616),
        },
        'train[45000:]',
    ),
}


# The usual augmentation of CIFAR-10 (He 2015).
CROP_AND_FLIP = [{'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}]


def base(data: str) -> ConfigDict:
    """The default run on the digits, 10,000 images of MNIST or 45,000 of CIFAR-10; `test` is untouched.

    Runs are short: they are validated and saved at their end alone.

    Raises:
      UserError: other data.
    """
    fields, _ = registry.lookup(_DATA, data, 'data of a study')
    config = config_lib.get_config()
    override(config, {f'data.{key}': value for key, value in fields.items()})
    override(config, {'seeds': 3, 'validate_every_epochs': 1e6, 'checkpoint_every_epochs': 1e6})
    return config


def classical(**model) -> dict[str, Any]:
    """Overrides for a classical baseline, `classical(name='knn')`: what only networks read is reset."""
    defaults = config_lib.get_config()
    reset = {k: defaults[k] for k in defaults if k not in ('data', 'model', 'seed', 'seeds')}
    return {**reset, 'model': model}


def tune_split(data: str) -> str:
    """Training examples that `base` leaves out, to choose settings by."""
    return registry.lookup(_DATA, data, 'data of a study')[1]


def result(key: str, format: str = 'percent', **kwargs) -> Measure:
    """A number of result.json, such as 'f1_macro'."""
    return Measure(lambda member: member.result.get(key), format, **kwargs)


def accuracy(**kwargs) -> Measure:
    """Of the last validation."""
    return result('top1', **kwargs)


def training_accuracy() -> Measure:
    """Of the training split itself, without augmentation or dropout, after training."""
    return Measure(lambda m: evaluation.evaluate(m.workdir, m.config.data.train)['top1'])


def curve(key: str, kind: str = 'validation', format: str = 'percent', **kwargs) -> Measure:
    """A number of the log over epochs."""
    return Measure(
        lambda m: {r['epoch']: r[key] for r in m.of_kind(kind) if r[key] is not None},
        format,
        x='epoch',
        **kwargs,
    )


def first_reaching(top1: float, key: str, format: str) -> Measure:
    """'epoch' or 'seconds' of the first validation of at least an accuracy; None where none is."""

    def of(member):
        reached = (r[key] for r in member.of_kind('validation') if (r['top1'] or 0) >= top1)
        return next(reached, None)

    return Measure(of, format)


def median_speed() -> Measure:
    """Images a second in training."""
    return Measure(results.Member.speed, 'integer')


def training_seconds(member: results.Member, until_step: float = math.inf) -> float:
    """Of the run up to a step, by the speed between two records: without compiling and validating."""
    images = member.data['examples'][member.config.data.train]
    records = [r for r in member.of_kind('train') if r['step'] <= until_step]
    return math.fsum(
        images * (record['epoch'] - last['epoch']) / record['images_per_second']
        for last, record in itertools.pairwise([{'epoch': 0.0}, *records])
        if record['images_per_second']  # of no image where all steps were skipped
    )
