"""The commands in README and docs are taken, their flags and links exist, and documented metrics are those of a run."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from analysis import curves, figure
from experiments.__main__ import make_parser
from experiments.figures import runs

ROOT = Path(__file__).parent.parent
DOCUMENTED = ["mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg"]
PAGES = ["README.md", "results/README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md")))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}


def commands(program: str) -> list[list[str]]:
    """The words behind this program in every indented line of code, up to `--` or a comment."""
    lines = re.sub(r"\\\n *", "", "\n".join(TEXT.values()))  # one for each command
    found = re.findall(rf"^    {program}(.*)", lines, flags=re.MULTILINE)
    return list(map(list, dict.fromkeys(tuple(shlex.split(line.split(" -- ")[0], comments=True)) for line in found)))


@pytest.mark.parametrize("command", commands("python (?=mst_)"), ids=" ".join)
def test_the_scripts_take_the_documented_commands(command):
    script = importlib.import_module(command[0].removesuffix(".py"))
    if command[1:] != ["--help"]:
        script.check(tyro.cli(script.Args, args=command[1:]))  # ends with an error if it does not


@pytest.mark.parametrize("command", commands("python -m experiments "), ids=" ".join)
def test_experiments_takes_the_documented_commands(command):
    args = make_parser().parse_args(command)  # ends with an error if it does not
    assert args.command == "list" or runs(args.figure, args.size, args.envs, args.seeds, dict(args.only))


@pytest.mark.parametrize("command", commands("python -m analysis.figure "), ids=" ".join)
def test_figure_takes_the_documented_commands(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        figure.main([*command, "--runs", str(tmp_path / "nowhere")])
    assert "nowhere is no folder" in capsys.readouterr().err  # the first complaint after the arguments


@pytest.mark.parametrize("command", commands("python -m analysis.curves "), ids=" ".join)
def test_curves_takes_the_documented_commands(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        curves.main(command)
    assert f"no run in {command[0]}" in capsys.readouterr().err  # the first complaint after the arguments


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
        fields = {name for script in DOCUMENTED for name in importlib.import_module(script).Args.__dataclass_fields__}
        known = {f"--{no}{name.replace('_', '-')}" for name in fields for no in ("", "no-")} | {"--env", "--help"}
        code = re.findall(r"`[^`\n]+`", re.sub(r"^    .*", "", TEXT[page], flags=re.MULTILINE))
        others = re.compile(r"experiments|analysis|benchmarks|sbatch|logdir")
        code = [x for x in code if ("mst_" in x and "seeds.sh" not in x) or not others.search(x)]
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(code))) <= known


def documented(script: str) -> set[str]:
    """The tags in the table of a script's page, and of MR.Q's where the page refers to it."""
    page = TEXT[f"docs/{script}.md"]
    tags = documented("mst_mrq") if "Those of [mst_mrq](mst_mrq.md), and:" in page else set()
    for row in re.findall(r"^\| (`[a-z]+/.*?) \|", page, flags=re.MULTILINE):
        for tag in re.findall(r"`(.*?)`", row):
            tags |= {tag.replace("<module>", module) for module in importlib.import_module(script).MODULES}
    return tags


@pytest.fixture(scope="session", params=DOCUMENTED)
def script(request):
    return request.param


def test_the_documented_metrics_are_those_of_a_run(reference, script):
    events = EventAccumulator(str(reference))
    events.Reload()
    assert documented(script) == set(events.Tags()["scalars"])
