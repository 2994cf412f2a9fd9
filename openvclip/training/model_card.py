"""The model card of a run: files, data, recipe, results and versions in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import atomic_path
from openvclip.checkpoints.contract import Contract
from openvclip.models.model_card import (
    code,
    front_matter,
    results_section,
    section,
    usage_of_openvclip,
)
from openvclip.models.versions import package_versions


@dataclass(frozen=True)
class ModelCard:
    """The contents of a model card.

    Attributes:
        name: name of the original model.
        lam: weight of the original model in the final weights; ``None`` if the run learned
            prompts.
        settings: settings of the run, by name.
        data: facts about the training videos, by name.
        results: accuracies in [0, 1], by name; may be empty.
        files: description of each file in the folder, by name.
        commands: commands that try the model, by what they do; may be empty.
        contract: how the final weights are used; ``None`` if the run learned prompts.
    """

    name: str
    lam: float | None
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    results: Mapping[str, float]
    files: Mapping[str, str]
    commands: Mapping[str, str] = field(default_factory=dict)
    contract: Contract | None = None

    def text(self) -> str:
        """Return the card in Markdown."""
        commands = [code(title, command) for title, command in self.commands.items()]
        own_use = [usage_of_openvclip(".")] if self.contract is not None else []
        header = [] if self.contract is None else [front_matter(self.contract, self.name)]
        parts = [
            *header,
            *self._introduction(),
            *(["## Use", *own_use, *commands] if own_use or commands else []),
            section("Files", self.files),
            section("Data", self.data),
            section("Recipe", self.settings),
            results_section(self.results),
            section("Versions", package_versions()),
        ]
        return "\n\n".join(parts) + "\n"

    def _introduction(self) -> list[str]:
        method = self.settings.get("method", "openvclip")
        if self.lam is None:
            start = self.settings.get("start_from")
            weights = f"the weights of `{start}`" if start else "its original weights"
            return [
                f"# Prompts for {self.name}, learned on videos",
                f"Prompts for a frozen `{self.name}` with {weights}, learned on videos with "
                f"openvclip's method `{method}`. The prompts work only with these weights.",
            ]
        return [
            f"# {self.name}, fine-tuned on videos",
            f"Weights of `{self.name}` after fine-tuning on videos with openvclip's method "
            f"`{method}`, interpolated with the original weights: "
            f"`{self.lam:g} · original + {1 - self.lam:g} · fine-tuned` (λ = {self.lam:g} weighs "
            "the original).",
        ]

    def write(self, path: Path) -> None:
        """Write the card to ``path``, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")
