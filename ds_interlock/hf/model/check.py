"""The check at load: the pipelined layers must give the whole model's logits.

    every stage       its layers, as they will train ──► logits of the pipeline ─┐
                                                                                 ├─ equal?
    the last stage    the model's own forward, never cut, ───► logits ───────────┘
                      each module's weights read when it is called and dropped after it

So the reference takes the memory of one block, not of the model.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.anatomy import find_anatomy, forward_without_cache
from ds_interlock.hf.model.cut import HFLayer, Values
from ds_interlock.hf.model.pretrained import Pretrained

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative to the largest logit (at least 1)
_HALF_TOLERANCE = 3e-2  # of other dtypes
_ROWS, _POSITIONS = 2, 16


def probe(pretrained: Pretrained, inputs: Sequence[str], num_positions: int) -> tuple[Tensor, ...]:
    """A small batch like the data, with padding or several samples in a row: int64 ``[2, t]`` each."""
    length = min(_POSITIONS, num_positions)
    split = max(1, length * 2 // 3)
    vocab_size = pretrained.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_bt = torch.randint(vocab_size, (_ROWS, length), generator=generator)
    mask_bt = torch.ones_like(ids_bt)
    mask_bt[1, split:] = 0
    positions_bt = torch.arange(length).repeat(_ROWS, 1)
    positions_bt[1, split:] -= split
    known = {"input_ids": ids_bt, "attention_mask": mask_bt, "position_ids": positions_bt}
    return tuple(known.get(name, torch.zeros_like(ids_bt)) for name in inputs)  # token_type_ids are 0


@torch.no_grad()
def reference_logits(
    pretrained: Pretrained, inputs: Mapping[str, Tensor], values: Values, own: Mapping[str, Tensor]
) -> Tensor:
    """The whole model's logits (``[b, t, v]``, ``[b, c]``), with one module's weights in memory at a time.

    ``values`` reads weights that are not in ``own``. Samples that share a row are computed one by one, so
    that packing is checked too.
    """
    model = pretrained.new_model()
    _read_weights_on_demand(model, values, own, inputs["input_ids"].device)
    if "position_ids" not in inputs:
        return cast(Tensor, forward_without_cache(model, inputs).logits)
    logits_btv = []
    for ids_t, positions_t in zip(inputs["input_ids"], inputs["position_ids"], strict=True):
        starts = [*(positions_t == 0).nonzero().flatten().tolist(), len(ids_t)]
        pieces = [{"input_ids": ids_t[None, start:stop]} for start, stop in pairwise(starts)]
        logits_btv.append(torch.cat([forward_without_cache(model, piece).logits[0] for piece in pieces]))
    return torch.stack(logits_btv)


def _read_weights_on_demand(
    model: Any, values: Values, own: Mapping[str, Tensor], device: torch.device
) -> None:
    """Makes every part and block of ``model`` have its weights while it is called."""
    anatomy = find_anatomy(model)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    parts = [*anatomy.parts, *(f"{anatomy.blocks}.{index}" for index in range(anatomy.num_blocks))]

    def fill(path: str, module: nn.Module) -> None:
        state = module.state_dict(prefix=f"{path}.")
        tensors = dict(values({name: tensor for name, tensor in state.items() if name not in own}))
        tensors |= {name: own[name] for name in state if name in own}
        inside = {name.removeprefix(f"{path}."): tensor.to(device) for name, tensor in tensors.items()}
        module.load_state_dict(inside, assign=True, strict=False)

    def drop(module: nn.Module) -> None:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    for path in parts:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda module, _, path=path: fill(path, module))
        module.register_forward_hook(lambda module, *_: drop(module))


def check_layers(engine: Any, pretrained: Pretrained, num_positions: int, own_inputs: Sequence[str]) -> None:
    """Compares the pipeline's logits with the model's, as ``compare``, and repeated gradients.

    All ranks must call it. Kernels whose backward passes cannot be repeated are refused if they would be.
    ``num_positions`` has the job's longest sequence; ``own_inputs`` are names of the tensors for stage 0.
    """
    inputs = probe(pretrained, own_inputs, num_positions)
    labels = torch.zeros_like(inputs[0] if pretrained.task == "causal" else inputs[0][:, 0])
    fed = inputs if len(inputs) > 1 else inputs[0]
    outputs = engine.eval_batch(iter([(fed, labels)]), compute_loss=False, num_micro_batches=1)
    engine.check_walks(iter([(fed, labels)]))
    if not engine.is_last_stage():
        return
    layers = [module for module in engine.module.modules() if isinstance(module, HFLayer)]
    own = {name: tensor for layer in layers for name, tensor in layer.state_dict().items()}
    by_name = dict(zip(own_inputs, (tensor.to(engine.device) for tensor in inputs), strict=True))
    expected = reference_logits(pretrained, by_name, pretrained.blueprint().values, own)
    compare(outputs[0], expected, by_name, pretrained)


def compare(got: Tensor, expected: Tensor, inputs: Mapping[str, Tensor], pretrained: Pretrained) -> float:
    """The largest difference over the largest logit, padding aside; ConfigError beyond the tolerance."""
    difference = (got.float() - expected.float()).abs()
    if "attention_mask" in inputs and difference.dim() == 3:
        difference = difference * inputs["attention_mask"][..., None]
    relative = (difference.max() / expected.float().abs().max().clamp(min=1)).item()
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    if not relative <= tolerance:
        place = "b, t, v" if difference.dim() == 3 else "b, c"
        index = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        packed = "position_ids" in inputs
        hint = "without --packing it may" if packed else "it has parts that its pipeline plan does not show"
        raise ConfigError(
            f"--model {pretrained.name}: cut into pipeline layers, {type(pretrained.config).__name__} does "
            f"not compute what it does whole: at [{place}] = {index} the logit is {got[tuple(index)]:.6g}, "
            f"the model's {expected[tuple(index)]:.6g} (allowed {tolerance:g} of the largest); {hint}"
        )
    return relative
