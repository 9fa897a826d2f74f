"""What do the loops of `compiled_loops` say to LLVM where the processor has AVX-512 VBMI2?

That is on Intel's since Ice Lake and AMD's since Zen 4. There one instruction moves the marked elements of a vector
together, or apart.
"""

from collections.abc import Iterable
from string import Template


MOST_LANES = 32

# `pack` and `unpack` go over vectors of $lanes elements of $bits bits; %k counts the values so far.
#
# pack: what is not zero is marked. Marks are stored as bits; marked elements, and their places, are moved together and
# stored, each time a whole vector, of which the next one overwrites what was not marked.
#
# unpack: as many values as bits are set are read and moved apart, with zeros between. Where the bits say more than
# %count in all the loop ends with -1, before a value beyond is read.
_DECLARED = """\
declare i$lanes @llvm.ctpop.i$lanes(i$lanes)
declare $element @llvm.masked.expandload.v${lanes}i$bits(ptr, $marks, $element)
declare $element @llvm.x86.avx512.mask.compress.v${lanes}i$bits($element, $element, $marks)
declare $place @llvm.x86.avx512.mask.compress.v${lanes}i16($place, $place, $marks)
"""

_LOOPS = """
define i64 @pack(ptr %elements, i64 %steps, ptr %values, ptr %bits, ptr %places) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %loop]
  %k = phi i64 [0, %entry], [%k.next, %loop]
  %place = phi $place [$ramp, %entry], [%place.next, %loop]
  %first = mul i64 %i, $lanes
  %element.at = getelementptr i$bits, ptr %elements, i64 %first
  %element = load $element, ptr %element.at, align 1
  %marks = icmp ne $element %element, zeroinitializer
  %word = bitcast $marks %marks to i$lanes
  %word.at = getelementptr i$lanes, ptr %bits, i64 %i
  store i$lanes %word, ptr %word.at, align 1
  %value = call $element @llvm.x86.avx512.mask.compress.v${lanes}i$bits(
      $element %element, $element zeroinitializer, $marks %marks)
  %value.at = getelementptr i$bits, ptr %values, i64 %k
  store $element %value, ptr %value.at, align 1
  %kept = call $place @llvm.x86.avx512.mask.compress.v${lanes}i16(
      $place %place, $place zeroinitializer, $marks %marks)
  %kept.at = getelementptr i16, ptr %places, i64 %k
  store $place %kept, ptr %kept.at, align 1
  %place.next = add $place %place, $step
  %count = call i$lanes @llvm.ctpop.i$lanes(i$lanes %word)
  %count.64 = zext i$lanes %count to i64
  %k.next = add i64 %k, %count.64
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %steps
  br i1 %more, label %loop, label %done
done:
  ret i64 %k.next
}

define i64 @unpack(ptr %values, i64 %count, ptr %bits, i64 %steps, ptr %out) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %apart]
  %k = phi i64 [0, %entry], [%k.next, %apart]
  %word.at = getelementptr i$lanes, ptr %bits, i64 %i
  %word = load i$lanes, ptr %word.at, align 1
  %set = call i$lanes @llvm.ctpop.i$lanes(i$lanes %word)
  %set.64 = zext i$lanes %set to i64
  %k.next = add i64 %k, %set.64
  %damaged = icmp ugt i64 %k.next, %count
  br i1 %damaged, label %refuse, label %apart
apart:
  %marks = bitcast i$lanes %word to $marks
  %value.at = getelementptr i$bits, ptr %values, i64 %k
  %element = call $element @llvm.masked.expandload.v${lanes}i$bits(
      ptr %value.at, $marks %marks, $element zeroinitializer)
  %first = mul i64 %i, $lanes
  %element.at = getelementptr i$bits, ptr %out, i64 %first
  store $element %element, ptr %element.at, align 1
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %steps
  br i1 %more, label %loop, label %done
done:
  ret i64 %k.next
refuse:
  ret i64 -1
}
"""


def vector_source(itemsize: int) -> str:
    """The loops for elements of 1, 2, 4 or 8 bytes."""
    width = lanes(itemsize)
    names = {"ramp": _vector("i16", range(width)), "step": _vector("i16", [width] * width)}
    names |= {"element": f"<{width} x i{8 * itemsize}>", "place": f"<{width} x i16>", "marks": f"<{width} x i1>"}
    names |= {"lanes": str(width), "bits": str(8 * itemsize)}
    declared, loops = (Template(text).substitute(names) for text in (_DECLARED, _LOOPS))
    return "\n".join(dict.fromkeys(declared.splitlines())) + loops  # for 16 bits two declarations are the same


def _vector(kind: str, numbers: Iterable[int]) -> str:
    return f"<{', '.join(f'{kind} {number}' for number in numbers)}>"


def lanes(itemsize: int) -> int:
    """Elements of `itemsize` bytes in a vector."""
    return min(MOST_LANES, 64 // itemsize)
