import json
import re
from unittest import mock

import jax
import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import evaluation, experiment, fit, results, runs, seeds, sweep, verify
from jaxcls.errors import UserError

pytestmark = pytest.mark.usefixtures('optimized')


def tiny(**fields):
    config = config_lib.get_config()
    config.model = {'name': 'linear'}
    config.epochs, config.batch_size = 4.0, 50
    config.data.train, config.data.validation = 'train[:200]', 'test[:100]'
    for field, value in fields.items():
        config[field] = value
    return config


def load(overrides):
    config = tiny()
    config_lib.apply_overrides(config, overrides, experiment.TABLES)
    return experiment.resolve(config)


def losses(records):
    return [(r['kind'], r['step'], r['loss'], r['top1']) for r in records]


def compiled(events):
    return [event for event in events if event['kind'] == 'compiled']


@pytest.fixture(scope='module')
def two_seeds(tmp_path_factory):
    path = tmp_path_factory.mktemp('sweep') / 'two'
    sweep.fit_seeds(tiny(seeds=2, seed=3), path)
    return path


def test_each_seed_is_the_run_that_it_is_alone(two_seeds, tmp_path):
    group = results.read(two_seeds)
    assert [member.workdir.name for member in group.members] == ['seed-3', 'seed-4']
    alone = fit(tiny(seed=4), tmp_path / 'alone')
    assert losses(group.members[1].records) == losses(alone.records)
    summary = json.loads((two_seeds / 'result.json').read_text())['top1']
    assert summary['values'] == [member.result['top1'] for member in group.members]
    assert (summary['mean'], summary['half_width']) == pytest.approx(group.mean('top1'))


def test_complete_seeds_are_left_alone_and_others_are_added(two_seeds):
    events = []
    sweep.fit_seeds(tiny(seeds=2, seed=3), two_seeds, events.append)
    assert [event['kind'] for event in events] == ['complete']
    outcome = sweep.fit_seeds(tiny(seeds=3, seed=3), two_seeds, events.append)
    assert len(outcome.group.members) == 3 and len(compiled(events)) == 1


def test_another_config_and_fewer_seeds_are_refused(two_seeds):
    for config in (tiny(seeds=3, seed=3, learning_rate=0.5), tiny(seeds=2, seed=4)):
        with pytest.raises(UserError, match='a different config'):
            sweep.fit_seeds(config, two_seeds)
    with pytest.raises(UserError, match='fit_seeds'):
        fit(tiny(seeds=2), two_seeds.parent / 'new')


def test_one_run_and_several_do_not_take_each_others_place(two_seeds, tmp_path):
    with pytest.raises(UserError, match='seeds: . there, 1 now'):
        sweep.fit_seeds(tiny(seeds=1, seed=3), two_seeds)
    sweep.fit_seeds(tiny(epochs=1.0), tmp_path / 'one')
    before = (tmp_path / 'one' / 'result.json').read_text()
    with pytest.raises(UserError, match='seeds: 1 there, 2 now'):
        sweep.fit_seeds(tiny(epochs=1.0, seeds=2), tmp_path / 'one')
    assert (tmp_path / 'one' / 'result.json').read_text() == before


def test_a_run_without_its_result_is_completed(tmp_path):
    sweep.fit_seeds(tiny(epochs=1.0), tmp_path / 'run')
    result = tmp_path / 'run' / 'result.json'
    before = json.loads(result.read_text())
    result.unlink()
    sweep.fit_seeds(tiny(epochs=1.0), tmp_path / 'run')
    assert json.loads(result.read_text()) == before | {'peak_bytes': mock.ANY}


@pytest.mark.parametrize('killed', [0, 1])
def test_seeds_in_one_program_end_after_a_kill_between_their_results(killed, tmp_path):
    config, write = tiny(seeds=2, seeds_per_program=2, epochs=1.0), results.write

    def kill(workdir, *args):
        if workdir.name == f'seed-{killed}':
            raise SystemExit
        return write(workdir, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, 'write', kill)
        with pytest.raises(SystemExit):
            sweep.fit_seeds(config, tmp_path / 'run')
    outcome = sweep.fit_seeds(config, tmp_path / 'run')
    assert all(member.result for member in outcome.group.members)
    assert not list((tmp_path / 'run').glob('seeds-*'))


def test_seeds_that_began_together_go_on_so_whoever_joins_them(tmp_path):
    sweep.fit_seeds(tiny(seeds=2, seeds_per_program=2), tmp_path / 'run', until_epoch=2)
    [*_, row] = verify.verify(tmp_path / 'run')
    assert row['workdir'] == str(tmp_path / 'run' / 'seeds-0-1') and row['step'] == 8
    assert row['problem'] == '' and row['arrays'] > 0
    events = []
    outcome = sweep.fit_seeds(tiny(seeds=3, seeds_per_program=1), tmp_path / 'run', events.append)
    begun = [event for event in events if event['kind'] in ('together', 'start')]
    assert [(event['kind'], event['step']) for event in begun] == [('together', 8), ('start', 0)]
    assert len(outcome.values('top1')) == 3


def poison(monkeypatch, place):
    """Lets one of the seeds in a program start with weights that are not finite."""
    fresh = seeds._initial_state

    def poisoned(*args):
        state = fresh(*args)
        return state.replace(params=jax.tree.map(lambda x: x.at[place].set(np.nan), state.params))

    monkeypatch.setattr(seeds, '_initial_state', poisoned)


def test_of_seeds_in_one_program_one_may_diverge(tmp_path, monkeypatch):
    poison(monkeypatch, 1)
    config = tiny(seeds=2, seeds_per_program=2, max_bad_steps=3)
    outcome = sweep.fit_seeds(config, tmp_path / 'run')
    ended, lost = outcome.group.members
    assert ended.result and not lost.result and 'Stopped at step' in lost.diverged
    assert 'The other seeds of its program go on' in lost.diverged
    assert outcome.values('top1') == [ended.result['top1']]


def test_a_divergence_is_noted_at_the_same_step_after_a_pause(tmp_path, monkeypatch):
    poison(monkeypatch, 0)
    # It is given up at a log line, the end of an epoch of four steps; paused between, it is not noted yet.
    config = tiny(seeds=2, seeds_per_program=2, max_bad_steps=3)
    outcomes = []
    for name, pauses in {'whole': [], 'parts': [0.75, 2.5]}.items():
        for pause in pauses:
            assert sweep.fit_seeds(config, tmp_path / name, until_epoch=pause).stopped == 'paused'
        outcomes.append(sweep.fit_seeds(config, tmp_path / name))
    whole, parts = ([(m.diverged, losses(m.records)) for m in o.group.members] for o in outcomes)
    assert [bool(message) for message, _ in whole] == [True, False]
    assert [records for _, records in whole] == [records for _, records in parts]
    # The images a second are those of the seed that skips no step.
    speeds = [r['images_per_second'] for r in outcomes[0].group.members[1].of_kind('train')]
    assert all(speeds)
    events = []
    sweep.fit_seeds(config, tmp_path / 'parts', events.append)
    assert [event['kind'] for event in events] == ['complete']


def test_a_note_of_divergence_from_after_the_last_checkpoint_goes(tmp_path):
    config = tiny(seeds=2, seeds_per_program=2)
    sweep.fit_seeds(config, tmp_path, until_epoch=2)
    (tmp_path / 'seed-1' / 'diverged.json').write_text('{"message": "later", "step": 12}')
    outcome = sweep.fit_seeds(config, tmp_path)
    assert outcome.diverged() == [] and all(member.result for member in outcome.group.members)


def test_seeds_in_one_program_keep_their_best(tmp_path):
    # At such a rate the accuracy falls again.
    config = tiny(seeds=2, seeds_per_program=2, learning_rate=3.0, validate_every_epochs=0.5)
    for pause in (1.0, 2.5, 4.0):
        outcome = sweep.fit_seeds(config, tmp_path, until_epoch=pause)
    best = []
    for member in outcome.group.members:
        top = max(member.of_kind('validation'), key=lambda record: record['top1'])
        found = evaluation.evaluate(member.workdir, checkpoint='best')
        assert (found['step'], found['top1']) == (top['step'], pytest.approx(top['top1']))
        best.append(top['step'])
    assert min(best) < 16  # of the last


