"""What several files of tests share: rendered solids and a tiny pipeline, each made once a session."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would only wait. torch reads this on its import
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The longest files go first, so that no worker is left alone with one of them at the end.
LONGEST = ("test_peers", "test_browser", "test_pipeline", "test_train", "test_evaluate_table", "test_benchmark",
           "test_compare", "test_app", "test_train_recipe", "test_fuse", "test_studio", "test_compose", "test_layers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def renders(tmp_path_factory):
    """(folder of rings to train on, folder of held-out rings): 4 views of 256 x 256 pixels each."""
    from tiny import write_renders  # here: the process that only hands out the tests would load torch for nothing
    return write_renders(tmp_path_factory.mktemp("renders"))


@pytest.fixture(scope="session")
def pipeline():
    """A tiny pipeline; leave it as you found it."""
    from tiny import tiny_pipeline
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(pipeline, tmp_path_factory):
    """The tiny pipeline, saved."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder
