"""PTX text to a `Module`: entries, functions, variables, and their instructions.

In: the text NVRTC returns (one or more entries, `.func`s, `.global` / `.const` / `.shared`
variables, nested scopes from inline assembly, `.loc` lines). Out: plain records; no meaning is
given to an opcode here. Names declared in an inner scope get a suffix, so that every name in a
function is unique.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from .errors import PtxParseError

TYPE_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16, "f16x2": 4, "bf16x2": 4, "tf32": 4}
_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.S)
_TOP = re.compile(
    r"\s*(?:(?P<line>\.(?:version|target|address_size|file|loc)\b[^\n]*)"
    r"|(?P<section>\.section\b[^{]*\{[^}]*\})"
    r"|(?P<code>(?:\.(?:visible|weak|extern|common)\s+)*\.(?:entry|func)\b)"
    r"|(?P<stmt>[^;]*;))"
)
_BODY = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<loc>\.(?:loc|file)\b[^\n]*)"
    r"|(?P<label>[A-Za-z_$%][\w$]*)\s*:(?!:)|(?P<stmt>[^;]*;))"
)
_NAME = re.compile(r"[%A-Za-z_$][\w$]*(?:\.[xyzw]\b)?")
_BRACKET = re.compile(r"[\[{(]")
_SPACES = ("param", "shared", "global", "const", "local")
_VARIABLE = tuple(f".{space}" for space in _SPACES)
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+(.*)")
_BRACE = re.compile(r"[{}]")


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction. `parts` is the opcode split at its dots; `line` counts from 1."""

    opcode: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    line: int
    source: str
    text: str


@dataclass(frozen=True)
class Label:
    """A place to jump to."""

    name: str


@dataclass(frozen=True)
class Variable:
    """A declared array or scalar. `size` is in bytes, None for `extern .shared x[]`."""

    name: str
    space: str
    align: int
    size: int | None
    initial: bytes = b""


@dataclass(frozen=True)
class Registers:
    """Register names of one type: ("b32", ("%r0", "%r1"))."""

    type: str
    names: tuple[str, ...]


Statement = Instruction | Label | Variable | Registers


@dataclass
class Function:
    """An entry or a `.func`; a declaration without a body has `body` None."""

    name: str
    is_entry: bool
    params: list[Variable]
    returns: list[Variable]
    directives: str
    body: list[Statement] | None = None


@dataclass
class Module:
    """A parsed PTX text."""

    version: str = ""
    target: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)

    def entry(self, name: str | None = None) -> Function:
        """The entry of that name, or the only one."""
        names = [f.name for f in self.functions.values() if f.is_entry]
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            raise PtxParseError(f"no entry {name!r}; the PTX has {names}. Name one of them.")
        return self.functions[name]


def type_bytes(name: str) -> int:
    """Size in bytes of a PTX type such as u32, b64, f16x2."""
    size = TYPE_BYTES.get(name) or TYPE_BYTES.get(name.lstrip("busfe"))
    if size is None:
        raise PtxParseError(f"type .{name} is not known to the interpreter")
    return size


def split_operands(text: str) -> list[str]:
    """Split at commas that are outside every bracket."""
    if not _BRACKET.search(text):
        *parts, last = map(str.strip, text.split(","))
        return [*parts, last] if last else parts
    out: list[str] = []
    depth, start = 0, 0
    for at, ch in enumerate(text):
        if ch in "[{(":
            depth += 1
        elif ch in "]})":
            depth -= 1
        elif ch == "," and depth == 0:
            out.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*out, last] if last else out


