"""The page of results: one file, everything inside, everything escaped."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from openvclip.errors import CheckpointError, SearchError
from openvclip.search import Moment
from openvclip.search.page import PageSettings, write_page
from tests.search.films import write_film

av = pytest.importorskip("av")
pytest.importorskip("PIL")

NASTY = "<script>alert('1')</script> \"a\" & b.mp4".replace("/", "\u2215")


class Elements(HTMLParser):
    """The elements of a page: tag, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and not {"script", "style"} & set(self._open):
            self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "a.mp4", 6)
    write_film(folder / "sub folder" / NASTY, 6, codec="mpeg4")
    (folder / "text.mp4").write_text("no video")
    return folder


def moments(folder):
    return [
        Moment(str(folder / "a.mp4"), 1.0, 3.0, 0.31, 2.0),
        Moment(str(folder / "sub folder" / NASTY), 0.0, 2.0, 0.3, 1.0),
        Moment(str(folder / "gone.mp4"), 3725.0, 3730.0, 0.2, 3726.0),
        Moment(str(folder / "text.mp4"), 0.0, 1.0, -0.1, 0.5),
    ]


def test_a_page_has_everything_inside(folder, tmp_path):
    path = tmp_path / "new" / "page.html"
    queries = [("a horse </script>", moments(folder)), ("nothing & no one", [])]
    report = write_page(path, queries, title="<b>Results</b>", about={"index": "a<i>b"})
    text = path.read_text("utf-8")
    page = Elements(text)
    assert (report.bytes, report.results, report.previews) == (len(text.encode()), 4, 2)
    assert set(report.failed) == {str(folder / "gone.mp4"), str(folder / "text.mp4")}
    # every text is there as a text, and makes no element
    for words in ("<b>Results</b>", "a horse </script>", "nothing & no one", "a<i>b", NASTY):
        assert words in page.texts
    assert len(page.all("script")) == 1
    assert len(page.all("b")) == 4  # the scores
    for words in ("The video file is missing.", "The video can't be read."):
        assert words in page.texts
    assert "4 moments in 4 videos" in page.texts
    assert "Nothing fits this query." in page.texts
    assert {"0:01.0 – 0:03.0", "1:02:05.0 – 1:02:10.0", "0.310", "-0.100"} <= set(page.texts)
    # nothing is loaded from elsewhere
    addresses = [
        value
        for _, attributes in page.found
        for name, value in attributes.items()
        if name in ("src", "href", "poster", "data", "srcset", "action")
    ]
    assert addresses
    assert all(re.match(r"data:(image/jpeg|video/mp4);base64,|#query-", a) for a in addresses)
    assert "url(" not in text
    assert "@import" not in text
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'")
    # each video can be used with a keyboard and has a name
    videos = page.all("video")
    assert len(videos) == len(page.all("button")) == 2
    assert all("controls" in found and found["aria-label"] for found in videos)
    for found in videos:
        data = base64.b64decode(found["src"].partition(",")[2])
        assert av.open(io.BytesIO(data)).streams.video[0].width == 64


def test_the_order_of_the_results_is_kept(folder, tmp_path):
    several = moments(folder)[1::-1]
    write_page(tmp_path / "page.html", [("a", several)])
    names = [
        text for text in Elements((tmp_path / "page.html").read_text()).texts if ".mp4" in text
    ]
    assert names == [NASTY, "a.mp4"]


def test_a_video_below_the_page_is_a_link(folder):
    write_page(folder / "page.html", [("a", moments(folder)[:2])])
    links = [found["href"] for found in Elements((folder / "page.html").read_text()).all("a")]
    assert links[0] == "./a.mp4#t=1.0"
    assert links[1].startswith("./sub%20folder/%3Cscript%3E")
    write_page(folder / "pages" / "page.html", [("a", moments(folder)[:2])])
    assert not Elements((folder / "pages" / "page.html").read_text()).all("a")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_name_that_is_no_text_is_shown_and_linked(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.mp4")
    write_film(tmp_path / "a.mp4", 2)
    os.rename(tmp_path / "a.mp4", path)
    write_page(tmp_path / "p.html", [(os.fsdecode(b"q\xfe"), [Moment(path, 0.0, 1.0, 0.3, 0.5)])])
    page = Elements((tmp_path / "p.html").read_text("utf-8"))
    assert [link["href"] for link in page.all("a")] == ["./bad%FF.mp4#t=0.0"]
    assert "bad\\udcff.mp4" in page.texts
    assert "q\\udcfe" in page.texts


def test_a_page_does_not_grow_beyond_its_size(folder, tmp_path):
    path = tmp_path / "page.html"
    film = str(folder / "a.mp4")
    many = [Moment(film, 0.1 * i, 0.1 * i + 2, 0.3, 0.1 * i + 1) for i in range(30)]
    whole = write_page(path, [("a", many)])
    assert (whole.previews, whole.too_large) == (30, 0)
    report = write_page(path, [("a", many)], settings=PageSettings(megabytes=0.03))
    assert report.bytes < 30_000 + 35_000  # and the page without pictures
    assert 0 < report.previews < 30
    assert report.previews + report.too_large == 30
    page = Elements(path.read_text())
    assert len(page.all("li")) == 30
    assert any("reached its greatest size" in text for text in page.texts)
    without = write_page(path, [("a", many[:3])], settings=PageSettings(previews=False))
    page = Elements(path.read_text())
    assert without.previews == 0
    assert not page.all("video")
    assert all(found["alt"] for found in page.all("img"))
    assert len(page.all("img")) == 3


def test_a_moment_of_several_queries_is_made_once(folder, tmp_path, monkeypatch):
    from openvclip.search import page

    count = 0
    make = page.moment_poster

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return make(*args, **kwargs)

    monkeypatch.setattr(page, "moment_poster", counted)
    one = moments(folder)[:1]
    report = write_page(tmp_path / "page.html", [("a", one), ("b", one * 2)])
    assert (count, report.results, report.previews) == (1, 3, 1)


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "empty"),
        ([("a", [], 1)], "pairs"),
        ([Moment("a", 0, 1, 0, 0)], "pairs"),
        ([("a", [1])], "expected moments: path, start"),
        ([("a", [("x.mp4", 1)])], "expected moments: path, start"),
    ],
)
def test_wrong_results(results, text, tmp_path):
    with pytest.raises(SearchError, match=text):
        write_page(tmp_path / "page.html", results)
    assert not (tmp_path / "page.html").exists()


def test_wrong_settings_and_places(folder, tmp_path):
    for name in ("seconds", "megabytes", "poster_width", "preview_width"):
        for wrong in (0, -1.0, float("nan"), float("inf"), "8", None, True):
            with pytest.raises(SearchError, match=f"^{name}="):
                PageSettings(**{name: wrong})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="page"):
        write_page(tmp_path / "file" / "page.html", [("a", [])])
