"""Fine-tuning as an experiment: its table comes from its results file, and the documentation quotes it."""

from pathlib import Path

import pytest

from experiments import finetune, run
from measuring import results_file

ROOT = Path(__file__).parents[2]
FILE = ROOT / results_file.RESULTS / "finetune.jsonl"
METRICS = {"first_eval_loss": 2.0, "eval_loss": 1.0, "peak_memory_bytes": [10**9, 2 * 10**9]}


def test_the_results_are_those_of_the_runs() -> None:
    """A definition that changes after its runs leaves results of something else."""
    records = results_file.read(FILE)
    assert [finetune.Run.model_validate(record) for record in records] == finetune.runs()
    assert all("Paris" in record["written"] for record in records)


def test_the_documentation_quotes_the_results() -> None:
    documented = (ROOT / "docs" / "finetune.md").read_text()
    for record in results_file.read(FILE):
        losses = f"{record['metrics']['first_eval_loss']:.3f} | {record['metrics']['eval_loss']:.3f}"
        heads = record["heads"].replace("none", "–")
        assert f"| {record['mode']} | {heads} | {losses} |" in documented
    assert finetune.table(results_file.read(FILE)) in (ROOT / "docs" / "results.md").read_text()


def test_missing_runs_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "carry", lambda run, keeps: {**run.model_dump(), "metrics": METRICS})
    arguments = ["finetune", "--output", str(tmp_path / "finetune.jsonl")]
    assert run.main([*arguments, "--modes", "global", "window 2"]) == 0
    assert run.main(arguments) == 1  # needs --resume
    assert run.main([*arguments, "--resume"]) == 0
    records = results_file.read(tmp_path / "finetune.jsonl")
    assert [(record["mode"], record["heads"]) for record in records[:3]] == [
        ("global", "none"),
        ("window 2", "warm"),
        ("window 2", "cold"),
    ]
    assert len(records) == len(finetune.runs()) == 7


def test_the_table_has_means_over_seeds() -> None:
    one, warm = (run.model_dump() for run in finetune.runs()[:2])
    records = [{**one, "seed": seed, "metrics": {**METRICS, "eval_loss": 1.0 + seed}} for seed in (0, 1)] + [
        {**warm, "metrics": {**METRICS, "eval_loss_after_layer_9": 4.0, "first_eval_loss_after_layer_9": 5.0}}
    ]
    table = finetune.table(records)
    assert "| global | none | 2.000 ± 0.000 | 1.500 ± 0.707 | – | – | 1.00 / 2.00 | 2 |" in table
    assert "| local | warm | 2.000 | 1.000 | 5.000 | 4.000 | 1.00 / 2.00 | 1 |" in table
    assert "seeds 0, 1" in table
    assert finetune.table([]) == ""


def test_objectives_are_compared_at_equal_budgets() -> None:
    """Also the loss on another text, in a table of its own."""
    rows = finetune.runs(finetune.OBJECTIVES)
    assert len(rows) == 3 * 6
    assert all(row.budget["max_steps"] >= 200 for row in rows)
    learned = [row.config["interlock"]["head"]["objective"] for row in rows if row.mode != "global"]
    assert sorted(set(learned)) == ["cross_entropy", "kl", "reconstruction"]
    of_other_text = {"first_other_loss": 4.0, "other_loss": 4.5}
    records = [{**rows[0].model_dump(), "metrics": {**METRICS, **of_other_text}}]
    table = finetune.table(records)
    assert table.startswith("4 stages, max_steps 200, ")
    assert "| after | Shakespeare before | after | peak GB per rank | seeds |" in table
    assert "| global | none | 2.000 | 1.000 | – | – | 4.000 | 4.500 | 1.00 / 2.00 | 1 |" in table


def test_every_mode_has_warm_and_cold_heads() -> None:
    rows = finetune.runs()
    assert len({(row.mode, row.heads) for row in rows}) == len(rows) == 7
    assert all(row.config["interlock"]["head"]["token_fraction"] == 0.25 for row in rows[1:])
