"""Faults of the real tasks: what a bad step names, codes revived in vain, pictures that vanish or change, captions
that are missing or too long.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import test_vq_task as vq
import torch
from coloured import CLASSES, SHORT, TINY, made_in, write_first_stage, write_set

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.weights.io import load_weights, save_weights
from train.__main__ import build_task, main
from train.bad_steps import pictures as told_pictures
from train.cache import cached_moments
from train.captions import data_key
from train.data import batch_indices
from train.loop import train

pictures = vq.pictures  # the fixture


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[str]:
    return made_in(tmp_path_factory.mktemp("made"))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_weights(folder / "states" / f"step-{step:08d}.safetensors")[0]


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("ldm-train: error: ")
    return lines[-1]


# --- what a bad step names ----------------------------------------------------------------------------------


def test_the_first_pictures_are_named_and_the_others_counted():
    assert told_pictures(["a", "b"], ["t 1", "t 2"]) == "pictures a at t 1, b at t 2"
    assert told_pictures(list("abcde")) == "pictures a, b, c and 2 more"


def spoiled(task, step: int, file: str):
    """`task`, whose latents of one picture are not finite in one step; the level it has there."""
    drawn = task._draw
    row = task.images.files.index(file)
    found = []

    def draw(data, rows, *key):
        x0, t, noise = drawn(data, rows, *key)
        if key[:2] == ("train", step):
            x0[rows == row] = math.nan
            found.extend(t[rows == row].tolist())
        return x0, t, noise

    task._draw = draw
    return found


def diffusion(made, out, *options):
    quick = ["validation_levels=[]", f"run.out={out}"]
    return build_task("diffusion", TINY, [*made, *CLASSES, *quick, *options])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_loss_names_the_step_the_picture_and_its_noise_level(made, tmp_path, accumulate):
    task = diffusion(made, tmp_path, f"run.accumulate={accumulate}")
    file = task.images.files[batch_indices(8, 4, 0, 4)[2]]
    levels = spoiled(task, 4, file)
    with pytest.raises(ValueError, match=r"the loss is nan in step 5 \(.*\); the state saved last") as error:
        train(task, False, "")
    t = levels[0]
    sigma = task.schedule.sigmas[t]
    assert f"in step 5 (pictures {file} at t {t} (sigma {sigma:.3g}));" in str(error.value)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000003.safetensors"]
    assert all(tensor.isfinite().all() for tensor in state(tmp_path, 3).values())


def test_the_level_named_is_that_of_the_density(made, tmp_path):
    task = diffusion(made, tmp_path, "loss.density=lognormal", "loss.lognormal_std=0.01")
    assert "(sigma 0.3" in task.seen(0, [0])  # exp(-1.2) = 0.30, whatever was drawn


def test_a_bad_gradient_names_the_batch_in_the_log_and_the_step_moves_nothing(made, tmp_path):
    options = ["run.max_gradient=1e-9", "run.on_nonfinite=skip", "run.max_skips=99", "run.accumulate=2"]
    task = diffusion(made, tmp_path, *options)
    train(task, False, "")
    rows = [row for row in log(tmp_path) if "skipped" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert "the norm of the gradient" in row["skipped"]
        for number in batch_indices(8, 4, 0, row["step"] - 1)[:3].tolist():
            assert f"{task.images.files[number]} at t " in row["skipped"]
        assert row["skipped"].endswith(" and 1 more)")
    three, six = (state(tmp_path, step) for step in (3, 6))
    assert three.keys() == six.keys() and all(torch.equal(three[name], six[name]) for name in three)


def test_a_bad_step_of_a_first_stage_names_its_pictures(pictures, tmp_path):
    task = vq.task_of(pictures, tmp_path, max_gradient=1e-9)
    with pytest.raises(
        ValueError, match=r"in step 1, above run\.max_gradient 1e-09 \(pictures .* and 1 more\)"
    ) as e:
        train(task, False, "")
    names = [task.files[row] for row in batch_indices(8, 4, 0, 0)[:3].tolist()]
    assert f"(pictures {', '.join(names)} and 1 more)" in str(e.value)


def test_codes_revived_in_a_skipped_step_are_as_before_and_dead_still(pictures, tmp_path):
    """A revival is a part of the step: were it kept, the codes would be those of a step that did not happen."""
    options = {"on_nonfinite": "skip", "checkpoint_every": 1, "keep": 9, "steps": 4}
    task = vq.task_of(pictures, tmp_path, {"revive_after": 1}, **options)
    revived, plain = [], task.players["model"].loss

    def loss(step, part):
        value, metrics = plain(step, part)
        revived.append(metrics["revived"])
        return (value * math.nan if step == 2 else value), metrics

    task.players["model"].loss = loss
    train(task, False, "")
    two, three, four = (state(tmp_path, step) for step in (2, 3, 4))
    assert revived[2] > 0 and revived[3] == revived[2]  # dead codes were there, and are revived a step later
    assert [name for name in two if not torch.equal(two[name], three[name])] == []
    assert not torch.equal(
        three[f"weights/model/autoencoder.{vq.TABLE}"], four[f"weights/model/autoencoder.{vq.TABLE}"]
    )


# --- captions -----------------------------------------------------------------------------------------------

TEXT = ["text.width=16", "text.layers=1", "text.heads=1", "unet.context_dim=16"]
DRY = ["text.context_length=16", "preview.prompts=[]", "--dry-run"]


def dry(folder: Path, captions: list[str], *options: str) -> int:
    (folder / "set").mkdir(parents=True)
    given = [write_set(folder / "set", captions), write_first_stage(folder), f"run.out={folder / 'run'}"]
    return main(["diffusion", TINY, *given, *SHORT, *TEXT, *options, *DRY])


def test_a_set_without_any_caption_is_refused(tmp_path, capsys):
    assert dry(tmp_path / "a", ["", " ", *[""] * 6, "a", "b"]) == 2  # only those held out have one
    line = one_line(capsys)
    assert f"{tmp_path / 'a' / 'set'}: no picture has a caption" in line
    assert "text=null unet.context_dim=null" in line
    assert not (tmp_path / "a" / "run").exists()
    assert dry(tmp_path / "b", [""] * 10, "caption_dropout=1") == 0  # all are dropped: asked for


def test_empty_captions_are_counted_and_named(tmp_path):
    with pytest.warns(UserWarning, match=r"2 of 8 captions are empty: 3\.png, 5\.png$") as told:
        assert dry(tmp_path, ["a", "b", "c", "", "e", "", "g", "h", "", ""]) == 0
    assert len(told) == 1


def test_captions_that_are_cut_are_counted_with_what_is_lost(tmp_path):
    """14 words fit into 16 tokens with start and end."""
    fits, long = " ".join(["cat"] * 14), " ".join(["cat"] * 14 + ["dog"] * 30)
    emoji = "\N{PARTY POPPER} " * 20
    captions = [fits, long, emoji, "a", f"{fits} owl", f"{fits} fox", *"bcde"]
    with pytest.warns(UserWarning, match="captions are longer") as told:
        assert dry(tmp_path, captions) == 0
    (warning,) = [str(each.message) for each in told]
    assert (
        "4 of 8 captions are longer than 16 tokens (start and end included) and cut: 1.png (without "
        in warning
    )
    assert "(without 'dog dog dog dog dog dog dog dog dog dog ...')" in warning and "4.png" in warning
    assert warning.endswith(", ...") and "0.png" not in warning and "5.png" not in warning


def test_good_captions_are_not_remarked_on(tmp_path, recwarn):
    assert dry(tmp_path, [f"colour {number}" for number in range(10)]) == 0
    assert [str(each.message) for each in recwarn if each.category is UserWarning] == []


# --- pictures that vanish, are cut short or change while a run goes on ---------------------------------------


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("harm", [vanish, truncate])
def test_a_picture_lost_in_mid_run_changes_nothing_and_is_refused_at_resume(tmp_path, capsys, harm):
    """A run holds its pictures in memory. Without one of them the batches would be other ones."""
    made = made_in(tmp_path)
    whole = diffusion(made, tmp_path / "whole")
    train(whole, False, "")
    task = diffusion(made, tmp_path / "run")
    plain = task.players["model"].loss

    def loss(step, part):
        if step == 1:
            harm(tmp_path / "3.png")
        if step == 4:
            raise RuntimeError("the plug was pulled")
        return plain(step, part)

    task.players["model"].loss = loss
    with pytest.raises(RuntimeError, match="the plug"):
        train(task, False, "")
    same, expected = state(tmp_path / "run", 3), state(tmp_path / "whole", 3)
    assert [name for name in expected if not torch.equal(same[name], expected[name])] == []
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/states").iterdir()}

    options = [*made, *CLASSES, "validation_levels=[]", f"run.out={tmp_path / 'run'}", "--resume"]
    with pytest.warns(UserWarning, match="1 of 8 images could not be read and are skipped: .*3.png"):
        assert main(["diffusion", TINY, *options]) == 2
    line = one_line(capsys)
    assert (
        "--resume with changed values: the training set: 8 pictures, " in line and " -> 7 pictures, " in line
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "run/states").iterdir()} == before

    write_set(tmp_path)  # put back
    assert main(["diffusion", TINY, *options]) == 0
    same, expected = state(tmp_path / "run", 6), state(tmp_path / "whole", 6)
    assert [name for name in expected if not torch.equal(same[name], expected[name])] == []


def test_all_pictures_lost_is_refused(tmp_path, capsys):
    made = made_in(tmp_path)
    for number in range(10):
        truncate(tmp_path / f"{number}.png")
    for task, config, options in (
        ("autoencoder", "configs/train/tiny_autoencoder.yaml", made[:1]),
        ("diffusion", TINY, [*made, *CLASSES]),
    ):
        assert main([task, config, *options, f"run.out={tmp_path / 'run'}", "run.device=cpu"]) == 2
        assert "8 of 8 images could not be read, none is left: " in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_another_set_of_as_many_pictures_is_refused_at_resume(pictures, tmp_path):
    """Of a first stage the names count, else the captions too."""
    train(vq.task_of(pictures, tmp_path / "run", steps=1), False, "")
    shutil.copytree(pictures, tmp_path / "set")
    (tmp_path / "set" / "0.png").rename(tmp_path / "set" / "00.png")
    again = vq.task_of(pictures, tmp_path / "run", steps=1)
    again.data_key = vq.task_of(tmp_path / "set", tmp_path / "run", steps=1).data_key
    with pytest.raises(ValueError, match=r"the training set: 8 pictures, (\w+) -> 8 pictures, (?!\1)\w+;"):
        train(again, True, "")
    assert data_key(["a"], ["b"]) != data_key(["a"], ["c"]) != data_key(["a", "c"])


def test_a_state_from_before_sets_had_keys_resumes(pictures, tmp_path):
    task = vq.task_of(pictures, tmp_path, steps=1)
    train(task, False, "")
    path = tmp_path / "states" / "step-00000001.safetensors"
    tensors, header = load_weights(path)
    assert header.pop("data") == task.data_key
    save_weights(path, tensors, header)
    train(vq.task_of(pictures, tmp_path, steps=1), True, "")


# --- caches, first stages -----------------------------------------------------------------------------------


def test_moments_of_another_first_stage_or_of_other_pictures_are_not_used(tmp_path):
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stages = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = AutoencoderConfig(base_channels=8, channel_mult=(1, 1), num_res_blocks=1, norm_groups=4)
        stages.append(AutoencoderKL(config))
    first = cached_moments(tmp_path, "train", pixels, stages[0])
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    other = cached_moments(tmp_path, "train", pixels, stages[1])
    changed = cached_moments(tmp_path, "train", 255 - pixels, stages[0])
    assert len(list(tmp_path.iterdir())) == 3 and file.read_bytes() == before
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], changed[0])
    again = cached_moments(tmp_path, "train", pixels, stages[0])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_damaged_cache_is_named(tmp_path, capsys):
    """It is neither used nor written over: it may be all that is left of somebody's hours."""
    made = made_in(tmp_path)
    options = [*made, *CLASSES, "run.steps=1", "validation_levels=[]"]
    assert main(["diffusion", TINY, *options, f"run.out={tmp_path / 'run'}"]) == 0
    shutil.copytree(tmp_path / "run" / "cache", tmp_path / "new" / "cache")
    (file,) = (tmp_path / "new" / "cache").glob("train-*")
    file.write_bytes(file.read_bytes()[:-7])
    assert main(["diffusion", TINY, *options, f"run.out={tmp_path / 'new'}"]) == 2
    assert str(file) in one_line(capsys)


def test_a_first_stage_with_values_that_are_not_finite_is_refused(tmp_path, capsys):
    made = made_in(tmp_path)
    tensors, header = load_weights(tmp_path / "autoencoder.safetensors")
    name = "encoder.conv_in.weight"
    tensors[name][0] = math.nan
    save_weights(tmp_path / "autoencoder.safetensors", tensors, header)
    assert main(["diffusion", TINY, *made, *CLASSES, f"run.out={tmp_path / 'run'}"]) == 2
    line = one_line(capsys)
    assert name in line and "NaN" in line and "autoencoder.safetensors" in line
    assert not (tmp_path / "run").exists()
