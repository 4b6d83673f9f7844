"""What a check finds, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from bevt_ds.data.limits import BadSample

State = Literal["ok", "absent", "mend"]
GIB = 1 << 30


class Line(NamedTuple):
    """One thing of a machine. absent: it is not there, and `text` says what that means; mend: `remedy` says how."""

    name: str
    state: State
    text: str
    remedy: str = ""


def attempt(name: str, work: Callable[[], str], remedy: str) -> Line:
    """The line of something that is tried: `work` says how it went, and raises where it does not go."""
    try:
        return Line(name, "ok", work())
    except (BadSample, ImportError, OSError, RuntimeError, ValueError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        return Line(name, "mend", reason, remedy)


def is_well(hosts: Mapping[str, Sequence[Line]]) -> bool:
    """Whether nothing must be mended."""
    return not [line for lines in hosts.values() for line in lines if line.state == "mend"]


def as_text(hosts: Mapping[str, Sequence[Line]]) -> str:
    """The lines of each host, and a closing line that counts what must be mended."""
    shown = []
    for host, lines in hosts.items():
        shown += [f"{host}:"] if len(hosts) > 1 else []
        shown += [text for line in lines for text in _texts(line)]
    faults = sum(line.state == "mend" for lines in hosts.values() for line in lines)
    return "\n".join([*shown, "", f"{faults} to mend" if faults else "all is well"])


def _texts(line: Line) -> list[str]:
    first = f"{line.state:<8}{line.name:<16}{line.text}"
    return [first, f"{'':<24}-> {line.remedy}"] if line.remedy else [first]


def as_json(hosts: Mapping[str, Sequence[Line]]) -> str:
    """The same for programs: {"well": bool, "hosts": {host: [{"name", "state", "text", "remedy"}]}}."""
    lines = {host: [line._asdict() for line in found] for host, found in hosts.items()}
    return json.dumps({"well": is_well(hosts), "hosts": lines}, indent=1)
