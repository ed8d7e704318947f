"""Explanations of runs: pictures, scores, sanity, boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxcls import attributions, config, datasets, explain, main, results, train
from jaxcls.errors import UserError
from jaxcls.report import gallery


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A net that tells apart two digits of a canvas."""
    settings = config.get_config()
    settings.update({'epochs': 3.0, 'batch_size': 64, 'learning_rate': 0.01})
    settings.data.update({'name': 'canvas', 'train': 'train[:1200]', 'validation': 'test[:200]'})
    settings.model = {'name': 'resnet20', 'stage_sizes': (1,), 'num_filters': 8}
    workdir = tmp_path_factory.mktemp('explained') / 'run'
    train.fit(settings, workdir)
    return workdir


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'digit.png'
    pixels, _ = datasets.load('canvas', 'test').source[5]
    Image.fromarray(pixels[..., 0]).save(path)
    return path


def brightness(_network, image, _label):
    """A method that finds what shines."""
    return image.mean(-1)


class Bright:
    """A network whose first class is as probable as the middle of the image is bright."""

    @staticmethod
    def logits(images):
        middle = images[:, 2:6, 2:6].mean((1, 2, 3))
        return np.stack([8 * middle, np.full(len(images), 2.0)], -1)


def picture():
    image = np.zeros((8, 8, 1), np.float32)
    image[2:6, 2:6] = 1
    return image


def test_deletion_and_insertion_by_hand():
    image, blank = picture(), np.zeros((8, 8, 1), np.float32)
    heat = attributions.heat_map(image)
    good = explain.curve(Bright, image, 0, heat, image, blank)
    bad = explain.curve(Bright, image, 0, 1 - heat, image, blank)
    full = 1 / (1 + np.exp(2 - 8.0))
    np.testing.assert_allclose([good[0], good[-1]], [full, 1 / (1 + np.exp(2.0))], rtol=1e-5)
    assert (np.diff(good) <= 1e-6).all() and explain.area(good) < explain.area(bad)
    # A quarter of the pixels are bright: after them nothing is left to delete.
    np.testing.assert_allclose(good[7], good[-1], rtol=1e-4)
    inserted = explain.curve(Bright, image, 0, heat, blank, image)
    np.testing.assert_allclose(inserted[7], full, rtol=1e-4)
    assert explain.area(np.ones(5)) == 1.0


def test_the_box_of_a_map_is_that_of_its_largest_part():
    heat = np.zeros((10, 20), np.float32)
    heat[2:5, 4:12], heat[8, 18] = 0.5, 1.0
    np.testing.assert_allclose(explain.heat_box(heat, 0.4), [0.2, 0.2, 0.5, 0.6])
    np.testing.assert_allclose(explain.heat_box(heat, 0.6), [0.8, 0.9, 0.9, 0.95])


@pytest.mark.parametrize(
    ('other', 'expected'),
    [((0, 0, 1, 1), 1.0), ((0, 0.5, 1, 1.5), 1 / 3), ((2, 2, 3, 3), 0.0), ((0, 0, 0.5, 0.5), 0.25)],
)
def test_overlap_by_hand(other, expected):
    assert explain.iou(np.array([0.0, 0, 1, 1]), np.array(other)) == pytest.approx(expected)


def test_boxes_of_the_canvas_hold_the_digits():
    boxes = datasets.load_boxes('canvas', 'test[:40]')
    source = datasets.load('canvas', 'test[:40]').source
    assert boxes.shape == (40, 4) and boxes.dtype == np.float32
    for i in range(40):
        top, left, bottom, right = np.round(boxes[i] * 40).astype(int)
        pixels, _ = source[i]
        assert 4 <= bottom - top <= 24 and 2 <= right - left <= 24
        inside = pixels[top:bottom, left:right, 0]
        assert (inside > 64).any(0)[[0, -1]].all() and (inside > 64).any(1)[[0, -1]].all()
    assert datasets.load_boxes('digits', 'test') is None


