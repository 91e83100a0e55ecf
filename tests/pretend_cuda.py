"""A CUDA device that is not there: tensors said to lie on it compute on the processor, and mixing devices is an error.

So what code does with devices can be tested on machines without one. Which device a tensor is said to lie on is known
of its storage, so that views and parameters have it, too. CUDA's own kernels, memory and speed are not pretended.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from coser.models import ssm

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GETTERS = {Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__, Tensor.get_device}
READERS = {torch.device, torch._C._nn._parse_to}  # of arguments; they compute nothing
# take tensors of several devices on purpose
CROSSING = {Tensor.copy_, Tensor.data.__set__, Tensor.grad.__set__, Tensor.set_, Tensor.__setstate__,
            torch._has_compatible_shallow_copy_type}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put, Tensor.index_put_}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}
MOVES = {Tensor.to: None, Tensor.cpu: CPU, Tensor.cuda: CUDA}
PURGE_AFTER = 5000  # storages


class Generator(torch.Generator):
    """A generator of the processor that says which device it is of."""

    def __new__(cls, device=CPU):
        self = super().__new__(cls)
        self.said = torch.device(device)
        return self

    def __init__(self, device=CPU):
        pass

    @property
    def device(self) -> torch.device:
        return self.said


class Devices:
    """Which device each storage is said to lie on; None where nobody said, as of gradients."""

    def __init__(self):
        self.known: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.lock = threading.Lock()

    def of(self, tensor: Tensor) -> torch.device | None:
        with torch._C.DisableTorchFunction():
            found = self.known.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        return found and found[1]

    def say(self, tensor: Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction(), self.lock:
            storage = tensor.untyped_storage()
            # while a weak reference is held, no other storage gets this address
            self.known[storage._cdata] = (StorageWeakRef(storage), device)
            if len(self.known) > PURGE_AFTER:
                self.known = {k: v for k, v in self.known.items() if not v[0].expired()}


class PretendCuda(TorchFunctionMode):
    """Computes on the processor what is asked of CUDA; as on CUDA, RuntimeError where tensors of both devices meet."""

    def __init__(self, devices: Devices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in READERS:
            return func(*args, **kwargs)
        if func in GETTERS:
            return self._get(func, self.devices.of(args[0]) or CPU)
        if func in TO_NUMPY and self.devices.of(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in MOVES:
            return self._move(func, args, kwargs)
        tensors = list(_tensors_of((args, kwargs)))
        places = [self.devices.of(t) for t in tensors]
        asked = _device(kwargs.get("device"))
        made_on = asked or (CUDA if CUDA in places else CPU if CPU in places or not places else None)
        generator = kwargs.get("generator")
        if isinstance(generator, Generator) and generator.device.type != (made_on or CPU).type:
            raise RuntimeError(f"Expected a '{made_on}' device type for generator but found '{generator.device}'")
        if func not in CROSSING and CUDA in places:
            self._check(func, args, tensors)
        args = tuple(CPU if isinstance(a, torch.device) else a for a in args)
        out = func(*args, **kwargs | ({"device": CPU} if asked else {}))
        for tensor in _tensors_of(out) if made_on and func not in CROSSING else ():
            if self.devices.of(tensor) is None:  # the storage of an argument, or of a view of it, is known already
                self.devices.say(tensor, made_on)
        return out

    @staticmethod
    def _get(func: Callable, place: torch.device) -> torch.device | bool | int:
        if func == Tensor.device.__get__:
            return place
        if func == Tensor.get_device:
            return 0 if place == CUDA else -1
        return (place == CUDA) == (func == Tensor.is_cuda.__get__)

    def _move(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        tensor, dtype, target = args[0], kwargs.get("dtype"), MOVES[func] or _device(kwargs.get("device"))
        place = self.devices.of(tensor)
        for argument in args[1:] if func is Tensor.to else ():
            if isinstance(argument, Tensor):
                target, dtype = self.devices.of(argument) or CPU, argument.dtype
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, (str, torch.device)):
                target = _device(argument)
        target = target or place or CPU
        out = tensor.to(dtype or tensor.dtype, memory_format=kwargs.get("memory_format", torch.preserve_format))
        if target != (place or CPU) and out.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            out = out.clone()
        if self.devices.of(out) != target:
            self.devices.say(out, target)
        return out

    def _check(self, func: Callable, args: tuple, tensors: list[Tensor]) -> None:
        """A tensor on CUDA may be indexed by one on the processor, and one of its slices be filled from there."""
        if func in INDEXING and self.devices.of(args[0]) == CUDA:
            by_tensors = any(i.dim() for i in _tensors_of(args[1]))
            tensors = [t for t in args[2:] if by_tensors and isinstance(t, Tensor)]
        if any(self.devices.of(t) == CPU and t.dim() for t in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but got cuda:0 and cpu in {func}")


def _tensors_of(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_of(part)


def _device(asked: str | torch.device | None) -> torch.device | None:
    return None if asked is None else CUDA if torch.device(asked).type == "cuda" else CPU


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """Inside, in all threads, torch says that there is a CUDA device and computes on the processor what it is asked."""
    devices = Devices()
    run, from_numpy = threading.Thread.run, torch.from_numpy

    def run_pretending(thread: threading.Thread) -> None:
        with PretendCuda(devices):
            run(thread)

    def from_numpy_on_the_processor(array) -> Tensor:
        tensor = from_numpy(array)
        devices.say(tensor, CPU)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", run_pretending)
        patch.setattr(torch, "from_numpy", from_numpy_on_the_processor)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        patch.setattr(ssm, "_triton_scan", lambda: None)  # whose kernels want the real one
        with PretendCuda(devices):
            yield
