"""Videos, pictures and short previews that the app's server sends, and the files it may send."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import os
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from openvclip.errors import VideoError, VideoNotFoundError
from openvclip.search.cards import Media
from openvclip.search.moments import Moment
from openvclip.search.posters import moment_poster, moment_preview, poster_time, preview_part
from openvclip.video.excerpts import StreamFacts, stream_facts
from openvclip.video.sources import is_url

__all__ = ["MediaFiles", "add_routes", "browser_kind"]

_FILES = 200  # previews that are kept
_UPLOADS = 8  # uploaded files that are kept
_WIDTH = 480  # pixels of a preview
_SECONDS = 30.0  # the longest preview of a result
_POSTERS = 1000

# Containers and codecs that all current browsers play. Other files are shown as previews.
_CODECS = {
    "video/mp4": ({"h264", "av1"}, ("mov", "mp4")),
    "video/webm": ({"vp8", "vp9", "av1"}, ("webm",)),
}


def browser_kind(path: str, facts: StreamFacts) -> str | None:
    """Return the media type of a video that browsers play, or ``None`` for other videos.

    Args:
        path: the file.
        facts: the container and the codec.
    """
    formats = facts.container.split(",")
    webm_name = path.lower().endswith(".webm")  # FFmpeg calls every Matroska file WebM too
    for kind, (codecs, containers) in _CODECS.items():
        if facts.codec not in codecs or not set(containers) & set(formats):
            continue
        if kind == "video/webm" and not webm_name:
            continue
        if facts.codec != "h264" or facts.pixel_format in ("yuv420p", "yuvj420p"):
            return kind
    return None


class MediaFiles:
    """The files that the server may send. A file has a key that only this object can make.

    A key holds the path and a signature with a secret of this process. So the server sends only
    files for which :meth:`key` was called: the videos of the results, and uploads.

    Args:
        longest: the longest preview, in seconds.
    """

    def __init__(self, longest: float = _SECONDS) -> None:
        self._secret = secrets.token_bytes(32)
        self._folder = Path(tempfile.mkdtemp(prefix="openvclip-app-"))
        self._previews: OrderedDict[tuple[Any, ...], Path] = OrderedDict()
        self._uploads: OrderedDict[str, Path] = OrderedDict()
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._decoding = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))
        self._number = 0
        self._longest = longest
        self._poster = lru_cache(_POSTERS)(self._make_poster)
        self._kind = lru_cache(_POSTERS)(_kind_of)

    def close(self) -> None:
        """Remove the previews and the uploads."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def upload_folder(self) -> Path:
        """The folder of uploads, which :meth:`close` removes."""
        folder = self._folder / "uploads"
        folder.mkdir(exist_ok=True)
        return folder

    # --- keys ----------------------------------------------------------------------------------

    def key(self, path: str) -> str:
        """Return the key of a file. From now on the server sends this file."""
        data = os.fsencode(path)
        return _text(self._sign(data) + data)

    def path(self, key: str) -> str:
        """Return the path of the file with this key.

        Raises:
            KeyError: no such key was made.
        """
        try:
            raw = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
        except (binascii.Error, ValueError):
            raise KeyError(key) from None
        signature, data = raw[:16], raw[16:]
        if not hmac.compare_digest(signature, self._sign(data)):
            raise KeyError(key)
        return os.fsdecode(data)

    def _sign(self, data: bytes) -> bytes:
        return hmac.new(self._secret, data, hashlib.sha256).digest()[:16]

    def keep_upload(self, path: str) -> None:
        """Keep an uploaded file until eight others came after it."""
        with self._lock:
            self._uploads[path] = Path(path)
            self._uploads.move_to_end(path)
            while len(self._uploads) > _UPLOADS:
                self._uploads.popitem(last=False)[1].unlink(missing_ok=True)

    # --- what is sent --------------------------------------------------------------------------

    def kind(self, path: str) -> str | None:
        """Return the media type if browsers play this file, otherwise ``None``.

        Raises:
            VideoError: the file can't be read.
        """
        return None if is_url(path) else self._kind(path, _version(path))

    def media(self, moment: Moment) -> Media:
        """Return the addresses of a result: its picture, and its file or a short preview."""
        key = quote(self.key(moment.path))
        try:
            kind = self.kind(moment.path)
        except VideoNotFoundError:
            return Media(note="The video file is missing.")
        except VideoError:
            return Media(note="The video can't be read.")
        poster = f"media/poster/{key}?t={poster_time(moment):.3f}"
        if kind is not None:
            part = f"#t={moment.start:.2f},{max(moment.end, moment.start + 0.1):.2f}"
            return Media(poster, f"media/video/{key}{part}", muted=False)
        start, end = preview_part(moment, min(_SECONDS, self._longest))
        return Media(poster, self._preview_address(key, start, end), note="A preview without sound")

    def whole(self, path: str, seconds: float) -> str:
        """Return the address of a video from its beginning to its end.

        Args:
            path: the file.
            seconds: its duration.

        Raises:
            VideoError: the file can't be read.
        """
        key = quote(self.key(path))
        if self.kind(path) is not None:
            return f"media/video/{key}"
        return self._preview_address(key, 0.0, seconds)

    @staticmethod
    def _preview_address(key: str, start: float, end: float) -> str:
        return f"media/preview/{key}?start={start:.3f}&end={end:.3f}"

    def poster(self, path: str, seconds: float) -> bytes:
        """Return the frame at a time as a JPEG file.

        Raises:
            VideoError: the video can't be read.
        """
        return self._poster(path, seconds, _version(path))

    def _make_poster(self, path: str, seconds: float, version: object) -> bytes:
        with self._decoding:
            return moment_poster(Moment(path, seconds, seconds, 0.0, seconds), width=_WIDTH).data

    def preview(self, path: str, start: float, end: float) -> tuple[Path, str]:
        """Return a file with a part of a video that browsers play, and its media type.

        Raises:
            VideoError: the video can't be read.
        """
        name = (path, start, end, _version(path))
        with self._making:  # a browser asks for parts of one preview at the same time
            file = self._previews.get(name)
            if file is None:
                with self._decoding:
                    moment = Moment(path, start, end, 0.0, (start + end) / 2)
                    made = moment_preview(
                        moment, width=_WIDTH, seconds=min(end - start, self._longest)
                    )
                self._number += 1
                file = self._folder / f"{self._number}.{made.kind.rpartition('/')[2]}"
                file.write_bytes(made.data)
                self._previews[name] = file
            self._previews.move_to_end(name)
            while len(self._previews) > _FILES:
                self._previews.popitem(last=False)[1].unlink(missing_ok=True)
        return file, f"video/{file.suffix[1:]}"


