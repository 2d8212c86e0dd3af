"""Trains all 200 combinations of ``tests/helpers/matrix.py``, and puts the table into docs/migrating.md.

make matrix        # four minutes on two cores
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from matrix import LIMIT, MODES, NUM_STAGES, PRECISIONS, Combination, Result, combinations, results, train_all
from ranks import RankPool
from tqdm import tqdm

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
BETWEEN = re.compile(r"(?<=<!-- matrix -->\n).*?(?=<!-- end of matrix -->)", re.DOTALL)
VARIANTS = {
    "plain": (False, False),
    "checkpointing": (True, False),
    "compiled": (False, True),
    "checkpointing, compiled": (True, True),
}


def measure() -> dict[Combination, Result]:
    """The result of each combination."""
    measured: dict[Combination, Result] = {}
    for replicas in (1, 2):
        chosen = [combination for combination in combinations() if combination.replicas == replicas]
        with RankPool(replicas * NUM_STAGES) as pool:
            for part in tqdm(_parts(chosen)):
                by_rank = pool.run(train_all, chosen=part, within_seconds=600)
                measured |= zip(part, results(part, by_rank), strict=True)
    return measured


def _parts(chosen: list[Combination]) -> list[list[Combination]]:
    return [chosen[start : start + len(MODES)] for start in range(0, len(chosen), len(MODES))]


def table(measured: dict[Combination, Result]) -> Iterator[str]:
    """Lines of Markdown: in each cell the worst of all modes, and what is refused."""
    reasons: list[str] = []
    yield f"| precision | replicas | {' | '.join(VARIANTS)} |"
    yield "| --- | --- |" + " --- |" * len(VARIANTS)
    for precision, replicas in itertools.product(PRECISIONS, (1, 2)):
        cells = [
            _cell({m: measured[Combination(precision, replicas, *v, m)] for m in MODES}, precision, reasons)
            for v in VARIANTS.values()
        ]
        yield f"| {precision} | {replicas} | {' | '.join(cells)} |"
    for number, reason in enumerate(reasons, start=1):
        yield f"\n({number}) {reason}"


def _cell(of_modes: dict[str, Result], precision: str, reasons: list[str]) -> str:
    """Adds to ``reasons``, which the cell numbers from 1."""
    parts = []
    if distances := [result for result in of_modes.values() if isinstance(result, float)]:
        worst = max(distances)
        shown = f"{worst:.0e}" if worst else "0"
        parts.append(shown if worst <= LIMIT[precision] else f"**wrong: {shown}**")
    for mode, result in of_modes.items():
        if isinstance(result, str):
            reasons += [result] * (result not in reasons)
            parts.append(f"{mode} refused ({reasons.index(result) + 1})")
    return ", ".join(parts)


def main() -> None:
    """Measures and writes."""
    lines = "\n".join(table(measure())) + "\n"
    page = PAGE.read_text(encoding="utf-8")
    assert BETWEEN.search(page), f"{PAGE} has no place for the table"
    PAGE.write_text(BETWEEN.sub(lambda _: lines, page), encoding="utf-8")
    print(lines)


if __name__ == "__main__":
    main()
