"""Training with a given text tower and from given weights: cached features, their key, and what never moves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured import put, write_rows, write_small_stage
from networks import randomised
from PIL import Image
from weights.checkpoints import save, single_file

from ldm.config import load_config
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.io import load_weights
from ldm.weights.reading import open_checkpoint
from sample.__main__ import main as sample
from sample.pipeline import Pipeline
from train.__main__ import main as train
from train.conditioning import FrozenText, TowerConfig, features, load_tower
from train.data import batch_indices
from train.tasks.diffusion import DiffusionTask, DiffusionTaskConfig

TINY = "configs/train/tiny.yaml"
TEXT = TextConfig(width=32, layers=2, heads=2, mlp_width=64)
RUN = [
    "run.device=cpu",
    "run.steps=2",
    "run.batch=4",
    "run.warmup=0",
    "run.checkpoint_every=1",
    "run.validate_every=0",
    "run.preview_every=0",
    "preview.steps=1",
    "data.size=16",
    "unet.model_channels=16",
    "unet.norm_groups=4",
]
CAPTIONS = ["", "a red dot", "a much longer caption of more than eight tokens, of two blue dots"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures, a first stage and a text tower, both of random weights."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    rows = []
    for number in range(8):
        pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "heldout_image" if number > 5 else "train"
        rows.append({"file_name": f"{number}.png", "text": CAPTIONS[number % 3], "split": split})
    write_rows(folder, rows)
    write_small_stage(folder)
    put(folder / "text_encoder.safetensors", tower())
    return folder


def tower(seed: int = 0, config: TextConfig = TEXT) -> TextEncoder:
    torch.manual_seed(seed)
    return randomised(TextEncoder(config))


def options(folder: Path, out: Path, *more: str) -> list[str]:
    made = [f"data.path={folder}", f"autoencoder={folder / 'autoencoder.safetensors'}", f"run.out={out}"]
    return ["diffusion", TINY, *made, *RUN, *more]


def with_tower(folder: Path, out: Path, *more: str) -> list[str]:
    return options(folder, out, "text=null", f"tower.checkpoint={folder / 'text_encoder.safetensors'}", *more)


def task_of(command: list[str]) -> DiffusionTask:
    return DiffusionTask(load_config(DiffusionTaskConfig, TINY, command[2:]))


def state(out: Path, step: int = 2) -> dict[str, torch.Tensor]:
    return load_weights(out / "states" / f"step-{step:08d}.safetensors")[0]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- cached features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat_end", [False, True])
def test_cached_features_are_the_towers_output(tmp_path, repeat_end):
    """Bit for bit that of each caption by itself, and to rounding that of a batch; again from the file."""
    model = tower(config=TextConfig(**{**vars(TEXT), "repeat_end": repeat_end}))
    text, ids = FrozenText(model, CAPTIONS * 2, tmp_path), Tokenizer()(CAPTIONS)
    numbers = text([CAPTIONS[2], CAPTIONS[1], "", CAPTIONS[1]])
    assert numbers.tolist() == [2, 1, 0, 1]
    made = text.context(numbers)
    alone = torch.cat([model(ids[n : n + 1]) for n in numbers])
    assert torch.equal(made, alone) and made.dtype == torch.float32
    torch.testing.assert_close(made, model(ids[numbers]), atol=1e-5, rtol=1e-5)
    [file] = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert torch.equal(FrozenText(model, CAPTIONS, tmp_path).context(numbers), made)
    assert torch.equal(FrozenText(model, CAPTIONS, None).context(numbers), made)
    assert file.stat().st_mtime_ns == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(model, ids[1:2])[0], made[1])  # whatever the run's precision


def test_the_table_is_mapped_and_reading_it_changes_no_file(tmp_path):
    text = FrozenText(tower(), CAPTIONS, tmp_path)
    [row] = text.table[:1]
    [file] = tmp_path.iterdir()
    assert isinstance(np.load(file, mmap_mode="r"), np.memmap)
    row += 1
    text.table[:] = 0  # of this process's memory alone
    assert np.load(file).any()


def test_the_key_is_of_what_made_them(tmp_path):
    model = tower()
    key = FrozenText(model, CAPTIONS, tmp_path).key
    assert FrozenText(tower(), CAPTIONS, None).key == key
    assert FrozenText(model, [*CAPTIONS, "one more"], None).key != key
    assert FrozenText(model, CAPTIONS[::-1], None).key != key
    assert FrozenText(tower(seed=1), CAPTIONS, None).key != key
    for change in ({"skip_layers": 1}, {"padding": "zero"}, {"context_length": 76}, {"activation": "gelu"}):
        assert FrozenText(tower(config=TextConfig(**{**vars(TEXT), **change})), CAPTIONS, None).key != key
    one = tower()
    one.blocks[1].fc2.bias.data[3] += 1e-6
    assert FrozenText(one, CAPTIONS, None).key != key


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "misshapen"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    text = FrozenText(tower(), CAPTIONS, tmp_path)
    whole = text.table.clone()
    [file] = tmp_path.iterdir()
    if damage == "misshapen":
        np.save(file, np.zeros((3, 77, 31), dtype=np.float32))
    else:
        data = {"cut": file.read_bytes()[:-4], "empty": b"", "foreign": b"PK\x03\x04 something"}[damage]
        file.write_bytes(data)
    assert torch.equal(FrozenText(tower(), CAPTIONS, tmp_path).table, whole)
    assert list(tmp_path.iterdir()) == [file]


# --- the run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "run"
    assert train(with_tower(folder, out, "caption_dropout=0.5")) == 0
    return out


def test_training_with_the_cache_equals_training_without(folder, cached, tmp_path):
    assert train(with_tower(folder, tmp_path / "run", "caption_dropout=0.5", "tower.cache=false")) == 0
    assert_equal(state(cached), state(tmp_path / "run"))
    assert len(list((cached / "cache").glob("captions-*.npy"))) == 1
    assert not list((tmp_path / "run" / "cache").glob("captions-*"))


def test_resumed_equals_unbroken(folder, cached, tmp_path):
    """Without the cached files, which are made anew."""
    shutil.copytree(cached, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "*2.safetensors"))
    assert train([*with_tower(folder, tmp_path / "run", "caption_dropout=0.5"), "--resume"]) == 0
    assert_equal(state(cached), state(tmp_path / "run"))


def test_only_the_unet_is_trained_and_the_tower_is_exported(folder, cached, tmp_path):
    assert all(name.startswith("weights/model/unet.") for name in state(cached) if name.startswith("weights"))
    exported = open_checkpoint(cached).require("text")
    assert exported.config == TEXT
    of_run = exported.tensors(torch.float32)
    first = open_checkpoint(folder / "text_encoder.safetensors").require("text").tensors(torch.float16)
    assert_equal(of_run, {name: tensor.float() for name, tensor in first.items()})
    assert "text_encoder.safetensors" in {path.name for path in (cached / "model").iterdir()}
    how = ["--model", str(cached), "--device", "cpu", "--steps", "1", "--out", str(tmp_path / "out")]
    assert sample(["txt2img", "a red dot", *how]) == 0
    assert (tmp_path / "out" / "00000.png").is_file()


@pytest.mark.parametrize("cache", ["true", "false"])
def test_no_gradient_reaches_a_frozen_tower(folder, tmp_path, cache):
    task = task_of(with_tower(folder, tmp_path, f"tower.cache={cache}"))
    before = {name: tensor.clone() for name, tensor in task.text_encoder.state_dict().items()}
    loss, _ = task.loss(0, 0)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in task.text_encoder.parameters())
    assert task.unet.conv_in.weight.grad is not None
    assert set(task.players["model"].parameters) == {f"unet.{n}" for n, _ in task.unet.named_parameters()}
    assert_equal(before, dict(task.text_encoder.state_dict()))


def test_dropped_captions_read_the_cached_empty_one(folder, tmp_path):
    task = task_of(with_tower(folder, tmp_path, "caption_dropout=1"))
    seen = []
    task.unet.register_forward_pre_hook(
        lambda module, given, more: seen.append(more["context"]), with_kwargs=True
    )
    task.loss(0, 0)
    empty = task.text_encoder(Tokenizer()([""]))
    assert torch.equal(seen[0], empty.expand(4, -1, -1))
    kept = task_of(with_tower(folder, tmp_path, "caption_dropout=0"))
    kept.unet.register_forward_pre_hook(
        lambda module, given, more: seen.append(more["context"]), with_kwargs=True
    )
    kept.loss(0, 0)
    captions = [CAPTIONS[row % 3] for row in batch_indices(6, 4, 0, 0)]
    assert torch.equal(seen[1], torch.cat([task.text_encoder(Tokenizer()([text])) for text in captions]))


def test_the_towers_of_other_checkpoints(tmp_path):
    """Of Stable Diffusion 1 and 2 (OpenCLIP) in the original's names; layers to skip are read off or given."""
    for kind in ("tiny_sd15", "tiny_sd21"):
        path = save(tmp_path / f"{kind}.safetensors", single_file(kind, parts=("unet", "text")))
        checkpoint = open_checkpoint(path).require("text")
        found = load_tower(TowerConfig(str(path)))
        assert_equal(dict(found.state_dict()), checkpoint.tensors(torch.float32))
        assert found.config == checkpoint.config and not any(p.requires_grad for p in found.parameters())
        skipping = load_tower(TowerConfig(str(path), skip_layers=1))
        ids = Tokenizer(padding=found.config.padding)(CAPTIONS)
        same = torch.equal(features(found, ids), features(skipping, ids))
        assert same == (found.config.skip_layers == 1)
        with pytest.raises(ValueError, match="skip_layers must be in 0"):
            load_tower(TowerConfig(str(path), skip_layers=9))


