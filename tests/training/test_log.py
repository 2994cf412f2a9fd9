"""The log of a run."""

from __future__ import annotations

from openvclip.training.log import LoaderWatch, Step


def test_a_slow_loader_is_told_once_and_a_fast_one_never() -> None:
    slow, fast = LoaderWatch(steps=4), LoaderWatch(steps=4)
    warnings = [slow.add(Step(i, 0.0, 0.0, None, waiting=0.3, seconds=1.0)) for i in range(12)]
    assert [i for i, text in enumerate(warnings) if text] == [3]
    assert warnings[3] is not None
    assert "30% of the last 4 steps was waiting" in warnings[3]
    assert not any(fast.add(Step(i, 0.0, 0.0, None, 0.1, 1.0)) for i in range(12))
