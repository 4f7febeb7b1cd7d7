"""ControlNets in sampling: by hand, against diffusers' pipeline, when and on what they act, and what they leave."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import randomised
from torch import Tensor
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.models.controlled import Acting, Control, Controlled, acts
from ldm.models.controlnet import ControlNet, ControlNetConfig
from ldm.models.deep_cache import DeepCache
from ldm.models.unet import UNet, UNetConfig
from sample.control import Steering, check, fitted
from sample.pipeline import Pipeline
from sample.settings import Guidance, Wording
from sample.start import Start

WIDTHS = (4, 6, 8)  # for a factor of 4
HOW: dict[str, Any] = {"steps": 2, "seed": 5}
PROMPTS = ["an apple", "a fish"]


def trained(pipe: Pipeline, seed: int = 0, **changed: Any) -> ControlNet:
    """A ControlNet with a strong opinion."""
    torch.manual_seed(seed)
    config = ControlNetConfig(replace(pipe.unet.config, **changed), hint_widths=WIDTHS)
    return randomised(ControlNet(config))


@pytest.fixture(scope="module")
def net(pipe: Pipeline) -> ControlNet:
    return trained(pipe)


@pytest.fixture(scope="module")
def other(pipe: Pipeline) -> ControlNet:
    return trained(pipe, 1)


def hints(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def made(pipe: Pipeline, prompts: list[str], **how: Any) -> Tensor:
    *_, step = pipe.stream(prompts, **{**HOW, **how})
    return step.sample


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Batches of all calls of a method of ControlNet."""
    calls: list[int] = []
    method: Callable[..., Any] = getattr(ControlNet, name)

    def counting(self: ControlNet, x: Tensor, *rest: Any) -> Any:
        calls.append(len(x))
        return method(self, x, *rest)

    monkeypatch.setattr(ControlNet, name, counting)
    return calls


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_by_hand(pipe: Pipeline, net: ControlNet, other: ControlNet, together: bool) -> None:
    """Two ControlNets, guided, DDIM: x0 of each prediction with the sum of the scaled residuals."""
    features = [(0.7, net, net.encode_hint(hints(2))), (-0.4, other, other.encode_hint(hints(1, 1)))]

    def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        both = [[scale * r for r in each(x, t, context, f)] for scale, each, f in features]
        return pipe.unet(x, t, context, control=[a + b for a, b in zip(*both, strict=True)])

    denoise, context = Denoiser(network, pipe.schedule), pipe.encode_prompts([*PROMPTS, ""])
    cond, uncond = context[:2], context[[2, 2]]
    controls = [Control(net, hints(2), 0.7), Control(other, hints(1, 1), -0.4)]
    steps = list(pipe.stream(PROMPTS, controls=controls, guidance=Guidance(4.0, together=together), **HOW))
    for before, step in itertools.pairwise(steps):
        worse, better = (denoise(before.x, before.sigma, context=each) for each in (uncond, cond))
        assert_close(step.denoised, worse + 4 * (better - worse), rtol=0, atol=2e-5)
    assert float((steps[-1].sample - made(pipe, PROMPTS, guidance=4.0)).abs().max()) > 0.1


PARITY: dict[str, dict[str, Any]] = {
    "one": {"scales": [0.8]},
    "two, parts of the steps": {"scales": [0.8, -0.5], "ranges": [(0.0, 0.7), (0.3, 1.0)]},
    "guess mode": {"scales": [0.9], "guess": True},
    "two in guess mode": {"scales": [0.9, 0.6], "guess": True},
    "without guidance": {"scales": [1.0], "guidance": 1.0},
}


