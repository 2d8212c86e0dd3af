"""What one mode has over another, in quality and in time, with numbers worked by hand."""

import pytest
from made_up_results import LOSSES, SECONDS, compared, mode_of, record, records

from ds_interlock.errors import DataError
from experiments.comparison import PerSeed, cell, percent
from experiments.efficiency import Efficiency
from experiments.report import ENVIRONMENT

TABLES = ENVIRONMENT.get_template("tables.md.jinja").module


def test_images_are_judged_by_their_error() -> None:
    errors = {"global": (0.10, 0.12), "local": (0.20, 0.20), "window 2": (0.14, 0.16)}
    images = {"kind": "images", "depth": 20}
    runs = compared(
        record(mode, seed, LOSSES[mode][seed], model=images, error=error)
        for mode, of_mode in errors.items()
        for seed, error in enumerate(of_mode)
    )
    table = TABLES.quality(runs)
    assert "| mode | test error, % | test loss | minus local, points | gap recovered | seeds |" in table
    # Shares 6 / 10 and 4 / 8.
    assert "| window 2 | 15.00 ± 1.41 | 2.170 ± 0.042 | -5.00 ± 1.41 | 55 ± 7 % | 2 |" in table


def test_modes_are_compared_on_the_seeds_that_they_share() -> None:
    runs = compared(line for line in records() if line["run"]["mode"] != "local" or line["run"]["seed"] == 1)
    assert runs.gain_over_local("window 2") == PerSeed((pytest.approx(-0.36),))
    assert runs.recovered("window 2") == PerSeed((pytest.approx(0.9),))
    assert "| window 2 | 8.762 ± 0.372 | 2.170 ± 0.042 | -0.360 | 90 % | 2 |" in TABLES.quality(runs)


def test_without_a_gap_no_share_of_it() -> None:
    lines = records()
    for line in lines:
        if line["run"]["mode"] == "local" and line["run"]["seed"] == 0:
            line["final"]["loss"] = 1.9
    assert compared(lines).recovered("window 2") is None
    assert "| window 2 | 8.762 ± 0.372 | 2.170 ± 0.042 | -0.030 ± 0.467 | – | 2 |" in TABLES.quality(
        compared(lines)
    )


def test_hardly_a_gap_has_no_shares() -> None:
    lines = records()
    of_global = compared(lines).results["global"][0].record["final"]["loss"]
    local = next(line for line in lines if line["run"]["mode"] == "local" and line["run"]["seed"] == 0)
    for times, is_noise in ((1.004, True), (1.006, False)):
        local["final"]["loss"] = times * of_global
        assert (compared(lines).recovered("window 2") is None) == is_noise


def test_a_target_that_some_seeds_miss_has_no_speed_up() -> None:
    lines = [line for line in records() if line["run"]["mode"] != "local"]
    lines[-1]["curve"][-1]["loss"] = 2.11  # of window 2, seed 1; its target is 2.1
    efficiency = Efficiency(compared(lines), [4, 1], lambda section, m: SECONDS[mode_of(section)][m])
    assert efficiency.micro_batches == (1, 4)
    assert efficiency.comparison.steps_to_target("window 2") == {0: pytest.approx(125), 1: None}
    assert efficiency.speed_up("window 2", 1) is None
    assert "| window 2 | not in 150 steps (1 of 2 seeds do) | 4.00 | 1.25 | – | – |" in TABLES.speed_up(
        efficiency
    )


def test_global_is_held_to_the_rule_of_the_others() -> None:
    dips = record("global", 0, [3.0, 1.8, 2.0])  # at 2.0, where it ends, after 50 + 50 * 1.0 / 1.2 steps
    dips["run"]["training"]["num_steps"] = 150
    other = record("window 2", 0, [3.0, 2.0, 1.8])
    other["run"]["training"]["num_steps"] = 150
    efficiency = Efficiency(compared([dips, other]), [1], lambda section, m: SECONDS[mode_of(section)][m])
    assert efficiency.speed_up("global", 1) == PerSeed((1.0,))
    assert efficiency.speed_up("window 2", 1) == PerSeed((pytest.approx(8 * (50 + 50 / 1.2) / (2 * 100)),))


