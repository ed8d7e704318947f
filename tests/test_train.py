import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import evaluate, fingerprints, fit, loop, pipeline, sharding, workdir
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError

pytestmark = pytest.mark.usefixtures('optimized')


def small(**fields):
    config = config_lib.get_config()
    config.update(
        {
            'epochs': 2.0,
            'batch_size': 16,
            'log_every_steps': 3,
            'learning_rate': 0.02,
            'model': {'name': 'mlp', 'hidden': (32,), 'norm': 'batch', 'dropout': 0.1},
            'data': {'train': 'train[:100]', 'validation': 'test[:50]'},
            'augment': [{'name': 'pad_crop', 'padding': 1}],
            'ema_decay': 0.9,
        }
    )
    for section in ('model', 'optimizer'):
        config[section] = fields.pop(section, config[section])
    config.update(fields)
    return config


def log(path):
    """The metrics without what the clock says."""
    timed = ('seconds', 'images_per_second')
    return [{k: v for k, v in r.items() if k not in timed} for r in workdir.read_metrics(path)]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, pictures):
    with pictures():
        return fit(small(), tmp_path_factory.mktemp('run'))


def test_a_run_leaves_its_files_and_learns(uninterrupted):
    path = uninterrupted.workdir
    names = {item.name for item in path.iterdir()}
    assert {
        'config.json', 'environment.json', 'data.json', 'metrics.jsonl', 'result.json',
        'curves.png', 'confusion.png', 'checkpoints',
    } <= names  # fmt: skip
    assert any(name.startswith('events.out.tfevents') for name in names)
    assert uninterrupted.stopped == 'done' and int(uninterrupted.state.step) == 13
    records = uninterrupted.records
    assert [r['step'] for r in records if r['kind'] == 'train'] == [3, 6, 7, 9, 12, 13]
    assert [r['step'] for r in records if r['kind'] == 'validation'] == [7, 13]
    train_losses = [r['loss'] for r in records if r['kind'] == 'train']
    assert train_losses[-2] < 0.9 * train_losses[0]
    assert sum(r['examples'] for r in records if r['kind'] == 'train') == 13 * 16
    result = json.loads((path / 'result.json').read_text())
    assert np.trace(result['confusion']) == round(result['top1'] * 50)


class Stop(Exception):
    pass


@pytest.mark.parametrize('pipeline', ['resident', 'stream'])
def test_a_run_broken_off_at_any_step_resumes_bit_for_bit(uninterrupted, tmp_path, pipeline):
    config = small(checkpoint_every_epochs=0.16)  # every step
    config.data.pipeline = pipeline

    def stop_at(steps):
        def on_event(event):
            if event['kind'] == 'checkpoint' and event['step'] in steps:
                raise Stop

        return on_event

    for step in (1, 5, 7, 8):
        with pytest.raises(Stop):
            fit(config, tmp_path, stop_at({step}))
    result = fit(config, tmp_path)
    assert log(tmp_path) == log(uninterrupted.workdir)
    assert fingerprints.manifest(result.state) == fingerprints.manifest(uninterrupted.state)


def test_a_signal_saves_the_step_and_the_run_goes_on(uninterrupted, tmp_path):
    def interrupt(event):
        if event['kind'] == 'progress' and event['step'] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    result = fit(small(), tmp_path, interrupt)
    assert result.stopped == 'SIGTERM'
    assert int(result.state.step) in (4, 5)
    assert fit(small(), tmp_path).stopped == 'done'
    assert log(tmp_path) == log(uninterrupted.workdir)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_complete_run_is_left_as_it_is(uninterrupted):
    before = log(uninterrupted.workdir)
    result = fit(small(), uninterrupted.workdir)
    assert fingerprints.manifest(result.state) == fingerprints.manifest(uninterrupted.state)
    assert log(uninterrupted.workdir) == before


def test_another_config_on_the_same_directory_is_refused(uninterrupted):
    with pytest.raises(UserError, match='learning_rate: 0.02 there, 0.1 now'):
        fit(small(learning_rate=0.1), uninterrupted.workdir)


def test_evaluate_gives_the_numbers_of_the_run_whatever_the_split(uninterrupted):
    metrics = evaluate(uninterrupted.workdir)
    for name in ('top1', 'top5', 'loss'):
        assert metrics[name] == pytest.approx(uninterrupted.metrics[name], rel=1e-5)
    assert metrics['examples'] == 50 and metrics['step'] == 13
    part = evaluate(uninterrupted.workdir, 'test[:33]')
    assert part['examples'] == 33 and np.sum(part['confusion']) == 33


def test_early_stopping_ends_a_run_that_does_not_improve(tmp_path):
    config = small(
        epochs=50.0, learning_rate=1e-9, early_stopping_epochs=2.0, augment=[],
        model={'name': 'linear'}, ema_decay=0.0, optimizer={'name': 'sgd'},
    )  # fmt: skip
    result = fit(config, tmp_path)
    assert result.stopped == 'early' and result.metrics['epoch'] < 25
    assert fit(config, tmp_path).stopped == 'early'


