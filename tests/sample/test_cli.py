"""The command line: one line an error, quick help, few frames between the command and the network."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import ldm
from ldm.diffusion.samplers import SAMPLERS
from ldm.models.unet import UNet
from sample import cli
from sample.__main__ import COMMANDS, main

ROOT = Path(ldm.__file__).parent.parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run python from another folder, as a user of the installed package would."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=os.environ["HOME"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick(command: str) -> None:
    before = os.times()
    done = python("-m", "sample", *command.split(), "--help")
    after = os.times()  # processor time, so that a busy machine makes no test fail
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    assert spent < 1.5
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: ldm-sample" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, sample.__main__ as m; m.parser(); print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"


def test_help_names_the_samplers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["txt2img", "--help"])
    assert ", ".join(sorted(SAMPLERS)) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: COMMAND; see ldm-sample --help"),
    (["txt2mg"], "invalid choice: 'txt2mg'"),
    (["txt2img"], "required: PROMPT; see ldm-sample txt2img --help"),
    (["txt2img", "a", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["txt2img", "a", "--size", "64"], "argument --size: '64' is not a size like 64x64"),
    (["txt2img", "a", "--size", "-1x64"], "--size"),
    (["txt2img", "a \udcff"], "argument PROMPT: 'a \\udcff' is not UTF-8 text"),
    (["txt2img", "a", "--stpes", "3"], "unrecognized arguments: --stpes 3"),
])  # fmt: skip
def test_a_wrong_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert (caught.value.code, len(lines)) == (2, 1)
    assert lines[0].startswith("ldm-sample: error: ")
    assert message in lines[0]


def test_sizes() -> None:
    assert cli.size("640x8") == cli.size("640X8") == (640, 8)


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(("error", "status", "line"), [
    (ValueError("two\nlines"), 2, "ldm-x: error: two lines"),
    (FileNotFoundError("no such thing"), 2, "ldm-x: error: no such thing"),
    (FileNotFoundError(2, "No such file", "a b.png"), 2, "ldm-x: error: a b.png: No such file"),
    (OSError(28, "No space left on device"), 2, "ldm-x: error: No space left on device"),
    (ModuleNotFoundError("pip install x"), 2, "ldm-x: error: pip install x"),
    (ValueError(), 2, "ldm-x: error: ValueError"),
    (MemoryError(), 2, "ldm-x: error: not enough memory; try smaller pictures or fewer at once"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "ldm-x: error: not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "ldm-x: error: not enough memory"),
    (KeyboardInterrupt(), 130, "ldm-x: interrupted"),
])  # fmt: skip
def test_what_a_user_can_cause_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("ldm-x", lambda: raising(error)) == status
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1
    assert cli.run("ldm-x", lambda: raising(error), debug=True) == status
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert line in told.splitlines()[-1]


@pytest.mark.parametrize(
    "error", [AssertionError("a fault"), RuntimeError("shape"), KeyError("x"), SystemExit(3)]
)
def test_faults_of_the_program_are_not_hidden(error: BaseException) -> None:
    with pytest.raises(type(error)):
        cli.run("ldm-x", lambda: raising(error))


def test_run_returns_the_status_of_main() -> None:
    assert cli.run("ldm-x", lambda: 7) == 7


def test_a_closed_pipe_is_silent() -> None:
    code = "from sample import cli; cli.run('x', lambda: [print('y' * 99) for _ in range(9999)] and 0)"
    shell = f'"{sys.executable}" -c "{code}" | head -n 1'
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, check=False, stdin=subprocess.DEVNULL
    )
    assert (done.stdout, done.stderr) == ("y" * 99 + "\n", "")


def test_six_frames_from_the_command_to_the_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: list[str] = []

    def stop(*args: object, **kwargs: object) -> None:
        for frame in traceback.extract_stack():
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("ldm", "sample", "train"):
                ours.append(f"{path.stem}.{frame.name}")
        raise ValueError("seen")

    monkeypatch.setattr(UNet, "forward", stop)
    assert main(["txt2img", "a", "--model", str(model), "--out", str(tmp_path), "--device", "cpu"]) == 2
    walk = "__main__.main txt2img.run stream.trajectory samplers.ddim guidance.guided denoiser.__call__"
    assert ours == walk.split()
