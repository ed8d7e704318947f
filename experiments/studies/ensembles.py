"""What does an ensemble of seeds gain, in accuracy and in calibration, and with how many members?

    jaxcls study ensembles [--data=digits|mnist|cifar10] [--seeds=20]

The members differ in their seed alone (initialisation and order of the images); their probabilities
are averaged. A number of members is measured on disjoint sets of the seeds, so the values of an
interval are independent but for the test images that all share; where there are fewer than three such
sets their mean stands without an interval. Hardware: 2 CPU cores. Time: 40 runs, 4 minutes.
Measured (MNIST, 20 seeds; one network: mean +- 95% interval of the mean over the seeds):

    members                     1             2       5      10      20
    MLP     accuracy     95.41 +- 0.05      95.6    95.7    95.7    95.7
            log loss     0.147 +- 0.001    0.143   0.140   0.140   0.139
            ECE           0.52 +- 0.05      0.59    0.71    0.73    0.68
    LeNet   accuracy     96.16 +- 0.14      96.6    96.8    97.0    96.9
            log loss     0.123 +- 0.004    0.113   0.107   0.105   0.104
            ECE           0.82 +- 0.07      1.54    1.92    2.12    2.10

Half of the gain comes with the second member, nearly all with five. Calibration gets worse, against the
textbook: networks that are calibrated alone are too modest when averaged, as the mean of different
probabilities is less sure. Log loss and Brier score still improve.
"""

from jaxcls import metrics, predictions, study

MEMBERS = 10


def scores(members):
    """Accuracy, log loss and calibration error of the members together."""
    together = predictions.ensemble([member.predictions for member in members])
    return metrics.summarize(predictions.sums_of(together))


def by_members(key):
    """A number of `scores` for each number of members: {members: [value of each disjoint set]}."""

    def of(group):
        seeds = [member for member in group.members if member.result]
        values = {}
        for m in range(1, min(MEMBERS, len(seeds)) + 1):
            sets = [seeds[i : i + m] for i in range(0, len(seeds) - m + 1, m)]
            found = [scores(members)[key] for members in sets]
            values[m] = found if len(found) > 2 else [sum(found) / len(found)]
        return values

    return of


def of_all(key):
    """A number of `scores` of all seeds together."""
    return lambda group: [scores([member for member in group.members if member.result])[key]]


def get_study(data='mnist'):
    config = study.base(data)
    config.seeds = 20
    config.epochs = {'digits': 10.0, 'mnist': 3.0, 'cifar10': 60.0}[data]
    config.learning_rate = 0.002
    config.batch_size = 32 if data == 'digits' else 128
    mlp = {'model': {'name': 'mlp'}}
    networks = {
        'digits': {'MLP': mlp, 'LeNet': {'model': {'name': 'lenet_small'}}},
        'mnist': {'MLP': mlp, 'LeNet': {'model': {'name': 'lenet5'}}},
        'cifar10': {
            'ResNet-20': {
                'model': {'name': 'resnet20'},
                'augment': study.CROP_AND_FLIP,
            }
        },
    }[data]
    curve, table = {'x': 'members', 'group': True}, {'chart': False}
    return study.Study(
        question='How do accuracy and calibration grow with the number of networks whose probabilities '
        'are averaged?',
        config=config,
        axes={'network': networks},
        measures={
            'accuracy of one': study.accuracy(**table),
            'accuracy of all': study.Measure(of_all('top1'), group=True, **table),
            'log loss of one': study.result('log_loss', 'number', **table),
            'log loss of all': study.Measure(of_all('log_loss'), 'number', group=True, **table),
            'ECE of one': study.result('ece', **table),
            'ECE of all': study.Measure(of_all('ece'), group=True, **table),
            'test accuracy': study.Measure(by_members('top1'), **curve),
            'log loss': study.Measure(by_members('log_loss'), 'number', **curve),
            'ECE': study.Measure(by_members('ece'), **curve),
            'Brier score': study.Measure(by_members('brier'), 'number', **curve),
        },
    )
