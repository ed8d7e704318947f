"""HOG and an SVM with an RBF kernel on CIFAR-10.

    python -m jaxcls.main --config=experiments/hog_svm_cifar.py

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.data.name = 'tfds:cifar10'
    config.model = {'name': 'svm_rbf', 'features': 'hog', 'cell': 8, 'C': 10.0}
    return config
