"""From a figure of the paper to its runs, on this machine or on a Slurm cluster.

    python -m experiments list
    python -m experiments commands fig06                # one command line per run
    python -m experiments run fig14 --small --jobs 2    # all runs on this machine, two at a time
    python -m experiments submit fig06 --time 24:00:00 --gpus 1 --runs-per-task 4
    python -m experiments status fig06

Flags after `--` are added to every training command, such as `-- --no-cuda --track`.
"""

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from experiments.figures import FIGURES, Run, runs, small_hours
from experiments.status import STATES, log_end, log_path, status
from experiments.supervise import supervise

ARRAY_SH = Path(__file__).with_name("array.sh")
OWN_FLAGS = ("exp_name", "seed", "env", "env_id", "runs_dir", "dry_run", "eval_only")  # of each run: not after `--`
SBATCH_FLAGS = ("partition", "account", "time", "gpus", "cpus_per_task", "mem")
MAX_ARRAY_SIZE = 1001  # Slurm's default


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 if a run or Slurm failed, 2 for wrong usage, 75 if runs have to be started again."""
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = make_parser()
    args = parser.parse_args(own)
    for flag in extra:
        if flag.startswith("--") and flag[2:].split("=")[0].replace("-", "_") in OWN_FLAGS:
            parser.error(f"{flag} is each run's own: choose runs by --envs, --seeds and --runs-dir, before --")
    if args.command == "list":
        return print_figures()
    args.extra = tuple(extra)
    try:
        chosen = runs(args.figure, args.size, args.envs, args.seeds, merged(args.only))
        if args.command == "task":
            chosen = of_task(chosen, args.index, args.runs_per_task)
    except ValueError as error:
        parser.error(str(error))
    return args.function(chosen, args)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line on what is wrong, and exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def make_parser() -> Parser:
    parser = Parser("python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers.add_parser("list", help="the figures with their numbers of runs")

    common = Parser(add_help=False)
    common.add_argument("figure", help="a name that `list` shows")
    add_choice_of_runs(common)
    common.add_argument("--runs-dir", type=Path, default=Path("runs"), help="the folder of run directories (runs)")
    in_task = Parser(add_help=False)
    in_task.add_argument("--runs-per-task", type=positive, default=1, metavar="K", help="runs side by side in a task")

    def add(function, name: str, help: str, *parents: Parser) -> argparse.ArgumentParser:
        parents = [common, *parents]
        command = subparsers.add_parser(name, help=help, description=help, parents=parents, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    add(print_commands, "commands", "one command line per run")
    states = add(print_status, "status", "the state of every run")
    states.add_argument("--verbose", action="store_true", help="name finished runs too")
    here = add(run_here, "run", "run all on this machine")
    here.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs side by side (1)")
    task = add(run_task, "task", "what a task of a Slurm array runs", in_task)
    task.add_argument("--index", type=int, required=True, help="number of the task, from 0")
    slurm = add(submit, "submit", "submit all as a Slurm array; SBATCH_* variables work as in sbatch", in_task)
    for flag in SBATCH_FLAGS:
        slurm.add_argument(f"--{flag.replace('_', '-')}", help="of each task, as in sbatch")
    slurm.add_argument("--max-parallel", type=positive, metavar="N", help="tasks at a time")
    slurm.add_argument("--dry-run", action="store_true", help="only print the sbatch commands")
    return parser


def add_choice_of_runs(parser: Parser) -> None:
    """The flags that choose among a figure's runs, for the figure's drawing as well."""
    sizes = {
        "small": "a quarter of the widths, 30,000 agent steps of cheetah-run, 5 seeds: a first verdict",
        "toy": "tiny networks, 1,250 agent steps of cartpole-balance, 2 seeds: a look at the whole chain",
    }
    group = parser.add_mutually_exclusive_group()
    for size, help in sizes.items():
        group.add_argument(f"--{size}", dest="size", action="store_const", const=size, default="paper", help=help)
    parser.add_argument("--envs", type=names, metavar="A,B", help="other tasks than the figure's")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds 1 to N")
    parser.add_argument("--only", type=choice, action="append", default=[], metavar="FLAG=V1,V2",
                        help="only runs with these values, such as critic-arch=4,6; can be repeated")  # fmt: skip


def merged(only: list[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Several `--only` of one flag allow the values of all."""
    return {flag: tuple(v for f, values in only if f == flag for v in values) for flag, _ in only}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def choice(text: str) -> tuple[str, tuple[str, ...]]:
    flag, equals, values = text.partition("=")
    if not (flag and equals and values):
        raise argparse.ArgumentTypeError(f"{text} is not of the form FLAG=V1,V2, such as critic-arch=4,6")
    return flag.lstrip("-").replace("-", "_"), names(values)


def print_figures() -> int:
    print(f"{'figure':<14} cells tasks seeds  runs  --small")
    for name, figure in FIGURES.items():
        counts = f"{len(figure.cells):5} {len(figure.envs):5} {figure.seeds:5} {len(runs(name)):5}"
        hours = sum(map(small_hours, runs(name, "small")))
        print(f"{name:<14} {counts} {hours:6,.0f} h  {figure.title.format(env=figure.envs[0])}")
    distinct = {run.directory for name in FIGURES for run in runs(name)}
    print(f"\n{len(distinct):,} distinct runs: figures share those of equal cells.")
    print("--small: hours on one CPU core at small size, an estimate from a few measured runs.")
    return 0


