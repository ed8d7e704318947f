"""The deep belief network: RBMs trained one on the other, unrolled into a sigmoid classifier.

Hinton, Osindero & Teh 2006 (Neural Computation 18); Hinton & Salakhutdinov 2006 (Science 313). The
recipe is that of Hinton 2010, "A practical guide to training RBMs". Fine-tuning is ordinary training.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcls.errors import UserError, require
from jaxcls.models.layers import DenseNormAct, as_input, check_fields, check_sizes, head, style_of
from jaxcls.models.references import Reference


class RBM(NamedTuple):
    """A restricted Boltzmann machine of binary units, or a gradient of one. The energy E(v, h) is
    -v kernel h - v visible_bias - h hidden_bias, with kernel [V, H] and biases [V] and [H]."""

    kernel: jax.Array
    visible_bias: jax.Array
    hidden_bias: jax.Array


class Recipe(NamedTuple):
    """How an RBM is trained; see the arguments of `DBN`."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: tuple[float, float]
    weight_decay: float
    cd_steps: int


def hidden_probabilities(rbm: RBM, visible: jax.Array) -> jax.Array:
    """P(h = 1 | v): [..., V] in [0, 1] -> [..., H]."""
    return jax.nn.sigmoid(visible @ rbm.kernel + rbm.hidden_bias)


def visible_probabilities(rbm: RBM, hidden: jax.Array) -> jax.Array:
    """P(v = 1 | h): [..., H] in [0, 1] -> [..., V]."""
    return jax.nn.sigmoid(hidden @ rbm.kernel.T + rbm.visible_bias)


def free_energy(rbm: RBM, visible: jax.Array) -> jax.Array:
    """-log of the sum over h of exp(-E(v, h)): [B, V] -> [B]."""
    softplus = jax.nn.softplus(visible @ rbm.kernel + rbm.hidden_bias)
    return -visible @ rbm.visible_bias - softplus.sum(-1)


def contrastive_divergence(key, rbm: RBM, visible: jax.Array, cd_steps: int = 1):
    """CD-k: estimates the gradient of the mean log-likelihood of visible [B, V], values in [0, 1].

    Hinton 2002 (Neural Computation 14). Chains of `cd_steps` Gibbs steps start at the data; both
    layers are sampled, so that long chains leave no bias. Statistics take hidden probabilities.
    Returns the gradient, to ascend, and the mean squared error [] of the first reconstruction.
    """

    def gibbs(chain, key):
        hidden_key, visible_key = jax.random.split(key)
        hidden = jax.random.bernoulli(hidden_key, chain[1]).astype(jnp.float32)
        reconstruction = visible_probabilities(rbm, hidden)
        sampled = jax.random.bernoulli(visible_key, reconstruction).astype(jnp.float32)
        error = jnp.mean((visible - reconstruction) ** 2)
        return (sampled, hidden_probabilities(rbm, sampled)), error

    data = (visible, hidden_probabilities(rbm, visible))
    chain, errors = jax.lax.scan(gibbs, data, jax.random.split(key, cd_steps))
    return jax.tree.map(jnp.subtract, _statistics(*data), _statistics(*chain)), errors[0]


def _statistics(visible, hidden):
    return RBM(visible.T @ hidden / len(visible), visible.mean(0), hidden.mean(0))


@functools.partial(jax.jit, static_argnames='recipe')
def train_epoch(key, rbm: RBM, velocity: RBM, data: jax.Array, momentum: float, recipe: Recipe):
    """One program for one epoch over data [N, V], shuffled, without the last incomplete batch.

    Returns the RBM, its velocity, and the mean reconstruction error [].
    """
    rate, (shuffle_key, chain_key) = recipe.learning_rate, jax.random.split(key)
    count = len(data) // recipe.batch_size
    order = jax.random.permutation(shuffle_key, len(data))[: count * recipe.batch_size]

    def step(carry, inputs):
        rbm, velocity = carry
        key, rows = inputs
        gradient, error = contrastive_divergence(key, rbm, data[rows], recipe.cd_steps)
        gradient = gradient._replace(kernel=gradient.kernel - recipe.weight_decay * rbm.kernel)
        velocity = jax.tree.map(lambda v, g: momentum * v + rate * g, velocity, gradient)
        return (jax.tree.map(jnp.add, rbm, velocity), velocity), error

    inputs = (jax.random.split(chain_key, count), order.reshape(count, -1))
    (rbm, velocity), errors = jax.lax.scan(step, (rbm, velocity), inputs)
    return rbm, velocity, errors.mean()


def pretrain_rbm(
    key: jax.Array, data: jax.Array, hidden: int, recipe: Recipe, report: Callable[[dict], None]
) -> RBM:
    """An RBM of `hidden` units trained on data float32 [N, V] in [0, 1].

    `report` gets {'epoch': 1, 'reconstruction_error': 0.05} after each epoch. Raises a UserError
    where there is less than a batch, or where training diverges.
    """
    size, most = recipe.batch_size, f'at most {len(data)}, the number of images'
    require(size <= len(data), 'pretrain_batch_size', size, most)
    shape = (data.shape[1], hidden)
    kernel = 0.01 * jax.random.normal(jax.random.fold_in(key, 0), shape)
    rbm = RBM(kernel, jnp.zeros(shape[0]), jnp.zeros(hidden))
    velocity = jax.tree.map(jnp.zeros_like, rbm)
    for epoch in range(1, recipe.epochs + 1):
        momentum = recipe.momentum[epoch > 5]
        epoch_key = jax.random.fold_in(key, epoch)
        rbm, velocity, error = train_epoch(epoch_key, rbm, velocity, data, momentum, recipe)
        if not math.isfinite(error):
            rate = f'pretrain_learning_rate={recipe.learning_rate}'
            raise UserError(f'Pretraining with {rate} diverged in epoch {epoch}: lower it.')
        report({'epoch': epoch, 'reconstruction_error': float(error)})
    return rbm


