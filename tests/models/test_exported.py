"""Exported models: equal to PyTorch for clips of every size, with their contract, and served."""

from __future__ import annotations

import copy
import importlib.util
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import (
    VIDEO_TEMPLATES,
    VideoCLIP,
    ZeroShotClassifier,
    cli,
    encode_video,
    expand_temporal_attention,
)
from openvclip.checkpoints import Confidence, Contract, Expansion, Frames, read_contract
from openvclip.checkpoints.contract_report import contract_rows
from openvclip.errors import (
    CheckpointError,
    ContractError,
    MissingDependencyError,
    UnsupportedModelError,
    UsageError,
)
from openvclip.models import ExportSettings, export_model, exported_writing, read_export
from openvclip.models.exported_writing import Program, require_same_results, write_pt2
from openvclip.models.usage import contract_of, expansion_section
from openvclip.prompting import VideoClassifier
from openvclip.video.transforms import build
from tests.helpers import random_video, randomise, tiny_clip, tiny_tokenizer
from tests.prompting.towers import vifi, vita
from tests.towers import test_temporal_timm as timm

LABELS = ["surfing", "archery", "juggling balls"]
SIZES = ((1, 1), (1, 2), (3, 1), (2, 5))  # B and T; windows of 2 are longer than most
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """What a program without openvclip runs."""
    if path.suffix == ".pt2":
        module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
        return module
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def contract_for(model: nn.Module, size: int = 8, **facts: Any) -> Contract:
    return contract_of(model, "tiny", build("released", size), templates=["a {}", "{}"], **facts)


def expanded(model: Any, boundary: Any, window: int) -> Any:
    return expand_temporal_attention(model, boundary=boundary, window=window)


def deep(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if module.training]


# --- labels, in ONNX, from 8-bit frames ----------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return expanded(tiny_clip(layers=1, image_size=16), "mask", 2)


@pytest.fixture(scope="module")
def contract(model: Any) -> Contract:
    confidence = Confidence(temperature=3.0)
    made = contract_for(model, 16, confidence=confidence, weights="open_clip_model.safetensors")
    return made.with_(frames=Frames(3, 4, 20, "released", 2), unknown={"note": "n"})


