"""The model card of a run: files, data, recipe, results and versions in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import atomic_path
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
    """

    name: str
    lam: float | None
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    results: Mapping[str, float]
    files: Mapping[str, str]
    commands: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the card in Markdown."""
        parts = [
            *self._introduction(),
            *(["## Use", *map(_command, self.commands.items())] if self.commands else []),
            _section("Files", self.files),
            _section("Data", self.data),
            _section("Recipe", self.settings),
        ]
        if self.results:
            percent = {name: f"{100 * value:.1f} %" for name, value in self.results.items()}
            parts.append(_section("Results", percent))
        else:
            parts.append("## Results\n\nNot evaluated in this run.")
        parts.append(_section("Versions", package_versions()))
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


def _section(title: str, entries: Mapping[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in entries.items()]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows])


def _command(entry: tuple[str, str]) -> str:
    title, command = entry
    return f"{title[0].upper()}{title[1:]}:\n\n```bash\n{command}\n```"


def _cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
