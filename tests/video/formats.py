"""Codecs, containers and pixel formats for the fixture ``encode``."""

from __future__ import annotations

from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "h264 with B-frames": {"name": "b.mp4", "options": {"x264-params": "bframes=3:keyint=12"}},
    "h264 open GOP": {
        "name": "o.mp4",
        "options": {"x264-params": "bframes=3:keyint=12:open-gop=1"},
    },
    "h264 in MKV": {"name": "m.mkv", "options": {"x264-params": "bframes=3:keyint=12"}},
    "h264 in MPEG-TS": {"name": "t.ts", "options": {"x264-params": "bframes=2:keyint=12"}},
    "h264 elementary": {"name": "raw.h264", "options": {"x264-params": "bframes=0:keyint=12"}},
    "fragmented MP4": {
        "name": "f.mp4",
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
        "options": {"x264-params": "bframes=0:keyint=12"},
    },
    "mpeg4 in AVI": {"name": "a.avi", "codec": "mpeg4", "options": {"g": "12"}},
    "VP9 in WebM": {"name": "v.webm", "codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "GIF": {"name": "g.gif", "codec": "gif", "pixel_format": "gray", "fps": 25},
    "odd size": {"name": "odd.mkv", "codec": "ffv1", "size": (145, 63)},
    "grey": {"name": "grey.mkv", "codec": "ffv1", "pixel_format": "gray", "drawn": "gray"},
    "10 bit": {"name": "ten.mp4", "codec": "libx265", "pixel_format": "yuv420p10le",
               "options": {"x265-params": "log-level=none:keyint=12"}},
    "10 bit 4:2:2": {"name": "p.mov", "codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "alpha": {"name": "alpha.mov", "codec": "png", "pixel_format": "rgba", "drawn": "rgba"},
    "MJPEG": {"name": "j.avi", "codec": "mjpeg", "pixel_format": "yuvj420p"},
}  # fmt: skip
