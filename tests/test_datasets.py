import functools
import io
import itertools
import json
import pickle
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxcls import datasets, pipeline
from jaxcls.errors import UserError
from jaxcls.sources import ArraySource, _masked_crc, _tfrecord_spans

IMAGE = 'tensorflow_datasets.core.features.image_feature.Image'
LABEL = 'tensorflow_datasets.core.features.class_label_feature.ClassLabel'
FEATURES = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'
SHAPES = {
    'image': {
        'pythonClassName': IMAGE,
        'image': {'dtype': 'uint8', 'shape': {'dimensions': ['6', '6', '3']}},
    },
    'label': {'pythonClassName': LABEL, 'classLabel': {'numClasses': '3'}},
}
BOX = {
    'pythonClassName': 'tensorflow_datasets.core.features.bounding_boxes.BBoxFeature',
    'boundingBox': {'shape': {'dimensions': ['4']}, 'dtype': 'float32', 'bboxFormat': 'REL_YXYX'},
}
OBJECTS = {
    'pythonClassName': 'tensorflow_datasets.core.features.sequence_feature.Sequence',
    'sequence': {
        'feature': {'pythonClassName': FEATURES, 'featuresDict': {'features': {'bbox': BOX}}},
        'length': '-1',
    },
}


def picture(label: int, size: int = 6, mode: str = 'RGB') -> Image.Image:
    rng = np.random.default_rng(label)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).convert(mode)


