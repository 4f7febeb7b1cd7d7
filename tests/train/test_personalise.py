"""`ldm-train personalise`: three ways to learn a subject, compared; with models of random weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from personal import RUN, make

from sample.images import read_rgb
from train import ablate, judging, personalise
from train.__main__ import main
from train.ablation_table import Arm, Result
from train.emoji_names import emoji_concepts, make_slug
from train.judging import Asked, Judge, name_of
from train.prepare_style import HELD_OUT, TAUGHT

ARMS = {
    "inversion": {
        "task": "textual-inversion",
        "config": "configs/train/emoji_textual_inversion.yaml",
        "overrides": ["tokens.starts=[dog]"],
    },
    "dreambooth": {
        "task": "dreambooth",
        "config": "configs/train/emoji_dreambooth.yaml",
        "overrides": ["subject.noun=dog", "prior.weight=0.0", "run.lr=0.01"],
    },
    "lora": {
        "task": "lora",
        "config": "configs/train/emoji_lora.yaml",
        "overrides": ["subject.noun=dog", "lora.rank=2", "lora_text.rank=2", "run.lr=0.05"],
    },
}
EVALUATE = {
    "prompts": ["a {} in snow"],
    "class_prompts": ["a {}"],
    "others": ["a cat", "a red apple", "a key"],
    "each": 2,
    "features": "thumbnails",
    "steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("personalise"))


def study(folder: Path, path: Path, **changes: object) -> Path:
    """A study's YAML at `path`."""
    values = {
        "pictures": str(folder / "pictures"),
        "model": str(folder / "model"),
        "noun": "dog",
        "images": 8,
        "seeds": [0],
        "common": [each for each in RUN if not each.startswith("run.steps")],
        "arms": ARMS,
        "evaluate": EVALUATE,
    }
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def values_of(out: Path, run: str) -> dict[str, float]:
    return json.loads((out / run / judging.JUDGED).read_text())["values"]


def test_the_whole_study_and_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table and figure of all arms; a second call computes nothing; one answer lost is one answer found."""
    out, config = tmp_path / "out", str(study(folder, tmp_path / "study.yaml"))
    assert main(["personalise", config, "--out", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.startswith("| arm | seeds | similarity | rise | drift | parameters | s | ")
    for arm in ("base (asked for the class)", *ARMS):
        assert table.count(f"| {arm} |") == 1
    assert f"ldm-train personalise {config}" in table
    assert "the picture at 8x8" in table
    figure = (out / "figure.svg").read_text()
    assert figure.count('r="3"') == 2 * (1 + len(ARMS))  # a ring a run, for similarity and drift
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + len(ARMS)
    assert abs(values_of(out, "base")["drift"]) < 1e-6
    for arm in ARMS:
        log = (out / arm / "seed-0" / "log.jsonl").read_text().splitlines()
        assert max(json.loads(line).get("step", 0) for line in log) == 2  # 8 pictures, 4 at once
        assert (out / arm / "seed-0" / "subject.png").is_file()
    assert abs(values_of(out, "inversion/seed-0")["drift"]) < 1e-6  # a new word changes no other
    assert values_of(out, "dreambooth/seed-0")["drift"] > 1e-4
    assert values_of(out, "lora/seed-0")["drift"] > 1e-4

    before = values_of(out, "lora/seed-0")
    monkeypatch.setattr(ablate, "train", lambda *_: pytest.fail("trained again"))
    (out / "lora" / "seed-0" / judging.JUDGED).unlink()
    assert main(["personalise", config, "--out", str(out), "--table-only"]) == 0
    assert "| lora |" not in (out / "table.md").read_text()
    assert main(["personalise", config, "--out", str(out)]) == 0
    assert values_of(out, "lora/seed-0") == before
    monkeypatch.setattr(judging.Judge, "_answer", lambda *_: pytest.fail("asked again"))
    assert main(["personalise", config, "--out", str(out)]) == 0
    assert (out / "table.md").read_text() == table


def test_the_measures_by_hand(folder: Path) -> None:
    """Similarity of the subject's own pictures is that among them; drift of the same pictures is 0."""
    asked = Asked(**{key: tuple(v) if isinstance(v, list) else v for key, v in EVALUATE.items()})
    judge = Judge(str(folder / "model"), str(folder / "pictures"), "dog", asked)
    own = [read_rgb(path, 32) for path in sorted((folder / "pictures").iterdir())]
    features = judge.extractor.look(own)[0] - judge.zero
    by_hand = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2)
    judge.size = 32  # the model's own is 64
    torch.testing.assert_close(judge._directions(own) @ judge.subject.T, by_hand)
    assert judge.likeness(own, ()) == pytest.approx(float(by_hand.mean()))


