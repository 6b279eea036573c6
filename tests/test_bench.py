"""The project's own benchmark runs and measures what it says; its figures are nobody's test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import bench

BENCH = Path(bench.__file__)


def test_the_benchmark_prints_every_row_and_compares_with_a_kept_run(tmp_path):
    kept = tmp_path / "figures.json"
    line = [sys.executable, str(BENCH), "--requests=20", "--streams=3", "--seconds=0.2", "--out=%s" % kept]
    first = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    figures = json.loads(kept.read_text())
    assert set(figures) == {name for name, _ in bench.ROWS}
    assert figures["failed_streams"] == 0 and not math.isnan(figures["added_ms"])
    assert all(text in first.stdout for _, text in bench.ROWS)
    shown = bench.table(figures, dict(figures, added_ms=figures["added_ms"] / 2))
    assert "2.00x" in shown and "1.00x" in shown
