"""The residual block equals diffusers' own, and the convolution by columns equals torch's."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

from coser.models.resnet import ResnetBlock, convolve, convolve_by_columns


@pytest.mark.parametrize("out_channels", [16, 24])
@pytest.mark.parametrize("training", [False, True])
def test_residual_block_equals_diffusers_in_values_and_gradients(out_channels, training):
    torch.manual_seed(0)
    parent = ResnetBlock2D(in_channels=16, out_channels=out_channels, temb_channels=12, groups=4).train(training)
    block = ResnetBlock(parent)
    pictures = torch.randn(3, 16, 8, 8, requires_grad=True)
    embedding = torch.randn(3, 12, requires_grad=True)
    results = []
    for module in (parent, block):
        out = module(pictures, embedding)
        wanted = [pictures, embedding, *module.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    names = [["out", "pictures", "embedding", *(n for n, _ in m.named_parameters())] for m in (parent, block)]
    other = dict(zip(names[1], results[1], strict=True))
    assert set(names[0]) == set(names[1])
    for name, value in zip(names[0], results[0], strict=True):
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-4)


def test_special_residual_blocks_are_left_to_diffusers():
    common = dict(in_channels=16, temb_channels=12, groups=4)
    assert ResnetBlock.can_replace(ResnetBlock2D(**common))
    for special in (dict(up=True), dict(down=True), dict(time_embedding_norm="scale_shift"),
                    dict(output_scale_factor=2.0), dict(skip_time_act=True), dict(non_linearity="gelu")):
        assert not ResnetBlock.can_replace(ResnetBlock2D(**common, **special))


@pytest.mark.parametrize("height, width", [(4, 4), (1, 1), (3, 5), (2, 1)])
def test_convolution_by_columns_equals_torch_in_values_and_gradients(height, width):
    generator = torch.Generator().manual_seed(0)
    pictures, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
                              for shape in ((2, 5, height, width), (7, 5, 3, 3), (7,)))
    results = []
    for function in (convolve_by_columns, lambda *t: F.conv2d(*t, padding=1)):
        out = function(pictures, weight, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), (pictures, weight, bias))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [4, 8])
def test_convolution_in_bfloat16_stays_near_float32(size):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(32, 16, 3, padding=1).to(memory_format=torch.channels_last)
    pictures = torch.randn(2, 32, size, size)
    expected = convolution(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        got = convolve(convolution, pictures.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.01 * expected.norm()