@jax.jit
def _propagate(rbm, data):
    # In parts: all at once, the product would take as much memory as the result.
    return jax.lax.map(lambda v: hidden_probabilities(rbm, v), data, batch_size=1000)


class DBN(nn.Module):
    """Sigmoid layers that start as RBMs, each trained on the hidden probabilities of the one below.

    A model with `start_from_data` takes `start_examples` training images (0: all) before training.

    Call: images [B, H, W, C] float -> logits float32 [B, num_classes], features 'hidden1', ... and
    'pooled' (the last of them).

    Args:
      hidden: widths of the hidden layers.
      kernel_init: of hidden layers without pretraining, Glorot's so that the comparison is fair;
        the RBMs do not read it and start at a normal of 0.01.
      pretrain_epochs: of each RBM; 0 is the same network from random weights.
      pretrain_batch_size: an incomplete last batch of an epoch is dropped.
      pretrain_momentum: in the first 5 epochs of an RBM, and after them.
      pretrain_weight_decay: of kernels; it is multiplied by the learning rate.
      cd_steps: Gibbs steps of contrastive divergence.
    """

    start_examples: ClassVar[int] = 0
    norm: ClassVar[str] = 'none'  # for style_of

    num_classes: int = 10
    hidden: tuple[int, ...] = (500, 500, 2000)
    activation: str = 'sigmoid'
    dropout: float = 0.0
    kernel_init: str = 'glorot_uniform'
    head_init: str = 'normal'
    pretrain_epochs: int = 10
    pretrain_batch_size: int = 100
    pretrain_learning_rate: float = 0.1
    pretrain_momentum: tuple[float, float] = (0.5, 0.9)
    pretrain_weight_decay: float = 0.0002
    cd_steps: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        check_sizes(**{f: getattr(self, f) for f in ('hidden', 'pretrain_batch_size', 'cd_steps')})
        for field in ('pretrain_epochs', 'pretrain_learning_rate', 'pretrain_weight_decay'):
            ok = 0 <= getattr(self, field) < math.inf
            require(ok, field, getattr(self, field), 'at least 0 and finite')
        momentum = self.pretrain_momentum
        in_range = len(momentum) == 2 and all(0 <= m < 1 for m in momentum)
        require(in_range, 'pretrain_momentum', momentum, 'two numbers in [0, 1)')
        fits = self.activation == 'sigmoid' or not self.pretrain_epochs
        require(fits, 'activation', self.activation, "'sigmoid', or else pretrain_epochs=0")

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style, features = style_of(self), {}
        x = as_input(images, self.dtype)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            x = DenseNormAct(width, style, self.dropout, name=f'hidden{i}')(x, train=train)
            features[f'hidden{i}'] = x
        features['pooled'] = x
        return head(x, self.num_classes, style, self.head_init), features

    @nn.nowrap
    def check_pixels(self, low: float, high: float):
        """Raises a UserError unless images with values from `low` to `high` can be learned from."""
        hint = 'within [0, 1] for an RBM: set config.data.mean=(0,) and config.data.std=(1,)'
        fits = not self.pretrain_epochs or 0 <= low <= high <= 1
        require(fits, 'The range of the pixels', (float(low), float(high)), hint)

    def start_from_data(self, key, params, images, report: Callable[[dict], None]):
        """`params` with RBMs as hidden layers, whatever these were: pure in key, params and images.

        Args:
          images: float [N, H, W, C] in [0, 1], as the network will see them; else a UserError.
          report: gets {'layer': 1, 'epoch': 1, 'reconstruction_error': 0.05} (a mean square).
        """
        if not self.pretrain_epochs:
            return params
        data = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
        self.check_pixels(float(data.min()), float(data.max()))
        fields = {name: getattr(self, f'pretrain_{name}') for name in Recipe._fields[:-1]}
        fields |= {'momentum': tuple(self.pretrain_momentum), 'cd_steps': self.cd_steps}
        for i, width in enumerate(self.hidden, 1):
            log = functools.partial(lambda layer, e: report({'layer': layer, **e}), i)
            rbm = pretrain_rbm(jax.random.fold_in(key, i), data, width, Recipe(**fields), log)
            new = {'dense': {'kernel': rbm.kernel, 'bias': rbm.hidden_bias}}
            new = jax.tree.map(lambda o, n: n.astype(o.dtype), params[f'hidden{i}'], new)
            params = {**params, f'hidden{i}': new}
            data = _propagate(rbm, data) if i < len(self.hidden) else data
        return params


MODELS = {'dbn': DBN}
REFERENCES = {
    'dbn': Reference(
        'Hinton 2006, doi:10.1162/neco.2006.18.7.1527',
        1_665_010,
        (28, 28, 1),
        10,
        98.75,
        'MNIST, Hinton 2006',
    )
}
