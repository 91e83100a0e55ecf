"""The selective state-space scan of Mamba-2 (SSD): a readable recurrence, its chunked twin, and the choice of backend.

Alphabet of this file: b batch, l sequence, h heads, p head size, g groups (heads h // (H // G) share B and C), s state
size, c chunks, q positions inside a chunk. The recurrence, a head at a time, is
    state_t = exp(dt_t A) state_{t-1} + dt_t B_t x_t^T,     y_t = C_t^T state_t
(Dao & Gu, "Transformers are SSMs", arXiv 2405.21060, equations 1-2 and listing 1).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_naive(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence, one position at a time: the definition that the fast forms are tested against.

    x [b,l,h,p], dt [b,l,h] (positive step sizes), A [h] (negative rates), B and C [b,l,g,s] with h a multiple of g
    => y [b,l,h,p]. Everything in x's dtype.
    """
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = x.new_zeros(x.shape[0], heads, B.shape[-1], x.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None, :]
        outputs.append(torch.einsum("bhs,bhsp->bhp", C[:, t], state))
    return torch.stack(outputs, 1)


def scan_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 64) -> Tensor:
    """`scan_naive` by chunks: matrix products inside chunks, a short recurrence between them (SSD, section 6).

    Shapes as in `scan_naive`; any length. Products run in x's dtype, decays in float32 (float64 if dt is). The cost is
    linear in the length. Raises ValueError for a chunk size below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    (b, length, heads, p), (groups, s) = x.shape, B.shape[2:]
    size = min(chunk_size, length)
    chunks = math.ceil(length / size)
    pad = chunks * size - length
    decay_dtype = torch.promote_types(dt.dtype, torch.float32)
    dt = dt.to(decay_dtype)
    if pad:  # dt = 0 neither decays nor writes, so padded positions change nothing
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))

    per_group = heads // groups
    split = (b, chunks, size, groups)
    steps = dt.view(b, chunks, size, heads).permute(0, 1, 3, 2)  # [b,c,h,q]
    log_decay = (steps * A.to(decay_dtype)[:, None]).cumsum(-1)
    total = log_decay[..., -1]  # [b,c,h]
    values = (x * dt[..., None].to(x.dtype)).view(*split, per_group, p).permute(0, 1, 3, 4, 2, 5)  # [b,c,g,h/g,q,p]
    B = B.view(*split, s).transpose(2, 3)  # [b,c,g,q,s]
    C = C.view(*split, s).transpose(2, 3)

    # inside a chunk: a masked attention whose mask is the decay between two positions
    inside = _decay_between(log_decay).view(b, chunks, groups, per_group, size, size)
    mixed = (C @ B.transpose(-1, -2)).unsqueeze(3) * inside.to(x.dtype)
    y = mixed @ values

    if chunks > 1:
        # what a chunk leaves behind, carried to the start of every later chunk
        to_end = torch.exp(total[..., None] - log_decay).view(b, chunks, groups, per_group, size, 1)
        left = B.transpose(-1, -2).unsqueeze(3) @ (values * to_end.to(x.dtype))  # [b,c,g,h/g,s,p]
        between = _decay_between(total.transpose(1, 2).cumsum(-1))  # [b,h,c,c]
        # shifted by one: the state entering chunk i is the sum over chunks before i, decayed over those between
        between = F.pad(between[:, :, :-1], (0, 0, 1, 0)).to(x.dtype)
        left = left.view(b, chunks, heads, s * p).transpose(1, 2)
        entering = (between @ left).transpose(1, 2).reshape(b, chunks, groups, per_group, s, p)
        from_start = torch.exp(log_decay).view(b, chunks, groups, per_group, size, 1)
        y = y + (C.unsqueeze(3) @ entering) * from_start.to(x.dtype)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, chunks * size, heads, p)
    return y[:, :length] if pad else y


def _decay_between(cumulative: Tensor) -> Tensor:
    """Cumulative log decays [...,q] => exp(sum over j < k <= i) at [...,i,j], 0 above the diagonal.

    Masked before the exponential: above the diagonal it could overflow, and infinity times 0 has no gradient.
    """
    size = cumulative.shape[-1]
    later = _later(size, cumulative.device)
    return (cumulative[..., :, None] - cumulative[..., None, :]).masked_fill(later, -math.inf).exp()


@functools.lru_cache(maxsize=32)
def _later(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def scan_backend(device: torch.device) -> str:
    """"triton" where tensors lie on CUDA and mamba_ssm's kernels load, else "chunked"; asked at each call."""
    return "triton" if device.type == "cuda" and _triton_scan() is not None else "chunked"


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 64) -> Tensor:
    """The scan on the backend that suits x's device; shapes as in `scan_naive`."""
    if scan_backend(x.device) == "chunked":
        return scan_chunked(x, dt, A, B, C, chunk_size)
    power = max(16, 1 << (chunk_size - 1).bit_length())  # the kernels want a power of two
    return _triton_scan()(x, dt, A.float(), B.to(x.dtype), C.to(x.dtype), power)


@functools.lru_cache(maxsize=1)
def _triton_scan():
    """mamba_ssm's `mamba_chunk_scan_combined`, or None where triton or mamba_ssm is missing.

    `import mamba_ssm` needs a compiled extension that the scan itself does not use; without it a stand-in takes its
    place, so that a pure-Python installation of mamba_ssm suffices.
    """
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("mamba_ssm") is None:
        return None
    if importlib.util.find_spec("selective_scan_cuda") is None:
        sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    try:
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError:
        return None
