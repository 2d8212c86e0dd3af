"""Models in other forms than plain safetensors: opened once, kept, and equal to what transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_gguf, save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from ds_interlock import cli
from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.cut import build_all
from ds_interlock.hf.model.pretrained import Pretrained, empty_model, open_pretrained

ROOT = Path(__file__).parents[3]
IDS = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits_of(pretrained: Pretrained, ids: torch.Tensor = IDS) -> torch.Tensor:
    hidden: Any = ids
    for layer in build_all(pretrained.blueprint().layers()):
        hidden = layer.eval()(hidden) if isinstance(layer, torch.nn.Module) else layer(hidden)
    return hidden


def save_bin(model: Any, folder: Path) -> None:
    """As models were saved before there were safetensors."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2", "opt"])
def test_bin_files_are_converted_once(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_bin(model, tmp_path / "model")
    cache = tmp_path / "cache"
    first = open_pretrained(str(tmp_path / "model"), cache_dir=cache)
    assert first.folder.parent == cache
    torch.testing.assert_close(logits_of(first), model(IDS).logits, rtol=0, atol=1e-5)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = open_pretrained(str(tmp_path / "model"), cache_dir=cache)
    assert second.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    third = open_pretrained(str(tmp_path / "model"), cache_dir=cache)
    assert third.folder != first.folder
    torch.testing.assert_close(logits_of(third), model(IDS).logits, rtol=0, atol=1e-5)


def test_half_precision_stays_as_it_is_on_the_disk(tmp_path: Path) -> None:
    save_bin(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model")
    opened = open_pretrained(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    stored = load_file(opened.folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert opened.new_model().dtype == torch.float32


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    save_bin(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        open_pretrained(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_checkpoint_of_the_bare_model_needs_no_conversion(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **({"tie_word_embeddings": True} if family == "llama" else {}))
    model.config.save_pretrained(tmp_path / "model")
    state = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    opened = open_pretrained(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    torch.testing.assert_close(logits_of(opened), model(IDS).logits, rtol=0, atol=1e-5)


def test_experts_in_tensors_of_their_own_are_merged(tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert any(".experts.1.w2." in name for name in stored), "transformers saves Mixtral otherwise by now"
    opened = open_pretrained(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert opened.folder.parent == tmp_path / "cache"
    torch.testing.assert_close(logits_of(opened), model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("converts", [False, True], ids=["safetensors", "bin"])
def test_a_new_classifier_is_drawn_from_its_name_and_the_seed_for_the_datas_classes(
    converts: bool, tmp_path: Path
) -> None:
    model = tiny_model("bert", num_labels=2)
    state = {name: tensor for name, tensor in model.state_dict().items() if "classifier" not in name}
    save_bin(model, tmp_path / "model")
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    if not converts:
        (tmp_path / "model" / "pytorch_model.bin").unlink()
        save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    drawn = []
    for cache, seed in (("one", 0), ("two", 0), ("one", 1)):
        opened = open_pretrained(
            str(tmp_path / "model"),
            "classification",
            classes=("a", "b", "c"),
            cache_dir=tmp_path / cache,
            seed=seed,
        )
        end: Any = build_all(opened.blueprint().layers())[-1]
        drawn.append(end.state_dict())
        assert opened.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert drawn[0]["classifier.weight"].shape == (3, 32)
    assert drawn[0]["classifier.weight"].std() > 0
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not torch.equal(drawn[0]["classifier.weight"], drawn[2]["classifier.weight"])
    assert torch.equal(drawn[0]["bert.pooler.dense.weight"], state["bert.pooler.dense.weight"])
    shutil.rmtree(tmp_path / "model")
    save_tiny("bert", tmp_path / "model", num_labels=2)
    with pytest.raises(ConfigError, match=r"classifier.weight is \[2, 32\] .* for 3 classes in the data"):
        open_pretrained(str(tmp_path / "model"), "classification", classes=("a", "b", "c"))


def test_a_classifier_keeps_the_classes_that_it_was_trained_for(tmp_path: Path) -> None:
    names = {0: "contradiction", 1: "neutral", 2: "ENTAILMENT"}
    ids = {name: number for number, name in names.items()}
    model = tiny_model("roberta", num_labels=3)
    model.config.update({"id2label": names, "label2id": ids})
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def opened(*classes: str) -> Pretrained:
        return open_pretrained(str(tmp_path), "classification", classes=classes)

    known = opened("contradiction", "entailment", "neutral")
    assert known.config.id2label == names
    expected = {"contradiction": 0, "entailment": 2, "neutral": 1}
    assert known.class_ids({"contradiction": 0, "entailment": 1, "neutral": 2}) == expected
    numbers = opened("0", "LABEL_1", "2")
    assert (numbers.config.id2label, numbers.class_ids({0: 0, 2: 2})) == (names, {0: 0, 2: 2})
    others = opened("bad", "good", "neutral")
    assert others.config.label2id == others.class_ids({"bad": 0, "good": 1, "neutral": 2})


def test_positions(tmp_path: Path) -> None:
    expected = {"llama": 64, "gpt2": 64, "opt": 64, "bloom": None}
    for family, number in expected.items():
        save_tiny(family, tmp_path / family)
        assert open_pretrained(str(tmp_path / family)).num_positions() == number
    save_tiny("roberta", tmp_path / "roberta")
    roberta = open_pretrained(str(tmp_path / "roberta"), "classification")
    number = roberta.num_positions()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "roberta")
    assert number == 63
    assert model(torch.full((1, number), 5)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, number + 1), 5))


def test_a_gguf_file_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    opened = open_pretrained(str(tmp_path), gguf_file="tiny.gguf", cache_dir=tmp_path / "cache")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(opened), theirs(IDS).logits, rtol=0, atol=1e-5)
    assert opened.tokenizer("capital").input_ids == tiny_tokenizer()("capital").input_ids


def quantise(folder: Path, method: str) -> None:
    """Writes the projections of a saved model in 8 bits, with their scales; config.json says ``method``."""
    stored = load_file(folder / "model.safetensors")
    for name, weight in [pair for pair in stored.items() if pair[0].endswith("_proj.weight")]:
        scale = weight.float().abs().max() / 448
        stored[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


def test_quantised_weights_are_read_as_the_numbers_they_stand_for_or_refused(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    quantise(tmp_path / "model", "fp8")
    pretrained = open_pretrained(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert not hasattr(pretrained.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(pretrained), model(IDS).logits, rtol=0, atol=0.05)
    quantise(tmp_path / "model", "gptq")
    with pytest.raises(ConfigError, match=r"--model .* says gptq\), and only fp8 and mxfp4 can be undone"):
        open_pretrained(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"--text_model_only: the weights of .* are quantised"):
        open_pretrained(str(tmp_path / "model"), text_model_only=True)


def test_the_text_part_of_a_model_with_eyes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": 131, "head_dim": 8, "num_key_value_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    GenerationConfig(eos_token_id=[1, 106], do_sample=True, top_k=64).save_pretrained(tmp_path / "model")
    how: Any = {"cache_dir": tmp_path / "cache", "text_model_only": True}
    pretrained = open_pretrained(str(tmp_path / "model"), **how)
    generation = GenerationConfig.from_pretrained(pretrained.folder)
    assert (generation.eos_token_id, generation.top_k) == ([1, 106], 64)
    assert type(pretrained.new_model()).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(logits_of(pretrained), model(IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="a text model already"):
        open_pretrained(str(pretrained.folder), **how)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class QuokkaConfig(LlamaConfig):
    model_type = "quokka"

class QuokkaForCausalLM(LlamaForCausalLM):
    config_class = QuokkaConfig
"""


def test_code_that_comes_with_a_model_runs_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = tmp_path / "quokka"
    model = save_tiny("llama", folder)
    (folder / "quokka.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "quokka.QuokkaConfig", "AutoModelForCausalLM": "quokka.QuokkaForCausalLM"}
    config |= {"model_type": "quokka", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="--trust_remote_code runs it"):
        open_pretrained(str(folder))
    pretrained = open_pretrained(str(folder), trust_remote_code=True)
    assert type(pretrained.new_model()).__name__ == "QuokkaForCausalLM"
    fetched: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        fetched.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("ds_interlock.hf.model.pretrained.snapshot_download", download)
    open_pretrained("zoo/quokka", trust_remote_code=True)
    assert {"*.py", "*.tiktoken", "*.bpe"} <= set(fetched)  # its tokenizer may read them
    assert type(empty_model(pretrained.config, "QuokkaForCausalLM")).__name__ == "QuokkaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(logits_of(pretrained), model(IDS).logits)
    arguments = ["plan", str(ROOT / "configs" / "interlock.json"), "--model", str(folder), "--stages", "2"]
    assert cli.main([*arguments, "--seq-length", "16"]) == 2
    assert cli.main([*arguments, "--seq-length", "16", "--trust-remote-code"]) == 0
