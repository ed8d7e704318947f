"""GoogLeNet fitted to 32x32 images on CIFAR-10: a quarter of the channels, a stem without strides.

    python -m jaxcls.main --config=experiments/googlenet_cifar.py

Hardware, time, accuracy of the full 60 epochs: not measured.
"""

from jaxcls import config as base

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def get_config():
    config = base.get_config()
    config.epochs = 60.0
    config.batch_size = 128
    config.data.name = 'tfds:cifar10'
    config.data.mean = MEAN
    config.data.std = STD
    config.augment = [{'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}]
    config.model = {'name': 'googlenet', 'width': 0.25, 'stem': 'small'}
    config.optimizer = {'name': 'sgd', 'nesterov': True}
    config.learning_rate = 0.1
    config.schedule = {'name': 'one_cycle'}
    config.l2 = 5e-4
    return config
