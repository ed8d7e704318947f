"""Membership inference: how well a trained network tells which examples it was trained on.

Two attacks. By a threshold on the loss (Yeom et al. 2018, https://arxiv.org/abs/1709.01604): what was
trained on has less. By a likelihood ratio (Carlini et al. 2022, https://arxiv.org/abs/2112.03570): how
the confidence of one example is distributed over networks that were trained with it and over others that
were not; the networks are the seeds of one config with `data.share` below 1. As Carlini et al. say, what
matters is not the average but whom an attack finds with few false alarms: so besides the area under the
ROC curve there is the share found at 1% and 0.1% of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import stats
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score, roc_curve

from jaxcls import datasets, evaluation, results, runs
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError

# At these shares of false alarms, how many members an attack finds.
RATES = (0.01, 0.001)
# Below so many shadow networks, examples share their variances (Carlini et al., section VI-C).
_OWN_VARIANCE = 64
_FEWEST = 4
_POINTS = np.geomspace(1e-4, 1, 200)


class Attack(NamedTuple):
    """One attack on one network.

    Attributes:
      name: 'threshold' or 'ratio'.
      score: float64 [N], greater for what it takes to be a member.
      member: bool [N].
    """

    name: str
    score: np.ndarray
    member: np.ndarray

    def summary(self) -> dict[str, float]:
        """`auc`, and `tpr_at_0.01` and so on: the share of members found at RATES of false alarms.

        Of fewer than 1,000 others, 0.1% is none.
        """
        alarms, found, _ = roc_curve(self.member, self.score, drop_intermediate=False)
        at = {f'tpr_at_{rate:g}': float(found[alarms <= rate].max()) for rate in RATES}
        return {'auc': float(roc_auc_score(self.member, self.score)), **at}

    def curve(self) -> np.ndarray:
        """The share of members found at the false alarms `_POINTS`."""
        alarms, found, _ = roc_curve(self.member, self.score, drop_intermediate=False)
        return found[np.searchsorted(alarms, _POINTS, side='right') - 1]


def confidence(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """`log p - log(1 - p)` of the true class: logits [N, K], label int [N] -> float64 [N].

    About normal over networks, where p itself is not (Carlini et al., section V). It falls where the
    loss rises, so a threshold on either is the same attack. Logits that are not finite are certain and wrong.
    """
    logits = np.asarray(logits, np.float64)
    finite = np.isfinite(logits).all(1)
    logits = np.where(finite[:, None], logits, 0.0)
    own = np.arange(logits.shape[1]) == label[:, None]
    others = logsumexp(np.where(own, -np.inf, logits), axis=1)
    return np.where(finite, np.clip(logits[own] - others, -1e6, 1e6), -1e6)


def likelihood_ratio(confidences: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """The online attack on one of S networks, the others being its shadows: float64 [N].

    `log N(c; those that had the example) - log N(c; those that had not)`. With fewer than 64 of one side
    for any example, that side's variance is that of all examples together. What no shadow had, or all
    had, is judged by the mean difference over the other examples.

    Args:
      confidences: [S, N].
      member: bool [S, N], which network was trained on which examples.
    """
    shadows = np.arange(len(confidences)) != target
    known, inside = confidences[shadows], member[shadows]
    groups = []
    for chosen in (inside, ~inside):
        count = chosen.sum(0)
        mean = np.where(chosen, known, 0).sum(0) / np.maximum(count, 1)
        squares = np.where(chosen, (known - mean) ** 2, 0).sum(0)
        free = np.maximum(count - 1, 0)
        shared = squares.sum() / max(free.sum(), 1)
        own = count.min() >= _OWN_VARIANCE
        variance = squares / np.maximum(free, 1) if own else np.full(len(mean), shared)
        groups.append((count, mean, np.sqrt(variance) + 1e-6))
    (with_, mean_in, std_in), (without, mean_out, std_out) = groups
    both = (with_ > 0) & (without > 0)
    gap = (mean_in - mean_out)[both].mean() if both.any() else 0.0
    mean_in = np.where(with_ > 0, mean_in, mean_out + gap)
    mean_out = np.where(without > 0, mean_out, mean_in - gap)
    own = confidences[target]
    return stats.norm.logpdf(own, mean_in, std_in) - stats.norm.logpdf(own, mean_out, std_out)


def audit(workdir: str | Path, checkpoint: str = 'latest') -> tuple[dict[str, Any], list[Attack]]:
    """Attacks a run, or each of the seeds of a config in turn.

    Of one run: a threshold on the loss, members being its training split and the others its validation
    split. Of several seeds with `data.share` below 1: members and others are those that a seed had and
    had not of the training split, and there is the likelihood ratio too, the other seeds being the shadows.

    Args:
      checkpoint: 'latest', 'best' or a step.

    Returns:
      `examples` and `members` of one target; `targets`; `epsilon` and `delta` that the run guarantees,
      or None; and `attacks`, by name: of `auc` and each `tpr_at_...` the `mean`, `half_width` (of the 95%
      t-interval over targets, None for one) and `values`. And the attacks themselves.

    Raises:
      UserError: no run, or a baseline; fewer than 4 seeds to compare; seeds whose training examples
        differ otherwise.
    """
    workdir = Path(workdir)
    group = results.read(workdir)
    if experiment_lib.is_baseline(group.config):
        raise UserError(f'{workdir} is a baseline, which keeps no model to attack.')
    if group.config.seeds == 1 or group.config.data.share == 1:
        attacks = [_by_splits(runs.open_run(m.workdir, checkpoint)) for m in _ended(group, 1)]
    else:
        attacks = _by_shadows(group, checkpoint)
    return _summary(group, attacks), attacks


def _ended(group: results.Group, fewest: int) -> list[results.Member]:
    """Those with a checkpoint at their end; of one run, the run as it is."""
    ended = [m for m in group.members if m.result or group.config.seeds == 1]
    if len(ended) < fewest:
        raise UserError(
            f'{group.workdir} has {len(ended)} seeds that have ended, and the attack compares at least '
            f'{fewest}: train more, with --config.seeds=16 --config.data.share=0.5.'
        )
    return ended


def _by_splits(run: runs.Run) -> Attack:
    data = run.experiment.config.data
    splits = [runs.load_split(run, name)[1] for name in (data.train, data.validation)]
    inside, outside = (_confidence(run, split) for split in splits)
    member = np.arange(len(inside) + len(outside)) < len(inside)
    return Attack('threshold', np.concatenate([inside, outside]), member)


def _by_shadows(group: results.Group, checkpoint: str) -> list[Attack]:
    ended, data = _ended(group, _FEWEST), group.config.data
    pool, other = (_pool(group.config, one.config.seed) for one in (ended[0], ended[-1]))
    if pool.fingerprint != other.fingerprint:
        raise UserError(
            'The seeds differ in more than config.data.share: in what config.data.per_class, imbalance or '
            'label_noise drew, or in how a folder was split. Train them without, with data.share alone.'
        )
    confidences, member = [], np.zeros((len(ended), len(pool.source)), bool)
    for row, one in zip(member, ended, strict=True):
        row[datasets.share_indices(len(row), data.share, one.config.seed)] = True
        confidences.append(_confidence(runs.open_run(one.workdir, checkpoint), pool))
    confidences = np.stack(confidences)
    attacks = []
    for i in range(len(ended)):
        score = likelihood_ratio(confidences, member, i)
        attacks += [
            Attack('threshold', confidences[i], member[i]),
            Attack('ratio', score, member[i]),
        ]
    return attacks


def _pool(config: ConfigDict, seed: int) -> datasets.Split:
    """What a seed's share is drawn from."""
    whole = ConfigDict(config.to_dict())
    whole.seed, whole.data.share = seed, 1.0
    return experiment_lib.load_split(whole, whole.data.train)


