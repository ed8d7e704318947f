"""`jaxcls report`: finished runs as one HTML file, with its pictures beside it."""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcls import intervals, pictures
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError
from jaxcls.models import MODELS
from jaxcls.report import compare, page, run, significance
from jaxcls.report.page import Section, show
from jaxcls.results import Group, Member

_POINTS = 300  # of a curve; longer ones are averaged in pieces
_CLASSES = 40  # a picture of a larger confusion matrix shows nothing


def write(workdirs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `out/report.html` and PNGs of its charts, and returns the path of the HTML.

    Raises:
      UserError: no runs given, no run in one of the directories, or `out` cannot be written.
    """
    groups, out = compare.read(workdirs), Path(out)
    parts = {group.name: run.sections(group) for group in groups}
    charts = curves(groups)
    sections = _shared(groups, charts)
    if len(groups) == 1:
        sections += parts[groups[0].name]
    else:
        sections += [
            {'kind': 'details', 'title': name, 'note': _described(group), 'sections': part}
            for group, (name, part) in zip(groups, parts.items(), strict=True)
        ]
    html = page.render(_title(groups), sections, subtitle=headline(groups))
    try:
        out.mkdir(parents=True, exist_ok=True)
        workdir_lib.write_text(out / 'report.html', html)
        _write_pictures(groups, parts, charts, out)
    except OSError as error:
        raise UserError(
            f'{out} cannot be written: {error.strerror}. Choose another --out.'
        ) from None
    return out / 'report.html'


def _write_pictures(groups, parts, curves, out: Path):
    for section in curves:
        page.figure(section).savefig(out / f'{_file_name(section["title"])}.png', dpi=120)
    names = _file_names([group.name for group in groups])
    for group, name in zip(groups, names, strict=True):
        for section in parts[group.name]:
            if section['title'] == 'Calibration':
                page.figure(section).savefig(out / f'reliability-{name}.png', dpi=120)
            elif section['kind'] == 'matrix' and len(section['names']) <= _CLASSES:
                figure = pictures.confusion_matrix(section['counts'], section['names'])
                figure.savefig(out / f'confusion-{name}.png', dpi=120)


def _file_names(texts: Sequence[str]) -> list[str]:
    """`_file_name` of each, numbered where a file system may take two for one."""
    plain = [_file_name(text) for text in texts]
    return [name if plain.count(name) == 1 else f'{name}-{i}' for i, name in enumerate(plain, 1)]


def _file_name(text: str) -> str:
    # Systems allow 255 bytes, of which a letter takes up to four.
    return re.sub(r'[^\w.-]+', '_', text.lower()).lstrip('.')[:50] or 'run'


def _title(groups: Sequence[Group]) -> str:
    data = ', '.join(dict.fromkeys(group.config.data.name for group in groups))
    if len(groups) == 1:
        return f'{groups[0].config.model.name} on {data}'
    return f'{len(groups)} runs on {data}'


def headline(groups: Sequence[Group]) -> str:
    """What a reader who stops after one sentence should know; a sentence for each data set."""
    ended = [group for group in groups if np.isfinite(group.mean('top1')[0])]
    if not ended:
        return 'No run has ended yet: only its curves are known.'
    by_data = {}
    for group in ended:
        by_data.setdefault(significance.validated_on(group.members[0]), []).append(group)
    if len(by_data) == 1:
        return _ranking(ended)
    return ' '.join(f'On {on[0]}, {on[1]}: {_ranking(some)}' for on, some in by_data.items())


def _ranking(ended: Sequence[Group]) -> str:
    """Which of runs that were validated on the same data is the most accurate."""
    best, *others = sorted(ended, key=lambda group: -group.mean('top1')[0])
    if not others:
        return f'{best.config.model.name} gets {_accuracy(best)}{_effort(best)}.'
    second = others[0]
    if second.mean('top1')[0] == best.mean('top1')[0]:
        return f'{best.name} gets {_accuracy(best)}{_effort(best)}. {second.name} gets as many.'
    answer = (
        f'{best.name} is the most accurate: it gets {_accuracy(best)}{_effort(best)}. '
        f'{second.name} follows with {show(second.mean("top1")[0], "percent")}'
    )
    tested = significance.difference(best, second)
    if not tested:
        return f'{answer}.'
    # The two were chosen among those that can be compared.
    pairs = sum(bool(significance.difference(*two)) for two in itertools.combinations(ended, 2))
    p = min(1.0, tested[-1] * pairs)
    said = 'a difference beyond chance' if p < 0.05 else 'which may be chance'
    allowed = f', allowing for {pairs} comparisons' if pairs > 1 else ''
    return f'{answer}, {said} (p = {p:.2g}{allowed}).'


def _accuracy(group: Group) -> str:
    """Such as '99.17% of 360 test images right (95% interval 97.58% to 99.72%)'."""
    values = [member for member in group.members if member.result]
    mean, half = group.mean('top1')
    examples = f'{int(values[0].result["examples"]):,} {group.config.data.validation} images'
    accuracy = f'{show(mean, "percent")} of {examples} right'
    if len(values) > 1:
        return f'{accuracy} (± {100 * half:.2f} over {len(values)} seeds)'
    low, high = values[0].result['top1_interval']
    return f'{accuracy} (95% interval {100 * low:.2f}% to {100 * high:.2f}%)'


def _effort(group: Group) -> str:
    seconds = group.mean('seconds')[0]
    each = ' each' if len(group.members) > 1 else ''
    return f', after {show(seconds, "seconds")} of training{each}' if np.isfinite(seconds) else ''


def _described(group: Group) -> str:
    config = group.config
    if config.model.name not in MODELS:
        return f'{config.model.name}, a classical baseline.'
    return (
        f'{config.model.name}, {config.epochs:g} epochs in batches of {config.batch_size}, '
        f'{config.optimizer.name} at {config.learning_rate:g}.'
    )


def _shared(groups: Sequence[Group], charts: list[Section]) -> list[Section]:
    """What is about all runs, in the order of what a reader asks."""
    metrics, costs = compare.table(groups), compare.costs(groups)
    if len(groups) == 1:
        return [page.row('Result', '', _single(metrics), _single(costs)), *charts]
    found = [
        metrics,
        significance.significance(groups),
        *charts,
        costs,
        compare.config_differences(groups),
    ]
    return [section for section in found if section]


def _single(section: Section) -> Section:
    table = compare.transposed(section)
    return {**table, 'title': section['title'], 'columns': ['', 'value']}


def curves(groups: Sequence[Group]) -> list[Section]:
    """Loss and accuracy over epochs, then the gap between training and validation."""
    if all(len(member.of_kind('validation')) < 2 for g in groups for member in g.members):
        return []
    losses, accuracies = (
        _across([series for g in groups for series in _both(g, key, len(groups))])
        for key in ('loss', 'top1')
    )
    known = [y for series in losses for y in series['y'] if y is not None]
    log = bool(known) and min(known) > 0 and max(known) > 20 * min(known)
    gaps = _across([_series(g.name, g, _gap, 'line') for g in groups])
    rates = [_series(g.name, g, _learning_rate, 'line') for g in groups]
    note = 'Training is measured while it learns, so with its augmentation and dropout.'
    if any(len(group.members) > 1 for group in groups):
        note += ' Bands: 95% t-interval over the seeds.'
    return [
        page.row('Curves', note, _chart('Loss', 'loss', 'number', losses, log),
             _chart('Accuracy', 'accuracy', 'percent', accuracies)),
        page.row('Generalisation', 'How much better it is on what it trains on than on new images.',
             _chart('Gap', 'training less validation accuracy', 'percent', gaps),
             _chart('Learning rate', 'learning rate', 'number', rates)),
    ]  # fmt: skip


def _chart(title: str, label: str, format: str, series: list[dict], log: bool = False) -> Section:
    y = {'label': label, 'format': format, 'log': log}
    return {'kind': 'chart', 'title': title, 'x': {'label': 'epoch'}, 'y': y, 'series': series}


def _both(group: Group, key: str, groups: int) -> list[dict]:
    prefix = f'{group.name} ' if groups > 1 else ''
    return [
        _series(f'{prefix}{name}', group, lambda m, kind=kind: curve(m, kind, key), style)
        for name, kind, style in (
            ('training', 'train', 'dashed'),
            ('validation', 'validation', 'line'),
        )
    ]


def _across(curves: list[dict]) -> list[dict]:
    """A baseline's one value as a level line under the curves of the others."""
    epochs = [x for series in curves for x in series['x']]
    for series in curves:
        if len(series['x']) == 1:
            series['x'] = [min(epochs), max(epochs)]
            series['y'] *= 2
            series['half'] = series['half'] and series['half'] * 2
    return curves


def _series(
    name: str, group: Group, curve_of: Callable[[Member], dict[float, float]], style: str
) -> dict[str, Any]:
    """The mean over the seeds at each epoch, and the half-width of its interval."""
    values = {}
    for member in group.members:
        for epoch, value in curve_of(member).items():
            values.setdefault(epoch, []).append(value)
    epochs = sorted(values)
    means = [intervals.mean_interval(values[epoch]) for epoch in epochs]
    return {
        'name': name, 'group': group.name, 'style': style, 'x': epochs,
        'y': [mean for mean, _ in means],
        'half': [half for _, half in means] if len(group.members) > 1 else None,
    }  # fmt: skip


def curve(member: Member, kind: str, key: str) -> dict[float, float]:
    """Epoch to value, averaged in pieces where there are many."""
    records = [r for r in member.of_kind(kind) if r.get(key) is not None]
    pairs = np.array([[r['epoch'], r[key]] for r in records], np.float64).reshape(-1, 2)
    pieces = np.array_split(pairs, min(len(pairs), _POINTS) or 1)
    return {round(float(p[-1, 0]), 4): float(p[:, 1].mean()) for p in pieces if len(p)}


def _gap(member: Member) -> dict[float, float]:
    train, validation = (curve(member, kind, 'top1') for kind in ('train', 'validation'))
    if not train:
        return {}
    epochs = list(validation)
    at = np.interp(epochs, list(train), list(train.values()))
    return {e: float(a - validation[e]) for e, a in zip(epochs, at, strict=True)}


def _learning_rate(member: Member) -> dict[float, float]:
    if member.config.model.name not in MODELS:
        return {}
    return curve(member, 'train', 'learning_rate')
