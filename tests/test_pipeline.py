import functools
import gc
import io
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcls import config as config_lib
from jaxcls import datasets, experiment, pipeline, sharding
from jaxcls.errors import UserError
from jaxcls.sources import ArraySource, FileSource, select

EXAMPLES, BATCH = 23, 8


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 6, 5, 3), np.uint8)
    labels = np.arange(EXAMPLES, dtype=np.int32) % 4
    return datasets.Split(
        ArraySource(images, labels), ('a', 'b', 'c', 'd'), (6, 5, 3), 'fingerprint'
    )


def training(step):
    return pipeline.training_order(3, EXAMPLES, BATCH, step)


def test_every_example_once_an_epoch_and_every_batch_full():
    orders = [training(step) for step in range(EXAMPLES)]  # BATCH epochs exactly
    index = np.concatenate([order['index'] for order in orders])
    epoch = np.concatenate([order['epoch'] for order in orders])
    for e in range(BATCH):
        assert sorted(index[epoch == e]) == list(range(EXAMPLES))
    assert all(order['mask'].all() for order in orders)
    assert not np.array_equal(index[epoch == 0], index[epoch == 1])


def test_an_order_depends_on_seed_and_step_alone():
    assert all(np.array_equal(training(5)[k], training(5)[k]) for k in training(5))
    other = pipeline.training_order(4, EXAMPLES, BATCH, 5)
    assert not np.array_equal(training(5)['index'], other['index'])


def test_evaluation_covers_every_example_once():
    orders = [pipeline.evaluation_order(EXAMPLES, BATCH, step) for step in range(3)]
    seen = np.concatenate([order['index'][order['mask']] for order in orders])
    assert list(seen) == list(range(EXAMPLES))


def batches(feed, first, last):
    fetch = jax.jit(feed.fetch)
    return [
        jax.device_get(fetch(feed.data, jax.tree.map(lambda x: x[0], feed.items(step, 1))))
        for step in range(first, last)
    ]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize('size', [0, 4])
def test_resident_and_stream_yield_the_same_batches(split, size, monkeypatch, tmp_path):
    monkeypatch.setenv('JAXCLS_CACHE', str(tmp_path))
    mesh, reader = sharding.make_mesh(jax.devices()[:1]), pipeline.Reader(split, size)
    expected = batches(pipeline.resident(reader, training, mesh), 0, 9)
    assert expected[0]['image'].shape == (BATCH, size or 6, size or 5, 3)
    assert_same(batches(pipeline.stream(reader, training, mesh, 9), 0, 9), expected)
    # From the middle, and jumping back.
    feed = pipeline.stream(reader, training, mesh, 9)
    assert_same(batches(feed, 4, 9), expected[4:])
    assert_same(batches(feed, 2, 5), expected[2:5])
    # Many steps in one call.
    many = jax.device_get(feed.items(1, 3)['image'])
    np.testing.assert_array_equal(many, np.stack([b['image'] for b in expected[1:4]]))


def test_worker_processes_yield_the_same_batches(split):
    mesh, reader = sharding.make_mesh(jax.devices()[:1]), pipeline.Reader(split)
    order = functools.partial(pipeline.training_order, 3, EXAMPLES, BATCH)
    expected = batches(pipeline.resident(reader, order, mesh), 2, 7)
    assert_same(batches(pipeline.stream(reader, order, mesh, 7, workers=2), 2, 7), expected)
    # Python would warn of each at the end of the program.
    assert not [o for o in gc.get_objects() if type(o).__name__ == 'SharedMemoryArray']


def test_random_crops_depend_on_the_place_alone(split):
    reader = pipeline.Reader(split, 4, 'random_resized', seed=1)
    first, label = reader(7, position=11)
    assert label == 3 and first.shape == (4, 4, 3)
    np.testing.assert_array_equal(first, reader(7, position=11)[0])
    assert not np.array_equal(first, reader(7, position=12)[0])


