"""A ControlNet, a LoRA and a new word in one picture: each acts in every command, is recorded, and can be left out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import randomised
from PIL import Image
from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlled import Control
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.lora import LoRAConfig, add_lora
from ldm.weights.controlnet import load_controlnet
from ldm.weights.embeddings import Embedding, write_embeddings
from ldm.weights.folder import save_part
from ldm.weights.lora_writing import write_lora
from sample import txt2img
from sample.__main__ import main
from sample.hints import read_hint
from sample.images import read_parameters, to_pil
from sample.pipeline import Pipeline
from sample.settings import Wording

WORD = "<cat-toy>"
PROMPT = f"a photo of {WORD}"
COMMANDS: dict[str, list[str]] = {
    "txt2img": ["txt2img", PROMPT],
    "img2img": ["img2img", "init.png", PROMPT, "--strength", "0.9"],
    "inpaint": ["inpaint", "init.png", "mask.png", PROMPT],
    "outpaint": ["outpaint", "init.png", PROMPT, "--right", "8", "--bottom", "16"],
    "hires": ["txt2img", PROMPT, "--hires", "40x48", "--hires-strength", "0.5"],
}
OPTIONS = {
    "control": ["--control", "edges.safetensors:hint.png:0.8"],
    "lora": ["--lora", "style.safetensors:0.6"],
    "embedding": ["--embedding", "toy.safetensors"],
}
NOTHING = {  # of the same files
    "control": ["--control", "edges.safetensors:hint.png:0"],
    "lora": ["--lora", "style.safetensors:0"],
    "embedding": ["--embedding", "other.safetensors"],  # a word that the prompt does not say
}


def noise(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def controlnet(pipe: Pipeline) -> ControlNet:
    """With a strong opinion."""
    torch.manual_seed(0)
    return randomised(ControlNet(ControlNetConfig(pipe.unet.config, hint_widths=(4, 6, 8))))


def write_files(pipe: Pipeline, folder: Path, form: str = "ldm") -> None:
    """A LoRA of UNet and text tower, a word of two vectors, and one that nobody says."""
    assert pipe.text_encoder is not None
    torch.manual_seed(5)
    weights, configs = {}, {"unet": pipe.unet.config, "text": pipe.text_encoder.config}
    for part, module in (("unet", pipe.unet), ("text", pipe.text_encoder)):
        lora = add_lora(module, LoRAConfig(rank=2, targets=("transformer",)))
        for adapter in lora.adapters.values():
            nn.init.normal_(adapter.up.data, std=1.0)
        weights[part] = lora.weights
        lora.remove()
    write_lora(weights, folder / "style.safetensors", configs, form)
    for name, word, seed in (("toy", WORD, 1), ("other", "<another>", 2)):
        vectors = torch.randn(
            2, pipe.text_encoder.config.width, generator=torch.Generator().manual_seed(seed)
        )
        write_embeddings(folder / f"{name}.safetensors", [Embedding(word, vectors)])


@pytest.fixture(scope="module")
def own(model: Path) -> Pipeline:
    """The tiny model, ours to change."""
    return Pipeline.load(model, "cpu")


@pytest.fixture(scope="module")
def folder(own: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    write_files(own, folder)
    save_part(folder / "edges.safetensors", controlnet(own), torch.float32)
    for seed, name in enumerate(("hint", "init")):
        noise(folder / f"{name}.png", seed)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 28, 24))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture(autouse=True)
def working(folder: Path, own: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(txt2img, "load_pipeline", lambda args: own)


def made(out: Path, *arguments: str) -> np.ndarray:
    """The pictures of a command, in their order."""
    more = [] if arguments[0] == "again" else ["--steps", "2", "--seed", "3", "--guidance", "3"]
    assert main([*arguments, *more, "--out", str(out), *(["--device", "cpu"] if more else [])]) == 0
    return np.stack([np.array(Image.open(path)) for path in sorted(out.glob("0*.png"))])


@pytest.mark.parametrize("command", COMMANDS)
def test_each_acts_and_can_be_left_out(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a picture with the two others: without it another one, with nothing of it the one without it."""

    def run(name: str, **options: list[str]) -> np.ndarray:
        return made(
            tmp_path / name, *COMMANDS[command], *[text for each in options.values() for text in each]
        )

    whole, plain = run("whole", **OPTIONS), run("plain")
    assert np.array_equal(run("nothing", **NOTHING), plain)
    for each in OPTIONS:
        without = run(f"no {each}", **{**OPTIONS, each: NOTHING[each]})
        assert np.abs(whole.astype(int) - without).max() >= 2, each
        if command == "txt2img":
            assert np.array_equal(run(f"without {each}", **{**OPTIONS, each: []}), without), each
    if command == "inpaint":  # what lies outside of the mask is nobody's
        assert np.array_equal(whole[:, :8], plain[:, :8])
    told = read_parameters(tmp_path / "whole" / "00000.png")
    assert [told[name] for name in OPTIONS] == [[option[1]] for option in OPTIONS.values()]
    assert ([*told["lora_hashes"]], [*told["embedding_hashes"]]) == (["style"], [WORD])
    assert told["control_files"][0]["hint"] == "hint.png"
    capsys.readouterr()
    again = made(tmp_path / "again", "again", str(tmp_path / "whole" / "00000.png"))
    assert np.array_equal(again, whole)
    assert "differ" not in capsys.readouterr().err


