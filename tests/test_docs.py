"""The README's code runs, and the documented metrics are those that a run logs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mst_mrq

ROOT = Path(__file__).parent.parent


def test_the_readmes_training_loop_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(snippet, {})
    # 500 steps, a topology update every 100; 0.6 of 65 * 512 + 512 * 512 weights, one count rounded down per layer
    assert capsys.readouterr().out == "sparsity 0.600 after 5 topology updates\n"


COMMANDS = [
    line.split() for line in re.findall(r"^    python (mst_.*)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_readmes_commands_start(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [*command, *([] if "--dry-run" in command else ["--dry-run"])])
    assert importlib.import_module(command[0].removesuffix(".py")).main() == 0
    if "--scale 5" in " ".join(command):
        assert "371,147,560" in capsys.readouterr().out  # the whole agent on dog, without the predictor


@pytest.mark.parametrize("page", ["README.md", "docs/mst_mrq.md", "docs/sparse_utils.md"])
def test_commands_and_flags_in_the_docs_exist(page):
    text = (ROOT / page).read_text()
    commands = re.findall(r"^(?: {4}|.*`)(?:srun )?python (mst_\w+\.py)([^`|\n]*)", text, flags=re.MULTILINE)
    known = {f"--{name.replace('_', '-')}" for name in mst_mrq.Args.__dataclass_fields__}
    known |= {"--env", "--help", "--no-cuda", "--no-diagnostics"}
    for script, flags in commands:
        assert (ROOT / script).exists()
        assert {flag for flag in shlex.split(flags, comments=True) if flag.startswith("--")} <= known
    mentioned = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", text))
    assert mentioned <= known | {"--signal", "--requeue", "--open-mode"}  # the last are Slurm's
    for link in re.findall(r"\]\(([\w/.]+\.md)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists()


def test_the_documented_metrics_are_those_of_a_run(reference, script):
    table = (ROOT / "docs" / f"{script}.md").read_text()
    documented = set()
    for row in re.findall(r"^\| (`[a-z]+/.*?) \|", table, flags=re.MULTILINE):
        for tag in re.findall(r"`(.*?)`", row):
            documented |= {tag.replace("<module>", module) for module in mst_mrq.MODULES}
    events = EventAccumulator(str(reference))
    events.Reload()
    assert documented == set(events.Tags()["scalars"])
