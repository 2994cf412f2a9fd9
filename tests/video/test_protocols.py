"""The protocols, built from the official annotation files, against the published counts."""

from __future__ import annotations

import collections
import json
import random
import re
import shutil

import pytest

from openvclip.errors import ProtocolError, VideoNotFoundError, VideoOptionError
from openvclip.video import class_names, protocols
from tests.helpers import DATA, FACTS, REPO, needs_lists


@pytest.fixture(scope="module")
def facts():
    return json.loads((FACTS / "facts.json").read_text())


@pytest.fixture(scope="module")
def names():
    return json.loads((FACTS / "class_names.json").read_text())


@pytest.fixture(scope="module")
def sets():
    return json.loads((FACTS / "kinetics600_zero_shot_classes.json").read_text())


@pytest.fixture(scope="module")
def folders(facts):
    """The class folders of both data sets, from the annotation files."""
    ucf = [line.split("/")[0] for line in lines(DATA / "ucfTrainTestlist" / "testlist01.txt")]
    hmdb = [
        path.name.removesuffix("_test_split1.txt")
        for path in (DATA / "testTrainMulti_7030_splits").glob("*_test_split1.txt")
    ]
    return {"ucf101": sorted(set(ucf)), "hmdb51": sorted(hmdb)}


def lines(path):
    return path.read_text().split("\n")[:-1]


def hmdb_rows(number):
    """(folder, file name, flag) of every video, read without the package."""
    rows = []
    for path in sorted((DATA / "testTrainMulti_7030_splits").glob(f"*_test_split{number}.txt")):
        folder = path.name[: -len(f"_test_split{number}.txt")]
        rows += [(folder, *line.split()) for line in lines(path)]
    return rows


# --- names -------------------------------------------------------------------------------------


def test_all_class_names(names, sets):
    for dataset, expected in names.items():
        assert class_names(dataset) == expected
    for number in (1, 2, 3):
        assert class_names(f"kinetics600-{number}") == sets[f"split{number}"]
    with pytest.raises(VideoOptionError, match="dataset='imagenet' is not known"):
        class_names("imagenet")


@needs_lists
def test_class_name_rules_on_all_names(names, folders):
    for dataset, count in (("ucf101", 101), ("hmdb51", 51)):
        made = [protocols.class_name(dataset, folder) for folder in folders[dataset]]
        assert len(set(made)) == count
        assert set(made) == set(names[dataset])
    for name in names["ucf101"]:  # and back: a capital letter starts each word
        assert re.fullmatch(r"[A-Z][a-z]*( [A-Z][a-z]*)*", name), name
    assert all(protocols.class_name("kinetics600", name) == name for name in names["kinetics400"])


# --- EP1, EP2, EP3 -----------------------------------------------------------------------------


