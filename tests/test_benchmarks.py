"""The benchmarks run end to end on tiny models, measure in turns, and refuse what is wrong in one line."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

AutoencoderTiny = pytest.importorskip("diffusers").AutoencoderTiny
sys.path.insert(0, str(Path(__file__).parent.parent))  # where the package `benchmarks` is

from benchmarks import (  # noqa: E402
    autoencoder,
    common,
    controlnet,
    convolutions,
    loading,
    lora,
    options,
    sampling,
    training,
    unet,
)
from ldm.weights.tiny import load_tiny_autoencoder  # noqa: E402

MACHINE = {"cpu", "cores", "threads", "memory_gib", "load", "matmul_gflops", "python", "torch", "diffusers"}
SIDES = {
    "ours_seconds",
    "diffusers_seconds",
    "times_as_fast",
    "difference",
    "ours_rounds",
    "diffusers_rounds",
}


def quick(
    module: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> list[dict[str, Any]]:
    """The rows of `--quick`, after a look at the file and at what was printed."""
    out = folder / "result.json"
    assert module.main(["--quick", "--out", str(out), *more]) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"benchmark", "machine", "settings", "rows"}
    assert set(result["machine"]) >= MACHINE
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("| --- |")
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(result["rows"])
    assert lines[-1] == str(out)
    return result["rows"]


def test_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call, guided, training = rows = quick(unet, tmp_path, capsys)
    assert [row["kind"] for row in rows] == ["call", "guided call", "training step"]
    for row in rows:
        assert set(row) >= SIDES | {"size", "precision", "layout", "batch"}
        assert row["ours_seconds"] > 0
        assert row["diffusers_seconds"] > 0
        assert row["ours_first"] > 0
    assert call["difference"] < 1e-4  # float32, outputs of order 1
    assert guided["difference"] < 1e-4
    assert training["difference"] < 0.05  # of gradients, in bfloat16
    for side in ("ours", "diffusers"):
        assert 0 <= call[f"{side}_mib"] < call[f"{side}_peak_mib"]
        assert call[f"{side}_peak_mib"] > 100  # torch alone takes more


def test_gradients_that_differ_are_told_apart() -> None:
    case = unet.Case("training step", "tiny", "float32", "contiguous")
    ours, theirs = unet.pair(case)
    with torch.no_grad():
        ours.mid_block.attention.blocks[0].attn2.to_k.weight *= 1.5
    for module in (ours, theirs):
        unet.step(module, case)()
    assert unet.gradient_difference(ours, theirs) > 1e-3


def test_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cold, warm = quick(sampling, tmp_path, capsys)
    assert cold["ours_seconds"] > warm["ours_seconds"]
    assert cold["bar_seconds"] == 30
    assert set(warm) >= SIDES
    assert warm["difference"] < 1e-3
    for side in ("ours", "diffusers"):
        assert 0 < warm[f"{side}_outside"] < 1
        assert all(warm[f"{side}_{part}_seconds"] > 0 for part in sampling.NETWORKS)


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["what"]: row for row in quick(options, tmp_path, capsys)}
    assert list(rows) == ["diffusers", "none", "--fast-conv 1", "--deep-cache 3", "--dtype bfloat16"]
    assert rows["none"]["error"] == 0
    assert rows["diffusers"]["error"] < 1e-4  # the same, by other hands
    assert rows["--fast-conv 1"]["error"] < 1e-4
    assert 1e-3 < rows["--dtype bfloat16"]["error"] < 0.2
    assert rows["--deep-cache 3"]["error"] > 1e-3
    assert options.main(["--quick", "--only", "fats", "--out", str(tmp_path / "x")]) == 2


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["what"]: row for row in quick(training, tmp_path, capsys)}
    assert list(rows) == [training.END_TO_END, training.STEP, training.OURS, training.LOADER]
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(4 / row["rounds"][0])
        assert row["times_step_only"] == rows[training.STEP]["rounds"][0] / row["rounds"][0]
        assert row["difference"] < 1e-4  # of the networks, in float32
    ours, loader = rows[training.OURS], rows[training.LOADER]
    assert ours["mib"] > 20 * ours["parameters"] / 2**20  # weights, gradients, optimiser and average
    assert loader["times_the_step"] > 5
    with torch.device("meta"):
        assert training.count(unet.UNet(training.SIZES["sd15"].unet)) == 859_520_964
        assert 13e6 < training.count(unet.UNet(training.SIZES["13m"].unet)) < 14e6


def test_training_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BYTES", 2**20)
    with pytest.raises(
        ValueError, match=r"training 897,\d+,\d+ parameters needs \d+ GiB, of which \d+ are free"
    ):
        training.require_memory("sd15", training.SIZES["sd15"])
    training.require_memory("13m", training.SIZES["13m"])


@pytest.mark.slow
def test_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = quick(loading, tmp_path, capsys, "--stored", "float32", "--dtype", "float16")
    assert [row["form"] for row in rows] == ["single file", "folder"]
    for row in rows:
        assert row["weights_mib"] == pytest.approx(17_224_875 * 2 / 2**20)
        assert all(row[f"{side}_mib"] > row["weights_mib"] / 2 for side in ("ours", "diffusers"))
        assert all(row[f"{side}_seconds"] > 0 for side in ("ours", "diffusers"))


def test_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = quick(autoencoder, tmp_path, capsys)
    assert row["pictures"] == 8
    assert row["latent_numbers"] == 4 * 8 * 8
    assert 0 < row["psnr_db"] < 30  # untrained
    assert row["bar_db"] == 30
    assert row["encoding_seconds"] > 0
    assert row["decoding_seconds"] > 0


def test_controlnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = quick(controlnet, tmp_path, capsys)
    assert (ours["what"], theirs["what"]) == ("ours", "diffusers")
    assert ours["bar"] == 1.5
    for row in (ours, theirs):
        assert row["difference"] < 1e-4
        assert row["overhead"] == row["controlled_rounds"][0] / row["plain_rounds"][0] > 1
    assert 0 < ours["hint_seconds"] < ours["plain_seconds"]
    assert controlnet.config_of("sd15") == controlnet.ControlNetConfig()


@pytest.mark.slow
def test_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    ours, theirs = quick(lora, tmp_path, capsys)
    assert (ours["what"], theirs["what"]) == lora.SIDES
    for row in (ours, theirs):
        assert row["difference"] < 1e-5  # of gradients, in float32
        assert row["mib"] > 0
        assert row["rounds"][0] > 0
    assert ours["of_theirs"] == ours["mib"] / theirs["mib"]
    assert ours["estimated_of_theirs"] < 0.95  # of so small a model; Stable Diffusion's: test_frozen.py
    assert ours["bar"] == 0.9
    with pytest.raises(ValueError, match=r"a step needs some \d+ MiB, of which \d+ are free"):
        lora.require_memory(2.0**40)


def test_gradients_of_a_lora_that_differ_are_told_apart() -> None:
    pytest.importorskip("peft")
    unet, adapters, other = lora.pair(lora.config_of("tiny"))
    with torch.no_grad():
        next(iter(adapters.adapters.values())).up *= 1.5
    assert lora.difference(unet, adapters, other) > 1e-3
    assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)


def test_convolutions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = quick(convolutions, tmp_path, capsys)
    assert sorted(row["upsample"] for row in rows) == [False, True]
    for row in rows:
        assert 0 < row["direct_error"] < 1e-6
        assert 0 < row["winograd_error"] < 5e-6
        assert all(row[f"{form}_rounds"][0] > 0 for form in ("direct", "winograd"))
        assert row["times_as_fast"] == row["direct_rounds"][0] / row["winograd_rounds"][0]


def test_convolutions_of_the_networks() -> None:
    unet, decoder = convolutions.unet_shapes(), convolutions.decoder_shapes()
    assert unet[convolutions.ConvShape(320, 320, 2, 64, 64)] == 7
    assert sum(unet.values()) == 49  # two a residual block, three upsamplers, first and last
    assert sum(decoder.values()) == 33
    assert decoder[convolutions.ConvShape(256, 256, 1, 512, 512, folded=True)] == 1


def test_known_outputs_prove_the_loading_of_taef2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random network of TAEF2's shape stands in for it: measured with its outputs, refused with others."""
    parts = taef2_like()
    files = [tmp_path / f"taef2_{name}.pth" for name in parts]
    for file, weights in zip(files, parts.values(), strict=True):
        torch.save(weights, file)
    network = load_tiny_autoencoder(*files).requires_grad_(False)
    image = torch.rand(1, 3, 16, 16)
    latent = network.encode(image * 2 - 1)
    decoded = (network.decode(latent) + 1) / 2
    golden = {"image": image, "latent": latent, "decoded": decoded}
    np.savez(tmp_path / "taef2_golden.npz", **{name: value.numpy() for name, value in golden.items()})
    ours, other = quick(autoencoder, tmp_path, capsys, "--taef2", str(tmp_path))
    assert (ours["latent_numbers"], other["latent_numbers"]) == (4 * 8 * 8, 32 * 4 * 4)

    parts["encoder"]["12.pool.3.weight"] *= 2  # in what AutoencoderTiny alone does not have
    torch.save(parts["encoder"], tmp_path / "taef2_encoder.pth")
    assert autoencoder.main(["--quick", "--taef2", str(tmp_path)]) == 2
    assert "latent differs by" in capsys.readouterr().err


