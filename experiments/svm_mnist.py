"""An SVM with an RBF kernel on MNIST's pixels.

    python -m jaxcls.main --config=experiments/svm_mnist.py

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:mnist'
    config.model = {'name': 'svm_rbf', 'C': 10.0}
    return config
