"""Files to classes: what stands for which files, and what a file that is no image does."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from jaxcls import classify, config, datasets, fit, main, predict, runs
from jaxcls.errors import UserError

pytestmark = pytest.mark.usefixtures('optimized')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    c = config.get_config()
    c.update({'model': {'name': 'linear'}, 'epochs': 2, 'batch_size': 4, 'learning_rate': 0.01})
    fit(c, path)
    return path


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Ten digits in two folders, and a text and a hidden file."""
    root, source = tmp_path_factory.mktemp('digits'), datasets.load('digits', 'test[:10]').source
    (root / 'b').mkdir()
    for i in range(10):
        picture = Image.fromarray(source.images[i].squeeze(-1))
        picture.save(root / f'{"b/" if i % 2 else ""}{i}.png')
    (root / 'notes.txt').write_text('not an image')
    (root / '.hidden.png').write_text('not an image')
    return root


def names(*places):
    return [(file.path.name, file.named) for file in classify.find(places)]


def test_folders_and_globs_stand_for_their_files_in_order(digits):
    below = [f'{i}.png' for i in (0, 2, 4, 6, 8)] + ['notes.txt']
    inner = [f'{i}.png' for i in (1, 3, 5, 7, 9)]
    assert names(digits) == [(name, False) for name in below + inner]
    assert names(f'{digits}/*.png') == [(name, False) for name in below[:-1]]
    assert names(f'{digits}/**/[01].png') == [('0.png', False), ('1.png', False)]
    assert names(digits / '0.png', digits / 'b') == [('0.png', True), *((n, False) for n in inner)]


def test_a_file_named_like_a_glob_is_itself(digits, tmp_path):
    (tmp_path / '[a].png').write_bytes((digits / '0.png').read_bytes())
    assert names(tmp_path / '[a].png') == [('[a].png', True)]


@pytest.mark.parametrize('place', ['nothing*.png', 'empty'])
def test_a_place_without_files_is_a_mistake(tmp_path, place):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='has no files'):
        names(tmp_path / place)


def test_all_files_are_classified_whatever_the_batches(run, digits):
    together = predict(run, [digits])
    assert [r['image'] for r in together if 'problem' in r] == [str(digits / 'notes.txt')]
    found = {row['image']: row['predictions'] for row in together if 'problem' not in row}
    assert len(found) == 10
    for path, guesses in found.items():
        [alone] = predict(run, [path])
        assert [g['class'] for g in alone['predictions']] == [g['class'] for g in guesses]
        probabilities = [[g['probability'] for g in row] for row in (alone['predictions'], guesses)]
        # The logits are float32, and added up in another order by some processors (AVX-512).
        np.testing.assert_allclose(*probabilities, rtol=1e-6, atol=np.finfo(np.float32).eps)


def test_results_come_a_batch_at_a_time(run, digits, monkeypatch):
    opened = runs.open_run(run)
    read = []
    monkeypatch.setattr(
        classify.experiment_lib, 'read_image',
        lambda experiment, path: read.append(path) or np.zeros(experiment.image_shape, np.uint8),
    )  # fmt: skip
    results = classify.classify(opened, classify.find([digits]))
    next(results)
    assert len(read) == opened.experiment.config.batch_size == 4
    assert len(list(results)) == 10 and len(read) == 11


def test_a_named_file_that_is_no_image_is_a_mistake(run, digits):
    with pytest.raises(UserError, match='notes.txt: Not an image'):
        predict(run, [digits / '0.png', digits / 'notes.txt'])
    with pytest.raises(UserError, match='not there'):
        predict(run, [digits / 'nowhere.png'])


def test_csv_has_a_line_an_image_and_names_what_is_left_out(run, digits, capsys):
    assert main.main(['predict', str(run), str(digits), '--csv', '--top=2']) == 0
    out, err = capsys.readouterr()
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ['image', 'class_1', 'probability_1', 'class_2', 'probability_2']
    assert len(rows) == 10 and all(float(row[2]) >= float(row[4]) for row in rows)
    assert 'left out' in err and 'notes.txt' in err
    expected = {
        row['image']: row['predictions'][0]['class'] for row in predict(run, [digits / 'b'])
    }
    assert {row[0]: row[1] for row in rows if row[0] in expected} == expected


def test_only_files_that_are_no_images_is_a_mistake(run, digits, capsys):
    assert main.main(['predict', str(run), f'{digits}/*.txt']) == 2
    assert 'None of the files is an image' in capsys.readouterr().err
