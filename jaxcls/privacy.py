"""Differentially private training: DP-SGD, its batches and its accountant.

Abadi et al. 2016, https://arxiv.org/abs/1607.00133: the gradient of each example is clipped, their sum
has Gaussian noise, and each example joins each batch independently of the others. What is seen of the
weights, at any step, then hardly tells whether an example was among the training data: adding or
removing one changes the probability of anything by a factor of at most `e^epsilon`, but for `delta`.

The guarantee is of the weights, of all checkpoints together, towards those who do not know the seed:
noise and batches are a function of (seed, step), so that a run resumes to the same bits. It is not of
the training loss and accuracy that are logged, nor of choosing a config by many runs. Clipping, noise
and accounting are jax-privacy's and dp-accounting's.
"""

import functools
import importlib.util
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import optimizers, pipeline, registry
from jaxcls.errors import UserError, require

# The share of delta that pays for batches which would not fit their padding.
_SLACK = 1e-3
# Without a budget, batches are padded for a guarantee of up to this epsilon; more says little anyway.
_LARGEST_EPSILON = 10.0
# Of the privacy loss distribution: epsilon comes out 0.005 too large after 3,600 steps, never too small.
_DISCRETIZATION = 1e-3


class Plan(NamedTuple):
    """The privacy of one run.

    Attributes:
      clip_norm: of each example's gradient; infinite without.
      noise_multiplier: the noise's standard deviation over `clip_norm`; 0 without.
      delta: of the guarantee.
      examples: of the training split.
      batch_size: the expected one.
      rows: of the arrays of a batch, padding included.
      total_steps: at most as many as the run has, and as the budget allows.
      microbatch: examples whose gradients are in memory at once; 0 is all.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    examples: int
    batch_size: int
    rows: int
    total_steps: int
    microbatch: int

    def epsilon(self, step: int) -> float:
        """What is spent after so many steps; infinite without noise."""
        if not self.noise_multiplier:
            return math.inf
        epsilon = _epsilon(
            self.noise_multiplier, self.examples, self.batch_size, self.delta * (1 - _SLACK), step
        )
        # Batches that are cut to `rows` are those of the mechanism that is accounted for, but with
        # a probability of t, in all steps. So (epsilon, d) becomes (epsilon, d + (1 + e^epsilon) t).
        overflow = step * _overflow(self.examples, self.batch_size, self.rows)
        fits = math.log1p(math.exp(min(epsilon, 700))) + _log(overflow) <= _log(self.delta * _SLACK)
        return epsilon if fits else math.inf

    def order(self, seed: int, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, as `pipeline.training_order`'s; with noise a `poisson_order`."""
        if not self.noise_multiplier:
            return pipeline.training_order(seed, self.examples, self.batch_size, step)
        return poisson_order(seed, self.examples, self.batch_size, self.rows, step)


