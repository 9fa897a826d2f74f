"""Is this JSON file what it claims to be? Every file from the Hub is treated as hostile."""

import json
import reprlib
from pathlib import Path


LARGEST_JSON = 4 << 20  # bytes; a ticket's description is a few KB
DEEPEST_JSON = 50  # levels; whatever copies, compares or writes the content recurses this far


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: too large, not JSON (NaN is not), nested too deeply, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` does not exist.")
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"`{path}` must be at most {LARGEST_JSON} bytes of JSON, got {size}. The file is not ours.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        _check_depth(content, DEEPEST_JSON)
    except (ValueError, RecursionError) as error:  # ValueError: also wrong UTF-8, numbers of thousands of digits
        raise ValueError(f"`{path}` is not valid JSON ({error}). It is truncated or was not written by us.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got a {type(content).__name__}.")
    return content


def field(content: dict, name: str, kind: type, source: Path, default: object = None) -> object:
    """`content[name]` if it has the type `kind`, else `default` when it is missing or null.

    Raises:
        ValueError: the value has another type.
    """
    value = content.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(
            f"`{name}` in `{source}` must be a {kind.__name__}, got {reprlib.repr(value)}. "
            "The file is damaged or hostile."
        )
    return value


def _refuse_constant(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON value")


def _check_depth(value: object, levels: int) -> None:
    if levels == 0:
        raise ValueError(f"it is nested more than {DEEPEST_JSON} levels deep")
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in entries:
        _check_depth(entry, levels - 1)
