"""The convolution of all networks: on CPU the fastest exact form for its shape, elsewhere mostly XLA's own.

On a GPU a stem at stride 2 has the pixels of a square as features (a train step of ResNet-50 in bfloat16 with
128 images takes 19.5 ms on one H200, not 19.9), one at stride 1 those of 8 columns (3 to 64 features at 32
pixels in bfloat16, 1,024 images: 112 us forwards, not 195, and 120 for the kernel, not 139). A strided 1x1
one has a gradient for x at stride 1. Under `vmap` with a kernel for each of many networks products of
matrices may be taken (`bands.py`). What follows is of CPUs.

All forms but Winograd's compute the same sums, some in another order. Times are of 2 cores with AVX2, in
milliseconds, batch 128 (8 from 56 pixels on).

| convolution | what | XLA's | here |
|---|---|---|---|
| 5x5, 1 to 6 features, 28 pixels | forwards | 6.6 | 1.0 |
| 3x3, 3 to 16, 32 pixels | forwards | 6.1 | 2.8 |
| 3x3 at stride 2, 3 to 32, 224 pixels | forwards | 6.3 | 4.3 |
| | for the kernel | 9.9 | 5.6 |
| 3x3, 16 to 16, 32 pixels | forwards, and for x | 8.6 | 6.7 |
| 1x1, 64 to 256, 56 pixels | for the kernel | 15.4 | 11.4 |

Eigen's products want features in whole vectors of 8. For the kernel, what each of its places meets is copied,
and so should be of the fewer features. On 2 slower cores, batch 128:

| convolution | what | XLA's | here |
|---|---|---|---|
| 5x5, 16 to 6 features, 10 pixels padded by 4 | forwards, as for x of LeNet-5 | 8.3 | 2.4 |
| 3x3, 64 to 3, 32 pixels | forwards, as for an image | 55 | 18 |
| 3x3, 32 to 12, 32 pixels | forwards | 35 | 22 |
| | for the kernel | 52 | 27 |
| 5x5, 1 to 6, 28 pixels | for the kernel | 3.3 | 1.9 |

From 32 features on, 3x3 at stride 1 is done by Winograd's sums (`winograd.py`), which alone differ by more
than rounding. In tiles, from 256 features on or 128 in many images, a train step of ResNet-18 takes 0.77 of
the time, of WRN-16-4 0.75, of ResNet-50 0.93. With rows elsewhere it takes 0.92, 0.75 and 0.96 of that, and
of ResNet-20 0.90. They compile in 19, 13, 20 and 7 s, not 7, 4, 13 and 4.

Depthwise ones are sums of shifted products (`depthwise.py`).

What does not pay: products over shifted slices (3 to 10 times as long), transposing by a product with the
identity, four phases in place of a dilated gradient at stride 2 (7.9 against 11.4 with 16 features, 70
against 41 with 256), a wide kernel for that of the kernel (17.8 against 15.1).
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxcls.models.bands import convolve_each, pays_in_bands
from jaxcls.models.depthwise import convolve_depthwise, depthwise_gradients
from jaxcls.models.slices import every, output_size, pad
from jaxcls.models.winograd import (
    cost_of_tiles,
    in_rows,
    in_tiles,
    kernel_gradient_in_rows,
    kernel_gradient_in_tiles,
    pays_in_rows,
)

VECTOR = 8  # numbers that AVX2 takes at once


def convolve(x, kernel, stride: int, padding: tuple[int, int], groups: int = 1) -> jax.Array:
    """x [B, H, W, C] * kernel [h, w, C / groups, F] -> [B, H', W', F].

    The form that is fastest for its shape and device, forwards and backwards, which may differ in rounding
    from XLA's. For reverse-mode derivatives, the second (by XLA's own forms) too.

    Args:
      padding: zeros on both sides of the height and of the width, as in PyTorch. Always explicit:
        what 'SAME' means with stride 2 depends on the image size.
    """
    return _convolve((stride, padding, groups), x, kernel)


# A network has many convolutions of few shapes: `jit` traces each shape once, and leaves no trace of itself.
traced_once = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@traced_once
def _convolve(place, x, kernel):
    on_cpu, _ = _forms_on_cpu(place, x, kernel)
    on_gpu, plain = (
        form and _or_of_each(place, form) for form in _forms_elsewhere(place, x, kernel)
    )
    return _on_device(plain, x, kernel, cpu=on_cpu, cuda=on_gpu)


def _forward(place, x, kernel):
    return _convolve(place, x, kernel), (x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@traced_once
def _backward(place, saved, gradient):
    # All forms start from what all save, so that none makes another keep more.
    _, on_cpu = _forms_on_cpu(place, *saved)
    on_gpu, plain = (form and _gradients(form) for form in _forms_elsewhere(place, *saved))
    if place[0] > 1 and _is_pointwise(place, saved[1]):
        on_gpu = functools.partial(_gradients_of_strided_pointwise, place)
    on_gpu, plain = (f and _or_of_each(place, f, _gradients) for f in (on_gpu, plain))
    return _on_device(plain, *saved, gradient, cpu=on_cpu, cuda=on_gpu)


def _second(place, args, gradients):
    """Of a gradient, as in a penalty on it: by XLA's own forms, which have derivatives of any order."""
    plain = _gradients(functools.partial(_convolution, place))
    return jax.vjp(lambda saved, gradient: plain(*saved, gradient), *args)[1](gradients)