def test_random_boxes_have_the_area_and_aspect_of_the_paper():
    rng = np.random.Generator(np.random.Philox(key=[0, 0]))
    boxes = np.array([pipeline.random_box(rng, 300, 400) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 400 and boxes[:, 3].max() <= 300
    area, aspect = width * height / (300 * 400), width / height
    assert 0.075 < area.min() < 0.12 and 0.9 < area.max() <= 1.0
    assert aspect.min() > 0.74 and aspect.max() < 1.35


def test_a_centre_crop_of_the_whole_square_changes_nothing():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    resized = pipeline.resize(Image.fromarray(image), (4, 4), pipeline.center_box(4, 4, 1.0))
    np.testing.assert_array_equal(resized, image)
    assert pipeline.center_box(10, 20, 0.5) == (7.5, 2.5, 12.5, 7.5)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_files_and_arrays_are_resized_alike(channels):
    images = np.random.default_rng(0).integers(0, 256, (1, 9, 12, channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(images[0].squeeze()).save(file, 'PNG')
    for source in ([(file.getvalue(), 2)], ArraySource(images, np.array([2]))):
        split = datasets.Split(source, ('a', 'b', 'c'), (9, 12, channels), '')
        image, label = pipeline.Reader(split, 4, crop_fraction=0.8)(0)
        box = (2.4, 0.9, 9.6, 8.1)
        expected = Image.fromarray(images[0].squeeze()).resize((4, 4), Image.BILINEAR, box=box)
        np.testing.assert_array_equal(image, np.asarray(expected).reshape(4, 4, channels))
        assert label == 2


def test_decoded_splits_are_cached_and_mapped(split, monkeypatch, tmp_path):
    monkeypatch.setenv('JAXCLS_CACHE', str(tmp_path))
    reader = pipeline.Reader(split, 4)
    images, labels = pipeline.load_arrays(reader)
    np.testing.assert_array_equal(labels, split.source.labels)
    monkeypatch.setattr(pipeline, '_decode_to', None)  # a second decoding would fail
    again, _ = pipeline.load_arrays(reader)
    assert isinstance(again, np.memmap)
    np.testing.assert_array_equal(images, again)


def test_a_broken_off_decoding_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv('JAXCLS_CACHE', str(tmp_path))
    broken = datasets.Split([(b'no image', 0), ()], ('a',), (0, 0, 3), 'broken')
    with pytest.raises(ValueError, match='not enough values to unpack'):
        pipeline.load_arrays(pipeline.Reader(broken, 4))
    left = [path for path in tmp_path.rglob('*') if path.is_file() and path.suffix != '.lock']
    assert left == []


BAD = (3, 7, 9)


@pytest.fixture
def damaged(split, monkeypatch, tmp_path):
    """The split as files, of which two are no whole images and one is gone; nothing is cached."""
    monkeypatch.setenv('JAXCLS_CACHE', str(tmp_path / 'cache'))
    pipeline._warn.cache_clear()
    paths = tuple(f'{i}.png' for i in range(EXAMPLES))
    for path, image in zip(paths, split.source.images, strict=True):
        Image.fromarray(image).save(tmp_path / path)
    (tmp_path / '3.png').write_bytes(b'')
    (tmp_path / '7.png').write_bytes((tmp_path / '7.png').read_bytes()[:80])
    (tmp_path / '9.png').unlink()
    source = FileSource(str(tmp_path), paths, split.source.labels, 'content')
    return datasets.Split(source, split.class_names, split.shape, 'damaged')


def warnings_of(reader):
    pipeline._warn.cache_clear()
    with pytest.warns(UserWarning) as seen:
        loaded = pipeline.load_all(reader)
    return [str(warning.message) for warning in seen], loaded


@pytest.mark.filterwarnings('ignore:Left out of training')
@pytest.mark.parametrize('workers', [0, 2])
def test_bad_images_are_masked_alike_in_every_pipeline(damaged, split, workers):
    mesh, reader = sharding.make_mesh(jax.devices()[:1]), pipeline.Reader(damaged, max_bad=0.2)
    order = functools.partial(pipeline.training_order, 3, EXAMPLES, BATCH)
    expected = batches(pipeline.resident(reader, order, mesh), 0, 7)
    assert_same(batches(pipeline.stream(reader, order, mesh, 7, workers), 0, 7), expected)
    for batch in expected:
        bad = np.isin(batch['index'], BAD)
        np.testing.assert_array_equal(batch['mask'], ~bad)
        images = np.where(bad[:, None, None, None], 0, split.source.images[batch['index']])
        np.testing.assert_array_equal(batch['image'], images)
    images, labels = pipeline.load_arrays(reader)
    np.testing.assert_array_equal(images, np.delete(split.source.images, BAD, axis=0))
    np.testing.assert_array_equal(labels, np.delete(split.source.labels, BAD))


def test_a_warm_cache_says_the_same(damaged, monkeypatch, tmp_path):
    reader = pipeline.Reader(damaged, max_bad=0.2)
    first, (_, _, good) = warnings_of(reader)
    assert [f'{tmp_path / f"{i}.png"}: ' in line for i, line in zip(BAD, first, strict=True)]
    assert 'truncated' in first[1] and first[2].endswith('9.png: No such file or directory')
    assert list(np.flatnonzero(~good)) == list(BAD)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, '_decode_to', None)  # a second decoding would fail
        again, (_, _, same) = warnings_of(reader)
        assert again == first and list(same) == list(good)
        pipeline.load_all(reader)  # no warning: once a process
        with pytest.raises(UserError, match=r'3 of 23 .*max_bad_images=0.1 allows 2:\n'):
            pipeline.load_all(reader._replace(max_bad=0.1))
    # A file that is there again is no change of the data, but is read.
    Image.new('RGB', (5, 6)).save(tmp_path / '9.png')
    assert warnings_of(reader)[0] == first[:2]


def test_a_stream_stops_at_the_batch_that_is_over_the_budget(damaged):
    order = functools.partial(pipeline.evaluation_order, EXAMPLES, BATCH)
    mesh, reader = sharding.make_mesh(jax.devices()[:1]), pipeline.Reader(damaged, max_bad=0.1)
    feed = pipeline.stream(reader, order, mesh, 3)
    with pytest.warns(UserWarning) as seen:
        feed.items(0, 1)
    assert len(seen) == 2
    with pytest.raises(UserError, match=r'3 of 23 images .* allows 2:\n(.*\n){3}Mend or remove'):
        feed.items(1, 1)
    feed.close()


@pytest.mark.parametrize('pipe', ['resident', 'stream'])
def test_evaluation_refuses_bad_images_by_path(damaged, pipe, tmp_path):
    part = datasets.Split(select([(damaged.source, 5, 20)]), *list(vars(damaged).values())[1:])
    order = functools.partial(pipeline.evaluation_order, 15, 15)
    mesh, reader = sharding.make_mesh(jax.devices()[:1]), pipeline.Reader(part)
    with pytest.raises(UserError, match='2 of 15 .* an evaluation leaves none out') as refusal:
        if pipe == 'resident':
            pipeline.resident(reader, order, mesh)
        else:
            pipeline.stream(reader, order, mesh, 1).items(0, 1)
    assert all(f'{tmp_path / name}: ' in str(refusal.value) for name in ('7.png', '9.png'))


def test_many_bad_images_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv('JAXCLS_CACHE', str(tmp_path))
    empty = datasets.Split([(b'', 0)] * 150, ('a',), (4, 4, 3), 'empty')
    said, _ = warnings_of(pipeline.Reader(empty, max_bad=1.0))
    assert len(said) == 101 and said[100].startswith('Left out of training: 50 more images')
    with pytest.raises(UserError, match=r'(  example \d: .*\n){10}  and 140 more\n'):
        pipeline.load_all(pipeline.Reader(empty, max_bad=0.99))


@pytest.mark.parametrize(
    ('model', 'fields'),
    [
        ({'name': 'mlp', 'hidden': (8,), 'norm': 'batch'}, {}),
        ({'name': 'linear'}, {'accumulate_steps': 2, 'clip_norm': 1.0, 'sam_rho': 0.1}),
    ],
)
def test_a_wholly_masked_batch_counts_nothing_and_stays_finite(model, fields):
    config = config_lib.get_config()
    config.update(model=model, batch_size=BATCH, **fields)
    built = experiment.build(experiment.resolve(config), (6, 5, 3), 4, EXAMPLES)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), experiment.raw_batch(built))
    state, sums = jax.jit(lambda seed: built.train_step(experiment.init(built, seed), batch))(0)
    assert not any(jax.device_get(sums).values())  # not even as a bad step
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_auto_chooses_by_size(split, monkeypatch):
    reader = pipeline.Reader(split)
    assert pipeline.choose('auto', reader, train=True) == 'resident'
    assert pipeline.choose('stream', reader, train=True) == 'stream'
    monkeypatch.setattr(pipeline, 'RESIDENT_LIMIT', EXAMPLES * 90 - 1)
    assert pipeline.choose('auto', reader, train=True) == 'stream'


def test_images_of_different_sizes_need_a_size(split):
    varying = datasets.Split(split.source, split.class_names, (0, 0, 3), '')
    with pytest.raises(UserError, match=r'set config.data.image_size'):
        pipeline.check_size(varying, 0)
    pipeline.check_size(varying, 32)


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='finds the workers in /proc')
def test_worker_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / 'stream.py'
    script.write_text(
        """
import functools, os
from pathlib import Path
import numpy as np
from jaxcls import datasets, pipeline, sharding

if __name__ == '__main__':
    images = np.zeros((64, 4, 4, 1), np.uint8)
    source = datasets.ArraySource(images, np.zeros(64, np.int32))
    reader = pipeline.Reader(datasets.Split(source, ('a',), (4, 4, 1), ''))

    order = functools.partial(pipeline.training_order, 0, 64, 4)
    feed = pipeline.stream(reader, order, sharding.make_mesh(), 10**6, workers=2)
    feed.items(0, 1)
    def parent(pid):
        return int(Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[1])
    children = [p.name for p in Path('/proc').glob('[0-9]*') if parent(p.name) == os.getpid()]
    spawned = [c for c in children if 'spawn_main' in Path(f'/proc/{c}/cmdline').read_text()]
    print(*spawned, flush=True)
    os.kill(os.getpid(), 9)
"""
    )
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(is_running, workers)):
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False
