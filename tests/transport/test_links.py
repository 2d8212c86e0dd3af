"""Messages between two ranks: what arrives, and what is said when nothing does."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool, caught

from ds_interlock import ConfigError, PeerError
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.simulate import SEND_AHEAD
from ds_interlock.stage.hidden import DTYPES
from ds_interlock.transport.communicator import check_queues
from ds_interlock.transport.links import Links

CPU = torch.device("cpu")
SOON = 40.0
"""Seconds that show that nothing waited for the process groups' own limits, which are over 60."""


@pytest.fixture(scope="module")
def ranks4() -> Iterator[RankPool]:
    with RankPool(4, deepspeed=False) as pool:
        yield pool


@pytest.fixture(scope="module")
def ranks2() -> Iterator[RankPool]:
    with RankPool(2, deepspeed=False) as pool:
        yield pool


def links(timeout_seconds: float = 120.0) -> tuple[int, Links]:
    rank = torch.distributed.get_rank()
    return rank, Links([0, 1], rank, CPU, timeout_seconds)


def forward(micro_batch: int) -> tuple[Action, Action]:
    """The send on stage 0 and the receive on stage 1."""
    return Action.parse(f"0SEND_F{micro_batch}"), Action.parse(f"1RECV_F{micro_batch}")


# What arrives.


def structures() -> list[tuple[Any, Any]]:
    """Hidden states and labels of all forms; shapes change from message to message."""
    generator = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        (noise(2, 5, 3), torch.arange(10).reshape(2, 5)),
        (noise(2, 9, 3), torch.arange(18).reshape(2, 9)),
        ((noise(4), torch.tensor([[True], [False]]), torch.tensor([3, -1], dtype=torch.int32)), None),
        (noise(3, 3).bfloat16(), (torch.tensor(7, dtype=torch.uint8), noise(1).double())),
        (noise(0, 4), torch.empty(0, dtype=torch.int64)),
        ((noise(0), noise(2).half()), ()),
        (noise(6, 4).T, noise(5)[::2]),
        (torch.tensor(2.5), (torch.tensor([1], dtype=torch.int8),)),
        (noise(1, 1, 1, 1, 2), torch.tensor([1, 2], dtype=torch.int16)),
    ]


def exchange() -> list[Any]:
    rank, between = links()
    sent = structures()
    if rank == 0:
        for micro_batch, structure in enumerate(sent):
            between.send(forward(micro_batch)[0], 3, *structure)
        between.flush()
        return []
    for micro_batch in range(len(sent)):
        between.post(forward(micro_batch)[1], 3)
    return [between.take(forward(micro_batch)[1]) for micro_batch in range(len(sent))]


def exchange_every_dtype(num: int) -> list[str]:
    """On rank 1 the types of which other bytes arrive. Not what arrived: pickle lacks some types."""
    rank, between = links()
    sent = tuple((4 * torch.arange(num) - 8).to(dtype) for dtype in DTYPES)
    send, receive = forward(0)
    if rank == 0:
        between.send(send, 3, sent, None)
        between.flush()
        return []
    between.post(receive, 3)
    received, _ = between.take(receive)
    return [
        str(one.dtype)
        for one, other in zip(received, sent, strict=True)
        if one.dtype != other.dtype or not torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    ]


@pytest.mark.parametrize("num", [3, 9000])
def test_every_dtype_arrives(ranks2: RankPool, num: int):
    """In the frame, and after it."""
    assert ranks2.run(exchange_every_dtype, num=num) == [[], []]


def test_every_form_dtype_and_shape_arrives_as_it_was_sent(ranks2: RankPool):
    _, received = ranks2.run(exchange)
    for got, expected in zip(received, structures(), strict=True):
        for one, other in zip(got, expected, strict=True):
            assert type(one) is type(other)
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def send_from_changing_buffer() -> float:
    rank, between = links()
    send, receive = forward(0)
    if rank == 1:
        time.sleep(0.3)
        between.post(receive, 0)
        return float(between.take(receive)[0].sum())
    buffer = torch.ones(100_000)
    between.send(send, 0, buffer.clone(), None)
    del buffer
    between.flush()
    return 0.0


def test_a_tensor_that_the_sender_drops_still_arrives(ranks2: RankPool):
    assert ranks2.run(send_from_changing_buffer) == [0.0, 100_000.0]


def exchange_both_ways() -> list[float]:
    """Large messages in both directions at once, each taken only after everything was sent."""
    rank, between = links()
    ours = [("0SEND_F{}", "0RECV_I{}@2+5"), ("1SEND_I{}@2+5", "1RECV_F{}")][rank]
    num = SEND_AHEAD
    for index in range(num):
        between.post(Action.parse(ours[1].format(index)), 0)
    for index in range(num):
        between.send(Action.parse(ours[0].format(index)), 0, (torch.full((300_000,), 10.0 * rank + index),))
    got = [float(between.take(Action.parse(ours[1].format(index)))[0][0][-1]) for index in range(num)]
    between.flush()
    return got


