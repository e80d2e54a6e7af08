"""Commands that are made when they are asked for are those that typer makes at once."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.main import get_command

from mergebench.cli.lazy import lazily
from mergebench.cli.main import app


def described(group: Any) -> dict[str, Any]:
    """Everything below a group that users meet, in order."""
    return {
        name: (page(each), described(each) if hasattr(each, "commands") else None)
        for name, each in group.commands.items()
    }


def page(command: Any) -> Any:
    """All of a command that decides what it says and takes, but for its name in the program."""
    params = [
        (type(p), p.name, p.opts, p.default, p.help, p.hidden, p.required, p.envvar, p.is_eager)
        for p in command.params
    ]
    names = ("name", "help", "short_help", "epilog", "hidden", "deprecated", "no_args_is_help",
             "context_settings", "options_metavar", "rich_markup_mode")  # fmt: skip
    return params, [getattr(command, name) for name in names]


def test_as_typer_makes_them() -> None:
    whole, ours = get_command(app), lazily(app)
    found = described(ours)
    assert found == described(whole)
    assert list(found) == list(whole.commands)
    assert page(ours) == page(whole)


def test_names_are_those_of_typer() -> None:
    own = typer.Typer(callback=lambda: None)

    @own.command()
    def some_thing() -> None: ...

    assert list(lazily(own).commands) == list(get_command(own).commands) == ["some-thing"]
    own.add_typer(typer.Typer(name="group"))
    lazily.cache_clear()
    with pytest.raises(TypeError, match="needs a name"):
        lazily(own)
    lazily.cache_clear()


def test_one_is_made_and_once() -> None:
    made: list[str] = []
    own = typer.Typer(callback=lambda: None, invoke_without_command=True)

    class Noted(typer.core.TyperCommand):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(str(kwargs["name"]))
            super().__init__(*args, **kwargs)

    for name in ("one", "other"):
        own.command(name, cls=Noted)(lambda: None)
    for _ in range(2):
        assert lazily(own)(["other"], standalone_mode=False) is None
    assert made == ["other"]