# --- from given weights -------------------------------------------------------------------------------------


def test_a_joint_tower_starts_from_a_checkpoint_and_moves(folder, tmp_path):
    task = task_of(with_tower(folder, tmp_path, "tower.frozen=false"))
    first = open_checkpoint(folder / "text_encoder.safetensors").require("text").tensors()
    assert_equal(dict(task.text_encoder.state_dict()), first)
    randomised(task.unet)  # its last layer starts at zero, which lets nothing through
    task.loss(0, 0)[0].backward()
    assert task.text_encoder.blocks[0].fc1.weight.grad.abs().sum() > 0
    assert any(name.startswith("text_encoder.") for name in task.players["model"].parameters)
    assert task.text_encoder.training and task.frozen_text is None


def test_a_tower_that_will_be_cut_up_is_built_where_it_fits(folder, tmp_path, monkeypatch):
    """`sharded.building_device`; a frozen one stays whole, where it reads."""
    monkeypatch.setattr("train.tasks.diffusion.building_device", lambda run: torch.device("meta"))
    joint, frozen = (
        task_of(with_tower(folder, tmp_path / frozen, f"tower.frozen={frozen}"))
        for frozen in ("false", "true")
    )
    assert {p.device.type for p in joint.text_encoder.parameters()} == {"meta"}
    assert {p.device.type for p in frozen.frozen_text.tower.parameters()} == {"cpu"}


