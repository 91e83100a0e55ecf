"""The optimiser of all trainings: fp32 masters, AdamW, Muon for matrices if asked, and an average of the weights.

The model computes in its own dtype (bf16 on machines that are quick in it); gradients move fp32 masters, which are
copied back. Convolution kernels are matrices here, [out, in*k*k]. Its whole state is a flat dict of tensors:
safetensors, no pickle.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from coser.peers import Peers


class MasterOptimizer:
    """Steps a model's parameters through fp32 masters and keeps their exponential moving average.

    lr is in AdamW's units for both parts (Muon's update is scaled to AdamW's root mean square, "Muon is Scalable for
    LLM Training", section 2.2). ema_decay: the average's decay, reached by warming up as (1 + step) / (10 + step).
    clip: largest norm of the whole gradient. use_muon=False: AdamW for all. peers: the processes that make the same
    steps, each of which orthogonalises a part of the matrices for all. start: weights, by their names, of which the
    model's own are a rounded copy; masters without one begin at the model's.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01, ema_decay: float = 0.999,
                 clip: float = 1.0, use_muon: bool = True, peers: Peers = Peers(),
                 start: Mapping[str, Tensor] = MappingProxyType({})):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.params = [p for _, p in named]
        self.lr, self.ema_decay, self.clip, self.steps = lr, ema_decay, clip, 0
        is_matrix = [p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 8 for p in self.params]
        exact = [start[n].to(p.device) if n in start else p for n, p in named]
        self.masters = [self._master(p, m) for p, m in zip(exact, is_matrix)]
        self.ema = [m.clone() for m in self.masters]
        muon = [m for m, matrix in zip(self.masters, is_matrix) if matrix and use_muon]
        rest = [m for m, matrix in zip(self.masters, is_matrix) if not (matrix and use_muon)]
        self.optimizers = []
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True))
        if muon:
            self.optimizers.append(BatchedMuon(muon, lr, weight_decay, self.params[0].dtype, peers))

    @staticmethod
    def _master(p: Tensor, matrix: bool) -> Tensor:
        master = p.detach().float().clone(memory_format=torch.contiguous_format)
        return master.reshape(len(p), -1) if matrix else master

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> float:
        """One update from the parameters' gradients (which it clears) at lr * lr_scale; returns the gradient's norm."""
        for p, master in zip(self.params, self.masters):
            if p.grad is None:
                master.grad = torch.zeros_like(master)
            else:  # a fused AdamW walks through memory: kernels of channels_last models would meet other weights there
                master.grad = p.grad.float().contiguous().reshape(master.shape)
            p.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * lr_scale
            optimizer.step()
        self.steps += 1
        decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.ema, self.masters, 1 - decay)
        self._write(self.masters)
        return float(norm)

    @torch.no_grad()
    def _write(self, source: list[Tensor]) -> None:
        for p, m in zip(self.params, source):
            p.copy_(m.reshape(p.shape))

    @torch.no_grad()
    def averaged_copy(self, model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
        """A copy of the model with the averaged weights: what is saved.

        The weights are at their full precision, cast to `dtype` once.
        """
        copied = copy.deepcopy(model).float()
        parameters = dict(copied.named_parameters())
        for name, ema in zip(self.names, self.ema):
            parameters[name].copy_(ema.reshape(parameters[name].shape))
        return copied.to(dtype)

    def use_average(self) -> None:
        """Puts the averaged weights into the model, for evaluation or saving; `use_masters` goes back to training."""
        self._write(self.ema)

    def use_masters(self) -> None:
        self._write(self.masters)

    def state(self) -> dict[str, Tensor]:
        """Masters, averages, the optimisers' tensors and counters, flat."""
        out = {"steps": torch.tensor(self.steps)}
        for name, master, ema in zip(self.names, self.masters, self.ema):
            out[f"master/{name}"], out[f"ema/{name}"] = master, ema
        for o, optimizer in enumerate(self.optimizers):
            for i, entry in optimizer.state_dict()["state"].items():
                out |= {f"optimizer/{o}/{i}/{k}": torch.as_tensor(v) for k, v in entry.items()}
        return {k: v.detach().cpu().contiguous() for k, v in out.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes `state()` of a run of the same model. Raises ValueError when parameters or optimisers differ."""
        missing = [n for n in self.names if f"master/{n}" not in state]
        if missing:
            raise ValueError(f"the training state has no {missing[0]!r} ({len(missing)} parameters missing); "
                             "it belongs to another model")
        for name, master in zip(self.names, self.masters):
            if state[f"master/{name}"].shape != master.shape:
                raise ValueError(f"the training state's {name!r} must be {list(master.shape)}, got "
                                 f"{list(state[f'master/{name}'].shape)}; it belongs to another model")
        moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(2)]
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, o, i, k = key.split("/")
                moments[int(o)].setdefault(int(i), {})[k] = value
        counts = [len(o.param_groups[0]["params"]) for o in self.optimizers]
        if int(state["steps"]) and [len(m) for m in moments if m] != counts:
            raise ValueError(f"the training state must hold {counts} moments for these optimisers, got "
                             f"{[len(m) for m in moments if m]}; the run began with another choice of AdamW and Muon")
        self.steps = int(state["steps"])
        with torch.no_grad():
            for name, master, ema in zip(self.names, self.masters, self.ema):
                master.copy_(state[f"master/{name}"])
                ema.copy_(state[f"ema/{name}"])
        for o, (optimizer, entries) in enumerate(zip(self.optimizers, moments)):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
        self.use_masters()


class BatchedMuon(torch.optim.Muon):
    """torch's Muon, whose Newton-Schulz iterations take all matrices of one shape at once, in a dtype of our choice.

    torch's own go matrix by matrix and in bfloat16 wherever they run: on a processor that is not quick in it, a step of
    the preset `small` took 30 s for them. dtype: of the iterations. Weights and momentum stay float32. peers: processes
    with the same gradients, which share the iterations.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype,
                 peers: Peers = Peers()):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.dtype, self.peers = dtype, peers

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters, which must have gradients."""
        for group in self.param_groups:
            params, gradients = group["params"], [p.grad for p in group["params"]]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            same_shape: dict[torch.Size, list[int]] = {}
            for i, p in enumerate(params):
                same_shape.setdefault(p.shape, []).append(i)
            stacks = [torch.stack([directions[i] for i in members]).to(self.dtype) for members in same_shape.values()]
            self.peers.each_a_part(stacks, [_operations(stack) for stack in stacks], lambda stack: orthogonalised(
                stack, group["ns_coefficients"], group["ns_steps"]))
            for (shape, members), orthogonal in zip(same_shape.items(), stacks):
                length = group["lr"] * 0.2 * max(shape) ** 0.5  # whose root mean square is AdamW's
                torch._foreach_add_([params[i] for i in members], list(orthogonal.float()), alpha=-length)


def _operations(matrices: Tensor) -> int:
    """What orthogonalising matrices [k,m,n] takes, in any unit."""
    return matrices.numel() * min(matrices.shape[1:])


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Matrices [k,m,n] with all their singular values brought near one, by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate(preset: dict, muon: bool, asked: float | None = None) -> float:
    """The rate asked for, else the preset's for the optimiser: Muon's best rates are three or four times AdamW's."""
    return asked or preset["muon_lr" if muon else "lr"]


def schedule(progress: float, step: int, warmup: int = 100, decay_from: float = 0.6, floor: float = 0.02) -> float:
    """Learning-rate factor at a step.

    Linear warm-up over `warmup` steps, flat, linear from `decay_from` of the run to `floor`.
    """
    warm = min(1.0, (step + 1) / max(warmup, 1))
    fall = 1.0 if progress <= decay_from else 1 - (1 - floor) * min(1.0, (progress - decay_from) / (1 - decay_from))
    return warm * fall
