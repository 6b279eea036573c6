"""HTTP/1.1 messages: requests from clients, answers to them, answers of upstreams.

The table of raw requests was written for this file. Its classes come from RFC 9110 and 9112 (section named in the row
where one rules) and from published research: PortSwigger's "HTTP Desync Attacks" and "Browser-Powered Desync Attacks"
(CL.TE, TE.CL, TE.TE by obfuscation, CL.0), the differences between parsers that the HTTP Garden project reports
(chunk-size spelling, bare CR and LF, chunk extensions, signs and underscores in numbers), "TE.0" and the funky-chunks
research (line ends in chunk extensions and behind chunk data), and the kinds of cases that the suites of llhttp, h11,
aiohttp and gunicorn hold.
"""

import gzip
import itertools
import random
import zlib

import pytest

import llm_router
from llm_router import (
    LAST_CHUNK,
    ChunkDecoder,
    HttpError,
    HttpLimits,
    Inflater,
    RequestParser,
    ResponseParser,
    RouterError,
    UpstreamProtocolError,
    encode_chunk,
    inflate,
    looks_gzipped,
    render_head,
    render_response,
    render_upstream_request,
)

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GOOD = b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
GOOD_RESULT = ("ok", "POST", "/good", b"{}", True)
SMALL = HttpLimits(max_body_bytes=1000)


def ok(body=b"", method="GET", target="/", keep_alive=True):
    return ("ok", method, target, body, keep_alive)


def posted(body=b"", keep_alive=True):
    return ok(body, "POST", "/", keep_alive)


def serve(parser, pieces):
    """What a server would see: each request as a tuple, then the status of a refusal, or "waits" for an unfinished one."""
    seen = []
    try:
        for piece in pieces:
            parser.feed(piece)
            while parser.head() is not None and parser.body() is not None:
                head = parser.head()
                seen.append(("ok", head.method, head.target, parser.body(), head.keep_alive))
                parser.next()
    except HttpError as error:
        return seen + [error.status]
    return seen + (["waits"] if parser.started else [])


def bytewise(raw):
    return [raw[at : at + 1] for at in range(len(raw))]


def results(expected):
    return expected if isinstance(expected, list) else [expected]


