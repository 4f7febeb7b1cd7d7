"""Configurations: strict merging, one-line errors that name the dotted path, shipped files that all build."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from ldm.config import differences, find_config, from_dict, load_config, shipped_names, to_dict, to_yaml
from ldm.models.autoencoder import make_autoencoder
from ldm.models.clip import TextEncoder
from ldm.models.unet import UNet
from train.tasks.autoencoder import AutoencoderTaskConfig
from train.tasks.controlnet import ControlNetTaskConfig
from train.tasks.diffusion import DiffusionTaskConfig
from train.tasks.dreambooth import DreamBoothTaskConfig
from train.tasks.lora import LoRATaskConfig
from train.tasks.textual_inversion import TextualInversionTaskConfig

# By a key that the others' shipped files have not
PERSONAL = {
    "lora": LoRATaskConfig,
    "lora_text": LoRATaskConfig,
    "tokens": TextualInversionTaskConfig,
    "prior": DreamBoothTaskConfig,
}


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    widths: tuple[int, ...] = (1, 2)
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    path: str
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    flag: bool = False


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_layers_win_in_order(tmp_path):
    file = write(tmp_path, "path: a\ninner:\n  lr: 1e-4\n")
    config = load_config(Outer, file, ["inner.widths=[3,4,5]", "flag=true"])
    assert config == Outer("a", Inner(1e-4, (3, 4, 5)), None, True)


def test_scientific_notation_is_a_number(tmp_path):
    """`1e-4` is a string to plain PyYAML."""
    assert load_config(Outer, write(tmp_path, "path: a\ninner: {lr: 5e-5}\n")).inner.lr == 5e-5


def test_an_optional_part_can_be_left_out_or_given(tmp_path):
    assert load_config(Outer, write(tmp_path, "path: a\nmaybe: null\n")).maybe is None
    assert load_config(Outer, write(tmp_path, "path: a\nmaybe: {name: b}\n")).maybe == Inner(name="b")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path: a\ninner:\n  learning_rte: 1\n", "inner.learning_rte"),
        ("path: a\ninner:\n  lr: fast\n", "lr"),
        ("path: a\ninner: 3\n", "inner"),
        ("path: a\nflag: maybe\n", "flag"),
        ("- path\n", "list"),
        ("path: a\npath: b\n", "duplicate"),
        ("path: [unclosed\n", "YAML"),
        ("inner: {lr: 1}\n", "path"),
        ("path: ${oc.env:HOME}\n", "interpolation"),
        ("path: a\n_target_: os.system\n", "_target_"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_config(Outer, write(tmp_path, text))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("inner.lrr=1", "did you mean inner.lr"),
        ("inner.lr=fast", "inner.lr"),
        ("flag", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(override, told):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_config(Outer, None, ["path=a", override])
    assert told in str(error.value)


def test_round_trips():
    config = Outer("a", Inner(2e-4, (7,), "x"), Inner(), True)
    assert from_dict(Outer, to_dict(config)) == config
    assert from_dict(Outer, yaml.safe_load(to_yaml(config))) == config


def test_differences_name_the_leaf():
    a, b = to_dict(Outer("a")), to_dict(Outer("a", Inner(lr=1.0)))
    assert differences(a, b) == ["inner.lr: 0.001 -> 1.0"]
    assert differences(a, a) == []


def test_missing_config_names_near_ones():
    with pytest.raises(FileNotFoundError, match="configs/train/emoji.yaml"):
        find_config("configs/train/emojis.yaml")


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/train/emoji.yaml").is_file()


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("configs/train/")])
def test_every_shipped_training_config_builds(name):
    """On the meta device, so that size does not matter."""
    keys = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
    with torch.device("meta"):
        if "unet" in keys:
            config = load_config(DiffusionTaskConfig, find_config(name))
            networks = [UNet(config.unet), *([TextEncoder(config.text)] if config.text else [])]
        elif "subject" in keys:
            cls = next(cls for key, cls in PERSONAL.items() if key in keys)
            assert load_config(cls, find_config(name)).model
            networks = []
        elif "hints" in keys or "controlled" in keys:
            assert load_config(ControlNetTaskConfig, find_config(name)).model
            networks = []
        else:
            networks = [make_autoencoder(load_config(AutoencoderTaskConfig, find_config(name)).autoencoder)]
    assert all(parameter.is_meta for network in networks for parameter in network.parameters())
