import json
import shutil

import pytest

from jaxcls import UserError, fit, main, verify, workdir
from jaxcls import config as config_lib


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    config = config_lib.get_config()
    config.model = {'name': 'linear'}
    config.data.train, config.epochs, config.checkpoint_every_epochs = 'train[:100]', 3.0, 1.0
    return fit(config, tmp_path_factory.mktemp('run')).workdir


def test_every_checkpoint_is_read_and_a_damaged_one_named(run, tmp_path, capsys):
    assert [row['problem'] for row in verify.verify(run)] == ['', '']
    copy = shutil.copytree(run, tmp_path / 'copy')
    newest = max(copy.glob('checkpoints/*'), key=lambda path: int(path.name))
    for file in newest.glob('tree/d/*'):
        file.write_bytes(bytes(file.stat().st_size))
    assert [bool(row['problem']) for row in verify.verify(copy)] == [False, True]
    assert newest.is_dir(), 'verify changes nothing'
    assert main.main(['verify', str(run)]) == 0
    assert capsys.readouterr().out.count('intact') == 2
    assert main.main(['verify', str(copy)]) == 2
    printed = capsys.readouterr()
    assert 'damaged:' in printed.out and '1 of 2 checkpoints are damaged' in printed.err
    assert 'goes on from the newest' in printed.err
    for file in copy.glob('checkpoints/*/tree/d/*'):
        file.write_bytes(bytes(file.stat().st_size))
    assert main.main(['verify', str(copy)]) == 2
    assert f'2 of 2 checkpoints are damaged. None is intact in {copy}' in capsys.readouterr().err
    shutil.rmtree(copy / 'checkpoints')
    for command in ('verify', 'evaluate'):
        assert main.main([command, str(copy)]) == 2
        assert 'whose checkpoints are gone' in capsys.readouterr().err


def test_differences_name_the_record_and_the_array(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / 'copy')
    assert verify.differences(run, copy) == []
    records = workdir.read_metrics(copy)
    records[1]['loss'] += 1e-9
    (copy / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    assert len(verify.differences(run, copy)) == 1
    manifest = next(copy.glob('checkpoints/*/manifest/metadata'))
    manifest = max(copy.glob('checkpoints/*/manifest/metadata'), key=lambda p: int(p.parts[-3]))
    saved = json.loads(manifest.read_text())
    name = next(iter(saved))
    saved[name][-1] ^= 1
    manifest.write_text(json.dumps(saved))
    assert verify.differences(run, copy)[1:] == [name]


@pytest.mark.slow  # rows 1 and 3 of the faults do the same in other ways
def test_a_short_run_that_is_killed_resumes_exactly(tmp_path):
    config = config_lib.get_config()
    config.model, config.data.train = {'name': 'linear'}, 'train[:100]'
    found = verify.resumes(config, tmp_path)
    assert found['differs'] == [] and len(found['killed']) == 2 and found['arrays'] > 5


@pytest.mark.parametrize(
    'argv', [['verify'], ['verify', 'x', '--resume'], ['verify', 'x', '--config.seed=1']]
)
def test_what_is_to_be_verified_has_to_be_clear(argv, capsys):
    assert main.main(argv) == 2
    assert '--resume with a --config' in capsys.readouterr().err


def test_a_directory_without_a_run_is_one_message(tmp_path):
    with pytest.raises(UserError, match='no config.json'):
        verify.verify(tmp_path)
