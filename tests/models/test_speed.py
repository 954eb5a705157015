"""What is done for speed changes nothing but rounding, and notices when weights change."""

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.models import attention, processor, speed
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.layers import Upsample, norm
from ldm.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(channels=(32, 64), res_blocks=1, depth=(1, 1), heads=(2, 2), context_dim=160, groups=8)


def unet(seed: int = 0) -> UNet:
    network, rng = UNet(CONFIG), torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.requires_grad_(False).normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.3, generator=rng)
    return network


def painted(network: UNet, dtype: torch.dtype = torch.float32, size: int = 24) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    z, tokens = torch.randn(2, 4, size, size, generator=rng), torch.randn(2, 7, 160, generator=rng)
    with torch.no_grad():
        return network.to(dtype)(z.to(dtype), torch.tensor([3.0, 801.0]), Conditioning(tokens.to(dtype))).float()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that oneDNN multiplies with: all layers', in fp16 by way of fp32 as well."""
    for module in (speed, attention):
        monkeypatch.setattr(module, "slow_blas", lambda: True)
        monkeypatch.setattr(module, "slow_fp16", lambda: True)
    monkeypatch.setattr(speed, "WORTH_A_CALL", 32)
    taken: list[tuple[int, ...]] = []
    product = speed._product
    monkeypatch.setattr(speed, "_product", lambda x, w, b: taken.append(tuple(w.shape)) or product(x, w, b))
    return taken


@pytest.mark.usefixtures("products")
def test_a_prepared_unet_is_the_same_to_rounding() -> None:
    plain, fast = unet(), unet()
    speed.prepare(fast)
    assert fast.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert any(isinstance(module, speed.Direct) for module in fast.modules())
    wanted, got = painted(plain), painted(fast)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(painted(copy.deepcopy(fast)), wanted, rtol=1e-4, atol=1e-5)


def test_a_prepared_autoencoder_decodes_the_same() -> None:
    plain = Autoencoder(AutoencoderConfig(channels=(16, 32), res_blocks=1, groups=8)).requires_grad_(False)
    fast = copy.deepcopy(plain)
    speed.prepare(fast)
    z = torch.randn(1, 4, 24, 24)
    torch.testing.assert_close(fast.decode(z), plain.decode(z), rtol=1e-4, atol=1e-5)


def test_without_gradients_a_linear_layer_is_onednn_s(products: list[tuple[int, ...]]) -> None:
    x, layer = torch.randn(3, 5, 64), nn.Linear(64, 48)
    speed.prepare(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert products == [(48, 64)]
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x.double()), nn.functional.linear(x.double(), layer.weight, layer.bias))
    assert len(products) == 1


def no_worse(fast: torch.Tensor, plain: torch.Tensor, wanted: torch.Tensor, chance: float = 1.02) -> None:
    """Than torch's own; by chance the roundings between a network's layers add up to a little more or less."""
    assert (fast.float() - wanted).norm() <= chance * (plain.float() - wanted).norm() < 0.01 * wanted.norm()


