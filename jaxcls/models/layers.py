"""What all networks are made of: convolutions, norms, activations, initialisers, pools, heads.

Names in configs (`activation`, `norm`, `kernel_init`, `pool`) are keys of the tables here. Every
convolution of every model goes through `convolutions.convolve`, every pool through `max_pool` (of
`maxima.window_maxima`) or `avg_pool`, so a faster form of one of them is faster everywhere.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcls.errors import UserError, require
from jaxcls.models.batch_norm import BatchNorm
from jaxcls.models.convolutions import convolve
from jaxcls.models.maxima import window_maxima
from jaxcls.registry import lookup

init = jax.nn.initializers


def _select(x):
    return jnp.where(x <= 0, 0, x)


# Inlined: each shape is traced once.
@jax.custom_jvp
@functools.partial(jax.jit, inline=True)
def relu(x):
    """max(x, 0), with the gradient 0 at 0, as `jax.nn.relu`.

    On CPU it is a select, whose result XLA keeps for all that read it, and its gradient looks at that. A
    maximum of one array it repeats for each, with the sums of all residual blocks before: with it a train
    step of ResNet-50 moves 13% more bytes and takes 1.04 times as long.
    """
    return jax.lax.platform_dependent(x, cpu=_select, default=jax.nn.relu)


@relu.defjvp
@functools.partial(jax.jit, inline=True)
def _jvp_of_relu(primals, tangents):
    [x], [tangent] = primals, tangents
    y = relu(x)
    positive = jax.lax.platform_dependent(
        x, y, cpu=lambda _x, y: y > 0, default=lambda x, _y: x > 0
    )
    return y, jnp.where(positive, tangent, 0)


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)
def relu_of_sum(x):
    """`relu` of a sum, of a residual block or with a bias, which the gradient would compute anew or keep.

    On a GPU too it is a select, and the gradient looks at the result. That of `relu` there computes x again,
    which after a batch norm is read anyway; of a sum it would read both parts. Without its convolutions, a
    train step of ResNet-18 moves 12.9 GB so, and 13.5 the other way (bfloat16, 1,024 images). Without a norm
    it need not keep x: a train step of AlexNet or VGG-11 holds 17% less.
    """
    return jax.lax.platform_dependent(x, cpu=_select, cuda=_select, default=jax.nn.relu)


@relu_of_sum.defjvp
@functools.partial(jax.jit, inline=True)
def _jvp_of_relu_of_sum(primals, tangents):
    [x], [tangent] = primals, tangents
    y = relu_of_sum(x)
    return y, jnp.where(y > 0, tangent, 0)


ACTIVATIONS = {
    'relu': relu,
    'leaky_relu': jax.nn.leaky_relu,
    'relu6': jax.nn.relu6,
    'elu': jax.nn.elu,
    'selu': jax.nn.selu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'silu': jax.nn.silu,
    'hard_swish': jax.nn.hard_swish,
    'hard_sigmoid': jax.nn.hard_sigmoid,
    'softplus': jax.nn.softplus,
    'sigmoid': jax.nn.sigmoid,
    'tanh': jnp.tanh,
    'scaled_tanh': lambda x: 1.7159 * jnp.tanh(2 / 3 * x),  # LeCun 1998: about x at +-1
    'identity': lambda x: x,
}
ACTIVATIONS_OF_SUMS = {**ACTIVATIONS, 'relu': relu_of_sum}
# To the bit, the greatest of what they make is what they make of the greatest.
_KEEP_ORDER = ('relu', 'leaky_relu', 'relu6', 'identity')


def _lecun_1998(key, shape, dtype=jnp.float32):
    """Uniform within +-2.4 / fan_in (LeCun 1998)."""
    bound = 2.4 / math.prod(shape[:-1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


# Within +-1 / sqrt(fan_in): what PyTorch's convolutions and dense layers start with.
_pytorch_uniform = init.variance_scaling(1 / 3, 'fan_in', 'uniform')


def _orthogonal(key, shape, dtype=jnp.float32):
    wide = jnp.promote_types(dtype, jnp.float32)  # LAPACK has no narrower
    return init.orthogonal()(key, shape, wide).astype(dtype)


def _dirac(key, shape, dtype=jnp.float32):
    """[h, w, I, O]: the first I outputs copy the inputs, others are `_pytorch_uniform` (Jordan 2024)."""
    copies, centre = min(shape[-2:]), tuple(n // 2 for n in shape[:-2])
    kernel = _pytorch_uniform(key, shape, dtype).at[..., :copies].set(0)
    return kernel.at[*centre, :, :copies].set(jnp.eye(shape[-2], copies, dtype=dtype))


# Glorot & Bengio 2010; He 2015 ("Delving deep", normal as in the paper; the ResNets use fan_out);
# Saxe 2013 (orthogonal). 'normal' is the small one (standard deviation 0.01) of Krizhevsky 2012;
# 'truncated_normal' has 0.02 after the cut at two standard deviations, which takes 12% of it.
INITIALIZERS = {
    'zeros': init.zeros,
    'normal': init.normal(0.01),
    'truncated_normal': init.truncated_normal(0.02 / 0.8796),
    'lecun_1998': _lecun_1998,
    'lecun_normal': init.variance_scaling(1.0, 'fan_in', 'normal'),
    'glorot_normal': init.variance_scaling(1.0, 'fan_avg', 'normal'),
    'glorot_uniform': init.variance_scaling(1.0, 'fan_avg', 'uniform'),
    'he_normal': init.variance_scaling(2.0, 'fan_in', 'normal'),
    'he_uniform': init.variance_scaling(2.0, 'fan_in', 'uniform'),
    'he_normal_fan_out': init.variance_scaling(2.0, 'fan_out', 'normal'),
    'orthogonal': _orthogonal,
    'pytorch_uniform': _pytorch_uniform,
    'dirac': _dirac,
}


def group_count(channels: int, size: int = 16) -> int:
    """The number of equal groups of at least `size` channels each, as near to it as can be."""
    group = next(g for g in range(min(size, channels), channels + 1) if channels % g == 0)
    return channels // group


@dataclasses.dataclass(frozen=True)
class Style:
    """What all layers of one network share. Names are keys of the tables of this module.

    Attributes:
      norm_epsilon: added to the variance.
      norm_momentum: what a batch norm's running statistics keep at each step; 1 - PyTorch's.
    """

    activation: str = 'relu'
    norm: str = 'batch'
    kernel_init: str = 'he_normal'
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


# name -> (channels, train, style, **Flax fields) -> norm. Statistics are float32 whatever the dtype.
# Batch (Ioffe & Szegedy 2015): those of the global batch when it is sharded under jit; frozen_batch
# keeps its running ones in training too, to fine-tune with. Group (Wu & He 2018): 16 channels a
# group, or all where there are fewer. Layer (Ba 2016): over the channels.
NORMS = {
    'batch': lambda _channels, train, style, **fields: BatchNorm(
        use_running_average=not train,
        momentum=style.norm_momentum,
        epsilon=style.norm_epsilon,
        **fields,
    ),
    'frozen_batch': lambda _channels, _train, style, **fields: BatchNorm(
        use_running_average=True, epsilon=style.norm_epsilon, **fields
    ),
    'group': lambda channels, _train, style, **fields: nn.GroupNorm(
        num_groups=group_count(channels), epsilon=style.norm_epsilon, **fields
    ),
    'layer': lambda _channels, _train, style, **fields: nn.LayerNorm(
        epsilon=style.norm_epsilon, **fields
    ),
    'none': lambda _channels, _train, _style, **_fields: lambda x: x,
}


def style_of(model: nn.Module) -> Style:
    """The `Style` in a model's fields of the same names; a field it lacks is the plain one."""
    names = [f.name for f in dataclasses.fields(Style) if hasattr(model, f.name)]
    return Style(**{name: getattr(model, name) for name in names})


