"""A small VGG on a third of MNIST: a network whose time is in its convolutions, to be made smaller.

    python -m jaxcls.main --config=experiments/vgg_mnist.py
    jaxcls compress runs/vgg_mnist --epochs=2 --distill --methods channels:0.5

Hardware: 2 CPU cores. Time: 5 minutes beside other work, the second command 3. Test
accuracy: 99.08%; with half of its channels 98.84%, in 0.38 of the time at batches of 64 (quartiles 0.37 to
0.39) and 0.32 at 1, and in a quarter of the bytes.
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.epochs = 2.0
    config.batch_size = 128
    config.data.name = 'tfds:mnist'
    config.data.train = 'train[:20000]'
    config.data.mean = (0.1307,)
    config.data.std = (0.3081,)
    config.augment = [{'name': 'affine', 'degrees': 10.0, 'translate': 0.08}]
    config.model = {
        'name': 'vgg11_bn',
        'stage_sizes': (2, 2),
        'widths': (32, 64),
        'hidden': (256,),
        'pool_size': 7,
        'dropout': 0.0,
    }
    config.optimizer = {'name': 'adamw'}
    config.learning_rate = 0.003
    config.schedule = {'name': 'one_cycle'}
    config.weight_decay = 0.01
    return config
