"""Pictures out of folders, zips and lists of files, whatever their kind; nothing is unpacked to disk or trusted."""

from __future__ import annotations

import io
import lzma
import os
import posixpath
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_FILES = 2_000  # in a folder or zip: 200 pictures with depths, masks and what lies beside them
MAX_BYTES = 2 * 2**30  # of all files, unpacked
MAX_FILE_BYTES = 200 * 2**20
MAX_PIXELS = 80_000_000  # of one picture
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, struct.error)
BROKEN_PICTURE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class PictureFiles:
    """What lies in a folder, a zip or a list: names with forward slashes, sorted as people count, and how one is
    read."""

    names: tuple[str, ...]
    read: Callable[[str], bytes]

    def find(self, path: str, beside: str = "") -> str | None:
        """The name that `path`, written in a file of the folder `beside`, means: as it stands, with a picture's suffix
        added, or, where the path leads elsewhere, by its last part if just one file has it; None if there is none."""
        written = posixpath.normpath(posixpath.join(beside, path.strip().replace("\\", "/")))
        candidates = [written + suffix for suffix in ("", *PICTURES, *map(str.upper, PICTURES))]
        for name in candidates:
            if name in self._known:
                return name
        last = {PurePosixPath(name).name for name in candidates}
        same = [name for name in self.names if PurePosixPath(name).name in last]
        return same[0] if len(same) == 1 else None

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def pictures(self) -> tuple[str, ...]:
        """The pictures of the folder nearest to the top. ValueError where there are none, or several such folders."""
        found = [name for name in self.names if name.lower().endswith(PICTURES)]
        if not found:
            kinds = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in self.names})[:6]
            raise ValueError(f"own views must be pictures ({', '.join(PICTURES)}), got "
                             f"{'files with ' + ', '.join(kinds) if kinds else 'no files'}")
        top = min(name.count("/") for name in found)
        found = [name for name in found if name.count("/") == top]
        folders = sorted({str(PurePosixPath(name).parent) for name in found})
        if len(folders) > 1:
            raise ValueError(f"own views without a transforms.json must lie in one folder, got "
                             f"{', '.join(folders[:6])}")
        return tuple(found)


@contextmanager
def open_pictures(path: str | os.PathLike | Sequence[str | os.PathLike]) -> Iterator[PictureFiles]:
    """A folder, a .zip, or a list of files => PictureFiles, readable while the context lasts.

    ValueError for what is not there, for zips that are broken, locked, hold links or paths that lead out of them, and
    for more than MAX_FILES files or MAX_BYTES.
    """
    if not isinstance(path, (str, os.PathLike)):
        files = [Path(p) for p in path]
        if len(files) == 1 and files[0].suffix.lower() in (".zip", ""):
            path = files[0]
        else:
            yield _listed(files)
            return
    path = Path(path)
    if path.is_dir():
        yield _folder(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except BROKEN_ZIP as error:
            raise ValueError(f"{path.name} must be a whole zip file, got one that cannot be read ({error})") from None
        with archive:
            yield _archive(archive, path.name)
    elif path.is_file():
        raise ValueError(f"own views must be a folder, a .zip or a list of pictures, got the file {path.name}")
    else:
        raise ValueError(f"own views must be a folder, a .zip or a list of pictures, got {path.name!r}, which "
                         "is not there")


def decode_picture(name: str, data: bytes, size: tuple[int, int] | None = None, upright: bool = False) -> Image.Image:
    """A file's bytes => RGBA picture, 8 bits a channel; alpha 255 where the file has none.

    upright: turn it as its EXIF data say. size: the (width, height) that cameras were made for; a picture of another
    shape that gets this one by turning is turned. ValueError, with the file's name, for what is no whole PNG, JPEG or
    WebP picture and for more than MAX_PIXELS.
    """
    image = _load(name, data)
    turned = upright or (size is not None and not _alike(image.size, size) and _alike(image.size[::-1], size))
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits of grey
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values / (257 if values.max(initial=0) > 255 else 1)).clip(0, 255).astype(np.uint8))
    return image.convert("RGBA")


