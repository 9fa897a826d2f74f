"""How does a config become JSON, and a config again?"""

import dataclasses

from sparse_hf.tickets.configs import GradualPruningConfig, LotteryTicketConfig, StaticSparsityConfig
from sparse_hf.tickets.early_bird_config import EarlyBirdConfig


SparsityConfig = LotteryTicketConfig | GradualPruningConfig | StaticSparsityConfig | EarlyBirdConfig

METHODS: dict[str, type] = {
    "lottery_ticket": LotteryTicketConfig,
    "gradual_pruning": GradualPruningConfig,
    "static_sparsity": StaticSparsityConfig,
    "early_bird": EarlyBirdConfig,
}


def method_name(config: SparsityConfig) -> str:
    """The name under which a config of this class is stored."""
    return next(name for name, kind in METHODS.items() if type(config) is kind)


def config_to_dict(config: SparsityConfig) -> dict:
    """The config as plain JSON values, with its method's name."""
    values = {name: _plain(value) for name, value in vars(config).items()}
    return {"method": method_name(config), **values}


def config_from_dict(content: dict) -> SparsityConfig:
    """The config that `config_to_dict` wrote.

    Raises:
        ValueError: unknown method or field, or values that the config refuses.
    """
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    method = values.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"Unknown sparsity method {method!r}. Choose one of: {', '.join(sorted(METHODS))}.")
    known = {entry.name for entry in dataclasses.fields(METHODS[method])}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{METHODS[method].__name__} has no field {unknown[0]!r}. Choose from: {', '.join(sorted(known))}."
        )
    return METHODS[method](**values)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value