def taef2_like() -> dict[str, dict[str, Tensor]]:
    """State dicts in the original's names, in half precision: pools on the latents' side of each half."""
    states = AutoencoderTiny(latent_channels=32).state_dict()
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in states.items():
        part, _, index, rest = name.split(".", maxsplit=3)
        parts[part][f"{int(index) + (part == 'decoder')}.{rest}"] = tensor.half()
    for part, blocks in (("encoder", (11, 12, 13)), ("decoder", (3, 4, 5))):
        for i in blocks:
            shapes = {
                "0.weight": (256, 64, 1, 1),
                "1.weight": (256,),
                "1.bias": (256,),
                "3.weight": (64, 256, 1, 1),
            }
            parts[part] |= {
                f"{i}.pool.{name}": 0.1 * torch.randn(shape).half() for name, shape in shapes.items()
            }
    return parts


def test_sides_take_turns_after_the_warm_up() -> None:
    calls: list[str] = []
    timed = common.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(timing.seconds) for timing in timed.values()] == [3, 3]


def test_ratio_is_taken_round_by_round() -> None:
    slow, fast = common.Timing([2.0, 40.0, 30.0]), common.Timing([1.0, 10.0, 1.0])
    assert common.ratio(slow, fast) == 4.0  # of 2, 4 and 30; that of the medians would be 30
    assert str(slow) == "30 (2 to 40)"


