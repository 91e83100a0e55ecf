"""Anybody's pictures of one object, with cameras in a transforms.json or taken in a plain ring, as posed views."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from coser.cameras import DISTANCE, ELEVATION, FOV, Cameras
from coser.framing import agreement, meeting_point, turns, view_of
from coser.photographs import Photograph, read_photograph
from coser.picture_files import PICTURES, PictureFiles, open_pictures
from coser.transforms import FILE_TO_WORLD, depth_scale_of, read_frames
from coser.views import ViewSet

FEWEST, MOST = 2, 200  # pictures
USED = 48  # of them: more cost memory and time and show hardly more
SIZES = (64, 1024)  # pixels a side
RADIUS = 0.95  # of the object, after its world was scaled
# Agreement of silhouettes. On 12 assets true cameras gave 0.80 to 0.99 in the mean over 12 views, shuffled ones 0.24 to
# 0.95, and the wrong way round 0.01 less than the right one where objects are as good as round, usually 0.1 to 0.4.
WRONG, DOUBTFUL, ODD = 0.5, 0.75, 0.6  # in the mean refused, in the mean told, a view named
ENOUGH_WHOLE = 4  # pictures, and half of all, that must be whole where those that are cut off are left out
CLEARLY = 0.03  # that a ring must gain from being taken at another elevation or the other way round
TRIED = (0.0, 10.0, ELEVATION, 30.0, 45.0)  # elevations, degrees
FILLED = (0.5, 1.1)  # radii that a ring's object may have before the ring is scaled
OFF_AIM = 0.1  # of half a picture; a ring's object may lie that far beside the middle before the aim is corrected
TRANSFORMS = ("transforms.json", "transforms_train.json")
MAX_JSON = 50 * 2**20


@dataclass(frozen=True)
class PosedViews:
    """Own pictures, ready to be reconstructed.

    views: N square views, depths 0 where no depth maps came along. cameras: their N cameras. notes: what was assumed,
    changed or left out, a sentence each. world_to_source: [4,4] float64, the similarity that takes a point of the
    cameras' world to that of the transforms.json (z up there); the identity's axes where there is none. names: the
    pictures' file names. drawn: by a model, as the file's extras say of a ring that we exported.
    """

    views: ViewSet
    cameras: Cameras
    notes: tuple[str, ...]
    world_to_source: Tensor
    names: tuple[str, ...]
    drawn: bool = False


def load_views(path: str | os.PathLike | Sequence[str | os.PathLike], *, num_views: int | None = None,
               elevation: float | None = None, azimuth: float = 0.0, fov: float | None = None,
               clockwise: bool | None = None, size: int = 256, max_views: int = USED) -> PosedViews:
    """Pictures of one object => PosedViews, float32 on the CPU.

    path: a folder, a .zip or a list of files: PNG, JPEG or WebP pictures, 2 to 200 of them, of any shapes and sizes,
    with an alpha channel or before a plain background. num_views: how many there must be, if that is to be checked.
    size: pixels a side of the views, 64 to 1024. max_views: of more pictures as many are used, spread evenly.

    With a transforms.json (see coser.transforms) its cameras are taken, the world is moved and scaled so that the
    object lies in the unit sphere (unless the file says `unit_sphere`: then both world and lens stay), and depth maps
    are read where every picture has one. Without, the pictures, sorted by name as people count, are a closed ring:
    `azimuth` (degrees) of the first, cameras aimed at the object, `fov` (degrees, of the longer side, default 40), at
    one `elevation`, going round the object `clockwise` or not as seen from above. Where those two are None they are 20
    and counter-clockwise unless silhouettes agree clearly better otherwise. Raises ValueError saying what is wrong and
    with which file.
    """
    _check("size", size, *SIZES, whole=True)
    _check("max_views", max_views, FEWEST, MOST, whole=True)
    with open_pictures(path) as files:
        transforms = _transforms_name(files)
        if transforms is None:
            return _ring(files, num_views, elevation, azimuth, fov, clockwise, size, max_views)
        notes = []
        if elevation is not None or fov is not None:
            notes.append(f"{PurePosixPath(transforms).name} gives the cameras: elevation and fov were not used.")
        return _posed(files, transforms, num_views, size, max_views, notes)


def _posed(files: PictureFiles, name: str, num_views: int | None, size: int, max_views: int,
           notes: list[str]) -> PosedViews:
    transforms = _read_json(files, name)
    frames = read_frames(transforms)
    _check_count(len(frames), num_views)
    pictures = _found(files, name, [frame.file_path for frame in frames], "pictures")
    if len(set(pictures)) < len(pictures):
        twice = sorted({p for p in pictures if pictures.count(p) > 1})
        raise ValueError(f"frames in {name} must name different pictures, got {', '.join(twice[:3])} more than once")
    depths = [frame.depth_file_path for frame in frames]
    given = sum(depth is not None for depth in depths)
    if 0 < given < len(frames):
        notes.append(f"Depth maps were not used: {given} of {len(frames)} pictures have one.")
    depths = _found(files, name, depths, "depth maps") if given == len(frames) else [None] * len(frames)
    masks = _found(files, name, [frame.mask_path for frame in frames], "masks")
    chosen = _spread([frame.camera_to_world for frame in frames], max_views)
    if len(chosen) < len(frames):
        notes.append(f"{len(chosen)} of {len(frames)} pictures were used, spread evenly around the object.")
    scale = depth_scale_of(transforms)
    photographs = [read_photograph(files, pictures[i], frames[i], size, depth=depths[i], depth_scale=scale,
                                   mask=masks[i]) for i in chosen]
    if any(any(photograph.distortion) for photograph in photographs):
        notes.append("The lens's distortion was undone.")
    if left := _without_camera(files, pictures, {*depths, *masks}):
        notes.append(f"Left out, for they have no camera in {PurePosixPath(name).name}: {_first_of(left)}.")
    if transforms.get("unit_sphere") is True:
        own = _framed(photographs, np.zeros(3), 1.0, _reach(photographs), notes, FILE_TO_WORLD.T, size)
        extras = transforms.get("extras")
        drawn = isinstance(extras, dict) and "settings" in extras and "scene" not in extras
        return replace(_checked_against_silhouettes(own), drawn=drawn)
    photographs = _whole(photographs, notes)
    middle, radius = meeting_point(photographs)
    ups = np.stack([photograph.camera_to_world[:3, 1] for photograph in photographs]).mean(0)
    if ups[1] < 0.5 * np.linalg.norm(ups):
        notes.append("Most cameras do not stand upright in a world with z up: the object may lie on its side.")
    own = _framed(photographs, middle, RADIUS / radius, None, notes, FILE_TO_WORLD.T, size)
    return _checked_against_silhouettes(own)


def _without_camera(files: PictureFiles, pictures: list[str], others: set[str | None]) -> list[str]:
    """The pictures that lie beside those with a camera and have none; "r_0_depth.png" belongs to "r_0.png"."""
    folders = {str(PurePosixPath(picture).parent) for picture in pictures}
    stems = tuple(f"{PurePosixPath(picture).with_suffix('')}_" for picture in pictures)
    return [name for name in files.names if PurePosixPath(name).suffix.lower() in PICTURES
            and str(PurePosixPath(name).parent) in folders and name not in {*pictures, *others}
            and not name.startswith(stems)]


def _checked_against_silhouettes(own: PosedViews) -> PosedViews:
    """The views with a note where cameras and silhouettes hardly agree; ValueError where they contradict each other."""
    agreed = agreement(own.views.masks, own.cameras)
    worst = ", ".join(own.names[i] for i in agreed.argsort()[:3])
    if agreed.mean() < WRONG:
        raise ValueError("cameras must belong to the pictures, got silhouettes that contradict each other, most of all "
                         f"{worst}")
    if agreed.mean() < DOUBTFUL or agreed.min() < ODD:
        own = replace(own, notes=(*own.notes, f"Cameras and silhouettes hardly agree, least in {worst}."))
    return own


def _ring(files: PictureFiles, num_views: int | None, elevation: float | None, azimuth: float, fov: float | None,
          clockwise: bool | None, size: int, max_views: int) -> PosedViews:
    names = files.pictures()
    _check_count(len(names), num_views)
    for word, value, low, high in (("elevation", elevation, -89, 89), ("azimuth", azimuth, -360, 360),
                                   ("fov", fov, 1, 150)):
        if value is not None:
            _check(word, value, low, high)
    angles = ELEVATION if elevation is None else elevation, FOV if fov is None else fov
    steps = np.arange(len(names)) * (360 / len(names))
    cameras = Cameras.look_at_origin(azimuth + (-steps if clockwise else steps), angles[0], DISTANCE, angles[1])
    notes = [f"Without a transforms.json the {len(names)} pictures from {names[0]} to {names[-1]} were taken as a "
             f"closed ring: azimuth {azimuth:g} first, fov {angles[1]:g} degrees, "
             f"{_told(angles[0], bool(clockwise))}."]
    chosen = [i * len(names) // min(len(names), max_views) for i in range(min(len(names), max_views))]
    if len(chosen) < len(names):
        notes.append(f"{len(chosen)} of {len(names)} pictures were used, spread evenly around the object.")
    poses = cameras.camera_to_world.double().numpy()
    photographs = _whole([read_photograph(files, names[i], poses[i], size, fov=angles[1]) for i in chosen], notes)
    reach = math.tan(math.radians(angles[1]) / 2)
    rims = [photograph.rim()[:, :2] for photograph in photographs]
    aim = np.mean([(rim.max(0) + rim.min(0)) / 2 for rim in rims], 0)
    if np.abs(aim).max() > OFF_AIM * reach:
        photographs = [photograph.aimed(aim) for photograph in photographs]
        notes.append("The object is not in the middle of the pictures: they were cropped around it.")
    half = max(np.abs(photograph.rim()[:, :2]).max() for photograph in photographs)
    radius = DISTANCE * math.sin(math.atan(half))
    scale = 1.0 if FILLED[0] <= radius <= FILLED[1] else RADIUS / radius
    if radius < FILLED[0]:
        notes.append("The object fills little of the pictures: they were cropped around it.")
        reach = None
    own = _framed(photographs, np.zeros(3), scale, reach, notes, np.eye(4), size)
    tried = [(e, c) for e in (TRIED if elevation is None else [elevation])
             for c in ((False, True) if clockwise is None else [clockwise])]
    return _as_silhouettes_tell(own, azimuth, (angles[0], bool(clockwise)), tried)


def _as_silhouettes_tell(own: PosedViews, azimuth: float, taken: tuple[float, bool],
                         tried: list[tuple[float, bool]]) -> PosedViews:
    """The ring that was `taken` at an elevation (degrees), clockwise or not, as one of those `tried` where its
    silhouettes agree clearly better so."""
    distance = float(own.cameras.centers.norm(dim=-1).mean())
    steps = own.cameras.azimuths.double() - azimuth

    def ring(elevation: float, clockwise: bool) -> Cameras:
        azimuths = azimuth + (steps if clockwise == taken[1] else -steps)
        return Cameras.look_at_origin(azimuths, elevation, distance, own.cameras.fov)

    agreed = [float(agreement(own.views.masks, ring(*way)).mean()) for way in tried]
    best = tried[int(np.argmax(agreed))]
    if max(agreed) >= agreed[tried.index(taken)] + CLEARLY:
        note = f"Their silhouettes agree clearly better {_told(*best)}: so they were taken."
        own = replace(own, cameras=ring(*best), notes=(*own.notes, note))
    if max(agreed) < DOUBTFUL:
        note = ("Their silhouettes hardly agree: are they of one object, in even steps all around it, and do their "
                "names put them in that order?")
        own = replace(own, notes=(*own.notes, note))
    return own


def _told(elevation: float, clockwise: bool) -> str:
    return f"at elevation {elevation:g} going {'' if clockwise else 'counter-'}clockwise as seen from above"


def _framed(photographs: list[Photograph], middle: np.ndarray, scale: float, reach: float | None, notes: list[str],
            axes: np.ndarray, size: int) -> PosedViews:
    """Photographs => PosedViews around `middle`, scaled. reach: half of the views' side in focal lengths, None: as much
    as the silhouettes need. axes: takes the photographs' world to the file's."""
    rotations = np.broadcast_to(np.eye(3), (len(photographs), 3, 3))
    if reach is None:
        rotations, reach = turns(photographs, middle)
    photographs = [photograph.moved(middle, scale) for photograph in photographs]
    views = ViewSet.cat([view_of(photograph, rotation, reach, size)
                         for photograph, rotation in zip(photographs, rotations)])
    poses = np.stack([photograph.camera_to_world for photograph in photographs])
    poses[:, :3, :3] = poses[:, :3, :3] @ rotations
    cameras = Cameras(torch.from_numpy(poses).float(), math.degrees(2 * math.atan(reach)))
    if _elsewhere(views, cameras):
        views = ViewSet(views.views, views.masks, torch.zeros_like(views.depths))
        notes = [*notes, "Depth maps were not used: they put the object elsewhere than its silhouettes do. Is "
                         "depth_scale right?"]
    back = np.eye(4) / scale
    back[:3, 3], back[3, 3] = middle, 1
    return PosedViews(views, cameras, tuple(notes), torch.from_numpy(axes @ back),
                      tuple(photograph.name for photograph in photographs))


def _elsewhere(views: ViewSet, cameras: Cameras) -> bool:
    """Whether most depth maps put the object out of the unit sphere, with room to spare."""
    if not (views.depths > 0).any():
        return False
    expected = (cameras.centers * cameras.camera_to_world[:, :3, 2]).sum(-1)
    depths = torch.where(views.depths > 0, views.depths, torch.nan).flatten(1).nanmedian(1).values
    return bool((~((depths - expected).abs() < 1.5)).float().mean() > 0.5)


def _whole(photographs: list[Photograph], notes: list[str]) -> list[Photograph]:
    """Without those whose object is cut off by the edge, where enough others remain."""
    cut = [photograph.name for photograph in photographs if photograph.cut]
    whole = [photograph for photograph in photographs if not photograph.cut]
    if not cut:
        return photographs
    names = ", ".join(cut[:5]) + (f" and {len(cut) - 5} more" if len(cut) > 5 else "")
    if len(whole) >= max(ENOUGH_WHOLE, len(photographs) / 2):
        notes.append(f"The object is cut off by the picture's edge in {names}: left out.")
        return whole
    notes.append(f"The object is cut off by the picture's edge in {names}: it may be cut off there, too.")
    return photographs


def _spread(poses: list[np.ndarray], count: int) -> list[int]:
    """Indices of at most `count` cameras, in order, each as far from all before it as can be (Gonzalez, 1985)."""
    if len(poses) <= count:
        return list(range(len(poses)))
    centers = np.stack([pose[:3, 3] for pose in poses])
    chosen, distance = [0], np.full(len(poses), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(centers - centers[chosen[-1]], axis=1))
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return sorted(chosen)


def _reach(photographs: list[Photograph]) -> float | None:
    """Half of the pictures' side in focal lengths, where they are square, of one fov and have it in their middle."""
    lenses = np.array([(*photograph.lens, *photograph.whole) for photograph in photographs])
    fx, fy, cx, cy, width, height = lenses.T
    half = width / 2
    off = np.abs(np.stack([half / fx * fx[0] / half[0], fy / fx, cx / half, cy / half, height / width]) - 1).max()
    return None if off > 1e-4 or any(any(p.distortion) for p in photographs) else float(half[0] / fx[0])


