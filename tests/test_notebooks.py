"""The notebooks run from top to bottom. One is stored with what it printed and drew, the others without."""

import nbformat
import pytest
from conftest import ENVIRONMENT, ROOT
from nbclient import NotebookClient
from test_analysis_runs import write

from experiments.figures import MRQ, MRQ_MST_5X, MRSAC, RES, SIMBA, STRONG_ENCODER, Run

FOLDER = ROOT / "analysis" / "notebooks"
NOTEBOOKS = sorted(set(FOLDER.glob("*.ipynb")) - {FOLDER / "evidence.ipynb"})
SAC = {"script": "mst_sac", **SIMBA}
TAGS = [
    f"plasticity/{module}_{what}" for module in ("encoder", "critic", "actor") for what in ("srank", "dormant_ratio")
]
# a run for every cell in the notebooks: those of Figs. 2 to 4 and 11; 5 to 9; 10; 11, 17; 12; 13; 14; 26
CELLS = [
    MRQ, STRONG_ENCODER, STRONG_ENCODER | {"critic_regime": "dst"}, STRONG_ENCODER | {"critic_scale": 5},
    STRONG_ENCODER | {"actor_scale": 5}, RES, MRQ_MST_5X, SAC, SAC | {"width_scale": 4, "depth_scale": 3}, MRSAC,
]  # fmt: skip


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """Runs of one seed: all others are missing."""
    folder = tmp_path_factory.mktemp("runs")
    for cell in CELLS:
        write(folder, Run(cell, "cartpole-balance", 1, "toy"), scalars=[(tag, s, 0.5) for tag in TAGS for s in (0, 9)])
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_output_and_runs(path, runs_dir, monkeypatch):
    for name, value in {**ENVIRONMENT, "RUNS": str(runs_dir), "SIZE": "toy", "MUJOCO_GL": "disable"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    drawing = [cell for cell in notebook.cells if cell.source.startswith("show(") or "\ndraw(" in f"\n{cell.source}"]
    assert drawing
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")  # in pieces
        assert "missing: cartpole-balance__toy-" in printed or path.stem == "curves"


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
    for name, value in {**ENVIRONMENT, "MUJOCO_GL": "disable"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(FOLDER / "evidence.ipynb", as_version=4)
    stored = printed_and_drawn(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    assert printed_and_drawn(notebook) == stored, "stale: run `make evidence`, look at the outputs and commit them"
    assert [drawn for _, drawn in stored] == [0, 1, 1, 0, 1, 1]
