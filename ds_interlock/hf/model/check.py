"""The check at load: the pipelined layers must give the whole model's logits and gradients.

    every stage       its layers, as they will train ──► logits, gradients of the pipeline ─┐
                                                                                            ├─ equal?
    the last stage    the model's own passes, never cut ──► logits, gradients ──────────────┘
                      each module's weights read when it is called and dropped after it

The reference takes the memory of one block, not of the model: its backward pass computes each module again.
A gradient is compared by its norm and by numbers that depend on all of it, which travel instead of it.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ds_interlock.errors import ConfigError
from ds_interlock.heads.lm_loss import lm_loss
from ds_interlock.heads.output_layers import first_tensor
from ds_interlock.hf.model.anatomy import Anatomy, find_anatomy, forward_without_cache
from ds_interlock.hf.model.cut import TIE, HFLayer, Values
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.transport.agreement import gather

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative to the largest logit (at least 1)
_HALF_TOLERANCE = 3e-2  # of other dtypes
_LESS_EXACT = 100  # gradients, which sum over more, may differ by so many tolerances
_SMALL = 1e-2  # of the whole gradient's norm: below it a gradient is rounding of what cancels
_NUM_VIEWS = 4
_ROWS, _POSITIONS = 2, 16


class Fingerprint(NamedTuple):
    """What is compared of a gradient."""

    views: tuple[float, ...]  # products with random vectors
    norm: float

    def plus(self, other: "Fingerprint") -> "Fingerprint":
        """That of the sum, but for a norm that may be smaller."""
        views = tuple(one + two for one, two in zip(self.views, other.views, strict=True))
        return Fingerprint(views, self.norm + other.norm)


Fingerprints = dict[str, Fingerprint]
_ZERO = Fingerprint((0.0,) * _NUM_VIEWS, 0.0)


def fingerprint(name: str, gradient: Tensor) -> Fingerprint:
    """The fingerprint of a gradient; ``name`` seeds the random vectors."""
    matrix = gradient.detach().double().reshape(len(gradient) if gradient.dim() else 1, -1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    left, right = (
        torch.randn(_NUM_VIEWS, size, generator=generator, dtype=torch.float64).to(matrix)
        for size in matrix.shape
    )
    views = ((left @ matrix) * right).sum(1)
    return Fingerprint(tuple(views.tolist()), matrix.norm().item())


def probe(pretrained: Pretrained, inputs: Sequence[str], num_positions: int) -> tuple[Tensor, ...]:
    """A small batch like the data, with padding or several samples in a row: int64 ``[2, t]`` each."""
    length = min(_POSITIONS, num_positions)
    split = max(1, length * 2 // 3)
    config = pretrained.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids_bt = torch.randint(config.vocab_size, (_ROWS, length), generator=generator)
    mask_bt = torch.ones_like(ids_bt)
    mask_bt[1, split:] = 0
    if pretrained.task == "classification":
        ids_bt[1, split:] = config.pad_token_id
    positions_bt = torch.arange(length).repeat(_ROWS, 1)
    positions_bt[1, split:] -= split
    known = {"input_ids": ids_bt, "attention_mask": mask_bt, "position_ids": positions_bt}
    return tuple(known.get(name, torch.zeros_like(ids_bt)) for name in inputs)  # token_type_ids are 0


def labels_for(pretrained: Pretrained, inputs: Mapping[str, Tensor]) -> Tensor:
    """Something to predict: the next tokens, ``[b, t]``, padding aside; or class 0, ``[b]``."""
    if pretrained.task == "classification":
        return torch.zeros_like(inputs["input_ids"][:, 0])
    labels_bt = inputs["input_ids"].roll(-1, 1)
    return labels_bt.masked_fill(inputs.get("attention_mask", torch.ones_like(labels_bt)) == 0, -100)


def reference(
    pretrained: Pretrained, inputs: Mapping[str, Tensor], values: Values, own: Mapping[str, Tensor]
) -> tuple[Tensor, Fingerprints]:
    """The whole model's logits (``[b, t, v]``, ``[b, c]``) and its gradients of the mean loss, by parameter.

    Weights are in memory for one module at a time; ``values`` reads those that are not in ``own``. Samples
    that share a row are computed one by one, so that packing is checked too.
    """
    model = pretrained.new_model()
    gradients: Fingerprints = {}
    anatomy = find_anatomy(model)
    weights = _Weights(values, own, inputs["input_ids"].device, anatomy, gradients)
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(weights.device))
    for path in [*anatomy.parts, *(f"{anatomy.blocks}.{index}" for index in range(anatomy.num_blocks))]:
        module = model.get_submodule(path)
        module.forward = weights.on_demand(path, module)
    with torch.enable_grad():
        logits = _logits(model, inputs)
        lm_loss()(logits, labels_for(pretrained, inputs)).backward()
    return logits.detach(), gradients


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    if "position_ids" not in inputs:
        return cast(Tensor, forward_without_cache(model, inputs).logits)
    logits_btv = []
    for ids_t, positions_t in zip(inputs["input_ids"], inputs["position_ids"], strict=True):
        starts = [*(positions_t == 0).nonzero().flatten().tolist(), len(ids_t)]
        pieces = [{"input_ids": ids_t[None, start:stop]} for start, stop in pairwise(starts)]
        logits_btv.append(torch.cat([forward_without_cache(model, piece).logits[0] for piece in pieces]))
    return torch.stack(logits_btv)


class _Weights(NamedTuple):
    """Gives modules of a model their weights while they compute, and notes their gradients."""

    values: Values
    own: Mapping[str, Tensor]
    device: torch.device
    anatomy: Anatomy
    gradients: Fingerprints

    def on_demand(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """A forward pass that computes again for its backward pass, so that no weight is kept."""
        forward = module.forward
        # Without an input that has a gradient, as the embedding's, nothing would be computed backward.
        seed = torch.zeros((), requires_grad=True)

        def call(*inputs: Any, **options: Any) -> Any:
            # Each tensor is an argument by itself: checkpoint sees no others.
            leaves, form = tree_flatten((inputs, options))

            def compute(_: Tensor, *leaves: Any) -> Any:
                self._fill(path, module)
                inputs, options = tree_unflatten(leaves, form)
                outputs = forward(*inputs, **options)
                _drop(module)
                return tuple(outputs) if isinstance(outputs, list) else outputs  # autograd looks into tuples

            return checkpoint(compute, seed, *leaves, use_reentrant=True, preserve_rng_state=False)

        return call

    def _fill(self, path: str, module: nn.Module) -> None:
        state = module.state_dict(prefix=f"{path}.")
        tensors = dict(self.values({name: tensor for name, tensor in state.items() if name not in self.own}))
        tensors |= {name: self.own[name] for name in state if name in self.own}
        inside = {name.removeprefix(f"{path}."): tensor.to(self.device) for name, tensor in tensors.items()}
        module.load_state_dict(inside, assign=True, strict=False)
        for name, parameter in list(module.named_parameters(prefix=path)):
            # A parameter of another layer may be the same tensor, and is not to get a gradient.
            leaf = nn.Parameter(parameter.detach(), requires_grad=parameter.is_floating_point())
            owner, _, attribute = name.removeprefix(f"{path}.").rpartition(".")
            module.get_submodule(owner)._parameters[attribute] = leaf
            if leaf.requires_grad:
                note = partial(self._note, name)
                leaf.register_hook(note)  # type: ignore[no-untyped-call]

    def _note(self, name: str, gradient: Tensor) -> None:
        name = canonical(name, self.anatomy)
        _add(self.gradients, name, fingerprint(name, gradient))


def _drop(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def canonical(name: str, anatomy: Anatomy) -> str:
    """The one name of a parameter: a tied unembedding's weight is the embedding's."""
    same = anatomy.tied and name == f"{anatomy.unembedding}.weight"
    return f"{anatomy.embedding}.weight" if same else name


def _add(gradients: Fingerprints, name: str, summand: Fingerprint) -> None:
    gradients[name] = gradients.get(name, _ZERO).plus(summand)


def check_layers(engine: Any, pretrained: Pretrained, num_positions: int, own_inputs: Sequence[str]) -> None:
    """Compares the pipeline's logits and gradients with the model's, and repeated gradients.

    All ranks must call it. Gradients are those of ordinary backpropagation, of the weights that train.
    Kernels whose backward passes cannot be repeated are refused if they would be. ``num_positions`` has the
    job's longest sequence; ``own_inputs`` are names of the tensors for stage 0.
    """
    inputs = probe(pretrained, own_inputs, num_positions)
    fed = inputs if len(inputs) > 1 else inputs[0]
    by_name = dict(zip(own_inputs, inputs, strict=True))
    batch = fed, labels_for(pretrained, by_name)
    outputs = engine.eval_batch(iter([batch]), compute_loss=False, num_micro_batches=1)
    blueprint = pretrained.blueprint()
    own_gradients: Fingerprints = {}
    for name, gradient in engine.global_gradients(iter([batch])).items():
        full = name.removeprefix(f"tied_modules.{TIE}.") if "tied" in name else name.partition(".")[2]
        full = canonical(full, blueprint.skeleton.anatomy)
        own_gradients[full] = fingerprint(full, gradient)
    by_stage = dict(gather((engine.stage_id, own_gradients)))  # replicas have the same
    engine.check_walks(iter([batch]))  # may fail on one rank: after it no rank waits for another
    if not engine.is_last_stage():
        return
    layers = [module for module in engine.module.modules() if isinstance(module, HFLayer)]
    own = {name: tensor for layer in layers for name, tensor in layer.state_dict().items()}
    by_name = {name: tensor.to(engine.device) for name, tensor in by_name.items()}
    values = blueprint.values
    if pretrained.four_bits is not None:
        values, own = pretrained.four_bits.rounded(blueprint), {}
    expected, gradients = reference(pretrained, by_name, values, own)
    compare(first_tensor(outputs[0]), expected, by_name, pretrained)
    known = blueprint.parameters().keys()  # adapters are not among them
    of_all: Fingerprints = {}
    for name, summand in (pair for some in by_stage.values() for pair in some.items() if pair[0] in known):
        _add(of_all, name, summand)
    compare_gradients(of_all, gradients, pretrained)


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


def compare_gradients(got: Fingerprints, expected: Fingerprints, pretrained: Pretrained) -> float:
    """The largest difference over its gradient's norm; ConfigError beyond the tolerance.

    ``got`` has some of the parameters. One that is not in ``expected`` has no gradient in the whole model.
    """
    least = _SMALL * math.hypot(*(each.norm for each in expected.values()))
    tolerance = _LESS_EXACT * _TOLERANCE.get(pretrained.dtype, _HALF_TOLERANCE / 10)
    largest = 0.0
    for name, own in got.items():
        whole = expected.get(name, _ZERO)
        difference = max(abs(one - two) for one, two in zip(own.views, whole.views, strict=True))
        relative = difference / max(whole.norm, least, torch.finfo(torch.float32).tiny)
        if not relative <= tolerance:
            raise ConfigError(
                f"--model {pretrained.name}: cut into pipeline layers, {type(pretrained.config).__name__} "
                f"does not learn what it does whole: the gradient of {name} has norm {own.norm:.6g}, the "
                f"model's {whole.norm:.6g}, and they differ by {relative:.2g} of it (allowed {tolerance:g}); "
                "it has parts that its forward does not show"
            )
        largest = max(largest, relative)
    return largest