def _transforms_name(files: PictureFiles) -> str | None:
    """The transforms.json nearest to the top, if there is one."""
    for wanted in TRANSFORMS:
        found = [name for name in files.names if PurePosixPath(name).name == wanted]
        top = min((name.count("/") for name in found), default=0)
        found = [name for name in found if name.count("/") == top]
        if len(found) > 1:
            raise ValueError(f"own views must have one {wanted}, got {', '.join(found[:5])}")
        if found:
            return found[0]
    return None


def _read_json(files: PictureFiles, name: str) -> dict:
    data = files.read(name)
    if len(data) > MAX_JSON:
        raise ValueError(f"{name} must have at most {MAX_JSON >> 20} MiB, got {len(data) >> 20}")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON text, got something that cannot be read ({error})") from None


def _found(files: PictureFiles, name: str, paths: list[str | None], what: str) -> list[str | None]:
    """The files that `paths` in the JSON file `name` mean. ValueError for those that are not there."""
    folder = str(PurePosixPath(name).parent)
    found = [None if path is None else files.find(path, folder) for path in paths]
    missing = [path for path, file in zip(paths, found) if path is not None and file is None]
    if missing:
        raise ValueError(f"{name} must name {what} that are there, got {len(missing)} of {len(paths)} that are not: "
                         f"{_first_of(missing)}")
    return found


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def _check_count(count: int, num_views: int | None) -> None:
    if not FEWEST <= count <= MOST:
        raise ValueError(f"own views must be {FEWEST} to {MOST} pictures of one object from different sides, got "
                         f"{count}")
    if num_views is not None and num_views != count:
        raise ValueError(f"num_views must be the number of pictures, {count}, got {num_views}")


def _check(name: str, value: object, low: float, high: float, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number from {low:g} to {high:g}, got {value!r}")