def dp_sgd(
    *,
    clip_norm: float = 1.0,
    noise_multiplier: float = 0.0,
    epsilon: float = 3.0,
    delta: float = 1e-5,
    microbatch: int = 0,
) -> Callable[[int, int, int], Plan]:
    """DP-SGD of a budget, of a noise, or of both: `plan(examples, batch_size, steps)`.

    | `noise_multiplier` | `epsilon` | the run |
    |---|---|---|
    | 0 | more than 0 | has the noise with which all its steps spend the budget |
    | more than 0 | more than 0 | ends, its schedule too, at the last step within the budget |
    | more than 0 | 0 | has this noise and no budget; what is spent is logged |
    | 0 | 0 | has no noise, no guarantee, and the batches of plain training |

    With the last row and `clip_norm=0` it is plain training, by another way. The gradient is the sum
    of clipped gradients over the expected batch size, `config.batch_size`, whatever the size of a batch.

    Args:
      clip_norm: the largest norm of an example's gradient, over all parameters; 0: does not clip.
      noise_multiplier: standard deviation of the noise in the sum of gradients, over `clip_norm`.
      epsilon: the budget.
      delta: less than 1 / examples.
      microbatch: examples whose gradients are in memory at once; 0 is all of a batch.

    Raises:
      UserError: out of range; of `plan`, jax-privacy is missing, or no step fits into the budget.
    """
    for field, value in (('clip_norm', clip_norm), ('noise_multiplier', noise_multiplier)):
        require(0 <= value < math.inf, f'config.privacy.{field}', value, 'at least 0 and finite')
    require(0 <= epsilon <= 1000, 'config.privacy.epsilon', epsilon, 'within [0, 1000], 0 for none')
    require(0 < delta < 1, 'config.privacy.delta', delta, 'more than 0 and less than 1')
    require(microbatch >= 0, 'config.privacy.microbatch', microbatch, 'at least 0')
    if not clip_norm and (noise_multiplier or epsilon):
        raise UserError(
            'config.privacy.clip_norm is 0, which does not clip, and noise hides only what is bounded: '
            'set it, for example to 1.0, or set noise_multiplier=0 and epsilon=0 for no privacy.'
        )

    def plan(examples: int, batch_size: int, steps: int) -> Plan:
        _require_library()
        clip = clip_norm or math.inf
        if not (noise_multiplier or epsilon):
            parts = not microbatch or batch_size % microbatch == 0
            expected = f'a divisor of config.batch_size={batch_size} where there is no noise'
            require(parts, 'config.privacy.microbatch', microbatch, expected)
            return Plan(clip, 0.0, delta, examples, batch_size, batch_size, steps, microbatch)
        if batch_size > examples or delta >= 1 / examples:
            raise UserError(
                f'{examples:,} training examples with config.batch_size={batch_size} and '
                f'config.privacy.delta={delta:g}: the batch must be at most all of them, and delta less '
                f'than one of them, {1 / examples:.1e}.'
            )
        noise = noise_multiplier or _calibrated(epsilon, examples, batch_size, delta, steps)
        largest = epsilon or _LARGEST_EPSILON
        rows = _rows(examples, batch_size, delta, steps, largest, microbatch)
        found = Plan(clip, noise, delta, examples, batch_size, rows, steps, microbatch)
        if not (noise_multiplier and epsilon):
            return found
        steps = bisect_right(range(1, steps + 1), epsilon, key=found.epsilon)
        if not steps:
            raise UserError(
                f'config.privacy.epsilon={epsilon:g} is less than one step spends, '
                f'{found.epsilon(1):.3g}, with noise_multiplier={noise:g} and batches of {batch_size} '
                f'of {examples:,}: raise one of the first two, or set noise_multiplier=0 to have it chosen.'
            )
        return found._replace(total_steps=steps)

    return plan


# An entry makes `plan(examples, batch_size, steps) -> Plan`, or None.
PRIVACIES = {'none': lambda: None, 'dp_sgd': dp_sgd}


def make_privacy(*, name: str, **kwargs) -> Callable[[int, int, int], Plan] | None:
    """The entry of PRIVACIES by name, its arguments checked.

    Raises:
      UserError: unknown name or argument, or a value out of its range.
    """
    return registry.bind(PRIVACIES, 'privacy', name=name, **kwargs)()


def _require_library():
    if not all(map(importlib.util.find_spec, ('jax_privacy', 'dp_accounting'))):
        raise UserError(
            'config.privacy needs jax-privacy and dp-accounting, which are not installed: pip install '
            "'jaxcls[privacy]', or set config.privacy.name=none."
        )


def _accountant():
    from jax_privacy import accounting

    distribution = accounting.PldAccountantConfig(value_discretization_interval=_DISCRETIZATION)
    return accounting.DpsgdTrainingAccountant(distribution)


@functools.lru_cache(maxsize=1024)
def _epsilon(noise: float, examples: int, batch_size: int, delta: float, step: int) -> float:
    """Of the Poisson-sampled Gaussian mechanism, by its privacy loss distribution."""
    from jax_privacy import accounting

    params = accounting.DpParams(
        noise_multipliers=noise, num_samples=examples, batch_size=batch_size, delta=delta
    )
    return float(_accountant().compute_epsilon(step, params))


@functools.lru_cache
def _calibrated(epsilon: float, examples: int, batch_size: int, delta: float, steps: int) -> float:
    """The noise multiplier, to 0.001, with which so many steps spend the budget or a little less."""
    from jax_privacy import accounting

    return accounting.calibrate_noise_multiplier(
        target_epsilon=epsilon,
        accountant=_accountant(),
        batch_sizes=batch_size,
        num_updates=steps,
        num_samples=examples,
        target_delta=delta * (1 - _SLACK),
        tol=1e-3,
    )


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


@functools.lru_cache
def _overflow(examples: int, batch_size: int, rows: int) -> float:
    """The probability that a batch has more examples than rows."""
    from scipy import stats  # slow to import

    return float(stats.binom.sf(rows, examples, batch_size / examples))


