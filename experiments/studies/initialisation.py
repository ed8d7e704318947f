"""Does the start of the weights decide whether a deep network trains at all?

    jaxcls study initialisation [--data=digits|mnist|cifar10]

ReLU MLPs of 10 and 30 hidden layers of 100 units, without normalisation or skip connections, by
momentum SGD at one learning rate. An initialiser is that of every kernel, the last layer's included,
as whoever chooses one would use it; biases start at 0. By theory (He 2015, arXiv:1502.01852)
'he_normal' keeps the scale of the signal; 'glorot_normal' (Glorot & Bengio 2010) and 'orthogonal' (Saxe
2013, of gain 1), made for linear and tanh units, lose a factor of 1.4 a layer; 'normal' (standard
deviation 0.01; Krizhevsky 2012) loses one of 14. Scale and gradient are of 256 training images,
before the first step; the last layer is that of the logits. What is 0, or below 1e-18, where its square
leaves float32, has no place on their logarithmic axes, and 'zeros' has nothing else. Adam divides the
scale of the gradient out: try it with --config.optimizer.name=adam --config.learning_rate=0.001.

Hardware: 2 CPU cores. Time: 30 runs, 7 minutes beside other work.
Measured (MNIST, 3 seeds, test accuracy):

    hidden layers             10             30
    zeros             11.4 +- 0      11.4 +- 0
    normal (0.01)     11.4 +- 0      11.4 +- 0
    glorot_normal     92.9 +- 1.6    11.4 +- 0
    he_normal         93.7 +- 0.4    87.0 +- 3.6
    orthogonal        92.4 +- 0.4    11.4 +- 0

He's alone can be trained at 30 layers; at 10, losing sqrt(2) a layer does not matter yet. Zeros
and the small normal are at chance (the share of ones) at both depths.
"""

import functools

from jaxcls import propagation, results, study

INITIALIZERS = ('zeros', 'normal', 'glorot_normal', 'he_normal', 'orthogonal')
DEPTHS = (10, 30)


@functools.cache
def at_start(workdir):
    return propagation.at_start(results.read(workdir).members[0])


def by_layer(key):
    """A number of `propagation.Propagation` for each layer, where it is not 0."""

    def of(member):
        if member.config.model.kernel_init == 'zeros':
            return {}  # all but the gradient of the last bias
        values = enumerate(getattr(at_start(member.workdir), key), 1)
        return {layer: value for layer, value in values if value > 0}

    return of


def get_study(data='mnist'):
    config = study.base(data)
    config.epochs = {'digits': 30.0, 'mnist': 6.0, 'cifar10': 10.0}[data]
    config.batch_size = 32 if data == 'digits' else 128
    config.model = {'name': 'mlp'}
    config.optimizer = {'name': 'sgd', 'momentum': 0.9}
    config.learning_rate = 0.01
    curve = {'format': 'number', 'x': 'layer', 'log_y': True}
    return study.Study(
        question='Which initialisers keep signal and gradient alive through the layers of a ReLU '
        'network, and can the others be trained?',
        config=config,
        axes={
            'hidden layers': {str(n): {'model.hidden': (100,) * n} for n in DEPTHS},
            'initialiser': {
                name: {'model.kernel_init': name, 'model.head_init': name} for name in INITIALIZERS
            },
        },
        measures={
            'test accuracy': study.accuracy(),
            'standard deviation of the activations at the start': study.Measure(
                by_layer('activation'), **curve
            ),
            'gradient norm at the start': study.Measure(by_layer('gradient'), **curve),
        },
    )
