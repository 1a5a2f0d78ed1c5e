"""The settings of a project: the section ``[tool.zoho_orm_store]`` of its pyproject.toml."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer

from zoho_orm_store.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["PREFIX", "default_map", "read_settings"]

PREFIX = "ZOHO_ORM_STORE_"
"""What the environment variables begin with that stand for an option."""

_FILE = "pyproject.toml"
_SECTION = "tool.zoho_orm_store"
_TEXTS = ("url", "model", "lease-model", "table", "schema")
_KEYS = (*_TEXTS, "scope")
_HAS_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@|[?&]password=")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings in a folder, by the names of the parameters that they stand for.

    Raises:
        ConfigurationError: The section has an unknown key, or a value of the wrong kind.
    """
    try:
        text = (folder / _FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if "zoho_orm_store" not in text:
        return {}
    section = _parse(text).get("tool", {}).get("zoho_orm_store", {})
    settings: dict[str, Any] = {}
    for key, value in section.items():
        name = key.replace("_", "-")
        if name not in _KEYS:
            nearest = get_close_matches(name, _KEYS, 1)
            guess = f"Did you mean {nearest[0]!r}?" if nearest else f"Its keys: {', '.join(_KEYS)}."
            raise ConfigurationError(f"[{_SECTION}] in {_FILE} has no key {key!r}. {guess}")
        settings[name.replace("-", "_")] = _scope(value) if name == "scope" else _text(key, value)
    if _HAS_PASSWORD.search(settings.get("url", "")):
        typer.echo(
            f"Warning: the url in {_FILE} holds a password. Put the URL into the environment "
            f"variable {PREFIX}URL instead.",
            err=True,
        )
    return settings


def default_map(command: Any, settings: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """The settings as defaults of the commands whose options they stand for.

    Args:
        command: A group of commands; typer's type for it is not public.
        settings: The settings.
    """
    defaults: dict[str, Any] = {}
    for name, each in command.commands.items():
        if hasattr(each, "commands"):
            defaults[name] = default_map(each, settings)
        else:
            options = {param.name for param in each.params if _stands_for_setting(param)}
            defaults[name] = {key: settings[key] for key in settings.keys() & options}
    return defaults


def _stands_for_setting(param: Any) -> bool:  # noqa: ANN401
    return bool(param.envvar == f"{PREFIX}{param.name.upper()}")


def _parse(text: str) -> dict[str, Any]:
    try:
        toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError:
        raise MissingDependencyError("tomli", "cli") from None
    try:
        parsed: dict[str, Any] = toml.loads(text)
        return parsed
    except ValueError as error:
        raise ConfigurationError(f"{_FILE} cannot be read: {error}") from None


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{key!r} in [{_SECTION}] of {_FILE} must be a string, not {type(value).__name__}."
        )
    return value


def _scope(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{column}={each}" for column, each in value.items()]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise ConfigurationError(
        f"'scope' in [{_SECTION}] of {_FILE} must be a table such as {{ tenant_id = 7 }}."
    )
