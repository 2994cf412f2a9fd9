"""A process that serves the app of an index, for the browser tests."""

from __future__ import annotations

import json
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
from openvclip.search.app.media import MediaFiles
from openvclip.search.app.server import build_app
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


def ask_for(path: str, results: str) -> None:
    """Ask the app for a file of this machine in place of an upload; write what came of it.

    Gradio leaves event loops open, so this runs in a process of its own.
    """
    from starlette.testclient import TestClient

    given: list[str] = []

    class Videos:
        path, videos = "/somewhere/library.ovx", ()

        def __len__(self) -> int:
            return 0

    limits, files = Limits(), MediaFiles()
    answer = answers.Answers(Videos(), files, limits)  # type: ignore[arg-type]
    answer.upload = lambda path, labels: given.append(path) or "done"  # type: ignore[method-assign,func-returns-value]
    app = build_app(Videos(), answer, files, host="127.0.0.1", limits=limits)  # type: ignore[arg-type]
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "a\nb"]
    ends: list[str] = []
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        config = client.get("/config").json()
        events = [d["id"] for d in config["dependencies"] if d["targets"] and len(d["inputs"]) == 2]
        for event in events:
            body = {"data": data, "fn_index": event, "session_hash": f"s{event}"}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
            lines = client.get(f"/gradio_api/queue/data?session_hash=s{event}").text.splitlines()
            ends += [line for line in lines if "process_completed" in line]
    copies = [str(file) for file in files.upload_folder.rglob("*.mp4")]
    files.close()
    Path(results).write_text(json.dumps([len(events), len(ends), given, copies]))
