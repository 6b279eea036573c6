"""The laws of the house, read from the source with `ast` and `symtable`; each is also tried against a broken copy.

A rule is a function from source text to a list of complaints, registered in RULES by its name. SAMPLE obeys every rule;
BREAKS names, per rule, changes to SAMPLE that it must catch. So a rule that stopped working fails here.
"""

import ast
import builtins
import importlib.util
import re
import statistics
import subprocess
import symtable
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "llm_router.py"

# --- tables --------------------------------------------------------------------

KINDS = ("pure", "async", "host")
MAX_LINES = 17_360
MAX_FUNCTION_LINES = 50
MEDIAN_FUNCTION_LINES = 8

# function -> why it may be longer. An entry that is no longer needed fails.
LONG_FUNCTIONS = {}

# Modules that every host has, Cloudflare's Pyodide included: the head of the file may import these and no others.
# Three of them reach the world, and every interpreter has loaded them before a program starts: WORLD keeps them to [host].
TOP_IMPORTS = set(
    "__future__ base64 binascii bisect collections collections.abc contextlib copy dataclasses enum errno fnmatch functools"
    " hashlib hmac html itertools json math operator os re string struct sys textwrap time typing unicodedata urllib.parse"
    " zlib".split()
)

# Pure computation that is needed rarely and costs start-up time: functions of [pure] sections may import it late.
LATE_PURE_IMPORTS = {
    "datetime": "dates in Retry-After; its clock stays out of bounds",
    "difflib": "the nearest name, once something went wrong",
    "email.utils": "dates in Retry-After (RFC 9110 allows three forms)",
    "ipaddress": "IPv6 addresses in Host, which few requests have",
    "unicodedata": "the width of characters, for the menu only",
}

# Modules of the Cloudflare host; only its own section may import them.
WORKER_IMPORTS = {"js", "pyodide", "workers"}

# Roots of names that reach the world, the clock or the dice: nothing outside [host] refers to them.
WORLD = set(
    "os sys io time datetime random secrets uuid socket ssl select selectors signal subprocess threading queue asyncio"
    " concurrent multiprocessing logging sqlite3 curses argparse http pathlib shutil tempfile environ getenv urlopen"
    " open print input eval exec compile __import__ globals breakpoint".split()
)

# Names of vendors are data: never compared with in code. (openai and anthropic are names of wire formats.)
VENDORS = re.compile(
    "deepseek|openrouter|groq|mistral|gemini|moonshot|kimi|ollama|bedrock|vertex|azure|together|fireworks|cerebras"
    "|dashscope|qwen|xai|grok|glm|zhipu|minimax|nvidia|cohere|perplexity|huggingface|vllm|llama"
)

MUTATORS = set("append add update setdefault pop popitem clear extend insert remove discard sort reverse".split())

# --- reading the source --------------------------------------------------------

BAR = "# " + "=" * 78
TITLE = re.compile(r"^# (\d+) ([A-Z][A-Z0-9 ,]*) - (\S.*\S) \[(\w+)\]$")
CONTENTS = re.compile(r"^\s*\d+\s+[A-Z].*\[\w+\]$")


class Section(NamedTuple):
    """A banner and the lines it rules: `first` is the line of its title, `last` the last line before the next."""

    number: int
    title: str
    about: str
    kind: str
    first: int
    last: int


HEAD = Section(0, "head", "", "head", 1, 0)


def sections(source):
    """The banners in order; lines that are no banner are none of this function's business."""
    lines = source.split("\n")
    titles = [(n, TITLE.match(line)) for n, line in enumerate(lines, 1)]
    titles = [
        (n, found) for n, found in titles if found and lines[n - 2 : n - 1] == [BAR] and lines[n : n + 1] == [BAR]
    ]
    ends = [n - 2 for n, _ in titles[1:]] + [len(lines)]
    return [Section(int(m.group(1)), m.group(2), m.group(3), m.group(4), n, end) for (n, m), end in zip(titles, ends)]


def section_at(found, line):
    """The section that rules a line; HEAD above the first."""
    return next((s for s in reversed(found) if s.first - 1 <= line), HEAD)


