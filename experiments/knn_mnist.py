"""Three nearest neighbours by Euclidean distance on MNIST's pixels.

    python -m jaxcls.main --config=experiments/knn_mnist.py

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:mnist'
    config.model = {'name': 'knn', 'neighbors': 3}
    return config
