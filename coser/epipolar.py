"""TSED: how often neighbours of a ring show the same things where their cameras say they can be, from SIFT matches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coser.agreement import check_ring
from coser.cameras import Cameras
from coser.views import ViewSet, views_to_uint8

# SIFT about as Yu et al. run it (COLMAP, edge threshold 30, ratio 0.8, matches that hold both ways), for pictures with
# few corners. At their own size 36 % of the pairs of 12 rings of true low-poly renders had fewer than 10 matches,
# enlarged by 1.5 it is 13 %. The share of consistent pairs is about the same up to 5 pixels: enlarging makes a ring's
# figure depend less on how many corners it has, it does not tell true rings from shuffled ones any better.
RATIO, EDGE, CONTRAST, ENLARGED = 0.8, 30.0, 0.01, 1.5


@dataclass(frozen=True)
class Tsed:
    """Thresholded symmetric epipolar distance: consistent [T], the share of the pairs of neighbours that are consistent
    at each of the thresholds (pixels); matches, their mean number a pair; too_few, the share of pairs with fewer than
    the least number of matches."""

    thresholds: tuple[float, ...]
    consistent: Tensor
    matches: float
    too_few: float


def tsed(views: ViewSet, cameras: Cameras, thresholds: tuple[float, ...] = (.5, 1, 1.5, 2, 3, 4, 5, 7, 10),
         min_matches: int = 10) -> Tsed:
    """Thresholded symmetric epipolar distance of neighbours (Yu et al. 2023, arXiv 2304.10700, section 4).

    A pair of neighbours is consistent at a threshold (pixels of the views) where at least min_matches SIFT points match
    and the median of their distances to each other's epipolar lines, known from the cameras, lies below it. Matches
    along an epipolar line are not told from true ones, and a ring's lines are nearly level: what lies at the right
    height in the wrong view passes. Raises ValueError for fewer than 2 views, ImportError without OpenCV.
    """
    check_ring(views, cameras, 2, "compare neighbours")
    features = _sift_features(views_to_uint8(views))
    order = torch.arange(len(views)).roll(-1)
    matrices = fundamental_matrices(cameras, cameras[order], views.views.shape[-1]).cpu().numpy()
    medians, counts = [], []
    for i, matrix in enumerate(matrices):
        here, there = _matched(features[i], features[order[i]])
        counts.append(len(here))
        enough = len(here) >= max(min_matches, 1)
        medians.append(np.median(epipolar_distances(here, there, matrix)) if enough else np.inf)
    consistent = (torch.tensor(medians)[:, None] < torch.tensor(thresholds)).double().mean(0)
    return Tsed(tuple(thresholds), consistent, float(np.mean(counts)), float((np.array(counts) < min_matches).mean()))


def fundamental_matrices(cameras: Cameras, others: Cameras, size: int) -> Tensor:
    """F [N,3,3] float64 of N pairs of cameras: x' F x = 0 where both see one point at pixels x = (uv * size, 1).

    F x is the epipolar line in the other picture of pixel x. Raises ValueError for orthographic cameras.
    """
    if cameras.orthographic or others.orthographic:
        raise ValueError("cameras must be perspective to have epipolar lines through a centre, got orthographic ones")
    (first, from_first), (second, from_second) = ((c.centers.double(), _pixel_rays(c, size)) for c in (cameras, others))
    x, y, z = (first - second).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    # both rays and the line between the centres lie in one plane
    return from_second.transpose(1, 2) @ cross @ from_first


def epipolar_distances(points: np.ndarray, others: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Symmetric epipolar distances [M] of matches, pixels [M,2] each: the mean of both distances from the lines."""
    points, others = (np.concatenate([p, np.ones((len(p), 1))], 1) for p in (points, others))
    lines, other_lines = others @ matrix, points @ matrix.T
    off = np.abs((lines * points).sum(1))
    lengths = [np.linalg.norm(line[:, :2], axis=1).clip(1e-12) for line in (lines, other_lines)]
    return (off / lengths[0] + off / lengths[1]) / 2


def _pixel_rays(cameras: Cameras, size: int) -> Tensor:
    """Pixels (uv * size, 1) => directions in the world, up to their length: [N,3,3] float64."""
    pixel = 2 / (size * cameras.focal)
    to_camera = torch.tensor([[pixel, 0, -1 / cameras.focal], [0, -pixel, 1 / cameras.focal], [0, 0, -1]],
                             dtype=torch.float64, device=cameras.device)
    return cameras.rotations.double().transpose(1, 2) @ to_camera


def _sift_features(pictures: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """uint8 pictures [N,S,S,3] => of each, points [K,2] in pixels (uv * S) and RootSIFT descriptors [K,128]."""
    try:
        import cv2
    except ImportError as missing:
        raise ImportError("tsed needs OpenCV: pip install opencv-python-headless") from missing
    sift = cv2.SIFT_create(contrastThreshold=CONTRAST, edgeThreshold=EDGE, enable_precise_upscale=True)
    features = []
    for picture in pictures:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        large = cv2.resize(grey, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
        points, descriptors = sift.detectAndCompute(large, None)
        # OpenCV's first pixel has its centre at 0
        points = (np.array([p.pt for p in points]).reshape(-1, 2) + 0.5) * (len(grey) / len(large))
        descriptors = np.zeros((0, 128), np.float32) if descriptors is None else descriptors
        features.append((points, np.sqrt(descriptors / descriptors.sum(1, keepdims=True).clip(1e-12))))
    return features


def _matched(first: tuple[np.ndarray, np.ndarray],
             second: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Points [M,2] of both pictures whose descriptors are each other's nearest, far nearer than the second nearest."""
    if min(len(first[0]), len(second[0])) < 2:
        return np.zeros((0, 2)), np.zeros((0, 2))
    likeness = first[1] @ second[1].T  # of descriptors of length 1
    there, back = _unambiguous(likeness), _unambiguous(likeness.T)
    here = np.flatnonzero((there >= 0) & (back[there] == np.arange(len(there))))
    return first[0][here], second[0][there[here]]


def _unambiguous(likeness: np.ndarray) -> np.ndarray:
    """The best column of each row [R]; -1 where the second best is less than 1 / RATIO times as far."""
    best = likeness.argmax(1)
    top = -np.partition(-likeness, 1, axis=1)[:, :2]
    near, second = np.sqrt(np.maximum(2 - 2 * top, 0)).T
    return np.where(near < RATIO * second, best, -1)
