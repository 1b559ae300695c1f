"""Fixtures of the HTTP tests."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.server import Server


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