@pytest.mark.parametrize("case", PARITY)
def test_the_loop_is_that_of_diffusers(pipe: Pipeline, case: str) -> None:
    """The whole controlled, guided loop of their pipeline: equal weights, contexts and noise."""
    diffusers = pytest.importorskip("diffusers")
    from ldm.weights.diffusers import to_diffusers
    from ldm.weights.diffusers_config import unet_json

    settings = PARITY[case]
    scales, guess, guidance = settings["scales"], settings.get("guess", False), settings.get("guidance", 6.0)
    ranges = settings.get("ranges", [(0.0, 1.0)] * len(scales))
    nets = [trained(pipe, i) for i in range(len(scales))]
    unet = diffusers.UNet2DConditionModel.from_config(unet_json(pipe.unet.config))
    unet.load_state_dict(to_diffusers(pipe.unet.state_dict(), pipe.unet.config))
    theirs = []
    for own in nets:
        their = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=WIDTHS)
        their.load_state_dict(to_diffusers(own.state_dict(), own.config))
        theirs.append(their.eval())
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    loop = diffusers.StableDiffusionControlNetPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler,
        controlnet=theirs if len(theirs) > 1 else theirs[0], safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    loop.set_progress_bar_config(disable=True)
    context = pipe.encode_prompts([*PROMPTS, ""])
    images = [hints(1, i) for i in range(len(nets))]

    def listed(values: list[Any]) -> Any:
        return values if len(nets) > 1 else values[0]

    expected = loop(
        prompt_embeds=context[:2], negative_prompt_embeds=context[[2, 2]], image=listed(images),
        num_inference_steps=5, guidance_scale=guidance, controlnet_conditioning_scale=listed(scales),
        guess_mode=guess, control_guidance_start=listed([r[0] for r in ranges]),
        control_guidance_end=listed([r[1] for r in ranges]), height=32, width=32, output_type="latent",
        latents=pipe.draw("image", (4, 8, 8), 5, range(2)),
    ).images  # fmt: skip
    mode = "diffusers" if guess else None
    controls = [
        Control(own, image, scale, *each, mode)
        for own, image, scale, each in zip(nets, images, scales, ranges, strict=True)
    ]
    latents = made(pipe, PROMPTS, steps=5, guidance=guidance, controls=controls)
    assert float((latents - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((made(pipe, PROMPTS, steps=5, guidance=guidance) - expected).abs().max()) > 0.05


def test_the_controlnet_reads_latents_alone_or_the_channels_too(pipe: Pipeline) -> None:
    """Of a UNet for inpainting, which reads nine."""
    config = replace(pipe.unet.config, in_channels=9)
    torch.manual_seed(2)
    unet, context = randomised(UNet(config)), torch.randn(2, 3, 16)
    x, t, channels = torch.randn(2, 4, 8, 8), torch.tensor([5, 7]), torch.randn(2, 5, 8, 8)
    for in_channels in (4, 9):
        own = trained(pipe, in_channels=in_channels)
        features = own.encode_hint(hints(2))
        seen = x if in_channels == 4 else torch.cat([x, channels], dim=1)
        steered = Controlled(
            lambda x, t, channels, **more: unet(torch.cat([x, channels], dim=1), t, **more),
            [Acting(Control(own, hints(2), 0.5), features)],
        )
        residuals = [0.5 * r for r in own(seen, t, context, features)]
        expected = unet(torch.cat([x, channels], dim=1), t, context, control=residuals)
        assert torch.equal(steered(x, t, context=context, channels=channels), expected)


# --- when it leaves the picture alone -----------------------------------------------------------------------

GUIDANCES: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 4.0},
    "apart": {"guidance": Guidance(4.0, together=False)},
    "plain": {"guidance": 1.0},
    "perturbed attention": {"guidance": Guidance(3.0, perturbed=2.0)},
    "a prompt that changes": {"prompts": ["[a:b:0.5]", "a"], "wording": Wording(syntax="webui")},
    "several prompts": {"prompts": ["a AND b:0.5", "c"], "wording": Wording(syntax="webui")},
    "chunks of other lengths": {"prompts": ["one " * 80, "c"]},
    "projected, in an interval": {
        "guidance": Guidance(3.0, "projected", momentum=-0.5, interval=(0.5, 9.0), threshold=(0.9, 2.0))
    },
    "heun": {"sampler": "heun"},
}


@pytest.mark.parametrize("case", GUIDANCES)
def test_zero_changes_no_bit_and_trained_steers_every_picture(
    pipe: Pipeline, net: ControlNet, case: str
) -> None:
    """Scale 0, a fresh ControlNet, one in guess mode: the pictures without control. Else each picture is the
    one it is alone, with a hint of its own."""
    how = dict(GUIDANCES[case])
    prompts = how.pop("prompts", PROMPTS)
    plain = made(pipe, prompts, **how)
    fresh = ControlNet.from_unet(pipe.unet, hint_widths=WIDTHS)
    for nothing in (
        Control(net, hints(2), 0.0),
        Control(fresh, hints(1)),
        Control(fresh, hints(1), guess="original"),
    ):
        assert torch.equal(made(pipe, prompts, controls=[nothing], **how), plain)
    for guess in (None, "original"):
        steered = made(pipe, prompts, controls=[Control(net, hints(2), guess=guess)], **how)
        assert ((steered - plain).flatten(1).abs().amax(1) > 0.02).all()
        for i in range(2):
            control = Control(net, hints(2)[i : i + 1], guess=guess)
            alone = made(pipe, prompts[i : i + 1], first=i, controls=[control], **how)
            assert float((steered[i] - alone[0]).abs().max() / alone.abs().max()) < 5e-4  # rounding, guided


