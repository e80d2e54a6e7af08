"""What is asked for before it is read, and let go after: every call of a merge, recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mergebench.checkpoints import pace, page_cache
from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.reader import FileTensor, open_safetensors
from mergebench.compute.tiles import Tiling
from mergebench.core.errors import ParameterError
from mergebench.core.extents import Extent, extents
from mergebench.core.tensor import ArrayTensor
from mergebench.merge import ahead
from mergebench.merge.ahead import Ahead, Step
from mergebench.merge.engine import execute
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.steps import OpRef
from tests.helpers.files import BF16, write

NAMES = ("z.weight", "b.weight", "y.weight", "a.weight")
ROWS, COLUMNS = 64, 32
#: Bytes of a tensor, and entries of a job.
SIZE, JOB = 2 * ROWS * COLUMNS, ROWS * COLUMNS // 8
INPUTS = ("base", "ft1", "ft2")


class Event(NamedTuple):
    """Something done with bytes ``start:stop`` of a file."""

    what: str
    file: str
    start: int
    stop: int

    def meets(self, other: Event) -> bool:
        return self.file == other.file and self.start < other.stop and other.start < self.stop


@dataclass
class Recorded:
    """Files whose reading and advice is noted.

    Attributes
    ----------
    folder : Path
    events : list of Event
    """

    folder: Path
    events: list[Event] = field(default_factory=list)

    def plan(self, method: str, **options: Any) -> Plan:
        """Small jobs, so that there are many."""
        models = tuple(ModelRef(str(self.folder / f"{name}.safetensors")) for name in INPUTS[1:])
        recipe = Recipe(models, method=method, base=str(self.folder / "base.safetensors"),
                        out=str(self.folder / "out.safetensors"), **options)  # fmt: skip
        made = make_plan(recipe)
        return replace(made, tiling=Tiling(JOB // 2, JOB, 1))

    def run(self, method: str, **options: Any) -> list[Event]:
        """What a merge does with its inputs; what planning reads is left out."""
        plan = self.plan(method, **options)
        self.events.clear()
        execute(plan, force=True)
        return [event for event in self.events if event.file in INPUTS]

    def places(self) -> Mapping[tuple[str, str], Event]:
        """Where every tensor of every input lies."""
        found = {}
        for file in INPUTS:
            for name, tensor in open_safetensors(
                self.folder / f"{file}.safetensors"
            ).tensors.items():
                found[file, name] = Event("lies", file, tensor.offset, tensor.offset + SIZE)
        return found


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A base and two fine-tunes of four tensors, in another order than that of their names."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal((ROWS, COLUMNS)).astype(BF16) for name in NAMES}
    for place, file in enumerate(INPUTS):
        arrays = {
            name: (array + place * random.standard_normal(array.shape)).astype(BF16)
            for name, array in base.items()
        }
        write(tmp_path / f"{file}.safetensors", arrays)
    found = Recorded(tmp_path)
    true_read, true_advise = Handle.read_at, Handle.advise

    def read_at(self: Handle, view: memoryview, offset: int) -> int:
        found.events.append(Event("read", self.path.stem, offset, offset + len(view)))
        return true_read(self, view, offset)

    def advise(self: Handle, offset: int, length: int, advice: str) -> None:
        what = {"willneed": "ask", "dontneed": "drop"}[advice]
        found.events.append(Event(what, self.path.stem, offset, offset + length))
        true_advise(self, offset, length, advice)

    monkeypatch.setattr(Handle, "read_at", read_at)
    monkeypatch.setattr(Handle, "advise", advise)
    # A tensor and a half of all inputs ahead, in pieces of a job.
    monkeypatch.setattr(ahead, "WINDOW", 3 * SIZE * 3 // 2)
    monkeypatch.setattr(ahead, "PIECE", 3 * 2 * JOB)
    monkeypatch.setattr(ahead, "STEP", 2 * JOB)
    monkeypatch.setattr(page_cache, "STEP", 2 * JOB)
    # As on a slow disk.
    monkeypatch.setattr(pace, "pace_of", lambda handle, size: 0.0)
    return found


METHODS: Mapping[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {},
    "breadcrumbs": {"params": {"scope": "tensor"}},
}


def passes(events: list[Event], place: Event) -> Iterator[int]:
    """When a tensor is read tile by tile from its first entry on; samples do not count."""
    for number, event in enumerate(events):
        if event == Event("read", place.file, place.start, place.start + 2 * (JOB // 2)):
            yield number


@pytest.mark.parametrize("method", METHODS)
def test_the_next_tensor_is_asked_for_before_it_is_read(
    method: str, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the one before it is read, in every file, and never all of them at once."""
    monkeypatch.setenv(page_cache.VARIABLE, "1B")

    events = recorded.run(method, **METHODS[method])

    places = recorded.places()
    begun = {key: next(passes(events, place)) for key, place in places.items()}
    _, opening = min((number, name) for (_, name), number in begun.items())
    for (file, name), place in places.items():
        before = events[: begun[file, name]]
        assert any(e.what == "ask" and e.meets(place) for e in before) or name == opening, place
    early = {event for event in events[: min(begun.values())] if event.what == "ask"}
    asked = {key for key, place in places.items() if any(e.meets(place) for e in early)}
    # The first and the next, which lie within the window, and not the one behind them.
    assert len(asked) == 3 * 2


