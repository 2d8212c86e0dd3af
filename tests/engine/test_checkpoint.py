"""A run saved and resumed continues as if nothing had happened, bit for bit, or says why it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    FP32_ZERO_1,
    WARMUP,
    Job,
    Outcome,
    assert_same,
    data_for,
    is_same,
    make_engine,
    micro_batches,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ds_interlock import ConfigError
from ds_interlock.checkpoints.stages import read_file
from ds_interlock.engine.mapped_checkpoint import OtherShape

HEAD = {"type": "norm_linear", "blocks": 1, "token_fraction": 0.4, "weight": 0.7}
INTERLOCK = {"mode": "interlock", "window": 2, "head": HEAD}
HALF = 5


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Training data of which an epoch is 3 1/2 batches: a resumed run starts in the midst of one."""

    def __init__(self) -> None:
        self.samples = [(x[0], y[0]) for x, y in micro_batches(28, seed=8)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


class Stream:
    """Endless micro-batches, different for each replica, that know where they are."""

    def __init__(self, replica: int) -> None:
        self.micro_batches = micro_batches(9, replica=replica)
        self.position = 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.position += 1
        return self.micro_batches[self.position % len(self.micro_batches)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def load_in_this_process() -> None:
    """DeepSpeed gives every loader two worker processes, which take seconds to end."""
    from deepspeed.runtime import dataloader

    def without_workers(*args: Any, **kwargs: Any) -> Any:
        return DataLoader(*args, **{**kwargs, "num_workers": 0})

    dataloader.DataLoader = without_workers


def engine_with_data(job: Job, training_data: Any) -> Any:
    load_in_this_process()
    engine = make_engine(job, training_data=training_data)
    if training_data is None:
        engine.set_dataiterator(Stream(engine.grid.get_data_parallel_rank()))
    return engine


def train_on(engine: Any, num_batches: int) -> Outcome:
    """Trains on the engine's own data."""
    returned = [float(engine.train_batch()) for _ in range(num_batches)]
    return Outcome(returned, float(engine.drain()), parameters_of(engine))


def undisturbed_and_resumed(
    job: Job, folder: str, training_data: Any = None
) -> tuple[Outcome, Outcome, Outcome]:
    """10 batches in one go, saved on the way; its second half again in a new engine; and half-way."""
    engine = engine_with_data(job, training_data)
    half_way = train_on(engine, HALF)
    engine.save_checkpoint(folder, client_state={"note": 12})
    undisturbed = train_on(engine, HALF)
    engine.destroy()

    torch.manual_seed(31)  # whatever the new process has drawn
    engine = engine_with_data(job, training_data)
    engine.train_batch()  # not a fresh engine either
    _, client_state = engine.load_checkpoint(folder)
    assert client_state is not None
    assert client_state["note"] == 12
    assert engine.global_steps == HALF
    resumed = train_on(engine, HALF)
    engine.destroy()
    return undisturbed, resumed, half_way


def assert_resumes(pool: RankPool, job: Job, folder: Path, training_data: Any = None) -> None:
    results = pool.run(
        undisturbed_and_resumed,
        job=job,
        folder=str(folder),
        training_data=training_data,
    )
    undisturbed, resumed, half_way = ([result[part] for result in results] for part in range(3))
    assert_same(undisturbed, resumed)
    assert not is_same(undisturbed, half_way)
    if job.section is not None and not job.section.get("streaming", True):
        assert [o.returned for o in undisturbed] == [o.returned for o in resumed]


@pytest.mark.parametrize(
    ("section", "extra"),
    [
        (INTERLOCK, BF16),
        (INTERLOCK, BF16_ZERO_1),
        ({"mode": "global"}, {}),
        ({"mode": "global"}, BF16_ZERO_1),
    ],
    ids=["interlock, bf16", "interlock, bf16, ZeRO 1", "global, fp32", "global, bf16, ZeRO 1"],
)
def test_resumed_run(ranks4: RankPool, tmp_path: Path, section, extra):
    assert_resumes(ranks4, Job(section, extra=extra | WARMUP, dropout=0.2), tmp_path)


@pytest.mark.parametrize(
    ("steps", "extra"),
    [((3, 7), {}), ((3, 7), BF16_ZERO_1), ((HALF, 8), BF16), ((HALF, 8), BF16_ZERO_1)],
    ids=["within, fp32", "within, bf16, ZeRO 1", "between, bf16", "between, bf16, ZeRO 1"],
)
def test_resumed_run_whose_plan_changes(ranks4: RankPool, tmp_path: Path, steps, extra):
    """Window 1 uses a head that window 2 does not, before and after the checkpoint: it is unused in it."""
    phases = [{"from_step": step, "window": w} for step, w in zip((0, *steps), (1, 2, 1), strict=True)]
    section = {"schedule": phases, "head": HEAD}
    assert_resumes(ranks4, Job(section, extra=extra | WARMUP, dropout=0.2), tmp_path)


def test_resumed_run_on_training_data_of_the_engine(ranks4: RankPool, tmp_path: Path):
    assert_resumes(ranks4, Job(INTERLOCK, dropout=0.2), tmp_path, Sequences())


@pytest.mark.parametrize(
    "extra", [FP32_ZERO_1, BF16, BF16_ZERO_1], ids=["fp32, ZeRO 1", "bf16", "bf16, ZeRO 1"]
)
def test_resumed_run_with_replicas(ranks4: RankPool, tmp_path: Path, extra):
    section = {"mode": "local", "streaming": False, "head": HEAD}
    assert_resumes(ranks4, Job(section, num_stages=2, extra=extra | WARMUP, dropout=0.2), tmp_path)


@pytest.mark.parametrize("tied_weights", ["untie", "sync"])
def test_resumed_run_with_tied_weights(ranks4: RankPool, tmp_path: Path, tied_weights):
    section = {**INTERLOCK, "tied_weights": tied_weights, "head": {"type": "norm_linear"}}
    assert_resumes(ranks4, Job(section, tied=True, dropout=0.2), tmp_path)


def test_resumed_run_with_seeded_layers_and_heads_at_their_own_rate(ranks4: RankPool, tmp_path: Path):
    section = {**INTERLOCK, "window": 1.5, "head": {**HEAD, "learning_rate_scale": 0.3}}
    job = Job(section, extra=WARMUP, dropout=0.2, module={"seed_layers": True})
    assert_resumes(ranks4, job, tmp_path)


# Data that the engine does not own.


def resume_with_own_iterator(job: Job, folder: str) -> tuple[Outcome, Outcome, int]:
    engine = make_engine(job)
    data = data_for(engine, job)
    for _ in range(2):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    returned = [float(engine.train_batch(data)) for _ in range(3)]
    undisturbed = Outcome(returned, float(engine.drain()), parameters_of(engine))

    engine = make_engine(job)
    engine.load_checkpoint(folder)
    data = data_for(engine, job)
    if engine.is_first_stage():
        for _ in range(engine.consumed_micro_batches):
            next(data)
    returned = [float(engine.train_batch(data)) for _ in range(3)]
    resumed = Outcome(returned, float(engine.drain()), parameters_of(engine))
    return undisturbed, resumed, engine.consumed_micro_batches


def test_the_engine_says_how_far_into_the_data_it_was(ranks4: RankPool, tmp_path: Path):
    job = Job(INTERLOCK, num_micro_batches=3, dropout=0.2)
    results = ranks4.run(resume_with_own_iterator, job=job, folder=str(tmp_path))
    assert_same([r[0] for r in results], [r[1] for r in results])
    assert [r[2] for r in results] == [15, 0, 0, 0]


# Another mode, other heads, another size.


def saved_by_name(engine: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """The optimizer's state of all stages of a checkpoint."""
    checkpoint = OtherShape(engine, engine._checkpoints, folder, False, True, True)
    by_name = {}
    for stage in range(len(checkpoint._saved.states)):
        model = torch.load(folder / f"mp_rank_{stage:02d}_model_states.pt", weights_only=False)
        for name, saved in checkpoint._optimizer_of(stage, model).items():
            by_name[name] = {key: saved.whole(key) for key in saved.tensors} | saved.numbers
    return by_name


def resume_elsewhere(extra: dict[str, Any], folder: str) -> dict[str, Any]:
    """Window 2 in four stages; local; global in two stages of two replicas; window 2 as before."""
    window_2 = Job(INTERLOCK, extra=WARMUP | extra)
    local = window_2.but(section={"mode": "local", "head": HEAD})
    smaller = window_2.but(section={"mode": "global"}, num_stages=2, num_micro_batches=2)
    states, losses, positions = {}, {}, {}
    previous = None
    for tag, job in {"a": window_2, "b": local, "c": smaller, "d": window_2}.items():
        engine = make_engine(job)
        fresh = parameters_of(engine)
        if previous is not None:
            engine.load_checkpoint(folder, tag=previous)
        loaded, previous = parameters_of(engine), tag
        engine.save_checkpoint(folder, tag=f"{tag} loaded")
        if tag == "d":  # instead of what "c" does
            engine = make_engine(window_2.but(section={"mode": "global"}))
            engine.load_checkpoint(folder, tag="b")
        replica, num = engine.grid.get_data_parallel_rank(), job.num_micro_batches
        batch = micro_batches(4, seed=engine.global_steps)[replica * num : (replica + 1) * num]
        engine.train_batch(iter(batch))
        losses[tag] = float(engine.drain())
        states[tag] = fresh, loaded, parameters_of(engine)
        positions[tag] = engine.global_steps, engine.consumed_micro_batches
        engine.save_checkpoint(folder, tag=tag)
        contents = [saved_by_name(engine, Path(folder) / name) for name in (tag, f"{tag} loaded")]
        states[f"{tag} saved"] = contents
        engine.destroy()
    return {"states": states, "losses": losses, "positions": positions}


@pytest.mark.parametrize("extra", [{}, BF16, BF16_ZERO_1], ids=["fp32", "bf16", "bf16, ZeRO 1"])
def test_a_run_continues_in_another_mode_and_size(ranks4: RankPool, tmp_path: Path, extra):
    results = ranks4.run(resume_elsewhere, extra=extra, folder=str(tmp_path))
    for stage, result in enumerate(results):
        states = result["states"]
        for saved, loaded in ("ab", "bc", "cd"):
            before, after = states[f"{saved} saved"][0], states[f"{loaded} saved"][1]
            names = {name for name in before if name[0].isdigit()}
            assert len(names) == 37
            assert names <= after.keys()
            for name in names:  # moments, steps, and masters if there are some
                assert before[name].keys() == after[name].keys()
                assert all(
                    torch.equal(torch.as_tensor(v), torch.as_tensor(after[name][k]))
                    for k, v in before[name].items()
                )
        consumed = [4, 8, 6, 12] if stage == 0 else [0, 0, 6 * (stage == 1), 0]
        assert [result["positions"][tag] for tag in "abcd"] == list(zip((1, 2, 3, 3), consumed, strict=True))
        heads = {tag: [n for n in states[tag][0] if n.startswith("heads.")] for tag in "abd"}
        fresh, loaded, trained = states["b"]
        if stage == 0:
            assert all(torch.equal(fresh[name], loaded[name]) for name in heads["b"]), "it is new"
            assert any(not torch.equal(trained[name], loaded[name]) for name in heads["b"])
        for saved, taken in ("ab", "bd") if stage in (1, 2) else ():
            theirs = {n.split(".", 2)[2]: p for n, p in states[saved][2].items() if n.startswith("heads.")}
            new, kept, _ = states[taken]
            assert all(torch.equal(kept[name], theirs[name.split(".", 2)[2]]) for name in heads[taken])
            # In bf16 the first step is too small for the weight of a norm.
            assert any(not torch.equal(kept[name], new[name]) for name in heads[taken])
        # Two replicas continue as one did.
        assert result["losses"]["c"] == pytest.approx(result["losses"]["d"], rel=1e-2 if extra else 1e-5)


def load_only_the_module(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    engine = make_engine(Job(INTERLOCK))
    engine.train_batch(iter(micro_batches(4)))
    engine.save_checkpoint(folder, tag="first")
    saved = parameters_of(engine)
    engine = make_engine(Job({"mode": "local", "head": HEAD}))
    engine.load_checkpoint(folder, load_module_only=True)
    return saved, parameters_of(engine), engine.global_steps


def test_layers_and_heads_alone(ranks4: RankPool, tmp_path: Path):
    for saved, loaded, steps in ranks4.run(load_only_the_module, folder=str(tmp_path)):
        assert steps == 0
        assert all(torch.equal(loaded[name], p) for name, p in saved.items() if name[0].isdigit())


def resume_with_heads_of_another_type(folder: str) -> list[dict[str, Tensor]]:
    """Before and after each load: "low_rank" continues what "block_linear" began, and the other way round."""
    parameters, previous = [], None
    for tag, head in {"a": HEAD, "b": {"type": "low_rank", "rank": 2}, "c": HEAD}.items():
        engine = make_engine(Job({**INTERLOCK, "head": head}))
        parameters.append(parameters_of(engine))
        if previous is not None:
            engine.load_checkpoint(folder, tag=previous)
        parameters.append(parameters_of(engine))
        if tag == "b":  # the state of layers is that of the checkpoint
            engine.save_checkpoint(folder, tag="b loaded")
            saved = [saved_by_name(engine, Path(folder) / name) for name in ("a", "b loaded")]
            for name in [name for name in saved[0] if name[0].isdigit()]:
                assert all(
                    torch.equal(torch.as_tensor(v), saved[1][name][k]) for k, v in saved[0][name].items()
                )
        engine.train_batch(iter(micro_batches(4)))
        engine.save_checkpoint(folder, tag=tag)
        parameters.append(parameters_of(engine))
        previous = tag
        engine.destroy()
    return parameters


def test_heads_of_another_type_start_anew_and_the_old_ones_are_kept_aside(ranks4: RankPool, tmp_path: Path):
    for stage, states in enumerate(ranks4.run(resume_with_heads_of_another_type, folder=str(tmp_path))):
        _, _, block, fresh, loaded, _, other, back, _ = states
        heads, old = ([n for n in state if n.startswith("heads.")] for state in (loaded, block))
        assert (set(heads) != set(old)) == (stage in (1, 2))
        assert all(torch.equal(fresh[name], loaded[name]) for name in heads), "new heads start anew"
        assert all(torch.equal(block[name], loaded[name]) for name in loaded if name not in heads)
        assert all(torch.equal(block[name], back[name]) for name in old), "they were kept aside"
        assert not old or any(not torch.equal(other[name], back[name]) for name in old)


# Refusals.


def load_what_is_not_there(folder: str) -> tuple[Any, dict[str, Exception | None], list[bool]]:
    """Nothing to load; then a damaged checkpoint among others, which is the newest."""
    engine = make_engine(Job(INTERLOCK))
    nothing = engine.load_checkpoint(folder)
    for tag in ("first", "second", "third"):
        engine.train_batch(iter(micro_batches(4)))
        engine.save_checkpoint(folder, tag=tag)
    if engine.global_rank == 0:
        damage(Path(folder) / "third" / "layer_05-model_states.pt")
        (Path(folder) / "second" / "interlock_rank_00002.pt").unlink()
    torch.distributed.barrier()
    before = parameters_of(engine)
    errors = {tag: caught(engine.load_checkpoint, folder, tag=tag) for tag in (None, "second", "fourth")}
    errors["../first"] = caught(engine.load_checkpoint, folder, tag="../first")
    errors["save"] = caught(engine.save_checkpoint, folder, tag="../fourth")
    untouched = [torch.equal(p, before[name]) for name, p in parameters_of(engine).items()]
    engine.load_checkpoint(folder, tag="first")
    return nothing, errors, [*untouched, engine.global_steps == 1]


def damage(file: Path) -> None:
    content = file.read_bytes()
    start = content.index(b"data/0") + 6  # of a header that ends within 64 bytes
    file.write_bytes(content[:start] + bytes(byte ^ 1 for byte in content[start:-1]) + content[-1:])


@pytest.mark.bad_input
def test_a_damaged_checkpoint_is_refused_on_every_rank_and_the_newest_whole_one_named(
    ranks4: RankPool, tmp_path: Path
) -> None:
    whole = "cannot be used; load first, the newest whole one"
    says = {
        None: ("third/layer_05-model_states.pt is damaged (", f"the checkpoint third {whole}"),
        "second": (f"second/interlock_rank_00002.pt is missing: the checkpoint second {whole}",),
        "fourth": (f"{tmp_path}/fourth is missing: the checkpoint fourth {whole}",),
        "../first": ("'../first' is no tag of a checkpoint in",),
        "save": ("'../fourth' is no tag of a checkpoint in",),
    }
    for nothing, errors, checks in ranks4.run(load_what_is_not_there, folder=str(tmp_path)):
        assert nothing == (None, None)
        assert all(checks)
        for tag, parts in says.items():
            assert isinstance(errors[tag], ConfigError), tag
            assert all(part in str(errors[tag]) for part in parts), errors[tag]


def load_without_the_optimizer(folder: str) -> float:
    """How far one step, of a length of 1e-2, leads from what was loaded."""
    engine = make_engine(Job(INTERLOCK, extra=BF16))
    for seed in range(8):
        engine.train_batch(iter(micro_batches(4, seed=seed)))
    engine.save_checkpoint(folder)
    engine = make_engine(Job(INTERLOCK, extra=BF16))
    engine.load_checkpoint(folder, load_optimizer_states=False)
    loaded = parameters_of(engine)
    engine.train_batch(iter(micro_batches(4)))
    engine.drain()
    return max(float((p - loaded[name]).abs().max()) for name, p in parameters_of(engine).items())


def test_without_its_optimizer_state_a_checkpoint_still_replaces_bf16_masters(
    ranks4: RankPool, tmp_path: Path
):
    assert max(ranks4.run(load_without_the_optimizer, folder=str(tmp_path))) < 0.03


# Interrupted saves.


def load_what_was_being_replaced(folder: str) -> bool:
    engine = make_engine(Job(INTERLOCK))
    engine.train_batch(iter(micro_batches(4)))
    engine.save_checkpoint(folder, tag="only")
    saved = parameters_of(engine)
    if engine.global_rank == 0:
        (Path(folder) / "only").rename(Path(folder) / "only.replaced")
    torch.distributed.barrier()
    engine = make_engine(Job(INTERLOCK))
    engine.load_checkpoint(folder)
    return all(torch.equal(saved[name], parameter) for name, parameter in parameters_of(engine).items())


def test_a_replacement_cut_off_between_its_renames_loses_nothing(ranks4: RankPool, tmp_path: Path):
    assert all(ranks4.run(load_what_was_being_replaced, folder=str(tmp_path)))


class DiskFullError(OSError):
    """Raised by the test in the middle of a save."""


def interrupt_a_save(folder: str) -> dict[str, Any]:
    """Saves once; all ranks fail half-way through the second save; then a new engine loads."""
    job = Job(INTERLOCK)
    engine = make_engine(job)
    engine.train_batch(iter(micro_batches(4)))
    engine.save_checkpoint(folder, tag="good")
    good = parameters_of(engine)
    engine.train_batch(iter(micro_batches(4, seed=6)))

    genuine, saved = torch.save, []

    def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(str(path))
        if "interlock_rank" in str(path):
            raise DiskFullError("no space left")
        genuine(obj, path, *args, **kwargs)

    torch.save = save
    try:
        error = caught(engine.save_checkpoint, folder, tag="good")  # the very name of the good one
    finally:
        torch.save = genuine
    torch.distributed.barrier()
    on_disk = sorted(path.name for path in Path(folder).iterdir())
    latest = (Path(folder) / "latest").read_text()

    engine = make_engine(job)
    engine.load_checkpoint(folder)
    loaded = parameters_of(engine)
    engine.save_checkpoint(folder, tag="next")
    return {
        "error": error,
        "num_saved": len(saved),
        "on_disk": on_disk,
        "latest": latest,
        "same": all(torch.equal(loaded[name], parameter) for name, parameter in good.items()),
        "afterwards": (Path(folder) / "latest").read_text(),
    }


def test_an_interrupted_save_leaves_the_last_checkpoint_in_force(ranks4: RankPool, tmp_path: Path):
    for result in ranks4.run(interrupt_a_save, folder=str(tmp_path)):
        assert isinstance(result["error"], DiskFullError)
        assert result["num_saved"] > 1, "it must have been in the middle of it"
        assert result["latest"] == "good"
        assert "good" in result["on_disk"]
        assert result["same"]
        assert result["afterwards"] == "next"


def save_twice(folder: str) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    engine = make_engine(Job(INTERLOCK))
    for seed in (5, 6):
        engine.train_batch(iter(micro_batches(4, seed=seed)))
        engine.save_checkpoint(folder, tag=0)
    newest = parameters_of(engine)
    engine = make_engine(Job(INTERLOCK))
    engine.load_checkpoint(folder)
    return sorted(path.name for path in Path(folder).iterdir()), newest, parameters_of(engine)


def test_a_checkpoint_can_be_replaced_and_leaves_nothing_behind(ranks4: RankPool, tmp_path: Path):
    for on_disk, newest, loaded in ranks4.run(save_twice, folder=str(tmp_path)):
        assert [name for name in on_disk if name != "zero_to_fp32.py"] == ["0", "latest"]
        assert all(torch.equal(loaded[name], parameter) for name, parameter in newest.items())


class Harmful:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.bad_input
def test_loading_a_checkpoint_runs_no_code_of_it(tmp_path: Path):
    trace, file = tmp_path / "trace", tmp_path / "interlock_rank_00000.pt"
    torch.save({"data_iterator": Harmful(trace)}, file)
    with pytest.raises(
        ConfigError, match=r"rank_00000.pt holds objects.*torch.serialization.add_safe_globals"
    ):
        read_file(file)
    assert not trace.exists()
