import json

import numpy as np
from PIL import Image

from jaxcls import report

RECORDS = [
    {
        'kind': kind,
        'step': epoch * 10,
        'epoch': float(epoch),
        'loss': loss / epoch,
        'top1': 1 - loss / 4,
    }
    for epoch in (1, 2, 3)
    for kind, loss in (('train', 1.0), ('validation', 2.0))
]


def test_write_leaves_the_result_and_two_pictures(tmp_path):
    names = ['a $b_c$', '<b>', 'x' * 100]  # no text of the data is taken for markup
    (tmp_path / 'data.json').write_text(json.dumps({'class_names': names}))
    confusion = np.array([[5, 1, 0], [0, 4, 0], [0, 0, 0]])
    report.write(tmp_path, confusion, RECORDS)
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['confusion'] == confusion.tolist() and result['best_top1'] == 0.5
    assert result['top1_interval'][0] < 0.9 < result['top1_interval'][1]
    for name in ('curves.png', 'confusion.png'):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


def test_curves_show_training_validation_and_the_gap():
    losses, accuracies = report.curves(RECORDS).axes
    train, validation = losses.lines
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 2 / 3])
    assert len(accuracies.collections) == 1 and accuracies.get_xlabel() == 'epoch'


def test_a_sheet_takes_grey_and_colour_images():
    for channels in (1, 3):
        figure = report.sheet(np.zeros((3, 4, 4, channels)), ['a', 'b\n', 'c'], columns=2)
        assert [axes.get_title() for axes in figure.axes[:3]] == ['a', 'b?', 'c']
