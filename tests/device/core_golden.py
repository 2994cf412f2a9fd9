"""The core tests of the released implementations, see :mod:`tests.device.suite`."""

from tests.device.checks import Check, Checks
from tests.device.suite import check_of

CHECKS = Checks([Check("core_golden", check_of("golden"))])
