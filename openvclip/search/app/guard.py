"""What the app's server refuses: foreign pages, foreign names and addresses that no page needs."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Guard", "is_loopback"]

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Gradio has further addresses, which read files, fetch other sites or show what the server does.
# The pages of this app need these alone.
_PATHS = frozenset(
    {"/", "/config", "/favicon.ico", "/theme.css", "/manifest.json", "/robots.txt"}
    | {
        f"/gradio_api/{name}"
        for name in (
            *("app_id", "cancel", "info", "login_check", "queue/data", "queue/join", "reset"),
            *("startup-events", "theme.css", "upload", "upload_progress"),
        )
    }
)
_FOLDERS = ("/assets/", "/static/", "/media/", "/gradio_api/heartbeat/")
_UPLOAD = "/gradio_api/upload"
_MULTIPART = 100_000  # bytes of an upload that are not the file

# The page loads scripts, styles, fonts, pictures and videos from this server alone.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "form-action 'self'; base-uri 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Middleware that lets only the app's own requests through.

    Args:
        app: the ASGI application.
        local: whether the server listens on a loopback address. Then the name of the server in a
            request must be an IP address or ``localhost``: a foreign page could give its own name
            the address of this machine.
        upload_bytes: the greatest size of an upload.
    """

    def __init__(self, app: Any, *, local: bool, upload_bytes: int) -> None:
        self._app, self._local, self._upload_bytes = app, local, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if scope["type"] != "http":  # no page of this app opens a WebSocket
            await send({"type": "websocket.close", "code": 1008})
        elif refusal is not None:
            await _answer(send, *refusal)
        else:
            await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        path = scope["path"].removesuffix("/") or "/"
        if path not in _PATHS and not scope["path"].startswith(_FOLDERS):
            return 404, "There is nothing here."
        if self._local and not _is_own_name(headers.get(b"host", "")):
            return 403, (
                "This server answers to 127.0.0.1 and localhost. For another name, start "
                "'openvclip app' with --host."
            )
        if _is_foreign(scope.get("method", "GET"), headers):
            return 403, "Requests of other sites are refused."
        length = headers.get(b"content-length", "0")
        size = int(length) if length.isdecimal() else 0
        if path == _UPLOAD and size > self._upload_bytes + _MULTIPART:
            return 413, f"The file is larger than {self._upload_bytes:,} bytes."
        return None


def _is_foreign(method: str, headers: dict[bytes, str]) -> bool:
    """Return whether a page of another site makes a request. A link to this app is none."""
    site = headers.get(b"sec-fetch-site")
    if site is None:  # browsers send it to this machine and to https alone
        origin = headers.get(b"origin")
        own = headers.get(b"host", "").lower()
        return origin is not None and origin.lower().partition("://")[2] != own
    is_link = headers.get(b"sec-fetch-mode") == "navigate" and method in ("GET", "HEAD")
    return site in ("cross-site", "same-site") and not is_link


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is that of this machine alone.

    Args:
        host: the name or the address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_own_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in _NAMES]
            message = {**message, "headers": [*kept, *_HEADERS]}
        await send(message)

    return sent


_NAMES = {name for name, _ in _HEADERS}


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
