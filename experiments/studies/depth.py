"""What made deep networks trainable: normalisation, skip connections, or both?

    jaxcls study depth [--data=digits|mnist|cifar10]

With all else equal, a deeper network can do what a shallower one does (its further layers may copy),
so where its *training* accuracy is lower, that is for optimisation, not for overfitting: the
degradation of He et al. 2015 (arXiv:1512.03385). ReLU networks by one recipe, all with He
initialisation: plain, with batch norm (Ioffe & Szegedy 2015), with skip connections, with both. What
one of them alone does to gradients is known from theory: batch norm makes them grow by about 1.2 a layer
backwards (Yang et al. 2019, arXiv:1902.08129), a skip connection around a He-initialised branch makes
signal and gradient grow. So skip connections are tried with branches that start small, too, which batch
norm gives them otherwise (De & Smith 2020, arXiv:2002.10444; Zhang et al. 2019, arXiv:1901.09321). Gradient
norms are of the deepest networks, before the first step, on 256 training images.

Digits and MNIST: MLPs of 64 units a layer (a small branch: standard deviation 0.01), Adam. CIFAR-10: the
ResNets of 8 to 56 layers and their plain twins (a small branch: its last convolution starts at 0),
momentum SGD.

Hardware: 2 CPU cores. Time: 45 runs, 5 minutes (XLA takes most of a minute for 30 layers with batch norm).
Measured (MNIST, 3 seeds): test accuracy, and training accuracy at 30

    hidden layers                     2            10            30        training
    plain                    93.3 +- 0.8   92.5 +- 1.3   89.2 +- 1.6   91.3 +- 1.1
    batch norm               93.5 +- 0.2   89.6 +- 0.7   13.3 +- 2.3   12.9 +- 0.8
    skip                     93.1 +- 0.3   52.3 +- 52    17.1 +- 6.8   17.3 +- 8.3
    skip, small branches     93.5 +- 0.7   94.6 +- 1.2   95.0 +- 0.7   98.1 +- 1.0
    batch norm and skip      93.3 +- 0.3   93.0 +- 0.5   91.3 +- 1.3   95.3 +- 1.6

The plain net degrades in training, as He et al. found. But in fully connected nets batch norm alone
makes it worse, and so do skip connections alone, against the textbook: the sum grows by half or more at
every layer, and batch norm's gradient grows by layers (Yang et al. 2019, arXiv:1902.08129). What gains
from depth is a skip around branches that start small (so does the first layer here, which has no skip).
"""

from jaxcls import propagation, study

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
DEPTHS = (2, 10, 30)
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
    config.augment = study.CROP_AND_FLIP
    config.optimizer = {'name': 'sgd', 'momentum': 0.9}
    config.learning_rate = 0.1
    config.warmup_epochs = 1.0
    config.l2 = 1e-4
    config.clip_norm = 1.0  # without it, those without a norm diverge at this rate
    return RESNET_ARMS, {str(6 * n + 2): {'model.stage_sizes': (n, n, n)} for n in BLOCKS}


def gradients(member):
    if len(member.config.model.hidden) < max(DEPTHS):
        return {}
    return dict(enumerate(propagation.at_start(member).gradient, 1))


def get_study(data='mnist'):
    config = study.base(data)
    convolutional = data == 'cifar10'
    arms, depths = resnets(config) if convolutional else mlps(config, data)
    axis = 'layers' if convolutional else 'hidden layers'
    measures = {'test accuracy': study.accuracy(), 'training accuracy': study.training_accuracy()}
    if not convolutional:
        measures['gradient norm at the start'] = study.Measure(
            gradients, 'number', x='layer', log_y=True, facet=axis
        )
    return study.Study(
        question='To what depth can networks be trained with batch norm, with skip connections, with '
        'both and with neither?',
        config=config,
        axes={'network': arms, axis: depths},
        measures=measures,
    )
