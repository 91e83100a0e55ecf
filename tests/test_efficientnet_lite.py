"""EfficientNet-Lite as the judge's backbone: its sizes, its padding, and how its weights are read."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from coser.models.efficientnet_lite import SCALES, EfficientNetLite, SamePad, load_efficientnet_lite, rounded


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return EfficientNetLite("tf_efficientnet_lite0")


# Published sizes (4.652, 5.417, 6.092, 8.197 and 13.007 M) less the classifier of 1,000 classes
@pytest.mark.parametrize("name, parameters", [
    ("tf_efficientnet_lite0", 3_371_008), ("tf_efficientnet_lite1", 4_135_680), ("tf_efficientnet_lite2", 4_811_072),
    ("tf_efficientnet_lite3", 6_916_096), ("tf_efficientnet_lite4", 11_725_568)])
def test_it_has_as_many_weights_as_was_published(name, parameters):
    with torch.device("meta"):
        model = EfficientNetLite(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_place_stands_for_32_pixels_and_statistics_stay(trunk):
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    pictures = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = trunk.train()(pictures)
    assert features.shape == (2, 1280, 3, 2) and float(features.min()) >= 0 and float(features.max()) <= 6
    assert float(features.std()) > 0
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())


def test_what_a_stride_leaves_over_is_padded_to_the_right_and_bottom():
    layer = SamePad(1, 1, 3, 2)
    even, odd = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 7, 7)
    torch.testing.assert_close(layer(even), F.conv2d(F.pad(even, (0, 1, 0, 1)), layer.weight, stride=2))
    torch.testing.assert_close(layer(odd), F.conv2d(odd, layer.weight, stride=2, padding=1))


def test_widths_are_multiples_of_eight_that_lose_less_than_a_tenth():
    assert [rounded(c) for c in (16 * 1.1, 24 * 1.1, 80 * 1.1, 320 * 1.4, 3)] == [16, 24, 88, 448, 8]
    assert rounded(19.9) == 24  # 16 would lose a fifth
    with pytest.raises(ValueError, match="lite0.*got 'resnet50'"):
        EfficientNetLite("resnet50")


def test_what_is_neither_a_folder_nor_a_hub_id_is_named(tmp_path):
    with pytest.raises(ValueError, match="backbone must be a folder.*no/such/folder'"):
        load_efficientnet_lite(str(tmp_path / "no/such/folder"))


def test_weights_come_from_a_folder_without_the_classifier(trunk, tmp_path):
    save_file(trunk.state_dict() | {"classifier.weight": torch.zeros(1000, 1280)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config.json"):
        load_efficientnet_lite(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    with pytest.raises(ValueError, match="got 'resnet50'"):
        load_efficientnet_lite(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0"}))
    name, weights = load_efficientnet_lite(str(tmp_path))
    assert name in SCALES and weights.keys() == trunk.state_dict().keys()
