"""The judge of views: its questions, its rule for rings with two fronts, and its training."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from solids import cube, table

from coser import train_judge
from coser.cameras import Cameras
from coser.data.assets import in_color, with_article
from coser.data.dataset import Ring, list_rings
from coser.judge import (Judgement, ViewJudge, azimuth_to_sector, color_histogram, is_janus, load_judge,
                         nearest_distances, ring_embedding, views_to_pictures)
from coser.judge_figures import (JudgedRing, SmallRing, fit_janus_rule, fronted_kinds, is_front_told, janus_figures,
                                 judge_rings, small_rings)
from coser.judges import Judges
from coser.models.efficientnet_lite import EfficientNetLite
from coser.rasterizer import render
from coser.train import main
from coser.train_judge import (NOTHING, PRESETS, JudgeBatches, alter, classification_loss, is_kept_aside, matching_loss,
                               resample, resampling, text_forms)
from coser.train_loop import checkpoints
from tests.tiny import Killed, kill_at_step

KINDS, COLORS = ("ball", "cube", "tree"), ("blue", "red")
AZIMUTHS = torch.arange(12) * 30.0


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return ViewJudge(KINDS, COLORS, **PRESETS["tiny"]["model"]).eval()


@pytest.fixture(scope="module")
def painted_cube():
    """A ring of 8 views of a cube with sides of different colours."""
    return render(*cube(0.5), Cameras.orbit(8), 128)


def a_ring(asset_id="a", noun="oak tree", colors=("green",)):
    return Ring(Path(f"{asset_id}-0.safetensors"), asset_id, noun, (f"a {noun}",), colors)


# -- the model ---------------------------------------------------------------------------------------------------------

def test_what_is_said_of_a_view_does_not_depend_on_the_others(judge, painted_cube):
    together = judge.judge(painted_cube)
    for i in (0, 5):
        alone = judge.judge(painted_cube[i])
        for field in dataclasses.fields(Judgement):
            torch.testing.assert_close(getattr(alone, field.name)[0], getattr(together, field.name)[i],
                                       atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.embeddings.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(judge.front_likeness(painted_cube), together.sectors.softmax(1)[:, 0])
    torch.testing.assert_close(judge.embed(painted_cube), together.embeddings)


def test_a_mirror_image_is_the_same_thing_from_the_mirrored_sector(judge, painted_cube):
    pictures = views_to_pictures(painted_cube)
    seen, mirrored = judge.judge_pictures(pictures), judge.judge_pictures(pictures.flip(-1))
    torch.testing.assert_close(mirrored.embeddings, seen.embeddings, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mirrored.sectors, seen.sectors[:, [0, 7, 6, 5, 4, 3, 2, 1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.sectors.exp().sum(1), torch.ones(8))


def test_views_of_twice_the_size_are_the_same_pictures(painted_cube):
    twice = dataclasses.replace(painted_cube, **{name: getattr(painted_cube, name).repeat_interleave(2, 2)
                                                 .repeat_interleave(2, 3) for name in ("views", "masks", "depths")})
    torch.testing.assert_close(views_to_pictures(twice), views_to_pictures(painted_cube))
    with pytest.raises(ValueError, match="at least 128 pixels"):
        views_to_pictures(render(*cube(0.5), Cameras.orbit(1), 64))


@pytest.fixture
def knowing():
    """A judge whose embeddings of sentences are known: "ball", "cube", "tree" and "blue", "red" lie along axes."""
    known = ViewJudge(KINDS, COLORS, channels=(16, 16, 16), blocks=(0, 0, 0), embedding_dim=5, text_dim=5)
    with torch.no_grad():
        known.text_projection.weight.copy_(torch.eye(5))
        known.text_projection.bias.zero_()
        known.kind_states.copy_(torch.eye(5)[:3])
        known.color_states.copy_(torch.eye(5)[3:])
    return known


def test_a_verdict_ranks_the_words_that_were_asked_for(knowing, painted_cube, monkeypatch):
    #                           ball cube tree blue red; what counts is the mean: ball .1, cube .45, tree .5
    views = torch.tensor([[0.2, 0.9, 0.4, 0.1, 0.3], [0.0, 0.0, 0.6, 0.5, 0.2]])
    monkeypatch.setattr(knowing, "embed", lambda _: views)
    verdict = knowing.object_and_color(painted_cube, "old Tree", "red")
    assert (verdict.object_rank, verdict.color_rank) == (1, 2)
    assert verdict.top_objects == ("tree", "cube", "ball") and verdict.top_colors == ("blue", "red")
    verdict = knowing.object_and_color(painted_cube, "ball")
    assert (verdict.object_rank, verdict.color_rank) == (3, None)
    told = [knowing.object_and_color(painted_cube, kind).object_log_likelihood for kind in ("ball", "cube", "tree")]
    assert torch.tensor(told).exp().sum() == pytest.approx(1, abs=1e-5)  # of all kinds, one it is
    length = views.mean(0).norm()  # cosines of the mean's direction, times the scale
    assert told[2] - told[0] == pytest.approx(float(knowing.scale.detach() * 0.4 / length), rel=1e-4)
    with pytest.raises(ValueError, match="'heart'"):
        knowing.object_and_color(painted_cube, "heart", "red")
    with pytest.raises(ValueError, match="blue, red, got 'mauve'"):
        knowing.object_and_color(painted_cube, "cube", "mauve")


@torch.no_grad()
def test_words_are_named_as_their_sentences_are(judge):
    judge.read_words()
    embeddings = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    kinds = judge.scale * embeddings @ judge.embed_text(["a ball", "a cube", "a tree"]).T
    colors = judge.scale * embeddings @ judge.embed_text(["a blue object", "a red object"]).T
    torch.testing.assert_close(judge.name_kinds(embeddings), kinds, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(judge.name_colors(embeddings), colors, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_sentences_that_mean_the_same_lie_nearer_than_others(judge):
    lamp, again, truck = judge.embed_text(["a red lamp", "a lamp that is red", "a green truck"])
    assert float(lamp @ again) > float(lamp @ truck) and float(lamp.norm()) == pytest.approx(1, abs=1e-5)


def test_colours_are_counted_in_what_is_covered_alone():
    pictures = torch.zeros(3, 4, 128, 128)
    pictures[:2, 0, :32], pictures[:2, 3, :32] = 1.0, 1.0  # red above
    pictures[0, 2, 64:96], pictures[0, 3, 64:96] = 0.8, 0.8  # as much blue, not quite opaque
    shares = color_histogram(pictures).square()
    red, blue = 5 * 36, 5
    torch.testing.assert_close(shares[0, [red, blue]], torch.tensor([1.0, 0.8]) / 1.8, atol=1e-4, rtol=0)
    torch.testing.assert_close(shares[1, red], torch.tensor(1.0), atol=1e-4, rtol=0)
    assert not shares[2].any()  # nothing shows nothing
    dull = torch.cat([torch.full((1, 3, 8, 8), 0.3), torch.ones(1, 1, 8, 8)], 1)  # between two levels of each channel
    assert float(color_histogram(dull).square().sum()) == pytest.approx(1, abs=1e-5)
    assert int((color_histogram(dull) > 0).sum()) == 8


def test_a_judge_with_a_backbone_learns_beside_it_alone(painted_cube):
    torch.manual_seed(0)
    seeing = ViewJudge(KINDS, COLORS, embedding_dim=16, backbone="tf_efficientnet_lite0")
    learning = {name for name, p in seeing.named_parameters() if p.requires_grad}
    assert learning and not any(name.startswith("trunk.") for name in learning)
    pictures = views_to_pictures(painted_cube)
    together, alone = seeing(pictures), seeing(pictures[:1])
    torch.testing.assert_close(together.embeddings[:1], alone.embeddings, atol=1e-4, rtol=1e-4)
    (together.embeddings[:, 0].sum() + together.sectors[:, 0].sum()).backward()
    assert float(seeing.to_embedding.weight.grad.abs().max()) > 0 and seeing.trunk.conv_stem.weight.grad is None
    red, blue = pictures.clone(), pictures.flip(1).roll(-1, 1)
    with torch.no_grad():  # colours reach it past the backbone
        seeing.to_embedding.weight[:, :1280] = 0
        assert not torch.allclose(seeing(red).embeddings, seeing(blue).embeddings, atol=1e-3)


@torch.no_grad()
def test_several_judges_say_the_mean_of_what_each_says(painted_cube):
    torch.manual_seed(2)
    first, second = (ViewJudge(kinds, COLORS, **PRESETS["tiny"]["model"]).eval()
                     for kinds in (KINDS, ("tree", "stone", "ball")))
    for judge in (first, second):
        judge.read_words()
    both = Judges([first, second])
    assert tuple(both.config.kinds) == ("ball", "tree") and tuple(both.config.colors) == COLORS
    said = both.judge(painted_cube)
    apart = [judge.judge(painted_cube) for judge in (first, second)]
    torch.testing.assert_close(said.embeddings.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(said.sectors, apart[0].sectors)
    columns = ([0, 2], [2, 0])  # of ball and tree
    expected = [judge.name_kinds(part.embeddings).log_softmax(1)[:, rows]
                for judge, part, rows in zip((first, second), apart, columns)]
    torch.testing.assert_close(both.name_kinds(said.embeddings), sum(expected) / 2, atol=1e-4, rtol=1e-4)
    fits = [part.embeddings @ judge.embed_text(["a red cube"])[0] for judge, part in zip((first, second), apart)]
    torch.testing.assert_close(said.embeddings @ both.embed_text(["a red cube"])[0], sum(fits) / 2)
    verdict = both.object_and_color(painted_cube, "ball", "red")
    assert verdict.object_rank in (1, 2) and verdict.color_rank in (1, 2)
    with pytest.raises(ValueError, match="'cube'"):  # the second has never heard of cubes
        both.object_and_color(painted_cube, "cube")
    with pytest.raises(ValueError, match="got none"):
        Judges([])


# -- sides and fronts --------------------------------------------------------------------------------------------------

def test_sectors_lie_around_their_directions_and_wrap():
    azimuths = torch.tensor([0.0, 22.0, 23.0, 90.0, 180.0, 315.0, 338.0, 360.0, -45.0])
    assert azimuth_to_sector(azimuths).tolist() == [0, 0, 1, 2, 4, 7, 0, 0, 7]


def test_a_mirrored_view_of_a_symmetric_thing_is_the_view_from_the_mirrored_sector():
    seen = render(*table(), Cameras.look_at_origin([60.0, -60.0], 20.0), 128).masks
    torch.testing.assert_close(seen[0].flip(-1), seen[1], atol=0.05, rtol=0)
    assert int(azimuth_to_sector(torch.tensor(-60.0))) == -int(azimuth_to_sector(torch.tensor(60.0))) % 8


def fronts(*peaks: tuple[float, float]) -> torch.Tensor:
    likeness = torch.full((12,), 0.02)
    for azimuth, value in peaks:
        likeness[int(azimuth / 30)] = value
    return likeness


@pytest.mark.parametrize("peaks, expected", [
    ([(0, .9)], False), ([(90, .9)], False),  # one front, the second turned
    ([(0, .9), (30, .8), (330, .8)], False), ([(0, .9), (60, .9)], False),  # one front, broad
    ([(0, .9), (90, .85)], True), ([(0, .9), (180, .9)], True), ([(60, .8), (210, .9)], True),
    ([(0, .9), (180, .5)], False), ([(0, .3), (180, .3)], False)])  # less sure than the ratio, than the floor
def test_a_janus_has_two_sure_fronts_far_apart(peaks, expected):
    assert is_janus(fronts(*peaks), AZIMUTHS, floor=0.4, ratio=0.7) is expected
    turned = fronts(*peaks).roll(5)
    assert is_janus(turned, AZIMUTHS, floor=0.4, ratio=0.7) is expected


def test_a_janus_needs_an_azimuth_for_each_view():
    with pytest.raises(ValueError, match=r"\[12\] and \[11\]"):
        is_janus(fronts(), AZIMUTHS[:11], 0.4, 0.7)


def judged(likeness: torch.Tensor, noun: str = "car", known: bool = True) -> JudgedRing:
    """A ring of which this was said; the copy of its front is a little less front-like than the front."""
    sectors = torch.cat([likeness[:, None], (1 - likeness)[:, None].expand(-1, 7) / 7], 1).log()
    small = SmallRing(Path("a-0.safetensors"), a_ring(noun=noun), AZIMUTHS, known)
    return JudgedRing(small, AZIMUTHS, torch.ones(12, 1), sectors, 0.9 * float(likeness[0]))


def test_the_fitted_rule_spares_true_rings_and_finds_repeated_fronts():
    generator = torch.Generator().manual_seed(0)
    rings = [judged(fronts((0, .6 + .3 * float(torch.rand((), generator=generator))),
                           (150, .3 * float(torch.rand((), generator=generator))))) for _ in range(80)]
    figures = janus_figures(rings, fit_janus_rule(rings))
    assert figures == {"janus_true": 0.0, "janus_repeated": 1.0}


def test_no_rule_is_made_where_fronts_cannot_be_told():
    generator = torch.Generator().manual_seed(0)
    rings = [judged(.1 + .8 * torch.rand(12, generator=generator)) for _ in range(80)]
    assert janus_figures(rings, fit_janus_rule(rings))["janus_true"] <= 0.02
    with pytest.raises(ValueError, match="got none"):
        fit_janus_rule([])


def test_kinds_whose_front_is_told_have_one():
    front, both, turned = fronts((0, .8)), fronts((0, .8), (180, .7)), fronts((120, .8))
    assert [is_front_told(judged(f)) for f in (front, both, turned)] == [True, False, False]
    rings = ([judged(f, noun="car") for f in (front, front, front, front, both)] + [judged(both, noun="table")] * 3
             + [judged(front, noun="tree")] + [judged(front, noun="tree", known=False)] * 2)
    assert fronted_kinds(rings) == ["car"]


def test_a_judge_without_a_rule_says_so(judge):
    with pytest.raises(ValueError, match="no rule"):
        _ = judge.janus_rule


# -- distances ---------------------------------------------------------------------------------------------------------

def test_the_nearest_reference_counts_and_lengths_do_not():
    reference = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    found = torch.tensor([[3.0, 0, 0], [0, 0, 1], [1, 1, 0], [-1, -1, 0]])
    half = 2**-0.5
    torch.testing.assert_close(nearest_distances(found, reference), torch.tensor([0, 1, 1 - half, 1 + half]))
    with pytest.raises(ValueError, match="M at least 1"):
        nearest_distances(found, reference[:0])


def test_a_ring_lies_where_its_views_do():
    torch.testing.assert_close(ring_embedding(torch.eye(2)), torch.tensor([2**-0.5, 2**-0.5]))


# -- its training ------------------------------------------------------------------------------------------------------

def test_words_have_their_article_and_forms_leave_out_colours_that_are_not_known():
    assert with_article("oak tree") == "an oak tree" and with_article("red tree") == "a red tree"
    forms = text_forms(a_ring())
    assert forms == {"caption": ["a oak tree"], "object": ["an oak tree"],
                     "color_object": ["a green oak tree", "a green tree"]}
    assert text_forms(a_ring(colors=()))["color_object"] == []
    assert in_color("red", "red tree") == "a red tree" and in_color("red", "predator") == "a red predator"


def test_repainted_copies_stay_on_the_side_of_their_shape():
    names = [f"asset{i}" for i in range(300)]
    aside = [n for n in names if is_kept_aside(a_ring(n))]
    assert 10 <= len(aside) <= 60
    assert all(is_kept_aside(a_ring(f"{n}~red")) == (n in aside) for n in names)


def test_resampling_moves_mirrors_and_blurs():
    picture = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))

    def move(scale=1.0, shift=0.0, sigma=0.5):
        return resampling(32, torch.tensor([scale]), torch.tensor([shift]), torch.tensor([sigma]))

    still = resample(picture, move(), move())
    torch.testing.assert_close(resample(picture, move(), move(-1.0)), still.flip(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(resample(picture, move(shift=3.0), move())[:, :, :-3], still[:, :, 3:], atol=.01, rtol=0)
    soft = resample(picture, move(sigma=2.0), move(sigma=2.0))
    inner = (..., slice(8, 24), slice(8, 24))
    assert float(soft[inner].std()) < 0.5 * float(still[inner].std())
    assert float(soft[inner].mean()) == pytest.approx(float(picture[inner].mean()), abs=0.05)


def test_altered_pictures_stay_premultiplied_and_swap_only_the_colours_asked_for(painted_cube):
    pictures = torch.zeros(6, 4, 128, 128)
    pictures[:, 0, 32:96, 32:96], pictures[:, 3, 32:96, 32:96] = 0.8, 1.0  # red squares
    recolored = torch.tensor([False, True] * 3)
    out = alter(pictures, recolored, torch.zeros(6, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert float(out.min()) >= 0 and bool((out[:, :3] <= out[:, 3:]).all()) and float(out[:, 3].max()) <= 1
    assert (out[:, :3].mean((2, 3)).argmax(1) == 0)[~recolored].all()
    again = alter(pictures, recolored, torch.zeros(6, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_views_whose_label_is_unknown_do_not_move_a_loss():
    generator = torch.Generator().manual_seed(0)
    views, texts = torch.randn(2, 6, 8, generator=generator)
    rows, labels = torch.tensor([0, 1, 2, 1, NOTHING, NOTHING]), torch.tensor([0, 3, 1, 2, NOTHING, NOTHING])
    scale = torch.tensor(3.0)
    whole, known = (matching_loss(views[:n], texts[:n], rows[:n], scale) for n in (6, 4))
    torch.testing.assert_close(whole, known)
    torch.testing.assert_close(classification_loss(views, labels), classification_loss(views[:4], labels[:4]))
    assert float(classification_loss(views[4:], labels[4:])) == 0 == float(matching_loss(views[4:], texts[4:], rows[4:],
                                                                                         scale))


def test_all_views_of_one_text_fit_it():
    views = texts = torch.eye(3)[[0, 1, 1]]
    apart = float(matching_loss(views, texts, torch.tensor([0, 1, 2]), torch.tensor(50.0)))
    alike = float(matching_loss(views, texts, torch.tensor([0, 1, 1]), torch.tensor(50.0)))
    # two views of one text cannot be told apart: two of three rows are left at the entropy of a fair coin, no more
    assert alike == pytest.approx(2 / 3 * 0.6931, abs=1e-3) == apart


@pytest.fixture(scope="module")
def command(renders):
    return ["judge", "--preset", "tiny", "--renders", str(renders[0]), "--held-out", str(renders[1]), "--device", "cpu",
            "--dtype", "float32", "--min-kind-count", "1", "--min-color-count", "1", "--warmup", "2", "--log-every",
            "1", "--save-every", "2", "--evaluate-every", "1000"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    main([*command, "--run", str(folder), "--steps", "4"])
    return folder


def test_batches_draw_the_words_and_mirrored_sectors_of_their_views(renders, tmp_path):
    rings = small_rings(list_rings(renders[0]), tmp_path)
    texts = sorted({t for r in rings for form in text_forms(r.ring).values() for t in form})
    batches = JudgeBatches(rings, ["ball", "cube"], ["red"], texts, batch_size=64)
    batch, again = batches(3), batches(3)
    assert torch.equal(batch.pictures, again.pictures) and batch.pictures.shape == (64, 4, 128, 128)
    assert set(batch.labels.sectors.tolist()) == {0, 2, 4, 6} and set(batch.labels.kinds.tolist()) == {0, 1}
    assert set(batch.labels.colors.tolist()) == {0, NOTHING}
    unpainted = batch.labels.colors == 0
    for form, rows in batch.labels.texts.items():
        assert bool((rows[unpainted] != NOTHING).all()), form
        named = [texts[i] for i in rows[rows != NOTHING]]
        expected = [("ball", "cube")[i] for i in batch.labels.kinds[rows != NOTHING]]
        assert all(kind in text for kind, text in zip(expected, named)), form


def test_plain_views_are_at_most_mirrored_unless_their_colours_were_swapped(renders, tmp_path):
    rings = small_rings(list_rings(renders[0]), tmp_path)
    texts = sorted({t for r in rings for form in text_forms(r.ring).values() for t in form})
    batch = JudgeBatches(rings, ["ball", "cube"], ["red"], texts, batch_size=32, plain=1.0)(0)
    originals = torch.cat([r.pictures() for r in rings])
    either = torch.cat([originals, originals.flip(-1)]).flatten(1)
    plain = torch.stack([(either - seen).abs().amax(1).amin() == 0 for seen in batch.pictures.flatten(1)])
    assert bool(plain[batch.labels.colors == 0].all()) and 20 <= int(plain.sum()) < 32


def test_a_ring_is_judged_as_its_pictures_are(judge, renders, tmp_path):
    small = small_rings(list_rings(renders[0]), tmp_path)[0]
    ring, said = judge_rings(judge, [small])[0], judge.judge_pictures(small.pictures())
    torch.testing.assert_close(ring.embeddings, said.embeddings, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ring.sectors, said.sectors, atol=1e-4, rtol=1e-4)
    assert ring.copied_front == pytest.approx(float(ring.front_likeness[0]), rel=0.2)


def test_a_killed_training_resumes_to_the_same_judge(command, finished, tmp_path):
    with kill_at_step(3), pytest.raises(Killed):
        main([*command, "--run", str(tmp_path / "run"), "--steps", "4"])
    main([*command, "--run", str(tmp_path / "run"), "--steps", "4"])
    a, b = (load_file(checkpoints(r)[-1] / "training_state.safetensors") for r in (tmp_path / "run", finished))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def test_a_saved_judge_knows_its_words_and_judges_as_its_average_does(finished, painted_cube):
    folder = checkpoints(finished)[-1]
    loaded = load_judge(folder / "judge")
    assert tuple(loaded.config.kinds) == ("ball", "cube") and tuple(loaded.config.colors) == ("red",)
    state = load_file(folder / "training_state.safetensors")
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight.flatten(), state[f"ema/{name}"].half().float().flatten()), name
    assert loaded.object_and_color(painted_cube, "cube").object_rank in (1, 2)
    figures = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [f["assets"] for f in figures if "held_out" in f][-1] == "held_out"


def test_a_judge_learns_to_tell_sides():
    torch.manual_seed(0)
    tiny = ViewJudge(KINDS, COLORS, **PRESETS["tiny"]["model"])
    pictures, sectors = views_to_pictures(render(*cube(0.5), Cameras.orbit(8), 128)), torch.arange(8)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for _ in range(25):
        loss = classification_loss(tiny(pictures).sectors, sectors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((tiny(pictures).sectors.argmax(1) == sectors).float().mean()) >= 0.75


def test_a_training_takes_the_backbone_as_it_is(command, tmp_path, monkeypatch):
    torch.manual_seed(1)
    weights = EfficientNetLite("tf_efficientnet_lite0").state_dict()
    folder = tmp_path / "lite"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0"}))
    seeing = [*command, "--run", str(tmp_path / "run"), "--steps", "1", "--backbone", str(folder), "--seen-views", "8"]
    main(seeing)
    loaded = load_judge(checkpoints(tmp_path / "run")[-1] / "judge")
    assert loaded.config.backbone == "tf_efficientnet_lite0"
    for name, value in loaded.trunk.state_dict().items():
        torch.testing.assert_close(value, weights[name].half().float() if value.is_floating_point() else weights[name])
    monkeypatch.setattr(train_judge, "SeenViews", lambda *_: pytest.fail("a finished run looks at views again"))
    main(seeing)


def test_a_training_can_start_from_another_judge(command, finished, tmp_path):
    start = checkpoints(finished)[-1] / "judge"
    main([*command, "--run", str(tmp_path / "run"), "--steps", "1", "--lr", "1e-12", "--start", str(start)])
    given, found = (load_file(f / "diffusion_pytorch_model.safetensors")
                    for f in (start, checkpoints(tmp_path / "run")[-1] / "judge"))
    assert given.keys() == found.keys() and all(torch.equal(found[k], given[k]) for k in given)
