"""What a run leaves when it ends, and runs read back: one, or those of several seeds as a group.

Nothing here builds a network: the files of a workdir are enough to compare runs and to report them.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxcls import intervals
from jaxcls import predictions as predictions_lib
from jaxcls import workdir as workdir_lib
from jaxcls.errors import UserError

DIVERGED = 'diverged.json'  # the note of a run that was given up


class Result(NamedTuple):
    """What training returns.

    Attributes:
      metrics: the last validation record.
      records: every record of metrics.jsonl.
      state: the final `steps.TrainState`; None of a baseline.
      stopped: 'done', 'early' (no better validation loss), 'paused', 'SIGINT' or 'SIGTERM'.
      workdir: of the run.
    """

    metrics: dict[str, Any]
    records: list[dict[str, Any]]
    state: Any
    stopped: str
    workdir: Path


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The 'train' or the 'validation' records, in order."""
    return [record for record in records if record['kind'] == kind]


def average(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Loss and accuracy of training records, over all their examples; None without any."""
    records = [record for record in records if record['loss'] is not None]
    total = sum(record['examples'] for record in records)
    return {
        key: sum(r[key] * r['examples'] for r in records) / total if total else None
        for key in ('loss', 'top1')
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """`intervals.mean_interval` of those that are not NaN; NaN for both where none is."""
    known = [value for value in values if not math.isnan(value)]
    return intervals.mean_interval(known) if known else (math.nan, math.nan)


@dataclass(frozen=True)
class Member:
    """A run of one seed.

    Attributes:
      workdir: its directory.
      config: complete, of one seed.
      data: `class_names`, `image_shape`, `examples` of its splits.
      records: of metrics.jsonl.
      result: of result.json; {} where the run has not ended.
    """

    workdir: Path
    config: ConfigDict
    data: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]

    @functools.cached_property
    def predictions(self) -> predictions_lib.Predictions:
        """Logits and labels of the validation split, as the run ended."""
        return predictions_lib.load(self.workdir / 'predictions.npz')

    @functools.cached_property
    def right(self) -> np.ndarray:
        """bool [N]: which examples of `predictions` are."""
        return predictions_lib.right(self.predictions)

    @property
    def diverged(self) -> str:
        """Why the run was given up, as far as it was; ''."""
        path = self.workdir / DIVERGED
        return workdir_lib.read_json(path)['message'] if path.is_file() else ''

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The 'train' or the 'validation' records, in order."""
        return of_kind(self.records, kind)

    def last_epoch(self) -> dict[str, float | None]:
        """`average` of training in the last epoch, taken while it learnt."""
        train = self.of_kind('train')
        # An epoch ends with a whole step, a little late: it is by their middle that records are of one.
        recent = [
            record
            for last, record in itertools.pairwise([{'epoch': 0.0}, *train])
            if (last['epoch'] + record['epoch']) / 2 > train[-1]['epoch'] - 1
        ]
        return average(recent or train[-1:])

    def speed(self) -> float | None:
        """Images a second in training: the median, which leaves out compilation and pauses."""
        speeds = [r['images_per_second'] for r in self.of_kind('train') if 'images_per_second' in r]
        return float(np.median(speeds)) if speeds else None


@dataclass(frozen=True)
class Group:
    """The runs of one config, one a seed.

    Attributes:
      name: short, for legends: the directory's.
      workdir: of the group; of the run itself where there is one.
      config: as it was given.
      members: at least one.
    """

    name: str
    workdir: Path
    config: ConfigDict
    members: tuple[Member, ...]

    def values(self, key: str) -> np.ndarray:
        """A number of result.json over the seeds, such as 'top1': float64 [n], NaN where missing."""
        found = (member.result.get(key) for member in self.members)
        return np.array([math.nan if value is None else value for value in found], np.float64)

    def mean(self, key: str) -> tuple[float, float]:
        """Mean and half-width of the 95% t-interval over the seeds that have ended well.

        The half-width is infinite for one; both are NaN for none.
        """
        return mean_interval(self.values(key))

    def summary(self) -> dict[str, dict[str, Any]]:
        """`{'mean', 'half_width', 'values'}` of each number of result.json."""
        return means([member.result for member in self.members])


def means(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`{'mean', 'half_width', 'values'}` of each number that any of the results has.

    None stands for what is undefined, such as the half-width of one.
    """
    keys = {k: None for result in found for k, v in result.items() if isinstance(v, (int, float))}
    summary = {}
    for key in keys:
        values = [result.get(key) for result in found]
        known = [value for value in values if value is not None]
        mean, half = intervals.mean_interval(known)
        half = half if math.isfinite(half) else None
        summary[key] = {'mean': mean, 'half_width': half, 'values': values}
    return summary


def write(
    workdir: Path,
    predictions: predictions_lib.Predictions,
    records: list[dict[str, Any]],
    cost: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes what a finished run leaves, and returns its result.

    predictions.npz, result.json, curves.png and confusion.png: result.json has the last validation
    record, `predictions.summarize`'s metrics, `top1_interval` (Wilson, 95%), `best_top1` and the cost.

    Args:
      predictions: of the validation split.
      records: of metrics.jsonl.
      cost: `parameters`, `flops` of one image, `peak_bytes`; as far as known.
    """
    validations = of_kind(records, 'validation')
    if not validations:
        raise UserError(f'{workdir}/metrics.jsonl has lost its records. Restore it from a copy.')
    summary = predictions_lib.summarize(predictions)
    confusion = np.asarray(summary['confusion'])
    result = {
        **summary,
        **validations[-1],
        'top1_interval': intervals.wilson_interval(int(np.trace(confusion)), int(confusion.sum())),
        'best_top1': max(record['top1'] for record in validations),
        **(cost or {}),
    }
    with workdir_lib.writable(workdir):
        predictions_lib.save(workdir / 'predictions.npz', predictions)
        _draw(workdir, confusion, records)
        workdir_lib.write_json(workdir / 'result.json', result)  # last: it says that all is there
    return result


def _draw(workdir: Path, confusion: np.ndarray, records: list[dict[str, Any]]):
    from jaxcls import pictures  # slow to import

    class_names = workdir_lib.read_data(workdir)['class_names']
    pictures.curves(records).savefig(workdir / 'curves.png', dpi=120)
    pictures.confusion_matrix(confusion, class_names).savefig(workdir / 'confusion.png', dpi=120)


def read(workdir: str | Path) -> Group:
    """Reads a run's directory, or that of the runs of `config.seeds` seeds.

    Raises:
      UserError: no run there, or a damaged one.
    """
    workdir = Path(workdir)
    config = workdir_lib.read_config(workdir)
    directories = member_directories(workdir, config)
    begun = [d for d in directories if (d / 'metrics.jsonl').is_file()]
    if not begun:
        raise UserError(f'{workdir} has not begun to train. Repeat its `jaxcls train`.')
    members = tuple(_read_member(directory) for directory in begun)
    return Group(workdir.absolute().name, workdir, config, members)


def member_directories(workdir: Path, config: ConfigDict) -> list[Path]:
    """The directory of each seed of a config: the workdir itself where there is one seed."""
    if config.seeds == 1:
        return [workdir]
    return [workdir / f'seed-{config.seed + i}' for i in range(config.seeds)]


def _read_member(directory: Path) -> Member:
    path = directory / 'result.json'
    return Member(
        directory,
        workdir_lib.read_config(directory),
        workdir_lib.read_data(directory),
        workdir_lib.read_metrics(directory),
        workdir_lib.read_json(path) if path.is_file() else {},
    )
