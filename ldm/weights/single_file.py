"""A checkpoint in the original code's names: one file, .safetensors or .ckpt.

With or without averaged weights (EMA), schedule buffers or "state_dict" around it; also one part alone, such
as an autoencoder or a ControlNet. Called by `reading.py`; the names are those of `compvis.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ldm.config import from_dict
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig
from ldm.weights import compvis, diffusers
from ldm.weights.checkpoint import TITLES, Checkpoint, Part
from ldm.weights.kinds import Kind, ModelConfig, Translate, find_kind, fits, recognise
from ldm.weights.source import Source

DIFFUSERS_MARKS = ("down_blocks.", "encoder.down_blocks.")  # names of a part alone in diffusers' spelling
Names = dict[str, str]  # below the part's prefix -> in the file

UNSUPPORTED = {  # a name in the file that tells a model we do not have
    "conditioner.embedders.": "a Stable Diffusion XL checkpoint",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "lora_unet_": "a LoRA, not a model",
    "lora_te_": "a LoRA, not a model",
    "unet.down_blocks.": "a LoRA in diffusers' names, not a model",
    "difference": "a ControlNet stored as its difference to a base model",
    "lora_controlnet": "a Control-LoRA, not a ControlNet",
    "controlnet_blocks.": "a ControlNet of Stable Diffusion 3 or Flux",
    "add_embedding.": "a network of Stable Diffusion XL",
    "adapter.body.": "a T2I adapter, not a ControlNet",
}


def open_single_file(source: Source, kind: str | None, weights: str) -> Checkpoint:
    """What a single file holds; see `reading.open_checkpoint`."""
    path = source.path
    for start, what in UNSUPPORTED.items():
        if any(name.startswith(start) for name in source.entries):
            raise ValueError(f"{path} is {what}, which is not supported (the name {start}... tells it)")
    parts = single_file_parts(source)
    if not parts:
        some = ", ".join(list(source.entries)[:3])
        raise ValueError(f"{path} holds no part of a latent diffusion model; its tensors are {some}, ...")
    in_diffusers_names = any(name.startswith(DIFFUSERS_MARKS) for names in parts.values() for name in names)
    to_ours = diffusers.to_ours if in_diffusers_names else compvis.to_ours
    kinds = _kinds(parts, source, kind, to_ours)
    config = kinds[0].config
    averaged = averaged_unet(parts.get("unet", {}), source)
    if weights == "ema" and not averaged:
        raise ValueError(f"{path} holds one set of weights, no averaged ones beside it")
    used = ""
    notes: tuple[str, ...] = ()
    if averaged:
        used = weights if weights != "auto" else "ema" if config.use_ema else "raw"
        parts |= {"unet": averaged} if used == "ema" else {}
        notes = (f"holds raw and averaged (ema) weights; the {used} ones are used, see --weights",)
    absent: dict[str, Any] = {part: None for part in config.parts if part not in parts}
    diffusion = _diffusion([each.config for each in kinds], source) if "unet" in parts else None
    autoencoder = _scaled(config.autoencoder, source) if "autoencoder" in parts else None
    config = replace(config, **{**absent, "diffusion": diffusion, "autoencoder": autoencoder})
    taken = {full for names in parts.values() for full in names.values()}
    return Checkpoint(
        path,
        "diffusers" if to_ours is diffusers.to_ours else "compvis",
        " or ".join(each.name for each in kinds),
        config,
        {name: Part(config.parts[name], source, names, to_ours) for name, names in parts.items()},
        used,
        {full: source for full in source.entries if full not in taken},
        notes,
    )


def _kinds(parts: Mapping[str, Names], source: Source, name: str | None, to_ours: Translate) -> list[Kind]:
    """What the parts can be: as its header says (`writing.py`), as the user says, or by shapes."""
    path = str(source.path)
    found = {
        part: {name: source.entries[full].shape for name, full in names.items()}
        for part, names in parts.items()
    }
    if name is None and isinstance(source.metadata.get("model"), dict):
        return [Kind("own", from_dict(ModelConfig, source.metadata["model"], path))]
    if name is None:
        return recognise(found, path, to_ours)
    kind = find_kind(name)
    for part, shapes in found.items():
        config = kind.config.parts.get(part)
        wrong = (
            fits(shapes, config, to_ours) if config is not None else [f"{kind.name} has no {TITLES[part]}"]
        )
        if wrong:
            raise ValueError(
                f"{path} is not {kind.name}: {'; '.join(wrong[:5])}{_likely(found, path, to_ours)}"
            )
    return [kind]


def _likely(found: Mapping[str, Any], path: str, to_ours: Translate) -> str:
    try:
        names = [kind.name for kind in recognise(found, path, to_ours)]
        return "; its shapes are those of " + " or ".join(names)
    except ValueError:
        return ""


def single_file_parts(source: Source) -> dict[str, Names]:
    """The parts of a single file, each as {name below its prefix: name in the file}."""
    names = list(source.entries)
    parts: dict[str, Names] = {}

    def below(prefix: str) -> Names:
        return {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}

    for part, prefix in (
        ("unet", compvis.UNET_PREFIX),
        ("autoencoder", compvis.AUTOENCODER_PREFIX),
        ("control", compvis.CONTROL_PREFIX),
    ):
        parts[part] = below(prefix)
    conditioner = below(compvis.CONDITIONER_PREFIX)
    if "encoder.conv_in.weight" in conditioner:  # the first stage again: it encodes LDM's masked pictures
        conditioner = {}
    if "transformer.token_emb.weight" in conditioner:
        parts["bert"] = conditioner
    elif set(conditioner) == {"embedding.weight"}:
        parts["classes"] = conditioner
    else:
        parts["text"] = {
            name.removeprefix("transformer.").removeprefix("text_model.").removeprefix("model."): full
            for name, full in conditioner.items()
        }
    if not any(parts.values()):  # one part alone, without its prefix
        bare = {name: name for name in names}
        if any(name.startswith(("input_hint_block.", "controlnet_cond_embedding.")) for name in names):
            parts["control"] = bare
        elif any(name.startswith(("input_blocks.", "down_blocks.")) for name in names):
            parts["unet"] = bare
        elif {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(names):
            parts["autoencoder"] = bare
    return {
        part: kept
        for part, below in parts.items()
        if (
            kept := {
                name: full
                for name, full in below.items()
                if not name.endswith("position_ids") and not name.startswith(UNREAD.get(part, ()))
            }
        )
    }


UNREAD = {  # tensors of a part that its network does not read
    "autoencoder": ("loss.",),
    "text": ("text_projection", "logit_scale"),
    "bert": ("transformer.to_logits.",),
}


def averaged_unet(raw: Names, source: Source) -> Names:
    """The UNet's names -> those of its averaged weights, dots removed; empty unless all are there."""
    averaged = {name: "model_ema.diffusion_model" + name.replace(".", "") for name in raw}
    return averaged if all(full in source.entries for full in averaged.values()) else {}


