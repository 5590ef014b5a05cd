"""``summary.md`` and the pictures of a ``python -m bench gpu`` run, from what its stages left."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contract import wanted
from bench.gpu_job import Result
from bench.plots import plot, show
from qlinear.tables import table

#: Failures and left-outs shown of each stage.
_SHOWN = 12


def summarize(results: dict[str, Any], names: Sequence[str], folder: Path) -> str:
    """The whole summary as Markdown; writes the pictures where matplotlib is there."""
    parts = ["# GPU run", *_environment(results.get("environment", {})), "## Stages", _fenced(_stages(results, names))]
    parts += [f"**{name}**: {results[name]['verdict']}" for name in names if "verdict" in results.get(name, {})]
    for name in names:
        result = results.get(name, {})
        parts += _problems(name, result)
    if rows := results.get("benchmark", {}).get("rows"):
        parts += ["## Benchmark", _fenced(_contract(rows)), _fenced(show(rows)), *_pictures(rows, folder)]
        notes = results["benchmark"].get("notes", [])
        parts += [_fenced("\n".join(notes[:40]))] if notes else []
    if rows := results.get("sparse", {}).get("copies"):
        parts += ["## Kept copies of 2:4 weights", _fenced(_copies(rows))]
    for name, writer in (("launch", _launch), ("models", _models), ("tuned", _tuned)):
        if results.get(name, {}).get("rows"):
            parts += [f"## {name}", _fenced(writer(results[name]))]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    return f"```\n{text}\n```"


def _environment(result: Result) -> list[str]:
    lines = [f"commit {result.get('commit', 'unknown')}", *result.get("devices", [])]
    lines.append(", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items()))
    if "copy_bytes_per_s" in result:
        lines.append(f"a copy moves {result['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and written")
    return [_fenced("\n".join(lines + ([result["nvidia_smi"]] if "nvidia_smi" in result else [])))]


def _stages(results: dict[str, Any], names: Sequence[str]) -> str:
    lines = []
    for name in names:
        result = results.get(name)
        if result is None:
            lines.append((name, "not run", "", "", "", ""))
            continue
        state = "error" if "error" in result else "FAILED" if result.get("failed") else "ok"
        state += " (cut short)" if "incomplete" in result else ""
        counts = result.get("counts", {})
        what = f"{counts['passed']} passed" if counts else f"{len(result['rows'])} rows" if "rows" in result else ""
        failed = str(len(result.get("failed", ())) or "")
        left_out = str(len(result.get("left_out", ())) or "")
        # A stage that was done before may be of another commit than the run.
        lines.append((name, state, what, failed, left_out, result.get("commit", "unknown")[:10]))
    return table(("stage", "state", "did", "failed", "left out", "at commit"), lines, right=(3, 4))


def _problems(name: str, result: Result) -> list[str]:
    lines = []
    if "error" in result:
        lines += [f"{result['error']}", str(result.get("log", ""))[-1200:]]
    for key in ("failed", "left_out", "warm"):
        found = [str(item) for item in result.get(key, ())]
        lines += [f"{key}: {item}" for item in found[:_SHOWN]]
        lines += [f"{key}: and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return [f"### {name}", _fenced("\n".join(lines))] if lines else []


def _contract(rows: Sequence[Result]) -> str:
    """The rows that are slower than the speed contract allows."""
    lines, held = [], 0
    for row in rows:
        asked, base = wanted(row["scheme"], row["m"]), row["float_us"].get(row["dtype"])
        if row["us"] is None or asked is None or base is None:
            continue
        ratio = base / row["us"]
        if ratio >= asked:
            held += 1
        else:
            problem = f"{row['m']} x {row['n']} x {row['k']}"
            lines.append((row["scheme"], row["dtype"], problem, f"{ratio:.2f}x", f"{asked:.2f}x", row["path"]))
    head = f"speed contract against 16 bit: {held} held, {len(lines)} broken"
    broken = table(("scheme", "dtype", "M x N x K", "is", "wanted", "path"), lines, right=(3, 4))
    return f"{head}\n{broken}" if lines else head


def _pictures(rows: Sequence[Result], folder: Path) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return ["No pictures: matplotlib is not installed."]
    try:
        return [f"![{path.stem}]({path.name})" for path in plot(rows, folder)]
    except Exception as error:
        # The tables are worth more than pictures of them.
        return [f"No pictures: {type(error).__name__}: {error}"]


def _copies(rows: Sequence[Result]) -> str:
    lines = []
    for row in rows:
        times = [f"{row['us'][name]:.1f}" if name in row["us"] else "" for name in ("dense", "semi-structured")]
        lines.append((row["dtype"], f"{row['m']} x {row['n']} x {row['k']}", *times, row["kept"], row["why"]))
    return table(("dtype", "M x N x K", "us, dense", "us, semi-structured", "kept", "why"), lines, right=(2, 3))


def _launch(result: Result) -> str:
    def us(row: Result, key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:.2f}"

    keys = ("cpu_us", "graph_warm_us", "graph_cold_us")
    lines = [(row["side"], *(us(row, key) for key in keys)) for row in result["rows"]]
    counts = result["arguments"]
    head = f"{result['n']} x {result['k']}, one token; arguments of a launch: {counts['passed']} passed, "
    head += f"{counts['compiled_in']} compiled in"
    if "int4_floor_us" in result:
        head += f"; floor of int4: {result['int4_floor_us']:.2f} us"
    return f"{head}\n" + table(("", "us on the CPU", "us in a graph", "us, cold weights"), lines, right=(1, 2, 3))


def _models(result: Result) -> str:
    lines = [(row["model"], f"{row['us']:.1f}", f"{row['of_float']:.2f}x") for row in result["rows"]]
    text = table(("one layer, one token", "us", "of 16 bit"), lines, right=(1, 2))
    for scheme, row in result.get("compiled", {}).items():
        text += (
            f"\n{scheme}: torch.compile(fullgraph=True) took {row['seconds']:.1f} s, differs by {row['difference']:.1e}"
        )
    return text


def _tuned(result: Result) -> str:
    """The best of each problem, the largest gains first, and the crossovers."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: -(row.get("gain") or 0)):
        problem, best = f"{row.get('m', 'any')} x {row['n']} x {row['k']}", row.get("best")
        if row.get("fused_tokens"):
            lines.append((row["scheme"], problem, "", f"kernel up to {row['fused_tokens']} tokens", "", ""))
        elif best in row.get("us", {}):
            times = (f"{row['us'][best]:.2f}", f"{row['gain']:.2f}x")
            lines.append((row["scheme"], problem, row["chosen"], best, *times))
    text = table(("scheme", "M x N x K", "chosen", "best", "us", "gain"), lines, right=(4, 5))
    return text + (f"\nqlinear tune --install {result['table']}" if "table" in result else "")
