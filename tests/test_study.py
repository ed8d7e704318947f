import json
from unittest import mock

import pytest

from jaxcls import config as config_lib
from jaxcls import study
from jaxcls.errors import UserError

FILE = """
from jaxcls import study

def get_study(data):
    config = study.base(data)
    config.epochs, config.seeds = 1.0, 2
    config.data.validation = 'test[:60]'
    return study.Study(
        question='Does the rate matter & how?',
        config=config,
        axes={
            'model': {
                'linear': {'model': {'name': 'linear'}},
                'knn': study.classical(name='knn'),
            },
            'images a class': {'5': {'data.per_class': 5}, '20': {'data.per_class': 20}},
        },
        measures={
            'accuracy': study.accuracy(),
            'loss': study.curve('loss', format='number', log_y=True),
            'members': study.Measure(lambda g: {n: [n] for n in range(len(g.members))}, x='n', group=True),
        },
    )
"""


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    path = tmp_path_factory.mktemp('study')
    (path / 'rate.py').write_text(FILE)
    loaded = study.load(str(path / 'rate.py'), 'digits')
    return path, loaded, study.run(loaded, path / 'out')


def test_a_study_answers_with_a_chart_for_each_measure_and_a_table(done):
    path, _, sections = done
    assert [(s['kind'], s['title']) for s in sections] == [
        ('chart', 'accuracy'),
        ('chart', 'loss: linear'),
        ('chart', 'loss: knn'),
        ('chart', 'members: linear'),
        ('chart', 'members: knn'),
        ('table', 'All settings'),
    ]
    accuracy, table = sections[0], sections[-1]
    assert [s['name'] for s in accuracy['series']] == ['linear', 'knn']
    assert accuracy['series'][0]['x'] == [5.0, 20.0]
    assert [row[:2] for row in table['rows']] == [
        ['linear', '5'], ['linear', '20'], ['knn', '5'], ['knn', '20'],
    ]  # fmt: skip
    cell = table['rows'][0][2]
    rows = json.loads((path / 'out/study.json').read_text())['rows']
    assert cell['mean'] == pytest.approx(sum(rows[0]['values']['accuracy']) / 2) and cell['n'] == 2
    assert sections[3]['series'][0]['x'] == [0, 1]


def test_a_study_leaves_a_page_and_pictures(done):
    path, _, _ = done
    html = (path / 'out/report.html').read_text()
    assert 'Does the rate matter &amp; how?' in html
    assert len(list((path / 'out').glob('chart-*.png'))) == 5


def test_a_study_that_is_complete_trains_nothing(done):
    path, loaded, sections = done
    events = []
    assert study.run(loaded, path / 'out', events.append) == sections
    assert {event['kind'] for event in events} == {'setting', 'complete', 'row'}


def test_tuning_chooses_by_its_own_split(tmp_path):
    config = study.base('digits')
    config.epochs, config.seeds, config.model = 1.0, 1, {'name': 'linear'}
    asked = study.Study(
        question='?',
        config=config,
        axes={'loss': {'cross-entropy': {}}},
        measures={'accuracy': study.accuracy()},
        tune={'learning_rate': {'cross-entropy': (1e-7, 0.01)}},
        tune_split=study.tune_split('digits'),
    )
    table = study.run(asked, tmp_path / 'out')[-1]
    assert table['columns'] == ['loss', 'learning_rate', 'accuracy', 'runs']
    assert table['rows'][0][1] == 0.01
    splits = {json.loads(p.read_text())['data']['validation']
              for p in tmp_path.glob('out/tuning/*/config.json')}  # fmt: skip
    assert splits == {'train[90%:]'}


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('activation', 'digits', "No study 'activation'. Did you mean 'activations'"),
        ('experiments/studies/activations.py', 'mnits', "Did you mean 'mnist'"),
    ],
)
def test_mistakes_are_user_errors(name, data, message):
    with pytest.raises(UserError, match=message):
        study.load(name, data)


def test_mistakes_in_a_study_are_user_errors(tmp_path):
    file = tmp_path / 'nothing.py'
    file.write_text('def get_study(data):\n    pass\n')
    with pytest.raises(UserError, match='returned NoneType'):
        study.load(str(file), 'digits')
    config = study.base('digits')
    axes = {'width': {'8': {'model.hidden': (8,)}, '16': {'model.hidden': (16,)}}}
    asked = study.Study('?', config, axes, {'accuracy': study.accuracy()})
    with pytest.raises(UserError, match="no 'modle'.*model"):
        study.settings(asked._replace(axes={'width': {'8': {'modle.hidden': (8,)}}}))
    with pytest.raises(UserError, match="named 'a, b, c'"):
        study.settings(
            asked._replace(axes={'x': {'a, b': {}, 'a': {}}, 'y': {'c': {}, 'b, c': {}}})
        )
    with pytest.raises(UserError, match='tunes learning_rate for 32'):
        study.run(asked._replace(tune={'learning_rate': {'32': (0.1,)}}), tmp_path / 'out')
    study.check_free(asked, ['epochs', 'model.norm'])
    for path in ('model.hidden', 'model'):
        with pytest.raises(UserError, match='the study varies config.model.hidden'):
            study.check_free(asked, [path])


def test_the_seconds_of_a_run_leave_out_where_no_image_was_learnt_from():
    config, speeds = config_lib.get_config(), {1.0: 50.0, 2.0: 0.0, 4.0: 100.0}  # by epoch
    config.data.train = 'train'
    records = [
        {'step': epoch, 'epoch': epoch, 'images_per_second': speed}
        for epoch, speed in speeds.items()
    ]
    member = mock.Mock(data={'examples': {'train': 100}}, config=config, of_kind=lambda _: records)
    assert study.training_seconds(member) == 100 / 50 + 200 / 100
