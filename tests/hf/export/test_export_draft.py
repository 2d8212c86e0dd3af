"""A draft computes what its blocks and its head compute in the pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tiny_model, tiny_tokenizer
from finetuned_checkpoints import layers_of, make_heads, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.draft import export_draft
from ds_interlock.schedule.plan import GradientFlowPlan
from experiments.assisted import answer, measure

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
NORM_LINEAR = {"type": "norm_linear"}
LENS = {"type": "lens", "translator": "after_norm"}


def local_plan(model: Any) -> GradientFlowPlan:
    """Heads after blocks 0 and 2."""
    return GradientFlowPlan.local(stage_bounds=[0, 2, 4, len(layers_of(model))])


def after_blocks(model: Any, num_blocks: int) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(IDS, output_hidden_states=True).hidden_states[num_blocks]
    return hidden


def load(folder: Path, **options: Any) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def assert_is(draft: Any, head: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(draft(IDS).logits, head(hidden), rtol=1e-5, atol=1e-5)


def soft_cap(logits: Tensor) -> Tensor:
    return 2.0 * torch.tanh(logits / 2.0)


@pytest.mark.parametrize("head", [NORM_LINEAR, LENS], ids=["norm_linear", "lens"])
@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "opt", "gemma2", "gpt_neox", "qwen2"])
def test_blocks_and_head_by_hand(family: str, head: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    plan = local_plan(model)
    heads = make_heads(model, plan, (soft_cap,) if family == "gemma2" else (), **head)
    step = write_checkpoint(tmp_path / "checkpoints", model, plan, heads, tokenizer=tiny_tokenizer())
    for num_stages, num_blocks in ((1, 1), (2, 3)):
        report = export_draft(step, tmp_path / "draft", num_stages)
        draft = load(tmp_path / "draft")
        assert type(draft) is type(model)
        assert draft.config.num_hidden_layers == num_blocks
        assert not draft.config.tie_word_embeddings
        assert_is(draft, heads[num_stages - 1], after_blocks(model, num_blocks))
        assert f"blocks 0 to {num_blocks - 1} of 4, with head {num_stages - 1}" in str(report)
    assert AutoTokenizer.from_pretrained(tmp_path / "draft").decode(IDS[0]) == tiny_tokenizer().decode(IDS[0])


def test_a_temperature_goes_into_the_unembedding(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    heads = make_heads(model, local_plan(model), type="shared")
    nn.init.constant_(heads[1].readout.temperature.log_scale, 0.5)
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    export_draft(step, tmp_path / "draft", 2)
    assert_is(load(tmp_path / "draft"), heads[1], after_blocks(model, 3))


def test_a_translators_bias_goes_into_the_norm(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    heads = make_heads(model, local_plan(model), **LENS)
    assert heads[1].readout.translator.change.bias.abs().max() > 0.05
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    export_draft(step, tmp_path / "draft", 2)
    draft = load(tmp_path / "draft")
    assert not torch.allclose(draft.transformer.ln_f.bias, heads[1].readout.norm.bias, atol=0.01)
    assert_is(draft, heads[1], after_blocks(model, 3))


def test_a_translators_bias_goes_into_an_unembeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    config = PhiConfig(vocab_size=VOCABULARY, hidden_size=32, **sizes, eos_token_id=2, bos_token_id=1)
    model = PhiForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    heads = make_heads(model, local_plan(model), **LENS)
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    export_draft(step, tmp_path / "draft", 1)
    draft = load(tmp_path / "draft")
    assert torch.equal(draft.model.final_layernorm.bias, heads[0].readout.norm.bias)
    assert_is(draft, heads[0], after_blocks(model, 1))


def test_a_head_inside_a_stage(tmp_path: Path) -> None:
    model = tiny_model("gpt2", n_layer=6)
    plan = GradientFlowPlan.n_wise(None, 1.5, stage_bounds=[0, 2, 6, 9])
    heads = make_heads(model, plan, **NORM_LINEAR)
    assert [(head.stage, head.after_layer) for head in plan.heads] == [(1, 4), (2, 8), (2, 9)]
    step = write_checkpoint(tmp_path / "checkpoints", model, plan, heads)
    export_draft(step, tmp_path / "draft", 2, head=0)
    assert_is(load(tmp_path / "draft"), heads[0], after_blocks(model, 3))


def test_lists_with_an_entry_a_block_are_cut(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.config.eos_token_id = [2, 3, 4, 5]
    heads = make_heads(model, local_plan(model), **NORM_LINEAR)
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    export_draft(step, tmp_path / "draft", 2)
    config = load(tmp_path / "draft").config
    assert len(model.config.layer_types) == 4
    assert config.layer_types == model.config.layer_types[:3]
    assert config.eos_token_id == [2, 3, 4, 5]


def test_a_draft_in_another_form(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    heads = {loss: head.bfloat16() for loss, head in make_heads(model, local_plan(model), **LENS).items()}
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    export_draft(step, tmp_path / "draft", 2)
    assert load(tmp_path / "draft").dtype == torch.bfloat16
    export_draft(step, tmp_path / "wide", 2, dtype=torch.float32, max_shard_size="30KB")
    assert len(list((tmp_path / "wide").glob("model-*.safetensors"))) > 2
    wide = load(tmp_path / "wide")
    assert wide.dtype == torch.float32
    # Folded in float64 and rounded once, to the form asked for.
    assert_is(wide, heads[1].float(), after_blocks(model.float(), 3))


# As an assistant.


def test_a_draft_assists_the_whole_model(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    plan = GradientFlowPlan.local(stage_bounds=[0, 2, len(layers_of(model))])
    heads = make_heads(model, plan, **LENS)
    step = write_checkpoint(tmp_path / "checkpoints", model, plan, heads, tokenizer=tiny_tokenizer())
    export_draft(step, tmp_path / "draft", 1)
    draft, prompts = load(tmp_path / "draft"), [ids[None] for ids in IDS]
    for prompt in prompts:
        alone, assisted = (answer(model, prompt, 20, assistant) for assistant in (None, draft))
        assert torch.equal(alone, assisted)
    found = measure(model, draft, prompts, 20)
    assert found["same_answers"] == 2
    assert found["passes_of_the_model_alone"] == found["new_tokens"] == 40
    assert 0 < found["share_accepted"] < 1
    assert found["passes_of_the_model_assisted"] < 40


# What cannot be a draft.


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("head", "why"),
    [
        ({"type": "linear"}, "no norm before its unembedding .*type linear"),
        ({"type": "low_rank", "rank": 3}, "type low_rank"),
        ({"type": "norm_linear", "blocks": 1}, r"interlock\.head\.blocks"),
        ({"type": "lens", "translator": "before_norm"}, r'interlock\.head\.translator "before_norm"'),
    ],
    ids=["linear", "low_rank", "blocks", "lens before the norm"],
)
def test_heads_of_another_form_are_refused(head: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    heads = make_heads(model, local_plan(model), **head)
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    with pytest.raises(
        ConfigError, match=f"head 1 .*{why}.*norm_linear or shared, or a lens with .*after_norm"
    ):
        export_draft(step, tmp_path / "draft", 2)
    assert not (tmp_path / "draft").exists()


@pytest.mark.bad_input
def test_a_users_own_head_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    heads = {0: nn.Linear(32, VOCABULARY)}
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    with pytest.raises(ConfigError, match="head 0 is the user's own: it has weight, bias"):
        export_draft(step, tmp_path / "draft", 1)


@pytest.mark.bad_input
def test_a_bias_that_nothing_takes_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    heads = make_heads(model, local_plan(model), **LENS)
    heads[0].readout.translator.change.bias = nn.Parameter(torch.ones(32))
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    with pytest.raises(ConfigError, match="neither norm nor unembedding of the model has one"):
        export_draft(step, tmp_path / "draft", 1)


@pytest.mark.bad_input
def test_a_singular_translator_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    heads = make_heads(model, local_plan(model), **LENS)
    heads[0].readout.translator.change.weight = nn.Parameter(-torch.eye(32))
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    with pytest.raises(ConfigError, match="head 0: its translator is singular"):
        export_draft(step, tmp_path / "draft", 1)


@pytest.mark.bad_input
@pytest.mark.parametrize(("num_stages", "head"), [(3, None), (9, None), (1, 1), (2, 7), (3, 2)])
def test_heads_that_are_not_there_are_listed(num_stages: int, head: int | None, tmp_path: Path) -> None:
    model = tiny_model("llama")
    heads = make_heads(model, local_plan(model), **NORM_LINEAR)
    step = write_checkpoint(tmp_path / "checkpoints", model, local_plan(model), heads)
    listed = r"head 0 in stage 0 after layer 1 .*, head 1 in stage 1 after layer 3 \(--stages 2 --head 1\)"
    with pytest.raises(ConfigError, match=f"--stages {num_stages}.*no such auxiliary head.*{listed}"):
        export_draft(step, tmp_path / "draft", num_stages, head)


@pytest.mark.bad_input
def test_a_global_job_has_no_heads(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = GradientFlowPlan.end_to_end(stage_bounds=[0, 3, 7])
    step = write_checkpoint(tmp_path / "checkpoints", model, plan)
    with pytest.raises(ConfigError, match="no auxiliary heads at all: it was trained in global mode"):
        export_draft(step, tmp_path / "draft", 1)


@pytest.mark.bad_input
def test_a_head_after_no_block_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = GradientFlowPlan.local(stage_bounds=[0, 1, 7])
    step = write_checkpoint(tmp_path / "checkpoints", model, plan, make_heads(model, plan, **NORM_LINEAR))
    with pytest.raises(ConfigError, match="after 0 of 4 blocks"):
        export_draft(step, tmp_path / "draft", 1)