def _confidence(run: runs.Run, split: datasets.Split) -> np.ndarray:
    evaluated = evaluation.make_evaluator(run.experiment, split, run.mesh)(run.variables)
    found = evaluated.predictions()
    return confidence(found.logits, found.label)


def _summary(group: results.Group, attacks: Sequence[Attack]) -> dict[str, Any]:
    spent = [
        records[-1].get('epsilon') for m in group.members if (records := m.of_kind('validation'))
    ]
    epsilon = max(spent) if spent and None not in spent else None
    return {
        'workdir': str(group.workdir),
        'examples': len(attacks[0].member),
        'members': int(attacks[0].member.sum()),
        'targets': sum(attack.name == 'threshold' for attack in attacks),
        'epsilon': epsilon,
        'delta': group.config.privacy.delta if epsilon is not None else None,
        'attacks': {
            name: results.means([a.summary() for a in attacks if a.name == name])
            for name in dict.fromkeys(attack.name for attack in attacks)
        },
    }


NAMES = {'threshold': 'loss threshold', 'ratio': 'likelihood ratio'}


def audit_text(found: dict[str, Any]) -> str:
    """What `audit` found, as a table."""
    networks = 'network' if found['targets'] == 1 else 'networks, each as the target in turn'
    lines = [
        f'{found["workdir"]}: {found["members"]:,} members among {found["examples"]:,} examples, '
        f'{found["targets"]} {networks}',
        _line('attack', 'AUC', [f'found at {rate:.1%}' for rate in RATES]),
    ]
    for name, numbers in found['attacks'].items():
        cells = [_spread(numbers[f'tpr_at_{rate:g}'], '.2%') for rate in RATES]
        lines.append(_line(NAMES[name], _spread(numbers['auc'], '.4f'), cells))
    if found['epsilon'] is None:
        return '\n'.join([*lines, _line('no guarantee', '', ['100.00%'] * len(RATES))])
    most = [f'{bound(found, rate):.2%}' for rate in RATES]
    guarantee = f'epsilon {found["epsilon"]:.3f} allows'
    return '\n'.join([*lines, _line(guarantee, '', most)])


