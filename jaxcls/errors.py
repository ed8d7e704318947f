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


def out_of_memory(error: Exception) -> str:
    """The message where a device or the machine has too little memory; '' for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and 'out of memory' not in text.lower():
        return ''
    first = (text.splitlines() or [type(error).__name__])[0][:200].rstrip('.')
    return (
        f'There is too little memory: {first}. Take a smaller config.batch_size, or config.accumulate_steps, '
        'in so many parts of which a batch is computed; smaller images and networks take less, and with '
        'config.data.pipeline=stream the data are not kept on the device.'
    )
