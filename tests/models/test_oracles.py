"""Equal weights, equal outputs: our models against diffusers, transformers and open_clip at tiny random weights."""

import pytest
import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.tokenizer import END_ID, START_ID
from ldm.models.unet import UNet, UNetConfig
from ldm.weights import compvis, diffusers
from ldm.weights.io import load_strict

RELATIVE = 1e-5
BASE = {"model_channels": 16, "channel_mult": (1, 2, 3), "norm_groups": 8, "attention_resolutions": (1, 2)}
LEVELS = {
    "block_out_channels": (16, 32, 48),
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 2,  # diffusers' name for the number of heads
}
ADM = {"attention": "adm", "context_dim": None, "head_channels": 8}
SELF = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 8,
    "attn_norm_num_groups": 8,
}


def close(actual: Tensor, expected: Tensor) -> None:
    """Within RELATIVE of the largest value, and in norm."""
    assert actual.shape == expected.shape
    difference = actual - expected
    assert float(difference.norm() / expected.norm()) < RELATIVE
    assert float(difference.abs().max() / expected.abs().max()) < RELATIVE


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """Random values in every parameter, of a size that keeps activations near one; evaluation mode."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return module.eval().requires_grad_(False)


def ours_of(config: UNetConfig | AutoencoderConfig, theirs: nn.Module) -> nn.Module:
    model = UNet(config) if isinstance(config, UNetConfig) else AutoencoderKL(config)
    load_strict(model, diffusers.to_ours(theirs.state_dict(), config), "diffusers")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"num_heads": 2}, {}),
        (
            {"head_channels": 8, "linear_projection": True},
            {"attention_head_dim": (2, 4, 6), "use_linear_projection": True},
        ),
        ({"num_heads": 2, "transformer_depth": 2}, {"transformer_layers_per_block": 2}),
        ({"num_heads": 2, "num_classes": 10}, {"num_class_embeds": 10}),
        ({"num_heads": 2, "cross_only": (2,)}, {"only_cross_attention": (False, True, False)}),
        (
            {"num_heads": 2, "vector_dim": 5},
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
        ),
    ],
    ids=["Stable Diffusion 1", "Stable Diffusion 2", "two deep", "classes", "cross only", "vector"],
)
def test_unet_with_context(config: dict, options: dict) -> None:
    library = pytest.importorskip("diffusers")
    theirs = randomised(library.UNet2DConditionModel(**{**LEVELS, **CROSS, **options}))
    ours = ours_of(UNetConfig(**BASE, context_dim=24, **config), theirs)
    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3, 977]), torch.randn(2, 7, 24)
    y = None
    if "num_classes" in config:
        y = torch.tensor([0, 9])
    elif "vector_dim" in config:
        y = torch.randn(2, 5)
    close(ours(x, t, context, y), theirs(x, t, context, class_labels=y).sample)


@pytest.mark.parametrize("order", ["heads_first", "qkv_first"])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"scale_shift_norm": True}, {"resnet_time_scale_shift": "scale_shift"}),
        ({"resblock_updown": True}, {"downsample_type": "resnet", "upsample_type": "resnet"}),
        ({"num_classes": 10}, {"num_class_embeds": 10}),
    ],
    ids=["plain", "scale and shift", "resampling inside", "classes"],
)
def test_unet_without_context(config: dict, options: dict, order: str) -> None:
    """The fused projection is laid out in either order from diffusers' separate ones; the function is the same."""
    library = pytest.importorskip("diffusers")
    if "resblock_updown" in config:  # diffusers resamples inside a block only where the level has attention
        options = options | {
            "down_block_types": ("AttnDownBlock2D",) * 3,
            "up_block_types": ("AttnUpBlock2D",) * 3,
        }
        config = config | {"attention_resolutions": (1, 2, 4)}
    theirs = randomised(library.UNet2DModel(**{**LEVELS, **SELF, **options}))
    ours = ours_of(UNetConfig(**{**BASE, **ADM, **config}, qkv_order=order), theirs)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([3, 977])
    y = torch.tensor([0, 9]) if "num_classes" in config else None
    close(ours(x, t, y=y), theirs(x, t, class_labels=y).sample)


@pytest.mark.parametrize("attention", [False, True])
def test_autoencoder(attention: bool) -> None:
    library = pytest.importorskip("diffusers")
    kind = "Attn" if attention else ""
    theirs = randomised(
        library.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", f"{kind}DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", f"{kind}UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        )
    )
    config = AutoencoderConfig(
        base_channels=16,
        channel_mult=(1, 2, 2),
        norm_groups=8,
        attention_levels=(1,) if attention else (),
    )
    ours = ours_of(config, theirs)
    images, z, noise = torch.rand(2, 3, 24, 16) * 2 - 1, torch.randn(2, 4, 6, 4), torch.randn(2, 4, 6, 4)
    posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
    close(posterior.mean, expected.mean)
    close(posterior.logvar, expected.logvar)
    close(posterior.kl(), expected.kl())
    close(posterior.sample(noise), expected.mean + expected.std * noise)
    close(ours.decode(z), theirs.decode(z).sample)


IDS = torch.tensor(
    [[START_ID, *range(320, 330), END_ID, *[END_ID] * 4], [START_ID, *range(900, 914), END_ID]],
    dtype=torch.int64,
)
TEXT = {"width": 32, "layers": 3, "heads": 4, "mlp_width": 128, "context_length": 16}


def test_text_encoder_of_transformers() -> None:
    library = pytest.importorskip("transformers")
    theirs = randomised(
        library.CLIPTextModel(
            library.CLIPTextConfig(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=16,
                hidden_act="quick_gelu",
            )
        )
    )
    output = theirs(IDS, output_hidden_states=True)
    last, penultimate = TextEncoder(TextConfig(**TEXT)), TextEncoder(TextConfig(**TEXT, skip_layers=1))
    for encoder in (last, penultimate):
        load_strict(
            encoder.requires_grad_(False),
            compvis.to_ours(theirs.state_dict(), encoder.config),
            "transformers",
        )
    close(last(IDS), output.last_hidden_state)
    close(penultimate.hidden(IDS, skip_layers=1), output.hidden_states[-2])
    close(penultimate(IDS), last.final_norm(output.hidden_states[-2]))


def test_text_encoder_of_openclip() -> None:
    pytest.importorskip("open_clip")
    from open_clip.transformer import TextTransformer

    theirs = randomised(
        TextTransformer(context_length=16, width=32, heads=4, layers=3, output_dim=8, output_tokens=True)
    )
    for skip in (0, 1):
        encoder = TextEncoder(TextConfig(**TEXT, activation="gelu", skip_layers=skip)).requires_grad_(False)
        if skip == 0:
            weights = compvis.to_ours(theirs.state_dict(), encoder.config)
        else:  # the penultimate layer, then the final norm: what is left without the last block
            theirs.transformer.resblocks = theirs.transformer.resblocks[:-1]
        load_strict(encoder, weights, "open_clip")
        close(encoder(IDS), theirs(IDS)[1])
