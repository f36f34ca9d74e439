"""Running a command file, and comparing each step with what was recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xipfs.mm.bug import KernelBug
from xipfs.mm.oracle import observe
from xipfs.mm.oracle.bench import Bench, UnansweredError
from xipfs.mm.oracle.cited import rules_of
from xipfs.mm.oracle.command_file import CommandFile, Step
from xipfs.mm.oracle.operations import OPERATIONS
from xipfs.mm.rules import Rules

Json = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One field of one step in which model and recording part; ``rules`` are those it rests on."""

    step: int
    field: str
    recorded: object
    model: object
    rules: str


@dataclass
class StepState:
    """A step and what the model shows after it. ``stopped`` tells why the model could not go on."""

    step: Step
    outcome: Json
    stopped: str = ""


class Replay:
    """A command file running on a bench, step by step."""

    def __init__(self, commands: CommandFile, rules: Rules | None = None) -> None:
        self.commands = commands
        self.bench = Bench(commands.header, rules)
        self._stopped = ""
        self._names: dict[str, int] = {}
        #: Identity to name, within the observation being compared.
        self._seen: dict[int, str] = {}

    def steps(self) -> Iterator[StepState]:
        """Run every step in order and yield what it did."""
        for step in self.commands.steps:
            yield self.execute(step)

    def execute(self, step: Step) -> StepState:
        """Run one step: what came of it, or why the model could not go on."""
        if self._stopped:
            return StepState(step, {}, self._stopped)
        function = OPERATIONS.get(step.op["name"])
        if function is None:
            return StepState(step, {}, f"unknown operation {step.op['name']!r}")
        process = self.bench.processes.get(step.who)
        if process is None:
            return StepState(step, {}, f"process {step.who!r} does not exist now")
        mm = process.mm
        self.bench.machine.current = mm
        before = (mm.min_flt, mm.maj_flt)
        try:
            outcome = function(self.bench, process, step.op)
        except KernelBug as bug:
            self._stopped = f"the kernel hit a BUG before: {bug}"
            return StepState(step, {"result": "BUG", "condition": str(bug)})
        except UnansweredError as error:
            return StepState(step, {}, str(error))
        except Exception as error:
            # Whatever the model cannot do is a difference of this step and of all that follow,
            # never the end of the comparison of other files.
            self._stopped = f"the model stopped: {type(error).__name__}: {error}"
            return StepState(step, {}, self._stopped)
        outcome["minflt"] = mm.min_flt - before[0]
        outcome["majflt"] = mm.maj_flt - before[1]
        return StepState(step, outcome)

    def state(self, done: StepState, label: str | None, pages: list[int] | None = None) -> Json:
        """Return everything that can be seen after a step; of mapping ``label``, these pages.

        ``pages=None`` takes every page the mapping ever had.
        """
        shown = dict(done.outcome)
        process = self.bench.processes.get(done.step.who)
        shown |= observe.counters(process.mm) if process else _NOTHING
        shown["vm_ops_calls"] = observe.vm_ops_calls(self.bench)
        mapping = process.labels.get(label) if process and label is not None else None
        if process is not None and mapping is not None:
            shown["map"] = label
            shown["vmas"] = observe.vmas(self.bench, process, mapping)
            wanted = range(mapping.pages) if pages is None else pages
            shown["pages"] = [observe.page(self.bench, process, mapping, index) for index in wanted]
        return shown

    def label_of(self, step: Step) -> str | None:
        """Return the mapping that a step is about, if it is about one."""
        for source in (step.observed, step.op):
            label = source.get("to" if source.get("name") == "mremap" else "map")
            if isinstance(label, str):
                return label
        return None

    def differences(self, done: StepState) -> list[Difference]:
        """Compare a step with its recording, field by field, only those recorded."""
        step = done.step
        if done.stopped:
            reached = "" if self._stopped else " (this step only)"
            return [Difference(step.number, "(step)", step.op["name"], done.stopped + reached, "")]
        recorded = step.observed
        label = recorded.get("map")
        wanted = [page["index"] for page in recorded.get("pages", [])]
        model = self.state(done, label if isinstance(label, str) else None, wanted)
        if "device_pages" in recorded:
            model["device_pages"] = observe.device_pages(self.bench, self._device_pages(step))
        self._seen = {}
        found = self._compare("", recorded, model)
        return [
            Difference(step.number, path, left, right, rules_of(path, step.op["name"]))
            for path, left, right in found
        ]

    def _device_pages(self, step: Step) -> list[str]:
        """The frames whose counts were recorded: those of the object concerned, or of the only."""
        objects = self.commands.header["objects"]
        lists = [thing["device_pages"] for thing in objects.values() if "device_pages" in thing]
        fitting = [names for names in lists if len(names) == len(step.observed["device_pages"])]
        return list(fitting[0]) if fitting else []

    def _compare(
        self, path: str, recorded: object, model: object
    ) -> Iterator[tuple[str, object, object]]:
        if isinstance(recorded, dict):
            if not isinstance(model, dict):
                yield path, recorded, model
                return
            for key, value in recorded.items():
                below = f"{path}.{key}" if path else key
                yield from self._compare(below, value, model.get(key, _MISSING))
        elif isinstance(recorded, list) and path.endswith("flags"):
            if not isinstance(model, list) or set(recorded) != set(model):
                yield path, recorded, model
        elif isinstance(recorded, list):
            if not isinstance(model, list) or len(recorded) != len(model):
                yield path, recorded, model
                return
            for number, value in enumerate(recorded):
                yield from self._compare(f"{path}[{number}]", value, model[number])
        elif path.endswith("frame") and str(recorded).startswith("anon:"):
            if not self._same_page(str(recorded), model):
                yield path, recorded, model
        elif recorded != model or isinstance(recorded, bool) != isinstance(model, bool):
            yield path, recorded, model

    def _same_page(self, name: str, model: object) -> bool:
        """Whether a recorded anonymous page is the one the model has, by a table of names.

        One name is one page in the whole file; two names are two pages in one observation only,
        since a page that went out of sight may come back under a new name.
        """
        if not isinstance(model, str) or not model.startswith("anon:"):
            return False
        identity = int(model.partition(":")[2])
        one_page = self._names.setdefault(name, identity) == identity
        return one_page and self._seen.setdefault(identity, name) == name


