"""Which number format is chosen where."""

import argparse

import pytest
import torch

from coser.devices import add_dtype_option, choose_dtype, dtype_asked_for


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


def test_cuda_computes_in_bfloat16():
    assert choose_dtype(torch.device("cuda"))[0] == torch.bfloat16
