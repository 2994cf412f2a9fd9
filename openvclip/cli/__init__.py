"""The command ``openvclip``: one module for each subcommand.

A module of a subcommand imports the rest of the package inside functions, so that ``--help`` is
fast.
"""

from openvclip.cli.main import main

__all__ = ["main"]
