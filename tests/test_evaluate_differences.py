"""Tables compared: what changed within the prompts that both were asked, and how sure that is."""

import json
import math

import pytest

from coser import evaluate
from coser.evaluate_differences import differences, load_scores


def rows(**figures):
    """The rows of prompts p0, p1, ... with these figures, None where a prompt has none."""
    count = len(next(iter(figures.values())))
    return [{"id": f"p{i}", "prompt": f"p{i}", "why": "words are no figures"}
            | {name: values[i] for name, values in figures.items() if values[i] is not None} for i in range(count)]


@pytest.fixture
def table(tmp_path):
    """A function that writes a table of the given rows and gives its folder."""
    def write(name, generated):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.json").write_text(json.dumps({"rings": {"generated": generated}}))
        return tmp_path / name

    return write


@pytest.fixture
def two(table):
    base = table("base", rows(object_right=[1.0, 0.0, 0.0, 1.0], cross_psnr=[20.0, 30.0, 25.0, None], janus=[0.0] * 4))
    other = table("other", rows(object_right=[1.0, 1.0, 0.0, 1.0], cross_psnr=[21.0, 29.0, 28.0, 40.0]))
    return base, other


def test_changes_are_taken_within_the_prompt(two):
    found = differences(*map(load_scores, two))
    assert set(found) == {"object_right", "cross_psnr"}, "janus is in one of them alone"
    right, cross = found["object_right"], found["cross_psnr"]
    assert (right.mean, right.count) == (0.25, 4) and right.error == pytest.approx(0.5 / 2)
    assert (cross.mean, cross.count) == (1.0, 3) and cross.error == pytest.approx(2 / math.sqrt(3))


def test_a_table_differs_from_itself_by_nothing_at_all(two):
    scores = load_scores(two[0] / "table.json")
    assert all(d.mean == d.error == 0 for d in differences(scores, scores).values())


def test_whole_numbers_are_figures_too(table):
    folders = [table(name, rows(matches=matches)) for name, matches in (("base", [3, 5]), ("other", [4, 8]))]
    assert differences(*map(load_scores, folders))["matches"].mean == 2


def test_other_prompts_do_not_count_and_too_few_are_none(table):
    scores = load_scores(table("base", rows(object_right=[1.0, 0.0, 1.0])))
    some = load_scores(table("some", rows(object_right=[0.0, 0.0])))
    assert differences(scores, some)["object_right"].count == 2
    one = {"p0": some["p0"], "elsewhere": some["p1"]}
    assert differences(scores, one) == {}, "one prompt has no spread"
    with pytest.raises(ValueError, match="prompts in common .*got 3 and 1 others"):
        differences(scores, {"elsewhere": {"object_right": 1.0}})


def test_the_base_s_figures_are_of_the_prompts_that_are_compared(table, capsys):
    base = table("base", rows(cross_psnr=[10.0, 10.0, 30.0, 30.0]))
    other = table("other", rows(cross_psnr=[11.0, 12.0]))
    evaluate.main(["differences", str(base), str(other)])
    assert "| 2 | 10.0 | +1.5 ± 0.5 |" in capsys.readouterr().out


def test_tables_of_several_judges_are_not_compared(two, capsys):
    for folder, judge in zip(two, ("abc", "def")):
        whole = json.loads((folder / "table.json").read_text())
        (folder / "table.json").write_text(json.dumps(whole | {"judge": judge}))
    with pytest.raises(SystemExit, match="tables must be of one judge to be compared, got abc and def"):
        evaluate.main(["differences", *map(str, two)])


def test_the_command_prints_a_column_a_table(two, table, capsys):
    third = table("v1.5", rows(janus=[0.0, 1.0, 0.0, 0.0]))
    options = evaluate.parser().parse_args(["differences", *map(str, (*two, third))])
    options.run(options)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "| mean over the prompts | prompts | base | other | v1.5 |"
    assert "| odd/even cross-render PSNR, dB | 3 | 25.0 | +1.0 ± 1.2 |  |" in lines
    assert "| object right, first guess of the judge | 4 | 50.0% | +25.0% ± 25.0% |  |" in lines
    assert "| Janus rings | 4 | 0.0% |  | +25.0% ± 25.0% |" in lines
    assert len(lines) == 5, "figures that no table has are left out"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rings": {}}', '{"rings": {"generated": [{"id": "x"}]}}'])
def test_what_is_no_table_is_named(tmp_path, text):
    if text:
        (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match="must be a table of quality with a column 'generated', got"):
        load_scores(tmp_path)


def test_a_column_that_a_table_lacks_is_named(two):
    with pytest.raises(ValueError, match="column 'true renders'"):
        load_scores(two[0], "true renders")
