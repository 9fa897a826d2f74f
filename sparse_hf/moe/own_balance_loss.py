"""The balance loss that stock models add to their loss themselves, turned off."""

import logging

from torch import nn


logger = logging.getLogger(__name__)


def turn_off_own_balance_loss(model: nn.Module) -> None:
    """Set the coefficient of the model's own balance loss to 0, in this object; its config stays as it is.

    In stock models it is part of the loss where `config.output_router_logits` is True, in evaluation too.

    Raises:
        ValueError: it is on, with a coefficient that is not its class's default: then somebody chose it.
    """
    config = model.config
    owners = [module for module in model.modules() if vars(module).get("router_aux_loss_coef")]
    if not owners:
        return
    if getattr(config, "output_router_logits", False):
        coefficient = owners[0].router_aux_loss_coef
        if coefficient != getattr(type(config), "router_aux_loss_coef", None):
            raise ValueError(
                f"Only one balance loss can be trained with, got `balance` and the model's own with "
                f"`router_aux_loss_coef`={coefficient}. Set `model.config.output_router_logits = False`, or leave "
                "`balance` out."
            )
        logger.warning(
            "The model's own balance loss (`router_aux_loss_coef`=%s) is turned off: `balance` takes its place.",
            coefficient,
        )
    for module in owners:
        module.router_aux_loss_coef = 0.0
