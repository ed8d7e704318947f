"""Attacks on networks that leak, and on scores whose answer is known."""

import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from jaxcls import config as config_lib
from jaxcls import datasets, evaluation, fit, membership
from jaxcls.errors import UserError
from jaxcls.main import main
from jaxcls.sweep import fit_seeds


def config(data, **fields):
    config = config_lib.get_config()
    config.update({
        'epochs': 40.0,
        'batch_size': 32,
        'log_every_steps': 1000,
        'learning_rate': 0.01,
        'validate_every_epochs': 40.0,
        'checkpoint_every_epochs': 40.0,
    })  # fmt: skip
    config.update(fields)
    config.model = {'name': 'mlp', 'hidden': (128,), 'norm': 'none'}
    config.data.update(data)
    return config


@pytest.fixture(scope='module')
def random_labels(tmp_path_factory):
    """400 digits whose labels mean nothing: what a network knows of them it has by heart."""
    split = datasets.load('digits', 'train[:400]')
    images = np.stack([split.source[i][0] for i in range(400)])
    labels = np.random.default_rng(0).integers(0, 10, 400)
    path = tmp_path_factory.mktemp('data') / 'random.npz'
    np.savez(
        path, x_train=images[:200], y_train=labels[:200],
        x_test=images[200:], y_test=labels[200:],
    )  # fmt: skip
    return {'name': f'npz:{path}'}


@pytest.fixture(scope='module')
def overfitted(random_labels, tmp_path_factory):
    return fit(config(random_labels), tmp_path_factory.mktemp('overfitted') / 'run')


@pytest.fixture(scope='module')
def shadows(random_labels, tmp_path_factory):
    """Six networks, each of its own half of the examples."""
    half = {**random_labels, 'share': 0.5}
    workdir = tmp_path_factory.mktemp('shadows') / 'runs'
    fit_seeds(config(half, seeds=6), workdir)
    return workdir


# The scores


def test_confidence_is_the_log_odds_of_the_true_class():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(50, 4)) * 3, rng.integers(0, 4, 50)
    p = softmax(logits, axis=1)[np.arange(50), label]
    np.testing.assert_allclose(membership.confidence(logits, label), np.log(p / (1 - p)))
    certain = membership.confidence(np.array([[1e4, 0.0], [1e4, 0.0]]), np.array([0, 1]))
    np.testing.assert_allclose(certain, [1e4, -1e4])
    lost = membership.confidence(np.array([[np.nan, 0.0], [0.0, np.inf]]), np.array([0, 1]))
    np.testing.assert_array_equal(lost, [-1e6, -1e6])


def test_areas_are_those_of_scikit_learn_and_shares_those_of_a_sort():
    rng = np.random.default_rng(1)
    member = rng.random(5000) < 0.4
    score = np.round(rng.normal(size=5000) + member, 2)  # with ties
    found = membership.Attack('threshold', score, member).summary()
    assert found['auc'] == roc_auc_score(member, score)
    others = np.sort(score[~member])[::-1]
    for rate in membership.RATES:
        alarms = int(rate * len(others))  # so many may be wrong
        assert found[f'tpr_at_{rate:g}'] == np.mean(score[member] > others[alarms])


def test_the_ratio_is_that_of_two_normal_distributions():
    rng = np.random.default_rng(2)
    confidences, member = rng.normal(size=(9, 30)), rng.random((9, 30)) < 0.5
    member[:2], member[2:4] = True, False  # of each example some had it and some had not
    score = membership.likelihood_ratio(confidences, member, 8)
    inside, outside = (
        [confidences[:8, j][member[:8, j] == had] for j in range(30)] for had in (1, 0)
    )
    spread = [
        math.sqrt(sum(((x - x.mean()) ** 2).sum() for x in group) / sum(len(x) - 1 for x in group))
        for group in (inside, outside)
    ]
    for j in range(30):
        expected = stats.norm.logpdf(confidences[8, j], inside[j].mean(), spread[0] + 1e-6)
        expected -= stats.norm.logpdf(confidences[8, j], outside[j].mean(), spread[1] + 1e-6)
        assert score[j] == pytest.approx(expected)


def test_the_ratio_beats_the_threshold_where_examples_differ_in_difficulty():
    rng = np.random.default_rng(3)
    member = rng.random((17, 4000)) < 0.5
    hard = rng.normal(size=4000) * 5
    confidences = hard + 1.5 * member + rng.normal(size=member.shape)
    ratio = [
        roc_auc_score(member[i], membership.likelihood_ratio(confidences, member, i))
        for i in (0, 5)
    ]
    threshold = roc_auc_score(member[0], confidences[0])
    # The best there is, for normal scores 1.5 apart.
    best = stats.norm.cdf(1.5 / math.sqrt(2))
    assert 0.55 < threshold < 0.62 and all(0.95 * best < auc < best + 0.02 for auc in ratio)
    hidden = hard + rng.normal(size=member.shape)
    guess = roc_auc_score(member[0], membership.likelihood_ratio(hidden, member, 0))
    assert guess == pytest.approx(0.5, abs=0.03)


