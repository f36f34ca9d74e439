"""``xipfs run``: what real programs did on a mount, with and without exact mode, written out.

Each file has 31 pages, a prime number.
The files are warm: all their pages are in the kernel's page cache, so fault-around maps up to 16 of
them with one fault, and the kernel's own count (getrusage) tells how many faults that made.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, PAGE, LiveMount, Mounts, xipfs
from t5_accounting import fill

from xipfs.cli.preloading import compiler
from xipfs.fs.types import PageKind
from xipfs.trace import uffd

pytestmark = [
    needs("root", "fuse", "tracefs"),
    pytest.mark.skipif(bool(uffd.unusable()), reason=f"no exact mode here: {uffd.unusable()}"),
]

NONE = {"before_library": 0, "shared_read_only": 0, "past_library": 0, "without_library": 0}

#: Closes every descriptor in four ways, then maps argv[1] with mmap, mremap or a raw system call.
STUBBORN = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int count, char **words)
{
	volatile char sink;
	for (int i = 3; i < 1024; i++)
		close(i);
	close_range(3, ~0U, 0);
	closefrom(3);
	for (int i = 3; i < 1024; i++)
		dup2(0, i);
	closefrom(3);
	int file = open(words[1], O_RDONLY);
	if (file != 3)
		return 1;
	char *base = !strcmp(words[2], "raw")
		? (char *)syscall(SYS_mmap, 0, 31 * 4096, PROT_READ, MAP_PRIVATE, file, 0)
		: mmap(0, 31 * 4096, PROT_READ, MAP_PRIVATE, file, 0);
	if (!strcmp(words[2], "mremap"))
		base = mremap(base, 31 * 4096, 62 * 4096, MREMAP_MAYMOVE);
	for (int i = 0; i < 31; i++)
		sink = base[i * 4096];
	return base == MAP_FAILED;
}
"""


#: Loads argv[1] and prints how many faults reading 200 pages of its constants makes.
OPENER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <sys/resource.h>
int main(int count, char **words)
{
	struct rusage before, after;
	volatile char sink;
	void *library = dlopen(words[1], RTLD_NOW);
	if (!library)
		return fprintf(stderr, "%s\n", dlerror()), 1;
	const char *big = dlsym(library, "big");
	printf("");
	getrusage(RUSAGE_SELF, &before);
	getrusage(RUSAGE_SELF, &before);
	for (int page = 50; page < 250; page++)
		sink = big[page * 4096];
	getrusage(RUSAGE_SELF, &after);
	printf("%ld\n", after.ru_minflt - before.ru_minflt);
	return 0;
}
"""


@pytest.fixture(scope="module")
def mounted(shared: Mounts) -> LiveMount:
    image = shared.image()
    fill(image, {"warm": PageKind.XIP, "cached": PageKind.PAGECACHE, "other": PageKind.XIP})
    # allow_other: a set-id program is another user to FUSE.
    mount = shared.mount(image, "observe=tracefs", "allow_other")
    for path in mount.directory.iterdir():
        path.read_bytes()
    return mount


def run(mount: LiveMount, *words: str | Path, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a program; return the report, with what it wrote as ``stdout``.

    A string of ``words`` is several.
    """
    report = mount.directory.with_name("report.json")
    command = [word for part in words for word in str(part).split()]
    done = xipfs(
        "run", "--mount", mount.directory, "--json", "--report", report, *options, "--", *command
    )
    told: dict[str, Any] = json.loads(report.read_text())
    assert told["events_lost"] == 0
    return told | {"stdout": done.stdout}


def exactly(mount: LiveMount, *words: str | Path) -> dict[str, Any]:
    return run(mount, *words, options=("--exact",))


def pages(told: dict[str, Any]) -> tuple[int, int]:
    return told["pages_own_fault"], told["pages_around"]


def build(directory: Path, source: str, *flags: str) -> Path:
    program = compiler()
    assert program is not None
    (directory / "program.c").write_text(source)
    made = directory / "program"
    command = [program, "-O1", "-w", *flags, "-o", str(made), str(directory / "program.c")]
    subprocess.run(command, check=True, timeout=60)
    return made


