"""Operations of the modules between views: by hand where that is possible, and how they grow with the ring."""

import pytest

from coser.mixer_costs import MODULES, gflop_per_view, main

SIZE, CHANNELS = 4, 64
TOKENS = SIZE * SIZE


def operations(name, num_views):
    return round(gflop_per_view(name, num_views, SIZE, CHANNELS) * 1e9)


def test_attention_costs_are_those_counted_by_hand():
    projections = 4 * 2 * TOKENS * CHANNELS**2
    for name, seen in (("each view alone", TOKENS), ("adjacent (AA)", 3 * TOKENS), ("dense (MVDream)", 8 * TOKENS)):
        assert operations(name, 8) == projections + 2 * 2 * TOKENS * seen * CHANNELS, name


@pytest.mark.parametrize("name", MODULES)
def test_only_dense_and_pooled_attention_and_one_places_own_cost_more_in_larger_rings(name):
    growth = operations(name, 24) / operations(name, 8)
    grows = name.startswith(("dense", "score", "same place"))
    assert growth > 1.01 if grows else growth == pytest.approx(1, abs=0.02)


def test_the_table_has_a_line_for_each_module(capsys):
    main(["--rings", "3", "4", "--size", "2", "--channels", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(MODULES)
    assert "3 views | 4 views" in lines[0]
