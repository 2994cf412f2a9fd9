"""Model cards in Markdown: the front matter that the Hugging Face Hub reads, and the sections."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from openvclip.checkpoints.contract import Contract

_SEAL = re.compile(r"\n<!-- Written by openvclip\. [^\n]* Card (\w{16})\. -->\n\Z")
_TAGS = ("openvclip", "clip", "video", "video-classification", "zero-shot", "open-vocabulary")
_IMAGE = "https://huggingface.co/datasets/mishig/sample_images/resolve/main/cat-dog-music.png"


def sealed(text: str) -> str:
    """Return a card with a last line that tells if somebody changes the text later."""
    return (
        f"{text}\n<!-- Written by openvclip. A changed card is kept when the model is saved again. "
        f"Card {_digest(text)}. -->\n"
    )


def is_unchanged(text: str) -> bool:
    """Return whether a card is the result of :func:`sealed`, and nobody changed its text."""
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


# --- parts ---------------------------------------------------------------------------------------


def section(title: str, entries: Mapping[str, Any]) -> str:
    """Return a section with a table of names and values."""
    rows = [
        f"| {_cell(name.replace('_', ' '))} | {_cell(value)} |" for name, value in entries.items()
    ]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows])


def code(title: str, text: str, language: str = "bash") -> str:
    """Return a line of text and a block of code."""
    return f"{title[0].upper()}{title[1:]}:\n\n```{language}\n{text}\n```"


def results_section(results: Mapping[str, Any]) -> str:
    """Return the section of the accuracies in [0, 1], by name."""
    if not results:
        return "## Results\n\nNot evaluated in this run."
    percent = {
        name: f"{100 * value:.1f} %" if isinstance(value, (int, float)) else value
        for name, value in results.items()
    }
    return section("Results", percent)


def _cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


# --- the card of a model with a contract ----------------------------------------------------------


def front_matter(contract: Contract, title: str) -> str:
    """Return the front matter of a card, in YAML between two lines ``---``.

    The Hub shows the licence, the base model, the results and the code of the library from it. The
    model can be tried with images in the widget for zero-shot classification.

    Args:
        contract: the contract of the model.
        title: name of the model.
    """
    from huggingface_hub import ModelCardData

    base, name = _repository(contract), (contract.licence or "").lower()
    # The Hub knows licences by identifiers in lower case, such as "mit".
    licence = (name if re.fullmatch(r"[a-z0-9.-]*", name) else "other") or None
    data = ModelCardData(
        library_name=contract.library,
        tags=list(_TAGS),
        pipeline_tag="zero-shot-image-classification",
        base_model=base,
        base_model_relation="finetune" if base and contract.method else None,
        license=licence,
        license_name=re.sub(r"[^a-z0-9.-]+", "-", name) if licence == "other" else None,
        datasets=[name for name in [_text(contract.data, "dataset")] if _is_id(name)] or None,
        widget=[
            {
                "src": _IMAGE,
                "candidate_labels": "playing music, playing sports",
                "example_title": "Cat and dog",
            }
        ],
        model_name=title,
        eval_results=_results(contract) or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def card_of(contract: Contract, title: str, source: str) -> str:
    """Return the model card of a folder that ``VideoCLIP.save_pretrained`` writes, with its seal.

    Args:
        contract: the contract of the model.
        title: name of the model.
        source: where the code of the card loads the model from: a folder, or ``hf-hub:user/name``.
    """
    facts = {
        "architecture": f"`{contract.model}` of {contract.library}",
        "method": contract.method,
        "weight of the original CLIP (λ)": contract.lam,
        "original CLIP": _base_text(contract),
        "licence": contract.licence,
    }
    parts = [
        front_matter(contract, title),
        f"# {title}",
        _introduction(contract),
        "## Use",
        *usage(contract, source),
        section("Model", {name: value for name, value in facts.items() if value is not None}),
        section("Use on videos", _settings(contract)),
        *([section("Data", contract.data)] if contract.data else []),
        *([results_section(contract.results)] if contract.results else []),
        *([section("Versions", contract.versions)] if contract.versions else []),
    ]
    return sealed("\n\n".join(parts) + "\n")


def usage(contract: Contract, source: str) -> list[str]:
    """Return the code that loads a model and tries it, with openvclip and with its own library."""
    local = source.removeprefix("hf-hub:")
    if contract.library == "open_clip":
        name = source if local != source else f"local-dir:{source}"
        lines = [
            "import open_clip",
            "",
            f'model, preprocess = open_clip.create_model_from_pretrained("{name}")',
            f'tokenizer = open_clip.get_tokenizer("{name}")',
        ]
    else:
        lines = [
            "from transformers import AutoModel, AutoProcessor",
            "",
            f'model = AutoModel.from_pretrained("{local}")',
            f'processor = AutoProcessor.from_pretrained("{local}")',
        ]
    return [
        usage_of_openvclip(source),
        code(
            f"For images, {contract.library} alone loads the same weights",
            "\n".join(lines),
            "python",
        ),
    ]


def usage_of_openvclip(source: str) -> str:
    """Return the code that loads a model with openvclip and tries it.

    Args:
        source: where the model is loaded from: a folder, or ``hf-hub:user/name``.
    """
    lines = [
        "import openvclip",
        "",
        f'model = openvclip.VideoCLIP.from_pretrained("{source}")',
        'prediction = model.classify("clip.mp4", ["archery", "surfing"])',
        "print(prediction)",
    ]
    title = "With openvclip, which reads how the model is used from `openvclip.json`"
    return code(title, "\n".join(lines), "python")


def _introduction(contract: Contract) -> str:
    start = f"`{contract.model}`" + (" fine-tuned on videos" if contract.method else "")
    if contract.expansion is None:
        return f"{start}: a CLIP for videos, in which each frame attends to itself alone."
    window = contract.expansion.window
    return (
        f"{start}: a CLIP for videos, in which each frame also attends to the {window} frames "
        "before and after it. For images it is a plain CLIP."
    ).replace("the 1 frames", "one frame")


def _settings(contract: Contract) -> dict[str, Any]:
    expansion, frames, pixels = contract.expansion, contract.frames, contract.pixels
    return {
        "window": expansion.window if expansion else "not expanded",
        **({"boundary": expansion.boundary} if expansion else {}),
        **({"expanded layers": expansion.layers} if expansion and expansion.layers else {}),
        "frames of a view": frames.num_frames,
        "views": frames.views,
        "sampler": frames.sampler,
        "sampling rate": "one frame per second"
        if frames.sampler == "seconds"
        else f"every {frames.sampling_rate}th frame at {frames.target_fps:g} fps",
        "pixels": f"{pixels.size} x {pixels.size}, `{pixels.name}`",
        "mean and std": f"{list(pixels.mean)}, {list(pixels.std)}",
        "templates": f"{len(contract.templates)}, such as `{contract.templates[0]}`",
        "pooling": contract.pooling,
        "text features": contract.text,
    }


def _base_text(contract: Contract) -> str | None:
    base = contract.base
    if base is None:
        return None
    return f"`{base.name}`" + (f", `{base.pretrained}`" if base.pretrained else "")


def _repository(contract: Contract) -> str | None:
    """Return the repository of the original CLIP on the Hub, if there is one."""
    base = contract.base
    if base is None:
        return None
    if contract.library == "transformers" or base.pretrained is None:
        return base.name if _is_id(base.name) and "/" in base.name else None
    import open_clip

    config = open_clip.get_pretrained_cfg(base.name, base.pretrained)
    repository = "/".join(str(config.get("hf_hub", "")).split("/")[:2])
    return repository or None


def _results(contract: Contract) -> list[Any]:
    from huggingface_hub import EvalResult

    name = _text(contract.data, "dataset") or "videos"
    return [
        EvalResult(
            task_type="video-classification",
            dataset_type=re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or "videos",
            dataset_name=name,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in contract.results.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name, "")
    return value if isinstance(value, str) else ""


def _is_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
