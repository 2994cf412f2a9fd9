"""Two models that share memory: the mistake is noticed, and shared frozen entries are accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from openvclip import InterpolatedWeightRegularizer, SWATracker, interpolate, interpolate_into
from openvclip.errors import UsageError
from openvclip.merging import average, model_stock
from tests.helpers import Net, assert_same_state, snapshot
from tests.merging.methods import MERGES, State

METHODS: dict[str, Callable[[State, Sequence[State]], object]] = {
    **MERGES,
    "interpolate": lambda a, others: interpolate(a, others[0], 0.5),
    "interpolate at an end": lambda a, others: interpolate(a, others[0], 1.0),
    "interpolate_into": lambda a, others: interpolate_into(Net(), a, others[0], 0.5),
    "model_stock of others": lambda a, others: model_stock(snapshot(Net()), [a, others[0]]),
}
UNCOPIED: dict[str, Callable[[nn.Module], State]] = {
    "state_dict": nn.Module.state_dict,
    "detached": lambda m: {n: v.detach() for n, v in m.state_dict().items()},
    "float": lambda m: {n: v.float() for n, v in m.state_dict().items() if v.is_floating_point()},
    "on the same device": lambda m: {n: v.to("cpu") for n, v in m.state_dict().items()},
    "wrapped": lambda m: nn.DataParallel(m).state_dict(),
    "parameters": lambda m: dict(m.named_parameters()),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_without_a_copy_is_noticed(method: str) -> None:
    # Report 40
    model = Net()
    clip = model.state_dict()
    model.head.weight.data.add_(1.0)
    with pytest.raises(UsageError, match=r"the same model\. state_dict\(\) does not copy"):
        METHODS[method](clip, [model.state_dict(), snapshot(model)])
    tuned = model.state_dict()
    METHODS[method]({name: value.clone() for name, value in clip.items()}, [tuned, dict(tuned)])


@pytest.mark.parametrize("taken", UNCOPIED)
def test_what_looks_like_a_copy(taken: str) -> None:
    model = Net()
    clip, tuned = UNCOPIED[taken](model), UNCOPIED[taken](model)
    with pytest.raises(UsageError, match="share the memory of all their weights"):
        interpolate(clip, tuned, 0.5)


def test_shared_entries_that_are_meant() -> None:
    model = Net()
    clip = snapshot(model)
    tuned = {**clip, "head.weight": clip["head.weight"] + 2.0}
    result = interpolate(clip, tuned, 0.5)
    torch.testing.assert_close(result.pop("head.weight"), clip["head.weight"] + 1.0)
    assert_same_state(result, {n: value for n, value in clip.items() if n != "head.weight"})
    # Frozen weights are not copied, trained weights are.
    clip = {n: v if n.startswith("frozen") else v.clone() for n, v in model.state_dict().items()}
    model.head.weight.data.add_(2.0)
    result = interpolate(clip, model.state_dict(), 0.5)
    torch.testing.assert_close(result["head.weight"], clip["head.weight"] + 1.0)
    # One object twice is no mistake.
    assert_same_state(interpolate(clip, clip, 0.5), clip)
    assert_same_state(average([clip, dict(clip)]), clip)
    live = dict(model.named_parameters())
    assert average([live]).keys() == live.keys()


def test_parts_of_one_storage_are_two_models() -> None:
    """``torch.func.stack_module_state`` and flat buffers keep several models in one tensor."""
    both = torch.stack([torch.zeros(3), torch.ones(3)])
    assert interpolate({"w": both[0]}, {"w": both[1]}, 0.5)["w"].tolist() == [0.5] * 3
    assert average([{"w": both[0]}, {"w": both[1]}])["w"].tolist() == [0.5] * 3


def test_writing_into_a_model_leaves_the_two_models_alone() -> None:
    # Report 40: every second interpolation would start from the result of the first one
    model = Net()
    tuned = {name: value + 1 for name, value in model.state_dict().items()}
    for pair in ((model.state_dict(), tuned), (tuned, model.state_dict())):
        before = snapshot(model)
        with pytest.raises(UsageError, match="the next interpolation would start from this result"):
            interpolate_into(model, *pair, 0.5)
        assert_same_state(snapshot(model), before)


@pytest.mark.parametrize("how", ["another entry", "another view", "a part"])
def test_writing_into_a_model_whose_memory_is_used_in_another_way(how: str) -> None:
    model = nn.ParameterDict({"emb": torch.randn(3, 3), "head": torch.randn(3, 3)})
    before = snapshot(model)
    clip = {name: value + 1 for name, value in before.items()}
    live = dict(model.state_dict())
    clip["head"] = {
        "another entry": live["emb"],
        "another view": live["head"].t(),
        "a part": live["head"].view(9).as_strided((3, 3), (0, 1)),
    }[how]
    with pytest.raises(UsageError, match=r"1 entries of theta_a or theta_b .*\(head\)"):
        interpolate_into(model, clip, {n: v + 2 for n, v in before.items()}, 0.5)
    assert_same_state(snapshot(model), before)


def test_a_model_beside_its_originals_in_one_buffer_is_written() -> None:
    memory = torch.arange(12.0)
    model = nn.ParameterDict({"w": memory[:4], "v": memory[8:]})
    clip, tuned = {"w": memory[4:8], "v": torch.zeros(4)}, {"w": torch.ones(4), "v": torch.ones(4)}
    interpolate_into(model, clip, tuned, 0.5)
    assert memory.tolist() == [2.5, 3.0, 3.5, 4.0, 4.0, 5.0, 6.0, 7.0, 0.5, 0.5, 0.5, 0.5]


def test_writing_into_a_model_whose_frozen_weights_are_shared() -> None:
    model = Net()
    clip = {n: v if n.startswith("frozen") else v.clone() for n, v in model.state_dict().items()}
    tuned = {n: v.clone() for n, v in model.state_dict().items()}
    tuned["head.weight"] += 2.0
    for _ in range(2):
        interpolate_into(model, clip, tuned, 0.5)
        torch.testing.assert_close(model.head.weight.data, clip["head.weight"] + 1.0)


def test_anchors_and_averages_are_copies() -> None:
    model = Net()
    clip = model.state_dict()
    iwr = InterpolatedWeightRegularizer(model, anchor=clip, interval=(1.0, 1.0))
    swa = SWATracker(model)
    swa.update(model)
    before = snapshot(model)
    for value in model.parameters():
        value.data.add_(1.0)
    with iwr.interpolated():
        assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(swa.averaged_state_dict()["head.weight"], before["head.weight"])
