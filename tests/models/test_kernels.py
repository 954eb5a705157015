"""The GPU's kernels against torch's own forms, by Triton's interpreter on a CPU, and by its compiler for GPUs.

The interpreter is chosen as Triton is imported: the tests of numbers run in a process of their own.
"""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: requirements-dev.txt")
if INTERPRETED:
    from ldm.models import kernels
    from ldm.models.layers import GroupNorm, ResBlock


def run(*command: str, interpreted: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_by_the_interpreter() -> None:
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, interpreted=True)
    assert " passed" in said and "failed" not in said


@pytest.mark.skipif(INTERPRETED, reason="what is interpreted is not compiled")
def test_by_the_compiler() -> None:
    """For an A100 and an H100 or H200: 16 bytes at each access to a map, and no register spilled to memory."""
    script = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from ldm.models import kernels

def check(kernel, constants, warps, **types):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    wide = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "fp32") != "fp32"}
    source = triton.compiler.ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, wide)
    for capability in (80, 90):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        access = re.findall(r"(ld|st)\\.global\\.(\\S+)", made.asm["ptx"])
        assert ("ld", "v4.b32") in access, access
        assert "y" not in names or {form for kind, form in access if kind == "st"} == {"v4.b32"}, access
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(made.asm["cubin"])
            tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        assert "STACK:0" in usage and "LOCAL:0" in usage, usage
        print(kernel.__name__, capability, int(re.findall(r"REG:(\\d+)", usage)[0]))

power, ints = triton.next_power_of_2, {"pixels": "i32", "channels": "i32", "part_size": "i32"}
sums = {"means": "*fp32", "squares": "*fp32"}
for pixels, channels in ((4096, 320), (262144, 128)):
    cut = kernels.blocks(pixels, channels, 32)
    form = {"WIDTH": channels // 32, "GROUPS": cut.groups, "ROWS": cut.rows, "LANES": cut.lanes}
    form |= {"PADDED": power(cut.groups)}
    check(kernels._measure, form, cut.warps, x="*bf16", **sums, **ints)
    form |= {"SILU": True, "MERGED": power(cut.parts)}
    maps = {name: "*bf16" for name in ("x", "y", "weight", "bias")}
    check(kernels._normalise, form, cut.warps, **maps, **sums, **ints, eps="fp32")
"""
    lines = run(sys.executable, "-c", script, interpreted=False).splitlines()
    assert len(lines) == 8
    assert all(int(line.split()[-1]) <= 128 for line in lines)  # 128 threads each: 4 such programs a multiprocessor


class TestNumbers:
    __test__ = INTERPRETED  # see test_by_the_interpreter

    @pytest.mark.parametrize("dtype", ULP, ids=str)
    @pytest.mark.parametrize(
        ("shape", "groups"),
        [
            ((2, 320, 8, 8), 32),  # groups of 10 channels
            ((3, 120, 9, 31), 4),  # of 30, and neither pixels nor channels whole blocks
            ((1, 280, 5, 7), 7),  # of 40
            ((2, 24, 33, 65), 2),  # many parts, the last one short
            ((1, 64, 1, 1), 32),
            ((1, 10, 129, 128), 1),  # a large map
        ],
    )
    def test_norm_and_silu(self, shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        norm = GroupNorm(groups, shape[1], eps=1e-5).requires_grad_(False)
        for p in norm.parameters():
            p.normal_(0.5, generator=rng)
        norm = norm.to(dtype)
        x = (2 * torch.randn(shape, generator=rng) + 3).to(dtype)
        wide = copy.deepcopy(norm).double()
        for silu, wanted in ((False, wide(x.double())), (True, wide.activated(x.double()))):
            got = kernels.group_norm(x, norm, silu=silu)
            assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
            off = (got.double() - wanted).abs() / wanted.abs().clamp(min=1 if dtype == torch.float32 else 2**-6)
            assert float(off.max()) < (40 if dtype == torch.float32 else 1.01) * ULP[dtype]

    def test_a_large_mean_costs_no_digits(self) -> None:
        rng = torch.Generator().manual_seed(0)
        norm = GroupNorm(3, 30, eps=1e-6).requires_grad_(False)
        x = torch.randn(2, 30, 48, 48, generator=rng) + torch.tensor([[3e4], [-1e3]])[..., None, None]
        wanted = copy.deepcopy(norm).double()(x.double())
        got = kernels.group_norm(x, norm)
        assert float((got - wanted).abs().max()) < 8e-3  # a difference of numbers near 3e4 has no more in fp32
        assert float((got[1] - wanted[1]).abs().max()) < 3e-4
        naive = x.flatten(2).unflatten(1, (3, 10)).flatten(2)
        variance = naive.square().mean(-1) - naive.mean(-1).square()
        assert float((variance[0] - 1).abs().max()) > 1  # what the usual shortcut would have made of it

    def test_of_any_layout_and_in_any_company(self) -> None:
        rng = torch.Generator().manual_seed(0)
        norm = GroupNorm(4, 40, eps=1e-5).requires_grad_(False)
        x = torch.randn(3, 80, 13, 11, generator=rng)[:, ::2].transpose(2, 3)
        assert not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
        got = kernels.group_norm(x, norm, silu=True)
        torch.testing.assert_close(got, F.silu(norm(x)), rtol=1e-5, atol=1e-5)
        for row in range(3):
            assert torch.equal(kernels.group_norm(x[row : row + 1], norm, silu=True)[0], got[row])

    def test_few_lanes_are_idle_in_the_networks_that_there_are(self) -> None:
        """Stable Diffusion's widths: at least 4 of 5 lanes work, and rows begin where 16 bytes of half precision do."""
        for channels in (128, 256, 320, 512, 640, 960, 1280, 1920, 2560):
            cut = kernels.blocks(64, channels, 32)
            programs = -(-32 // cut.groups)
            assert channels >= 0.8 * programs * cut.lanes
            assert cut.groups * channels // 32 % 8 == 0 or programs == 1

    def test_layers_take_them_where_no_gradient_is_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "DEVICE", "cpu")
        called: list[str] = []
        plain_norm = kernels.group_norm
        monkeypatch.setattr(
            kernels, "group_norm", lambda *given, **named: called.append("") or plain_norm(*given, **named)
        )
        rng = torch.Generator().manual_seed(0)
        block = ResBlock(20, 30, groups=2, eps=1e-5)
        fast = copy.deepcopy(torch.nn.ModuleList([block, block.norm1]))
        kernels.install(fast)
        x = torch.randn(2, 20, 6, 5, generator=rng)
        pairs = ((fast[0], block), (fast[1], block.norm1))
        with torch.no_grad():
            for mine, plain in pairs:
                torch.testing.assert_close(mine(x), plain(x), rtol=1e-5, atol=1e-5)
            assert len(called) == 3
            for mine, plain in pairs:  # another dtype than the weights': torch's form, and its complaint if any
                torch.testing.assert_close(copy.deepcopy(mine).double()(x.double()), plain.double()(x.double()))
                plain.float()
        assert fast.state_dict().keys() == torch.nn.ModuleList([block, block.norm1]).state_dict().keys()
        for mine, _ in pairs:
            mine(x).sum().backward()
        assert fast[0].norm1.weight.grad is not None
        with torch.no_grad():
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            for mine, _ in pairs:
                mine(x)
        assert len(called) == 3
