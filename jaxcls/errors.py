"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A mistake in a config, a path or a file, worded for the person who made it.

    The message says what was got, what was expected and what to do next. The command line prints it
    without a traceback and exits with status 2.
    """
