"""The notebooks run from top to bottom on the runs of results/small. One is stored with what it printed and drew."""

import nbformat
import pytest
from conftest import ENVIRONMENT, ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "analysis" / "notebooks"
NOTEBOOKS = sorted(set(FOLDER.glob("*.ipynb")) - {FOLDER / "evidence.ipynb"})


def run(notebook, monkeypatch) -> None:
    settings = {"RUNS": "../../results/small/runs", "SIZE": "small", "MUJOCO_GL": "disable"}
    for name, value in {**ENVIRONMENT, **settings}.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_output_and_draws_or_says_how_to_make_the_runs(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    run(notebook, monkeypatch)
    drawing = [cell for cell in notebook.cells if cell.source.startswith("show(") or "\ndraw(" in f"\n{cell.source}"]
    assert drawing
    for cell in drawing:
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")  # in pieces
        drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
        assert drawn != ("start with python -m experiments run" in printed), cell


def printed_and_drawn(notebook) -> list[tuple[str, int]]:
    """What each cell prints, and how many pictures it draws."""
    return [
        (
            "".join(output.text for output in cell.outputs if output.get("name") == "stdout"),
            sum("image/png" in output.get("data", {}) for output in cell.outputs),
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_stored_outputs_of_the_evidence_are_those_of_code_and_results_now(monkeypatch):
    notebook = nbformat.read(FOLDER / "evidence.ipynb", as_version=4)
    stored = printed_and_drawn(notebook)
    run(notebook, monkeypatch)
    assert printed_and_drawn(notebook) == stored, "stale: run `make evidence`, look at the outputs and commit them"
    assert [drawn for _, drawn in stored] == [0, 1, 1, 0, 1, 1]
