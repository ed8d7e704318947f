"""jaxcls: image classification in JAX, Flax and Optax. `from jaxcls import fit, evaluate, predict`."""

import importlib
import importlib.metadata
import os

_PUBLIC = {
    'fit': 'jaxcls.train',
    'evaluate': 'jaxcls.evaluation',
    'predict': 'jaxcls.classify',
    'get_config': 'jaxcls.config',
    'make_model': 'jaxcls.models',
    'UserError': 'jaxcls.errors',
}
__all__ = list(_PUBLIC)


def _use_fast_cpu_convolutions():
    """Turns off XLA's YNN convolution fusion, which makes training on CPU 2 to 4 times slower.

    XLA reads the variable when the first backend starts. A flag that the user set is left alone, and
    a jaxlib that may not know the flag is too: XLA aborts on unknown flags.
    """
    flag = '--xla_cpu_experimental_ynn_fusion_type'
    flags = os.environ.get('XLA_FLAGS', '')
    version = tuple(int(part) for part in importlib.metadata.version('jaxlib').split('.')[:2])
    if flag not in flags and (0, 10) <= version <= (0, 12):
        os.environ['XLA_FLAGS'] = f'{flags} {flag}=-individual_convolution'.strip()


_use_fast_cpu_convolutions()


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_PUBLIC[name]), name)
