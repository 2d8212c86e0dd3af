"""Linear cross-entropy in chunks: the numbers of the full logits, in bounded memory, and no needless work."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_result import LargestResult
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ds_interlock.heads.cross_entropy import (
    Backend,
    cross_entropy_sum,
    linear_cross_entropy,
)
from ds_interlock.heads.labels import IGNORED_LABEL

N, D, V = 23, 7, 31
ROWS = 5  # of a chunk: 23 positions are cut into 5, 5, 5, 5 and 3
CHUNK_BYTES = ROWS * V * 8
CPU_BACKENDS: list[Backend] = ["full", "chunked"]


def inputs(
    dtype: torch.dtype = torch.float64, num_ignored: int = 4, n: int = N, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_nd = torch.randn(n, D, generator=generator, dtype=torch.float64)
    weight_vd = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias_v = torch.randn(V, generator=generator, dtype=torch.float64)
    labels_n = torch.randint(V, (n,), generator=generator)
    labels_n[torch.randperm(n, generator=generator)[:num_ignored]] = IGNORED_LABEL
    hidden_nd, weight_vd, bias_v = (t.to(dtype).requires_grad_() for t in (hidden_nd, weight_vd, bias_v))
    return hidden_nd, weight_vd, bias_v if bias else None, labels_n


def reference(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    labels_n: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Written out, in float64, without ``F.cross_entropy``."""
    logits_nv = hidden_nd.double() @ weight_vd.double().T + (0 if bias_v is None else bias_v.double())
    log_probability_nv = logits_nv - logits_nv.logsumexp(1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for position, label in enumerate(labels_n.tolist()):
        if label != IGNORED_LABEL:
            row = log_probability_nv[position]
            total = total - (1 - label_smoothing) * row[label] - label_smoothing * row.mean()
    return total


def with_gradients(function: Any, tensors: tuple[Any, ...], **options: Any) -> list[Tensor]:
    """The value, and its gradients by hidden, weight and bias, when 0.3 times the value is differentiated."""
    value = function(*tensors, **options)
    sources = [tensor for tensor in tensors[:3] if tensor is not None and tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad(0.3 * value, sources)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).abs().max()
        assert error <= tolerance * max(other.abs().max().item(), 1e-300)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_the_numbers_are_those_of_the_full_logits(
    backend: Backend, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    tensors = inputs(dtype, bias=bias)
    found = with_gradients(linear_cross_entropy, tensors, backend=backend, chunk_bytes=CHUNK_BYTES)
    assert [gradient.dtype for gradient in found[1:]] == [dtype] * (2 + bias)
    assert_near(found, with_gradients(reference, tensors), tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.1, 0.7])
def test_label_smoothing(backend: Backend, label_smoothing: float) -> None:
    tensors = inputs()
    options: dict[str, Any] = {"label_smoothing": label_smoothing}
    found = with_gradients(linear_cross_entropy, tensors, backend=backend, chunk_bytes=CHUNK_BYTES, **options)
    assert_near(found, with_gradients(reference, tensors, **options), 1e-13)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 12), num_ignored=st.integers(0, 12), rows=st.integers(1, 13))
def test_every_number_of_positions_and_size_of_chunks(n: int, num_ignored: int, rows: int) -> None:
    tensors = inputs(n=n, num_ignored=num_ignored)
    found = with_gradients(
        linear_cross_entropy, tensors, backend="chunked", chunk_bytes=rows * V * 8, label_smoothing=0.2
    )[:2]
    expected = with_gradients(cross_entropy_from_logits, tensors, label_smoothing=0.2)[:2]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def cross_entropy_from_logits(
    hidden_nd: Tensor, weight_vd: Tensor, bias_v: Tensor, labels_n: Tensor, label_smoothing: float
) -> Tensor:
    return cross_entropy_sum(F.linear(hidden_nd, weight_vd, bias_v), labels_n, label_smoothing)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_without_any_label_the_loss_and_all_gradients_are_zero(backend: Backend) -> None:
    tensors = inputs(num_ignored=N)
    for found in with_gradients(linear_cross_entropy, tensors, backend=backend, chunk_bytes=CHUNK_BYTES):
        assert torch.equal(found, torch.zeros_like(found))


