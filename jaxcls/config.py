"""An experiment's config: defaults, checks, overrides, JSON in and out.

`get_config()` is the default run, and every experiment starts from it. A config holds plain data: numbers,
strings, tuples, and sections `{'name': ..., **arguments}` that pick a factory from a table and set
its arguments.
"""

import ast
import importlib.util
import json
import math
import re
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxcls import registry
from jaxcls.errors import UserError, require_expression

# The sections that name a factory. Their arguments are that factory's, so they may gain fields.
_BASIC = ('model', 'loss', 'optimizer', 'schedule')
# Those that are off unless a config names one: every table of theirs has 'none'.
_OPTIONAL = ('adversary', 'privacy', 'teacher', 'pruning', 'quantization')
SECTIONS = (*_BASIC, *_OPTIONAL)
# Fields of a section beside its factory's arguments.
_BESIDE = {
    'model': {
        'init_from': '',  # a workdir or checkpoint, a .safetensors or .pth file, hf:OWNER/NAME
        'new_head': False,  # start the head afresh even for the same number of classes
    }
}
PRECISIONS = ('float32', 'bfloat16', 'mixed')
PIPELINES = ('auto', 'resident', 'stream')
PLACEMENTS = ('replicated', 'fsdp')
CROPS = ('center', 'random_resized')

Tables = Mapping[str, Mapping[str, Callable]]


def get_config() -> ConfigDict:
    """The default run: a LeNet on scikit-learn's digits, at least 98% in under a minute on 2 cores."""
    return ConfigDict(
        {
            'seed': 0,
            'seeds': 1,  # runs with seed, seed + 1, ..., each in its own directory
            'seeds_per_program': 0,  # in one program; 0: one, but all of small networks on a GPU or TPU
            'epochs': 20.0,
            'batch_size': 64,
            'precision': 'float32',  # 'bfloat16': all of it; 'mixed': parameters stay float32
            'data': {
                'name': 'digits',  # tfds:NAME, folder:PATH, npz:PATH, digits or canvas
                'dir': '',  # of TFDS; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets
                'train': 'train',
                'validation': 'test',  # take 'train[90%:]' to tune, choose or stop early
                'classes': (),  # (3, 5): only these, relabelled 0 and 1; (): all
                'per_class': 0,  # training examples of each class, drawn by the seed; 0: all
                'imbalance': 1.0,  # the largest class over the smallest, a long tail cut by the seed
                'share': 1.0,  # of those training examples, drawn by the seed
                'label_noise': 0.0,  # share of training labels redrawn evenly from the other classes
                'image_size': 0,  # pixels; 0 keeps the size of the data set
                'crop': 'center',  # 'random_resized': of the full photo, streamed training only
                'crop_fraction': 1.0,  # of the short side that a centre crop keeps
                'mean': (0.5,),  # per channel, of images in [0, 1]
                'std': (0.5,),
                'pipeline': 'auto',  # 'resident': on the device; 'stream': read as it goes
                'workers': 0,  # processes that read a stream; 0: threads of this one
                'max_bad_images': 0.01,  # share of training images that may be undecodable: left out
            },
            'augment': [],
            'model': {'name': 'lenet_small'},
            'loss': {'name': 'cross_entropy'},
            'optimizer': {'name': 'adam'},
            'learning_rate': 0.003,
            'schedule': {'name': 'cosine'},
            'adversary': {
                'name': 'none'
            },  # 'fgsm', 'pgd', 'trades': trains on adversarial examples
            'privacy': {'name': 'none'},  # 'dp_sgd': differential privacy
            'teacher': {'name': 'none'},  # 'logits', 'features': learns from a trained run
            'pruning': {'name': 'none'},  # 'magnitude': weights are set to zero on the way
            'quantization': {'name': 'none'},  # 'int8': trains with rounded weights and activations
            'warmup_epochs': 0.0,
            'weight_decay': 0.0,  # decoupled, of kernels only
            'l1': 0.0,  # penalties in the loss, of kernels only
            'l2': 0.0,
            'clip_norm': 0.0,  # 0: off, here and below
            'adaptive_clip': 0.0,
            'freeze': '',  # regular expression; parameters whose path it is found in stay fixed
            'layer_decay': 1.0,  # factor on the learning rate from each layer to the one before
            'accumulate_steps': 1,
            'sam_rho': 0.0,
            'ema_decay': 0.0,
            'early_stopping_epochs': 0.0,  # without a better validation loss
            'max_bad_steps': 20,  # non-finite steps in a row before the run stops
            'parameters': 'replicated',  # 'fsdp': sharded over the devices
            'steps_per_call': 0,  # steps in one program; 0: chosen by backend
            'log_every_steps': 100,
            'validate_every_epochs': 1.0,
            'checkpoint_every_epochs': 1.0,
            'keep_checkpoints': 2,
        }
    )


