"""Comparisons of two models in words, with their 95 % intervals."""

from flashmorph.evaluation.figures import Difference, Ratio


def points(figure: Difference) -> str:
    """A difference of shares in points: `-2.8 points (-4.6 to -1.0)`."""
    low, high = figure["interval"]
    return f"{100 * figure['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def times(figure: Ratio) -> str:
    """A ratio: `x 0.968 (0.951 to 0.985)`; without the brackets where the text was a single piece."""
    span = " ({:.3f} to {:.3f})".format(*figure["interval"]) if figure["interval"] else ""
    return f"x {figure['ratio']:.3f}{span}"
