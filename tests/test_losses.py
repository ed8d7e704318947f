import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.utils.class_weight import compute_class_weight

from jaxcls import losses, registry
from jaxcls.errors import UserError
from jaxcls.losses import LOSSES, balanced_weights, distillation, make_loss, masked_mean

B, K = 6, 5
WEIGHTS = (0.5, 2.0, 0.0, 1.0, 3.0)
COUNTS = (50, 20, 7, 0, 1)
# At least one case of every loss.
CASES = [
    {'name': 'cross_entropy'},
    {'name': 'cross_entropy', 'label_smoothing': 0.1, 'class_weights': WEIGHTS},
    {'name': 'cross_entropy', 'class_weights': WEIGHTS, 'balance': 'inverse'},
    {'name': 'focal', 'gamma': 0.5, 'alpha': WEIGHTS},
    {'name': 'focal', 'balance': 'effective', 'beta': 0.9, 'label_smoothing': 0.1},
    {'name': 'poly', 'label_smoothing': 0.1},
    {'name': 'poly', 'epsilon': -1.0},
    {'name': 'complement_cross_entropy', 'complement_weight': 2.0, 'label_smoothing': 0.1},
    {'name': 'sigmoid_cross_entropy', 'label_smoothing': 0.1},
    {'name': 'mse'},
    {'name': 'mse', 'target_weight': 4.0, 'target_value': 3.0, 'label_smoothing': 0.1},
    {'name': 'brier', 'label_smoothing': 0.1},
]


def ids(case):
    return '-'.join(map(str, case.values()))


def made(case):
    return make_loss(**case, class_counts=COUNTS)


