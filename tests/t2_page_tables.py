"""Page tables: filling a range at once."""

from __future__ import annotations

from xipfs.mm.pte import PageTables


def test_filled_page_tables_hold_the_pte_at_every_page_and_nowhere_else() -> None:
    """The end of one leaf, a whole one, and the start of another."""
    tables = PageTables()
    start, end = (3 << 21) - 2 * 4096, (4 << 21) + 3 * 4096
    tables.fill(start, end, 7)
    found = list(tables.populated(0, 1 << 40))
    assert len(found) == 2 + 512 + 3
    assert {pte for _, pte in found} == {7}
    assert (found[0][0], found[-1][0]) == (start, end - 4096)
    tables.fill(start, end, 0)
    assert list(tables.populated(0, 1 << 40)) == []
