"""What several files of tests share: rendered solids and a tiny pipeline, each made once a session."""

import pytest
from tiny import tiny_pipeline, write_renders


@pytest.fixture(scope="session")
def renders(tmp_path_factory):
    """(folder of rings to train on, folder of held-out rings): 4 views of 256 x 256 pixels each."""
    return write_renders(tmp_path_factory.mktemp("renders"))


@pytest.fixture(scope="session")
def pipeline():
    """A tiny pipeline; leave it as you found it."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(pipeline, tmp_path_factory):
    """The tiny pipeline, saved."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder
