# mypy: disable-error-code="untyped-decorator"
"""The BentoML service: what it serves, its life, its native routes, and the mounted OpenAI routes.

Importing this module loads no model and neither torch nor transformers: the ranks do that.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Literal

import bentoml
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from api.app import create_app, serve_models
from api.http.admission import Admission
from api.http.async_tasks import TaskGateMiddleware
from api.http.context import current_request, current_request_id
from api.http.metrics import RunnerMetrics, remove_files
from api.http.middleware import (
    ApiKeyMiddleware,
    BodyMiddleware,
    RequestContextMiddleware,
    UnknownRouteMiddleware,
)
from api.http.task_results import choose_file, make_folder
from api.models.images import ImageModel
from api.models.served import Served
from api.models.tasks import TaskModel
from api.models.text import TextModel
from api.native import images, routes
from api.native.images import GenerateImageRequest, GenerateImageResponse
from api.native.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    GenerateRequest,
    GenerateResponse,
    StreamRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from model_choice import chosen_configs, chosen_runners, frozen_tag, is_folder
from runners.contracts.errors import ConfigError, ModelNotFound
from runners.contracts.runner import Runner, RunnerHealth, RunnerState
from runners.protocol.logs import configure_logging
from settings import Settings, get_settings, unknown_variables

logger = logging.getLogger("triptych.service")


class BuildArguments(BaseModel):
    """`bentoml build --arg text_model=TAG`: what a bento serves unless the environment says."""

    text_model: str = ""
    image_model: str = ""
    base_image: str = "triptych-base"
    """What its OCI image is made from: `deploy/Containerfile`, built under this name."""


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


def _demands() -> dict[str, Any]:
    """What a bento's models ask for, by their own configs: GPUs, and requests at a time."""
    built = (arguments.text_model, arguments.image_model)
    try:
        configs = list(chosen_configs(*built, settings, overriding=False).values())
    except ModelNotFound:  # which is told where the model is needed
        configs = []
    except ConfigError as error:
        raise SystemExit(f"triptych: {error}") from None
    gpus = sum(config.requested_gpus for config in configs)
    # BentoCloud hands out this many at once: BentoML's own default, for services with tasks, is 1.
    concurrency = sum(config.max_concurrency for config in configs) or settings.max_queue
    traffic = {"timeout": settings.timer, "concurrency": concurrency}
    return {"traffic": traffic} | ({"resources": {"gpu": gpus}} if gpus else {})


# The ranks place themselves on the GPUs there are; BentoML hides some and makes up missing ones.
os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")
settings = _settings()
arguments = bentoml.use_arguments(BuildArguments)
openai_app = create_app()
choose_file()