# (what, bytes, a refusal's status or the request, or a list when several results follow)
REQUEST_LINES = [
    ("plain GET", GET + b"\r\n", ok()),
    ("path and query", b"GET /v1/m?a=1&b=%20 HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/v1/m?a=1&b=%20")),
    ("second question mark", b"GET /?a?b HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/?a?b")),
    ("double slash", b"GET //x HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="//x")),
    ("dot segments stay", b"GET /a/../b HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/a/../b")),
    ("WHATWG leftovers", b"GET /a[1]|b?{x}^` HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/a[1]|b?{x}^`")),
    (
        "any token is a method",
        b"M-SEARCH!#$%&'*+.^_`|~9 / HTTP/1.1\r\nHost: a\r\n\r\n",
        ok(method="M-SEARCH!#$%&'*+.^_`|~9"),
    ),
    ("methods are case-sensitive", b"get / HTTP/1.1\r\nHost: a\r\n\r\n", ok(method="get")),
    ("HTTP/1.0 without Host", b"GET / HTTP/1.0\r\n\r\n", ok(keep_alive=False)),
    ("HTTP/1.0 with Host", b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", ok(keep_alive=False)),
    ("one leading CRLF (2.2)", b"\r\n" + GET + b"\r\n", ok()),
    ("four leading CRLFs", b"\r\n" * 4 + GET + b"\r\n", ok()),
    ("five leading CRLFs", b"\r\n" * 5 + GET + b"\r\n", 400),
    ("nothing but CRLFs", b"\r\n" * 50, 400),
    ("leading bare LF", b"\n" + GET + b"\r\n", 400),
    ("leading bare CR", b"\r" + GET + b"\r\n", 400),
    ("leading space", b" " + GET + b"\r\n", 400),
    ("leading tab", b"\t" + GET + b"\r\n", 400),
    ("leading NUL", b"\0" + GET + b"\r\n", 400),
    ("byte order mark", b"\xef\xbb\xbf" + GET + b"\r\n", 400),
    ("absolute-form (3.2.2)", b"GET http://a/x?y HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/x?y")),
    ("absolute-form, https and upper case", b"GET HTTPS://A:443/x HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/x")),
    ("absolute-form without path", b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/")),
    ("absolute-form, query only", b"GET http://a?x HTTP/1.1\r\nHost: a\r\n\r\n", ok(target="/?x")),
    (
        "absolute-form of OPTIONS without path",
        b"OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        ok(method="OPTIONS", target="*"),
    ),
    ("absolute-form without Host", b"GET http://a/ HTTP/1.1\r\n\r\n", 400),
    ("absolute-form without authority", b"GET http:/// HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("absolute-form with userinfo", b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("absolute-form with a bad port", b"GET http://a:x/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("absolute-form, foreign scheme", b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("scheme without slashes", b"GET http:a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("asterisk-form", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", ok(method="OPTIONS", target="*")),
    ("asterisk of another method", b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("asterisk and more", b"OPTIONS *x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("authority-form", b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", ok(method="CONNECT", target="a:443")),
    ("authority-form without port", b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("CONNECT with a path", b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("authority-form of another method", b"GET a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("relative path", b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("fragment", b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space in target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two spaces before target", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("two spaces before version", b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("tab for space", b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("vertical tab for space", b"GET /\x0bHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("trailing space", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    ("no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("empty target", b"GET  HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("no method", b" / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/0.9", b"GET /\r\n", 400),
    ("raw UTF-8 in target", "GET /ü HTTP/1.1\r\nHost: a\r\n\r\n".encode(), 400),
    ("NUL in target", b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("DEL in target", b"GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("quote in target", b'GET /" HTTP/1.1\r\nHost: a\r\n\r\n', 400),
    ("angle bracket in target", b"GET /<x> HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("backslash in target", b"GET /\\..\\x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("bare CR in target", b"GET /\rx HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("method with a slash", b"GE/T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("method with brackets", b"GET[] / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("method with a colon", b"GET: / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("raw high byte in method", b"G\xc9T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/1.2 is the highest known (9110 2.5)", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", ok()),
    ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ("HTTP/0.9 by name", b"GET / HTTP/0.9\r\n\r\n", 505),
    ("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505),
    ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    ("HTTP/01.1", b"GET / HTTP/01.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/1", b"GET / HTTP/1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/1,1", b"GET / HTTP/1,1\r\nHost: a\r\n\r\n", 400),
    ("http/1.1", b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("HTTPS/1.1", b"GET / HTTPS/1.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP /1.1", b"GET / HTTP /1.1\r\nHost: a\r\n\r\n", 400),
    ("ICE/1.0", b"GET / ICE/1.0\r\nHost: a\r\n\r\n", 400),
    ("superscript digit", b"GET / HTTP/1.\xb9\r\nHost: a\r\n\r\n", 400),
    ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("TLS hello begun", b"\x16", 400),
    ("SSLv2 hello", b"\x80\x2e\x01\x00\x02", 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("SOCKS greeting", b"\x05\x01\x00", 400),
    ("binary noise", b"\xde\xad\xbe\xef", 400),
    ("PROXY protocol line", b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + GET + b"\r\n", 400),
    ("an answer instead", b"HTTP/1.1 200 OK\r\n\r\n", 400),
    (
        "line of 8192 bytes",
        b"GET /" + b"a" * (8192 - 14) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        ok(target="/" + "a" * 8178),
    ),
    ("line of 8193 bytes", b"GET /" + b"a" * (8193 - 14) + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    ("endless line", b"GET /" + b"a" * 9000, 414),
    ("unfinished line", b"GET / HT", "waits"),
]

HEADERS = [
    ("blanks around values", GET + b"X:  \t v \t \r\n\r\n", ok()),
    ("no blank before a value", b"GET / HTTP/1.1\r\nHost:a\r\n\r\n", ok()),
    ("empty value", GET + b"X:\r\n\r\n", ok()),
    ("blank value", GET + b"X: \t \r\n\r\n", ok()),
    ("high bytes in a value", GET + b"X: \xff\xe4\r\n\r\n", ok()),
    ("tab inside a value", GET + b"X: a\tb\r\n\r\n", ok()),
    ("odd but valid name", GET + b"!#$%&'*+-.^_`|~9aZ: x\r\n\r\n", ok()),
    ("repeated unknown header", GET + b"X: 1\r\nX: 2\r\n\r\n", ok()),
    ("space before the colon (5.1)", GET + b"X : v\r\n\r\n", 400),
    ("tab before the colon", GET + b"X\t: v\r\n\r\n", 400),
    ("space before the colon of Content-Length", POST + b"Content-Length : 5\r\n\r\nabcde", 400),
    ("space before the colon of Transfer-Encoding", POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    ("folded line (5.2)", GET + b"X: a\r\n b\r\n\r\n", 400),
    ("folded with a tab", GET + b"X: a\r\n\tb\r\n\r\n", 400),
    ("first header folded", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    ("folded Transfer-Encoding", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    ("line of blanks only", GET + b" \r\n\r\n", 400),
    ("no colon", GET + b"X\r\n\r\n", 400),
    ("empty name", GET + b": v\r\n\r\n", 400),
    ("space in name", GET + b"X Y: v\r\n\r\n", 400),
    ("high byte in name", GET + b"X\xe4: v\r\n\r\n", 400),
    ("bracket in name", GET + b"X[]: v\r\n\r\n", 400),
    ("quoted name", GET + b'"X": v\r\n\r\n', 400),
    ("NUL in name", GET + b"X\0: v\r\n\r\n", 400),
    ("NUL in value", GET + b"X: a\0b\r\n\r\n", 400),
    ("control in value", GET + b"X: a\x01b\r\n\r\n", 400),
    ("escape in value", GET + b"X: a\x1b[31m\r\n\r\n", 400),
    ("vertical tab in value", GET + b"X: a\x0bb\r\n\r\n", 400),
    ("form feed in value", GET + b"X: a\x0cb\r\n\r\n", 400),
    ("DEL in value", GET + b"X: a\x7fb\r\n\r\n", 400),
    ("bare CR in value", GET + b"X: a\rb\r\n\r\n", 400),
    ("bare CR that hides a header", GET + b"X: a\rContent-Length: 5\r\n\r\n", 400),
    ("bare LF in value", GET + b"X: a\nb: c\r\n\r\n", 400),
    ("double CR before LF", GET + b"X: a\r\r\n\r\n", 400),
    ("LF line ends", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("LF after the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("LF blank line", GET + b"\n", 400),
    ("CR line ends", b"GET / HTTP/1.1\rHost: a\r\r", 400),
    ("CR for the blank line", GET + b"\rX", 400),
    ("end of head in two ways", GET + b"X: a\n\r\n\r\n", 400),
    ("100 headers", GET + b"X: y\r\n" * 99 + b"\r\n", ok()),
    ("101 headers", GET + b"X: y\r\n" * 100 + b"\r\n", 431),
    ("head of 64 KiB", GET + b"X: " + b"a" * (65536 - len(GET) - 7) + b"\r\n\r\n", ok()),
    ("head of 64 KiB and 1", GET + b"X: " + b"a" * (65536 - len(GET) - 6) + b"\r\n\r\n", 431),
    ("endless header", GET + b"X: " + b"a" * 66000, 431),
    ("unfinished head", GET + b"X: y\r\n", "waits"),
    ("unfinished head with half a blank line", GET + b"\r", "waits"),
]

HOSTS = (
    [
        ("no Host (3.2)", b"GET / HTTP/1.1\r\n\r\n", 400),
        ("two Hosts", GET + b"Host: b\r\n\r\n", 400),
        ("the same Host twice", GET + b"host: a\r\n\r\n", 400),
        ("two Hosts in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("bad Host in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a/b\r\n\r\n", 400),
    ]
    + [
        ("Host %r" % host, b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host, expected)
        for hosts, expected in [
            (
                (
                    b"localhost localhost:8787 127.0.0.1:1 a.b-c_d.example a. [::1] [::1]:8787 [fe80::1:2] [1:2:3:4:5:6:7:8] [::ffff:1.2.3.4] "
                    b"[::] [1::] a: 256.1.1.1 xn--nxasmq6b %C3%BC.example a:00080 a!$&'()*+,;=~ a:65535"
                ),
                ok(),
            ),
            (
                (
                    b"x/y x?y u@x x#y x\\y http://x a:b a:-1 a:+1 a:65536 a:999999 a:1:2 :80 ::1 [::1 ::1] [::1]x [::1]:x [] [:] [:::] [1] [1:2:3:4:5:6:7] "
                    b'[1:2:3:4:5:6:7:8:9] [12345::] [g::] [::1.2.3] [::1.2.3.4.] [::1.2.3.256] [::1%25eth0] [v1.x] [1::2::3] [1.2.3.4::] "a" <a> a%zz a%2 {a} a^b a|b '
                    b"a\xe4 a\xc2\xb2"
                ),
                400,
            ),
        ]
        for host in hosts.split(b" ")
    ]
    + [
        ("empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        ("two names in one Host", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("a list in Host", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ]
)

LENGTHS = [
    ("Content-Length", POST + b"Content-Length: 5\r\n\r\nabcde", posted(b"abcde")),
    ("Content-Length 0", POST + b"Content-Length: 0\r\n\r\n", posted()),
    ("leading zeros", POST + b"Content-Length: 0005\r\n\r\nabcde", posted(b"abcde")),
    ("neither length nor coding (6.3)", POST + b"\r\n", posted()),
    ("GET with a body (CL.0)", GET + b"Content-Length: 5\r\n\r\nGET /", ok(b"GET /")),
    ("HTTP/1.0 with Content-Length", b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\nab", posted(b"ab", False)),
    ("binary body", POST + b"Content-Length: 4\r\n\r\n\r\n\0\xff", posted(b"\r\n\0\xff")),
    ("body of the limit", POST + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000, posted(b"x" * 1000)),
    ("body above the limit", POST + b"Content-Length: 1001\r\n\r\n", 413),
    ("unfinished body", POST + b"Content-Length: 5\r\n\r\nabc", "waits"),
    ("two different lengths", POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
    ("two equal lengths", POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde", 400),
    ("two equal lengths, other case", POST + b"Content-Length: 5\r\ncontent-LENGTH: 5\r\n\r\nabcde", 400),
    ("length of 19 digits", POST + b"Content-Length: 9999999999999999999\r\n\r\n", 413),
    ("length above 64 bits", POST + b"Content-Length: 18446744073709551621\r\n\r\nabcde", 413),
    ("length of 5000 digits", POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
] + [
    ("Content-Length %r" % value, POST + b"Content-Length: %s\r\n\r\nabcde" % value, 400)
    for value in (
        b"", b"+5", b"-5", b"5,5", b"5, 5", b"5 5", b"5;", b"5.0", b"0x5", b"5e0", b"5_0", b"1_0", b"'5'", b'"5"', b"five", b"\xb2", b"\xd9\xa5", b"5\x00", b"5\x0b",
        b"\x0c5", b",5", b"5,", b"- 5", b"--5", b"NaN", b"5\xa0", b"0b1", b"0o5", b"5L", b"\xef\xbc\x95",
    )
]  # fmt: skip

CODINGS = [
    ("chunked in upper case", POST + b"Transfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\n", posted()),
    ("blanks around chunked", POST + b"Transfer-Encoding: \t chunked \t\r\n\r\n0\r\n\r\n", posted()),
    ("CL and TE (CL.TE)", POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", 400),
    ("TE and CL (TE.CL)", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\nGPOST", 400),
    ("TE and CL 0", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n", 400),
    ("identity and CL", POST + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nabcde", 400),
    ("unknown coding and CL", POST + b"Transfer-Encoding: cow\r\nContent-Length: 5\r\n\r\nabcde", 400),
    ("chunked in HTTP/1.0 (6.1)", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("two codings in two lines (TE.TE)", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow\r\n\r\n0\r\n\r\n", 400),
    ("identity in a second line", POST + b"Transfer-Encoding: chunked\r\nTransfer-encoding: identity\r\n\r\n0\r\n\r\n", 400),
    ("chunked twice", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("gzip in a line of its own", POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    ("a line feed before the header", POST + b"X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("header in a header", POST + b"X: X[\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("underscore is another header", POST + b"Transfer_Encoding: chunked\r\nContent-Length: 2\r\n\r\nab", posted(b"ab")),
] + [
    ("Transfer-Encoding %r" % value, POST + b"Transfer-Encoding:%s\r\n\r\n0\r\n\r\n" % value, expected)
    for expected, values in {
        400: (
            b"", b" ", b" xchunked", b" chunkedx", b" chunked,", b" ,chunked", b" chunked, chunked", b" chunked, identity", b" identity", b" identity, chunked",
            b" cow", b" gzip", b" chunked, gzip", b" chunked;q=1", b' "chunked"', b" 'chunked'", b" chun ked", b" \x0bchunked", b" chunked\x00", b" chunked\x0b", b"\x00chunked",
            b" chunked\xa0", b" \xa0chunked", b" \xc5\xbfchunked", b" chunKed\x7f", b" gzip\xe4, chunked", b" gzip;x, chunked", b" chunk", b" c\xe7unked",
        ),
        501: (b" gzip, chunked", b" gzip,chunked", b" deflate, gzip, chunked", b" x, chunked"),
    }.items()
    for value in values
]  # fmt: skip

CHUNKS = [
    ("one chunk", CHUNKED + b"5\r\nabcde\r\n0\r\n\r\n", posted(b"abcde")),
    ("two chunks", CHUNKED + b"5\r\nabcde\r\n1\r\nf\r\n0\r\n\r\n", posted(b"abcdef")),
    ("no chunk", CHUNKED + b"0\r\n\r\n", posted()),
    ("hex in both cases", CHUNKED + b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", posted(b"0123456789" * 2)),
    ("leading zeros", CHUNKED + b"0005\r\nabcde\r\n000\r\n\r\n", posted(b"abcde")),
    ("CRLF as data", CHUNKED + b"2\r\n\r\n\r\n0\r\n\r\n", posted(b"\r\n")),
    ("an end inside data", CHUNKED + b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", posted(b"\r\n0\r\n\r\n")),
    ("GET with chunks", GET + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", ok(b"x")),
    ("extension (7.1.1)", CHUNKED + b"5;a\r\nabcde\r\n0;b=c\r\n\r\n", posted(b"abcde")),
    ("several extensions", CHUNKED + b'5;a;b=c;d="e\\"; \t"\r\nabcde\r\n0\r\n\r\n', posted(b"abcde")),
    ("blanks in an extension", CHUNKED + b"5 ; a = b\r\nabcde\r\n0\r\n\r\n", posted(b"abcde")),
    ("trailers are dropped", CHUNKED + b"0\r\nX: y\r\nContent-Length: 5\r\n\r\n", posted()),
    ("body of the limit", CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n", posted(b"x" * 1000)),
    ("chunk above the limit", CHUNKED + b"3e9\r\n", 413),
    ("chunks above the limit", CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\n", 413),
    ("chunk above 64 bits", CHUNKED + b"FFFFFFFFFFFFFFFF\r\n", 413),
    ("chunk size that wraps 64 bits", CHUNKED + b"10000000000000005\r\nabcde\r\n0\r\n\r\n", 400),
    ("size of many zeros", CHUNKED + b"0" * 17 + b"5\r\nabcde\r\n0\r\n\r\n", 400),
    ("no last chunk", CHUNKED + b"5\r\nabcde\r\n", "waits"),
    ("no end of trailers", CHUNKED + b"0\r\nX: y\r\n", "waits"),
    ("LF after the size", CHUNKED + b"5\nabcde\r\n0\r\n\r\n", 400),
    ("CR after the size", CHUNKED + b"5\rabcde\r\n0\r\n\r\n", 400),
    ("LF after the data", CHUNKED + b"5\r\nabcde\n0\r\n\r\n", 400),
    ("CR after the data", CHUNKED + b"5\r\nabcde\r0\r\n\r\n", 400),
    ("nothing after the data", CHUNKED + b"5\r\nabcde0\r\n\r\n", 400),
    ("two bytes that are no CRLF after the data", CHUNKED + b"5\r\nabcdeXX0\r\n\r\n", 400),
    ("more data than said", CHUNKED + b"5\r\nabcdef\r\n0\r\n\r\n", 400),
    ("less data than said", CHUNKED + b"5\r\nabc\r\n0\r\n\r\n", 400),
    ("LF after the last chunk", CHUNKED + b"0\n\r\n", 400),
    ("LF for the end", CHUNKED + b"0\r\n\n", 400),
    ("CR for the end", CHUNKED + b"0\r\n\rX", 400),
    ("line of 1024 bytes", CHUNKED + b"1;" + b"a" * 1020 + b"\r\nx\r\n0\r\n\r\n", posted(b"x")),
    ("line of 1025 bytes", CHUNKED + b"1;" + b"a" * 1021 + b"\r\nx\r\n0\r\n\r\n", 400),
    ("endless extension", CHUNKED + b"1;" + b"a" * 5000, 400),
    ("too much extension in total", CHUNKED + (b"1;" + b"a" * 1000 + b"\r\nx\r\n") * 17, 400),
    ("32 trailers", CHUNKED + b"0\r\n" + b"X: y\r\n" * 32 + b"\r\n", posted()),
    ("33 trailers", CHUNKED + b"0\r\n" + b"X: y\r\n" * 33 + b"\r\n", 431),
    ("endless trailer", CHUNKED + b"0\r\nX: " + b"y" * 9000, 431),
    ("trailer without colon", CHUNKED + b"0\r\nX\r\n\r\n", 400),
    ("folded trailer", CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n", 400),
    ("blank before the colon of a trailer", CHUNKED + b"0\r\nX : y\r\n\r\n", 400),
    ("NUL in a trailer", CHUNKED + b"0\r\nX: \0\r\n\r\n", 400),
    ("bare CR in a trailer", CHUNKED + b"0\r\nX: a\rb\r\n\r\n", 400),
    ("LF behind a trailer", CHUNKED + b"0\r\nX: y\n\r\n", 400),
    ("a request for a trailer", CHUNKED + b"0\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
] + [
    ("chunk size %r" % size, CHUNKED + size + b"\r\nabcde\r\n0\r\n\r\n", 400)
    for size in (
        b"", b" ", b"5 ", b" 5", b"\t5", b"5\t", b"+5", b"-5", b"0x5", b"0X5", b"5h", b"g", b"5_", b"0_5", b"5.", b"5,5", b"\xb2", b"\xef\xbc\x95", b"5\x00", b"5\x0b", b"5\xa0",
        b"5;", b"5;=", b"5;a=", b"5;a b", b'5;a="', b'5;a="b', b"5;a\x00", b"5;a=\x01", b"5;a\rb", b"5;a\nb", b"5 a", b"5;;a", b'5;"a"', b"5;a=b=c", b"5;\xe4", b'5;a="\\\x01"', b"#5",
    )
]  # fmt: skip

CONNECTIONS = [
    ("close", GET + b"Connection: close\r\n\r\n", ok(keep_alive=False)),
    ("Close in another case", GET + b"Connection: CLOSE\r\n\r\n", ok(keep_alive=False)),
    ("close in a list", GET + b"Connection: keep-alive , close\r\n\r\n", ok(keep_alive=False)),
    ("close in a second line", GET + b"Connection: keep-alive\r\nConnection: close\r\n\r\n", ok(keep_alive=False)),
    ("keep-alive", GET + b"Connection: keep-alive\r\n\r\n", ok()),
    ("some other option", GET + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n", ok()),
    ("closed is not close", GET + b"Connection: closed\r\n\r\n", ok()),
    ("HTTP/1.0 keep-alive", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", ok()),
    ("HTTP/1.0 keep-alive and close", b"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n", ok(keep_alive=False)),
    ("HTTP/1.0 other option", b"GET / HTTP/1.0\r\nConnection: upgrade\r\n\r\n", ok(keep_alive=False)),
    ("100-continue", POST + b"Expect: 100-Continue\r\nContent-Length: 1\r\n\r\nx", posted(b"x")),
    ("unknown expectation (9110 10.1.1)", POST + b"Expect: 200-ok\r\nContent-Length: 1\r\n\r\nx", 417),
    ("empty expectation", GET + b"Expect:\r\n\r\n", 417),
    ("a list of expectations", POST + b"Expect: 100-continue, x\r\nContent-Length: 1\r\n\r\nx", 417),
    ("a second expectation", POST + b"Expect: 100-continue\r\nExpect: x\r\nContent-Length: 1\r\n\r\nx", 417),
    ("expectation in HTTP/1.0", b"POST / HTTP/1.0\r\nExpect: x\r\nContent-Length: 1\r\n\r\nx", posted(b"x", False)),
    ("pipelined", GET + b"\r\n" + POST + b"Content-Length: 1\r\n\r\nx" + CHUNKED + b"1\r\ny\r\n0\r\n\r\n" + GET + b"\r\n", [ok(), posted(b"x"), posted(b"y"), ok()]),
    ("CRLF behind a body", POST + b"Content-Length: 1\r\n\r\nx\r\n" + GET + b"\r\n", [posted(b"x"), ok()]),
    ("a body that ends in CR, then LF", POST + b"Content-Length: 2\r\n\r\nx\r\n" + GET + b"\r\n", [posted(b"x\r"), 400]),
    ("a body that ends in CR, then LF alone", POST + b"Content-Length: 2\r\n\r\nx\r\n", [posted(b"x\r"), 400]),
    ("a bad request behind a good one", GET + b"\r\n" + b"GET / HTTP/3.0\r\n\r\n", [ok(), 505]),
    ("garbage behind a good one", GET + b"\r\n\x16\x03", [ok(), 400]),
    ("body longer than said", POST + b"Content-Length: 1\r\n\r\nxGET / HTTP/1.1\r\n\r\n", [posted(b"x"), 400]),
    ("bad chunks behind a good request", GET + b"\r\n" + CHUNKED + b"x", [ok(), 400]),
]  # fmt: skip

CASES = REQUEST_LINES + HEADERS + HOSTS + LENGTHS + CODINGS + CHUNKS + CONNECTIONS
IDS = ["%03d %s" % (number, case[0]) for number, case in enumerate(CASES)]
every_case = pytest.mark.parametrize(("raw", "expected"), [case[1:] for case in CASES], ids=IDS)


def test_the_table_is_large():
    assert len(CASES) >= 300
    assert len({case[1] for case in CASES}) > len(CASES) - 5


@every_case
def test_a_request_is_read_or_refused(raw, expected):
    """HARDENING: framing, Host and limits."""
    assert serve(RequestParser(SMALL), [raw]) == results(expected)


@every_case
def test_a_request_is_the_same_byte_by_byte(raw, expected):
    assert serve(RequestParser(SMALL), bytewise(raw)) == results(expected)


@every_case
def test_a_request_is_the_same_behind_a_good_one(raw, expected):
    assert serve(RequestParser(SMALL), [GOOD + raw]) == [GOOD_RESULT, *results(expected)]
    assert serve(RequestParser(SMALL), [GOOD, raw]) == [GOOD_RESULT, *results(expected)]


@every_case
def test_a_request_is_the_same_at_every_cut(raw, expected):
    step = max(1, len(raw) // 60)
    for cut in range(0, len(raw), step):
        assert serve(RequestParser(SMALL), [raw[:cut], raw[cut:]]) == results(expected), cut


@every_case
def test_a_good_request_behind_is_only_served_after_a_good_one(raw, expected):
    """No desync: whatever was refused takes the rest of the connection with it."""
    seen = serve(RequestParser(SMALL), [raw + GOOD])
    if results(expected)[-1] == "waits":
        return
    if isinstance(results(expected)[-1], tuple):
        assert seen == [*results(expected), GOOD_RESULT]
    else:
        assert GOOD_RESULT not in seen


def test_heads_carry_what_was_sent():
    parser = RequestParser()
    parser.feed(b"POST /a%20b?c=d HTTP/1.1\r\nHOST: a:1\r\nX-Thing:  \xe4 \tv\t\r\nx-thing: 2\r\n\r\n")
    head = parser.head()
    assert (head.method, head.target, head.path, head.query, head.version) == (
        "POST",
        "/a%20b?c=d",
        "/a%20b",
        "c=d",
        (1, 1),
    )
    assert head.headers == [("host", "a:1"), ("x-thing", "\xe4 \tv"), ("x-thing", "2")]
    assert head.keep_alive


@pytest.mark.parametrize("host", ["evil.example", "a"])
def test_the_authority_of_the_target_replaces_host(host):
    """RFC 9112 3.2.2: checks of Host, auth and routing all see the one that counts."""
    parser = RequestParser()
    parser.feed(b"GET http://[::1]:80/x HTTP/1.1\r\nA: b\r\nHost: %s\r\n\r\n" % host.encode())
    assert parser.head().headers == [("a", "b"), ("host", "[::1]:80")]
    assert parser.head().path == "/x"


def test_the_authority_of_the_target_counts_also_without_host():
    """In HTTP/1.0 there may be none: who must not be called by that name is not called by it this way either."""
    parser = RequestParser()
    parser.feed(b"GET http://evil.example/x HTTP/1.0\r\n\r\n")
    assert parser.head().headers == [("host", "evil.example")]


def test_a_head_does_not_wait_for_its_body():
    parser = RequestParser()
    parser.feed(POST + b"Content-Length: 3\r\n\r\n")
    assert parser.head().method == "POST"
    assert parser.body() is None
    parser.feed(b"ab")
    assert (parser.body(), parser.body_size, parser.has_more) == (None, 2, False)
    parser.feed(b"cGET")
    assert (parser.body(), parser.body_size, parser.has_more) == (b"abc", 3, True)
    assert parser.body() == b"abc"
    parser.next()
    assert (parser.head(), parser.body(), parser.started, parser.has_more) == (None, None, True, True)


def test_a_body_that_is_too_long_is_refused_when_it_is_asked_for():
    """Until then its request is one like any other: who may not call is told so first."""
    parser = RequestParser(SMALL)
    parser.feed(POST + b"Content-Length: 1001\r\n\r\n")
    assert parser.head().method == "POST"
    for _ in range(2):
        with pytest.raises(HttpError) as caught:
            parser.body()
        assert caught.value.status == 413


def test_a_body_nobody_wants_is_not_held_and_can_be_read_to_its_end_all_the_same():
    parser = RequestParser()
    parser.feed(POST + b"Content-Length: 6\r\n\r\nabcd")
    assert (parser.head().method, parser.body(), parser.body_size) == ("POST", None, 4)
    parser.drop_body()
    assert parser.body_size == 0
    parser.feed(b"efGET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert parser.body() is not None
    parser.drop_body()
    assert parser.body_size == 0
    parser.next()
    assert parser.head().method == "GET"


def test_the_next_request_waits_for_the_body_of_this_one():
    parser = RequestParser()
    with pytest.raises(RouterError):
        parser.next()
    parser.feed(POST + b"Content-Length: 3\r\n\r\nab")
    parser.head()
    parser.body()
    with pytest.raises(RouterError):
        parser.next()


def test_blank_lines_do_not_start_a_request():
    parser = RequestParser()
    assert not parser.started
    for piece in (b"\r", b"\n", b"\r\n"):
        parser.feed(piece)
        assert not parser.started
        assert parser.head() is None
        assert not parser.started
    parser.feed(b"G")
    assert parser.started


@pytest.mark.parametrize(
    ("raw", "expects"),
    [
        (POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n", True),
        (POST + b"Expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n\r\n", True),
        (POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\na", False),
        (POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n1", False),
        (POST + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n", False),
        (POST + b"Expect: 100-continue\r\n\r\n", False),
        (POST + b"Content-Length: 3\r\n\r\n", False),
        (b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n", False),
    ],
)
def test_only_a_client_that_waits_is_told_to_continue(raw, expects):
    """RFC 9110 10.1.1."""
    parser = RequestParser()
    parser.feed(raw)
    parser.head()
    assert parser.expects_continue is expects
    parser.body()
    assert parser.expects_continue is expects


@pytest.mark.parametrize("header", [b"Transfer-Encoding: gzip, chunked", b"Expect: x", b"Content-Length: x"])
def test_a_refusal_of_a_readable_head_brings_the_request_along(header):
    parser = RequestParser(SMALL)
    parser.feed(b"POST /v1/messages HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n\r\n")
    with pytest.raises(HttpError) as caught:
        parser.head()
    assert caught.value.request.path == "/v1/messages"
    parser = RequestParser()
    parser.feed(b"\0")
    with pytest.raises(HttpError) as caught:
        parser.head()
    assert caught.value.request is None


def test_what_is_wrong_first_is_what_is_reported():
    """The reported fault is a matter of the bytes' order and not of how they were cut."""
    raw = b"GET / HTTP/3.0\r\nX : \0\r\nX: " + b"a" * 70000 + b"\r\n\r\n"
    assert serve(RequestParser(), [raw]) == serve(RequestParser(), bytewise(raw)) == [505]
    raw = GET + b"X: " + b"a" * 70000 + b"\0\r\n\r\n"
    assert serve(RequestParser(), [raw]) == serve(RequestParser(), [raw[:100], raw[100:]]) == [431]
    raw = b"GET /" + b"a" * 9000 + b"\0"
    assert serve(RequestParser(), [raw]) == [414]


def mutate(rng, raw):
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at:at] = rng.choice(
                [
                    b"\r",
                    b"\n",
                    b"\r\n",
                    b" ",
                    b"\t",
                    b"\0",
                    b":",
                    b";",
                    b",",
                    b"0",
                    b"\xff",
                    b"chunked",
                    b"Content-Length: 1\r\n",
                ]
            )
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.randint(1, 5)]
        else:
            begin = rng.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + 20]
    return bytes(data)


@pytest.mark.parametrize("seed", range(12))
def test_mutated_requests_give_the_same_result_however_they_are_cut(seed):
    rng = random.Random(seed)
    for _ in range(150):
        raw = mutate(rng, rng.choice([case[1] for case in CASES if len(case[1]) < 300])) + rng.choice([b"", GOOD])
        whole = serve(RequestParser(SMALL), [raw])
        assert serve(RequestParser(SMALL), bytewise(raw)) == whole, raw
        cuts = sorted(rng.randrange(len(raw) + 1) for _ in range(3))
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
        assert serve(RequestParser(SMALL), pieces) == whole, raw


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_raise_nothing_but_router_errors(seed):
    rng = random.Random(seed)
    starts = [
        b"",
        GET,
        CHUNKED,
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200\r\nContent-Length: 5",
    ]
    for _ in range(300):
        noise = bytes(rng.choice(b"\r\n\r\n \t:;0123456789abcdefGETHTTP/1.1\0\xff,") for _ in range(rng.randrange(60)))
        raw = rng.choice(starts) + (noise if rng.random() < 0.7 else rng.getrandbits(8 * 40).to_bytes(40, "big"))
        serve(RequestParser(SMALL), [raw])
        answer = ResponseParser()
        try:
            answer.feed(raw)
            answer.finish()
        except RouterError as error:
            assert error.status == 502
        for encoding in ("gzip", "deflate"):
            try:
                inflate(raw, encoding, 1000)
            except RouterError as error:
                assert error.status in (400, 413)


class CountedBytes(bytes):
    """Bytes that count how often they are copied in whole or in part, and how many bytes that takes."""

    copied = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        if isinstance(part, bytes):
            CountedBytes.copied += len(part)
        return part


def test_a_large_pipeline_is_not_copied_for_each_request(monkeypatch):
    """1000 requests in one read: the bytes looked at are a small multiple of the bytes that came."""
    monkeypatch.setattr(CountedBytes, "copied", 0)
    parser, raw = RequestParser(), CountedBytes(GOOD * 1000)
    assert serve(parser, [raw]) == [GOOD_RESULT] * 1000
    assert CountedBytes.copied <= 2 * len(raw)


def test_a_body_in_many_pieces_is_not_copied_for_each_piece(monkeypatch):
    monkeypatch.setattr(CountedBytes, "copied", 0)
    parser = RequestParser()
    parser.feed(POST + b"Content-Length: 400000\r\n\r\n")
    assert parser.head()
    for _ in range(3999):
        parser.feed(CountedBytes(b"x" * 100))
        assert parser.body() is None
    parser.feed(CountedBytes(b"x" * 100))
    assert parser.body() == b"x" * 400000
    assert CountedBytes.copied <= 400000


def test_a_long_line_byte_by_byte_is_searched_once():
    """Counted, not timed: how many bytes the search for a forbidden byte looks at."""
    looked_at = []

    class Spy:
        @staticmethod
        def search(buffer, start, stop):
            looked_at.append(max(0, stop - start))

    check = llm_router._LineCheck(0, 70000, 100, HttpError)
    buffer = bytearray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_router, "_NOT_IN_FIELD_LINE", Spy)
        for byte in bytewise(b"X: " + b"y" * 20000):
            buffer += byte
            assert check.check(buffer, 0) == 0
    assert sum(looked_at) <= 2 * len(buffer) + 10


def test_the_smallest_chunks_cost_one_step_each():
    """A hostile body of one-byte chunks: two steps for each, however many come at once."""
    steps = []
    decoder = ChunkDecoder(HttpLimits(), HttpError)
    step = ChunkDecoder._read_size

    def counted(self, data, position, parts):
        steps.append(position)
        return step(self, data, position, parts)

    decoder._step = counted
    assert decoder.feed(b"1\r\nx\r\n" * 5000) == b"x" * 5000
    assert len(steps) == 5000


def test_what_comes_behind_the_last_chunk_is_kept():
    decoder = ChunkDecoder(HttpLimits(), HttpError)
    assert decoder.feed(b"1\r\nx\r\n0\r\n\r\n0\r\n") == b"x"
    assert decoder.feed(b"\r\ny") == b""
    assert (decoder.complete, decoder.surplus, decoder.size) == (True, b"0\r\n\r\ny", 1)


def test_a_chunked_body_may_come_in_any_pieces():
    for size in (1, 2, 3, 7, 100, 1000):
        raw = CHUNKED + b"".join(encode_chunk(b"%05d" % number) for number in range(100)) + b"0\r\nX: y\r\n\r\n"
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert serve(RequestParser(SMALL), pieces) == [posted(b"".join(b"%05d" % number for number in range(100)))]


# Content codings.

PLAIN = b'{"model": "m", "text": "' + bytes(range(32, 127)) * 50 + b'"}'


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKED = [
    ("gzip", gzip.compress(PLAIN)),
    ("x-gzip", gzip.compress(PLAIN)),
    (" GZip\t", gzip.compress(PLAIN)),
    ("gzip", gzip.compress(PLAIN[:10]) + gzip.compress(PLAIN[10:])),
    ("gzip", gzip.compress(PLAIN) + b"\0" * 20),
    ("deflate", zlib.compress(PLAIN)),
    ("deflate", raw_deflate(PLAIN)),
    ("identity", PLAIN),
    ("", PLAIN),
]


@pytest.mark.parametrize(("encoding", "packed"), PACKED)
def test_compressed_bodies_are_inflated(encoding, packed):
    """Trap 18."""
    assert inflate(packed, encoding, len(PLAIN)) == PLAIN
    inflater = Inflater(encoding, len(PLAIN))
    assert b"".join(inflater.feed(byte) for byte in bytewise(packed)) == PLAIN
    inflater.finish()


@pytest.mark.parametrize(("encoding", "packed"), PACKED)
def test_inflation_is_bounded(encoding, packed):
    """No gzip bomb (CVE-2024-12886 elsewhere): one byte above the limit is refused."""
    with pytest.raises(RouterError) as caught:
        inflate(packed, encoding, len(PLAIN) - 1)
    assert caught.value.status == 413
    inflater = Inflater(encoding, len(PLAIN) - 1)
    with pytest.raises(UpstreamProtocolError) as caught:
        for byte in bytewise(packed):
            inflater.feed(byte)
    assert caught.value.status == 502


def test_a_bomb_is_stopped_at_the_limit():
    asked = []
    inflater = Inflater("gzip", 1000)

    class Spy:
        eof, unused_data = False, b""

        @staticmethod
        def decompress(data, size):
            asked.append(size)
            return b"x" * size

    inflater.feed(gzip.compress(b""))
    inflater._zlib = Spy
    with pytest.raises(UpstreamProtocolError):
        inflater.feed(b"abc")
    assert asked == [1001]


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", b"not gzip"),
        ("gzip", gzip.compress(PLAIN)[:-1]),
        ("gzip", gzip.compress(PLAIN)[:20]),
        ("gzip", gzip.compress(PLAIN)[:1]),
        ("gzip", gzip.compress(PLAIN)[:-8] + b"\0" * 8),
        ("gzip", gzip.compress(PLAIN) + b"junk"),
        ("gzip", gzip.compress(b"") * 5000),
        ("deflate", b"\xff\xff\xff\xff"),
        ("deflate", zlib.compress(PLAIN)[:-1]),
        ("deflate", zlib.compress(PLAIN) + b"x"),
        ("deflate", raw_deflate(PLAIN)[:-1]),
    ],
)
def test_corrupt_bodies_are_refused(encoding, packed):
    with pytest.raises(RouterError) as caught:
        inflate(packed, encoding, 1 << 20)
    assert (caught.value.status, caught.value.code) == (400, "bad_encoding")


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip, deflate", "x"])
def test_other_codings_are_unsupported(encoding):
    with pytest.raises(RouterError) as caught:
        inflate(b"", encoding, 1000)
    assert caught.value.status == 415


def test_an_empty_compressed_body_is_empty():
    assert inflate(b"", "gzip", 0) == inflate(b"", "deflate", 0) == b""


def test_undeclared_gzip_is_recognised():
    """Trap 18."""
    assert looks_gzipped(gzip.compress(b"x"))
    assert not looks_gzipped(b"data: {}")
    assert not looks_gzipped(b'{"a":1}')
    assert not looks_gzipped(b"")


# Answers to clients.


def test_a_head_is_rendered_with_its_reason():
    assert render_head(200, [("A", "b"), ("c", "\xe4\tx")]) == b"HTTP/1.1 200 OK\r\nA: b\r\nc: \xe4\tx\r\n\r\n"
    assert render_head(404, []) == b"HTTP/1.1 404 Not Found\r\n\r\n"
    assert render_head(599, []) == b"HTTP/1.1 599 \r\n\r\n"


@pytest.mark.parametrize("bad", ["a\rb", "a\nb", "a\r\nX: y", "\0", "\x1b[1m", "\x7f", "\u0142", "\ud800", "\u2028"])
def test_no_value_ends_a_line(bad):
    """Response splitting and request splitting: CR, LF, NUL, controls and what latin-1 has not."""
    renderers = [
        lambda: render_head(200, [("a", "b"), ("c", bad)]),
        lambda: render_head(200, [("a" + bad, "b")]),
        lambda: render_response(200, [("a", bad)], b"", head_only=False, keep_alive=True, date=""),
        lambda: render_response(200, [], b"", head_only=False, keep_alive=True, date=bad),
        lambda: render_upstream_request("POST", "/", [("a", bad)], b""),
        lambda: render_upstream_request("POST", "/", [("a" + bad, "x")], b""),
        lambda: render_upstream_request("POST", "/" + bad, [], b""),
        lambda: render_upstream_request("POST" + bad, "/", [], b""),
    ]
    for render in renderers:
        with pytest.raises(RouterError) as caught:
            render()
        assert caught.value.status == 500


@pytest.mark.parametrize("name", ["", "a b", "a:", " a", "a ", "\xe4", "a\t"])
def test_no_name_is_anything_but_a_token(name):
    with pytest.raises(RouterError):
        render_head(200, [("x", "y"), (name, "b"), ("x", "y")])


@pytest.mark.parametrize("path", ["", " ", "/a b", "/\xe4", "/a\tb"])
def test_no_path_breaks_the_request_line(path):
    with pytest.raises(RouterError):
        render_upstream_request("GET", path, [], b"")


def test_a_response_has_its_length():
    raw = render_response(
        200,
        [("content-type", "text/plain")],
        b"abc",
        head_only=False,
        keep_alive=True,
        date="Sun, 06 Nov 1994 08:49:37 GMT",
    )
    head, body = raw.split(b"\r\n\r\n")
    assert body == b"abc"
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"content-type: text/plain",
        b"connection: keep-alive",
        b"content-length: 3",
        b"date: Sun, 06 Nov 1994 08:49:37 GMT",
    ]


def test_head_gets_the_length_without_the_body():
    raw = render_response(200, [], b"abc", head_only=True, keep_alive=False, date="")
    assert raw.endswith(b"connection: close\r\ncontent-length: 3\r\n\r\n")


@pytest.mark.parametrize("status", [100, 103, 204, 304])
def test_answers_without_body_have_no_length(status):
    """RFC 9110 8.6."""
    raw = render_response(status, [], b"abc", head_only=False, keep_alive=True, date="")
    assert b"content-length" not in raw
    assert raw.endswith(b"\r\n\r\n")


def test_an_empty_chunk_does_not_end_the_body():
    assert encode_chunk(b"") == b""
    assert encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
    assert LAST_CHUNK == b"0\r\n\r\n"


def test_what_is_rendered_is_read_back():
    raw = render_upstream_request("POST", "/v1/x?y=z", [("host", "a"), ("x", "\xe4")], b"{}")
    parser = RequestParser()
    parser.feed(raw)
    assert parser.head().headers == [("host", "a"), ("x", "\xe4"), ("content-length", "2")]
    assert (parser.head().target, parser.body()) == ("/v1/x?y=z", b"{}")
    assert b"content-length" not in render_upstream_request("GET", "/", [("host", "a")], b"")
    assert b"content-length: 0\r\n" in render_upstream_request("POST", "/", [("host", "a")], b"")
    answer = ResponseParser()
    assert answer.feed(render_response(429, [("x", "y")], b"abc", head_only=False, keep_alive=True, date="d")) == b"abc"
    assert (answer.head.status, answer.complete, answer.reusable) == (429, True, True)


# Answers of upstreams.

OK = b"HTTP/1.1 200 OK\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

# (what, bytes, status, body, complete before the end, reusable)
ANSWERS = [
    ("length", OK + b"Content-Length: 3\r\n\r\nabc", 200, b"abc", True, True),
    ("length 0", OK + b"Content-Length: 0\r\n\r\n", 200, b"", True, True),
    ("equal lengths", OK + b"Content-Length: 3\r\nContent-Length: 3, 3\r\n\r\nabc", 200, b"abc", True, True),
    ("chunks", EVENTS + b"3\r\nabc\r\n3;x=y\r\ndef\r\n0\r\n\r\n", 200, b"abcdef", True, True),
    ("chunks with trailers", EVENTS + b"3\r\nabc\r\n0\r\nX: y\r\n\r\n", 200, b"abc", True, True),
    ("until close", OK + b"\r\nabc", 200, b"abc", False, False),
    ("close", OK + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc", True, False),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc", True, False),
    ("HTTP/1.0 keep-alive", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc", True, True),
    ("HTTP/1.0 with chunks", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 200, b"a", True, False),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True, True),
    ("304 with a length", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", 304, b"", True, True),
    ("interim answers", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\nx", 200, b"x", True, True),
    ("LF line ends", b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", 200, b"abc", True, True),
    ("mixed line ends", b"HTTP/1.1 200 OK\r\nContent-Length: 3\n\r\nabc", 200, b"abc", True, True),
    ("no reason", b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", 200, b"x", True, True),
    ("empty reason", b"HTTP/1.1 429 \r\nContent-Length: 1\r\n\r\nx", 429, b"x", True, True),
    ("odd reason", b"HTTP/1.1 503 \xc3\x9cberlast\xff\r\nContent-Length: 1\r\n\r\nx", 503, b"x", True, True),
    ("folded header", OK + b"X: a\r\n  b\r\nContent-Length: 1\r\n\r\nx", 200, b"x", True, True),
    ("blank before the colon", OK + b"Content-Length : 1\r\n\r\nx", 200, b"x", True, True),
    ("surplus", OK + b"Content-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n", 200, b"abc", True, False),
    ("surplus behind chunks", EVENTS + b"0\r\n\r\nx", 200, b"", True, False),
    ("a body like a head", OK + b"Content-Length: 4\r\n\r\n\r\n\r\n", 200, b"\r\n\r\n", True, True),
]  # fmt: skip


def receive(pieces):
    parser = ResponseParser()
    body = b"".join([parser.feed(piece) for piece in pieces])
    before = parser.complete
    parser.finish()
    return parser.head.status, body, before, parser.reusable


@pytest.mark.parametrize(("raw", "expected"), [(row[1], row[2:]) for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_an_answer_is_the_same_at_every_cut(raw, expected):
    """nginx-tests proxy_keepalive: a connection is only kept when the exact end was read."""
    assert receive([raw]) == expected
    assert receive(bytewise(raw)) == expected
    for cut in range(len(raw)):
        assert receive([raw[:cut], raw[cut:]]) == expected
    if len(raw) < 90:
        for first, second in itertools.combinations(range(len(raw)), 2):
            assert receive([raw[:first], raw[first:second], raw[second:]]) == expected


def test_an_answer_has_its_headers():
    parser = ResponseParser()
    parser.feed(b"HTTP/1.0 200 OK\nX-Request-ID:  r \r\nFold: a \r\n \t b\n\tc\r\nDouble: 1\r\nDouble: 2\r\n\r\n")
    assert parser.head.headers == [("x-request-id", "r"), ("fold", "a b c"), ("double", "1"), ("double", "2")]
    assert parser.head.version == (1, 0)
    plain = ResponseParser()
    plain.feed(b"HTTP/1.1 200 OK\r\nX-Request-ID:  r \r\nE:\r\n\r\n")
    assert plain.head.headers == [("x-request-id", "r"), ("e", "")]


TRUNCATED = [row for row in ANSWERS if row[4] and row[0] not in ("surplus", "surplus behind chunks")]


@pytest.mark.parametrize("raw", [row[1] for row in TRUNCATED], ids=[row[0] for row in TRUNCATED])
def test_a_cut_answer_never_looks_complete(raw):
    """nginx-tests proxy_unfinished: length too short, no last chunk, no head."""
    for cut in range(len(raw)):
        parser = ResponseParser()
        parser.feed(raw[:cut])
        assert not parser.complete
        assert not parser.reusable
        with pytest.raises(UpstreamProtocolError) as caught:
            parser.finish()
        assert (caught.value.status, caught.value.code) == (502, "upstream_truncated")


BAD_ANSWERS = [
    b"junk",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x15\x03\x01\x00\x02\x02\x46",
    b"<html>",
    b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/1.2 200 OK\r\n\r\n",
    b"http/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1 600 OK\r\n\r\n",
    b"HTTP/1.1 099 OK\r\n\r\n",
    b"HTTP/1.1 \xb2\xb0\xb0 OK\r\n\r\n",
    b"HTTP/1.1 200 O\0K\r\n\r\n",
    b"HTTP/1.1 200 OK\0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 200 O\rK\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 21,
    OK + b"no colon\r\n\r\n",
    OK + b": x\r\n\r\n",
    OK + b" folded: first\r\n\r\n",
    OK + b"X: a\0b\r\n\r\n",
    OK + b"X: a\rContent-Length: 1\r\n\r\nx",
    OK + b"X: a\r\n \0\r\n\r\n",
    OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    OK + b"Content-Length: 3, 4\r\n\r\nabcd",
    OK + b"Content-Length: -3\r\n\r\n",
    OK + b"Content-Length: +3\r\n\r\n",
    OK + b"Content-Length: 0x3\r\n\r\n",
    OK + b"Content-Length: 3_0\r\n\r\n",
    OK + b"Content-Length: \xb2\r\n\r\n",
    OK + b"Content-Length:\r\n\r\n",
    OK + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n",
    OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: identity\r\n\r\nabc",
    OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    EVENTS + b"x\r\n",
    EVENTS + b"\r\n",
    EVENTS + b"-1\r\n",
    EVENTS + b"5 \r\nabcde\r\n",
    EVENTS + b"5\nabcde\n",
    EVENTS + b"5\r\nabcdef",
    EVENTS + b"1" * 17,
    EVENTS + b"1;" + b"a" * 2000,
    EVENTS + b"0\r\nno colon\r\n\r\n",
    EVENTS + b"0\r\nX: " + b"y" * 9000,
    OK + b"X: " + b"y" * 262144 + b"\r\n\r\n",
]


@pytest.mark.parametrize(
    "raw", BAD_ANSWERS, ids=["%02d %r" % (number, raw[-30:]) for number, raw in enumerate(BAD_ANSWERS)]
)
def test_a_bad_answer_is_refused_however_it_is_cut(raw):
    """HARDENING: not HTTP, two lengths, length and chunks, bad chunk sizes; interim answers without end."""
    pieces = [
        [raw],
        [raw[:20], raw[20:]],
        bytewise(raw) if len(raw) < 10000 else [raw[: len(raw) // 2], raw[len(raw) // 2 :]],
    ]
    for cut in pieces:
        parser = ResponseParser()
        with pytest.raises(UpstreamProtocolError) as caught:
            for piece in cut:
                parser.feed(piece)
        assert (caught.value.status, caught.value.code) == (502, "upstream_bad_response")
        assert not parser.reusable


def test_bytes_behind_an_answer_make_the_connection_unusable():
    parser = ResponseParser()
    parser.feed(OK + b"Content-Length: 0\r\n\r\n")
    assert parser.reusable
    assert parser.feed(b"x") == b""
    assert parser.feed(b"y") == b""
    assert (parser.surplus, parser.reusable, parser.complete) == (b"xy", False, True)


def test_each_chunk_is_given_out_as_it_comes():
    parser = ResponseParser()
    assert parser.feed(EVENTS) == b""
    assert parser.feed(encode_chunk(b"one")) == b"one"
    assert parser.feed(encode_chunk(b"two") + encode_chunk(b"three")) == b"twothree"
    assert parser.feed(b"5\r\nfi") == b"fi"
    assert parser.feed(b"v") == b"v"
    assert parser.feed(b"es\r") == b"es"
    assert parser.feed(b"\n") == b""
    assert not parser.complete
    assert parser.feed(LAST_CHUNK) == b""
    assert parser.reusable


def test_a_parser_does_not_keep_itself_alive():
    """Buffers are freed with the last reference, without waiting for the garbage collector."""
    import gc
    import weakref

    class Marked(ResponseParser):
        __slots__ = ("__weakref__",)

    gc.disable()
    try:
        parser = Marked()
        parser.feed(EVENTS + b"5\r\nab")
        reference = weakref.ref(parser)
        del parser
        assert reference() is None
    finally:
        gc.enable()