def _scaled(config: AutoencoderConfig | None, source: Source) -> AutoencoderConfig | None:
    """With the latent scale that some files hold, measured in training."""
    if config is None or "scale_factor" not in source.entries:
        return config
    return replace(config, scale_factor=float(next(source.read(["scale_factor"]))[1]))


def _diffusion(kinds: list[ModelConfig], source: Source) -> DiffusionConfig | None:
    """From the file's header, from a YAML file beside it, or from its kind; None where that is ambiguous."""
    base = kinds[0].diffusion
    if base is None:
        return None
    if isinstance(source.metadata.get("diffusion"), dict):
        return from_dict(DiffusionConfig, source.metadata["diffusion"], str(source.path))
    for told in (source.metadata.get("modelspec.prediction_type"), _sidecar(source.path)):
        if told is None:
            continue
        known = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "x0": "x0"}
        if told not in known:
            raise ValueError(
                f"{source.path}: prediction {told!r} is not known, expected one of {', '.join(known)}"
            )
        return replace(base, prediction=known[told])
    return base if len({kind.diffusion for kind in kinds}) == 1 else None


def _sidecar(path: Path) -> str | None:
    """`parameterization` of the original's configuration beside a checkpoint, which is only data here."""
    file = path.with_suffix(".yaml")
    if not file.is_file():
        return None
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    for key in ("model", "params"):
        data = data.get(key) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected the original's form, with model: params: in it")
    return str(data.get("parameterization", "eps"))