def names_bound(statement):
    """Names that a module-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    stores = [n for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]
    return [n.id for n in stores if isinstance(n.ctx, ast.Store)]


def functions(tree):
    """(dotted name, node) of every function, methods and nested ones included."""

    def walk(node, path):
        for child in ast.iter_child_nodes(node):
            inner = path
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = path + [child.name]
                if not isinstance(child, ast.ClassDef):
                    yield ".".join(inner), child
            yield from walk(child, inner)

    return walk(tree, [])


def length_of(function):
    """Lines from `def` to the end, docstring included and decorators not."""
    return function.end_lineno - function.lineno + 1


def global_references(source):
    """(line of the scope, name) for every module-level or builtin name that a function, lambda or class body uses."""
    found = []

    def visit(table):
        for symbol in table.get_symbols():
            if symbol.is_global() and (symbol.is_referenced() or symbol.is_assigned()):
                found.append((table.get_lineno(), symbol.get_name()))
        for child in table.get_children():
            visit(child)

    for child in symtable.symtable(source, "llm_router.py", "exec").get_children():
        visit(child)
    return found


def loose_references(tree):
    """(line, name) for names that module-level code and annotations use: what symtable's functions do not show."""
    found = []

    def names(node):
        every = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        own = {n.id for n in every if isinstance(n.ctx, ast.Store)} | {
            n.arg for n in ast.walk(node) if isinstance(n, ast.arg)
        }
        return [(n.lineno, n.id) for n in every if isinstance(n.ctx, ast.Load) and n.id not in own]

    for node in ast.walk(tree):
        notes = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        found += [pair for note in notes if isinstance(note, ast.AST) for pair in names(note)]
    for statement in tree.body:
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found += names(statement)
        else:
            bases = statement.decorator_list + getattr(statement, "bases", [])
            arguments = getattr(statement, "args", None)
            defaults = [d for d in arguments.defaults + arguments.kw_defaults if d] if arguments else []
            found += [pair for node in bases + defaults for pair in names(node)]
    return found


# --- the rules -----------------------------------------------------------------

RULES = {}


def rule(function):
    """Register a rule under its name."""
    RULES[function.__name__] = function
    return function


@rule
def banners_are_well_formed(source):
    """Law 2 and the banner's form: three lines, bars of 80 columns, ascending numbers, kinds in order."""
    lines, found, wrong = source.split("\n"), sections(source), []
    for number, line in enumerate(lines, 1):
        if line.startswith("# ====") and line != BAR:
            wrong.append("line %d: a bar of %d columns" % (number, len(line)))
    near = {line for s in found for line in (s.first - 1, s.first + 1)}
    wrong += ["line %d: a bar without a banner" % n for n, line in enumerate(lines, 1) if line == BAR and n not in near]
    wrong += ["line %d: %s is no kind" % (s.first, s.kind) for s in found if s.kind not in KINDS]
    if not found:
        return wrong + ["no section at all"]
    for above, below in zip(found, found[1:]):
        if below.number <= above.number:
            wrong.append("line %d: section %d after %d" % (below.first, below.number, above.number))
        if {above.kind, below.kind} <= set(KINDS) and KINDS.index(below.kind) < KINDS.index(above.kind):
            wrong.append("line %d: [%s] below [%s]" % (below.first, below.kind, above.kind))
    titles = [s.title for s in found]
    return wrong + ["two sections %s" % title for title in sorted(set(titles)) if titles.count(title) > 1]


@rule
def contents_mirror_the_banners(source):
    """The contents list of the module docstring says what the banners say, in their order."""
    said = [
        " ".join(line.split())
        for line in (ast.get_docstring(ast.parse(source)) or "").split("\n")
        if CONTENTS.match(line)
    ]
    true = ["%d %s %s [%s]" % (s.number, s.title, s.about, s.kind) for s in sections(source)]
    wrong = ["missing in the contents: %s" % line for line in true if line not in said]
    wrong += ["in the contents only: %s" % line for line in said if line not in true]
    return wrong or ([] if said == true else ["the contents are in another order than the banners"])


@rule
def sections_only_look_up(source):
    """Law 1: a section uses names from itself and from sections above it; a name is bound in one place."""
    tree, found = ast.parse(source), sections(source)
    home, wrong = {}, []
    for statement in tree.body:
        for name in names_bound(statement):
            if name in home:
                wrong.append("line %d: %s is bound a second time" % (statement.lineno, name))
            home.setdefault(name, section_at(found, statement.lineno))
    for line, name in global_references(source) + loose_references(tree):
        here, there = section_at(found, line), home.get(name, HEAD)
        if there.first > here.first:
            wrong.append("line %d: %s uses %s of %s below" % (line, here.title, name, there.title))
    return wrong


@rule
def every_name_exists(source):
    """A global name that nobody defines is a typo that only shows at run time."""
    tree = ast.parse(source)
    known = {name for statement in tree.body for name in names_bound(statement)} | set(dir(builtins))
    known |= {"__file__", "__name__", "__doc__"}
    known |= {name for s in tree.body if isinstance(s, (ast.If, ast.Try)) for n in s.body for name in names_bound(n)}
    used = global_references(source) + loose_references(tree)
    return ["line %d: nobody defines %s" % (line, name) for line, name in used if name not in known]


