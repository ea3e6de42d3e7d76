"""Damaged and hostile files for every reader: `python tests/fuzz.py --seconds 120`.

Valid files are made, changed (see mutations.py) and read. A reader gives what was written, or one clear sentence as a
ValueError or its kin: anything else is a finding, as are a wrong result where there are checksums, a hang, a lot of
memory, and the end of the process. Findings are printed with the number that makes them again (`--seed`).
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from readers import READERS, Target

SECONDS = 30  # an attempt that takes longer hangs
MEGABYTES = 700  # that an attempt may add to the process's memory


def _child(names: list[str], first: int, seconds: float, state: Path) -> int:
    """Attempts until the time is over; what is under way stands in `state`."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    state.write_text(f"the valid files --seed {first}")
    targets = {name: Target(name) for name in names}
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
        name = names[number % len(names)]
        state.write_text(f"{name} --seed {number}")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        finding, outcome = targets[name].attempt_numbered(number)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEGABYTES:
            finding = finding or f"took {grown:,.0f} MB"
        counts[f"{name}: {outcome}"] += 1
        if finding and finding[:60] not in seen:
            seen.add(finding[:60])
            print(f"FOUND --seed {number} {name}: {finding}", flush=True)
        counts["findings"] += finding is not None
        number += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"COUNTS {json.dumps(counts)} {number}", flush=True)
    return 0


def main() -> int:
    """Children do the work, because a reader may take its process with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the first attempt")
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one (default: all)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.reader or list(READERS)
    if options.child:
        return _child(list(READERS) if options.reader is None else names, options.seed, options.seconds, options.child)
    end, seed, found = time.monotonic() + options.seconds, options.seed, 0
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        state = Path(place, "state")
        while (left := end - time.monotonic()) > 1:
            command = [sys.executable, __file__, "--child", str(state), "--seed", str(seed), "--seconds", str(left)]
            command += [word for name in options.reader or () for word in ("--reader", name)]
            done = subprocess.run(command, capture_output=True, text=True)
            for line in done.stdout.splitlines():
                if line.startswith("FOUND"):
                    print(line, flush=True)
                    found += 1
                elif line.startswith("COUNTS"):
                    counts.update(json.loads(line.removeprefix("COUNTS ").rpartition(" ")[0]))
            if done.returncode:
                where = state.read_text() if state.exists() else "its start"
                print(f"FOUND the process ended with {done.returncode} at {where}\n{done.stderr[-1500:]}", flush=True)
                found += 1
                if where.partition(" --seed ")[0] not in READERS:  # it has not come to reading
                    break
                seed = int(where.rpartition(" ")[2])
            seed += 1
    for name in names:
        parts = ", ".join(f"{counts[f'{name}: {how}']:,} {how}" for how in ("refused", "read", "crashed"))
        print(f"{name:30}{parts}")
    attempts = sum(count for name, count in counts.items() if name != "findings")
    print(f"{attempts:,} attempts, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
