"""Scripts under experiments/ as modules."""

from jaxcls import config

load = config.module_of
