"""Captions for training: cleaned, made from columns by templates, each kept once."""

import html
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import UserError, nearest

_SPACES = re.compile(r"\s+")
_SOURCE = re.compile(r"([\w.-]+):(?=\S)")
_SPOKEN_VOWEL = re.compile(r"\b([Aa]) (?=(?!uni|use|usu|eu|one\b|once\b)[aeiou])", re.IGNORECASE)
_PHRASE = re.compile(r"(a|an|the) |.* of |.*[:,(#]", re.IGNORECASE)  # "a photo of a river" takes no article or colour
_PLURAL = re.compile(r".*[^sui']s$", re.IGNORECASE)
_ARTICLE = re.compile(r".*\ban? \{", re.IGNORECASE)
_COLOUR = re.compile(
    r".*\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ea]y|teal|violet|gold|silver)\b", re.IGNORECASE
)
_TAGS = (
    "a|abbr|acronym|address|article|aside|b|big|blockquote|body|br|center|cite|code|dd|del|div|dl|dt|em|figcaption|"
    "figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|mark|meta|nav|ol|"
    "option|p|pre|q|s|script|section|select|small|source|span|strike|strong|style|sub|sup|table|tbody|td|textarea|tfoot|"
    "th|thead|time|title|tr|tt|u|ul|video"
)
_HTML = re.compile(rf"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.I | re.S)
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff]|[\ud800-\udfff]")


@dataclass(frozen=True)
class Template:
    """`a {colour} {name}`: a caption made of columns; for one source only where it starts with `source:`."""

    given: str
    source: str
    text: str

    def fill(self, columns: Mapping[str, Any]) -> str:
        """The caption; empty where a column is missing or empty, or where its value would not read well in it."""
        values = {field: str(columns.get(field) or "").strip() for field in self.fields()}
        if not all(values.values()):
            return ""
        if any(map(_PHRASE.match, values.values())):
            return ""
        if _ARTICLE.match(self.text) and _PLURAL.match(values[self.fields()[-1]]):
            return ""
        if sum(bool(_COLOUR.match(value)) for value in values.values()) > 1:
            return ""  # a brown heart that looks red is no "red brown heart"
        return _SPOKEN_VOWEL.sub(r"\1n ", clean(self.text.format(**values)))

    def fields(self) -> list[str]:
        """The columns it is made of, in order."""
        return [field for _, field, _, _ in string.Formatter().parse(self.text) if field is not None]


def read_templates(texts: Sequence[str], sources: Sequence[str]) -> list[Template]:
    """Templates as typed. UserError for braces that do not close and for a source that is not among `sources`."""
    templates = []
    for text in texts:
        source = match[1] if (match := _SOURCE.match(text)) else ""
        if source and source not in sources:
            raise UserError(f"no source is called {source!r}, as in {text!r}{nearest(source, list(sources))}")
        template = Template(text, source, text.removeprefix(f"{source}:").strip() if source else text.strip())
        try:
            fields = template.fields()
        except ValueError as error:
            raise UserError(f"caption template {text!r} cannot be read: {error}") from None
        if not all(re.fullmatch(r"\w+", field) for field in fields):
            raise UserError(f"caption template {text!r} needs plain column names such as {{name}} in its braces")
        templates.append(template)
    return templates


def clean(text: str) -> str:
    """Text on one line, without space at its ends."""
    return _SPACES.sub(" ", text).strip()


def plain(text: str) -> str:
    """Text without HTML's tags, entities and comments, without control characters, in Unicode's composed form (NFC).

    Only tags of HTML go: a `<cat-toy>` that stands for a learnt concept stays.
    """
    if "<" in text or "&" in text:
        text = html.unescape(_HTML.sub(" ", html.unescape(text)))  # a &lt;b&gt; is a tag too
        text = _HTML.sub(" ", text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return clean(_CONTROLS.sub("", text))


def own_captions(columns: Mapping[str, Any], tidy: Callable[[str], str] = clean) -> list[str]:
    """The captions that came with a picture, made tidy, each once."""
    return list(dict.fromkeys(filter(None, map(tidy, columns["captions"]))))
