"""What `ldm-train personalise` asks a model before and after it learned a subject.

    similarity   mean cosine between pictures of the subject's name and the pictures that were learned, or
                 the one of them that shows the same thing, where they share a style and nothing else;
                 of the model as it was ("base"), where the name is that of the class
    unlearned    the same of other things in that style, whose pictures were held out
    fidelity     share of pictures of other, known captions that still show them (`evaluation.py`)
    drift        mean of 1 - cosine between pictures of the class's prompts before and after, of equal seeds:
                 0 where the class is what it was

These are the measures of DreamBooth (Ruiz et al. 2023, arXiv:2208.12242, section 4.1) in the features of a
network that is named. Pictures of emoji are all alike in that they are emoji: features count from the mean
of those of other things (`evaluate.others`), drawn by the model as it was.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.config import to_dict
from ldm.device import pick_device
from sample.features import find_pictures, load_extractor
from sample.images import read_rgb, save_grid, to_pil
from sample.pipeline import Pipeline
from sample.questions import concepts_of
from train.ablation_table import read_json, write_json
from train.data import DataConfig
from train.entries import list_images
from train.evaluation import Evaluation, fidelity
from train.tasks.dreambooth import DreamBoothTaskConfig

JUDGED = "judged.json"  # in a run's folder, and in that of the model as it was
AT_ONCE = 12  # pictures drawn together


@dataclass(frozen=True)
class Asked:
    """What finished models are asked, the same of all.

    prompts: with `{}` for the subject's name; references: for each of these the picture in the subject's
    folder that it is compared with; none: all that were learned. unlearned: more such prompts, each with
    its held-out picture in that folder, for the value of that name. class_prompts: with `{}` for the class's
    noun; others: of other things, see above. each: pictures a prompt. features, side: as `ldm-sample
    evaluate --features` and `--feature-size`. data, captions, config: the folder of `ldm-train prepare
    emoji`, how many captions fidelity is of, and the training configuration whose concepts are known;
    without a folder there is no fidelity.
    """

    prompts: tuple[str, ...]
    class_prompts: tuple[str, ...]
    others: tuple[str, ...]
    references: tuple[str, ...] = ()
    unlearned: dict[str, str] = field(default_factory=dict)
    each: int = 4
    features: str = "hed"
    side: int | None = None
    data: str = ""
    captions: int = 36
    config: str | None = None
    steps: int = 20
    guidance: float = 4.0
    seed: int = 1000

    def __post_init__(self) -> None:
        if not self.prompts or not self.class_prompts or not self.others:
            raise ValueError("evaluate.prompts, class_prompts and others: at least one prompt of each")
        if self.each < 1 or self.steps < 1 or self.captions < 1:
            raise ValueError(
                f"evaluate.each {self.each}, steps {self.steps}, captions {self.captions} must be at least 1"
            )
        if len(self.references) not in (0, len(self.prompts)):
            told = f"{len(self.references)} for {len(self.prompts)} prompts"
            raise ValueError(f"evaluate.references: {told}; give one for each, or none")
        if unnamed := [text for text in (*self.prompts, *self.unlearned) if "{}" not in text]:
            raise ValueError(
                f"evaluate.prompts and unlearned: {unnamed[0]!r} has no {{}} for the subject's name"
            )


def name_of(config: Any) -> str:
    """What prompts call the subject after this training."""
    words = getattr(config, "tokens", None)
    identifier = config.subject.identifier or (words.identifier if words else "")
    return f"{identifier} {config.subject.noun}".strip()


def judged(folder: Path, asked: Asked) -> bool:
    """Whether the answers there are to these questions."""
    path = folder / JUDGED
    return path.is_file() and read_json(path)["settings"] == to_dict(asked)


class Judge:
    """Asks models; what is the same for all is computed once, when it is first needed."""

    def __init__(self, model: str, pictures: str, noun: str, asked: Asked, caption_column: str = "text"):
        """model: as it was; pictures: the folder that was learned; noun: of its class; caption_column: of
        the folder's metadata.jsonl, where it has one.

        Raises ValueError for a folder without pictures, a reference that is not in it, and as
        `load_extractor`.
        """
        self.model, self.noun, self.asked = model, noun, asked
        self.folder = Path(pictures).expanduser()
        splits = {entry.path: entry.split for entry in list_images(self.folder, caption_column)}
        self.files = [file for file in find_pictures(self.folder) if (splits.get(file) or "train") == "train"]
        named = [self.folder / name for name in (*asked.references, *asked.unlearned.values())]
        if missing := [file for file in named if not file.is_file()]:
            raise ValueError(f"evaluate.references and unlearned: no picture {missing[0]}")
        self.device = pick_device("auto").type
        self.extractor = load_extractor(asked.features, asked.side, self.device)

    @cached_property
    def zero(self) -> Float[Tensor, "1 D"]:
        """What all pictures of the base have in common."""
        pipe = Pipeline.load(self.model, self.device)
        made = self._draw(pipe, self.asked.others, "", 1, 2)
        return self.extractor.look(to_pil(made), device=self.device)[0].mean(dim=0, keepdim=True)

    @cached_property
    def subject(self) -> Float[Tensor, "N D"]:
        return self._directions([read_rgb(file, self.size) for file in self.files])

    @cached_property
    def size(self) -> int:
        pipe = Pipeline.load(self.model, self.device)
        return pipe.latent_shape()[1] * pipe.autoencoder.factor

    @cached_property
    def class_before(self) -> Float[Tensor, "N D"]:
        return self._directions(to_pil(self._class(Pipeline.load(self.model, self.device))))

    def base(self, folder: Path) -> None:
        """The model as it was; and how alike the pictures of the subject are among themselves."""
        self._answer(Pipeline.load(self.model, self.device), self.noun, folder)

    def trained(self, folder: Path, config: Any) -> None:
        """A finished run's model."""
        model = folder / "model"
        if isinstance(config, DreamBoothTaskConfig):
            pipe = Pipeline.load(model.resolve(), self.device)
        else:
            pipe = Pipeline.load(self.model, self.device)
            if (model / "lora.safetensors").is_file():
                pipe.add_lora(model / "lora.safetensors")
            if (model / "embedding.safetensors").is_file():
                pipe.add_embedding(model / "embedding.safetensors")
        self._answer(pipe, name_of(config), folder)

    def _answer(self, pipe: Pipeline, name: str, folder: Path) -> None:
        asked, before = self.asked, self.class_before
        made, after = self._draw(pipe, asked.prompts, name, asked.each, 0), self._class(pipe)
        save_grid(made, folder / "subject.png", asked.each)
        save_grid(after, folder / "class.png", asked.each)
        values = {
            "similarity": self.likeness(to_pil(made), asked.references),
            "drift": float(1 - (self._directions(to_pil(after)) * before).sum(dim=1).mean()),
        }
        if asked.unlearned:
            made = self._draw(pipe, tuple(asked.unlearned), name, asked.each, 0)
            save_grid(made, folder / "unlearned.png", asked.each)
            values["unlearned"] = self.likeness(to_pil(made), tuple(asked.unlearned.values()))
        if asked.data:
            told = DataConfig(asked.data, self.size, concepts=tuple(sorted(concepts_of(asked.config))))
            questions = Evaluation(captions=asked.captions, steps=asked.steps, seed=asked.seed)
            values["fidelity"] = fidelity(pipe, told, questions, asked.guidance)
        write_json(folder / JUDGED, {"settings": to_dict(asked), "values": values})

    def likeness(self, pictures: list[Any], references: tuple[str, ...]) -> float:
        """Mean cosine with all that were learned; or of `each` pictures of a prompt with its reference."""
        if not references:
            return float((self._directions(pictures) @ self.subject.T).mean())
        own = self._directions([read_rgb(self.folder / name, self.size) for name in references])  # (R, D)
        alike = self._directions(pictures).unflatten(0, (-1, self.asked.each)) * own[:, None]  # (R, each, D)
        return float(alike.sum(dim=2).mean())

    def _class(self, pipe: Pipeline) -> Float[Tensor, "N 3 H W"]:
        return self._draw(pipe, self.asked.class_prompts, self.noun, self.asked.each, 1)

    def _draw(
        self, pipe: Pipeline, prompts: tuple[str, ...], name: str, each: int, nth: int
    ) -> Float[Tensor, "N 3 H W"]:
        """`each` pictures a prompt; nth: of the draws, which share no noise."""
        texts = [text.replace("{}", name) for text in prompts for _ in range(each)]
        how: dict[str, Any] = {"steps": self.asked.steps, "guidance": self.asked.guidance}
        return pipe.txt2img(texts, seed=self.asked.seed + nth, batch=AT_ONCE, **how)

    def _directions(self, pictures: list[Any]) -> Float[Tensor, "N D"]:
        """Features of length 1, counted from what all pictures have in common."""
        return F.normalize(self.extractor.look(pictures, device=self.device)[0] - self.zero, dim=1)