@pytest.mark.parametrize("what", ["warm private r", "cached private rw"])
def test_each_page_makes_one_fault_in_exact_mode_only(
    mounted: LiveMount, touch: Path, tmp_path: Path, what: str
) -> None:
    (tmp_path / "warm").write_bytes(bytes(4 * PAGE))
    warm_up = f"map {tmp_path / 'warm'} private rw read 0-1 write 2 mark warm mark warm"
    words = f"{warm_up} map {mounted.directory}/{what} mark a read 0-30 mark b"
    told = run(mounted, touch, words)
    minor = int(told["stdout"].split("minflt=")[-1].split()[0])
    assert (2 <= minor <= 3, pages(told)) == (True, (minor, 31 - minor))
    assert "inexact" not in told
    told = exactly(mounted, touch, words)
    assert told["stdout"].splitlines()[-1] == "b minflt=31 majflt=0"
    assert (told["faults"], pages(told), told["inexact"]) == (31, (31, 0), NONE)
    assert (told["programs"], told["programs_registered"], told["exit_status"]) == (1, 1, 0)


def test_writes_and_populate_are_exact_too(mounted: LiveMount, touch: Path) -> None:
    told = exactly(mounted, touch, "map", mounted / "warm", "private rw read 0 write 0-30")
    assert (told["faults"], pages(told), told["inexact"]) == (32, (31, 0), NONE)
    told = exactly(mounted, touch, "map", mounted / "warm", "private r populate read 0-30")
    assert (told["faults"], pages(told), told["inexact"]) == (31, (31, 0), NONE)


def test_children_register_again(mounted: LiveMount, touch: Path) -> None:
    words = "private r read 0-9 fork { read 0-30 fork { read 0-4 } }"
    told = exactly(mounted, touch, "map", mounted / "warm", words)
    assert (told["faults"], pages(told), told["inexact"]) == (46, (46, 0), NONE)
    assert (told["programs"], told["programs_registered"]) == (3, 3)
    assert told["programs_living"] == 0


def test_a_shell_and_what_it_runs(mounted: LiveMount, touch: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"{touch} map {mounted / 'warm'} private r read 0-30; (exit 3); exec {touch}")
    told = exactly(mounted, "sh", script)
    assert (told["faults"], pages(told), told["inexact"]) == (31, (31, 0), NONE)
    assert told["programs"] == told["programs_registered"] == 4


def test_shared_mappings_of_read_only_descriptors_are_inexact(
    mounted: LiveMount, touch: Path
) -> None:
    told = exactly(mounted, touch, "map", mounted / "warm", "shared r read 0-30")
    own, around = pages(told)
    assert (own + around, own <= 3) == (31, True)
    assert told["inexact"] == NONE | {"shared_read_only": around}
    told = exactly(mounted, touch, "map", mounted / "warm", "shared rw read 0-30")
    assert (pages(told), told["inexact"]) == ((31, 0), NONE)


def test_a_static_program_is_named(mounted: LiveMount, tmp_path: Path) -> None:
    source = (Path(__file__).parents[1] / "tools" / "touch.c").read_text()
    program = build(tmp_path, source, "-static", "-pthread")
    told = exactly(mounted, program, "map", mounted / "warm", "private r read 0-30")
    own, around = pages(told)
    assert (own + around, own <= 3) == (31, True)
    assert told["inexact"] == NONE | {"without_library": around}
    assert told["without_library"] == {"program": around}
    assert (told["programs"], told["programs_registered"]) == (1, 0)


def test_a_set_id_program_is_named(mounted: LiveMount, touch: Path, tmp_path: Path) -> None:
    """Set-gid here, which the loader treats as set-uid, and which can still read root's files."""
    program = tmp_path / "setid"
    program.write_bytes(touch.read_bytes())
    os.chown(program, 0, 65534)
    program.chmod(0o2755)
    told = exactly(mounted, program, "map", mounted / "warm", "private r read 0-30")
    own, around = pages(told)
    assert (own + around, own <= 3) == (31, True)
    assert told["without_library"] == {"setid": around}


