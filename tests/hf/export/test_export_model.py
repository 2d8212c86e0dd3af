"""What export writes is the model that the checkpoint holds, bit for bit, as transformers writes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer
from finetuned_checkpoints import layers_of, make_heads, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.model import export_model
from ds_interlock.schedule.plan import GradientFlowPlan

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def plan_for(model: Any) -> GradientFlowPlan:
    return GradientFlowPlan.local(stage_bounds=[0, 2, 4, len(layers_of(model))])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def load(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def saved(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    "family",
    ["llama", "llama, tied", "gpt2", "opt", "opt, projected", "gemma2", "gpt_neox", "mixtral", "bert"],
)
def test_it_is_what_transformers_would_have_saved(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model))
    report = export_model(step, tmp_path / "out")
    model.save_pretrained(tmp_path / "expected")
    found, expected = saved(tmp_path / "out"), saved(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    texts, expected_texts = (
        {file.name: file.read_text() for file in folder.glob("*.json")}
        for folder in (tmp_path / "out", tmp_path / "expected")
    )
    assert texts == expected_texts
    exported = load(tmp_path / "out", type(model))
    assert torch.equal(logits(exported), logits(model))
    assert report.num_parameters == sum(parameter.numel() for parameter in exported.parameters())
    assert not report.notes


def test_the_latest_checkpoint_and_what_belongs_to_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(max_new_tokens=17, eos_token_id=2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    write_checkpoint(tmp_path / "checkpoints", model, plan_for(model), tokenizer=tokenizer)
    export_model(tmp_path / "checkpoints", tmp_path / "out")
    assert load(tmp_path / "out").generation_config.max_new_tokens == 17
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.encode("of stages") == tokenizer.encode("of stages")
    assert loaded.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"
    assert not (tmp_path / "out" / "interlock.json").exists()


# Tied embeddings.


def test_embeddings_trained_apart_are_untied(tmp_path: Path) -> None:
    model = tiny_model("llama, tied")
    own = torch.randn_like(model.lm_head.weight).detach()
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model), last_copy=own)
    report = export_model(step, tmp_path / "out")
    assert "tie_word_embeddings false" in str(report)
    exported = load(tmp_path / "out")
    assert not exported.config.tie_word_embeddings
    model.lm_head.weight = nn.Parameter(own)
    assert torch.equal(logits(exported), logits(model))
    assert torch.equal(exported.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("where", ["last stage", "layer"])
def test_copies_that_are_equal_stay_tied(where: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    copy = model.lm_head.weight.detach().clone()
    if where == "layer":  # a frozen unembedding is a layer of its own
        model.lm_head.weight = nn.Parameter(copy)
    last_copy = copy if where == "last stage" else None
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model), last_copy=last_copy)
    report = export_model(step, tmp_path / "out")
    assert not report.notes
    assert "lm_head.weight" not in saved(tmp_path / "out")
    exported = load(tmp_path / "out")
    assert exported.lm_head.weight is exported.transformer.wte.weight
    assert torch.equal(logits(exported), logits(model))


# Form.


def test_bfloat16_stays_or_is_converted(tmp_path: Path) -> None:
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model))
    export_model(step, tmp_path / "same")
    export_model(step, tmp_path / "wide", dtype=torch.float32)
    assert load(tmp_path / "same").dtype == torch.bfloat16
    wide = load(tmp_path / "wide")
    assert wide.dtype == torch.float32
    for name, tensor in load(tmp_path / "same").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert torch.equal(tensor.float(), wide.state_dict()[name])


def test_large_models_are_split(tmp_path: Path) -> None:
    model = tiny_model("llama")
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model))
    export_model(step, tmp_path / "out", max_shard_size="40KB")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 40_000 for file in files)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_heads_are_kept_beside_it_on_request(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = plan_for(model)
    heads = make_heads(model, plan, type="low_rank", rank=3)
    step = write_checkpoint(tmp_path / "checkpoints", model, plan, heads)
    export_model(step, tmp_path / "without")
    assert not (tmp_path / "without" / "heads.safetensors").exists()
    report = export_model(step, tmp_path / "out", heads=True)
    expected = {f"heads.{i}.{name}": t for i, head in heads.items() for name, t in head.state_dict().items()}
    with safe_open(tmp_path / "out" / "heads.safetensors", "pt") as file:
        assert set(file.keys()) == expected.keys()
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in expected.items())
        places = {name: value for name, value in file.metadata().items() if name != "format"}
    assert places == {
        "heads.0.stage": "0",
        "heads.0.after_layer": "2",
        "heads.1.stage": "1",
        "heads.1.after_layer": "4",
    }
    assert report.num_bytes == sum(t.nbytes for t in (*expected.values(), *saved(tmp_path / "out").values()))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_no_heads_is_said(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = GradientFlowPlan.end_to_end(stage_bounds=[0, 3, 7])
    step = write_checkpoint(tmp_path / "checkpoints", model, plan)
    assert "no auxiliary heads" in str(export_model(step, tmp_path / "out", heads=True))
    assert not (tmp_path / "out" / "heads.safetensors").exists()


# What is wrong with a checkpoint.


@pytest.mark.bad_input
def test_tensors_that_are_not_the_models_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model))
    file = step / "layer_02-model_states.pt"
    state = dict(torch.load(file))
    state["model.layers.1.self_attn.q_norm.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    state["model.layers.1.input_layernorm.weight"] = torch.ones(33)
    torch.save(state, file)
    with pytest.raises(ConfigError) as caught:
        export_model(step, tmp_path / "out")
    for part in (
        "LlamaForCausalLM",
        "missing: model.layers.1.mlp.up_proj.weight",
        "unknown to the architecture: model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.input_layernorm.weight is [33], expected [32]",
    ):
        assert part in str(caught.value)
    (step / "layer_02-model_states.pt").unlink()
    with pytest.raises(ConfigError, match=r"missing: .*model\.layers\.1\..* and 4 more"):
        export_model(step, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.bad_input
def test_copies_of_something_else_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama, tied")
    step = write_checkpoint(
        tmp_path / "checkpoints", model, plan_for(model), last_copy=model.lm_head.weight.detach()
    )
    file = step / "interlock_stage_02.pt"
    torch.save({**torch.load(file), "tied_modules": {"embedding.wte.weight": torch.ones(1)}}, file)
    with pytest.raises(ConfigError, match=r"copies of wte\.weight; expected model\.embed_tokens\.weight"):
        export_model(step, tmp_path / "out")


@pytest.mark.bad_input
def test_damaged_files_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model))
    file = step / "layer_03-model_states.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ConfigError, match=r"layer_03-model_states\.pt cannot be read .* damaged or incomplete"
    ):
        export_model(step, tmp_path / "out")


@pytest.mark.bad_input
def test_what_is_missing_or_wrong_in_hf_is_said(tmp_path: Path) -> None:
    model = tiny_model("llama")
    step = write_checkpoint(tmp_path / "checkpoints", model, plan_for(model))
    description = tmp_path / "checkpoints" / "hf" / "interlock.json"
    text = description.read_text()

    def raises(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            export_model(step, tmp_path / "out")

    description.write_text(
        text.replace('"num_blocks": 4', '"num_blocks": 0').replace('"embedding"', '"bedding"')
    )
    raises(r"interlock\.json is not a description of a fine-tuned model: 3 faults")
    description.write_text(text.replace("LlamaForCausalLM", "LamaForCausalLM"))
    raises("has no LamaForCausalLM")
    description.write_text(text)
    description.unlink()
    raises(r"interlock\.json: cannot read .*; launcher/finetune\.py writes it")
    description.write_text(text)
    with pytest.raises(ConfigError, match="has no adapter"):
        export_model(step, tmp_path / "out", merge_adapter=True)
    (description.parent / "config.json").write_text("{")
    raises(r"config\.json cannot be read")
    assert not (tmp_path / "out").exists()
