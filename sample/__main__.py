"""`ldm-sample COMMAND ...`, or `python -m sample COMMAND ...`: where every walk through sampling starts.

Only parses; each command is a function `run(args)` in the module of its name, imported (torch with it) when
it is called.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from sample.cli import Parser, add_model_options, report, size, text, tolerate_encodings

COMMANDS = {
    "txt2img": "make pictures from prompts",
    "reconstruct": "encode pictures and decode them again, with their PSNR",
    "evaluate": "measure how well pictures show what their prompts say",
}


def parser() -> argparse.ArgumentParser:
    """The command line of `ldm-sample`."""
    main = Parser(prog="ldm-sample", description="Make and measure pictures with a latent diffusion model.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {name: commands.add_parser(name, help=what, description=what) for name, what in COMMANDS.items()}
    add_txt2img(add["txt2img"])
    add_reconstruct(add["reconstruct"])
    add_evaluate(add["evaluate"])
    return main


def add_txt2img(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompts", nargs="+", type=text, metavar="PROMPT", help='what to show; "" is unconditional'
    )
    command.add_argument("--negative", default="", type=text, metavar="PROMPT", help="what to move away from")
    command.add_argument("--sampler", default="ddim", help="ddim, ddpm, euler, euler_ancestral (%(default)s)")
    command.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    command.add_argument(
        "--guidance",
        type=float,
        default=7.5,
        help="how strongly the prompt acts; 1 is as trained (%(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="same seed, same pictures (%(default)s)")
    command.add_argument("-n", type=int, default=1, help="pictures for each prompt (%(default)s)")
    command.add_argument("--batch", type=int, default=4, help="pictures made at once (%(default)s)")
    command.add_argument("--size", type=size, metavar="WxH", help="pixels (what the model was trained on)")
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    command.add_argument(
        "--preview",
        metavar="linear|FILE",
        help="show what is being made in DIR/preview.png: by a linear map of the latents, or by a tiny "
        "decoder of the TAESD family",
    )
    command.add_argument(
        "--preview-every", type=int, default=5, metavar="N", help="steps between previews (%(default)s)"
    )
    add_model_options(command)


def add_reconstruct(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", metavar="IMAGE", help="pictures of any size")
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    add_model_options(command)


def add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="the images the model was trained on, with metadata.jsonl",
    )
    command.add_argument(
        "--config",
        metavar="CONFIG",
        help="training config of the model, where it was trained on data.concepts alone",
    )
    command.add_argument(
        "--captions", type=int, default=200, help="training captions to sample (%(default)s)"
    )
    command.add_argument("--steps", type=int, default=50, help="DDIM steps (%(default)s)")
    command.add_argument("--guidance", type=float, default=4.0, help="guidance scale (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of captions and pictures (%(default)s)")
    command.add_argument("--batch", type=int, default=16, help="pictures made at once (%(default)s)")
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    add_model_options(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    tolerate_encodings()
    try:
        importlib.import_module(f"sample.{args.command}").run(args)
    except BaseException as error:
        return report("ldm-sample", error, args.debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
