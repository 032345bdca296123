"""A run's report: what was kept, lost and won, on one page, with its figures as PNG beside it."""

from html import escape
from pathlib import Path

from flashmorph.convert.hub import at_revision
from flashmorph.evaluation import points, text_in_words, times
from flashmorph.files import atomic_path
from flashmorph.plan import FULL, Plan
from flashmorph.report import choice, costs, recall, text
from flashmorph.report.charts import Chart
from flashmorph.report.looks import label
from flashmorph.report.markup import listing, paragraph, percent, size, span, strip, table, tile
from flashmorph.report.page import Section, page
from flashmorph.report.source import Source, read_run
from flashmorph.report.still import draw
from flashmorph.selection import BASELINE
from flashmorph.surface.outputs import PAGE, PICTURE, claim_output
from flashmorph.surface.quoting import encodable, no_option, shell_command
from flashmorph.units import listed, longest_context
from flashmorph.versions import own_version

FIGURES = "figures"
PAGE_NAME = "report.html"


def write_report(run: Path, output: Path | None = None, force: bool = False) -> Path:
    """Write the report of a finished run to `output` (`report.html` in the run), its charts to `figures` beside it.

    Raises:
        UserError: `run` is no finished run, a file of it is damaged, or a file cannot be written; without `force`
            also that a file there is not ours. Then nothing is written.
    """
    source = read_run(run)
    output = output or run / PAGE_NAME
    sections = _sections(source)
    charts = [block for section in sections for block in section.blocks if isinstance(block, Chart)]
    pictures = {output.parent / FIGURES / f"{chart.name}.png": chart for chart in charts}
    claim_output(output, PAGE, force)
    for path in pictures:
        claim_output(path, PICTURE, force)
    name = " of ".join(["Hybrid", *_teacher(source.plan)])
    html = page(name, _head(name, source), sections)
    for path, chart in pictures.items():
        draw(chart, path)
    with atomic_path(output) as temporary:
        temporary.write_text(encodable(html), encoding="utf-8")
    return output


def _head(name: str, source: Source) -> str:
    plan, models = source.plan, source.models
    teacher, hybrid = models["teacher"], models["hybrid"]
    context = longest_context(each["cache_bytes"] for each in models.values())
    cache, teachers = hybrid["cache_bytes"][context], teacher["cache_bytes"][context]
    lost = source.results.get("recall_hybrid_minus_teacher")
    ratio = source.results.get("perplexity_hybrid_over_teacher")
    own, theirs = (f"{each['perplexity']:.2f}" for each in (hybrid, teacher))
    tiles = [
        tile("recall", percent(hybrid["recall"]), _beside(percent(teacher["recall"]), lost and points(lost))),
        tile("perplexity", own, _beside(theirs, ratio and times(ratio))),
        tile(
            f"cache at {int(context):,} tokens",
            size(cache),
            f"{percent(cache / teachers)} of the teacher's {size(teachers)}",
        ),
    ]
    if worth := source.results.get(f"recall_hybrid_minus_{BASELINE}"):
        about = f"points of recall over the {BASELINE} layout ({span(worth['interval'], '{:.1f}', 100)})"
        tiles.append(tile("what the choice is worth", f"{100 * worth['difference']:+.1f}", about))
    if (timing := source.results.get("timing")) and timing["hybrid"] is not None:
        about = f"budget {timing['limit']:,.3f} ms, teacher {timing['teacher']:,.3f} ms"
        tiles.append(tile(f"a token after {timing['context']:,}", f"{timing['hybrid']:,.3f} ms", about))
    kept, number = len(plan.full_groups), len(plan.assignments)
    about = f"{kept} of {number} {plan.unit} keep full attention. Made by flashmorph {own_version()}."
    return f"<h1>{escape(name)}</h1><p class='note'>{escape(about)}</p><div class='tiles'>{''.join(tiles)}</div>"


