"""For the tests of textual inversion, DreamBooth and LoRA: five pictures, a model of random weights, commands."""

from pathlib import Path

import torch
from networks import randomised
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from ldm.config import find_config, load_config
from ldm.diffusion.schedule import DiffusionConfig
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from sample.pipeline import Pipeline
from train.tasks.dreambooth import DreamBoothTask, DreamBoothTaskConfig
from train.tasks.lora import LoRATask, LoRATaskConfig
from train.tasks.textual_inversion import TextualInversionTask, TextualInversionTaskConfig

TASKS = {
    "lora": (LoRATask, LoRATaskConfig, "configs/train/emoji_lora.yaml"),
    "dreambooth": (DreamBoothTask, DreamBoothTaskConfig, "configs/train/emoji_dreambooth.yaml"),
    "textual-inversion": (
        TextualInversionTask,
        TextualInversionTaskConfig,
        "configs/train/emoji_textual_inversion.yaml",
    ),
}
RUN = [
    "run.device=cpu",
    "run.steps=4",
    "run.warmup=0",
    "run.checkpoint_every=2",
    "run.validate_every=2",
    "run.preview_every=0",
    "run.log_every=1",
    "preview.steps=2",
    "data.size=32",
    "validation_size=4",
]
LORA = ["lora.rank=2"]
PRIOR = ["prior.count=3", "prior.steps=2", "prior.weight=1.0", "subject.noun=dog"]
UNET = UNetConfig(
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    norm_groups=4,
    context_dim=16,
    sample_size=16,
)


def make(folder: Path) -> Path:
    """Five pictures in `folder/pictures`, in `folder/model` a model for them, and beside these the shipped
    configurations made small."""
    (folder / "pictures").mkdir()
    for number in range(5):
        picture = Image.new("RGB", (32 + number, 40), "white")
        low = 2 + 2 * number
        ImageDraw.Draw(picture).rectangle([low, low, low + 12, low + 8], fill=(200, 30 * number, 30))
        picture.save(folder / "pictures" / f"{number}.png")
    torch.manual_seed(0)
    stage = AutoencoderConfig(base_channels=4, channel_mult=(1, 1), num_res_blocks=1, norm_groups=2)
    text = TextEncoder(TextConfig(width=16, layers=2, heads=2, mlp_width=32))
    parts = [randomised(each) for each in (UNet(UNET), AutoencoderKL(stage), text)]
    Pipeline(*parts, DiffusionConfig(prediction="v"), device="cpu").save(folder / "model", torch.float32)
    given = [f"data.path={folder / 'pictures'}", f"model={folder / 'model'}", *RUN]
    for task, (_, _, shipped) in TASKS.items():
        own = {"lora": LORA, "dreambooth": PRIOR, "textual-inversion": []}[task]
        config = OmegaConf.merge(OmegaConf.load(find_config(shipped)), OmegaConf.from_dotlist([*given, *own]))
        OmegaConf.save(config, folder / f"{task}.yaml")
    return folder


def options(task: str, folder: Path, out: Path, *more: str) -> list[str]:
    """The command; `more` overrides."""
    return [task, str(folder / f"{task}.yaml"), f"run.out={out}", *more]


def task_of(task: str, folder: Path, out: Path, *more: str):
    cls, config, _ = TASKS[task]
    _, file, *overrides = options(task, folder, out, *more)
    return cls(load_config(config, file, overrides))


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> list[str]:
    return [name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)]


def with_gradient(task) -> set[str]:
    """The networks of the task in which a parameter has a gradient, and those that ask for one."""
    networks = {"unet": task.unet, "text": task.text_encoder, "first stage": task.autoencoder}
    own = {id(p) for player in task.players.values() for p in player.parameters.values()}
    return {
        name
        for name, network in networks.items()
        for parameter in network.parameters()
        if id(parameter) not in own and (parameter.grad is not None or parameter.requires_grad)
    }
