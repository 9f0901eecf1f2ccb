"""Citations, read by an independent parser of BibTeX."""

import pytest
from pybtex.database import parse_string

import mtlgrad_jax as mtl
from mtlgrad_jax.registry import METHODS, ROWS

VENUE = {"inproceedings": "booktitle", "article": "journal", "book": "publisher", "misc": "eprint"}


def test_every_paper_is_cited_completely():
    titles = {}
    for row in ROWS.values():
        papers = parse_string(mtl.cite(row.name), "bibtex").entries if row.papers else {}
        assert len(papers) == len(row.papers), row.name
        for key, entry in papers.items():
            assert titles.setdefault(key, entry.fields["title"]) == entry.fields["title"]
            assert VENUE[entry.type] in entry.fields, key
            authors = entry.persons["author"]
            assert all(author.first_names and author.last_names for author in authors), key
            assert " ".join(authors[0].prelast_names + authors[0].last_names) in row.reference, key
            if "eprint" in entry.fields:  # an arXiv identifier begins with the year of its first version
                assert 2000 + int(entry.fields["eprint"][:2]) <= int(entry.fields["year"]), key
    assert len(set(titles.values())) == len(titles)


def test_only_baselines_have_no_paper():
    assert {row.name for row in METHODS if not row.papers} == {"mean", "sum", "constant"}


@pytest.mark.parametrize(
    ("name", "message"), [("cagard", "Similar names: cagrad"), ("?", "mtl.registry.ROWS"), ("mean", "no paper to cite")]
)
def test_what_cannot_be_cited(name, message):
    with pytest.raises(ValueError, match=message):
        mtl.cite(name)
