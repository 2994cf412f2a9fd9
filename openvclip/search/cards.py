"""HTML of results: one card for each moment. The page of results and the app share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from openvclip.commands.names import one_line
from openvclip.models.timeline import clock
from openvclip.search.moments import Moment
from openvclip.video.sources import file_name

__all__ = ["CARD_STYLE", "PLAYER_SCRIPT", "Media", "card", "cards", "display_name"]


class Media(NamedTuple):
    """What a card shows of its moment.

    Attributes:
        poster: address of a picture, ``""`` if there is none.
        video: address of a video, ``""`` if there is none.
        width: width of the picture, pixels.
        height: height of the picture, pixels.
        note: a sentence for the reader, such as why there is no video.
        link: address of the video file, ``""`` if there is none.
        muted: whether the video has no sound.
    """

    poster: str = ""
    video: str = ""
    width: int = 16
    height: int = 9
    note: str = ""
    link: str = ""
    muted: bool = True


CARD_STYLE = """\
.ov-cards { display: grid; gap: 1rem; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.ov-card { display: flex; flex-direction: column; overflow: hidden; min-width: 0; margin: 0;
  background: var(--ov-card); border: 1px solid var(--ov-line); border-radius: 10px; }
.ov-screen { position: relative; aspect-ratio: 16 / 9; background: var(--ov-screen); }
.ov-screen video, .ov-screen img { position: absolute; inset: 0; width: 100%; height: 100%;
  margin: 0; object-fit: contain; border-radius: 0; display: block; }
.ov-screen video:focus-visible { outline: 3px solid var(--ov-accent); outline-offset: -3px; }
.ov-play { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; padding: 0;
  border: 0; background: none; cursor: pointer; display: grid; place-items: center; }
.ov-play[hidden] { display: none; }
.ov-play svg { width: 3rem; height: 3rem; padding: .6rem; border-radius: 50%; fill: #fff;
  background: rgb(10 14 20 / .62); transition: background .15s; }
.ov-play:hover svg, .ov-play:focus-visible svg { background: var(--ov-accent-deep); }
.ov-play:focus-visible { outline: 3px solid var(--ov-accent); outline-offset: -3px; }
.ov-none { position: absolute; inset: 0; display: flex; align-items: center; padding: 1rem;
  justify-content: center; text-align: center; color: #b6bcc8; font-size: .85rem;
  overflow-wrap: anywhere; }
.ov-text { display: grid; grid-template-columns: 1fr auto; gap: .15rem .75rem;
  padding: .65rem .8rem .75rem; font-size: .9rem; line-height: 1.4; color: var(--ov-text); }
.ov-name { grid-column: 1 / -1; font-weight: 600; overflow-wrap: anywhere; color: inherit; }
.ov-name a { color: inherit; text-decoration-color: var(--ov-line); text-underline-offset: 3px; }
.ov-name a:hover { text-decoration-color: currentColor; }
.ov-time, .ov-score { white-space: nowrap; font-size: .85rem; color: var(--ov-soft);
  font-variant-numeric: tabular-nums; }
.ov-score b { color: var(--ov-accent); font-weight: 600; }
.ov-note { grid-column: 1 / -1; color: var(--ov-soft); font-size: .8rem; overflow-wrap: anywhere; }
"""

PLAYER_SCRIPT = """\
(function () {
  function each(list, action) { Array.prototype.forEach.call(list, action); }
  function prepare(root) {
    each(root.querySelectorAll(".ov-play[hidden]"), function (button) {
      var video = button.parentNode.querySelector("video");
      if (video.dataset.begun) return;
      video.controls = false;
      button.hidden = false;
    });
  }
  function start(video) {
    var button = video.parentNode.querySelector(".ov-play");
    video.dataset.begun = "1";
    video.controls = true;
    if (button) button.hidden = true;
  }
  document.addEventListener("click", function (event) {
    var button = event.target.closest && event.target.closest(".ov-play"), video;
    if (!button) return;
    video = button.parentNode.querySelector("video");
    start(video);
    video.play();
    video.focus();
  });
  document.addEventListener("play", function (event) {
    start(event.target);
    each(document.querySelectorAll("video"), function (video) {
      if (video !== event.target) video.pause();
    });
  }, true);
  document.addEventListener("error", function (event) {
    var video = event.target, parts;
    if (video.tagName !== "VIDEO") return;
    parts = /^data:([^;]+);base64,(.*)$/.exec(video.src);
    if (!parts) return;
    var bytes = Uint8Array.from(atob(parts[2]), function (letter) { return letter.charCodeAt(0); });
    video.src = URL.createObjectURL(new Blob([bytes], { type: parts[1] }));
    if (video.dataset.begun) video.play();
  }, true);
  new MutationObserver(function () { prepare(document); })
    .observe(document.documentElement, { childList: true, subtree: true });
  prepare(document);
})();
"""
"""The script of a page with cards. Without it, the videos show the controls of the browser.

It puts a large button on each picture, plays one video at a time, and gives a browser that refuses
data URIs of videos (Safari) the same bytes as a blob.
"""


def display_name(path: str) -> str:
    """Return the last part of a path or a URL, as one line of text."""
    return one_line(file_name(path))


def card(rank: int, moment: Moment, media: Media) -> str:
    """Return the HTML of a result. All texts are escaped.

    Args:
        rank: the place of the moment among the results, from 1.
        moment: the moment.
        media: what the card shows.
    """
    name = display_name(moment.path)
    time = f"{clock(moment.start)} – {clock(moment.end)}"
    label = f"Result {rank}: {name}, {clock(moment.start)} to {clock(moment.end)}"
    shown, path = escape(name), escape(one_line(moment.path))
    if media.link:
        shown = f'<a href="{escape(media.link)}">{shown}</a>'
    # Without a picture, the note is in its place.
    words = media.note if media.poster or media.video else ""
    note = f'<span class="ov-note">{escape(words)}</span>' if words else ""
    return (
        f'<li class="ov-card"><div class="ov-screen">{_screen(label, media)}</div>'
        f'<div class="ov-text"><span class="ov-name" title="{path}">{shown}</span>'
        f'<span class="ov-time">{time}</span>'
        f'<span class="ov-score">score <b>{moment.score:.3f}</b></span>{note}</div></li>'
    )


def cards(moments: Sequence[Moment], media_of: Callable[[int, Moment], Media]) -> str:
    """Return the HTML of results in their order.

    Args:
        moments: the moments.
        media_of: function from the index and the moment to what the card shows.
    """
    items = [card(i + 1, moment, media_of(i, moment)) for i, moment in enumerate(moments)]
    return f'<ol class="ov-cards">{"".join(items)}</ol>'


def _screen(label: str, media: Media) -> str:
    if media.video:
        poster = f' poster="{escape(media.poster)}"' if media.poster else ""
        muted = " muted loop" if media.muted else ""
        return (
            f'<video controls playsinline preload="none"{muted} aria-label="{escape(label)}"'
            f'{poster} src="{escape(media.video)}"></video>'
            f'<button type="button" class="ov-play" hidden aria-label="Play {escape(label)}">'
            '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M8 5.5v13l11-6.5z"/></svg>'
            "</button>"
        )
    if media.poster:
        return (
            f'<img src="{escape(media.poster)}" alt="{escape(label)}" '
            f'width="{media.width}" height="{media.height}">'
        )
    return f'<span class="ov-none">{escape(media.note or "No picture.")}</span>'
