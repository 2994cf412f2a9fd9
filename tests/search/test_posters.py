"""Pictures and short videos of moments."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvclip.errors import VideoError, VideoNotFoundError, VideoOptionError
from openvclip.search import Moment
from openvclip.search import posters as module
from openvclip.search.posters import moment_poster, moment_preview, preview_part
from tests.search.films import grey_at, write_film

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_film(tmp_path_factory.mktemp("films") / "film.mp4"))


def moment(path, start, end, peak=None):
    return Moment(path, start, end, 0.3, (start + end) / 2 if peak is None else peak)


def greys(data):
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        names = container.format.name, container.streams.video[0].codec_context.name
        assert len(container.streams) == 1
        return [float(frame.mean()) for frame in frames], frames[0].shape, names


@pytest.mark.parametrize(
    ("start", "end", "peak", "shown"),
    [(2, 8, 6.5, 6.5), (2, 4, 9.0, 4), (5.05, 9, 1.0, 5.05), (-3, -1, -2, 0), (20, 30, 25, 11.9)],
)
def test_a_poster_is_the_frame_at_the_peak(film, start, end, peak, shown):
    poster = moment_poster(moment(film, start, end, peak))
    image = Image.open(io.BytesIO(poster.data))
    assert image.format == "JPEG"
    assert image.size == (poster.width, poster.height) == (64, 48)
    assert abs(np.asarray(image).mean() - grey_at(shown)) < 4


def test_a_preview_shows_the_moment_and_nothing_else(film):
    preview = moment_preview(moment(film, 5.0, 8.0))
    values, shape, names = greys(preview.data)
    assert preview[1:] == ("video/mp4", 5.0, 8.0)
    assert names == ("mov,mp4,m4a,3gp,3g2,mj2", "h264")
    assert shape == (48, 64, 3)
    assert len(values) == 36
    assert np.allclose(values, [grey_at(5 + n / 12 + 0.001) for n in range(36)], atol=5)


def test_pictures_become_smaller_but_not_larger_and_their_pixels_square(tmp_path):
    path = write_film(tmp_path / "wide.mp4", 1, size=(90, 50), ratio=Fraction(16, 10))
    poster = moment_poster(moment(str(path), 0, 1))
    assert (poster.width, poster.height) == (round(50 * 90 * 1.6 / 50), 50)
    small = moment_poster(moment(str(path), 0, 1), width=36)
    assert (small.width, small.height) == (36, round(36 / (90 * 1.6 / 50)))
    values, shape, _ = greys(moment_preview(moment(str(path), 0, 1), width=35).data)
    assert shape == (12, 34, 3)
    assert len(values) == 12


@given(
    start=st.floats(0, 1e4),
    length=st.floats(0, 1e3),
    place=st.floats(0, 1),
    seconds=st.floats(0.1, 100),
)
def test_the_part_of_a_preview(start, length, place, seconds):
    end, peak = start + length, start + place * length
    first, last = preview_part(moment("a", start, end, peak), seconds)
    assert start - 1e-6 <= first <= peak + 1e-6
    assert peak - 1e-6 <= last <= end + 1e-6
    assert last - first == pytest.approx(min(length, seconds), abs=1e-6)


def test_without_an_encoder_for_h264_the_preview_is_a_webm(film, monkeypatch):
    monkeypatch.setattr(module, "_ENCODERS", module._ENCODERS[1:])
    preview = moment_preview(moment(film, 5.0, 6.0))
    values, _, names = greys(preview.data)
    assert preview.kind == "video/webm"
    assert names == ("matroska,webm", "vp9")
    assert np.allclose(values, grey_at(5), atol=5)
    monkeypatch.setattr(module, "_ENCODERS", (("no_such_encoder", "mp4", {}),))
    with pytest.raises(VideoError, match="no encoder no_such_encoder"):
        moment_preview(moment(film, 5.0, 6.0))


def test_what_cannot_be_read(tmp_path, film):
    (tmp_path / "text.mp4").write_text("no video")
    for make in (moment_poster, moment_preview):
        with pytest.raises(VideoNotFoundError):
            make(moment(str(tmp_path / "none.mp4"), 0, 1))
        with pytest.raises(VideoError):
            make(moment(str(tmp_path / "text.mp4"), 0, 1))
    with pytest.raises(VideoOptionError, match="above 0"):
        moment_preview(moment(film, 0, 1), seconds=0)
