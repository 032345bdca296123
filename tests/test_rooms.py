"""Rooms import from those above them only, importing changes nothing, and the command line changes on purpose only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import flashmorph
from flashmorph.cli import app

FLOORS = """
    errors progress units records own
    versions
    files losses devices distributed
    inputs
    surface
    plan tokens
    tasks mixers
    data hosts
    model
    convert
    stages evaluation bench
    selection
    recipe
    estimate
    run
    report
    pipeline
    referee
    cli
"""
"""From the ground up, as docs/architecture.md has it. Rooms of one line do not know each other."""
PACKAGE = Path(flashmorph.__file__).parent
LONGEST = 300

_MADE = (
    "output recipe budget strategy plan layers window mixers baseline data allow-repeat allow-unused from set device"
)
_BUILT = _MADE.replace(" baseline", "")
OPTIONS = {
    "morph": f"{_MADE} dry-run json",
    "transplant": "output set allow-unused device",
    "align": "output recipe window mixers data allow-repeat allow-unused from set device",
    "select": "from output recipe budget strategy curve within recall-questions max-plans set allow-unused force "
    "device json",
    "build": _BUILT,
    "distill": _BUILT,
    "extend": _BUILT,
    "evaluate": "recipe lengths depths questions dtype style grid-tasks tasks tokens report data set allow-unused "
    "force device json",
    "report": "output force",
    "generate": "prompt max-new-tokens allow-unused device",
    "bench": "lengths repeats decode-tokens dtype costs recipe window mixers set allow-unused force device json",
    "export": "gguf llama-cpp dtype force",
    "estimate": "recipe budget strategy baseline data window mixers set gpu gpus utilisation contexts explain costs "
    "force json",
    "compare": "output budgets strategies seeds spends questions recall-questions distill-steps distill-budget "
    "max-plans reference reference-tokens kept recipe data from set allow-unused force device json",
    "recipe": "json",
    "hosts": "json",
    "env": "json",
}
HIDDEN = ["plan"]
"""What commands were called in earlier versions."""


def imports(path: Path) -> Iterator[str]:
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashmorph":
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names]


def test_rooms_import_from_above_only():
    floors = {room: floor for floor, line in enumerate(FLOORS.split("\n")) for room in line.split()}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in set(imports(path)) - {room}:
            if floors[other] >= floors[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_every_room_is_on_a_floor_and_in_the_architecture():
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or is_package(path)}
    assert found - {"__init__", "__main__", "assets", "recipes"} == set(FLOORS.split())
    text = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    assert all(f"`{room}/`" in text or f"`{room}.py`" in text for room in FLOORS.split())


def is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def test_files_can_be_read_in_one_sitting():
    long = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST}


def test_importing_changes_no_other_library():
    script = (
        "import transformers.models.qwen3_5.modeling_qwen3_5 as modelling\n"
        "before = dict(vars(modelling))\n"
        "import flashmorph, flashmorph.hosts, flashmorph.model.morphable, flashmorph.pipeline.morph\n"
        "assert vars(modelling) == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_drawing_leaves_the_backend_of_a_notebook():
    """A picture is drawn without pyplot, whose state belongs to the notebook that imports flashmorph."""
    script = (
        "import sys, pathlib, tempfile\n"
        "from flashmorph.pipeline.curve import Curve, Point, draw_curve\n"
        "from flashmorph.referee import figures\n"
        "from flashmorph.report import still\n"
        "curve = Curve('gates', [Point({'layers.0': 'full'}, 'F', 1.0, 1.0, {'64': 1})])\n"
        "draw_curve(curve, 0.05, pathlib.Path(tempfile.mkdtemp()) / 'curve.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_loads_no_torch():
    script = "import sys\nfrom flashmorph.cli import app\nassert not {'torch', 'transformers'} & {*sys.modules}\n"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_command_line_is_what_it_was():
    """Whoever adds or renames an option changes this table, and CHANGELOG.md."""
    commands: Any = typer.main.get_command(app)
    found = {
        name: " ".join(option.opts[0].lstrip("-") for option in command.params if option.opts[0].startswith("-"))
        for name, command in commands.commands.items()
        if not command.hidden
    }
    assert found == OPTIONS
    assert [name for name, command in commands.commands.items() if command.hidden] == HIDDEN


def test_everything_at_top_level_is_there():
    assert all(getattr(flashmorph, name) is not None for name in flashmorph.__all__)
    assert dir(flashmorph) == sorted(flashmorph.__all__)


def test_a_public_name_has_one_home():
    """Type checkers read the imports, Python the table."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        name.name: (node.module or "").removeprefix("flashmorph.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported == flashmorph._HOMES
    assert sorted([*imported, "__version__"]) == sorted(flashmorph.__all__)
