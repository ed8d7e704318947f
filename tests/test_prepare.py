import functools
import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxcls import datasets, download, prepare
from jaxcls.download import Archive
from jaxcls.errors import UserError

MNIST_FILES = {
    'train': ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
    'test': ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
}
SIZES = {'train': 20, 'test': 8}


def pixels(split: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(len(split)).integers(0, 256, (SIZES[split], *shape), np.uint8)


def labels(split: str, classes: int) -> np.ndarray:
    return (np.arange(SIZES[split], dtype=np.uint8) * 7) % classes


# Without the time, so that the files are the same in the next second.
compress = functools.partial(gzip.compress, mtime=0)


def mnist_files() -> dict[str, bytes]:
    files = {}
    for split, (image_file, label_file) in MNIST_FILES.items():
        n = SIZES[split]
        header = (0x803).to_bytes(4, 'big') + b''.join(k.to_bytes(4, 'big') for k in (n, 28, 28))
        files[image_file] = compress(header + pixels(split, 28, 28).tobytes())
        header = (0x801).to_bytes(4, 'big') + n.to_bytes(4, 'big')
        files[label_file] = compress(header + labels(split, 10).tobytes())
    return files


def cifar_files(classes: int) -> dict[str, bytes]:
    """The rows of one split are dealt to its files, in order."""
    content = {'readme.html': b'<p>'}
    for split in SIZES:
        rows = pixels(split, 32, 32, 3).transpose(0, 3, 1, 2).reshape(SIZES[split], -1)
        columns = [labels(split, classes)[:, None], rows]
        if classes == 100:
            columns.insert(0, labels(split, 20)[:, None])
        rows = np.concatenate(columns, axis=1)
        if classes == 100:
            content[f'{split}.bin'] = rows.tobytes()
        elif split == 'test':
            content['test_batch.bin'] = rows.tobytes()
        else:
            for i in range(5):
                content[f'data_batch_{i + 1}.bin'] = rows[4 * i : 4 * i + 4].tobytes()
    names = {10: ['batches.meta.txt'], 100: ['fine_label_names.txt', 'coarse_label_names.txt']}
    for file in names[classes]:
        count = 20 if 'coarse' in file else classes
        content[file] = ''.join(f'{file[0]}{i}\n' for i in range(count)).encode() + b'\n'
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, data in reversed(content.items()):
            member = tarfile.TarInfo(f'cifar-{classes}/{name}')
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return {f'cifar-{classes}-binary.tar.gz': compress(buffer.getvalue())}


SETS = {
    'mnist': (mnist_files, (28, 28, 1), 10),
    'fashion_mnist': (mnist_files, (28, 28, 1), 10),
    'kmnist': (mnist_files, (28, 28, 1), 10),
    'cifar10': (lambda: cifar_files(10), (32, 32, 3), 10),
    'cifar100': (lambda: cifar_files(100), (32, 32, 3), 100),
}


def archives(files: dict[str, bytes], url: str) -> list[Archive]:
    return [
        Archive(f'{url}/{name}', name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    ]


def place(directory: Path, files: dict[str, bytes]):
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def expect(monkeypatch, files: dict[str, bytes], url: str = 'http://127.0.0.1:9'):
    """Has TFDS expect these small archives in place of the originals."""
    expected = archives(files, url)
    monkeypatch.setattr(prepare, '_archives', lambda _: expected)


def leftovers(root: Path) -> set[str]:
    found = {str(path.relative_to(root)) for path in root.rglob('*')}
    return {name for name in found if not name.endswith('.lock') and name != 'downloads'}


@pytest.mark.parametrize('own_directory', [False, True])
@pytest.mark.parametrize('name', SETS)
def test_archives_placed_by_hand_are_prepared_as_tfds_would(
    name, own_directory, tmp_path, monkeypatch, capfd
):
    make, shape, classes = SETS[name]
    expect(monkeypatch, make())
    manual = tmp_path / 'downloads' / 'manual'
    place(manual / name if own_directory else manual, make())
    for split, size in SIZES.items():
        loaded = datasets.load(f'tfds:{name}', split, str(tmp_path))
        assert len(loaded.source) == size and loaded.shape == shape
        # TFDS orders the records of a split by a salted hash of their place in the original.
        salt = hashlib.md5(split.encode())
        keys = [salt.copy() for _ in range(size)]
        for i, key in enumerate(keys):
            key.update(str(i).encode())
        order = np.argsort([key.hexdigest() for key in keys])
        images = [datasets.decode(loaded.source[i][0], shape[2]) for i in range(size)]
        np.testing.assert_array_equal(images, pixels(split, *shape)[order])
        got = [loaded.source[i][1] for i in range(size)]
        np.testing.assert_array_equal(got, labels(split, classes)[order])
    out, err = capfd.readouterr()
    assert out == '' and f'Preparing {name}' in err and 'WARNING' not in err
    assert sum(f'Preparing {name}' in line for line in err.splitlines()) == 1  # not twice


def test_what_is_prepared_is_a_standard_directory(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    for name in ('cifar100', 'fashion_mnist'):
        make, shape, classes = SETS[name]
        expect(monkeypatch, make())
        place(tmp_path / 'downloads' / 'manual', make())
        mine = datasets.load(f'tfds:{name}', 'train', str(tmp_path))
        builder = tfds.builder(name, data_dir=tmp_path)
        assert builder.is_prepared() and builder.info.supervised_keys == ('image', 'label')
        theirs = builder.as_data_source('train')
        assert len(theirs) == SIZES['train']
        for i, example in enumerate(theirs):
            image, label = mine.source[i]
            np.testing.assert_array_equal(datasets.decode(image, shape[2]), example['image'])
            assert label == example['label']
        assert tuple(builder.info.features['label'].names) == mine.class_names
        assert len(mine.class_names) == classes
    assert mine.class_names[1] == 'Trouser'
    cifar = tfds.builder('cifar100', data_dir=tmp_path)
    example = cifar.as_data_source('test')[0]
    assert cifar.info.features['coarse_label'].names[:2] == ['c0', 'c1']
    number = int(example['id'].decode().removeprefix('test_'))
    assert example['coarse_label'] == labels('test', 20)[number]


def test_a_prepared_set_needs_its_archives_no_more(tmp_path, monkeypatch):
    expect(monkeypatch, mnist_files())
    place(tmp_path / 'downloads' / 'manual', mnist_files())
    first = datasets.load('tfds:mnist', 'train', str(tmp_path))
    for path in (tmp_path / 'downloads' / 'manual').iterdir():
        path.unlink()
    monkeypatch.setattr(prepare, '_prepare', None)
    again = datasets.load('tfds:mnist', 'train', str(tmp_path))
    assert again.fingerprint == first.fingerprint


def test_a_wrong_archive_is_refused_with_both_checksums(tmp_path, monkeypatch):
    files = mnist_files()
    expect(monkeypatch, files)
    name, data = next(iter(files.items()))
    wrong = data[:-1] + b'!'
    place(tmp_path / 'downloads' / 'manual', files | {name: wrong})
    with pytest.raises(UserError) as error:
        datasets.load('tfds:mnist', 'train', str(tmp_path))
    for part in (name, hashlib.sha256(wrong).hexdigest(), hashlib.sha256(data).hexdigest()):
        assert part in str(error.value)
    assert not (tmp_path / 'mnist').exists()


def test_a_broken_off_preparation_leaves_nothing(tmp_path, monkeypatch):
    files = cifar_files(10)
    expect(monkeypatch, files)
    place(tmp_path / 'downloads' / 'manual', files)
    before = leftovers(tmp_path)
    examples = prepare._examples

    def broken_off(features, split, original, advance):
        yield from list(examples(features, split, original, advance))[:5]
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, '_examples', broken_off)
    with pytest.raises(KeyboardInterrupt):
        datasets.load('tfds:cifar10', 'train', str(tmp_path))
    assert leftovers(tmp_path) == before
    monkeypatch.setattr(prepare, '_examples', examples)
    assert len(datasets.load('tfds:cifar10', 'train', str(tmp_path)).source) == 20


def test_two_processes_prepare_once(tmp_path, monkeypatch):
    expect(monkeypatch, mnist_files())
    place(tmp_path / 'downloads' / 'manual', mnist_files())
    with prepare._quiet():
        late = prepare._find('mnist', tmp_path)  # it saw nothing prepared
    datasets.load('tfds:mnist', 'train', str(tmp_path))
    monkeypatch.setattr(prepare, 'fetch', None)
    prepare._prepare(late, 'mnist', tmp_path)


# Network


class Server(http.server.ThreadingHTTPServer):
    files: dict[str, bytes] = {}  # noqa: RUF012
    broken_off = False


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data = self.server.files.get(self.path[1:])
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.server.broken_off else data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        server.url = f'http://127.0.0.1:{server.server_port}'
        yield server
        server.shutdown()
        thread.join()


def test_archives_are_downloaded_once(server, tmp_path, monkeypatch, capfd):
    server.files = cifar_files(10)
    expect(monkeypatch, server.files, server.url)
    assert len(datasets.load('tfds:cifar10', 'train', str(tmp_path)).source) == 20
    (name,) = server.files
    kept = tmp_path / 'downloads' / 'manual' / 'cifar10' / name
    assert kept.read_bytes() == server.files[name]
    assert name in capfd.readouterr().err  # its progress bar
    server.files = {}
    prepare.fetch([(archives({name: kept.read_bytes()}, server.url)[0], kept)])


@pytest.mark.parametrize(
    ('trouble', 'problem'),
    [
        ('other file', 'got 9 bytes with SHA-256'),
        ('longer file', 'SHA-256'),
        ('broken off', 'SHA-256|failed'),
        ('missing', 'HTTP Error 404'),
    ],
)
def test_a_failed_download_leaves_nothing(trouble, problem, server, tmp_path, monkeypatch):
    files = cifar_files(10)
    (name,) = files
    expect(monkeypatch, files, server.url)
    served = {
        'other file': {name: b'no archive'[:9]},
        'longer file': {name: files[name] + bytes(10_000_000)},
        'broken off': files,
        'missing': {},
    }
    server.files, server.broken_off = served[trouble], trouble == 'broken off'
    with pytest.raises(UserError, match=problem):
        datasets.load('tfds:cifar10', 'train', str(tmp_path))
    assert leftovers(tmp_path) <= {'downloads/manual'}
    server.files, server.broken_off = files, False
    assert len(datasets.load('tfds:cifar10', 'train', str(tmp_path)).source) == 20


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'create_connection', no_network)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        datasets.load('tfds:cifar10', 'train', str(tmp_path / 'data'))
    assert time.monotonic() - start < 5
    message = str(error.value)
    for part in (
        f'not prepared in {tmp_path}/data, a directory that does not exist',
        'www.cs.toronto.edu: no route',
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (170,052,171 bytes)',
        f'as {tmp_path}/data/downloads/manual/cifar-10-binary.tar.gz',
        'TFDS_DATA_DIR',
        'python -m jaxcls.main --config.data.name=digits',
    ):
        assert part in message
    assert leftovers(tmp_path) == set()


def no_network(*_):
    raise OSError('no route')


def test_only_what_is_missing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'create_connection', no_network)
    files = mnist_files()
    expect(monkeypatch, files)
    missing = 't10k-labels-idx1-ubyte.gz'
    del files[missing]
    place(tmp_path / 'downloads' / 'manual', files)
    with pytest.raises(UserError) as error:
        datasets.load('tfds:mnist', 'train', str(tmp_path))
    assert str(error.value).count('ubyte.gz') == str(error.value).count(missing) == 2


def test_other_versions_on_disk_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'create_connection', no_network)
    (tmp_path / 'cifar10_1' / 'v4' / '1.0.0').mkdir(parents=True)
    (tmp_path / 'cifar10_1' / 'v4' / '1.0.0' / 'features.json').write_text('{}')
    monkeypatch.setitem(prepare._READERS, 'cifar10_1', prepare._read_mnist)
    with pytest.raises(UserError, match=r'\(prepared there: cifar10_1/v4/1.0.0\)'):
        datasets.load('tfds:cifar10_1/v6', 'test', str(tmp_path))


def test_a_silent_host_or_resolver_takes_no_longer_than_the_limit(monkeypatch):
    monkeypatch.setattr(download, 'CONNECT_SECONDS', 0.05)
    monkeypatch.setattr(socket, 'create_connection', lambda *_: time.sleep(1) or no_network())
    start = time.monotonic()
    assert download.unreachable('https://example.org/file') == 'no answer in 0.05 s'
    assert time.monotonic() - start < 0.5


def test_a_proxy_is_asked_in_place_of_the_host(server, monkeypatch):
    monkeypatch.setenv('http_proxy', server.url)
    monkeypatch.delenv('no_proxy', raising=False)
    assert download.unreachable('http://host.invalid/file') == ''
    monkeypatch.setenv('no_proxy', 'host.invalid')
    assert download.unreachable('http://host.invalid/file') != ''


