"""Views as tensors and as pictures: the ViewSet that models make, rasterisers render and reconstruction reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# The channel form spans these depths (units of the object's radius, camera distance 3.2): the unit sphere with a
# margin, so that the far rim of an object still differs from "nothing" (0).
NEAR, FAR = 2.1, 4.4


@dataclass(frozen=True)
class ViewSet:
    """N views of one object.

    views [N,3,H,W] in [0,1], colour PREMULTIPLIED by the mask; masks [N,1,H,W] in [0,1] (coverage);
    depths [N,1,H,W], distance along the camera's axis, 0 = nothing.
    """

    views: Tensor
    masks: Tensor
    depths: Tensor

    def __post_init__(self):
        n, _, h, w = self.views.shape
        if self.views.shape != (n, 3, h, w) or self.masks.shape != (n, 1, h, w) or self.depths.shape != (n, 1, h, w):
            raise ValueError("views, masks and depths must be [N,3,H,W], [N,1,H,W] and [N,1,H,W], got "
                             f"{list(self.views.shape)}, {list(self.masks.shape)} and {list(self.depths.shape)}")

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index) -> "ViewSet":
        pick = (lambda t: t[index]) if not isinstance(index, int) else (lambda t: t[index:index + 1])
        return ViewSet(pick(self.views), pick(self.masks), pick(self.depths))

    def to(self, *args, **kwargs) -> "ViewSet":
        return ViewSet(*(t.to(*args, **kwargs) for t in (self.views, self.masks, self.depths)))

    def mirrored(self) -> "ViewSet":
        """Each view from left to right."""
        return ViewSet(*(t.flip(-1) for t in (self.views, self.masks, self.depths)))

    def on_background(self, value: float = 1.0) -> Tensor:
        """The views over a plain background of brightness `value` in [0,1]: [N,3,H,W]."""
        return self.views + value * (1 - self.masks)

    @staticmethod
    def cat(parts: list["ViewSet"]) -> "ViewSet":
        return ViewSet(*(torch.cat([getattr(p, k) for p in parts]) for k in ("views", "masks", "depths")))


def views_to_channels(view_set: ViewSet) -> Tensor:
    """ViewSet => [N,5,H,W] in [0,1]: premultiplied RGB, alpha, nearness.

    Nearness: 0 = nothing, larger = nearer, premultiplied.
    """
    nearness = ((FAR - view_set.depths) / (FAR - NEAR)).clamp(0, 1) * view_set.masks
    return torch.cat([view_set.views, view_set.masks, torch.where(view_set.depths > 0, nearness, 0.0)], 1)


def channels_to_views(channels: Tensor) -> ViewSet:
    """[N,5,H,W] (about [0,1]) => ViewSet; pixels covered by less than half carry no depth."""
    channels = channels.float().clamp(0, 1)
    masks = channels[:, 3:4]
    depths = torch.where(masks >= 0.5, nearness_to_depths(channels[:, 4:5], masks), torch.zeros_like(masks))
    return ViewSet(torch.minimum(channels[:, :3], masks), masks, depths)


def nearness_to_depths(nearness: Tensor, masks: Tensor) -> Tensor:
    """Premultiplied nearness and the masks that it was multiplied by, of one shape, in [0,1] => depths, NEAR to FAR."""
    return FAR - (nearness / masks.clamp_min(1e-3)).clamp(0, 1) * (FAR - NEAR)


def views_to_uint8(view_set: ViewSet, background: float = 1.0) -> np.ndarray:
    """ViewSet => uint8 pictures [N,H,W,3] on a plain background."""
    pictures = view_set.on_background(background).clamp(0, 1) * 255
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def depths_to_uint8(view_set: ViewSet) -> np.ndarray:
    """ViewSet => grey depth pictures [N,H,W,3], nearer = brighter, nothing = black."""
    nearness = views_to_channels(view_set)[:, 4:5].expand(-1, 3, -1, -1)
    return (nearness * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(pictures: np.ndarray, columns: int | None = None, gap: int = 2, background: int = 255) -> Image.Image:
    """Pictures uint8 [N,H,W,3] => one PIL image, row by row; `columns` defaults to the squarest grid without holes."""
    n, h, w, _ = pictures.shape
    columns = columns or grid_columns(n)
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), background, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        sheet[y * (h + gap):y * (h + gap) + h, x * (w + gap):x * (w + gap) + w] = picture
    return Image.fromarray(sheet)


def grid_columns(n: int) -> int:
    """The number of columns of the squarest wide grid of n pictures, without holes where that costs little."""
    square = math.ceil(math.sqrt(n))
    return min(range(square, 2 * square + 1), key=lambda c: (math.ceil(n / c) * c - n, c))
