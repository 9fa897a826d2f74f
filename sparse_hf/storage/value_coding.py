"""How do the kept values of a tensor become smaller still, and come back bit for bit?

By zstd, a byte plane at a time: signs and exponents of weights fill few of the byte values that they could, and lie
together in the highest byte; the bytes below are nearly random and stay as they are. It needs the package `zstandard`.
"""

from collections.abc import Sequence

import numpy as np


LEVEL = 1  # higher ones are slower and gain less than one percent on weights
# A byte of a coded plane stands for at most so many, so that a small file cannot claim to be huge.
MOST_PER_BYTE = 1024


def check_zstd() -> None:
    """Raise ImportError, with the way out, where `zstandard` is not installed."""
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Values coded by zstd need the package `zstandard`, which is not installed: "
            "`pip install 'sparse_hf[zstd]'`."
        ) from error


def code_values(values: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The byte planes of all values together, the lowest first, each coded, or as it is where that is not smaller.

    Args:
        values: in pieces, 1-D, unsigned integers.

    Returns:
        As many uint8 arrays as an element has bytes; None if nothing is gained.
    """
    from zstandard import ZstdCompressor

    count, coder = sum(map(len, values)), ZstdCompressor(level=LEVEL)
    if not count:
        return None
    width, planes = values[0].itemsize, []
    for byte in range(width):
        plain = np.concatenate([piece.view(np.uint8)[byte::width] for piece in values])
        coded = np.frombuffer(coder.compress(plain.data), np.uint8)
        planes.append(coded if count <= MOST_PER_BYTE * len(coded) and len(coded) < count else plain)
    return planes if sum(map(len, planes)) < width * count else None


def decode_values(coded: np.ndarray, lengths: Sequence[int], values: np.ndarray) -> None:
    """Undo `code_values` into `values`.

    Args:
        coded: uint8, 1-D: the planes, one after the other.
        lengths: of each.

    Raises:
        ValueError: a plane is damaged, or is not as long as there are values.
        ImportError: see `check_zstd`.
    """
    check_zstd()
    from zstandard import ZstdDecompressor, ZstdError, get_frame_parameters

    count, begin = len(values), 0
    targets = values.view(np.uint8).reshape(count, -1).T
    for target, length in zip(targets, lengths, strict=True):
        plane, begin = coded[begin : begin + length], begin + length
        if length != count:
            try:
                # What the frame says of itself, in its first 18 bytes, comes first: that much would be allocated.
                told = get_frame_parameters(plane[:18].data)
                if told.content_size != count or told.dict_id:
                    raise ValueError(f"a plane of {count} values says that it is {told.content_size} bytes")
                plane = np.frombuffer(ZstdDecompressor().decompress(plane.data), np.uint8)
            except ZstdError as error:
                raise ValueError(f"a plane is not what zstd writes ({error})") from error
        if len(plane) != count:
            raise ValueError(f"a plane of {count} values is {len(plane)} bytes")
        target[:] = plane


def why_not(lengths: Sequence[int], count: int) -> str | None:
    """What is wrong with the lengths of the coded planes of `count` values, if anything is."""
    for length in lengths:
        if not length <= count <= MOST_PER_BYTE * length:
            return f"a plane of {count} values cannot be {length} bytes"
    return None
