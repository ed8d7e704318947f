"""The networks, by name: `make_model('resnet20', num_classes=10)`.

Every model is a Flax module with one protocol:

    logits, features = model.apply(variables, images, train=False)

images: float [B, H, W, C]; logits: float32 [B, num_classes]; features: named activations, of which
'pooled' [B, D] is always what the last linear layer reads. What is not used costs nothing under
jit. `variables` has 'params' and, with batch norm, 'batch_stats', which training updates
(`mutable=['batch_stats']`); training with dropout or drop-path needs `rngs={'dropout': key}`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.models.classic import LeNet
from jaxcls.models.linear import MLP, SoftmaxRegression
from jaxcls.models.resnet import ResNet
from jaxcls.registry import bind

_CIFAR = {'num_filters': 16, 'stem': 'small', 'shortcut': 'pad'}
_PREACT_CIFAR = {**_CIFAR, 'preactivation': True}
_WRN = {'num_filters': 16, 'stem': 'small', 'preactivation': True}
_BOTTLENECK = {'branch': 'bottleneck'}
_D = {'stem': 'deep', 'shortcut': 'pool', 'zero_init_residual': True}

MODELS = {
    'linear': SoftmaxRegression,
    'mlp': MLP,
    'lenet5': LeNet,
    # For images as small as 8x8 (scikit-learn's digits).
    'lenet_small': partial(
        LeNet, filters=(32, 64), kernel_size=3, padding=(1, 1), hidden=(128,), norm='batch'
    ),
    # He 2015 on CIFAR: three stages, option A.
    'resnet20': partial(ResNet, stage_sizes=(3, 3, 3), **_CIFAR),
    'resnet32': partial(ResNet, stage_sizes=(5, 5, 5), **_CIFAR),
    'resnet44': partial(ResNet, stage_sizes=(7, 7, 7), **_CIFAR),
    'resnet56': partial(ResNet, stage_sizes=(9, 9, 9), **_CIFAR),
    'resnet110': partial(ResNet, stage_sizes=(18, 18, 18), **_CIFAR),
    # He 2015 on ImageNet; with stem='small' for CIFAR.
    'resnet18': partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    'resnet34': partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    'resnet50': partial(ResNet, stage_sizes=(3, 4, 6, 3), **_BOTTLENECK),
    'resnet101': partial(ResNet, stage_sizes=(3, 4, 23, 3), **_BOTTLENECK),
    'resnet152': partial(ResNet, stage_sizes=(3, 8, 36, 3), **_BOTTLENECK),
    # He 2019.
    'resnet18d': partial(ResNet, stage_sizes=(2, 2, 2, 2), **_D),
    'resnet34d': partial(ResNet, stage_sizes=(3, 4, 6, 3), **_D),
    'resnet50d': partial(ResNet, stage_sizes=(3, 4, 6, 3), **_D, **_BOTTLENECK),
    'resnet101d': partial(ResNet, stage_sizes=(3, 4, 23, 3), **_D, **_BOTTLENECK),
    # He 2016.
    'preact_resnet18': partial(ResNet, stage_sizes=(2, 2, 2, 2), preactivation=True),
    'preact_resnet20': partial(ResNet, stage_sizes=(3, 3, 3), **_PREACT_CIFAR),
    'preact_resnet110': partial(ResNet, stage_sizes=(18, 18, 18), **_PREACT_CIFAR),
    'preact_resnet164': partial(
        ResNet,
        stage_sizes=(18, 18, 18),
        **_PREACT_CIFAR | {'shortcut': 'projection'},
        **_BOTTLENECK,
    ),
    # Zagoruyko 2016: wrn<depth>_<width>, depth = 6 n + 4 with n blocks a stage.
    'wrn16_4': partial(ResNet, stage_sizes=(2, 2, 2), width=4, **_WRN),
    'wrn28_10': partial(ResNet, stage_sizes=(4, 4, 4), width=10, **_WRN),
}


def make_model(
    name: str,
    *,
    num_classes: int = 10,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    **kwargs,
) -> nn.Module:
    """Builds the model of that name in MODELS.

    Args:
      dtype, param_dtype: of the computation and of the parameters; logits are float32 in any case.
      **kwargs: fields of the model, plain data.

    Raises:
      UserError: an unknown name, field, activation, norm or initialiser, or a value out of range.
    """
    build = bind(MODELS, 'model', name=name, **kwargs)
    return build(num_classes=num_classes, dtype=dtype, param_dtype=param_dtype)
