"""The state-space scan: chunked form, recurrence and mamba_ssm's pure-PyTorch references are one function."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from coser.models import ssm
from coser.models.ssm import scan, scan_backend, scan_chunked, scan_naive


def inputs(length, heads=4, head_size=6, groups=2, states=5, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    step = torch.rand(batch, length, heads, generator=generator, dtype=dtype)
    return [t.requires_grad_() for t in (normal(batch, length, heads, head_size), step, -3 * step[0, 0].detach() - 0.1,
                                         normal(batch, length, groups, states), normal(batch, length, groups, states))]


def values_and_gradients(function, tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 40, 64])
@pytest.mark.parametrize("chunk_size", [1, 8, 16, 100])
def test_chunked_scan_equals_the_recurrence_at_any_length(length, chunk_size):
    tensors = inputs(length)
    expected = values_and_gradients(scan_naive, tensors)
    got = values_and_gradients(lambda *t: scan_chunked(*t, chunk_size=chunk_size), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_of_a_group_share_what_they_write_and_read(groups):
    x, dt, A, B, C = inputs(11, groups=groups)
    alone = [scan_naive(x[:, :, h:h + 1], dt[..., h:h + 1], A[h:h + 1], *(t[:, :, h // (4 // groups), None]
             for t in (B, C))) for h in range(4)]
    torch.testing.assert_close(scan_chunked(x, dt, A, B, C, 4), torch.cat(alone, 2))


def test_scan_is_causal_and_remembers_the_first_position():
    x, dt, A, B, C = (t.detach() for t in inputs(30))
    y = scan_chunked(x, dt, A, B, C, 8)
    x[:, 20] += 1
    changed = (scan_chunked(x, dt, A, B, C, 8) - y).abs().amax((0, 2, 3)) > 0
    assert not changed[:20].any() and changed[20:].all()


def test_strong_decays_give_finite_gradients():
    x, dt, A, B, C = inputs(50, dtype=torch.float32)
    for gradient in values_and_gradients(lambda *t: scan_chunked(*t, chunk_size=16), (x, dt * 100, A * 10, B, C)):
        assert gradient.isfinite().all()


def test_bfloat16_products_stay_near_the_float64_recurrence():
    tensors = inputs(100, head_size=16, states=16)
    expected = scan_naive(*tensors)
    x, dt, A, B, C = tensors
    y = scan_chunked(x.bfloat16(), dt.float(), A.float(), B.bfloat16(), C.bfloat16(), 32)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_chunk_size_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        scan_chunked(*inputs(3), chunk_size=0)


def test_backend_follows_the_device():
    assert scan_backend(torch.device("cpu")) == "chunked"
    tensors = inputs(9)
    torch.testing.assert_close(scan(*tensors, chunk_size=4), scan_chunked(*tensors, chunk_size=4))


def test_kernels_that_do_not_run_are_replaced_once_and_for_all(monkeypatch, caplog):
    calls = []

    def kernels(*args):
        calls.append(args)
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nand more")

    class OnCuda(torch.Tensor):  # computes here and says that it lies there
        device = property(lambda self: torch.device("cuda"))

    monkeypatch.setattr(ssm, "_triton_scan", lambda: kernels)
    monkeypatch.setattr(ssm, "_failed", [])
    monkeypatch.setattr(ssm, "scan_chunked", lambda x, *rest: x * 2)
    x, *rest = inputs(9, dtype=torch.float32)
    there = x.as_subclass(OnCuda)
    assert scan_backend(there.device) == "triton"
    for _ in range(2):
        assert torch.equal(scan(there, *rest).as_subclass(torch.Tensor), x * 2)
    assert len(calls) == 1 and scan_backend(there.device) == "chunked"
    assert "Failed to find C compiler" in caplog.text and "and more" not in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_backend_equals_the_chunked_scan():
    if scan_backend(torch.device("cuda")) != "triton":
        pytest.skip("mamba_ssm or triton is not installed")
    tensors = [t.detach().cuda().float() for t in inputs(100, head_size=64, states=32)]
    expected = values_and_gradients(lambda *t: scan_chunked(*t, chunk_size=32), tensors)
    for a, b in zip(values_and_gradients(lambda *t: scan(*t, chunk_size=32), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def triton_stand_in():
    """Modules with as much of triton as the files that hold mamba_ssm's references use when imported."""

    class Config:
        def __init__(self, kwargs, **options):
            self.kwargs = kwargs

    def jit(*functions, **options):
        return functions[0] if functions else jit

    def autotune(configs, **options):
        def keep(function):
            function.configs = configs
            return function
        return keep

    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.__version__, triton.language, triton.Config, triton.jit = "3.0.0", language, Config, jit
    triton.autotune, triton.heuristics = autotune, lambda values: jit
    language.constexpr = language.dtype = int
    for name, module in (("triton", triton), ("triton.language", language)):
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return {"triton": triton, "triton.language": language}


@pytest.fixture
def mamba(monkeypatch):
    """mamba_ssm's modules by name, importable without triton, whose kernels their references do not call."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba_ssm is not installed (MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install "
                    "--no-deps --no-build-isolation mamba-ssm)")
    # its __init__ wants a compiled extension and models: stand in for the package, so that only the references load
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    stubs = {"mamba_ssm": package}
    if importlib.util.find_spec("triton") is None:
        stubs |= triton_stand_in()
    before = {name for name in sys.modules if name.startswith("mamba_ssm")}
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield lambda name: importlib.import_module(f"mamba_ssm.{name}")
    for name in [n for n in sys.modules if n.startswith("mamba_ssm") and n not in before and n != "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("length, its_chunk", [(16, 16), (32, 8), (40, 8), (29, 29)])  # it only takes whole chunks
def test_chunked_scan_equals_mambas_own_reference(mamba, length, its_chunk):
    reference = mamba("ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    tensors = inputs(length, dtype=torch.float32)
    expected = values_and_gradients(lambda *t: reference(*t, chunk_size=its_chunk), tensors)
    for a, b in zip(values_and_gradients(lambda *t: scan_chunked(*t, chunk_size=16), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_chunked_scan_equals_listing_1_of_the_paper(mamba):
    minimal = mamba("modules.ssd_minimal").ssd_minimal_discrete

    def reference(x, dt, A, B, C):
        return minimal(x * dt[..., None], dt * A, *(t.repeat_interleave(2, 2) for t in (B, C)), 8)[0]

    tensors = inputs(32)
    expected = values_and_gradients(reference, tensors)
    for a, b in zip(values_and_gradients(lambda *t: scan_chunked(*t, chunk_size=16), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
