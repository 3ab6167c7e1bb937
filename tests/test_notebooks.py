"""The notebooks run from top to bottom on real runs and are stored without output."""

from pathlib import Path

import nbformat
import pytest
from conftest import ENVIRONMENT, ROOT, life
from nbclient import NotebookClient

from experiments.figures import MRQ, MRQ_MST_5X, MRSAC, RES, SIMBA, STRONG_ENCODER, Run

NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
SAC = {"script": "mst_sac", **SIMBA}
CELLS = [
    MRQ,  # Figs. 2, 3, 4, 11
    STRONG_ENCODER,  # 5, 6, 8, 9
    STRONG_ENCODER | {"critic_regime": "dst"},
    STRONG_ENCODER | {"critic_scale": 5},  # 6, 7
    STRONG_ENCODER | {"actor_scale": 5},  # 9, 10
    RES,  # 11, 17
    MRQ_MST_5X,  # 11, 12 and the studies beyond the paper
    SAC,  # 13
    SAC | {"width_scale": 4, "depth_scale": 3},  # 14
    MRSAC,  # 26
]


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory) -> Path:
    """A run for every cell in the notebooks, of one seed: all others are missing."""
    cwd = tmp_path_factory.mktemp("figures")
    for cell in CELLS:
        run = Run(cell, "cartpole-balance", seed=1, size="toy")
        script, *flags = run.arguments()
        ended = life(script.removesuffix(".py"), *flags, "--total-timesteps", "260", "--eval-episodes", "1", cwd=cwd)
        assert ended.code == 0, ended
        assert (cwd / "runs" / run.directory).is_dir()
    return cwd / "runs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, runs_dir, monkeypatch):
    for name, value in {**ENVIRONMENT, "RUNS": str(runs_dir), "SIZE": "toy", "MUJOCO_GL": "disable"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    drawing = [cell for cell in notebook.cells if cell.source.startswith("show(") or "\ndraw(" in f"\n{cell.source}"]
    assert drawing
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")  # in pieces
        assert "missing: cartpole-balance__toy-" in printed or path.stem == "curves"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []


def test_there_is_a_notebook_per_section():
    assert [path.stem for path in NOTEBOOKS] == ["actor", "algorithms", "critic", "curves", "encoder", "mst"]
