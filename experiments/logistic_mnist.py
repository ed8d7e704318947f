"""Softmax regression on MNIST's pixels, solved to the end.

    python -m jaxcls.main --config=experiments/logistic_mnist.py

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:mnist'
    config.model = {'name': 'logistic_regression', 'C': 0.1}
    return config