def test_a_patience_beyond_the_end_is_never_at_an_end(tmp_path):
    assert fit(small(epochs=0.5, early_stopping_epochs=1e9), tmp_path).stopped == 'done'


def test_non_finite_steps_in_a_row_stop_the_run_and_keep_the_checkpoint(tmp_path):
    config = small(learning_rate=1e30, optimizer={'name': 'sgd'}, max_bad_steps=3, epochs=20.0)
    config.model = {'name': 'mlp', 'hidden': (8,)}
    config.ema_decay = 0.0
    with pytest.raises(UserError, match=r'not been finite in the last \d+ steps, since step \d+'):
        fit(config, tmp_path)


def test_mistakes_are_found_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'make_advance', None)
    monkeypatch.setattr(sharding, 'make_mesh', lambda: sharding.Mesh(
        np.array(jax.devices()), ('data',)))  # fmt: skip
    for fields, message in (
        ({'batch_size': 12}, 'choose a multiple of 8, such as 16'),
        ({'model': {'name': 'resent20'}}, "Did you mean 'resnet20'"),
        ({'data': {'train': 'trian'}}, 'trian'),
        ({'data': {'mean': (0.5, 0.5, 0.5), 'std': (1.0, 1.0, 1.0)}}, 'channel'),
    ):
        with pytest.raises(UserError, match=message):
            fit(small(**fields), tmp_path / 'never')
    assert not (tmp_path / 'never').exists()


@pytest.mark.parametrize(
    ('examples', 'batch_size', 'epochs', 'every', 'count'),
    [
        (1437, 64, 20, 0.1, 200),
        (1000, 64, 300, 1.0, 300),
        (1437, 64, 20, 0.01, 450),
        (100, 64, 3, 7.0, 1),
    ],
)
def test_events_fall_due_to_the_end_of_the_run(examples, batch_size, epochs, every, count):
    config = small(epochs=float(epochs), batch_size=batch_size, validate_every_epochs=every)
    experiment = experiment_lib.build(experiment_lib.resolve(config), (8, 8, 1), 10, examples)
    feed = pipeline.Feed((), None, None)
    events = loop.Events.of(experiment, feed)
    assert len(events.validate) == count and experiment.total_steps in events.validate
    steps = sorted(events.validate)
    gaps = set(np.diff(steps).tolist())
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert events.steps_per_call == 1


def test_a_pause_changes_no_call():
    events = loop.Events(frozenset({30}), frozenset(), frozenset(), [30, 60], steps_per_call=10)
    calls, zeros = [], lambda: None

    def advance(step, count, state, totals):
        calls.append((step, count))
        return state, totals

    nothing = loop.Hooks(*[lambda *args: None] * 5)
    ends = []
    for step, until in ((0, 25), (30, 60)):
        _, stopped = loop.drive((None, None), step, until, events, advance, zeros, nothing)
        ends.append(stopped)
    assert calls == [(step, 10) for step in range(0, 60, 10)] and ends == ['paused', 'done']


def test_data_that_changed_under_a_run_are_refused(tmp_path):
    rng = np.random.default_rng(0)

    def write(classes):
        label = np.arange(48) % classes
        images = rng.integers(0, 256, (48, 6, 6), np.uint8)
        np.savez(tmp_path / 'd.npz', x_train=images, y_train=label, x_test=images, y_test=label)

    config = small(epochs=1.0)
    config.data.update({'name': f'npz:{tmp_path}/d.npz', 'train': 'train', 'validation': 'test'})
    write(3)
    fit(config, tmp_path / 'run')
    write(4)
    for _ in range(2):
        with pytest.raises(UserError, match='no longer the one'):
            fit(config, tmp_path / 'run')
    with pytest.raises(UserError, match=r'4 \(0, 1, 2, 3\); the run was trained on 3'):
        evaluate(tmp_path / 'run')
    write(3)
    assert fit(config, tmp_path / 'run').stopped == 'done'


def test_evaluation_takes_any_number_of_devices(uninterrupted, monkeypatch):
    monkeypatch.setattr(
        sharding, 'make_mesh', lambda: sharding.Mesh(np.array(jax.devices()[:3]), ('data',))
    )
    metrics = evaluate(uninterrupted.workdir)
    assert metrics['top1'] == uninterrupted.metrics['top1'] and metrics['examples'] == 50


def test_fit_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(small(epochs=0.2), tmp_path)))
    thread.start()
    thread.join()
    assert results[0].stopped == 'done'


def test_many_steps_a_call_change_neither_events_nor_results(uninterrupted, tmp_path):
    fit(small(steps_per_call=3), tmp_path)
    for one, many in zip(log(uninterrupted.workdir), log(tmp_path), strict=True):
        assert one.keys() == many.keys() and one['step'] == many['step']
        assert one['loss'] == pytest.approx(many['loss'], rel=1e-4)
