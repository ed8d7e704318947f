import numpy as np
import pytest

from fake_runs import RECORDS
from jaxcls import pictures
from jaxcls.errors import UserError


def test_curves_show_training_validation_and_the_gap():
    losses, accuracies = pictures.curves(RECORDS).axes
    train, validation = losses.lines
    np.testing.assert_allclose(train.get_ydata(), [1, 1 / 2, 1 / 3])
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 2 / 3])
    assert len(accuracies.collections) == 1 and accuracies.get_xlabel() == 'epoch'


def test_curves_without_a_finite_loss_are_drawn(tmp_path):
    records = [{**record, 'loss': np.nan} for record in RECORDS]
    pictures.curves(records).savefig(tmp_path / 'curves.png')


def test_a_sheet_takes_grey_and_colour_images():
    for channels in (1, 3):
        figure = pictures.sheet(np.zeros((3, 4, 4, channels)), ['a', 'b\n', 'c'], columns=2)
        assert [axes.get_title() for axes in figure.axes[:3]] == ['a', 'b?', 'c']


@pytest.mark.parametrize(
    ('name', 'problem'),
    [
        ('none/a.png', 'there is no directory'),
        ('a.txt', 'ends in .*[.]png'),
        ('a', 'ends in .*[.]svg'),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_made(tmp_path, name, problem):
    with pytest.raises(UserError, match=f'{problem}.* Choose another --sheet'):
        pictures.check_place(tmp_path / name, '--sheet')
    pictures.check_place(tmp_path / 'a.PNG', '--sheet')
