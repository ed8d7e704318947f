import json

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC, LinearSVC

from jaxcls import baselines, datasets, fit, pipeline, predictions, workdir
from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.estimators import BASELINES


def resolved(model, **data):
    config = config_lib.get_config()
    config.data.update({'train': 'train[:300]', 'validation': 'test[:130]', **data})
    config.model = model
    return experiment_lib.resolve(config)


def arrays(split):
    images, label = pipeline.load_arrays(pipeline.Reader(datasets.load('digits', split)))
    return np.float32(images.reshape(len(images), -1)) / np.float32(255), label


def test_a_run_leaves_the_records_and_files_of_a_network(tmp_path):
    network = config_lib.get_config()
    network.update({'epochs': 0.1, 'data': {'train': 'train[:64]', 'validation': 'test[:20]'}})
    network.model = {'name': 'linear'}
    theirs = fit(network, tmp_path / 'network')
    events = []
    ours = baselines.fit(resolved({'name': 'knn'}), tmp_path / 'knn', events.append)

    assert [e['kind'] for e in events] == ['baseline', 'train', 'validation']
    assert events[0]['examples'] == 300 and events[0]['features'] == 64
    assert events[0]['estimator'].startswith('KNeighborsClassifier')
    assert workdir.read_metrics(tmp_path / 'knn') == ours.records == events[1:]
    assert type(ours) is type(theirs) and ours.metrics == ours.records[-1]
    for kind in ('train', 'validation'):
        network, baseline = (
            next(r for r in run.records if r['kind'] == kind) for run in (theirs, ours)
        )
        assert network.keys() == baseline.keys()
    names = {item.name for item in (tmp_path / 'network').iterdir()}
    missing = names - {item.name for item in (tmp_path / 'knn').iterdir()} - {'checkpoints'}
    assert all(name.startswith('events.out') for name in missing)
    result = json.loads((tmp_path / 'knn' / 'result.json').read_text())
    assert result['top1'] == ours.metrics['top1'] == np.trace(result['confusion']) / 130


def test_the_numbers_are_those_of_scikit_learn_on_the_same_arrays(tmp_path):
    result = baselines.fit(resolved({'name': 'knn', 'neighbors': 5}), tmp_path)
    (x, y), (test_x, test_y) = arrays('train[:300]'), arrays('test[:130]')
    plain = KNeighborsClassifier(5).fit(x, y)
    saved = predictions.load(tmp_path / 'predictions.npz')
    assert (saved.label == test_y).all() and saved.logits.dtype == np.float32
    assert (saved.logits.argmax(1) == plain.predict(test_x)).all()
    train, validation = result.records
    assert validation['top1'] == plain.score(test_x, test_y) and train['top1'] == plain.score(x, y)
    smooth = (5 * plain.predict_proba(test_x) + 0.1) / 6
    np.testing.assert_allclose(np.exp(saved.logits), smooth, rtol=1e-6)
    assert validation['loss'] == pytest.approx(reference.log_loss(test_y, smooth), rel=1e-5)
    macro = reference.f1_score(test_y, plain.predict(test_x), average='macro')
    assert validation['f1_macro'] == pytest.approx(macro)


@pytest.mark.parametrize('classes', [2, 3, 10])
@pytest.mark.parametrize('name', BASELINES)
def test_the_greatest_logit_is_what_the_estimator_predicts(name, classes):
    x, y = arrays('train[:300]')
    x = np.round(x[y < classes], 1)  # coarse, few and close: ties
    y = y[y < classes]
    trees = {'trees': 4} if name == 'random_forest' else {}
    classifier = BASELINES[name](**trees).classifier(0).fit(x[:40, 20:30], y[:40])
    votes = BASELINES[name](**trees).votes
    logits = baselines.class_logits(classifier, x[:, 20:30], classes, votes)
    assert logits.shape == (len(x), classes) and np.isfinite(logits).all()
    assert (logits.argmax(1) == classifier.predict(x[:, 20:30])).all()
    if hasattr(classifier, 'predict_proba'):
        np.testing.assert_allclose(np.exp(logits).sum(1), 1, rtol=1e-5)


def test_decision_values_are_kept_and_an_absent_class_comes_last():
    x, y = arrays('train[:300]')
    for classifier in (SVC(break_ties=True), LinearSVC()):
        classifier.fit(x[y < 3], 2 * y[y < 3])  # 0, 2 and 4 of 6 classes
        logits = baselines.class_logits(classifier, x, 6)
        np.testing.assert_allclose(logits[:, ::2], classifier.decision_function(x), rtol=1e-6)
        np.testing.assert_allclose(
            logits[:, 1::2], logits[:, ::2].min(1)[:, None].repeat(3, 1) - 1, rtol=1e-6
        )
        classifier.fit(x[y < 2], y[y < 2])
        logits = baselines.class_logits(classifier, x, 2)
        assert (logits[:, 0] == 0).all()
        np.testing.assert_allclose(logits[:, 1], classifier.decision_function(x), rtol=1e-6)
    neighbors = KNeighborsClassifier(3).fit(x[y < 3], 2 * y[y < 3])
    logits = baselines.class_logits(neighbors, x, 6, votes=3)
    np.testing.assert_allclose(np.exp(logits[:, 1::2]), 1 / 6 / 4, rtol=1e-6)


