"""The command ``openvclip``: one module for each subcommand, which imports when it runs."""

from openvclip.cli.main import main

__all__ = ["main"]
