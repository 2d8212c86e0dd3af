"""Which measurement counts for a setting; test_published_results.py checks that the package's are current."""

from pathlib import Path

import pytest
from made_up_measurements import LOCAL, PHASES, PROSE, measured, use, window

from ds_interlock.config import InterlockConfig
from ds_interlock.planning import quality
from ds_interlock.planning.quality import Measurements, beats_local, elsewhere, measurement, schedules


def section(**keys: object) -> InterlockConfig:
    return InterlockConfig.model_validate(keys)


def test_the_packages_file_has_measurements_of_settings_that_exist() -> None:
    measurements = Measurements.model_validate_json(quality.FILE.read_text()).measurements
    assert {"transformer", "resnet"} <= {each.experiment for each in measurements}
    for each in measurements:
        assert measurement(each.section, each.num_stages), each.mode


def test_what_was_not_measured_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path, *PROSE)
    assert measurement(section(**window(3)), 4) == PROSE[3]
    assert measurement(section(), 8) is None
    for keys in (window(2, head_stride=2), window(2, combine="farthest"), window(2.5), window(4)):
        assert measurement(section(**keys), 8) is None
        assert beats_local(section(**keys), 8) is None
    for head in ({"blocks": 1}, {"type": "low_rank"}, {"token_fraction": 0.5}, {"weight": 2.0}):
        assert measurement(section(**window(2, head=head)), 8) is None, head


def test_how_heads_learn_and_how_they_are_written_makes_no_difference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = measured(window(2, head={"blocks": [1, 1]}), 0.9)
    use(monkeypatch, tmp_path, *PROSE, deep)
    fast = {"type": "norm_linear", "learning_rate_scale": 3.0, "fused": False, "warmup_steps": 5}
    assert measurement(section(**window(2, head=fast)), 8) == PROSE[2]
    assert measurement(section(**window(2, head={"blocks": 1})), 8) == deep
    assert measurement(section(mode="interlock", window=1), 8) == PROSE[0]
    assert measurement(section(**window(1.25)), 8) == PROSE[1]  # a fraction of a stage of two layers
    assert measurement(section(schedule=PHASES), 8) == PROSE[4]
    assert measurement(section(schedule=[*PHASES, {"from_step": 900, "mode": "global"}]), 8) is None


def test_better_than_local_is_by_more_than_the_deviation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = {"blocks": 1}
    within = measured(window(3, head=deep), 0.9, gain=0.004, deviation=0.005)
    use(
        monkeypatch,
        tmp_path,
        *PROSE,
        within,
        measured(window(2, head=deep), 0.9, gain=0.006, deviation=0.005),
    )
    assert beats_local(section(**window(2)), 8) is True
    assert beats_local(section(**window(2, head=deep)), 8) is True
    assert beats_local(section(**window(3, head=deep)), 8) is False
    assert beats_local(section(**window(1.5)), 8) is False
    assert beats_local(section(**window(1.5, head=deep)), 8) is False  # until it is measured
    assert beats_local(section(**LOCAL), 8) is None
    assert beats_local(section(), 8) is None


def test_a_single_seed_is_better_by_more_than_any_deviation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    three = measured(window(2), 0.7, gain=0.04, deviation=0.01)
    ones = [measured(window(w), 0.7, seeds=(0,), gain=g, deviation=None) for w, g in ((3, 0.009), (4, 0.011))]
    use(monkeypatch, tmp_path, three, *ones)
    assert [beats_local(section(**window(w)), 8) for w in (2, 3, 4)] == [True, False, True]


def test_which_experiment_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the last to the first: each has what comes earlier in the rule than what the next one has."""
    candidates = [
        measured(window(2), 0.5, experiment="pictures", is_language=False, num_stages=4, model_size=10**9),
        measured(window(2), 0.5, experiment="one seed", num_stages=4, seeds=(0,), model_size=10**9),
        measured(window(2), 0.5, experiment="far", num_stages=32, seeds=tuple(range(9))),
        measured(window(2), 0.5, experiment="small", num_stages=4, model_size=64, budget=10**6),
        measured(window(2), 0.5, experiment="short", num_stages=4, budget=100),
        measured(window(2), 0.6, experiment="slow heads", num_stages=4),
        measured(window(2), 0.7, experiment="best", num_stages=4),
    ]
    while candidates:
        use(monkeypatch, tmp_path, *candidates)
        chosen = measurement(section(**window(2)), 4)
        assert chosen == candidates.pop()


def test_one_experiment_answers_for_most_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Although a larger model was measured with one of them."""
    large = measured(window(2), 0.5, experiment="large", model_size=10**9)
    pictures = measured(window(2), 0.5, experiment="pictures", is_language=False)
    one_seed = measured(window(2), 0.5, experiment="one seed", seeds=(0,))
    use(monkeypatch, tmp_path, large, pictures, one_seed, *PROSE)
    assert measurement(section(**window(2)), 8) == PROSE[2]
    assert elsewhere(PROSE[2]) == [large]
    assert elsewhere(pictures) == []


def test_schedules_are_those_that_reached_globals_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = measured({"schedule": [*PHASES, {"from_step": 900, "window": 3}]}, 0.5)
    use(monkeypatch, tmp_path, *PROSE, never)
    (schedule,) = schedules(8)
    assert schedule == PROSE[4]
    assert [start for start, _ in schedule.phases] == [0, 0.4]
