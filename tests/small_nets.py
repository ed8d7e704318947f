"""Small networks of the families whose channels can be cut, with random arrays, for several tests."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcls import weights
from jaxcls.models import make_model

NETS = {
    'mlp': ((4, 4, 1), {'hidden': (8, 6)}),
    'lenet_small': ((8, 8, 1), {'filters': (4, 6), 'hidden': (8,)}),
    'vgg11_bn': (
        (8, 8, 3),
        {'stage_sizes': (1, 2), 'widths': (4, 6), 'hidden': (8,), 'pool_size': 2},
    ),
    'resnet20': ((8, 8, 3), {'stage_sizes': (1, 1), 'num_filters': 4}),
    'preact_resnet50': (
        (8, 8, 3),
        {'stage_sizes': (1, 1), 'num_filters': 4, 'stem': 'small'},
    ),
}


def build(name, batch=2, **fields):
    """A network, its variables by path, random biases, scales and statistics too, and images."""
    shape, sizes = NETS[name]
    model = make_model(name, **{**sizes, **fields})
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), image))
    flat = {}
    for path, leaf in weights.flatten(like).items():
        values = rng.uniform(0.5, 1.5, leaf.shape)
        sign = rng.choice((-1, 1), leaf.shape) if path.endswith('kernel') else 1
        flat[path] = np.float32(values * sign)
    return model, flat, image


def logits(model, variables, image):
    """float32 [B, K], of variables by path or as a tree."""
    tree = variables if 'params' in variables else weights.unflatten(variables)
    return np.asarray(jax.jit(model.apply)(tree, image)[0])
