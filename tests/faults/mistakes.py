"""The mistakes that people make on the command line: each is one message that helps, and nothing compiled.

The message is on standard error, starts with 'jaxcls: ' (that of `argparse` with its usage) and has a piece
that says what to do; the exit status is 2, and no file is left behind.
"""

import contextlib
import io
import random
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from jaxcls import loop, main, weight_files
from jaxcls.commands import common

from .rows import Row

SECONDS = 5.0
FIELDS = ['--config.epochs=1', '--config.model.name=mlp', '--config.model.hidden=(16,)']
MLP, SGD = '--config.model.name=mlp', '--config.optimizer.name=sgd'
RATES, STUDY = ['sweep', '--grid', 'learning_rate=0.1,0.01'], 'STUDIES/activations.py'
# RUN is a trained run of FIELDS, HERE a directory with the files of `_files`.
MISTAKES = [
    # Fields: names, types, ranges.
    (['--config.epochz=3'], "Did you mean 'epochs'?"),
    (['--config.epochs', 'many'], 'must be of type float'),
    (['--config.epochs'], "config.epochs is ''"),
    (['--config.epochs=nan'], 'must be of type float'),
    (['--config.epochs=1e12'], 'set a smaller config.epochs'),
    (['--config.lr=0.1'], 'learning_rate'),
    (['--config.learning_rate=-1'], 'must be more than 0'),
    (['--config.learning_rate=0,1'], 'must be of type float'),
    (['--config.batch_size=0'], 'at least 1'),
    (['--config.seed=-1'], 'at least 0'),
    (['--config.warmup_epochs=100'], 'must be less than config.epochs'),
    (['--config.clip_norm=-1'], 'at least 0'),
    (['--config.ema_decay=1'], 'at most 0.999'),
    (['--config.accumulate_steps=3'], 'choose a multiple of 3'),
    (['--config.log_every_steps=0'], 'at least 1'),
    (['--config.keep_checkpoints=0'], 'at least 1'),
    (['--config.early_stopping_epochs=0.5'], 'it would stop at once'),
    (['--config.precision=fp16'], 'Known: bfloat16'),
    (['--config.parameters=shard'], 'Known: fsdp, replicated'),
    (['--config.freeze=('], 'freezes all but the head'),
    (['--config.freeze=encoder'], 'freezes all but the head'),
    (['--config.workdir=x'], 'Known: '),
    # Networks, losses, optimisers, augmentation.
    (['--config.model=resnet20'], 'set one of them: --config.model.FIELD=VALUE'),
    (['--config.model.name=resent20'], "Did you mean 'resnet20'?"),
    (['--config.model.activation=rleu'], "Did you mean 'relu'?"),
    (['--config.model.dropout=1.5'], 'expected 0 <= dropout < 1'),
    (['--config.model.kernel_init=hee_normal'], "Did you mean 'he_normal'?"),
    (['--config.model.num_classes=3'], 'Known: activation'),
    (['--config.model.name=lenet5'], 'Use larger images'),
    ([MLP, '--config.model.hidden=64'], 'must be of type tuple'),
    ([MLP, '--config.model.hidden=(0,)'], 'expected whole numbers of at least 1'),
    (
        [MLP, '--config.model.init_from=/nowhere.pth'],
        'expected a jaxcls workdir, a .safetensors file',
    ),
    ([MLP, '--config.model.init_from=HERE/text.txt'], 'expected .safetensors or .pth'),
    ([MLP, '--config.model.init_from=HERE/cut.safetensors'], 'Get it again'),
    (['--config.model.init_from=RUN'], 'Set config.model.name and its fields'),
    (['--config.loss.name=focall'], "Did you mean 'focal'?"),
    (['--config.loss.label_smoothing=1.0'], 'label_smoothing is 1.0; it must be'),
    (['--config.optimizer.name=sdg'], "Did you mean 'sgd'?"),
    ([SGD, '--config.optimizer.momentum=1.0'], 'momentum is 1.0; it must be'),
    ([SGD, '--config.optimizer.learning_rate=0.1'], 'Known: '),
    (['--config.schedule.name=cosin'], "Did you mean 'cosine'?"),
    (['--config.schedule.name=step'], 'boundaries'),
    (['--config.augment=flip'], 'it must be a list of dicts'),
    (["--config.augment=[{'name': 'filp'}]"], "Did you mean 'flip'?"),
    (['--config.augment[0].padding=2'], 'has no items'),
    # Data.
    (['--config.data.name=mnist'], "is written 'tfds:mnist'"),
    (['--config.data.name=tfds:mnits', '--config.data.dir=/nowhere'], 'Did you mean mnist'),
    (['--config.data.name=folder:/nowhere'], 'there is no directory /nowhere'),
    (['--config.data.name=folder:HERE/other'], 'at least 2 class directories'),
    (['--config.data.name=folder:HERE/photos'], 'such as --config.data.image_size=128'),
    (['--config.data.name=npz:/nowhere.npz'], 'there is no such file'),
    (['--config.data.name=npz:HERE/text.txt'], 'write it with numpy.savez'),
    (['--config.data.name=npz:HERE/floats.npz'], 'Convert images in [0, 1]'),
    (['--config.data.train=trian'], 'The data set has train (1,437 examples)'),
    (['--config.data.validation=test[90%:'], 'is not written as train, train[:90%]'),
    (['--config.data.classes=(0,10)'], 'digits has the classes 0 to 9'),
    (['--config.data.classes=(3,)'], 'of at least 2'),
    (['--config.data.per_class=1000'], 'Take fewer'),
    (['--config.data.mean=(0.1,0.2)', '--config.data.std=(1,1)'], 'Give 1 or 1 values'),
    (['--config.data.mean=(127.5,)'], 'Divide numbers meant for 0..255 by 255'),
    (['--config.data.std=(0,)'], 'each more than 0'),
    (['--config.data.image_size=8.5'], 'must be of type int'),
    (['--config.data.crop=random_resized'], 'set config.data.image_size'),
    (['--config.data.pipeline=steam'], "Did you mean 'stream'?"),
    # Files of configs.
    (['--config=nowhere.py'], 'takes the path of an experiment'),
    (['--config=RUN/config.json'], 'takes the path of an experiment'),
    (['--config=HERE/syntax.py'], 'SyntaxError: '),
    (['--config=HERE/imports.py'], 'line 1 failed: ModuleNotFoundError'),
    (['--config=HERE/nothing.py'], 'has no function get_config(); define it'),
    (['--config=HERE/dict.py'], 'Start from jaxcls.config.get_config()'),
    (['--config=HERE/typo.py'], "Did you mean 'learning_rate'?"),
    (['--config=HERE/exits.py'], 'line 2 failed: SystemExit: 1. Mend the file'),
    # Directories of runs.
    (['--workdir=/proc/nowhere'], 'or choose another --workdir'),
    (['--workdir=HERE/other'], 'Choose an empty or new --workdir'),
    (['--workdir=runs[1]'], 'Choose another --workdir'),
    (['--workdir=RUN', *FIELDS, '--config.seed=1'], 'seed: 0 there, 1 now'),
    (['evaluate', '/nowhere'], 'Give the --workdir of an earlier `jaxcls train`'),
    (['evaluate', 'RUN', '--checkpoint=12345'], "Give 'latest', 'best' or one of the steps"),
    (['evaluate', 'RUN', '--split=tset'], 'The data set has train (1,437 examples)'),
    (['evaluate', 'RUN', '--split=test[:0]'], 'The data set has train (1,437 examples)'),
    (['evaluate', 'RUN', '--tta=flop'], 'it must be none, flip'),
    (['evaluate', 'RUN', '--config.seed=1'], 'leave out --config'),
    (['predict', '/nowhere', 'x.png'], 'Give the --workdir of an earlier `jaxcls train`'),
    (['predict', 'RUN', 'HERE/other/thesis.tex'], 'are read'),
    (['predict', 'RUN', '/nowhere.png'], 'Give the path of an image'),
    (['predict', 'RUN', 'RUN/config.json'], 'are read'),
    (['predict', 'RUN', 'x.png', '--top=0'], 'at least 1'),
    (['compare', 'RUN', 'HERE/other'], 'Give the --workdir of an earlier `jaxcls train`'),
    (['few-shot', 'RUN', '--config.model.width=3'], 'few-shot takes fields of --config.data'),
    (['export-weights', 'RUN', 'mlp.pth'], 'must end in .safetensors'),
    # Other commands.
    (['data', '--samples=0'], 'at least 1'),
    (['data', '--sheet=/nowhere/sheet.png'], 'Choose another --sheet'),
    (['lr-find', '--low=1', '--high=0.1'], 'below --high'),
    (['models', 'restnet50'], "Did you mean 'resnet50'?"),
    (['sweep', '--grid', 'learning_rate'], 'such as learning_rate=0.1'),
    ([*RATES, '--member=99'], 'give 0 to 1'),
    (['lr-find', '--picture=/nowhere/lr.png'], 'Choose another --picture'),
    (['study', STUDY, '--data=imagenet'], 'Known: '),
    # After training.
    (['explain', 'RUN', '--methods=grad_can'], "Did you mean 'grad_cam'?"),
    (['explain', 'RUN', '--label=3'], 'is of image files'),
    (['explain', 'RUN', '--picture=/nowhere/x.png', 'x.png'], 'Choose another --picture'),
    (['attack', 'RUN', '--attacks=pgdd'], "Did you mean 'pgd'?"),
    (['attack', 'RUN', '--epsilons=8/0'], 'such as 0.1,0.3 or 4/255,8/255'),
    (['attack', 'RUN', '--attacks=none'], 'give --attacks, --corruptions or --ood'),
    (['compress', 'RUN', '--methods', 'chanels:0.5'], "Did you mean 'channels'?"),
    (['export', 'RUN', 'HERE/model.onnx'], 'must end in .zip'),
    (['export', 'RUN', 'HERE/model.tfl', '--format=tfl'], 'one of stablehlo, onnx, tflite'),
    (['serve', 'RUN', '--queue=0'], 'at least 1'),
    (['--config.privacy.name=dp_sdg'], "Did you mean 'dp_sgd'?"),
    (
        ['--config.privacy.name=dp_sgd', '--config.sam_rho=0.1'],
        'Change it, or set config.privacy.name=none',
    ),
    (['--config.adversary.name=pgd', '--config.adversary.epsilon=8'], 'images are in [0, 1]'),
    (['--config.teacher.name=logits'], 'the directory of a trained run'),
    (['--config.pruning.name=magnitude', '--config.pruning.sparsity=1.5'], 'sparsity is 1.5'),
    # What argparse says.
    (['evalute', 'runs/x'], "Did you mean 'evaluate'?"),
    (['--epochs=3'], 'is set by --config.epochs=VALUE'),
]


