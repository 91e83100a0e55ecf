"""How much of a machine a training uses: views and floating point operations a second, against plain products."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator

import torch

from coser.stopwatch import flop_counter, matmul_rate, synchronize

rate_here = functools.cache(matmul_rate)  # once a process: trainings that follow each other need not wait for it again


def flop_of(work: Callable[[], object]) -> int:
    """Floating point operations of one call of `work`: products, convolutions, attention.

    Compiled parts run uncompiled, since a counter sees nothing inside them. Custom kernels (the Triton scan) are not
    seen either: where one is in use this is a lower bound.
    """
    with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
        work()
    return counter.get_total_flops()


def bytes_kept(work: Callable[[], object]) -> int:
    """Bytes that `work` keeps for a backward pass besides parameters: what a training's memory grows with."""
    kept: dict[int, int] = {}  # storages, which several saved tensors may share

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not (isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()  # held until counted: freed storages would give their addresses away again
    del result
    return sum(kept.values())


class Throughput:
    """What a training does in a second, told at every line of its log: the `meter` of `coser.train_loop.train_loop`.

    matmul: TFLOP/s of a plain product in the training's dtype on the machine, measured here where not given. A step is
    `with meter.step():`, and inside it `meter.did(views, flop)`; `figures()` => views_per_second, tflops and mfu (share
    of `matmul`) since the last time it was asked. Between steps (evaluating, saving) no time counts.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16, matmul: float | None = None):
        self.device = device
        self.matmul = rate_here(device, dtype) if matmul is None else matmul
        self.known: dict[Hashable, int] = {}
        self.seconds = self.views = self.flop = 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds += time.perf_counter() - began

    def did(self, views: int, flop: float) -> None:
        self.views += views
        self.flop += flop

    def flop_once(self, key: Hashable, work: Callable[[], object]) -> int:
        """`flop_of(work)`, run and counted when `key` is first asked for; its time counts in no figure."""
        if key not in self.known:
            synchronize(self.device)
            began = time.perf_counter()
            self.known[key] = flop_of(work)
            synchronize(self.device)
            self.seconds -= time.perf_counter() - began
        return self.known[key]

    def figures(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        tflops = self.flop / seconds / 1e12
        out = {"views_per_second": self.views / seconds, "tflops": tflops, "mfu": tflops / self.matmul}
        self.seconds = self.views = self.flop = 0.0
        return out
