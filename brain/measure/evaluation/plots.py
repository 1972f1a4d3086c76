"""Results as pictures that can be read at a glance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brain.measure.evaluation.contestants import FULL
from brain.measure.evaluation.retrieval import CHANCE


def plot_recall(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall against distance, a line for each policy; a panel for each budget."""
    plt = pyplot()
    budgets = sorted({row["budget"] for row in rows})
    figure, panels = plt.subplots(
        1, len(budgets), figsize=(1.5 + 5 * len(budgets), 4.2), sharey=True, squeeze=False
    )
    for panel, budget in zip(panels[0], budgets, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = [r for r in rows if r["policy"] == policy and r["budget"] == budget]
            if not points:
                continue
            panel.errorbar(
                [point["distance"] / budget for point in points],
                [point["recall"] for point in points],
                _errors(points),
                capsize=2,
                marker="o",
                label=_label(policy),
                **_style(policy),
            )
        panel.axhline(CHANCE, color="0.6", linestyle=":", linewidth=1)
        panel.annotate("chance", (0.99, CHANCE), xycoords=("axes fraction", "data"), ha="right")
        asked = sorted({row["distance"] / budget for row in rows if row["budget"] == budget})
        panel.set_xscale("log", base=2)
        panel.set_xticks(asked, [f"{distance:.3g}×" for distance in asked])
        panel.set_xlabel("tokens since the fact, in budgets")
        panel.set_title(f"{budget} rows")
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("facts whose answer ranks first of ten")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path)


def plot_fluency(rows: Sequence[dict[str, Any]], against: str, path: Path) -> None:
    """Difference in nats per token to the policy ``against``, a group of bars for each budget; of
    the nats themselves where that was not measured.
    """
    plt = pyplot()
    compared = any("difference" in row for row in rows)
    rows = [row for row in rows if row["policy"] != against]
    budgets = sorted({row["budget"] for row in rows})
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure, panel = plt.subplots(figsize=(2.5 + 1.6 * len(budgets) + 0.25 * len(policies), 4.2))
    width = 0.8 / max(1, len(policies))
    for number, policy in enumerate(policies):
        points = [row for row in rows if row["policy"] == policy]
        panel.bar(
            [budgets.index(p["budget"]) + (number + 0.5) * width - 0.4 for p in points],
            [p["difference" if compared else "nll"] for p in points],
            width,
            yerr=_errors(points) if compared else None,
            ecolor="0.55",  # seen on a black bar, too
            capsize=2,
            label=_label(policy),
            color=_style(policy).get("color"),
        )
    if compared:
        panel.axhline(0, color="black", linewidth=1.5, label=f"{against} (compared with)")
    panel.set_xticks(range(len(budgets)), [f"{budget} rows" for budget in budgets])
    above = f" above {against}" if compared else ""
    panel.set_ylabel(f"nats per token{above}\n(lower is more fluent)")
    panel.grid(axis="y", alpha=0.3)
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path)


def plot_endurance(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What should stay level over the ticks: four panels, one line each."""
    plt = pyplot()
    shown = {
        "nll": "nats per spoken token",
        "distinct": "distinct 3-grams, share",
        "ticks_per_second": "ticks per second",
        "resident_mb": "resident memory, MB",
    }
    figure, panels = plt.subplots(len(shown), 1, figsize=(7, 10), sharex=True)
    for panel, (name, label) in zip(panels, shown.items(), strict=True):
        panel.plot([row["ticks"] for row in rows], [row[name] for row in rows], marker="o")
        panel.set_ylabel(label)
        most = max(row[name] for row in rows)
        panel.set_ylim(0, 1.1 * most or 1)  # a level line has air above it
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("ticks")
    save(figure, path)


def pyplot() -> Any:
    """Matplotlib's interface, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")  # pictures are files; there may be no screen
    import matplotlib.pyplot as plt

    return plt


def _errors(points: Sequence[dict[str, Any]]) -> list[float] | None:
    """Bars of error; None where there is one stream alone, which has none."""
    errors = [point["standard_error"] for point in points]
    return None if None in errors else errors


def _label(policy: str) -> str:
    return f"{FULL} (forgets nothing)" if policy == FULL else policy


def _style(policy: str) -> dict[str, Any]:
    if policy == FULL:
        return {"color": "black", "linestyle": "--"}
    if policy == "sink_recent":  # what a plain window keeps
        return {"color": "0.45"}
    return {}


def save(figure: Any, path: Path) -> None:
    """Writes a picture and lets go of it."""
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot().close(figure)
