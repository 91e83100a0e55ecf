"""MultiviewUNet: a diffusers 2D UNet that denoises all views of a ring together."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from coser.cameras import Cameras, pixel_centers
from coser.models.block import BASELINES, MIXERS, MixerOptions, MultiviewTransformer, ViewContext
from coser.models.resnet import ResnetBlock
from coser.models.trajectory_attention import TrajectoryGeometries


def camera_features(cameras: Cameras, absolute_azimuth: bool = True) -> Tensor:
    """What the time embedding learns of each view: [N,5] (or [N,3]).

    sin and cos of the azimuth (left out without absolute_azimuth), sin and cos of the elevation, and the view angle:
    the turn to the next view of the ring in half turns, [0,2).
    """
    azimuth, elevation = torch.deg2rad(cameras.azimuths), torch.deg2rad(cameras.elevations)
    view_angle = (cameras.azimuths.roll(-1) - cameras.azimuths) % 360 / 180
    # rounding must not turn "no turn" into a full one
    view_angle = torch.where(view_angle > 2 - 1e-4, 0.0, view_angle)
    relative = [elevation.sin(), elevation.cos(), view_angle]
    return torch.stack([azimuth.sin(), azimuth.cos(), *relative] if absolute_azimuth else relative, -1)


# Of a config: what the same weights compute depends on it, and no weight's shape tells it.
SAME_SHAPES = ("trajectory_window", "trajectory_radius", "scan_order", "scan_layout", "pool_window", "pool_scores")
RAY_CHANNELS = 24
HARMONICS = 4  # of the azimuth: a box looks the same after a half turn, a cross after a quarter


def ray_maps(cameras: Cameras, size: int, absolute_azimuth: bool = True) -> Tensor:
    """Where each pixel of N views looks: [N,24,size,size].

    The direction of its ray (unit length) and the ray's point nearest to the origin (world units), which together fix
    the ray as Pluecker coordinates do, then sin and cos of pi times both and of two pi times the point. Without
    absolute_azimuth in a frame that turns with each camera, so that views differ by their elevation alone.
    """
    with torch.no_grad(), torch.autocast(cameras.device.type, enabled=False):
        if not absolute_azimuth:
            distance = float(cameras.centers[0].norm())
            cameras = Cameras.look_at_origin(torch.zeros(len(cameras)), cameras.elevations.cpu(), distance, cameras.fov,
                                             cameras.orthographic).to(cameras.device)
        origins, directions = cameras.rays(pixel_centers(size, cameras.device))
        directions = nn.functional.normalize(directions, dim=-1)
        nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
        waves = torch.pi * torch.cat([directions, nearest, 2 * nearest], -1)
        maps = torch.cat([directions, nearest, waves.sin(), waves.cos()], -1)
        return maps.transpose(1, 2).unflatten(2, (size, size))


class RayConv2d(nn.Conv2d):
    """The 2D UNet's first convolution, which also reads ray maps: [B,C+24,H,W] => [B,C',H,W]; deaf to them at first.

    The time embedding tells a view its azimuth once for all pixels, and that alone was learnt slowly: a car's loss
    hardly changed when its ring was said to be turned by 90 degrees. Rays say what each pixel looks at.
    """

    def __init__(self, parent: nn.Conv2d):
        super().__init__(parent.in_channels, parent.out_channels, parent.kernel_size, padding=parent.padding)
        self.load_state_dict(parent.state_dict())
        self.rays = nn.Conv2d(RAY_CHANNELS, parent.out_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.rays.weight)

    def forward(self, x: Tensor) -> Tensor:
        latents, rays = x.split((self.in_channels, RAY_CHANNELS), 1)
        return super().forward(latents) + self.rays(rays)


class ConditionEmbedding(nn.Module):
    """Camera features, and pooled text where there is any, => an addition to the time embedding, zero at first.

    Where views know their azimuth and there is pooled text, products of both join: what a turn means depends on the
    object: a car is widest from its side, a coin from its front. After 12,600 steps with a sum alone the estimate for a
    taxi from pure noise was equally wide all round.
    """

    def __init__(self, features: int, channels: int, pooled_dim: int = 0):
        super().__init__()
        self.linear_1 = nn.Linear(features, channels)
        self.linear_2 = nn.Linear(channels, channels)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)
        self.camera_features = features - pooled_dim
        self.product_of_text = None
        if pooled_dim and self.camera_features == 5:
            width = channels // 2
            self.product_of_text = nn.Linear(pooled_dim, width)
            self.product_of_camera = nn.Linear(2 * HARMONICS + 3, width)
            self.product_out = nn.Linear(width, channels, bias=False)
            nn.init.zeros_(self.product_out.weight)

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.linear_1.weight.dtype)
        added = self.linear_2(nn.functional.silu(self.linear_1(features)))
        if self.product_of_text is None:
            return added
        camera, text = features.split((self.camera_features, features.shape[-1] - self.camera_features), -1)
        text = nn.functional.layer_norm(text, text.shape[-1:])
        return added + self.product_out(self.product_of_text(text) * self.product_of_camera(harmonics(camera)))


def harmonics(features: Tensor) -> Tensor:
    """Camera features [N,5], beginning with sin and cos of the azimuth => sin and cos of its multiples, then the
    other three: [N,2*HARMONICS+3]."""
    azimuth = torch.atan2(features[:, 0].float(), features[:, 1].float())[:, None]
    angles = azimuth * torch.arange(1, HARMONICS + 1, device=features.device)
    return torch.cat([angles.sin(), angles.cos(), features[:, 2:].float()], -1).to(features.dtype)


class MultiviewUNet(ModelMixin, ConfigMixin):
    """CoSER's denoiser: a UNet2DConditionModel whose transformer blocks mix views.

    Args:
        unet: the config of the UNet2DConditionModel inside.
        mixers: some of "adjacent", "trajectory", "glance", "rectification"; or ("dense", ...) with "dense" in place of
            "adjacent"; or ("temporal",), attention over each place of all views; or (), which is a 2D model.
        mixer_ratio, mixer_head_size: inner width of trajectory and rectification as a share of the block's channels
            (rounded to whole heads), and channels a head.
        trajectory_window: odd side of the window, in tokens. trajectory_radius: the depth hypothesis, a cylinder of
            this radius (world units) around the vertical axis.
        scan_order: spiral, raster or zigzag. scan_layout: view_major or position_major. scan_ratio, scan_head_size,
            scan_state_size, scan_chunk_size: the state-space layer's inner width as a share of the channels (rounded to
            head pairs), channels a head, states a channel, and positions a chunk (speed only).
        pool_window: side of the pooled fields, in tokens. pool_scores: whether they are weighted by scores, or plain
            means.
        absolute_azimuth: whether views know their azimuth, or only elevation and view angle.
        ray_maps: whether every pixel also knows the ray that it looks along.
        pooled_dim: width of the pooled text that joins the time embedding; 0 for none.
    Raises ValueError for names, windows and widths that are not allowed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MultiviewTransformerBlock"]

    @register_to_config
    def __init__(self, unet: dict, mixers: tuple[str, ...] = MIXERS, mixer_ratio: float = 0.5,
                 mixer_head_size: int = 64, trajectory_window: int = 3, trajectory_radius: float = 0.45,
                 scan_order: str = "spiral", scan_layout: str = "view_major", scan_ratio: float = 1.0,
                 scan_head_size: int = 64, scan_state_size: int = 32, scan_chunk_size: int = 64, pool_window: int = 2,
                 pool_scores: bool = True, absolute_azimuth: bool = True, ray_maps: bool = True, pooled_dim: int = 0):
        super().__init__()
        mixers = _check_mixers(tuple(mixers), (*MIXERS, *BASELINES))
        if trajectory_window < 1 or trajectory_window % 2 == 0:
            raise ValueError(f"trajectory_window must be a positive odd number, got {trajectory_window}")
        if not 0 < trajectory_radius <= 1:
            raise ValueError(f"trajectory_radius must lie in (0, 1], got {trajectory_radius}")
        positive = {"mixer_ratio": mixer_ratio, "mixer_head_size": mixer_head_size, "scan_ratio": scan_ratio,
                    "scan_head_size": scan_head_size, "scan_state_size": scan_state_size,
                    "scan_chunk_size": scan_chunk_size, "pool_window": pool_window}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        options = MixerOptions(mixers, mixer_ratio, mixer_head_size, scan_ratio, scan_head_size, scan_state_size,
                               scan_chunk_size, scan_order, scan_layout, pool_window, pool_scores)
        self.unet2d = UNet2DConditionModel.from_config(dict(unet))
        if self.unet2d.class_embedding is not None:
            raise ValueError("the 2D UNet must have no class embedding: the camera condition takes its place")
        features = (5 if absolute_azimuth else 3) + pooled_dim
        self.unet2d.class_embedding = ConditionEmbedding(features, self.unet2d.time_embedding.linear_2.out_features,
                                                          pooled_dim)
        if ray_maps:
            self.unet2d.conv_in = RayConv2d(self.unet2d.conv_in)
        _replace_parts(self.unet2d, options)
        self._geometries: TrajectoryGeometries | None = None
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "MultiviewUNet":
        """As in diffusers; then lays convolutions out channels-last, as pictures are here: files do not keep that."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple where loading info was asked for
        model.to(memory_format=torch.channels_last)
        return loaded

    @classmethod
    def from_unet2d(cls, unet2d: UNet2DConditionModel, **options) -> "MultiviewUNet":
        """A MultiviewUNet with the 2D UNet's weights that, until trained, draws what its parent draws.

        options: the other arguments of the class. Copies the weights, in their dtype and on their device.
        """
        config = {key: value for key, value in unet2d.config.items() if not key.startswith("_")}
        model = cls(unet=config, **options)
        missing, unexpected = model.unet2d.load_state_dict(unet2d.state_dict(), strict=False)
        if unexpected:
            raise ValueError(f"the 2D UNet has weights that its config does not announce: {unexpected[:3]}")
        model = model.to(unet2d.device)
        return model if unet2d.dtype == model.dtype else model.to(unet2d.dtype)

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cameras: Cameras,
                pooled: Tensor | None = None, attention_mask: Tensor | None = None,
                mixers: tuple[str, ...] | None = None) -> Tensor:
        """Predicts for all views of a batch of rings at once.

        latents [B,N,C,H,W] (H = W); timesteps [B], on the scheduler's scale; prompt_embeds [B,L,D]; cameras: N, shared
        by the batch; pooled [B,pooled_dim]; attention_mask [B,L], True for text tokens that count; mixers: the active
        subset of the config's, None for all => [B,N,C,H,W]. Raises ValueError where these do not fit together.
        """
        self._check(latents, timesteps, prompt_embeds, cameras, pooled)
        batch, num_views = latents.shape[:2]
        pictures = latents.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        context = self.context(prompt_embeds, cameras.to(latents.device), attention_mask, mixers)
        if self.config.ray_maps:
            rays = ray_maps(context.geometries.cameras, latents.shape[-1], self.config.absolute_azimuth)
            rays = rays.to(pictures.dtype).repeat(batch, 1, 1, 1)
            pictures = torch.cat([pictures, rays.contiguous(memory_format=torch.channels_last)], 1)
        output = self.unet2d(
            pictures,
            timesteps.to(latents.device).repeat_interleave(num_views),
            encoder_hidden_states=prompt_embeds,
            class_labels=self.condition(context.geometries.cameras, batch, pooled),
            cross_attention_kwargs={"context": context},
            return_dict=False,
        )[0]
        return output.unflatten(0, (batch, num_views))

    def context(self, prompt_embeds: Tensor, cameras: Cameras, attention_mask: Tensor | None,
                mixers: tuple[str, ...] | None) -> ViewContext:
        """Gathers what all blocks of one pass share."""
        active = tuple(self.config.mixers if mixers is None else mixers)
        _check_mixers(active, tuple(self.config.mixers))
        if self._geometries is None or self._geometries.cameras.camera_to_world is not cameras.camera_to_world:
            self._geometries = TrajectoryGeometries(cameras, self.config.trajectory_window,
                                                    self.config.trajectory_radius)
        if attention_mask is None:
            return ViewContext(len(cameras), frozenset(active), prompt_embeds.mean(1), None, self._geometries)
        # a sample without any text token would be a softmax over nothing: let it see all of them instead
        mask = attention_mask.bool()
        mask = mask | ~mask.any(-1, keepdim=True)
        weights = mask.to(prompt_embeds.dtype)
        mean = (weights[:, None] @ prompt_embeds)[:, 0] / weights.sum(-1, keepdim=True)
        return ViewContext(len(cameras), frozenset(active), mean, mask[:, None, None], self._geometries)

    def condition(self, cameras: Cameras, batch: int, pooled: Tensor | None) -> Tensor:
        """Camera features and pooled text of every view, [B*N,features]."""
        features = camera_features(cameras, self.config.absolute_azimuth).expand(batch, -1, -1)
        if self.config.pooled_dim:
            views = pooled.to(features.dtype)[:, None].expand(-1, len(cameras), -1)
            features = torch.cat([features, views], -1)
        return features.flatten(0, 1)

    def _check(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, cameras: Cameras,
               pooled: Tensor | None) -> None:
        if latents.ndim != 5 or latents.shape[3] != latents.shape[4]:
            raise ValueError(f"latents must be [B,N,C,H,W] with H = W, got {list(latents.shape)}")
        batch = len(latents)
        if len(cameras) != latents.shape[1]:
            raise ValueError(f"cameras must be {latents.shape[1]} as latents have that many views, got {len(cameras)}")
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps must be [{batch}], got {list(timesteps.shape)}")
        if prompt_embeds.ndim != 3 or len(prompt_embeds) != batch:
            raise ValueError(f"prompt_embeds must be [{batch},L,D], got {list(prompt_embeds.shape)}")
        wanted = (batch, self.config.pooled_dim) if self.config.pooled_dim else None
        if (None if pooled is None else tuple(pooled.shape)) != wanted:
            raise ValueError(f"pooled must be {wanted} for pooled_dim={self.config.pooled_dim}, "
                             f"got {None if pooled is None else list(pooled.shape)}")


def _check_mixers(mixers: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in mixers if name not in allowed]
    if unknown or len(set(mixers)) != len(mixers):
        raise ValueError(f"mixers must be different names out of {allowed}, got {mixers}")
    if "dense" in mixers and "adjacent" in mixers:
        raise ValueError(f"mixers must not hold both 'dense' and 'adjacent' (they take the same place), got {mixers}")
    return mixers


def _replace_parts(module: nn.Module, options: MixerOptions) -> None:
    for name, child in module.named_children():
        if isinstance(child, Transformer2DModel):
            setattr(module, name, MultiviewTransformer(child, options))
        elif ResnetBlock.can_replace(child):
            setattr(module, name, ResnetBlock(child))
        else:
            _replace_parts(child, options)
