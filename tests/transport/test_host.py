"""Integers travel with the header where the host knows their values. The device is torch's "meta" here."""

import torch

from ds_interlock.schedule.action import Action
from ds_interlock.transport.host import on_host, with_host_copy
from ds_interlock.transport.message import decode, encode

LABELS = torch.arange(9).reshape(3, 3)


def on_device(values: torch.Tensor) -> torch.Tensor:
    return with_host_copy(torch.empty_like(values, device="meta"), values)


def test_the_host_knows_integers_until_they_change():
    labels = on_device(LABELS)
    assert on_host(LABELS) is LABELS
    assert on_host(labels) is LABELS
    assert on_host(labels.detach()) is LABELS, "as stages hand it on"
    for other in (labels[0], labels.T.contiguous(), labels + 1, labels.view(torch.float64), labels.flatten()):
        assert on_host(other) is None
    view = labels.detach()
    view += 1
    assert on_host(labels) is None


def test_only_floats_and_integers_that_the_host_does_not_know_are_payloads():
    hidden, mask, labels = (
        torch.empty(2, 4, device="meta", dtype=t) for t in (torch.float32, torch.bool, int)
    )
    receive = Action.parse("1RECV_F0")
    structures = ((hidden, mask, on_device(LABELS.bool())), (labels, on_device(LABELS)))
    frame, payloads = encode(receive, 7, structures, floats_inline=False)
    assert [(p.shape, p.dtype) for p in payloads] == [(t.shape, t.dtype) for t in (hidden, mask, labels)]
    contents = decode(frame, receive, 7, "stage 0")
    assert [tensor is None for tensor in contents.tensors] == [True, True, False, True, False]
    arrived = contents.structures(contents.empty(torch.device("cpu")), torch.device("cpu"))
    assert torch.equal(arrived[0][2], LABELS.bool())
    assert torch.equal(arrived[1][1], LABELS)
