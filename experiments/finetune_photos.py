"""Fine-tuning a ResNet-50 of ImageNet on a folder of photos: train/CLASS/*.jpg and val/CLASS/*.jpg.

    pip install -e '.[hub]'
    python -m jaxcls.main --config=experiments/finetune_photos.py --config.data.name=folder:PATH

The weights are timm's (Wightman 2021, https://arxiv.org/abs/2110.00476), 100 MB at the first run; a
file of them does as well: --config.model.init_from=FILE. Hardware, time, accuracy: not measured here,
there was no network. Few photos, or little time: --config.freeze='^(?!head)' trains the head alone.
"""

from jaxcls import config as base

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config():
    config = base.get_config()
    config.epochs = 20.0
    config.batch_size = 64
    config.precision = 'mixed'
    config.data.name = 'folder:photos'
    config.data.validation = 'val'
    config.data.image_size = 224
    config.data.crop_fraction = 0.95
    config.data.mean = MEAN
    config.data.std = STD
    config.augment = [{'name': 'random_resized_crop'}, {'name': 'flip'}]
    config.model = {
        'name': 'resnet50',
        'norm': 'frozen_batch',
        'init_from': 'hf:timm/resnet50.a1_in1k',
    }
    config.optimizer = {'name': 'adamw'}
    config.learning_rate = 0.0003
    config.layer_decay = 0.8
    config.warmup_epochs = 1.0
    config.weight_decay = 0.05
    config.loss = {'name': 'cross_entropy', 'label_smoothing': 0.1}
    return config