def test_directions_do_not_wait_for_each_other(ranks2: RankPool):
    num = SEND_AHEAD
    assert ranks2.run(exchange_both_ways) == [[10.0 + i for i in range(num)], [0.0 + i for i in range(num)]]


def take_in_another_order() -> list[float]:
    """Messages may be taken in another order than they arrive in."""
    rank, between = links()
    if rank == 0:
        for micro_batch in range(3):
            between.send(forward(micro_batch)[0], 0, torch.tensor(float(micro_batch)))
        between.flush()
        return []
    for micro_batch in range(3):
        between.post(forward(micro_batch)[1], 0)
    return [float(between.take(forward(micro_batch)[1])[0]) for micro_batch in (2, 0, 1)]


def test_messages_are_kept_until_they_are_taken(ranks2: RankPool):
    assert ranks2.run(take_in_another_order)[1] == [2.0, 0.0, 1.0]


def run_away(folder: Path) -> list[bool]:
    """Rank 0 sends as fast as it can; rank 1 takes nothing until rank 0 has sent what it may, or longer.

    Returns whether rank 1 had begun to take, as each of rank 0's messages had gone.
    """
    rank, between = links()
    num = 4 * SEND_AHEAD
    payload = torch.zeros(2_000_000)  # more than a socket buffers
    had_begun: list[bool] = []
    if rank == 1:
        while not (folder / "ahead").exists():
            time.sleep(0.01)
        time.sleep(0.5)  # to run away in
        (folder / "begun").touch()
        for micro_batch in range(num):
            between.post(forward(micro_batch)[1], 0)
            between.take(forward(micro_batch)[1])
        return had_begun
    for micro_batch in range(num):
        between.send(forward(micro_batch)[0], 0, payload)
        had_begun.append((folder / "begun").exists())
        if len(had_begun) == SEND_AHEAD:
            (folder / "ahead").touch()
    between.flush()
    return had_begun


def test_a_sender_runs_ahead_but_not_away(ranks2: RankPool, tmp_path: Path):
    had_begun, _ = ranks2.run(run_away, folder=tmp_path)
    assert had_begun == [False] * SEND_AHEAD + [True] * 3 * SEND_AHEAD


def send_many_tensors() -> Exception | None:
    rank, between = links()
    tensors = tuple(torch.zeros(1) for _ in range(200))
    return caught(between.send, forward(0)[0], 0, tensors) if rank == 0 else None


def test_too_many_tensors_for_a_header(ranks2: RankPool):
    error, _ = ranks2.run(send_many_tensors)
    assert isinstance(error, ValueError)
    assert "200 tensors" in str(error)


# Set-up.


def open_links(pipelines: list[list[int]]) -> tuple[int, list[float]]:
    """The files that the links of this rank open, and what its neighbours send it."""
    rank = torch.distributed.get_rank()
    ranks = next(ranks for ranks in pipelines if rank in ranks)
    stage, last = ranks.index(rank), len(ranks) - 1
    before = len(os.listdir("/proc/self/fd"))
    between = Links(ranks, stage, CPU, 60.0)
    num_files = len(os.listdir("/proc/self/fd")) - before
    forwards, gradients = Action.parse(f"{stage}RECV_F0"), Action.parse(f"{stage}RECV_I0@1")
    for receive, exists in ((forwards, stage > 0), (gradients, stage < last)):
        if exists:
            between.post(receive, 0)
    for send, exists in ((f"{stage}SEND_F0", stage < last), (f"{stage}SEND_I0@1", stage > 0)):
        if exists:
            between.send(Action.parse(send), 0, (torch.full((9000,), float(rank)),))
    received = [
        float(between.take(receive)[0][0][-1])
        for receive, exists in ((forwards, stage > 0), (gradients, stage < last))
        if exists
    ]
    between.flush()
    torch.distributed.barrier()
    between.close()
    return num_files, received


def test_links_need_their_two_ranks_only_and_few_files(ranks4: RankPool):
    """Three stages beside a rank that has no link; then two pipelines; then four stages."""
    for pipelines, expected in (
        ([[3, 0, 2], [1]], [[3.0, 2.0], [], [0.0], [0.0]]),
        ([[0, 1], [2, 3]], [[1.0], [0.0], [3.0], [2.0]]),
        ([[0, 1, 2, 3]], [[1.0], [0.0, 2.0], [1.0, 3.0], [2.0]]),
    ):
        results = ranks4.run(open_links, pipelines=pipelines)
        assert [received for _, received in results] == expected
        assert max(num_files for num_files, _ in results) <= 12


# What is said when something else arrives, or nothing.


def post_and_take(between: Links, receive: Action, batch: int) -> None:
    """What is wrong with a message is said as soon as it is there, at either call."""
    between.post(receive, batch)
    between.take(receive)


def send_and_expect(send: str, expected: str, batches: tuple[int, int]) -> Exception | None:
    rank, between = links()
    if rank == 0:
        between.send(Action.parse(send), batches[0], torch.zeros(2))
    error = None if rank == 0 else caught(post_and_take, between, Action.parse(expected), batches[1])
    torch.distributed.barrier()
    return error


