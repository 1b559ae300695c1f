# mypy: disable-error-code="untyped-decorator"
"""The BentoML service: its models, its lifecycle, its native routes and the mounted app.

BentoML imports this module in the process of `bentoml serve` and in its worker. The import loads
no model, and neither torch nor transformers: the ranks do that.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any, cast

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from api.app import create_app, serve_models
from api.http.admission import Admission
from api.http.async_tasks import JobMiddleware, choose_result_store
from api.http.context import current_request, current_request_id
from api.http.metrics import RunnerMetrics, keep_in_memory
from api.http.middleware import (
    ApiKeyMiddleware,
    BentoErrorsMiddleware,
    BodyMiddleware,
    RequestContextMiddleware,
)
from api.http.processes import prepare_server, prepare_worker
from api.http.server import install, refuse_if_draining
from api.models.images import ImageModel
from api.models.served import ServedModels
from api.models.tasks import TaskModel
from api.models.text import TextModel
from api.native import images, routes
from api.native.images import GenerateImageRequest
from api.native.operations import TASK_ROUTE
from api.native.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    GenerateRequest,
    GenerateResponse,
    StreamRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from model_choice import Runners, chosen_configs, chosen_runners, frozen_tag, is_folder
from runners.contracts.errors import ConfigError, ModelNotFound
from runners.contracts.runner import Runner, RunnerState
from runners.protocol.folders import remove_process_folder
from runners.protocol.logs import configure_logging
from settings import Settings, get_settings, unknown_variables

logger = logging.getLogger("triptych.service")

ImageFile = Annotated[Path, bentoml.validators.ContentType("image/*")]
"""BentoML's clients store the answer in a file, whatever it is, and return the file's path."""


class BuildArguments(BaseModel):
    """`bentoml build --arg text_model=TAG`: a bento's models, if the environment names none."""

    text_model: str = ""
    image_model: str = ""
    base_image: str = "triptych-base"
    """The base of its OCI image: `deploy/Containerfile`, built under this name."""


def _settings() -> Settings:
    try:
        return get_settings()
    except ConfigError as error:
        raise SystemExit(f"triptych: {error}") from None


def _prepare_process() -> None:
    """Set what is read before BentoML calls any hook of the service."""
    # BentoML's metrics middleware makes its metrics before the service is created.
    keep_in_memory()
    # Ranks choose their GPUs themselves; BentoML would hide some and number missing ones.
    os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")
    try:
        choose_result_store()
    except OSError as error:
        raise SystemExit(f"triptych: the temporary folder cannot be used: {error}") from None
    install()


def _tracing() -> dict[str, Any]:
    """Options that turn tracing off unless an exporter is configured: spans cost 1 ms a request."""
    variables = ("BENTOML_CONFIG_OPTIONS", "BENTOML_CONFIG_OVERRIDES")
    texts = [os.environ.get(variable, "") for variable in variables]
    file = Path(os.environ.get("BENTOML_CONFIG", ""))
    if file.is_file():
        texts.append(file.read_text(encoding="utf-8"))
    has_exporter = any("exporter_type" in text for text in texts)
    return {} if has_exporter else {"tracing": {"excluded_urls": ".*"}}


def _resources() -> dict[str, Any]:
    """Options of GPUs and concurrency, as the configs of a bento's models request them."""
    models = (arguments.text_model, arguments.image_model)
    try:
        configs = list(chosen_configs(*models, settings, overriding=False).values())
    except ModelNotFound:  # reported when the model is served
        configs = []
    except ConfigError as error:
        raise SystemExit(f"triptych: {error}") from None
    gpus = sum(config.requested_gpus for config in configs)
    # BentoCloud sends a worker this many requests at a time; for a service with async tasks,
    # BentoML's default is 1.
    concurrency = (
        sum(config.max_concurrency for config in configs) if configs else settings.max_queue
    )
    traffic = {"timeout": settings.timer, "concurrency": concurrency}
    return {"traffic": traffic} | ({"resources": {"gpu": gpus}} if gpus else {})


# At import, because BentoML reads these variables and the decorator's options right after it.
_prepare_process()
settings = _settings()
arguments = bentoml.use_arguments(BuildArguments)
mounted_app = create_app()


