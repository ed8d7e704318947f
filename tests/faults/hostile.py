"""Names of classes, files and fields that are markup, scripts, templates or commands of a terminal.

The report has the elements and attributes that it has of harmless names, and a terminal gets nothing but
text, newlines and the colours of `rich`.
"""

import collections
import contextlib
import html.parser
import io
import json
import random
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from rich.console import Console

import fake_runs
from jaxcls import console, main, results, terminal
from jaxcls.commands import common
from jaxcls.report import compare, page
from jaxcls.report import runs as report_runs

from .rows import Row

# What the attacks are made of; a string is one of these, or several with words between them.
PIECES = (
    '<script>alert(1)</script>', '<img src=x onerror=alert(1)>', '<svg/onload=alert(1)>',
    '</td></table><h1>', '"><b onmouseover="alert(1)', "' onfocus='alert(1)' autofocus='",
    '<a href="javascript:alert(1)">x</a>', 'javascript:alert(1)', '</script><script>', '<!--', '-->',
    ']]>', '<![CDATA[', '<?php', '&lt;b&gt;', '&#60;b&#62;', '</title></head><body onload=alert(1)>',
    '</style><style>*{display:none}', '<iframe srcdoc="<b>">', '<base href=//x>',
    '<meta http-equiv=refresh content=0>', '<details open ontoggle=alert(1)>',
    '<input autofocus onfocus=alert(1)>', '\x1b[31m', '\x1b[2J\x1b[H',
    '\x1b]8;;http://x\x07link\x1b]8;;\x07', '\x1b]52;c;cm0gLXJm\x07', '\x1b]0;title\x07', '\x1b[?1049h',
    '\x1bP+q544e\x1b\\', '\x9b31m', '\x9d52;c;eA==\x9c', '\x90q\x9c', '\r', 'ok\rjaxcls: all is well',
    '\b' * 9, '\x07', '\x7f', '\x00', '\x0c', '\x0b', '\x85', '\u2028', '\u202e', '\u2066', '\u200e',
    '\ufeff', '\u061c', '{{ 7 * 7 }}', '{% raw %}', '{# x #}', '{{ self.__init__.__globals__ }}',
    '{0.__class__}', '%(x)s', '%s%n', '${x}', '$(id)', '[bold]', '[/]', '[link=http://x]x[/link]',
    '[red]x', ':warning:', '\\', '\\[', '$\\frac{1}{2}$', '$x', '\udc80', '\ud800', '\udc9b31m',
    '../../etc/passwd', 'C:\\x', '; rm -rf x', '`id`', "'; DROP TABLE x; --", '=1+1', 'a\nb',
    '\n\njaxcls: ok', '\t', 'A' * 20_000, 'n' * 300 + '<b>', '\U000e0041', '\u0300' * 40, '日本', '-x',
)  # fmt: skip
_STYLE = re.compile(r'\x1b\[[0-9;]*m')
_NAMES = 10  # classes of a run
_DRAWN = 50  # pages with pictures, which take most of the time, are one for so many strings


