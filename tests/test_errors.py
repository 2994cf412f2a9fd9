"""The texts of errors: advice first, at most ten names, and near matches of unknown names."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from openvclip.errors import (
    ModelNameError,
    ProtocolError,
    StateMismatchError,
    VideoOptionError,
    did_you_mean,
    near_matches,
    near_path,
)
from openvclip.models.loading import load_model
from openvclip.video import class_names, protocols

BLOCKS = [f"visual.transformer.resblocks.{i}.attn.out_proj.weight" for i in range(24)]


def test_a_mismatch_gives_the_advice_first_and_ten_names() -> None:
    """Report 50: 11,164 characters for a small mismatch of peft, the advice in the last line."""
    given = [f"base_model.model.{name}" for name in BLOCKS]
    error = StateMismatchError(
        "The file does not fit.", missing=BLOCKS, unexpected=given, hint="Give another file."
    )
    lines = str(error).splitlines()
    assert lines[:2] == ["The file does not fit.", "Give another file."]
    assert "after the prefix 'base_model.model.'. Remove this prefix" in lines[2]
    assert len(re.findall(r"resblocks\.\d+\.attn", str(error))) == 10
    assert "missing (24): " in lines[3]
    assert "unexpected (24): " in lines[4]
    assert all(line.endswith(", ...") for line in lines[3:])
    assert len(str(error)) < 1000
    assert error.missing == sorted(BLOCKS)
    assert error.unexpected == sorted(given)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.missing) == (str(error), error.missing)


@pytest.mark.parametrize("kinds", [("missing",), ("unexpected",), ("missing", "unexpected")])
@pytest.mark.parametrize("shapes", [0, 1, 30])
def test_no_mismatch_lists_more_than_ten_names(kinds: tuple[str, ...], shapes: int) -> None:
    names = {kind: [f"{kind}.{i}.w" for i in range(40)] for kind in kinds}
    differing = [(f"shape.{i}.w", [1], [2]) for i in range(shapes)]
    error = StateMismatchError("Differs.", mismatched=differing, **names)
    listed = re.findall(r"\w+\.\d+\.w", str(error))
    assert len(listed) == len(set(listed)) <= 10
    assert ("and " in str(error)) == (shapes == 30)
    assert len(error.mismatched) == shapes


def test_a_mismatch_names_close_entries_of_the_same_layer() -> None:
    error = StateMismatchError(
        "Differs.",
        missing=["blocks.2.proj.weight", "blocks.3.proj.weight"],
        unexpected=["blocks.2.porj.weight", "blocks.4.proj.weight"],
    )
    (line,) = [line for line in str(error).splitlines() if line.startswith("Close names")]
    assert line == "Close names, given for missing: blocks.2.porj.weight for blocks.2.proj.weight."
    added = StateMismatchError("Differs.", missing=["visual.proj"], unexpected=["proj"])
    assert "Add this prefix to the given names." in str(added)
    assert "'visual.'" in str(added)


@pytest.mark.parametrize(
    ("name", "known", "first"),
    [
        ("HandStandPushups", class_names("ucf101"), "Handstand Pushups"),  # report 33
        ("apply_eye_makeup", class_names("ucf101"), "Apply Eye Makeup"),
        ("guitar playing", class_names("kinetics400"), "playing guitar"),
        ("ridding a bike", class_names("kinetics400"), "riding a bike"),
        ("ХОДЬБА", ["бег", "ходьба"], "ходьба"),
        ("ucf-101", ["ucf101", "hmdb51"], "ucf101"),
        ("--lables", ["--labels", "--lam", "--top"], "--labels"),
    ],
)
def test_near_matches(name: str, known: list[str], first: str) -> None:
    assert near_matches(name, known)[0] == first


def test_names_that_are_not_close_are_not_suggested() -> None:
    assert did_you_mean("archery", ["riding a bike", "swimming"]) == ""
    assert did_you_mean("", ["a"]) == ""
    assert did_you_mean("a", ["a"]) == "", "the name itself is no suggestion"


def test_paths_that_differ_in_case(tmp_path: Path) -> None:
    """Report 33 (two-stream-action-recognition#62): a folder spelled like another release."""
    folder = tmp_path / "UCF-101" / "HandStandPushups"
    folder.mkdir(parents=True)
    (folder / "v_HandStandPushups_g01_c01.avi").touch()
    wrong = tmp_path / "ucf101" / "HandstandPushups" / "v_HandStandPushups_g01_c01.avi"
    right = folder / "v_HandStandPushups_g01_c01.avi"
    assert near_path(wrong) == f" (did you mean {right}?)"
    assert near_path(right) == ""
    assert near_path(tmp_path / "nothing" / "like this.avi") == ""
    assert near_path("") == ""


@pytest.mark.parametrize(
    ("name", "model", "tag"),
    [
        ("openai/clip-vit-base-patch16", "ViT-B-16-quickgelu", "openai"),
        ("openai/clip-vit-large-patch14-336", "ViT-L-14-336-quickgelu", "openai"),
        ("https://huggingface.co/openai/clip-vit-base-patch32/", "ViT-B-32-quickgelu", "openai"),
        ("ViT-L/14@336px", "ViT-L-14-336-quickgelu", "openai"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B-32", "laion2b_s34b_b79k"),
        ("facebook/metaclip-b16-400m", "ViT-B-16-quickgelu", "metaclip_400m"),
        ("google/siglip-so400m-patch14-384", "ViT-SO400M-14-SigLIP-384", "webli"),
    ],
)
def test_names_of_other_libraries(name: str, model: str, tag: str) -> None:
    """Report 50: ``openai/clip-vit-base-patch16`` suggested ``nllb-clip-base``."""
    with pytest.raises(ModelNameError, match=re.escape(f"--model {model} --pretrained {tag}")):
        load_model(name, "openai")


def test_unknown_names_say_what_is_close() -> None:
    with pytest.raises(ModelNameError, match=r"give 'hf-hub:someone/my-model'"):
        load_model("someone/my-model", "openai")
    with pytest.raises(ModelNameError, match=r"did you mean openai\?"):
        load_model("ViT-B-16", "openia")
    with pytest.raises(ModelNameError, match="ViT-B-16-quickgelu with the weights openai"):
        load_model("ViT-B-16", "openai/clip-vit-base-patch16")
    with pytest.raises(ProtocolError, match=r"did you mean ucf101-ep1\?"):
        protocols.load("UCF101_EP1", annotations="lists")
    with pytest.raises(VideoOptionError, match=r"did you mean kinetics400\?"):
        class_names("kinetics-400")
    with pytest.raises(ProtocolError, match=r"did you mean hmdb51\?"):
        protocols.few_shot("HMDB-51", annotations="lists", shots=1)
