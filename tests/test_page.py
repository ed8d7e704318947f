import base64
import hashlib
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcls.errors import UserError
from jaxcls.report import charts, page

BAD = '</script><img src=x onerror=alert(1)>&"\'\u2028]]>{{ 7 * 7 }}'
SERIES = [
    {'name': f'{g} {part}', 'group': g, 'style': style, 'x': [1, 2], 'y': [0.5, y], 'half': [None, 0.1]}
    for g, y in (('a', 0.6), ('b', 0.7))
    for part, style in (('training', 'dashed'), ('validation', 'line'))
]  # fmt: skip
CHART = {
    'kind': 'chart', 'title': 'Curves', 'x': {'label': 'epoch'},
    'y': {'label': 'accuracy', 'format': 'percent'}, 'series': SERIES,
}  # fmt: skip
TABLE = {
    'kind': 'table', 'title': 'Metrics', 'columns': ['run', 'accuracy'],
    'formats': ['text', 'percent'], 'rows': [['a', {'mean': 0.5, 'half': 0.1, 'n': 3}], ['b', None]],
}  # fmt: skip
PIXELS = np.zeros((2, 3, 1), np.uint8)


class Parser(html.parser.HTMLParser):
    """The elements of a page, its visible text and its blocks of JSON."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text, self.blocks, self.inside = [], '', [], ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag
        if tag == 'script':
            self.blocks.append('')

    def handle_endtag(self, tag):
        self.inside = ''

    def handle_data(self, data):
        if self.inside == 'script':
            self.blocks[-1] += data
        elif self.inside != 'style':
            self.text += data


def sections_of(text):
    """Every kind of section with the same text in every place that takes text."""
    series = [
        {'name': text + s, 'group': text + s[:1], 'x': [0], 'y': [1.0]} for s in ('a1', 'a2', 'b1')
    ]
    axis = {'label': text, 'categories': [text]}
    table = {'columns': [text, text], 'formats': ['text', 'number'], 'rows': [[text, text]]}
    common = {'title': text, 'note': text}
    small, large = ([text] * n for n in (2, 41))
    return [
        {'kind': 'text', **common, 'paragraphs': [text]},
        {'kind': 'table', **common, **table},
        {'kind': 'chart', **common, 'x': axis, 'y': {'label': text}, 'series': series},
        {'kind': 'images', **common, 'images': [{'pixels': PIXELS, 'caption': text}], 'columns': 8},
        {'kind': 'matrix', **common, 'names': small, 'counts': [[1, 2], [3, 4]]},
        {'kind': 'matrix', **common, 'names': large, 'counts': np.ones((41, 41), int).tolist()},
        {'kind': 'row', **common, 'sections': [{'kind': 'table', **common, **table}]},
        {'kind': 'details', **common, 'sections': [{'kind': 'text', 'title': text, 'paragraphs': []}]},
    ]  # fmt: skip


def test_no_text_becomes_markup():
    bad, plain = (Parser(page.render(x, sections_of(x), subtitle=x)) for x in (BAD, 'x'))
    structure = [
        [(tag, sorted(attributes)) for tag, attributes in parsed.elements]
        for parsed in (bad, plain)
    ]
    assert structure[0] == structure[1]
    names = {name for _, attributes in bad.elements for name in attributes}
    assert not [name for name in names if name.startswith('on')]
    sources = [a['src'] for _, a in bad.elements if 'src' in a]
    assert len(sources) == 1 and sources[0].startswith('data:image/png;base64,')
    shown = BAD.replace('\u2028', '\\u2028')
    assert bad.text.count(shown) > 40
    chart = json.loads(bad.blocks[0])
    assert chart['title'] == chart['x']['categories'][0] == shown
    assert not re.search('[<>&\u2028]', bad.blocks[0])


def test_the_page_runs_only_its_own_script_and_loads_nothing():
    parsed = Parser(page.render('x', [CHART, TABLE]))
    [policy] = [a['content'] for _, a in parsed.elements if a.get('http-equiv')]
    digest = base64.b64encode(hashlib.sha256(parsed.blocks[-1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy
    links = [a[k] for tag, a in parsed.elements for k in ('src', 'href') if k in a]
    assert all(link.startswith(('#', 'data:')) for link in links)
    assert 'http' not in ''.join(parsed.blocks).replace('http://www.w3.org/2000/svg', '')


@pytest.mark.parametrize(
    ('cell', 'kind', 'expected'),
    [
        (0.99166, 'percent', '99.17%'),
        ({'mean': 0.99166, 'half': 0.0024, 'n': 5}, 'percent', '99.17% ± 0.24'),
        ({'mean': 0.99166, 'half': 0.000004, 'n': 5}, 'percent', '99.17% ± 0.0004'),
        ({'mean': 0.99, 'half': np.inf, 'n': 1}, 'percent', '99.00%'),
        ({'mean': 0.99, 'low': 0.98, 'high': 0.995}, 'percent', '99.00% (98.00 to 99.50)'),
        ({'mean': 0.02551, 'half': 0.0061234, 'n': 3}, 'number', '0.02551 ± 0.0061'),
        ({'mean': np.nan}, 'number', '–'),
        (None, 'percent', '–'),
        (float('inf'), 'seconds', '–'),
        ('never', 'seconds', 'never'),
        (61706, 'integer', '61,706'),
        (np.int64(3), 'integer', '3'),
        (0.000123456, 'number', '0.0001235'),
        (694784, 'number', '694,784'),
        (5.238, 'seconds', '5.24 s'),
        (3599.6, 'seconds', '1:00:00 h'),
        (754, 'seconds', '12:34 min'),
        (1536, 'bytes', '1.5 KiB'),
        (2**41, 'bytes', '2 TiB'),
    ],
)
def test_a_cell_is_written_in_its_format(cell, kind, expected):
    assert page.show(cell, kind) == expected


def test_cells_carry_the_number_that_they_are_sorted_by():
    rows = [['a', {'mean': 0.5, 'half': 0.1, 'best': True}], ['b', None]]
    parsed = Parser(page.render('x', [{**TABLE, 'rows': rows}]))
    cells = [a for tag, a in parsed.elements if tag == 'td' and 'number' in a.get('class', '')]
    assert [a.get('data-value') for a in cells] == ['0.5', None]
    assert 'best' in cells[0]['class'] and 'best' not in cells[1]['class']


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({**TABLE, 'kind': 'tabel'}, "Did you mean 'table'"),
        ({**TABLE, 'formats': ['text', 'percents']}, "Did you mean 'percent'"),
        ({**CHART, 'y': {'label': 'y', 'format': 'percents'}}, "Did you mean 'percent'"),
        ({**CHART, 'series': [{**SERIES[0], 'style': 'dash'}]}, "Did you mean 'dashed'"),
    ],
)
def test_an_unknown_kind_format_or_style_is_named(section, message):
    with pytest.raises(UserError, match=message):
        page.render('x', [section])


def test_series_of_a_group_are_coloured_alike_and_have_one_button():
    view = charts.view(CHART)
    chart = json.loads(view['chart'])
    assert [series['color'] for series in chart['series']] == [0, 0, 1, 1]
    buttons = {entry['name']: entry['series'] for entry in view['legend']}
    assert buttons == {'a': [0, 1], 'b': [2, 3], 'training': [0, 2], 'validation': [1, 3]}
    alone = charts.view({**CHART, 'series': SERIES[:2]})
    assert [entry['name'] for entry in alone['legend']] == ['a training', 'a validation']
    assert [series['color'] for series in json.loads(alone['chart'])['series']] == [0, 1]


def test_a_series_without_points_keeps_its_colour_and_has_no_button():
    empty = {'name': 'empty', 'x': [], 'y': []}
    others = [{'name': n, 'x': [1], 'y': [1]} for n in 'ab']
    chart = {**CHART, 'series': [others[0], empty, others[1]]}
    view = charts.view(chart)
    assert [entry['series'] for entry in view['legend']] == [[0], [2]]
    assert [entry['color'] for entry in view['legend']] == [0, 2]
    assert [line.get_label() for line in page.figure(chart).axes[0].lines] == ['a', 'b']


def test_what_is_not_finite_is_left_out_of_a_chart():
    series = {'name': 's', 'x': [1, 2, 3], 'y': [np.nan, None, 1], 'half': [np.inf, None, 0.1]}
    [drawn] = json.loads(charts.view({**CHART, 'series': [series]})['chart'])['series']
    assert drawn['y'] == [None, None, 1] and drawn['half'] == [None, None, 0.1]


def test_a_large_confusion_matrix_becomes_its_most_confused_pairs():
    counts = np.eye(1000, dtype=int) * 50
    counts[3, 7], counts[9, 8] = 25, 10
    names = [f'class {i}' for i in range(1000)]
    text = page.render('x', [{'kind': 'matrix', 'title': '', 'names': names, 'counts': counts}])
    assert len(text) < 60_000
    rows = page.confused_pairs(names, counts, 30)['rows']
    assert rows == [['class 3', 'class 7', 25, 25 / 75], ['class 9', 'class 8', 10, 10 / 60]]


def test_pictures_are_pngs_of_the_same_pixels():
    for channels in (1, 3):
        pixels = np.arange(6 * channels, dtype=np.uint8).reshape(2, 3, channels)
        data = base64.b64decode(page.data_uri(pixels).partition(',')[2])
        decoded = np.asarray(Image.open(io.BytesIO(data))).reshape(pixels.shape)
        np.testing.assert_array_equal(decoded, pixels)


def test_a_figure_draws_what_the_page_draws(tmp_path):
    bars = [
        {'name': f'$_{i}', 'style': 'bar', 'x': [0, 1], 'y': [0.9, 0.5], 'half': [0.3, 0.1]}
        for i in (0, 1)
    ]
    categories = {**CHART, 'x': {'label': 'x', 'categories': ['$a_b$', 'c']}, 'series': bars}
    figure = page.figure(page.row('', '', CHART, categories))
    lines, columns = figure.axes
    assert [line.get_color() for line in lines.lines] == [charts.PALETTE[i] for i in (0, 0, 1, 1)]
    assert [label.get_text() for label in columns.get_xticklabels()] == ['$a_b$', 'c']
    whisker = columns.collections[0].get_segments()[0]
    np.testing.assert_allclose(whisker[:, 1], [0.6, 1])  # an interval of a share ends at 1
    figure.savefig(tmp_path / 'figure.png')


def test_the_palette_is_that_of_the_style_sheet_and_reads_on_white():
    css = (Path(page.__file__).parent / 'templates' / 'page.css').read_text()
    light = re.findall(r'--c\d: (#\w+);', css.partition('@media')[0])
    assert tuple(light) == charts.PALETTE
    for color in charts.PALETTE:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5


def test_a_table_for_a_terminal_wraps_columns_and_escapes_control_characters():
    table = {
        **TABLE, 'title': 'T', 'columns': ['run', 'aaaa', 'bbbb'], 'formats': ['text'] * 3,
        'rows': [['日本', '\x1b[31m', 'c'], ['longer', 'd', 'e\n']],
    }  # fmt: skip
    assert page.text(table, 100) == (
        'T\n'
        'run     aaaa      bbbb\n'
        '日本    \\x1b[31m  c\n'
        'longer  d         e\\n'
    )  # fmt: skip
    narrow = page.text(table, 18).split('\n\n')
    assert len(narrow) == 2 and narrow[1].startswith('run     bbbb\n')
