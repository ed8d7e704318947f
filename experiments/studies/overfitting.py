"""When does a network overfit, and what helps: weight decay, dropout, augmentation, early stopping?

    jaxcls study overfitting [--data=digits|mnist|cifar10]

Few training images and networks of growing width, trained far past the point where they fit them, at a
constant rate (one that falls would end late learning by itself), with one remedy each. Curves over
epochs are of the widest: training error as it is met in training (under dropout and on augmented images,
where there are any), error and loss on held-out images. Early stopping goes by those: it ends training
when the held-out loss has had no new minimum for a fifth of the epochs, and keeps the checkpoint of the
best held-out accuracy. The test split, which decides nothing, gives the accuracies of the table; the gap
is the training accuracy, of clean images without dropout, less the test accuracy. Strengths are the
same at every width and were not tuned. Digits (300 images) and MNIST (1,000): MLPs of two hidden
layers; CIFAR-10 (5,000): ResNet-20s with that many channels in the first stage.

Hardware: 2 CPU cores. Time: 60 runs, 9 minutes beside other work.
Measured (MNIST, 1,000 training images, 3 seeds): test accuracy, and the gap at width 512

    width                    8            32           128           512           gap
    none              83.2 +- 4.2   89.2 +- 0.4   90.5 +- 0.4   91.2 +- 0.6    8.8 +- 0.6
    weight decay      83.7 +- 3.5   89.3 +- 0.4   90.9 +- 0.1   91.7 +- 0.2    8.4 +- 0.2
    dropout           61.1 +- 21    87.9 +- 0.6   90.9 +- 0.5   91.2 +- 2.1    8.8 +- 2.1
    augmentation      81.2 +- 3.1   90.5 +- 1.6   93.8 +- 0.4   93.3 +- 3.0    5.5 +- 1.5
    early stopping    83.1 +- 4.2   88.9 +- 0.2   90.3 +- 0.4   91.0 +- 0.4    9.0 +- 0.4

Against the textbook, the larger network does not overfit more: from width 32 on all have the training
images by heart, and test error still falls with width, the gap too. Augmentation alone closes the gap;
weight decay gives half a point, dropout and early stopping nothing; dropout ruins the narrowest.
"""

import functools

from jaxcls import evaluation, results, study

WIDTHS = {
    'digits': (8, 32, 128, 512),
    'mnist': (8, 32, 128, 512),
    'cifar10': (4, 8, 16, 32, 64),
}
# Training and held-out images.
SPLITS = {
    'digits': ('train[:300]', 'train[50%:]'),
    'mnist': ('train[:1000]', 'train[55000:]'),
    'cifar10': ('train[:5000]', 'train[45000:]'),
}
EPOCHS = {'digits': 100.0, 'mnist': 50.0, 'cifar10': 60.0}
SHIFT = {'digits': 1, 'mnist': 2, 'cifar10': 4}


@functools.cache
def accuracy_of(workdir, split):
    """Of the checkpoint that the run stands for."""
    config = results.read(workdir).config
    checkpoint = 'best' if config.early_stopping_epochs else 'latest'
    return evaluation.evaluate(workdir, split, checkpoint)['top1']


def test_accuracy(member):
    return accuracy_of(member.workdir, 'test')


def training_accuracy(member):
    return accuracy_of(member.workdir, member.config.data.train)


def of_the_widest(fields, kind, value, format='percent'):
    """A curve over epochs of the runs that have these fields; the others have none."""

    def of(member):
        if any(member.config.model[key] != field for key, field in fields.items()):
            return {}
        return {r['epoch']: value(r) for r in member.of_kind(kind) if r['loss'] is not None}

    return study.Measure(of, format, x='epoch', facet='width', log_y=format == 'number')


def get_study(data='mnist'):
    config = study.base(data)
    config.data.train, config.data.validation = SPLITS[data]
    config.epochs = EPOCHS[data]
    config.validate_every_epochs = config.epochs / 20
    config.batch_size = 64
    config.learning_rate = 0.001
    config.schedule = {'name': 'constant'}
    config.optimizer = {'name': 'adamw'}
    config.model = {'name': 'resnet20'} if data == 'cifar10' else {'name': 'mlp'}
    field = 'num_filters' if data == 'cifar10' else 'hidden'
    sizes = {w: w if data == 'cifar10' else (w, w) for w in WIDTHS[data]}
    augment = [{'name': 'pad_crop', 'padding': SHIFT[data]}]
    if data == 'cifar10':
        augment += [{'name': 'flip'}]
    widest = {field: sizes[max(sizes)]}
    return study.Study(
        question='How do training and test error go with the size of a network and with time, and what '
        'does each remedy against overfitting change?',
        config=config,
        axes={
            'remedy': {
                'none': {},
                'weight decay': {'weight_decay': 1.0},
                'dropout': {'model.dropout': 0.2 if data == 'cifar10' else 0.5},
                'augmentation': {'augment': augment},
                'early stopping': {'early_stopping_epochs': config.epochs / 5},
            },
            'width': {str(w): {f'model.{field}': size} for w, size in sizes.items()},
        },
        measures={
            'test accuracy': study.Measure(test_accuracy),
            'training accuracy': study.Measure(training_accuracy),
            'gap': study.Measure(lambda m: training_accuracy(m) - test_accuracy(m)),
            'training error': of_the_widest(widest, 'train', lambda r: 1 - r['top1']),
            'held-out error': of_the_widest(widest, 'validation', lambda r: 1 - r['top1']),
            'held-out loss': of_the_widest(widest, 'validation', lambda r: r['loss'], 'number'),
        },
        log_x=True,
    )
