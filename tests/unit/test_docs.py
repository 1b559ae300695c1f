"""The documentation agrees with the code: tables, the package tree, links, names, numbers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from runners.config.files import load_setup_config
from runners.contracts.errors import ConfigError
from settings import Settings, variable
from tests.support.readme import (
    DEMO_PAGES,
    DOCS,
    GUIDES,
    PAGES,
    README,
    ROOT,
    examples,
    guide,
    with_tables,
)

ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@ids
def test_tables_are_those_of_the_types(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: make docs"


def test_there_are_examples_of_all_kinds() -> None:
    code = "\n".join(example.code for page in DEMO_PAGES for example in examples(page))
    for part in ("curl ", "openai", "bentoml.SyncHTTPClient", "import_model"):
        assert part in code
    readme = "\n".join(example.code for example in examples(README))
    for part in ("curl ", "openai", "import_model"):
        assert part in readme
    assert all(guide(name)[0] for name in GUIDES - {"deploy.md"})


def test_the_index_has_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"({page.name})" not in index] == [
        "index.md"
    ]


def test_the_tree_is_that_of_the_folders() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"^## Packages\n\n```\n(.*?)^```$", text, re.M | re.S)
    assert tree is not None
    path: list[str] = []
    paths = []
    for line in tree[1].splitlines():
        name, _, description = line.strip().partition(" ")
        assert description.strip(), f"{name} has no description"
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], name]
        paths.append("".join(path))
    assert sorted(paths) == sorted([*_packages(), *_modules(), "docs/", "tests/"])


def _packages() -> list[str]:
    inits = [path for path in ROOT.rglob("__init__.py") if not _is_generated(path)]
    folders = [path.parent.relative_to(ROOT).as_posix() for path in inits]
    return [f"{folder}/" for folder in folders if folder.partition("/")[0] != "tests"]


def _modules() -> list[str]:
    return [path.name for path in ROOT.glob("*.py")]


def _is_generated(path: Path) -> bool:
    top = path.relative_to(ROOT).parts[0]
    return top.startswith(".") or top in ("build", "dist")


@ids
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@ids
def test_named_modules_files_and_variables_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python\s+-m\s+([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    for module in re.findall(r"\bimport ((?:runners|api)\.[\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    for path in re.findall(r"`((?:api|runners|tests|benchmarks|deploy)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    variables = {variable(field) for field in Settings.model_fields}
    assert set(re.findall(r"\bTRIPTYCH_[A-Z_]*[A-Z]\b", text)) <= variables


def test_named_metrics_exist() -> None:
    source = (ROOT / "api/http/metrics.py").read_text(encoding="utf-8")
    for page in PAGES:
        for name in re.findall(r"\btriptych_([a-z_]+)`", page.read_text(encoding="utf-8")):
            names = (name, name.removesuffix("_total"))
            declared = [n for n in names if re.search(rf'"(triptych_)?{n}"', source)]
            assert declared, f"{page.name}: triptych_{name}"


def test_the_numbers_of_the_readme_are_measured() -> None:
    section = re.search(r"^## Performance\n(.*?)^## ", README.read_text("utf-8"), re.M | re.S)
    assert section is not None
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    rows = [row for row in section[1].splitlines() if row.startswith("| ") and "---" not in row]
    numbers = [number for row in rows for number in re.findall(r"\d[\d.,]*", row)]
    assert len(numbers) >= 10
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]\d)", results), number


def test_the_error_for_a_field_of_another_task_is_the_documented_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "setup_config.json").write_text(json.dumps({"vae_tiling": True}))
    with pytest.raises(ConfigError) as caught:
        load_setup_config(tmp_path, name="model")
    assert f"\n{caught.value.message}\n" in (DOCS / "configuration.md").read_text("utf-8")
