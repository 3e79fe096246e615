"""What Accept and Accept-Encoding prefer, as RFC 9110 has it, whatever is sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumon_core.web.accept import preferred

JSON, CSV, VERSIONED = "application/json", "text/csv", "text/plain; version=1; charset=utf-8"
OFFERS = (JSON, CSV, VERSIONED)


@pytest.mark.parametrize(
    ("header", "offer"),
    [
        ("", None),
        ("image/png", None),
        # Weights; without one it is 1, and 0 is a refusal.
        ("application/json;q=0.2, text/csv;q=0.3", CSV),
        ("application/json;q=0.999, text/csv", CSV),
        ("text/csv;q=0", None),
        ("TEXT/CSV ;\tQ=0.001", CSV),
        # The closest range counts, wherever it is in the list.
        ("*/*", JSON),
        ("text/*", CSV),
        ("application/json;q=0, */*", CSV),
        ("*/*, application/json;q=0", CSV),
        ("text/*, text/csv;q=0.1, application/json;q=0.5", VERSIONED),
        ("text/*;q=0, */*", JSON),
        ("text/plain;q=0.1, text/plain;version=1;q=0.9, text/csv;q=0.5", VERSIONED),
        # Of the same weight: what is named more closely, then what is named first.
        ("*/*, text/csv", CSV),
        ("text/csv, application/json", CSV),
        ("application/json, text/csv", JSON),
        # Parameters: another value is another type, one that the offer lacks is no obstacle.
        ("text/plain;version=2", None),
        ("text/plain;version=1;escaping=values", VERSIONED),
        ("text/plain;version=1;charset=latin-1", None),
        ("application/json;charset=utf-8", JSON),
        ('text/plain;version="1"', VERSIONED),
        ('text/plain;version="\\1"', VERSIONED),
        ('text/plain;note="a, text/csv;q=1";q=0.2, application/json;q=0.1', VERSIONED),
        # Empty parts are none, and what is malformed counts for nothing.
        (",, text/csv;;q=0.5;,", CSV),
        ("text/csv;q=1.5, application/json;q=0.1", JSON),
        ("text/csv;q=0.0001", None),
        ("text/csv;q=nan", None),
        ("text/csv;q=", None),
        ("text/csv;q", None),
        ("text/csv;q = 1", None),
        ("text/csv/x", None),
        ("te xt/csv", None),
        (";text/csv", None),
        ('text/csv;note="open, application/json', None),
    ],
)
def test_the_closest_choice_with_the_most_weight_wins(header: str, offer: str | None) -> None:
    assert preferred([header], OFFERS) == offer


@pytest.mark.parametrize(
    ("header", "offer"),
    [
        ("gzip, deflate, br", "gzip"),
        ("x-gzip", "gzip"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("gzip;q=0, *", "identity"),
        ("identity, gzip;q=0.5", "identity"),
        ("identity;q=0.5, gzip;q=1.0", "gzip"),
    ],
)
def test_codings_are_chosen_alike(header: str, offer: str | None) -> None:
    assert preferred([header], ("gzip", "identity")) == offer


def test_several_headers_are_one_list() -> None:
    assert preferred(["text/csv;q=0.5", "application/json;q=0.6"], OFFERS) == JSON
    assert preferred([], OFFERS) is None


@given(st.text(st.sampled_from('ac*/;,="\\q01. \t\xff'), max_size=80))
def test_whatever_is_sent_there_is_an_answer(header: str) -> None:
    assert preferred([header], OFFERS) in (*OFFERS, None)


@pytest.mark.parametrize("piece", ['"', '\\"', ",", ";", 'a;b="', "*/*;q=0,", " "])
def test_a_long_header_is_read_once(piece: str) -> None:
    assert preferred([piece * 20_000], OFFERS) is None
