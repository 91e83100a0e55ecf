"""Truths about symmetries: what they do to rings of views, who has which, and that drawing with them keeps them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from solids import cube, sphere
from tiny import tiny_pipeline

from coser.cameras import Cameras
from coser.data.dataset import list_rings
from coser.data.render import save_ring
from coser.learn_symmetry import fit_mirror, learn_symmetries, main, symmetries_of_ring
from coser.pipeline import SYMMETRIC_UNTIL, CoSERPipeline
from coser.rasterizer import render
from coser.studio import SMALL
from coser.symmetry import SYMMETRIES, Symmetries, load_symmetries, ring_symmetries
from coser.views import ViewSet
from coser.vocabulary import load_vocabulary, sentence_embedder, usual_symmetries

RED, BLUE, GREY = (torch.tensor(c) for c in ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9), (0.5, 0.5, 0.5)))
# the colours of a cube's sides: +x, -x, +y, -y, +z, -z
SIDES = {"mirror": (GREY, GREY, GREY, GREY, RED, BLUE), "back": (RED, BLUE, GREY, GREY, GREY, GREY)}


def box_ring(sides, num_views: int = 8) -> ViewSet:
    """Unlit views of a cube whose sides have these colours."""
    vertices, faces, _ = cube(0.5)
    colors = torch.stack([color for color in sides for _ in range(2)])[:, None].expand(-1, 3, 3)
    return render(vertices, faces, colors, Cameras.orbit(num_views), 64, shade=False)


def image(views: ViewSet, order: list[int], flipped: bool) -> ViewSet:
    return (views.mirrored() if flipped else views)[order]


def difference(a: ViewSet, b: ViewSet) -> float:
    return float((a.views - b.views).abs().mean())


@pytest.mark.parametrize("name, other", [("mirror", "back"), ("back", "mirror")])
def test_a_symmetric_object_s_ring_is_its_own_image(name, other):
    views = box_ring(SIDES[name])
    assert difference(views, image(views, *ring_symmetries((name,), 8)[1])) < 1e-3
    assert difference(views, image(views, *ring_symmetries((other,), 8)[1])) > 0.02


def test_a_quarter_turn_moves_the_ring_by_a_quarter():
    views = box_ring((RED, RED, GREY, GREY, RED, RED), 12)
    turns = ring_symmetries(("quarter",), 12)
    assert [order[0] for order, _ in turns] == [0, 3, 6, 9]
    assert max(difference(views, image(views, *turn)) for turn in turns) < 1e-3


@pytest.mark.parametrize("names, num_views, size", [
    ((), 12, 1), (("mirror",), 12, 2), (("mirror",), 7, 2), (("mirror", "back"), 12, 4), (("quarter",), 12, 4),
    (("mirror", "quarter"), 12, 8), (("mirror", "back", "quarter", "round"), 12, 24), (("round",), 5, 5),
    (("back",), 5, 1), (("quarter",), 6, 1)])
def test_symmetries_make_a_group(names, num_views, size):
    group = ring_symmetries(names, num_views)
    assert group[0] == (list(range(num_views)), False) and len(group) == size
    assert all(sorted(order) == list(range(num_views)) for order, _ in group)
    for first, a in group:  # one after the other is another of them
        for second, b in group:
            assert ([first[i] for i in second], a != b) in group


@pytest.mark.parametrize("sides, found", [
    (SIDES["mirror"], ("mirror",)), (SIDES["back"], ("back",)), ((RED, BLUE, GREY, GREY, GREY, RED), ()),
    ((RED, RED, GREY, GREY, BLUE, BLUE), ("mirror", "back")),
    ((RED, RED, BLUE, GREY, RED, RED), ("mirror", "back", "quarter"))])
def test_symmetries_are_seen_in_the_views(sides, found):
    assert symmetries_of_ring(box_ring(sides)) == found


def test_what_is_round_is_alike_from_everywhere_and_light_from_one_side_does_not_matter():
    vertices, faces, colors = sphere(0.7, rows=12)
    views = render(vertices, faces, GREY.expand_as(colors), Cameras.orbit(8), 64)
    assert symmetries_of_ring(views) == SYMMETRIES


@pytest.fixture(scope="module")
def rings(tmp_path_factory):
    """Three chests with a front, three shields with two alike sides, two of a kind that is too rare."""
    folder = tmp_path_factory.mktemp("rings")
    rows = []
    for kind, name, count in (("chest", "mirror", 3), ("shield", "back", 3), ("hat", "mirror", 2)):
        for i in range(count):
            save_ring(folder / f"{kind}{i}-0.safetensors", box_ring(SIDES[name]), Cameras.orbit(8))
            rows.append({"id": f"{kind}{i}", "object": f"old {kind}", "captions": [f"a {kind}"], "colors": []})
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_kinds_have_what_most_of_their_assets_have(rings):
    learnt = learn_symmetries(list_rings(rings))
    assert learnt.of_kind == {"": ("mirror", "back"), "chest": ("mirror",), "shield": ("back",)}  # half is enough
    assert learn_symmetries(list_rings(rings)[:2]).of_kind == {}


KNOWN = Symmetries({"": ("mirror",), "barrel": ("mirror", "round"), "pistol": ("back",), "fish": (),
                    "chest": ("mirror",)}, None, {"revolver": "pistol"}.get)


@pytest.mark.parametrize("prompt, found", [
    ("a red barrel", ("mirror", "round")), ("A RED BARREL!", ("mirror", "round")), ("a red and white fish", ()),
    ("a barrel with two iron bands", ("mirror", "round")), ("a barrel of gunpowder", ("mirror", "round")),
    ("an old revolver", ("back",)), ("a dragon", ("mirror",)), ("a chest on a barrel", ()), ("two barrels", ()),
    ("a chest and a barrel", ()), ("a black and gold chest", ("mirror",)), ("a pistol wearing a chest", ("back",)),
    ("a pistol, silver", ("back",)), ("a pistol beside a chest", ()), ("!?", ())])
def test_prompts_ask_for_what_their_kind_has_and_several_objects_for_nothing(prompt, found):
    assert KNOWN.of_prompt(prompt) == found


def test_without_a_table_nothing_is_symmetric(tmp_path):
    assert load_symmetries(tmp_path).of_prompt("a red barrel") == ()
    KNOWN.save(tmp_path)
    assert load_symmetries(tmp_path).of_kind == KNOWN.of_kind


def test_the_shipped_checkpoint_knows_its_kinds(pipeline):
    vocabulary = load_vocabulary(SMALL, sentence_embedder(pipeline))
    shipped = load_symmetries(SMALL, vocabulary.nearest_kind)
    assert set().union(*shipped.of_kind.values()) == set(SYMMETRIES)
    for prompt, found in (("a wooden chair", {"mirror"}), ("a brown barrel", set(SYMMETRIES)), ("a pistol", {"back"}),
                          ("a handgun", {"back"}), ("a grey rock", set()), ("a yellow taxi", {"mirror"})):
        assert set(shipped.of_prompt(prompt)) == found, prompt


@torch.no_grad()
def test_the_shipped_map_gives_the_latents_of_the_mirror_image():
    pipeline = CoSERPipeline.from_pretrained(SMALL)
    usual_symmetries(SMALL, pipeline, None)
    vae, views = pipeline.vae, render(*cube(0.5), Cameras.orbit(4, 10.0), 256)
    latents, wanted = vae.views_to_latents(views), vae.views_to_latents(views.mirrored())
    mapped, flipped = ((found - wanted).square().mean() / wanted.var()
                       for found in (vae.mirror_latents(latents), latents.flip(-1)))
    assert mapped < 0.05 and mapped < 0.2 * flipped


def test_the_map_is_found_where_there_is_an_exact_one():
    def mean_and_slope(views):
        left, right = (F.avg_pool2d(views.masks, (8, 4))[..., side::2] for side in (0, 1))
        return torch.cat([left + right, left - right], 1)

    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=2), views_to_latents=mean_and_slope)
    round_thing = render(*sphere(0.7, rows=8), Cameras.orbit(4), 64)
    weight, bias = fit_mirror(vae, [box_ring(SIDES["mirror"]), round_thing])
    expected = torch.zeros(2, 2, 3, 3)
    expected[0, 0, 1, 1], expected[1, 1, 1, 1] = 1, -1  # means stay, slopes turn round
    torch.testing.assert_close(weight, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(bias, torch.zeros(2), rtol=0, atol=0.02)


@torch.no_grad()
def test_without_a_map_mirroring_goes_by_way_of_the_views(pipeline):
    vae = pipeline.vae
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.views_to_latents(vae.latents_to_views(latents).mirrored())
    torch.testing.assert_close(vae.mirror_latents(latents), expected)


def test_the_command_adds_the_table_and_the_map_and_changes_nothing_else(rings, pipeline_folder, tmp_path):
    checkpoint = shutil.copytree(pipeline_folder, tmp_path / "checkpoint")
    main([str(rings), str(checkpoint)])
    before, after = ({path.name for path in folder.iterdir()} for folder in (pipeline_folder, checkpoint))
    assert after - before == {"symmetries.json", "symmetries.safetensors"}
    assert all((checkpoint / path.relative_to(pipeline_folder)).read_bytes() == path.read_bytes()
               for path in pipeline_folder.rglob("*") if path.is_file())
    pipeline = CoSERPipeline.from_pretrained(checkpoint)
    assert usual_symmetries(checkpoint, pipeline, None).of_kind["shield"] == ("back",)
    views = box_ring(SIDES["mirror"])
    with torch.no_grad():
        latents, wanted = (pipeline.vae.views_to_latents(v) for v in (views, views.mirrored()))
        assert (pipeline.vae.mirror_latents(latents) - wanted).norm() < (latents.flip(-1) - wanted).norm()
    pipeline.vae.save_pretrained(tmp_path / "vae")  # the map is no part of the weights
    assert set(load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")) == set(
        load_file(pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors"))


def test_a_folder_without_rings_ends_in_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(SMALL)])
    assert capsys.readouterr().err.startswith("coser: ")


@torch.no_grad()
@pytest.mark.parametrize("names", [("mirror",), ("mirror", "back"), ("round",)])
def test_estimates_are_symmetric_while_shapes_are_decided(names, monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(pipeline.vae, "mirror_latents", lambda latents: latents.flip(-1))
    group = ring_symmetries(names, 4)

    def asymmetry(latents):
        return max(float(((latents.flip(-1) if flipped else latents)[order] - latents).abs().max())
                   for order, flipped in group)

    asked = dict(num_views=4, num_inference_steps=5)
    plain, drawn = (list(pipeline.stream("a box", generator=torch.Generator().manual_seed(0), symmetry=symmetry,
                                         **asked)) for symmetry in ((), names))
    until = round(SYMMETRIC_UNTIL * 5)
    assert [asymmetry(step.denoised) < 1e-4 for step in drawn] == [step.index <= until for step in drawn]
    assert min(asymmetry(step.denoised) for step in plain) > 0.1
    # the scheduler goes on from the symmetric estimate
    assert not torch.equal(drawn[0].latents, plain[0].latents)


def test_wrong_symmetries_are_named(pipeline):
    for wrong in (("sideways",), "mirror", None):
        with pytest.raises(ValueError, match="symmetry must be some of mirror, back, quarter, round, got"):
            pipeline("a box", symmetry=wrong)
