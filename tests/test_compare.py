import itertools
import json

import numpy as np
import pytest
from scipy import stats

import fake_runs
from jaxcls import intervals, predictions
from jaxcls.errors import UserError
from jaxcls.report import compare, significance


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp('compare')
    fake_runs.write(root / 'good', 4, learning_rate=0.1)
    fake_runs.write(root / 'bad', 40, seed=1, model={'name': 'mlp'})
    fake_runs.write_group(root / 'three', [10, 14, 12])
    fake_runs.write_group(root / 'worse', [20, 22, 30], epochs=5.0)
    fake_runs.write(root / 'begun', 0, ended=False)
    return root


def groups(directory, *names):
    return compare.read([directory / name for name in names])


def cells(section, row):
    return dict(zip(section['columns'], section['rows'][row], strict=True))


def test_one_run_has_wilsons_interval_and_seeds_have_students(directory):
    table = compare.table(groups(directory, 'good', 'three'))
    good, three = (cells(table, i)['accuracy'] for i in (0, 1))
    assert good['mean'] == pytest.approx(356 / 360)
    assert (good['low'], good['high']) == pytest.approx(intervals.wilson_interval(356, 360))
    accuracies = 1 - np.array([10, 14, 12]) / 360
    half = stats.t.ppf(0.975, 2) * stats.sem(accuracies)
    assert (three['mean'], three['half']) == pytest.approx((accuracies.mean(), half))
    assert cells(table, 1)['run'] == 'three (3 seeds)'


def test_the_best_of_a_column_is_marked(directory):
    table = compare.table(groups(directory, 'good', 'bad'))
    for name in ('accuracy', 'log loss', 'macro F1'):
        assert [cells(table, i)[name].get('best') for i in (0, 1)] == [True, False]
    alone = compare.table(groups(directory, 'good'))
    assert not any(cell.get('best') for cell in alone['rows'][0][1:])


def test_of_runs_on_other_data_none_is_marked_as_the_best(directory, tmp_path):
    fake_runs.write(tmp_path / 'other', 40, data={'name': 'digits', 'validation': 'train'})
    table = compare.table(compare.read([directory / 'good', tmp_path / 'other']))
    assert not [cell for row in table['rows'] for cell in row[1:] if 'best' in cell]
    assert 'cannot be compared' in table['note'] and 'Bold' not in table['note']
    # A split may have grown since.
    data = directory / 'good' / 'data.json'
    (tmp_path / 'grown').mkdir()
    for path in (directory / 'good').iterdir():
        if path.is_file():
            (tmp_path / 'grown' / path.name).write_bytes(path.read_bytes())
    known = json.loads(data.read_text())
    known['examples']['test'] = 1000
    (tmp_path / 'grown' / 'data.json').write_text(json.dumps(known))
    table = compare.table(compare.read([directory / 'good', tmp_path / 'grown']))
    assert 'cannot be compared' in table['note']


def test_training_accuracy_is_of_the_last_epoch_and_the_gap_is_less_accuracy(directory):
    row = cells(compare.table(groups(directory, 'good')), 0)
    assert row['training accuracy']['mean'] == pytest.approx(1 - 0.1 / 40)
    assert row['gap']['mean'] == pytest.approx(1 - 0.1 / 40 - 356 / 360)


def test_what_no_run_has_is_no_column_and_what_one_lacks_is_a_dash(directory):
    both = compare.table(groups(directory, 'good', 'begun'))
    assert cells(both, 1)['run'] == 'begun (has not ended)'
    assert np.isnan(cells(both, 1)['accuracy']['mean'])
    assert 'accuracy' not in compare.table(groups(directory, 'begun'))['columns']
    assert 'peak memory' not in compare.costs(groups(directory, 'good'))['columns']
    assert '–' in compare.text(groups(directory, 'good', 'begun'))


def test_costs_are_those_of_the_run(directory):
    row = cells(compare.costs(groups(directory, 'good')), 0)
    found = {name: row[name]['mean'] for name in ('parameters', 'time', 'training images/s')}
    assert found == {'parameters': 53226, 'time': 4, 'training images/s': 1002.5}


def test_only_fields_that_differ_are_listed(directory):
    section = compare.config_differences(groups(directory, 'good', 'three', 'worse'))
    rows = {row[0]: row[1:] for row in section['rows']}
    assert rows == {
        'epochs': ['20.0', '20.0', '5.0'],
        'learning_rate': ['0.1', '0.003', '0.003'],
        'seeds': ['1', '3', '3'],
    }
    assert compare.config_differences(groups(directory, 'good', 'good')) is None


