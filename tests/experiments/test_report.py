"""The page made of small made-up results, and what it says of results that cannot be used."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from made_up_results import LOSSES, record, records, write_batch_times

from ds_interlock.errors import DataError
from ds_interlock.planning.quality import Measurement, Measurements, Spread
from experiments import comparison, definition, figures, report
from measuring import results_file

DEFINITION = """
title = "Tiny prose"
about = "Made up."
minutes = 7
num_stages = 3
seeds = [0, 1]

[model]
kind = "prose"
num_blocks = 3

[training]
num_steps = 100
micro_batch_size = 16
num_micro_batches = 2
optimizer = "adamw"
learning_rate = 2e-3
warmup_steps = 10

[measurements]
evaluate_every = 50
num_samples = 8
num_final_samples = 16

[modes.global]
interlock = { mode = "global" }

[modes.local]
interlock = { mode = "local" }

[modes."window 2"]
interlock = { mode = "interlock", window = 2 }
num_steps = 150
"""


SAVE = figures.save


class Bench:
    """A folder with an experiment's definition and results."""

    def __init__(self, folder: Path) -> None:
        self.results, self.page = folder / "experiments", folder / "results.md"
        self.file = self.results / "tiny.jsonl"
        self.times = self.results / "tiny_batch_times.json"
        self.results.mkdir()
        (self.results / "other.jsonl").write_text("not JSON, and of no experiment here\n")

    def fill(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            results_file.append(self.file, line)

    def report(self) -> str:
        assert report.main(["--results", str(self.results), "--output", str(self.page)]) == 0
        return self.page.read_text()

    def measurements(self) -> tuple[Measurement, ...]:
        text = self.page.with_name("measured.json").read_text()
        return Measurements.model_validate_json(text).measurements


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    (definitions / "tiny.toml").write_text(DEFINITION)
    monkeypatch.setattr(definition, "FOLDER", definitions)
    monkeypatch.setattr(figures, "save", lambda figure, path: None)  # writing a picture takes half a second
    return Bench(tmp_path)


def test_the_page(bench: Bench) -> None:
    bench.fill(records())
    write_batch_times(bench.times)
    page = bench.report()
    # Differences from local -0.4 and -0.36; shares of the gap 0.4 / 0.6 and 0.36 / 0.4; speed-ups at M = 1
    # 800 / 250 and 800 / 240, at M = 4 400 / 400 and 400 / 384; deviations of two values: distance / sqrt(2).
    assert "| tiny | -0.380 ± 0.028 nats | -13.4 | 78 ± 16 % | – | 3.27 ± 0.09 (window 2) | " in page
    assert "| 1.02 ± 0.03 (window 2) |" in page
    assert "\n| global | 7.778 ± 0.550 | 2.050 ± 0.071 | -0.500 ± 0.141 | – | 2 |\n" in page
    assert "\n| local | 12.823 ± 0.906 | 2.550 ± 0.071 | – | – | 2 |\n" in page
    assert "\n| window 2 | 8.762 ± 0.372 | 2.170 ± 0.042 | -0.380 ± 0.028 | 78 ± 16 % | 2 |\n" in page
    assert "\n| window 2 | 3.50 ± 0.71 | 3.50 ± 0.71 | 0 |\n" in page
    assert "\n| window 2 | 122 ± 4 | 4.00 | 1.25 | 3.27 ± 0.09 | 1.02 ± 0.03 |\n" in page
    assert "\n| local | not in 100 steps | 8.00 | 4.00 | – | – |\n" in page
    # At M = 1 400 steps of window 2 fit into global's 800 s, 125 at M = 4.
    assert "\n| window 2 | ≤ 1.920 ± 0.170 | 2.045 ± 0.064 |\n" in page
    assert "\n| global | 2.050 ± 0.071 | 2.050 ± 0.071 |\n" in page


def test_what_the_planner_knows_is_written_beside_the_page(bench: Bench) -> None:
    bench.fill(records())
    bench.report()
    local, window_2 = bench.measurements()
    assert (local.mode, local.share.mean, local.steps, local.gain) == ("local", 0.0, None, None)
    assert window_2.share == Spread(mean=0.7833, deviation=0.1650)  # 0.4 / 0.6 and 0.36 / 0.4
    assert window_2.steps == Spread(mean=1.225, deviation=0.0354)  # 125 / 100 and 120 / 100
    assert window_2.gain == Spread(mean=0.38, deviation=0.0283)
    assert (window_2.most_steps, window_2.local, window_2.seeds) == (1.5, "local", (0, 1))
    assert window_2.place == '"tiny" (3 Transformer blocks of width 64 in 3 stages, 2 seeds)'


def test_an_experiment_in_which_local_is_not_behind_tells_the_planner_nothing(bench: Bench) -> None:
    bench.fill([record("global", 0, [3.0, 2.0]), record("local", 0, [3.0, 2.0])])
    bench.report()
    assert (
        Measurements.model_validate_json(bench.page.with_name("measured.json").read_text()).measurements == ()
    )


def test_the_page_says_what_was_run_and_where(bench: Bench) -> None:
    bench.fill(records())
    page = bench.report()
    assert "## Tiny prose\n\nMade up.\n" in page
    assert (
        "3 Transformer blocks, width 64, 2 attention heads, 64 characters of context, in 3 stages; 100"
        in page
    )
    assert "100 steps of 32 samples, AdamW with learning rate 0.002 after 10 steps of warm-up" in page
    assert (
        "`python -m experiments.run tiny --jobs 2`, about 7 minutes of one core, 3.5 of two. The 6 runs"
        in page
    )
    assert "[tiny.jsonl](experiments/tiny.jsonl) trained for 9 minutes" in page
    assert "- tiny: Abacus 9, 2 cores, 3 GiB, Linux x; one core per run; python 3.99, torch 9.9.\n" in page
    assert "Not run yet" not in page


def test_training_of_its_own_is_named(bench: Bench) -> None:
    lines = records()
    own = {"optimizer": "nadam", "learning_rate": 1e-3, "betas": [0.99, 0.98]}
    for line in lines[-2:]:
        line["run"] |= {"mode": "stale", "interlock": {}, "asynchronous": "pipedream"}
        line["run"]["training"] |= own
    bench.fill(lines)
    text = (
        "warm-up, weight decay 0. With training of their own: stale, NAdam (betas 0.99, 0.98) with learning"
    )
    assert f"{text} rate 0.001.\n\n`python" in bench.report()
    lines[-1]["run"]["training"]["micro_batch_size"] = 8
    bench.file.unlink()
    bench.fill(lines)
    with pytest.raises(DataError, match="mode stale, seed 1 is not of the same experiment"):
        report.write(bench.results, bench.page, bench.page.with_name("measured.json"))


def test_runs_on_a_gpu_say_so(bench: Bench) -> None:
    bench.fill([record("global", 0, [3.0, 2.0], device="cuda")])
    page = bench.report()
    assert "`python -m experiments.run tiny --device cuda`, about 7 minutes of one device" in page
    assert "; GPU 7; python 3.99" in page


def test_made_again_page_and_pictures_are_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", SAVE)
    bench.fill([record(mode, 0, losses[0], cosine=[0.5, None, 1.0]) for mode, losses in LOSSES.items()])
    write_batch_times(bench.times)

    def contents() -> dict[Path, bytes]:
        bench.report()
        files = [bench.page, *bench.page.with_suffix("").iterdir()]
        return {file: file.read_bytes() for file in files}

    first = contents()
    assert {file.name for file in first} == {
        "results.md",
        "tiny_curves.svg",
        "tiny_stage_rms.svg",
        "tiny_cosines.svg",
    }
    for file, content in first.items():
        assert file.suffix == ".md" or f"(results/{file.name})" in first[bench.page].decode()
        assert b"<dc:date>" not in content
    assert contents() == first


def test_quality_follows_the_file(bench: Bench) -> None:
    bench.fill(records())
    before = bench.report()
    bench.file.write_text(
        bench.file.read_text().replace('"final": {"loss": 2.14}', '"final": {"loss": 2.34}')
    )
    after = bench.report()
    # Shares 0.4 / 0.6 and 0.16 / 0.4.
    assert "| 2.270 ± 0.099 | -0.280 ± 0.170 | 53 ± 19 % | 2 |" in after
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 2, "the row of the summary and that of the table"


def test_cosines_are_averaged_and_null_is_a_dash(bench: Bench) -> None:
    bench.fill(record("global", seed, LOSSES["global"][seed]) for seed in (0, 1))
    bench.fill(
        record("local", seed, LOSSES["local"][seed], cosine=[0.2 + 0.4 * seed, None, 1.0]) for seed in (0, 1)
    )
    page = bench.report()
    assert (
        "| mode | stage 0 | stage 1 | stage 2 |\n| --- | --- | --- | --- |\n| local | 0.40 ± 0.28 | – |"
        in page
    )
    assert "| 1.00 ± 0.00 |" in page
    assert "](results/tiny_cosines.svg)" in page


def test_conclusions_stand_at_the_end(bench: Bench) -> None:
    bench.fill([record("global", 0, LOSSES["global"][0])])
    before = bench.report()
    file = definition.FOLDER / "tiny.toml"
    file.write_text('conclusions = """\nIt is so.\n"""\n' + file.read_text())
    assert bench.report() == before + "\n### Conclusions\n\nIt is so.\n"


def test_what_is_missing_is_named(bench: Bench) -> None:
    bench.fill(line for line in records() if line["run"]["seed"] == 0 and line["run"]["mode"] != "window 2")
    page = bench.report()
    assert 'Not run yet, of the modes (and seeds): "global" (1), "local" (1), "window 2" (0, 1).' in page
    assert "No batch times here; `python -m experiments.batch_times tiny` measures them." in page
    assert "| tiny | – | – | – | – | not measured | not measured |" in page
    assert "| local | 13.464 | 2.600 | – | – | 1 |" in page, "a single seed has no deviation"


def test_modes_without_batch_times_are_named(bench: Bench) -> None:
    bench.fill(records())
    write_batch_times(bench.times, ["global", "local"])
    page = bench.report()
    assert 'Not timed yet: "window 2"; `python -m experiments.batch_times tiny` does.' in page
    assert "| not reached | not reached |" in page


def _empty(bench: Bench) -> None:
    assert not bench.file.exists()


def _other_version(bench: Bench) -> None:
    bench.fill(records())
    bench.file.write_text(bench.file.read_text().replace('"format": 1', '"format": 0', 1))


def _no_global(bench: Bench) -> None:
    bench.fill(line for line in records() if line["run"]["mode"] != "global")


def _twice(bench: Bench) -> None:
    bench.fill([*records(), records()[3]])


def _another_budget(bench: Bench) -> None:
    bench.fill([*records()[:-1], record("window 2", 1, [3.0, 2.0, 1.9], budget=150)])


def _another_section(bench: Bench) -> None:
    bench.fill([*records()[:-1], record("window 2", 1, [3.0, 2.0, 1.9], section={"mode": "local"})])


def _not_a_run(bench: Bench) -> None:
    bench.fill([{**records()[0], "run": {**records()[0]["run"], "seed": "first"}}])


def _other_batch_times(bench: Bench) -> None:
    bench.fill(records())
    write_batch_times(bench.times)
    bench.times.write_text(bench.times.read_text().replace('"format":1', '"format":0'))


def _global_not_timed(bench: Bench) -> None:
    bench.fill(records())
    write_batch_times(bench.times, ["local"])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_empty, "has no results of any experiment (tiny): make them with `python -m experiments.run NAME`"),
        (_other_version, "line 1: format 0, expected 1: move the file away"),
        (_no_global, "no run of mode global, which the others are compared with: run `python -m"),
        (_twice, "line 7: a second run of mode local, seed 1, after a change of the experiment's file"),
        (_another_budget, "mode window 2, seed 1 is not of the same experiment as the runs before"),
        (_another_section, "mode window 2, seed 1 is not of the same experiment as the runs before"),
        (_not_a_run, "line 1: not a run of this version (seed: Input should be a valid integer"),
        (_other_batch_times, "not a file of batch times: format: Input should be 1"),
        (_global_not_timed, 'no batch time of {"mode": "global"} with 1 micro-batches'),
    ],
)
def test_results_that_cannot_be_used_are_one_sentence(
    bench: Bench, capsys: pytest.CaptureFixture[str], prepare: Callable[[Bench], None], message: str
) -> None:
    prepare(bench)
    assert report.main(["--results", str(bench.results), "--output", str(bench.page)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not bench.page.exists()


def test_modes_come_in_the_order_asked_for(bench: Bench) -> None:
    bench.fill(reversed(records()))
    modes = list(comparison.read(bench.file, order=["local", "unknown"]).results)
    assert modes == ["local", "window 2", "global"]
    bench.file.write_text("")
    with pytest.raises(DataError, match="no run of mode global"):
        comparison.read(bench.file, order=[])
