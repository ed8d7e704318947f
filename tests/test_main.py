"""The commands; the mistakes that they refuse are in `faults/mistakes.py`."""

import errno
import json
import os
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from jaxcls import UserError, errors, evaluation, main, predict, workdir

TRAIN = [
    '--config.epochs=3', '--config.model.name=mlp', '--config.model.hidden=(16,)',
    '--config.learning_rate=0.01',
]  # fmt: skip


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('command') / 'run'
    assert main.main([f'--workdir={path}', *TRAIN]) == 0
    return path


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


def json_of(capsys, *argv):
    assert main.main([str(word) for word in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_prints_plain_lines_and_a_result_when_piped(tmp_path, capsys):
    assert main.main(['train', f'--workdir={tmp_path}/run', *TRAIN]) == 0
    out = capsys.readouterr().out
    assert 'mlp (1,210 parameters) on digits: 1,437 images 8x8x1, 10 classes' in out
    assert 'validation accuracy' in out and '95% interval' in out
    assert '\x1b' not in out
    assert main.main(['train', f'--workdir={tmp_path}/run', *TRAIN]) == 0
    assert 'is complete' in capsys.readouterr().out


def test_too_little_memory_is_told_in_one_message(tmp_path, capsys):
    huge = '--config.model.hidden=(10000000,10000000)'  # 400 TB, more than can be addressed
    assert main.main(['train', f'--workdir={tmp_path}/run', *TRAIN, huge]) == 2
    message = capsys.readouterr().err
    assert message.startswith('jaxcls: There is too little memory: ')
    assert 'Out of memory allocating 400' in message and 'a smaller batch_size' in message


def test_what_the_system_refuses_is_told_in_one_message(run, tmp_path, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, 'No space left on device')

    def refuse(*_args, **_kwargs):
        raise full

    monkeypatch.setattr(evaluation, 'evaluate', refuse)
    assert main.main(['evaluate', str(run)]) == 2
    assert capsys.readouterr().err.startswith('jaxcls: No space left on device. Check')
    monkeypatch.setattr(workdir.os, 'fsync', refuse)
    assert main.main(['train', f'--workdir={tmp_path}/run', *TRAIN]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f'jaxcls: {tmp_path}/run cannot be written: No space left on device')
    full = OSError('a mistake of ours')
    with pytest.raises(OSError, match='a mistake of ours'):
        main.main(['evaluate', str(run)])


def test_one_of_several_processes_does_not_wait_for_the_others_at_its_end(monkeypatch, capsys):
    timers = []
    monkeypatch.setattr(main.threading, 'Timer', lambda *args: timers.append(args) or mock.Mock())
    assert main.main(['predict', 'nowhere', 'no.png']) == 2
    assert timers == []
    monkeypatch.setattr('jax.distributed.is_initialized', lambda: True)
    assert main.main(['predict', 'nowhere', 'no.png']) == 2
    assert timers == [(10, os._exit, [2])]

    def refuse(*_args):
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(evaluation, 'evaluate', refuse)
    assert main.main(['evaluate', 'nowhere']) == 2 and len(timers) == 2


@pytest.mark.parametrize('command', ['attack', 'compress', 'few-shot', 'export', 'serve'])
def test_commands_for_one_process_say_so_to_several(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('jax.process_count', lambda: 2)
    file = [str(tmp_path / 'file.zip')] if command == 'export' else []
    with pytest.raises(
        UserError, match='runs in one process, and this is one of 2: start it on one'
    ):
        args = main._parse([command, str(tmp_path), *file])
        args.run(args)


@pytest.mark.parametrize(('stopped', 'status'), [('SIGTERM', 143), ('done', 2)])
def test_all_processes_end_with_the_status_of_the_run(stopped, status, monkeypatch, capsys):
    diverged = mock.Mock(stopped=stopped, diverged=lambda: ['Stopped at step 3'])
    monkeypatch.setattr('jaxcls.sweep.fit_seeds', lambda *args: diverged)
    monkeypatch.setattr('jax.process_index', lambda: 1)
    assert main.main([]) == status


def test_what_a_terminal_cannot_encode_is_escaped():
    script = "from jaxcls import main; main.main = lambda: print('class n\\u00f6t'); main.console()"
    environment = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'GLIBC_TUNABLES': ''}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b'class n\\xf6t\n', b'')


@pytest.mark.parametrize(
    ('error', 'beginning'),
    [
        (MemoryError(), 'MemoryError. '),
        (MemoryError('\nUnable to allocate 8 TiB\nfor'), 'Unable to allocate 8 TiB. '),
        (RuntimeError('RESOURCE_EXHAUSTED: Failed to allocate 8 bytes'), 'RESOURCE_EXHAUSTED: '),
        (RuntimeError('RESOURCE_EXHAUSTED: too many requests'), None),
        (RuntimeError('out of order'), None),
    ],
)
def test_errors_of_memory_are_known_by_what_they_say(error, beginning):
    message = errors.out_of_memory(error)
    if beginning is None:
        assert message == ''
    else:
        assert message.startswith(f'There is too little memory: {beginning}')


def test_evaluate_prints_one_json_object(run, capsys):
    result = json_of(capsys, 'evaluate', run, '--json')
    assert result['examples'] == 360
    assert result['top1'] == workdir.read_json(run / 'result.json')['top1']
    assert {'top5', 'loss', 'f1_macro', 'iou_mean', 'confusion', 'top1_interval'} <= set(result)
    assert main.main(['evaluate', str(run), '--split=train', '--checkpoint=best']) == 0
    assert '1,437 examples' in capsys.readouterr().out


def test_predict_ranks_classes_by_probability(run, image, capsys):
    result = json_of(capsys, 'predict', run, image, image, '--json')
    guesses = result['images'][0]['predictions']
    probabilities = [guess['probability'] for guess in guesses]
    assert len(result['images']) == 2 and len(guesses) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    everything = predict(run, [image], top=10)[0]['predictions']
    assert sum(guess['probability'] for guess in everything) == pytest.approx(1.0)
    assert main.main(['predict', str(run), str(image), '--top=1']) == 0
    assert capsys.readouterr().out.count('%') == 1


def test_predict_agrees_with_evaluate_on_the_images_of_the_data_set(run, tmp_path):
    from jaxcls import datasets, evaluate

    split = datasets.load('digits', 'test[:20]')
    paths = []
    for i in range(20):
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(split.source.images[i].squeeze(-1)).save(paths[-1])
    guesses = [int(result['predictions'][0]['class']) for result in predict(run, paths)]
    right = sum(guess == split.source[i][1] for i, guess in enumerate(guesses))
    assert right == round(evaluate(run, 'test[:20]')['top1'] * 20)


def test_summary_counts_parameters_and_flops(capsys):
    summary = json_of(capsys, 'summary', '--json', '--config.model.name=linear')
    assert summary['parameters'] == 650
    assert 2 * 640 <= summary['flops'] <= 2 * 640 + 400  # and the normalisation
    assert summary['layers'] == [{'name': 'head', 'output': [10], 'parameters': 650}]
    assert main.main(['summary']) == 0
    assert 'FLOPs, forward' in capsys.readouterr().out


def test_data_describes_and_draws(tmp_path, capsys):
    sheet = tmp_path / 'sheet.png'
    data = json_of(capsys, 'data', '--json', f'--sheet={sheet}', '--samples=5')
    assert data['splits'] == {'train': 1437, 'test': 360}
    assert sum(data['train_examples_per_class']) == 1437
    with Image.open(sheet) as picture:
        assert picture.width > 100
    assert main.main(['data', f'--sheet={sheet}', '--samples=1']) == 0
    assert 'split train' in capsys.readouterr().out


def test_data_looks_for_both_splits(tmp_path, capsys):
    argv = ['data', f'--sheet={tmp_path}/sheet.png', '--config.data.validation=val']
    assert main.main(argv) == 2
    assert "names the split 'val', which is not there" in capsys.readouterr().err


def test_a_subset_is_what_every_command_speaks_of(tmp_path, image, capsys):
    flags = ['--config.data.classes=(7,2,5)', '--config.data.per_class=20']
    path = tmp_path / 'run'
    assert main.main([f'--workdir={path}', *TRAIN, *flags]) == 0
    assert '60 images 8x8x1, 3 classes' in capsys.readouterr().out
    validation = json_of(capsys, 'evaluate', path, '--json')
    assert validation['class_names'] == ['7', '2', '5']
    assert validation['examples'] == np.sum(validation['confusion']) == 108
    assert json_of(capsys, 'evaluate', path, '--json', '--split=train')['examples'] == 60
    guesses = json_of(capsys, 'predict', path, image, '--json')['images'][0]['predictions']
    assert {guess['class'] for guess in guesses} == {'7', '2', '5'}
    data = json_of(capsys, 'data', '--json', f'--sheet={tmp_path}/sheet.png', *flags)
    assert data['class_names'] == ['7', '2', '5']
    assert data['train_examples_per_class'] == [20] * 3
    summary = json_of(capsys, 'summary', '--json', *flags)
    assert summary['num_classes'] == summary['layers'][-1]['output'][-1] == 3


def test_help_answers_fast_and_names_the_commands():
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, '-m', 'jaxcls.main', '--help'], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - begin < 20  # a hang, not a benchmark
    for command in ('train', 'evaluate', 'predict', 'summary', 'data'):
        assert command in done.stdout
    code = 'import sys, jaxcls.main; print("jax" in sys.modules)'
    loaded = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout == 'False\n'


