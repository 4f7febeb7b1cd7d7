"""Look into checkpoints and change their form.

    ldm-weights inspect FILE...                                     what a checkpoint holds; reads no tensor
    ldm-weights convert SRC DST --to FORM                           the same checkpoint in another form
    ldm-weights transfer CONTROLNET DST --from BASE --to OTHER      a ControlNet for another base model
    ldm-weights lora ...                                            files of LoRAs, see `lora_commands.py`
    ldm-weights embedding FILE [DST]                                what new words it holds; DST in its form

or `python -m sample.weights ...`. All work on files of any size: converting holds one set of weights. The
work is done in `ldm/weights`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sample import lora_commands
from sample.cli import Parser, add_checkpoint_options, report, tolerate_encodings

if TYPE_CHECKING:
    from ldm.weights.checkpoint import Checkpoint

SHOWN = 8  # foreign names that are listed


def parser() -> argparse.ArgumentParser:
    """The command line of `ldm-weights`."""
    main = Parser(prog="ldm-weights", description="Look into checkpoints and convert them.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what a checkpoint holds", description=inspect_.__doc__)
    inspect.add_argument(
        "files", nargs="+", metavar="FILE", help="checkpoint file or folder, or shipped name"
    )
    convert = commands.add_parser("convert", help="write a checkpoint in another form")
    convert.add_argument("source", metavar="SRC", help="checkpoint file or folder, or shipped name")
    convert.add_argument("destination", metavar="DST", help="file (compvis) or folder, which must not exist")
    convert.add_argument("--to", required=True, metavar="FORM", help="ldm, compvis or diffusers")
    convert.add_argument("--dtype", help="float32, bfloat16 or float16 (that of the source)")
    transfer = commands.add_parser(
        "transfer", help="make a ControlNet fit another base model", description=transfer_.__doc__
    )
    transfer.add_argument("controlnet", metavar="CONTROLNET", help="its file or folder")
    transfer.add_argument("destination", metavar="DST", help="new file or folder, in the form of CONTROLNET")
    transfer.add_argument(
        "--from", dest="base", required=True, metavar="BASE", help="model that it was trained on"
    )
    transfer.add_argument("--to", dest="other", required=True, metavar="OTHER", help="model it shall steer")
    transfer.add_argument("--dtype", help="float32, bfloat16 or float16 (that of CONTROLNET)")
    embedding = commands.add_parser(
        "embedding", help="look into a file of new words, or convert it", description=embedding_.__doc__
    )
    embedding.add_argument("file", metavar="FILE", help="of textual inversion, whatever its form")
    embedding.add_argument("destination", nargs="?", metavar="DST", help="new file; its suffix is its form")
    embedding.add_argument("--to", metavar="FORM", help="another form: diffusers, original or webui")
    embedding.add_argument("--token", metavar="NAME", help="what to call its one word (as the file says)")
    embedding.add_argument("--debug", action="store_true", help="show the traceback of an error")
    lora = commands.add_parser("lora", help="look into files of LoRAs, convert, merge, combine, extract")
    lora_commands.add_commands(lora)
    for command in (inspect, convert, transfer):
        add_checkpoint_options(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return main


def inspect_(args: argparse.Namespace) -> None:
    """Print kind, parts, parameters and number formats, and what is missing or foreign; reads no tensor."""
    from sample.model import find_model

    for name in args.files:
        print(described(_open(args, find_model(name))))


def convert_(args: argparse.Namespace) -> None:
    from ldm.device import pick_dtype
    from ldm.weights.writing import convert
    from sample.model import find_model

    checkpoint = _open(args, find_model(args.source))
    dtype = None if args.dtype is None else pick_dtype(args.dtype)
    print(convert(checkpoint, args.destination, args.to, dtype, args.allow_nan))


def transfer_(args: argparse.Namespace) -> None:
    """Add what the ControlNet learnt beyond its BASE to the same layers of the model OTHER. --kind is of
    CONTROLNET, --weights of the two models."""
    from ldm.device import pick_dtype
    from ldm.weights.controlnet import transfer
    from ldm.weights.reading import open_checkpoint
    from ldm.weights.writing import convert
    from sample.model import find_model

    control = open_checkpoint(find_model(args.controlnet), kind=args.kind)
    base, other = (
        open_checkpoint(find_model(name), weights=args.weights) for name in (args.base, args.other)
    )
    dtype = None if args.dtype is None else pick_dtype(args.dtype)
    print(convert(transfer(control, base, other), args.destination, control.form, dtype, args.allow_nan))


def embedding_(args: argparse.Namespace) -> None:
    """Print the words of a file of textual inversion and their vectors; with DST, write them there."""
    from ldm.weights.embeddings import convert, described

    if args.destination is not None:
        print(convert(args.file, args.destination, args.to, args.token))
    elif args.to is not None or args.token is not None:
        raise ValueError("--to and --token are for writing: name the file DST too")
    else:
        print(described(args.file))


def _open(args: argparse.Namespace, path: object) -> "Checkpoint":
    from ldm.weights.reading import open_checkpoint

    checkpoint = open_checkpoint(str(path), kind=args.kind, prediction=args.prediction, weights=args.weights)
    for note in checkpoint.notes:
        print(f"{path} {note}", file=sys.stderr)
    return checkpoint


FORM_TITLES = {
    "ldm": "a model of ours",
    "compvis": "the original code's names",
    "diffusers": "diffusers' names",
}


def described(checkpoint: "Checkpoint") -> str:
    """The lines of `inspect`."""
    from ldm.weights.checkpoint import TITLES

    lines = [f"{checkpoint.path}", f"  form      {checkpoint.form}: {FORM_TITLES[checkpoint.form]}"]
    lines.append(f"  kind      {checkpoint.kind}")
    for name, part in checkpoint.parts.items():
        formats = Counter(str(entry.dtype).removeprefix("torch.") for entry in part.entries.values())
        told = ", ".join(formats)
        lines.append(
            f"  {TITLES[name]:<16}{len(part.names):>5} tensors {part.parameters:>13,} parameters  {told}"
        )
    config = checkpoint.config
    if config.unet is not None:
        diffusion = config.diffusion
        lines.append(
            f"  predicts  {diffusion.prediction if diffusion else 'eps or v: not told by the weights'}"
        )
        missing = [name for name in ("autoencoder", "text") if name not in checkpoint.parts]
        if config.unet.context_dim is None or {"bert", "classes"} & set(checkpoint.parts):
            missing = [name for name in missing if name != "text"]
        lines.append(f"  missing   {', '.join(TITLES[name] for name in missing) or 'nothing'}")
    if config.control is not None:
        unet, stride = config.control.unet, config.control.stride
        lines.append(
            f"  steers    a UNet {unet.model_channels} wide with context {unet.context_dim}, by hints of "
            f"{config.control.hint_channels} channels and {stride}x{stride} pixels a latent"
        )
    if checkpoint.weights:
        lines.append(f"  weights   {checkpoint.weights} (the file holds raw and averaged ones)")
    names = sorted(checkpoint.foreign)
    more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    lines.append(f"  foreign   {f'{len(names)}: ' + ', '.join(names[:SHOWN]) + more if names else 'nothing'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    tolerate_encodings()
    commands = {
        "inspect": inspect_,
        "convert": convert_,
        "transfer": transfer_,
        "embedding": embedding_,
        "lora": lora_commands.run,
    }
    try:
        commands[args.command](args)
    except BaseException as error:
        return report("ldm-weights", error, args.debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
