"""What README, CONTRIBUTING and docs/hyperparameters.md promise is what the code does."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import sparse_utils
from analysis.runs import load_runs
from experiments import figures

ROOT = Path(__file__).parent.parent
SCRIPTS = ("mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg")


def table() -> dict[str, dict[str, str]]:
    """Defaults by flag and script, as docs/hyperparameters.md has them."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs/hyperparameters.md").read_text(), flags=re.MULTILINE)
    return {flag: dict(zip(SCRIPTS, cells.split(" | "), strict=False)) for flag, cells in rows}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_hyperparameters_has_the_defaults_of_the_scripts(script):
    args = importlib.import_module(script).Args()
    documented = {flag: defaults[script] for flag, defaults in table().items()}
    assert documented == {flag: str(getattr(args, flag, "-")) for flag in documented}
    operating = {  # neither algorithm nor network
        "exp_name", "seed", "torch_deterministic", "cuda", "track", "wandb_project_name", "wandb_entity",
        "capture_video", "runs_dir", "dry_run", "eval_only", "cuda_graphs", "compile", "matmul_precision", "env_id",
        "action_repeat", "max_episode_steps", "eval_processes", "log_interval", "checkpoint_interval", "diagnostics",
    }  # fmt: skip
    rest = {flag for flag in vars(args) if flag not in operating and not flag.endswith("scale") and flag != "residual"}
    assert rest <= documented.keys()


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_growth_rule_of_contributing_grows_the_smallest_gradients(monkeypatch):
    monkeypatch.setattr(sparse_utils, "GROWTHS", dict(sparse_utils.GROWTHS))
    exec(snippets("CONTRIBUTING.md")[0], {})
    weight, mask = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
    gradient = torch.tensor([9.0, 5.0, 7.0, 0.5])
    new_mask, _ = sparse_utils.prune_and_grow(weight, mask, gradient, 1, 1, growth="small")
    assert new_mask.tolist() == [True, False, False, True]  # drops the weight 1, grows at the gradient 0.5


def test_the_study_of_contributing_is_declared_with_its_15_runs(monkeypatch, capsys):
    monkeypatch.setattr(figures, "FIGURES", dict(figures.FIGURES))
    exec(snippets("CONTRIBUTING.md")[1], {})
    assert capsys.readouterr().out == "15 runs\n"  # 3 sparsities, 5 seeds, one task


def test_the_diff_of_the_readme_is_a_training_loop():
    """Its lines, without the signs of a diff, train a small network that is sparse in the end."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = "\n".join(line[2:] for line in diff.splitlines()).replace("500_000", "20")
    critic = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    names = {"torch": torch, "Sparsifier": sparse_utils.Sparsifier, "critic": critic}
    exec(code, names | {"critic_loss": lambda: critic(torch.randn(4, 8)).square().mean()})
    zeros = sum(int((p == 0).sum()) for p in critic.parameters() if p.ndim == 2)
    assert zeros == 345  # 0.6 of 576, rounded down


def test_the_evidence_quotes_the_returns_of_the_results():
    """The last evaluation of every run of Fig. 14 at small size."""
    found = load_runs(ROOT / "results/small/runs", sizes=False).evaluations
    last = found[found["agent_step"] == 30_000].set_index(["critic_regime", "actor_regime", "seed"])
    page, quoted = (ROOT / "docs/evidence.md").read_text(), {}
    for critic, actor, cells in re.findall(
        r"^\| (dense|.st) / (dense|.st)(?: \(MST\))? \| (.*) \|$", page, flags=re.MULTILINE
    ):
        values = enumerate(cells.split(" | "), 1)
        quoted |= {(critic, actor, seed): int(value) for seed, value in values if value != "-"}
    assert quoted == last["episode_return_mean"].round().to_dict()
