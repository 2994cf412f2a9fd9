"""The methods of the page, in the order of its tables."""

from __future__ import annotations

from functools import partial
from typing import Any

from examples.shapes.trials.methods import EVERY, OTHERS, PLAIN, SHARES
from examples.shapes.trials.registry import METHODS, PAPER, Method, Runs, first_end, register
from examples.shapes.trials.workshop import ONE_BY_ONE, VIDEO, VITA, State
from openvclip import interpolate, merging

_AVERAGE = first_end("swa")
_PARTS = "if the videos can't be brought together in one place"

_IWR = "[`InterpolatedWeightRegularizer`][openvclip.InterpolatedWeightRegularizer]"
_SWA = "[`SWATracker`][openvclip.SWATracker]"
_DISTILL = "[`FeatureDistillation`][openvclip.training.FeatureDistillation]"

#: By share, the rows with as many second passes.
_SAME_COST = {f"1/{every}": (f"Open-VCLIP, every {every}",) for every in EVERY}


def _last(runs: Runs) -> list[State]:
    return [ends["last"] for ends in runs.values()]


def _soup(_: State, runs: Runs) -> State:
    return merging.average(_last(runs))


def _stock(clip: State, runs: Runs) -> State:
    return merging.model_stock(clip, _last(runs))


def _lines(clip: State, runs: Runs, *, alpha: float) -> State:
    return merging.lines(clip, _last(runs)[0], alpha=alpha, beta=1 - alpha)


def _monosoup(clip: State, runs: Runs, *, threshold: float) -> State:
    return merging.monosoup(clip, _last(runs)[0], threshold=threshold)


def _as_far(merge: Any, clip: State, runs: Runs, **numbers: float) -> State:
    """Interpolate plain fine-tuning so that it is as far from CLIP as a merge of it."""
    tuned = _last(runs)[0]
    lam = merging.lam_of_same_distance(clip, tuned, merge(clip, runs, **numbers))
    return interpolate(clip, tuned, lam)


def _parts(runs: Runs) -> list[State]:
    return list(next(iter(runs.values())).values())


def _parts_mean(_: State, runs: Runs) -> State:
    return merging.average(_parts(runs))


def _parts_merged(clip: State, runs: Runs, *, merge: Any, scale: float) -> State:
    merged: State = merge(clip, _parts(runs), scale=scale)
    return merged


def _scales(*scales: float) -> tuple[dict[str, float], ...]:
    return tuple({"scale": scale} for scale in scales)


register(
    Method(
        "CLIP",
        lams=(1.0,),
        form=ONE_BY_ONE,
        does="is the original model, frame by frame",
        cost="nothing",
        when="if you have no labelled videos, or the model may not be changed",
        beware="if a frame has to see its neighbours: CLIP takes each frame alone",
    )
)
register(
    Method(
        "FINE-TUNE",
        (PLAIN,),
        curve=True,
        unlabelled=True,
        does="trains the image tower with the cross entropy alone; λ above 0 interpolates the "
        "result with the original CLIP",
        how="[`interpolate`][openvclip.interpolate] for λ ([which "
        "λ?](your-own-loop.md#interpolating-at-the-end))",
        cost="one training, and one evaluation for each λ that you try",
        when="if you want the simplest training; λ, MonoSoup and LiNeS can be tried on its weights "
        "afterwards",
        beware="if the weights of CLIP have to stay as they are",
    )
)
register(
    Method(
        "L2",
        ("l2",),
        does="adds a penalty on the squared distance to the original CLIP to the loss",
        how="[`L2ToAnchor`][openvclip.L2ToAnchor]",
        cost="a few percent of a step, and memory for one copy of the trained weights",
        when="if your training can have one more term in its loss, and no second pass",
        beware="if you can't try several weights of the penalty",
    )
)
register(
    Method(
        "SWA",
        (PLAIN,),
        _AVERAGE,
        does="averages the weights over the second half of the training",
        how=_SWA,
        cost="memory for one copy of the trained weights",
        when="if you have memory for one copy of the trained weights; it needs no further pass",
        beware="if the training has only a few steps after the start of the average",
    )
)
register(
    Method(
        "EMA",
        (PLAIN,),
        first_end("ema"),
        does="averages the weights, the latest weights most (decay 0.98)",
        how="[`EMATracker`][openvclip.EMATracker]",
        cost="memory for one copy of the trained weights",
        when="if an average has to be there at any step of a training; it needs no further pass",
        beware="if you can't choose its decay, which has to fit the number of steps",
    )
)
register(
    Method(
        "Gaussian average",
        (PLAIN,),
        first_end("gaussian"),
        does="averages the weights, those around three quarters of the training most (a standard "
        "deviation of a fifth of the steps)",
        how="[`GaussianTracker`][openvclip.GaussianTracker]",
        cost="memory for one copy of the trained weights",
        when="if the number of steps is known when the training starts; it needs no further pass",
        beware="if the training may end early: the weights of the average follow from the number "
        "of steps",
    )
)
register(
    Method(
        "IWR",
        ("iwr",),
        does="trains the weights and, in the same step, a random interpolation with the original "
        "CLIP; takes the last weights",
        how=_IWR,
        cost="a second pass in each step, and memory for two copies of the trained weights",
        when="if you interpolate afterwards, and a training may cost twice as much",
        beware="if the memory has no place for two more copies of the trained weights",
    )
)
register(
    Method(
        "Open-VCLIP",
        ("iwr",),
        _AVERAGE,
        curve=True,
        unlabelled=True,
        does="is IWR together with SWA, interpolated with the original CLIP",
        how=f"{_IWR} and {_SWA} ([in your own loop](your-own-loop.md))",
        cost="a second pass in each step, and memory for three copies of the trained weights",
        beside=("IWR",),
        when="if you interpolate afterwards, and a training may cost twice as much",
        beware="if the memory has no place for three more copies of the trained weights",
    )
)
for _text in SHARES:
    register(
        Method(
            f"Open-VCLIP, share {_text}",
            (f"iwr, share {_text}",),
            _AVERAGE,
            like="Open-VCLIP",
            does=f"computes the second pass on a random {_text} of the clips of a step",
            how=f"{_IWR} with `share={1 / int(_text[2:]):g}`",
            cost=f"{_text} of a second pass in each step",
            beside=(PAPER, *_SAME_COST.get(_text, ())),
            when="if the second pass of Open-VCLIP is too expensive",
            beware="with small batches: a part has at least one clip, so a small batch saves less",
        )
    )
for _every in EVERY:
    register(
        Method(
            f"Open-VCLIP, every {_every}",
            (f"iwr, every {_every}",),
            _AVERAGE,
            like="Open-VCLIP",
            does=f"computes the second pass in one of {_every} steps",
            how=f"{_IWR} with `every={_every}`",
            cost=f"a second pass in 1 of {_every} steps",
            beside=(PAPER,),
            when="if the second pass of Open-VCLIP is too expensive",
            beware="if all steps have to take the same time",
        )
    )
register(
    Method(
        "LoRA",
        ("lora",),
        does="trains factors of rank 8 for the matrices of the image tower, and interpolates their "
        "products",
        how="[LoRA with `openvclip.Adapter`](lora.md)",
        cost="less memory for the optimizer; a file of a few megabytes for each model",
        when="if you keep many fine-tuned models, or the memory of the optimizer is the limit",
        beware="if your training can't use adapters (here: of peft)",
    )
)
register(
    Method(
        "LoRA + IWR",
        ("lora + iwr",),
        does="is LoRA, with IWR on the products of the factors",
        how="[LoRA with `openvclip.Adapter`](lora.md)",
        cost="a second pass in each step",
        beside=("LoRA",),
        when="if you use LoRA, interpolate afterwards, and a training may cost twice as much",
        beware="if your training can't use adapters (here: of peft)",
    )
)
register(
    Method(
        "FROSTER",
        ("froster",),
        _AVERAGE,
        does="trains both towers, and keeps their features near those of the original CLIP up to a "
        "learned residual; averages along the training",
        how=f"{_DISTILL} and {_SWA} ([its recipe](recipes.md#froster))",
        cost="a pass of the original CLIP in each step, and its memory; the text tower is trained",
        when="if the text tower may be trained too, and a step may have one pass of the original "
        "CLIP more",
        beware="if the memory has no place for a second model, or other systems use the text tower",
    )
)
register(
    Method(
        "FROSTER + IWR",
        ("froster + iwr",),
        _AVERAGE,
        does="is FROSTER, with IWR",
        how=f"{_DISTILL} and {_IWR}",
        cost="two passes of each model in each step",
        beside=("FROSTER",),
        when="if a training may cost more than three times as much",
        beware="if the memory has no place for a second model, or other systems use the text tower",
    )
)
register(
    Method(
        "Lipsum-FT",
        ("lipsum",),
        does="keeps the logits of random texts as they are with the original CLIP",
        how="[`TextEnergy`][openvclip.training.TextEnergy]",
        cost="a pass of the original CLIP in each step, and its memory",
        when="if the text tower stays frozen, and a step may have one pass of the original CLIP "
        "more",
        beware="if the memory has no place for a second model, or you can't try several weights "
        "of the penalty",
    )
)
register(
    Method(
        "MonoSoup",
        (PLAIN,),
        _monosoup,
        tuple({"threshold": t} for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
        lams=(0.0,),
        does="shrinks the weak directions of the change of each matrix",
        how="[`merging.monosoup`][openvclip.merging.monosoup]",
        cost="a singular value decomposition of each matrix, once",
        when="if you have one fine-tuned model and no data to choose λ on (here its threshold "
        "was chosen on the development classes)",
        beware="if the model has no matrices that changed, such as a model whose biases alone "
        "were trained",
    )
)
register(
    Method(
        "LiNeS",
        (PLAIN,),
        _lines,
        tuple({"alpha": a} for a in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)),
        lams=(0.0,),
        does="shrinks the changes of the first layers most",
        how="[`merging.lines`][openvclip.merging.lines] with `beta=1 - alpha`",
        cost="nothing beside one evaluation for each α",
        when="if you have one fine-tuned model, and the last layers should keep their whole change",
        beware="if the depth of a layer can't be read from the names of the entries",
    )
)
for _name, _merge in (("MonoSoup", _monosoup), ("LiNeS", _lines)):
    register(
        Method(
            f"FINE-TUNE, as far as {_name}",
            (PLAIN,),
            partial(_as_far, _merge),
            lams=(0.0,),
            like=_name,
            control=True,
            does=f"interpolates FINE-TUNE with the original CLIP; λ is such that the weights are "
            f"as far from CLIP as those of {_name}",
            how="[`merging.lam_of_same_distance`][openvclip.merging.lam_of_same_distance]",
            cost=f"as {_name}",
            when=f"to see what {_name} brings beside the smaller change",
            beware="if λ can be chosen on data",
        )
    )