def check_fields(model: nn.Module) -> None:
    """Raises a UserError for an unknown name, a rate, momentum or epsilon out of range, or bad classes.

    Looks at those of the models' common fields that this model has.
    """
    tables = {'activation': ACTIVATIONS, 'norm': NORMS, 'pool': POOLS}
    tables |= {'kernel_init': INITIALIZERS, 'head_init': INITIALIZERS}
    for field, table in tables.items():
        if hasattr(model, field):
            lookup(table, getattr(model, field), field)
    for field in ('dropout', 'drop_path'):
        rate = getattr(model, field, 0.0)
        if not 0 <= rate < 1:
            raise UserError(f'{field}={rate} is not a rate: expected 0 <= {field} < 1.')
    keeps = getattr(model, 'norm_momentum', 0.0)
    require(0 <= keeps <= 1, 'norm_momentum', keeps, '0 to 1')
    epsilon = getattr(model, 'norm_epsilon', 0.0)
    require(0 <= epsilon < math.inf, 'norm_epsilon', epsilon, 'at least 0 and finite')
    check_sizes(num_classes=model.num_classes)


def check_sizes(**sizes: int | tuple[int, ...]) -> None:
    """Raises a UserError that names the first size that is not whole, of at least 1 and below 2^31."""
    for field, value in sizes.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        if not all(isinstance(v, int) and v > 0 for v in values):
            raise UserError(f'{field}={value!r}: expected whole numbers of at least 1.')
        if max(values, default=1) >= 2**31:
            raise UserError(f'{field}={value!r}: expected less than 2^31.')


