"""Texts for calibration and labelled pairs for evaluation, from the test data inside the gensim wheel."""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from qlinear.demo.wheels import Wheel, fetch

_DATA = "gensim/test/test_data/"
_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
#: Only unzipped: any machine can read the data of this one.
GENSIM = Wheel(
    package="gensim==4.4.0",
    file="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    megabytes=28,
    what="Wikipedia articles (CC BY-SA) and rated documents in gensim's test data",
    members={
        _DATA + _WIKIPEDIA: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        _DATA + "lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
        _DATA + "lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
        _DATA + "similarities0-1.txt": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
    },
    pip_options=("--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
    uv_options=("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
)
NAME = "gensim-test-data"
#: Shorter pages are stubs and lists.
_SHORTEST = 2000


def wikipedia(no_download: bool = False, say: Callable[[str], None] = print) -> list[str]:
    """99 articles of the English Wikipedia as plain text, in the order of the dump.

    Raises:
        qlinear.demo.wheels.SourceError: the data cannot be had.
    """
    with bz2.open(fetch(GENSIM, NAME, no_download, say) / _WIKIPEDIA) as file:
        return articles(ElementTree.parse(file).getroot())


def articles(dump: ElementTree.Element) -> list[str]:
    """The plain text of the articles in a MediaWiki export: no redirects, no pages about pages, no stubs."""
    found = []
    for page in dump.iter():
        if not page.tag.endswith("}page") or page.find("{*}ns") is None or page.findtext("{*}ns") != "0":
            continue
        text = plain(page.findtext("{*}revision/{*}text") or "")
        if len(text) >= _SHORTEST and not text.lower().startswith("#redirect"):
            found.append(text)
    return found


def plain(markup: str) -> str:
    """Wiki markup as text: templates, tables, references, files and tags are dropped; links keep their words."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", markup, flags=re.DOTALL)
    # The innermost first, until none is left: these nest.
    for pattern in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}"):
        count = 1
        while count:
            text, count = re.subn(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]|<[^>]+>|'{2,}|={2,}[^=\n]*={2,}", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text.replace("&nbsp;", " ")).strip()


def rated_documents(no_download: bool = False, say: Callable[[str], None] = print) -> tuple[list[str], Tensor]:
    """50 short news documents and how similar people found each pair of them, 0 to 1, ``[50, 50]``.

    Lee, Pincombe and Welsh, "An empirical evaluation of models of text document similarity", 2005.

    Raises:
        qlinear.demo.wheels.SourceError: the data cannot be had.
    """
    folder = fetch(GENSIM, NAME, no_download, say)
    lines = (folder / "similarities0-1.txt").read_text().splitlines()
    ratings = [[float(word) for word in line.split()] for line in lines]
    upper = torch.tensor(ratings, dtype=torch.float64).triu()
    return documents(folder / "lee.cor"), upper + upper.triu(1).t()


def background_documents(no_download: bool = False, say: Callable[[str], None] = print) -> list[str]:
    """300 other news documents of the same study, for calibration.

    Raises:
        qlinear.demo.wheels.SourceError: the data cannot be had.
    """
    return documents(fetch(GENSIM, NAME, no_download, say) / "lee_background.cor")


def documents(path: Path) -> list[str]:
    """One document a line, Latin-1."""
    return [line for line in path.read_text("latin-1").split("\n") if line.strip()]
