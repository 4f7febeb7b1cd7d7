"""Loading a whole checkpoint: time and peak memory beside diffusers, each in processes of its own.

    python -m benchmarks.loading

writes a checkpoint of Stable Diffusion 1.5's shapes (4.3 GB, the values do not matter) in the original's
single file and as a diffusers folder, then loads both by `Pipeline.load` and by StableDiffusionPipeline, and
reads every weight once. "Times the weights" is the growth of the process's peak resident memory over the size
of the weights at the number format computed in; memory-mapped pages count in it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.common import Row, execute, in_fresh_process, machine, make_parser, memory_of, report
from ldm.device import DTYPES, pick_dtype
from ldm.weights.compvis import AUTOENCODER_PREFIX, TRANSFORMERS_PREFIX, UNET_PREFIX, to_compvis
from ldm.weights.io import save_weights
from ldm.weights.kinds import find_kind
from ldm.weights.names import shapes
from ldm.weights.reading import open_checkpoint
from ldm.weights.writing import convert

PREFIXES = {"unet": UNET_PREFIX, "autoencoder": AUTOENCODER_PREFIX, "text": TRANSFORMERS_PREFIX}
FORMS = {"single file": "model.safetensors", "folder": "folder"}


def measure(args: argparse.Namespace) -> None:
    """Write the checkpoints, load each and report."""
    kind = "tiny_sd15" if args.quick else "sd15"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for stored in args.stored:
            file = write(kind, Path(scratch) / stored / FORMS["single file"], pick_dtype(stored))
            convert(open_checkpoint(file), file.with_name(FORMS["folder"]), "diffusers")
            for dtype in args.dtype:
                rows += [row(file.with_name(name), form, stored, dtype) for form, name in FORMS.items()]
    report("loading", args, machine(args.quick), rows, COLUMNS)


def write(kind: str, file: Path, dtype: torch.dtype) -> Path:
    """A single file of the kind's names and shapes."""
    tensors = {}
    for part, config in find_kind(kind).config.parts.items():
        filled = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes(config).items()}
        tensors |= {PREFIXES[part] + name: tensor for name, tensor in to_compvis(filled, config).items()}
    save_weights(file, tensors, {"format": "pt"})
    return file


def row(path: Path, form: str, stored: str, dtype: str) -> Row:
    parts = open_checkpoint(path).parts.values()
    weights = sum(part.parameters for part in parts) * DTYPES[dtype].itemsize / 2**20
    found: Row = {"form": form, "stored": stored, "dtype": dtype, "weights_mib": weights}
    for side in ("ours", "diffusers"):
        measured = in_fresh_process("benchmarks.loading", "memory", side=side, path=str(path), dtype=dtype)
        found |= {
            f"{side}_mib": measured["peak"] - measured["before"],
            f"{side}_times_the_weights": (measured["peak"] - measured["before"]) / weights,
            f"{side}_seconds": measured["seconds"],
        }
    return found


def memory(side: str, path: str, dtype: str) -> dict[str, float]:
    """MiB before and at the peak of loading and of reading every weight; seconds of it."""
    load = {"ours": load_ours, "diffusers": load_diffusers}[side]
    import_everything()
    clock: dict[str, float] = {}

    def call() -> None:
        began = time.perf_counter()
        modules = load(Path(path), pick_dtype(dtype))
        for weight in (weight for module in modules for weight in module.parameters()):
            weight.sum()
        clock["seconds"] = time.perf_counter() - began

    return memory_of(lambda: call, calls=1) | clock


def import_everything() -> None:
    """Libraries are no cost of a checkpoint."""
    import diffusers
    import transformers

    assert diffusers.StableDiffusionPipeline
    assert transformers.CLIPTextModel
    torch.ones(64, 64).mm(torch.ones(64, 64)).sum()


def load_ours(path: Path, dtype: torch.dtype) -> list[torch.nn.Module]:
    from sample import Pipeline

    pipe = Pipeline.load(path, "cpu", dtype)
    assert pipe.text_encoder is not None
    return [pipe.unet, pipe.autoencoder, pipe.text_encoder]


def load_diffusers(path: Path, dtype: torch.dtype) -> list[torch.nn.Module]:
    from diffusers import StableDiffusionPipeline

    options = {"torch_dtype": dtype, "local_files_only": True}
    if path.is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(path, **options)
    else:
        config = str(path.with_name(FORMS["folder"]))
        pipe = StableDiffusionPipeline.from_single_file(str(path), config=config, **options)
    return [pipe.unet, pipe.vae, pipe.text_encoder]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "checkpoint": lambda row: f"{row['form']}, {row['stored']}",
    "computed in": lambda row: row["dtype"],
    "weights": lambda row: f"{row['weights_mib']:.0f} MiB",
    "ours": lambda row: f"{row['ours_times_the_weights']:.2f} x, {row['ours_seconds']:.1f} s",
    "diffusers": lambda row: f"{row['diffusers_times_the_weights']:.2f} x, {row['diffusers_seconds']:.1f} s",
}


def options() -> argparse.ArgumentParser:
    parser = make_parser("loading", "Load a checkpoint beside diffusers: time and peak memory.", rounds=1)
    parser.add_argument("--stored", nargs="+", default=["float32", "float16"], help="formats of the files")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"], help="formats computed in")
    parser.add_argument("--scratch", help="folder for the files, 9 GB at once (that of temporary files)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run this benchmark; returns the exit status."""
    return execute(options(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