def test_the_order_of_statistics_is_followed(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds of the whole model are measured by name, and then merged by place."""
    monkeypatch.setenv(page_cache.VARIABLE, "1B")

    events = recorded.run("ties")

    places = recorded.places()
    asked = []
    for event in events:
        found = [name for (_, name), place in places.items() if event.meets(place)]
        if event.what == "ask" and event.file == "ft1":
            asked += [name for name in found if asked[-1:] != [name]]
    in_file = sorted(NAMES, key=lambda name: places["ft1", name].start)
    assert in_file != sorted(NAMES)
    readings = round(len(asked) / len(NAMES)) - 1
    assert readings >= 1
    expected = [*(sorted(NAMES) * readings), *in_file]
    assert asked == [name for name, _ in groupby(expected)]


def assert_read_after_no_drop(events: list[Event]) -> None:
    """No byte is read once it was let go."""
    dropped: list[Event] = []
    for event in events:
        if event.what == "drop":
            dropped.append(event)
        elif event.what == "read":
            assert not any(event.meets(each) for each in dropped), event


def assert_all_dropped(events: list[Event], places: Mapping[tuple[str, str], Event]) -> None:
    """Every byte that was read is let go after its last reading."""
    for place in places.values():
        last = max(n for n, e in enumerate(events) if e.what == "read" and e.meets(place))
        covered = [e for e in events[last:] if e.what == "drop" and e.meets(place)]
        assert min(e.start for e in covered) <= place.start
        assert max(e.stop for e in covered) >= place.stop


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_let_go_before_its_last_use(
    method: str, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for all inputs, though not for the output besides."""
    monkeypatch.setenv(page_cache.VARIABLE, f"{3 * 4 * SIZE}B")

    events = recorded.run(method, **METHODS[method])

    assert_read_after_no_drop(events)
    assert_all_dropped(events, recorded.places())
    written = [event for event in recorded.events if event.file not in INPUTS]
    told = [event.stop for event in written if event.what == "drop"]
    assert max(told) >= 4 * SIZE
    assert len(told) >= 4 * SIZE // (2 * JOB)
    # As it goes, and not at the end only.
    last_read = max(n for n, e in enumerate(events) if e.what == "read")
    assert sum(e.what == "drop" for e in events[:last_read]) > 3 * 3


def test_room_is_given_back(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured tensor by tensor needs no more of it than one tensor."""
    monkeypatch.setenv(page_cache.VARIABLE, f"{3 * SIZE}B")

    events = recorded.run("breadcrumbs", params={"scope": "tensor"})

    assert_read_after_no_drop(events)
    assert_all_dropped(events, recorded.places())


def test_without_room_every_reading_lets_go(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the second before the last."""
    monkeypatch.setenv(page_cache.VARIABLE, "1B")

    events = recorded.run("ties", then=(OpRef("trim", {"density": 0.5, "scope": "model"}),))

    for place in recorded.places().values():
        begun = [*passes(events, place), len(events)]
        assert len(begun) > 2
        for one, other in pairwise(begun):
            assert any(e.what == "drop" and e.meets(place) for e in events[one:other])


def test_what_will_be_read_again_stays_as_far_as_there_is_room(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model too large for the cache, the first reading leaves what fits."""
    room = 3 * 2 * SIZE
    monkeypatch.setenv(page_cache.VARIABLE, f"{room}B")

    events = recorded.run("ties")

    places = recorded.places()
    begins = [n for key, place in places.items() for n in passes(events, place)]
    first = events[: sorted(begins)[3 * len(NAMES)]]
    drops = [event for event in first if event.what == "drop"]
    gone = {key for key, place in places.items() if any(place.meets(each) for each in drops)}
    assert gone == {(file, name) for file in INPUTS for name in sorted(NAMES)[2:]}
    assert_all_dropped(events, places)


def test_small_merges_advise_nothing(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they slowed by a thread that writes; the bytes are the same either way."""
    monkeypatch.delenv(page_cache.VARIABLE, raising=False)
    monkeypatch.setattr(page_cache, "LITTLE", 0)
    monkeypatch.setattr(page_cache, "available", lambda: 2 * (3 * 4 * SIZE + 5 * SIZE))
    events = recorded.run("ties")
    small = (recorded.folder / "out.safetensors").read_bytes()
    assert {event.what for event in events} == {"read"}
    assert {event.what for event in recorded.events} == {"read"}

    monkeypatch.setattr(page_cache, "available", lambda: 2 * 3 * 4 * SIZE)
    assert {event.what for event in recorded.run("ties")} == {"read", "ask", "drop"}
    assert (recorded.folder / "out.safetensors").read_bytes() == small
    # Where nobody knows how much memory there is.
    monkeypatch.setattr(page_cache, "available", lambda: None)
    assert {event.what for event in recorded.run("ties")} == {"read"}


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with what was expected; half of what is available is the default."""
    for text in ("some", "-1", "1 potato"):
        monkeypatch.setenv(page_cache.VARIABLE, text)
        with pytest.raises(ParameterError, match=r"MERGEBENCH_PAGE_CACHE.*auto or a size"):
            page_cache.limit()
    monkeypatch.setattr(page_cache, "available", lambda: 1000)
    for text in ("", "auto"):
        monkeypatch.setenv(page_cache.VARIABLE, text)
        assert page_cache.limit() == 500
    monkeypatch.setenv(page_cache.VARIABLE, "3kB")
    assert page_cache.limit() == 3000


@dataclass(eq=False)
class Tape:
    """A store that notes what it is told."""

    path: Path = Path("tape")
    far: bool = False
    told: list[tuple[str, int, int]] = field(default_factory=list)

    def read_at(self, view: memoryview, offset: int) -> int:
        return len(view)

    def advise(self, offset: int, length: int, advice: str) -> None:
        self.told.append((advice, offset, offset + length))

    def tensor(self, offset: int, entries: int) -> FileTensor:
        return FileTensor("t", "U8", (entries,), offset, self)


def go_over(policy: Ahead, step: Step, job: int) -> None:
    """Read a tensor for the last time."""
    for start in range(0, step.size, job):
        policy.comes(step.name, min(start + job, step.size))
        policy.read(step.name, start, min(start + job, step.size), last=True)
    policy.finished(step.name)


def test_everything_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window beyond what is read; not what is being read already."""
    monkeypatch.setattr(ahead, "WINDOW", 30)
    monkeypatch.setattr(ahead, "PIECE", 10)
    tape = Tape()
    steps = [Step(f"t{n}", 1000, (tape.tensor(n * 1000, 1000),)) for n in range(3)]
    policy = Ahead(steps, 0)

    policy.comes("t0", 10)
    assert tape.told == [("willneed", at, at + 10) for at in (10, 20, 30)]
    for step in steps:
        go_over(policy, step, 10)
    asked = [(start, stop) for what, start, stop in tape.told if what == "willneed"]
    assert asked == [(at, at + 10) for at in range(10, 3000, 10)]


def test_what_comes_over_a_network_is_always_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by small merges, which leave the files beside it alone."""
    monkeypatch.setattr(ahead, "WINDOW", 60)
    monkeypatch.setattr(ahead, "PIECE", 20)
    monkeypatch.setattr(ahead, "STEP", 1)
    remote, here = Tape(far=True), Tape()
    step = Step("t", 100, (remote.tensor(0, 100), here.tensor(0, 100)))

    with Ahead([step]) as policy:
        go_over(policy, step, 10)

    assert here.told == []
    asked = sorted(each[1:] for each in remote.told if each[0] == "willneed")
    assert asked == [(at, at + 10) for at in range(10, 100, 10)] or asked[0][0] == 0
    assert {at for start, stop in asked for at in range(start, stop)} >= set(range(10, 100))
    assert remote.told[-1][0] == "dontneed"
    first = next(n for n, each in enumerate(remote.told) if each[0] == "dontneed")
    assert remote.told[first] == ("dontneed", 0, 10)


def test_what_several_tensors_are_made_from_stays_until_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as the layers of a stack that repeats them."""
    monkeypatch.setattr(ahead, "STEP", 1)
    tape = Tape()
    shared, other = tape.tensor(0, 100), tape.tensor(100, 50)
    twice = (shared, tape.tensor(0, 100))
    steps = [Step("a", 100, twice), Step("b", 50, (other,)), Step("c", 100, twice)]

    with Ahead(steps, 0) as policy:
        go_over(policy, steps[0], 10)
        assert not [each for each in tape.told if each[0] == "dontneed"]
        go_over(policy, steps[1], 10)
        assert all(start >= 100 for what, start, _ in tape.told if what == "dontneed")
        go_over(policy, steps[2], 10)
    assert ("dontneed", 0, 100) in tape.told


def test_factors_are_let_go_with_their_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read as a whole, before it."""
    monkeypatch.setattr(ahead, "STEP", 1)
    tape = Tape()
    step = Step("t", 10, (), (tape.tensor(40, 7), ArrayTensor(np.zeros(3))))

    with Ahead([step], 0) as policy:
        go_over(policy, step, 10)

    assert tape.told == [("dontneed", 40, 47)]


def test_tensors_that_do_not_tell_where_they_lie() -> None:
    """Those in memory; nothing is asked for, and nothing goes wrong."""
    tensor = ArrayTensor(np.zeros(5))
    assert list(extents(tensor, 0, 5)) == []
    step = Step("t", 5, (tensor,))
    with Ahead([step], 0) as policy:
        go_over(policy, step, 2)
        policy.comes("another", 1)
        policy.read("another", 0, 1, last=True)
        policy.finished("another")
    assert Extent(Tape(), 3, 4).end == 7


def test_each_reading_of_the_same_bytes_lets_go_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came in again goes again, whatever went before."""
    monkeypatch.setattr(ahead, "STEP", 30)
    tape = Tape()
    steps = [Step("t", 100, (tape.tensor(0, 100),))]

    with Ahead(steps, 0) as policy:
        for _ in range(2):
            tape.told.clear()
            with policy.along(()):
                for start in range(0, 100, 10):
                    policy.read("t", start, start + 10, last=False)
            assert [each[2] for each in tape.told] == [30, 60, 90, 100]
        tape.told.clear()
        go_over(policy, steps[0], 10)
    assert [each[2] for each in tape.told if each[0] == "dontneed"] == [30, 60, 90, 100]
