"""The shipped model with the shipped LoRA draws the same picture in diffusers with peft.

Their pipeline lacks two things that this model has, and gets them by a hook each: the UNet reads the context's
last token as a vector (`pooled_context`), and the tower repeats its end token (`repeat_end`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip import END_ID, TextConfig, TextEncoder
from ldm.weights import compvis, diffusers_config
from ldm.weights.diffusers import to_diffusers
from ldm.weights.lora import read_lora
from ldm.weights.lora_writing import write_lora
from ldm.weights.writing import write_tokenizer
from sample.adapters import shipped_adapter
from sample.pipeline import Pipeline

PROMPT, STEPS, GUIDANCE = "a sks alien, noto emoji", 10, 4.0


def give_pooled(unet: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> Any:
    return args, told | {"class_labels": told["encoder_hidden_states"][:, -1]}


def repeat_end(tower: nn.Module, args: tuple[Any, ...], told: dict[str, Any], output: Any) -> Any:
    ids = args[0] if args else told["input_ids"]
    ends = (ids == END_ID).int().argmax(dim=1)
    positions = torch.minimum(torch.arange(ids.shape[1]), ends[:, None])  # (B, T)
    output["last_hidden_state"] = output.last_hidden_state[torch.arange(len(ids))[:, None], positions]
    return output


def theirs(pipe: Pipeline, folder: Path) -> Any:
    """diffusers' pipeline with the weights of ours."""
    library, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config, stage, tower = pipe.unet.config, pipe.autoencoder.config, pipe.text_encoder
    assert isinstance(tower, TextEncoder)
    assert isinstance(stage, AutoencoderConfig)
    assert config.pooled_context and tower.config.repeat_end  # else the hooks are not needed
    config = replace(config, pooled_context=False, vector_dim=config.context_dim)
    unet = library.UNet2DConditionModel.from_config(diffusers_config.unet_json(config))
    unet.load_state_dict(to_diffusers(pipe.unet.state_dict(), config))
    vae = library.AutoencoderKL.from_config(diffusers_config.autoencoder_json(stage))
    vae.load_state_dict(to_diffusers(pipe.autoencoder.state_dict(), stage))
    text: TextConfig = replace(tower.config, repeat_end=False)
    their_text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**diffusers_config.text_json(text)))
    prefix = "text_model." if any(name.startswith("text_model.") for name in their_text.state_dict()) else ""
    state = {prefix + name: each for name, each in compvis.to_compvis(tower.state_dict(), text).items()}
    missing = their_text.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys)
    write_tokenizer(folder, text)
    made = library.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=their_text.eval(), unet=unet.eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        scheduler=library.DDIMScheduler.from_config(diffusers_config.scheduler_json(pipe.schedule.config)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.unet.register_forward_pre_hook(give_pooled, with_kwargs=True)
    made.text_encoder.register_forward_hook(repeat_end, with_kwargs=True)
    return made


@pytest.mark.slow
def test_diffusers_with_peft_draws_the_same_creature(tmp_path: Path) -> None:
    """To 1e-4 of a picture's range, with the LoRA and without, and the LoRA is much more than that."""
    ours, shape = Pipeline.load("emoji", device="cpu"), (4, 16, 16)
    other, lora = theirs(ours, tmp_path / "tokenizer"), shipped_adapter("lora", "creature")
    assert lora is not None
    how: dict[str, Any] = {"seed": 5, "steps": STEPS, "guidance": GUIDANCE}
    call: dict[str, Any] = {
        "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": 64, "width": 64,
        "latents": ours.draw("image", shape, 5, range(1)), "output_type": "latent",
    }  # fmt: skip
    stage = ours.autoencoder.config

    def painted() -> Tensor:
        with torch.no_grad():
            latents = other(PROMPT, **call).images
            return other.vae.decode(latents / stage.scale_factor + stage.shift_factor).sample.clamp(-1, 1)

    plain, plain_theirs = ours.txt2img(PROMPT, **how), painted()
    assert ours.text_encoder is not None
    configs = {"unet": ours.unet.config, "text": ours.text_encoder.config}
    file = write_lora(read_lora(lora), tmp_path / "lora.safetensors", configs, "diffusers", torch.float32)
    other.load_lora_weights(str(tmp_path), weight_name=file.name)
    ours.add_lora(lora)
    picture, theirs_too = ours.txt2img(PROMPT, **how), painted()
    errors = [float((a - b).abs().max()) / 2 for a, b in ((plain, plain_theirs), (picture, theirs_too))]
    print(f"without {errors[0]:.1e}, with the LoRA {errors[1]:.1e}")
    assert max(errors) < 1e-4
    assert float((picture - plain).abs().mean()) > 0.1
