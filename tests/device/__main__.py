"""``python -m tests.device``, see :mod:`tests.device.run`."""

import sys
import time

if __name__ == "__main__":
    began = time.monotonic()  # the imports below count too

    from tests.device.run import main

    sys.exit(main(began=began))
