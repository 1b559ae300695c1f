"""The README as data: its code blocks with the output they promise, and its generated tables.

A block of `sh` or `python` that is followed by a block of `text` is run by a test, and must print
that text, in which `...` stands for anything. Tables between `<!-- table: X -->` and `<!-- end -->`
come from the types: `make docs` writes them, a test compares them.
"""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from runners.config import (
    AccelerateConfig,
    BaseRunnerConfig,
    DeepSpeedConfig,
    EngineConfig,
    describe_fields,
)
from runners.image_config import ImageFields
from runners.mii_config import MIISection
from settings import describe_settings

README = Path(__file__).resolve().parents[2] / "README.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Example:
    """A code block and what it prints."""

    language: str
    code: str
    output: str


def examples() -> list[Example]:
    """The blocks that a test runs, in the README's order."""
    blocks = _BLOCK.findall(README.read_text(encoding="utf-8"))
    return [
        Example(language, code, output)
        for (language, code), (after, output) in itertools.pairwise(blocks)
        if language in ("sh", "python") and after == "text"
    ]


def commands(path: Path) -> list[tuple[str, str]]:
    """All blocks of `sh` of another document, and what each prints, empty if it does not say."""
    blocks = [*_BLOCK.findall(path.read_text(encoding="utf-8")), ("", "")]
    return [
        (code, output if after == "text" else "")
        for (language, code), (after, output) in itertools.pairwise(blocks)
        if language == "sh"
    ]


def with_tables(text: str) -> str:
    """The README with its tables as the types give them now."""
    tables = {
        "settings": describe_settings(),
        "common": describe_fields(BaseRunnerConfig),
        "images": describe_fields(ImageFields),
        "accelerate": describe_fields(AccelerateConfig, beyond=EngineConfig),
        "deepspeed": describe_fields(DeepSpeedConfig, beyond=EngineConfig),
        "mii": describe_fields(MIISection, name="mii.{}".format),
    }
    return _TABLE.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[4]}", text)


if __name__ == "__main__" and "--write" in sys.argv:
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
