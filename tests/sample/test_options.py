"""Every option of every command that makes pictures: recorded where it counts, and read back to the same value."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sample import again
from sample.cli import Parser
from sample.commands import MAKERS
from sample.images import web_ui_text
from sample.pipeline import Pipeline
from sample.recording import ELSEWHERE, POSITIONAL, READING, SIDE, SOURCES, common_parameters

# Another value than the default, as it is typed; a new option has to be entered here. A flag has none.
VALUES: dict[str, list[str]] = {
    # prompts
    "negative": ["-a, fish: red"], "prompts_file": ["p.txt"], "study": ["s.yaml"], "wildcards": ["dir"],
    "syntax": ["comfy"], "weighting": ["no_norm"], "clip_skip": ["2"], "long_prompts": ["cut"],
    # sampling
    "sampler": ["unipc"], "schedule": ["karras:6"], "eta": ["0.3"], "steps": ["7"],
    "sampler_option": ["order=3", "variant=bh1"],
    # guidance
    "guidance": ["-2.5"], "guidance_rule": ["projected"], "guidance_option": ["eta=0.5", "momentum=-0.5"],
    "guidance_rescale": ["0.7"], "guidance_interval": ["0.3:5"], "dynamic_threshold": ["0.99:3"],
    "pag": ["3:mid,up.1"], "autoguide": ["other é"], "image_guidance": ["1.7"],
    # control
    "control": ["m:h é.png:0.5", "n:i.png"], "control_range": ["0:0.5", "0.2:1"], "guess_mode": ["original"],
    # pictures
    "seed": ["36893488147419103232"], "first": ["4"], "variation_seed": ["-5"], "variation_strength": ["0.25"],
    "n": ["3"], "batch": ["2"], "size": ["40x24"], "hires": ["64x48"], "hires_strength": ["0.4"],
    "hires_mode": ["pixels"], "tile": ["16"], "out": ["elsewhere"], "depth": ["d é.png"],
    "strength": ["0.37"], "feather": ["3"], "resample": ["2"], "overlap": ["5"], "fill": ["noise"],
    "left": ["1"], "top": ["2"], "right": ["3"], "bottom": ["4"],
    # looking inside, speed
    "preview": ["linear"], "preview_every": ["2"], "frames": ["gif"], "fast_conv": ["0.5"],
    "deep_cache": ["2"], "token_merging": ["0.25"], "noise_level": ["100"],
    # adapters
    "adapters": ["my adapters"], "lora": ["a é.safetensors:0.8", "b.safetensors"], "embedding": ["é mb.pt=<x y>", "<b>.bin"],
    # model
    "model": ["möd el"], "kind": ["sd15"], "prediction": ["v"], "weights": ["raw"], "vocabulary": ["v.txt"],
    "device": ["cpu"], "dtype": ["bfloat16"],
}  # fmt: skip
FLAGS = (argparse._StoreTrueAction, argparse.BooleanOptionalAction)


def options(command: str) -> list[argparse.Action]:
    parser = Parser()
    MAKERS[command](parser)
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def every() -> Iterator[Any]:
    for command in MAKERS:
        for action in options(command):
            yield pytest.param(command, action, id=f"{command} {action.option_strings[0]}")


def typed(action: argparse.Action) -> list[str]:
    """The option with another value than its default, on the command line."""
    option = action.option_strings[0]
    if isinstance(action, FLAGS):
        return [action.option_strings[-1] if action.default else option]
    assert action.dest in VALUES, f"a new option: say in this test what {option} may be, and see it recorded"
    return [f"{option}={value}" for value in VALUES[action.dest]]


def parsed(command: str, line: list[str]) -> argparse.Namespace:
    parser = Parser()
    MAKERS[command](parser)
    places = [action.dest for action in parser._actions if action.dest in POSITIONAL]
    args = parser.parse_intermixed_args([*line, *(f"{place} é.png" for place in places), "a prompt"])
    args.command = command
    return args


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the arguments name, since the hashes of the files are recorded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d é.png").write_bytes(b"depth")
    for name in POSITIONAL:
        Path(f"{name} é.png").write_bytes(name.encode())


def recorded(args: argparse.Namespace, pipe: Pipeline) -> dict[str, Any]:
    """The text chunk of a picture, as `txt2img.py` puts it together."""
    size = args.size or (32, 32)
    own = {"command": args.command, "prompt": "a prompt", "negative": args.negative, "image": args.first}
    return {**own, **common_parameters(args, pipe, size)}


def read_back(told: dict[str, Any]) -> argparse.Namespace:
    """The arguments that `again` makes of a text chunk."""
    parser = Parser()
    MAKERS[told["command"]](parser)
    parser.set_defaults(command=told["command"])
    return again.parse(parser, again.options(told, vars(again.parse(parser, [], told))), told)


UNRECORDED = {*SIDE, *SOURCES, *ELSEWHERE, *READING}
RESTORED = {"negative", "size", "device", "dtype"}  # of ELSEWHERE: told under another rule, but told


@pytest.mark.parametrize(("command", "action"), every())
def test_recorded_and_read_back(command: str, action: argparse.Action, pipe: Pipeline) -> None:
    name, args = action.dest, parsed(command, typed(action))
    assert getattr(args, name) != action.default, "the table's value is the default"
    told = recorded(args, pipe)
    if name not in UNRECORDED:
        value = getattr(args, name)
        assert told[name] == (list(value) if isinstance(value, tuple) else value)
    elif name in READING:
        assert told["reading"] == {name: getattr(args, name)}
    elif name in (*SIDE, *SOURCES):
        assert name not in told
    else:
        assert name in RESTORED or name in ("n", "batch", "first")
    assert web_ui_text(told).startswith("a prompt\n")
    back = read_back(told)
    for other, value in vars(args).items():
        if other in ("prompts", *SIDE, *SOURCES, "n", "batch", "first"):
            continue
        if other == "size":
            computed = command in again.SIZED_BY_THE_PICTURE
            assert back.size == (None if computed else (args.size or (32, 32)))
        elif other == "device":
            assert back.device == "cpu"
        elif other == "dtype":
            assert back.dtype == "float32"  # that of the model at hand
        else:
            assert getattr(back, other) == value, other


@pytest.mark.parametrize("command", MAKERS)
def test_all_together(command: str, pipe: Pipeline) -> None:
    """What one option says is not lost on another; a second time nothing changes."""
    args = parsed(command, [text for action in options(command) for text in typed(action)])
    told = recorded(args, pipe)
    back = read_back(told)
    back.negative = args.negative
    for name in ("n", "batch", "first", *SOURCES, *SIDE):
        setattr(back, name, getattr(args, name))
    again_told = recorded(back, pipe)
    if command in again.SIZED_BY_THE_PICTURE:
        again_told["size"] = told["size"]
    assert again_told == told


def test_the_number_format_is_that_of_the_model(build: Any) -> None:
    pipe = build()
    pipe.unet.to(torch.bfloat16)
    assert read_back(recorded(parsed("txt2img", ["--dtype=bfloat16"]), pipe)).dtype == "bfloat16"


def test_the_table_is_of_options_that_exist() -> None:
    known = {action.dest for command in MAKERS for action in options(command)}
    assert set(VALUES) <= known
    assert {*SIDE, *SOURCES, *READING} <= known
