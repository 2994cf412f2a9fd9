"""IWR and weight averages in the ``Trainer`` of Lightning.

Both packages are supported, ``lightning`` and ``pytorch_lightning``. A callback belongs to the
packages that are imported when the callback is created.
"""

from openvclip.integrations.lightning.averaging import AveragingCallback
from openvclip.integrations.lightning.regularization import IWRCallback, regularized_backward

__all__ = ["AveragingCallback", "IWRCallback", "regularized_backward"]