def test_seeds_of_a_schedule_free_optimizer_share_a_program(tmp_path):
    config = tiny(seeds=2, seeds_per_program=2, epochs=1.0, schedule={'name': 'constant'})
    config.optimizer = {'name': 'schedule_free_adamw'}
    together = sweep.fit_seeds(config, tmp_path / 'together').group.members[1]
    config.seeds_per_program = 1
    apart = sweep.fit_seeds(config, tmp_path / 'apart').group.members[1]
    np.testing.assert_allclose(
        together.predictions.logits, apart.predictions.logits, rtol=1e-3, atol=1e-3
    )


def test_seeds_in_one_program_are_those_trained_one_by_one(two_seeds, tmp_path):
    sweep.fit_seeds(tiny(seeds=2, seed=3, seeds_per_program=2), tmp_path / 'group')
    for apart, together in zip(
        results.read(two_seeds).members, results.read(tmp_path / 'group').members, strict=False
    ):
        for ours, theirs in zip(together.records, apart.records, strict=True):
            assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-4)
        np.testing.assert_allclose(
            together.predictions.logits, apart.predictions.logits, rtol=1e-3, atol=1e-3
        )
        assert runs.open_run(together.workdir).step == together.records[-1]['step']
    assert not list((tmp_path / 'group').glob('seeds-*'))


def test_seeds_in_one_program_go_on_bit_for_bit_after_a_pause(tmp_path):
    config = tiny(seeds=2, seeds_per_program=2)
    sweep.fit_seeds(config, tmp_path / 'whole')
    assert sweep.fit_seeds(config, tmp_path / 'parts', until_epoch=2.5).stopped == 'paused'
    assert sweep.fit_seeds(config, tmp_path / 'parts').stopped == 'done'
    for whole, parts in zip(
        results.read(tmp_path / 'whole').members,
        results.read(tmp_path / 'parts').members,
        strict=True,
    ):
        assert losses(whole.records) == losses(parts.records)
        np.testing.assert_array_equal(whole.predictions.logits, parts.predictions.logits)


@pytest.mark.parametrize(
    'fields',
    [
        {'early_stopping_epochs': 2.0},
        {'parameters': 'fsdp'},
        {'model': {'name': 'airbench94'}},
        {'model': {'name': 'knn'}},
    ],
)
def test_runs_that_cannot_share_a_program_say_why(fields, tmp_path):
    with pytest.raises(UserError, match='cannot share a program'):
        sweep.fit_seeds(tiny(seeds=2, seeds_per_program=2, **fields), tmp_path / 'run')


@pytest.mark.parametrize(
    ('backend', 'fields', 'expected'),
    [
        ('gpu', {'model': {'name': 'lenet5'}}, 5),
        ('gpu', {'model': {'name': 'resnet20'}}, 1),
        ('gpu', {'model': {'name': 'resnet20'}, 'seeds_per_program': 2}, 2),
        ('gpu', {'early_stopping_epochs': 2.0}, 1),
        ('cpu', {'model': {'name': 'lenet5'}}, 1),
    ],
)
def test_what_shares_a_program_is_what_was_measured_to_be_faster(
    backend, fields, expected, monkeypatch
):
    config = experiment.resolve(tiny(seeds=5, **fields))
    monkeypatch.setattr(seeds.jax, 'default_backend', lambda: backend)
    assert seeds.per_program(config) == expected


def test_a_run_that_diverges_is_noted_and_the_others_go_on(tmp_path):
    config = tiny(seeds=2, max_bad_steps=1, learning_rate=1e38, log_every_steps=1)
    config.optimizer = {'name': 'sgd'}
    outcome = sweep.fit_seeds(config, tmp_path / 'run')
    assert outcome.stopped == 'done' and np.isnan(outcome.mean('top1')[0])
    assert [text.startswith('Stopped at step') for text in outcome.diverged()] == [True] * 2
    events = []
    sweep.fit_seeds(config, tmp_path / 'run', events.append)
    assert [event['kind'] for event in events] == ['complete']


def test_settings_are_listed_ones_times_the_grid():
    found = sweep.settings(
        load,
        ['learning_rate=0.1,0.01', 'data.mean=[(0.5,), (0.4,)]'],
        ['model.name=mlp model.hidden=(8,)', '--config.epochs=2'],
    )
    assert len(found) == 8 and len({setting.name for setting in found}) == 8
    assert (
        found[3].name == 'model.name=mlp, model.hidden=(8,), learning_rate=0.01, data.mean=(0.4,)'
    )
    assert found[3].config.model.hidden == (8,) and found[3].config.data.mean == (0.4,)
    assert found[4].config.epochs == 2 and found[4].config.model.name == 'linear'
    assert [s.name for s in sweep.settings(load)] == ['plain']


