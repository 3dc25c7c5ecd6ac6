"""What the benchmarks share: interleaved rounds, their ratio with its range, and the file it is written to."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deeptumornet.study import write_json

RESULTS = Path(__file__).resolve().parents[2] / "reports" / "benchmarks"


def save(name: str, ratios: list[float], goal: str, how: str, **more) -> None:
    """Write reports/benchmarks/<name>.json: the median of `ratios` (one per round), their range as low and high, and more."""
    result = {"name": name, "ratio": float(np.median(ratios)), "low": float(min(ratios)), "high": float(max(ratios)), "goal": goal,
              "how": how, "rounds": len(ratios), **more}
    write_json(RESULTS / f"{name}.json", result)
    (RESULTS / "README.md").write_text(table())
    print(json.dumps(result, indent=1))


def table() -> str:
    """All results as Markdown, in the order of their names."""
    lines = ["# Measured", "", "By `make bench` on two cores: the median of the rounds and their range, beside the goal, met or not.", "",
             "| what | measured | rounds | goal | how |", "|---|---|---|---|---|"]
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text())
        lines.append("| {name} | {ratio:.4g} ({low:.4g} to {high:.4g}) | {rounds} | {goal} | {how} |".format(**found))
    return "\n".join([*lines, ""])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_of(script: str, *words: object) -> float:
    """MB at the peak of a fresh process that runs `script` with `words`; it prints them with `print(peak())`."""
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak(workers: int = 0) -> float:
    """MB that this process held at its peak, with `workers` times the largest of its ended children.

    Linux counts ru_maxrss on from what started the process, so its own is read from /proc."""
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(own.split()[1]) + workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024
