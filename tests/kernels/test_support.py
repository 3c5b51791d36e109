"""The support table says what was built, and gives the reasons of every refusal."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch

from tests.kernels.random_layers import make_input, make_layer
from vllm_matquant.checkpoint.decoder import AFFINE_FLOAT16, AFFINE_INT8
from vllm_matquant.checkpoint.spec import WIDTHS
from vllm_matquant.kernels import ops
from vllm_matquant.kernels.kernel import Request
from vllm_matquant.kernels.support import CPU, DTYPES, KERNELS, REFERENCE, UnsupportedError, select_kernel

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "_loaded", False)
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "_C.abi3.so")


def test_the_table_lists_what_was_built_and_nothing_else():
    ops.load_library()
    built = {
        device
        for device, key in DISPATCH_KEYS.items()
        if torch._C._dispatch_has_kernel_for_dispatch_key("matquant::linear", key)
    }
    listed = {kernel.device_type for kernel in KERNELS if kernel.is_built}
    assert {"cpu"} <= built <= listed
    assert {device for device in listed if ops.is_built_for(device)} == built


def request(device, dtype, widths, in_features, group_size, kind=AFFINE_FLOAT16) -> Request:
    return Request(device, dtype, tuple(widths), in_features, group_size, kind)


@pytest.mark.parametrize("kernel", [*(k for k in KERNELS if k.device_type == "cpu"), REFERENCE], ids=lambda k: k.name)
def test_a_kernel_serves_all_that_the_table_says(kernel):
    columns, group_size = 8 * kernel.group_multiple, 2 * kernel.group_multiple
    for kind in kernel.decoder_kinds:
        layer = make_layer([20], columns, group_size, kind=kind, kernel=kernel)
        for dtype in kernel.dtypes:
            assert not kernel.accepts(request("cpu", dtype, kernel.widths, columns, group_size, kind))
            for width in kernel.widths:
                x = make_input(3, columns, dtype)
                layer.check(layer.run(x, [width]), x, [width], rounds=kernel is not REFERENCE)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.device_type == "cpu"], ids=lambda k: k.name)
def test_a_kernel_refuses_what_the_table_leaves_out(kernel):
    for dtype in {torch.float64, torch.int32, *DTYPES} - set(kernel.dtypes):
        with pytest.raises(RuntimeError, match="x: found dtype"):
            make_layer([20], 8, 8, kernel=kernel).run(make_input(3, 8).to(dtype), [4])
    with pytest.raises(RuntimeError, match="group_size: found"):
        make_layer([20], 8 * kernel.group_multiple, kernel.group_multiple + 1, kernel=kernel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_chosen_where_it_serves(dtype, caplog):
    assert select_kernel(request("cpu", dtype, WIDTHS, 4096, 128)).name == "cpu"
    assert select_kernel(request("cpu", dtype, [4], 30, 30)).name == "cpu"
    assert not caplog.records


def test_the_reference_serves_other_devices_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert select_kernel(request("xpu", torch.bfloat16, WIDTHS, 4096, 128)) is REFERENCE
    assert "cpu: device: found xpu, expected cpu" in caplog.text
    assert "cuda: device: found xpu, expected cuda" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cuda_kernel_serves_cuda_where_it_is_built(dtype, monkeypatch, caplog):
    monkeypatch.setattr(ops, "is_built_for", lambda device_type: True)
    for group_size in (32, 64, 128, 512, 4096):
        assert select_kernel(request("cuda", dtype, WIDTHS, 4096, group_size)).name == "cuda"
    assert not caplog.records


@pytest.mark.parametrize(
    ("built", "modules", "group_size", "chosen"),
    [
        (True, [], 128, "cuda"),
        (False, ["cupy", "triton"], 128, "cuda-jit"),
        (False, ["triton"], 128, "triton"),
        (True, ["triton"], 96, "triton"),
        (False, [], 128, "reference"),
    ],
)
def test_other_kernels_serve_cuda_where_the_library_cannot_and_say_why(
    built, modules, group_size, chosen, monkeypatch, caplog
):
    monkeypatch.setattr(ops, "is_built_for", lambda device_type: built)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in modules else None)
    with caplog.at_level(logging.WARNING):
        assert select_kernel(request("cuda", torch.float16, WIDTHS, 4096, group_size)).name == chosen
    assert bool(caplog.records) == (chosen != "cuda")
    if not built:
        assert "built without kernels for cuda. With a CUDA toolkit" in caplog.text
    if chosen in ("triton", "reference") and not built:
        assert "cupy: not installed; pip install cupy" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "group_size", "capability", "reason"),
    [
        (torch.float32, 128, (9, 0), "dtype: found torch.float32"),
        (torch.float16, 96, (9, 0), "group size: found 96, expected a multiple of 32 that is a power of two"),
        (torch.float16, 16, (9, 0), "group size: found 16"),
        (torch.float16, 128, (7, 5), "compute capability: found (7, 5), expected at least (8, 0)"),
    ],
)
def test_the_cuda_kernel_says_what_it_does_not_serve(dtype, group_size, capability, reason, monkeypatch):
    monkeypatch.setattr(ops, "is_built_for", lambda device_type: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    [kernel] = [kernel for kernel in KERNELS if kernel.name == "cuda"]
    reasons = kernel.accepts(request("cuda", dtype, (4,), 4096, group_size))
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_the_reference_serves_odd_groups(caplog):
    with caplog.at_level(logging.WARNING):
        assert select_kernel(request("cpu", torch.bfloat16, WIDTHS, 90, 30)) is REFERENCE
    assert "cpu: group size: found 30, expected a multiple of 4 or at least the 90 input features" in caplog.text


def test_the_reference_serves_without_the_library(no_library, caplog):
    with caplog.at_level(logging.WARNING):
        assert select_kernel(request("cpu", torch.bfloat16, WIDTHS, 4096, 128)) is REFERENCE
    assert ops.BUILD_COMMAND in caplog.text


def test_a_refusal_gives_every_reason_of_every_kernel():
    with pytest.raises(UnsupportedError) as refusal:
        select_kernel(request("xpu", torch.float64, (1, 4), 90, 30))
    lines = str(refusal.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == [*(kernel.name for kernel in KERNELS), "reference"]
    for reason in ("device: found xpu", "dtype: found torch.float64", "widths: found [1]", "group size: found 30"):
        assert reason in lines[0]
    for reason in ("dtype: found torch.float64", "widths: found [1]"):
        assert reason in lines[-1]


def test_a_kernel_gives_its_reasons():
    assert CPU.accepts(request("cpu", torch.bfloat16, (2,), 64, 32)) == []
    assert CPU.accepts(request("cpu", torch.bfloat16, (2,), 64, 0)) == [
        "group size: found 0, expected a multiple of 4 or at least the 64 input features"
    ]
    assert replace(CPU, decoder_kinds=(AFFINE_FLOAT16,)).accepts(
        request("cpu", torch.bfloat16, (2,), 64, 32, AFFINE_INT8)
    ) == ["decoders: found affine-int8, expected affine-float16"]


def test_a_missing_library_names_the_command_that_builds_it(no_library):
    with pytest.raises(ops.LibraryError, match=re.escape(ops.BUILD_COMMAND)):
        ops.cpu_isa()


def test_a_broken_library_names_the_command_that_builds_it(no_library):
    ops.LIBRARY.write_bytes(b"not a library")
    with pytest.raises(ops.LibraryError, match=f"Could not load this library.*{re.escape(ops.BUILD_COMMAND)}"):
        ops.cpu_isa()
