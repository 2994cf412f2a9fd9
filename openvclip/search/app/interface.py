"""The page of the app: a tab to search, and a tab with a clip and its labels. Gradio draws it."""

from __future__ import annotations

from html import escape
from typing import Any

from openvclip.commands.names import one_line
from openvclip.errors import MissingDependencyError
from openvclip.search.app.answers import Answers, Limits, say
from openvclip.search.app.player import TIMELINE_SCRIPT
from openvclip.search.cards import PLAYER_SCRIPT, display_name
from openvclip.search.index import Index
from openvclip.video.files import VIDEO_SUFFIXES

__all__ = ["HEAD", "build_interface", "require_gradio", "theme"]

_CHOICES = 1000  # videos of the library in the list; others are found by typing a part of a name
_LABELS = "one label on each line, such as\nplaying guitar\nriding a horse\nsomething else"

HEAD = f"<script>{PLAYER_SCRIPT}{TIMELINE_SCRIPT}</script>"


def require_gradio() -> Any:
    """Import Gradio at its first use and return the module.

    Raises:
        MissingDependencyError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError(
            "Gradio is not installed, but the app needs it. Install it with: pip install "
            '"openvclip[app]"'
        ) from error
    return gradio


def theme() -> Any:
    """Return the theme: quiet colours, and the fonts of the reader's system."""
    gradio = require_gradio()
    plain = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gradio.themes.Base(
        primary_hue=gradio.themes.colors.blue,
        neutral_hue=gradio.themes.colors.slate,
        font=plain,
        font_mono=["ui-monospace", "monospace"],
        radius_size=gradio.themes.sizes.radius_md,
    ).set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#12161d",
        block_background_fill_dark="#1b212b",
        border_color_primary="#dde1e8",
        border_color_primary_dark="#2e3643",
        input_background_fill="white",
        input_background_fill_dark="#232b38",
        input_border_color="#c3cad6",
        input_border_color_dark="#3a4454",
        input_border_width="1px",
        block_info_text_color="#5b6472",
        block_info_text_color_dark="#9ba5b5",
        block_title_text_color="#1b212c",
        block_title_text_color_dark="#e6e9ef",
        block_label_text_color="#1b212c",
        block_label_text_color_dark="#e6e9ef",
        button_primary_background_fill="#2456a6",
        button_primary_background_fill_hover="#1c4688",
        button_primary_background_fill_dark="#3a6cc0",
        button_primary_background_fill_hover_dark="#4a7bd0",
        button_primary_text_color="white",
    )


def build_interface(index: Index, answers: Answers, limits: Limits) -> Any:
    """Return the ``gradio.Blocks`` of the app.

    Args:
        index: the index.
        answers: the answers.
        limits: the limits.
    """
    gradio = require_gradio()
    videos = [str(path) for path in index.videos]
    name = display_name(str(index.path))
    with gradio.Blocks(title=f"{name} – openvclip", analytics_enabled=False) as blocks:
        facts = f"{len(videos):,} videos, {len(index):,} windows"
        gradio.HTML(
            f'<div class="ov-head"><h1>{escape(name)}</h1><span>{facts}</span></div>', padding=False
        )
        with gradio.Tab("Search"):
            _search_tab(gradio, answers, limits, bool(videos))
        with gradio.Tab("Labels over time"):
            _labels_tab(gradio, answers, limits, videos)
    return blocks


def _search_tab(gradio: Any, answers: Answers, limits: Limits, filled: bool) -> None:
    with gradio.Row(equal_height=True):
        query = gradio.Textbox(
            placeholder="a person riding a horse",
            label="Query",
            show_label=False,
            container=False,
            scale=8,
            min_width=160,
            max_lines=1,
            max_length=1000,
            autofocus=True,
            elem_id="query",
        )
        button = gradio.Button("Search", variant="primary", scale=0, min_width=110)
    with gradio.Accordion("More options", open=False), gradio.Row():
        negative = gradio.Textbox(
            label="Not",
            info="sentences of what the moments must not show, one on each line",
            lines=2,
        )
        count = gradio.Slider(
            1, limits.results, value=min(12, limits.results), step=1, label="Results"
        )
        least = gradio.Number(
            None,
            label="Lowest score",
            info="empty: the threshold of a calibrated model, or no limit",
            minimum=-1,
            maximum=1,
            step=0.01,
        )
    start = say(
        "Type what you are looking for, such as: a person riding a horse."
        if filled
        else "This index has no videos. Add some with: openvclip index VIDEOS -o library.ovx"
    )
    results = gradio.HTML(start, padding=False, elem_id="results")
    gradio.on(
        [query.submit, button.click],
        answers.search,
        [query, negative, count, least],
        results,
        api_name=False,
    )


def library_choices(videos: list[str]) -> list[tuple[str, str]]:
    """Return what the list of the library shows of each video and what it sends, both as text."""
    return [(display_name(path), one_line(path)) for path in videos[:_CHOICES]]


def _labels_tab(gradio: Any, answers: Answers, limits: Limits, videos: list[str]) -> None:
    megabytes = limits.upload_bytes / 2**20
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            labels = gradio.Textbox(label="Labels", placeholder=_LABELS, lines=5, elem_id="labels")
            with gradio.Tab("From the library"):
                more = len(videos) > _CHOICES
                chosen = gradio.Dropdown(
                    library_choices(videos),
                    value=None,
                    label="Clip",
                    info="or type a part of its name" if more else None,
                    allow_custom_value=more,
                    elem_id="library",
                )
                of_library = gradio.Button("Show labels", variant="primary")
            with gradio.Tab("Upload"):
                upload = gradio.File(
                    label=f"Clip of at most {megabytes:.3g} MB",
                    file_types=sorted(VIDEO_SUFFIXES),
                    height=140,
                    elem_id="upload",
                )
                of_upload = gradio.Button("Show labels", variant="primary")
        with gradio.Column(scale=2, min_width=300):
            answer = gradio.HTML(
                say("Choose a clip and write labels."), padding=False, elem_id="clip"
            )
    of_library.click(answers.from_library, [chosen, labels], answer, api_name=False)
    of_upload.click(answers.upload, [upload, labels], answer, api_name=False)
