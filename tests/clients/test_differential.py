"""The table of raw requests before two parsers that others wrote: h11 (uvicorn's, pure Python) and llhttp (Node's).

What the router serves and another refuses, or the other way round, is listed here with its reason: a disagreement that
nobody explained fails, and so does an explanation that no row needs any more.
"""

import contextlib
import re
import shutil
import subprocess

import pytest
from test_http import CASES, SMALL, serve

import llm_router
from real_clients import missing
from running_router import Caller

NODE = """
const http = require('http')
const server = http.createServer({ insecureHTTPParser: false }, (request, response) => {
  request.on('data', () => {})
  request.on('end', () => response.end('served'))
})
server.on('connect', (request, socket) => socket.end('HTTP/1.1 405 x\\r\\nContent-Length: 0\\r\\n\\r\\n'))
server.on('upgrade', (request, socket) => socket.end('HTTP/1.1 200 x\\r\\nContent-Length: 0\\r\\n\\r\\n'))
server.listen(0, '127.0.0.1', () => console.log(server.address().port))
process.stdin.resume()
process.stdin.on('end', () => process.exit(0))
"""


def ours(raw):
    """How many requests are served before the end, and whether the end is a refusal."""
    seen = serve(llm_router.RequestParser(SMALL), [raw])
    return sum(isinstance(row, tuple) for row in seen), isinstance(seen[-1], int) if seen else False


def h11_result(h11, raw):
    connection, served = h11.Connection(h11.SERVER), 0
    try:
        connection.receive_data(raw)
        while True:
            event = connection.next_event()
            if event in (h11.NEED_DATA, h11.PAUSED) and connection.their_state is not h11.DONE:
                return served, False
            if isinstance(event, h11.EndOfMessage) or (event is h11.PAUSED and connection.their_state is h11.DONE):
                served += 1
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE:
                    return served, False
                connection.start_next_cycle()
    except h11.RemoteProtocolError:
        return served, True
    except h11.LocalProtocolError:
        return served, False


@contextlib.contextmanager
def node_server():
    process = subprocess.Popen(["node", "-e", NODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Caller(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def node_result(server, raw):
    found = re.findall(rb"HTTP/1\.1 (\d\d\d)", server.raw(raw, half_close=True))
    statuses = [status for status in found if status != b"100"]
    return sum(status in (b"200", b"405") for status in statuses), any(status[:1] in b"45" and status != b"405" for status in statuses)


# (pattern of the rows' names, why we serve or refuse what the other does not)
H11 = [
    (r"Host b.*|(bad|empty) Host.*|two names in one Host|a list in Host", "the value of Host is the application's business"),
    (r"(absolute-form|scheme|asterisk|authority-form|CONNECT) ?.*|relative path|fragment|.* in target",
     "any printable bytes are a target; RFC 9112 3.2 names four forms"),
    (r"HTTP/[029].*|an? bad request behind a good one", "the version is the application's business"),
    (r"(one|four) leading CRLFs?.*|CRLF behind a body", "RFC 9112 2.2: a server SHOULD ignore an empty line first"),
    (r"SSLv2 hello|binary noise|CR .*|endless line|TE and CL \(TE.CL\)", "it waits for a line's end, we refuse at once"),
    (r"line of .* bytes|10?1 headers|head of 64 KiB and 1|.*above.*|length of 19 digits|chunk size that wraps.*",
     "its limits are larger, or its user's"),
    (r"endless (extension|trailer)|too much extension.*|33 trailers|size of many zeros", "it limits the head only"),
    (r"folded .*|line of blanks only", "it unfolds; RFC 9112 5.2 allows either"),
    (r"(control|escape|DEL) in value", "it lets controls pass but NUL, CR and LF; RFC 9110 5.5 calls them invalid"),
    (r"(bare )?LF .*|end of head in two ways|a line feed before.*|header in a header", "it takes LF for CRLF (9112 2.2: MAY)"),
    (r"two equal lengths.*|Content-Length b'5, ?5'", "it folds equal lengths into one (9112 6.3: MAY)"),
    (r"CL and TE.*|TE and CL 0|chunked in HTTP/1.0.*", "it lets Transfer-Encoding win (9112 6.1: MAY, and close)"),
    (r"chunk size b.*|bad chunks behind.*|blanks in an extension", "it skips over extensions, but for blanks before them"),
    (r".*expectation.*", "expectations are the application's business; 417 is allowed (9110 10.1.1)"),
]  # fmt: skip
NODE_ROWS = [
    (r"Host b.*|(bad|empty) Host.*|two names in one Host|a list in Host|two Hosts.*|the same Host twice",
     "Host is looked at only for being there"),
    (r"any token is a method|methods are case-sensitive", "it knows a fixed list of methods"),
    (r"five leading.*|leading bare.*|nothing but CRLFs", "it skips any line ends before a request"),
    (r"absolute-form.*|asterisk .*|authority-form.*|CONNECT .*|fragment|.* in target|two spaces before.*",
     "it reads targets and blanks more loosely than RFC 9112 3"),
    (r"HTTP/.*", "it knows 0.9, 1.0, 1.1 and 2.0; RFC 9110 2.5 has 1.2 served as 1.1"),
    (r"line of (8193|1025) bytes|101 headers|head of 64 KiB|33 trailers|size of many zeros", "other limits"),
    (r"unfinished .*|no (last chunk|end of trailers)", "at the end of the stream it answers 400, the parser alone waits"),
    (r"chunked in HTTP/1.0.*|gzip in a line of its own|Transfer-Encoding b.*", "whatever ends in chunked is chunked to it"),
    (r"blanks around chunked", "it takes no blank behind chunked; RFC 9110 5.5 strips it"),
    (r"blanks in an extension|chunk size b.*", "it reads names and values of extensions by another grammar"),
    (r"trailers are dropped", "a Content-Length among the trailers; RFC 9110 6.5.1 has it ignored"),
    (r"a (list of|second) expectations?", "expectations are the application's business"),
    (r"a body that ends in CR.*", "LF alone before a request is a line end to it"),
    (r"(a bad request|garbage|bad chunks) behind .*", "it loses the good request's answer to the bad one's"),
]  # fmt: skip


def check(result_of, rows):
    used, unexplained = set(), []
    for name, raw, _ in CASES:
        mine, theirs = ours(raw), result_of(raw)
        if mine != theirs:
            fits = [pattern for pattern, _ in rows if re.fullmatch(pattern, name)]
            used.update(fits)
            if not fits:
                unexplained.append((name, mine, theirs))
    assert not unexplained
    assert used == {pattern for pattern, _ in rows}


def test_every_disagreement_with_h11_is_explained():
    try:
        import h11
    except ImportError:
        missing("h11 is not installed")
    check(lambda raw: h11_result(h11, raw), H11)


def test_every_disagreement_with_node_is_explained():
    if not shutil.which("node"):
        missing("node is not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, check=True).stdout.decode()
    if not version.startswith("v20."):
        pytest.skip("the list is that of Node 20, not of %s" % version.strip())
    with node_server() as server:
        check(lambda raw: node_result(server, raw), NODE_ROWS)
