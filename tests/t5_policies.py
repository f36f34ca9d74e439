"""Policies under real programs' faults: what a policy hears under tracefs, and what then moves."""

from __future__ import annotations

import json
import mmap

from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs

pytestmark = [needs("root", "fuse", "tracefs")]

N = 31
NOISE = bytes(range(256)) * (PAGE // 256)


def cold(live: Mounts, pages: int, *options: str) -> LiveMount:
    """Return a mount with a file that the kernel has no page of."""
    mount = live.mount()
    (mount / "file").write_bytes(NOISE * pages)
    return live.remount(mount, "observe=tracefs", *options)


def by_cause(mount: LiveMount, policy: str, to: str) -> dict[str, int]:
    """Return the counts of what ``policy`` moved to ``to``, over all reasons."""
    rows = mount.cat_stats()["migration"]["by_cause"]
    chosen = [row for row in rows if (row["policy"], row["to"]) == (policy, to)]
    names = ("promoted", "demoted", "failed", "refaults", "pingpong")
    return {name: sum(row[name] for row in chosen) for name in names}


def promoted(mount: LiveMount) -> int:
    return by_cause(mount, "tpp", "pagecache")["promoted"]


def at_rest(mount: LiveMount) -> bool:
    """Return whether all moves that were planned for the faults so far have been carried out."""
    migration = mount.cat_stats()["migration"]
    rows = migration["by_cause"]
    ended = sum(row["promoted"] + row["demoted"] + row["failed"] for row in rows)
    return bool(migration["planned"] == ended)


def test_tpp_learns_from_hint_faults_which_mapped_pages_are_used(live: Mounts) -> None:
    """Of 31 mapped pages 7 are touched again and again, and only they earn RAM."""
    mount = cold(live, N, "hint=2000", "policy=tpp,window_ms=60000")
    with (
        open(mount / "file", "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):

        def touch(pages: int) -> bool:
            return all(mapped[page * PAGE + 9] == 9 for page in range(pages))

        assert touch(N)
        # A touch between a move's two invalidations would be one fault more.
        wait_until(
            "the hot pages' promotion",
            lambda: at_rest(mount) and touch(7) and promoted(mount) >= 7,
        )
        assert touch(7)
        assert mount.letters("file") == "P" * 7 + "X" * (N - 7)
        wait_until("their refaults", lambda: by_cause(mount, "tpp", "pagecache")["refaults"] == 7)
    stats = mount.cat_stats()
    assert stats["vmstat"]["pgfault_hint"] >= 7
    # 31 first touches and the first one of each promoted page: hint faults are in no other total.
    assert stats["vmstat"]["pgfault"] == N + 7


def test_clock_demotes_what_its_hand_finds_untouched(live: Mounts) -> None:
    """Twice as many pages as RAM has frames are read through a mapping; nothing is lost."""
    mount = cold(live, 64, "ram=128K", "policy=clock,high=75,low=50,stay_ms=0")
    with (
        open(mount / "file", "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        for page in range(64):
            assert mapped[page * PAGE : (page + 1) * PAGE] == NOISE
            mount.vmstat()  # a drain: what was planned moves meanwhile
        wait_until("a demotion", lambda: by_cause(mount, "clock", "xip")["demoted"] > 0)
        assert mapped[:] == NOISE * 64
        moved = by_cause(mount, "clock", "pagecache")
        assert moved["promoted"] > 32
        assert mount.vmstat()["nr_resident_pages"] <= 32
        verified = xipfs("verify", mount.directory, "--json")  # ends with 1 if anything differs
        assert json.loads(verified.stdout)["pages_compared"] > 0
    reasons = {row["reason"] for row in mount.cat_stats()["migration"]["by_cause"]}
    assert reasons == {"first touch", "RAM above 75 %, not touched since the hand passed"}


def test_a_dry_policy_counts_a_load_once(live: Mounts) -> None:
    """The READ and the fault of a load are one touch; it earned the promotion, and saves none."""
    mount = cold(live, 16, "readahead=0", "policy=clock,dry,medium=pcm")
    with (
        open(mount / "file", "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert all(mapped[page * PAGE + 9] == 9 for page in range(16))
    dry = mount.cat_stats()["migration"]["dry_run"]
    assert (dry["promoted"], dry["reads_in_ram"], dry["writes_in_ram"]) == (16, 0, 0)
    assert dry["saved"]["ns_estimated"] == 0


def test_write_hot_counts_a_store_and_its_write_back_once(live: Mounts) -> None:
    """After msync the page is clean and mapped read-only: the next store faults again."""
    mount = cold(live, N, "policy=write-hot")
    with open(mount / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for page in range(N):
            mapped[page * PAGE] = 1
            mapped.flush(page * PAGE, PAGE)
        assert mount.cat_stats()["migration"]["asked"] == 0
        for page in range(7):
            mapped[page * PAGE] = 2
            mapped.flush(page * PAGE, PAGE)
        wait_until("7 are promoted", lambda: mount.letters("file") == "P" * 7 + "X" * (N - 7))
