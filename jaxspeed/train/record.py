"""What a run leaves to look at: `metrics.jsonl`, one object a step, and `loss.png`."""

import contextlib
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Metrics:
    """Appends to a `metrics.jsonl`.

    A run that goes on from a checkpoint drops the lines after it: those steps are
    made again.
    """

    def __init__(self, path: pathlib.Path, start: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        path.write_text(text)
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """One step's metrics; on disk line by line."""
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def plot_loss(metrics: pathlib.Path, image: pathlib.Path) -> None:
    """Draws the training loss, and the held-out loss where it was measured."""
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    trained = [row for row in rows if "loss" in row]
    axes.plot(
        [row["step"] for row in trained],
        [row["loss"] for row in trained],
        label="training",
    )
    held_out = [row for row in rows if "held_out_loss" in row]
    if held_out:
        axes.plot(
            [row["step"] for row in held_out],
            [row["held_out_loss"] for row in held_out],
            "o",
            label="held out",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
    plt.close(figure)
