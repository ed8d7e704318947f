"""A small ResNet on one half of CIFAR-10's classes: what experiments/transfer_target.py starts from.

    python -m jaxcls.main --config=experiments/transfer_source.py

Hardware: 2 CPU cores. Time: 4 minutes. Accuracy on its five classes: 80.1% +- 2.2 (95% interval of the
mean, 3 runs, seeds 0 to 2), CIFAR-10 re-encoded as JPEG.
"""

from jaxcls import config as base

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def get_config():
    config = base.get_config()
    config.epochs = 6.0
    config.batch_size = 128
    config.data.name = 'tfds:cifar10'
    config.data.classes = (0, 2, 4, 6, 8)  # airplane, bird, deer, frog, ship
    config.data.mean = MEAN
    config.data.std = STD
    config.augment = [{'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}]
    config.model = {'name': 'resnet20', 'stage_sizes': (1, 1, 1), 'num_filters': 16}
    config.optimizer = {'name': 'sgd', 'nesterov': True}
    config.learning_rate = 0.2
    config.schedule = {'name': 'one_cycle'}
    config.l2 = 5e-4
    return config