@rule
def the_head_imports_what_every_host_has(source):
    """Law 3: module-level imports stand in the head and come from TOP_IMPORTS."""
    tree, found, wrong = ast.parse(source), sections(source), []
    for node in [n for s in tree.body for n in ([s] if not isinstance(s, (ast.If, ast.Try)) else ast.walk(s))]:
        modules = _imported(node)
        if modules and section_at(found, node.lineno) is not HEAD:
            wrong.append("line %d: an import below the head: %s" % (node.lineno, ", ".join(modules)))
        wrong += ["line %d: %s at the top" % (node.lineno, m) for m in modules if m not in TOP_IMPORTS]
    return wrong


def _imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return []


@rule
def only_hosts_import_late(source):
    """Laws 2 and 3: only functions of [host] import late, but for LATE_PURE_IMPORTS; class bodies never."""
    tree, found, wrong = ast.parse(source), sections(source), []
    for node in ast.walk(tree):
        here = section_at(found, getattr(node, "lineno", 1))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and here.kind != "host":
            late = [(n.lineno, module) for n in ast.walk(node) for module in _imported(n)]
            late = [(line, module) for line, module in late if module not in LATE_PURE_IMPORTS]
            wrong += ["line %d: %s imported inside [%s]" % (line, module, here.kind) for line, module in late]
        if isinstance(node, ast.ClassDef):
            wrong += ["line %d: an import in a class body" % n.lineno for n in node.body if _imported(n)]
    return wrong


@rule
def only_the_standard_library(source):
    """Nothing but the standard library, anywhere; the Cloudflare modules in the section WORKER."""
    found, wrong = sections(source), []
    for node in ast.walk(ast.parse(source)):
        for module in _imported(node):
            root = module.split(".")[0]
            worker = root in WORKER_IMPORTS and section_at(found, node.lineno).title == "WORKER"
            if not worker and not _is_standard(root):
                wrong.append("line %d: %s is not in the standard library" % (node.lineno, module))
    return wrong


def _is_standard(root):
    if hasattr(sys, "stdlib_module_names"):
        return root in sys.stdlib_module_names
    if root in ("winreg", "msvcrt", "_winapi", "winsound", "nt", "tomllib"):
        return True
    spec = importlib.util.find_spec(root) if root else None
    return spec is not None and "site-packages" not in str(spec.origin)


@rule
def only_hosts_touch_the_world(source):
    """Law 2: [pure] and [async] sections refer to no IO, clock, dice, environment, threads or event loop."""
    tree, found, wrong = ast.parse(source), sections(source), []
    for line, name in global_references(source) + loose_references(tree):
        here = section_at(found, line)
        if here.kind in ("pure", "async", "head") and name in WORLD:
            wrong.append("line %d: [%s] refers to %s" % (line, here.kind, name))
    for node in ast.walk(tree):
        clock = isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today")
        if (
            clock
            and getattr(node.value, "id", "") in ("datetime", "date")
            and section_at(found, node.lineno).kind != "host"
        ):
            wrong.append("line %d: the clock of %s" % (node.lineno, node.value.id))
    return wrong


@rule
def pure_sections_never_wait(source):
    """Law 2: no async, await or generators of them in [pure] sections."""
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    found, wrong = sections(source), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, asynchronous) and section_at(found, node.lineno).kind == "pure":
            wrong.append("line %d: %s in a [pure] section" % (node.lineno, type(node).__name__))
    return wrong


@rule
def functions_are_short(source):
    """Law 4: at most 50 lines, or listed with a reason; no stale entry in the list."""
    lengths = {name: length_of(node) for name, node in functions(ast.parse(source))}
    over = {name for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    wrong = ["%s has %d lines" % (name, lengths[name]) for name in sorted(over - set(LONG_FUNCTIONS))]
    return wrong + ["%s is short now: take it off LONG_FUNCTIONS" % name for name in sorted(set(LONG_FUNCTIONS) - over)]


@rule
def the_median_function_is_small(source):
    """Law 4: the median function has about 6 lines."""
    lengths = [length_of(node) for _, node in functions(ast.parse(source))]
    median = statistics.median(lengths) if lengths else 0
    return ["the median function has %s lines" % median] if median > MEDIAN_FUNCTION_LINES else []


@rule
def vendors_are_data(source):
    """Law 5: no branch compares with a vendor's name; quirks are rows of a table."""
    wrong = []
    for name, function in functions(ast.parse(source)):
        for node in ast.walk(function):
            tests = [node.left] + node.comparators if isinstance(node, ast.Compare) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                tests += node.args if node.func.attr in ("startswith", "endswith", "find", "count") else []
            words = [
                c.value for t in tests for c in ast.walk(t) if isinstance(c, ast.Constant) and isinstance(c.value, str)
            ]
            wrong += ["%s compares with %r" % (name, word) for word in words if VENDORS.search(word.lower())]
    return wrong


@rule
def no_dataclasses(source):
    """Laws 3 and 6: values are __slots__ classes and NamedTuples; dataclasses cost start-up time."""
    return [
        "line %d: a dataclass" % node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.dump(d) for d in node.decorator_list)
    ]