def _rows(
    examples: int, batch_size: int, delta: float, steps: int, epsilon: float, microbatch: int
) -> int:
    """The fewest rows with which `Plan.epsilon` holds, in whole microbatches and multiples of 8 or 64."""
    from scipy import stats  # slow to import

    share = delta * _SLACK / steps / (1 + math.exp(min(epsilon, 600)))
    rows = int(stats.binom.isf(share, examples, batch_size / examples)) + 1
    unit = math.lcm(64 if rows > 512 else 8, microbatch or 1)
    return -(-rows // unit) * unit


@functools.lru_cache(maxsize=64)  # a stream asks for the batch at each of its rows
def poisson_order(
    seed: int, examples: int, batch_size: int, rows: int, step: int
) -> dict[str, np.ndarray]:
    """A batch that each example joins with a probability of `batch_size / examples`, padded to `rows`.

    A pure function of (seed, step). Of a batch that does not fit, `rows` examples drawn at random
    remain: `Plan.epsilon` pays for it.

    Returns:
      `index`, `epoch` int32 [rows] and `mask` bool [rows], False for padding.
    """
    from jax_privacy import batch_selection

    sampling = batch_selection.CyclicPoissonSampling(
        sampling_prob=batch_size / examples, iterations=1, truncated_batch_size=rows
    )
    # Not the stream of any epoch's permutation (`pipeline.permutation`).
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 2**63 + step], np.uint64)))
    [drawn] = sampling.batch_iterator(examples, random)
    index = np.zeros(rows, np.int32)
    index[: len(drawn)] = drawn
    epoch = np.full(rows, step * batch_size // examples, np.int32)
    return {'index': index, 'epoch': epoch, 'mask': np.arange(rows) < len(drawn)}


def make_gradients(plan: Plan, l1: float = 0.0, l2: float = 0.0) -> Callable:
    """Seam 3: `gradients(objective, params, batch_stats, batch, key) -> ((loss, aux), grads)`.

    `grads` are float32: the sum of each example's gradient, clipped, with noise, over the expected batch
    size; padding adds nothing. Penalties depend on no example: their gradient is added last, so the
    objective must have none. `loss` is the mean loss without noise, else 0, since nothing that is not
    private may reach the optimiser or decide whether a step is taken. `aux` is as of the objective.
    """

    def gradients(objective, params, batch_stats, batch, key):
        from jax_privacy import clipping, noise_addition

        def of_one(params, row, key):
            loss, aux = objective(params, batch_stats, row, key)
            return loss, aux['sums']

        noise_key, model_key = jax.random.split(key)
        clipped = clipping.clipped_grad(
            of_one,
            has_aux=True,
            l2_clip_norm=plan.clip_norm,
            normalize_by=plan.batch_size,
            return_values=True,
            microbatch_size=plan.microbatch or None,
            dtype=jnp.float32,
            prng_argnum=2,
        )
        with warnings.catch_warnings():  # jax-privacy 2.0 calls a function that Optax has renamed
            warnings.filterwarnings('ignore', 'optax.global_norm', DeprecationWarning)
            grads, found = clipped(params, batch, model_key, is_padding_example=~batch['mask'])
        loss = jnp.sum(found.values, where=batch['mask'], dtype=jnp.float32) / plan.batch_size
        if plan.noise_multiplier:
            noise = noise_addition.gaussian_privatizer(
                stddev=plan.noise_multiplier * clipped.l2_norm_bound, prng_key=noise_key
            )
            grads, _ = noise.update(grads, noise.init(grads))
            loss = jnp.zeros_like(loss)
        if l1 or l2:
            more = jax.grad(optimizers.penalty)(params, l1, l2)
            grads = jax.tree.map(jnp.add, grads, more)
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), found.aux)
        return (loss, {'batch_stats': batch_stats, 'sums': sums}), grads

    return gradients


def refuse(obstacles: Sequence[tuple[str, Any, str]]):
    """Raises UserError for the first field of a config that is set and does not go with privacy.

    Args:
      obstacles: a field, whether it is set so, and why it does not go.
    """
    for field, there, why in obstacles:
        if there:
            raise UserError(
                f'config.privacy does not go with this config.{field}: {why}. '
                'Change it, or set config.privacy.name=none.'
            )
