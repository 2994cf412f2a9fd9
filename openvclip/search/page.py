"""Write the results of searches to one HTML page that needs no other file and no connection."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from urllib.parse import quote

from openvclip.checkpoints.atomic import write_text
from openvclip.commands.pages import NO_ROOM, PAGE_STYLE, DataBudget, page_head, require_above_zero
from openvclip.commands.progress import progress_bar
from openvclip.errors import SearchError, VideoError
from openvclip.search.cards import CARD_STYLE, PLAYER_SCRIPT, Media, cards
from openvclip.search.moments import Moment
from openvclip.search.posters import Preview, moment_poster, moment_preview
from openvclip.video.posters import Poster, why_no_poster
from openvclip.video.sources import is_url

__all__ = ["PageReport", "PageSettings", "write_page"]


@dataclass(frozen=True)
class PageSettings:
    """What a page of results contains.

    Attributes:
        previews: whether each result has a short video.
        seconds: the greatest length of a short video, in seconds.
        megabytes: the greatest size of the page. When the pictures and videos have this size, the
            results that follow have fewer: first no video, then no picture. The default fits into a
            mail with a limit of 25 MB.
        poster_width: the longest side of a picture, in pixels.
        preview_width: the longest side of a short video, in pixels.

    Raises:
        SearchError: a number is not above 0.
    """

    previews: bool = True
    seconds: float = 8.0
    megabytes: float = 16.0
    poster_width: int = 400
    preview_width: int = 320

    def __post_init__(self) -> None:
        require_above_zero(
            SearchError,
            seconds=self.seconds,
            megabytes=self.megabytes,
            poster_width=self.poster_width,
            preview_width=self.preview_width,
        )


@dataclass(frozen=True)
class PageReport:
    """What :func:`write_page` wrote.

    Attributes:
        path: the page.
        bytes: size of the page.
        results: number of moments.
        previews: number of short videos.
        failed: videos without a picture, and why.
        too_large: number of moments whose picture or video did not fit into the page.
    """

    path: str
    bytes: int
    results: int
    previews: int
    failed: dict[str, str] = field(default_factory=dict)
    too_large: int = 0


def write_page(
    path: str | os.PathLike[str],
    results: Sequence[tuple[str, Sequence[Moment]]],
    *,
    title: str = "Search results",
    about: Mapping[str, str] | None = None,
    settings: PageSettings | None = None,
    progress: bool | None = None,
) -> PageReport:
    """Write the results of searches to an HTML page.

    The page is a single file that can be mailed: pictures and short videos are inside. It needs no
    connection, no script and no font from elsewhere, and its content security policy forbids them.
    If a video lies in the folder of the page or below, its name is a link to the file.

    A video that is missing or can't be read is not an error: the page says so in its place.

    Args:
        path: the page to write. An existing file is replaced. Missing folders are created.
        results: for each query its text and its moments, best first. The list of moments is empty
            if nothing fits.
        title: the title of the page.
        about: facts for the end of the page, such as ``{"index": "library.ovx"}``.
        settings: sizes and lengths. Default: :class:`PageSettings`.
        progress: whether to show a progress bar. Default: only in a terminal.

    Raises:
        SearchError: ``results`` is empty, or an element is not a query with its moments.
        CheckpointError: the page can't be written.
        MissingDependencyError: PyAV or Pillow is not installed.
    """
    chosen = settings or PageSettings()
    queries = _checked(results)
    moments = list(dict.fromkeys(moment for _, found in queries for moment in found))
    images = _Images(moments, chosen, os.path.dirname(os.path.abspath(path)), progress)
    size = write_text(path, _parts(queries, images, title, dict(about or {})))
    return PageReport(
        os.fspath(path),
        size,
        sum(len(found) for _, found in queries),
        images.previews,
        images.failed,
        images.too_large,
    )


def _checked(results: Sequence[tuple[str, Sequence[Moment]]]) -> list[tuple[str, list[Moment]]]:
    if not results:
        raise SearchError("results is empty; expected at least one query with its moments.")
    queries = []
    for entry in results:
        if isinstance(entry, Moment) or len(entry) != 2 or not isinstance(entry[0], str):
            raise SearchError(
                f"results holds {str(entry)[:60]!r}; expected pairs (text of the query, its "
                "moments). For one query: [(text, moments)]."
            )
        for moment in entry[1]:
            if not isinstance(moment, tuple) or len(moment) != len(Moment._fields):
                raise SearchError(
                    f"The query {entry[0][:60]!r} has {str(moment)[:60]!r} among its moments; "
                    f"expected moments: {', '.join(Moment._fields)}."
                )
        queries.append((entry[0], [Moment(*moment) for moment in entry[1]]))
    return queries


class _Images:
    """Pictures and short videos of moments, made in threads some moments ahead.

    Each is made once, also if several queries find the same moment.
    """

    def __init__(
        self, moments: list[Moment], settings: PageSettings, folder: str, progress: bool | None
    ) -> None:
        self._moments, self._settings, self._folder = moments, settings, folder
        self._progress = progress
        self._budget = DataBudget(settings.megabytes)
        self._media: dict[Moment, Media] = {}
        self._pending: dict[Moment, Future[tuple[Poster | str, Preview | str]]] = {}
        self.failed: dict[str, str] = {}
        self.previews = self.too_large = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        disable = None if self._progress is None else not self._progress
        workers = max(1, min(4, os.cpu_count() or 1))
        with (
            ThreadPoolExecutor(workers) as self._pool,
            progress_bar(total=len(self._moments), desc="page", disable=disable) as self._bar,
        ):
            self._todo = iter(self._moments)
            for _ in range(2 * workers):
                self._submit()
            try:
                yield
            finally:
                for future in self._pending.values():
                    future.cancel()

    def _submit(self) -> None:
        moment = next(self._todo, None)
        if moment is not None:
            self._pending[moment] = self._pool.submit(_made, moment, self._settings)

    def media(self, moment: Moment) -> Media:
        """Return what the page shows of a moment."""
        if moment not in self._media:
            poster, preview = self._pending.pop(moment).result()
            self._submit()
            self._bar.update()
            self._media[moment] = self._fitting(moment, poster, preview)
        return self._media[moment]

    def _fitting(self, moment: Moment, poster: Poster | str, preview: Preview | str) -> Media:
        link = _link(moment, self._folder)
        if isinstance(poster, str):
            self.failed[moment.path] = poster
            return Media(note=why_no_poster(moment.path))
        picture = self._budget.data_uri(poster.data, "image/jpeg")
        if not picture:
            self.too_large += 1
            return Media(note=NO_ROOM, link=link)
        media = Media(picture, "", poster.width, poster.height, link=link)
        if isinstance(preview, str):
            return media._replace(note=preview)
        if not (video := self._budget.data_uri(preview.data, preview.kind)):
            self.too_large += 1
            return media._replace(note="No video: the page has reached its greatest size.")
        self.previews += 1
        return media._replace(video=video)


def _made(moment: Moment, settings: PageSettings) -> tuple[Poster | str, Preview | str]:
    """Return the picture and the short video of a moment, or why there is none."""
    try:
        poster = moment_poster(moment, width=settings.poster_width)
    except VideoError as error:
        return str(error), ""
    if not settings.previews:
        return poster, ""
    try:
        return poster, moment_preview(
            moment, width=settings.preview_width, seconds=settings.seconds
        )
    except VideoError:
        return poster, "No video: this moment can't be played."


def _link(moment: Moment, folder: str) -> str:
    """Return the address of a video relative to the page, or ``""`` if it lies elsewhere."""
    if is_url(moment.path):
        return ""
    relative = os.path.relpath(os.path.abspath(moment.path), folder)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
        return ""
    address = "/".join(quote(os.fsencode(part)) for part in relative.split(os.sep))
    return f"./{address}#t={moment.start:.1f}"


_STYLE = (
    PAGE_STYLE
    + """\
