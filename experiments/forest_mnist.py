"""A random forest of 300 trees on MNIST's pixels.

    python -m jaxcls.main --config=experiments/forest_mnist.py

Hardware: 2 CPU cores. Time: 139 s beside other work. Test accuracy: 97.16%, an error of 2.84% (2.53 to
3.18: 95% interval of the test split).
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:mnist'
    config.model = {'name': 'random_forest', 'trees': 300}
    return config
