"""The log of a server contains the lines of its ranks, each with time, level, logger and rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.models import write_model
from tests.support.processes import wait_until
from tests.support.server import Server

IGNORED = "no_repeat_ngram_size"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation config has a key without effect."""
    folder = write_model("llama", tmp_path_factory.mktemp("logs") / "llama")
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {IGNORED: 3}))
    return folder


def test_lines_of_ranks_have_time_level_logger_and_rank(folder: Path, bentoml_home: Path) -> None:
    pytest.importorskip("deepspeed")
    variables = {"TRIPTYCH_TEXT_ENGINE": "deepspeed", "TRIPTYCH_TENSOR_PARALLEL": "2"}
    with Server(bentoml_home, {"TRIPTYCH_TEXT_MODEL": str(folder)} | variables) as server:

        def ranks(level: str, text: str) -> list[str]:
            time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
            pattern = rf"^\[rank\d\]:{time} {level} triptych\.\w+ \[rank (\d)\]: .*{text}"
            return sorted(re.findall(pattern, server.log, re.M))

        wait_until(lambda: ranks("INFO", "split by") == ["0", "1"], 5, "both tell how they split")
        wait_until(lambda: ranks("WARNING", IGNORED) == ["0"], 5, "the warning is there")


def test_lines_of_ranks_are_json_if_the_workers_are(folder: Path, bentoml_home: Path) -> None:
    variables = {"TRIPTYCH_LOG_FORMAT": "json", "TRIPTYCH_TEXT_MODEL": str(folder)}
    with Server(bentoml_home, variables) as server:
        wait_until(lambda: IGNORED in server.log, 5, "the warning is there")
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    [warning] = [line for line in lines if IGNORED in line["message"]]
    assert (warning["level"], warning["rank"]) == ("WARNING", 0)
    assert warning["logger"].startswith("triptych")
    assert any("rank" not in line and line["logger"] == "triptych.host" for line in lines)
