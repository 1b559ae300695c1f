"""A fake Hugging Face hub: the part of its HTTP protocol that downloads use."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

MAIN = "5546055f03398095e385d7dc625e636cc8910bf2"


@dataclass
class Repository:
    """A model on the hub with one commit, which is `main`."""

    folder: Path
    commit: str = MAIN
    gated: bool = False
    broken: bool = False
    listing: dict[str, Path] = field(default_factory=dict)
    """Files outside of the folder, by the names that the hub lists them under."""

    def files(self) -> dict[str, Path]:
        paths = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*")}
        return {n: p for n, p in paths.items() if p.is_file()} | self.listing


class Hub:
    """The hub on a free port. `requests` are method and path of every request."""

    def __init__(self, token: str = "hf_right") -> None:
        self.repositories: dict[str, Repository] = {}
        self.token = token
        self.requests: list[str] = []
        self.damaged: set[str] = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The names of the files downloaded so far."""
        return [
            s.split("/", 5)[-1] for s in self.requests if s.startswith("GET") and "/resolve/" in s
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+?))?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._fail(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

    def _api(self, repo: str, part: str | None, revision: str | None) -> None:
        repository = self._open(repo, revision)
        if not repository:
            return
        files = repository.files()
        if part == "tree":
            self._json([_entry(name, path) for name, path in sorted(files.items())])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json(
                {"id": repo, "modelId": repo, "sha": repository.commit, "siblings": siblings}
            )

    def _file(self, repo: str, revision: str, name: str) -> None:
        repository = self._open(repo, revision)
        if not repository:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._fail(403, "GatedRepo")
        elif name not in repository.files():
            self._fail(404, "EntryNotFound")
        else:
            content = repository.files()[name].read_bytes()
            entry = _entry(name, repository.files()[name])
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            if name in self.hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self._send(200, content, ETag=f'"{etag}"', X_Repo_Commit=repository.commit)

    def _open(self, repo: str, revision: str | None) -> Repository | None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            # As on the real hub, a missing model looks like a private one without a token.
            self._fail(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        elif repository.broken:
            self._fail(503, "")
        elif revision not in (None, "main", repository.commit):
            self._fail(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), Content_Type="application/json")

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", X_Error_Code=code, X_Error_Message="no")

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _entry(name: str, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if path.suffix in (".safetensors", ".bin"):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry
