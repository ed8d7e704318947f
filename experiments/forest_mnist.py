"""A random forest of 300 trees on MNIST's pixels.

    python -m jaxcls.main --config=experiments/forest_mnist.py

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:mnist'
    config.model = {'name': 'random_forest', 'trees': 300}
    return config
