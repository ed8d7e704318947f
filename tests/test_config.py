import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxcls import config as config_lib
from jaxcls import experiment
from jaxcls.errors import UserError


def completed(**fields) -> ConfigDict:
    config = config_lib.get_config()
    config.augment = [{'name': 'pad_crop', 'padding': 2}]
    config.update(fields)
    config_lib.complete(config, experiment.TABLES)
    return config


def override(config, **fields):
    items = [(key.replace('__', '.'), value) for key, value in fields.items()]
    config_lib.apply_overrides(config, items, experiment.TABLES)
    return config


def test_the_default_config_is_valid_and_complete():
    config = completed()
    config_lib.validate(config)
    assert config.model.activation == 'relu'
    assert config.augment[0]['mode'] in ('constant', 'reflect')


@pytest.mark.parametrize('fields', [{}, {'augment': []}, {'data': {'classes': (2, 0, 1)}}])
def test_json_round_trip_is_exact(fields):
    config = completed(**fields)
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, again) == {}
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.data.mean, tuple) and isinstance(again.data.classes, tuple)
    config_lib.validate(again)


def test_overrides_keep_the_type_of_the_field():
    config = override(
        completed(),
        epochs='3',
        data__mean='(0.1, 0.2, 0.3)',
        data__std='[1, 1, 1]',
        data__classes='(0, 1, 2)',
        data__name='tfds:mnist',
        schedule__name='step',
        schedule__boundaries='(1, 2)',
        model__activation='tanh',
        batch_size='7',
    )
    assert config.epochs == 3.0 and isinstance(config.epochs, float)
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert config.data.std == (1.0, 1.0, 1.0)
    assert config.data.classes == (0, 1, 2) and set(map(type, config.data.classes)) == {int}
    assert config.schedule.boundaries == (1, 2)
    assert set(map(type, config.schedule.boundaries)) == {float}  # as of all but classes
    assert (config.data.name, config.model.activation, config.batch_size) == (
        'tfds:mnist',
        'tanh',
        7,
    )


def test_list_items_can_be_overridden():
    config = completed()
    config_lib.apply_overrides(config, [('augment[0].padding', '1')], experiment.TABLES)
    assert config.augment[0]['padding'] == 1


def test_the_augmentations_can_be_set_whole_and_renamed():
    config = completed()
    items = [('augment', "[{'name': 'flip'}, {'name': 'cutout'}]"), ('augment[1].name', 'pad_crop')]
    config_lib.apply_overrides(config, items, experiment.TABLES)
    assert [spec['name'] for spec in config.augment] == ['flip', 'pad_crop']
    assert config.augment[1]['padding'] == 4
    config_lib.apply_overrides(config, [('augment', '[]')], experiment.TABLES)
    assert config.augment == []


def test_a_new_name_starts_its_section_afresh_whatever_the_order():
    for order in ([0, 1], [1, 0]):
        config = completed(model={'name': 'mlp'})
        items = [('model.name', 'resnet20'), ('model.dropout', '0.25')]
        config_lib.apply_overrides(config, [items[i] for i in order], experiment.TABLES)
        assert config.model.name == 'resnet20' and config.model.dropout == 0.25
        assert 'hidden' not in config.model


