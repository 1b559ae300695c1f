"""Requests that Schemathesis makes from the document, and its checks of the answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.document import openapi
from api.http.openapi import Operation

CONFORMANCE = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
DOCUMENT: dict[str, Any] = json.loads(openapi())
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)


class Client(Protocol):
    """A client of httpx, or a test client of Starlette."""

    base_url: Any

    def request(self, method: str, url: Any, *, headers: dict[str, str], content: Any) -> Any: ...


def check(client: Client, case: Case[Any], *, may_fail: bool = False) -> int:
    """Send a request and compare the answer with the document; returns its status."""
    sent = requests.Request(**case.as_transport_kwargs(str(client.base_url))).prepare()
    assert sent.method is not None
    headers = {name: str(value) for name, value in sent.headers.items()}
    answer = client.request(sent.method, str(sent.url), headers=headers, content=sent.body)
    checks = CONFORMANCE if may_fail else [not_a_server_error, *CONFORMANCE]
    case.validate_response(answer, checks=checks)
    return int(answer.status_code)


def statuses(
    operation: Operation,
    client: Client,
    known: Mapping[str, str],
    examples: int,
    body: Any = None,
) -> Counter[int]:
    """Check requests as the document has them, and wrong ones; the statuses of their answers.

    `known`: values of parameters that exist. `examples`: of each kind, at most. `body`: the first.
    """
    counts: Counter[int] = Counter()

    def count(case: Case[Any]) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # what is made up would be a 404
        counts[check(client, case)] += 1

    described = SCHEMA[operation.path][operation.method]
    path = {name: known[name] for name in re.findall(r"{(\w+)}", operation.path)}
    query = {name: known[name] for name in operation.query}
    strategies = []
    if operation.body:
        strategies += [described.as_strategy(mode, path_parameters=path) for mode in GenerationMode]
    if body is not None or not operation.body:
        media_type = "text/plain" if isinstance(body, str) else "application/json"
        sent = {} if body is None else {"body": body, "media_type": media_type}
        count(described.Case(path_parameters=path, query=query, **sent))
    if path:
        strategies.append(described.as_strategy(GenerationMode.POSITIVE))
    if query:
        strategies += [described.as_strategy(mode) for mode in GenerationMode]
    for strategy in strategies:
        hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=strategy)(count))()
    return counts
