"""What the commands share: arguments, the start of the devices, and how results are printed."""

import json
import math
import os
import warnings
from pathlib import Path

from jaxcls.errors import UserError
from jaxcls.terminal import say, warning_line


def add_config(parser, description='a file with get_config() (it is run); default: the digits'):
    parser.add_argument('--config', default='', help=description)
    take_fields(parser)


def take_fields(parser):
    """The command has a use for `--config.FIELD=VALUE`; others refuse it."""
    parser.set_defaults(takes_fields=True)


def add_json(parser):
    parser.add_argument('--json', action='store_true', help='print one JSON object, nothing else')


def add_run(parser, nargs=None):
    parser.add_argument('workdir', type=Path, nargs=nargs, help='the directory of a run')
    parser.add_argument(
        '--checkpoint', default='latest', help="'latest' (default), 'best' or a step"
    )


def add_workdirs(parser):
    parser.add_argument('workdirs', nargs='+', type=Path, help='directories of runs')


def start():
    """Before the first use of a device: one cache of compiled programs for all runs."""
    import logging

    import jax

    from jaxcls import sharding

    for name in ('absl', 'asyncio'):  # Orbax logs what it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.formatwarning = warning_line
    sharding.start_processes()
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get('JAXCLS_CACHE') or Path.home() / '.cache' / 'jaxcls'
        jax.config.update('jax_compilation_cache_dir', str(Path(cache) / 'programs'))
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        # Small ones too: a run whose programs are all kept starts in 4.6 s, not 5.3.
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def start_alone():
    """`start` of a command that does not know of several processes.

    Raises:
      UserError: this is one of several.
    """
    import jax

    start()
    if jax.process_count() > 1:
        raise UserError(
            f'This command runs in one process, and this is one of {jax.process_count()}: start it on one '
            'host, without the variables of jax.distributed (JAX_NUM_PROCESSES and the like).'
        )


def load_config(args, more=()):
    """The config of --config and its fields on the command line, and `more` overrides."""
    from jaxcls import config as config_lib
    from jaxcls import experiment

    config = config_lib.load_file(args.config) if args.config else config_lib.get_config()
    config_lib.apply_overrides(config, [*args.overrides, *more], experiment.TABLES)
    return experiment.resolve(config)


def print_json(value):
    text = json.dumps(_json_numbers(value), allow_nan=False)
    print(text.replace('\x7f', '\\u007f'))  # the one control character that JSON leaves as it is


def show(args, value, text):
    """A result as `text` makes it, or with --json as it is."""
    if args.json:
        print_json(value)
    else:
        say(text(value))


def _json_numbers(value):
    """null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _json_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value) -> str:
    return 'undefined' if value is None else f'{value:.4f}'
