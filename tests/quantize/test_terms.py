"""The grammar of a loss."""

from __future__ import annotations

import pytest

from vllm_matquant.quantize.terms import SOURCE, Term, check_weights, named_widths, parse_terms, trained_widths


@pytest.mark.parametrize(
    ("text", "expected", "trained", "named"),
    [
        ("8,4,2", [(8, SOURCE), (4, SOURCE), (2, SOURCE)], (2, 4, 8), (2, 4, 8)),
        ("8,4,8->2", [(8, SOURCE), (4, SOURCE), (2, 8)], (2, 4, 8), (2, 4, 8)),
        ("8,4,2,8->2", [(8, SOURCE), (4, SOURCE), (2, SOURCE), (2, 8)], (2, 4, 8), (2, 4, 8)),
        ("8:text, 2:text,2", [(8, None), (2, None), (2, SOURCE)], (2, 8), (2, 8)),
        ("8->2,8->3", [(2, 8), (3, 8)], (2, 3), (2, 3, 8)),
        ("5", [(5, SOURCE)], (5,), (5,)),
    ],
)
def test_terms(text: str, expected: list[tuple[int, int | None]], trained: tuple[int, ...], named: object) -> None:
    terms = parse_terms(text)
    assert list(terms) == [Term(*each) for each in expected]
    assert ",".join(map(str, terms)) == text.replace(" ", "")
    assert trained_widths(terms) == trained
    assert named_widths(terms) == named


@pytest.mark.parametrize(
    "text", ["", "9", "1", "0", "0->2", "8->", "->2", "8>2", "2:words", "8->2:text", "8,,2", "4.5"]
)
def test_what_is_no_term_is_told_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match=r'expected terms separated by commas: "4" .*"4:text".*"8->2"'):
        parse_terms(text)


@pytest.mark.parametrize("text", ["2->8", "4->4"])
def test_a_teacher_is_wider(text: str) -> None:
    with pytest.raises(ValueError, match="expected a teacher that is wider than its pupil"):
        parse_terms(text)


def test_a_term_stands_once() -> None:
    with pytest.raises(ValueError, match="found 2 twice in '2,8,2'"):
        parse_terms("2,8,2")


def test_weights() -> None:
    terms = parse_terms("8,4,8->2")
    assert check_weights(terms, None) == (1, 1, 1)
    assert check_weights(terms, (0.1, 0.2, 0.3)) == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match=r"weights: found 4, expected 3, one for each term of 8,4,8->2"):
        check_weights(terms, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="weights: found 1, expected 3"):
        check_weights(terms, (1,))