@bentoml.service(
    name="triptych",
    # Here, since a value of bentofile.yaml cannot be chosen at build time. deploy/setup_image.sh
    # installs the packages from pyproject.toml.
    image=bentoml.images.Image(
        base_image=arguments.base_image, python_version="3.11"
    ).build_include("pyproject.toml"),
    workers=1,
    http={"port": settings.port},
    **_resources(),
    **_tracing(),
)
@bentoml.asgi_app(mounted_app)
class Triptych:
    """Large Hugging Face models behind one typed API."""

    # Records the models in the bento, so that they are built and pushed with it.
    if arguments.text_model and not is_folder(arguments.text_model):
        text_model_in_bento = bentoml.models.BentoModel(arguments.text_model)
    if arguments.image_model and not is_folder(arguments.image_model):
        image_model_in_bento = bentoml.models.BentoModel(arguments.image_model)

    def __init__(self) -> None:
        prepare_worker()
        configure_logging(request_id=current_request_id)
        runners = _create_runners()
        self.runners: list[tuple[Runner[Any, Any], Admission]] = []
        text = task = image = None
        if runners.text is not None:
            text = TextModel(
                runners.text,
                self._admission(runners.text, settings.max_queue),
                max_logprobs=settings.max_logprobs,
                aliases=settings.model_aliases,
            )
        if runners.task is not None:
            task = TaskModel(runners.task, self._admission(runners.task, settings.max_queue))
        if runners.image is not None:
            limit = settings.max_image_queue
            image = ImageModel(runners.image, self._admission(runners.image, limit, "images"))
        self.served = ServedModels(text, task, image)
        self.metrics = RunnerMetrics(self.runners)
        serve_models(mounted_app, self.served)

    def _admission(self, runner: Runner[Any, Any], limit: int, *noun: str) -> Admission:
        admission = Admission(limit, *noun)
        self.runners.append((runner, admission))
        return admission

    @bentoml.on_deployment
    @staticmethod
    def check_model() -> None:
        """Before any worker starts, exit with one sentence if the models cannot be served."""
        configure_logging()
        if (warning := unknown_variables()) is not None:
            logger.warning("%s", warning)
        try:
            _create_runners()
            prepare_server(_service().name)
        except ConfigError as error:
            raise SystemExit(f"triptych: {error}") from None

    @bentoml.on_startup
    async def start(self) -> None:
        """Begin to load the models; `/readyz` tells when they are ready."""
        # What is imported stays: a garbage collection that scans it stops all streams for 80 ms.
        gc.collect()
        gc.freeze()
        for runner, _ in self.runners:
            await runner.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End the ranks."""
        await asyncio.gather(*(runner.stop() for runner, _ in self.runners))
        remove_process_folder()  # uvicorn ends this process by a signal

    async def __is_alive__(self) -> bool:
        """503 on `/livez` once a runner has failed for good: only a new process can help."""
        self.served.refuse_if(lambda health: health.state is RunnerState.FAILED)
        return True

    async def __is_ready__(self) -> bool:
        """503 on `/readyz`, with the state of the runners, unless all of them are ready."""
        refuse_if_draining()
        self.served.refuse_if(lambda health: not health.ready)
        return True

    async def __metrics__(self, collected: str) -> str:
        """The state of the runners, appended to what BentoML collects for `/metrics`."""
        return collected + self.metrics.text()

    # BentoML derives its clients from the declared types; the methods return a `Response`.

    @bentoml.api
    @routes.handler
    async def generate(self, body: GenerateRequest, /) -> GenerateResponse:
        """Continue one prompt or several."""
        return await routes.generate(self.served.text, body)

    @routes.streamed
    @bentoml.api
    @routes.handler
    async def generate_stream(self, body: StreamRequest, /) -> AsyncGenerator[str, None]:
        """Continue one prompt and send the text as it grows, as server-sent events."""
        response = await routes.generate_stream(self.served.text, body)
        return cast(AsyncGenerator[str, None], response)

    @bentoml.api
    @routes.handler
    async def tokenize(self, body: TokenizeRequest, /) -> TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await routes.tokenize(self.served.text, body)

    @bentoml.api
    @routes.handler
    async def detokenize(self, body: DetokenizeRequest, /) -> DetokenizeResponse:
        """The text of token ids."""
        return await routes.detokenize(self.served.text, body)

    @bentoml.api
    @routes.handler
    async def generate_image(self, body: GenerateImageRequest, /) -> ImageFile:
        """Generate images from a prompt; returns one image as its file, several as JSON."""
        return cast(ImageFile, await images.generate_image(self.served, body))

    @bentoml.task(route=TASK_ROUTE)
    @routes.handler
    async def generate_image_task(self, body: GenerateImageRequest, /) -> ImageFile:
        """As `/generate_image`, as a job that outlasts a connection: submit, poll, fetch."""
        current_request().timeout = settings.task_timeout
        return cast(ImageFile, await images.generate_image(self.served, body))


def _create_runners() -> Runners:
    """Runners of the chosen models. Raises: ConfigError."""
    text = _choose(settings.text_model, arguments.text_model)
    image = _choose(settings.image_model, arguments.image_model)
    return chosen_runners(text, image, settings)


def _choose(model: str, built_model: str) -> str:
    """The environment's choice, else that of the build, in the version of the build."""
    bento = _service().bento
    if model or bento is None:
        return model or built_model
    return frozen_tag(bento, built_model) or built_model


def _service() -> Any:
    """Triptych as the service that its untyped decorator made of it."""
    return Triptych


if BentoMLContainer.http.cors.enabled.get():
    # BentoML's own is the innermost: the errors of those below would have no CORS headers.
    _service().add_asgi_middleware(CORSMiddleware, **BentoMLContainer.access_control_options.get())
_service().add_asgi_middleware(RequestContextMiddleware, timeout=settings.request_timeout)
if settings.api_key is not None:
    _service().add_asgi_middleware(ApiKeyMiddleware, key=settings.api_key)
_service().add_asgi_middleware(BodyMiddleware, max_bytes=settings.max_body_bytes)
_service().add_asgi_middleware(
    JobMiddleware,
    route=TASK_ROUTE,
    admit=lambda body: images.admit_image_request(mounted_app.state.served, body),
    max_result_bytes=settings.max_result_bytes,
    timeout=settings.task_timeout,
)
_service().add_asgi_middleware(BentoErrorsMiddleware)
