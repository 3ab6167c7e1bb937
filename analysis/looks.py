"""One name, colour and marker for each regime and agent, wherever one is drawn: README, figures, notebook."""

from typing import NamedTuple

from matplotlib import rc_context

GREY = {"white": "#4D4D4D", "light": "#4D4D4D", "dark": "#C4C4C4"}  # of dense agents, by theme
TEXT = {"white": "black", "light": "#1F2328", "dark": "#E6EDF3"}  # light and dark: GitHub's, no background


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    dash: str = "-"


# Okabe and Ito's colours, of which the red-green blind confuse few. A marker means one thing only
LOOKS = {
    "dense": Look("Dense", "grey", "o"),
    "sst": Look("SST", "#0072B2", "s"),
    "dst": Look("DST", "#009E73", "D"),
    "s2d": Look("S2D", "#E69F00", "<"),
    "d2s": Look("D2S", "#CC79A7", ">"),
    "mr.q": Look("MR.Q", "#3C9CD7", "X"),
    "res": Look("MR.Q + Res", "grey", "P"),
    "reverse": Look("MST reversed", "#56B4E9", "v"),
    "mst": Look("MST", "#D55E00", "^"),
    "pre": Look("pre-layer residual", "#3F6FC4", "p"),
    "post": Look("post-layer residual", "#B5651D", "h"),
    "mrq, published": Look("MR.Q, published", "text", "", ":"),
    "sac, published": Look("SAC, published", "text", "", ":"),
    "sac_simba, published": Look("SimBa, published", "text", "", "--"),
}
OTHERS = [  # what has no name here, one after the other
    Look("", color, marker, dash)
    for dash in ("-", "--", ":")
    for color, marker in (("#D1495B", "*"), ("#3F6FC4", "d"), ("#8C8C2B", "H"), ("#B5651D", "8"), ("#7E57A8", "."))
]
TYPES = {
    1: "Type 1\nReLU", 2: "Type 2\nELU", 3: "Type 3\nLN, ReLU", 4: "Type 4\nLN, ELU", 5: "Type 5\nLN, ReLU, res.",
    6: "Type 6\nLN, ELU, res.",
}  # fmt: skip
COLUMN, PAGE, SMALL = 3.3, 6.9, 6.5  # inches: widths of a paper's column and page; points: the smallest text


def method(run: dict) -> str:
    """What the regimes of a run are together, or what the paper calls its networks, from its flags."""
    critic, actor = run.get("critic_regime", "dense"), run.get("actor_regime", "dense")
    has_encoder = isinstance(run.get("encoder_regime"), str)  # SAC and DDPG have none
    encoder = run["encoder_regime"] if has_encoder else "dense"
    if {encoder, critic, actor} == {"dense"} and run.get("script") == "mst_mrq":
        return {4: "mr.q", 6: "res"}.get(run.get("critic_arch"), "dense")
    if encoder == "dense" and critic != actor:
        return {("dst", "sst"): "mst", ("sst", "dst"): "reverse"}.get((critic, actor), f"{critic}/{actor}")
    together = critic == actor and (encoder == critic or not has_encoder)
    return critic if together else f"{encoder}/{critic}/{actor}"


def look(name: str, names: list[str], theme: str = "white") -> Look:
    """How one of these names is drawn. Those without a look of their own get one by their order."""
    unknown = [each for each in names if each not in LOOKS]
    found = LOOKS.get(name) or OTHERS[unknown.index(name) % len(OTHERS)]._replace(label=name)
    return found._replace(color={"grey": GREY[theme], "text": TEXT[theme]}.get(found.color, found.color))


def style(theme: str):
    """The context to draw in."""
    text = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT[theme])
    sizes = {"font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7}
    return rc_context(text | sizes | {
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.3,
        "lines.markersize": 4, "legend.fontsize": 7.5, "legend.frameon": False, "legend.columnspacing": 1.2,
        "legend.handletextpad": 0.5, "pdf.fonttype": 42, "svg.hashsalt": "mst",
    })  # fmt: skip
