"""The notebook: short cells, no outputs in the repository, and it runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers import REPO

NOTEBOOK = REPO / "examples" / "quickstart.ipynb"
LAMBDAS = [0.0, 0.4, 1.0]


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    return list(content["cells"])


def test_the_repository_holds_no_outputs(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_twelve_short_cells_each_below_its_explanation(cells: list[dict[str, Any]]) -> None:
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", *["markdown", "code"] * 12, "markdown"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert max(map(len, code)) <= 24
    titles = [cell["source"][0] for cell in cells[1:-1] if cell["cell_type"] == "markdown"]
    assert [title.split(".")[0] for title in titles] == [f"## {number}" for number in range(1, 13)]


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer clips, epochs and λ; the accuracies that it prints are those of its sweep."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for place, full, small in (
        (1, "ClipSettings(train=256, test=128)", "ClipSettings(train=64, test=64)"),
        (6, "range(8)", "range(2)"),
        (9, "[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]", str(LAMBDAS)),
    ):
        assert full in code[place].source
        code[place].source = code[place].source.replace(full, small)
    check = nbformat.v4.new_code_cell(
        "import json\n"
        "exact = all(torch.equal(model.state_dict()[n], v) for n, v in "
        "openvclip.interpolate(clip, average, 0.4).items())\n"
        "print(json.dumps({'exact': exact, 'seen': [r.top1 for r in closed.values()], "
        "'n': [r.n_clips for r in zero.values()], 'count': swa.n_averaged, "
        "'losses': len(losses)}))"
    )
    notebook.cells.append(check)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    monkeypatch.setenv("PYTHONPATH", str(REPO))  # for the process that runs the cells
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in code]
    facts = json.loads(notebook.cells[-1].outputs[0].text)
    assert facts["exact"]  # the model that predicts is the interpolation
    assert facts["n"] == [64] * len(LAMBDAS)
    assert facts["losses"] == 8
    assert facts["count"] == 2
    sweep = [line.split() for line in printed[9].splitlines()]
    assert [float(line[2]) for line in sweep] == LAMBDAS
    assert [line[4] for line in sweep] == [f"{value:.1%}" for value in facts["seen"]]
    assert any("image/png" in output.get("data", {}) for output in code[10].outputs)
    lines = printed[11].splitlines()
    assert lines[0].endswith(".mp4")
    assert sum(float(line.split("%")[0]) for line in lines[1:]) == pytest.approx(100, abs=0.3)
