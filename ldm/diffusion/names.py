"""What our samplers and noise levels are called elsewhere: in diffusers, in A1111's web UI and in ComfyUI.

Two tables as data, `SAMPLER_NAMES` and `GRID_NAMES`; a choice of theirs is a row of each, as "DPM++ 2M" with
the schedule type "Karras". A row says that they are equal, with the settings that it names; tests run each.
An empty field says that the other has no such thing, or only one that is not equal (the note tells). Equal is
the method: whoever draws noise draws other noise there, of the same law.

`lookup` reads any of these spellings, `python -m ldm.diffusion.names` prints the tables for the README.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ldm.diffusion.grids import GRIDS
from ldm.diffusion.samplers import SAMPLERS


class SamplerName(NamedTuple):
    """A sampler of ours with its options, and what others call it.

    diffusers: a scheduler class, with what its constructor (`made_with`) and its `step` are given; without a
    class, `step_with` is of the k-diffusion function.
    a1111, comfyui: the sampler's name there. k_diffusion: the function both call, without "sample_".
    schedule: the grid where the foreign name includes one, else None.
    """

    sampler: str
    options: Mapping[str, float | int | str] = {}
    diffusers: str | None = None
    made_with: Mapping[str, Any] = {}
    step_with: Mapping[str, Any] = {}
    a1111: str | None = None
    comfyui: str | None = None
    k_diffusion: str | None = None
    schedule: str | None = None
    note: str = ""


class GridName(NamedTuple):
    """A grid of ours, and what others call it; `diffusers` with `made_with` visits these levels."""

    schedule: str
    diffusers: str | None = None
    made_with: Mapping[str, Any] = {}
    a1111: str | None = None
    comfyui: str | None = None
    note: str = ""


class Found(NamedTuple):
    """What a foreign name means here. schedule: None where it was not told, for the sampler's usual one."""

    sampler: str
    schedule: str | None
    options: Mapping[str, float | int | str]


SD_STEPS = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}  # of `edm_euler` and `edm_heun`
SDE = {"algorithm_type": "sde-dpmsolver++"}
BH1 = {"solver_order": 3, "solver_type": "bh1"}
BH2 = {"solver_order": 3, "solver_type": "bh2"}
LAST_BUT_ONE = "A1111 and ComfyUI leave out the last level but one"
FROM_TIME_0 = "theirs ends at timestep 0, ours at level 0"