def test_localisation_of_maps_that_are_right_and_wrong():
    image = np.uint8(255 * picture())
    box, wrong = np.array([[0.25, 0.25, 0.75, 0.75]]), np.array([[0.75, 0.75, 1.0, 1.0]])
    found = explain.localisation(Bright, brightness, [image], [0], box)
    assert (found['iou'], found['known'], found['top1']) == (1.0, 1.0, 1.0)
    assert explain.localisation(Bright, brightness, [image], [1], box)['top1'] == 0.0
    assert explain.localisation(Bright, brightness, [image], [0], wrong)['known'] == 0.0


@pytest.mark.parametrize(
    ('field', 'value'), [('classes', (1, 2)), ('per_class', 3), ('imbalance', 2.0), ('share', 0.5)]
)
def test_boxes_are_those_of_whole_splits(field, value):
    data, split, rows = config.get_config().data, 'test[:40]', np.arange(40)
    data.update({'name': 'canvas', 'train': split})
    loaded = datasets.load('canvas', split)
    expected = datasets.load_boxes('canvas', split)
    np.testing.assert_array_equal(explain._boxes(data, split, 0, loaded, rows), expected)
    data[field] = value
    assert explain._boxes(data, split, 0, loaded, rows) is None


def test_measured_methods_beat_noise(run):
    found = explain.measure(run, ('grad_cam', 'occlusion'), examples=24)
    rows = found['methods']
    assert set(rows) == {'grad_cam', 'occlusion', 'random'} and found['examples'] == 24
    assert rows['grad_cam']['insertion'] > rows['random']['insertion']
    assert rows['occlusion']['insertion'] > rows['random']['insertion']
    # What does not look at the network is alike whatever its weights; noise is drawn anew.
    assert abs(rows['random']['all']) < 0.1
    assert rows['grad_cam']['all'] < 0.9
    assert found['boxes']['grad_cam']['iou'] > found['boxes']['random']['iou']


def test_explains_files(run, image, tmp_path, capsys):
    picture = tmp_path / 'why.png'
    arguments = ['explain', str(run), str(image), '--methods=grad_cam,integrated_gradients']
    assert main.main([*arguments, f'--picture={picture}', '--json']) == 0
    [row] = json.loads(capsys.readouterr().out)['images']
    assert row['class'] in '0123456789' and 0 < row['probability'] <= 1
    assert row['completeness'] < 0.2 and set(row['peak']) == {'grad_cam', 'integrated_gradients'}
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 100
    rows, _ = explain.explain(run, [image], ('grad_cam',), label='7')
    assert rows[0]['class'] == '7' and rows[0]['probability'] < 1


@pytest.mark.parametrize('option', ['--picture=why.png', '--label=7'])
def test_what_is_of_image_files_wants_some(run, option, capsys):
    assert main.main(['explain', str(run), option]) == 2
    assert f'{option.partition("=")[0]} is of image files' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--examples=5', '--threshold=0.5', '--split=test'])
def test_what_is_for_measuring_wants_none(run, image, option, capsys):
    assert main.main(['explain', str(run), str(image), option]) == 2
    assert f'{option.partition("=")[0]} is for measuring' in capsys.readouterr().err


def test_an_overlay_is_a_colour_picture(run):
    image = np.full((8, 8, 1), 255, np.uint8)
    cold, hot = (explain.overlay(image, np.full((8, 8), heat, np.float32)) for heat in (0, 1))
    assert cold.shape == (8, 8, 3) and cold.dtype == np.uint8
    assert hot.astype(int).sum() > cold.astype(int).sum()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'methods': ('grad_can',)}, "Did you mean 'grad_cam'"),
        ({'label': 'seven'}, "--label='seven' is no class"),
        ({'feature': 'pooled'}, 'no feature with rows and columns'),
    ],
)
def test_mistakes(run, image, options, message):
    with pytest.raises(UserError, match=message):
        explain.explain(run, [image], **options)


def test_the_report_shows_where_mistakes_were_seen(run):
    [member] = results.read(run).members
    titles = {section['title']: section for section in gallery.sections(member)}
    shown = titles['What it looked at']['images']
    assert 1 <= len(shown) <= gallery.EXPLAINED and shown[0]['pixels'].shape == (40, 40, 3)
    assert '→' in shown[0]['caption']
