"""Stopwatches for functions: seconds, floating point operations and memory of a run's stages, watched from outside."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

# Side of the matrices, and products a timing: on a GPU one alone would be timed with its launch.
PRODUCTS = {"cuda": (8192, 10), "cpu": (2048, 2)}
PROBE_SIZE, LONGEST_PRODUCT = 256, 0.1  # seconds


@dataclass
class Stage:
    """One stage of a run: how often it ran, its seconds and GFLOP, and by how many MiB the process' peak grew in it."""

    name: str
    calls: int = 0
    seconds: float = 0.0
    gflop: float = 0.0
    growth: float = 0.0


def peak_memory() -> float:
    """The process' largest resident set so far, GiB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Watch:
    """Replaces functions by timed ones: `with Watch(device) as watch: watch.add(owner, name, stage)`.

    counter: where given, operations are counted, too. On leaving, every owner has its own functions again.
    """

    def __init__(self, device: torch.device, counter: FlopCounterMode | None = None):
        self.device, self.counter = device, counter
        self.stages: dict[str, Stage] = {}
        self.restore = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error) -> None:
        self.restore.close()

    def add(self, owner: object, name: str, stage: str) -> None:
        plain, own = getattr(owner, name), name in vars(owner)
        entry = self.stages.setdefault(stage, Stage(stage))

        def timed(*args, **kwargs):
            peak, flop = peak_memory(), self.counter.get_total_flops() if self.counter else 0
            synchronize(self.device)
            began = time.perf_counter()
            result = plain(*args, **kwargs)
            synchronize(self.device)
            entry.seconds += time.perf_counter() - began
            entry.calls += 1
            entry.growth += (peak_memory() - peak) * 1024
            entry.gflop += (self.counter.get_total_flops() - flop) / 1e9 if self.counter else 0.0
            return result

        setattr(owner, name, timed)
        self.restore.callback(setattr, owner, name, plain) if own else self.restore.callback(delattr, owner, name)


def attention_flop(query, key, value, *_, **__) -> int:
    """Operations of CPU attention, from its shapes [B,H,L,D]: torch's own table knows the GPU's kernels alone."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def attention_backward_flop(grad_out, query, key, value, *rest, **named) -> int:
    """Of CPU attention's gradient, from shapes [B,H,L,D]: scores again, then both factors of each of its two products.

    torch's own table, which knows the GPU's kernels alone, counts five products there against two forwards.
    """
    return attention_flop(query, key, value) * 5 // 2


def flop_counter() -> FlopCounterMode:
    """Counts floating point operations of products, convolutions and attention, forwards and backwards."""
    return FlopCounterMode(display=False, custom_mapping={
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop})


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product, the best of four timings.

    Of a smaller one where that would take long: processors without bfloat16 need a minute for what others do at once.
    """
    size, repeats = PRODUCTS.get(device.type, PRODUCTS["cpu"])
    if device.type != "cuda":
        probe = _product_seconds(device, dtype, PROBE_SIZE, 1)
        while size > PROBE_SIZE and probe * (size / PROBE_SIZE) ** 3 > LONGEST_PRODUCT:
            size //= 2
    best = min(_product_seconds(device, dtype, size, repeats) for _ in range(4))
    return 2 * size**3 * repeats / best / 1e12


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return time.perf_counter() - began
