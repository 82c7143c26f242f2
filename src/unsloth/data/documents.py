"""The text of documents: plain text, Markdown, HTML, Word, PDF and transcripts; files, or pages of the web."""

from __future__ import annotations

import codecs
import http.client
import importlib.util
import os
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from unsloth.core.errors import DataError, NetworkError

SUFFIXES = (".txt", ".md", ".html", ".htm", ".docx", ".pdf", ".srt", ".vtt")

_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_BLOCKS = {"p", "div", "li", "br", "tr", "table", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "title"}
_UNSEEN = {"script", "style", "template", "noscript", "svg"}
_WEB = ("http://", "https://")
_KINDS = {
    "text/html": ".html",
    "application/xhtml+xml": ".html",
    "text/plain": ".txt",
    "text/markdown": ".md",
    "text/vtt": ".vtt",
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
}
_LARGEST_PAGE = 100_000_000  # bytes
_META = re.compile(rb"""<meta[^>]+charset=["']?([\w.:-]+)""", re.IGNORECASE)
_TIMES = re.compile(r"^(WEBVTT.*|\d+|[\d:.,]+ --> .*)$", re.MULTILINE)


def read_document(source: str | os.PathLike[str], timeout: float = 30.0) -> str:
    """The text of a document, paragraphs separated by an empty line.

    Args:
        source: A file, or the address of a web page, with ``http://`` or ``https://``.
        timeout: Seconds to wait for a page.

    Raises:
        DataError: There is no such document, or it has no text; PDF also if the package ``pypdf`` is missing.
        NetworkError: The page could not be fetched.
    """
    if isinstance(source, str) and source.lower().startswith(_WEB):
        return _page(source, timeout)
    path = Path(source)
    if not path.is_file():
        raise DataError("there is no such document", got=path)
    return _text_of(path, path)


def _text_of(path: Path, source: object) -> str:
    readers = {".docx": _word, ".pdf": _pdf, ".html": _html, ".htm": _html, ".srt": _transcript, ".vtt": _transcript}
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError("documents of this kind cannot be read", got=source, do=f"Readable are {', '.join(SUFFIXES)}.")
    text = readers.get(suffix, _plain)(path)
    text = re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t\r]+\n", "\n", text)).strip()
    if not text:
        raise DataError(
            "the document has no text",
            got=source,
            do="A scanned PDF has to go through text recognition; a page that scripts fill in has to be saved first.",
        )
    return text


def _page(address: str, timeout: float) -> str:
    request = urllib.request.Request(address, headers={"User-Agent": "unsloth", "Accept": ", ".join(_KINDS)})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            data, headers = answer.read(_LARGEST_PAGE + 1), answer.headers
            if answer.length and len(data) <= _LARGEST_PAGE:  # what read() with a limit does not say
                raise http.client.IncompleteRead(data, answer.length)
    except urllib.error.HTTPError as error:
        raise NetworkError(
            f"the page was refused with status {error.code} ({error.reason})",
            got=address,
            do="Check the address in a browser; a page behind a login has to be saved to a file first.",
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        raise NetworkError(
            f"the page could not be fetched ({type(cause).__name__}: {cause})",
            got=address,
            do="Check the address and the network, or save the page and name the file.",
        ) from error
    if len(data) > _LARGEST_PAGE:
        raise DataError(f"the page has more than {_LARGEST_PAGE:,} bytes", got=address, do="Save it and cut it.")
    kind = headers.get_content_type()
    if kind not in _KINDS:
        raise DataError(
            f"the page is of the kind {kind}, which cannot be read",
            got=address,
            do=f"Readable are {', '.join(_KINDS)}.",
        )
    if kind.startswith("text/") or _KINDS[kind] == ".html":
        data = _decoded(data, headers, address).encode()
    with tempfile.TemporaryDirectory(prefix="unsloth-page-") as folder:
        path = Path(folder) / f"page{_KINDS[kind]}"
        path.write_bytes(data)
        return _text_of(path, address)


def _decoded(data: bytes, headers: Message, address: str) -> str:
    """A page as text, in the encoding that it names."""
    declared = _META.search(data[:2048])
    named = headers.get_content_charset() or (declared[1].decode("ascii", "replace") if declared else "utf-8")
    try:
        codecs.lookup(named)
    except LookupError:
        raise DataError("the page names an encoding that is unknown", got=named, do="Save it as UTF-8.") from None
    try:
        return data.decode(named)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{address}: the bytes are not {named} at byte {error.start}",
            do="Save the page as UTF-8, and name the file.",
        ) from None


def chunks(text: str, size: int, overlap: int = 0) -> list[str]:
    """Cut a text into pieces, between paragraphs or sentences where there are such.

    Args:
        text: The text.
        size: Characters of a piece at most.
        overlap: Characters at most that a piece repeats of the one before.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"size must be positive and overlap less than it: {size}, {overlap}")
    found, start = [], 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            window = text[start:end]
            cuts = [window.rfind(mark) + len(mark) for mark in ("\n\n", "\n", ". ", " ") if mark in window]
            end = start + next((cut for cut in cuts if cut > max(size // 2, overlap)), len(window))
        found.append(text[start:end].strip())
        start = end if end == len(text) else end - overlap
    return [piece for piece in found if piece]


def _plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the bytes are not UTF-8 at byte {error.start}", do="Save it as UTF-8.") from None


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.unseen = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.unseen += tag in _UNSEEN
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.unseen -= tag in _UNSEEN and self.unseen > 0
        if tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.parts.append(re.sub(r"\s+", " ", data))


def _html(path: Path) -> str:
    parser = _Text()
    parser.feed(_plain(path))
    return "".join(parser.parts)


def _word(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read("word/document.xml")
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path} is no Word file of the present format: {error}", do="Save it as .docx.") from None
    if b"<!DOCTYPE" in data[:1000]:
        raise DataError("a Word file must not declare entities", got=path, do="Do not use this file.")
    paragraphs = ElementTree.fromstring(data).iter(f"{_WORD}p")
    return "\n\n".join("".join(run.text or "" for run in paragraph.iter(f"{_WORD}t")) for paragraph in paragraphs)


def _pdf(path: Path) -> str:
    if importlib.util.find_spec("pypdf") is None:
        raise DataError("reading PDF needs the package pypdf", got=path, do="pip install pypdf")
    import pypdf

    try:
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except pypdf.errors.PyPdfError as error:
        raise DataError(f"{path} cannot be read: {error}", do="Save it again as PDF, or as text.") from None


def _transcript(path: Path) -> str:
    lines = [line.strip() for line in _TIMES.sub("", _plain(path)).splitlines()]
    return " ".join(re.sub(r"<[^>]+>", "", line) for line in lines if line)
