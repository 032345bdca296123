"""The grid's questions in the embedded teachers' own style: facts as lines, as their training has them.

The style has no form of RULER's uuids, several questions at once, common words and frequent words.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from flashmorph.tasks.haystack import Haystack
from flashmorph.tasks.layout import Layout
from flashmorph.tasks.prompt import Prompt
from flashmorph.tasks.questions import TASKS, TaskSettings
from flashmorph.tasks.style import STYLES
from flashmorph.tasks.words import names

FORMS = {
    "one_key_repeated": TaskSettings.model_validate({"task": "many_keys", "num_keys": 1}),
    "one_key": TaskSettings.model_validate({"task": "many_keys", "num_keys": 1}),
    "four_keys": TaskSettings.model_validate({"task": "many_keys", "num_keys": 4}),
    "sixteen_keys": TaskSettings.model_validate({"task": "many_keys", "num_keys": 16}),
    "four_values": TaskSettings.model_validate({"task": "many_values", "num_values": 4}),
    "two_hops": TaskSettings.model_validate({"task": "hops", "num_chains": 4}),
}
_REPEATED = "one_key_repeated"


class Lines:
    """Questions of every task in `FORMS`; the same seed, task, length and number always give the same one."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seed: int, chat_template: bool = False
    ):
        self._style = STYLES["lines"]
        self._text = Layout(tokenizer, self._style, Haystack(documents), chat_template)
        self._repeated = Layout(tokenizer, self._style, Haystack.repeated(), chat_template)
        self._seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks."""
        return tuple(FORMS)

    def has_depth(self, name: str) -> bool:
        """Whether the depth of what a task asks for can be chosen."""
        return FORMS[name].task == "many_keys"

    def prompt(self, name: str, length: int, number: int, depth: float | None) -> Prompt:
        """Question `number` of a task; prompt and answer take exactly `length` tokens.

        Raises:
            UserError: the task does not fit into `length` tokens.
        """
        rng = random.Random(f"{self._seed} {name} {length} {number}")
        task = FORMS[name]
        problem = TASKS[task.task](rng, self._style, names("test"), **task.settings)
        depths = sorted(rng.random() for _ in problem.facts)
        if depth is not None and problem.needle is not None:
            # The facts are exchangeable: the one asked for takes the rank that its depth has among the others.
            others = sorted(rng.random() for _ in problem.facts[1:])
            rank = sum(other < depth for other in others)
            facts = [fact for number, fact in enumerate(problem.facts) if number != problem.needle]
            facts.insert(rank, problem.facts[problem.needle])
            problem, depths = replace(problem, facts=tuple(facts), needle=rank), sorted([*others, depth])
        layout = self._repeated if name == _REPEATED else self._text
        return layout.lay_out(problem, length, rng, depths).prompt