register(
    Method(
        "soup of 3 runs",
        (PLAIN, *OTHERS),
        _soup,
        like="FINE-TUNE",
        does="is the mean of three trainings with different orders of the clips",
        how="[`merging.average`][openvclip.merging.average]",
        cost="three trainings",
        when="if you have several trainings of the same kind already",
        beware="if you would have to train for it: it costs three trainings",
    )
)
register(
    Method(
        "Model Stock",
        (PLAIN, *OTHERS),
        _stock,
        lams=(0.0,),
        like="FINE-TUNE",
        does="interpolates the mean of three trainings with the original CLIP, each tensor by the "
        "angles of the changes",
        how="[`merging.model_stock`][openvclip.merging.model_stock]",
        cost="three trainings; no data to choose λ on",
        when="if you have several trainings, and no data to choose λ on",
        beware="if you would have to train for it: it costs three trainings",
    )
)
register(
    Method(
        "mean of runs on 3 actions",
        ("parts",),
        _parts_mean,
        like="FINE-TUNE",
        does="is the mean of three trainings, each on one of the trained actions alone",
        how="[`merging.average`][openvclip.merging.average]",
        cost="as many steps as one training",
        when=_PARTS,
        beware="if one training can see all videos",
    )
)
register(
    Method(
        "TSV-M of runs on 3 actions",
        ("parts",),
        partial(_parts_merged, merge=merging.tsv_merge),
        _scales(0.3, 0.5, 0.7, 1.0, 1.3, 1.6),
        lams=(0.0,),
        like="FINE-TUNE",
        does="merges the leading singular vectors of the changes of three trainings, each on one "
        "of the trained actions alone",
        how="[`merging.tsv_merge`][openvclip.merging.tsv_merge]",
        cost="as many steps as one training, and singular value decompositions, once",
        beside=("mean of runs on 3 actions",),
        when=_PARTS,
        beware="if one training can see all videos",
    )
)
register(
    Method(
        "Iso-C of runs on 3 actions",
        ("parts",),
        partial(_parts_merged, merge=merging.iso_c),
        _scales(0.3, 0.5, 0.7, 1.0, 1.3, 1.6),
        lams=(0.0,),
        like="FINE-TUNE",
        does="adds the changes of three trainings, each on one of the trained actions alone, and "
        "makes the singular values of each matrix equal",
        how="[`merging.iso_c`][openvclip.merging.iso_c]",
        cost="as many steps as one training, and singular value decompositions, once",
        beside=("mean of runs on 3 actions",),
        when=_PARTS,
        beware="if one training can see all videos",
    )
)
register(
    Method(
        "ViFi-CLIP",
        ("vifi",),
        form=VIDEO,
        does="trains both towers, frame by frame, and interpolates the result with CLIP",
        how="[its recipes](recipes.md)",
        cost="the text tower is trained too, so the class names are encoded in each step",
        when="if the image tower has to stay without attention over frames, and the text tower "
        "may be trained",
        beware="if other models or an index of texts depend on the text tower",
    )
)
register(
    Method(
        "Vita-CLIP",
        ("vita",),
        form=VITA,
        lams=(0.0,),
        does="trains prompts for both towers and keeps all weights of CLIP",
        how="[its recipe](recipes.md#vita-clip)",
        cost="more tokens in each layer, also when the model is used",
        when="if the weights of CLIP have to stay as they are",
        beware="if the model has to be as fast as CLIP: each layer has more tokens",
    )
)

#: The names of the methods of the page. Methods of the reader's own are registered later.
PUBLISHED: tuple[str, ...] = tuple(METHODS)
