"""What is printed holds no commands for the terminal."""

import io

import pytest
from rich.console import Console

from jaxcls import console, main, terminal


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('plain, 日本, ä, 😀', 'plain, 日本, ä, 😀'),
        ('\x1b[31mred\r\x9b0m\x7f', '\\x1b[31mred\\r\\x9b0m\\x7f'),
        ('a\u202eb\u2028\ufeff', 'a\\u202eb\\u2028\\ufeff'),
        ('\udc80', '\\udc80'),
        ('می\u200cخواهم a\xa0b', 'می\u200cخواهم a\xa0b'),
        ('a\nb', 'a\\nb'),
        ('', ''),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_an_escape(text, shown):
    assert terminal.printable(text) == shown


def test_lines_are_kept_where_they_are_wanted(capsys):
    terminal.say('a\nb\x1b')
    terminal.refuse('c\nd\x07')
    assert capsys.readouterr() == ('a\nb\\x1b\n', 'jaxcls: c\nd\\x07\n')
    assert terminal.warning_line(UserWarning('e\r')) == 'jaxcls: e\\r\n'


def test_a_line_is_printed_as_it_is(monkeypatch):
    out = io.StringIO()
    console.print_line(Console(file=out, width=20), '[bold]:warning: ' + 'x' * 40)
    assert out.getvalue() == '[bold]:warning: ' + 'x' * 40 + '\n'


def test_what_the_system_says_of_a_file_is_one_message(capsys):
    assert main.main(['evaluate', 'x' * 300]) == 2
    said = capsys.readouterr().err
    assert said.startswith('jaxcls: xxx') and 'File name too long. Check the path' in said