def test_fine_tuning_starts_from_the_given_weights(folder, cached, tmp_path):
    """One run's model is another's start: all networks that are trained, and the pictures it makes."""
    start = f"init_from={cached}"
    task = task_of(with_tower(folder, tmp_path, start))
    assert_equal(dict(task.unet.state_dict()), open_checkpoint(cached).require("unet").tensors(torch.float32))
    text = [f"text.{key}={value}" for key, value in vars(TEXT).items()]
    same = f"autoencoder={cached / 'model' / 'autoencoder.safetensors'}"  # as rounded as the other's
    joint = task_of(options(folder, tmp_path, start, same, *text))
    exported = open_checkpoint(cached).require("text").tensors(torch.float32)
    assert_equal(dict(joint.text_encoder.state_dict()), exported)
    pipe = Pipeline.load(cached, device="cpu")
    how = {"seed": 1, "steps": 1, "guidance": 1.0}
    pictures = [each.txt2img("a red dot", **how) for each in (pipe, joint.pipeline())]
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    assert train(with_tower(folder, tmp_path / "run", start, "run.lr=1e-8", "run.steps=1")) == 0
    moved, first = state(tmp_path / "run", 1), open_checkpoint(cached).require("unet").tensors(torch.float32)
    for name, tensor in first.items():
        torch.testing.assert_close(moved[f"weights/model/unet.{name}"], tensor, atol=1e-6, rtol=0)


def test_another_way_of_noising_is_told(folder, cached, tmp_path):
    with pytest.warns(UserWarning, match=r"trained otherwise.*diffusion.prediction: 'v' -> 'eps'"):
        task_of(with_tower(folder, tmp_path, f"init_from={cached}", "diffusion.prediction=eps"))


def test_a_model_of_classes_is_fine_tuned(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    shutil.copytree(folder, tmp_path / "set")
    text = "".join(json.dumps(row | {"label": i % 3}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "set" / "metadata.jsonl").write_text(text)
    classes = ["text=null", "classes.num_classes=4", "classes.dim=32", "classes.null_class=3"]
    command = options(tmp_path / "set", tmp_path / "run", *classes, "run.steps=1", "preview.prompts=[]")
    assert train(command) == 0
    task = task_of([*command, f"init_from={tmp_path / 'run'}"])
    given = open_checkpoint(tmp_path / "run").require("classes").tensors(torch.float32)
    assert_equal(dict(task.text_encoder.state_dict()), given)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["text.heads=8"], "text=null and classes=null are needed"),
        (["tower.checkpoint=/nowhere/at/all"], "/nowhere/at/all"),
        (['tower.checkpoint=""'], "tower.checkpoint is empty"),
        (["tower.skip_layers=2"], "skip_layers must be in 0..1"),
        (["unet.context_dim=64"], "unet.context_dim 64 must equal the width 32 of the text encoder in"),
        (["tower.frosen=true"], "tower.frosen"),
        (["tower.checkpoint=AUTOENCODER"], "holds no text encoder, only: autoencoder"),
        (["init_from=AUTOENCODER"], "holds no UNet, only: autoencoder"),
        (
            ["init_from=RUN", "unet.num_res_blocks=2"],
            "another one than is configured: unet.num_res_blocks: 2 -> 1",
        ),
        (["init_from=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(folder, cached, tmp_path, capsys, overrides, told):
    known = {"AUTOENCODER": str(folder / "autoencoder.safetensors"), "RUN": str(cached)}
    for word, path in known.items():
        overrides = [override.replace(word, path) for override in overrides]
    assert train(with_tower(folder, tmp_path / "new", *overrides)) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line and line.startswith("ldm-train: error: ")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_counts_the_tower_as_frozen_and_writes_nothing(folder, tmp_path, capsys):
    assert train([*with_tower(folder, tmp_path / "new"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in UNet(UNetConfig(**unet_of(folder, tmp_path))).parameters())
    assert f"model: {parameters:,} parameters to train" in said
    assert not (tmp_path / "new").exists()


def unet_of(folder: Path, out: Path) -> dict:
    return vars(load_config(DiffusionTaskConfig, TINY, with_tower(folder, out)[2:]).unet)
