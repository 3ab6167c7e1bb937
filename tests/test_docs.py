"""The README's code runs, and the documented metrics are those that a run logs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis import figure
from experiments.__main__ import make_parser
from experiments.figures import runs

ROOT = Path(__file__).parent.parent
DOCUMENTED = ["mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg"]


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


@pytest.mark.parametrize("page", ["README.md", "docs/sparse_utils.md", *(f"docs/{name}.md" for name in DOCUMENTED)])
def test_commands_and_flags_in_the_docs_exist(page):
    text = (ROOT / page).read_text()
    commands = re.findall(r"^(?: {4}|.*`)python (mst_\w+\.py)([^`|\n]*)", text, flags=re.MULTILINE)
    names = {name for script in DOCUMENTED for name in importlib.import_module(script).Args.__dataclass_fields__}
    known = {f"--{name.replace('_', '-')}" for name in names}
    known |= {"--env", "--help", "--logdir", "--no-cuda", "--no-diagnostics", "--no-clipped-double-q"}
    for script, flags in commands:
        assert (ROOT / script).exists()
        assert {flag for flag in shlex.split(flags, comments=True) if flag.startswith("--")} <= known
    mentioned = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", text))
    assert mentioned <= known
    for link in re.findall(r"\]\(([\w/.]+\.md)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists()


PAGES = ["README.md", "docs/experiments.md", "docs/figures.md"]


def lines(module: str) -> list[list[str]]:
    """The arguments of every `python -m <module>` on these pages, up to `--`."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    found = re.findall(rf"^    python -m {re.escape(module)} (.*)", text, flags=re.MULTILINE)
    return [shlex.split(line.split(" -- ")[0], comments=True) for line in found]


@pytest.mark.parametrize("line", lines("experiments"), ids=" ".join)
def test_experiments_takes_the_documented_commands(line):
    args = make_parser().parse_args(line)  # ends with an error if it does not
    assert args.command == "list" or runs(args.figure, args.size, args.envs, args.seeds, dict(args.only))


@pytest.mark.parametrize("line", lines("analysis.figure"), ids=" ".join)
def test_figure_takes_the_documented_commands(line, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        figure.main([*line, "--runs", str(tmp_path / "nowhere")])
    assert "nowhere is no folder" in capsys.readouterr().err  # the first complaint after the arguments


@pytest.fixture(params=DOCUMENTED)
def script(request):
    return request.param


def documented(script: str) -> set[str]:
    """The tags in the table of a script's page, and of MR.Q's where the page refers to it."""
    page = (ROOT / "docs" / f"{script}.md").read_text()
    tags = documented("mst_mrq") if "Those of [mst_mrq](mst_mrq.md), and:" in page else set()
    for row in re.findall(r"^\| (`[a-z]+/.*?) \|", page, flags=re.MULTILINE):
        for tag in re.findall(r"`(.*?)`", row):
            tags |= {tag.replace("<module>", module) for module in importlib.import_module(script).MODULES}
    return tags


@pytest.fixture
def tags(reference) -> dict[str, list[str]]:
    """The tags that a run has logged, by kind."""
    events = EventAccumulator(str(reference))
    events.Reload()
    return events.Tags()


def test_the_documented_metrics_are_those_of_a_run(tags, script):
    assert documented(script) == set(tags["scalars"])


def test_every_custom_chart_shows_one_metric(tags, script):
    assert "custom_scalars__config__" in tags["tensors"]
    for row in importlib.import_module(script).tensorboard_layout().values():
        for _, (pattern,) in row.values():  # TensorBoard matches it from the start of a tag
            assert len([tag for tag in tags["scalars"] if re.match(pattern, tag)]) == 1, pattern
