"""Compiled blocks: the same outputs from the same tensors, one graph a shape, none after the first call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ldm
from ldm.models.compiled import compile_blocks
from ldm.models.unet import UNet, UNetConfig

ROOT = Path(ldm.__file__).parent.parent
TINY = UNetConfig(model_channels=16, channel_mult=(1,), num_res_blocks=1, norm_groups=8, context_dim=12)

# In a Python of its own: the annotations that the tests check at each call are nothing to compile
SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from ldm.models.compiled import compile_blocks
from ldm.models.unet import UNet, UNetConfig

torch.manual_seed(0)
config = UNetConfig(model_channels=16, channel_mult=(1,), num_res_blocks=1, norm_groups=8, context_dim=12)
unet = UNet(config).requires_grad_(False)
for parameter in unet.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
compiled, differences, graphs, seen = compile_blocks(unet, sys.argv[1]), [], [], []
with torch.no_grad():
    for step in range(3):
        x, t, context = torch.randn(1, 4, 8, 12), torch.tensor([900.0 - step]), torch.randn(2, 5, 12)
        expected = unet(x, t, context)
        differences.append(float((compiled(x, t, context) - expected).norm() / expected.norm()))
        graphs.append(counters["stats"]["unique_graphs"])
    compiled.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: seen.append(1))
    compiled(x, t, context)
print(json.dumps([differences, graphs, dict(counters["graph_break"]), seen]))
"""


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_a_shape_and_none_after_the_first_call(backend: str, tmp_path: Path) -> None:
    """Over steps, prompts and levels; a hook of a block that comes later is called."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differences, graphs, breaks, seen = json.loads(done.stdout.splitlines()[-1])
    assert max(differences) < 1e-5
    assert graphs == [5, 5, 5]  # of 9: residual blocks of 2 widths, transformers; both with x once and twice
    assert breaks == {}
    assert seen == [1]


def test_tensors_are_shared_and_the_base_is_left_alone() -> None:
    unet = UNet(TINY)
    compiled = compile_blocks(unet, "eager")
    pairs = zip(unet.parameters(), compiled.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert set(compiled.state_dict()) == set(unet.state_dict())
    assert all("forward" not in vars(module) for module in unet.modules())
    changed = [type(module).__name__ for module in compiled.modules() if "forward" in vars(module)]
    assert sorted(set(changed)) == ["ResBlock", "SpatialTransformer"]


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler: install g\\+\\+ or clang\\+\\+"):
        compile_blocks(UNet(TINY))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    compile_blocks(UNet(TINY))  # a GPU needs none
