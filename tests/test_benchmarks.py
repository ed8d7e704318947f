"""Benchmarks run as they stand: what they time is other tests' matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / 'experiments' / 'benchmarks'
POINT = {'images': 1000, 'size': 28, 'batch': 128, 'devices': 1, 'seeds': 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('axis', 'value'),
    [('images', 2000), ('size', 56), ('batch', 512), ('devices', 2), ('seeds', 2)],
)
def test_growth_measures_a_point_of_each_axis(axis, value):
    command = [
        sys.executable,
        BENCHMARKS / 'growth.py',
        '--point',
        json.dumps({**POINT, axis: value}),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert min(json.loads(done.stdout.splitlines()[-1]).values()) > 0
