"""One of the processes of `run_two_processes` in test_sharding.py."""

import sys

import jax

from jaxcls import UserError, predictions, results, sharding, sweep

sharding.start_processes()
# What takes seconds at the end of a run, most of them to import packages.
results._draw = lambda *args: None
predictions.ranking = lambda found: {'roc_auc': [], 'average_precision': []}

if __name__ == '__main__':
    from test_sharding import config

    directory, *pipelines = sys.argv[1:]
    for pipeline in pipelines:
        run = config()
        if pipeline == 'seeds':
            run.update(seeds=2, seeds_per_program=2)
        elif pipeline == 'differ':
            run.learning_rate *= 1 + jax.process_index()
        else:
            run.data.pipeline = pipeline
        try:
            sweep.fit_seeds(run, f'{directory}/{pipeline}')
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
