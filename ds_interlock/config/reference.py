"""The text of ``docs/config.md``, made from the models of ``config/``."""

import inspect
import itertools
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_interlock.config import REFUSALS, HeadConfig, InterlockConfig
from ds_interlock.config.faults import shown_as_json
from ds_interlock.config.parts import SECTION, MyopiaConfig, PhaseConfig, TraceConfig

_TOP = """\
# The `"interlock"` section

<!-- Generated: python -m ds_interlock.config.reference > docs/config.md -->

A DeepSpeed config gets one more section, `"interlock"`, beside DeepSpeed's own keys. Without it
training is ordinary backpropagation. Unknown keys are errors.
"""

_WORDS: dict[Any, str] = {
    bool: "`true` or `false`",
    int: "whole number",
    int | None: "whole number",
    int | tuple[int, ...]: "whole number, or list of them",
    float: "number",
    float | None: "number",
    list[int]: "list of whole numbers",
    list[PhaseConfig] | None: "list of objects",
    str: "text",
}

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    (SECTION, InterlockConfig),
    (f"{SECTION}.schedule[n]", PhaseConfig),
    (f"{SECTION}.head", HeadConfig),
    (f"{SECTION}.trace", TraceConfig),
    (f"{SECTION}.myopia", MyopiaConfig),
)


def reference() -> str:
    """The text of ``docs/config.md``."""
    tables = [f"## `{name}`\n\n{_table(model)}" for name, model in _SECTIONS]
    refusals = "".join(
        f"- `{refusal.key}` {' or '.join(map(shown_as_json, refusal.values))}"
        + (f" with `{refusal.switch}`" if refusal.switch else "")
        + f": {refusal.reason}.\n"
        for refusal in REFUSALS
    )
    return "\n".join([_TOP, *tables, "## DeepSpeed settings that are refused\n\n" + refusals])


def _table(model: type[BaseModel]) -> str:
    about = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
    lines = [about, "", "| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "{}" if isinstance(field.default, BaseModel) else shown_as_json(field.default)
        description = " ".join((field.description or "").split())
        cell = "needed" if field.is_required() else f"`{default}`"
        lines.append(f"| `{name}` | {_values(field)} | {cell} | {description} |")
    return "\n".join(lines) + "\n"


def _values(field: FieldInfo) -> str:
    """The values that a key takes, in words: the choices, or the type and its bounds."""
    parts = get_args(field.annotation)
    choices = [part for part in (*parts, *itertools.chain(*map(get_args, parts))) if isinstance(part, str)]
    if choices:
        return ", ".join(f'`"{choice}"`' for choice in choices)
    bounds = [
        f"{symbol} {getattr(rule, bound)}"
        for rule in field.metadata
        for bound, symbol in (("gt", ">"), ("ge", ">="), ("le", "<="))
        if hasattr(rule, bound)
    ]
    return ", ".join([_WORDS.get(field.annotation, "object"), *bounds])


if __name__ == "__main__":
    print(reference(), end="")
