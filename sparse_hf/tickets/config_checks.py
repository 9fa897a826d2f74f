"""What every config checks of its fields when it is made."""

import math
from typing import get_args


def check_sparsity(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a fraction in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}. It is a fraction: 0.4 is 40 %.")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise ValueError unless `value` is one of the values of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"Unknown {name} {value!r}. Choose one of: {', '.join(get_args(choices))}.")


def check_positive(config: object, *names: str) -> None:
    """Raise ValueError unless these fields of a config are positive and finite, or None where that is the default."""
    for name in names:
        value = getattr(config, name)
        whole = type(config).__dataclass_fields__[name].type in (int, int | None)
        optional = type(config).__dataclass_fields__[name].default is None
        if value is None and optional:
            continue
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:  # NaN is not
            raise ValueError(
                f"`{name}` must be {'a whole number of 1 or more' if whole else 'more than 0'}, got {value!r}."
            )
