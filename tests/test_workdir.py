import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from jaxcls import config as config_lib
from jaxcls import fingerprints, sharding, workdir
from jaxcls.errors import UserError

# TensorStore reports the other reads of a damaged checkpoint to an event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def tree():
    return {
        'params': {'kernel': jnp.arange(24.0).reshape(4, 6), 'bias': jnp.ones(6, jnp.bfloat16)},
        'ema': {},
        'step': jnp.int32(7),
        'key': jax.random.key(3),
        'flag': jnp.array([True, False]),
    }


def like(value):
    mesh = sharding.make_mesh(jax.devices()[:1])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), value
    )


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert fingerprints.manifest(first) == fingerprints.manifest(second)


@pytest.fixture
def saved(tmp_path):
    checkpoints = workdir.Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {**tree(), 'step': jnp.int32(step)}, {'top1': 0.5})
    checkpoints.close()
    return tmp_path


def restore(path, step=None):
    checkpoints = workdir.Checkpoints(path)
    try:
        return checkpoints.restore(like(tree()), step)
    finally:
        checkpoints.close()


def test_a_checkpoint_restores_bit_for_bit(saved):
    restored = restore(saved)
    assert restored.step == 3
    assert_same(restored.tree, {**tree(), 'step': jnp.int32(3)})
    assert restore(saved, 2).step == 2


def test_nothing_saved_restores_nothing(tmp_path):
    assert restore(tmp_path) is None


