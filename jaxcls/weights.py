"""Trained weights in our names and in those of other libraries.

A family's rule table (`NAMES` in its file under models/) says what each of our modules is called
elsewhere. The same rows serve both directions, so what is read can be written back bit for bit.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxcls import registry
from jaxcls.errors import UserError
from jaxcls.models import WEIGHT_NAMES
from jaxcls.models.references import CONV, DENSE, SAME, Transform
from jaxcls.weight_files import State, Tensor

Flat = dict[str, Any]  # 'params/stage1_block1/conv1/conv/kernel' -> array or shape


def flatten(variables: Any) -> Flat:
    """Leaves of 'params' and 'batch_stats' by path, in the order of the tree."""
    return traverse_util.flatten_dict(dict(variables), sep='/')


def unflatten(flat: Flat) -> dict[str, Any]:
    """The tree of `flatten`, its empty collections included."""
    return {'params': {}, 'batch_stats': {}} | traverse_util.unflatten_dict(flat, sep='/')


# Names


class Layout:
    """What a rule may ask about the network that it names.

    Attributes:
      model: the module, for its fields.
    """

    def __init__(self, model: nn.Module, paths: list[str]):
        self.model = model
        self._modules = {
            '/'.join(parts[:i])
            for parts in (p.split('/')[1:] for p in paths)
            for i in range(1, len(parts))
        }

    def has(self, module: str) -> bool:
        """Whether there is a module of that path."""
        return module in self._modules

    def rank(self, module: str) -> int:
        """The place, from 0, of a top-level module among those of its kind, such as all the blocks."""
        kind = re.sub(r'\d+', '#', module)
        same = [m for m in self._modules if '/' not in m and re.sub(r'\d+', '#', m) == kind]
        return sorted(same, key=_natural).index(module)


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', text)]


_LEAVES = {
    'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var',
}  # fmt: skip
_LAYOUTS = {('kernel', 4): CONV, ('kernel', 2): DENSE}


def names(
    model: nn.Module, paths: Mapping[str, Any], scheme: str
) -> dict[str, tuple[str, Transform]]:
    """Each of our leaves' name elsewhere, and how its array is laid out there.

    Args:
      paths: our leaves by path, with shapes.
      scheme: 'timm' or 'torchvision', a key of the family's NAMES.

    Raises:
      UserError: a leaf that the table has no row for.
    """
    rules = registry.lookup(_tables(model), scheme, 'naming scheme')
    layout = Layout(model, list(paths))
    found = {path: _rename(path, leaf, rules, layout) for path, leaf in paths.items()}
    missing = [path for path, name in found.items() if name is None]
    if missing:
        raise UserError(
            f'{type(model).__name__} with these fields has no counterpart in {scheme}: it has no name '
            f'for {_some(missing)}. Use the fields of the published network.'
        )
    return found


def _tables(model: nn.Module) -> Mapping[str, Any]:
    # One in int8 is of a class of its own, made from the family's.
    family = next((f for f in type(model).__mro__ if f in WEIGHT_NAMES), None)
    if family is None:
        known = ', '.join(family.__name__ for family in WEIGHT_NAMES)
        raise UserError(
            f'No other library has a {type(model).__name__}; weights are exchanged for: {known}.'
        )
    return WEIGHT_NAMES[family]


def _rename(path: str, leaf: Any, rules, layout: Layout) -> tuple[str, Transform] | None:
    module, _, kind = path.partition('/')[2].rpartition('/')
    usual = _LAYOUTS.get((kind, len(leaf.shape)), SAME)
    for pattern, rule in rules:
        for text, suffix in ((module, f'.{_LEAVES.get(kind, kind)}'), (path.partition('/')[2], '')):
            match = re.fullmatch(pattern, text)
            if match:
                groups = (int(g) if g and g.isdigit() else g for g in match.groups())
                named = rule(layout, *groups)
                name, special = named if isinstance(named, tuple) else (named, usual)
                return name + suffix, special if kind == 'kernel' or not suffix else usual
    return None


# Converting

_HEAD = re.compile(r'(.*/)?head/.*')
# What only training uses: heads in the middle of GoogLeNet and Inception.
_AUXILIARY = re.compile(r'\w+/aux\d*(_\w+)?/.*')
# Their names there, and the counters that PyTorch keeps beside batch statistics.
_UNUSED = re.compile(r'(.*\.)?num_batches_tracked|(aux\d|AuxLogits)\..*')
_POSITIONS = re.compile(r'.*position_embedding')


class Converted(NamedTuple):
    """What `convert` found.

    Attributes:
      arrays: NumPy arrays by path, of the model's shapes and dtypes.
      fresh: paths of the leaves that keep their initial values: a new head.
    """

    arrays: Flat
    fresh: list[str]


def convert(model: nn.Module, like: Flat, state: State, new_head: bool = False) -> Converted:
    """Finds our leaves in a state dict, checks all of them and only then reads them.

    A head stays fresh where the weights have one for another number of classes, or none.
    Position embeddings of another image size are interpolated.

    Args:
      like: our leaves by path, with shapes and dtypes.
      state: of `read`, in our own names or those of one of the family's schemes.
      new_head: leave the head fresh even where it would fit.

    Raises:
      UserError: names, shapes or dtypes that do not match; the message lists both sides.
    """
    own = bool(set(like) & set(state))
    table = {path: (path, SAME) for path in like} if own else _closest(model, like, state)

    def is_fresh(path):
        name, transform = table[path]
        if name not in state:
            return is_auxiliary(path) or bool(_HEAD.fullmatch(path))
        return bool(_HEAD.fullmatch(path)) and (
            new_head or _other_classes(like[path], state[name], transform)
        )

    fresh = [path for path in like if is_fresh(path)]
    wanted = {path: leaf for path, leaf in like.items() if path not in fresh}
    _check(wanted, table, state, {table[path][0] for path in fresh})
    return Converted({p: _read(leaf, *table[p], state) for p, leaf in wanted.items()}, fresh)


def _other_classes(leaf: Any, tensor: Tensor, transform: Transform) -> bool:
    """Whether a leaf of a head, [..., K], differs in the number of classes and in nothing else."""
    if len(tensor.shape) != len(_shape_there(leaf, transform)):
        return False
    theirs = transform.to_ours(np.broadcast_to(np.zeros((), np.float32), tensor.shape), leaf.shape)
    return theirs.shape[:-1] == leaf.shape[:-1] and theirs.shape[-1] != leaf.shape[-1]


def _shape_there(leaf: Any, transform: Transform) -> tuple[int, ...]:
    return transform.to_theirs(np.broadcast_to(np.zeros((), np.float32), leaf.shape)).shape


def _read(leaf: Any, name: str, transform: Transform, state: State) -> np.ndarray:
    array = state[name].read()
    if array.shape != _shape_there(leaf, transform):
        array = resize_positions(array, leaf.shape[1])
    return np.ascontiguousarray(transform.to_ours(array, leaf.shape)).astype(leaf.dtype)


def resize_positions(embedding: np.ndarray, count: int) -> np.ndarray:
    """Interpolates position embeddings [1, 1 + n * n, D] to [1, count, D], count = 1 + m * m.

    Bicubic over the grid, the class token's kept (Dosovitskiy 2020, section 3.2).
    """
    old, new = (math.isqrt(n - 1) for n in (embedding.shape[1], count))
    grid = embedding[:, 1:].reshape(1, old, old, -1).astype(np.float32)
    grid = np.asarray(jax.image.resize(grid, (1, new, new, grid.shape[-1]), 'bicubic'))
    grid = grid.reshape(1, new * new, -1)
    return np.concatenate([embedding[:, :1].astype(np.float32), grid], axis=1)


def _is_grid(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def _closest(model: nn.Module, like: Flat, state: State) -> dict[str, tuple[str, Transform]]:
    """The names of the scheme that shares most of them with the state dict."""
    tables, reasons = [], []
    for scheme in _tables(model):
        try:
            tables.append(names(model, like, scheme))
        except UserError as error:
            reasons.append(str(error))
    if not tables:
        raise UserError('\n'.join(reasons))
    return max(tables, key=lambda table: len({name for name, _ in table.values()} & set(state)))


def _check(wanted: Flat, table, state: State, used: set[str]):
    """Raises a UserError that lists what is missing on either side, and what differs."""
    lacking, wrong = [], []
    for path, leaf in wanted.items():
        name, transform = table[path]
        if name not in state:
            lacking.append(path if name == path else f'{path} ({name})')
            continue
        ours, theirs = _shape_there(leaf, transform), state[name].shape
        grids = _POSITIONS.fullmatch(path) and _is_grid(ours) and _is_grid(theirs)
        if ours != theirs and not (grids and ours[2] == theirs[2]):
            wrong.append(f'{name}: model {list(ours)}, weights {list(theirs)}')
        elif not jax.numpy.issubdtype(state[name].dtype, jax.numpy.floating):
            wrong.append(f'{name}: model {leaf.dtype}, weights {state[name].dtype}')
    known = used | {table[path][0] for path in wanted}
    surplus = [name for name in state if name not in known and not _UNUSED.fullmatch(name)]
    sides = {
        'in the model and not in the weights': lacking,
        'in the weights and not in the model': surplus,
        'of another shape or type': wrong,
    }
    problems = [f'{len(v)} {what}: {_some(v)}' for what, v in sides.items() if v]
    if problems:
        raise UserError(
            'These weights do not fit the model:\n  '
            + '\n  '.join(problems)
            + '\nSet config.model.name and its fields to those of the network that was trained.'
        )


def is_head(path: str) -> bool:
    """Whether a leaf belongs to the last layer, the one that predictions are made with."""
    return bool(_HEAD.fullmatch(path)) and not is_auxiliary(path)


def is_auxiliary(path: str) -> bool:
    """Whether a leaf belongs to a head that only training uses."""
    return bool(_AUXILIARY.fullmatch(path))


def _some(items: list[str], limit: int = 8) -> str:
    more = f' and {len(items) - limit} more' if len(items) > limit else ''
    return ', '.join(items[:limit]) + more


def state_dict(model: nn.Module, variables: Any, scheme: str) -> dict[str, np.ndarray]:
    """A model's variables in another library's names and layouts; 'jaxcls' keeps ours.

    Raises:
      UserError: the scheme does not know the family or one of its leaves.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    if scheme == 'jaxcls':
        return flat
    table = names(model, flat, scheme)
    return {name: change.to_theirs(flat[path]) for path, (name, change) in table.items()}
