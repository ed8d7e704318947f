"""Training on adversarial examples of MNIST (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    python -m jaxcls.main --config=experiments/adversarial_mnist.py --workdir=adversarial
    python -m jaxcls.main attack adversarial --attacks=fgsm,pgd,square --epsilons=0.1,0.2,0.3 \
        --examples=500 --queries=300 --steps=20

The paper has 98.8% clean and 93.2% under PGD of 40 steps at epsilon 0.3, after 100,000 steps with
attacks of 40 and a network 15 times as large: hours of CPU. Here attacks have 5 steps, and there are
1,407 steps of training. The plain net to compare it with: `--config.adversary.name=none`. Attacks of
one step, `fgsm`, are cheaper and teach less: see its docstring.

Hardware: 2 CPU cores. Time: 3 minutes, the plain net 36 s; an attack 40 s. Test accuracy (1 run each; under
attack of the first 500 images, +- 2 to 4):

             clean   FGSM 0.1, 0.2, 0.3    PGD 0.1, 0.2, 0.3    Square 0.1, 0.2, 0.3
    trained  97.04%  93.4   88.4   83.6    92.8  85.2  72.6     93.8   90.4   80.8
    plain    99.24%  76.0   21.4    3.6    55.8   0.4   0.0     85.4   22.0    0.4
"""

from jaxcls import config as base


def get_config():
    config = base.get_config()
    config.epochs = 3.0
    config.batch_size = 128
    config.data.name = 'tfds:mnist'
    config.data.mean = (0.0,)
    config.data.std = (1.0,)
    config.model = {'name': 'lenet5', 'filters': (16, 32), 'hidden': (256,)}
    config.learning_rate = 0.002
    config.schedule = {'name': 'one_cycle'}
    config.adversary = {'name': 'pgd', 'epsilon': 0.3, 'steps': 5, 'step_size': 0.1}
    return config
