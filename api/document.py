"""`/docs.json`: the OpenAPI document of all routes, including those that BentoML itself serves."""

from __future__ import annotations

import functools
from typing import Any

from api.http.openapi import JSON, Operation, document, errors, ok
from api.native.operations import OPERATIONS as NATIVE
from api.openai.operations import OPERATIONS as OPENAI
from api.tasks.operations import OPERATIONS as TASKS
from api.torchserve.operations import OPERATIONS as TORCHSERVE
from runners.contracts.errors import RunnerUnavailable

DESCRIPTION = "Large Hugging Face models behind one typed API."

SERVER = [
    Operation(
        "get",
        "/readyz",
        "readyz",
        "Whether all models serve; 503 says what they are doing.",
        ok({"text/plain": str}) | errors(RunnerUnavailable),
    ),
    *(
        Operation(
            "get",
            f"/{name}",
            name,
            "503 once a model has failed for good, which only a new process can help.",
            ok({"text/plain": str}) | errors(RunnerUnavailable),
        )
        for name in ("livez", "healthz")
    ),
    Operation(
        "get",
        "/health",
        "health",
        "As `/readyz`, under the path of vLLM.",
        ok({}) | errors(RunnerUnavailable),
    ),
    Operation(
        "get", "/metrics", "metrics", "Prometheus metrics.", ok({"text/plain": str}) | errors()
    ),
    Operation("get", "/docs.json", "docs", "This document.", ok({JSON: dict[str, Any]}) | errors()),
    Operation(
        "get",
        "/schema.json",
        "schema",
        "The native routes, for BentoML's clients.",
        ok({JSON: dict[str, Any]}) | errors(),
    ),
    Operation("get", "/", "index", "A page to try the routes.", ok({"text/html": str}) | errors()),
]

OPERATIONS = [*NATIVE, *OPENAI, *TASKS, *TORCHSERVE, *SERVER]


@functools.cache
def openapi() -> bytes:
    """The document, as JSON."""
    return document(OPERATIONS, description=DESCRIPTION)
