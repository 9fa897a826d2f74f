"""One learned coefficient per head and per neuron, while a search runs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparse_hf.algorithms.sharded_tensors import is_sharded, local_part, whole_of
from sparse_hf.anatomy.canonical_names import unwrap
from sparse_hf.anatomy.modeling_slim import UnitTable
from sparse_hf.anatomy.units import Units, find_units
from sparse_hf.tickets.early_bird_config import Ranking


ATTRIBUTE = "sparse_hf_coefficients"
PART = 1 << 18  # numbers of which a CPU's cache holds a few times as many bytes


class UnitCoefficients(nn.Module):
    """Multiplies each head's part of the context vector, and each neuron's activation, by a coefficient, 1 at first.

    That is done by hooks in front of the layers that read them (attention's output projection, the FFN's down
    projection), so that fused attention keeps working; a coefficient of zero equals the unit cut out. EarlyBERT scales
    the attention probabilities after dropout, which is the same function.

    The coefficients are fp32 whatever the model's dtype is: a search moves them by some thousandths, which bf16 cannot
    hold. They are parameters of the model, so that every Trainer strategy trains, reduces, saves and restores them.
    FSDP2 and DeepSpeed may compute with copies in half precision; what is trained and read here stays fp32.
    """

    def __init__(self, units: list[Units], device: torch.device | None = None) -> None:
        super().__init__()
        self.units = list(units)
        self.values = nn.ParameterList(nn.Parameter(torch.ones(one.count, device=device)) for one in units)
        self._hooks: list = []

    @classmethod
    def attach(
        cls, model: nn.Module, table: UnitTable | None = None, units: list[Units] | None = None
    ) -> "UnitCoefficients":
        """Add coefficients to `model`, in place; until `detach`, its state dict holds them too.

        Args:
            table: of a family that is not supported.
            units: where the model's weights are in parts, of which they cannot be read.

        Raises:
            ValueError: the model's family has no table of units, or coefficients are attached already.
        """
        inner = unwrap(model)
        if hasattr(inner, ATTRIBUTE):
            raise ValueError("The model has coefficients already. Detach them before a new search.")
        units = units or find_units(inner, table)
        coefficients = cls(units, inner.get_submodule(units[0].output).weight.device)
        for number, one in enumerate(units):
            hook = _multiplier(coefficients.values, number, one.width)
            coefficients._hooks.append(inner.get_submodule(one.output).register_forward_pre_hook(hook))
        setattr(inner, ATTRIBUTE, coefficients)
        return coefficients

    def detach(self, model: nn.Module) -> None:
        """Take the coefficients off `model` again; it computes what it did without them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        delattr(unwrap(model), ATTRIBUTE)

    def scores(self, ranking: Ranking = "signed") -> dict[str, Tensor]:
        """The coefficients by unit key, on the CPU: as they are (the released rule), or their absolute values.

        Whole ones, also where ranks hold parts of them; then all ranks call this together.
        """
        pairs = zip(self.units, self.values, strict=True)
        values = {one.key: whole_of(local_part(value), value).detach().cpu().clone() for one, value in pairs}
        return {key: value.abs() for key, value in values.items()} if ranking == "absolute" else values

    @torch.no_grad()
    def add_l1_gradient(self, strength: float) -> None:
        """Add the gradient of `strength * Σ|c|` to each coefficient's; once per optimizer step, after clipping.

        Raises:
            RuntimeError: a coefficient has no gradient, so the model did not use it.
        """
        for one, value in zip(self.units, self.values, strict=True):
            if value.grad is None:
                raise RuntimeError(f"The coefficients of `{one.key}` got no gradient: the model does not use them.")
            gradient = value.grad.to_local() if is_sharded(value) else value.grad
            gradient.add_(local_part(value).sign(), alpha=strength)


@torch.no_grad()
def fold_coefficients(model: nn.Module, values: Mapping[str, Tensor], table: UnitTable | None = None) -> None:
    """Multiply coefficients (1-D, by unit key) into the weights that read the units, in place; computed in fp32."""
    model = unwrap(model)
    for one in find_units(model, table):
        module = model.get_submodule(one.output)
        scale = _spread(values[one.key].to(module.weight.device, torch.float32), one.width)
        columns = scale if isinstance(module, nn.Linear) else scale[:, None]  # Conv1D is stored (in, out)
        module.weight.copy_(module.weight * columns)  # half precision times fp32 is fp32


def _spread(value: Tensor, width: int) -> Tensor:
    return value if width == 1 else value.repeat_interleave(width)


def _multiplier(values: nn.ParameterList, number: int, width: int) -> Callable:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scaled = _scale if torch.compiler.is_compiling() else _Scale.apply  # a compiler fuses the passes itself
        # Looked up each time, since FSDP2 puts another tensor there.
        return (scaled(args[0], _spread(values[number], width)), *args[1:])

    return multiply


def _scale(values: Tensor, scale: Tensor) -> Tensor:
    # Half-precision activations are multiplied in fp32, else a coefficient of 1.003 would be 1.
    return (values * scale).to(values.dtype)


class _Scale(torch.autograd.Function):
    """`_scale`, whose gradient stores no product as large as the activations: it is summed in parts that stay cached.

    `benchmarks/early_bird_overhead.py` runs autograd's own beside it.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return _scale(values, scale)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = ctx.saved_tensors
        dtype = torch.promote_types(values.dtype, scale.dtype)
        rows, other = gradient.reshape(-1, len(scale)), values.reshape(-1, len(scale))
        part = max(1, PART // len(scale) if rows.device.type == "cpu" else len(rows))
        products = zip(rows.split(part), other.split(part), strict=True)
        total = sum((one.to(dtype) * two).sum(0) for one, two in products)
        return _scale(gradient, scale), total.to(scale.dtype)
