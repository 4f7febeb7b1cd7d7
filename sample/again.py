"""`ldm-sample again PICTURE.png [option ...]`: the command that made a picture, once more.

Reads the text chunk that `save_png` wrote, turns it into the arguments of its command, lets the options given
here win, and runs that. With nothing changed the picture is bit-equal on the same machine: the batch it was
made in is made whole, since the rounding of matrix products depends on the batch size, and that one picture
is written. With something changed it is made alone.
"""

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sample.cli import Parser
from sample.commands import MAKERS
from sample.images import read_parameters
from sample.recording import POSITIONAL, READING, SIDE, SOURCES
from sample.txt2img import Repeated

SIZED_BY_THE_PICTURE = ("outpaint", "upscale")  # where --size has no say
NOT_OPTIONS = ("command", "prompt", "prompts", *POSITIONAL, "weights")  # "weights" is a hash of the files


def run(args: argparse.Namespace) -> None:
    """Make the picture again and say where it is. Raises ValueError and OSError in one line."""
    recorded = read_parameters(Path(args.picture))
    command = recorded.get("command")
    if not isinstance(command, str) or command not in MAKERS:
        raise ValueError(f"{args.picture} was made by {command!r}; again knows {', '.join(MAKERS)}")
    try:
        prompts, number = check(recorded, [name for name in POSITIONAL if name in recorded])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{args.picture}: its parameters are not complete ({error})") from None
    parser = Parser(prog="ldm-sample again")
    MAKERS[command](parser)
    parser.set_defaults(command=command)
    defaults = vars(parse(parser, [], recorded))
    before = options(recorded, defaults)
    made = parse(parser, before, recorded)
    given = parse(parser, list(args.options), recorded)
    for name in ("control", "lora"):  # others, not more of them
        if getattr(given, name):
            before = [each for each in before if not each.startswith(f"--{name}")]
    wanted = parse(parser, [*before, *args.options], recorded)
    args.debug = wanted.debug
    same = all(value == getattr(wanted, name) for name, value in vars(made).items() if name not in SIDE)
    wanted.prompts, only = wanted.prompts or prompts, None
    if number is not None:  # not a grid
        wanted.first = number if wanted.first == made.first else wanted.first
        if same and (together := recorded.get("together")):
            wanted.prompts, wanted.first, only = together["prompts"], together["first"], number
            wanted.batch = len(wanted.prompts)
    importlib.import_module(f"sample.{command}").run(wanted, Repeated(recorded, only))


def check(recorded: Mapping[str, Any], paths: list[str]) -> tuple[list[str], int | None]:
    """The prompts, and the number of the picture, None for a grid.

    Raises KeyError, TypeError or ValueError where the parts that are not options have another form.
    """
    grid = "prompts" in recorded
    prompts = recorded["prompts"] if grid else [recorded["prompt"]]
    together = recorded.get("together", {"first": 0, "prompts": [""]})
    texts = [*prompts, *together["prompts"], *[recorded[name] for name in paths]]
    numbers = [together["first"], *([] if grid else [recorded["image"]])]
    if not prompts or not together["prompts"] or not all(isinstance(text, str) for text in texts):
        raise ValueError("prompts and paths must be text")
    if not all(type(number) is int for number in numbers):
        raise ValueError("picture numbers must be whole numbers")
    if isinstance(recorded.get("negative"), list):
        raise ValueError("negative prompts of this grid's pictures differ: make them again one by one")
    reading = recorded.get("reading", {})
    if not isinstance(reading, dict) or not set(reading) <= set(READING):
        raise ValueError(f"'reading' knows only {', '.join(READING)}")
    return prompts, None if grid else recorded["image"]


def options(recorded: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The command line's options that say what is recorded, of those that it has."""
    arguments = []
    known = {name: value for name, value in recorded.items() if name not in (*NOT_OPTIONS, *SIDE, *SOURCES)}
    for name, value in {**known, **recorded.get("reading", {})}.items():
        computed = name == "size" and recorded["command"] in SIZED_BY_THE_PICTURE
        if name not in defaults or value is None or computed:
            continue
        option = "-n" if name == "n" else "--" + name.replace("_", "-")
        if isinstance(defaults[name], bool):
            if value is not defaults[name]:
                arguments.append(option if value else "--no-" + option.removeprefix("--"))
        elif name in ("size", "hires") and isinstance(value, list):
            arguments.append(f"{option}={'x'.join(map(str, value))}")
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"{option}={each}" for each in values]
    return arguments


def parse(parser: Parser, arguments: list[str], recorded: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments with the files that are recorded in their places; prompts are those of `arguments`."""
    paths = {name: recorded[name] for name in POSITIONAL if name in recorded}
    parsed = parser.parse_intermixed_args([*paths, *arguments, "prompt"])  # the places hold any word
    for name, path in paths.items():
        setattr(parsed, name, path)
    parsed.prompts.pop()
    return parsed
