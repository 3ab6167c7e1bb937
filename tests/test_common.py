"""What the scripts share is copied to the letter."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIES = ["mst_sac", "mst_ddpg", "mst_mrsac"]
# What differs between the two scripts of a family: the policy and its losses. All else that both define is the same.
POLICY = {
    "Args", "Actor.__init__", "Actor.forward", "Agent.__init__", "Agent.act", "Agent.explore",
    "Agent.update_critic_and_actor", "Agent.critic_loss", "Agent.actor_loss", "Agent.state_dict",
    "Agent.load_state_dict", "validate",
}  # fmt: skip
DIFFERENCES = {("mst_mrq", "mst_mrsac"): POLICY, ("mst_sac", "mst_ddpg"): POLICY | {"Agent.noise"}}


def common_blocks(script: str) -> list[list[tuple[int, str]]]:
    """The numbered lines of each block, from its landmark to `# END OF COMMON` or the end of the file."""
    blocks, inside = [], False
    for number, line in enumerate((ROOT / f"{script}.py").read_text().splitlines(), 1):
        if line.startswith("# COMMON TO ALL SCRIPTS"):
            blocks.append([])
            inside = True
        if inside:
            blocks[-1].append((number, line))
        if line == "# END OF COMMON":
            inside = False
    return blocks


def first_difference(script: str, other: str) -> str | None:
    for ours, theirs in zip(common_blocks(script), common_blocks(other), strict=True):
        lines, copied = [line for _, line in ours], [line for _, line in theirs]
        for tag, i, _, j, _ in difflib.SequenceMatcher(None, lines, copied, autojunk=False).get_opcodes():
            if tag != "equal":
                (n, line), (m, copy) = ours[min(i, len(ours) - 1)], theirs[min(j, len(theirs) - 1)]
                return f"{script}.py:{n}: {line!r} but {other}.py:{m}: {copy!r}"
    return None


def test_the_model_has_two_common_blocks_that_hold_the_shared_names():
    environment, run = ("\n".join(line for _, line in block) for block in common_blocks("mst_mrq"))
    assert all(name in environment for name in ("class DMControl", "def make_env", "class ReplayBuffer"))
    assert all(
        name in run for name in ("def evaluate", "def save", "def open_run", "def train", "def play", "def main")
    )


@pytest.mark.parametrize("script", COPIES)
def test_common_blocks_are_letter_identical(script):
    difference = first_difference("mst_mrq", script)
    assert difference is None, difference


def definitions(script: str) -> dict[str, str]:
    """The source of every function, method and class without methods, by qualified name."""
    source, found = (ROOT / f"{script}.py").read_text(), {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and any(isinstance(child, ast.FunctionDef) for child in node.body):
                visit(node.body, f"{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = ast.get_source_segment(source, node)

    visit(ast.parse(source).body, "")
    return found


@pytest.mark.parametrize(("script", "other"), DIFFERENCES, ids=" ".join)
def test_two_scripts_of_a_family_differ_in_the_algorithm_alone(script, other):
    ours, theirs = definitions(script), definitions(other)
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == DIFFERENCES[script, other]


@pytest.mark.parametrize("script", COPIES)
def test_scales_mean_the_same_in_every_script(script):
    assert definitions(script)["module_scale"] == definitions("mst_mrq")["module_scale"]
