"""Checkpoints that DeepSpeed or a converter wrote, and ours in DeepSpeed's hands."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    BF16_ZERO_1_FP32_SUMS,
    FP32_ZERO_1,
    WARMUP,
    Job,
    make_engine,
    make_module,
    micro_batches,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor

import ds_interlock
from ds_interlock import ConfigError

GLOBAL = {"mode": "global"}
LOCAL = {"mode": "local", "head": {"learning_rate_scale": 0.5}}
WINDOW_2 = {"mode": "interlock", "window": 2}
FRACTIONAL = {"mode": "interlock", "window": 1.5}
EXTRA = WARMUP | {"gradient_clipping": 0.0}
DEEPSPEED = Job(None, extra=EXTRA)


def train(engine: Any, batches: Sequence[int]) -> list[float]:
    """Trains on the batches with these seeds; the exact loss of each."""
    losses = []
    for seed in batches:
        loss = engine.train_batch(
            iter(micro_batches(4, seed=seed, replica=engine.grid.get_data_parallel_rank()))
        )
        losses.append(float(engine.drain() if hasattr(engine, "drain") else loss))
    return losses


def resumed(job: Job, folder: str) -> tuple[list[float], dict[str, Tensor], int]:
    engine = make_engine(job)
    train(engine, [8])  # not a fresh one
    engine.load_checkpoint(folder)
    losses = train(engine, [3, 4])
    result = losses, parameters_of(engine), engine.global_steps
    engine.destroy()
    return result


def there_and_back(theirs: Job, folder: str) -> dict[str, Any]:
    """Each of DeepSpeed and global: two batches, saved, and two more; then each resumes the other."""
    results: dict[str, Any] = {}
    ours = theirs.but(section=GLOBAL)
    for name, job in {"theirs": theirs, "ours": ours}.items():
        engine = make_engine(job)
        train(engine, [1, 2])
        engine.save_checkpoint(f"{folder}/{name}")
        losses = train(engine, [3, 4])
        results[name] = losses, parameters_of(engine), engine.global_steps
        engine.destroy()
    for name, job in {"theirs": ours, "ours": theirs, "theirs by themselves": theirs}.items():
        source = f"{folder}/{name.split()[0]}"
        try:
            results[f"{name}, resumed"] = resumed(job, source)
        except Exception as error:  # noqa: BLE001 - to be looked at by the test
            results[f"{name}, resumed"] = error
    return results


def assert_equal(one: tuple[list[float], dict[str, Tensor], int], other: Any) -> None:
    assert not isinstance(other, Exception), other
    assert one[0] == other[0]
    assert one[2] == other[2] == 4
    assert not [name for name, value in one[1].items() if not torch.equal(value, other[1][name])]


@pytest.mark.parametrize(
    ("extra", "num_stages"),
    [({}, 4), (BF16, 4), (BF16, 2), (BF16_ZERO_1_FP32_SUMS, 2)],
    ids=["fp32", "bf16", "bf16, 2 replicas", "bf16, ZeRO 1, sums in fp32"],
)
def test_global_and_deepspeed_resume_each_other(ranks4: RankPool, tmp_path: Path, extra, num_stages):
    job = DEEPSPEED.but(num_stages=num_stages, extra=EXTRA | extra)
    for result in ranks4.run(there_and_back, theirs=job, folder=str(tmp_path)):
        assert_equal(result["theirs"], result["ours"])
        if extra is not BF16:
            assert_equal(result["theirs"], result["theirs, resumed"])
            assert_equal(result["ours"], result["ours, resumed"])
            continue
        # DeepSpeed cannot load what it saves without ZeRO in bf16, and does not save all of it.
        assert isinstance(result["ours, resumed"], KeyError)
        assert isinstance(result["theirs by themselves, resumed"], KeyError)
        if num_stages == 4:
            assert_equal(result["theirs"], result["theirs, resumed"])
        else:
            assert isinstance(result["theirs, resumed"], ConfigError)
            assert "saves only the first replica's part" in str(result["theirs, resumed"])


# Other modes.


def save_with_deepspeed(job: Job, folder: str, frozen: Sequence[str] = ()) -> Any:
    net = make_module(job)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in frozen)
    engine, *_ = deepspeed.initialize(model=net, config=job.config())
    train(engine, [1, 2])
    engine.save_checkpoint(folder)
    return engine


def moments(engine: Any, name: str) -> Tensor | None:
    parameter = engine.module.get_parameter(name)
    if hasattr(parameter, "_hp_mapping"):
        found: Tensor | None = safe_get_full_optimizer_state(parameter, "exp_avg")
        return found
    state: dict[str, Tensor] = engine.optimizer.state[parameter]
    return state["exp_avg"].clone() if state else None


def take_from_deepspeed(job: Job, folder: str) -> dict[str, Any]:
    """DeepSpeed's third batch, and that of ``job`` from its checkpoint after two."""
    theirs = save_with_deepspeed(job.but(section=None), folder)
    saved, rates = parameters_of(theirs), theirs.get_lr()
    exp_avg = {name: moments(theirs, name) for name in saved}
    theirs.train_batch(iter(micro_batches(4, seed=3)))
    after = parameters_of(theirs)
    theirs.destroy()
    engine = make_engine(job)
    fresh = parameters_of(engine)
    engine.load_checkpoint(folder)
    loaded = parameters_of(engine)
    different_moments = []
    if not hasattr(engine.optimizer, "optimizer"):  # flat copies are linked to their state by a step
        different_moments = [n for n in saved if not torch.equal(moments(engine, n), exp_avg[n])]
    result = {
        "layers": [name for name in saved if not torch.equal(saved[name], loaded[name])],
        "heads": [n for n in fresh if n not in saved and not torch.equal(fresh[n], loaded[n])],
        "moments": different_moments,
        "rates": [rate / rates[0] for rate in engine.get_lr()],
        "steps": engine.global_steps,
    }
    rate_of_heads = engine.get_lr()[-1]
    train(engine, [3])
    trained = parameters_of(engine)
    result["learned"] = all(not torch.equal(trained[name], loaded[name]) for name in trained)
    result["as theirs"] = all(torch.equal(trained[name], after[name]) for name in after)
    steps = [
        (trained[n] - p).abs().max() / rate_of_heads for n, p in loaded.items() if n.startswith("heads.")
    ]
    result["largest step of heads"] = float(max(steps, default=1.0))
    engine.destroy()
    return result


