"""Truths about which words a checkpoint knows; sentences are read by the real text encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from coser.data.assets import Asset
from coser.pipeline import CoSERPipeline
from coser.studio import SMALL
from coser.vocabulary import (KNOWN_FROM, NEAR_FROM, Verdict, Vocabulary, learn_vocabulary, load_vocabulary, main,
                              sentence_embedder)

OBJECTS = {"pine tree": 4, "autumn tree": 3, "wooden house": 5, "barrel": 3, "chair": 3, "sports car": 3,
           "lonely lamp": 2}
UNKNOWN = json.loads((Path(__file__).parent / "unknown_prompts.json").read_text("utf-8"))
ROWS = [{"id": f"{name}-{i}", "split": "train", "object": name, "captions": [f"a {name}"], "colors": ["red", "white"]}
        for name, count in OBJECTS.items() for i in range(count)]


@pytest.fixture(scope="module")
def embed(pipeline):
    return sentence_embedder(pipeline)


@pytest.fixture(scope="module")
def vocabulary(embed):
    return learn_vocabulary([Asset(r["id"], None, object=r["object"], colors=tuple(r["colors"])) for r in ROWS], embed)


@pytest.fixture(scope="module")
def shipped(embed):
    return load_vocabulary(SMALL, embed)


def test_kinds_seen_too_rarely_are_not_learnt_and_the_commonest_come_first(vocabulary):
    assert vocabulary.kinds == {"tree": 7, "house": 5, "barrel": 3, "car": 3, "chair": 3}
    assert "lonely lamp" not in vocabulary.phrases and vocabulary.phrases["pine tree"] == 4
    assert vocabulary.colors == {"red": 21, "white": 21}


def test_repainted_copies_teach_colours_and_count_as_no_new_object(embed):
    assets = [Asset(f"{i}{copy}", None, object="barrel", colors=(color,))
              for i in range(3) for copy, color in (("", "red"), ("~blue", "blue"))]
    learnt = learn_vocabulary(assets, embed)
    assert learnt.kinds == {"barrel": 3} and learnt.colors == {"blue": 3, "red": 3}


def test_a_phrase_that_says_what_a_kept_word_says_is_left_out(embed):
    names = ["barrel"] * 3 + ["the barrel", "pickle barrel"]
    assets = [Asset(str(i), None, object=name) for i, name in enumerate(names)]
    assert list(learn_vocabulary(assets, embed).phrases) == ["pickle barrel"]


def test_too_few_assets_of_every_kind_are_refused():
    with pytest.raises(ValueError, match="at least 3 times, got 1"):
        learn_vocabulary([Asset("a", None, object="barrel"), Asset("b", None, object="chair")], lambda texts: None)


@pytest.mark.parametrize("prompt", [
    "a red barrel", "BARREL", "two barrels", "a big green tree beside the sea", "an automobile", "a pine"])
def test_learnt_words_and_what_means_the_same_are_known(vocabulary, prompt):
    verdict = vocabulary.nearest(prompt)
    assert verdict.known and verdict.note == "" and verdict.similarity >= KNOWN_FROM


def test_the_nearest_kind_is_suggested_first(vocabulary):
    assert vocabulary.nearest("two big barrels").nearest[0] == "barrel"
    assert vocabulary.nearest("an armchair").nearest[0] == "chair"


@pytest.mark.parametrize("prompt", ["a red", "the", "", "!!! 123", "white and red", "two dark golden"])
def test_colours_and_fillers_alone_name_no_object(vocabulary, prompt):
    verdict = vocabulary.nearest(prompt)
    assert verdict == Verdict(False, 0.0, ("tree", "house", "barrel"))
    assert "it knows, for example: tree, house, barrel" in verdict.note


def test_a_modifier_of_known_objects_does_not_make_another_object_known(vocabulary):
    assert {"wooden", "sports"} <= vocabulary.modifiers and not {"house", "tree", "barrel"} & vocabulary.modifiers
    assert not vocabulary.nearest("a wooden submarine").known


def test_what_comes_near_without_being_known_is_told_with_the_nearest():
    note = Verdict(False, (KNOWN_FROM + NEAR_FROM) / 2, ("cart", "wagon")).note
    assert "(nearest: cart, wagon)" in note and "tries all the same" in note


def test_what_is_saved_is_read_back_with_cosines_hardly_moved(vocabulary, embed, tmp_path):
    vocabulary.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocabulary.json", "vocabulary.safetensors"]
    again = load_vocabulary(tmp_path, embed)
    assert (again.kinds, again.phrases, again.colors) == (vocabulary.kinds, vocabulary.phrases, vocabulary.colors)
    assert list(again.kinds) == list(vocabulary.kinds)
    drift = vocabulary.embeddings @ vocabulary.embeddings.T - again.embeddings @ vocabulary.embeddings.T
    assert float(drift.abs().max()) < 0.003


def test_a_folder_without_a_vocabulary_gives_none(tmp_path, embed):
    assert load_vocabulary(tmp_path, embed) is None and load_vocabulary("some-one/some-model", embed) is None


def test_embeddings_must_be_one_a_word(embed):
    with pytest.raises(ValueError, match="one for each of 1 words, got \\[2, 3\\]"):
        Vocabulary({"tree": 3}, {}, {}, torch.zeros(2, 3), embed)


def test_embeddings_are_unit_vectors_whatever_stands_beside_them(embed):
    alone, beside = embed(["tree"])[0], embed(["tree", "a sentence with a good many words in it"])[0]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
    assert abs(float(alone.norm()) - 1) < 1e-5


def test_the_command_reads_training_rows_and_writes_into_the_checkpoint(embed, pipeline_folder, tmp_path, capsys):
    checkpoint = shutil.copytree(pipeline_folder, tmp_path / "checkpoint")
    held_out = {"id": "held", "split": "val", "object": "violin", "captions": ["a violin"], "colors": ["pink"]}
    (tmp_path / "index.jsonl").write_text("\n".join(json.dumps(row) for row in [*ROWS, held_out]))
    main([str(tmp_path), str(checkpoint)])
    written = load_vocabulary(checkpoint, embed)
    assert list(written.kinds)[0] == "tree" and "pink" not in written.colors
    assert f"{len(written.kinds)} kinds, {len(written.phrases)} phrases" in capsys.readouterr().out
    assert CoSERPipeline.from_pretrained(checkpoint).unet is not None  # the folder is still a pipeline


def test_the_command_says_what_is_missing(pipeline_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), str(pipeline_folder)])
    assert exit_.value.code == 1 and "index.jsonl" in capsys.readouterr().err


def test_the_shipped_vocabulary_is_small_and_of_the_encoder_that_reads_prompts(shipped, embed):
    assert sum((SMALL / f"vocabulary.{kind}").stat().st_size for kind in ("json", "safetensors")) < 400_000
    words = [*shipped.kinds, *shipped.phrases]
    picked = torch.arange(0, len(words), 25)
    cosines = (embed([words[i] for i in picked]) * shipped.embeddings[picked]).sum(1)
    assert len(words) > 500 and float(cosines.min()) > 0.998


@pytest.mark.parametrize("kind, most", [("never drawn", 0.3), ("nonsense", 0.05), ("other languages", 0.05)])
def test_few_prompts_that_the_shipped_model_cannot_draw_pass_for_known(shipped, kind, most):
    passed = [prompt for prompt in UNKNOWN[kind] if shipped.nearest(prompt).known]
    assert len(passed) <= most * len(UNKNOWN[kind]), passed


def test_every_example_is_made_of_words_that_the_shipped_model_knows(shipped):
    prompts = (Path(__file__).parent.parent / "examples" / "gallery.txt").read_text("utf-8").splitlines()
    assert [prompt for prompt in prompts if not shipped.nearest(prompt).known] == []


@pytest.mark.parametrize("prompt", [
    "quantum entanglement", "democracy", "a violin", "a giraffe", "a stethoscope", "photosynthesis", "a toothbrush",
    "asdf qwer", "hjkl", "ein rotes Fass", "красная бочка", "赤い樽", "a grey"])
def test_the_shipped_vocabulary_does_not_know_what_was_never_drawn(shipped, prompt):
    assert not shipped.nearest(prompt).known
