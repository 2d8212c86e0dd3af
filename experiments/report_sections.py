"""What the report says about one experiment: a section of Markdown, and the pictures in it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from experiments import figures, report_tables
from experiments.comparison import Comparison, Result
from experiments.definition import Definition, ImageModel, ProseModel
from experiments.efficiency import Efficiency


@dataclass(frozen=True)
class Experiment:
    """All that is known about an experiment.

    Attributes:
        definition: Its file.
        comparison: Its runs.
        efficiency: Their times; None if no batch times have been measured.
        results_link: The results file, as seen from the page.
    """

    definition: Definition
    comparison: Comparison
    efficiency: Efficiency | None
    results_link: str

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.comparison.name


def section(experiment: Experiment, folder: Path) -> str:
    """The section of an experiment, in Markdown.

    Args:
        experiment: What to write about.
        folder: Where to put the pictures; the page is beside it.
    """
    found = experiment.comparison
    parts = [
        f"## {experiment.definition.title}",
        experiment.definition.about.strip(),
        _budget(found.reference),
        _command(experiment),
        *_missing(experiment),
        f"### Quality after {found.budget:,} steps",
        report_tables.quality(found),
        _picture(found, folder, figures.curves),
        "Mean over the seeds in a band from the lowest to the highest; the dotted line is the end of the "
        "budget. The picture on the right ends above global and local: a mode that is not in it is worse.",
        "### How loud the stages are",
        _picture(found, folder, figures.stage_rms),
        report_tables.stage_rms(found),
        *_cosines(found, folder),
        "### Time to global's loss",
        *_times(experiment),
    ]
    conclusions = experiment.definition.conclusions.strip()
    return "\n\n".join([*parts, *(["### Conclusions", conclusions] if conclusions else [])])


def _duration(minutes: float, cpu: bool) -> str:
    if cpu:
        return f"{minutes:g} minutes of one core, {minutes / 2:g} of two"
    return f"{minutes:g} minutes of one device"


def _budget(reference: Result) -> str:
    """Model and budget in one line."""
    run, training = reference.run, reference.run.training
    batch = f"{training.num_micro_batches * training.micro_batch_size}"
    clipped = f", gradients clipped to {training.max_gradient_norm:g}" if training.max_gradient_norm else ""
    return (
        f"{_model(run.model)}, in {run.num_stages} stages; {training.num_steps:,} steps of {batch} samples, "
        f"{training.optimizer.upper() if training.optimizer == 'sgd' else 'AdamW'} with learning rate "
        f"{training.learning_rate:g} after {training.warmup_steps} steps of warm-up, "
        f"weight decay {training.weight_decay:g}{clipped}."
    )


def _model(model: ProseModel | ImageModel) -> str:
    if isinstance(model, ProseModel):
        return (
            f"{model.num_blocks} Transformer blocks, width {model.width}, {model.num_heads} attention heads, "
            f"{model.seq_length} characters of context"
        )
    images = (
        "all training images"
        if model.num_train_images is None
        else f"{model.num_train_images:,} training images"
    )
    return f"ResNet-{model.depth}, width {model.width}, {images}"


def _command(experiment: Experiment) -> str:
    results = experiment.comparison.all
    device = experiment.comparison.reference.record["device"]
    cpu = device == "cpu"
    minutes = sum(result.record["seconds"] for result in results) / 60
    return (
        f"`python -m experiments.run {experiment.name} {'--jobs 2' if cpu else f'--device {device}'}`, about "
        f"{_duration(experiment.definition.minutes, cpu)}. The {len(results)} "
        f"runs in [{experiment.name}.jsonl]({experiment.results_link}) trained for {minutes:.0f} minutes in "
        f"all. What the modes are is in `experiments/definitions/{experiment.name}.toml`."
    )


def _missing(experiment: Experiment) -> list[str]:
    """A sentence about the runs that are still to be done, if there are any."""
    done = experiment.comparison.results
    runs = experiment.definition.runs(experiment.name)
    missing = []
    for mode in experiment.definition.modes:
        seeds = [str(run.seed) for run in runs if run.mode == mode and run.seed not in done.get(mode, {})]
        if seeds:
            missing.append(f'"{mode}" ({", ".join(seeds)})')
    return [f"Not run yet, of the modes (and seeds): {', '.join(missing)}."] if missing else []


def _cosines(found: Comparison, folder: Path) -> list[str]:
    if not figures.modes_with(found, "cosine"):
        return []
    return [
        "### How far each stage's gradient is from the global one",
        _picture(found, folder, figures.cosines),
        "Cosine between the gradient of a stage in its mode and the global gradient on the same batch with "
        "the same weights, at its last measurement within the budget:",
        report_tables.cosines(found),
    ]


def _times(experiment: Experiment) -> list[str]:
    command = f"`python -m experiments.batch_times {experiment.name}`"
    efficiency = experiment.efficiency
    if efficiency is None:
        return [f"No batch times here; {command} measures them."]
    found = experiment.comparison
    missing = [m for m in found.modes if m not in efficiency.modes and not found.has_own_model(m)]
    return [
        report_tables.speed_up(efficiency),
        *([f"Not timed yet: {', '.join(missing)}; {command} does."] if missing else []),
        "Validation loss after the time that global's budget takes; ≤: the curve of the mode ends before, "
        "and this is its last point.",
        report_tables.equal_time(efficiency),
    ]


def _picture(found: Comparison, folder: Path, draw: Callable[[Comparison], Figure]) -> str:
    """Draws a picture; the link to it."""
    file = folder / f"{found.name}_{draw.__name__}.svg"
    figures.save(draw(found), file)
    return f"![{found.name}: {draw.__name__.replace('_', ' ')}]({folder.name}/{file.name})"
