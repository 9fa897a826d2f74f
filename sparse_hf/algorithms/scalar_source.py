"""What do the loops of `compiled_loops` say to LLVM where the processor cannot move marked elements by itself?

The same two functions as in `vector_source`, an element at a time and without a branch that depends on the data: with
zeros at random places such branches would be guessed wrong half of the time.
"""

from string import Template


STEP = 8  # elements: those of a byte of bits

# %k$j counts the values before element $j of a step.
#
# pack: every element is stored as the next value, and its place as the next place; the count rises where it is not
# zero, so that otherwise the next one overwrites it.
#
# unpack: element $j is the next value, or zero where its bit is clear. Beyond the last value the last one is read, and
# where the bits say more than %count in all the loop ends with -1.
_PACK = """
define i64 @pack(ptr %elements, i64 %steps, ptr %values, ptr %bits, ptr %places) {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %loop]
  %k0 = phi i64 [0, %entry], [%k8, %loop]
  %first = mul i64 %i, 8
  %place = trunc i64 %first to i16
  %byte0 = add i8 0, 0
$each
  %byte.at = getelementptr i8, ptr %bits, i64 %i
  store i8 %byte8, ptr %byte.at, align 1
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %steps
  br i1 %more, label %loop, label %done
done:
  ret i64 %k8
}
"""
_PACK_ONE = """
  %index$j = add i64 %first, $j
  %element$j.at = getelementptr i$bits, ptr %elements, i64 %index$j
  %element$j = load i$bits, ptr %element$j.at, align 1
  %value$j.at = getelementptr i$bits, ptr %values, i64 %k$j
  store i$bits %element$j, ptr %value$j.at, align 1
  %place$j = add i16 %place, $j
  %place$j.at = getelementptr i16, ptr %places, i64 %k$j
  store i16 %place$j, ptr %place$j.at, align 1
  %mark$j = icmp ne i$bits %element$j, 0
  %mark$j.8 = zext i1 %mark$j to i8
  %mark$j.64 = zext i1 %mark$j to i64
  %bit$j = shl i8 %mark$j.8, $j
  %byte$next = or i8 %byte$j, %bit$j
  %k$next = add i64 %k$j, %mark$j.64
"""

_UNPACK = """
declare i8 @llvm.ctpop.i8(i8)
declare i64 @llvm.umin.i64(i64, i64)

define i64 @unpack(ptr %values, i64 %count, ptr %bits, i64 %steps, ptr %out) {
entry:
  %last = sub i64 %count, 1
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i.next, %apart]
  %k0 = phi i64 [0, %entry], [%k8, %apart]
  %byte.at = getelementptr i8, ptr %bits, i64 %i
  %byte = load i8, ptr %byte.at, align 1
  %set = call i8 @llvm.ctpop.i8(i8 %byte)
  %set.64 = zext i8 %set to i64
  %k.end = add i64 %k0, %set.64
  %damaged = icmp ugt i64 %k.end, %count
  br i1 %damaged, label %refuse, label %apart
apart:
  %first = mul i64 %i, 8
$each
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %steps
  br i1 %more, label %loop, label %done
done:
  ret i64 %k8
refuse:
  ret i64 -1
}
"""
_UNPACK_ONE = """
  %shifted$j = lshr i8 %byte, $j
  %mark$j = trunc i8 %shifted$j to i1
  %mark$j.64 = zext i1 %mark$j to i64
  %mask$j = sext i1 %mark$j to i$bits
  %at$j = call i64 @llvm.umin.i64(i64 %k$j, i64 %last)
  %value$j.at = getelementptr i$bits, ptr %values, i64 %at$j
  %value$j = load i$bits, ptr %value$j.at, align 1
  %element$j = and i$bits %value$j, %mask$j
  %index$j = add i64 %first, $j
  %element$j.at = getelementptr i$bits, ptr %out, i64 %index$j
  store i$bits %element$j, ptr %element$j.at, align 1
  %k$next = add i64 %k$j, %mark$j.64
"""


def scalar_source(itemsize: int) -> str:
    """The loops for elements of 1, 2, 4 or 8 bytes."""
    loops = ((_PACK, _PACK_ONE), (_UNPACK, _UNPACK_ONE))
    return "".join(Template(loop).substitute(each=_each(one, itemsize)) for loop, one in loops)


def _each(one: str, itemsize: int) -> str:
    """The text for every element of a step."""
    return "".join(Template(one).substitute(bits=8 * itemsize, j=j, next=j + 1) for j in range(STEP))
