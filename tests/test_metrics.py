"""Metrics on cases with known answers."""

import pytest
import torch
from skimage.metrics import structural_similarity

from coser.evaluate import evaluate_reconstruction, parser
from coser.data.assets import list_assets
from coser.metrics import psnr, sharpness, silhouette_iou, ssim
from coser.views import ViewSet

GENERATOR = torch.Generator().manual_seed(0)


def test_psnr_of_a_known_error():
    black = torch.zeros(2, 3, 8, 8)
    assert torch.allclose(psnr(black + 0.1, black), torch.full((2,), 20.0), atol=1e-4)
    assert torch.allclose(psnr(black, black), torch.full((2,), 100.0))


def test_iou_of_squares_that_overlap_by_half():
    a, b = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    a[..., :4], b[..., 2:6] = 1, 1
    assert silhouette_iou(a, b).item() == pytest.approx(1 / 3)
    assert silhouette_iou(a, a).item() == 1 and silhouette_iou(a * 0, b * 0).item() == 1


def test_ssim_is_that_of_scikit_image():
    a = torch.rand(1, 3, 40, 40, generator=GENERATOR)
    b = (a + 0.1 * torch.randn(a.shape, generator=GENERATOR)).clamp(0, 1)
    expected = structural_similarity(a[0].numpy(), b[0].numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True,
                                     sigma=1.5, use_sample_covariance=False)
    assert ssim(a, b).item() == pytest.approx(expected, abs=2e-3)
    assert ssim(a, a).item() == pytest.approx(1)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 4))


def test_reconstruction_is_scored_from_a_folder_of_files(tmp_path, capsys):
    import trimesh

    trimesh.creation.box((1, 1, 1)).export(tmp_path / "box.glb")
    score, = evaluate_reconstruction(list_assets(tmp_path), num_views=8, size=64, resolution=48, max_faces=2000)
    assert score.watertight and score.object == "box" and score.iou_20 > 0.95 and score.psnr > 25
    options = parser().parse_args(["reconstruction", "--assets", str(tmp_path), "--size", "32", "--resolution", "32"])
    options.run(options)
    assert "1 assets, watertight: 1" in capsys.readouterr().out


def test_sharpness_is_the_step_between_neighbours_inside_the_object():
    masks = torch.zeros(2, 1, 32, 32)
    masks[:, :, 4:28, 4:28] = 1
    stripes = (torch.arange(32) % 2).float().expand(2, 3, 32, 32) * 0.2 * masks
    stripes[1] = 0.5 * masks[1]
    found = sharpness(ViewSet(stripes, masks, masks))
    torch.testing.assert_close(found, torch.tensor([2 * 0.2 * 255, 0.0]), rtol=1e-4, atol=1e-3)
    assert not sharpness(ViewSet(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))).any()