def load_file(path: str | Path) -> ConfigDict:
    """Runs an experiment file and returns the config of its `get_config()`. The file is code.

    Raises:
      UserError: no such file, an error in it, or no `get_config` in it.
    """
    path = Path(path)
    if path.suffix != '.py' or not path.is_file():
        others = [str(p) for p in path.parent.glob('*.py')]
        raise UserError(
            f'No config file {str(path)!r}; --config takes the path of an experiment. '
            f'{registry.did_you_mean(str(path), others)}'
        )
    config = run_file(path, 'get_config')
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'{path}: get_config() returned {type(config).__name__}, not a ConfigDict. '
            'Start from jaxcls.config.get_config().'
        )
    return config


def module_of(path: Path) -> types.ModuleType:
    """A Python file of the user's as a module. The file is run."""
    spec = importlib.util.spec_from_file_location(f'jaxcls_file_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_file(path: Path, function: str, *args) -> Any:
    """What a function of a user's Python file returns. The file is run.

    Raises:
      UserError: that of the file, or one about any other error in it.
    """
    try:
        module = module_of(path)
        if callable(getattr(module, function, None)):
            return getattr(module, function)(*args)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f', line {frame.lineno}' for frame in frames if frame.filename == str(path)]
        raise UserError(
            f'{path}{"".join(lines[-1:])} failed: {type(error).__name__}: {error}. Mend the file.'
        ) from error
    raise UserError(f'{path} has no function {function}(); define it, as the experiments do.')


def apply_overrides(config: ConfigDict, overrides: Iterable[tuple[str, str]], tables: Tables):
    """Sets fields from the command line, in place: `('model.width', '32')`.

    A section's new `name` starts the section afresh with that factory's own defaults, whatever the
    order of the overrides. The list of augmentations is set whole, `('augment', "[{'name': 'flip'}]")`,
    or item by item, `('augment[0].padding', '2')`.

    Raises:
      UserError: unknown field, or a value of the wrong type.
    """
    _check_fields(config, get_config(), 'config')
    overrides = list(overrides)
    for path, text in overrides:
        if path == 'augment':
            config.augment = _list(literal(text))
    for path, text in overrides:
        _rename(config, path, text)
    complete(config, tables)
    for path, text in overrides:
        if path != 'augment':
            _set(config, path, text)


def _rename(config: ConfigDict, path: str, name: str):
    """Where the path is the name of a section or an augmentation: starts that afresh."""
    parent, _, field = path.rpartition('.')
    place = _place(parent.removeprefix('augment')) if parent.startswith('augment') else None
    if field == 'name' and parent in SECTIONS and _named(config[parent]) != name:
        config[parent] = ConfigDict({'name': name})
    elif field == 'name' and place is not None and place < len(_list(config.augment)):
        config.augment[place] = {'name': name}


def _named(section: Any) -> Any:
    return section.get('name') if isinstance(section, (Mapping, ConfigDict)) else None


def _place(part: str) -> int | None:
    """The number of '[3]'."""
    found = re.fullmatch(r'\[([0-9]{1,9})\]', part)
    return int(found[1]) if found else None


