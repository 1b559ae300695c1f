"""Untrusted JSON and YAML files, read into keys and values.

Both formats have the same content: what YAML has beyond JSON is refused (aliases, which expand) or
read as text (its other types).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from runners.contracts.errors import ConfigError, reraise_as

MAX_DEPTH = 100
"""Below the recursion limits of pydantic and json; real configurations are far less deep."""


def read_object(path: Path, name: str | None = None) -> dict[str, Any]:
    """The keys and values of a YAML or a JSON file. Raises: ConfigError.

    `name` is what errors call the file; its path by default.
    """
    read = read_yaml if path.suffix in (".yaml", ".yml") else read_json
    return read(path, name)


def read_json(path: Path, name: str | None = None) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no file. Raises: ConfigError."""
    with reraise_as(ConfigError, f"{name or path} cannot be read as JSON"):
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            return {}
    return _checked(content, name or path, f"a JSON object, not {type(content).__name__}")


def read_yaml(path: Path, name: str | None = None) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises: ConfigError."""
    with reraise_as(ConfigError, f"{name or path} cannot be read as YAML"):
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506
        content = json.loads(json.dumps(content, default=str))
    return _checked(content, name or path, "keys and values")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            anchor = self.peek_event().anchor  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"an alias (*{anchor}) is not supported: write it out")
        return super().compose_node(parent, index)


def _checked(content: object, name: str | Path, expected: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must contain {expected}")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inside = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inside for v in values if isinstance(v, dict | list)]
    if level:
        raise ConfigError(f"{name} is nested more than {MAX_DEPTH} levels deep")
    return content
