"""ViewAutoencoder: RGB, alpha and depth of a view in one latent, sixteen times smaller on a side, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from coser.views import ViewSet, channels_to_views, views_to_channels

VIEW_CHANNELS = 5  # premultiplied RGB, alpha, nearness
PATCH = 4  # the outermost factor of four is a pixel shuffle: no work is done at full resolution


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B,C,H,W] => [B,C,H,W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(channels // 16, channels), nn.GroupNorm(channels // 16, channels)
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class ViewAutoencoder(ModelMixin, ConfigMixin):
    """Five channels [B,5,H,W] in [0,1] <=> latents [B,C,H/16,W/16], each latent channel near zero mean, unit variance.

    channels: widths at 1/4, 1/8 and 1/16 of the side. encoder_blocks, decoder_blocks: residual blocks at each of the
    three. latent_mean, latent_std: statistics of the raw latents on the training set, measured when training ends; they
    make `views_to_latents` give normalised latents.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 16, channels: tuple[int, ...] = (64, 128, 192),
                 encoder_blocks: tuple[int, ...] = (1, 1, 2), decoder_blocks: tuple[int, ...] = (2, 3, 3),
                 latent_mean: tuple[float, ...] | None = None, latent_std: tuple[float, ...] | None = None):
        super().__init__()
        c4, c8, c16 = channels
        patch_channels = VIEW_CHANNELS * PATCH**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH), nn.Conv2d(patch_channels, c4, 3, padding=1),
            *(ResidualBlock(c4) for _ in range(encoder_blocks[0])), nn.Conv2d(c4, c8, 2, stride=2),
            *(ResidualBlock(c8) for _ in range(encoder_blocks[1])), nn.Conv2d(c8, c16, 2, stride=2),
            *(ResidualBlock(c16) for _ in range(encoder_blocks[2])),
            nn.GroupNorm(c16 // 16, c16), nn.SiLU(), nn.Conv2d(c16, latent_channels, 3, padding=1))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, c16, 3, padding=1), *(ResidualBlock(c16) for _ in range(decoder_blocks[2])),
            nn.Conv2d(c16, 4 * c8, 1), nn.PixelShuffle(2), *(ResidualBlock(c8) for _ in range(decoder_blocks[1])),
            nn.Conv2d(c8, 4 * c4, 1), nn.PixelShuffle(2), *(ResidualBlock(c4) for _ in range(decoder_blocks[0])),
            nn.GroupNorm(c4 // 16, c4), nn.SiLU(), nn.Conv2d(c4, patch_channels, 3, padding=1), nn.PixelShuffle(PATCH))
        # a few per cent of the decoder's work: what is shown while denoising
        self.preview = nn.Sequential(
            nn.Conv2d(latent_channels, c8, 3, padding=1), nn.SiLU(), nn.Conv2d(c8, c8, 3, padding=1), nn.SiLU(),
            nn.Conv2d(c8, patch_channels, 1), nn.PixelShuffle(PATCH))

    def encode(self, channels: Tensor) -> Tensor:
        """[B,5,H,W] in [0,1], H and W multiples of 16 => raw latents [B,C,H/16,W/16]."""
        assert channels.shape[1] == VIEW_CHANNELS and channels.shape[2] % 16 == 0 == channels.shape[3] % 16, channels.shape
        return self.encoder((channels * 2 - 1).contiguous(memory_format=torch.channels_last))

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Raw latents [B,C,h,w] => [B,5,16h,16w], about [0,1]."""
        return self.decoder(raw_latents.contiguous(memory_format=torch.channels_last)) / 2 + 0.5

    def decode_preview(self, raw_latents: Tensor) -> Tensor:
        """Raw latents [B,C,h,w] => a rough [B,5,4h,4w], about [0,1]."""
        return self.preview(raw_latents.contiguous(memory_format=torch.channels_last)) / 2 + 0.5

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latent_std is None:
            raise ValueError("this autoencoder has no latent statistics yet; measure them at the end of its training")
        return tuple(torch.tensor(v, device=like.device, dtype=torch.float32)[:, None, None]
                     for v in (self.config.latent_mean, self.config.latent_std))

    def views_to_latents(self, views: ViewSet) -> Tensor:
        """ViewSet of N views => normalised latents [N,C,H/16,W/16], float32."""
        mean, std = self._statistics(views.views)
        return (self.encode(views_to_channels(views).to(self.dtype)).float() - mean) / std

    def latents_to_views(self, latents: Tensor) -> ViewSet:
        """Normalised latents [N,C,h,w] => ViewSet of N views at 16h x 16w, float32."""
        mean, std = self._statistics(latents)
        return channels_to_views(self.decode((latents.float() * std + mean).to(self.dtype)))

    def latents_to_preview(self, latents: Tensor) -> ViewSet:
        """Normalised latents [N,C,h,w] => a rough ViewSet of N views at 4h x 4w, float32; for watching, not for meshes."""
        mean, std = self._statistics(latents)
        return channels_to_views(self.decode_preview((latents.float() * std + mean).to(self.dtype)))
