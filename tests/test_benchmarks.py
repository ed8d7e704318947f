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


def test_the_picture_compares_with_pytorch(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    together = scripts.load(BENCHMARKS / 'all.py')
    found = {
        'step': {'rows': [{'network': 'mlp', 'mode': 'train', 'ratio': [0.5, 0.4, 0.6]}]},
        'program': {
            'rows': [
                {'network': 'mlp', 'ratio': [1.0], 'torch': {'ratio': [0.3, 0.2, 0.4]}},
                {'network': 'alone', 'ours': {'median': 1.0}},
            ]
        },
        'accuracy': {'rows': [{'network': 'mlp', 'ratio': [0.7, 0.7, 0.7]}]},
    }
    assert together.comparisons(found) == {
        'mlp, train': [0.5, 0.4, 0.6],
        'mlp, whole program': [0.3, 0.2, 0.4],
        'mlp, time to accuracy': [0.7, 0.7, 0.7],
    }
    together.plot(found, tmp_path / 'ratios.png')
    assert (tmp_path / 'ratios.png').stat().st_size > 0


PROGRAM = """HloModule run

%fused_add (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %copy.1 = f32[8,4]{1,0} copy(%param_0)
  ROOT %add = f32[8,4]{1,0} add(%copy.1, %param_0)
}

%body (state: (bf16[2,8], u8[3], pred[])) -> (bf16[2,8], u8[3], pred[]) {
  %state = (bf16[2,8]{1,0}, u8[3]{0}, pred[]) parameter(0)
  %x = bf16[2,8]{1,0} get-tuple-element(%state), index=0
  %fusion.1 = (f32[8,4]{1,0}, u8[3]{0}) fusion(%x, %x), kind=kLoop, calls=%fused_add
  %custom = f32[5]{0} custom-call(%x), custom_call_target="__cudnn$convForward"
  ROOT %tuple = (bf16[2,8]{1,0}, u8[3]{0}, pred[]) tuple(%x, %x, %x)
}

ENTRY %main (a: bf16[2,8]) -> bf16[2,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  ROOT %copy.2 = bf16[2,8]{1,0} copy(%a)
}
"""


def test_kernels_and_their_bytes_are_those_of_the_loop(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    program = scripts.load(BENCHMARKS / 'gpu_program.py')
    assert program.size_of('(f32[8,4]{1,0}, token[], pred[3]{0})') == 131
    assert program.kernels_of(PROGRAM) == [
        ('fusion.1', 'fusion', 2 * 32, 4 * 32 + 3),
        ('custom', '__cudnn$convForward', 32, 4 * 5),
    ]


def test_what_a_user_can_mend_is_a_message(tmp_path):
    script = tmp_path / 'worker.py'
    script.write_text(
        """
import pairs
from jaxcls.errors import UserError

def prepare():
    raise UserError('No data: put them there.')

pairs.serve(prepare)
"""
    )
    path = f'{BENCHMARKS}:{BENCHMARKS.parent.parent}'
    command = [sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, env={'PYTHONPATH': path})
    assert done.returncode == 1 and done.stderr == 'No data: put them there.\n'


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


REFERENCE_96 = """
import torch

hyp = {'proxy': 1, 'net': 2}


def make_net(settings):
    return torch.nn.Sequential(torch.nn.Conv2d(1, settings, 1))


def print_training_details(values, is_final_entry):
    raise AssertionError


def main(run, hyp, model_proxy, model_trainbias, model_freezebias):
    nets = [net._orig_mod[0] for net in (model_proxy, model_trainbias, model_freezebias)]
    assert [len(net.bias) for net in nets] == [1, 2, 2]
    assert [net.bias.requires_grad for net in nets] == [False, True, False]
    total_time_seconds = 1.5
    print_training_details({'total_time_seconds': 0.1}, is_final_entry=False)
    print_training_details(locals(), is_final_entry=True)
    return 0.5
"""


@pytest.fixture
def airbench(monkeypatch):
    pytest.importorskip('torch')
    monkeypatch.syspath_prepend(BENCHMARKS)
    return scripts.load(BENCHMARKS / 'airbench.py')


@pytest.mark.parametrize(
    ('name', 'text'), [('airbench94_muon', REFERENCE), ('airbench96_faster', REFERENCE_96)]
)
def test_airbench_takes_the_seconds_that_the_script_counts(
    airbench, name, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    script = tmp_path / 'reference.py'
    script.write_text(text)
    assert airbench.recipe_of(script) == name
    work, first = airbench.theirs(script, tmp_path)
    assert work() == first == {'seconds': 1.5, 'top1': 0.5}


def test_airbench_says_what_a_side_has_done_as_soon_as_it_has(airbench, capsys):
    airbench.tell('ours', {'prepare': 70.2, 'seconds': 1.5, 'top1': 0.5})
    airbench.tell('ours', {'seconds': 1.25, 'top1': 0.75})
    assert capsys.readouterr().out.splitlines() == [
        'ours ready in 70 s, of which the first run: 1.50 s, 50.00%',
        'ours: 1.25 s, 75.00%',
    ]


def test_airbench_writes_what_it_has_measured_of_the_recipe(
    airbench, tmp_path, monkeypatch, capsys
):
    script, out = tmp_path / 'reference.py', tmp_path / 'found.json'
    script.write_text(REFERENCE_96)
    runs = [{'seconds': 2.0, 'top1': 0.75}, {'seconds': 2.5, 'top1': 0.5}]

    def interleave(commands, rounds, uncounted, on_news):
        assert (rounds, uncounted) == (2, 0)
        for run in runs:
            on_news('ours', run)
        return {side: airbench.pairs.Timing(runs, {}) for side in commands}

    monkeypatch.setattr(airbench, 'obstacle', lambda script: '')
    monkeypatch.setattr(airbench.pairs, 'last_line', lambda *args: 'written')
    monkeypatch.setattr(airbench.pairs, 'interleave', interleave)
    monkeypatch.setattr(sys, 'argv', ['airbench.py', str(script), '--rounds=2', f'--out={out}'])
    airbench.main()
    assert json.loads(out.read_text()) == {
        'recipe': 'airbench96_faster',
        'rows': {'ours': runs, 'theirs': runs},
    }
    told = capsys.readouterr().out.splitlines()
    assert told[0] == 'ours: 2.00 s, 75.00%' and told[-1] == 'ratio   1.00 (1.00 to 1.00)'


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


def test_airbench_refuses_another_script_and_another_folder(tmp_path):
    script = tmp_path / 'reference.py'
    script.write_text('def main(run, hyp, model):\n    pass\n')
    for more, message in (
        ([], 'has no class CifarNet, def main(run, model)'),
        ([], 'it is not airbench96_faster.py'),
        (['--out', tmp_path / 'nowhere' / 'a.json'], 'is no file in a folder that exists'),
    ):
        command = [sys.executable, BENCHMARKS / 'airbench.py', script, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr, done.stderr


WORKER = """
import os, sys, time
from pathlib import Path
import pairs

mine, other = Path(sys.argv[1]), Path(sys.argv[2])
mine.write_text(str(os.getpid()))


def state():
    lines = Path('/proc', other.read_text(), 'status').read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith('State'))


def work():
    end = time.monotonic() + 10  # a signal needs a moment to arrive
    while state() != 'T' and time.monotonic() < end:
        time.sleep(0.01)
    return state()


pairs.serve(lambda: (work, {'ready': True}), times=int(sys.argv[3]))
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='states are read from /proc')
def test_a_worker_is_stopped_while_another_has_its_turn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv('PYTHONPATH', str(BENCHMARKS))
    import pairs

    script = tmp_path / 'worker.py'
    script.write_text(WORKER)
    pids, news = (tmp_path / 'a', tmp_path / 'b'), []
    commands = {'a': [script, *pids, 2], 'b': [script, *reversed(pids), 1]}
    found = pairs.interleave(commands, 3, on_news=lambda *args: news.append(args))
    assert all(timing.seconds == ['T'] * 3 for timing in found.values())
    ready, turns = news[:2], news[2:]
    assert [(name, about['ready']) for name, about in ready] == [('a', True), ('b', True)]
    assert turns == [('a', 'T'), ('b', 'T')] * 4  # one more than counts
    assert not any(Path('/proc', path.read_text()).exists() for path in pids)
