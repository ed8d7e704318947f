"""The networks, by name: `make_model('resnet20', num_classes=10)`.

Every model is a Flax module with one protocol:

    logits, features = model.apply(variables, images, train=False)

images: float [B, H, W, C]; logits: float32 [B, num_classes]; features: named activations, of which
'pooled' [B, D] is always what the last linear layer reads. What is not used costs nothing under
jit. `variables` has 'params' and, with batch norm, 'batch_stats', which training updates
(`mutable=['batch_stats']`); training with dropout or drop-path needs `rngs={'dropout': key}`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxcls.models import (
    airbench,
    classic,
    convnext,
    dbn,
    densenet,
    inception,
    linear,
    mobilenet,
    resnet,
    vgg,
    vit,
)
from jaxcls.registry import bind

FAMILIES = (
    linear,
    classic,
    vgg,
    dbn,
    resnet,
    mobilenet,
    inception,
    densenet,
    vit,
    convnext,
    airbench,
)
MODELS = {name: model for family in FAMILIES for name, model in family.MODELS.items()}
# See `models.references`: what was published of each, and how other libraries name its parts.
REFERENCES = {name: known for family in FAMILIES for name, known in family.REFERENCES.items()}
# A network's class -> its family's NAMES.
WEIGHT_NAMES = {
    classic.AlexNet: classic.NAMES,
    vgg.VGG: vgg.NAMES,
    inception.GoogLeNet: inception.V1_NAMES,
    inception.InceptionV3: inception.V3_NAMES,
    resnet.ResNet: resnet.NAMES,
    convnext.ConvNeXt: convnext.NAMES,
    densenet.DenseNet: densenet.NAMES,
    vit.ViT: vit.NAMES,
    mobilenet.MobileNet: mobilenet.NAMES,
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
