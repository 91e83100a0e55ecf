"""Pictures without alpha: telling an object from the plain background that it was pictured on.

A picture's border shows its background: plain, or varying smoothly as light on a studio's wall does. What differs from
that, continued over the whole picture, is object. The object's own colours are un-mixed from the background's along its
edge (Smith and Blinn, "Blue screen matting", 1996, with a known background and the colour of the object close by).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, label
from torch import Tensor

from coser.views import ViewSet

RIM = 0.02  # of the picture's side: how broad a border shows the background
PLAIN = 0.05  # in [0,1]; a border pixel that differs less from the smooth background belongs to it
PLAIN_SHARE = 0.6  # of the border must do so; the rest may be object that reaches out of the picture
LEAST_CONTRAST = 0.035  # in [0,1]; less than this is noise of cameras and JPEG
NOISES = 5.0  # standard deviations of the background's noise that are noise
SPECK = 0.05  # of the largest part of the object; smaller parts are dirt
HOLE = 0.002  # of the picture; enclosed background smaller than this is a highlight or the white of an eye


def key_background(pictures: Tensor) -> Tensor:
    """Pictures of one object on plain backgrounds => how much of each pixel it covers.

    pictures [N,3,H,W] in [0,1], backgrounds may differ between them => masks [N,1,H,W] in [0,1], soft along the edge,
    on the pictures' device. Background that shows through the object, as in a handle, is background when it is as plain
    there and at least 0.2 % of the picture; smaller or other enclosed places of its colour are object, because a wrong
    hole would be carved through the whole of it. Shadows are object unless they are fainter than the noise. A picture
    of nothing but background gets an empty mask. Raises ValueError when a picture's border is not plain enough.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be [N,3,H,W], got {list(pictures.shape)}")
    if min(pictures.shape[2:]) < 8:
        raise ValueError(f"pictures must be at least 8 pixels a side, got {list(pictures.shape[2:])}")
    masks = [_key(picture.permute(1, 2, 0).double().cpu().numpy(), i) for i, picture in enumerate(pictures)]
    return torch.from_numpy(np.stack(masks))[:, None].to(pictures)


def views_from_pictures(pictures: Tensor, masks: Tensor) -> ViewSet:
    """Pictures [N,3,H,W] in [0,1] on backgrounds, masks [N,1,H,W] in [0,1] => ViewSet without depth (all 0).

    Colours are premultiplied: what a pixel shows less the part of it that is background, whose colour is that of the
    nearest pixel with nothing of the object.
    """
    if pictures.shape[:1] + pictures.shape[2:] != masks.shape[:1] + masks.shape[2:] or masks.shape[1] != 1:
        raise ValueError("pictures and masks must be [N,3,H,W] and [N,1,H,W], got "
                         f"{list(pictures.shape)} and {list(masks.shape)}")
    backgrounds = []
    for picture, mask in zip(pictures, masks[:, 0].cpu().numpy()):
        if (mask > 0).all():
            backgrounds.append(picture)  # nothing to un-mix from
            continue
        rows, columns = distance_transform_edt(mask > 0, return_distances=False, return_indices=True)
        backgrounds.append(picture[:, torch.from_numpy(rows).to(picture.device), torch.from_numpy(columns).to(
            picture.device)])
    views = pictures - (1 - masks) * torch.stack(backgrounds)
    return ViewSet(torch.minimum(views.clamp_min(0), masks), masks, torch.zeros_like(masks))


def _key(picture: np.ndarray, number: int) -> np.ndarray:
    """One picture [H,W,3] => its mask [H,W] float32; `number` names it in the error."""
    background, noise = _background(picture, number)
    contrast = np.abs(picture - background).max(-1)
    threshold = max(LEAST_CONTRAST, NOISES * noise)
    other = _main_parts(_filled(contrast > threshold, contrast, noise))
    if not other.any():
        return np.zeros(other.shape, np.float32)
    return _soft(picture, background, other)


def _background(picture: np.ndarray, number: int) -> tuple[np.ndarray, float]:
    """The background [H,W,3] under the whole picture, a quadratic fitted to its border, and its noise."""
    height, width = picture.shape[:2]
    rim = max(2, round(RIM * min(height, width)))
    border = np.ones((height, width), bool)
    border[rim:-rim, rim:-rim] = False
    y, x = np.indices((height, width)) / [[[height / 2]], [[width / 2]]] - 1
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], -1)
    seen, places = picture[border], terms[border]
    fitted = np.median(seen, 0, keepdims=True)  # first guess: one colour
    tolerance = 4 * PLAIN
    for order in (1, 3, 6, 6, 6):  # a plane, then a bend, then what belongs to neither has left the fit
        belongs = np.abs(seen - fitted).max(-1) < tolerance
        if belongs.sum() < 0.25 * len(seen):
            break
        shares = np.linalg.lstsq(places[belongs, :order], seen[belongs], rcond=None)[0]
        fitted, tolerance = places[:, :order] @ shares, max(PLAIN, tolerance / 2)
    belongs = np.abs(seen - fitted).max(-1) < PLAIN
    if belongs.mean() < PLAIN_SHARE:
        raise ValueError(f"picture {number} has no plain border: {belongs.mean():.0%} of it fit one smooth colour, at "
                         f"least {PLAIN_SHARE:.0%} must. Give pictures with an alpha channel, or on a plain background "
                         "that is free around the object")
    residual = (seen - fitted)[belongs]
    noise = float(1.48 * np.median(np.abs(residual)))
    return (terms[..., :shares.shape[0]] @ shares).clip(0, 1), noise


def _filled(other: np.ndarray, contrast: np.ndarray, noise: float) -> np.ndarray:
    """What differs from the background [H,W], with enclosed places filled unless background shows through them."""
    parts, count = label(~other)
    open_air = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    filled = other.copy()
    for part in np.setdiff1d(np.arange(1, count + 1), open_air):
        place = parts == part
        heart = binary_erosion(place)
        plain = heart.any() and np.quantile(contrast[heart], 0.9) <= max(0.01, 3 * noise)
        if not plain or place.sum() < HOLE * place.size:
            filled |= place
    return filled


def _main_parts(other: np.ndarray) -> np.ndarray:
    """Without parts much smaller than the largest."""
    parts, count = label(other, np.ones((3, 3)))
    if not count:
        return other
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    if sizes.max() < 9:
        return np.zeros_like(other)
    return (sizes >= SPECK * sizes.max())[parts] & other


def _soft(picture: np.ndarray, background: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Coverage [H,W], soft at the edge: how far a pixel's colour is on its way from background to object."""
    heart = binary_erosion(other, np.ones((3, 3)), border_value=1)
    source = heart if heart.any() else other
    distance, (rows, columns) = distance_transform_edt(~source, return_indices=True)
    inner = picture[rows, columns]
    way = inner - background
    share = ((picture - background) * way).sum(-1) / np.maximum((way * way).sum(-1), 1e-6)
    near = distance_transform_edt(~other) <= 1.5
    mask = np.where(heart, 1.0, np.where(near & (distance < 4), share, other))
    return mask.clip(0, 1).astype(np.float32)
