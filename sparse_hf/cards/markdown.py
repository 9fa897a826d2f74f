"""How does text that others wrote get into Markdown and YAML without meaning anything there?

Names, methods and numbers of a card come from files that anybody can have written. Each of these functions makes one
line of printable characters of bounded length out of anything.
"""

import json
import re
from collections.abc import Iterable, Sequence

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


LONGEST = 200  # characters of one value
MOST_ROWS = 400  # of a table


def one_line(value: object, longest: int = LONGEST) -> str:
    """Printable characters only, white space as single spaces, cut to `longest` characters."""
    text = str(value)[: 8 * longest]
    text = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def plain(value: object, longest: int = LONGEST) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no links."""
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", one_line(value, longest))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # "://" and "www." alone make a link in GitHub's Markdown, "@" a mention on the Hub.
    return text.replace("://", ":\u200b//").replace("www.", "www\u200b.").replace("@", "@\u200b")


def code(value: object, longest: int = LONGEST) -> str:
    """Text in a code span, also within a table."""
    return f"`{one_line(value, longest).replace('`', chr(39)).replace('|', chr(0x2223)) or ' '}`"


def literal(value: object) -> str:
    """A JSON value as Python writes it, on one line without backticks, bounded."""
    if isinstance(value, (dict, list)) and len(json.dumps(value, default=str)[: LONGEST + 1]) > LONGEST:
        return "..."
    return ascii(one_line(value) if isinstance(value, str) else value).replace("`", "\\x60")[:LONGEST]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of ready cells, numbers to the right; what is more than 400 rows is left out."""
    kept = list(rows)
    left_out = len(kept) - MOST_ROWS
    lines = [head, ["---", *("---:" for _ in head[1:])], *kept[:MOST_ROWS]]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text if left_out <= 0 else f"{text}\n\n{left_out} more are left out."


def hub_id(name: object) -> str | None:
    """`name` if it can be the id of a repository, else None."""
    if not isinstance(name, str) or len(name) > 96 or name != one_line(name) or name.count("/") > 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