def test_single_runs_are_compared_by_mcnemar_and_seeds_by_paired_t(directory):
    read = groups(directory, 'good', 'bad', 'three', 'worse')
    section = significance.significance(read)
    rows = {(row[0], row[1]): row[2:] for row in section['rows']}
    assert len(rows) == 6
    difference, test, p, _ = rows['good', 'bad']
    wrong = [set(np.flatnonzero(~_right(group))) for group in read[:2]]
    only = len(wrong[1] - wrong[0]), len(wrong[0] - wrong[1])
    assert test == f'McNemar, {only[0]} to {only[1]}' and difference == pytest.approx(36 / 360)
    assert p == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    difference, test, p, _ = rows['three', 'worse']
    expected = stats.ttest_rel([20, 22, 30], [10, 14, 12])
    assert test == 'paired t, 3 seeds' and p == pytest.approx(expected.pvalue)
    assert difference['mean'] == pytest.approx(12 / 360)


def _right(group):
    logits, label = group.members[0].predictions
    return logits.argmax(1) == label


def test_runs_on_other_images_or_without_predictions_are_not_tested(directory, tmp_path):
    other = fake_runs.write(tmp_path / 'names', 3, names=list('abcdefghij'))
    old = fake_runs.write(tmp_path / 'old', 3)
    (old / 'predictions.npz').unlink()
    begun = directory / 'begun'
    for path in (other, old, begun):
        assert significance.significance(compare.read([directory / 'good', path])) is None


def test_of_many_runs_the_tests_against_the_best_are_shown_and_all_are_corrected_for(directory):
    read = groups(directory, 'bad', 'three', 'good', 'worse', 'bad', 'bad', 'bad')
    section = significance.significance(read)
    assert len(section['rows']) == 6 and {row[0] for row in section['rows']} == {'good'}
    assert 'the 21 tests of all pairs, of which those with the most accurate' in section['note']
    pairs = [significance.difference(a, b) for a, b in itertools.combinations(read, 2)]
    corrected = significance.holm([row[-1] for row in pairs])
    expected = [p for row, p in zip(pairs, corrected, strict=True) if 'good' in row[:2]]
    assert sorted(row[-1] for row in section['rows']) == pytest.approx(sorted(expected))


def test_equal_differences_of_few_seeds_are_not_certain(directory, tmp_path):
    better = fake_runs.write_group(tmp_path / 'better', [9, 13, 11])  # one mistake less, each
    [[*_, difference, _, p]] = significance.significance(
        compare.read([better, directory / 'three'])
    )['rows']
    assert p == pytest.approx(2 * stats.t.sf(np.sqrt(3), 2)) and difference['half'] > 1 / 360


def test_runs_are_tested_at_a_seed_that_both_have(directory, tmp_path):
    other = fake_runs.write(tmp_path / 'other', 40, seed=2)
    three = groups(directory, 'three')[0]
    found = significance.difference(three, compare.read([other])[0])
    right = [
        predictions.right(predictions.load(path / 'predictions.npz'))
        for path in (directory / 'three' / 'seed-2', other)
    ]
    assert found[-1] == intervals.mcnemar(*right)['p_value']


def test_holms_p_values_are_those_worked_out_by_hand():
    assert significance.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert significance.holm([0.5]) == [0.5] and significance.holm([0.9, 0.8]) == [1, 1]


def test_names_are_made_different(directory, tmp_path):
    twin = fake_runs.write(tmp_path / 'x' / 'good', 4)
    names = [group.name for group in compare.read([directory / 'good', twin, twin])]
    assert names == [f'{directory.name}/good', 'x/good (1)', 'x/good (2)']


def test_the_terminal_gets_no_control_characters(tmp_path):
    run = fake_runs.write(tmp_path / 'a\x1b[31m', 4)
    printed = compare.text(compare.read([run, run]))
    assert '\x1b' not in printed and 'a\\x1b[31m' in printed


def test_the_text_has_every_metric_within_the_width(directory):
    printed = compare.text(groups(directory, 'good', 'bad', 'three'), width=60)
    assert max(map(len, printed.split('\n'))) <= 60
    for words in ('98.89% (97.18 to 99.57) *', '53,226', 'learning_rate', 'McNemar'):
        assert words in printed


def test_json_is_plain(directory):
    plain = compare.as_json(groups(directory, 'good', 'three'))
    json.dumps(plain)
    assert plain['runs'][1]['seeds'] == [0, 1, 2]
    assert plain['runs'][0]['metrics']['top1']['mean'] == pytest.approx(356 / 360)
    assert plain['differences']['seeds'] == ['1', '3']


def test_a_directory_that_is_no_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match='not a run'):
        compare.read([tmp_path])
    with pytest.raises(UserError, match='nothing to compare'):
        compare.read([])
