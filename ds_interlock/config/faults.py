"""What is wrong with a section of the configuration, one line per fault, by its JSON key."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def misspelt_sections(config: Mapping[str, Any], section: str) -> list[str]:
    """Faults for keys that look as if the section was meant; DeepSpeed takes any key in silence."""
    return [
        f'{key}: unknown section; did you mean "{section}"?'
        for key in config
        if key != section and difflib.get_close_matches(key.lower(), [section], cutoff=0.8)
    ]


def fault_of(section: str, root: type[BaseModel], detail: Mapping[str, Any]) -> str:
    """One line for one of pydantic's complaints about ``root``, the model of ``section``."""
    path = section + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in detail["loc"])
    if detail["type"] == "extra_forbidden":
        valid = _valid_keys(root, detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]).lower(), valid, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?  ' if near else ""
        return f"{path}: unknown key; {hint}valid keys: {', '.join(valid)}"
    if detail["type"] == "missing":
        return f"{path}: missing, expected a value: it has no default"
    if detail["type"] == "value_error":
        return f"{path}: {detail['ctx']['error']}"
    if detail["type"] == "model_type":
        expected = "an object with some of the keys " + ", ".join(_valid_keys(root, detail["loc"]))
    else:
        expected = detail["msg"].removeprefix("Input should be ").replace("'", '"')
    return f"{path}: got {shown_as_json(detail['input'])}, expected {expected}"


def _valid_keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    for key in path:
        if isinstance(key, str):  # an item of a list is of the kind that the list's key says
            model = next(_models_in(model.model_fields[key].annotation))
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation: one that may be left out is in a union, several are in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def shown_as_json(value: object) -> str:
    """``value`` as JSON has it, cut short."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
