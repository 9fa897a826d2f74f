"""How does a model with its own head come off the disk and go back, sparse, as a stock folder?"""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparse_hf.storage.durable import write_json
from sparse_hf.storage.file_names import DESCRIPTION_FILE
from sparse_hf.storage.mask_file import MASKS_FILE, save_bits
from sparse_hf.tickets.ticket import Ticket


def load_with_head(name_or_path: str, output: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model as the class its config names, so that no head is lost, and its tokenizer if it has one.

    Raises:
        FileExistsError: `output` already holds files; checked before anything is loaded.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"`{output}` must be new or empty, found files there. Choose another folder.")
    config = AutoConfig.from_pretrained(name_or_path)
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, AutoModel)
    model = kind.from_pretrained(name_or_path)
    try:
        return model, AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return model, None


def model_without_weights(name_or_path: str) -> PreTrainedModel:
    """The model with the head that its config names, on the meta device: shapes and no memory."""
    config = AutoConfig.from_pretrained(name_or_path)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return AutoModel.from_config(config) if kind is None else kind(config)


def save_sparse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, ticket: Ticket, output: Path
) -> None:
    """Write a stock model folder with the zeros in it, and the masks beside it."""
    model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    save_bits(output / MASKS_FILE, ticket.bits, ticket.shapes)
    write_json(output / DESCRIPTION_FILE, {**ticket.description(), "kind": "model"})
