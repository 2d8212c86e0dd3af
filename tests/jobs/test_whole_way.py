"""The scripts of the documentation, from start to end: docs/finetune.md's, and docs/migrating.md's."""

import re
import subprocess
from pathlib import Path

import pytest
from launching import launch

from measuring.launching import ROOT, environment, free_port

pytestmark = [pytest.mark.launcher, pytest.mark.slow, pytest.mark.minutes]


def test_a_chat_file_to_a_draft_that_assists(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    section = page.split("### The whole way")[1].split("\n## ")[0]
    (script,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    settings = {"OUT": str(tmp_path), "PORT": str(free_port())}
    written = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env=environment() | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    print(written)
    before, after = re.findall(r"validation loss ([\d.]+) before, ([\d.]+) after", written)[-1]
    assert float(after) < float(before)
    assert f"resuming {tmp_path}/checkpoints/global_step6" in written
    assert "same answers: 4" in written
    assert float(re.findall(r"share accepted: ([\d.]+)", written)[0]) > 0


def test_a_pipeline_script_of_ones_own(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    section = page.split("## A whole script")[1].split("\n## ")[0]
    for name, text in re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", section, re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = launch("train.py", ranks=4, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < 0.3
    assert (tmp_path / "checkpoints" / "latest").read_text() == "global_step200"
