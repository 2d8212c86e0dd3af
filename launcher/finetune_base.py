"""What the base model makes of the training data, for heads that learn from it (``head.kl_weight``)."""

from pathlib import Path

from finetune_run import Run
from job import errors_told_to_all

from ds_interlock.hf.data.batches import EvaluationBatches
from ds_interlock.hf.model.base_states import FOLDER, BaseStates, Share, digest_of_model, record
from ds_interlock.hf.model.states_file import check_room


def bring_base_states(run: Run) -> None:
    """If heads learn from the base model, lets its states travel with the labels. All ranks must call it.

    A new run computes them; a resumed one must find them where the first part of it left them.
    """
    if run.engine.interlock.head.kl_weight == 0 or not run.engine.module.schedule.heads:
        return
    folder = Path(run.args.output_dir) / FOLDER
    batches: list[EvaluationBatches] = []  # of all replicas
    shares: list[Share] = []
    with errors_told_to_all():
        if run.training is not None:
            shape, rows = run.training.shape, run.training.rows
            model = digest_of_model(run.pretrained.folder)
            batches = [EvaluationBatches(rows, shape, replica=r) for r in range(shape.num_replicas)]
            shares = [Share.of(of_replica, model) for of_replica in batches]
        if run.step == 0 and run.is_rank_0:
            announce(run, folder, shares)
    if run.step == 0:
        replica = run.engine.grid.get_data_parallel_rank()
        own = (batches[replica], shares[replica]) if run.training is not None else (None, None)
        record(run.engine, folder, *own, width=width_of(run), dtype=run.pretrained.dtype)
    with errors_told_to_all():
        if run.training is not None:
            run.training.base_of_rows = BaseStates(folder, shares).stack


def announce(run: Run, folder: Path, shares: list[Share]) -> None:
    """Says how much it will be; refuses if there is not that much room."""
    num_positions = sum(sum(share.lengths) for share in shares)
    num_bytes = num_positions * width_of(run) * run.pretrained.dtype.itemsize
    check_room(folder, num_bytes)
    print(
        f"interlock.head.kl_weight: the base model's hidden states at {num_positions} positions go to "
        f"{folder}, {num_bytes / 1e9:.2f} GB"
    )


def width_of(run: Run) -> int:
    """Of the hidden state that goes into the unembedding."""
    return int(run.pretrained.config.get_text_config().hidden_size)
