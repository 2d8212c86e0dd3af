"""The text of ``docs/config.md``, made from the models of ``config/``."""

import inspect
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from ds_interlock.config import REFUSALS, HeadConfig, InterlockConfig
from ds_interlock.config.faults import shown_as_json
from ds_interlock.config.monitoring import MyopiaConfig, TraceConfig
from ds_interlock.config.schedule import PhaseConfig
from ds_interlock.config.strict import SECTION

_REFERENCE_HEAD = """\
# The `"interlock"` section

<!-- Generated: python -m ds_interlock.config.reference > docs/config.md -->

A DeepSpeed config gets one more section, `"interlock"`, beside DeepSpeed's own keys. Without it
training is ordinary backpropagation. Unknown keys are errors.
"""

_REFERENCE_REFUSALS = """\
## DeepSpeed settings that are refused

"""


_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    (SECTION, InterlockConfig),
    (f"{SECTION}.schedule[n]", PhaseConfig),
    (f"{SECTION}.head", HeadConfig),
    (f"{SECTION}.trace", TraceConfig),
    (f"{SECTION}.myopia", MyopiaConfig),
)


def reference() -> str:
    """The text of ``docs/config.md``."""
    tables = [f"## `{name}`\n\n{_doc(model)}\n\n{_table(model)}" for name, model in _SECTIONS]
    refusals = "".join(
        f"- `{refusal.key}` {' or '.join(map(shown_as_json, refusal.values))}: {refusal.reason}.\n"
        for refusal in REFUSALS
    )
    return "\n".join([_REFERENCE_HEAD, *tables, _REFERENCE_REFUSALS + refusals])


def _doc(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").replace("``", "`")


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "{}" if isinstance(field.default, BaseModel) else shown_as_json(field.default)
        shown = "needed" if field.is_required() else f"`{default}`"
        lines.append(f"| `{name}` | {_value_text(model, name)} | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def _parts(annotation: Any) -> Iterator[Any]:
    """What a union or a Literal is made of."""
    for part in get_args(annotation):
        yield from _parts(part) if get_origin(part) is Literal else (part,)


def _value_text(model: type[BaseModel], name: str) -> str:
    """The values that a key takes, in words: the choices, or the type and its bounds."""
    field = model.model_fields[name]
    annotation: Any = field.annotation
    choices = tuple(part for part in _parts(annotation) if part is not NoneType)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f'`"{choice}"`' for choice in choices)
    words = {
        bool: "`true` or `false`",
        int: "whole number",
        float: "number",
        float | None: "number",
        list[int]: "list of whole numbers",
        list[PhaseConfig] | None: "list of objects",
        str: "text",
    }
    text = words.get(annotation, "object")
    symbols = {"gt": ">", "ge": ">=", "le": "<="}
    bounds = [
        f"{symbol} {getattr(rule, bound)}"
        for rule in field.metadata
        for bound, symbol in symbols.items()
        if hasattr(rule, bound)
    ]
    return ", ".join([text, *bounds])


if __name__ == "__main__":
    print(reference(), end="")
