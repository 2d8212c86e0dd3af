"""The base model's states: what stage 0 finds in the files is what the whole model makes of each sample."""

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, save_tiny
from ranks import RankPool
from torch import Tensor

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.batches import BatchShape, EvaluationBatches, TrainingBatches
from ds_interlock.hf.data.rows import PackedRows, PaddedRows, Rows
from ds_interlock.hf.data.samples import Sample
from ds_interlock.hf.model.base_states import (
    BaseStates,
    Places,
    Share,
    check_room,
    digest_of_model,
    from_stage_0,
    map_states,
    new_states_file,
    record,
)

SEQ_LENGTH = 20
WIDTH = 32  # of the tiny models
KINDS = {"padded": PaddedRows, "packed": PackedRows}
OF = {"model": "a", "set of training samples": "b"}


def samples(num: int = 21) -> list[Sample]:
    """Random tokens, one sample as long as a row; the first label of each is ignored."""
    draw = random.Random(3)
    lengths = [draw.randint(1, SEQ_LENGTH) for _ in range(num - 1)] + [SEQ_LENGTH]
    tokens = [[draw.randrange(3, VOCABULARY) for _ in range(length + 1)] for length in lengths]
    return [Sample(ids[:-1], [-100, *ids[2:]]) for ids in tokens]


# On a pipeline.


def states_of_a_pipeline(
    model: str, folder: str, kind: str, stage_bounds: list[int], shape: BatchShape
) -> Any:
    """Records on this rank; of two epochs on stage 0 returns (inputs, last states, those of head 0), ..."""
    import ds_interlock
    from ds_interlock import InterlockConfig, InterlockPipelineModule
    from ds_interlock.hf.model.pretrained import open_pretrained
    from ds_interlock.models.lm import lm_loss

    rows: Rows = KINDS[kind](samples(), SEQ_LENGTH)
    pretrained = open_pretrained(model)
    config = {
        "train_micro_batch_size_per_gpu": shape.micro_batch_size,
        "gradient_accumulation_steps": shape.num_micro_batches,
        "steps_per_print": None,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "interlock": {
            "mode": "local",
            "timeout_seconds": 60,
            "head": {"objective": {"kl": 1, "reconstruction": 1}},
        },
    }
    net = InterlockPipelineModule(
        layers=pretrained.blueprint(rows.names).layers(),
        loss_fn=lm_loss(),
        stage_bounds=stage_bounds,
        num_stages=len(stage_bounds) - 1,
        interlock=InterlockConfig.from_deepspeed(config),
        pretrained=True,
    )
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    replica = engine.grid.get_data_parallel_rank()
    batches = [EvaluationBatches(rows, shape, replica=r) for r in range(shape.num_replicas)]
    shares = [Share.of(of_replica, model="tiny") for of_replica in batches]
    own = batches[replica] if engine.is_first_stage() else None
    shares = from_stage_0(engine, shares if engine.is_first_stage() else [])
    record(engine, Path(folder), own, shares[replica], WIDTH, torch.float32)
    found = []
    if engine.is_first_stage():
        training = TrainingBatches(rows, shape, replica=replica, seed=5)
        training.places_of_rows = Places(shares).stack
        last, first = (BaseStates(Path(folder), shares, layer) for layer in (None, stage_bounds[1]))
        num = 2 * len(rows.arrange(np.arange(len(rows.samples)))) // shape.num_rows * shape.num_micro_batches
        for inputs, (labels_bt, _, places_bt) in islice(training, num):
            places_n = places_bt.flatten()
            states = [of(places_n).view(*labels_bt.shape, WIDTH) for of in (last, first)]
            found.append((inputs, *states))
    engine.drain()
    engine.destroy()
    return found


def alone(model: Any, ids_bt: Tensor, other_bt: Tensor, kind: str, number: int) -> Tensor:
    """A hidden state of the whole model for each sample of a micro-batch by itself; 0 at padding."""
    base_btd = torch.zeros(*ids_bt.shape, WIDTH)
    for ids_t, other_t, base_td in zip(ids_bt, other_bt, base_btd, strict=True):
        starts = [0] if kind == "padded" else (other_t == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids_t)], strict=True):
            own_t = ids_t[start:stop]
            own_t = own_t[own_t >= 3]  # 0 pads
            if len(own_t):
                with torch.no_grad():
                    outputs = model.model(own_t[None], output_hidden_states=True)
                    base_td[start : start + len(own_t)] = outputs.hidden_states[number][0]
    return base_btd


