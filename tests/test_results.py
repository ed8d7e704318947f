import json

import numpy as np
import pytest
from PIL import Image

from fake_runs import RECORDS
from jaxcls import config as config_lib
from jaxcls import results
from jaxcls.errors import UserError
from jaxcls.predictions import Predictions

NAMES = ['a $b_c$', '<b>', 'x' * 100]  # no text of the data is taken for markup
PREDICTIONS = Predictions(
    np.float32([[3, 1, 0]] * 5 + [[0, 1, 0]] * 5), np.int32([0] * 5 + [0] + [1] * 4)
)


def workdir(path, **config):
    path.mkdir(exist_ok=True)
    full = config_lib.get_config()
    full.update(config)
    (path / 'config.json').write_text(config_lib.to_json(full))
    data = {'class_names': NAMES, 'image_shape': [2, 2, 1], 'examples': {'train': 10, 'test': 10}}
    (path / 'data.json').write_text(json.dumps(data))
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in RECORDS))
    return path


def test_a_run_leaves_its_result_predictions_and_pictures(tmp_path, pictures):
    run = workdir(tmp_path / 'run')
    with pictures():
        results.write(run, PREDICTIONS, RECORDS, {'parameters': 7})
    result = json.loads((run / 'result.json').read_text())
    assert result['confusion'] == [[5, 1, 0], [0, 4, 0], [0, 0, 0]] and result['best_top1'] == 0.5
    assert result['top1_interval'][0] < 0.9 < result['top1_interval'][1]
    assert result['parameters'] == 7 and result['loss'] == RECORDS[-1]['loss']
    for name in ('curves.png', 'confusion.png'):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200


def test_runs_are_read_back_alone_and_as_seeds(tmp_path):
    for seed, accuracy in ((3, 0.8), (4, 0.9)):
        run = workdir(tmp_path / f'seed-{seed}', seed=seed)
        results.write(run, PREDICTIONS, [*RECORDS, {**RECORDS[-1], 'top1': accuracy}])
    workdir(tmp_path, seed=3, seeds=3)
    group = results.read(tmp_path)
    assert [member.config.seed for member in group.members] == [3, 4]
    mean, half = group.mean('top1')
    assert mean == pytest.approx(0.85) and half == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert group.summary()['top1']['values'] == [0.8, 0.9]
    alone = results.read(tmp_path / 'seed-4')
    assert alone.name == 'seed-4' and len(alone.members) == 1
    np.testing.assert_array_equal(alone.members[0].predictions.label, PREDICTIONS.label)
    assert [r['epoch'] for r in alone.members[0].of_kind('validation')] == [1, 2, 3]


def test_what_is_no_run_and_what_has_not_ended_are_user_errors(tmp_path):
    with pytest.raises(UserError, match='not a run'):
        results.read(tmp_path)
    run = workdir(tmp_path / 'run')
    group = results.read(run)
    assert group.members[0].result == {} and np.isnan(group.mean('top1')[0])
    with pytest.raises(UserError, match='has not ended'):
        _ = group.members[0].predictions
    (run / 'metrics.jsonl').unlink()
    with pytest.raises(UserError, match='has not begun'):
        results.read(run)


def test_the_last_epoch_is_of_its_own_records():
    def last_epoch(*epochs):
        values = {'kind': 'train', 'examples': 10.0, 'top1': 1.0}
        records = [{**values, 'epoch': e, 'loss': float(i)} for i, e in enumerate(epochs)]
        return results.Member(None, None, {}, records, {}).last_epoch()['loss']

    assert last_epoch(1.0244, 2.0042) == 1  # the first ends a step late
    assert last_epoch(0.5, 1.0244, 1.5, 2.0042) == 2.5
    assert last_epoch(0.4) == 0 and last_epoch(3.0, 6.0) == 1  # less than an epoch, and more
