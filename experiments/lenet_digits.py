"""A LeNet on scikit-learn's digits (1,797 images of 8x8): the first run, no download.

    python -m jaxcls.main

Hardware, time, accuracy: TODO
"""

from jaxcls.config import get_config

__all__ = ['get_config']
