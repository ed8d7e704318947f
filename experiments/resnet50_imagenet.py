"""ResNet-50 v1.5 on ImageNet in 90 epochs.

Warm-up, linear scaling of the rate and zero-initialised residuals are those of Goyal et al. 2017
(https://arxiv.org/abs/1706.02677), cosine and label smoothing those of He et al. 2019
(https://arxiv.org/abs/1812.01187).

    python -m jaxcls.main --config=experiments/resnet50_imagenet.py

Others have 76.1 to 76.5%. Hardware, time, accuracy: not measured here; it takes 8 GPUs or a TPU pod.

Photos are streamed, and cropped at random as they are read. Where the 193 GB of the resized training
split fit into each device's memory, it can be resident instead:
    --config.data.crop=center --config.data.pipeline=resident \\
    --config.augment="[{'name': 'random_resized_crop'}, {'name': 'flip'}]"
"""

from jaxcls import config as base

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config():
    config = base.get_config()
    config.epochs = 90.0
    config.batch_size = 1024
    config.precision = 'mixed'
    config.data.name = 'tfds:imagenet2012'
    config.data.validation = 'validation'
    config.data.image_size = 224
    config.data.crop = 'random_resized'
    config.data.crop_fraction = 0.875
    config.data.mean = MEAN
    config.data.std = STD
    config.data.pipeline = 'stream'
    config.data.workers = 16
    config.augment = [{'name': 'flip'}]
    config.model = {'name': 'resnet50', 'zero_init_residual': True}
    config.loss = {'name': 'cross_entropy', 'label_smoothing': 0.1}
    config.optimizer = {'name': 'sgd', 'momentum': 0.9, 'nesterov': True}
    config.learning_rate = 0.4  # 0.1 for each 256 images of a batch
    config.schedule = {'name': 'cosine'}
    config.warmup_epochs = 5.0
    config.l2 = 1e-4
    config.checkpoint_every_epochs = 0.25
    return config
