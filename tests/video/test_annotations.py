from __future__ import annotations

import pytest

from openvclip.errors import AnnotationError, ClassNamesError, VideoError, VideoNotFoundError
from openvclip.models.labels import read_labels
from openvclip.video import (
    VideoDataset,
    class_names,
    find_videos,
    locate_videos,
    read_annotations,
)
from tests.video.conftest import unprivileged

NAMES = ["archery", "shoot bow", "bow"]


def write(tmp_path, text, name="list.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "class_names", "samples", "names"),
    [
        ("a.mp4,0\nb c.mp4,2\n", None, [("a.mp4", 0), ("b c.mp4", 2)], None),
        ("a.mp4 0\nb c.mp4 2\n", None, [("a.mp4", 0), ("b c.mp4", 2)], None),
        ("a.mp4\t1\r\n\r\nb.mp4  0\r\n", None, [("a.mp4", 1), ("b.mp4", 0)], None),
        ("\ufeffa.mp4,x\nb.mp4,w\n", None, [("a.mp4", 1), ("b.mp4", 0)], ["w", "x"]),
        ("a.mp4, shoot bow\nb.mp4, 0", NAMES, [("a.mp4", 1), ("b.mp4", 0)], NAMES),
        ("a b.mp4 shoot bow\nb.mp4 bow", NAMES, [("a b.mp4", 1), ("b.mp4", 2)], NAMES),
        ('"a, b.mp4",archery\n', NAMES, [("a, b.mp4", 0)], NAMES),
        ("path,label,frames\na.mp4,bow,17\n", NAMES, [("a.mp4", 2)], NAMES),
        ("label,path\nbow,a.mp4\n", NAMES, [("a.mp4", 2)], NAMES),
        ("path label\na.mp4 bow\n", NAMES, [("a.mp4", 2)], NAMES),
        ("a.mp4,2\nb.mp4,0", ["2", "1", "0"], [("a.mp4", 0), ("b.mp4", 2)], ["2", "1", "0"]),
    ],
)
def test_formats(text, class_names, samples, names, tmp_path):
    annotations = read_annotations(write(tmp_path, text), class_names)
    assert annotations.samples == samples
    assert annotations.class_names == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,archery\n\nb.mp4,jumping\n", r"list\.csv, line 3: unknown class 'jumping'"),
        ("a.mp4,archery\nb.mp4\n", r"list\.csv, line 2: 'b.mp4' has too few fields"),
        ("a.mp4,\n", r"line 1: 'a.mp4,' has too few fields"),
        (",archery\n", "line 1: ',archery' has too few fields"),
        ("a.mp4 archery\nb.mp4\n", "line 2: 'b.mp4' has too few fields"),
        ("a.mp4,3\n", r"line 1: class index 3 of 'a.mp4'; there are 3 classes"),
        ("a.mp4,-1\n", "line 1: unknown class '-1'"),
        ("a.mp4,1.0\n", "line 1: unknown class '1.0'"),
        ("", "holds no videos"),
        ("\n \n", "holds no videos"),
        ("path,label\n", "holds no videos"),
    ],
)
def test_errors_name_file_and_line(text, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(write(tmp_path, text), NAMES)


def test_mixed_labels_without_names_are_names(tmp_path):
    assert read_annotations(write(tmp_path, "a,1\nb,x")).class_names == ["1", "x"]


def test_files_and_names(tmp_path):
    with pytest.raises(AnnotationError, match=r"none\.csv: no such file"):
        read_annotations(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(AnnotationError, match="UTF-8"):
        read_annotations(tmp_path / "binary.csv")
    with pytest.raises(AnnotationError, match=r"\['a'\] more than once"):
        read_annotations(write(tmp_path, "a.mp4,a"), ["a", "b", "a"])


def test_real_labels(clips):
    annotations = read_annotations(clips / "labels.csv")
    assert len(annotations.samples) == 73
    assert all((clips / path).is_file() for path, _ in annotations.samples)
    assert len(annotations.class_names) == len({label for _, label in annotations.samples})


# --- official lists ------------------------------------------------------------------------------

ARCHERY = "Archery/v_Archery_g08_c01.avi"
YOYO = "YoYo/v_YoYo_g08_c01.avi"


@pytest.mark.parametrize(
    ("text", "subset"),
    [
        (f"{ARCHERY} 3\r\n{YOYO} 101\r\n", "train"),  # counted from 1
        (f"{ARCHERY}\r\n{YOYO}\r\n", "test"),
    ],
)
def test_ucf101_lists(text, subset, tmp_path):
    path = write(tmp_path, text, "anything.txt")
    names = class_names("ucf101")
    annotations = read_annotations(path)
    assert annotations.samples == [(ARCHERY, names.index("Archery")), (YOYO, names.index("Yoyo"))]
    assert annotations.class_names == names
    assert read_annotations(path, subset=subset) == annotations
    other = {"train": "test", "test": "train"}[subset]
    with pytest.raises(AnnotationError, match=f"no videos of subset='{other}'; it has {subset}"):
        read_annotations(path, subset=other)
    # class names of the user: spelled like the folders or like the prompts
    assert read_annotations(path, ["YoYo", "Archery"]).samples == [(ARCHERY, 1), (YOYO, 0)]
    assert read_annotations(path, ["Archery", "Yoyo"]).samples == [(ARCHERY, 0), (YOYO, 1)]
    with pytest.raises(AnnotationError, match=r"anything\.txt, line 2: unknown class 'Yoyo'"):
        read_annotations(path, ["Archery"])


def test_a_list_that_counts_from_0_is_not_the_official_one(tmp_path):
    annotations = read_annotations(write(tmp_path, f"{ARCHERY} 2\n{YOYO} 100\n"))
    assert annotations.samples == [(ARCHERY, 2), (YOYO, 100)]
    assert annotations.class_names is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ARCHERY} 3\n{YOYO} 100\n", r"line 2: class index 100 of 'YoYo/.*expected 101 "),
        (
            f"{ARCHERY} 3\nv_YoYo_g08_c01.avi 101\n",
            "line 2: .* has too few fields; expected Class/",
        ),
        (f"{ARCHERY} 3\nChess/v_Chess_g01_c01.avi 5\n", "line 2: unknown class 'Chess'"),
    ],
)
def test_errors_in_ucf101_lists(text, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(write(tmp_path, text))


def test_hmdb51_lists(tmp_path):
    text = "a_(1).avi 1 \nb!.avi 2 \nc.avi 0 \n"
    path = write(tmp_path, text, "shake_hands_test_split2.txt")
    label = class_names("hmdb51").index("shake hands")
    both = [("shake_hands/a_(1).avi", label), ("shake_hands/b!.avi", label)]
    annotations = read_annotations(path)
    assert annotations.samples == both  # without the video that the split does not use
    assert annotations.class_names == class_names("hmdb51")
    assert read_annotations(path, subset="train").samples == both[:1]
    assert read_annotations(path, subset="test").samples == both[1:]
    assert read_annotations(path, ["shake_hands"], subset="test").samples == [(both[1][0], 0)]
    # under another name the same lines are paths and class indices
    plain = read_annotations(write(tmp_path, text, "list.txt"))
    assert plain.samples == [("a_(1).avi", 1), ("b!.avi", 2), ("c.avi", 0)]
    write(tmp_path, "a.avi 1\nb.avi\n", "wave_test_split1.txt")
    with pytest.raises(AnnotationError, match=r"wave_test_split1\.txt, line 2: .* too few fields"):
        read_annotations(tmp_path / "wave_test_split1.txt")
    write(tmp_path, "a.avi 1\n", "chess_test_split1.txt")
    with pytest.raises(AnnotationError, match="line 1: unknown class 'chess'"):
        read_annotations(tmp_path / "chess_test_split1.txt")


def test_folders_of_official_lists(clips, tmp_path):
    data = clips.parent
    ucf, hmdb = data / "ucfTrainTestlist", data / "testTrainMulti_7030_splits"
    for split, count in ((1, 9537), (2, 9586), (3, 9624)):
        annotations = read_annotations(ucf, subset="train", split=split)
        assert len(annotations.samples) == count
        assert annotations == read_annotations(ucf / f"trainlist0{split}.txt")
        # the class index in the list, and the class index from the folder
        lines = (ucf / f"trainlist0{split}.txt").read_text().split("\n")[:-1]
        assert [
            (line.split()[0], int(line.split()[1]) - 1) for line in lines
        ] == annotations.samples
        assert len(read_annotations(hmdb, subset="train", split=split).samples) == 3570
    data_set = VideoDataset(hmdb, clips, subset="test", split=3, transform=None)
    assert len(data_set) == 1530
    assert data_set.class_names == class_names("hmdb51")
    (tmp_path / "testlist01.txt").write_text((ucf / "testlist01.txt").read_text())
    with pytest.raises(
        AnnotationError, match=r"1 of the 2 files of split 1 are missing: trainlist"
    ):
        read_annotations(tmp_path)
    with pytest.raises(AnnotationError, match="without official lists of split 2; expected testl"):
        read_annotations(tmp_path, split=2)


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"passing American football (in game)",---QUuC4vJs,84,94,validate,0
yoga,-xyz,5.0,15.0,val,0
archery,abc,1,11,train,1
"""


def test_kinetics_lists(tmp_path):
    path = write(tmp_path, KINETICS, "validate.csv")
    annotations = read_annotations(path)
    names = ["archery", "passing American football (in game)", "yoga"]
    assert annotations.class_names == names
    assert annotations.samples == [
        ("---QUuC4vJs_000084_000094.mp4", 1),
        ("-xyz_000005_000015.mp4", 2),
        ("abc_000001_000011.mp4", 0),
    ]
    assert [label for _, label in read_annotations(path, subset="val").samples] == [0, 1]
    assert read_annotations(path, names[::-1]).samples[1] == ("-xyz_000005_000015.mp4", 0)
    root = tmp_path / "videos"
    (root / "yoga").mkdir(parents=True)
    (root / "yoga" / "-xyz_000005_000015.webm").touch()
    data = VideoDataset(path, root, transform=None)
    assert data.samples[1] == ("yoga/-xyz_000005_000015.webm", 2)
    assert data.samples[0] == annotations.samples[0]
    with pytest.raises(VideoNotFoundError):
        VideoDataset(path, tmp_path / "none", transform=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("yoga,abc,1", "line 5: 'yoga,abc,1' has too few fields; expected label, youtube_id"),
        (",abc,1,11,test", "line 5: .* too few fields"),
        ("yoga,abc,start,11,val", r"line 5: times \['start', '11'\] of 'abc'; expected seconds"),
    ],
)
def test_errors_in_kinetics_lists(row, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(write(tmp_path, KINETICS + row + "\n"))


def test_subsets_are_for_official_lists(tmp_path):
    with pytest.raises(AnnotationError, match="subset='train'; it names no subsets"):
        read_annotations(write(tmp_path, "a.mp4,0\n"), subset="train")


def test_locating_prefers_the_path_as_written(tmp_path):
    for name in ("b/x.mp4", "a/x.mp4", "a/y.AVI", "a/z.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    samples = [("b/x.mp4", 0), ("x.mp4", 1), ("y.mp4", 2), ("z.mp4", 3), ("./b/x.mp4", 4)]
    located = locate_videos(samples, tmp_path)
    assert located == [
        ("b/x.mp4", 0),
        ("a/x.mp4", 1),
        ("a/y.AVI", 2),
        ("z.mp4", 3),
        ("./b/x.mp4", 4),
    ]


def test_a_folder_that_cant_be_listed_is_an_error(open_folder):
    (open_folder / "class" / "part").mkdir(parents=True)
    (open_folder / "a.mp4").touch()
    (open_folder / "class" / "part").chmod(0)
    with unprivileged(), pytest.raises(VideoError, match=r"class/part: can't be listed \(Permiss"):
        find_videos(open_folder)


# --- lists as people write them -------------------------------------------------------------------

WORDS = ["playing guitar", "riding a bike", "archery"]
TWO = [("clips/a 1.mp4", 0), ("b.avi", 1)]


@pytest.mark.parametrize(
    "text",
    [
        # Report 32 (mmaction2#2659): tabs, and labels of several words.
        "clips/a 1.mp4\tplaying guitar\nb.avi\triding a bike\n",
        "clips/a 1.mp4\t\tplaying guitar\t\r\nb.avi\triding a bike  \r\n",
        "clips/a 1.mp4 playing guitar\nb.avi   riding a bike\n",
        "clips/a 1.mp4;playing guitar\nb.avi; riding a bike\n",
        "clips/a 1.mp4,playing guitar\rb.avi,riding a bike\r",
        "\ufeff# made by hand\n\n#\nclips/a 1.mp4, playing guitar \n\n# end\nb.avi,riding a bike",
        '"clips/a 1.mp4"\t"playing guitar"\n"b.avi"\t"riding a bike"\n',
        '"clips/a 1.mp4","playing guitar"\n"b.avi","riding a bike"\n',
        # Report 45: a CSV header taken for a label.
        "Video Path,Class Name\nclips/a 1.mp4,playing guitar\nb.avi,riding a bike\n",
        ",filename,label\n0,clips/a 1.mp4,playing guitar\n1,b.avi,riding a bike\n",
        "label\tfile\tfps\nplaying guitar\tclips/a 1.mp4\t25\nriding a bike\tb.avi\t30\n",
        "video;action\nclips/a 1.mp4;playing guitar\nb.avi;riding a bike\n",
        "filename class\nclips/a 1.mp4 playing guitar\nb.avi riding a bike\n",
    ],
)
@pytest.mark.parametrize("names", [None, WORDS])
def test_separators_headers_and_labels_of_several_words(text, names, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode("utf-8"))
    annotations = read_annotations(path, names)
    assert annotations.samples == TWO
    assert annotations.class_names == (names or WORDS[:2])


@pytest.mark.parametrize(
    ("text", "names", "samples"),
    [
        ("a.mp4,throw, fast\nb.mp4,run", ["run", "throw, fast"], [("a.mp4", 1), ("b.mp4", 0)]),
        ("clip,action\n", ["action", "run"], [("clip", 0)]),  # a class of this name
        ("x.mp4 bow", ["shoot bow", "bow"], [("x.mp4", 1)]),
        ("a 3\nb 0", None, [("a", 3), ("b", 0)]),
        ("A.MP4 x.mp4 bow", ["bow"], [("A.MP4 x.mp4", 0)]),
    ],
)
def test_lists_at_the_edges(text, names, samples, tmp_path):
    assert read_annotations(write(tmp_path, text), names).samples == samples


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("clip_id,activity\na.mp4,run\nb.mp4,jump\n", None, "line 1: .* looks like a header"),
        ("run,a.mp4\njump,b.mp4\n", None, "line 1: 'run,a.mp4' has the label before the path"),
        ("a.mp4,run\nb.mp4,throw, fast\n", None, "line 2: .* more fields .* double quotes"),
        ("a.mp4 shoot bow\n", ["bow"], "unknown class 'shoot bow'"),
        ("a.mp4,HandStandPushups\n", ["Handstand Pushups"], "did you mean 'Handstand Pushups'"),
        ("a.mp4 120 5\nb.mp4 90 3\n", None, "line 1: several numbers after the path"),
    ],
)
def test_lists_that_are_not_clear_are_errors(text, names, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(write(tmp_path, text), names)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(encoding, tmp_path):
    (tmp_path / "list.txt").write_bytes("a.mp4\trun\n".encode(encoding))
    with pytest.raises(AnnotationError, match=r"list\.txt: is UTF-16 text. Save it as UTF-8"):
        read_annotations(tmp_path / "list.txt")
    with pytest.raises(ClassNamesError, match=r"list\.txt: is UTF-16 text. Save it as UTF-8"):
        read_labels(tmp_path / "list.txt")


def test_other_encodings_name_the_line(tmp_path):
    (tmp_path / "list.txt").write_bytes("a.mp4,run\nb.mp4,café\n".encode("cp1252"))
    with pytest.raises(AnnotationError, match=r"list\.txt, line 2: is not UTF-8 text .* 0xe9"):
        read_annotations(tmp_path / "list.txt")
    with pytest.raises(AnnotationError, match=r"lists\.txt: no such file \(did you mean .*/list"):
        read_annotations(tmp_path / "lists.txt")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("playing guitar\nriding a bike\narchery\n", "a.txt"),
        ("\ufeffplaying guitar \r\n riding a bike\t\r\narchery\r\n\r\n", "a.txt"),
        ("playing guitar\rriding a bike\rarchery", "a.txt"),
        ("# classes\nplaying guitar\nriding a bike\n# last\narchery\n", "a.txt"),
        ("label\nplaying guitar\nriding a bike\narchery\n", "a.csv"),
        ("Label\nplaying guitar\nriding a bike\narchery\n", "a.txt"),
        ("id,name\n0,playing guitar\n1,riding a bike\n2,archery\n", "kinetics_400_labels.csv"),
        ("id;name\n0;playing guitar\n1;riding a bike\n2;archery\n", "a.csv"),
        ("name,id\nplaying guitar,0\nriding a bike,1\narchery,2\n", "a.csv"),
        ("0,playing guitar\n1,riding a bike\n2,archery\n", "a.csv"),
        ("1, playing guitar\n2, riding a bike\n3, archery\n", "a.txt"),
        ("0\tplaying guitar\n1\triding a bike\n2\tarchery\n", "a.txt"),
        ("playing guitar\t1\nriding a bike\t2\narchery\t3\n", "a.txt"),
        ('"playing guitar"\n"riding a bike"\n"archery"\n', "a.txt"),
    ],
)
def test_files_of_labels(text, name, tmp_path):
    """Report 45: a CSV header taken for a label."""
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    assert read_labels(path) == WORDS


@pytest.mark.parametrize(
    ("text", "name", "labels"),
    [
        ("throw, fast\nrun\n", "a.csv", ["throw, fast", "run"]),
        ("throw, fast\nrun, slowly\n", "a.txt", ["throw, fast", "run, slowly"]),
        ("throw; fast\nrun\n", "a.csv", ["throw; fast", "run"]),
        ("100 m\n200 m\n", "a.txt", ["100 m", "200 m"]),
        ("#selfie\nrun\n", "a.txt", ["#selfie", "run"]),
        ("1\n2\n3\n", "a.txt", ["1", "2", "3"]),
        ("a photo of {}, moving.\na video of {}.\n", "t.txt", None),
    ],
)
def test_labels_are_kept_as_they_are(text, name, labels, tmp_path):
    path = write(tmp_path, text, name)
    assert read_labels(path) == (labels or text.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 ApplyEyeMakeup\n2 Archery\n", "begins with its number .*'1 ApplyEyeMakeup'"),
        ("run\t0.3\njump\t0.5\n", "has several columns"),
        ("id\tname\n3\trun\n1\tjump\n", "does not count the lines"),
        ("label\n", "holds no names"),
        ("a\n\nb\n", "line 2: is blank"),
        ("0,a\n1,b\n2,a\n", "line 3: 'a' is on line 1 already"),
    ],
)
def test_files_of_labels_that_are_not_clear_are_errors(text, message, tmp_path):
    with pytest.raises(ClassNamesError, match=message):
        read_labels(write(tmp_path, text, "a.txt"))