def test_fp16_is_as_exact_as_torch_s_and_kept_once(
    products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no products of fp16, networks compute in fp32, tile by tile of their weights."""
    monkeypatch.setattr(speed, "TILE", 2**12)
    monkeypatch.setattr(speed, "_ROOM", threading.local())
    plain, fast = unet().half(), unet().half()
    speed.prepare(fast)
    wanted = painted(unet().half(), torch.float32)  # of the same rounded weights
    no_worse(painted(fast, torch.float16), painted(plain, torch.float16), wanted, chance=1.1)
    weights = [module.weight for module in fast.modules() if isinstance(module, nn.Linear)]
    assert {tuple(weight.shape) for weight in weights} <= set(products)
    assert all(weight.dtype == torch.float16 for weight in fast.state_dict().values())
    assert not any(module in speed._LAID_OUT for module in fast.modules())
    assert len(speed._ROOM.wide) <= max(2**12, 16 * 128 * 9)  # 16 rows of the widest kernel
    assert max(weight.numel() for weight in fast.parameters()) > len(speed._ROOM.wide)


def test_fp16_with_its_own_products_is_left_to_torch(
    products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (speed, attention):
        monkeypatch.setattr(module, "slow_fp16", lambda: False)
    network, text = unet(), nn.MultiheadAttention(32, 2, batch_first=True).requires_grad_(False).half()
    speed.prepare(network)
    speed.prepare(text)
    painted(network, torch.float16)
    x = torch.randn(1, 7, 32).half()
    text(x, x, x, need_weights=False)
    assert not products


def test_who_multiplies_what_is_asked_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.backends.mkldnn.is_available()
    for bf16, fp16 in ((True, False), (False, True)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda fp16=fp16: fp16)
        asked = processor.multiplies.__wrapped__
        monkeypatch.setattr(processor, "multiplies", asked)
        found = [asked(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
        assert found == [here, here and bf16, here and fp16, False]
        assert processor.slow_fp16() is (here and not fp16)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (48, 49)])
@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3, "padding": (1, 2)}, {"kernel_size": (3, 2), "stride": (2, 1)}, {"kernel_size": 1}],
    ids=["padded", "strided", "1x1"],
)
def test_a_convolution_of_few_pixels_is_a_product(
    options: dict[str, Any], size: tuple[int, int], dtype: torch.dtype, products: list[tuple[int, ...]]
) -> None:
    if dtype == torch.bfloat16 and not processor.multiplies(dtype):
        pytest.skip("this processor has no products of bf16")
    rng, conv = torch.Generator().manual_seed(0), nn.Conv2d(24, 40, **options, bias="stride" not in options)
    plain, x = conv.to(dtype), torch.randn(2, 24, *size, generator=rng).to(dtype)
    fast, wanted = copy.deepcopy(plain), copy.deepcopy(plain).float()
    speed.prepare(fast)
    with torch.no_grad():
        got = fast(x)
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.float32:
            torch.testing.assert_close(got, plain(x), rtol=1e-4, atol=1e-5)
        else:
            no_worse(got, plain(x), wanted(x.float()))
    few = size[0] * size[1] * fast.kernel_size[0] * fast.kernel_size[1] <= speed.FEW
    assert len(products) == few
    fast(x.requires_grad_()).sum().backward()
    assert fast.weight.grad is not None and len(products) == few


def test_a_convolution_in_groups_is_left_alone() -> None:
    for options in ({"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}):
        conv = nn.Conv2d(4, 4, 3, **options)
        speed.prepare(conv)
        assert type(conv) is nn.Conv2d


def test_a_text_tower_in_fp16_is_as_exact_as_torch_s(products: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(64, 4, batch_first=True).requires_grad_(False)
    x, mask = torch.randn(2, 9, 64).half(), torch.full((9, 9), float("-inf")).triu(1).half()
    plain.in_proj_bias.normal_()
    wanted = copy.deepcopy(plain.half()).float()(*[x.float()] * 3, need_weights=False, attn_mask=mask.float())[0]
    fast = copy.deepcopy(plain)
    speed.prepare(fast)
    got, none = fast(x, x, x, need_weights=False, attn_mask=mask)
    assert none is None
    no_worse(got, plain(x, x, x, need_weights=False, attn_mask=mask)[0], wanted)
    assert products == [(192, 64), (64, 64)]
    others = ((x, x.clone(), x, {"need_weights": False}), (x, x, x, {}))
    for *three, given in others:
        torch.testing.assert_close(fast(*three, **given), plain(*three, **given))
    x.requires_grad_()
    fast(x, x, x, need_weights=False)[0].sum().backward()
    assert x.grad is not None and len(products) == 2


def test_feed_forward_in_bf16_is_fused_where_nothing_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no kernels for bf16")
    monkeypatch.setattr(speed, "native_bf16", lambda device: True)
    rng = torch.Generator().manual_seed(0)
    x, plain = torch.randn(2, 9, 32, generator=rng), attention.FeedForward(32).requires_grad_(False)
    for p in plain.parameters():
        p.normal_(0, 0.3, generator=rng)
    fast = copy.deepcopy(plain)
    speed.prepare(fast)
    assert isinstance(fast, speed.Fused)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)  # fp32 goes the plain way
    x, fast = x.bfloat16(), fast.bfloat16()
    wanted = plain.bfloat16().float()(x.float())
    calls, chunk = [], torch.Tensor.chunk
    monkeypatch.setattr(
        torch.Tensor, "chunk", lambda self, *given, **named: calls.append(1) or chunk(self, *given, **named)
    )
    assert (fast(x) - wanted).norm() < 0.01 * wanted.norm()
    assert len(calls) == 2  # of the weight and the bias
    fast(x.requires_grad_()).sum().backward()
    assert len(calls) == 3 and x.grad is not None  # of the product


def test_small_maps_in_bf16_are_normed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "native_bf16", lambda device: True)
    rng, plain = torch.Generator().manual_seed(0), norm(12, 4, eps=1e-5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(1, 0.3, generator=rng)
    fast = copy.deepcopy(plain)
    speed.prepare(fast)
    x = torch.randn(2, 12, 9, 7, generator=rng).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=0)  # fp32 goes the plain way
        fast, x = fast.bfloat16(), x.bfloat16()
        wanted = plain.bfloat16().float()(x.float())
        got = fast(x)
        assert torch.equal(got, wanted.bfloat16()) and got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast.activated(x), torch.nn.functional.silu(got))
        large = torch.randn(1, 12, 32, 32, generator=rng).bfloat16()
        assert torch.equal(fast(large), plain.bfloat16()(large))
    fast(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(8, 8), (9, 13), (7, 9)])
def test_upsampling_in_phases_is_the_same(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    plain = Upsample(6)
    fast, x = copy.deepcopy(plain), torch.randn(2, 6, *shape, generator=rng)
    speed.prepare(fast)
    made, phases = [], speed._phases
    monkeypatch.setattr(speed, "_phases", lambda weight: made.append(1) or phases(weight))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)
        fast(x)
        assert len(made) == (shape[0] * shape[1] >= speed.WORTH_PHASES)
        for layer in (plain, fast):
            layer.conv.weight.mul_(2)  # as an adapter may
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)
    count = len(made)
    fast(x).sum().backward()
    assert fast.conv.weight.grad is not None and len(made) == count


def test_without_need_a_linear_layer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slow_blas", lambda: False)
    monkeypatch.setattr(speed, "slow_fp16", lambda: False)
    layer = nn.Linear(256, 256)
    speed.prepare(layer)
    assert type(layer) is nn.Linear


def test_kept_memory_costs_no_fresh_pages() -> None:
    """In a process of its own, for it cannot be undone."""
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc only")
    script = """
import resource, torch
from ldm.models import speed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), speed.keep_memory(), min(faults(), faults()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, kept, after = run.stdout.split()
    if kept == "False":
        pytest.skip("not glibc")
    assert int(after) * 10 < int(before)


def test_attention_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet()
    wanted, called = painted(network), []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object = None) -> torch.Tensor:
        called.append(q.shape)
        return attention.fused(q, k, v)

    monkeypatch.setitem(attention.ATTENTIONS, "sdpa", kernel)
    speed.prepare(network, "sdpa")
    torch.testing.assert_close(painted(network), wanted, rtol=1e-4, atol=1e-5)
    assert len(called) == 2 * sum(isinstance(m, attention.TransformerBlock) for m in network.modules()) > 0
    with pytest.raises(UserError, match=r"unknown attention 'spda' \(did you mean 'sdpa'"):
        speed.prepare(network, "spda")
    with pytest.raises(UserError, match=r"attention xformers: (xformers is not installed|its kernels need a GPU)"):
        speed.prepare(network, "xformers")


