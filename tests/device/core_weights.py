"""The core tests of weights, see :mod:`tests.device.suite`."""

from tests.device.checks import Check, Checks
from tests.device.suite import check_of

CHECKS = Checks([Check("core_weights", check_of("weights"))])
