"""Robustness of a run: what is counted, the laws of the curves, and the command."""

import json

import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import corruptions, evaluation, fit, robustness, runs
from jaxcls.errors import UserError
from jaxcls.main import main


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A small net that was trained on adversarial examples, and scored on 90 others."""
    config = config_lib.get_config()
    config.update({'epochs': 4.0, 'learning_rate': 0.01, 'checkpoint_every_epochs': 4.0})
    config.model = {'name': 'linear'}
    config.data.validation = 'test[:90]'
    config.adversary = {'name': 'trades', 'epsilon': 0.05, 'steps': 1, 'beta': 1.0}
    return fit(config, tmp_path_factory.mktemp('robust') / 'run').workdir


@pytest.fixture(scope='module')
def run(workdir):
    return runs.open_run(workdir)


EPSILONS = (0.2, 0.0, 0.1, 0.05)


@pytest.fixture(scope='module')
def attacked(run):
    attacks = robustness.make_attacks(('fgsm', 'pgd'), steps=5)
    return robustness.attack_run(run, attacks, EPSILONS)


def curve(found, attack, key='accuracy'):
    rows = [row for row in found['attacks'] if row['attack'] == attack]
    assert [row['epsilon'] for row in rows] == sorted(EPSILONS)
    return np.array([row[key] for row in rows])


def test_the_clean_accuracy_is_that_of_evaluate(run, attacked):
    expected = evaluation.evaluate_run(run)
    assert attacked['clean']['accuracy'] == pytest.approx(expected['top1'])
    assert attacked['clean']['interval'] == pytest.approx(expected['top1_interval'])
    assert (attacked['split'], attacked['examples']) == ('test[:90]', 90)


@pytest.mark.parametrize('attack', ['fgsm', 'pgd'])
def test_accuracy_falls_with_epsilon_with_and_without_smaller_ones(attacked, attack):
    accuracy, alone = curve(attacked, attack), curve(attacked, attack, 'alone')
    assert accuracy[0] == alone[0] == attacked['clean']['accuracy'] > 0.7
    assert accuracy[-1] < accuracy[0] - 0.2
    for values in (accuracy, alone):
        assert list(values) == sorted(values, reverse=True)
    assert np.all(accuracy <= alone)


def test_all_attacks_together_are_the_worst_of_each_example(attacked):
    each = np.array([curve(attacked, name) for name in ('fgsm', 'pgd')])
    assert np.all(curve(attacked, 'all') <= each.min(0))


def test_what_a_smaller_epsilon_found_counts_at_a_larger_one():
    kept = {'a': np.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool), 'b': np.ones((2, 4), bool)}
    rows = robustness._rows(kept, (0.1, 0.2))
    found = {(row['attack'], row['epsilon']): (row['accuracy'], row['alone']) for row in rows}
    assert found == {
        ('a', 0.1): (0.75, 0.75), ('a', 0.2): (0.5, 0.75), ('b', 0.1): (1, 1), ('b', 0.2): (1, 1),
        ('all', 0.1): (0.75, 0.75), ('all', 0.2): (0.5, 0.75),
    }  # fmt: skip


def test_examples_are_the_first_ones(run, attacked):
    attacks = robustness.make_attacks(('fgsm',))
    first, ten = (
        robustness.attack_run(run, attacks, (0.1,), n, k)
        for n, k in (('test[:10]', 0), ('test', 10))
    )
    assert first['examples'] == ten['examples'] == 10
    assert first['attacks'] == ten['attacks']
    assert robustness.attack_run(run, attacks, (0.1,), 'test[:90]', 1000)['examples'] == 90


def test_corruption_errors_are_those_of_the_corrupted_images(run, attacked):
    kinds = ('contrast', 'brightness')
    found = robustness.corruption_accuracy(run, kinds, reference=run)
    assert found['clean_error'] == pytest.approx(1 - attacked['clean']['accuracy'])
    assert [row['kind'] for row in found['kinds']] == list(kinds)
    for row in found['kinds']:
        assert row['mean'] == pytest.approx(np.mean(row['errors']))
        assert row['relative'] == 1.0 and row['reference_error'] == row['mean']
    assert found['kinds'][0]['errors'][4] > found['clean_error']
    assert found['mean_error'] == pytest.approx(np.mean([row['mean'] for row in found['kinds']]))
    assert found['relative'] == 1.0
    # Contrast and brightness draw nothing: by hand.
    batch = next(robustness._batches(run, runs.load_split(run)[1], 10))
    image = corruptions.corrupt(None, batch['image'], 'contrast', 5)
    logits = np.asarray(run.experiment.predict(run.variables, image))
    wrong = (logits.argmax(1) != batch['label'])[np.asarray(batch['mask'])].mean()
    ten = robustness.corruption_accuracy(run, ('contrast',), examples=10)
    assert ten['kinds'][0]['errors'][4] == pytest.approx(wrong) and ten['examples'] == 10


def test_the_mean_corruption_error_is_the_papers():
    ours = np.array([[0.1, 0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2, 0.7]])
    theirs = np.array([[0.1, 0.2, 0.2, 0.2, 0.3], [0.1, 0.2, 0.3, 0.2, 0.2]])
    found = robustness._corruption_rows(('fog', 'snow'), np.stack([ours, theirs]))
    # Sums over severities are divided, kind by kind: 0.5 / 1.0 and 1.5 / 1.0.
    assert [row['relative'] for row in found['kinds']] == pytest.approx([0.5, 1.5])
    assert found['relative'] == pytest.approx(1.0) and found['mean_error'] == pytest.approx(0.2)


def test_scores_tell_noise_from_digits_and_not_digits_from_digits(run):
    noise = robustness.out_of_distribution(run, 'noise')
    assert noise['examples'] == noise['other_examples'] == 90
    assert min(noise[score]['auroc'] for score in ('max_softmax', 'energy')) > 0.5
    same = robustness.out_of_distribution(run, 'digits', examples=90)
    assert same['other'] == 'digits test' and same['energy']['auroc'] == pytest.approx(0.5)
    assert same['energy']['fpr95'] == pytest.approx(0.95, abs=0.02)


def test_images_of_another_size_and_with_colours_are_made_the_runs(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 10, 3), np.uint8)
    labels = np.arange(20) % 2
    path = tmp_path / 'other.npz'
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    found = robustness.out_of_distribution(run, f'npz:{path}', examples=15)
    assert found['other'].endswith('test') and found['other_examples'] == 15


def test_auroc_and_false_positives_by_hand():
    found = robustness._told_apart(np.array([2.0, 3, 4, 5]), np.array([1.0, 2.5]))
    # Of the 8 pairs the own score is the larger in 7; one of two others is above the lowest own.
    assert found == {'auroc': pytest.approx(7 / 8), 'fpr95': 0.5}


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda run: robustness.make_attacks(('pdg',)), "Unknown attack 'pdg'. Did you mean 'pgd'"),
        (lambda run: robustness.make_attacks(('pgd', 'pgd')), 'each name once'),
        (lambda run: robustness.attack_run(run, {}, (0.1,)), 'at least one, with --epsilons'),
        (
            lambda run: robustness.attack_run(run, robustness.make_attacks(('fgsm',)), (-0.1,)),
            '--epsilons is -0.1',
        ),
        (lambda run: robustness.corruption_accuracy(run, ('frog',)), "Did you mean 'fog'"),
        (
            lambda run: robustness.corruption_accuracy(run, ('fog',), examples=-1),
            '--examples is -1',
        ),
        (lambda run: robustness.out_of_distribution(run, 'cats'), "Unknown data set 'cats'"),
    ],
)
def test_mistakes_say_what_was_expected(run, call, message):
    with pytest.raises(UserError, match=message):
        call(run)


def test_the_command_prints_a_table_and_draws(workdir, tmp_path, capsys):
    picture = tmp_path / 'curve.png'
    command = ['attack', str(workdir), '--attacks=fgsm', '--epsilons=8/255,0.2', '--examples=20']
    command += ['--corruptions=contrast', '--ood=noise', f'--picture={picture}']
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert 'fgsm    epsilon 0.0314  accuracy' in printed and 'contrast' in printed
    assert 'mean corruption error' in printed and 'AUROC' in printed
    assert picture.read_bytes()[:4] == b'\x89PNG'
    assert main([*command, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['attacked']['examples'] == found['ood']['examples'] == 20
    assert found['corrupted']['kinds'][0]['kind'] == 'contrast'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--epsilons=8/0'], "--epsilons has '8/0'; it must be numbers by commas"),
        (['--norm=l1'], "norm is 'l1'; it must be linf or l2"),
        (['--attacks=square', '--norm=l2'], 'the attack square is of linf'),
        (['--attacks=none'], 'There is nothing to measure'),
        (['--reference=x'], '--reference is for --corruptions'),
        (['--picture=nowhere/x.png'], 'there is no directory nowhere'),
        (['--seed=-1'], '--seed is -1'),
    ],
)
def test_mistakes_of_the_command(workdir, capsys, options, message):
    assert main(['attack', str(workdir), *options]) == 2
    assert message in capsys.readouterr().err
