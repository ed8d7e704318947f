"""The deep belief network on MNIST: three RBMs (500-500-2000), unrolled and fine-tuned (Hinton 2006).

    python -m jaxcls.main --config=experiments/dbn_mnist.py

The same net from random weights: --config.model.pretrain_epochs=0. Pixels only: no augmentation, no
convolution. The paper's 1.25% test error is of an up-down fine-tuning that this is not.

TODO
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.epochs = 10.0
    config.batch_size = 100
    config.data.name = 'tfds:mnist'
    config.data.mean = (0.0,)  # an RBM's pixels are probabilities
    config.data.std = (1.0,)
    config.model = {'name': 'dbn', 'hidden': (500, 500, 2000), 'pretrain_epochs': 15}
    config.optimizer = {'name': 'adam'}
    config.learning_rate = 0.0005
    config.schedule = {'name': 'cosine'}
    return config
