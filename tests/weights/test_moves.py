"""An update enters whole or not at all: in pieces, after Ctrl-C, NaN and errors at any point."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from openvclip import EMATracker, GaussianTracker, LAWATracker, SWATracker
from openvclip.errors import NonFiniteWeightsError, UsageError
from openvclip.weights import moves, sums
from openvclip.weights.tracker import WeightTracker
from tests.helpers import assert_same_state, jump, snapshot


class Mixed(nn.Module):
    """Entries of many kinds: dtypes, sizes above and below a piece, strides, no values."""

    def __init__(self) -> None:
        super().__init__()
        self.a_large = nn.Parameter(torch.zeros(9, 5, dtype=torch.bfloat16))
        self.a_turned = nn.Parameter(torch.zeros(7, 6, dtype=torch.float16).t())
        self.a_norm = nn.Parameter(torch.zeros(3))
        self.a_wide = nn.Parameter(torch.zeros(25))
        self.a_scale = nn.Parameter(torch.zeros(()))
        self.a_none = nn.Parameter(torch.zeros(0, 4, dtype=torch.bfloat16))
        self.a_double = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        self.a_last = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("a_counter", torch.tensor(0))


TRACKERS: dict[str, Callable[[nn.Module], WeightTracker]] = {
    "swa": SWATracker,
    "swa, float64": lambda model: SWATracker(model, dtype=torch.float64),
    "ema": lambda model: EMATracker(model, decay=0.7),
    "ema, early": lambda model: EMATracker(model, decay=0.1),
    "lawa": lambda model: LAWATracker(model, k=2),
    "gaussian": lambda model: GaussianTracker(model, mu=20, sigma=5),
    "gaussian, steep": lambda model: GaussianTracker(model, mu=50, sigma=1.5),
}
every_tracker = pytest.mark.parametrize("make", TRACKERS.values(), ids=TRACKERS.keys())


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups in a small model, and several blocks in a short run."""
    monkeypatch.setattr(moves, "_PIECE", 4)
    monkeypatch.setattr(sums, "_BLOCK", 3)


def filled(make: Callable[[nn.Module], WeightTracker], n: int) -> tuple[Mixed, WeightTracker]:
    model = Mixed()
    tracker = make(model)
    for seed in range(n):
        step(model, seed)
        tracker.update(model)
    step(model, n)
    return model, tracker


def step(model: Mixed, seed: int) -> None:
    jump(model, seed)
    model.a_counter.fill_(seed)


# --- pieces --------------------------------------------------------------------------------------


