"""Logging of the HTTP worker and the ranks, set by `TRIPTYCH_LOG_LEVEL` and `TRIPTYCH_LOG_FORMAT`.

Every line has a time, level and logger, in a rank the rank, and the request id where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from typing_extensions import override

LEVEL, FORMAT = "TRIPTYCH_LOG_LEVEL", "TRIPTYCH_LOG_FORMAT"
LOGGER = "triptych"


def configure_logging(
    *, rank: int | None = None, request_id: Callable[[], str | None] = lambda: None
) -> None:
    """Send the lines of this process to stderr; safe to call twice.

    `request_id` gives the request that the calling code works for. In a rank the warnings of other
    libraries are formatted too; the HTTP worker's belong to BentoML.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if is_json() else _TextFormatter())
    handler.addFilter(_Context(rank, request_id))
    logger = logging.getLogger(LOGGER)
    logger.setLevel(os.environ.get(LEVEL, "").upper() or logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False
    if rank is not None:
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        logging.captureWarnings(True)


def is_json() -> bool:
    """Whether each line is a JSON object."""
    return os.environ.get(FORMAT, "").lower() == "json"


class _Context(logging.Filter):
    """Adds the rank and the request id to each record; a record's own request id stays."""

    def __init__(self, rank: int | None, request_id: Callable[[], str | None]) -> None:
        super().__init__()
        self._rank = rank
        self._request_id = request_id

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        fields: dict[str, Any] = {"rank": self._rank}
        fields["request_id"] = getattr(record, "request_id", None) or self._request_id()
        record.context = {name: value for name, value in fields.items() if value is not None}
        return True


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s%(suffix)s: %(message)s")

    @override
    def format(self, record: logging.LogRecord) -> str:
        context = getattr(record, "context", {})
        fields = ", ".join(f"{name} {value}" for name, value in context.items())
        record.suffix = f" [{fields.replace('request_id', 'request')}]" if fields else ""
        return super().format(record)


class _JsonFormatter(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "context", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
