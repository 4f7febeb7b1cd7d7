"""From a command's options (`options.py`) to settings (`settings.py`), prompts and numbers.

Errors name the option as the user wrote it.
"""

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from ldm.diffusion.names import lookup
from ldm.diffusion.samplers import SAMPLERS
from ldm.models.weighting import clip_skip_layers
from sample.cli import load_pipeline
from sample.hints import asked_controls
from sample.parts import Parts
from sample.prompt_sources import expand, read_prompts
from sample.prompt_study import read_study
from sample.settings import Guidance, Sampling, Variation, Wording


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The settings of a command that makes pictures; of the other tools' sampler names ours are noted in
    `args`. Raises ValueError for what does not fit together, before any model is read."""
    if args.sampler not in SAMPLERS:  # a name from elsewhere, maybe with its schedule
        found = lookup(args.sampler)
        args.sampler, args.schedule = found.sampler, args.schedule or found.schedule
        told = [f"{name}={value}" for name, value in found.options.items()]
        args.sampler_option = [*told, *(args.sampler_option or [])] or None
    asked_controls(args)
    return Sampling(
        negative=args.negative,
        seed=args.seed,
        steps=args.steps,
        sampler=args.sampler,
        guidance=guidance_of(args),
        size=args.size,
        eta=args.eta,
        schedule=args.schedule,
        options=named_values(args.sampler_option or [], "--sampler-option"),
        variation=variation_of(args),
        wording=wording_of(args),
    )


def guidance_of(args: argparse.Namespace) -> Guidance:
    """Without the weaker model of `--autoguide`, see `weaker_of`."""
    own: dict[str, Any] = named_values(args.guidance_option or [], "--guidance-option")
    for name in own:
        if name not in ("eta", "norm", "momentum") or args.guidance_rule != "projected":
            raise ValueError(
                f"--guidance-option {name} is not known to --guidance-rule {args.guidance_rule}; projected "
                "has eta, norm and momentum"
            )
    if args.pag is not None:
        scale, _, layers = args.pag.partition(":")
        own["perturbed"] = number(scale, "--pag", "3 or 3:mid")
        own["perturbed_layers"] = layers or "mid"
    if args.guidance_interval is not None:
        own["interval"] = pair(args.guidance_interval, "--guidance-interval", "0.3:5")
    if args.dynamic_threshold is not None:
        share, _, limit = args.dynamic_threshold.partition(":")
        example = "0.995 or 0.995:4"
        own["threshold"] = (
            number(share, "--dynamic-threshold", example),
            number(limit or "1", "--dynamic-threshold", example),
        )
    return Guidance(
        args.guidance,
        rule=args.guidance_rule,
        rescale=args.guidance_rescale,
        image=getattr(args, "image_guidance", None),
        together=not args.apart,
        **own,
    )


def weaker_of(args: argparse.Namespace) -> Parts | None:
    """The weaker model of `--autoguide`, read as the model itself is."""
    if args.autoguide is None:
        return None
    return load_pipeline(argparse.Namespace(**{**vars(args), "model": args.autoguide}))


def wording_of(args: argparse.Namespace) -> Wording:
    return Wording(
        syntax=args.syntax,
        weighting=args.weighting,
        skip=clip_skip_layers(args.clip_skip),
        long=args.long_prompts,
        shares=args.shares,
    )


def variation_of(args: argparse.Namespace) -> Variation | None:
    """The other seed and the share of its noise. Raises ValueError where one comes without the other."""
    if (args.variation_seed is None) != (args.variation_strength is None):
        raise ValueError("--variation-seed and --variation-strength need each other")
    if args.variation_seed is None:
        return None
    if not 0 <= args.variation_strength <= 1:
        raise ValueError(f"--variation-strength must be between 0 and 1, got {args.variation_strength}")
    return args.variation_seed, args.variation_strength


def prompts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, negative prompt) of each picture, `-n` times each, choices of wildcards made.

    Those of the command line come first, then the file's, then the study's.
    """
    asked = [(prompt, args.negative) for prompt in args.prompts]
    if args.prompts_file is not None:
        asked += [(prompt, args.negative) for prompt in read_prompts(args.prompts_file)]
    if args.study is not None:
        asked += [(prompt, negative or args.negative) for _, prompt, negative in read_study(args.study)]
    each = [(prompt, negative) for prompt, negative in asked for _ in range(args.n)]
    if args.wildcards is None:
        return each

    def chosen(text: str, number: int) -> str:
        return expand(text, args.seed, number, args.wildcards)

    numbered = enumerate(each, start=args.first)
    return [(chosen(prompt, number), chosen(negative, number)) for number, (prompt, negative) in numbered]


def named_values(pairs: Sequence[str], option: str) -> dict[str, float | int | str]:
    """`NAME=VALUE` texts as a dict, whole numbers and numbers as such. Raises ValueError for another form."""
    values: dict[str, float | int | str] = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} must be like order=3, got {text!r}")
        values[name] = value
        for kind in (float, int):  # the last that fits
            with contextlib.suppress(ValueError):
                values[name] = kind(value)
    return values


def number(text: str, option: str, example: str) -> float:
    """A number of an option that holds several. Raises ValueError for other text."""
    with contextlib.suppress(ValueError):
        return float(text)
    raise ValueError(f"{option} must be like {example}, got {text!r}")


def pair(text: str, option: str, example: str) -> tuple[float, float]:
    """`A:B` as two numbers; a side left out is open, 0 or infinite. Raises ValueError for other text."""
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError(f"{option} must be like {example}, got {text!r}")
    return number(low or "0", option, example), number(high or "inf", option, example)
