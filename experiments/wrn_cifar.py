"""Wide ResNet 28-10 on CIFAR-10 (Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146).

    python -m jaxcls.main --config=experiments/wrn_cifar.py

The paper has 96.00% (median of 5 runs). Hardware, time, accuracy: not measured here, it takes a GPU.
"""

from jaxcls import config as base

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def get_config():
    config = base.get_config()
    config.epochs = 200.0
    config.batch_size = 128
    config.precision = 'mixed'
    config.data.name = 'tfds:cifar10'
    config.data.mean = MEAN
    config.data.std = STD
    config.augment = [{'name': 'pad_crop', 'padding': 4, 'mode': 'reflect'}, {'name': 'flip'}]
    config.model = {'name': 'wrn28_10'}
    config.optimizer = {'name': 'sgd', 'momentum': 0.9, 'nesterov': True}
    config.learning_rate = 0.1
    config.schedule = {'name': 'step', 'boundaries': (60.0, 120.0, 160.0), 'factor': 0.2}
    config.l2 = 5e-4
    return config
