"""What README, CONTRIBUTING and docs say is so: commands, snippets, links, flags, metrics, defaults and results."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, all_scripts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparse_utils
from analysis import curves, figure, tables
from experiments import figures
from experiments.__main__ import make_parser

PAGES = ["README.md", "CONTRIBUTING.md", "results/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}


def commands(program: str) -> list[list[str]]:
    """The words behind this program in every indented line of code, up to `--` or a comment."""
    lines = re.sub(r"\\\n *", "", "\n".join(TEXT.values()))  # one for each command
    found = re.findall(rf"^    {program}([^'>\\\n]*)", lines.replace("%d", "1"), flags=re.MULTILINE)
    return list(map(list, dict.fromkeys(tuple(shlex.split(line.split(" -- ")[0], comments=True)) for line in found)))


@pytest.mark.parametrize("command", commands(r"(?:printf ')?python (?=mst_)"), ids=" ".join)
def test_the_scripts_take_the_documented_commands(command):
    script = importlib.import_module(command[0].removesuffix(".py"))
    if command[1:] != ["--help"]:
        tyro.cli(script.Args, args=command[1:])  # ends with an error if it does not


@pytest.mark.parametrize("command", commands("python -m experiments "), ids=" ".join)
def test_experiments_takes_the_documented_commands(command):
    args = make_parser().parse_args(command)  # ends with an error if it does not
    if args.command == "commands":
        assert figures.runs(args.figure, args.size, args.envs, args.seeds, dict(args.only))


ANALYSIS = [(main, command) for main in (figure, curves) for command in commands(f"python -m {main.__name__} ")]


@pytest.mark.parametrize(("module", "command"), ANALYSIS, ids=str)
def test_the_analysis_takes_the_documented_commands(module, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        module.main(command)
    assert re.search("error: (no run in|runs is no folder)", capsys.readouterr().err)  # the first after the arguments


def test_speed_takes_the_documented_commands():
    documented = {flag for line in commands("python benchmarks/speed.py") for flag in line if flag.startswith("--")}
    assert documented
    line = [sys.executable, ROOT / "benchmarks/speed.py", "--help"]
    known = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert documented <= set(re.findall(r"--[a-z-]+", known))


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_flags_of_a_page_exist(page):
    links = re.findall(r"(?:\]\((?!http)|src=\"|srcset=\")([^)#\"]+)", TEXT[page])
    files = re.findall(r"`((?:benchmarks|docs|experiments|analysis|tests)/[\w/]+\.\w+)`", TEXT[page])
    assert [x for x in links if not (ROOT / page).parent.joinpath(x).exists()] == []
    assert [x for x in files if not (ROOT / x).exists()] == []
    assert len(TEXT["README.md"].splitlines()) < 150
    if page == "README.md" or re.fullmatch(r"docs/(mst_\w+|performance)\.md", page):  # pages about the scripts alone
        fields = {name for script in SCRIPTS for name in importlib.import_module(script).Args.__dataclass_fields__}
        known = {f"--{no}{name.replace('_', '-')}" for name in fields for no in ("", "no-")} | {"--env", "--help"}
        code = re.findall(r"`[^`\n]+`", re.sub(r"^    .*", "", TEXT[page], flags=re.MULTILINE))
        others = re.compile(r"experiments|analysis|benchmarks|sbatch|logdir|play")
        code = [x for x in code if "mst_" in x or not others.search(x)]
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(code))) <= known


def documented(script: str) -> set[str]:
    """The tags in the table of a script's page, and of MR.Q's where the page refers to it."""
    page = TEXT[f"docs/{script}.md"]
    tags = documented("mst_mrq") if "Those of [mst_mrq](mst_mrq.md), and:" in page else set()
    for row in re.findall(r"^\| (`[a-z]+/.*?) \|", page, flags=re.MULTILINE):
        for tag in re.findall(r"`(.*?)`", row):
            tags |= {tag.replace("<module>", module) for module in importlib.import_module(script).MODULES}
    return tags


@all_scripts
def test_the_documented_metrics_are_those_of_a_run(reference, script):
    assert documented(script) == set(EventAccumulator(str(reference)).Reload().Tags()["scalars"])


@all_scripts
def test_the_table_of_hyperparameters_has_the_defaults_of_the_scripts(script):
    args = importlib.import_module(script).Args()
    columns, *rows = re.findall(r"^\| `?(\w+)`? \| (.*) \|$", TEXT["docs/hyperparameters.md"], flags=re.MULTILINE)
    column = columns[1].split(" | ").index(script)
    documented = {flag: cells.split(" | ")[column] for flag, cells in rows}
    assert documented == {flag: str(getattr(args, flag, "-")) for flag in documented}
    operating = {  # neither algorithm nor network
        "exp_name", "seed", "cuda", "track", "runs_dir", "dry_run", "cuda_graphs", "compile", "env_id", "action_repeat",
        "max_episode_steps", "log_interval", "checkpoint_minutes",
    }  # fmt: skip
    rest = {flag for flag in vars(args) if flag not in operating and not flag.endswith("scale") and flag != "residual"}
    assert rest <= documented.keys()


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT[page], flags=re.DOTALL)


@pytest.mark.parametrize("snippet", snippets("docs/sparse_utils.md"))
def test_a_snippet_runs(snippet):
    torch.manual_seed(0)
    exec(snippet, {})  # the asserts are in the page


def test_the_growth_rule_of_contributing_grows_the_smallest_gradients(monkeypatch):
    monkeypatch.setattr(sparse_utils, "GROWTHS", dict(sparse_utils.GROWTHS))
    exec(snippets("CONTRIBUTING.md")[0], {})
    weight, mask = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
    gradient = torch.tensor([9.0, 5.0, 7.0, 0.5])
    new_mask, _ = sparse_utils.prune_and_grow(weight, mask, gradient, 1, 1, growth="small")
    assert new_mask.tolist() == [True, False, False, True]  # drops the weight 1, grows at the gradient 0.5


def test_the_study_of_contributing_is_declared_with_its_15_runs(monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", dict(figures.FIGURES))
    exec(snippets("CONTRIBUTING.md")[1], dict(vars(figures)))
    assert len(figures.runs("actor-sparsity")) == 15  # 3 sparsities, 5 seeds, one task


def test_the_diff_of_the_readme_is_a_training_loop():
    """Its lines, without the signs of a diff, train a small network that is sparse in the end."""
    (diff,) = re.findall(r"```diff\n(.*?)```", TEXT["README.md"], flags=re.DOTALL)
    code = "\n".join(line[2:] for line in diff.splitlines()).replace("500_000", "20")
    critic = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    names = {"torch": torch, "Sparsifier": sparse_utils.Sparsifier, "critic": critic}
    exec(code, names | {"critic_loss": lambda: critic(torch.randn(4, 8)).square().mean()})
    zeros = sum(int((p == 0).sum()) for p in critic.parameters() if p.ndim == 2)
    assert zeros == 345  # 0.6 of 576, rounded down


def test_the_tables_of_the_evidence_are_what_the_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = TEXT["docs/evidence.md"]
    assert tables.filled(page) == page, "stale: run `make evidence`, look at the page and commit it"
    assert page.count("<!-- table: ") == 6
