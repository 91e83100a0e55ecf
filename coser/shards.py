"""A folder as small files that travel one by one, and back: `python -m coser.shards split FOLDER OUT` and `join`.

All files of the folder, laid end to end in the order of their names, are cut into shards of at most 16 MiB.
`index.json` beside them lists files and shards with their sizes and sha256, so that what comes back is what went, bit
for bit, or is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from coser.whole_files import fresh_folder

MAX_BYTES = 16 * 2**20
FORMAT = "coser shards 1"
INDEX = "index.json"
# A pipeline works without them; a training that starts from it warms up again.
TRAINING_STATE = ("training_state.safetensors", "training.json")
_BLOCK = 2**20


def write_shards(folder: str | Path, out: str | Path, max_bytes: int = MAX_BYTES,
                 leave_out: Iterable[str] = TRAINING_STATE) -> list[Path]:
    """Writes the files below `folder` as shards of at most `max_bytes` and an index into `out`; returns the shards.

    leave_out: names of files that stay behind, in whichever folder. Shards that `out` holds already are replaced.
    Raises ValueError when there is nothing to write or `out` holds anything else.
    """
    folder, out, left_out = Path(folder), Path(out), set(leave_out)
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in left_out)
    if not paths:
        raise ValueError(f"folder must hold files, got {folder}")
    if out.exists() and not _replaceable(out):
        raise ValueError(f"out must be new, empty or a folder of shards, got {out}")
    writing = fresh_folder(out)
    files = [{"path": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": _sha256(_blocks(p))}
             for p in paths]
    shards = []
    for data in _cut((block for path in paths for block in _blocks(path)), max_bytes):
        name = f"shard-{len(shards):04d}.bin"
        (writing / name).write_bytes(data)
        shards.append({"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    index = {"format": FORMAT, "max_bytes": max_bytes, "files": files, "shards": shards}
    (writing / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    writing.rename(out)  # under its name only when whole
    return [out / shard["name"] for shard in shards]


def read_shards(out: str | Path, folder: str | Path) -> list[Path]:
    """Puts what `write_shards` wrote into `out` back together as `folder`; returns the files.

    Raises ValueError, and leaves no `folder` behind, when a shard is missing, cut short or damaged, when the index is
    none, or when `folder` holds anything already.
    """
    out, folder = Path(out), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder}")
    index = _read_index(out)
    for shard in index["shards"]:
        _check(out / shard["name"], shard)
    writing = fresh_folder(folder)
    data = (block for shard in index["shards"] for block in _blocks(out / shard["name"]))
    rest = b""
    for file in index["files"]:
        path = writing / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        rest = _copy(rest, data, path, file["bytes"])
        _check(path, file)
    if folder.exists():
        folder.rmdir()
    writing.rename(folder)
    return [folder / file["path"] for file in index["files"]]


def _replaceable(out: Path) -> bool:
    """Whether a folder is empty or holds an index and its shards alone."""
    if not out.is_dir():
        return False
    return all(p.is_file() and (p.name == INDEX or p.match("shard-*.bin")) for p in out.iterdir())


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _cut(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Bytes in blocks of any length => the same bytes in pieces of `size`, the last one shorter."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def _copy(rest: bytes, data: Iterator[bytes], path: Path, count: int) -> bytes:
    """Writes `count` bytes of `rest` and then `data` into a file; returns what was read too far."""
    with path.open("wb") as file:
        while count > 0:
            block = rest or next(data, b"")
            if not block:
                break  # _check says so
            file.write(block[:count])
            rest, count = block[count:], count - min(count, len(block))
    return rest


def _check(path: Path, entry: dict) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the index lists it with {entry['bytes']} bytes")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path} must have {entry['bytes']} bytes, got {path.stat().st_size}")
    if (found := _sha256(_blocks(path))) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: it must have sha256 {entry['sha256']}, got {found}")


def _read_index(out: Path) -> dict:
    path = out / INDEX
    if not path.is_file():
        raise ValueError(f"{path} is missing; write shards with python -m coser.shards split FOLDER {out}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = [PurePosixPath(f["path"]) for f in index["files"]] + [PurePosixPath(s["name"]) for s in index["shards"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be an index that coser.shards wrote; it cannot be read: {error!r}") from error
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT!r}, got {index.get('format')!r}")
    outside = [str(n) for n in names if n.is_absolute() or ".." in n.parts or "\\" in str(n) or ":" in str(n)]
    if outside:
        raise ValueError(f"{path} must name files inside the folder, got {outside[0]!r}")
    return index


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m coser.shards", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    split = verbs.add_parser("split", help="folder => shards and their index")
    split.add_argument("folder", type=Path)
    split.add_argument("out", type=Path)
    split.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="of a shard (default %(default)s)")
    split.add_argument("--with-state", action="store_true", help="take the training state along")
    join = verbs.add_parser("join", help="shards => the folder that they were made of")
    join.add_argument("out", type=Path)
    join.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "split":
            shards = write_shards(options.folder, options.out, options.max_bytes,
                                  () if options.with_state else TRAINING_STATE)
            print(f"{len(shards)} shards, {sum(s.stat().st_size for s in shards)} bytes, in {options.out}")
        else:
            files = read_shards(options.out, options.folder)
            print(f"{len(files)} files, {sum(f.stat().st_size for f in files)} bytes, in {options.folder}")
    except ValueError as error:
        parser.exit(2, f"coser.shards: {error}\n")


if __name__ == "__main__":
    main()
