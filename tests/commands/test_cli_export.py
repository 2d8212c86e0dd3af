"""``ds-interlock export``: what its flags do, and what it says about wrong ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuned_checkpoints import make_heads, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ds_interlock import cli
from ds_interlock.schedule.plan import GradientFlowPlan

IDS = torch.arange(12).reshape(2, 6)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    model = tiny_llama()
    plan = GradientFlowPlan.local(stage_bounds=[0, 2, 4, 7])
    write_checkpoint(tmp_path / "checkpoints", model, plan, make_heads(model, plan, type="norm_linear"))
    return tmp_path / "checkpoints"


def test_in_a_process_of_its_own(checkpoints: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ds_interlock.cli", "export", str(checkpoints), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}: LlamaForCausalLM, 10,128 parameters, 0.0 MiB\n"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(exported(IDS).logits, tiny_llama()(IDS).logits)


def test_form(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--dtype", "bfloat16", "--max_shard_size", "5KB", "--heads"]
    assert cli.main(["export", str(checkpoints / "global_step7"), str(out), *flags]) == 0
    files = list(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
    assert (out / "heads.safetensors").exists()


def test_a_draft(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(checkpoints), str(tmp_path / "out"), "--stages", "2", "--head", "1"]) == 0
    assert "blocks 0 to 2 of 4, with head 1" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "1"], "--head .* needs --stages"),
        (["--stages", "1", "--heads"], "leave it or --stages out"),
        (["--stages", "1", "--head", "1"], r"head 0 in stage 0 .*\(--stages 1 --head 0\)"),
        (["--merge_adapter"], "--merge_adapter: .* has no adapter"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(checkpoints), str(tmp_path / "out"), *flags]) == 2
    assert not (tmp_path / "out").exists()
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("ds-interlock: ")
    assert re.search(message, printed), printed


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "flags", [["--stages", "0"], ["--head", "-1"], ["--dtype", "int8"], ["--max_shard_size", "5"]]
)
def test_values_that_are_none(flags: list[str], checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", str(checkpoints), str(tmp_path / "out"), *flags])


def test_a_folder_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds no layer_*-model_states.pt" in capsys.readouterr().err
