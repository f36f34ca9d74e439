"""Every rule that code, tests and texts cite is in xipfs/mm/RULES.md: once, with its source.

A rule is cited as ``F22`` or in a range, ``T1 to T9`` or ``R1-R15``; a fact of the observer as
``fact 7``; a section as ``section 4``. Of Python only comments and strings are read, so no name of
a function or a constant is taken for a rule, and a rule's letter is one of RULES.md's sections.
What is still no rule stands in ``NO_RULES``.
"""

from __future__ import annotations

import functools
import io
import re
import tokenize
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
RULES: Final = ROOT / "xipfs" / "mm" / "RULES.md"
CITING: Final = ("xipfs/**/*.py", "xipfs/**/*.md", "README.md", "tests/**/*.py", "tools/**/*.py")
LETTERS: Final = "PNIFKGRHAT"

#: File and word to what the word is there, if it looks like a rule and is none.
NO_RULES: Final[dict[tuple[str, str], str]] = {
    ("tests/t0_rules.py", word): "an example of what is found"
    for word in ("F99", "H10", "fact 12", "fact 14", "section 11")
}

# Not after a letter, digit, "_", "+", "-" or a backslash: no part of a name, a formula, an option
# or an escape. What a range ends with is found with its start.
_RULE_RE: Final = re.compile(
    rf"(?<![\w+\\-])(?P<letter>[{LETTERS}])(?P<first>[1-9]\d?)"
    r"(?:(?P<part>a)|(?: to |-)(?P=letter)(?P<last>\d\d?))?(?![\w(])"
)
_FACTS_RE: Final = re.compile(r"\b[Ff]acts? (\d+(?:(?:, | and |, and )\d+)*)\b")
_SECTION_RE: Final = re.compile(r"\bsection (\d+)\b")
_ENTRY_RE: Final = re.compile(r"^- \*\*(Fact \d+|[A-Z]\d+a?)\*\* (.*(?:\n  .*)*)", re.MULTILINE)
_HEADING_RE: Final = re.compile(r"^## (\d+)\. ([A-Z]): ", re.MULTILINE)


def citations(text: str) -> set[str]:
    """Return what a text cites: rules by letter and number, ``fact N``, ``section N``."""
    text = re.sub(r"\s*\n\s*(?:#:? ?)?", " ", text)
    found: set[str] = set()
    for match in _RULE_RE.finditer(text):
        letter, first = match["letter"], int(match["first"])
        numbers = range(first, int(match["last"] or first) + 1)
        found |= {f"{letter}{number}{match['part'] or ''}" for number in numbers}
    for match in _FACTS_RE.finditer(text):
        found |= {f"fact {number}" for number in re.findall(r"\d+", match[1])}
    return found | {f"section {match[1]}" for match in _SECTION_RE.finditer(text)}


def prose(path: Path) -> str:
    """Return what is meant to be read: of a Python file the comments and strings."""
    text = path.read_text()
    if path.suffix != ".py" or not citations(text):
        return text
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    return "\n".join(token.string for token in tokens if token.type in kinds)


@functools.cache
def cited() -> tuple[tuple[str, str], ...]:
    """Return each file, named from the root, with each thing it cites."""
    found = []
    for pattern in CITING:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            found += [(name, what) for what in sorted(citations(prose(path)))]
    return tuple(each for each in found if each not in NO_RULES)


def known(rules: str) -> set[str]:
    """Return everything in RULES.md's text that may be cited."""
    entries = {number.replace("Fact", "fact") for number, _ in _ENTRY_RE.findall(rules)}
    return entries | {f"section {number}" for number, _ in _HEADING_RE.findall(rules)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("as rule F22 has it (K7)", {"F22", "K7"}),
        ("rules N9, N12 and F16a.", {"N9", "N12", "F16a"}),
        ("(T9 to T11)", {"T9", "T10", "T11"}),
        ("steps (rules R14-R15; each", {"R14", "R15"}),
        ("# I15 to\n    #: I17", {"I15", "I16", "I17"}),
        ("'P7, T1; K1 to K2'", {"P7", "T1", "K1", "K2"}),
        ("F99 is cited as any other", {"F99"}),
        ("I4's and K5's failure", {"I4", "K5"}),
        ("(fact 3 as measured), facts 12 and 14", {"fact 3", "fact 12", "fact 14"}),
        ("section 4; section 11's table", {"section 4", "section 11"}),
        ("0xF1 \\xA1 U+A10 B+M-1 B+T1 -O1 -F2 M2 O8 XP1 T1_x t3_rules.py 6.1 2.6.32 P0", set()),
        ("F1(x) 4K4 HTTP2 sha256 P100 in fact, some", set()),
    ],
)
def test_what_is_a_citation(text: str, found: set[str]) -> None:
    assert citations(text) == found