_backward.defvjp(lambda place, *args: (_backward(place, *args), args), _second)
_convolve.defvjp(_forward, _backward)


def _on_device(plain, *args, **forms):
    forms = {platform: form for platform, form in forms.items() if form}
    return jax.lax.platform_dependent(*args, **forms, default=plain) if forms else plain(*args)


def _forms_elsewhere(place, x, kernel):
    """`(x, kernel) -> y` of a GPU, None where it is that of the other accelerators, and that."""
    on_gpu = None
    if _pays_in_phases(place, x):
        on_gpu = functools.partial(_in_phases, place)
    elif _pays_in_blocks(place, x) and x.shape[2] >= 8 and kernel.shape[-1] >= 24:  # as measured
        on_gpu = functools.partial(_in_blocks, 8, place)
    return on_gpu, functools.partial(_convolution, place)


def _or_of_each(place, function, of=lambda form: form):
    """`function(x, kernel, ...)`, but under `vmap` `of` XLA's form or, with a kernel for each, a faster one.

    The other forms were measured for one kernel, whose gradient they make larger.
    """

    @jax.custom_batching.custom_vmap
    def of_all(*args):
        return function(*args)

    @of_all.def_vmap
    def of_each(count, batched, *args):
        if batched[0] and batched[1] and pays_in_bands(place, *args[:2]):
            args = (
                a if is_batched else jnp.broadcast_to(a, (count, *a.shape))
                for a, is_batched in zip(args, batched, strict=True)
            )
            out = of(functools.partial(convolve_each, place))(*args)
        else:
            axes = [0 if is_batched else None for is_batched in batched]
            out = jax.vmap(of(functools.partial(_convolution, place)), axes)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return of_all


def _gradients(form):
    return lambda x, kernel, gradient: jax.vjp(form, x, kernel)[1](gradient)


def _gradients_of_strided_pointwise(place, x, kernel, gradient):
    # cuDNN's gradient for x is as large as x and mostly zeros, which are written and read again. Here XLA
    # puts them between what there is where it is read. ResNet-18's first took cuDNN 66 us on an H200.
    stride, _, _ = place
    (dx,) = jax.vjp(lambda x: _convolution((1, (0, 0), 1), every(x, stride), kernel), x)[1](
        gradient
    )
    (dkernel,) = jax.vjp(lambda kernel: _convolution(place, x, kernel), kernel)[1](gradient)
    return dx, dkernel


def _apart(function, kernel):
    """The same function of arrays, which XLA neither fuses with what is round it nor computes twice.

    It is a branch that is always taken, which XLA cannot know: a barrier it would take out on CPU. What
    it looks at is of the kernel, which every device has.
    """

    def taken(*args):
        word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[kernel.dtype.itemsize]
        always = (jax.lax.bitcast_convert_type(kernel[0, 0, 0, 0], word) | 1) != 0
        shapes = jax.eval_shape(function, *args)
        never = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
        return jax.lax.cond(always, function, lambda *_: never, *args)

    return taken


def _convolution(place, x, kernel):
    stride, padding, groups = place
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(p, p) for p in padding],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _output_size(place, x, kernel) -> tuple[int, int]:
    stride, padding, _ = place
    return output_size(x.shape[1:3], kernel.shape[:2], stride, padding)


