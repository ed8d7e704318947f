"""Whole channels taken out of a trained network: it is a smaller one of the same family then.

A family's entry in CUTS says which layer makes the channels, which norm scales them and which layer reads
them. What is added to something else, such as the end of a residual block, keeps its width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from jaxcls import registry, weights
from jaxcls.errors import UserError, require
from jaxcls.models import classic, linear, resnet, vgg


class Cut(NamedTuple):
    """Channels between two layers, by the paths of the modules.

    Attributes:
      maker: its outputs are cut.
      norm: between the two; may be missing.
      reader: its inputs are cut; a dense layer after maps reads every channel at each position.
      width: what is left.
    """

    maker: str
    norm: str
    reader: str
    width: int


def _chain(names: Sequence[str], kinds: Sequence[str], widths: Sequence[int]) -> list[Cut]:
    """Layers one after the other, the last of which is `head`."""
    makers = [f'{name}/{kind}' for name, kind in zip(names, kinds, strict=True)]
    rows = zip(makers, names, [*makers[1:], 'head'], widths, strict=True)
    return [Cut(maker, f'{name}/norm', reader, width) for maker, name, reader, width in rows]


def _mlp(model, less):
    if model.skip:
        raise UserError('The layers of an mlp with skip=True are added up and keep their widths.')
    hidden = less(model.hidden)
    names = [f'hidden{i + 1}' for i in range(len(hidden))]
    return {'hidden': hidden}, _chain(names, ['dense'] * len(names), hidden)


def _lenet(model, less):
    filters, hidden = less(model.filters), less(model.hidden)
    names = [f'conv{i + 1}' for i in range(len(filters))]
    kinds = ['conv'] * len(filters) + ['dense'] * len(hidden)
    names += [f'hidden{i + 1}' for i in range(len(hidden))]
    return {'filters': filters, 'hidden': hidden}, _chain(names, kinds, (*filters, *hidden))


def _vgg(model, less):
    widths, hidden = less(model.widths), less(model.hidden)
    stages = list(enumerate(zip(model.stage_sizes, widths, strict=True), 1))
    names = [f'stage{i}_conv{j + 1}' for i, (size, _) in stages for j in range(size)]
    every = [width for _, (size, width) in stages for _ in range(size)]
    kinds = ['conv'] * len(names) + ['dense'] * len(hidden)
    names += [f'hidden{i + 1}' for i in range(len(hidden))]
    return {'widths': widths, 'hidden': hidden}, _chain(names, kinds, (*every, *hidden))


def _resnet(model, less):
    if model.groups > 1:
        raise UserError('The convolutions of a ResNeXt are grouped: its channels cannot be cut.')
    (inner,) = less((model.group_width or model.num_filters * model.width,))
    convolutions = 2 if model.branch == 'basic' else 3
    cuts = []
    for stage, size in enumerate(model.stage_sizes):
        for block in range(size):
            for i in range(1, convolutions):
                layer, norm, after = f'conv{i}/conv', f'conv{i}/norm', f'conv{i + 1}/conv'
                if model.preactivation:
                    layer, norm, after = f'conv{i}', f'norm{i + 1}', f'conv{i + 1}'
                place = f'stage{stage + 1}_block{block + 1}'
                names = (f'{place}/{name}' for name in (layer, norm, after))
                cuts.append(Cut(*names, inner * 2**stage))
    return {'group_width': inner}, cuts


# A family's class -> `(model, less) -> (fields of the smaller model, cuts)`; `less` makes widths smaller.
CUTS: dict[type, Callable] = {
    linear.MLP: _mlp,
    classic.LeNet: _lenet,
    vgg.VGG: _vgg,
    resnet.ResNet: _resnet,
}


def _filter_sizes(flat, cut):
    return np.abs(flat[f'params/{cut.maker}/kernel']).reshape(-1, _outputs(flat, cut)).sum(0)


def _norm_scales(flat, cut):
    scale = flat.get(f'params/{cut.norm}/scale')
    return _filter_sizes(flat, cut) if scale is None else np.abs(scale)


# What says how much a channel counts: the sum of its filter's absolute weights (Li et al., 2017,
# https://arxiv.org/abs/1608.08710), or the scale of its norm (Liu et al., 2017,
# https://arxiv.org/abs/1708.06519), and the former where there is no norm.
CRITERIA = {'filter': _filter_sizes, 'scale': _norm_scales}


def check(model: nn.Module):
    """Raises UserError where no channels can be taken out of a network."""
    family = _family(model)
    if family is None:
        known = ', '.join(sorted(cls.__name__ for cls in CUTS))
        raise UserError(
            f'Channels cannot be taken out of a {type(model).__name__}; they can of: {known}. Take '
            'other methods.'
        )
    norms = ('none', 'batch', 'frozen_batch')
    require(model.norm in norms, 'model.norm', model.norm, f'one of {", ".join(norms)}')
    CUTS[family](model, lambda widths: widths)


def remove(
    model: nn.Module, variables: Any, share: float, criterion: str = 'filter'
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the share of each layer's channels that count least out of a network.

    Args:
      model: of a family in CUTS, with batch norm or none.
      variables: 'params' and 'batch_stats'.
      share: in [0, 1); of every width at least one channel is left.
      criterion: 'filter' or 'scale', see CRITERIA.

    Returns:
      The fields in which the smaller model differs, and its variables, NumPy arrays.

    Raises:
      UserError: another family, norm or criterion, or a share out of range.
    """
    check(model)
    require(0 <= share < 1, 'the share of channels to remove', share, 'at least 0 and below 1')
    score = registry.lookup(CRITERIA, criterion, 'criterion')

    def less(widths):
        return tuple(max(1, round(width * (1 - share))) for width in widths)

    fields, cuts = CUTS[_family(model)](model, less)
    flat = {path: np.asarray(leaf) for path, leaf in weights.flatten(variables).items()}
    before = dict(flat)  # what counts is measured on the network as it is
    for cut in cuts:
        _take_out(flat, cut, score(before, cut))
    return fields, weights.unflatten(flat)


def _family(model: nn.Module) -> type | None:
    return next((cls for cls in type(model).__mro__ if cls in CUTS), None)


def _outputs(flat: weights.Flat, cut: Cut) -> int:
    return flat[f'params/{cut.maker}/kernel'].shape[-1]


def _take_out(flat: weights.Flat, cut: Cut, score: np.ndarray):
    """One cut, in place."""
    kept = np.sort(np.argsort(-score, kind='stable')[: cut.width])
    channels = score.size
    for path in list(flat):
        module, _, leaf = path.partition('/')[2].rpartition('/')
        if module == cut.maker or module == cut.norm:
            flat[path] = flat[path][..., kept]
        elif module == cut.reader and leaf == 'kernel':
            kernel = flat[path]
            shape = (*kernel.shape[:-2], -1, channels, kernel.shape[-1])
            cut_ = kernel.reshape(shape)[..., kept, :]
            flat[path] = cut_.reshape(*kernel.shape[:-2], -1, kernel.shape[-1])
