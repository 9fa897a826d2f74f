"""What do the loops of `vector_loops` say to LLVM?"""

import re
from collections.abc import Iterable


LANES = 32  # the most elements in a vector

# `pack` and `unpack` go over vectors of <lanes> elements of <bits> bits; %k counts the values so far.
#
# pack: what is not zero is marked. Marks are stored as bits; marked elements, and their places, are moved together and
# stored, each time a whole vector, of which the next one overwrites what was not marked.
#
# unpack: as many values as bits are set are read and moved apart, with zeros between. Where the bits say more than
# %count in all the loop ends with -1, before a value beyond is read.
#
# indices: eight bits of an Elias-Fano bitmap at a time. The bit at place p that is the j-th to be set (from 0) says
# the index ((p - j) << %width) + its low part. Ends with -1 like unpack; there must be room for eight low parts and
# indices beyond.
_DECLARED = """\
declare i<lanes> @llvm.ctpop.i<lanes>(i<lanes>)
declare <element> @llvm.masked.expandload.v<lanes>i<bits>(ptr, <marks>, <element>)
declare <element> @llvm.x86.avx512.mask.compress.v<lanes>i<bits>(<element>, <element>, <marks>)
declare <place> @llvm.x86.avx512.mask.compress.v<lanes>i16(<place>, <place>, <marks>)
declare i8 @llvm.ctpop.i8(i8)
declare <8 x i64> @llvm.x86.avx512.mask.compress.v8i64(<8 x i64>, <8 x i64>, <8 x i1>)
"""

_LOOPS = """
define i64 @pack(ptr %elements, i64 %vectors, ptr %values, ptr %bits, ptr %places) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %loop]
  %k = phi i64 [0, %entry], [%k.next, %loop]
  %place = phi <place> [<ramp>, %entry], [%place.next, %loop]
  %first = mul i64 %i, <lanes>
  %element.at = getelementptr i<bits>, ptr %elements, i64 %first
  %element = load <element>, ptr %element.at, align 1
  %marks = icmp ne <element> %element, zeroinitializer
  %word = bitcast <marks> %marks to i<lanes>
  %word.at = getelementptr i<lanes>, ptr %bits, i64 %i
  store i<lanes> %word, ptr %word.at, align 1
  %value = call <element> @llvm.x86.avx512.mask.compress.v<lanes>i<bits>(
      <element> %element, <element> zeroinitializer, <marks> %marks)
  %value.at = getelementptr i<bits>, ptr %values, i64 %k
  store <element> %value, ptr %value.at, align 1
  %kept = call <place> @llvm.x86.avx512.mask.compress.v<lanes>i16(
      <place> %place, <place> zeroinitializer, <marks> %marks)
  %kept.at = getelementptr i16, ptr %places, i64 %k
  store <place> %kept, ptr %kept.at, align 1
  %place.next = add <place> %place, <step>
  %count = call i<lanes> @llvm.ctpop.i<lanes>(i<lanes> %word)
  %count.64 = zext i<lanes> %count to i64
  %k.next = add i64 %k, %count.64
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %vectors
  br i1 %more, label %loop, label %done
done:
  ret i64 %k.next
}

define i64 @unpack(ptr %values, i64 %count, ptr %bits, i64 %vectors, ptr %out) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %apart]
  %k = phi i64 [0, %entry], [%k.next, %apart]
  %word.at = getelementptr i<lanes>, ptr %bits, i64 %i
  %word = load i<lanes>, ptr %word.at, align 1
  %set = call i<lanes> @llvm.ctpop.i<lanes>(i<lanes> %word)
  %set.64 = zext i<lanes> %set to i64
  %k.next = add i64 %k, %set.64
  %damaged = icmp ugt i64 %k.next, %count
  br i1 %damaged, label %refuse, label %apart
apart:
  %marks = bitcast i<lanes> %word to <marks>
  %value.at = getelementptr i<bits>, ptr %values, i64 %k
  %element = call <element> @llvm.masked.expandload.v<lanes>i<bits>(
      ptr %value.at, <marks> %marks, <element> zeroinitializer)
  %first = mul i64 %i, <lanes>
  %element.at = getelementptr i<bits>, ptr %out, i64 %first
  store <element> %element, ptr %element.at, align 1
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %vectors
  br i1 %more, label %loop, label %done
done:
  ret i64 %k.next
refuse:
  ret i64 -1
}

define i64 @indices(ptr %bitmap, i64 %bytes, ptr %lows, i64 %width, i64 %count, ptr %indices) {
entry:
  %width.0 = insertelement <8 x i64> zeroinitializer, i64 %width, i64 0
  %widths = shufflevector <8 x i64> %width.0, <8 x i64> zeroinitializer, <8 x i32> zeroinitializer
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %apart]
  %j = phi i64 [0, %entry], [%j.next, %apart]
  %place = phi <8 x i64> [<eight>, %entry], [%place.next, %apart]
  %byte.at = getelementptr i8, ptr %bitmap, i64 %i
  %byte = load i8, ptr %byte.at, align 1
  %set = call i8 @llvm.ctpop.i8(i8 %byte)
  %set.64 = zext i8 %set to i64
  %j.next = add i64 %j, %set.64
  %damaged = icmp ugt i64 %j.next, %count
  br i1 %damaged, label %refuse, label %apart
apart:
  %marks = bitcast i8 %byte to <8 x i1>
  %set.places = call <8 x i64> @llvm.x86.avx512.mask.compress.v8i64(
      <8 x i64> %place, <8 x i64> zeroinitializer, <8 x i1> %marks)
  %j.0 = insertelement <8 x i64> zeroinitializer, i64 %j, i64 0
  %j.all = shufflevector <8 x i64> %j.0, <8 x i64> zeroinitializer, <8 x i32> zeroinitializer
  %numbers = add <8 x i64> %j.all, <eight>
  %high = sub <8 x i64> %set.places, %numbers
  %shifted = shl <8 x i64> %high, %widths
  %low.at = getelementptr i8, ptr %lows, i64 %j
  %low.8 = load <8 x i8>, ptr %low.at, align 1
  %low = zext <8 x i8> %low.8 to <8 x i64>
  %index = or <8 x i64> %shifted, %low
  %index.at = getelementptr i64, ptr %indices, i64 %j
  store <8 x i64> %index, ptr %index.at, align 1
  %place.next = add <8 x i64> %place, <eight.step>
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %bytes
  br i1 %more, label %loop, label %done
done:
  ret i64 %j.next
refuse:
  ret i64 -1
}
"""


def vector_source(itemsize: int) -> str:
    """The loops for elements of 1, 2, 4 or 8 bytes; `indices` is the same for all."""
    width = lanes(itemsize)
    names = {"ramp": _vector("i16", range(width)), "step": _vector("i16", [width] * width)}
    names |= {"eight": _vector("i64", range(8)), "eight.step": _vector("i64", [8] * 8)}
    names |= {"element": f"<{width} x i{8 * itemsize}>", "place": f"<{width} x i16>", "marks": f"<{width} x i1>"}
    names |= {"lanes": str(width), "bits": str(8 * itemsize)}
    declared, loops = (re.sub(r"<([\w.]+)>", lambda found: names[found[1]], text) for text in (_DECLARED, _LOOPS))
    return "\n".join(dict.fromkeys(declared.splitlines())) + loops  # for 16 bits two declarations are the same


def _vector(kind: str, numbers: Iterable[int]) -> str:
    return f"<{', '.join(f'{kind} {number}' for number in numbers)}>"


def lanes(itemsize: int) -> int:
    """Elements of `itemsize` bytes in a vector."""
    return min(LANES, 64 // itemsize)
