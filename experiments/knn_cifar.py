"""Five nearest neighbours by Euclidean distance on CIFAR-10's pixels.

    python -m jaxcls.main --config=experiments/knn_cifar.py

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:cifar10'
    config.model = {'name': 'knn', 'neighbors': 5}
    return config