@bentoml.service(
    name="triptych",
    # Here, since a value of bentofile.yaml cannot be chosen at build time. deploy/setup_image.sh
    # installs the packages from pyproject.toml.
    image=bentoml.images.Image(
        base_image=arguments.base_image, python_version="3.11"
    ).build_include("pyproject.toml"),
    workers=1,
    http={"port": settings.port},
    **_demands(),
    **_tracing(),
)
@bentoml.asgi_app(openai_app)
class Triptych:
    """Large Hugging Face models behind one typed API."""

    # Records the models in the bento, which is then built and pushed with them.
    if arguments.text_model and not is_folder(arguments.text_model):
        text_model_in_bento = bentoml.models.BentoModel(arguments.text_model)
    if arguments.image_model and not is_folder(arguments.image_model):
        image_model_in_bento = bentoml.models.BentoModel(arguments.image_model)

    def __init__(self) -> None:
        configure_logging(request_id=current_request_id)
        runners = chosen_runners(_chosen("text"), _chosen("image"), settings)
        self.runners: list[tuple[Runner[Any, Any], Admission]] = []
        text = task = image = None
        if runners.text is not None:
            text = TextModel(runners.text, self._admitted(runners.text, settings.max_queue))
        if runners.task is not None:
            task = TaskModel(runners.task, self._admitted(runners.task, settings.max_queue))
        if runners.image is not None:
            limit = settings.max_image_queue
            image = ImageModel(runners.image, self._admitted(runners.image, limit, "pictures"))
        self.served = Served(text, task, image)
        self.metrics = RunnerMetrics(self.runners)
        serve_models(openai_app, self.served)

    def _admitted(self, runner: Runner[Any, Any], limit: int, *noun: str) -> Admission:
        admission = Admission(limit, *noun)
        self.runners.append((runner, admission))
        return admission

    @bentoml.on_deployment
    @staticmethod
    def check_model() -> None:
        """Before any worker starts: stop with one sentence if there is nothing to serve."""
        configure_logging()
        if (ignored := unknown_variables()) is not None:
            logger.warning("%s", ignored)
        try:
            chosen_runners(_chosen("text"), _chosen("image"), settings)
        except ConfigError as error:
            raise SystemExit(f"triptych: {error}") from None
        make_folder()

    @bentoml.on_startup
    async def start(self) -> None:
        """Begin loading the models; `/readyz` tells when they are there."""
        for runner, _ in self.runners:
            await runner.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End the ranks."""
        await asyncio.gather(*(runner.stop() for runner, _ in self.runners))
        remove_files()

    async def __is_alive__(self) -> bool:
        """503 on `/livez` once a runner has given up for good: only a new process can help."""
        self._refuse(lambda health: health.state is RunnerState.FAILED)
        return True

    async def __is_ready__(self) -> bool:
        """503 on `/readyz`, with what the runners are doing, until all of them serve."""
        self._refuse(lambda health: not health.ready)
        return True

    def _refuse(self, bad: Callable[[RunnerHealth], bool]) -> None:
        """503 that names the state of each runner whose health is bad."""
        told = [
            (runner.name, health) for runner, _ in self.runners if bad(health := runner.health())
        ]
        if told:
            # The name says something only where there is more than one.
            several = len(self.runners) > 1
            said = (f"{name}: " * several + f"{h.state}: {h.detail}" for name, h in told)
            raise HTTPException(503, "; ".join(said))

    async def __metrics__(self, collected: str) -> str:
        """The runners' state, appended to what BentoML collects for `/metrics`."""
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

    @bentoml.api
    @routes.answers
    async def generate_image(self, body: GenerateImageRequest, /) -> GenerateImageResponse:
        """Paint what a prompt says: a picture's file, or several pictures in JSON."""
        answer: GenerateImageResponse = await images.generate_image(self.served, body)
        return answer

    @bentoml.task
    @routes.answers
    async def generate_image_task(self, body: GenerateImageRequest, /) -> GenerateImageResponse:
        """As `/generate_image`, for work that outlasts a connection: submit, ask, fetch."""
        current_request().timeout = settings.task_timeout
        answer: GenerateImageResponse = await images.generate_image(self.served, body)
        return answer


def _chosen(kind: Literal["text", "image"]) -> str:
    """The environment's choice, else the one made at build time, in the version of that time."""
    chosen: str = getattr(settings, f"{kind}_model")
    built: str = getattr(arguments, f"{kind}_model")
    bento = _service().bento
    if chosen or bento is None:
        return chosen or built
    return frozen_tag(bento, built) or built


def _service() -> Any:
    """Triptych as what its decorator, which has no types, made of it."""
    return Triptych


_service().add_asgi_middleware(RequestContextMiddleware, timeout=settings.request_timeout)
if settings.api_key is not None:
    _service().add_asgi_middleware(ApiKeyMiddleware, key=settings.api_key)
_service().add_asgi_middleware(BodyMiddleware, max_bytes=settings.max_body_bytes)
_service().add_asgi_middleware(
    TaskGateMiddleware,
    route="/generate_image_task",
    check=lambda body: images.check_image_request(openai_app.state.served, body),
)
_service().add_asgi_middleware(UnknownRouteMiddleware)
