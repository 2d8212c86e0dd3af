"""Pipeline layers of a Hugging Face model compute what the model does: forward and gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from families import DECODERS, ENCODERS, NUM_BLOCKS, VOCABULARY, save_tiny, tiny_config, tiny_model
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan
from ds_interlock.errors import ConfigError
from ds_interlock.heads.lm_loss import lm_loss
from ds_interlock.hf.model.anatomy import find_anatomy
from ds_interlock.hf.model.check import compare, compare_gradients, fingerprint, labels_for, probe, reference
from ds_interlock.hf.model.cut import Blueprint, build_all
from ds_interlock.hf.model.pretrained import Pretrained, empty_model, open_pretrained
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.stage.in_process import InProcessPipeline

PLAIN = ("input_ids",)
PADDED = ("input_ids", "attention_mask")
PACKED = ("input_ids", "position_ids")
CANNOT_PACK = {"opt", "opt, projected", "bloom"}  # their masks do not look at positions


def blueprint_of(model: Any, inputs: tuple[str, ...] = PLAIN) -> Blueprint:
    """A blueprint with the weights of a whole model."""
    task = "causal" if model.get_output_embeddings() else "classification"
    skeleton = Skeleton(empty_model(copy.deepcopy(model.config), task, model.dtype))
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Blueprint(skeleton, lambda names: {n: tensors[n].clone() for n in names if n in tensors}, inputs)


def batch(inputs: tuple[str, ...], length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    positions = torch.arange(length).repeat(2, 1)
    positions[0, 7:] -= 7
    everything = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: everything[name] for name in inputs}


def lm_labels(given: dict[str, Tensor]) -> Tensor:
    labels = given["input_ids"].roll(-1, 1)
    labels[:, -1] = -100
    return labels.masked_fill(given.get("attention_mask", torch.ones_like(labels)) == 0, -100)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).double(), labels.flatten())


def in_process(blueprint: Blueprint, num_stages: int = 3) -> InProcessPipeline:
    specs = blueprint.layers()
    bounds = [len(specs) * stage // num_stages for stage in range(num_stages + 1)]
    return InProcessPipeline(
        build_all(specs), cross_entropy, GradientFlowPlan.end_to_end(stage_bounds=bounds)
    )


def gradients_by_name(net: nn.Module) -> dict[str, Tensor]:
    """Gradients under Hugging Face's names: those of the pipeline behind the layer's number."""
    return {name.split(".", 1)[1]: p.grad for name, p in net.named_parameters() if p.grad is not None}


MIXTURES = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"}
SINGLE_ONLY = MIXTURES  # torch's grouped products know no float64
CASES = [
    (family, inputs)
    for family in DECODERS
    for inputs in (PLAIN, PADDED, PACKED)
    if inputs != PACKED or family not in CANNOT_PACK
    if family not in MIXTURES or inputs == PACKED  # test_routing.py has the others
]


@pytest.mark.parametrize(
    ("family", "inputs"), CASES, ids=lambda part: part if isinstance(part, str) else part[-1]
)
def test_a_decoder_in_three_stages_has_the_whole_models_loss_and_gradients(
    family: str, inputs: tuple[str, ...]
) -> None:
    exact = family not in SINGLE_ONLY
    model = tiny_model(family, dtype=torch.float64 if exact else torch.float32)
    given = batch(inputs)
    labels = lm_labels(given)
    expected = cross_entropy(model(**given, use_cache=False).logits, labels)
    expected.backward()
    net = in_process(blueprint_of(model, inputs))
    fed = tuple(given.values())
    losses = net.accumulate_gradients([(fed if len(fed) > 1 else fed[0], labels)])
    tolerance = 1e-10 if exact else 1e-6
    assert losses[0].item() == pytest.approx(expected.item(), abs=tolerance)
    got = gradients_by_name(net)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], parameter.grad, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_a_classifier_in_three_stages_has_the_whole_models_loss_and_gradients(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64, num_labels=3)
    given, labels = batch(PADDED), torch.tensor([2, 0])
    given["input_ids"][given["attention_mask"] == 0] = model.config.pad_token_id
    expected = cross_entropy(model(**given).logits, labels)
    expected.backward()
    net = in_process(blueprint_of(model, PADDED))
    losses = net.accumulate_gradients([(tuple(given.values()), labels)])
    assert losses[0].item() == pytest.approx(expected.item(), abs=1e-10)
    got = gradients_by_name(net)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_layers_have_full_names_and_heads_find_the_models_end() -> None:
    blueprint = blueprint_of(tiny_model("gemma2"))
    layers = build_all(blueprint.layers())
    names = [type(layer).__name__ for layer in layers]
    assert names == ["Front", *["Block"] * NUM_BLOCKS, "End", "partial", "Logits"]
    assert "model.layers.1.self_attn.q_proj.weight" in layers[2].state_dict()  # type: ignore[attr-defined]
    assert blueprint_of(tiny_model("llama")).layers()[-1].typename.__name__ == "Unembedding"


def test_dropout_is_the_models_own_in_training_and_off_in_evaluation() -> None:
    config_changes = {"embd_pdrop": 0.9}
    model = tiny_model("gpt2")
    for key, value in config_changes.items():
        setattr(model.config, key, value)
    front = build_all(blueprint_of(model).layers())[0]
    ids = batch(PLAIN)["input_ids"]
    assert isinstance(front, nn.Module)
    front.train()
    assert (front(ids) == 0).float().mean() > 0.5
    front.eval()
    assert torch.equal(front(ids), front(ids))


def test_a_mask_is_made_once_for_the_same_values() -> None:
    skeleton = blueprint_of(tiny_model("llama"), PADDED).skeleton
    hidden, mask = torch.zeros(2, 12, 32), batch(PADDED)["attention_mask"]
    first = skeleton.arguments(0, hidden, {"attention_mask": mask})
    assert skeleton.arguments(0, hidden, {"attention_mask": mask}) is first
    assert skeleton.arguments(0, hidden, {"attention_mask": mask.clone()}) is first
    mask[0, -1] = 0
    assert skeleton.arguments(0, hidden, {"attention_mask": mask}) is not first


CHECKED = [
    *((family, PADDED) for family in ("llama", "gpt2", "gemma2", "opt, projected", "bert", "qwen3")),
    *((family, PACKED) for family in ("llama", "gpt2", "gemma2")),
]


@pytest.mark.parametrize(
    ("family", "inputs"), CHECKED, ids=lambda part: part if isinstance(part, str) else part[-1]
)
def test_the_check_at_load_agrees(family: str, inputs: tuple[str, ...], tmp_path: Path) -> None:
    task = "classification" if family in ("bert", "qwen3") else "causal"
    save_tiny(family, tmp_path, **({"num_labels": 2, "pad_token_id": None} if family == "qwen3" else {}))
    pretrained = open_pretrained(str(tmp_path), task)
    assert pipeline_error(pretrained, inputs) <= 1e-6


@pytest.mark.bad_input
def test_the_check_at_load_refuses_what_does_not_pack(tmp_path: Path) -> None:
    save_tiny("opt", tmp_path)
    with pytest.raises(ConfigError, match="without --packing"):
        pipeline_error(open_pretrained(str(tmp_path)), PACKED)


def pipeline_error(pretrained: Pretrained, inputs: tuple[str, ...]) -> float:
    """The larger difference from the whole model, of logits or of gradients."""
    blueprint = pretrained.blueprint(inputs)
    tensors = probe(pretrained, inputs, 64)
    given = dict(zip(inputs, tensors, strict=True))
    layers = build_all(blueprint.layers())
    hidden: Any = tensors
    for layer in layers:
        hidden = layer(hidden)
    lm_loss()(hidden, labels_for(pretrained, given)).backward()
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    got = {
        name: fingerprint(name, parameter.grad)
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    logits, gradients = reference(pretrained, given, blueprint.values, {})
    of_logits = compare(hidden.detach(), logits, given, pretrained)
    return max(of_logits, compare_gradients(got, gradients, pretrained))


def test_the_check_at_load_notices_a_difference(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    pretrained = open_pretrained(str(tmp_path))
    given = dict(zip(PADDED, probe(pretrained, PADDED, 64), strict=True))
    logits, gradients = reference(pretrained, given, pretrained.blueprint().values, {})
    at_padding = logits.clone()
    at_padding[1, -1] += 1
    assert compare(at_padding, logits, given, pretrained) == 0
    logits_off = logits.clone()
    logits_off[1, 3, 5] += 1e-3
    with pytest.raises(ConfigError, match=r"at \[b, t, v\] = \[1, 3, 5\]"):
        compare(logits_off, logits, given, pretrained)
    name = "model.layers.1.mlp.up_proj.weight"
    assert gradients.keys() == dict(pretrained.new_model().named_parameters()).keys()
    assert compare_gradients({name: gradients[name]}, gradients, pretrained) == 0
    with pytest.raises(ConfigError, match=f"the gradient of {name}"):
        compare_gradients({name: gradients["model.layers.2.mlp.up_proj.weight"]}, gradients, pretrained)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("t5", {}, "encoder-decoder"),
        ("xlm", {"n_layers": 2, "emb_dim": 32}, "no list of modules is called one after the other"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModel

    config = CONFIG_MAPPING[family](vocab_size=VOCABULARY, **changes)
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config)
    with pytest.raises(ConfigError, match=message):
        find_anatomy(model)


@pytest.mark.bad_input
def test_a_configuration_without_a_causal_model_is_refused() -> None:
    from transformers import ViTConfig

    with pytest.raises(ConfigError, match="causal language model of a ViTConfig"):
        empty_model(ViTConfig(), "causal", torch.float32)
    assert tiny_config("llama").num_hidden_layers == NUM_BLOCKS
