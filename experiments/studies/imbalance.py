"""Which loss helps the rare classes of a long-tailed training set?

    jaxcls study imbalance [--data=digits|mnist|cifar10]

Class k of K keeps `imbalance^(-k / (K - 1))` of its training images: class 0 is the head, the last
one the tail. The test split is as it was, about even. Weights by inverse frequency, by the effective
number of examples (beta 0.99: between inverse and none), focal loss (gamma 2) and complement
cross-entropy against plain cross-entropy. All runs take the same number of steps; a greater imbalance
also leaves fewer images. Hardware: 2 CPU cores. Time: 45 runs, 6 minutes.
Measured (MNIST, 3 seeds; balanced accuracy, and F1 of the rarest class):

    imbalance                 10:1                         100:1
    cross-entropy      95.7 +- 1.3   91.9 +- 5.3    87.8 +- 5.1   67.0 +- 27
    inverse weights    96.0 +- 0.7   93.5 +- 2.6    90.0 +- 4.8   78.4 +- 28
    effective number   95.8 +- 0.8   92.5 +- 2.5    89.9 +- 4.6   76.8 +- 29
    focal              95.4 +- 1.5   91.8 +- 4.5    88.0 +- 6.3   68.4 +- 31
    complement         95.7 +- 0.7   92.5 +- 2.6    86.2 +- 5.0   53.5 +- 25

Weights help the tail at 100:1 and cost the others nothing; focal loss, made for rare objects, does not
help rare classes. With three draws of some ten images of the rarest class the intervals are wide: the
order of the means is the same in all three draws for the weights, and no more can be said.
"""

from jaxcls import study

LOSSES = {
    'cross-entropy': {'name': 'cross_entropy'},
    'inverse weights': {'name': 'cross_entropy', 'balance': 'inverse'},
    'effective number': {'name': 'cross_entropy', 'balance': 'effective', 'beta': 0.99},
    'focal': {'name': 'focal', 'gamma': 2.0},
    'complement': {'name': 'complement_cross_entropy'},
}
# Of the training images, those that a tail of ten classes keeps, about.
KEPT = {1: 1.0, 10: 0.41, 100: 0.25}


def f1_of_classes(member):
    return dict(enumerate(member.result['per_class']['f1']))


def f1_of_rarest(member):
    return member.result['per_class']['f1'][-1]


def get_study(data='mnist'):
    config = study.base(data)
    config.learning_rate = 0.002
    epochs = {'digits': 20.0, 'mnist': 3.0, 'cifar10': 30.0}[data]
    config.model = {'name': 'mlp' if data == 'digits' else 'lenet5'}
    if data == 'cifar10':
        config.batch_size = 128
        config.model = {'name': 'resnet20'}
        config.augment = study.CROP_AND_FLIP
    return study.Study(
        question='With a long tail of rare classes, which loss has the best F1 of the rare classes, '
        'and what does it cost the others?',
        config=config,
        axes={
            'imbalance': {
                f'{n}:1': {'data.imbalance': float(n), 'epochs': epochs / kept}
                for n, kept in KEPT.items()
            },
            'loss': {name: {'loss': loss} for name, loss in LOSSES.items()},
        },
        measures={
            'test accuracy': study.accuracy(),
            'macro F1': study.result('f1_macro'),
            'balanced accuracy': study.result('balanced_accuracy'),
            'F1 of the rarest class': study.Measure(f1_of_rarest),
            'F1 by class': study.Measure(f1_of_classes, x='class, from head to tail'),
        },
    )
