"""Sampling: a model's parts together, and the commands that make pictures. `from sample import Pipeline`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sample.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    """Import `Pipeline`, and with it torch, only when it is asked for: `ldm-sample --help` is quick
    without."""
    if name == "Pipeline":
        from sample.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
