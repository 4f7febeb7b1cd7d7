"""The options that `ldm-sample` commands share, group by group; `commands.py` says which command has which.

Only argparse: nothing here imports torch, so that `--help` is quick. The name of an option is the name of its
value (`--guidance-rescale`, `args.guidance_rescale`), which `recording.py` and `again.py` count on;
`arguments.py` turns the values into settings.
"""

import argparse

from sample.cli import add_model_options, size, text

# The names in ldm/diffusion's tables, which need torch; a test compares them
SAMPLERS = (
    *("ddim", "ddpm", "deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral"),
    *("dpmpp_3m_sde", "dpmpp_sde", "edm_euler", "edm_heun", "euler", "euler_ancestral", "heun", "lcm", "lms"),
    *("plms", "pndm", "tcd", "unipc"),
)
GRIDS = (
    *("align_your_steps", "beta", "compvis", "ddim_uniform", "exponential", "flow", "karras", "kl_optimal"),
    *("lcm", "leading", "linspace", "polyexponential", "sgm_uniform", "simple", "trailing", "uniform"),
)


def add_prompts(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("prompts")
    group.add_argument(
        "prompts", nargs="*", type=text, metavar="PROMPT", help='what to show; "" is unconditional'
    )
    group.add_argument("--negative", default="", type=text, metavar="PROMPT", help="what to move away from")
    group.add_argument("--prompts-file", metavar="FILE", help="more prompts, a line each")
    group.add_argument(
        "--study", metavar="FILE.yaml", help="more prompts: all combinations of subjects, media, artists, ..."
    )
    group.add_argument(
        "--wildcards",
        metavar="DIR",
        help="choose in each picture for {a|b} and __name__, a line of DIR/name.txt",
    )
    group.add_argument(
        "--syntax",
        default="webui",
        help="webui: (more) [less] (x:1.3), AND, BREAK, [a:b:0.5], [a|b]; comfy: (more) (x:1.3); "
        "webui-none, plain (%(default)s)",
    )
    group.add_argument(
        "--weighting",
        default="original",
        help="what a weight does: original (web UI), no_norm, comfy, ignore (%(default)s)",
    )
    group.add_argument(
        "--shares", action="store_true", help='weights around AND are shares: "Van Gogh:3 AND Monet:2"'
    )
    group.add_argument(
        "--clip-skip",
        type=int,
        default=1,
        metavar="N",
        help="layer of the text tower to stop at, from the end, as the web UIs count (%(default)s)",
    )
    group.add_argument(
        "--long-prompts",
        default="auto",
        help="read in chunks of 75 tokens, or cut; auto is what suits the model (%(default)s)",
    )


def add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    group.add_argument(
        "--sampler",
        default="ddim",
        help=f"{', '.join(SAMPLERS)}; other tools' names too, such as 'DPM++ 2M Karras' (%(default)s)",
    )
    group.add_argument(
        "--schedule", metavar="NAME[:RHO]", help=f"noise levels: {', '.join(GRIDS)} (by sampler)"
    )
    group.add_argument("--eta", type=float, help="how much noise to add, where the sampler has it")
    group.add_argument(
        "--sampler-option",
        action="append",
        metavar="NAME=VALUE",
        help="of the sampler: order=3 and variant=bh1 of unipc, churn=20 of edm_heun; may be repeated",
    )
    group.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")


def add_guidance(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("guidance")
    group.add_argument(
        "--guidance",
        type=float,
        default=7.5,
        help="how strongly the prompt acts; 1 is as trained (%(default)s)",
    )
    group.add_argument(
        "--guidance-rule",
        default="linear",
        help="linear (classifier-free), projected (APG), plusplus (CFG++, --guidance 0 to 1) (%(default)s)",
    )
    group.add_argument(
        "--guidance-option",
        action="append",
        metavar="NAME=VALUE",
        help="of projected: eta=0, norm=15, momentum=-0.5; may be repeated",
    )
    group.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="bring the deviation back to the prompt's own, 0 to 1 (%(default)s)",
    )
    group.add_argument(
        "--guidance-interval", metavar="LOW:HIGH", help="guide only at these noise levels (sigma)"
    )
    group.add_argument(
        "--dynamic-threshold", metavar="SHARE[:LIMIT]", help="of the latents, such as 0.995:4 (Imagen)"
    )
    group.add_argument(
        "--pag", metavar="SCALE[:LAYERS]", help="perturbed-attention guidance, such as 3 or 3:mid,up.1"
    )
    group.add_argument(
        "--autoguide",
        metavar="NAME|PATH",
        help="guide away from this weaker model, not the empty prompt",
    )
    group.add_argument(
        "--apart", action="store_true", help="evaluate prompt and empty prompt one by one: less memory"
    )


def add_control(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("control")
    group.add_argument(
        "--control",
        action="append",
        metavar="MODEL:HINT[:SCALE]",
        help="follow the picture HINT by a ControlNet, a shipped name or a file or folder; HINT comes to the "
        "pictures' size, transparent is black; the last part is the scale if it is a number (1); may be "
        "repeated",
    )
    group.add_argument(
        "--control-range",
        action="append",
        metavar="START:END",
        help="shares of the steps in which it acts, such as 0:0.6; one for all, or one each",
    )
    group.add_argument(
        "--guess-mode",
        metavar="NAME",
        help="follow the hint where the prompt says little: its finer part weaker, the empty prompt without "
        "it; original or diffusers is how much weaker",
    )


def add_pictures(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("pictures")
    group.add_argument("--seed", type=int, default=0, help="same seed, same pictures (%(default)s)")
    group.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="I",
        help="the seed's number of the first picture (%(default)s)",
    )
    group.add_argument(
        "--variation-seed", type=int, metavar="SEED", help="go part of the way to another seed's pictures"
    )
    group.add_argument(
        "--variation-strength", type=float, metavar="S", help="how far: 0 is --seed, 1 the other"
    )
    group.add_argument("-n", type=int, default=1, help="pictures for each prompt (%(default)s)")
    group.add_argument("--batch", type=int, default=4, help="pictures made at once (%(default)s)")
    group.add_argument("--size", type=size, metavar="WxH", help="pixels (what the model was trained on)")
    group.add_argument(
        "--hires", type=size, metavar="WxH", help="a second pass at this size, from the first one's picture"
    )
    group.add_argument(
        "--hires-strength",
        type=float,
        default=0.6,
        metavar="S",
        help="how much the second pass makes anew (%(default)s)",
    )
    group.add_argument(
        "--hires-mode",
        default="bicubic",
        help="what is enlarged: latents (nearest, bilinear, bicubic) or pixels (%(default)s)",
    )
    group.add_argument(
        "--tile", type=int, metavar="N", help="decode in tiles of NxN latent cells, for big pictures"
    )
    group.add_argument("--out", default="outputs", metavar="DIR", help="where to write (%(default)s)")


def add_looking(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("looking inside")
    group.add_argument(
        "--preview",
        metavar="linear|FILE",
        help="show what is being made in DIR/preview.png: by a linear map of the latents, or by a tiny "
        "decoder of the TAESD family",
    )
    group.add_argument(
        "--preview-every", type=int, default=5, metavar="N", help="steps between previews (%(default)s)"
    )
    group.add_argument(
        "--frames",
        metavar="gif|sheet",
        help="the estimate at every step, beside each picture: an animation, or one picture of all",
    )
    group.add_argument(
        "--attention", action="store_true", help="which word each part attends to, beside each picture"
    )


def add_speed(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("speed")
    group.add_argument(
        "--fast-conv",
        type=float,
        default=0.0,
        metavar="GB",
        help="memory for faster convolutions on the CPU, the same but for rounding (%(default)s)",
    )
    group.add_argument("--compile", action="store_true", help="compile the UNet's blocks first")
    group.add_argument(
        "--deep-cache",
        metavar="N[:BRANCH]",
        help="compute the UNet's deep part every N steps only, such as 3 or 3:1: approximate",
    )
    group.add_argument(
        "--token-merging",
        type=float,
        default=0.0,
        metavar="RATIO",
        help="share of tokens merged for self-attention: approximate (%(default)s)",
    )


def add_embedding(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--embedding",
        action="append",
        metavar="FILE[=TOKEN]",
        help="a new word for prompts (textual inversion), called TOKEN or as the file says; may be repeated",
    )


def add_adapters(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("adapters")
    group.add_argument(
        "--adapters", metavar="DIR", help="folder of the files that prompts name, such as <lora:name:0.8>"
    )
    add_lora(group)
    add_embedding(group)


def add_lora(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="a style or subject for all pictures, from a file of any tool (1); may be repeated",
    )


def add_depth(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--depth", metavar="FILE", help="grey picture, white is near: for models that read depth"
    )


def add_strength(command: argparse.ArgumentParser, default: float) -> None:
    command.add_argument(
        "--strength",
        type=float,
        default=default,
        help="0 keeps what is there, 1 forgets it; that share of the steps is taken (%(default)s)",
    )
    command.add_argument("--exact-steps", action="store_true", help="take all --steps, whatever the strength")


def add_painting(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--paste",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="put the picture's own pixels back where it is kept",
    )
    command.add_argument(
        "--feather",
        type=int,
        default=0,
        metavar="PIXELS",
        help="fade what is painted into what is put back (%(default)s)",
    )
    command.add_argument(
        "--resample",
        type=int,
        default=1,
        metavar="N",
        help="take each step N times, RePaint (%(default)s)",
    )


def add_making(command: argparse.ArgumentParser) -> None:
    """What all commands that make pictures from prompts share."""
    add_prompts(command)
    add_sampling(command)
    add_guidance(command)
    add_control(command)
    add_pictures(command)
    add_looking(command)
    add_speed(command)
    add_adapters(command)
    add_model_options(command)