@pytest.mark.parametrize(
    ("section", "extra"),
    [(LOCAL, {}), (WINDOW_2, BF16), (WINDOW_2, BF16_ZERO_1), (LOCAL, FP32_ZERO_1), (FRACTIONAL, {})],
    ids=["local", "window 2, bf16", "window 2, bf16, ZeRO 1", "local, fp32, ZeRO 1", "window 1.5"],
)
def test_other_modes_take_layers_and_their_optimizer_state(ranks4: RankPool, tmp_path, section, extra):
    job = Job(section, extra=EXTRA | extra)
    results = ranks4.run(take_from_deepspeed, job=job, folder=str(tmp_path))
    for result in results:
        assert result["layers"] == result["heads"] == result["moments"] == []
        assert set(result["rates"]) <= {1.0, section.get("head", {}).get("learning_rate_scale", 1.0)}
        assert result["steps"] == 2
        assert result["learned"]
        # Adam's first step is as long as the rate, its third, with nothing to remember, two thirds of it.
        assert 0.8 < result["largest step of heads"] < 1.4  # in bf16 it is rounded
    # The last stage has the inputs, loss and optimizer state that it has in DeepSpeed.
    assert [result["as theirs"] for result in results] == [False, False, False, True]


def load_in_parts(folder: str) -> dict[str, Any]:
    """What one checkpoint of DeepSpeed's gives a job under bf16 that asks for a part of it."""
    job = Job(WINDOW_2 | {"head": {"warmup_steps": 2}}, tied=True, extra=EXTRA | BF16_ZERO_1)
    theirs = save_with_deepspeed(job.but(section=None), folder)
    saved = parameters_of(theirs)
    theirs.destroy()
    results: dict[str, Any] = {}
    for name, wanted in {
        "module only": {"load_module_only": True},
        "no optimizer": {"load_optimizer_states": False},
        "all": {},
    }.items():
        for extra in (BF16, BF16_ZERO_1) if name != "all" else (BF16_ZERO_1,):
            engine = make_engine(job.but(extra=EXTRA | extra))
            engine.load_checkpoint(folder, **wanted)
            loaded, steps = parameters_of(engine), engine.global_steps
            rate = engine.optimizer.param_groups[0]["lr"]
            engine.train_batch(iter(micro_batches(12, seed=3)))
            engine.drain()
            moved = max(float((p - loaded[n]).abs().max()) for n, p in parameters_of(engine).items())
            results[f"{name}, {len(extra)}"] = {
                "different": [n for n in saved if not torch.equal(saved[n], loaded[n])],
                "steps": steps,
                "batches": engine.consumed_micro_batches / 4,
                "moved": moved / rate,
            }
            engine.destroy()
    return results