def test_the_clock_sums_what_modules_of_a_name_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(ticks)))
    one, two, other = nn.Identity(), nn.Identity(), nn.Identity()
    clock = common.Clock([("unet", one), ("unet", two), ("text", other)])
    for module in (one, two, one):
        module(torch.zeros(1))
    assert clock.seconds == {"unet": 3.0, "text": 0.0}
    clock.reset()
    other(torch.zeros(1))
    assert clock.seconds == {"unet": 0.0, "text": 1.0}


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_memory_is_the_peak_of_the_calls() -> None:
    garbage: list[Any] = [torch.ones(32 * 2**20)]  # 128 MiB, which only the collector finds
    garbage.append(garbage)
    del garbage

    def build() -> Any:
        kept = torch.ones(16 * 2**20)  # 64 MiB
        return lambda: (kept + 1).sum()  # and as much again

    found = common.memory_of(build)
    assert 120 < found["peak"] - found["before"] < 200


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (unet, ["--rounds", "0"], "--rounds must be at least 1"),
        (unet, ["--threads", "0"], "--threads must be at least 1"),
        (sampling, ["--model", "no such model"], "no such model"),
        (sampling, ["--cold", "-1"], "--cold must be at least 0"),
        (autoencoder, [], "--data is needed"),
        (autoencoder, ["--quick", "--taef2", "no such folder"], "taef2_encoder.pth does not exist"),
    ],
)
def test_bad_input_is_one_line(
    module: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "result.json"
    assert module.main([*arguments, "--out", str(out)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("benchmarks.")
    assert message in told[0]
    assert not out.exists()


def test_a_failure_in_a_fresh_process_is_told() -> None:
    with pytest.raises(ValueError, match="memory in a process of its own: .*Case"):
        common.in_fresh_process("benchmarks.unet", "memory", side="ours", case=["call"], threads=1)
    with pytest.raises(
        ValueError, match="abort in a process of its own was ended by SIGABRT: too little memory"
    ):
        common.in_fresh_process("os", "abort")
