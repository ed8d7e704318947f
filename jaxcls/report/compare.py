"""Several runs side by side: their metrics with intervals, their configs, and whether they differ.

Each table is a section of `page`, so that the report shows what the terminal prints.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcls import config as config_lib
from jaxcls import intervals, results
from jaxcls.errors import UserError
from jaxcls.report import page
from jaxcls.report.page import Section
from jaxcls.report.significance import significance, validated_on
from jaxcls.results import Group, Member


class _Column(NamedTuple):
    """A metric: heading, format of `page`, key of result.json or function of a member, which is best."""

    name: str
    format: str
    of: str | Callable[[Member], float | None]
    best: Callable | None = None


def read(workdirs: Sequence[str | Path]) -> list[Group]:
    """The runs in some directories, with a name for each that no other has.

    Raises:
      UserError: none given, or no run in one of them.
    """
    if not workdirs:
        raise UserError('There is nothing to compare: give the directories of runs.')
    groups = [results.read(workdir) for workdir in workdirs]
    paths = [group.workdir.absolute() for group in groups]
    depth = 1
    while len({_tail(p, depth) for p in paths}) < len(set(paths)):
        depth += 1
    names = [_tail(path, depth) for path in paths]
    repeated = [f'{name} ({names[:i].count(name) + 1})' for i, name in enumerate(names)]
    names = [r if names.count(n) > 1 else n for n, r in zip(names, repeated, strict=True)]
    return [dataclasses.replace(g, name=n) for g, n in zip(groups, names, strict=True)]


def _tail(path: Path, depth: int) -> str:
    return '/'.join(path.parts[-depth:])


def training_accuracy(member: Member) -> float | None:
    """The mean over the images of the last epoch, taken while it learnt; None without records."""
    return member.last_epoch()['top1']


def _gap(member: Member) -> float | None:
    accuracy, top1 = training_accuracy(member), member.result.get('top1')
    return None if accuracy is None or top1 is None else accuracy - top1


_METRICS = (
    _Column('accuracy', 'percent', 'top1', max),
    _Column('top-5', 'percent', 'top5', max),
    _Column('log loss', 'number', 'log_loss', min),
    _Column('macro F1', 'percent', 'f1_macro', max),
    _Column('mean IoU', 'percent', 'iou_mean', max),
    _Column('ROC-AUC', 'percent', 'roc_auc_macro', max),
    _Column('ECE', 'percent', 'ece', min),
    _Column('ECE, calibrated', 'percent', 'ece_calibrated', min),
    _Column('training accuracy', 'percent', training_accuracy),
    _Column('gap', 'percent', _gap),
)
_COSTS = (
    _Column('parameters', 'integer', 'parameters'),
    _Column('FLOPs an image', 'number', 'flops'),
    _Column('epochs', 'number', 'epoch'),
    _Column('time', 'seconds', 'seconds'),
    _Column('training images/s', 'integer', Member.speed),
    _Column('peak memory', 'bytes', 'peak_bytes'),
)


def table(groups: Sequence[Group]) -> Section:
    """Accuracy and the other metrics of each run, – where a run has none.

    The best of each is bold where all were validated on the same data.

    Several seeds give their mean and the half-width of its 95% t-interval; one run's accuracy has
    Wilson's interval, for what the finite split leaves open.
    """
    note = 'Bold is best. ' if _comparable(groups) else ''
    if len(groups) > 1 and not note:
        note = 'The runs were validated on different data: their metrics cannot be compared. '
    if any(len(group.members) > 1 for group in groups):
        note += '±: 95% t-interval over the seeds. '
    if any(len(group.members) == 1 for group in groups):
        note += "In brackets: Wilson's 95% interval of one run, for the finite number of images. "
    note += (
        'Training accuracy is measured while the last epoch learns; the gap is that less accuracy.'
    )
    return _section('Metrics', note, groups, _METRICS)


def costs(groups: Sequence[Group]) -> Section:
    """Parameters, FLOPs, time, speed and memory of each run."""
    note = 'FLOPs are multiplications and additions of one forward pass; time is that of one run.'
    return _section('Cost', note, groups, _COSTS)


def _section(title, note, groups, columns) -> Section:
    cells = [[_cell(group, column) for group in groups] for column in columns]
    comparable = _comparable(groups)
    known = [
        (column, _mark_best(row, column.best if comparable else None))
        for column, row in zip(columns, cells, strict=True)
        if any(math.isfinite(cell['mean']) for cell in row)
    ]
    rows = [list(row) for row in zip(*(row for _, row in known), strict=True)] or [[]] * len(groups)
    return {
        'kind': 'table',
        'title': title,
        'note': note,
        'columns': ['run', *(column.name for column, _ in known)],
        'formats': ['text', *(column.format for column, _ in known)],
        'rows': [[_label(g), *row] for g, row in zip(groups, rows, strict=True)],
    }


def _comparable(groups: Sequence[Group]) -> bool:
    """Whether there are several, validated on the same data."""
    return len(groups) > 1 and len({validated_on(group.members[0]) for group in groups}) == 1


def _label(group: Group) -> str:
    ended = sum(bool(member.result) for member in group.members)
    seeds = group.config.seeds
    if seeds == 1:
        return group.name if ended else f'{group.name} (has not ended)'
    return (
        f'{group.name} ({seeds} seeds)'
        if ended == seeds
        else f'{group.name} ({ended} of {seeds} seeds)'
    )


def _cell(group: Group, column: _Column) -> dict[str, Any]:
    if callable(column.of):
        values = [value for m in group.members if (value := column.of(m)) is not None]
    else:
        values = [value for value in group.values(column.of) if math.isfinite(value)]
    if not values:
        return {'mean': math.nan}
    mean, half = intervals.mean_interval(values)
    interval = group.members[0].result.get('top1_interval')
    if len(group.members) == 1 and column.of == 'top1' and interval:
        return {'mean': mean, 'low': interval[0], 'high': interval[1], 'n': 1}
    return {'mean': mean, 'half': half if half else None, 'n': len(values)}


def _mark_best(cells: list[dict], best: Callable | None) -> list[dict]:
    """Marks the best, and those as good as it unless that is most of them."""
    values = [cell['mean'] for cell in cells if math.isfinite(cell['mean'])]
    if best is None or len(values) < 2 or 2 * values.count(best(values)) > len(values):
        return cells
    return [{**cell, 'best': cell['mean'] == best(values)} for cell in cells]


def config_differences(groups: Sequence[Group]) -> Section | None:
    """A row for each field that is not the same in all runs; None where all are."""
    first = groups[0].config
    changes = [config_lib.differences(first, group.config) for group in groups]
    fields = {field: old for change in changes for field, (old, _) in change.items()}
    if not fields:
        return None
    return {
        'kind': 'table',
        'title': 'Differences of the configs',
        'columns': ['field', *(group.name for group in groups)],
        'formats': ['text'] * (1 + len(groups)),
        'rows': [
            [field, *(_value(change.get(field, (old, old))[1]) for change in changes)]
            for field, old in sorted(fields.items())
        ],
    }


def _value(value: Any) -> str | None:
    return None if value == 'absent' else str(value)


def text(groups: Sequence[Group], width: int = 100) -> str:
    """All of it for a terminal: a line a metric, a column a run, * the best."""
    sections = [transposed(table(groups)), transposed(costs(groups))]
    sections += [s for s in (config_differences(groups), significance(groups)) if s]
    return '\n\n'.join(page.text(section, width) for section in sections)


def transposed(section: Section) -> Section:
    """A table of runs with a row a metric and a column a run, as text; * the best."""
    names, *columns = zip(section['columns'], section['formats'], *section['rows'], strict=True)
    _, _, *runs = names
    rows = [
        [
            name,
            *(
                page.show(c, kind) + ' *' * (isinstance(c, dict) and c.get('best', False))
                for c in cells
            ),
        ]
        for name, kind, *cells in columns
    ]
    headings = [section['title'], *runs]
    formats = ['text'] * len(headings)
    return {**section, 'title': '', 'columns': headings, 'formats': formats, 'rows': rows}


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """All of it as plain data: `runs`, `differences` {field: [value a run]}, `significance`."""
    changed, tested = config_differences(groups), significance(groups)
    return {
        'runs': [
            {
                'name': group.name,
                'workdir': str(group.workdir),
                'seeds': [m.config.seed for m in group.members],
                'metrics': group.summary(),
            }
            for group in groups
        ],
        'differences': {row[0]: row[1:] for row in changed['rows']} if changed else {},
        'significance': [
            dict(zip(tested['columns'], row, strict=True)) for row in tested['rows']
        ] if tested else [],
    }  # fmt: skip
