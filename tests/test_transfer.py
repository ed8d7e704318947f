"""Starting from trained weights: init_from, freezing, layer-wise rates, features, export."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import fit, optimizers, runs, schedules, sharding, transfer, weight_files, weights
from jaxcls.errors import UserError
from jaxcls.main import main

FIVE, OTHERS = (0, 1, 2, 3, 4), (5, 6, 7, 8)


def small(**fields):
    config = config_lib.get_config()
    config.update({'epochs': 1.0, 'batch_size': 32, 'learning_rate': 0.01})
    config.model = {
        'name': 'lenet_small',
        'filters': (4, 4),
        'hidden': (16,),
        **fields.pop('model', {}),
    }
    config.data.update({'classes': FIVE, 'train': 'train[:300]', 'validation': 'test[:100]'})
    config.data.update(fields.pop('data', {}))
    config.update(fields)
    return config


def arrays(state):
    tree = {'params': state.params, 'batch_stats': state.batch_stats}
    return weights.flatten(jax.device_get(tree))


def start_of(config):
    """The state of step 0 that a run of the config begins with, and what was reported."""
    config, events = experiment_lib.resolve(config), []
    split = experiment_lib.load_split(config, config.data.train)
    reader = experiment_lib.make_reader(config, split, train=True)
    built = experiment_lib.build(config, reader.shape, len(split.class_names), len(split.source))
    abstract = experiment_lib.abstract_state(built, sharding.make_mesh())
    start = runs.make_start(built, abstract, reader, events.append)
    return arrays(experiment_lib.initial_state(built, abstract, start)), events


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return fit(small(), tmp_path_factory.mktemp('source') / 'run')


def test_a_run_starts_from_another_runs_weights(source):
    found, (event,) = start_of(small(model={'init_from': str(source.workdir)}))
    assert event['fresh'] == []
    for path, array in found.items():
        np.testing.assert_array_equal(array, arrays(source.state)[path], err_msg=path)


@pytest.mark.parametrize(
    ('data', 'new_head'), [({'classes': OTHERS}, False), ({'classes': FIVE}, True)]
)
def test_a_new_head_starts_afresh_and_all_else_does_not(source, data, new_head):
    step = int(source.state.step)
    checkpoint = str(source.workdir / 'checkpoints' / str(step))
    config = small(model={'init_from': checkpoint, 'new_head': new_head}, data=data)
    found, (event,) = start_of(config)
    assert event['fresh'] == ['params/head/bias', 'params/head/kernel']
    assert found['params/head/kernel'].shape == (16, len(data['classes']))
    trained = arrays(source.state)
    assert not np.allclose(found['params/head/kernel'][:, :4], trained['params/head/kernel'][:, :4])
    for path in set(found) - set(event['fresh']):
        np.testing.assert_array_equal(found[path], trained[path], err_msg=path)


def test_weights_that_do_not_fit_are_listed_before_anything_is_made(source, tmp_path):
    config = small(model={'init_from': str(source.workdir), 'filters': (4, 6)})
    with pytest.raises(UserError, match=r'params/conv2/conv/kernel: model \[3, 3, 4, 6\], weights'):
        fit(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    with pytest.raises(UserError, match='No weights at'):
        fit(small(model={'init_from': str(tmp_path / 'none')}), tmp_path / 'run')


def test_other_normalisation_than_the_sources_is_said(source):
    config = small(model={'init_from': str(source.workdir)}, data={'mean': (0.1,)})
    with pytest.warns(UserWarning, match='was trained on images of mean'):
        start_of(config)


def test_a_linear_probe_changes_the_head_alone(source, tmp_path):
    model = {'init_from': str(source.workdir), 'norm': 'frozen_batch'}
    result = fit(small(model=model, freeze='^(?!head)', weight_decay=0.1), tmp_path / 'run')
    before, after = arrays(source.state), arrays(result.state)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {'params/head/kernel', 'params/head/bias'}
    # Adam's two moments of two leaves and counters: nothing for what is frozen.
    sizes = sum(leaf.size for leaf in jax.tree.leaves(result.state.opt_state) if leaf.ndim)
    assert sizes == 2 * (16 * 5 + 5)


def test_batch_statistics_alone_adapt_when_all_parameters_are_all_but_frozen(source, tmp_path):
    model = {'init_from': str(source.workdir)}
    config = small(model=model, freeze='^(?!head/bias)', learning_rate=1e-12)
    result = fit(config, tmp_path / 'run')
    before, after = arrays(source.state), arrays(result.state)
    moved = {path for path in before if not np.allclose(before[path], after[path], atol=1e-6)}
    assert moved == {path for path in before if path.startswith('batch_stats')}


@pytest.mark.parametrize('freeze', ['nothing', '.', '('])
def test_a_pattern_that_freezes_nothing_or_all_or_is_none_is_an_error(freeze, tmp_path):
    with pytest.raises(UserError, match='freezes all but the head'):
        fit(small(freeze=freeze), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_layer_decay_scales_each_layers_step():
    config = experiment_lib.resolve(
        small(layer_decay=0.5, optimizer={'name': 'sgd', 'momentum': 0.0})
    )
    built = experiment_lib.build(config, (8, 8, 1), 5, 100)
    shapes = jax.eval_shape(lambda: experiment_lib.init(built, 0)).params
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    updates, _ = jax.jit(lambda tree: built.tx.update(tree, built.tx.init(tree), tree))(ones)
    scales = {
        name: -np.unique(leaf) / 0.01
        for name, leaf in updates.items()
        for leaf in jax.tree.leaves(leaf)
    }
    expected = {'conv1': 0.125, 'conv2': 0.25, 'hidden1': 0.5, 'head': 1.0}
    assert {k: v.item() for k, v in scales.items()} == pytest.approx(expected, rel=1e-5)


def test_frozen_parameters_do_not_count_in_the_norm_that_is_clipped():
    rate = schedules.make_schedule(
        name='constant', learning_rate=1.0, total_steps=9, steps_per_epoch=9
    )
    fields = {'name': 'sgd', 'momentum': 0.0, 'schedule': rate, 'clip_norm': 1.0}
    params = {'a': np.zeros(4, np.float32), 'b': np.zeros(4, np.float32)}
    grads = {'a': np.full(4, 100, np.float32), 'b': np.full(4, 0.25, np.float32)}
    tx = optimizers.make_optimizer(**fields, freeze='^a')
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates['a'], 0)
    np.testing.assert_array_equal(updates['b'], -grads['b'])


@pytest.mark.parametrize(
    ('name', 'field'),
    [
        ('schedule_free_sgd', {'freeze': 'a'}),
        ('schedule_free_adamw', {'layer_decay': 0.5}),
        ('madgrad', {'layer_decay': 0.5}),
    ],
)
def test_methods_that_would_catch_up_refuse(name, field):
    rate = schedules.make_schedule(
        name='constant', learning_rate=1.0, total_steps=9, steps_per_epoch=9
    )
    with pytest.raises(UserError, match=f'{name!r} does not go with {next(iter(field))}'):
        optimizers.make_optimizer(name=name, schedule=rate, **field)


def test_embeddings_and_tokens_do_not_decay():
    params = {'position_embedding': np.ones((1, 5, 2)), 'head': {'kernel': np.ones((2, 2))}}
    assert optimizers.decay_mask(params) == {'position_embedding': False, 'head': {'kernel': True}}


def test_a_run_that_was_killed_in_its_first_save_still_starts_from_its_weights(source, tmp_path):
    config = small(model={'init_from': str(source.workdir)}, learning_rate=1e-12)
    (tmp_path / 'run' / 'checkpoints' / '5.orbax-checkpoint-tmp-0').mkdir(parents=True)
    resolved = config_lib.to_json(experiment_lib.resolve(config))
    (tmp_path / 'run' / 'config.json').write_text(resolved)
    events = []
    state = fit(config, tmp_path / 'run', events.append).state
    assert [event for event in events if event['kind'] == 'begin']
    kernel = arrays(source.state)['params/head/kernel']
    np.testing.assert_allclose(state.params['head']['kernel'], kernel, atol=1e-8)


def test_a_run_goes_on_without_what_it_started_from(source, tmp_path):
    moved = tmp_path / 'source'
    shutil.copytree(source.workdir, moved)
    config = small(model={'init_from': str(moved)}, checkpoint_every_epochs=0.3)

    class Stop(Exception):
        pass

    def stop(event):
        if event['kind'] == 'checkpoint':
            raise Stop

    with pytest.raises(Stop):
        fit(config, tmp_path / 'run', stop)
    shutil.rmtree(moved)
    events = []
    resumed = fit(config, tmp_path / 'run', events.append)
    assert not [event for event in events if event['kind'] == 'begin']
    assert int(resumed.state.step) == int(source.state.step)


def test_a_model_that_starts_from_data_is_given_them_as_it_sees_them():
    model = {'name': 'dbn', 'hidden': (16, 8), 'pretrain_epochs': 2, 'pretrain_batch_size': 50}
    config = small(data={'mean': (0.0,), 'std': (1.0,)})
    config.model = model
    found, events = start_of(config)
    assert [(e['layer'], e['epoch']) for e in events] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    config.model = {**model, 'pretrain_epochs': 0}
    plain, _ = start_of(config)
    changed = {path for path in found if not np.array_equal(found[path], plain[path])}
    assert changed == {
        f'params/hidden{i}/dense/{leaf}' for i in (1, 2) for leaf in ('kernel', 'bias')
    }
    config = small()
    config.model = model
    with pytest.raises(UserError, match=r'must be within \[0, 1\] for an RBM'):
        start_of(config)


# Features and files


def test_few_shot_on_classes_that_the_run_has_not_seen_beats_chance(source, capsys):
    result = transfer.few_shot(source.workdir, [2, 20], 3, [('data.classes', str(OTHERS))])
    assert result['classes'] == ['5', '6', '7', '8']
    few, many = result['shots']
    assert 0.3 < few['top1'] < many['top1'] <= 1 and few['half_width'] > 0
    assert len(set(few['draws'])) > 1
    assert main(['few-shot', str(source.workdir), '--shots', '20', '--seeds', '1']) == 0
    assert '20 examples a class: accuracy' in capsys.readouterr().out


def test_few_shot_draws_from_the_training_images_alone(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'photos' / name / f'{i}.png')
    photos = {'name': f'folder:{tmp_path / "photos"}', 'classes': (), 'image_size': 8}
    config = small(data={**photos, 'train': 'train', 'validation': 'test'}, batch_size=8)
    config = experiment_lib.resolve(config)
    opened = SimpleNamespace(experiment=SimpleNamespace(config=config))
    monkeypatch.setattr(runs, 'open_run', lambda *_: opened)
    seen = []

    def features(_run, _config, split):
        seen.append({str(path) for path in split.source.paths})
        labels = split.source.labels
        return rng.standard_normal((len(labels), 4)) + labels[:, None], labels

    monkeypatch.setattr(transfer, 'extract', features)
    transfer.few_shot(tmp_path / 'run', [2, 5], 2)
    train, test = seen
    assert train and test and not train & test
    # Another seed draws others, and what the run has not seen stays apart.
    transfer.few_shot(tmp_path / 'run', [2, 5], 2, [('seed', '7')])
    assert seen[3] == test and seen[2] != train and not seen[2] & test


def test_few_shot_takes_fields_of_the_data_alone(source, capsys):
    assert main(['few-shot', str(source.workdir), '--config.learning_rate=7']) == 2
    assert 'the network is trained already' in capsys.readouterr().err
    assert main(['few-shot', str(source.workdir), '--shots', '9999']) == 2
    assert '9,999 examples a class' in capsys.readouterr().err
    wrong = ['--config.data.mean=(0.1,0.2,0.3)', '--config.data.std=(1,1,1)']
    assert main(['few-shot', str(source.workdir), *wrong]) == 2
    assert 'Traceback' not in capsys.readouterr().err


def test_features_are_those_that_the_head_reads(source):
    run = runs.open_run(source.workdir)
    config = run.experiment.config
    split = experiment_lib.load_split(config, config.data.validation)
    features, labels = transfer.extract(run, config, split)
    head = run.variables['params']['head']
    top = (features @ np.asarray(head['kernel']) + np.asarray(head['bias'])).argmax(1)
    assert (top == labels).mean() == pytest.approx(source.metrics['top1'])


def test_exported_weights_start_a_run_bit_for_bit(source, tmp_path, capsys):
    file = tmp_path / 'weights.safetensors'
    assert main(['export-weights', str(source.workdir), str(file)]) == 0
    assert 'in the names of jaxcls' in capsys.readouterr().out
    found = weight_files.read(file)
    assert found.normalization == ((0.5,), (0.5,))
    found = found.state
    own = arrays(source.state)
    assert set(found) == set(own)
    for path, array in own.items():
        np.testing.assert_array_equal(found[path].read(), array)
    again, _ = start_of(small(model={'init_from': str(file)}))
    jax.tree.map(np.testing.assert_array_equal, again, own)
    assert main(['export-weights', str(source.workdir), str(file)]) == 2
    assert 'nothing is overwritten' in capsys.readouterr().err


VIT = {'name': 'vit_ti16', 'patch_size': 2, 'depth': 1, 'width': 8, 'heads': 2, 'pooling': 'mean'}


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    config = small(ema_decay=0.9)
    config.model = VIT
    return fit(config, tmp_path_factory.mktemp('vit') / 'run')


def test_the_moving_average_is_what_is_exported(vit, tmp_path):
    transfer.export_weights(vit.workdir, tmp_path / 'a.safetensors')
    found = weight_files.read(tmp_path / 'a.safetensors').state['params/head/kernel'].read()
    np.testing.assert_array_equal(found, vit.state.ema['head']['kernel'])
    assert not np.array_equal(found, vit.state.params['head']['kernel'])


def test_an_export_that_cannot_be_written_or_computes_something_else_says_so(vit, tmp_path):
    with pytest.warns(UserWarning, match=r"built with pooling='mean' \('token' as published\)"):
        transfer.export_weights(vit.workdir, tmp_path / 'a.safetensors', 'timm')
    with pytest.raises(UserError, match='cannot be written'):
        transfer.export_weights(vit.workdir, tmp_path / 'none' / 'a.safetensors')
    with pytest.raises(UserError, match="Unknown naming scheme 'pytorch'.*torchvision"):
        transfer.export_weights(vit.workdir, tmp_path / 'b.safetensors', 'pytorch')
    assert not (tmp_path / 'b.safetensors').exists()


def test_a_vit_starts_at_another_size_of_images(vit):
    config = small(data={'image_size': 12})
    config.model = {**VIT, 'init_from': str(vit.workdir)}
    found, (event,) = start_of(config)
    assert found['params/position_embedding'].shape == (1, 37, 8) and event['fresh'] == []


def test_a_head_for_as_many_other_classes_is_warned_of(source, tmp_path):
    others = small(model={'init_from': str(source.workdir)}, data={'classes': (5, 6, 7, 8, 9)})
    with pytest.warns(
        UserWarning, match=r'is for the classes 0, 1, 2, 3, 4, and the data have 5, 6'
    ):
        runs.open_weights(others)


def test_weights_are_evaluated_without_a_run(source, tmp_path, capsys):
    file = tmp_path / 'weights.safetensors'
    transfer.export_weights(source.workdir, file)
    fields = ['--config.model.filters=(4,4)', '--config.model.hidden=(16,)']
    fields += [f'--config.data.classes={FIVE}', '--config.data.validation=test[:100]']
    assert main(['evaluate', '--json', *fields, f'--config.model.init_from={file}']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['top1'] == pytest.approx(source.metrics['top1']) and result['step'] == 0
    fields[2] = f'--config.data.classes={OTHERS}'
    assert main(['evaluate', *fields, f'--config.model.init_from={file}']) == 2
    assert 'no head for the 4 classes' in capsys.readouterr().err
    assert main(['evaluate']) == 2
    assert 'nothing to evaluate' in capsys.readouterr().err
    assert main(['evaluate', str(source.workdir), '--config.seed=1']) == 2
    assert 'has its own config' in capsys.readouterr().err


def test_the_list_of_models_has_the_published_sizes(capsys):
    assert main(['models', 'resnet20']) == 0
    assert '269,722' in capsys.readouterr().out
    assert main(['models', 'lenet*', '--json']) == 0
    rows = {row['model']: row for row in json.loads(capsys.readouterr().out)['models']}
    # 5 x 5 x 1 x 6 x 28 x 28 + 5 x 5 x 6 x 16 x 10 x 10 + 400 x 120 + 120 x 84 + 84 x 10
    assert rows['lenet5']['flops'] == 2 * (117_600 + 240_000 + 48_000 + 10_080 + 840)
    assert main(['models', 'resnt']) == 2
    assert 'Did you mean' in capsys.readouterr().err
