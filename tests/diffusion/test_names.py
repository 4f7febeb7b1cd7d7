"""The table of names: every row run against the program it names, every spelling looked up.

diffusers' schedulers and k-diffusion's functions, which A1111 and ComfyUI call, go along our levels on a mixture
of Gaussians, whose denoiser is not linear; the levels themselves are compared apart, and with formulas of the web
interfaces' grids written down anew here.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import MEAN, STD, draw, exact_denoiser, last, mixture
from torch.testing import assert_close

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import GRIDS, make_grid
from ldm.diffusion.names import GRID_NAMES, SAMPLER_NAMES, lookup, markdown, spellings
from ldm.diffusion.process import to_sigma_scale
from ldm.diffusion.samplers import SAMPLERS, check_options
from ldm.diffusion.schedule import DiffusionConfig, Schedule

try:
    from test_samplers_kdiffusion import theirs as k_diffusion
except pytest.skip.Exception:
    k_diffusion = None

SCHEDULE = Schedule(DiffusionConfig())
FLOW = Schedule(DiffusionConfig(schedule="flow", prediction="flow"))
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = SCHEDULE.sigmas.numpy()
LOW, HIGH = float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1])


def network(x_t, t):
    """What predicts the noise of the mixture exactly."""
    sigma = SCHEDULE.sigma(t.double()).reshape(-1, 1, 1, 1)
    x = x_t * (1 + sigma**2).sqrt()
    return ((x - mixture(x, sigma)) / sigma).to(x_t.dtype)


def told(level):
    return SCHEDULE.t(torch.as_tensor(level).double().reshape(1)).float()


def name_of(row):
    return " ".join(
        [row.sampler, *map(str, row.options.values()), str(row.diffusers).removesuffix("Scheduler")]
    )


# ---- samplers of diffusers ----

# Those that go by alpha_bar, and the grid that they visit by themselves
BY_ALPHA_BAR = {"DDPM": "trailing", "DDIM": "compvis", "PNDM": "compvis", "LCM": "lcm", "TCD": "lcm"}
IN_NETWORK_SCALE = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")
# Where they compute in float32 whatever they are given, or have tables of their own in it
TOLERANCES = {
    "DPMSolverMultistep": 1e-6,
    "EulerDiscrete": 1e-6,
    "EulerAncestralDiscrete": 1e-6,
    "LCM": 1e-6,
    "KDPM2Discrete": 1e-5,
    "KDPM2AncestralDiscrete": 1e-5,
    "DPMSolverSDE": 1e-5,
}


class Noises:
    """Standard normal noise by step and part, and the step that a scheduler is at."""

    def __init__(self, steps, x):
        self.values, self.step = draw(steps, 2, *x.shape, seed=5).to(x.dtype), 0

    def __call__(self, index, part=0):
        return self.values[index, part]

    def now(self, *_, **__):
        return self.values[self.step, 0]


def by_alpha_bar(other, row, steps):
    """Give a scheduler that goes by alpha_bar our table; returns the levels that it visits by itself."""
    other.set_timesteps(steps)
    other.alphas_cumprod = SCHEDULE.alpha_bar
    other.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(other, "final_alpha_cumprod"):
        stops = row.made_with.get("set_alpha_to_one") is False
        other.final_alpha_cumprod = SCHEDULE.alpha_bar[0] if stops else other.one
    sigmas = make_grid(SCHEDULE, BY_ALPHA_BAR[row.diffusers.removesuffix("Scheduler")], steps)
    if row.sampler == "tcd":
        sigmas[-1] = SCHEDULE.sigmas[0]  # theirs ends at timestep 0
    return sigmas


def evaluations(row, steps):
    """How many calls of diffusers' `step` belong to each step of ours."""
    if row.sampler == "plms":
        return [2] + [1] * (steps - 1)
    if row.sampler == "pndm":
        return [4] * 3 + [1] * (steps - 3)
    if row.sampler in ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde"):
        return [2] * (steps - 1) + [1]
    return [1] * steps


def doubled(levels):
    """Each level but the ends twice, as two-stage schedulers keep them."""
    return torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])


