"""Chart sections of a page: made complete and coloured for its script, or drawn with matplotlib."""

import json
import math
from typing import Any

import numpy as np

from jaxcls import registry

Section = dict[str, Any]
# Of the light scheme in page.css; each at least 4.5 : 1 on white, and apart for the colour-blind.
PALETTE = (
    '#0b62a4', '#bf4a00', '#007a5a', '#8e3f97', '#876300', '#00758a', '#b8286b', '#5c5c5c',
)  # fmt: skip
MARKERS = 'osD^vPX*'
_MUTED = '#767676'
_DASHES = {'dashed': '--'}


def view(section: Section) -> dict[str, Any]:
    """What the template shows of a chart: its JSON, the buttons of its legend and a label in words."""
    chart = _complete(section)
    legend = _legend(chart['series'])
    kinds = {series['style'] for series in chart['series']}
    names = ', '.join(series['name'] for series in chart['series'][:8])
    label = f'{"bar" if kinds == {"bar"} else "line"} chart of {chart["y"]["label"]}: {names}'
    return {'chart': _json(chart), 'legend': legend, 'label': label}


def _complete(section: Section) -> Section:
    """A chart with every optional field and the colour of each series; NaN and infinity are None."""
    x = {'label': '', 'log': False, 'categories': None, **section['x']}
    y = {'label': '', 'log': False, 'format': 'number', **section['y']}
    groups = dict.fromkeys(s.get('group') or s['name'] for s in section['series'])
    by_series = len(groups) == 1
    series, color = [], 0
    colors = {}
    for item in section['series']:
        key = item['name'] if by_series else item.get('group') or item['name']
        muted = bool(item.get('muted'))
        if not muted and key not in colors:
            colors[key] = color
            color += 1
        series.append({
            'name': item['name'],
            'group': item.get('group') or item['name'],
            'style': registry.lookup(_STYLES, item.get('style', 'line'), 'style'),
            'color': -1 if muted else colors[key],
            'x': _finite(item['x']),
            'y': _finite(item['y']),
            'half': _finite(item['half']) if item.get('half') is not None else None,
        })  # fmt: skip
    return {'title': section['title'], 'x': x, 'y': y, 'series': series}


_STYLES = {name: name for name in ('line', 'points', 'dashed', 'bar')}


def _finite(values) -> list[float | None]:
    values = (None if v is None else float(v) for v in values)
    return [v if v is not None and math.isfinite(v) else None for v in values]


def _legend(series: list[dict]) -> list[dict[str, Any]]:
    """Buttons: one a group, and one for each part that all groups have ('training', 'validation').

    Each names the `series` that it shows or hides.
    """
    groups = {}
    for i, item in enumerate(series):
        if _has_points(item):
            groups.setdefault(item['group'], []).append(i)
    if len(groups) == 1 or all(len(members) == 1 for members in groups.values()):
        shown = [i for members in groups.values() for i in members]
        return [{'name': series[i]['name'], 'series': [i], **_swatch(series[i])} for i in shown]
    buttons = [
        {'name': name, 'series': members, **_swatch(series[members[0]]), 'style': 'line'}
        for name, members in groups.items()
    ]
    parts = {}
    for name, members in groups.items():
        for i in members:
            part = series[i]['name'].removeprefix(name).strip(' ,:')
            parts.setdefault((part, series[i]['style']), []).append(i)
    shared = [p for p in parts.items() if p[0][0] and len(p[1]) > 1]
    return buttons + [
        {'name': part, 'series': members, 'style': style, 'color': None}
        for (part, style), members in shared
    ]


def _has_points(series) -> bool:
    """One without keeps its colour for the charts beside it, and is not drawn."""
    return any(y is not None for y in series['y'])


def _swatch(series) -> dict[str, Any]:
    return {'style': series['style'], 'color': series['color']}


def _json(value) -> str:
    """JSON that a script element can hold: no <, >, & or line separator of JavaScript."""
    text = json.dumps(value, allow_nan=False, separators=(',', ':'))
    for character in '<>&\u2028\u2029':
        text = text.replace(character, f'\\u{ord(character):04x}')
    return text


def figure(section: Section):
    """A chart section, or a row of them, as a matplotlib Figure in the colours of the page."""
    from matplotlib.figure import Figure

    sections = section['sections'] if section['kind'] == 'row' else [section]
    result = Figure(figsize=(6.5 * len(sections), 4.2), layout='constrained')
    for axes, chart in zip(
        result.subplots(1, len(sections), squeeze=False).flat, sections, strict=True
    ):
        _plot(axes, _complete(chart))
    return result


def _plot(axes, chart: Section):
    from matplotlib.ticker import PercentFormatter

    x, y = chart['x'], chart['y']
    scales = {True: 'log', False: 'linear'}
    axes.set(xscale=scales[bool(x['log'])], yscale=scales[bool(y['log'])])
    bars = [s for s in chart['series'] if s['style'] == 'bar']
    for series in filter(_has_points, chart['series']):
        _draw(axes, series, bars, _limits(chart))
    if x['categories']:
        names = x['categories']
        turn = {'rotation': 30, 'ha': 'right'} if sum(map(len, names)) > 60 else {}
        axes.set_xticks(range(len(names)), names, parse_math=False, **turn)
    if y['format'] == 'percent':
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(x['label'], parse_math=False)
    axes.set_ylabel(y['label'], parse_math=False)
    axes.set_title(chart['title'], loc='left', parse_math=False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)


def _draw(axes, series, bars, limits):
    i = series['color']
    color = _MUTED if i < 0 else PALETTE[i % len(PALETTE)]
    xs, ys = (np.array(series[key], float) for key in 'xy')
    half = np.array(series['half'] or [None] * len(ys), float)
    low, high = np.clip(ys - half, *limits), np.clip(ys + half, *limits)
    ends = np.abs([ys - low, high - ys])
    if series['style'] == 'bar':
        places = np.unique(np.concatenate([bar['x'] for bar in bars]))
        apart = np.diff(places).min(initial=np.inf) if len(places) > 1 else 1
        width = 0.8 * apart / len(bars)
        xs = xs + (bars.index(series) - (len(bars) - 1) / 2) * width
        axes.bar(xs, ys, width, color=color, label=series['name'])
        axes.errorbar(xs, ys, ends, fmt='none', ecolor='#222222', capsize=2)
        return
    points = series['style'] == 'points'
    style = {
        'color': color,
        'label': series['name'],
        # After all colours the markers move on by one, so that no pair comes twice.
        'marker': ''
        if i < 0 or (len(xs) > 40 and not points)
        else MARKERS[(i + i // len(PALETTE)) % len(MARKERS)],
        'markersize': 4,
        'linestyle': 'none' if points else _DASHES.get(series['style'], '-'),
    }
    if points:
        axes.errorbar(xs, ys, ends, capsize=2, **style)
        return
    axes.plot(xs, ys, **style)
    axes.fill_between(xs, low, high, color=color, alpha=0.15, lw=0)


def _limits(chart: Section) -> tuple[float, float]:
    """Where intervals end: at 0 and 1 where all values are shares, as in page.js."""
    values = [y for series in chart['series'] for y in series['y'] if y is not None]
    shares = chart['y']['format'] == 'percent' and all(0 <= y <= 1 for y in values)
    return (0, 1) if shares else (-math.inf, math.inf)