def test_one_of_several_again_and_the_same_from_python(own: Pipeline, folder: Path, tmp_path: Path) -> None:
    """Two pictures in a batch, one repeated; scales in the prompts; the calls of a program."""
    prompts = [f"{PROMPT} <lora:style:0.6>", f"an apple beside {WORD}<lora:style:0.6>"]
    asked = [*OPTIONS["control"], *OPTIONS["embedding"], "--adapters", str(folder)]
    pictures = made(tmp_path / "a", "txt2img", *prompts, *asked)
    again = made(tmp_path / "b", "again", str(tmp_path / "a" / "00001.png"))
    assert np.array_equal(again[0], pictures[1])
    [tagged] = made(tmp_path / "c", "txt2img", prompts[0], *asked)
    [option] = made(tmp_path / "d", "txt2img", PROMPT, *[text for each in OPTIONS.values() for text in each])
    assert np.array_equal(tagged, option)

    for added in [*own.loras.values()]:  # of the command
        added.remove()
    own.remove_embedding(WORD)
    lora = own.add_lora("style.safetensors", 0.6)
    own.add_embedding("toy.safetensors")
    # From the file as the command does: where weights lie in memory decides how some sums are rounded.
    control = Control(load_controlnet("edges.safetensors"), read_hint(folder / "hint.png"), 0.8)
    how: dict[str, Any] = {"steps": 2, "seed": 3, "guidance": 3.0, "wording": Wording(syntax="webui")}
    [picture] = to_pil(own.txt2img(PROMPT, controls=[control], **how))
    lora.remove()
    own.remove_embedding(WORD)
    assert np.array_equal(np.asarray(picture), option)


def test_the_whole_picture_of_diffusers(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Their pipeline with peft reads our files: the same latents and the same picture, from equal noise."""
    library, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from ldm.weights import compvis, diffusers_config
    from ldm.weights.diffusers import to_diffusers
    from ldm.weights.writing import write_tokenizer

    pipe = build()
    config = replace(pipe.autoencoder.config, shift_factor=0.0)  # which their pipeline does not know
    autoencoder = AutoencoderKL(config).eval().requires_grad_(False)
    autoencoder.load_state_dict(pipe.autoencoder.state_dict())
    pipe.autoencoder, net = autoencoder, controlnet(pipe)
    write_files(pipe, tmp_path, "diffusers")
    assert pipe.text_encoder is not None
    write_tokenizer(tmp_path / "tokenizer", pipe.text_encoder.config)

    unet = library.UNet2DConditionModel.from_config(diffusers_config.unet_json(pipe.unet.config))
    unet.load_state_dict(to_diffusers(pipe.unet.state_dict(), pipe.unet.config))
    vae = library.AutoencoderKL.from_config(diffusers_config.autoencoder_json(config))
    vae.load_state_dict(to_diffusers(autoencoder.state_dict(), config))
    their_net = library.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 8))
    their_net.load_state_dict(to_diffusers(net.state_dict(), net.config))
    tower = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**diffusers_config.text_json(pipe.text_encoder.config))
    )
    prefix = "text_model." if any(name.startswith("text_model.") for name in tower.state_dict()) else ""
    state = compvis.to_compvis(pipe.text_encoder.state_dict(), pipe.text_encoder.config)
    missing = tower.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys)
    theirs = library.StableDiffusionControlNetPipeline(
        vae=vae.eval(), text_encoder=tower.eval(), unet=unet.eval(), controlnet=their_net.eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True),
        scheduler=library.DDIMScheduler.from_config(diffusers_config.scheduler_json(pipe.schedule.config)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(tmp_path), weight_name="style.safetensors")
    theirs.load_textual_inversion(str(tmp_path / "toy.safetensors"), token=WORD)
    hint = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {
        "image": hint, "num_inference_steps": 5, "guidance_scale": 4.0, "controlnet_conditioning_scale": 0.8,
        "latents": pipe.draw("image", (4, 8, 8), 5, range(1)), "negative_prompt": "an apple",
        "height": 32, "width": 32, "cross_attention_kwargs": {"scale": 0.6},
    }  # fmt: skip
    latents = theirs(PROMPT, output_type="latent", **call).images
    picture = theirs(PROMPT, output_type="pt", **call).images

    pipe.add_lora(tmp_path / "style.safetensors", 0.6)
    pipe.add_embedding(tmp_path / "toy.safetensors")
    how: dict[str, Any] = {"steps": 5, "seed": 5, "guidance": 4.0, "negative": "an apple"}
    controls = [Control(net, hint, 0.8)]
    *_, step = pipe.stream([PROMPT], controls=controls, **how)
    error = float((step.sample - latents).abs().max() / latents.abs().max())
    pixels = float((pipe.decode(step.sample) / 2 + 0.5 - picture).abs().max())
    print(f"latents {error:.1e}, pixels {pixels:.1e}")
    assert error < 1e-5
    assert pixels < 1e-5
    *_, plain = pipe.stream([PROMPT], **how)
    assert float((plain.sample - latents).abs().max()) > 0.05
