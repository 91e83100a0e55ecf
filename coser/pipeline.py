"""CoSERPipeline: a sentence becomes a ring of views, one denoising step at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from coser.cameras import ELEVATION, Cameras
from coser.models.autoencoder import ViewAutoencoder
from coser.models.text_encoder import SentenceTextEncoder
from coser.models.unet import MultiviewUNet
from coser.symmetry import SYMMETRIES, ring_symmetries
from coser.views import ViewSet

NUM_VIEWS = (4, 24)
MAX_TOKENS = 64  # longer prompts are cut: captions of training have at most half as many
ELEVATIONS = (0.0, 30.0)  # degrees, as trained
# Of a run's steps. Fusing from a fifth on, too, made solids as if turned on a lathe: see docs/training.md
FUSED_AT = (0.9, 0.95)
GUIDANCE_RESCALE = 0.5  # as the app draws; what it gains is measured in docs/training.md
# Of a run's steps: while noise is above .8 and the whole is decided. Later averages cost detail (docs/training.md)
SYMMETRIC_UNTIL = 0.45


@dataclass(frozen=True)
class MultiviewStep:
    """One moment of a run.

    index of total: denoising steps done, those of drawing anew among them. views: what `denoised` looks like now, a preview at a quarter of the side
    until the last step. latents [N,C,h,w]: the noisy state after this step. denoised [N,C,h,w]: the estimate of the
    clean latents.
    """

    index: int
    total: int
    views: ViewSet
    latents: Tensor
    denoised: Tensor
    cameras: Cameras


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded text of a batch: token states [B,L,D], mask [B,L] (None: all tokens), pooled [B,D] (None: unused)."""

    states: Tensor
    mask: Tensor | None
    pooled: Tensor | None

    @property
    def last(self) -> PromptEmbeds:
        """The last of the texts alone, as a batch of one."""
        return PromptEmbeds(*(None if t is None else t[-1:] for t in (self.states, self.mask, self.pooled)))


