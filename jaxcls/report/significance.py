"""Whether runs differ by more than chance, two at a time."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcls import intervals
from jaxcls import predictions as predictions_lib
from jaxcls.errors import UserError
from jaxcls.report.page import Section
from jaxcls.results import Group, Member

# With more runs, each is tested against the best one only.
_ALL_PAIRS = 6


def significance(groups: Sequence[Group]) -> Section | None:
    """Which differences in accuracy are more than chance, two runs at a time; None where none is testable.

    Paired t over common seeds where both have several, McNemar's test of their first runs otherwise.
    """
    ended = [group for group in groups if any(m.result for m in group.members)]
    pairs = list(itertools.combinations(ended, 2))
    if len(ended) > _ALL_PAIRS:
        best = max(ended, key=lambda group: group.mean('top1')[0])
        pairs = [(best, group) for group in ended if group is not best]
    rows = [row for a, b in pairs if (row := difference(a, b))]
    if not rows:
        return None
    columns = ['run', 'against', 'difference', 'test', 'p']
    formats = ['text', 'text', 'percent', 'text', 'number']
    note = (
        'p: how often runs that are equally good differ as much or more. Paired t over seeds says '
        'whether training again would show it; McNemar, on images that only one of two runs gets right, '
        'whether other images would.'
    )
    if len(rows) > 1:
        columns, formats = [*columns, "p, Holm's"], [*formats, 'number']
        adjusted = holm([row[-1] for row in rows])
        rows = [[*row, p] for row, p in zip(rows, adjusted, strict=True)]
        note += f" Holm's p allows for {len(rows)} tests."
    return {
        'kind': 'table',
        'title': 'Is the difference more than chance?',
        'note': note,
        'columns': columns,
        'formats': formats,
        'rows': rows,
    }


def difference(a: Group, b: Group) -> list[Any] | None:
    """A row of `significance`: run, against, difference, test, p; None where nothing can be tested."""
    first, second = (
        {m.config.seed: m.result['top1'] for m in group.members if m.result} for group in (a, b)
    )
    ours, theirs = (next(m for m in group.members if m.result) for group in (a, b))
    if not _same_images(ours, theirs):
        return None
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) > 1:
        values = [[side[seed] for seed in seeds] for side in (first, second)]
        mean, half, p = intervals.paired_interval(*values)
        better = {'mean': mean, 'half': half, 'n': len(seeds)}
        return [a.name, b.name, better, f'paired t, {len(seeds)} seeds', p]
    right = [predictions_lib.right(member.predictions) for member in (ours, theirs)]
    found = intervals.mcnemar(*right)
    better = (found['only_a'] - found['only_b']) / max(len(right[0]), 1)
    test = f'McNemar, {found["only_a"]} to {found["only_b"]}'
    return [a.name, b.name, better, test, found['p_value']]


def _same_images(a: Member, b: Member) -> bool:
    """Whether both were validated on the same labels, in the same order, as far as they have them."""
    data = [(m.config.data.name, m.config.data.validation, m.data['class_names']) for m in (a, b)]
    try:
        return data[0] == data[1] and np.array_equal(a.predictions.label, b.predictions.label)
    except UserError:  # a run of an older version has no predictions
        return False


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that one in twenty families has a false alarm at 0.05.

    Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind='stable')
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()