def test_rounding_to_float32_does_not_change_the_greatest():
    scores = np.array([[1.0, 1 + 1e-12, 0], [1 + 1e-12, 1.0, 0], [-1.0, -1 - 1e-12, -1 + 1e-12]])
    logits = baselines._rounded(scores)
    assert logits.dtype == np.float32 and (logits.argmax(1) == [1, 0, 2]).all()
    np.testing.assert_allclose(logits, scores, atol=1e-6)


@pytest.mark.parametrize('chunk', [1, 7, 130, 1000])
def test_neither_chunks_nor_other_images_change_a_prediction(tmp_path, monkeypatch, chunk):
    baseline = BASELINES['svm_rbf'](features='color_histogram')
    images, label = pipeline.load_arrays(pipeline.Reader(datasets.load('digits', 'train[:300]')))
    estimator = baseline.pipeline().fit(images, label)
    whole = baselines.predict(estimator, images[:130], 10)
    monkeypatch.setattr(baselines, '_CHUNK', chunk)
    np.testing.assert_allclose(baselines.predict(estimator, images[:130], 10), whole, atol=1e-6)


def test_of_a_large_training_split_a_part_is_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, '_TRAINING_SCORED', 50)
    result = baselines.fit(resolved({'name': 'knn', 'neighbors': 1}), tmp_path)
    train, validation = result.records
    assert train['examples'] == 50 and train['top1'] == 1 and validation['examples'] == 130


def test_a_finished_run_is_not_fitted_again_and_a_killed_one_is(tmp_path, monkeypatch):
    config = resolved({'name': 'logistic_regression', 'C': 0.01})

    class Killed(Exception):
        pass

    def kill(event):
        if event['kind'] == 'validation':
            raise Killed

    with pytest.raises(Killed):
        baselines.fit(config, tmp_path, kill)
    first = baselines.fit(config, tmp_path)
    monkeypatch.setattr(baselines, '_fit_and_score', None)
    again = baselines.fit(config, tmp_path)
    assert again == first and len(again.records) == 2
    with pytest.raises(UserError, match='model.C: 0.01 there, 0.1 now'):
        baselines.fit(resolved({'name': 'logistic_regression'}), tmp_path)


def test_the_seed_decides_what_is_random(tmp_path):
    def logits(name, seed):
        config = config_lib.get_config()
        config.update({'seed': seed, 'data': {'train': 'train[:200]', 'validation': 'test[:50]'}})
        config.model = {'name': 'random_forest', 'trees': 5}
        baselines.fit(experiment_lib.resolve(config), tmp_path / name)
        return predictions.load(tmp_path / name / 'predictions.npz').logits

    first, same, other = logits('a', 0), logits('b', 0), logits('c', 1)
    np.testing.assert_allclose(first, same, rtol=1e-6)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    ('fields', 'named'),
    [
        ({'augment': [{'name': 'flip'}]}, 'config.augment'),
        ({'epochs': 5.0, 'ema_decay': 0.9}, 'config.ema_decay, config.epochs'),
        ({'freeze': 'head'}, 'config.freeze'),
        ({'optimizer': {'name': 'adam', 'b1': 0.8}}, 'config.optimizer.b1'),
        ({'model': {'name': 'knn', 'init_from': 'x'}}, 'config.model.init_from'),
        ({'model': {'name': 'knn', 'new_head': True}}, 'config.model.new_head'),
        ({'data': {'pipeline': 'stream'}}, 'config.data.pipeline'),
        ({'data': {'crop': 'random_resized', 'image_size': 8}}, 'config.data.crop'),
    ],
)
def test_a_field_that_no_baseline_reads_is_refused(tmp_path, fields, named):
    config = config_lib.get_config()
    config.model = {'name': 'knn'}
    for section in ('model', 'optimizer'):
        config[section] = fields.pop(section, config[section])
    config.update(fields)
    with pytest.raises(UserError, match=f'has no use for {named}. Leave'):
        baselines.fit(experiment_lib.resolve(config), tmp_path / 'never')
    assert not (tmp_path / 'never').exists()


@pytest.mark.parametrize(
    ('model', 'data', 'message'),
    [
        ({'name': 'knn', 'neighbors': 301}, {}, 'n_neighbors'),
        ({'name': 'knn', 'features': 'pca', 'components': 65}, {}, 'n_components'),
        ({'name': 'svm_rbf'}, {'train': 'train[:1]'}, 'class'),
        ({'name': 'svm_rbf', 'C': 0.0}, {}, 'C is 0.0'),
    ],
)
def test_what_cannot_be_fitted_is_a_user_error(tmp_path, model, data, message):
    with pytest.raises(UserError, match=message):
        baselines.fit(resolved(model, **data), tmp_path)
