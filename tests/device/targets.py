"""The rows of the table of ratios, with their targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: what is divided by what.
        target: the bound. None: the figure has no target.
        at_least: the figure must not be below the target. Otherwise it must not be above.
        digits: decimal places.
    """

    title: str
    target: float | None = None
    at_least: bool = False
    digits: int = 2

    def is_met(self, value: float) -> bool | None:
        """Return whether a figure meets the target; None without a target."""
        if self.target is None:
            return None
        return value >= self.target if self.at_least else value <= self.target

    @property
    def bound(self) -> str:
        """The target as text."""
        if self.target is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.target:.2f}"


ROWS = {
    "forward": Row("expanded / plain, forward", 1.08),
    "backward": Row("expanded / plain, forward + backward", 1.10),
    "compiled": Row("expanded / plain, forward, compiled", 1.08),
    "memory": Row("peak memory, expanded / plain, forward + backward", 1.05),
    "views_time": Row("attention: views / copies, time, forward + backward"),
    "views_memory": Row("attention: views / copies, memory, forward + backward"),
    "one_clip": Row("expanded / plain, forward, one clip"),
    "iwr": Row("IWR step / step of two passes", 1.02),
    "every": Row("IWR step, every=4 / plain step", 1.27),
    "iwr_memory": Row("IWR: extra memory / trained weights", 1.02),
    "share": Row("IWR step, share=0.25 / plain step"),
    "averages": Row("SWA + EMA update / plain step", 0.01, digits=3),
    "sweep": Row("one λ of a sweep / evaluation pass", 1.01),
    "hidden": Row('copies hidden, anchor_device="cpu"', 0.8, at_least=True),
    "trainer": Row("step of finetune.py / bare loop", 1.03),
    "step_rate": Row("IWR step, clips a second", digits=0),
    "loader_rate": Row("loader with 12 processes, clips a second", digits=0),
    "loader": Row("loader, clips a second and process", digits=1),
}
"""The rows, in the order of the table."""
