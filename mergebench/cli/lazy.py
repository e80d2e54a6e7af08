"""Commands that are made when they are asked for: typer takes milliseconds for every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import cache, partial
from typing import Any

import typer
from typer.main import get_command, get_command_from_info, get_command_name, get_group_from_info


@cache
def lazily(app: typer.Typer) -> Any:
    """What :func:`typer.main.get_command` makes of an app that has a callback, made once.

    Commands that are added to it later are not seen.

    Parameters
    ----------
    app : typer.Typer
    """
    found: Any = get_command(_bare(app))
    found.commands = _Commands(app)
    return found


def _bare(app: typer.Typer) -> typer.Typer:
    found = copy(app)
    found.registered_commands, found.registered_groups = [], []
    return found


class _Commands(Mapping[str, Any]):
    """The commands of an app by their names."""

    def __init__(self, app: typer.Typer) -> None:
        style: dict[str, Any] = {
            "pretty_exceptions_short": app.pretty_exceptions_short,
            "rich_markup_mode": app.rich_markup_mode,
        }
        self._makers: dict[str, Callable[[], Any]] = {
            _name(each): partial(get_command_from_info, each, **style)
            for each in app.registered_commands
        }
        for each in app.registered_groups:
            more = {"suggest_commands": app.suggest_commands}
            if not isinstance(each.name, str):
                raise TypeError("a group of commands needs a name where it is added")
            self._makers[each.name] = partial(_group, each, **style, **more)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _name(info: Any) -> str:
    found: str = info.name or get_command_name(info.callback.__name__)
    return found


def _group(info: Any, **style: Any) -> Any:
    app, info = info.typer_instance, copy(info)
    info.typer_instance = _bare(app)
    found: Any = get_group_from_info(info, **style)
    found.commands = _Commands(app)
    return found
