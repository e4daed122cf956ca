"""The picture of ``titans inspect-memory``."""

from collections.abc import Sequence
from typing import IO, Any

from titans_pretrain.inference.memory_trace import Inspection

_LABELS = 80  # fit side by side
_DARK = 0.9  # of the colours, those that show on white
_SMOOTHED = 400  # tokens above which a mean is drawn over the single ones
_GATES = {"forget": r"forget $\alpha$", "momentum": r"momentum $\eta$", "step": r"step $\theta$"}


def draw(found: Inspection, handle: IO[bytes], *, title: str) -> None:
    """Draw an inspection as PNG into an open file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(5, 1, figsize=(12, 12), dpi=130, sharex=True, layout="constrained")
    _draw_map(figure, axes[0], found)
    colors = mpl.colormaps["viridis"]
    for index, (number, one) in enumerate(found.layers.items()):
        style = {
            "color": colors(_DARK * index / len(found.layers)),
            "linewidth": 1.1,
            "label": f"layer {number}",
        }
        _line(axes[1], one.surprise, style)
        _line(axes[2], one.remembered, style)
        change = [value / one.start for value in one.change]
        axes[4].plot(one.chunk_ends, change, **style)
        axes[4].plot(
            one.chunk_ends, [v / one.start for v in one.momentum_norm], ":", **_plain(style)
        )
    for name, label in _GATES.items():
        values = [getattr(one, name) for one in found.layers.values()]
        _line(axes[3], [sum(v) / len(v) for v in zip(*values, strict=True)], {"label": label})
    axes[1].set(ylabel="surprise", yscale="log")
    axes[2].set(ylabel="left at the end")
    axes[3].set(ylabel="gates, mean of layers")
    axes[4].set(ylabel="weights' change\n(dotted: momentum),\nshare of the start", xlabel="token")
    axes[0].set_title(title, loc="left", pad=60)
    axes[0].set_xlim(-0.5, len(found.tokens) - 0.5)
    for axis in axes[1:]:
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, ncols=8, fontsize=7, loc="upper right")
    axes[3].legend(frameon=False, ncols=3, fontsize=8, loc="upper right")
    figure.savefig(handle, format="png")
    plt.close(figure)


def _draw_map(figure: Any, axes: Any, found: Inspection) -> None:
    """How far each token moved each layer's memory; the tokens that moved it most by name."""
    rows = [one.written for one in found.layers.values()]
    image = axes.imshow(
        rows,
        aspect="auto",
        interpolation="none",
        cmap="magma",
        extent=(-0.5, len(found.tokens) - 0.5, len(rows) - 0.5, -0.5),
    )
    figure.colorbar(image, ax=axes, label="moved the memory", pad=0.01)
    axes.set_yticks(range(len(rows)), [str(number) for number in found.layers])
    axes.set_ylabel("layer")
    named = -len(found.tokens)
    for at in sorted(found.most):
        axes.axvline(at, ymin=0.97, color="tab:cyan", linewidth=1)
        if at - named < len(found.tokens) / _LABELS:
            continue  # it would cover the one before
        named = at
        axes.annotate(
            _shown(found.tokens[at]),
            xy=(at, -0.5),
            xytext=(0, 4),
            textcoords="offset points",
            rotation=60,
            fontsize=7,
            annotation_clip=False,
        )


def _line(axes: Any, values: Sequence[float], style: dict[str, Any]) -> None:
    """A curve, smoothed over a fiftieth where it is long, with the single values behind it."""
    if len(values) <= _SMOOTHED:
        axes.plot(values, **style)
        return
    half = len(values) // 100
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, at - half), min(len(values), at + half + 1)) for at in range(len(values))]
    means = [(sums[last] - sums[first]) / (last - first) for first, last in ends]
    (line,) = axes.plot(means, **style, zorder=3)
    axes.plot(values, color=line.get_color(), alpha=0.2, linewidth=0.5)


def _plain(style: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in style.items() if name != "label"}


def _shown(token: str) -> str:
    """A token's text as matplotlib can draw it, a dollar sign not taken for mathematics."""
    return repr(token)[1:-1].replace("$", r"\$")