@rule
def one_family_of_errors(source):
    """Law 7: every exception class derives from RouterError, and no bare except hides what is raised."""
    wrong, family = [], {"RouterError"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append("line %d: a bare except" % node.lineno)
        if not isinstance(node, ast.ClassDef):
            continue
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        family |= {node.name} if bases & family else set()
        foreign = [
            b
            for b in bases
            if isinstance(getattr(builtins, b, None), type) and issubclass(getattr(builtins, b), BaseException)
        ]
        if foreign and node.name != "RouterError" and not bases & family:
            wrong.append("line %d: %s derives from %s" % (node.lineno, node.name, foreign[0]))
    return wrong


@rule
def nothing_is_asserted(source):
    """Law 7: input is never checked by `assert`, which -O removes."""
    return ["line %d: assert" % node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


@rule
def only_main_exits(source):
    """Law 7: SystemExit, sys.exit, os._exit, exit and quit only in the section MAIN."""
    found, wrong = sections(source), []
    for node in ast.walk(ast.parse(source)):
        name = _exit_named(node)
        if name and section_at(found, node.lineno).title != "MAIN":
            wrong.append("line %d: %s outside MAIN" % (node.lineno, name))
    return wrong


def _exit_named(node):
    if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.dump(node.exc):
        return "SystemExit"
    if isinstance(node, ast.Call):
        callee = node.func
        name = callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "")
        owner = callee.value.id if isinstance(callee, ast.Attribute) and isinstance(callee.value, ast.Name) else ""
        if (
            owner in ("sys", "os")
            and name in ("exit", "_exit", "abort")
            or not owner
            and name in ("exit", "quit", "_exit")
        ):
            return name if isinstance(callee, ast.Name) or owner else ""
    return ""


@rule
def public_names_have_docstrings(source):
    """Law 8: public functions and classes, and public methods of public classes unless a base class here says it."""
    classes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
    wrong = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            wrong.append("line %d: %s has no docstring" % (node.lineno, node.name))
        for method in _methods(node) if isinstance(node, ast.ClassDef) else []:
            if (
                not method.name.startswith("_")
                and not ast.get_docstring(method)
                and not _told_above(node, method.name, classes)
            ):
                wrong.append("line %d: %s.%s has no docstring" % (method.lineno, node.name, method.name))
    return wrong


def _methods(node):
    return [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _told_above(node, name, classes):
    for base in [classes[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in classes]:
        if any(m.name == name and ast.get_docstring(m) for m in _methods(base)) or _told_above(base, name, classes):
            return True
    return False


@rule
def nothing_happens_at_import(source):
    """Law 10: the module level holds imports, definitions and constants, and the main guard at the end."""
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    wrong = []
    for number, node in enumerate(ast.parse(source).body):
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and number == 0
        guard = isinstance(node, ast.If) and "__main__" in ast.dump(node.test)
        if not isinstance(node, plain) and not words and not guard:
            wrong.append("line %d: %s at module level" % (node.lineno, type(node).__name__))
    return wrong


@rule
def no_mutable_module_state(source):
    """Law 10: module names are constants, tables, types or private aliases of a method; nothing changes them."""
    tree, wrong, tables = ast.parse(source), [], set()
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        for name in names_bound(node):
            tables.add(name)
            bound = name.startswith("_") and isinstance(node.value, ast.Attribute)
            if not bound and not re.match(r"^(_?[A-Z][A-Za-z0-9_]*|__\w+__)$", name):
                wrong.append("line %d: %s is neither a constant nor a type" % (node.lineno, name))
            if _is_empty_container(node.value):
                wrong.append("line %d: %s starts out empty: state?" % (node.lineno, name))
    for node in ast.walk(tree):
        changed = _changed_name(node)
        if isinstance(node, ast.Global):
            wrong.append("line %d: global %s" % (node.lineno, ", ".join(node.names)))
        elif changed in tables:
            wrong.append("line %d: %s is changed" % (node.lineno, changed))
    return wrong + _class_state(tree) + _caches(tree)


def _is_empty_container(value):
    if isinstance(value, (ast.List, ast.Set)):
        return not value.elts
    if isinstance(value, ast.Dict):
        return not value.keys
    makers = ("list", "dict", "set", "OrderedDict", "deque", "defaultdict", "Counter")
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") in makers and not value.args


def _changed_name(node):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return getattr(node.func.value, "id", None)
    if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        return getattr(node.value, "id", None) if getattr(node, "attr", "") != "__doc__" else None
    return None


def _class_state(tree):
    return [
        "line %d: %s shares a mutable value between its instances" % (part.lineno, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "NamedTuple" not in [getattr(base, "id", "") for base in node.bases]
        for part in node.body
        if isinstance(part, (ast.Assign, ast.AnnAssign))
        and part.value is not None
        and _is_empty_container(part.value)
        and names_bound(part) != ["__slots__"]
    ]


def _caches(tree):
    return [
        "line %d: %s hides state in a cache" % (node.lineno, name)
        for name, node in functions(tree)
        if any("cache" in ast.dump(decorator) for decorator in node.decorator_list)
    ]


@rule
def python_39_understands_it(source):
    """Law 11: nothing newer than the syntax of 3.9, and no `X | Y` of types at run time."""
    try:
        tree = ast.parse(source, feature_version=(3, 9))
    except SyntaxError as error:
        return ["line %s: %s" % (error.lineno, error.msg)]
    notes = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    notes = {id(part) for note in notes if isinstance(note, ast.AST) for part in ast.walk(note)}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and id(node) not in notes:
            if any(_is_type(side) for side in (node.left, node.right)):
                wrong.append("line %d: X | Y of types" % node.lineno)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
            wrong += ["line %d: zip(strict=)" % node.lineno for k in node.keywords if k.arg == "strict"]
        if type(node).__name__ in ("Match", "TryStar"):
            wrong.append("line %d: %s" % (node.lineno, type(node).__name__))
    if "from __future__ import annotations" not in source:
        wrong.append("no `from __future__ import annotations`")
    return wrong


def _is_type(node):
    if isinstance(node, ast.Constant):
        return node.value is None
    return isinstance(node, ast.Name) and isinstance(getattr(builtins, node.id, None), type)


@rule
def the_file_stays_small(source):
    """At most MAX_LINES lines, LF line ends, no tabs, no trailing blanks, one newline at the end."""
    lines, wrong = source.split("\n"), []
    if len(lines) > MAX_LINES:
        wrong.append("%d lines" % len(lines))
    wrong += ["line %d: a tab or CR" % n for n, line in enumerate(lines, 1) if "\t" in line or "\r" in line]
    wrong += ["line %d: blanks at the end" % n for n, line in enumerate(lines, 1) if line != line.rstrip(" ")]
    return wrong if source.endswith("\n") and not source.endswith("\n\n") else wrong + ["the end is not one newline"]


@rule
def the_head_says_what_it_is(source):
    """Shebang, SPDX licence, docstring, `__version__`, and an `__all__` whose every name is there and public."""
    tree, wrong = ast.parse(source), []
    if not source.startswith("#!/usr/bin/env python3\n"):
        wrong.append("no shebang")
    if "# SPDX-License-Identifier: MIT\n" not in source[:200]:
        wrong.append("no licence line")
    constants = {n: s.value for s in tree.body if isinstance(s, ast.Assign) for n in names_bound(s)}
    version = getattr(constants.get("__version__"), "value", "")
    if not isinstance(version, str) or not re.match(r"^\d+\.\d+\.\d+([ab]\d+|rc\d+|\.dev\d+)?$", version):
        wrong.append("__version__ is no version")
    listed = constants.get("__all__")
    if not isinstance(listed, (ast.List, ast.Tuple)) or not listed.elts:
        return wrong + ["no __all__"]
    names = [getattr(element, "value", None) for element in listed.elts]
    bound = {name for statement in tree.body for name in names_bound(statement)}
    wrong += ["__all__ lists %s, which nobody defines" % name for name in names if name not in bound]
    wrong += [
        "__all__ lists the private %s" % name for name in names if str(name).startswith("_") and name != "__version__"
    ]
    return wrong + ["__all__ lists %s twice" % name for name in sorted(set(names)) if names.count(name) > 1]


# --- a sample that obeys, and its broken copies --------------------------------

SAMPLE = f'''#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A sample.

Contents:

   1  ERRORS   the family [pure]
   2  TEXT     words, and more words [pure]
   4  LOOP     the loop [async]
   5  WORKER   another host [host]
  27  MAIN     the only exit [host]
"""

from __future__ import annotations

import json
from typing import Any, Optional
from urllib.parse import urlsplit

__version__ = "0.1.0"

__all__ = ["RouterError", "words", "main"]

{BAR}
# 1 ERRORS - the family [pure]
{BAR}


class RouterError(Exception):
    """The base."""


class LateError(RouterError):
    """A member."""


{BAR}
# 2 TEXT - words, and more words [pure]
{BAR}

Pairs = "a type"
TABLE = {{"a": 1, **{{key: (lambda at: at)(key) for key in "bc"}}}}
_SEEN = ("x",)


class Reader:
    """Reads."""

    __slots__ = ()

    def feed(self, data: bytes) -> Optional[Reader]:
        """Feed."""
        return None


class Second(Reader):
    """Reads as well; `feed` is told above."""

    def feed(self, data: bytes) -> Optional[Reader]:
        return self


def words(text: str, time: float = 0.0) -> Any:
    """Words; `time` is a parameter and no clock."""
    open = [time]
    return json.dumps([TABLE, open, _later(), text, urlsplit(text)])


def _later() -> int:
    return len(_SEEN)


{BAR}
# 4 LOOP - the loop [async]
{BAR}


async def loop(effects: Any) -> Any:
    """Awaits what it is handed."""
    return await effects.send(words(""))


{BAR}
# 5 WORKER - another host [host]
{BAR}


def serve() -> Any:
    """Serves."""
    import js

    return js


{BAR}
# 27 MAIN - the only exit [host]
{BAR}


def main() -> None:
    """Exits."""
    import sys

    sys.exit(serve())


if __name__ == "__main__":
    main()
'''

LONG = "def _later() -> int:\n" + "    words('')\n" * 50
MAIN_GUARD = 'if __name__ == "__main__":\n'
HOST = '    """Serves."""\n'

# (rule, text of SAMPLE, what takes its place)
BREAKS = [
    ("banners_are_well_formed", BAR, BAR + "="),
    ("banners_are_well_formed", BAR, BAR[:-1]),
    ("banners_are_well_formed", "# 4 LOOP - the loop [async]\n", "# 4 LOOP the loop [async]\n"),
    ("banners_are_well_formed", "# 4 LOOP - the loop [async]\n", "# 2 LOOP - the loop [async]\n"),
    ("banners_are_well_formed", "# 4 LOOP - the loop [async]\n", "# 4 LOOP - the loop [magic]\n"),
    ("banners_are_well_formed", "# 2 TEXT - words, and more words [pure]", "# 2 TEXT - words, and more words [host]"),
    ("banners_are_well_formed", "# 2 TEXT -", "# 2 ERRORS -"),
    ("contents_mirror_the_banners", "   2  TEXT     words, and more words [pure]\n", ""),
    ("contents_mirror_the_banners", "   4  LOOP     the loop [async]", "   4  LOOP     the loop [host]"),
    ("contents_mirror_the_banners", "   4  LOOP     the loop", "   4  LOOP     a loop"),
    (
        "contents_mirror_the_banners",
        "   4  LOOP     the loop [async]",
        "   4  LOOP     the loop [async]\n   9  MORE     more [host]",
    ),
    ("contents_mirror_the_banners", "# 1 ERRORS - the family", "# 1 ERRORS - the members"),
    ("sections_only_look_up", "return len(_SEEN)", "return main()"),
    ("sections_only_look_up", "return len(_SEEN)", "return [x for x in serve()]"),
    ("sections_only_look_up", "return len(_SEEN)", "return lambda: serve"),
    (
        "sections_only_look_up",
        '    """The base."""',
        '    """The base."""\n\n    def text(self) -> str:\n        return words("")',
    ),
    ("sections_only_look_up", "def _later() -> int:", "def _later(x: LateError, y: main = 1) -> int:"),
    ("sections_only_look_up", "Pairs = ", "Pairs = lambda: main  # "),
    ("sections_only_look_up", '"""A member."""', '"""A member."""\n\n    reader: Reader'),
    ("sections_only_look_up", MAIN_GUARD, "def words() -> None:\n    pass\n\n\n" + MAIN_GUARD),
    ("every_name_exists", "return len(_SEEN)", "return len(_SEEM)"),
    ("every_name_exists", "def _later() -> int:", "def _later() -> Nit:"),
    ("every_name_exists", 'for key in "bc"', "for key in bc"),
    ("the_head_imports_what_every_host_has", "import json", "import json\nimport asyncio"),
    ("the_head_imports_what_every_host_has", "import json", "import json\nimport urllib.request"),
    ("the_head_imports_what_every_host_has", "import json", "from http import client\nimport json"),
    ("the_head_imports_what_every_host_has", "TABLE = ", "import math\n\nTABLE = "),
    (
        "the_head_imports_what_every_host_has",
        MAIN_GUARD,
        "try:\n    import ssl\nexcept ImportError:\n    ssl = None\n" + MAIN_GUARD,
    ),
    ("only_hosts_import_late", "return len(_SEEN)", "import json\n    return json"),
    ("only_hosts_import_late", "return len(_SEEN)", "from time import monotonic\n    return monotonic"),
    ("only_hosts_import_late", '"""Awaits what it is handed."""', '"""Awaits."""\n    import asyncio'),
    ("only_hosts_import_late", '    """A member."""', '    """A member."""\n\n    import json'),
    ("only_the_standard_library", "import js", "import requests"),
    ("only_the_standard_library", "import sys", "import js"),
    ("only_the_standard_library", "import sys", "from .other import sys"),
    ("only_hosts_touch_the_world", "return len(_SEEN)", "return time.time()"),
    ("only_hosts_touch_the_world", "return len(_SEEN)", "return open('x')"),
    ("only_hosts_touch_the_world", "return len(_SEEN)", "from datetime import datetime\n    return datetime.now()"),
    ("only_hosts_touch_the_world", "return len(_SEEN)", "return [print(x) for x in ()]"),
    ("only_hosts_touch_the_world", 'effects.send(words(""))', "asyncio.sleep(1)"),
    ("only_hosts_touch_the_world", "_SEEN = (", "_SEEN = (random.random(), "),
    ("only_hosts_touch_the_world", "def _later() -> int:", "def _later(x=os.getcwd()) -> int:"),
    ("pure_sections_never_wait", "def _later() -> int:", "async def _later() -> int:"),
    ("functions_are_short", "def _later() -> int:\n", LONG),
    ("the_median_function_is_small", "    return", "    pass\n" * 8 + "    return"),
    ("vendors_are_data", "return len(_SEEN)", 'return "deepseek" in words("")'),
    ("vendors_are_data", "return len(_SEEN)", 'return words("").startswith(("grok", "x"))'),
    ("vendors_are_data", "return len(_SEEN)", 'return words("") in ("api.groq.com", "b")'),
    ("no_dataclasses", "class Reader:", "@dataclass(frozen=True)\nclass Reader:"),
    ("no_dataclasses", "class Reader:", "@dataclasses.dataclass\nclass Reader:"),
    ("one_family_of_errors", "class Reader:", "class Reader(ValueError):"),
    ("one_family_of_errors", "class LateError(RouterError)", "class LateError(Exception)"),
    ("one_family_of_errors", "    return len(_SEEN)", "    try:\n        return 1\n    except:\n        return 2"),
    ("nothing_is_asserted", "return len(_SEEN)", "assert _SEEN"),
    ("only_main_exits", HOST, HOST + "    raise SystemExit(2)\n"),
    ("only_main_exits", HOST, HOST + "    raise SystemExit\n"),
    ("only_main_exits", HOST, HOST + "    import sys\n    sys.exit(1)\n"),
    ("only_main_exits", HOST, HOST + "    import os\n    os._exit(1)\n"),
    ("only_main_exits", HOST, HOST + "    exit()\n"),
    ("public_names_have_docstrings", '    """Words; `time` is a parameter and no clock."""\n', ""),
    ("public_names_have_docstrings", '    """A member."""', "    pass"),
    ("public_names_have_docstrings", '        """Feed."""\n', ""),
    ("nothing_happens_at_import", MAIN_GUARD, 'print("hello")\n\n' + MAIN_GUARD),
    ("nothing_happens_at_import", MAIN_GUARD, "for _X in (1, 2):\n    words(_X)\n\n" + MAIN_GUARD),
    ("nothing_happens_at_import", MAIN_GUARD, "if True:\n"),
    ("no_mutable_module_state", "_SEEN = (", "seen = ("),
    ("no_mutable_module_state", "_SEEN = (", "_seen = ("),
    ("no_mutable_module_state", "return len(_SEEN)", "words.calls = 1\n    Pairs.count = 2"),
    ("no_mutable_module_state", '_SEEN = ("x",)', "_SEEN = []"),
    ("no_mutable_module_state", '_SEEN = ("x",)', "_SEEN: dict = {}"),
    ("no_mutable_module_state", '_SEEN = ("x",)', "_SEEN = set()"),
    ("no_mutable_module_state", "return len(_SEEN)", 'TABLE["b"] = 2'),
    ("no_mutable_module_state", "return len(_SEEN)", 'del TABLE["a"]'),
    ("no_mutable_module_state", "return len(_SEEN)", "TABLE.update(b=2)"),
    ("no_mutable_module_state", "return len(_SEEN)", "global _SEEN\n    _SEEN = ()"),
    ("no_mutable_module_state", "    __slots__ = ()\n", "    __slots__ = ()\n    seen = {}\n"),
    ("no_mutable_module_state", "def _later", "@functools.lru_cache(None)\ndef _later"),
    ("python_39_understands_it", "return len(_SEEN)", "match _SEEN:\n        case _:\n            return 1"),
    ("python_39_understands_it", "return len(_SEEN)", "return isinstance(_SEEN, int | str)"),
    ("python_39_understands_it", "return len(_SEEN)", "return isinstance(_SEEN, tuple | None)"),
    ("python_39_understands_it", "return len(_SEEN)", "return list(zip(_SEEN, _SEEN, strict=True))"),
    ("python_39_understands_it", "from __future__ import annotations\n", ""),
    ("the_file_stays_small", MAIN_GUARD, "\n" * MAX_LINES + MAIN_GUARD),
    ("the_file_stays_small", "return len(_SEEN)", "return len(_SEEN) "),
    ("the_file_stays_small", "    return len(_SEEN)", "\treturn len(_SEEN)"),
    ("the_file_stays_small", "return len(_SEEN)\n", "return len(_SEEN)\r\n"),
    ("the_file_stays_small", MAIN_GUARD + "    main()\n", MAIN_GUARD + "    main()"),
    ("the_head_says_what_it_is", "#!/usr/bin/env python3\n", ""),
    ("the_head_says_what_it_is", "# SPDX-License-Identifier: MIT\n", ""),
    ("the_head_says_what_it_is", '"0.1.0"', '"next"'),
    ("the_head_says_what_it_is", '"words", "main"]', '"words", "mane"]'),
    ("the_head_says_what_it_is", '"words", "main"]', '"words", "_later"]'),
    ("the_head_says_what_it_is", '"words", "main"]', '"words", "words"]'),
    ("the_head_says_what_it_is", "__all__ = ", "ALL = "),
]


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_program_obeys(name):
    """Each law, on the real file."""
    complaints = RULES[name](PROGRAM.read_text(encoding="utf-8"))
    assert not complaints, "\n".join([RULES[name].__doc__] + complaints[:50])


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_sample_obeys(name):
    assert RULES[name](SAMPLE) == []


@pytest.mark.parametrize("number", range(len(BREAKS)), ids=["%s-%d" % (row[0], n) for n, row in enumerate(BREAKS)])
def test_a_broken_copy_is_caught(number):
    name, old, new = BREAKS[number]
    assert old in SAMPLE
    broken = SAMPLE.replace(old, new)
    if name == "python_39_understands_it" and sys.version_info < (3, 10) and "match" in new:
        pytest.skip("this interpreter cannot even compile the broken copy")
    assert RULES[name](broken), "%s does not see it" % name


def test_every_rule_is_tried():
    assert {row[0] for row in BREAKS} == set(RULES)


def test_a_stale_exception_is_caught(monkeypatch):
    """Law 4: a function on the list of long ones that is short, or gone, is a complaint."""
    monkeypatch.setitem(LONG_FUNCTIONS, "words", "a reason")
    monkeypatch.setitem(LONG_FUNCTIONS, "gone", "a reason")
    assert len(functions_are_short(SAMPLE)) == 2


def test_a_listed_function_may_be_long(monkeypatch):
    long = SAMPLE.replace("def _later() -> int:\n", LONG)
    monkeypatch.setitem(LONG_FUNCTIONS, "_later", "a reason")
    assert functions_are_short(long) == []


LATE = (
    "argparse asyncio concurrent.futures curses http.client http.server queue select signal socket sqlite3 ssl"
    " subprocess threading logging dataclasses inspect random"
).split()
BARE = "import sys, %s; print(*sorted(set(sys.modules) & set(%r)))"
WITH = "import sys; sys.path.insert(0, %r); import llm_router; print(*sorted(set(sys.modules) & set(%r)))"


def _isolated(program):
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_program_loads_no_module_of_the_world():
    """Law 3, seen from outside: without site-packages, importing it leaves the heavy modules alone."""
    allowed = ", ".join(sorted(TOP_IMPORTS - {"dataclasses", "__future__"}))
    assert _isolated(WITH % (str(PROGRAM.parent), LATE)) <= _isolated(BARE % (allowed, LATE))


def test_all_can_be_imported():
    _isolated("import sys; sys.path.insert(0, %r); from llm_router import *" % str(PROGRAM.parent))
