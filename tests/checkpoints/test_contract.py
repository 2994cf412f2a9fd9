"""The contract of a model: what is written is read back, and what can't be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import openvclip
from openvclip.checkpoints import (
    Base,
    Confidence,
    Contract,
    Expansion,
    Frames,
    Pixels,
    api,
    read_contract,
)
from openvclip.checkpoints.contract_files import merged_contract
from openvclip.checkpoints.hugging_face import open_clip_name
from openvclip.errors import CheckpointError, ContractError, ContractWarning
from openvclip.weights import weights_hash
from tests.checkpoints.test_conversion_hugging_face import hugging_face_model
from tests.helpers import assert_same_state, tiny_clip

PIXELS = Pixels("released", 224, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CONTRACT = Contract("open_clip", "ViT-B-16-quickgelu", PIXELS, ("a video of {}.",))

texts = st.text(min_size=1, max_size=8)
counts = st.integers(1, 99)
numbers = st.floats(-9, 9)
above_0 = st.floats(0.001, 99)
colours = st.tuples(above_0, above_0, above_0)
expansions = st.builds(
    Expansion, counts, texts, st.none() | st.lists(st.integers(0, 23)).map(tuple)
)
contracts = st.builds(
    Contract,
    library=st.sampled_from(["open_clip", "transformers"]),
    model=texts,
    pixels=st.builds(Pixels, texts, counts, colours, colours, st.none() | counts, counts),
    templates=st.lists(texts.map("{} ".__add__), min_size=1, max_size=3).map(tuple),
    expansion=st.none() | expansions,
    frames=st.builds(Frames, counts, counts, above_0, texts, counts),
    pooling=st.sampled_from(["unit_frames", "frames"]),
    text=st.sampled_from(["own", "original"]),
    method=st.none() | texts,
    lam=st.none() | numbers | st.dictionaries(texts, numbers, max_size=2),
    base=st.none() | st.builds(Base, texts, st.none() | texts, st.none() | texts),
    confidence=st.none() | st.builds(Confidence, above_0, st.none() | numbers),
    data=st.dictionaries(texts, numbers | texts, max_size=2),
    licence=st.none() | texts,
)


@given(contracts)
def test_a_contract_is_read_as_it_was_written(contract: Contract) -> None:
    assert Contract.from_json(contract.to_json(), "here") == contract


def test_the_json_names_format_and_version_first() -> None:
    content = json.loads(CONTRACT.to_json())
    assert list(content)[:4] == ["format", "version", "library", "model"]
    assert (content["format"], content["version"]) == ("openvclip", 1)
    assert "unknown" not in content


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(CONTRACT.to_json()), **fields})


@pytest.mark.parametrize(
    "facts", [{"results": {"top1": float("nan")}}, {"data": {"a": "\ud800"}}], ids=str
)
def test_what_json_can_not_hold_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="can't be written as JSON"):
        CONTRACT.with_(**facts).to_json()


@pytest.mark.parametrize("place", ["results", "data", "mood"])
@pytest.mark.parametrize("value", ["NaN", "[1, -Infinity]", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(place: str, value: str) -> None:
    text = changed(**{place: {"a": "HERE"}}).replace('"HERE"', value)
    with pytest.raises(ContractError, match=r"here: .*Look for NaN"):
        Contract.from_json(text, "here")


@pytest.mark.parametrize(
    "wrong",
    [
        {"expansion": {"window": 2}},
        {"base": "ViT-B-16"},
        {"confidence": 0.5},
        {"unknown": [1]},
        {"frames": None},
        {"pixels": {"size": 2}},
    ],
    ids=str,
)
def test_sections_made_in_python_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=f"{next(iter(wrong))} is .* in the contract; expected"):
        CONTRACT.with_(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"temperature": 1e-300},
        {"threshold": float("nan")},
        {"threshold": float("inf")},
        {"keep": 2.0},
        {"keep": float("nan")},
        {"clips": 0},
        {"score": 3},
    ],
    ids=str,
)
def test_a_calibration_made_in_python_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=f"{next(iter(wrong))} is "):
        Confidence(**wrong)


def test_unknown_fields_are_written_again() -> None:
    frames = {"num_frames": 4, "rhythm": [1, 2]}
    contract = Contract.from_json(changed(mood="good", frames=frames), "here")
    assert contract.frames == Frames(num_frames=4)
    content = json.loads(contract.with_(method="clip").to_json())
    assert (content["mood"], content["frames"]["rhythm"]) == ("good", [1, 2])
    assert (content["frames"]["num_frames"], content["method"]) == (4, "clip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "here: is not JSON"),
        ("[]", "here: is no contract"),
        ('{"format": "pt"}', "here: is no contract"),
        (changed(version=2), "has version 2; this openvclip reads version 1"),
        (changed(version="1"), "version is '1'; expected a whole number"),
        (changed(library="keras"), "library is 'keras' in the contract; expected 'open_clip' or"),
        (changed(frames={"num_frames": 0}), "here: frames.num_frames is 0"),
        (changed(frames={"num_frames": True}), "frames.num_frames is True"),
        (changed(frames={"target_fps": 10**400}), "frames.target_fps is 10+ in the contract"),
        (changed(lam={"visual.*": 10**400}), "expected a number, or an object of numbers"),
        (changed(frames=3), "frames is 3; expected an object"),
        (changed(frames=None), "frames is None in the contract; expected an object"),
        (changed(pixels={"size": 224}), "pixels.name, pixels.mean, pixels.std is missing"),
        (changed(templates=[]), r"templates is \[\] in the contract; expected a list of texts"),
        (changed(templates=["a video"]), "templates is"),
        (changed(templates="{}"), "templates is '{}'"),
        (changed(weights="../w.safetensors"), "weights is '../w.safetensors'"),
        (changed(lam="half"), "lam is 'half'"),
        (changed(lam=float("nan")), "lam is nan"),
        (changed(expansion={"window": 1, "layers": [0.5]}), "expansion.layers is"),
        (changed(confidence={"temperature": 0}), "confidence.temperature is 0"),
        (json.dumps({"format": "openvclip", "version": 1}), "library, model, pixels, templates"),
    ],
)
def test_what_can_not_be_right_is_refused(text: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Contract.from_json(text, "here")


def test_the_contract_of_a_file_is_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    openvclip.save_checkpoint(
        {"a": torch.ones(2)}, path, metadata={"openvclip": CONTRACT.to_json()}
    )
    assert read_contract(path) == CONTRACT
    assert read_contract(tmp_path) is None


def test_the_contract_of_a_folder_is_that_of_the_file_it_names(tmp_path: Path) -> None:
    contract = CONTRACT.with_(weights="w.safetensors")
    (tmp_path / "openvclip.json").write_text(contract.to_json(), encoding="utf-8")
    for name in ("w", "other"):
        openvclip.save_checkpoint({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    assert read_contract(tmp_path) == contract
    assert read_contract(tmp_path / "openvclip.json") == contract
    assert read_contract(tmp_path / "w.safetensors") == contract
    assert read_contract(tmp_path / "other.safetensors") is None
    assert read_contract(tmp_path / "w.pth") is None


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such file"):
        read_contract(tmp_path / "nowhere")
    (tmp_path / "openvclip.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ContractError, match=r"openvclip\.json: can't be read"):
        read_contract(tmp_path)


def test_a_merge_keeps_how_the_models_are_used(tmp_path: Path) -> None:
    first = CONTRACT.with_(lam=0.5, method="open-vclip", data={"a": 1}, results={"top1": 0.5})
    second = first.with_(lam=0.2, data={"b": 2}, confidence=Confidence(2.0))
    paths = written(tmp_path, [None, first, second])
    openvclip.average_files(paths, tmp_path / "mean.safetensors")
    merged = read_contract(tmp_path / "mean.safetensors")
    assert merged == CONTRACT.with_(method="open-vclip", data={"a": 1, "b": 2})
    openvclip.average_files(paths[:1], tmp_path / "mean.safetensors")
    assert read_contract(tmp_path / "mean.safetensors") is None
    openvclip.merge_files(paths[:2], tmp_path / "own.safetensors", lambda states: states[0])
    merged = read_contract(tmp_path / "own.safetensors")
    # The model without a contract may be the original CLIP, so its weight is not known.
    assert merged == first.with_(results={}, lam=None)
    openvclip.merge_files([paths[1]] * 2, tmp_path / "own.safetensors", lambda states: states[0])
    assert read_contract(tmp_path / "own.safetensors") == first.with_(results={})


def written(folder: Path, models: list[Contract | None]) -> list[Path]:
    """Files of weights with these contracts; the last contract is in the folder alone."""
    paths = [folder / f"{number}.safetensors" for number in range(len(models))]
    for number, (path, contract) in enumerate(zip(paths, models, strict=True)):
        text = {} if contract is None else {"openvclip": contract.to_json()}
        beside = contract is not None and number == len(models) - 1 > 0
        openvclip.save_checkpoint({"a": torch.ones(2)}, path, metadata={} if beside else text)
        if contract is not None and beside:
            named = contract.with_(weights=path.name)
            (folder / "openvclip.json").write_text(named.to_json(), encoding="utf-8")
    return paths


@pytest.mark.parametrize(
    ("share_a", "share_b", "lam", "share"),
    [
        ("original", 0.0, 0.5, 0.5),
        ("original", 0.5, 0.5, 0.75),
        (0.25, 0.75, 0.5, 0.5),
        ("original", None, 0.5, None),
        (0.5, "original", 0.5, None),
        ("original", 0.0, lambda name: 0.5, None),
        ("original", 0.5, 1.0, 1.0),
    ],
)
def test_an_interpolation_knows_its_share_of_the_original(
    share_a: Any, share_b: Any, lam: Any, share: float | None, tmp_path: Path
) -> None:
    models = [None if s == "original" else CONTRACT.with_(lam=s) for s in (share_a, share_b)]
    a, b = written(tmp_path, models)
    openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", lam)
    contract = read_contract(tmp_path / "out.safetensors")
    assert contract is not None
    assert contract.lam == share


def test_the_share_is_unknown_if_the_first_model_is_not_the_original(tmp_path: Path) -> None:
    """The first model has no contract. The contract of the second names the original CLIP."""
    out = tmp_path / "out.safetensors"
    for named, share in (("0", 0.5), ("1", None)):
        base = Base("ViT-B-16", None, weights_hash({"a": torch.full((2,), float(named))}))
        a, b = written(tmp_path, [None, CONTRACT.with_(lam=0.0, base=base, licence="é")])
        save_file({"a": torch.zeros(2)}, a)
        for lam in (0.5, [0.5, 1.0]):
            outs = [out, tmp_path / "more.safetensors"] if isinstance(lam, list) else out
            openvclip.interpolate_files(a, b, outs, lam)
            contract = read_contract(out)
            assert contract is not None
            assert (contract.lam, contract.licence) == (share, "é")
    # A merged file without a contract is not the original CLIP.
    openvclip.average_files([a], tmp_path / "merged.safetensors")
    a, b = written(tmp_path, [None, CONTRACT.with_(lam=0.0)])
    openvclip.interpolate_files(tmp_path / "merged.safetensors", b, out, 0.5)
    contract = read_contract(out)
    assert contract is not None
    assert contract.lam is None


@pytest.mark.parametrize("beside", [True, False])
def test_a_contract_that_can_not_be_read_is_left_out_with_override(
    beside: bool, tmp_path: Path
) -> None:
    a, b = written(tmp_path, [None, None])
    if beside:
        (tmp_path / "openvclip.json").write_bytes(b"\xff\xfe")
    else:
        save_file({"a": torch.ones(2)}, b, {"openvclip": "{", "format": "pt"})
    out = tmp_path / "new" / "out.safetensors"
    for write in (
        lambda **options: openvclip.average_files([a, b], out, **options),
        lambda **options: openvclip.interpolate_files(a, b, out, 0.5, **options),
        lambda **options: openvclip.merge_files([a, b], out, lambda s: s[0], **options),
        lambda **options: openvclip.convert_checkpoint(b, out, **options),
    ):
        with pytest.raises(ContractError, match=r"Give --override \(override=True\) to go on"):
            write()
        assert not out.exists()
        with pytest.warns(ContractWarning, match="is used without its contract"):
            write(override=True)
        assert read_contract(out) is None
        out.unlink()


def test_models_that_are_used_differently_are_not_merged_without_a_choice(tmp_path: Path) -> None:
    first, second = CONTRACT.with_(expansion=Expansion(2, "mask")), CONTRACT.with_(frames=Frames(4))
    a, b = written(tmp_path, [first, second])
    out = tmp_path / "out.safetensors"
    message = r"0\.safetensors is used with expansion = .*mask.* and .*1\.safetensors with null"
    for merge in (
        lambda **options: openvclip.average_files([a, b], out, **options),
        lambda **options: openvclip.interpolate_files(a, b, out, 0.5, **options),
        lambda **options: openvclip.merge_files([a, b], out, lambda s: s[0], **options),
    ):
        with pytest.raises(ContractError, match=message):
            merge()
        assert not out.exists()
        merge(override=True)
        merged = read_contract(out)
        assert merged is not None
        assert (merged.expansion, merged.frames) == (None, Frames(4))
        out.unlink()


def test_the_difference_inside_a_section_is_named(tmp_path: Path) -> None:
    first = CONTRACT.with_(expansion=Expansion(2, "mask"))
    paths = written(tmp_path, [first, CONTRACT.with_(expansion=Expansion(2, "zero"))])
    with pytest.raises(ContractError, match=r'expansion.boundary = "mask" and .* with "zero"'):
        openvclip.average_files(paths, tmp_path / "out.safetensors")


OTHER = {
    "library": "transformers", "model": "ViT-L-14", "expansion": Expansion(), "frames": Frames(4),
    "pixels": Pixels("clip", 224, PIXELS.mean, PIXELS.std), "templates": ("{}",),
    "pooling": "frames", "text": "original",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_each_setting_of_use_counts_in_a_merge(name: str) -> None:
    other = CONTRACT.with_(**{name: OTHER[name]})
    difference = CONTRACT.difference(other)
    assert difference is not None
    assert difference[0].partition(".")[0] == name
    assert merged_contract([(Path("a"), CONTRACT), (Path("b"), other)], override=True) == other
    with pytest.raises(ContractError, match=f"a is used with {name}"):
        merged_contract([(Path("a"), CONTRACT), (Path("b"), other)])


@pytest.mark.parametrize(
    ("name", "values"),
    [("licence", ("mit", "cc-by-4.0")), ("method", ("a", "b")), ("lam", (0.0, 1.0)),
     ("base", (Base("a"), Base("b")))],
)  # fmt: skip
def test_facts_that_differ_are_left_out_of_a_merge(name: str, values: tuple[Any, Any]) -> None:
    contracts = [(Path(f"{v}"), CONTRACT.with_(**{name: v})) for v in values]
    merged = merged_contract(contracts)
    assert merged is not None
    assert getattr(merged, name) is None
    assert merged_contract(contracts[:1] * 2) == contracts[0][1]


def test_inspect_shows_the_crops(tmp_path: Path) -> None:
    crops = Pixels("released", 224, PIXELS.mean, PIXELS.std, 256, crops=3)
    (path,) = written(tmp_path, [CONTRACT.with_(pixels=crops)])
    text = str(openvclip.inspect_checkpoint(path))
    assert "224, transform released, short side 256, 3 crops, mean 0.5" in text


def test_inspect_shows_the_contract(tmp_path: Path) -> None:
    contract = CONTRACT.with_(
        expansion=Expansion(2, "mask", (0, 3)), lam=0.25, base=Base("ViT-B-16", "openai"),
        confidence=Confidence(2.0, 0.3), results={"top1": 0.5}, unknown={"mood": 1},
    )  # fmt: skip
    (path,) = written(tmp_path, [contract])
    info = openvclip.inspect_checkpoint(path)
    assert info.contract == contract
    text = str(info)
    assert '"format"' not in text  # the JSON itself
    for row in (
        "  model       ViT-B-16-quickgelu (open_clip)",
        "  attention   window 2, boundary mask, layers [0, 3]",
        "  frames      3 x 8, 16 apart at 30 frames per second, sampler released",
        "  pixels      224, transform released, mean 0.5 0.5 0.5, std 0.25 0.25 0.25",
        "  templates   'a video of {}.'",
        "  pooling     unit_frames, texts by the own text tower",
        "  lambda      0.25 of the original CLIP",
        "  base        name ViT-B-16, pretrained openai",
        "  calibration temperature 2.0, threshold 0.3",
        "  results     top1 0.5",
        "  unknown     mood",
    ):
        assert row in text.splitlines()


def test_inspect_says_that_a_contract_can_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    openvclip.save_checkpoint(
        {"a": torch.ones(2)}, path, metadata={"openvclip": changed(version=9)}
    )
    assert "contract     can't be read" in str(openvclip.inspect_checkpoint(path))
    assert "a" in openvclip.load_checkpoint(path)  # the tensors alone need no contract


def test_the_names_of_a_file_can_be_kept(tmp_path: Path) -> None:
    model = hugging_face_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    original = openvclip.load_checkpoint(path, names="original")
    assert_same_state(original, load_file(path))
    assert "visual.conv1.weight" in openvclip.load_checkpoint(path)
    some = openvclip.load_checkpoint(path, names="original", allow_unexpected="text*")
    assert not any(name.startswith("text") for name in some)
    for options in ({"model": model}, {"allow_missing": "a"}):
        with pytest.raises(openvclip.OpenVCLIPError, match="names='original' with"):
            openvclip.load_checkpoint(path, names="original", **options)
    with pytest.raises(openvclip.OpenVCLIPError, match="names='mine': expected"):
        openvclip.load_checkpoint(path, names="mine")  # type: ignore[arg-type]


def test_a_converted_file_has_the_contract(tmp_path: Path) -> None:
    source, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    state = tiny_clip().state_dict()
    torch.save(state, source)
    contract = CONTRACT.with_(weights="w.pth", results={"top1": 0.5})
    (tmp_path / "openvclip.json").write_text(contract.to_json(), encoding="utf-8")
    openvclip.convert_checkpoint(source, out)
    assert read_contract(out) == contract.with_(weights=None)


def test_a_converted_model_of_transformers_is_one_of_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    contract = CONTRACT.with_(library="transformers", model="my/clip")
    text = {"openvclip": contract.to_json()}
    save_file(hugging_face_model().state_dict(), path, metadata=text)
    with pytest.raises(ContractError, match="open_clip's name of this model is not known"):
        openvclip.convert_checkpoint(path, out)
    assert not out.exists()
    openvclip.convert_checkpoint(path, out, override=True)
    assert read_contract(out) is None
    monkeypatch.setattr(api, "open_clip_name", lambda path, backbone: "ViT-B-32")
    openvclip.convert_checkpoint(path, out)
    assert read_contract(out) == contract.with_(library="open_clip", model="ViT-B-32")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "ViT-B-16-quickgelu"),
        ({"vision_config": {"hidden_act": "gelu"}}, "ViT-B-16"),
        ({"vision_config": {}}, "ViT-B-16-quickgelu"),  # the default of CLIPVisionConfig
        ({"vision_config": None}, None),
        ({}, None),
    ],
)
def test_the_activation_is_in_the_config_of_transformers(
    config: dict[str, Any], name: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    assert open_clip_name(path, "ViT-B-16") is None
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_clip_name(path, "ViT-B-16") == name
    assert open_clip_name(path, None) is None


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_numpy_and_torch_are_numbers_in_the_file(value: Any) -> None:
    stored = json.loads(CONTRACT.with_(results={"UCF-101": value}).to_json())
    assert stored["results"] == {"UCF-101": 0.5}
