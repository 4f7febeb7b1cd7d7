"""`run.compile=true`: the weights of a plain run to 1e-5, with accumulation, and exact at a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ldm
from ldm.config import from_dict
from train.loop import RunConfig
from train.tasks.autoencoder import AutoencoderTaskConfig

ROOT = Path(ldm.__file__).parent.parent

# In a Python of its own: the annotations that the tests check at each call are nothing to compile
SCRIPT = """
import json, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from torch._dynamo.utils import counters
from benchmarks.training import config_of, make_set, SIZES
from ldm.weights.io import load_weights
from train.loop import train
from train.tasks import diffusion

backend, folder = sys.argv[1], Path(sys.argv[2])
diffusion.compile_blocks = partial(diffusion.compile_blocks, backend=backend)
make_set(folder, SIZES["tiny"])
config = config_of(folder, "tiny", "float32")
config = replace(config, unet=replace(config.unet, channel_mult=(1,), attention_resolutions=(1,)))

def run(name, compiled, resume=False, stop=None):
    changed = dict(out=str(folder / name), compile=compiled, steps=4, accumulate=2, lr=1e-3, warmup=2)
    often = dict(checkpoint_every=2, validate_every=2, preview_every=0, keep=1)
    settings = replace(config.run, **changed, **often)
    preview = replace(config.preview, prompts=("a",), steps=1)
    task = diffusion.DiffusionTask(replace(config, run=settings, preview=preview))
    plain = task.players["model"].loss
    def loss(step, part):
        if step == stop:
            raise KeyboardInterrupt
        return plain(step, part)
    task.players["model"].loss = loss
    train(task, resume, "")
    tensors, _ = load_weights(folder / name / "states" / "step-00000004.safetensors")
    return tensors

eager = run("eager", False)
none = counters["stats"]["unique_graphs"]
compiled = run("compiled", True)
graphs = counters["stats"]["unique_graphs"]
try:
    run("resumed", True, stop=3)
except KeyboardInterrupt:
    resumed = run("resumed", True, resume=True)
difference = max(float((compiled[key] - eager[key]).abs().max()) for key in eager if "optimizer" not in key)
moved = max(float(eager[key].abs().max()) for key in eager if key.endswith("conv_out.weight"))
unequal = [key for key in compiled if not compiled[key].equal(resumed[key])]
print(json.dumps([none, graphs, dict(counters["graph_break"]), difference, moved, unequal, eager.keys() == compiled.keys()]))
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_equals_a_plain_one(backend: str, tmp_path: Path) -> None:
    """Also resumed after a kill."""
    pytest.importorskip("numpy")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    none, graphs, breaks, difference, moved, unequal, same = json.loads(done.stdout.splitlines()[-1])
    assert none == 0
    assert 0 < graphs < 12  # one a shape, and none for validation and preview
    assert breaks == {}
    assert difference < 1e-5
    assert moved > 1e-3  # it has learned something
    assert unequal == []
    assert same


def test_whether_to_compile_may_change_at_a_resume() -> None:
    assert not RunConfig(out="x").compile
    assert "run.compile" in RunConfig.FREE


def test_autoencoders_are_not_compiled() -> None:
    values = {"data": {"path": "x", "size": 32}, "run": {"out": "x", "compile": True}}
    with pytest.raises(ValueError, match=r"run\.compile=true is for diffusion models"):
        from_dict(AutoencoderTaskConfig, values)
