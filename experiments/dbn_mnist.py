"""The deep belief network on MNIST: three RBMs (500-500-2000), unrolled and fine-tuned (Hinton 2006).

    python -m jaxcls.main --config=experiments/dbn_mnist.py

Hardware: 2 CPU cores. Time: 15 epochs of each RBM and 10 of fine-tuning, 5 to 7 minutes beside other
work. Test accuracy: 98.68% +- 0.14 (95% interval of the mean, 3 runs, seeds 0 to 2): an error of
1.32%. The same net from random weights, --config.model.pretrain_epochs=0, has 96.47% +- 0.08 after
as many epochs of the same (3 runs): sigmoids are slow to learn from there. Pixels only, no
augmentation. The paper's 1.25% is of another fine-tuning (up-down, with the labels in the top RBM).
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.epochs = 10.0
    config.batch_size = 100
    config.data.name = 'tfds:mnist'
    config.data.mean = (0.0,)  # an RBM's pixels are probabilities
    config.data.std = (1.0,)
    config.model = {'name': 'dbn', 'hidden': (500, 500, 2000), 'pretrain_epochs': 15}
    config.optimizer = {'name': 'adam'}
    config.learning_rate = 0.0005
    config.schedule = {'name': 'cosine'}
    return config
