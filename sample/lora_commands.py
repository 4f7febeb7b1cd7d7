"""`ldm-weights lora ...`: look into files of LoRAs, convert, merge, combine, extract and resize them.

    inspect FILE...                          form, layers, ranks; of any tool
    convert SRC DST --to FORM                ldm, kohya, diffusers, peft or cloneofsimo
    merge MODEL DST FILE[:SCALE]...          into the weights of a checkpoint, for good
    combine DST FILE[:SCALE]...              sum (exact), svd (of --rank or --energy) or average (kohya's)
    extract BASE TUNED DST --rank N          what a fine-tuned checkpoint adds to its base
    resize SRC DST --rank N                  the nearest LoRA of a lower rank

The work is done in `ldm/weights/lora*.py` and `ldm/models/lora_combine.py`.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sample.cli import add_checkpoint_options

if TYPE_CHECKING:
    from ldm.weights.checkpoint import Checkpoint
    from ldm.weights.lora import LoRAFile
    from ldm.weights.names import Config

METHODS = ("sum", "svd", "average")
FORM_HELP = "ldm, kohya, diffusers, peft (a folder) or cloneofsimo (%(default)s)"


def add_commands(lora: argparse.ArgumentParser) -> None:
    """The commands below `ldm-weights lora`."""
    commands = lora.add_subparsers(dest="lora_command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=help, description=COMMANDS[name].__doc__
        )
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name not in ("merge", "extract"):
            added.add_argument(
                "--model", metavar="NAME|PATH", help="it is for (as the file says, else Stable Diffusion)"
            )
            added.add_argument("--partial", action="store_true", help="leave out layers that the model lacks")
        if name not in ("inspect", "merge"):
            added.add_argument("--to", default="ldm", metavar="FORM", help=FORM_HELP)
        if name != "inspect":
            added.add_argument("--dtype", help="float32, bfloat16 or float16 (that of the source)")
        if name in ("combine", "extract", "resize"):
            added.add_argument("--rank", type=int, metavar="N", help="at most, of each layer")
            added.add_argument(
                "--energy", type=float, metavar="SHARE", help="of each layer's change to keep, such as 0.99"
            )
        return added

    command("inspect", "say what it holds").add_argument("files", nargs="+", metavar="FILE")
    for name, help in (("convert", "write it in another form"), ("resize", "lower its rank")):
        added = command(name, help)
        added.add_argument("source", metavar="SRC", help="of any tool")
        added.add_argument("destination", metavar="DST", help="new file, or folder in peft's form")
    merge = command("merge", "add it to a checkpoint's weights")
    merge.add_argument("source", metavar="MODEL", help="checkpoint file or folder, or shipped name")
    merge.add_argument("destination", metavar="DST", help="file (compvis) or folder, which must not exist")
    merge.add_argument("files", nargs="+", metavar="FILE[:SCALE]", help="of any tool")
    merge.add_argument("--to", metavar="FORM", help="ldm, compvis or diffusers (that of MODEL)")
    add_checkpoint_options(merge)
    combine = command("combine", "make one of several")
    combine.add_argument("destination", metavar="DST", help="new file, or folder in peft's form")
    combine.add_argument("files", nargs="+", metavar="FILE[:SCALE]", help="of any tool")
    combine.add_argument("--method", default="sum", help=f"{', '.join(METHODS)} (%(default)s)")
    extract = command("extract", "the difference of two checkpoints")
    extract.add_argument("source", metavar="BASE", help="checkpoint that the other was trained from")
    extract.add_argument("tuned", metavar="TUNED", help="checkpoint file or folder")
    extract.add_argument("destination", metavar="DST", help="new file, or folder in peft's form")
    add_checkpoint_options(extract)


def inspect(args: argparse.Namespace) -> None:
    """Print form, layers, ranks, alphas and number formats of each file, and the words it holds besides."""
    for name in args.files:
        print(described(*_read(args, name)))


def convert(args: argparse.Namespace) -> None:
    """Write a LoRA in another form, bit for bit; only cloneofsimo's has no place for alpha."""
    file, configs = _read(args, args.source)
    _write(args, file, configs)


def merge(args: argparse.Namespace) -> None:
    """Add LoRAs to the weights of a checkpoint: W + scale alpha / rank (up @ down), computed in float32."""
    from ldm.weights.lora import read_lora
    from ldm.weights.lora_checkpoints import configs_of, merged
    from ldm.weights.writing import convert
    from sample.loras import located

    checkpoint = _open(args, args.source)
    configs = configs_of(checkpoint)
    loras = [(read_lora(path, configs), scale) for path, scale in map(located, args.files)]
    form = args.to or checkpoint.form
    print(convert(merged(checkpoint, loras), args.destination, form, _dtype(args), args.allow_nan))


