"""How much of its accuracy a run keeps: under attack, under corruptions; and what it says of strange data."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import attacks as attacks_lib
from jaxcls import augment, corruptions, datasets, intervals, metrics, registry, runs, steps
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError, require

# By norm, of grey images and of others: what the literature has of MNIST and CIFAR-10.
EPSILONS = {
    ('linf', True): (0.05, 0.1, 0.2, 0.3),
    ('linf', False): (1 / 255, 2 / 255, 4 / 255, 8 / 255),
    ('l2', True): (0.5, 1.0, 1.5, 2.0),
    ('l2', False): (0.125, 0.25, 0.5, 1.0),
}


def make_attacks(
    names: Sequence[str],
    norm: str = 'linf',
    steps: int = 40,
    restarts: int = 1,
    queries: int = 1000,
) -> dict[str, attacks_lib.Attack]:
    """Attacks by name.

    Args:
      names: of `attacks.ATTACKS`.
      norm: 'linf' or 'l2'.
      steps, restarts: of 'pgd'.
      queries: of 'square'.

    Raises:
      UserError: an unknown name, the same twice, or a value out of its range.
    """
    options = {
        'fgsm': {},
        'pgd': {'steps': steps, 'restarts': restarts},
        'square': {'steps': queries},
    }
    require(len(set(names)) == len(names), '--attacks', ','.join(names), 'each name once')
    return {
        name: registry.lookup(attacks_lib.ATTACKS, name, 'attack')(norm=norm, **options[name])
        for name in names
    }


def attack_run(
    run: runs.Run,
    attacks: Mapping[str, attacks_lib.Attack],
    epsilons: Sequence[float],
    split: str = '',
    examples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of a run against epsilon, for each attack.

    An attack at one epsilon may use what it, or another attack, found at a smaller one, which is
    within the larger one too: so `accuracy` never grows with epsilon. `alone` is without that, and may
    by chance, or where gradients are of no use to the attack.

    Args:
      run: of `runs.open_run`.
      attacks: of `make_attacks`.
      epsilons: at least 0, in units of pixels in [0, 1].
      split: '' is the run's validation split.
      examples: the first so many of it; 0 is all.
      seed: of all that the attacks draw.

    Returns:
      `split`, `step`, `examples`; `clean`: a row; and `attacks`: a row for each attack (and, of
      several, for 'all', the worst of them) and each epsilon, from the smallest. A row has `accuracy`
      and its 95% Wilson `interval`; those of attacks, `attack`, `epsilon` and `alone`, the accuracy
      without smaller epsilons.

    Raises:
      UserError: no attack, an epsilon below 0, fewer examples than 0, no such split, or other classes
        than the run's.
    """
    for epsilon in epsilons:
        require(0 <= epsilon < math.inf, '--epsilons', epsilon, 'numbers of at least 0')
    require(bool(attacks) and bool(epsilons), '--attacks', '', 'at least one, with --epsilons')
    epsilons = sorted(set(epsilons))
    split, loaded = runs.load_split(run, split)
    programs = {name: _program(run, attack) for name, attack in attacks.items()}
    predict = jax.jit(run.experiment.predict)
    clean, fooled = [], {name: [] for name in attacks}  # bool [n]; bool [E, n]
    for batch in _batches(run, loaded, examples):
        image, label, mask = (batch[name] for name in ('image', 'label', 'mask'))
        mask = np.asarray(mask)
        right = metrics.top_k(predict(run.variables, image), label, 1)
        clean.append(np.asarray(right)[mask])
        for number, (name, program) in enumerate(programs.items()):
            key = jax.random.fold_in(jax.random.key(seed), number)
            keys = attacks_lib.example_keys(key, batch['index'])
            margins = [program(keys, image, label, epsilon) for epsilon in epsilons]
            fooled[name].append(np.stack(jax.device_get(margins))[:, mask] >= 0)
    clean = np.concatenate(clean)
    kept = {name: clean & ~np.concatenate(parts, axis=1) for name, parts in fooled.items()}
    return {
        'split': split,
        'step': run.step,
        'examples': len(clean),
        'clean': _row(clean),
        'attacks': _rows(kept, epsilons),
    }


def _program(run: runs.Run, attack: attacks_lib.Attack) -> Callable[..., jax.Array]:
    """`program(keys, image, label, epsilon) -> margin`: the steps of an attack, one by one."""
    model, data = run.experiment.model, run.experiment.config.data
    forward = steps.make_float_forward(model, data.mean, data.std)

    @jax.jit
    def begin(keys, image, label, epsilon):
        return attacks_lib.start(keys, augment.to_float(image), label, epsilon)

    @jax.jit
    def step(variables, state):
        return attack.step(lambda image: forward(variables, image)[0], state)

    def program(keys, image, label, epsilon):
        state = begin(keys, image, label, epsilon)
        for _ in range(attack.steps):
            state = step(run.variables, state)
        return state.margin

    return program