# TensorFlow


@pytest.mark.parametrize('name', ['stanford_dogs', 'coco', 'cifar10_corrupted/brightness_1'])
def test_sets_that_need_tensorflow_say_so(name, tmp_path, monkeypatch):
    find = prepare.importlib.util.find_spec
    monkeypatch.setattr(
        prepare.importlib.util, 'find_spec', lambda x: None if x == 'tensorflow' else find(x)
    )
    with pytest.raises(UserError) as error:
        datasets.load(f'tfds:{name}', 'train', str(tmp_path))
    assert "pip install 'jaxcls[tensorflow]'" in str(error.value)
    assert f'tfds build {name} --data_dir={tmp_path}' in str(error.value)
    assert leftovers(tmp_path) == set()


def test_with_tensorflow_tfds_prepares_array_record(tmp_path, monkeypatch):
    calls = []

    def download_and_prepare(**kwargs):
        calls.append(kwargs)
        raise AssertionError('the manual files are missing')

    builder = SimpleNamespace(
        name='dogs',
        url_infos={},
        MANUAL_DOWNLOAD_INSTRUCTIONS='Get it.',
        data_dir=str(tmp_path / 'dogs' / '1.0.0'),
        data_dir_root=tmp_path,
        info=SimpleNamespace(full_name='dogs/1.0.0'),
        is_prepared=lambda: False,
        download_and_prepare=download_and_prepare,
    )
    monkeypatch.setattr(prepare.importlib.util, 'find_spec', lambda name: name)
    with pytest.raises(
        UserError, match=r'could not prepare dogs/1.0.0: the manual files are missing'
    ):
        prepare._prepare(builder, 'dogs', tmp_path)
    assert calls[0]['file_format'] == 'array_record'


