import json

import numpy as np
import pytest

import fake_runs
from jaxcls import predictions
from jaxcls.errors import UserError
from jaxcls.report import compare, gallery, run, runs
from test_page import Parser


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp('report')
    fake_runs.write(root / 'one', 4)
    fake_runs.write(root / 'two', 30, seed=1)
    fake_runs.write_group(root / 'seeds', [8, 12])
    return root


def titles(sections):
    return [section['title'] for section in sections]


def by_title(sections):
    return {section['title']: section for section in sections}


def test_the_report_of_runs_is_one_file_and_its_pictures(directory, tmp_path):
    path = runs.write([directory / 'one', directory / 'seeds'], tmp_path / 'out')
    assert path == tmp_path / 'out' / 'report.html'
    pngs = {p.name for p in path.parent.glob('*.png')}
    assert pngs == {'curves.png', 'generalisation.png'} | {
        f'{kind}-{name}.png' for kind in ('confusion', 'reliability') for name in ('one', 'seeds')
    }
    parsed = Parser(path.read_text())
    assert '2 runs on digits' in parsed.text and 'one is the most accurate' in parsed.text
    for title in (
        'Metrics',
        'Is the difference',
        'Differences of the configs',
        'By class',
        'Config',
    ):
        assert title in parsed.text
    assert '--config.seed=<b>' in parsed.text and not [e for e in parsed.elements if e[0] == 'b']


def test_names_of_classes_never_become_markup(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, '_write_pictures', lambda *args: None)
    bad = '</script><img src=x onerror=alert(1)>'
    names = [f'{bad}{i}' for i in range(10)]
    path = fake_runs.write(tmp_path / '<i>run', 20, names=names)
    parsed = Parser(runs.write([path], tmp_path / 'out').read_text())
    assert not {'i', 'b'} & {tag for tag, _ in parsed.elements}
    assert not [name for _, a in parsed.elements for name in a if name.startswith('on')]
    images = [a['src'] for tag, a in parsed.elements if tag == 'img']
    assert images and all(source.startswith('data:image/png;base64,') for source in images)
    assert parsed.text.count(bad) > 30


def test_the_headline_says_what_was_reached_and_whether_it_is_chance(directory, tmp_path):
    one, two, seeds = compare.read([directory / name for name in ('one', 'two', 'seeds')])
    assert runs.headline([one]) == (
        'lenet_small gets 98.89% of 360 test images right (95% interval 97.18% to 99.57%), '
        'after 4 s of training.'
    )
    assert 'over 2 seeds), after 4 s of training each' in runs.headline([seeds])
    both = runs.headline([two, one])
    assert (
        both.startswith('one is the most accurate') and 'a difference beyond chance (p = ' in both
    )
    # One of other data was no candidate, also where it gets more right.
    fake_runs.write(tmp_path / 'other', 0, data={'name': 'digits', 'validation': 'train'})
    other = compare.read([tmp_path / 'other'])
    of_other = runs.headline(other)
    assert of_other.startswith('lenet_small gets 100.00% of 360 train images right')
    assert (
        runs.headline([two, one, *other]) == f'On digits, test: {both} On digits, train: {of_other}'
    )
    assert 'allowing for 3 comparisons' in runs.headline([two, one, seeds])
    assert runs.headline([two, two]).endswith(f'of training. {two.name} gets as many.')


def test_a_run_that_has_not_ended_is_reported_as_far_as_it_came(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, '_write_pictures', lambda *args: None)
    path = fake_runs.write(tmp_path / 'begun', 0, ended=False)
    text = Parser(runs.write([path], tmp_path / 'out').read_text()).text
    assert 'No run has ended yet' in text and 'Curves' in text


def test_curves_are_means_with_bands_over_seeds(directory):
    groups = compare.read([directory / 'one', directory / 'seeds'])
    curves, generalisation = runs.curves(groups)
    loss, _ = curves['sections']
    found = {series['name']: series for series in loss['series']}
    assert list(found) == [f'{g} {k}' for g in ('one', 'seeds') for k in ('training', 'validation')]
    assert loss['y']['log'] is False and found['one training']['half'] is None
    seeds = found['seeds validation']
    np.testing.assert_allclose(seeds['y'], 1.05 / np.arange(1, 5) ** 2)
    np.testing.assert_allclose(seeds['half'], 12.706 * 0.05 / np.arange(1, 5) ** 2, rtol=1e-4)
    gap, rate = generalisation['sections']
    np.testing.assert_allclose(gap['series'][0]['y'], 0.01 / np.arange(1, 5))
    np.testing.assert_allclose(rate['series'][0]['y'], 0.1 / np.arange(1, 5))


def test_a_baseline_is_a_level_line_without_a_learning_rate(directory, tmp_path):
    baseline = fake_runs.write(tmp_path / 'knn', 9, epochs=1, model={'name': 'knn'})
    records = (baseline / 'metrics.jsonl').read_text().splitlines()[:2]
    (baseline / 'metrics.jsonl').write_text('\n'.join([*records, '']))
    curves, generalisation = runs.curves(compare.read([directory / 'one', baseline]))
    level = {series['name']: series for series in curves['sections'][1]['series']}
    assert level['knn validation']['x'] == [1, 4]
    assert level['knn validation']['y'] == pytest.approx([0.98, 0.98])
    assert [len(series['x']) for series in generalisation['sections'][1]['series']] == [4, 0]


