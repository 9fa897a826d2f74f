"""A checkpoint without its zeros: what is in its folder?

Weights lie in `compressed.safetensors` or in shards with an index, names that no stock loader looks for. A tensor
keeps its name; where it is compressed it is uint8 and 1-D there (`compressed_tensor`), so a loader that does not know
the form finds no weight of the right shape.
"""

from collections.abc import Iterable
from pathlib import Path

from sparse_hf.storage.piece_bytes import SourceFiles
from sparse_hf.storage.stored_form import LONGEST_HEAD, StoredForm, is_stored_like, read_form
from sparse_hf.storage.tensor_headers import StoredTensor, read_headers


COMPRESSED_FILE = "compressed.safetensors"
COMPRESSED_INDEX = "compressed.safetensors.index.json"
QUANT_METHOD = "sparse_hf"  # `quant_method` of the config's `quantization_config`
FORMAT = "sparse_hf.compressed.v1"  # and its `format`


def read_forms(folder: Path) -> dict[str, StoredForm]:
    """How every tensor of a compressed checkpoint is stored, by name. Only heads are read, no weights.

    Raises:
        FileNotFoundError: the folder holds no compressed checkpoint, or shards are missing.
        ValueError: a file is truncated, damaged or hostile.
    """
    return forms_of(read_headers(folder, COMPRESSED_FILE, COMPRESSED_INDEX).values())


def forms_of(tensors: Iterable[StoredTensor]) -> dict[str, StoredForm]:
    """How tensors that are described by headers of a compressed checkpoint are stored, by name.

    Raises:
        ValueError: a file is truncated, damaged or hostile.
    """
    with SourceFiles() as sources:
        return {tensor.name: form_of(tensor, sources) for tensor in tensors}


def is_compressed(folder: Path) -> bool:
    """Whether the folder holds compressed weights."""
    return (folder / COMPRESSED_FILE).is_file() or (folder / COMPRESSED_INDEX).is_file()


def form_of(tensor: StoredTensor, sources: SourceFiles) -> StoredForm:
    """`forms_of` for one tensor."""
    if not is_stored_like(tensor.dtype, tensor.shape):
        return StoredForm("dense", tensor.dtype, tensor.shape, None, tensor.length)
    head = sources.read(tensor.file, tensor.offset, min(tensor.length, LONGEST_HEAD))
    try:
        return read_form(head, tensor.length)
    except ValueError as error:
        raise in_file(tensor, error) from error


def in_file(tensor: StoredTensor, error: ValueError) -> ValueError:
    """The same error, with where it is."""
    return ValueError(f"`{tensor.name}` in `{tensor.file}`: {error}")
