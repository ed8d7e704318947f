"""Which optimiser learns fastest, and which best, each at its best learning rate?

    jaxcls study optimizers [--data=digits|mnist|cifar10]

The learning rate of each is the best of five, half a decade apart and in the range that suits it, by
the accuracy at the end on images that neither training nor the measures see (one run a rate); what
stands in the table as learning_rate is the one chosen. All rates fall along a cosine. Seconds are of
training alone, without compiling or validating; both they and epochs are of the runs that get to the
accuracy. The other settings are the usual ones: momentum 0.9; AdamW is Adam with a decoupled weight decay
of 0.1, which the others do without; Muon (orthogonalised momentum) updates the matrices, and Adam the
biases. Digits and MNIST: an MLP; CIFAR-10: a ResNet-20, with shifts and flips.

Hardware: 2 CPU cores. Time: 24 runs and 40 to choose the rates, 4 minutes.
Measured (MNIST, an MLP, 5 epochs of 10,000 images, 3 seeds):

    optimiser   rate   test accuracy   epochs to 94%   seconds to 94%
    SGD        0.3      95.2 +- 0.2      2.2 +- 0.7       0.34 +- 0.14
    momentum   0.1      96.0 +- 0.3      1.8 +- 0.7       0.38 +- 0.12
    Nesterov   0.1      96.0 +- 0.4      1.5 +- 0         0.28 +- 0.01
    RMSProp    0.003    96.2 +- 0.1      2.0 +- 0         0.42 +- 0.08
    Adam       0.01     96.2 +- 0.1      2.2 +- 1.4       0.52 +- 0.36
    AdamW      0.01     96.3 +- 0.2      1.8 +- 1.4       0.42 +- 0.30
    Lion       0.001    95.5 +- 0.2      2.3 +- 0.7       0.52 +- 0.29
    Muon       0.003    96.3 +- 0.1      1.5 +- 0         1.54 +- 0.09

Tuned, all but plain SGD and Lion end within 0.3 points of each other; Muon and Nesterov need the fewest
epochs, and Muon the most time. Adam is no faster than momentum here.
"""

from jaxcls import study

SGD = (0.03, 0.1, 0.3, 1.0, 3.0)
MOMENTUM = (0.003, 0.01, 0.03, 0.1, 0.3)
ADAPTIVE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# What each sets, and its learning rates.
OPTIMIZERS = {
    'SGD': ({'optimizer': {'name': 'sgd', 'momentum': 0.0}}, SGD),
    'momentum': ({'optimizer': {'name': 'sgd'}}, MOMENTUM),
    'Nesterov': ({'optimizer': {'name': 'sgd', 'nesterov': True}}, MOMENTUM),
    'RMSProp': ({'optimizer': {'name': 'rmsprop'}}, ADAPTIVE),
    'Adam': ({'optimizer': {'name': 'adam'}}, ADAPTIVE),
    'AdamW': ({'optimizer': {'name': 'adamw'}, 'weight_decay': 0.1}, ADAPTIVE),
    'Lion': ({'optimizer': {'name': 'lion'}}, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    'Muon': ({'optimizer': {'name': 'muon'}}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
}
TARGETS = {'digits': 0.95, 'mnist': 0.94, 'cifar10': 0.8}


def training_seconds(target):
    """Seconds of training until the first validation of at least an accuracy."""

    def of(member):
        steps = [r['step'] for r in member.of_kind('validation') if (r['top1'] or 0) >= target]
        return study.training_seconds(member, steps[0]) if steps else None

    return study.Measure(of, 'seconds')


def get_study(data='mnist'):
    config = study.base(data)
    config.epochs = {'digits': 20.0, 'mnist': 5.0, 'cifar10': 20.0}[data]
    config.validate_every_epochs = {'digits': 1.0, 'mnist': 0.5, 'cifar10': 1.0}[data]
    config.batch_size = 32 if data == 'digits' else 128
    config.model = {'name': 'mlp', 'hidden': (256, 128)}
    if data == 'cifar10':
        config.model = {'name': 'resnet20'}
        config.augment = study.CROP_AND_FLIP
    target = TARGETS[data]
    return study.Study(
        question='Each at its best learning rate, how fast and how far do the optimisers learn?',
        config=config,
        axes={'optimiser': {name: fields for name, (fields, _) in OPTIMIZERS.items()}},
        measures={
            'test accuracy': study.accuracy(),
            f'epochs to {target:.0%}': study.first_reaching(target, 'epoch', 'number'),
            f'seconds to {target:.0%}': training_seconds(target),
            'test accuracy by epoch': study.curve('top1'),
        },
        tune={'learning_rate': {name: rates for name, (_, rates) in OPTIMIZERS.items()}},
        tune_split=study.tune_split(data),
    )