def test_phases_of_a_schedule_add_up() -> None:
    section = {"schedule": [{"from_step": 0, "window": 1}, {"from_step": 100, "mode": "global"}]}
    line = record("growing", 0, [3.2, 2.4, 1.6], section=section)  # at 2.0 after 125 steps
    runs = compared([record("global", 0, LOSSES["global"][0]), line])
    efficiency = Efficiency(runs, [1], lambda section, m: 1.0 if section.get("window") == 1 else 8.0)
    assert efficiency.speed_up("growing", 1) == PerSeed((pytest.approx(800 / (100 * 1 + 25 * 8)),))
    assert "| growing | 125 | 8.00 → 1.00 | 2.67 |" in TABLES.speed_up(efficiency)
    # 800 s are 100 steps of 1 s and 87.5 of 8 s: beyond the curve.
    assert efficiency.at_equal_time("growing", 1) == (PerSeed((1.6,)), True)


def test_a_model_of_its_own_has_no_time() -> None:
    """Sections say nothing of the model, so that it would be given the time of the experiment's."""
    own = record("local", 0, [3.2, 2.4], model={"kind": "prose", "num_blocks": 3, "border_norm": True})
    own["run"]["mode"] = "local, border norm"
    lines = [*records(), own]
    efficiency = Efficiency(compared(lines), [1], lambda section, m: SECONDS[mode_of(section)][m])
    assert list(efficiency.phases) == ["global", "local", "window 2"]


def test_rivals_have_times_of_their_own() -> None:
    """2BW is not timed with few micro-batches; zero-bubble schedules have global's numbers."""
    rival = record("global", 0, [3.0, 2.2, 1.8])  # at 2.0 after 125 steps
    rival["run"] |= {"mode": "2BW", "interlock": {}, "asynchronous": "2bw"}
    rival["run"]["training"] |= {"optimizer": "nadam", "learning_rate": 1e-3}
    rivals = {"2bw": {4: 1.0}, "ZB-H1": {1: 4.0, 4: 2.5}}

    def seconds(flow: dict[str, str], m: int) -> float:
        name = flow.get("asynchronous") or flow.get("zero_bubble")
        of_mode = rivals.get(name, {}) if name else SECONDS[mode_of(flow)]
        if m not in of_mode:
            raise DataError("not timed")
        return of_mode[m]

    efficiency = Efficiency(compared([*records(), rival]), [1, 4], seconds)
    table = TABLES.speed_up(efficiency)
    assert "| 2BW | 125 | – | 4.00 | – | 3.20 |" in table  # 4 * 100 / 125
    assert "| global, ZB-H1 (computed) | 100 ± 0 | 2.00 | 1.60 | 2.00 ± 0.00 | 1.60 ± 0.00 |" in table
    assert "ZBV" not in table
    assert efficiency.fastest(4) == ("window 2", efficiency.speed_up("window 2", 4))  # only of ours
    table = TABLES.equal_time(efficiency)
    assert "| 2BW | – | ≤ 1.800 |" in table
    assert "| global, ZB-H1 (computed) | ≤ 2.050 ± 0.071 | ≤ 2.050 ± 0.071 |" in table
    assert "| 2BW | 9.025 | 2.200 | -0.400 | 67 % | 1 |" in TABLES.quality(efficiency.comparison)


def test_cells() -> None:
    assert cell(PerSeed((1.0, 2.0, 4.5)), 2) == "2.50 ± 1.80"
    assert cell(PerSeed((1.25,)), 1, signed=True) == "+1.2"
    assert percent(PerSeed((0.5, 1.0))) == "75 ± 35 %"
    assert PerSeed.of([1.0, None]) is None
    assert PerSeed.of([]) is None
