"""What all commands share: standard streams, progress, and the reading of a command line.

``openvclip`` and the example scripts are commands. This room knows no model, no file of weights
and no video.
"""

from openvclip.commands.parsing import Parser, refuse_unused, unused_option
from openvclip.commands.progress import progress_bar
from openvclip.commands.streams import command, standard_streams

__all__ = [
    "Parser",
    "command",
    "progress_bar",
    "refuse_unused",
    "standard_streams",
    "unused_option",
]
