"""Comparisons of trainings: what a run is told, what is written of it, and what its figures mean."""

import json

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny import lighten

from coser.compare import LEVELS, Variant, estimate_figures, load_variants, main, table
from coser.evaluate_prompts import LABEL_HEIGHT, SHEET_TILE
from coser.flow import level_weights, noise_levels


@pytest.fixture(scope="module", autouse=True)
def little_beside_the_training():
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch)
        yield


@pytest.fixture(scope="module")
def compared(renders, pipeline_folder, tmp_path_factory):
    """Two variants with two seeds, a step or a few each: folder, and the command line that made it."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "variants.json").write_text(json.dumps(
        {"about": "a test", "variants": {"plain": "", "no pooled text": "--model '{\"pooled_dim\": 0}'"}}))
    line = [str(folder / "variants.json"), "--out", str(folder / "out"), "--minutes", "0.01", "--seeds", "0", "1",
            "--arguments", f"--preset tiny --renders {renders[0]} --held-out {renders[1]} --device cpu --dtype float32 "
            f"--autoencoder {pipeline_folder / 'vae'} --no-samples --log-every 1"]
    main(line)
    return folder / "out", line


def test_every_variant_is_trained_with_every_seed(compared):
    rows = json.loads((compared[0] / "table.json").read_text())
    assert [(r["variant"], r["seed"]) for r in rows] == [("plain", 0), ("no pooled text", 0), ("plain", 1),
                                                         ("no pooled text", 1)]
    assert all(r["steps"] >= 1 and r["views_per_second"] > 0 for r in rows)
    assert rows[0]["parameters"] > rows[1]["parameters"], "a model without pooled text has fewer weights"
    assert rows[0]["loss"] != rows[2]["loss"], "seeds differ"
    for row in rows:
        assert 0 <= row[f"iou_{LEVELS[0]}"] <= 1 and row[f"psnr_{LEVELS[0]}"] > 0


def test_a_finished_run_is_not_repeated(compared):
    def files():
        return {p: p.stat().st_mtime_ns for p in compared[0].rglob("*") if p.is_file() and p.parent != compared[0]}

    before, tables = files(), {p: p.read_text() for p in compared[0].glob("table.*")}
    for path in tables:
        path.unlink()
    main(compared[1])
    assert files() == before and {p: p.read_text() for p in compared[0].glob("table.*")} == tables
    longer = [*compared[1]]
    longer[longer.index("--minutes") + 1] = "0.02"
    with pytest.raises(ValueError, match="a folder of its own for each budget.*plain was trained by .*--minutes 0.01"):
        main(longer)
    assert files() == before


def test_runs_of_a_given_length_and_inflated_ones(compared, renders, pipeline_folder, tmp_path):
    """Single views first; then the same weights with modules that are silent at first, so that nothing has changed."""
    arguments = (f"--preset tiny --renders {renders[0]} --held-out {renders[0]} --device cpu --dtype float32 "
                 f"--autoencoder {pipeline_folder / 'vae'} --no-samples --log-every 1 --warmup 1 --lr 1e-9")
    rows, losses = [], []
    for name, mixers in {"single": [], "inflated": ["trajectory", "glance", "rectification"]}.items():
        line = f"--model '{json.dumps({'mixers': mixers})}'"
        (tmp_path / f"{name}.json").write_text(json.dumps({"about": "a test", "variants": {"plain": line}}))
        main([str(tmp_path / f"{name}.json"), "--out", str(tmp_path / name), "--steps", "2", "--arguments", arguments])
        rows += json.loads((tmp_path / name / "table.json").read_text())
        log = (tmp_path / name / "plain-0" / "log.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, log) if not row.get("held_out")])
        arguments += f" --start {tmp_path / 'single' / 'plain-0' / 'checkpoint-2'}"
    assert [row["steps"] for row in rows] == [2, 2] and rows[1]["parameters"] > rows[0]["parameters"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3), "more modules, yet the same samples and noise"
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-3)


def test_the_sheet_shows_the_truth_and_every_finished_variant(compared):
    out, line = compared
    main([*line, "--sheet", str(out / "sheet.png")])
    with Image.open(out / "sheet.png") as picture:
        tiles = np.asarray(picture)
    row = SHEET_TILE + LABEL_HEIGHT
    assert tiles.shape[0] == 2 * row  # truth and one variant beside it, the other below
    assert (tiles[row + LABEL_HEIGHT:, :SHEET_TILE] != tiles[LABEL_HEIGHT:row, :SHEET_TILE]).any()


def test_a_run_that_another_process_trains_is_left_to_it(compared):
    out, line = compared
    row, kept = out / "plain-0" / "row.json", (out / "plain-0" / "row.json").read_text()
    row.unlink()
    with FileLock(out / "plain-0.lock"):
        main(line)
        assert not row.exists() and (out / "plain-0").is_dir()
    row.write_text(kept)


def test_the_table_has_means_and_half_the_range_between_seeds():
    rows = [{"variant": "a", "seed": s, "steps": 10 + s, "seconds": 60 + 60 * s, "mebibytes": 7.4,
             "parameters": 2_000_000, "loss": v, "psnr_0.85": 20.0} for s, v in ((0, 0.5), (1, 0.6))]
    lines = table(rows, [Variant("a", ()), Variant("b", ())]).splitlines()
    assert lines[0].strip("| ").split(" | ") == ["variant", "seeds", "M parameters", "steps", "minutes",
                                                 "MiB kept a ring", "against plain", "loss", "PSNR at 0.85"]
    assert lines[2:] == ["| a | 2 | 2.0 | 10 | 1.5 | 7 | +0.0000 ± 0.0000 | 0.5500 ± 0.0500 | 20.00 ± 0.00 |"]


def test_differences_are_between_equal_seeds():
    rows = [{"variant": v, "seed": s, "steps": 1, "seconds": 60, "mebibytes": 1, "parameters": 1e6, "loss": loss}
            for v, s, loss in (("a", 0, 0.5), ("b", 0, 0.48), ("a", 1, 0.6), ("b", 1, 0.57))]
    assert table(rows, [Variant("a", ()), Variant("b", ())]).splitlines()[3] == \
        "| b | 2 | 1.0 | 1 | 1.0 | 1 | -0.0250 ± 0.0050 | 0.5250 ± 0.0450 |"


def test_estimates_of_a_denoiser_that_knows_the_views_are_what_the_autoencoder_gives(renders, pipeline, monkeypatch):
    cleans = []
    encode = type(pipeline.vae).views_to_latents

    def remembered(vae, views):
        cleans.append(encode(vae, views))
        return cleans[-1]

    def oracle(noisy, timesteps, *_, **__):
        sigma = timesteps[:, None, None, None, None] / 1000
        return (noisy - cleans[-1]) / sigma

    guessed = estimate_figures(pipeline, renders[0])
    monkeypatch.setattr(type(pipeline.vae), "views_to_latents", remembered)
    monkeypatch.setattr(pipeline.unet, "forward", oracle)
    known = estimate_figures(pipeline, renders[0])
    assert known[f"psnr_{LEVELS[0]}"] == pytest.approx(known[f"psnr_{LEVELS[-1]}"], abs=0.01)
    assert known["psnr_0.97"] != pytest.approx(guessed["psnr_0.97"], abs=0.01)


def test_the_files_of_comparisons_are_command_lines_that_the_training_takes():
    from pathlib import Path

    import coser
    from coser import train, train_denoiser
    from coser.models.unet import MultiviewUNet
    files = sorted((Path(coser.__file__).parent / "data" / "comparisons").glob("*.json"))
    assert files
    for file in files:
        variants = load_variants(file)
        assert variants[0].name.startswith("plain") and not variants[0].arguments
        for variant in variants:
            options, _ = train.parse(["denoiser", "--renders", "r", "--held-out", "h", "--run", "n", "--autoencoder",
                                      "a", "--steps", "1", *variant.arguments])
            preset = train_denoiser.PRESETS["tiny"]["model"]
            MultiviewUNet(**preset | options.model | {"unet": preset["unet"]})


# -- what variants change ----------------------------------------------------------------------------------------------

def test_logit_normal_levels_leave_out_the_ends():
    drawn = {kind: noise_levels(20_000, torch.Generator().manual_seed(0), 3.0, kind)
             for kind in ("uniform", "logit-normal")}
    assert float(drawn["uniform"].median()) == pytest.approx(float(drawn["logit-normal"].median()), abs=0.02)
    beyond = {kind: float((levels > 0.97).float().mean()) for kind, levels in drawn.items()}
    assert beyond["logit-normal"] < 0.02 < 0.05 < beyond["uniform"]


def test_weights_of_noise_levels():
    levels = torch.tensor([0.0, 0.1, 0.5, 1.0])
    assert level_weights(levels, "flow").tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(level_weights(levels, "clean"), levels.square())
    # SNR 81, cut to 5, and 1 and 0
    torch.testing.assert_close(level_weights(levels, "min-snr")[1:], torch.tensor([0.05, 0.25, 0.0]))
