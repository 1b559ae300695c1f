"""Markdown tables of settings, from their types."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from runners.config.base import DERIVED_FIELDS


def describe_fields(
    model: type[BaseModel],
    *,
    name: Callable[[str], str] = str,
    without: type[BaseModel] = BaseModel,
) -> str:
    """A Markdown table of a model's fields, defaults and meanings.

    `name` gives a field's name in the table; fields that `without` has are left out.
    """
    rows = ["| name | default | meaning |", "|---|---|---|"]
    return "\n".join(rows + _rows(model, name, without))


def _rows(
    model: type[BaseModel], name: Callable[[str], str], without: type[BaseModel]
) -> list[str]:
    rows = []
    for field, info in model.model_fields.items():
        if field in DERIVED_FIELDS or field in without.model_fields:
            continue
        if isinstance(info.default, BaseModel):  # a section: its fields, by their whole names
            prefix = name(field)
            rows += _rows(type(info.default), f"{prefix}.{{}}".format, BaseModel)
            continue
        default = "required" if info.is_required() else f"`{info.default}`"
        default = "" if info.default in (None, "", ()) else default
        rows.append(
            f"| `{name(field)}` | {default} | {' '.join((info.description or '').split())} |"
        )
    return rows
