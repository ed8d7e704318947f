"""Attacks: against foolbox on the same net and images, and the laws that hold whatever the net."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from jaxcls import attacks, metrics
from jaxcls.errors import UserError
from jaxcls.models import make_model

COUNT = 400


@pytest.fixture(scope='module')
def trained():
    """`logits(image)` of a small network that knows the digits, and images and labels of them."""
    digits = load_digits()
    image = (digits.images[..., None] / 16).astype(np.float32)
    label = digits.target.astype(np.int32)
    model = make_model('mlp', num_classes=10, hidden=(32,))
    params = jax.jit(model.init)(jax.random.key(0), image[:1])['params']
    tx = optax.adam(0.01)

    def logits(params, image):
        return model.apply({'params': params}, image)[0]

    @jax.jit
    def train(params):
        def loss(params):
            found = logits(params, image[COUNT:])
            return optax.softmax_cross_entropy_with_integer_labels(found, label[COUNT:]).mean()

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    network = jax.jit(functools.partial(logits, train(params)))
    assert (network(image[:COUNT]).argmax(-1) == label[:COUNT]).mean() > 0.9
    return network, image[:COUNT], label[:COUNT]


@jax.jit
def begin(index, image, label, epsilon):
    return attacks.start(attacks.example_keys(jax.random.key(0), index), image, label, epsilon)


@functools.cache
def compiled(logits, attack):
    return jax.jit(lambda state: attack.step(logits, state))


def run(trained, attack, epsilons, index=None):
    """The last state of the attack at each epsilon, by one compiled step, on the host."""
    logits, image, label = trained
    index = np.arange(len(image)) if index is None else index
    states = []
    for epsilon in epsilons:
        state = begin(index, image, label, epsilon)
        for _ in range(attack.steps):
            state = compiled(logits, attack)(state)
        states.append(jax.device_get(state))
    return states


def length(state, norm):
    change = np.abs(np.float64(state.best) - np.float64(state.image)).reshape(len(state.best), -1)
    return change.max(1) if norm == 'linf' else np.sqrt((change**2).sum(1))


FGSM, PGD, PGD_L2 = attacks.fgsm(), attacks.pgd(steps=20), attacks.pgd(norm='l2', steps=20)
SQUARE = attacks.square(steps=200)
CASES = {
    'fgsm': ('linf', FGSM),
    'pgd': ('linf', PGD),
    'square': ('linf', SQUARE),
    'pgd l2': ('l2', PGD_L2),
}
EPSILONS = {'linf': (0.0, 0.05, 0.1, 0.2), 'l2': (0.0, 0.3, 0.6, 1.2)}


@pytest.fixture(scope='module')
def found(trained):
    return {name: run(trained, attack, EPSILONS[norm]) for name, (norm, attack) in CASES.items()}


@pytest.mark.parametrize('name', CASES)
def test_images_stay_within_epsilon_and_the_range(found, name):
    norm = CASES[name][0]
    for state, epsilon in zip(found[name], EPSILONS[norm], strict=True):
        assert state.best.dtype == np.float32 and state.best.min() >= 0 and state.best.max() <= 1
        assert length(state, norm).max() <= epsilon + 1e-6
        assert epsilon == 0 or length(state, norm).max() > 0.9 * epsilon


@pytest.mark.parametrize('name', CASES)
def test_epsilon_0_returns_the_image_bit_for_bit(found, name):
    state = found[name][0]
    np.testing.assert_array_equal(state.best, state.image)


@pytest.mark.parametrize('name', CASES)
def test_the_margin_is_that_of_the_image_and_says_who_is_fooled(trained, found, name):
    logits, _, label = trained
    for state in found[name]:
        values = logits(state.best)
        np.testing.assert_allclose(
            state.margin, attacks.margin(values, label), rtol=1e-4, atol=1e-4
        )
        right = np.asarray(metrics.top_k(values, label, 1))
        np.testing.assert_array_equal(right, np.asarray(state.margin) < 0)


@pytest.mark.parametrize('name', CASES)
def test_more_epsilon_is_never_weaker(found, name):
    fooled = [np.mean(np.asarray(state.margin) >= 0) for state in found[name]]
    assert fooled == sorted(fooled) and fooled[-1] > fooled[0] + 0.1, fooled


def test_pgd_is_the_strongest_and_square_needs_no_gradient(found):
    success = {name: np.mean(np.asarray(states[2].margin) >= 0) for name, states in found.items()}
    assert success['pgd'] >= success['fgsm'], success
    assert success['square'] > 0.5 * success['pgd'], success


@pytest.mark.parametrize('make', [attacks.pgd, attacks.square])
def test_more_steps_and_restarts_are_never_weaker(trained, found, make):
    few, strong = {attacks.pgd: (2, found['pgd']), attacks.square: (20, found['square'])}[make]
    [weak] = run(trained, make(steps=few), (0.1,))
    assert np.mean(strong[2].margin >= 0) > np.mean(weak.margin >= 0)
    if make is attacks.pgd:
        [again] = run(trained, make(steps=few, restarts=3), (0.1,))
        assert np.all(again.margin >= weak.margin) and np.any(again.margin > weak.margin)


def test_neither_padding_nor_the_place_in_the_batch_has_a_say(trained, found):
    logits, image, label = trained
    order = np.r_[7:-1:-1, 0, 0]
    for name in ('pgd', 'square'):
        [turned] = run((logits, image[order], label[order]), CASES[name][1], (0.1,), order)
        np.testing.assert_allclose(turned.best[:8][::-1], found[name][2].best[:8], atol=1e-5)


def test_run_is_the_same_steps_in_one_program(trained, found):
    logits, image, label = trained

    @jax.jit
    def attacked(epsilon):
        keys = attacks.example_keys(jax.random.key(0), jnp.arange(COUNT))
        return attacks.run(FGSM, logits, keys, image, label, epsilon)

    state = attacked(0.1)
    same = np.isclose(state.best, found['fgsm'][2].best, atol=1e-5)
    assert same.mean() > 0.999  # the sign of a gradient of almost 0 is not
    assert int(state.step) == FGSM.steps == 2


def test_random_points_fill_the_ball():
    image = np.full((2000, 2, 2, 1), 0.5, np.float32)

    @functools.partial(jax.jit, static_argnames='norm')
    def drawn(image, norm):
        keys = attacks.example_keys(jax.random.key(0), jnp.arange(2000))
        return attacks.random_point(keys, image, 0.25, norm)

    for norm in attacks.NORMS:
        point = drawn(image, norm)
        change = np.asarray(point - image).reshape(2000, 4) / 0.25
        size = np.abs(change).max(1) if norm == 'linf' else np.linalg.norm(change, axis=1)
        # The share of a ball of four dimensions within r of its centre is r^4.
        np.testing.assert_allclose(
            np.quantile(size**4, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04
        )
        np.testing.assert_allclose(change.mean(0), 0, atol=0.05)


def test_a_logit_that_is_not_finite_is_an_error():
    logits = jnp.array([[3.0, 1.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [1.0, 3.0]])
    np.testing.assert_array_equal(
        attacks.margin(logits, jnp.zeros(4, int)), [-2.0, np.inf, np.inf, 2.0]
    )


def test_squares_shrink_as_in_the_paper():
    # Andriushchenko et al., section 5: halved at these iterations of 10,000.
    shares = [float(attacks._shrunk(jnp.int32(i), 10_000)) for i in (10, 11, 201, 1001, 9000)]
    assert shares == [1, 1 / 2, 1 / 8, 1 / 32, 1 / 512]


# From the image itself, so that draws have no say.
FROM_IMAGE, FROM_IMAGE_L2 = (
    attacks.pgd(norm=norm, steps=20, random_start=False) for norm in attacks.NORMS
)
FOOLBOX = {
    'fgsm': ('LinfFastGradientAttack', {}, FGSM),
    'fgsm l2': ('L2FastGradientAttack', {}, attacks.fgsm(norm='l2')),
    'pgd': ('LinfPGD', {'steps': 20, 'rel_stepsize': 0.125}, FROM_IMAGE),
    'pgd l2': ('L2PGD', {'steps': 20, 'rel_stepsize': 0.125}, FROM_IMAGE_L2),
}


@pytest.mark.filterwarnings('ignore')  # of foolbox's imports
@pytest.mark.parametrize('name', FOOLBOX)
def test_success_is_that_of_foolbox(trained, name):
    foolbox = pytest.importorskip('foolbox')
    logits, image, label = trained
    model = foolbox.models.JAXModel(logits, bounds=(0, 1))
    attack, settings, ours = FOOLBOX[name]
    epsilons = EPSILONS['l2' if 'l2' in name else 'linf'][1:]
    theirs = getattr(foolbox.attacks, attack)(random_start=False, **settings)
    found = theirs(model, jnp.asarray(image), jnp.asarray(label), epsilons=epsilons)
    success = np.asarray(found[2]).mean(1)
    states = run(trained, ours, epsilons)
    measured = [np.mean(np.asarray(state.margin) >= 0) for state in states]
    np.testing.assert_allclose(measured, success, atol=0.01)
    assert 0.05 < success[0] < success[-1]


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: attacks.pgd(norm='l1'), "norm is 'l1'; it must be linf or l2"),
        (lambda: attacks.pgd(steps=0), 'steps is 0; it must be at least 1'),
        (lambda: attacks.pgd(restarts=0), 'restarts is 0; it must be at least 1'),
        (lambda: attacks.pgd(relative_step=-1), 'relative_step is -1; it must be at least 0'),
        (lambda: attacks.square(norm='l2'), "norm is 'l2', and the attack square is of linf"),
        (lambda: attacks.square(share=0), 'share is 0; it must be more than 0'),
    ],
)
def test_values_out_of_range_say_so(make, message):
    with pytest.raises(UserError, match=message):
        make()