# Names


@pytest.mark.parametrize(
    ('name', 'problem'),
    [
        ('cifar11', r'Did you mean cifar10\w* or'),
        ('no_such_thing_at_all', 'neither TFDS knows it nor is it in'),
        ('mnist:1.0.0', 'only: 3.0.1'),
        ('cifar10_corrupted/wobble_1', 'BuilderConfig wobble_1 not found'),
        ('huggingface:mnist', 'community data set'),
        ('mnist/', 'mnist/'),
    ],
)
def test_unknown_names_are_errors_without_a_network(name, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'create_connection', no_network)
    with pytest.raises(UserError, match=problem):
        datasets.load(f'tfds:{name}', 'train', str(tmp_path))


@pytest.mark.parametrize('damage', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize('content', [None, '', '{"name": '])
def test_damaged_descriptions_are_errors(damage, content, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'create_connection', no_network)
    expect(monkeypatch, mnist_files())
    place(tmp_path / 'downloads' / 'manual', mnist_files())
    datasets.load('tfds:mnist', 'train', str(tmp_path))
    path = tmp_path / 'mnist' / '3.0.1' / damage
    path.unlink()
    if content is not None:
        path.write_text(content)
    try:
        split = datasets.load('tfds:mnist', 'train', str(tmp_path))
    except UserError:
        pass
    else:  # TFDS knows the features of MNIST itself
        assert len(split.source) == 20


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    expect(monkeypatch, {})
    (tmp_path / 'downloads').write_text('in the way')
    with pytest.raises(UserError, match="Cannot prepare 'mnist' in"):
        datasets.load('tfds:mnist', 'train', str(tmp_path))