@pytest.mark.parametrize(
    ("send", "expected", "batches", "sent"),
    [
        ("0SEND_F3", "1RECV_F4", (0, 0), "1RECV_F3 of batch 0 where 1RECV_F4 of batch 0"),
        ("0SEND_F4", "1RECV_F4", (6, 7), "1RECV_F4 of batch 6 where 1RECV_F4 of batch 7"),
    ],
)
def test_a_message_that_is_not_the_one_expected(ranks2: RankPool, send, expected, batches, sent):
    _, error = ranks2.run(send_and_expect, send=send, expected=expected, batches=batches)
    assert isinstance(error, PeerError)
    assert "stage 0 (rank 0)" in str(error)
    assert sent in str(error)
    assert "different schedules" in str(error)


def send_other_relay() -> Exception | None:
    """Rank 1 relays the sum of losses 1 and 2 where rank 0 expects loss 1 alone."""
    rank, between = links()
    expected = Action.parse("0RECV_I0@1")
    if rank == 1:
        between.send(Action.parse("1SEND_I0@1+2"), 0, (torch.zeros(2),))
    error = None if rank == 1 else caught(post_and_take, between, expected, 0)
    torch.distributed.barrier()
    return error


def test_a_relay_of_other_losses(ranks2: RankPool):
    error, _ = ranks2.run(send_other_relay)
    assert isinstance(error, PeerError)
    assert "stage 1 (rank 1) sent 0RECV_I0@1+2" in str(error)
    assert "where 0RECV_I0@1 " in str(error)


def wait_for_nothing(timeout_seconds: float) -> tuple[Exception | None, float]:
    rank, between = links(timeout_seconds)
    start = time.monotonic()
    receive = forward(5)[1]
    error = None
    if rank == 1:
        between.post(receive, 0)
        error = caught(between.take, receive)
    seconds = time.monotonic() - start
    torch.distributed.barrier()
    between.close()
    return error, seconds


def test_a_silent_neighbour(ranks2: RankPool):
    _, (error, seconds) = ranks2.run(wait_for_nothing, timeout_seconds=1.5)
    assert isinstance(error, PeerError)
    assert 1.4 < seconds < SOON
    assert "stage 0 (rank 0) sent nothing for 1.5 s while 1RECV_F5 was due" in str(error)
    assert "interlock.timeout_seconds" in str(error)


def send_to_the_deaf(timeout_seconds: float) -> tuple[Exception | None, float]:
    rank, between = links(timeout_seconds)
    start = time.monotonic()

    def send() -> None:
        for micro_batch in range(SEND_AHEAD + 1):
            between.send(forward(micro_batch)[0], 0, torch.zeros(2_000_000))

    error = caught(send) if rank == 0 else None
    seconds = time.monotonic() - start
    torch.distributed.barrier()
    return error, seconds


def test_a_neighbour_that_takes_nothing(ranks2: RankPool):
    (error, seconds), _ = ranks2.run(send_to_the_deaf, timeout_seconds=1.5)
    assert isinstance(error, PeerError)
    assert 1.4 < seconds < SOON
    assert "stage 1 (rank 1) took nothing for 1.5 s while a message was due" in str(error)


def survive_a_death() -> tuple[Exception | None, Exception | None, float]:
    """Rank 1 dies at its second message; rank 0 was promised 60 s. Called on new ranks only."""
    rank, between = links(60)
    if rank == 1:
        between.send(Action.parse("1SEND_I0@1"), 0, (torch.ones(1),))
        between.flush()
        time.sleep(0.2)
        os._exit(7)
    for micro_batch in range(2):
        between.post(Action.parse(f"0RECV_I{micro_batch}@1"), 0)
    between.take(Action.parse("0RECV_I0@1"))
    start = time.monotonic()
    receiving = caught(between.take, Action.parse("0RECV_I1@1"))

    def send() -> None:
        between.send(forward(0)[0], 0, torch.zeros(10))
        between.flush()

    return receiving, caught(send), time.monotonic() - start


def test_a_neighbour_that_dies_is_noticed_at_once():
    with RankPool(2, deepspeed=False) as pool:
        results = pool.run_mortals(survive_a_death)
    assert results.keys() == {0}
    receiving, sending, seconds = results[0]
    for error, doing in ((receiving, "receiving from"), (sending, "sending to")):
        assert isinstance(error, PeerError)
        assert f"{doing} stage 1 (rank 1) failed; it has most likely stopped" in str(error)
    assert seconds < SOON


@pytest.mark.parametrize("number", ["1", "7"])
def test_few_hardware_queues_are_refused(number: str) -> None:
    """A send that waits for its receiver would hold up what shares its queue."""
    for enough in ("", "8", "32"):
        check_queues(enough)
    with pytest.raises(ConfigError, match=f"CUDA_DEVICE_MAX_CONNECTIONS is {number}: .* at least 8"):
        check_queues(number)