_MISSING = "(no answer)"
_NOTHING: Json = {"rss_file_pages": 0, "rss_anon_pages": 0, "locked_pages": 0}


@dataclass
class FileResult:
    """One file compared: how many steps, and what differs."""

    commands: CommandFile
    steps: int
    differences: list[Difference]

    @property
    def differing_steps(self) -> int:
        """Steps with at least one difference."""
        return len({difference.step for difference in self.differences})

    @property
    def agreeing_steps(self) -> int:
        """Steps without."""
        return self.steps - self.differing_steps


def check_file(commands: CommandFile, rules: Rules | None = None) -> FileResult:
    """Replay a recording and collect every difference."""
    try:
        replay = Replay(commands, rules)
    except Exception as error:
        # What cannot even be set up is a difference of every step.
        reason = f"the header cannot be set up: {type(error).__name__}: {error}"
        found = [
            Difference(step.number, "(step)", step.op["name"], reason, "")
            for step in commands.steps
        ]
        return FileResult(commands, len(commands.steps), found)
    differences = []
    for done in replay.steps():
        differences += replay.differences(done)
    return FileResult(commands, len(commands.steps), differences)


def diff_rules(
    commands: CommandFile, left: Rules, right: Rules
) -> Iterator[tuple[StepState, list[Difference]]]:
    """Run one file under two rule sets; yield each step, as the left set took it, and where the
    two part: ``recorded`` is then what the left set shows.
    """
    runs = (Replay(commands, left), Replay(commands, right))
    for one, other in zip(runs[0].steps(), runs[1].steps(), strict=True):
        label = runs[0].label_of(one.step)
        states = [run.state(done, label) for run, done in zip(runs, (one, other), strict=True)]
        for state, done in zip(states, (one, other), strict=True):
            if done.stopped:
                state["result"] = done.stopped
        name, number = one.step.op["name"], one.step.number
        differences = [
            Difference(number, path, a, b, rules_of(path, name))
            for path, a, b in _different("", *states)
        ]
        yield one, differences


def _different(path: str, left: object, right: object) -> Iterator[tuple[str, object, object]]:
    """Yield the leaves in which two states differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left | right:
            below = f"{path}.{key}" if path else str(key)
            yield from _different(below, left.get(key, _MISSING), right.get(key, _MISSING))
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            yield from _different(f"{path}[{number}]", a, b)
    elif left != right:
        yield path, left, right