@pytest.mark.parametrize("guess", ["original", "diffusers"])
def test_guess_mode_spares_the_unconditional(pipe: Pipeline, net: ControlNet, guess: str) -> None:
    control = Control(net, hints(1), guess=guess)
    assert torch.equal(made(pipe, PROMPTS, guidance=0, controls=[control]), made(pipe, PROMPTS, guidance=0))
    assert not torch.equal(
        made(pipe, PROMPTS, guidance=1, controls=[control]), made(pipe, PROMPTS, guidance=1)
    )


def test_scales_of_guess_mode(net: ControlNet) -> None:
    control = Control(net, hints(1), 2.0)
    assert control.scales(13) == [2.0] * 13
    original = [2 * 0.825 ** (12 - i) for i in range(13)]  # of the ControlNet repository's demos
    assert replace(control, guess="original").scales(13) == original
    assert_close(torch.tensor(replace(control, guess="diffusers").scales(13)), 2 * torch.logspace(-1, 0, 13))


def test_pooled_residuals_are_of_prompts_alone_and_unweakened(pipe: Pipeline, net: ControlNet) -> None:
    config = replace(net.config, global_pool=True)
    pooled = randomised(ControlNet(config))
    control = Control(pooled, hints(1), 0.5, guess="original")
    assert control.scales(3) == [0.5] * 3
    control = replace(control, guess=None)
    assert torch.equal(made(pipe, PROMPTS, guidance=0, controls=[control]), made(pipe, PROMPTS, guidance=0))


def test_the_weaker_model_goes_without(pipe: Pipeline, net: ControlNet) -> None:
    """Autoguidance, D + (s - 1)(D - weak): from the weak prediction alone, none of the control."""
    weak = Guidance(0.0, weak=pipe)
    for guess in (None, "original"):
        controls = [Control(net, hints(1), guess=guess)]
        assert torch.equal(
            made(pipe, PROMPTS, guidance=weak, controls=controls), made(pipe, PROMPTS, guidance=1.0)
        )
        both = made(pipe, PROMPTS, guidance=Guidance(2.0, weak=pipe), controls=controls)
        assert not torch.equal(both, made(pipe, PROMPTS, guidance=1.0, controls=controls))


# --- when it acts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1, range(10)),
        (0, 0.3, range(3)),
        (0.3, 1, range(3, 10)),
        (0.25, 0.75, range(3, 7)),
        (0.5, 0.55, range(0)),
    ],
)
def test_steps_of_a_range(start: float, end: float, expected: range) -> None:
    assert [step for step in range(10) if acts(step, 10, start, end)] == list(expected)


