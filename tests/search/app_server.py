"""A process that serves the app of an index, for the browser tests."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from examples.shapes.final_model import contract_of_final
from examples.shapes.model import create_model
from openvclip import VideoCLIP, expand_temporal_attention
from openvclip.search import Index
from openvclip.search.app import Limits, answers, serve
from openvclip.video import checking

UPLOAD_BYTES = 300_000
CLIP_SECONDS = 10.0


def shapes_clip() -> VideoCLIP:
    """The model of the index."""
    model, tokenizer = create_model()
    expanded = expand_temporal_attention(model)
    return VideoCLIP(expanded, tokenizer, contract=contract_of_final(expanded, 0.5))


class EarlyChecker(checking.VideoChecker):
    """Starts its process before the server has threads, as a fork.

    A process that is spawned at the first upload imports PyTorch again, for seconds.
    """

    def __init__(self, *, timeout: float) -> None:
        super().__init__(timeout=timeout)
        self._worker._start()


def serve_app(index: str, address: str) -> None:
    """Serve the app, and write its address to a file when it is ready."""

    def ready(text: str) -> None:
        Path(f"{address}.new").write_text(text)
        os.replace(f"{address}.new", address)

    checking.multiprocessing = SimpleNamespace(get_context=lambda _: get_context("fork"))  # type: ignore[attr-defined]
    answers.VideoChecker = EarlyChecker  # type: ignore[attr-defined,misc]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    limits = Limits(upload_bytes=UPLOAD_BYTES, clip_seconds=CLIP_SECONDS)
    serve(Index.open(index, shapes_clip()), port=0, limits=limits, ready=ready)
