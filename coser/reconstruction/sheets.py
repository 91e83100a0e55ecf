"""Fins, leaves and sails: surfaces seen from both sides with no room for a solid in between, given the least thickness.

A mean of distances would let the two sides cancel, and a view along the sheet, which sees none of it, would carve it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SIDE = 0.3  # sum of squared cosines of the views that must see each side
ALONG = 0.3  # cosine; a view at less than this to the sheet's normal looks along it and has no say about it


def thicken_sheets(behind: Tensor, weight: Tensor, normals: Tensor, rays: Tensor, beside: Tensor, through: Tensor,
                   thickness: float) -> tuple[Tensor, Tensor]:
    """What N views say of P points => signed distances [P] to sheets made `thickness` thick, and which lie at one.

    behind [N,P]: distance in front of (+) or behind (-) each view's surface; weight [N,P]: how much that counts, 0 =
    not at all; normals [N,3,P]: of those surfaces; rays [N,3,P]: unit directions from the cameras; beside [N,P]:
    distance out of the silhouettes; through [N,P]: views that look past the point at something behind it.
    """
    points = torch.arange(behind.shape[1], device=behind.device)
    normal = normals[weight.argmax(0), :, points].T  # of the side seen most squarely
    facing = (normals * normal).sum(1)
    front, back = weight * (facing > 0.5), weight * (facing < -0.5)
    to_front, to_back = ((side * behind).sum(0) / side.sum(0).clamp_min(1e-9) for side in (front, back))
    room = -(to_front + to_back)  # between the sides; negative in the gap between two things that face each other
    beside = torch.where((rays * normal).sum(1).abs() > ALONG, beside, -torch.inf)
    denied = (through & ~beside.isinf()).sum(0) >= 2
    sheet = (front.sum(0) > MIN_SIDE) & (back.sum(0) > MIN_SIDE) & (room.abs() < thickness) & ~denied
    distance = torch.maximum(to_front, to_back) - (thickness - room) / 2
    return torch.maximum(distance, beside.topk(min(2, len(beside)), 0).values[-1]), sheet
