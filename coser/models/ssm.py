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
import logging
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("coser")

_failed: list[Exception] = []  # what mamba_ssm's kernels died of; once is enough


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
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    # a step's size joins its decay in the exponent, where it costs nothing
    log_dt = dt.clamp_min(torch.finfo(dt.dtype).tiny).log()
    if pad:  # a step of size 0 neither decays nor writes, so padded positions change nothing
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt, log_dt = F.pad(dt, (0, 0, 0, pad)), F.pad(log_dt, (0, 0, 0, pad), value=-1e4)

    split = (b, chunks, size, groups, heads // groups)
    per_step = split[:2] + split[3:] + (size,)  # [b,c,g,h/g,q]
    decay = (dt * A.to(dt.dtype)).view(b, chunks, size, heads).transpose(2, 3).cumsum(-1).view(per_step)
    written = decay - log_dt.view(b, chunks, size, heads).transpose(2, 3).view(per_step)
    total = decay[..., -1]  # [b,c,g,h/g]
    values = x.view(*split, p).permute(0, 1, 3, 4, 2, 5)  # [b,c,g,h/g,q,p]
    B, C = (t.view(*split[:4], 1, s).permute(0, 1, 3, 4, 2, 5) for t in (B, C))  # [b,c,g,1,q,s]

    # inside a chunk: an attention whose weights also decay between the two positions
    y = _DecayedScores.apply(C @ B.transpose(-1, -2), decay, written) @ values
    if chunks > 1:
        # what a chunk leaves behind at its end, summed over all earlier chunks with the decays of those between
        to_end = torch.exp(total[..., None] - written)[..., None].to(x.dtype)
        left = ((B * to_end).transpose(-1, -2) @ values).view(b, chunks, heads, s * p).transpose(1, 2)
        entering = (_decay_before(total.view(b, chunks, heads).transpose(1, 2)).to(x.dtype) @ left).transpose(1, 2)
        from_start = torch.exp(decay)[..., None].to(x.dtype)
        y = y + (C * from_start) @ entering.reshape(*per_step[:4], s, p)

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, chunks * size, heads, p)
    return y[:, :length] if pad else y


class _DecayedScores(torch.autograd.Function):
    """scores [...,1,q,q], decay and written [...,h,q] => scores_ij exp(decay_i - written_j) for j <= i, else 0.

    The largest tensors of the scan: written out, so that they are passed over few times and kept in scores' dtype.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, decay: Tensor, written: Tensor) -> Tensor:
        # masked before the exponential: above the diagonal it could overflow, and infinity times 0 is not a number
        later = _later(decay.shape[-1], decay.device)
        between = (decay[..., :, None] - written[..., None, :]).masked_fill_(later, -math.inf).exp_().to(scores.dtype)
        decayed = scores * between
        ctx.save_for_backward(between, decayed)
        ctx.dtype = decay.dtype
        return decayed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        between, decayed = ctx.saved_tensors
        exponent = gradient * decayed
        return ((gradient * between).sum(-3, keepdim=True),
                exponent.sum(-1, dtype=ctx.dtype), -exponent.sum(-2, dtype=ctx.dtype))


def _decay_before(total: Tensor) -> Tensor:
    """Log decays of chunks [...,c] => what share of chunk j's remains when chunk i starts, [...,i,j]; 0 for j >= i."""
    ends = total.cumsum(-1)
    starts = ends - total
    later = _later(total.shape[-1], total.device, diagonal=0)
    return (starts[..., :, None] - ends[..., None, :]).masked_fill(later, -math.inf).exp()


@functools.lru_cache(maxsize=32)
def _later(size: int, device: torch.device, diagonal: int = 1) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(size, size, dtype=torch.bool, device=device).triu(diagonal)


def scan_backend(device: torch.device) -> str:
    """"triton" where tensors lie on CUDA and mamba_ssm's kernels load, and work as far as is known, else "chunked"."""
    return "triton" if device.type == "cuda" and _triton_scan() is not None and not _failed else "chunked"


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 64) -> Tensor:
    """The scan on the backend that suits x's device; shapes as in `scan_naive`."""
    if scan_backend(x.device) == "chunked":
        return scan_chunked(x, dt, A, B, C, chunk_size)
    power = max(16, 1 << (chunk_size - 1).bit_length())  # the kernels want a power of two
    try:
        return _triton_scan()(x, dt, A.float(), B.to(x.dtype), C.to(x.dtype), power)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # triton compiles at the first launch; without a C compiler that raises anything
        _failed.append(error)
        log.warning("mamba_ssm's kernels do not run here (%s); the scan takes plain torch from now on",
                    str(error).strip().split("\n")[0])
        return scan_chunked(x, dt, A, B, C, chunk_size)


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
