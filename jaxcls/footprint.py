"""What a network costs: its size, FLOPs and latency, beside its accuracy, in one table and one picture."""

import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxcls import datasets, evaluation, inspection, intervals, predictions, pruning, runs, steps
from jaxcls import experiment as experiment_lib

BATCHES = (1, 64)
_SLICE = 0.02  # seconds that one timing takes, at least


class Variant(NamedTuple):
    """A network that computes the classes of images.

    Attributes:
      experiment: whose config it has; its data and its loss.
      model: what computes it, for `steps.make_predict`.
      variables: its own, the shapes of the model's.
      workdir: of the run that trained it.
      before: its accuracy before that; None where it was not trained.
    """

    experiment: experiment_lib.Experiment
    model: Any
    variables: Any
    workdir: Path | None = None
    before: float | None = None


def _predict(variant: Variant) -> Callable:
    data = variant.experiment.config.data
    return steps.make_predict(variant.model, data.mean, data.std)


def evaluate(
    run: runs.Run, split: datasets.Split, variants: dict[str, Variant]
) -> dict[str, tuple[float, np.ndarray]]:
    """Accuracy and which examples are right, of each; one program for all of a model."""
    evaluators, found = {}, {}
    for name, variant in variants.items():
        key = id(variant.model)
        if key not in evaluators:
            evaluators[key] = evaluation.make_evaluator(
                run.experiment, split, run.mesh, _predict(variant)
            )
        right = predictions.right(evaluators[key](variant.variables).predictions())
        found[name] = float(right.mean()), right
    return found


def measure(
    run: runs.Run, split: datasets.Split, variants: dict[str, Variant], rounds: int
) -> list[dict[str, Any]]:
    """One row of `compress.compress` for each variant, of which one is `original`."""
    image = _images(run, split, max(BATCHES))
    accuracy = evaluate(run, split, variants)
    times = {size: _times(variants, image[:size], rounds) for size in BATCHES}
    original, rows = variants['original'], []
    whole, reference = sizes(original.variables), accuracy['original'][1]
    for name, variant in variants.items():
        raw, deflated = sizes(variant.variables)
        top1, right = accuracy[name]
        rows.append({
            'method': name,
            'parameters': pruning.density(variant.variables['params'])[0],
            'bytes': raw,
            'deflated_bytes': deflated,
            'smaller': whole[1] / deflated,
            'flops': inspection.count_flops(_predict(variant), variant.variables, image[:1]),
            'top1': top1,
            'top1_interval': intervals.wilson_interval(int(right.sum()), len(right)),
            'top1_before': variant.before,
            'difference': top1 - accuracy['original'][0],
            'p_value': intervals.mcnemar(right, reference)['p_value'],
            'latency': {str(size): _latency(times[size], name) for size in BATCHES},
            'workdir': str(variant.workdir) if variant.workdir else None,
        })  # fmt: skip
    return rows


def _images(run: runs.Run, split: datasets.Split, count: int) -> np.ndarray:
    """The first images of the split, repeated where there are fewer: uint8 [count, H, W, C]."""
    reader = experiment_lib.make_reader(run.experiment.config, split, train=False)
    few = min(count, len(split.source))
    images = np.stack([reader(i)[0] for i in range(few)])
    return np.resize(images, (count, *images.shape[1:]))


def sizes(variables: Any) -> tuple[int, int]:
    """The bytes of all arrays, and those of a compressed .npz (zip) of them."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
    file = io.BytesIO()
    np.savez_compressed(file, **{f'{i}': leaf for i, leaf in enumerate(leaves)})
    return sum(leaf.nbytes for leaf in leaves), file.tell()


def _times(variants: dict[str, Variant], image: np.ndarray, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a batch: [rounds] of each, timed in turn so that all share what else is going on."""
    image, programs, calls = jax.device_put(image), {}, {}
    for name, variant in variants.items():
        program = programs.setdefault(id(variant.model), jax.jit(_predict(variant)))
        calls[name] = functools.partial(program, jax.device_put(variant.variables), image)
    counts = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles
        counts[name] = max(1, round(_SLICE / _seconds(call, 3)))
    found = {name: np.empty(rounds) for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            found[name][i] = _seconds(call, counts[name])
    return found


def _seconds(call: Callable, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / count


def _latency(times: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    ratio = times[name] / times['original']
    return {
        'milliseconds': 1000 * float(np.median(times[name])),
        'ratio': float(np.median(ratio)),
        'quartiles': np.quantile(ratio, (0.25, 0.75)).tolist(),
    }


def text(result: dict[str, Any]) -> str:
    """`compress.compress`'s result as a table."""
    lines = [
        f'{result["workdir"]} on {result["split"]}, {result["device"]}',
        f'{"method":<34} {"non-zero":>10} {"KB":>8} {"smaller":>8} {"MFLOPs":>8} '
        f'{"accuracy":>8} {"change":>7} {"ms at 1":>8} {"ms at 64":>8}   time at 64 (quartiles)',
    ]
    for row in result['rows']:
        one, many = (row['latency'][str(size)] for size in BATCHES)
        low, high = many['quartiles']
        lines.append(
            f'{row["method"]:<34} {row["parameters"]:>10,} {row["deflated_bytes"] / 1000:>8,.1f} '
            f'{row["smaller"]:>7.1f}x {row["flops"] / 1e6:>8,.2f} {row["top1"]:>8.2%} '
            f'{100 * row["difference"]:>+7.2f} {one["milliseconds"]:>8.3f} {many["milliseconds"]:>8.3f}   '
            f'{many["ratio"]:.2f} ({low:.2f} to {high:.2f})'
        )
    return '\n'.join([*lines, 'KB are those of a compressed .npz; times are medians.'])


def plot(result: dict[str, Any]) -> Figure:
    """Accuracy against size and against the time of a batch, a point a method."""
    figure = Figure(figsize=(12, 5), layout='constrained')
    rows = result['rows']
    panels = (
        ('KB of a compressed .npz', [row['deflated_bytes'] / 1000 for row in rows]),
        (f'ms of {BATCHES[-1]} images', [r['latency'][str(BATCHES[-1])]['milliseconds'] for r in rows]),
    )  # fmt: skip
    for axes, (label, values) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for i, (x, row) in enumerate(zip(values, rows, strict=True)):
            low, high = row['top1_interval']
            error = [[row['top1'] - low], [high - row['top1']]]
            style = {'color': f'C{i % 10}', 'marker': 'os^DvP*X'[i // 10 % 8]}
            axes.errorbar(x, row['top1'], error, label=row['method'], capsize=3, **style)
        axes.set(xlabel=label, ylabel='accuracy, 95% interval', xscale='log')
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right center', frameon=False)
    return figure
