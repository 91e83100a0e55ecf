"""The residual block of a diffusers UNet, its weights under their old names, with the detours on CPU taken out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

COLUMN_PIXELS = 16  # pictures up to 4x4: there a convolution's time goes into laying out its weights


def pointwise(projection: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """A Linear, or the 1x1 convolution that some UNets have in its place, on tokens [...,C] => [...,D]."""
    if isinstance(projection, nn.Linear):
        return projection(tokens)
    return F.linear(tokens, projection.weight.flatten(1), projection.bias)


def convolve(convolution: nn.Conv2d, pictures: Tensor) -> Tensor:
    """A 3x3 convolution of stride 1, [n,C,H,W] => [n,D,H,W]; one matrix product where quicker (tiny, bfloat16, CPU)."""
    tiny = pictures.shape[2] * pictures.shape[3] <= COLUMN_PIXELS
    free = convolution.weight.is_contiguous(memory_format=torch.channels_last)  # as a matrix, without a copy
    if tiny and free and pictures.device.type == "cpu" and pictures.dtype == torch.bfloat16:
        return convolve_by_columns(pictures, convolution.weight, convolution.bias)
    return convolution(pictures)


def convolve_by_columns(pictures: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(pictures, weight [D,C,3,3], bias, padding=1) as one matrix product, in channels-last memory."""
    matrix = weight.to(pictures.dtype).permute(0, 2, 3, 1).reshape(len(weight), -1)
    return _ColumnConvolution.apply(pictures, matrix, bias.to(pictures.dtype))


def _columns(pictures: Tensor) -> Tensor:
    """Pictures [n,C,H,W] => the 3x3 surroundings of every pixel, zeros outside: [n*H*W,9*C]."""
    (n, channels, height, width) = pictures.shape
    padded = F.pad(pictures.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    (picture, row, column, channel) = padded.stride()
    windows = padded.as_strided((n, height, width, 3, 3, channels), (picture, row, column, row, column, channel))
    return windows.reshape(n * height * width, 9 * channels)


class _ColumnConvolution(torch.autograd.Function):
    """Pictures [n,C,H,W], matrix [D,9*C], bias [D] => [n,D,H,W]; columns are laid out again for the gradient."""

    @staticmethod
    def forward(ctx, pictures: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        (n, _, height, width) = pictures.shape
        ctx.save_for_backward(pictures, matrix)
        return torch.addmm(bias, _columns(pictures), matrix.t()).view(n, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        pictures, matrix = ctx.saved_tensors
        (n, channels, height, width), outputs = pictures.shape, len(matrix)
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        # the gradient of the input is the convolution of the output's by the turned kernel
        turned = matrix.view(outputs, 9, channels).flip(1).transpose(0, 1).reshape(9 * outputs, channels)
        into = (_columns(gradient) @ turned).view(n, height, width, channels).permute(0, 3, 1, 2)
        return into, rows.t() @ _columns(pictures), rows.sum(0)


class ResnetBlock(nn.Module):
    """forward: pictures [n,C,H,W], time embedding [n,E] => [n,D,H,W], in channels-last memory.

    Against diffusers' own: the 1x1 shortcut is a product on tokens (there it is preceded by a copy to channels-first
    when training), and nothing is divided by a scale of 1.
    """

    def __init__(self, parent: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1, self.time_emb_proj = parent.norm1, parent.conv1, parent.time_emb_proj
        self.norm2, self.conv2, self.dropout = parent.norm2, parent.conv2, parent.dropout
        self.conv_shortcut = parent.conv_shortcut

    @staticmethod
    def can_replace(parent: nn.Module) -> bool:
        """Whether `parent` is a residual block of the plain kind, as in Stable Diffusion."""
        return (isinstance(parent, ResnetBlock2D) and parent.upsample is None and parent.downsample is None
                and parent.time_embedding_norm == "default" and parent.time_emb_proj is not None
                and not parent.skip_time_act and parent.output_scale_factor == 1
                and isinstance(parent.nonlinearity, nn.SiLU))

    def forward(self, pictures: Tensor, embedding: Tensor) -> Tensor:
        hidden = convolve(self.conv1, F.silu(self.norm1(pictures)))
        hidden = hidden + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        hidden = convolve(self.conv2, self.dropout(F.silu(self.norm2(hidden))))
        if self.conv_shortcut is None:
            return pictures + hidden
        return pointwise(self.conv_shortcut, pictures.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + hidden
