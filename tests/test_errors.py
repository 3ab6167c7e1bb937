"""Every mistake ends with one line on stderr that says what is wrong, exit code 2 for usage and 1 for the rest.

They are made in this process, since they end before training starts.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, all_scripts, assert_one_error

REFUSED = {  # and words of the one line
    "--total-timesteps 0": "--total-timesteps 0: write a number from 1",
    "--eval-interval 0": "--eval-interval 0",
    "--batch-size 0": "--batch-size 0",
    "--max-episode-steps 0": "--max-episode-steps 0",
    "--gamma 2": "--gamma 2.0: write a number from 0 to 1",
    "--gamma nan": "--gamma nan",
    "--actor-lr -1": "--actor-lr -1.0",
    "--weight-decay inf": "--weight-decay inf",
    "--seed -1": "--seed -1",
    "--exp-name ../a": "--exp-name ../a names a folder",
    "--exp-name a:b": "--exp-name a:b names a folder",
    **{
        f"--env {name}": f"no {name}: "
        for name in ("dog-rum", "HalfCheetah-v55", "nothing", "no_such_package:Thing-v0")
    },
    "--q-horizon 6": "--encoder-horizon must be at least --q-horizon",
    f"--buffer-size {10**13}": "allocate memory",
    # The Sparsifier's words
    "--critic-sparsity 1": "sparsity is 1.0: write the share of zeros, in [0, 1)",
    "--encoder-regime dst --encoder-sparsity -0.1": "-0.1",
    "--drop-fraction 1.5": "drop fractions 1.5 and 0.0: write numbers in [0, 1]",
    "--critic-regime d2s --schedule-start 0.9 --schedule-end 0.5": "schedule_start < schedule_end",
}
if not torch.cuda.is_available():
    REFUSED["--cuda"] = "--cuda needs a GPU that torch sees: train with --no-cuda"


@pytest.mark.parametrize(("flags", "words"), REFUSED.items())
def test_a_value_that_cannot_be_is_refused_in_one_line(main, flags, words):
    assert_one_error(main(*flags.split()), 2, words)
    assert not Path("runs").exists()  # whose config.json would refuse the corrected command


def test_what_tyro_wandb_and_the_file_system_refuse_ends_before_the_run(main):
    for flags in ("--seed 1.5", "--critic-regime rigl", "--no-such-flag 1"):
        ended = main(*flags.split())
        assert ended.code == 2
        assert flags.split()[0] in ended.err  # tyro's message, in a frame
    if not importlib.util.find_spec("wandb"):
        assert_one_error(main("--track"), 1, "wandb")
    Path("file").touch()  # a path below it fails for root as well, whom permissions do not stop
    assert_one_error(main("--runs-dir", "file/runs"), 1, "file/runs", "--runs-dir")


@all_scripts
def test_help_names_and_explains_every_flag_and_the_exit_codes(script, main):
    ended = main("--help")
    assert (ended.code, ended.err) == (0, "")
    text = re.sub(r"[\s│]+", "", re.sub(r"\x1b\[[\d;]*m", "", ended.out))  # without frame, colours and line breaks
    assert "75stoppedbyasignal" in text
    source = (ROOT / f"{script}.py").read_text()
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    assert len(args.body) > 40
    for field in args.body:
        (comment,) = re.findall(r"  # (.+)", "\n".join(source.splitlines()[field.lineno - 1 : field.end_lineno]))
        assert f"--{field.target.id.replace('_', '-')}" in text
        assert re.sub(r"\s", "", comment) in text


@all_scripts
def test_dry_run_prints_the_table_and_creates_nothing(script, main):
    ended = main("--dry-run", "--env", "dog-run", "--width-scale", "1")
    assert (ended.code, ended.err) == (0, "")
    if script == "mst_mrq":
        assert "2,094,336" in ended.out  # the encoder on dog, Appendix C's "2M"
        assert "4,478,760" in ended.out  # the agent
    assert list(Path().iterdir()) == []
