"""What a run says while it trains: a progress bar on the terminal, one JSON line a report in `log.jsonl`."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.weights.io import write_atomically


class Reporter:
    """Progress bar and JSONL log of one run; `start` is the step it begins (or goes on) from.

    Rows of later steps, left by a run killed after its last checkpoint, are dropped: they come again.
    sums: (total, count) of each metric not logged yet, so that a resumed run logs what an unbroken one would.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        start: int,
        images_per_step: int,
        sums: Mapping[str, tuple[float, int]] | None = None,
    ):
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
        self.bar.update(1)

    def log(self, step: int, **extra: float) -> None:
        """Write the means since the last call, the images per second and `extra` as one line."""
        seconds = time.perf_counter() - self.begun
        means = {name: total / count for name, (total, count) in self.sums.items()}
        rate = (step - self.since) * self.images_per_step / seconds if seconds > 0 else 0.0
        self.write({"step": step, **means, "images_per_second": rate, **extra})
        self.bar.set_postfix({**means, "images/s": rate}, refresh=False)
        self.sums, self.begun, self.since = {}, time.perf_counter(), step

    def write(self, row: dict[str, Any]) -> None:
        rounded = {
            key: float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
            for key, value in row.items()
        }
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(rounded, ensure_ascii=False) + "\n")

    def say(self, text: str) -> None:
        tqdm.write(text)

    def close(self) -> None:
        self.bar.close()


def rows_until(path: Path, step: int) -> Iterator[str]:
    """The whole lines of a log up to and including `step`."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if isinstance(row, dict) and row.get("step", 0) <= step:
            yield line
