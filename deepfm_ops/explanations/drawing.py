"""Heat maps and bars, by matplotlib, which is imported when something is drawn."""

import numpy as np

BARS = 20
LONGEST = 60  # letters of a name
INK = "#b2182b", "#2166ac"  # above and below zero


def draw(path, title, fields, matrix, groups, is_strength=False):
    """Draws a heat map of pairs of fields, and one chart of bars beside it for each group.

    Every field has a line of its own, whose height does not depend on how many there are, so that the picture grows
    with them and names stay legible.

    Args:
        path: of the picture.
        title: of the heat map.
        fields: names, [F].
        matrix: [F, F].
        groups: [(title, [(name, value)])]; the first `BARS` are drawn.
        is_strength: whether the heat map has no values below zero, and the sign of a bar is a mean's.

    Raises:
        ImportError: matplotlib is not there.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib, or deepfm_ops[plot]") from error
    fields, line = [_text(field) for field in fields], 0.19
    side = max(3.2, line * len(fields) + 0.4)
    names = 0.075 * max(map(len, fields), default=0) + 0.6
    figure = Figure(figsize=(side + names + 0.8 + 6.4 * len(groups), max(4.8, side + names)), layout="constrained")
    axes = figure.subplots(1, 1 + len(groups), width_ratios=[side + names + 0.8, *[6.4] * len(groups)])
    most = float(np.abs(matrix).max(initial=0)) or 1.0
    colours = {"cmap": "Reds", "vmin": 0} if is_strength else {"cmap": "RdBu_r", "vmin": -most}
    image = axes[0].imshow(matrix, vmax=most, **colours)
    figure.colorbar(image, ax=axes[0], shrink=0.6)
    axes[0].set_xticks(range(len(fields)), fields, rotation=90, fontsize=8)
    axes[0].set_yticks(range(len(fields)), fields, fontsize=8)
    axes[0].set_title(title, fontsize=10)
    for here, (what, bars) in zip(axes[1:], groups, strict=True):
        shown = bars[:BARS]
        values = [value for _, value in shown]
        lengths = np.abs(values) if is_strength else values
        here.barh(range(len(shown)), lengths, color=[INK[value < 0] for value in values])
        here.set_yticks(range(len(shown)), [_text(name) for name, _ in shown], fontsize=8)
        here.set_ylim(max(10, len(shown)) - 0.5, -0.5)
        here.axvline(0, color="black", linewidth=0.6)
        here.set_title(what + (" (blue: the mean is below zero)" if is_strength else ""), fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # long names reach beyond the figure


def _text(name):
    """A name as matplotlib draws it: short, on one line, without its formulas."""
    name = " ".join(str(name).split())
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
    return name.replace("$", r"\$")
