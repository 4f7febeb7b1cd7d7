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
    "img2img": "make pictures from a picture and prompts",
    "inpaint": "paint a part of a picture anew",
    "again": "make a picture of ours again, with other options if wanted",
    "reconstruct": "encode pictures and decode them again, with their PSNR",
    "evaluate": "measure how well pictures show what their prompts say",
}
# The names in ldm/diffusion's tables, which need torch; a test compares them
SAMPLERS = (
    *("ddim", "ddpm", "deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral"),
    *("dpmpp_3m_sde", "dpmpp_sde", "edm_euler", "edm_heun", "euler", "euler_ancestral", "heun", "lcm", "lms"),
    *("plms", "pndm", "tcd", "unipc"),
)
GRIDS = (
    *("align_your_steps", "beta", "compvis", "exponential", "karras", "lcm", "leading", "linspace"),
    *("polyexponential", "sgm_uniform", "simple", "trailing", "uniform"),
)


def parser() -> argparse.ArgumentParser:
    """The command line of `ldm-sample`."""
    main = Parser(prog="ldm-sample", description="Make and measure pictures with a latent diffusion model.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = {name: commands.add_parser(name, help=what, description=what) for name, what in COMMANDS.items()}
    add_txt2img(add["txt2img"])
    add_img2img(add["img2img"])
    add_inpaint(add["inpaint"])
    add_again(add["again"])
    add_reconstruct(add["reconstruct"])
    add_evaluate(add["evaluate"])
    return main


def add_txt2img(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompts", nargs="+", type=text, metavar="PROMPT", help='what to show; "" is unconditional'
    )
    command.add_argument("--negative", default="", type=text, metavar="PROMPT", help="what to move away from")
    command.add_argument("--sampler", default="ddim", help=f"{', '.join(SAMPLERS)} (%(default)s)")
    command.add_argument(
        "--schedule", metavar="NAME[:RHO]", help=f"noise levels: {', '.join(GRIDS)} (by sampler)"
    )
    command.add_argument("--eta", type=float, help="how much noise to add, where the sampler has it")
    command.add_argument(
        "--sampler-option",
        action="append",
        metavar="NAME=VALUE",
        help="of the sampler: order=3 and variant=bh1 of unipc, churn=20 of edm_heun; may be repeated",
    )
    command.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    command.add_argument(
        "--guidance",
        type=float,
        default=7.5,
        help="how strongly the prompt acts; 1 is as trained (%(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="same seed, same pictures (%(default)s)")
    command.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="I",
        help="the seed's number of the first picture (%(default)s)",
    )
    command.add_argument(
        "--variation-seed",
        type=int,
        metavar="SEED",
        help="go part of the way to another seed's pictures",
    )
    command.add_argument(
        "--variation-strength", type=float, metavar="S", help="how far: 0 is --seed, 1 the other"
    )
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


def add_img2img(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to start from; scaled and cut to a legal size")
    add_strength(command, 0.6)
    add_txt2img(command)


def add_inpaint(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to paint in; scaled and cut to a legal size")
    command.add_argument("mask", metavar="MASK", help="picture that is white where to paint anew, else black")
    add_strength(command, 1.0)
    command.add_argument(
        "--paste",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the picture's own pixels back where the mask is black",
    )
    command.add_argument(
        "--resample",
        type=int,
        default=1,
        metavar="N",
        help="take each step N times, RePaint (%(default)s)",
    )
    add_txt2img(command)


def add_strength(command: argparse.ArgumentParser, default: float) -> None:
    command.add_argument(
        "--strength",
        type=float,
        default=default,
        help="0 keeps what is there, 1 forgets it; that share of the steps is taken (%(default)s)",
    )
    command.add_argument("--exact-steps", action="store_true", help="take all --steps, whatever the strength")


def add_again(command: argparse.ArgumentParser) -> None:
    command.add_argument("picture", metavar="PICTURE", help="PNG file that one of the commands above wrote")
    command.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="options of that command, or other prompts, to change something",
    )
    command.set_defaults(debug=False, makers=MAKERS)


# The commands that `again` repeats, as what adds their options
MAKERS = {"txt2img": add_txt2img, "img2img": add_img2img, "inpaint": add_inpaint}


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
