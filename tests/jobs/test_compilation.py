"""`--torch_compile`: compiled blocks learn what they learn otherwise, and checkpoints are the same."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model
from torch import nn

from ds_interlock import GradientFlowPlan, HeadConfig, InProcessPipeline
from ds_interlock.errors import ConfigError
from ds_interlock.heads.factory import head_factory
from ds_interlock.hf.model.cut import Block, Blueprint, build_all
from ds_interlock.hf.model.pretrained import empty_model
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.jobs.arguments import CompilationArguments
from ds_interlock.jobs.hugging_face import compile_blocks
from ds_interlock.models.lm import lm_loss

BOUNDS = (0, 2, 4, 7)
COMPILED = CompilationArguments(torch_compile_backend="aot_eager")


def train(args: CompilationArguments | None) -> tuple[nn.Module, list[Any]]:
    """Gradients of a window, whose relays walk back through the same graphs more than once."""
    model = tiny_model("llama")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    blueprint = Blueprint(
        Skeleton(empty_model(model.config, "causal", torch.float32)),
        lambda wanted: {name: tensors[name].clone() for name in wanted if name in tensors},
        ("input_ids", "attention_mask"),
    )
    layers = build_all(blueprint.layers())
    if args is not None:
        compile_blocks(layers, args)
    torch.manual_seed(0)
    plan = GradientFlowPlan.n_wise(stage_bounds=BOUNDS, window=2)
    net = InProcessPipeline(layers, lm_loss(), plan, head_factory(HeadConfig(), blueprint.layers()))
    ids_bt = torch.randint(VOCABULARY, (2, 2, 8))
    net.accumulate_gradients([((ids, torch.ones_like(ids)), ids) for ids in ids_bt])
    return net, layers


def blocks_of(layers: Sequence[Any]) -> list[nn.Module]:
    return [part for layer in layers if isinstance(layer, Block) for part in layer.parts().values()]


def test_compiled_blocks_learn_the_same_through_relays() -> None:
    (plain, _), (compiled, layers) = train(None), train(COMPILED)
    assert all(block._compiled_call_impl is not None for block in blocks_of(layers))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    expected = dict(plain.named_parameters())
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.bad_input
def test_backends_and_models_that_do_not_compile() -> None:
    with pytest.raises(ConfigError, match=r"--torch_compile_backend fast: torch has .*inductor"):
        compile_blocks([], CompilationArguments(torch_compile_backend="fast"))
    with pytest.raises(ConfigError, match="--torch_compile: the experts' balance"):
        compile_blocks([], CompilationArguments(torch_compile=True), routing=object())
