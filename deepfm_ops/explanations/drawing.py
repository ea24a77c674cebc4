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
        fields: names, [F]; without any, there is no heat map.
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
    widths = [side + names + 0.8] * bool(fields) + [6.4] * len(groups)
    figure = Figure(figsize=(sum(widths), max(4.8, side + names)), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0].tolist()
    if fields:
        most = float(np.abs(matrix).max(initial=0)) or 1.0
        colours = {"cmap": "Reds", "vmin": 0} if is_strength else {"cmap": "RdBu_r", "vmin": -most}
        first = axes.pop(0)
        figure.colorbar(first.imshow(matrix, vmax=most, **colours), ax=first, shrink=0.6)
        first.set_xticks(range(len(fields)), fields, rotation=90, fontsize=8)
        first.set_yticks(range(len(fields)), fields, fontsize=8)
        first.set_title(title, fontsize=10)
    else:
        figure.suptitle(title, fontsize=10)
    for here, (what, bars) in zip(axes, groups, strict=True):
        shown = bars[:BARS]
        values = [value for _, value in shown]
        lengths = np.abs(values) if is_strength else values
        here.barh(range(len(shown)), lengths, color=[INK[value < 0] for value in values])
        here.set_yticks(range(len(shown)), [_text(name) for name, _ in shown], fontsize=8)
        here.set_ylim(max(10, len(shown)) - 0.5, -0.5)
        here.axvline(0, color="black", linewidth=0.6)
        here.set_title(what + (" (blue: the mean is below zero)" if is_strength else ""), fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # long names reach beyond the figure


def on_one_line(name):
    return " ".join(str(name).split())


def _text(name):
    """A name as matplotlib draws it: short, on one line, without its formulas."""
    name = on_one_line(name)
    if len(name) > LONGEST:  # of a pair, both ends say something
        name = f"{name[: LONGEST // 2]}...{name[3 - LONGEST // 2 :]}"
    return name.replace("$", r"\$")