def complete(config: ConfigDict, tables: Tables):
    """Fills each section with its factory's default arguments, in place, so that a run records them.

    Raises:
      UserError: a name that is in no table, an argument that its factory does not have.
    """
    for section in SECTIONS:
        config[section] = ConfigDict(_completed(section, config[section], tables[section]))
    augment = _list(config.augment)
    config.augment = [_completed('augment', spec, tables['augment']) for spec in augment]


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise UserError(f'config.augment is {value!r}; it must be a list of dicts.')
    return value


def _completed(kind: str, spec: Mapping[str, Any], table: Mapping[str, Callable]) -> dict:
    if not _named(spec) or not all(isinstance(field, str) for field in spec):
        raise UserError(
            f"config.{kind} is {spec!r}; it must be a dict with a 'name', one of: {', '.join(table)}."
        )
    spec, beside = dict(spec), _BESIDE.get(kind, {})
    registry.bind(table, kind, **arguments(kind, spec))
    known = registry.defaults(table[spec['name']]) | beside
    for field, value in spec.items():
        if field != 'name' and field not in known:
            raise UserError(f'config.{kind}.{field} cannot be set: the data or the run decide it.')
        if field != 'name':
            spec[field] = _typed(f'{kind}.{field}', value, known[field])
    return {**known, **spec}


