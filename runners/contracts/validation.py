"""Pydantic's validation errors as field and requirement, without the offending value."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from pydantic import ValidationError

REWORDED = {
    "extra_forbidden": "is not a known field",
    "model_type": "Input should be an object",
}
"""Error types whose messages speak of Python."""

_BRANCHES = ("str", "int")


class Problem(NamedTuple):
    """One thing that is wrong."""

    field: str
    """Dotted path, such as `messages.0.content`; empty for the whole value."""
    requirement: str


def problems_of(error: ValidationError, *, tags: Collection[str] = ()) -> list[Problem]:
    """The distinct problems in a validation error, in its order.

    `tags`: names of a tagged union's members, which pydantic puts into the path.
    """
    problems = []
    for details in error.errors(include_url=False, include_context=False, include_input=False):
        # Names of an untagged union's branches, such as `list[str]`, mean nothing to a user.
        path = [
            part
            for part in map(str, details["loc"])
            if re.fullmatch(r"[\w-]*", part) and part not in _BRANCHES and part not in tags
        ]
        message = REWORDED.get(details["type"]) or details["msg"].removeprefix("Value error, ")
        problems.append(Problem(".".join(path), message.partition(" after validation")[0]))
    return list(dict.fromkeys(problems))
