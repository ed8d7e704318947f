"""What is known of our networks elsewhere: published figures, other libraries' names and layouts.

Every family's file ends with three tables of data:

- `MODELS = {name: factory}`;
- `REFERENCES = {name: Reference(...)}`, what was published of each;
- `NAMES = {scheme: rows}`, where the families of timm or torchvision hold the same arrays. A row is
  `(pattern, rule)`: the pattern is a regular expression for the whole path of one of our modules
  (`stage1_block1/conv1/conv`), or of one leaf where leaves are named apart (`class_token`);
  `rule(layout, *groups)` gives its name there, groups of digits as ints, or `(name, Transform)` where
  the array is not laid out as PyTorch's usual ones. The first row that matches counts. A module's
  leaves follow by themselves: kernel and scale are `weight`, mean is `running_mean`. `layout` is a
  `weights.Layout`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Reference(NamedTuple):
    """What was published of a network.

    Attributes:
      paper: author, year and address.
      parameters: their number, with `num_classes` classes.
      image_shape: (H, W, C) of the published setting.
      num_classes: 1000 is ImageNet.
      top1: accuracy in per cent; 0 where none is known.
      source: what reports it, and on which data if not on ImageNet.
    """

    paper: str
    parameters: int
    image_shape: tuple[int, int, int] = (224, 224, 3)
    num_classes: int = 1000
    top1: float = 0.0
    source: str = ''


class Transform(NamedTuple):
    """An array's layout there and here, exact in both directions.

    Attributes:
      to_ours: `(theirs, our shape) -> ours`.
      to_theirs: `ours -> theirs`.
    """

    to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x, shape: x, lambda x: x)
# [h, w, I, O] here, [O, I, h, w] there.
CONV = Transform(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# [I, O] here, [O, I] there.
DENSE = Transform(lambda x, shape: x.T, lambda x: x.T)
# A fully connected layer here, a 1x1 convolution there.
POINTWISE = Transform(lambda x, shape: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
# [D] here, [D, 1, 1] there.
COLUMN = Transform(lambda x, shape: x[:, 0, 0], lambda x: x[:, None, None])


def flattened(size: int, as_convolution: bool = False) -> Transform:
    """A layer on flattened activations: [size * size * C, O] here, [O, C * size * size] there.

    `as_convolution`: it is a convolution over all of them there, [O, C, size, size].
    """

    def to_theirs(x):
        x = x.reshape(size, size, -1, x.shape[-1]).transpose(3, 2, 0, 1)
        return x if as_convolution else x.reshape(x.shape[0], -1)

    def to_ours(x, shape):
        return x.reshape(x.shape[0], -1, size, size).transpose(2, 3, 1, 0).reshape(shape)

    return Transform(to_ours, to_theirs)
