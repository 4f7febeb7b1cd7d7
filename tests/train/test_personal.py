"""Textual inversion, DreamBooth and LoRA: what is trained and what is not, resuming, files, bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from personal import PRIOR, changed, make, options, task_of, weights, with_gradient
from PIL import Image

from ldm.models.frozen import LeanResBlock
from ldm.models.lora import attach
from ldm.models.textual_inversion import textual_inversion
from ldm.weights.embeddings import read_embeddings
from ldm.weights.io import load_weights
from ldm.weights.lora import read_lora
from sample.pipeline import Pipeline
from train.__main__ import main as train
from train.loop import make_optimizer, move

KINDS = ("lora", "dreambooth", "textual-inversion")
PIVOTAL = ["tokens.words=[<toy>]", "tokens.vectors=2", "subject.identifier=<toy>", "lora_text.rank=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("personal"))


def stepped(task, steps=1):
    """The task after some steps of the loop's, each with large weight decay."""
    player = task.players["model"]
    optimizer = make_optimizer(player, task.config.run)
    for group in optimizer.param_groups:
        group["weight_decay"] = 10.0
    for step in range(steps):
        move("model", player, optimizer, task.config.run, step)
    return task


# --- what is trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["lora_text.rank=2"], PIVOTAL, ["lora=null", "lora_text.rank=1"]])
def test_a_lora_trains_itself_alone(folder, tmp_path, more):
    task = task_of("lora", folder, tmp_path, *more)
    before = [weights(each) for each in (task.unet, task.text_encoder, task.autoencoder)]
    stepped(task, 2)
    assert with_gradient(task) == set()
    assert all(p.grad is not None for p in task.players["model"].parameters.values())
    for module, old in zip((task.unet, task.text_encoder, task.autoencoder), before, strict=True):
        assert changed(old, module) == []
    for lora in task.loras.values():
        assert all(bool(factors.up.any()) for factors in lora.weights.values())


@pytest.mark.parametrize("kind", ["lora", "textual-inversion"])
def test_the_frozen_network_keeps_less_and_trains_the_same(folder, tmp_path, monkeypatch, kind):
    """As it would be with torch's own layers; compiled, it has these."""
    module = f"train.tasks.{kind.replace('-', '_')}"
    more = ['lora.targets=[transformer,"*.conv1"]', "lora_text.rank=2"] if kind == "lora" else []
    found = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(f"{module}.lean", lambda network: network)
        task = stepped(task_of(kind, folder, tmp_path, *more), 3)
        lean_blocks = [isinstance(layer, LeanResBlock) for layer in task.unet.modules()]
        assert any(lean_blocks) == lean
        found.append(weights(task.players["model"].module))
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, atol=1e-6 * float(tensor.abs().max()), rtol=0)
    monkeypatch.undo()
    compiled = task_of(kind, folder, tmp_path, *more, "run.compile=true")
    assert not any(isinstance(layer, LeanResBlock) for layer in compiled.unet.modules())


def test_textual_inversion_trains_the_new_rows_alone(folder, tmp_path):
    """Weight decay included: every other row, and every network, is bit-equal."""
    task = task_of("textual-inversion", folder, tmp_path)
    before = [weights(each) for each in (task.unet, task.text_encoder, task.autoencoder)]
    vectors = task.words.module.vectors("<subject>")
    assert vectors.shape == (4, 16)
    assert torch.equal(vectors[0], vectors[3])
    stepped(task, 2)
    assert with_gradient(task) == set()
    for module, old in zip((task.unet, task.text_encoder, task.autoencoder), before, strict=True):
        assert changed(old, module) == []
    now = task.words.module.vectors("<subject>")
    assert bool((now != vectors).all(dim=1).all())
    assert not torch.equal(now[0], now[3])


def test_what_will_be_cut_up_is_built_where_it_fits(folder, tmp_path, monkeypatch):
    """`sharded.building_device`: a whole network need not have room where its pieces run."""
    monkeypatch.setattr("train.tasks.dreambooth.building_device", lambda run: torch.device("meta"))
    task = task_of("dreambooth", folder, tmp_path, "train_text=true")
    assert {p.device.type for p in task.players["model"].parameters.values()} == {"meta"}
    assert {p.device.type for p in task.autoencoder.parameters()} == {"cpu"}