def add_routes(app: Any, files: MediaFiles) -> None:
    """Add the addresses of videos, pictures and previews to a Starlette application.

    Args:
        app: the ``starlette.applications.Starlette``.
        files: the files that the server may send.
    """
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response

    cached = {"cache-control": "private, max-age=3600"}

    def answered(make: Callable[[str, Request], Response]) -> Any:
        def answer(request: Request) -> Response:
            try:
                path = files.path(request.path_params["key"])
                return make(path, request)
            except KeyError:
                return PlainTextResponse("No such file in the index.", 404)
            except VideoNotFoundError:
                return PlainTextResponse("The video file is missing.", 404)
            except (ValueError, OSError):  # VideoError is a ValueError
                return PlainTextResponse("The video can't be read.", 422)

        async def route(request: Request) -> Response:
            return await run_in_threadpool(answer, request)

        return route

    def number(request: Request, name: str) -> float:
        value = float(request.query_params.get(name, "0"))
        if not 0 <= value < math.inf:
            raise ValueError
        return value

    def video(path: str, _: Request) -> Response:
        kind = files.kind(path)
        if kind is None:
            return PlainTextResponse("Browsers can't play this file.", 415)
        return FileResponse(path, media_type=kind, headers=cached)

    def poster(path: str, request: Request) -> Response:
        data = files.poster(path, number(request, "t"))
        return Response(data, media_type="image/jpeg", headers=cached)

    def preview(path: str, request: Request) -> Response:
        file, kind = files.preview(path, number(request, "start"), number(request, "end"))
        return FileResponse(file, media_type=kind, headers=cached)

    for name, make in (("video", video), ("poster", poster), ("preview", preview)):
        app.add_route(f"/media/{name}/{{key}}", answered(make), methods=["GET"])


def _kind_of(path: str, version: object) -> str | None:
    return browser_kind(path, stream_facts(path))


def _version(path: str) -> tuple[int, int] | None:
    """Return what changes when a file changes."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
