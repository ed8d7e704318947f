"""Which augmentation helps a small network with few images?

    jaxcls study augmentation [--data=digits|mnist|cifar10]

Each alone, and two together, with everything else equal. Training accuracy is of the images
themselves, not augmented. ECE: the calibration error of 15 equal bins. Mirroring is tried on CIFAR-10
alone: a mirrored digit is another sign or none. TrivialAugment moves images by up to 32 pixels,
which empties some of those of 8x8 or 28x28. Digits (300 images): 'lenet_small'; MNIST (1,000): LeNet-5;
CIFAR-10 (5,000): ResNet-20.

Hardware: 2 CPU cores. Time: 30 runs, 5 minutes.
Measured (MNIST, 1,000 training images, 3 seeds):

    augmentation        test accuracy       log loss             ECE
    none                94.7 +- 1.4     0.264 +- 0.07      3.4 +- 1.3
    shift               96.6 +- 0.3     0.113 +- 0.01      1.2 +- 0.4
    affine              97.7 +- 0.4     0.077 +- 0.01      0.8 +- 0.5
    cutout              95.4 +- 0.3     0.184 +- 0.01      2.3 +- 0.1
    random erasing      96.0 +- 0.5     0.160 +- 0.05      2.0 +- 0.5
    RandAugment         96.9 +- 0.3     0.112 +- 0.01      1.3 +- 0.2
    TrivialAugment      96.8 +- 0.6     0.110 +- 0.02      0.8 +- 0.3
    mixup               95.7 +- 1.2     0.171 +- 0.03      4.5 +- 0.7
    cutmix              95.6 +- 0.7     0.284 +- 0.02     15.0 +- 0.5
    shift and cutmix    96.9 +- 0.5     0.296 +- 0.02     18.6 +- 1.0

What digits really do, small affine changes, helps most and more than the searched-for policies do. All
but mixup and cutmix calibrate as well; those two leave the network too modest.
"""

from jaxcls import study

TRAIN = {'digits': 'train[:300]', 'mnist': 'train[:1000]', 'cifar10': 'train[:5000]'}
MODELS = {'digits': 'lenet_small', 'mnist': 'lenet5', 'cifar10': 'resnet20'}
EPOCHS = {'digits': 60.0, 'mnist': 60.0, 'cifar10': 100.0}


def augmentations(data):
    """By name: lists of augmentations."""
    pixels = {'digits': 8, 'mnist': 28, 'cifar10': 32}[data]
    shift = {'name': 'pad_crop', 'padding': pixels // 8}
    cutmix = {'name': 'cutmix'}
    arms = {
        'none': [],
        'shift': [shift],
        'affine': [
            {
                'name': 'affine',
                'degrees': 10.0,
                'translate': 0.08,
                'scale': (0.9, 1.1),
                'shear': 10.0,
            }
        ],
        'cutout': [{'name': 'cutout', 'size': pixels // 4}],
        'random erasing': [{'name': 'random_erasing'}],
        'RandAugment': [{'name': 'rand_augment'}],
        'TrivialAugment': [{'name': 'trivial_augment'}],
        'mixup': [{'name': 'mixup'}],
        'cutmix': [cutmix],
        'shift and cutmix': [shift, cutmix],
    }
    if data == 'cifar10':
        flip = {'name': 'flip'}
        arms |= {'flip': [flip], 'shift and flip': [shift, flip]}
    return arms


def get_study(data='mnist'):
    config = study.base(data)
    config.data.train = TRAIN[data]
    config.epochs = EPOCHS[data]
    config.batch_size = 32 if data == 'digits' else 64
    config.model = {'name': MODELS[data]}
    config.learning_rate = 0.002
    return study.Study(
        question='Which augmentation raises the test accuracy of a small network with few images, and '
        'what does it do to its calibration?',
        config=config,
        axes={
            'augmentation': {
                name: {'augment': items} for name, items in augmentations(data).items()
            }
        },
        measures={
            'test accuracy': study.accuracy(),
            'training accuracy': study.training_accuracy(),
            'ECE': study.result('ece'),
            'log loss': study.result('log_loss', 'number'),
        },
    )