def test_each_thing_is_compared_with_its_own_picture(folder: Path, tmp_path: Path) -> None:
    """With references; of all pictures those that are not held out are what was learned."""
    split = ["train", "train", "heldout_image", "heldout_image", "heldout_image"]
    rows = [{"file_name": f"{n}.png", "named": "a cat", "split": split[n]} for n in range(5)]
    shutil.copytree(folder / "pictures", tmp_path / "style")
    (tmp_path / "style" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in EVALUATE.items()}
    asked = Asked(**settings | {"prompts": ("a {}", "one {}"), "references": ("4.png", "2.png")})
    judge = Judge(str(folder / "model"), str(tmp_path / "style"), "dog", asked, "named")
    judge.size, judge.zero = 32, torch.zeros(1, 1)
    four, two = (read_rgb(tmp_path / "style" / name, 32) for name in asked.references)
    assert judge.likeness([four, four, two, two], asked.references) == pytest.approx(1)
    a, b = judge.extractor.look([four, two])[0]
    crossed = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert crossed < 0.999
    assert judge.likeness([four, four, two, four], asked.references) == pytest.approx((3 + crossed) / 4)
    assert [file.name for file in judge.files] == ["0.png", "1.png"]  # without references


def test_table_and_rise_by_hand() -> None:
    """Two seeds: mean and interval; the rise over the base, in shares of it too where that means something."""
    results = {seed: Result({"similarity": s, "drift": 0.5}, 1234, 60.0) for seed, s in ((0, 0.5), (1, 0.7))}
    sizes = {"lora": 679_144}
    for base, rise in ((0.25, "+0.350 (+140%)"), (-0.25, "+0.850")):
        table = personalise.markdown(
            {"similarity": base, "drift": 0.0}, [Arm("lora", "", results)], sizes
        ).splitlines()
        assert table[2] == f"| base (asked for the class) |  | {base:.3f} |  | 0.000 | 0 |  |  |"
        assert table[3] == f"| lora | 2 | 0.6 ± 1.3 | {rise} | 0.5 ± 0 | 1,234 | 60 | 679 kB |"


@pytest.mark.parametrize("arm", ARMS)
def test_the_name_in_prompts(folder: Path, tmp_path: Path, arm: str) -> None:
    given = personalise.load_config(personalise.Study, study(folder, tmp_path / "study.yaml"))
    [config] = [run.config for run in personalise.plan(given, tmp_path) if (run.arm, run.seed) == (arm, 0)]
    assert name_of(config) == {"inversion": "<subject>"}.get(arm, "sks dog")


