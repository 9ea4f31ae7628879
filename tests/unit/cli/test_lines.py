"""What typed and programmed lines mean."""

from __future__ import annotations

import io

import pytest

from chatserve.cli.lines import (
    COMMANDS,
    END_OF_MESSAGE,
    Command,
    ProgramLines,
    Question,
    help_text,
    is_open_block,
    parse,
    spellings,
    unknown_command_text,
)


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("", None),
        ("  \n", None),
        ("hello", Question("hello")),
        ("  indented", Question("  indented")),
        ("two\nlines\n", Question("two\nlines")),
        ("/exit", Command("exit")),
        ("/quit", Command("exit")),
        ("!!exit", Command("exit")),
        ("!!reset ", Command("reset")),
        ("/clear", Command("reset")),
        ("!!remove", Command("remove")),
        ("/undo", Command("remove")),
        ("/save my chat.json", Command("save", "my chat.json")),
        ("!!load  chat ", Command("load", "chat")),
        ("/system be brief", Command("system", "be brief")),
        ("/hlep", Command("hlep")),
        ("/usr/bin is what?", Command("usr/bin", "is what?")),
        (" /usr/bin is what?", Question("/usr/bin is what?")),
        (" !!important", Question("!!important")),
        ("!one mark", Question("!one mark")),
        ('"""quoted"""', Question("quoted")),
        ('"""\n/first\n\nsecond\n"""', Question("/first\n\nsecond")),
        ('"""unclosed\nblock', Question("unclosed\nblock")),
        ('say """x"""', Question('say """x"""')),
    ],
)
def test_meaning_of_a_typed_line(line: str, meaning: Command | Question | None) -> None:
    assert parse(line) == meaning


def test_a_program_has_only_fastchats_commands() -> None:
    assert parse("/exit", is_typed=False) == Question("/exit")
    assert parse('"""x"""', is_typed=False) == Question('"""x"""')
    assert parse("!!exit", is_typed=False) == Command("exit")


def test_all_of_fastchats_commands_are_known() -> None:
    names = {entry.name for entry in COMMANDS}
    assert {"exit", "reset", "remove", "regen", "save", "load"} <= names


def test_block_is_open_until_its_closing_quotes() -> None:
    assert is_open_block('"""')
    assert is_open_block('"""text')
    assert is_open_block('"""text\n""')
    assert not is_open_block('"""text\n"""')
    assert not is_open_block('""""""')
    assert not is_open_block('say """')


def test_help_names_every_spelling() -> None:
    assert all(name in help_text() for name in spellings())


def test_unknown_command_lists_the_known_and_guesses() -> None:
    text = unknown_command_text("regenn")
    assert "did you mean /regen?" in text
    assert all("/" + entry.name in text for entry in COMMANDS)
    assert "did you mean" not in unknown_command_text("xyzzy")


def test_programmed_messages_end_with_their_mark_and_are_echoed() -> None:
    source = io.StringIO(f"one\nmore{END_OF_MESSAGE}two{END_OF_MESSAGE}cut off")
    echo = io.StringIO()
    lines = ProgramLines(source, echo, "USER")
    assert lines.read() == "one\nmore"
    assert lines.read() == "two"
    with pytest.raises(EOFError):
        lines.read()
    assert echo.getvalue() == "[!OP:USER]: one\nmore\n[!OP:USER]: two\n"