@pytest.mark.parametrize("text", [False, True])
def test_dreambooth_trains_the_unet_and_if_wanted_the_tower(folder, tmp_path, text):
    task = task_of("dreambooth", folder, tmp_path, f"train_text={text}".lower())
    before = [weights(each) for each in (task.unet, task.text_encoder, task.autoencoder)]
    stepped(task)
    assert with_gradient(task) == set()
    assert len(changed(before[0], task.unet)) == len(before[0])
    assert bool(changed(before[1], task.text_encoder)) == text
    assert changed(before[2], task.autoencoder) == []
    assert (task.frozen_text is None) == text


def test_at_first_a_lora_changes_nothing(folder, tmp_path):
    """Its `up` is zero: prediction and loss are the model's, bit for bit."""
    plain = Pipeline.load(folder / "model", device="cpu")
    where = ["lora.targets=[transformer,convolutions]", 'lora.ranks={"mid_block*": 3}', "lora.alpha=1.0"]
    task = task_of("lora", folder, tmp_path, "lora_text.rank=2", *where)
    ranks = {name: factors.rank for name, factors in task.loras["unet"].weights.items()}
    assert {rank for name, rank in ranks.items() if name.startswith("mid_block")} == {3}
    assert {rank for name, rank in ranks.items() if not name.startswith("mid_block")} == {2}
    assert {factors.down.ndim for factors in task.loras["unet"].weights.values()} == {2, 4}
    x, t, ids = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), plain.tokenizer(["a sks", "b"])
    with torch.no_grad():
        assert torch.equal(plain.text_encoder(ids), task.text_encoder(ids))
        context = plain.text_encoder(ids)
        assert torch.equal(plain.unet(x, t, context), task.unet(x, t, context))


def test_tokens_first_and_the_lora_after_them(folder, tmp_path):
    """Pivotal tuning: neither moves in the other's steps, weight decay included."""
    task = task_of(
        "lora", folder, tmp_path, *PIVOTAL[:3], "tokens_until=2", "lora_from=1", "rates.tokens=3.0"
    )
    player, seen = task.players["model"], []
    optimizer = make_optimizer(player, task.config.run)
    for step in range(4):
        tokens, lora = task.words.module.vectors("<toy>"), weights(player.module["lora"])
        move("model", player, optimizer, task.config.run, step)
        moved = not torch.equal(tokens, task.words.module.vectors("<toy>"))
        seen.append((moved, bool(changed(lora, player.module["lora"]))))
    assert seen == [(True, False), (True, True), (False, True), (False, True)]
    rates = {group["rate"]: group["lr"] for group in optimizer.param_groups}
    assert rates[3.0] == pytest.approx(3 * rates[1.0])