nav ul { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 1.75rem; padding: 0;
  list-style: none; }
nav a { display: block; padding: .25rem .7rem; border: 1px solid var(--ov-line);
  border-radius: 999px; background: var(--ov-card); color: inherit; text-decoration: none;
  font-size: .9rem; overflow-wrap: anywhere; }
nav a:hover, nav a:focus-visible { border-color: var(--ov-accent); }
@media print { .ov-card { break-inside: avoid; } }
"""
    + CARD_STYLE
)


def _parts(
    queries: list[tuple[str, list[Moment]]], images: _Images, title: str, about: dict[str, str]
) -> Iterator[str]:
    """Yield the HTML in pieces, so that a page of many results needs little memory."""
    yield page_head(title, _STYLE, [PLAYER_SCRIPT], "media-src data: blob: file: 'self'")
    yield f"<main>\n<h1>{escape(title)}</h1>\n"
    if len(queries) > 1:
        links = "".join(
            f'<li><a href="#query-{i}">{escape(text)}</a></li>'
            for i, (text, _) in enumerate(queries)
        )
        yield f'<nav aria-label="Queries"><ul>{links}</ul></nav>\n'
    with images.opened():
        for number, (text, moments) in enumerate(queries):
            yield f'<section id="query-{number}">\n<h2>{escape(text)}</h2>\n'
            yield f"<p>{count_of(moments)}</p>\n"
            if moments:
                yield cards(moments, lambda _, moment: images.media(moment))
            yield "\n</section>\n"
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in about.items()
    )
    yield (
        f"<footer>{f'<dl>{facts}</dl>' if facts else ''}<p>Written by openvclip. The score is the "
        "cosine similarity of the query and the moment.</p></footer>\n</main>\n"
        f"<script>{PLAYER_SCRIPT}</script>\n</body>\n</html>\n"
    )


def count_of(moments: Sequence[Moment]) -> str:
    """Return how many moments of how many videos there are, as text."""
    if not moments:
        return "Nothing fits this query."
    videos = len({moment.path for moment in moments})
    return (
        f"{len(moments)} moment{'s' if len(moments) > 1 else ''} in "
        f"{videos} video{'s' if videos > 1 else ''}"
    )
