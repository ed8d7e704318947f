"""Plain-data sections made into one self-contained HTML page, or a chart of them into a picture.

A section is a dict with `kind`, `title`, maybe `note` (text under the title), and

text     `paragraphs` [str].
table    `columns` [str], `formats` [str] one a column, `rows` [[cell]]. A cell is str, a number, None
         (shown as –), or a dict: `mean` with `half` and `n` (a mean of n and the half-width of its
         interval) or with `low` and `high` (the ends of one), maybe `best` True.
chart    `x` {`label`, `log`, `categories`}, `y` {`label`, `format`, `log`}, `series`: dicts with
         `name`, `x`, `y`, maybe `half` (of the interval about y), `style` ('line', 'points',
         'dashed', 'bar'), `group` (series of one are coloured alike and toggled together), `muted`
         (a grey reference).
images   `images` [{`pixels` uint8 [H, W, C], `caption`}], `columns` at most.
matrix   `names` [str], `counts` [[int]]: a confusion matrix, rows true, columns predicted.
row      `sections` side by side where there is room.
details  `sections` folded away under the title; `open` True unfolds them.

Formats: 'text', 'percent', 'integer', 'number' (4 significant digits), 'seconds', 'bytes'. All text is
escaped, and the page's policy lets nothing load and no script run but its own.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from rich.cells import cell_len

from jaxcls import registry
from jaxcls.report import charts
from jaxcls.terminal import printable

Section = dict[str, Any]
_MATRIX_CLASSES = 40  # more are no picture but a list of pairs
_MATRIX_PAIRS = 30


def render(title: str, sections: Sequence[Section], *, subtitle: str = '') -> str:
    """One HTML file: it needs no network, and without JavaScript its tables still show.

    Raises:
      UserError: an unknown kind or format.
    """
    loader = jinja2.PackageLoader('jaxcls.report')
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    css, script = (loader.get_source(environment, f'page.{kind}')[0] for kind in ('css', 'js'))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    views = _number([_view(section) for section in _shown(sections)])
    return environment.get_template('page.html').render(
        title=_shown(title), subtitle=_shown(subtitle), sections=views, css=css, script=script,
        digest=digest,
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """Sections whose texts have escapes for control characters, surrogates and turns of direction."""
    if isinstance(value, str):
        return printable(value, keep='\n')
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return [_shown(item) for item in value] if isinstance(value, (list, tuple)) else value


def _number(views: list[dict], prefix: str = 's') -> list[dict]:
    """Gives each section, nested ones too, an id."""
    for i, view in enumerate(views):
        view['id'] = f'{prefix}{i}'
        _number(view.get('sections', []), f'{prefix}{i}-')
    return views


def _view(section: Section) -> dict[str, Any]:
    """A section with everything its template shows, as text or as safe JSON."""
    view = {'title': '', 'note': '', **section}
    view.update(registry.lookup(_VIEWS, section['kind'], 'kind of section')(section))
    return view


def _text(section):
    return {'paragraphs': list(section['paragraphs'])}


def _table(section):
    formats = section['formats']
    if len(formats) != len(section['columns']):
        raise ValueError(f'{len(formats)} formats for {len(section["columns"])} columns')
    rows = [
        [_cell(cell, kind) for cell, kind in zip(row, formats, strict=True)]
        for row in section['rows']
    ]
    columns = [
        {'name': name, 'numeric': kind != 'text'}
        for name, kind in zip(section['columns'], formats, strict=True)
    ]
    return {'columns': columns, 'rows': rows}


def _cell(cell, kind: str) -> dict[str, Any]:
    value = cell['mean'] if isinstance(cell, dict) else cell
    number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return {
        'text': show(cell, kind),
        'value': float(value) if number else None,
        'numeric': kind != 'text',
        'best': isinstance(cell, dict) and bool(cell.get('best')),
        'hint': f'mean of {cell["n"]}' if isinstance(cell, dict) and cell.get('n', 1) > 1 else '',
    }


def show(cell: Any, kind: str) -> str:
    """A table's cell as text: '99.17% ± 0.24', '0.02551', '1:02:03', '–'."""
    if isinstance(cell, dict):
        mean, half = show(cell['mean'], kind), cell.get('half')
        if half is not None and math.isfinite(half):
            return f'{mean} ± {_bare(half, kind)}'
        if cell.get('low') is not None:
            return f'{mean} ({_bare(cell["low"], kind)} to {_bare(cell["high"], kind)})'
        return mean
    if isinstance(cell, str):
        return cell
    if cell is None or not math.isfinite(cell):
        return '–'
    return registry.lookup(FORMATS, kind, 'format')(cell)