def level_of(other, name):
    """The level at which a scheduler in the scale of sigma wants the network evaluated."""
    index = other.step_index
    if name.startswith("KDPM2"):
        return (
            other.sigmas[index]
            if other.state_in_first_order
            else other.sigmas_interpol[index - ("Anc" in name)]
        )
    if name == "DPMSolverSDE" and not other.state_in_first_order:
        return other.mid_point_sigma
    return other.sigmas[index]


def prepare(other, name, sigmas):
    """Give a scheduler our levels where it keeps them plainly."""
    other.set_timesteps(len(sigmas) - 1)
    if name.startswith("KDPM2"):
        return  # tables of its own; the grid is theirs
    other.sigmas = doubled(sigmas) if name in ("HeunDiscrete", "DPMSolverSDE") else sigmas.clone()
    if name in IN_NETWORK_SCALE:
        other.set_begin_index(0)


@pytest.mark.parametrize("row", [r for r in SAMPLER_NAMES if r.diffusers and not r.schedule], ids=name_of)
def test_diffusers(row, monkeypatch):
    """Every step of the trajectory. On whole timesteps, where all grids of theirs agree with "linspace"."""
    import diffusers

    name, steps = row.diffusers.removesuffix("Scheduler"), 28
    if name == "DPMSolverSDE":
        pytest.importorskip("torchsde")  # theirs needs it
    other = getattr(diffusers, row.diffusers)(**BETAS, **row.made_with)
    if name in BY_ALPHA_BAR:
        steps = {"LCM": 4, "TCD": 4}.get(name, 20)
        sigmas = by_alpha_bar(other, row, steps)
    else:
        sigmas = make_grid(SCHEDULE, "compvis" if row.sampler == "deis" else "linspace", steps)
        if row.options.get("variant") == "bh1":
            sigmas[-1] = LOW / 2  # at level 0 theirs is not a number
        prepare(other, name, sigmas)
    x_t = draw(2, 4, 4, 4)
    start = to_sigma_scale(x_t, float(sigmas[0]))
    in_sigma = name not in (*BY_ALPHA_BAR, *IN_NETWORK_SCALE)
    x = start if in_sigma else x_t
    noises = Noises(steps, x)
    module = sys.modules[type(other).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", noises.now)
    if name == "DPMSolverSDE":
        other.noise_sampler = path_noise(sigmas, noises)
    ours = SAMPLERS[row.sampler].function(
        Denoiser(network, SCHEDULE),
        start,
        sigmas,
        noise=noises,
        **row.options,
        **({"schedule": SCHEDULE} if row.sampler in ("pndm", "tcd") else {}),
    )
    times = iter(enumerate(other.timesteps))
    for step, count in zip(ours, evaluations(row, steps), strict=True):
        noises.step = step.index
        for _ in range(count):
            i, t = next(times)
            if in_sigma:
                model_input = other.scale_model_input(x, t)
                output = network(model_input, told(level_of(other, name)))
            elif name in IN_NETWORK_SCALE:
                output = network(x, told(sigmas[i]))
            else:
                output = network(x, t.reshape(1).float())
            x = other.step(output, t, x, **row.step_with).prev_sample
        expected = step.x if in_sigma else step.sample
        error = ((x - expected).norm() / expected.norm()).item()
        assert error < TOLERANCES.get(name, 1e-9), (step.index, error)
    assert next(times, None) is None


def path_noise(sigmas, noises):
    """A Brownian path's increments, from the noise of a step's two parts, as the two-stage SDE solvers ask."""

    def noise(sigma, sigma_next):
        start, end = sigmas[noises.step], sigmas[noises.step + 1]
        middle = (start * end).sqrt()
        if abs(float(sigma_next) / float(middle) - 1) < 1e-5:
            return noises(noises.step)
        share = (start - middle) / (start - end)
        return share.sqrt() * noises(noises.step) + (1 - share).sqrt() * noises(noises.step, 1)

    return noise


# ---- samplers of k-diffusion, which A1111 and ComfyUI run ----

BY_K_DIFFUSION = [row for row in SAMPLER_NAMES if row.k_diffusion]


@pytest.mark.skipif(k_diffusion is None, reason="k-diffusion is not installed")
@pytest.mark.parametrize("row", BY_K_DIFFUSION, ids=name_of)
def test_k_diffusion(row):
    sigmas = make_grid(SCHEDULE, "karras", 20)
    x, function = float(sigmas[0]) * draw(2, 4, 4, 4), getattr(k_diffusion, f"sample_{row.k_diffusion}")
    noises, options, calls = Noises(20, x), {}, iter(range(1000))
    if "variant" in row.options:
        options["solver_type"] = row.options["variant"]
    if row.sampler.startswith("edm"):
        options |= row.step_with
        torch.manual_seed(0)  # theirs draws by torch.randn_like each step, used or not
        noises.values = torch.stack([torch.stack([torch.randn_like(x)] * 2) for _ in range(20)])
        torch.manual_seed(0)
    elif row.sampler == "dpmpp_sde":

        def path(sigma, sigma_next):
            noises.step = next(calls) // 2
            return path_noise(sigmas, noises)(sigma, sigma_next)

        options["noise_sampler"] = path
    elif SAMPLERS[row.sampler].stochastic:
        options["noise_sampler"] = lambda sigma, sigma_next: noises(next(calls))
    expected = function(mixture, x, sigmas, disable=True, **options)
    got = last(SAMPLERS[row.sampler].function(mixture, x, sigmas, noise=noises, **row.options)).x
    assert_close(got, expected, rtol=1e-10, atol=1e-10)


# ---- rows that neither runs, or only k-diffusion does, in formulas written down here ----


def test_dpmpp_2s_ancestral_by_hand():
    """One step of DPM-Solver-2 in exponential form down to sigma_down, and noise."""
    sigma, sigma_next, x, noise = 5.0, 2.0, 5 * draw(1, 4, 4, 4), draw(1, 4, 4, 4, seed=1)
    up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    down = math.sqrt(sigma_next**2 - up**2)
    h = math.log(sigma / down)
    middle = math.exp(-h / 2) * sigma
    u = middle / sigma * x - math.expm1(-h / 2) * mixture(x, sigma)
    expected = down / sigma * x - math.expm1(-h) * mixture(u, middle) + up * noise
    run = SAMPLERS["dpmpp_2s_ancestral"].function(
        mixture, x, torch.tensor([sigma, sigma_next], dtype=torch.float64), noise=lambda _: noise
    )
    assert_close(next(run).x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["edm_euler", "edm_heun"])
def test_churn_by_hand(name):
    """Algorithm 2 of Karras et al. 2022 at the row's settings, with and without its correction."""
    sigmas, x, noise = make_grid(SCHEDULE, "karras", 10), draw(1, 4, 4, 4), draw(10, 1, 4, 4, 4, seed=1)
    run = SAMPLERS[name].function(mixture, x, sigmas, noise=lambda i: noise[i])
    (row,) = (row for row in SAMPLER_NAMES if row.sampler == name)
    churn, low, high, scale = (row.step_with[key] for key in ("s_churn", "s_tmin", "s_tmax", "s_noise"))
    for step, (sigma, after) in zip(run, pairwise(sigmas.tolist()), strict=True):
        gamma = min(churn / 10, math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        hat = sigma + gamma * sigma
        x = x + math.sqrt(hat**2 - sigma**2) * scale * noise[step.index]
        slope = (x - mixture(x, hat)) / hat
        euler = x + (after - hat) * slope
        if name == "edm_heun" and after > 0:
            euler = x + (after - hat) * (slope + (euler - mixture(euler, after)) / after) / 2
        x = euler
        assert_close(step.x, x, rtol=1e-10, atol=1e-10)


def test_dpmpp_3m_sde_by_hand():
    """The third step: a parabola through three estimates of x0, in the terms of k-diffusion's source."""
    sigmas, x, noise = make_grid(SCHEDULE, "karras", 20), 14 * draw(1, 4, 4, 4), draw(20, 1, 4, 4, 4, seed=1)
    first, second, third, *_ = SAMPLERS["dpmpp_3m_sde"].function(mixture, x, sigmas, noise=lambda i: noise[i])
    h_2, h_1, h = (math.log(sigmas[i] / sigmas[i + 1]) for i in range(3))
    slope_1 = (third.denoised - second.denoised) / (h_1 / h)
    slope_2 = (second.denoised - first.denoised) / (h_2 / h)
    total = h_1 / h + h_2 / h
    slope, bend = slope_1 + (slope_1 - slope_2) * (h_1 / h) / total, (slope_1 - slope_2) / total
    phi_2 = math.expm1(-2 * h) / (2 * h) + 1
    phi_3 = phi_2 / (2 * h) - 0.5
    expected = (
        math.exp(-2 * h) * second.x - math.expm1(-2 * h) * third.denoised + phi_2 * slope - phi_3 * bend
    )
    expected = expected + float(sigmas[3]) * math.sqrt(-math.expm1(-2 * h)) * noise[2]
    assert_close(third.x, expected, rtol=1e-10, atol=1e-10)


def test_comfyui_ddpm_by_hand():
    """mean = (x_t - (1 - alpha) / sqrt(1 - alpha_bar) eps) / sqrt(alpha) in the scale of the network, and noise."""
    sigmas, x, noise = make_grid(SCHEDULE, "uniform", 10), 14 * draw(1, 4, 4, 4), draw(10, 1, 4, 4, 4, seed=1)
    for step, (sigma, after) in zip(
        SAMPLERS["ddpm"].function(mixture, x, sigmas, noise=lambda i: noise[i]),
        pairwise(sigmas.tolist()),
        strict=True,
    ):
        now, before = 1 / (1 + sigma**2), 1 / (1 + after**2)
        eps = (x - mixture(x, sigma)) / sigma
        mean = (x * math.sqrt(now) - (1 - now / before) / math.sqrt(1 - now) * eps) / math.sqrt(now / before)
        spread = math.sqrt((1 - now / before) * (1 - before) / (1 - now))
        x = (mean + spread * noise[step.index]) * math.sqrt(1 + after**2)
        assert_close(step.x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", SAMPLER_NAMES, ids=name_of)
def test_every_row_without_any_of_them(row):
    """Its sampler exists and has its options; with them it samples Gaussian data; each spelling finds it."""
    check_options(row.sampler, dict(row.options))
    schedule = FLOW if row.schedule == "flow" else SCHEDULE
    sigmas = make_grid(schedule, row.schedule or "karras", 100)
    x = to_sigma_scale(draw(1, 4, 32, 32), float(sigmas[0]))
    noises = Noises(100, x)
    end = last(SAMPLERS[row.sampler].function(exact_denoiser, x, sigmas, noise=noises, **row.options)).x
    if row.sampler not in ("lcm", "tcd"):  # for models that answer with the end of the path
        assert_close(end.mean().item(), MEAN, rtol=0, atol=0.05)
        assert_close(end.std().item(), STD, rtol=0.15, atol=0)
    for name in spellings(row):
        first = next(r for r in SAMPLER_NAMES if name in spellings(r))  # some share a class, or ours
        assert first is row or name in (row.sampler, row.diffusers)
        assert lookup(name) == (first.sampler, first.schedule, first.options)


# ---- grids ----


def a1111_and_comfyui(name, n):
    """The levels that both, or the one that has it, make of Stable Diffusion's sigmas, by their formulas."""
    i = np.arange(n)
    log_t = np.log(LEVELS)

    def at(t):
        return np.exp(np.interp(t, np.arange(1000), log_t))

    match name:
        case "uniform":  # get_sigmas; normal_scheduler: from sigma_to_t(top) to sigma_to_t(bottom)
            levels = at(np.linspace(999, 0, n))
        case "sgm_uniform":
            levels = at(np.linspace(999, 0, n + 1)[:-1])
        case "simple":
            levels = [LEVELS[-(1 + int(k * (len(LEVELS) / n)))] for k in range(n)]
        case "ddim_uniform":
            levels = LEVELS[1 :: 1000 // n][::-1]
        case "karras":
            levels = (HIGH ** (1 / 7) + i / (n - 1) * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7
        case "exponential" | "polyexponential":
            levels = np.exp(np.linspace(math.log(HIGH), math.log(LOW), n))
        case "kl_optimal":
            levels = np.tan(i / (n - 1) * math.atan(LOW) + (1 - i / (n - 1)) * math.atan(HIGH))
        case "beta":
            stats = pytest.importorskip("scipy.stats")
            levels = LOW + stats.beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6) * (HIGH - LOW)
        case "align_your_steps":
            anchors = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
            backwards = np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 11), np.log(anchors[::-1]))
            levels = np.exp(backwards)[::-1]
    return torch.tensor([*levels, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 10, 20, 50])
@pytest.mark.parametrize("name", [row.schedule for row in GRID_NAMES if row.a1111 or row.comfyui])
def test_web_interfaces_grids(name, n):
    assert_close(make_grid(SCHEDULE, name, n), a1111_and_comfyui(name, n), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [1, 10, 30])
def test_kl_optimal_of_a1111(n):
    """Theirs has n + 1 levels from end to end and no 0: ours of n + 1 steps without the last."""
    i = np.arange(n + 1)
    levels = np.tan(i / n * math.atan(LOW) + (1 - i / n) * math.atan(HIGH))
    assert_close(make_grid(SCHEDULE, "kl_optimal", n + 1)[:-1], torch.from_numpy(levels), rtol=1e-9, atol=0)


def test_kl_optimal_is_even_in_the_angle():
    angles = make_grid(SCHEDULE, "kl_optimal", 11)[:-1].atan()
    assert_close(angles.diff(), angles.diff()[:1].expand(10), rtol=1e-9, atol=0)
    assert make_grid(SCHEDULE, "kl_optimal", 1).tolist() == [HIGH, 0]
    assert_close(angles[5].tan().item(), math.tan((math.atan(LOW) + math.atan(HIGH)) / 2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("row", [row for row in GRID_NAMES if row.diffusers], ids=lambda row: row.schedule)
def test_grids_of_diffusers(row):
    """In float32, as theirs are; at step counts that the row names where it names any."""
    import diffusers

    kind = getattr(diffusers, row.diffusers)
    if row.schedule == "flow":
        other = kind(**row.made_with)
        other.set_timesteps(20, sigmas=np.linspace(1, 1 / 20, 20))
        times = FLOW.time(make_grid(FLOW, "flow", 20))
        assert_close(times.float(), other.sigmas, rtol=0, atol=2e-7)
        return
    for steps in {"sgm_uniform": (3, 9, 27), "lcm": (2, 4, 8)}.get(row.schedule, (2, 10, 20, 50)):
        other = kind(**BETAS, **row.made_with)
        other.set_timesteps(steps)
        grid = make_grid(SCHEDULE, row.schedule, steps)
        if hasattr(other, "sigmas"):
            assert_close(grid.float(), other.sigmas.float(), rtol=5e-5, atol=0)
        else:
            assert SCHEDULE.t(grid[:-1]).tolist() == other.timesteps.tolist()
            stops = row.made_with.get("set_alpha_to_one") is False
            assert grid[-1] == (SCHEDULE.sigmas[0] if stops else 0)


# ---- the table ----


def test_tables_are_whole():
    assert {row.sampler for row in SAMPLER_NAMES} == set(SAMPLERS)
    assert [row.schedule for row in GRID_NAMES] == list(dict.fromkeys(row.schedule for row in GRID_NAMES))
    assert {row.schedule for row in GRID_NAMES} == set(GRIDS)
    assert all(row.diffusers or row.k_diffusion for row in SAMPLER_NAMES)
    for column in ("a1111", "comfyui"):
        for table in (SAMPLER_NAMES, GRID_NAMES):
            names = [getattr(row, column) for row in table if getattr(row, column)]
            assert len(names) == len(set(names)), names


@pytest.mark.parametrize(("name", "sampler", "schedule", "options"), [
    ("DPM++ 2M Karras", "dpmpp_2m", "karras", {}),
    ("dpmpp_2m", "dpmpp_2m", None, {}),
    ("DPMPP_2M_KARRAS", "dpmpp_2m", "karras", {}),
    ("DPMSolverMultistepScheduler", "dpmpp_2m", None, {}),
    ("unipcmultistepscheduler", "unipc", None, {}),
    ("DPM++ 2M SDE Heun Exponential", "dpmpp_2m_sde", "exponential", {"variant": "heun"}),
    ("DPM++ 2M SDE", "dpmpp_2m_sde", None, {}),
    ("dpm++  2s A", "dpmpp_2s_ancestral", None, {}),
    ("Euler a", "euler_ancestral", None, {}),
    ("k_euler_a", "euler_ancestral", None, {}),
    ("Euler", "euler", None, {}),
    ("Euler SGM Uniform", "euler", "sgm_uniform", {}),
    ("Euler Automatic", "euler", None, {}),
    ("Euler Normal", "euler", "uniform", {}),
    ("euler ddim_uniform", "euler", "ddim_uniform", {}),
    ("DPM2 a Karras", "dpm2_ancestral", "karras", {}),
    ("Heun KL Optimal", "heun", "kl_optimal", {}),
    ("UniPC", "unipc", None, {"order": 3, "variant": "bh1"}),
    ("unipc", "unipc", None, {}),
    ("uni_pc_bh2 simple", "unipc", "simple", {"order": 3}),
    ("FlowMatchEulerDiscreteScheduler", "euler", "flow", {}),
    ("lcm", "lcm", None, {}),
])  # fmt: skip
def test_lookup(name, sampler, schedule, options):
    assert lookup(name) == (sampler, schedule, options)


def test_lookup_of_two_names():
    assert lookup("dpmpp_2m", "karras") == lookup("DPM++ 2M", "Karras") == ("dpmpp_2m", "karras", {})
    assert lookup("DPM++ 2M", "Automatic").schedule is None
    assert lookup("euler", "Normal").schedule == lookup("Euler", "Uniform").schedule == "uniform"
    assert lookup("DPM++ 2M Karras", "karras").schedule == "karras"


@pytest.mark.parametrize(("names", "message"), [
    (("eular",), "unknown sampler 'eular': did you mean euler"),
    (("DPM++ 2N",), r"unknown sampler 'DPM\+\+ 2N': did you mean DPM\+\+ 2M"),
    (("Euler Foo",), "unknown sampler 'Euler Foo': did you mean"),
    (("xyzzy",), "unknown sampler 'xyzzy': known: ddpm, ddim"),
    (("",), "unknown sampler '': known: ddpm"),
    (("karras",), "unknown sampler 'karras': "),
    (("DPMSolverMultistep",), "did you mean DPMSolverMultistepScheduler"),
    (("euler", "karas"), "unknown schedule 'karas': did you mean karras"),
    (("euler", "xyzzy"), "unknown schedule 'xyzzy': known: compvis"),
    (("euler karras", "exponential"), "sampler 'euler karras' names a schedule, which 'exponential' contradicts"),
])  # fmt: skip
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message) as caught:
        lookup(*names)
    assert "\n" not in str(caught.value)


def test_markdown():
    lines = markdown().splitlines()
    tables = "\n".join(lines).split("\n\n")
    assert len(tables) == 2
    for table, rows in zip(tables, (SAMPLER_NAMES, GRID_NAMES), strict=True):
        header, rule, *body = table.splitlines()
        assert set(rule) == {"|", "-"} and len(body) == len(rows)
        assert {line.count("|") for line in body} == {header.count("|")}
    assert "| `dpmpp_2m` |  | `DPMSolverMultistepScheduler` |  | DPM++ 2M | `dpmpp_2m` |  |" in lines


def test_readme_shows_the_tables():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    if "<!-- sampler names -->" not in readme:
        pytest.skip("README has no table of names yet")
    assert markdown() in readme