@pytest.mark.parametrize(
    ('path', 'text', 'message'),
    [
        ('epochz', '1', "config has no field 'epochz'. Did you mean 'epochs'?"),
        (
            'model.activatoin',
            'relu',
            "config.model has no field 'activatoin'. Did you mean 'activation'?",
        ),
        ('model.name', 'resent20', "Unknown model 'resent20'. Did you mean 'resnet20'?"),
        ('epochs', 'ten', "config.epochs is 'ten', of type str; it must be of type float"),
        ('batch_size', '12.5', 'config.batch_size is 12.5, of type float; it must be of type int'),
        (
            'batch_size',
            'None',
            'config.batch_size is None, of type NoneType; it must be of type int',
        ),
        ('data', '{}', 'config.data is a group of fields'),
        ('augment', '3', 'config.augment is 3; it must be a list of dicts'),
        ('augment', "['flip']", "it must be a dict with a 'name'"),
        ('epochs', '{[]:1}', 'must be of type float'),
        ('epochs', '9' * 401, 'must be of type float'),
        ('augment[3].padding', '1', 'config.augment has items 0 to 0'),
        ('augment[0].pading', '1', "Did you mean 'padding'?"),
        ('data.mean', '0.5', 'it must be of type tuple'),
        ('data.mean', "('a',)", 'it must be of type float'),
        ('data.classes', '3', 'config.data.classes is 3, of type int; it must be of type tuple'),
        (
            'data.classes',
            '(0, 1.5)',
            'config.data.classes is 1.5, of type float; it must be of type int',
        ),
        (
            'data.classes',
            "('cat',)",
            "config.data.classes is 'cat', of type str; it must be of type int",
        ),
        ('', '1', "config has no field ''"),
    ],
)
def test_override_mistakes_are_one_message(path, text, message):
    with pytest.raises(UserError) as error:
        config_lib.apply_overrides(completed(), [(path, text)], experiment.TABLES)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('learning_rate', -0.1, 'config.learning_rate is -0.1; it must be more than 0'),
        ('learning_rate', math.nan, 'config.learning_rate is nan'),
        ('learning_rate', math.inf, 'config.learning_rate is inf'),
        ('epochs', 0.0, 'config.epochs is 0.0; it must be more than 0'),
        ('batch_size', 0, 'config.batch_size is 0; it must be at least 1'),
        ('seed', -1, 'config.seed is -1; it must be at least 0'),
        ('ema_decay', 1.0, 'config.ema_decay is 1.0'),
        ('precision', 'float16', "config.precision is 'float16'"),
        ('parameters', 'fdsp', "Did you mean 'fsdp'?"),
        ('warmup_epochs', 20.0, 'must be less than config.epochs'),
        ('accumulate_steps', 3, 'does not divide into config.accumulate_steps 3'),
        ('data.per_class', -1, 'config.data.per_class is -1; it must be at least 0'),
        (
            'data.classes',
            (3,),
            'config.data.classes is (3,); give () for all classes, or the indices',
        ),
        ('data.classes', (1, 2, 1), 'config.data.classes is (1, 2, 1)'),
        ('data.classes', (0, -1), 'config.data.classes is (0, -1)'),
        ('data.pipeline', 'steam', "Did you mean 'stream'?"),
        ('data.std', (0.0,), 'each more than 0'),
        ('data.std', (1.0, 1.0), 'give both one value'),
        ('data.crop', 'random_resized', 'set config.data.image_size'),
        ('early_stopping_epochs', 0.5, 'it would stop at once'),
    ],
)
def test_values_out_of_range_are_one_message(path, value, message):
    config = completed()
    *parents, last = path.split('.')
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    assert message in str(error.value)


def test_unknown_and_missing_fields_are_found():
    config = completed()
    config.learning_rat = 1.0
    with pytest.raises(UserError, match="no field 'learning_rat'. Did you mean 'learning_rate'?"):
        config_lib.validate(config)
    config = completed()
    del config.data.std
    with pytest.raises(UserError, match=r'config.data.std is missing'):
        config_lib.validate(config)


def test_classes_are_of_every_split_and_per_class_of_the_training_split():
    config = completed(data={'classes': (7, 2), 'per_class': 5})
    for part, count in (('train', 10), ('train[:100%]', 143 + 141), ('test', 36 + 36)):
        split = experiment.load_split(config, part)
        assert split.class_names == ('7', '2') and len(split.source) == count, part
    train = experiment.load_split(config, 'train').source.images
    config.seed = 1
    assert not np.array_equal(experiment.load_split(config, 'train').source.images, train)


def test_reserved_arguments_cannot_be_set():
    with pytest.raises(UserError, match='config.model.num_classes cannot be set'):
        completed(model={'name': 'mlp', 'num_classes': 3})


def test_differences_name_both_sides():
    old, new = completed(), completed()
    new.learning_rate = 0.5
    new.augment[0]['padding'] = 9
    assert config_lib.differences(old, new) == {
        'augment[0].padding': (2, 9),
        'learning_rate': (old.learning_rate, 0.5),
    }
    assert json.loads(config_lib.to_json(new))['learning_rate'] == 0.5


@pytest.mark.parametrize(
    ('epochs', 'examples', 'batch_size', 'steps'),
    [
        (1, 100, 10, 10),
        (1, 101, 10, 11),
        (0.5, 100, 10, 5),
        (2, 101, 10, 21),
        (1e-9, 100, 10, 1),
        (0.1 * 3, 100, 10, 3),
    ],
)
def test_epochs_to_steps(epochs, examples, batch_size, steps):
    assert config_lib.epoch_steps(epochs, examples, batch_size) == steps


def test_config_files_with_mistakes(tmp_path):
    with pytest.raises(UserError, match='No config file'):
        config_lib.load_file(tmp_path / 'none.py')
    path = tmp_path / 'bad.py'
    path.write_text('import nothing_of_that_name')
    with pytest.raises(UserError, match='ModuleNotFoundError'):
        config_lib.load_file(path)
    path.write_text('def get_config(): return {}')
    with pytest.raises(UserError, match='returned dict, not a ConfigDict'):
        config_lib.load_file(path)


def test_a_config_of_an_older_version_has_the_defaults_of_fields_it_lacks():
    old = json.loads(config_lib.to_json(config_lib.get_config()))
    del old['freeze'], old['data']['per_class']
    read = config_lib.from_json(json.dumps(old))
    assert config_lib.differences(config_lib.get_config(), read) == {}
    with pytest.raises(UserError, match='augment is missing'):
        config_lib.validate(config_lib.from_json('{"model": {"name": "mlp"}}'))
