"""Every shipped experiment resolves, is honest in its header, and lowers for TPU and GPU."""

from pathlib import Path

import jax
import pytest
from jax import export

import scripts
from jaxcls import config as config_lib
from jaxcls import experiment as experiment_lib
from jaxcls import study as study_lib

EXPERIMENTS = sorted((Path(__file__).parent.parent / 'experiments').glob('*.py'))
STUDIES = sorted((Path(__file__).parent.parent / 'experiments' / 'studies').glob('*.py'))
# What their data sets look like: image shape, classes, training examples.
DATA = {
    'digits': ((8, 8, 1), 10, 1_437),
    'canvas': ((40, 40, 1), 10, 5_748),
    'tfds:mnist': ((28, 28, 1), 10, 60_000),
    'tfds:cifar10': ((32, 32, 3), 10, 50_000),
    'tfds:imagenet2012': ((224, 224, 3), 1000, 1_281_167),
    'folder:photos': ((64, 64, 3), 10, 800),
}


# Those whose train step takes five to ten seconds to trace.
LARGE = ('finetune_photos', 'googlenet_cifar', 'resnet50_imagenet')


@pytest.fixture(params=EXPERIMENTS, ids=lambda path: path.stem)
def path(request):
    return request.param


def build(path):
    config = experiment_lib.resolve(config_lib.load_file(path))
    shape, classes, examples = DATA[config.data.name]
    size = config.data.image_size
    return experiment_lib.build(
        config, (size or shape[0], size or shape[1], shape[2]), classes, examples
    )


def test_the_header_says_how_to_run_it_and_what_came_out(path):
    header = path.read_text().split('"""')[1]
    command = 'python -m jaxcls.main'
    if path.stem != 'lenet_digits':
        command += f' --config=experiments/{path.name}'
    assert command in header
    for word in ('Hardware', 'ime', 'ccuracy'):
        assert word in header
    assert 'TODO' not in header


def flat_step(experiment):
    """The train step over flat arrays, with raw key data: what `jax.export` takes."""
    state = jax.eval_shape(lambda: experiment_lib.init(experiment, 0))
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    batch = experiment_lib.raw_batch(experiment)
    leaves, treedef = jax.tree.flatten((state.replace(key=raw), batch))

    def step(*leaves):
        state, batch = jax.tree.unflatten(treedef, leaves)
        state = state.replace(key=jax.random.wrap_key_data(state.key))
        state, sums = experiment.train_step(state, batch)
        return jax.tree.leaves((state.replace(key=jax.random.key_data(state.key)), sums))

    return step, leaves


@pytest.mark.parametrize(
    'path',
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in LARGE)) for p in EXPERIMENTS],
    ids=lambda path: path.stem,
)
def test_the_train_step_lowers_for_tpu_and_cuda(path):
    if experiment_lib.is_baseline(config_lib.load_file(path)):
        pytest.skip('a classical baseline has no train step')
    step, leaves = flat_step(build(path))
    exported = export.export(jax.jit(step), platforms=('tpu', 'cuda'))(*leaves)
    assert exported.platforms == ('tpu', 'cuda')
    assert [aval.shape for aval in exported.out_avals[: len(leaves) - 5]] == [
        leaf.shape for leaf in leaves[:-5]
    ]


def study(name):
    return scripts.load(next(path for path in STUDIES if path.stem == name))


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_a_study_says_how_to_run_it_and_what_came_out(path):
    header = path.read_text().split('"""')[1]
    script = 'def main()' in path.read_text()
    command = f'python experiments/studies/{path.name}' if script else f'jaxcls study {path.stem}'
    assert command in header and 'Hardware' in header and 'easured' in header
    assert not any(word in header for word in ('TODO', 'TIME', 'ANSWER'))


QUESTIONS = [path for path in STUDIES if 'def get_study' in path.read_text()]


@pytest.mark.parametrize('data', ['digits', 'mnist', 'cifar10'])
@pytest.mark.parametrize('path', QUESTIONS, ids=lambda path: path.stem)
def test_every_setting_of_a_study_is_a_config_of_its_own(path, data):
    asked = study_lib.load(str(path), data)
    settings = [setting for _, setting in study_lib.settings(asked)]
    configs = {config_lib.to_json(setting.config) for setting in settings}
    assert len(configs) == len(settings) >= 1 and asked.question.endswith('?')


def test_the_runs_of_the_transfer_study_differ_in_what_it_asks_about_alone(tmp_path):
    transfer = study('transfer')
    for size in transfer.SIZES:
        configs = {
            arm: experiment_lib.resolve(transfer.target(arm, size, 0, tmp_path))
            for arm in transfer.ARMS
        }
        for arm in ('fine-tuned', 'linear probe'):
            assert configs[arm].model.init_from == str(tmp_path / 'source-0')
            changed = config_lib.differences(configs['from scratch'], configs[arm])
            assert set(changed) <= {'model.init_from', 'model.norm', 'freeze', 'learning_rate'}
    assert set(configs['fine-tuned'].data.classes).isdisjoint(
        config_lib.load_file(transfer.HERE / 'transfer_source.py').data.classes
    )


def test_the_networks_of_the_study_of_same_minutes_share_a_recipe():
    minutes = study('same_minutes')
    configs = [experiment_lib.resolve(minutes.load(name, 1.0)) for name in minutes.NETWORKS]
    for other in configs[1:]:
        changed = {field.partition('.')[0] for field in config_lib.differences(configs[0], other)}
        assert changed <= {'model', 'learning_rate'}
