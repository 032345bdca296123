"""The command that judges strategies."""

import json
from typing import Annotated, Literal

import typer
from rich.table import Table

from flashmorph.cli.app import app
from flashmorph.cli.conflicts import require_with
from flashmorph.cli.options import (
    OUT,
    DataOption,
    DeviceOption,
    ForceOption,
    FromOption,
    JsonOption,
    KeptRecipeOption,
    Options,
    OutputOption,
    SetOption,
    TeacherArgument,
    UnusedOption,
    open_run,
)
from flashmorph.cli.tables import new_table
from flashmorph.errors import UserError, quoted
from flashmorph.surface.outputs import PICTURE, claim_output, json_of, made_by

_MOST_SPENT = 1_000
_COLUMNS = ("recall", "agree", "FLOPs", "plans")


@app.command()
def compare(
    ctx: typer.Context,
    teacher: TeacherArgument,
    output: OutputOption,
    budgets: Annotated[str, typer.Option(help="Numbers of full layers, with commas.")] = "1,2,3",
    strategies: Annotated[str, typer.Option(help="`all`, or names with commas: `gates,race+confidence=0.8`.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Seeds of every search.")] = 5,
    spends: Annotated[str, typer.Option(help="Shares of a strategy's own steps or questions, with commas.")] = "1",
    questions: Annotated[
        int, typer.Option(min=2, max=1_000_000, help="Questions of the referee's split, over all tasks.")
    ] = 256,
    recall_questions: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Generated answers a task for each plan found.")
    ] = 25,
    distill_steps: Annotated[
        int,
        typer.Option(
            min=0,
            max=100_000,
            help="Also distil the default's, the baseline's and the reference plan for so many steps, and compare.",
        ),
    ] = 0,
    distill_budget: Annotated[
        str | None,
        typer.Option(help="The budget for which that is done; default: 2, or else the first."),
    ] = None,
    max_plans: Annotated[
        int, typer.Option(min=1, max=1_000_000_000, help="The most plans that are enumerated.")
    ] = 2_000,
    reference: Annotated[
        Literal["enumerated", "found"],
        typer.Option(help="What plans are judged against: the best of all, or the best known where they are too many."),
    ] = "enumerated",
    reference_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=1_000_000_000_000,
            help="With `--reference found`: the most tokens that a reference takes, backward ones twice.",
        ),
    ] = 8_000_000,
    kept: Annotated[bool, typer.Option("--kept", help="Show every finished cell; search for no other.")] = False,
    recipe: KeptRecipeOption = None,
    data: DataOption = None,
    others: FromOption = None,
    changes: SetOption = None,
    allow_unused: UnusedOption = False,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Judge strategies on questions that no search has seen, by every plan of every budget or by the best known one.

    For every strategy, budget and seed: the plan, its rank among all plans (1: not distinguishable from the best), its
    regret (mean loss minus the best plan's, before distillation), recall, and what the search cost. Finished cells are
    kept, so the same command resumes. All plans are run, so teachers must be small. Without --recipe the recipe is
    that of the first run in --from that has one.

    Larger ones take `--reference found`: the reference of a budget is then the best known plan, by race,
    greedy-forward, gates, random plans and a local search. Regret may be negative, has a half width (of its 95 %
    interval) and no rank.

    Example: `flashmorph compare tiny --output runs/referee --from runs/demo --budgets 1,2,3 --seeds 5`

    Example: `flashmorph compare teacher --output runs/referee --from runs/own --budgets 7 --reference found
    --strategies race,gates,uniform`
    """
    from flashmorph.files import write_json
    from flashmorph.plan import Budget
    from flashmorph.referee import CompareSettings
    from flashmorph.referee.compare import compare as judge
    from flashmorph.referee.entry import Entry
    from flashmorph.referee.figures import draw_regret
    from flashmorph.referee.summary import summarise

    if reference == "enumerated":
        require_with(ctx, "--reference found", "--reference-tokens")
    else:
        require_with(ctx, "--reference enumerated", "--max-plans")
    if not distill_steps:
        require_with(ctx, "--distill-steps", "--distill-budget")
    folder = output / "compare"
    file, picture = folder / "compare.json", folder / "regret.png"
    claim_output(file, json_of("compare"), force)
    claim_output(picture, PICTURE, force)
    other_runs = tuple(others or ())
    options = Options(
        teacher=teacher,
        output=output,
        recipe=recipe,
        changes=changes,
        data=data,
        others=others,
        device=device,
        json=as_json,
        recipe_of=other_runs,
        allow_unused=allow_unused,
    )
    try:
        shares = tuple(float(share) for share in spends.split(","))
        if not all(0 < share <= _MOST_SPENT for share in shares):
            raise ValueError
    except ValueError as error:
        about = f"numbers above 0 and at most {_MOST_SPENT:,} with commas, for example 0.25,1"
        raise UserError(f"--spends {quoted(spends)} must be {about}") from error
    # As cells and references have them: of two spellings of a budget one would lose its regret.
    compared = tuple(dict.fromkeys(str(Budget.parse(name)) for name in budgets.split(",")))
    usual = "2" if "2" in compared else compared[0]
    settings = CompareSettings(
        budgets=compared,
        seeds=seeds,
        spends=shares,
        questions=questions,
        recall_questions=recall_questions,
        distill_steps=distill_steps,
        distill_budget=str(Budget.parse(distill_budget)) if distill_budget else usual,
        max_plans=max_plans,
        reference=reference,
        reference_tokens=reference_tokens,
        only_kept=kept,
    )
    if strategies != "all":
        settings = settings.model_copy(update={"strategies": tuple(name.strip() for name in strategies.split(","))})
    for label in settings.strategies:
        Entry.parse(label)
    run = open_run(options, ["align", "select", "compare"], keep_recipe=False)
    summary = summarise(judge(run, settings, folder))
    write_json(file, {**made_by("compare"), **summary})
    draw_regret(summary, picture)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    for table in tables(summary):
        OUT.print(table)
    OUT.print(f"written: {file} and {picture.name}", highlight=False, soft_wrap=True)


def tables(summary: dict) -> list[Table]:
    """One table a budget, the lowest regret first. Figures are means over seeds; `agree` is how much of two seeds'
    plans is the same (intersection over union). Against a best known plan there is no rank, but half of the regret's
    95 % interval."""
    made = []
    for budget in dict.fromkeys(row["budget"] for row in summary["rows"]):
        truth = summary["truths"].get(budget, {})
        found = truth.get("reference") == "found"
        title, caption = _about(budget, truth)
        columns = ("strategy", *(("regret", "± 95 %") if found else ("rank", "first", "regret")), *_COLUMNS)
        table = new_table(title, *columns, left=("strategy", "plans"))
        table.caption, table.caption_justify = caption, "left"
        table.columns[0].no_wrap = True
        rows = [row for row in summary["rows"] if row["budget"] == budget]
        for row in sorted(rows, key=lambda row: (row["regret"] is None, row["regret"])):
            spend = "" if row["spend"] == 1 else f" x {row['spend']:g}"
            spread = f" ± {row['regret_spread']:.3f}" if row["regret_spread"] else ""
            regret = _figure(row["regret"], "{:.3f}") + spread
            ranks = [_figure(row["rank"], "{:.1f}"), _figure(row["first"], "{:.0%}")]
            table.add_row(
                row["strategy"] + spend,
                *([regret, _figure(row["half_width"], "{:.3f}")] if found else [*ranks, regret]),
                _figure(row["recall"], "{:.0%}"),
                _figure(row["agreement"], "{:.2f}"),
                f"{row['flops']:.1e}",
                "  ".join(map(_short, row["plans"])),
            )
        made.append(table)
    if summary["after_distillation"]:
        steps = summary["after_distillation"][0]["steps"]
        columns = ("strategy", "full", "loss before", "loss", "regret", "text loss")
        table = new_table(f"after {steps} steps of distillation", *columns)
        for row in summary["after_distillation"]:
            figures = [f"{row[name]:.3f}" for name in ("loss_before", "loss", "regret", "text_loss")]
            table.add_row(row["strategy"], _short(row["assignments"]), *figures)
        made.append(table)
    return made


def _about(budget: str, truth: dict) -> tuple[str, str | None]:
    """Title of a budget's table and, where its reference was found, how."""
    if not truth:
        return f"budget {budget}", None
    if truth["reference"] == "enumerated":
        best = f"best {_short(truth['best'])} at {truth['best_loss']:.3f} nats (median {truth['median_loss']:.2f})"
        return f"budget {budget}: {truth['plans']} plans, {best}", None
    swaps = f"{truth['swaps']} swap{'' if truth['swaps'] == 1 else 's'}"
    spent = f"{truth['plans_judged']:,} plans judged, {truth['tokens']:,} tokens"
    return (
        f"budget {budget}: best known {_short(truth['best_known'])} at {truth['best_known_loss']:.3f} nats",
        f"best known: {truth['came_from']} and {swaps}; {spent}; the local search {truth['local_search']}",
    )


def _short(assignments: dict[str, str]) -> str:
    from flashmorph.plan.plan import in_short

    return in_short(assignments).replace(", ", ",")


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