def check(count: int, seed: int, directory: Path) -> str:
    """Makes `count` of the mistakes, drawn by the seed, beside a run that is trained first."""
    run, here, cwd = directory / 'run', directory / 'here', directory / 'cwd'
    cwd.mkdir()
    _files(here)
    studies = Path(__file__).parents[2] / 'experiments' / 'studies'
    places = {'RUN': run, 'HERE': here, 'STUDIES': studies}
    chosen = MISTAKES if count >= len(MISTAKES) else random.Random(seed).sample(MISTAKES, count)
    slowest = 0.0
    with contextlib.chdir(cwd), mock.patch.object(common, 'start', lambda: None):
        status, _, said = _run([f'--workdir={run}', *FIELDS])
        assert status == 0, said
        before = _listing(directory)
        with mock.patch.object(loop, 'make_advance', None):
            import tensorflow_datasets  # noqa: F401

            for argv, remedy in chosen:
                for name, path in places.items():
                    argv = [word.replace(name, str(path)) for word in argv]
                slowest = max(slowest, _check(argv, remedy))
                assert _listing(directory) == before, f'{argv} leaves files'
    return f'{len(chosen)} mistakes, one message each, in at most {slowest:.1f} s'


def _check(argv: list[str], remedy: str) -> float:
    begin = time.perf_counter()
    status, out, said = _run(argv)
    seconds = time.perf_counter() - begin
    assert status == 2 and not out, f'{argv}: status {status}, {out!r}, {said!r}'
    starts = said.startswith('jaxcls: ') or said.startswith('usage: ')
    assert starts and said.count('jaxcls: ') == 1 and 'Traceback' not in said, f'{argv}: {said!r}'
    assert remedy in said, f'{argv}: no {remedy!r} in {said!r}'
    assert seconds < SECONDS, f'{argv}: {seconds:.1f} s'
    return seconds