class CoSERPipeline(DiffusionPipeline):
    """Text to multi-view diffusion (CoSER, section 3), in diffusers' form.

    vae: views <-> latents. text_encoder, tokenizer: prompt -> token states. unet: the multi-view denoiser. scheduler:
    any of diffusers' whose prediction type is the one that the UNet was trained for.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(self, vae: ViewAutoencoder, text_encoder: SentenceTextEncoder, tokenizer, unet: MultiviewUNet,
                 scheduler):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> PromptEmbeds:
        """B prompts ("" = no text) => token states, mask and the mean state, in the UNet's dtype."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(self._execution_device)  # the encoder itself may wait elsewhere (enable_model_cpu_offload)
        states = self.text_encoder(tokens.input_ids, tokens.attention_mask)
        mask = tokens.attention_mask.bool()
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        dtype = self.unet.dtype
        return PromptEmbeds(states.to(dtype), mask, pooled.to(dtype) if self.unet.config.pooled_dim else None)

    def latents_to_views(self, latents: Tensor, preview: bool = False) -> ViewSet:
        """Normalised latents [N,C,h,w] => N views, at full size or (preview) at a quarter of the side, much quicker."""
        return self.vae.latents_to_preview(latents) if preview else self.vae.latents_to_views(latents)

    def prepare_latents(self, num_views: int, generator: torch.Generator | None = None,
                        latents: Tensor | None = None) -> Tensor:
        """The starting noise [N,C,h,w] in float32, from `generator` or as given."""
        size = self.unet.unet2d.config.sample_size
        shape = (num_views, self.unet.unet2d.config.in_channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {list(shape)}, got {list(latents.shape)}")
        latents = latents.to(self._execution_device, torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow schedulers have none

    @torch.no_grad()
    def stream(self, prompt: str, *, num_views: int = 12, elevation: float = ELEVATION, guidance_scale: float = 4.0,
               num_inference_steps: int = 20, negative_prompt: str = "", generator: torch.Generator | None = None,
               latents: Tensor | None = None, mixers: tuple[str, ...] | None = None,
               symmetry: tuple[str, ...] = (), guidance_rescale: float = 0.0, skip_guidance_scale: float = 0.0,
               consistency: float = 0.0, redraw: float = 0.0,
               fuse: Callable[[ViewSet, Cameras], ViewSet] | None = None) -> Iterator[MultiviewStep]:
        """Denoises a ring of views and yields every step; the last one carries the finished views.

        prompt: one sentence. num_views: 4..24. elevation: degrees, 0..30. guidance_scale: >= 1, 1 = no guidance.
        num_inference_steps: >= 1. negative_prompt: what to move away from. generator: source of the starting noise.
        latents [N,C,h,w]: starting noise instead. mixers: the active subset of the UNet's. symmetry: what the object is
        pulled to, some of SYMMETRIES; estimates are averaged over those that a ring of num_views has (of an odd one no
        view shows the back of another) in the first SYMMETRIC_UNTIL of the steps. guidance_rescale: 0..1, how much of
        what guidance does to an estimate's brightness and contrast is taken back (see `rescaled`). skip_guidance_scale:
        >= 0, how far views move away from what each would show by itself (see `heeding`). consistency: 0..1; at some
        steps this share of the estimate is replaced by what `fuse` makes of its views: the views of one object, such as
        `coser.consistency.fused_views` (3D-aware denoising, as in VideoMV, Zuo et al. 2024). redraw: 0..0.9; what is
        drawn is noised again, to where this share of the steps is left, and these are taken once more, so that the
        model goes over views that agree already (SDEdit, Meng et al. 2022, on a whole ring). Raises ValueError, when
        first read, for anything else.
        """
        check_arguments(prompt, num_views, elevation, guidance_scale, num_inference_steps, negative_prompt, consistency,
                        symmetry, guidance_rescale, skip_guidance_scale, redraw)
        if consistency > 0 and fuse is None:
            raise ValueError(f"fuse must be a function where consistency is above 0, got None and {consistency}")
        guided = guidance_scale > 1
        skips = skip_guidance_scale > 0 and bool(self.unet.config.mixers if mixers is None else mixers)
        embeds = self.encode_prompt([negative_prompt, prompt] if guided else [prompt])
        cameras = Cameras.orbit(num_views, elevation).to(self._execution_device)
        self._begin_at(0, num_inference_steps)
        latents = self.prepare_latents(num_views, generator, latents)
        timesteps = self.scheduler.timesteps
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        fused = fused_steps(len(timesteps))
        group, averaged = ring_symmetries(symmetry, num_views), round(SYMMETRIC_UNTIL * len(timesteps))
        order = step_order(num_inference_steps, redraw)
        for done, i in enumerate(order):
            timestep = timesteps[i]
            if done == len(timesteps):
                self._begin_at(i, num_inference_steps)
                latents = self._noised(latents, timestep, generator)
            predictions = self._predict(latents, timestep, embeds, cameras, mixers)
            prediction = torch.lerp(predictions[0], predictions[-1], guidance_scale)
            denoised = plain = self._denoised(prediction, latents, timestep, i)
            prompted = self._denoised(predictions[-1], latents, timestep, i)
            if guided and guidance_rescale > 0:
                denoised = torch.lerp(denoised, rescaled(denoised, prompted), guidance_rescale)
            if skips:
                apart = self._predict(latents, timestep, embeds.last, cameras, ())[0]
                apart = self._denoised(apart, latents, timestep, i)
                denoised = heeding(denoised, prompted, apart, skip_guidance_scale)
            if len(group) > 1 and i < averaged:
                denoised = self._symmetric(denoised, group)
            if consistency > 0 and i in fused:
                denoised = self._agreed(denoised, cameras, consistency, fuse)
            if denoised is not plain:  # an estimate that nothing changed keeps its prediction to the last bit
                prediction = self._prediction_for(denoised, latents, timestep, i)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
            last = done == len(order) - 1
            views = self.latents_to_views(latents) if last else self.latents_to_views(denoised, preview=True)
            yield MultiviewStep(done + 1, len(order), views, latents, denoised, cameras)

    @torch.no_grad()
    def __call__(self, prompt: str, **arguments) -> MultiviewStep:
        """`stream` drained: the last step, whose views are finished. Arguments and errors as there."""
        for step in self.stream(prompt, **arguments):
            pass
        return step

    def _begin_at(self, index: int, num_inference_steps: int) -> None:
        """Makes the scheduler take the steps from `index` on."""
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)  # of more than 500 steps two have one timestep, which tells no index

    def _noised(self, latents: Tensor, timestep: Tensor, generator: torch.Generator | None) -> Tensor:
        """Clean latents [N,C,h,w] with as much noise as the scheduler has at the timestep."""
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(latents, noise, timestep[None])
        return self.scheduler.scale_noise(latents, timestep[None], noise)  # what flow-matching schedulers call it

    def _predict(self, latents: Tensor, timestep: Tensor, embeds: PromptEmbeds, cameras: Cameras,
                 mixers: tuple[str, ...] | None) -> Tensor:
        """The predictions for all views with each of B texts, as one batch: [B,N,C,h,w] in float32."""
        batch = len(embeds.states)
        scaled = self._scaled(latents, timestep).to(self.unet.dtype)
        return self.unet(scaled.expand(batch, *scaled.shape), timestep.expand(batch), embeds.states, cameras,
                         pooled=embeds.pooled, attention_mask=embeds.mask, mixers=mixers).float()

    def _scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The latents as the UNet knows them; flow schedulers have nothing to scale."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, timestep)

    def _denoised(self, prediction: Tensor, latents: Tensor, timestep: Tensor, index: int) -> Tensor:
        """The estimate of the clean latents that a prediction stands for."""
        of_latents, of_prediction = self._estimate(timestep, index)
        return of_latents * self._scaled(latents, timestep) + of_prediction * prediction

    def _prediction_for(self, denoised: Tensor, latents: Tensor, timestep: Tensor, index: int) -> Tensor:
        """The prediction that stands for an estimate of the clean latents; the inverse of `_denoised`."""
        of_latents, of_prediction = self._estimate(timestep, index)
        return (denoised - of_latents * self._scaled(latents, timestep)) / of_prediction

    def _estimate(self, timestep: Tensor, index: int) -> tuple[Tensor | float, Tensor | float]:
        """a and b of: clean latents = a * (latents as the UNet knows them) + b * prediction."""
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        if kind == "flow_prediction":  # latents = (1 - sigma) clean + sigma noise, prediction = noise - clean
            return 1.0, -self.scheduler.sigmas[index].to(self._execution_device)
        if kind == "sample":
            return 0.0, 1.0
        # whatever the scheduler keeps, scaled = sqrt(alpha) clean + sqrt(1 - alpha) noise
        if hasattr(self.scheduler, "sigmas"):  # of noise against signal, also between the trained timesteps
            alpha = 1 / (1 + self.scheduler.sigmas[index].to(self._execution_device).square())
        else:
            alpha = self.scheduler.alphas_cumprod.to(self._execution_device)[timestep.long()]
        if kind == "v_prediction":
            return alpha.sqrt(), -(1 - alpha).sqrt()
        return 1 / alpha.sqrt(), -((1 - alpha) / alpha).sqrt()

    def _symmetric(self, denoised: Tensor, group: list[tuple[list[int], bool]]) -> Tensor:
        """The mean [N,C,h,w] of an estimate's images under a group of symmetries."""
        mirrored = self.vae.mirror_latents(denoised) if any(flipped for _, flipped in group) else denoised
        return torch.stack([(mirrored if flipped else denoised)[order] for order, flipped in group]).mean(0)

    def _agreed(self, denoised: Tensor, cameras: Cameras, share: float,
                fuse: Callable[[ViewSet, Cameras], ViewSet]) -> Tensor:
        """The estimate [N,C,h,w] with `share` of it replaced by what its views, fused, look like from their cameras.

        As it is where the views show no surface yet.
        """
        try:
            fused = fuse(self.latents_to_views(denoised), cameras)
        except ValueError:
            return denoised
        return torch.lerp(denoised, self.vae.views_to_latents(fused), share)


def heeding(denoised: Tensor, prompted: Tensor, apart: Tensor, scale: float) -> Tensor:
    """An estimate of clean latents moved away from views drawn each by itself, [N,C,h,w]: skip guidance.

    prompted, apart: estimates from the same latents and text, with the modules between views and with all of them
    skipped; `scale` times their difference is added. A model guided away from a worse version of itself (Karras et al.
    2024b; by skipped layers, Hyung et al. 2025) draws more of what the better one knows, and here the modules know that
    views show one object. Each view's channels keep their mean and spread: what neighbours say of a view's colour was
    overdone, too, and orange bottles came out dark red.
    """
    return rescaled(denoised + scale * (prompted - apart), denoised, over=(2, 3))


def rescaled(guided: Tensor, prompted: Tensor, over: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    """A guided estimate of clean latents with each channel's mean and spread those of the prompted one, [N,C,h,w].

    Guidance moves the ring's mean colour away from that of all objects as well, and each step goes on from there: what
    was asked for in brown came out orange. Rescaling of Lin et al. 2024 (section 3.4) takes back the spread, of all
    channels at once; here means come back as well, and each channel's by itself, over all views of the one object.
    over: the axes that means and spreads are taken over.
    """
    spread, wanted = (t.std(over, keepdim=True).clamp_min(1e-6) for t in (guided, prompted))
    return (guided - guided.mean(over, keepdim=True)) / spread * wanted + prompted.mean(over, keepdim=True)


def step_order(num_inference_steps: int, redraw: float) -> list[int]:
    """The indices of the steps that a run takes, one after the other: all, then the last ones of them once more."""
    again = round(redraw * num_inference_steps)
    return [*range(num_inference_steps), *range(num_inference_steps - again, num_inference_steps)]


def fused_steps(total: int) -> set[int]:
    """Indices of the steps, of `total`, at which views are fused: those of FUSED_AT, which are the last two of 20.

    Two also of fewer steps, where both shares come to the last one: of 12, fused once, views agreed 2.6 dB less.
    """
    first, second = (min(round(share * total), total - 1) for share in FUSED_AT)
    return {min(first, max(second - 1, 0)), second}


def check_arguments(prompt: str, num_views: int, elevation: float, guidance_scale: float, num_inference_steps: int,
                    negative_prompt: str, consistency: float = 0.0, symmetry: tuple[str, ...] = (),
                    guidance_rescale: float = 0.0, skip_guidance_scale: float = 0.0, redraw: float = 0.0) -> None:
    """Raises ValueError naming argument, value and what is allowed, for the first argument that is wrong."""
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {text!r}")
    whole = (("num_views", num_views, *NUM_VIEWS), ("num_inference_steps", num_inference_steps, 1, 1000))
    for name, value, low, high in whole:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    numbers = (("elevation", elevation, *ELEVATIONS), ("guidance_scale", guidance_scale, 1.0, 100.0),
               ("consistency", consistency, 0.0, 1.0), ("guidance_rescale", guidance_rescale, 0.0, 1.0),
               ("skip_guidance_scale", skip_guidance_scale, 0.0, 100.0), ("redraw", redraw, 0.0, 0.9))
    for name, value, low, high in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
    if not isinstance(symmetry, (tuple, list)) or any(name not in SYMMETRIES for name in symmetry):
        raise ValueError(f"symmetry must be some of {', '.join(SYMMETRIES)}, got {symmetry!r}")
