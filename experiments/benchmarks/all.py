"""Every benchmark: prints their tables, and writes them as JSON with a picture of the ratios.

    pip install -e '.[bench]'
    python experiments/benchmarks/all.py [--only step program ...] [--out=runs/benchmarks]

Leave the machine alone meanwhile. What is compared, and how, stands at the top of each script. All take
two hours on 2 cores: with `--only`, what the others wrote there before, on this machine, is kept beside.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

SCRIPTS = ('step', 'program', 'reading', 'startup', 'growth', 'accuracy', 'together')
FOLDER = Path(__file__).parent


def comparisons(found: dict) -> dict[str, list[float]]:
    """Our time over PyTorch's, of a step over that of its faster side: median, smallest, largest."""
    rows = {name: found.get(name, {}).get('rows', []) for name in ('step', 'program', 'accuracy')}
    each = {f'{row["network"]}, {row["mode"]}': row for row in rows['step']}
    each |= {f'{row["network"]}, whole program': row.get('torch', {}) for row in rows['program']}
    each |= {f'{row["network"]}, time to accuracy': row for row in rows['accuracy']}
    return {label: row['ratio'] for label, row in each.items() if 'ratio' in row}


def plot(found: dict, path: Path):
    """A bar for each comparison, with its spread."""
    from matplotlib.figure import Figure

    bars = comparisons(found)
    if not bars:
        return
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(bars)), layout='constrained')
    axes = figure.subplots()
    for place, (middle, low, high) in enumerate(bars.values()):
        axes.barh(place, middle, color='#0b62a4' if middle <= 1 else '#d1702c')
        axes.plot([low, high], [place, place], color='black', linewidth=1)
    axes.axvline(1, color='black', linewidth=0.8, linestyle='--')
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(xlabel='time of jaxcls / time of PyTorch (below 1 is faster)')
    figure.savefig(path, dpi=120)


def machine() -> dict:
    """What the numbers were taken on."""
    import importlib.metadata

    packages = ('jax', 'jaxlib', 'flax', 'torch', 'torchvision', 'tensorflow')
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {'cores': os.cpu_count(), 'machine': platform.machine(), **versions}


def collect(folder: Path) -> dict:
    """What each script has written there."""
    files = {name: folder / f'{name}.json' for name in SCRIPTS}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def main():
    """Runs the scripts one after another."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', nargs='+', default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument('--out', type=Path, default=Path('runs/benchmarks'))
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--out {args.out} cannot be made: {error.strerror}; choose another folder.')
    failed = []
    for name in args.only:
        print(f'\n{name}', flush=True)
        out = args.out / f'{name}.json'
        command = [sys.executable, FOLDER / f'{name}.py', '--out', out]
        if subprocess.run(command).returncode:
            failed.append(name)
        found = {'machine': machine(), **collect(args.out)}
        (args.out / 'benchmarks.json').write_text(json.dumps(found, indent=1) + '\n')
    plot(found, args.out / 'benchmarks.png')
    print(f'\n{args.out / "benchmarks.json"}, {args.out / "benchmarks.png"}')
    if failed:
        raise SystemExit(
            f'Without {", ".join(failed)}, whose messages are above; --only repeats them.'
        )


if __name__ == '__main__':
    main()
