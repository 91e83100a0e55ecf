"""How much a mesh looks like the silhouettes that it was made of: views that contradict each other leave one unlike."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coser.cameras import Cameras
from coser.rasterizer import rasterize

SIZE = 64  # pixels a side; contradictions worth a second try are larger than a pixel of this picture


def silhouette_likeness(vertices: np.ndarray, faces: np.ndarray, masks: Tensor, cameras: Cameras) -> Tensor:
    """IoU [N] of a mesh's silhouettes (vertices [V,3], faces [F,3]) with masks [N,1,S,S], in small pictures."""
    seen = rasterize(torch.from_numpy(vertices), torch.from_numpy(faces), cameras.to("cpu"), SIZE).faces >= 0
    covered = F.interpolate(masks.cpu(), (SIZE, SIZE), mode="area")[:, 0] >= 0.5
    union = (seen | covered).sum((1, 2)).clamp_min(1)
    return (seen & covered).sum((1, 2)) / union
