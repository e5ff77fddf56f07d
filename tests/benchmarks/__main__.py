"""`python -m tests.benchmarks`: every benchmark, one after the other. Each prints ratios of things measured in one run."""

from __future__ import annotations

import runpy
import sys

BENCHMARKS = (
    "locate_scaling",
    "overhead",
    "learning_scale",
    "export_latency",
    "export_time",
    "compose_time",
    "compose_size",
    "compose_latency",
    "compose_accuracy",
    "int8_plans",
    "quality",
    "emoji",
    "emoji_peers",
)

if __name__ == "__main__":
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        sys.argv = [name]
        runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__")
