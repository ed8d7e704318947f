"""Text that a terminal shows and does not obey.

Names of classes, files and fields come out of data sets, archives and workdirs, and may hold anything.
"""

import sys
from typing import Any, TextIO

# Joiners and spaces that words of some languages are written with.
_IN_WORDS = '\u200c\u200d\xa0\u3000'


def printable(text: str, keep: str = '') -> str:
    """The text, with escapes for what a terminal obeys, or turns other text round by.

    Args:
      keep: characters to leave as they are, such as a newline.
    """
    if text.isprintable():
        return text
    kept = keep + _IN_WORDS
    return ''.join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def say(text: Any, file: TextIO | None = None):
    """Prints a text that may have lines; to standard output unless a file is given."""
    print(printable(str(text), keep='\n'), file=file or sys.stdout, flush=True)


def refuse(message: Any):
    """Prints a mistake, on standard error."""
    say(f'jaxcls: {message}', sys.stderr)


def warning_line(message: Any, *_args, **_kwargs) -> str:
    """`warnings.formatwarning`: the message, and not where in the code it was raised."""
    return printable(f'jaxcls: {message}', keep='\n') + '\n'