@needs_lists
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_numbers_of_classes_and_videos(dataset, facts):
    counts = facts["protocols"]["EP1_video_counts"][dataset]
    classes = {"ucf101": 101, "hmdb51": 51}[dataset]
    expected_counts = {
        f"{dataset}-ep1": counts,
        f"{dataset}-ep2": [{"ucf101": 13320, "hmdb51": 5100}[dataset]],
        f"{dataset}-ep3": {"ucf101": [3783, 3734, 3696], "hmdb51": [1530] * 3}[dataset],
    }
    for text in ("testlist01 + trainlist01 = 13320 videos", "flags 1 and 2 = 5100 videos"):
        assert text in facts["protocols"]["EP2"]
    assert "3783/3734/3696 videos, HMDB-51 1530 each" in facts["protocols"]["EP3"]
    for name, expected in expected_counts.items():
        splits = protocols.load(name, annotations=DATA)
        assert [len(split.samples) for split in splits] == expected
        assert protocols.published_videos(name) == expected
        for split in splits:
            assert len(split.class_names) == (classes // 2 if "ep1" in name else classes)
            assert {label for _, label in split.samples} == set(range(len(split.class_names)))
            assert len({path for path, _ in split.samples}) == len(split.samples)
        assert len({split.name for split in splits}) == len(splits)
        assert {split.protocol for split in splits} == {name}


@needs_lists
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_the_halves_are_drawn_as_released(dataset, names, folders):
    spelled = {protocols.class_name(dataset, folder): folder for folder in folders[dataset]}
    everything = names[dataset]
    state = random.getstate()
    splits = protocols.load(f"{dataset}-ep1", annotations=DATA)
    assert random.getstate() == state
    random.seed(2023)
    for split in splits:
        order = list(range(len(everything)))
        random.shuffle(order)
        half = sorted(order[: len(order) // 2])
        assert split.class_names == [everything[index] for index in half]
        for path, label in split.samples:
            assert path.split("/")[0] == spelled[split.class_names[label]]
    random.setstate(state)


@needs_lists
def test_videos_of_ucf101_are_those_of_the_lists(names):
    root = DATA / "ucfTrainTestlist"
    (whole,) = protocols.load("ucf101-ep2", annotations=root)
    train = [line.split() for line in lines(root / "trainlist01.txt")]
    test = lines(root / "testlist01.txt")
    assert [path for path, _ in whole.samples] == [*test, *(path for path, _ in train)]
    assert whole.class_names == names["ucf101"]
    official = {path: int(index) - 1 for path, index in train}
    assert {path: label for path, label in whole.samples if path in official} == official
    for number, split in enumerate(protocols.load("ucf101-ep3", annotations=root), 1):
        assert [path for path, _ in split.samples] == lines(root / f"testlist{number:02d}.txt")


@needs_lists
def test_videos_of_hmdb51_are_those_of_the_flags(names):
    root = DATA / "testTrainMulti_7030_splits"
    loaded = [
        (protocols.load("hmdb51-ep2", annotations=root)[0], 1, "12"),
        *((s, n, "2") for n, s in enumerate(protocols.load("hmdb51-ep3", annotations=root), 1)),
    ]
    for split, number, flags in loaded:
        expected = [
            (f"{folder}/{name}", names["hmdb51"].index(folder.replace("_", " ")))
            for folder, name, flag in hmdb_rows(number)
            if flag in flags
        ]
        assert sorted(split.samples) == sorted(expected)


# --- Kinetics-600 ------------------------------------------------------------------------------


def kinetics_csv(path, sets, each=46, header="label,youtube_id,time_start,time_end,split"):
    """Write a validation list with ``each`` videos of every class of the three sets, and others."""
    every = sorted({name for n in (1, 2, 3) for name in sets[f"split{n}"]} | {"archery", "yoga"})
    rows = [
        f"{name},{index:05d}-_{video:05d},{video},{video + 10},val"
        for index, name in enumerate(every)
        for video in range(each)
    ]
    path.write_text("\n".join([header, *rows]) + "\n")
    return every


@pytest.mark.parametrize("file", ["validate.csv", "annotations/val.csv", "kinetics600/val.txt"])
def test_kinetics_600(file, sets, facts, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    every = kinetics_csv(path, sets)
    splits = protocols.load("kinetics600", annotations=tmp_path)
    assert protocols.load("kinetics600", annotations=path) == splits
    for number, split in enumerate(splits, 1):
        assert split.name == f"kinetics600-{number}"
        assert split.class_names == sets[f"split{number}"]
        assert len(split.samples) == 160 * 46
        counts = collections.Counter(label for _, label in split.samples)
        assert set(counts.values()) == {46}
        for name, label in split.samples:
            assert every[int(name[:5])] == split.class_names[label]
        video = 0
        assert split.samples[video][0] == f"{every.index(split.class_names[0]):05d}-_00000" + (
            "_000000_000010.mp4"
        )
    published = re.search(r"(\d+)/(\d+)/(\d+) videos", facts["protocols"]["K600"])
    assert protocols.published_videos("kinetics600") == [int(count) for count in published.groups()]


def test_another_kinetics_600_list_is_refused(sets, tmp_path):
    path = tmp_path / "validate.csv"
    kinetics_csv(path, sets, each=88)  # 14080: the list of ViFi-CLIP contains training videos
    with pytest.raises(ProtocolError, match=r"14080 videos; expected 7276 to 8000\. These are not"):
        protocols.load("kinetics600", annotations=tmp_path, allow_incomplete=True)
    kinetics_csv(path, sets, each=2)
    with pytest.raises(ProtocolError, match=r"name 320 videos; expected 7276 to 8000.*incomplete"):
        protocols.load("kinetics600", annotations=tmp_path)
    incomplete = protocols.load("kinetics600", annotations=tmp_path, allow_incomplete=True)
    assert [len(split.samples) for split in incomplete] == [320] * 3
    path.write_text("label,youtube_id,time_start,time_end,split\narchery,abc,1,11,val\n")
    with pytest.raises(ProtocolError, match=r"no videos of 160 of the 160 classes of set 1"):
        protocols.load("kinetics600", annotations=tmp_path)


def test_videos_are_found_where_a_download_puts_them(sets, tmp_path):
    path = tmp_path / "validate.csv"
    every = kinetics_csv(path, sets, each=1)
    videos = tmp_path / "videos"
    wanted = {}
    for index, name in enumerate(every):
        stem = f"{index:05d}-_00000_000000_000010"
        place = [f"{stem}.mp4", f"{name}/{stem}.mp4", f"val/part_0/{stem}.mkv", None][index % 4]
        wanted[name] = place or f"{stem}.mp4"
        if place:
            (videos / place).parent.mkdir(parents=True, exist_ok=True)
            (videos / place).touch()
            (videos / place).with_suffix(".info.json").touch()
    (videos / "loop").symlink_to(videos, target_is_directory=True)
    splits = protocols.load("kinetics600", annotations=path, videos=videos, allow_incomplete=True)
    for split in splits:
        assert [path for path, _ in split.samples] == [wanted[n] for n in split.class_names]
    with pytest.raises(VideoNotFoundError, match="no such folder of videos"):
        protocols.load(
            "kinetics600", annotations=path, videos=tmp_path / "none", allow_incomplete=True
        )


# --- base to novel, few shots --------------------------------------------------------------------


def train_paths(dataset):
    if dataset == "ucf101":
        return [line.split()[0] for line in lines(DATA / "ucfTrainTestlist" / "trainlist01.txt")]
    return [f"{folder}/{name}" for folder, name, flag in hmdb_rows(1) if flag == "1"]


@needs_lists
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_base_to_novel(dataset, facts, names):
    counts_of_paper = facts["vifi_clip"]["base_to_novel"]["videos"][dataset]
    whole = protocols.base_to_novel(dataset, annotations=DATA, shots=None)
    splits = protocols.base_to_novel(dataset, annotations=DATA)
    assert len(whole.train.samples) == counts_of_paper["base_train"]
    assert len(splits.train.samples) == counts_of_paper["train_16_shot"]
    assert len(splits.base.samples) == counts_of_paper["base_test"]
    assert len(splits.novel.samples) == counts_of_paper["novel_test"]
    assert splits.base.class_names == splits.train.class_names
    assert len({part.protocol for part in splits}) == 3  # never averaged together
    together = splits.base.class_names + splits.novel.class_names
    assert sorted(together) == sorted(names[dataset])
    for part in (splits.base.class_names, splits.novel.class_names):
        assert part == [name for name in names[dataset] if name in part]
    # every novel class has at most as many training videos as any base class
    counts = collections.Counter(
        protocols.class_name(dataset, path.split("/")[0]) for path in train_paths(dataset)
    )
    assert max(counts[n] for n in splits.novel.class_names) <= min(
        counts[n] for n in splits.base.class_names
    )
    if dataset == "hmdb51":
        assert splits.novel.class_names == sorted(names[dataset])[:25]


@needs_lists
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_few_shots(dataset, names):
    allowed = set(train_paths(dataset))
    drawn = {}
    for shots in (2, 4, 8, 16):
        train, test = protocols.few_shot(dataset, annotations=DATA, shots=shots, seed=3)
        assert train.class_names == test.class_names == names[dataset]
        counts = collections.Counter(label for _, label in train.samples)
        assert counts == dict.fromkeys(range(len(names[dataset])), shots)
        for path, label in train.samples:
            assert protocols.class_name(dataset, path.split("/")[0]) == names[dataset][label]
        drawn[shots] = {path for path, _ in train.samples}
        assert drawn[shots] <= allowed
        assert test.samples == protocols.load(f"{dataset}-ep3", annotations=DATA)[0].samples
    assert drawn[2] < drawn[4] < drawn[8] < drawn[16]


@needs_lists
def test_draws_follow_their_seed(folders):
    def paths(seed, **options):
        train, _ = protocols.few_shot("hmdb51", annotations=DATA, shots=4, seed=seed, **options)
        return {path for path, _ in train.samples}

    assert paths(1) == paths(1)
    assert len(paths(1) & paths(2)) < 40  # of 204; 4 of 70 agree in 12 on average
    base = protocols.base_to_novel("hmdb51", annotations=DATA, shots=4, seed=1)
    assert {path for path, _ in base.train.samples} < paths(1)


# --- errors --------------------------------------------------------------------------------------


@needs_lists
def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ProtocolError, match=r"'ucf101' is not known: choose one of 'ucf101-ep1'"):
        protocols.load("ucf101", annotations=DATA)
    with pytest.raises(ProtocolError, match="is not known"):
        protocols.published_videos("ucf101-ep4")
    for name, file in (
        ("ucf101-ep2", "testlist01.txt"),
        ("hmdb51-ep1", "brush_hair_test_split1.txt"),
        ("kinetics600", "validate.csv"),
    ):
        with pytest.raises(ProtocolError, match=f"looked for {file}.* in {tmp_path}/"):
            protocols.load(name, annotations=tmp_path)
    with pytest.raises(ProtocolError, match="'kinetics600' has no few-shot splits: choose one of"):
        protocols.base_to_novel("kinetics600", annotations=DATA)
    with pytest.raises(ProtocolError, match="shots=71: class 'brush hair' has only 70 training"):
        protocols.few_shot("hmdb51", annotations=DATA, shots=71)
    with pytest.raises(ProtocolError, match="shots=0: expected"):
        protocols.few_shot("hmdb51", annotations=DATA, shots=0)


@needs_lists
def test_incomplete_lists(tmp_path):
    root = shutil.copytree(DATA / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    path = root / "trainlist01.txt"
    path.write_text("\n".join(lines(path)[:-10]) + "\n")
    text = r"ucf101-ep2: the annotations name 13310 videos; expected 13320\. .* incomplete"
    with pytest.raises(ProtocolError, match=text):
        protocols.load("ucf101-ep2", annotations=tmp_path)
    (incomplete,) = protocols.load("ucf101-ep2", annotations=tmp_path, allow_incomplete=True)
    assert len(incomplete.samples) == 13310
    with pytest.raises(ProtocolError, match="name 9527 videos; expected 9537"):
        protocols.few_shot("ucf101", annotations=tmp_path, shots=2)
    whole = lines(DATA / "ucfTrainTestlist" / "trainlist01.txt")
    path.write_text("\n".join([*whole, whole[-1]]) + "\n")
    with pytest.raises(ProtocolError, match=r"13321 videos; expected 13320\. These are not the of"):
        protocols.load("ucf101-ep2", annotations=tmp_path, allow_incomplete=True)


def test_the_names_reach_the_wheel():
    """setuptools puts into it what package-data names: every file that is not Python's."""
    declared = re.search(r"^openvclip = \[(.*)\]$", (REPO / "pyproject.toml").read_text(), re.M)
    package = REPO / "openvclip"
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert "video/class_names.json" in files
    assert files == set(json.loads(f"[{declared[1]}]"))