def test_once_a_picture_and_once_a_step(
    pipe: Pipeline, net: ControlNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, run = counted(monkeypatch, "encode_hint"), counted(monkeypatch, "forward")
    made(pipe, PROMPTS, steps=5, controls=[Control(net, hints(2), end=0.6)])
    assert (encoded, run) == ([2], [2, 2, 2])  # x goes in once for both predictions
    encoded.clear(), run.clear()
    prompts = ["a", "one " * 80, "b"]  # in two groups
    pipe.txt2img(prompts, batch=3, steps=2, controls=[Control(net, hints(3))])
    assert encoded == [3]
    assert sum(run) == 2 * 4  # a group whose context is longer than the empty prompt's goes apart


def test_the_last_steps_of_img2img(pipe: Pipeline, net: ControlNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The range is of the steps that are taken."""
    run = counted(monkeypatch, "forward")
    start = Start(torch.zeros(2, 4, 8, 8), 0.5)
    assert (
        len(list(pipe.stream(PROMPTS, start=start, steps=8, controls=[Control(net, hints(1), 0.5, 0.5)])))
        == 4
    )
    assert len(run) == 2


# --- hints --------------------------------------------------------------------------------------------------


def test_hints_of_another_size() -> None:
    """Cut about the centre, resized without a shift, within [0, 1]; nothing is done to those of the size."""
    hint = hints(1)
    assert fitted(hint, (32, 32)) is hint
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 32, 64)
    small = fitted(ramp, (16, 16))
    assert small.shape == (1, 3, 16, 16)
    assert_close(
        small[0, 0, 8], torch.linspace(0, 1, 64)[16:48].unflatten(0, (16, 2)).mean(1), rtol=0, atol=0.01
    )
    lines = torch.zeros(1, 3, 8, 8)
    lines[..., 4] = 1
    large = fitted(lines, (64, 48))
    assert large.shape == (1, 3, 48, 64)
    assert float(large.min()) == 0 and 0.95 < float(large.max()) <= 1


def test_a_hint_is_resized_to_each_size(pipe: Pipeline, net: ControlNet) -> None:
    large = torch.rand(1, 3, 64, 48)
    control = Control(net, large)
    for size in ((32, 32), (24, 40)):
        by_hand = Control(net, fitted(large, size))
        expected = made(pipe, ["a"], size=size, controls=[by_hand])
        assert torch.equal(made(pipe, ["a"], size=size, controls=[control]), expected)


def test_from_python(pipe: Pipeline, net: ControlNet) -> None:
    """A hint a picture, in batches; from pictures; in a hole of them."""
    controls, how = [Control(net, hints(3))], {"steps": 2, "guidance": 3}
    prompts, images, mask = (
        ["a", "b", "c"],
        torch.zeros(1, 3, 32, 32),
        torch.zeros(1, 32, 32, dtype=torch.bool),
    )
    mask[:, 8:24, 8:24] = True
    for call in (
        lambda **more: pipe.txt2img(prompts, **more, **how),
        lambda **more: pipe.img2img(images, prompts, strength=1, **more, **how),
        lambda **more: pipe.inpaint(images, mask, prompts, **more, **how),
    ):
        whole, plain = call(controls=controls, batch=3), call(batch=3)
        assert_close(call(controls=controls, batch=2), whole, rtol=0, atol=1e-4)
        assert ((whole - plain).flatten(1).abs().amax(1) > 0.01).all()
    assert torch.equal(whole[:, :, :8], plain[:, :, :8])


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": float("nan")}, "control scale must be a finite number, got nan"),
        ({"scale": float("inf")}, "got inf"),
        ({"start": 0.6, "end": 0.4}, "0 <= start < end <= 1 of the steps, got 0.6 and 0.4"),
        ({"end": 1.5}, "got 0.0 and 1.5"),
        ({"start": float("nan")}, "got nan and 1.0"),
        ({"guess": "a4"}, "guess mode must be one of original, diffusers, got 'a4'"),
        ({"hint": torch.zeros(0, 3, 32, 32)}, "at least one hint, got none"),
        ({"hint": torch.full((1, 3, 32, 32), 255.0)}, "between 0 and 1, got 255 to 255"),
        ({"hint": torch.full((1, 3, 32, 32), float("nan"))}, "between 0 and 1, got nan to nan"),
    ],
)
def test_values_of_a_control(net: ControlNet, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Control(**{"controlnet": net, "hint": hints(1), **values})


def test_what_does_not_fit(pipe: Pipeline, net: ControlNet, build: Callable[..., Pipeline]) -> None:
    def refused(message: str, control: Control, parts: Pipeline = pipe) -> None:
        with pytest.raises(ValueError, match=message):
            check(parts, [control])

    wide = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=24, norm_groups=4)
    hint = hints(1)
    refused(
        r"another UNet: model_channels 32 \(the UNet's 16\), context_dim 24 \(the UNet's 16\)",
        Control(ControlNet(ControlNetConfig(wide, hint_widths=WIDTHS)), hint),
    )
    refused("factor 8, this one has 4", Control(ControlNet(ControlNetConfig(pipe.unet.config)), hint))
    refused("reads 5 channels of latents, this model's have 4", Control(trained(pipe, in_channels=5), hint))
    refused("a hint of 3 channels, got 1", Control(net, hint[:, :1]))
    half = ControlNet(net.config).to(torch.float16)
    refused("in torch.float16 on cpu, the model in torch.float32 on cpu", Control(half, hint))
    cached = build()
    cached.network = DeepCache(cached.unet, 2)
    refused("DeepCache leaves out the layers that a ControlNet steers", Control(net, hint), cached)
    with pytest.raises(ValueError, match="3 hints for 2 pictures; expected one, or one each"):
        made(pipe, PROMPTS, controls=[Control(net, hints(3))])
    with pytest.raises(ValueError, match="3 hints for 2 pictures; expected one, or one each"):
        pipe.txt2img(PROMPTS, controls=[Control(net, hints(3))], **HOW)


def test_rows_of_a_steering(pipe: Pipeline, net: ControlNet) -> None:
    steering = Steering.of(pipe, [Control(net, hints(3)), Control(net, hints(1))], (4, 8, 8), 3)
    several, one = steering.rows([2, 0]).all
    assert torch.equal(several.features, net.encode_hint(hints(3)[[2, 0]]))
    assert torch.equal(one.features, net.encode_hint(hints(1)))
