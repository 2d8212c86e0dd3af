"""Every benchmark runs, at sizes at which its figures mean nothing: what it writes, and what must hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import activation_memory, pipeline_peers, real_stages, relays, results, single_gpu
from measuring.results import table


def run(benchmark: Any, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Runs it and checks what every benchmark must leave; returns the rows of its JSON."""
    output = folder / "written.json"
    benchmark.main([*options, "--output", str(output)])
    written = json.loads(output.read_text())
    name = benchmark.__name__.rpartition(".")[2]
    assert written["benchmark"] == name
    assert written["command"].startswith(f"python -m benchmarks.{name} ")
    assert written["machine"]["num_cores"] > 0
    assert {"python", "torch", "deepspeed", "ds_interlock"} <= set(written["versions"])
    rows: list[dict[str, Any]] = written["rows"]
    assert sum(line.startswith("| ") for line in table(rows).splitlines()) == 2 + len(rows)
    return rows


def test_activation_memory_is_flat_for_a_window_and_rises_for_global(tmp_path: Path) -> None:
    sizes = ["--stages", "2", "4", "6", "--blocks_per_stage", "2", "--width", "16"]
    rows = run(activation_memory, tmp_path, *sizes, "--seq_length", "8", "--vocab_size", "32")
    peaks: dict[str, dict[int, int]] = {}
    for row in rows:
        assert row["micro_batches"] == 2 * row["stages"]
        assert row["peak_bytes"] == row["planned_bytes"] == row["in_flight"] * row["micro_batch_bytes"] > 0
        peaks.setdefault(row["setting"], {})[row["stages"]] = row["peak_bytes"]
    one = peaks["window 1"][2]
    assert peaks == {
        "window 1": {2: one, 4: one, 6: one},
        "window 1.25": {2: 2 * one, 4: 2 * one, 6: 2 * one},
        "window 2": {2: 2 * one, 4: 2 * one, 6: 2 * one},
        "window 3": {4: 3 * one, 6: 3 * one},
        "global": {2: 2 * one, 4: 4 * one, 6: 6 * one},
    }
    # Only under local learning does stage 0 have a head.
    assert {row["setting"] for row in rows if row["head_peak_bytes"]} == {"window 1"}


def test_pipeline_peers(tmp_path: Path) -> None:
    how = ["--stages", "2", "--micro_batches", "1", "2", "--milliseconds", "2", "--seconds", "0.001"]
    rows = run(pipeline_peers, tmp_path, *how, "--engines", "torch 1F1B", "torch ZBV", "window 1.25")
    engines = ["DeepSpeed", "torch 1F1B", "torch ZBV", "window 1.25"]
    assert [row["engine"] for row in rows] == engines * 2
    assert [row["micro_batches"] for row in rows] == [1] * 4 + [2] * 4
    by_name = {(row["engine"], row["micro_batches"]): row for row in rows}
    assert "microbatches (1)" in by_name["torch 1F1B", 1]["refused"]
    assert "seconds" not in by_name["torch 1F1B", 1]
    for row in rows:
        if "refused" not in row:
            assert row["seconds"] > row["micro_batches"] * 3 * 0.002 * 0.99  # no engine skips the work
    assert by_name["window 1.25", 2]["share_of_predicted_speed"] > 0


def test_real_stages(tmp_path: Path) -> None:
    sizes = ["--width", "64", "--num_blocks", "5", "--vocab_size", "768", "--seq_length", "16"]
    how = ["--micro_batches", "1", "2", "--batches", "1", "--rounds", "2", "--token_fraction", "0.5"]
    rows = run(real_stages, tmp_path, *sizes, *how, "--engines", "torch 1F1B", "window 1.5")
    assert [row["engine"] for row in rows] == ["floor", "DeepSpeed", "torch 1F1B", "window 1.5"] * 2
    assert [row["times_floor"] for row in rows if row["engine"] == "floor"] == [1, 1]
    assert [("seconds" in row) for row in rows if row["engine"] == "torch 1F1B"] == [False, True]
    assert all(row["predicted_seconds"] > 0 for row in rows if row["engine"] == "window 1.5")
    written = json.loads((tmp_path / "written.json").read_text())
    assert len(written["profile"]["layers"]) == 5 + 4


def test_relays_on_real_processes(tmp_path: Path) -> None:
    how = ["--stages", "3", "--micro_batches", "2", "--milliseconds", "2", "--batches", "1"]
    rows = run(relays, tmp_path, *how, "--measures", "summed losses", "heads inside a stage")
    assert [row["measure"] for row in rows] == ["summed losses", "heads inside a stage"]
    for row in rows:
        assert row["measured_with"] > 6  # the work of two micro-batches
        assert row["measured_without"] > 6


@pytest.mark.parametrize("num_micro_batches", [1, 4])
@pytest.mark.parametrize("name", [name for name in relays.MEASURES if name != "one backward pass"])
def test_no_measure_makes_a_batch_slower(name: str, num_micro_batches: int) -> None:
    _, with_it, without = relays.MEASURES[name]
    fast, slow = (relays.simulated_forwards(side, 4, num_micro_batches) for side in (with_it, without))
    assert fast <= slow
    assert fast < slow or num_micro_batches == 1, "what is switched off must be seen somewhere"


def test_single_gpu(tmp_path: Path) -> None:
    how = ["--device", "cpu", "--model_size", "3M", "--stages", "2", "--micro_batches", "2"]
    sizes = ["--micro_batch_size", "2", "--seq_length", "8", "--batches", "1", "--token_fraction", "0.5"]
    rows = run(single_gpu, tmp_path, *how, *sizes, "--modes", "window 1.25")
    assert [row["mode"] for row in rows] == ["global", "window 1.25"]
    assert rows[0]["head_parameters"] == 0 < rows[1]["head_parameters"]
    assert rows[0]["layer_parameters"] == rows[1]["layer_parameters"] > 2e6
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 8 / row["seconds"])
        assert row["peak_bytes"] > 4 * row["layer_parameters"]


def test_the_table_is_printed_from_the_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    results.main([str(Path(__file__).parents[2] / "docs" / "benchmarks" / "overhead.json")])
    assert "| global | 4 | 1,886 |" in capsys.readouterr().out
