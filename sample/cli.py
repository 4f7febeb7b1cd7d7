"""What the commands share: errors told in one line, and the options that every command has.

Imports nothing heavy, so that `--help` is quick. Used by `sample/__main__.py` and `train/__main__.py`.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sample.pipeline import Pipeline

FAILED = 2  # exit status after a mistake in the command, or in the files and values it names
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line; its subparsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]
        self.exit(FAILED, f"{program}: error: {' '.join(message.split())}; see {self.prog} --help\n")


def run(program: str, main: Callable[[], int], debug: bool = False) -> int:
    """The exit status of `main()`; an error that a user can cause becomes one line, as in `report`."""
    tolerate_encodings()
    try:
        return main()
    except BaseException as error:
        return report(program, error, debug)


def report(program: str, error: BaseException, debug: bool = False) -> int:
    """Say on stderr in one line what went wrong; returns the exit status.

    That is 130 for CTRL-C, and 2 for a ValueError, an OSError, an optional package that is not installed or
    too little memory. Any other error is a fault of the program and is raised again. debug: the traceback
    too.
    """
    if isinstance(error, BrokenPipeError):  # `ldm-sample ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, KeyboardInterrupt):
        line, status = f"{program}: interrupted", INTERRUPTED
    elif isinstance(error, (ValueError, OSError, ModuleNotFoundError)) or out_of_memory(error):
        line, status = f"{program}: error: {one_line(error)}", FAILED
    else:
        raise error
    if debug:
        traceback.print_exception(error)
    print(line, file=sys.stderr)
    return status


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so on the CPU by a plain RuntimeError."""
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def one_line(error: BaseException) -> str:
    if out_of_memory(error):
        return "not enough memory; try smaller pictures or fewer at once"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def tolerate_encodings() -> None:
    """Show what the terminal's encoding lacks (an emoji in a file's name) as an escape, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def text(argument: str) -> str:
    """An argument that is text and no path, for `type=`: UTF-8 whatever the locale, or refused."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{argument!r} is not UTF-8 text") from None


def size(argument: str) -> tuple[int, int]:
    """`WxH` as (W, H), for `type=`."""
    width, _, height = argument.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{argument!r} is not a size like 64x64 (width x height, in pixels)")
    return int(width), int(height)


def add_checkpoint_options(parser: argparse._ActionsContainer) -> None:
    """What a checkpoint may leave open."""
    parser.add_argument("--kind", metavar="NAME", help="kind of a single file, if it is not recognised")
    parser.add_argument("--prediction", help="eps, v, x0, edm or flow, where the checkpoint does not tell")
    parser.add_argument(
        "--weights", default="auto", help="ema or raw, where a file holds both (as the original: %(default)s)"
    )
    parser.add_argument("--allow-nan", action="store_true", help="read weights that are not finite")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and how to show errors."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="emoji",
        metavar="NAME|PATH",
        help="shipped name, checkpoint file (.safetensors, .ckpt), diffusers folder, or folder of a model or "
        "run (%(default)s)",
    )
    add_checkpoint_options(group)
    group.add_argument("--vocabulary", metavar="FILE", help="vocab.txt of a model with a BERT text tower")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (%(default)s)")
    group.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The model that the options name; what the user should know of it goes to stderr."""
    from ldm.device import pick_dtype
    from sample.pipeline import Pipeline

    pipe = Pipeline.load(
        args.model,
        args.device,
        pick_dtype(args.dtype),
        kind=args.kind,
        prediction=args.prediction,
        weights=args.weights,
        vocabulary=args.vocabulary,
        allow_nan=args.allow_nan,
    )
    for note in pipe.checkpoint.notes if pipe.checkpoint else ():
        print(f"{args.model} {note}", file=sys.stderr)
    return pipe