def _bare(value: float, kind: str) -> str:
    """Without the sign of per cent, which its mean has."""
    if kind == 'percent':
        return f'{100 * value:.2f}' if abs(value) >= 0.00005 else f'{100 * value:.1g}'
    if kind == 'number' and abs(value) < 1e4:
        return f'{value:.2g}'
    return show(value, kind)


def _seconds(value: float) -> str:
    if value < 100:
        return f'{value:.3g} s'
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f'{minutes}:{seconds:02} min'
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02} h'


def _bytes(value: float) -> str:
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if abs(value) < 1024:
            return f'{value:.4g} {unit}'
        value /= 1024
    return f'{value:,.4g} TiB'


FORMATS = {
    'text': str,
    'percent': lambda value: f'{100 * value:.2f}%',
    'integer': lambda value: f'{round(value):,}',
    'number': lambda value: f'{value:,.0f}' if 1e4 <= abs(value) < 1e9 else f'{value:.4g}',
    'seconds': _seconds,
    'bytes': _bytes,
}


def _chart(section):
    registry.lookup(FORMATS, section['y'].get('format', 'number'), 'format')
    return charts.view(section)


def _images(section):
    images = [
        {
            'source': data_uri(image['pixels']),
            'caption': image['caption'],
            'small': max(np.shape(image['pixels'])[:2]) <= 96,
        }
        for image in section['images']
    ]
    return {'images': images, 'columns': section.get('columns', 8)}


def data_uri(pixels: np.ndarray) -> str:
    """uint8 `[H, W, C]`, C of 1, 3 or 4, as a PNG in a URI."""
    from PIL import Image

    pixels = np.asarray(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, 'PNG')
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _matrix(section):
    counts = np.asarray(section['counts'], np.int64)
    names = [str(name) for name in section['names']]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(names) > _MATRIX_CLASSES:
        return {'rows': None, 'pairs': _view(confused_pairs(names, counts, _MATRIX_PAIRS))}
    # The square root, as errors are few: 1% shows.
    levels = np.ceil(10 * np.sqrt(share)).astype(int)
    rows = [
        [{'count': int(n), 'level': int(level)} for n, level in zip(*pair, strict=True)]
        for pair in zip(counts, levels, strict=True)
    ]
    return {'rows': rows, 'names': names, 'numbers': len(names) <= 20}


def confused_pairs(names: Sequence[str], counts: np.ndarray, limit: int) -> Section:
    """A table of the pairs of classes that are taken for one another most often."""
    counts = np.array(counts, np.int64)
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind='stable')[:limit]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, counts.shape), strict=True)]
    rows = [
        [names[i], names[j], int(counts[i, j]), float(counts[i, j] / totals[i])]
        for i, j in pairs
        if counts[i, j]
    ]
    return {
        'kind': 'table',
        'title': 'Most confused',
        'columns': ['true', 'predicted as', 'images', 'share of the true'],
        'formats': ['text', 'text', 'integer', 'percent'],
        'rows': rows,
    }


def _nested(section):
    return {
        'sections': [_view(inner) for inner in section['sections']],
        'open': bool(section.get('open')),
    }


def figure(section: Section):
    """A chart section, or a row of them, as a matplotlib Figure in the colours of the page."""
    return charts.figure(_shown(section))


_VIEWS = {
    'text': _text,
    'table': _table,
    'chart': _chart,
    'images': _images,
    'matrix': _matrix,
    'row': _nested,
    'details': _nested,
}


def row(title: str, note: str, *sections: Section) -> Section:
    """Sections side by side."""
    return {'kind': 'row', 'title': title, 'note': note, 'sections': list(sections)}


def text(section: Section, width: int = 100) -> str:
    """A table for a terminal; columns that do not fit follow below, each time after the first one."""
    cells = [[printable(name) for name in section['columns']]] + [
        [printable(show(cell, kind)) for cell, kind in zip(row, section['formats'], strict=True)]
        for row in section['rows']
    ]
    columns = list(zip(*cells, strict=True))
    sizes = [max(map(cell_len, column)) for column in columns]
    blocks, start = [], 1
    while start < len(columns) or not blocks:
        end = start + 1
        while end < len(columns) and sizes[0] + sum(s + 2 for s in sizes[start : end + 1]) <= width:
            end += 1
        shown = [0, *range(start, min(end, len(columns)))]
        blocks.append('\n'.join(_line([(row[i], sizes[i]) for i in shown]) for row in cells))
        start = end
    title = [printable(section['title'])] if section['title'] else []
    return '\n'.join([*title, '\n\n'.join(blocks)])


def _line(cells) -> str:
    return '  '.join(text + ' ' * (size - cell_len(text)) for text, size in cells).rstrip()
