"""Names in configs to factories: one literal dict a family, looked up with errors that help."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jaxcls.errors import UserError

T = TypeVar('T')

# What a config never sets: Flax's own fields, and the number of classes, which the data decide.
_RESERVED = ('parent', 'name', 'num_classes')
_PLAIN = (bool, int, float, str, tuple)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, and then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"Did you mean '{close[0]}'? " if close else ''
    return f'{hint}Known: {", ".join(known) or "none"}.'


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Returns `table[name]`.

    Raises:
      UserError: the name is not in the table; the message suggests the closest one.
    """
    if not isinstance(name, str) or name not in table:  # one out of a file may be a list
        raise UserError(f'Unknown {kind} {name!r}. {did_you_mean(str(name), table)}')
    return table[name]


def defaults(factory: Callable) -> dict[str, Any]:
    """The keyword arguments of a factory that a config may set: those with plain data as default."""
    parameters = inspect.signature(factory).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if isinstance(p.default, _PLAIN) and p.name not in _RESERVED
    }


def bind(table: Mapping[str, Callable], kind: str, /, *, name: str, **kwargs) -> functools.partial:
    """Looks a factory up and binds keyword arguments to it, so that a typo fails at once.

    Raises:
      UserError: unknown name, or an argument that the factory does not have.
    """
    factory = lookup(table, name, kind)
    parameters = inspect.signature(factory).parameters
    for argument in kwargs:
        if argument not in parameters or parameters[argument].default is inspect.Parameter.empty:
            raise UserError(
                f'{kind} {name!r} has no argument {argument!r}. '
                f'{did_you_mean(argument, defaults(factory))}'
            )
    return functools.partial(factory, **kwargs)
