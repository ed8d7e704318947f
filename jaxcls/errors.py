"""The one exception for mistakes a user can mend, and what is said of other errors."""

import re


class UserError(Exception):
    """A mistake in a config, a path or a file, worded for the person who made it.

    The message says what was got, what was expected and what to do next. The command line prints it
    without a traceback and exits with status 2.
    """


def require(ok: bool, field: str, value: object, expected: str):
    """Raises UserError unless `ok`: '`field` is `value`; it must be `expected`.'"""
    if not ok:
        raise UserError(f'{field} is {value!r}; it must be {expected}.')


def require_expression(field: str, value: str, example: str):
    """Raises UserError unless `value` is a regular expression; `example` is one and what it does."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f'{field} is {value!r}, not a regular expression: {error}. For example {example}.'
        ) from None


def out_of_memory(error: Exception) -> str:
    """The message where a device or the machine has too little memory; '' for any other error."""
    text = str(error).lower()
    exhausted = 'resource_exhausted' in text and 'alloc' in text
    if not (isinstance(error, MemoryError) or exhausted or 'out of memory' in text):
        return ''
    return (
        f'There is too little memory: {first_line(error).rstrip(".")}. Take fewer or smaller images at once, '
        'or a smaller network. To train, that is a smaller batch_size, or the same in more '
        'accumulate_steps; config.data.pipeline=stream leaves the data off the device.'
    )


def first_line(error: Exception) -> str:
    """The beginning of what an error says; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
