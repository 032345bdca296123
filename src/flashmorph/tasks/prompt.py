"""A prompt and how its continuation is scored."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """`input_ids` and the `references` that the next `answer_tokens` tokens must hold.

    With `anywhere`, each reference counts at any position, in upper or lower case (RULER's string_match_all). Without,
    the continuation must start with it and then either contain `stop` or end.
    """

    input_ids: list[int]
    answer_tokens: int
    references: tuple[str, ...]
    anywhere: bool = False
    stop: str = ""

    def score(self, generated: str, ended: bool = False) -> float:
        """The share of references that a continuation holds; `ended` if the model generated an end token."""
        if self.anywhere:
            text = generated.lower()
            hits = [reference.lower() in text for reference in self.references]
        else:
            hits = [
                generated.startswith(reference + self.stop) or ended and generated.rstrip() == reference.rstrip()
                for reference in self.references
            ]
        return sum(hits) / len(hits)
