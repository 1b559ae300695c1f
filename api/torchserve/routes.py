"""TorchServe's routes: `/predictions`, `/ping`, `/models`. `api.app` mounts them."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from api.http.errors import as_response
from api.models.served import ServedModels
from api.torchserve.bodies import read_body
from api.torchserve.models import describe, find, is_healthy, list_models
from api.torchserve.predictions import predict


def add_routes(app: FastAPI) -> None:
    """Add the routes to an app whose `state.served` has the models."""

    # curl -T sends PUT.
    @app.api_route("/predictions/{model_name}", methods=["POST", "PUT"])
    @as_response
    async def predictions(request: Request, model_name: str) -> Response:
        """Run a model on an input, as TorchServe's example handlers do."""
        return await _predict(request, model_name, None)

    @app.api_route("/predictions/{model_name}/{version}", methods=["POST", "PUT"])
    @as_response
    async def predictions_of_version(request: Request, model_name: str, version: str) -> Response:
        """The same, for a version of the model."""
        return await _predict(request, model_name, version)

    @app.api_route("/ping", methods=["GET", "HEAD"])
    @as_response
    async def ping(request: Request) -> Response:
        """Whether the models are served, or will be without help; `/readyz`: whether they are."""
        healthy = is_healthy(_served(request))
        status = {"status": "Healthy" if healthy else "Unhealthy"}
        return _json(status, 200 if healthy else 500)

    @app.get("/models")
    @as_response
    async def models(request: Request) -> Response:
        """The served models."""
        return _json(list_models(_served(request)))

    @app.get("/models/{model_name}")
    @as_response
    async def model(request: Request, model_name: str) -> Response:
        """The state of a model."""
        return _json([describe(find(_served(request), model_name))])

    @app.get("/models/{model_name}/{version}")
    @as_response
    async def model_of_version(request: Request, model_name: str, version: str) -> Response:
        """The state of a version of a model; `all`: of any version."""
        exact = None if version == "all" else version
        return _json([describe(find(_served(request), model_name, exact))])


async def _predict(request: Request, model_name: str, version: str | None) -> Response:
    model = find(_served(request), model_name, version)
    return await predict(model, await read_body(request), request.headers.get("accept", ""))


def _served(request: Request) -> ServedModels:
    served: ServedModels = request.app.state.served
    return served


def _json(content: Any, status: int = 200) -> Response:
    # Indented as TorchServe's: scripts search for `"status": "Healthy"`.
    return Response(json.dumps(content, indent=2) + "\n", status, media_type="application/json")
