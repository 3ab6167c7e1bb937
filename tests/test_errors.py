"""Every mistake ends with one line on stderr that says what is wrong, exit code 2 for usage and 1 for the rest.

They are made in this process where they end before training starts; three are made with the real command as well.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_error, command


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--total-timesteps", "0"),
        ("--learning-starts", "-1"),
        ("--eval-interval", "0"),
        ("--eval-episodes", "-3"),
        ("--log-interval", "0"),
        ("--checkpoint-interval", "0"),
        ("--buffer-size", "40"),  # it must hold more than the 40 steps of --learning-starts
        ("--batch-size", "0"),
        ("--seed", "-1"),
        ("--action-repeat", "0"),
        ("--gamma", "1.01"),
        ("--gamma", "nan"),
        ("--actor-lr", "0"),
        ("--weight-decay", "-0.1"),
        ("--max-grad-norm", "0"),
        ("--exploration-noise", "-1"),
        ("--target-network-frequency", "0"),
        ("--scale", "0"),
        ("--critic-depth-scale", "-2"),
        ("--critic-sparsity", "1"),
        ("--encoder-sparsity", "-0.1"),
        ("--topology-update-interval", "0"),
        ("--drop-fraction", "1.5"),
        ("--schedule-start", "-0.2"),
        ("--q-horizon", "6"),  # more than the 5 steps of --encoder-horizon
    ],
)
def test_a_value_out_of_range_is_refused_by_name(main, flag, value):
    assert_one_error(main(flag, value), 2, flag)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--seed", "1.5"),
        ("--total-timesteps", "5e3"),
        ("--buffer-size", "many"),
        ("--gamma", "high"),
        ("--critic-regime", "rigl"),
        ("--encoder-arch", "7"),
        ("--growth", "random"),
        ("--distribution", "erk"),
        ("--residual", "both"),
        ("--learning-rate", "1e-3"),  # no such flag
        ("--env", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(main, flag, value):
    ended = main(flag, *([value] if value else []))
    assert ended.code == 2
    assert flag in ended.err or flag == "--env"  # tyro's message, in a frame
    assert not Path("runs").exists()


def test_a_schedule_that_ends_before_it_starts_is_refused(main):
    ended = main("--critic-regime", "d2s", "--schedule-start", "0.9", "--schedule-end", "0.5")
    assert_one_error(ended, 2, "0.9", "0.5", "schedule_start < schedule_end")
    assert not Path("runs").exists()  # whose config.json would refuse the corrected command


def test_learning_that_starts_before_a_window_is_complete_is_refused(main):
    assert_one_error(main("--learning-starts", "0"), 2, "--learning-starts")


@pytest.mark.filterwarnings("ignore:.*out of date")
@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("dog-rum", "dog-run"),
        ("walker", "walker-walk"),
        ("HalfCheeta-v5", "HalfCheetah-v5"),
        ("zzzzzzzz", "dog-run"),
        ("CartPole-v1", "bounded"),
        ("HalfCheetah-v3", "HalfCheetah-v3"),  # moved to gymnasium-robotics, but still registered
        ("gymnasium:Foo-v0", "Foo"),
        ("no_such_package:Foo-v0", "no_such_package"),
    ],
)
def test_an_unknown_or_unfit_environment_is_refused_with_a_hint(main, env_id, hint):
    assert_one_error(main("--env", env_id), 2, hint)
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_written_is_named(main):
    Path("file").touch()  # a path below it fails for root as well, whom permissions do not stop
    assert_one_error(main("--runs-dir", "file/runs"), 1, "file/runs", "--runs-dir")


def test_a_replay_buffer_larger_than_memory_is_refused_with_both_sizes(main):
    ended = main("--buffer-size", str(10**12))
    assert_one_error(ended, 2, "1,000,000,000,000 steps", "GiB of memory", "--buffer-size")
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(main):
    assert_one_error(main("--cuda"), 2, "--cuda", "--no-cuda")


@pytest.mark.skipif(bool(importlib.util.find_spec("wandb")), reason="wandb is installed")
def test_track_without_wandb_says_how_to_install_it(main):
    assert_one_error(main("--track"), 2, "pip install wandb")


@pytest.mark.skipif(bool(importlib.util.find_spec("pygame")), reason="pygame is installed")
def test_an_environment_that_cannot_be_rendered_is_refused_before_training(script, tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    ended = command(script, "--env", "Pendulum-v1", "--capture-video", cwd=tmp_path)  # it draws with pygame
    if "no OpenGL" in ended.err:
        pytest.skip("this machine has neither EGL nor OSMesa")
    assert_one_error(ended, 2, "Pendulum-v1", "pygame")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        (["--env", "dog-rum"], 2, "dog-run"),
        (["--gamma", "2"], 2, "--gamma"),
        (["--runs-dir", "/dev/null/runs"], 1, "--runs-dir"),
    ],
)
def test_the_command_prints_the_one_line_alone(script, tmp_path, flags, code, part):
    assert_one_error(command(script, *flags, cwd=tmp_path), code, part)


def test_help_names_and_explains_every_argument(script, main):
    ended = main("--help")
    assert (ended.code, ended.err) == (0, "")
    text = re.sub(r"[\s│]+", "", re.sub(r"\x1b\[[\d;]*m", "", ended.out))  # without frame, colours and line breaks
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [
        (field.target.id, ast.literal_eval(doc.value))
        for field, doc in zip(args.body[::2], args.body[1::2], strict=True)
    ]
    assert len(fields) > 40
    for name, doc in fields:
        assert f"--{name.replace('_', '-')}" in text
        assert re.sub(r"\s", "", doc) in text


def test_dry_run_prints_the_table_and_creates_nothing(main):
    ended = main("--dry-run", "--env", "dog-run", "--width-scale", "1")
    assert (ended.code, ended.err) == (0, "")
    assert "2,094,336" in ended.out  # the encoder on dog, Appendix C's "2M"
    assert "4,478,760" in ended.out  # the agent
    assert list(Path().iterdir()) == []
