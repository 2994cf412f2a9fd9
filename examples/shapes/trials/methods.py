"""The trainings of the page. The rows are in :mod:`examples.shapes.trials.rows`.

Each training trains the image tower and the logit scale, unless its docstring says otherwise. The
settings that a training tries on the development lists are its ``grid``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

import openvclip
from examples.shapes.trials.registry import Training, register
from examples.shapes.trials.workshop import EXPANDED, VIDEO, VITA, Trained, Workshop
from openvclip import prompting
from openvclip.models.features import similarity_logits
from openvclip.towers.temporal import encode_frames, pool_frames
from openvclip.training import FeatureDistillation, OriginalCLIP, TextEnergy
from openvclip.training.methods import TEXT_TOWER_TEMPLATE, choose_trained

RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3)
"""The learning rates that are tried for a training without other settings."""


def plain(workshop: Workshop, *, lr: float) -> Trained:
    """Fine-tune with the cross entropy alone, and keep three averages along the run."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    steps = workshop.steps
    trackers = {
        "swa": workshop.swa(model),
        "ema": openvclip.EMATracker(model, decay=0.98),
        "gaussian": openvclip.GaussianTracker(model, mu=0.75 * steps, sigma=0.2 * steps),
    }
    return workshop.fit(model, classifier, lr=lr, trackers=trackers)


def l2(workshop: Workshop, *, lr: float, weight: float) -> Trained:
    """Fine-tune with a penalty: ``weight`` times the squared distance to the original CLIP."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    penalty = openvclip.L2ToAnchor(model, weight=weight)

    def loss(video: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(classifier(video), label) + penalty.loss()

    return workshop.fit(model, classifier, lr=lr, loss=loss)


def iwr(workshop: Workshop, *, lr: float, weight: float, **options: Any) -> Trained:
    """Fine-tune with IWR of weight C, and average over the second half of the steps."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    return workshop.fit(model, classifier, lr=lr, iwr={"weight": weight, **options})


def lora(
    workshop: Workshop, *, lr: float, regularised: Mapping[str, float] | None = None
) -> Trained:
    """Train LoRA factors of rank 8 of all matrices in the layers of the image tower."""
    import peft

    from openvclip.weights import adapter_of, lora_anchor

    model, _, tokenizer = workshop.start()
    # "attn" is the whole attention. Factors of its "out_proj" alone would get no gradient, because
    # PyTorch's attention reads the weights of this layer and does not call it.
    layers = r"visual\.transformer\..*\.(attn|c_fc|c_proj)"
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers)
    wrapped = peft.get_peft_model(model, config)
    classifier = EXPANDED.classifier(wrapped.get_base_model(), tokenizer, workshop.names())
    # Without an anchor of the products, the regulariser refuses factors, even for plain steps.
    options = {"anchor": lora_anchor(wrapped), **(regularised or {"weight": 0.0})}
    result = workshop.fit(wrapped, classifier, lr=lr, trackers={}, iwr=options)
    result.ends = {"last": dict(adapter_of(wrapped).merged(workshop.clip, 0.0))}
    return result


def froster(
    workshop: Workshop, *, lr: float, weight: float, regularised: Mapping[str, float] | None = None
) -> Trained:
    """Train both towers with FROSTER's distillation of the features of the original CLIP."""
    model, _, tokenizer = workshop.start()
    original = OriginalCLIP(model)
    choose_trained(model, "finetune", text_tower=True)
    classifier = prompting.VideoClassifier(
        model, tokenizer, workshop.names(), TEXT_TOWER_TEMPLATE, pooling="unit_frames"
    )
    original_texts = classifier.present_text()
    distillation = FeatureDistillation(
        original_texts.shape[-1], weight=weight, seed=workshop.seed
    ).to(workshop.device)

    def loss(video: Tensor, label: Tensor) -> Tensor:
        frames, texts = encode_frames(model, video), classifier.text_features()
        logits = similarity_logits(model, pool_frames(frames, "unit_frames"), texts)
        distance = distillation.loss(frames, original.frames(video), texts, original_texts)
        return cross_entropy(logits, label) + distance

    return workshop.fit(
        model,
        classifier,
        lr=lr,
        loss=loss,
        extra=list(distillation.parameters()),
        iwr=regularised,
    )


def lipsum(workshop: Workshop, *, lr: float, weight: float) -> Trained:
    """Fine-tune with Lipsum-FT's penalty on changed logits of random texts."""
    model, classifier, tokenizer = workshop.start()
    original = OriginalCLIP(model)
    choose_trained(model, "finetune")
    texts = classifier.present_text()
    energy = TextEnergy(original, tokenizer, weight=weight, seed=workshop.seed)

    def loss(video: Tensor, label: Tensor) -> Tensor:
        frames = encode_frames(model, video)
        pooled = pool_frames(frames, "unit_frames")
        logits = similarity_logits(model, pooled, texts)
        return cross_entropy(logits, label) + energy.loss(frames, original.frames(video))

    return workshop.fit(model, classifier, lr=lr, loss=loss)


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


def _grid(name: str, *pairs: tuple[float, float]) -> tuple[dict[str, float], ...]:
    return tuple({"lr": lr, name: value} for lr, value in pairs)


def _rates(*rates: float) -> tuple[dict[str, float], ...]:
    return tuple({"lr": lr} for lr in rates)


PLAIN = "plain"
OTHERS = tuple(f"plain, order {number}" for number in (1, 2))
SHARES = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
EVERY = (2, 4)
IWR_GRID = _grid("weight", (5e-4, 0.5), (2.5e-4, 0.5), (1e-3, 0.5), (1e-3, 1.0))
_C = {"weight": 0.5}

register(Training(PLAIN, plain, _rates(*RATES)))
for _number, _name in enumerate(OTHERS, start=1):
    register(Training(_name, plain, order=_number))
register(
    Training("l2", l2, _grid("weight", (2.5e-4, 1e-2), (5e-4, 1e-3), (5e-4, 1e-2), (1e-3, 1e-2)))
)
register(Training("iwr", iwr, IWR_GRID, passes=2.0))
for _text, _share in SHARES.items():
    register(Training(f"iwr, share {_text}", partial(iwr, share=_share), passes=1 + _share))
for _every in EVERY:
    register(Training(f"iwr, every {_every}", partial(iwr, every=_every), passes=1 + 1 / _every))
register(Training("lora", lora, _rates(5e-4, 1e-3, 2e-3, 4e-3), passes=0.9))
register(
    Training(
        "lora + iwr", partial(lora, regularised=_C), _rates(5e-4, 1e-3, 2e-3, 4e-3), passes=1.9
    )
)
_FROSTER = _grid("weight", (2.5e-4, 2.0), (5e-4, 2.0), (1e-3, 2.0), (1e-3, 0.5))
register(Training("froster", froster, _FROSTER, passes=1.8))
register(Training("froster + iwr", partial(froster, regularised=_C), _FROSTER, passes=3.4))
_LIPSUM = _grid("weight", (2.5e-4, 0.1), (5e-4, 0.1), (1e-3, 0.01), (1e-3, 0.1))
register(Training("lipsum", lipsum, _LIPSUM, passes=1.5))
register(Training("parts", on_parts))
register(Training("vifi", vifi, _rates(*RATES), passes=1.1))
register(Training("vita", vita, _rates(2e-3, 4e-3, 8e-3, 1.6e-2), passes=1.7))
