"""Whether runs differ by more than chance, two at a time."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcls import intervals
from jaxcls.errors import UserError
from jaxcls.report.page import Section
from jaxcls.results import Group, Member

# With more runs, only the tests against the best one are shown.
_ALL_PAIRS = 6


def significance(groups: Sequence[Group]) -> Section | None:
    """Which differences in accuracy are more than chance, two runs at a time; None where none is testable.

    Paired t over common seeds where both have several, McNemar's test of one run each otherwise.
    Holm's correction is for all pairs, also where only those with the best run are shown: which one
    is best is chance, too.
    """
    ended = [group for group in groups if any(m.result for m in group.members)]
    many = len(ended) > _ALL_PAIRS
    if many:
        best = max(ended, key=lambda group: group.mean('top1')[0])
        ended = [best, *(group for group in ended if group is not best)]
    pairs = itertools.combinations(ended, 2)
    tested = [(a, row) for a, b in pairs if (row := difference(a, b))]
    adjusted = holm([row[-1] for _, row in tested])
    shown = [
        [*row, p] for (a, row), p in zip(tested, adjusted, strict=True) if not many or a is best
    ]
    if not shown:
        return None
    columns = ['run', 'against', 'difference', 'test', 'p']
    formats = ['text', 'text', 'percent', 'text', 'number']
    note = (
        'p: how often runs that are equally good differ as much or more. Paired t over seeds says '
        'whether training again would show it; McNemar, on images that only one of two runs gets right, '
        'whether other images would.'
    )
    if len(tested) > 1:
        columns, formats = [*columns, "p, Holm's"], [*formats, 'number']
        note += f" Holm's p allows for the {len(tested)} tests of all pairs"
        note += ', of which those with the most accurate run are shown.' if many else '.'
    return {
        'kind': 'table',
        'title': 'Is the difference more than chance?',
        'note': note,
        'columns': columns,
        'formats': formats,
        'rows': [row[: len(columns)] for row in shown],
    }


def difference(a: Group, b: Group) -> list[Any] | None:
    """A row of `significance`: run, against, difference, test, p; None where nothing can be tested."""
    sides = [{m.config.seed: m for m in group.members if m.result} for group in (a, b)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    ours, theirs = (side[seeds[0]] if seeds else next(iter(side.values())) for side in sides)
    if not _same_images(ours, theirs):
        return None
    if len(seeds) > 1:
        values = [[side[seed].result['top1'] for seed in seeds] for side in sides]
        resolution = 1 / max(len(ours.predictions.label), 1)
        mean, half, p = intervals.paired_interval(*values, resolution=resolution)
        better = {'mean': mean, 'half': half, 'n': len(seeds)}
        return [a.name, b.name, better, f'paired t, {len(seeds)} seeds', p]
    right = [member.right for member in (ours, theirs)]
    found = intervals.mcnemar(*right)
    better = (found['only_a'] - found['only_b']) / max(len(right[0]), 1)
    test = f'McNemar, {found["only_a"]} to {found["only_b"]}'
    return [a.name, b.name, better, test, found['p_value']]


def validated_on(member: Member) -> tuple[str, str, tuple[str, ...], int]:
    """Data set, split, classes and images: where they differ accuracies cannot be compared."""
    data, known = member.config.data, member.data
    images = known['examples'].get(data.validation, 0)
    return data.name, data.validation, tuple(known['class_names']), images


def _same_images(a: Member, b: Member) -> bool:
    """Whether both were validated on the same labels, in the same order, as far as they have them."""
    try:
        return validated_on(a) == validated_on(b) and np.array_equal(
            a.predictions.label, b.predictions.label
        )
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