@pytest.mark.parametrize(
    ("kind", "stage_bounds"),
    [("padded", [0, 3, 7]), ("packed", [0, 1, 3, 6, 7])],
    ids=["padded, replicas", "packed, end before last"],
)
def test_stage_0_finds_what_the_whole_model_makes_of_each_sample(
    kind: str, stage_bounds: list[int], ranks4: RankPool, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    shape = BatchShape(micro_batch_size=2, num_micro_batches=2, num_replicas=4 // (len(stage_bounds) - 1))
    found = ranks4.run(
        states_of_a_pipeline,
        model=str(tmp_path / "model"),
        folder=str(tmp_path / "states"),
        kind=kind,
        stage_bounds=stage_bounds,
        shape=shape,
    )
    of_stage_0 = [micro_batches for micro_batches in found if micro_batches]
    assert len(of_stage_0) == shape.num_replicas
    num_compared = 0
    for (ids_bt, other_bt), *states in (pair for micro_batches in of_stage_0 for pair in micro_batches):
        for base_btd, number in zip(states, (-1, stage_bounds[1] - 1), strict=True):
            expected = alone(model, ids_bt, other_bt, kind, number)
            own = ids_bt >= 3  # 0 pads
            torch.testing.assert_close(base_btd[own], expected[own], rtol=0, atol=1e-5)
            assert not expected[~own].any()
        num_compared += int(own.sum())
    assert num_compared > sum(len(sample.ids) for sample in samples()), "more than an epoch"
    files = sorted(path.name for path in (tmp_path / "states").iterdir())
    prefixes = [f"after_layer_{bound}_" for bound in stage_bounds[1:-1]] + [""]
    replicas = [f"replica_{replica:02d}.safetensors" for replica in range(shape.num_replicas)]
    assert files == sorted(prefix + name for prefix in prefixes for name in replicas)


# Shares.


def share(rows: Rows, model: str = "m", **shape: int) -> Share:
    of = {"micro_batch_size": 2, "num_micro_batches": 2, "num_replicas": 2, **shape}
    return Share.of(EvaluationBatches(rows, BatchShape(**of), replica=1), model)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_have_every_sample_once(kind: str) -> None:
    rows = KINDS[kind](samples(), SEQ_LENGTH)
    shape = BatchShape(2, 2, 3)
    shares = [Share.of(EvaluationBatches(rows, shape, replica=r), "m") for r in range(3)]
    assert sorted(number for one in shares for number in one.samples) == list(range(21))
    for one in shares:
        assert one.lengths == tuple(len(rows.samples[number].ids) for number in one.samples)
        assert sum(one.row_lengths) == sum(one.lengths)
        assert max(one.row_lengths) <= SEQ_LENGTH
        assert len(one.row_lengths) % 4 == 0, "whole batches"


def test_a_share_knows_model_samples_and_order() -> None:
    first = share(PaddedRows(samples(), SEQ_LENGTH)).fingerprint
    assert first == share(PaddedRows(samples(), 2 * SEQ_LENGTH)).fingerprint, "padding makes no difference"
    other = samples()
    other[6].ids[0] ^= 1
    for changed in (
        share(PaddedRows(other, SEQ_LENGTH)),
        share(PaddedRows(samples(20), SEQ_LENGTH)),
        share(PaddedRows(samples(), SEQ_LENGTH), micro_batch_size=1),
        share(PackedRows(samples(), SEQ_LENGTH)),
    ):
        assert changed.fingerprint["set of training samples"] != first["set of training samples"]
        assert changed.fingerprint["model"] == first["model"]
    assert share(PaddedRows(samples(), SEQ_LENGTH), model="n").fingerprint["model"] != first["model"]


def test_a_model_is_known_by_its_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "one", shards="20KB")
    save_tiny("llama", tmp_path / "two", shards="20KB")
    save_tiny("llama", tmp_path / "three", seed=1, shards="20KB")
    one, two, three = (digest_of_model(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three


# The file.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_has_its_name_once_it_is_complete(dtype: torch.dtype, tmp_path: Path) -> None:
    states_nd = torch.randn(7, 5, dtype=dtype)
    path = tmp_path / "folder" / "states.safetensors"
    with new_states_file(path, (7, 5), dtype, OF) as append:
        for start, stop in ((0, 3), (3, 3), (3, 7)):
            append(states_nd[start:stop])
            assert not path.exists()
    found = map_states(path, OF)
    assert found.dtype == dtype
    assert torch.equal(found, states_nd)
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_an_incomplete_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "states.safetensors", 4)
    with pytest.raises(AssertionError, match="5 of 8 positions were not appended"):
        write(path, 3, of=8)
    assert len(map_states(path, OF)) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    message = r"--output_dir: .* cannot be written to .*states.safetensors \(File too large\); make room"
    with no_file_larger_than(30_000), pytest.raises(ConfigError, match=message):
        write(path, 2000)
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_told_beforehand(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "folder", 1000)
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ConfigError, match=r"take 1000000000.00 GB, and the disk of .* GB left"):
        check_room(tmp_path, 10**18)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written to .*file \(File exists\)"):
        check_room(tmp_path / "file", 1)


@pytest.mark.bad_input
def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "base_states" / "states.safetensors"
    with pytest.raises(ConfigError, match=r"states.safetensors is missing.*needs the folder base_states"):
        map_states(path, OF)
    write(path, 4)
    with pytest.raises(ConfigError, match="was written for another model and another set of training"):
        map_states(path, {"model": "x", "set of training samples": "y"})
    with pytest.raises(ConfigError, match=r"was written for another model: "):
        map_states(path, {**OF, "model": "x"})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"states.safetensors cannot be read"):
        map_states(path, OF)


def write(path: Path, num_positions: int, of: int | None = None) -> Path:
    with new_states_file(path, (of or num_positions, 5), torch.float32, OF) as append:
        for _ in range(num_positions):
            append(torch.ones(1, 5))
    return path


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """As a full disk does, the system refuses to write more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
