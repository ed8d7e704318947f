"""Fine-tuning on the other half of CIFAR-10's classes, with 100 images of each class.

    python -m jaxcls.main --config=experiments/transfer_source.py
    python -m jaxcls.main --config=experiments/transfer_target.py

From scratch: --config.model.init_from= (and the source's learning rate). A linear probe, with all but
the head as it was: --config.freeze='^(?!head)' --config.model.norm=frozen_batch. Three sizes of
training set and intervals: experiments/studies/transfer.py.

Hardware: 2 CPU cores. Time: 40 seconds. Accuracy on its five classes: 66.1% +- 2.6, from scratch 56.6% +-
2.8, as a linear probe 59.9% +- 3.5 (95% intervals of the mean, 3 runs), CIFAR-10 re-encoded as JPEG.
"""

from jaxcls import config as base

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def get_config():
    config = base.get_config()
    config.epochs = 40.0
    config.batch_size = 50
    config.data.name = 'tfds:cifar10'
    config.data.classes = (1, 3, 5, 7, 9)  # automobile, cat, dog, horse, truck
    config.data.per_class = 100
    config.data.mean = MEAN
    config.data.std = STD
    config.augment = [{'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}]
    config.model = {
        'name': 'resnet20',
        'stage_sizes': (1, 1, 1),
        'num_filters': 16,
        'init_from': 'runs/transfer_source',
        'new_head': True,
    }
    config.optimizer = {'name': 'sgd', 'nesterov': True}
    config.learning_rate = 0.03
    config.schedule = {'name': 'one_cycle'}
    config.l2 = 5e-4
    config.validate_every_epochs = 10.0
    config.checkpoint_every_epochs = 40.0
    return config
