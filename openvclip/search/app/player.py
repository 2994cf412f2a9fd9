"""HTML of a clip with its labels: the player, the probabilities and the timeline."""

from __future__ import annotations

from html import escape

from openvclip.models.prediction import NONE_OF_THESE, Prediction
from openvclip.models.timeline import Timeline, clock

__all__ = ["PLAYER_STYLE", "TIMELINE_SCRIPT", "clip_view"]

_TOP = 6  # labels that are drawn
_TICKS = 2  # parts of the timeline between times

PLAYER_STYLE = """\
.ov-clip { display: grid; gap: 1.25rem; color: var(--ov-text); }
.ov-clip video { width: 100%; max-height: 22rem; margin: 0; border-radius: 10px;
  background: var(--ov-screen); display: block; }
.ov-clip h3 { margin: 0 0 .5rem; font-size: .95rem; font-weight: 600; color: var(--ov-text); }
.ov-rows { display: grid; gap: .4rem .75rem; align-items: center; font-size: .9rem;
  grid-template-columns: fit-content(42%) minmax(0, 1fr) auto; }
.ov-rows > span:first-child, .ov-label { overflow-wrap: anywhere; line-height: 1.25; }
.ov-best { font-weight: 650; }
.ov-bar { height: .6rem; border-radius: 99px; background: var(--ov-line); overflow: hidden; }
.ov-bar i { display: block; height: 100%; border-radius: 99px; background: var(--ov-accent); }
.ov-share { font-variant-numeric: tabular-nums; color: var(--ov-soft); text-align: right; }
.ov-times { display: grid; gap: .3rem .75rem; align-items: center; font-size: .9rem;
  grid-template-columns: fit-content(42%) minmax(0, 1fr); }
.ov-track { position: relative; height: 1.6rem; border-radius: 4px; overflow: hidden;
  background: var(--ov-track); cursor: pointer; }
.ov-track i { position: absolute; top: 0; bottom: 0; background: var(--ov-accent); }
.ov-track i.ov-won { border-bottom: 3px solid var(--ov-won); }
.ov-track .ov-at { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px;
  left: var(--ov-at, 0%); background: var(--ov-mark); border: 0; pointer-events: none; }
.ov-axis, .ov-axis span { color: var(--ov-soft); white-space: nowrap; }
.ov-axis { display: flex; justify-content: space-between; font-size: .78rem;
  font-variant-numeric: tabular-nums; }
.ov-parts { display: flex; flex-wrap: wrap; gap: .4rem; margin: .25rem 0 0; padding: 0;
  list-style: none; }
.ov-parts button { display: block; padding: .25rem .7rem; border: 1px solid var(--ov-line);
  border-radius: 99px; background: var(--ov-card); color: inherit; font: inherit;
  font-size: .85rem; cursor: pointer; text-align: left; overflow-wrap: anywhere; }
.ov-parts button:hover, .ov-parts button:focus-visible { border-color: var(--ov-accent); }
.ov-parts button[aria-current] { border-color: var(--ov-accent); background: var(--ov-track); }
.ov-parts .ov-share { margin-right: .4rem; }
"""

TIMELINE_SCRIPT = """\
(function () {
  function clip(node) { return node && node.closest ? node.closest(".ov-clip") : null; }
  function mark(video) {
    var root = clip(video), length;
    if (!root) return;
    length = parseFloat(root.dataset.seconds) || video.duration;
    if (!(length > 0)) return;
    root.style.setProperty("--ov-at", Math.min(100, 100 * video.currentTime / length) + "%");
    Array.prototype.forEach.call(root.querySelectorAll("[data-start]"), function (part) {
      var inside = video.currentTime >= part.dataset.start && video.currentTime < part.dataset.end;
      if (inside) part.setAttribute("aria-current", "true");
      else part.removeAttribute("aria-current");
    });
  }
  function follow(video) {
    mark(video);
    if (!video.paused && !video.ended && video.isConnected)
      requestAnimationFrame(function () { follow(video); });
  }
  ["timeupdate", "seeking", "seeked", "loadedmetadata", "play"].forEach(function (name) {
    document.addEventListener(name, function (event) {
      if (!clip(event.target)) return;
      if (name === "play") follow(event.target); else mark(event.target);
    }, true);
  });
  document.addEventListener("click", function (event) {
    var root = clip(event.target), track, part, box, video;
    if (!root) return;
    video = root.querySelector("video");
    track = event.target.closest(".ov-track");
    part = event.target.closest("[data-start]");
    if (!video || !(track || part)) return;
    if (part) video.currentTime = parseFloat(part.dataset.start);
    else {
      box = track.getBoundingClientRect();
      video.currentTime = (event.clientX - box.left) / box.width *
        (parseFloat(root.dataset.seconds) || video.duration);
    }
    mark(video);
  });
})();
"""