def _forms_on_cpu(place, x, kernel):
    """Faster on CPU than XLA's convolution: `(x, kernel) -> y`, and its gradients; None where nothing is."""
    _, _, groups = place
    if groups == x.shape[-1] == kernel.shape[-1] > 1:
        forms = convolve_depthwise, depthwise_gradients
        apart = functools.partial(_apart, kernel=kernel)
        return tuple(functools.partial(form, place, apart=apart) for form in forms)
    if _is_pointwise(place, kernel):
        return None, functools.partial(_gradients_of_pointwise_on_cpu, place)
    if groups == 1:
        if _pays_in_phases(place, x):
            form = _in_phases
        elif _pays_in_blocks(place, x):
            form = functools.partial(_in_blocks, 4 if kernel.shape[-1] <= 32 else 2)
        else:
            form = _faster_form(place, x, kernel)
        form = form and functools.partial(form, place)
        return form, functools.partial(_gradients_on_cpu, place)
    return None, None


def _is_pointwise(place, kernel) -> bool:
    _, padding, groups = place
    return groups == 1 and kernel.shape[:2] == (1, 1) and padding == (0, 0)


def _faster_form(place, x, kernel):
    """`(place, x, kernel) -> y` at stride 1; None where XLA's own is as fast."""
    if place[0] > 1:
        return None
    # Few tiles of 128 features take longer than rows, which add up less beside the products.
    most = 0.4 if min(kernel.shape[2:]) >= 256 else 0.27
    if _cost_in_tiles(place, x, kernel) <= most:
        return _tiles_on_cpu
    if _pays_in_rows(place, x, kernel):
        return _rows_on_cpu
    if kernel.shape[-1] < VECTOR:
        return _flat_on_cpu
    return _wide_on_cpu if _neighbours(place, x, kernel) > 1 else None


def _gradients_of_pointwise_on_cpu(place, x, kernel, gradient):
    # A product of matrices, not of [B, H, W, C], which XLA would transpose first. The narrower is on the
    # left, as XLA transposes what is there: 4.8 ms, not 7.2, with 16 and 96 features at 112 pixels.
    stride, _, _ = place
    (dx,) = jax.vjp(lambda x: _convolution(place, x, kernel), x)[1](gradient)
    rows = every(x, stride).reshape(-1, x.shape[-1])
    of_rows = gradient.reshape(-1, gradient.shape[-1])
    if rows.shape[-1] < of_rows.shape[-1]:
        dkernel = jnp.einsum('nc,nf->cf', rows, of_rows)
    else:
        dkernel = jnp.einsum('nf,nc->fc', of_rows, rows).T
    return dx, dkernel.reshape(kernel.shape)


def _flat_on_cpu(place, x, kernel):
    # Eigen's products want features in whole vectors: with 6, XLA's own takes 2 to 4 times as long. So the
    # kernel's rows are features of one that is a row high, and its outputs added up row by row.
    (_, padding, _), (rows, columns, channels, features) = place, kernel.shape
    flat = kernel.transpose(1, 2, 0, 3).reshape(1, columns, channels, rows * features)
    flat = jnp.pad(flat, (*[(0, 0)] * 3, (0, -rows * features % VECTOR)))
    y = _convolution((1, (0, padding[1]), 1), x, flat)
    height, _ = _output_size(place, x, kernel)

    def sum_rows(y):
        y = pad(y, (padding[0], 0), (padding[0], 0))
        parts = (y[:, i : i + height, :, i * features : (i + 1) * features] for i in range(rows))
        wide = jnp.promote_types(y.dtype, jnp.float32)
        return functools.reduce(jnp.add, (part.astype(wide) for part in parts)).astype(y.dtype)

    return _apart(sum_rows, kernel)(y)


