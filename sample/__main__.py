"""`ldm-sample COMMAND ...`, or `python -m sample COMMAND ...`: where every walk through sampling starts.

Only parses; each command is a function `run(args)` in the module of its name, imported (torch with it) when
it is called. Its arguments are in `commands.py`. Several processes share out the pictures of an evaluation:
`torchrun --nproc-per-node N -m sample evaluate ...`, see `ldm/distributed.py`.
"""

import importlib
import sys
from collections.abc import Sequence

from sample import commands
from sample.cli import FAILED, Parser, report, tolerate_encodings

COMMANDS = {
    "txt2img": "make pictures from prompts",
    "img2img": "make pictures from a picture and prompts",
    "inpaint": "paint a part of a picture anew",
    "outpaint": "paint beyond the edges of a picture",
    "instruct": "edit a picture as a prompt says (models that read a picture)",
    "upscale": "make a small picture large (models for super-resolution)",
    "invert": "find the noise that a picture comes from, and how exactly",
    "again": "make a picture of ours again, with other options if wanted",
    "sweep": "vary two or three options: a labelled grid of pictures and a table",
    "annotate": "make the hints that a ControlNet follows from pictures",
    "reconstruct": "encode pictures and decode them again, with their PSNR",
    "evaluate": "measure how well pictures show what their prompts say",
}
# Commands whose work several processes share, and what is said of the others
SHARED = {"evaluate"}
ALONE = (
    "{} runs in one process, not in {} by torchrun, which share out the pictures of evaluate alone; for many "
    "pictures start processes of your own, each with its numbers: -n 500 --first 0 and -n 500 --first 500"
)


def parser() -> Parser:
    """The command line of `ldm-sample`."""
    main = Parser(prog="ldm-sample", description="Make and measure pictures with a latent diffusion model.")
    choices = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = choices.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        getattr(commands, f"add_{name}")(command)
        command.set_defaults(parser=command)
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    commands.check(args)
    del args.parser  # what follows is values, which are written down
    tolerate_encodings()
    from ldm.distributed import Elsewhere, last_words, launched, together, world_size

    with launched():
        try:
            with last_words("Start all processes again"), together():
                if world_size() > 1 and args.command not in SHARED:
                    raise ValueError(ALONE.format(args.command, world_size()))
                importlib.import_module(f"sample.{args.command}").run(args)
        except Elsewhere:  # and told there
            return FAILED
        except BaseException as error:
            return report("ldm-sample", error, args.debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
