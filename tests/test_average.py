"""Averages of trainings' weights: what the mean is, what stays the first one's, what is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from coser.average import UNET, VAE, average_unets, main
from coser.flow import small_scheduler
from coser.pipeline import CoSERPipeline
from coser.shards import TRAINING_STATE


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Three pipelines that differ in their UNets alone, in half precision; the first two have training states."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = tiny_pipeline()
    for name in "abc":
        for seed, weight in enumerate(pipeline.unet.parameters(), ord(name)):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(seed))
        half = CoSERPipeline(vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
                             unet=pipeline.unet.half(), scheduler=small_scheduler())
        half.save_pretrained(folder / name)
        pipeline.unet.float()
    for folder_with_state in "ab":
        for file in TRAINING_STATE:
            (folder / folder_with_state / file).write_text("{}")
    (folder / "a" / "README.md").write_text("the first one's card")
    return folder


def changed(folder, to, of, change):
    """A copy of a pipeline folder `of` below `folder` with one file of weights changed."""
    shutil.copytree(folder / "a", to)
    weights = load_file(to / of)
    change(weights)
    save_file(weights, to / of, {"format": "pt"})
    return to


def test_weights_are_the_weighted_mean_in_the_first_one_s_dtype(pipelines, tmp_path):
    main([str(tmp_path / "out"), str(pipelines / "a"), f"{pipelines / 'b'}=2", f"{pipelines / 'c'}=0.5"])
    found = load_file(tmp_path / "out" / UNET)
    a, b, c = (load_file(pipelines / name / UNET) for name in "abc")
    assert found.keys() == a.keys() and len(found) > 100
    for name, weight in found.items():
        mean = (a[name].double() + 2 * b[name].double() + 0.5 * c[name].double()) / 3.5
        assert weight.dtype == a[name].dtype == torch.float16
        torch.testing.assert_close(weight.double(), mean, rtol=1e-3, atol=1e-5)


def test_the_mean_of_a_model_with_itself_is_the_model(pipelines, tmp_path):
    same = changed(pipelines, tmp_path / "same", UNET, lambda weights: None)
    average_unets(tmp_path / "out", {pipelines / "a": 1.0, same: 3.0})
    found, first = load_file(tmp_path / "out" / UNET), load_file(pipelines / "a" / UNET)
    assert all(torch.equal(found[name], first[name]) for name in first)


def test_all_but_the_unet_is_the_first_one_s_and_the_pipeline_draws(pipelines, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder will do
    main([str(tmp_path / "out"), str(pipelines / "a"), str(pipelines / "b")])
    files = {p.relative_to(pipelines / "a") for p in (pipelines / "a").rglob("*") if p.is_file()}
    there = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert there == {f for f in files if f.name not in TRAINING_STATE}
    assert all((tmp_path / "out" / f).read_bytes() == (pipelines / "a" / f).read_bytes() for f in there - {UNET})
    with safe_open(tmp_path / "out" / UNET, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    pipeline = CoSERPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    result = pipeline("a cube", num_views=4, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    views = result.views.views
    assert len(views) == 4 and views.isfinite().all()


def test_folder_names_may_have_an_equals_sign(pipelines, tmp_path):
    odd = changed(pipelines, tmp_path / "lr=high", UNET, lambda weights: None)
    main([str(tmp_path / "out"), str(odd), f"{pipelines / 'b'}"])
    assert (tmp_path / "out" / UNET).is_file()


def no_pipeline(pipelines, tmp_path):
    return [str(pipelines / "a"), str(tmp_path)]


def no_autoencoder(pipelines, tmp_path):
    shutil.copytree(pipelines / "a" / "unet", tmp_path / "bare" / "unet")
    return [str(pipelines / "a"), str(tmp_path / "bare")]


def one_folder(pipelines, tmp_path):
    return [str(pipelines / "a")]


def twice(pipelines, tmp_path):
    return [str(pipelines / "a"), str(pipelines / "a")]


def negative(pipelines, tmp_path):
    return [str(pipelines / "a"), f"{pipelines / 'b'}=-1"]


def not_a_number(pipelines, tmp_path):
    return [str(pipelines / "a"), f"{pipelines / 'b'}=nan"]


def another_shape(pipelines, tmp_path):
    def widen(weights):
        weights["unet2d.conv_in.bias"] = torch.zeros(99)
    return [str(pipelines / "a"), str(changed(pipelines, tmp_path / "wide", UNET, widen))]


def fewer_weights(pipelines, tmp_path):
    few = changed(pipelines, tmp_path / "few", UNET, lambda weights: weights.pop("unet2d.conv_in.bias"))
    return [str(pipelines / "a"), str(few)]


def another_scan(pipelines, tmp_path):
    shutil.copytree(pipelines / "a", tmp_path / "raster")
    file = tmp_path / "raster" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scan_order": "raster"}))
    return [str(pipelines / "a"), str(tmp_path / "raster")]


def other_latents(pipelines, tmp_path):
    def nudge(weights):
        name = next(n for n in weights if n.startswith("encoder."))
        weights[name] = weights[name] + 1
    return [str(pipelines / "a"), str(changed(pipelines, tmp_path / "other", VAE, nudge))]


@pytest.mark.parametrize("case, named", [
    (no_pipeline, r"every folder must be a pipeline's, with unet/.* in it, got"),
    (no_autoencoder, r"every folder must be a pipeline's, with vae/.* in it, got .*bare"),
    (one_folder, r"two pipeline folders or more, got 1"), (twice, r"a folder may be given once"),
    (negative, r"weight must be more than 0, got -1 for"), (not_a_number, r"weight must be more than 0, got nan for"),
    (another_shape, r"unet2d.conv_in.bias is \[\d+\] there, got \[99\]"),
    (another_scan, r"raster must have .*'s scan_order, spiral, got raster"),
    (fewer_weights, r"unet2d.conv_in.bias is .* got none"),
    (other_latents, r"must have .*'s latents, but its autoencoder's encoder is another"),
])
def test_refusals_say_why_and_write_nothing(pipelines, tmp_path, capsys, case, named):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), *case(pipelines, tmp_path)])
    assert stopped.value.code == 2 and re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.writing").exists()


def test_a_folder_that_holds_something_is_not_written_over(pipelines, tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps("kept"))
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(pipelines / "a"), str(pipelines / "b")])
    assert "out must be new or empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]
