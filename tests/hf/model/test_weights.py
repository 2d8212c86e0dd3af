"""Tensors out of safetensors files: the right ones, whole, and only as much memory as they take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import save_tiny, tiny_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model import weights
from ds_interlock.hf.model.weights import Weights

NUM_STAGES = 3
SIZES = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 8, "num_attention_heads": 12}
VOCABULARY = 12_000


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.a": torch.randn(7, 5),
        "model.b": torch.randn(9, dtype=torch.bfloat16),
        "scale": torch.tensor(3.5),
        "ids": torch.arange(6).reshape(3, 2),
        "empty": torch.zeros(0, 4),
    }


def shard(tensors: dict[str, Tensor], folder: Path) -> None:
    """Each tensor in a file of its own."""
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("piece", [1, 12, 10**6])
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_read_whole_in_pieces_of_any_size(
    piece: int, sharded: bool, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_PIECE_NUMBERS", piece)
    if sharded:
        shard(tensors, tmp_path)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    found = Weights(tmp_path, torch.float64)([*tensors, "another"])
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype))
        found[name].fill_(1)  # its own memory, not the file's


def test_prefixes_and_ties_are_seen_through(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    found = Weights(tmp_path, torch.float32, "model", {"head": "model.a"})
    assert found.lacking(["a", "model.scale", "head", "nowhere", "other.a"]) == ["nowhere", "other.a"]
    values = found(["a", "model.scale", "head"])
    assert torch.equal(values["a"], values["head"])
    assert values["model.scale"].item() == 3.5
    misfits = found.misfits({"a": torch.empty(7, 5), "head": torch.empty(5, 7), "nowhere": torch.empty(1)})
    assert misfits == ["head is [7, 5] in the files, expected [5, 7]"]


@pytest.mark.bad_input
def test_files_that_are_missing_or_cut_short_are_found_at_once(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"it has neither model\.safetensors nor"):
        Weights(tmp_path, torch.float32)
    shard(tensors, tmp_path)
    last = tmp_path / "model.b.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.b\.safetensors cannot be read .*download complete"):
        Weights(tmp_path, torch.float32)
    last.unlink()
    with pytest.raises(ConfigError, match=r"names model\.b\.safetensors, which do not exist"):
        Weights(tmp_path, torch.float32)
    (tmp_path / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(ConfigError, match="is not a list of shards"):
        Weights(tmp_path, torch.float32)


# Forks for each stage, so that the libraries are imported once.
CHILD = """
import json, os, sys, torch
from ds_interlock.hf.model.balance import default_bounds
from ds_interlock.config import InterlockConfig
from ds_interlock.hf.model.pretrained import open_pretrained

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

warm_up, folder, num_stages = *sys.argv[1:3], int(sys.argv[3])
torch.set_num_threads(1)
def build_a_small_one():
    [spec.build() for spec in open_pretrained(warm_up).blueprint().layers()]

build_a_small_one()  # transformers imports as it goes
for stage in range(num_stages):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    build_a_small_one()  # maps the libraries' pages again: a forked process begins without them
    before = peak()
    blueprint = open_pretrained(folder).blueprint()
    bounds = default_bounds(blueprint, InterlockConfig.from_deepspeed({}), num_stages)
    specs = blueprint.layers()[bounds[stage] : bounds[stage + 1]]
    layers = [spec.build() for spec in specs]
    share = sum(t.nbytes for layer in layers for t in layer.state_dict().values())
    print(json.dumps({"share": share, "peak": peak() - before}), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 300 MB, in shards, written without building it."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=12, **SIZES)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    width, inside = SIZES["hidden_size"], SIZES["intermediate_size"]
    files: dict[str, dict[str, Tensor]] = {"ends": {"model.norm.weight": torch.ones(width)}}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        files["ends"][name] = torch.rand(VOCABULARY, width)
    for number in range(SIZES["num_hidden_layers"]):
        shapes = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
        shapes |= {"mlp.gate_proj": (inside, width), "mlp.up_proj": (inside, width)}
        shapes |= {"mlp.down_proj": (width, inside)}
        block = {f"{name}.weight": torch.rand(shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        block |= {f"{name}.weight": torch.ones(width) for name in norms}
        names = {f"model.layers.{number}.{name}": tensor for name, tensor in block.items()}
        files.setdefault(f"blocks-{number // 4}", {}).update(names)
    for file, content in files.items():
        save_file(content, folder / f"{file}.safetensors")
    places = {name: f"{file}.safetensors" for file, content in files.items() for name in content}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def test_a_stage_takes_little_more_memory_than_its_share(large: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert 250e6 < total < 350e6
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(large), str(NUM_STAGES)],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    stages = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    assert len(stages) == NUM_STAGES
    for stage in stages:
        assert stage["peak"] <= 1.3 * stage["share"], stages
    assert sum(stage["share"] for stage in stages) == pytest.approx(total, rel=1e-3)