def _line(name: str, auc: str, cells: Sequence[str]) -> str:
    return f'{name:<22}{auc:>16}' + ''.join(f'{cell:>18}' for cell in cells)


def _spread(numbers: dict[str, Any], form: str) -> str:
    """A mean and, over several, its interval."""
    half = numbers['half_width']
    return f'{numbers["mean"]:{form}}' + ('' if half is None else f' +- {half:{form}}')


def bound(found: dict[str, Any], alarms: np.ndarray | float) -> np.ndarray | float:
    """The largest share of members that any attack finds at a share of false alarms (Kairouz 2015).

    `min(1, e^epsilon a + delta, 1 - e^-epsilon (1 - delta - a))`, and 1 without a guarantee.
    """
    if found['epsilon'] is None:
        return np.ones_like(alarms)
    factor, delta = np.exp(found['epsilon']), found['delta']
    return np.minimum(np.minimum(factor * alarms + delta, 1 - (1 - delta - alarms) / factor), 1)


def picture(found: dict[str, Any], attacks: Sequence[Attack]) -> Figure:
    """The ROC curves on two logarithmic axes: each target, their mean, chance, and the guarantee."""
    figure = Figure(figsize=(6, 6), layout='constrained')
    axes = figure.subplots()
    for name, color in (('threshold', '#0b62a4'), ('ratio', '#bf4a00')):
        curves = [attack.curve() for attack in attacks if attack.name == name]
        for curve in curves:
            axes.plot(_POINTS, curve, color=color, alpha=0.25, lw=0.8)
        if curves:
            auc = found['attacks'][name]['auc']['mean']
            label = f'{NAMES[name]}, AUC {auc:.4f}'
            axes.plot(_POINTS, np.mean(curves, axis=0), color=color, lw=2, label=label)
    axes.plot(_POINTS, _POINTS, color='#767676', ls=':', label='a guess')
    if found['epsilon'] is not None:
        label = f'the most that epsilon {found["epsilon"]:.2f} allows'
        axes.plot(_POINTS, bound(found, _POINTS), color='black', ls='--', label=label)
    fewest = 1 / (found['examples'] - found['members'])  # one false alarm
    axes.set(xscale='log', yscale='log', xlim=(fewest, 1), ylim=(fewest, 1.05))
    axes.set(xlabel='others taken for members', ylabel='members found')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
