"""Adapters leave the pipeline as peft knows them, or merged as peft merges them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer
from finetuned_checkpoints import layers_of, make_heads, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.draft import export_draft
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model.anatomy import find_anatomy
from ds_interlock.schedule.plan import GradientFlowPlan

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
PLAN = GradientFlowPlan.local(stage_bounds=[0, 2, 4, 7])
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["v_proj"]},
    "some layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
    "whole norms": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}


class Job:
    """A tiny Llama with trained adapters, and its checkpoint."""

    def __init__(self, folder: Path, variant: str, family: str = "llama", **head: Any) -> None:
        self.base = tiny_model(family)
        config = LoraConfig(task_type="CAUSAL_LM", **VARIANTS[variant])
        self.model: Any = get_peft_model(copy.deepcopy(self.base), config).eval()
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn_like(parameter)
        self.heads = make_heads(self.base, PLAN, **head) if head else {}
        inner = self.model.base_model.model
        self.step = write_checkpoint(
            folder / "checkpoints",
            inner,
            PLAN,
            self.heads,
            peft=config.to_dict(),
            base_model="team/base",
            tokenizer=tiny_tokenizer(),
        )

    def logits(self) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.model(IDS).logits
        return result


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_the_adapter_on_the_base_model(variant: str, tmp_path: Path) -> None:
    job = Job(tmp_path, variant)
    assert not torch.allclose(job.logits(), logits(job.base), atol=1e-3)
    report = export_model(job.step, tmp_path / "out")
    assert "adapter of team/base" in str(report)
    loaded = PeftModel.from_pretrained(job.base, tmp_path / "out")
    assert torch.equal(logits(loaded), job.logits())
    assert report.num_parameters == sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "team/base"
    assert config["inference_mode"]
    assert config["r"] == VARIANTS[variant]["r"]
    assert not (tmp_path / "out" / "config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(IDS[0]) == tiny_tokenizer().decode(IDS[0])


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "whole norms"])
@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_merged_as_peft_merges(variant: str, family: str, tmp_path: Path) -> None:
    job = Job(tmp_path, variant, family)
    files = {file: file.read_bytes() for file in job.step.iterdir()}
    export_model(job.step, tmp_path / "out", merge_adapter=True)
    exported, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert exported.config.tie_word_embeddings == (family == "llama, tied")
    torch.testing.assert_close(logits(exported), job.logits(), rtol=1e-5, atol=1e-5)
    expected = job.model.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.state_dict().items())
    assert files == {file: file.read_bytes() for file in job.step.iterdir()}


def test_a_draft_has_its_adapters_merged(tmp_path: Path) -> None:
    job = Job(tmp_path, "whole norms", type="norm_linear")
    export_draft(job.step, tmp_path / "draft", 2)
    merged = job.model.merge_and_unload()
    with torch.no_grad():
        expected = job.heads[1](merged(IDS, output_hidden_states=True).hidden_states[3])
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    torch.testing.assert_close(logits(draft), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_unembedding_of_its_own_stays_tied(tmp_path: Path) -> None:
    """Nothing is trained apart if both are frozen: the unembedding is then a layer like any other."""
    job = Job(tmp_path, "lora", "llama, tied")
    assert len(layers_of(job.base)) == 7
    weight = {"lm_head.weight": job.base.model.embed_tokens.weight.detach().clone()}
    torch.save(weight, job.step / "layer_06-model_states.pt")
    assert not export_model(job.step, tmp_path / "out", merge_adapter=True).notes
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    torch.testing.assert_close(logits(exported), job.logits(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_new_classifier_goes_with_the_adapters(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, num_labels=2)
    trained = copy.deepcopy(base)
    config = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "dense"] if family != "llama" else ["q_proj"]
    )
    anatomy = find_anatomy(trained)
    for block in trained.get_submodule(anatomy.blocks):  # as the layers of a pipeline get them
        inject_adapter_in_model(config, block)
    ends = [parameter for path in anatomy.end for parameter in trained.get_submodule(path).parameters()]
    adapters = [parameter for name, parameter in trained.named_parameters() if "lora_" in name]
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (*ends, *adapters):
            parameter += 0.2 * torch.randn_like(parameter)
    plan = GradientFlowPlan.local(stage_bounds=[0, 3, len(layers_of(trained))])
    step = write_checkpoint(tmp_path / "checkpoints", trained, plan, peft=config.to_dict())
    report = export_model(step, tmp_path / "adapter")
    assert report.num_parameters == sum(parameter.numel() for parameter in (*ends, *adapters))
    export_model(step, tmp_path / "merged", merge_adapter=True)
    expected = logits(trained)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.bad_input
def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    job = Job(tmp_path, "lora")
    file = job.step / "layer_02-model_states.pt"
    state = torch.load(file)
    name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    torch.save({key: tensor for key, tensor in state.items() if key != name}, file)
    with pytest.raises(ConfigError, match=f"lacks weights of its adapter: {name}"):
        export_model(job.step, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"missing: {name}"):
        export_model(job.step, tmp_path / "out", merge_adapter=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.bad_input
def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    job = Job(tmp_path, "lora")
    for options in ({"heads": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(ConfigError, match="go with --merge_adapter"):
            export_model(job.step, tmp_path / "out", **options)
