"""The app and the page of results in a real browser, without any connection to elsewhere.

The browser is Debian's chromium, which playwright drives. Where one of them is missing, the tests
are skipped. ``SCREENSHOTS=FOLDER`` keeps pictures of the pages, to look at them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from openvclip.search import Index, Moment, WindowOptions
from openvclip.search.page import write_page
from tests.browser import Sight, browser, colour, needs_browser, sight
from tests.forked import started
from tests.search.app_server import UPLOAD_BYTES, serve_app, shapes_clip
from tests.search.films import write_film

pytest.importorskip("av")
pytest.importorskip("PIL")
if find_spec("gradio") is None:  # the process of the server alone imports it
    pytest.skip("the app needs gradio", allow_module_level=True)
pytestmark = needs_browser
__all__ = ["browser", "sight"]


@dataclass
class Server:
    """The app of an index, in another process.

    Attributes:
        folder: the videos.
        index: the index.
        address: the address of the page.
    """

    folder: Path
    index: Index
    address: str = ""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The videos a.mp4, b.avi and gone.mp4, of which the last is removed after the indexing."""
    folder = tmp_path_factory.mktemp("library")
    write_film(folder / "a.mp4", 8, size=(160, 96))
    write_film(folder / "b.avi", 3, codec="mpeg4")
    write_film(folder / "gone.mp4", 3)
    index = Index.create(folder / "library.ovx", shapes_clip(), windows=WindowOptions(2.0))
    index.add([folder / name for name in ("a.mp4", "b.avi", "gone.mp4")], progress=False)
    (folder / "gone.mp4").unlink()
    address, log = folder / "address", folder / "log"
    with started(serve_app, str(index.path), str(address), log=log) as process:
        end = time.monotonic() + 100
        while not address.exists():
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield Server(folder, index, address.read_text())
        assert process.is_alive(), log.read_text()
        assert "Traceback" not in log.read_text()


def search(seen: Sight, text: str) -> None:
    box = seen.page.locator("#query input, #query textarea")
    box.fill(text)
    box.press("Enter")


def plays_h264(page) -> bool:
    kind = 'video/mp4; codecs="avc1.4D401E"'
    return bool(page.evaluate(f"document.createElement('video').canPlayType('{kind}')"))