def as_input(images: jax.Array, dtype: Any) -> jax.Array:
    """Float images [B, H, W, C] in the compute dtype; a UserError for anything else."""
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f'Got images {images.dtype}{list(images.shape)}, expected floats [B, H, W, C]: add '
            'missing dimensions, and prepare (scale, normalise) raw images first.'
        )
    return images.astype(dtype)


def check_window(x: jax.Array, window: tuple[int, int], padding: tuple[int, int], what: str):
    """Raises a UserError when a window does not fit into padded activations [B, H, W, C]."""
    got = x.shape[1:3]
    need = [max(1, w - 2 * p) for w, p in zip(window, padding, strict=True)]
    if got[0] < need[0] or got[1] < need[1]:
        raise UserError(
            f'The images are too small for this network: a {window[0]}x{window[1]} {what} got '
            f'{got[0]}x{got[1]} activations, expected at least {need[0]}x{need[1]}. Use larger '
            'images, or a network with more padding or fewer strides and pools.'
        )


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@jax.custom_vjp
def add_bias(x, bias) -> jax.Array:
    """x [B, H, W, C] + bias [C] of the same type; for reverse-mode derivatives.

    On a GPU the bias's gradient adds up whole rows first where features are few: XLA's sums take 32 columns
    together. Of 1,024 gradients with 28 pixels and 6 features, 142 us on one H200, here 17.
    """
    return x + bias


def _gradient_of_bias(_, gradient):
    def plain(gradient):
        return gradient.sum((0, 1, 2))

    if gradient.shape[-1] >= 32:
        return gradient, plain(gradient)
    return gradient, jax.lax.platform_dependent(gradient, cuda=_sum_by_rows, default=plain)


def _sum_by_rows(x):
    """x [B, H, W, C] -> [C]."""
    *_, width, features = x.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Else XLA makes one sum of the two, and computes it together with what is summed.
    x = jax.lax.optimization_barrier(x).reshape(-1, width * features)
    rows = jax.lax.optimization_barrier(x.sum(0, dtype=wide))
    return rows.reshape(width, features).sum(0).astype(x.dtype)


add_bias.defvjp(lambda x, bias: (x + bias, None), _gradient_of_bias)


