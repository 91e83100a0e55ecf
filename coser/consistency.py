"""What views that are still being drawn look like as one object: for the pipeline's 3D-aware denoising."""

from __future__ import annotations

from coser.cameras import Cameras
from coser.metrics import render_mesh
from coser.reconstruction import reconstruct
from coser.views import ViewSet

CONSISTENCY = 0.8  # of the estimate; where it is on, see docs/training.md for what it gains and costs
RESOLUTION, MAX_FACES = 80, 8000


def fused_views(views: ViewSet, cameras: Cameras) -> ViewSet:
    """N views => the N views of the object that they make together. Raises ValueError when they show no surface."""
    mesh = reconstruct(views, cameras, resolution=RESOLUTION, max_faces=MAX_FACES)
    return render_mesh(mesh, cameras, views.views.shape[-1]).to(views.views.device)