def test_layers_alone_or_without_their_optimizer_state(ranks4: RankPool, tmp_path: Path):
    """Tied weights, of which DeepSpeed saves one copy; bf16 masters; new heads, which are fitted again."""
    for stage, results in enumerate(ranks4.run(load_in_parts, folder=str(tmp_path))):
        for name, result in results.items():
            assert not result["different"], name
            assert result["steps"] == (0 if "module" in name else 2), name
            assert result["batches"] == (3 if stage == 0 else 0), name
            assert result["moved"] < 20, "masters of before the checkpoint would have undone it"


def refusals_and_converted_files(folder: str) -> dict[str, tuple[str | None, bool, bool]]:
    """For each attempt the error, whether anything changed, and whether layers are the saved ones."""
    theirs = save_with_deepspeed(DEEPSPEED, folder)
    saved = parameters_of(theirs)
    theirs.destroy()
    local = Job(LOCAL, extra=EXTRA)
    tag, engine, results = Path(folder) / "global_step2", make_engine(local), {}

    def load(name: str, **wanted: Any) -> None:
        before = parameters_of(engine)
        error = caught(engine.load_checkpoint, folder, **wanted)
        after = parameters_of(engine)
        changed = any(not torch.equal(before[n], p) for n, p in after.items())
        same = all(torch.equal(p.to(after[n].dtype), after[n]) for n, p in saved.items() if n in after)
        results[name] = str(error) if error else None, changed, same
        train(engine, [3] if error is None else [])

    def on_disk(pattern: str, change: Any) -> None:
        torch.distributed.barrier()
        for file in tag.glob(pattern) if torch.distributed.get_rank() == 0 else ():
            change(file)
        torch.distributed.barrier()

    load("layers and their optimizer state")
    on_disk("mp_rank_*", write_what_a_converter_does)
    load("no optimizer state")
    load("no optimizer state, layers only", load_module_only=True)
    on_disk("mp_rank_*", lambda file: file.rename(file.with_suffix(".gone")))
    load("no counters")
    load("no counters, layers only", load_module_only=True)
    engine = make_engine(local.but(extra=EXTRA | BF16_ZERO_1))
    load("no counters, layers only, bf16", load_module_only=True)
    on_disk("*.gone", lambda file: file.rename(file.with_suffix(".pt")))
    on_disk("mp_rank_*", lambda file: add_to(file, optimizer=saved_state(9)))
    load("another precision")
    engine = make_engine(local.but(num_stages=2))
    load("fewer stages")
    cut = {"partition_method": None, "stage_bounds": [0, 2, 5, 8, 11]}
    engine = make_engine(local.but(module=cut, section={"mode": "local", "head": {"type": "linear"}}))
    load("another cut")
    load("another cut, layers only", load_module_only=True)
    on_disk("layer_04-*", Path.unlink)
    load("no layer 4", load_module_only=True)
    return results