def decode_depth(name: str, data: bytes) -> np.ndarray:
    """A file's bytes => the steps of its depth map [H,W] uint16; ValueError for what is not one grey channel of 16
    bits."""
    image = _load(name, data)
    if image.format != "PNG" or not image.mode.startswith("I"):
        raise ValueError(f"{name} must be a depth map, a PNG of one grey channel of 16 bits, got {image.format} of "
                         f"mode {image.mode}")
    values = np.asarray(image)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"{name} must be a depth map of 16 bits, got values to {values.max()}")
    return values.astype(np.uint16)


def natural(name: str) -> tuple:
    """The key by which view-2 comes before view-10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name.lower())), name


def _load(name: str, data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
        pixels = image.width * image.height
    except UnidentifiedImageError:
        raise ValueError(f"{name} must be a PNG, JPEG or WebP picture, got something else") from None
    except Image.DecompressionBombError:
        pixels = 2 * Image.MAX_IMAGE_PIXELS
    except BROKEN_PICTURE as error:
        raise ValueError(f"{name} must be a whole picture, got a broken one ({error})") from None
    raise ValueError(f"{name} must have at most {MAX_PIXELS // 10**6} million pixels, got {pixels // 10**6} million or "
                     "more")


def _alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) < 0.02


def _wanted(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not any(part.startswith((".", "__MACOSX")) for part in parts)


def _check_totals(sizes: list[int], where: str) -> None:
    if len(sizes) > MAX_FILES:
        raise ValueError(f"{where} must hold at most {MAX_FILES} files, got {len(sizes)} or more")
    if sum(sizes) > MAX_BYTES or max(sizes, default=0) > MAX_FILE_BYTES:
        raise ValueError(f"{where} must hold at most {MAX_BYTES >> 30} GiB and {MAX_FILE_BYTES >> 20} MiB a file, got "
                         f"{sum(sizes) / 2**20:.0f} MiB, the largest file {max(sizes) / 2**20:.0f} MiB")


def _folder(folder: Path) -> PictureFiles:
    sizes = {}
    for root, _, files in os.walk(folder):
        for file in files:
            path = Path(root, file)
            name = path.relative_to(folder).as_posix()
            if _wanted(name) and path.is_file():
                sizes[name] = path.stat().st_size if name.lower().endswith((*PICTURES, ".json")) else 0
        if len(sizes) > MAX_FILES:
            break
    _check_totals(list(sizes.values()), folder.name or str(folder))
    return PictureFiles(tuple(sorted(sizes, key=natural)), lambda name: (folder / name).read_bytes())


def _listed(files: list[Path]) -> PictureFiles:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"own views must be files that are there, got {', '.join(missing[:5])}")
    paths = {file.name: file for file in files}
    if len(paths) < len(files):
        raise ValueError("own views in a list must have different names, got some of the same name")
    _check_totals([file.stat().st_size for file in files], "own views")
    return PictureFiles(tuple(sorted(paths, key=natural)), lambda name: paths[name].read_bytes())


def _archive(archive: zipfile.ZipFile, where: str) -> PictureFiles:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    _check_totals([entry.file_size for entry in entries], where)
    for entry in entries:
        name = entry.filename
        if name.startswith(("/", "\\")) or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{where} must hold plain relative paths, got {name!r}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"{where} must hold files alone, got the link {name!r}")
        if entry.flag_bits & 1:
            raise ValueError(f"{where} must not be locked with a password, got {name!r}, which is")

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except BROKEN_ZIP as error:
            raise ValueError(f"{name} in {where} must be whole, got one that cannot be unpacked ({error})") from None

    names = [entry.filename for entry in entries if _wanted(entry.filename)]
    return PictureFiles(tuple(sorted(set(names), key=natural)), read)