def encode(image: Image.Image, format: str = 'PNG', **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def crc32c(data: bytes) -> int:
    """Bit by bit, from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack('<I', ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(path: Path, format: str, records: list[bytes]):
    if format == 'tfrecord':
        lengths = [struct.pack('<Q', len(record)) for record in records]
        frames = [n + masked(n) + r + masked(r) for n, r in zip(lengths, records, strict=True)]
        path.write_bytes(b''.join(frames))
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()


def example(label: int) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    message.features.feature['image'].bytes_list.value.append(encode(picture(label)))
    message.features.feature['label'].int64_list.value.append(label % 3)
    message.features.feature['id'].bytes_list.value.append(b'%d' % label)
    return message.SerializeToString()


def write_tfds(
    root: Path, format: str, shards=(7, 0, 5), features=None, name='shapes', make=example
) -> Path:
    """A data set 'shapes', as TFDS writes it, of 12 training and 3 test examples."""
    directory = root / name / '1.0.0'
    directory.mkdir(parents=True)
    features = features or SHAPES
    content = {'pythonClassName': FEATURES, 'featuresDict': {'features': features}}
    (directory / 'features.json').write_text(json.dumps(content))
    (directory / 'label.labels.txt').write_text('circle\nsquare\nstar')
    splits, number = [], 0
    for split, lengths in (('train', shards), ('test', (3,))):
        template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
        lengths_text = [str(n) for n in lengths]
        splits.append({'name': split, 'shardLengths': lengths_text, 'filepathTemplate': template})
        for i, length in enumerate(lengths):
            path = directory / f'{name}-{split}.{format}-{i:05d}-of-{len(lengths):05d}'
            write_records(path, format, [make(number + k) for k in range(length)])
            number += length
    info = {'name': name, 'version': '1.0.0', 'fileFormat': format, 'splits': splits}
    if 'image' in features:
        keys = [{'featureKey': 'image'}, {'featureKey': 'label'}]
        info['supervisedKeys'] = {'tuple': {'items': keys}}
    (directory / 'dataset_info.json').write_text(json.dumps(info))
    return directory


def write_folder(root: Path, counts: dict[str, int]):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            content = encode(picture(i), 'PNG')
            (root / name / f'{i:03d}.png').write_bytes(content + name.encode())


def write_npz(path: Path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        'x_train': rng.integers(0, 256, (20, 5, 4), np.uint8),
        'y_train': (np.arange(20) % 3).astype(np.uint8),
        'x_test': rng.integers(0, 256, (6, 5, 4), np.uint8),
        'y_test': np.arange(6)[:, None] % 3,
    }
    arrays |= changes
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize('feature', ['bbox', 'objects/bbox'])
def test_boxes_come_in_the_order_of_the_split(tmp_path, feature):
    def boxed(label):
        from tensorflow_datasets.proto import tf_example_pb2

        message = tf_example_pb2.Example.FromString(example(label))
        message.features.feature[feature].float_list.value.extend([0, label / 100, 0.5, 1])
        return message.SerializeToString()

    features = {**SHAPES, 'bbox': BOX} if feature == 'bbox' else {**SHAPES, 'objects': OBJECTS}
    write_tfds(tmp_path, 'array_record', features=features, make=boxed)
    boxes = datasets.load_boxes('tfds:shapes', 'train[3:9]', str(tmp_path))
    np.testing.assert_allclose(boxes[:, 1], np.arange(3, 9) / 100, rtol=1e-6)
    assert (
        boxes.shape == (6, 4)
        and datasets.load('tfds:shapes', 'train', str(tmp_path)).source[4][1] == 1
    )


def test_boxes_move_with_the_crop():
    # Of 20x40 pixels the middle 20x20 are kept.
    boxes = np.array([[0.5, 0.25, 1.0, 0.75], [0.0, 0.0, 1.0, 0.2], [0.25, 0.5, 0.75, 1.0]])
    found = pipeline.boxes_in_crop(boxes, [(20, 40)] * 3, 1.0)
    np.testing.assert_allclose(found, [[0.5, 0, 1, 1], [0, 0, 1, 0], [0.25, 0.5, 0.75, 1]])


@pytest.fixture
def named(tmp_path):
    """Loads, or describes, a data set of each kind: `named(kind, split)`."""
    write_tfds(tmp_path, 'tfrecord')
    write_folder(tmp_path / 'photos', {'cat': 11, 'dog': 14})
    write_folder(tmp_path / 'given' / 'train', {'cat': 11, 'dog': 14})
    write_folder(tmp_path / 'given' / 'val', {'dog': 3})
    write_npz(tmp_path / 'keras.npz')
    names = {
        'tfds': 'tfds:shapes',
        'folder': f'folder:{tmp_path}/photos',
        'given': f'folder:{tmp_path}/given',
        'npz': f'npz:{tmp_path}/keras.npz',
        'digits': 'digits',
    }

    def load(kind: str, split: str, seed: int = 0, call=datasets.load, **subset):
        return call(names[kind], split, str(tmp_path), seed, **subset)

    return load


def everything(source) -> list[tuple[bytes, int]]:
    examples = [source[i] for i in range(len(source))]
    return [(x.tobytes() if isinstance(x, np.ndarray) else x, y) for x, y in examples]


KINDS = ['tfds', 'folder', 'given', 'npz', 'digits']


@pytest.mark.parametrize('kind', KINDS)
def test_slices_part_a_split_in_order(named, kind):
    whole = everything(named(kind, 'train').source)
    assert len(set(whole)) >= len(whole) // 5
    parts = [everything(named(kind, s).source) for s in ('train[:80%]', 'train[80%:]')]
    assert abs(len(parts[0]) - 0.8 * len(whole)) <= 0.5
    assert parts[0] + parts[1] == whole
    assert everything(named(kind, 'train[-3:]+train[1:2]').source) == [*whole[-3:], whole[1]]
    everyone = named(kind, 'all').source
    assert len(everyone) == sum(datasets_sizes(named, kind))


def datasets_sizes(named, kind):
    test = 'val' if kind == 'given' else 'test'
    return [len(named(kind, split).source) for split in ('train', test)]


@pytest.mark.parametrize('kind', KINDS)
def test_sources_are_picklable_and_read_by_index_only(named, kind):
    split = named(kind, 'train[2:9]')
    again = pickle.loads(pickle.dumps(split))
    assert everything(again.source) == everything(split.source)
    assert again.class_names == split.class_names and again.shape == split.shape
    image, label = split.source[np.int64(3)]
    assert type(label) is int and 0 <= label < len(split.class_names)
    decoded = datasets.decode(image, split.shape[2])
    assert decoded.dtype == np.uint8 and decoded.ndim == 3
    assert split.shape[0] == 0 or decoded.shape == split.shape
    assert everything([split.source[-1]]) == everything(split.source)[-1:]
    with pytest.raises(IndexError):
        split.source[7]


@pytest.mark.parametrize('kind', KINDS)
def test_the_fingerprint_is_of_the_data_and_the_slice(named, kind):
    def fingerprint(split):
        return named(kind, split).fingerprint

    assert fingerprint('train') == fingerprint('train[:100%]') == fingerprint('train[0:]')
    assert len({fingerprint(s) for s in ('train', 'train[1:]', 'train[:-1]', 'all')}) == 4


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('part', 'subset'),
    [
        ('train[10%:]', {}),
        ('train', {'classes': (1, 0)}),
        ('train', {'per_class': 2}),
        ('train[10%:]', {'classes': (1, 0), 'per_class': 1}),
        ('train', {'imbalance': 3.0, 'label_noise': 0.5}),
        ('train', {'classes': (1, 0), 'imbalance': 3.0}),
        ('train[10%:]', {'per_class': 3, 'imbalance': 2.0}),
    ],
)
def test_a_description_agrees_with_the_split(named, kind, part, subset):
    split = named(kind, part, **subset)
    described = named(kind, part, call=datasets.describe, **subset)
    assert described == (split.shape, split.class_names, len(split.source))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('part', ['train', 'train[20%:]'])
def test_classes_filter_and_relabel(named, kind, part):
    whole = named(kind, part)
    kept = (len(whole.class_names) - 1, 0)
    split = named(kind, part, classes=kept)
    expected = [(image, kept.index(y)) for image, y in everything(whole.source) if y in kept]
    assert everything(split.source) == expected
    assert split.class_names == tuple(whole.class_names[k] for k in kept)
    assert split.source.labels.dtype == np.int32
    assert list(split.source.labels) == [y for _, y in expected]
    again = pickle.loads(pickle.dumps(split))
    assert everything(again.source) == expected
    assert again.fingerprint == split.fingerprint != whole.fingerprint


@pytest.mark.parametrize('kind', KINDS)
def test_per_class_draws_nested_subsets_by_the_seed(named, kind):
    whole = everything(named(kind, 'train').source)
    classes = tuple(range(len(named(kind, 'train').class_names)))
    subsets = [named(kind, 'train', per_class=n) for n in (1, 2, 3)]
    drawn = [everything(split.source) for split in subsets]
    for n, subset in enumerate(drawn, 1):
        assert sorted(y for _, y in subset) == sorted(classes * n)
        rest = iter(whole)
        assert all(one in rest for one in subset)  # in the order of the split
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    assert everything(named(kind, 'train', per_class=3).source) == drawn[2]
    others = [named(kind, 'train', seed, per_class=3) for seed in (1, 2)]
    assert any(set(everything(other.source)) != set(drawn[2]) for other in others)
    assert len({split.fingerprint for split in subsets + others}) == 5
    # What is drawn of a class does not depend on the other classes.
    few = everything(named(kind, 'train', classes=(1, 0), per_class=2).source)
    assert few == [(image, 1 - y) for image, y in drawn[1] if y in (0, 1)]
    assert everything(pickle.loads(pickle.dumps(subsets[1])).source) == drawn[1]


@pytest.mark.parametrize('kind', KINDS)
def test_a_long_tail_is_nested_in_the_split_and_in_smaller_imbalances(named, kind):
    split = named(kind, 'train')
    whole, sizes = everything(split.source), datasets.class_counts(split)
    tails = [named(kind, 'train', imbalance=x) for x in (1.5, 4.0, 1e6)]
    kept = [everything(tail.source) for tail in tails]
    for imbalance, tail in zip((1.5, 4.0, 1e6), tails, strict=True):
        last = len(sizes) - 1
        wanted = [
            max(1, int(max(sizes) * imbalance ** (-k / last) + 1e-9)) for k in range(last + 1)
        ]
        assert datasets.class_counts(tail) == tuple(map(min, sizes, wanted))
    for larger, smaller in itertools.pairwise([whole, *kept]):
        rest = iter(larger)
        assert all(one in rest for one in smaller)  # in the order of the split
        assert len(smaller) < len(larger)
    others = [named(kind, 'train', seed, imbalance=4.0) for seed in (1, 2)]
    assert any(set(everything(other.source)) != set(kept[1]) for other in others)
    assert len({s.fingerprint for s in (split, *tails, *others)}) == 6
    assert everything(pickle.loads(pickle.dumps(tails[1])).source) == kept[1]
    few = everything(named(kind, 'train', per_class=3, imbalance=3.0).source)
    of_each = everything(named(kind, 'train', per_class=3).source)
    assert set(few) < set(of_each)
    # The first class that is kept is the head.
    turned = named(kind, 'train', classes=(1, 0), per_class=3, imbalance=3.0)
    assert datasets.class_counts(turned) == (3, 1)


def test_the_sizes_of_a_tail_are_those_of_the_papers():
    cifar = datasets.tail_sizes([5000] * 10, 100)
    assert cifar == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50] and sum(cifar) == 12_406
    assert datasets.tail_sizes([500] * 100, 100)[-1] == 5
    assert datasets.tail_sizes([7, 9, 0], 1.0) == [7, 9, 0] and datasets.tail_sizes([4], 9.0) == [4]


@pytest.mark.parametrize('kind', KINDS)
def test_label_noise_makes_a_share_of_the_labels_wrong(named, kind):
    split = named(kind, 'train')
    images, true = zip(*everything(split.source), strict=True)
    true, previous, wrong_before, seen = np.array(true), true, set(), {split.fingerprint}
    for share in (0.2, 0.5, 1.0):
        noisy = named(kind, 'train', label_noise=share)
        assert tuple(image for image, _ in everything(noisy.source)) == images
        labels = np.array([label for _, label in everything(noisy.source)])
        wrong = np.flatnonzero(labels != true)
        assert len(wrong) == round(share * len(true))
        np.testing.assert_array_equal(wrong, datasets.noisy_indices(len(true), share, 0))
        assert wrong_before < set(wrong)
        for i in wrong_before:  # what was wrong stays wrong in the same way
            assert labels[i] == previous[i]
        np.testing.assert_array_equal(noisy.source.labels, labels)
        assert everything(pickle.loads(pickle.dumps(noisy)).source) == everything(noisy.source)
        previous, wrong_before = labels, set(wrong)
        seen.add(noisy.fingerprint)
    other = named(kind, 'train', 1, label_noise=0.5)
    assert len(seen | {other.fingerprint}) == 5


def test_wrong_labels_are_spread_evenly_over_the_other_classes():
    true = datasets.load('digits', 'train').source.labels
    counts = np.zeros((10, 10))
    for seed in range(10):
        noisy = datasets.load('digits', 'train', seed=seed, label_noise=0.5).source.labels
        np.add.at(counts, (true, noisy), 1)
    wrong = counts[~np.eye(10, dtype=bool)]
    expected = 10 * len(true) / 2 / 90
    # Chi-square of 90 places: mean about 89, standard deviation 13.
    assert 50 < ((wrong - expected) ** 2 / expected).sum() < 140
    assert np.diag(counts).sum() == 10 * (len(true) - round(0.5 * len(true)))


@pytest.mark.parametrize('kind', KINDS)
def test_neutral_cuts_change_nothing(named, kind):
    plain, neutral = (
        named(kind, 'train', **cut) for cut in ({}, {'imbalance': 1.0, 'label_noise': 0.0})
    )
    assert neutral.fingerprint == plain.fingerprint
    assert everything(neutral.source) == everything(plain.source)
    few, neutral = (
        named(kind, 'train', per_class=2, **cut)
        for cut in ({}, {'imbalance': 1.0, 'label_noise': 0.0})
    )
    assert neutral.fingerprint == few.fingerprint


def test_noise_follows_the_tail_and_counts_are_of_the_labels_there_are(named):
    noisy = named('digits', 'train', imbalance=10.0, label_noise=0.3)
    clean = named('digits', 'train', imbalance=10.0)
    np.testing.assert_array_equal(noisy.source.images, clean.source.images)
    assert (noisy.source.labels != clean.source.labels).sum() == round(0.3 * len(clean.source))
    assert datasets.class_counts(noisy) == tuple(np.bincount(noisy.source.labels))


def test_a_config_cuts_what_its_training_split_names_and_nothing_else():
    from jaxcls import config, experiment

    fields = {'data': {'imbalance': 10.0, 'label_noise': 0.3, 'train': 'train[:900]'}}
    cut, plain = config.get_config(), config.get_config()
    cut.update(fields)
    for part in ('test', 'train', 'train[:800]'):
        of_plain, of_cut = (experiment.load_split(c, part) for c in (plain, cut))
        assert of_cut.fingerprint == of_plain.fingerprint
    split = experiment.load_split(cut, 'train[:900]')
    expected = datasets.load('digits', 'train[:900]', imbalance=10.0, label_noise=0.3)
    assert split.fingerprint == expected.fingerprint and len(split.source) < 500


def test_data_of_one_class_are_an_error(tmp_path):
    write_npz(tmp_path / 'a.npz', y_train=np.zeros(20, np.uint8), y_test=np.zeros(6, np.uint8))
    for opened in (datasets.load, datasets.describe):
        with pytest.raises(UserError, match='a.npz has the classes 0; there must be two or more'):
            opened(f'npz:{tmp_path}/a.npz', 'train')
    with pytest.raises(UserError, match='has the classes 3; there must be two or more'):
        datasets.load('digits', 'train', classes=(3,))


@pytest.mark.parametrize('kind', KINDS)
def test_an_unknown_split_lists_those_there_are(named, kind):
    size = len(named(kind, 'train').source)
    with pytest.raises(UserError, match=rf"'trian'.*train \({size:,} examples\), \w+ \(\d+ ex"):
        named(kind, 'trian[:5]')


def test_slices_agree_with_tfds():
    import tensorflow_datasets as tfds

    bounds = ['', '0', '7', '-7', '100', '-100', '1_0', '0%', '33%', '-33%', '12.5%', '99.9%']
    specs = [f'train[{a}:{b}]' for a, b in itertools.product(bounds, bounds) if a or b]
    specs += ['train', 'test+train', 'train[:50%] + test[-2:]', 'all']
    chosen = 0
    for train in (100, 101, 7):
        sizes = {'train': train, 'test': 9}
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0)
            for name, n in sizes.items()
        }
        for spec in specs:
            try:
                parts = tfds.core.splits.AbstractSplit.from_spec(spec).to_absolute(infos)
                expected = [
                    (p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to)
                    for p in parts
                ]
                expected = [part for part in expected if part[1] < part[2]]
            except ValueError:
                expected = []
            if expected:
                assert datasets.parse_split(spec, sizes) == expected, spec
                chosen += 1
            else:
                with pytest.raises(UserError, match='The data set has train'):
                    datasets.parse_split(spec, sizes)
    assert chosen > 100


@pytest.mark.parametrize(
    ('spec', 'problem'),
    [
        ('', 'is not written as'),
        ('train[', 'is not written as'),
        ('train[5]', 'is not written as'),
        ('train[:10shard]', 'is not written as'),
        ('train[::2]', 'is not written as'),
        ('train[:1.5]', "bound '1.5', not a number"),
        ('train[:1..5%]', 'not a number'),
        ('train[:101%]', 'beyond the split'),
        ('train[-11:]', 'beyond the split'),
        ('train[5:5]', 'selects no example'),
        ('train[80%:20%]', 'selects no example'),
        ('train+test', "names the split 'test'"),
    ],
)
def test_slices_that_do_not_exist_are_errors(spec, problem):
    with pytest.raises(UserError, match=problem):
        datasets.parse_split(spec, {'train': 10})


@pytest.mark.parametrize('name', ['cifar10', 'tfds:', 'digits:x', 'folder', 'torch:mnist', ''])
def test_unknown_names_list_the_kinds(name):
    with pytest.raises(
        UserError, match='expected tfds:NAME, folder:PATH, npz:PATH, digits or canvas'
    ):
        datasets.load(name, 'train')


@pytest.mark.parametrize(
    ('part', 'subset', 'problem'),
    [
        (
            'train',
            {'classes': (0, 3)},
            r'config.data.classes is \(0, 3\); npz.* classes 0 to 2: give each',
        ),
        ('train', {'classes': (-1, 0)}, 'classes 0 to 2'),
        ('train', {'classes': (1, 1)}, 'keep once'),
        ('train[:1]', {'classes': (1, 2)}, r"'train\[:1\]' has no example of .*\(1, 2\): 1, 2"),
        (
            'train',
            {'per_class': 7},
            "7 examples a class .*per_class.* class '2' has only 6 in 'train'",
        ),
        ('train', {'per_class': 7, 'classes': (1, 2)}, "class '2' has only 6"),
    ],
)
def test_subsets_that_do_not_exist_are_errors(named, part, subset, problem):
    with pytest.raises(UserError, match=problem):
        named('npz', part, **subset)
    if 'per_class' in subset:
        assert len(named('npz', part, per_class=7, classes=(0, 1)).source) == 14


@pytest.mark.parametrize('kind', ['tfds', 'npz'])
def test_resident_and_stream_agree_on_a_subset(named, kind, monkeypatch, tmp_path):
    import jax

    from jaxcls import pipeline, sharding

    monkeypatch.setenv('JAXCLS_CACHE', str(tmp_path / 'cache'))
    mesh = sharding.make_mesh()
    tail = {'imbalance': 2.0, 'label_noise': 0.4}
    for subset in ({'classes': (2, 0)}, {'per_class': 2}, {'per_class': 3}, tail):  # of one cache
        split = named(kind, 'train', **subset)
        examples = len(split.source)
        order = functools.partial(pipeline.training_order, 0, examples, 4)
        reader = pipeline.Reader(split)
        feeds = pipeline.resident(reader, order, mesh), pipeline.stream(reader, order, mesh, 3)
        batches, streamed = (
            jax.device_get(jax.vmap(feed.fetch, (None, 0))(feed.data, feed.items(0, 3)))
            for feed in feeds
        )
        jax.tree.map(np.testing.assert_array_equal, batches, streamed)
        for row in range(4):
            image, label = split.source[order(1)['index'][row]]
            np.testing.assert_array_equal(
                batches['image'][1, row], datasets.decode(image, split.shape[2])
            )
            assert batches['label'][1, row] == label


# Images


@pytest.mark.parametrize(
    ('mode', 'format'),
    [
        *[(mode, 'PNG') for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA')],
        *[(mode, 'JPEG') for mode in ('L', 'RGB', 'CMYK')],
        *[(mode, 'WEBP') for mode in ('L', 'RGB', 'RGBA')],
        *[(mode, 'BMP') for mode in ('1', 'L', 'RGB')],
        *[(mode, 'GIF') for mode in ('L', 'P', 'RGB')],
        *[(mode, 'TIFF') for mode in ('L', 'RGB', 'CMYK')],
    ],
)
def test_every_kind_of_image_becomes_grey_or_rgb(mode, format):
    smooth = np.linspace(30, 220, 16 * 16 * 3).astype(np.uint8).reshape(16, 16, 3)
    source = Image.fromarray(smooth).convert(mode)
    options = {'lossless': True} if format == 'WEBP' else {}
    rgb = datasets.decode(encode(source, format, **options), 3)
    grey = datasets.decode(encode(source, format, **options), 1)
    assert rgb.shape == (16, 16, 3) and grey.shape == (16, 16, 1)
    assert rgb.dtype == grey.dtype == np.uint8
    error = np.abs(rgb.astype(int) - np.asarray(source.convert('RGB')))
    assert error.mean() < (6 if format in ('JPEG', 'GIF') else 0.5)
    assert np.abs(grey[..., 0].astype(int) - np.asarray(source.convert('L'))).mean() < 6


def test_16_bit_greys_keep_their_high_byte():
    values = np.array([[0x0000, 0x00FF, 0xABCD, 0xFFFF]], np.uint16)
    for format in ('PNG', 'TIFF'):
        decoded = datasets.decode(encode(Image.fromarray(values), format), 1)
        np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 0xAB, 0xFF])


def test_transparency_is_laid_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = [0, 255, 128]
    decoded = datasets.decode(encode(Image.fromarray(pixels)), 3)
    np.testing.assert_array_equal(decoded[0, :, 0], [255, 0, 127])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert('P')
    palette.putpalette([10, 20, 30, 40, 50, 60])
    decoded = datasets.decode(encode(palette, transparency=bytes([255, 0])), 3)
    np.testing.assert_array_equal(decoded[0], [[10, 20, 30], [255, 255, 255]])
    np.testing.assert_array_equal(datasets.decode(encode(Image.fromarray(pixels)), 4), pixels)


def test_exif_orientation_is_applied_and_broken_exif_ignored():
    image = Image.fromarray(np.arange(2 * 3, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright = datasets.decode(encode(image, exif=exif), 1)
    np.testing.assert_array_equal(upright[..., 0], np.rot90(np.asarray(image), -1))
    broken = datasets.decode(encode(picture(0), 'JPEG', exif=b'Exif\0\0nonsense'), 3)
    assert broken.shape == (6, 6, 3)


@pytest.mark.parametrize('large, alone', [(100, True), (10_000, False)])
def test_threads_decode_large_images_one_at_a_time(monkeypatch, large, alone):
    file, decoding, seen = io.BytesIO(), set(), []
    Image.new('RGB', (20, 20)).save(file, 'PNG')

    def slow(picture, mode):
        decoding.add(id(picture))
        time.sleep(0.05)
        seen.append(len(decoding))
        decoding.remove(id(picture))
        return picture

    monkeypatch.setattr(datasets, '_LARGE', large)
    monkeypatch.setattr(datasets, '_converted', slow)
    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(lambda _: datasets.decode(file.getvalue(), 3), range(4)))
    assert len(images) == 4 and (max(seen) == 1) == alone


def png_header(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    ihdr = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + ihdr + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


@pytest.mark.parametrize('side', [7_100, 10_000, 60_000])
def test_huge_images_are_refused_by_their_header(side):
    with pytest.raises(UserError, match='expected at most 50,000,000'):
        datasets.decode(png_header(side, side), 3)


@pytest.mark.parametrize(
    'damage',
    [
        lambda _: b'',
        lambda _: b'not an image',
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + bytes(40) + data[100:],
    ],
)
@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'GIF'])
def test_damaged_images_are_user_errors_or_whole(damage, format):
    data = damage(encode(picture(0, 40), format))
    try:
        decoded = datasets.decode(data, 3)
    except UserError as e:
        assert 'Not an image that can be decoded' in str(e)
    else:  # JPEG bears changed bytes
        assert decoded.shape == (40, 40, 3) and len(data) > 100


def test_arrays_get_the_channels_asked_for():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    np.testing.assert_array_equal(datasets.decode(grey, 3), np.repeat(grey, 3, -1))
    assert datasets.decode(grey, 1) is grey
    white = np.full((2, 2, 3), 255, np.uint8)
    np.testing.assert_array_equal(datasets.decode(white, 1), np.full((2, 2, 1), 255))


# Digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    source = datasets.load('digits', 'all').source
    theirs = load_digits()
    ours = {(image.tobytes(), label) for image, label in source}
    pixels = np.rint(theirs.images * (255 / 16)).astype(np.uint8)
    assert ours == {(x.tobytes(), int(y)) for x, y in zip(pixels, theirs.target, strict=True)}


def test_digits_are_split_once_and_for_all():
    splits = {name: datasets.load('digits', name) for name in ('train', 'test')}
    assert datasets.splits('digits') == {'train': 1437, 'test': 360}
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted(
        (np.rint(x * 255 / 16).astype(np.uint8).tobytes(), y)
        for x, y in zip(pixels, labels, strict=True)
    )
    got = everything(splits['train'].source) + everything(splits['test'].source)
    assert sorted(got) == expected
    counts = np.bincount(splits['test'].source.labels)
    assert np.abs(counts - np.bincount(labels) / 5).max() <= 1
    assert np.bincount(splits['train'].source.labels[:200]).min() > 5  # in no order of classes
    other = datasets.load('digits', 'test', seed=7)
    assert everything(other.source) == everything(splits['test'].source)
    assert isinstance(other.source, ArraySource) and other.source.images.max() == 255


# Folders


def test_given_splits_share_the_labels_of_train(tmp_path):
    write_folder(tmp_path / 'train', {'b': 4, 'a': 3, 'c': 2})
    write_folder(tmp_path / 'val', {'c': 5})
    name = f'folder:{tmp_path}'
    assert datasets.splits(name) == {'train': 9, 'val': 5}
    train, val = datasets.load(name, 'train'), datasets.load(name, 'val')
    assert train.class_names == val.class_names == ('a', 'b', 'c') and train.shape == (0, 0, 3)
    assert {label for _, label in everything(val.source)} == {2}
    for content, label in everything(train.source):
        assert content.endswith(train.class_names[label].encode())
    np.testing.assert_array_equal(train.source.labels, [y for _, y in everything(train.source)])


def test_unsplit_folders_are_split_by_the_seed(tmp_path):
    write_folder(tmp_path, {'a': 40, 'b': 20, 'c': 20})
    name = f'folder:{tmp_path}'
    train, test = datasets.load(name, 'train'), datasets.load(name, 'test')
    assert list(np.bincount(test.source.labels)) == [4, 2, 2]
    assert len(train.source) == 72
    assert set(train.source.paths).isdisjoint(test.source.paths)
    again = datasets.load(name, 'test', seed=0)
    other = datasets.load(name, 'test', seed=1)
    assert again.source.paths == test.source.paths and again.fingerprint == test.fingerprint
    assert set(other.source.paths) != set(test.source.paths)
    assert other.fingerprint != test.fingerprint
    half = datasets.load(name, 'train[:50%]').source.labels
    assert set(half) == {0, 1, 2}  # slices are not sorted by class


def test_other_files_are_passed_over(tmp_path):
    write_folder(tmp_path, {'a': 3, 'b': 3, '.cache': 1, '__MACOSX': 2})
    for name in ('.DS_Store', '._x.png', 'Thumbs.db', 'notes.txt'):
        (tmp_path / 'a' / name).write_bytes(b'x')
    (tmp_path / 'readme.txt').write_text('x')
    (tmp_path / 'a' / 'deep').mkdir()
    (tmp_path / 'a' / 'deep' / 'x.JPG').write_bytes(encode(picture(0), 'JPEG'))
    split = datasets.load(f'folder:{tmp_path}', 'all')
    assert split.class_names == ('a', 'b') and len(split.source) == 7


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path):
    write_folder(tmp_path / 'train', {'a': 3, 'b': 3})

    def fingerprint():
        return datasets.load(f'folder:{tmp_path}', 'train').fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (tmp_path / 'train/a/000.png').rename(tmp_path / 'train/b/100.png')
    seen.append(fingerprint())
    (tmp_path / 'train/b/100.png').write_bytes(b'x')
    seen.append(fingerprint())
    (tmp_path / 'train/b').rename(tmp_path / 'train/c')
    seen.append(fingerprint())
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ('tree', 'problem'),
    [
        ({}, 'got none'),
        ({'cat': 3}, 'at least 2 class directories, got cat'),
        ({'cat': 3, 'dog': 0, 'owl': 0}, 'got none of dog, owl'),
        ({'train/cat': 2, 'train/dog': 0}, 'got none of dog'),
        (
            {'train/cat': 2, 'train/dog': 1, 'val/dgo': 1, 'val/cat': 1},
            r'val has the classes dgo, which .*train lacks: it has cat, dog',
        ),
    ],
)
def test_folders_without_what_it_takes_are_errors(tmp_path, tree, problem):
    write_folder(tmp_path, tree)
    with pytest.raises(UserError, match=problem):
        datasets.load(f'folder:{tmp_path}', 'train')


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match='there is no directory'):
        datasets.load(f'folder:{tmp_path}/nowhere', 'train')


# NPZ


@pytest.mark.parametrize('channels', [None, 1, 3])
def test_npz_files_of_keras(tmp_path, channels):
    rng = np.random.default_rng(1)
    shape = (5, 4) if channels is None else (5, 4, channels)
    images = {
        n: rng.integers(0, 256, (k, *shape), np.uint8) for n, k in (('train', 20), ('test', 6))
    }
    write_npz(tmp_path / 'a.npz', x_train=images['train'], x_test=images['test'])
    name = f'npz:{tmp_path}/a.npz'
    assert datasets.splits(name) == {'train': 20, 'test': 6}
    split = datasets.load(name, 'test')
    assert split.shape == (5, 4, channels or 1) and split.class_names == ('0', '1', '2')
    np.testing.assert_array_equal(split.source.images, images['test'].reshape(6, *split.shape))
    np.testing.assert_array_equal(split.source.labels, np.arange(6) % 3)
    assert split.source.labels.dtype == np.int32
    assert len(pickle.dumps(split)) < 1000 < split.source.images.size * 10


def test_npz_files_may_name_their_classes(tmp_path):
    write_npz(tmp_path / 'a.npz', class_names=np.array(['x', 'y', 'z', 'unused']))
    assert datasets.load(f'npz:{tmp_path}/a.npz', 'train').class_names == ('x', 'y', 'z', 'unused')


def test_the_fingerprint_of_an_npz_follows_its_pixels(tmp_path):
    path = tmp_path / 'a.npz'
    write_npz(path)
    first = datasets.load(f'npz:{path}', 'train').fingerprint
    with np.load(path) as arrays:
        images = arrays['x_train'].copy()
    images[3, 2, 1] ^= 1
    write_npz(path, x_train=images)
    assert datasets.load(f'npz:{path}', 'train').fingerprint != first
    write_npz(path)
    assert datasets.load(f'npz:{path}', 'train').fingerprint == first


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ('a pickle was run',))


@pytest.mark.parametrize(
    ('changes', 'problem'),
    [
        ({'x_train': np.zeros((20, 5, 4), np.float32)}, r'float32 \[20, 5, 4\].*round\(\).astype'),
        ({'x_train': np.zeros((20, 5), np.uint8)}, r'x_train uint8 \[20, 5\]'),
        ({'x_train': np.zeros((20, 3, 8, 8), np.uint8)}, r'expected uint8 \[N, H, W\]'),
        ({'x_train': np.zeros((19, 5, 4), np.uint8)}, r'\[19, 5, 4\] and y_train uint8 \[20\]'),
        ({'x_train': np.zeros((20, 5, 5), np.uint8)}, 'expected one shape'),
        ({'y_train': np.zeros((20, 3), np.uint8)}, r'y_train uint8 \[20, 3\]'),
        ({'y_train': np.zeros(20)}, r'y_train float64'),
        ({'y_train': np.full(20, -1)}, 'labels from -1 to 2, expected 0 to K - 1'),
        ({'class_names': np.array(['a', 'b'])}, 'labels from 0 to 2, .* for the 2 class_names'),
        ({'x_train': np.array([Exploit()] * 20, object)}, r'x_train object \[20\]'),
        ({'y_train': np.array([Exploit()] * 20, object)}, r'y_train object \[20\]'),
        ({'class_names': np.array([Exploit()] * 3, object)}, 'class_names .* cannot be read'),
        ({'x_train': None, 'y_test': None}, 'has the arrays y_train, x_test, expected x_train'),
    ],
)
def test_npz_files_that_differ_are_errors(tmp_path, changes, problem):
    write_npz(tmp_path / 'a.npz', **changes)
    with pytest.raises(UserError, match=problem):
        datasets.load(f'npz:{tmp_path}/a.npz', 'train')


@pytest.mark.parametrize('kind', ['folder', 'npz'])
def test_paths_that_the_system_does_not_take_are_errors(kind):
    with pytest.raises(UserError, match='Write the path in full'):
        datasets.load(f'{kind}:~nobody_of_that_name/a', 'train')
    with pytest.raises(UserError, match='File name too long'):
        datasets.load(f'{kind}:{"a" * 300}', 'train')


def test_a_label_that_is_no_class_is_an_error(tmp_path):
    write_npz(tmp_path / 'a.npz', y_train=np.arange(20) * 10**14)
    with pytest.raises(UserError, match='expected 0 to K - 1, K at most 1,000,000'):
        datasets.load(f'npz:{tmp_path}/a.npz', 'train')


def test_damaged_npz_files_are_errors(tmp_path):
    path = tmp_path / 'a.npz'
    with pytest.raises(UserError, match='there is no such file'):
        datasets.load(f'npz:{path}', 'train')
    write_npz(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match='is not an npz file'):
        datasets.load(f'npz:{path}', 'train')
    labels = np.arange(20, dtype=np.uint8) % 2
    np.savez(path, x_train=np.zeros((20, 50, 40), np.uint8), y_train=labels)
    whole = path.read_bytes()
    path.write_bytes(whole[:30_000] + b'x' + whole[30_001:])
    with pytest.raises(UserError, match=r'x_train of .* cannot be read'):
        datasets.load(f'npz:{path}', 'train')


# TFDS


@pytest.mark.parametrize('format', ['tfrecord', 'array_record'])
def test_prepared_tfds_sets_are_read_in_both_formats(tmp_path, format):
    write_tfds(tmp_path, format)
    assert datasets.splits('tfds:shapes', str(tmp_path)) == {'train': 12, 'test': 3}
    split = datasets.load('tfds:shapes', 'all', str(tmp_path))
    assert split.class_names == ('circle', 'square', 'star') and split.shape == (6, 6, 3)
    expected = [(encode(picture(i)), i % 3) for i in range(15)]
    assert everything(split.source) == expected
    order = [3, 14, 0, 7, 6, 13, 3]
    assert [split.source[i] for i in order] == [expected[i] for i in order]
    versioned = datasets.load('tfds:shapes:1.0.0', 'train', str(tmp_path))
    assert everything(versioned.source) == expected[:12]


def test_the_crc_is_the_one_of_tfrecord():
    assert crc32c(b'123456789') == 0xE3069283  # the check value of CRC-32C
    for data in (b'', b'123456789', bytes(range(256))):
        assert _masked_crc(data) == masked(data)


def test_worker_processes_need_neither_jax_nor_tensorflow(tmp_path):
    write_tfds(tmp_path, 'array_record')
    split = datasets.load('tfds:shapes', 'train[2:]', str(tmp_path))
    (tmp_path / 'split.pkl').write_bytes(pickle.dumps(split))
    code = """
import pickle, sys
split = pickle.loads(open(sys.argv[1], 'rb').read())
print([split.source[i][1] for i in range(len(split.source))])
assert not {'jax', 'tensorflow', 'sklearn', 'rich'} & set(sys.modules)
"""
    command = [sys.executable, '-c', code, str(tmp_path / 'split.pkl')]
    root = Path(datasets.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([i % 3 for i in range(2, 12)]), done.stderr


@pytest.mark.parametrize('format', ['tfrecord', 'array_record'])
@pytest.mark.parametrize('keep', [0.0, 0.4, 0.97])
def test_a_cut_file_is_an_error(tmp_path, format, keep):
    shard = write_tfds(tmp_path, format) / f'shapes-train.{format}-00002-of-00003'
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data))])
    source = datasets.load('tfds:shapes', 'train', str(tmp_path)).source
    assert source[6][1] == 0  # in the first shard
    with pytest.raises(UserError, match=r'00002-of-00003 .*damaged'):
        source[7]


def test_every_flipped_bit_of_a_length_is_noticed(tmp_path):
    path = tmp_path / 'a.tfrecord'
    write_records(path, 'tfrecord', [example(0)])
    data = path.read_bytes()
    for bit in range(12 * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match='damaged at byte 0'):
            _tfrecord_spans.__wrapped__(str(path))


def test_files_that_lack_or_mislabel_records_are_errors(tmp_path):
    directory = write_tfds(tmp_path, 'tfrecord', shards=(4,))
    shard = directory / 'shapes-train.tfrecord-00000-of-00001'
    write_records(shard, 'tfrecord', [example(0), b'nonsense', b'', example(1)])
    info = directory / 'dataset_info.json'
    info.write_text(info.read_text().replace('"numClasses": "3"', '"numClasses": "1"'))
    source = datasets.load('tfds:shapes', 'train', str(tmp_path)).source
    assert source[0][1] == 0 and source[3][1] == 1
    with pytest.raises(UserError, match=r'Record 1 .*not a tf.train.Example'):
        source[1]
    with pytest.raises(UserError, match=r"Record 2 .*features \[\], expected \['image', 'label'\]"):
        source[2]
    shard.unlink()
    with pytest.raises(UserError, match=r'train.tfrecord-00000-of-00001 is missing'):
        datasets.load('tfds:shapes', 'train', str(tmp_path))


def test_labels_outside_the_classes_are_errors(tmp_path):
    directory = write_tfds(tmp_path, 'tfrecord')
    features = directory / 'features.json'
    features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    (directory / 'label.labels.txt').write_text('circle\nsquare')
    source = datasets.load('tfds:shapes', 'train', str(tmp_path)).source
    with pytest.raises(UserError, match='has the label 2, expected 0 to 1'):
        source[2]


SCALAR = {'pythonClassName': 'tensorflow_datasets.core.features.scalar.Scalar'}
SCALAR |= {'tensor': {'dtype': 'int64', 'encoding': 'none', 'shape': {}}}


def test_sets_that_are_not_for_classification_are_errors(tmp_path):
    write_tfds(tmp_path, 'tfrecord', features={'age': SCALAR, 'height': SCALAR})
    with pytest.raises(UserError, match=r'expected one Image .*got age \(Scalar\), height'):
        datasets.load('tfds:shapes', 'train', str(tmp_path))


@pytest.mark.parametrize(
    ('dtype', 'shape', 'expected'),
    [
        ('uint8', ['-1', '-1', '3'], (0, 0, 3)),
        ('uint8', ['6', '6', '1'], (6, 6, 1)),
        ('uint16', ['6', '6', '4'], (6, 6, 4)),
        ('uint8', ['6', '6', '-1'], (6, 6, 3)),
    ],
)
def test_the_shape_is_the_one_of_the_feature(tmp_path, dtype, shape, expected):
    image = {'dtype': dtype, 'shape': {'dimensions': shape}}
    features = {
        'image': {'pythonClassName': IMAGE, 'image': image},
        'label': {'pythonClassName': LABEL, 'classLabel': {'numClasses': '3'}},
        'age': SCALAR,
    }
    write_tfds(tmp_path, 'tfrecord', features=features)
    assert datasets.load('tfds:shapes', 'train', str(tmp_path)).shape == expected


def test_images_of_floats_are_errors(tmp_path):
    image = {'dtype': 'float32', 'shape': {'dimensions': ['6', '6', '1']}}
    features = {
        'image': {'pythonClassName': IMAGE, 'image': image},
        'label': {'pythonClassName': LABEL, 'classLabel': {'numClasses': '3'}},
    }
    write_tfds(tmp_path, 'tfrecord', features=features)
    with pytest.raises(UserError, match=r'expected images .* of 8 or 16 bits'):
        datasets.load('tfds:shapes', 'train', str(tmp_path))


def test_the_directory_of_tfds_comes_from_the_environment(tmp_path, monkeypatch):
    write_tfds(tmp_path, 'tfrecord')
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert len(datasets.load('tfds:shapes', 'test').source) == 3


# Real data


@pytest.mark.parametrize(
    ('name', 'sizes', 'shape'),
    [
        ('tfds:mnist', {'train': 60000, 'test': 10000}, (28, 28, 1)),
        ('tfds:cifar10', {'train': 50000, 'test': 10000}, (32, 32, 3)),
    ],
)
def test_real_tfds_sets_equal_what_tfds_reads(data_dir, name, sizes, shape):
    import tensorflow_datasets as tfds

    assert datasets.splits(name, data_dir) == sizes
    split = datasets.load(name, 'train[10%:]', data_dir)
    assert split.shape == shape and len(split.class_names) == 10
    reference = tfds.builder(name[5:], data_dir=data_dir).as_data_source('train[10%:]')
    assert len(reference) == len(split.source)
    for i in (0, 17, 44_999):
        image, label = split.source[i]
        np.testing.assert_array_equal(datasets.decode(image, shape[2]), reference[i]['image'])
        assert label == reference[i]['label']


def test_real_photos(data_dir):
    name = f'folder:{data_dir}/imagenette160'
    assert datasets.splits(name) == {'train': 800, 'val': 200}
    split = datasets.load(name, 'val')
    assert split.class_names[:2] == ('cassette_player', 'chain_saw') and split.shape == (0, 0, 3)
    assert list(np.bincount(split.source.labels)) == [20] * 10
    for i in range(0, 200, 20):
        image = datasets.decode(split.source[i][0], 3)
        assert min(image.shape[:2]) >= 160 and image.shape[2] == 3
