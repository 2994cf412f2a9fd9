"""Measure the memory of IWR, averages and merges of a LoRA fine-tune of ViT-B/16, beside full ones.

Each row is measured in a process of its own: the peak of the resident size during the work, less
the resident size before. The model is open_clip's ViT-B-16 without trained weights. The factors are
random, because memory does not depend on their values. ``python -m tests.benchmarks.lora_memory``
prints the table of docs/lora.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.machine import EXACT_MALLOC, forget_peak, machine, resident_megabytes

RANK = 16
MODELS = 20


def full() -> Any:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    return model


def lora() -> Any:
    import peft

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=r"visual\.transformer\.resblocks\.\d+\.(attn|mlp\.c_fc|mlp\.c_proj)",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(full(), config)


def moved(model: Any) -> None:
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.01)


def regularise(model: Any, **options: Any) -> None:
    import openvclip

    iwr = openvclip.InterpolatedWeightRegularizer(model, **options)
    with iwr.interpolated(0.3):
        pass


def average(model: Any, tracker: Any) -> None:
    for _ in range(MODELS):
        moved(model)
        tracker.update(model)


def rows() -> dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]:
    import openvclip
    from openvclip.weights import AdapterEMATracker, AdapterSWATracker, adapter_of, lora_anchor

    return {
        "IWR, image tower trained whole": (full, regularise),
        "IWR, LoRA": (lora, lambda m: regularise(m, anchor=lora_anchor(m))),
        "SWATracker, image tower trained whole": (
            full,
            lambda m: average(m, openvclip.SWATracker(m)),
        ),
        "AdapterSWATracker": (lora, lambda m: average(m, AdapterSWATracker(m))),
        "AdapterSWATracker, max_rank=64": (
            lora,
            lambda m: average(m, AdapterSWATracker(m, max_rank=64)),
        ),
        "AdapterEMATracker, max_rank=64": (
            lora,
            lambda m: average(m, AdapterEMATracker(m, max_rank=64)),
        ),
        "adapter.merged(clip)": (lora, lambda m: adapter_of(m).merged(base_of(m))),
        "adapter.merge_into(model)": (lora, lambda m: adapter_of(m).merge_into(renamed(m))),
    }


def base_of(model: Any) -> dict[str, torch.Tensor]:
    from openvclip.weights.adapter_model import base_name

    state = model.state_dict()
    return {base_name(n): value for n, value in state.items() if ".lora_" not in n}


class _Renamed(torch.nn.Module):
    """The parameters of a model under other names, without copies."""

    def __init__(self, entries: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in entries.items():
            module: torch.nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))


def renamed(model: Any) -> torch.nn.Module:
    return _Renamed(base_of(model))


def measure(title: str) -> None:
    make, work = rows()[title]
    model = make()
    moved(model)
    forget_peak()
    before = resident_megabytes("VmRSS")
    result = work(model)
    print(f"{resident_megabytes('VmHWM') - before:.0f}")
    del result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", help="one row, in this process")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    model = lora()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / 2**20
    whole = sum(p.nbytes for p in model.parameters()) / 2**20 - trained
    print(f"{machine()}; ViT-B-16: {whole:.0f} MB; LoRA of rank {RANK}: {trained:.1f} MB\n")
    print("| | extra memory, MB |\n| --- | --- |")
    for title in rows():
        command = [sys.executable, "-m", "tests.benchmarks.lora_memory", "--measure", title]
        environment = {**os.environ, **EXACT_MALLOC}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        print(f"| {title} | {done.stdout.strip()} |")


if __name__ == "__main__":
    main()
