"""Which number format is chosen where."""

import argparse

import pytest
import torch

from coser.devices import add_dtype_option, choose_device, choose_dtype, dtype_asked_for


@pytest.mark.parametrize("amx, avx512, dtype, reason", [
    (True, True, torch.bfloat16, "AMX"), (True, False, torch.bfloat16, "AMX"),
    (False, True, torch.bfloat16, "AVX-512 BF16"), (False, False, torch.float32, "no quick bfloat16")])
def test_a_processor_computes_in_bfloat16_where_it_is_quick_in_it(amx, avx512, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    chosen, why = choose_dtype(torch.device("cpu"))
    assert chosen == dtype and reason in why
    parser = argparse.ArgumentParser()
    add_dtype_option(parser)
    assert dtype_asked_for(parser.parse_args([])) == dtype
    assert dtype_asked_for(parser.parse_args(["--dtype", "float32"])) == torch.float32


@pytest.mark.parametrize("capability, dtype", [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16),
                                               ((7, 5), torch.float32)])
def test_cuda_computes_in_bfloat16_where_it_is_not_emulated(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_dtype(torch.device("cuda"))[0] == dtype


def test_devices_are_the_processor_and_what_cuda_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for found in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert choose_device(None)[0].type == ("cuda" if found else "cpu") and choose_device("cpu")[0].type == "cpu"
    assert choose_device("cuda")[0].type == "cuda" and choose_device("cuda:1")[0].index == 1
    with pytest.raises(ValueError, match="2 CUDA devices.*'cuda:2'"):
        choose_device("cuda:2")


@pytest.mark.parametrize("asked", ["gpu", "", "mps", "xpu", "meta", "cuda:x"])
def test_other_devices_are_refused(asked):
    with pytest.raises(ValueError, match=f"device must be cpu or cuda, got '{asked}'"):
        choose_device(asked)
