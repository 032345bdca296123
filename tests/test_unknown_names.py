"""Which known name is suggested for an unknown one, and which never."""

import random
import string

import pytest

from flashmorph.errors import nearest, unknown
from flashmorph.estimate.gpus import GPUS
from flashmorph.recipe.recipe import Recipe
from flashmorph.selection import STRATEGIES
from flashmorph.stages import AlignSettings

KNOWN = {
    "setting": tuple(Recipe.model_fields),
    "setting of align": tuple(f"align.{name}" for name in AlignSettings.model_fields),
    "strategy": tuple(STRATEGIES),
    "GPU": tuple(GPUS),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_slip_of_one_letter_is_seen(kind):
    """A letter left out, doubled, changed or exchanged with the next one, in names that are long enough to be known by
    the rest; where the slip makes it as near to another one, either is named."""
    rng = random.Random(0)
    for name in KNOWN[kind]:
        group, _, end = name.rpartition(".")
        if len(end) < 6:
            continue
        at = rng.randrange(1, len(end) - 1)
        slips = (
            end[:at] + end[at + 1 :],
            end[:at] + end[at] + end[at:],
            end[:at] + rng.choice(string.ascii_lowercase) + end[at + 1 :],
            end[:at] + end[at + 1] + end[at] + end[at + 2 :],
        )
        for slip in slips:
            found = nearest(f"{group}.{slip}" if group else slip, KNOWN[kind])
            assert found and sum(one == other for one, other in zip(found, name, strict=False)) >= at, (slip, found)


@pytest.mark.parametrize(
    "kind, name, meant",
    [
        ("strategy", "greedy", "greedy-"),
        ("strategy", "Race", "race"),
        ("GPU", "H100-SXM", "h100"),
        ("GPU", "a100-80gb", "a100"),
        ("setting of align", "align.batch", "align.batch_tokens"),
        ("setting", "budgets", "budget"),
    ],
)
def test_beginnings_are_seen(kind, name, meant):
    assert (nearest(name, KNOWN[kind]) or "").startswith(meant)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("GPU", "v100"),
        ("GPU", "tpu"),
        ("strategy", "random"),
        ("strategy", "x"),
        ("setting", "epochs"),
        ("setting", "lr"),
        ("setting of align", "align.epochs"),
        ("setting of align", "align.x"),
    ],
)
def test_what_is_like_nothing_is_answered_with_what_there_is(kind, name):
    """In groups of settings the group is the same in all of them, and makes none of them likely."""
    assert nearest(name, KNOWN[kind]) is None
    sentence = unknown(kind, name, KNOWN[kind])
    assert "did you mean" not in sentence and f"there are {KNOWN[kind][0]}, " in sentence
