"""One of the processes of `test_two_processes_give_the_losses_of_one`."""

import sys

from jaxcls import fit, sharding

sharding.start_processes()

if __name__ == '__main__':
    from test_sharding import config

    directory, pipeline = sys.argv[1:]
    run = config()
    run.data.pipeline = pipeline
    fit(run, directory)