@pytest.fixture(scope="module")
def served(model: Any, contract: Contract, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labels' logits in an ONNX file, exported from a model in train mode."""
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("served") / "new folder" / "model.onnx"
    clip = VideoCLIP(model, tiny_tokenizer, contract=contract)
    model.train()
    before = deep(model)
    written = clip.export(path, labels=LABELS, pixels="uint8")
    assert deep(model) == before
    model.eval()
    assert written == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path


def test_logits_of_clips_of_every_size(model: Any, served: Path) -> None:
    classifier = ZeroShotClassifier(model, tiny_tokenizer, LABELS, ["a {}", "{}"])
    run, transform = runner(served), build("released", 16)
    for clips, frames in SIZES:
        video = torch.randint(256, (clips, frames, 3, 16, 16), dtype=torch.uint8)
        with torch.no_grad():  # a transform of frames of the right size normalises alone
            torch.testing.assert_close(run(video), classifier(transform(video)), **CLOSE)


def test_the_file_says_what_it_is(model: Any, contract: Contract, served: Path) -> None:
    # without the name of a file of weights; with the field that this version does not know
    assert read_contract(served) == contract.with_(weights=None)
    facts = read_export(served)
    assert (facts.part, facts.pixels, facts.frames) == ("labels", "uint8", None)
    assert facts.labels == tuple(LABELS)
    assert facts.logit_scale == pytest.approx(model.logit_scale.detach().exp().item())
    assert str(Path(exported_writing.__file__).parents[2]).encode() not in served.read_bytes()
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(served, providers=["CPUExecutionProvider"])
    (frames,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (frames.name, frames.shape) == ("frames", ["clips", "frames", 3, 16, 16])
    assert (logits.name, logits.shape) == ("logits", ["clips", 3])
    # read here by hand, there by onnxruntime
    texts = session.get_modelmeta().custom_metadata_map
    assert json.loads(texts["openvclip"]) == json.loads(contract.with_(weights=None).to_json())


def test_a_contract_decides_texts_pixels_and_pooling(model: Any, tmp_path: Path) -> None:
    pixels = build("released", 16, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    contract = contract_of(model, "tiny", pixels, templates=["a {}", "{}"], pooling="frames")
    settings = ExportSettings(pixels="uint8")
    chosen: Any = {"labels": LABELS, "tokenizer": tiny_tokenizer}
    path = export_model(
        model, tmp_path / "labels.pt2", contract=contract, settings=settings, **chosen
    )
    video = torch.randint(256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(row)[:, None, None] for row in (pixels.mean, pixels.std))
    templates = ["a {}", "{}"]
    classifier = ZeroShotClassifier(model, tiny_tokenizer, LABELS, templates, pooling="frames")
    with torch.no_grad():
        expected = classifier((video / 255 - mean) / std)
        torch.testing.assert_close(runner(path)(video), expected, **CLOSE)


# --- an archive of torch.export -------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Contract, Path]:
    """A model, its contract, and the archive of its image tower."""
    model = expanded(tiny_clip(layers=1), "replicate", 1).to(torch.bfloat16)
    contract = contract_for(model, pooling="frames")
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    return model, contract, export_model(model, path, contract=contract.to_json())


def test_an_archive_holds_the_image_tower_alone(archive: tuple[Any, Contract, Path]) -> None:
    model, contract, path = archive
    assert read_contract(path) == contract
    assert read_export(path).part == "image"
    program = torch.export.load(path)
    run = program.module()
    assert all(name.startswith("model.visual.") for name in program.state_dict)
    assert not any(value.requires_grad for value in program.state_dict.values())
    assert next(model.parameters()).dtype == torch.bfloat16
    full = copy.deepcopy(model).float()
    for clips, frames in SIZES:
        video = random_video(clips, frames, seed=frames)
        mean = full.encode_image(video).mean(dim=1)
        expected = functional.normalize(mean, dim=-1)
        torch.testing.assert_close(run(video), expected, **CLOSE)


def test_inspect_shows_the_part_and_the_contract(
    contract: Contract,
    served: Path,
    archive: tuple[Any, Contract, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every row of the contract, as of a file of weights with this contract."""
    for path, known in ((served, contract), (archive[2], archive[1])):
        assert cli.main(["inspect", str(path)]) == 0
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        shown = {words[0]: words[1] for words in lines if len(words) > 1}
        assert contract_rows(known.with_(weights=None)) == [
            (title, shown[title]) for title, _ in contract_rows(known)
        ]
        if path == served:
            assert shown["labels"] == "'surfing', 'archery', 'juggling balls'"
            assert shown["takes"] == "clips with any number of 8-bit frames"
            assert shown["returns"].startswith("logits of 3 labels, scale ")
        else:
            assert shown["returns"] == "one feature for each clip"
    foreign = tmp_path / "foreign.pt2"
    with zipfile.ZipFile(foreign, "w") as file:
        file.writestr("archive/extra/note.json", "of another program")
    assert cli.main(["inspect", str(foreign)]) == 0
    assert "metadata     note=of another program" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "absent.onnx")]) == 2
    assert "absent.onnx: can't be read as an exported model" in capsys.readouterr().err


def test_an_older_file_stays_if_the_check_fails(
    archive: tuple[Any, Contract, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"older")
    video = random_video(1, 1)
    program = Program(
        torch.export.load(archive[2]), ("frames", "features"), {}, [(video, torch.zeros(1, 8))]
    )
    with pytest.raises(UnsupportedModelError, match=r"differs from the model by 0\.\d+ for"):
        write_pt2(program, path, {}, partial(require_same_results, program))
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_no_agreement() -> None:
    program = Program(None, ("frames", "features"), {}, [(torch.zeros(1), torch.zeros(1, 8))])
    require_same_results(program, lambda _: torch.zeros(1, 8))
    with pytest.raises(UnsupportedModelError, match="differs from the model by nan"):
        require_same_results(program, lambda _: torch.full((1, 8), torch.nan))


# --- the other parts, families, boundaries and windows -------------------------------------------


def siglip_of_timm() -> Any:
    return timm.make(partial(timm.KINDS["siglip"], depth=1))


def of_transformers(name: str) -> Callable[[], Any]:
    def make() -> Any:
        pytest.importorskip("transformers")
        from tests.towers import test_temporal_hf

        return test_temporal_hf.make(name, num_hidden_layers=1)

    return make


MAKERS: dict[str, Callable[[], Any]] = {
    "open_clip": lambda: tiny_clip(layers=1),
    "timm": siglip_of_timm,
    "CLIPModel": of_transformers("CLIPModel"),
    "SiglipModel": of_transformers("SiglipModel"),
}
# Each family meets each part or format, and each boundary both windows; not each combination.
CASES = [
    ("open_clip", "zero", 2, "frames", ".onnx"),
    ("timm", "zero", 1, "image", ".onnx"),
    ("timm", "replicate", 2, "frames", ".pt2"),
    ("CLIPModel", "mask", 1, "image", ".onnx"),
    ("CLIPModel", "zero", 2, "labels", ".pt2"),
    ("SiglipModel", "replicate", 1, "labels", ".onnx"),
    ("SiglipModel", "mask", 2, "frames", ".pt2"),
]


def expected_of(part: str, model: Any, video: Tensor) -> Tensor:
    if part == "labels":
        return ZeroShotClassifier(model, tiny_tokenizer, LABELS, VIDEO_TEMPLATES)(video)
    if part == "image":
        return encode_video(model, video, normalize=True)
    if hasattr(model, "get_image_features"):
        features: Tensor = model.get_image_features(pixel_values=video).pooler_output
        return features
    frames: Tensor = model.encode_image(video) if hasattr(model, "encode_image") else model(video)
    return frames


@pytest.mark.parametrize(("name", "boundary", "window", "part", "ending"), CASES)
def test_each_part_equals_pytorch(
    tmp_path: Path, name: str, boundary: str, window: int, part: Any, ending: str
) -> None:
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
    model = expanded(MAKERS[name](), boundary, window)
    chosen = {"labels": LABELS, "tokenizer": tiny_tokenizer} if part == "labels" else {}
    path = tmp_path / f"model{ending}"
    run = runner(export_model(model, path, settings=ExportSettings(part), **chosen))
    assert read_contract(path) is None
    for clips, frames in SIZES:
        video = random_video(clips, frames, seed=frames)
        with torch.no_grad():
            torch.testing.assert_close(run(video), expected_of(part, model, video), **CLOSE)


@pytest.mark.parametrize(
    ("name", "ending"), [("open_clip", ".onnx"), ("CLIPModel", ".onnx"), ("SiglipModel", ".pt2")]
)
def test_texts_in_any_number(tmp_path: Path, name: str, ending: str) -> None:
    pytest.importorskip("onnxscript")
    model = MAKERS[name]()
    path = tmp_path / f"text{ending}"
    run = runner(export_model(model, path, settings=ExportSettings("text")))
    for texts in (["a dog"], LABELS):
        tokens = tiny_tokenizer(texts)
        with torch.no_grad():
            if name == "open_clip":
                features = model.encode_text(tokens)
            else:
                features = model.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(run(tokens), functional.normalize(features, dim=-1), **CLOSE)


def test_prompts_and_their_classifier(tmp_path: Path) -> None:
    model = vita(tiny_clip(layers=1), frames=3)
    path = export_model(model, tmp_path / "vita.pt2", contract=contract_for(model))
    assert read_export(path).frames == 3
    run = runner(path)
    for clips in (1, 4):
        video = random_video(clips, 3)
        expected = encode_video(model, video, normalize=True)
        torch.testing.assert_close(run(video), expected, **CLOSE)
    classifier = VideoClassifier(vifi(tiny_clip(layers=2)), tiny_tokenizer, LABELS)
    path = export_model(classifier, tmp_path / "vifi.pt2")
    assert read_export(path).labels == tuple(LABELS)
    run = runner(path)
    for clips, frames in SIZES:
        video = random_video(clips, frames)
        torch.testing.assert_close(run(video), classifier(video), **CLOSE)


# --- files ---------------------------------------------------------------------------------------


def test_weights_beside_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of 2 GB, made small."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(exported_writing, "_MOST_INLINE", 0)
    names = []
    for seed in (0, 1):
        model = tiny_clip(seed, layers=1)
        path = export_model(model, tmp_path / "model[1].onnx", contract=contract_for(model))
        files = sorted(file.name for file in tmp_path.iterdir())
        assert files[1] == path.name
        assert files[0].startswith("model[1]-")
        assert files[0].endswith(".onnx.data")
        assert len(files) == 2  # the weights of the model before are removed
        names.append(files[0])
        video = random_video(2, 2)
        expected = encode_video(model, video, normalize=True)
        torch.testing.assert_close(runner(path)(video), expected, **CLOSE)
        assert read_contract(path) == contract_for(model)
    assert names[0] != names[1]


def test_int8_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = randomise(tiny_clip(layers=1, width=128, head_width=64), 1, 0.05)
    paths = [
        export_model(model, tmp_path / f"{kind}.pt2", settings=ExportSettings(weights=kind))
        for kind in ("float32", "int8")
    ]
    whole, small = (torch.export.load(path) for path in paths)
    assert paths[1].stat().st_size < 0.5 * paths[0].stat().st_size
    for name, weight in whole.state_dict.items():
        if weight.ndim == 2 and name.endswith(("c_fc.weight", "in_proj_weight")):
            integers, scale = small.state_dict[f"{name}_int8"], small.state_dict[f"{name}_scale"]
            assert integers.dtype == torch.int8
            assert ((integers * scale - weight).abs() <= 0.51 * scale).all()
    video = random_video(2, 3)
    agreement = functional.cosine_similarity(whole.module()(video), small.module()(video))
    assert agreement.min() > 0.99
    assert read_export(paths[1]).weights == "int8"


def test_files_that_are_no_exported_models(tmp_path: Path) -> None:
    for name, content in (("a.onnx", b""), ("b.onnx", b"\xff" * 30), ("c.pt2", b"no zip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="can't be read as an exported model"):
            read_export(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "d.pt2", "w") as archive:
        archive.writestr("d/models/model.json", "{}")
    with pytest.raises(CheckpointError, match="openvclip_export"):
        read_export(tmp_path / "d.pt2")
    assert read_contract(tmp_path / "d.pt2") is None
    (tmp_path / "e.onnx").write_bytes(b"\x08\x0a\x3a\x64cut off")  # a graph of 100 bytes
    with pytest.raises(CheckpointError, match="cut off"):
        read_contract(tmp_path / "e.onnx")


# --- bad input -----------------------------------------------------------------------------------


def test_damaged_facts(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"labels": 3}'):
        with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
            archive.writestr(f"m/extra/{exported_writing.FACTS_KEY}.json", text)
        with pytest.raises(CheckpointError, match=r"m\.pt2: .*is damaged"):
            read_export(tmp_path / "m.pt2")


def test_an_archive_with_a_password(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/extra/openvclip.json", "{}")
    content = bytearray(path.read_bytes())
    for header, place_of_flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + place_of_flags] |= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.pt2: can't be read as an exported model"):
        read_contract(path)


def refuse(error: type[Exception], text: str, name: str = "m.pt2", **options: Any) -> None:
    model = options.pop("model", None) or tiny_clip(layers=1)
    with pytest.raises(error, match=text):
        export_model(model, f"/nowhere/{name}", **options)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"labels": LABELS, "tokenizer": tiny_tokenizer}
    refuse(UsageError, r"ending is '\.pt'; expected \.onnx", "model.pt")
    refuse(UsageError, r"opset=18: .* is no ONNX file", settings=ExportSettings(opset=18))
    refuse(UsageError, "tokenizer is None", labels=LABELS)
    refuse(UsageError, "labels is None", settings=ExportSettings("labels"))
    refuse(
        UsageError, 'labels are given for part="text"', settings=ExportSettings("text"), **labels
    )
    for name in ("part", "pixels", "weights"):
        with pytest.raises(UsageError, match=f"{name}='best' is not known: choose one of"):
            ExportSettings(**{name: "best"})  # type: ignore[arg-type]
    classifier = ZeroShotClassifier(tiny_clip(layers=1), tiny_tokenizer, LABELS)
    refuse(UsageError, "labels are given for a classifier", model=classifier, labels=["a"])
    prompted = vifi(tiny_clip(layers=2))
    if prompted.openvclip_prompts.text is not None:
        refuse(UsageError, "has text prompts", model=prompted, settings=ExportSettings("text"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse(MissingDependencyError, r"onnx and onnxscript are not .*openvclip\[export\]", "m.onnx")
    refuse(MissingDependencyError, r"openvclip\[int8\]", settings=ExportSettings(weights="int8"))


def test_a_contract_of_another_model() -> None:
    model = tiny_clip(layers=1)
    contract = contract_for(model).with_(expansion=Expansion(2, "mask"))
    refuse(ContractError, "temporal attention None; its contract has", contract=contract)
    refuse(ContractError, "is not JSON", contract="{")
    original = contract_for(model, text="original")
    labels = {"labels": LABELS, "tokenizer": tiny_tokenizer}
    refuse(UsageError, "the original CLIP encodes the texts", contract=original, **labels)
    text = ExportSettings(part="text")
    refuse(UsageError, "the original CLIP encodes the texts", contract=original, settings=text)


def test_a_prompted_model_is_expanded_or_not() -> None:
    """The contract of a model with prompts says how it is expanded."""
    plain = vifi(tiny_clip(layers=2))
    assert expansion_section(plain) is None
    model = vifi(expanded(tiny_clip(layers=2), "replicate", 2))
    assert expansion_section(model) == Expansion(2, "replicate")
