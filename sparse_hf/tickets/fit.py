"""Does a ticket fit a model, by names, shapes and kinds of numbers?"""

import difflib
from collections.abc import Iterable, Mapping

from torch import Tensor

from sparse_hf.algorithms.masking import INTEGER_VIEW
from sparse_hf.algorithms.zero_partitions import whole_shape


# The only part of a base model that some heads leave out: `BertForTokenClassification` has no pooler.
OPTIONAL_PART = "pooler."


def may_be_missing(name: str) -> bool:
    """Whether the parameter of this canonical name is left out under some heads of the same architecture."""
    return name.startswith(OPTIONAL_PART)


def misfits(shapes: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Tensor], shown: int = 5) -> str:
    """What keeps masks of these shapes from being applied to these parameters, in words; "" if nothing does.

    Args:
        shapes: of the masks, by canonical parameter name.
        parameters: of the model, by canonical name.
        shown: how many problems are spelled out; the others are counted.
    """
    absent = [name for name in shapes if name not in parameters]
    if len(absent) < len(shapes):
        absent = [name for name in absent if not may_be_missing(name)]
    unfit = [name for name, shape in shapes.items() if name in parameters and not _fits(parameters[name], shape)]
    problems = [f"no parameter `{name}`{near(name, parameters)}" for name in absent[:shown]]
    for name in unfit[: shown - len(problems)]:
        found = f"{list(whole_shape(parameters[name]))} of {parameters[name].dtype}"
        problems.append(f"`{name}` is {found}, the mask {list(shapes[name])} for floating-point weights")
    hidden = len(absent) + len(unfit) - len(problems)
    return "; ".join([*problems, f"and {hidden} more"] if hidden else problems)


def near(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, as a remark for an error message."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (near names: {', '.join(close)})" if close else ""


def _fits(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    return whole_shape(parameter) == shape and parameter.dtype in INTEGER_VIEW
