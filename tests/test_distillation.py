"""Distillation against PyTorch and NumPy; what must be the plain run; a student outlives its teacher."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls import config as config_lib
from jaxcls import distillation, fit, losses, runs, verify, workdir
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError

RNG = np.random.default_rng(0)
LOGITS, TEACHER, VALUES = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((6, 5), (6, 5), (6,))
)
MASK = np.array([True] * 4 + [False] * 2)


def config(teacher=None, **fields):
    built = config_lib.get_config()
    built.update(
        {'epochs': 2.0, 'batch_size': 40, 'model': {'name': 'linear'}, 'learning_rate': 0.03}
    )
    built.data.update({'train': 'train[:200]', 'validation': 'test[:80]'})
    built.teacher = teacher or {'name': 'none'}
    built.update(fields)
    return built


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    wide = config(model={'name': 'mlp', 'hidden': (12,)}, epochs=6.0)
    return fit(wide, tmp_path_factory.mktemp('teacher') / 'run').workdir


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return fit(config(), tmp_path_factory.mktemp('plain') / 'run')


def of(teacher, name='logits', **fields):
    return {'name': name, 'workdir': str(teacher), **fields}


@pytest.mark.parametrize(('temperature', 'alpha'), [(1.0, 0.5), (4.0, 0.9), (0.5, 1.0)])
def test_soft_answers_have_the_value_and_the_gradient_of_pytorchs(temperature, alpha):
    torch = pytest.importorskip('torch')
    lesson = distillation.make_lesson(name='logits', temperature=temperature, alpha=alpha)

    def loss(logits):
        batch = lesson.read(jnp.asarray(TEACHER), {})
        return lesson.blend(jnp.asarray(VALUES), logits, {}, batch).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    ours = torch.tensor(LOGITS, requires_grad=True)
    kl = torch.nn.KLDivLoss(reduction='batchmean', log_target=True)
    soft = kl(
        torch.log_softmax(ours / temperature, -1),
        torch.log_softmax(torch.tensor(TEACHER) / temperature, -1),
    )
    theirs = alpha * temperature**2 * soft + (1 - alpha) * torch.tensor(VALUES).mean()
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, ours.grad, rtol=1e-4, atol=1e-7)


def test_similarity_is_that_of_the_paper_and_padding_has_no_part_in_it():
    a, b = (RNG.normal(size=shape).astype(np.float32) for shape in ((6, 2, 3), (6, 7)))
    values = distillation.similarity_loss(jnp.asarray(a), jnp.asarray(b), jnp.asarray(MASK))
    grams = []
    for x in (a[:4].reshape(4, -1), b[:4]):
        gram = np.float64(x) @ np.float64(x).T
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = np.square(grams[0] - grams[1]).sum() / 4**2
    np.testing.assert_allclose(np.mean(values[:4]), expected, rtol=1e-5)
    same = distillation.similarity_loss(jnp.asarray(b), jnp.asarray(3 * b), jnp.asarray(MASK))
    np.testing.assert_allclose(same, 0, atol=1e-10)
    dead = jax.grad(lambda x: distillation.similarity_loss(x, b, MASK).sum())(jnp.zeros_like(a))
    assert np.isfinite(dead).all()


def test_a_teacher_without_a_say_is_plain_training(plain, tmp_path):
    student = fit(config({'name': 'logits', 'alpha': 0.0}), tmp_path / 'run')
    assert verify.differences(plain.workdir, student.workdir) == []
    assert distillation.make_lesson(name='features', weight=0.0) is None


def test_a_student_comes_nearer_to_its_teacher_than_a_plain_one(teacher, plain, tmp_path):
    student = fit(config(of(teacher, alpha=1.0)), tmp_path / 'run')
    assert student.metrics['top1'] > 0.5
    run = runs.open_run(teacher)
    image = np.stack(
        [experiment_lib.load_split(config(), 'test[:80]').source[i][0] for i in range(80)]
    )
    theirs = run.experiment.predict(run.variables, image)
    gaps = []
    for result in (student, plain):
        opened = runs.open_run(result.workdir)
        ours = opened.experiment.predict(opened.variables, image)
        gaps.append(float(losses.divergence(theirs / 4.0, ours / 4.0).mean()))
    assert gaps[0] < gaps[1]


def test_the_teacher_is_no_constant_of_the_program(teacher):
    student = experiment_lib.resolve(config(of(teacher, 'features', alpha=0.5)))
    data = experiment_lib.open_data(student).description
    experiment = experiment_lib.build_for(student, data, runs.open_teacher(student, data))
    state = jax.eval_shape(lambda: experiment_lib.init(experiment, 0))
    traced = jax.make_jaxpr(experiment.train_step)(state, experiment_lib.raw_batch(experiment))
    assert max((np.size(const) for const in traced.consts), default=0) < 64 * 12


def test_a_student_resumes_to_the_same_bits_and_outlives_its_teacher(teacher, tmp_path):
    gone = tmp_path / 'teacher'
    shutil.copytree(teacher, gone)
    student = config(
        of(gone, 'features', feature='pooled', weight=10.0, alpha=0.5), accumulate_steps=2,
        augment=[{'name': 'pad_crop', 'padding': 1}],
    )  # fmt: skip
    whole = fit(student, tmp_path / 'whole')
    assert fit(student, tmp_path / 'parts', until_epoch=1.0).stopped == 'paused'
    fit(student, tmp_path / 'parts')
    assert verify.differences(whole.workdir, tmp_path / 'parts') == []
    shutil.rmtree(gone)
    assert runs.open_run(whole.workdir).step == 10
    assert workdir.read_config(whole.workdir).teacher.temperature == 4.0
    with pytest.raises(UserError, match='teacher'):
        fit(student, tmp_path / 'other')
    assert not (tmp_path / 'other').exists()


def test_a_teacher_of_other_classes_or_none_is_refused_before_anything_is_made(teacher, tmp_path):
    other = config(of(teacher))
    other.data.classes = (0, 1, 2)
    with pytest.raises(UserError, match='has classes 0, 1, 2, 3, 4, ... and this config 0, 1, 2'):
        fit(other, tmp_path / 'run')
    with pytest.raises(UserError, match='config.teacher.workdir is empty'):
        fit(config({'name': 'logits'}), tmp_path / 'run')
    with pytest.raises(UserError, match="Unknown config.teacher.feature 'hiden1'.*pooled"):
        fit(config(of(teacher, 'features', feature='hiden1')), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('field', [{'alpha': 1.5}, {'temperature': 0.0}])
def test_values_out_of_range_are_named(field):
    with pytest.raises(UserError, match=f'config.teacher.{next(iter(field))} is'):
        experiment_lib.resolve(config({'name': 'logits', **field}))