def test_a_long_curve_is_averaged_to_few_points():
    class Member:
        def of_kind(self, kind):
            return [{'epoch': i / 100, 'loss': 5.0 if i % 2 else 1.0} for i in range(10_000)]

    curve = runs.curve(Member(), 'train', 'loss')
    assert len(curve) == 300 and max(curve) == 99.99
    np.testing.assert_allclose(list(curve.values()), 3, atol=0.1)


def test_seeds_share_a_confusion_matrix_and_a_reliability_diagram(directory):
    [group] = compare.read([directory / 'seeds'])
    parts = by_title(run.sections(group))
    assert np.sum(parts['Confusion matrix']['counts']) == 720
    assert '720 images, all 2 seeds together, 20 are wrong' in parts['Confusion matrix']['note']
    table = parts['By class']
    f1 = [member.result['per_class']['f1'][3] for member in group.members]
    cell = dict(zip(table['columns'], table['rows'][3], strict=True))['F1']
    assert cell['mean'] == pytest.approx(np.mean(f1)) and cell['n'] == 2
    shares = [s['y'] for s in parts['Calibration']['sections'][1]['series']]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1)
    assert parts['Most confident mistakes']['note'].startswith('Of seed 0.')


def test_older_results_without_newer_metrics_are_shown(tmp_path):
    path = fake_runs.write(tmp_path / 'old', 4)
    result = json.loads((path / 'result.json').read_text())
    kept = ('top1', 'top5', 'loss', 'confusion', 'examples', 'seconds', 'epoch', 'top1_interval')
    (path / 'result.json').write_text(json.dumps({key: result[key] for key in kept}))
    (path / 'predictions.npz').unlink()
    (path / 'environment.json').unlink()
    [group] = compare.read([path])
    parts = by_title(run.sections(group))
    assert 'Calibration' not in parts and len(parts['By class']['rows']) == 10
    assert 'Not shown' in parts['Most confident mistakes']['paragraphs'][0]
    runs.headline([group])


def test_mistakes_are_the_images_that_are_wrong_surest_first(directory):
    [group] = compare.read([directory / 'two'])
    shown = by_title(gallery.sections(group.members[0]))['Most confident mistakes']['images']
    assert len(shown) == 24 and shown[0]['pixels'].shape == (8, 8, 1)
    worst = predictions.mistakes(group.members[0].predictions, 1)[0]
    label = fake_runs.LABEL[worst]
    assert shown[0]['caption'].startswith(f'{label} (')
    assert f'\n→ {(label + 1) % 10} (' in shown[0]['caption']


@pytest.mark.parametrize('fields', [{'data.name': 'npz:/nowhere'}, {'data.validation': 'train'}])
def test_data_that_are_gone_or_others_are_said_to_be(directory, tmp_path, fields):
    path = fake_runs.write(tmp_path / 'run', 4)
    config = json.loads((path / 'config.json').read_text())
    for name, value in fields.items():
        section, field = name.split('.')
        config[section][field] = value
    (path / 'config.json').write_text(json.dumps(config))
    [group] = compare.read([path])
    found = by_title(gallery.sections(group.members[0]))
    assert found['Most confident mistakes']['paragraphs'][0].startswith('Not shown: ')
    assert 'no checkpoint' in found['First-layer filters']['paragraphs'][0]


def test_filters_are_of_the_first_layer():
    conv, dense = np.zeros((3, 3, 1, 70), np.float32), np.zeros((64, 10), np.float32)
    conv[1, 1, 0, 5], dense[9, 3] = -2, 0.5
    params = {
        'a_depthwise': {'kernel': np.ones((5, 5, 1, 4))},
        'conv1': {'conv': {'kernel': conv, 'bias': np.ones(70)}},
        'head': {'kernel': dense},
    }
    shown = gallery.filters(params, (8, 8, 1), fake_runs.NAMES)
    assert len(shown) == 64 and shown[5]['pixels'].shape == (3, 3, 1)
    assert shown[5]['pixels'][1, 1, 0] == 0 and shown[5]['pixels'][0, 0, 0] == 128
    templates = gallery.filters({'head': params['head']}, (8, 8, 1), fake_runs.NAMES)
    assert templates[3]['caption'] == '3' and templates[3]['pixels'][1, 1, 0] == 255
    assert 'No layer' in gallery.filters({'head': params['head']}, (9, 9, 1), fake_runs.NAMES)


def test_large_images_are_made_smaller_and_odd_channels_grey():
    assert gallery.fit(np.zeros((400, 200, 3), np.uint8)).shape == (192, 96, 3)
    assert gallery.fit(np.zeros((4, 4, 2), np.uint8)).shape == (4, 4, 1)


def test_a_directory_that_is_no_run_is_a_users_mistake(directory, tmp_path):
    with pytest.raises(UserError, match='not a run'):
        runs.write([tmp_path], tmp_path / 'out')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--out'):
        runs.write([directory / 'one'], tmp_path / 'file' / 'out')
