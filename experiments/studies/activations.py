"""Does the activation decide how deep a network can be? The vanishing gradient, measured.

    jaxcls study activations [--data=digits|mnist|cifar10]

MLPs of 2 to 30 hidden layers of 64 units without normalisation, with the initialiser that suits each
activation. Hardware: 2 CPU cores. Time: TIME.
ANSWER
"""

from jaxcls import study
from jaxcls.propagation import at_start

INITIALIZERS = {
    'sigmoid': 'glorot_normal',
    'tanh': 'glorot_normal',
    'relu': 'he_normal',
    'gelu': 'he_normal',
}
DEPTHS = (2, 5, 10, 20, 30)


def gradients(member):
    propagation = at_start(member)
    return dict(enumerate(propagation.gradient, 1))


def get_study(data='mnist'):
    config = study.base(data)
    config.epochs = 30.0 if data == 'digits' else 3.0
    config.model = {'name': 'mlp', 'head_init': 'glorot_normal'}
    config.optimizer = {'name': 'adam'}
    config.learning_rate = 0.001
    return study.Study(
        question='Without normalisation, how many layers can be trained with each activation?',
        config=config,
        axes={
            'activation': {
                name: {'model.activation': name, 'model.kernel_init': init}
                for name, init in INITIALIZERS.items()
            },
            'hidden layers': {str(n): {'model.hidden': (64,) * n} for n in DEPTHS},
        },
        measures={
            'test accuracy': study.accuracy(),
            'gradient norm at the start': study.Measure(gradients, 'number', x='layer', log_y=True),
        },
    )
