"""The console: a line a stage, progress with loss and time left, one table and the plan at the end."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from flashmorph.cli.progress_lines import ProgressLines
from flashmorph.cli.ranks import rank
from flashmorph.cli.tables import new_table
from flashmorph.evaluation import points, shortage, times
from flashmorph.plan import FULL
from flashmorph.progress import Report
from flashmorph.run.folder import Stage
from flashmorph.run.run import Results
from flashmorph.selection import BASELINE
from flashmorph.surface.terminal import harmless
from flashmorph.units import byte_size, longest_context
from flashmorph.versions import made_with

_SILENT_SECONDS = 60.0
"""Seconds without progress after which a stage prints that it is still at work; the wait doubles each time."""


class RichScreen:
    """Draws a bar on a terminal; elsewhere rank 0 prints a line of progress at growing intervals (`ProgressLines`).

    `clock` gives the seconds that these intervals are counted in.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self._clock = console, clock

    @contextmanager
    def stage(self, name: str, about: str) -> Iterator[Report]:
        """A bar that disappears when the stage ends, or lines; and a line where it stands still."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task(harmless(f"{name:<10} {about}"), total=None, figures="")

            news = [time.monotonic()]
            lines = None if self.console.is_terminal or rank() else ProgressLines(name, self._clock, harmless(about))

            def report(done: float, total: float, **figures: float) -> None:
                news[0] = time.monotonic()
                if lines:
                    if line := lines.line(done, total, **figures):
                        self.say(line)
                    return
                shown = " ".join(f"{label} {value:.3f}" for label, value in figures.items())
                progress.update(bar, completed=done, total=total, figures=shown)

            with self._telling_of_silence(name, news):
                yield report

    @contextmanager
    def _telling_of_silence(self, name: str, news: list[float]) -> Iterator[None]:
        """A stage may run third-party code (a tokenizer, a chat template) that takes any time."""
        over = threading.Event()

        def watch() -> None:
            patience = _SILENT_SECONDS
            while not over.wait(max(0.0, news[0] + patience - time.monotonic())):
                if (silent := time.monotonic() - news[0]) >= patience:
                    self.say(f"{name}: still at work, without news for {silent:,.0f} s; Ctrl-C ends it")
                    patience *= 2

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def done(self, stage: Stage, about: str, figures: str) -> None:
        """One line: what, how it came out, how long it took, or with which other versions it was done before."""
        time = f"{stage.record['seconds']:.0f} s"
        if stage.reused:
            time = " with ".join(filter(None, ("done before", made_with(stage.record))))
        line = Text.assemble((f"{stage.name:<10}", "bold"), harmless(f" {about} · {figures} · {time}"))
        self.console.print(line, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def show(self, results: Results) -> None:
        """The closing tables, the strip of layers, and the hybrid beside its teacher and the baseline."""
        from flashmorph.report.looks import label

        context = longest_context(score.cache_bytes for score in results.scores.values())
        title = "recall: greedy generation, exact match of the whole answer"
        overview = new_table(title, "model", "recall", "95 %", "perplexity", f"cache at {int(context):,}")
        first = next(iter(results.scores.values()))
        by_task = new_table("recall by task", "model", *first.right)
        for name, score in results.scores.items():
            figures = score.to_dict()
            low, high = figures["recall_interval"]
            cache = byte_size(score.cache_bytes[context])
            interval = f"{100 * low:.1f}-{100 * high:.1f}"
            overview.add_row(label(name), f"{100 * score.recall:.1f} %", interval, f"{score.perplexity:.3f}", cache)
            tasks = figures["recall_by_task"].values()
            by_task.add_row(label(name), *(f"{100 * task['recall']:.0f} %" for task in tasks))
        self.console.print(overview)
        self.console.print(by_task)
        if note := shortage(first.to_dict()):
            self.say(note)
        plan = results.plan
        other = ", ".join(sorted(set(plan.assignments.values()) - {FULL})) or "other"
        self.say(
            f"\n{plan.strip()}   ■ full □ {other}: {plan.unit} {plan.in_short()} of {len(plan.assignments)} stay full"
        )
        for about, figure in _compared(results):
            self.say(f"{about}: {figure}")


def _compared(results: Results) -> Iterator[tuple[str, str]]:
    found = results.comparisons
    yield "recall minus the teacher's", points(found["recall_hybrid_minus_teacher"])
    if ratio := found.get("perplexity_hybrid_over_teacher"):
        yield "perplexity over the teacher's", times(ratio)
    for after, about in (("_undistilled", "before distillation"), ("", "after")):
        if difference := found.get(f"recall_hybrid{after}_minus_{BASELINE}"):
            yield f"recall minus {BASELINE}'s {about}", points(difference)