@pytest.fixture
def batch():
    """Logits, and targets of which half are one-hot."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, K)).astype(np.float32) * 3
    target = rng.dirichlet(np.ones(K), size=B).astype(np.float32)
    target[:3] = np.eye(K)[[2, 0, 4]]
    return jnp.asarray(logits), jnp.asarray(target)


def rows(row):
    """One row, B times: one shape in all tests, so that each operation is compiled once."""
    return jnp.asarray(np.tile(np.asarray(row, np.float32), (B, 1)))


def value_and_gradient(loss, logits, target):
    return loss(logits, target), jax.grad(lambda z: loss(z, target).sum())(logits)


def assert_same(loss, plain, batch, rtol=1e-6):
    """Values and gradients agree; bit for bit where `rtol` is 0."""
    pairs = zip(value_and_gradient(loss, *batch), value_and_gradient(plain, *batch), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol)


def formula(z, t, *, name, label_smoothing=0.0, **arguments):
    """Every loss of float64 arrays, written out example by example."""
    t = (1 - label_smoothing) * t + label_smoothing / K
    p = scipy.special.softmax(z, -1)
    w = np.array(arguments.get('class_weights') or arguments.get('alpha') or np.ones(K))
    n = np.array(COUNTS)
    if arguments.get('balance') == 'inverse':
        w = w * [78 / (4 * n_k) if n_k else 0 for n_k in n]
    elif arguments.get('balance') == 'effective':
        b = np.array([0.1 / (1 - 0.9**n_k) if n_k else 0 for n_k in n])
        w = w * b / ((n * b).sum() / 78)
    entropy = -(w * t * scipy.special.log_softmax(z, -1)).sum(-1)
    if name == 'cross_entropy':
        return entropy
    if name == 'focal':
        return -(w * t * (1 - p) ** arguments.get('gamma', 2.0) * np.log(p)).sum(-1)
    if name == 'poly':
        return entropy + arguments.get('epsilon', 2.0) * (t * (1 - p)).sum(-1)
    if name == 'complement_cross_entropy':
        rows = [np.delete(row, right) for row, right in zip(p, t.argmax(-1), strict=True)]
        complement = np.array([scipy.stats.entropy(row / row.sum()) for row in rows])
        return entropy - arguments['complement_weight'] * complement / 4
    if name == 'sigmoid_cross_entropy':
        q = scipy.special.expit(z)
        return -(t * np.log(q) + (1 - t) * np.log1p(-q)).sum(-1)
    if name == 'mse':
        k, m = arguments.get('target_weight', 1.0), arguments.get('target_value', 1.0)
        return (((k - 1) * t + 1) * (z - m * t) ** 2).mean(-1)
    return ((p - t) ** 2).sum(-1)


def slopes(function, z, step=1e-6):
    """Central differences of the sum of `function(z)`, each example having its own row of z."""
    columns = [
        (function(z + step * e) - function(z - step * e)) / (2 * step) for e in np.eye(z.shape[1])
    ]
    return np.stack(columns, -1)


def test_every_loss_has_a_case():
    assert {case['name'] for case in CASES} == set(LOSSES)


@pytest.mark.parametrize('case', CASES, ids=ids)
def test_values_and_gradients_are_those_of_the_formula(case, batch):
    logits, target = (np.asarray(x, np.float64) for x in batch)
    value, gradient = value_and_gradient(made(case), *batch)
    np.testing.assert_allclose(value, formula(logits, target, **case), rtol=2e-6, atol=2e-6)
    expected = slopes(lambda z: formula(z, target, **case), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', CASES, ids=ids)
def test_one_finite_float32_an_example_and_finite_gradients_at_extreme_logits(case, batch):
    logits, target = batch
    extreme = jnp.where(target == target.max(-1, keepdims=True), 1e4, -1e4)
    for z in (logits, extreme, -extreme, 1e3 * logits, jnp.zeros_like(logits)):
        value, gradient = value_and_gradient(made(case), z, target)
        assert value.shape == (B,)
        assert value.dtype == gradient.dtype == jnp.float32
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize('case', CASES, ids=ids)
def test_examples_do_not_mix(case, batch):
    others = [np.concatenate([x[::-1][:4], x[4:5], x[:1]]) for x in map(np.array, batch)]
    np.testing.assert_array_equal(made(case)(*map(jnp.asarray, others))[4], made(case)(*batch)[4])


@pytest.mark.parametrize('name', LOSSES)
def test_smoothing_is_the_same_as_a_smoothed_target(name, batch):
    logits, target = batch
    expected = make_loss(name=name)(logits, 0.9 * target + 0.1 / K)
    smoothed = make_loss(name=name, label_smoothing=0.1)
    np.testing.assert_allclose(smoothed(logits, target), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ('neutral', 'rtol'),
    [
        ({'name': 'cross_entropy', 'class_weights': (1.0,) * K}, 0),
        ({'name': 'cross_entropy', 'balance': 'inverse', 'class_counts': (8,) * K}, 0),
        ({'name': 'cross_entropy', 'balance': 'effective', 'class_counts': (8,) * K}, 1e-6),
        ({'name': 'cross_entropy', 'class_counts': (1, 2, 3, 4, 5)}, 0),
        ({'name': 'focal', 'gamma': 0.0}, 1e-6),
        ({'name': 'focal', 'gamma': 0.0, 'alpha': (1.0,) * K}, 1e-6),
        ({'name': 'poly', 'epsilon': 0.0}, 0),
        ({'name': 'complement_cross_entropy', 'complement_weight': 0.0}, 0),
    ],
    ids=str,
)
def test_the_neutral_setting_is_cross_entropy(neutral, rtol, batch):
    assert_same(make_loss(**neutral), make_loss(name='cross_entropy'), batch, rtol)


def test_focal_alpha_and_balance_without_gamma_are_cross_entropys(batch):
    focal = {'gamma': 0.0, 'alpha': WEIGHTS, 'balance': 'effective'}
    plain = {'class_weights': WEIGHTS, 'balance': 'effective'}
    assert_same(made({'name': 'focal', **focal}), made({'name': 'cross_entropy', **plain}), batch)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0])
def test_focal_gradients_are_finite_where_a_probability_is_1(gamma):
    logits, target = rows([200.0, -200.0, 0.0, 0.0, 0.0]), rows([0.9, 0.1, 0.0, 0.0, 0.0])
    _, gradient = value_and_gradient(make_loss(name='focal', gamma=gamma), logits, target)
    assert np.isfinite(gradient).all()


def test_complement_entropy_is_exact_where_the_right_class_is_certain():
    loss, target = make_loss(name='complement_cross_entropy'), rows(np.eye(K)[0])
    entropy = scipy.stats.entropy(scipy.special.softmax([2.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(loss(rows([60.0, 2, 1, 1, 0]), target), -entropy / 4, rtol=1e-6)
    np.testing.assert_allclose(loss(rows([60.0, 1, 1, 1, 1]), target), -np.log(4) / 4, rtol=1e-6)


def test_the_complement_of_one_class_is_nothing():
    assert losses.complement_cross_entropy(jnp.ones((2, 1)), jnp.ones((2, 1))).tolist() == [0, 0]


def test_mse_at_its_target_and_by_hand():
    target = rows(np.eye(K)[0])
    loss = make_loss(name='mse', target_weight=15.0, target_value=30.0)
    np.testing.assert_array_equal(loss(30 * target, target), np.zeros(B))
    by_hand = (15 * 2**2 + 3**2) / K
    np.testing.assert_allclose(loss(rows([28.0, 3, 0, 0, 0]), target), by_hand, rtol=1e-6)


def test_brier_is_0_of_certainty_and_2_of_its_opposite():
    loss, logits = make_loss(name='brier'), rows([50.0, -50, -50, -50, -50])
    np.testing.assert_allclose(loss(logits, rows(np.eye(K)[0])), np.zeros(B), atol=1e-6)
    np.testing.assert_allclose(loss(logits, rows(np.eye(K)[1])), np.full(B, 2.0), rtol=1e-6)


def torch_case(torch, z, t, *, name, label_smoothing=0.0, **arguments):
    """The losses that PyTorch has, of float64 tensors."""
    functional = torch.nn.functional
    smooth = (1 - label_smoothing) * t + label_smoothing / K
    weights = arguments.get('class_weights')
    if name == 'cross_entropy':
        weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        options = {'weight': weights, 'label_smoothing': label_smoothing, 'reduction': 'none'}
        return functional.cross_entropy(z, t, **options)
    if name == 'focal':
        weights = torch.tensor(arguments['alpha'], dtype=torch.float64)
        log_p = functional.log_softmax(z, -1)
        return -(weights * smooth * (1 - log_p.exp()) ** arguments['gamma'] * log_p).sum(-1)
    if name == 'poly':
        wrong = 1 - (smooth * functional.softmax(z, -1)).sum(-1)
        return functional.cross_entropy(z, smooth, reduction='none') + 2 * wrong
    if name == 'complement_cross_entropy':
        others = z.masked_fill(functional.one_hot(t.argmax(-1), K).bool(), -1e300)
        entropy = torch.distributions.Categorical(logits=others).entropy()
        return functional.cross_entropy(z, smooth, reduction='none') - 2 * entropy / (K - 1)
    if name == 'sigmoid_cross_entropy':
        return functional.binary_cross_entropy_with_logits(z, smooth, reduction='none').sum(-1)
    if name == 'mse':
        return functional.mse_loss(z, smooth, reduction='none').mean(-1)
    return functional.mse_loss(functional.softmax(z, -1), smooth, reduction='none').sum(-1)


@pytest.mark.parametrize('case', [CASES[i] for i in (0, 1, 3, 5, 7, 8, 9, 11)], ids=ids)
def test_equal_to_pytorch(case, batch):
    torch = pytest.importorskip('torch')
    logits, target = (torch.from_numpy(np.array(x, np.float64)) for x in batch)
    logits.requires_grad_()
    expected = torch_case(torch, logits, target, **case)
    expected.sum().backward()
    value, gradient = value_and_gradient(made(case), *batch)
    np.testing.assert_allclose(value, expected.detach(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, logits.grad, rtol=1e-5, atol=1e-6)


def test_weighted_cross_entropy_of_integer_labels_is_pytorchs_but_for_its_mean(batch):
    torch = pytest.importorskip('torch')
    labels = np.array([2, 0, 4, 1, 3, 3])
    logits, target = batch[0], jnp.eye(K)[labels]
    ours = make_loss(name='cross_entropy', class_weights=WEIGHTS, label_smoothing=0.2)
    options = {'weight': torch.tensor(WEIGHTS), 'label_smoothing': 0.2}

    def theirs(labels, reduction):
        z = torch.tensor(np.array(logits))
        return torch.nn.functional.cross_entropy(z, labels, reduction=reduction, **options)

    integers, soft = torch.tensor(labels), torch.tensor(np.array(target))
    values = ours(logits, target)
    np.testing.assert_allclose(values, theirs(integers, 'none'), rtol=1e-5)
    np.testing.assert_allclose(values.mean(), theirs(soft, 'mean'), rtol=1e-5)
    share = np.array(WEIGHTS)[labels].sum()
    np.testing.assert_allclose(values.sum() / share, theirs(integers, 'mean'), rtol=1e-5)


def test_inverse_weights_are_scikit_learns_balanced():
    y = np.random.default_rng(0).choice(4, size=100, p=[0.6, 0.25, 0.1, 0.05])
    expected = compute_class_weight('balanced', classes=np.arange(4), y=y)
    np.testing.assert_allclose(balanced_weights(np.bincount(y), 'inverse'), expected, rtol=1e-12)


def test_effective_weights_by_hand_and_between_none_and_inverse():
    # 1 / (1 - 1/2) = 2 and 1 / (1 - 1/4) = 4/3, times 3 / (1 * 2 + 2 * 4/3).
    np.testing.assert_allclose(balanced_weights((1, 2), 'effective', 0.5), (9 / 7, 6 / 7))
    assert balanced_weights((5, 20), 'effective', 0.0) == balanced_weights((5, 20), 'none')
    inverse = balanced_weights((5, 20), 'inverse')
    np.testing.assert_allclose(balanced_weights((5, 20), 'effective', 1 - 1e-9), inverse, rtol=1e-6)


@pytest.mark.parametrize('balance', losses.BALANCES)
def test_balanced_weights_have_mean_1_over_the_examples_and_0_of_a_class_without(balance):
    weights = np.array(balanced_weights(COUNTS, balance, 0.99))
    np.testing.assert_allclose(np.average(weights, weights=COUNTS), 1.0, rtol=1e-12)
    assert weights[3] == 0.0
    rest = balanced_weights(np.delete(COUNTS, 3), balance, 0.99)
    np.testing.assert_allclose(np.delete(weights, 3), rest, rtol=1e-12)


def test_a_loss_that_needs_counts_says_so_where_it_has_none(batch):
    assert losses.needs_counts(name='focal', balance='effective')
    assert not losses.needs_counts(name='focal', balance='none')
    assert not losses.needs_counts(name='mse')
    loss = make_loss(name='focal', balance='effective')
    for call in (loss, jax.jit(loss), lambda *batch: jax.eval_shape(loss, *batch)):
        with pytest.raises(UserError, match='needs the number of training examples'):
            call(*batch)


def test_divergence_is_that_of_scipy():
    from scipy.special import softmax
    from scipy.stats import entropy

    p, q = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32) * 3
    expected = entropy(softmax(p, axis=1), softmax(q, axis=1), axis=1)
    np.testing.assert_allclose(losses.divergence(p, q), expected, rtol=1e-4)
    assert np.all(losses.divergence(p, p) == 0)


def distilled(batch, temperature, alpha):
    """A teacher, and the loss of a student that learns from it."""
    teacher = batch[0][::-1] * 0.5

    def loss(z, t):
        plain = losses.cross_entropy(z, t)
        return distillation(z, teacher, plain, temperature=temperature, alpha=alpha)

    return teacher, loss


def test_distillation_by_scipy(batch):
    logits, target = (np.asarray(x, np.float64) for x in batch)
    teacher, loss = distilled(batch, 3.0, 0.7)

    def expected(z):
        p, q = (scipy.special.softmax(np.asarray(x, np.float64) / 3, -1) for x in (z, teacher))
        divergence = scipy.stats.entropy(q, p, axis=-1)
        return 0.7 * 9 * divergence + 0.3 * formula(z, target, name='cross_entropy')

    value, gradient = value_and_gradient(loss, *batch)
    np.testing.assert_allclose(value, expected(logits), rtol=2e-6)
    np.testing.assert_allclose(gradient, slopes(expected, logits), rtol=1e-5, atol=1e-5)


def test_distillation_equals_pytorch(batch):
    torch = pytest.importorskip('torch')
    functional = torch.nn.functional
    teacher, loss = distilled(batch, 3.0, 1.0)
    z, q = (torch.tensor(np.array(x, np.float64)) for x in (batch[0], teacher))
    z.requires_grad_()
    logs = (functional.log_softmax(x / 3, -1) for x in (z, q))
    expected = 9 * functional.kl_div(*logs, reduction='none', log_target=True).sum(-1)
    expected.sum().backward()
    value, gradient = value_and_gradient(loss, *batch)
    np.testing.assert_allclose(value, expected.detach(), rtol=2e-6)
    np.testing.assert_allclose(gradient, z.grad, rtol=1e-5, atol=1e-6)


def test_distillation_without_the_teacher_is_cross_entropy_and_from_itself_is_nothing(batch):
    logits, target = batch
    _, untaught = distilled(batch, 4.0, 0.0)
    assert_same(untaught, make_loss(name='cross_entropy'), batch, 0)
    plain = losses.cross_entropy(logits, target)
    own = distillation(logits, logits, plain, temperature=2.0, alpha=1.0)
    np.testing.assert_array_equal(own, np.zeros(B))


def test_distillation_gives_the_teacher_no_gradient_and_survives_extremes(batch):
    logits, target = batch

    def total(z, teacher):
        plain = losses.cross_entropy(z, target)
        return distillation(z, teacher, plain, temperature=0.5, alpha=0.5).sum()

    extreme = 1e4 * jnp.sign(logits)
    for z, teacher in ((logits, extreme), (extreme, -extreme), (extreme, extreme)):
        value, gradients = jax.value_and_grad(total, argnums=(0, 1))(z, teacher)
        assert np.isfinite(value)
        assert np.isfinite(gradients[0]).all()
        assert not gradients[1].any()


def test_masked_mean_ignores_padding_and_is_0_of_nothing():
    values = jnp.array([1.0, 3.0, jnp.nan])
    assert masked_mean(values, jnp.array([True, True, False])) == 2.0
    assert masked_mean(values, jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'cross_entropy', 'label_smoothing': 1.0}, 'label_smoothing is 1.0.*below 1'),
        ({'name': 'cross_entropy', 'label_smoothing': -0.1}, 'label_smoothing'),
        ({'name': 'cross_entropy', 'class_weights': (1.0, -1.0)}, 'class_weights is .*at least 0'),
        ({'name': 'cross_entropy', 'class_weights': ('1', '2')}, 'class_weights'),
        ({'name': 'cross_entropy', 'class_weights': (0.0, 0.0)}, 'class_weights is .*above 0 for'),
        ({'name': 'focal', 'alpha': [0, 0]}, 'alpha is .*above 0 for some class'),
        ({'name': 'cross_entropy', 'balance': 'invers'}, "Did you mean 'inverse'"),
        ({'name': 'cross_entropy', 'beta': 1.0}, 'beta'),
        ({'name': 'cross_entropy', 'alpha': (1.0,)}, 'no argument'),
        ({'name': 'focal', 'gamma': -1.0}, 'gamma'),
        ({'name': 'focal', 'gamma': math.inf}, 'gamma is inf.*finite'),
        ({'name': 'focal', 'gamma': math.nan}, 'gamma'),
        ({'name': 'focal', 'gama': 1.0}, "Did you mean 'gamma'"),
        ({'name': 'focal', 'alpha': (math.inf,)}, 'alpha'),
        ({'name': 'poly', 'epsilon': -1.1}, 'at least -1'),
        ({'name': 'poly', 'balance': 'inverse'}, 'no argument'),
        ({'name': 'complement_cross_entropy', 'complement_weight': -1.0}, 'complement_weight'),
        ({'name': 'mse', 'target_weight': 0.5}, 'target_weight'),
        ({'name': 'mse', 'target_value': 0.0}, 'target_value'),
        ({'name': 'crossentropy'}, "Did you mean 'cross_entropy'"),
    ],
)
def test_mistakes_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        make_loss(**arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'class_weights': (1.0, 2.0)}, '2 class weights .* 5 classes'),
        (
            {'balance': 'inverse', 'class_counts': (1, 2, 3)},
            '3 class weights or counts .* 5 classes',
        ),
        ({'balance': 'inverse', 'class_counts': (0,) * K}, 'not all'),
        ({'balance': 'effective', 'class_counts': (1, 2, 3, 4, -5)}, 'at least 0'),
        ({'balance': 'effective', 'class_counts': 3}, 'class_counts is 3; it must be one a class'),
    ],
)
def test_weights_that_do_not_fit_the_data_are_user_errors_before_anything_runs(
    arguments, message, batch
):
    loss = make_loss(name='cross_entropy', **arguments)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(loss, *batch)


@pytest.mark.parametrize(('temperature', 'alpha'), [(0.0, 0.5), (math.inf, 0.5), (1.0, 1.5)])
def test_distillations_ranges(temperature, alpha, batch):
    with pytest.raises(UserError, match=r'temperature|alpha'):
        distilled(batch, temperature, alpha)[1](*batch)


def test_every_default_is_plain_and_in_its_range():
    for name, loss in LOSSES.items():
        defaults = registry.defaults(loss)
        assert 'class_counts' not in defaults
        assert defaults.keys() <= {*losses._RANGES, 'balance'}
        make_loss(name=name, **defaults)
