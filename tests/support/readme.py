"""The documentation as data: code blocks with the output they promise, and generated tables.

A block of `sh` or `python` that is followed by a block of `text` is run by a test, and must print
that text, in which `...` stands for anything. In the guides one that runs `bentoml serve` is
followed by nothing, and serves what comes after it. Tables between `<!-- table: X -->` and
`<!-- end -->` come from the types: `make docs` writes them, a test compares them.
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
_URL = re.compile(r"http://127\.0\.0\.1:(3000|8080)")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Example:
    """A code block and what it prints."""

    language: str
    code: str
    output: str

    def check(self, *, url: str, cwd: Path, env: Mapping[str, str]) -> None:
        """Run it, with the server at `url`. Raises: AssertionError if it prints anything else."""
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
        assert same, f"promised:\n{self.output}\nprinted:\n{done.stdout}"

    @property
    def serves(self) -> bool:
        """Whether it starts a server."""
        return "bentoml serve" in self.code

    @property
    def variables(self) -> dict[str, str]:
        """Those of `NAME=VALUE ... bentoml serve . --port N`; it may do nothing else."""
        *chosen, bentoml, serve, target, option, _ = shlex.split(self.code)
        assert (bentoml, serve, target, option) == ("bentoml", "serve", ".", "--port")
        return dict(variable.split("=", 1) for variable in chosen)


def guide(name: str) -> tuple[list[Example], Example, list[Example]]:
    """The blocks of a guide in `docs/`: before the one that serves, that one, and after it."""
    found = examples(ROOT / "docs" / name)
    [place] = [i for i, example in enumerate(found) if example.serves]
    return found[:place], found[place], found[place + 1 :]


def examples(file: Path = README) -> list[Example]:
    """The blocks that a test runs, in the file's order."""
    blocks = _BLOCK.findall(file.read_text(encoding="utf-8"))
    found = [
        Example(language, code, output if after == "text" else "")
        for (language, code), (after, output) in itertools.pairwise(blocks)
        if language in ("sh", "python")
    ]
    return [e for e in found if e.output or (e.serves and file != README)]


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
        "text": describe_fields(TextConfig, without=BaseRunnerConfig),
        "images": describe_fields(ImageConfig, without=BaseRunnerConfig),
        "tasks": describe_fields(TaskConfig, without=BaseRunnerConfig),
        "accelerate": describe_fields(AccelerateConfig, without=BaseRunnerConfig),
        "deepspeed": describe_fields(DeepSpeedTextConfig, without=TextConfig),
        "mii": describe_fields(MIISection, name="mii.{}".format),
    }
    return _TABLE.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[4]}", text)


if __name__ == "__main__" and "--write" in sys.argv:
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