def check(count: int, seed: int, directory: Path) -> str:
    """Puts `count` strings, drawn by the seed, in a run's every place and on the command line."""
    texts = _texts(count, seed)
    elements, lines = 0, 0
    with (
        contextlib.chdir(directory),
        mock.patch.object(common, 'start', lambda: None),
        mock.patch.object(warnings, 'formatwarning', terminal.warning_line),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter('always')
        for i in range(0, count, _NAMES):
            place = directory / str(i)
            elements += _check_report(texts[i:] + texts[:i], place, draws=i % _DRAWN == 0)
        for text in texts[:count]:
            lines += _check_terminal(text)
    for warning in caught:
        _check_clean(terminal.warning_line(warning.message), 'a warning')
    return f'{count} strings: {elements} elements of pages, {lines} texts for terminals'


def _texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    pieces = list(PIECES)
    rng.shuffle(pieces)
    texts = dict.fromkeys(pieces)
    while len(texts) < max(count, 2 * _NAMES):
        texts[
            rng.choice(['', 'cat ', 'x' * 300]).join(rng.choices(pieces, k=rng.randint(2, 4)))
        ] = None
    return list(texts)[: max(count, 2 * _NAMES)]


# Reports


class _Elements(html.parser.HTMLParser):
    """What a browser would make of a page: elements with the names of their attributes, and links."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.links = collections.Counter(), collections.Counter()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found[tag, tuple(sorted(name for name, _ in attributes))] += 1
        for name, value in attributes:
            if name in ('href', 'src') and not value.startswith('data:image/png;base64,'):
                self.links[name, value] += 1

    def handle_comment(self, data):
        self.found['comment'] += 1

    handle_decl = handle_pi = unknown_decl = handle_comment


def _check_report(texts: list[str], directory: Path, draws: bool) -> int:
    """Two runs full of the strings, reported and compared; the number of elements on the page."""
    plain = [f'plain{i}' for i in range(len(texts))]
    pages = []
    for name, names in (('hostile', texts), ('plain', plain)):
        place = directory / name
        runs = [_run(place / 'a', names), _run(place / 'b', names[5:] + names[:5])]
        undrawn = mock.patch.object(report_runs, '_write_pictures')
        with contextlib.nullcontext() if draws and name == 'hostile' else undrawn:
            shown = _printed(['report', *map(str, runs), f'--out={place / "out"}'])
        shown += _printed(['compare', *map(str, runs)])
        shown += _printed(['compare', *map(str, runs), '--json'])
        group = results.read(runs[0])
        for is_terminal in (False, True):
            out = io.StringIO()
            screen = Console(file=out, force_terminal=is_terminal, width=100)
            screen.print(console.result_table(group.members[0]))
            console.print_line(screen, f'in {runs[0]}')
            shown += _STYLE.sub('', out.getvalue()) if is_terminal else out.getvalue()
        shown += page.text(compare.table([group]))
        _check_clean(shown, f'{name} runs in {place}')
        pages.append((place / 'out' / 'report.html').read_bytes().decode())
    hostile, harmless = map(_Elements, pages)
    assert hostile.found == harmless.found, hostile.found - harmless.found
    assert hostile.links == harmless.links, hostile.links - harmless.links
    _check_clean(pages[0], f'the page in {directory}')
    return hostile.found.total()


def _run(parent: Path, texts: list[str]) -> Path:
    """A run of which every text is one of the strings."""
    data, more = dict(zip(('name', 'dir', 'train', 'validation'), texts, strict=False)), texts[4:]
    path = fake_runs.write(
        parent / _file_name(more[0]), 20, names=texts[:_NAMES], data=data, freeze=re.escape(more[1]),
        model={'name': 'lenet_small', 'init_from': more[2]},
    )  # fmt: skip
    known = {more[3] or 'x': more[4], 'command': ['jaxcls', *more[:3]], 'devices': [more[5]]}
    (path / 'environment.json').write_text(json.dumps(known))
    return path


def _file_name(text: str) -> str:
    """What a file system takes of a string: any bytes but slashes and zeros, 255 of them."""
    data = (
        text.replace('/', '_')
        .replace('\0', '')
        .encode('utf-8', 'surrogateescape' if '\ud800' not in text else 'replace')
    )
    return data[:200].decode('utf-8', 'surrogateescape').strip('.') or 'run'


# Terminals


def _check_terminal(text: str) -> int:
    """The string in each word of the command line, and in each thing that is printed."""
    word = text.replace('\0', '') or 'x'  # the system ends a word there
    lines = [
        [f'--config.data.name={word}'], [f'--config.{word}=1'], [f'--config={word}'], [word],
        ['evaluate', word], ['predict', word, word], ['compare', word], ['models', word],
        ['sweep', '--grid', word], ['sweep', '--setting', f'x{word}'], ['study', word],
        ['export-weights', word, word],
        [f'--config.model.activation={word}'], [f'--config.augment={word}'], [f'--config.freeze=({word}'],
    ]  # fmt: skip
    for argv in lines:
        _check_clean(_printed(argv, status=2), f'{argv}')
    section = {
        'kind': 'table', 'title': text, 'columns': [text, text], 'formats': ['text', 'text'],
        'rows': [[text, text]],
    }  # fmt: skip
    _check_clean(page.text(section), f'a table of {text!r}')
    _check_clean(terminal.warning_line(UserWarning(text)), f'a warning of {text!r}')
    for is_terminal in (False, True):
        out = io.StringIO()
        console.print_line(Console(file=out, force_terminal=is_terminal), text)
        _check_clean(out.getvalue(), f'a line of {text!r}')
    return len(lines) + 4


def _printed(argv: list[str], status: int = 0) -> str:
    """What a command prints, on streams as strict as a terminal's."""
    with _streams() as streams:
        try:
            found = main.main(argv)
        except SystemExit as error:  # of argparse
            found = error.code
    text = ''.join(stream.buffer.getvalue().decode() for stream in streams)
    assert found == status, f'{argv}: status {found}, {text!r}'
    return text


@contextlib.contextmanager
def _streams() -> Iterator[list[io.TextIOWrapper]]:
    streams = [io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in 'oe']
    with mock.patch.multiple(sys, stdout=streams[0], stderr=streams[1]):
        yield streams


def _check_clean(text: str, where: str):
    bad = {
        c for c in text if c != '\n' and unicodedata.category(c) in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp')
    }
    assert not bad - set('\u200c\u200d'), (
        f'{sorted(map(ascii, bad))} in {where[:300]}: {text[:300]!r}'
    )


ROWS = (
    Row(
        18,
        '{count} hostile names, paths and fields in reports and on terminals',
        check,
        full=200,
        share=10,
    ),
)