@every_tracker
@pytest.mark.parametrize("check_finite", [True, False])
def test_pieces_change_no_bit(
    make: Callable[[nn.Module], WeightTracker],
    check_finite: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    averages = []
    for piece in (1, 4, 2**17):
        monkeypatch.setattr(moves, "_PIECE", piece)
        model, tracker = filled(make, 0)
        tracker.check_finite = check_finite
        for seed in range(8):
            step(model, seed)
            tracker.update(model)
        averages.append(tracker.averaged_state_dict())
    assert_same_state(averages[0], averages[2])
    assert_same_state(averages[1], averages[2])


def test_the_sums_are_those_of_a_loop() -> None:
    model, swa = filled(SWATracker, 0)
    history = []
    for seed in range(2):
        step(model, seed)
        swa.update(model)
        history.append(snapshot(model))
    average = swa.averaged_state_dict()
    for name, _ in model.named_parameters():
        wide = torch.float64 if name == "a_double" else torch.float32
        expected = (history[0][name].to(wide) + history[1][name].to(wide)) / 2
        assert torch.equal(average[name], expected)


# --- Ctrl-C --------------------------------------------------------------------------------------


class Interruption:
    """Raises KeyboardInterrupt at one bytecode in the modules of the weights.

    Attributes:
        frames: the functions to interrupt; empty for all.
    """

    frames: ClassVar[set[CodeType]] = set()

    def __init__(self, at: list[int]) -> None:
        self.at, self.seen = at, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if "openvclip/weights" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if self.frames and frame.f_code not in self.frames:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.seen += 1
            if self.seen in self.at:
                raise KeyboardInterrupt
        return self


@contextmanager
def tracing(trace: Interruption) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(
    make: Callable[[nn.Module], WeightTracker], n: int, at: list[int]
) -> tuple[Mixed, WeightTracker, Interruption]:
    model, tracker = filled(make, n)
    trace = Interruption(at)
    with tracing(trace):
        try:
            tracker.update(model)
        except KeyboardInterrupt:
            assert trace.seen >= at[0]
    return model, tracker, trace


def values(tracker: WeightTracker) -> dict[str, Tensor]:
    return {**tracker.averaged_state_dict(), "n": torch.tensor(tracker.n_averaged)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@every_tracker
@pytest.mark.parametrize("n", [2, 3])  # inside a block of models, and at its end
def test_ctrl_c_leaves_the_average_before_or_after(
    make: Callable[[nn.Module], WeightTracker], n: int
) -> None:
    before = values(filled(make, n)[1])
    whole, tracker = filled(make, n)
    tracker.update(whole)
    after = values(tracker)
    number = interrupted(make, n, [0])[2].seen  # the bytecodes of an update
    outcomes = []
    for at in range(1 + 7 * n, number, 997 if n == 2 else 1409):
        model, tracker, _ = interrupted(make, n, [at])
        got = values(tracker)
        outcomes.append(same(got, after))
        assert outcomes[-1] or same(got, before), at
        tracker.update(model)  # goes on
    assert len(outcomes) > 3


@pytest.mark.parametrize("n", [0, 2])
def test_ctrl_c_at_the_edges_of_an_update_spoils_no_average(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first group enters and after the last one, the average is whole."""
    whole, tracker = filled(SWATracker, n)
    tracker.update(whole)
    after = values(tracker)
    before = values(filled(SWATracker, n)[1]) if n else None
    frames = {WeightTracker._enter.__code__}
    monkeypatch.setattr(Interruption, "frames", frames)
    number = interrupted(SWATracker, n, [0])[2].seen
    assert number > 20
    for at in range(1, number + 1):
        model, tracker, _ = interrupted(SWATracker, n, [at])
        if tracker.n_averaged:
            got = values(tracker)
            assert same(got, after) or (before is not None and same(got, before)), at
        tracker.update(model)  # goes on


@pytest.mark.parametrize("make", [TRACKERS[n] for n in ("swa", "ema", "gaussian, steep")])
def test_ctrl_c_twice_never_gives_a_part_of_a_model(
    make: Callable[[nn.Module], WeightTracker],
) -> None:
    before = values(filled(make, 2)[1])
    whole, tracker = filled(make, 2)
    tracker.update(whole)
    after = values(tracker)
    saved = tracker.state_dict()
    number = interrupted(make, 2, [0])[2].seen
    for first in range(number // 3, number, 2503):
        for second in (1, 5, 23):
            model, tracker, _ = interrupted(make, 2, [first, first + second])
            if not tracker._is_whole:
                with pytest.raises(UsageError, match="interrupted several times"):
                    tracker.averaged_state_dict()
                with pytest.raises(UsageError, match="load_state_dict"):
                    tracker.update(model)
                tracker.load_state_dict(saved)
                assert same(values(tracker), after)
            else:
                assert same(values(tracker), before) or same(values(tracker), after)


# --- values that are not finite ------------------------------------------------------------------


@every_tracker
@pytest.mark.parametrize("name", ["a_large", "a_norm", "a_double", "a_last"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_late_value_that_is_not_finite(
    make: Callable[[nn.Module], WeightTracker], name: str, bad: float
) -> None:
    model, tracker = filled(make, 2)
    before = values(tracker)
    parameter = dict(model.named_parameters())[name]
    good = parameter.detach().clone()
    parameter.data.view(-1)[-1] = bad
    with pytest.raises(NonFiniteWeightsError, match=rf"1 entries \({name}\).* did not change"):
        tracker.update(model)
    after = values(tracker)
    assert after["n"] == 2
    for entry in before:
        torch.testing.assert_close(after[entry], before[entry], rtol=1e-5, atol=1e-6)
    parameter.data.copy_(good)
    tracker.update(model)
    assert tracker.n_averaged in (2, 3)  # LAWA has two


def test_a_late_nan_costs_float32_weights_no_bit() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    swa = SWATracker(model)
    for seed in range(3):
        jump(model, seed)
        swa.update(model)
    before = swa.averaged_state_dict()
    jump(model, 3)
    model[3].bias.data[-1] = math.nan
    with pytest.raises(NonFiniteWeightsError):
        swa.update(model)
    assert_same_state(swa.averaged_state_dict(), before)


def test_infinite_sums_go_on() -> None:
    """The sum of finite weights can leave the range of float32: as documented, no error."""
    model = nn.Linear(2, 8, bias=False).bfloat16()
    swa = SWATracker(model)
    model.weight.data.fill_(1.0)
    model.weight.data[3, 1] = 3e38
    for _ in range(5):
        swa.update(model)
    average = swa.averaged_state_dict()["weight"]
    assert average[3, 1] == math.inf
    assert average.isinf().sum() == 1
    assert (average[~average.isinf()] == 1.0).all()


# --- errors --------------------------------------------------------------------------------------


@every_tracker
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_an_error_that_comes_back_each_time(
    make: Callable[[nn.Module], WeightTracker], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is taken back, except for rounding."""
    model, tracker = filled(make, 2)
    if isinstance(tracker, LAWATracker):
        passes = 0  # the whole model enters in one call
    before, calls = values(tracker), 0
    real = moves.Move._ready

    def failing(self: moves.Move, group: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > passes and sys._getframe(1).f_code.co_name == "run":
            raise MemoryError("no memory left")
        return real(self, group)

    monkeypatch.setattr(moves.Move, "_ready", failing)
    with pytest.raises(MemoryError, match="no memory left"):
        tracker.update(model)
    monkeypatch.undo()
    if not tracker._is_whole:  # a much larger weight, from which the old sums do not follow
        assert isinstance(tracker, GaussianTracker)
        assert tracker.sigma == 1.5
        with pytest.raises(UsageError, match="load_state_dict"):
            tracker.averaged_state_dict()
        return
    after = values(tracker)
    for entry in before:
        torch.testing.assert_close(after[entry], before[entry], rtol=1e-5, atol=1e-6)
    tracker.update(model)
    assert tracker.n_averaged in (2, 3)  # LAWA has two
