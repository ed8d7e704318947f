"""The part of a report that is about one run: by class, calibration, images, config, environment."""

import shlex
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxcls import config as config_lib
from jaxcls import intervals, metrics
from jaxcls import workdir as workdir_lib
from jaxcls.report import gallery, page
from jaxcls.report.page import Section, show
from jaxcls.results import Group, Member


def sections(group: Group) -> list[Section]:
    """Everything about one run: by class, calibration, images, config, environment."""
    ended = [member for member in group.members if member.result]
    found = []
    if ended:
        of = f'Of seed {ended[0].config.seed}. ' if len(group.members) > 1 else ''
        found = [*_classes(ended), *_calibration(ended), *gallery.sections(ended[0], of)]
    return [*found, _config(group), _environment(group.members[0])]


def _classes(members: list[Member]) -> list[Section]:
    names = members[0].data['class_names']
    counts = sum(np.asarray(member.result['confusion']) for member in members)
    over = f', all {len(members)} seeds together' if len(members) > 1 else ''
    matrix = {
        'kind': 'matrix', 'title': 'Confusion matrix', 'names': names, 'counts': counts.tolist(),
        'note': f'Of {counts.sum():,} images{over}, {counts.sum() - np.trace(counts):,} are wrong.',
    }  # fmt: skip
    tables = [
        m.result.get('per_class') or metrics.per_class(np.asarray(m.result['confusion']))
        for m in members
    ]
    known = [key for key in _PER_CLASS if key in tables[0]]
    rows = [
        [
            name,
            counts[i].sum() // len(members),
            *(_mean([t[key][i] for t in tables]) for key in known),
        ]
        for i, name in enumerate(names)
    ]
    table = {
        'kind': 'table', 'title': 'By class', 'rows': rows,
        'columns': ['class', 'images', *(_PER_CLASS[key] for key in known)],
        'formats': ['text', 'integer', *['percent'] * len(known)],
    }  # fmt: skip
    return [matrix, table]


_PER_CLASS = {
    'precision': 'precision',
    'recall': 'recall',
    'f1': 'F1',
    'iou': 'IoU',
    'roc_auc': 'ROC-AUC',
    'average_precision': 'average precision',
}


def _mean(values: list[float | None]) -> dict[str, Any] | None:
    """A cell over the seeds that have a value."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    mean, half = intervals.mean_interval(values)
    return {'mean': mean, 'half': half or None, 'n': len(values)}


def _calibration(members: list[Member]) -> list[Section]:
    """Accuracy against confidence, before and after temperature scaling, and where the images lie."""
    charts = {
        name: _pool([member.result[key] for member in members])
        for name, key in (
            ('as trained', 'reliability'),
            ('after temperature', 'reliability_calibrated'),
        )
        if all(member.result.get(key) for member in members)
    }
    if not charts:
        return []
    lines = [
        {'name': name, 'style': 'points', 'x': [b['confidence'] for b in bins],
         'y': [b['accuracy'] for b in bins], 'half': [b['half'] for b in bins]}
        for name, bins in charts.items()
    ]  # fmt: skip
    lines.append({'name': 'perfect', 'style': 'dashed', 'muted': True, 'x': [0, 1], 'y': [0, 1]})
    bars = [
        {
            'name': name,
            'style': 'bar',
            'x': [b['middle'] for b in bins],
            'y': [b['share'] for b in bins],
        }
        for name, bins in charts.items()
    ]
    temperature, before, after = (
        show(_mean([m.result.get(key) for m in members]), kind)
        for key, kind in (
            ('temperature', 'number'),
            ('ece', 'percent'),
            ('ece_calibrated', 'percent'),
        )
    )
    note = (
        f'The expected calibration error is {before}, and {after} once logits are divided by a temperature '
        f'that was fitted on the other four fifths of the images; on all of them it is {temperature}.'
    )
    accuracy = {'label': 'accuracy', 'format': 'percent'}
    share = {'label': 'share of the images', 'format': 'percent'}
    return [page.row(
        'Calibration', note,
        {'kind': 'chart', 'title': 'Reliability', 'x': {'label': 'confidence'}, 'y': accuracy,
         'series': lines},
        {'kind': 'chart', 'title': 'Confidence', 'y': share, 'series': bars,
         'x': {'label': 'confidence'}},
    )]  # fmt: skip


def _pool(tables: list[list[dict]]) -> list[dict[str, Any]]:
    """Each bin over all seeds: its middle and share; mean confidence, accuracy, interval, if any."""
    total = sum(b['count'] for table in tables for b in table) or 1
    return [_pool_bin(bins, total) for bins in zip(*tables, strict=True)]


def _pool_bin(bins: tuple[dict, ...], total: int) -> dict[str, Any]:
    count = sum(b['count'] for b in bins)
    middle = (bins[0]['low'] + bins[0]['high']) / 2
    if not count:
        return {'middle': middle, 'share': 0, 'confidence': None, 'accuracy': None, 'half': None}
    confidence, accuracy = (
        sum(b[key] * b['count'] for b in bins if b['count']) / count
        for key in ('confidence', 'accuracy')
    )
    low, high = intervals.wilson_interval(round(accuracy * count), count)
    found = {'confidence': confidence, 'accuracy': accuracy, 'half': (high - low) / 2}
    return {'middle': middle, 'share': count / total, **found}


def _config(group: Group) -> Section:
    fields = config_lib.differences(ConfigDict(), group.config)
    rows = [[field, str(value)] for field, (_, value) in fields.items()]
    return _fold('Config', {
        'kind': 'table', 'title': '', 'columns': ['field', 'value'], 'formats': ['text', 'text'],
        'rows': rows,
    })  # fmt: skip


def _environment(member: Member) -> Section:
    path = member.workdir / 'environment.json'
    found = workdir_lib.read_json(path) if path.is_file() else {}
    if isinstance(found.get('command'), list):
        found = {**found, 'command': shlex.join(map(str, found['command']))}
    rows = [
        [name, ', '.join(map(str, value)) if isinstance(value, list) else str(value)]
        for name, value in {'workdir': member.workdir, **found}.items()
    ]
    return _fold('Environment', {
        'kind': 'table', 'title': '', 'columns': ['', 'value'], 'formats': ['text', 'text'],
        'rows': rows,
    })  # fmt: skip


def _fold(title: str, section: Section) -> Section:
    return {'kind': 'details', 'title': title, 'sections': [section]}
