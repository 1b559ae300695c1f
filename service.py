# mypy: disable-error-code="untyped-decorator"
"""The BentoML service: what it serves, its life, its native routes, and the mounted OpenAI routes.

Importing this module loads no model and neither torch nor transformers: the ranks do that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import bentoml
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from api.admission import Admission
from api.generation import TextModel
from api.metrics import RunnerMetrics, remove_files
from api.middleware import (
    ApiKeyMiddleware,
    BodyMiddleware,
    RequestContextMiddleware,
    UnknownRouteMiddleware,
)
from api.native import routes
from api.native.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    GenerateRequest,
    GenerateResponse,
    StreamRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from api.openai.app import create_app, serve_models
from api.served import Served
from api.tasks.model import TaskModel
from model_choice import chosen_runners, is_folder
from runners.contracts import Runner, RunnerState
from runners.errors import ConfigError, EngineUnavailable
from settings import Settings, get_settings, unknown_variables

logger = logging.getLogger("triptych")
logger.setLevel(logging.INFO)

TIMER_SLACK_S = 30.0
"""By how much our deadline precedes BentoML's timer, which knows the time to first byte only."""


class BuildArguments(BaseModel):
    """`bentoml build --arg text_model=TAG`: what a bento serves unless the environment says."""

    text_model: str = ""
    image_model: str = ""


def _settings() -> Settings:
    try:
        return get_settings()
    except ConfigError as error:
        raise SystemExit(f"triptych: {error}") from None


def _tracing() -> dict[str, Any]:
    """Spans cost 1 ms a request even if nobody collects them, so: none unless asked for."""
    configured = [os.environ.get(f"BENTOML_CONFIG_{kind}", "") for kind in ("OPTIONS", "OVERRIDES")]
    file = Path(os.environ.get("BENTOML_CONFIG", ""))
    if file.is_file():
        configured.append(file.read_text(encoding="utf-8"))
    asked_for = any("exporter_type" in text for text in configured)
    return {} if asked_for else {"tracing": {"excluded_urls": ".*"}}


settings = _settings()
arguments = bentoml.use_arguments(BuildArguments)
openai_app = create_app()


@bentoml.service(
    name="triptych",
    workers=1,
    http={"port": settings.port},
    traffic={"timeout": settings.request_timeout + TIMER_SLACK_S},
    **_tracing(),
)
@bentoml.asgi_app(openai_app)
class Triptych:
    """Large Hugging Face models behind one typed API."""

    if arguments.text_model and not is_folder(arguments.text_model):
        # Records the model in the bento, which is then built and pushed with it.
        text_model_in_bento = bentoml.models.BentoModel(arguments.text_model)

    def __init__(self) -> None:
        admission = Admission(settings.max_queue)
        runners = chosen_runners(_chosen_text_model(), settings)
        text = task = None
        if runners.text is not None:
            self.runner: Runner = runners.text
            text = TextModel(runners.text, admission)
        if runners.task is not None:
            self.runner = runners.task
            task = TaskModel(runners.task, admission)
        self.served = Served(text, task)
        self.metrics = RunnerMetrics(self.runner, admission)
        serve_models(openai_app, self.served)

    @bentoml.on_deployment
    @staticmethod
    def check_model() -> None:
        """Before any worker starts: stop with one sentence if there is nothing to serve."""
        if (ignored := unknown_variables()) is not None:
            logger.warning("%s", ignored)
        try:
            if settings.image_model or arguments.image_model:
                raise EngineUnavailable("image models are not part of this version of Triptych")
            chosen_runners(_chosen_text_model(), settings)
        except ConfigError as error:
            raise SystemExit(f"triptych: {error}") from None

    @bentoml.on_startup
    async def start(self) -> None:
        """Begin loading the model; `/readyz` tells when it is there."""
        await self.runner.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End the ranks."""
        await self.runner.stop()
        remove_files()

    async def __is_alive__(self) -> bool:
        """503 on `/livez` once the runner has given up for good: only a new process can help."""
        health = self.runner.health()
        if health.state is RunnerState.FAILED:
            raise HTTPException(503, f"{health.state}: {health.detail}")
        return True

    async def __is_ready__(self) -> bool:
        """503 on `/readyz`, with what the runner is doing, until it serves."""
        health = self.runner.health()
        if not health.ready:
            raise HTTPException(503, f"{health.state}: {health.detail}")
        return True

    async def __metrics__(self, collected: str) -> str:
        """The runner's state, appended to what BentoML collects for `/metrics`."""
        return collected + self.metrics.text()

    @bentoml.api
    @routes.answers
    async def generate(self, body: GenerateRequest, /) -> GenerateResponse:
        """Continue one prompt or several."""
        return await routes.generate(self.served.text, body)

    @bentoml.api
    async def generate_stream(
        self, body: StreamRequest, /, ctx: bentoml.Context
    ) -> AsyncGenerator[str, None]:
        """Continue one prompt and send the text as it grows, as server-sent events."""
        async for event in routes.generate_stream(self.served, body, ctx.response):
            yield event

    @bentoml.api
    @routes.answers
    async def tokenize(self, body: TokenizeRequest, /) -> TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await routes.tokenize(self.served.text, body)

    @bentoml.api
    @routes.answers
    async def detokenize(self, body: DetokenizeRequest, /) -> DetokenizeResponse:
        """The text of token ids."""
        return await routes.detokenize(self.served.text, body)


def _chosen_text_model() -> str:
    """The environment's choice, else the one made at build time, in the version of that time."""
    bento = _service().bento
    if settings.text_model or bento is None:
        return settings.text_model or arguments.text_model
    name = arguments.text_model.partition(":")[0]
    frozen = (str(model.tag) for model in bento.info.all_models if model.tag.name == name)
    return next(frozen, arguments.text_model)


def _service() -> Any:
    """Triptych as what its decorator, which has no types, made of it."""
    return Triptych


_service().add_asgi_middleware(RequestContextMiddleware, timeout=settings.request_timeout)
if settings.api_key is not None:
    _service().add_asgi_middleware(ApiKeyMiddleware, key=settings.api_key)
_service().add_asgi_middleware(BodyMiddleware, max_bytes=settings.max_body_bytes)
_service().add_asgi_middleware(UnknownRouteMiddleware)
