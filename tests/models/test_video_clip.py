"""``VideoCLIP`` against ``predict``, plain CLIP and slow loops; threads, contract, wrong use."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import openvclip
from openvclip import VideoCLIP, ZeroShotClassifier, expand_temporal_attention, prompting
from openvclip.errors import (
    ClassNamesError,
    LabelWarning,
    NonFiniteWeightsError,
    PromptingError,
    UnsupportedModelError,
    UsageError,
    VideoError,
    VideoOptionError,
    VideoShapeError,
)
from openvclip.models.preprocess import read_image, transform_for
from openvclip.models.text_side import TextSide
from openvclip.video import Sampling, VideoFrames, read_clip, transforms
from tests.helpers import TINY_PIXELS, random_video, tiny_clip, tiny_tokenizer

LABELS = ["archery", "surfing", "horse race"]
FORMS = ("a video of {}.", "{}")
FEW = Sampling(num_frames=3, views=2)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frames(seed: int = 0, count: int = 20) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 255, (count, 12, 16, 3), dtype=np.uint8)


def expanded(seed: int = 0) -> Any:
    return expand_temporal_attention(tiny_clip(seed), window=2, boundary="mask", layers=[1, -1])


def wrapped(**options: Any) -> VideoCLIP:
    settings = {"sampling": FEW, "templates": FORMS, **options}
    return VideoCLIP(expanded(), tiny_tokenizer, **settings)


@pytest.fixture(scope="module")
def clip() -> VideoCLIP:
    return wrapped()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 16, 12
        for picture in frames(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def picture(file: Path) -> Any:
    """An image of Pillow, and its file beside the video."""
    image = pytest.importorskip("PIL.Image").fromarray(frames(5)[0])
    image.save(file.with_suffix(".png"))
    return image


def sources(file: Path) -> list[Any]:
    image = picture(file)
    return [
        file,
        VideoFrames(frames(1), 30),
        file.read_bytes(),
        file.with_suffix(".png"),
        image,
        VideoFrames(torch.from_numpy(frames(2)).movedim(-1, 1), 12.5),
        io.BytesIO(file.read_bytes()),
    ]


# --- equal to predict and to slow computations ---------------------------------------------------


def test_one_video_is_predicted_as_by_predict(clip: VideoCLIP, file: Path) -> None:
    rows = []
    for video in sources(file):
        got = clip.classify(video, LABELS)
        rows.append(got.probabilities)
        want = openvclip.predict(
            clip.model,
            video,
            LABELS,
            tokenizer=tiny_tokenizer,
            sampling=FEW,
            templates=FORMS,
        )
        assert torch.equal(got.probabilities, want.probabilities)
        assert (got.path, got.labels) == (want.path, want.labels)
    assert torch.equal(rows[2], rows[0])  # bytes and a file object are the file
    assert torch.equal(rows[6], rows[0])
    assert torch.equal(rows[4], rows[3])  # an image of Pillow is its file
    assert clip.classify(frames(), LABELS, fps=30).path == "<20 frames>"
    assert clip.classify(str(file), LABELS).path == str(file)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_many_videos_are_predicted_as_one_by_one(
    clip: VideoCLIP, file: Path, batch_size: int
) -> None:
    videos = sources(file)
    expected = torch.stack([clip.classify(video, LABELS).probabilities for video in videos])
    results = {}
    for threads in (0, 1, 3):
        options: Any = {"batch_size": batch_size, "num_threads": threads, "progress": False}
        predictions = clip.classify(iter(videos) if threads else videos, LABELS, **options)
        assert [p.path for p in predictions][:3] == [str(file), "<20 frames>", predictions[2].path]
        results[threads] = torch.stack([p.probabilities for p in predictions])
        torch.testing.assert_close(results[threads], expected, rtol=1e-5, atol=1e-6)
        features = clip.encode_video(videos, **options)
        singles = torch.stack([clip.encode_video(video) for video in videos])
        torch.testing.assert_close(features, singles, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[3], results[0])
    if batch_size == 1:
        assert torch.equal(results[0], expected)


@torch.no_grad()
def slow_features(clip: VideoCLIP, video: Any, pooling: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for view in read_clip(video, num_frames=3, views=2):
        rows = clip.model.encode_image(clip.transform(view)[None])[0].double()
        if pooling == "frames":
            pooled = rows.mean(dim=0)
            total = total + pooled / pooled.norm()
        else:
            total = total + (rows / rows.norm(dim=-1, keepdim=True)).mean(dim=0)
    return total / total.norm()


@pytest.mark.parametrize("pooling", ["unit_frames", "frames"])
@torch.no_grad()
def test_features_of_videos_images_and_texts(pooling: Any, file: Path) -> None:
    clip = wrapped(pooling=pooling)
    feature = clip.encode_video(file)
    assert feature.dtype == torch.float32
    expected = slow_features(clip, file, pooling)
    torch.testing.assert_close(feature.double(), expected, rtol=1e-5, atol=1e-6)
    image = picture(file)
    plain = tiny_clip().encode_image(clip.transform(read_image(image)[None]))
    images = [image, file.with_suffix(".png"), file.with_suffix(".png").read_bytes(), frames(5)[0]]
    rows = clip.encode_image(images)
    want = functional.normalize(plain, dim=-1).expand(4, -1)
    torch.testing.assert_close(rows, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.encode_image(image), want[0], rtol=1e-5, atol=1e-6)
    texts = ["a horse race", "archery", "archery"]
    written = functional.normalize(tiny_clip().encode_text(tiny_tokenizer(texts)), dim=-1)
    assert torch.equal(clip.encode_text(texts), written)
    torch.testing.assert_close(clip.encode_text("archery"), written[1])


@torch.no_grad()
def test_pooling_as_in_vifi_clip() -> None:
    model, video = expanded(), random_video(2, 4)
    pooled = openvclip.encode_video(model, video, pooling="frames")
    assert torch.equal(pooled, prompting.mean_pooled_features(model, video))
    assert torch.equal(openvclip.encode_video(model, video), openvclip.encode_video(
        model, video, pooling="unit_frames"))  # fmt: skip
    head = prompting.VideoClassifier(model, tiny_tokenizer, LABELS, "a video of {}.")
    options: Any = {"pooling": "frames"}
    classifier = ZeroShotClassifier(model, tiny_tokenizer, LABELS, FORMS[:1], **options)
    torch.testing.assert_close(classifier(video), head(video))
    assert not torch.allclose(classifier(video), ZeroShotClassifier(
        model, tiny_tokenizer, LABELS, FORMS[:1])(video))  # fmt: skip
    for call in (
        lambda: openvclip.encode_video(model, video, pooling="max"),  # type: ignore[arg-type]
        lambda: ZeroShotClassifier(model, tiny_tokenizer, LABELS, pooling="max"),  # type: ignore[arg-type]
        lambda: wrapped(pooling="max"),
    ):
        with pytest.raises(UsageError, match="pooling='max': expected 'unit_frames' or 'frames'"):
            call()


def test_a_timeline_is_that_of_predict_timeline(clip: VideoCLIP, file: Path) -> None:
    options: Any = {"num_frames": 3, "seconds": 3 * 16 / 30, "templates": FORMS}
    expected = openvclip.models.predict_timeline(
        clip.model, file, LABELS, tokenizer=tiny_tokenizer, **options
    )
    assert len(expected.times) > 1
    everything = read_clip(file, num_frames=20, sampler="uniform")[0]
    for video, rate in ((file, None), (file.read_bytes(), None), (everything, 10)):
        got = clip.timeline(video, LABELS, fps=rate)
        torch.testing.assert_close(got.times, expected.times)
        assert torch.equal(got.probabilities, expected.probabilities)
    with pytest.raises(VideoOptionError, match="a timeline needs it"):
        clip.timeline(everything, LABELS)


# --- models of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "AltCLIPModel"])
@torch.no_grad()
def test_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers", minversion="5")
    from tests.tiny_transformers import make, make_tokenizer

    model = expand_temporal_attention(make(name))
    clip = VideoCLIP(model, make_tokenizer(), sampling=FEW, templates=FORMS)
    classifier = ZeroShotClassifier(model, make_tokenizer(), LABELS, FORMS)
    video = VideoFrames(frames(), 30)
    views = read_clip(video, num_frames=3, views=2, transform=transform_for(model))
    expected = classifier(views).mean(dim=0).softmax(dim=-1)
    assert torch.equal(clip.classify(video, LABELS).probabilities, expected)
    similar = clip.encode_video(video) @ clip.encode_text(LABELS).T
    assert similar.shape == (3,)
    torch.testing.assert_close(clip.encode_text(LABELS).norm(dim=-1), torch.ones(3))
    assert clip.contract.library == "transformers"

    def run(seed: int) -> Tensor:
        own = VideoFrames(frames(seed), 30)
        return clip.classify(own, LABELS[: 2 + seed % 2]).probabilities

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(12)))
    assert all(torch.equal(run(seed), rows) for seed, rows in enumerate(together))


# --- threads, caches and memory ------------------------------------------------------------------


def test_threads_that_share_an_object_give_what_one_gives(file: Path) -> None:
    jobs: list[Callable[[VideoCLIP], Tensor]] = []
    for seed in range(8):
        video, labels = VideoFrames(frames(seed), 30), LABELS[: 2 + seed % 2]
        jobs += [
            lambda clip, v=video, k=labels: clip.classify(v, k).probabilities,  # type: ignore[misc]
            lambda clip, v=video: clip.encode_video([v, file], num_threads=2),  # type: ignore[misc]
            lambda clip, k=labels: clip.encode_text(k),  # type: ignore[misc]
        ]
    shared, alone = wrapped(), wrapped()
    shared.model.train()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: job(shared), jobs))
    assert shared.model.training
    assert all(torch.equal(job(alone), got) for job, got in zip(jobs, results, strict=True))


def test_classifiers_are_kept_until_the_text_weights_change(clip: VideoCLIP) -> None:
    calls: list[list[str]] = []

    def counting(texts: list[str]) -> Tensor:
        calls.append(texts)
        return tiny_tokenizer(texts)

    clip = VideoCLIP(expanded(), counting, sampling=FEW, templates=FORMS)
    video = VideoFrames(frames(), 30)
    for _ in range(3):
        clip.classify(video, LABELS)
    first = clip.classifier(LABELS)
    assert len(calls) == 1
    assert clip.classifier(tuple(LABELS)) is first
    assert clip.classifier(LABELS[:2]) is not first
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: clip.classifier(["new", "labels"]), range(8)))
    assert all(one is made[0] for one in made)
    with torch.no_grad():
        clip.model.text_projection.mul_(-1)
    changed = clip.classifier(LABELS)
    assert changed is not first
    torch.testing.assert_close(changed.text_features, -first.text_features)
    assert clip.to("cpu") is clip
    assert clip.classifier(LABELS) is not changed
    used = clip.classifier(LABELS)
    for i in range(40):  # many sets of labels do not fill the memory
        last = clip.classifier([f"label {i}", "other"])
        assert clip.classifier(LABELS) is used  # those that were used last are kept
        assert clip.classifier([f"label {i}", "other"]) is last
    assert len(clip._texts._classifiers) == 16


def test_classifiers_of_other_templates_or_poolings_are_others() -> None:
    texts = TextSide(expanded(), tiny_tokenizer)
    first = texts.classifier(LABELS, FORMS, "unit_frames")
    assert texts.classifier(LABELS, ["{}"], "unit_frames") is not first
    assert texts.classifier(LABELS, FORMS, "frames") is not first
    assert texts.classifier(LABELS, FORMS, "unit_frames") is first


def test_a_model_in_train_mode_encodes_as_in_eval_mode() -> None:
    clip, video = wrapped(), VideoFrames(frames(), 30)
    expected = clip.encode_video(video)

    def drop(visual: nn.Module, _: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, 0.5, visual.training)

    clip.model.visual.register_forward_hook(drop)
    clip.model.train()
    assert torch.equal(clip.encode_video(video), expected)
    assert all(module.training for module in clip.model.modules())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="measures through /proc")
def test_300_predictions_hold_memory_flat(file: Path) -> None:
    clip = wrapped(sampling=Sampling(num_frames=2))
    videos = [file, file.read_bytes(), VideoFrames(frames(count=200), 30)]

    def use() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 10, len(os.listdir("/proc/self/fd"))

    used = []
    for number in range(300):
        clip.classify(videos[number % 3], LABELS)
        if number % 50 == 9:
            clip.encode_video(videos, num_threads=2)
        if number % 100 == 99:
            used.append(use())
    assert used[-1][0] - used[0][0] < 4096  # KiB; a leak of each decoder would be 20 times as much
    assert used[-1][1] == used[0][1]


# --- the contract and the object -----------------------------------------------------------------


def test_the_contract_brings_every_setting(file: Path) -> None:
    pixels = transforms.build("clip", TINY_PIXELS, mean=(0.5, 0.4, 0.3), short_side=10)
    clip = wrapped(transform=pixels, pooling="frames", sampling=FEW.with_(sampler="uniform"))
    contract = clip.contract
    expansion = contract.expansion
    assert expansion is not None
    assert (expansion.window, expansion.boundary, expansion.layers) == (2, "mask", (1, 2))
    assert (contract.frames.sampler, contract.pooling) == ("uniform", "frames")
    assert contract.templates == FORMS
    again = VideoCLIP(expanded(), tiny_tokenizer, contract=contract)
    assert again.contract == contract
    assert again.transform == pixels
    got, want = (model.classify(file, LABELS).probabilities for model in (again, clip))
    assert torch.equal(got, want)
    plain = VideoCLIP(expanded(), tiny_tokenizer)
    assert not torch.equal(plain.classify(file, LABELS).probabilities, want)
    other = VideoCLIP(expanded(), tiny_tokenizer, contract=contract, pooling="unit_frames")
    assert other.contract == contract.with_(pooling="unit_frames")
    assert VideoCLIP(tiny_clip(), tiny_tokenizer).contract.expansion is None
    facts = contract.with_(method="iwr", lam=0.5, model="ViT-tiny", unknown={"later": 1})
    kept = VideoCLIP(expanded(), tiny_tokenizer, contract=facts).contract
    assert kept == facts


def test_the_object_shows_itself_and_can_be_copied(clip: VideoCLIP) -> None:
    text = repr(clip)
    for part in ("CLIP", "window 2, boundary 'mask', layers [1, 2]", "2 x 3 frames", "8 pixels"):
        assert part in text
    assert "not expanded" in repr(VideoCLIP(tiny_clip(), tiny_tokenizer))
    video = VideoFrames(frames(), 30)
    expected = clip.classify(video, LABELS).probabilities
    for other in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert torch.equal(other.classify(video, LABELS).probabilities, expected)
    wrapper = VideoCLIP(torch.nn.DataParallel(clip.model), tiny_tokenizer)
    assert wrapper.model is clip.model


def test_autocast_and_half_precision(clip: VideoCLIP) -> None:
    video = VideoFrames(frames(), 30)
    expected = clip.classify(video, LABELS).probabilities
    low = wrapped(autocast=torch.bfloat16)
    half = VideoCLIP(expanded().bfloat16(), tiny_tokenizer, sampling=FEW, templates=FORMS)
    for other in (low, half):
        got = other.classify(video, LABELS).probabilities
        assert got.dtype == other.encode_video(video).dtype == torch.float32
        assert other.encode_text(LABELS).dtype == torch.float32
        assert not torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05)


# --- wrong use -----------------------------------------------------------------------------------


def test_models_that_are_refused(clip: VideoCLIP) -> None:
    prompted = prompting.attach_vifi(tiny_clip(), text_prompts=2, vision_prompts=2, text_depth=1,
                                     vision_depth=1)  # fmt: skip
    with pytest.raises(PromptingError, match=r"prompts.*openvclip\.prompting\.VideoClassifier"):
        VideoCLIP(prompted, tiny_tokenizer)
    with pytest.raises(UsageError, match=r"is a ZeroShotClassifier; .* Pass classifier\.model"):
        VideoCLIP(clip.classifier(LABELS), tiny_tokenizer)
    with pytest.raises(UnsupportedModelError, match="Linear lacks"):
        VideoCLIP(torch.nn.Linear(1, 1), tiny_tokenizer)
    with pytest.raises(UsageError, match="vocabulary of 64 tokens"):
        VideoCLIP(tiny_clip())
    with pytest.raises(UsageError, match="class names are encoded by the original CLIP"):
        VideoCLIP(tiny_clip(), tiny_tokenizer, contract=clip.contract.with_(text="original"))
    with pytest.raises(VideoOptionError, match="transform is 'train', which is random"):
        wrapped(transform=transforms.build("train", TINY_PIXELS))
    with pytest.raises(VideoOptionError, match="'dense', which starts at random frames"):
        wrapped(sampling=Sampling(sampler="dense"))
    with pytest.raises(ClassNamesError, match="templates is one string"):
        wrapped(templates="{}")


@pytest.mark.parametrize(
    ("videos", "options", "error", "text"),
    [
        ([], {}, UsageError, "videos is empty; expected at least one video"),
        (frames(), {}, VideoOptionError, "frame rate is not known, and the sampler 'released'"),
        ([frames()], {}, VideoOptionError, r"^videos\[0\]: <20 frames>: the frame rate"),
        ([frames() / 255], {"fps": 30}, VideoShapeError, r"videos\[0\]: .*float64"),
        (torch.zeros(4, 3, 8, 8), {}, UsageError, "expected the path of a file, or uint8 frames"),
        (frames()[0], {"fps": 30}, VideoOptionError, "an image has no rate"),
        ([b"text" * 99], {}, VideoError, r"^videos\[0\]: <396 bytes>: cannot be read"),
        ([["a.mp4"]], {}, UsageError, r"^videos\[0\]: video is a list; expected one video"),
        ([frames()], {"batch_size": 0}, UsageError, "batch_size=0"),
        ([frames()], {"num_threads": -2}, VideoOptionError, "num_threads=-2"),
        (b"\x89PNG\r\n\x1a\nrest", {}, VideoError, "<12 bytes>: can't be read as an image"),
    ],
)
def test_videos_that_are_refused(
    clip: VideoCLIP, videos: Any, options: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        clip.classify(videos, LABELS, **options)
    with pytest.raises(error, match=text):
        clip.encode_video(videos, **options)


def test_features_of_broken_weights_are_refused() -> None:
    clip = wrapped()
    for weights, call in (
        (clip.model.text_projection, lambda: clip.encode_text("archery")),
        (clip.model.visual.proj, lambda: clip.encode_video(VideoFrames(frames(), 30))),
    ):
        with torch.no_grad():
            weights.fill_(torch.nan)
        with pytest.raises(NonFiniteWeightsError, match=r"features are NaN or infinite.*proj"):
            call()


def test_labels_and_texts_that_are_refused(clip: VideoCLIP) -> None:
    video = VideoFrames(frames(), 30)
    with pytest.raises(ClassNamesError, match="labels is empty"):
        clip.classify(video, [])
    with pytest.raises(ClassNamesError, match="more than once: 'a'"):
        clip.classify(video, ["a", "a"])
    with pytest.warns(LabelWarning, match="'yoga' is the only label"):
        clip.classify(video, ["yoga"])
    for texts in ([], [1], None, b"text"):
        with pytest.raises(UsageError, match="expected a text or a list of texts"):
            clip.encode_text(texts)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="texts is 3; expected a text or a list of texts"):
        clip.encode_text(3)  # type: ignore[arg-type]
    for labels in (None, 3):
        with pytest.raises(ClassNamesError, match=f"labels is {labels}; expected a list"):
            clip.classify(video, labels)  # type: ignore[call-overload]


def test_a_closed_image_is_refused(clip: VideoCLIP) -> None:
    picture = pytest.importorskip("PIL.Image").fromarray(frames()[0])
    picture.close()
    with pytest.raises(VideoError, match="can't be read as an image"):
        clip.classify(picture, LABELS)


@pytest.mark.parametrize("autocast", ["bfloat16", torch.int8])
def test_an_autocast_that_is_no_floating_dtype_is_refused(autocast: Any) -> None:
    with pytest.raises(UsageError, match=r"autocast=.*; expected .* torch.bfloat16"):
        wrapped(autocast=autocast)
