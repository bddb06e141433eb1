"""The results of a benchmark: as lines of a table, as a plot and as JSON."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from sologpt.errors import UserError


@dataclass
class Row:
    """One candidate in one benchmark. Rates and the limit are in tokens/s."""

    benchmark: str
    shape: str
    dtype: str
    candidate: str
    rates: list[float]  # one per round
    limit: float | None = None
    peak_memory: int | None = None  # bytes

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def table(rows: list[Row]) -> Iterator[str]:
    """Yield a line per row of one benchmark.

    It shows the median rate with minimum and maximum, the share of the limit, how many times as fast our
    fastest candidate is, and the peak memory.
    """
    ours = max((row.median for row in rows if row.candidate.startswith("soloGPT")), default=rows[0].median)
    for row in rows:
        rate = f"{row.median:10,.1f} ({min(row.rates):,.1f} to {max(row.rates):,.1f})"
        cells = [f"{row.benchmark:16} {row.shape[-12:]:12} {row.dtype:9} {row.candidate:22} {rate:36}"]
        cells += [f"{row.median / row.limit:4.0%} of the limit"] if row.limit else []
        cells += [f"{ours / row.median:.2f} x"] if row.median != ours else []
        cells += [f"{row.peak_memory / 2**30:.2f} GiB"] if row.peak_memory else []
        yield "  ".join(cells)


def to_json(machine: str, rows: list[Row]) -> str:
    return json.dumps({"machine": machine, "rows": [asdict(row) | {"median": row.median} for row in rows]})


def plot(rows: list[Row], path: str) -> None:
    """Draw a group of bars per benchmark: the rate of each candidate relative to the fastest one.

    ImportError without matplotlib, UserError for an unknown format, OSError if it cannot write the file.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise ImportError("--plot needs the extra 'plot': pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.benchmark}\n{row.shape}, {row.dtype}", []).append(row)
    names = list(dict.fromkeys(row.candidate for row in rows))
    figure, axes = plt.subplots(figsize=(max(7, 1.5 * len(groups)), 4))
    for i, name in enumerate(names):
        bars = {
            x + 0.8 * i / len(names): row.median / max(other.median for other in group)
            for x, group in enumerate(groups.values())
            for row in group
            if row.candidate == name
        }
        axes.bar(list(bars), list(bars.values()), 0.8 / len(names), align="edge", label=name)
    axes.set_xticks([x + 0.4 for x in range(len(groups))], groups, fontsize=7)
    axes.set_ylabel("tokens/s relative to the fastest")
    axes.legend(fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except ValueError as e:
        raise UserError(f"--plot={path}: {e}") from e
