"""The command line: `python -m jaxcls.main [COMMAND] ...`, also installed as `jaxcls`.

Exit status: 0 done, 2 a mistake to mend, 75 another process of the run was lost (repeat the command),
130 stopped by Ctrl-C, 143 by SIGTERM (both after saving).
"""

import argparse
import os
import re
import signal
import sys
import threading
from pathlib import Path

from jaxcls.commands import COMMANDS, TRAIN_HELP
from jaxcls.errors import UserError, out_of_memory
from jaxcls.registry import did_you_mean
from jaxcls.terminal import printable, refuse


def console():
    """`main` as a program of its own: memory in large pages; a Ctrl-C that no run takes ends at once."""
    _restart_with_large_pages()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='backslashreplace')  # of what it cannot encode
    sys.exit(main())


def _restart_with_large_pages():
    """Starts the program once more with a setting that glibc reads only as a process starts.

    On CPU, XLA gets a step's memory anew each time; in pages of 2 MB that is up to 15% faster. A user's
    GLIBC_TUNABLES stays as it is.
    """
    if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
        os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
        # Not as argv[0] has it: by that Python finds its virtual environment.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    try:
        return args.run(args)
    except UserError as error:
        refuse(error)
        return _leave_soon(2)
    except KeyboardInterrupt:
        refuse('stopped.')
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        place = '' if error.filename is None else f'{error.filename}: '
        refuse(f'{place}{error.strerror}. Check the path, its permissions and the disk.')
        return _leave_soon(2)
    except Exception as error:
        import jax

        from jaxcls import sharding

        status, message = 2, out_of_memory(error)
        if not message:
            status, message = 75, sharding.lost(error)  # EX_TEMPFAIL: try again
        if not message:
            raise
        refuse(message)
        if jax.process_count() > 1:
            os._exit(status)  # a plain exit waits for the others
        return status


def _leave_soon(status: int) -> int:
    """The status. One of several processes waits as it exits for others that wait for it: not for long."""
    jax = sys.modules.get('jax')
    if jax and jax.distributed.is_initialized():
        timer = threading.Timer(10, os._exit, [status])
        timer.daemon = True
        timer.start()
    return status


class _Parser(argparse.ArgumentParser):
    """argparse's, but for words that it does not know: those it repeats as they are, without a hint."""

    def error(self, message: str):
        _, found, words = message.partition('unrecognized arguments: ')
        super().error(printable(message + (f'. {_hint(words)}' if found else '')))


def _hint(words: str) -> str:
    """What was meant by words that the command line does not have."""
    word = re.split(r'[\s=]', words.lstrip('-'))[0]
    if words.startswith('-') or '=' in words:
        return (
            f'A field of the config is set by --config.{word.removeprefix("config.")}=VALUE; '
            '`jaxcls COMMAND --help` lists the other options.'
        )
    return f'{did_you_mean(word, COMMANDS)} `jaxcls COMMAND --help` lists what each takes.'


def _parse(argv: list[str]) -> argparse.Namespace:
    argv, overrides = _split_overrides(argv)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ('-h', '--help')):
        argv = ['train', *argv]
    parser = _Parser(
        prog='jaxcls',
        description='Image classification in JAX.',
        epilog='Without a command: train. `jaxcls train --help` shows how to set a config.',
    )
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for name, (add_arguments, run, description) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=TRAIN_HELP if name == 'train' else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
        command.set_defaults(run=run, command=name)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, 'images') and not any(word.startswith('-') for word in rest):
        # argparse ends a list that may be empty at the first option.
        args.images, rest = [*args.images, *map(Path, rest)], []
    if rest:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    args.overrides = overrides
    if overrides and not getattr(args, 'takes_fields', False):
        parser.error(f'{args.command} does not take --config fields; leave out {overrides[0][0]!r}')
    return args


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of the arguments."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith('--config.'):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix('--config.').partition('=')
        overrides.append((path, value if equals else next(words, '')))
    return rest, overrides


if __name__ == '__main__':
    console()
