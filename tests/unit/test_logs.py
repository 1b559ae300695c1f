"""The log lines of the HTTP worker and the ranks: formats, level, rank and request id."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from runners.hf.models import loading
from runners.protocol.logs import FORMAT, LEVEL, LOGGER, configure_logging

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


@pytest.fixture(autouse=True)
def _loggers_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (LEVEL, FORMAT):
        monkeypatch.delenv(variable, raising=False)
    root, logger = logging.getLogger(), logging.getLogger(LOGGER)
    handlers, root_level = root.handlers, root.level
    root.handlers = []  # a rank closes the handlers that it replaces, pytest's too
    yield
    root.handlers = handlers
    root.setLevel(root_level)
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    logging.captureWarnings(False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_has_time_level_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    logging.getLogger("triptych.service").info("hello %s", "world")
    [line] = lines(capsys)
    assert re.fullmatch(rf"{TIME} INFO triptych\.service: hello world", line)


def test_it_has_the_rank_and_the_request_where_there_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    current: list[str] = []
    configure_logging(rank=3, request_id=lambda: current[-1] if current else None)
    logger = logging.getLogger("triptych.rank")
    logger.warning("no request")
    logger.warning("its own", extra={"request_id": "a"})
    current.append("b")
    logger.warning("the current one")
    logger.warning("its own before the current one", extra={"request_id": "c"})
    suffixes = [re.sub(rf"{TIME} WARNING triptych\.rank ", "", line) for line in lines(capsys)]
    assert suffixes == [
        "[rank 3]: no request",
        "[rank 3, request a]: its own",
        "[rank 3, request b]: the current one",
        "[rank 3, request c]: its own before the current one",
    ]


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("", ["INFO", "WARNING", "ERROR"]),
        ("debug", ["DEBUG", "INFO", "WARNING", "ERROR"]),
        ("WARNING", ["WARNING", "ERROR"]),
        ("ERROR", ["ERROR"]),
    ],
)
def test_lines_below_the_level_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    level: str,
    logged: list[str],
) -> None:
    monkeypatch.setenv(LEVEL, level)
    configure_logging()
    logger = logging.getLogger("triptych.api")
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(number, "x")
    assert [line.split()[2] for line in lines(capsys)] == logged


def test_json_has_one_object_per_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FORMAT, "json")
    configure_logging(rank=0)
    logger = logging.getLogger("triptych.rank")
    logger.info("naïve\ntext", extra={"request_id": "r"})
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("failed")
    first, second = (json.loads(line) for line in lines(capsys))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", first.pop("time"))
    assert first == {
        "level": "INFO",
        "logger": "triptych.rank",
        "message": "naïve\ntext",
        "rank": 0,
        "request_id": "r",
    }
    assert second["message"] == "failed"
    assert second["exception"].endswith("ValueError: broken")


def test_a_rank_formats_the_warnings_of_libraries(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    configure_logging(rank=1)
    with loading("nothing"):
        pass
    # Diffusion pipelines have the process log errors only.
    caplog.set_level(logging.WARNING, "transformers")
    logging.getLogger("transformers").info("not this")
    logging.getLogger("transformers").warning("slow")
    warnings.showwarning("deprecated", UserWarning, "module.py", 1)
    slow, deprecated, *_ = lines(capsys)
    assert re.fullmatch(rf"{TIME} WARNING transformers \[rank 1\]: slow", slow)
    prefix = rf"{TIME} WARNING py\.warnings \[rank 1\]: "
    assert re.fullmatch(prefix + "module.py:1: UserWarning: deprecated", deprecated)


def test_the_worker_leaves_other_loggers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = list(logging.getLogger().handlers)
    configure_logging()
    assert logging.getLogger().handlers == handlers
    logging.getLogger("bentoml.access").warning("its own format")
    assert lines(capsys) == []


def test_a_second_call_does_not_repeat_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    configure_logging(rank=2)
    logging.getLogger("triptych").info("once")
    [line] = lines(capsys)
    assert line.endswith("INFO triptych [rank 2]: once")
