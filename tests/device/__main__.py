"""``python -m tests.device``, see :mod:`tests.device.run`."""

import sys

from tests.device.run import main

if __name__ == "__main__":
    sys.exit(main())
