"""The tiny autoencoder: its formulas, diffusers on equal weights, the public files' forms, the trained TAEF2."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.models.tiny_autoencoder import Decoder, Encoder, TinyAutoencoder, TinyAutoencoderConfig, TinyBlock
from ldm.weights.tiny import (
    load_tiny_autoencoder,
    load_tiny_decoder,
    load_tiny_encoder,
    original_names,
    to_original,
    to_ours,
)

SMALL = TinyAutoencoderConfig(channels=8, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1))
TAEF2 = TinyAutoencoderConfig(latent_channels=32, bottleneck=256)


@torch.no_grad()
def random(module: nn.Module) -> nn.Module:
    """Weights that carry the signal through all layers, so that every one of them shows in the output."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.normal_(parameter, float("norm.weight" in name or "pool.1.weight" in name), 0.2)
    return module.eval().requires_grad_(False)


def images(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


def build(config: TinyAutoencoderConfig) -> TinyAutoencoder:
    network = random(TinyAutoencoder(config))
    assert isinstance(network, TinyAutoencoder)
    return network


# --- formulas -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ranges_and_the_clamp() -> None:
    """With identities for convolutions and no branch: z = (x + 1) / 2 and x = 2 relu(3 tanh(z / 3)) - 1."""
    config = TinyAutoencoderConfig(latent_channels=3, channels=3, encoder_blocks=(1,), decoder_blocks=(1,))
    network = TinyAutoencoder(config)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
            nn.init.dirac_(module.weight) if "conv_" in name else nn.init.zeros_(module.weight)
    assert network.factor == 1
    x = images(2, 3, 4, 5)
    assert_close(network.encode(x), (x + 1) / 2)
    z = 4 * torch.randn(2, 3, 4, 5)
    assert_close(network.decode(z), 2 * F.relu(3 * torch.tanh(z / 3)) - 1)


def test_a_block_with_a_bottleneck() -> None:
    """y = x + W2 relu(norm(W1 x)), then relu(y + conv3(relu(conv2(relu(conv1 y)))))."""
    block = random(TinyBlock(8, 16))
    w = block.state_dict()
    x = torch.randn(2, 8, 5, 6)
    inside = F.group_norm(
        F.conv2d(x, w["bottleneck.conv_in.weight"]), 4, w["bottleneck.norm.weight"], w["bottleneck.norm.bias"]
    )
    y = x + F.conv2d(F.relu(inside), w["bottleneck.conv_out.weight"])
    h = y
    for name in ("conv1", "conv2", "conv3"):
        h = F.conv2d(h if name == "conv1" else F.relu(h), w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
    assert_close(block(x), F.relu(y + h))
    assert not torch.allclose(F.relu(x + h), F.relu(y + h), atol=0.1)  # the shortcut is of y, too


def test_where_the_bottlenecks_are() -> None:
    names = {name.split(".bottleneck")[0] for name in build(TAEF2).state_dict() if "bottleneck" in name}
    places = ("encoder.down_blocks.3", "decoder.up_blocks.0")  # the level of the latents
    assert names == {f"{place}.resnets.{j}" for place in places for j in range(3)}


def test_halves_alone_are_the_whole() -> None:
    network, x, z = build(SMALL), images(2, 3, 16, 8), torch.randn(2, 4, 4, 2)
    assert network.factor == SMALL.factor == 4
    assert network.encode(x).shape == z.shape
    assert network.decode(z).shape == x.shape
    for half, given in (("encoder", x), ("decoder", z)):
        alone = (Encoder if half == "encoder" else Decoder)(SMALL)
        alone.load_state_dict(getattr(network, half).state_dict())
        assert torch.equal(alone(given), getattr(network, half)(given))
    assert_close(network(x), network.decode(network.encode(x)))


def test_errors() -> None:
    with pytest.raises(
        ValueError, match="image size 18x16 is not a multiple of the tiny autoencoder's factor 4"
    ):
        build(SMALL).encode(torch.zeros(1, 3, 16, 18))


@pytest.mark.parametrize(("values", "message"), [
    ({"encoder_blocks": (1, 3)}, r"as many levels as each other.* got \[1, 3\] and \[3, 3, 3, 1\]"),
    ({"encoder_blocks": (1, 0, 3, 3)}, r"at least 1 block each, got \[1, 0, 3, 3\]"),
    ({"encoder_blocks": (), "decoder_blocks": ()}, r"got \[\] and \[\]"),
    ({"latent_channels": 0}, "at least 1, got 3, 0 and 64"),
    ({"bottleneck": 6}, "0 or a multiple of 4, got 6"),
    ({"latent_magnitude": 0.0}, "latent_magnitude must be positive, got 0.0"),
])  # fmt: skip
def test_errors_of_a_configuration(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyAutoencoderConfig(**values)


# --- diffusers, on equal weights ----------------------------------------------------------------------------


def of_diffusers(config: TinyAutoencoderConfig) -> nn.Module:
    tiny = pytest.importorskip("diffusers").AutoencoderTiny
    widths = (config.channels,) * len(config.encoder_blocks)
    return random(
        tiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=config.encoder_blocks,
            num_decoder_blocks=config.decoder_blocks,
            latent_channels=config.latent_channels,
        )
    )


@pytest.mark.parametrize("config", [
    TinyAutoencoderConfig(),
    SMALL,
    TinyAutoencoderConfig(latent_channels=16, channels=24, encoder_blocks=(2, 1, 1, 3, 2), decoder_blocks=(1, 3, 2, 2, 1)),
], ids=["TAESD", "small", "other blocks"])  # fmt: skip
def test_parity_with_diffusers(config: TinyAutoencoderConfig, tmp_path: Path) -> None:
    """Through a file in their names, from which the configuration is inferred."""
    theirs = of_diffusers(config)
    save_file(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    ours = load_tiny_autoencoder(tmp_path / "diffusion_pytorch_model.safetensors").eval()
    assert ours.config == config
    x = images(2, 3, 4 * config.factor, 6 * config.factor)
    with torch.no_grad():
        latents = theirs.encode(x, return_dict=False)[0]
        z = latents / latents.std() * 2  # in both the bent and the straight part of the clamp
        pairs = [(ours.encode(x), latents), (ours.decode(z), theirs.decode(z, return_dict=False)[0])]
    for mine, other in pairs:
        assert other.std() > 0.1
        assert_close(mine / other.std(), other / other.std(), rtol=0, atol=1e-5)


def test_latents_as_a_picture() -> None:
    theirs, ours = of_diffusers(TinyAutoencoderConfig()), TinyAutoencoder(TinyAutoencoderConfig())
    z = 2 * torch.randn(1, 4, 8, 8)
    assert (z.abs() > 3).any()
    unit = ours.to_unit(z)
    assert_close(unit, theirs.scale_latents(z), rtol=0, atol=1e-6)
    assert_close(unit, (z / 6 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    assert_close(ours.from_unit(unit), theirs.unscale_latents(unit), rtol=0, atol=1e-6)
    assert_close(ours.from_unit(unit), z.clamp(-3, 3), rtol=0, atol=1e-5)


def test_their_names_shifted_by_the_clamp_are_the_original() -> None:
    shifted = {
        f"{half}.{int(index) + (half == 'decoder')}.{rest}"
        for half, _, index, rest in (
            name.split(".", maxsplit=3) for name in of_diffusers(TinyAutoencoderConfig()).state_dict()
        )
    }
    assert set(original_names(TinyAutoencoderConfig()).values()) == shifted


# --- files --------------------------------------------------------------------------------------------------


def halves(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What each file of the original holds."""
    return {
        half: {name.removeprefix(f"{half}."): t for name, t in tensors.items() if name.startswith(half)}
        for half in ("encoder", "decoder")
    }


def test_the_original_names() -> None:
    """Of TAEF2, as its files have them."""
    files = halves(to_original(build(TAEF2).state_dict(), TAEF2))
    single = {"encoder": (0, 2, 6, 10, 14), "decoder": (1, 7, 12, 17, 19)}
    blocks = {"encoder": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), "decoder": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)}
    pools = {"encoder": (11, 12, 13), "decoder": (3, 4, 5)}
    for half, tensors in files.items():
        ends = (single[half][0], single[half][-1])
        assert set(tensors) == {
            *(f"{i}.weight" for i in single[half]),
            *(f"{i}.bias" for i in ends),
            *(f"{i}.conv.{j}.{kind}" for i in blocks[half] for j in (0, 2, 4) for kind in ("weight", "bias")),
            *(
                f"{i}.pool.{name}"
                for i in pools[half]
                for name in ("0.weight", "1.weight", "1.bias", "3.weight")
            ),
        }
    assert files["decoder"]["3.pool.0.weight"].shape == (256, 64, 1, 1)
    assert files["encoder"]["14.weight"].shape == (32, 64, 3, 3)


@pytest.mark.parametrize("config", [SMALL, TAEF2], ids=["plain", "bottleneck"])
def test_round_trip_is_bit_equal(config: TinyAutoencoderConfig) -> None:
    state = build(config).state_dict()
    theirs = to_original(state, config)
    assert len(theirs) == len(state)
    back = to_ours(theirs, config)
    assert list(back) == list(state)
    assert all(back[name] is state[name] for name in state)
    with pytest.raises(ValueError, match="1 tensors are missing or unknown: encoder.conv_in.bias"):
        to_original({name: state[name] for name in state if name != "encoder.conv_in.bias"}, config)


@pytest.mark.parametrize(
    "config", [SMALL, TinyAutoencoderConfig(bottleneck=16, channels=8)], ids=["plain", "bottleneck"]
)
@pytest.mark.parametrize("form", ["safetensors", "pth", "prefixed"])
def test_files_of_the_original(config: TinyAutoencoderConfig, form: str, tmp_path: Path) -> None:
    network = build(config)
    theirs = to_original(network.state_dict(), config)
    files = {half: tmp_path / f"taesd_{half}.{form}" for half in ("encoder", "decoder")}
    for half, tensors in halves(theirs).items():
        if form == "prefixed":
            save_file({f"{half}.{name}": tensor for name, tensor in tensors.items()}, files[half])
        else:
            (torch.save if form == "pth" else save_file)(tensors, files[half])
    whole = load_tiny_autoencoder(*files.values())
    assert whole.config == config
    encoder, decoder = load_tiny_encoder(files["encoder"]), load_tiny_decoder(files["decoder"])
    # The blocks of the half that is not there are taken for the reverse
    assert encoder.config == replace(config, decoder_blocks=config.encoder_blocks[::-1])
    assert decoder.config == replace(config, encoder_blocks=config.decoder_blocks[::-1])
    save_file(theirs, tmp_path / "both.safetensors")
    alone = load_tiny_decoder(tmp_path / "both.safetensors")
    assert alone.config == decoder.config
    assert load_tiny_autoencoder(tmp_path / "both.safetensors").config == config
    for name, tensor in network.state_dict().items():
        half, _, rest = name.partition(".")
        assert torch.equal(whole.state_dict()[name], tensor)
        assert torch.equal((encoder if half == "encoder" else decoder).state_dict()[rest], tensor)
        assert half == "encoder" or torch.equal(alone.state_dict()[rest], tensor)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    tensors = halves(to_original(build(SMALL).half().state_dict(), SMALL))["decoder"]
    torch.save(tensors, tmp_path / "decoder.pth")
    weight = load_tiny_decoder(tmp_path / "decoder.pth").conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["1.weight"].float())


def decoder_file() -> dict[str, Tensor]:
    return halves(to_original(build(SMALL).state_dict(), SMALL))["decoder"]


@pytest.mark.parametrize(("changed", "message"), [
    (lambda d: {"conv_in.weight": torch.ones(2)}, "holds no tiny autoencoder of the TAESD family"),
    (lambda d: {"first_stage_model.decoder.conv_in.weight": torch.ones(2)}, "holds no tiny autoencoder"),
    (lambda d: {"3.conv.4.weight": torch.ones(2)}, "its decoder is no list of convolutions and blocks"),
    (lambda d: {**d, "1.weight": torch.ones(8)}, "its decoder is no list of convolutions and blocks"),
    (lambda d: {k: t for k, t in d.items() if k != "4.conv.0.bias"}, "1 missing: up_blocks.0.resnets.1.conv1.bias"),
    (lambda d: {**d, "3.conv.6.weight": torch.ones(2)}, "1 unexpected: 3.conv.6.weight"),
    (lambda d: {**d, "vae_scale": torch.ones(1)}, "1 unexpected: vae_scale"),
    (lambda d: {**d, "7.conv.0.weight": torch.ones(8, 8, 1, 1)}, "1 wrong shape"),
    (lambda d: {**d, "2.weight": torch.ones(8, 8, 3, 3)}, r"at least 1 block each, got \[1, 1, 2, 0\] and \[0, 2, 1, 1\]"),
    (lambda d: {**d, "decoder.1.weight": d["1.weight"] + 1}, "names the same tensor twice"),
    (lambda d: {**d, "1.bias": d["1.bias"] * torch.nan}, "NaN or infinite"),
])  # fmt: skip
def test_foreign_and_damaged_files(changed, message: str, tmp_path: Path) -> None:
    path = tmp_path / "taesd_decoder.safetensors"
    save_file(changed(decoder_file()), path)
    with pytest.raises(ValueError, match=message) as caught:
        load_tiny_decoder(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_the_wrong_half(tmp_path: Path) -> None:
    for half, tensors in halves(to_original(build(SMALL).state_dict(), SMALL)).items():
        save_file(tensors, tmp_path / half)
    other = TinyAutoencoderConfig(
        channels=8, latent_channels=5, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1)
    )
    save_file(halves(to_original(build(other).state_dict(), other))["decoder"], tmp_path / "other")
    with pytest.raises(
        ValueError, match="there is no decoder of a tiny autoencoder in it, only the other half"
    ):
        load_tiny_decoder(tmp_path / "encoder")
    with pytest.raises(ValueError, match="there is no encoder"):
        load_tiny_autoencoder(tmp_path / "decoder")
    with pytest.raises(ValueError, match="both files hold the same half"):
        load_tiny_autoencoder(tmp_path / "decoder", tmp_path / "other")
    with pytest.raises(ValueError, match="encoder and decoder are of different models"):
        load_tiny_autoencoder(tmp_path / "encoder", tmp_path / "other")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        load_tiny_decoder(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth is"):
        load_tiny_decoder(tmp_path / "text.pth")


class Runs:
    """A pickle that would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    torch.save({**decoder_file(), "x": Runs(tmp_path / "was run")}, tmp_path / "decoder.pth")
    with pytest.raises(ValueError, match=r"decoder\.pth") as caught:
        load_tiny_decoder(tmp_path / "decoder.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was run").exists()


# --- the trained TAEF2 --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "LDM_TAEF2" not in os.environ,
    reason="LDM_TAEF2 does not name the folder with taef2_encoder.pth, taef2_decoder.pth and taef2_golden.npz",
)
def test_taef2_gives_its_known_outputs() -> None:
    folder = Path(os.environ["LDM_TAEF2"])
    network = load_tiny_autoencoder(folder / "taef2_encoder.pth", folder / "taef2_decoder.pth").eval()
    assert network.config == TAEF2
    golden = {name: torch.from_numpy(value) for name, value in np.load(folder / "taef2_golden.npz").items()}
    with torch.no_grad():
        latent = network.encode(golden["image"] * 2 - 1)
        decoded = (network.decode(golden["latent"]) + 1) / 2
    differences = [
        float((latent - golden["latent"]).abs().max()),
        float((decoded - golden["decoded"]).abs().max()),
    ]
    print(f"TAEF2, largest absolute differences: latent {differences[0]:.2g}, decoded {differences[1]:.2g}")
    assert max(differences) < 1e-4
