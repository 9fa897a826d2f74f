"""Is this JSON file what it claims to be? Every file from the Hub is treated as hostile."""

import json
from pathlib import Path


LARGEST_JSON = 4 << 20  # bytes; a ticket's description is a few KB


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: too large, not JSON, or not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` does not exist.")
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"`{path}` must be at most {LARGEST_JSON} bytes of JSON, got {size}. The file is not ours.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
            f"`{name}` in `{source}` must be a {kind.__name__}, got {str(value)[:40]!r}. The file is damaged or hostile."
        )
    return value
