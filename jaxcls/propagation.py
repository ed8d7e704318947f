"""How far signals and gradients travel through a fresh network, layer by layer.

Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcls import augment, losses, pipeline
from jaxcls import experiment as experiment_lib
from jaxcls.results import Member

# Fields of models: what training drops at random.
_RATES = ('dropout', 'aux_dropout', 'drop_path')


class Propagation(NamedTuple):
    """By layer, in the order of the forward pass, on one batch of training images.

    Attributes:
      names: of the layers, the model's named features that have parameters of their own, and the head.
      activation: standard deviation of each layer's output; the logits' for the head.
      gradient: norm of the loss's gradient with respect to each layer's parameters.
    """

    names: list[str]
    activation: list[float]
    gradient: list[float]


def at_start(member: Member, examples: int = 256) -> Propagation:
    """A run's network as its seed draws it, whatever the run itself starts from (`init_from`, data)."""
    config, data = member.config, member.data
    training = experiment_lib.load_split(config, config.data.train)
    reader = experiment_lib.make_reader(config, training, train=False)
    experiment = experiment_lib.build_for(config, data)
    rows = pipeline.permutation(config.seed, 0, len(training.source))[:examples]
    examples_ = [reader(int(row)) for row in rows]
    images = np.stack([image for image, _ in examples_])
    label = jnp.array([label for _, label in examples_])
    state = jax.jit(lambda seed: experiment_lib.init(experiment, seed))(np.int32(config.seed))
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    return of(experiment, variables, images, label)


def of(
    experiment: experiment_lib.Experiment, variables: Any, images: np.ndarray, label: jax.Array
) -> Propagation:
    """Of given variables: images uint8 [B, H, W, C], label int32 [B].

    A norm sees the batch as in training; nothing is dropped.
    """
    data, model = experiment.config.data, experiment.model
    model = model.clone(**{rate: 0.0 for rate in _RATES if hasattr(model, rate)})
    image = augment.normalize(augment.to_float(jnp.asarray(images)), data.mean, data.std)
    target = jax.nn.one_hot(label, experiment.num_classes)
    order = []  # a traced dict comes back sorted

    def forward(params):
        (logits, features), _ = model.apply(
            {**variables, 'params': params},
            image.astype(model.dtype),
            train=True,
            mutable=['batch_stats'],
        )
        order[:] = [name for name in features if name in params] + ['head']
        deviation = {name: jnp.std(features[name]) for name in order[:-1]} | {'head': logits.std()}
        loss = losses.masked_mean(experiment.loss(logits, target), jnp.ones(len(label), bool))
        return loss, deviation

    grads, deviation = jax.jit(jax.grad(forward, has_aux=True))(variables['params'])
    norms = {name: optax.tree.norm(grads[name]) for name in order}
    return Propagation(
        list(order), [float(deviation[n]) for n in order], [float(norms[n]) for n in order]
    )
