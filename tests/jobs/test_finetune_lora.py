"""LoRA and frozen weights in the job ``finetune``: what must not train does not; peft reads what does."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from encoded import samples_of
from finetuning import (
    LOCAL,
    SEQ_LENGTH,
    SGD,
    loss_of,
    rows_of,
    run,
    save_tiny,
    state_of,
    tiny_tokenizer,
)
from peft import PeftModel
from ranks import RankPool
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.rows import ClassifiedRows
from ds_interlock.hf.data.samples import encode_classified
from ds_interlock.hf.data.sources import load_records
from ds_interlock.hf.export.checkpoint import FineTunedCheckpoint, PipelineCheckpoint
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model.four_bits import FourBits
from ds_interlock.jobs import finetune, process
from ds_interlock.jobs.finetune_arguments import FinetuneArguments

LORA = "--lora_r", 3, "--learning_rate", 2e-2, "--max_steps", 4


def causal(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(checkpoints: Path) -> dict[str, torch.Tensor]:
    """All tensors of the layers of the latest checkpoint, by their names in the model."""
    layers = PipelineCheckpoint(checkpoints).layers.values()
    return {name: tensor for state in layers for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama, tied", ("--lora_alpha", 5, "--lora_dropout", 0.3)),
        ("llama", ("--lora_target_modules", r".*\.[023]\.self_attn\.[qv]_proj")),
        ("gpt2", ()),  # has Conv1D layers, and tied embeddings
    ],
    ids=["tied", "some modules", "gpt2"],
)
def test_peft_reads_adapters_and_nothing_else_has_changed(
    family: str, more: tuple[object, ...], ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    base = save_tiny(family, tmp_path / "model")
    metrics = run(ranks2, tmp_path, data, *LORA, *more, section=LOCAL)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    after = {name.replace(".base_layer", ""): t for name, t in trained(tmp_path / "out/checkpoints").items()}
    before = base.state_dict()
    adapters = {name for name in after if "lora_" in name}
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - adapters)
    targets = {name.rsplit(".", 3)[0].rpartition(".")[2] for name in adapters}
    some = {"q_proj", "v_proj"}
    assert targets >= some if family != "gpt2" else targets == {"c_attn", "c_proj", "c_fc"}
    assert (targets == some) == (family == "llama")

    adapted = PeftModel.from_pretrained(causal(tmp_path / "model"), tmp_path / "out" / "adapter")
    assert loss_of(adapted, rows_of(data / "valid.jsonl")) == pytest.approx(metrics["eval_loss"], abs=1e-5)
    if family == "gpt2":  # a later run may change what the exports read: not of checkpoints before it
        later = "--lora_alpha", 800, "--max_steps", 5, "--resume_from_checkpoint", "auto"
        run(ranks2, tmp_path, data, *LORA, *more, *later, section=LOCAL)
        adapter = FineTunedCheckpoint(tmp_path / "out/checkpoints").description.peft or {}
        assert adapter["lora_alpha"] == 800
    export_model(tmp_path / "out/checkpoints/global_step4", tmp_path / "merged", merge_adapter=True)
    merged = causal(tmp_path / "merged")
    assert loss_of(merged, rows_of(data / "valid.jsonl")) == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert merged.config.tie_word_embeddings == base.config.tie_word_embeddings
    assert (tmp_path / "merged/config.json").is_file()
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_merge_adapter_leaves_a_plain_model_with_its_heads(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama, tied", tmp_path / "model")
    metrics = run(ranks2, tmp_path, data, *LORA, "--merge_adapter", "--export_heads", section=LOCAL)
    folder = tmp_path / "out" / "hf"
    assert loss_of(causal(folder), rows_of(data / "valid.jsonl")) == pytest.approx(
        metrics["eval_loss"], abs=1e-5
    )
    assert not (tmp_path / "out" / "adapter").exists()
    names = state_of(folder).keys()
    assert any(name.startswith("heads.0.") for name in names)
    assert not any("lora" in name or "lm_head" in name for name in names)


def test_adapters_start_the_same_however_the_model_is_cut(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    still = "--lora_r", 3, "--learning_rate", 0, "--max_steps", 1
    run(ranks2, tmp_path, data, *still, section=LOCAL)
    run(ranks2, tmp_path, data, *still, "--num_stages", 1, out="one")
    run(ranks2, tmp_path, data, *still, "--seed", 7, section=LOCAL, out="other")
    two, one, other = (trained(tmp_path / out / "checkpoints") for out in ("out", "one", "other"))
    assert two.keys() == one.keys()
    assert all(torch.equal(two[name], one[name]) for name in two)
    starts = [name for name in two if "lora_A" in name]
    assert len(starts) == 4 * 7
    assert not any(torch.equal(two[name], other[name]) for name in starts)


def test_adapters_of_weights_in_4_bits(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    save_tiny("llama, tied", tmp_path / "model")
    qlora = *LORA, "--lora_dropout", 0.3, "--load_in_4bit", "--use_bnb_nested_quant"
    metrics = run(ranks2, tmp_path, data, *qlora, "--save_steps", 2, section=LOCAL)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    resume = "--resume_from_checkpoint", tmp_path / "out/checkpoints/global_step2"
    more = "--gradient_checkpointing", "--no_eval_on_start"
    run(ranks2, tmp_path, data, *qlora, *resume, *more, section=LOCAL, out="resumed")
    after, resumed = (trained(tmp_path / out / "checkpoints") for out in ("out", "resumed"))
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    in_4_bits = [name for name, tensor in after.items() if name.endswith("base_layer.weight")]
    assert {after[name].dtype for name in in_4_bits} == {torch.uint8}
    assert len(in_4_bits) == 4 * 7

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options.bnb_4bit_compute_dtype = torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=options)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # else some CPUs evaluate in bfloat16
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    export_model(tmp_path / "out/checkpoints", tmp_path / "merged", merge_adapter=True)
    for model in (adapted, causal(tmp_path / "merged")):
        loss = loss_of(model, rows_of(data / "valid.jsonl"))
        assert loss == pytest.approx(metrics["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifier_with_adapters_is_exported_whole(
    family: str, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "model", num_labels=2)
    metrics = run(ranks2, tmp_path, data, *LORA, section=LOCAL, task="classification")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "hf")
    files = [[str(data / f"{name}_classes.jsonl")] for name in ("train", "valid")]
    records = load_records(*files, task="classification")
    samples = samples_of(
        encode_classified(records.validation, tiny_tokenizer(), SEQ_LENGTH, records.label_ids)
    )
    loss = loss_of(model, ClassifiedRows(samples, SEQ_LENGTH))
    assert loss == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert loss != pytest.approx(metrics["first_eval_loss"], abs=1e-3)
    before, after = (state_of(folder) for folder in (tmp_path / "model", tmp_path / "out" / "hf"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"classifier" in name or "pooler" in name or "encoder.layer" in name for name in changed} == {True}
    assert any("attention" in name for name in changed)


def test_a_stage_that_is_frozen_whole_stays_as_it_is(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "model").state_dict()
    more = "--freeze", "embed_tokens", r"layers\.[01]\.", "--stage_bounds", "0,3,7"
    run(ranks2, tmp_path, data, *more, section=LOCAL)
    after = state_of(tmp_path / "out" / "hf")
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    frozen = {name for name in base if "embed_tokens" in name or ".layers.0." in name or ".layers.1." in name}
    assert changed == base.keys() - frozen


def test_gradients_flow_through_frozen_blocks(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "model").state_dict()
    run(ranks2, tmp_path, data, "--freeze", r"layers\.[123]\.", "lm_head", "norm", config=SGD)
    after = state_of(tmp_path / "out" / "hf")
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    assert {name.partition("_proj")[0] for name in changed} >= {"model.layers.0.self_attn.q"}
    assert "model.embed_tokens.weight" in changed
    assert not any(name.startswith(("model.layers.1", "model.layers.3", "lm_head")) for name in changed)


def test_a_learning_rate_scale_is_the_factor_of_a_step(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "model").state_dict()
    one = "--max_steps", 1
    scales = "--learning_rate_scale", r"embed_tokens=0.5", r"layers\.3\.mlp=3", r"layers\.3=2"
    run(ranks2, tmp_path, data, *one, config=SGD)
    run(ranks2, tmp_path, data, *one, *scales, config=SGD, out="scaled")
    plain, scaled = (state_of(tmp_path / out / "hf") for out in ("out", "scaled"))
    for name, start in base.items():
        factor = 0.5 if "embed" in name else 3 if "layers.3.mlp" in name else 2 if "layers.3." in name else 1
        step = plain[name] - start
        assert step.abs().max() > 0
        torch.testing.assert_close(scaled[name] - start, factor * step, rtol=1e-3, atol=1e-6)


def test_optimizers_by_name(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    metrics = run(ranks2, tmp_path, data, "--optim", "adafactor", "--max_steps", 4, section=LOCAL)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]


def test_optimizers_of_bitsandbytes_get_what_the_config_says() -> None:
    config = finetune._optimizer("adamw_8bit", {"lr": 0.1, "eps": 1e-6, "torch_adam": True})
    optim = mock.Mock(AdamW8bit=torch.optim.AdamW)
    with mock.patch.dict(sys.modules, {"bitsandbytes": mock.Mock(optim=optim)}):
        made = finetune._function_of(config)([torch.nn.Parameter(torch.zeros(1))])
    assert (made.defaults["lr"], made.defaults["eps"]) == (0.1, 1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kind", "own", "is_refused"),
    [
        ("WarmupLR", {"warmup_max_lr": 1e-3}, True),
        ("WarmupLR", {"warmup_max_lr": "auto"}, False),
        ("WarmupLR", {"warmup_num_steps": 2}, False),  # takes the optimizer's
        ("WarmupDecayLR", {"warmup_num_steps": 2}, True),  # takes 0.001
        ("OneCycle", {"cycle_max_lr": 1e-3}, True),
        ("WarmupCosineLR", {"warmup_num_steps": 2}, False),
    ],
)
def test_a_scheduler_with_another_rate_is_refused(kind: str, own: dict[str, Any], is_refused: bool) -> None:
    args = FinetuneArguments(deepspeed_config="x", model="m", learning_rate=5e-5)
    config = {"scheduler": {"type": kind, "params": own}}
    why = r"--learning_rate is 5e-05, and scheduler\.params\.\w+_max_lr .* 0\.001: give the same"
    with pytest.raises(ConfigError, match=why) if is_refused else nullcontext():
        finetune._complete_config(config, args)
    args.learning_rate = 1e-3
    finetune._complete_config(config, args)


@pytest.mark.bad_input
def test_a_package_that_is_missing_is_named() -> None:
    with mock.patch.dict(sys.modules, {"bitsandbytes": None}):
        with pytest.raises(ConfigError, match="--optim: AdamW8bit needs bitsandbytes: pip install"):
            finetune._function_of(finetune._optimizer("adamw_8bit", {}))
        with pytest.raises(ConfigError, match="--load_in_4bit needs bitsandbytes: pip install bitsandbytes"):
            FourBits()


@pytest.mark.bad_input
def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    engine = mock.MagicMock(load_checkpoint=lambda *_, **__: layer.load_state_dict({"lora_A": torch.ones(2)}))
    with pytest.raises(ConfigError, match=r"its layers have other weights .* flags .*--load_in_4bit"):
        process.resume(engine, tmp_path)
    for fault in ("the state is for [4]. Use load_checkpoint(..., ", "seed was 0; use the same data, or "):
        engine.load_checkpoint = mock.Mock(side_effect=ConfigError(f"{fault}load_module_only=True"))
        with pytest.raises(ConfigError, match=r"(\[4\]|was 0): resume with the model, data, config and"):
            process.resume(engine, tmp_path)


def test_a_resumed_run_has_the_learning_rate_that_it_is_given(tmp_path: Path) -> None:
    before, after = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate) for rate in (0.1, 0.3))

    def load(*_: Any, **__: Any) -> tuple[str, None]:
        after.load_state_dict(before.state_dict())
        return "", None

    engine = mock.Mock(optimizer=after, load_checkpoint=load, global_steps=2)
    process.resume(engine, tmp_path)
    assert after.param_groups[0]["lr"] == 0.1, "the scheduler's"
    after.param_groups[0]["lr"] = 0.3
    engine.lr_scheduler = None
    process.resume(engine, tmp_path)
    assert after.param_groups[0]["lr"] == 0.3
