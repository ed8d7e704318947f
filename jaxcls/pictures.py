"""Pictures of a run: curves, confusion matrix, a sheet of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxcls.errors import UserError

_TRAIN, _VALIDATION = '#888888', '#0b62a4'


def check_place(path: Path, option: str):
    """Raises UserError where no picture can be written: before the work that it is to show."""
    kinds = Figure().canvas.get_supported_filetypes()
    problem = ''
    if not path.parent.is_dir():
        problem = f'there is no directory {path.parent}'
    elif path.suffix[1:].lower() not in kinds:
        problem = f'a picture ends in {", ".join(f".{kind}" for kind in sorted(kinds))}'
    if problem:
        raise UserError(f'{path} cannot be written: {problem}. Choose another {option}.')


def curves(records: list[dict[str, Any]]) -> Figure:
    """Loss and accuracy of training and validation over epochs; the gap between them is shaded."""
    train, validation = (
        {
            key: np.array([record[key] for record in records if record['kind'] == kind], float)
            for key in ('epoch', 'loss', 'top1')
        }
        for kind in ('train', 'validation')
    )
    figure = Figure(figsize=(10, 4), layout='constrained')
    for axes, key, name in zip(
        figure.subplots(1, 2), ('loss', 'top1'), ('loss', 'accuracy'), strict=True
    ):
        axes.plot(train['epoch'], train[key], color=_TRAIN, label='training (while learning)')
        end = f'validation, {validation[key][-1]:.4f} at the end'
        axes.plot(validation['epoch'], validation[key], color=_VALIDATION, label=end)
        if len(train['epoch']):
            gap = np.interp(validation['epoch'], train['epoch'], train[key])
            axes.fill_between(
                validation['epoch'], gap, validation[key], color=_VALIDATION, alpha=0.12, lw=0,
                label='generalisation gap',
            )  # fmt: skip
        known = [v for v in (*train[key], *validation[key]) if np.isfinite(v)]
        if key == 'loss' and known and min(known) > 0:
            axes.set_yscale('log')
        axes.set(xlabel='epoch', ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def confusion_matrix(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts by true (row) and predicted (column) class, shaded by the share of the row."""
    confusion = np.asarray(confusion)
    classes = len(class_names)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(4 + 0.35 * classes, 14)
    figure = Figure(figsize=(side, side), layout='constrained')
    axes = figure.subplots()
    axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    axes.set(xlabel='predicted', ylabel='true')
    if classes <= 40:
        names = [_shorten(name) for name in class_names]
        axes.set_xticks(range(classes), names, rotation=45, ha='right', parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = 'white' if share[row, column] > 0.5 else 'black'
                axes.text(column, row, count, ha='center', va='center', color=color, fontsize=8)
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    axes.set_title(f'{accuracy:.2%} of {confusion.sum():,} right')
    return figure


def sheet(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Figure:
    """Images, float [N, H, W, C] in [0, 1], each under its title."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.6 * rows), layout='constrained')
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=1
        )
        axes.set_title(_shorten(title), fontsize=7, parse_math=False)
    return figure


def _shorten(text: str, limit: int = 24) -> str:
    text = ''.join(c if c.isprintable() else '?' for c in text)
    return text if len(text) <= limit else text[: limit - 1] + '…'


def robustness(attacked: dict[str, Any] | None, corrupted: dict[str, Any] | None) -> Figure:
    """Accuracy against epsilon, as of `robustness.attack_run`, and error by corruption, or one of both."""
    parts = [
        (draw, found)
        for draw, found in ((_attacked, attacked), (_corrupted, corrupted))
        if found is not None
    ]
    figure = Figure(figsize=(5.5 * len(parts), 4.2), layout='constrained')
    for axes, (draw, found) in zip(
        figure.subplots(1, len(parts), squeeze=False).flat, parts, strict=True
    ):
        draw(axes, found)
    return figure


def _attacked(axes, found: dict[str, Any]):
    clean = {'epsilon': 0.0, **found['clean']}
    for name in dict.fromkeys(row['attack'] for row in found['attacks']):
        rows = [clean, *(row for row in found['attacks'] if row['attack'] == name)]
        epsilon = [row['epsilon'] for row in rows]
        low, high = zip(*(row['interval'] for row in rows), strict=True)
        style = {'color': 'black', 'ls': '--'} if name == 'all' else {}
        [line] = axes.plot(
            epsilon, [row['accuracy'] for row in rows], marker='o', ms=3, label=name, **style
        )
        axes.fill_between(epsilon, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(
        xlabel=f'epsilon ({found["norm"]}, of pixels in [0, 1])', ylabel='accuracy', ylim=(0, 1)
    )
    axes.set_title(f'{found["examples"]:,} examples; bands: 95% intervals', fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _corrupted(axes, found: dict[str, Any]):
    names = [row['kind'].replace('_', ' ') for row in found['kinds']]
    errors = np.array([row['errors'] for row in found['kinds']])
    axes.barh(names, errors.mean(1), color=_VALIDATION, alpha=0.4)
    for severity in range(errors.shape[1]):
        axes.plot(errors[:, severity], names, '|', color=_VALIDATION)
    axes.axvline(found['clean_error'], color=_TRAIN, label='clean')
    axes.invert_yaxis()
    axes.set(xlabel='error: mean of the severities, and each', xlim=(0, 1))
    axes.legend(frameon=False)
