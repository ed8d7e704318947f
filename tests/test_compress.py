"""`jaxcls compress`: methods as text, runs that train, and the table that they end in."""

import io
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxcls import compress, evaluate, fit, footprint, main, pruning, runs, workdir
from jaxcls import config as config_lib
from jaxcls.errors import UserError

pytest.importorskip('qwix')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    config = config_lib.get_config()
    config.update({'epochs': 8.0, 'model': {'name': 'mlp', 'hidden': (24,)}, 'learning_rate': 0.01})
    config.data.update({'train': 'train[:800]'})
    return fit(config, tmp_path_factory.mktemp('compress') / 'run').workdir


@pytest.fixture(scope='module')
def found(run, tmp_path_factory):
    """The command's JSON, and the directory of its runs."""
    out = tmp_path_factory.mktemp('out')
    methods = ['magnitude:0.8', 'channels:0.5', 'channels:0.5+int8']
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.stdout', text)
        status = main.main(
            ['compress', str(run), '--json', '--epochs=3', '--distill', '--rounds=2', f'--out={out}/runs',
             f'--picture={out}/table.png', '--config.batch_size=40', '--methods', *methods]
        )  # fmt: skip
    assert status == 0
    return json.loads(text.getvalue()), out


def test_the_table_has_a_row_for_the_original_and_each_method(run, found):
    result, out = found
    rows = {row['method']: row for row in result['rows']}
    assert list(rows) == ['original', 'magnitude:0.8', 'channels:0.5', 'channels:0.5+int8']
    original = rows['original']
    assert original['parameters'] == 64 * 24 + 24 + 24 * 10 + 10
    assert original['bytes'] == 4 * original['parameters'] and original['smaller'] == 1
    assert original['flops'] == 2 * (64 * 24 + 24 * 10)
    assert original['top1'] == evaluate(run)['top1'] > 0.8
    assert original['latency']['64']['ratio'] == 1 and original['difference'] == 0
    assert rows['channels:0.5']['parameters'] == 64 * 12 + 12 + 12 * 10 + 10
    assert rows['channels:0.5']['flops'] == original['flops'] / 2
    assert rows['channels:0.5+int8']['bytes'] == 64 * 12 + 12 * 10 + 4 * (2 * 12 + 2 * 10)
    # Some weights become 0, and scales are no parameters.
    assert rows['channels:0.5+int8']['parameters'] <= rows['channels:0.5']['parameters']
    assert rows['channels:0.5+int8']['smaller'] > 3  # a zip's own bytes count here
    assert abs(rows['channels:0.5+int8']['top1'] - rows['channels:0.5']['top1']) < 0.02
    for name in ('magnitude:0.8', 'channels:0.5'):
        assert rows[name]['top1'] > 0.75 and rows[name]['top1'] >= rows[name]['top1_before']
    assert (out / 'table.png').stat().st_size > 10_000


def test_what_was_trained_are_runs_for_every_other_command(found):
    result, _ = found
    for row in result['rows']:
        if row['method'] in ('magnitude:0.8', 'channels:0.5'):
            assert evaluate(row['workdir'])['top1'] == row['top1']
    rows = {row['method']: row for row in result['rows']}
    config = workdir.read_config(Path(rows['channels:0.5']['workdir']))
    assert (
        config.model.hidden == (12,) and config.teacher.name == 'logits' and config.batch_size == 40
    )
    sparse = runs.open_run(rows['magnitude:0.8']['workdir'])
    assert rows['magnitude:0.8']['parameters'] == pruning.density(sparse.variables['params'])[0]
    assert rows['magnitude:0.8']['parameters'] <= 1810 - round(0.8 * 1776)


def test_a_second_call_goes_on_with_the_runs_and_another_run_is_not_taken_for_it(
    run, found, tmp_path
):
    result, out = found
    events = []
    more = {
        'epochs': 3.0,
        'out': out / 'runs',
        'distill': True,
        'rounds': 1,
        'on_event': events.append,
    }
    overrides = [('batch_size', '40')]
    again = compress.compress(run, ['channels:0.5'], overrides=overrides, **more)
    assert again['rows'][1]['top1'] == result['rows'][2]['top1']
    assert not any(event['kind'] == 'train' for event in events)
    with pytest.raises(UserError, match='batch_size'):
        compress.compress(run, ['channels:0.5'], **more)


@pytest.mark.parametrize('path', ['model.name', 'model', 'epochs', 'pruning.share', 'teacher.name'])
def test_what_the_methods_set_cannot_be_overridden(run, path, tmp_path):
    with pytest.raises(UserError, match=f'config.{path} cannot be set'):
        compress.compress(
            run, ['channels:0.5'], epochs=1.0, out=tmp_path / 'out', overrides=[(path, '1')]
        )
    assert not (tmp_path / 'out').exists()


def test_without_epochs_nothing_is_written(run, tmp_path):
    made = compress.compress(
        run, ['low_rank:0.8', 'magnitude:0.5+int8'], out=tmp_path / 'runs', rounds=1
    )
    assert not (tmp_path / 'runs').exists() and made['rows'][1]['workdir'] is None
    assert made['rows'][1]['flops'] < made['rows'][0]['flops']
    assert 'magnitude:0.5+int8' in footprint.text(made)


def test_sizes_are_those_of_the_arrays_and_of_a_zip():
    arrays = {'a': np.zeros((100, 100), np.float32), 'b': np.ones(7, np.int8)}
    raw, deflated = footprint.sizes(arrays)
    assert raw == 40_007 and deflated < 1000
    file = io.BytesIO()
    np.savez_compressed(file, **{'0': arrays['a'], '1': arrays['b']})
    assert zipfile.ZipFile(file).infolist() and abs(deflated - len(file.getvalue())) < 64
    assert jax.tree.leaves(arrays)[0].nbytes == 40_000


@pytest.mark.parametrize(
    ('method', 'message'),
    [
        ('magnitud:0.5', "Unknown method 'magnitud'. Did you mean 'magnitude'"),
        ('magnitude', 'must be magnitude:0.5, with the share of weights to set to zero'),
        ('channels:1.5', 'must be channels:0.5'),
        ('int8:0.5', 'must be int8'),
        ('int8+channels:0.5', 'channels come first'),
        ('int8+low_rank:0.5', 'do not go together'),
        ('int8_trained', 'int8_trained trains: give --epochs'),
    ],
)
def test_methods_that_are_none_are_found_first(method, message):
    with pytest.raises(UserError, match=message):
        compress.compress('nowhere', [method])


def test_steps_are_read_in_order():
    plan = compress.parse('channels:0.25+magnitude:0.5+int8')
    assert [name for name, _ in plan] == ['channels', 'magnitude', 'int8']
    assert compress._text(plan) == 'channels:0.25+magnitude:0.5+int8'


def test_int8_that_trains_keeps_the_zeros_of_the_step_before(run):
    opened = runs.open_run(run)
    work = compress._Work(opened, None, run, 1.0, (), '', print)
    sections = compress._sections(work, compress.parse('magnitude:0.5+int8_trained', 1.0))
    assert sections['quantization'] == {'name': 'int8'} and sections['teacher'] == {'name': 'none'}
    assert (sections['pruning']['sparsity'], sections['pruning']['end']) == (0.5, 0.0)
    ramp = compress._sections(work, compress.parse('magnitude:0.5', 1.0))
    assert ramp['quantization'] == {'name': 'none'} and ramp['pruning']['end'] == 0.5
