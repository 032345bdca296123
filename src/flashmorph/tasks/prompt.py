"""What a model is given to go on from, and how far its continuation is right."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """`input_ids` and the `references` that the next `answer_tokens` tokens must hold.

    With `anywhere`, each reference counts wherever it stands, in upper or lower case (RULER's string_match_all);
    without, the continuation must start with it.
    """

    input_ids: list[int]
    answer_tokens: int
    references: tuple[str, ...]
    anywhere: bool = False

    def score(self, generated: str) -> float:
        """The share of references that a continuation holds."""
        if self.anywhere:
            text = generated.lower()
            hits = [reference.lower() in text for reference in self.references]
        else:
            hits = [generated.startswith(reference) for reference in self.references]
        return sum(hits) / len(hits)
