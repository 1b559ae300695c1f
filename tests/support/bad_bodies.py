"""Bodies that no route for text accepts."""

from __future__ import annotations

SECRET = "swordfish-4711"
TEXT_ROUTES = [
    "/generate",
    "/generate_stream",
    "/tokenize",
    "/v1/completions",
    "/v1/chat/completions",
]
BAD_BODIES = {
    "malformed": b'{"prompt": "' + SECRET.encode(),
    "a list": b'["' + SECRET.encode() + b'"]',
    "a string": b'"' + SECRET.encode() + b'"',
    "null": b"null",
    "empty": b"",
    "blank": b"  ",
    "wrong type": b'{"prompt": {"a": "' + SECRET.encode() + b'"}, "messages": 1}',
    "unknown field": b'{"' + SECRET.encode() + b'": 1}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe ' + SECRET.encode() + b'"}',
    "lone surrogate": b'{"prompt": "' + SECRET.encode() + b' \\ud800"}',
    "NaN": b'{"temperature": NaN, "prompt": "' + SECRET.encode() + b'"}',
    "Infinity": b'{"temperature": -Infinity}',
    "huge integer": b'{"seed": ' + b"9" * 5000 + b"}",
    "big integer": b'{"seed": ' + b"9" * 40 + b"}",
    "deep nesting": b"[" * 100_000,
    "pickle": b"\x80\x04\x95",
}