def _neighbours(place, x, kernel) -> int:
    """How many outputs of a row are best computed as one with more features."""
    features, (_, width) = kernel.shape[-1], _output_size(place, x, kernel)
    fewest = 2 if features <= 2 * VECTOR else 1
    count = max(fewest, VECTOR // math.gcd(VECTOR, features))
    # Where many are needed to fill vectors, the kernel's zeros outweigh that.
    count = count if count * features <= 10 * VECTOR else fewest
    return count if count <= width else 1


def _wide_on_cpu(place, x, kernel):
    # So that features are whole vectors, and two of them, `count` outputs that lie side by side are computed
    # as one, by a kernel that much wider with zeros in it: with 12, XLA's own takes 1.6 times as long.
    (_, padding, _), count, features = place, _neighbours(place, x, kernel), kernel.shape[-1]
    _, width = _output_size(place, x, kernel)
    shifts = [((0, 0), (i, count - 1 - i), (0, 0), (0, 0)) for i in range(count)]
    wide = jnp.concatenate([jnp.pad(kernel, shift) for shift in shifts], axis=-1)
    y = jax.lax.conv_general_dilated(
        x,
        wide,
        window_strides=(1, count),
        padding=[(padding[0], padding[0]), (padding[1], padding[1] + -width % count)],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return y.reshape(*y.shape[:2], -1, features)[:, :, :width]


def _pays_in_blocks(place, x) -> bool:
    stride, _, groups = place
    return stride == groups == 1 and x.shape[-1] <= 4


def _in_blocks(count, place, x, kernel):
    # Where x has 1 or 3 features, Eigen copies what a kernel meets number by number, and cuDNN pads them. So
    # `count` columns are taken together, as features, and as many outputs computed as one, by a kernel with
    # zeros in it.
    (_, padding, _), (rows, columns, channels, features) = place, kernel.shape
    _, width = _output_size(place, x, kernel)
    outputs, inputs = -(-width // count), -(-(columns + count - 1) // count)
    blocks = outputs + inputs - 1
    right = blocks * count - padding[1] - x.shape[2]
    x = pad(x, (0, padding[1]), (0, right))
    x = x.reshape(*x.shape[:2], blocks, count * channels)
    shifts = [((0, 0), (i, inputs * count - columns - i), (0, 0), (0, 0)) for i in range(count)]
    # In float32, so that the parts of the kernel's gradient are added up there.
    exact = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    wide = jnp.concatenate([jnp.pad(exact, shift) for shift in shifts], axis=-1).astype(x.dtype)
    y = jax.lax.conv_general_dilated(
        x,
        wide.reshape(rows, inputs, count * channels, count * features),
        window_strides=(1, 1),
        padding=[(padding[0], padding[0]), (0, 0)],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return y.reshape(*y.shape[:2], -1, features)[:, :, :width]


def _pays_in_phases(place, x) -> bool:
    stride, _, groups = place  # at stride 4 it takes up to 1.6 times as long
    return stride == 2 and groups == 1 and x.shape[-1] <= 4


def _in_phases(place, x, kernel):
    return _convolution(
        (1, (0, 0), 1), _x_in_phases(place, x, kernel), _kernel_in_phases(place, kernel)
    )


def _x_in_phases(place, x, kernel):
    """Pixels of a square as wide as the stride as features: [B, H, W, C] -> [B, H', W', stride**2 * C].

    With `_kernel_in_phases`, the same convolution at stride 1 and without padding.
    """
    stride, padding, _ = place
    batch, *size, channels = x.shape
    leads = [-(-p // stride) * stride for p in padding]
    sizes = zip(_output_size(place, x, kernel), kernel.shape, padding, strict=False)
    blocks = [outputs + -(-(k + -p % stride) // stride) - 1 for outputs, k, p in sizes]
    after = [n * stride - m - lead for n, m, lead in zip(blocks, size, leads, strict=True)]
    x = pad(x, leads, after)
    height, width = blocks
    x = x.reshape(batch, height, stride, width, stride * channels).swapaxes(2, 3)
    return x.reshape(batch, height, width, stride * stride * channels)


def _kernel_in_phases(place, kernel):
    stride, padding, _ = place
    *size, channels, features = kernel.shape
    leads = [-p % stride for p in padding]
    blocks = [-(-(k + lead) // stride) for k, lead in zip(size, leads, strict=True)]
    edges = [(lead, n * stride - lead - k) for k, lead, n in zip(size, leads, blocks, strict=True)]
    kernel = jnp.pad(kernel, (*edges, (0, 0), (0, 0)))
    height, width = blocks
    kernel = kernel.reshape(height, stride, width, stride * channels, features).swapaxes(1, 2)
    return kernel.reshape(height, width, stride * stride * channels, features)


def _cost_in_tiles(place, x, kernel) -> float:
    if x.dtype.itemsize < 4:
        return math.inf
    stride, padding, groups = place
    return cost_of_tiles(x.shape, kernel.shape, padding, stride, groups)


def _tiles_on_cpu(place, x, kernel):
    return in_tiles(x, kernel, place[1], functools.partial(_apart, kernel=kernel))


def _pays_in_rows(place, x, kernel) -> bool:
    stride, padding, groups = place
    return x.dtype.itemsize >= 4 and pays_in_rows(x.shape, kernel.shape, padding, stride, groups)


def _rows_on_cpu(place, x, kernel):
    _, padding, _ = place
    convolve_rows = functools.partial(_convolution, (1, (0, padding[1]), 1))
    apart = functools.partial(_apart, kernel=kernel)
    return in_rows(x, kernel, padding, convolve_rows, apart)


def _gradients_on_cpu(place, x, kernel, gradient):
    """As `_gradients` of `_convolution`.

    That of x is, at stride 1, a convolution with the kernel turned round, which may be a wide one. That of
    the kernel is a convolution of x with the batch as its channels.
    """
    stride, padding, _ = place
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    back = 1, tuple(n - 1 - p for n, p in zip(kernel.shape, padding, strict=False)), 1
    form = _faster_form(back, gradient, turned) if stride == 1 else None
    if form:
        dx = form(back, gradient, turned)
    else:
        (dx,) = jax.vjp(lambda x: _convolution(place, x, kernel), x)[1](gradient)
    if _pays_in_phases(place, x):
        phases = _x_in_phases(place, x, kernel)
        of_phases, undo = jax.vjp(functools.partial(_kernel_in_phases, place), kernel)
        (dkernel,) = undo(_kernel_gradient((1, (0, 0), 1))(phases, of_phases, gradient))
        return dx, dkernel
    return dx, _kernel_gradient(place)(x, kernel, gradient)


def _kernel_gradient(place):
    """`(x, kernel, gradient) -> dkernel`, with a form of its own for the kernel gradient of each example.

    Under `vmap`, XLA would make groups of the convolution below, which on CPU takes 2 to 7 times as long.
    """
    _, padding, _ = place

    @jax.custom_batching.custom_vmap
    def of_all(x, kernel, gradient):
        apart = functools.partial(_apart, kernel=kernel)
        if _cost_in_tiles(place, x, kernel) <= 0.6:
            return kernel_gradient_in_tiles(x, gradient, padding, apart)
        if _pays_in_rows(place, x, kernel):
            rows = 1, kernel.shape[1]
            of_rows = functools.partial(_kernel_gradient_of_all, (1, (0, padding[1])), rows)
            return kernel_gradient_in_rows(x, gradient, padding, of_rows, apart)
        return _kernel_gradient_of_all(place[:2], kernel.shape[:2], x, gradient)

    @of_all.def_vmap
    def of_each(count, batched, x, kernel, gradient):
        x, gradient = (
            a if b else jnp.broadcast_to(a, (count, *a.shape))
            for a, b in zip((x, gradient), (batched[0], batched[2]), strict=True)
        )
        size = kernel.shape[1:3] if batched[1] else kernel.shape[:2]
        return _kernel_gradient_of_each(place, size, x, gradient), True

    return of_all


def _kernel_gradient_of_all(place, size, x, gradient):
    """x [B, H, W, C], gradient [B, H', W', F] -> [h, w, C, F]: a convolution with the batch as features."""
    (stride, padding), features = place, gradient.shape[-1]
    if stride == 1 and features < x.shape[-1]:
        # What each place of the kernel meets is copied, so that is of the fewer features.
        back = tuple(k - 1 - p for k, p in zip(size, padding, strict=True))
        turned = _kernel_gradient_of_all((1, back), size, gradient, x)
        return turned[::-1, ::-1].swapaxes(2, 3)
    sizes = zip(padding, gradient.shape[1:3], size, x.shape[1:3], strict=True)
    dkernel = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        jnp.pad(gradient, (*[(0, 0)] * 3, (0, -features % VECTOR))),
        window_strides=(1, 1),
        padding=[(p, (out - 1) * stride + k - n - p) for p, out, k, n in sizes],
        rhs_dilation=(stride, stride),
        dimension_numbers=('NHWC', 'IHWO', 'HWNC'),
    )
    return dkernel[..., :features]


def _kernel_gradient_of_each(place, size, x, gradient):
    """x [E, B, H, W, C], gradient [E, B, H', W', F] -> [E, h, w, C, F]: products of windows of each row."""
    stride, padding, _ = place
    (rows, columns), (height, width) = size, gradient.shape[2:4]
    x = jnp.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding), (0, 0)))
    ends = (height - 1) * stride + 1, (width - 1) * stride + 1
    windows = [x[:, :, :, j : j + ends[1] : stride] for j in range(columns)]
    windows = jnp.stack(windows, axis=-2)  # [E, B, H, W', w, C]
    sums = [
        jnp.einsum('ebhwjc,ebhwf->ejcf', windows[:, :, i : i + ends[0] : stride], gradient)
        for i in range(rows)
    ]
    return jnp.stack(sums, axis=1)