@pytest.mark.parametrize(
    'argv',
    [
        ['predict', 'x'],
        ['predict', 'x', 'y.png', '--config.seed=1'],
        ['few-shot'],
        ['export-weights', 'x'],
    ],
)
def test_wrong_words_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main.main(argv)
    assert error.value.code == 2 and 'usage' in capsys.readouterr().err


def test_a_baseline_and_seeds_are_trained_evaluated_and_compared(run, tmp_path, capsys):
    knn, pair = tmp_path / 'knn', tmp_path / 'pair'
    fields = ['--config.data.train=train[:200]']
    assert main.main([f'--workdir={knn}', '--config.model.name=knn', *fields]) == 0
    assert 'validation accuracy' in capsys.readouterr().out
    assert main.main(['evaluate', str(knn)]) == 0
    assert 'test: 360 examples' in capsys.readouterr().out
    seeds = ['--config.model.name=linear', '--config.epochs=1', '--config.seeds=2', *fields]
    assert main.main([f'--workdir={pair}', *seeds]) == 0
    assert '95% t-interval over 2 seeds' in capsys.readouterr().out
    assert len(json_of(capsys, 'evaluate', pair, '--json')['members']) == 2
    compared = json_of(capsys, 'compare', run, knn, pair, '--json')
    assert 'pair' in json.dumps(compared)
    for argv, message in (
        (['evaluate', str(knn), '--split=train'], 'keeps its predictions'),
        (['predict', str(knn), 'x.png'], 'is no network'),
        (['predict', str(pair), 'x.png'], 'give one of them'),
    ):
        assert main.main(argv) == 2
        assert message in capsys.readouterr().err