def test_type_see_results_and_play(server, sight):
    seen = sight(server.address)
    page = seen.page
    search(seen, "a horse")
    page.wait_for_selector(".ov-card")
    seen.shot("search-light")
    expected = server.index.search("a horse", k=12)
    names = page.locator(".ov-name").all_inner_texts()
    assert names == [Path(moment.path).name for moment in expected]
    scores = [float(text) for text in page.locator(".ov-score b").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert scores == [round(moment.score, 3) for moment in expected]
    assert page.get_by_text("The video file is missing.").count() == names.count("gone.mp4") > 0
    if not plays_h264(page):
        pytest.skip("this chromium plays no H.264")
    place = names.index("a.mp4")
    card = page.locator(".ov-card").nth(place)
    card.locator(".ov-play").click()
    video = card.locator("video")
    page.wait_for_function("v => v.currentTime > 0 && !v.seeking", arg=video.element_handle())
    at = video.evaluate("v => v.currentTime")
    assert expected[place].start - 0.1 <= at <= expected[place].end + 0.1
    # another result stops the first; the keyboard starts it
    other = page.locator(".ov-card").nth(names.index("b.avi"))
    other.locator(".ov-play").press("Enter")
    handle = other.locator("video").element_handle()
    page.wait_for_function("v => v.currentTime > 0", arg=handle)
    assert video.evaluate("v => v.paused")
    assert other.locator("video").evaluate("v => v.controls")
    seen.shot("search-playing")


def test_a_clip_of_the_library_and_the_position_in_its_timeline(server, sight):
    seen = sight(server.address, dark=True)
    page = seen.page
    page.get_by_role("tab", name="Labels over time").click()
    page.locator("#labels textarea").fill("a red circle\na blue square <b>\na green star")
    page.locator("#library input").fill("a.mp4")
    page.get_by_role("option", name="a.mp4").click()
    page.get_by_role("button", name="Show labels").locator("visible=true").click()
    page.wait_for_selector(".ov-clip")
    clip = page.locator(".ov-clip")
    prediction = server.index.model.classify(
        str(server.folder / "a.mp4"), ["a red circle", "a blue square <b>", "a green star"]
    )
    expected = [f"{value:.1%}" for _, value in prediction.top()]
    assert clip.locator(".ov-rows .ov-share").all_inner_texts() == expected
    assert clip.locator(".ov-best").inner_text() == prediction.label
    if not plays_h264(page):
        pytest.skip("this chromium plays no H.264")
    page.wait_for_function("document.querySelector('.ov-clip video').readyState > 0")
    track = clip.locator(".ov-track").first
    box = track.bounding_box()
    track.click(position={"x": 0.75 * box["width"], "y": 5})
    video = clip.locator("video")
    assert video.evaluate("v => v.currentTime") == pytest.approx(6.0, abs=0.2)
    left = clip.evaluate("c => parseFloat(c.style.getPropertyValue('--ov-at'))")
    assert left == pytest.approx(75, abs=3)
    video.evaluate("v => { v.muted = true; return v.play(); }")
    page.wait_for_function(
        f"parseFloat(document.querySelector('.ov-clip').style.getPropertyValue('--ov-at')) > {left}"
    )
    marker = clip.locator(".ov-at").first.bounding_box()["x"]
    assert marker > box["x"] + 0.7 * box["width"]
    clip.locator("[data-start]").first.click()
    assert video.evaluate("v => v.currentTime") < 6.0
    assert max(colour(page)) < 64
    seen.shot("labels-dark")


def test_uploads_in_a_narrow_window(server, sight, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "large.mp4").write_bytes(b"\0" * (UPLOAD_BYTES + 200_000))
    write_film(tmp_path / "long.mp4", 11)
    write_film(tmp_path / "good <b>.mp4", 4)
    seen = sight(server.address, width=360, height=780)
    page = seen.page
    page.get_by_role("tab", name="Labels over time").click()
    page.get_by_role("tab", name="Upload").click()
    page.locator("#labels textarea").fill("a red circle\na blue square")
    upload = page.locator("#upload input")
    upload.set_input_files(tmp_path / "large.mp4")
    page.get_by_text("exceed the maximum allowed size").wait_for()
    large = {
        "name": "large.mp4",
        "mimeType": "video/mp4",
        "buffer": b"\0" * (UPLOAD_BYTES + 200_000),
    }
    answer = page.request.post(f"{server.address}gradio_api/upload", multipart={"files": large})
    assert answer.status == 413
    for name, text in (
        ("bad.mp4", "can't be read as a video"),
        ("long.mp4", "at most 0:10.0 are labelled"),
        ("good <b>.mp4", "Over time"),
    ):
        page.get_by_label("Clear").locator("visible=true").first.click()
        upload.set_input_files(tmp_path / name)
        page.locator("#upload").get_by_text(name[:3]).first.wait_for()
        page.get_by_role("button", name="Show labels").locator("visible=true").click()
        page.locator("#clip").get_by_text(text).wait_for()
        seen.shot(f"upload-{name[:3]}")
        assert seen.width() == 360
    if plays_h264(page):
        page.wait_for_function("document.querySelector('.ov-clip video').readyState > 0")
    page.get_by_role("tab", name="Search").click()  # the server goes on
    page.emulate_media(color_scheme="dark")
    search(seen, "a horse")
    page.wait_for_selector(".ov-card")
    assert seen.width() == 360
    boxes = [card.bounding_box() for card in page.locator(".ov-card").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in boxes)
    assert len({box["x"] for box in boxes}) == 1  # one column
    seen.shot("search-narrow")


@pytest.mark.parametrize("scripts", [True, False])
def test_the_page_of_results(scripts, server, sight, browser, tmp_path):
    film = str(server.folder / "a.mp4")
    moments = [Moment(film, 2.0, 4.0, 0.3, 3.0), Moment("/gone <script>.mp4", 0, 1, 0.2, 0.5)]
    path = tmp_path / "page.html"
    write_page(path, [("a <script>alert(1)</script>", moments), ("nothing", [])])
    if scripts:
        seen = sight(path.as_uri(), dark=True, width=360, height=780)
        page = seen.page
        assert max(colour(page)) < 64
        page.locator(".ov-play").press("Enter")
        seen.shot("page-narrow")
        assert seen.width() == 360
    else:
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(path.as_uri())
        assert not page.locator(".ov-play").is_visible()
        assert page.locator("video[controls]").is_visible()
        context.close()
        return
    if plays_h264(page):
        handle = page.locator("video").element_handle()
        page.wait_for_function("v => v.currentTime > 0", arg=handle)
        assert page.locator("video").evaluate("v => v.duration") == pytest.approx(2, abs=0.1)
    assert {urlsplit(address).scheme for address in seen.requests} <= {"file", "data"}
