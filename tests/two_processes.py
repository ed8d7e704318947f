"""One of the processes of `run_two_processes` in test_sharding.py."""

import sys

from jaxcls import UserError, fit, sharding

sharding.start_processes()

if __name__ == '__main__':
    from test_sharding import config

    directory, pipeline = sys.argv[1:]
    run = config()
    run.data.pipeline = pipeline
    try:
        fit(run, directory)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