def test_what_exec_and_the_loader_touch_is_counted(mounted: LiveMount, touch: Path) -> None:
    program = mounted / "program"
    program.write_bytes(Path("/bin/sh").read_bytes())
    program.chmod(0o755)
    program.read_bytes()
    script = f"{touch} map {mounted / 'warm'} private r read 0-30"
    (mounted.directory.with_name("script")).write_text(script)
    told = exactly(mounted, program, mounted.directory.with_name("script"))
    before = told["inexact"]["before_library"]
    assert before > 0
    assert told["inexact"] == NONE | {"before_library": before}
    assert pages(told)[0] >= 31
    program.unlink()


def test_closing_every_descriptor_does_not_end_it(mounted: LiveMount, tmp_path: Path) -> None:
    program = build(tmp_path, STUBBORN)
    for how in ("mmap", "mremap"):
        told = exactly(mounted, program, mounted / "warm", how)
        assert (how, pages(told), told["inexact"]) == (how, (31, 0), NONE)
    told = exactly(mounted, program, mounted / "warm", "raw")
    own, around = pages(told)
    assert (own + around, told["inexact"]) == (31, NONE | {"past_library": around})


def test_what_dlopen_loads_is_registered(mounted: LiveMount, tmp_path: Path) -> None:
    """1 MiB of constants, far from what the loader touches; found by path and by the caller's."""
    (tmp_path / "lib").mkdir()
    source = "__attribute__((aligned(4096))) const char big[1 << 20] = {1}; int here = 1;"
    build(tmp_path / "lib", source, "-shared", "-fPIC")
    library = mounted / "libbig.so"
    library.write_bytes((tmp_path / "lib" / "program").read_bytes())
    library.read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    by_path = build(tmp_path / "a", OPENER, "-ldl")
    by_name = build(tmp_path / "b", OPENER, "-ldl", f"-Wl,-rpath,{mounted.directory}")
    told = exactly(mounted, by_path, library)
    # The loader's own touches are few windows of 16; of the 200 pages read here all are faults.
    assert told["stdout"] == "200\n"
    assert told["pages_own_fault"] >= 200
    assert told["pages_around"] == told["inexact"]["past_library"] <= 32
    told = exactly(mounted, by_name, "libbig.so")
    assert told["stdout"] in ("13\n", "14\n"), "fault-around maps 16 pages with each"
    assert told["pages_around"] == told["inexact"]["past_library"] >= 180
    library.unlink()


def test_others_on_the_mount_are_not_counted(mounted: LiveMount, touch: Path) -> None:
    words = f"{touch} map {mounted / 'other'} private r read 0-30 pause".split()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        told = exactly(mounted, touch, "map", mounted / "warm", "private r read 0-4")
        assert other.communicate(b"\n", timeout=20)[0] == b"paused\n"
    assert (told["faults"], pages(told), told["programs"]) == (5, (5, 0), 1)


def test_a_recording_holds_the_run(mounted: LiveMount, touch: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.parquet"
    words = f"map {mounted / 'warm'} private r read 0-30"
    told = run(mounted, touch, words, options=("--exact", "-o", str(trace)))
    assert told["recorded"]["faults"] == 31
    assert told["recorded"]["faults_missed"] == 0
    held = json.loads(xipfs("faults", trace, "--json", "--by", "page").stdout)
    assert [line["faults"] for line in held["lines"]] == [1] * 31
    assert held["metadata"]["run"]["inexact"] == NONE
    assert held["metadata"]["run"]["command"] == [str(touch), *words.split()]


def test_the_status_is_the_programs(mounted: LiveMount, tmp_path: Path) -> None:
    def status(*words: str) -> tuple[int, str]:
        command = [*COMMAND, "run", "--mount", str(mounted.directory), "--", *words]
        done = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, done.stderr.splitlines()[0]

    quiet = "0 faults; 0 pages mapped: 0 by a fault of their own, 0 without"
    assert status("sh", "-c", "exit 7") == (7, quiet)
    assert status("sh", "-c", "kill -9 $$") == (137, quiet)
    assert status("/nowhere") == (127, "xipfs run: /nowhere: No such file or directory")
    assert status(str(tmp_path)) == (126, f"xipfs run: {tmp_path}: Permission denied")
