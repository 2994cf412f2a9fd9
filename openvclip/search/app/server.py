"""The server of the app."""

from __future__ import annotations

import os
import socket
import webbrowser
from collections.abc import Callable
from contextlib import closing
from typing import Any

from openvclip.errors import SearchError
from openvclip.search.app.answers import Answers, Limits
from openvclip.search.app.guard import Guard, is_loopback
from openvclip.search.app.interface import HEAD, build_interface, require_gradio, theme
from openvclip.search.app.media import MediaFiles, add_routes
from openvclip.search.app.style import APP_STYLE
from openvclip.search.index import Index

__all__ = ["DEFAULT_PORT", "build_app", "serve"]

DEFAULT_PORT = 7860
_PORTS = 100  # that are tried from the default port on


def build_app(
    index: Index, answers: Answers, files: MediaFiles, *, host: str, limits: Limits
) -> Any:
    """Return the ASGI application.

    Args:
        index: the index.
        answers: the answers.
        files: the files that the server may send.
        host: the address that the server listens on.
        limits: the limits.

    Raises:
        MissingDependencyError: Gradio is not installed.
    """
    gradio = require_gradio()
    from starlette.applications import Starlette

    app = Starlette()
    add_routes(app, files)
    # Uploads lie in the folder that is removed at the end; each component of the page notes it. No
    # other file leaves through Gradio: the guard refuses its addresses for files.
    os.environ["GRADIO_TEMP_DIR"] = str(files.upload_folder)
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # nothing is kept in the browser
    blocks = build_interface(index, answers, limits)
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[],
        max_file_size=limits.upload_bytes,
        show_error=False,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=APP_STYLE,
        head=HEAD,
    )
    # Gradio checks that the file of a request lies in the folder of uploads only in an app that is
    # launched. Without the check, a request could name any file of this machine.
    blocks.has_launched = True
    return Guard(app, local=is_loopback(host), upload_bytes=limits.upload_bytes)


def serve(
    index: Index,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: Limits | None = None,
    open_browser: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the app until it is interrupted.

    Args:
        index: the index.
        host: the address to listen on. The default is reached from this machine alone.
        port: the port; 0 for any free port. Default: the first free port from 7860 on.
        limits: the limits of uploads and results. Default: :class:`Limits`.
        open_browser: whether to open the page in the browser of this machine.
        ready: function that is called with the address when the server listens.

    Raises:
        SearchError: the address or the port can't be used.
        MissingDependencyError: Gradio is not installed.
    """
    require_gradio()
    import uvicorn

    listener = _listener(host, port)
    address = _address(host, listener.getsockname()[1])
    chosen = limits or Limits()
    files = MediaFiles(longest=max(30.0, chosen.clip_seconds))

    answers = Answers(index, files, chosen)
    with closing(listener), closing(files), closing(answers):
        app = build_app(index, answers, files, host=host, limits=chosen)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        server: Any = uvicorn.Server(config)
        begin = server.startup

        async def startup(sockets: Any = None) -> None:
            await begin(sockets=sockets)
            if not server.should_exit and ready is not None:
                ready(address)
            if not server.should_exit and open_browser:
                webbrowser.open(address)

        server.startup = startup
        server.run([listener])


def _listener(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on the port, or on the first free one from the default on."""
    ports = range(DEFAULT_PORT, DEFAULT_PORT + _PORTS) if port is None else (port,)
    reason: Exception | None = None
    for number in ports:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host.strip("[]"), number), family=family)
        except (OSError, OverflowError) as error:
            reason = error
            if isinstance(error, socket.gaierror):
                break
    asked = f"port {port}" if port is not None else f"ports {ports[0]} to {ports[-1]}"
    raise SearchError(
        f"The app can't listen on {host}, {asked}: {reason}. Choose a free --port, and for --host "
        "an address of this machine."
    ) from reason


def _address(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
