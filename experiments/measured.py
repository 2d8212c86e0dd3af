"""What the planner knows of how well settings learn (``ds_interlock/planning/measured.json``).

Of every experiment in which local is behind global in all seeds: each mode with the experiment's model, its
share of local's gap to global, and its steps to global's loss relative to global's.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ds_interlock.files import replace_text
from ds_interlock.planning.quality import Measurement, Spread, heads_of
from experiments.comparison import Comparison, PerSeed
from experiments.definition import GLOBAL, LOCAL, ProseModel, Run


def write(comparisons: Iterable[Comparison], path: Path) -> None:
    """Writes the file, a line for each measurement."""
    lines = [one.model_dump_json() for runs in comparisons for one in _of(runs)]
    replace_text(path, '{"format": 1, "measurements": [\n' + ",\n".join(lines) + "\n]}\n")


def _of(runs: Comparison) -> Iterator[Measurement]:
    model = runs.reference.run.model
    for mode, results in runs.results.items():
        run, share = runs.run_of(mode), runs.recovered(mode)
        if run.asynchronous or run.section.is_global or runs.has_own_model(mode) or share is None:
            continue
        local = _local_with_heads_of(runs, run)
        gain = None if local == mode else runs.gain_over_local(mode, local)
        yield Measurement(
            experiment=runs.name,
            mode=mode,
            model=_in_words(run),
            is_language=isinstance(model, ProseModel),
            model_size=_num_blocks(run) * model.width**2,
            num_stages=run.num_stages,
            budget=runs.budget,
            seeds=tuple(results),
            interlock=run.interlock,
            share=_rounded(share),
            steps=_relative_steps(runs, mode),
            most_steps=round(run.num_steps / runs.budget, 4),
            local=local,
            gain=gain and _rounded(PerSeed(tuple(-value for value in gain.values))),
        )


def _relative_steps(runs: Comparison, mode: str) -> Spread | None:
    """Steps to global's loss over global's own; None if a seed does not get there."""
    of_global = runs.steps_to_target(GLOBAL)
    ratios = [steps and steps / of_global[seed] for seed, steps in runs.steps_to_target(mode).items()]
    relative = PerSeed.of(ratios)
    return relative and _rounded(relative)


def _local_with_heads_of(runs: Comparison, run: Run) -> str:
    """The best mode that is local with such heads and has a seed in common; "local" if there is none."""
    shares = {
        mode: share.mean
        for mode in runs.results
        if runs.run_of(mode).interlock
        and runs.run_of(mode).section.mode == "local"
        and heads_of(runs.run_of(mode).section) == heads_of(run.section)
        and not runs.has_own_model(mode)
        and runs.gain_over_local(run.mode, mode)
        and (share := runs.recovered(mode))
    }
    return max(shares, key=shares.__getitem__, default=LOCAL)


def _num_blocks(run: Run) -> int:
    return run.model.num_blocks if isinstance(run.model, ProseModel) else (run.model.depth - 2) // 2


def _in_words(run: Run) -> str:
    if isinstance(run.model, ProseModel):
        return f"{run.model.num_blocks} Transformer blocks of width {run.model.width}"
    return f"a ResNet-{run.model.depth} of width {run.model.width}"


def _rounded(numbers: PerSeed) -> Spread:
    deviation = numbers.deviation
    return Spread(mean=round(numbers.mean, 4), deviation=None if deviation is None else round(deviation, 4))
