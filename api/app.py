"""The FastAPI app of all routes but the native ones, which `service.py` mounts.

It has the OpenAI-compatible routes, those of the pipeline tasks, and TorchServe's.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.document import openapi
from api.http.errors import as_response
from api.http.json_pieces import json_response
from api.http.server import refuse_if_draining
from api.models.served import ServedModels
from api.openai.chat import create_chat_completion
from api.openai.completions import create_completion
from api.openai.images import ImageGenerationRequest, create_images
from api.openai.requests import ChatRequest, CompletionRequest
from api.openai.responses import Model, ModelList
from api.tasks.routes import ROUTES, TaskRoute
from api.torchserve.routes import add_routes
from runners.contracts.errors import ModelNotServed

STARTED = int(time.time())


def serve_models(app: FastAPI, served: ServedModels) -> None:
    """Set the app's models, which are created after the app."""
    app.state.served = served


def create_app() -> FastAPI:
    """The app, without its models."""
    # The document is `api.document`, not FastAPI's.
    app = FastAPI(title="Triptych", docs_url=None, redoc_url=None, openapi_url=None)
    # Starlette answers in plain text then, which `BentoErrorsMiddleware` replaces.
    del app.exception_handlers[HTTPException]

    @app.get("/docs.json")  # BentoML has this route too; the mounted app comes first
    @as_response
    async def openapi_document(request: Request) -> Response:
        """Describe all routes as OpenAPI."""
        content = await asyncio.to_thread(openapi)
        return Response(content, media_type="application/json")

    @app.post("/v1/completions")
    @as_response
    async def completions(request: Request) -> Response:
        """Continue prompts, as OpenAI's completions API."""
        body = CompletionRequest.parse(await request.body())
        return await create_completion(_served(request).text, body)

    @app.post("/v1/chat/completions")
    @as_response
    async def chat_completions(request: Request) -> Response:
        """Generate the next turn of a conversation, as OpenAI's chat API."""
        body = ChatRequest.parse(await request.body())
        return await create_chat_completion(_served(request).text, body)

    @app.post("/v1/images/generations")
    @as_response
    async def images(request: Request) -> Response:
        """Generate images from a prompt, as OpenAI's images API."""
        body = ImageGenerationRequest.parse(await request.body())
        return await create_images(_served(request).image, body)

    @app.get("/v1/models")
    @as_response
    async def list_models(request: Request) -> Response:
        """The served models."""
        return json_response(ModelList(data=_cards(_served(request))))

    @app.get("/v1/models/{model_id:path}")
    @as_response
    async def retrieve_model(request: Request, model_id: str) -> Response:
        """One of the served models."""
        for card in _cards(_served(request)):
            if card.id == model_id:
                return json_response(card)
        if (text := _served(request).text_model) is not None and text.has_name(model_id):
            return json_response(_cards(_served(request))[0])
        raise ModelNotServed("is not served here", field="model")

    @app.get("/health")
    @as_response
    async def health(request: Request) -> Response:
        """Whether all models serve, as `/readyz` tells, under the path of vLLM."""
        refuse_if_draining()
        _served(request).refuse_if(lambda health: not health.ready)
        return Response()

    for task, route in ROUTES.items():
        _add_task(app, task, route)
    add_routes(app)
    return app


def _add_task(app: FastAPI, task: str, route: TaskRoute) -> None:
    @as_response
    async def run_task(request: Request) -> Response:
        return json_response(await route.handle(_served(request), await request.body()))

    app.post(f"/tasks/{task}", name=task)(run_task)


def _served(request: Request) -> ServedModels:
    served: ServedModels = request.app.state.served
    return served


def _cards(served: ServedModels) -> list[Model]:
    cards = []
    for model in (served.text_model, served.task_model):
        if model is not None:
            length = model.info.max_model_len if model.info else None
            cards.append(Model(id=model.name, created=STARTED, max_model_len=length))
    if (image := served.image_model) is not None:
        cards.append(Model(id=image.name, created=STARTED))
    return cards
