"""The REST gateway of a deployment: MII's routes, in front of the load balancer.

A process that the supervisor starts. `POST /mii/{deployment_name}` takes `{"prompts": ...,
**generate kwargs}` and answers with a list of `{"generated_text", "prompt_length",
"generated_length", "finish_reason"}`. `GET /healthz` answers once the gateway listens. `GET
/terminate` ends the gateway: MII's client calls it after it has terminated the deployment.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import grpc
import grpc.aio
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request

from runners.engines.mii.deployment.client import Deployment
from runners.engines.mii.deployment.plan import DeploymentPlan
from runners.engines.mii.deployment.ports import LOOPBACK

STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
}


def _refuse_browsers(request: Request) -> None:
    """Refuse requests that a web page makes, which could otherwise end the gateway.

    Every browser sends one of these headers, and MII's client neither.
    """
    if "origin" in request.headers or request.headers.get("sec-fetch-site", "none") != "none":
        raise HTTPException(403, "requests of web pages are refused")


async def serve_gateway(plan: DeploymentPlan) -> None:
    """Serve until a client calls `/terminate`."""
    assert plan.rest_port is not None  # noqa: S101 - the supervisor starts no gateway without
    app = FastAPI(
        title=plan.name, docs_url=None, redoc_url=None, dependencies=[Depends(_refuse_browsers)]
    )
    config = uvicorn.Config(
        app, host=plan.rest_host, port=plan.rest_port, log_level="warning", access_log=False
    )
    server = uvicorn.Server(config)
    deployment = Deployment(LOOPBACK, plan.port)
    slots = asyncio.Semaphore(plan.rest_limit)

    @app.post(f"/mii/{plan.name}")
    async def generate(request: Request) -> list[dict[str, Any]]:
        content_type = request.headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != "application/json":
            raise HTTPException(415, "the body must be application/json")
        try:
            body = await request.json()
            prompts = body.pop("prompts")
            call = deployment.generate([prompts] if isinstance(prompts, str) else prompts, **body)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HTTPException(
                400, 'the body must be {"prompts": a text or a list of texts, ...}'
            ) from None
        async with slots:
            try:
                answer = await call
            except grpc.aio.AioRpcError as error:
                raise HTTPException(STATUS.get(error.code(), 500), error.details()) from None
        return [
            {
                "generated_text": reply.response,
                "prompt_length": reply.prompt_tokens,
                "generated_length": reply.generated_tokens,
                "finish_reason": reply.finish_reason,
            }
            for reply in answer.response
        ]

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    @app.get("/terminate")
    async def terminate() -> str:
        server.should_exit = True
        return "Shutting down RESTful API gateway server"

    await server.serve()
