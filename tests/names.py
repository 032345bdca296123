"""Names that a folder, a task or a model may have, and that something between it and a reader may take for more."""

import random

WORDS = (
    # For a terminal.
    "[/]", "[red]", "[bold", "[link=https://example.org]", ":smile:", "\x1b[31m", "\x1b]0;title\x07", "\x1b[2J",
    "\r", "\t", "\n", "\b", "\x7f", "\x85", "\u2028", "\u202e", "\u200b", "\ufeff", "\u00ad",
    # For Markdown, YAML and HTML.
    "\\", "\\[", "`", "``", "```", "~~~", "*", "**", "_", "|", "#", "<b>", "<script>alert(1)</script>", "</script>",
    "<!--", "-->", "&amp;", "&lt", "![x](y)", "[x](y)", "\n\n# heading\n", "\n---\n", "* ", "---", "yes", "null", "1e5",
    ": ", "- x",
    # For shells, Python, matplotlib and plotly.
    "'", '"', "$", "$x^2$", "$(id)", "${HOME}", "%s", "%{text}", "{}", "{x!r}", "!", ";", "&&", "> out", "-rf", "--",
    " ", "  ",
    # For nobody.
    "é", "模型", "🤗", "👩‍🔬", "ـ", "name", "a.b", "Llama-3.1-8B",
)  # fmt: skip


def nasty_names(count: int, seed: int = 0) -> list[str]:
    """Each word alone, then mixtures of some."""
    chance = random.Random(seed)
    mixed = ["".join(chance.choices(WORDS, k=chance.randint(2, 6))) for _ in range(count)]
    return [*WORDS, *mixed]


def for_folders(names: list[str]) -> list[str]:
    """Those that can be one folder's name."""
    return [name for name in names if "/" not in name and name not in (".", "..") and len(name.encode()) < 200]