def _rows(kept: Mapping[str, np.ndarray], epsilons: Sequence[float]) -> list[dict[str, Any]]:
    """Of who resists each attack alone at each epsilon: bool [E, N]."""
    if len(kept) > 1:
        kept = {**kept, 'all': np.logical_and.reduce(list(kept.values()))}
    rows = []
    for name, alone in kept.items():
        resists = np.logical_and.accumulate(alone, axis=0)
        for epsilon, these, own in zip(epsilons, resists, alone, strict=True):
            of = {'attack': name, 'epsilon': float(epsilon)}
            rows.append({**of, **_row(these), 'alone': float(own.mean())})
    return rows


def _row(right: np.ndarray) -> dict[str, Any]:
    interval = intervals.wilson_interval(int(right.sum()), len(right))
    return {'accuracy': float(right.mean()), 'interval': interval}


def corruption_accuracy(
    run: runs.Run,
    kinds: Sequence[str] = tuple(corruptions.CORRUPTIONS),
    split: str = '',
    examples: int = 0,
    reference: runs.Run | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Errors of a run on corrupted images, by kind and severity.

    Args:
      run: of `runs.open_run`.
      kinds: names of `corruptions.CORRUPTIONS`.
      split: '' is the run's validation split.
      examples: the first so many of it; 0 is all.
      reference: another run on the same images, to be measured alike.
      seed: of the corruptions.

    Returns:
      `split`, `examples`, `clean_error`; `kinds`: for each its name, `errors` [5] by severity and
      their `mean`; `mean_error`, the mean of those. With a reference also its `reference_error` of
      each kind, `relative`, ours over it, and of all the mean, the paper's mCE: 1 is as good.

    Raises:
      UserError: an unknown kind, none, the same twice, no such split, or a reference of other images
        or classes.
    """
    require(len(set(kinds)) == len(kinds) > 0, '--corruptions', ','.join(kinds), 'each name once')
    for kind in kinds:
        registry.lookup(corruptions.CORRUPTIONS, kind, 'corruption')
    measured = [run] if reference is None else [run, reference]
    if reference and _seen(reference) != _seen(run):
        raise UserError(
            'The reference run is of other images or classes than the run. Give one of the same data.'
        )
    split, loaded = runs.load_split(run, split)
    predicts = [jax.jit(one.experiment.predict) for one in measured]
    count, wrong, clean = 0, np.zeros((len(measured), len(kinds), 5)), 0
    for batch in _batches(run, loaded, examples):

        def errors(image, batch=batch):
            logits = [f(one.variables, image) for f, one in zip(predicts, measured, strict=True)]
            misses = [batch['mask'] & ~metrics.top_k(x, batch['label'], 1) for x in logits]
            return jnp.stack(misses).sum(axis=1)

        found = []
        for number, kind in enumerate(kinds):
            key = jax.random.fold_in(jax.random.key(seed), number)
            keys = attacks_lib.example_keys(key, batch['index'])
            for severity in corruptions.SEVERITIES:
                found.append(errors(corruptions.corrupt(keys, batch['image'], kind, severity)))
        found = np.stack(jax.device_get(found), axis=1)
        wrong += found.reshape(wrong.shape)
        clean += int(errors(batch['image'])[0])
        count += int(batch['mask'].sum())
    found = _corruption_rows(kinds, wrong / count)
    return {'split': split, 'examples': count, 'clean_error': clean / count, **found}


def _corruption_rows(kinds: Sequence[str], errors: np.ndarray) -> dict[str, Any]:
    """Of errors [1 or 2 runs, kinds, severities]."""
    means = errors.mean(axis=2)
    rows = [
        {'kind': kind, 'errors': errors[0, i].tolist(), 'mean': float(means[0, i])}
        for i, kind in enumerate(kinds)
    ]
    result = {'kinds': rows, 'mean_error': float(means[0].mean())}
    if len(errors) == 1:
        return result
    for row, ours, theirs in zip(rows, *means, strict=True):
        row['reference_error'] = float(theirs)
        row['relative'] = float(ours / theirs) if theirs else (math.inf if ours else 1.0)
    return {**result, 'relative': float(np.mean([row['relative'] for row in rows]))}


def _seen(run: runs.Run) -> tuple:
    return run.experiment.image_shape, run.class_names


def out_of_distribution(
    run: runs.Run, other: str, split: str = '', examples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Whether a run's scores tell its own images from those of another data set.

    Scores: `max_softmax`, the largest probability (Hendrycks and Gimpel 2017,
    https://arxiv.org/abs/1610.02136), and `energy`, the log of the sum of the exponentials of the
    logits (Liu et al. 2020, https://arxiv.org/abs/2010.03759, with the sign turned).

    Args:
      run: of `runs.open_run`.
      other: a data set, such as 'tfds:fashion_mnist': its test split, else the first that is not for
        training. Images are cropped, resized, made grey or coloured as the run's. Or 'noise', even
        in all values.
      split: of the run's own data; '' is its validation split.
      examples: the first so many of either; 0 is all.
      seed: of the noise.

    Returns:
      `split`, `other`, `examples` and `other_examples`; and for each score its `auroc`, 1 where all
      own images score higher and 0.5 by chance, and `fpr95`, the share of the others that score as
      high as 95% of the own ones do.

    Raises:
      UserError: no such split or data set.
    """
    split, loaded = runs.load_split(run, split)
    name, images = _other_images(run, other, examples or len(loaded.source), seed)
    predict = jax.jit(run.experiment.predict)
    own = [
        np.asarray(predict(run.variables, batch['image']))[np.asarray(batch['mask'])]
        for batch in _batches(run, loaded, examples)
    ]
    strange = [_logits(run, predict, part) for part in images]
    own, strange = (_scores(np.concatenate(x)) for x in (own, strange))
    counts = {'examples': len(own['energy']), 'other_examples': len(strange['energy'])}
    found = {score: _told_apart(own[score], strange[score]) for score in own}
    return {'split': split, 'other': name, **counts, **found}


def _other_images(run: runs.Run, other: str, count: int, seed: int) -> tuple[str, Iterator]:
    """The data set's name with its split, and batches of at most `batch_size` images."""
    experiment = run.experiment
    size, data = experiment.config.batch_size, experiment.config.data
    if other == 'noise':
        random = np.random.Generator(np.random.Philox(key=[seed, 2]))
        shapes = [(min(size, count - i), *experiment.image_shape) for i in range(0, count, size)]
        return other, (random.integers(0, 256, shape, np.uint8) for shape in shapes)
    known = datasets.splits(other, data.dir)
    split = next(
        (x for x in ('test', 'validation', 'val', *known) if x in known and x != 'train'), 'train'
    )
    source = datasets.load(other, split, data.dir).source
    count = min(count, len(source))
    return f'{other} {split}', (
        np.stack(
            [
                experiment_lib.decode_image(experiment, source[j][0])
                for j in range(i, min(i + size, count))
            ]
        )
        for i in range(0, count, size)
    )


def _logits(run: runs.Run, predict: Callable, images: np.ndarray) -> np.ndarray:
    """Of at most `batch_size` images, padded to it."""
    size = -(-run.experiment.config.batch_size // run.mesh.size) * run.mesh.size
    padded = np.zeros((size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return np.asarray(predict(run.variables, padded))[: len(images)]


def _scores(logits: np.ndarray) -> dict[str, np.ndarray]:
    from scipy.special import logsumexp, softmax

    logits = np.where(np.isfinite(logits).all(1, keepdims=True), logits, 0).astype(np.float64)
    return {'max_softmax': softmax(logits, axis=1).max(1), 'energy': logsumexp(logits, axis=1)}


def _told_apart(own: np.ndarray, strange: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    labels = np.r_[np.ones(len(own)), np.zeros(len(strange))]
    auroc = roc_auc_score(labels, np.r_[own, strange])
    threshold = np.quantile(own, 0.05, method='lower')
    return {'auroc': float(auroc), 'fpr95': float(np.mean(strange >= threshold))}


def _batches(run: runs.Run, split: datasets.Split, examples: int) -> Iterator[dict[str, jax.Array]]:
    """Batches of the first examples of a split, as `pipeline.Feed` has them."""
    require(examples >= 0, '--examples', examples, 'at least 0')
    config, total = run.experiment.config, len(split.source)
    count = min(examples or total, total)
    feed, _ = experiment_lib.make_evaluation_feed(config, split, run.mesh, config.batch_size)

    @jax.jit
    def fetch(data, items):
        batch = feed.fetch(data, jax.tree.map(lambda x: x[0], items))
        return {**batch, 'mask': batch['mask'] & (batch['index'] < count)}

    try:
        done = number = 0
        while done < count:
            batch = fetch(feed.data, feed.items(number, 1))
            done, number = done + len(batch['label']), number + 1
            yield batch
    finally:
        feed.close()
