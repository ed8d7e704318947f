"""The floors of the house: a module imports only from below, and features never from each other."""

import ast
from pathlib import Path

import jaxcls

FLOORS = [
    {'errors', 'registry', 'config', 'terminal', 'fingerprints'},
    {
        'losses',
        'metrics',
        'intervals',
        'predictions',
        'optimizers',
        'schedules',
        'image_ops',
        'augment',
    }
    | {'sources', 'download', 'prepare', 'loaders', 'datasets', 'pipeline', 'sharding', 'workdir'}
    | {'pruning', 'quantization', 'distillation'}
    | {'models', 'weight_files', 'estimators', 'pictures', 'onnx_graph', 'attributions', 'attacks'}
    | {'filters', 'jpeg', 'corruptions'},
    {'steps', 'weights', 'results', 'adversary', 'privacy'},
    {'experiment', 'channels', 'low_rank'},
    {'runs', 'tta', 'propagation', 'verify', 'explain'},
    {'evaluation', 'membership', 'inspection', 'classify', 'export', 'transfer', 'lr_find', 'loop'}
    | {'report', 'robustness'},
    {'baselines', 'serving', 'footprint'},
    {'train', 'seeds'},
    {'sweep', 'compress'},
    {'study'},
    {'console', 'commands', 'main'},
]
# On these floors modules are a chain; these are its allowed links.
WITHIN = {
    ('config', 'registry'), ('config', 'errors'), ('registry', 'errors'),
    ('augment', 'image_ops'), ('corruptions', 'image_ops'), ('corruptions', 'jpeg'),
    ('corruptions', 'filters'), ('jpeg', 'filters'), ('pruning', 'optimizers'), ('quantization', 'models'),
    ('distillation', 'losses'), ('optimizers', 'schedules'),
    ('prepare', 'download'), ('loaders', 'prepare'), ('loaders', 'sources'), ('datasets', 'loaders'),
    ('datasets', 'sources'), ('pipeline', 'datasets'), ('pipeline', 'sources'), ('pipeline', 'sharding'),
    ('predictions', 'metrics'), ('predictions', 'intervals'), ('weight_files', 'download'),
    ('explain', 'runs'), ('membership', 'evaluation'), ('main', 'commands'), ('commands', 'console'),
}  # fmt: skip
PACKAGES = ('report', 'commands', 'serving')  # on one floor each
ROOT = Path(jaxcls.__file__).parent


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'jaxcls':
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('jaxcls.'):
            names.add(node.module.split('.')[1])
        elif isinstance(node, ast.Import):
            parts = [alias.name.split('.') for alias in node.names]
            names |= {part[1] for part in parts if part[0] == 'jaxcls' and len(part) > 1}
    return names


def test_modules_import_only_from_lower_floors():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path in sorted(
        [*ROOT.glob('*.py'), *(p for name in PACKAGES for p in ROOT.glob(f'{name}/*.py'))]
    ):
        name = path.parent.stem if path.parent.stem in PACKAGES else path.stem
        if name == '__init__':
            continue
        for other in imports(path) - {name}:
            below = floor[other] < floor[name]
            assert below or (name, other) in WITHIN, f'{name} must not import {other}'


def test_models_import_only_what_all_share_and_floor_0():
    for path in (ROOT / 'models').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('jaxcls'):
                allowed = path.stem == '__init__' or node.module in (
                    'jaxcls.models.bands', 'jaxcls.models.batch_norm', 'jaxcls.models.convolutions',
                    'jaxcls.models.depthwise', 'jaxcls.models.layers', 'jaxcls.models.maxima',
                    'jaxcls.models.references', 'jaxcls.models.slices', 'jaxcls.models.winograd',
                    'jaxcls.registry', 'jaxcls.errors', 'jaxcls',
                )  # fmt: skip
                assert allowed, f'{path.stem} must not import {node.module}'


def test_every_module_has_a_floor():
    modules = {path.stem for path in ROOT.glob('*.py')} - {'__init__'}
    assert modules | {'models', *PACKAGES} == set().union(*FLOORS)
