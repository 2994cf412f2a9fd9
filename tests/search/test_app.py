"""The app without a browser: what its server sends and refuses, and what it answers."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest
import torch

from openvclip.cli import main
from openvclip.errors import MissingDependencyError, SearchError
from openvclip.models.prediction import Prediction
from openvclip.models.timeline import Timeline
from openvclip.search import Moment
from openvclip.search.app import Limits, interface, server
from openvclip.search.app import answers as module
from openvclip.search.app.answers import Answers, labels_of
from openvclip.search.app.guard import Guard, is_loopback
from openvclip.search.app.media import MediaFiles, add_routes
from openvclip.search.app.player import clip_view
from openvclip.search.searching import SearchResult
from openvclip.video.checking import VideoChecker, check_video
from tests.forked import started
from tests.search.films import write_film

pytest.importorskip("av")
pytest.importorskip("PIL")
pytest.importorskip("starlette")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the server's libraries


class Library:
    """An index of given videos, whose results are in the order of the videos."""

    path = "/somewhere/library.ovx"

    def __init__(self, videos):
        self.videos = [str(path) for path in videos]
        self.calls = []

    def __len__(self):
        return 12


def search(library, query, k=10, *, negative=(), min_score=None):
    """Stands for search_index."""
    library.calls.append((query, k, list(negative), min_score))
    if query == "boom":
        raise ZeroDivisionError
    found = [Moment(path, 1.0, 3.0, 0.3, 2.0) for path in library.videos[:k]]
    if query == "nothing":
        return [SearchResult(query, [], 0.5, 0.2, 12)]
    return [SearchResult(query, found, min_score, 0.3, 12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    write_film(folder / "a.mp4", 6)
    write_film(folder / "b <i>.avi", 6, codec="mpeg4")
    (folder / "text.mp4").write_text("no video")
    (folder.parent / "outside.mp4").write_bytes((folder / "a.mp4").read_bytes())
    return folder


@pytest.fixture
def files():
    files = MediaFiles()
    yield files
    files.close()


@pytest.fixture
def library(folder):
    names = ("a.mp4", "b <i>.avi", "gone.mp4", "text.mp4")
    return Library([folder / name for name in names])


@pytest.fixture
def answers(library, files, monkeypatch):
    monkeypatch.setattr(module, "search_index", search)
    return Answers(library, files, Limits(clip_seconds=5.0))


@pytest.fixture
def client(files):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    app = Starlette()
    add_routes(app, files)
    guard = Guard(app, local=True, upload_bytes=1000)
    return TestClient(guard, base_url="http://127.0.0.1:7860")


def addresses(html, attribute):
    return [unescape(value) for value in re.findall(rf'\b{attribute}="(media/[^"]*)"', html)]


# --- what the server sends ---------------------------------------------------------------------


def test_results_are_sent_as_files_pictures_and_previews(answers, client, folder):
    html = answers.search("a horse")
    videos, posters = addresses(html, "src"), addresses(html, "poster")
    assert len(videos) == len(posters) == 2
    assert videos[0].endswith("#t=1.00,3.00")
    whole = client.get(f"/{videos[0].partition('#')[0]}")
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.content == (folder / "a.mp4").read_bytes()
    part = client.get(f"/{videos[0].partition('#')[0]}", headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    # browsers do not play MPEG-4 part 2 in AVI
    assert videos[1].startswith("media/preview/")
    preview = client.get(f"/{videos[1]}")
    assert preview.headers["content-type"] == "video/mp4"
    assert preview.content[4:8] == b"ftyp"
    assert client.get(f"/{videos[1]}", headers={"range": "bytes=0-3"}).status_code == 206
    for address in posters:
        answer = client.get(f"/{address}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.content[:2] == b"\xff\xd8"
    assert "The video file is missing." in html
    assert "The video can&#x27;t be read." in html
    assert "b &lt;i&gt;.avi" in html


def test_no_other_file_is_sent(files, client, folder):
    key = files.key(str(folder / "a.mp4"))
    forged = MediaFiles()  # with another secret
    outside = str(folder.parent / "outside.mp4")
    keys = [forged.key(outside), key[:-4], key + "AAAA", "x", "%00", "....", outside]
    keys += ["../../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd"]
    forged.close()
    for name in ("video", "poster", "preview"):
        for other in keys:
            answer = client.get(f"/media/{name}/{other}?t=1&start=0&end=1")
            assert answer.status_code == 404, other
            assert b"ftyp" not in answer.content
    assert client.get(f"/media/video/{key}").status_code == 200


def test_wrong_requests_are_answered(files, client, folder):
    key = files.key(str(folder / "a.mp4"))
    for query in ("t=x", "t=-1", "t=nan", "t=inf"):
        assert client.get(f"/media/poster/{key}?{query}").status_code == 422
    assert client.get(f"/media/preview/{key}?start=3&end=3").status_code == 422
    assert client.get(f"/media/preview/{key}?start=4&end=2").status_code == 422
    assert client.get(f"/media/poster/{files.key(str(folder / 'text.mp4'))}").status_code == 422
    assert client.get(f"/media/video/{files.key(str(folder / 'gone.mp4'))}").status_code == 404
    assert client.get(f"/media/video/{files.key(str(folder / 'b <i>.avi'))}").status_code == 415


def test_a_preview_has_a_greatest_length(folder, client):
    files = MediaFiles(longest=1.0)
    path, _ = files.preview(str(folder / "a.mp4"), 0.0, 5.0)
    import av

    with av.open(str(path)) as container:
        assert float(container.duration / av.time_base) == pytest.approx(1.0, abs=0.1)
    assert files.preview(str(folder / "a.mp4"), 0.0, 5.0)[0] == path
    files.close()
    assert not path.parent.exists()


# --- what the server refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/gradio_api/file=/etc/passwd", {}, 404),
        ("/gradio_api/file=https://example.org/", {}, 404),
        ("/gradio_api/proxy=https://example.org/", {}, 404),
        ("/gradio_api/runs", {}, 404),
        ("/gradio_api/vibe-code", {}, 404),
        ("/monitoring", {}, 404),
        ("/docs", {}, 404),
        ("/", {"host": "evil.example"}, 403),
        ("/", {"host": "127.0.0.1.evil.example:7860"}, 403),
        ("/config", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, 403),
        ("/media/poster/x", {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ("/gradio_api/upload", {"content-length": "200000000"}, 413),
    ],
)
def test_what_the_pages_do_not_need_is_refused(client, path, headers, status):
    answer = client.get(path, headers=headers)
    assert answer.status_code == status
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:1", "[::1]:7860", "192.168.0.4"])
def test_names_of_this_machine_are_answered(client, host):
    # 404 is the answer of the application: this one has no page
    assert client.get("/", headers={"host": host}).text == "Not Found"


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.4", "example.org", "")))


# --- what it answers ---------------------------------------------------------------------------


def test_a_search_passes_its_options_on(answers, library):
    answers.search("  a \n horse ", "a cow\n\n a car \n", 3.0, 0.25)
    assert library.calls == [("a horse", 3, ["a cow", "a car"], 0.25)]
    answers.search("a horse", k=1e6)
    answers.search("a horse", k=-5)
    assert [call[1] for call in library.calls[1:]] == [Limits().results, 1]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("", "Type what you are looking for"),
        ("   ", "Type what you are looking for"),
        ("nothing", "Nothing fits: the best moment has the score 0.200, below 0.5."),
        ("boom", "This did not work."),
        ("x" * 1001, "1001 letters"),
    ],
)
def test_every_query_has_an_answer(answers, query, text):
    html = answers.search(query)
    assert text in html
    assert html.startswith("<p")


def test_a_clip_and_its_labels():
    labels = ["a <b>", "c"]
    times = torch.tensor([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]], dtype=torch.float64)
    rows = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    prediction = Prediction("x.mp4", labels, torch.tensor([0.6, 0.4]), background={"no <i>": 0.0})
    html = clip_view("x <u>", "media/video/k", prediction, Timeline("x.mp4", labels, times, rows))
    assert not re.search(r"<(b>|i>|u>)", html.replace('<b class="ov-at"></b>', ""))
    assert 'data-seconds="4.000"' in html
    parts = re.findall(r'data-start="([\d.]+)" data-end="([\d.]+)"', html)
    assert parts == [("0.000", "1.500"), ("1.500", "4.000")]
    # the cells of a label cover the whole clip
    cells = re.findall(r'style="left:([\d.]+)%;width:([\d.]+)%', html)
    assert [float(left) for left, _ in cells] == [0.0, 37.5, 62.5] * 2
    assert sum(float(width) for _, width in cells) == pytest.approx(200.0)
    assert html.count("ov-won") == 3
    rejected = Prediction("x.mp4", labels, torch.tensor([0.6, 0.4]), rejected=True)
    html = clip_view("x", "", rejected, Timeline("x.mp4", labels, times, rows))
    assert "none of these" in html
    assert "<video" not in html


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a, b,c", ["a", "b", "c"]),
        ("a, b\nc", ["a, b", "c"]),
        (" a \r\n\r\nb\na", ["a", "b"]),
    ],
)
def test_labels(text, labels):
    assert labels_of(text) == labels


@pytest.mark.parametrize("text", ["", "a", "a\na", None, "\n".join(map(str, range(201)))])
def test_wrong_labels(text, answers, folder):
    with pytest.raises(SearchError, match="label"):
        labels_of(text)
    assert 'role="alert"' in answers.upload(str(folder / "a.mp4"), text)
    assert 'role="alert"' in answers.from_library(str(folder / "a.mp4"), text)


def test_videos_of_the_library(answers, library, folder):
    assert answers.library_path(library.videos[0]) == library.videos[0]
    assert answers.library_path("A.MP4") == library.videos[0]
    for name, text in (("nowhere", "no video of the index"), (".mp4", "3 videos of the index")):
        with pytest.raises(SearchError, match=text):
            answers.library_path(name)
    outside = str(folder.parent / "outside.mp4")
    assert "no video of the index" in answers.from_library(outside, "a\nb")
    assert "Choose a clip" in answers.from_library(None, "a\nb")
    assert "0:06.0 long; at most 0:05.0" in answers.from_library(library.videos[0], "a\nb")
    assert "no such file" in answers.from_library(library.videos[2], "a\nb")


def test_names_that_are_no_text_are_sent_as_text(files, folder, monkeypatch):
    monkeypatch.setattr(module, "search_index", search)
    names = ["bad\udcff.mp4", "new\nline.mp4", "ü 日本.mp4"]
    library = Library(folder / name for name in names)
    answers = Answers(library, files, Limits())
    try:
        sent = [
            answers.search("a"),
            answers.from_library("bad", "a"),
            answers.search("q\udcff" * 999),
        ]
    finally:
        answers.close()
    assert "bad\\udcff.mp4" in sent[0]
    choices = interface.library_choices(library.videos)
    json.dumps([sent, choices], ensure_ascii=False).encode()  # as Gradio sends it
    assert [answers.library_path(value) for _, value in choices] == library.videos


def test_uploads_are_checked_and_the_oldest_are_removed(library, files, folder, monkeypatch):
    """The browser test decodes an upload in another process, as the app does."""
    monkeypatch.setattr(VideoChecker, "check", lambda self, path: check_video(path))
    answers = Answers(library, files, Limits(upload_bytes=10_000_000, clip_seconds=60))
    text = files.upload_folder / "text.mp4"
    text.write_text("no video")
    assert "can&#x27;t be read as a video" in answers.upload(str(text), "a\nb")
    assert "Choose a clip" in answers.upload(None, "a\nb")
    small = Answers(library, files, Limits(upload_bytes=3))
    assert "larger than 3 bytes" in small.upload(str(text), "a\nb")
    others = [files.upload_folder / f"{i}.mp4" for i in range(8)]
    for path in others:
        path.touch()
        files.keep_upload(str(path))
    assert not text.exists()
    assert all(path.exists() for path in others)


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--max-upload", "0"], "--max-upload 0"),
        (["--max-seconds", "-1"], "--max-seconds -1"),
        ([], "library.ovx"),
    ],
)
def test_wrong_options_of_the_command(options, text, tmp_path, capsys):
    assert main(["app", str(tmp_path / "library.ovx"), *options]) == 2
    assert text in capsys.readouterr().err


def test_a_port_in_use_and_an_address_of_another_machine():
    with server._listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SearchError, match=f"port {port}"):
            server._listener("127.0.0.1", port)
    with pytest.raises(SearchError, match="an address of this machine"):
        server._listener("192.0.2.1", 0)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match=r"openvclip\[app\]"):
        interface.require_gradio()


def test_a_request_names_no_file_of_this_machine(folder, tmp_path):
    """A request can give any path in place of an uploaded file."""
    pytest.importorskip("gradio")
    from tests.search.app_server import ask_for

    outside, results = folder.parent / "outside.mp4", tmp_path / "results.json"
    log = tmp_path / "log"
    with started(ask_for, str(outside), str(results), log=log) as process:
        process.join()
    assert results.exists(), log.read_text()
    assert json.loads(results.read_text()) == [2, 2, [], []]