def parse(text: str) -> Module:
    """Parse a whole PTX text."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str):
        self._text = _COMMENT.sub(_blank_comment, text.rstrip("\0"))
        self._starts = [0, *(m.end() for m in re.finditer("\n", self._text))]
        self._module = Module()
        for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self._text):
            self._module.files[int(number)] = path
        self._serial = 0

    def module(self) -> Module:
        at = 0
        while at < len(self._text.rstrip()):
            m = _TOP.match(self._text, at)
            if m is None:
                raise PtxParseError(f"PTX line {self._line(at)}: cannot read this text")
            if m["code"]:
                at = self._function(m.end(), m["code"])
                continue
            if m["line"]:
                self._directive(m["line"])
            elif m["stmt"] and m["stmt"].strip() != ";":
                var = parse_variable(" ".join(m["stmt"][:-1].split()))
                self._module.variables[var.name] = var
            at = m.end()
        return self._module

    def _line(self, at: int) -> int:
        return bisect_right(self._starts, at)

    def _directive(self, text: str) -> None:
        word, _, rest = text.partition(" ") if " " in text else text.partition("\t")
        if word == ".version":
            self._module.version = rest.strip()
        elif word == ".target":
            self._module.target = rest.strip()

    def _function(self, at: int, head: str) -> int:
        m = re.compile(
            r"\s*(?:\((?P<ret>[^)]*)\))?\s*(?P<name>[\w$]+)\s*(?:\((?P<par>[^)]*)\))?"
            r"(?P<dir>[^{;]*)(?P<end>[{;])",
            re.S,
        ).match(self._text, at)
        if m is None:
            raise PtxParseError(f"PTX line {self._line(at)}: malformed function header")
        function = Function(
            m["name"],
            ".entry" in head,
            [parse_variable(p) for p in split_operands(m["par"] or "")],
            [parse_variable(p) for p in split_operands(m["ret"] or "")],
            " ".join(m["dir"].split()),
        )
        known = self._module.functions.get(function.name)
        if known is None or known.body is None:
            self._module.functions[function.name] = function
        if m["end"] == ";":
            return m.end()
        function.body = []
        return self._body(function.body, m.end())

    def _body(self, out: list[Statement], at: int) -> int:
        scopes: list[dict[str, str]] = [{}]
        suffixes = [""]
        source = ""
        while True:
            m = _BODY.match(self._text, at)
            if m is None:
                raise PtxParseError(f"PTX line {self._line(at)}: function body does not end")
            at = m.end()
            if m["open"]:
                self._serial += 1
                suffixes.append(f"@{self._serial}")
                scopes.append(self._scope_labels(at, suffixes[-1]))
            elif m["close"]:
                scopes.pop()
                suffixes.pop()
                if not scopes:
                    return at
            elif m["loc"]:
                source = self._source(m["loc"], source)
            elif m["label"]:
                out.append(Label(_resolve(m["label"], scopes)))
            else:
                stmt = " ".join(m["stmt"][:-1].split())
                if stmt and not stmt.startswith((".pragma", ".noreturn")):
                    line = self._line(m.start("stmt"))
                    out.append(_statement(stmt, scopes, suffixes[-1], line, source))

    def _scope_labels(self, at: int, suffix: str) -> dict[str, str]:
        """Labels of a scope are visible before their definition: collect them when it opens."""
        depth, end = 1, at
        while depth:
            brace = _BRACE.search(self._text, end)
            if brace is None:
                raise PtxParseError(f"PTX line {self._line(at)}: scope does not end")
            depth += 1 if brace[0] == "{" else -1
            end = brace.end()
        found = re.findall(r"(?:^|[\n;{])\s*([A-Za-z_$][\w$]*)\s*:(?!:)", self._text[at:end])
        return {name: name + suffix for name in found}

    def _source(self, text: str, before: str) -> str:
        """`.loc file line column` as "name.cu:line"; line 0 means compiler-made, keep the last."""
        words = text.replace(",", " ").split()
        if words[0] != ".loc" or words[2] == "0":
            return before
        path = self._module.files.get(int(words[1]), "?")
        return f"{path.rsplit('/', 1)[-1]}:{words[2]}"


def _blank_comment(m: re.Match[str]) -> str:
    return m[0] if m[0].startswith('"') else "\n" * m[0].count("\n")


def _resolve(name: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name


def _statement(
    stmt: str, scopes: list[dict[str, str]], suffix: str, line: int, source: str
) -> Statement:
    if stmt.startswith(".reg"):
        return _registers(stmt, scopes, suffix)
    if stmt.startswith(_VARIABLE):
        var = parse_variable(stmt)
        if suffix:
            scopes[-1][var.name] = var.name + suffix
            var = Variable(var.name + suffix, var.space, var.align, var.size, var.initial)
        return var
    if stmt.startswith("."):
        raise PtxParseError(f"PTX line {line}: directive not handled: {stmt}")
    predicate, negated, text = None, False, stmt
    if m := _GUARD.match(stmt):
        negated, predicate, stmt = bool(m[1]), _resolve(m[2], scopes), m[3]
    opcode, _, rest = stmt.partition(" ")
    operands = rest
    if len(scopes) > 1:
        operands = _NAME.sub(lambda t: _resolve(t[0], scopes), rest)
    return Instruction(
        opcode,
        tuple(opcode.split(".")),
        tuple(split_operands(operands)),
        predicate,
        negated,
        line,
        source,
        text,
    )


def _registers(stmt: str, scopes: list[dict[str, str]], suffix: str) -> Registers:
    m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", stmt)
    if m is None:
        raise PtxParseError(f"malformed register declaration: {stmt}")
    names: list[str] = []
    for item in split_operands(m[2]):
        many = re.fullmatch(r"([%\w$]+)<(\d+)>", item)
        names += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item]
    if suffix:
        scopes[-1].update({n: n + suffix for n in names})
        names = [n + suffix for n in names]
    return Registers(m[1], tuple(names))


def parse_variable(text: str) -> Variable:
    """`.shared .align 16 .b8 x[32]`, `.param .u64 p`, `.global .align 4 .b8 t[4] = {1, 2}`."""
    decl, _, init = " ".join(text.split()).partition("=")
    decl = re.sub(r"\.ptr( \.(?:global|shared|local|const))?( \.align \d+)? ", "", decl)
    align = re.search(r"\.align (\d+)", decl)
    space = next((s for s in _SPACES if f".{s}" in decl.split()), "reg")
    m = re.search(r"\.([a-z]+\d+(?:x2)?) ([%\w$]+)((?:\[\d*\])*)\s*$", decl)
    if m is None:
        raise PtxParseError(f"malformed declaration: {text}")
    width = type_bytes(m[1])
    size: int | None = width
    for dim in re.findall(r"\[(\d*)\]", m[3]):
        size = None if dim == "" or size is None else size * int(dim)
    initial = _initial(init.strip(), m[1], size or 0) if init.strip() else b""
    return Variable(m[2], space, int(align[1]) if align else width, size, initial)


def _initial(text: str, type_name: str, size: int) -> bytes:
    """The bytes of an initialiser list."""
    width, out = type_bytes(type_name), bytearray()
    for word in re.findall(r"[^\s,{}]+", text):
        if word[:2] in ("0f", "0F", "0d", "0D"):
            value = int(word[2:], 16)
        elif re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", word):
            value = int(word.rstrip("U"), 0) & ((1 << 8 * width) - 1)
        else:
            raise PtxParseError(f"initialiser {word!r}: addresses of symbols are not supported")
        out += value.to_bytes(width, "little")
    return bytes(out).ljust(size, b"\0")
