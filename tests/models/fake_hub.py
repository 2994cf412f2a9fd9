"""A small Hugging Face Hub on this machine: models are uploaded, listed and downloaded."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_a_token"


@dataclass
class FakeHub:
    """The address of the Hub, its files by repository, and the requests that it got."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def sha(self, repo: str) -> str:
        content = sorted((n, hashlib.sha1(b).hexdigest()) for n, b in self.files[repo].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", X_Error_Code=code, X_Error_Message="not there")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[4:])
        elif len(parts) == 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[4])
        else:
            self._missing("EntryNotFound")

    def _info(self, repo: str, rest: list[str]) -> None:
        files = self.hub.files.get(repo)
        if files is None:
            return self._missing("RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", self.hub.sha(repo)):
            return self._missing("RevisionNotFound")
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            return self._json(entries)
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": repo, "sha": self.hub.sha(repo), "siblings": siblings})

    def _file(self, repo: str, name: str) -> None:
        files = self.hub.files.get(repo)
        if files is None:
            return self._missing("RepoNotFound")
        if name not in files:
            return self._missing("EntryNotFound")
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return self._send(200, files[name], ETag=etag, X_Repo_Commit=self.hub.sha(repo))

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while length := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path.endswith("/validate-yaml"):
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", X_Error_Message="Invalid token")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[-2:] == ["repos", "create"]:
            content = json.loads(body)
            repo = f"{content.get('organization') or 'somebody'}/{content['name']}"
            self.hub.files.setdefault(repo, {})
            return self._json({"url": f"{self.hub.address}/{repo}"})
        repo = "/".join(parts[2:4])
        if "preupload" in parts:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._json({"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
        address = f"{self.hub.address}/{repo}/commit/{self.hub.sha(repo)}"
        return self._json({"commitUrl": address, "commitOid": self.hub.sha(repo)})


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[FakeHub]:
    """Context manager in which huggingface_hub talks to a Hub on this machine."""
    from huggingface_hub import constants

    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
