"""The error texts for unknown names of models and of pretrained weights.

People know a CLIP by the name of its repository on the Hugging Face Hub. The errors name the same
model in open_clip.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from openvclip.errors import ModelNameError, did_you_mean, listed, near_path

# Names of published models in other libraries. The groups give the name in open_clip.
_SIZES = {"b": "B", "base": "B", "l": "L", "large": "L", "h": "H", "so400m": "SO400M"}
_FORMS = (
    # openai/clip-vit-base-patch16, openai/clip-vit-large-patch14-336
    (r"clip-vit-(?P<size>\w+)-patch(?P<patch>\d+)(-(?P<pixels>\d+))?", "", ("openai",)),
    # ViT-B/16, ViT-L/14@336px
    (r"vit-(?P<size>b|l)/(?P<patch>\d+)(@(?P<pixels>\d+)px)?", "", ("openai",)),
    # facebook/metaclip-b16-400m
    (r"metaclip-(?P<size>b|l|h)(?P<patch>\d+)-400m", "", ("metaclip_400m",)),
    (r"metaclip-(?P<size>b|l|h)(?P<patch>\d+)-fullcc.*", "", ("metaclip_fullcc",)),
    # google/siglip-base-patch16-224
    (r"siglip-(?P<size>\w+)-patch(?P<patch>\d+)-(?P<pixels>\d+)", "-SigLIP", ("webli",)),
    (r"siglip2-(?P<size>\w+)-patch(?P<patch>\d+)-(?P<pixels>\d+)", "-SigLIP2", ("webli",)),
)


def unknown_model(name: str) -> ModelNameError:
    """Return the error for a name that is not a model of open_clip."""
    import open_clip

    if os.path.isfile(name):
        return ModelNameError(
            f"{name} is a file, and no name of a model. If it holds weights: give it as "
            "--checkpoint (a fine-tuned model) or --pretrained (the original CLIP), and the name "
            "of the architecture as --model. In Python: load_model(name, pretrained, checkpoint=)."
        )
    models = open_clip.list_models()
    twin = same_model(name)
    if twin is not None:
        return ModelNameError(
            f"{name!r} is not a name of open_clip. The same model in open_clip is {twin[0]} with "
            f"the weights {twin[1]}: give --model {twin[0]} --pretrained {twin[1]}, or "
            f"load_model({twin[0]!r}, {twin[1]!r})." + _with_transformers(name)
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not did_you_mean(name, models):
        return ModelNameError(
            f"open_clip has no model {name!r}. If this is a repository on the Hugging Face Hub "
            f"with open_clip's files, give 'hf-hub:{name}'. Expected one of "
            "open_clip.list_models(), or a JSON file with an open_clip model configuration."
            + _with_transformers(name)
        )
    return ModelNameError(
        f"open_clip has no model {name!r}{did_you_mean(name, models)}. Expected one of "
        "open_clip.list_models(), or a JSON file with an open_clip model configuration."
    )


def _with_transformers(name: str) -> str:
    """Return how to load a name on the Hugging Face Hub with transformers."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ""
    return f" With transformers: give 'transformers:{name}'."


def unknown_weights(tag: str, name: str, tags: Sequence[str]) -> ModelNameError:
    """Return the error for weights that are neither a file nor a tag of open_clip for a model."""
    import open_clip

    looks_like_path = os.sep in tag or bool(os.path.splitext(tag)[1])
    if looks_like_path and same_model(tag) is None:
        return ModelNameError(
            f"There is no file {tag}{near_path(tag)}; expected a file of weights of the original "
            f"CLIP, or a tag of open_clip for {name}: {listed(tags, 10) or '(there is none)'}."
        )
    if not tags:
        return ModelNameError(
            f"{tag!r} is neither a file of weights nor a tag of open_clip: open_clip has no "
            f"weights for {name}. Give a file of weights (--pretrained, in Python pretrained=)."
        )
    others = [model for model, other in open_clip.list_pretrained() if other == tag]
    twin = same_model(tag)
    if twin is not None:
        hint = f" (in open_clip: the model {twin[0]} with the weights {twin[1]})"
    elif f"{name}-quickgelu" in others:
        hint = f" (the model {name}-quickgelu has these weights)"
    else:
        hint = did_you_mean(tag, tags)
    return ModelNameError(
        f"{tag!r} is neither a file of weights nor a tag of open_clip for {name}{hint}. Tags: "
        f"{listed(tags, 10)}."
    )


def same_model(name: str) -> tuple[str, str] | None:
    """Return the name and the tag in open_clip of a model that is known under another name.

    Args:
        name: the name of a repository on the Hugging Face Hub, with or without ``hf-hub:`` or the
            address of the Hub, or OpenAI's name, such as ``"ViT-L/14@336px"``.
    """
    import open_clip

    repository = (
        re.sub(r"^(hf-hub:|https?://(www\.)?huggingface\.co/)", "", name).strip("/").lower()
    )
    published = open_clip.list_pretrained()
    twins = [
        (model, tag)
        for model, tag in published
        if _repository(open_clip.get_pretrained_cfg(model, tag)) == repository
    ]
    for form, kind, tags in _FORMS:
        match = re.fullmatch(r"(?:[\w.-]+/)?" + form, repository)
        if match is not None and match["size"] in _SIZES:
            size = match.groupdict().get("pixels") or "224"
            pixels = "" if size == "224" else f"-{size}"
            tower = f"ViT-{_SIZES[match['size']]}-{match['patch']}"
            names = (f"{tower}{kind}{pixels}", f"{tower}{pixels}{kind}-quickgelu")
            twins += [(model, tag) for model in names for tag in tags if (model, tag) in published]
    # Weights that open_clip has for both activations were trained with QuickGELU.
    return max(twins, key=lambda twin: "quickgelu" in twin[0], default=None)


def _repository(config: Mapping[str, object]) -> str:
    """Return the repository of pretrained weights, in lower case."""
    return "/".join(str(config.get("hf_hub", "")).lower().split("/")[:2])
