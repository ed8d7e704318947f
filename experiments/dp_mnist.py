"""A small convolutional network on MNIST by DP-SGD, at epsilon 3 and delta 1e-5.

    python -m jaxcls.main --config=experiments/dp_mnist.py

Other budgets: --config.privacy.epsilon=1 (or 8). Without privacy: --config.privacy.name=none. The
membership attack on what was trained: `jaxcls audit runs/dp_mnist`. Tanh, a small clip norm and large
batches are those of Papernot 2020 (https://arxiv.org/abs/2007.14191) and Tramer & Boneh 2021
(https://arxiv.org/abs/2011.11660), who reach 98.1% in 40 epochs at 28 pixels. Here it is 14, which makes the
gradient of each example four times as cheap.

Hardware: 2 CPU cores. Time: 2 minutes a run, with a second core's worth of other work. Test accuracy:
96.08% +- 0.67 (3 runs) at epsilon 3.
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.epochs = 15.0
    config.batch_size = 1024  # on average
    config.data.name = 'tfds:mnist'
    config.data.image_size = 14
    config.data.mean = (0.1307,)
    config.data.std = (0.3081,)
    config.model = {
        'name': 'lenet_small',
        'filters': (16, 32),
        'kernel_size': 3,
        'padding': (1, 0),
        'hidden': (32,),
        'norm': 'none',
        'activation': 'tanh',
        'kernel_init': 'glorot_uniform',
    }
    config.optimizer = {'name': 'sgd', 'momentum': 0.9}
    config.learning_rate = 2.0
    config.schedule = {'name': 'linear'}
    config.privacy = {'name': 'dp_sgd', 'clip_norm': 0.1, 'epsilon': 3.0, 'delta': 1e-5}
    config.checkpoint_every_epochs = 5.0
    return config
