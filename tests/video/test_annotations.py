from __future__ import annotations

import pytest

from openvclip.errors import AnnotationError
from openvclip.video import read_annotations

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
    found = read_annotations(write(tmp_path, text), class_names)
    assert found.samples == samples
    assert found.class_names == names


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
    found = read_annotations(clips / "labels.csv")
    assert len(found.samples) == 73
    assert all((clips / path).is_file() for path, _ in found.samples)
    assert len(found.class_names) == len({label for _, label in found.samples})
