"""Bad input of the page about evaluations: what the errors say, and what is not written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from openvclip import cli
from openvclip.errors import EvaluationError, MissingDependencyError, RecordsError, UsageError
from openvclip.evaluation import RetrievalEvaluation, RetrievalScore, Timing, retrieval_json
from openvclip.evaluation.ranking import retrieval_metrics
from openvclip.evaluation.report import ReportSettings, library, write_report
from tests.evaluation.small_results import result_of, splits_of, write_results
from tests.evaluation.test_report import LAMS, Captured, Page, without_library

__all__ = ["without_library"]


def test_bad_folders(tmp_path: Path, capsys: Captured) -> None:
    good = write_results(tmp_path / "good", result_of(LAMS, splits_of()))
    text = (good / "results.json").read_text()

    def failure(*arguments: object) -> str:
        out = tmp_path / "p.html"
        assert cli.main(["report", *map(str, arguments), "-o", str(out)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "holds no file results.json" in failure(tmp_path / "empty")
    (tmp_path / "empty" / "settings.json").write_text("{}")
    assert "run the same command again to finish it" in failure(tmp_path / "empty")
    assert f"did you mean {good}?" in failure(tmp_path / "goood")
    assert "expected a folder with a file results.json" in failure(good / "settings.json")
    parts = {"per_class": True, "confusion": True}
    bad = write_results(tmp_path / "bad", result_of(LAMS, splits_of()), **parts)
    content = json.loads(text)
    whole = json.loads((bad / "results.json").read_text())

    def changed(**values: object) -> str:
        """The results with other values in the split of the first λ, or without a part."""
        first, *others = json.loads(json.dumps(whole["results"]))
        first["splits"][0].update(values)
        first["splits"][0] = {k: v for k, v in first["splits"][0].items() if v is not None}
        return json.dumps({**whole, "results": [first, *others]})

    for damaged, words in (
        (text[:100], "can't be read"),
        ("[]", "it is no JSON object"),
        ("{}", 'it has no list "results"'),
        (json.dumps({**content, "results": [{"protocol": ""}]}), "an entry has no 'lam'"),
        (json.dumps({**content, "results": [{**content["results"][0], "lam": "x"}]}), "wrong type"),
        (json.dumps({**content, "results": [3]}), "can't be read"),
        (json.dumps({"results": content["results"]}), 'it has no "settings"'),
        (json.dumps({**content, "settings": {**content["settings"], "tuned": "v"}}), "in tuned"),
        (json.dumps({**content, "unreadable": 3}), '"unreadable" is no list'),
        (json.dumps({**content, "results": content["results"] * 2}), "do not fit together"),
        (changed(name="other"), "do not fit together"),
        (changed(per_class=[0.5]), "wrong type"),
        (changed(per_class={"run": "x"}), "wrong type"),
        (changed(per_class={"run": math.inf}), "wrong type"),
        (changed(confusion=[[1, 2], [3]]), "wrong type"),
        (changed(confusion=[[0.5] * 4] * 4), "wrong type"),
        (changed(class_names=None), "an entry has no 'class_names'"),
        (changed(class_names=["a"] * 4), "wrong type"),
    ):
        (bad / "results.json").write_text(damaged)
        message = failure(tmp_path)
        assert str(bad) in message
        assert words in message
    # predictions of one run beside the accuracies of another
    write_results(tmp_path / "bad", result_of(LAMS, splits_of(), seed=1), predictions=False)
    assert "predictions.safetensors has other accuracies" in failure(bad)
    metrics = retrieval_metrics(_eye())
    score = RetrievalScore(metrics, metrics, 2, 2, 0, _eye())
    retrieval = retrieval_json(RetrievalEvaluation("msrvtt", {None: score}, [], Timing(), {}))
    (bad / "results.json").write_text(json.dumps(retrieval))
    assert "holds results of retrieval" in failure(bad)
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "p.html")]) == 0
    assert f"left out {bad}: results of retrieval" in capsys.readouterr().err


def _eye() -> Any:
    import torch

    return torch.eye(2)


def test_an_existing_page_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    folder = write_results(tmp_path / "r", result_of([None], splits_of(), tuned=None))
    out = tmp_path / "p.html"
    out.write_text("mine")
    arguments = ["report", str(folder / "results.json"), "-o", str(out)]
    assert cli.main(arguments) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", str(folder)):  # a folder can't be replaced
        flags = ["report", "r", "--overwrite", "-o", place]
        assert cli.main(flags) == 2
        assert "Is a directory" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert "1 model, 1 test" in capsys.readouterr().out
    assert Page(out).numbers["models"] == ["tiny"]


@pytest.mark.parametrize("lams", [[0.0, 0.5, 1.0], [0.5]])
def test_the_original_clip_is_one_model(lams: list[float], tmp_path: Path) -> None:
    tuned = write_results(tmp_path / "a", result_of([0.0], splits_of()))
    sweep = write_results(tmp_path / "b", result_of(lams, splits_of(), tuned="other"))
    text = f"b, the results of the original CLIP, has λ = {', '.join(f'{lam:g}' for lam in lams)};"
    with pytest.raises(UsageError, match=text):
        write_report(tmp_path / "p.html", [tuned], settings=ReportSettings(original=sweep))
    assert not (tmp_path / "p.html").exists()


def test_wrong_settings() -> None:
    no_sizes = (0, -1.0, math.nan, math.inf, "8", None, True)
    for name, values in {
        "clips": (-1, 1.5, True),
        "megabytes": no_sizes,
        "poster_width": no_sizes,
    }.items():
        for wrong in values:
            with pytest.raises(EvaluationError, match=f"^{name}="):
                ReportSettings(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(RecordsError, match="no folders"):
        write_report("p.html", [])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.setattr(library, "_script", "")
    with pytest.raises(MissingDependencyError, match=r'pip install "openvclip\[report\]"'):
        library.vega_script()
