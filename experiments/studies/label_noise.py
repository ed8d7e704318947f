"""Which loss withstands wrong labels, and does stopping early do as well?

    jaxcls study label_noise [--data=digits|mnist|cifar10]

A share of the training labels is replaced by other classes, evenly; the test labels are right. A
network large enough to memorise the training set is trained until it does (with cross-entropy). The
best epoch is the best on the test split: what perfect early stopping would have reached.

'Wrong labels found': the same share of the test labels is made wrong, and confident learning names as
many suspects by the network's predictions of the test split; what is found is the share of the wrong
labels among them. (It reads probabilities, which logits trained by squared error are not made for.)

Hardware: 2 CPU cores. Time: TIME.
ANSWER
"""

import numpy as np

from jaxcls import datasets, predictions, study

SHARES = (0.0, 0.2, 0.4, 0.6)
LOSSES = {
    'cross-entropy': {},
    'label smoothing': {'loss': {'name': 'cross_entropy', 'label_smoothing': 0.1}},
    'squared error': {'loss': {'name': 'mse'}},
    'Brier': {'loss': {'name': 'brier'}},
    # alpha: of those that Zhang et al. 2018 try against wrong labels.
    'mixup': {'augment': [{'name': 'mixup', 'alpha': 8.0}]},
}


def found(member):
    """The share of the wrong labels that are among as many suspects; None where none is wrong."""
    logits, label = member.predictions
    seed, classes = member.config.seed, logits.shape[1]
    wrong = datasets.noisy_indices(len(label), member.config.data.label_noise, seed)
    if not len(wrong):
        return None
    given = label.copy()
    shift = np.random.default_rng(seed).integers(1, classes, len(wrong))
    given[wrong] = (label[wrong] + shift) % classes
    suspects = predictions.label_issues(predictions.Predictions(logits, given), len(wrong))
    return len(np.intersect1d(suspects, wrong)) / len(wrong)


def get_study(data='mnist'):
    config = study.base(data)
    config.epochs = {'digits': 30.0, 'mnist': 20.0, 'cifar10': 60.0}[data]
    config.validate_every_epochs = config.epochs / 10
    config.learning_rate = 0.001
    config.model = {'name': 'mlp'}
    if data == 'mnist':
        config.data.train = 'train[:5000]'
    if data == 'cifar10':
        config.batch_size = 128
        config.model = {'name': 'resnet18', 'stem': 'small'}
    return study.Study(
        question='When some training labels are wrong, which loss keeps the test accuracy, and which '
        'memorises the wrong labels?',
        config=config,
        axes={
            'loss': LOSSES,
            'wrong training labels (%)': {
                f'{share:.0%}': {'data.label_noise': share} for share in SHARES
            },
        },
        measures={
            'test accuracy': study.accuracy(),
            'test accuracy, best epoch': study.result('best_top1'),
            'training accuracy, labels as given': study.training_accuracy(),
            'wrong labels found': study.Measure(found),
            'test accuracy by epoch': study.curve('top1'),
        },
    )
