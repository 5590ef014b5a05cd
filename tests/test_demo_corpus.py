"""The demo's texts and labelled pairs: parsing, without the network."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from models import byte_tokenizer

from qlinear.demo import corpus
from qlinear.demo.corpus import articles, plain, rated_documents
from qlinear.demo.encoder import batches, embed, pairs, spearman

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Algae''' are [[plant|plants]] in [[water]].", "Algae are plants in water."),
        ("a{{cite|b={{nested}}}}c", "ac"),
        ("a{| class=x\n|-\n| {| inner |} |}b", "ab"),
        ("one<ref name=x/> two<ref>three</ref> four<!-- five -->", "one two four"),
        ("[[File:x.png|thumb|a [[link]] inside]]text[[Category:y]][[de:z]]", "text"),
        ("see [http://example.org the site] and <small>this</small>&nbsp;too", "see the site and this too"),
        ("== Heading ==\n\n\n\nbody", "body"),
    ],
    ids=["links", "templates", "tables", "references", "files", "tags", "headings"],
)
def test_plain_text_of_wiki_markup(markup, text):
    assert plain(markup) == text


def test_articles_leave_out_redirects_stubs_and_pages_about_pages():
    page = "<page><ns>{}</ns><revision><text>{}</text></revision></page>"
    long = "word " * 1000
    pages = [(0, long), (0, "short"), (0, "#REDIRECT [[x]] " + long), (4, "about " + long)]
    xml = "".join(page.format(*each) for each in pages)
    dump = ElementTree.fromstring(f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.3/">{xml}</mediawiki>')
    assert articles(dump) == [long.strip()]


def test_ratings_are_symmetric(tmp_path, monkeypatch):
    (tmp_path / "lee.cor").write_text("café one\ntwo\n\nthree\n", "latin-1")
    (tmp_path / "similarities0-1.txt").write_text("1\t.2\t.3\n0\t1\t.4\n0\t0\t1\n")
    monkeypatch.setattr(corpus, "fetch", lambda *_: tmp_path)
    texts, ratings = rated_documents()
    assert texts == ["café one", "two", "three"]
    expected = torch.tensor([[1, 0.2, 0.3], [0.2, 1, 0.4], [0.3, 0.4, 1]], dtype=torch.float64)
    assert torch.equal(ratings, expected)
    assert torch.equal(pairs(ratings), expected[[0, 0, 1], [1, 2, 2]])


def test_spearman_counts_ranks_and_shares_ties():
    a = torch.tensor([3.0, 1, 2, 5])
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman(torch.tensor([1, 2, 2, 3]), torch.tensor([1, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_padding_does_not_change_an_embedding():
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    model, tokenizer = transformers.BertModel(config).eval(), byte_tokenizer()
    tokenizer.pad_token = "!"
    texts = ["short", "a good deal longer than that", "mid length"]
    together = embed(model, batches(tokenizer, texts, 3))
    alone = embed(model, batches(tokenizer, texts, 1))
    assert together.shape == (3, 32) and torch.allclose(together.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
