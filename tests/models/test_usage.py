"""A contract becomes the sampling, the transform and the expanded model that it describes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import openvclip
from openvclip.checkpoints import Contract, Expansion, Frames
from openvclip.errors import ClassNamesError, ContractError
from openvclip.models.usage import contract_of, expand_as, library_of, sampling_of, transform_of
from openvclip.towers import expansion_of
from openvclip.towers.view import ExpansionSettings
from openvclip.video import Sampling
from openvclip.video.transforms import build
from tests.helpers import tiny_clip, tiny_tokenizer

TRANSFORM = build("clip", 32, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), short_side=40, crops=3)
SAMPLING = Sampling(num_frames=4, sampling_rate=2, target_fps=25.0, views=2, sampler="uniform")
EXPANSIONS = [
    None,
    ExpansionSettings(1, "zero"),
    ExpansionSettings(2, "mask", (1,)),
    ExpansionSettings(1, "replicate", (0,)),
]


@pytest.mark.parametrize("settings", EXPANSIONS)
def test_a_contract_says_how_its_model_is_used(settings: ExpansionSettings | None) -> None:
    model = tiny_clip()
    if settings is not None:
        openvclip.expand_temporal_attention(model, **vars(settings))
    contract = contract_of(
        model, "tiny", TRANSFORM, sampling=SAMPLING, templates=["a {}"], pooling="frames"
    )
    assert (contract.library, contract.model) == ("open_clip", "tiny")
    assert (contract.templates, contract.pooling) == (("a {}",), "frames")
    assert sampling_of(contract) == SAMPLING
    assert transform_of(contract) == TRANSFORM
    other = tiny_clip()
    other.load_state_dict(model.state_dict())
    expand_as(other, contract)
    expand_as(other, contract)  # a second time changes nothing
    assert expansion_of(other) == expansion_of(model) == settings
    video = torch.rand(1, 4, 3, *[model.visual.image_size[0]] * 2)
    assert torch.equal(openvclip.encode_video(other, video), openvclip.encode_video(model, video))


def test_all_layers_by_number_are_all_layers() -> None:
    model = openvclip.expand_temporal_attention(tiny_clip(), layers=slice(None))
    assert expansion_of(model) == ExpansionSettings(1, "zero", None)


def test_another_expansion_is_refused() -> None:
    model = openvclip.expand_temporal_attention(tiny_clip())
    contract = contract_of(model, "tiny", TRANSFORM)
    with pytest.raises(ContractError, match=r"expanded with .*zero.*; its contract has .*mask"):
        expand_as(model, contract.with_(expansion=Expansion(1, "mask")))
    with pytest.raises(ContractError, match="its contract has None"):
        expand_as(model, contract.with_(expansion=None))


def test_names_of_a_newer_version_are_refused_as_the_contracts() -> None:
    contract = contract_of(tiny_clip(), "tiny", TRANSFORM)
    with pytest.raises(ContractError, match=r"The contract .*boundary='wrap'.*update openvclip"):
        expand_as(tiny_clip(), contract.with_(expansion=Expansion(1, "wrap")))
    with pytest.raises(ContractError, match=r"The contract .*sampler='odd'"):
        sampling_of(contract.with_(frames=Frames(sampler="odd")))
    for changes, words in (
        ({"pooling": "last"}, "pooling='last'"),
        ({"text": "ours"}, "text='ours'"),
    ):
        later = Contract.from_json(contract.with_(**changes).to_json(), "here")
        with pytest.raises(ContractError, match=rf"The contract .*{words}.*update openvclip"):
            openvclip.VideoCLIP(tiny_clip(), tiny_tokenizer, contract=later)


def test_what_can_not_be_stored_is_refused() -> None:
    with pytest.raises(ContractError, match="transform is 'train', which is random"):
        contract_of(tiny_clip(), "tiny", build("train", 32))
    with pytest.raises(ClassNamesError, match="a function, which can't be stored"):
        contract_of(tiny_clip(), "tiny", TRANSFORM, templates=["{}", str.upper])


def test_a_folder_is_no_name_of_a_model(tmp_path: Path) -> None:
    words = pytest.importorskip("tests.tiny_transformers")
    model = words.make("CLIPModel")
    for folder in (str(tmp_path), "./gone", os.path.abspath("gone")):
        assert contract_of(model, folder, TRANSFORM).model == "CLIPModel"
    assert contract_of(model, "openai/clip", TRANSFORM).model == "openai/clip"


def test_the_library_is_that_of_the_class() -> None:
    transformers = pytest.importorskip("transformers")
    own = type("Own", (transformers.CLIPModel,), {})
    assert library_of(own.__new__(own)) == "transformers"
    assert library_of(tiny_clip()) == library_of(nn.Linear(1, 1)) == "open_clip"
