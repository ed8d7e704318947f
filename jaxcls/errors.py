"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake in a config, a path or a file, worded for the person who made it.

    The message says what was got, what was expected and what to do next. The command line prints it
    without a traceback and exits with status 2.
    """


def require(ok: bool, field: str, value: object, expected: str):
    """Raises UserError unless `ok`: '`field` is `value`; it must be `expected`.'"""
    if not ok:
        raise UserError(f'{field} is {value!r}; it must be {expected}.')
