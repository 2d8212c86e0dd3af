"""Blocks in 4 bits: what transformers makes of them with bitsandbytes, adapters and gradients too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ds_interlock.hf.model.adapt import add_lora, lora_config
from ds_interlock.hf.model.cut import build_all
from ds_interlock.hf.model.four_bits import FourBits
from ds_interlock.hf.model.pretrained import open_pretrained

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "quant_type", "nested"), [("llama", "nf4", False), ("qwen2", "fp4", True)]
)
def test_transformers_and_peft_compute_the_same(
    family: str, quant_type: Any, nested: bool, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    from peft import get_peft_model

    save_tiny(family, tmp_path)
    pretrained = replace(open_pretrained(str(tmp_path)), four_bits=FourBits(quant_type, nested))
    net = pretrained.blueprint()
    config = lora_config(net, rank=3)
    net.prepare.append(add_lora(config, 0))
    layers: Any = nn.Sequential(*build_all(net.layers()))
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options, dtype=torch.float32)
    model: Any = get_peft_model(whole, config).train()  # in evaluation, some CPUs change 4-bit layers
    theirs = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    ours = {name.partition(".")[2]: p for name, p in layers.named_parameters()}
    adapters = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert adapters == [name for name, parameter in ours.items() if parameter.requires_grad]
    assert {ours[name].dtype for name in adapters} == {torch.float32}
    torch.manual_seed(0)
    for name in adapters:
        nn.init.normal_(theirs[name], std=0.1)
        ours[name].data.copy_(theirs[name])
    outputs = layers(IDS), model(IDS).logits
    assert torch.equal(*outputs)
    for logits in outputs:
        logits.square().mean().backward()
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in adapters)
    in_4_bits = {name for name, parameter in ours.items() if parameter.dtype == torch.uint8}
    assert in_4_bits == {name for name, parameter in theirs.items() if parameter.dtype == torch.uint8}
