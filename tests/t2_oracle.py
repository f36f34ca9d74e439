"""The model against what two real kernels did; and that a wrong model or record is noticed."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xipfs.mm import audit, rmap, wp, zap
from xipfs.mm.oracle.command_file import CommandFile, FormatError, read_command_file
from xipfs.mm.oracle.replay import Replay, check_file
from xipfs.mm.rules import ERAS, Rules

ORACLE = Path(__file__).parent / "oracle"
FILES = sorted(ORACLE.glob("*.jsonl"))


def read(name: str) -> CommandFile:
    return read_command_file(ORACLE / f"{name}.jsonl")


def test_the_recordings_are_all_here() -> None:
    assert len(FILES) == 71
    assert sum(len(read_command_file(path).steps) for path in FILES) == 1210


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_model_agrees_with_the_recording(path: Path) -> None:
    assert check_file(read_command_file(path)).differences == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_invariants_hold_after_every_step(path: Path) -> None:
    replay = Replay(read_command_file(path))
    ran = 0
    for done in replay.steps():
        assert not done.stopped
        if done.outcome.get("result") == "BUG":
            break
        audit.check(replay.bench.machine, holders=replay.bench.holders())
        ran += 1
    assert ran or path.stem.startswith("bug-insert-page-in-pfnmap")


#: A rule broken by one field of the kernel's row, and a recording in which that shows.
BROKEN_FIELDS = [
    ("G2", {"gup_raw": "EFAULT"}, "mix-gup-xip.x86-64"),
    ("F13", {"raw_shared_write": "reuse"}, "mix-shared-mkwrite.um"),
    ("F13 seed", {"raw_shared_write": "cow"}, "mix-shared-mkwrite.x86-64"),
    ("K1", {"fork_copies_mixed": False}, "insert-page-at-mmap-shared.x86-64"),
    ("K9", {"mprotect_upgrades_anon": False}, "mix-mprotect.um"),
    ("K20", {"mixed_is_special": False}, "mix-mlock.x86-64"),
    ("G4", {"gup_zero_page": False}, "mix-gup-zero.x86-64"),
    ("G5", {"pin_bias": False}, "mix-gup-page.um"),
    ("F22", {"fault_around": False}, "cramfs-mixed-8p-at0-private-r.x86-64"),
    ("I11", {"mixed_without_flag": "SIGBUS"}, "bug-insert-mixed-without-mixed.um"),
    ("I22", {"no_handler": "anonymous"}, "insert-page-at-mmap-shared.x86-64"),
    ("I1", {"remap_sets_dontexpand": False}, "pfn-linear-shared.um"),
    ("N10", {"mixed_zero_is_raw": True}, "mix-gup-zero.um"),
    ("H8", {"dax": "mixed"}, "fsdax-private.x86-64"),
    ("K11", {"mremap_private_dup": "ok"}, "mix-mremap.um"),
]


@pytest.mark.parametrize(
    ("rule", "fields", "name"), BROKEN_FIELDS, ids=[b[0] for b in BROKEN_FIELDS]
)
def test_a_broken_rule_is_noticed(rule: str, fields: dict[str, Any], name: str) -> None:
    file = read(name)
    kernel = dataclasses.replace(ERAS["6.1"], **fields)
    rules = Rules(pte_special=file.header["pte_special"], kernel=kernel)
    assert check_file(file, rules).differing_steps > 0


def _young_copies(_vmf: object) -> bool:
    return False


def test_breaking_the_double_fault_of_old_raw_pages_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wp, "copying_touches", _young_copies)
    different = [d.field for d in check_file(read("mix-fork.x86-64")).differences]
    assert different == ["minflt"]


def test_counting_raw_ptes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raw_add(mm: Any) -> None:
        mm.raw_ptes += 1
        mm.rss[0] += 1
        mm.machine.nr_special_ptes += 1

    assert rmap.raw_add is not raw_add
    monkeypatch.setattr("xipfs.mm.insert.raw_add", raw_add)
    fields = {d.field for d in check_file(read("mix-prepop-read.um")).differences}
    assert "rss_file_pages" in fields


def test_sparing_raw_ptes_when_private_copies_are_kept_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zap, "zap_page_range", lambda *_args, **_kw: 0)
    assert check_file(read("mix-migrate.x86-64")).differing_steps > 0


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every recorded leaf with the keys that lead to it."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list) and path[-1] != "flags":
        for number, below in enumerate(value):
            yield from leaves(below, (*path, number))
    else:
        yield path, value


def corrupt(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if value is None:
        return "anon"
    if isinstance(value, list):
        return [*value, "ht"]
    return value + "9" if value[-1:].isdigit() else value + "x"


#: What is no statement about the kernel but an address of one.
ADDRESSES = {"map", "index"}


def one_of_each_field() -> list[tuple[str, int, tuple[Any, ...]]]:
    """Return, for each field name of the vocabulary, one place in the recordings."""
    places: dict[str, tuple[str, int, tuple[Any, ...]]] = {}
    for path in FILES:
        for step in read_command_file(path).steps:
            for keys, _ in leaves(step.observed):
                names = [key for key in keys if isinstance(key, str)]
                if names[-1] not in ADDRESSES:
                    places.setdefault(".".join(names), (path.stem, step.number, keys))
    return list(places.values())


PLACES = one_of_each_field()


def test_the_vocabulary_of_fields() -> None:
    assert len(PLACES) == 47


@pytest.mark.parametrize(
    ("name", "number", "keys"), PLACES, ids=[".".join(map(str, place[2])) for place in PLACES]
)
def test_a_corrupted_field_is_noticed(name: str, number: int, keys: tuple[Any, ...]) -> None:
    file = read(name)
    observed = copy.deepcopy(file.steps[number].observed)
    holder = observed
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = corrupt(holder[keys[-1]])
    steps = list(file.steps)
    steps[number] = dataclasses.replace(steps[number], observed=observed)
    result = check_file(dataclasses.replace(file, steps=steps))
    assert number in {difference.step for difference in result.differences}


def changed(tmp_path: Path, name: str, line: int, **changes: Any) -> Path:
    """Copy a recording with fields of one line replaced (None: taken out)."""
    lines = (ORACLE / f"{name}.jsonl").read_text().splitlines()
    value = json.loads(lines[line])
    for key, replacement in changes.items():
        if replacement is None:
            del value[key]
        else:
            value[key] = replacement
    lines[line] = json.dumps(value)
    path = tmp_path / "changed.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_unknown_operation_differs_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = changed(tmp_path, "mix-fork.um", 3, op={"name": "teleport"})
    result = check_file(read_command_file(path))
    assert [d.model for d in result.differences if d.step == 2] == [
        "unknown operation 'teleport' (this step only)"
    ]
    assert result.steps == 25


def test_an_unknown_observed_field_differs(tmp_path: Path) -> None:
    path = changed(tmp_path, "mix-fork.um", 12, observed={"colour": "blue"})
    (difference,) = check_file(read_command_file(path)).differences
    assert (difference.step, difference.field, difference.model) == (11, "colour", "(no answer)")


def test_an_unknown_kind_of_object_differs(tmp_path: Path) -> None:
    objects = {"dev": {"kind": "tape", "pages": 12}}
    path = changed(tmp_path, "bug-control.um", 0, objects=objects)
    result = check_file(read_command_file(path))
    assert result.differing_steps == result.steps == 2


MALFORMED = [
    (0, {"oracle": 2}, "changed.jsonl:1: field oracle: 2; expected 1"),
    (0, {"processes": None}, "changed.jsonl:1: field processes: missing; expected a list of texts"),
    (0, {"frames": {"x": {}}}, "changed.jsonl:1: field frames.x: name; expected region:number"),
    (2, {"who": "ghost"}, "changed.jsonl:3: field who: 'ghost'; expected one of the header's"),
    (2, {"op": {"map": "m"}}, "changed.jsonl:3: field op.name: missing; expected a text"),
    (
        2,
        {"op": {"name": "read", "map": "m", "page": -1, "offset": 0, "bytes": 1}},
        "changed.jsonl:3: field op.page: -1; expected an integer of at least 0",
    ),
    (2, {"op": {"name": "fork"}}, "changed.jsonl:3: field op.child: missing; expected a text"),
    (2, {"step": 7}, "changed.jsonl:3: field step: 7; expected 1"),
]


@pytest.mark.parametrize(("line", "changes", "message"), MALFORMED, ids=[m[2] for m in MALFORMED])
def test_malformed_lines_are_named(
    tmp_path: Path, line: int, changes: dict[str, Any], message: str
) -> None:
    path = changed(tmp_path, "mix-fork.um", line, **changes)
    with pytest.raises(FormatError) as caught:
        read_command_file(path)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text((ORACLE / "bug-control.um.jsonl").read_text() + '{"op": {"na')
    with pytest.raises(FormatError, match=r"cut\.jsonl:4: field \(line\): not JSON"):
        read_command_file(path)
