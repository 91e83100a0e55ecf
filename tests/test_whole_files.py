"""A file is there whole or not at all."""

import pytest

from coser.whole_files import whole_file


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "index.jsonl"
    with whole_file(path) as writing:
        writing.write_text("half")
        assert not path.exists() and not list(tmp_path.glob("*.jsonl"))
        writing.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["index.jsonl"] and path.read_text() == "whole"


def test_after_an_error_the_file_that_was_there_stays_alone(tmp_path):
    path = tmp_path / "index.jsonl"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(path) as writing:
        writing.write_text("half")
        1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["index.jsonl"] and path.read_text() == "before"