class Conv(nn.Module):
    """A convolution [B, H, W, C] -> [B, H', W', features] in the style's compute dtype.

    Args:
      kernel_size, padding: one number, or one for height and one for width. Padding not given
        means (kernel_size - 1) / 2 zeros on each side, which keeps the size at stride 1.
      use_bias: not given means only without a norm, which has a bias itself.
      kernel_init: a name in INITIALIZERS; not given means the style's.
      pool: window and stride of a max pool that follows; the result is then (before, after it).
    """

    features: int
    kernel_size: int | tuple[int, int]
    style: Style
    stride: int = 1
    padding: int | tuple[int, int] | None = None
    groups: int = 1
    use_bias: bool | None = None
    kernel_init: str | None = None
    pool: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x):
        style, size = self.style, pair(self.kernel_size)
        half = tuple((k - 1) // 2 for k in size)
        padding = half if self.padding is None else pair(self.padding)
        check_window(x, size, padding, 'convolution')
        initializer = INITIALIZERS[self.kernel_init or style.kernel_init]
        shape = (*size, x.shape[-1] // self.groups, self.features)
        kernel = self.param('kernel', initializer, shape, style.param_dtype)
        # Not `astype`, which a kernel in int8 (quantization.py) does not have.
        kernel = jnp.asarray(kernel, style.dtype)
        x = convolve(x.astype(style.dtype), kernel, self.stride, padding, self.groups)
        x = (x, max_pool(x, *self.pool)) if self.pool else x
        if self.use_bias or (self.use_bias is None and style.norm == 'none'):
            bias = self.param('bias', init.zeros, (self.features,), style.param_dtype)
            x = jax.tree.map(lambda x: add_bias(x, bias.astype(style.dtype)), x)
        return x


class ConvNormAct(nn.Module):
    """`Conv`, then `norm_act`. Without a norm it is the kernel that `zero` starts at 0.

    Args:
      pool: window and stride of a max pool that follows; the result is then (before, after it). In
        training it comes before bias and activation where that changes no value: fewer have a gradient.
    """

    features: int
    kernel_size: int | tuple[int, int]
    style: Style
    stride: int = 1
    padding: int | tuple[int, int] | None = None
    groups: int = 1
    act: bool = True
    zero: bool = False
    use_bias: bool | None = None
    pool: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x, *, train: bool):
        style, bare = self.style, self.style.norm == 'none'
        size, place = (self.features, self.kernel_size), (self.stride, self.padding, self.groups)
        kernel_init = 'zeros' if self.zero and bare else None
        pool = self.pool if train and bare and style.activation in _KEEP_ORDER else None
        x = Conv(*size, style, *place, self.use_bias, kernel_init, pool, name='conv')(x)
        fields = {'train': train, 'act': self.act, 'zero': self.zero, 'name': 'norm'}
        rest = functools.partial(norm_act, style=style, **fields)
        if pool:
            return tuple(map(rest, x))
        x = rest(x)
        return (x, max_pool(x, *self.pool)) if self.pool else x


class DenseNormAct(nn.Module):
    """A fully connected layer [B, D] -> [B, features], then `norm_act`, then dropout."""

    features: int
    style: Style
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train: bool):
        style = self.style
        bare = style.norm == 'none'
        x = dense(x, self.features, style, style.kernel_init, use_bias=bare, name='dense')
        x = norm_act(x, style, train=train, name='norm')
        return nn.Dropout(self.dropout)(x, deterministic=not train)


class SqueezeExcite(nn.Module):
    """x * gate(expand(activation(reduce(mean(x))))), [B, H, W, C] -> same (Hu 2018).

    Args:
      reduced: channels between the two 1x1 convolutions, which have biases.
      activation, gate: keys of ACTIVATIONS.
    """

    reduced: int
    style: Style
    activation: str = 'relu'
    gate: str = 'sigmoid'

    @nn.compact
    def __call__(self, x):
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = Conv(self.reduced, 1, self.style, use_bias=True, name='reduce')(y)
        y = ACTIVATIONS[self.activation](y)
        y = Conv(x.shape[-1], 1, self.style, use_bias=True, name='expand')(y)
        return x * ACTIVATIONS[self.gate](y)


# The next four functions make Flax submodules: call them inside a compact method.


def norm_act(x, style: Style, *, train: bool, name: str, act: bool = True, zero: bool = False):
    """The style's norm and then, if `act`, its activation, on [..., C].

    `zero` starts the scale of the norm at 0 (Goyal 2017): a residual branch that ends here starts
    as the identity.
    """
    fields = {'dtype': style.dtype, 'param_dtype': style.param_dtype, 'name': name}
    if zero:
        fields['scale_init'] = init.zeros
    x = NORMS[style.norm](x.shape[-1], train, style, **fields)(x)
    # A GPU computes a maximum within the product of a dense layer, and in inference within a convolution.
    of_sum = style.norm == 'none' and x.ndim == 4 and train
    activations = ACTIVATIONS_OF_SUMS if of_sum else ACTIVATIONS
    return activations[style.activation](x) if act else x


