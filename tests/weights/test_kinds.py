"""Every kind of `configs/model`: names and shapes of the original's checkpoints, and recognised by them alone."""

import pytest
import torch
from checkpoints import empty_single_file, prefix_of
from formula import manifest

from ldm.weights.kinds import ModelConfig, find_kind, kind_names, recognise
from ldm.weights.names import build_empty, shapes

# Tensors and parameters of the original's models, instantiated from its own code
COUNTS = {
    ("sd15", "unet"): (686, 859_520_964),
    ("sd15", "autoencoder"): (248, 83_653_863),
    ("sd15", "text"): (196, 123_060_480),
    ("sd15_inpainting", "unet"): (686, 859_535_364),
    ("sd21", "unet"): (686, 865_910_724),
    ("sd2_inpainting", "unet"): (686, 865_925_124),
    ("sd2_depth", "unet"): (686, 865_913_604),
    ("controlnet_sd15", "control"): (340, 361_279_120),
    ("controlnet_sd21", "control"): (340, 364_228_240),
    ("ldm_faces", "unet"): (368, 274_056_163),
    ("ldm_churches", "unet"): (520, 294_966_916),
    ("ldm_imagenet", "unet"): (626, 394_984_196),
    ("ldm_imagenet", "autoencoder"): (299, 67_717_295),
    ("ldm_imagenet_v2", "unet"): (688, 400_920_579),
    ("ldm_text256", "unet"): (688, 403_623_939),
    ("ldm_text", "unet"): (686, 872_300_484),
    ("vq_f4", "autoencoder"): (205, 55_322_782),
    ("vq_f8", "autoencoder"): (299, 67_717_295),
}
# Kinds whose weights have equal names and shapes
TWINS = {
    "sd21": ["sd21", "sd21_base"],
    "sd21_base": ["sd21", "sd21_base"],
    "tiny_sd21": ["tiny_sd21", "tiny_sd21_base"],
    "tiny_sd21_base": ["tiny_sd21", "tiny_sd21_base"],
}


def found(config: ModelConfig) -> dict[str, dict[str, torch.Size]]:
    """What `recognise` is given for a checkpoint of `config`."""
    tensors = empty_single_file(config)
    return {
        part: {
            name.removeprefix(prefix): tensor.shape
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        for part, prefix in ((part, prefix_of(part, each)) for part, each in config.parts.items())
    }


@pytest.mark.parametrize(("kind", "part"), COUNTS)
def test_tensors_and_parameters_are_the_originals(kind: str, part: str) -> None:
    expected = shapes(find_kind(kind).config.parts[part])
    assert (len(expected), sum(shape.numel() for shape in expected.values())) == COUNTS[kind, part]


@pytest.mark.parametrize("kind", kind_names())
def test_a_kind_is_recognised_by_its_shapes(kind: str) -> None:
    config = find_kind(kind).config
    assert [each.name for each in recognise(found(config), "the file")] == TWINS.get(kind, [kind])


@pytest.mark.parametrize(
    ("name", "part", "kinds"),
    [
        ("sd15-unet", "unet", ["sd15"]),
        ("sd15-inpainting-unet", "unet", ["sd15_inpainting"]),
        ("sd21-unet", "unet", ["sd21", "sd21_base"]),
        ("controlnet-sd15", "control", ["controlnet_sd15"]),
    ],
)
def test_real_manifests_are_recognised(name: str, part: str, kinds: list[str]) -> None:
    prefix = prefix_of(part, None)
    names = {key.removeprefix(prefix): torch.Size(shape) for key, shape in manifest(name).items()}
    assert [kind.name for kind in recognise({part: names}, "the file")] == kinds


def test_empty_modules_hold_no_memory_and_all_names() -> None:
    config = find_kind("tiny_sd15").config
    for part in config.parts.values():
        module = build_empty(part)
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert {name: tensor.shape for name, tensor in module.state_dict().items()} == dict(shapes(part))


def test_what_does_not_fit_is_named_with_the_likeliest_kind() -> None:
    """FAULTS row 5: missing and unexpected tensors, both listed."""
    parts = found(find_kind("tiny_sd15").config)
    parts["unet"]["input_blocks.1.1.extra.weight"] = torch.Size((3,))
    del parts["autoencoder"]["encoder.conv_in.bias"]
    with pytest.raises(ValueError, match="the file: most like tiny_sd15, but does not fit it") as error:
        recognise(parts, "the file")
    assert "encoder.conv_in.bias is missing" in str(error.value)
    assert "input_blocks.1.1.extra.weight is unexpected" in str(error.value)


def test_an_unknown_architecture_is_told_by_its_first_layers() -> None:
    shapes = {"input_blocks.0.0.weight": torch.Size((7, 4, 3, 3))}
    with pytest.raises(
        ValueError, match=r"unknown form .unet input_blocks.0.0.weight \[7, 4, 3, 3\].*--kind"
    ):
        recognise({"unet": shapes}, "the file")


def test_an_unknown_kind_lists_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="kind 'sd1.5' is not known; near: .*sd15"):
        find_kind("sd1.5")
