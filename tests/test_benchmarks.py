"""Benchmarks run as they stand: what they time is other tests' matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import scripts

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


REFERENCE = """
class CifarNet:
    def cuda(self):
        return self

    def to(self, memory_format):
        return self

    def compile(self, mode):
        assert mode == 'max-autotune'


def print_training_details(values, is_final_entry):
    raise AssertionError


def main(run, model):
    time_seconds = 9.0 if run == 'warmup' else 1.5
    print_training_details({'epoch': 0, 'time_seconds': 0.1}, is_final_entry=False)
    print_training_details(locals(), is_final_entry=True)
    return 0.5
"""


@pytest.fixture
def airbench(monkeypatch):
    pytest.importorskip('torch')
    monkeypatch.syspath_prepend(BENCHMARKS)
    return scripts.load(BENCHMARKS / 'airbench.py')


def test_airbench_takes_the_seconds_that_the_script_counts(airbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    script = tmp_path / 'reference.py'
    script.write_text(REFERENCE)
    work, _ = airbench.theirs(script, tmp_path)
    assert work() == {'seconds': 1.5, 'top1': 0.5}


def test_airbench_prints_means_and_the_ratio_round_by_round(airbench):
    rows = {
        'ours': [{'seconds': 1.0, 'top1': 0.9}, {'seconds': 1.5, 'top1': 0.92}],
        'theirs': [{'seconds': 2.0, 'top1': 0.9}, {'seconds': 2.0, 'top1': 0.9}],
    }
    ours, theirs, ratio = airbench.table(rows).splitlines()
    assert ours.split()[:2] == ['ours', '1.25'] and '91.00%' in ours
    assert theirs == 'theirs  2.00 s +- 0.00  90.00% +- 0.00'
    assert ratio == 'ratio   0.62 (0.50 to 0.75)'


def test_airbench_names_what_is_missing(tmp_path):
    pytest.importorskip('torch')
    script = tmp_path / 'reference.py'
    for text, message in ((None, 'is no file'), (REFERENCE, 'sees no GPU')):
        if text:
            script.write_text(text)
        command = [sys.executable, BENCHMARKS / 'airbench.py', script]
        done = subprocess.run(
            command, capture_output=True, text=True, env={'CUDA_VISIBLE_DEVICES': ''}
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr
