"""The quantiser: bounded errors, no bias, nothing of the user's touched, compiled once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_command
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from gradckpt_dist import StorageError
from gradckpt_dist.storage import kernels, quantiser
from gradckpt_dist.storage.kernels import CHUNK, GROUP, LANES
from gradckpt_dist.storage.noise import NoiseSource
from gradckpt_dist.storage.quantiser import DTYPES, Quantised, dequantise, quantise

SHAPES = [(4, 128, 64), (3, 1000), (5,), (0,), (2, 0, 3), (), (CHUNK + 1,)]
LEVELS = {8: 255, 6: 63, 4: 15}
HALVES = (torch.float16, torch.bfloat16)


def quantised(x: Tensor, bits: int, noise: NoiseSource | None = None) -> Quantised:
    result = quantise(x, bits, noise or NoiseSource())
    assert result is not None
    return result


def there_and_back(x: Tensor, bits: int, noise: NoiseSource | None = None) -> Tensor:
    return dequantise(quantised(x, bits, noise))


def seed(value: int = 7) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)


def levels(x: Tensor, bits: int) -> Tensor:
    """What one level is worth, for each value of [chunks, 128, 16]."""
    low, high = (extreme(x.double(), 1, keepdim=True) for extreme in (torch.amin, torch.amax))
    if x.dtype in HALVES or bits == 4:
        return ((high - low) / LEVELS[bits]).expand(x.shape)
    # The origin is a whole number of levels, up to one below the minimum, and of 16 bits.
    return torch.maximum((high - low) / (LEVELS[bits] - 1), low.abs() / 32767).expand(x.shape)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_comes_back(dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    back = there_and_back(x, bits)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert back.is_contiguous()
    if x.numel():
        span = (x.max() - x.min()).item()
        assert (back.float() - x.float()).abs().max() <= 1.02 * span / LEVELS[bits] + 0.01 * x.abs().max()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e4, 1e36])
def test_errors_stay_within_a_level(dtype: torch.dtype, bits: int, scale: float) -> None:
    x = (torch.randn(3, GROUP, LANES) * scale + scale).to(dtype)
    if not x.isfinite().all():
        pytest.skip("out of the range of this type")
    back = there_and_back(x, bits)
    # Half a level to the nearest code, one at most with noise; scales are up to 1/128 above; then the type rounds.
    allowed = levels(x, bits) * (1 + 1 / 128) * (1 if bits == 4 else 0.5) * 1.001
    rounding = back.double().abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert ((back.double() - x.double()).abs() <= allowed + rounding).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_minima_and_constant_groups_are_exact_in_half_precision(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(2, GROUP, LANES).to(dtype)
    x[:, :, 3] = 0.1
    back = there_and_back(x, bits)
    assert torch.equal(back[:, :, 3], x[:, :, 3])
    lowest = x.argmin(1, keepdim=True)
    assert torch.equal(back.gather(1, lowest), x.gather(1, lowest)) or bits == 4
    assert (back >= x.amin(1, keepdim=True)).all()


@pytest.mark.parametrize("bits", [8, 6])
def test_zero_is_exact_where_a_group_holds_it(bits: int) -> None:
    x = torch.randn(2, GROUP, LANES) - 1
    x[:, ::3] = 0.0
    x[:, :, 4] = 0.0
    assert (there_and_back(x, bits)[x == 0] == 0).all()


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("offset", [-0.1, 0.1, 1e4, -3e38])
def test_a_group_far_from_zero_loses_what_sixteen_bits_cannot_hold(bits: int, offset: float) -> None:
    x = (offset + offset * 1e-7 * torch.randn(2, GROUP, LANES)).float()
    assert (there_and_back(x, bits).double() - x.double()).abs().max() <= abs(offset) / 32767 / 2 * 1.01


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_stay_finite(dtype: torch.dtype, bits: int) -> None:
    largest = torch.finfo(dtype).max
    x = torch.linspace(-0.2, 0.2, 2 * CHUNK, dtype=torch.float64).mul(largest).to(dtype)
    if dtype == torch.float16:
        x[::LANES] = largest
        x[LANES // 2 :: LANES] = -largest
    back = there_and_back(x, bits)
    assert back.isfinite().all()
    assert (back.double() - x.double()).abs().max() <= 2.1 * largest / LEVELS[bits]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_range_that_float32_can_hardly_hold_is_left_alone(bits: int) -> None:
    x = torch.linspace(-3e38, 3e38, 2 * CHUNK)
    assert quantise(x, bits, NoiseSource()) is None


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_subnormal_numbers_do_not_become_large(bits: int) -> None:
    x = torch.rand(2 * CHUNK) * 1e-39
    back = there_and_back(x, bits)
    assert back.isfinite().all()
    assert (back - x).abs().max() <= 1.2e-38  # the smallest normal number


def test_other_types_and_widths_are_refused() -> None:
    with pytest.raises(StorageError, match=r"cannot quantise torch\.int64 in 8 bits; give float32"):
        quantise(torch.arange(3), 8, NoiseSource())
    with pytest.raises(StorageError, match=r"in 5 bits; give .* 8, 6 or 4 bits"):
        quantise(torch.randn(3), 5, NoiseSource())


def test_bytes_are_those_of_codes_origins_and_scales() -> None:
    x = torch.randn(4 * CHUNK)
    groups = 4 * LANES
    assert quantised(x, 8).size_bytes == x.numel() + 4 * groups
    assert quantised(x, 6).size_bytes == x.numel() * 3 // 4 + 4 * groups
    assert quantised(x, 4).size_bytes == x.numel() // 2 + 6 * groups
    assert quantised(x.bfloat16(), 4).size_bytes == x.numel() // 2 + 4 * groups
    assert quantised(x.half(), 8).size_bytes == x.numel() + 6 * groups


# -- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_on_the_cpu_a_value_that_is_not_finite_is_found(bits: int, bad: float) -> None:
    for size, position in ((4 * CHUNK, 5000), (7, 3)):
        x = torch.randn(size)
        x[position] = bad
        assert quantise(x, bits, NoiseSource()) is None


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("compiled", [False, True])
def test_elsewhere_its_group_comes_back_as_nan(bits: int, bad: float, compiled: bool) -> None:
    x = torch.randn(4, GROUP, LANES)
    x[2, 100, 7] = bad
    there, back = _kernels(bits, compiled)
    result = back(*there(x, seed())) if bits == 4 else back(*there(x))
    affected = torch.zeros(4, 1, LANES, dtype=torch.bool)
    affected[2, :, 7] = True
    assert torch.equal(result.isnan(), affected.expand_as(result))
    assert (result - x)[~affected.expand_as(result)].abs().max() < 1


# -- noise ----------------------------------------------------------------------------------------------------------


def test_the_mean_of_draws_converges_as_the_root_of_their_number() -> None:
    x = torch.randn(2 * CHUNK)
    noise = NoiseSource(1)
    draws = torch.stack([there_and_back(x, 4, noise) for _ in range(256)]).double()
    errors = {n: (draws[:n].mean(0) - x).square().mean().sqrt().item() for n in (1, 4, 16, 64, 256)}
    for n, error in errors.items():
        assert error == pytest.approx(errors[1] / n**0.5, rel=0.1)


def test_eight_bits_need_no_noise() -> None:
    noise = NoiseSource()
    x = torch.randn(2 * CHUNK)
    assert torch.equal(there_and_back(x, 8, noise), there_and_back(x, 8, noise))
    assert noise.draws == 0
    assert not torch.equal(there_and_back(x, 4, noise), there_and_back(x, 4, noise))
    assert noise.draws == 2


def test_noise_is_uniform_and_of_little_correlation() -> None:
    source = NoiseSource(3)
    x = torch.empty(2, GROUP, LANES)
    words = [torch.cat(kernels._noise(x, seed(source.draw())), 2) for _ in range(512)]
    draws = torch.stack(words).mT / 2**27
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.histc(draws, 16, 0, 1) / draws.numel()
    assert (histogram * 16 - 1).abs().max() < 0.02
    # The mean of a group varies as that of independent numbers, and so does that of a lane over groups.
    assert draws.mean(2).var().item() == pytest.approx(1 / 12 / GROUP, rel=0.1)
    assert draws.mean((1, 3)).var().item() == pytest.approx(1 / 12 / (2 * LANES), rel=0.1)


def test_seeds_depend_on_the_seed_and_go_on_after_a_checkpoint() -> None:
    one, same, other = NoiseSource(5), NoiseSource(5), NoiseSource(6)
    seeds = [one.draw() for _ in range(100)]
    assert seeds == [same.draw() for _ in range(100)]
    assert not set(seeds) & {other.draw() for _ in range(100)}
    assert all(-(2**31) <= value < 2**31 for value in seeds)
    resumed = NoiseSource()
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [resumed.draw() for _ in range(3)] == [one.draw() for _ in range(3)]
    with pytest.raises(StorageError, match="give what state_dict"):
        resumed.load_state_dict({"seed": 1})


def test_the_users_random_numbers_stay_as_they_are() -> None:
    torch._dynamo.reset()  # compiling must not draw either
    before = torch.get_rng_state()
    there_and_back(torch.linspace(0, 1, 2 * CHUNK), 4)
    assert torch.equal(torch.get_rng_state(), before)


# -- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_and_compiled_agree_but_for_ties(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(64, GROUP, LANES).to(dtype)
    arguments = (x, seed()) if bits == 4 else (x,)
    codes = []
    for compiled in (False, True):
        there, back = _kernels(bits, compiled)
        result = there(*arguments)
        words, grid = (result[:-1], result[-1:]) if dtype == torch.float32 and bits != 4 else (result[:-2], result[-2:])
        codes.append((*_unpacked(words, bits), *grid, back(*result)))
    for one, other in zip(*codes, strict=True):
        if not one.is_floating_point():
            difference = (one.int() - other.int()).abs()
            assert difference.max() <= 1
            assert (difference > 0).float().mean() < 1e-3
    assert torch.equal(codes[0][-2], codes[1][-2])
    assert ((codes[0][-1] != codes[1][-1]).float().mean()) < 1e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_gpus_run_gives_the_same(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(64, GROUP, LANES).to(dtype)
    codes = quantised(x, bits).packed
    assert torch.equal(getattr(kernels, f"spread{bits}")(*codes), getattr(kernels, f"dequantise{bits}")(*codes))


def test_one_graph_for_each_type_and_width() -> None:
    torch._dynamo.reset()
    counters.clear()
    for pair in quantiser._KERNELS.values():
        pair.quantise._compiled.clear()
        pair.dequantise._compiled.clear()  # called directly, they would not need a graph again

    def go(size: int) -> None:
        for bits in (8, 6, 4):
            there_and_back(torch.randn(size), bits)

    go(2 * CHUNK)
    assert counters["stats"]["unique_graphs"] == 6
    for size in (5 * CHUNK, 3 * CHUNK + 1, 40 * CHUNK, 17):
        go(size)
    with torch.autocast("cpu", torch.bfloat16):
        go(2 * CHUNK)
    with _Seen() as seen, torch.device("cpu"):
        go(2 * CHUNK)
    with torch.no_grad():
        go(2 * CHUNK)
    assert seen.names == ["aten.randn.default"] * 3  # nothing of the quantiser's
    assert counters["stats"]["unique_graphs"] == 6


def test_works_inside_backward() -> None:
    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.held = quantised(x, 8)
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * dequantise(ctx.held)

    x = torch.randn(2 * CHUNK, requires_grad=True)
    Through.apply(x).sum().backward()
    assert x.grad is not None
    assert (x.grad - x.detach()).abs().max() < 0.02


@pytest.mark.parametrize("broken", [{"CXX": "/nonexistent/c++"}, {"TORCH_COMPILE_DISABLE": "1"}])
def test_without_a_compiler_it_is_right_and_says_once_that_it_is_slow(broken: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, torch\n"
        "from gradckpt_dist.storage.noise import NoiseSource\n"
        "from gradckpt_dist.storage.quantiser import quantise, dequantise\n"
        "logging.basicConfig()\n"
        "x = torch.randn(50000)\n"
        "for _ in range(2):\n"
        "    for bits, bound in ((8, 0.02), (6, 0.07), (4, 0.6)):\n"
        "        assert (dequantise(quantise(x, bits, NoiseSource())) - x).abs().max() < bound\n"
    )
    cache = str(tmp_path / "inductor")
    done = run_command([sys.executable, str(script)], TORCHINDUCTOR_CACHE_DIR=cache, OMP_NUM_THREADS="1", **broken)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("gradckpt: torch.compile does not work here") == 1
    assert "ten times slower" in done.stderr


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _kernels(bits: int, compiled: bool) -> tuple[Any, Any]:
    there, back = (getattr(kernels, f"{verb}{bits}") for verb in ("quantise", "dequantise"))
    return (torch.compile(there, options=kernels.CPU_OPTIONS), torch.compile(back)) if compiled else (there, back)


def _unpacked(words: Sequence[Tensor], bits: int) -> Iterator[Tensor]:
    for word in words:
        yield from (word >> shift & (1 << bits) - 1 for shift in range(0, 32 - 32 % bits, bits))
    if bits == 6:
        yield sum((word >> 30 & 3) << 2 * n for n, word in enumerate(words))
