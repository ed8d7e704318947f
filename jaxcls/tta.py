"""Test-time augmentation: probabilities averaged over views of each image.

The idea is AlexNet's (Krizhevsky 2012, ten crops). The accuracies that Jordan 2024
(https://arxiv.org/abs/2404.00498) reports for airbench have it: he averages logits over mirrored and
shifted views.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcls import augment
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError

# uint8 [B, H, W, C] to the same.
View = Callable[[jax.Array], jax.Array]

MAX_VIEWS = 64


def _same(image: jax.Array) -> jax.Array:
    return image


def _mirror(image: jax.Array) -> jax.Array:
    return image[:, :, ::-1]


def _shift(down: int, right: int) -> View:
    """Moves by some pixels, twice as far in images of 64 pixels or more; edges are repeated."""

    def shift(image):
        height, width = image.shape[1:3]
        far = 1 if min(height, width) < 64 else 2
        padded = jnp.pad(image, ((0, 0), (far, far), (far, far), (0, 0)), mode='edge')
        top, left = far * (1 - down), far * (1 - right)
        return padded[:, top : top + height, left : left + width]

    return shift


def _then(first: View, second: View) -> View:
    return lambda image: second(first(image))


def _mirrored(views: list[View]) -> list[View]:
    return [*views, *(_then(view, _mirror) for view in views)]


_SHIFTS = [_same, _shift(-1, 0), _shift(1, 0), _shift(0, -1), _shift(0, 1)]
VIEWS: dict[str, list[View]] = {
    'none': [_same],
    'flip': [_same, _mirror],
    'shift': _SHIFTS,
    'flip_shift': _mirrored(_SHIFTS),
    'flip_diagonal': _mirrored([_same, _shift(-1, -1), _shift(1, 1)]),  # Jordan 2024's
}


def make_views(
    experiment: experiment_lib.Experiment, spec: str, seed: int = 0
) -> Callable[[jax.Array], jax.Array]:
    """`views(image)`: uint8 [B, H, W, C] to levels in [0, 255], uint8 or float32 [N, B, H, W, C].

    Args:
      spec: a name of VIEWS: 'none'; 'flip' (the image and its mirror image); 'shift' (the image, and
        moved up, down, left and right by a pixel, by 2 from 64 pixels on); 'flip_shift' (these five
        and their mirror images); 'flip_diagonal' (the image, and moved along the diagonal both ways, and
        their mirror images). Or a number N, such as '16', at most MAX_VIEWS: the image, and N - 1
        draws of the run's own `config.augment` without what mixes examples (`augment.MIXING`). A draw is the
        same for all images, so that batches and their padding have no say.
      seed: of the draws. Those of a smaller number are among those of a larger one.

    Raises:
      UserError: neither, or a number where the run has no augmentation to draw from.
    """
    if spec not in VIEWS and spec not in map(str, range(1, MAX_VIEWS + 1)):
        raise UserError(
            f'--tta is {spec!r}; it must be {", ".join(VIEWS)} or the number of views, 1 to {MAX_VIEWS}.'
        )
    if spec in VIEWS or int(spec) == 1:
        fixed = VIEWS.get(spec, VIEWS['none'])
        return lambda image: jnp.stack([view(image) for view in fixed])
    own = [item for item in experiment.config.augment if item['name'] not in augment.MIXING]
    if not own:
        raise UserError(
            f'--tta={spec} draws from the augmentation of the run, config.augment, which has none that '
            f'is of one image. Take {", ".join(VIEWS)}.'
        )
    return _drawn(augment.make_augment(own), experiment.num_classes, seed, int(spec))


def _drawn(draw: Callable, num_classes: int, seed: int, count: int):
    """Views by draws that every image goes through as if it were alone."""

    def alone(number, image):
        batch = {
            'image': augment.to_float(image)[None],
            'target': jnp.zeros((1, num_classes)),
            'mask': jnp.ones(1, bool),
            'index': jnp.zeros(1, jnp.int32),
            'epoch': number[None],
        }
        key = jax.random.fold_in(jax.random.key(seed), number)
        return 255.0 * draw(key, batch)['image'][0]

    def views(image):
        one_draw = jax.vmap(alone, (None, 0))
        drawn = jax.lax.map(lambda number: one_draw(number, image), jnp.arange(1, count))
        return jnp.concatenate([image[None].astype(jnp.float32), drawn])

    return views


def make_predict(
    experiment: experiment_lib.Experiment, spec: str, seed: int = 0
) -> Callable[[Any, jax.Array], jax.Array]:
    """`predict(variables, image) -> logits` in place of `experiment.predict`, averaged over views.

    uint8 [B, H, W, C] to float32 [B, K]. The logits are the logarithms of the mean of the views'
    softmax probabilities; with one view ('none', '1') they are the model's own. Of a network that is
    trained with other probabilities (sigmoid_cross_entropy) the accuracy means something, and the
    loss does not.

    Args:
      spec, seed: as in `make_views`.

    Raises:
      UserError: as `make_views`.
    """
    views = make_views(experiment, spec, seed)
    if spec in ('none', '1'):
        return experiment.predict

    def predict(variables, image):
        images = views(image)

        def log_probabilities(image):
            return jax.nn.log_softmax(experiment.predict(variables, image))

        # On CPU, XLA's convolutions are slow inside a loop; elsewhere all views may fill the memory.
        together = len(images) if jax.default_backend() == 'cpu' else 1
        found = jax.lax.map(log_probabilities, images, batch_size=together)
        return jax.nn.logsumexp(found, axis=0) - jnp.log(len(images))

    return predict
