"""The commands that choose layers."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from flashmorph.cli.app import app
from flashmorph.cli.options import (
    OUT,
    BudgetOption,
    DeviceOption,
    Options,
    RecipeOption,
    SetOption,
    StrategyOption,
    TeacherArgument,
    open_run,
)
from flashmorph.errors import UserError


class _ListsStrategies(TyperCommand):
    """A command whose help ends with every strategy; only then are they imported."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        import inspect

        from flashmorph.selection import STRATEGIES

        modules = {name: inspect.getmodule(strategy) for name, strategy in STRATEGIES.items()}
        lines = {name: (module.__doc__ or "").split("\n\n")[0] for name, module in modules.items() if module}
        self.epilog = "Strategies:\n\n" + "\n\n".join(
            f"- `{name}`: {' '.join(line.split())}" for name, line in lines.items()
        )
        super().format_help(ctx, formatter)


@app.command(cls=_ListsStrategies)
def select(
    teacher: TeacherArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan, a JSON file.")],
    source: Annotated[Path, typer.Option("--from", help="The run whose alignment is used; the search is kept there.")],
    recipe: RecipeOption = None,
    budget: BudgetOption = None,
    strategy: StrategyOption = None,
    changes: SetOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Choose the layers that stay full, on a run that is aligned.

    Example: `flashmorph select tiny --from runs/demo --budget 3 --strategy greedy-forward --output plan.json`
    """
    from flashmorph import pipeline

    if recipe is None and (source / "stages").is_dir():
        recipe = str(_kept_recipe(source)) if _kept_recipe(source).is_file() else None
    options = Options(teacher, source, recipe, budget, changes, strategy=strategy, device=device)
    if not (source / "stages").is_dir():
        raise UserError(f"{source} is no run of flashmorph's: run `flashmorph align {teacher} --output {source}` first")
    run = open_run(options)
    host = pipeline.run_transplant(run)
    plan = pipeline.run_select(run, host, pipeline.run_align(run, host))
    plan.save(output)
    OUT.print(f"{plan.strip()}  layers {', '.join(map(str, plan.full_layers))} stay full; written: {output}")


def _kept_recipe(run: Path) -> Path:
    return run / "recipe.yaml"