def dense(x, features: int, style: Style, kernel_init: str, *, name: str, use_bias: bool = True):
    """A fully connected layer [B, D] -> [B, features] in the style's compute dtype."""
    fields = {'dtype': style.dtype, 'param_dtype': style.param_dtype, 'name': name}
    return nn.Dense(features, use_bias, kernel_init=INITIALIZERS[kernel_init], **fields)(x)


def head(x, num_classes: int, style: Style, kernel_init: str, use_bias: bool = True) -> jax.Array:
    """The last linear layer: [B, D] -> float32 logits [B, num_classes]."""
    logits = dense(x, num_classes, style, kernel_init, name='head', use_bias=use_bias)
    return logits.astype(jnp.float32)


def drop_path(x: jax.Array, rate: float, *, train: bool) -> jax.Array:
    """Stochastic depth (Huang 2016): drops a branch for whole examples, scales the kept ones.

    Needs the rng 'dropout', only in training and at a rate above 0.
    """
    all_but_the_batch = tuple(range(1, x.ndim))
    return nn.Dropout(rate, broadcast_dims=all_but_the_batch)(x, deterministic=not train)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rates of `depth` blocks: from `last / depth`, linearly up to `last` (Huang 2016)."""
    return [last * (i + 1) / depth for i in range(depth)]


def max_pool(
    x: jax.Array, window: int, stride: int, padding: int = 0, *, partial: bool = False
) -> jax.Array:
    """Max pooling [B, H, W, C] -> [B, H', W', C].

    Incomplete windows at the lower and right border are left out, or kept if `partial` (PyTorch's
    ceil_mode).
    """
    check_window(x, pair(window), pair(padding), 'max pool')
    ends = _overhang(x, window, stride, padding) if partial else (0, 0)
    return window_maxima(x, window, stride, tuple((padding, padding + end) for end in ends))


def _overhang(x, window: int, stride: int, padding: int) -> list[int]:
    """How far the last window that begins on the height and width, or before, reaches over the end."""
    counts = [math.ceil((n + 2 * padding - window) / stride) + 1 for n in x.shape[1:3]]
    counts = [
        count - ((count - 1) * stride >= n + padding)
        for count, n in zip(counts, x.shape[1:3], strict=True)
    ]
    ends = [(count - 1) * stride + window for count in counts]
    return [max(0, end - n - 2 * padding) for end, n in zip(ends, x.shape[1:3], strict=True)]


def avg_pool(
    x: jax.Array, window: int, stride: int, padding: int = 0, *, partial: bool = False
) -> jax.Array:
    """Average pooling [B, H, W, C] -> [B, H', W', C].

    Args:
      padding: zeros on each side, which count in the average, as in PyTorch.
      partial: keep the incomplete windows at the lower and right border and average what is there,
        so that H' is that of a convolution of this stride; without padding.
    """
    if partial:
        ends = [(math.ceil(n / stride) - 1) * stride + window for n in x.shape[1:3]]
        pads = [(0, max(0, end - n)) for end, n in zip(ends, x.shape[1:3], strict=True)]
    else:
        check_window(x, pair(window), pair(padding), 'average pool')
        pads = [(padding, padding)] * 2
    return nn.avg_pool(x, pair(window), pair(stride), pads, count_include_pad=not partial)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages [B, H, W, C] -> [B, size, size, C] over windows as equal as can be, from any H and W.

    Window i of n pixels is those from floor(i n / size) to ceil((i + 1) n / size), as in PyTorch's
    AdaptiveAvgPool2d: the windows overlap or repeat pixels where n does not divide.
    """
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (_window_averages(n, size).astype(x.dtype) for n in x.shape[1:3])
    return jnp.einsum('ih,jw,bhwc->bijc', rows, columns, x)


def _window_averages(n: int, size: int) -> np.ndarray:
    """float32 [size, n]: row i averages window i of n pixels."""
    weights = np.zeros((size, n), np.float32)
    for i in range(size):
        window = slice(i * n // size, math.ceil((i + 1) * n / size))
        weights[i, window] = 1 / (window.stop - window.start)
    return weights


def global_avg_pool(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C]."""
    return jnp.mean(x, axis=(1, 2))


POOLS = {'max': max_pool, 'avg': avg_pool}
