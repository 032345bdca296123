"""What made-up objectives of searches have in common: nothing is kept, and progress is held within its bounds."""


class Forgetful:
    """The part of an `Objective` that has nothing to do with losses."""

    def restore(self, logits, optimizer, trace) -> int:
        return 0

    def keep(self, step, logits, optimizer, trace) -> None:
        pass

    def progress(self, done, total, **figures) -> None:
        assert 0 < done <= total

    def warn(self, text) -> None:
        pass
