"""Where a method was published: one set of facts for the short reference and the BibTeX entry."""

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A publication.

    Attributes:
      title: as printed.
      authors: all of them, separated by commas; `~` joins the words of a family name, as in "Nanne van~Noord".
      year: of publication.
      booktitle: proceedings it is in.
      journal: journal it is in.
      publisher: of a book.
      arxiv: identifier there.
      openreview: identifier there.
      doi: identifier.
    """

    title: str
    authors: str
    year: int
    booktitle: str = ""
    journal: str = ""
    publisher: str = ""
    arxiv: str = ""
    openreview: str = ""
    doi: str = ""

    def __str__(self) -> str:
        """Return a short reference: "Liu et al., NeurIPS 2021, arXiv 2110.14048"."""
        families = [family for family, _ in self._names()]
        who = f"{families[0]} et al." if len(families) > 3 else " & ".join(", ".join(families).rsplit(", ", 1))
        where = f"{self.booktitle or self.journal or self.publisher} {self.year}".lstrip()
        places = {"arXiv": self.arxiv, "OpenReview": self.openreview, "doi": self.doi}
        return ", ".join([who, where, *(f"{place} {name}" for place, name in places.items() if name)])

    def bibtex(self) -> str:
        """Return a BibTeX entry, whose key is made of the first author's family name, the year and the title."""
        kinds = {"inproceedings": self.booktitle, "article": self.journal, "book": self.publisher}
        kind = next((kind for kind, given in kinds.items() if given), "misc")
        family, title = self._names()[0][0], self.title.replace("-", " ").split()[0]
        letters = unicodedata.normalize("NFKD", f"{family}{self.year}{title}").lower()
        key = "".join(letter for letter in letters if letter.isascii() and letter.isalnum())
        fields = {
            "title": f"{{{self.title}}}",  # inner braces keep its capital letters
            "author": " and ".join(f"{family}, {given}" for family, given in self._names()),
            "year": self.year,
            "booktitle": self.booktitle,
            "journal": self.journal,
            "publisher": self.publisher,
            "eprint": self.arxiv,
            "archiveprefix": self.arxiv and "arXiv",
            "url": self.openreview and f"https://openreview.net/forum?id={self.openreview}",
            "doi": self.doi,
        }
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{kind}{{{key},", *lines, "}"])

    def _names(self) -> list[tuple[str, str]]:
        """Return family and given names."""
        names = (name.rpartition(" ") for name in self.authors.split(", "))
        return [(family.replace("~", " "), given) for given, _, family in names]
