"""`ldm-train TASK CONFIG [key=value ...]` (also `python -m train`): the command line of training.

Reads one YAML file and overrides into the task's dataclass, builds the task, hands it to the loop. Bad input ends in one line
and exit code 2; CTRL-C saves, says how to go on, and ends with 130 (SIGTERM with 143).
"""

import argparse
import sys

TASKS = ("autoencoder", "diffusion")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="ldm-train", description="Train the parts of a latent diffusion model.")
    commands = main.add_subparsers(dest="command", required=True, metavar="TASK")
    helps = {
        "autoencoder": "train a first stage (images to latents and back)",
        "diffusion": "train a latent diffusion model on a trained first stage",
    }
    for name in TASKS:
        task = commands.add_parser(name, help=helps[name], description=helps[name])
        task.add_argument("config", help="a YAML file, yours or a shipped one such as configs/train/emoji.yaml")
        task.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file, such as run.lr=1e-4")
        task.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in run.out")
        task.add_argument("--dry-run", action="store_true", help="build everything, print sizes, train nothing")
        task.add_argument("--debug", action="store_true", help="show the traceback of an error")
    prepare = commands.add_parser("prepare", help="build a training set", description="Build a training set.")
    prepare.add_argument("dataset", choices=["emoji"], help="emoji: OpenMoji, and with npm also Noto and Fluent 3D")
    prepare.add_argument("directory", help="new or empty folder")
    prepare.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default %(default)s)")
    prepare.add_argument("--seed", type=int, default=0, help="of the split into training and held-out pictures (default %(default)s)")
    prepare.add_argument(
        "--npm-package", action="append", default=None, metavar="STYLE=FILE", help="a package tarball already on disk (noto=..., fluent=...)"
    )
    prepare.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return main


def build_task(name: str, config: str, overrides: list[str]):
    """The task `name` from its YAML file and overrides."""
    from ldm.config import find_config, load_config

    path = find_config(config)
    if name == "autoencoder":
        from train.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig

        return AutoencoderTask(load_config(AutoencoderTaskConfig, path, overrides))
    from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

    return DiffusionTask(load_config(DiffusionTaskConfig, path, overrides))


def run_training(args: argparse.Namespace) -> int:
    from train.loop import Interrupted, command_line, train

    task = build_task(args.command, args.config, args.overrides)
    for name, player in task.players.items():
        print(f"{name}: {sum(p.numel() for p in player.parameters.values()):,} parameters to train")
    if args.dry_run:
        run = task.config.run
        print(f"would train {run.steps} steps of {run.batch} images into {run.out}; nothing was trained or written")
        return 0
    try:
        folder = train(task, args.resume, command_line(args.command, args.config, args.overrides))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    print(f"trained; the model is in {folder}")
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    from train.prepare import prepare_emoji

    packages = None
    if args.npm_package is not None:
        packages = dict(entry.partition("=")[::2] for entry in args.npm_package if entry != "none")
    print(prepare_emoji(args.directory, size=args.size, seed=args.seed, npm_packages=packages))
    return 0


def main(argv: list[str] | None = None) -> int:
    from sample.cli import run

    args = parser().parse_args(argv)
    return run("ldm-train", lambda: (run_prepare if args.command == "prepare" else run_training)(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
