import os
import subprocess
import sys

import pytest

import jaxcls

FLAG = '--xla_cpu_experimental_ynn_fusion_type'


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('', f'{FLAG}=-individual_convolution'),
        ('--other=1', f'--other=1 {FLAG}=-individual_convolution'),
        (f'{FLAG}=mine', f'{FLAG}=mine'),
    ],
)
def test_the_flag_for_fast_convolutions_never_overrides_the_users(monkeypatch, before, after):
    monkeypatch.setenv('XLA_FLAGS', before)
    jaxcls._use_fast_cpu_convolutions()
    assert os.environ['XLA_FLAGS'] == after


def test_an_unknown_jaxlib_is_not_given_the_flag(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setattr(jaxcls.importlib.metadata, 'version', lambda name: '0.99.1')
    jaxcls._use_fast_cpu_convolutions()
    assert os.environ['XLA_FLAGS'] == ''


def test_training_imports_nothing_slow_that_it_may_not_need():
    slow = ('scipy.stats', 'sklearn', 'matplotlib', 'torch', 'qwix', 'jax_privacy')
    code = f'import sys, jaxcls.train; print([name for name in {slow} if name in sys.modules])'
    found = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert found.stdout == '[]\n'


def test_the_public_names_import_lazily():
    code = (
        'import sys, jaxcls; assert "jax" not in sys.modules; '
        'from jaxcls import fit, evaluate, predict, get_config, make_model, UserError; '
        'assert all(map(callable, (fit, evaluate, predict, get_config, make_model)))'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxcls.nothing  # noqa: B018
