"""Reads a compiled program's text: which collectives a step runs, how often, how large, along which mesh axes."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4} | {
    "f64": 8, "s64": 8, "u64": 8
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, as each device runs it in one execution of the program.

    `shape` and `bytes` are of the whole: what all-gather gives, what reduce-scatter takes. A combined instruction
    carries several arrays; `shapes` has them all.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ
    devices: int  # of a group
    count: int  # executions: 1, times the trips of the loops around it
    source: str  # the operation of the program that it was made for
    is_async: bool  # whether other work may go on meanwhile

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all executions, by a ring: (n - 1) / n of the whole, twice for all-reduce."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.count)
        share = (self.devices - 1) / self.devices
        return self.bytes * self.count * share * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`), which was made for a mesh of these axis sizes.

    Conditionals count with all their branches. Raises ValueError where a loop around a collective has no known count.
    """
    bodies = _computations(text)
    found = []
    for name, executions in _executions(text, bodies).items():
        for line in bodies[name]:
            if match := _INSTRUCTION.match(line):
                if executions is None:
                    raise ValueError(f"{name} is in a loop whose number of trips the program does not tell: {line}")
                found.append(_collective(line, match, executions, mesh))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _HEAD.match(line):
            lines = bodies.setdefault(match[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _executions(text: str, bodies: dict[str, list[str]]) -> dict[str, int | None]:
    """How often each computation runs in one execution of the program; None: unknown."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry is not None, "no ENTRY in the program"
    counts: dict[str, int | None] = {entry[1]: 1}
    for name in _callers_first(entry[1], bodies):
        own = counts[name]
        for callee, trips in _calls(bodies[name]):
            if callee in bodies:
                before = counts.get(callee, 0)
                unknown = own is None or trips is None or before is None
                counts[callee] = None if unknown else before + own * trips  # type: ignore[operator]
    return counts


def _callers_first(entry: str, bodies: dict[str, list[str]]) -> list[str]:
    """Computations that are reached, each after all that call it."""
    order: list[str] = []
    done: set[str] = set()
    stack: list[tuple[str, bool]] = [(entry, False)]
    while stack:
        name, left = stack.pop()
        if left:
            order.append(name)
        elif name not in done:
            done.add(name)
            stack.append((name, True))
            stack.extend((callee, False) for callee, _ in _calls(bodies[name]) if callee in bodies)
    return order[::-1]


def _calls(lines: list[str]) -> Iterator[tuple[str, int | None]]:
    for line in lines:
        is_loop = " while(" in line
        trips = _TRIPS.search(line) if is_loop else None
        for match in _CALLED.finditer(line):
            for callee in (match[1] or match[2]).split(","):
                yield callee.strip().lstrip("%"), int(trips[1]) if trips else (None if is_loop else 1)


def _collective(line: str, match: re.Match[str], executions: int, mesh: Mapping[str, int]) -> Collective:
    kind = match[2]
    arrays = _ARRAY.findall(_result(match[1], kind) if match[3] else match[1])
    shapes = tuple(tuple(map(int, sizes.split(","))) if sizes else () for _, sizes in arrays)
    group = _group(line, mesh)
    size = sum(_BYTES[dtype] * math.prod(shape) for (dtype, _), shape in zip(arrays, shapes, strict=True))
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind=kind,
        dtype=arrays[0][0],
        shapes=shapes,
        bytes=size * (len(group) if kind == "reduce-scatter" else 1),
        axes=_axes(group, mesh),
        devices=len(group),
        count=executions,
        source=source[1] if source else "",
        is_async=match[3] is not None and '"is_sync":true' not in line,
    )


def _result(kind_of_start: str, kind: str) -> str:
    """Of the type of a started collective, (operands, results, contexts): the results."""
    depth, parts, begin = 0, [], 1
    for place, letter in enumerate(kind_of_start):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(kind_of_start[begin:place])
            begin = place + 1
    if kind == "all-reduce" and len(parts) != 2:  # one operand is written bare, and so are several
        return kind_of_start
    return parts[1] if len(parts) > 1 else kind_of_start


def _group(line: str, mesh: Mapping[str, int]) -> list[int]:
    """The devices of the group that holds most, by number."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return [int(number) for number in re.findall(r"\d+", pairs[1])[:2]]
    if named := re.search(r"replica_groups=mesh\[[^\]]*\](?:, ?device_ids=\S+)? ?\{([^}]*)\}", line):
        return _members(re.findall(r"'(\w+)'", named[1]), mesh)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        numbers = np.arange(int(iota[1]) * int(iota[2])).reshape([int(size) for size in iota[3].split(",")])
        if iota[4]:
            numbers = numbers.transpose([int(axis) for axis in iota[4].split(",")])
        return numbers.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    listed = re.search(r"replica_groups=\{(\{[\d,]+\})", line)
    return [int(number) for number in listed[1][1:-1].split(",")] if listed else list(range(math.prod(mesh.values())))


def _members(axes: list[str], mesh: Mapping[str, int]) -> list[int]:
    numbers = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    return numbers[tuple(slice(None) if axis in axes else 0 for axis in mesh)].reshape(-1).tolist()


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    places = np.asarray(np.unravel_index(group, list(mesh.values())))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)
