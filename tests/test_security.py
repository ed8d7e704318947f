"""What a run, a data set or an archive holds is never executed, and cannot take more than its share."""

import ast
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jaxcls
from jaxcls import datasets, predictions, prepare, weight_files, workdir
from jaxcls.errors import UserError

ROOT = Path(jaxcls.__file__).parent
EXPERIMENTS = ROOT.parent / 'experiments'
FILES = sorted([*ROOT.rglob('*.py'), *EXPERIMENTS.rglob('*.py')])
# Modules that make code or objects out of data, and functions that do.
MODULES = {
    'pickle', 'cPickle', 'marshal', 'shelve', 'dill', 'cloudpickle', 'yaml', 'runpy', 'imp', 'code',
    'codeop', 'dbm', 'xmlrpc',
}  # fmt: skip
FUNCTIONS = {'eval', 'exec', 'compile', '__import__'}
METHODS = {
    'os.system', 'os.popen', 'pty.spawn', 'subprocess.getoutput', 'subprocess.getstatusoutput',
    'joblib.load', 'shutil.unpack_archive', 'importlib.import_module', 'np.fromregex', 'torch.jit.load',
}  # fmt: skip
# The one exception: a --config file, and a study, are the user's own code.
RUNS_CODE = {('jaxcls/config.py', 'spec.loader.exec_module')}


