"""What a run says while it trains: a progress bar on the terminal, one JSON line a report in `log.jsonl`,
by option for TensorBoard as well. `report_page.py` shows the log.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.weights.io import write_atomically

IN_BAR = ("loss", "gradient")  # the log has the others


class Reporter:
    """Progress bar and JSONL log of one run; `start` is the step it begins (or goes on) from.

    Rows of later steps, left by a run killed after its last checkpoint, are dropped: they come again.
    sums: (total, count) of each metric not logged yet, so that a resumed run logs what an unbroken one would.
    tensorboard: write the numbers for TensorBoard too; raises ModuleNotFoundError where it is not installed.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int,
        images_per_step: int,
        sums: Mapping[str, tuple[float, int]] | None = None,
        tensorboard: bool = False,
    ):
        self.board = tensorboard_writer(folder / "tensorboard", start) if tensorboard else None
        self.log_file = folder / "log.jsonl"
        if self.log_file.exists():
            write_atomically(self.log_file, "".join(rows_until(self.log_file, start)))
        self.images_per_step = images_per_step
        self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.begun, self.since = time.perf_counter(), start
        self.sums = dict(sums or {})

    def step(self, metrics: Mapping[str, float]) -> None:
        """Count one training step; its metrics are averaged until the next `log`."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
        shown = {name: f"{metrics[name]:.4g}" for name in IN_BAR if name in metrics}
        self.bar.set_postfix({**shown, "images/s": f"{self.rate(int(self.bar.n) + 1):.4g}"}, refresh=False)
        self.bar.update(1)

    def skip(self, step: int, why: str) -> None:
        """Tell that a step moved nothing."""
        self.say(f"skipped: {why}")
        self.write({"step": step, "skipped": why})

    def rate(self, step: int) -> float:
        """Images per second since the last row of the log."""
        seconds = time.perf_counter() - self.begun
        return (step - self.since) * self.images_per_step / seconds if seconds > 0 else 0.0

    def log(self, step: int, **extra: float) -> None:
        """Write the means since the last call, the images per second and `extra` as one line."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.write({"step": step, **means, "images_per_second": self.rate(step), **extra})
        self.sums, self.begun, self.since = {}, time.perf_counter(), step

    def write(self, row: dict[str, Any]) -> None:
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
            for key, value in row.items()
        }
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(rounded, ensure_ascii=False) + "\n")
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(self.log_file)) from error
        if self.board is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, row["step"])

    def say(self, text: str) -> None:
        tqdm.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()


class Quiet:
    """A reporter that says nothing: for all processes of a job but the first."""

    sums: dict[str, tuple[float, int]]

    def __init__(self) -> None:
        self.sums = {}

    def step(self, metrics: Mapping[str, float]) -> None: ...
    def skip(self, step: int, why: str) -> None: ...
    def log(self, step: int, **extra: float) -> None: ...
    def write(self, row: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def tensorboard_writer(folder: Path, start: int) -> Any:
    """A writer that drops what a run killed after step `start` wrote beyond it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "run.tensorboard=true needs the package tensorboard: pip install tensorboard (or the extra "
            "[tensorboard] of this package), or set it to false"
        ) from error
    return SummaryWriter(str(folder), purge_step=start + 1)


def rows_until(path: Path, step: int) -> Iterator[str]:
    """The whole lines of a log up to and including `step`."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if isinstance(row, dict) and row.get("step", 0) <= step:
            yield line
