"""Chunked bodies: the payload is the same however the bytes arrive, and bad ones are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.kubernetes.chunks import Dechunker


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_a_body_in_any_pieces(chunks, data):
    body = b"".join(b"%x;name=value\r\n%s\r\n" % (len(c), c) for c in chunks)
    body += data.draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n"]))
    dechunker, payload, position = Dechunker(), b"", 0
    while position < len(body):
        assert not dechunker.over
        size = data.draw(st.integers(1, len(body)))
        payload += dechunker.feed(body[position : position + size])
        position += size
    assert payload == b"".join(chunks)
    assert dechunker.over


def test_a_chunk_is_handed_out_before_it_is_complete():
    assert Dechunker().feed(b"a\r\n12345") == b"12345"


@pytest.mark.parametrize(
    "body",
    [b"-5\r\n", b"0x5\r\n", b"1_0\r\n", b"\r\nabc\r\n", b"2\r\nabc\r\n0\r\n\r\n", b"x" * 5000],
)
def test_what_is_not_chunked_is_refused(body):
    with pytest.raises(ValueError, match="chunk"):
        Dechunker().feed(body)
