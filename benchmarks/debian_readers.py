"""What is prose in the formats of Debian's documentation packages: pages as blocks of text (`debian_text.py`)."""

import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass(frozen=True)
class Block:
    """A paragraph, or a heading with its `level`."""

    text: str
    level: int = 0


@dataclass
class Page:
    """What a reader finds in a file: blocks, and how many characters of code it left out."""

    blocks: list[Block] = field(default_factory=list)
    code_characters: int = 0


class Markup(HTMLParser):
    """The blocks of a page in HTML or Mallard."""

    BLOCKS = frozenset(
        "address article blockquote body center dd div dl dt form hr item li list main ol p page section steps terms "
        "tr td th ul".split()
    )
    HEADINGS: dict[str, int] = {f"h{level}": level for level in range(1, 7)}
    SKIPPED = frozenset(
        "aside button code-block comment figure footer head header info input label listing math media menu nav pre "
        "screen script select style svg synopsis table textarea".split()
    )
    SKIPPED_CLASSES = frozenset(
        "contents docnav example-contents figure footer footnotes headerlink highlight howtoget informaltable "
        "legalnotice mobile-nav navfooter navheader page-next page-previous page-up programlisting refsynopsisdiv "
        "related relatedtopics screen sphinxsidebar synopsis table tablecontent toc toctree-wrapper url urls".split()
    )
    SKIPPED_PLACES = frozenset({"banner"})
    VARIANTS = frozenset("BASE BASIC CALC CHART DRAW IMPRESS MAC MATH WIN".split())
    """Help for several programs hides all variants of a phrase but one: that of Writer, on Linux, stays."""
    INLINE = frozenset({"a", "span"})
    CODE = frozenset({"pre", "screen", "listing", "synopsis"})
    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self._words: list[str] = []
        self._level = 0
        self._item = False
        self._broken = False
        self._skipped = ""
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        if self._skipped:
            self._depth += tag == self._skipped
            return
        named = dict(attrs)
        classes = (named.get("class") or "").split()
        is_hidden = tag in self.SKIPPED or not self.SKIPPED_CLASSES.isdisjoint(classes)
        is_hidden = is_hidden or named.get("id") in self.SKIPPED_PLACES
        is_hidden = is_hidden or "hidden" in named and not self.VARIANTS.isdisjoint(classes)
        if is_hidden and tag not in self.VOID:
            if tag not in self.INLINE:
                self._flush()
            self._skipped, self._depth = tag, 1
        elif tag in self.HEADINGS:
            self._flush()
            self._level = self.HEADINGS[tag]
        elif tag in self.BLOCKS:
            self._flush()
            self._item = self._item or tag in ("li", "item")
        elif tag == "br":
            self._words.append("\n" if self._level == 0 else " ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        # Mallard's empty links get their words from another page, and a sentence without them is none.
        self._broken = self._broken or tag == "link" and not self._skipped
        if not self._skipped and tag in ("br", "hr"):
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        if self._skipped:
            self._depth -= tag == self._skipped
            if self._depth == 0:
                self._skipped = ""
        elif tag in self.HEADINGS or tag in self.BLOCKS:
            self._flush()
            if tag in ("li", "item"):
                self._item = False

    def handle_data(self, data: str) -> None:  # noqa: D102
        if not self._skipped:
            self._words.append(data.replace("\n", " "))
        elif self._skipped in self.CODE:
            self.page.code_characters += len(data)

    def close(self) -> None:  # noqa: D102
        super().close()
        self._flush()

    def _flush(self) -> None:
        text = tidy("".join(self._words))
        if text and not self._broken:
            self.page.blocks.append(Block(f"- {text}" if self._item and not self._level else text, self._level))
        if text:
            self._item = False
        self._words, self._level, self._broken = [], 0, False


class Manual:
    """The blocks of a manual page in the macros of man(7)."""

    SKIPPED_SECTIONS = frozenset(
        {"SYNOPSIS", "SEE ALSO", "COLOPHON", "ATTRIBUTES", "AUTHORS", "AUTHOR", "COPYRIGHT", "LIBRARY", "EXAMPLES"}
    )
    SKIPPED_UNTIL: dict[str, str] = {"EX": "EE", "nf": "fi", "TS": "TE", "de": ".", "ig": ".", "EQ": "EN"}
    BREAKS = frozenset({"PP", "P", "LP", "RS", "RE", "sp", "br", "HP"})
    FONTS = frozenset({"B", "I", "SM", "SB", "R"})
    ALTERNATING = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})
    CHARACTERS: dict[str, str] = {
        "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "bu": "-", "ha": "^",
        "ti": "~", "ga": "`", "rs": "\\", "co": "©", "mu": "×", "+-": "±", "->": "→", "<=": "≤", ">=": "≥", "pl": "+",
        "hy": "-", "mi": "-", "eq": "=", "de": "°", "at": "@", "sh": "#", "Do": "$", "or": "|", "bv": "|",
    }  # fmt: skip
    ESCAPES = re.compile(
        r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[-+]?\d+|m\[[^]]*\]|[*]?\[(?P<long>[^]]*)\]|[*]?\((?P<short>..)|(?P<one>.)|$)"
    )
    ARGUMENTS = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
    ONE: dict[str, str] = {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": ".", "\\": "\\"}

    def __init__(self) -> None:
        self.page = Page()
        self._words: list[str] = []
        self._section: str | None = None
        self._waits = ""
        self._until = ""

    def read(self, text: str) -> Page:
        """The page in `text`."""
        for line in text.splitlines():
            if self._until:
                if line.startswith(f".{self._until}"):
                    self._until = ""
                else:
                    self.page.code_characters += len(line)
            elif line.startswith((".", "'")):
                self._macro(line[1:].strip())
            elif self._section not in self.SKIPPED_SECTIONS and self._section is not None:
                self._say(line)
        self._flush()
        return self.page

    def _macro(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        words = [quoted.replace('""', '"') if quoted else plain for quoted, plain in self.ARGUMENTS.findall(rest)]
        if name in ("SH", "SS"):
            self._heading(name, " ".join(words))
        elif name in self.SKIPPED_UNTIL:
            self._until = self.SKIPPED_UNTIL[name]
        elif self._section is None or self._section in self.SKIPPED_SECTIONS:
            return
        elif name in self.BREAKS:
            self._flush()
        elif name in ("TP", "TQ"):
            self._flush()
            self._waits = "tag"
        elif name == "IP":
            self._flush()
            self._tag(words[0] if words else "")
        elif name in self.FONTS:
            self._say(" ".join(words))
        elif name in self.ALTERNATING:
            self._say("".join(words))
        elif name in ("UE", "ME") and self._words and words:
            self._words[-1] += self._plain(words[0])

    def _heading(self, name: str, title: str) -> None:
        self._flush()
        if name == "SH":
            self._section = title
        if self._section not in self.SKIPPED_SECTIONS and title:
            self.page.blocks.append(Block(tidy(self._plain(title)), 2 if name == "SH" else 3))

    def _say(self, line: str) -> None:
        if self._waits:
            self._waits = ""
            self._tag(line)
        else:
            self._words.append(self._plain(line))

    def _tag(self, tag: str) -> None:
        plain = tidy(self._plain(tag))
        is_bullet = plain in ("-", "*", "·", "•", "o", "")
        self._words.append("-" if is_bullet and tag else f"{plain}:" if plain and plain[-1].isalnum() else plain)

    def _plain(self, text: str) -> str:
        return self.ESCAPES.sub(self._character, text)

    def _character(self, match: re.Match[str]) -> str:
        name = match["long"] or match["short"]
        if name:
            return self.CHARACTERS.get(name, "")
        return self.ONE.get(match["one"] or "", "")

    def _flush(self) -> None:
        text = tidy(" ".join(word for word in self._words if word))
        if text:
            self.page.blocks.append(Block(text))
        self._words, self._waits = [], ""


def tidy(text: str) -> str:
    """One space between words, no invisible characters; line breaks stay."""
    text = unicodedata.normalize("NFC", text).replace("¶", "")
    text = "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Zs") else " " for c in text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Co", "Cn"))
    lines = (re.sub(r" +([,;.!?)])(?=\s|$)", r"\1", re.sub(r" +", " ", line)).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def html_pages(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    """One page for each file in HTML."""
    for name, data in files.items():
        markup = Markup()
        markup.feed(data.decode("utf-8", "replace"))
        markup.close()
        yield name, markup.page


def mallard_pages(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    """One page for each file in Mallard, in whose names of elements HTML has other meanings."""
    for name, data in files.items():
        text = re.sub(r"<(/?)title\b", r"<\1h2", data.decode("utf-8", "replace"))
        text = re.sub(r"</key>\s*<key>", "+", text)
        text = re.sub(r"</gui>\s*<gui\b[^>]*>", " > ", text)
        text = re.sub(r"<code\b[^>]*\bmime=.*?</code>", "", text, flags=re.DOTALL)
        yield from html_pages({name: text.encode()})


def manual_pages(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    """One page for each file in man(7)."""
    for name, data in files.items():
        page = Manual().read(data.decode("utf-8", "replace"))
        title, _, section = name.rsplit("/", 1)[-1].removesuffix(".gz").rpartition(".")
        yield name, Page([Block(f"{title}({section})", 1), *page.blocks], page.code_characters)


def scripture_pages(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    """One page for each chapter of a module of SWORD in zText: `.bzs` has start and size of each book in `.bzz`."""
    for name in sorted(name for name in files if name.endswith(".bzs")):
        data = files[f"{name[:-1]}z"]
        for start, size, _ in struct.iter_unpack("<III", files[name]):
            yield from _chapters(zlib.decompress(data[start : start + size]).decode())


def _chapters(book: str) -> Iterator[tuple[str, Page]]:
    book = re.sub(r"<note\b.*?</note>", " ", book, flags=re.DOTALL)
    book = re.sub(r"<title\b.*?</title>", " ", book, flags=re.DOTALL)
    # The first book begins with the preface to all, which has a title of its own.
    titles = re.findall(r'<milestone n="([^"]*)" type="x-usfm-h"', book)
    starts = list(re.finditer(r'<chapter\b[^>]*\bn="(\d+)"[^>]*\bsID="([^"]*)"[^>]*>', book))
    for number, start in enumerate(starts):
        end = starts[number + 1].start() if number + 1 < len(starts) else len(book)
        text = re.sub(r"\s+", " ", book[start.end() : end])
        text = re.sub(r"<l\b[^>]*\beID=[^>]*>|<lb\b[^>]*>", "\n", text)
        text = re.sub(r'<(?:div|lg)\b[^>]*\btype="x-(?:p|m|q|b|pi|nb|pmo)\w*"[^>]*>|<lg\b[^>]*>', "\n\n", text)
        text = re.sub(r"<[^>]*>", "", text)
        blocks = [Block(tidy(part)) for part in re.split(r"\n *\n\s*", text) if tidy(part)]
        if titles:
            yield start[2], Page([Block(f"{titles[-1]} {start[1]}", 1), *blocks])


def mission_pages(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    """One page for each mission of Endless Sky: its story and dialogue, and of the player's answers the first."""
    for name, data in files.items():
        for mission in re.split(r"^(?=mission )", data.decode("utf-8", "replace"), flags=re.MULTILINE)[1:]:
            title = re.match(r'mission ["`](.*?)["`]', mission)
            story = list(_story(mission.splitlines()))
            yield f"{name}:{title[1]}" if title else name, Page([Block(title[1], 1), *story] if title else story)


def _story(lines: Sequence[str]) -> Iterator[Block]:
    choice, answered = -1, False
    for line in lines:
        indent = len(line) - len(line.lstrip("\t"))
        words = line.strip()
        if choice >= 0 and words and indent <= choice:
            choice = -1
        if words == "choice":
            choice, answered = indent, False
        elif words.startswith("`") and words.endswith("`") and not (choice >= 0 and answered):
            answered = choice >= 0
            text = words.strip("`").replace("<first>", "Ada").replace("<last>", "Reed").replace("<ship>", "Heron")
            if "<" not in text and not text.strip().startswith("("):
                yield Block(tidy(text))


def scenario_pages(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    """One page for each scenario of Wesnoth: its story, and its speeches with their speakers."""
    pattern = re.compile(
        r'^\s*(?:speaker=(?P<speaker>[^\n#]*)|(?P<key>message|story|name)\s*=\s*_\s*"(?P<text>(?:[^"]|"")*)")',
        re.MULTILINE,
    )
    for name, data in files.items():
        blocks, speaker = [], ""
        for match in pattern.finditer(data.decode("utf-8", "replace")):
            if match["text"] is None:
                speaker = match["speaker"].strip().strip('"')
                continue
            text = tidy(re.sub(r"<[^>]*>", "", match["text"].replace('""', '"')).replace("\n", " "))
            if match["key"] == "name":
                if not blocks:
                    blocks.append(Block(text, 1))
                continue
            is_named = match["key"] == "message" and re.fullmatch(r"[A-Z][\w' ]*", speaker)
            if "$" not in text and "|" not in text:
                blocks.append(Block(f"{speaker}: {text}" if is_named else text))
            speaker = ""
        yield name, Page(blocks)
