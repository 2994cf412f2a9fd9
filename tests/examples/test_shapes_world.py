"""The vocabulary, the drawings and the files of the shapes world."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes.clips import (
    CLIP_SIZE,
    LISTS,
    ClipSettings,
    draw_clip,
    main,
    make_clips,
    write_clip,
)
from examples.shapes.drawing import (
    VideoLook,
    draw_image,
    draw_images,
    draw_motion,
    draw_video,
    draw_videos,
)
from examples.shapes.glyphs import EXTENT, TABLE_SIZE, distance_tables, signed_distance
from examples.shapes.motion import sample_motion
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.world import (
    ACTIONS,
    COLOURS,
    DEVELOPMENT,
    SEEN,
    SHAPES,
    SPLITS,
    TEMPLATES,
    UNSEEN,
    class_names,
    still_caption,
)

SETTINGS = ClipSettings(train=66, test=8, seed=5)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# The vocabulary


def test_the_shapes_fall_into_three_disjoint_sets():
    assert len(SHAPES) == len(set(SHAPES)) == 24
    assert sorted(SEEN + DEVELOPMENT + UNSEEN) == sorted(SHAPES)
    assert len(ACTIONS) == len(COLOURS) == 8


@pytest.mark.parametrize("split", SPLITS)
def test_class_names_are_unique_and_shape_major(split):
    names = class_names(split)
    assert len(set(names)) == len(names) == len(SPLITS[split]) * len(ACTIONS)
    assert names[len(ACTIONS) + 2] == f"{SPLITS[split][1]} {ACTIONS[2]}"


def test_an_unknown_split_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"unknown split 'test': expected one of 'seen'"):
        class_names("test")


def test_templates_have_one_place_for_the_name():
    assert all(template.count("{}") == 1 for template in TEMPLATES)


@given(seed=st.integers(0, 2**32 - 1))
def test_captions_say_what_they_are_asked_to_say_and_nothing_else(seed):
    full = still_caption("star", "sliding", "red", rng(seed))
    assert {"star", "sliding", "red"} <= set(full.rstrip(".").split())
    bare = still_caption("star", None, None, rng(seed))
    assert not set(bare.rstrip(".").split()) & {*ACTIONS, *COLOURS}


def test_captions_vary():
    generator = rng()
    assert len({still_caption("star", "sliding", "red", generator) for _ in range(200)}) > 15


# Glyphs


@pytest.mark.parametrize("shape", SHAPES)
def test_a_glyph_fits_its_disc_and_is_not_a_speck(shape):
    inside = distance_tables()[SHAPES.index(shape)] < 0
    area = inside.mean() * (2 * EXTENT) ** 2
    border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    assert 0.4 < area < np.pi
    assert not border.any()


def test_the_distance_to_a_square_is_exact():
    x, y = np.array([0.0, 0.72, 1.72, 1.72]), np.array([0.0, 0.0, 0.0, 1.72])
    np.testing.assert_allclose(
        signed_distance("square", x, y), [-0.72, 0.0, 1.0, np.sqrt(2)], atol=1e-6
    )


def test_no_two_glyphs_look_alike():
    inside = (distance_tables() < 0).reshape(len(SHAPES), TABLE_SIZE**2).astype(np.float64)
    common = inside @ inside.T
    area = np.diag(common)
    overlap = common / (area[:, None] + area[None] - common)
    np.fill_diagonal(overlap, 0)
    assert overlap.max() < 0.85


# Stills


def test_a_still_is_a_function_of_its_seed():
    first, again, other = (draw_image("star", "red", "sliding", rng(s)) for s in (1, 1, 2))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("colour", COLOURS)
def test_a_still_has_its_colour(colour):
    generator = rng(3)
    stills = np.stack([draw_image("square", colour, "resting", generator) for _ in range(20)])
    # The middle of the image belongs to the shape in most stills.
    middle = np.median(stills[:, 14:18, 14:18].reshape(-1, 3), axis=0)
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    directions = values / np.linalg.norm(values, axis=1, keepdims=True)
    assert names[int(np.argmax(directions @ (middle / np.linalg.norm(middle))))] == colour


@pytest.mark.parametrize("action", ACTIONS[1:])
def test_every_action_leaves_a_cue_in_a_still(action):
    """One seed gives one position, size and background; only the cue of the action differs."""
    shapes = np.arange(len(SHAPES))
    colours = np.full(len(SHAPES), list(COLOURS).index("white"))

    def stills(name: str) -> np.ndarray:
        actions = np.full(len(SHAPES), ACTIONS.index(name))
        return draw_images(shapes, colours, actions, rng(4)).astype(float)

    changed = np.abs(stills(action) - stills("resting")).max(axis=-1) > 20
    assert (changed.sum((1, 2)) >= 20).all()  # pixels of 1024


# Videos


def test_a_video_is_a_function_of_its_seed():
    first, again, other = (
        draw_video("star", "red", "sliding", rng(s), frames=5) for s in (1, 1, 2)
    )
    assert first.shape == (5, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_video_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="at least 2 frames to show a motion, got 1"):
        draw_video("star", "red", "sliding", rng(), frames=1)


def plain_motion(action: str, seed: int, frames: int = 16, shape: str = "ring") -> np.ndarray:
    """Draw only the moving shape, white on black, ``[frames, 32, 32]``."""
    motion = sample_motion(np.array([ACTIONS.index(action)]), rng(seed))
    canvas = np.zeros((1, frames, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    white = np.array([list(COLOURS).index("white")])
    return draw_motion(canvas, np.array([SHAPES.index(shape)]), white, motion)[0, ..., 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_but_resting_moves_every_shape(action, shape):
    steps = np.abs(np.diff(plain_motion(action, 1, 8, shape), axis=0)).sum((1, 2))
    if action == "resting":
        assert steps.max() == 0
    else:
        assert steps.mean() > 10  # in units of white pixels, from one frame to the next


@given(
    seed=st.integers(0, 2**32 - 1),
    action=st.sampled_from(range(len(ACTIONS))),
    frames=st.integers(2, 20),
)
def test_a_reversed_clip_is_the_clip_of_the_reversed_motion(seed, action, frames):
    """The exact law of the reversal: poses(t) = reversed().poses(-t)."""
    motion = sample_motion(np.array([action]), rng(seed))
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32)
    forward, backward = motion.poses(time), motion.reversed().poses(-time)
    for name, value in vars(forward).items():
        np.testing.assert_array_equal(value, getattr(backward, name), err_msg=name)


def test_both_senses_of_a_motion_are_equally_likely():
    """The other half of the law: the density of a motion and of its reversal are the same."""
    motion = sample_motion(np.zeros(20_000, np.int64), rng())
    forward = motion.speed > 0
    assert abs(forward.mean() - 0.5) < 0.015
    for name in ("speed", "phase", "x", "y", "radius", "angle"):
        value = np.abs(getattr(motion, name)) if name == "speed" else getattr(motion, name)
        spread = value.std() * np.sqrt(4 / len(value))
        assert abs(value[forward].mean() - value[~forward].mean()) < 4 * spread, name


def test_videos_look_different_from_stills():
    """Frames have more noise than stills and a background with more contrast."""
    count = 256
    generator = rng()
    shapes, colours = generator.integers(0, 24, count), generator.integers(0, 8, count)
    resting = np.zeros(count, np.int64)
    stills = draw_images(shapes, colours, resting, rng(1)).astype(float)
    frames = draw_videos(shapes, colours, resting, rng(1), frames=2)[:, 0].astype(float)

    def roughness(pixels: np.ndarray) -> float:
        return float(np.abs(np.diff(pixels[:, :3], axis=2)).mean())

    assert roughness(frames) > 1.3 * roughness(stills)


def test_the_look_of_videos_can_be_chosen():
    same = np.zeros(4, np.int64)
    plain = VideoLook(texture=0.0, noise=0.0, cast=0.0, fade=0.0)
    video = draw_videos(same, same, same, rng(), frames=3, look=plain)
    np.testing.assert_array_equal(video[:, 0], video[:, 1])
    assert (np.ptp(video[:, :, 0, 0].astype(int), axis=1) == 0).all()


# Files


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("av")
    out = tmp_path_factory.mktemp("shapes")
    return make_clips(out, SETTINGS, num_workers=1, progress=False)


def read_list(path: Path) -> list[tuple[Path, int]]:
    with path.open(newline="") as file:
        return [(path.parent / name, int(label)) for name, label in csv.reader(file)]


def decode(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_lists_hold_the_promised_clips(world):
    assert list(world) == list(LISTS)
    for name, path in world.items():
        rows = read_list(path)
        names = class_names(LISTS[name])
        assert len({file for file, _ in rows}) == len(rows) == SETTINGS.count(name)
        assert all(file.parent.name == names[label] for file, label in rows)
        counts = Counter(label for _, label in rows)
        assert max(counts.values()) - min(counts[label] for label in range(len(names))) <= 1


def test_training_and_test_clips_of_the_seen_shapes_are_different(world):
    train, test = read_list(world["train"]), read_list(world["seen_test"])
    assert not {file for file, _ in train} & {file for file, _ in test}
    assert (draw_clip("train", 0, SETTINGS) != draw_clip("seen_test", 0, SETTINGS)).any()


@pytest.mark.parametrize("name", LISTS)
def test_files_decode_to_what_was_drawn(world, name):
    file, _ = read_list(world[name])[3]
    pixels = decode(file)
    assert pixels.shape == (SETTINGS.frames, CLIP_SIZE, CLIP_SIZE, 3)
    small = pixels.reshape(SETTINGS.frames, IMAGE_SIZE, 2, IMAGE_SIZE, 2, 3).mean((2, 4))
    error = np.abs(small - draw_clip(name, 3, SETTINGS)).mean()
    assert error < 8  # of 255; H.264 removes some of the noise


def test_a_finished_data_set_is_left_alone(world):
    files = [file for path in world.values() for file, _ in read_list(path)]
    before = [file.stat().st_mtime_ns for file in files]
    out = world["train"].parent
    assert make_clips(out, SETTINGS, num_workers=1, progress=False) == world
    assert [file.stat().st_mtime_ns for file in files] == before


def test_an_interrupted_data_set_is_completed_with_the_same_bytes(world):
    file, _ = read_list(world["train"])[7]
    others = {path: path.stat().st_mtime_ns for path in file.parent.parent.rglob("*.mp4")}
    content = file.read_bytes()
    file.unlink()
    make_clips(world["train"].parent, SETTINGS, num_workers=1, progress=False)
    assert file.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in others.items() if path != file)


def test_no_partial_files_are_left(world):
    assert not list(world["train"].parent.rglob("*.partial*"))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    av = pytest.importorskip("av")

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail)
    with pytest.raises(KeyboardInterrupt):
        write_clip(tmp_path / "clip.mp4", np.zeros((2, 32, 32, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_other_settings_in_the_same_folder_are_refused(world):
    with pytest.raises(FileExistsError, match="holds clips made with"):
        make_clips(world["train"].parent, ClipSettings(train=66, test=8, seed=6), progress=False)


def test_the_command_writes_the_data_set_with_two_processes(tmp_path, capsys):
    pytest.importorskip("av")
    main([str(tmp_path), "--train", "18", "--test", "2", "--frames", "4"])
    assert "train: 18 clips in" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.mp4"))) == 18 + 3 * 2


@settings(max_examples=20, deadline=None)
@given(
    index=st.integers(0, 10_000), name=st.sampled_from(sorted(LISTS)), seed=st.integers(0, 2**31)
)
def test_a_clip_depends_on_nothing_but_its_place_and_the_seed(index, name, seed):
    small, large = ClipSettings(train=1, seed=seed), ClipSettings(train=9, test=9, seed=seed)
    np.testing.assert_array_equal(draw_clip(name, index, small), draw_clip(name, index, large))
