"""Scripts under experiments/ as modules."""

import importlib.util
from pathlib import Path


def load(path: Path):
    """The module of a file that is in no package."""
    spec = importlib.util.spec_from_file_location(f'script_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
