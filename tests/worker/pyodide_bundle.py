"""The Pyodide bundle that workerd wants, made from the npm package `pyodide`: no download, no build.

workerd reads it from `--pyodide-bundle-disk-cache-dir` when the compatibility flags name `python_workers_development`.
It is a Cap'n Proto message of one segment (capnproto.org/encoding.html): struct Bundle { modules: List(Module) }, where a
Module has one data word (u16 type, u16 union tag) and four pointers: name (Text), body (bytes), two unused.
"""

import struct
from pathlib import Path

NAME = "pyodide_dev.capnp.bin"
INTERNAL = 2
SOURCE, WASM, DATA = 0, 1, 2

# workerd forbids both at run time and offers its own; the last one makes the default export a named one.
SUBSTITUTIONS = (
    ("new WebAssembly.Module(", "newWasmModule(", None),
    ("crypto.getRandomValues(", "getRandomValues(Module,", None),
    ("export default _createPyodideModule", "export { _createPyodideModule }", 1),
)
IMPORTS = 'import { newWasmModule, getRandomValues } from "pyodide-internal:builtin_wrappers";\n'


def adapt_glue(source):
    """The JavaScript glue as workerd can run it. ValueError when a text to replace is not there as expected."""
    for old, new, count in SUBSTITUTIONS:
        found = source.count(old)
        if not found or count not in (None, found):
            raise ValueError("pyodide.asm.mjs holds %r %d times" % (old, found))
        source = source.replace(old, new)
    return IMPORTS + source


def make_bundle(package):
    """The bytes of the bundle from the folder of the npm package."""
    package = Path(package)
    glue = adapt_glue((package / "pyodide.asm.mjs").read_text(encoding="utf-8"))
    modules = [
        ("pyodideRuntime-internal:pyodide.asm", SOURCE, glue.encode()),
        ("pyodideRuntime-internal:pyodide.asm.wasm", WASM, (package / "pyodide.asm.wasm").read_bytes()),
        ("pyodideRuntime-internal:python_stdlib.zip", DATA, (package / "python_stdlib.zip").read_bytes()),
    ]
    return encode(modules)


def encode(modules):
    """A Cap'n Proto message that holds (name, tag, body) modules."""
    words_each = 5  # a data word and four pointers
    heap_at = 3 + words_each * len(modules)  # after the root pointer, Bundle's pointer and the list's tag
    head, heap = [], b""
    for number, (name, tag, body) in enumerate(modules):
        first = 3 + words_each * number
        head.append(struct.pack("<HHI", INTERNAL, tag, 0))
        pointers = []
        for slot, data in enumerate((name.encode() + b"\0", body)):
            offset = heap_at + len(heap) // 8 - (first + 1 + slot) - 1
            pointers.append(struct.pack("<II", (offset & 0x3FFFFFFF) << 2 | 1, len(data) << 3 | 2))
            heap += data + b"\0" * (-len(data) % 8)
        head += pointers + [b"\0" * 8] * 2
    root = struct.pack("<IHH", 0, 0, 1)
    bundle = struct.pack("<II", 1, words_each * len(modules) << 3 | 7)
    tag = struct.pack("<IHH", len(modules) << 2, 1, 4)
    segment = root + bundle + tag + b"".join(head) + heap
    return struct.pack("<II", 0, len(segment) // 8) + segment


def write_bundle(package, folder):
    """Put the bundle where workerd looks for it; the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / NAME).write_bytes(make_bundle(package))
    return folder