def damage(directory, how):
    """Damages every array file of a step."""
    files = [
        path for path in (directory / 'tree').rglob('*') if path.is_file() and path.stat().st_size
    ]
    data = [path for path in files if '/d/' in str(path)]
    assert data
    for path in data:
        content = bytearray(path.read_bytes())
        if how == 'flip':
            content[len(content) // 2] ^= 16
        path.write_bytes(content[: len(content) // 2] if how == 'truncate' else content)


@pytest.mark.parametrize('how', ['flip', 'truncate', 'empty'])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(saved, how):
    newest = saved / 'checkpoints' / '3'
    if how == 'empty':
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        damage(newest, how)
    with pytest.warns(
        UserWarning, match=r'Checkpoint of step 3 is damaged .*; it is now damaged-3-0'
    ):
        restored = restore(saved)
    assert restored.step == 2
    assert_same(restored.tree, {**tree(), 'step': jnp.int32(2)})
    assert (saved / 'damaged-3-0').is_dir() and not newest.exists()


def test_reads_that_a_failed_one_cancelled_say_nothing(saved, monkeypatch):
    class Store:
        async def _get_array_metadatas(self):
            return None

    def fail(self, step, like):
        Store()._get_array_metadatas()
        raise ValueError('truncated')

    monkeypatch.setattr(workdir.Checkpoints, '_restore_verified', fail)
    with pytest.raises(UserError, match='truncated'), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        restore(saved)
    assert not seen


def test_no_intact_checkpoint_is_an_error_every_time_and_nothing_is_renamed(saved):
    for step in (1, 2, 3):
        damage(saved / 'checkpoints' / str(step), 'flip')
    for _ in range(2):
        with pytest.raises(UserError, match='No intact checkpoint'):
            restore(saved)
    assert sorted(path.name for path in (saved / 'checkpoints').iterdir()) == ['1', '2', '3']


def test_checkpoints_of_another_model_are_not_taken_for_damaged(saved):
    other = {**tree(), 'params': {'kernel': jnp.zeros((5, 5)), 'bias': jnp.ones(6, jnp.bfloat16)}}
    checkpoints = workdir.Checkpoints(saved)
    with pytest.raises(UserError, match=r"kernel.*\[5, 5\].*was saved as \[\[4, 6\], 'float32'\]"):
        checkpoints.restore(like(other))
    checkpoints.close()
    assert restore(saved).step == 3


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    checkpoints = workdir.Checkpoints(tmp_path, keep=1)
    for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.4)):
        checkpoints.save(step, tree(), {'top1': top1})
    checkpoints.save(5, tree())
    checkpoints.wait()
    records = [{'kind': 'validation', 'step': s, 'top1': t} for s, t in ((2, 0.9), (4, 0.4))]
    assert sorted(checkpoints.manager.all_steps()) == [2, 5]
    assert checkpoints.find('best', records) == 2
    assert checkpoints.find('latest', records) is None
    assert checkpoints.find('5', records) == 5
    assert checkpoints.find(5, records) == 5
    with pytest.raises(UserError, match=r"No checkpoint '4' .* steps \[2, 5\]"):
        checkpoints.find('4', records)
    checkpoints.close()


def test_metrics_are_rewound_to_a_step_and_cut_lines_dropped(tmp_path):
    for step in (1, 2, 3):
        workdir.append_metrics(tmp_path, {'kind': 'train', 'step': step})
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "tr')
    assert [record['step'] for record in workdir.read_metrics(tmp_path)] == [1, 2, 3]
    records, dropped = workdir.rewind_metrics(tmp_path, 2)
    assert [record['step'] for record in records] == [1, 2] and dropped == 1
    workdir.append_metrics(tmp_path, {'kind': 'train', 'step': 3})
    assert [record['step'] for record in workdir.read_metrics(tmp_path)] == [1, 2, 3]


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    workdir.append_metrics(tmp_path, {'kind': 'train', 'step': 1})
    before = (tmp_path / 'metrics.jsonl').read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot be written: No space left on device. Make room'):
        workdir.append_metrics(tmp_path, {'kind': 'train', 'step': 2})
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize(
    ('processes', 'error', 'raised'),
    [
        (1, 'no room', 'cannot be written: no room.*No step is saved'),
        (2, 'timed out in a barrier', '^t'),
    ],
)
def test_where_another_process_does_not_save_the_disk_is_not_blamed(
    processes, error, raised, tmp_path, monkeypatch
):
    with contextlib.closing(workdir.Checkpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(jax, 'process_count', lambda: processes)
        with pytest.raises((UserError, TimeoutError), match=raised), checkpoints._saving():
            raise TimeoutError(error)
        assert bool(sharding.lost(TimeoutError(error))) == (processes == 2)
        monkeypatch.undo()


def test_a_process_that_cannot_save_says_why_it_came_to_no_barrier(tmp_path, monkeypatch):
    with contextlib.closing(workdir.Checkpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(jax, 'process_count', lambda: 2)
        with pytest.raises(UserError, match='cannot be written: no room'), checkpoints._saving():
            try:
                raise ValueError('no room')
            except ValueError:
                raise TimeoutError('Barrier timed out')  # noqa: B904
        monkeypatch.undo()


def die(path, start, step):
    with pytest.raises(ZeroDivisionError), workdir.attempt(path, start) as begin_step:
        for i in range(start + 1, step + 1):
            begin_step(i)
        1 / 0  # noqa: B018


def test_three_deaths_in_one_step_are_enough(tmp_path):
    for start, step in ((0, 7), (4, 12), (4, 7), (4, 12), (4, 12), (4, 12)):
        die(tmp_path, start, step)
    with pytest.raises(UserError, match='went on from step 4 and died in step 12, each'):
        workdir.attempt(tmp_path, 4).__enter__()
    with workdir.attempt(tmp_path, 8):  # a later checkpoint
        pass
    assert not (tmp_path / '.attempts').exists()
    for end in (UserError('mend it'), None):
        for _ in range(2):
            die(tmp_path, 4, 12)
        with contextlib.suppress(UserError), workdir.attempt(tmp_path, 4) as begin_step:
            begin_step(12)
            if end:
                raise end
        assert not (tmp_path / '.attempts').exists()


DATA = {'class_names': ('a', 'b'), 'image_shape': (8, 8, 1), 'examples': {'train': 3}}


def begin(path, config, data=DATA):
    workdir.start(path, config, data)
    workdir.append_metrics(path, {'kind': 'train', 'step': 1})


def test_another_config_is_refused_with_the_differences(tmp_path):
    config = config_lib.get_config()
    begin(tmp_path, config)
    workdir.start(tmp_path, config, DATA)
    assert config_lib.differences(workdir.read_config(tmp_path), config) == {}
    assert json.loads((tmp_path / 'environment.json').read_text())['jax'] == jax.__version__
    config.epochs = 3.0
    with pytest.raises(UserError, match=r'epochs: 20.0 there, 3.0 now'):
        workdir.start(tmp_path, config, DATA)


def test_other_data_are_refused_with_the_differences(tmp_path):
    config = config_lib.get_config()
    begin(tmp_path, config)
    with pytest.raises(UserError, match=r"class_names: \['a', 'b'\] then, \['a', 'c'\] now"):
        workdir.start(tmp_path, config, {**DATA, 'class_names': ('a', 'c')})


def test_a_run_that_has_not_begun_may_change_its_config(tmp_path):
    config = config_lib.get_config()
    for name in ('environment.json', 'data.json'):
        workdir.write_json(tmp_path / name, {})  # killed before config.json
    workdir.start(tmp_path, config, DATA)
    config.epochs = 3.0
    workdir.start(tmp_path, config, DATA)
    assert workdir.read_config(tmp_path).epochs == 3.0


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / 'thesis.tex').write_text('')
    with pytest.raises(UserError, match='holds files but no run'):
        workdir.start(tmp_path, config_lib.get_config(), DATA)
    with pytest.raises(UserError, match='is not a run'):
        workdir.read_config(tmp_path)
    with pytest.raises(UserError, match='characters'):
        workdir.check(tmp_path / 'a[1]', config_lib.get_config())


@pytest.mark.parametrize(
    ('name', 'text', 'read'),
    [
        ('config.json', '[]', workdir.read_config),
        ('config.json', 'null', workdir.read_config),
        ('config.json', '{', workdir.read_config),
        ('data.json', '{}', workdir.read_data),
        ('data.json', '3', workdir.read_data),
        ('metrics.jsonl', '{"step": 1}\nx\n', workdir.read_metrics),
    ],
)
def test_damaged_files_are_one_message(tmp_path, name, text, read):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f'{name} is damaged'):
        read(tmp_path)


def test_a_directory_in_use_is_refused_until_its_process_is_gone(tmp_path):
    hold = (
        'import pathlib, sys, time\nfrom jaxcls import workdir\n'
        'with workdir.locked(pathlib.Path(sys.argv[1])):\n    print("held", flush=True)\n    time.sleep(60)'
    )
    other = subprocess.Popen(
        [sys.executable, '-c', hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match='in use by another run'), workdir.locked(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with workdir.locked(tmp_path):
        pass
