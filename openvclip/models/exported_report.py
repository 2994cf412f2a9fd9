"""Show what an exported model is, for ``openvclip inspect``."""

from __future__ import annotations

import os

from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.checkpoints.contract_report import contract_text
from openvclip.checkpoints.exported_files import read_exported_texts
from openvclip.errors import listed
from openvclip.models.exported_writing import FACTS_KEY, ExportFacts, facts_of_texts

_RETURNS = {
    "image": "one feature for each clip",
    "frames": "one feature for each frame",
    "text": "one feature for each text",
}


def export_report(path: str | os.PathLike[str]) -> str:
    """Return the content of an exported model as text. The weights are not read.

    Args:
        path: a file that ends in ``.onnx`` or ``.pt2``. If another program wrote the file, its
            texts are shown.

    Raises:
        CheckpointError: the file can't be read, or is no exported model.
    """
    texts = read_exported_texts(path)
    rows = [("file", f"{os.fspath(path)} (exported model)")]
    if FACTS_KEY in texts:
        rows += _rows(facts_of_texts(texts, path))
    others = {name: text for name, text in texts.items() if name not in (FACTS_KEY, CONTRACT_KEY)}
    rows.append(("metadata", ", ".join(f"{name}={text}" for name, text in others.items())))
    report = "\n".join(f"{title:<12} {text}" for title, text in rows if text)
    return f"{report}\n{contract_text(path, texts)}".rstrip()


def _rows(facts: ExportFacts) -> list[tuple[str, str]]:
    labels = [] if facts.labels is None else [repr(label) for label in facts.labels]
    takes = "token ids"
    if facts.part != "text":
        kind = "8-bit frames" if facts.pixels == "uint8" else "normalised frames"
        number = "any number of" if facts.frames is None else str(facts.frames)
        takes = f"clips with {number} {kind}"
    scale = "" if facts.logit_scale is None else f", scale {facts.logit_scale:g}"
    returns = _RETURNS.get(facts.part, f"logits of {len(labels)} labels{scale}")
    versions = facts.versions or {}
    return [
        ("part", facts.part),
        ("takes", takes),
        ("returns", returns),
        ("labels", listed(labels, 10) if labels else ""),
        ("weights", facts.weights),
        ("written by", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
