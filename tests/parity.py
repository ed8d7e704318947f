"""The same random weights in a network of PyTorch's world and in ours, through the tables of names.

A case of a parity test is a `Pair`. `check_evaluation` also proves the tables: what is written back
loads into the reference with no name missing, and is what was read, bit for bit.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import weight_files, weights
from jaxcls.models import make_model


class Pair(NamedTuple):
    """A model of ours and its reference.

    Attributes:
      name: in MODELS.
      reference: makes the PyTorch module, of 5 classes; imports what it needs itself.
      fields: of our model.
      size: of the images.
      scheme: whose names the reference has.
    """

    name: str
    reference: Callable[[], Any]
    fields: dict[str, Any] = {}  # noqa: RUF012
    size: int = 64
    scheme: str = 'torchvision'


def torchvision_model(name: str, **kwargs) -> Callable[[], Any]:
    """A reference of torchvision, or a skip where that does not import."""
    return lambda: getattr(import_or_skip('torchvision.models'), name)(num_classes=5, **kwargs)


def timm_model(name: str, **kwargs) -> Callable[[], Any]:
    """A reference of timm, or a skip where that does not import."""
    return lambda: import_or_skip('timm').create_model(name, num_classes=5, **kwargs)


def import_or_skip(name: str):
    """A library to compare with; its own warnings do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip(name, exc_type=ImportError)


def torch_module(make: Callable[[], Any], seed: int = 0) -> Any:
    """The module with random weights of a sensible size and batch statistics that are not neutral."""
    torch = import_or_skip('torch')
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    with (
        contextlib.ExitStack() as undrawn
    ):  # what it draws is overwritten, and takes most of the time
        for name in ('uniform_', 'normal_'):
            undrawn.enter_context(
                mock.patch.object(torch.Tensor, name, lambda x, *_, **__: x.zero_(), create=True)
            )
        module = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.dtype.is_floating_point:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith('running_var'):
                value.copy_(0.75 + 0.5 * noise.abs())
            elif value.ndim >= 2 and name.endswith('weight'):
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif name.endswith('weight'):
                value.copy_(1 + 0.1 * noise)
            else:
                value.copy_(0.1 * noise)
    return module


def images_of(size: int, batch: int = 2, channels: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, size, size, channels), np.float32)


def shapes_of(model, size: int, channels: int = 3):
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return weights.flatten(
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    )


def state_of(arrays: dict[str, np.ndarray]) -> weight_files.State:
    """Named arrays as `weights.read` gives them."""
    return {
        k: weight_files.Tensor(a.shape, a.dtype, lambda a=a: a.copy()) for k, a in arrays.items()
    }


def imported(pair: Pair, arrays: dict[str, np.ndarray], channels: int = 3):
    """Our model and its variables out of a module's arrays."""
    model = make_model(pair.name, num_classes=5, **pair.fields)
    like = shapes_of(model, pair.size, channels)
    found = weights.convert(model, like, state_of(arrays))
    assert not [path for path in found.fresh if 'aux' not in path]
    zeros = {path: np.zeros(like[path].shape, like[path].dtype) for path in found.fresh}
    return model, weights.unflatten({**found.arrays, **zeros})


def relative(ours, theirs) -> float:
    """The largest difference, as a part of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nchw(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def logits_of(output):
    return output if not hasattr(output, 'logits') else output.logits


def check_evaluation(pair: Pair, channels: int = 3) -> float:
    """Asserts equal logits in evaluation mode and an exact way back; returns the relative error."""
    torch = import_or_skip('torch')
    module = torch_module(pair.reference).eval()
    arrays = {name: value.numpy() for name, value in module.state_dict().items()}
    model, variables = imported(pair, arrays, channels)
    images = images_of(pair.size, channels=channels)
    with torch.no_grad():
        theirs = logits_of(module(nchw(images))).numpy()
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])
    error = relative(apply(variables, images), theirs)
    print(f'{pair.name}, {pair.scheme}, {pair.size} pixels: logits {error:.1e}')
    assert error < 1e-4, error
    check_way_back(pair, module, model, variables)
    return error


def check_way_back(pair: Pair, module, model, variables):
    """Asserts that our weights, written in the reference's names, are its own."""
    import torch

    written = weights.state_dict(model, variables, pair.scheme)
    original = module.state_dict()
    unused = [k for k in original if k not in written]
    assert all(k.endswith('num_batches_tracked') or 'aux' in k.lower() for k in unused), unused
    for name, array in written.items():
        np.testing.assert_array_equal(array, original[name].numpy(), err_msg=name)
    fresh = pair.reference()
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in written.items()}
    fresh.load_state_dict({**original, **state}, strict=True)


def check_training(pair: Pair, batch: int = 4, rate: float = 1.0) -> tuple[float, float]:
    """Asserts that one step of SGD gives the same logits, parameters and running means.

    In float64: a deep network of random weights turns float32's rounding into per cents of its
    gradient. (Logits are float32 in any case.) Dropout has to be off on both sides.

    Returns:
      The relative errors of the logits and, at worst, of a parameter's change.
    """
    torch = import_or_skip('torch')
    module = torch_module(pair.reference).train().double()
    images, labels = images_of(pair.size, batch).astype(np.float64), np.arange(batch) % 5
    before = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    output = logits_of(module(nchw(images)))
    torch.nn.functional.cross_entropy(output, torch.from_numpy(labels)).backward()
    torch.optim.SGD(module.parameters(), rate).step()
    with jax.enable_x64(True):
        model, variables = imported(pair._replace(fields={**pair.fields, **_WIDE}), before)
        logits, ours = _sgd_step(model, variables, images, labels, rate)
        ours = weights.state_dict(model, ours, pair.scheme)
    # PyTorch's running variance is of the unbiased kind, ours is not.
    skip = ('running_var', 'num_batches_tracked')
    changes = {
        name: (ours[name] - before[name], value.numpy() - before[name])
        for name, value in module.state_dict().items()
        if name in ours and not name.endswith(skip)
    }
    largest = max(np.abs(theirs).max() for _, theirs in changes.values())
    # A bias in front of a batch norm has no gradient but for rounding.
    change = max(
        np.abs(a - b).max() / max(np.abs(b).max(), 1e-6 * largest) for a, b in changes.values()
    )
    logits = relative(logits, output.detach().numpy())
    print(f'{pair.name}, {pair.scheme}, training: logits {logits:.1e}, changes {change:.1e}')
    assert logits < 1e-4 and change < 1e-4, (logits, change)
    return logits, float(change)


_WIDE = {'dtype': jnp.float64, 'param_dtype': jnp.float64}


def _sgd_step(model, variables, images, labels, rate):
    def loss(params):
        (logits, _), updates = model.apply(
            {**variables, 'params': params},
            images,
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(0)},
        )
        taken = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -taken.mean(), (logits, updates)

    step = jax.jit(jax.grad(loss, has_aux=True))
    grads, (logits, updates) = step(variables['params'])
    grads = jax.device_get(grads)  # the rest in NumPy, which compiles nothing
    params = jax.tree.map(lambda p, g: p - rate * g, variables['params'], grads)
    return logits, {'params': params, **updates}


def parameters(shapes: dict[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for k, leaf in shapes.items() if k.startswith('params/'))
