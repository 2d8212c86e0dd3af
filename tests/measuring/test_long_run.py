"""What ``measuring.long_run`` concludes from what its ranks say."""

from measuring.long_run import Rank, batches_ahead, compare


def test_how_far_a_stage_is_ahead() -> None:
    assert batches_ahead([1.0, 2.0, 3.0, 9.0], [2.5, 3.5, 8.0, 10.0]) == 2
    assert batches_ahead([1.0, 2.0], [1.0, 2.0]) == 1


def test_what_is_not_as_it_should_be_is_a_problem() -> None:
    expected = {"first": 1.0, "second": 2.0}
    good = Rank(1000, 1010, [1.0, 3.0], expected, [], 0.0)
    assert compare(expected, [good])["problems"] == []
    lost = Rank(1000, 1000, [1.0, 3.0], {"first": 1.0}, [], 0.0)
    assert compare(expected, [lost])["problems"] == ["1 losses were never reported"]
    mixed_up = Rank(1000, 1000, [1.0, 3.0], {"first": 2.0, "second": 2.0}, [], 0.0)
    assert compare(expected, [mixed_up])["problems"] == ["1 losses are not their batch's, first the first"]
    grown = Rank(1000, 1030, [1.0, 3.0], {}, [], 0.0)
    assert compare(expected, [good, grown])["problems"] == ["memory of rank 1 grew by 3.0%"]