def test_a_sweep_is_listed_trained_member_by_member_and_reported(tmp_path, capsys):
    sweep = [
        'sweep', f'--workdir={tmp_path}/sweep', '--grid', 'learning_rate=0.01,0.001',
        '--config.model.name=linear', '--config.epochs=1', '--config.data.train=train[:100]',
    ]  # fmt: skip
    assert main.main([*sweep, '--list']) == 0
    assert capsys.readouterr().out.count('learning_rate=') == 2
    assert main.main([*sweep, '--member=1']) == 0
    capsys.readouterr()
    rows = json_of(capsys, *sweep, '--json')
    assert len(rows['rows']) == 2
    assert main.main(['sweep']) == 2 and 'needs settings' in capsys.readouterr().err


def test_the_learning_rate_test_prints_a_rate_and_leaves_a_picture(tmp_path, capsys):
    picture = tmp_path / 'lr.png'
    argv = ['lr-find', '--steps=40', f'--picture={picture}', '--config.model.name=linear']
    assert 0 < json_of(capsys, *argv, '--json')['suggestion'] < 10 and picture.is_file()


def test_restarts_once_with_large_pages_and_leaves_a_users_setting(monkeypatch):
    restarts = []
    monkeypatch.setattr(main.os, 'execv', lambda *args: restarts.append(args))
    monkeypatch.setattr(main.sys, 'platform', 'linux')
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    main._restart_with_large_pages()
    assert restarts == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert main.os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.check=1')
    main._restart_with_large_pages()
    assert len(restarts) == 1
    assert main.os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.check=1'
