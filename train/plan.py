"""What a run would take, before it is begun (`--dry-run`), and what to lower where it took too much."""

import dataclasses
import math
from collections.abc import Iterable

from torch import Tensor, nn

from train.distributed import parts_of
from train.loop import RunConfig, Task
from train.rehearsal import activations


def plan(task: Task) -> str:
    """What training `task` would take and write: parameters, memory, steps, files; touches nothing.

    The memory is that of weights, gradients, optimiser and moving average, and the most that a pass through
    the networks needs (`rehearsal.py`). It is a little too much where each step has one pass, as gradients
    then come while activations go; Python, libraries and pictures, a few hundred megabytes, come on top.
    """
    run: RunConfig = task.config.run
    players = task.players
    trained = {name: bytes_of(player.parameters.values()) for name, player in players.items()}
    weights = sum(bytes_of(player.module.state_dict().values()) for player in players.values())
    averages = sum(trained[name] for name, player in players.items() if player.averaged)
    gradients = sum(trained.values())
    state = weights + 2 * gradients + averages
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimiser": 2 * gradients,
        "moving average": averages,
        "frozen networks": frozen_bytes(task),
    }
    at_once = run.batch // parts_of(run.accumulate)
    passes, more = activations(task, at_once), f"; activations of {at_once} images on top"
    if passes is not None:
        parts[f"activations of {at_once} images"], more = passes, "; Python, libraries and pictures on top"
    lines = [
        f"{name}: {sum(p.numel() for p in player.parameters.values()):,} parameters to train"
        for name, player in players.items()
    ]
    told = " + ".join(f"{name} {megabytes(size)}" for name, size in parts.items())
    previews = times(run.steps, run.preview_every)
    states = times(run.steps, run.checkpoint_every)
    return "\n".join(
        [
            *lines,
            f"memory: {megabytes(sum(parts.values()))} = {told}{more}",
            f"would train {run.steps} steps of {run.batch} images ({run.steps * run.batch:,} images seen) "
            f"into {run.out}:",
            "  config.yaml, log.jsonl" + (", tensorboard/" if run.tensorboard else ""),
            f"  states/    {states} times {megabytes(state)}, the newest {run.keep} kept "
            f"(room for {megabytes((run.keep + 1) * state)})",
            f"  previews/  {previews} times",
            "  model/     the trained model",
            "nothing is written by a dry run",
        ]
    )


def memory_advice(task: Task) -> str:
    """What to change where memory ran out in training."""
    run: RunConfig = task.config.run
    advice = (
        f"not enough memory in training: lower run.batch (now {run.batch}), or keep it and raise "
        f"run.accumulate (now {run.accumulate}: {run.batch // parts_of(run.accumulate)} images at once)"
    )
    if not run.activation_checkpointing:
        advice += ", or set run.activation_checkpointing=true"
    if run.precision == "float32":
        advice += ", or run.precision=bfloat16 (now float32)"
    names = {"unet": "unet.model_channels", "autoencoder": "autoencoder.base_channels"}
    sizes = [key for part, key in names.items() if dataclasses.is_dataclass(getattr(task.config, part, None))]
    return advice + (f", or build a smaller model ({', '.join([*sizes, 'data.size'])})" if sizes else "")


def frozen_bytes(task: Task) -> int:
    """Of the networks that a task only uses: its first stage, say."""
    modules = [value for value in vars(task).values() if isinstance(value, nn.Module)]
    ours = {id(p) for player in task.players.values() for p in player.module.parameters()}
    others = {id(p): p for module in modules for p in module.parameters() if id(p) not in ours}
    return bytes_of(others.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def times(steps: int, every: int) -> int:
    """How often something happens that is due every so many steps (0: never) and after the last."""
    return math.ceil(steps / every) if every else 1
