"""The subcommands of ``openvclip``: each module adds its parser, and imports when it runs."""
