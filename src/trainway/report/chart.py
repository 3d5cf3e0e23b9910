"""The picture of a run: its training and validation loss over the steps."""

from __future__ import annotations

from pathlib import Path

from trainway.run_dir import RunDir
from trainway.tracking.jsonl import read_jsonl


def draw_losses(run: RunDir, path: Path) -> Path:
    """Draw metrics.jsonl as a PNG (or by the suffix: SVG, PDF) and return its path."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    records = list(read_jsonl(run.metrics))
    train = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
    val = [(r["step"], r["val/loss"]) for r in records if "val/loss" in r]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(*zip(*train, strict=True), color="#9ab8d8", linewidth=1, label="training")
    axes.plot(
        *zip(*val, strict=True), color="#c44e52", linewidth=2, marker="o", markersize=4, label="validation"
    )
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title=f"validation loss {val[0][1]:.2f} → {val[-1][1]:.2f}",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