def test_of_python_only_comments_and_strings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""Rule F3."""\nA8 = K1 = f"T{2} H10"  # rule N4\n\n\ndef G5() -> int: ...\n')
    assert citations(prose(path)) == {"F3", "H10", "N4"}


def test_what_is_cited_has_an_entry() -> None:
    rules = known(RULES.read_text())
    missing = [f"{name}: {what}" for name, what in cited() if what not in rules]
    assert not missing, "\n".join(missing)


def test_citations_are_found_where_they_are() -> None:
    """So that a finder that finds nothing does not pass."""
    found = Counter(name for name, _ in cited())
    for name in ("xipfs/mm/rules.py", "xipfs/mm/oracle/cited.py", "xipfs/DESIGN.md"):
        assert found[name] > 20, name
    cites = set(cited())
    assert ("xipfs/fuse/migration.py", "R15") in cites
    assert ("xipfs/trace/pids.py", "fact 7") in cites
    assert ("xipfs/mm/gup.py", "section 6") in cites


def test_an_entry_that_is_taken_out_is_missed() -> None:
    rules = RULES.read_text()
    cites = {what for _, what in cited() if not what.startswith("section")}
    for match in _ENTRY_RE.finditer(rules):
        left = rules[: match.start()] + rules[match.end() :]
        number = match[1].replace("Fact", "fact")
        assert cites - known(left) == {number} & cites, number


def test_no_number_is_entered_twice_or_left_out() -> None:
    entered = [number for number, _ in _ENTRY_RE.findall(RULES.read_text())]
    assert [number for number, count in Counter(entered).items() if count > 1] == []
    for letter in LETTERS:
        numbers = [int(each[1:]) for each in entered if re.fullmatch(rf"{letter}\d+", each)]
        assert numbers == list(range(1, len(numbers) + 1)), letter


def test_each_letter_has_a_section_with_its_rules() -> None:
    parts = re.split(r"^## ", RULES.read_text(), flags=re.MULTILINE)[1:]
    headings = [_HEADING_RE.match(f"## {part}") for part in parts]
    assert [match[2] for match in headings if match] == list(LETTERS)
    assert [int(match[1]) for match in headings if match] == list(range(1, len(LETTERS) + 1))
    for part, heading in zip(parts, headings, strict=True):
        letter = heading[2] if heading else "F"
        assert {number[0] for number, _ in _ENTRY_RE.findall(part)} == {letter}, part[:40]


def test_each_entry_ends_with_sources_that_are_in_the_list() -> None:
    text = RULES.read_text()
    listed = text.split("**Source keys**")[1].split("\n## ")[0]
    keys = set(re.findall(r"`([^`]+)`", listed))
    assert len(keys) > 20
    for number, entry in _ENTRY_RE.findall(text):
        ends = re.search(r" \[([^\[\]]+)\]$", re.sub(r"\s+", " ", entry))
        assert ends, f"{number} ends without a source in brackets"
        for source in ends[1].split("; "):
            first = re.split(r",? ", source)[0]
            assert first in keys, f"{number}: {source!r} begins with no key of the list"


def test_recordings_that_are_named_exist() -> None:
    recordings = [path.name for path in (ROOT / "tests" / "oracle").glob("*.jsonl")]
    for number, entry in _ENTRY_RE.findall(RULES.read_text()):
        for named in re.findall(r"(?:\[|; )recorded ([^;\]]+)", re.sub(r"\s+", " ", entry)):
            for name in named.split(", "):
                assert any(each.startswith(f"{name}.") for each in recordings), (number, name)


def test_lines_are_not_too_long() -> None:
    assert [line for line in RULES.read_text().splitlines() if len(line) > 120] == []