def test_fidelity_and_the_unlearned_only_where_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(**{key: tuple(v) if isinstance(v, list) else v for key, v in EVALUATE.items()})
    monkeypatch.setattr(judging, "fidelity", lambda pipe, data, questions, guidance: 0.25)
    all_of_them = {"similarity", "drift", "fidelity", "unlearned"}
    for data, more, names in (("", {}, {"similarity", "drift"}), ("x", {"a {} here": "0.png"}, all_of_them)):
        out = tmp_path / (data or "none")
        told = dataclasses.replace(asked, data=data, unlearned=more)
        Judge(str(folder / "model"), str(folder / "pictures"), "dog", told).base(out)
        assert set(values_of(tmp_path, out.name)) == names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {}}, "at least one"),
        ({"arms": {"base": ARMS["lora"]}}, "none is called 'base'"),
        ({"arms": {"a": {**ARMS["lora"], "task": "hypernetwork"}}}, "textual-inversion, dreambooth, lora"),
        ({"arms": {"a": {**ARMS["lora"], "overrides": ["run.steps=9"]}}}, "the study sets"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"evaluate": {**EVALUATE, "prompts": ["a dog"]}}, "has no {}"),
        ({"evaluate": {**EVALUATE, "others": []}}, "at least one prompt"),
        ({"evaluate": {**EVALUATE, "references": ["0.png", "1.png"]}}, "2 for 1 prompts"),
        ({"evaluate": {**EVALUATE, "references": ["9.png"]}}, "no picture"),
        ({"evaluate": {**EVALUATE, "unlearned": {"a {}": "8.png"}}}, "no picture"),
        ({"evaluate": {**EVALUATE, "unlearned": {"a dog": "0.png"}}}, "has no {}"),
        ({"evaluate": {**EVALUATE, "features": "clip"}}, "hed, hed:FILE"),
        ({"pictures": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, changes: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study(folder, tmp_path / "study.yaml", **changes)
    assert main(["personalise", str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "out" / "table.md").exists()


def test_another_configuration_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an --out holds of another study is not taken for this one's."""
    arms = {"lora": ARMS["lora"]}
    out = ["--out", str(tmp_path / "out")]
    one = str(study(folder, tmp_path / "one.yaml", arms=arms, seeds=[0]))
    two = str(study(folder, tmp_path / "two.yaml", arms=arms, seeds=[0], images=12))
    assert main(["personalise", one, *out]) == 0
    assert main(["personalise", two, *out]) == 2
    assert "run.steps" in capsys.readouterr().err


def test_no_finished_run_to_tell_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(study(folder, tmp_path / "study.yaml"))
    assert main(["personalise", config, "--out", str(tmp_path / "out"), "--table-only"]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_the_shipped_study_is_sound() -> None:
    given = personalise.load_config(personalise.Study, "configs/ablations/personalise.yaml")
    runs = personalise.plan(given, Path("out"))
    assert {run.config.run.steps * run.config.run.batch for run in runs} == {given.images}
    assert {Path(run.config.data.path).name for run in runs} == {"creature"}
    # Guided pictures of the class would be learned as they are, and be guided again when it is drawn
    assert {run.arm: run.config.prior.guidance for run in runs if run.config.prior.on} == {
        "dreambooth-prior": 1.0,
        "lora-prior": 1.0,
    }
    assert len(list(Path(given.pictures).glob("*.png"))) == 5


def test_the_study_of_a_style_is_sound() -> None:
    """Asked for are things that `ldm-train prepare style` gives to learn, and others that it holds out; drift is
    also of others than those that prior preservation shows."""
    given = personalise.load_config(personalise.Study, "configs/ablations/personalise_style.yaml")
    runs = {run.arm: run.config for run in personalise.plan(given, Path("out"))}
    assert {run.run.steps * run.run.batch for run in runs.values()} == {given.images}
    assert {name_of(config) for config in runs.values()} == {"twemoji emoji"}
    pytest.importorskip("emoji")
    slugs = {name: f"{make_slug(sequence)}.png" for sequence, name in emoji_concepts().values()}
    asked = given.evaluate
    learned = dict(zip(asked.prompts, asked.references, strict=True))
    for pairs, known in ((learned.items(), TAUGHT), (asked.unlearned.items(), HELD_OUT)):
        things = [(prompt.split(maxsplit=1)[1].removesuffix(", {}"), file) for prompt, file in pairs]
        assert all(thing in known and slugs[thing] == file for thing, file in things)
    shown = {prompt.replace("{}", given.noun) for prompt in given.evaluate.class_prompts}
    for arm in ("dreambooth-prior", "lora-prior"):
        assert shown & set(runs[arm].prior.prompts) and shown - set(runs[arm].prior.prompts)
