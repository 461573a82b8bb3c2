"""Large arrays travel beside their pickle (PEP 574): equal, as writable as they were, and copied no more than needed."""

import tracemalloc
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from millstream.broker import pickling
from millstream.broker.codec import Codec, Sealing
from millstream.broker.pickling import LARGE_BYTES, Pickled

numpy = pytest.importorskip("numpy")

T = TypeVar("T")
REF = b"r" * 22


class Unpicklable:
    """Stands for an asyncio.Task among the arguments."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


class Stand:
    """Stands in for what cannot be pickled."""


@pytest.fixture
def codec() -> Codec:
    return Codec(b"a secret", "ms", "app.Model")


def in_parts(value: object, replace: Callable[[Any], Any] | None = None) -> Pickled:
    pickled = pickling.dump_parts(value, what="value", replace=replace)
    assert isinstance(pickled, Pickled)
    return pickled


def join(sealing: Sealing) -> bytes:
    return b"".join([sealing.sign(), *sealing.parts])


def travelled(codec: Codec, value: object) -> Any:
    return codec.open("value", REF, join(codec.sealing("value", REF, in_parts(value))))


def peak_of(work: Callable[[], T]) -> tuple[int, T]:
    """The most memory that `work` takes at a time, and what it returns."""
    tracemalloc.start()
    try:
        result = work()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "array",
    [
        numpy.arange(20_000.0),
        numpy.arange(20_000.0).reshape(10, 20, 100),
        numpy.asfortranarray(numpy.arange(40_000.0).reshape(200, 200)),
        numpy.arange(80_000.0).reshape(200, 400)[:, ::2],
        numpy.arange(40_000.0)[::-1],
        numpy.zeros(20_000, dtype=[("a", "<i4"), ("b", "<f8")]),
        numpy.arange(20_000, dtype=">i8"),
        numpy.array(["text"] * 20_000),
        numpy.array([{"an": "object"}, None] * 40_000, dtype=object),
    ],
    ids=["plain", "3d", "fortran", "strided", "reversed", "record", "bigendian", "strings", "objects"],
)
def test_array_comes_back_equal_and_can_be_written_to(codec: Codec, array: Any) -> None:
    again = travelled(codec, array)

    assert (again.dtype, again.shape) == (array.dtype, array.shape)
    assert numpy.array_equal(again, array)
    assert again.flags.writeable
    again[0] = again[1]


def test_array_that_was_read_only_stays_so(codec: Codec) -> None:
    array = numpy.arange(20_000.0)
    array.flags.writeable = False

    again = travelled(codec, array)

    assert not again.flags.writeable


def test_empty_arrays_come_back_beside_large_ones(codec: Codec) -> None:
    value = [numpy.zeros((0, 5)), numpy.arange(20_000.0), numpy.zeros(0)]

    again = travelled(codec, value)

    assert [one.shape for one in again] == [(0, 5), (20_000,), (0,)]


def test_views_of_one_array_stay_views_of_one(codec: Codec) -> None:
    array = numpy.arange(20_000.0)

    again = travelled(codec, [array, array])

    assert again[0] is again[1]


def test_array_that_came_back_is_its_own(codec: Codec) -> None:
    envelope = join(codec.sealing("value", REF, in_parts(numpy.arange(20_000.0))))
    first, second = codec.open("value", REF, envelope), codec.open("value", REF, envelope)

    first[:] = 0

    assert second[7] == 7
    assert codec.open("value", REF, envelope)[7] == 7


def test_large_value_is_sealed_without_a_copy_and_opened_with_one(codec: Codec) -> None:
    array = numpy.zeros(4_000_000)  # 32 MB
    pickled = in_parts(array)

    sealing = codec.sealing("value", REF, pickled)
    sealed_bytes, _ = peak_of(sealing.sign)
    envelope = join(sealing)
    opened_bytes, _ = peak_of(lambda: codec.open("value", REF, envelope))

    assert sealed_bytes < 100_000
    assert opened_bytes < array.nbytes * 1.1


def test_large_bytes_are_opened_with_one_copy(codec: Codec) -> None:
    envelope = join(codec.sealing("value", REF, in_parts(b"x" * 10_000_000)))

    opened_bytes, value = peak_of(lambda: codec.open("value", REF, envelope))

    assert len(value) == 10_000_000
    assert opened_bytes < 11_000_000


# what is taken apart


def test_large_array_is_not_copied_and_a_small_one_stays_in_the_pickle() -> None:
    large, small = numpy.zeros(4_000_000), numpy.zeros(100)

    dumped_bytes, pickled = peak_of(lambda: in_parts({"large": large, "small": small}))

    assert dumped_bytes < 100_000
    assert [len(buffer) for buffer in pickled.buffers] == [large.nbytes]
    assert small.nbytes < len(pickled.data) < 2000


@pytest.mark.parametrize(("size_bytes", "is_beside"), [(LARGE_BYTES, False), (LARGE_BYTES + 1, True)])
def test_arrays_lie_beside_from_the_size_at_which_arguments_are_large(size_bytes: int, is_beside: bool) -> None:
    pickled = in_parts(numpy.zeros(size_bytes, dtype="u1"))  # in the pickle, it is large for the pickle around it

    assert bool(pickled.buffers) == is_beside


def test_array_that_is_not_contiguous_is_copied_into_the_pickle() -> None:
    pickled = in_parts(numpy.zeros((400, 400))[:, ::2])

    assert pickled.buffers == []


def test_arrays_lie_beside_what_can_only_be_pickled_by_value_too() -> None:
    array = numpy.zeros(20_000)

    pickled = in_parts([array, lambda: 7, array + 1])

    assert [len(buffer) for buffer in pickled.buffers] == [array.nbytes] * 2


def test_arrays_lie_beside_what_is_replaced_too() -> None:
    array = numpy.arange(20_000.0)

    pickled = in_parts([Unpicklable(), array], lambda value: Stand() if isinstance(value, Unpicklable) else value)

    assert [len(buffer) for buffer in pickled.buffers] == [array.nbytes]
    stand, again = pickling.load(pickled.data, buffers=pickled.buffers)
    assert isinstance(stand, Stand) and numpy.array_equal(again, array)


# snapshots


def test_snapshot_does_not_change_with_the_array_and_takes_its_size_once() -> None:
    array = numpy.zeros(1_000_000)
    pickled = in_parts(array)

    copied_bytes, snapshot = peak_of(pickled.snapshot)
    array[:] = 7

    assert copied_bytes < array.nbytes * 0.1, "beside the copy itself, which is in pages of its own"
    assert (snapshot.data, snapshot.size_bytes) == (pickled.data, pickled.size_bytes)
    assert not any(bytes(snapshot.buffers[0]))
    assert bytes(pickled.buffers[0]) == array.tobytes()


def test_size_is_that_of_all_parts() -> None:
    pickled = in_parts([numpy.zeros(20_000), numpy.zeros(30_000)])

    assert pickled.size_bytes == len(pickled.data) + 8 * 50_000