@pytest.mark.parametrize(
    ('grid', 'listed', 'message'),
    [
        (['learning_rate'], [], 'not written FIELD=VALUE'),
        (['learning_rate=[]'], [], 'has no values'),
        (['learning_rate=0.1,0.1'], [], "'learning_rate=0.1' is there twice; give each once"),
        (['learning_rate=0.1,0.10'], [], "twice, first as 'learning_rate=0.1'"),
        (['epochs=1,2'], ['epochs=3'], 'gives epochs twice'),
        (['model.name=mlp,knn'], ['epochs=2'], 'knn is fitted once'),
        (['learnin_rate=0.1'], [], 'learning_rate'),
        ([], ['learning_rate=fast'], 'must be of type float'),
        ([], ['learning_rate=-1'], 'must be more than 0'),
        ([], ['model.name="mlp'], 'No closing quotation'),
    ],
)
def test_mistakes_in_settings_are_user_errors(grid, listed, message):
    with pytest.raises(UserError, match=message):
        sweep.settings(load, grid, listed)


def test_halving_drops_the_losers_and_trains_the_winner_as_if_alone(tmp_path):
    found = sweep.settings(load, ['learning_rate=1e-7,0.003,1e-6,0.01'])
    outcomes = sweep.run(found, tmp_path / 'sweep', rungs=3)
    epochs = {o.name: o.group.members[0].records[-1]['epoch'] for o in outcomes}
    assert sorted(epochs.values()) == [1, 1, 2, 4]
    assert [o.stopped for o in outcomes] == ['done', 'paused', 'paused', 'paused']
    assert {o.name for o in outcomes[:2]} == {'learning_rate=0.003', 'learning_rate=0.01'}
    best = next(setting for setting in found if setting.name == outcomes[0].name)
    alone = fit(best.config, tmp_path / 'alone')
    assert losses(outcomes[0].group.members[0].records) == losses(alone.records)
    table = sweep.table(outcomes)
    assert table['rows'][0][0] == outcomes[0].name and len(table['rows']) == 4


def test_a_rung_is_judged_by_what_was_known_at_its_end(tmp_path):
    found = sweep.settings(load, ['learning_rate=0.003,0.01'])
    best, other = sweep.run(found, tmp_path / 'sweep', rungs=2)
    log = best.group.members[0].workdir / 'metrics.jsonl'
    log.write_text(re.sub(r'("epoch": 4.0.*"top1": )[0-9.]+', r'\g<1>0.0', log.read_text()))
    events = []
    again = sweep.run(found, tmp_path / 'sweep', events.append, rungs=2)
    assert [o.name for o in again] == [best.name, other.name] and not compiled(events)
    with pytest.raises(UserError, match='before its first validation'):
        sweep.run(found, tmp_path / 'sweep', rungs=4)


def test_members_trained_one_by_one_leave_nothing_to_the_sweep(tmp_path):
    found = sweep.settings(load, ['seeds=2', 'epochs=1,2'])
    assert [(name[-1], c.seed) for name, c in sweep.members(found)] == [
        ('1', 0), ('1', 1), ('2', 0), ('2', 1),
    ]  # fmt: skip
    for number in range(4):
        assert (
            sweep.run_member(found, tmp_path / 'run', number, lambda event: None).stopped == 'done'
        )
    events = []
    outcomes = sweep.run(found, tmp_path / 'run', events.append)
    assert not compiled(events) and [len(o.group.members) for o in outcomes] == [2, 2]
    with pytest.raises(UserError, match='give 0 to 3'):
        sweep.run_member(found, tmp_path / 'run', 4, lambda event: None)


def test_names_of_settings_become_short_plain_directories():
    assert sweep.directory_name('learning_rate=0.1') == 'learning_rate=0.1'
    odd = sweep.directory_name('model.hidden=(8, 8), x/../y')
    assert '/' not in odd and odd != sweep.directory_name('model.hidden=(8, 8); x/../y')
    assert len(sweep.directory_name('x' * 500)) < 110
