"""What made deep networks trainable: normalisation, skip connections, or both?

    jaxcls study depth [--data=digits|mnist|cifar10]

With all else equal, a deeper network can do what a shallower one does (its further layers may copy),
so where its *training* accuracy is lower, that is for optimisation, not for overfitting: the
degradation of He et al. 2015 (arXiv:1512.03385). ReLU networks by one recipe, all with He
initialisation: plain, with batch norm (Ioffe & Szegedy 2015), with skip connections, with both. A sum
of a He-initialised branch and its input grows with depth, and batch norm hides it; so skip connections
are tried alone with branches that start small, too (De & Smith 2020, arXiv:2002.10444; Zhang et al. 2019,
arXiv:1901.09321). Digits and MNIST: MLPs of 64 units a layer (a small branch: standard deviation 0.01),
Adam. CIFAR-10: the ResNets of 20 to 56 layers and their plain twins (a small branch: its last
convolution starts at 0), momentum SGD.

Hardware: 2 CPU cores. Time: TIME.
ANSWER
"""

from jaxcls import study

MLP_ARMS = {
    'plain': {},
    'batch norm': {'model.norm': 'batch'},
    'skip': {'model.skip': True},
    'skip, small branches': {'model.skip': True, 'model.kernel_init': 'normal'},
    'batch norm and skip': {'model.norm': 'batch', 'model.skip': True},
}
RESNET_ARMS = {
    'plain': {'model.shortcut': 'none', 'model.norm': 'none'},
    'batch norm': {'model.shortcut': 'none'},
    'skip': {'model.norm': 'none'},
    'skip, small branches': {'model.norm': 'none', 'model.zero_init_residual': True},
    'batch norm and skip': {},
}
DEPTHS = (2, 5, 10, 20, 30)
BLOCKS = (1, 3, 5, 9)  # a stage; 6 n + 2 layers


def mlps(config, data):
    """Sets the recipe of the MLPs, and returns the arms and the depths."""
    config.epochs = 20.0 if data == 'digits' else 5.0
    config.batch_size = 32 if data == 'digits' else 128
    config.model = {'name': 'mlp', 'head_init': 'glorot_normal'}
    config.optimizer = {'name': 'adam'}
    config.learning_rate = 0.001
    return MLP_ARMS, {str(n): {'model.hidden': (64,) * n} for n in DEPTHS}


def resnets(config):
    """Sets the recipe of the residual networks, and returns the arms and the depths."""
    config.epochs = 30.0
    config.batch_size = 128
    config.model = {'name': 'resnet20'}
    config.augment = [{'name': 'pad_crop', 'padding': 4}, {'name': 'flip'}]
    config.optimizer = {'name': 'sgd', 'momentum': 0.9}
    config.learning_rate = 0.1
    config.warmup_epochs = 1.0
    config.l2 = 1e-4
    config.clip_norm = 1.0  # without it, those without a norm diverge at this rate
    return RESNET_ARMS, {str(6 * n + 2): {'model.stage_sizes': (n, n, n)} for n in BLOCKS}


def get_study(data='mnist'):
    config = study.base(data)
    arms, depths = resnets(config) if data == 'cifar10' else mlps(config, data)
    return study.Study(
        question='To what depth can networks be trained with batch norm, with skip connections, with '
        'both and with neither?',
        config=config,
        axes={'network': arms, 'layers' if data == 'cifar10' else 'hidden layers': depths},
        measures={
            'test accuracy': study.accuracy(),
            'training accuracy': study.training_accuracy(),
        },
    )
