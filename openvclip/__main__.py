"""``python -m openvclip`` runs the command ``openvclip``."""

import sys

from openvclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
