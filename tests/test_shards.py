"""Shards: what comes back is what went, bit for bit, or is refused."""

import json
import random
import shutil

import pytest

from coser.shards import INDEX, TRAINING_STATE, main, read_shards, write_shards


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    """Files of many sizes, some empty, some below the top, some a whole number of shards long."""
    draw = random.Random(0)
    for name, size in {"a.json": 10, "empty": 0, "unet/weights.safetensors": 3500, "vae/weights.safetensors": 2000,
                       "vae/config.json": 7, "z/last/deep.bin": 1000, "training_state.safetensors": 5000}.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size))
    return tmp_path / "folder"


@pytest.mark.parametrize("max_bytes", [1, 999, 1000, 100_000])
def test_joined_shards_are_the_folder(folder, tmp_path, max_bytes):
    shards = write_shards(folder, tmp_path / "out", max_bytes, leave_out=())
    total = sum(map(len, contents(folder).values()))
    sizes = [s.stat().st_size for s in shards]
    assert len(shards) == -(-total // max_bytes) and max(sizes) <= max_bytes and sum(sizes) == total
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([INDEX, *(s.name for s in shards)])
    files = read_shards(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert {p.relative_to(tmp_path / "back").as_posix() for p in files} == contents(folder).keys()


def test_the_training_state_stays_behind_unless_asked_for(folder, tmp_path):
    write_shards(folder, tmp_path / "out", 4000)
    read_shards(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == {k: v for k, v in contents(folder).items() if k not in TRAINING_STATE}


@pytest.mark.parametrize("harm, named", [
    (lambda out: (out / "shard-0002.bin").unlink(), r"shard-0002\.bin is missing"),
    (lambda out: (out / "shard-0001.bin").write_bytes(b"short"), r"shard-0001\.bin must have 1000 bytes, got 5"),
    (lambda out: flip(out / "shard-0003.bin"), r"shard-0003\.bin is damaged"),
    (lambda out: (out / INDEX).unlink(), r"index\.json is missing"),
    (lambda out: (out / INDEX).write_text("{"), r"index\.json must be an index"),
    (lambda out: (out / INDEX).write_text("[1]"), r"index\.json must be an index"),
    (lambda out: edit(out, lambda index: index.update(format="other 2")), "must have format"),
    (lambda out: edit(out, lambda index: index["files"][0].update(path="../outside")), "files inside the folder"),
    (lambda out: edit(out, lambda index: index["files"][0].update(path="/outside")), "files inside the folder"),
    (lambda out: edit(out, lambda index: index["files"].reverse()), "is damaged"),
])
def test_a_damaged_or_incomplete_set_is_refused_and_leaves_no_folder(folder, tmp_path, harm, named):
    write_shards(folder, tmp_path / "out", 1000)
    harm(tmp_path / "out")
    with pytest.raises(ValueError, match=named):
        read_shards(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "outside").exists()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(out, change):
    index = json.loads((out / INDEX).read_text())
    change(index)
    (out / INDEX).write_text(json.dumps(index))


def test_a_second_set_takes_the_place_of_the_first(folder, tmp_path):
    write_shards(folder, tmp_path / "out", 100)
    shutil.rmtree(folder / "unet")
    write_shards(folder, tmp_path / "out", 1000)
    read_shards(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back").keys() == {"a.json", "empty", "vae/weights.safetensors", "vae/config.json",
                                                  "z/last/deep.bin"}


def test_nothing_that_is_no_shard_is_overwritten(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be"):
        write_shards(folder, other)
    write_shards(folder, tmp_path / "out", 4000)
    with pytest.raises(ValueError, match="folder must be new or empty"):
        read_shards(tmp_path / "out", other)
    assert contents(other) == {"notes.txt": b"mine"}
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="folder must hold files"):
        write_shards(tmp_path / "nothing", tmp_path / "new")


def test_the_command_line_splits_and_joins(folder, tmp_path, capsys):
    main(["split", str(folder), str(tmp_path / "out"), "--max-bytes", "5000", "--with-state"])
    main(["join", str(tmp_path / "out"), str(tmp_path / "back")])
    assert contents(tmp_path / "back") == contents(folder)
    (tmp_path / "out" / "shard-0001.bin").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["join", str(tmp_path / "out"), str(tmp_path / "again")])
    assert stopped.value.code == 2 and "shard-0001.bin is missing" in capsys.readouterr().err