def write_what_a_converter_does(file: Path) -> None:
    counters = {"dp_world_size": 1, "mp_world_size": 4, "global_steps": 1, "skipped_steps": 1}
    scheduler = {"last_batch_iteration": 0}
    torch.save({"module": None, "optimizer": None, "lr_scheduler": scheduler, **counters}, file)


def saved_state(num_parameters: int) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"lr": 1.0, "params": list(range(num_parameters))}]}


def add_to(file: Path, **more: Any) -> None:
    torch.save({**torch.load(file), **more}, file)


@pytest.mark.bad_input
def test_what_does_not_fit_is_refused_on_every_rank_and_layers_load_alone(ranks4: RankPool, tmp_path: Path):
    says = {
        "another cut": "cannot take the optimizer state of stage 0: its groups have [9] parameters",
        "fewer stages": "has 4 files mp_rank_*_model_states.pt, expected 2",
        "another precision": "stage 0: it was saved in float32 without ZeRO, this job is in bf16 or with",
        "no optimizer state": "cannot take the optimizer state of stage 0: there is none",
        "no counters": "has 0 files mp_rank_*_model_states.pt, expected 4",
        "no layer 4": "layer_04-model_states.pt is missing",
    }
    for results in ranks4.run(refusals_and_converted_files, folder=str(tmp_path)):
        for name, (error, changed, same) in results.items():
            if name in says:
                assert error is not None, name
                assert says[name] in error, (name, error)
                assert not changed, name
            else:
                assert error is None, (name, error)
                assert changed, name
                assert same, name


def what_it_says(folder: str) -> list[str]:
    save_with_deepspeed(DEEPSPEED, folder).destroy()
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed.utils.logger.addHandler(listener)
    for section, wanted in ((GLOBAL, {}), ({"mode": "local", "head": {"type": "lens"}}, ONLY_LAYERS)):
        engine = make_engine(Job(section, extra=EXTRA))
        engine.load_checkpoint(folder, **wanted)
        engine.destroy()
    deepspeed.utils.logger.removeHandler(listener)
    return [message for message in said if "not written by ds_interlock" in message]


ONLY_LAYERS = {"load_module_only": True}


def test_one_line_says_what_is_not_there(ranks4: RankPool, tmp_path: Path):
    (in_global, under_a_lens), *others = ranks4.run(what_it_says, folder=str(tmp_path))
    assert not any(others)
    assert "loaded layers and their optimizer state; random state and data position are not" in in_global
    assert 'loaded layers; heads start anew (a "lens" has the output layers as it was built' in under_a_lens


FROZEN = ["3", "4", "5", "7"]
"""All layers of stage 1, and one of stage 2."""


def resume_frozen(job: Job, folder: str) -> list[str]:
    """DeepSpeed's own optimizer lists frozen parameters too, if no others are passed."""
    theirs = save_with_deepspeed(job.but(section=None), folder, frozen=FROZEN)
    train(theirs, [3])
    after = parameters_of(theirs)
    theirs.destroy()
    net = make_module(job)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in FROZEN)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config())
    engine.load_checkpoint(folder)
    train(engine, [3])
    result = [n for n, p in parameters_of(engine).items() if n in after and not torch.equal(p, after[n])]
    engine.destroy()
    return result


def test_frozen_layers(ranks4: RankPool, tmp_path: Path):
    for different in ranks4.run(resume_frozen, job=Job(GLOBAL, extra=EXTRA), folder=str(tmp_path)):
        assert not different
