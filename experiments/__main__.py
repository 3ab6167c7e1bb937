"""The figures of the paper as commands, and the state of runs.

python -m experiments list
python -m experiments commands fig06 >fig06.txt            # one a line, for experiments/run.sh
python -m experiments commands fig14 --small -- --no-cuda  # adds what follows -- to each command
python -m experiments status fig06.txt                     # or of the runs in a folder: status runs
python -m experiments status --todo fig06.txt >todo.txt    # what neither is finished nor runs
"""

import argparse
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path

from experiments.figures import FIGURES, Run, runs


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line on what is wrong, and exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def make_parser() -> Parser:
    parser = Parser("python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers.add_parser("list", help="the figures, their numbers of runs, and what in them is ours")
    commands = subparsers.add_parser("commands", help="one command a line", allow_abbrev=False)
    commands.add_argument("figure", help="a name that `list` shows")
    add_choice_of_runs(commands)
    status = subparsers.add_parser("status", help="the state of the runs of commands, or in folders")
    status.add_argument("sources", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    status.add_argument("--todo", action="store_true", help="print the commands that are neither finished nor running")
    return parser


def add_choice_of_runs(parser: argparse.ArgumentParser) -> None:
    """The flags that choose among a figure's runs, for the figure's drawing as well."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--small", dest="size", action="store_const", const="small", help="a first verdict on few cores")
    group.add_argument("--toy", dest="size", action="store_const", const="toy", help="does it all work? Tiny networks")
    parser.set_defaults(size="paper")
    parser.add_argument("--envs", type=lambda text: tuple(text.split(",")), metavar="A,B", help="other tasks")
    parser.add_argument("--seeds", type=positive, metavar="N", help="the first N seeds")
    parser.add_argument("--only", type=choice, action="append", default=[], metavar="FLAG=V1,V2",
                        help="only runs with these values, such as critic-arch=4,6; can be repeated")  # fmt: skip


def merged(only: list[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Several `--only` of one flag allow the values of all."""
    return {flag: tuple(v for f, values in only if f == flag for v in values) for flag, _ in only}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def choice(text: str) -> tuple[str, tuple[str, ...]]:
    flag, _, values = text.partition("=")
    return flag.lstrip("-").replace("-", "_"), tuple(values.split(","))


def print_figures() -> None:
    print(f"{'figure':<13} cells tasks seeds  runs")
    for name, figure in FIGURES.items():
        counts = f"{len(figure.cells):5} {len(figure.envs):5} {figure.seeds:5} {len(runs(name)):5}"
        title = figure.title.format(env=figure.envs[0]) + (f" (ours: {figure.ours})" if figure.ours else "")
        print(f"{name:<13} {counts}  {title}")
    print("\nFigures share runs. Ours: what we chose, because the paper's text does not say it.")


def print_commands(chosen: list[Run], extra: list[str]) -> None:
    for flag in extra:
        if flag.partition("=")[0].replace("_", "-") in ("--env", "--env-id", "--exp-name", "--seed"):
            raise ValueError(f"{flag} is each run's own: choose runs by --envs and --seeds, before --")
    for run in chosen:
        print(shlex.join(["python", *run.arguments(), *extra]), "#", run.directory)


def run_of(line: str) -> Path:
    """The run directory of a command: by its flags, or without --env by what follows "# "."""
    words = [part for x in shlex.split(line, comments=True) for part in (x.split("=", 1) if x[:2] == "--" else [x])]
    flags = {flag.replace("_", "-"): value for flag, value in itertools.pairwise(words)}
    env, script = flags.get("--env", flags.get("--env-id")), next((x for x in words if x.endswith(".py")), "")
    name = f"{env}__{flags.get('--exp-name', Path(script).stem)}__{flags.get('--seed', 1)}"
    name = re.sub(r"[^\w.+=-]", "-", name if env else line.rpartition("# ")[2])
    return Path(os.path.expandvars(flags.get("--runs-dir", "runs"))).expanduser() / name


def state_of(run: Path, line: str) -> tuple[str, str]:
    """The state of a run, and more about it: its last return and its time, or how its log ends."""
    name = re.sub(rb"[^a-zA-Z0-9._=+-]", b"-", line.rpartition("# ")[2].encode()).decode()  # as in run.sh
    log, step, more = Path("logs", re.sub("(.{120}).+(.{120})", r"\1-\2", name) + ".log"), None, ""
    try:
        if (run / "eval.csv").exists():
            total = json.loads((run / "config.json").read_text())["args"]["total_timesteps"]
            step, _, mean, _, _, seconds = (run / "eval.csv").read_text().splitlines()[-1].split(",")
            step, more = int(step), f"return {float(mean):.1f} after {float(seconds) / 3600:.2f} h"
            if step == total:
                return "finished", more
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "running", more
    except (ValueError, LookupError, TypeError) as error:
        return "damaged", repr(error)
    except OSError:  # no such file, or a file system without locks
        pass
    end = log.read_text(errors="replace").splitlines()[-2:] if log.is_file() else []
    if end and re.fullmatch("# exit code (?!(0|75)$)[0-9]+", end[-1]):
        return "failed", f"{end[-1][2:]}, see {log}: {end[0]}"
    return ("not started" if not run.is_dir() else "stopped" if step is None else f"trained to {step:,}"), more


def print_status(sources: list[Path], todo: bool) -> None:
    """Of the commands in files, and of the runs in folders."""
    found: list[tuple[Path, str]] = []
    for source in sources:
        if source.is_dir():
            found += [(config.parent, "") for config in sorted(source.glob("**/config.json"))]
        else:
            lines = map(str.strip, source.read_text().splitlines())
            found += [(run_of(line), line) for line in lines if line and not line.startswith("#")]
    states = [(*state_of(run, line), run, line) for run, line in found]
    for state, more, run, line in states:
        if not todo:
            print(f"{state:<18} {run}  {more}".rstrip())
        elif state not in ("finished", "running"):
            print(line or f"# {state}: {run}")
    counts = Counter(re.sub(" to .*", " in part", state) for state, *_ in states)
    total = (f"{count} {state}" for state, count in counts.items())
    print(f"{len(states)} run{'s' * (len(states) != 1)}:", ", ".join(total), file=sys.stderr if todo else sys.stdout)


def main(argv: list[str]) -> int:
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = make_parser()
    args = parser.parse_args(own)
    try:
        if args.command == "list":
            print_figures()
        elif args.command == "status":
            print_status(args.sources, args.todo)
        else:
            print_commands(runs(args.figure, args.size, args.envs, args.seeds, merged(args.only)), extra)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `commands fig06 | head`
    sys.exit(main(sys.argv[1:]))
