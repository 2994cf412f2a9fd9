"""The methods of the page, in the order of its tables."""

from __future__ import annotations

from functools import partial
from typing import Any

from examples.shapes.trials.methods import EVERY, OTHERS, PLAIN, SHARES
from examples.shapes.trials.registry import METHODS, Method, Runs, first_end, register
from examples.shapes.trials.workshop import ONE_BY_ONE, VIDEO, VITA, State
from openvclip import merging

_AVERAGE = first_end("swa")


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
        when="if you have no videos to train on",
        beware="if you have labelled videos of classes like yours",
    )
)
register(
    Method(
        "FINE-TUNE",
        (PLAIN,),
        curve=True,
        unlabelled=True,
        does="trains the image tower, and interpolates the result with the original CLIP",
        cost="one training, and one evaluation for each λ",
        when="as the start of all other methods: interpolation needs no change of a training that "
        "you have already",
        beware="without interpolation (λ = 0), if the model has to recognise new classes",
    )
)
register(
    Method(
        "L2",
        ("l2",),
        does="adds a penalty on the squared distance to the original CLIP to the loss",
        cost="a few percent of a step, and memory for one copy of the trained weights",
        when="if you can train only once and can't interpolate afterwards",
        beware="if you can't afford to try several weights of the penalty",
    )
)
register(
    Method(
        "SWA",
        (PLAIN,),
        _AVERAGE,
        does="averages the weights over the second half of the training",
        cost="memory for one copy of the trained weights",
        when="in every training: it costs nearly nothing",
        beware="if the learning rate of the second half is still far too high",
    )
)
register(
    Method(
        "EMA",
        (PLAIN,),
        first_end("ema"),
        does="averages the weights, the latest weights most (decay 0.98)",
        cost="memory for one copy of the trained weights",
        when="if you don't know when the training ends",
        beware="with a decay that does not fit the number of steps",
    )
)
register(
    Method(
        "Gaussian average",
        (PLAIN,),
        first_end("gaussian"),
        does="averages the weights, those around three quarters of the training most (a standard "
        "deviation of a fifth of the steps)",
        cost="memory for one copy of the trained weights",
        when="if the first and the last weights of a training should both weigh less",
        beware="if the length of the training is not known when it starts",
    )
)
register(
    Method(
        "IWR",
        ("iwr",),
        does="trains the weights and, in the same step, a random interpolation with the original "
        "CLIP; takes the last weights",
        cost="a second pass in each step, and memory for two copies of the trained weights",
        when="if you interpolate afterwards, and a training may cost twice as much",
        beware="if you use the model without interpolation (λ = 0)",
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
        cost="a second pass in each step, and memory for three copies of the trained weights",
        when="if the model has to keep the trained classes and recognise new ones, and a training "
        "may cost twice as much",
        beware="if you use the model without interpolation (λ = 0)",
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
            cost=f"{_text} of a second pass in each step",
            when="if Open-VCLIP is right for you and its second pass is too expensive",
            beware="with batches of a few clips: the part has at least one clip",
        )
    )
for _every in EVERY:
    register(
        Method(
            f"Open-VCLIP, every {_every}",
            (f"iwr, every {_every}",),
            _AVERAGE,
            like="Open-VCLIP",
            does=f"computes the second pass in each {_every}. step",
            cost=f"a second pass in 1 of {_every} steps",
            when="if Open-VCLIP is right for you and its second pass is too expensive",
            beware="if all steps have to take the same time",
        )
    )
register(
    Method(
        "LoRA",
        ("lora",),
        does="trains factors of rank 8 for the matrices of the image tower, and interpolates their "
        "products",
        cost="less memory for the optimizer; a file of a few megabytes for each model",
        when="if you keep many fine-tuned models, or the optimizer's memory is the limit",
        beware="if all weights can be trained",
    )
)
register(
    Method(
        "LoRA + IWR",
        ("lora + iwr",),
        does="is LoRA, with IWR on the products of the factors",
        cost="a second pass in each step",
        when="if you use LoRA and interpolate afterwards",
        beware="if all weights can be trained",
    )
)
register(
    Method(
        "FROSTER",
        ("froster",),
        _AVERAGE,
        does="trains both towers, and keeps their features near those of the original CLIP up to a "
        "learned residual; averages along the training",
        cost="a pass of the original CLIP in each step, and its memory; the text tower is trained",
        when="if you can't interpolate with the original CLIP afterwards",
        beware="if the memory has no place for a second model",
    )
)
register(
    Method(
        "FROSTER + IWR",
        ("froster + iwr",),
        _AVERAGE,
        does="is FROSTER, with IWR",
        cost="two passes of each model in each step",
        when="if a training may cost more than three times as much",
        beware="if you have not tried one of the two alone",
    )
)
register(
    Method(
        "Lipsum-FT",
        ("lipsum",),
        does="keeps the logits of random texts as they are with the original CLIP",
        cost="a pass of the original CLIP in each step, and its memory",
        when="if the text tower is frozen and new classes are far from the trained ones",
        beware="if you can't afford to try several weights of the penalty",
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
        cost="a singular value decomposition of each matrix, once",
        when="if you have one fine-tuned model and no data to choose λ on",
        beware="if you can choose λ on held-out classes",
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
        cost="nothing beside one evaluation for each α",
        when="in place of interpolation, if the last layers should keep their whole change",
        beware="for a tower of few layers",
    )
)
register(
    Method(
        "soup of 3 runs",
        (PLAIN, *OTHERS),
        _soup,
        like="FINE-TUNE",
        does="is the mean of three trainings with different orders of the clips",
        cost="three trainings",
        when="if you have several trainings of the same kind already",
        beware="if you would have to train for it",
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
        cost="three trainings; no data to choose λ on",
        when="if you have several trainings and no data to choose λ on",
        beware="if you can choose λ on held-out classes",
    )
)
register(
    Method(
        "mean of runs on 3 actions",
        ("parts",),
        _parts_mean,
        like="FINE-TUNE",
        does="is the mean of three trainings, each on one of the trained actions alone",
        cost="as many steps as one training",
        when="if the videos can't be brought together in one place",
        beware="if one training can see all videos",
    )
)
_PARTS = "if the videos can't be brought together in one place"
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
        cost="as many steps as one training, and singular value decompositions, once",
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
        cost="as many steps as one training, and singular value decompositions, once",
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
        cost="the text tower is trained too, so the class names are encoded in each step",
        when="if the class names of your videos are far from the words that CLIP knows",
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
        cost="more tokens in each layer, also when the model is used",
        when="if the weights of CLIP have to stay as they are",
        beware="if the weights of CLIP can be trained",
    )
)

#: The names of the methods of the page. Methods of the reader's own are registered later.
PUBLISHED: tuple[str, ...] = tuple(METHODS)
