"""Names for synthetic facts, cut into splits so that no key of one split occurs in another."""

SPLITS = ("train", "validation", "referee", "test")
"""Keys and text of `train` serve training and search, `validation` the search's own checks, `referee` only
`compare`, and `test` only evaluation."""

# Each is one token of the embedded teachers' tokenizer: they have no task about a name of two tokens in their training.
_NAMES = {
    "train": """
        get mode from list that size section specified set argument there path element pattern file than default
        result with over base exception read open number but one case build key contain name master sequence
        same dictionary local new empty statement create raise end assign index follow found context user data
        directory any bytes first given prefix when format string member has add count
    """,
    "validation": """
        node only import source have item response start match all will call was option exist function out line
        support parent state method command
    """,
    "referee": """
        not they also implement range self use this into code object then variable must can message error
        attribute value should the version module
    """,
    "test": """
        frame server which oper instead other class more for return namespace entry time may current type run
        instance check some tuple test expression header
    """,
}


def names(split: str) -> tuple[str, ...]:
    """The words of `split`, disjoint from the words of every other split.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return tuple(_NAMES[split].split())