def test_compiling_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, network = [], unet()
    monkeypatch.setattr(attention.TransformerBlock, "compile", lambda self, **options: seen.append(self))
    speed.prepare(network)
    assert not seen
    speed.prepare(network, compiled=True)
    assert seen == [m for m in network.modules() if isinstance(m, attention.TransformerBlock)]
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        speed.prepare(network, compiled=True)


def test_compiled_for_a_gpu_it_takes_kernels_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.TransformerBlock, "compile", lambda self, **options: None)
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile: on a GPU it needs Triton"):
        speed.prepare(unet().to("meta"), compiled=True)  # any device that is no CPU
    monkeypatch.undo()
    pytest.importorskip("triton", reason="triton is not installed: requirements-dev.txt")
    from ldm.models import graphs, kernels

    monkeypatch.setattr(attention.TransformerBlock, "compile", lambda self, **options: None)
    for device, taken in (("meta", True), ("cpu", False)):
        network = unet().to(device)
        speed.prepare(network)
        assert type(network) is UNet and not isinstance(network.norm_out, kernels.FusedNorm)  # only when asked
        speed.prepare(network, compiled=True)
        assert isinstance(network, graphs.Recorded) is taken
        assert isinstance(network.norm_out, kernels.FusedNorm) is taken


@pytest.mark.slow
def test_a_compiled_unet_is_the_same_to_rounding() -> None:
    """In a process of its own: the tests' check of shapes cannot be compiled."""
    script = """
import sys, torch
sys.path.insert(0, "tests")
from models import test_speed
plain, fast = test_speed.unet(), test_speed.unet()
test_speed.speed.prepare(fast, compiled=True)
torch.testing.assert_close(test_speed.painted(fast), test_speed.painted(plain), rtol=1e-4, atol=1e-5)
compiled = [m for m in fast.modules() if m._compiled_call_impl is not None]
print(len(compiled), torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode == 0, run.stderr[-2000:]
    blocks, graphs = map(int, run.stdout.split())
    assert blocks == sum(isinstance(m, attention.TransformerBlock) for m in unet().modules())
    assert 1 <= graphs <= 4 * blocks  # on a CPU the attentions inside stay what they are


def test_bf16_is_native_where_the_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for avx, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert speed.native_bf16(cpu) is (avx or amx)
    assert speed.native_bf16(torch.device("meta")) is False
