"""The methods of the page, in the order of its tables.

Each training trains the image tower and the logit scale, unless its docstring says otherwise. The
settings that a training tries on the development lists are its ``grid``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import openvclip
from examples.shapes.trials.registry import (
    Method,
    Runs,
    Training,
    first_end,
    register,
)
from examples.shapes.trials.workshop import EXPANDED, FRAMES, VIDEO, VITA, State, Trained, Workshop
from openvclip import merging, prompting
from openvclip.training.methods import choose_trained

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
"""The learning rates that are tried for a method without other settings."""


def _grid(name: str, pairs: tuple[tuple[float, float], ...]) -> tuple[dict[str, float], ...]:
    return tuple({"lr": lr, name: value} for lr, value in pairs)


def _rates(*rates: float) -> tuple[dict[str, float], ...]:
    return tuple({"lr": lr} for lr in rates)


# --- training ------------------------------------------------------------------------------------


def plain(workshop: Workshop, *, lr: float) -> Trained:
    """Fine-tune with the cross entropy alone, and keep three averages along the run."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    trackers = {
        "swa": workshop.swa(model),
        "ema": openvclip.EMATracker(model, decay=0.98),
    }
    return workshop.fit(model, classifier, lr=lr, trackers=trackers)


def l2(workshop: Workshop, *, lr: float, weight: float) -> Trained:
    """Fine-tune with a penalty: ``weight`` times the squared distance to the original CLIP."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def loss(video: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        distance = torch.stack([(trained[n] - start[n]).square().sum() for n in start]).sum()
        return cross_entropy(classifier(video), label) + weight * distance

    return workshop.fit(model, classifier, lr=lr, loss=loss)


def iwr(workshop: Workshop, *, lr: float, weight: float, **options: Any) -> Trained:
    """Fine-tune with IWR of weight C, and average over the second half of the steps."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    return workshop.fit(model, classifier, lr=lr, iwr={"weight": weight, **options})


def lora(
    workshop: Workshop, *, lr: float, regularized: Mapping[str, float] | None = None
) -> Trained:
    """Train LoRA factors of rank 8 of all matrices in the layers of the image tower."""
    import peft

    from openvclip.weights import adapter_of, lora_anchor

    model, _, tokenizer = workshop.start()
    layers = r"visual\.transformer\..*\.(out_proj|c_fc|c_proj)"
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers)
    wrapped = peft.get_peft_model(model, config)
    inner = wrapped.get_base_model()
    classifier = EXPANDED.classifier(inner, tokenizer, workshop.names())
    # Without an anchor of the products, the regulariser refuses factors, even for plain steps.
    options = {"anchor": lora_anchor(wrapped), **(regularized or {"weight": 0.0})}
    result = workshop.fit(wrapped, classifier, lr=lr, trackers={}, iwr=options)
    result.ends = {"last": dict(adapter_of(wrapped).merged(workshop.clip, 0.0))}
    return result


def on_parts(workshop: Workshop, *, lr: float) -> Trained:
    """Fine-tune once on each trained action alone, with a third of the steps each."""
    results = {
        action: plain(workshop.part([action]), lr=lr) for action in workshop.cell.trained_actions
    }
    whole = Trained({name: result.ends["last"] for name, result in results.items()})
    for result in results.values():
        whole.seconds += result.seconds
        whole.losses += result.losses
        whole.parameters = result.parameters
    return whole


def vifi(workshop: Workshop, *, lr: float) -> Trained:
    """Train both towers, frame by frame, as ViFi-CLIP."""
    model, classifier, _ = workshop.start(VIDEO)
    prompting.fine_tune(model, "both")
    return workshop.fit(model, classifier, lr=lr, trackers={})


def vita(workshop: Workshop, *, lr: float) -> Trained:
    """Train the prompts of Vita-CLIP."""
    model, classifier, _ = workshop.start(VITA)
    return workshop.fit(model, classifier, lr=lr, trackers={})


# --- weights -------------------------------------------------------------------------------------


def _last(runs: Runs) -> list[State]:
    return [ends["last"] for ends in runs.values()]


def _soup(_: State, runs: Runs) -> State:
    return merging.average(_last(runs))


def _stock(clip: State, runs: Runs) -> State:
    return merging.model_stock(clip, _last(runs))


def _lines(clip: State, runs: Runs, *, alpha: float) -> State:
    return merging.lines(clip, _last(runs)[0], alpha=alpha, beta=1 - alpha)


def _parts(runs: Runs) -> list[State]:
    return list(next(iter(runs.values())).values())


def _parts_mean(_: State, runs: Runs) -> State:
    return merging.average(_parts(runs))


# --- the table -----------------------------------------------------------------------------------

PLAIN = "plain"
OTHERS = tuple(f"plain, order {number}" for number in (1, 2))

register(Training(PLAIN, plain, _rates(*RATES)))
for number, name in enumerate(OTHERS, start=1):
    register(Training(name, plain, order=number))
register(
    Training("l2", l2, _grid("weight", ((5e-4, 1e-3), (5e-4, 1e-2), (2e-3, 1e-3), (2e-3, 1e-2))))
)
_IWR = _grid("weight", ((5e-4, 0.5), (1e-3, 0.5), (2e-3, 0.5), (1e-3, 1.0)))
register(Training("iwr", iwr, _IWR, passes=2.0))
for every in (2, 4):
    register(Training(f"iwr, every {every}", partial(iwr, every=every), passes=1 + 1 / every))
register(Training("lora", lora, _rates(5e-4, 1e-3, 2e-3, 4e-3), passes=0.9))
_REGULARIZED = {"weight": 0.5}
register(
    Training(
        "lora + iwr",
        partial(lora, regularized=_REGULARIZED),
        _rates(5e-4, 1e-3, 2e-3, 4e-3),
        passes=1.9,
    )
)
register(Training("parts", on_parts))
register(Training("vifi", vifi, _rates(*RATES), passes=1.1))
register(Training("vita", vita, _rates(2e-3, 4e-3, 8e-3, 1.6e-2), passes=1.7))

register(Method("CLIP", lams=(1.0,), form=FRAMES, does="is the original model, frame by frame"))
register(Method("FINE-TUNE", (PLAIN,), curve=True))
register(Method("L2", ("l2",)))
register(Method("SWA", (PLAIN,), first_end("swa")))
register(Method("EMA", (PLAIN,), first_end("ema")))
register(Method("IWR", ("iwr",)))
register(Method("Open-VCLIP", ("iwr",), first_end("swa"), curve=True))
for every in (2, 4):
    register(
        Method(
            f"Open-VCLIP, every {every}",
            (f"iwr, every {every}",),
            first_end("swa"),
            like="Open-VCLIP",
        )
    )
register(Method("LoRA", ("lora",)))
register(Method("LoRA + IWR", ("lora + iwr",)))
register(
    Method(
        "LiNeS",
        (PLAIN,),
        _lines,
        tuple({"alpha": a} for a in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)),
        lams=(0.0,),
    )
)
register(Method("soup of 3 runs", (PLAIN, *OTHERS), _soup, like="FINE-TUNE"))
register(Method("Model Stock", (PLAIN, *OTHERS), _stock, lams=(0.0,), like="FINE-TUNE"))
register(Method("mean of runs on 3 actions", ("parts",), _parts_mean, like="FINE-TUNE"))
register(Method("ViFi-CLIP", ("vifi",), form=VIDEO))
register(Method("Vita-CLIP", ("vita",), form=VITA, lams=(0.0,)))