SAMPLER_NAMES = (
    SamplerName("ddpm", {}, "DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample": False},
                comfyui="ddpm"),
    SamplerName("ddim", {}, "DDIMScheduler", {**SD_STEPS, "clip_sample": False}, {"eta": 0.0}, "DDIM", "ddim",
                note="ComfyUI's ends at level 0 (`ddim_uniform`)"),
    SamplerName("plms", {}, "PNDMScheduler", {**SD_STEPS, "skip_prk_steps": True}, a1111="PLMS",
                note="theirs counts the two evaluations of the first step as two steps"),
    SamplerName("pndm", {}, "PNDMScheduler", {**SD_STEPS, "skip_prk_steps": False}),
    SamplerName("euler", {}, "EulerDiscreteScheduler", {}, {}, "Euler", "euler", "euler"),
    SamplerName("euler", {}, "FlowMatchEulerDiscreteScheduler", schedule="flow",
                note="of flow models; given sigmas from 1 to 1 / steps, as pipelines do"),
    SamplerName("euler_ancestral", {}, "EulerAncestralDiscreteScheduler", {}, {}, "Euler a",
                "euler_ancestral", "euler_ancestral"),
    SamplerName("heun", {}, "HeunDiscreteScheduler", {}, {}, "Heun", "heun", "heun"),
    SamplerName("dpm2", {}, "KDPM2DiscreteScheduler", {}, {}, "DPM2", "dpm_2", "dpm_2", note=LAST_BUT_ONE),
    SamplerName("dpm2_ancestral", {}, "KDPM2AncestralDiscreteScheduler", {}, {}, "DPM2 a", "dpm_2_ancestral",
                "dpm_2_ancestral", note=LAST_BUT_ONE),
    SamplerName("lms", {}, "LMSDiscreteScheduler", {}, {}, "LMS", "lms", "lms"),
    SamplerName("dpmpp_2s_ancestral", {}, None, {}, {}, "DPM++ 2S a", "dpmpp_2s_ancestral",
                "dpmpp_2s_ancestral", note="diffusers' DPMSolverSinglestepScheduler is not ancestral"),
    SamplerName("dpmpp_2m", {}, "DPMSolverMultistepScheduler", {}, {}, "DPM++ 2M", "dpmpp_2m", "dpmpp_2m"),
    SamplerName("dpmpp_sde", {}, "DPMSolverSDEScheduler", {}, {}, "DPM++ SDE", "dpmpp_sde", "dpmpp_sde"),
    SamplerName("dpmpp_2m_sde", {}, "DPMSolverMultistepScheduler", SDE, {}, "DPM++ 2M SDE", "dpmpp_2m_sde",
                "dpmpp_2m_sde"),
    SamplerName("dpmpp_2m_sde", {"variant": "heun"}, "DPMSolverMultistepScheduler",
                {**SDE, "solver_type": "heun"}, {}, "DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun", "dpmpp_2m_sde"),
    SamplerName("dpmpp_3m_sde", {}, None, {}, {}, "DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde",
                note="diffusers' third order has another sign in its last term"),
    SamplerName("unipc", {}, "UniPCMultistepScheduler"),
    SamplerName("unipc", {"order": 3, "variant": "bh1"}, "UniPCMultistepScheduler", BH1, {}, "UniPC",
                "uni_pc", note="A1111's and ComfyUI's end just above level 0"),
    SamplerName("unipc", {"order": 3}, "UniPCMultistepScheduler", BH2, comfyui="uni_pc_bh2",
                note="ComfyUI's ends just above level 0"),
    SamplerName("deis", {}, "DEISMultistepScheduler", {"solver_order": 3},
                note="ComfyUI's `deis` interpolates in another variable"),
    SamplerName("edm_euler", {}, None, {}, CHURN, k_diffusion="euler",
                note="A1111's Euler with these; diffusers' evaluates before it adds the noise"),
    SamplerName("edm_heun", {}, None, {}, CHURN, k_diffusion="heun", note="A1111's Heun with these"),
    SamplerName("lcm", {}, "LCMScheduler", {}, {}, "LCM", "lcm"),
    SamplerName("tcd", {}, "TCDScheduler", {}, {"eta": 0.3}, note=FROM_TIME_0),
)  # fmt: skip

LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
GRID_NAMES = (
    GridName("compvis", "DDIMScheduler", SD_STEPS, note="where steps divides 1000; A1111's DDIM and PLMS"),
    GridName("leading", "DDIMScheduler", {"timestep_spacing": "leading"}),
    GridName("trailing", "DDIMScheduler", {"timestep_spacing": "trailing"}),
    GridName("linspace", "DDIMScheduler", {"timestep_spacing": "linspace"}),
    GridName("uniform", None, {}, "Uniform", "normal",
             note="A1111's Normal too; diffusers' Euler with linspace, interpolated in sigma, is near"),
    GridName("sgm_uniform", "DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}, "SGM Uniform",
             "sgm_uniform", note="diffusers' rounds timesteps: equal where steps divides 999"),
    GridName("ddim_uniform", "EulerDiscreteScheduler", LEADING, "DDIM", "ddim_uniform",
             note="where steps divides 1000"),
    GridName("simple", None, {}, "Simple", "simple"),
    GridName("karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, "Karras", "karras"),
    GridName("exponential", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "Exponential",
             "exponential"),
    GridName("polyexponential", None, {}, "Polyexponential"),
    GridName("beta", "EulerDiscreteScheduler", {"use_beta_sigmas": True}, "Beta",
             note="ComfyUI's `beta` takes quantiles of the timestep"),
    GridName("kl_optimal", None, {}, "KL Optimal", "kl_optimal",
             note="A1111's steps are ours of one more, without the last"),
    GridName("align_your_steps", None, {}, "Align Your Steps",
             note="ComfyUI's node interpolates one level more and sets the last to 0"),
    GridName("lcm", "LCMScheduler"),
    GridName("flow", "FlowMatchEulerDiscreteScheduler", note="given sigmas from 1 to 1 / steps"),
)  # fmt: skip

# Spellings beside those of the tables, as normalised by `plain`; None is "as the sampler usually does"
OTHER_GRIDS = {
    "automatic": None,
    "normal": "uniform",
    "polyexp": "polyexponential",
    "sgmuniform": "sgm_uniform",
}


def plain(name: str) -> str:
    """A name without what people spell differently: case, "_" and "-" for spaces, "k_" before (CompVis)."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split()).removeprefix("k ")


def spellings(row: SamplerName | GridName) -> list[str]:
    """All names of a row, ours first."""
    ours = row.sampler if isinstance(row, SamplerName) else row.schedule
    # A grid is not told by the class that visits it: diffusers sets that by options
    names = (ours, row.diffusers if isinstance(row, SamplerName) else None, row.a1111, row.comfyui)
    return [name for name in names if name]


def sampler_row(name: str) -> SamplerName | None:
    """The first row with this name: as it is written, or else whatever its case."""
    for same in (str, plain):
        for row in SAMPLER_NAMES:
            if same(name) in map(same, spellings(row)):
                return row
    return None


def grid_names() -> dict[str, str | None]:
    """Each spelling of a grid, as `plain` has it -> ours, None for the sampler's usual one."""
    rows = {plain(name): row.schedule for row in reversed(GRID_NAMES) for name in reversed(spellings(row))}
    return {**OTHER_GRIDS, **rows}


def lookup(name: str, schedule: str | None = None) -> Found:
    """Our sampler, schedule and options of a name from here, diffusers, A1111 or ComfyUI, in any case.

    name: of a sampler, alone or before the name of a schedule: "DPM++ 2M Karras". schedule: that name apart,
    as A1111 and ComfyUI ask for it. What one name means in two programs is decided by the exact spelling
    (A1111's "UniPC" is of order 3, our "unipc" of order 2), then by the order of the table.
    Raises ValueError, with the nearest names, for an unknown one and for two schedules that contradict.
    """
    grids = grid_names()
    row, told = sampler_row(name), None
    if row is None:
        words = name.replace("_", " ").replace("-", " ").split()
        for cut in range(len(words) - 1, 0, -1):  # the longest sampler, as in "DPM++ 2M SDE Heun Karras"
            last = plain(" ".join(words[cut:]))
            row = sampler_row(" ".join(words[:cut])) if last in grids else None
            if row is not None:
                told = last
                break
    if row is None:
        raise ValueError(unknown("sampler", name, nearest(name)))
    if schedule is not None:
        if plain(schedule) not in grids:
            near = difflib.get_close_matches(plain(schedule), grids, n=3, cutoff=0.4)
            raise ValueError(unknown("schedule", schedule, near, GRIDS))
        if told is not None and grids[told] != grids[plain(schedule)]:
            raise ValueError(f"sampler {name!r} names a schedule, which {schedule!r} contradicts: drop one")
        told = plain(schedule)
    return Found(row.sampler, grids[told] if told is not None else row.schedule, row.options)


def nearest(name: str) -> list[str]:
    """Up to three known names of samplers, of whichever program, that are most like `name`."""
    names = {plain(each): each for row in reversed(SAMPLER_NAMES) for each in reversed(spellings(row))}
    return [names[each] for each in difflib.get_close_matches(plain(name), names, n=3, cutoff=0.5)]


def unknown(kind: str, name: str, near: Iterable[str], known: Iterable[str] = SAMPLERS) -> str:
    """The message for a name that nobody has."""
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"


def settings(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def markdown() -> str:
    """Both tables as the README shows them."""
    lines = [
        "| sampler | options | diffusers | with | A1111 | ComfyUI | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in SAMPLER_NAMES:
        given = settings({**row.made_with, **row.step_with})
        cells = [
            code(row.sampler),
            code(settings(row.options)),
            code(row.diffusers),
            code(given),
            row.a1111 or "",
        ]
        lines.append(f"| {' | '.join([*cells, code(row.comfyui), row.note])} |")
    lines += ["", "| schedule | diffusers | with | A1111 | ComfyUI | note |", "|---|---|---|---|---|---|"]
    for grid in GRID_NAMES:
        cells = [code(grid.schedule), code(grid.diffusers), code(settings(grid.made_with)), grid.a1111 or ""]
        lines.append(f"| {' | '.join([*cells, code(grid.comfyui), grid.note])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
