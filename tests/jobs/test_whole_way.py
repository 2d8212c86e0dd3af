"""The script of docs/finetune.md: a chat file, LoRA, resuming, exporting, and a draft as an assistant."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, free_port

pytestmark = [pytest.mark.launcher, pytest.mark.slow, pytest.mark.minutes]


def test_the_script_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    section = page.split("### The whole way")[1].split("\n## ")[0]
    (script,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "OUT": str(tmp_path),
        "PORT": str(free_port()),
        "PATH": path,
        "PYTHONPATH": str(ROOT),
    }
    written = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    print(written)
    before, after = re.findall(r"validation loss ([\d.]+) before, ([\d.]+) after", written)[-1]
    assert float(after) < float(before)
    assert f"resuming {tmp_path}/checkpoints/global_step6" in written
    assert "same answers: 4" in written
    assert float(re.findall(r"share accepted: ([\d.]+)", written)[0]) > 0