def calls(path: Path):
    """The calls in a file: dotted name, or the method after '.', and keyword arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def place(path: Path) -> str:
    return path.relative_to(ROOT.parent).as_posix()


def test_nothing_makes_code_or_objects_out_of_data():
    assert len(FILES) > 60
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            assert not MODULES & {name.split('.')[0] for name in names}, place(path)
        for name, keywords in calls(path):
            bad = name in FUNCTIONS | METHODS or name.endswith(('exec_module', 'load_module'))
            bad |= keywords.get('shell', 'False') != 'False'
            bad |= keywords.get('allow_pickle', 'False') != 'False'
            bad |= name == 'torch.load' and keywords.get('weights_only') != 'True'
            bad |= name.endswith(('.extractall', '.extract')) and keywords.get('filter') != "'data'"
            if bad:
                found.add((place(path), name))
    # `jaxcls` imports its own modules when they are asked for, by the names in a literal table.
    assert found == RUNS_CODE | {('jaxcls/__init__.py', 'importlib.import_module')}


def test_archives_are_opened_in_one_place_that_limits_them():
    opened = [
        (place(path), name) for path in FILES for name, _ in calls(path) if 'tarfile.open' in name
    ]
    assert opened == [('jaxcls/prepare.py', 'tarfile.open')]
    gzipped = {place(path) for path in FILES for name, _ in calls(path) if name.startswith('gzip.')}
    assert gzipped == {'jaxcls/prepare.py'}


def test_all_that_is_printed_goes_through_one_place():
    printing = [
        (place(path), name)
        for path in ROOT.rglob('*.py')
        for name, _ in calls(path)
        if name in ('print', 'sys.stdout.write', 'sys.stderr.write')
    ]
    # JSON has escapes of its own.
    assert sorted(printing) == [
        ('jaxcls/commands/common.py', 'print'),
        ('jaxcls/terminal.py', 'print'),
    ]


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ('a pickle was run',))


def test_object_arrays_are_refused(tmp_path):
    labels, objects = np.arange(4) % 2, np.array([Exploit()] * 4, object)
    images = np.zeros((4, 3, 3), np.uint8)
    np.savez(tmp_path / 'data.npz', x_train=images, y_train=labels, class_names=objects)
    with pytest.raises(UserError, match='class_names .* cannot be read: Object arrays'):
        datasets.load(f'npz:{tmp_path}/data.npz', 'train')
    np.savez(tmp_path / 'predictions.npz', logits=objects, label=labels)
    with pytest.raises(UserError, match='is damaged: Object arrays'):
        predictions.load(tmp_path / 'predictions.npz')


def test_pickles_in_the_place_of_weights_are_refused(tmp_path):
    torch = pytest.importorskip('torch')
    torch.save({'w': Exploit()}, tmp_path / 'weights.pth')
    with pytest.raises(UserError, match='it holds more than tensors'):
        weight_files.read(tmp_path / 'weights.pth')


def test_a_config_in_a_workdir_is_data(tmp_path):
    (tmp_path / 'config.json').write_text('__import__("os").abort()')
    (tmp_path / 'config.py').write_text('raise SystemExit("a workdir was run")')
    with pytest.raises(UserError, match=r'config.json is damaged'):
        workdir.read_config(tmp_path)


def test_postscript_is_no_image(monkeypatch):
    monkeypatch.setattr(
        subprocess, 'Popen', lambda *args, **kwargs: pytest.fail('a program was run')
    )
    monkeypatch.setattr(subprocess, 'check_call', subprocess.Popen)
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n'
    with pytest.raises(UserError, match='Not an image that can be decoded'):
        datasets.decode(eps, 3)


def test_a_data_set_does_not_choose_which_modules_are_imported(tmp_path, monkeypatch):
    directory = tmp_path / 'evil' / '1.0.0'
    directory.mkdir(parents=True)
    features = {'pythonClassName': 'evil.payload.Feature', 'jsonFeature': {'json': '{}'}}
    (directory / 'features.json').write_text(json.dumps(features))
    (tmp_path / 'evil' / 'payload.py').write_text('raise SystemExit("a data set was run")')
    info = {'name': 'evil', 'version': '1.0.0', 'fileFormat': 'array_record'}
    (directory / 'dataset_info.json').write_text(json.dumps(info))
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    with pytest.raises(
        UserError, match=r"class 'evil.payload.Feature', expected one of tensorflow"
    ):
        datasets.load('tfds:evil', 'train', str(tmp_path))


# Archives


def tar_gz(path: Path, *members: tarfile.TarInfo, zeros: int = 0) -> Path:
    with tarfile.open(path, 'w:gz') as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
        if zeros:
            member = tarfile.TarInfo('cifar/data_batch_1.bin')
            member.size = zeros
            tar.addfile(member, io.BytesIO(bytes(zeros)))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = '') -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    found.size = 3 if kind == tarfile.REGTYPE else 0
    return found


def test_an_archive_is_unpacked_into_memory(tmp_path):
    path = tar_gz(
        tmp_path / 'a.tar.gz', member('cifar', tarfile.DIRTYPE), member('cifar/./train.bin')
    )
    assert prepare.unpack(path) == {'train.bin': bytes(3)}


@pytest.mark.parametrize(
    'bad',
    [
        member('../train.bin'),
        member('cifar/../../train.bin'),
        member('/etc/passwd'),
        member('C:/train.bin'),
        member('..\\train.bin'),
        member('train.bin', tarfile.SYMTYPE, '/etc/passwd'),
        member('train.bin', tarfile.LNKTYPE, 'other.bin'),
        member('train.bin', tarfile.FIFOTYPE),
        member('train.bin', tarfile.CHRTYPE),
    ],
    ids=lambda bad: f'{bad.type.decode()} {bad.name}',
)
def test_members_that_leave_an_archive_are_refused(tmp_path, bad):
    path = tar_gz(tmp_path / 'a.tar.gz', member('cifar/test.bin'), bad)
    with pytest.raises(UserError, match=re.escape(f'{bad.name!r} is no plain file')):
        prepare.unpack(path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_archives_that_grow_beyond_their_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'UNPACKED', 2**20)
    path = tar_gz(tmp_path / 'a.tar.gz', zeros=2**22)
    assert path.stat().st_size < 2**14
    with pytest.raises(
        UserError, match='has more than 1,048,576 bytes when unpacked.*get it again'
    ):
        prepare.unpack(path)
    with pytest.raises(
        UserError, match='has more than 1,048,576 bytes when unpacked.*get it again'
    ):
        prepare._idx(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match='cannot be unpacked: .* Delete it and get it again'):
        prepare.unpack(path)


def test_arrays_are_no_larger_than_their_file(tmp_path):
    """A header that promises a terabyte is refused before memory is asked for."""
    text = (
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b'\n'
    )
    header = np.lib.format.magic(1, 0) + len(text).to_bytes(2, 'little') + text
    with zipfile.ZipFile(tmp_path / 'data.npz', 'w') as archive:
        archive.writestr('x_train.npy', header + bytes(36))
    with pytest.raises(UserError, match=r'uint8 \[1000000000000\] by its header, in 164 bytes'):
        datasets.load(f'npz:{tmp_path}/data.npz', 'train')