def _run(argv: list[str]) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main.main(argv)
        except SystemExit as error:  # of argparse
            status = error.code
    return status, out.getvalue(), err.getvalue()


def _listing(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in directory.rglob('*'))


def _files(here: Path):
    """What people have by mistake: broken configs, weights of another network, photos of any size."""
    (here / 'other').mkdir(parents=True)
    texts = {
        'other/thesis.tex': '',
        'text.txt': 'accuracy 99%',
        'syntax.py': 'def get_config(:\n',
        'imports.py': 'import nothing_of_that_name\n',
        'nothing.py': 'config = {}\n',
        'dict.py': 'def get_config():\n    return {"epochs": 3}\n',
        'exits.py': 'import sys\nsys.exit(1)\n',
        'typo.py': (
            'from jaxcls import config as base\ndef get_config():\n'
            '    config = base.get_config()\n    config.learning_rat = 0.1\n    return config\n'
        ),
    }
    for name, text in texts.items():
        (here / name).write_text(text)
    weight_files.write(here / 'other.safetensors', {'fc.weight': np.ones((2, 3), np.float32)}, {})
    (here / 'cut.safetensors').write_bytes((here / 'other.safetensors').read_bytes()[:-3])
    split = {'x_train': np.zeros((4, 8, 8), np.float32), 'y_train': np.arange(4)}
    np.savez(here / 'floats.npz', **split)
    for i, kind in enumerate(['cat', 'dog']):
        (here / 'photos' / kind).mkdir(parents=True)
        for j in range(8):
            image = Image.fromarray(np.zeros((8 + i, 8 + j, 3), np.uint8))
            image.save(here / 'photos' / kind / f'{j}.png')


ROWS = (
    Row(
        12,
        '{count} mistakes of users: a message that helps, before anything is compiled',
        check,
        full=len(MISTAKES),
        share=len(MISTAKES),
    ),
)
