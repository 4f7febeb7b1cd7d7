"""A ControlNet for another base: the closed form, number formats and file forms, and bases that do not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, single_file, tensors_of
from torch.testing import assert_close

from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.weights.controlnet import load_controlnet, transfer
from ldm.weights.folder import save_part
from ldm.weights.kinds import find_kind
from ldm.weights.reading import open_checkpoint
from ldm.weights.writing import convert
from sample.weights import main

KIND = "tiny_controlnet_sd15"
CONFIG = find_kind(KIND).config.control


def saved(folder: Path, name: str, module: Any, dtype: torch.dtype = torch.float32) -> Path:
    file = {"ControlNet": "controlnet", "UNet": "unet"}[type(module).__name__]
    more = {"diffusion": {}} if file == "unet" else {}
    save_part(folder / name / f"{file}.safetensors", module, dtype, **more)
    return folder / name


def random_unet(seed: int, **changed: Any) -> UNet:
    torch.manual_seed(seed)
    assert CONFIG is not None
    small = replace(CONFIG.unet, channel_mult=(1, 2), num_res_blocks=1)
    module = UNet(replace(small, **changed)).requires_grad_(False)
    for parameter in module.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return module


def test_transfer_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Closed form: the copied layers move by the bases' difference, what was added stays to the bit."""
    a, b = random_unet(1), random_unet(2)
    net = ControlNet.from_unet(a, hint_widths=CONFIG.hint_widths).requires_grad_(False)
    for parameter in net.parameters():
        parameter += 0.01 * torch.randn_like(parameter)
    control, first, second = saved(tmp_path, "c", net), saved(tmp_path, "a", a), saved(tmp_path, "b", b)
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert main(["transfer", str(control), there, "--from", str(first), "--to", str(second)]) == 0
    assert main(["transfer", there, back, "--from", str(second), "--to", str(first)]) == 0
    assert capsys.readouterr().out.splitlines() == [there, back]
    own, old, new = net.state_dict(), a.state_dict(), b.state_dict()
    moved, returned = load_controlnet(there).state_dict(), load_controlnet(back).state_dict()
    assert_close(returned, own, rtol=0, atol=1e-6)
    assert moved.keys() == own.keys()
    for name, tensor in moved.items():
        if name.startswith(("zero_convs.", "hint_encoder.")):
            assert torch.equal(tensor, own[name])
        else:
            assert_close(tensor, own[name] - old[name] + new[name], rtol=0, atol=1e-6)
            assert not torch.allclose(tensor, own[name], atol=1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fresh_controlnet_of_one_base_becomes_a_fresh_one_of_the_other(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Bit for bit, also onto an inpainting base, in the number format of the source."""
    a, b = random_unet(1), random_unet(2, in_channels=9)
    net = ControlNet.from_unet(a, hint_widths=CONFIG.hint_widths)
    control = open_checkpoint(saved(tmp_path, "c", net, dtype))
    bases = [open_checkpoint(saved(tmp_path, name, unet, dtype)) for name, unet in (("a", a), ("b", b))]
    found = transfer(control, *bases).require("control").tensors()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        expected = b.state_dict().get(name, net.state_dict()[name]).to(dtype)
        assert torch.equal(tensor, expected[:, :4] if name == "conv_in.weight" else expected), name


def test_our_file_alone_becomes_one_file(tmp_path: Path) -> None:
    a, b = (saved(tmp_path, str(seed), random_unet(seed)) for seed in (1, 2))
    net = ControlNet.from_unet(random_unet(1), hint_widths=CONFIG.hint_widths)
    file, new = saved(tmp_path, "c", net) / "controlnet.safetensors", tmp_path / "new.safetensors"
    assert (
        main(["transfer", str(file), str(new), "--from", str(a), "--to", str(b), "--dtype", "float16"]) == 0
    )
    assert new.is_file()
    assert {t.dtype for t in tensors_of(new).values()} == {torch.float16}
    assert load_controlnet(new).config == net.config


def test_transfer_of_the_originals_files(tmp_path: Path) -> None:
    """A full file holds the base too; only the ControlNet is written, in the same form."""
    full = single_file(KIND, torch.float16)
    other = save(tmp_path / "other.safetensors", single_file("tiny_sd15", torch.float16))
    file = save(tmp_path / "full.safetensors", full)
    arguments = ["transfer", str(file), str(tmp_path / "new.safetensors")]
    assert main([*arguments, "--from", str(file), "--to", str(other)]) == 0
    written = tensors_of(tmp_path / "new.safetensors")
    assert len(written) == 340
    for name, tensor in written.items():  # the two bases are equal
        assert_close(tensor, full[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context_dim": 32}, r"of [^ ]*/b: context_dim 64 .the UNet's 32.\n"),
        ({"num_heads": 4}, r"of [^ ]*/b: 8 heads .the UNet's 4."),
        ({"in_channels": 3}, r"of [^ ]*/b: conv_in.weight \[32, 4, 3, 3\] .the UNet's \[32, 3, 3, 3\]."),
        ({"linear_projection": True}, r"proj_in.weight \[32, 32, 1, 1\] .the UNet's \[32, 32\]."),
    ],
)
def test_bases_of_other_shapes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    a, b = random_unet(1), random_unet(2, **changed)
    control = saved(tmp_path, "c", ControlNet.from_unet(a, hint_widths=CONFIG.hint_widths))
    first, second = saved(tmp_path, "a", a), saved(tmp_path, "b", b)
    for bases in ((first, second), (second, first)):
        command = ["transfer", str(control), str(tmp_path / "new")]
        assert main([*command, "--from", str(bases[0]), "--to", str(bases[1])]) == 2
        lines = capsys.readouterr().err
        assert lines.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(lines)
        assert not (tmp_path / "new").exists()


def test_a_transfer_that_overflows_writes_nothing(tmp_path: Path) -> None:
    a, b = random_unet(1), random_unet(2)
    net = ControlNet.from_unet(a, hint_widths=CONFIG.hint_widths)
    with torch.no_grad():
        b.conv_in.bias += 7e4
    control = open_checkpoint(saved(tmp_path, "c", net, torch.float16))
    bases = [open_checkpoint(saved(tmp_path, name, unet)) for name, unet in (("a", a), ("b", b))]
    with pytest.raises(ValueError, match=r"conv_in.bias is not finite as torch.float16 on its new base"):
        convert(transfer(control, *bases), tmp_path / "new", "ldm")
    assert not (tmp_path / "new").exists()
