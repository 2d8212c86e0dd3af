"""Adapters, freezing and learning rates on single layers of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.adapt import add_lora, freeze, lora_config, scale_learning_rates
from ds_interlock.hf.model.cut import Blueprint, build_all
from ds_interlock.hf.model.pretrained import open_pretrained


def blueprint(folder: Path, family: str = "llama") -> Blueprint:
    save_tiny(family, folder)
    return open_pretrained(str(folder)).blueprint()


def parameters(net: Blueprint) -> dict[str, Any]:
    layers: Any = build_all(net.layers())
    modules = [layer for layer in layers if isinstance(layer, torch.nn.Module)]  # a tied one is a function
    return {name: p for module in modules for name, p in module.named_parameters()}


def test_frozen_names_are_looked_for_anywhere(tmp_path: Path) -> None:
    net = blueprint(tmp_path)
    net.prepare.append(freeze(["embed", r"layers\.[02]\.mlp"], net))
    frozen = {name for name, p in parameters(net).items() if not p.requires_grad}
    mlp = {f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 2) for part in ("gate", "up", "down")}
    assert frozen == mlp | {"model.embed_tokens.weight"}


def test_the_first_pattern_that_matches_scales(tmp_path: Path) -> None:
    net = blueprint(tmp_path)
    net.prepare.append(scale_learning_rates({"layers.1.mlp": 3.0, "layers.1": 0.5}, net))
    scales = {name: getattr(p, "learning_rate_scale", None) for name, p in parameters(net).items()}
    assert {scales[name] for name in scales if "layers.1.mlp" in name} == {3.0}
    assert {scales[name] for name in scales if "layers.1." in name and ".mlp" not in name} == {0.5}
    assert {scales[name] for name in scales if "layers.1." not in name} == {None}


@pytest.mark.parametrize(("family", "fan"), [("llama", False), ("gpt2", True)])
def test_adapters_are_peft_s_and_start_at_nothing(family: str, fan: bool, tmp_path: Path) -> None:
    net = blueprint(tmp_path, family)
    config = lora_config(net, rank=3, alpha=5.0, dropout=0.25)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.fan_in_fan_out) == (3, 5.0, 0.25, fan)
    assert lora_config(net, rank=3).lora_alpha == 6
    state = torch.random.get_rng_state()
    net.prepare.append(add_lora(config, 1))
    found = parameters(net)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name for name, p in found.items() if p.requires_grad} == {n for n in found if "lora_" in n}
    assert all((p == 0).all() == ("lora_B" in name) for name, p in found.items() if "lora_" in name)
    starts = [p.flatten()[:8].tolist() for name, p in found.items() if "lora_A" in name]
    assert len(set(map(tuple, starts))) == len(starts)


def test_only_named_modules_are_adapted(tmp_path: Path) -> None:
    net = blueprint(tmp_path)
    net.prepare.append(add_lora(lora_config(net, rank=2, target_modules=["self_attn.v_proj"]), 0))
    adapted = {name.partition(".lora_")[0] for name in parameters(net) if "lora_" in name}
    assert adapted == {f"model.layers.{n}.self_attn.v_proj" for n in range(4)}
    some = blueprint(tmp_path)
    pattern = r".*layers\.[13]\..*\.(q|down)_proj"
    some.prepare.append(add_lora(lora_config(some, rank=2, target_modules=[pattern]), 0))
    adapted = {name.partition(".lora_")[0] for name in parameters(some) if "lora_" in name}
    parts = "self_attn.q_proj", "mlp.down_proj"
    assert adapted == {f"model.layers.{n}.{part}" for n in (1, 3) for part in parts}
    hybrid = blueprint(tmp_path / "hybrid", "lfm2")  # its blocks have convolutions or attention
    config = lora_config(hybrid, rank=2)
    assert {"in_proj", "q_proj", "k_proj", "v_proj", "w1"} <= config.target_modules
    hybrid.prepare.append(add_lora(lora_config(hybrid, rank=2, target_modules=["q_proj"]), 0))
    adapted = {name.partition(".lora_")[0] for name in parameters(hybrid) if "lora_" in name}
    assert adapted == {f"model.layers.{n}.self_attn.q_proj" for n in (1, 3)}
    with pytest.raises(ConfigError, match=r"--lora_target_modules c_attn: no linear .* some of down_proj"):
        lora_config(net, rank=2, target_modules=["q_proj", "c_attn"])