def print_commands(chosen: list[Run], args: argparse.Namespace) -> int:
    runs_dir = [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    for run in chosen:
        print(shlex.join(["python", *run.arguments(), *runs_dir, *args.extra]))
    return 0


def print_status(chosen: list[Run], args: argparse.Namespace) -> int:
    counts: Counter = Counter()
    for run in chosen:
        found = status(args.runs_dir, run.directory)
        counts[found.state] += 1
        if found.state != "finished" or args.verbose:
            print(f"{found.state:<9} {run.directory}  {found.evaluation}".rstrip())
        if found.state == "failed":
            log = log_path(args.runs_dir, run.directory)
            print(f"          exit code {found.exit_code}, see {log}:", *log_end(log, lines=1))
    print(f"{args.figure}, {len(chosen)} runs:", ", ".join(f"{counts[state]} {state}" for state in STATES))
    return 0


def run_here(chosen: list[Run], args: argparse.Namespace) -> int:
    return supervise(chosen, args.runs_dir, args.jobs, args.extra)


def run_task(chosen: list[Run], args: argparse.Namespace) -> int:
    return supervise(chosen, args.runs_dir, args.runs_per_task, args.extra)


def of_task(chosen: list[Run], index: int, runs_per_task: int) -> list[Run]:
    """The runs of a Slurm task. Every run is in exactly one of the tasks from 0 to ceil(runs / runs_per_task) - 1."""
    tasks = -(-len(chosen) // runs_per_task)
    if not 0 <= index < tasks:
        raise ValueError(f"--index {index} is out of range: {len(chosen)} runs make the tasks 0 to {tasks - 1}")
    return chosen[index * runs_per_task : (index + 1) * runs_per_task]


def arrays(tasks: Iterable[int], size: int) -> list[tuple[int, list[int]]]:
    """Ascending tasks as Slurm arrays: (offset, indices), with 0 <= index < size and offset + index = task."""
    return [
        (first * size, [task % size for task in group])
        for first, group in itertools.groupby(tasks, lambda t: t // size)
    ]


def ranges(indices: list[int]) -> str:
    """Ascending indices as Slurm writes them: [0, 1, 2, 5] is "0-2,5"."""
    groups = [
        [i for _, i in group] for _, group in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)


def submit(chosen: list[Run], args: argparse.Namespace) -> int:
    """Submit the tasks with runs that are neither finished nor running, in arrays below the cluster's MaxArraySize."""
    k = args.runs_per_task
    open_runs = [status(args.runs_dir, run.directory).state not in ("finished", "running") for run in chosen]
    tasks = [first // k for first in range(0, len(chosen), k) if any(open_runs[first : first + k])]
    if not tasks:
        print(f"nothing to submit: all {len(chosen)} runs are finished or running")
        return 0

    logs = args.runs_dir / "logs"
    ours = {"SBATCH_JOB_NAME": ("--job-name", args.figure), "SBATCH_OUTPUT": ("--output", logs / "slurm-%A_%a.out")}
    flags = [f"{flag}={value}" for variable, (flag, value) in ours.items() if variable not in os.environ]
    for name in SBATCH_FLAGS:
        if (value := getattr(args, name)) is not None:
            flags.append(f"--{name.replace('_', '-')}={value}")
    selection = [args.figure, "--runs-per-task", str(k), "--runs-dir", str(args.runs_dir)]
    selection += [] if args.size == "paper" else [f"--{args.size}"]
    selection += ["--envs", ",".join(args.envs)] if args.envs else []
    selection += ["--seeds", str(args.seeds)] if args.seeds else []
    selection += [word for flag, values in args.only for word in ("--only", f"{flag}={','.join(values)}")]
    selection += ["--", *args.extra] if args.extra else []

    at_a_time = f"%{args.max_parallel}" if args.max_parallel else ""
    job = None
    for offset, indices in arrays(tasks, max_array_size()):
        # only one array at a time, or there would be --max-parallel tasks of each
        order = [f"--dependency=afterany:{job}"] if job and args.max_parallel else []
        line = ["sbatch", "--parsable", f"--array={ranges(indices)}{at_a_time}", *order, *flags]
        line += [str(ARRAY_SH), sys.executable, str(offset), *selection]
        if args.dry_run:
            print(shlex.join(line))
            job = "JOB"
            continue
        logs.mkdir(parents=True, exist_ok=True)
        job = sbatch(line)
        print(f"submitted array {job} with {len(indices)} tasks, output in {logs}", flush=True)
    return 0


def sbatch(line: list[str]) -> str:
    """The id of the submitted array. Stops the program with exit code 1 if there is none."""
    try:
        return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().split(";")[0]
    except FileNotFoundError:
        sys.exit("error: no sbatch here: submit on a login node of the cluster, or use `run` to train on this machine")
    except subprocess.CalledProcessError:
        sys.exit("error: sbatch refused the array, see above; what was submitted before goes on")


def max_array_size() -> int:
    """Slurm's MaxArraySize: array indices are smaller. Its default where there is no Slurm."""
    try:
        config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        config = ""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", config)
    return int(found[1]) if found else MAX_ARRAY_SIZE


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of `commands fig06 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
