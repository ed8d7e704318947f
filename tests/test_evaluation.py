"""What is evaluated, on runs that were never trained; the numbers are tested with the runs of test_train."""

import pytest

import fake_runs
from jaxcls import evaluate
from jaxcls.errors import UserError

KNN = {'model': {'name': 'knn'}}


def test_of_several_seeds_those_that_have_ended_count(tmp_path):
    group = fake_runs.write_group(tmp_path / 'group', [10, 200, 20], **KNN)
    (group / 'seed-1' / 'result.json').unlink()
    found = evaluate(group)
    assert found['seeds'] == 3 and len(found['members']) == 2
    assert found['mean']['top1']['mean'] == pytest.approx(1 - 15 / 360)
    for seed in (0, 2):
        (group / f'seed-{seed}' / 'result.json').unlink()
    nothing_saved = r'None of the 3 seeds of .*group has ended. Repeat its `jaxcls train`.$'
    with pytest.raises(UserError, match=nothing_saved):
        evaluate(group)
    (group / 'seed-2' / 'checkpoints' / '10').mkdir(parents=True)
    with pytest.raises(UserError, match=r'or evaluate one as it is: .*seed-2'):
        evaluate(group)


@pytest.mark.parametrize('option', [{'checkpoint': 'best'}, {'tta': 'flip'}])
def test_a_baseline_has_no_checkpoint_and_no_augmentation(tmp_path, option):
    knn = fake_runs.write(tmp_path / 'knn', 10, **KNN)
    assert evaluate(knn)['top1'] == pytest.approx(1 - 10 / 360)
    with pytest.raises(UserError, match='is a baseline, which has neither checkpoints nor'):
        evaluate(knn, **option)
