"""How pictures are sampled, as values: what a caller of `Pipeline.txt2img` and its like may set.

Frozen dataclasses without behaviour. The commands fill them from their options, `stream.py` reads them,
`guiding.py` turns a `Guidance` into a denoiser and `words.py` a `Wording` into contexts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm.models.controlled import Control
from ldm.models.weighting import INTERPRETATIONS
from sample.prompts import SYNTAXES

RULES = ("linear", "projected", "plusplus")  # classifier-free, APG, CFG++
LONG = ("auto", "chunks", "cut")

Variation = tuple[int, float | int]  # another seed and how far towards it, 0 to 1


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt acts, by which rule; see `ldm/diffusion/guidance.py` and `guidance_rules.py`.

    scale: 1 is the prompt as trained, above 1 exaggerates it, 0 ignores and below 0 avoids it. With
        "plusplus" it is CFG++'s strength, 0 to 1 in the paper.
    rule: one of RULES. eta, norm, momentum: of "projected".
    rescale: 0 to 1, how far the deviation is brought back to the conditional one's (Lin et al. 2023).
    interval: (low, high), guide only at noise levels low < sigma <= high.
    threshold: (percentile, limit) of dynamic thresholding.
    perturbed: scale of perturbed-attention guidance, 0 is without; perturbed_layers: where.
    image: scale of the picture, for a model that edits a picture as the prompt says (InstructPix2Pix); there
        `scale` is that of the text.
    weak: a weaker model (`Parts`) in the place of the unconditional prediction: autoguidance. No control
        acts on it.
    together: evaluate both predictions in one batch; False takes less memory.
    """

    scale: float | int = 7.5
    rule: str = "linear"
    eta: float | int = 0.0
    norm: float | int | None = None
    momentum: float | int = 0.0
    rescale: float | int = 0.0
    interval: tuple[float | int, float | int] | None = None
    threshold: tuple[float | int, float | int] | None = None
    perturbed: float | int = 0.0
    perturbed_layers: str = "mid"
    image: float | int | None = None
    weak: Any = None
    together: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"guidance rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        for name in ("scale", "perturbed"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"guidance {name} must be a finite number, got {value}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale must be between 0 and 1, got {self.rescale}")
        if self.rule != "projected" and (self.eta, self.norm, self.momentum) != (0, None, 0):
            raise ValueError("eta, norm and momentum are options of the guidance rule projected alone")
        if self.rule == "plusplus" and (self.rescale or self.interval or self.perturbed):
            raise ValueError(
                "guidance rule plusplus does not go with rescale, interval or perturbed attention"
            )

    @property
    def plain(self) -> bool:
        """Whether it is classifier-free guidance and nothing else."""
        return self == Guidance(self.scale)


@dataclass(frozen=True)
class Wording:
    """How prompts are read; see `sample/prompts.py` and `ldm/models/weighting.py`. The default is the text as
    it stands; the commands' is the web UI's.

    syntax: a key of `SYNTAXES`: "webui" (emphasis, AND, BREAK, schedules), "webui-none" (the same without
        emphasis), "comfy" (emphasis of round brackets alone) or "plain" (every character is text). Models
        without a CLIP text tower take plain text whatever this says.
    weighting: what a weight does, a key of `INTERPRETATIONS`.
    skip: layers to leave out at the end of the text tower (diffusers' clip_skip; the web UI counts from 1).
    long: prompts that exceed the tower's length are read in "chunks" or "cut"; "auto" cuts where the UNet
        reads the prompt's last token as a vector, which would be that of the last chunk alone.
    backtrack: how far a full chunk looks back for a comma to end at.
    shares: weights of prompts joined by AND are divided by their sum: "Van Gogh:3 AND Monet:2".
    """

    syntax: str = "plain"
    weighting: str = "original"
    skip: int = 0
    long: str = "auto"
    backtrack: int = 20
    shares: bool = False

    def __post_init__(self) -> None:
        for name, known in (("syntax", SYNTAXES), ("weighting", INTERPRETATIONS), ("long", LONG)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} of prompts must be one of {', '.join(known)}, got {value!r}")
        if self.skip < 0 or self.backtrack < 0:
            raise ValueError(f"skip and backtrack must be at least 0, got {self.skip} and {self.backtrack}")


@dataclass(frozen=True)
class Sampling:
    """All that `stream` is told besides the prompts and the pictures to start from.

    negative: prompt to move away from, for all.
    seed: picture i draws its noise as number i of it, whatever the batch.
    steps: denoising steps; the network is evaluated as often, or twice unless guidance is 0 or 1.
    sampler, eta, options: its name in `samplers.SAMPLERS`, how much noise one that has it adds (None is its
        own default), further options by name, such as {"order": 3}.
    schedule: name of the noise levels visited, see `grids.GRIDS`; None is the sampler's usual one.
    guidance: a number is `Guidance(number)`.
    size: (W, H) in pixels; None is the size the model was trained on.
    variation: (another seed, how far to go towards its noise): 0 is `seed`, 1 is the other.
    controls: ControlNets with their hints, see `ldm/models/controlled.py`; hints of another size are cut and
        resized to the pictures'.
    """

    negative: str = ""
    seed: int = 0
    steps: int = 50
    sampler: str = "ddim"
    guidance: Guidance | float | int = 7.5
    size: tuple[int, int] | None = None
    eta: float | int | None = None
    schedule: str | None = None
    options: Mapping[str, float | int | str] | None = None
    variation: Variation | None = None
    wording: Wording = field(default_factory=Wording)
    controls: Sequence[Control] = ()

    @property
    def guide(self) -> Guidance:
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(self.guidance)
