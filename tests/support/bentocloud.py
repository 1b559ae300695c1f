"""BentoCloud's REST API, as far as `bentoml push` and `bentoml deploy` speak it, on loopback.

A fake for tests. It validates requests with BentoML's schemas, and uploads by their order and
content. Its responses fit the schemas of BentoML's client.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.bentocloud_items import CLUSTER, USER, Item, Refused, envelope, read, resource
from tests.support.bentocloud_uploads import Blobs

TOKEN = "the-token-of-the-test"
Transport = Literal["proxy", "presigned", "multipart"]
Handler = Callable[[Request], Awaitable[Response]]
KINDS = ("bento", "model")


class BentoCloud:
    """A running fake. `transport` is the way of uploading that it asks the client for."""

    def __init__(self, folder: Path, transport: Transport = "proxy") -> None:
        self.transport: Transport = transport
        self.items: dict[tuple[str, str, str], Item] = {}
        self.deployments: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        """`METHOD path` of each request, in order."""
        self.stall: str | None = None
        """`bento` or `model`: uploads of that kind are never read to their end."""
        self.stalled = threading.Event()
        self._repositories: dict[tuple[str, str], dict[str, Any]] = {}
        self._blobs = Blobs(folder, lambda: self.url)
        config = uvicorn.Config(self._app(), host="127.0.0.1", port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    @property
    def url(self) -> str:
        """The address it listens on."""
        [server] = self._server.servers
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    @property
    def variables(self) -> dict[str, str]:
        """The variables that make `bentoml` use it."""
        return {"BENTO_CLOUD_API_ENDPOINT": self.url, "BENTO_CLOUD_API_KEY": TOKEN}

    def calls_to(self, method: str, ending: str) -> list[str]:
        """The calls of a method to paths that end with `ending`."""
        return [c for c in self.calls if c.startswith(f"{method} ") and c.endswith(ending)]

    def __enter__(self) -> BentoCloud:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the fake did not start"
        return self

    def __exit__(
        self,
        cls: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def _app(self) -> Starlette:
        routes = [
            Route("/api/v1/auth/current", self._guarded(self._user)),
            Route("/api/v1/current_org", self._guarded(self._organization)),
            Route("/blobs/{secret}", self._blob, methods=["PUT"]),
            Route("/api/v2/deployments", self._guarded(self._deploy), methods=["POST"]),
            Route("/api/v2/deployments/{name}", self._guarded(self._deployment), methods=["GET"]),
        ]
        for kind in KINDS:
            at = f"/api/v1/{kind}_repositories"
            for path, handler, methods in (
                ("", self._repository, ["POST"]),
                ("/{name}", self._repository, ["GET"]),
                (f"/{{name}}/{kind}s", self._item, ["GET", "POST"]),
                (f"/{{name}}/{kind}s/{{version}}", self._item, ["GET", "PATCH"]),
                (f"/{{name}}/{kind}s/{{version}}/upload", self._upload, ["PUT"]),
                (f"/{{name}}/{kind}s/{{version}}/{{action}}", self._action, ["PATCH"]),
            ):
                routes.append(Route(at + path, self._guarded(handler, kind), methods=methods))
        return Starlette(routes=routes)

    def _guarded(self, handler: Callable[..., Awaitable[Response]], *arguments: str) -> Handler:
        async def guarded(request: Request) -> Response:
            self.calls.append(f"{request.method} {request.url.path}")
            if request.headers.get("x-yatai-api-token") != TOKEN:
                return JSONResponse({"error": "unauthorized"}, 401)
            try:
                return await handler(request, *arguments)
            except Refused as refused:
                return JSONResponse({"error": str(refused)}, refused.status)

        return guarded

    async def _user(self, request: Request) -> Response:
        return JSONResponse(USER)

    async def _organization(self, request: Request) -> Response:
        return JSONResponse(resource("test", "organization", description=""))

    async def _repository(self, request: Request, kind: str) -> Response:
        if request.method == "POST":
            wanted = await read(request, f"Create{kind.title()}RepositorySchema")
            if (kind, wanted["name"]) in self._repositories:
                raise Refused(f"{kind} repository {wanted['name']} already exists")
            repository = resource(wanted["name"], f"{kind}_repository", **{f"latest_{kind}": None})
            self._repositories[kind, wanted["name"]] = repository | wanted
        else:
            wanted = request.path_params
        return JSONResponse(self._known(kind, wanted["name"]))

    def _known(self, kind: str, name: str) -> dict[str, Any]:
        if (kind, name) not in self._repositories:
            raise Refused("record not found", 404)
        return self._repositories[kind, name]

    async def _item(self, request: Request, kind: str) -> Response:
        name = request.path_params["name"]
        self._known(kind, name)
        if "version" not in request.path_params and request.method == "GET":
            items = [item.answer() for key, item in self.items.items() if key[:2] == (kind, name)]
            return JSONResponse(envelope(items[::-1][: int(request.query_params["count"])]))
        if request.method == "POST":
            wanted = await read(request, f"Create{kind.title()}Schema")
            key = (kind, name, wanted["version"])
            if key in self.items:
                raise Refused(f"{kind} {name}:{wanted['version']} already exists")
            self.items[key] = Item(kind, name, wanted, self.transport)
            return JSONResponse(self.items[key].answer())
        item = self._existing(request, kind)
        if request.method == "PATCH":
            item.wanted |= await read(request, f"Update{kind.title()}Schema")
        return JSONResponse(item.answer())

    def _existing(self, request: Request, kind: str) -> Item:
        key = (kind, request.path_params["name"], request.path_params["version"])
        if key not in self.items:
            raise Refused("record not found", 404)
        return self.items[key]

    async def _upload(self, request: Request, kind: str) -> Response:
        item = self._existing(request, kind)
        if self.transport != "proxy" or item.status != "uploading":
            raise Refused(f"{item.status}, by {self.transport}: no upload is expected here")
        if request.headers.get("content-type") != "application/octet-stream":
            raise Refused("the archive is not sent as application/octet-stream")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if self.stall == kind:
                self.stalled.set()
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
                return Response(status_code=499)
        item.take(bytes(data))
        return JSONResponse({})

    async def _action(self, request: Request, kind: str) -> Response:
        item, action = self._existing(request, kind), request.path_params["action"]
        match action:
            case "start_upload":
                item.status, item.archive = "uploading", None
            case "presign_upload_url" if self.transport == "presigned":
                return JSONResponse(item.answer(presigned_upload_url=self._blobs.presign(item)))
            case "presign_upload_url":
                pass
            case "start_multipart_upload":
                item.upload_id = self._blobs.start(item)
            case "presign_multipart_upload_url":
                part = await read(request, "PreSignMultipartUploadUrlSchema")
                url = self._blobs.presign_part(item, part["upload_id"], part["part_number"])
                return JSONResponse(item.answer(presigned_upload_url=url))
            case "complete_multipart_upload":
                parts = await read(request, "CompleteMultipartUploadSchema")
                self._blobs.complete(item, parts["upload_id"], parts["parts"])
            case "finish_upload":
                item.finish(await read(request, "FinishUploadSchema"))
            case _:
                raise Refused("record not found", 404)
        return JSONResponse(item.answer())

    async def _blob(self, request: Request) -> Response:
        self.calls.append("PUT blob")
        return await self._blobs.put(request)

    async def _deploy(self, request: Request) -> Response:
        wanted = await read(request, "CreateDeploymentSchema")
        name, _, version = wanted["bento"].partition(":")
        bento = self.items.get(("bento", name, version))
        if bento is None or bento.status != "success":
            raise Refused(f"bento {wanted['bento']} is not there")
        manifest = bento.wanted["manifest"]
        for tag in manifest["models"]:
            model = self.items.get(("model", *tag.split(":")))
            if model is None or model.status != "success":
                raise Refused(f"model {tag} of the bento is not there")
        if unknown := wanted["services"].keys() - {s["name"] for s in manifest["services"]}:
            raise Refused(f"the bento has no service {', '.join(sorted(unknown))}")
        if wanted["name"] in self.deployments:
            raise Refused(f"deployment {wanted['name']} already exists")
        config = {k: v for k, v in wanted.items() if k not in ("name", "bento", "dev")}
        repository = self._known("bento", name)
        target = resource("main", "deployment_target", creator=USER, config=config)
        target["bento"] = bento.answer(repository=repository)
        revision = resource("1", "deployment_revision", creator=USER, status="active")
        self.deployments[wanted["name"]] = resource(
            wanted["name"],
            "deployment",
            status="running",
            kube_namespace="test",
            creator=USER,
            cluster=CLUSTER,
            latest_revision=revision | {"targets": [target]},
            manifest={"dev": False},
            urls=[f"{self.url}/served/{wanted['name']}"],
        )
        return JSONResponse(self.deployments[wanted["name"]])

    async def _deployment(self, request: Request) -> Response:
        if (deployment := self.deployments.get(request.path_params["name"])) is None:
            raise Refused("record not found", 404)
        return JSONResponse(deployment)
