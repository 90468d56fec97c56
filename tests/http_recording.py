"""Recorded HTTP answers: status line, headers, chunks and all."""

from __future__ import annotations

import gzip


def body_of(answer: bytes) -> bytes:
    """The body of an answer, without chunks and decompressed."""
    head, _, body = answer.partition(b"\r\n\r\n")
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        chunks, rest = [], body
        while (size := int(rest[: (end := rest.index(b"\r\n"))], 16)) > 0:
            chunks.append(rest[end + 2 : end + 2 + size])
            rest = rest[end + 2 + size + 2 :]
        body = b"".join(chunks)
    return gzip.decompress(body) if b"content-encoding: gzip" in head else body
