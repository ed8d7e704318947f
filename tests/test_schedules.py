import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import registry
from jaxcls.errors import UserError
from jaxcls.schedules import SCHEDULES, make_schedule

STEPS, EPOCH, RATE = 40, 4.0, 0.5
ARGUMENTS = {'step': {'boundaries': (5, 7.5)}}


def make(name, warmup_epochs=0.0, **kwargs):
    return make_schedule(
        name=name,
        learning_rate=RATE,
        total_steps=STEPS,
        steps_per_epoch=EPOCH,
        warmup_epochs=warmup_epochs,
        **(kwargs or ARGUMENTS.get(name, {})),
    )


def curve(schedule, steps=STEPS):
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


@pytest.mark.parametrize('name', SCHEDULES)
def test_traced_and_concrete_steps_give_the_same_float32(name):
    schedule = make(name)
    jitted = jax.jit(schedule)
    for step in (0, 13, STEPS):
        value = schedule(step)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(jitted(jnp.int32(step)), value, rtol=1e-6, atol=1e-9)
    assert jitted._cache_size() == 1


@pytest.mark.parametrize('name', SCHEDULES)
def test_rates_are_finite_and_never_above_the_learning_rate(name):
    rates = curve(make(name), 2 * STEPS)
    assert np.isfinite(rates).all()
    assert rates.min() >= 0
    np.testing.assert_allclose(rates.max(), RATE, rtol=1e-6)


@pytest.mark.parametrize('name', sorted(set(SCHEDULES) - {'one_cycle', 'step'}))
def test_warmup_rises_evenly_then_the_schedule_runs_over_the_rest(name):
    rates = curve(make(name, warmup_epochs=2.0))
    np.testing.assert_allclose(rates[:9], RATE * np.arange(1, 10) / 9, rtol=1e-5)
    rest = make_schedule(
        name=name, learning_rate=RATE, total_steps=STEPS - 8, steps_per_epoch=EPOCH
    )
    np.testing.assert_allclose(rates[8:], curve(rest, STEPS - 8), rtol=1e-5)


def test_step_boundaries_are_epochs_from_the_start_of_training():
    expected = RATE * 0.1 ** (np.arange(STEPS) >= 20) * 0.1 ** (np.arange(STEPS) >= 30)
    np.testing.assert_allclose(curve(make('step')), expected, rtol=1e-5)
    np.testing.assert_allclose(curve(make('step', warmup_epochs=2.0))[8:], expected[8:], rtol=1e-5)


@pytest.mark.parametrize(
    ('name', 'arguments', 'values'),
    [
        ('constant', {}, {0: 1, 40: 1}),
        ('linear', {'final_fraction': 0.2}, {0: 1, 10: 0.8, 20: 0.6, 40: 0.2, 50: 0.2}),
        ('polynomial', {'power': 2.0}, {0: 1, 20: 0.25, 30: 0.0625, 40: 0}),
        ('cosine', {'final_fraction': 0.2}, {0: 1, 20: 0.6, 40: 0.2}),
        ('cosine', {}, {10: 0.5 + 0.25 * 2**0.5, 20: 0.5, 40: 0}),
        ('exponential', {'factor': 0.5, 'every_epochs': 2.0}, {0: 1, 7: 1, 8: 0.5, 16: 0.25}),
        ('exponential', {'factor': 2.0, 'every_epochs': 2.0}, {0: 1, 8: 2, 16: 4}),
        (
            'exponential',
            {'factor': 0.25, 'every_epochs': 2.0, 'staircase': False},
            {4: 0.5, 8: 0.25},
        ),
        (
            'one_cycle',
            {'peak_fraction': 0.5, 'start_fraction': 0.2, 'final_fraction': 0.0},
            {0: 0.2, 10: 0.6, 20: 1, 30: 0.5, 40: 0, 50: 0},
        ),
    ],
)
def test_values_by_hand(name, arguments, values):
    schedule = make(name, **arguments)
    for step, fraction in values.items():
        np.testing.assert_allclose(schedule(step), RATE * fraction, rtol=1e-5, atol=1e-7)


def torch_curve(torch, scheduler, steps, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler = scheduler(optimizer, **kwargs)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


def test_equal_to_pytorch():
    torch = pytest.importorskip('torch')
    schedulers = torch.optim.lr_scheduler
    cosine = torch_curve(torch, schedulers.CosineAnnealingLR, STEPS, T_max=STEPS)
    np.testing.assert_allclose(curve(make('cosine')), cosine, rtol=1e-4, atol=1e-6)
    step = torch_curve(torch, schedulers.MultiStepLR, STEPS, milestones=[20, 30])
    np.testing.assert_allclose(curve(make('step')), step, rtol=1e-4)
    # PyTorch's last step has the final rate, so that ours over T steps is its over T + 1.
    cycle = torch_curve(
        torch, schedulers.OneCycleLR, STEPS, max_lr=RATE, total_steps=STEPS + 1, pct_start=13 / 41
    )
    np.testing.assert_allclose(curve(make('one_cycle')), cycle, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('step', {'boundaries': (5, 10)}, 'end'),
        ('step', {'boundaries': (7, 5)}, 'rising'),
        ('step', {'boundaries': (1,), 'warmup_epochs': 1.0}, 'warm-up'),
        ('step', {'factor': 0.1}, 'boundaries'),
        ('step', {'boundaries': (5,), 'factor': 0.0}, 'factor'),
        ('exponential', {'every_epochs': 0.0}, 'every_epochs'),
        ('polynomial', {'power': float('nan')}, 'power'),
        ('cosine', {'final_fraction': 1.5}, 'final_fraction'),
        ('cosine', {'warmup_epochs': 10.0}, 'warmup_epochs'),
        ('cosine', {'warmup_epochs': -1.0}, 'warmup_epochs'),
        ('cosine', {'warmup_epochs': float('nan')}, 'warmup_epochs'),
        ('one_cycle', {'warmup_epochs': 1.0}, 'warmup_epochs'),
        ('one_cycle', {'peak_fraction': 1.0}, 'peak_fraction'),
        ('one_cycle', {'final_fraction': -0.1}, 'final_fraction'),
        ('cosine', {'finalfraction': 0.1}, 'Did you mean'),
        ('cosin', {}, "Did you mean 'cosine'"),
    ],
)
def test_mistakes_are_user_errors(name, arguments, message):
    with pytest.raises(UserError, match=message):
        make(name, **arguments)


@pytest.mark.parametrize('rate', [0.0, -1.0, float('nan'), float('inf')])
def test_learning_rate_must_be_positive_and_finite(rate):
    with pytest.raises(UserError, match='learning_rate'):
        make_schedule(name='constant', learning_rate=rate, total_steps=1, steps_per_epoch=1.0)


def test_one_step_of_training_is_enough_for_all():
    for name in sorted(set(SCHEDULES) - {'step'}):
        schedule = make_schedule(name=name, learning_rate=RATE, total_steps=1, steps_per_epoch=1.0)
        assert 0 < schedule(0) <= RATE


def test_defaults_are_plain_data():
    for name, build in SCHEDULES.items():
        for field, value in registry.defaults(build).items():
            assert isinstance(value, (bool, float, tuple)), (name, field)
