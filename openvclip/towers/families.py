"""The registry of tower families, and finding the image tower of a model.

A family is the set of image towers that one library builds. Each family is one file beside this
one. To add a family:

1. Write a file with the constant ``FAMILY``, an instance of
   :class:`~openvclip.towers.family.Family`. Its attributes say what a family file must give: the
   expanded class of each tower and of each attention module, the class with prompts of each tower,
   and functions for the layers, the sizes, the input check and the features of a tower.
   ``openvclip/towers/open_clip.py`` is the shortest example. The file imports its library at the
   top.
2. Write a function here that imports the file and returns ``FAMILY``, and add one
   :class:`RegistryEntry` to :data:`REGISTRY`.

Only this file lists the families. The file of a family is imported only if its library is in use,
so importing :mod:`openvclip.towers` imports none of the libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from openvclip.errors import ExpansionError, UnsupportedModelError
from openvclip.towers.family import Family, TowerFacts
from openvclip.towers.prompted import is_prompted


def _open_clip() -> Family:
    from openvclip.towers.open_clip import FAMILY

    return FAMILY


def _timm() -> Family:
    from openvclip.towers.timm import FAMILY

    return FAMILY


def _timm_naflex() -> Family:
    from openvclip.towers.timm_naflex import FAMILY

    return FAMILY


def _hugging_face() -> Family:
    from openvclip.towers.hf import FAMILY

    return FAMILY


def _hugging_face_clip_like() -> Family:
    from openvclip.towers.hf_clip_like import FAMILY

    return FAMILY


def _hugging_face_siglip2() -> Family:
    from openvclip.towers.hf_siglip2 import FAMILY

    return FAMILY


@dataclass(frozen=True)
class RegistryEntry:
    """A family of towers.

    Attributes:
        library: top-level package of the library.
        load: function that imports the file of the family and returns its ``FAMILY``.
        towers: the supported towers in words, for an error text.
        modules: modules of the library that define the towers. The library is in use if one of
            these modules has been imported. Default: the top-level package.
    """

    library: str
    load: Callable[[], Family]
    towers: str
    modules: tuple[str, ...] = ()

    def in_use(self) -> bool:
        """Return whether the program has imported the library."""
        return any(name in sys.modules for name in self.modules or (self.library,))


REGISTRY: tuple[RegistryEntry, ...] = (
    RegistryEntry("open_clip", _open_clip, "open_clip's VisionTransformer"),
    RegistryEntry(
        "timm",
        _timm,
        "timm's VisionTransformer (SigLIP, ViTamin, MobileCLIP-B) and Eva (EVA01, EVA02, PE), "
        "inside open_clip or alone",
    ),
    RegistryEntry(
        "timm",
        _timm_naflex,
        "timm's NaFlexVit (SigLIP 2 NaFlex), inside open_clip or alone",
        modules=("timm.models.naflexvit",),
    ),
    RegistryEntry(
        "transformers",
        _hugging_face,
        "the vision models of Hugging Face's CLIP and SigLIP (transformers 5)",
        modules=(
            "transformers.models.clip.modeling_clip",
            "transformers.models.siglip.modeling_siglip",
        ),
    ),
    RegistryEntry(
        "transformers",
        _hugging_face_clip_like,
        "those of MetaCLIP 2, AltCLIP, Chinese-CLIP and CLIPSeg (transformers 5)",
        modules=(
            "transformers.models.metaclip_2.modeling_metaclip_2",
            "transformers.models.altclip.modeling_altclip",
            "transformers.models.chinese_clip.modeling_chinese_clip",
            "transformers.models.clipseg.modeling_clipseg",
        ),
    ),
    RegistryEntry(
        "transformers",
        _hugging_face_siglip2,
        "those of SigLIP 2 NaFlex (transformers 5)",
        modules=("transformers.models.siglip2.modeling_siglip2",),
    ),
)
"""All families."""


def families_in_use() -> list[Family]:
    """Return the families whose library is in use and works with this package."""
    return _load_families()[0]


def require_frames(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if ``model`` is known to encode no frames.

    Models for audio are an example. Models of unknown kinds pass.
    """
    for family in families_in_use():
        family.find_towers(model)


def is_library_model(model: nn.Module) -> bool:
    """Return whether the class of ``model`` is defined in the library of a family."""
    library = type(model).__module__.partition(".")[0]
    return any(entry.library == library for entry in REGISTRY)


def _load_families() -> tuple[list[Family], list[str]]:
    """Return the families in use, and an error text for each library that can't be used.

    If a library is too old for its family, the other families still work.
    """
    families: list[Family] = []
    problems: list[str] = []
    for entry in REGISTRY:
        if entry.in_use():
            try:
                families.append(entry.load())
            except ImportError as error:
                problems.append(
                    f"Towers of {entry.library} can't be used with the installed version: {error}"
                )
    return families, problems


def find_tower(model: nn.Module, purpose: str = "be expanded in time") -> tuple[Family, nn.Module]:
    """Return the single tower without prompts in ``model``, and its family.

    Args:
        model: the model to search. Its tower may be expanded.
        purpose: what the tower is needed for, in words for the error text.

    Raises:
        UnsupportedModelError: if the model has no supported tower, or several.
        ExpansionError: if the tower has prompts.
    """
    families, problems = _load_families()
    towers = [(family, tower) for family in families for tower in family.find_towers(model)]
    if len(towers) == 1:
        return towers[0]
    if towers:
        raise UnsupportedModelError(
            f"The model holds {len(towers)} towers that can {purpose}; expected one. Pass the "
            "tower itself, for example model.visual."
        )
    if is_prompted(model):
        raise ExpansionError(
            "The tower has prompts. A tower can be expanded or restored only without prompts. "
            "Call openvclip.prompting.detach(model) first."
        )
    supported = "; ".join(entry.towers for entry in REGISTRY)
    message = (
        f"The image tower is a {_name_of_tower(model)}, which can't {purpose}. "
        f"Supported towers: {supported}."
    )
    raise UnsupportedModelError(" ".join([message, *problems]))


def _name_of_tower(model: nn.Module) -> str:
    visual = getattr(model, "visual", getattr(model, "vision_model", model))
    trunk = getattr(visual, "trunk", None)  # open_clip's wrapper around a tower of timm
    name = type(visual).__name__
    return name if trunk is None else f"{name} around {type(trunk).__name__}"


def find_tower_for_prompts(model: nn.Module) -> tuple[Family, nn.Module]:
    """Return the tower in ``model`` that has prompts or can get prompts, and its family.

    Raises:
        UnsupportedModelError: if the model has no supported tower, or several.
    """
    for family in families_in_use():
        for tower in family.find_prompted_towers(model):
            return family, tower
    family, tower = find_tower(model, "take prompts")
    family.layers(tower)  # raises if the layers are of an unknown class
    return family, tower


def tower_facts(model: nn.Module) -> TowerFacts:
    """Return the sizes of the image tower of ``model``, with or without prompts.

    Raises:
        UnsupportedModelError: if the model has no supported tower, or several.
    """
    family, tower = find_tower_for_prompts(model)
    return family.facts(tower)