def clip_view(name: str, video: str, prediction: Prediction, timeline: Timeline) -> str:
    """Return the HTML of a clip, its probabilities and its timeline. All texts are escaped.

    Args:
        name: the name of the clip.
        video: address of the video, ``""`` if browsers can't play it.
        prediction: the probabilities of the labels for the whole clip.
        timeline: the probabilities over time.
    """
    end = float(timeline.times[-1, 1])
    player = (
        f'<video controls playsinline preload="metadata" aria-label="{escape(name)}" '
        f'src="{escape(video)}"></video>'
        if video
        else ""
    )
    return (
        f'<div class="ov-clip" data-seconds="{end:.3f}"><div>{player}</div>'
        f"<div><h3>{escape(name)}</h3>{_probabilities(prediction)}</div>"
        f"<div><h3>Over time</h3>{_tracks(timeline, end)}{_parts(timeline)}</div></div>"
    )


def _probabilities(prediction: Prediction) -> str:
    best = prediction.answer
    rows = []
    if prediction.rejected:
        rows.append(f'<span class="ov-best">{NONE_OF_THESE}</span><span></span><span></span>')
    entries = [*prediction.top(_TOP), *prediction.background.items()]
    for label, value in entries:
        mark = ' class="ov-best"' if label == best else ""
        rows.append(
            f'<span{mark}>{escape(label)}</span><span class="ov-bar" aria-hidden="true">'
            f'<i style="width:{100 * value:.2f}%"></i></span>'
            f'<span class="ov-share">{value:.1%}</span>'
        )
    return f'<div class="ov-rows">{"".join(rows)}</div>'


def _tracks(timeline: Timeline, end: float) -> str:
    """Return a row for each label; the most probable label of a window is underlined."""
    edges = timeline.edges()
    best = timeline.probabilities.argmax(dim=1).tolist()
    rows = []
    for index in timeline.most_probable(_TOP):
        cells = []
        for window, value in enumerate(timeline.probabilities[:, index].tolist()):
            left, right = 100 * edges[window] / end, 100 * edges[window + 1] / end
            won = ' class="ov-won"' if best[window] == index else ""
            shade = f"color-mix(in srgb, var(--ov-accent) {100 * value:.0f}%, transparent)"
            cells.append(
                f'<i{won} style="left:{left:.3f}%;width:{right - left:.3f}%;background:{shade}" '
                f'title="{clock(edges[window])}: {value:.0%}"></i>'
            )
        label = escape(timeline.labels[index])
        rows.append(
            f'<span class="ov-label">{label}</span>'
            f'<div class="ov-track" aria-hidden="true">{"".join(cells)}<b class="ov-at"></b></div>'
        )
    times = [clock(end * tick / _TICKS) for tick in range(_TICKS + 1)]
    axis = "".join(f"<span>{time}</span>" for time in times)
    rows.append(f'<span></span><div class="ov-axis" aria-hidden="true">{axis}</div>')
    return f'<div class="ov-times">{"".join(rows)}</div>'


def _parts(timeline: Timeline) -> str:
    """Return a button for each part with one label, which plays from there."""
    items = [
        f'<li><button type="button" data-start="{part.start:.3f}" data-end="{part.end:.3f}">'
        f'<span class="ov-share">{clock(part.start)} – {clock(part.end)}</span> '
        f"{escape(part.label)} {part.probability:.0%}</button></li>"
        for part in timeline.segments()
    ]
    return f'<ul class="ov-parts" aria-label="Parts of the clip">{"".join(items)}</ul>'
