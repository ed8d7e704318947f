"""All rows, in order."""

from . import (
    checkpoints,
    disk,
    hostile,
    images,
    inputs,
    mistakes,
    numbers,
    processes,
    repeats,
    runs,
)

MODULES = (checkpoints, disk, hostile, images, inputs, mistakes, numbers, processes, repeats, runs)
ROWS = tuple(sorted((row for module in MODULES for row in module.ROWS), key=lambda row: row.number))
