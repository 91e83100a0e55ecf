"""Where and in which number format a model runs, and why."""

from __future__ import annotations

import argparse

import torch

DTYPES = ("bfloat16", "float32")


def choose_device(device: str | None) -> tuple[torch.device, str]:
    """The device to run on and why; ValueError for any but cpu and the machine's CUDA devices."""
    found = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if found else "cpu"), "CUDA found" if found else "no CUDA here"
    try:
        asked = torch.device(device)
    except RuntimeError:  # a word that torch does not know
        asked = None
    if asked is None or asked.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if asked.type == "cuda" and not found:
        raise ValueError(f"device must be one that this machine has, got {device!r} without CUDA; cpu is allowed")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of this machine's {torch.cuda.device_count()} CUDA devices, cuda:0 the "
                         f"first, got {device!r}")
    return asked, "as asked"


def choose_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The weights' dtype on a device and why: bfloat16 where it is the quick one, else float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16, "CUDA"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "the processor has AMX"
    # a third less time for a step of denoising, two fifths less for decoding (docs/training.md)
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "the processor has AVX-512 BF16"
    return torch.float32, "no quick bfloat16 here"


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the computation; without it, the quick one on the "
                        "device: bfloat16 with CUDA from compute capability 8.0 on, AMX or AVX-512 BF16, else float32")


def dtype_asked_for(options: argparse.Namespace) -> torch.dtype:
    """What add_dtype_option was told, or the quick one on options.device (a processor where there is none)."""
    if options.dtype:
        return getattr(torch, options.dtype)
    return choose_dtype(torch.device(getattr(options, "device", "cpu")))[0]
