import ctypes
import mmap
import sys

import numpy as np
import pytest

from kinds_of_loops import loops_of
from sparse_hf.algorithms import nonzeros
from sparse_hf.algorithms.compiled_loops import (
    BLOCK,
    FOR_VECTORS,
    MULTIPLE,
    CompiledLoops,
    _compiled,
    can_move_vectors,
    compiled_loops,
)
from sparse_hf.algorithms.scalar_source import STEP
from sparse_hf.algorithms.vector_source import lanes


@pytest.fixture(scope="module", params=["scalar", "vector"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def loops(request, kind):
    return loops_of(kind, request.param), np.dtype(f"<u{request.param}")


def test_by_hand(loops):
    loops, dtype = loops
    elements = np.zeros(MULTIPLE, dtype)
    elements[[1, 3, 31]] = 5, 6, 7
    (packed,) = loops.pack(elements)
    assert packed.bits.tolist() == [0b1010, 0, 0, 1 << 7]
    assert packed.positions.tolist() == [1, 3, 31]
    assert packed.values.tolist() == [5, 6, 7]
    out = np.full(MULTIPLE, 9, dtype)
    assert loops.unpack(packed.values, packed.bits, out) == 3
    assert out.tolist() == elements.tolist()


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 1])
def test_the_same_as_numpy_over_several_blocks(loops, kept, monkeypatch):
    loops, dtype = loops
    random = np.random.default_rng(0)
    elements = random.integers(1, 1 << 8 * dtype.itemsize, 2 * BLOCK + 3 * MULTIPLE, dtype=np.uint64).astype(dtype)
    elements[random.random(len(elements)) >= kept] = 0
    found = [one._replace(positions=one.positions.copy()) for one in loops.pack(elements)]
    assert [one.size for one in found] == [BLOCK, BLOCK, 3 * MULTIPLE]
    monkeypatch.setattr(nonzeros, "BLOCK", BLOCK)
    monkeypatch.setattr(nonzeros, "compiled_loops", lambda itemsize: None)
    for ours, numpys in zip(found, nonzeros.kept_blocks(elements, few=False), strict=True):
        assert [part.tolist() for part in ours[1:]] == [part.tolist() for part in numpys[1:]]
    out = np.empty_like(elements)
    values, bits = (np.concatenate(parts) for parts in zip(*[(one.values, one.bits) for one in found], strict=True))
    assert loops.unpack(values, bits, out) == len(values)
    assert (out == elements).all()


def test_no_value_beyond_those_that_are_there_is_read_or_written(loops):
    loops, dtype = loops
    out = np.full(4 * MULTIPLE, 9, dtype)
    bits = np.zeros(len(out) // 8, np.uint8)
    bits[MULTIPLE // 8 :] = 255  # one vector without a value, then all
    assert loops.unpack(np.ones(2 * MULTIPLE, dtype), bits, out[: 3 * MULTIPLE]) == 2 * MULTIPLE
    assert loops.unpack(np.ones(2 * MULTIPLE, dtype), bits, out) is None
    assert out.tolist() == [0] * MULTIPLE + [1] * (2 * MULTIPLE) + [9] * MULTIPLE


def before_a_forbidden_page(array, pages):
    """A copy whose next byte ends the process when it is touched."""
    length = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, length + mmap.PAGESIZE), np.uint8)
    pages.append(memory)
    end = ctypes.c_void_p(memory.ctypes.data + length)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = memory[length - array.nbytes : length].view(array.dtype)
    copy[:] = array
    return copy


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages by mprotect")
@pytest.mark.parametrize("kept", [0, 0.05, 0.5, 1])
def test_nothing_beyond_an_array_is_touched(loops, kept):
    (loops, dtype), pages, random = loops, [], np.random.default_rng(0)
    marks = random.random(7 * MULTIPLE) < kept
    elements = before_a_forbidden_page(np.where(marks, 5, 0).astype(dtype), pages)
    (packed,) = loops.pack(elements)
    values, bits = (before_a_forbidden_page(one, pages) for one in (packed.values, packed.bits))
    out = before_a_forbidden_page(np.full_like(elements, 9), pages)
    assert loops.unpack(values, bits, out) == len(values)
    assert out.tolist() == elements.tolist()
    for _ in range(20):  # and so with bits of somebody else
        bits[:] = random.integers(0, 256, len(bits))
        loops.unpack(values, bits, out)


def test_nothing_is_given_and_nothing_comes_back(loops):
    loops, dtype = loops
    nothing = np.empty(0, dtype)
    assert list(loops.pack(nothing)) == []
    assert loops.unpack(nothing, np.empty(0, np.uint8), nothing) == 0


def test_what_the_loops_would_overrun_is_refused(loops):
    loops, dtype = loops
    whole, bits = np.zeros(2 * MULTIPLE, dtype), np.zeros(2 * MULTIPLE // 8, np.uint8)
    for refused in (
        lambda: next(loops.pack(whole[:-1])),
        lambda: next(loops.pack(whole[::2])),
        lambda: loops.unpack(whole, bits[:-1], whole),
        lambda: loops.unpack(whole, bits, whole[:-1]),
        lambda: loops.unpack(whole[::2], bits, whole),
    ):
        with pytest.raises(ValueError, match="needed"):
            refused()


def test_without_values_there_is_nothing_to_read(loops):
    loops, dtype = loops
    out, bits = np.full(MULTIPLE, 9, dtype), np.zeros(MULTIPLE // 8, np.uint8)
    assert loops.unpack(out[:0], bits, out) == 0
    assert not out.any()
    bits[-1] = 1
    assert loops.unpack(out[:0], bits, out) is None


def test_the_last_value_may_come_before_the_last_element(loops):
    loops, dtype = loops
    out, bits = np.full(MULTIPLE, 9, dtype), np.zeros(MULTIPLE // 8, np.uint8)
    bits[0] = 0b11
    assert loops.unpack(np.array([4, 5], dtype), bits, out) == 2
    assert out.tolist() == [4, 5] + [0] * (MULTIPLE - 2)


@pytest.mark.parametrize("missing", ["package", "release"])
def test_there_are_none_where_something_is_missing(missing, monkeypatch):
    pytest.importorskip("llvmlite", minversion="0.45")
    import llvmlite.binding as llvm

    if missing == "package":
        monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    else:
        monkeypatch.setattr(llvm, "llvm_version_info", (15, 0, 7))
    _compiled.cache_clear()
    assert compiled_loops(2) is None
    monkeypatch.undo()
    _compiled.cache_clear()
    assert isinstance(compiled_loops(2), CompiledLoops)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_what_cannot_be_compiled_is_told_of(error, monkeypatch):
    pytest.importorskip("llvmlite", minversion="0.45")
    import llvmlite.binding as llvm

    def fail(text):
        raise error("no such instruction")

    monkeypatch.setattr(llvm, "parse_assembly", fail)
    _compiled.cache_clear()
    with pytest.warns(UserWarning, match="numpy is slower: no such instruction"):
        assert compiled_loops(2) is None
    _compiled.cache_clear()


def test_whole_steps_fit_into_what_is_given():
    assert all(MULTIPLE % step == 0 for step in (STEP, *map(lanes, (1, 2, 4, 8))))


def test_vectors_are_for_processors_that_can_move_them(monkeypatch):
    llvm = pytest.importorskip("llvmlite.binding")
    features = {**llvm.get_host_cpu_features(), **dict.fromkeys(FOR_VECTORS, True)}
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    assert can_move_vectors()
    features["avx512vbmi2"] = False
    assert not can_move_vectors()