def arguments(section: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the fields that are not its factory's: its name and arguments."""
    return {field: spec[field] for field in spec if field not in _BESIDE.get(section, {})}


def _set(config: ConfigDict, path: str, text: str):
    """Sets one dotted field, such as `data.name` or `augment[0].padding`."""
    node, where = config, 'config'
    *parents, last = path.replace('[', '.[').split('.')
    for part in parents:
        node, where = _child(node, part, where), f'{where}.{part}'.replace('.[', '[')
    old = _child(node, last, where)
    if isinstance(old, (ConfigDict, dict, list)):
        raise UserError(
            f'config.{path} is a group of fields; set one of them: '
            f'--config.{path}{"[0]" if isinstance(old, list) else ""}.FIELD=VALUE.'
        )
    node[last] = _typed(path, _parse(text, old), old)


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        place = _place(part)
        if place is None or place >= len(node):
            known = f'items 0 to {len(node) - 1}' if node else 'no items'
            raise UserError(
                f'{where} has {known}, not {part!r}. Set one that is there, or all of them: '
                "--config.augment=\"[{'name': 'flip'}]\"."
            )
        return node[place]
    if not isinstance(node, (ConfigDict, dict)) or part not in node:
        known = node if isinstance(node, (ConfigDict, dict)) else ()
        raise UserError(f'{where} has no field {part!r}. {registry.did_you_mean(part, known)}')
    return node[part]


def _parse(text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        return {'true': True, 'false': False}.get(text.lower(), text)
    return literal(text)


def literal(text: str) -> Any:
    """The number, tuple, list or dict that a text writes, else the text."""
    try:
        value = ast.literal_eval(text)
        repr(value)  # not so of hexadecimal integers of thousands of digits
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return value


# What the items of tuples that are empty by default are like; numbers in any others are floats.
_ITEMS = {'data.classes': 0}


def _typed(path: str, value: Any, old: Any) -> Any:
    """The value as the old one's type. A number may widen to float, nothing else changes its type."""
    wanted = type(old)
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if wanted is tuple and isinstance(value, (list, tuple)):
        if not old and path in _ITEMS:
            old = (_ITEMS[path],)
        elif not old and all(type(item) in (int, float) for item in value):
            old = (0.0,)
        return tuple(_typed(path, item, old[0] if old else value[0]) for item in value)
    if type(value) is not wanted:
        raise UserError(
            f'config.{path} is {value!r}, of type {type(value).__name__}; '
            f'it must be of type {wanted.__name__}, as in {old!r}.'
        )
    return value


def validate(config: ConfigDict):
    """Checks ranges and fields against each other, before anything is compiled.

    Raises:
      UserError: the first field that is out of its range.
    """
    _check_fields(config, get_config(), 'config')
    for path, low, high in _RANGES:
        value = _at(config, path)
        if not (low <= value <= high and value < math.inf):
            raise UserError(f'config.{path} is {value}; it must be {_range(low, high)}.')
    for path, choices in _CHOICES:
        if _at(config, path) not in choices:
            raise UserError(
                f'config.{path} is {_at(config, path)!r}. '
                f'{registry.did_you_mean(str(_at(config, path)), choices)}'
            )
    _check_together(config)


_TINY = 1e-12
_RANGES = (
    ('seed', 0, 2**31 - 1),
    ('seeds', 1, 10_000),
    ('seeds_per_program', 0, 10_000),
    ('epochs', _TINY, math.inf),
    ('batch_size', 1, 2**24),
    ('data.per_class', 0, 2**31 - 1),
    ('data.imbalance', 1, 1e6),
    ('data.share', _TINY, 1),
    ('data.label_noise', 0, 1),
    ('data.image_size', 0, 4096),
    ('data.crop_fraction', 0.01, 1.0),
    ('data.workers', 0, 512),
    ('data.max_bad_images', 0, 1),
    ('learning_rate', _TINY, math.inf),
    ('warmup_epochs', 0, math.inf),
    ('weight_decay', 0, math.inf),
    ('l1', 0, math.inf),
    ('l2', 0, math.inf),
    ('clip_norm', 0, math.inf),
    ('adaptive_clip', 0, math.inf),
    ('layer_decay', _TINY, 1),
    ('accumulate_steps', 1, 2**20),
    ('sam_rho', 0, math.inf),
    ('ema_decay', 0, 1 - 1e-9),
    ('early_stopping_epochs', 0, math.inf),
    ('max_bad_steps', 1, 2**30),
    ('steps_per_call', 0, 2**20),
    ('log_every_steps', 1, 2**30),
    ('validate_every_epochs', 1e-6, math.inf),
    ('checkpoint_every_epochs', 1e-6, math.inf),
    ('keep_checkpoints', 1, 1000),
)
_CHOICES = (
    ('precision', PRECISIONS),
    ('data.pipeline', PIPELINES),
    ('data.crop', CROPS),
    ('parameters', PLACEMENTS),
)


def _range(low: float, high: float) -> str:
    low = 'more than 0' if low == _TINY else f'at least {low}'
    return low if high == math.inf else f'{low} and at most {high}'


def _at(config: ConfigDict, path: str) -> Any:
    for part in path.split('.'):
        config = config[part]
    return config


def _check_fields(config: Mapping, reference: Mapping, where: str):
    """Every field of the defaults is there, with its type, and no other."""
    for field in config:
        if field not in reference:
            raise UserError(
                f'{where} has no field {field!r}. {registry.did_you_mean(field, reference)}'
            )
    for field, default in reference.items():
        path = f'{where}.{field}'
        if field not in config:
            raise UserError(f'{path} is missing. Start from jaxcls.config.get_config().')
        if field in SECTIONS or field == 'augment':
            continue
        if isinstance(default, ConfigDict):
            if not isinstance(config[field], ConfigDict):
                raise UserError(f'{path} is {config[field]!r}; it must be a group of fields.')
            _check_fields(config[field], default, path)
        else:
            _typed(path.removeprefix('config.'), config[field], default)


def _check_together(config: ConfigDict):
    data = config.data
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f'config.batch_size {config.batch_size} does not divide into config.accumulate_steps '
            f'{config.accumulate_steps} equal parts; choose a multiple of {config.accumulate_steps}.'
        )
    require_expression('config.freeze', config.freeze, "'^(?!head)' freezes all but the head")
    if config.warmup_epochs >= config.epochs:
        raise UserError(
            f'config.warmup_epochs {config.warmup_epochs} must be less than config.epochs '
            f'{config.epochs}.'
        )
    classes = data.classes
    if len(set(classes)) != len(classes) or len(classes) == 1 or min(classes, default=0) < 0:
        raise UserError(
            f'config.data.classes is {classes}; give () for all classes, or the indices, from 0, of at '
            'least 2, each once.'
        )
    if not data.std or min(data.std) <= 0 or not all(map(math.isfinite, data.mean + data.std)):
        raise UserError(
            f'config.data.std is {data.std}; give one value, or one a channel, each more than 0.'
        )
    if len(data.mean) != len(data.std):
        raise UserError(
            f'config.data.mean has {len(data.mean)} channels and config.data.std {len(data.std)}; '
            'give both one value, or one a channel.'
        )
    if data.crop == 'random_resized' and not data.image_size:
        raise UserError(
            "config.data.crop='random_resized' needs a size to resize to: set config.data.image_size."
        )
    if data.crop == 'random_resized' and data.pipeline == 'resident':
        raise UserError(
            "config.data.crop='random_resized' crops photos as they are read, which a resident split "
            "does once: set config.data.pipeline='stream', or add the augmentation "
            "{'name': 'random_resized_crop'}."
        )
    if config.early_stopping_epochs and config.early_stopping_epochs < config.validate_every_epochs:
        raise UserError(
            f'config.early_stopping_epochs {config.early_stopping_epochs} is less than '
            f'config.validate_every_epochs {config.validate_every_epochs}: it would stop at once.'
        )


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, keys sorted, tuples as lists."""
    return json.dumps(as_json(config), indent=2, sort_keys=True)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: dicts, and lists for tuples."""
    return json.loads(config.to_json_best_effort())


def from_json(text: str, tables: Tables | None = None) -> ConfigDict:
    """The config out of `to_json`: lists of plain values are tuples again. ValueError if it is none.

    Fields that it lacks, because an older version wrote it, have their defaults: those are neutral. With
    `tables` that goes for its sections as well (`complete`).
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError('its brackets are nested thousands deep') from None
    if not isinstance(value, dict):
        raise ValueError(f'a config is a dict of fields, not {type(value).__name__}')
    config, defaults = ConfigDict(_tuples(value)), get_config()
    for part, known in ((config, defaults), (config.get('data', {}), defaults.data)):
        if not isinstance(part, (ConfigDict, dict)):
            raise ValueError(f'its data are {part!r}, not a dict of fields')
        for field in known:
            if field not in part and field not in (*_BASIC, 'augment', 'data'):
                part[field] = known[field]
    if tables:
        complete(config, tables)
    return config


_DEPTH = 20  # more than twice that of any config; libraries go through one by recursion


def _tuples(value: Any, key: str = '', depth: int = 0) -> Any:
    if depth > _DEPTH:
        raise ValueError(f'its fields are nested more than {_DEPTH} deep')
    if isinstance(value, dict):
        return {key: _tuples(item, key, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        items = [_tuples(item, '', depth + 1) for item in value]
        dicts = key == 'augment' or (items and isinstance(items[0], dict))
        return items if dicts else tuple(items)
    return value


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, by dotted name, as `(old, new)`; `'absent'` where there is none."""
    return flat_differences(flat(as_json(old)), flat(as_json(new)))


def flat_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`differences` of what `flat` returns."""
    return {
        path: (old.get(path, 'absent'), new.get(path, 'absent'))
        for path in sorted(old.keys() | new.keys())
        if old.get(path, 'absent') != new.get(path, 'absent')
    }


def flat(value: Any, path: str = '') -> dict[str, Any]:
    """The leaves of nested dicts and of lists of dicts, by dotted name."""
    if isinstance(value, dict):
        items = [(f'{path}.{key}' if path else key, item) for key, item in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = [(f'{path}[{i}]', item) for i, item in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, item in items for key, leaf in flat(item, name).items()}


def overlap(path: str, field: str) -> bool:
    """Whether one dotted name is the other or a part of it: 'model' and 'model.name'."""
    return f'{path}.'.startswith(f'{field}.') or f'{field}.'.startswith(f'{path}.')


def epoch_steps(epochs: float, examples: int, batch_size: int) -> int:
    """The number of steps after which `epochs` epochs are seen, at least one.

    Raises:
      UserError: more than an int32 counts.
    """
    if epochs * examples / batch_size >= 2**31:
        raise UserError(
            f'{epochs:g} epochs of {examples:,} examples in batches of {batch_size} are more than '
            '2**31 steps; set a smaller config.epochs.'
        )
    return max(1, math.ceil(epochs * examples / batch_size - 1e-9))