def test_half_precision_sums_in_float32() -> None:
    # 4,096 losses of 3.4 are 14,000: bfloat16 has steps of 64 there, and a gradient summed over 800
    # chunks in bfloat16 would stop growing.
    tensors = inputs(torch.bfloat16, n=4096)
    found = with_gradients(linear_cross_entropy, tensors, backend="chunked", chunk_bytes=CHUNK_BYTES)
    expected = with_gradients(reference, tensors)
    assert found[0].dtype is torch.float32
    assert_near(found[:1], expected[:1], 1e-3)
    assert_near(found[1:], expected[1:], 1e-2)


def test_under_autocast_it_computes_as_a_linear_layer_would() -> None:
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(linear_cross_entropy, tensors, backend="chunked", chunk_bytes=CHUNK_BYTES)
        expected = with_gradients(cross_entropy_from_logits, tensors, label_smoothing=0.0)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 4
    assert_near(found, expected, 1e-2)
    exact = with_gradients(reference, tensors)
    assert (found[1] - exact[1]).abs().max() > 1e-4, "this was float32: the autocast was not obeyed"


# What it does not do.


def matmul_flops(backend: Backend, **frozen: bool) -> int:
    hidden_nd, weight_vd, _, labels_n = inputs(bias=False)
    hidden_nd.requires_grad_(not frozen.get("hidden", False))
    weight_vd.requires_grad_(not frozen.get("weight", False))
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(
            hidden_nd, weight_vd, None, labels_n, backend=backend, chunk_bytes=CHUNK_BYTES
        )
        if loss.requires_grad:
            loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_only_the_gradients_that_are_wanted_are_computed(backend: Backend) -> None:
    product = 2 * N * D * V
    assert matmul_flops(backend) == 3 * product
    assert matmul_flops(backend, weight=True) == 2 * product
    assert matmul_flops(backend, hidden=True) == 2 * product
    assert matmul_flops(backend, weight=True, hidden=True) == product
    with torch.no_grad():
        assert matmul_flops(backend) == product


def test_no_tensor_is_larger_than_a_chunk() -> None:
    tensors = inputs(bias=False, n=400)
    sizes = {}
    for backend in ("chunked", "full"):
        with LargestResult() as largest:
            with_gradients(linear_cross_entropy, tensors, backend=backend, chunk_bytes=CHUNK_BYTES * 20)
        sizes[backend] = largest.numel
    assert sizes == {"chunked": 20 * ROWS * V, "full": 400 * V}
    assert 400 * D < 20 * ROWS * V, "else a gradient of the inputs is the largest"


def test_gradients_can_be_taken_once() -> None:
    tensors = inputs()
    loss = linear_cross_entropy(*tensors, backend="chunked", chunk_bytes=CHUNK_BYTES)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.bad_input
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_label_that_is_no_output_is_an_error(backend: Backend) -> None:
    hidden_nd, weight_vd, bias_v, labels_n = inputs()
    for label in (-1, V):
        labels_n[3] = label
        with pytest.raises((IndexError, RuntimeError)):
            linear_cross_entropy(
                hidden_nd, weight_vd, bias_v, labels_n, backend=backend, chunk_bytes=CHUNK_BYTES
            )


# What is chosen.


def test_few_logits_are_simply_computed() -> None:
    tensors = inputs()
    chosen = linear_cross_entropy(*tensors)
    assert chosen.grad_fn.name() == cross_entropy_from_logits(*tensors, label_smoothing=0.0).grad_fn.name()
    assert linear_cross_entropy(*tensors, chunk_bytes=CHUNK_BYTES).grad_fn.name() != chosen.grad_fn.name()
