import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxcls import commands, main, predict, workdir

TRAIN = [
    '--config.epochs=3', '--config.model.name=mlp', '--config.model.hidden=(16,)',
    '--config.learning_rate=0.01',
]  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def no_start():
    """Commands do not touch the process: no cache of compiled programs, no warnings format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, '_start', lambda: None)
        yield


@pytest.fixture(scope='module')
def run(no_start, tmp_path_factory):
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


MISTAKES = [
    (['--config.epochz=3'], "Did you mean 'epochs'?"),
    (['--config.epochs', 'many'], 'must be of type float'),
    (['--config.learning_rate=-1'], 'must be more than 0'),
    (['--config.model.name=resent20'], "Did you mean 'resnet20'?"),
    (['--config.model.activation=rleu'], "Did you mean 'relu'?"),
    (['--config.model.dropout=1.5'], 'dropout'),
    (['--config.optimizer.name=sdg'], "Did you mean 'sgd'?"),
    (['--config.optimizer.name=sgd', '--config.optimizer.momentum=1.0'], 'momentum'),
    (['--config.schedule.name=cosin'], "Did you mean 'cosine'?"),
    (['--config.loss.label_smoothing=1.0'], 'label_smoothing'),
    (['--config.data.name=mnist'], 'tfds:mnist'),
    (['--config.data.name=folder:/nowhere'], '/nowhere'),
    (['--config.data.name=npz:/nowhere.npz'], '/nowhere.npz'),
    (['--config.data.train=trian'], 'trian'),
    (['--config.data.classes=(0,10)'], 'config.data.classes is (0, 10)'),
    (['--config.data.per_class=1000'], "class '8' has only"),
    (['--config.data.mean=(0.1,0.2)', '--config.data.std=(1,1)'], 'channel'),
    (['--config=nowhere.py'], 'No config file'),
    (['--config.warmup_epochs=100'], 'must be less than config.epochs'),
    (['--config.batch_size=0'], 'at least 1'),
    (['evaluate', '/nowhere'], 'is not a run'),
    (['predict', '/nowhere', 'x.png'], 'is not a run'),
    (['predict', 'RUN', '/nowhere.png'], 'cannot be read'),
    (['predict', 'RUN', 'CONFIG'], 'config.json'),
    (['predict', 'RUN', 'x.png', '--top=0'], 'at least 1'),
    (['evaluate', 'RUN', '--checkpoint=12345'], "No checkpoint '12345'"),
    (['evaluate', 'RUN', '--split=tset'], 'tset'),
    (['data', '--samples=0'], 'at least 1'),
    (['data', '--sheet=/nowhere/sheet.png'], 'cannot be written'),
    (['--workdir=/proc/nowhere'], 'cannot be written'),
    (['--workdir=OTHER'], 'holds files but no run'),
    (['--config=CONFIG'], 'No config file'),
    (['--config.model.name=mlp', '--config.model.hidden=64'], 'must be of type tuple'),
    (['--config.model.name=mlp', '--config.model.hidden=(0,)'], 'hidden'),
    (['--config.model.name=lenet5'], 'too small for this network'),
    (['--config.model.kernel_init=hee_normal'], "Did you mean 'he_normal'?"),
    (['--config.model.num_classes=3'], 'num_classes'),
    (['--config.optimizer={}'], 'is a group of fields'),
    (['--config.schedule.name=step'], 'boundaries'),
    (['--config.precision=fp16'], 'config.precision'),
    (['--config.parameters=shard'], 'config.parameters'),
    (['--config.seed=-1'], 'at least 0'),
    (['--config.epochs=nan'], 'config.epochs'),
    (['--config.epochs=1e12'], 'set a smaller config.epochs'),
    (['--workdir=runs[1]'], 'characters []*?'),
    (['--config.clip_norm=-1'], 'at least 0'),
    (['--config.ema_decay=1'], 'config.ema_decay'),
    (['--config.accumulate_steps=3'], 'equal parts'),
    (['--config.log_every_steps=0'], 'at least 1'),
    (['--config.keep_checkpoints=0'], 'at least 1'),
    (['--config.data.image_size=8.5'], 'must be of type int'),
    (['--config.data.crop=random_resized'], 'set config.data.image_size'),
    (['--config.data.validation=test[90%:'], 'test[90%:'),
    (['--config.data.name=tfds:mnits', '--config.data.dir=/nowhere'], 'mnist'),
    (['--config.data.pipeline=steam'], "Did you mean 'stream'?"),
    (['evaluate', 'RUN', '--split=test[:0]'], 'test[:0]'),
    (['predict', 'RUN', 'OTHER'], 'cannot be read'),
]


@pytest.mark.parametrize(
    ('argv', 'message'), MISTAKES, ids=[' '.join(argv)[:60] for argv, _ in MISTAKES]
)
def test_a_mistake_is_one_message_and_nothing_compiled(
    argv, message, run, tmp_path, capsys, monkeypatch
):
    from jaxcls import loop

    monkeypatch.setattr(loop, 'make_advance', None)
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'thesis.tex').touch()
    for name, value in {'RUN': run, 'CONFIG': run / 'config.json', 'OTHER': other}.items():
        argv = [word.replace(name, str(value)) for word in argv]
    if argv[0].startswith('--config') and not any(word.startswith('--workdir') for word in argv):
        argv.append(f'--workdir={tmp_path}/never')
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and message in captured.err
    assert captured.err.startswith('jaxcls: ') and 'Traceback' not in captured.err
    assert not (tmp_path / 'never').exists()


@pytest.mark.parametrize(
    'argv',
    [
        ['tarin'],
        ['predict', 'x'],
        ['predict', 'x', 'y.png', '--config.seed=1'],
        ['few-shot'],
        ['export-weights', 'x'],
        ['--wrkdir=x'],
    ],
)
def test_wrong_words_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main.main(argv)
    assert error.value.code == 2 and 'usage' in capsys.readouterr().err


def test_a_run_of_another_config_is_refused(run, capsys):
    assert main.main([f'--workdir={run}', *TRAIN, '--config.seed=1']) == 2
    assert 'seed: 0 there, 1 now' in capsys.readouterr().err


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
        (['evaluate', str(run), '--tta=flop'], 'flip'),
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
