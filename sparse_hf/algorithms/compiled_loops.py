"""How are zeros left out of a tensor and put back nearly at the speed of memory?

numpy and torch need several passes for that. Here two small loops are written down in LLVM's language, and `llvmlite`
compiles them when they are first wanted, in a few hundredths of a second: with AVX-512 VBMI2 a vector at a time
(`vector_source`), elsewhere an element at a time (`scalar_source`). Without that package numpy does the same in
`nonzeros`.
"""

import ctypes
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sparse_hf.algorithms.scalar_source import STEP, scalar_source
from sparse_hf.algorithms.vector_source import lanes, vector_source


MULTIPLE = 32  # elements: a whole number of steps of either loop
BLOCK = 1 << 16  # elements packed at a time: their places fit into 16 bits, and all of it into the processor's cache
OLDEST_LLVM = 20  # of llvmlite 0.45
FOR_VECTORS = ("avx512vbmi2", "avx512vl", "avx512bw", "popcnt")

_COMPILING = threading.Lock()  # or each thread would compile its own


class KeptBlock(NamedTuple):
    """What is kept of a block of elements.

    Attributes:
        size: of the block, a multiple of 32 but for the last one.
        bits: uint8, a bit per element, set = kept: element `i` is bit `i % 8` of byte `i // 8`.
        positions: the indices in the block of what is kept, as integers of any size; only good until the next block.
        values: what is kept.
    """

    size: int
    bits: np.ndarray
    positions: np.ndarray
    values: np.ndarray


def compiled_loops(itemsize: int) -> "CompiledLoops | None":
    """The loops for elements of 1, 2, 4 or 8 bytes; None where `llvmlite` is not installed, or cannot compile them."""
    with _COMPILING:
        return _compiled(itemsize)


@functools.cache
def _compiled(itemsize: int) -> "CompiledLoops | None":
    try:
        import llvmlite.binding as llvm

        return CompiledLoops(itemsize, can_move_vectors()) if llvm.llvm_version_info[0] >= OLDEST_LLVM else None
    except ImportError:
        return None
    except (AttributeError, OSError, RuntimeError) as error:  # a release to come, a library that does not fit
        # A checkpoint must load all the same.
        warnings.warn(f"llvmlite cannot compile the loops of sparse_hf, numpy is slower: {error}", stacklevel=2)
        return None


def can_move_vectors() -> bool:
    """Whether this processor has AVX-512 VBMI2; asked of `llvmlite`."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return all(features.get(name) for name in FOR_VECTORS)


class CompiledLoops:
    """The loops, compiled for this processor. Several threads may use them at once: Python's lock is released."""

    def __init__(self, itemsize: int, by_vectors: bool) -> None:
        """
        Args:
            itemsize: bytes of an element: 1, 2, 4 or 8.
            by_vectors: only where `can_move_vectors`.
        """
        import llvmlite.binding as llvm

        self.by_vectors = by_vectors
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
        )
        module = llvm.parse_assembly(vector_source(itemsize) if by_vectors else scalar_source(itemsize))
        module.verify()
        self._engine = llvm.create_mcjit_compiler(module, machine)  # holds the machine code, so it is kept
        self._engine.finalize_object()
        self._step = lanes(itemsize) if by_vectors else STEP  # elements
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._pack = self._function("pack", pointer, number, pointer, pointer, pointer)
        self._unpack = self._function("unpack", pointer, number, pointer, number, pointer)

    def pack(self, elements: np.ndarray) -> Iterator[KeptBlock]:
        """Leave out what is zero, block by block.

        Args:
            elements: 1-D, contiguous, unsigned integers, a multiple of `MULTIPLE` of them.
        """
        _check_whole(elements)
        values, places = np.empty(BLOCK + MULTIPLE, elements.dtype), np.empty(BLOCK + MULTIPLE, np.uint16)
        for start in range(0, len(elements), BLOCK):
            block = elements[start : start + BLOCK]
            bits = np.empty(len(block) // 8, np.uint8)
            count = self._pack(
                block.ctypes.data, len(block) // self._step, values.ctypes.data, bits.ctypes.data, places.ctypes.data
            )
            yield KeptBlock(len(block), bits, places[:count], values[:count].copy())

    def unpack(self, values: np.ndarray, bits: np.ndarray, out: np.ndarray) -> int | None:
        """Put zeros back.

        Args:
            values: 1-D, contiguous, of the dtype of `out`.
            bits: uint8, 1-D, contiguous, at least a bit per element.
            out: 1-D, contiguous, a multiple of `MULTIPLE` elements.

        Returns:
            How many values were used; None where the bits say more than there are.
        """
        for array in (values, bits, out):
            _check_contiguous(array)
        _check_whole(out)
        if 8 * len(bits) < len(out):
            raise ValueError(f"{len(out) // 8} bytes of bits are needed, got {len(bits)}.")
        if not len(values) or not len(out):
            out[:] = 0
            return None if bits[: len(out) // 8].any() else 0
        used = self._unpack(values.ctypes.data, len(values), bits.ctypes.data, len(out) // self._step, out.ctypes.data)
        return None if used < 0 else used

    def _function(self, name: str, *arguments: type) -> Callable[..., int]:
        return ctypes.CFUNCTYPE(ctypes.c_int64, *arguments)(self._engine.get_function_address(name))


def _check_whole(elements: np.ndarray) -> None:
    _check_contiguous(elements)
    if len(elements) % MULTIPLE:
        raise ValueError(f"A multiple of {MULTIPLE} elements is needed, got {len(elements)}.")


def _check_contiguous(array: np.ndarray) -> None:
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"A contiguous array of one dimension is needed, got shape {array.shape}.")
