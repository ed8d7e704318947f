"""The command line: `python -m jaxcls.main [COMMAND] ...`, also installed as `jaxcls`.

Exit status: 0 done, 2 a mistake to mend, 130 stopped by Ctrl-C, 143 by SIGTERM (both after saving).
"""

import argparse
import os
import sys

from jaxcls.commands import COMMANDS, TRAIN_HELP
from jaxcls.errors import UserError


def console():
    """`main` as a program of its own, with memory in large pages."""
    _restart_with_large_pages()
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
        print(f'jaxcls: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('jaxcls: stopped.', file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    argv, overrides = _split_overrides(argv)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ('-h', '--help')):
        argv = ['train', *argv]
    parser = argparse.ArgumentParser(
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
    args = parser.parse_args(argv)
    args.overrides = overrides
    if overrides and not hasattr(args, 'config') and args.command not in ('few-shot', 'study'):
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