def test_more_vectors_with_time(folder, tmp_path):
    """One of three at first; each later one starts from the initial word's vector."""
    task = task_of(
        "textual-inversion", folder, tmp_path, "tokens.vectors=3", "tokens.one_more_every=2", "run.steps=6"
    )
    player, used = task.players["model"], []
    optimizer = make_optimizer(player, task.config.run)
    first = task.words.initial[0]
    for step in range(6):
        move("model", player, optimizer, task.config.run, step)
        used.append(len(task.base.tokenizer.encode("<subject>")))
        if step == 1:
            assert not torch.equal(task.words.module.rows[0][1], first[1])  # weight decay's work
            task.words.module.rows[0].data[1:] = 7.0  # and that of a very long time
        if step == 2:
            moved = (task.words.module.rows[0] - first).abs().amax(dim=1)
            assert 0 < moved[1] <= 1.02 * task.config.run.lr + 1e-3
    assert used == [1, 1, 2, 2, 3, 3]


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_an_uninterrupted_one(folder, tmp_path, kind):
    more = ["flip=0.5", "caption_dropout=0.3", "run.accumulate=2", "run.validate_every=0"]
    if kind == "lora":
        more += [*PIVOTAL, "tokens_until=3", "lora_from=1", "lora.dropout=0.3", *PRIOR]
    assert train(options(kind, folder, tmp_path / "once", *more)) == 0
    shutil.copytree(tmp_path / "once", tmp_path / "twice")  # as if it had been stopped after step 2
    (tmp_path / "twice" / "states" / "step-00000004.safetensors").unlink()
    shutil.rmtree(tmp_path / "twice" / "model")
    assert train([*options(kind, folder, tmp_path / "twice", *more), "--resume"]) == 0
    a, b = (
        load_weights(tmp_path / out / "states" / "step-00000004.safetensors")[0] for out in ("once", "twice")
    )
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    files = [sorted((tmp_path / out / "model").iterdir()) for out in ("once", "twice")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    if kind == "lora":  # exports once more
        assert train([*options(kind, folder, tmp_path / "twice", *more), "--resume"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_subject_is_learned(folder, tmp_path, kind):
    """On the same noise before and after."""
    rate = {"lora": 2e-2, "dreambooth": 2e-3, "textual-inversion": 0.1}[kind]
    text = ["lora_text.rank=4"] if kind == "lora" else []
    more = ["run.steps=25", f"run.lr={rate}", "run.validate_every=0", "run.checkpoint_every=0", *text]
    task = task_of(kind, folder, tmp_path, *more, "validation_size=32", *["prior.weight=0.0"])
    player = task.players["model"]
    optimizer = make_optimizer(player, task.config.run)
    with torch.no_grad():
        before = task.validate()["subject_loss"]
    for step in range(25):
        move("model", player, optimizer, task.config.run, step)
    with torch.no_grad():
        after = task.validate()["subject_loss"]
    assert after < before * (0.97 if kind == "textual-inversion" else 0.7), (before, after)


def test_the_lora_file_acts_as_the_trained_model_does(folder, tmp_path):
    """Read and attached to a fresh model in every form, it predicts what the task's own network does."""
    more = ["lora_text.rank=2", "forms=[ldm,kohya,diffusers,peft]", "dtype=float32", "run.lr=0.05"]
    task = task_of("lora", folder, tmp_path, *more)
    stepped(task, 2)
    task.export(tmp_path / "model")
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 900])
    ids = task.base.tokenizer(["a sks", "b"])
    with torch.no_grad():
        wanted = task.unet(x, t, task.text_encoder(ids))
        plain = Pipeline.load(folder / "model", device="cpu")
        assert not torch.allclose(plain.unet(x, t, plain.text_encoder(ids)), wanted, atol=1e-2)
    names = {"lora.safetensors", "lora_kohya.safetensors", "pytorch_lora_weights.safetensors", "peft"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    for name in names:
        base = Pipeline.load(folder / "model", device="cpu")
        file = read_lora(
            tmp_path / "model" / name, {"unet": base.unet.config, "text": base.text_encoder.config}
        )
        attach(base.unet, file.parts["unet"])
        attach(base.text_encoder, file.parts["text"])
        with torch.no_grad():
            torch.testing.assert_close(base.unet(x, t, base.text_encoder(ids)), wanted, atol=1e-5, rtol=1e-5)


def test_the_embedding_file_acts_as_the_trained_word_does(folder, tmp_path):
    words = ["tokens.words=[<toy>,<look>]", "tokens.starts=[dog,'']", "tokens.vectors=2"]
    more = [*words, "tokens.counts.<look>=3", "forms=[diffusers,original,webui]"]
    assert train(options("textual-inversion", folder, tmp_path, *more)) == 0
    model = tmp_path / "model"
    found = read_embeddings(model / "embedding.safetensors").embeddings
    vectors = {each.token: each.vectors for each in found}
    assert {token: tuple(each.shape) for token, each in vectors.items()} == {
        "<toy>": (2, 16),
        "<look>": (3, 16),
    }
    others = {"embedding.safetensors", "toy.pt", "look.pt", "toy_webui.safetensors", "look_webui.safetensors"}
    assert {path.name for path in model.iterdir()} == others
    torch.testing.assert_close(read_embeddings(model / "look.pt").embeddings[0].vectors, vectors["<look>"])
    base = Pipeline.load(folder / "model", device="cpu")
    words = textual_inversion(base.text_encoder, base.tokenizer)
    for token, each in vectors.items():
        words.add(token, each)
    state = load_weights(tmp_path / "states" / "step-00000004.safetensors")[0]
    torch.testing.assert_close(words.vectors("<look>"), state["ema/model/tokens.rows.1"])


def test_the_logs_name_what_is_measured(folder, tmp_path):
    assert train(options("lora", folder, tmp_path, *PRIOR)) == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0].keys() >= {"loss", "subject", "prior"}
    assert rows[-1].keys() == {"step", "subject_loss", "prior_loss"}
    assert rows[0]["loss"] == pytest.approx(rows[0]["subject"] + rows[0]["prior"], abs=1e-5)


def test_what_metadata_says_of_the_pictures(folder, tmp_path):
    """Own captions, masks, which are mirrored with their pictures, and held-out pictures for validation."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, 0)).save(tmp_path / "ramp.png")
    (pictures / "masks").mkdir()
    shutil.move(tmp_path / "ramp.png", pictures / "masks" / "ramp.png")
    rows = [{"file_name": f"{i}.png", "text": f"{{}} number {i}", "mask": "masks/ramp.png"} for i in range(4)]
    rows[3]["split"] = "heldout_image"
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"data.path={pictures}", "subject.templates=[own]", "masked=true", "flip=1.0"]
    task = task_of("lora", folder, tmp_path / "out", *more)
    assert task.captions.all == ["sks number 0", "sks number 1", "sks number 2"]
    assert len(task.images) == 3
    assert len(task.data) == 6  # mirrored ones behind the others
    assert torch.equal(task.data.masks[3:], task.data.masks[:3].flip(3))
    assert not torch.equal(task.data.masks[3:], task.data.masks[:3])
    assert task._flipped(torch.tensor([0, 2]), "train", 0, 0).tolist() == [3, 5]
    assert task._flipped(torch.tensor([0, 2]), "subject", 0).tolist() == [0, 2]
    assert bool(task.loss(0, 0)[0].isfinite())
    with torch.no_grad():
        assert {"validation_loss", "subject_loss"} <= task.validate().keys()


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert train([*options("lora", folder, tmp_path / "out", "lora_text.rank=2", *PRIOR), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "activations of 4 images" in told
    assert "nothing is written" in told
    assert list(tmp_path.iterdir()) == []


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        ("textual-inversion", ["tokens.words=[dog]"], "is a token already"),
        ("textual-inversion", ["tokens.starts=[photosynthesis]"], "photosynthesis' is 2 tokens"),
        ("textual-inversion", ["tokens.words=[]"], "tokens.words"),
        ("textual-inversion", ["tokens.starts=[a,b]"], "tokens.starts has 2 words for 1"),
        ("textual-inversion", ["tokens.vectors=0"], "tokens.vectors 0"),
        ("textual-inversion", ["subject.templates=[a dog]"], "no caption names the new word"),
        ("textual-inversion", ["subject.templates=[own]"], "no caption"),
        ("textual-inversion", ["forms=[gif]"], "forms"),
        ("lora", ["lora.rank=0"], "rank must be at least 1"),
        ("lora", ["lora=null"], "both null"),
        ("lora", ['lora.targets=["*.to_qq"]'], "near it: *.to_q"),
        ("lora", ["forms=[loha]"], "loha"),
        ("lora", ["prior.weight=1.0"], "subject.noun"),
        ("lora", ["subject.identifier=''"], "needs a name"),
        ("lora", ["rates.unet=2.0"], "rates"),
        ("dreambooth", ["prior.normalisation=median"], "median"),
        ("dreambooth", ["data.buckets.on=true"], "buckets"),
        ("dreambooth", ["data.size=33"], "size 33x33"),
        ("dreambooth", ["run.accumulate=2", "prior.batch=3"], "multiple"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, tmp_path, capsys, kind, more, told):
    assert train(options(kind, folder, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "model").exists()


def test_bad_pictures_are_refused_in_one_line(folder, tmp_path, capsys):
    """None, and one broken among five."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    (pictures / "3.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    for path, told in (
        (pictures, "3.png"),
        (tmp_path / "empty", "no images"),
        (tmp_path / "gone", "no such"),
    ):
        assert train(options("lora", folder, tmp_path / "out", f"data.path={path}")) == 2
        error = capsys.readouterr().err.strip()
        assert told in error
        assert len(error.splitlines()) == 1
