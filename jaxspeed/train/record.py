"""What a run leaves to look at: `metrics.jsonl`, one object a step, and `loss.png`."""

import contextlib
import json
import math
import os
import pathlib
from typing import Any

from matplotlib.figure import Figure


class Metrics:
    """Appends to a `metrics.jsonl`.

    A run that goes on from a checkpoint drops the lines after it: those steps are
    made again.
    """

    def __init__(self, path: pathlib.Path, start: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= start]
        replace_text(path, "".join(map(_line, kept)))
        self._file = path.open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """One step's metrics; on disk line by line."""
        self._file.write(_line(row))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: they are written as null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in row.items()
    }
    return json.dumps(plain) + "\n"


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole: after a crash it is the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def plot_loss(metrics: pathlib.Path, image: pathlib.Path) -> None:
    """Draws the training loss, and the held-out loss where it was measured."""
    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
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
