"""The documentation as data: code blocks with their expected output, and generated tables.

A block of `sh` or `python` that is followed by a block of `text` is run by a test and must print
that text, in which `...` stands for anything. In `GUIDES` the block with `bentoml serve` names the
settings of the server that the blocks after it need. Tables between `<!-- table: X -->` and
`<!-- end -->` are generated from the types: `make docs` writes them, a test compares them.
"""

from __future__ import annotations

import doctest
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runners.config.base import BaseRunnerConfig, ImageConfig, TaskConfig, TextConfig
from runners.config.describe import describe_fields
from runners.config.engines import AccelerateConfig
from runners.config.mii import MIISection
from runners.config.model import DeepSpeedTextConfig
from settings import describe_settings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted(DOCS.glob("*.md")),
]
GUIDES = {"deploy.md", "mii.md", "torchserve.md"}
"""Pages whose commands need more than the demo server; each has its own test."""
DEMO_PAGES = [page for page in PAGES if page.name not in GUIDES]
"""Pages whose examples run against the demo models."""
MAIN_SETTINGS = (
    *("TEXT_MODEL", "IMAGE_MODEL", "TEXT_ENGINE", "TENSOR_PARALLEL", "MAX_BATCH_SIZE"),
    *("MAX_KV_TOKENS", "MAX_QUEUE", "REQUEST_TIMEOUT", "API_KEY", "LOG_LEVEL"),
)
"""The variables in the README."""
_URL = re.compile(r"http://127\.0\.0\.1:(3000|8080)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Example:
    """A code block and what it prints."""

    language: str
    code: str
    output: str

    def check(self, *, url: str, cwd: Path, env: Mapping[str, str]) -> None:
        """Run it with the server at `url`. Raises: AssertionError if it prints anything else."""
        code = _URL.sub(url, self.code)
        run = (
            ["bash", "-euo", "pipefail", "-c"] if self.language == "sh" else [sys.executable, "-c"]
        )
        path = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        env = {**env, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        done = subprocess.run(
            [*run, code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        same = doctest.OutputChecker().check_output(
            self.output, done.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
        assert same, f"expected:\n{self.output}\nprinted:\n{done.stdout}"

    @property
    def serves(self) -> bool:
        """Whether it starts a server."""
        return "bentoml serve" in self.code

    @property
    def variables(self) -> dict[str, str]:
        """The variables of `NAME=VALUE ... bentoml serve . --port N`, which is all it may be."""
        *variables, bentoml, serve, target, option, _ = shlex.split(self.code)
        assert (bentoml, serve, target, option) == ("bentoml", "serve", ".", "--port")
        return dict(variable.split("=", 1) for variable in variables)


def blocks(page: Path) -> list[Example]:
    """All blocks of `sh` and `python`, in order; the output is empty if none follows."""
    matches = [*_BLOCK.findall(page.read_text(encoding="utf-8")), ("", "")]
    return [
        Example(language, code, output if after == "text" else "")
        for (language, code), (after, output) in itertools.pairwise(matches)
        if language in ("sh", "python")
    ]


def examples(page: Path = README) -> list[Example]:
    """The blocks that are followed by their output."""
    return [block for block in blocks(page) if block.output]


def guide(name: str) -> tuple[list[Example], Example, list[Example]]:
    """The examples of a guide before the block that serves, that block, and those after it."""
    parts = [e for e in blocks(DOCS / name) if e.output or e.serves]
    [index] = [i for i, example in enumerate(parts) if example.serves]
    return parts[:index], parts[index], parts[index + 1 :]


def commands(page: Path) -> list[tuple[str, str]]:
    """All blocks of `sh`, and what each prints, empty if it does not say."""
    return [(block.code, block.output) for block in blocks(page) if block.language == "sh"]


def with_tables(text: str) -> str:
    """A page with its tables as the types are now."""
    tables = {
        "settings": describe_settings(),
        "main_settings": _rows(describe_settings(), MAIN_SETTINGS),
        "common": describe_fields(BaseRunnerConfig),
        "text": describe_fields(TextConfig, without=BaseRunnerConfig),
        "images": describe_fields(ImageConfig, without=BaseRunnerConfig),
        "tasks": describe_fields(TaskConfig, without=BaseRunnerConfig),
        "accelerate": describe_fields(AccelerateConfig, without=BaseRunnerConfig),
        "deepspeed": describe_fields(DeepSpeedTextConfig, without=TextConfig),
        "mii": describe_fields(MIISection, name="mii.{}".format),
    }
    return _TABLE.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[4]}", text)


def _rows(table: str, variables: tuple[str, ...]) -> str:
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    by_name = {row.split("`")[1]: row for row in rows}
    return "\n".join(head + [by_name[f"TRIPTYCH_{name}"] for name in variables])


if __name__ == "__main__" and "--write" in sys.argv:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
