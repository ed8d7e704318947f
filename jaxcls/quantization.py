"""Networks that compute with 8-bit integers: quantised after training, or trained that way (qwix).

Every product and convolution of a kernel rounds the kernel (a scale for each output) and what it reads (a
scale for each example) to int8, and adds in int32. The parameters and their names stay as they are. Grouped
convolutions stay in float.
"""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcls import registry
from jaxcls.errors import UserError
from jaxcls.models import convolutions

_CONVOLVE = 'jaxcls.models.convolutions.convolve'


def check_installed():
    """Raises UserError where qwix is missing."""
    if importlib.util.find_spec('qwix') is None:
        raise UserError("int8 needs qwix, which is not installed: pip install 'jaxcls[compress]'.")


def int8(model: nn.Module, *, keep: str = '') -> nn.Module:
    """Training in int8: forwards rounded, the gradient as if it were not (Jacob et al., 2017).

    https://arxiv.org/abs/1712.05877. The model trained so loses nothing more when it is converted.

    Args:
      keep: regular expression; modules whose path it is found in stay in float, such as '^head'.
    """
    from qwix import QtProvider

    return _quantized(model, QtProvider, keep)


QUANTIZATIONS = {'none': lambda model: model, 'int8': int8}


def quantize(model: nn.Module, image_shape, *, name: str, **kwargs) -> nn.Module:
    """The model under the quantisation of that name; itself for 'none'.

    Raises:
      UserError: unknown name or argument, a bad expression, or qwix is missing.
    """
    build = registry.bind(QUANTIZATIONS, 'quantization', name=name, **kwargs)
    if name == 'none':
        return model
    check_installed()
    quantized = build(model)
    _initial(quantized, image_shape)
    return quantized


def after_training(
    model: nn.Module, variables: Any, image_shape, keep: str = ''
) -> tuple[nn.Module, Any]:
    """A trained network in int8: the model, and its variables with int8 kernels and their scales.

    Args:
      model: in float, or as `int8` made it.
      variables: its own.
      image_shape: (H, W, C).
    """
    check_installed()
    import qwix

    quantized = _quantized(model, qwix.PtqProvider, keep)
    like = _initial(quantized, image_shape)
    params = jax.tree.map(jnp.asarray, variables['params'])
    return quantized, {**variables, 'params': qwix.quantize_params(params, like['params'])}


def _initial(model: nn.Module, image_shape) -> Any:
    """The shapes of a quantised model's variables.

    Raises:
      UserError: one of its kernels is not a parameter but computed from some.
    """
    image = jnp.zeros((1, *image_shape), model.dtype)
    try:
        return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    except AssertionError:
        raise UserError(
            f'{type(model).__name__} computes a kernel from its parameters, which int8 cannot do. '
            'Choose another model, or leave that module in float by config.quantization.keep.'
        ) from None


def _quantized(model: nn.Module, provider: type, keep: str) -> nn.Module:
    import qwix

    path = f'(?!.*(?:{keep})).*' if keep else '.*'  # qwix wants all of a path to match
    try:
        re.compile(path)
    except re.error as error:
        raise UserError(
            f'config.quantization.keep is {keep!r}, no regular expression: {error}.'
        ) from None
    rule = qwix.QuantizationRule(module_path=path, weight_qtype=jnp.int8, act_qtype=jnp.int8)
    return qwix.quantize_model(model, _with_our_convolution(provider)([rule]))


def _with_our_convolution(provider: type) -> type:
    """The provider, taking the place of `convolutions.convolve`, too.

    What that calls is inside a rule for its gradient, where a kernel is not known as a parameter any
    more.
    """

    class Provider(provider):
        def get_intercept_map(self) -> dict[str, Callable]:
            return {**super().get_intercept_map(), _CONVOLVE: self._convolve}

        def _convolve(self, x, kernel, stride, padding, groups=1):
            if groups > 1:  # qwix 0.1.8 has no gradient of these
                return convolutions.convolve(x, kernel, stride, padding, groups)
            return self.conv_general_dilated(
                x,
                kernel,
                window_strides=(stride, stride),
                padding=[(p, p) for p in padding],
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            )

    return Provider
