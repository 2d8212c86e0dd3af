"""Every decoder that transformers can build: cut exactly and exported, or refused for a known reason.

The families are those of transformers' own mapping, tiny and random. `make slow` tries all of them.
"""

import copy
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from every_family import tiny
from test_cut import PLAIN, batch, cross_entropy, gradients_by_name, in_process, lm_labels
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from ds_interlock import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.checkpoint import DESCRIPTION_FILE
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model.cut import Blueprint
from ds_interlock.hf.model.pretrained import empty_model
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.jobs.hugging_face import check_heads_fit, describe_for_export

DOCS = Path(__file__).parents[3] / "docs" / "finetune.md"

REFUSED = {
    "it is no text model": (
        *("gemma3", "gemma3n", "git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize"),
        *("phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    ),
    "has weights of its own": ("hrm_text", "reformer", "xlnet", "zaya"),
    "its forward stops at stand-ins": ("gemma4", "prophetnet", "xlm"),
    "no hidden state [batch, position, width]": ("cpmant",),
    "does not get what the block before it returned": ("gemma3n_text",),
    "gets more than what the last block": ("inkling2_text",),
    "returns less than the next block expects": ("rwkv",),
    "its configuration has no hidden_size": ("blt",),
}
"""Families by the reason, a part of the message."""
WITHOUT_BLOCKS = {*REFUSED["it is no text model"], "gemma4", "xlm", "blt", "hrm_text"}
"""Those without a list of blocks: not text alone, or not one list that is called once, in order."""
NOT_BUILT = {
    "dots3_note": "adapter_in_dim must match hidden_size",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "gemma4_unified_assistant": "set of layer types producing a cache",
    "musicgen": "no attribute 'dropout'",
    "musicgen_melody": "no attribute 'dropout'",
    "zamba": "issue with your definition of `tie_weights_keys`",
}
"""What transformers raises, in part, when it builds or runs the tiny model."""
QUICK = ("bert", "bamba", "ctrl", "minicpm3", "deepseek_v4", "gemma4_text", "hy_v4", "inkling2_text")
"""Each has a form that others lack; tried with all other tests."""

reason_of = {family: reason for reason, families in REFUSED.items() for family in families}
tried = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.minutes)
    for family in FAMILIES
    if family not in NOT_BUILT
]


def tiny_decoder(family: str) -> tuple[Any, Any]:
    """A random model and its configuration."""
    config = tiny(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero or one by chance
            parameter.add_((0.1 if parameter.dim() == 1 else 0.02) * torch.randn_like(parameter))
    return model, config


def loss_of(model: Any) -> torch.Tensor:
    given = batch(PLAIN)
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return cross_entropy(model(**given, **options).logits, lm_labels(given))


def cut(model: Any, config: Any) -> tuple[nn.Module, Blueprint]:
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    blueprint = Blueprint(
        Skeleton(empty_model(config, "causal", torch.float32)),
        lambda wanted: {name: tensors[name].clone() for name in wanted if name in tensors},
        PLAIN,
    )
    return in_process(blueprint), blueprint


def step(net: Any) -> float:
    given = batch(PLAIN)
    return float(net.accumulate_gradients([(given["input_ids"], lm_labels(given))])[0])


def cut_and_step(family: str) -> None:
    Skeleton(empty_model(tiny(family), "causal", torch.float32))  # what cannot be cut need not be built
    net, _ = cut(*tiny_decoder(family))
    step(net)


def export(net: nn.Module, blueprint: Blueprint, config: Any, folder: Path) -> Any:
    """The weights of the stages, as transformers reads the model that is exported of their checkpoint."""
    checkpoint, states = folder / "checkpoints" / "global_step1", defaultdict[int, dict[str, Any]](dict)
    for name, tensor in net.state_dict().items():
        number, _, own_name = name.partition(".")
        states[int(number)][own_name] = tensor
    checkpoint.mkdir(parents=True)
    for number, state in states.items():
        torch.save(state, checkpoint / f"layer_{number:02}-model_states.pt")
    config.save_pretrained(checkpoint.parent / "hf")
    description = describe_for_export(cast(Any, SimpleNamespace(name="base")), blueprint)
    (checkpoint.parent / "hf" / DESCRIPTION_FILE).write_text(description.model_dump_json())
    export_model(checkpoint, folder / "out")
    load = getattr(transformers, description.architecture).from_pretrained
    model, report = load(folder / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("family", tried)
def test_a_decoder_is_cut_exactly_or_refused_for_a_known_reason(family: str, tmp_path: Path) -> None:
    if family in reason_of:
        with pytest.raises(ConfigError, match=re.escape(reason_of[family])):
            cut_and_step(family)
        return
    model, config = tiny_decoder(family)
    loss = loss_of(model.train())
    loss.backward()
    net, blueprint = cut(model, config)
    exported, own = export(net, blueprint, config, tmp_path).state_dict(), model.state_dict()
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in own.items())
    assert step(net) == loss.item()
    got = gradients_by_name(net)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, same in names.items():
        if parameter.grad is not None:
            gradient = next(got[name] for name in same if name in got)
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("family", "blocks", "why"),
    [
        ("deepseek_v4", 0, "several hidden states at each position"),
        ("ctrl", 0, "a bias beside its tied weight"),
        ("roformer", 1, "need more than a hidden state"),
    ],
)
def test_models_without_heads(family: str, blocks: int, why: str) -> None:
    skeleton = Skeleton(empty_model(tiny(family), "causal", torch.float32))
    with pytest.raises(ConfigError, match=why):
        check_heads_fit(Blueprint(skeleton, dict, tie=family != "roformer"), HeadConfig(blocks=blocks))


@pytest.mark.minutes
@pytest.mark.parametrize("family", NOT_BUILT)
def test_what_transformers_does_not_build_or_run(family: str) -> None:
    with pytest.raises(Exception, match=re.escape(NOT_BUILT[family])):
        loss_of(tiny_decoder(family)[0])


def test_the_page_says_how_many_families_are_cut() -> None:
    num_cut = len(FAMILIES) - len(NOT_BUILT) - len(reason_of)
    num_with_blocks = num_cut + len(reason_of.keys() - WITHOUT_BLOCKS)
    assert num_cut >= 0.95 * num_with_blocks
    assert {*NOT_BUILT, *reason_of} <= FAMILIES.keys()
    page = " ".join(DOCS.read_text().split())
    version = f"the {len(FAMILIES)} decoder families of transformers {transformers.__version__}"
    assert f"Of {version}, {num_cut} are cut exactly" in page
    assert f"{num_cut} of the {num_with_blocks} with a list of blocks" in page
    assert f"{len(NOT_BUILT)} cannot be built" in page
