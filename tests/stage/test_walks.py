"""A layer whose graph must not be walked back twice is found, whatever its kernel does to what it saved."""

from typing import Any

import pytest
import torch
from overwriting_kernels import WIDTH, Frees, KernelLayer, ReusesMemory, ScalesWhatItSaved

from ds_interlock.schedule.dependency import num_backward_passes
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.walks import compare_walks


@pytest.mark.bad_input
@pytest.mark.parametrize("kernel", [ScalesWhatItSaved, ReusesMemory, Frees])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kernel_that_changes_what_it_saved(kernel: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, inputs = KernelLayer(kernel.__name__).to(dtype), torch.randn(4, WIDTH).to(dtype)
    output, error, functions = compare_walks(layer, inputs, [layer])
    assert error > 10
    assert functions == kernel.__name__
    assert not output.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_usual_layers_pass_and_stay_as_they_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, inputs = KernelLayer().to(dtype), torch.randn(4, WIDTH).to(dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = layer(inputs)
    layer.load_state_dict(before)
    output, error, functions = compare_walks(layer, inputs, [layer])
    assert error <= 1
    assert functions == ""
    assert torch.equal(output, expected)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_what_has_no_gradient_passes() -> None:
    assert compare_walks(lambda ids: ids + 1, torch.arange(3), [])[1] == 0


def test_walks_of_a_stage() -> None:
    plans = GradientFlowPlan.end_to_end(3), GradientFlowPlan.local(3), GradientFlowPlan.n_wise(3, window=2)
    assert [[num_backward_passes(plan, stage) for stage in range(3)] for plan in plans] == [
        [1] * 3,
        [1] * 3,
        [1, 2, 2],
    ]
