"""A part of the matrix of precision, replicas, checkpointing, compilation and modes (see ``make matrix``)."""

from matrix import LIMIT, MODES, PRECISIONS, Combination, distance, reference, results, train_all
from ranks import RankPool

PART = [
    Combination("fp32", 1, True, False, "window 3"),
    Combination("bf16, ZeRO-1", 1, True, True, "window 2"),
    Combination("autocast", 1, False, False, "window 1.5"),
]


def test_a_part_of_the_matrix(ranks4: RankPool) -> None:
    by_rank = ranks4.run(train_all, chosen=PART)
    for combination, result in zip(PART, results(PART, by_rank), strict=True):
        assert isinstance(result, float), (combination, result)
        assert result <= LIMIT[combination.precision], combination
        # Where less than float32 is asked for, less is used.
        assert (result > LIMIT["fp32"]) == (combination.precision != "fp32"), combination


def test_the_limits_tell_modes_and_replicas_apart() -> None:
    right = reference("window 2", 2)
    others = [reference(mode, 2) for mode in MODES if mode != "window 2"] + [reference("window 2", 1)]
    for other in others:
        names = right.keys() & other.keys()
        assert distance({name: other[name] for name in names}, right) > 2 * max(LIMIT.values())
    assert set(LIMIT) == set(PRECISIONS)
