"""State dicts of models under fully_shard (FSDP2): interpolation and merges, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from openvclip import interpolate, interpolate_into, load_checkpoint, save_checkpoint
from openvclip.errors import UsageError
from tests.distributed.sharded import full, sharded
from tests.distributed.training import Net, assert_close, batch, check, snapshot
from tests.merging.methods import MERGES


@check
def fsdp_models_take_whole_state_dicts(out: Path) -> None:
    # Report 23 (pytorch#136336)
    clip, tuned = snapshot(Net(0)), snapshot(Net(1))
    expected = {name: 0.25 * clip[name] + 0.75 * tuned[name] for name in clip}
    sharded_clip, sharded_tuned = sharded(0).state_dict(), sharded(1).state_dict()
    for a, b in ((clip, tuned), (sharded_clip, sharded_tuned), (sharded_clip, tuned)):
        model = sharded(2)
        with torch.no_grad():
            model(batch(0)[0])  # leaves gathered weights, which must not be used again
        interpolate_into(model, a, b, 0.25)
        assert_close(full(model.state_dict()), expected)
        x = batch(0)[0]
        reference = Net(0)
        reference.load_state_dict(expected)
        torch.testing.assert_close(model(x), reference(x))
        plain = Net(2)
        interpolate_into(plain, a, b, 0.25)
        assert_close(plain.state_dict(), expected)


@check
def fsdp_models_load_files(out: Path) -> None:
    # Report 23 (pytorch#136336)
    tuned = snapshot(Net(1))
    path = out / "whole.safetensors"
    if distributed.get_rank() == 0:
        save_checkpoint(tuned, path)
    distributed.barrier()
    model = sharded(2)
    with torch.no_grad():
        model(batch(0)[0])  # leaves gathered weights, which must not be used again
    load_checkpoint(path, model)
    assert_close(full(model.state_dict()), tuned)
    reference = Net(1)
    torch.testing.assert_close(model(batch(0)[0]), reference(batch(0)[0]))


@check
def fsdp_state_dicts_are_interpolated_and_stay_sharded(out: Path) -> None:
    # Report 23 (pytorch#136336)
    clip, tuned = snapshot(Net(0)), snapshot(Net(1))
    sharded_clip, sharded_tuned = sharded(0).state_dict(), sharded(1).state_dict()
    for lam in (0.0, 0.25, 1.0):
        expected = {name: lam * clip[name] + (1 - lam) * tuned[name] for name in clip}
        results = [
            interpolate(sharded_clip, sharded_tuned, lam),
            interpolate(clip, sharded_tuned, lam),
        ]
        results.append(interpolate(clip, sharded_tuned, lam, out=dict(results[0])))
        for result in results:
            for name, value in result.items():
                assert isinstance(value, DTensor) == isinstance(sharded_tuned[name], DTensor)
            assert_close(full(result), expected)
        assert_close(interpolate(sharded_clip, tuned, lam), expected)
    model = sharded(0)
    with pytest.raises(UsageError, match="share the memory of all their weights"):
        interpolate(model.state_dict(), model.state_dict(), 0.5)


@check
def merges_of_sharded_state_dicts(out: Path) -> None:
    clip, tuned = snapshot(Net(0)), snapshot(Net(1))
    sharded_clip, sharded_tuned = sharded(0).state_dict(), sharded(1).state_dict()
    for method in MERGES.values():
        expected = method(clip, [tuned, dict(tuned)])
        for a, b in ((sharded_clip, sharded_tuned), (sharded_clip, tuned)):
            result = method(a, [b, dict(b)])
            assert_close(full(result), expected)
            name = "body.0.weight" if "body.0.weight" in result else "weight"
            assert isinstance(result[name], DTensor)
        assert_close(method(clip, [sharded_tuned, dict(sharded_tuned)]), expected)