def test_an_example_that_no_shadow_had_is_judged_by_the_others():
    rng = np.random.default_rng(4)
    member = rng.random((8, 200)) < 0.5
    confidences = 3.0 * member + rng.normal(size=member.shape) * 0.1
    member[1:, 0], confidences[1:, 0] = False, 0.0
    for had in (True, False):
        member[0, 0], confidences[0, 0] = had, 3.0 * had
        assert (membership.likelihood_ratio(confidences, member, 0)[0] > 0) == had


# Networks


def test_a_network_that_has_learnt_by_heart_gives_its_examples_away(overfitted):
    found, (attack,) = membership.audit(overfitted.workdir)
    assert found['attacks']['threshold']['auc']['mean'] > 0.95 and found['targets'] == 1
    assert found['members'] == 200 and found['examples'] == 400
    assert found['epsilon'] is None and membership.bound(found, 0.01) == 1
    # The score is one to one with the loss.
    loss = np.log1p(np.exp(-attack.score[attack.member])).mean()
    assert loss == pytest.approx(evaluation.evaluate(overfitted.workdir, 'train')['loss'], rel=1e-3)


def test_a_network_that_has_learnt_nothing_gives_nothing_away(random_labels, tmp_path):
    result = fit(config(random_labels, learning_rate=1e-9, epochs=0.1), tmp_path / 'run')
    found, _ = membership.audit(result.workdir)
    assert found['attacks']['threshold']['auc']['mean'] == pytest.approx(0.5, abs=0.1)


def test_each_of_many_seeds_is_attacked_with_the_others_as_shadows(shadows, capsys, tmp_path):
    picture = tmp_path / 'roc.png'
    assert main(['audit', str(shadows), '--json', '--roc', str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['targets'] == 6 and found['members'] == 100 and found['examples'] == 200
    for name in ('threshold', 'ratio'):
        auc = found['attacks'][name]['auc']
        assert auc['mean'] > 0.95 and len(auc['values']) == 6
    assert picture.stat().st_size > 10_000
    assert main(['audit', str(shadows / 'seed-2')]) == 0
    text = capsys.readouterr().out
    assert 'loss threshold' in text and '1 network' in text and 'no guarantee' in text


def test_the_share_of_a_seed_is_its_own_and_halves_are_halves(random_labels):
    drawn = [datasets.share_indices(200, 0.5, seed) for seed in range(40)]
    assert all(len(indices) == 100 for indices in drawn)
    count = np.bincount(np.concatenate(drawn), minlength=200)
    assert count.mean() == 20 and count.min() >= 8 and count.max() <= 32
    assert set(datasets.share_indices(200, 0.2, 3)) < set(drawn[3])
    name = random_labels['name']
    whole, half = (datasets.load(name, 'train', seed=3, share=share) for share in (1.0, 0.5))
    for j, i in enumerate(drawn[3][:10]):
        np.testing.assert_array_equal(half.source[j][0], whole.source[int(i)][0])
        assert half.source[j][1] == whole.source[int(i)][1]
    assert datasets.describe(name, 'train', share=0.5).examples == 100
    assert half.fingerprint != whole.fingerprint
    assert len(datasets.load(name, 'train', label_noise=0.5, share=0.25).source) == 50


def test_a_guarantee_bounds_every_attack():
    found = {'epsilon': 1.0, 'delta': 1e-5}
    np.testing.assert_allclose(
        membership.bound(found, np.array([0.0, 0.01])), [1e-5, 0.0271928], rtol=1e-5
    )
    assert membership.bound(found, 1.0) == 1
    assert membership.bound(found, 0.9) == pytest.approx(1 - (0.1 - 1e-5) / math.e)


# What is refused


def test_too_few_seeds_and_other_differences(shadows, random_labels, tmp_path):
    shutil.copytree(shadows, tmp_path / 'few')
    for seed in (0, 2, 5):
        (tmp_path / 'few' / f'seed-{seed}' / 'result.json').unlink()
    with pytest.raises(UserError, match='3 seeds that have ended, .* at least 4'):
        membership.audit(tmp_path / 'few')
    shutil.copy(shadows / 'seed-2' / 'result.json', tmp_path / 'few' / 'seed-2')
    found = (tmp_path / 'few' / 'config.json').read_text()
    noisy = found.replace('"label_noise": 0.0', '"label_noise": 0.1')
    assert noisy != found
    (tmp_path / 'few' / 'config.json').write_text(noisy)
    with pytest.raises(UserError, match='differ in more than config.data.share'):
        membership.audit(tmp_path / 'few')
    with pytest.raises(UserError, match='share'):
        config_lib.validate(config({**random_labels, 'share': 0.0}))
    assert main(['audit', str(shadows), '--roc', str(tmp_path / 'roc.exe')]) == 2
