"""Processes that train one model together: each takes its share of every batch, and gradients are averaged.

On two cores two processes of one thread each train half as fast again as one of two threads, which share every small
operation and wait for each other (`small`, batches of 60 and 120 views: docs/training.md).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn


@dataclass(frozen=True)
class Peers:
    """This process among those of its training: number `rank` of `size`. One alone asks nobody."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that logs, evaluates and saves."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` samples are this process's. Raises ValueError when they cannot be dealt out evenly."""
        if count % self.size:
            raise ValueError(f"a batch of {count} samples cannot be dealt out evenly to {self.size} processes")
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def agreed(self, value: float) -> float:
        """The first process's value, for what is read off a clock."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        distributed.broadcast(told, 0)
        return float(told)

    @torch.no_grad()
    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replaces gradients by their mean over the processes, taken in float32; parameters without one stay so.

        The same parameters must lack one everywhere.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1).float() for g in gradients])
        distributed.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def each_a_part(self, tensors: list[Tensor], costs: list[int], work: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by work(tensor), of the same shape, done by one of the processes for all of them.

        costs: how long each takes, in any unit; they are dealt out so that all finish at about the same time.
        """
        loads, owners = [0] * self.size, [0] * len(tensors)
        for i in sorted(range(len(tensors)), key=lambda i: -costs[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += costs[i]
        for tensor, owner in zip(tensors, owners):
            if owner == self.rank:
                tensor.copy_(work(tensor))
        if self.size > 1:
            for tensor, owner in zip(tensors, owners):
                distributed.broadcast(tensor, owner)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the processes."""
        if self.size == 1:
            return value
        total = value.detach().double().cpu()
        distributed.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Inside, the first process alone, and the others once it is out: what it writes to files they then find."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def train_together(train: Callable[..., None], processes: int, device: str, *arguments) -> None:
    """Calls train(*arguments, peers=...) in so many processes and waits for them; alone, in this one.

    They share the threads that torch has here, and speak by gloo through the processor's memory. An error in one ends
    all. Raises ValueError when several are asked for on a GPU.
    """
    if processes < 1 or processes > 1 and torch.device(device).type != "cpu":
        raise ValueError(f"processes must be 1, or more on a processor, got {processes} on {device}")
    if processes == 1:
        train(*arguments, peers=Peers())
        return
    threads = max(1, torch.get_num_threads() // processes)
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        multiprocessing.spawn(_peer, (processes, threads, meeting, train, arguments), nprocs=processes)


def _peer(rank: int, size: int, threads: int, meeting: str, train: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        train(*arguments, peers=Peers(rank, size))
    finally:
        distributed.destroy_process_group()
