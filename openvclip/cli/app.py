"""The subcommand ``openvclip app``."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from openvclip.cli.options.library import add_library_model_options, open_index
from openvclip.cli.options.types import Commands
from openvclip.errors import UsageError

_DESCRIPTION = """\
Search an index of videos on a page in the browser. The results play from the
moment that fits. A second tab takes a clip and labels, and shows the
probabilities of the labels over time.

The page needs no connection: this machine serves it. Only this machine can
open it, unless --host is given. Of the files of this machine, it sends the
videos of the index alone.

Install the page's library with: pip install "openvclip[app]"
"""
_EXAMPLES = """\
examples:
  openvclip app library.ovx
  openvclip app library.ovx --port 8000 --open
  openvclip app library.ovx --host 0.0.0.0
"""
_MEGABYTE = 2**20


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "app",
        help="search an index of videos on a page in the browser",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "index", metavar="INDEX", type=Path, help="folder that 'openvclip index' made"
    )
    page = parser.add_argument_group("page")
    page.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; with 0.0.0.0, every machine that reaches this one can search "
        "and watch the videos (default: %(default)s, this machine alone)",
    )
    page.add_argument(
        "--port", type=int, metavar="N", help="port (default: the first free one from 7860 on)"
    )
    page.add_argument("--open", action="store_true", help="open the page in the browser")
    page.add_argument(
        "--max-upload",
        type=float,
        default=200.0,
        metavar="MB",
        help="greatest size of an uploaded clip, in megabytes (default: %(default)g)",
    )
    page.add_argument(
        "--max-seconds",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="greatest length of a clip with labels (default: %(default)g)",
    )
    add_library_model_options(parser)
    parser.set_defaults(run=_app)


def _app(options: argparse.Namespace) -> None:
    from openvclip.search.app import Limits, require_gradio, serve

    if options.port is not None and not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: expected a number from 0 to 65535.")
    for name, value in (("upload", options.max_upload), ("seconds", options.max_seconds)):
        if not 0 < value < float("inf"):
            raise UsageError(f"--max-{name} {value:g}: expected a number above 0.")
    limits = Limits(int(options.max_upload * _MEGABYTE), options.max_seconds)
    index = open_index(options.index, options)
    require_gradio()
    _ = index.model  # a model that is not there is reported now, not at the first search
    with suppress(KeyboardInterrupt):  # the usual end
        serve(
            index,
            host=options.host,
            port=options.port,
            limits=limits,
            open_browser=options.open,
            ready=lambda address: _say_where(address, options.host),
        )


def _say_where(address: str, host: str) -> None:
    from openvclip.search.app import is_loopback

    print(f"{address}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if not is_loopback(host):
        print(
            "Everyone who reaches this machine can search the index and watch its videos.",
            file=sys.stderr,
            flush=True,
        )