def _beside(figure: str, comparison: str | None) -> str:
    """The teacher's figure, and the hybrid's against it where the results have that."""
    return f"teacher {figure}" + (f": {comparison}" if comparison else "")


def _teacher(plan: Plan) -> list[str]:
    """The name of the teacher: of a folder its own name, without its path."""
    return [plan.teacher if plan.revision else Path(plan.teacher).name] if plan.teacher else []


def _sections(source: Source) -> list[Section]:
    charts = {
        "The plan": [
            _plan(source),
            choice.heads(source),
            choice.scores(source),
            choice.gates(source),
            choice.regret(source),
        ],
        "What it can do": [
            _models(source),
            *map(paragraph, source.notes),
            recall.by_task(source),
            *recall.grids(source),
            listing(recall.worst(source)),
            _how_to_get_more(source),
        ],
        "Text": [text.by_position(source), text.classes(source), text.samples(source)],
        "What it saves": [costs.token_time(source), costs.cache(source), costs.speed(source)],
        "What it took": [costs.stages(source), _recipe(source)],
    }
    return [Section(title, [block for block in blocks if block]) for title, blocks in charts.items()]


def _recipe(source: Source) -> str:
    return f'<h3>Recipe</h3><pre class="columns">{escape(source.recipe)}</pre>'


def _plan(source: Source) -> str:
    plan = source.plan
    others = sorted(set(plan.assignments.values()) - {FULL})
    about = f"Chosen by {plan.strategy} for the budget {plan.budget}, seed {plan.seed}; full: {plan.in_short()}."
    shown = ["scores"] if plan.scores else []
    if source.align.get("errors"):
        shown.append("how near each layer's branch came to its attention")
    if shown:
        about += f" Hover for {listed(shown)}."
    key = f'<span class="key full"></span>full attention <span class="key other"></span>{escape(", ".join(others))}'
    return f'{strip(plan, choice.tips(source))}<p class="note">{key}</p>{paragraph(about)}'


def _models(source: Source) -> str:
    context = longest_context(each["cache_bytes"] for each in source.models.values())
    rows = []
    for name, each in source.models.items():
        recall_interval = span(each["recall_interval"], "{:.1f}", 100)
        text_interval = span(each.get("perplexity_interval"))
        perplexity = f"{each['perplexity']:.2f}" + (f" ({text_interval})" if text_interval else "")
        cache = size(each["cache_bytes"][context])
        rows.append((label(name), f"{percent(each['recall'])} ({recall_interval})", perplexity, cache))
    about = (
        f"Recall is the mean over tasks of right answers, {source.questions} questions a task at "
        f"{source.length:,} tokens; perplexity is on {text_in_words(source.models['hybrid'])}; intervals in "
        "brackets are 95 %."
    )
    header = ("model", "recall", "perplexity", f"cache at {int(context):,}")
    return paragraph(about) + table(header, rows, list(source.models).index("hybrid"))


def _how_to_get_more(source: Source) -> str:
    """The command that adds the grid and the token classes, where they are not there yet."""
    if source.evaluated or not source.plan.teacher:
        return ""
    folders = [source.folder / "stages" / name / "model" for name in _baseline(source)]
    models = [
        at_revision(source.plan.teacher, source.plan.revision),
        *map(str, [source.folder, *(folder for folder in folders if folder.is_dir())]),
    ]
    lengths = ",".join(str(source.length // part) for part in (4, 2, 1))
    options = ("--lengths", lengths, "--tokens", "--report", str(source.folder))
    command = shell_command(["flashmorph", "evaluate", *map(no_option, models), *options])
    return f"<h3>More</h3><p>Recall by length and depth, and losses by class of token:</p><pre>{escape(command)}</pre>"


def _baseline(source: Source) -> list[str]:
    """The folder of the finished baseline."""
    digests = {label: digest for digest, label in source.labels.items()}
    last = [name for name in ("extend", "distill") if f"{name} {BASELINE}" in digests]
    return [f"{last[0]}-{digests[f'{last[0]} {BASELINE}']}"] if last else []
