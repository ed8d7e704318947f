import pytest

from jaxcls import registry
from jaxcls.errors import UserError


def build(size: int = 1, *, dtype: object = None, name: str = '', num_classes: int = 10):
    return size, dtype, name, num_classes


TABLE = {'resnet18': build, 'resnet20': build}


def test_lookup_suggests_the_closest_name():
    assert registry.lookup(TABLE, 'resnet20', 'model') is build
    with pytest.raises(UserError, match="Unknown model 'resent20'. Did you mean 'resnet20'?"):
        registry.lookup(TABLE, 'resent20', 'model')


def test_defaults_are_plain_data_that_a_config_may_set():
    assert registry.defaults(build) == {'size': 1}


def test_bind_refuses_an_argument_the_factory_lacks():
    assert registry.bind(TABLE, 'model', name='resnet18', size=3)()[0] == 3
    with pytest.raises(UserError, match="has no argument 'sise'. Did you mean 'size'?"):
        registry.bind(TABLE, 'model', name='resnet18', sise=3)