def combine(args: argparse.Namespace) -> None:
    """Make one LoRA of several. sum: exactly their scaled sum, whose rank is the sum of ranks; svd: the
    nearest to that of --rank or --energy; average: as kohya's merge_lora.py averages factors, which is not
    their sum."""
    from ldm.diffusion.editing import require_choice
    from ldm.models.lora_combine import averaged, concatenated, reduced
    from sample.loras import located

    require_choice("--method", args.method, METHODS)
    if (args.method == "svd") != (args.rank is not None or args.energy is not None):
        raise ValueError("--rank and --energy go with --method svd, which needs one of them")
    read = [(*_read(args, str(path)), scale) for path, scale in map(located, args.files)]
    configs = {part: config for _, each, _ in read for part, config in each.items()}
    for file, each, _ in read:
        if any(configs[part] != config for part, config in each.items()):
            raise ValueError(f"{file.path} is for another model than {read[0][0].path}; say which by --model")
    parts: dict[str, Any] = {}
    for part in dict.fromkeys(part for file, _, _ in read for part in file.parts):
        weighted = [(file.parts[part], scale) for file, _, scale in read if part in file.parts]
        try:
            made = (averaged if args.method == "average" else concatenated)(weighted)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
        parts[part] = reduced(made, args.rank, args.energy) if args.method == "svd" else made
    _write(args, parts, configs)


def extract(args: argparse.Namespace) -> None:
    """Find the LoRA nearest to what TUNED adds to BASE, by the singular values of each layer of UNet and text
    tower; what is no linear layer or convolution is not in it."""
    from ldm.models.lora_combine import kept
    from ldm.weights.lora_checkpoints import configs_of, difference

    _check_kept(kept, args)
    base, tuned = _open(args, args.source), _open(args, args.tuned)
    _write(args, difference(base, tuned, args.rank, args.energy), configs_of(base))


def resize(args: argparse.Namespace) -> None:
    """Lower the rank of each layer, to the nearest change of --rank or with --energy of the squared singular
    values."""
    from ldm.models.lora_combine import kept, reduced

    _check_kept(kept, args)
    file, configs = _read(args, args.source)
    parts = {part: reduced(weights, args.rank, args.energy) for part, weights in file.parts.items()}
    _write(args, parts, configs)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": inspect,
    "convert": convert,
    "merge": merge,
    "combine": combine,
    "extract": extract,
    "resize": resize,
}


def run(args: argparse.Namespace) -> None:
    COMMANDS[args.lora_command](args)


def described(file: "LoRAFile", configs: "dict[str, Config]") -> str:
    """The lines of `inspect`."""
    from ldm.weights.checkpoint import TITLES
    from ldm.weights.lora_names import layers

    lines = [f"{file.path}", f"  form          {file.form}"]
    for part, weights in file.parts.items():
        each = list(weights.values())
        count = sum(factors.down.numel() + factors.up.numel() for factors in each)
        ranks, scales, formats = (
            ", ".join(str(value) for value in Counter(values))
            for values in (
                [factors.rank for factors in each],
                [f"{factors.scale:g}" for factors in each],
                [str(factors.down.dtype).removeprefix("torch.") for factors in each],
            )
        )
        lines.append(
            f"  {TITLES[part]:<14}{len(each)} of {len(layers(configs[part]))} layers, rank {ranks}, "
            f"alpha / rank {scales}, {count:,} parameters, {formats}"
        )
    lines += [f"  words         {', '.join(file.embeddings)}"] * bool(file.embeddings)
    return "\n".join([*lines, *(f"  {note}" for note in file.notes)])


def _read(args: argparse.Namespace, name: str) -> "tuple[LoRAFile, dict[str, Config]]":
    """A file, and the parts of the model it is for."""
    from ldm.weights.lora import base_of, read_lora, sources_of
    from ldm.weights.lora_checkpoints import configs_of
    from ldm.weights.reading import open_checkpoint
    from sample.model import find_model

    if args.model is not None:
        configs = configs_of(open_checkpoint(find_model(args.model)))
    else:
        configs = base_of(sources_of(name))
    return read_lora(name, configs, args.partial), configs


def _open(args: argparse.Namespace, name: str) -> "Checkpoint":
    from ldm.weights.reading import open_checkpoint
    from sample.model import find_model

    return open_checkpoint(find_model(name), kind=args.kind, prediction=args.prediction, weights=args.weights)


def _write(args: argparse.Namespace, lora: Any, configs: "dict[str, Config]") -> None:
    from ldm.weights.lora_writing import write_lora

    print(write_lora(lora, args.destination, configs, args.to, _dtype(args)))


def _dtype(args: argparse.Namespace) -> Any:
    from ldm.device import pick_dtype

    return None if args.dtype is None else pick_dtype(args.dtype)


def _check_kept(kept: Callable[..., int], args: argparse.Namespace) -> None:
    """Complain of --rank and --energy before anything is read."""
    import torch

    kept(torch.ones(1), args.rank, args.energy)
