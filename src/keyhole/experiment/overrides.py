"""``--set section.key=value``: one key of an audit file changed from the command line."""

from __future__ import annotations

import tomllib
from typing import Any

from keyhole.errors import ConfigError


def override(raw: dict[str, Any], change: str) -> None:
    """Apply ``section.key=value``; numbers in the path index lists, and the value is TOML or else a plain string.

    Where settings have a value of their own for the key, it is changed there too.
    """
    path, equals, text = change.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set '{change}' must be written as key=value, such as run.samples=4.")
    value = read_value(text)
    _apply(raw, path.strip(), value, change)
    settings = raw.get("settings", [])
    for setting in settings if isinstance(settings, list) else []:
        if _has(setting, path.strip().split(".")):
            _apply(setting, path.strip(), value, change)


def read_value(text: str) -> Any:
    """TOML, or else a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _has(here: Any, path: list[str]) -> bool:
    for part in path:
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict) and part in here:
            here = here[part]
        else:
            return False
    return True


def _apply(raw: Any, path: str, value: Any, change: str) -> None:
    here = raw
    *parents, last = path.split(".")
    for part in parents:
        here = _enter(here, part, change)
    if isinstance(here, list):
        here[_index(here, last, change)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise ConfigError(f"--set '{change}': there is no table at '{'.'.join(parents)}'.")


def _enter(here: Any, part: str, change: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, change)]
    if isinstance(here, dict):
        return here.setdefault(part, {})
    raise ConfigError(f"--set '{change}': '{part}' is inside a value that is no table.")


def _index(items: list[Any], part: str, change: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set '{change}': '{part}' must be a number below {len(items)} here.")
    return int(part)
