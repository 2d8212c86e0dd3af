"""A run: resumable, averaged, judged at the end of its budget; what it says when something is missing."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_interlock.errors import ConfigError, DataError
from experiments import definition, prose, run
from experiments.definition import Definition, Run
from experiments.tasks import make_task
from experiments.training import Training, take_in, train
from measuring import results_file

TINY = {
    "title": "tiny",
    "about": "",
    "minutes": 1,
    "num_stages": 3,
    "seeds": [0, 1],
    "model": {"kind": "prose", "seq_length": 8, "width": 16, "num_blocks": 3},
    "training": {
        "num_steps": 4,
        "micro_batch_size": 2,
        "num_micro_batches": 2,
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "max_gradient_norm": 1.0,
    },
    "measurements": {"evaluate_every": 2, "num_samples": 8, "num_final_samples": 16},
    "modes": {
        "global": {"interlock": {"mode": "global"}},
        "window 2": {
            "interlock": {
                "mode": "interlock",
                "window": 2,
                "head": {"blocks": 1, "sequence_fraction": 0.5, "learning_rate_scale": 0.5},
            },
            "num_steps": 6,
        },
    },
}
IMAGES = {
    "kind": "images",
    "depth": 8,
    "width": 2,
    "num_train_images": 64,
}


def tiny_run(mode: str = "window 2", **changes: object) -> Run:
    return next(r for r in Definition.model_validate({**TINY, **changes}).runs("tiny") if r.mode == mode)


def without_time(record: dict) -> dict:
    return {name: record[name] for name in ("run", "final", "curve")}


SHARED = {"mode": "local", "head": {"type": "shared", "refresh_every": 3}}


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": IMAGES}, {"modes": {**TINY["modes"], "window 2": {"interlock": SHARED, "num_steps": 6}}}],
    ids=["prose", "images", "shared"],
)
def test_an_interrupted_run_ends_as_if_undisturbed(
    changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_run = tiny_run(**changes)
    undisturbed = train(one_run, tmp_path / "a.pt")

    save = Training.save

    def save_until_interrupted(training: Training, path: Path) -> None:
        save(training, path)
        if training.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", save_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(one_run, tmp_path / "b.pt")
    monkeypatch.undo()
    resumed = train(one_run, tmp_path / "b.pt")
    assert without_time(resumed) == without_time(undisturbed)
    assert [point["step"] for point in resumed["curve"]] == [2, 4, 6]
    assert resumed["run"]["training"]["num_steps"] == 4  # the budget, at whose end "final" is


def test_a_checkpoint_is_of_its_run_whatever_keys_came_later(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    Training(tiny_run(), "cpu").save(path)
    state = torch.load(path, weights_only=True)
    del state["run"]["model"]["embedding_std"]
    torch.save(state, path)
    Training(tiny_run(), "cpu").load(path)
    with pytest.raises(DataError, match="of another run of mode window 2, seed 1"):
        Training(tiny_run(seeds=[1]), "cpu").load(path)
    state["run"]["model"]["depth"] = 3
    torch.save(state, path)
    with pytest.raises(DataError, match="the experiment's file has changed since"):
        Training(tiny_run(), "cpu").load(path)


def test_a_run_trains_as_torch_would(tmp_path: Path) -> None:
    """Global mode is plain backpropagation with clipping, AdamW and warm-up, step by step."""
    one_run = tiny_run("global", training={**TINY["training"], "weight_decay": 0.1})
    training = Training(one_run, "cpu")
    for _ in range(3):
        training.do_step()
    task = make_task(one_run)
    model = nn.Sequential(*task.layers)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 3
        optimizer.zero_grad()
        for inputs, labels in task.batch(step):
            (task.loss_fn(model(inputs), labels) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(training.net.state_dict()[name], parameter)


def test_heads_have_a_learning_rate_of_their_own() -> None:
    training = Training(tiny_run(training={**TINY["training"], "ends_rate_scale": 3.0}), "cpu")
    training.do_step()
    groups = training.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-2 / 3, 5e-3 / 3, 3e-2 / 3])
    layers = training.task.layers
    ends = [p for layer in (*layers[:2], *layers[-2:]) for p in layer.parameters()]
    assert set(groups[2]["params"]) == set(ends)
    assert sum(len(group["params"]) for group in groups) == len(list(training.net.parameters()))


def test_every_mode_sees_the_same_batches_and_starts_from_the_same_weights() -> None:
    ours, theirs = (make_task(tiny_run(mode)) for mode in ("global", "window 2"))
    for a, b in zip(ours.batch(5), theirs.batch(5), strict=True):
        assert torch.equal(a[0], b[0])
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        for a, b in zip(layer.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_border_norm_is_a_layer_at_every_border() -> None:
    task = make_task(tiny_run("global", model={**TINY["model"], "border_norm": True}))
    assert [type(task.layers[bound - 1]).__name__ for bound in task.stage_bounds[1:-1]] == ["LayerNorm"] * 2


def test_the_average_is_polynomial() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = nn.Linear(1, 1, bias=False)
    for number, value in enumerate((1.0, 2.0, 4.0)):
        module.weight.data.fill_(value)
        take_in(average, module, number)
    second = 1 + 9 / 10 * (2 - 1)
    assert average.weight.item() == pytest.approx(second + 9 / 11 * (4 - second))


def test_averaged_weights_are_judged_with_batch_norms_of_their_own() -> None:
    """Not with those of the weights of the last steps, which are others."""
    training = Training(tiny_run(model=IMAGES), "cpu")
    for _ in range(3):
        training.do_step()
    training.evaluate()
    stem = training.average[0]
    inputs = [images for step in range(3) for images, _ in training.task.batch(step)]
    with torch.no_grad():
        means = [stem.convolution(images).mean(dim=(0, 2, 3)) for images in inputs]
    torch.testing.assert_close(stem.norm.running_mean, torch.stack(means).mean(dim=0))


def test_prose_reads_a_sword_module_and_drops_its_markup(tmp_path: Path) -> None:
    import zlib

    text = zlib.compress(b"<title>Psalm&#160;1</title> Blessed\0<hi>is</hi> the  man")
    (tmp_path / "ot.czz").write_bytes(text)
    (tmp_path / "ot.czs").write_bytes(prose._BLOCK_ENTRY.pack(0, len(text), 0) + bytes(12))
    assert prose.treasury(tmp_path) == ["Psalm\u00a01 Blessed\nis the man"]
    numbers = prose.encode("na\u00efve \u2014 \u4e2d\u2019")
    assert "".join(prose.ALPHABET[number] for number in numbers) == "naive -- '"


def test_words_are_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Path(definition.__file__).read_text(), "to be or not to be"]
    monkeypatch.setattr(prose, "TOKENS", tmp_path)
    monkeypatch.setattr(prose, "documents", lambda: (texts, texts[1:]))
    train_text, validation_text = prose.load_prose(300)
    tokenizer = prose.train_tokenizer(texts, 300)
    assert tokenizer.decode(validation_text.tolist()) == texts[1]
    end = tokenizer.token_to_id(prose.END_OF_TEXT)
    assert (train_text == end).sum() == 2
    assert train_text[-len(validation_text) :].equal(validation_text)
    monkeypatch.setattr(prose, "documents", None)
    assert all(a.equal(b) for a, b in zip(prose.load_prose(300), (train_text, validation_text), strict=True))
    with pytest.raises(DataError, match="words for a BPE, expected 60000"):
        prose.train_tokenizer(texts, 60000)


def test_a_missing_text_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install sword-comm-tdavid"):
        prose.treasury(tmp_path)


def test_validation_images_are_the_last_for_training_and_no_run_trains_on_them() -> None:
    pictures = Training(tiny_run(model=IMAGES), "cpu").task.test
    model = {**IMAGES, "num_train_images": None, "num_validation_images": 59_990}
    task = Training(tiny_run(model=model), "cpu").task
    assert len(pictures) == 10_000
    assert len(task.test) == 59_990
    assert len(task.iterator.images) == 10


def test_missing_pictures_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_interlock.images import sources
    from experiments import tasks

    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path)
    tasks.pictures.cache_clear()
    assert run.main(["resnet", "--output", str(tmp_path / "r.jsonl")]) == 1
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


def test_an_unknown_experiment_or_mode_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run.main(["transformers"]) == 1
    assert "no experiment 'transformers': expected one of" in capsys.readouterr().err
    assert run.main(["resnet", "--modes", "window 7", "--output", str(tmp_path / "r.jsonl")]) == 1
    assert "has no window 7" in capsys.readouterr().err


def test_runs_are_not_repeated_nor_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(definition, "load", lambda name: Definition.model_validate(TINY))
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "tiny.jsonl"
    arguments = ["tiny", "--output", str(output)]
    assert run.main([*arguments, "--seeds", "1"]) == 0
    assert run.main(arguments) == 1
    assert "give --resume to add those that are missing" in capsys.readouterr().err
    first = output.read_text().splitlines()
    assert run.main([*arguments, "--resume"]) == 0
    assert output.read_text().splitlines()[:2] == first
    found = [(record["run"]["mode"], record["run"]["seed"]) for record in results_file.read(output)]
    assert found == [("global", 1), ("window 2", 1), ("global", 0), ("window 2", 0)]
    assert not list((tmp_path / "runs").rglob("*.pt"))  # finished runs need no checkpoint
    assert json.loads(first[0])["versions"]["torch"] == torch.__version__


def test_a_run_whose_time_is_up_is_evaluated_and_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(definition, "load", lambda name: Definition.model_validate(TINY))
    changes = ["--set", "training.dtype=bfloat16", "measurements.num_samples=5", "seeds=[7]"]
    output = ["--output", str(tmp_path / "tiny.jsonl"), "--no_checkpoints"]
    assert run.main(["tiny", *changes, *output, "--limit_seconds", "1e-6"]) == 0
    assert "global, seed 7: not begun, the time is up" in capsys.readouterr().out
    one_run = tiny_run(training={**TINY["training"], "dtype": "bfloat16"})
    record = train(one_run, None, seconds_left=0.0)
    assert record["stopped_after"] == 1
    assert [point["step"] for point in record["curve"]] == [1]
    assert record["final"]["loss"] > 0
    assert record["run"]["training"]["dtype"] == "bfloat16"
    monkeypatch.setattr(run, "train", lambda run, *_: {**record, "run": run.model_dump(mode="json")})
    assert run.main(["tiny", *changes, *output, "--modes", "window 2"]) == 0
    assert not (tmp_path / "tiny.jsonl").exists()
    (stopped,) = results_file.read(tmp_path / "tiny_stopped.jsonl")
    assert stopped["run"]["seed"] == 7
    assert stopped["run"]["measurements"]["num_samples"] == 5
    with pytest.raises(SystemExit):
        run.main(["tiny", *changes])
    assert run.main(["tiny", *output, "--set", "training.steps=4"]) == 1
    assert "--set training.steps=4: expected KEY=VALUE" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    training = Training(tiny_run(), "cpu")
    training.save(tmp_path / "a.pt")
    with pytest.raises(DataError, match="the experiment's file has changed since"):
        train(tiny_run(measurements={**TINY["measurements"], "num_samples": 9}), tmp_path / "a.pt")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    wild = tiny_run("global", training={**TINY["training"], "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(ConfigError, match="mode global, seed 0: the loss is nan at step 2; set a lower"):
        train(wild, tmp_path / "a.pt")


def test_a_definition_needs_a_global_mode_and_known_keys() -> None:
    with pytest.raises(ValueError, match='expected one named "global"'):
        Definition.model_validate({**TINY, "modes": {"window 2": TINY["modes"]["window 2"]}})
    with pytest.raises(ValueError, match="unknown key; did you mean"):
        Definition.model_validate(
            {**TINY, "modes": {**TINY["modes"], "x": {"interlock": {"mode": "interlock", "windw": 2}}}}
        )
