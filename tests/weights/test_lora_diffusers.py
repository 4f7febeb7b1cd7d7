"""The same LoRA file in diffusers with peft and here: the same outputs of a UNet and a text tower, in both ways."""

from pathlib import Path

import pytest
import torch
from networks import randomised
from torch import Tensor, nn

from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.lora import LoRA, LoRAConfig, add_lora, attach
from ldm.models.unet import UNet, UNetConfig
from ldm.weights import compvis, diffusers, diffusers_config
from ldm.weights.lora import LoRAFile, read_lora
from ldm.weights.lora_writing import write_lora
from ldm.weights.names import Config

pytest.importorskip("peft")

UNET = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), context_dim=16,
    num_heads=2,
)  # fmt: skip
TEXT = TextConfig(width=16, layers=2, heads=2, mlp_width=32)
CONFIGS: dict[str, Config] = {"unet": UNET, "text": TEXT}
TARGETS = {
    "attention": ("attention",),
    "transformer": ("transformer",),
    "locon": ("transformer", "convolutions"),
}


def trained(module: nn.Module, targets: tuple[str, ...]) -> LoRA:
    lora = add_lora(module, LoRAConfig(rank=3, alpha=6.0, targets=targets))
    with torch.no_grad():
        for adapter in lora.adapters.values():
            nn.init.normal_(adapter.up, std=0.1)
    return lora


@pytest.fixture(scope="module")
def ours() -> tuple[UNet, TextEncoder]:
    torch.manual_seed(1)
    return randomised(UNet(UNET)), randomised(TextEncoder(TEXT))


def theirs(unet: UNet, text: TextEncoder):  # type: ignore[no-untyped-def]
    """A pipeline of diffusers with the same weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    json = {k: v for k, v in diffusers_config.unet_json(UNET).items() if not k.startswith("_")}
    their_unet = UNet2DConditionModel(**json).eval()
    their_unet.load_state_dict(diffusers.to_diffusers(unet.state_dict(), UNET))
    their_text = CLIPTextModel(CLIPTextConfig(**diffusers_config.text_json(TEXT))).eval()
    names = their_text.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    state = {prefix + name: tensor for name, tensor in compvis.to_compvis(text.state_dict(), TEXT).items()}
    missing = their_text.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys)
    return StableDiffusionPipeline(
        vae=None, text_encoder=their_text, tokenizer=None, unet=their_unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def outputs(unet: nn.Module, text: nn.Module) -> tuple[Tensor, Tensor]:
    """Of our modules or of theirs, as they are."""
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        h = text(ids)
        h = getattr(h, "last_hidden_state", h)
        x = torch.linspace(-2, 2, 2 * 4 * 16 * 16).view(2, 4, 16, 16)
        y = unet(x, torch.tensor([3, 700]), torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16))
    return h, getattr(y, "sample", y)


def close(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5 * float(y.abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "targets"), [("diffusers", "attention"), ("diffusers", "locon"), ("kohya", "locon")]
)
def test_diffusers_reads_our_files(
    form: str, targets: str, ours: tuple[UNet, TextEncoder], tmp_path: Path
) -> None:
    unet, text = ours
    before = outputs(unet, text)
    loras = {"unet": trained(unet, TARGETS[targets]), "text": trained(text, ("transformer",))}
    try:
        expected = outputs(unet, text)
    finally:
        weights = {part: lora.weights for part, lora in loras.items()}
        for lora in loras.values():
            lora.remove()
    if (form, targets) == ("kohya", "locon"):
        weights["unet"] = {k: v for k, v in weights["unet"].items() if not k.endswith("time_proj")}
        again = [attach(unet, weights["unet"]), attach(text, weights["text"])]
        expected = outputs(unet, text)
        for lora in again:
            lora.remove()
    file = write_lora(weights, tmp_path / "pytorch_lora_weights.safetensors", CONFIGS, form)
    pipe = theirs(unet, text)
    close(outputs(pipe.unet, pipe.text_encoder), before)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    close(outputs(pipe.unet, pipe.text_encoder), expected)
    assert (expected[1] - before[1]).abs().max() > 0.05 * before[1].abs().max()


def test_we_read_what_diffusers_saves(ours: tuple[UNet, TextEncoder], tmp_path: Path) -> None:
    """Trained there: `save_lora_weights` with and without the adapter's metadata, and peft's own folder."""
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    unet, text = ours
    pipe = theirs(unet, text)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.unet.add_adapter(config)
    towers = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    pipe.text_encoder.add_adapter(towers)
    for module in (pipe.unet, pipe.text_encoder):
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    expected = outputs(pipe.unet, pipe.text_encoder)
    states = [
        convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(module))
        for module in (pipe.unet, pipe.text_encoder)
    ]
    metadata = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    StableDiffusionPipeline.save_lora_weights(str(tmp_path), *states, **metadata)
    read = read_lora(tmp_path / "pytorch_lora_weights.safetensors", CONFIGS)
    check(ours, read, expected)


def test_we_read_pefts_own_folder(ours: tuple[UNet, TextEncoder], tmp_path: Path) -> None:
    import peft

    unet, text = ours
    pipe = theirs(unet, text)
    for name, module, targets in (
        ("unet", pipe.unet, ["to_q", "to_v", "ff.net.2", "conv1"]),
        ("text_encoder", pipe.text_encoder, ["q_proj", "fc1"]),
    ):
        wrapped = peft.get_peft_model(module, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        for parameter in (p for n, p in wrapped.named_parameters() if "lora_B" in n):
            nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(tmp_path / name)
    check(ours, read_lora(tmp_path, CONFIGS), outputs(pipe.unet, pipe.text_encoder))


def check(ours: tuple[UNet, TextEncoder], file: LoRAFile, expected: tuple[Tensor, Tensor]) -> None:
    attached = [attach(ours[0], file.parts["unet"]), attach(ours[1], file.parts["text"])]
    try:
        close(outputs(*ours), expected)
    finally:
        for lora in attached:
            lora.remove()
