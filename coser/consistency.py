"""What views that are still being drawn look like as one object: for the pipeline's 3D-aware denoising."""

from __future__ import annotations

from coser.cameras import Cameras
from coser.metrics import render_mesh
from coser.reconstruction import QUICK, reconstruct
from coser.views import ViewSet

CONSISTENCY = 1.0  # of the estimate; what it gains and costs is measured in docs/training.md


def fused_views(views: ViewSet, cameras: Cameras) -> ViewSet:
    """N views => the N views of the object that they make together. Raises ValueError when they show no surface."""
    mesh = reconstruct(views, cameras, drawn=True, generous=True, **QUICK)
    return render_mesh(mesh, cameras, views.views.shape[-1]).to(views.views.device)
