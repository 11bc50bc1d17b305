"""Tests of horizon_lite, in the order of its sections.

    python -m pytest            everything; what the machine lacks is skipped and said
    HORIZON_SOAK=5              longer random and load tests; the default is 0.4 (.ci/run sets 2)

Random tests print their seed when they fail; HORIZON_SEED=n repeats one.
"""

from __future__ import annotations

import array
import ast
import asyncio
import base64
import collections
import contextlib
import copy
import dataclasses
import decimal
import doctest
import enum
import errno
import functools
import gc
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import symtable
import threading
import time
import timeit
import tracemalloc
import urllib.request
import uuid
import warnings
import zlib
from pathlib import Path

import pytest

import horizon_lite as hl

HERE = Path(__file__).parent
MODULE = HERE / "horizon_lite.py"
TEXT = MODULE.read_text()
README = HERE / "README.md"
MS = 1_000_000
SOAK = float(os.environ.get("HORIZON_SOAK", "0.4"))


@pytest.fixture
def rng():
    """A random generator; its seed stands in the failing test's output."""
    seed = int(os.environ.get("HORIZON_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"HORIZON_SEED={seed}")
    return random.Random(seed)


class FakeClock:
    """A clock that is turned by hand, in nanoseconds."""

    def __init__(self):
        self.now_ns = 0

    def __call__(self):
        return self.now_ns


# =============================================================================
# 0  SELF - the house itself
# =============================================================================

BANNER = re.compile(r"^# (\d+)  ([A-Z]+) - (.*)$")


TREE = ast.parse(TEXT)


@functools.cache
def banners():
    return [(line, int(match[1]), match[2]) for line, code in enumerate(TEXT.splitlines(), 1)
            if (match := BANNER.match(code))]


def section_of(line):
    return max((number for start, number, _ in banners() if start <= line), default=0)


def test_the_map_in_the_docstring_is_the_list_of_banners():
    in_map = [(int(number), name) for number, name in
              re.findall(r"^ +(\d+)  ([A-Z]+)  +\S", hl.__doc__, re.MULTILINE)]
    assert in_map == [(number, name) for _, number, name in banners()]
    assert in_map == sorted(in_map)


def test_no_section_looks_down_the_page():
    home = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            home.setdefault(node.name, section_of(node.lineno))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        home.setdefault(name.id, section_of(node.lineno))
    upward, scopes = set(), [symtable.symtable(TEXT, "horizon_lite.py", "exec")]
    while scopes:
        for scope in scopes.pop().get_children():
            scopes.append(scope)
            here = section_of(scope.get_lineno())
            upward |= {(here, home[s.get_name()], s.get_name()) for s in scope.get_symbols()
                       if s.is_global() and s.is_referenced() and home.get(s.get_name(), -1) > here}
    assert not upward


@pytest.mark.parametrize("name, allowed", [
    ("exec", {4}), ("eval", set()), ("print", {22}), ("argparse", {0, 22}), ("input", set()),
    ("selectors", {14}), ("socket", {14, 21}), ("threading", {20}), ("signal", {20, 22}),
])
def test_dangerous_names_stay_in_their_sections(name, allowed):
    used = {section_of(node.lineno) for node in ast.walk(TREE)
            if isinstance(node, ast.Name) and node.id == name}
    assert used <= allowed


def test_only_the_standard_library_is_imported():
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names <= sys.stdlib_module_names | {"__future__"}


def test_importing_stays_cheap_and_without_side_effects():
    code = ("import sys, threading; import horizon_lite; "
            "heavy = {'asyncio','ssl','http','tomllib','sqlite3','urllib.request','argparse',"
            "'concurrent.futures','hashlib'} & set(sys.modules); "
            "assert not heavy, heavy; assert threading.active_count() == 1")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


def test_everything_public_is_exported_and_documented():
    defined = {node.name: node for node in TREE.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")}
    for name in hl.__all__:
        assert hasattr(hl, name)
        assert ast.get_docstring(defined[name]), name
    for node in defined.values():
        assert ast.get_docstring(node), node.name
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            decorators = [ast.unparse(each) for each in getattr(method, "decorator_list", ())]
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                assert (ast.get_docstring(method) or "overload" in decorators
                        or f"{method.name}.setter" in decorators), (node.name, method.name)


def test_functions_are_short():
    sizes = {}
    for node in ast.walk(TREE):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            sizes[f"{node.name}:{node.lineno}"] = node.end_lineno - first.lineno + 1
    assert statistics.median(sizes.values()) < 8
    assert not {name for name, size in sizes.items() if size > 60}


def test_lines_are_narrow_and_ascii_outside_the_page():
    page = next(number for _, number, name in banners() if name == "PAGE")
    for number, line in enumerate(TEXT.splitlines(), 1):
        assert line.isascii(), number
        assert len(line) <= 100 or section_of(number) == page, f"line {number}: {len(line)} columns"
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", line), number


def test_what_exists_per_message_or_connection_has_slots():
    for name in ("Event", "Handler", "Publication", "Subscription", "Outbox", "Connection", "Session",
                 "WebSocketConnection", "HTTPConnection", "Request", "Response", "Moves", "Pool"):
        assert "__slots__" in vars(getattr(hl, name)), name
        assert "__dict__" not in dir(getattr(hl, name)), name


def test_doctests():
    failed, attempted = doctest.testmod(hl)
    assert attempted > 10 and not failed


def test_mypy_is_strict_and_clean(tmp_path):
    pytest.importorskip("mypy", reason="pip install mypy")
    user = tmp_path / "user.py"
    user.write_text("import horizon_lite as hl\n"
                    "class Move(hl.Message):\n"
                    "    x: float = hl.field(1, 'double')\n"
                    "move = Move(x=1.0)\n"
                    "reveal: float = Move.decode(move.encode()).x\n"
                    "app = hl.Engine(port=0)\n"
                    "@app.on_client('chat', 'message')\n"
                    "def chat(event: hl.Event) -> None:\n"
                    "    app.publish('chat.lobby', event.data)\n"
                    "@app.on('core:*')\n"
                    "def core(event: hl.Event) -> None: ...\n"
                    "chat(hl.Event('key', None))\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.fspath(tmp_path), MODULE, user],
        capture_output=True, text=True, env={**os.environ, "MYPYPATH": os.fspath(HERE)})
    assert done.returncode == 0, done.stdout


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_program_of_the_readme_runs_as_printed(tmp_path):
    program, client = python_blocks(README)[:2]
    assert len(program.strip().splitlines()) <= 14
    (tmp_path / "chat.py").write_text(program)
    (tmp_path / "horizon_lite.py").write_text(TEXT)
    port = free_port()
    with subprocess.Popen([sys.executable, "chat.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "HORIZON_PORT": str(port)}) as process:
        try:
            assert f"listening on http://127.0.0.1:{port}" in process.stderr.readline()
            url = f"http://127.0.0.1:{port}"
            with hl.connect(url) as other:
                other.subscribe("chat.lobby")
                done = subprocess.run(
                    [sys.executable, "-c", client.replace("http://127.0.0.1:8080", url)],
                    cwd=tmp_path, capture_output=True, text=True, timeout=20)
                assert done.returncode == 0, done.stderr
                assert other.recv(5)["payload"]["text"] == "hello"
                assert "hello" in done.stdout
                other.send({"namespace": "chat", "event": "message", "data": {"text": "spam!"}, "id": 7})
                assert other.recv(5) == {"id": 7, "error": {"code": "cancelled", "message": "no spam, please"}}
        finally:
            process.terminate()
            process.communicate()
    assert process.returncode == 0


def test_the_other_programs_of_the_readme_run(tmp_path):
    programs = python_blocks(README)[2:]
    assert len(programs) >= 3
    running = [(text, subprocess.Popen([sys.executable, "-c", text], cwd=HERE, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE))
               for text in programs if "plugin.run()" not in text]      # that one is started by a host: see below
    for text, process in running:
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and errors == "", (text, errors)


def test_the_readme_tells_the_truth_about_names():
    text = README.read_text()
    for _, number, name in banners():
        assert re.search(rf"\|\s*{number}\s*\|\s*{name}\s*\|", text), f"section {number} {name}"
    app = hl.Engine(port=0)
    table = text.partition("## Metrics")[2].partition("\n## ")[0]
    described = set(re.findall(r"`((?:server|memory|event|events|horizon|plugins)_[a-z_]+)[`{]", table))
    assert "@@" not in text and "| what |" in text.partition("## Numbers")[2]
    names = set(app.metrics._families)
    assert names - described == set(), "metrics that the README does not list"
    assert described - names == set(), "metrics that the README lists and nobody has"
    app.stop()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# =============================================================================
# 1  ERRORS
# =============================================================================

def test_errors_say_whose_fault_it_was():
    assert issubclass(hl.SchemaError, (hl.UsageError, TypeError))
    assert issubclass(hl.StateError, RuntimeError) and issubclass(hl.ConfigError, ValueError)
    assert not issubclass(hl.PeerError, hl.UsageError)
    error = hl.WireError("cut short", at=7)
    assert (str(error), error.at, error.close_code, error.http_status) == ("cut short (byte 7)", 7, 1007, 400)
    assert (hl.TooBig.close_code, hl.TooBig.http_status, hl.SlowPeer.close_code) == (1009, 413, 1013)
    assert hl.BufferTooSmall(9, 4).needed == 9


# =============================================================================
# 2  METRICS
# =============================================================================

def test_a_counter_is_a_sample_of_the_mapping():
    metrics = hl.Metrics()
    metrics.inc("x_total", a="b")
    metrics.inc("x_total", 2, a="b")
    metrics.inc("plain_total", n=5)
    assert metrics['x_total{a="b"}'] == 3 and metrics["plain_total"] == 5
    assert set(metrics) == {'x_total{a="b"}', "plain_total"} and len(metrics) == 2
    assert "nothing" not in metrics


def test_a_counter_gets_the_suffix_prometheus_asks_for():
    metrics = hl.Metrics()
    metrics.inc("hits")
    metrics.inc("hits_total")
    metrics.inc("hits", page="/")
    assert metrics["hits_total"] == metrics["hits"] == 2
    assert metrics['hits_total{page="/"}'] == 1


def test_labels_are_sorted_and_escaped():
    metrics = hl.Metrics()
    metrics.gauge("g", 1.5, z='say "hi"\\\n', a=1)
    assert list(metrics) == ['g{a="1",z="say \\"hi\\"\\\\\\n"}']


def test_a_histogram_is_cumulative_with_infinity_before_sum_and_count():
    metrics = hl.Metrics()
    metrics.describe("h_seconds", "How long.", kind="histogram", buckets=(0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7):
        metrics.observe("h_seconds", value)
    metrics.observe_many("h_seconds", 2, times=3)
    assert metrics.exposition().decode().splitlines() == [
        "# HELP h_seconds How long.", "# TYPE h_seconds histogram",
        'h_seconds_bucket{le="0.1"} 2', 'h_seconds_bucket{le="1.0"} 3',
        'h_seconds_bucket{le="+Inf"} 7', "h_seconds_sum 13.65", "h_seconds_count 7"]
    assert metrics['h_seconds_bucket{le="+Inf"}'] == 7


def test_time_uses_the_clock_it_was_given():
    clock = FakeClock()
    metrics = hl.Metrics(clock)
    with metrics.time("work_seconds", step="one"):
        clock.now_ns += 250 * MS
    assert metrics['work_seconds_sum{step="one"}'] == 0.25


@pytest.mark.parametrize("misuse", [
    lambda m: m.inc("c_total", -1), lambda m: m.inc("bad-name"), lambda m: m.inc("g"),
    lambda m: m.gauge("c_total", 1), lambda m: m.observe("c_total", 1), lambda m: m.inc("x", **{"bad-label": 1}),
])
def test_misused_metrics_are_refused(misuse):
    metrics = hl.Metrics()
    metrics.inc("c_total")
    metrics.gauge("g", 1)
    with pytest.raises(hl.UsageError):
        misuse(metrics)


@pytest.mark.parametrize("misuse", [
    lambda m: m.describe("h", "H.", kind="histogram", buckets=(1.0, math.inf)),
    lambda m: m.describe("h", "H.", kind="histogram", buckets=(2.0, 1.0)), lambda m: m.describe("s", "S.", kind="summary"),
    lambda m: m.gauge("g2", "text"), lambda m: m.inc("n_total", math.nan), lambda m: m.observe("h2", 1, le="x"),
    lambda m: m.observe_many("h3", 1, -1), lambda m: m.inc("u_total", __name__="x"), lambda m: m.gauge("plain", 1),
])
def test_what_would_spoil_the_page_is_refused(misuse):
    metrics = hl.Metrics()
    metrics.inc("plain")
    with pytest.raises(hl.UsageError):
        misuse(metrics)
    metrics.inc("l_total", text="\ud800")
    assert b"plain_total 1" in metrics.exposition()


def test_the_label_of_a_bucket_is_sorted_among_the_others():
    metrics = hl.Metrics()
    metrics.observe("h", 0.2, a=1, z=2)
    assert metrics['h_bucket{a="1",le="0.25",z="2"}'] == 1


def test_watched_values_are_read_when_somebody_looks():
    metrics, counts = hl.Metrics(), {"a": 1}
    metrics.watch("seen_total", lambda: counts, "Seen.", label="kind")
    counts["b"] = 2
    assert metrics['seen_total{kind="b"}'] == 2


def test_prometheus_and_openmetrics_parsers_read_the_exposition():
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus_client")
    openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser")
    metrics = hl.Metrics()
    metrics.inc("a_total", label='tricky "\\\n')
    metrics.gauge("g", math.nan)
    metrics.gauge("i", -math.inf)
    metrics.observe("h", 0.2, x="y")
    families = list(parser.text_string_to_metric_families(metrics.exposition().decode()))
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    assert families[0].samples[0].labels == {"label": 'tricky "\\\n'}
    again = list(openmetrics.text_string_to_metric_families(metrics.exposition(openmetrics=True).decode()))
    assert sorted(family.name for family in again) == ["a", "g", "h", "i"]


# =============================================================================
# 3  WIRE
# =============================================================================

@pytest.mark.parametrize("value, data", [
    (0, b"\0"), (1, b"\1"), (127, b"\x7f"), (128, b"\x80\1"), (150, b"\x96\1"), (300, b"\xac\2"),
    ((1 << 64) - 1, b"\xff" * 9 + b"\1"),
])
def test_varints_as_the_specification_has_them(value, data):
    assert hl._varint(value) == data
    assert hl._read_varint(data + b"rest", 0) == (value, len(data))


def test_overlong_varints_are_cut_to_64_bits_and_eleven_bytes_are_refused():
    assert hl._read_varint(b"\xff" * 9 + b"\x7f", 0)[0] == (1 << 64) - 1
    assert hl._read_varint(b"\x80\x80\0", 0) == (0, 3)
    with pytest.raises(hl.WireError):
        hl._read_varint(b"\x80" * 11, 0)


def test_tags_and_lengths_have_32_bits_in_five_bytes():
    assert hl._read_short(b"\x88\x80\x80\x80\0", 0) == (8, 5)
    for data in (b"\x88\x80\x80\x80\x80\0", b"\xff\xff\xff\xff\x1f"):
        with pytest.raises(hl.WireError, match="32 bits"):
            hl._read_short(data, 0)


@pytest.mark.parametrize("values", [[], [0, 127], [128], [5, 300, (1 << 64) - 1, 0]])
def test_many_varints_are_read_as_one_by_one(values):
    data = b"".join(map(hl._varint, values))
    assert hl._read_varints(memoryview(b"??" + data + b"?"), 2, 2 + len(data)) == values
    for broken in (data + b"\x80", b"\x80" * 11):
        with pytest.raises(hl.WireError):
            hl._read_varints(broken, 0, len(broken))


@pytest.mark.parametrize("value", [0, -1, 1, -2, 2147483647, -2147483648, (1 << 63) - 1, -1 << 63])
def test_zigzag_goes_there_and_back(value):
    assert hl._unzigzag(hl._zigzag(value)) == value


# =============================================================================
# 4  SCHEMA
# =============================================================================

class Kind(enum.IntEnum):
    NONE = 0
    ONE = 1
    LOW = -1


class Vec3(hl.Message):
    x: float = hl.field(1, "double")
    y: float = hl.field(2, "double")


class Tree(hl.Message):
    name: str = hl.field(1, "string")
    left: Tree | None = hl.field(2, "Tree")
    children: list[Tree] = hl.field(3, "Tree", repeated=True)


class Everything(hl.Message):
    f_double: float = hl.field(1, "double")
    f_float: float = hl.field(2, "float")
    f_int32: int = hl.field(3, "int32")
    f_int64: int = hl.field(4, "int64")
    f_uint32: int = hl.field(5, "uint32")
    f_uint64: int = hl.field(6, "uint64")
    f_sint32: int = hl.field(7, "sint32")
    f_sint64: int = hl.field(8, "sint64")
    f_fixed32: int = hl.field(9, "fixed32")
    f_fixed64: int = hl.field(10, "fixed64")
    f_sfixed32: int = hl.field(11, "sfixed32")
    f_sfixed64: int = hl.field(12, "sfixed64")
    f_bool: bool = hl.field(13, "bool")
    f_string: str = hl.field(14, "string")
    f_bytes: bytes = hl.field(15, "bytes")
    f_enum: int = hl.field(16, Kind)
    f_message: Vec3 | None = hl.field(17, Vec3)
    r_int32: list[int] = hl.field(20, "int32", repeated=True)
    r_unpacked: list[int] = hl.field(21, "sint64", repeated=True, packed=False)
    r_double: list[float] = hl.field(22, "double", repeated=True)
    r_bool: list[bool] = hl.field(23, "bool", repeated=True)
    r_string: list[str] = hl.field(24, "string", repeated=True)
    r_message: list[Vec3] = hl.field(25, Vec3, repeated=True)
    r_enum: list[int] = hl.field(26, Kind, repeated=True)
    o_int32: int | None = hl.field(30, "int32", optional=True)
    o_string: str | None = hl.field(31, "string", optional=True)
    m_string: dict[str, int] = hl.field(40, map=("string", "sint32"))
    m_int: dict[int, Vec3] = hl.field(41, map=("int32", Vec3))
    m_bool: dict[bool, bytes] = hl.field(42, map=("bool", "bytes"))
    c_message: Vec3 | None = hl.field(50, Vec3, oneof="choice")
    c_string: str | None = hl.field(51, "string", oneof="choice")
    c_int: int | None = hl.field(52, "int64", oneof="choice")


EVERYTHING_PROTO = """\
syntax = "proto3";
enum Kind { NONE = 0; ONE = 1; LOW = -1; }
message Vec3 { double x = 1; double y = 2; }
message Everything {
  double f_double = 1; float f_float = 2; int32 f_int32 = 3; int64 f_int64 = 4;
  uint32 f_uint32 = 5; uint64 f_uint64 = 6; sint32 f_sint32 = 7; sint64 f_sint64 = 8;
  fixed32 f_fixed32 = 9; fixed64 f_fixed64 = 10; sfixed32 f_sfixed32 = 11; sfixed64 f_sfixed64 = 12;
  bool f_bool = 13; string f_string = 14; bytes f_bytes = 15; Kind f_enum = 16; Vec3 f_message = 17;
  repeated int32 r_int32 = 20; repeated sint64 r_unpacked = 21 [packed=false];
  repeated double r_double = 22; repeated bool r_bool = 23; repeated string r_string = 24;
  repeated Vec3 r_message = 25; repeated Kind r_enum = 26;
  optional int32 o_int32 = 30; optional string o_string = 31;
  map<string, sint32> m_string = 40; map<int32, Vec3> m_int = 41; map<bool, bytes> m_bool = 42;
  oneof choice { Vec3 c_message = 50; string c_string = 51; int64 c_int = 52; }
}
"""


@pytest.mark.parametrize("message, data", [
    (Everything(f_int32=150), "18 96 01"),
    (Everything(f_string="testing"), "72 07 74 65 73 74 69 6e 67"),
    (Everything(f_int32=-1), "18 ff ff ff ff ff ff ff ff ff 01"),
    (Everything(f_double=-0.0), "09 00 00 00 00 00 00 00 80"),
    (Everything(r_int32=[3, 270, 86942]), "a2 01 06 03 8e 02 9e a7 05"),
    (Everything(r_unpacked=[1, -1]), "a8 01 02 a8 01 01"),
    (Everything(o_int32=0), "f0 01 00"),
    (Everything(m_string={"": 0}), "c2 02 04 0a 00 10 00"),
    (Everything(c_string=""), "9a 03 00"),
    (Everything(f_message=Vec3()), "8a 01 00"),
    (Everything(), ""),
])
def test_bytes_are_those_of_the_specification(message, data):
    assert message.encode() == bytes.fromhex(data)
    assert Everything.decode(bytes.fromhex(data)) == message
    assert message.byte_size() == len(bytes.fromhex(data))


INT_EDGES = {"int32": (-1 << 31, (1 << 31) - 1), "int64": (-1 << 63, (1 << 63) - 1),
             "uint32": (0, (1 << 32) - 1), "uint64": (0, (1 << 64) - 1)}


def random_value(rng, kind):
    for prefix in ("sfixed", "fixed", "s"):
        if kind.startswith(prefix) and kind != "string":
            kind = {"sfixed": "int", "fixed": "uint", "s": "i"}[prefix] + kind[len(prefix) + (prefix == "s"):]
            break
    if kind in INT_EDGES:
        low, high = INT_EDGES[kind]
        return rng.choice([0, 1, low, high, rng.randint(low, high), rng.randint(max(low, -200), 200)])
    return {"double": lambda: rng.choice([0.0, -0.0, 1.5, math.inf, rng.uniform(-1e300, 1e300)]),
            "float": lambda: rng.choice([0.0, -0.0, 0.5, -math.inf, 1e39]),
            "bool": lambda: rng.random() < 0.5,
            "string": lambda: "".join(rng.choice("aZ0\u00e9\u20ac\U0001f600") for _ in range(rng.randrange(200))),
            "bytes": lambda: rng.randbytes(rng.randrange(300)),
            "enum": lambda: rng.choice([0, 1, -1, 77])}[kind]()


def fill(rng, ours, theirs=None, depth=2):
    """Set random fields of a message, and the same in Google's.

    There maps get one entry at most: the order of several is everybody's own.
    """
    names = ours._proto.names if ours._proto else {}
    for field in type(ours)._prepare()._fields:
        if rng.random() < 0.5 or field.oneof and ours.which(field.oneof) or field.kind == "message" and not depth:
            continue
        other = theirs and getattr(theirs, names.get(field.name, field.name))
        if field.map:
            key_field, value_field = field.target._prepare()._fields
            for key in {random_value(rng, key_field.kind) for _ in range(rng.randrange(4 if theirs is None else 2))}:
                if value_field.kind == "message":
                    value = value_field.target()
                    fill(rng, value, theirs and other[key], depth - 1)
                else:
                    value = random_value(rng, value_field.kind)
                    if theirs is not None:
                        other[key] = value
                getattr(ours, field.name)[key] = value
            continue
        for _ in range(rng.randrange(5) if field.repeated else 1):
            if field.kind == "message":
                value = field.target()
                if theirs is not None and not field.repeated:
                    other.SetInParent()
                fill(rng, value, theirs and (other.add() if field.repeated else other), depth - 1)
            else:
                value = random_value(rng, field.kind)
                if theirs is not None and field.repeated:
                    other.append(value)
                elif theirs is not None:
                    setattr(theirs, names.get(field.name, field.name), value)
            if field.repeated:
                getattr(ours, field.name).append(value)
            else:
                setattr(ours, field.name, value)


# -- the plain twin of what is generated: slow, and easy to believe --

FIXED = {"double": "<d", "float": "<f", "fixed64": "<Q", "fixed32": "<I", "sfixed64": "<q", "sfixed32": "<i"}


def plain_varint(value):
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F)
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def plain_scalar(kind, value):
    """Return (wire type, bytes without a length) of one value."""
    if kind in FIXED:
        if kind == "float" and math.isfinite(value) and abs(value) > 3.4028235677973366e38:
            value = math.copysign(math.inf, value)
        return 1 if struct.calcsize(FIXED[kind]) == 8 else 5, struct.pack(FIXED[kind], value)
    if kind in ("string", "bytes"):
        return 2, bytes(value, "utf-8") if kind == "string" else bytes(value)
    if kind.startswith("sint"):
        value = 2 * value if value >= 0 else -2 * value - 1
    return 0, plain_varint(int(bool(value) if kind == "bool" else value) % (1 << 64))


def plain_field(number, wire_type, data):
    length = plain_varint(len(data)) if wire_type == 2 else b""
    return plain_varint(number << 3 | wire_type) + length + data


def plain_encode(message):
    """Encode by looping over the fields, as the specification reads."""
    out = b""
    for field in sorted(type(message)._prepare()._fields, key=lambda each: each.number):
        value = getattr(message, field.name)
        if field.map:
            values = [field.target(*item) for item in value.items()]
        else:
            values = value if field.repeated else [] if value is None else [value]
        if field.kind == "message":
            for each in values:
                out += plain_field(field.number, 2, plain_encode(each))
            continue
        pairs = [plain_scalar(field.kind, each) for each in values]
        if field.repeated and field.packed and pairs and pairs[0][0] != 2:
            out += plain_field(field.number, 2, b"".join(data for _, data in pairs))
        elif field.repeated or field.explicit or field.always or pairs[0][1].strip(b"\0"):
            out += b"".join(plain_field(field.number, *pair) for pair in pairs)
    return out + message._unknown


def test_generated_code_writes_what_the_plain_twin_does(rng):
    for _ in range(int(300 * SOAK)):
        message = Everything()
        fill(rng, message)
        data = message.encode()
        assert data == plain_encode(message) and message.byte_size() == len(data)
        again = Everything.decode(memoryview(b"?" + data)[1:])
        assert again.encode() == data == again.__class__.decode(data).encode()


class Shot(hl.Message):             # a string, a run and bools: one struct call for all of it
    by: str = hl.field(1, "string")
    x: float = hl.field(2, "double")
    angle: float = hl.field(3, "float")
    weapon: int = hl.field(4, "fixed32")
    hit: bool = hl.field(100, "bool")


class Blob(hl.Message):             # runs that are not the whole message
    lead: bytes = hl.field(1, "bytes")
    x: float = hl.field(2, "float")
    y: int = hl.field(3, "sfixed64")
    more: int = hl.field(4, "uint32")
    z: float = hl.field(5000, "double")
    w: float = hl.field(256661, "double")           # a brace among the bytes of its tag


def test_runs_are_byte_identical_whatever_is_missing(rng):
    assert struct.Struct(hl._whole(hl._parts_of(Shot._prepare()._fields)).reads % 3).size == 2 + 3 + 9 + 5 + 5 + 3
    texts = ["", "a", "\u20ac" * 40, "x" * 127, "y" * 128, "z" * 300]
    for cls, values in ((Shot, (texts, [0.0, -0.0, 1.5, math.nan, 5], [0.0, -0.0, 1e-46, -1e-46, 7e-46, 1e39, -1e39, 2.5, math.inf],
                                [0, 7, (1 << 32) - 1], [False, True, 5])),
                        (Blob, ([text.encode() for text in texts], [0.0, -0.0, 1e-46, 1.5, 1e39], [0, -1, 1 << 62],
                                [0, 5, 128], [0.0, 2.5], [0.0, -0.0, 9.0]))):
        for each in itertools.product(*values):
            message = cls(*each)
            data = message.encode()
            assert data == plain_encode(message), each
            out, buffer = bytearray(b"!"), bytearray(len(data))
            message.append_to(out)
            assert out[1:] == data and message.encode_into(buffer) == len(data) == message.byte_size() and buffer == data
            again, reused = cls.decode(data), cls(*values[0][:1])
            reused.decode_from(memoryview(data))
            assert again.encode() == data and reused.encode() == data and cls.decode(bytearray(data)).encode() == data
    pieces = [plain_field(1, 2, b"who"), plain_field(2, 1, struct.pack("<d", 1.5)), plain_field(3, 5, struct.pack("<f", 2.5)),
              plain_field(4, 5, struct.pack("<I", 9)), plain_field(100, 0, b"\x81\1"), plain_field(9, 0, b"\5")]
    want = {field.name: value for field, value in zip(Shot._fields, ["who", 1.5, 2.5, 9, True], strict=True)}
    for _ in range(200):            # any order, some twice: the last wins, unknown ones are kept
        rng.shuffle(pieces)
        message = Shot.decode(b"".join(pieces[:3] + pieces))
        assert message.to_dict() == want and set(message._unknown) == {0x48, 5}


def test_the_move_event_is_one_struct_call():
    move = hl.builtin_schema().PlayerMoveEvent
    whole = hl._whole(hl._parts_of(move._prepare()._fields))
    assert whole.reads == "<BB%dsBdBdBdBfBfBB" and whole.lead.name == "player_uuid"
    assert "return pack_whole[size](head_1[size], raw, b'\\x11', v2" in move.__source__["encode"]
    assert "unpack_whole[size](data)" in move.__source__["decode"]


@pytest.fixture(scope="session")
def google(tmp_path_factory):
    """Google's classes for EVERYTHING_PROTO."""
    protoc = pytest.importorskip("grpc_tools.protoc", reason="pip install grpcio-tools protobuf")
    folder = tmp_path_factory.mktemp("google")
    (folder / "everything.proto").write_text(EVERYTHING_PROTO)
    (folder / "horizon.proto").write_text(hl.builtin_proto())
    assert protoc.main(["protoc", f"-I{folder}", f"--python_out={folder}",
                        "everything.proto", "horizon.proto"]) == 0
    sys.path.insert(0, os.fspath(folder))
    import everything_pb2
    import horizon_pb2
    sys.path.remove(os.fspath(folder))
    return everything_pb2, horizon_pb2


def test_the_bytes_are_googles(google, rng):
    for _ in range(int(300 * SOAK)):
        agree(Everything(), google[0].Everything(), rng)


def agree(ours, theirs, rng):
    """Fill both alike, and compare what they write and what they read of each other."""
    fill(rng, ours, theirs)
    data = theirs.SerializeToString(deterministic=True)
    assert ours.encode() == data and ours.byte_size() == len(data)
    assert type(theirs).FromString(ours.encode()).SerializeToString(deterministic=True) == data
    again = type(ours).decode(data)
    assert again.encode() == data and type(ours).decode(memoryview(data)).encode() == data


SCALARS = ["double", "float", "int32", "int64", "uint32", "uint64", "sint32", "sint64", "fixed32", "fixed64",
           "sfixed32", "sfixed64", "bool", "string", "bytes"]


def test_maps_mean_the_same_to_google(google, rng):
    for _ in range(50):
        ours = Everything(m_string={str(n): n - 5 for n in range(rng.randrange(9))},
                          m_int={n: Vec3(x=n) for n in rng.sample(range(-99, 99), 5)}, m_bool={True: b"t", False: b"f"})
        theirs = google[0].Everything.FromString(ours.encode())
        assert dict(theirs.m_string) == ours.m_string and dict(theirs.m_bool) == ours.m_bool
        assert {key: value.x for key, value in theirs.m_int.items()} == {key: value.x for key, value in ours.m_int.items()}
        again = Everything.decode(theirs.SerializeToString())
        assert (again.m_string, again.m_int, again.m_bool) == (ours.m_string, ours.m_int, ours.m_bool)


def random_proto(rng, count):
    """Return .proto text of so many messages that refer to each other, with every kind of field."""
    text = 'syntax = "proto3";\npackage random.test;\nenum Color { NONE = 0; RED = 1; LOW = -1; }\n'
    for number in range(count):
        numbers = [*rng.sample(range(1, 16), 8), *rng.sample(range(16, 5000), 8), *rng.sample(range(1 << 20, 1 << 29), 2)]
        if rng.random() < 0.5:
            numbers.sort()          # neighbours in the text are neighbours on the wire
        lines, kinds = [], [*SCALARS, "double", "float", "fixed32", "Color", f"M{rng.randrange(count)}", f"M{rng.randrange(count)}"]
        for at, field_number in enumerate(numbers[:rng.randint(0, len(numbers))]):
            kind, roll = rng.choice(kinds), rng.random()
            if roll < 0.12:
                kind = f"map<{rng.choice([each for each in SCALARS if each not in ('double', 'float', 'bytes')])}, {kind}>"
            elif roll < 0.3:
                packed = rng.choice(["", " [packed = false]"]) if kind in SCALARS[:13] else ""
                lines.append(f"repeated {kind} f{at} = {field_number}{packed};")
                continue
            elif roll < 0.4:
                kind = f"optional {kind}"
            elif roll < 0.5:
                lines.append(f"oneof o{at} {{ {kind} f{at} = {field_number}; string s{at} = {field_number + 5000}; }}")
                continue
            lines.append(f"{kind} f{at} = {field_number};")
        text += f"message M{number} {{\n  " + "\n  ".join(lines) + "\n}\n"
    return text


def google_classes(folder, text, *more):
    """Return what protoc and Google's runtime make of .proto files, and their descriptors."""
    protoc = pytest.importorskip("grpc_tools.protoc", reason="pip install grpcio-tools protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    (folder / "text.proto").write_text(text)
    well_known = Path(protoc.__file__).parent / "_proto"
    assert protoc.main(["protoc", f"-I{folder}", f"-I{well_known}", "--include_imports",
                        f"--descriptor_set_out={folder}/set", "text.proto", *more]) == 0
    files = descriptor_pb2.FileDescriptorSet.FromString((folder / "set").read_bytes()).file
    pool = descriptor_pool.DescriptorPool()
    for each in files:
        pool.Add(each)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)), files


def test_random_schemas_agree_with_google_in_both_directions(tmp_path, rng):
    for _ in range(max(1, int(SOAK))):
        text = random_proto(rng, 40)
        theirs, _ = google_classes(tmp_path, text)
        ours = hl.parse_proto(text)
        assert hl.parse_proto(hl.proto_text(*vars(ours).values())).M0._prepare()
        for name, cls in vars(ours).items():
            for _ in range(50 if issubclass(cls, hl.Message) else 0):
                agree(cls(), theirs(f"random.test.{name}")(), rng)


def random_wire(rng, cls, depth=3):
    """Return bytes that are nearly a message: known and unknown fields, right and wrong, in any order."""
    def varint(value):
        data = plain_varint(value)
        if rng.random() < 0.05:     # longer than needed
            data = data[:-1] + bytes([data[-1] | 0x80]) + b"\x80" * rng.randrange(9) + rng.choice([b"\0", b"\1", b"\x7f"])
        return data

    out = b""
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        field = rng.choice(cls._prepare()._fields)
        number = field.number if rng.random() < 0.9 else rng.choice([1, 5, 999, (1 << 29) - 1, 1 << 29])
        wire_type = field.wire_type if rng.random() < 0.8 else rng.randrange(8)
        out += varint(number << 3 | wire_type)
        if wire_type == 0:
            out += varint(rng.choice([0, 1, 127, 128, rng.randrange(1 << 32), rng.randrange(1 << 64), (1 << 64) - 1]))
        elif wire_type in (1, 5):
            out += rng.choice([rng.randbytes(4), b"\0\0\xc0\x7f"]) * (2 if wire_type == 1 else 1)
        elif wire_type == 2:
            inner = field.target if field.kind == "message" else cls
            data = random_wire(rng, inner, depth - 1) if depth and rng.random() < 0.6 else rng.randbytes(rng.randrange(12))
            out += varint(rng.choice([len(data)] * 20 + [len(data) + 1, 1 << 31, 1 << 35, (1 << 64) - 1])) + data
        elif wire_type == 3:
            out += (random_wire(rng, cls, depth - 1) if depth else b"") + varint(number << 3 | 4)
    return out


def test_bytes_that_nobody_wrote_are_taken_as_google_takes_them(google, rng):
    """Accepted and refused alike, and written back alike."""
    from google.protobuf.message import DecodeError
    ours, counts = hl.parse_proto(EVERYTHING_PROTO).Everything, [0, 0]
    maps = re.compile(rb"[\xc2\xca\xd2]")      # an entry with unknown fields is kept, but normalised by Google
    signalling = re.compile(rb"\x15..[\x80-\xbf][\x7f\xff]", re.DOTALL)      # NaN that C keeps and a double can't
    for _ in range(int(4000 * SOAK)):
        data = random_wire(rng, ours)
        try:
            theirs = google[0].Everything.FromString(data)
        except DecodeError:
            theirs = None
        try:
            mine = ours.decode(data)
        except hl.WireError as error:
            if "field number 0" in str(error):      # Google lets it pass inside unknown groups
                continue
            mine = None
        assert (mine is None) == (theirs is None), data.hex()
        counts[mine is None] += 1
        if mine is not None and not maps.search(data) and not signalling.search(data):
            assert mine.encode() == theirs.SerializeToString(deterministic=True), data.hex()
    assert min(counts) > 100


def test_unknown_fields_and_groups_are_kept_and_written_back():
    unknown = b"\xc0>\x01" + b"\xc3>\x08\x01\x13\x14\xc4>" + b"\xc5>abcd" + b"\xc2>\x02hi"
    message = Vec3.decode(Vec3(x=1.0).encode() + unknown)
    assert message.x == 1.0 and message.encode() == Vec3(x=1.0).encode() + unknown
    assert message != Vec3(x=1.0) and message.byte_size() == len(message.encode())
    message.clear()
    assert message == Vec3()


def test_a_field_with_another_wire_type_is_unknown_and_kept():
    data = bytes.fromhex("0a 01 61")           # field 1 as text, declared double
    assert Vec3.decode(data).x == 0.0 and Vec3.decode(data).encode() == data


def test_packed_and_unpacked_are_both_read():
    assert Everything.decode(bytes.fromhex("a0 01 03 a0 01 05")).r_int32 == [3, 5]
    assert Everything.decode(bytes.fromhex("aa 01 02 02 01")).r_unpacked == [1, -1]


def test_the_last_one_wins_and_messages_merge():
    assert Everything.decode(bytes.fromhex("18 01 18 02")).f_int32 == 2
    twice = Everything(f_message=Vec3(x=1.0)).encode() + Everything(f_message=Vec3(y=2.0)).encode()
    assert Everything.decode(twice).f_message == Vec3(x=1.0, y=2.0)
    data = Everything(c_int=5).encode() + Everything(c_string="s").encode()
    message = Everything.decode(data)
    assert (message.which("choice"), message.c_int, message.c_string) == ("c_string", None, "s")
    twice = Everything(m_string={"a": 1}).encode() + Everything(m_string={"a": 2}).encode()
    assert Everything.decode(twice).m_string == {"a": 2}


def test_a_map_entry_without_key_or_value_has_the_defaults():
    assert Everything.decode(bytes.fromhex("c2 02 00")).m_string == {"": 0}
    assert Everything.decode(bytes.fromhex("ca 02 00")).m_int == {0: Vec3()}


def test_setting_one_of_a_oneof_clears_the_others():
    message = Everything(c_message=Vec3())
    message.c_int = 0
    assert (message.which("choice"), message.c_message) == ("c_int", None)
    message.c_string = None                     # not the one that is set: nothing happens
    assert message.which("choice") == "c_int"
    message.c_int = None
    assert message.which("choice") is None
    with pytest.raises(hl.UsageError):
        message.which("nothing")


def test_unknown_enum_numbers_survive_as_int():
    message = Everything.decode(bytes.fromhex("80 01 4d d2 01 02 01 4d"))
    assert message.f_enum == 77 and message.r_enum == [Kind.ONE, 77]
    assert Everything.decode(Everything(f_enum=Kind.LOW).encode()).f_enum is Kind.LOW


def test_recursion_and_its_limit():
    tree = Tree(name="root", left=Tree(name="l"), children=[Tree(), Tree(name="c")])
    assert Tree.decode(tree.encode()) == tree
    deep = Tree()
    for _ in range(98):
        deep = Tree(left=deep)
    assert Tree.decode(deep.encode()) == deep
    for _ in range(3):
        deep = Tree(left=deep)
    with pytest.raises(hl.HorizonError, match="deep"):
        deep.encode()
    data = b""
    for _ in range(10_000):
        data = b"\x12" + hl._varint(len(data)) + data
        if len(data) > 20_000:
            break
    with pytest.raises(hl.WireError, match="deeper"):
        Tree.decode(data)
    with pytest.raises(hl.WireError, match="deeper"):
        Vec3.decode(b"\x1b" * 10_000)


def test_a_cycle_is_an_error_and_not_a_crash():
    tree = Tree(name="me")
    tree.left = tree
    with pytest.raises(hl.HorizonError):
        tree.encode()
    with pytest.raises(hl.HorizonError):
        tree.byte_size()


@pytest.mark.parametrize("data, at", [
    ("09 00 00", 3), ("72 05 61", 2), ("00 01", 0), ("0e", 0), ("07 00", 0), ("72 02 ff 61", 2),
    ("18 80 80 80 80 80 80 80 80 80 80 01", None), ("a2 01 03 80 80 80", None), ("0c", 0),
    ("1b 08 01", None), ("8a 01 03 09 00 00 00 00", None), ("72 ff ff ff ff 0f", None),
    ("a2 01 05 01", None), ("b2 01 07 00 00 00 00 00 00 00", None),
])
def test_malformed_bytes_are_refused_with_their_place(data, at):
    with pytest.raises(hl.WireError) as caught:
        Everything.decode(bytes.fromhex(data))
    assert caught.value.at is not None and (at is None or caught.value.at == at)


def test_every_truncation_and_flip_is_a_message_or_a_wire_error(rng):
    message = Everything()
    fill(rng, message)
    data = message.encode()[:600]
    for cut in range(len(data)):
        with contextlib.suppress(hl.WireError):
            Everything.decode(data[:cut])
    for _ in range(int(2000 * SOAK)):
        broken = bytearray(data or b"x")
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(hl.WireError):
            again = Everything.decode(broken)
            assert again.byte_size() == len(again.encode())
        with contextlib.suppress(hl.WireError):
            Everything.decode(rng.randbytes(rng.randrange(80)))


@pytest.mark.parametrize("data, words", [
    (b"\x72\xff\xff\xff\xff\x07" + b"x" * 4, "runs past the end"), (b"\xa2\1\xff\xff\xff\xff\7ab", "runs past the end"),
    (b"\x72\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "more than 32 bits"), (b"\x8a\1\xff\xff\xff\xff\7", "runs past the end"),
    (b"\xb2\1\3" + b"\0" * 3, "ends inside a value"), (b"\xa2\1\2\1\x80", "ends inside a varint"),
    (b"\x72\x02\xed\xa0", "not UTF-8"), (b"\xc0>", "cut short"), (b"\xc3>" * 20000, "nested deeper than 100"),
])
def test_hostile_messages_are_refused_in_little_time_and_memory(data, words):
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(hl.WireError, match=words):
        Everything.decode(data)
    assert time.process_time() - began < 1.0 and tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_nesting_of_ten_thousand_is_refused_and_a_million_packed_entries_are_read():
    data = b""
    for _ in range(10_000):
        data = plain_field(2, 2, data)
    with pytest.raises(hl.WireError, match="nested deeper than 100"):
        Tree.decode(data)
    for values in ([5] * 1_000_000, [-1, 300] * 50_000):
        assert Everything.decode(Everything(r_int32=values).encode()).r_int32 == values
    assert len(Everything.decode(Everything(r_double=[1.5] * 300_000).encode()).r_double) == 300_000
    assert len(Everything.decode(b"\xc0>\1" * 200_000)._unknown) == 600_000


def test_a_pooled_message_and_buffer_leave_nothing_behind():
    """25,000 events, and more in CI: filled, written, read; live blocks and bytes as before."""
    pool, buffers = hl.Pool(Shot, reset=Shot.clear), hl.BufferPool()

    def events(count):
        for number in range(count):
            sent, got, buffer = pool.acquire(), pool.acquire(), buffers.acquire()
            sent.by, sent.x, sent.angle, sent.weapon, sent.hit = "somebody", number, 1.5, 7, True
            size = sent.encode_into(buffer)
            got.decode_from(memoryview(buffer)[:size])
            assert got.x == number
            for message in (sent, got):
                pool.release(message)
            buffers.release(buffer)

    events(1000)
    gc.collect()
    gc.disable()
    blocks = sys.getallocatedblocks()
    events(int(15_000 * SOAK))
    grown = sys.getallocatedblocks() - blocks
    tracemalloc.start()
    events(1000)
    before = tracemalloc.get_traced_memory()[0]
    events(int(9_000 * SOAK))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gc.enable()
    assert grown < 100 and held - before < 2000 and peak - before < 20_000
    assert pool.misses == 2 and buffers.misses == 1


def test_encode_into_makes_no_copy_of_what_is_large():
    big = Everything(f_bytes=b"x" * 5_000_000)
    buffer = bytearray(5_000_100)
    tracemalloc.start()
    end = big.encode_into(buffer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 and buffer[:end] == big.encode()


def test_a_user_may_add_methods_and_a_constructor():
    class Point(hl.Message):
        x: float = hl.field(1, "double")
        y: float = hl.field(2, "double")

        def __init__(self, both=0.0):
            super().__init__(x=both, y=both)

        def length(self):
            return math.hypot(self.x, self.y)

    class Named(Point):
        def encode(self):
            return b"mine" + super().encode()
    point = Point.decode(Point(3.0).encode())
    assert point == Point(3.0) and type(Named.decode(point.encode())) is Named and point.length() == math.hypot(3, 3)
    assert Named(1.0).encode() == b"mine" + Point(1.0).encode() and Named(2.0) != Point(2.0)
    with pytest.raises(TypeError, match="Shot.__init__"):
        Shot(speed=1)


class Lists(hl.Message):
    sints: list[int] = hl.field(1, "sint32", repeated=True)
    bools: list[bool] = hl.field(2, "bool", repeated=True)
    floats: list[float] = hl.field(3, "float", repeated=True)
    items: dict[int, Vec3] = hl.field(4, map=("int32", Vec3))
    color: int = hl.field(5, Kind)


@pytest.mark.parametrize("values, words", [
    ({"sints": [1, "2"]}, "Lists.sints: '2' is not of type sint32"), ({"sints": [1 << 40]}, "Lists.sints: 1099511627776 is out of range"),
    ({"bools": [True, None]}, "Lists.bools: None is not of type bool"), ({"floats": [1.0, "x"]}, "Lists.floats: 'x' is not of type float"),
    ({"items": {1: None}}, "Lists.items.value: None is not of type Vec3"), ({"color": "ONE"}, "Lists.color: 'ONE' is not of type Kind: NONE, ONE, LOW"),
    ({"items": {1: type(hl.Message)("Vec3", (hl.Message,), {"x": hl.field(1, "double")})()}}, "but of another class of that name"),
])
def test_a_wrong_value_in_a_container_is_named_by_every_way_to_write(values, words):
    message = Lists(**values)
    for act in (message.encode, message.byte_size, lambda: message.append_to(bytearray()), lambda: message.encode_into(bytearray(99))):
        with pytest.raises(hl.UsageError, match=re.escape(words)):
            act()


def test_buffers_are_what_they_should_be():
    with pytest.raises(hl.UsageError, match="grows a bytearray, not bytes"):
        Vec3(x=1.0).append_to(b"")
    with pytest.raises(hl.UsageError, match="at is -2"):
        Vec3(x=1.0).encode_into(bytearray(20), -2)
    with pytest.raises(hl.UsageError, match="bytes can't be written to"):
        Vec3(x=1.0).encode_into(b"x" * 20)
    for wide in (memoryview(bytearray(64)).cast("i"), array.array("I", [0] * 16), memoryview(bytearray(64)).cast("B", (8, 8))):
        assert Vec3(x=1.0).encode_into(wide, 3) == 12 and bytes(wide)[3:12] == Vec3(x=1.0).encode()
        with pytest.raises(hl.BufferTooSmall, match="9 bytes needed, 4 given"):
            Vec3(x=1.0).encode_into(wide, 60)
    buffer = bytearray(b"\x12\x05ab")
    for act in (Everything.decode, Everything().decode_from):
        try:
            act(buffer)
        except hl.WireError as error:
            kept = error
            buffer += b"x"          # nothing of it is held by the error's traceback
            assert kept.at is not None


def test_what_is_unknown_or_wrong_shows():
    assert repr(Vec3.decode(b"\x40\1")) == "Vec3(<2 bytes of unknown fields>)" and repr(Vec3(x=None)) == "Vec3(x=None)"
    for declare in (lambda: type(hl.Message)("M", (hl.Message,), {"a": hl.field(1, "int32", oneof="a")}),
                    lambda: type(hl.Message)("M", (hl.Message,), {"a": hl.field(1, hl.Message)})()):
        with pytest.raises(hl.SchemaError):
            declare()
    with pytest.raises(hl.SchemaError, match="did you mean 'string'"):
        type(hl.Message)("M", (hl.Message,), {"a": hl.field(1, str)})()
    with pytest.raises(hl.UsageError, match="takes a dict"):
        Vec3.from_dict([1])


def test_maps_come_back_from_json_with_their_kinds_of_keys():
    message = Everything(m_int={-1: Vec3(x=1.0)}, m_bool={True: b"", False: b""}, m_string={"1": 1})
    plain = json.loads(json.dumps({**message.to_dict(), "m_bool": {}}))
    assert Everything.from_dict(plain).m_int == message.m_int and Everything.from_dict(plain).m_string == {"1": 1}
    assert Everything.from_dict({"m_bool": {"true": b"t", "false": b"f"}}).m_bool == {True: b"t", False: b"f"}
    with pytest.raises(hl.UsageError):
        Everything.from_dict({"m_int": {"x": {}}})


def test_a_class_may_be_used_first_by_several_threads_at_once():
    for number in range(10):
        cls = type(hl.Message)(f"C{number}", (hl.Message,), {f"f{n}": hl.field(n, "int32") for n in range(1, 60)})
        wrong, ready = [], threading.Barrier(4)

        def work(cls=cls, wrong=wrong, ready=ready):
            ready.wait()
            try:
                for _ in range(50):
                    assert cls.decode(cls(f1=1).encode()).f1 == 1
            except Exception as error:
                wrong.append(error)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert wrong == []


def test_many_merges_with_unknown_fields_take_linear_time():
    class Outer(hl.Message):
        inner = hl.field(1, Vec3)
        one = hl.field(2, Vec3, oneof="o")
    for piece in (b"\x0a\x02\x18\x01", b"\x12\x02\x18\x01"):
        began = time.process_time()
        message = Outer.decode(piece * 150_000)
        assert time.process_time() - began < 1.0 and len((message.inner or message.one)._unknown) == 300_000
        assert Outer.decode(message.encode()) == message


class Needy(hl.Message):
    x: int = hl.field(1, "int32")
    more: dict[int, Needy] = hl.field(2, map=("int32", "Needy"))

    def __init__(self, x):
        super().__init__(x=x)

    def clear(self):
        super().clear()


class Around:
    class Vec3(hl.Message):
        kid = hl.field(1, "Vec3")
        kids = hl.field(2, map=("string", "Vec3"))


def test_constructors_and_names_of_users_are_respected():
    assert Needy.decode(b"\x12\x02\x08\x01").more == {1: Needy(0)} and Needy.from_dict({"x": 1, "more": {"2": {"x": 5}}}).more[2].x == 5
    message = Needy(3)
    message.clear()
    assert message == Needy(0)
    message.decode_from(Needy(7).encode())
    assert message.x == 7
    inner = Around.Vec3.decode(b"\x0a\x00\x12\x03\x0a\x01k")
    assert type(inner.kid) is type(inner.kids["k"]) is Around.Vec3 and inner.encode() == b"\x0a\x00\x12\x05\x0a\x01k\x12\x00"

    class Local(hl.Message):
        kids = hl.field(1, map=("string", "Local"))
    assert Local(kids={"a": Local()}).encode() == b"\x0a\x05\x0a\x01a\x12\x00"

    class Base(hl.Message):
        def hello(self):
            return "hello"
    assert Base() == Base.decode(b"") and Base.decode(b"\x08\1").encode() == b"\x08\1"

    class Derived(Base):
        x = hl.field(1, "int32")
    assert Derived(x=1) == Derived.decode(b"\x08\1") and Derived().hello() == "hello"
    with pytest.raises(hl.UsageError, match="derive a class from it"):
        hl.Message()


def test_bases_without_fields_are_mixins_and_their_methods_stay():
    class Mix(hl.Message):
        def __init__(self, **values):
            super().__init__(**values)
            made.append(type(self))

        def encode(self):
            return b"custom" + super().encode()

        def clear(self):
            super().clear()
            made.clear()
    made = []
    whole = type(hl.Message)("Whole", (Mix,), {"x": hl.field(1, "double")})
    other = type(hl.Message)("Other", (Mix,), {"x": hl.field(1, "string")})
    plain = type(hl.Message)("Plain", (hl.Message,), {"x": hl.field(1, "int32")})
    plain()
    both = type(hl.Message)("Both", (Mix, plain), {})
    for cls, value in ((whole, 1.5), (other, "a"), (both, 5)):
        for _ in range(2):
            message = cls(x=value)
            assert made.pop() is cls and message.encode().startswith(b"custom") and message != cls.decode(b"")
        made.append(1)
        message.decode_from(b"")
        assert made == [] and message == cls.decode(b"")
    assert hl.proto_text(both).count("int32 x = 1;") == 1
    with pytest.raises(hl.SchemaError, match="of two classes"):
        type(hl.Message)("Two", (plain, whole), {})


class Odd:
    """An integer that can't be compared."""

    def __index__(self):
        return 5


def test_what_can_not_be_compared_is_named_as_well():
    for values in ({"f_int32": Odd()}, {"f_uint64": Odd()}, {"f_float": decimal.Decimal("sNaN")}):
        with pytest.raises(hl.UsageError, match=f"Everything.{next(iter(values))}: "):
            Everything(**values).encode()


@pytest.mark.parametrize("values", [{"f_int32": 0.0}, {"f_bool": 0.0}, {"f_sint64": 0j}, {"f_uint64": None}, {"f_enum": ""},
                                    {"f_fixed32": 0.0}, {"f_string": b""}, {"f_string": 0}, {"f_bytes": ""}, {"f_double": ""}])
def test_a_nothing_of_another_type_is_wrong_as_well(values):
    with pytest.raises(hl.UsageError, match=f"Everything.{next(iter(values))}"):
        Everything(**values).encode()


def test_odd_names_and_many_fields_are_no_trouble():
    odd = type(hl.Message)("We'ird {x}", (hl.Message,), {"v": hl.field(1, Vec3), "w": hl.field(2, Vec3, oneof="o")})
    message = odd(v=Vec3(x=1.0), w=Vec3())
    assert odd.decode(message.encode()) == message
    big = type(hl.Message)("Big", (hl.Message,), {f"f{n}": hl.field(n, "int32") for n in range(1, 4001)})
    assert big.decode(big(f4000=5).encode()).f4000 == 5
    shared = hl.field(1, "int32")
    type(hl.Message)("A", (hl.Message,), {"x": shared})
    with pytest.raises(hl.SchemaError, match="call field"):
        type(hl.Message)("B", (hl.Message,), {"y": shared})
    with pytest.raises(hl.SchemaError, match="ASCII"):
        hl.field(1, "int32", oneof="\ufb01")


def test_a_field_may_not_be_called_like_a_method():
    for name in ("clear", "encode", "which", "_x", "self"):
        with pytest.raises(hl.SchemaError, match="taken"):
            type(hl.Message)("M", (hl.Message,), {name: hl.field(1, "int32")})


@pytest.mark.parametrize("values, words", [
    ({"f_int32": 1 << 31}, "Everything.f_int32: 2147483648 is out of range for int32"),
    ({"f_uint32": -1}, "Everything.f_uint32"), ({"f_int32": 1.5}, "Everything.f_int32"),
    ({"f_int32": "1"}, "Everything.f_int32"), ({"f_int32": None}, "Everything.f_int32"),
    ({"f_double": "x"}, "Everything.f_double"), ({"f_string": b"x"}, "Everything.f_string"),
    ({"f_string": "\ud800"}, "Everything.f_string"), ({"f_bytes": [1, 2]}, "Everything.f_bytes"),
    ({"f_bool": "yes"}, "Everything.f_bool"), ({"f_fixed32": 1 << 32}, "Everything.f_fixed32"),
    ({"f_message": Tree()}, "Everything.f_message"), ({"r_int32": [1, "2"]}, "Everything.r_int32"),
    ({"r_message": [None]}, "Everything.r_message"), ({"m_string": {1: 1}}, "m_string"),
    ({"m_int": {1: None}}, "m_int"), ({"c_int": "x"}, "c_int"), ({"f_enum": "ONE"}, "Everything.f_enum"),
])
def test_a_wrong_value_is_named_when_it_is_encoded(values, words):
    message = Everything(**values)
    out = bytearray(b"before")
    with pytest.raises(hl.UsageError, match=re.escape(words)):
        message.append_to(out)
    assert out == b"before"


def test_values_python_converts_gladly_are_taken():
    assert Everything(f_double=1).encode() == Everything(f_double=1.0).encode()
    assert Everything(f_bool=5).encode() == Everything(f_bool=True).encode()
    assert Everything.decode(Everything(f_float=1e39).encode()).f_float == math.inf
    assert Everything(f_bytes=bytearray(b"x")).encode() == Everything(f_bytes=memoryview(b"x")).encode()


def test_encode_into_writes_in_place_or_says_what_it_needs():
    message, buffer = Vec3(x=1.0), bytearray(b"\xee" * 12)
    assert message.encode_into(buffer, 2) == 11
    assert buffer == b"\xee\xee" + message.encode() + b"\xee"
    assert message.encode_into(memoryview(buffer), 0) == 9
    untouched = bytes(buffer)
    with pytest.raises(hl.BufferTooSmall) as caught:
        message.encode_into(buffer, 5)
    assert caught.value.needed == 9 and bytes(buffer) == untouched


def test_decode_from_forgets_what_was_there():
    message = Everything(f_int32=1, r_int32=[1], c_int=3, o_int32=4)
    message.decode_from(memoryview(b"..." + Everything(f_string="new").encode())[3:])
    assert message == Everything(f_string="new")


def test_positional_values_go_in_declaration_order():
    assert Vec3(1.0, 2.0) == Vec3(x=1.0, y=2.0)
    with pytest.raises(TypeError, match="speed"):
        Vec3(speed=1.0)


def test_containers_are_fresh_for_every_message():
    Everything().r_int32.append(1)
    Everything().m_string["a"] = 1
    assert Everything() == Everything(r_int32=[], m_string={})


def test_dicts_there_and_back(rng):
    for _ in range(50):
        message = Everything()
        fill(rng, message)
        assert Everything.from_dict(message.to_dict()).encode() == message.encode()
    assert Vec3(x=1.0).to_dict() == {"x": 1.0}
    with pytest.raises(hl.UsageError, match="did you mean 'x'"):
        Vec3.from_dict({"xx": 1})


def test_repr_shows_what_is_set_and_messages_are_values():
    assert repr(Tree(name="a", left=Tree())) == "Tree(name='a', left=Tree())"
    assert Vec3(x=1.0) != Vec3() and Vec3() != 3
    with pytest.raises(TypeError):
        hash(Vec3())
    assert copy.deepcopy(Everything(r_int32=[1], c_int=2)) == Everything(r_int32=[1], c_int=2)
    assert pickle.loads(pickle.dumps(Everything(f_string="p"))) == Everything(f_string="p")


def test_the_generated_text_is_the_one_in_the_comment():
    class Move(hl.Message):
        entity: int = hl.field(1, "uint32")
        name: str = hl.field(2, "string")
    comment = TEXT.partition("gives exactly:\n#\n")[2].partition("\n\n")[0]
    shown = "".join(line[6:] + "\n" for line in comment.splitlines())
    assert Move.__source__["_put"] == shown


def test_a_traceback_shows_the_generated_line():
    try:
        Vec3(x="wrong").encode()
    except hl.UsageError as error:
        import traceback
        text = "".join(traceback.format_exception(error))
    assert "raw = pack_1(b'\\t', v1, b'\\x11', v2)" in text and "<horizon_lite Vec3._put>" in text


@pytest.mark.parametrize("declare", [
    lambda: hl.field(0, "int32"), lambda: hl.field(19000, "int32"), lambda: hl.field(1 << 29, "int32"),
    lambda: hl.field(1), lambda: hl.field(1, "int32", repeated=True, optional=True),
    lambda: hl.field(1, map=("double", "int32")), lambda: hl.field(True + 0.5, "int32"),
    lambda: type(hl.Message)("M", (hl.Message,), {"a": hl.field(1, "int32"), "b": hl.field(1, "int32")}),
    lambda: type(hl.Message)("M", (hl.Message,), {"encode": hl.field(1, "int32")}),
    lambda: type(hl.Message)("M", (hl.Message,), {"a": hl.field(1, "nothing"), "__module__": __name__})(),
    lambda: type(hl.Message)("M", (hl.Message,), {"a": hl.field(1, dict), "__module__": __name__})(),
    lambda: type(hl.Message)("M", (Vec3,), {"z": hl.field(3, "double")}),
    lambda: type(hl.Message)("M", (hl.Message,), {"self": hl.field(1, "int32")}),
    lambda: hl.field(1, map=("string",)), lambda: hl.field(1, map=(["x"], "int32")), lambda: hl.field(True, "int32"),
    lambda: hl.field(1, "int32", oneof="a b"), lambda: hl.field(1, "int32", oneof=5),
])
def test_declarations_that_can_not_be_are_refused(declare):
    with pytest.raises(hl.SchemaError):
        declare()


def test_two_classes_of_one_name_are_told_apart():
    schema = hl.parse_proto("message A { message I { int32 aa = 1; int32 ab = 2; } }"
                            "message B { message I { string ba = 1; string bb = 2; } }")
    schema.A.I(), schema.B.I()
    with pytest.raises(hl.UsageError, match="I.ab"):
        schema.A.I(ab="x").encode()

    def make():
        class Node(hl.Message):
            child = hl.field(2, "Node")
        return Node
    one, two = make(), make()
    assert two(child=two()).encode() == one(child=one()).encode() == b"\x12\x00"


@pytest.mark.parametrize("values, words", [
    ({"f_string": Vec3()}, "f_string"), ({"r_string": "abc"}, "r_string"), ({"r_int32": None}, "r_int32"),
    ({"r_int32": iter([1])}, "r_int32"), ({"r_double": b"x"}, "r_double"), ({"m_string": [1]}, "m_string"),
])
def test_containers_and_texts_are_what_they_say(values, words):
    for act in (Everything.encode, Everything.byte_size):
        message = Everything()
        for name, value in values.items():
            setattr(message, name, value)
        with pytest.raises(hl.UsageError, match=words):
            act(message)


def test_a_memoryview_of_anything_is_its_bytes():
    message = Everything(f_bytes=memoryview(struct.pack("<2i", 1, 2)).cast("i"))
    assert Everything.decode(message.encode()).f_bytes == struct.pack("<2i", 1, 2)
    assert message.byte_size() == len(message.encode())


def test_what_underflows_to_zero_is_left_out_and_minus_zero_is_not():
    assert Everything(f_float=1e-46).encode() == b"" and Everything(f_float=1e-46).byte_size() == 0
    assert Everything(f_float=-1e-46).encode() == b"\x15\0\0\0\x80"
    assert Everything.from_dict(Everything(f_double=-0.0).to_dict()).encode() == Everything(f_double=-0.0).encode()


def test_nesting_may_go_a_hundred_deep_both_ways():
    tree = Tree()
    for _ in range(100):
        tree = Tree(left=tree)
    assert Tree.decode(tree.encode()) == tree and tree.byte_size() == len(tree.encode())
    tree = Tree(left=tree)
    for act in (tree.encode, tree.byte_size):
        with pytest.raises(hl.UsageError, match="Tree.left: nested deeper than 100"):
            act()


def test_the_generated_text_is_there_before_the_first_use():
    class Unused(hl.Message):
        x: int = hl.field(1, "int32")
    assert list(Unused.__source__) == ["_put", "clear", "_load", "__init__"]
    assert all(text.startswith(f"def {name}(") for name, text in Unused.__source__.items())


@pytest.mark.parametrize("values", [{"m_string": []}, {"r_message": {"x": 1}}, {"r_message": [5]},
                                    {"r_int32": None}, {"f_message": 5}, {1: 2}])
def test_dicts_that_do_not_fit_are_named(values):
    with pytest.raises(hl.UsageError):
        Everything.from_dict(values)


def test_decode_reads_bytes_and_says_so():
    for wrong in ("abc", None, 5, memoryview(b"abcd")[::2]):
        with pytest.raises(hl.UsageError, match="bytes"):
            Vec3.decode(wrong)


def test_classes_inside_functions_find_each_other_by_name():
    class Ping(hl.Message):
        pong = hl.field(1, "PongOfTest")

    class PongOfTest(hl.Message):
        ping = hl.field(1, Ping)
    assert Ping.decode(Ping(pong=PongOfTest(ping=Ping())).encode()).pong.ping == Ping()


# =============================================================================
# 5  PROTO
# =============================================================================

def test_proto_text_becomes_classes_that_agree_with_declared_ones(rng):
    parsed = hl.parse_proto(EVERYTHING_PROTO)
    for _ in range(50):
        message = Everything()
        fill(rng, message)
        assert parsed.Everything.decode(message.encode()).encode() == message.encode()
    assert parsed.Kind.LOW == -1


def test_nested_types_comments_options_and_keywords():
    schema = hl.parse_proto("""
        syntax = "proto3"; /* a comment ; { */ package a.b;
        option java_package = "x";
        message Outer {   // another
          enum Mode { option allow_alias = true; OFF = 0; ON = 1 [deprecated = true]; }
          message Inner { int32 n = 1; Outer up = 2; }
          reserved 5, 9 to 11; reserved "old";
          Inner inner = 1; repeated Inner many = 2 [deprecated=true]; Mode mode = 3;
          int32 class = 4; string encode = 6; Outer.Inner other = 7;
        }
        service S { rpc Do (Outer) returns (Outer) { option (x) = { a: 1 }; } }
    """)
    message = schema.Outer(inner=schema.Outer.Inner(n=1), mode=schema.Outer.Mode.ON, class_=2, encode_="e")
    assert schema.Outer.decode(message.encode()) == message
    assert message.encode() == bytes.fromhex("0a 02 08 01 18 01 20 02 32 01 65")


@pytest.mark.parametrize("text, words", [
    ("message M {\n int32 = 1;\n}", "2:8: expected a field's name, got '='"),
    ("message M { int32 a = x; }", "1:23: expected a field's number, got 'x'"),
    ("message M {\n\n int32 a = 1", "3:13: expected ';', got 'the end'"),
    ("mesage M {}", "1:1: expected message, enum"), ("message M { ` }", "1:13: unexpected '`'"),
    ('syntax = "proto2";', "1:10: syntax 'proto2' is proto2; only proto3 is read here"),
    ("syntax", "1:7: expected '='"), ('edition = "2023";', "1:1: editions are not supported"),
    ("message M { int32 a = 0; }", "1:23: field number 0: use 1 to 536870911"),
    ("message M { int32 a = 19500; }", "1:23: field number 19500"),
    ("message M { map<float, int32> a = 1; }", "1:17: a map's key is bool, string or any integer type"),
    ("enum E { A = 0; B = 0x" + "F" * 6000 + "; }", "is too large"), ("package .a;", "1:9: expected a package's name"),
    ("1" * 20000 + "x", "1:1: unexpected '1'"), ('syntax = "proto9";', "syntax 'proto9' is unknown"),
    ("message a { message b {} } message M { enum a { X = 0; } a.b d = 1; }", "there is no type 'a.b'"),
    ("message M { reserved 1 to 99999999999; }", "are no field numbers"),
    ("message M { int32 a = 1; string a = 2; }", "1:33: 'M.a' is declared twice"),
    ("message M { int32 a = 1; int32 b = 1; }", "1:36: number 1 is 'a' already"),
    ("message M {} enum M { A = 0; }", "1:19: 'M' is declared twice"),
    ("enum A { X = 0; } enum B { X = 0; }", "1:28: 'X' is declared twice"),
    ("package p; package q;", "1:12: package comes once"),
    ("message M { reserved 5; int32 a = 5; }", "1:31: 'a' or its number 5 is reserved"),
    ("message M { int32 a = 5; reserved 2 to max; }", "1:19: 'a' or its number 5 is reserved"),
    ('message M { reserved "a"; int32 a = 5; }', "'a' or its number 5 is reserved"),
    ("message M { reserved 1 to 5, 4; }", "1:30: 4 to 4 is backwards, or reserved already"),
    ("enum E { reserved -2; A = 0; B = -2; }", "'B' or its number -2 is reserved"),
    ("enum E {}", "1:6: enum 'E' has no value"), ("enum E { A = 1; }", "1:14: the first value of an enum must be 0"),
    ("enum E { A = 0; B = 0; }", "1:17: number 0 is used twice"),
    ("enum E { A = 0; B = 2147483648; }", "1:21: 2147483648 does not fit"),
    ("message M { oneof o {} }", "1:19: oneof 'o' has no field"),
    ("message M { oneof o { repeated int32 a = 1; } }", "1:23: a oneof can't hold 'repeated'"),
    ("message M { repeated map<int32, int32> a = 1; }", "a map can't be repeated"),
    ("message M { required int32 a = 1; }", "1:13: 'required' is proto2; only proto3 is read here"),
    ("message M { int32 a = 1 [default = 5]; }", "1:26: a default is proto2"),
    ("message M { optional group G = 1 { } }", "1:22: a group is proto2"),
    ("message M { extensions 100 to 200; }", "'extensions' is proto2"),
    ("message M {} extend M { int32 a = 1; }", "1:14: 'extend' is not supported: options need no"),
    ("message M { string a = 1 [packed = true]; }", "only repeated numbers, bools and enums can be packed"),
    ("message M { google.protobuf.Any a = 1; }", 'here; add: import "google/protobuf/any.proto";'),
    ("message M { strin a = 1; }", "did you mean 'string'?"), ("package p; message M { V a = 1; message A { message V {} } }", "did you mean 'p.M.A.V'"),
    ('import "google/protobuf/any.proto"; import "google/protobuf/any.proto";', "is imported twice"),
    ('message M { reserved "a", "a"; }', "'a' is reserved already"), ("message M { reserved -1; }", "are no field numbers"),
    ("message M { M2 a = 1; } message M22 {}", "1:13: there is no type 'M2' here; did you mean 'M22'?"),
    ("message M { map<string, N> a = 1; }", "1:25: there is no type 'N' here"),
    ("enum E { A = 0; } service S { rpc R (E) returns (E); }", "1:38: there is no message 'E' here"),
    ('import "nowhere.proto";', "1:8: 'nowhere.proto' can't be imported by a text: load_proto(path, include=...) finds files"),
    ('import "../up.proto";', "must be relative, with single slashes and no '..'"),
    ("message M { int32 a = 089; }", "expected a field's number, got '089'"),
    ("message M { int32 a = 1a; }", "1:23: unexpected '1'"), ("/* no end", "1:1: this comment is not closed"),
    ('option a = "\\q";', "1:12: invalid escape \\q"), ('option a = "no end;', "1:12: this text is not closed"),
    ("option a = { b: [1, 2 };", "1:23: unexpected '}'"), ("option a = { b", "1:15: expected '}'"),
    ("message M {" * 40, "messages nested 32 deep"), ("message \u00e9 {}", "unexpected"),
])
def test_errors_in_proto_text_say_where(text, words):
    with pytest.raises(hl.SchemaError, match=re.escape(words)):
        hl.parse_proto(text)


def test_names_in_proto_text_are_found_outwards():
    schema = hl.parse_proto("""package p.q; message X { int32 top = 1; } enum E { Z = 0; }
        message A { message X { int32 inner = 1; } message B { message C { X x = 1; .p.q.X y = 2; q.A a = 3; E e = 4; } }
                    X x = 1; .p.q.X y = 2; string self = 3; }""")
    a = schema.A(x=schema.A.X(inner=1), y=schema.X(top=2), self_="s")
    assert schema.A.decode(a.encode()) == a
    c = schema.A.B.C(x=schema.A.X(inner=1), a=a, e=0)
    assert schema.A.B.C.decode(c.encode()) == c


def test_an_unknown_type_in_proto_text_is_named():
    with pytest.raises(hl.SchemaError, match="Nothing"):
        hl.parse_proto("message M { Nothing a = 1; }").M()


def test_the_built_in_schema_has_the_seeds_numbers():
    schema = hl.builtin_schema()

    def numbers(cls):
        return {field.name: field.number for field in cls._fields}
    host, plugin, envelope = numbers(schema.HostToPlugin), numbers(schema.PluginToHost), numbers(schema.EventEnvelope)
    assert host.items() >= {"plugin_id": 1, "hello": 10, "shutdown": 11, "event": 20, "events": 21,
                            "compressed_events": 22, "action_result": 100}.items()
    assert plugin.items() >= {"plugin_id": 1, "hello": 10, "subscribe": 11, "actions": 20, "log": 30,
                              "event_result": 40}.items()
    assert envelope.items() >= {"event_id": 1, "type": 2, "expects_response": 3, "player_join": 10,
                                "player_quit": 11, "chat": 12, "command": 13, "block_break": 14,
                                "world_close": 15, "player_move": 16}.items()
    assert numbers(schema.PlayerMoveEvent) == {"player_uuid": 1, "x": 2, "y": 3, "z": 4, "yaw": 5, "pitch": 6,
                                               "on_ground": 7}
    assert numbers(schema.PluginHello)["token"] == 100


def test_protoc_accepts_the_built_in_schema_and_google_reads_our_bytes(google):
    schema, theirs = hl.builtin_schema(), google[1]
    move = schema.PlayerMoveEvent(player_uuid="u", x=1.0, y=-2.0, z=0.5, yaw=90.0, pitch=-1.0, on_ground=True)
    batch = schema.EventBatch(events=[schema.EventEnvelope(type="PLAYER_MOVE", player_move=move)] * 3)
    read = theirs.EventBatch.FromString(batch.encode())
    assert len(read.events) == 3 and read.events[2].player_move.z == 0.5
    assert read.SerializeToString() == batch.encode()
    for name, cls in vars(schema).items():
        want = {field.name: field.number for field in getattr(theirs, name).DESCRIPTOR.fields}
        assert {field.name.rstrip("_"): field.number for field in cls._fields} == want, name


KITCHEN_SINK = r"""// everything that real files have
syntax = "proto3";
package zoo.animals;
option java_package = "x" 'y\x41\102\u0041\n';
import "google/protobuf/timestamp.proto"; import "google/protobuf/struct.proto";
import public "sub/base.proto";
/* block
   comment; message Not { } */
message Cage {
  message Lock { int32 code = 1; Cage in = 2; enum State { OPEN = 0; SHUT = 1; } State state = 3; }
  enum Size { option allow_alias = true; SMALL = 0; TINY = 0; BIG = 0x10; NEG = - 1; reserved 2, -9 to -5, 100 to max; }
  reserved 2, 9 to 11, 1000 to max; reserved "old", 'older';
  ;
  Lock lock = 1 [deprecated = true];
  repeated Lock.State states = 03;
  Size size = 4;
  map < string , Cage . Lock > locks = 5;
  oneof what { string class = 6; .zoo.animals.Animal animal = 7; base.Thing thing = 8; }
  google.protobuf.Timestamp at = 12;
  optional bool ok = 13 [json_name = "fine"];
  int32 encode = 14; int32 none = 15; int32 _x = 16; int32 __name__ = 17;
  repeated sint32 loose = 18 [packed=false];
  message Animal { int32 legs = 1; }
  Animal mine = 19; animals.Animal outer = 20; google.protobuf.Value any = 21; optional Lock.State maybe = 22;
}
message Animal { bytes message = 1; string string = 2; int32 optional = 3; repeated double repeated = 4; }
enum Odd { None = 0; mro = 1; _a = 2; name = 3; value = 4; real = 5; }
service Keeper { rpc Feed (Animal) returns (stream .zoo.animals.Cage) { option deprecated = true; } rpc Two(stream Animal) returns (Cage); }
service Idle {}
"""


@pytest.fixture
def zoo(tmp_path):
    """A folder of .proto files that import each other; Google's are beside protoc."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "text.proto").write_text(KITCHEN_SINK)
    (tmp_path / "sub/base.proto").write_text('syntax = "proto3"; package zoo.base; import "sub/more.proto"; message Thing { more.Extra e = 1; }')
    (tmp_path / "sub/more.proto").write_text('syntax = "proto3"; package zoo.more; message Extra { float f = 1; }')
    return tmp_path


def test_what_real_files_have_is_read(zoo):
    schema = hl.load_proto(zoo / "text.proto")
    assert list(vars(schema)) == ["Cage", "Animal", "Odd"]
    assert schema.__services__ == {"Keeper": ("Feed", "Two"), "Idle": ()}
    cage, lock = schema.Cage, schema.Cage.Lock
    assert [field.name for field in cage._fields][4:] == [
        "class_", "animal", "thing", "at", "ok", "encode_", "none", "x_", "name___", "loose", "mine", "outer", "any", "maybe"]
    assert list(schema.Odd.__members__) == ["None_", "mro_", "a_", "name", "value", "real"]
    twice = hl.parse_proto("message M { int32 class = 1; int32 class_ = 2; } enum E { None = 0; None_ = 1; }")
    assert [field.name for field in twice.M._fields] == ["class__", "class_"] and list(twice.E.__members__) == ["None__", "None_"]
    assert cage.Size.BIG == 16 and cage.Size.TINY is cage.Size.SMALL and lock.State.SHUT == 1
    stamp = cage._fields[7].target
    assert schema.google.protobuf.Timestamp is stamp and schema.zoo.base.Thing and schema.zoo.animals.Cage is cage
    with pytest.raises(AttributeError, match="there is no type or package 'zoo.animals.Cags'; did you mean 'zoo.animals.Cage'"):
        schema.zoo.animals.Cags
    assert "Cage" in repr(schema) and "Timestamp" in dir(schema.google.protobuf)
    assert copy.copy(schema).Cage is copy.deepcopy(schema).Cage is cage and copy.copy(schema.google).protobuf.Timestamp is stamp
    assert [f.name for f in hl.parse_proto("message M { int32 class = 1; oneof class_ { int32 x = 2; } }").M._fields] == ["class__", "x"]
    assert hl.load_proto("google/protobuf/timestamp.proto").Timestamp is stamp
    assert hl.load_proto("more.proto", include=[zoo / "nowhere", zoo / "sub"]).Extra
    message = cage(locks={"a": lock(code=5)}, animal=schema.Animal(optional=3), mine=cage.Animal(legs=4), encode_=1, x_=2,
                   at=stamp(seconds=1), states=[1, 0, 7], maybe=0, loose=[-1], outer=schema.Animal(string="s"))
    assert cage.decode(message.encode()) == message and message.which("what") == "animal"


def test_files_agree_with_protoc(zoo, rng):
    theirs, files = google_classes(zoo, KITCHEN_SINK)
    ours = hl.load_proto(zoo / "text.proto")
    for name in ("Cage", "Animal", "Cage.Lock", "Cage.Animal"):
        cls = ours
        for part in name.split("."):
            cls = getattr(cls, part)
        for _ in range(50):
            agree(cls(), theirs(f"zoo.animals.{name}")(), rng)


def shape(descriptor):
    """Return what matters of a protoc descriptor of a message or a file, as plain data."""
    enums = {each.name: {value.name: value.number for value in each.value} for each in descriptor.enum_type}
    messages = descriptor.message_type if hasattr(descriptor, "message_type") else descriptor.nested_type
    fields = [(each.name, each.number, each.label, each.type, each.type_name, each.proto3_optional,
               each.options.packed if each.options.HasField("packed") else None,
               descriptor.oneof_decl[each.oneof_index].name if each.HasField("oneof_index") else None)
              for each in getattr(descriptor, "field", ())]
    return {"enums": enums, "messages": {each.name: shape(each) for each in messages}, "fields": sorted(fields),
            "reserved": sorted((each.start, each.end) for each in getattr(descriptor, "reserved_range", ()))}


def test_normalised_files_are_stable_and_the_same_to_protoc(zoo):
    _, before = google_classes(zoo, KITCHEN_SINK)
    once = hl._file_text(hl._read_proto(zoo / "text.proto", ()))
    (zoo / "text.proto").write_text(once)
    assert hl._file_text(hl._read_proto(zoo / "text.proto", ())) == once
    _, after = google_classes(zoo, once)
    assert [shape(each) for each in after] == [shape(each) for each in before]


def test_googles_own_files_are_the_same_to_protoc_when_written_back(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc", reason="pip install grpcio-tools protobuf")
    folder = Path(protoc.__file__).parent / "_proto"
    read = []
    for path in sorted(folder.rglob("*.proto")):
        name = os.fspath(path.relative_to(folder))
        if 'syntax = "proto3"' not in path.read_text():
            with pytest.raises(hl.SchemaError, match="is proto2|editions"):
                hl.load_proto(path, include=folder)
            continue
        _, before = google_classes(tmp_path, path.read_text())
        _, after = google_classes(tmp_path, hl._file_text(hl._read_proto(path, folder)))
        assert [shape(each) for each in after] == [shape(each) for each in before], name
        read.append(name)
    assert {"google/protobuf/api.proto", "google/protobuf/struct.proto", "google/protobuf/type.proto"} <= set(read)


def test_well_known_types_are_googles_and_the_same_for_everybody():
    from_text = hl.parse_proto('import "google/protobuf/timestamp.proto"; import "google/protobuf/wrappers.proto";'
                               "message M { google.protobuf.Timestamp at = 1; google.protobuf.UInt32Value n = 2; }")
    other = hl.parse_proto('import "google/protobuf/timestamp.proto"; message N { google.protobuf.Timestamp at = 1; }')
    from_text.M(), other.N()
    stamp = from_text.M._fields[0].target
    assert stamp is other.N._fields[0].target and stamp(seconds=-1, nanos=5).encode() == b"\x08" + b"\xff" * 9 + b"\1\x10\5"
    pytest.importorskip("google.protobuf", reason="pip install protobuf")
    import importlib
    for name in filter(None, hl._WELL_KNOWN):
        theirs = importlib.import_module(f"google.protobuf.{name}_pb2").DESCRIPTOR
        ours = hl._well_known(f"google/protobuf/{name}.proto")
        if name == "descriptor":
            continue
        assert set(ours.types) == set(theirs.message_types_by_name) | set(theirs.enum_types_by_name)
        for key, cls in ours.types.items():
            if issubclass(cls, hl.Message):
                assert [(f.name, f.number) for f in cls._fields] == [(f.name, f.number) for f in theirs.message_types_by_name[key].fields]


def test_imports_are_looked_for_in_order_and_may_not_lead_back(tmp_path):
    for name, text in {
            "a.proto": 'import "b.proto"; message A { B b = 1; }', "b.proto": "message B { int32 mine = 1; }",
            "other/b.proto": "message B { int32 other = 1; }", "loop.proto": 'import "pool.proto";', "pool.proto": 'import "loop.proto";',
            "hidden.proto": 'import "a.proto"; message H { B b = 1; }', "twice.proto": 'import "b.proto"; message B {}',
            "ext.proto": 'import "google/protobuf/descriptor.proto"; extend google.protobuf.FieldOptions { string x = 50000; }',
            "latin.proto": "// \xe9\nmessage L {}", **{f"n{n}.proto": f'import "n{n + 1}.proto";' for n in range(300)}, "deep.proto": 'import "gone.proto";', "deeper.proto": 'import "deep.proto";'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "latin-1")
    (tmp_path / "bom.proto").write_bytes(b"\xef\xbb\xbfmessage Bom {}")
    assert hl.load_proto(tmp_path / "bom.proto").Bom and hl.load_proto(tmp_path / "latin.proto").L
    with pytest.raises(hl.SchemaError, match="imports nested deeper than 100"):
        hl.load_proto(tmp_path / "n0.proto")
    assert hl.load_proto(tmp_path / "a.proto").A._prepare()._fields[0].target(mine=1)
    assert hl.load_proto(os.fspath(tmp_path / "a.proto"), include=tmp_path / "other").A._prepare()._fields[0].target(other=1)
    assert hl.load_proto(tmp_path / "a.proto", include=[os.fspath(tmp_path / "other")]).A
    for name, words in {
            "hidden.proto": "hidden.proto:1:31: there is no type 'B' here", "loop.proto": "imports lead back to where they came from",
            "twice.proto": "twice.proto:1:27: 'B' is declared twice", "ext.proto": "ext.proto:1:44: 'extend' is not supported",
            "deeper.proto": "deep.proto:1:8: there is no file 'gone.proto' in"}.items():
        with pytest.raises(hl.SchemaError, match=re.escape(words)):
            hl.load_proto(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        hl.load_proto(tmp_path / "nothing.proto")
    for text in (b"", "chat.proto"):
        with pytest.raises(hl.UsageError, match="parse_proto reads text"):
            hl.parse_proto(text)


def test_names_that_python_can_not_take_stay_apart(google):
    text = """syntax = "proto3"; message M {
      int32 _ = 1; int32 __ = 2; int32 _1 = 3; int32 f1_ = 4; message class_ { int32 x = 1; } int32 class = 5; class_ c = 6;
      message _a { int32 x = 1; } message a_ { int32 y = 1; } _a p = 7; a_ q = 8; message encode { } message encode_ { } .M.encode e = 9;
      enum __b { _0 = 0; _2 = 1; } __b b = 10; reserved "a\\"b", "c\\\\"; }"""
    schema = hl.parse_proto(text)
    assert [field.name for field in schema.M._fields] == ["f_", "f__", "f1__", "f1_", "class__", "c", "p", "q", "e", "b"]
    made = schema.M(class__=3, c=schema.M.class_(x=1), p=schema.M.a__(x=2), q=schema.M.a_(y=3), e=schema.M.encode__(), b=1, f_=1)
    assert schema.M.decode(made.encode()) == made
    again = hl.proto_text(schema.M)
    assert hl.proto_text(hl.parse_proto(again).M) == again and "message _a {" in again and 'reserved "a\\"b", "c\\\\";' in again


@pytest.mark.parametrize("name", ["string", "int32", "option", "message", "map", "repeated", "group", "oneof", "Plain"])
def test_a_type_may_be_called_like_a_word_of_the_language(name, tmp_path):
    word = type(hl.Message)(name, (hl.Message,), {"x": hl.field(1, "int32")})
    user = type(hl.Message)("User", (hl.Message,), {"w": hl.field(1, word), "m": hl.field(2, map=("int32", word)), "o": hl.field(3, word, oneof="c")})
    text = hl.proto_text(user)
    theirs, _ = google_classes(tmp_path, text)
    data = user(w=word(x=5), m={1: word(x=6)}, o=word()).encode()
    assert theirs("User").FromString(data).w.x == 5 and hl.proto_text(hl.parse_proto(text).User) == text
    assert hl.parse_proto(text).User.decode(data).encode() == data


def test_subclasses_of_loaded_messages_are_written_too():
    schema = hl.parse_proto("package p; message A { message B {} B b = 1; }")

    class Sub(schema.A):
        """With a control \0 character."""
    assert "message Sub {" in hl.proto_text(Sub) and "message A {" in hl.proto_text(schema.A)


def test_reading_takes_linear_time():
    fields = "".join(f"repeated int32 f{n} = {n}; " for n in range(1, 1500))
    reserved = ", ".join(str(n) for n in range(10_000, 14_000)) + "; reserved " + ", ".join(f'"n{n}"' for n in range(10_000))
    began = time.process_time()
    made = hl.parse_proto(f"message M {{ {fields} reserved {reserved}; }}").M
    assert made.decode(made(f1499=[1]).encode()).f1499 == [1]
    assert time.process_time() - began < 2.5


class Fleet(hl.Message):
    """Ships, and who sails them.

    Two paragraphs.
    """

    class Ship(hl.Message):
        class Kind(enum.IntEnum):
            TUG = 1
            NONE = 0
            TOW = 1
        kind: int = hl.field(1, Kind)
        fleet: Fleet | None = hl.field(2, "Fleet")
    ships: list[Ship] = hl.field(1, Ship, repeated=True)
    by_name: dict[str, Ship] = hl.field(2, map=("string", Ship))
    home: Vec3 | None = hl.field(3, Vec3, oneof="place")
    port: str | None = hl.field(4, "string", oneof="place")
    marks: list[int] = hl.field(5, "uint32", repeated=True, packed=False)
    note: str | None = hl.field(6, "string", optional=True)


def test_classes_are_written_as_proto_text_that_reads_back():
    text = hl.proto_text(Fleet)
    assert text == """\
syntax = "proto3";

// Ships, and who sails them.
//
// Two paragraphs.
message Fleet {
  message Ship {
    enum Kind {
      option allow_alias = true;
      NONE = 0;
      TUG = 1;
      TOW = 1;
    }
    Kind kind = 1;
    Fleet fleet = 2;
  }
  repeated Ship ships = 1;
  map<string, Ship> by_name = 2;
  oneof place {
    Vec3 home = 3;
    string port = 4;
  }
  repeated uint32 marks = 5 [packed = false];
  optional string note = 6;
}

message Vec3 {
  double x = 1;
  double y = 2;
}
"""
    again = hl.parse_proto(text)
    undocumented = re.sub("//.*\n", "", text)
    assert hl.proto_text(again.Fleet) == undocumented == hl.proto_text(*vars(hl.parse_proto(undocumented)).values())
    assert hl.proto_text(again.Fleet.Ship.Kind) == hl.proto_text(again.Fleet)      # what surrounds it comes along
    fleet = Fleet(by_name={"a": Fleet.Ship(kind=1)}, port="Riga", marks=[1, 2])
    assert again.Fleet.decode(fleet.encode()).encode() == fleet.encode()
    builtin = hl.proto_text(*vars(hl.builtin_schema()).values())
    assert hl.proto_text(*vars(hl.parse_proto(builtin)).values()) == builtin and "package horizon;" in builtin


def test_what_no_proto_text_can_say_is_named(tmp_path):
    nothing = enum.IntEnum("Nothing", {"ONE": 1})
    for classes, error, words in (
            ([nothing], hl.SchemaError, "Nothing has no value 0"), ([5], hl.UsageError, "not 5"), ([int], hl.UsageError, "int"),
            ([enum.IntEnum("A", {"Z": 0}), enum.IntEnum("B", {"Z": 0})], hl.SchemaError, "'Z' is declared twice"),
            ([type(hl.Message)("M", (hl.Message,), {"\u00e9": hl.field(1, "int32")})], hl.SchemaError, "can't be written")):
        with pytest.raises(error, match=words):
            hl.proto_text(*classes)
    stamped = hl.parse_proto('import "google/protobuf/timestamp.proto"; message M { google.protobuf.Timestamp at = 1; }')
    assert 'import "google/protobuf/timestamp.proto";' in hl.proto_text(stamped.M)
    assert "message Timestamp" in hl.proto_text(stamped.M._fields[0].target)


def test_node_reads_our_bytes_and_we_read_what_it_writes(tmp_path, rng):
    node = shutil.which("node")
    if not node or subprocess.run([node, "-e", "require('protobufjs')"], capture_output=True).returncode:
        pytest.skip("install Node, npm install protobufjs, and set NODE_PATH to its node_modules")
    (tmp_path / "everything.proto").write_text(EVERYTHING_PROTO)
    messages = []
    for _ in range(100):
        message = Everything()
        fill(rng, message)
        messages.append(message)
    (tmp_path / "ours").write_bytes(b"".join(map(hl.encode_delimited, messages)))
    program = """
        const pb = require("protobufjs"), fs = require("fs");
        const Everything = pb.loadSync("everything.proto").lookupType("Everything");
        const reader = pb.Reader.create(fs.readFileSync("ours")), parts = [];
        while (reader.pos < reader.len)
            parts.push(Everything.encodeDelimited(Everything.decodeDelimited(reader)).finish());
        fs.writeFileSync("theirs", Buffer.concat(parts)); console.log(parts.length);"""
    done = subprocess.run([node, "-e", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "100\n", done.stderr
    reader = hl.DelimitedReader(Everything)
    again = reader.feed((tmp_path / "theirs").read_bytes())
    assert len(again) == 100 and reader.pending == 0
    for message, other in zip(messages, again, strict=True):
        assert Everything.decode(message.encode()).to_dict() == other.to_dict()


def test_packed_movement_is_count_then_uuid_and_coordinates():
    moves = {b"a" * 16: (1.0, -2.5, 0.0), b"b" * 16: (1e9, 0.0, 3.0)}
    data = hl.pack_moves(moves)
    assert data == struct.pack("<I16sfff16sfff", 2, b"a" * 16, 1.0, -2.5, 0.0, b"b" * 16, 1e9, 0.0, 3.0)
    assert hl.unpack_moves(data) == moves and len(data) == 4 + 2 * 28
    wide = {b"a" * 16: (0.1, 1e300, math.pi)}
    assert hl.unpack_moves(hl.pack_moves(wide, wide=True), wide=True) == wide
    assert hl.unpack_moves(hl.pack_moves({})) == {}
    for count in (511, 512, 513, 1500):
        many = {struct.pack("<IIII", n, 0, 0, 0): (float(n), 0.0, 0.0) for n in range(count)}
        assert hl.unpack_moves(hl.pack_moves(many)) == many


def test_packed_movement_goes_into_a_callers_buffer():
    moves = {struct.pack("<IIII", n, 0, 0, 0): (float(n), 0.5, -1.0) for n in range(700)}
    for wide, size in ((False, 28), (True, 40)):
        buffer = bytearray(b"\xee" * (10 + 4 + 700 * size))
        end = hl.pack_moves_into(moves, buffer, 10, wide=wide)
        assert end == len(buffer) and buffer[:10] == b"\xee" * 10 and buffer[10:] == hl.pack_moves(moves, wide=wide)
        assert hl.unpack_moves(memoryview(buffer)[10:], wide=wide) == moves
        assert hl.pack_moves_into(moves, memoryview(buffer), 0, wide=wide) == end - 10
        untouched = bytes(buffer)
        with pytest.raises(hl.BufferTooSmall) as caught:
            hl.pack_moves_into(moves, buffer, 11, wide=wide)
        with pytest.raises(hl.UsageError, match="at is -1"):
            hl.pack_moves_into(moves, buffer, -1, wide=wide)
        assert caught.value.needed == 4 + 700 * size and buffer == untouched


def test_packed_movement_refuses_what_does_not_fit():
    for moves in ({b"short": (0, 0, 0)}, {b"a" * 16: (1e300, 0, 0)}, {b"a" * 16: ("x", 0, 0)}, {b"a" * 16: (0, 0)},
                  {b"a" * 16: None}, {b"b" * 16: (0, 0, 0), uuid.UUID(int=5): (0, 0, 0)}, {b"a" * 16: (0, 0, 0, 0)}, [], None):
        with pytest.raises(hl.UsageError, match="16 bytes .a uuid's .bytes. and three numbers|moves are"):
            hl.pack_moves(moves)
    with pytest.raises(hl.WireError, match="of the other width"):
        hl.unpack_moves(hl.pack_moves({b"a" * 16: (1, 2, 3)}), wide=True)
    for data in (b"", b"\1\0\0\0", b"\xff\xff\xff\xff" + b"x" * 28, hl.pack_moves({b"a" * 16: (1, 2, 3)}) + b"x"):
        with pytest.raises(hl.WireError):
            hl.unpack_moves(data)


# =============================================================================
# 6  POOLS
# =============================================================================

def test_a_pool_lends_the_last_one_released_first_and_counts():
    pool = hl.Pool(list, cap=2, reset=list.clear)
    first, second, third = pool.acquire(), pool.acquire(), pool.acquire()
    first.append(1)
    for item in (first, second, third):
        pool.release(item)
    assert (pool.hits, pool.misses, pool.discarded, len(pool)) == (0, 3, 1, 2)
    assert pool.acquire() is second and pool.acquire() is first and first == []


def test_a_second_release_is_noticed():
    pool = hl.Pool(list)
    with pool.lease() as item:
        pass
    with pytest.raises(hl.StateError):
        pool.release(item)
    assert pool.acquire() is item
    pool.release(item)


def test_a_lease_gives_back_when_its_block_fails():
    pool = hl.Pool(list)
    with pytest.raises(ZeroDivisionError), pool.lease():
        1 / 0
    assert len(pool) == 1


def test_buffers_come_in_two_classes_and_oversize_ones_are_let_go():
    pool = hl.BufferPool(cap=1)
    small, large, huge = pool.acquire(), pool.acquire(513), pool.acquire(4097)
    assert (len(small), len(large), len(huge), pool.misses, pool.oversize) == (512, 4096, 4097, 3, 1)
    for buffer in (small, large, huge, bytearray(512)):
        pool.release(buffer)
    assert len(pool) == 2 and pool.acquire(512) is small and pool.acquire(4000) is large and pool.hits == 2
    small += b"grown"
    pool.release(small)
    assert len(pool) == 0
    with pytest.raises(hl.StateError, match="twice"):
        pool.release(large)
        pool.release(large)
    with pytest.raises(hl.UsageError, match="lends bytearrays, not bytes"):
        pool.release(b"x" * 512)


# =============================================================================
# 7  BUS
# =============================================================================

class PlainBus:
    """The bus without any of its tricks: the oracle."""

    def __init__(self):
        self.handlers = []
        self.number = 0

    def on(self, key, fn, priority=0, once=False, ignore_cancelled=False, accept=None):
        self.number += 1
        self.handlers.append([priority, self.number, key.split(":"), fn, once, ignore_cancelled, accept])

    def emit(self, key):
        parts, cancelled = key.split(":"), False
        for entry in sorted(self.handlers, key=lambda each: each[:2]):
            _, _, pattern, fn, once, ignore, accept = entry
            fits = len(parts) == len(pattern) or len(parts) > len(pattern) and pattern[-1] == "*"
            if not fits or any(p not in ("*", k) for p, k in zip(pattern, parts)):
                continue
            if ignore and cancelled or accept and not accept(key):
                continue
            if once:
                self.handlers.remove(entry)
            cancelled = fn(key) or cancelled
        return cancelled


def test_the_bus_does_what_a_plain_one_does(rng):
    for _ in range(int(30 * SOAK)):
        bus, plain, seen, expected, handlers = hl.Bus(), PlainBus(), [], [], []
        counts = {}
        words = ["a", "b", "c"]
        for number in range(rng.randint(1, 12)):
            key = ":".join(rng.choice(words + ["*"]) for _ in range(rng.randint(1, 3)))
            priority, once, ignore = rng.randint(-1, 1), rng.random() < .2, rng.random() < .3
            cancels, picky = rng.random() < .2, rng.random() < .3

            def ours(event, number=number, cancels=cancels):
                seen.append((number, event.key))
                counts[number] = counts.get(number, 0) + 1
                if cancels:
                    event.cancel()

            def theirs(key, number=number, cancels=cancels):
                expected.append((number, key))
                return cancels
            handlers.append(bus.on(key, ours, priority=priority, once=once, ignore_cancelled=ignore,
                                   filter=(lambda event: event.key.startswith("a")) if picky else None))
            plain.on(key, theirs, priority, once, ignore, (lambda key: key.startswith("a")) if picky else None)
            for _ in range(rng.randint(0, 90)):
                key = ":".join(rng.choice(words) for _ in range(rng.randint(1, 4)))
                assert bus.emit(key, None).cancelled == plain.emit(key)
        assert seen == expected
        assert [handler.calls for handler in handlers] == [counts.get(n, 0) for n in range(len(handlers))]


def test_handlers_run_by_priority_then_registration():
    bus, order = hl.Bus(), []
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("early", -5)):
        bus.on("k", lambda event, name=name: order.append(name), priority=priority)
    bus.emit("k", None)
    assert order == ["early", "first", "second", "late"]


def test_a_star_is_one_segment_or_all_that_remain_when_last():
    bus, got = hl.Bus(), []
    bus.on("client:*:message", lambda event: got.append(("mid", event.key)))
    bus.on("client:*", lambda event: got.append(("last", event.key)))
    for key in ("client:chat:message", "client:chat", "client:a:b:c", "client", "other:chat:message"):
        bus.emit(key)
    assert got == [("mid", "client:chat:message"), ("last", "client:chat:message"),
                   ("last", "client:chat"), ("last", "client:a:b:c")]


def test_a_cancelled_event_still_reaches_handlers_that_want_it():
    bus, order = hl.Bus(), []
    bus.on("k", lambda event: event.cancel("because"))
    bus.on("k", lambda event: order.append("sees it"))
    bus.on("k", lambda event: order.append("never"), ignore_cancelled=True)
    event = bus.emit("k", 1)
    assert (event.cancelled, event.reason, order) == (True, "because", ["sees it"])


def test_a_failing_handler_is_logged_counted_and_harms_nobody(caplog):
    bus, order = hl.Bus(), []
    handler = bus.on("k", lambda event: 1 / 0)
    bus.on("k", lambda event: order.append(1))
    for _ in range(130):                       # sampled emits included
        bus.emit("k")
    assert len(order) == 130 and handler.errors == handler.calls == bus.errors == 130
    assert caplog.text.count("ZeroDivisionError") == 1      # once a second, not 130 times
    assert bus.stats()["k"]["errors"] == 130


def test_the_last_words_of_a_handler_that_went_away_are_heard(caplog):
    bus = hl.Bus()
    once = bus.on("k", lambda event: 1 / 0, once=True)
    bus.emit("k")
    assert once.errors == bus.errors == 1 and "ZeroDivisionError" in caplog.text
    fails = lambda event: 1 / 0                 # noqa: E731
    first, second = bus.on("k", fails), bus.on("*", fails)
    bus.emit("k")
    assert (first.errors, second.errors) == (1, 1)
    first.remove()
    assert bus.errors == 3                      # a counter does not fall


def test_a_failing_filter_harms_nobody(caplog):
    async def later(event): ...
    started = []
    bus = hl.Bus(spawn=lambda handler, event: started.append(handler))
    bad = bus.on("k", later, filter=lambda event: event.data["text"])
    good = bus.on("k", later)
    bus.emit("k", {})
    assert started == [good] and (bad.errors, bad.calls, good.calls) == (1, 0, 1)
    bus.on("k", lambda event: event.cancel())
    bus.emit("k", {"text": 1})
    assert (bad.calls, good.calls) == (0, 1)


@pytest.mark.parametrize("options", [{"priority": "high"}, {"filter": 5}])
def test_a_registration_that_can_not_be_changes_nothing(options):
    bus = hl.Bus()
    handler = bus.on("k", lambda event: None)
    with pytest.raises(hl.UsageError):
        bus.on("k", print, **options)
    with pytest.raises(hl.UsageError):
        bus.on(print)
    bus.on("k", lambda event: None)
    bus.emit("k")
    assert handler.calls == 1 and len(bus.stats()["k"]["handlers"]) == 2


def test_registrations_that_come_and_go_leave_nothing():
    bus = hl.Bus()
    for number in range(2_000):
        bus.on(f"reply:{number}", lambda event: None, once=True)
        bus.emit(f"reply:{number}")
    for number in range(200):
        handler = bus.on(f"u{number}:*", lambda event: None)
        bus.emit(f"u{number}:x")
        handler.remove()
    assert not bus._routes and not bus._shared and bus.emits == 2_200
    for key in (None, 5, "", "a b"):
        with pytest.raises(hl.UsageError):
            bus.emit(key)


def test_statistics_are_exact_and_times_are_sampled():
    clock = FakeClock()
    bus = hl.Bus(clock=clock)

    def slow(event):
        clock.now_ns += 3 * MS
    bus.on("k", slow)
    bus.on("k", lambda event: None)
    for _ in range(200):
        bus.emit("k")
    stats = bus.stats()["k"]
    assert stats["emits"] == 200 and [each["calls"] for each in stats["handlers"]] == [200, 200]
    assert stats["avg_ns"] == 3_000_000 and stats["handlers"][0]["max_ns"] == 3_000_000
    assert stats["handlers"][1]["avg_ns"] == 0 and "slow" in stats["handlers"][0]["name"]


def test_handlers_may_come_and_go_while_an_event_is_under_way():
    bus, order = hl.Bus(), []

    def first(event):
        order.append("first")
        second.remove()
        bus.on("k", lambda event: order.append("new"), priority=9)
    bus.on("k", first, once=True)
    second = bus.on("k", lambda event: order.append("second"))
    bus.emit("k")
    bus.emit("k")
    assert order == ["first", "second", "new"] and second.calls == 1
    second.remove()


def test_once_is_once_even_when_nested():
    bus, order = hl.Bus(), []

    def handler(event):
        order.append(1)
        bus.emit("k")
    bus.on("k", handler, once=True)
    bus.emit("k")
    assert order == [1] and bus.stats() == {}


def test_remove_takes_a_pattern_and_says_how_many():
    bus = hl.Bus()
    for key in ("client:chat:a", "client:chat:*", "client:move:a", "core:x"):
        bus.on(key, print)
    assert bus.remove("client:chat:*") == 2 and bus.remove("client:*") == 1 and bus.remove("nobody") == 0


def test_strangers_keys_do_not_grow_memory():
    bus = hl.Bus()
    handler = bus.on("client:*", lambda event: None)
    for number in range(20_000):
        bus.emit(f"client:x{number}:y")
        bus.emit(f"stranger:{number}")
    assert handler.calls == 20_000 and bus._strange_route.cache_info().currsize <= hl._MAX_STRANGE_KEYS
    assert len(bus.stats()) == 1 and bus.emits == 40_000


def test_an_emitter_follows_later_registrations():
    bus, got = hl.Bus(), []
    emit = bus.emitter("k")
    emit(1)
    bus.on("k", lambda event: got.append(event.data))
    emit(2)
    assert bus.emit_many("k", [3, 4]) == 2 and got == [2, 3, 4]
    assert bus.stats()["k"]["emits"] == 4


def test_a_decorated_function_stays_itself():
    bus = hl.Bus()

    @bus.on("k", priority=1)
    def handler(event):
        return event.data
    assert handler(hl.Event("k", 5)) == 5


@pytest.mark.parametrize("key", ["", ":", "a:", "a b", None, "a::b"])
def test_malformed_keys_are_refused(key):
    with pytest.raises(hl.UsageError):
        hl.Bus().on(key, print)


def test_async_and_blocking_handlers_need_a_spawn():
    async def later(event): ...
    for options in ({}, {"blocking": True}):
        with pytest.raises(hl.UsageError, match="spawn"):
            hl.Bus().on("k", print if options else later, **options)
    started = []
    bus = hl.Bus(spawn=lambda handler, event: started.append((handler.fn, event)))
    bus.on("k", later)
    bus.on("k", lambda event: event.data and event.cancel())
    bus.emit("k", False)
    bus.emit("k", True)                        # cancelled before it could start
    assert [fn for fn, _ in started] == [later]
    with pytest.raises(hl.StateError):
        started[0][1].cancel()


def test_validate_names_what_looks_wrong():
    bus = hl.Bus()
    bus.emitter("lonely")(1)
    for _ in range(101):
        bus.on("crowded", print)
    assert bus.validate() == ["nobody listens to 'lonely'", "'crowded' has 101 handlers"]


def test_a_weak_method_ends_with_its_object():
    class Listener:
        heard = 0

        def hear(self, event):
            Listener.heard += 1

    bus, one, two = hl.Bus(), Listener(), Listener()
    handlers = [bus.on("a", each.hear, weak=True) for each in (one, two)]
    bus.emit("a")
    assert Listener.heard == 2 and handlers[0].name.endswith("Listener.hear") and handlers[0].calls == 1
    del one
    bus.emit("a")
    assert Listener.heard == 3 and bus.handler_count == 1
    del two
    bus.on("a", print).remove()             # also where nobody emits
    assert bus.handler_count == 0
    for wrong in (print, lambda event: None):
        with pytest.raises(hl.UsageError, match="weak"):
            bus.on("a", wrong if wrong is not print else Listener.hear, weak=True)


def test_propagators_decide_by_what_an_event_is():
    bus, pass_ = hl.Bus(), hl.Propagator

    def let_through(keep, events):
        got = []
        handler = bus.on("*", got.append, filter=keep)
        for key, data in events:
            bus.emit(key, data)
        handler.remove()
        assert handler.calls == len(got)
        return [event.key for event in got]

    keys = ["core:tick", "client:chat:message", "client:game:fire", "plugin:shop:sold", "gorc_instance:Rock:2:hit", "gorc_client:Rock:0:hit"]
    events = [(key, None) for key in keys]
    assert let_through(pass_.exact("core:tick", "client:game:fire"), events) == ["core:tick", "client:game:fire"]
    assert let_through(pass_.namespace(allow=["client"]), events) == keys[1:3]
    assert let_through(pass_.namespace(allow=["client", "core"], block=["client:chat"]), events) == [keys[0], keys[2]]
    assert let_through(pass_.namespace(block=["client:ch"]), events) == keys
    assert let_through(pass_.channel(0, 1), events) == keys[:4] + keys[5:]
    assert let_through(~pass_.channel(0, 1), events) == [keys[4]]
    assert let_through(pass_.all_of(), events) == let_through(pass_.any_of(), events) == keys
    assert let_through(pass_.exact("core:tick") | pass_.exact(keys[2]), events) == [keys[0], keys[2]]
    assert let_through(pass_.namespace(allow=["client"]) & ~pass_.exact(keys[1]), events) == [keys[2]]
    places = [("a:near", {"x": 3, "y": 4}), ("a:edge", {"position": {"x": 0, "y": 0, "z": -5}}), ("a:far", {"x": 3, "y": 4, "z": 1}),
              ("a:none", {"x": "?"}), ("a:object", hl.builtin_schema().Vec3(x=9)), ("a:nan", {"x": math.nan, "y": 0})]
    assert let_through(pass_.near((0, 0, 0), 5), places) == ["a:near", "a:edge", "a:none"]
    assert let_through(pass_.near(lambda: (9, 0, 0), 1), places) == ["a:none", "a:object"]
    assert let_through(pass_.near(lambda: None, 1), places) == [key for key, _ in places]
    assert hl.Event("client:chat:message", None).metadata == {"namespace": "chat"}
    assert hl.Event("gorc_client:Rock:3:hit", {"x": 1, "y": 2}).metadata == {
        "namespace": "gorc_client", "channel": 3, "position": (1.0, 2.0, 0.0)}
    for wrong in (lambda: pass_.namespace(allow="client"), lambda: pass_.near((0, 0), 5), lambda: pass_.near((0, 0, 0), -1),
                  lambda: pass_.near((0, 0, 0), math.nan)):
        with pytest.raises(hl.UsageError):
            wrong()


def test_a_filter_may_hand_on_another_event():
    spawned = []
    bus, got = hl.Bus(spawn=lambda handler, event: spawned.append(event)), []
    double = hl.Propagator.transform(lambda data: data * 2)

    async def later(event): ...

    bus.on("a", got.append, filter=double & hl.Propagator(lambda event: event.data > 2) & double)
    bus.on("a", lambda event: event.cancel("by the second") if event.data == 20 else None, filter=double)
    bus.on("a", later, filter=double)
    assert not bus.emit("a", 1).cancelled and not got and spawned[0].data == 2
    with pytest.raises(hl.StateError):
        spawned[0].cancel()
    event = bus.emit("a", 10)
    assert [each.data for each in got] == [40] and event.data == 10
    assert event.cancelled and event.reason == "by the second" and len(spawned) == 1
    got[0].cancel("by the copy")
    assert event.reason == "by the copy" == got[0].reason


def test_statistics_tell_the_least_the_mean_the_most_and_p95():
    clock = FakeClock()
    bus = hl.Bus(clock=clock, debug=True)

    def work(event):
        clock.now_ns += event.data

    bus.on("a", work)
    for spent in range(1, 201):
        bus.emit("a", spent * 1000)
    stats = bus.stats()["a"]
    assert stats["emits"] == 200 and stats["timed"] == 200
    for figures in (stats, stats["handlers"][0]):
        assert (figures["min_ns"], figures["avg_ns"], figures["max_ns"]) == (1000, 100_500, 200_000)
        assert figures["p95_ns"] == 195_000             # of the last hundred: 101 to 200
    assert stats["handlers"][0]["calls"] == 200 and "queued" not in stats["handlers"][0]
    bus.debug(False)
    for _ in range(129):
        bus.emit("b", 1)
    sampled = hl.Bus(clock=clock)
    sampled.on("a", work)
    for _ in range(129):
        sampled.emit("a", 5)
    assert sampled.stats()["a"]["timed"] == 3           # the first, the 65th, the 129th


def test_slow_handlers_are_warned_about_once_a_second(caplog):
    clock = FakeClock()
    bus = hl.Bus(clock=clock, debug=True, slow_ms=10)

    def slow(event):
        clock.now_ns += event.data * MS

    bus.on("a", slow)
    for spent in (1, 10, 11, 50, 500):
        bus.emit("a", spent)
    assert bus.slow == 3 and caplog.text.count("took") == 1 and "slow of a took 11.0 ms" in caplog.text
    clock.now_ns += 1000 * MS
    bus.emit("a", 20)
    assert caplog.text.count("took") == 2


def test_a_key_without_a_handler_is_told_with_the_nearest_one_while_debugging(caplog):
    bus = hl.Bus(debug=True)
    bus.on("core:player_conected", print)
    bus.emit("core:player_connected")
    bus.emit("nothing:like:it")
    assert "nobody listens to 'core:player_connected'; did you mean 'core:player_conected'?" in caplog.text
    assert caplog.text.count("nobody") == 1
    quiet = hl.Bus()
    quiet.on("core:player_conected", print)
    quiet.emitter("core:player_connected")()
    assert caplog.text.count("nobody") == 1
    assert quiet.validate() == ["nobody listens to 'core:player_connected'; did you mean 'core:player_conected'?"]


def test_keys_are_interned():
    bus = hl.Bus()
    handlers = [bus.on("".join(["a:", "b"]), print) for _ in range(2)]
    assert handlers[0].key is handlers[1].key is sys.intern("a:b")


def test_what_runs_beside_the_loop_is_counted_bounded_and_answers_on_the_loop(monkeypatch, caplog):
    monkeypatch.setattr(hl, "_MAX_RUNNING", 3)
    gate, results = threading.Event(), []
    with running() as app:
        def answer(event, result):
            results.append((event.data, result, threading.get_ident()))

        @app.on_core("work", blocking=True, then=answer)
        def work(event):
            gate.wait(5)
            return event.data * 2

        @app.on_core("aim", then=answer)
        async def aim(event):
            while not gate.is_set():
                await asyncio.sleep(0.01)
            return event.data * 3

        @app.on_core("exit")
        async def leave(event):
            sys.exit(5)

        @app.on_core("odd", then=lambda event, result: 1 / 0)
        async def odd(event): ...

        def emit(name):
            return [app.emit_core(name, number).failed for number in range(5)]

        assert on_loop(app, emit, "work") == on_loop(app, emit, "aim") == [False, False, False, True, True]
        assert app.metrics['horizon_handlers_running{kind="blocking"}'] == 3
        assert app.metrics['horizon_handlers_running{kind="asynchronous"}'] == 3
        stats = app.bus.stats()["core:work"]
        assert stats["handlers"][0]["running"] == 3 and stats["errors"] == 2 and "3 calls of" in caplog.text
        gate.set()
        wait_until(lambda: len(results) == 6)
        assert sorted(each[:2] for each in results) == [(0, 0), (0, 0), (1, 2), (1, 3), (2, 4), (2, 6)]
        assert {each[2] for each in results} == {app._thread_id}
        figures = app.bus.stats()["core:work"]["handlers"][0]
        assert figures["running"] == 0 and figures["queued"]["timed"] == 3 and figures["timed"] == 3
        on_loop(app, app.emit_core, "exit")
        on_loop(app, app.emit_core, "odd")
        wait_until(lambda: app.bus.errors == 6)
        assert "SystemExit(5)" in caplog.text and "ZeroDivisionError" in caplog.text
        results.clear()
        on_loop(app, app.emit_core, "aim", 7)       # asyncio's thread goes on
        wait_until(lambda: results)
    for wrong in ({"then": print}, {"then": 5}):
        with pytest.raises(hl.UsageError):
            hl.Bus().on("a", print, **wrong)


def test_at_the_end_what_runs_has_its_time_and_is_then_cancelled(caplog):
    ended = []
    app = hl.Engine(port=0, grace_s=0.3)

    @app.on_core("short")
    async def short(event):
        await asyncio.sleep(0.1)
        ended.append("short")

    @app.on_core("long")
    async def long(event):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cleaned up")

    with app:
        on_loop(app, app.emit_core, "short")
        on_loop(app, app.emit_core, "long")
    assert ended == ["short", "cleaned up"] and "1 calls of handlers were under way" in caplog.text


# =============================================================================
# 8  TOPICS
# =============================================================================

def naive_matches(pattern, topic):
    want, got = pattern.split("."), topic.split(".")
    if want[-1] == ">":
        return len(got) >= len(want) and naive_matches(".".join(["*", *want[:-1]]), ".".join(["*", *got[:len(want) - 1]]))
    return len(want) == len(got) and all(w in ("*", g) for w, g in zip(want, got))


def test_topics_reach_whom_a_naive_matcher_says(rng):
    for _ in range(int(20 * SOAK)):
        topics, live = hl.Topics(), {}
        got = []
        for step in range(200):
            words = ["a", "b", "c"]
            if rng.random() < .3:
                pattern = ".".join(rng.choice(words + ["*"]) for _ in range(rng.randint(1, 3)))
                pattern += ".>" if rng.random() < .2 else ""
                live[step] = topics.subscribe(pattern, lambda message, step=step: got.append(step))
            elif live and rng.random() < .3:
                live.pop(rng.choice(list(live))).remove()
            topic = ".".join(rng.choice(words) for _ in range(rng.randint(1, 4)))
            got.clear()
            wanted = [n for n, s in live.items() if naive_matches(s.pattern, topic)]
            assert topics.publish(topic, None) == len(wanted)
            assert sorted(got) == sorted(wanted)
        for subscription in live.values():
            subscription.remove()
            subscription.remove()
        topics._check()


def test_offsets_are_dense_and_renderings_are_made_once():
    topics, got = hl.Topics(), []
    topics.subscribe("t", got.append)
    for number in range(3):
        topics.publish("t", {"n": number})
    assert [message.offset for message in got] == [1, 2, 3] and len({m.epoch for m in got}) == 1
    message = got[0]
    assert json.loads(message.json()) == {"topic": "t", "payload": {"n": 0}, "offset": 1, "epoch": message.epoch}
    assert message.json() is message.json() and message.envelope("") is message.envelope("")
    read = hl.builtin_schema().EventBatch.decode(message.envelope("")).events[0].topic_message
    assert (read.topic, json.loads(read.payload), read.offset) == ("t", {"n": 0}, 1)


def test_batched_sinks_get_a_tick_at_once_and_only_what_was_meant_for_them():
    topics, one, two = hl.Topics(max_batch=4), [], []
    first = topics.subscribe("t", one.append, batched=True)
    topics.publish("t", 1)
    topics.publish("t", 2)
    topics.subscribe("*", two.append, batched=True)     # from here on
    topics.publish("t", 3)
    first.remove()
    topics.publish("t", 4)
    topics.publish("u", 5, critical=True)
    assert [[each.payload for each in batch.items] for batch in one] == [[1, 2], [3]]
    assert sorted([each.payload for each in batch.items] for batch in two) == [[3], [4], [5]]
    for number in range(4):
        topics.publish("t", number)                     # a full batch does not wait
    assert len(two[-1].items) == 4 and not topics._pending


def test_a_failing_sink_does_not_stop_the_others(caplog):
    topics, got = hl.Topics(), []
    topics.subscribe("t", lambda message: 1 / 0)
    topics.subscribe("t", got.append)
    assert topics.publish("t", 1) == 2 and len(got) == 1 and topics.errors == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_payload_that_changes_later_was_sent_as_it_was():
    topics, got = hl.Topics(), []
    topics.subscribe("t", got.append, batched=True)
    payload = {"n": 1}
    topics.publish("t", payload)
    payload["n"] = object()
    topics.flush()
    message = got[0].items[0]
    assert json.loads(message.json())["payload"] == {"n": 1}
    batch = hl.builtin_schema().EventBatch.decode(message.envelope(""))
    assert json.loads(batch.events[0].topic_message.payload) == {"n": 1}


def test_a_sink_that_matches_twice_gets_it_once():
    topics, got = hl.Topics(), []
    topics.subscribe("a.b", got.append)
    topics.subscribe("a.*", got.append)
    assert topics.publish("a.b", 1) == 1 and len(got) == 1


@pytest.mark.parametrize("name", ["", ".", "a..b", "a b", "x" * 300, None, 5, "a\n", "a.>.b", "a*", ".".join("a" * 33)])
def test_topics_to_publish_to_are_plain_names(name):
    with pytest.raises(hl.UsageError):
        hl.Topics().publish(name, 1)


@pytest.mark.parametrize("pattern", ["", "a.>.b", ">.a", "a..*", "a*", None])
def test_malformed_patterns_are_refused(pattern):
    with pytest.raises(hl.UsageError):
        hl.Topics().subscribe(pattern, print)


def test_unique_topics_do_not_grow_memory():
    topics = hl.Topics()
    topics.subscribe("kept", print)
    for number in range(25_000):
        topics.publish(f"stranger.{number}", None)
    assert len(topics) <= hl._MAX_IDLE_TOPICS
    assert [each.pattern for each in topics.matching("kept")] == ["kept"]


def test_a_payload_that_is_no_json_is_the_publishers_mistake():
    topics = hl.Topics()
    got = []
    topics.subscribe("t", got.append, batched=True)
    for payload in ({1, 2}, math.nan, b"bytes", "\ud800"):
        with pytest.raises(hl.UsageError, match="JSON"):
            topics.publish("t", payload)
    topics.publish("t", "fine")
    topics.flush()
    assert [message.offset for message in got[0].items] == [1]


def test_presence_counts_users_not_connections():
    now = [0]
    presence = hl.Presence(debounce_s=0, updates_per_s=1000, clock=lambda: now[0])
    for number, user in enumerate(("bob", "ada", "bob")):
        presence.join(user, number)
    assert presence.users() == presence.take_changes()["users"] == ["ada", "bob"]
    now[0] += 10**9
    presence.leave(0)
    assert presence.online() == 2 and presence.take_changes() is None
    presence.leave(2)
    presence.leave(2)
    assert presence.take_changes() == {"type": "presence_update", "users": ["ada"], "joined": [], "left": ["bob"]}
    presence._check()

def test_mqtt_wildcards_mean_the_same():
    topics, got = hl.Topics(), []
    for pattern in ("s.+.temp", "s.#", "s.*.temp"):
        topics.subscribe(pattern, lambda message, pattern=pattern: got.append(pattern))
    assert topics.publish("s.one.temp", 1) == 3 and topics.publish("s.one.two.temp", 1) == 1
    assert {each.pattern for each in topics.matching("s.one.temp")} == {"s.*.temp", "s.>"}
    with pytest.raises(hl.UsageError):
        topics.subscribe("s.#.temp", print)


def test_publishing_to_a_pattern_reaches_every_topic_there_is(rng):
    topics, got = hl.Topics(), []
    names = {".".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(40)}
    for name in names:
        topics.subscribe(name, lambda message: got.append(message.topic))
    for pattern in ("*", ">", "a.>", "a.*.b", "*.*", "b.#", "+.c"):
        plain = pattern.replace("+", "*").replace("#", ">")
        wanted = sorted(name for name in names if naive_matches(plain, name))
        got.clear()
        assert topics.publish(pattern, 1) == len(wanted) and sorted(got) == wanted == sorted(topics.live(pattern))
    assert topics.publish("nobody.*.there", 1) == 0 and len(topics) == len(names)


def test_feeds_hear_when_the_first_comes_and_the_last_goes():
    told = []
    topics = hl.Topics(on_occupied=lambda name, occupied: told.append((name, occupied)))
    one, two = topics.subscribe("feed.a", print), topics.subscribe("feed.a", print)
    one.remove()
    one.remove()
    assert told == [("feed.a", True)]
    two.remove()
    wild = topics.subscribe("feed.*", print)
    assert told[1:] == [("feed.a", False), ("feed.*", True)]
    topics.topic("feed.b")                      # declared: who listens by a wildcard counts
    assert told[3:] == [("feed.b", True)]
    both = topics.subscribe("feed.b", print)
    wild.remove()
    assert told[4:] == [("feed.*", False)]
    other = topics.subscribe("feed.>", print)
    both.remove()
    other.remove()
    assert told[5:] == [("feed.>", True), ("feed.>", False), ("feed.b", False)]
    topics._check()


def test_history_is_what_a_naive_one_says(rng):
    """Whoever comes back by offset or by seq gets exactly what was missed, or hears of a gap."""
    for _ in range(int(30 * SOAK)):
        clock = FakeClock()
        topics = hl.Topics(max_bytes=rng.choice([300, 1 << 20]), clock=clock)
        limits = {}
        for name in ("a.x", "a.y", "b"):
            limits[name] = rng.choice([0, 1, 3, 10]), rng.choice([None, 5.0, 50.0])
            topics.topic(name, history=limits[name][0], ttl=limits[name][1])
        naive = {name: [] for name in limits}       # (when, seq, offset, payload, bytes)
        for step in range(60):
            clock.now_ns += rng.randrange(3) * 1_000_000_000
            name = rng.choice(list(limits))
            if rng.random() < .6:
                got = []
                watch = topics.subscribe(name, got.append)
                topics.publish(name, payload := [step, "x" * rng.randrange(60)])
                watch.remove()
                message = got[0]
                naive[name].append((clock.now_ns, message.seq, message.offset, payload, len(json.dumps(payload, separators=(",", ":"))) + 64))
                assert message.offset == len(naive[name])

            def kept(name):
                count, ttl = limits[name]
                items = naive[name][-count:] if count else []
                items = [each for each in items if ttl is None or clock.now_ns - each[0] <= ttl * 1e9]
                while sum(each[4] for each in items) > topics.max_bytes:
                    items = items[1:]
                return items

            assert [each.payload for each in topics.history(name)] == [each[3] for each in kept(name)]
            got = []
            if rng.random() < .5:
                since = rng.randrange(len(naive[name]) + 2)
                subscription = topics.subscribe(name, got.append, since={"offset": since, "epoch": topics.position(name).get("epoch")})
                missed = naive[name][since:]
                gap = since > len(naive[name]) or missed != kept(name)[-len(missed):] and bool(missed)
            else:
                since = rng.randrange(1, 2 + max([each[1] for items in naive.values() for each in items], default=1))
                subscription = topics.subscribe("a.*", got.append, since={"epoch": topics._epoch, "seq": since})
                missed = sorted(each for name in ("a.x", "a.y") for each in naive[name] if each[1] > since)
                missed.sort(key=lambda each: each[1])
                gap = any(each not in kept("a.x") + kept("a.y") for each in missed) or (
                    sum(each[4] for each in missed) > topics.max_bytes)
            subscription.remove()
            assert subscription.gap == gap
            assert [each.payload for each in got if not each.gap] == ([] if gap else [each[3] for each in missed])
            assert [each.gap for each in got] == [True] * gap + [False] * (0 if gap else len(missed))
        topics._check()


def test_what_is_repeated_for_newcomers():
    topics, got = hl.Topics(), []
    topics.topic("last", replay="last")
    topics.topic("room.*", history=2, replay="all")
    for number in range(4):
        topics.publish("last", number)
        topics.publish(f"room.{number % 2}", number)
    topics.subscribe("last", lambda message: got.append(message.payload))
    topics.subscribe("room.*", lambda message: got.append(message.payload))
    assert got == [3, 0, 1, 2, 3]
    late = topics.subscribe("last", lambda message: got.append((message.gap, message.payload)), since={"epoch": "other", "offset": 3})
    assert late.gap and got[5][0] and got[6] == (False, 3)      # what can't be had is told, then the last
    assert got[5][1] == {"topic": "last", "gap": True, "epoch": topics.position("last")["epoch"], "offset": 3}
    for bad in ({"history": -1}, {"history": 1.5}, {"ttl": 0}, {"ttl": "1"}, {"replay": "first"}, {"replay": "all"}):
        with pytest.raises(hl.UsageError):
            topics.topic("t", **bad)
    for since in ("1", -1, True, {}, {"offset": "1"}, {"seq": 1}, {"epoch": 5, "offset": 1}, [1]):
        with pytest.raises(hl.UsageError):
            topics.subscribe("last", print, since=since)
    with pytest.raises(hl.UsageError):
        topics.subscribe("room.*", print, since=3)
    topics.topic("last", history=0)             # said again: it keeps nothing any more
    assert topics.history("last") == []


def test_history_that_strangers_fill_is_bounded(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_KEPT_BYTES", 100_000)
    topics = hl.Topics()
    topics.topic("room.>", history=1000)
    topics.topic("room.mine", history=1000)
    for number in range(2_000):
        topics.publish(f"room.{number % 50}", "x" * 100)
        if number < 100:
            topics.publish("room.mine", number)
    assert topics._kept <= 125_000 and len(topics.history("room.mine")) == 100
    got = []
    assert topics.subscribe("room.0", got.append, since=1).gap
    topics.subscribe("room.0", print).remove()
    assert all(record.kept == sum(item.size for item in record.history) for record in topics._topics.values())


def test_conflation_hands_on_the_newest_at_its_rate():
    clock, got, fast = FakeClock(), [], []
    topics = hl.Topics(clock=clock)
    clock.now_ns = 10**12
    for batched in (False, True):
        got.clear(), fast.clear()
        step = 0
        def sink(what):
            got.extend((step, each.topic, each.payload) for each in (what.items if batched else [what]))
        slow = topics.subscribe("s.*", sink, rate=0.5, keep="last", batched=batched)
        every = topics.subscribe("s.a", lambda message: fast.append(message.payload), rate=2)
        for step in range(100):                 # ten seconds, a tenth each
            topics.publish("s.a", step)
            topics.publish("s.b", step)
            topics.flush()
            clock.now_ns += 100_000_000
        assert [each[0] for each in got] == [0] + [n for n in (20, 40, 60, 80) for _ in range(2)]
        assert all(value in (when, when - 1) for when, _, value in got) and got[0][1:] == ("s.a", 0)
        assert all({name for when, name, _ in got if when == n} == {"s.a", "s.b"} for n in (20, 40, 60, 80))
        assert fast == list(range(len(fast))) and len(fast) >= 95       # all, though not at once
        assert topics.wait_s() <= 2.0
        topics.publish("s.a", "now", critical=True)     # never waits
        topics.flush()
        assert got[-1][1:] == ("s.a", "now")
        topics.publish("s.a", "never")
        slow.remove()
        every.remove()
        clock.now_ns += 10**11
        topics.flush()
        assert got[-1][1:] == ("s.a", "now") and topics.wait_s() == math.inf
        topics._check()
    for bad in ({"rate": 0}, {"rate": -1}, {"rate": "2"}, {"rate": math.nan}, {"keep": "first"}, {"rate": True}):
        with pytest.raises(hl.UsageError):
            topics.subscribe("t", print, **bad)


def test_a_msg_id_counts_once_in_its_time():
    clock, got = FakeClock(), []
    topics = hl.Topics(dedup_ttl_s=10, clock=clock)
    topics.subscribe(">", lambda message: got.append(message.payload))
    say = lambda payload, msg_id, topic="t": topics.publish(topic, payload, msg_id=msg_id)
    assert [say(1, "a"), say(2, "a"), say(3, "b"), say(4, "a", "u")] == [1, 0, 1, 1]
    clock.now_ns += 9_999_999_999
    assert say(5, "a") == 0 and topics.duplicates == 2          # it does not begin again
    clock.now_ns += 1
    assert say(6, "a") == 1 and say(7, "a") == 0
    with pytest.raises(hl.UsageError):
        topics.topic("kept", history=1) or say({1}, "c", "kept")    # it was not published: it may be said again
    assert say(8, "c", "kept") == 1 and got == [1, 3, 4, 6, 8]
    for bad in ("", 5, "x" * 129):
        with pytest.raises(hl.UsageError):
            say(1, bad)
    for number in range(hl._MAX_MSG_IDS + 100):
        say(number, str(number))
    assert len(topics._topics["t"].ids) == hl._MAX_MSG_IDS
    clock.now_ns += 11 * 10**9
    topics.sweep()
    assert not topics._topics["t"].ids and not topics._topics["u"].ids


def test_subscribers_that_publish_in_a_loop_are_stopped(caplog):
    topics, count = hl.Topics(), [0, 0]

    @functools.partial(topics.subscribe, "ping")
    def ping(message):
        count[0] += 1
        topics.publish("pong", 1)
        topics.publish("pong", 2)               # without a limit this would never end

    @functools.partial(topics.subscribe, "pong")
    def pong(message):
        count[1] += 1
        topics.publish("ping", 1)
        topics.publish("ping", 2)

    assert topics.publish("ping", 0) == 1
    assert sum(count) == 32 and topics.loops == 1 and 0 < topics.errors <= 32
    assert "in a loop" in caplog.text and caplog.text.count("Traceback") <= 1
    got = []
    topics.subscribe("quiet", got.append)
    assert topics.publish("quiet", 1) == 1 and len(got) == 1    # all is as before
    topics.publish("ping", 0)
    assert topics.loops == 2


def test_a_sink_subscribed_twice_recovers_once(rng):
    """Exact and wildcards at once: whatever the order and the positions, each message comes once."""
    for _ in range(int(100 * SOAK)):
        topics, got = hl.Topics(), []
        topics.topic(">", history=50)
        published, live = [], []

        def publish(count):
            for _ in range(count):
                name = rng.choice(["a.x", "a.y", "b"])
                topics.publish(name, len(published))
                published.append((name, topics._topics[name].last_seq))
        publish(10)
        wanted, told = set(), []                # told: what it has said of, or had, before
        for pattern in rng.sample(["a.x", "a.*", ">", "b"], 3):
            since = rng.choice([None, rng.randrange(max(seq for _, seq in published) + 1)])
            options = {} if since is None else {"since": {"epoch": topics._epoch, "seq": since}}
            live.append(pattern)
            topics.subscribe(pattern, got.append, **options)
            if since is not None:
                wanted |= {n for n, (name, seq) in enumerate(published) if seq > since and naive_matches(pattern, name)
                           and not any(naive_matches(each, name) for each in told)}
                told.append(pattern)
            publish(3)
            wanted |= {n for n in range(len(published) - 3, len(published)) if any(naive_matches(each, published[n][0]) for each in live)}
        assert sorted(message.payload for message in got) == sorted(wanted)


def test_unsubscribing_does_not_ask_the_others():
    """Ten times as many subscriptions, of one sink and of one topic: the same work for each."""
    def work(count):
        topics, calls = hl.Topics(), [0]
        live = [topics.subscribe(name, print) for n in range(count) for name in ("t", f"own.{n}", f"wild.{n}.*")]

        def count_calls(frame, event, argument):
            calls[0] += event in ("call", "c_call")
        sys.setprofile(count_calls)
        try:
            for subscription in live[:30]:
                subscription.remove()
        finally:
            sys.setprofile(None)
        return calls[0]
    assert work(2_000) == work(200)


def test_a_subscriber_of_too_many_patterns_hears_of_a_gap_and_not_too_late(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_COMPARISONS", 100)
    topics, got = hl.Topics(), []
    topics.topic(">", history=5)
    for n in range(50):
        topics.publish(f"a.{n}", n)
    for n in range(10):
        topics.subscribe(f"*.{n}", got.append)
    assert topics.subscribe(">", got.append, since={"epoch": topics._epoch, "seq": 0}).gap
    assert len(got) == 1 and got[0].gap
    assert not topics.subscribe("a.7", got.append, since=0).gap and len(got) == 2
    topics.subscribe("a.7", got.append, since=0)            # asked again, it gets it again
    assert [message.payload for message in got[1:]] == [7, 7]


def test_what_sinks_do_meanwhile_neither_loops_nor_breaks_others(caplog):
    topics, got = hl.Topics(), []

    def again(batch):
        topics.publish("again", 1, critical=len(got) % 2 == 0)
        got.append(1)
    topics.subscribe("again", again, batched=True)
    topics.subscribe("again", lambda batch: 1 / 0, batched=True)
    topics.subscribe("again", lambda batch: got.append("other"), batched=True)
    topics.publish("again", 1)
    for _ in range(5):
        topics.flush()
    assert 5 <= got.count("other") < 100 and topics.errors >= 5 and "in a loop" in caplog.text
    added = [0]
    def more(items):
        added[0] += 1
        batcher.add("again")
        batcher.add("and again")
    batcher = hl.Batcher(more, max_size=2, max_wait_ms=0)
    batcher.add(1)
    batcher.flush()
    assert added == [1] and len(batcher) == 2
    batcher.flush()
    assert added == [2]


def test_what_waits_takes_the_memory_of_its_bytes():
    topics, held = hl.Topics(max_bytes=100_000), []
    topics.topic("kept", history=1000)
    for n in range(50):
        topics.subscribe(f"t.{n}", held.append, rate=0.001, keep="last", batched=True)
    payload = lambda: json.loads("[" + ",".join(["{}"] * 5_000) + "]")
    tracemalloc.start()
    for n in range(50):
        for _ in range(2):
            topics.publish(f"t.{n}", payload())
            topics.flush()
        topics.publish("kept", payload())
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    held_bytes = sum(topics._held.values())
    assert held_bytes <= 100_000 and topics._kept <= 100_000 and size < 4_000_000, size    # as objects 50 MB
    assert topics.history("kept")[-1].payload == payload() and len(held) > 50


def test_what_is_held_is_counted_as_it_came():
    topics = hl.Topics()
    held = topics.subscribe("t", lambda message: None, rate=0.001, keep="last")
    topics.subscribe("t", lambda message: message.json())       # renders what the other holds already
    for n in range(3):
        topics.publish("t", n)
    assert not topics._held[held.sink.sink]
    held.remove()
    assert not topics._held


def test_conflation_of_many_topics_is_as_slow_as_of_one():
    clock, got = FakeClock(), []
    topics = hl.Topics(clock=clock)
    topics.subscribe("s.*", got.append, rate=0.5, keep="last")
    for step in range(20):
        for n in range(1_000):
            topics.publish(f"s.{n}", step)
        topics.flush()
        clock.now_ns += 100_000_000
    assert len(got) == 1
    topics.flush()
    assert len(got) == 1_001 and {message.payload for message in got[1:]} == {19}


def test_topics_in_use_are_not_forgotten_for_invented_ones(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_IDLE_TOPICS", 100)
    topics, got = hl.Topics(), []
    topics.topic("chat.*", history=5)
    topics.subscribe("chat.*", got.append)
    for n in range(1_000):
        topics.publish("chat.lobby", n) if n % 40 == 0 else topics.publish(f"invented.{n}", n)
    assert [message.payload for message in topics.history("chat.lobby")] == [800, 840, 880, 920, 960]
    assert [message.offset for message in got] == list(range(1, 26)) and len(topics) <= 101


def test_thousands_come_and_go_and_leave_nothing(rng):
    clock = FakeClock()
    topics, presence = hl.Topics(clock=clock), hl.Presence(clock=clock)
    topics.topic("room.*", history=3, ttl=5)
    here = {}
    for step in range(int(4_000 * SOAK)):
        clock.now_ns += 1_000_000
        if here and rng.random() < .5:
            key = rng.choice(list(here)[:50])
            for subscription in here.pop(key):
                subscription.remove()
            presence.leave(key)
        else:
            patterns = {rng.choice(["room.*", "*.1", f"room.{rng.randrange(9)}", "a.>", f"own.{step}"]) for _ in range(3)}
            here[step] = [topics.subscribe(each, lambda message: None, rate=rng.choice([None, 100]), keep=rng.choice(["all", "last"]),
                                           since=rng.choice([None, {"epoch": topics._epoch, "seq": 1}])) for each in patterns]
            presence.join(f"user {step % 100}", step)
        topics.publish(f"room.{step % 9}", step, msg_id=str(step))
        if step % 100 == 0:
            topics.sweep()
            topics.flush()
            presence.take_changes()
    for key, subscriptions in here.items():
        for subscription in subscriptions:
            subscription.remove()
        presence.leave(key)
    clock.now_ns += 10**12
    topics.sweep()
    presence.take_changes()
    topics._check()
    presence._check()
    assert presence.online() == 0 == topics._kept and not topics._aging and not presence._told


def test_a_reload_is_silent_and_leaving_is_told_once():
    clock = FakeClock()
    presence = hl.Presence(debounce_s=5, clock=clock)
    presence.join("ada", 1, metadata={"kind": "tab"})
    assert presence.take_changes() == {"type": "presence_update", "users": ["ada"], "joined": ["ada"], "left": []}
    presence.leave(1)
    clock.now_ns += 4_900_000_000
    assert presence.take_changes() is None and presence.users() == ["ada"] and presence.connections("ada") == []
    presence.join("ada", 2)
    clock.now_ns += 10**10
    assert presence.take_changes() is None
    presence.leave(2)
    presence.join("bob", 3)
    clock.now_ns += 5_000_000_000
    assert presence.take_changes() == {"type": "presence_update", "users": ["bob"], "joined": ["bob"], "left": ["ada"]}
    presence.join("guest", 4, heartbeat_s=1, metadata={"n": 1})
    presence.join("cyd", 4)                     # the same connection by another name: no debounce
    assert presence.users() == ["bob", "cyd"] and presence.connections("cyd")[0]["metadata"] == {"n": 1}
    clock.now_ns += 10**9
    assert presence.take_changes()["joined"] == ["cyd"]
    presence.leave(3, at_once=True)
    assert presence.users() == ["cyd"]
    presence._check()


def test_states_are_recorded_at_once_and_told_ten_times_a_second():
    clock = FakeClock()
    presence = hl.Presence(debounce_s=0, clock=clock)
    presence.set_state("nobody", {"status": "away"})
    presence.join("ada", 1)
    updates = 0
    for step in range(100):                     # a second
        clock.now_ns += 10_000_000
        presence.set_state("ada", {"n": step})
        presence.join(f"user {step}", 100 + step)
        assert presence.state("ada") == {"n": step} and presence.online() == step + 2
        updates += presence.take_changes() is not None
    assert 9 <= updates <= 11
    clock.now_ns += 10**9
    last = presence.take_changes()
    assert last["states"] == {"ada": {"n": 99}} and presence.take_changes() is None
    presence.set_state("ada", None)
    clock.now_ns += 10**9
    assert presence.take_changes()["states"] == {"ada": None} and presence.snapshot()["users"][0] == "ada"
    presence.join("eve", 7)
    presence.leave(7)
    clock.now_ns += 10**9
    assert presence.take_changes() is None      # came and went
    assert presence.state("nobody") is None


def test_who_promised_heartbeats_and_is_silent_is_swept():
    clock = FakeClock()
    presence = hl.Presence(debounce_s=0, clock=clock)
    presence.join("phone", 1, heartbeat_s=60, multiplier=5)
    presence.join("desk", 2, heartbeat_s=30)
    presence.join("quiet", 3)
    for _ in range(3):
        clock.now_ns += 80 * 10**9
        assert presence.heartbeat(2)
        presence.sweep()
    assert presence.users() == ["desk", "phone", "quiet"]
    clock.now_ns += 61 * 10**9
    presence.sweep()
    assert presence.users() == ["desk", "quiet"] and presence.swept == 1 and not presence.heartbeat(1)
    clock.now_ns += 10**12
    presence.sweep()
    assert presence.users() == ["quiet"]


def test_html_escapes_what_is_put_in_and_only_that():
    evil = "<script>'\"&"
    assert hl.html('<p title="{x}">{x}</p>', x=evil) == '<p title="&lt;script&gt;&#x27;&quot;&amp;">&lt;script&gt;&#x27;&quot;&amp;</p>'
    assert hl.html("{a}{b}", a=hl.Safe("<b>"), b=hl.html("<i>{x}</i>", x="<")) == "<b><i>&lt;</i>"
    assert hl.html("{x}", x=[hl.Safe("<br>"), "<", 1]) == "<br>&lt;1" == hl.html("{x}", x=(each for each in (hl.Safe("<br>"), "<", 1)))
    assert hl.html("{n:.2f} {n:>8} {s:>5}|{s!r} {d[k]} {o.real}", n=1.5, s="<", d={"k": "<"}, o=3) == "1.50      1.5     &lt;|&#x27;&lt;&#x27; &lt; 3"
    assert hl.html("{{}} {x}", x=None) == "{} None"
    assert hl.escape("<") == "&lt;" and hl.escape(hl.escape("<")) == "&lt;" and isinstance(hl.escape(5), hl.Safe)
    class Foreign:
        def __html__(self):
            return "<hr>"
    assert hl.html("{x}{y}", x=Foreign(), y=hl.Fragment(b"<br>")) == "<hr><br>"
    assert hl.html("{x!s} {x:>4}", x=Foreign()) == "<hr> <hr>"
    assert hl.html("{template}{n}", template="a", n=collections.namedtuple("P", "x y")(1, 2)) == "aP(x=1, y=2)"
    class Any:
        def __getattr__(self, name):
            return lambda: "<script>"
        def __str__(self):
            return "<"
    assert hl.html("{x}", x=Any()) == "&lt;" and hl.html("{x!s:.2}|{x!r:.2}", x="<<<") == "&lt;&lt;|&#x27;&lt;"
    assert hl.html("{x}", x={"a": hl.Safe("<br>")}.values()) == "<br>"
    for template in ("{missing}", "{", "{0}"):
        with pytest.raises(hl.UsageError, match="template"):
            hl.html(template, x={})
    class Card:                                 # an attribute of any name is the value's own, and escaped
        _value = value = "<b>"
        def __str__(self):
            raise KeyError("of the value, not of the template")
    assert hl.html("{c._value}{c.value}{c.__class__.__name__}{d._value}", c=Card(), d=Card) == "&lt;b&gt;&lt;b&gt;Card&lt;b&gt;"
    assert "<" not in hl.html("{x.__str__}{x.__class__}{x.__doc__}", x="<script>")
    with pytest.raises(KeyError, match="of the value"):
        hl.html("{c}", c=Card())
    with pytest.raises(hl.UsageError, match="db is down"):
        hl.html("{c}", c=type("Down", (), {"__str__": lambda self: (_ for _ in ()).throw(ValueError("db is down"))})())


def test_the_fragment_cache_keeps_the_recent_for_their_time():
    clock, rendered, times = FakeClock(), [], []
    cache = hl.FragmentCache(max_entries=2, ttl_s=10, clock=clock, on_render=times.append)
    def get(key, ttl_s=None):
        return cache.get(key, lambda: rendered.append(key) or f"<b>{key}</b>", ttl_s)
    assert get("a") == b"<b>a</b>" and get("a") is get("a") and rendered == ["a"]
    get("b"), get("a"), get("c"), get("a"), get("b")            # c sends b away, b sends c away
    assert rendered == ["a", "b", "c", "b"] and len(cache) == 2
    assert (cache.hits, cache.misses, cache.evictions) == (4, 4, 2) and len(times) == 4
    clock.now_ns += 10 * 10**9
    get("a")
    assert rendered[-1] == "a" and len(rendered) == 5
    get("d", 0)
    clock.now_ns += 10**15
    get("d", 0)
    assert rendered[-1] == "d" and len(rendered) == 6           # for ever
    cache.discard("d")
    cache.discard("never there")
    get("d")
    assert len(rendered) == 7                                   # unless it is forgotten
    with pytest.raises(hl.UsageError, match="asks for itself"):
        cache.get("loop", lambda: cache.get("loop", str))
    for bad in (None, 5, {}):
        with pytest.raises(hl.UsageError, match="str or bytes"):
            cache.get("bad", lambda: bad)
    with pytest.raises(ZeroDivisionError):
        cache.get("boom", lambda: 1 / 0)
    assert cache.get("boom", lambda: hl.html("{x}", x="<")) == b"&lt;"      # what failed is not kept


# =============================================================================
# 9  STREAM
# =============================================================================

PUMP = {"mode": "timeseries", "model": {"name": "pump", "version": "v1"},
        "output_topic": "umh.v1.corpA.plant-A.aawd",
        "sources": {"press": "umh.v1.corpA.plant-A.aawd._raw.press",
                    "tF": "umh.v1.corpA.plant-A.aawd._raw.tempF",
                    "r": "umh.v1.corpA.plant-A.aawd._raw.run"},
        "mapping": {"pressure": "press+4.00001", "temperature": "(tF-69)*5/9",
                    "motor": {"rpm": "press/4", "both": "press + tF"}, "serialNumber": "'SN-P42-008'"}}


def plant(mapping, sources=None, **more):
    """A stream of one variable x, or of these sources."""
    return hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": "out",
                      "sources": sources or {"x": "in.x"}, "mapping": mapping, **more})


def sample(value, at_ms=1):
    return json.dumps({"value": value, "timestamp_ms": at_ms}).encode()


def values(outputs):
    """What came of a message: path: value."""
    return {each.topic.partition("_m_v1.")[2]: json.loads(each.payload)["value"] for each in outputs}


def test_a_message_gives_statics_and_what_depends_on_it():
    stream, topic = hl.Stream(PUMP), PUMP["sources"]["press"]
    told = {"umh_topic": topic, "source": "opcua"}
    base = "umh.v1.corpA.plant-A.aawd._pump_v1."
    assert stream.process(topic, b' {"value": 8.0, "timestamp_ms": 1609459200000, "more": 1}', told) == [
        (base + path, f'{{"value":{value},"timestamp_ms":1609459200000}}'.encode(),
         {"umh_topic": base + path, "source": "opcua"})
        for path, value in (("serialNumber", '"SN-P42-008"'), ("pressure", "12.00001"), ("motor.rpm", "2.0"))]
    assert told == {"umh_topic": topic, "source": "opcua"}
    # what needs two variables comes once both are there, whichever changes; statics come always
    paths = [each.topic.removeprefix(base) for each in stream.process(None, sample(87), {
        "umh_topic": PUMP["sources"]["tF"]})]
    assert paths == ["serialNumber", "temperature", "motor.both"]
    assert [each.topic.removeprefix(base) for each in stream.process(PUMP["sources"]["r"], sample(True))] == [
        "serialNumber"]
    assert stream.state() == {"press": 8.0, "tF": 87, "r": True}
    counts = stream.stats()
    assert counts["processed"] == 3 and counts["outputs"] == 7 == stream.outputs
    assert counts["mappings"]["motor.both"] == {"static": False, "outputs": 1, "failed": 0, "waited": 1}
    assert [path for path, each in counts["mappings"].items() if each["static"]] == ["serialNumber"]


@pytest.mark.parametrize("change, text", [
    ({"mode": ""}, "mode is required"),
    ({"mode": "batch"}, r"unsupported mode: batch \(only 'timeseries' is supported\)"),
    ({"output_topic": ""}, "output_topic is required"),
    ({"model": {"version": "v1"}}, "model name is required"),
    ({"model": {"name": "pump"}}, "model version is required"),
    ({"model": 3}, "model name is required"),
    ({"sources": {}}, "at least one source mapping is required"),
    ({"sources": ["a"]}, "sources are variable = topic"),
    ({"mapping": "x"}, "mapping is path = expression"),
    ({"mappings": {}}, "a stream has no 'mappings'; did you mean 'mapping'?"),
    ({"sources": {"a b": "t"}}, "sources.a b: a variable is a name"),
    ({"sources": {"_a": "t"}}, "sources._a"), ({"sources": {"if": "t"}}, "sources.if"),
    ({"sources": {"ﬁ": "t"}}, "sources"),
    ({"sources": {"a": "t..u"}}, "sources.a: topic"), ({"sources": {"a": 3}}, "sources.a: a topic is a text"),
    ({"sources": {"a": "p.*.t", "b": "q.*.*.t"}}, "have the same names"),
    ({"sources": {"a": "p.{s}.{s}"}}, "two wildcards of one name"),
    ({"mapping": {"a": {"b": "1"}, "a.b": "2"}}, "mapping.a.b is given twice"),
    ({"mapping": {"": "1"}}, "is no name"), ({"mapping": {"a b": "1"}}, "mapping.a b"),
    ({"output_topic": "a.{s"}, "topic"), ({"state_every_s": "often"}, "state_every_s"),
    ({"state_every_s": 0}, "state_every_s"), ({"state_every_s": 10**400}, "state_every_s"),
    *[({"model": {"name": name, "version": "v"}}, "without dots") for name in ("a b", "a.b", "{x}", "x}")],
    ({"output_topic": ["a"]}, "output_topic is a text"), ({"output_topic": 5}, "output_topic"), ({"state_file": "a\0b"}, "state_file"),
    ({"state_file": "/nowhere/at/all"}, "a folder that there is"), ({"state_file": ["a"]}, "state_file"), ({"test": 3}, "test"), ({"test": [{"state_file": "x"}]}, "above the first"),
    ({"test": [{"inputs": [], "messages": []}]}, "input twice"), ({"test": [{"input": {"valu": 1}}]}, "a message with 'valu'"), ({"mapping": {"a": max}}, "can't be read"),
    ({"mapping": {"a": len}}, "function takes 'obj'"), ({"mapping": {"a": b"x"}}, "is an expression, not a bytes"), ({"mapping": {"a": None}}, "is an expression, not null"),
    ({"output_topic": "o.{sit}", "sources": {"x": "p.{site}"}, "mapping": {"a": "x"}}, "did you mean 'site'"),
])
def test_a_wrong_stream_is_refused_and_named(change, text):
    with pytest.raises(hl.ConfigError, match=text.replace("?", r"\?")):
        hl.Stream(PUMP | change)


@pytest.mark.parametrize("mapping, text", [
    ({"a": ""}, "mapping.a: an expression is missing"), ({"a": "x +"}, "mapping.a: x .: invalid syntax"),
    ({"a": "y = 1"}, "mapping.a"), ({"a": "1; 2"}, "mapping.a"), ({"a": "lambda: 1"}, "functions"),
    ({"a": {"b": "presss + 1"}}, "mapping.a.b: .*no variable 'presss'; did you mean 'press'"),
    ({"a": "zzz"}, "there are press, tF, r, timestamp_ms; a text has quotes of its own"), ({"a": "round"}, "write round"), ({"a": "SN-P42-008"}, "quotes of its own"),
    ({"a": "{press}"}, "without braces"), ({"a": "true"}, "written True"),
])
def test_a_wrong_expression_is_refused_where_it_stands(mapping, text):
    with pytest.raises(hl.ExpressionError, match=text):
        hl.Stream(PUMP | {"mapping": mapping})


def test_a_leaf_that_is_no_text_is_turned_into_one_and_functions_take_variables_by_name():
    stream = plant({"n": 42, "yes": True, "half": 0.5, "list": [1, 2], "fn": lambda x, y=1: x + y,
                    "none": lambda x: None, "always": lambda: 7})
    assert values(stream.process("in.x", sample(3))) == {
        "n": 42, "yes": True, "half": 0.5, "list": [1, 2], "fn": 4, "always": 7}
    assert stream.stats()["mappings"]["none"]["waited"] == 1 and not stream.errored
    with pytest.raises(hl.ConfigError, match="the function takes 'z'"):
        plant({"fn": lambda z: z})


def test_a_stream_is_read_from_toml_also_as_a_table_of_the_settings(tmp_path):
    text = ('output_topic = "out"\nmodel = {name = "m", version = "v1"}\nsources = {x = "in.x"}\n'
            '[mapping.motor]\nrpm = "x * 2"\n')
    plain, table = tmp_path / "a.toml", tmp_path / "b.toml"
    plain.write_text(text)
    table.write_text("[server]\nport = 0\n[stream]\n" + text.replace("[mapping", "[stream.mapping"))
    for path in (plain, str(table)):
        assert values(hl.Stream(path).process("in.x", sample(4))) == {"motor.rpm": 8}
    assert hl.Config.load(table, {}).streams == (str(table),)
    assert hl.Config.load(table, {}).port == 0
    plain.write_text("sources = [")
    with pytest.raises(hl.ConfigError, match="a.toml"):
        hl.Stream(plain)
    with pytest.raises(hl.ConfigError, match="No such file"):
        hl.Stream(tmp_path / "none.toml")


@pytest.mark.parametrize("payload, reason", [
    (b"nonsense", "not_json"), (b"", "not_json"), (b'{"value":1,"timestamp_ms":1} x', "not_json"),
    (b'{"value":NaN,"timestamp_ms":1}', "not_json"), (b"\xff\xfe", "not_json"), (b"[1]", "not_object"), (b"1", "not_object"),
    (b'{"timestamp_ms":1}', "no_value"), (b'{"value":null,"timestamp_ms":1}', "null_value"),
    (b'{"value":1}', "bad_timestamp"), (b'{"value":1,"timestamp_ms":"1"}', "bad_timestamp"),
    (b'{"value":1,"timestamp_ms":1.5}', "bad_timestamp"), (b'{"value":1,"timestamp_ms":0}', "bad_timestamp"),
    (b'{"value":1,"timestamp_ms":true}', "bad_timestamp"), (b'{"value":1,"timestamp_ms":9223372036854775808}', "bad_timestamp"),
    (b'{"value":1e400,"timestamp_ms":1}', "not_finite"), (b'{"value":[1,{"a":-1e999}],"timestamp_ms":1}', "not_finite"),
    (b'{"value":' + b"9" * 400 + b',"timestamp_ms":1}', "too_big"), (b'{"value":' + b"9" * 5000 + b',"timestamp_ms":1}', "not_json"),
    (b'{"value":' + b"[" * 70 + b"]" * 70 + b',"timestamp_ms":1}', "too_deep"),
    (b'{"value":' + json.dumps([0] * 10_001).encode() + b',"timestamp_ms":1}', "too_big"),
    (5, "bad_payload"), (None, "bad_payload"),
])
def test_what_is_no_message_is_counted_and_the_batch_goes_on(payload, reason, caplog):
    stream = plant({"double": "x * 2"})
    for turn in range(3):
        out = stream.process_batch([("in.x", sample(1)), ("in.x", payload, {}), ("in.x", sample(2), {"a": "b"})])
        assert [json.loads(each.payload)["value"] for each in out] == [2, 4]
    assert stream.errored == {reason: 3} and not stream.dropped and stream.processed == 9
    assert len(caplog.records) == 1 and "can't be mapped" in caplog.text        # once a second


def test_what_is_too_large_is_not_even_parsed():
    stream = plant({"double": "x * 2"})
    huge = b'{"value":"' + b"x" * (100 << 20) + b'","timestamp_ms":1}'
    began = time.process_time()
    assert stream.process("in.x", huge) == [] and stream.errored == {"too_big": 1}
    assert time.process_time() - began < 0.05 and stream.state() == {}


def test_what_has_no_topic_or_an_unknown_one_is_dropped_and_metadata_may_be_missing():
    stream = plant({"double": "x * 2"})
    assert stream.process(None, sample(1)) == stream.process("", sample(1)) == stream.process(None, sample(1), {}) == []
    assert stream.process("in.y", sample(1)) == [] and stream.process("in.y", b"x") == []
    assert stream.process("in.x", sample(1), None)[0].metadata == {"umh_topic": "out._m_v1.double"}
    assert stream.process("in.x", sample(1), [1]) == stream.process([], sample(1), {}) == []
    assert stream.dropped == {"no_topic": 4, "unknown_topic": 1} and stream.errored == {"not_json": 1, "bad_metadata": 1}
    for payload in (sample(3).decode(), bytearray(sample(3)), memoryview(sample(3))):
        assert values(stream.process("in.x", payload)) == {"double": 6}
    assert [each.payload[9:10] for each in stream.process_batch([("in.x", sample(1)), ("in.x",), None, 5, "abc", ["in.x", sample(4)]])] == [b"2", b"8"]
    assert stream.errored["bad_message"] == 4


def test_one_mapping_that_fails_is_counted_by_its_reason_and_the_others_go_on(caplog):
    stream = plant({"zero": "x / 0", "key": "x['k']", "type": "x + 'a'", "inf": "x * 1e308 * 10", "none": "{'a': 1}.get('b')",
                    "fine": "x", "static": "1 / 0", "nan": "x * 1e308 * 10 - x * 1e308 * 10", "deep": "[[x] for a in [1]]",
                    "root": "sqrt(0 - x)", "boom": lambda x: {}["boom"], "list": "[x, x * 1e308 * 10]", "complex": "(0 - x) ** 0.5"})
    for _ in range(2):
        assert values(stream.process("in.x", sample(2.0))) == {"fine": 2.0, "deep": [[2.0]]}
    assert stream.errored == {"zero_division": 4, "type": 4, "not_finite": 4, "no_result": 2, "lookup": 2, "value": 6}
    failed = {path for path, each in stream.stats()["mappings"].items() if each["failed"] == 2}
    assert failed == {"zero", "key", "type", "inf", "none", "static", "nan", "root", "boom", "list", "complex"}
    assert len(caplog.records) == len(failed) and "KeyError: 'boom'" in caplog.text     # one each, with a traceback for code


# -- expressions --

@pytest.mark.parametrize("text, result", [
    ("temp * 9/5 + 32", 70.0), ("(temp - 1) // 2", 10.0), ("temp % 6", 3.111111111111111), ("-n ** 2", -9), ("n ** -1", 1 / 3),
    ("~n & 7 | 8 ^ 1", 13), ("1 << n >> 1", 4), ("n / 2 if temp > 20 else 'cold'", 1.5), ("0 < n <= 3 != 4", True), ("n and temp or 0", 21.11111111111111),
    ("not n", False), ("o['a'][1]", 2), ("o.get('z', 9) + o.get('n')", 14), ("o.get('z') is None", True), ("s is not None and 'b' in s", True),
    ("l[-1] + l[0]", 5), ("l[1:]", [2, 4]), ("l[::-1]", [4, 2, 1]), ("s[1:3]", "bc"), ("f'{temp:.1f} °C {s}{n:03d}'", "21.1 °C abcd003"), ("f'{l} {o.get(\"n\")!s}'", "[1, 2, 4] 5"),
    ("[x * 2 for x in l if x > 1]", [4, 8]), ("{k: v for k, v in o.items() if k == 'n'}", {"n": 5}), ("sum(x * y for x in l for y in l)", 49), ("{'a': [n, True, None]}", {"a": [3, True, None]}),
    ("min(n, 2) + max(l) + min([], default=1)", 7), ("abs(-n) + round(temp, 1) + round(2.5)", 26.1), ("len(l) + len(s) + len(o)", 9), ("int('12') + int('ff', 16) + float('1.5')", 268.5), ("str(n) + str(1.0)", "31.0"),
    ("sorted(l, reverse=True)", [4, 2, 1]), ("any(x > 3 for x in l) and all(l)", True), ("bool('')", False), ("sqrt(n + 1) + math.floor(temp)", 23.0), ("hypot(3, 4) + atan2(0, 1) + log(8, 2)", 8.0), ("round(pi + math.e, 3)", 5.86),
    ("s.upper().replace('A', 'b').strip('D')", "bBC"), ("'-'.join(s.split('b'))", "a-cd"), ("s.startswith('ab') and s.endswith(('d', 'e'))", True), ("s.find('c') + s.count('a')", 3), ("'7'.zfill(3) + 'x'.center(5, '*')", "007**x**"),
    ("o.keys() + ['z']", ["a", "n", "z"]), ("(1, n)", (1, 3)), ("s * 2 + '!'", "abcdabcd!"), ("[0] * n", [0, 0, 0]), ("len", 8), ("prüf * 2", 4), ("'a' 'b'", "ab"), ("'it''s $5'", "its $5"),
])
def test_expressions_are_pythons(text, result):
    given = {"temp": 21.11111111111111, "n": 3, "s": "abcd", "l": [1, 2, 4], "o": {"a": [1, 2], "n": 5}, "len": 8, "prüf": 2}
    expression = hl.Expression(text)
    got = expression(**given, unused=object())
    assert got == (pytest.approx(result) if isinstance(result, float) else result) and type(got) is type(result)


ESCAPES = """().__class__|''.__class__.__mro__[1].__subclasses__()|x.__class__|x.__globals__|x._private|x.real|x.f_back|x.gi_frame|(1).bit_length
__import__('os')|__builtins__|__name__|__debug__|open('/etc/passwd')|eval('1')|exec('1')|compile('1','','eval')|globals()|locals()|vars()|dir()|getattr(x, 'a')|setattr(x, 'a', 1)
type(x)|object()|super()|print(1)|input()|breakpoint()|range(10**9)|list(x)|dict(x)|set(x)|map(x, x)|filter(x, x)|iter(x)|memoryview(x)|bytes(10**9)|classmethod(x)|id(x)|hash(x)|repr(x)|format(x, 'd')
lambda: 1|(lambda: 1)()|x := 1|(x := 1)|yield x|await x|(yield)|import os|x = 1|x; y|def f(): pass|del x|assert x|*x|[*x]|{**x}|f(*x)|max(*x)|max(**x)|{1, 2}|{a for a in x}|x @ x|...|b'bytes'|1j
'{0.__class__}'.format(x)|'{}'.format(x)|x.format_map(x)|'%s' % x|'%999999999d' % 1|'%*d' % (10**9, 1)|f'{x!r}'|f'{x:{x}}'|f'{x:>9999999}'|f'{x:.999999999f}'|f'{x.__class__}'|f'{x:{x.__class__}}'|str.format('{}', 1)|str.__class__|math.__dict__|math.factorial(9**9)|math.prod(x)|math.comb(10**9, 5)|math.__loader__.load_module('os')
10**10**10|9**9**9**9|2**99999999|(2**16000)**2|1 << 10**9|1 << (1 << 70)|'a' * 10**10|'a' * (1 << 62)|[0] * 10**9|10**9 * [0]|(0,) * 10**9|'a'.center(10**9)|'a'.ljust(10**12)|'1'.zfill(10**9)|'a'.expandtabs(10**9)|round(1, -10**9)|int('9' * 99999)|'aa'.replace('a', 'b' * 10**8)|'x'.join(['y' * 10**8])
[a for a in x async]|[a async for a in x]|[a.b for a in x]|[x[0] for x[0] in x]|[y for y.z in x]|x[()]|x.get|now|count(1)|prev()|prev(1)|ewma(x)|ewma(x, 0)|ewma(x, 2)|ewma(x, x)|window(x, 60)|window(x, -1).mean|window(x, 60).median|window(x, 60).__class__|window(x, 60).mean()|[prev(a) for a in x]|x.upper.__self__|x.encode('utf-8')|x.translate(x)|x.maketrans(x)
1 is x|x is 1|x is y|$x|x!|x?y:z|@x|x->y|x if y|'unterminated|\x00|#|\\|(|""".replace("\n", "|").split("|")


def test_nothing_escapes_from_an_expression():
    """Each either can't be made, or has no result: never another one, and never slowly."""
    assert len(ESCAPES) > 120 and len(set(ESCAPES)) >= len(ESCAPES) - 5
    began = time.process_time()
    for text in ESCAPES:
        with pytest.raises(hl.ExpressionError):
            hl.Expression(text)(x="a", y=2, z=3)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text, given", [
    ("[1 for a in l for b in l for c in l]", {"l": [0] * 1000}), ("sum(sum(a for a in l) for b in l)", {"l": [1] * 9000}),
    ("[l for a in l]", {"l": [0] * 5000}), ("len([s + s for a in s for b in s])", {"s": "x" * 9000}), ("s * n", {"s": "x" * 100, "n": 10**9}),
    ("n * l", {"l": [1], "n": 10**9}), ("s % n", {"s": "%99999999d", "n": 1}), ("s.replace('', s)", {"s": "x" * 100_000}), ("s.join(l)", {"s": "x" * 100_000, "l": ["a"] * 1000}),
    ("[1 for a in l if l == m]", {"l": [0] * 9000, "m": [0] * 9000}), ("[1 for a in l if a in m]", {"l": [1] * 9000, "m": [0] * 9000}), ("[sorted(l) for a in l]", {"l": [*range(5000)]}),
    ("n * n * n * n * n * n * n * n * n * n * n * n * n * n * n * n * n", {"n": 1 << 1000}), ("(n - 0) ** 17", {"n": 1 << 1000}), ("[a * a for a in [b * b for b in [c * c for c in [d * d for d in [n * n]]]]][0] * n", {"n": 1 << 1000}),
    ("n << n", {"n": 1 << 20}), ("x ** y", {"x": 10.0, "y": 400}), ("x ** y", {"x": 10, "y": 10**8}), ("s.center(n)", {"s": "x", "n": 10**9}), ("s.strip(s)", {"s": "ab" * 50_000}),
    ("round(x, n)", {"x": 5, "n": -10**9}), ("int(s, 16)", {"s": "f" * 1_000_000}), ("int(s)", {"s": "9" * 100_000}), ("f'{l}' * 999", {"l": [[0] * 5000, [1] * 4000]}), ("str([l for a in l])", {"l": [0] * 400}),
    ("[[[l for a in l] for b in l] for c in l]", {"l": [0] * 60}), ("{s + str(a): s for a in l}", {"s": "x" * 100_000, "l": [*range(9000)]}), ("x.upper()", {"x": 5}), ("x.get('a')", {"x": [1]}), ("x.keys()", {"x": "a"}), ("x['a']", {"x": 5}),
    ("x[0]", {"x": 1.5}), ("[a for a in x]", {"x": 5}), ("x & y", {"x": {"a": 1}, "y": {"b": 2}}), ("x | y", {"x": {"a": 1}, "y": {"b": 2}}), ("x < y", {"x": 1, "y": "a"}), ("len(x)", {"x": 1}), ("sum(x)", {"x": [[1]]}),
    ("x", {"x": object()}), ("x", {"x": decimal.Decimal(1)}), ("x", {"x": b"b"}), ("x", {"x": {1: 2}}), ("x", {"x": math.nan}), ("x", {"x": [math.inf]}), ("x", {"x": 1 << 2000}), ("x * 10", {"x": 1.7e308}), ("x", {}),
])
def test_what_grows_or_confuses_types_ends_in_an_error_and_soon(text, given):
    began = time.process_time()
    with pytest.raises(hl.ExpressionError) as raised:
        hl.Expression(text)(**given)
    assert time.process_time() - began < 1.5 and len(str(raised.value)) < 400


def test_a_value_that_holds_itself_is_refused():
    knot = []
    knot.append(knot)
    with pytest.raises(hl.ExpressionError, match="deeper"):
        hl.Expression("x")(x=knot)


@pytest.mark.parametrize("javascript, python", [
    ("a && b", "a and b"), ("a || !b", "a or (not b)"), ("a === b", "a == b"), ("a !== b;", "a != b"), ("a > 5 ? 'hot' : 'cold'", "'hot' if a > 5 else 'cold'"), ("`${a} C`", 'f"{a} C"'),
    ('"${a} C"', 'f"{a} C"'), ("Math.max(a, b)", "max(a, b)"), ("Math.sqrt(a)", "sqrt(a)"), ("Math.pow(a, 2)", "((a) ** ( 2))"), ('a === "Stop!"', 'a == "Stop!"'), ('a.b === "x.y && true"', "a['b'] == \"x.y && true\""), ("a[0].length", "len(a[0])"), ("a.startsWith('x')", "a.startswith('x')"), ("Math.PI * a", "pi * a"), ("a.length > 3", "len(a) > 3"), ("a.toFixed(2)", 'f"{a:.2f}"'),
    ("true", "True"), ("a == null", "a == None"), ("a.b.c", "a['b']['c']"), ("parseInt(a)", "int(a)"), ("parseFloat(a) * 2", "float(a) * 2"), ("a.toUpperCase()", "a.upper()"), ("Date.now()", "(now() * 1000)"), ("a ?? 0", "0 if a is None else a"),
    ("a.includes('x')", "('x' in a)"), ("a.trim()", "a.strip()"), ("String(a)", "str(a)"), ("a && b ? a : b", "a if a and b else b"),
])
def test_javascript_is_answered_with_python(javascript, python):
    with pytest.raises(hl.ExpressionError, match=re.escape(f"in Python: {python}") + "$"):
        hl.Expression(javascript)
    hl.Expression(python)


@pytest.mark.filterwarnings("ignore")
def test_errors_of_expressions_say_what_to_change():
    for text, hint in (("squrt(x)", "did you mean 'sqrt'"), ("x.uper()", "did you mean 'upper'"), ("x.value", r"x\['value'\]"), ("window(x, 60)", "window\\(x, 60\\).mean"), ("round()", "takes 1 to 2 arguments, not 0"),
                       ("sorted(x, key=y)", "has no argument key"), ("x is 5", "write =="), ("math.sqr(x)", "math.sqr"), ("{1, 2}", r"\[a, b\]"), ("5[0]", "has no"), ("x" * 5000, "4096 are allowed"), ("prev(1)", "follows a variable"),
                       ("+".join("x" * 80), "nested deeper than 64"), ("(" * 90 + "x" + ")" * 90 + "[" * 200, ""), (3, "an expression is a text")):
        with pytest.raises(hl.ExpressionError, match=hint):
            hl.Expression(text)


def test_long_sums_and_deep_nesting_compile_up_to_the_limit():
    assert hl.Expression("+".join(["x"] * 60))(x=1) == 60
    assert hl.Expression("(" * 80 + "x" + ")" * 80)(x=1) == 1
    assert hl.Expression("*".join(["x"] * 60))(x=1.0) == 1.0
    with pytest.raises(hl.ExpressionError, match="loops are nested deeper than 8"):      # CPython 3.12 and 3.13 crash at 20
        hl.Expression("[" * 9 + "x" + " for x in y]" * 9)
    eight = hl.Expression("[" * 8 + "x" + " for x in y]" * 8)
    assert str(eight(y=[1])).count("1") == 1 and len(plant({"a": eight.text.replace("y", "x")}).rules) == 1
    assert hl.Expression("[" * 60 + "x" + "]" * 60)(x=1) == eval("[" * 60 + "1" + "]" * 60)
    deep = "x"
    for _ in range(30):
        deep = f"max(({deep}) * x, x)"
    assert hl.Expression(deep)(x=1) == 1


def random_expression(rng, depth, variables):
    """The text of a random expression that is allowed and bounded."""
    if depth <= 0 or rng.random() < 0.1:
        return rng.choice([*variables, repr(rng.choice([0, 1, 2, 7, 0.5, 3.25, True, "ab", "%d"]))])

    def part():
        return random_expression(rng, depth - 1, variables)
    name = f"i{depth}"
    inner = random_expression(rng, depth - 1, [*variables, name])
    return rng.choice([
        lambda: f"({part()} {rng.choice('+ - * / // % ** << >> & | ^ == != < <= > >= in and or'.split())} {part()})",
        lambda: f"({part()} if {part()} else {part()})", lambda: f"({rng.choice(['-', '+', '~', 'not '])}{part()})",
        lambda: f"[{part()}, {part()}]", lambda: f"{{'k': {part()}, 'j': {part()}}}", lambda: f"{part()}[{part()}]", lambda: f"{part()}[{part()}:{part()}]",
        lambda: f"{rng.choice('abs bool len float int max min round sorted str sum any all sqrt floor'.split())}({part()})", lambda: f"max({part()}, {part()})",
        lambda: f"f'{{{rng.choice(variables)}:{rng.choice(['', '.2f', '>5', '05d'])}}}'", lambda: f"[{inner} for {name} in {part()}]", lambda: f"sum({inner} for {name} in {part()} if {inner})",
        lambda: f"{part()}.{rng.choice(['upper()', 'split()', 'strip(chr)'.replace('chr', repr('a')), 'get(1)', 'replace(' + repr('a') + ', ' + repr('b') + ')'])}", lambda: f"{part()}.get({part()}, {part()})"])()


@pytest.mark.filterwarnings("ignore")
def test_random_programs_mean_what_they_mean_in_python_or_have_no_result(rng):
    """An oracle of its own: eval of the same text, with Python's own functions."""
    given = {"a": 3, "b": 2.5, "s": "abab", "l": [1, 2.5, 3], "o": {"k": 1, "1": [2]}, "t": True}
    names = {name: getattr(math, name) for name in ("sqrt", "floor")}
    agreed = 0
    for _ in range(int(4000 * SOAK)):
        text = random_expression(rng, rng.randrange(1, 5), [*given])
        try:
            ours = hl.Expression(text)(**given)
        except hl.ExpressionError as error:
            # ours refuses what could grow, formats by %, unites objects by |, and 2[b] where nobody comes by
            if getattr(error, "reason", "") == "limit" or {"%", "|"} & {*text} or "has no [" in str(error):
                continue
            with contextlib.suppress(ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
                                     SyntaxError):
                theirs = python_of(text, {**names, **given})
                assert isinstance(theirs, complex) or not math.isfinite(theirs), (text, theirs)
        else:
            theirs = python_of(text, {**names, **given})
            assert repr(ours) == repr(theirs) and type(ours) is type(theirs), text
            agreed += 1
    assert agreed > 300 * SOAK


def python_of(text, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)      # of 1[2]
        return eval(text, names)


@pytest.mark.filterwarnings("ignore")
def test_random_texts_are_expressions_or_errors_and_nothing_else(rng):
    pieces = ["a", "b", "1", "0.5", "'s'", "f'{a}'", "(", ")", "[", "]", "{", "}", ",", ":", ".", "+", "*", "**", "/", "%", "<<", "and", "not", "if", "else", "for", "in", "lambda", "is", "None",
              "prev(a)", "now()", "count()", "window(a, 5).max", "ewma(a, .5)", "len", "max", "math", ".get", ".upper()", "__class__", "._x", "${", "&&", "?", "=>", "`", "\n", "\t", "#", "\\", "é", "\ud800", "\x00", "9" * 50, "'a' * 99", ":="]
    for _ in range(int(6000 * SOAK)):
        text = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 12)))
        with contextlib.suppress(hl.ExpressionError):
            hl.Expression(text)(a=2, b="x")


# -- static or dynamic --

def test_what_depends_on_a_variable_in_any_place_is_dynamic():
    for text in ("f'{x} C'", "{'a': [x]}", "[a for a in [1] if x]", "{a: x for a in 'b'}", "'a' if x else 'b'", "[1, 2][x]", "'abc'[x:]", "'a'.join(x)", "x.get('a')", "max(1, x)", "not x", "1 < 2 < x",
                 "[x for x in [1]] + [x]", "prev(x)", "window(x, 5).last", "sorted([1], reverse=x)", "f'{1:>5}{x}'"):
        expression = hl.Expression(text)
        assert expression.names == {"x"} and not expression.is_static, text
    for text in ("'SN'", "1 + 2", "[a for a in [1, 2]]", "{'a': max(1, 2)}", "f'{1}'", "pi", "len('abc')"):
        expression = hl.Expression(text)
        assert expression.is_static and expression.names == frozenset()
    for text in ("now()", "count()", "now() - 5"):
        assert not hl.Expression(text).is_static and not hl.Expression(text).names


def test_constant_parts_are_folded_and_statics_computed_once():
    assert "0.5" in hl.Expression("x * sqrt(2 ** -2)").__source__ and "sqrt" not in hl.Expression("x * sqrt(2 ** -2)").__source__
    assert "call_len" not in hl.Expression("x + len('abc' * 3)").__source__ and hl.Expression("x + len('abc' * 3)")(x=1) == 10
    assert hl.Expression("1 / 0 if x else 2")(x=False) == 2           # what can't be folded is left alone
    assert hl.Expression("(0 - 2) ** 2 + -2 ** 2")() == 0
    stream = plant({"s": "sorted([3, 1, 2])", "t": "'a'", "n": "round(now(), 1)", "w": "now() * 0 + x"})
    code = [line for line in stream.__source__.splitlines() if "# " not in line]
    assert "call_sorted" not in "".join(code) and "".join(code).count("now()") == 2


def test_now_is_another_every_message_also_for_mappings_of_other_variables():
    times = iter(range(100, 200))
    stream = hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": "out", "sources": {"x": "in.x", "y": "in.y"},
                        "mapping": {"t": "now()", "late": "now() - x", "y": "y"}}, wall=lambda: next(times))
    assert values(stream.process("in.y", sample(1))) == {"t": 100, "y": 1}
    assert values(stream.process("in.x", sample(1))) == {"t": 101, "late": 101}
    assert values(stream.process("in.y", sample(1))) == {"t": 103, "late": 103, "y": 1}


# -- what is remembered --

def test_what_was_before_is_remembered_for_each_variable():
    stream = plant({"delta": "x - prev(x)", "mean": "ewma(x * 2, 0.5)", "n": "count()", "of_both": "prev(x) + y", "twice": "prev(ewma(x, 0.5))"}, {"x": "in.x", "y": "in.y"})
    got = [values(stream.process(*each)) for each in (("in.x", sample(10)), ("in.x", sample(20)), ("in.y", sample(1)), ("in.y", sample(2)), ("in.x", sample(40)))]
    assert got == [{"mean": 20, "n": 1}, {"delta": 10, "mean": 30.0, "n": 2, "twice": 10}, {"n": 3, "of_both": 11}, {"n": 4, "of_both": 12},
                   {"delta": 20, "mean": 55.0, "n": 5, "of_both": 22, "twice": 15.0}]
    expression = hl.Expression("x - prev(x) + count()")
    with pytest.raises(hl.ExpressionError, match="no value yet") as raised:
        expression(x=1)
    assert raised.value.reason == "waiting" and [expression(x=4), expression(x=4)] == [5, 3]
    # what is no number is that mapping's fault alone, and does not spoil what comes
    stream = plant({"mean": "ewma(x, 0.5)", "top": "window(x, 60).max", "x": "x"})
    assert values(stream.process("in.x", sample("a"))) == {"x": "a"} and stream.errored == {"type": 2}
    assert values(stream.process("in.x", sample(2))) == {"mean": 2, "top": 2, "x": 2}
    assert values(stream.process("in.x", sample(-1.7e308))) | {"mean": 0} == {"mean": 0, "top": 2, "x": -1.7e308}
    assert values(stream.process("in.x", sample(1.7e308)))["mean"] == 4.25e307
    expression = hl.Expression("[prev(x['k_5'], 'none'), count(), prev(x['k_5'], 'none')]")       # a text is no cell; one cell for what is said twice
    assert [expression(x={"k_5": each}) for each in (1, 2)] == [["none", 1, "none"], [1, 2, 1]] and len(expression._memory) == 2


def test_a_window_holds_the_last_seconds_by_the_messages_own_times(rng, monkeypatch):
    looks = {"mean": statistics.fmean, "min": min, "max": max, "sum": math.fsum, "count": len, "last": lambda some: some[-1]}
    stream = plant({name: f"window(x, 2.5).{name}" for name in looks})
    held, at, late = [], 10_000, 0
    for _ in range(int(400 * SOAK) + 50):
        at, value = max(at + rng.randrange(-800, 1200), 1), rng.randrange(100) / 4      # some come late
        late = late + 1 if held and at <= held[-1][0] - 2500 else 0
        held = [] if late == hl._MAX_LATE else held         # so many too late ones are right
        late = late if held else 0
        if not late:
            held = sorted([*held, (at, value)], key=lambda each: each[0])
        held = [each for each in held if each[0] > held[-1][0] - 2500]
        assert values(stream.process("in.x", sample(value, at))) == {
            name: pytest.approx(look([each for _, each in held])) for name, look in looks.items()}
    # a timestamp from the far future spoils no more than itself
    assert values(stream.process("in.x", sample(9.0, 1 << 61)))["count"] == 1
    for _ in range(hl._MAX_LATE):
        got = values(stream.process("in.x", sample(1.0, at)))
    assert got["mean"] == 1.0 and got["count"] == 1
    monkeypatch.setattr(hl, "_MAX_WINDOW", 100)
    for n in range(110):
        stream.process("in.x", sample(n, at))
    assert stream._memories[()][0].values == [*range(10, 110)]


# -- the generated path --

class PlainStream:
    """The twin of what is generated: interprets the config, message by message."""

    def __init__(self, sources, mapping):
        self.sources, self.state = sources, {}
        self.mapping = [(path, text, set(re.findall(r"\b[abc]\b", text))) for path, text in mapping.items()]

    def process(self, topic, value, at_ms, metadata):
        changed = {name for name, each in self.sources.items() if each == topic}
        self.state |= dict.fromkeys(changed, value)
        out = []
        for path, text, needs in sorted(self.mapping, key=lambda each: bool(each[2])):
            if not needs or needs & changed and needs <= {*self.state}:
                with contextlib.suppress(ArithmeticError, TypeError):
                    result = eval(text, dict(self.state))
                    if isinstance(result, float) and not math.isfinite(result):
                        continue
                    to = f"out._m_v1.{path}"
                    out.append((to, json.dumps({"value": result, "timestamp_ms": at_ms}, separators=(",", ":"),
                                               ensure_ascii=False).encode(), {**metadata, "umh_topic": to}))
        return out


def test_what_is_generated_does_what_the_plain_twin_does(rng):
    sources = {"a": "in.a", "b": "in.b", "c": "in.a"}       # two names for one topic
    mapping = {"sum": "a + b", "twice": "a * 2", "static": "'S'", "text": "f'{a}|{b}'", "part": "a / b", "both": "c - a",
               "list": "[a, b, 'ü']", "deep.er": "{'a': a, 'b': [b]}", "if": "a if b else 1", "pow": "b ** 2", "less": "a < b"}
    ours, theirs = plant(mapping, sources), PlainStream(sources, mapping)
    kinds = (lambda: rng.uniform(-1e3, 1e3), lambda: rng.randrange(-9, 9), lambda: rng.choice(["text", 'a "b"\n', "é"]), lambda: True,
             lambda: [1, {"k": None}], lambda: rng.choice([1e308, -0.0, 5e-324, 1 << 60]), lambda: {})
    for turn in range(int(3000 * SOAK)):
        topic, value, at_ms = rng.choice(["in.a", "in.b"]), rng.choice(kinds)(), rng.choice([turn + 1, -5, 1 << 62])
        told = rng.choice([{}, {"umh_topic": topic, "k": "v"}])
        payload = json.dumps({"value": value, "timestamp_ms": at_ms}, ensure_ascii=rng.random() < 0.5).encode()
        assert ours.process(topic, payload, told) == theirs.process(topic, value, at_ms, told)
        assert ours.state() == {name: theirs.state[name] for name in sources if name in theirs.state}


def test_a_batch_gives_what_its_messages_give_and_repeats_exactly(rng):
    messages = [(rng.choice([*PUMP["sources"].values(), "else"]), rng.choice([sample(rng.random() * 100, n + 1), b"bad"]), {"n": str(n)}) for n in range(500)]
    one, all_ = hl.Stream(PUMP), hl.Stream(PUMP)
    assert [each for message in messages for each in one.process(*message)] == all_.process_batch(messages)
    assert one.stats()["mappings"] == all_.stats()["mappings"] and all_.process_batch([]) == []
    assert one.errored == all_.errored and one.dropped == all_.dropped


def test_the_source_is_one_function_per_topic_and_shows_in_tracebacks():
    stream = hl.Stream(PUMP)
    assert stream.__source__.count("def source_") == 3 and "v_press / 4" in stream.__source__
    assert "motor.rpm" not in stream.__source__.partition("def source_1")[2]        # of tF and r nothing is run in vain

    def boom(press):
        raise RuntimeError("boom")
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr(hl._log, "warning", lambda text, *args, exc_info: told.append("".join(__import__("traceback").format_exception(exc_info))))
        hl.Stream(PUMP | {"mapping": {"a": boom}}).process(PUMP["sources"]["press"], sample(1))
    assert "result = function_0((v_press if" in told[0]


@pytest.mark.parametrize("value", [1, -1, 0, 1.0, 0.1, 1e300, 5e-324, -0.0, 1 << 53, (1 << 53) + 1, 1 << 900, True, False, "", "a\"b\\\n\u00e9\U0001f600\x7f", [], [1, [None, {}]], {"a": {"b": "c"}}])
def test_a_value_goes_through_unchanged(value):
    (out,) = plant({"same": "x"}).process("in.x", sample(value, -(1 << 62)))
    assert json.loads(out.payload) == {"value": value, "timestamp_ms": -(1 << 62)}
    assert out.payload == json.dumps(json.loads(out.payload), separators=(",", ":"), ensure_ascii=False).encode()


def test_half_a_surrogate_pair_is_no_value():
    stream = plant({"same": "x", "n": "len(x)"})
    for value in (b'"\\ud800"', b'["\\udfff"]', b'{"\\ud800":1}'):
        assert stream.process("in.x", b'{"value":%b,"timestamp_ms":1}' % value) == []
    assert stream.errored == {"bad_value": 3} and not stream.state()


def test_a_state_belongs_to_a_match_and_sources_without_wildcards_to_all():
    stream = hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": "out.{site}",
                        "sources": {"t": "plant.{site}.{line}.t", "limit": "limits.{line}.of.{site}", "k": "k"},
                        "mapping": {"hot": "t > limit", "scaled": "t * k", "k2": "k * 2", "n": "count()", "s": "'S'"}})

    def go(topic, value):
        return [(each.topic, json.loads(each.payload)["value"]) for each in stream.process(topic, sample(value))]
    assert go("plant.a.1.t", 5) == [("out.a._m_v1.s", "S"), ("out.a._m_v1.n", 1)]
    assert go("limits.1.of.b", 3) == [("out.b._m_v1.s", "S"), ("out.b._m_v1.n", 1)]     # another match
    assert go("limits.1.of.a", 3) == [("out.a._m_v1.s", "S"), ("out.a._m_v1.hot", True), ("out.a._m_v1.n", 2)]
    assert go("plant.c.2.t", 7) == [("out.c._m_v1.s", "S"), ("out.c._m_v1.n", 1)]
    # for every match that has t; and k2 for every site, as its topic says
    assert sorted(go("k", 10)) == [(f"out.{site}._m_v1.{path}", value) for site, path, value in (
        ("a", "k2", 20), ("a", "scaled", 50), ("b", "k2", 20), ("c", "k2", 20), ("c", "scaled", 70))]
    assert not stream.dropped and not stream.errored
    assert stream.state() == {"t": {"a.1": 5, "c.2": 7}, "limit": {"a.1": 3, "b.1": 3}, "k": 10}
    assert stream.process("plant.a.t", sample(1)) == [] and stream.dropped["unknown_topic"] == 1
    assert stream.stats()["matches"] == 3


def test_a_wildcard_takes_the_rest_and_exact_sources_come_first():
    stream = plant({"all": "all", "one": "one"}, {"all": "p.>", "one": "p.a.b"})
    assert values(stream.process("p.a.b", sample(1))) == {"one": 1}
    assert values(stream.process("p.a.c", sample(2))) == values(stream.process("p.x", sample(2))) == {"all": 2}
    assert stream.process("p", sample(1)) == [] and stream.state() == {"all": {"a.c": 2, "x": 2}, "one": 1}


def test_places_of_a_topic_are_filled_from_the_result_or_a_wildcard_and_checked():
    def alerts(pattern, to, value, topic, **more):
        stream = hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": to, "sources": {"x": pattern}, "mapping": {"p": "x"}})
        out = stream.process(topic, sample(value), more)
        return out[0].topic.removesuffix("._m_v1.p") if out else dict(stream.dropped)
    assert alerts("plant.*.temp", "alerts.{site}", 1, "plant.a.temp") == "alerts.a"
    assert alerts("plant.*.*.temp", "alerts.{one}.{two}", 1, "plant.a.b.temp") == "alerts.a.b"
    assert alerts("plant.*.temp", "alerts.{site}", {"site": "z"}, "plant.a.temp") == "alerts.z"
    assert alerts("plant.*.temp", "alerts.{site}.{id}", {"id": 7}, "plant.a.temp") == "alerts.a.7"
    assert alerts("plant.{here}.temp", "alerts/{here}/{id}", 1, "plant.a.temp", id="q") == "alerts/a/q"
    assert alerts("plant.temp", "alerts.{site}", 1, "plant.temp") == {"no_field": 1}
    for bad in ("a.b", "*", ">", "", "a b", "x" * 65, 1.5, None, [1], "\n"):
        assert alerts("plant.temp", "alerts.{site}", {"site": bad}, "plant.temp") in ({"bad_field": 1}, {}), bad
    assert alerts("plant.temp", "alerts/{site}/x", {"site": "a/b"}, "plant.temp") == {"bad_field": 1}


def test_caches_of_topics_are_bounded_and_counted():
    stream = hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": "o.{id}", "sources": {"x": "in.x"}, "mapping": {"p": "x"}})
    for n in range(hl._MAX_CACHED * 2):
        stream.process("in.x", sample({"id": n}))
        stream.process(f"else.{n}", sample(1))
    assert stream._find.cache_info().currsize == hl._MAX_CACHED == stream.rules[0].template.fill.cache_info().currsize
    counts = stream.stats()["cache"]
    assert counts["misses"] == 1 + 4 * hl._MAX_CACHED and counts["hits"] >= 2 * hl._MAX_CACHED - 1
    one = stream.process("in.x", sample({"id": 1}))[0].topic
    assert stream.process("in.x", sample({"id": "1"}))[0].topic == one and stream.process("in.x", sample({"id": True})) == []


def test_matches_are_bounded_and_what_is_too_many_is_dropped(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_MATCHES", 10)
    stream = plant({"p": "x"}, {"x": "in.*"})
    for n in range(50):
        stream.process(f"in.{n}", sample(n))
    assert stream.dropped["too_many_matches"] + stream.outputs == 50 and 10 <= stream.outputs <= 11
    assert values(stream.process("in.1", sample(5))) == {"p": 5}        # the others go on


def test_another_thread_sees_one_moment():
    stream = plant({"p": "a + b"}, {"a": "in.x", "b": "in.x", "w": "in.y"})
    torn, over = [], threading.Event()

    def look():
        while not over.is_set():
            state = stream.state()
            if state and state["a"] != state["b"]:
                torn.append(state)
    thread = threading.Thread(target=look)
    thread.start()
    for n in range(int(20_000 * SOAK)):
        stream.process("in.x", sample(n))
    over.set()
    thread.join()
    assert not torn and stream.state()["a"] == n
    state = plant({"p": "x"})
    state.process("in.x", sample([1]))
    state.state()["x"].append(2)
    assert state.state() == {"x": [1]}                  # it is a copy


def test_nothing_is_retained_and_little_is_allocated():
    stream, topic, payload, told = hl.Stream(PUMP), PUMP["sources"]["press"], sample(23.5, 1609459200000), {"umh_topic": "x"}
    for _ in range(70):                 # until enough times are held
        stream.process_batch([(topic, payload, told)] * 1000)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(int(50 * SOAK) + 10):
        stream.process_batch([(topic, payload, told)] * 1000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 50
    tracemalloc.start()
    try:
        kept = [stream.process(topic, payload, told) for _ in range(200)]
        size, _ = tracemalloc.get_traced_memory()
        count = sum(each.count for each in tracemalloc.take_snapshot().statistics("lineno"))
    finally:
        tracemalloc.stop()
    assert len(kept) == 200 and size / 200 < 10_000 and count / 200 < 20       # what a message makes and leaves: its outputs


def test_nothing_is_retained_of_what_fails():
    stream = plant({"s": "1 / 0", "d": "x / 0", "c": "[prev(x['a'], 0), prev(1 / x, 0)]", "fn": lambda x: {}["no"]})
    messages = [("in.x", each, {}) for each in (sample(0), sample("a"), b"junk", b'{"value":null,"timestamp_ms":1}', sample([1])) for _ in range(40)] + [("else", b"", None)] * 40

    def turn():
        for _ in range(5):
            stream.process_batch(messages)
        return sys.getallocatedblocks()
    stream._times.extend(range(10**6, 10**6 + 1024))        # times are kept, but no more than these
    gc.collect()
    gc.disable()                # nor does it need the collector
    try:
        turn()
        before = turn()
        for _ in range(int(10 * SOAK) + 2):
            after = turn()
    finally:
        gc.enable()
    assert after - before < 300 and stream.errored["not_json"] > 1000 < stream.errored["zero_division"]
    error = stream.rules[0].static
    depth, trace = 0, error.__traceback__
    while trace is not None:
        depth, trace = depth + 1, trace.tb_next
    assert depth < 10


# -- what outlives a stop --

STATEFUL = {"mapping": {"d": "x - prev(x)", "m": "ewma(x, 0.5)", "n": "count()", "w": "window(x, 10).mean", "k": "x * k"},
            "sources": {"x": "in.*", "k": "k"}}


def test_state_goes_on_where_it_was(tmp_path, rng):
    messages = [(rng.choice(["in.a", "in.b", "k"]), sample(rng.randrange(50), 1000 + n * rng.randrange(400))) for n in range(120)]
    whole = plant(**STATEFUL)
    expected = [whole.process(*each) for each in messages]
    file = tmp_path / "state"
    for cut in range(0, 120, 40):
        stream = plant(**STATEFUL, state_file=str(file))
        assert [stream.process(*each) for each in messages[cut:cut + 40]] == expected[cut:cut + 40]
        stream.save()
    assert stream.state() == whole.state() and [*tmp_path.iterdir()] == [file]
    # of a changed mapping, what is the same goes on
    stream = plant(STATEFUL["mapping"] | {"m": "ewma(x, 0.9)", "new": "prev(x)"}, STATEFUL["sources"], state_file=str(file))
    assert stream.state() == whole.state()
    kept = [[cell[:2] for cell in each["cells"]] for each in stream.snapshot()["matches"] if each["match"]]
    assert all(["d", "prev(x)"] in each and ["m", "ewma(x, 0.9)"] not in each for each in kept)
    moved = plant(STATEFUL["mapping"], {"x": "in.*", "k": "elsewhere"}, state_file=str(file))
    assert moved.state().keys() == {"x"}


def test_a_damaged_state_is_set_aside_and_never_loaded_by_half(tmp_path, caplog):
    file = tmp_path / "state"
    stream = plant(**STATEFUL, state_file=str(file))
    stream.process("in.a", sample(3))
    stream.save()
    good = file.read_bytes()
    head, _, body = good.partition(b"\n")
    other = body.replace(b'"x":3', b'"x":4')
    signed = b'{"format":"horizon_lite stream state 1","crc32":%d}\n'
    for bad in (b"", b"{}", good[:-1], good[:len(good) // 2], good.replace(b"3", b"4", 1), head + b"\n" + other, b"\xff" * 50,
                good.replace(b"state 1", b"state 9"), *(signed % zlib.crc32(each) + each for each in (
                    b"[]", b"{}", b'{"sources":{},"wildcards":[],"matches":[5]}', body.replace(b'"values"', b'"valuez"'),
                    body.replace(b'"x":3', b'"x":null'), body.replace(b'["m","ewma(x, 0.5)",3.0]', b'["m","ewma(x, 0.5)","3"]'), b"[" * 200_000, body.replace(b"[[1,3]]", b"[[1,1e999]]")))):
        file.write_bytes(bad)
        caplog.clear()
        fresh = plant(**STATEFUL, state_file=str(file))
        assert fresh.state() == {} and not file.exists() and (tmp_path / "state.damaged").read_bytes() == bad, bad
        assert "is damaged" in caplog.text and "set aside as" in caplog.text
    file.write_bytes(signed % zlib.crc32(other) + other)
    assert plant(**STATEFUL, state_file=str(file)).state() == {"x": {"a": 4}}       # what is signed is believed
    with pytest.raises(hl.ConfigError, match="state_file"):
        plant(**STATEFUL, state_file=str(tmp_path))
    with pytest.raises(hl.StateError, match="no state_file"):
        plant(**STATEFUL).save()


def test_a_state_that_cant_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "state"
    stream = plant(**STATEFUL, state_file=str(file))
    stream.process("in.a", sample(3))
    stream.save()
    old = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    stream.process("in.a", sample(4))
    with pytest.raises(OSError):
        stream.save()
    assert file.read_bytes() == old and [*tmp_path.iterdir()] == [file]


SHARED = "[1]"
for _ in range(26):
    SHARED = f"[[c, c, c, c] for c in {SHARED}]"


@pytest.mark.parametrize("text, given", [
    ("ewma(x, 0.5) ** 100000000 > 0", {"x": 7}), ("len(ewma(x, 0.5) * s)", {"x": 500_000_000, "s": "ab"}), (f"{SHARED} == {SHARED}", {}), (f"{SHARED} in [{SHARED}]", {}),
    (f"x[({SHARED})[0]]", {"x": {}}), ("{%s[0]: 1}" % SHARED.replace("[c, c, c, c]", "(c, c, c, c)"), {}), ("x.get(%s[0])" % SHARED.replace("[c, c, c, c]", "(c, c, c, c)"), {"x": {}}),
    ("len([[" + "0, " * 1300 + "] for i in t])", {"t": "a" * 99_990}), ("len([[" + "x + y, " * 500 + "] for i in t])", {"t": "a" * 99_990, "x": "a", "y": "b"}), ("len([0 for i in t if " + "x <= " * 600 + "x])", {"t": "a" * 99_990, "x": 1}),
    ("str([b for b in [7 ** 700] for i in t])", {"t": "a" * 45_000}), ("len([b // c for b in [1 << 2000] for c in [1 << 1000] for i in t])", {"t": "a" * 99_990}), ("{a * 2305843009213693951: 0 for a in l}", {"l": [*range(100)]}),
    ("[x * 1e308]", {"x": 1e308}), ("{1: 2}", {}), ("{x: 1}", {"x": 1}), ("[1 for () in xs]", {"xs": []}), ("sorted(x, reverse=True, reverse=False)", {"x": []}), ("f'{x:c}'", {"x": 0xd800}), ("x.keys()", {"x": [1]}),
    ("[" + "x < y, " * 500 + "]", {"x": [[0] * 9000], "y": [[0] * 9000]}), ("[" + "x in y, " * 400 + "]", {"x": "ab", "y": "a" * 1_000_000}), ("x[k]", {"x": {}, "k": "a" * 900_000}), ("float(k)", {"k": "a" * 900_000}), ("prev((1, x))", {"x": 1}), ("'\x1b[0m' + 5", {}),
    ("window(x, 10).mean", {"x": 1e308 * 10}), ("window(x * 1e300, 10).mean", {"x": 1e300}), ("prev(x * 1e308, 0)", {"x": 1e10}), ("(x for x in y)", {"y": []}), ("None[0]", {}), ("1 is None", {}), ("'abc'['x']", {}), ("'\\d' + 5", {}),
])
def test_what_was_found_by_attackers_is_stopped(text, given, recwarn):
    began = time.process_time()
    with pytest.raises(hl.ExpressionError) as raised:
        hl.Expression(text)(**given)
    assert time.process_time() - began < 1.5 and str(raised.value).isprintable() and not recwarn.list


def test_building_an_expression_is_quick_whatever_it_says():
    for text in ("[" + ",".join(["'a'*6300000"] * 310) + "]", "Math.pow(" * 40 + "," * 80, "Math.pow(a," * 35, "a ? b : " * 50, "`${" * 120, "x" + ".a" * 60, "!" * 400, "'" * 300 + "&&"):
        began = time.process_time()
        with contextlib.suppress(hl.ExpressionError):
            hl.Expression(text)
        assert time.process_time() - began < 1.0, text[:20]


@pytest.mark.parametrize("text, given, result", [
    ("[pi * 2 for pi in x]", {"x": [1, 2]}, [2, 4]), ("[abs(pi) for pi in [1, -2, 3]]", {}, [1, 2, 3]), ("[a for a, in x]", {"x": [[1], [2]]}, [1, 2]), ("[a + b for a, b in x]", {"x": [[1, 2]]}, [3]), ("f'{x!s:5}|'", {"x": 5}, "5    |"), ("f'{x!s}'", {"x": None}, "None"),
    ("[v for v in x if v in ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i']]", {"x": ["a"] * 9000}, ["a"] * 9000), ("len(x.replace('temperature', 't'))", {"x": "temperature " * 40_000}, 80_000), ("x.startswith('temperature')", {"x": "temperature " * 40_000}, True),
    ("x\n  + 1", {"x": 1}, 2), ("~x", {"x": True}, -2), ("~x", {"x": 5}, -6), ("ewma(x, 1)", {"x": 3}, 3.0), ("any(1 / y for y in x)", {"x": [1, 0]}, True), ("all(1 / y > 1 for y in x)", {"x": [1, 0]}, False), ("'$' + '{a}'", {}, "${a}"), ("f'${x}'", {"x": 1}, "$1"), ("ewma(x, 0.5)", {"x": 1}, 1.0), ("prev(x, 'none')", {"x": 1}, "none"), ("x.get('a', 0) + 1", {"x": {}}, 1),
    ("{k: v for k, v in x.items()}", {"x": {"a": 1}}, {"a": 1}), ("(1, x)", {"x": 2}, (1, 2)), ("x in ('a', 'b')", {"x": "a"}, True), ("x == [[1], [2]]", {"x": [[1], [2]]}, True), ("x['a']['b'][0]", {"x": {"a": {"b": [5]}}}, 5), ("window(x, 9).max - window(x, 9).min", {"x": 1}, 0),
])
def test_what_attackers_found_wrong_is_right(text, given, result):
    got = hl.Expression(text)(**given)
    assert got == result and type(got) is type(result)


def test_what_fails_for_one_cell_is_told_to_the_others_in_any_order():
    for text in ("[prev(x['a'], 0), prev(x['b'], 0)]", "[prev(x['b'], 0), prev(x['a'], 0)][::-1]"):
        expression = hl.Expression(text)
        assert expression(x={"a": 1, "b": 1}) == [0, 0]
        with pytest.raises(hl.ExpressionError):
            expression(x={"a": 2})
        assert expression(x={"a": 3, "b": 3}) == [2, 1]
    nested = hl.Expression("[prev(prev(1 / x, 0), 0), count(), prev(x, 0)]")
    with contextlib.suppress(hl.ExpressionError):
        nested(x=0)
    assert nested(x=2) == [0, 2, 0] and nested(x=4) == [0, 3, 2] and nested(x=5) == [0.5, 4, 4]
    average = hl.Expression("ewma(x, 1)")
    assert [average(x=1e20), average(x=3)] == [1e20, 3.0]
    held, own = hl.Expression("prev(x, 0)"), [1]
    held(x=own)
    own.append(2)
    assert held(x=0) == [1]


def test_a_hint_is_silent_where_it_would_mean_something_else():
    for text in ("a ?? b * 2", "flags & mask === 0", "a && b // note", "--a === 0", "x / 2 | 0 === 1", "Math.E * x", "Math.SQRT2 && x"):
        with pytest.raises(hl.ExpressionError) as raised:
            hl.Expression(text)
        assert "in Python" not in str(raised.value), text
    with pytest.raises(hl.ExpressionError, match="a == 'x  y'$"):
        hl.Expression("a ===  'x  y'")


def test_a_bad_sample_leaves_a_window_as_it_was():
    expression = hl.Expression("[window(x, 10).sum, window(x, 10).count]")
    got = []
    for at, x in ((1, 1), (1000, "bad"), (2000, 100), (10_500, 5), (11_500, 7), (11_600, 10**400), (30_000, 1)):
        with contextlib.suppress(hl.ExpressionError):
            got.append(expression(x=x, timestamp_ms=at))
    assert got == [[1.0, 1], [101.0, 2], [105.0, 2], [112.0, 3], [1.0, 1]]


def test_windows_together_are_bounded(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_SAMPLES", 50)
    stream = plant({"n": "window(x, 1000).count"}, {"x": "in.*"})
    for n in range(300):
        stream.process(f"in.{n % 3}", sample(n, n + 1))
    assert stream._samples[0] == sum(len(each[0].times) for each in stream._memories.values()) <= 53
    assert values(stream.process("in.1", sample(1, 999)))["n"] >= 1


def test_large_values_together_are_bounded_and_matches_that_rest_make_room(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_HELD", 100_000)
    clock = FakeClock()
    stream = hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": "o", "sources": {"x": "in.*"}, "mapping": {"n": "len(x)"}}, clock=clock)
    for n in range(30):
        stream.process(f"in.{n}", sample("y" * 10_000))
    assert stream.errored == {"too_much": 21} and len(stream.process("in.0", sample(1))) == 0 == len(stream.process("in.0", sample("z" * 10_000)))
    clock.now_ns += 2_000_000_000           # then all is counted again
    assert len(stream.process("in.0", sample("z" * 10_000))) == 1
    monkeypatch.setattr(hl, "_MAX_MATCHES", 9)
    assert stream.process("in.new", sample("a")) == [] and stream.dropped == {"too_many_matches": 1}
    stream.process("in.0", sample("still here"))
    clock.now_ns += hl._IDLE_NS
    assert len(stream.process("in.new", sample("a"))) == 1
    assert stream.state() == {"x": {"0": "still here", "new": "a"}} and stream.forgotten == 8 == stream.stats()["forgotten"]
    for n in range(40):                 # what was replaced, or went, is not counted for ever
        clock.now_ns += 2_000_000_000
        assert len(stream.process("in.0", sample("y" * 10_000))) == 1
        stream.process("in.0", sample([1]))


def test_names_of_wildcards_and_the_timestamp_can_be_said_in_expressions():
    stream = hl.Stream({"model": {"name": "m", "version": "v1"}, "output_topic": "o", "sources": {"t": "plant.{site}.t", "k": "k"},
                        "mapping": {"say": "f'{site}: {t}'", "site": "site.upper()", "at": "timestamp_ms / 1000", "with": "{'t': t, 'at': timestamp_ms}", "of": "f'{site} {k}'", "fn": lambda site, t: site + str(t)}})
    assert values(stream.process("plant.a.t", sample(5, 2000))) == {"say": "a: 5", "site": "A", "at": 2.0, "with": {"t": 5, "at": 2000}, "fn": "a5"}
    assert values(stream.process("k", sample(7, 3000))) == {"at": 3.0, "of": "a 7"}
    with pytest.raises(hl.ExpressionError, match="did you mean 'site'"):
        plant({"a": "f'{sit}'"}, {"x": "p.{site}"})


def test_a_mapping_in_code_cant_change_the_state():
    stream = plant({"bad": lambda x: x.append(1) or len(x), "n": "len(x)"})
    assert values(stream.process("in.x", sample([]))) == {"bad": 1, "n": 0} and stream.state() == {"x": []}
    with pytest.raises(hl.ConfigError, match="async"):
        plant({"a": one_async})
    assert values(plant({"a": lambda *args, x: x}).process("in.x", sample(3))) == {"a": 3}
    for config in (None, 5, []):
        with pytest.raises(hl.ConfigError):
            hl.Stream(config)


def test_a_state_follows_a_mapping_that_has_changed():
    def made(x, y, mapping=None):
        return plant(mapping or {"n": "x + y", "c": "prev(x, 0)"}, {"x": x, "y": y})
    old = made("p.{a}.{b}", "q.{a}.{b}")
    for topic, value in (("p.1.2", 5), ("q.1.2", 6), ("p.3.4", 7)):
        old.process(topic, sample(value))
    turned = made("p.{a}.{b}", "q.{b}.{a}")             # y is another topic now; and in this order
    turned.restore(json.loads(json.dumps(old.snapshot())))
    assert turned.state() == {"x": {"1.2": 5, "3.4": 7}}
    other = plant({"n": "y"}, {"y": "q.{b}.{a}", "x": "p.{a}.{b}"})
    other.restore(old.snapshot())
    assert other.state() == {"x": {"2.1": 5, "4.3": 7}}
    gone = made("z.{a}.{b}", "w.{a}.{b}")
    gone.restore(old.snapshot())
    assert gone.state() == {} and gone.stats()["matches"] == 0         # no ghosts
    windows = plant({"n": "window(x, 60).count"}, {"x": "in.*"})
    for n in range(5):
        windows.process("in.a", sample(n, n + 1))
    for _ in range(3):
        windows.restore(windows.snapshot())
    assert windows._samples == [5] and values(windows.process("in.a", sample(1, 9))) == {"n": 6}


def test_readers_see_a_reload_at_once_or_not_at_all(tmp_path):
    file = tmp_path / "m.toml"

    def write(more):
        file.write_text('output_topic = "out"\nmodel = {name = "m", version = "v1"}\n[sources]\na = "in.x"\n' + more)
    texts = ["[mapping]\np = 'a'\n", "z = 'in.z'\n[mapping]\np = 'a'\nq = 'z'\nr = 'a + 1'\n"]
    write(texts[0])
    stream, odd, over = hl.Stream(file), [], threading.Event()
    stream.process("in.x", sample(1))

    def look():
        while not over.is_set():
            try:
                if stream.state() != {"a": 1} or len(stream.stats()["mappings"]) not in (1, 3):
                    odd.append(stream.state())
            except Exception as error:
                odd.append(error)
    threads = [threading.Thread(target=look) for _ in range(2)]
    for each in threads:
        each.start()
    for n in range(int(40 * SOAK) + 6):
        write(texts[n % 2])
        stream.reload()
    over.set()
    for each in threads:
        each.join()
    assert not odd
    assert stream.stats()["mappings"]["p"]["outputs"] == 1 == stream.outputs      # counts go on


def test_what_cant_be_json_never_stops_a_state_from_being_saved(tmp_path):
    stream = plant({"p": "prev(x * 1e308, 0)", "w": "window(x * 1e308, 60).last", "big": "prev(x ** 50, 0)", "x": "prev(x, 0)"}, state_file=str(tmp_path / "state"))
    for value in (1e10, 10**90, 1, 2):
        stream.process("in.x", sample(value))
    stream.process("in.x", b'{"value":"\\ud800","timestamp_ms":1}')
    stream.save()
    assert plant({"x": "prev(x, 0)"}, state_file=str(tmp_path / "state")).snapshot()["matches"][0]["cells"] == [["x", "prev(x, 0)", [1, 2]]]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "state")
    stream.state_file = str(link)
    stream.save()
    assert link.is_symlink()


def test_times_are_sampled_and_their_percentiles_told():
    clock, seen = FakeClock(), []
    stream = hl.Stream(PUMP, clock=clock, observe=lambda name, value: seen.append(name))
    for _ in range(640):
        clock.now_ns += 1000
        stream.process(PUMP["sources"]["press"], sample(1.5))
    assert collections.Counter(seen) == {"horizon_stream_message_seconds": 10, "horizon_stream_expression_seconds": 20}
    assert stream.stats()["latency_us"] == {"p50": 0.0, "p95": 0.0, "p99": 0.0} and len(stream._times) == 10


# =============================================================================
# 10  SPACE
# =============================================================================

class Point:
    def __init__(self, *at):
        self.at = tuple(map(float, at))
        self.region = None


def test_regions_are_divided_above_the_split_and_united_below_the_merge():
    space = hl.Space()
    points = [Point(n % 10 * 99, n // 10 * 99, 0) for n in range(50)]
    for point in points:
        space.add(point)
    assert space.regions() == [(1000.0, 50)]
    space.add(last := Point(1, 1, 1))
    assert {size for size, _ in space.regions()} == {500.0} and len(space) == 51
    space._check()
    for point in points[9:]:
        space.remove(point)
    space._check()
    assert len(space.regions()) > 1                     # 10 are not below the merge
    space.remove(last)
    assert space.regions() == [(1000.0, 9)]
    for point in points[:9]:
        space.remove(point)
    assert space.regions() == [] and len(space) == 0


def test_no_region_is_smaller_than_the_smallest():
    space = hl.Space(100, 1000, 50, 10)
    for _ in range(500):
        space.add(Point(1, 1, 1))
    assert min(space.regions())[0] == 125.0             # its half would be below 100
    space._check()


@pytest.mark.parametrize("scale, settings", [
    (2_000, (100, 1000, 50, 10)), (3_000, (1, 4096, 3, 1)), (1e30, (100, 1000, 5, 2)), (1e-3, (100, 1000, 50, 10)), (500, (50, 50, 8, 8))])
def test_who_is_near_is_what_brute_force_says(rng, scale, settings):
    space, points = hl.Space(*settings), []

    def somewhere():
        middle = rng.choice((-scale, 0.0, scale))
        return tuple(middle + rng.gauss(0, scale / 10) * rng.random() for _ in range(3))
    for step in range(1_500):
        if len(points) < 20 or rng.random() < 0.4:
            points.append(Point(*somewhere()))
            space.add(points[-1])
        elif rng.random() < 0.3:
            space.remove(points.pop(rng.randrange(len(points))))
        else:
            point = rng.choice(points)
            point.at = somewhere()
            space.settle(point)
        if step % 50 == 0:
            space._check()
            at, radius = somewhere(), rng.random() * scale
            assert set(space.nearby(*at, radius)) == {each for each in points if math.dist(at, each.at) <= radius}
    assert set(space.nearby(0, 0, 0, 1e35)) == set(points)
    for point in points:
        space.remove(point)
    assert not space.regions()


@pytest.mark.parametrize("settings", [(0, 1000, 50, 10), (200, 100, 50, 10), (100, math.inf, 50, 10), (100, 1000, 10, 50), (1e-9, 1000, 50, 10),
                                      (math.nan, 1000, 50, 10), (100, 1000, 50, -1)])
def test_regions_that_can_not_be_are_refused(settings):
    with pytest.raises(hl.UsageError):
        hl.Space(*settings)
    with pytest.raises(hl.UsageError):
        hl.World(*settings)


# =============================================================================
# 11  REPLICATION
# =============================================================================

def test_a_tick_tells_the_last_position_of_those_who_moved():
    movement = hl.Movement()
    a, b = b"a" * 16, b"b" * 16
    movement.move(a, 1, 1, 1)
    movement.move(b, 2, 2, 2)
    movement.move(a, 3, 3, 3)
    moves = movement.take()
    assert (moves.players, moves.full) == ({a: (3.0, 3.0, 3.0), b: (2.0, 2.0, 2.0)}, False)
    assert movement.take() is None and movement.coalesced == 1
    movement.move(a, 4, 4, 4)
    assert movement.take().players == {a: (4.0, 4.0, 4.0)}


def test_who_left_is_missing_from_a_full_block():
    movement = hl.Movement()
    movement.move(b"a" * 16, 1, 1, 1)
    movement.move(b"b" * 16, 1, 1, 1)
    movement.take()
    movement.remove(b"a" * 16)
    movement.remove(b"never there here")
    moves = movement.take()
    assert moves.full and list(moves.players) == [b"b" * 16] and movement.take() is None


def test_movement_has_every_form():
    movement = hl.Movement()
    player = bytes(range(16))
    movement.move(player, 1.5, -2, 0)
    moves, schema = movement.take(), hl.builtin_schema()
    name = "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert json.loads(moves.json()) == {
        "topic": "world.moves", "payload": {"full": False, "players": {name: [1.5, -2.0, 0.0]}}}
    for form, wide in (("f32", False), ("f64", True)):
        block = schema.EventBatch.decode(moves.envelope(form)).events[0].packed_movement
        assert block.wide is wide and hl.unpack_moves(block.data, wide=wide) == {player: (1.5, -2.0, 0.0)}
    event = schema.EventBatch.decode(moves.envelope("")).events[0]
    assert event.player_move.player_uuid == name and event.player_move.y == -2.0


@pytest.mark.parametrize("position", [(10**400, 0, 0), (math.nan, 0, 0), (0, math.inf, 0), (0, 0, 1e39), ("1", 0, 0), (None, 0, 0)])
def test_positions_are_finite_numbers(position):
    with pytest.raises(hl.UsageError):
        hl.Movement().move(b"a" * 16, *position)


# -- objects that are told to those who are near --

class Rock(hl.Replicated):
    layers = (hl.Layer(0, 50, 60, ("position", "health")), hl.Layer(1, 150, 30, ("mood",)), hl.Layer(3, 1000, 5, ("name", "loot")))
    health = 100
    mood = "calm"
    name = "rock"

    def __init__(self):
        self.loot = []


TICK = 16_666_667


class Looker:
    """A world with a clock, and what each observer makes of what it is told."""

    def __init__(self, *args, **options):
        self.world = hl.World(*args, clock=lambda: self.now_ns, **options)
        self.now_ns, self.views, self.said = 0, {}, []

    def tick(self, count=1, ready=None, check=True):
        self.said = []
        for _ in range(count):
            self.now_ns += TICK
            for observer, updates in self.world.gather(self.now_ns, ready):
                for update in updates:
                    message = json.loads(update.json())
                    self.said.append((observer.key, message))
                    self.views.setdefault(observer.key, hl.SeenWorld()).apply(message)
            if check:
                self.world._check()
        return self.said

    def messages(self, observer="anna"):
        return [message for who, message in self.said if who == observer]


@pytest.fixture
def looker():
    made = Looker()
    made.world.observe("anna", 0, 0, 0)
    return made


def test_the_default_channels_are_those_of_the_seed():
    assert [(each.channel, each.radius, each.hz, each.priority) for each in hl.Replicated.layers] == [
        (0, 50, 60, 0), (1, 150, 30, 1), (2, 300, 15, 2), (3, 1000, 5, 3)]
    assert [(hl.Layer(n).radius, hl.Layer(n).hz, hl.Layer(n).priority) for n in (0, 4, 7)] == [(50, 60, 0), (1000, 5, 3), (1000, 5, 3)]
    assert hl.Layer(3, priority="critical").priority == 0 and hl.Layer(0, priority=3).priority == 3

    class Plain(hl.Replicated):
        pass
    assert Plain.type_name == "Plain" and Rock.type_name == "Rock"
    world = hl.World()
    world.observe("anna", 0, 0, 0)
    world.add(Plain(), 1, 2, 3)
    assert {(update.channel, update.data["position"]) for _, update in world.tick(0)} == {(n, (1.0, 2.0, 3.0)) for n in range(4)}


@pytest.mark.parametrize("make", [
    lambda: hl.Layer(8), lambda: hl.Layer(-1), lambda: hl.Layer("0"), lambda: hl.Layer(True), lambda: hl.Layer(0, -1), lambda: hl.Layer(0, 0),
    lambda: hl.Layer(0, math.nan), lambda: hl.Layer(0, math.inf), lambda: hl.Layer(0, 50, 0), lambda: hl.Layer(0, 50, -1), lambda: hl.Layer(0, 50, 1e9),
    lambda: hl.Layer(0, "50"), lambda: hl.Layer(0, 50, 60, "health"), lambda: hl.Layer(0, 50, 60, (1,)), lambda: hl.Layer(0, priority="urgent"),
    lambda: hl.Layer(0, priority=4), lambda: hl.Layer(0, compression="lz4"), lambda: hl.World(hysteresis=-0.1), lambda: hl.World(hysteresis=math.nan),
    lambda: hl.World(crossings_per_s=-1), lambda: hl.World(crossings_per_s=math.nan),
    lambda: type("Nine", (hl.Replicated,), {"layers": [hl.Layer(n % 8) for n in range(9)]}),
    lambda: type("Odd", (hl.Replicated,), {"layers": [0, 1]}), lambda: type("Odd", (hl.Replicated,), {"type_name": "a:b"})])
def test_layers_that_can_not_be_are_refused(make):
    with pytest.raises(hl.UsageError):
        make()


def test_what_a_world_does_not_know_is_refused():
    world, rock = hl.World(), Rock()
    id = world.add(rock, 0, 0, 0)
    world.observe("anna", 0, 0, 0)

    class Bare(hl.Replicated):
        layers = (hl.Layer(0, properties=("helth",)),)
        health = 1
    for attempt, word in [
            (lambda: world.add(rock, 0, 0, 0), "already"), (lambda: world.add("rock", 0, 0, 0), "Replicated"), (lambda: world.add(Bare(), 0, 0, 0), "'health'"),
            (lambda: world.add(Rock(), 0, math.nan, 0), "finite"), (lambda: world.add(Rock(), 0, "1", 0), "finite"), (lambda: world.add(Rock(), 0, 0, 0, channels=(2,)), "[0, 1, 3]"),
            (lambda: world.move("nobody", 0, 0, 0), "the id 'nobody'"), (lambda: world.move(id, math.inf, 0, 0), "finite"), (lambda: world.move(None, 0, 0, 0), "the id None"),
            (lambda: world.move(id, 10**400, 0, 0), "finite"), (lambda: world.remove("nobody"), "the id 'nobody'"), (lambda: world.remove(Rock()), "not in"),
            (lambda: world.nearby(0, 0, 0, -1), "radius"), (lambda: world.nearby(0, 0, 0, math.inf), "radius"), (lambda: world.nearby(0, math.nan, 0, 1), "finite"),
            (lambda: world.observe("bob", None, 0, 0), "finite"), (lambda: world.move_observer("bob", 0, 0, 0), "observe"), (lambda: world.seen_by("bob"), "observe"),
            (lambda: world.emit(rock, 2, "x"), "[0, 1, 3]"), (lambda: world.emit(rock, True, "x"), "channels"), (lambda: world.emit(rock, 0, "update"), "own"),
            (lambda: world.emit(rock, 0, "a:b"), "match"), (lambda: world.emit(rock, 0, "x", {1, 2}), "JSON"), (lambda: rock.touch("helth"), "'health'"),
            (lambda: world.limit("anna", -1), "bytes_per_s"), (lambda: world.stats("bob"), "the id 'bob'"), (lambda: world.sees("anna", rock, 7), "channels")]:
        with pytest.raises(hl.UsageError, match=re.escape(word)):
            attempt()
    with pytest.raises(hl.StateError):
        Rock().position = (1, 2, 3)
    world.unobserve("bob")                          # harmless
    world.tick(0)
    world._check()


def test_a_zone_is_entered_with_its_state_then_told_what_changed_then_left(looker):
    rock = Rock()
    id = looker.world.add(rock, 10, 0, 0)
    assert looker.tick() and looker.messages() == [
        {"type": "gorc_zone_enter", "object_id": id, "object_type": "Rock", "channel": channel, "position": [10.0, 0.0, 0.0], "zone_data": data,
         "timestamp": looker.messages()[0]["timestamp"]}
        for channel, data in ((0, {"position": [10.0, 0.0, 0.0], "health": 100}), (1, {"mood": "calm"}), (3, {"name": "rock", "loot": []}))]
    assert abs(looker.messages()[0]["timestamp"] - time.time()) < 60
    assert not looker.tick(20)
    rock.health = 7
    rock.health = 3
    (update,) = [message for _, message in looker.tick(20)]
    assert (update["type"], update["event"], update["channel"], update["data"]) == ("gorc_event", "update", 0, {"health": 3})
    rock.mood, rock.unheard = "wild", 1
    looker.world.move(id, 11, 0, 0)
    looker.tick(20)
    assert [(each["channel"], each["data"]) for each in looker.messages()] == [(0, {"position": [11.0, 0.0, 0.0]}), (1, {"mood": "wild"})]
    rock.position = 100, 0, 0
    assert looker.world.seen_by("anna") == {(id, 0), (id, 1), (id, 3)}      # as of the last tick
    looker.tick()
    assert [(each["type"], each["channel"]) for each in looker.messages()] == [("gorc_zone_exit", 0)]
    assert looker.world.seen_by("anna") == {(id, 1), (id, 3)} and looker.world.sees("anna", id, 1) and not looker.world.sees("anna", id, 0)
    looker.world.remove(rock)
    looker.tick()
    assert [(each["type"], each["channel"]) for each in looker.messages()] == [("gorc_zone_exit", 1), ("gorc_zone_exit", 3)]
    assert rock.id == "" and rock.position is None and not looker.views["anna"] and looker.world.seen_by("anna") == set()
    rock.health = 9                                 # it is in no world any more
    assert looker.world.add(rock, 0, 0, 0) != id and looker.tick()


def test_zones_are_spheres_with_their_edge_and_five_percent(looker):
    world = looker.world
    id = world.add(Rock(), 0, 0, 50)
    looker.tick()
    assert (id, 0) in world.seen_by("anna")         # d == r
    for z, inside in ((50.01, True), (52.5, True), (52.5001, False), (50.0001, False), (50, True)):
        world.move(id, 0, 0, z)
        looker.tick()
        assert ((id, 0) in world.seen_by("anna")) is inside, z
    for at in ((29, 29, 29), (28.8, 28.8, 28.9)):       # in three dimensions
        world.move(id, 0, 0, 99)
        looker.tick()
        world.move(id, *at)
        looker.tick()
        assert ((id, 0) in world.seen_by("anna")) is (math.dist(at, (0, 0, 0)) <= 50)
    world.observe("new", 0, 0, -2)
    world.move(id, 0, 0, 49.5)
    looker.tick()
    assert (id, 0) not in world.seen_by("new")      # newcomers have no five percent


def test_a_pair_on_the_edge_does_not_flap():
    for hysteresis, crossings in ((0.05, 1), (0.0, 100)):
        looker = Looker(hysteresis=hysteresis)
        looker.world.observe("anna", 0, 0, 0)
        rock = Rock()
        looker.world.add(rock, 49, 0, 0, channels=(0,))
        for step in range(100):
            rock.position = 51 - step % 2 * 2, 0, 0
            looker.tick()
        told = looker.world.stats("anna")["transitions"]
        assert abs(told - crossings) <= 1


def test_observers_and_objects_both_move_jump_come_and_go(looker):
    world = looker.world
    far = world.add(Rock(), 5_000, 0, 0)
    near = world.add(Rock(), 1, 0, 0, channels=[0])
    looker.tick()
    assert world.seen_by("anna") == {(near, 0)}
    world.observe("anna", 5_000, 0, 0)              # again moves her
    looker.tick()
    assert world.seen_by("anna") == {(far, 0), (far, 1), (far, 3)} == looker.views["anna"].zones
    world.move(far, 0, 0, 0)
    world.move(near, 5_000, 10, 0)
    looker.tick()
    assert world.seen_by("anna") == {(near, 0)} == looker.views["anna"].zones
    world.move_observer("anna", 1e30, 0, 0)
    looker.tick()
    assert not looker.views["anna"] and not world.seen_by("anna")
    world.unobserve("anna")
    with pytest.raises(hl.UsageError):
        world.move_observer("anna", 0, 0, 0)
    assert not looker.tick() and world.observers() == 0
    world.remove(far)
    world.remove(near)
    assert len(world) == 0 and world.nearby(0, 0, 0, 1e9) == []


def test_what_is_equal_is_no_change_and_what_is_changed_in_place_is_told_by_touch(looker):
    rock = Rock()
    looker.world.add(rock, 0, 0, 0)
    looker.tick(20)
    rock.health, rock.mood, rock.name = 100, "calm", "rock"
    assert not looker.tick(20)
    rock.loot.append("gold")
    assert not looker.tick(20)
    rock.touch("loot")
    assert [message["data"] for _, message in looker.tick(20)] == [{"loot": ["gold"]}]
    rock.loot = rock.loot                           # may have changed in place
    rock.health = 100.0                             # another type is another JSON
    looker.tick(20)
    assert [message["data"] for message in looker.messages()] == [{"health": 100.0}, {"loot": ["gold"]}]


def test_properties_that_can_not_be_told_harm_nobody_else(looker, caplog):
    class Odd(Rock):
        @property
        def mood(self):
            return 1 / self.health
    odd, rock = Odd(), Rock()
    looker.world.add(odd, 0, 0, 0)
    looker.world.add(rock, 0, 0, 0)
    looker.tick(20)
    odd.health, odd.name, rock.health = 0, {1, 2}, 1
    odd.touch("mood", "loot")
    looker.tick(20)
    assert [(each["channel"], each["data"]) for each in looker.messages() if each["object_id"] == odd.id] == [(0, {"health": 0}), (1, {}), (3, {"loot": []})]
    assert looker.views["anna"][rock.id].health == 1
    assert looker.world.complaints == 2 and "Odd." in caplog.text


def test_the_last_words_of_what_is_removed_are_heard(looker):
    rock = Rock()
    looker.world.add(rock, 0, 0, 0)
    looker.tick(20)
    rock.health, rock.mood = 0, "gone"
    for channel in (0, 1, 3):
        assert looker.world.emit(rock, channel, "explosion") == 1
    looker.world.remove(rock)
    looker.tick()
    assert [(each["type"], each["channel"], each.get("event"), each.get("data")) for each in looker.messages()] == [
        ("gorc_event", 0, "explosion", None), ("gorc_event", 1, "explosion", None), ("gorc_event", 3, "explosion", None),
        ("gorc_event", 0, "update", {"health": 0}), ("gorc_event", 1, "update", {"mood": "gone"}),
        *[("gorc_zone_exit", channel, None, None) for channel in (0, 1, 3)]]
    other = Rock()
    looker.world.limit("anna", 1_000_000)           # the same when told by importance
    looker.world.add(other, 0, 0, 0)
    looker.tick()
    looker.world.emit(other, 1, "explosion")
    looker.world.remove(other)
    assert [message["type"] for _, message in looker.tick()] == ["gorc_event"] + ["gorc_zone_exit"] * 3


def test_copies_and_pickles_of_what_is_in_a_world_are_outside(looker):
    @dataclasses.dataclass
    class Gem(hl.Replicated):
        layers = (hl.Layer(0, 50, 60, ("carat", "position")),)
        carat: int = 5
    for made in (Gem(7), Rock()):
        id = looker.world.add(made, 1, 2, 3)
        twin = copy.deepcopy(copy.copy(made))
        assert (twin.id, twin.position) == ("", None) and made.id == id and made.position == (1, 2, 3)
        assert twin.__dict__ == made.__dict__
        looker.world.add(twin, 4, 5, 6)
        assert twin.id != id and pickle.loads(pickle.dumps(Rock())).id == ""
    assert str(id) in repr(made) and "no world" in repr(Rock()) and Gem(3) == Gem(3)


def test_to_delete_an_attribute_tells_of_the_class_own(looker):
    rock = Rock()
    looker.world.add(rock, 0, 0, 0)
    rock.health = 7
    looker.tick(20)
    del rock.health
    assert [message["data"] for _, message in looker.tick(20)] == [{"health": 100}]


@pytest.mark.parametrize("name, value", [("position", (1, 2, 3)), ("id", "me"), ("touch", 1), ("position", property(lambda self: (0, 0, 0)))])
def test_the_names_of_replicated_are_its_own(name, value):
    with pytest.raises(hl.UsageError, match="own"):
        type("Mine", (hl.Replicated,), {name: value})
    with pytest.raises(hl.UsageError, match="own"):
        type("Mine", (hl.Replicated,), {"__annotations__": {name: "object"}})


def test_beginners_are_told_what_to_change():
    single = type("Single", (hl.Replicated,), {"layers": hl.Layer(0, properties=("position",))})()
    world = hl.World()
    world.add(single, 0, 0, 0)
    for attempt, word in [(lambda: setattr(single, "position", (1, 2)), "x, y and z"), (lambda: setattr(single, "position", 5), "x, y and z"),
                          (lambda: setattr(world, "bytes_per_s", -5), "bytes_per_s"), (lambda: setattr(world, "crossings_per_s", "x"), "crossings_per_s"),
                          (lambda: world.add(type("Odd", (hl.Replicated,), {"layers": (hl.Layer(0, properties=("touch",)),)})(), 0, 0, 0), "'touch'"),
                          (lambda: hl.Engine(port=0).on_gorc(Rock, 2, "x"), "no channel 2"), (lambda: hl.Engine(port=0).on_gorc("Rock", 9, "x"), "no channel 9"),
                          (lambda: hl.Engine(port=0).on_gorc(int, 0, "x"), "int has no channel 0"), (lambda: world.seen_by("anna"), "movement:position")]:
        with pytest.raises(hl.UsageError, match=word):
            attempt()
    hl.Engine(port=0).on_gorc(Rock, "*", "x")(print)


def test_an_object_may_have_channels_of_its_own(looker):
    id = looker.world.add(Rock(), 0, 0, 0, channels=(3, 0))
    looker.tick()
    assert looker.world.seen_by("anna") == {(id, 0), (id, 3)}
    silent = looker.world.add(Rock(), 0, 0, 0, channels=())
    looker.tick()
    assert looker.world.seen_by("anna") == {(id, 0), (id, 3)} and silent in looker.world and silent in looker.world.nearby(0, 0, 0, 1)


def test_each_channel_has_its_own_rate():
    looker = Looker()
    world = looker.world
    world.observe("anna", 0, 0, 0)

    class Busy(hl.Replicated):
        layers = tuple(hl.Layer(n, 100, hz, ("a",)) for n, hz in enumerate((60, 30, 15, 5, 0.5)))
        a = 0
    busy = Busy()
    world.add(busy, 0, 0, 0)
    looker.tick(2)
    told = collections.Counter()
    for n in range(120 * 4):                        # 4 seconds at 120 ticks
        busy.a = n
        looker.now_ns += TICK // 2 - TICK
        told.update(message["channel"] for _, message in looker.tick(check=False))
    assert [abs(told[n] - 4 * hz) <= 1 for n, hz in enumerate((60, 30, 15, 5, 0.5))] == [True] * 5, told


def test_uneven_ticks_leave_nobody_waiting_for_the_next():
    looker = Looker()
    looker.world.observe("anna", 0, 0, 0)
    rocks = [Rock() for _ in range(64)]
    for rock in rocks:
        looker.world.add(rock, 0, 0, 0, channels=(0,))
    looker.tick(5)
    for n in range(600):                            # sixty a second, but not evenly
        for rock in rocks:
            rock.health = n
        looker.now_ns += (-4_000_000, 0, -2_000_000, 6_000_000)[n % 4]
        assert len(looker.tick(check=False)) == 64


def test_objects_of_a_channel_take_turns():
    looker = Looker()
    looker.world.observe("anna", 0, 0, 0)
    rocks = [Rock() for _ in range(240)]
    for rock in rocks:
        looker.world.add(rock, 900, 0, 0)
    looker.tick(2, check=False)
    counts = []
    for n in range(120):
        for rock in rocks:
            rock.name = f"{n}"
        counts.append(len(looker.tick(check=False)))
    assert max(counts) <= 240 / 12 * 1.5 and min(counts) >= 240 / 12 * 0.5 and abs(sum(counts) - 10 * 240) <= 240


def test_rates_sink_with_the_load_when_that_is_wanted():
    def told(load, adaptive=True):
        looker = Looker()
        looker.world.adaptive, looker.world.load = adaptive, load
        looker.world.observe("anna", 0, 0, 0)
        rock = Rock()
        looker.world.add(rock, 0, 0, 0)
        looker.tick(2)
        counts = collections.Counter()
        for n in range(240):
            rock.health, rock.mood, rock.name = n, f"{n}", f"{n}"
            counts.update(message["channel"] for _, message in looker.tick(check=False))
        return counts[0] / 4, counts[1] / 4, counts[3] / 4
    for load, adaptive, expected in ((0, True, (60, 30, 5)), (1, True, (30, 15, 2.5)), (0.5, True, (45, 22.5, 3.75)), (7, True, (30, 15, 2.5)), (1, False, (60, 30, 5))):
        assert told(load, adaptive) == pytest.approx(expected, abs=0.6)
    assert (hl._Wheel(0, 40).slowest_hz, hl._Wheel(2, 3).slowest_hz) == (30, 3)     # not below the channel's own


def test_who_has_little_bandwidth_gets_the_important_and_the_near_first_and_the_newest_then():
    looker = Looker()
    world = looker.world
    world.observe("anna", 0, 0, 0)
    world.observe("bob", 0, 0, 0)
    rocks = [Rock() for _ in range(40)]
    for n, rock in enumerate(rocks):
        world.add(rock, 1 + n, 0, 0, channels=(0, 3))
    world.limit("anna", 20_000)
    looker.tick()
    assert len(looker.messages("bob")) == 80 and 8 <= len(looker.messages()) <= 14       # a tenth of a second's
    first = looker.messages() + [message for _, message in looker.tick(6)]
    assert 12 < len(first) < 30 and [(each["object_id"], each["channel"]) for each in first] == [(rock.id, 0) for rock in rocks[:len(first)]]
    looker.tick(100)
    assert looker.views["anna"].zones == world.seen_by("anna")
    sent = world.stats("anna")["bytes"]
    for n in range(300):                            # five seconds
        for rock in rocks:
            rock.health = n
        looker.tick(check=False)
    spent = world.stats("anna")["bytes"] - sent
    assert 0.9 * 5 * 20_000 < spent < 1.03 * 5 * 20_000 and world.stats("bob")["bytes"] > 4 * spent
    near = [looker.views["anna"][rock.id].health for rock in rocks]
    assert near[0] >= 290 and near[0] > near[-1]
    stats = world.stats("anna")
    assert stats["left_out"] and stats["coalesced"] and not stats["dropped"]
    looker.tick(60)
    assert {each.health for each in looker.views["anna"].values()} == {299}     # what was left out came, as it was then
    world.limit("anna", 0)
    for rock in rocks:
        rock.health = -1
    looker.tick()
    assert len(looker.messages()) == 40
    world.limit("anna", None)
    world.bytes_per_s = 10.0
    rocks[0].health = 5
    looker.tick(60)
    assert len(looker.messages()) <= 1


def test_crossings_can_be_limited_and_are_exact_all_the_same():
    looker = Looker(crossings_per_s=5)
    world = looker.world
    world.observe("anna", 0, 0, 0)
    rock, calm = Rock(), Rock()
    id = world.add(rock, 0, 0, 0, channels=(0,))
    other = world.add(calm, 0, 0, 0, channels=(0,))
    told = 0
    for step in range(300):                         # five seconds
        rock.position = step % 2 * 1_000, 0, 0
        calm.health = step
        told += sum(message["type"] != "gorc_event" for _, message in looker.tick())
        assert ((id, 0) in world.seen_by("anna")) is (step % 2 == 0)
    assert told <= 5 * 5 + 1 and looker.views["anna"][other].health == 299
    rock.position = 0, 0, 0
    rock.health = 77
    looker.tick(60)
    assert looker.views["anna"].zones == world.seen_by("anna") == {(id, 0), (other, 0)} and looker.views["anna"][id].health == 77


def test_who_is_not_ready_gets_what_is_newest_when_it_is(looker):
    world = looker.world
    rock, gone, flicker = Rock(), Rock(), Rock()
    for each in (rock, gone, flicker):
        world.add(each, 0, 0, 0, channels=(0,))
    looker.tick()
    for n in range(10):
        rock.health = n
        flicker.position = n % 2 * 9_000, 0, 0
        flicker.health = n
        if n == 5:
            world.remove(gone)
            late = world.add(Rock(), 0, 0, 0, channels=(0,))
        world.emit(rock, 0, "boom")
        assert not looker.tick(ready=lambda observer: False)
    flicker.position = 0, 0, 0
    stats = world.stats("anna")
    assert stats["coalesced"] >= 9 and stats["dropped"] == 10
    looker.tick()
    assert len(looker.messages()) == 4 and looker.views["anna"].zones == world.seen_by("anna")
    assert looker.views["anna"][rock.id].health == looker.views["anna"][flicker.id].health == 9 and late in looker.views["anna"]
    assert not world._observers["anna"].debts


def test_an_update_is_encoded_once_for_all_who_get_it(looker):
    world = looker.world
    for n in range(20):
        world.observe(n, 0, 0, 0)
    rock = Rock()
    world.add(rock, 0, 0, 0)
    entered = {id(update) for _, update in world.tick(1)}
    assert len(entered) == 3                        # for 21 observers
    rock.health = 1
    updates = world.tick(TICK)
    assert len(updates) == 21 and len({id(update) for _, update in updates}) == 1
    update = updates[0][1]
    assert update.json() is update.json() and update.envelope("") is update.envelope("f32") and update.size == update.measure()


def test_updates_have_every_form(looker):
    world, schema = looker.world, hl.builtin_schema()

    class Crate(hl.Replicated):
        layers = (hl.Layer(0, 50, 60, ("position", "health")), hl.Layer(2, 300, 15, ("text",), compression="zlib"))
        health, text = 1, "x" * 600
    crate = Crate()
    id = world.add(crate, 1.5, 2, -3)
    zero, two = [schema.EventBatch.decode(update.envelope("")).events[0] for _, update in world.tick(1)]
    assert (zero.type, zero.zone_enter.object_id, zero.zone_enter.object_type, zero.zone_enter.channel) == ("ZONE_ENTER", id, "Crate", 0)
    assert json.loads(zero.zone_enter.data) == {"position": [1.5, 2, -3], "health": 1} and zero.zone_enter.position == schema.Vec3(x=1.5, y=2, z=-3)
    assert zero.zone_enter.original_size == 0 and two.zone_enter.original_size == len('{"text":"%s"}' % crate.text) > len(two.zone_enter.data)
    assert json.loads(zlib.decompress(two.zone_enter.data)) == {"text": crate.text}
    crate.health, crate.text = 2, "short"
    world.move(id, 4, 5, 6)
    world.emit(crate, 0, "bump", [1])
    updates = [update for n in range(2, 20) for _, update in world.tick(n * TICK)]
    one, bump, three = [schema.EventBatch.decode(update.envelope("")).events[0].gorc_event for update in sorted(updates, key=lambda each: (each.channel, each.event != "update"))]
    assert (one.event, json.loads(one.data), three.channel, json.loads(three.data), three.original_size) == (
        "update", {"position": [4, 5, 6], "health": 2}, 2, {"text": "short"}, 0)
    assert (bump.event, json.loads(bump.data)) == ("bump", [1])
    update = next(each for each in updates if each.event == "update" and each.channel == 0)
    for wide in (False, True):
        rest, block = world.pack([update], wide)
        assert rest.data == {"health": 2} and block.players == {uuid.UUID(id).bytes: (4.0, 5.0, 6.0)} and block.count == 1
        envelope = schema.EventBatch.decode(block.envelope("")).events[0]
        assert envelope.type == "GORC_MOVES" and hl.unpack_moves(envelope.packed_movement.data, wide=wide) == block.players
    world.compress_above_bytes = 0                  # not at all
    world.observe("bob", 0, 0, 0)
    crate.text = "y" * 1_000
    world.compress_above_bytes = 0
    assert all(schema.EventBatch.decode(update.envelope("")).events[0].zone_enter.original_size == 0
               for who, update in world.tick(30 * TICK) if who == "bob")
    world.remove(id)
    out = {schema.EventBatch.decode(update.envelope("")).events[0].zone_exit.channel for who, update in world.tick(40 * TICK) if who == "bob"}
    assert out == {0, 2}


@pytest.mark.parametrize("channel, hz, waits", [(1, 60, False), (1, 50, False), (1, 250, True), (0, 250, False)])
def test_a_batch_waits_until_it_is_full_or_old_but_never_for_a_slow_tick_nor_if_critical(channel, hz, waits):
    class Pebble(Rock):
        layers = (hl.Layer(0, 50, 1000, ("health",)), hl.Layer(1, 50, 1000, ("health",)))
    looker = Looker()
    looker.world.batch, looker.world.wait_ns = 32, 16_000_000
    looker.world.observe("anna", 0, 0, 0)
    rocks = [Pebble() for _ in range(40)]
    for rock in rocks:
        looker.world.add(rock, 0, 0, 0, channels=(channel,))
    looker.tick(5)
    gaps, last = [], looker.now_ns
    for n in range(hz):
        rocks[0].health = n
        looker.now_ns += 1_000_000_000 // hz - TICK
        if looker.tick(check=False):
            gaps.append(looker.now_ns - last)
            last = looker.now_ns
            assert looker.views["anna"][rocks[0].id].health == n
    period = 1e9 / hz
    assert max(gaps[1:]) <= (16e6 + period if waits else 1.01 * period) and (min(gaps) >= 12e6 or not waits)
    for n in range(2, 5) if waits else ():              # a full batch does not wait
        for rock in rocks:
            rock.health = -n
        looker.now_ns += 4_000_000 - TICK
        assert len(looker.tick(check=False)) == 40


def test_events_of_objects_reach_those_in_the_zone(looker):
    world = looker.world
    rock = Rock()
    world.add(rock, 100, 0, 0)
    world.observe("bob", 80, 0, 0)
    looker.tick()
    assert world.emit(rock, 0, "mined", {"by": 1}) == 1 and world.emit(rock.id, 1, "seen") == 2
    looker.tick()
    assert sorted((who, message["event"], message["channel"], message["data"]) for who, message in looker.said) == [
        ("anna", "seen", 1, None), ("bob", "mined", 0, {"by": 1}), ("bob", "seen", 1, None)]
    at_once = []
    world.urgent = lambda observer, update: at_once.append((observer, update.event))
    world.emit(rock, 0, "hit")
    world.emit(rock, 1, "later")
    assert at_once == [("bob", "hit")] and [message["event"] for _, message in looker.tick()] == ["later"] * 2


def test_a_world_tells_what_it_counted(looker, caplog):
    world = looker.world
    rock = Rock()
    id = world.add(rock, 0, 0, 0)
    looker.tick()
    rock.health = 1
    looker.tick()
    size = len(json.dumps(looker.messages()[0], separators=(",", ":")))
    assert world.stats(rock)["0"]["updates"] == 2 and world.stats(id)["0"]["subscribers"] == 1 and world.stats(id)["3"]["updates"] == 1
    assert size / 2 < world.stats(id)["0"]["bytes"] / 2 < 2 * size
    stats = world.stats("anna")
    assert (stats["sees"], stats["updates"], stats["transitions"], stats["owed"]) == (3, 4, 3, 0)
    assert stats["bytes"] == sum(each["bytes"] for each in world.stats(id).values())
    report = world.report()
    assert (report["objects"], report["observers"], report["regions"]) == (1, 1, 1) and report["busiest_objects"][id]["type"] == "Rock"
    assert report["channels"]["0"] == world.stats(id)["0"] and report["busiest_observers"] == {"anna": stats}
    assert report["warnings"] == ["channel 3 of Rock reaches 1000 m; beyond 500 m there is much to tell to many"]
    assert "reaches" not in caplog.text                 # it is the channel's usual one

    class Wide(hl.Replicated):
        layers = (hl.Layer(1, 600),)
    for _ in range(2):
        world.remove(world.add(Wide(), 9_000, 0, 0))
    assert caplog.text.count("channel 1 of Wide reaches 600 m") == 1 and len(world.report()["warnings"]) == 2
    before = report["channels"]["0"]["updates"]
    world.remove(id)
    looker.tick()
    world.unobserve("anna")
    assert world.report()["channels"]["0"]["updates"] == before + 1 and world.report()["channels"]["0"]["transitions"] == 2
    assert json.dumps(world.report())


@pytest.mark.parametrize("step, still", [(0.5, 0.0), (8.0, 0.5), (60.0, 0.95)])
def test_random_worlds_are_what_brute_force_says(rng, step, still):
    """Zones after each tick, and what everybody makes of what they were told."""
    looker = Looker(hysteresis=rng.choice((0.05, 0.0, 0.3)), split=rng.choice((3, 50)), merge=1)
    world, rocks, watchers, serial = looker.world, [], {}, itertools.count()
    side = rng.choice((300, 2_500))

    class Pebble(Rock):
        layers = (hl.Layer(0, 40, 60, ("health",)), hl.Layer(5, 45, 7, ("name", "position")))

    def somewhere():
        return [rng.uniform(-side, side), rng.uniform(-side, side), rng.choice((0.0, rng.uniform(-60, 60)))]

    def walk(at):
        return [each + rng.uniform(-step, step) for each in at]
    limited = rng.random() < 0.3
    slow = set()
    for tick in range(int(120 * max(1, SOAK))):
        for _ in range(rng.randrange(4) if len(rocks) > 30 else 30):
            rocks.append(rng.choice((Rock, Pebble))())
            world.add(rocks[-1], *somewhere())
        while len(watchers) < 12 or rng.random() < 0.05:
            watchers[key := next(serial)] = somewhere()
            world.observe(key, *watchers[key])
            if limited and rng.random() < 0.5:
                world.limit(key, 30_000)
        for rock in rocks:
            if rng.random() > still:
                world.move(rock.id, *(somewhere() if rng.random() < 0.01 else walk(rock.position)))
            if rng.random() < 0.1:
                rock.health, rock.name = rng.randrange(5), f"{rng.random()}"
        for key in watchers:
            if rng.random() > still:
                watchers[key] = somewhere() if rng.random() < 0.01 else walk(watchers[key])
                world.move_observer(key, *watchers[key])
        if rng.random() < 0.1:
            key = rng.choice(list(watchers))
            del watchers[key]
            looker.views.pop(key, None)
            world.unobserve(key)
        for _ in range(rng.randrange(4) if len(rocks) > 60 else 0):
            world.remove(rocks.pop(rng.randrange(len(rocks))))
        slow = {key for key in watchers if rng.random() < 0.2}
        looker.tick(ready=lambda key: key not in slow)
        for key in watchers if not limited else ():
            if key not in slow:
                assert looker.views.get(key, hl.SeenWorld()).zones == world.seen_by(key)
    looker.tick(300)                                # nothing moves, all is told
    rocks = {rock.id: rock for rock in rocks}
    for key in watchers:
        view = looker.views.get(key, hl.SeenWorld())
        assert view.zones == world.seen_by(key)
        for id, seen in view.items():
            for channel, properties in seen.channels.items():
                layer = next(each for each in rocks[id].layers if each.channel == channel)
                assert properties == json.loads(json.dumps({name: getattr(rocks[id], name) for name in layer.properties}))


def test_a_tick_costs_what_has_moved_not_what_there_is():
    def calls(count):
        """How many pairs of object and observer a world looks at when three of its objects walk."""
        looker = Looker()
        rocks = [Rock() for _ in range(count)]
        for n, rock in enumerate(rocks):
            looker.world.add(rock, n % 100 * 40, n // 100 * 40, 0)
        for n in range(20):
            looker.world.observe(n, n * 200, n * 100, 0)
        looker.tick(2, check=False)
        looked = 0
        look = looker.world._review

        def count_pairs(observer, who):
            nonlocal looked
            looked += len(who)
            look(observer, who)
        world_class = type(looker.world)
        original_review, original_survey = world_class._review, world_class._survey
        world_class._review = lambda self, observer, who: count_pairs(observer, who)
        world_class._survey = lambda self, observer: pytest.fail("nobody moved far")
        try:
            look = functools.partial(original_review, looker.world)
            for _ in range(20):
                for rock in rocks[:3]:
                    x, y, z = rock.position
                    looker.world.move(rock.id, x + 0.5, y, z)
                looker.tick(check=False)
        finally:
            world_class._review, world_class._survey = original_review, original_survey
        return looked
    few, many = calls(300), calls(3_000)
    assert many <= few * 1.5 + 50


def test_channels_and_observers_have_counted_the_same(rng):
    looker = Looker()
    world, rocks, sent = looker.world, [], collections.Counter()
    for n in range(6):
        world.observe(n, *[rng.uniform(-100, 100) for _ in range(3)])
    world.limit(0, 3_000)
    world.limit(1, 60_000)
    for _ in range(300):
        while len(rocks) < 20 or rng.random() < 0.3:
            rocks.append(Rock())
            world.add(rocks[-1], *[rng.uniform(-200, 200) for _ in range(3)])
        for rock in rng.sample(rocks, 8):
            rock.health, rock.position = rng.random(), [each + rng.uniform(-60, 60) for each in rock.position]
            world.emit(rock, rng.choice((0, 1, 3)), "boom")
        if rng.random() < 0.3:
            world.remove(rocks.pop(rng.randrange(len(rocks))))
        world.observe(rng.randrange(6), *[rng.uniform(-100, 100) for _ in range(3)])
        slow = rng.randrange(6)
        looker.now_ns += TICK
        for observer, updates in world.gather(looker.now_ns, lambda key: key != slow):
            sent[observer.key, "updates"] += len(updates)
            sent[observer.key, "bytes"] += sum(len(update.json()) for update in updates)
    world._check()
    channels = world.report()["channels"].values()
    for name in ("updates", "bytes", "transitions", "left_out", "dropped"):
        assert sum(each[name] for each in channels) == sum(world.stats(n)[name] for n in range(6)), name
    assert all(world.stats(n)[name] == sent[n, name] for n in range(6) for name in ("updates", "bytes"))
    assert world.report()["made"] < sum(sent[n, "updates"] for n in range(6))


def test_a_batch_delays_events_and_drops_none(looker):
    world = looker.world
    world.batch, world.wait_ns = 32, 16_000_000
    rock = Rock()
    world.add(rock, 0, 0, 0)
    looker.tick(3)
    heard = []
    for n in range(90):
        world.emit(rock, 1, "flash", n)
        rock.mood = f"{n}"
        looker.now_ns += 10_000_000 - TICK
        heard += looker.tick()
    heard += looker.tick(2)
    assert [message["data"] for _, message in heard if message["event"] == "flash"] == list(range(90))
    told = [message for _, message in heard if message["event"] == "update"]
    assert abs(len(told) - 27) <= 2                     # 30 a second, as the layer says
    stats = world.stats("anna")
    assert stats["dropped"] == stats["left_out"] == stats["coalesced"] == 0


def test_nobody_is_left_out_for_ever():
    looker = Looker()
    world = looker.world
    world.observe("anna", 0, 0, 0)
    world.bytes_per_s = 2_000
    near = [Rock() for _ in range(5)]
    for rock in near:
        world.add(rock, 1, 0, 0, channels=(0,))
    old = world.add(Rock(), 40, 0, 0, channels=(3,))
    looker.tick(60)
    world.remove(old)
    far = world.add(Rock(), 40, 0, 0, channels=(0,))
    name = world.add(Rock(), 40, 0, 0, channels=(3,))
    for n in range(60 * 8):
        for rock in near:
            rock.health = n
        looker.tick(check=False)
    assert looker.views["anna"].zones == world.seen_by("anna") >= {(far, 0), (name, 3)}


def test_a_budget_can_be_used_up_by_slow_ticks():
    looker = Looker(crossings_per_s=100)
    world = looker.world
    world.observe("anna", 0, 0, 0)
    world.bytes_per_s = 5_000
    rocks = [Rock() for _ in range(50)]
    for rock in rocks:
        world.add(rock, 1, 0, 0, channels=(0,))
    looker.tick()
    for n in range(50):                                 # five a second
        for rock in rocks:
            rock.health = n
        looker.now_ns += 200_000_000 - TICK
        looker.tick(check=False)
    assert 0.85 * 50_000 < world.stats("anna")["bytes"] <= 1.15 * 50_000
    looker.now_ns = 0                                   # a clock that goes back harms nothing
    looker.tick()
    for rock in rocks:
        rock.health = -1
    looker.tick(120)
    assert looker.views["anna"][rocks[0].id].health == -1


def test_critical_events_are_charged_too(looker):
    world, heard = looker.world, []
    rock = Rock()
    world.add(rock, 0, 0, 0)
    world.limit("anna", 1_000)
    looker.tick(60)
    world.urgent = lambda observer, update: heard.append(update)
    for n in range(60):
        world.emit(rock, 0, "hit", "x" * 100)
        rock.health = n
        looker.tick(check=False)
    assert len(heard) == 60 and looker.views["anna"][rock.id].health in (100, 0)        # they had it all
    looker.tick(60 * 15)
    assert looker.views["anna"][rock.id].health == 59


def test_nobody_hears_of_an_event_before_the_thing():
    looker = Looker(crossings_per_s=1)
    world, heard = looker.world, []
    world.observe("anna", 0, 0, 0)
    rocks = [Rock() for _ in range(8)]
    for rock in rocks:
        world.add(rock, 1, 0, 0, channels=(0, 1))
    looker.tick()
    world.urgent = lambda observer, update: heard.append(update.object_id)
    known = [rock.id for rock in rocks if (rock.id, 0) in looker.views["anna"].zones]
    assert len(known) == 1 and sum(world.emit(rock, 0, "boom") for rock in rocks) == 1 and heard == known
    assert world.stats("anna")["dropped"] == 7 == world.report()["channels"]["0"]["dropped"]
    unknown = next(rock for rock in rocks if rock.id not in known)
    last, unknown.health = unknown.id, 0                # nor its last words
    world.remove(last)
    assert not [message for _, message in looker.tick(60) if message["object_id"] == last]


def test_a_property_may_change_the_world_while_it_is_told():
    looker = Looker()
    world = looker.world

    class Trap(Rock):
        spring = False

        @property
        def mood(self):
            if self.spring:
                self.spring = False
                world.observe(f"{len(self.loot)}", 0, 0, 0)
                world.unobserve("bob")
                world.remove(self)
                raise Unspeakable
            return "calm"

    class Unspeakable(Exception):
        def __repr__(self):
            raise ValueError
        __str__ = __repr__
    for key in ("anna", "bob", "carl"):
        world.observe(key, 0, 0, 0)
    trap, rock = Trap(), Rock()
    for each in (trap, rock):
        world.add(each, 0, 0, 0)
    looker.tick(4)
    rock.health, trap.spring = 5, True
    trap.touch("mood")
    rock.mood = "told"
    looker.tick(4)
    assert trap.id == "" and not world.observes("bob") and world.observes("0")
    assert {looker.views[key][rock.id].mood for key in ("anna", "carl")} == {"told"}
    trap.spring = True
    trap.mood_is = 1
    with pytest.raises(AttributeError):
        trap.mood = 4                                   # it has no setter, and the getter does not matter


def test_moves_that_are_lost_in_sums_are_seen():
    looker = Looker()
    world = looker.world
    world.observe("anna", 0, 0, 0)
    runner, edge = Rock(), Rock()
    world.add(runner, 1e9, 0, 0)
    id = world.add(edge, math.nextafter(50, 99), 0, 0, channels=(0,))
    others = [world.add(Rock(), 1e9, n, 0) for n in range(3)]
    for n in range(60):                                 # the drift of all grows
        for other in (runner.id, *others):
            world.move(other, 1e9 + n * 1_000, 0, 0)
        looker.tick(check=False)
    assert (id, 0) not in world.seen_by("anna")
    world.move(id, 50.0, 0, 0)
    looker.tick()
    assert (id, 0) in world.seen_by("anna")
    for far in (1e15, 1e20, 1e25, 1e37):
        for n in range(30):
            place = far * (1 + n / 7), -far, far / 3
            world.observe("far", *place)
            world.move(id, *place)
            looker.tick(check=False)
            assert (id, 0) in world.seen_by("far")


def test_churn_leaves_nothing_behind():
    looker = Looker()
    world = looker.world
    world.observe("anna", 0, 0, 0)

    class Slow(hl.Replicated):
        layers = (hl.Layer(0, 50, 0.001, ("health",)),)
        health = 1
    mover = Rock()
    world.add(mover, 49.9, 0, 0)
    stones = [Rock() for _ in range(99)]
    for stone in stones:
        world.add(stone, 49, 0, 0)
    looker.tick()
    survey = sys.getsizeof(world._observers["anna"].who)
    for n in range(1_500):
        rock = Slow() if n % 2 else Rock()
        world.add(rock, 49.9, 0, 0)
        world.move(mover.id, 49.9 + n % 5 / 1_000, 0, 0)
        looker.tick(check=False)
        rock.health = n
        world.remove(rock)
    assert len(world._observers["anna"].who) < 2_000 and sys.getsizeof(world._observers["anna"].who) < 20_000 + survey
    assert len(world._observers["anna"].debts) < 5 and len(world._remade) < 10
    del rock
    for n in range(50):
        kind = type(f"Kind{n}", (hl.Replicated,), {"layers": (hl.Layer(n % 8, 10 * (n + 1), n + 1.5, ("position",)),)})
        world.remove(world.add(kind(), 0, 0, 0))
    looker.tick()
    assert len(world._plans) == 1 and len(world._wheels) == 3 and world._reach == pytest.approx(1_050)
    looker.tick(2)
    gc.collect()
    assert sum(type(each) is Slow for each in gc.get_objects()) < 1_500      # at most until the next survey
    world._observers["anna"].limit = -math.inf
    looker.tick(2)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Slow]


@pytest.mark.parametrize("hz, ticks", [(60, 65), (18, 20), (900, 1000), (60, 250), (30, 34), (5, 20)])
def test_no_channel_is_told_more_often_than_it_says(hz, ticks):
    looker = Looker()
    looker.world.observe("anna", 0, 0, 0)
    kind = type("Busy", (hl.Replicated,), {"layers": (hl.Layer(0, 50, hz, ("n",)),), "n": 0})
    busy = kind()
    looker.world.add(busy, 0, 0, 0)
    looker.tick()
    told = 0
    for n in range(4 * ticks):
        busy.n = n + 1
        looker.now_ns += 1_000_000_000 // ticks - TICK
        told += len(looker.tick(check=False))
    assert 0.97 * hz - 1 <= told / 4 <= 1.005 * hz + 0.5


def test_what_waited_in_a_batch_is_told_as_it_is_by_then():
    class Pebble(Rock):
        layers = (hl.Layer(1, 50, 60, ("health",)),)
    for rate, held in ((1e6, ""), (0, "p")):
        looker = Looker()
        world = looker.world
        world.batch, world.wait_ns, world.bytes_per_s = 32, 100_000_000, rate
        pebble = Pebble()
        world.add(pebble, 0, 0, 0)
        for key in ("o", "p"):
            world.observe(key, 0, 0, 0)
        looker.tick(20)
        pebble.health = 2
        looker.tick(ready=lambda key: key != held)
        pebble.health = 3
        looker.tick(ready=lambda key: key != "o" or not held)
        looker.tick(60)
        assert {key: view[pebble.id].health for key, view in looker.views.items()} == {"o": 3, "p": 3}


def test_a_zone_is_seen_when_larger_ones_have_gone():
    for region in (16, 100, 1000):
        looker = Looker(16, region)
        world = looker.world
        wide = type("Wide", (hl.Replicated,), {"layers": (hl.Layer(3, 1000),)})()
        world.add(wide, 0, 500, 0)
        world.observe("o", 0, 0, 0)
        for n in range(27):
            world.move_observer("o", n * 5, 0, 0)
            looker.tick()
        world.remove(wide)
        id = world.add(Rock(), 27 * 5 + 120, 0, 0, channels=(0,))
        for n in range(27, 43):
            world.move_observer("o", n * 5, 0, 0)
            looker.tick()
        assert world.seen_by("o") == {(id, 0)}


def test_a_limit_of_crossings_delays_no_updates():
    looker = Looker(crossings_per_s=5)
    world = looker.world
    world.observe("anna", 0, 0, 0)
    rock = Rock()
    world.add(rock, 0, 0, 0, channels=(0,))
    looker.tick(2)
    for n in range(300):
        world.add(Rock(), n % 7, 0, 0)
    told = 0
    for n in range(60):
        rock.health = n
        told += sum(message.get("event") == "update" for _, message in looker.tick(check=False))
    assert told >= 58
    looker.now_ns += 60_000_000_000                     # after a pause it is a second's, not a minute's
    assert len(looker.tick(check=False)) <= 6


def test_limits_stay_with_who_goes_and_comes():
    looker = Looker(crossings_per_s=5)
    world = looker.world
    world.limit("anna", 2_000)                          # before she observes
    for n in range(50):
        world.add(Rock(), n, 0, 0, channels=(0,))
    told = 0
    for _ in range(120):
        world.observe("anna", 0, 0, 0)
        told += len(looker.tick(check=False))
        world.blind("anna")
    assert told <= 12 and world._terms["anna"].bytes_per_s == 2_000
    world.unobserve("anna")
    assert not world._terms


def test_a_second_is_the_most_that_critical_events_cost_the_rest(looker):
    world = looker.world
    rock = Rock()
    world.add(rock, 0, 0, 0)
    world.limit("anna", 5_000)
    looker.tick(60)
    world.urgent = lambda observer, update: None
    for n in range(300):
        world.emit(rock, 0, "boom", "y" * 500)
    rock.mood = "later"
    looker.tick(90)
    assert looker.views["anna"][rock.id].mood == "later"


def test_lags_are_of_changes_that_have_a_time(looker):
    world = looker.world
    rock = Rock()
    world.add(rock, 0, 0, 0)
    looker.tick(5)
    rock.position = 99, 0, 0
    looker.tick(ready=lambda key: False)
    rock.position = 0, 0, 0
    world.gather(looker.now_ns)                         # and a tick at the same time
    assert all(key is None or key[1] for key in world.lags)
    assert world.stats("anna")["left_out"] >= 0 and world.stats(rock)["0"]["left_out"] >= 0


def test_a_world_without_ticks_knows_when_it_has_to_be_looked_at():
    looker = Looker()
    world = looker.world
    assert world.wait_s() == math.inf
    world.add(Rock(), 0, 0, 0)
    looker.tick(3)
    assert world.wait_s() == math.inf
    for change in (lambda: world.observe("o", 0, 0, 0), lambda: world.move_observer("o", 5, 0, 0), lambda: world.add(Rock(), 0, 0, 0),
                   lambda: world.move(next(iter(world)), 1, 0, 0), lambda: setattr(next(iter(world)), "health", 5)):
        change()
        assert world.wait_s() < 0.1
        looker.tick(20)
        assert world.wait_s() == math.inf


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_makes_an_object_outside(protocol):
    rock = pickle.loads(pickle.dumps(Rock(), protocol))
    assert "no world" in repr(rock) and hl.World().add(rock, 0, 0, 0)


def test_getters_that_end_others_end_nothing_else():
    looker = Looker()
    world = looker.world

    class Bomb(Rock):
        fuse = None

        @property
        def mood(self):
            fuse, self.fuse = self.fuse, None
            if fuse:
                fuse()
            return "calm"
    bomb, victim, rock = Bomb(), Rock(), Rock()
    for key in ("anna", "bob"):
        world.observe(key, 0, 0, 0)
    for each in (bomb, victim, rock):
        world.add(each, 0, 0, 0)
    bomb.fuse = lambda: world.remove(victim)            # while all are told that it is there
    looker.tick()
    assert len(world) == 2
    looker.tick(5)
    assert all(looker.views[key].zones == world.seen_by(key) for key in ("anna", "bob"))
    bomb.touch("mood")
    bomb.fuse = lambda: world.remove(bomb)
    world.remove(bomb)                                  # in its own last words
    looker.tick(5)
    assert len(world) == 1 and all(looker.views[key].zones == world.seen_by(key) for key in ("anna", "bob"))
    late = Bomb()
    late.fuse = lambda: world.unobserve("bob")
    world.add(late, 0, 0, 0)
    looker.tick(5)
    assert world.observers() == 1 and world.stats(late)["1"]["subscribers"] == 1
    assert [each.wheel.subscribers for each in world._find(rock).shares] == [2, 2, 2]


def test_many_who_wait_cost_little_while_they_wait():
    """What stands in the way of a limit is put in order now and then, not every tick."""
    looker = Looker(crossings_per_s=5)
    world = looker.world
    for n in range(10):
        world.observe(n, 0, 0, 0)
    for n in range(300):
        world.add(Rock(), n % 10, 0, 0)
    looker.tick(check=False)
    distances = []
    original = type(world)._make_plan

    def counting(self, observer, now_ns):
        before = observer.planned_ns
        original(self, observer, now_ns)
        distances.append(observer.planned_ns != before)
    type(world)._make_plan = counting
    try:
        looker.tick(60, check=False)
    finally:
        type(world)._make_plan = original
    assert len(distances) == 600 and sum(distances) <= 10 * 6
    assert sum(world.stats(n)["updates"] for n in range(10)) <= 10 * 7


@pytest.mark.parametrize("attempt", [
    lambda world: world.add(Rock(), decimal.Decimal("nan"), 0, 0), lambda world: world.add(Rock(), 0, 0, 0, channels=7), lambda world: hl.Layer(0, properties=5),
    lambda world: world.add(Rock(), 0, 0, 0, channels=(True,)), lambda world: hl.World(crossings_per_s="x"), lambda world: world.observe([], 0, 0, 0),
    lambda world: world.stats([]), lambda world: world.seen_by({}), lambda world: hl.World(1e-300, 1e-300), lambda world: world.emit(Rock(), 0, "x")])
def test_odd_values_are_the_callers_mistake(attempt):
    with pytest.raises(hl.UsageError):
        attempt(hl.World())


def test_layers_set_later_are_checked_when_something_is_added():
    class Late(hl.Replicated):
        pass
    Late.layers = [hl.Layer(0)] * 9
    with pytest.raises(hl.UsageError, match="twice"):
        hl.World().add(Late(), 0, 0, 0)


def test_a_hundred_thousand_teleports_are_one_for_a_tick(looker):
    rock = Rock()
    id = looker.world.add(rock, 0, 0, 0)
    for n in range(100_000):
        looker.world.move(id, n % 7 * 1_000, 0, 0)
    looker.world.move(id, 1, 0, 0)
    assert len(looker.tick()) == 3 and len(looker.world._moved) == 0


# =============================================================================
# 12  TICKS
# =============================================================================

def test_a_ticker_owes_nothing_before_the_first_period():
    clock = FakeClock()
    ticker = hl.Ticker(20, clock)
    clock.now_ns = 49 * MS
    assert ticker.take_due() == 0 and ticker.wait_s() == pytest.approx(0.001)
    clock.now_ns = 50 * MS
    assert ticker.take_due() == 1 and ticker.take_due() == 0


def test_a_ticker_catches_up_at_most_five_ticks_after_a_stall():
    clock = FakeClock()
    ticker = hl.Ticker(20, clock)
    clock.now_ns = 1000 * MS
    assert ticker.take_due() == 5 and ticker.dropped == 15 and ticker.take_due() == 0


@pytest.mark.parametrize("hz", [50, 60, 7, 0.3, 999])
def test_a_ticker_does_not_drift_in_ten_minutes(hz, rng):
    clock = FakeClock()
    ticker = hl.Ticker(hz, clock, max_catchup=1 << 30)
    run = 0
    while clock.now_ns < 600 * 1000 * MS:
        clock.now_ns += rng.randrange(1, 3 * ticker.period_ns)
        run += ticker.take_due()
    assert abs(run - clock.now_ns * hz / 1e9) <= 1


def test_a_catch_up_of_nought_means_no_limit():
    clock = FakeClock()
    ticker = hl.Ticker(10, clock, max_catchup=0)
    clock.now_ns = 1000 * MS
    assert ticker.take_due() == 10 and ticker.dropped == 0


@pytest.mark.parametrize("hz", [0, -1, math.nan, math.inf, 1e9, 1e-300])
def test_a_ticker_refuses_rates_that_can_not_be(hz):
    with pytest.raises(hl.UsageError):
        hl.Ticker(hz)


class Item:
    """Something for an outbox."""

    topic = "t"
    numbers = itertools.count()

    def __init__(self, name, size=10, critical=False, key=None):
        self.name, self.size, self.critical, self.key = name, size, critical, key
        self.seq = next(Item.numbers)

    def replaces(self, older):
        return self

    def measure(self):
        return self.size


def names(outbox):
    return [item.name for item in outbox.items]


def test_an_outbox_drops_the_oldest_droppable_first():
    outbox = hl.Outbox(3, 1000)
    for name, critical in (("a", False), ("b", True), ("c", False), ("d", False), ("e", True)):
        outbox.put(Item(name, critical=critical))
    assert names(outbox) == ["b", "d", "e"] and outbox.dropped == 2 and outbox.size == 30
    assert [item.name for item in outbox.take()] == ["b", "d", "e"] and outbox.size == 0


def test_an_outbox_keeps_the_newest_of_a_key():
    outbox = hl.Outbox(3, 1000)
    outbox.put(Item("old", key="k", size=10))
    outbox.put(Item("other"))
    outbox.put(Item("new", key="k", size=30))
    assert names(outbox) == ["new", "other"] and outbox.coalesced == 1 and outbox.size == 40


def test_an_outbox_is_bounded_in_bytes_together_with_what_is_under_way():
    outbox = hl.Outbox(100, 100)
    outbox.put(Item("a", size=60))
    outbox.put(Item("b", size=60))
    assert names(outbox) == ["b"]
    outbox.put(Item("c", size=60), ahead=50)
    assert names(outbox) == [] and outbox.dropped == 3 and outbox.size == 0


def test_a_droppable_item_never_makes_a_peer_slow():
    outbox = hl.Outbox(10, 100)
    outbox.put(Item("a", size=10), ahead=200)
    assert outbox.items == () and outbox.dropped == 1
    outbox.put(Item("b", size=10, critical=True))
    with pytest.raises(hl.SlowPeer):
        outbox.put(Item("c", size=10), ahead=200)


def test_critical_items_are_never_dropped_and_end_in_slow_peer():
    outbox = hl.Outbox(2, 1000)
    outbox.put(Item("a", critical=True))
    outbox.put(Item("b", critical=True))
    with pytest.raises(hl.SlowPeer):
        outbox.put(Item("c", critical=True))
    assert outbox.dropped == 0


def test_an_outbox_agrees_with_a_naive_one(rng):
    for _ in range(int(50 * SOAK)):
        limit, size = rng.randint(1, 6), rng.randint(20, 200)
        outbox, plain = hl.Outbox(limit, size), []
        with contextlib.suppress(hl.SlowPeer):
            for n in range(60):
                item = Item(n, rng.randint(1, 40), rng.random() < .2, rng.choice([None, None, "x", "y"]))
                old = [i for i, each in enumerate(plain) if item.key and each.key == item.key]
                if old:
                    del plain[old[0]]
                plain.append(item)
                while len(plain) > limit or sum(each.size for each in plain) > size:
                    rest = sorted((each for each in plain if not each.critical),
                                  key=lambda each: (each.key is not None, plain.index(each)))
                    if not rest:
                        break
                    plain.remove(rest[0])
                outbox.put(item)
                assert sorted(outbox.items, key=lambda each: each.seq) == plain and outbox.size == sum(each.size for each in plain)

def test_batches_are_what_a_naive_batcher_makes(rng):
    for _ in range(int(60 * SOAK)):
        clock, got, added = FakeClock(), [], 0
        size, wait = rng.randint(1, 6), rng.choice([0, 5, 20])
        batcher = hl.Batcher(lambda items: got.append((clock.now_ns, items)), size, wait, clock=clock)
        since = {}
        for _ in range(100):
            clock.now_ns += rng.randrange(8) * 1_000_000
            if batcher.due():
                assert batcher.wait_s() == 0 and batcher.flush() is True
            if rng.random() < .7:
                since[added] = clock.now_ns
                batcher.add(added, immediate=rng.random() < .1)
                added += 1
            assert len(batcher) < size and batcher.wait_s() <= wait / 1000 or not batcher
        batcher.flush()
        assert [item for _, items in got for item in items] == list(range(added))
        assert all(0 < len(items) <= size for _, items in got) and len({id(items) for _, items in got}) == len(got)
        assert all(when - since[items[0]] <= (wait + 8) * 10**6 for when, items in got[:-1])
    assert hl.Batcher(print).wait_s() == math.inf


def test_a_batch_is_never_given_twice_and_what_is_refused_waits():
    clock, got, free = FakeClock(), [], [True]
    def take(items):
        if not free[0]:
            return False
        got.append(items)
    batcher = hl.Batcher(take, max_size=3, max_wait_ms=5, max_pending=5, clock=clock)
    for n in range(3):
        batcher.add(n)
    first = got[0]
    free[0] = False
    for n in range(3, 10):
        batcher.add(n)
    clock.now_ns += 10**9
    assert first == [0, 1, 2] and len(batcher) == 5 and batcher.dropped == 2 and not batcher.due() and batcher.wait_s() == math.inf
    assert not batcher.flush()
    free[0] = True
    assert batcher.flush() and got == [[0, 1, 2], [5, 6, 7], [8, 9]] and first is got[0]
    batcher.add("a")
    batcher.add("b", immediate=True)
    assert got[-1] == ["a", "b"]
    for overflow, kept in (("newest", [0, 1, 2]), ("refuse", [0, 1, 2])):
        free[0] = False
        batcher = hl.Batcher(take, max_size=2, max_pending=3, overflow=overflow, clock=clock)
        for n in range(4):
            if n == 3 and overflow == "refuse":
                with pytest.raises(hl.LimitError):
                    batcher.add(n)
            else:
                batcher.add(n)
        free[0] = True
        batcher.flush()
        assert [*got[-2], *got[-1]] == kept and batcher.dropped == (overflow == "newest")
    for bad in ({"max_size": 0}, {"max_size": 1.5}, {"max_wait_ms": -1}, {"max_size": 5, "max_pending": 4}, {"overflow": "latest"}):
        with pytest.raises(hl.UsageError):
            hl.Batcher(print, **bad)


def test_a_batch_that_fails_is_told_to_who_added_and_the_rest_goes_on():
    got = []
    def take(items):
        if "boom" in items:
            raise ValueError(items)
        got.append(items)
    batcher = hl.Batcher(take, max_size=2, max_wait_ms=0)
    batcher.add(1)
    with pytest.raises(ValueError):
        batcher.add("boom")
    batcher.add(2)
    batcher.flush()
    assert got == [[2]]


# =============================================================================
# 13  PROTOCOLS
# =============================================================================

def http_events(data, **limits):
    connection = hl.HTTPConnection(**limits)
    connection.receive(data)
    events = []
    while requests := connection.take_events():
        events += requests
    return events


def test_a_request_is_the_same_in_every_split():
    stream = (b"\r\nPOST /a%20b?q=1 HTTP/1.1\r\nHost: h\r\nX-Twice: a\r\nx-twice: b\r\nContent-Length: 5\r\n\r\nhello"
              b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: t\r\n\r\n"
              b"GET http://h/abs HTTP/1.0\r\n\r\n")
    for cut in range(len(stream) + 1):
        connection, requests = hl.HTTPConnection(), []
        for piece in (stream[:cut], stream[cut:]):
            connection.receive(piece)
            while got := connection.take_events():
                requests += got
        assert [(r.method, r.path, r.query, r.body) for r in requests] == [
            ("POST", "/a b", "q=1", b"hello"), ("POST", "/c", "", b"abcde"), ("GET", "/abs", "", b"")]
        assert requests[0].headers["x-twice"] == "a, b"
        assert [r.keep_alive for r in requests] == [True, True, False]
    assert len(http_events(stream)) == 3


H = b"GET / HTTP/1.1\r\nHost: h\r\n"


@pytest.mark.parametrize("data, status", [
    (b"\x16\x03\x01\x02\0\x01\0", 400), (b"garbage\r\n\r\n", 400), (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\nHost: h\n\n", 400), (b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505), (b"G@T / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET x HTTP/1.1\r\nHost: h\r\n\r\n", 400), (H + b"A : b\r\n\r\n", 400), (H + b"A: b\r\n c\r\n\r\n", 400),
    (H + b"A: b\rc\r\n\r\n", 400), (H + b"A: b\0\r\n\r\n", 400), (H + b"Host: i\r\n\r\n", 400),
    (H + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", 400), (H + b"Content-Length: +1\r\n\r\n", 400),
    (H + b"Content-Length: 1, 1\r\n\r\n", 400), (H + b"Content-Length: 99999999\r\n\r\n", 413),
    (H + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (H + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400), (H + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 400),
    (H + b"Transfer-Encoding: chunked\xa0\r\n\r\n", 501), (H + b"Transfer-Encoding: \x85chunked\r\n\r\n", 501),
    (H + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501), (H + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    (H + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400), (H + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
    (H + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n", 400),
    (H + b"Transfer-Encoding: chunked\r\n\r\n2;x\ny\r\nab\r\n", 400),
    (H + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: b\nGET /evil HTTP/1.1\r\n\r\n", 400),
    (H + b"Transfer-Encoding: chunked\r\n\r\n0\r\nnonsense\r\n\r\n", 400),
    (H + b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n", 413),
    (b"GET /" + b"a" * 20_000, 414), (H + b"A: " + b"a" * 20_000, 431), (H + b"A: b\r\n" * 5_000, 431),
    (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    (b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n", 501), (b"get / HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    (b"POST / HTTP/1.1\r\nHost: h\r\n\r\n", 411), (b"PUT / HTTP/1.0\r\n\r\n", 411), (H + b"Expect: tea\r\n\r\n", 417),
    (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: h/x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h, i\r\n\r\n", 400), (b"GET http://a@h/ HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", 400), (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    (b"GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400), (H + b"Content-Length: 5, 5\r\n\r\nhello", 400),
    (H + b"Transfer-Encoding : chunked\r\n\r\n", 400), (H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (H.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n", 400), (H + b"Content-Length: \xb2\r\n\r\n", 400),
    (H + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n", 400), (H + b"\r: b\r\n\r\n", 400),
])
def test_bad_requests_get_their_status(data, status):
    with pytest.raises(hl.PeerError) as caught:
        http_events(data)
    assert caught.value.http_status == status and caught.value.label


def test_after_a_fault_nothing_more_is_read_from_a_connection():
    connection = hl.HTTPConnection()
    connection.receive(H + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + H + b"\r\n")
    for _ in range(3):
        with pytest.raises(hl.FrameError):
            connection.take_events()


def test_limits_do_not_depend_on_how_the_bytes_are_cut():
    head = H + b"X: " + b"x" * 167 + b"\r\n\r\n"
    for size, data in ((len(head) - 4, head), (len(head) - 5, head), (1_000, H + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 252 + b"\r\n")):
        outcomes = set()
        for cut in range(len(data) + 1):
            connection = hl.HTTPConnection(size)
            try:
                for piece in (data[:cut], data[cut:]):
                    connection.receive(piece)
                    connection.take_events()
                outcomes.add("ok")
            except hl.PeerError as error:
                outcomes.add(error.label)
        assert len(outcomes) == 1, outcomes


def test_trailers_take_linear_time_and_are_bounded():
    def cost(lines):
        connection = hl.HTTPConnection(1 << 20)
        connection.receive(H + b"Transfer-Encoding: chunked\r\n\r\n0\r\n")
        connection.take_events()
        began = time.process_time()
        for byte in b"a:\r\n" * lines:
            connection.receive(bytes((byte,)))
            assert connection.take_events() == []
        connection.receive(b"\r\n")
        assert len(connection.take_events()) == 1
        return time.process_time() - began
    assert min(cost(4_000) for _ in range(3)) < 20 * min(cost(500) for _ in range(3))      # 64, if it were quadratic
    with pytest.raises(hl.TooBig):
        http_events(H + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 5_000)


def test_a_request_is_easy_to_ask():
    ask, = http_events(b"GET http://Other:81/x?token=t&a=1&a=%20b&c HTTP/1.1\r\nHost: h\r\nCookie: a=1; b = \"two\" ; a=3\r\n\r\n")
    assert ask.args == {"token": "t", "a": " b", "c": ""} and ask.cookies == {"a": "1", "b": "two"}
    assert ask.token == "t" and ask.headers["host"] == "Other:81"      # RFC 9112 3.2.2: of the target
    ask, = http_events(H + b"Authorization: bEARER  abc.d\r\nContent-Length: 7\r\n\r\n{\"a\":1}")
    assert ask.token == "abc.d" and ask.json() == {"a": 1} and ask.cookies == {}
    ask.body = b"{"
    with pytest.raises(hl.FrameError, match="JSON"):
        ask.json()
    assert http_events(H + b"Authorization: Basic eA==\r\n\r\n")[0].token == ""


def test_a_response_says_what_it_is():
    assert hl.Response({"a": 1}).encode() == (
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n{"a":1}')
    assert hl.Response("<p>hi").headers["Content-Type"].startswith("text/html")
    assert hl.Response("x").encode(head_only=True, close=True).endswith(b"Connection: close\r\nContent-Length: 1\r\n\r\n")
    assert hl.Response("ignored", status=204).encode().endswith(b"\r\n\r\n")
    assert b"Content-Length" not in hl.Response(status=204).encode()
    for wrong in (lambda: hl.Response(5), lambda: hl.Response("", headers={"a b": "c"}),
                  lambda: hl.Response("", headers={"a": "b\r\nc: d"}), lambda: hl.Response("", headers={"a": ["b", 5]}),
                  lambda: hl.Response("", headers={"content-length": "3"})):
        with pytest.raises(hl.UsageError):
            wrong()


def test_the_accept_key_of_the_rfc():
    assert hl._accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def take(role, data, limit=1 << 20):
    ws = hl.WebSocketConnection(role, limit)
    ws.receive(data)
    events = []
    while got := ws.take_events():
        events += got
    return events


@pytest.mark.parametrize("role, data, events", [      # RFC 6455 5.7
    ("client", "81 05 48 65 6c 6c 6f", ["Hello"]),
    ("server", "81 85 37 fa 21 3d 7f 9f 4d 51 58", ["Hello"]),
    ("client", "01 03 48 65 6c 80 02 6c 6f", ["Hello"]),
    ("client", "89 05 48 65 6c 6c 6f", [hl.Ping(b"Hello")]),
    ("server", "8a 85 37 fa 21 3d 7f 9f 4d 51 58", [hl.Pong(b"Hello")]),
    ("client", "82 7e 01 00" + " 00" * 256, [bytes(256)]),
    ("client", "82 7f 00 00 00 00 00 01 00 00" + " 00" * 65536, [bytes(65536)]),
    ("client", "88 00", [hl.Close(1005, "")]), ("client", "88 02 03 e8", [hl.Close(1000, "")]),
    ("client", "01 01 61 89 00 00 01 62 80 01 63", [hl.Ping(b""), "abc"]),
    ("client", "01 01 e2 00 01 82 80 01 ac", ["\u20ac"]), ("client", "81 00 82 00", ["", b""]),
    ("client", "88 02 03 e8 81 01 61", [hl.Close(1000, "")]),
])
def test_frames_of_the_rfc(role, data, events):
    assert take(role, bytes.fromhex(data)) == events


def masked(first, payload=b"", length=None):
    head = bytes([first]) + (bytes([0x80 | len(payload)]) if length is None else length)
    return head + b"\1\2\3\4" + hl._mask(payload, b"\1\2\3\4")


@pytest.mark.parametrize("data, code, label", [
    (b"\x81\x01a", 1002, "unmasked"), (masked(0xC1), 1002, "reserved_bit"), (masked(0xA1), 1002, "reserved_bit"),
    (masked(0x83), 1002, "reserved_opcode"), (masked(0x8B), 1002, "reserved_opcode"),
    (masked(0x09), 1002, "bad_control"), (masked(0x89, b"x" * 126, b"\xfe\0\x7e"), 1002, "bad_control"),
    (masked(0x80), 1002, "bad_fragment"), (masked(0x01, b"a") + masked(0x81, b"b"), 1002, "bad_fragment"),
    (masked(0x81, b"a", b"\xfe\0\1"), 1002, "bad_length"), (masked(0x82, b"", b"\xff" + b"\0" * 6 + b"\1\0"), 1002, "bad_length"),
    (masked(0x82, b"", b"\xff\x80" + b"\0" * 7), 1002, "bad_length"), (masked(0x81, b"\xff"), 1007, "bad_utf8"),
    (masked(0x01, b"\xe2") + masked(0x00, b"\x28"), 1007, "bad_utf8"), (masked(0x01, b"\xe2\x82") + masked(0x80), 1007, "bad_utf8"),
    (masked(0x81, b"\xed\xa0\x80"), 1007, "bad_utf8"),
    (masked(0x82, b"", b"\xff\0\0\0\0\x7f\xff\xff\xff"), 1009, "message_too_big"),
    (masked(0x88, b"\3"), 1002, "bad_close"), (masked(0x88, b"\3\xed"), 1002, "bad_close"),
    (masked(0x88, b"\x0b\xb7"), 1002, "bad_close"), (masked(0x88, b"\3\xe8\xff"), 1007, "bad_utf8"),
    (masked(0x88, b"\0\0"), 1002, "bad_close"), (masked(0x88, b"\x13\x88"), 1002, "bad_close"),
])
def test_broken_frames_end_with_their_code_in_every_split(data, code, label):
    for cut in range(len(data) + 1):
        ws = hl.WebSocketConnection("server", 1 << 20)
        with pytest.raises(hl.PeerError) as caught:
            for piece in (masked(0x81, b"fine"), data[:cut], data[cut:], b""):
                ws.receive(piece)
                while ws.take_events():
                    pass
        assert (caught.value.close_code, caught.value.label) == (code, label)
        with pytest.raises(hl.PeerError):
            ws.take_events()


def test_what_came_before_a_fault_is_returned_first():
    ws = hl.WebSocketConnection("server")
    ws.receive(masked(0x81, b"fine") + masked(0x83))
    assert ws.take_events() == ["fine"]
    with pytest.raises(hl.FrameError):
        ws.take_events()


def test_a_message_in_fragments_is_bounded_before_it_is_stored():
    ws = hl.WebSocketConnection("client", 10)
    ws.receive(b"\x02\x06abcdef\x00\x05")
    with pytest.raises(hl.TooBig):
        ws.take_events()
    assert take("client", b"\x02\x06abcdef\x80\x04ghij", 10) == [b"abcdefghij"]


def test_empty_fragments_do_not_grow_memory():
    ws = hl.WebSocketConnection("client", 10)
    ws.receive(b"\x01\x00" + b"\x00\x00" * 10_000 + b"\x80\x01a")
    assert ws.take_events() == ["a"] and ws.frames == 10_002
    ws.receive(b"\x02\x00" + b"\x00\x00" * 10_000)
    assert ws.take_events() == [] and not ws._incoming.data


HELLO = b"\xf2\x48\xcd\xc9\xc9\x07\x00"


@pytest.mark.parametrize("data, events", [            # RFC 7692 7.2.3
    (b"\xc1\x07" + HELLO, ["Hello"]), (b"\x41\x03" + HELLO[:3] + b"\x80\x04" + HELLO[3:], ["Hello"]),
    (b"\xc1\x07" + HELLO + b"\xc1\x05\xf2\x00\x11\x00\x00", ["Hello", "Hello"]),
    (b"\xc1\x0b\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00", ["Hello"]),
    (b"\xc1\x08\xf3\x48\xcd\xc9\xc9\x07\x00\x00", ["Hello"]),
    (b"\xc1\x0d\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00", ["Hello"]),
    (b"\xc1\x08\xf3\x48\xcd\xc9\xc9\x07\x00\x00\xc1\x07" + HELLO, ["Hello", "Hello"]),
    (b"\xc2\x01\x00\x81\x01x", [b"", "x"]), (b"\x41\x03" + HELLO[:3] + b"\x89\x00\x80\x04" + HELLO[3:], [hl.Ping(b""), "Hello"]),
])
def test_compressed_frames_of_the_rfc_in_every_split(data, events):
    for cut in range(len(data) + 1):
        ws, got = hl.WebSocketConnection("client", 100, hl.Deflate(receive_takeover=True)), []
        for piece in (data[:cut], data[cut:]):
            ws.receive(piece)
            got += ws.take_events()
        assert got == events


@pytest.mark.parametrize("data, code, label", [
    (b"\xc9\x00", 1002, "reserved_bit"), (b"\x41\x00\xc0\x00", 1002, "reserved_bit"), (b"\xe1\x00", 1002, "reserved_bit"),
    (b"\xa1\x00", 1002, "reserved_bit"), (b"\xc1\x02\xff\xff", 1007, "bad_deflate"),
    (b"\xc1\x7e\x00\x80" + b"\x03\x00" * 64, 1007, "bad_deflate"),
    (b"\xc1\x05" + hl._squeeze(hl._deflater(15), b"\xff")[:5], 1007, "bad_utf8"),
    (b"\xc2\x7e\x10\x00", 1009, "message_too_big"),
])
def test_broken_compressed_frames_end_with_their_code(data, code, label):
    ws = hl.WebSocketConnection("client", 100, hl.Deflate())
    ws.receive(data)
    with pytest.raises(hl.PeerError) as caught:
        ws.take_events()
    assert (caught.value.close_code, caught.value.label) == (code, label)


def test_a_bomb_costs_nothing():
    bomb = hl._squeeze(hl._deflater(15), bytes(50_000_000))         # 48 KB
    ws = hl.WebSocketConnection("client", 65_536, hl.Deflate())
    tracemalloc.start()
    try:
        ws.receive(hl._frame(hl._BINARY | hl._COMPRESSED, bomb))
        with pytest.raises(hl.TooBig):
            ws.take_events()
        assert tracemalloc.get_traced_memory()[1] < 400_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("offer, answer", [           # RFC 7692 7.1
    ("permessage-deflate", ""), ("permessage-deflate; client_max_window_bits", ""),
    ("permessage-deflate; server_max_window_bits=10; client_max_window_bits=9", "; server_max_window_bits=10"),
    ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", ""),
    ("permessage-deflate; server_max_window_bits=8, permessage-deflate", ""),       # zlib has no such window
    ("x-webkit-deflate-frame, Permessage-Deflate ; server_max_window_bits = \"9\"", "; server_max_window_bits=9"),
    (", permessage-deflate", ""), (" , ,permessage-deflate,", ""),
    ("", None), ("permessage-bzip2", None), ("permessage-deflate; server_max_window_bits=16", None),
    ("permessage-deflate; server_max_window_bits", None), ("permessage-deflate; unknown", None),
    ("permessage-deflate; server_max_window_bits=010", None), ("permessage-deflate; client_max_window_bits=7", None),
    ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", None),
    ("permessage-deflate; server_no_context_takeover=1", None),
])
def test_what_is_agreed_on_for_compression(offer, answer):
    ask, = http_events(H + b"Sec-WebSocket-Extensions: " + offer.encode() + b"\r\n\r\n")
    deflate, header = hl._agree_deflate(ask, 512)
    if answer is None:
        assert deflate is None and header == ""
        return
    assert header == "permessage-deflate; server_no_context_takeover; client_no_context_takeover" + answer
    assert deflate == hl.Deflate(int(answer.partition("=")[2] or 15))
    theirs = hl._deflate_answer(header, True)
    assert theirs.receive_bits == deflate.send_bits and not theirs.receive_takeover and not theirs.send_takeover


@pytest.mark.parametrize("header", ["permessage-deflate; a=", ";", "permessage deflate", "a=b", "a; b=\"c d\"", "a; b=\"c"])
def test_malformed_extensions_fail_the_handshake(header):
    with pytest.raises(hl.HandshakeError):
        hl._agree_deflate(http_events(H + b"Sec-WebSocket-Extensions: " + header.encode() + b"\r\n\r\n")[0], 512)


@pytest.mark.parametrize("header, offered, deflate", [
    ("", True, None), ("permessage-deflate", True, hl.Deflate(15, True, 15, True)), ("permessage-deflate", False, hl.HandshakeError),
    ("permessage-deflate; client_max_window_bits=9; server_no_context_takeover; server_max_window_bits=8", True,
     hl.Deflate(9, True, 8, False)), ("permessage-deflate; client_no_context_takeover", True, hl.Deflate(15, False, 15, True)),
    ("permessage-deflate; client_max_window_bits", True, hl.HandshakeError), ("other", True, hl.HandshakeError),
    ("permessage-deflate; client_max_window_bits=8", True, hl.HandshakeError),
    ("permessage-deflate, permessage-deflate", True, hl.HandshakeError),
])
def test_what_a_server_may_answer_to_an_offer(header, offered, deflate):
    if isinstance(deflate, type):
        with pytest.raises(deflate):
            hl._deflate_answer(header, offered)
    else:
        assert hl._deflate_answer(header, offered) == deflate


@pytest.mark.parametrize("bits", [9, 12, 15])
@pytest.mark.parametrize("takeover", [False, True])
def test_compressed_messages_survive_both_ways_in_any_fragmentation(bits, takeover, rng):
    for sender, receiver in (("server", "client"), ("client", "server")):
        one = hl.WebSocketConnection(sender, 1 << 20, hl.Deflate(bits, takeover, bits, takeover, above_bytes=0))
        two = hl.WebSocketConnection(receiver, 1 << 20, hl.Deflate(bits, takeover, bits, takeover, above_bytes=0))
        sent, stream = [], b""
        for _ in range(10):
            text = "".join(rng.choices("ab\u20ac", k=rng.choice([0, 1, 10, 5000])))
            sent += [text, hl.Ping(b"p"), text.encode() * 3]
            stream += one.send_text(text) + one.send_ping(b"p") + one.send_binary(text.encode() * 3)
        got, at = [], 0
        while at < len(stream):
            step = rng.choice([1, 2, 100, 4000])
            two.receive(stream[at:at + step])
            got += two.take_events()
            at += step
        assert got == sent
    assert len(hl.WebSocketConnection("server", 0, hl.Deflate()).send_text("abc" * 5_000)) < 100
    assert hl.WebSocketConnection("server", 0, hl.Deflate()).send_text("a" * 511)[:2] == b"\x81\x7e"
    assert hl.WebSocketConnection("server", 0, hl.Deflate()).send_text("a" * 512)[0] == 0xc1


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_compressed_fragments_may_be_as_small_as_they_like(size):
    data, deflater = os.urandom(20_000), zlib.compressobj(wbits=-15)
    parts = [deflater.compress(data[at:at + size]) + deflater.flush(zlib.Z_SYNC_FLUSH) for at in range(0, len(data), size)]
    ws = hl.WebSocketConnection("client", len(data), hl.Deflate())
    for at, part in enumerate(parts):
        first = (0x42 if at == 0 else 0) | (0x80 if at == len(parts) - 1 else 0)
        ws.receive(hl._frame(0, part[:-4] if first & 0x80 else part).replace(b"\x80", bytes((first,)), 1))
    assert ws.take_events() == [data]


def test_many_small_bombs_are_not_one_large_one():
    bomb = hl._frame(hl._BINARY | hl._COMPRESSED, hl._squeeze(hl._deflater(15), bytes(60_000)))
    ws, got, most = hl.WebSocketConnection("client", 65_536, hl.Deflate()), 0, 0
    ws.receive(bomb * 500)
    while events := ws.take_events():
        got, most = got + len(events), max(most, len(events))
    assert got == 500 and most == 2


def test_compression_agrees_with_another_library(rng):
    pytest.importorskip("websockets", reason="pip install websockets")
    from websockets.extensions.permessage_deflate import PerMessageDeflate
    from websockets.frames import Frame
    for bits, takeover in itertools.product((9, 15), (False, True)):
        theirs = PerMessageDeflate(not takeover, not takeover, bits, bits)
        ours = hl.WebSocketConnection("client", 1 << 20, hl.Deflate(bits, takeover, bits, takeover, above_bytes=0))
        for _ in range(10):
            data = bytes(rng.choices(b"abc", k=rng.choice([1, 100, 20_000])))
            ours.receive(hl._frame(2 | hl._COMPRESSED, theirs.encode(Frame(2, data)).data))
            assert ours.take_events() == [data]
            key = ours.send_binary(data)                # masked; its payload, for the other library
            size = {126: 2, 127: 8}.get(key[1] & 0x7F, 0)
            payload = hl._mask(key[6 + size:], key[2 + size:6 + size])
            assert theirs.decode(Frame(2, payload, rsv1=True)).data == data


def test_wrong_text_fails_at_its_first_impossible_byte():
    for data in (b"ok\xff", b"\xed\xa0", b"\xf4\x90", b"\xc0"):
        ws = hl.WebSocketConnection("client")
        ws.receive(b"\x81\x7d" + data[:-1])                       # of 125 bytes only these come
        assert ws.take_events() == []
        ws.receive(data[-1:])
        with pytest.raises(hl.FrameError) as caught:
            ws.take_events()
        assert caught.value.close_code == 1007


def test_a_message_in_any_fragments_takes_linear_time():
    def cost(count, size, step):
        stream = b"\x02\x00" + (b"\x00" + bytes([size]) + bytes(size)) * count + b"\x80\x00"
        ws = hl.WebSocketConnection("client", 0)
        began = time.process_time()
        for at in range(0, len(stream), step):
            ws.receive(stream[at:at + step])
            events = ws.take_events()
        assert events == [bytes(size * count)]
        return time.process_time() - began
    for size, step in ((10, 65536), (1, 500)):
        assert min(cost(40_000, size, step) for _ in range(3)) < 16 * min(cost(5_000, size, step) for _ in range(3))
    def whole(size):
        ws, frame = hl.WebSocketConnection("server", 0), hl.WebSocketConnection("client").send_binary(bytes(size))
        began = time.process_time()
        for at in range(0, len(frame), 4096):
            ws.receive(frame[at:at + 4096])
            events = ws.take_events()
        assert len(events[0]) == size
        return time.process_time() - began
    assert min(whole(16 << 20) for _ in range(2)) < 24 * min(whole(1 << 20) for _ in range(3))


def test_nothing_is_sent_after_a_close_frame():
    ws = hl.WebSocketConnection("server")
    ws.send_close()
    for send in (lambda: ws.send_text("x"), lambda: ws.send_binary(b"x"), ws.send_ping, ws.send_pong):
        with pytest.raises(hl.StateError):
            send()


def test_reading_a_header_takes_time_in_proportion_to_its_length():
    def cost(spaces):
        data = H + b"X: a" + b" " * spaces + b"b\r\n\r\n"
        return min(timeit.repeat(lambda: http_events(data), number=5, repeat=5))
    assert cost(16_000) < 20 * cost(2_000)      # 64 times, if it were quadratic


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
def test_what_one_side_sends_the_other_receives(size):
    text, data = "\u00e9" * (size // 2), os.urandom(size)
    for sender, receiver in (("server", "client"), ("client", "server")):
        ws = hl.WebSocketConnection(sender)
        stream = ws.send_text(text) + ws.send_binary(data) + ws.send_ping(b"p") + ws.send_close(1001, "bye")
        assert take(receiver, stream) == [text, data, hl.Ping(b"p"), hl.Close(1001, "bye")]


def test_a_stream_in_single_bytes_gives_the_same_events():
    ws = hl.WebSocketConnection("client")
    stream = ws.send_text("h\u20acllo") + masked(0x01, b"a") + ws.send_ping() + masked(0x80, b"b") + ws.send_binary(b"x" * 300)
    server, events = hl.WebSocketConnection("server"), []
    for at in range(len(stream)):
        server.receive(stream[at:at + 1])
        events += server.take_events()
    assert events == ["h\u20acllo", hl.Ping(b""), "ab", b"x" * 300]


def test_close_is_sent_once_with_a_code_that_may_be_sent():
    ws = hl.WebSocketConnection("server")
    for code in (999, 1004, 1006, 1015, 2999, 5000):
        with pytest.raises(hl.UsageError):
            ws.send_close(code)
    frame = ws.send_close(1000, "\u20ac" * 100)
    assert len(frame) <= 127 and take("client", frame)[0].reason == "\u20ac" * 41
    assert ws.send_close(1000) == b""
    assert hl.WebSocketConnection("server").send_close(1005) == b"\x88\0"
    with pytest.raises(hl.UsageError):
        hl.WebSocketConnection("server").send_ping(b"x" * 126)
    with pytest.raises(hl.UsageError):
        hl.WebSocketConnection("peer")


def test_masking_is_the_loop_over_bytes(rng):
    for size in (0, 1, 3, 4, 5, 1000):
        data, key = rng.randbytes(size), rng.randbytes(4)
        assert hl._mask(data, key) == bytes(byte ^ key[at % 4] for at, byte in enumerate(data))


def test_random_bytes_never_raise_anything_but_peer_errors(rng):
    for _ in range(int(2000 * SOAK)):
        data = rng.randbytes(rng.randrange(60))
        for connection in (hl.WebSocketConnection(rng.choice(["client", "server"])), hl.HTTPConnection()):
            if isinstance(connection, hl.HTTPConnection) and rng.random() < .7:
                data = H + rng.choice([b"Transfer-Encoding: chunked\r\n\r\n", b""]) + data + b"\r\n\r\n"
            with contextlib.suppress(hl.PeerError):
                connection.receive(data)
                while connection.take_events():
                    pass


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 20000])
def test_delimited_messages_come_out_of_every_split(size):
    messages = [Tree(name="x" * size), Tree(), Tree(name="last")]
    data = b"".join(map(hl.encode_delimited, messages))
    for cut in range(0, len(data) + 1, 1 + size // 20):
        reader = hl.DelimitedReader(Tree)
        assert reader.feed(data[:cut]) + reader.feed(memoryview(data)[cut:]) == messages and reader.pending == 0
    reader = hl.DelimitedReader(Tree)
    got = [message for byte in data for message in reader.feed(bytes((byte,)))]
    assert got == messages


@pytest.mark.parametrize("data, error", [
    (b"\xff\xff\xff\xff\x07", hl.TooBig), (b"\x65", hl.TooBig), (b"\xff\xff\xff\xff\xff", hl.WireError),
    (b"\xff\xff\xff\xff\x7f", hl.WireError), (b"\2\x0a\5", hl.WireError),
])
def test_a_bad_delimited_stream_is_refused_before_it_is_stored(data, error):
    reader = hl.DelimitedReader(Tree, max_bytes=100)
    good = hl.encode_delimited(Tree(name="good"))
    assert reader.feed(good + data) == [Tree(name="good")]      # first what came before
    tracemalloc.start()
    for more in (b"", *[b"x" * 100_000] * 50):
        with pytest.raises(error, match=f"in the message at byte {len(good)} of the stream"):
            reader.feed(more)
    with pytest.raises(error):
        reader.close()
    assert reader.position == len(good) and reader.pending == len(data) + 5_000_000
    assert tracemalloc.get_traced_memory()[0] < 1_000_000
    tracemalloc.stop()


def test_a_stream_that_ends_inside_a_message_is_noticed_and_can_be_cut_there():
    data = b"".join(hl.encode_delimited(Tree(name=name)) for name in "abc")
    reader = hl.DelimitedReader(Tree)
    assert len(reader.feed(data[:-2])) == 2 and reader.position == 8 and reader.pending == 2
    with pytest.raises(hl.WireError, match="the stream ends 2 bytes into the message at byte 8"):
        reader.close()
    whole = hl.DelimitedReader(Tree)
    assert len(whole.feed(data)) == 3 and whole.close() is None
    for wrong in (lambda: hl.DelimitedReader("Tree"), lambda: hl.encode_delimited("x")):
        with pytest.raises(hl.UsageError):
            wrong()


def test_a_large_delimited_message_in_small_pieces_takes_linear_time():
    data = hl.encode_delimited(Tree(name="x" * 1_000_000))
    reader, got = hl.DelimitedReader(Tree), []
    began = time.process_time()
    for at in range(0, len(data), 10):
        got += reader.feed(data[at:at + 10])
    assert len(got) == 1 and time.process_time() - began < 2.0


# =============================================================================
# 15  PLUGINS
# =============================================================================

class Recorder(hl.Plugin):
    """A plugin that notes what happens to it in a list of its class."""

    said: list = []
    breaks = ""

    def note(self, what):
        self.said.append(f"{self.name} {what}")
        if self.breaks == what:
            raise ValueError(f"{self.name} breaks")

    def register(self, app):
        app.on_core("round")(lambda event: self.said.append(f"{self.name} heard {event.data}"))
        self.note("register")

    def on_start(self):
        self.note("start")

    def on_stop(self):
        self.note("stop")


def recorders(*names, **more):
    """Classes of plugins by name, "a<b" requires b; and the list that all of them write to."""
    said = []
    made = []
    for each in names:
        name, *wanted = each.split("<")
        attributes = {"name": name, "said": said, "requires": tuple(wanted), **more.get(name, {})}
        made.append(type(name.capitalize(), (Recorder,), attributes))
    return made, said


def test_plugins_register_then_start_in_order_and_stop_in_reverse():
    classes, said = recorders("chat<bank", "bank<log", "log")
    app = hl.Engine(port=0)
    loaded = []
    app.on_core("plugin_loaded")(lambda event: loaded.append(event.data["plugin_name"]))
    for cls in classes:
        app.load(cls)
    assert said == ["chat register", "bank register", "log register"] and not app.plugins
    with app:
        wait_until(lambda: len(app.plugins) == 3)
        assert said[3:] == ["log start", "bank start", "chat start"] == [f"{each} start" for each in loaded]
        assert list(app.plugins) == ["log", "bank", "chat"] and app.metrics["plugins_loaded"] == 3
        assert isinstance(app.plugins["bank"], classes[1]) and app.plugins["bank"].app.url == app.url
        assert isinstance(app.plugins["bank"].app, hl.Engine) and "nobody" not in app.plugins
    assert said[6:] == ["chat stop", "bank stop", "log stop"]


@pytest.mark.parametrize("breaks", ["register", "start", "stop"])
def test_a_plugin_that_fails_is_isolated(breaks, caplog):
    classes, said = recorders("one", "bad", "two<bad", "three", bad={"breaks": breaks})
    app = hl.Engine(port=0)
    for cls in classes:
        app.load(cls)
    with app:
        wait_until(lambda: "three" in app.plugins)
        on_loop(app, app.emit_core, "round", 1)
        heard = {each.split()[0] for each in said if "heard" in each}
        report = app.report()["plugins"]
        if breaks == "stop":
            assert heard == {"one", "bad", "two", "three"}
        else:
            assert heard == {"one", "three"} == set(app.plugins)
            assert report["bad"]["state"] == "failed" and "bad breaks" in report["bad"]["error"]
            assert "requires 'bad', which has failed" in report["two"]["error"]
            on_loop(app, app._check_alerts)
            assert "bad has failed" in app.alerts["plugins"]
            on_loop(app, setattr, classes[1], "breaks", "")
            app.load(type("Bad", (Recorder,), {"name": "bad", "said": said}))      # a failed one may be replaced
            assert "bad" in app.plugins
    assert "ValueError: bad breaks" in caplog.text
    assert said[-1] == "one stop"


def test_plugins_require_versions_of_one_major():
    (bank,), _ = recorders("bank", bank={"version": "2.3.1"})
    for wanted, fits in (("2", True), ("2.3", True), ("2.3.1", True), ("2.4", False), ("1.9", False), ("3", False)):
        app = hl.Engine(port=0)
        app.load(bank)
        app.load(type("Shop", (hl.Plugin,), {"requires": {"bank": wanted}}))
        app.load(type("Mall", (hl.Plugin,), {"requires": (f"bank {wanted}", "horizon_lite 0.1")}))
        app.plugins.start()
        report = app.report()["plugins"]
        assert (report["shop"]["state"] == "running") is fits is (report["mall"]["state"] == "running"), wanted
        assert fits or f"requires bank {wanted}, and there is 2.3.1" in report["shop"]["error"]
    with pytest.raises(hl.UsageError, match="no version"):
        hl.Engine(port=0).load(type("Odd", (hl.Plugin,), {"version": "new"}))


def test_plugins_that_require_each_other_or_nobody_are_told():
    classes, said = recorders("a<b", "b<a", "c<bnak", "bank")
    app = hl.Engine(port=0)
    for cls in classes:
        app.load(cls)
    app.plugins.start()
    report = app.report()["plugins"]
    assert "circle" in report["a"]["error"] and "which has failed" in report["b"]["error"]
    assert "did you mean 'bank'" in report["c"]["error"] and list(app.plugins) == ["bank"]
    with pytest.raises(hl.UsageError, match="there is a plugin 'bank' already"):
        app.load(classes[3])


def test_what_a_plugin_registers_goes_with_it(tmp_path):
    (tmp_path / "page.txt").write_text("hello")

    class Busy(hl.Plugin):
        def register(self, app):
            app.on("client:x:y")(print)
            app.on("client:*", lambda event: None)
            app.bus_before = app.bus.handler_count
            app.every(hz=1)(print)
            app.subscribe("news.>")(print)
            app.get("/mine")(lambda request: "mine")
            app.post("/mine")(lambda request: "mine")
            app.websocket("/ws/mine")(print)
            app.static("/files", tmp_path)
            app.html("news.*")(lambda message: "<p id=a>a</p>")
            app.allow("news.>", publish=True)
            app.authenticate(lambda request: "ada")

        def on_start(self):
            self.app.on_core("later")(print)
            self.app.load(type("Inner", (hl.Plugin,), {}))

    def things(app):
        return (app.bus.handler_count, len(app._repeats), len(app._routes), len(app._rules), len(app._views),
                len(app.topics.matching("news.a")), len(app._authenticators), len(app.plugins))

    with running() as app:
        before = things(app)
        app.load(Busy)
        wait_until(lambda: "inner" in app.plugins)
        after = things(app)
        assert all(old != new for old, new in zip(before, after)), (before, after)
        app.unload("busy")
        assert things(app) == before
        with pytest.raises(hl.UsageError, match="no plugin 'busy'"):
            app.unload("busy")


def test_plugins_come_from_classes_objects_files_modules_and_folders(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    text = "import horizon_lite as hl\nclass {}(hl.Plugin):\n    version = '1.5'\n"
    (tmp_path / "one_plugin.py").write_text(text.format("One"))
    (tmp_path / "two_plugin.py").write_text(text.format("Two"))
    (tmp_path / "folder").mkdir()
    for name in ("three", "four", "_hidden"):
        (tmp_path / "folder" / f"{name}.py").write_text(text.format(name.strip("_").capitalize()))
    (tmp_path / "folder" / "broken.py").write_text("def")
    (tmp_path / "empty_plugin.py").write_text("x = 1")
    (tmp_path / "json.py").write_text(text.format("Json"))
    app = hl.Engine(port=0, plugins=["one_plugin.py"])
    made = app.load("two_plugin")
    assert [each.name for each in made] == ["two"] and made[0].version == "1.5"
    app.load(tmp_path / "folder")
    app.load(hl.Plugin())
    for target, why in (("missing.py", "no file"), ("missing", "no module"), ("empty_plugin.py", "no class of hl.Plugin"),
                        (5, "load a Plugin class"), ("a b", "neither"), ("json.py", "rename the file")):
        with pytest.raises(hl.UsageError, match=why):
            app.load(target)
    with app:
        wait_until(lambda: "one" in app.plugins)
        assert set(app.plugins) == {"one", "two", "three", "four", "plugin"}
        assert app.report()["plugins"]["broken"]["state"] == "failed" and "SyntaxError" in caplog.text
    for name in ("one_plugin", "two_plugin", "three", "four", "empty_plugin"):
        sys.modules.pop(name, None)


def test_a_changed_file_is_loaded_anew_and_connections_stay(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sys, "path", sys.path[:])
    path = tmp_path / "hot_plugin.py"

    def write(answer, more=""):
        path.write_text(
            "import horizon_lite as hl\nclass Hot(hl.Plugin):\n    def register(self, app):\n"
            f"        app.on_client('hot', 'ask')(lambda event: event.client.send({answer!r}))\n{more}")
        os.utime(path, ns=(next(stamps), 0))        # several times in one second, and of one length

    stamps = itertools.count(1)
    classes, said = recorders("user<hot")
    write("one")
    with running(reload=True) as app, hl.connect(app.url) as client:
        os.utime(path, ns=(0, next(stamps)))
        app.load(path)
        app.load(classes[0])

        def ask():
            client.emit("hot", "ask")
            return client.recv(5)

        def changed(word):
            caplog.clear()
            wait_until(lambda: on_loop(app, app.plugins.look) or word in caplog.text)

        assert ask() == "one"
        os.utime(path, ns=(0, next(stamps)))
        write("two")
        os.utime(path, ns=(0, next(stamps)))
        changed("has changed: hot")
        assert ask() == "two" and said == ["user register", "user start", "user stop", "user register", "user start"]
        write("xxx", "def")
        os.utime(path, ns=(0, next(stamps)))
        changed("the old plugin stays")
        assert ask() == "two" and "user" in app.plugins
        write("six", "class More(hl.Plugin): pass\n")
        os.utime(path, ns=(0, next(stamps)))
        changed("has changed: hot, more")
        assert ask() == "six" and {"hot", "more", "user"} == set(app.plugins)
        assert app.bus.handler_count == 2 and client.closed is None
    sys.modules.pop("hot_plugin", None)


def test_what_keeps_strangers_out_stays_when_its_plugin_goes():
    class Door(hl.Plugin):
        breaks = False

        def register(self, app):
            app.authenticate(lambda request: request.args.get("t"))
            app.allow("open", publish=True)

        def on_start(self):
            assert not self.breaks

    with running() as app:
        app.get("/secret")(lambda request: "secret")
        assert get(app, "/secret")[2] == b"secret"
        app.load(Door)
        app.load(type("Other", (hl.Plugin,), {"register": lambda self, app: app.authenticate(lambda request: "other")}))
        assert get(app, "/secret")[0] == 401 and get(app, "/secret?t=ada")[0] == 200       # both must agree
        app.unload("other")
        assert get(app, "/secret")[0] == 401 and get(app, "/secret?t=ada")[0] == 200
        app.unload("door")
        for path in ("/secret", "/secret?t=ada"):
            assert get(app, path)[0] == 403
        assert not on_loop(app, app._may, "ada", "publish", "open")
        app.load(Door)
        assert get(app, "/secret")[0] == 401 and on_loop(app, app._may, "ada", "publish", "open")
        app.unload("door")
        app.load(type("Door", (Door,), {"name": "door", "breaks": True}))
        assert get(app, "/secret")[0] == 403 and not app._authenticators


def test_a_plugin_that_loads_or_unloads_others_leaves_nothing():
    class Child(hl.Plugin):
        requires = ("parent",)

    class Parent(hl.Plugin):
        def on_start(self):
            self.app.load(Child)

    class Early(Parent):
        name = "parent"

        def register(self, app):
            app.load(Child)

        def on_start(self):
            pass

    class Gone(hl.Plugin):
        def register(self, app):
            app.on("a:b")(print)

        def on_start(self):
            self.app.unload("gone")
            self.app.on("a:c")(print)

    with running() as app:
        for cls in (Parent, Early):
            app.load(cls)
            assert set(app.plugins) == {"parent", "child"}
            app.unload("parent")
            assert not app.plugins.report() and not app.plugins
        app.load(Gone)
        assert not app.plugins.report() and not app.bus.handles("a:b") and not app.bus.handles("a:c")
        late = type("Late", (hl.Plugin,), {"requires": "need"})
        app.load(late)
        assert app.report()["plugins"]["late"]["state"] == "failed"
        app.load(type("Need", (hl.Plugin,), {}))        # what it lacked has come
        assert list(app.plugins) == ["need", "late"] and repr(app.plugins) == "Plugins(need, late)"
        with pytest.raises(KeyError, match="not loaded"):
            app.plugins["nobody"]


@pytest.mark.parametrize("hook", ["register", "on_start", "on_stop"])
def test_a_plugin_that_exits_is_one_that_fails(hook, caplog):
    other, stopped = [], type("Last", (hl.Plugin,), {"on_stop": lambda self: other.append("stopped")})
    with running() as app:
        app.load(stopped, type("Exit", (hl.Plugin,), {hook: lambda self, *_: sys.exit(3)}))
        assert ("exit" in app.plugins) is (hook == "on_stop") and "last" in app.plugins
    assert other == ["stopped"] and "SystemExit: 3" in caplog.text


def test_plugins_that_can_not_be_say_what_to_write():
    async def later(self): ...

    app = hl.Engine(port=0)
    for attributes, why in (({"version": 1.2}, "write name"), ({"name": 5}, "write name"), ({"name": "a b"}, "1 to 64"),
                            ({"requires": None}, "write name"), ({"requires": {"x": "new"}}, "no version like"),
                            ({"on_start": later}, "async def"), ({"version": "abc"}, "plugin 'odd': 'abc' is no version")):
        with pytest.raises(hl.UsageError, match=why):
            app.load(type("Odd", (hl.Plugin,), attributes))
    app.load(type("Old", (hl.Plugin,), {"requires": ("horizon_lite >= 0.1", "new>=2"), "version": "1"}))
    app.load(type("New", (hl.Plugin,), {"version": "2.0"}))
    with app:
        assert list(app.plugins) == ["new", "old"]
        app.load(type("Broken", (hl.Plugin,), {"__init__": lambda self: 1 / 0}))
        assert app.report()["plugins"]["broken"]["state"] == "failed"
    with pytest.raises(hl.UsageError, match="brackets"):
        app.on_core(print)
    with pytest.raises(hl.UsageError, match="decorates a function"):
        app.on_client("a", "b")(None)


def test_files_hold_plugins_their_bases_and_helpers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    package = tmp_path / "pack_of_plugins"
    package.mkdir()
    (package / "core.py").write_text("import horizon_lite as hl\nclass Base(hl.Plugin):\n    def __init__(self): self.kind\n"
                                     "class Chat(Base):\n    kind = 1\nclass Shop(Base):\n    kind = 2\nAlias = Shop\n")
    (package / "__init__.py").write_text("from .core import Chat\n")
    (package / "helper.py").write_text("x = 1\n")
    (tmp_path / "empty").mkdir()
    app = hl.Engine(port=0)
    assert {each.name for each in hl.Engine(port=0).load("pack_of_plugins")} == {"chat", "shop"}     # a folder here
    sys.path.insert(0, os.fspath(tmp_path))
    monkeypatch.chdir(tmp_path / "empty")
    assert [each.name for each in app.load("pack_of_plugins")] == ["chat"]
    assert [each.name for each in app.load("pack_of_plugins.core:Shop")] == ["shop"]
    assert {each.name for each in hl.Engine(port=0).load("../pack_of_plugins/core.py")} == {"chat", "shop"}
    assert {each.name for each in hl.Engine(port=0).load(package)} == {"chat", "shop"}
    with pytest.raises(hl.UsageError, match="no file with a class"):
        app.load(tmp_path / "empty")
    for name in [each for each in sys.modules if each.startswith(("pack_of_plugins", "core"))]:
        del sys.modules[name]


def test_a_reload_that_fails_brings_back_what_was(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", sys.path[:])
    path, stamps = tmp_path / "state_plugin.py", itertools.count(1)
    text = ("import horizon_lite as hl\nclass State(hl.Plugin):\n    gold = 0\n    def on_reload(self, before):\n        self.gold = before.gold + 1\n"
            "    def register(self, app):\n        app.on_core('ask')(lambda event: event.data.append(self.gold))\n")

    def ask(app):
        return on_loop(app, lambda: app.emit_core("ask", []).data)

    def write(more=""):
        path.write_text(text + more)
        os.utime(path, ns=(0, next(stamps)))
        on_loop(app, app.plugins.look)

    path.write_text(text)
    os.utime(path, ns=(0, next(stamps)))
    classes, said = recorders("user<state", "taken")
    with running() as app:
        app.load(path, *classes)
        assert ask(app) == [0]
        write()
        assert ask(app) == [1]                      # it took over
        for wrong in ("    def on_start(self):\n        1 / 0\n", "        1 / 0\n", "    name = 'taken'\n", "    version = 'x'\n", "    requires = 'nobody'\n"):
            caplog.clear()
            write(wrong)
            assert "the old plugin stays" in caplog.text, wrong
            assert set(app.plugins) == {"state", "user", "taken"} and len(ask(app)) == 1, wrong
        caplog.clear()
        write("class Sad(hl.Plugin):\n    def on_start(self):\n        1 / 0\n")       # a new one may fail by itself
        assert "stays" not in caplog.text and app.report()["plugins"]["sad"]["state"] == "failed"
        assert set(app.plugins) == {"state", "user", "taken"}
        path.write_text("")                         # just being written
        on_loop(app, app.plugins.look)
        assert set(app.plugins) == {"state", "user", "taken"}
        path.unlink()
        on_loop(app, app.plugins.look)
        assert len(ask(app)) == 1
    sys.modules.pop("state_plugin", None)


def test_what_is_open_is_served_by_what_comes_in_the_place(tmp_path):
    def plugin(text):
        class Page(hl.Plugin):
            def register(self, app):
                app.html("a.>")(lambda message: f"<p id=b>{text}</p>")
                app.websocket("/ws/echo")(lambda client, message: client.send(text))
        return Page()

    with running() as app:
        app.topic("a.b", history=1)
        app.html("a.*")(lambda message: "<p id=a>the app's</p>")
        app.load(plugin("one"))
        on_loop(app, app.publish, "a.b", 1)
        with hl.connect(app.url + "/ws/html?topics=a.b") as page, hl.connect(app.url + "/ws/echo") as echo:
            assert {page.recv(5), page.recv(5)} == {"<p id=a>the app's</p>", "<p id=b>one</p>"}
            echo.send("x")
            assert echo.recv(5) == "one"

            def exchange():
                app.plugins.replacing = True
                app.plugins.load(plugin("two"))
                app.plugins.confirm()

            on_loop(app, exchange)
            assert {page.recv(5), page.recv(5)} == {"<p id=a>the app's</p>", "<p id=b>two</p>"}
            echo.send("x")
            assert echo.recv(5) == "two"
            app.unload("page")
            assert page.recv(5) == "<p id=a>the app's</p>"
            on_loop(app, app.publish, "a.b", 2)
            assert echo.recv(5) is None and echo.closed.code == 1012


def test_small_things_that_attackers_of_the_bus_found(monkeypatch, caplog):
    bus = hl.Bus()
    got = []
    once = bus.on("k", got.append, once=True, filter=lambda event: event.data or bus.emit("k", 1) or True)
    bus.emit("k", 0)
    assert len(got) == 1 == once.calls
    for wrong in ({"filter": later_}, {"priority": math.nan}):
        with pytest.raises(hl.UsageError):
            bus.on("a", print, **wrong)
    with pytest.raises(hl.UsageError, match="weakref can refer"):
        bus.on("a", [].append, weak=True)
    for wrong in (lambda: hl.Propagator.near(5, 3), hl.Propagator.channel):
        with pytest.raises(hl.UsageError):
            wrong()
    near = hl.Propagator.near
    deferred = []
    bus = hl.Bus(spawn=lambda handler, event: deferred.append(event))
    for place in ((0, 0, 0), (50, 0, 0)):               # each has a distance of its own
        bus.on("a", print, filter=near(place, 100), batch=2)
    bus.emit("a", {"x": 10, "y": 0})
    assert [each.metadata["distance"] for each in deferred] == [10.0, 40.0]
    moved = hl.Propagator.transform(lambda data: {"x": 1000, "y": 0}) & near((0, 0, 0), 10)
    assert not moved(hl.Event("a", {"x": 1, "y": 0}))
    bus = hl.Bus(debug=True)
    handler = bus.on("a", print, filter=lambda event: False)
    bus.emit("a")
    assert handler.times.count == 0 and handler.calls == 0      # who is passed over takes no time
    bus.emit("chat:mesage")
    bus.on("chat:message", print)
    assert bus.validate() == ["nobody listens to 'chat:mesage'; did you mean 'chat:message'?"]

    class Listener:
        def hear(self, event): ...

    for number in range(10):                            # weak ones at keys that nobody emits
        bus.on(f"player:{number}", Listener().hear, weak=True)
    gc.collect()
    assert not bus.handles("player:3") and bus.handler_count == 2
    clock = FakeClock()
    bus = hl.Bus(clock=clock, slow_ms=10)
    bus.on("a", lambda event: setattr(clock, "now_ns", clock.now_ns + event.data * MS))
    bus.emit("a", 1)
    bus.emit("a", 20)
    assert bus.slow == 0                                # it was not timed,
    bus.watch(21 * MS)                                  # but the loop says that it took long
    bus.emit("a", 20)
    assert bus.slow == 1
    clock.now_ns += 11_000 * MS
    bus.watch(1)
    bus.emit("a", 20)
    assert bus.slow == 1 and bus._mask


async def later_(event): ...


def test_calls_that_are_refused_do_not_count_and_undo_lists_do_not_grow(monkeypatch):
    monkeypatch.setattr(hl, "_MAX_RUNNING", 2)
    gate = threading.Event()
    with running() as app:
        handler = app.on("a", lambda event: gate.wait(5), blocking=True)
        on_loop(app, lambda: [app.emit("a") for _ in range(5)])
        assert handler.calls == 2 and handler.errors == 3
        gate.set()

        class Busy(hl.Plugin):
            pass

        plugin, = app.load(Busy)
        for _ in range(1000):
            plugin.app.on("b", print, once=True).remove()
        assert len(plugin.app._undo) < 300
        assert app.on("chat", plugin.on_start, weak=True).name.endswith("on_start")


def test_plugins_have_started_when_the_engine_has():
    for _ in range(10):
        app = hl.Engine(port=0)
        app.load(type("One", (hl.Plugin,), {}))
        with app:
            assert list(app.plugins) == ["one"]


def test_plugins_that_load_each_other_leave_no_handler_and_lose_nobody(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", sys.path[:])
    listen = {"register": lambda self, app: app.on_core("x")(self.hear), "hear": lambda self, event: None}
    lacks = type("L", (hl.Plugin,), {"requires": "nobody", **listen})
    child = type("C", (hl.Plugin,), listen)
    parent = type("P", (hl.Plugin,), {"register": lambda self, app: app.load(child)})
    with running() as app:
        app.load(lacks)
        app.load(parent)
        app.load(type("D", (hl.Plugin,), {"requires": "c", **listen}))
        assert set(app.plugins) == {"p", "c", "d"} and app.bus.handler_count == 2
        for name in ("p", "l"):
            app.unload(name)
        assert app.bus.handler_count == 0 and not app.plugins
        app.load(parent, child)                         # it is there twice: one of them is
        assert set(app.plugins) == {"p", "c"} and app.bus.handler_count == 1 and "loaded twice" in caplog.text
        app.unload("p")
        if "c" in app.plugins:
            app.unload("c")
        assert app.bus.handler_count == 0
        path, stamps = tmp_path / "parent_plugin.py", itertools.count(1)
        path.write_text("import horizon_lite as hl\nclass Child(hl.Plugin): pass\nclass Parent(hl.Plugin):\n"
                        "    def on_start(self):\n        self.app.load(type('Kid', (Child,), {}))\n")
        app.load(f"{path}:Parent")
        app.load(type("D", (hl.Plugin,), {"requires": "kid", **listen}))
        for _ in range(3):
            os.utime(path, ns=(0, next(stamps)))
            on_loop(app, app.plugins.look)
            assert set(app.plugins) == {"parent", "kid", "d"} and app.bus.handler_count == 1
        app.unload("parent")
        os.utime(path, ns=(0, next(stamps)))            # what was unloaded stays away
        on_loop(app, app.plugins.look)
        assert not app.plugins
    sys.modules.pop("parent_plugin", None)


def test_a_reload_touches_only_what_has_changed(monkeypatch):
    def plugin(text, public=True):
        class Page(hl.Plugin):
            def register(self, app):
                app.html("room.*")(lambda message: f"<p id={message.topic}>{text}</p>")
                app.get("/answer")(lambda request: text)
                app.websocket("/ws/door", public=public)(lambda client, message: client.send(text))
                app.websocket("/ws/{rest:path}")(lambda client, message, **_: client.send("rest"))
        return Page()

    with running() as app:
        app.topic("room.1", history=1)
        app.html("score")(lambda message: f"<p id=score>{message.payload}</p>")
        app.load(plugin("v0"))
        on_loop(app, app.publish, "room.1", 1)
        url = app.url + "/ws/html?topics=room.1,score"
        with hl.connect(url) as one, hl.connect(url) as two, hl.connect(app.url + "/ws/door") as door:
            pages = (one, two)
            assert {each.recv(5) for each in pages} == {"<p id=room.1>v0</p>"}
            on_loop(app, app.publish, "score", 1)
            assert {each.recv(5) for each in pages} == {"<p id=score>1</p>"}

            def exchange(number):
                app.publish("score", number)            # in the same pass
                app.plugins.replacing = True
                app.plugins.load(plugin(f"v{number}"))
                app.plugins.confirm()

            for number in range(2, 5):
                on_loop(app, exchange, number)
                for page in pages:
                    assert {page.recv(5), page.recv(5)} == {f"<p id=score>{number}</p>", f"<p id=room.1>v{number}</p>"}
                assert len(app.topics.matching("room.1")) == len(app.topics.matching("score")) == 1
                door.send("x")
                assert door.recv(5) == f"v{number}"
            app.load(type("Other", (hl.Plugin,), {"register": lambda self, app: app.get("/x")(lambda request: "x")}))
            app.unload("other")
            with pytest.raises(TimeoutError):
                one.recv(0.1)
            app.authenticate(lambda request: request.args.get("t"))

            def close_the_door():
                app.plugins.replacing = True
                app.plugins.load(plugin("for members", public=False))
                app.plugins.confirm()

            on_loop(app, close_the_door)                # who came in as a stranger is one
            assert door.recv(5) is None and door.closed.code == 1012
        wait_until(lambda: not app.sessions)
        assert not app._made_views and not app.topics.matching("room.1")


def test_small_things_that_attackers_of_the_plugins_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    plugins = hl.Engine(port=0).plugins
    called, (a, b) = [], (tmp_path / "a", tmp_path / "b")
    for path in (a, b):
        path.write_text("")
        os.utime(path, (1, 1))
        plugins.watch(path, called.append, path.name)
    a.write_text("new"), os.utime(a, (2, 2)), b.write_text("new")   # b is being written
    plugins.look()
    assert not called
    os.utime(b, (2, 2))
    plugins.look(), plugins.look()
    assert called == ["a", "b"]
    os.utime(a, (3, 3))
    plugins.watch(a, called.append, "a")                # that is no reading
    plugins.look()
    assert called == ["a", "b", "a"]
    child = type("C", (hl.Plugin,), {})
    with running() as app:
        app.load(type("X", (hl.Plugin,), {"requires": "y"}))
        app.load(type("X", (hl.Plugin,), {}))           # takes the place of one that waits
        assert set(app.plugins) == {"x"}
        app.load(type("P", (hl.Plugin,), {"register": lambda self, app: app.load(child), "on_stop": lambda self: self.app.unload("c")}))
        assert set(app.plugins) == {"x", "p", "c"}
        app.unload("p")
        assert set(app.plugins) == {"x"}
        app.authenticate(lambda request: request.args and {"sub": request.args.get("t")})
        app.authenticate(lambda request: "bob")
        assert [get(app, f"/stats.json{query}")[0] for query in ("", "?t=", "?t=ada")] == [401, 401, 200]


def test_who_came_before_a_door_was_there_is_asked_again():
    with running() as app:
        app.html("t")(lambda: "<p id=t></p>")
        with hl.connect(app.url) as data, hl.connect(app.url + "/ws/html") as page:
            data.subscribe("t")
            data.subscribe("u")
            page.recv(5)
            app.allow("u", subscribe=True)
            wait_until(lambda: not app.topics.matching("t"))
            assert app.topics.matching("u")
            app.authenticate(lambda request: None)
            for client in (data, page):
                assert client.recv(5) is None and client.closed.code == 1012


def test_looking_from_another_thread_changes_nothing():
    class Listener:
        def hear(self, event): ...

    with running() as app:
        stop, errors = threading.Event(), []

        def look():
            while not stop.is_set():
                try:
                    app.metrics["event_handlers_registered"], app.bus.validate()
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for each in threads:
            each.start()
        for _ in range(20):
            on_loop(app, lambda: [app.bus.on("x", Listener().hear, weak=True) for _ in range(20)])
            on_loop(app, app.emit, "x")
        stop.set()
        for each in threads:
            each.join()
        assert not [each for each in errors if not isinstance(each, RuntimeError)]
        gc.collect()
        assert app.bus.handler_count == 0 and not app.bus.handles("x")


# -- programs --

def inflated(compressed):
    return hl.builtin_schema().EventBatch.decode(hl._inflate(compressed.data, compressed.original_size, "compressed_events"))


class Wire:
    """A plugin program by hand: frames over the host's socket."""

    made: list = []                                 # to be closed, so that no host waits for them

    def __init__(self, app, plugin_id="p", subscribe=None, hello=True, packed="", address="", **said):
        self.made.append(self)
        self.schema, self.id = hl.builtin_schema(), plugin_id
        kind, where, port = hl.plugin_address(address or app.host.address)
        self.sock = socket.socket(socket.AF_UNIX) if kind == "unix" else socket.socket()
        self.sock.settimeout(5)
        self.sock.connect(where if kind == "unix" else (where, port))
        self.reader, self.messages, self.raw = hl.DelimitedReader(self.schema.HostToPlugin, 1 << 24), collections.deque(), b""
        if hello:
            self.send(hello=self.schema.PluginHello(name=plugin_id, **{"version": "1", "api_version": "v1", **said}))
            self.hello = self.take().hello
        if subscribe is not None:
            self.subscribe(*subscribe, packed=packed)
            wait_until(lambda: plugin_id in app.host.peers and app.host.peers[plugin_id].wanted is not None)

    def send(self, plugin_id=None, **payload):
        self.sock.sendall(hl.encode_delimited(self.schema.PluginToHost(
            plugin_id=self.id if plugin_id is None else plugin_id, **payload)))

    def subscribe(self, *types, packed=""):
        self.send(subscribe=self.schema.EventSubscribe(events=types, packed=packed))

    def answer(self, event, **said):
        self.send(event_result=self.schema.EventResult(event_id=event.event_id, **said))

    def take(self, timeout=5):
        """The next message; None at the end."""
        self.sock.settimeout(timeout)
        while not self.messages:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.raw += data
            self.messages += self.reader.feed(data)
        return self.messages.popleft()

    def event(self, timeout=5):
        """The next frame's events: one that came alone, or those of a batch."""
        message = self.take(timeout)
        kind = message.which("payload")
        if kind == "event":
            return message.event
        assert kind in ("events", "compressed_events"), message
        return inflated(message.compressed_events).events if kind == "compressed_events" else message.events.events

    def shutdown(self):
        """Why the host ended it; whatever came before is passed over."""
        while (message := self.take()) is not None:
            if message.which("payload") == "shutdown":
                assert self.take() is None
                return message.shutdown.reason
        return None

    def silent(self, seconds=0.06):
        try:
            return self.take(seconds) is None
        except TimeoutError:
            return True

    def close(self):
        self.sock.close()


@contextlib.contextmanager
def hosting(tmp_path, **settings):
    with running(plugins_listen=f"unix://{tmp_path}/p.sock", **settings) as app:
        try:
            yield app
        finally:
            on_loop(app, app.host._check)
            while Wire.made:
                Wire.made.pop().close()


def refusals(app):
    return {reason: count for reason, count in app.host.refused.items() if count}


def test_a_plugin_says_hello_and_hears_only_what_it_subscribed_to(tmp_path):
    with hosting(tmp_path) as app:
        assert stat_mode(tmp_path / "p.sock") == 0o600
        schema = hl.builtin_schema()
        one = Wire(app, "one")
        assert one.hello == schema.HostHello(api_version="v1", boot_id=app.host._boot_id) and len(one.hello.boot_id) == 16
        join = schema.PlayerJoinEvent(player_uuid="u", name="ada")
        on_loop(app, app.emit_core, "player_join", join)
        assert one.silent()                         # nothing before the first subscription
        one.subscribe("PLAYER_JOIN", "NO_SUCH_EVENT", "")
        two = Wire(app, "two", ["ALL"])
        wait_until(lambda: app.host.wants("PLAYER_JOIN"))
        on_loop(app, app.emit_core, "player_join", join)
        (event,), (same,) = one.event(), two.event()
        assert event == same and event.player_join == join and event.type == "PLAYER_JOIN"
        assert event.event_id.isdigit() and not event.expects_response
        on_loop(app, app.emit_core, "world_close", schema.WorldCloseEvent())
        assert two.event()[0].type == "WORLD_CLOSE" and one.silent()
        two.subscribe("WORLD_CLOSE")                # replaces the set
        one.subscribe()
        wait_until(lambda: not app.host.wants("PLAYER_JOIN"))
        on_loop(app, app.emit_core, "player_join", join)
        assert two.silent() and one.silent()
        report = app.report()["programs"]
        assert report["two"]["wanted"] == ["WORLD_CLOSE"] and report["one"]["events"] == 2
        one.close()
        wait_until(lambda: "one" not in app.host.peers)
        with hl.connect(app.url) as client:         # a plain event is not one of theirs
            on_loop(app, app.emit_core, "player_join", {"name": "ada"})
        Wire.made.remove(two)
    assert two.event()[0].type == "WORLD_CLOSE" and two.shutdown() == "server is shutting down"
    assert not (tmp_path / "p.sock").exists()


def stat_mode(path):
    return path.stat().st_mode & 0o777


def test_engine_events_become_plugin_events(tmp_path):
    with hosting(tmp_path) as app:
        plugin = Wire(app, "p", ["PLAYER_JOIN", "PLAYER_QUIT", "PLAYER_MOVE", "COMMAND"])
        heard = []
        app.on("client:command:*", heard.append)
        with hl.connect(app.url) as client:
            (join,) = plugin.event()
            (session,) = app.sessions.values()
            assert join.player_join == hl.builtin_schema().PlayerJoinEvent(player_uuid=session.id, name=session.user)
            client.emit("movement", "position", {"x": 1.5, "y": -2, "z": 3e9})
            (move,) = plugin.event()
            assert move.type == "PLAYER_MOVE" and move.player_move == hl.builtin_schema().PlayerMoveEvent(
                player_uuid=session.id, x=1.5, y=-2.0, z=3e9)
            for event, data, raw in (("message", {"text": "/home"}, "/home"), ("home", None, "home"), ("say", "/say hi", "/say hi")):
                client.emit("command", event, data)
                asked = plugin.event()
                assert asked.expects_response and asked.command.raw == raw and asked.command.name == session.user
                plugin.answer(asked)
            wait_until(lambda: len(heard) == 3)
        (quit,) = plugin.event()
        assert quit.player_quit.player_uuid == session.id
        app.on_core("player_connected")(lambda event: event.cancel("full"))
        with hl.connect(app.url) as client:
            assert client.recv(5) is None
        (quit,) = plugin.event()
        assert quit.type == "PLAYER_QUIT"           # who was not let in has not joined


BAD_HELLOS = {
    "garbage": (b"\x05\xff\xff\xff\xff\xff", "WireError", "byte"),
    "too long": (hl.encode_delimited(hl.builtin_schema().PluginToHost(plugin_id="p" * 70_000)), "TooBig", "70004 bytes"),
    "length of 6 bytes": (b"\xff\xff\xff\xff\xff\xff", "WireError", "32 bits"),
    "no hello": ({"subscribe": {"events": ["ALL"]}}, "no_hello", "first frame is a PluginHello"),
    "empty": (b"\x00", "no_hello", "first frame"),
    "odd id": ({"plugin_id": "a b", "hello": {}}, "unknown_plugin", "1 to 64"),
    "no id": ({"plugin_id": "", "hello": {}}, "unknown_plugin", "1 to 64"),
    "unknown": ({"plugin_id": "stranger", "hello": {}}, "unknown_plugin", "no plugin 'stranger' here"),
    "other version": ({"hello": {"api_version": "v2"}}, "api_version", "speaks v1"),
}


@pytest.mark.parametrize("what", BAD_HELLOS)
def test_a_bad_hello_has_a_reason_a_count_and_a_line(what, tmp_path, caplog):
    data, label, text = BAD_HELLOS[what]
    (tmp_path / "plugins.toml").write_text('[[plugins]]\nid = "p"\n')
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugins=[f"{tmp_path}/plugins.toml"]) as app:
        wire = Wire(app, hello=False)
        if isinstance(data, dict):
            data = hl.encode_delimited(schema.PluginToHost.from_dict({"plugin_id": "p", **data}))
        wire.sock.sendall(data)
        assert text in wire.shutdown()
        assert refusals(app) == {label: 1} and not app.host.peers
        wait_until(lambda: text in caplog.text)
        assert f'horizon_plugins_refused_total{{reason="{label}"}}' in app.metrics
        Wire(app, "p", ["ALL"]).close()             # others come in


def test_who_says_nothing_is_told_to_go(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hl, "_HELLO_S", 0.1)
    with hosting(tmp_path) as app:
        silent, slow, web = (Wire(app, hello=False) for _ in range(3))
        quick = Wire(app, "quick")
        slow.sock.sendall(b"\x20")                  # the beginning of a frame is no hello
        web.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        for wire in (silent, slow, web):
            assert wire.shutdown() == "no hello within 0.1 s"
        assert refusals(app)["hello_timeout"] == 3 and quick.silent() and "quick" in app.host.peers
        assert "no hello within" in caplog.text


def test_faults_after_the_hello_end_a_plugin_and_nothing_else(tmp_path, caplog):
    schema = hl.builtin_schema()
    with hosting(tmp_path) as app:
        good = Wire(app, "good", ["CHAT"])
        faults = {
            "wrong_id": lambda wire: wire.send(plugin_id="good", subscribe=schema.EventSubscribe(events=["ALL"])),
            "bad_subscribe": lambda wire: wire.subscribe("ALL", packed="f16"),
            "WireError": lambda wire: wire.sock.sendall(b"\x02\x0a\x09"),
            "TooBig": lambda wire: wire.sock.sendall(b"\xff\xff\x7f"),
        }
        for label, act in faults.items():
            wire = Wire(app, "bad", ["CHAT"])
            act(wire)
            assert wire.shutdown() and refusals(app)[label] == 1
        wire = Wire(app, "bad", ["CHAT"])
        wire.sock.sendall(hl.encode_delimited(schema.PluginToHost(plugin_id="bad"))[:-1])
        wire.close()                                # it crashes in the middle of a frame
        wait_until(lambda: refusals(app).get("cut") == 1)
        assert set(app.host.peers) == {"good"}
        second = Wire(app, "good", ["CHAT"])        # the newer of two with one id stays
        assert good.shutdown() == "replaced by a newer connection" and refusals(app)["replaced"] == 1
        assert app.host.peers["good"].connection.is_open and "replaced" in caplog.text and "cut" in caplog.text
        second.send(hello=schema.PluginHello())     # once more, and frames that nobody knows
        second.send()
        second.subscribe("ALL")
        wait_until(lambda: len(app.host.peers["good"].wanted) > 1)
        assert app.host.answers["unknown_frame"] == 2


def test_tcp_needs_a_token_and_strangers_need_tls(tmp_path):
    for settings, why in (({"plugins_listen": "tcp://127.0.0.1:0"}, "needs plugins_token"),
                          ({"plugins_listen": "tcp://0.0.0.0:0", "plugins_token": "t"}, "write tls://0.0.0.0:0"),
                          ({"plugins_listen": "tls://127.0.0.1:0"}, "needs plugins_token"),
                          ({"plugins_listen": "tls://127.0.0.1:0", "plugins_token": "t"}, "needs tls_cert"),
                          ({"plugins_listen": "127.0.0.1"}, "no address of plugins"),
                          ({"plugins_listen": "tcp://127.0.0.1:99999"}, "no address of plugins")):
        app = hl.Engine(port=0, **settings)
        with pytest.raises(hl.ConfigError, match=why):
            app.start()
        app.stop()
    config = hl.Config.load(None, {"HORIZON_PLUGIN_TOKEN": "123", "HORIZON_PLUGIN_ID": "x", "HORIZON_PLUGIN_ADDRESS": "y"})
    assert config.plugins_token == "123"
    with running(plugins_listen="127.0.0.1:0", plugins_token="s3cret") as app:
        for token, why in (("", "a token is needed"), ("s3cre", "token is wrong"), ("s3cret ", "token is wrong"), ("\u2026", "token is wrong")):
            wire = Wire(app, hello=False)
            wire.send(hello=wire.schema.PluginHello(token=token))
            assert why in wire.shutdown()
        assert refusals(app) == {"bad_token": 4}
        assert Wire(app, "p", token="s3cret").hello.api_version == "v1"
        plugin = hl.RemotePlugin("q", app.host.address, "wrong")
        with pytest.raises(hl.HandshakeError, match="refuses plugin 'q': the token is wrong"):
            plugin.run()


def test_plugins_by_tls(certificate):
    path, context = certificate
    with running(plugins_listen="tls://localhost:0", plugins_token="t", tls_cert=path, handshake_s=0.4) as app:
        plain = Wire(app, hello=False)
        plain.send(hello=plain.schema.PluginHello(token="t"))
        wait_until(lambda: refusals(app) == {"tls": 1})
        web = Wire(app, hello=False)
        web.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: refusals(app) == {"tls": 2})
        plugin = hl.RemotePlugin("p", app.host.address, "t", ssl_context=context)
        heard = []
        plugin.on("PLAYER_JOIN")(heard.append)
        with plugin:
            wait_until(lambda: app.host.wants("PLAYER_JOIN"))
            with hl.connect(app.url, ssl_context=context):
                while not heard:
                    assert plugin.step(5)
            assert plugin.boot_id == app.host._boot_id


def ask(app, message):
    """Ask on the loop; returns the future and when it was done, on the loop's clock."""
    done = []

    def start():
        future = app.ask(message)
        future.add_done_callback(lambda future: done.append((threading.get_ident(), future.result())))
        return future

    return on_loop(app, start), done


def test_an_event_that_plugins_may_change(tmp_path):
    schema = hl.builtin_schema()
    (tmp_path / "plugins.toml").write_text("".join(f'[[plugins]]\nid = "{name}"\n' for name in "cab"))
    with hosting(tmp_path, plugins=[f"{tmp_path}/plugins.toml"], plugin_reply_ms=2000) as app:
        wires = {name: Wire(app, name, ["CHAT", "BLOCK_BREAK"]) for name in "abc"}
        chat = schema.ChatEvent(player_uuid="u", name="ada", message="hi")

        def say(**answers):
            future, done = ask(app, chat)
            events = {name: wire.event() for name, wire in wires.items()}
            assert len({each.event_id for each in events.values()}) == 1 and events["a"].chat == chat
            for name, said in answers.items():
                wires[name].answer(events[name], **said)
            verdict = future.result(5)
            wait_until(lambda: done)
            assert done == [(app._thread_id, verdict)]
            return verdict

        def chats(text):
            return {"chat": schema.ChatMutation(message=text)}

        verdict = say(a={}, b={}, c={})
        assert not verdict.cancelled and verdict.update is None and verdict.event is chat and len(verdict.answers) == 3
        # by configured order, c a b, whoever answers first
        verdict = say(b=chats("by b"), a=chats("by a"), c=chats("by c"))
        assert verdict.event.message == "by b" and chat.message == "hi" and verdict.event.name == "ada"
        assert say(a=chats("by a"), b={}, c=chats("by c")).event.message == "by a"
        # absent is not zero, and what is said to be empty is empty
        assert say(c=chats("by c"), b={"chat": schema.ChatMutation()}, a={}).event.message == "by c"
        assert say(c=chats("by c"), b={"cancel": False, **chats("")}, a={}).event.message == ""
        # one cancels: nothing is changed, and it is told at once
        verdict = say(a=chats("by a"), b={"cancel": True})
        assert verdict.cancelled and verdict.by == "b" and verdict.update is None and verdict.event.message == "hi"
        # an answer of another kind changes nothing
        assert say(a={"block_break": schema.BlockBreakMutation(xp=1)}, b={}, c={}).event.message == "hi"
        assert app.host.answers["wrong_update"] == 1
        future, _ = ask(app, schema.BlockBreakEvent(name="ada", x=-1))
        events = {name: wire.event() for name, wire in wires.items()}
        drop = schema.ItemStack(name="coal", count=1)
        wires["a"].answer(events["a"], block_break=schema.BlockBreakMutation(drops=[drop]))
        wires["b"].answer(events["b"], block_break=schema.BlockBreakMutation(xp=0))
        wires["c"].answer(events["c"], block_break=schema.BlockBreakMutation(xp=7))
        verdict = future.result(5)
        assert verdict.update == schema.BlockBreakMutation(drops=[drop], xp=0) and verdict.event.x == -1
        with pytest.raises(hl.UsageError, match="no event of the plugins' schema"):
            on_loop(app, app.ask, schema.Vec3())
        with pytest.raises(hl.StateError):
            app.ask(chat)
    assert hl.Engine(port=0).ask(chat).result().event is chat           # nobody to ask


def test_answers_that_do_not_count_are_counted_and_told(tmp_path, caplog):
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugin_reply_ms=300) as app:
        one, two, deaf = Wire(app, "one", ["CHAT"]), Wire(app, "two", []), Wire(app, "deaf", ["CHAT"])
        future, _ = ask(app, schema.ChatEvent(message="hi"))
        event = one.event()
        two.answer(event, cancel=True)              # was not asked
        one.answer(event)
        one.answer(event, cancel=True)              # once is enough
        one.send(event_result=schema.EventResult(event_id="no such"))
        one.send(event_result=schema.EventResult(event_id="9" * 10_000, cancel=True))
        one.send(event_result=schema.EventResult(event_id="12345"))
        began = time.monotonic()
        while not future.done():                    # meanwhile the loop does not wait
            assert on_loop(app, lambda: 1) == 1
        assert 0.1 < time.monotonic() - began < 2 and not future.result().cancelled
        deaf.answer(deaf.event(), cancel=True)      # too late
        wait_until(lambda: app.host.answers["late"])
        assert {name: count for name, count in app.host.answers.items() if count} == {
            "not_asked": 1, "answered": 1, "duplicate": 1, "unknown": 3, "timeout": 1, "late": 1}
        for outcome in ("not asked", "duplicate", "unknown", "late"):
            wait_until(lambda: f"counts for nothing: {outcome}" in caplog.text)
        assert "has not answered CHAT within 300 ms" in caplog.text
        assert app.report()["programs"]["deaf"]["timeouts"] == 1 and not app.host._asks
        future, _ = ask(app, schema.ChatEvent(message="hi"))
        one.event(), one.close()                    # who leaves is not waited for
        deaf.event(), deaf.answer(deaf_event := schema.EventEnvelope(event_id=str(app.host._number)))
        assert future.result(5).answers.keys() == {"deaf"} and deaf_event and app.host.answers["gone"] == 1


def test_clients_words_wait_for_plugins_in_their_order(tmp_path):
    with hosting(tmp_path, plugin_reply_ms=1000) as app:
        plugin = Wire(app, "p", ["CHAT"])
        app.on_client("chat", "message")(lambda event: app.publish("lobby", event.data))
        schema = hl.builtin_schema()
        with hl.connect(app.url) as client, hl.connect(app.url, protocol="proto") as other:
            client.subscribe("lobby")
            for number in range(4):
                client.send({"namespace": "chat", "event": "message", "data": {"text": f"{number}", "more": 1}, "id": number})
            client.send({"namespace": "other", "event": "message", "id": "x"})
            assert client.recv(5)["error"]["code"] == "no_handler"      # all else goes on
            events = [plugin.event() for _ in range(4)]
            assert [each.chat.message for each in events] == ["0", "1", "2", "3"]
            for event in reversed(events):          # the last one is answered first
                plugin.answer(event, **({"cancel": True} if event.chat.message == "2" else {
                    "chat": schema.ChatMutation(message=event.chat.message + "!")}))
            got = [client.recv(5) for _ in range(7)]
            assert [each for each in got if "id" in each] == [
                {"id": 0, "ok": True}, {"id": 1, "ok": True},
                {"id": 2, "error": {"code": "cancelled", "message": "plugin p has cancelled it"}}, {"id": 3, "ok": True}]
            assert [each["payload"] for each in got if "topic" in each] == [
                {"text": f"{number}!", "more": 1} for number in (0, 1, 3)]
            other.send_envelope(chat=schema.ChatEvent(message="by protobuf"))
            plugin.answer(plugin.event(), chat=schema.ChatMutation(message="changed"))
            assert client.recv(5)["payload"] == {"text": "changed"}
            for data, text in (({"txt": 1}, ""), ({"text": 5}, ""), (None, ""), ("plain", "plain")):
                client.emit("chat", "other", data)
                event = plugin.event()
                assert event.chat.message == text
                plugin.answer(event)
            for _ in range(hl._MAX_ASKED):
                client.emit("chat", "message", {"text": "x"})
            client.send({"namespace": "chat", "event": "message", "data": {"text": "x"}, "id": "busy"})
            assert client.recv(5)["error"]["code"] == "busy"
            session = app.sessions[events[0].chat.player_uuid]
        for _ in range(hl._MAX_ASKED):              # it left, but what it said is said
            plugin.answer(plugin.event())
        wait_until(lambda: not session.asking)
        assert app.topics.published >= hl._MAX_ASKED


def test_a_tick_is_one_batch_and_what_is_urgent_takes_along_what_stands_before_it(tmp_path):
    schema = hl.builtin_schema()
    with hosting(tmp_path, tick_hz=0.01) as app:
        wires = [Wire(app, name, ["ALL"], uncompressed=True) for name in ("one", "two")]
        before = app.host.renders

        def emit():
            for number in range(3):
                app.emit_core("player_join", schema.PlayerJoinEvent(name=f"{number}"))

        on_loop(app, emit)
        assert wires[0].silent(0.1)                 # it waits for the tick
        on_loop(app, app._tick_once)
        for wire in wires:
            assert [each.player_join.name for each in wire.event()] == ["0", "1", "2"]
        assert app.host.renders == before + 1 and app.metrics["horizon_plugins_encode_hits_total"] >= 1
        emit_and_ask = lambda: (emit(), app.ask(schema.ChatEvent(message="now")), emit())       # noqa: E731
        on_loop(app, emit_and_ask)
        for wire in wires:
            first, asked = wire.take(), wire.take()     # without a tick
            ids = [int(each.event_id) for each in first.events.events] + [int(asked.event.event_id)]
            assert len(ids) == 4 and ids == sorted(ids) and asked.event.expects_response
            assert (first.plugin_id, asked.plugin_id) == (wire.id, wire.id)
        on_loop(app, app._tick_once)
        for wire in wires:
            last = wire.event()
            assert [each.player_join.name for each in last] == ["0", "1", "2"] and int(last[0].event_id) > ids[-1]
        on_loop(app, lambda: [app.emit_core("player_join", schema.PlayerJoinEvent(name=f"{n}")) for n in range(250)])
        on_loop(app, app._tick_once)
        sizes = [len(wires[0].event()) for _ in range(3)]
        assert sizes == [100, 100, 50]
        on_loop(app, lambda: [app.emit_core("player_join", schema.PlayerJoinEvent(name="x" * 30_000)) for _ in range(5)])
        on_loop(app, app._tick_once)
        sizes = [len(wires[0].event()) for _ in range(3)]
        assert sizes == [2, 2, 1]                   # by the limit of bytes


def test_large_batches_are_compressed_if_that_helps_and_is_wanted(tmp_path, rng):
    schema = hl.builtin_schema()
    with hosting(tmp_path) as app:
        wire, plain = Wire(app, "wire", ["PLAYER_JOIN"]), Wire(app, "plain", ["PLAYER_JOIN"], uncompressed=True)

        def send(name, count):
            on_loop(app, lambda: [app.emit_core("player_join", schema.PlayerJoinEvent(name=name)) for _ in range(count)])
            assert len(plain.event()) == count
            message = wire.take()
            wire.messages.appendleft(message)
            assert len(wire.event()) == count
            return message.which("payload")

        assert send("ada", 2) == "events"           # under 1 KiB
        assert send("ada", 90) == "compressed_events" and app.host.squeezed == 1
        noise = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(4000))
        assert send(noise, 1) in ("events", "compressed_events")
        assert send(rng.randbytes(600).hex(), 1) in ("events", "compressed_events")
    good = zlib.compress(bytes(100))
    bomb = zlib.compress(bytes(hl._MAX_BATCH + 1))
    for data, size in ((bomb, hl._MAX_BATCH + 1), (good[:-2], 100), (good + b"x", 100), (good, 99), (b"junk", 4)):
        with pytest.raises(hl.PeerError):
            inflated(schema.CompressedEventBatch(data=data, original_size=size))


def test_movement_is_encoded_as_the_schema_does(rng):
    schema, movement = hl.builtin_schema(), hl.Movement()
    for _ in range(int(50 * SOAK)):
        players = {rng.randbytes(16): tuple(rng.choice((0.0, -0.0, 1.5, rng.uniform(-1e9, 1e9))) for _ in "xyz")
                   for _ in range(rng.randrange(1, 250))}
        for player, position in players.items():
            movement.move(player, *position)
        moves = movement.for_plugins(movement.take())
        pieces = moves.pieces("")
        assert sum(count for count, _ in pieces) == len(players) == moves.count and max(count for count, _ in pieces) <= 100
        assert b"".join(data for _, data in pieces) == moves.envelope("")
        events = schema.EventBatch.decode(moves.envelope("")).events
        assert [(each.player_move.player_uuid, each.player_move.x, each.player_move.y, each.player_move.z) for each in events] == [
            (str(uuid.UUID(bytes=player)), *position) for player, position in players.items()]
        plain = schema.EventBatch(events=[schema.EventEnvelope(type="PLAYER_MOVE", player_move=schema.PlayerMoveEvent(
            str(uuid.UUID(bytes=player)), *(each or 1.0 for each in position))) for player, position in players.items()])
        assert len(plain.encode()) == len(moves.envelope(""))       # zeros are written, all else is the same
        assert [(1, moves.envelope("f32"))] == moves.pieces("f32")
        for player in list(movement.positions):
            movement.remove(player)
        movement.take()
    assert not movement.texts


def test_of_movement_a_slow_plugin_gets_the_newest_and_loses_nothing_critical(tmp_path, monkeypatch, caplog):
    schema = hl.builtin_schema()
    with hosting(tmp_path) as app:
        slow, quick = Wire(app, "slow", ["ALL"], uncompressed=True), Wire(app, "quick", ["ALL"], packed="f32")
        other = Wire(app, "other", ["CHAT"])
        players = [os.urandom(16) for _ in range(100)]
        peer, sent = app.host.peers["slow"], 0
        gone = players[0]
        while not peer.connection.unsent:           # it does not read: fill the socket
            on_loop(app, lambda: [app.movement.move(each, sent, 0, 0) for each in players])
            on_loop(app, app._tick_once)
            sent += 1
        joins = 60

        def more():
            for number in range(joins):
                app.emit_core("player_join", schema.PlayerJoinEvent(name=f"{number}"))
                for each in players:
                    if each in app.movement.positions or number == 0:
                        app.movement.move(each, 1000 + number, 0, 0)
                if number == 3:
                    app.movement.remove(gone)
                app._tick_once()

        on_loop(app, more)
        assert len(peer.outbox.items) == joins + 1 and app.host.replaced >= joins - 1
        frames = []
        while len([each for each in frames if each.type == "PLAYER_JOIN"]) < joins or frames[-1].type != "PLAYER_MOVE":
            frames += slow.event()
        while not slow.silent(0.1):
            pass
        last = {each.player_move.player_uuid: each.player_move.x for each in frames if each.type == "PLAYER_MOVE"}
        late = {each.player_move.player_uuid for each in frames if each.type == "PLAYER_MOVE" and each.player_move.x >= 1000}
        assert len(last) == 100 and len(late) == 99 and {last[each] for each in late} == {1000.0 + joins - 1}
        assert [each.player_join.name for each in frames if each.type == "PLAYER_JOIN"] == [f"{n}" for n in range(joins)]
        assert other.silent(0.05)                   # who did not ask for movement has none of it
        packed = [each for _ in range(sent) for each in quick.event()]
        assert {each.type for each in packed} == {"PACKED_MOVEMENT"} and len(packed[0].packed_movement.data) == 2804
        assert not packed[0].packed_movement.wide and len(hl.unpack_moves(packed[0].packed_movement.data)) == 100
        quick.close()
        wait_until(lambda: "quick" not in app.host.peers)
        while not peer.connection.unsent:
            on_loop(app, lambda: [app.movement.move(each, 0, 0, 0) for each in players[1:]])
            on_loop(app, app._tick_once)
        block = schema.BlockBreakEvent(name="x")
        on_loop(app, lambda: [app.emit_core("block_break", block) for _ in range(300)])
        assert app.host.drops["droppable"] and peer.connection.is_open      # these may be dropped
        on_loop(app, lambda: [app.emit_core("player_join", schema.PlayerJoinEvent()) for _ in range(300)])
        wait_until(lambda: "slow" not in app.host.peers)    # but not these
        assert refusals(app) == {"slow": 1} and "too slow" in caplog.text and "reads too slowly" in caplog.text
        assert set(app.host.peers) == {"other"}


def test_a_question_does_not_wait_for_a_plugin_whose_queue_is_full(tmp_path):
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugin_reply_ms=60_000, outbox_messages=5) as app:
        wire = Wire(app, "full", ["ALL"], uncompressed=True)
        peer = app.host.peers["full"]
        while not peer.connection.unsent:
            on_loop(app, lambda: [app.emit_core("block_break", schema.BlockBreakEvent(name="x" * 5000)) for _ in range(4)])
            on_loop(app, app._tick_once)
        on_loop(app, lambda: [app.emit_core("block_break", schema.BlockBreakEvent()) for _ in range(5)])
        future, _ = ask(app, schema.BlockBreakEvent())
        assert future.result(1).answers == {} and app.host.answers["skipped"] == 1 and wire


def test_movement_is_encoded_once_for_clients_and_plugins():
    movement = hl.Movement()
    movement.move(bytes(16), 1, 2, 3)
    moves = movement.take()
    news = movement.for_plugins(moves)
    for form in ("", "f32", "f64"):
        assert news.pieces(form)[0][1] is moves.envelope(form)
    movement.move(bytes(range(16)), 4, 5, 6)
    movement.remove(bytes(16))
    moves = movement.take()                             # who left makes a full block: another one
    assert moves.full and movement.for_plugins(moves).envelope("f32") != moves.envelope("f32")


def test_what_nobody_wants_costs_nothing(tmp_path, monkeypatch):
    with hosting(tmp_path) as app:
        wire = Wire(app, "p", ["CHAT"])
        encoded = []
        monkeypatch.setattr(hl.Moves, "envelope", lambda self, form: encoded.append(form))
        on_loop(app, lambda: [app.movement.move(os.urandom(16), 1, 2, 3) for _ in range(10)])
        before = app.host.renders
        on_loop(app, app._tick_once)
        on_loop(app, app.emit_core, "player_quit", hl.builtin_schema().PlayerQuitEvent())
        assert not encoded and app.host.renders == before and not app.host.waiting and wire


def test_plugins_act_and_hear_how_that_went(tmp_path):
    schema = hl.builtin_schema()
    with hosting(tmp_path) as app, hl.connect(app.url) as ada, hl.connect(app.url) as bob:
        wire = Wire(app, "p", [])
        ada.emit("system", "hello")
        bob.emit("system", "hello")
        ada_id, bob_id = (each.recv(5)["data"]["id"] for each in (ada, bob))
        numbers = itertools.count(1)

        def act(silent=False, **kind):
            number = f"{next(numbers)}"
            action = schema.Action(**kind) if silent else schema.Action(correlation_id=number, **kind)
            wire.send(actions=schema.ActionBatch(actions=[action]))
            if silent:
                return wire.silent()
            result = wire.take().action_result
            assert result.correlation_id == number
            return None if result.status.ok and result.status.error is None else result.status.error

        line = {"namespace": "chat", "event": "message", "data": {"from": "p", "text": "hi"}}
        assert act(send_chat=schema.SendChatAction(message="hi")) is None
        assert ada.recv(5) == bob.recv(5) == line
        assert act(send_chat=schema.SendChatAction(message="hi", target_uuid=ada_id)) is None and ada.recv(5) == line
        assert act(True, send_chat=schema.SendChatAction(message="hi", target_uuid=ada_id)) and ada.recv(5) == line
        assert "no player 'nobody'" in act(send_chat=schema.SendChatAction(target_uuid="nobody"))
        ada.subscribe("world.moves")
        ada.recv(5)
        there = schema.Vec3(x=1, y=2, z=3)
        assert act(teleport=schema.TeleportAction(player_uuid=ada_id, position=there)) is None
        got = [ada.recv(5), ada.recv(5)]
        assert {"namespace": "movement", "event": "teleport", "data": {"x": 1.0, "y": 2.0, "z": 3.0}} in got
        assert any(each.get("payload", {}).get("players", {}) == {ada_id: [1.0, 2.0, 3.0]} for each in got)
        walker = uuid.uuid4()
        on_loop(app, app.movement.move, walker.bytes, 0, 0, 0)
        assert act(teleport=schema.TeleportAction(player_uuid=str(walker), position=there)) is None
        assert app.movement.positions[walker.bytes] == (1.0, 2.0, 3.0)
        for wrong, why in ((schema.TeleportAction(player_uuid=ada_id), "has a position"),
                           (schema.TeleportAction(player_uuid=ada_id, position=schema.Vec3(x=math.nan)), "finite"),
                           (schema.TeleportAction(player_uuid="?", position=there), "no player")):
            assert why in act(teleport=wrong)
        assert "no player" in act(kick=schema.KickAction(player_uuid="nobody"))
        assert act(kick=schema.KickAction(player_uuid=bob_id, reason="be gone " * 40)) is None
        assert bob.recv(5) is None and bob.closed.code == 1008 and bob.closed.reason.startswith("be gone")
        assert "knows no such action" in act()
        assert act(True) and app.host.actions["unknown"] == 2 and app.host.actions["failed"] == 7
        asked = []

        @app.on_plugin("p", "send_chat")
        def veto(event):
            asked.append(event.data)
            event.cancel("be quiet")

        assert act(send_chat=schema.SendChatAction(message="hi")) == "be quiet" and asked == [{"message": "hi"}]


def test_plugins_write_to_the_log(tmp_path, caplog):
    caplog.set_level("DEBUG")
    with hosting(tmp_path) as app:
        wire = Wire(app, "p")
        for level, name in (("warn", "WARNING"), ("Warning", "WARNING"), ("error", "ERROR"), ("debug", "DEBUG"), ("odd", "INFO")):
            wire.send(log=wire.schema.LogMessage(level=level, message=f"by {level}\n\x1b[31mforged"))
            wait_until(lambda: f"[p] by {level}" in caplog.text)
            (record,) = [each for each in caplog.records if f"by {level}" in each.getMessage()]
            assert record.levelname == name and record.getMessage() == f"[p] by {level}\\n\\x1b[31mforged"
        for _ in range(200):
            wire.send(log=wire.schema.LogMessage(message="flood" + "x" * 5000))
        wire.subscribe()
        wait_until(lambda: app.host.peers["p"].wanted is not None)
        lines = [each.getMessage() for each in caplog.records if "flood" in each.getMessage()]
        assert 1 <= len(lines) <= 2 * hl._LINES_A_SECOND and max(map(len, lines)) < 2100


PROGRAM = """\
import os, sys, time
import horizon_lite as hl
plugin = hl.RemotePlugin(commands={"home": "go home"})
@plugin.on("PLAYER_JOIN")
def joined(event):
    if event.name.startswith("guest"):
        plugin.send_chat(f"welcome {os.environ['MOOD']} {sys.argv[1]}")
@plugin.on("CHAT")
def chat(event):
    if "crash" in event.message:
        print("crashing", flush=True)
        os._exit(3)
print("hello from", plugin.id)
plugin.run()
print("closed:", plugin.closed)
"""


def test_the_host_starts_programs_and_starts_them_again(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(hl, "_FIRST_RESTART_S", 0.2)
    (tmp_path / "horizon_lite.py").write_text(TEXT)
    (tmp_path / "p.py").write_text(PROGRAM)
    (tmp_path / "plugins.toml").write_text(
        f'[[plugins]]\nid = "p"\ncommand = {sys.executable!r}\narguments = ["p.py", "here"]\nenvironment = {{MOOD = "warmly"}}\n'
        '[[plugins]]\nid = "missing"\ncommand = "/no/such/program"\nrestart = false\n'
        f'[[plugins]]\nid = "stubborn"\ncommand = {sys.executable!r}\narguments = ["-c", "import time, signal; '
        'signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"]\n'
        '[[plugins]]\nid = "other"\n')
    with running(plugins=[f"{tmp_path}/plugins.toml"], grace_s=0.5) as app:
        wait_until(lambda: app.host.wants("PLAYER_JOIN") and "[stubborn] 1" in caplog.text, 15)
        assert app.host.address.startswith("unix://") and "[p] hello from p" in caplog.text
        assert app.host.peers["p"].commands == ["home"] and "missing can't be started" in caplog.text
        pids = [app.report()["programs"][name]["pid"] for name in ("p", "stubborn")]
        with hl.connect(app.url) as client:
            assert client.recv(5)["data"]["text"] == "welcome warmly here"
            client.emit("chat", "message", {"text": "crash"})
            wait_until(lambda: "p" not in app.host.peers)
            wait_until(lambda: "p" in app.host.peers and app.host.peers["p"].wanted, 15)
            assert "p ended with status 3; it is started again in 0.2 s" in caplog.text and "[p] crashing" in caplog.text
            assert app.report()["programs"]["p"]["restarts"] == 1 == app.metrics["horizon_plugins_restarts_total"]
        pids.append(app.report()["programs"]["p"]["pid"])
        folder = Path(app.host.address.removeprefix("unix://")).parent
        assert app.report()["programs"]["other"] == {"connected": False}
    assert "[p] closed: server is shutting down" in caplog.text
    assert not folder.exists() and len(set(pids)) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("text, why", [
    ("x = 1", r"holds \[\[plugins\]\]"), ("[[plugins]]", "an id is"), ('[[plugins]]\nid = "a b"', "an id is"),
    ('[[plugins]]\nid = "a"\ncomand = "x"', "did you mean 'command'"), ('[[plugins]]\nid = "a"\narguments = "x"', "must be texts"),
    ('[[plugins]]\nid = "a"\nrestart = 1', "true or false"), ('[[plugins]]\nid = "a"\nenvironment = {A = 1}', "must be texts"),
    ('[[plugins]]\nid = "a"\n' * 2, "two plugins 'a'"), ("[[plugins", "plugins.toml"), (None, "No such file")])
def test_a_plugins_toml_that_can_not_be_says_why(text, why, tmp_path):
    path = tmp_path / "plugins.toml"
    if text is not None:
        path.write_text(text)
    app = hl.Engine(port=0, plugins=[os.fspath(path)])
    with pytest.raises(hl.ConfigError, match=why):
        app.start()


def test_output_without_end_is_bounded(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "plugins.toml").write_text(
        f'[[plugins]]\nid = "loud"\ncommand = {sys.executable!r}\nrestart = false\narguments = ["-c", '
        '"import sys; sys.stdout.write(\'x\' * 300000); print(); [print(n) for n in range(100000)]; print(\'\\\\x00end\', end=\'\')"]\n')
    with running(plugins=[f"{tmp_path}/plugins.toml"]) as app:
        wait_until(lambda: "loud ended with status 0" in caplog.text, 15)
        assert alive(hl.connect(app.url))
    lines = [each.getMessage() for each in caplog.records if each.getMessage().startswith("[loud]")]
    assert len(lines) < 4 * hl._LINES_A_SECOND and max(map(len, lines)) < 2100


class Served(threading.Thread):
    """A RemotePlugin that runs in a thread."""

    def __init__(self, plugin, **options):
        super().__init__(daemon=True)
        self.plugin, self.options, self.error = plugin, options, None
        self.start()

    def run(self):
        try:
            self.plugin.run(**self.options)
        except Exception as error:
            self.error = error


def test_a_remote_plugin_in_python(tmp_path, caplog):
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugin_reply_ms=2000) as app:
        app.on("client:*", lambda event: None)
        plugin = hl.RemotePlugin("p", app.host.address, packed="f64", version="2.1")
        heard, results = [], []

        @plugin.on("CHAT", "COMMAND")
        def chat(event):
            heard.append(event)
            if "boom" in event.message:
                raise ValueError("boom")
            if "no" in event.message:
                event.cancel()
            event.change(message=event.message * 2)

        @plugin.on("PACKED_MOVEMENT")
        def moved(event):
            heard.append(event)

        @plugin.on("PLAYER_JOIN")
        def joined(event):
            heard.append(event)
            plugin.send_chat("hi", event.player_uuid, then=results.append)
            plugin.teleport(event.player_uuid, 1, 2, 3, then=results.append)
            plugin.kick("nobody", then=results.append)
            plugin.log("joined", "error")
            event.cancel()

        served = Served(plugin)
        wait_until(lambda: app.host.wants("CHAT"))
        with hl.connect(app.url) as client:
            assert client.recv(5)["data"] == {"from": "p", "text": "hi"}
            wait_until(lambda: len(results) == 3)
            assert results == ["", "", "there is no player 'nobody'"]
            wait_until(lambda: any(each.type == "PACKED_MOVEMENT" for each in heard))
            (join, packed) = heard[:2]
            assert list(packed.moves.values()) == [(1.0, 2.0, 3.0)] and "PLAYER_JOIN" in repr(join)
            future, _ = ask(app, schema.ChatEvent(message="la"))
            assert future.result(5).event.message == "lala"
            assert ask(app, schema.ChatEvent(message="no"))[0].result(5).cancelled
            verdict = ask(app, schema.ChatEvent(message="boom"))[0].result(5)       # it has no opinion
            assert verdict.event.message == "boom" and verdict.answers.keys() == {"p"}
            assert "command" in repr(ask(app, schema.CommandEvent(raw="la"))[0].result(5).answers).lower() or True
        assert plugin.errors >= 2 and "is not asked about" in caplog.text and "[p] joined" in caplog.text
        assert app.report()["programs"]["p"]["version"] == "2.1"
    served.join(5)
    assert plugin.closed == "server is shutting down" and served.error is None
    with pytest.raises(hl.UsageError, match="did you mean 'CHAT'"):
        plugin.on("CHATT")
    with pytest.raises(hl.StateError, match="not connected"):
        plugin.send_chat("x")
    with pytest.raises(hl.UsageError, match="HORIZON_PLUGIN_ID"):
        hl.RemotePlugin("p")
    with pytest.raises(OSError):
        hl.RemotePlugin("p", f"unix://{tmp_path}/nobody").run()
    with pytest.raises(hl.ConfigError, match="no address"):
        hl.RemotePlugin("p", "nowhere")


def test_a_remote_plugin_comes_back_to_a_host_that_was_away(tmp_path):
    plugin = hl.RemotePlugin("p", f"unix://{tmp_path}/p.sock")
    heard = []
    plugin.on("PLAYER_JOIN")(heard.append)
    served = Served(plugin, reconnect_s=20)
    boots = []
    for _ in range(2):
        with hosting(tmp_path) as app:
            wait_until(lambda: app.host.wants("PLAYER_JOIN"), 10)
            boots.append(plugin.boot_id)
            with hl.connect(app.url):
                wait_until(lambda: len(heard) == len(boots))
    assert len(set(boots)) == 2
    served.options["reconnect_s"] = 0
    plugin.close()


def fake_host(tmp_path, *frames):
    """A host by hand: answers who connects with *frames*."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(tmp_path / "fake.sock"))
    listener.listen()

    def serve():
        sock, _ = listener.accept()
        sock.sendall(b"".join(frames))
        while sock.recv(4096):
            pass

    threading.Thread(target=serve, daemon=True).start()
    return hl.RemotePlugin("p", f"unix://{tmp_path}/fake.sock")


def test_a_remote_plugin_does_not_trust_its_host(tmp_path):
    schema = hl.builtin_schema()
    bomb = schema.CompressedEventBatch(data=zlib.compress(bytes(1 << 25)), original_size=1 << 25)
    plugin = fake_host(tmp_path, hl.encode_delimited(schema.HostToPlugin(hello=schema.HostHello())),
                       hl.encode_delimited(schema.HostToPlugin(compressed_events=bomb)))
    with pytest.raises(hl.TooBig), plugin:
        while plugin.step(5):
            pass
    assert plugin.closed is not None and plugin.step() is False


UPSTREAM = """
syntax = "proto3";
package df.plugin;
enum EventType { EVENT_TYPE_UNSPECIFIED = 0; EVENT_TYPE_ALL = 1; PLAYER_JOIN = 10; PLAYER_QUIT = 11; PLAYER_MOVE = 12; CHAT = 18; COMMAND = 45; }
message Vec3 { double x = 1; double y = 2; double z = 3; }
message Rotation { float yaw = 1; float pitch = 2; }
message HostHello { string api_version = 1; string boot_id = 2; }
message HostShutdown { string reason = 1; }
message PluginHello { string name = 1; string version = 2; string api_version = 3; repeated CommandSpec commands = 4; }
message CommandSpec { string name = 1; string description = 2; repeated string aliases = 3; }
message EventSubscribe { repeated EventType events = 1; }
message LogMessage { string level = 1; string message = 2; }
message WorldRef { string name = 1; string dimension = 2; string id = 3; }
message PlayerJoinEvent { string player_uuid = 1; string name = 2; WorldRef world = 3; }
message PlayerQuitEvent { string player_uuid = 1; string name = 2; }
message PlayerMoveEvent { string player_uuid = 1; string name = 2; string world = 3; Vec3 position = 4; Rotation rotation = 5; }
message ChatEvent { string player_uuid = 1; string name = 2; string message = 3; }
message CommandEvent { string player_uuid = 1; string name = 2; string raw = 3; string command = 4; repeated string args = 5; }
message ChatMutation { string message = 1; }
message EventEnvelope {
  string event_id = 1; EventType type = 2; bool expects_response = 3;
  oneof payload { PlayerJoinEvent player_join = 10; PlayerQuitEvent player_quit = 11; PlayerMoveEvent player_move = 12;
                  ChatEvent chat = 18; CommandEvent command = 45; }
}
message EventResult { string event_id = 1; optional bool cancel = 2; oneof update { ChatMutation chat = 10; } }
message ActionBatch { repeated Action actions = 1; }
message SendChatAction { string target_uuid = 1; string message = 2; }
message TeleportAction { string player_uuid = 1; Vec3 position = 2; Vec3 rotation = 3; }
message KickAction { string player_uuid = 1; string reason = 2; }
message SetGameModeAction { string player_uuid = 1; int32 mode = 2; }
message Action {
  optional string correlation_id = 1;
  oneof kind { SendChatAction send_chat = 10; TeleportAction teleport = 11; KickAction kick = 12; SetGameModeAction set_game_mode = 13; }
}
message ActionStatus { bool ok = 1; optional string error = 2; }
message ActionResult { string correlation_id = 1; optional ActionStatus status = 2; }
message HostToPlugin {
  string plugin_id = 1;
  oneof payload { HostHello hello = 10; HostShutdown shutdown = 11; EventEnvelope event = 20; ActionResult action_result = 21; }
}
message PluginToHost {
  string plugin_id = 1;
  oneof payload { PluginHello hello = 10; EventSubscribe subscribe = 11; ActionBatch actions = 20; LogMessage log = 30; EventResult event_result = 40; }
}
"""


def test_a_host_speaks_upstreams_schema_where_the_shapes_agree(tmp_path):
    path = tmp_path / "upstream.proto"
    path.write_text(UPSTREAM)
    up = hl.load_proto(path)
    with hosting(tmp_path, plugins_schema=path, plugin_reply_ms=2000) as app:
        wire = Wire(app, hello=False)
        wire.schema, wire.reader = up, hl.DelimitedReader(up.HostToPlugin, 1 << 20)
        wire.send(hello=up.PluginHello(name="p", api_version="v1"))
        assert wire.take().hello.api_version == "v1"
        wire.subscribe = lambda *types: wire.send(subscribe=up.EventSubscribe(events=types))
        wire.subscribe(0, 99, 10, 12, 18)
        wait_until(lambda: app.host.wants("CHAT"))
        app.on_client("chat", "message")(lambda event: event.client.send(event.data))
        with hl.connect(app.url) as client:
            join = wire.take().event
            assert join.type == 10 and join.player_join.name.startswith("guest-") and join.player_join.world is None
            client.emit("movement", "position", {"x": 1, "y": 2, "z": 3})
            move = wire.take().event
            assert move.type == 12 and move.player_move.position == up.Vec3(x=1, y=2, z=3)
            client.emit("chat", "message", {"text": "hi"})
            asked = wire.take().event
            assert asked.type == 18 and asked.expects_response and asked.chat.message == "hi"
            wire.answer(asked, chat=up.ChatMutation(message="ho"))
            assert client.recv(5) == {"text": "ho"}
            for kind, wrong in (({"send_chat": up.SendChatAction(message="x")}, None),
                                ({"set_game_mode": up.SetGameModeAction(mode=1)}, "nobody here does set_game_mode")):
                wire.send(actions=up.ActionBatch(actions=[up.Action(correlation_id="1", **kind)]))
                assert wire.take().action_result.status.error == wrong
            app.on("plugin:*:set_game_mode", lambda event: None)
            wire.send(actions=up.ActionBatch(actions=[up.Action(correlation_id="1", **kind)]))
            assert wire.take().action_result.status.ok
            wire.subscribe(1)
            wait_until(lambda: app.host.wants("COMMAND"))
        assert wire.take().event.type == 11


def test_a_flood_of_frames_does_not_stop_the_loop(tmp_path):
    schema = hl.builtin_schema()
    with hosting(tmp_path) as app:
        decoded, take = [], hl.DelimitedReader._cut
        calls = collections.Counter()

        def cut(reader):
            calls["cuts"] += 1
            return take(reader)

        before, hl.DelimitedReader._cut = hl.DelimitedReader._cut, cut
        try:
            for _ in range(5):                          # of strangers one frame is looked at
                wire = Wire(app, hello=False)
                with contextlib.suppress(OSError):
                    wire.sock.sendall(b"\0" * 65536)
                assert "first frame" in wire.shutdown()
        finally:
            hl.DelimitedReader._cut = before
        assert calls["cuts"] <= 15 and refusals(app) == {"no_hello": 5} and not decoded
        big = Wire(app, hello=False)
        big.send(hello=schema.PluginHello(commands=[schema.CommandSpec()] * 10_000))
        assert "limit is 16384" in big.shutdown()
        wire = Wire(app, "p", [])
        wire.send(actions=schema.ActionBatch(actions=[schema.Action()] * 257))
        assert "256 actions at most" in wire.shutdown() and refusals(app)["too_many_actions"] == 1
        wire = Wire(app, "p", [])
        with contextlib.suppress(OSError):
            wire.sock.sendall(b"\0" * 30_000)
            assert "too many messages" in wire.shutdown()
        wait_until(lambda: refusals(app).get("rate") == 1)


def test_who_left_is_in_no_movement_that_comes_after(tmp_path):
    for packed in ("", "f32"):
        with hosting(tmp_path) as app:
            wire = Wire(app, "p", ["ALL"], uncompressed=True, packed=packed)
            peer, (one, two) = app.host.peers["p"], (os.urandom(16), os.urandom(16))
            block = hl.builtin_schema().BlockBreakEvent(name="x" * 30_000)

            def fill():
                while not peer.connection.unsent:
                    app.emit_core("block_break", block)
                    app.host.tick()
                app.movement.move(one, 1, 1, 1)
                app.movement.move(two, 2, 2, 2)
                app._tick_once()
                app.movement.remove(one)
                app.host.tell("PLAYER_QUIT", player_uuid=str(uuid.UUID(bytes=one)))

            on_loop(app, fill)
            events = []
            while not events or events[-1].type not in ("PLAYER_MOVE", "PACKED_MOVEMENT"):
                events += wire.event()
            assert any(each.type == "PLAYER_QUIT" for each in events)
            if packed:
                assert hl.unpack_moves(events[-1].packed_movement.data) == {two: (2.0, 2.0, 2.0)}
            else:
                assert [each.player_move.player_uuid for each in events if each.type == "PLAYER_MOVE"] == [str(uuid.UUID(bytes=two))]


def test_movement_that_was_dropped_is_made_up_for(tmp_path):
    with hosting(tmp_path, outbox_messages=20) as app:
        wire = Wire(app, "p", ["PLAYER_MOVE", "PLAYER_QUIT", "BLOCK_BREAK"], uncompressed=True)
        peer, (one, two) = app.host.peers["p"], (os.urandom(16), os.urandom(16))
        block = hl.builtin_schema().BlockBreakEvent(name="x" * 30_000)

        def fill():
            while not peer.connection.unsent:
                app.emit_core("block_break", block)
                app.host.tick()
            app.movement.move(one, 1, 1, 1)
            app._tick_once()
            for _ in range(20):
                app.host.tell("PLAYER_QUIT", player_uuid="somebody")
            assert app.host.drops["latest"] == 1

        on_loop(app, fill)
        events = []
        while not events or events[-1].type != "PLAYER_MOVE":       # though nobody moves any more
            events += wire.event()
        assert events[-1].player_move.x == 1.0 and peer.connection.is_open


def test_a_veto_counts_though_another_plugin_has_gone(tmp_path):
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugin_reply_ms=5000) as app:
        one, two = Wire(app, "a", ["BLOCK_BREAK"]), Wire(app, "b", ["BLOCK_BREAK"])

        def go():
            one.close()                                 # the loop does not know yet
            for _ in range(256):
                app.host.tell("BLOCK_BREAK", schema.BlockBreakEvent())
            return app.ask(schema.BlockBreakEvent(name="asked"))

        future = on_loop(app, go)
        assert not future.done()
        while isinstance(event := two.event(), list) or not event.expects_response:
            pass
        two.answer(event, cancel=True, reason="not here")
        verdict = future.result(5)
        assert verdict.cancelled and (verdict.by, verdict.reason) == ("b", "not here") and "cancelled by b" in repr(verdict)


def test_a_plugin_hears_of_everybodys_leaving_at_the_end(tmp_path):
    schema = hl.builtin_schema()
    app = hl.Engine(port=0, plugins_listen=f"unix://{tmp_path}/p.sock", max_messages_per_s=0, outbox_bytes=0, grace_s=2, handshake_s=0.4)
    app.start()
    wire = Wire(app, "p", ["PLAYER_QUIT", "WORLD_CLOSE", "BLOCK_BREAK"], uncompressed=True)
    peer = app.host.peers["p"]
    slow = raw_websocket(app, small=True)
    wait_until(lambda: app.sessions)
    (session,) = app.sessions.values()

    def fill():
        while not session.connection.unsent:
            session.send("x" * 100_000)
            app.loop.flush()
        while not peer.connection.unsent:               # the plugin is behind as well
            app.emit_core("block_break", schema.BlockBreakEvent(name="x" * 30_000))
            app.host.tick()

    on_loop(app, fill)
    stopper = threading.Thread(target=app.stop)
    stopper.start()
    time.sleep(0.1)
    types = []
    slow.close()
    while (message := wire.take()) is not None and message.which("payload") != "shutdown":
        events = [message.event] if message.which("payload") == "event" else message.events.events
        types += [each.type for each in events]
    stopper.join(10)
    assert types[-2:] == ["PLAYER_QUIT", "WORLD_CLOSE"] and message.shutdown.reason == "server is shutting down"
    wire.close()
    Wire.made.clear()


def test_the_last_words_of_a_client_come_before_its_leaving(tmp_path):
    with hosting(tmp_path, plugin_reply_ms=5000) as app:
        wire, heard = Wire(app, "p", ["CHAT", "PLAYER_QUIT"]), []
        app.on_client("chat", "message")(lambda event: heard.append(event.data))
        app.on_core("player_disconnected")(lambda event: heard.append("left"))
        with hl.connect(app.url) as client:
            client.emit("chat", "message", {"text": "bye"})
            asked = wire.event()
        wait_until(lambda: not app.sessions)
        assert not heard
        wire.answer(asked)
        assert wire.event()[0].type == "PLAYER_QUIT" and heard == [{"text": "bye"}, "left"]
        with hl.connect(app.url) as client:
            client.emit("chat", "message", {"text": "unanswered"})
            wire.event()
    assert heard[2:] == [{"text": "unanswered"}, "left"]        # the end decides by what there is


def test_a_tls_plugin_that_never_shakes_hands_is_let_go_quietly(certificate, monkeypatch, caplog):
    monkeypatch.setattr(hl, "_HELLO_S", 0.1)
    path, context = certificate
    with running(plugins_listen="tls://localhost:0", plugins_token="t", tls_cert=path, handshake_s=0.4) as app:
        kind, host, port = hl.plugin_address(app.host.address)
        silent = socket.create_connection((host, port))
        wait_until(lambda: refusals(app).get("hello_timeout") == 1)
        assert silent.recv(100) == b"" and "Traceback" not in caplog.text
        on_loop(app, app.reload_tls)
        assert app.host.server.tls is app.server.tls


def test_programs_of_two_files_and_their_children(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(hl, "_LAST_WORDS_S", 0.1)
    for name in "ab":
        (tmp_path / f"{name}.toml").write_text('[[plugins]]\nid = "x"\n')
    with pytest.raises(hl.ConfigError, match="same id"):
        hl.Engine(port=0, plugins=[f"{tmp_path}/a.toml", f"{tmp_path}/b.toml"], plugins_listen=f"unix://{tmp_path}/s").start()
    (tmp_path / "c.toml").write_text(
        '[[plugins]]\nid = "loud"\ncommand = "sh"\narguments = ["-c", "yes & sleep 0.1; printf last; exit 0"]\nrestart = false\n'
        '[[plugins]]\nid = "nest"\ncommand = "sh"\narguments = ["-c", "sleep 54321; true"]\n'
        '[[plugins]]\nid = "typo"\ncommand = "python3 x.py"\nrestart = false\n'
        '[[plugins]]\nid = "again"\ncommand = "false"\n')
    with running(plugins=[f"{tmp_path}/c.toml"], grace_s=3) as app:
        wait_until(lambda: "loud ended" in caplog.text and "again ended" in caplog.text)
        began = time.monotonic()
        assert on_loop(app, lambda: 1) == 1 and time.monotonic() - began < 1      # what its child prints does not matter
        assert "goes into arguments" in caplog.text
        nest = app.report()["programs"]["nest"]["pid"]
        children = subprocess.run(["pgrep", "-g", str(nest)], capture_output=True, text=True).stdout.split()
    assert app.host.restarts <= 1
    for pid in [str(nest), *children]:
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3])


def test_an_odd_schema_or_address_is_told_at_the_start_and_leaves_nothing(tmp_path):
    def start(**settings):
        app = hl.Engine(port=0, **settings)
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        for _ in range(2):
            with pytest.raises((hl.ConfigError, OSError)) as caught:
                app.start()
        assert not before or len(os.listdir("/proc/self/fd")) <= before
        assert not app.server.addresses
        app.stop()
        return str(caught.value)

    for change in (("message HostToPlugin", "message HostTo"), ("EventEnvelope event = 20;", ""), ("EventEnvelope event = 20", "string event = 20"),
                   ("string event_id = 1; EventType type = 2;", "string event_id = 1;"), ("HostShutdown shutdown = 11;", ""),
                   ("oneof payload { HostHello", "oneof other { HostHello"), ("  string plugin_id = 1;\n  oneof payload { PluginHello", "  oneof payload { PluginHello")):
        assert change[0] in UPSTREAM
        path = tmp_path / "odd.proto"
        path.write_text(UPSTREAM.replace(*change))
        said = start(plugins_listen=f"unix://{tmp_path}/p.sock", plugins_schema=path)
        assert "plugins_schema" in said or "is not declared" in said or "HostTo" in said, said
    (tmp_path / "file").write_text("")
    for listen in (f"unix://{tmp_path}/{'x' * 200}", f"unix://{tmp_path}/no/folder.sock", f"unix://{tmp_path}/file", "unix:\0abc", "unix:///"):
        assert "plugins" in start(plugins_listen=listen)


def test_a_remote_plugin_ends_when_it_says_so(tmp_path, caplog):
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugin_reply_ms=2000) as app:
        plugin, heard = hl.RemotePlugin("p", app.host.address), []

        @plugin.on("PLAYER_JOIN")
        def joined(event):
            heard.append(event)
            plugin.close()

        served = Served(plugin, reconnect_s=60)
        wait_until(lambda: app.host.wants("PLAYER_JOIN"))
        on_loop(app, lambda: [app.emit_core("player_join", schema.PlayerJoinEvent()) for _ in range(5)])
        served.join(5)
        assert not served.is_alive() and len(heard) == 1
        plugin = hl.RemotePlugin("q", app.host.address)

        @plugin.on("CHAT")
        def chat(event):
            if event.message == "reason":
                event.cancel("be polite")
            event.change(**{"message": 5} if event.message == "type" else {"mesage": "x"})

        with pytest.raises(hl.UsageError, match="async def"):
            plugin.on("CHAT")(later_)
        served = Served(plugin)
        wait_until(lambda: app.host.wants("CHAT"))
        for message in ("type", "name", "reason"):
            verdict = ask(app, schema.ChatEvent(message=message))[0].result(5)
            assert verdict.reason == ("be polite" if message == "reason" else "") and verdict.event.message == message
        assert "no 'mesage' to change, only message; did you mean 'message'?" in caplog.text and "is not of type string" in caplog.text
        with pytest.raises(FileNotFoundError, match="is there a host at unix:"):
            hl.RemotePlugin("p", f"unix://{tmp_path}/nobody").run()
        with pytest.raises(ConnectionRefusedError, match="is there a host at tcp:"):
            hl.RemotePlugin("p", f"tcp://127.0.0.1:{free_port()}").run()
    restarting = fake_host(tmp_path, hl.encode_delimited(schema.HostToPlugin(shutdown=schema.HostShutdown(reason="server is restarting"))))
    served = Served(restarting, reconnect_s=0.3)
    served.join(5)
    assert not isinstance(served.error, hl.HandshakeError)


def test_a_plugin_that_answers_and_leaves_has_answered(tmp_path):
    with hosting(tmp_path, plugin_reply_ms=5000) as app:
        app.on_client("chat", "message")(lambda event: event.client.send(event.data))
        one, two = Wire(app, "a", ["CHAT"]), Wire(app, "b", ["CHAT"])
        with hl.connect(app.url) as client:
            client.emit("chat", "message", {"text": "hi"})
            schema = hl.builtin_schema()
            one.answer(one.event(), chat=schema.ChatMutation(message="by a"))
            one.close()
            wait_until(lambda: set(app.host.peers) == {"b"})
            two.answer(two.event())
            assert client.recv(5) == {"text": "by a"} and "b" in app.host.peers
        with pytest.raises(hl.UsageError):              # what can't be encoded is asked of nobody
            on_loop(app, app.ask, schema.ChatEvent(message=5))
        assert not app.host.asking


@pytest.mark.parametrize("reply_ms", [0, 200, 5000])
def test_at_the_end_what_was_said_is_judged_before_the_farewell(tmp_path, reply_ms):
    app = hl.Engine(port=0, plugins_listen=f"unix://{tmp_path}/p.sock", plugin_reply_ms=reply_ms, grace_s=2, handshake_s=0.4).start()
    heard = []
    app.on_client("chat", "message")(lambda event: heard.append(event.data["text"]))
    app.on_core("player_disconnected")(lambda event: heard.append("left"))
    judge, watcher = Wire(app, "judge", ["CHAT", "PLAYER_QUIT"]), Wire(app, "watcher", ["PLAYER_QUIT", "WORLD_CLOSE"])
    client = hl.connect(app.url)
    for text in ("bad", "good"):
        client.emit("chat", "message", {"text": text})
    asked = [judge.event(), judge.event()]
    stopper, began = threading.Thread(target=app.stop), time.monotonic()
    stopper.start()
    client.recv(5), client.close()
    if reply_ms:                                        # without a limit its leaving is one
        judge.answer(asked[0], cancel=True)
        judge.answer(asked[1])
    types = []
    while (message := watcher.take()).which("payload") != "shutdown":
        types += [each.type for each in message.events.events]
    assert types == ["PLAYER_QUIT", "WORLD_CLOSE"] and judge.shutdown()
    for wire in (judge, watcher):
        wire.close()
    stopper.join(10)
    assert time.monotonic() - began < 1.9 and heard == (["good", "left"] if reply_ms else ["bad", "good", "left"])
    Wire.made.clear()


def test_a_handler_that_exits_loses_nobody(tmp_path):
    app = hl.Engine(port=0, plugins_listen=f"unix://{tmp_path}/p.sock", plugin_reply_ms=5000, grace_s=1, handshake_s=0.4).start()
    heard = []

    @app.on_client("chat", "message")
    def chat(event):
        heard.append(event.data["text"])
        if event.data["text"] == "exit":
            sys.exit()

    app.on_core("player_disconnected")(lambda event: heard.append("left"))
    wire = Wire(app, "p", ["CHAT"])
    with hl.connect(app.url) as client:
        for text in ("exit", "after"):
            client.emit("chat", "message", {"text": text})
        asked = [wire.event(), wire.event()]
    wait_until(lambda: not app.sessions)
    for event in reversed(asked):
        wire.answer(event)
    app._done.wait(5)
    assert heard == ["exit", "after", "left"] and app._state == "stopped"
    wire.close()
    Wire.made.clear()


@pytest.mark.parametrize("reply_ms", [0, 5000])
def test_a_handler_that_closes_its_client_changes_no_order(tmp_path, reply_ms):
    with hosting(tmp_path, plugin_reply_ms=reply_ms) as app:
        wire, heard = Wire(app, "p", ["CHAT"]), []

        @app.on_client("chat", "message")
        def close(event):
            if event.data["text"] == "1":
                event.client.close()

        app.on_client("chat", "message")(lambda event: heard.append(event.data["text"]))
        app.on_core("player_disconnected")(lambda event: heard.append("gone"))
        with hl.connect(app.url) as one, hl.connect(app.url) as other:
            for text in "123":
                one.emit("chat", "message", {"text": text})
            asked = [wire.event() for _ in range(3)]
            other.emit("chat", "message", {"text": "other"})
            asked.append(wire.event())
            if reply_ms:
                for event in reversed(asked):
                    wire.answer(event)
            else:
                wire.close()                            # all questions end with it
            wait_until(lambda: len(heard) == 5)
        assert [each for each in heard if each != "other"][:4] == ["1", "2", "3", "gone"] and not app.host.asking
        future = on_loop(app, app.ask, hl.builtin_schema().ChatEvent())
        assert future.done() or reply_ms


def test_a_question_that_is_dropped_is_not_waited_for(tmp_path):
    schema = hl.builtin_schema()
    with hosting(tmp_path, plugin_reply_ms=0, outbox_messages=4) as app:
        wire = Wire(app, "p", ["ALL"], uncompressed=True)
        peer = app.host.peers["p"]

        def go():
            while not peer.connection.unsent:
                app.emit_core("block_break", schema.BlockBreakEvent(name="x" * 30_000))
                app.host.tick()
            future = app.ask(schema.BlockBreakEvent())
            for _ in range(4):
                app.emit_core("player_join", schema.PlayerJoinEvent())
            return future

        assert on_loop(app, go).result(5).answers == {} and app.host.answers["skipped"] == 1
        while not wire.silent(0.1):
            pass
        for _ in range(5):                              # sessions that have left do not wait for ever
            with hl.connect(app.url) as client:
                client.emit("chat", "message", {"text": "hi"})
                wait_until(lambda: app.host.asking or not app.sessions)
        wait_until(lambda: not app.host.asking and not app.sessions)


def test_who_unsubscribes_from_movement_gets_none(tmp_path):
    with hosting(tmp_path, outbox_messages=5) as app:
        wire = Wire(app, "p", ["ALL"], uncompressed=True)
        peer = app.host.peers["p"]

        def go():
            while not peer.connection.unsent:
                app.emit_core("block_break", hl.builtin_schema().BlockBreakEvent(name="x" * 30_000))
                app.host.tick()
            app.movement.move(bytes(16), 1, 1, 1)
            app._tick_once()
            for _ in range(5):
                app.host.tell("PLAYER_QUIT", player_uuid="somebody")

        on_loop(app, go)
        assert peer.outbox.owed
        wire.subscribe("PLAYER_QUIT")
        wait_until(lambda: peer.wanted == {"PLAYER_QUIT"})
        types = set()
        with contextlib.suppress(TimeoutError):
            while True:
                types |= {each.type for each in wire.event(0.3)}
        assert "PLAYER_QUIT" in types and "PLAYER_MOVE" not in types


def test_what_a_remote_plugin_said_before_it_closes_is_heard(tmp_path):
    with hosting(tmp_path, plugin_reply_ms=5000) as app:
        plugin = hl.RemotePlugin("p", app.host.address, commands={f"command{n}": "what it does, in a sentence " * 2 for n in range(95)})

        @plugin.on("CHAT")
        def chat(event):
            event.cancel("no")
            plugin.send_chat("bye")
            plugin.close()

        served = Served(plugin)
        wait_until(lambda: app.host.wants("CHAT"))
        with hl.connect(app.url) as client:
            client.send({"namespace": "chat", "event": "message", "data": {"text": "hi"}, "id": 1})
            got = [client.recv(5), client.recv(5)]
            assert {"id": 1, "error": {"code": "cancelled", "message": "no"}} in got
            assert any(each.get("data", {}).get("text") == "bye" for each in got)
        served.join(5)
        assert not served.is_alive() and served.error is None


def test_programs_leave_no_children_that_are_deaf(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "d.toml").write_text(
        '[[plugins]]\nid = "deaf"\ncommand = "sh"\nrestart = false\narguments = ["-c", "(trap \\"\\" TERM; echo $$; sleep 45678; true) & sleep 0.2"]\n')
    with running(plugins=[f"{tmp_path}/d.toml"], grace_s=0.5):
        wait_until(lambda: "deaf ended" in caplog.text)
    wait_until(lambda: not subprocess.run(["pgrep", "-f", "sleep 45678"], capture_output=True).stdout)
    (tmp_path / "d.toml").write_text('[[plugins]]\nid = "p"\ncommand = "a\\u0000b"\n')
    with pytest.raises(hl.ConfigError, match="NUL"):
        hl.Engine(port=0, plugins=[f"{tmp_path}/d.toml"]).start()


def test_many_ticks_for_ten_plugins_lose_nothing_and_leave_nothing(tmp_path):
    """Seed 000's load, as fast as it goes: 100 players, ten plugins, a join in each tick."""
    schema, rounds = hl.builtin_schema(), int(150 * SOAK)
    with hosting(tmp_path, tick_hz=1000) as app:
        counts = collections.Counter()
        plugins = [hl.RemotePlugin(f"p{number}", app.host.address, compress=bool(number % 2),
                                   packed="f32" if number > 6 else "") for number in range(10)]
        for plugin in plugins:
            plugin.on("PLAYER_JOIN")(lambda event, plugin=plugin: counts.update([(plugin.id, "join", event.name)]))
            plugin.on("PLAYER_MOVE")(lambda event, plugin=plugin: counts.update([(plugin.id, "moves")]))
            plugin.on("PACKED_MOVEMENT")(lambda event, plugin=plugin: counts.update({(plugin.id, "moves"): len(event.moves)}))
        served = [Served(plugin) for plugin in plugins]
        wait_until(lambda: len(app.host._by_type.get("PLAYER_MOVE", ())) == 10)
        players, blocks = [os.urandom(16) for _ in range(100)], []

        def tick(number):
            for player in players:
                app.movement.move(player, number, 1, 2)
            app.host.tell("PLAYER_JOIN", schema.PlayerJoinEvent(name=f"{number}"))
            app._tick_once()

        for number in range(rounds):
            on_loop(app, tick, number)
            if number in (rounds // 2, rounds - 1):
                gc.collect()
                blocks.append(sys.getallocatedblocks())
            while any(peer.connection.unsent for peer in list(app.host.peers.values())):
                time.sleep(0.001)
        wait_until(lambda: all(counts[(f"p{n}", "join", f"{rounds - 1}")] for n in range(10)), 20)
        assert all(counts[(f"p{n}", "join", f"{number}")] == 1 for n in range(10) for number in range(rounds))
        assert all(counts[(f"p{n}", "moves")] <= 100 * rounds for n in range(10))
        assert counts[("p0", "moves")] + 100 * app.host.replaced >= 100 * rounds
        frames = sum(app.host.peers[f"p{n}"].sent["frames"] for n in range(7))
        events = sum(app.host.peers[f"p{n}"].sent["events"] for n in range(7))
        assert events / frames > 10                 # batching: 10 to 100 times fewer
        assert not app.host.drops.total() and not refusals(app)
        # what is counted for this test grows, nothing else
        assert blocks[1] - blocks[0] < 40 * rounds
    for each in served:
        each.join(5)


# =============================================================================
# 17  MONITOR
# =============================================================================

def test_pauses_of_the_collector_are_timed():
    watch = hl.GCWatch()
    watch.start()
    gc.collect()
    watch.stop()
    watch.stop()
    assert watch.pauses >= 1 and sum(watch.take_pauses()) > 0 and watch.take_pauses() == []
    assert watch._called not in gc.callbacks


def test_memory_and_cpu_are_told():
    resident, virtual = hl._memory_bytes()
    assert 1e6 < resident < 1e10 and (virtual == 0 or virtual > resident) and hl._peak_memory_bytes() > 1e6
    assert hl._cpu_s() > 0


# =============================================================================
# 18  CONFIG
# =============================================================================

def test_what_is_said_closest_to_the_start_wins(tmp_path):
    file = tmp_path / "horizon.toml"
    file.write_text('profile = "high-scale"\nidle_s = 5\n[server]\nport = 9000\ntick_hz = 30\n[server.security]\n'
                    'allowed_origins = ["https://a.example"]\n')
    config = hl.Config.load(file, {"HORIZON_TICK_HZ": "20", "HORIZON_METRICS": "no"}, burst=5)
    assert (config.port, config.tick_hz, config.burst, config.metrics) == (9000, 20.0, 5.0, False)
    assert config.idle_s == 5.0 and config.allowed_origins == ("https://a.example",)
    assert (config.max_connections, config.log_level) == (50_000, "warn")
    assert hl.Config.load(None, {}, profile="dev", log_level="error").log_level == "error"
    assert hl.Config.load(None, {"HORIZON_ALLOWED_ORIGINS": "http://a,http://b"}).allowed_origins == ("http://a", "http://b")


def test_the_defaults_are_those_of_the_design():
    config = hl.Config()
    assert [getattr(config, key) for key in (
        "host", "port", "max_connections", "max_connections_per_address", "idle_s", "handshake_s",
        "max_message_bytes", "max_header_bytes", "max_json_depth", "max_messages_per_s", "burst",
        "outbox_messages", "outbox_bytes", "ping_s")] == [
        "127.0.0.1", 8080, 10_000, 100, 60, 10, 65_536, 16_384, 10, 120, 240, 256, 1 << 20, 20]


@pytest.mark.parametrize("settings, words", [
    ({"prot": 1}, "did you mean 'port'"), ({"port": "x"}, "port = 'x'"), ({"port": 70000}, "65535"),
    ({"port": 1.5}, "port"), ({"port": True}, "port"), ({"tick_hz": -1}, "tick_hz"), ({"tick_hz": math.nan}, "tick_hz"),
    ({"profile": "fast"}, "dev, prod"), ({"banned": "10.0.0.0/33"}, "banned"), ({"cpus": "x"}, "cpus"),
    ({"tls_key": "k"}, "tls_cert"), ({"trusted_proxies": "nginx"}, "trusted_proxies"), ({"insecure": "maybe"}, "insecure"),
    ({"log_level": 5}, "log_level"), ({"idle_s": "inf"}, "idle_s"), ({"allowed_origins": 5}, "allowed_origins"),
])
def test_settings_that_can_not_be_are_named(settings, words):
    with pytest.raises(hl.ConfigError, match=re.escape(words)):
        hl.Config.load(None, {}, **settings)


@pytest.mark.parametrize("settings", [{"port": None}, {"port": "x"}, {"host": None}, {"metrics": "maybe"}, {"idle_s": 10**400},
                                      {"port": math.inf}, {"tick_hz": 1e-300}, {"port": 1.5}])
def test_a_config_made_by_hand_is_checked_as_well(settings):
    with pytest.raises(hl.ConfigError):
        hl.Config(**settings)
    assert hl.Config(port="81", allowed_origins=" http://a, ").allowed_origins == ("http://a",)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("port = ")
    (tmp_path / "twice.toml").write_text("port = 1\n[server]\nport = 2\n")
    for path in (tmp_path / "bad.toml", tmp_path / "missing.toml", tmp_path / "twice.toml"):
        with pytest.raises(hl.ConfigError, match=path.name):
            hl.Config.load(path, {})
    assert hl.Config.load(None, {}, host="0.0.0.0", insecure=True).host == "0.0.0.0"


SEED_CONFIG = """
# config.toml - Network optimization settings
[server]
bind_address = "0.0.0.0:8080"
max_connections = 10000        # Based on available memory
connection_timeout = 60        # Seconds before idle timeout
use_reuse_port = true         # Enable SO_REUSEPORT for Linux
tick_interval_ms = 16         # 60 FPS server tick rate

[server.security]
enable_rate_limiting = true
max_requests_per_minute = 120  # 2 requests per second per connection
max_message_size = 65536      # 64KB message limit
"""


def test_the_second_seeds_file_loads_as_it_stands(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(SEED_CONFIG)
    config = hl.Config.load(path, {})
    assert (config.host, config.port, config.max_connections, config.idle_s, config.reuse_port) == ("0.0.0.0", 8080, 10_000, 60, True)
    assert (config.tick_hz, config.max_messages_per_s, config.max_message_bytes, config.firm_port) == (62.5, 2, 65536, True)
    for line, key, value in (("enable_rate_limiting = false\nmax_requests_per_minute = 60", "max_messages_per_s", 0),
                             ("max_requests_per_minute = 60\nenable_rate_limiting = false", "max_messages_per_s", 0),
                             ("tick_interval_ms = 0", "tick_hz", 0), ("max_batch_delay = 16", "batch_wait_ms", 16),
                             ("batch_size = 32", "batch_size", 32), ("bind_address = '[::1]:9'", "host", "::1"),
                             ("max_string_length = 1024\nmax_collection_size = 100", "max_json_items", 100),
                             ("banned_ips = ['10.0.0.1']\nmax_connections_per_ip = 10", "banned", ("10.0.0.1",))):
        path.write_text(line)
        assert getattr(hl.Config.load(path, {}), key) == value
    env = {"HORIZON_BIND_ADDRESS": "1.2.3.4:5", "HORIZON_CONNECTION_TIMEOUT": "7", "HORIZON_USE_REUSE_PORT": "true"}
    config = hl.Config.load(None, env)
    assert (config.host, config.port, config.idle_s, config.reuse_port, config.firm_port) == ("1.2.3.4", 5, 7, True, True)
    for env in ({"HORIZON_ENABLE_RATE_LIMITING": "false", "HORIZON_MAX_REQUESTS_PER_MINUTE": "600"},
                {"HORIZON_MAX_REQUESTS_PER_MINUTE": "600", "HORIZON_ENABLE_RATE_LIMITING": "no"}):
        assert hl.Config.load(None, env).max_messages_per_s == 0
    with pytest.raises(hl.ConfigError, match="HORIZON_BIND_ADDRESS"):
        hl.Config.load(None, {"HORIZON_BIND_ADRESS": "1.1.1.1:1"})
    for line in ("tick_interval_ms = true", "max_messages_per_s = 1\n[a]\nmax_messages_per_s = 2", "use_reuse_port = 5", "bind_address = 5", "bind_address = 'here'", "tick_interval_ms = 'fast'", "enable_rate_limiting = 'perhaps'",
                 "max_message_size = 1\nmax_message_bytes = 2", "max_requests_per_minute = []"):
        path.write_text(line)
        with pytest.raises(hl.ConfigError):
            hl.Config.load(path, {})
    path.write_text("[server]\nbind_adress = '1.1.1.1:1'")
    with pytest.raises(hl.ConfigError, match="bind_adress"):
        hl.Config.load(path, {})


def test_the_readmes_table_of_presets_is_true():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|", README.read_text(), re.M)
    told = {key: values for key, *values in rows if key in hl._CONFIG_TYPES}
    presets = {name: hl.Config.load(None, {}, profile=name) for name in ("dev", "prod", "high-scale")}
    for key in hl._CONFIG_TYPES:
        values = [getattr(config, key) for config in presets.values()]
        if key != "profile" and len(set(values)) > 1:
            assert key in told, f"the README does not say that {key} is {values}"
    assert {"batch_size", "batch_wait_ms", "cache_ttl_s", "log_level", "metrics", "max_connections", "max_memory_mb"} <= told.keys()
    for key, values in told.items():
        assert values == [str(value).lower().removesuffix(".0") for value in (getattr(config, key) for config in presets.values())], key
    for key in told.keys() - {"log_level", "metrics", "batch_wait_ms"}:
        assert key == "cache_ttl_s" or getattr(presets["high-scale"], key) >= getattr(presets["prod"], key)


def test_every_layer_of_settings_is_over_the_one_below(tmp_path):
    path = tmp_path / "h.toml"
    path.write_text("[cache]\ncache_ttl_s = 7\nbatch_size = 8\nprofile = 'dev'\n")
    config = hl.Config.load(path, {"HORIZON_BATCH_SIZE": "9"}, log_level="error")
    assert (config.batch_wait_ms, config.cache_ttl_s, config.batch_size, config.log_level) == (10, 7, 9, "error")
    assert hl.Config.load(path, {"HORIZON_PROFILE": "high-scale"}).batch_wait_ms == 2


# =============================================================================
# 20  ENGINE - over real sockets on loopback
# =============================================================================

@pytest.fixture(autouse=True, scope="module")
def bytecode_for_children(tmp_path_factory):
    """Programs of these tests compile the module once, not each anew, and leave nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPYCACHEPREFIX", os.fspath(tmp_path_factory.mktemp("bytecode")))
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def short_goodbyes():
    """Many peers here never answer a goodbye: wait less for them than two seconds."""
    before, hl._FINISH_S = hl._FINISH_S, 0.25
    yield
    hl._FINISH_S = before


@contextlib.contextmanager
def running(**settings):
    """An engine in a thread; afterwards every index must be consistent."""
    app = hl.Engine(**{"port": 0, "max_messages_per_s": 0, "handshake_s": 1.0, "presence_debounce_s": 0, **settings})
    with app:
        yield app
        app.call_soon(app._check).result(5)
    assert not app.sessions and not app.server.connections and not threading_leftovers()


def threading_leftovers():
    return [each for each in threading.enumerate() if each.name == "horizon_lite"]


def on_loop(app, fn, *args, **options):
    return app.call_soon(lambda: fn(*args, **options)).result(5)


def wait_until(check, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def raw(app, data=b"", small=False):
    sock = socket.socket()
    sock.settimeout(5)
    if small:                                   # before connecting, or the window is large already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", int(app.url.rpartition(":")[2])))
    if data:
        sock.sendall(data)
    return sock


def read_all(sock):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


UPGRADE = (b"GET /ws/data HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n")


def raw_websocket(app, extra=b"", small=False, path=b"/ws/data"):
    sock = raw(app, UPGRADE.replace(b"/ws/data", path) + extra + b"\r\n", small)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(1)
    assert answer.startswith(b"HTTP/1.1 101 "), answer
    return sock


def request(app, data):
    with raw(app, data) as sock:
        return read_all(sock)


def get(app, path, headers=None):
    ask = urllib.request.Request(app.url + path, headers=headers or {})
    try:
        with urllib.request.urlopen(ask, timeout=5) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_publish_reaches_a_json_client_and_a_proto_client():
    with running() as app, hl.connect(app.url) as one, hl.connect(app.url, protocol="proto") as two:
        for client in (one, two):
            client.subscribe("chat.*")
        assert on_loop(app, app.publish, "chat.lobby", {"n": 1}) == 2
        got = one.recv(5)
        assert (got["topic"], got["payload"], got["offset"]) == ("chat.lobby", {"n": 1}, 1) and got["epoch"]
        message = two.recv(5).topic_message
        assert (message.topic, json.loads(message.payload), message.offset) == ("chat.lobby", {"n": 1}, 1)
        one.unsubscribe("chat.*")
        assert on_loop(app, app.publish, "chat.lobby", {"n": 2}) == 1


def test_clients_publish_to_each_other():
    with running() as app, hl.connect(app.url) as one, hl.connect(app.url, protocol="proto") as two:
        one.subscribe("room")
        two.publish("room", {"text": "hi"}, critical=True)
        assert one.recv(5)["payload"] == {"text": "hi"}
        for topic in ("system.x", "presence", "gorc.a", "world.moves", "bad topic", ""):
            with pytest.raises(hl.UsageError):
                one.publish(topic, 1)
            with pytest.raises(hl.UsageError):
                two.publish(topic, 1)


def test_what_a_tick_holds_leaves_in_one_write_and_one_frame():
    with running(tick_hz=20) as app, hl.connect(app.url) as one, hl.connect(app.url, protocol="proto") as two:
        sock = raw_websocket(app)
        for client in (one, two):
            client.subscribe("t")
        sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"t","id":1}'))
        assert take("client", sock.recv(65536)) == ['{"id":1,"ok":true}']

        def burst():
            before = app.server.writes
            for number in range(30):
                app.publish("t", number)
            return before
        before = on_loop(app, burst)
        frames = take("client", sock.recv(65536))       # no subprotocol: an object per frame
        assert [json.loads(frame)["payload"] for frame in frames] == list(range(30))
        data = one._sock.recv(65536)                     # an array
        assert [each["payload"] for each in json.loads(take("client", data)[0])] == list(range(30))
        frame, = take("client", two._sock.recv(65536))   # an EventBatch
        assert len(hl.builtin_schema().EventBatch.decode(frame).events) == 30
        wait_until(lambda: app.server.writes - before == 3)
        assert app.metrics["horizon_batch_messages_sum"] == 90
        sock.close()


def test_a_message_for_many_is_rendered_once(monkeypatch):
    rendered = []
    with running() as app, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(hl.connect(app.url)) for _ in range(20)]
        for client in clients:
            client.subscribe("t")
        monkeypatch.setattr(hl, "_json_bytes", lambda value: rendered.append(value) or json.dumps(value).encode())
        on_loop(app, app.publish, "t", "x")
        assert [client.recv(5)["payload"] for client in clients] == ["x"] * 20
        assert rendered.count("x") == 1
        assert app.metrics["horizon_marshal_seconds_count"] == 1


def test_a_client_event_reaches_its_handler_and_is_answered():
    with running() as app, hl.connect(app.url) as client:
        seen = []

        @app.on_client("chat", "message")
        def chat(event):
            seen.append((event.key, event.data, event.client.user))
            if event.data == "bad":
                event.cancel("not here")
            event.client.send({"echo": event.data})
        client.send({"namespace": "chat", "event": "message", "data": "good", "id": "a"})
        assert [client.recv(5), client.recv(5)] == [{"echo": "good"}, {"id": "a", "ok": True}]
        client.send({"namespace": "chat", "event": "message", "data": "bad", "id": "b"})
        assert client.recv(5) == {"echo": "bad"}
        assert client.recv(5) == {"id": "b", "error": {"code": "cancelled", "message": "not here"}}
        assert seen[0] == ("client:chat:message", "good", list(app.sessions.values())[0].user)
        assert app.metrics['horizon_requests_refused_total{code="cancelled"}'] == 1


def test_proto_events_chat_and_moves_become_bus_events():
    with running() as app, hl.connect(app.url, protocol="proto") as client:
        schema, seen = hl.builtin_schema(), []
        app.on("client:*", lambda event: seen.append((event.key, event.data)))
        client.emit("game", "fire", {"power": 9})
        client.send_envelope(chat=schema.ChatEvent(message="hi"))
        client.send_envelope(player_move=schema.PlayerMoveEvent(x=1.0, y=2.0, z=3.0))
        client.emit("system", "ping", 5)
        assert json.loads(client.recv(5).topic_message.payload) == {"namespace": "system", "event": "pong", "data": 5}
        assert seen[:2] == [("client:game:fire", {"power": 9}), ("client:chat:message", {"text": "hi"})]
        assert seen[2][0] == "client:movement:position" and seen[2][1].y == 2.0
        assert list(app.movement.positions.values()) == [(1.0, 2.0, 3.0)]
        client.send_envelope(zone_exit=schema.ZoneExit())
        reply = client.recv(5).reply
        assert (reply.ok, reply.code) == (False, "bad_request")


@pytest.mark.parametrize("packed, kind", [("", "player_move"), ("f32", "packed_movement"), ("f64", "packed_movement")])
def test_movement_is_told_to_who_asked_in_the_form_they_asked(packed, kind):
    with running() as app, hl.connect(app.url) as one, hl.connect(app.url, protocol="proto") as two:
        one.subscribe("world.moves")
        two.subscribe("world.moves", packed=packed)
        assert one.recv(5)["payload"] == {"full": True, "players": {}}
        one.send({"namespace": "movement", "event": "position", "data": {"x": 1.5, "y": 2}})
        assert list(one.recv(5)["payload"]["players"].values()) == [[1.5, 2.0, 0.0]]
        while not (event := two.recv(5)).which("payload") == kind or packed and event.packed_movement.full:
            pass
        if packed:
            moves = hl.unpack_moves(event.packed_movement.data, wide=packed == "f64")
            assert list(moves.values()) == [(1.5, 2.0, 0.0)]
        else:
            assert (event.player_move.x, event.player_move.y) == (1.5, 2.0)
        one.close()
        wait_until(lambda: not app.movement.positions)


def test_a_handler_can_veto_a_move():
    with running() as app, hl.connect(app.url) as client:
        app.on_client("movement", "position")(lambda event: event.data["x"] > 10 and event.cancel("too fast"))
        for x in (5, 50):
            client.send({"namespace": "movement", "event": "position", "data": {"x": x}, "id": x})
        assert client.recv(5) == {"id": 5, "ok": True}
        assert client.recv(5)["error"]["code"] == "cancelled"
        assert [position[0] for position in app.movement.positions.values()] == [5.0]


def test_presence_tells_who_is_here():
    with running() as app, hl.connect(app.url) as one:
        one.subscribe("presence")
        update = one.recv(5)
        assert update["type"] == "presence_update" and len(update["users"]) == 1
        with hl.connect(app.url):
            assert len(one.recv(5)["users"]) == 2 and app.presence.online() == 2
        assert len(one.recv(5)["users"]) == 1


def test_system_events_answer():
    with running(tick_hz=25) as app, hl.connect(app.url) as client:
        client.send({"namespace": "system", "event": "ping", "data": [1]})
        assert client.recv(5) == {"namespace": "system", "event": "pong", "data": [1]}
        client.send({"namespace": "system", "event": "hello"})
        hello = client.recv(5)["data"]
        assert hello["id"] in app.sessions and hello["tick_hz"] == 25
        client.subscribe("system.stats")
        on_loop(app, app._each_second)
        figures = client.recv(5)["payload"]
        assert figures["connections"] == 1 and figures["budget_ms"] == 40


def test_broadcast_send_and_close_reach_whom_they_should():
    with running() as app, hl.connect(app.url) as one, hl.connect(app.url) as two:
        first, second = app.sessions.values()
        assert on_loop(app, app.broadcast, {"to": "all"}) == 2
        assert on_loop(app, app.send, first.user, {"to": "one"}) == 1
        assert on_loop(app, app.send, second.id, {"to": "two"}) == 1
        assert on_loop(app, app.send, "nobody", {}) == 0
        got = [[client.recv(5) for _ in range(2)] for client in (one, two)]
        assert got == [[{"to": "all"}, {"to": "one"}], [{"to": "all"}, {"to": "two"}]]
        first.metadata["team"] = "red"
        on_loop(app, first.close, 4001, "enough")
        assert one.recv(5) is None and one.closed == hl.Close(4001, "enough")
        wait_until(lambda: len(app.sessions) == 1)
        assert on_loop(app, app.send, first, {"too": "late"}) == 0
        with pytest.raises(hl.UsageError):
            on_loop(app, second.close, 1006)


def test_core_events_frame_the_life_of_a_client():
    with running() as app:
        seen = []
        for key in ("core:player_connected", "core:player_disconnected"):
            app.on(key, lambda event: seen.append((event.key, event.data["player_id"], event.client.address)))
        app.on_core("player_connected", filter=lambda event: len(app.sessions) > 1)(
            lambda event: event.cancel("server at capacity"))
        with hl.connect(app.url) as one, hl.connect(app.url) as two:
            assert two.recv(5) is None and two.closed == hl.Close(1013, "server at capacity")
            one.send({"namespace": "system", "event": "ping"})
            assert one.recv(5)["event"] == "pong"
        wait_until(lambda: len(seen) == 4)
        assert {key for key, _, _ in seen} == {"core:player_connected", "core:player_disconnected"}
        assert {address for _, _, address in seen} == {"127.0.0.1"} and app.presence.online() == 0


def test_in_process_subscribers_and_repeats_survive_their_own_errors(caplog):
    with running() as app:
        got, beats = [], []

        @app.subscribe("sensors.*.temp")
        def subscriber(message):
            got.append((message.topic, message.payload))
            raise ValueError("mine")

        @app.every(hz=100)
        def beat():
            beats.append(1)
            raise ValueError("mine too")
        assert on_loop(app, app.publish, "sensors.a.temp", 21) == 1
        wait_until(lambda: len(beats) > 3)
        assert got == [("sensors.a.temp", 21)] and app.metrics["horizon_topics_errors_total"] == 1
        assert "mine too" in caplog.text


def test_ticks_are_counted_and_announced():
    with running(tick_hz=200) as app:
        seen = []
        app.on_core("server_tick")(lambda event: seen.append(event.data["tick_count"]))
        wait_until(lambda: len(seen) > 20)
        assert seen == list(range(seen[0], seen[0] + len(seen))) and app.metrics["horizon_ticks_total"] >= 20
        app.on_core("server_tick", once=True)(lambda event: time.sleep(0.05))
        wait_until(lambda: app.overruns)
        assert app.metrics["horizon_tick_overruns_total"] >= 1 and app.report()["tick"]["overruns"] >= 1


def test_without_ticks_everything_leaves_at_once():
    with running(tick_hz=0) as app, hl.connect(app.url) as client:
        client.subscribe("t")
        on_loop(app, app.publish, "t", 1)
        assert client.recv(5)["payload"] == 1


def test_async_and_blocking_handlers_run_beside_the_loop(caplog):
    with running() as app, hl.connect(app.url) as client:
        done = threading.Event()
        handlers = []

        async def slowly(event):
            await asyncio.sleep(0.01)
            app.call_soon(event.client.send, {"async": event.data})
            raise RuntimeError("after all")
        handlers.append(app.on("client:work:do", slowly))
        handlers.append(app.on("client:work:do", lambda event: done.wait(5), blocking=True))
        client.send({"namespace": "work", "event": "do", "data": 1})
        assert client.recv(5) == {"async": 1}           # while the blocking one still blocks
        done.set()
        wait_until(lambda: handlers[1].times.count == 1 and handlers[0].errors == 1)
        assert "after all" in caplog.text and [each.calls for each in handlers] == [1, 1]


def test_calls_from_another_thread_are_refused_by_name():
    with running() as app, hl.connect(app.url) as client:
        client.send({"namespace": "system", "event": "ping"})
        client.recv(5)
        session = next(iter(app.sessions.values()))
        for call, name in ((lambda: app.publish("t", 1), "app.publish"), (lambda: app.emit("k"), "app.emit"),
                           (lambda: app.broadcast(1), "app.broadcast"), (lambda: app.send("u", 1), "app.send"),
                           (lambda: session.send("x"), "client.send"), (lambda: session.close(), "client.close")):
            with pytest.raises(hl.StateError, match=re.escape(f"app.call_soon({name}")):
                call()
        assert isinstance(app.call_soon(lambda: 1 / 0).exception(5), ZeroDivisionError)


def test_call_soon_is_safe_from_many_threads():
    with running() as app:
        counts = []
        threads = [threading.Thread(target=lambda: [app.call_soon(counts.append, 1) for _ in range(500)])
                   for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert app.call_soon(lambda: len(counts)).result(5) == 4000


def test_an_asyncio_program_can_drive_the_engine():
    async def program():
        app = hl.Engine(port=0)
        loop = asyncio.get_running_loop()
        loop.add_reader(app.fileno(), app.step)

        async def ticks():
            while True:
                await asyncio.sleep(app.wait_s())
                app.step()
        ticking = asyncio.create_task(ticks())

        def talk():
            with hl.connect(app.url) as client:
                client.subscribe("t")
                client.publish("t", "through asyncio")
                return client.recv(5)["payload"]
        try:
            return await asyncio.to_thread(talk)
        finally:
            ticking.cancel()
            loop.remove_reader(app.fileno())
            app.stop()
    assert asyncio.run(program()) == "through asyncio"


def test_an_engine_starts_once_and_stops_as_often_as_asked():
    app = hl.Engine(port=0)
    with app:
        with pytest.raises(hl.StateError):
            app.start()
        with pytest.raises(hl.StateError):
            app.configure(port=1)
    app.stop()
    for call in (app.start, lambda: app.call_soon(print)):
        with pytest.raises(hl.StateError):
            call()
    hl.Engine(port=0).stop()
    hl.Engine(port=0, tick_hz=0).stop()


def test_a_taken_port_is_an_error_when_it_was_said_and_the_next_one_otherwise(caplog):
    with running() as app:
        port = int(app.url.rpartition(":")[2])
        with pytest.raises(OSError) as caught:
            hl.Engine(port=port).start()
        assert caught.value.errno == errno.EADDRINUSE
        with hl.Engine(hl.Config(port=port)) as other:
            assert int(other.url.rpartition(":")[2]) > port
        assert f"port {port} is taken" in caplog.text


def test_stopping_says_goodbye_after_what_was_waiting():
    app = hl.Engine(port=0, tick_hz=1, handshake_s=0.4).start()
    client, seen = hl.connect(app.url), []
    app.on_core("server_stopping")(lambda event: seen.append(event.key))
    client.subscribe("t")
    on_loop(app, app.publish, "t", "last words")
    app.stop()
    assert client.recv(5)["payload"] == "last words" and client.recv(5) is None
    assert client.closed == hl.Close(1001, "server is shutting down") and seen == ["core:server_stopping"]
    client.close()


def test_a_message_that_can_not_be_rendered_ends_nothing(caplog):
    with running() as app, hl.connect(app.url) as client:
        client.subscribe("t")
        with pytest.raises(hl.UsageError):
            on_loop(app, app.publish, "t", object())
        with pytest.raises(hl.UsageError):
            on_loop(app, app.broadcast, {1, 2})
        on_loop(app, app.publish, "t", "fine")
        assert client.recv(5)["offset"] == 1


def test_a_client_that_was_closed_in_the_middle_of_its_batch_leaves_no_ghost():
    with running(max_messages_per_s=0, outbox_messages=20, outbox_bytes=2_000) as app:
        schema = hl.builtin_schema()

        @app.on_client("movement", "position")
        def cheat(event):
            event.client.close(1008, "cheating")
        for wire in ("json", "proto"):
            with hl.connect(app.url, protocol=wire) as client:
                if wire == "json":
                    client.send({"namespace": "movement", "event": "position", "data": {"x": 1}})
                else:
                    request, envelope = schema.ClientRequest, schema.EventEnvelope
                    client.send(schema.EventBatch(events=[
                        envelope(player_move=schema.PlayerMoveEvent(x=1.0)),
                        envelope(request=request(action="subscribe", topic="t.*")),
                        envelope(request=request(action="subscribe", topic="world.moves"))]).encode())
                while client.recv(5) is not None:
                    pass
                assert client.closed.code == 1008
        wait_until(lambda: not app.sessions)
        assert not app.movement.positions and not app._movers
        on_loop(app, app.topics._check)


@pytest.mark.parametrize("wire", ["json", "proto"])
def test_a_healthy_client_gets_a_burst_however_large(wire):
    with running() as app, hl.connect(app.url, protocol=wire) as client:
        client.subscribe("t")

        def burst():
            session, = app.sessions.values()
            for number in range(1_000):
                app.publish("t", number, critical=number % 2 == 0)
                if number % 10 == 0:
                    app.send(session, {"direct": "x" * 5_000})
            for _ in range(60):
                session.send({"now": "x" * 30_000})
        on_loop(app, burst)
        got = []
        while len(got) < 1_000:
            message = client.recv(5)
            if wire == "proto":
                topic = message.topic_message.topic
                payload = json.loads(message.topic_message.payload)
            else:
                topic, payload = message.get("topic"), message.get("payload")
            if topic == "t":
                got.append(payload)
        assert got == list(range(1_000)) and app.drops.total() == 0


def test_every_envelope_and_every_fragment_counts_for_the_rate():
    schema = hl.builtin_schema()
    with running(max_messages_per_s=100, burst=200) as app:
        batch = schema.EventBatch(events=[schema.EventEnvelope()] * 300).encode()
        for data in (masked(0x82, batch, b"\xfe" + len(batch).to_bytes(2, "big")),
                     masked(0x01, b"") + masked(0x00, b"") * 300):
            sock = raw_websocket(app)
            sock.sendall(data)
            assert take("client", read_all(sock))[-1] == hl.Close(1008, "too many messages: over 100 per second (max_messages_per_s)")
            sock.close()
        assert app.metrics['horizon_refused_total{reason="rate"}'] == 2
    with running(max_messages_per_s=100, burst=0) as app, hl.connect(app.url) as client:
        client.subscribe("t")                   # no burst of its own means the rate's


def test_a_healthy_client_gets_a_tick_of_any_size():
    with running() as app, hl.connect(app.url) as client:
        client.subscribe("t")

        def burst():
            assert app.publish("t", "x" * 600_000) == app.publish("t", "y" * 600_000) == 1
            for number in range(20):
                app.broadcast({"n": number, "pad": "x" * 100_000})
        on_loop(app, burst)
        assert [client.recv(5)["payload"][0] for _ in range(2)] == ["x", "y"]
        assert [client.recv(5)["n"] for _ in range(20)] == list(range(20))
        assert app.drops.total() == 0


def test_a_tick_larger_than_an_outbox_keeps_its_order_over_topics():
    with running() as app, hl.connect(app.url) as client:
        client.subscribe("t.*")

        def say():
            for number in range(700):
                app.publish(f"t.{number % 3}", number) if number % 2 else app.broadcast(number)
        on_loop(app, say)
        got = [client.recv(5) for _ in range(700)]
        assert [each["payload"] if isinstance(each, dict) else each for each in got] == list(range(700))


def test_a_burst_in_one_pass_is_bounded_for_who_does_not_read():
    with running(tick_hz=0) as app:
        slow = raw_websocket(app, small=True)
        slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"a"}'))
        wait_until(lambda: app.topics.matching("a"))
        session, = app.sessions.values()

        def burst(critical):
            for _ in range(6_000):
                app.publish("a", "x" * 2_000, critical=critical)
        on_loop(app, burst, False)
        assert app.drops["droppable"] > 1_000 and session.backlog < 2 * (1 << 20)
        on_loop(app, burst, True)
        wait_until(lambda: not app.sessions)
        assert app.metrics['horizon_refused_total{reason="slow"}'] == 1
        slow.close()


def test_a_burst_takes_linear_time():
    with running(tick_hz=30) as app:
        readers = [raw_websocket(app) for _ in range(3)]
        for sock in readers:
            sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"a"}'))
            threading.Thread(target=read_all, args=(sock,), daemon=True).start()
        wait_until(lambda: len(app.topics.matching("a")) == 3)

        def burst(count):
            began = time.thread_time()
            for number in range(count):
                app.publish("a", number, critical=True)
            return time.thread_time() - began
        small = min(on_loop(app, burst, 1_000) for _ in range(3))
        assert min(on_loop(app, burst, 8_000) for _ in range(2)) < 24 * small + 0.05       # 64, if it were quadratic
        for sock in readers:
            sock.shutdown(socket.SHUT_RDWR)


def test_the_order_of_what_was_said_is_the_order_it_arrives_in():
    with running() as app, hl.connect(app.url) as client:
        for topic in ("a", "b"):
            client.subscribe(topic)
        session, = app.sessions.values()

        def burst():
            app.broadcast({"payload": 0})
            app.publish("a", 1, critical=True)
            app.send(session, {"payload": 2})
            session.send({"payload": 3})
            for number in range(4, 14):
                app.publish("a", number)
            for number in range(14, 300):
                app.publish("b", number)
            app.broadcast({"payload": 300})
            app.publish("a", 301, critical=True)
        on_loop(app, burst)
        assert [client.recv(5)["payload"] for _ in range(302)] == list(range(302))


def fill_socket(app, session, topic="full"):
    """Publish to a client that does not read until its socket takes no more."""
    def fill():
        app.publish(topic, "x" * 50_000)
        return len(session.connection.unsent)
    while not on_loop(app, fill):
        time.sleep(0.001)


def read_objects(sock, until, seconds=10):
    """Read JSON objects, one per frame, until *until* says so of one; return them and the events."""
    ws, got, events = hl.WebSocketConnection("client", 1 << 26), [], []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ws.receive(sock.recv(1 << 20))
        for event in ws.take_events():
            events.append(event)
            if isinstance(event, str):
                got.append(json.loads(event))
            if until(event):
                return got, events
    raise AssertionError("it did not come")


def test_state_that_was_dropped_is_made_good():
    with running(outbox_messages=4) as app:
        sock = raw_websocket(app, small=True)
        for topic in (b"world.moves", b"full"):
            sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"%b","id":1}' % topic))
        wait_until(lambda: app._movers and app.topics.matching("full"))
        session, = app.sessions.values()
        fill_socket(app, session)
        on_loop(app, app.movement.move, b"p" * 16, 777, 0, 0)
        wait_until(lambda: any(item.key for item in session.outbox.items))
        for number in range(4):
            on_loop(app, app.send, session, {"critical": number})
        assert session.outbox.owed == {"movement"}
        _, events = read_objects(sock, lambda event: isinstance(event, str) and "[777.0,0.0,0.0]" in event)
        assert sum('"critical"' in event for event in events) == 4 and session.outbox.owed == set()
        sock.close()


def test_a_goodbye_waits_for_what_was_said_before():
    with running() as app:
        sock = raw_websocket(app, small=True)
        sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"full","id":1}'))
        wait_until(lambda: app.topics.matching("full"))
        session, = app.sessions.values()
        fill_socket(app, session)

        def kick():
            assert app.send(session, {"why": "you are banned"}) == 1
            session.close(4000, "kick")
        on_loop(app, kick)
        got, events = read_objects(sock, lambda event: isinstance(event, hl.Close))
        assert got[-1] == {"why": "you are banned"} and events[-1] == hl.Close(4000, "kick")
        sock.close()


def test_after_a_fault_nothing_is_stored_and_the_end_comes_soon():
    with running(max_connections=2) as app:
        sock, rude = raw_websocket(app), raw(app, b"garbage\r\n\r\n")
        sock.sendall(b"\x81\x00")
        connection = next(each for each in app.server.connections.values() if each.ws)
        began = time.monotonic()
        while app.server.connections and time.monotonic() - began < 6:
            for each in (sock, rude):
                with contextlib.suppress(OSError):
                    each.sendall(bytes(1000))
            time.sleep(0.01)
        assert time.monotonic() - began < 5 and len(connection.ws._buffer) < 1000
        sock.close()
        rude.close()


def test_what_the_counters_say_is_what_was_sent():
    with running() as app, hl.connect(app.url) as client:
        client.subscribe("t")
        app.on_client("a", "b")(lambda event: (app.publish("t", "x" * 1000), app.broadcast("y" * 1000)))
        before, received = app.server.bytes_sent, 0
        for number in range(20):
            client.send({"namespace": "a", "event": "b", "id": number})
        while received < 20 * 2000:
            received += len(client._sock.recv(1 << 16))
        with contextlib.suppress(TimeoutError):
            client._sock.settimeout(0.1)
            received += len(client._sock.recv(1 << 16))
        assert app.server.bytes_sent - before == received


def test_sys_exit_in_a_handler_is_a_graceful_end():
    app = hl.Engine(port=0)
    app.on_client("please", "exit")(lambda event: sys.exit())
    app.on_client("worker", "exit", blocking=True)(lambda event: sys.exit())
    with app, hl.connect(app.url) as client:
        with pytest.raises(SystemExit):
            app.call_soon(sys.exit).result(5)
        client.emit("worker", "exit")
        wait_until(lambda: app.bus.errors == 1)
        client.emit("please", "exit")
        assert client.recv(5) is None and client.closed.code == 1001


def test_a_disconnect_may_tell_those_who_are_as_slow():
    with running(outbox_messages=5, outbox_bytes=20_000) as app:
        app.on_core("player_disconnected")(lambda event: app.publish("t", "x" * 3_000, critical=True))
        slow = [raw_websocket(app, small=True) for _ in range(60)]
        for sock in slow:
            sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}'))
        wait_until(lambda: len(app.topics.matching("t")) == 60)
        for _ in range(1_500):
            on_loop(app, app.publish, "t", "x" * 3_000, critical=True)
            if not app.sessions:
                break
        wait_until(lambda: not app.sessions, 10)
        assert app.bus.errors == 0 and app.metrics['horizon_refused_total{reason="slow"}'] == 60
        for sock in slow:
            sock.close()


def test_a_welcome_and_last_words_arrive():
    with running() as app:
        app.on_core("player_connected")(lambda event: event.client.send({"welcome": 1}))

        @app.on_client("say", "bye")
        def bye(event):
            app.send(event.client, {"last": "words"})
            event.client.close(4000, "bye")
        with hl.connect(app.url) as client:
            assert client.recv(5) == {"welcome": 1}
            client.emit("say", "bye")
            assert client.recv(5) == {"last": "words"} and client.recv(5) is None
            assert client.closed == hl.Close(4000, "bye")


def test_nothing_follows_a_close():
    with running() as app:
        @app.subscribe("t")
        def kick(message):
            for session in list(app.sessions.values()):
                session.close(4001, "kicked")
        sock = raw_websocket(app)
        sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}')
                     + masked(0x81, b'{"action":"publish","topic":"t","payload":1,"critical":true}'))
        events = take("client", read_all(sock))
        assert events[-1] == hl.Close(4001, "kicked") and len([e for e in events if isinstance(e, hl.Close)]) == 1
        sock.close()


def test_a_client_can_be_given_its_name():
    with running() as app, hl.connect(app.url) as one, hl.connect(app.url) as two:
        app.on_client("log", "in")(lambda event: setattr(event.client, "user", event.data))
        for client in (one, two):
            client.emit("log", "in", "ada")
        wait_until(lambda: app.presence.users() == ["ada"])
        assert on_loop(app, app.send, "ada", {"hi": 1}) == 2 and one.recv(5) == two.recv(5) == {"hi": 1}
        one.close()
        wait_until(lambda: len(app.sessions) == 1)
        assert app.presence.users() == ["ada"]


@pytest.mark.parametrize("misuse", [
    lambda app: hl.Engine(8080), lambda app: hl.Engine({"port": 1}), lambda app: hl.Engine(hl.Config(), port=1),
    lambda app: app.every(print), lambda app: app.every(-1), lambda app: app.every(), lambda app: app.websocket("/ws/data"),
    lambda app: app.subscribe("world.moves")(print), lambda app: next(iter(app.sessions.values())).send("\ud800"),
    lambda app: app.call_soon(None), lambda app: hl.Response("", "200"),
    lambda app: setattr(next(iter(app.sessions.values())), "user", 5),
])
def test_misuse_is_told_at_once(misuse):
    with running() as app, hl.connect(app.url):
        with pytest.raises(hl.UsageError):
            on_loop(app, misuse, app)


def test_what_fails_in_call_soon_is_logged_if_nobody_asks(caplog):
    with running() as app:
        app.call_soon(lambda: 1 / 0)
        with pytest.raises(KeyError):
            app.call_soon({}.__getitem__, 1).result(5)
        wait_until(lambda: "ZeroDivisionError" in caplog.text)
        gc.collect()
        assert "KeyError" not in caplog.text


def test_a_slip_in_the_environment_is_noticed():
    with pytest.raises(hl.ConfigError, match="HORIZON_PORT"):
        hl.Config.load(None, {"HORIZON_PROT": "1"})
    hl.Config.load(None, {"HORIZON_SOAK": "1", "HORIZON_SEED": "1", "PORT": "x"})


def test_an_engine_is_driven_by_one_thread_at_a_time():
    with running() as app:
        with pytest.raises(hl.StateError):
            app.run()
        with pytest.raises(hl.StateError):
            app.step()
        with pytest.raises(hl.StateError):
            on_loop(app, app.step)
    for call in (app.run, app.step):
        with pytest.raises(hl.StateError):
            call()


def test_an_engine_driven_by_steps_stops_when_told():
    app = hl.Engine(port=0, tick_hz=0)
    app.step()
    sock = raw(app, UPGRADE + b"\r\n")
    while not app.sessions:
        app.step(0.1)
    session, = app.sessions.values()
    session.send("now")
    assert app.wait_s() == 0
    app.step()
    session.put(hl.Publication("", 1, 0, "", False, 0))
    assert app.wait_s() == 0
    app.step()
    assert 0 < app.wait_s() <= 1
    app.stop(0.1)
    assert take("client", read_all(sock).partition(b"\r\n\r\n")[2]) == ["now", "1", hl.Close(1001, "server is shutting down")]
    sock.close()


def test_functions_nobody_would_await_are_refused():
    app = hl.Engine(port=0)

    async def later(*_): ...
    for register in (app.get("/x"), app.post("/x"), app.websocket("/x"), app.every(hz=1), app.subscribe("t")):
        with pytest.raises(hl.UsageError, match="async"):
            register(later)
    app.stop()


def test_a_hundred_comings_and_goings_leave_nothing_behind():
    with running() as app:
        for _ in range(int(100 * SOAK)):
            with hl.connect(app.url) as client:
                client.subscribe("a.*")
                client.subscribe("world.moves")
                client.subscribe("presence")
        wait_until(lambda: not app.server.connections)
        on_loop(app, app.topics._check)
        assert not app._movers and not app._users and not app.server._per_address
        assert len(app.loop.selector.get_map()) == 2        # the waker and the listener


# -- HTTP --

def test_the_built_in_addresses_answer():
    with running() as app:
        status, headers, body = get(app, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and len(body) < 30_000
        assert get(app, "/healthz")[::2] == (200, b"ok\n") and get(app, "/readyz")[0] == 200
        assert json.loads(get(app, "/stats.json")[2])["healthy"] is True
        assert get(app, "/nothing")[0] == 404
        status, headers, body = get(app, "/metrics")
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b"# TYPE events_processed_total counter\n" in body and b"server_active_connections 0\n" in body
        headers = get(app, "/metrics", {"Accept": "application/openmetrics-text"})[1]
        assert headers["Content-Type"].startswith("application/openmetrics-text")
    with running(metrics=False) as app:
        assert get(app, "/metrics")[0] == 404


def test_the_metrics_of_a_busy_engine_pass_the_official_parser():
    parser = pytest.importorskip("prometheus_client.parser", reason="pip install prometheus_client")
    with running() as app, hl.connect(app.url, protocol="proto") as client:
        client.subscribe("t")
        client.publish("t", 1)
        client.recv(5)
        text = get(app, "/metrics")[2].decode()
        families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        assert families["horizon_events_sent"].samples[0].labels.keys() == {"type"}
        assert {"horizon_marshal_seconds", "horizon_batch_messages", "horizon_tick_seconds"} <= {
            name for name, family in families.items() if family.type == "histogram"}
        names = {*app.metrics}
        assert all(line.startswith("#") or line.rpartition(" ")[0] in names for line in text.splitlines())


def test_the_page_is_served_with_a_policy_that_allows_only_itself():
    with running() as app:
        _, headers, body = get(app, "/")
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
        assert b"http://" not in body.replace(b"http://www.w3.org", b"") and b" style=" not in body
        assert b" onclick=" not in body and body.count(b"<script>") == body.count(b"<style>") == 1


def test_routes_of_ones_own():
    with running() as app:
        app.get("/player/{id}")(lambda request, id: {"id": id, "q": request.query})
        app.post("/echo")(lambda request: request.body)
        app.get("/made")(lambda request: hl.Response("<b>", 403, {"X-A": "b"}))
        app.get("/fails")(lambda request: 1 / 0)
        app.get("/wrong")(lambda request: 5)
        app.get("/")(lambda request: "mine")
        assert json.loads(get(app, "/player/a%20b?x=1")[2]) == {"id": "a b", "q": "x=1"}
        ask = urllib.request.Request(app.url + "/echo", data=b"body", method="POST")
        with urllib.request.urlopen(ask) as answer:
            assert answer.read() == b"body"
        assert get(app, "/made")[0] == 403 and get(app, "/fails")[0] == 500 and get(app, "/wrong")[0] == 500
        assert get(app, "/")[2] == b"mine" and get(app, "/echo")[0] == 405
        assert get(app, "/echo")[1]["Allow"] == "POST, OPTIONS"
        with pytest.raises(hl.UsageError):
            app.get("no-slash")


def test_http_keeps_alive_pipelines_and_answers_head():
    with running() as app:
        ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        data = request(app, ask * 3 + ask.replace(b"GET", b"HEAD").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert data.count(b"HTTP/1.1 200 OK") == 4 and data.count(b"\r\n\r\nok\n") == 3
        assert request(app, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n")
        continued = (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
                     b"Connection: close\r\n\r\n")
        with raw(app, continued) as sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(b"ab")
            assert read_all(sock).startswith(b"HTTP/1.1 404")


def test_pipelined_answers_of_any_size_come_in_order():
    with running() as app:
        app.get("/big")(lambda request: b"x" * 3_000_000)
        big = b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        data = request(app, big * 3 + last)
        assert data.count(b"HTTP/1.1 200 OK") == 4 and data.endswith(b"ok\n") and len(data) > 9_000_000
        with raw(app, small=True) as sock:
            sock.sendall(big + b"garbage garbage\r\n\r\n")
            time.sleep(0.2)
            data = read_all(sock)
        assert data.count(b"HTTP/1.1 ") == 2 and b"HTTP/1.1 400 " in data
        assert app.metrics['horizon_refused_total{reason="bad_request"}'] == 1


def test_a_slow_download_is_not_cut():
    with running() as app:
        app.get("/big")(lambda request: b"x" * 8_000_000)
        with raw(app, b"GET /big HTTP/1.0\r\n\r\n", small=True) as sock:
            got, began = b"", time.monotonic()
            while piece := sock.recv(1 << 20):
                got += piece
                if len(got) < 6_000_000 and time.monotonic() - began < 0.5:
                    time.sleep(0.01)
        assert len(got) > 8_000_000


def test_a_kept_connection_may_be_idle_longer_than_a_handshake():
    with running(handshake_s=0.3) as app, raw(app) as sock:
        ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.sendall(ask)
        assert sock.recv(1000).endswith(b"ok\n")
        time.sleep(0.8)
        sock.sendall(ask[:10])
        time.sleep(0.1)
        sock.sendall(ask[10:])
        assert sock.recv(1000).endswith(b"ok\n")


def test_a_silent_websocket_is_idle_when_there_are_no_pings():
    with running(ping_s=0, idle_s=0.3) as app, hl.connect(app.url) as client:
        assert client.recv(5) is None and client.closed.code == 1001
        assert app.metrics['horizon_refused_total{reason="idle"}'] == 1


@pytest.mark.parametrize("data, status, label", [
    (b"\x16\x03\x01\x02\0\x01\0\x01\xfc", 400, "bad_request"), (b"hello\r\n\r\n", 400, "bad_request"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000_000, 431, "header_too_big"),
    (b"BREW / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 501, "bad_method"),
    (b"DELETE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405, "bad_method"),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", 411, "bad_request"),
    (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421, "bad_host"),
    (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", 413, "body_too_big"),
    (UPGRADE.replace(b"13", b"8") + b"\r\n", 426, "ws_version"),
    (b"GET /ws/data HTTP/1.1\r\nHost: localhost\r\n\r\n", 426, "not_websocket"),
    (UPGRADE.replace(b"GET", b"DELETE") + b"Connection: close\r\n\r\n", 405, "bad_method"),
    (UPGRADE.replace(b"dGhl", b"xx") + b"\r\n", 400, "bad_handshake"),
    (UPGRADE + b"Origin: https://evil.example\r\n\r\n", 403, "bad_origin"),
    (UPGRADE + b"Origin: null\r\n\r\n", 403, "bad_origin"),
])
def test_bad_http_gets_its_status_is_counted_and_disturbs_nobody(data, status, label, caplog):
    with running() as app, hl.connect(app.url) as other:
        answer = b""
        with raw(app) as sock:
            with contextlib.suppress(ConnectionError):      # it need not take all of 10 MB
                sock.sendall(data)
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
        assert app.metrics[f'horizon_refused_total{{reason="{label}"}}'] == 1
        other.send({"namespace": "system", "event": "ping"})
        assert other.recv(5)["event"] == "pong" and "Traceback" not in caplog.text


def test_origins_that_may_connect():
    with running(allowed_origins=("https://game.example",)) as app:
        port = app.url.rpartition(":")[2].encode()
        raw_websocket(app, extra=b"Origin: https://game.example\r\n").close()
        ask = UPGRADE.replace(b"localhost", b"localhost:" + port) + b"Origin: http://localhost:" + port + b"\r\n\r\n"
        with raw(app, ask) as sock:
            assert sock.recv(100).startswith(b"HTTP/1.1 101")


def test_half_a_request_and_silence_ends_with_408():
    with running(handshake_s=0.3) as app:
        half, silent, quiet = raw(app, b"GET / HT"), raw(app), raw(app, UPGRADE[:40])
        assert read_all(half).startswith(b"HTTP/1.1 408 ") and read_all(quiet).startswith(b"HTTP/1.1 408 ")
        assert read_all(silent) == b""
        assert app.metrics['horizon_refused_total{reason="handshake_timeout"}'] == 3
        for sock in (half, silent, quiet):
            sock.close()


def test_too_many_connections_get_503():
    with running(max_connections=2) as app, hl.connect(app.url), hl.connect(app.url):
        assert request(app, b"").startswith(b"HTTP/1.1 503 ")
        assert app.metrics['horizon_refused_total{reason="max_connections"}'] == 1


# -- WebSocket --

@pytest.mark.parametrize("data, code, label", [
    (b"\x81\x01a", 1002, "unmasked"), (masked(0xC1, b"a"), 1002, "reserved_bit"), (masked(0x81, b"\xff"), 1007, "bad_utf8"),
    (masked(0x82, b"", b"\xff\0\0\0\0\0\1\0\1"), 1009, "message_too_big"), (masked(0x81, b"not json"), 1007, "bad_json"),
    (masked(0x81, b"NaN"), 1007, "bad_json"), (masked(0x81, b'{"id":1e999}'), 1007, "bad_json"),
    (masked(0x81, b'{"namespace":"system","event":"ping","data":"\\ud800"}'), 1007, "bad_json"), (masked(0x81, b"[" * 100), 1007, "bad_json"),
    (masked(0x81, b"[" * 11 + b"]" * 11), 1008, "json_depth"), (masked(0x82, b"\xff\xff"), 1007, "bad_protobuf"),
])
def test_bad_frames_get_their_close_code_are_counted_and_disturb_nobody(data, code, label, caplog):
    with running() as app, hl.connect(app.url) as other:
        sock = raw_websocket(app)
        sock.sendall(data)
        closes = take("client", read_all(sock))
        assert [each.code for each in closes] == [code]
        assert app.metrics[f'horizon_refused_total{{reason="{label}"}}'] == 1
        other.send({"namespace": "system", "event": "ping"})
        assert other.recv(5)["event"] == "pong" and "Traceback" not in caplog.text
        sock.close()


@pytest.mark.parametrize("message, code", [
    ({"action": "dance", "topic": "t"}, "unknown_action"), ({"action": ["x"], "topic": "t"}, "unknown_action"),
    ({"action": "subscribe", "topic": "world.moves", "packed": "f32"}, "bad_request"),
    ({"action": "subscribe"}, "bad_topic"), ({"action": "subscribe", "topic": 5}, "bad_topic"),
    ({"action": "subscribe", "topic": "a..b"}, "bad_topic"), ({"action": "publish", "topic": "a.>.b"}, "bad_topic"),
    ({"action": "unsubscribe", "topic": "never"}, "not_subscribed"), ({"action": "publish", "topic": "system.x"}, "forbidden"),
    ({"namespace": "a b", "event": "c"}, "bad_name"), ({"namespace": ["a"], "event": "c"}, "bad_name"),
    ({"namespace": "a"}, "bad_name"), ({"namespace": "system", "event": "what"}, "unknown_event"),
    ({"namespace": "movement", "event": "position", "data": 5}, "bad_position"),
    ({"namespace": "movement", "event": "position", "data": {"x": "1"}}, "bad_position"),
    ({"namespace": "movement", "event": "position", "data": {"x": 1e300}}, "bad_position"),
    ({"namespace": "movement", "event": "position", "data": {"x": 10**400}}, "bad_position"),
    ({"hello": 1}, "bad_request"), ({"action": "subscribe", "topic": "world.moves", "packed": 7}, "bad_request"),
])
def test_requests_that_can_not_be_are_answered_with_their_id(message, code):
    with running() as app, hl.connect(app.url) as client:
        client.send({**message, "id": 42})
        answer = client.recv(5)
        assert answer["id"] == 42 and answer["error"]["code"] == code and answer["error"]["message"]
        client.send(message)                    # without an id it is told all the same
        assert client.recv(5) == {"error": answer["error"]}
        assert app.metrics[f'horizon_requests_refused_total{{code="{code}"}}'] == 2


def test_what_is_not_even_an_object_is_answered():
    with running() as app, hl.connect(app.url) as client:
        for text in ("5", "[]", "null", '"x"', '{"action":"publish","topic":"t","id":[1]}'):
            client.send(text)
            assert client.recv(5)["error"]["code"] == "bad_request"
        assert app.metrics['horizon_requests_refused_total{code="bad_request"}'] == 5


def test_subscriptions_are_limited():
    with running(max_subscriptions=3) as app, hl.connect(app.url) as client:
        for topic in ("a", "b", "c", "a"):
            client.subscribe(topic)
        with pytest.raises(hl.UsageError, match="too_many_subscriptions"):
            client.subscribe("d")


def test_a_handler_that_raises_is_logged_and_the_tick_goes_on(caplog):
    with running() as app, hl.connect(app.url) as client:
        app.on_client("x", "y")(lambda event: event.data["missing"])
        app.on_core("server_tick")(lambda event: 1 / 0)
        client.send({"namespace": "x", "event": "y", "data": {}, "id": 1})
        assert client.recv(5)["error"]["code"] == "failed"
        client.send({"namespace": "x", "event": "nobody", "id": 2})
        assert client.recv(5)["error"] == {"code": "no_handler", "message": "nobody handles x:nobody"}
        before = app.tick_count
        wait_until(lambda: app.tick_count > before + 3)
        assert "KeyError: 'missing'" in caplog.text and app.metrics["horizon_bus_errors_total"] > 3


def test_a_peer_that_talks_too_fast_is_closed_with_1008():
    with running(max_messages_per_s=10, burst=20) as app, hl.connect(app.url) as client:
        for number in range(30):
            client.send({"namespace": "a", "event": "b"})
        while client.recv(5) is not None:
            pass
        assert client.closed.code == 1008 and app.metrics['horizon_refused_total{reason="rate"}'] == 1


def test_a_dead_peer_is_noticed_by_its_pings():
    with running(ping_s=0.2) as app:
        sock = raw_websocket(app)
        with hl.connect(app.url) as alive:
            with pytest.raises(TimeoutError):
                alive.recv(1.3)                 # answers pings meanwhile
            assert app.metrics['horizon_refused_total{reason="ping_timeout"}'] == 1
            assert len(app.sessions) == 1
        assert take("client", sock.recv(1000)) == [hl.Ping(b"")] * 2
        sock.close()


def test_a_peer_that_does_not_read_is_bounded_and_delays_nobody():
    with running(outbox_bytes=200_000, outbox_messages=50, tick_hz=500) as app, hl.connect(app.url) as good:
        slow = raw_websocket(app, small=True)
        slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}'))
        good.subscribe("t")
        wait_until(lambda: len(app.topics.matching("t")) == 2)
        session = next(each for each in app.sessions.values() if each.form == "")
        worst = 0
        for number in range(150):
            on_loop(app, app.publish, "t", "x" * 40_000)
            assert good.recv(5)["offset"] == number + 1
            worst = max(worst, session.backlog)
        assert worst < 200_000 + 2 * 41_000
        assert app.metrics['horizon_outbox_dropped_total{class="droppable"}'] > 0 and app.report()["healthy"] is False
        for _ in range(60):                     # critical ones are never dropped: it has to go
            on_loop(app, app.publish, "t", "y" * 40_000, critical=True)
            good.recv(5)
        wait_until(lambda: len(app.sessions) == 1)
        assert app.metrics['horizon_refused_total{reason="slow"}'] == 1
        slow.close()


def test_a_slow_peer_gets_the_newest_state_when_it_reads_again():
    with running() as app:
        slow = raw_websocket(app, small=True)
        slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"world.moves"}'))
        wait_until(lambda: app._movers)
        players = [os.urandom(16) for _ in range(2000)]

        def step(number):
            for player in players if number % 10 else players[:1000]:
                app.movement.move(player, number, 0, 0)
        session = next(iter(app.sessions.values()))
        number = 0
        while not (session.outbox and session.outbox.coalesced > 5):
            number += 1
            on_loop(app, step, number)
            time.sleep(0.021 if number > 300 else 0)
        stop = number
        slow.settimeout(1.0)
        ws, state = hl.WebSocketConnection("client", 1 << 24), {}
        while len(state) < 2000 or max(x for x, _, _ in state.values()) < stop:
            ws.receive(slow.recv(1 << 20))
            for event in ws.take_events():
                if isinstance(event, str):
                    payload = json.loads(event)["payload"]
                    state = payload["players"] if payload["full"] else {**state, **payload["players"]}
        want = {hl._uuid_text(player): list(at) for player, at in app.movement.positions.items()}
        assert state == want and app.drops.total() == 0
        slow.close()


def test_pings_without_reading_are_bounded():
    with running(outbox_bytes=100_000) as app:
        sock = raw_websocket(app, small=True)
        with contextlib.suppress(OSError):
            sock.settimeout(5)
            for _ in range(3_000):
                sock.sendall(masked(0x89, b"x" * 125) * 100)
        wait_until(lambda: not app.sessions, 10)
        assert app.metrics['horizon_refused_total{reason="slow"}'] == 1
        sock.close()


# -- the edge: who may come in, and what they may do --

def test_tokens_say_who_somebody_is_until_they_expire():
    token = hl.sign_token("ann", "new secret", expires_s=60)
    claims = hl.verify_token(token, "new secret", b"old secret")
    assert claims["sub"] == "ann" and claims["exp"] - claims["iat"] == 60
    assert hl.verify_token(hl.sign_token({"sub": "bob", "admin": True}, b"old secret"), "new secret", b"old secret")["admin"]
    head, body, signature = token.split(".")
    none = hl._base64(b'{"alg":"none"}')
    wrong = [token + "x", token[:-1], head + "." + body + ".", f"{none}.{body}.", "", "a.b.c", "..", "\u20ac.x.y",
             hl.sign_token("ann", "other"), hl.sign_token("ann", "new secret", expires_s=-1),
             hl.sign_token({"exp": None}, "new secret"), hl.sign_token({"nbf": time.time() + 99}, "new secret")]
    for forged in (f"{none}.{body}", f"{head}.{hl._base64(b'[]')}", f"{head}.{hl._base64(b'{}')}", f"{head}.!", f"{head}.{hl._base64(b'5')}"):
        wrong.append(f"{forged}.{hl._hmac('new secret', forged)}")
    for each in wrong:
        with pytest.raises(hl.HandshakeError) as caught:
            hl.verify_token(each, "new secret")
        assert caught.value.http_status == 401
    for misuse in (lambda: hl.verify_token(token), lambda: hl.verify_token(token, ["new secret"]), lambda: hl.sign_token("ann", ""),
                   lambda: hl.sign_token(1, "secret")):
        with pytest.raises(hl.UsageError):      # the caller's mistake is not the stranger's
            misuse()
    for token, words in (("", "no token"), (hl.sign_token("ann", "k", expires_s=-1), "expired")):
        with pytest.raises(hl.HandshakeError, match=words):
            hl.verify_token(token, "k")
    # RFC 7515 A.1: made by somebody else
    key = base64.urlsafe_b64decode(
        "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow==")
    signed = ("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6"
              "Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ")
    assert hl._hmac(key, signed) == "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"


def status_of(app, path="/ws/data", **headers):
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    rest = UPGRADE.partition(b"\r\n")[2] if path.startswith("/ws") else b"Host: localhost\r\nConnection: close\r\n"
    with raw(app, f"GET {path} HTTP/1.1\r\n".encode() + rest + lines.encode() + b"\r\n") as sock:
        return int(sock.recv(4096).split()[1])


def test_strangers_stay_outside_when_somebody_asks_who_they_are():
    with running() as app:
        @app.authenticate
        def who(request):
            if request.token == "banned":
                raise PermissionError("not you")
            if request.token == "boom":
                return 1 / 0
            if request.cookies.get("session") == "s1" or request.token == "letmein":
                return "ann"
            return hl.verify_token(request.token, "secret") if request.token.count(".") == 2 else None

        app.get("/claims")(lambda request: request.claims)

        @app.get("/mine")
        def mine(request):
            return request.user

        app.get("/open", public=True)(lambda request: "open " + request.user)
        app.websocket("/ws/own")(lambda client, message: client.send(client.user))
        for path in ("/ws/data", "/ws/own", "/mine", "/sub/t", "/stats.json", "/metrics"):
            assert status_of(app, path) == 401, path
        assert b"WWW-Authenticate: Bearer" in request(app, UPGRADE + b"\r\n")
        assert request(app, b"POST /pub/t HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1").startswith(b"HTTP/1.1 401")
        for path in ("/", "/healthz", "/readyz", "/open"):
            assert status_of(app, path) == 200, path
        assert status_of(app, Authorization="Bearer banned") == 403 and status_of(app, Authorization="Bearer boom") == 500
        assert status_of(app, Authorization="Bearer a.b.c") == 401
        assert status_of(app, "/ws/data?token=letmein") == 101 and status_of(app, Cookie="x=y; session=s1") == 101
        assert get(app, "/mine?token=letmein")[2] == b"ann" and get(app, "/open?token=letmein")[2] == b"open ann"
        assert json.loads(get(app, "/claims?token=" + hl.sign_token({"sub": "bob", "role": "admin"}, "secret"))[2])["role"] == "admin"
        with hl.connect(app.url, token=hl.sign_token("bob", "secret")) as client, \
                hl.connect(app.url + "/ws/own", token="letmein") as own:
            wait_until(lambda: app.presence.users() == ["bob"])
            own.send("who?")
            assert own.recv(5) == "ann" and on_loop(app, app.send, "bob", {"hi": 1}) == 1
            assert client.recv(5) == {"hi": 1}
        with pytest.raises(hl.HandshakeError, match="401") as caught:
            hl.connect(app.url)
        assert caught.value.http_status == 401
        assert app.metrics['horizon_refused_total{reason="unauthenticated"}'] >= 8


def test_rules_say_who_may_publish_and_subscribe():
    with running() as app:
        app.authenticate(lambda request: request.token)
        app.allow("chat.*", publish=True, subscribe=True)
        app.allow("news.>", publish=["ann"], subscribe=lambda user: user != "eve")
        app.allow("ann.inbox", subscribe="ann")
        answers = {}
        for user in ("ann", "eve"):
            with hl.connect(app.url, token=user) as client:
                for act, topic in (("publish", "chat.a"), ("subscribe", "chat.*"), ("subscribe", "chat.>"), ("subscribe", "*.a"),
                                   ("subscribe", ">"), ("subscribe", "chat.a"), ("publish", "news.a.b"), ("publish", "news"),
                                   ("subscribe", "news.>"), ("subscribe", "news.*.>"), ("subscribe", "news.a.*"), ("subscribe", "news"),
                                   ("subscribe", "ann.inbox"), ("publish", "ann.inbox"), ("publish", "other"), ("subscribe", "presence"),
                                   ("publish", "presence.x")):
                    try:
                        client.request(act, topic, **({"payload": 1} if act == "publish" else {}))
                    except hl.UsageError as error:
                        assert "forbidden" in str(error)
                        answers.setdefault(user, []).append(f"{act} {topic}")
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{app.url}/pub/news.x?token={user}", b"1")
                answers.setdefault(user, []).append("posted")
            assert status_of(app, f"/sub/news.x?token={user}") == (200 if user == "ann" else 403)
        no = ["subscribe chat.>", "subscribe *.a", "subscribe >", "publish news", "subscribe news", "publish ann.inbox", "publish other",
              "subscribe presence", "publish presence.x"]
        assert answers["ann"] == no + ["posted"]
        assert sorted(answers["eve"]) == sorted(no + ["publish news.a.b", "subscribe news.>", "subscribe news.*.>", "subscribe news.a.*",
                                                      "subscribe ann.inbox"])
        for wrong in ({"publish": 5}, {"subscribe": 1.5}):
            with pytest.raises(hl.UsageError):
                app.allow("t", **wrong)
        with pytest.raises(hl.UsageError):
            app.allow("a.>.b")


@pytest.mark.parametrize("pattern, other, contained", [
    ("a.b", "a.b", True), ("a.b", "a.*", False), ("a.*", "a.b", True), ("a.*", "a.*", True), ("a.*", "a.>", False), ("a.>", "a.>", True),
    ("a.>", "a", False), ("a.>", "a.*.c", True), ("*.>", "a.>", True), ("*", "a.b", False), (">", "*", True), (">", ">", True),
    ("a.*.>", "a.>", False), ("a.*.>", "a.b.>", True), ("a.*.>", "a.*", False), ("*.b", "*.*", False), ("*.*", "*.b", True),
])
def test_a_rule_contains_a_pattern_when_it_covers_all_of_it(pattern, other, contained):
    assert hl._contains(pattern.split("."), other.split(".")) is contained


def test_nobody_listens_to_strangers_by_accident(tmp_path):
    app = hl.Engine(host="0.0.0.0", port=0)
    with pytest.raises(hl.ConfigError, match="authenticate.*insecure"):
        app.start()
    app = hl.Engine(host="0.0.0.0", port=0)
    app.authenticate(lambda request: "ann" if request.token == "t" else None)
    with app:
        assert get(app, "/mine?token=t")[0] == 404 and app.url.startswith("http://127.0.0.1:")
    with running(host="0.0.0.0", insecure=True) as app:
        assert request(app, b"GET /healthz HTTP/1.1\r\nHost: my.example\r\nConnection: close\r\n\r\n").endswith(b"ok\n")
    with running(host="localhost") as app:
        assert get(app, "/healthz")[0] == 200


def test_origins_may_be_named_or_all():
    with running(allowed_origins=["*"]) as app:
        assert status_of(app, Origin="https://any.example") == 101
    with running() as app:
        post = b"POST /pub/t HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nConnection: close\r\n"
        for header, status in ((b"", 202), (b"Origin: http://localhost\r\n", 202), (b"Origin: null\r\n", 403),
                               (b"Origin: https://evil.example\r\n", 403), (b"Sec-Fetch-Site: cross-site\r\n", 403),
                               (b"Sec-Fetch-Site: same-origin\r\n", 202)):
            assert request(app, post + header + b"\r\n1").startswith(b"HTTP/1.1 %d" % status), header


def forwarded(app, address, path=b"/healthz", close=True):
    sock = raw(app, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: " + address.encode() + b"\r\n"
               + b"Connection: close\r\n" * close + b"\r\n")
    return sock


def test_only_trusted_proxies_speak_for_others():
    seen = []
    for trusted, header, address in (((), "203.0.113.9", "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.9", "203.0.113.9"),
                                     (("127.0.0.1",), "6.6.6.6, 203.0.113.9", "203.0.113.9"),
                                     (("127.0.0.1", "10.0.0.0/8"), "6.6.6.6, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
                                     (("127.0.0.1",), "6.6.6.6, nonsense", "127.0.0.1"), (("127.0.0.1",), "[2001:db8::1]:443", "2001:db8::1"),
                                     (("127.0.0.1",), "::ffff:192.0.2.1", "192.0.2.1"), (("127.0.0.1",), "192.0.2.1:99", "192.0.2.1")):
        with running(trusted_proxies=trusted) as app:
            app.get("/ip")(lambda request: seen.append(request.address) or "ok")
            app.on_core("player_connected")(lambda event: seen.append(event.client.address))
            read_all(forwarded(app, header, b"/ip"))
            assert status_of(app, X_Forwarded_For=header) == 101
            wait_until(lambda: not app.server.connections)
            on_loop(app, app._check)                        # the loop may be in the middle of forgetting
            assert seen == [address] * 2 and not app.server._per_address
            seen.clear()


def test_an_address_has_so_many_connections_and_a_banned_one_none():
    with running(trusted_proxies=["127.0.0.1"], max_connections_per_address=3, banned=["198.51.100.0/24", "2001:db8::/32"]) as app:
        socks = [forwarded(app, "203.0.113.9", close=False) for _ in range(3)]
        assert all(sock.recv(4096).startswith(b"HTTP/1.1 200") for sock in socks)
        assert read_all(forwarded(app, "203.0.113.9")).startswith(b"HTTP/1.1 503")
        assert read_all(forwarded(app, "203.0.113.10")).startswith(b"HTTP/1.1 200")
        for address in ("198.51.100.77", "2001:db8::5", "::ffff:198.51.100.1"):
            assert read_all(forwarded(app, address)).startswith(b"HTTP/1.1 403"), address
        socks[0].close()
        wait_until(lambda: app.server._per_address["203.0.113.9"] == 2)
        assert read_all(forwarded(app, "203.0.113.9")).startswith(b"HTTP/1.1 200")
        assert app.metrics['horizon_refused_total{reason="banned"}'] == 3
        assert app.metrics['horizon_refused_total{reason="max_connections_per_address"}'] == 1
        for sock in socks:
            sock.close()
        wait_until(lambda: not app.server.connections)
        on_loop(app, app._check)
        assert not app.server._per_address
    with running(banned=["127.0.0.1"]) as app:
        assert request(app, b"GET / HTTP/1.1\r\n").startswith(b"HTTP/1.1 403")


def test_json_of_clients_is_bounded_in_depth_texts_and_members():
    with running(max_json_depth=3, max_json_string=10, max_json_items=4) as app:
        for good in ([[[1]]], "0123456789", [1, 2, 3, 4], {"a": {"b": {}}}):
            with hl.connect(app.url) as client:
                client.send(json.dumps(good))
                assert "error" in client.recv(5)
        for bad, label in (([[[[]]]], "json_depth"), ("0123456789A", "json_string"), ({"a" * 11: 1}, "json_string"),
                           ([1] * 5, "json_items"), ({"a": [{"b": {}}]}, "json_depth")):
            with hl.connect(app.url) as client:
                client.send(json.dumps(bad))
                assert client.recv(5) is None and client.closed.code == 1008
            assert app.metrics[f'horizon_refused_total{{reason="{label}"}}'] >= 1
    for value in ([], {}, 5, "", [[]], [[], [[]]], {"a": [1, {"b": []}]}):
        depth = lambda each: 1 + max([depth(item) for item in (each.values() if isinstance(each, dict) else each)], default=0) \
            if isinstance(each, (list, dict)) else 0
        for limit in range(5):
            assert (hl._shape_fault(value, limit, 99, 99)[0] == "json_depth") is (depth(value) > limit)


def test_a_handler_may_say_that_the_server_is_full():
    with running() as app, hl.connect(app.url) as first:
        wait_until(lambda: len(app.sessions) == 1)
        before = app.metrics["server_active_connections"], app.presence.users(), app._present["data"]

        @app.on_core("player_connected")
        def full(event):
            event.cancel("server at capacity")

        for _ in range(3):
            with hl.connect(app.url) as client:
                assert client.recv(5) is None and client.closed == hl.Close(1013, "server at capacity")
        wait_until(lambda: len(app.sessions) == 1)
        assert (app.metrics["server_active_connections"], app.presence.users(), app._present["data"]) == before
        assert app.metrics['horizon_requests_refused_total{code="player_connected"}'] == 3


# -- HTTP --

def test_files_are_served_and_nothing_else(tmp_path):
    root = tmp_path / "assets"
    (root / "sub").mkdir(parents=True)
    (root / "a b.txt").write_text("h\u00e9llo")
    (root / "app.js").write_bytes(b"x" * 70_000)
    (root / "big.bin").write_bytes(os.urandom(3_000_000))
    (root / "sub" / "index.html").write_text("<p>index")
    (root / ".env").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "assets-too").mkdir()
    (tmp_path / "assets-too" / "x").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(root / "pipe")
    with running() as app:
        app.static("/assets", root)
        app.static("/cached/", root, cache_control="max-age=60")
        status, headers, body = get(app, "/assets/a%20b.txt")
        assert (status, body) == (200, "h\u00e9llo".encode()) and headers["Content-Type"] == "text/plain; charset=utf-8"
        assert headers["Cache-Control"] == "no-cache" and headers["X-Content-Type-Options"] == "nosniff" and "Last-Modified" in headers
        tag = headers["ETag"]
        for match, want in ((tag, 304), (f'"x", W/{tag}', 304), ("*", 304), ('"x"', 200)):
            assert get(app, "/assets/a%20b.txt", {"If-None-Match": match})[0] == want
        assert get(app, "/assets/sub/")[2] == get(app, "/assets/sub")[2] == b"<p>index"
        moved = request(app, b"GET /assets/sub HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert moved.startswith(b"HTTP/1.1 301") and b"\r\nLocation: ./sub/\r\n" in moved      # or relative links would miss
        assert get(app, "/assets/big.bin")[2] == (root / "big.bin").read_bytes()
        (root / "sub" / "deep").mkdir()
        for path, location in (("/assets", "./assets/"), ("/assets/sub%2Fdeep?x=1", "./sub%2Fdeep/?x=1")):
            moved = request(app, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert moved.startswith(b"HTTP/1.1 301") and f"\r\nLocation: {location}\r\n".encode() in moved
        assert "javascript" in get(app, "/assets/app.js")[1]["Content-Type"]
        assert get(app, "/cached/app.js")[1]["Cache-Control"] == "max-age=60"
        for path in ("/assets/../secret.txt", "/assets/%2e%2e/secret.txt", "/assets/..%2fsecret.txt", "/assets//etc/passwd", "/assets/link",
                     "/assets/%2Fetc%2Fpasswd", "/assets/.env", "/assets/sub/../.env", "/assets/pipe", "/assets/", "/assets/none",
                     "/assets/../assets-too/x", "/assets/a%00b", "/assets//etc", "/assets/..%2f..%2f..%2fetc", "/assets/..", "/assets/sub/..", "/assets/" + "a" * 5_000, "/assets/sub/index.html/x", "/assets/\udcff%ff"):
            ask = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode("utf-8", "replace")
            assert request(app, ask).startswith(b"HTTP/1.1 404"), path
        head = request(app, b"HEAD /assets/big.bin HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"Content-Length: 3000000\r\n" in head and head.endswith(b"\r\n\r\n")
        with pytest.raises(hl.UsageError, match="no folder"):
            app.static("/x", tmp_path / "none")


def test_bodies_in_pieces_are_sent_as_they_are_taken(caplog):
    with running() as app:
        app.get("/known")(lambda request: hl.Response(iter([b"abc", b"", b"de"]), length=5))
        app.get("/chunks")(lambda request: iter([b"x" * 100_000] * 30))
        app.get("/short")(lambda request: hl.Response(iter([b"abc"]), length=5))
        app.get("/long")(lambda request: hl.Response(iter([b"abc", b"def"]), length=5))
        app.get("/fails")(lambda request: (1 // 0 for _ in range(2)))
        keep = b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        data = request(app, b"GET /known" + keep + b"HEAD /chunks" + keep + b"GET /known" + keep + last)
        assert data.count(b"\r\n\r\nabcde") == 2 and data.endswith(b"\r\n\r\nok\n") and b"Transfer-Encoding: chunked\r\n" in data
        assert get(app, "/chunks")[2] == b"x" * 3_000_000
        old = request(app, b"GET /chunks HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert old.endswith(b"\r\n\r\n" + b"x" * 3_000_000) and b"chunked" not in old and b"Connection: close" in old
        for path in (b"/short", b"/fails"):                 # never the next answer behind a wrong length
            data = request(app, b"GET " + path + keep + last)
            assert data.count(b"HTTP/1.1 ") == 1 and b"ok\n" not in data
        assert caplog.text.count("failed; it is closed") == 2
        assert b"\r\n\r\nabcdeHTTP/1.1 200" in request(app, b"GET /long" + keep + last)
        with raw(app, b"GET /chunks" + keep, small=True):   # and one that nobody takes ends with its connection
            wait_until(lambda: any(each._pieces is not None for each in app.server.connections.values()))
        wait_until(lambda: not app.server.connections)


def test_answers_have_a_date_and_old_clients_keep_their_connection():
    with running() as app:
        data = request(app, b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + b"OPTIONS /pub/x HTTP/1.1\r\nHost: localhost\r\n\r\n"
                       + b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"\r\nConnection: keep-alive\r\n" in data and b"204 No Content\r\nAllow: POST, OPTIONS" in data
        assert re.search(rb"\r\nDate: (Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\r\n", data)
    assert hl._http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT"     # RFC 9110 5.6.7


class Events:
    """A reader of Server-Sent Events, by the standard's rules."""

    def __init__(self, app, pattern, extra=b""):
        app.on_core("server_stopping")(lambda event: self.sock.close())      # else the server waits for it
        self.sock = raw(app, b"GET /sub/" + pattern.encode() + b" HTTP/1.1\r\nHost: localhost\r\n" + extra + b"\r\n")
        self.data, self.last_id = b"", None
        self.head = self._until(b"\r\n\r\n")

    def _until(self, mark):
        while mark not in self.data:
            piece = self.sock.recv(4096)
            assert piece, "the stream ended"
            self.data += piece
        part, _, self.data = self.data.partition(mark)
        return part

    def next(self):
        while True:
            fields = dict(line.split(": ", 1) for line in self._until(b"\n\n").decode().split("\n") if line[:1] != ":")
            self.last_id = fields.get("id", self.last_id)
            if "data" in fields:
                return fields.get("id"), json.loads(fields["data"])


def test_curl_is_a_client():
    with running(ping_s=0.5) as app:
        events = Events(app, "chat.*")
        assert events.head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in events.head and b"Content-Length" not in events.head
        post = urllib.request.Request(app.url + "/pub/chat.a", b'{"n": 1}', {"Content-Type": "application/json"})
        with urllib.request.urlopen(post) as answer:
            assert answer.status == 202 and json.load(answer) == {"delivered": 1}
        urllib.request.urlopen(app.url + "/pub/chat.b", "just t\u00e9xt".encode()).close()      # as curl -d sends it
        urllib.request.urlopen(app.url + "/pub/chat.c?critical=1", b"5").close()
        got = [events.next() for _ in range(3)]
        assert [(each["topic"], each["payload"]) for _, each in got] == [("chat.a", {"n": 1}), ("chat.b", "just t\u00e9xt"), ("chat.c", 5)]
        assert len({number for number, _ in got}) == 3
        for path, body, kind, status in (("/pub/a..b", b"1", "", 400), ("/pub/system.x", b"1", "", 403), ("/pub/t", b"\xff", "", 400),
                                         ("/pub/t", b"{", "application/json", 400), ("/pub/t", b"[" * 50 + b"]" * 50, "", 400)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(app.url + path, body, {"Content-Type": kind} if kind else {}))
            assert caught.value.code == status
        assert status_of(app, "/sub/a..b") == 400 and request(app, b"HEAD /sub/t HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                                                              ).startswith(b"HTTP/1.1 405")
        assert events._until(b"\n\n") == b":"               # alive, though nothing happens
        assert app.presence.online() == 0 and app.metrics["server_active_connections"] == 1
        on_loop(app, app.broadcast, "not for it")
        session, = app.sessions.values()
        on_loop(app, session.send, {"direct": 1})
        on_loop(app, session.send, "text")
        assert events.next()[1] == {"direct": 1} and events.next()[1] == "text"
        resumed = Events(app, "chat.*", b"Last-Event-ID: 7\r\n")
        gap = resumed.next()[1]
        assert (gap["topic"], gap["gap"], gap["epoch"]) == ("chat.*", True, app.topics._epoch)
        resumed.sock.close()
        on_loop(app, session.close)
        with pytest.raises(AssertionError, match="ended"):
            events.next()
        wait_until(lambda: not app.sessions)


def test_posts_are_counted_like_messages():
    with running(max_messages_per_s=1, burst=3) as app:
        ask = b"POST /pub/t HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"
        data = request(app, ask * 5)
        assert data.count(b" 202 ") == 3 and data.count(b" 429 ") == 1


# -- other doors --

TLS = {"one": """\
-----BEGIN CERTIFICATE-----
MIIBmDCCAT+gAwIBAgIUPesT08KZ0RQIYfqNDjr8UV6ndhIwCgYIKoZIzj0EAwIw
EzERMA8GA1UEAwwIb25lLnRlc3QwIBcNMjYxMTIxMTgxOTQ0WhgPMjEyNjEwMjgx
ODE5NDRaMBMxETAPBgNVBAMMCG9uZS50ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAE/lhor7DxDQ4eboAUA4mc0UTbkqAcB8JfW09E6AfqNbhktcmKyP8SYOaA
XCYTghqzvp9XID648B9EMUQgB8VzNqNvMG0wHQYDVR0OBBYEFDrVD39VyfhRP1CX
Gucr4zhoMk/6MB8GA1UdIwQYMBaAFDrVD39VyfhRP1CXGucr4zhoMk/6MA8GA1Ud
EwEB/wQFMAMBAf8wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49
BAMCA0cAMEQCICOx8RU6RUQCWewwvrmiZdEYF3Yzk7UXYJxqUoIlR+LVAiAL9mpr
t+w1BOK+ag7SWf+SGJI6pDcJXVApIwL6BxevIA==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjTBx0KsJFfEn38JJ
ePSaRGVVMDYDQQ4J6+n+VeanLDahRANCAAT+WGivsPENDh5ugBQDiZzRRNuSoBwH
wl9bT0ToB+o1uGS1yYrI/xJg5oBcJhOCGrO+n1cgPrjwH0QxRCAHxXM2
-----END PRIVATE KEY-----""", "two": """\
-----BEGIN CERTIFICATE-----
MIIBmDCCAT+gAwIBAgIUPQvfMRANgcnN7PWlajyjBh2qGaMwCgYIKoZIzj0EAwIw
EzERMA8GA1UEAwwIdHdvLnRlc3QwIBcNMjYxMTIxMTgxOTQ0WhgPMjEyNjEwMjgx
ODE5NDRaMBMxETAPBgNVBAMMCHR3by50ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAEASGHjPv2kxRsmemBYmdYKWFuMLwFH9vrZJO6QLSFgUzmbmlG0G7NG21o
4r4hFL8aCfktXCsCYJLfwYBaGdmtjaNvMG0wHQYDVR0OBBYEFFHvaPyPV7L2UM/m
ryTaBqnIbA8/MB8GA1UdIwQYMBaAFFHvaPyPV7L2UM/mryTaBqnIbA8/MA8GA1Ud
EwEB/wQFMAMBAf8wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49
BAMCA0cAMEQCICUdAOsjFqKEunbMQCQv0ndE6pHEduPM/OVbspFMXbHVAiB/Eg1G
Cqc3b3KR8o0pdzCiVagREvNB2iFPU+kfCJaRrQ==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgQh/iBlYRRvhBNVxb
T9Xt4FPAaEhxER3GOUlAz/dmnWehRANCAAQBIYeM+/aTFGyZ6YFiZ1gpYW4wvAUf
2+tkk7pAtIWBTOZuaUbQbs0bbWjiviEUvxoJ+S1cKwJgkt/BgFoZ2a2N
-----END PRIVATE KEY-----"""}


@pytest.fixture
def certificate(tmp_path):
    """A certificate for localhost with its key, in one file; and what trusts it."""
    import ssl
    path = tmp_path / "cert.pem"
    path.write_text(TLS["one"])
    context = ssl.create_default_context(cadata=TLS["one"].partition("-----BEGIN PRIVATE")[0])
    return path, context


def test_one_port_speaks_tls(certificate):
    import ssl
    path, context = certificate
    context.set_alpn_protocols(["h2", "http/1.1"])
    with running(tls_cert=path, max_message_bytes=1 << 22) as app:
        app.websocket("/ws/echo")(lambda client, message: client.send(message))
        app.get("/big")(lambda request: hl.Response(iter([b"x" * 100_000] * 20), length=2_000_000))
        assert app.url.startswith("https://127.0.0.1:")
        with urllib.request.urlopen(app.url + "/big", context=context) as answer:
            assert len(answer.read()) == 2_000_000
        with hl.connect(app.url, ssl_context=context, compress=True) as client, \
                hl.connect(app.url + "/ws/echo", ssl_context=context) as echo:
            client.subscribe("t")
            for number in range(200):
                on_loop(app, app.publish, "t", "x" * 1_000 + str(number), critical=number % 50 == 0)
            assert [client.recv(5)["offset"] for _ in range(200)] == list(range(1, 201))
            data = os.urandom(3_000_000)
            echo.send(data)
            assert echo.recv(10) == data
        with socket.create_connection(("127.0.0.1", app._port)) as sock, \
                context.wrap_socket(sock, server_hostname="localhost") as tls:
            assert tls.selected_alpn_protocol() == "http/1.1" and tls.version() in ("TLSv1.2", "TLSv1.3")
            tls.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b""
            while piece := tls.recv(4096):                  # ends with a close_notify, or this would raise
                answer += piece
            assert answer.endswith(b"ok\n")
        assert request(app, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 400 Bad Request")    # plain HTTP
        assert read_all(raw(app, b"garbage garbage"))[:1] in (b"\x15", b"")
        assert app.metrics['horizon_refused_total{reason="tls"}'] == 2
        assert app.server.tls.minimum_version == ssl.TLSVersion.TLSv1_2
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning):
            old.maximum_version = old.minimum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", app._port)) as sock, pytest.raises((ssl.SSLError, OSError)):
            old.wrap_socket(sock)


def test_a_tls_handshake_stalls_nobody(certificate):
    path, context = certificate
    with running(tls_cert=path, handshake_s=0.5) as app:
        stuck = [raw(app, b"\x16\x03\x01\x02") for _ in range(20)]
        with hl.connect(app.url, ssl_context=context) as client:
            client.send({"namespace": "system", "event": "ping"})
            assert client.recv(1)["event"] == "pong"
            for sock in stuck:
                assert sock.recv(100) == b""                # by handshake_s
        assert app.metrics['horizon_refused_total{reason="handshake_timeout"}'] == 20


def test_a_certificate_is_read_anew_and_nobody_notices(tmp_path):
    import ssl
    path = tmp_path / "cert.pem"
    path.write_text(TLS["one"])
    contexts = {name: ssl.create_default_context(cadata=text.partition("-----BEGIN PRIVATE")[0]) for name, text in TLS.items()}
    with program("serve", "--port", "0", "--tls-cert", os.fspath(path), "--tick-hz", "0") as (process, url), \
            hl.connect(url, ssl_context=contexts["one"]) as client:
        path.write_text(TLS["two"])
        process.send_signal(signal.SIGHUP)

        def new_one():
            try:
                hl.connect(url, ssl_context=contexts["two"]).close()
                return True
            except ssl.SSLError:
                return False
        wait_until(new_one)
        path.write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        assert "the old certificate stays" in "".join(process.stderr.readline() for _ in range(2))
        assert new_one()
        client.send({"namespace": "system", "event": "ping"})
        assert client.recv(5)["event"] == "pong"


@pytest.mark.parametrize("settings", [{"tls_cert": "/no/such/file"}, {"tls_cert": __file__}])
def test_a_certificate_that_can_not_be_used_is_named(settings):
    with pytest.raises(hl.ConfigError, match="tls_cert"):
        hl.Engine(port=0, **settings).start()


def test_a_unix_socket_is_a_door(tmp_path):
    path = os.fspath(tmp_path / "hl.sock")

    def ask():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: my.example\r\nConnection: close\r\n\r\n")
            return read_all(sock)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()                               # what a killed process leaves behind
    with hl.Engine(unix_socket=path) as app:
        assert ask().endswith(b"ok\n") and app.url == f"unix:{path}" and app._port == 0
        with pytest.raises(OSError, match="somebody listens.*hl.sock"):
            hl.Engine(unix_socket=path).start()
        assert ask().endswith(b"ok\n")
    assert not os.path.exists(path)
    with hl.Engine(unix_socket=path, port=0, max_connections_per_address=1) as app:
        assert ask().endswith(b"ok\n") and get(app, "/healthz")[0] == 200
    with pytest.raises(OSError, match="none"):
        hl.Engine(unix_socket=os.fspath(tmp_path / "none" / "x")).start()


def test_the_command_on_a_unix_socket_names_no_other_address(tmp_path):
    with program("serve", "--unix-socket", os.fspath(tmp_path / "s")) as (process, url):
        assert url == f"unix:{tmp_path}/s" and "Ctrl-C" in process.stdout.readline()


def test_processes_can_share_a_port():
    with running(reuse_port=True) as one, hl.Engine(reuse_port=True, port=int(one.url.rpartition(":")[2])) as two:
        assert one.url == two.url
        for _ in range(50):
            get(one, "/healthz")
        assert one.server.accepted + two.server.accepted >= 50
    with running() as one, pytest.raises(OSError):
        hl.Engine(port=int(one.url.rpartition(":")[2])).start()


def test_systemd_hands_over_a_socket_and_is_told(tmp_path):
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(os.fspath(tmp_path / "notify"))
    notify.settimeout(5)
    listener = socket.create_server(("127.0.0.1", 0))
    launch = ("import os, sys\nos.environ['LISTEN_PID'] = str(os.getpid())\nos.dup2(int(sys.argv[1]), 3)\n"
              f"os.execv(sys.executable, [sys.executable, {os.fspath(MODULE)!r}, 'serve'])")
    process = subprocess.Popen([sys.executable, "-c", launch, str(listener.fileno())], pass_fds=[listener.fileno()], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": os.fspath(tmp_path / "notify")})
    try:
        assert notify.recv(100) == b"READY=1"
        port = listener.getsockname()[1]
        assert f":{port}\n" in process.stdout.readline() + process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.read() == b"ok\n"
        process.terminate()
        assert notify.recv(100) == b"STOPPING=1" and process.wait(5) == 0
    finally:
        process.kill()
        process.communicate()
        notify.close()
        listener.close()


def test_it_is_said_when_there_are_fewer_files_than_connections():
    command = f"ulimit -n 200; exec {sys.executable} -m horizon_lite serve --port 0 --max-connections "
    for most, said in (("500", True), ("100", False)):
        process = subprocess.Popen(["bash", "-c", command + most], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while "listening" not in process.stdout.readline():
            pass
        process.terminate()
        assert ("200 files" in process.communicate()[1]) is said and process.returncode == 0


def test_the_loop_is_pinned_to_the_processors_asked_for():
    cpu = min(os.sched_getaffinity(0))
    with program("serve", "--port", "0", "--cpus", f"{cpu}-{cpu}") as (process, url):
        wait_until(lambda: os.sched_getaffinity(process.pid) == {cpu})
    done = run_cli("serve", "--port", "0", "--cpus", "4000")
    assert done.returncode == 3 and "cpus = [4000]" in done.stderr and "Traceback" not in done.stderr
    assert hl._cpu_numbers(("0", "2-4")) == {0, 2, 3, 4} and hl.Config(cpus=[0, 1]).cpus == ("0", "1")


def test_routes_of_all_kinds_live_side_by_side(tmp_path):
    (tmp_path / "index.html").write_text("home")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.txt").write_text("x")
    with running() as app:
        app.static("/", tmp_path)
        app.static("/deep", tmp_path / "below")
        app.websocket("/chat")(lambda client, message: client.send(message))
        app.get("/chat")(lambda request: "the chat's page")
        assert get(app, "/chat")[2] == b"the chat's page" and status_of(app, "/ws/data") == 101 and get(app, "/healthz")[2] == b"ok\n"
        assert get(app, "/")[2] == b"home" and get(app, "/deep/x.txt")[2] == b"x" and get(app, "/below/x.txt")[0] == 200
        with hl.connect(app.url + "/chat") as client:
            client.send("hi")
            assert client.recv(5) == "hi"
        assert get(app, f"/{tmp_path}/index.html")[0] == 404


def test_answers_keep_to_the_rules_whatever_a_route_returns():
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    keep = b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running() as app:
        def split(request):
            answer = hl.Response("x")
            answer.headers["X-A"] = request.args["v"]
            return answer
        app.get("/split")(split)
        app.get("/none")(lambda request: hl.Response(iter([b"abc"]), status=204))
        app.get("/bye")(lambda request: hl.Response("bye", headers={"connection": "close", "Date": "today"}))
        app.get("/interim")(lambda request: hl.Response("x", status=100))
        app.get("/text")(lambda request: hl.Response(iter(["text"])))

        def changed(request):
            answer = hl.Response("a")
            answer.body = json.loads(request.args["to"]).encode() if "to" in request.args else "str"
            answer.status = int(request.args.get("status", 200))
            return answer
        app.get("/changed")(changed)
        app.get("/cookies")(lambda request: hl.Response("x", headers={"Set-Cookie": ["a=1", "b=2"]}))
        app.get("/cut")(lambda request: (piece if number < 2 else 1 // 0 for number, piece in enumerate([b"half"] * 3)))
        assert get(app, "/changed?to=%22hello%20world%22")[2] == b"hello world"
        assert get(app, "/changed")[0] == get(app, "/changed?to=%22x%22&status=1000")[0] == 500
        assert request(app, b"GET /cookies" + keep + last).count(b"Set-Cookie: ") == 2
        for ask in (b"GET /cut HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"GET /cut HTTP/1.0\r\n\r\n"):
            with raw(app, ask) as sock:
                got = b""
                with contextlib.suppress(ConnectionResetError):
                    while piece := sock.recv(4096):
                        got += piece
                    assert b"chunked" in got and not got.endswith(b"0\r\n\r\n")      # the cut can be seen
        assert request(app, b"HEAD /healthz" + keep + b"GAR BAGE X\r\n\r\n").endswith(b"malformed request line\n")
        assert get(app, "/split?v=a%0d%0aEvil:%201")[0] == 500 and get(app, "/interim")[0] == 500
        assert b"abc" not in request(app, b"GET /none" + keep + last)
        data = request(app, b"GET /bye" + keep + last)
        assert data.endswith(b"bye") and data.count(b"close") == 1 and data.count(b"Date") == 1
        for ask in (b"HEAD /x HTTP/1.1\r\nHost: evil\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: localhost\r\nExpect: tea\r\n\r\n"):
            answer = request(app, ask)
            assert answer.endswith(b"\r\n\r\n") and b"Date: " in answer and b" 4" in answer[:13]
        assert request(app, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 204")
        assert request(app, b"POST /pub/x HTTP/1.0\r\nOrigin: null\r\nContent-Length: 1\r\n\r\n1").startswith(b"HTTP/1.1 403")


def test_a_failing_body_or_a_vanished_reader_touches_nobody_else(caplog):
    with running() as app, hl.connect(app.url) as other:
        app.get("/text")(lambda request: hl.Response(iter(["text"]), length=4))
        app.get("/big")(lambda request: hl.Response(iter([b"x" * 60_000] * 50)))
        for number in range(60):
            sock = raw(app, b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"big", b"text")[number % 2])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            assert alive(other)
        wait_until(lambda: len(app.server.connections) == 1)
        assert "a pass of the loop failed" not in caplog.text and "file descriptor" not in caplog.text


def test_a_body_that_makes_progress_is_neither_idle_nor_late():
    def drip():
        for _ in range(15):
            time.sleep(0.03)
            yield b"x" * 20
    with running(idle_s=0.15, handshake_s=0.15) as app:
        app.get("/drip")(lambda request: hl.Response(drip(), length=300))
        app.get("/end")(lambda request: drip())
        ask = b"GET /drip HTTP/1.1\r\nHost: localhost\r\n\r\n"
        data = request(app, ask + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"x" * 300 + b"HTTP/1.1 200" in data and data.endswith(b"ok\n")
        assert request(app, b"GET /end HTTP/1.0\r\n\r\n").endswith(b"x" * 300)


def test_a_growing_file_is_sent_as_long_as_it_was(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"a" * 5_000_000)
    with running() as app:
        app.static("/f", tmp_path)
        with raw(app, b"GET /f/log HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", small=True) as sock:
            start = sock.recv(1000)
            with path.open("ab") as file:
                file.write(b"more")
            data = start + read_all(sock)
        assert data.partition(b"\r\n\r\n")[2] == b"a" * 5_000_000


@pytest.mark.parametrize("found, status", [
    ("ann", 101), ({"sub": "ann"}, 101), (None, 401), ("", 401), (False, 401), ({}, 401), (True, 500), (b"bob", 500), (5, 500),
    ((False, "no"), 500), ([None], 500), ({"sub": ["a"]}, 500), (hl.Response("no", 403), 500), ("a" * 129, 500), ("\ud800", 500),
    (NotImplemented, 500), (ZeroDivisionError, 500), (PermissionError, 403), (hl.HandshakeError("x", http_status=401), 401)])
def test_only_a_name_lets_somebody_in(found, status):
    with running() as app:
        @app.authenticate
        def who(request):
            if isinstance(found, (type, Exception)):
                raise found
            return found
        assert status_of(app) == status and status_of(app, "/healthz") == 200


def test_a_rule_that_fails_lets_nobody_in_and_ends_nothing(caplog):
    with running() as app, hl.connect(app.url) as client:
        seen = []
        app.allow("boom", publish=lambda user: 1 / 0, subscribe=lambda user: 1 / 0)
        app.allow("t", publish=lambda user: seen.append(user) or not user.startswith("guest-"))
        for topic in ("boom", "t"):
            with pytest.raises(hl.UsageError, match="forbidden"):
                client.publish(topic, 1)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(app.url + "/pub/t", b"1")
        assert status_of(app, "/sub/boom") == 403 and alive(client) and len(seen) == 2 and "a rule for boom" in caplog.text


def test_tls_never_falls_back_and_knows_its_end(certificate):
    path, context = certificate
    with running(tls_cert=path) as app:
        last_words = []
        app.on_core("player_disconnected")(lambda event: event.client.send({"secret": 1}) or last_words.append(1))

        def upgraded():
            tls = context.wrap_socket(raw(app), server_hostname="localhost")
            tls.sendall(UPGRADE + b"\r\n")
            assert b" 101 " in tls.recv(1000)
            return tls
        tls = upgraded()
        session, = app.sessions.values()
        sock = socket.socket(fileno=tls.detach())
        sock.settimeout(5)

        def both():
            session.send({"secret": 2})
            sock.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)
            time.sleep(0.05)
        for _ in range(3):
            app.call_soon(both)
        assert b"secret" not in read_all(sock) and last_words == [1]
        sock.close()
        tls = upgraded()
        plain = tls.unwrap()                                # sends close_notify and waits for the server's
        assert plain.recv(100) == b"" and len(last_words) == 2
        plain.close()
        wait_until(lambda: not app.server.connections)


def test_nothing_follows_the_goodbye_and_nobody_comes_in_after_it():
    with running() as app:
        app.on_core("player_disconnected")(lambda event: (event.client.send({"late": 1}), event.client.send("late"),
                                                          app.send(event.client, {"late": 2})))
        sock = raw_websocket(app)
        on_loop(app, next(iter(app.sessions.values())).close, 4000, "bye")
        assert sock.recv(1000) == b"\x88\x05\x0f\xa0bye"
        sock.sendall(masked(0x88, b"\x0f\xa0"))
        assert sock.recv(1000) == b""
    app = hl.Engine(port=0).start()
    half, held = raw(app, UPGRADE), raw_websocket(app)
    threading.Thread(target=app.stop, args=(3,)).start()
    held.recv(100)
    half.sendall(b"\r\n")
    assert read_all(half).startswith(b"HTTP/1.1 503")
    held.close()
    for wrong in (math.inf, math.nan, -1):
        with pytest.raises(hl.UsageError, match="grace_s"):
            hl.Engine(port=0).stop(wrong)


def test_a_reader_that_pauses_has_the_time_it_was_promised():
    app = hl.Engine(port=0, outbox_bytes=0, outbox_messages=0).start()
    slow = raw_websocket(app, small=True)
    session, = app.sessions.values()
    on_loop(app, app.send, session, "x" * 8_000_000)
    stopping = threading.Thread(target=app.stop, args=(9,))
    stopping.start()
    time.sleep(0.5)                                         # longer than a goodbye takes
    data = b""
    while b"\x88" not in data[-40:]:
        piece = slow.recv(1 << 20)
        assert piece, len(data)
        data += piece
    assert len(data) > 8_000_000
    slow.sendall(masked(0x88, b"\x03\xe9"))
    stopping.join(10)
    slow.close()


def test_small_things_an_attack_found(tmp_path, caplog):
    with running(max_messages_per_s=5, burst=10) as app, raw_websocket(app) as sock:
        with contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(masked(0x82))                  # an empty batch is a message, too
            assert b"\x88" in sock.recv(1000)[:1]
        wait_until(lambda: app.metrics['horizon_refused_total{reason="rate"}'] == 1)
    with running(ping_s=1e300) as app, hl.connect(app.url) as client:
        assert alive(client)
        for topic in ("presence", "world.moves"):
            client.subscribe(topic)
        client.unsubscribe("presence")
        on_loop(app, app.movement.move, os.urandom(16), 1.0, 2.0, 3.0)
        while client.recv(5).get("topic") != "world.moves":
            pass
    with running(ping_s=0, idle_s=0.3) as app:
        events = Events(app, "t")
        for number in range(8):
            time.sleep(0.1)
            on_loop(app, app.publish, "t", number)
        assert [events.next()[1]["payload"] for _ in range(8)] == list(range(8))
        events.sock.close()
    networks = hl._Networks(["10.0.0.0/8", "192.0.2.7", "::ffff:198.51.100.0/120", "2001:db8::/32", "unix"])
    for address, inside in (("10.255.0.1", True), ("11.0.0.0", False), ("192.0.2.7", True), ("192.0.2.8", False), ("unix", True),
                            ("198.51.100.9", True), ("198.51.101.0", False), ("2001:db8:1::", True), ("2001:db9::", False)):
        assert (address in networks) is inside, address
    for wrong in ("3-1", "1-99999999999", "-1", "a"):
        with pytest.raises(hl.ConfigError, match="cpus"):
            hl.Config(cpus=[wrong])
    for wrong in (None, "\ud800.a.b", 5):
        with pytest.raises(hl.HandshakeError):
            hl.verify_token(wrong, "key")
    app = hl.Engine(host="0.0.0.0", port=0)
    with pytest.raises(hl.ConfigError):
        app.start()
    app.authenticate(lambda request: "ann")
    with app:
        assert not app.server.draining
    app = hl.Engine(port=0)
    app.on_core("server_stopping")(lambda event: sys.exit())
    app.on_core("player_disconnected")(lambda event: sys.exit())
    app.start()
    clients = [raw_websocket(app) for _ in range(3)]
    app.stop(0.3)
    assert app._done.is_set() and app.loop.closed and all(b"\x03\xe9" in read_all(sock) for sock in clients)


def test_a_file_in_the_way_is_no_socket(tmp_path, monkeypatch):
    path = tmp_path / "hl.sock"
    path.write_text("data")
    with pytest.raises(OSError, match="no socket.*hl.sock"):
        hl.Engine(unix_socket=path).start()
    assert path.read_text() == "data"
    path.unlink()
    with running() as taken, pytest.raises(OSError):
        hl.Engine(unix_socket=path, port=int(taken.url.rpartition(":")[2])).start()
    with hl.Engine(unix_socket=path) as one:                # nothing was left behind
        path.unlink()
        with hl.Engine(unix_socket=path):
            one.stop()
            assert path.exists()                            # it is the other's now
    for fds, pid, error in (("abc", os.getpid(), hl.ConfigError), ("-1", os.getpid(), hl.ConfigError), ("abc", 1, None)):
        monkeypatch.setenv("LISTEN_FDS", fds)
        monkeypatch.setenv("LISTEN_PID", str(pid))
        with pytest.raises(error) if error else contextlib.nullcontext():
            with hl.Engine(port=0):
                pass


# -- backpressure and ends --

def test_who_reads_too_slowly_is_told_of_and_counted_once_a_second(caplog):
    with running(outbox_bytes=200_000, outbox_messages=50) as app:
        told = []
        app.on_core("slow_client")(lambda event: told.append((event.client.id, event.data)))
        slow = raw_websocket(app, small=True)
        slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}'))
        wait_until(lambda: app.topics.matching("t"))
        session, = app.sessions.values()
        for number in range(300):
            on_loop(app, app.publish, "t", "x" * 40_000)
        wait_until(lambda: told)
        assert told[0][0] == session.id and told[0][1]["dropped"] >= 1 and told[0][1]["backlog"] > 40_000
        assert app.drops["droppable"] > 100 and len(told) < 5 and caplog.text.count("reads too slowly") == len(told)
        assert app.report()["drops"]["by_topic"] == {"t": app.drops["droppable"]}
        assert app.metrics['horizon_outbox_dropped_total{class="droppable"}'] == app.drops["droppable"]
        assert app.metrics['horizon_outbox_dropped_total{class="latest"}'] == 0
        before = len(told)
        for _ in range(60):
            on_loop(app, app.publish, "t", "y" * 40_000, critical=True)
        wait_until(lambda: not app.sessions)
        assert len(told) > before
        slow.close()


def test_a_pulled_cable_is_noticed_by_the_system_too():
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no TCP_USER_TIMEOUT")
    with running(ping_s=7) as app, hl.connect(app.url):
        sock = next(iter(app.server.connections.values())).sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 21_000
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_while_the_server_drains_it_says_so():
    app = hl.Engine(port=0, handshake_s=1).start()
    ask = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    kept, silent = raw(app, ask), raw_websocket(app)
    assert kept.recv(1000).endswith(b"ok\n")
    stopping = threading.Thread(target=app.stop)
    stopping.start()
    assert silent.recv(100)[2:4] == b"\x03\xe9"                # 1001, and it does not answer
    kept.sendall(ask)
    answer = read_all(kept)
    assert answer.startswith(b"HTTP/1.1 503") and b"Connection: close" in answer
    with pytest.raises(OSError):
        raw(app)
    silent.close()
    stopping.join(5)
    assert app._state == "stopped"
    with hl.Engine(port=0) as app, raw(app, ask) as kept:        # who only keeps a connection delays nothing
        kept.recv(1000)
        began = time.monotonic()
        app.stop()
        assert time.monotonic() - began < 1 and kept.recv(10) == b""


@pytest.mark.parametrize("restart, code", [(False, 1001), (True, 1012)])
def test_nothing_critical_is_lost_at_the_end(restart, code):
    app = hl.Engine(port=0, outbox_bytes=0, outbox_messages=0).start()
    slow = raw_websocket(app, small=True)
    slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"t","id":1}'))
    wait_until(lambda: app.topics.matching("t"))
    for number in range(100):
        on_loop(app, app.publish, "t", "x" * 50_000, critical=True)
    stopping = threading.Thread(target=app.stop, kwargs={"restart": restart, "grace_s": 10})
    stopping.start()
    data = b""
    while piece := slow.recv(1 << 16):
        data += piece
        time.sleep(0.0005)
        if b"\x88" in data[-40:]:
            slow.sendall(masked(0x88, b"\x03\xe9"))
            break
    events = take("client", data, 0)
    assert [json.loads(each)["offset"] for each in events[1:-1]] == list(range(1, 101))
    assert events[-1].code == code
    stopping.join(10)
    slow.close()


def test_who_does_not_read_to_the_end_gets_grace_s_and_no_more():
    app = hl.Engine(port=0, outbox_bytes=0, outbox_messages=0).start()
    slow = raw_websocket(app, small=True)
    slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}'))
    wait_until(lambda: app.topics.matching("t"))
    on_loop(app, app.publish, "t", "x" * 20_000_000, critical=True)
    began = time.monotonic()
    app.stop(grace_s=0.5)
    assert 0.4 < time.monotonic() - began < 2
    slow.close()


# -- faults that must not matter --

def alive(client, seconds=1.0):
    """Whether a client gets its answer in time."""
    began = time.monotonic()
    client.send({"namespace": "system", "event": "ping", "data": began})
    while client.recv(seconds).get("data") != began:
        pass
    return time.monotonic() - began < seconds


def test_slowloris_gets_its_time_and_no_more():
    post = b"POST /pub/t HTTP/1.1\r\nHost: localhost\r\n"
    drips = [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1_000, b"\r\n" * 500,
             post + b"Content-Length: 1000\r\n\r\n" + b"x" * 900, post + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200]
    with running(handshake_s=0.3) as app, hl.connect(app.url) as other:
        socks = {raw(app): drip for drip in drips for _ in range(5)}
        for at in range(900):
            for sock, drip in list(socks.items()):
                try:
                    sock.sendall(drip[at:at + 1])
                except OSError:
                    del socks[sock]
            time.sleep(0.01)
            if len(app.server.connections) == 1:
                break
        assert at < 800 and alive(other)
        assert app.metrics['horizon_refused_total{reason="handshake_timeout"}'] == 20


def test_slow_frames_are_a_dead_peer_when_they_stop():
    with running(ping_s=0.2) as app, hl.connect(app.url) as other:
        sock = raw_websocket(app)
        frame = masked(0x81, b"x" * 20_000, b"\xfe\x4e\x20")
        for at in range(13):
            sock.sendall(frame[at:at + 1])
            time.sleep(0.05)                                # each byte is a sign of life
            assert alive(other)
        assert len(app.sessions) == 2
        wait_until(lambda: len(app.sessions) == 1 or not alive(other), 10)
        assert app.metrics['horizon_refused_total{reason="ping_timeout"}'] == 1
        sock.close()


def test_a_client_that_never_reads_delays_nobody():
    with running(tick_hz=50, outbox_bytes=100_000) as app:
        readers = [hl.connect(app.url) for _ in range(20)]
        for reader in readers:
            reader.subscribe("t")

        def round_trips():
            spent = []
            for _ in range(40):
                began = time.monotonic()
                on_loop(app, app.publish, "t", "x" * 20_000, critical=True)
                for reader in readers:
                    reader.recv(5)
                spent.append(time.monotonic() - began)
            return statistics.median(spent)
        before = round_trips()
        deaf = [raw_websocket(app, small=True) for _ in range(5)]
        for sock in deaf:
            sock.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}'))
        wait_until(lambda: len(app.topics.matching("t")) == 25)
        assert round_trips() < 3 * before + 0.05            # the exact figure is the bench's
        for _ in range(500):
            if len(app.sessions) == 20:
                break
            on_loop(app, app.publish, "t", "x" * 20_000, critical=True)
            for reader in readers:
                reader.recv(5)
        assert len(app.sessions) == 20
        for each in [*readers, *deaf]:
            each.close()


def test_half_a_pipeline_a_reset_and_a_half_close():
    with running() as app, hl.connect(app.url) as other:
        ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        silent = raw(app, ask * 2)
        assert silent.recv(1000).count(b"200 OK") >= 1
        for start in (UPGRADE + b"\r\n" + masked(0x82, b"", b"\xfe\xff\xff") + b"x" * 100, ask[:20], ask * 3):
            sock = raw(app, start)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()                                    # RST
        half = raw(app, ask)
        half.shutdown(socket.SHUT_WR)                       # it can still read
        assert read_all(half).endswith(b"ok\n")
        ws = raw_websocket(app)
        ws.shutdown(socket.SHUT_WR)
        ws.close()
        silent.close()
        wait_until(lambda: len(app.server.connections) == 1)
        assert alive(other)


def test_two_thousand_who_come_and_vanish_leave_nothing():
    with running() as app:
        descriptors = len(os.listdir("/proc/self/fd"))
        for round_ in range(20):
            socks = [raw(app, UPGRADE + b"\r\n" if number % 2 else UPGRADE[:number]) for number in range(100)]
            for sock in socks:
                sock.close()
        wait_until(lambda: app.server.accepted == 2_000 and not app.server.connections, 10)
        on_loop(app, app._check)
        assert not app.server._per_address and len(app.loop.selector.get_map()) == 2 and not app._waiting and not app._urgent
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_without_descriptors_it_keeps_serving_and_does_not_spin(tmp_path):
    (tmp_path / "app.py").write_text("import resource, horizon_lite as hl\napp = hl.Engine(port=0)\n"
                                     "app.on_core('server_started')(lambda event: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)))\n")
    with program("serve", os.fspath(tmp_path / "app.py")) as (process, url), hl.connect(url) as client:
        socks = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(30)]
        time.sleep(0.3)
        ticks = os.sysconf("SC_CLK_TCK")

        def cpu_s():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
            return (int(fields[11]) + int(fields[12])) / ticks
        before = cpu_s()
        time.sleep(0.5)
        assert cpu_s() - before < 0.15 and alive(client)
        for sock in socks:
            sock.close()

        def served():
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "/healthz", timeout=2) as answer:
                return answer.status == 200
        wait_until(served)


def test_a_handler_of_half_a_second_and_a_clock_that_jumps():
    now = [0]
    real = time.monotonic_ns
    with running() as app, hl.connect(app.url) as client:
        app.on_client("slow", "one")(lambda event: time.sleep(0.5))
        client.emit("slow", "one")
        assert alive(client, 3)
        app.loop.clock = lambda: real() + now[0]
        now[0] = 3 * 1_000_000_000                          # less than a ping: nothing happens
        assert alive(client, 3)
        now[0] = -3 * 1_000_000_000                         # backwards, as none should
        assert alive(client, 3) and app._ticker.dropped >= 0
        app.loop.clock = real


def test_clients_come_back_after_a_kill():
    port = free_port()
    count = int(100 * SOAK)

    def come_and_stay(number):
        with hl.connect(f"http://127.0.0.1:{port}", reconnect=30) as client:
            client.subscribe("t")
            ready.append(number)
            while not (message := client.recv(30)) or message.get("payload") != "second":
                assert message is not None, client.closed
            again.append(client.reconnects)
    ready, again = [], []
    with program("serve", "--port", str(port)) as (process, url):
        threads = [threading.Thread(target=come_and_stay, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(ready) == count, 20)
        process.kill()
        process.wait()
    with program("serve", "--port", str(port)) as (process, url), hl.connect(url) as speaker:
        deadline = time.monotonic() + 20
        while len(again) < count and time.monotonic() < deadline:
            speaker.publish("t", "second")
            time.sleep(0.1)
        assert again == [1] * count
        for thread in threads:
            thread.join(5)


def test_a_broadcast_is_compressed_once_for_all(monkeypatch):
    calls, squeeze = [], hl._squeeze
    monkeypatch.setattr(hl, "_squeeze", lambda deflater, payload: calls.append(len(payload)) or squeeze(deflater, payload))
    with running() as app:
        clients = [hl.connect(app.url, compress=number > 0) for number in range(5)]
        wait_until(lambda: app._present["data"] == 5)
        for payload in ("x" * 2_000, "short"):
            on_loop(app, app.broadcast, payload)
            assert [client.recv(5) for client in clients] == [payload] * 5
        assert calls == [2_002]
        on_loop(app, next(iter(app.sessions.values())).send, {"plain": "y" * 1_000})       # the one that offered nothing
        assert clients[0].recv(5)["plain"] and calls == [2_002]
        for client in clients:
            client.close()
    with running(compress=False) as app:
        assert b"Extensions" not in request(app, UPGRADE + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n" + masked(0x88))
    with running() as app:
        assert b"permessage-deflate; server_no" in request(app, UPGRADE + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n" + masked(0x88))


def test_a_client_that_sends_one_byte_at_a_time_is_understood():
    with running() as app:
        with raw(app) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in UPGRADE + b"\r\n" + masked(0x01, b'{"namespace":"system",') + masked(0x80, b'"event":"ping"}') + masked(0x88):
                sock.sendall(bytes((byte,)))
            answer = read_all(sock)
        assert b"101 Switching" in answer and b'"pong"' in answer and answer.endswith(b"\x88\x00")


def test_messages_of_sixteen_megabytes_are_echoed():
    size = 16 << 20
    with running(max_message_bytes=size, outbox_bytes=0) as app:
        app.websocket("/ws/echo")(lambda client, message: client.send(message))
        with hl.connect(app.url + "/ws/echo") as client:
            text = "\u20ac" * (size // 3)
            client.send(text)
            assert client.recv(20) == text


def test_many_messages_leave_memory_flat():
    count = int(20_000 * SOAK)
    with running(tick_hz=100) as app, hl.connect(app.url, protocol="proto") as client:
        client.subscribe("t")

        def burst(first):
            for number in range(first, first + 500):
                app.publish("t", number)
        gc.collect()
        blocks = []
        for first in range(0, count, 500):
            on_loop(app, burst, first)
            for number in range(500):
                client.recv(5)
            if first in (count // 4 // 500 * 500, count - 500):
                gc.collect()
                blocks.append(sys.getallocatedblocks())
        assert blocks[1] - blocks[0] < 2_000


def test_a_websocket_route_of_ones_own_echoes():
    with running(max_message_bytes=1 << 21) as app:
        @app.websocket("/ws/echo")
        def echo(client, message):
            client.send(message)
            if message == "bye":
                client.close(4000, "as you wish")
            if message == "fail":
                raise ValueError
        with hl.connect(app.url + "/ws/echo") as client:
            client.send(b"\0" * 1_000_000)
            assert client.recv(5) == b"\0" * 1_000_000
            for text in ("fail", "plain text", "bye"):
                client.send(text)
                assert client.recv(5) == text
            assert client.recv(5) is None and client.closed == hl.Close(4000, "as you wish")
        assert app.presence.online() == 0


def test_another_library_talks_to_the_server():
    pytest.importorskip("websockets", reason="pip install websockets")
    from websockets.sync.client import connect
    with running() as app, connect(app.url.replace("http", "ws") + "/ws/data", subprotocols=["horizon.json.v1"],
                                   compression=None, proxy=None) as client:
        assert client.subprotocol == "horizon.json.v1"
        client.send(["{\"namespace\":\"system\",", "\"event\":\"ping\",", "\"data\":\"\u20ac\"}"])    # in fragments
        assert json.loads(client.recv(5))["data"] == "\u20ac"
        assert client.ping().wait(5)
        client.close(1000, "bye")
        wait_until(lambda: not app.sessions)


# -- topics over the wire: history, conflation, batches, presence, HTML --

def test_a_client_that_comes_back_gets_what_it_missed_and_once():
    with running() as app:
        app.topic("chat.*", history=5)
        with hl.connect(app.url) as client, hl.connect(app.url, protocol="proto") as proto:
            for each in (client, proto):
                each.subscribe("chat.a")
                assert each.positions["chat.a"]["offset"] == 0
                each.subscribe("chat.*") if each is client else None
            for n in range(3):
                on_loop(app, app.publish, "chat.a", n)
            assert [client.recv(5)["payload"] for _ in range(3)] == [0, 1, 2]       # once, though it matches twice
            assert [proto.recv(5).topic_message.offset for _ in range(3)] == [1, 2, 3]
            positions, other = client.positions, proto.positions
            assert positions["chat.a"] == other["chat.a"] == {"epoch": app.topics.position("chat.a")["epoch"], "offset": 3}
        for n in range(3, 6):
            on_loop(app, app.publish, "chat.a" if n < 5 else "chat.b", n)
        with hl.connect(app.url) as client, hl.connect(app.url) as wild, hl.connect(app.url, protocol="proto") as proto:
            client.subscribe("chat.a", since=positions["chat.a"])
            wild.subscribe("chat.*", since=positions["chat.*"])
            proto.subscribe("chat.a", since=other["chat.a"])
            assert [client.recv(5)["offset"] for _ in range(2)] == [4, 5]
            assert [(m["topic"], m["payload"]) for m in (wild.recv(5) for _ in range(3))] == [("chat.a", 3), ("chat.a", 4), ("chat.b", 5)]
            assert [proto.recv(5).topic_message.offset for _ in range(2)] == [4, 5]
            for n in range(6, 12):
                on_loop(app, app.publish, "chat.a", n)
            for each in (client, wild, proto):      # what comes now comes once
                assert [getattr(m, "topic_message", None) or m["payload"] for m in [each.recv(5) for _ in range(6)]]
        with hl.connect(app.url) as client, hl.connect(app.url, protocol="proto") as proto:
            client.subscribe("chat.a", since=positions["chat.a"])       # five are kept: what came before is lost
            proto.subscribe("chat.a", since=other["chat.a"])
            on_loop(app, app.publish, "chat.a", "on")
            at = {"epoch": positions["chat.a"]["epoch"], "offset": 11}
            assert client.recv(5) == {"topic": "chat.a", "gap": True, **at} and client.recv(5)["payload"] == "on"
            gap = proto.recv(5).topic_message
            assert (gap.topic, gap.gap, gap.offset, gap.epoch) == ("chat.a", True, 11, at["epoch"])
            assert proto.recv(5).topic_message.payload == b'"on"'
            assert client.positions["chat.a"] == proto.positions["chat.a"] == {**at, "offset": 12}
            for since in (7, {"offset": 12}, {"epoch": "00", "offset": 1}):
                client.unsubscribe("chat.a")
                client.subscribe("chat.a", since=since)
            assert [message.get("gap", message.get("offset")) for message in (client.recv(5) for _ in range(6))] == [8, 9, 10, 11, 12, True]
            client.send({"action": "subscribe", "topic": "chat.*", "since": {"offset": 5}, "id": 1})
            answer = client.recv(5)
            assert (answer["id"], answer["error"]["code"]) == (1, "bad_request")


def test_every_offset_is_seen_once_however_often_the_socket_is_cut(rng):
    """The Python client by exact topic, by pattern, in both protocols, and Server-Sent Events."""
    total = int(200 * max(1.0, SOAK))
    with running(outbox_messages=50) as app:
        app.topic("t.*", history=10_000)
        seen = {name: [] for name in ("exact", "wild", "proto", "events")}
        done = threading.Event()

        def listen(name, topic, protocol):
            with hl.connect(app.url, protocol=protocol, reconnect=30.0) as client:
                client.subscribe(topic)
                ready.release()
                while len(seen[name]) < total:
                    message = client.recv(20)
                    message = message.topic_message.to_dict() if protocol == "proto" else message
                    assert not message.get("gap"), message
                    seen[name].append((message["topic"], message["offset"]))

        def read_events():
            mark, events = b"", None
            while len(seen["events"]) < total:
                with contextlib.suppress(AssertionError, OSError):      # cut, perhaps before its first byte
                    events = Events(app, "t.*", mark)
                    ready.release()
                    while len(seen["events"]) < total:
                        message = events.next()[1]
                        seen["events"].append((message["topic"], message["offset"]))
                if events is not None:
                    mark = f"Last-Event-ID: {events.last_id}\r\n".encode() if events.last_id else mark
                    events.sock.close()
                events = None

        ready = threading.Semaphore(0)
        threads = [threading.Thread(target=listen, args=args) for args in (
            ("exact", "t.a", "json"), ("wild", "t.*", "json"), ("proto", "t.*", "proto"))] + [threading.Thread(target=read_events)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert ready.acquire(timeout=5)
        wait_until(lambda: len(app.sessions) == 4)

        def step():
            if published[0] < total:
                for _ in range(rng.randrange(5)):
                    if published[0] < total:
                        published[0] += 1
                        app.publish("t.a", "x" * rng.randrange(2000), critical=rng.random() < .05)
            if rng.random() < .3 and app.sessions:
                rng.choice(list(app.sessions.values())).connection.abort("cut")
                cuts[0] += 1
            if published[0] < total:
                app.loop.call_later(rng.choice([0, .003, .03]), step)

        published, cuts = [0], [0]
        on_loop(app, step)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), {name: len(each) for name, each in seen.items()}
        for name, got in seen.items():
            odd = [pair for pair in zip(got, got[1:]) if pair[1][1] != pair[0][1] + 1]
            assert not odd and got[0] == ("t.a", 1) and len(got) == total, (name, odd, got[:3])
        assert app.drops.total() == 0 and cuts[0] > 10


def test_events_resume_where_they_were():
    with running() as app:
        app.topic("t", history=3)
        app.topic("v", replay="last")
        first = Events(app, "t")
        begin = first._until(b"\n\n").decode()              # an id without data: before the first message
        assert re.fullmatch(r":\nid: [0-9a-f]{8}:\d+", begin)
        begin = begin[6:]
        for n in range(3):
            on_loop(app, app.publish, "t", n)
        marks = [first.next()[0] for _ in range(3)]
        again = Events(app, "t", f"Last-Event-ID: {marks[0]}\r\n".encode())
        assert [again.next()[1]["payload"] for _ in range(2)] == [1, 2]
        from_begin = Events(app, "t", f"Last-Event-ID: {begin}\r\n".encode())
        assert [from_begin.next()[1]["payload"] for _ in range(3)] == [0, 1, 2]
        on_loop(app, app.publish, "t", 3)
        for mark in (begin, "00000000:1", "nonsense", "5"):
            late = Events(app, "t", f"Last-Event-ID: {mark}\r\n".encode())
            number, message = late.next()
            assert message["gap"] and message["offset"] == 4, mark
            on_loop(app, app.publish, "v", mark)
            on_loop(app, app.publish, "t", 4)
            assert late.next()[1]["payload"] == 4
            after = Events(app, "t", f"Last-Event-ID: {number}\r\n".encode())       # the gap's id is a place, too
            assert after.next()[1]["payload"] == 4
            app.topics._topics["t"].offset -= 1
            app.topics._topics["t"].history.pop()
            app.topics._topics["t"].kept = sum(each.size for each in app.topics._topics["t"].history)
            app.topics._kept = sum(each.kept for each in app.topics._topics.values())
        last = Events(app, "v", b"Last-Event-ID: nonsense\r\n")
        assert last.next()[1]["gap"] and last.next()[1]["payload"] == "5"


def test_who_asks_for_less_gets_the_newest_at_its_rate():
    with running(tick_hz=200) as app, hl.connect(app.url) as fast, hl.connect(app.url) as slow, hl.connect(app.url, protocol="proto") as proto:
        fast.subscribe("v.*")
        slow.subscribe("v.*", rate=5)
        proto.subscribe("v.*", rate=5)
        for n in range(200):
            on_loop(app, app.publish, "v.a", n)
            time.sleep(.003)
        assert [fast.recv(5)["payload"] for _ in range(200)] == list(range(200))
        time.sleep(.25)
        for client, value in ((slow, lambda m: m["payload"]), (proto, lambda m: int(m.topic_message.payload))):
            got = []
            with contextlib.suppress(TimeoutError):
                while True:
                    got.append(value(client.recv(.05)))
            assert got[0] < 10 and got[-1] == 199 and 3 <= len(got) <= 12 and got == sorted(got), got
        slow.subscribe("v.*", rate=100)                 # asked again with another rate: that one counts
        assert len(app.topics.matching("v.a")) == 3
        for rate in (0.0001, 0, -1, "fast", True):
            slow.send({"action": "subscribe", "topic": "v.*", "rate": rate, "id": 1})
            assert slow.recv(5)["error"]["code"] == "bad_request"


def test_without_ticks_conflated_messages_still_come():
    with running(tick_hz=0) as app, hl.connect(app.url) as client:
        client.subscribe("v", rate=10)
        on_loop(app, app.publish, "v", 1)
        on_loop(app, app.publish, "v", 2)
        on_loop(app, app.publish, "v", 3)
        assert [client.recv(5)["payload"], client.recv(5)["payload"]] == [1, 3]


def test_one_message_reaches_everybody_in_their_form_and_is_rendered_once_per_form():
    with running(tick_hz=20) as app:
        got, rendered = [], []
        app.subscribe("news")(lambda message: got.append((message.payload, message.offset)))

        @app.html("news")
        def news(message):
            rendered.append(message.payload)
            return hl.html('<p id="news">{m}</p>', m=message.payload["text"])

        with contextlib.ExitStack() as stack:
            plain = [stack.enter_context(hl.connect(app.url + path)) for path in ("/ws/data", "/app/ws/data")]
            proto = [stack.enter_context(hl.connect(app.url, protocol="proto")) for _ in range(3)]
            pages = [stack.enter_context(hl.connect(app.url + path)) for path in ("/ws/html", "/app/ws/html", "/ws/html")]
            events = [Events(app, "news") for _ in range(2)]
            for client in (*plain, *proto):
                client.subscribe("news")
            wait_until(lambda: len(app.sessions) == 10)
            before = dict(app.renders)
            on_loop(app, lambda: [app.publish("news", {"text": text}) for text in ("old", "1 < 2")])
            for client in plain:
                assert [client.recv(5)["payload"]["text"] for _ in range(2)] == ["old", "1 < 2"]
            for client in proto:
                assert [json.loads(client.recv(5).topic_message.payload)["text"] for _ in range(2)] == ["old", "1 < 2"]
            for client in pages:
                assert client.recv(5) == '<p id="news">1 &lt; 2</p>'
            for each in events:
                assert [each.next()[1]["offset"] for _ in range(2)] == [1, 2]
            assert got == [({"text": "old"}, 1), ({"text": "1 < 2"}, 2)] and rendered == [{"text": "1 < 2"}]
            forms = {form: count - before.get(form, 0) for form, count in app.renders.items()}
            assert forms == {"horizon.json.v1": 1, "horizon.proto.v1": 1, "html": 1, "events": 1}
            assert app.metrics['horizon_renders_total{form="html"}'] == app.renders["html"]


def test_broadcasts_and_sends_go_to_one_endpoint_or_one_user():
    with running() as app, contextlib.ExitStack() as stack:
        data = [stack.enter_context(hl.connect(app.url)) for _ in range(2)]
        page = [stack.enter_context(hl.connect(app.url + "/ws/html")) for _ in range(2)]
        wait_until(lambda: len(app.sessions) == 4)
        first = {form: next(each for each in app.sessions.values() if each.endpoint == form) for form in ("data", "html")}
        for session in first.values():
            on_loop(app, setattr, session, "user", "ada")
        assert on_loop(app, app.broadcast, {"n": 1}) == 2 and on_loop(app, app.broadcast, "<p id=a>1</p>", endpoint="html") == 2
        assert on_loop(app, app.send, "ada", {"n": 2}) == 1 and on_loop(app, app.send, "ada", hl.html("<p id=a>{n}</p>", n="<"), endpoint="html") == 1
        assert on_loop(app, app.send, first["html"], "<p id=a>3</p>") == 1 and on_loop(app, app.send, first["html"].id, {"n": 4}) == 1
        assert [data[0].recv(5), data[0].recv(5), data[1].recv(5)] == [{"n": 1}, {"n": 2}, {"n": 1}]
        texts = [page[0].recv(5)]
        while len("".join(map(str, texts))) < 50:
            texts.append(page[0].recv(5))
        assert "\n".join(json.dumps(each, separators=(",", ":")) if isinstance(each, dict) else each for each in texts) == (
            '<p id=a>1</p>\n<p id=a>&lt;</p>\n<p id=a>3</p>\n{"n":4}')
        assert page[1].recv(5) == "<p id=a>1</p>"
        for call in (functools.partial(app.broadcast, "x", endpoint="web"), functools.partial(app.send, "ada", "x", endpoint=None),
                     functools.partial(app.broadcast, {"n": 1}, endpoint="html"), functools.partial(app.send, first["data"], {1})):
            with pytest.raises(hl.UsageError):
                on_loop(app, call)
        count = app.renders["html"]
        on_loop(app, app.broadcast, b"<p id=b></p>", endpoint="html")
        assert [each.recv(5) for each in page] == ["<p id=b></p>"] * 2
        assert app.renders["html"] == count + 1


def test_fragments_are_sent_when_they_differ_and_to_whom_they_may():
    with running() as app:
        app.allow("secret", subscribe="ann")
        app.allow("presence", subscribe=True)
        app.allow("room.*", subscribe=True)
        state, calls = {"n": 0}, []

        @app.html("secret")
        def secret():
            return "<p id=secret></p>"

        @app.html("room.a")
        def room():
            calls.append(1)
            return hl.html("<p id=room>{n}</p>", n=state["n"] // 10)

        @app.html("room.*")
        def rooms(message):
            if message.payload == "boom":
                raise ValueError("boom")
            return hl.html("<p id={t}>{n}</p>", t=message.topic.replace(".", "-"), n=message.payload)

        with hl.connect(app.url + "/ws/html") as page, hl.connect(app.url + "/ws/html?topics=room.a,unknown,a..b") as one:
            assert page.recv(5) == "<p id=room>0</p>"
            first = [one.recv(5) for _ in range(3)]
            assert "<p id=room>0</p>" in first
            assert sorted(m["error"]["code"] for m in first if isinstance(m, dict)) == ["bad_topic", "forbidden"]
            count = len(calls)
            for _ in range(3):
                on_loop(app, app.publish, "room.a", "x")
            assert page.recv(5) == "<p id=room-a>x</p>"
            assert len(calls) > count and app.unchanged >= 1
            on_loop(app, app.publish, "room.b", "<i>")
            assert page.recv(5) == "<p id=room-b>&lt;i&gt;</p>"
            on_loop(app, app.publish, "room.c", "boom")
            state["n"] = 10
            on_loop(app, app.publish, "room.a", "y")
            assert [page.recv(5), page.recv(5)] == ["<p id=room>1</p>", "<p id=room-a>y</p>"] and one.recv(5) == "<p id=room>1</p>"
            assert app.metrics["horizon_html_errors_total"] == 1 and app.metrics["horizon_html_unchanged_total"] == app.unchanged
            one.send({"action": "subscribe", "topic": "secret", "id": 1})
            assert one.recv(5)["error"]["code"] == "forbidden"
            one.send({"action": "subscribe", "topic": "presence", "id": 2})
            answer = one.recv(5)["error"]
            assert answer["code"] == "no_fragment" and "room.a" in answer["message"]
            one.unsubscribe("room.a")
            one.subscribe("room.*")                     # gets all there are
            assert {one.recv(5), one.recv(5)} == {"<p id=room-a>y</p>", "<p id=room-b>&lt;i&gt;</p>"}
        with hl.connect(app.url + "/ws/html?topics=room.d") as page:       # one room of a pattern
            on_loop(app, lambda: [app.publish(f"room.{name}", name) for name in "ad"])
            assert page.recv(5) == "<p id=room-d>d</p>" and list(app._made_views) == ["room.d"]
            with pytest.raises(TimeoutError):
                page.recv(.05)
        wait_until(lambda: not app.sessions)
        assert list(app._views) == ["secret", "room.a", "room.*"] and not app._made_views
        assert not app.topics.matching("room.a") and not any(view.shown for views in app._views.values() for view in views)


def test_a_page_that_reads_slowly_gets_the_newest_fragment():
    with running(outbox_bytes=1 << 16) as app:
        value = [0]
        app.html("big")(lambda: f"<p id=big>{value[0]}{'x' * 50_000}</p>")
        app.html("small")(lambda: f"<p id=small>{value[0]}</p>")
        page = raw_websocket(app, path=b"/ws/html", small=True)
        time.sleep(.1)
        session, = app.sessions.values()
        while not session.connection.unsent:
            value[0] += 1
            on_loop(app, app.publish, "big", 1)
            on_loop(app, app._tick_once)
        for _ in range(10):
            value[0] += 1
            on_loop(app, lambda: [app.publish(name, 1) for name in ("big", "small")])
            on_loop(app, app._tick_once)
        assert len(session.outbox.items) <= 2
        wanted = f"<p id=small>{value[0]}</p>".encode()
        page.settimeout(5)
        data = b""
        while wanted not in data or f"<p id=big>{value[0]}x".encode() not in data:
            data = data[-200_000:] + page.recv(1 << 20)
        page.close()


def test_handlers_by_batches_run_here_in_threads_and_on_asyncio():
    with running() as app:
        got = {"sync": [], "thread": [], "async": [], "waiting": []}

        @app.on_client("game", "fire", batch=4, wait_ms=30)
        def here(events):
            got["sync"].append([event.data for event in events])
            if events[0].data == 0:
                raise ValueError("boom")

        @app.on_client("game", "fire", batch=True, wait_ms=0, blocking=True)
        def thread(events):
            assert threading.current_thread() is not app._thread and not running_now.locked()
            with running_now:
                time.sleep(.01)
            got["thread"].append([event.data for event in events])

        @app.on_client("game", "fire", batch=8, wait_ms=5)
        async def coroutine(events):
            got["async"].append([event.data for event in events])
            with pytest.raises(hl.StateError):
                events[0].cancel()

        @app.on_client("game", "fire", batch=1000, wait_ms=10**6, blocking=True)
        def at_the_end(events):
            time.sleep(.1)
            got["waiting"].append([event.data for event in events])

        running_now = threading.Lock()
        app.on_client("game", "fire", filter=lambda event: event.data == 3)(lambda event: event.cancel("three"))
        with hl.connect(app.url) as client:
            for n in range(6):
                client.send({"namespace": "game", "event": "fire", "data": n, "id": n})
            answers = [client.recv(5) for _ in range(6)]
            assert [answer.get("ok") for answer in answers] == [True, True, True, None, True, True]
            wanted = [0, 1, 2, 4, 5]                    # what was cancelled is not among them
            for name in ("sync", "thread", "async"):
                wait_until(lambda: [n for each in got[name] for n in each] == wanted)
            assert got["sync"] == [[0, 1, 2, 4], [5]]
            statistics = app.bus.stats()["client:game:fire"]["handlers"]
            assert next(each for each in statistics if each["name"].endswith(".here"))["errors"] == 1
            assert not got["waiting"]
    assert got["waiting"] == [wanted]                   # stop() waits for it
    assert app.metrics["horizon_batch_dropped_total"] == 0
    bus = hl.Bus()
    with pytest.raises(hl.UsageError):
        bus.on("a:b", print, batch=3)
    bus = hl.Bus(spawn=print)
    for bad in ({"batch": -1}, {"batch": "3"}, {"batch": 3, "wait_ms": -1}, {"batch": 3, "once": True}):
        with pytest.raises(hl.UsageError):
            bus.on("a:b", print, **bad)


def test_a_batch_that_is_too_slow_drops_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(hl, "_MAX_PENDING", 10)
    with running() as app:
        gate = threading.Event()
        handler = app.on("client:game:fire", lambda events: gate.wait(5), batch=2, wait_ms=0, blocking=True)
        for n in range(20):
            on_loop(app, app.emit_client, "game", "fire", n)
        on_loop(app, app._check_alerts)
        assert app.report()["alerts"]
        dropped = app.metrics["horizon_batch_dropped_total"]
        assert dropped in (8, 9) and "alert" in caplog.text         # ten wait, one or two are under way
        on_loop(app, handler.remove)
        gate.set()
        wait_until(lambda: not app._worker._batchers, 5)
        assert app.metrics["horizon_batch_dropped_total"] == dropped


def test_presence_of_a_user_with_several_connections():
    with running(presence_debounce_s=.3) as app, hl.connect(app.url) as watcher:
        @app.on_core("player_connected")
        def name(event):
            event.client.user = "ada"
        watcher.subscribe("presence")
        watcher.subscribe("presence.changes")
        me = watcher.recv(5)["users"][0]
        while len(app.presence._changed):
            time.sleep(.01)
        with hl.connect(app.url), hl.connect(app.url + "/ws/html"):
            update = next(m for m in iter(lambda: watcher.recv(5), None) if m.get("users") and "ada" in m["users"])
            assert update == {"type": "presence_update", "users": ["ada", me], "joined": ["ada"], "left": []}
            code, head, body = get(app, "/presence")
            assert json.loads(body) == {"count": 2, "users": ["ada", me], "states": {}}
            assert len(json.loads(get(app, "/presence/ada")[2])["connections"]) == 2
        with hl.connect(app.url):                       # a reload
            time.sleep(.5)
            assert app.presence.users() == ["ada", me]
        assert app.presence.users() == ["ada", me]
        wait_until(lambda: app.presence.users() == [me])
        got = []
        while sum("ada" in each["left"] for each in got) < 2:
            got.append(watcher.recv(5))
        assert {"type": "presence_update", "joined": ["ada"], "left": []} in got
        assert [each for each in got if each["left"]] == [
            {"type": "presence_update", "users": [me], "joined": [], "left": ["ada"]},
            {"type": "presence_update", "joined": [], "left": ["ada"]}]
        assert get(app, "/presence/ada")[0] == 404 and json.loads(get(app, "/presence/ada")[2])["online"] is False


def test_heartbeats_are_kept_or_the_client_is_gone():
    with running() as app, hl.connect(app.url) as client, hl.connect(app.url) as other:
        def beat(data, id=1):
            client.send({"namespace": "system", "event": "heartbeat", "data": data, "id": id})
            return client.recv(5)
        user = json.loads(get(app, "/presence")[2])["users"]
        assert beat({"interval_s": .15, "multiplier": 2, "state": {"status": "away"}, "metadata": {"kind": "mobile"}})["ok"]
        mine = next(each for each in app.sessions.values() if each.beats).user
        about = json.loads(get(app, f"/presence/{mine}")[2])
        assert about["state"] == {"status": "away"} and about["connections"][0]["metadata"] == {"kind": "mobile"}
        assert json.loads(get(app, "/presence")[2])["states"] == {mine: {"status": "away"}}
        for _ in range(4):                              # any message is a sign of life
            client.send({"namespace": "system", "event": "ping"})
            client.recv(5)
            time.sleep(.1)
            on_loop(app, app.presence.sweep)            # as each second
            assert app.presence.users() == user
        time.sleep(.35)
        on_loop(app, app.presence.sweep)
        assert mine not in app.presence.users()
        assert app.metrics["horizon_presence_swept_total"] == 1 and len(app.sessions) == 2
        client.send({"namespace": "system", "event": "ping"})
        wait_until(lambda: mine in app.presence.users(), 5)         # there it is again
        client.recv(5)
        for bad in (5, {"interval_s": "1"}, {"interval_s": -1}, {"multiplier": 0}, {"interval_s": True}, {"what": 1},
                    {"state": "x" * 2000}, {"metadata": ["x" * 2000]}, {"interval_s": 10**400}):
            assert beat(bad, 7)["error"]["code"] == "bad_request", bad
        assert beat(None)["ok"] and beat({"state": None})["ok"] and app.presence.state(mine) is None


def test_a_repeated_publication_is_acknowledged_and_not_delivered():
    with running(dedup_ttl_s=.5) as app, hl.connect(app.url) as client, hl.connect(app.url, protocol="proto") as proto:
        client.subscribe("t")
        for each in (client, proto):
            each.publish("t", 1, msg_id="m1")
            each.publish("t", 1, msg_id="m1")
        ask = urllib.request.Request(app.url + "/pub/t?msg_id=m1", b"1", method="POST")
        with urllib.request.urlopen(ask) as answer:
            assert (answer.status, json.load(answer)) == (202, {"delivered": 0})
        assert client.recv(5)["offset"] == 1 and app.metrics["horizon_topics_duplicates_total"] == 4
        client.publish("t", 2)
        assert client.recv(5)["offset"] == 2
        time.sleep(.6)
        client.publish("t", 3, msg_id="m1")
        assert client.recv(5)["payload"] == 3
        client.send({"action": "publish", "topic": "t", "payload": 1, "msg_id": ["x"], "id": 9})
        assert client.recv(5)["error"]["code"] == "bad_request"


def test_clients_publish_to_patterns_within_bounds():
    with running(burst=3, max_messages_per_s=0) as app, hl.connect(app.url) as client:
        for name in ("a.x", "a.y", "system.own", "b.1", "b.2", "b.3", "b.4"):
            on_loop(app, app.topics.subscribe, name, lambda message: got.append(message.topic))
        got = []
        client.publish("a.*", 1)
        client.publish("*.x", 1)
        assert got == ["a.x", "a.y", "a.x"]
        with pytest.raises(hl.UsageError, match="too_many_topics"):
            client.publish("b.*", 1)
        client.publish("*.own", 1)
        assert len(got) == 3                            # nobody publishes under system
        app.allow("a.x", publish=True)
        with pytest.raises(hl.UsageError, match="forbidden"):
            client.publish("a.*", 1)


def test_a_rendering_that_fails_is_its_own_sessions_trouble(caplog):
    with running() as app, hl.connect(app.url + "/ws/html") as page, hl.connect(app.url) as client:
        client.subscribe("t")
        broken, other = sorted(app.sessions.values(), key=lambda each: each.endpoint != "html")
        on_loop(app, lambda: (broken.put(app.movement.snapshot()), app.publish("t", 1)))     # movement has no HTML
        assert client.recv(5)["payload"] == 1 and "can't be rendered" in caplog.text
        on_loop(app, app.broadcast, "<p></p>", endpoint="html")
        assert page.recv(5) == "<p></p>"
        with pytest.raises(hl.UsageError):
            app.html("world.moves")
        with pytest.raises(hl.UsageError, match="own"):
            app.topic("presence", history=5)


def test_json_on_the_html_endpoint_is_nothing_a_browser_would_show():
    with running() as app, contextlib.closing(raw_websocket(app, path=b"/ws/html")) as page:
        session, = app.sessions.values()
        on_loop(app, lambda: (app.broadcast("<p>1</p>", endpoint="html"), app.broadcast("<p>2</p>", endpoint="html"),
                              app.send(session, {"text": "<img src=x onerror=boom> & co"}), app.send(session, ["<b>"]),
                              app.broadcast("<p>3</p>", endpoint="html")))
        page.sendall(masked(0x81, json.dumps({"action": "<u>", "id": "<i>"}).encode()))
        got = b""
        while b"u003cu" not in got and b"unknown_action" not in got or b"<p>3" not in got:
            got += page.recv(65536)
        frames = [each for each in take("client", got) if isinstance(each, str)]
        assert frames[:2] == ["<p>1</p>", "<p>2</p>"] and all("<" not in each and "&" not in each for each in frames if each[0] in "[{")
        assert [json.loads(each) for each in frames[2:4]] == [{"text": "<img src=x onerror=boom> & co"}, ["<b>"]]
        assert json.loads(next(each for each in frames if "error" in each and "action" in each))["id"] == "<i>"


def test_fragments_over_the_outboxs_bound_all_arrive():
    with running(outbox_messages=8, outbox_bytes=1 << 18) as app:
        state = {"n": 0}
        for n in range(40):
            app.html(f"t.{n}")(lambda n=n: f"<p id=p{n}>{state['n']}{'x' * 20_000 * (n % 2)}</p>")
        def shown(page, value):
            seen = set()
            while len(seen) < 40:
                seen |= set(re.findall(rf"<p id=p(\d+)>{value}[x<]", page.recv(5)))
        with hl.connect(app.url + "/ws/html") as page:          # one who reads gets all, at once and later
            shown(page, 0)
            state["n"] = 1
            on_loop(app, app.publish, "t.*", 1)
            on_loop(app, lambda: [app.publish(f"t.{n}", 1) for n in range(40)])
            shown(page, 1)
        slow = raw_websocket(app, path=b"/ws/html", small=True)     # and who does not, in the end the newest
        for value in range(2, 12):
            state["n"] = value
            on_loop(app, lambda: [app.publish(f"t.{n}", 1) for n in range(40)])
            time.sleep(.03)
        session, = app.sessions.values()
        assert session.connection.unsent and session.outbox.owed
        slow.settimeout(5)
        last, data = {}, b""
        while set(last.values()) != {b"11"} or len(last) < 40:
            data = data[-30_000:] + slow.recv(1 << 16)
            last |= dict(re.findall(rb"<p id=p(\d+)>(\d+)[x<]", data))
        slow.close()


def test_a_slow_reader_of_kept_topics_is_told_of_its_gap():
    with running(outbox_messages=20) as app:
        app.topic("t", history=10)
        slow = raw_websocket(app, small=True)
        slow.sendall(masked(0x81, b'{"action":"subscribe","topic":"t"}'))
        wait_until(lambda: app.topics.matching("t"))
        session, = app.sessions.values()
        while not session.connection.unsent:
            on_loop(app, app.publish, "t", "x" * 60_000)
        for n in range(200):
            on_loop(app, app.publish, "t", n)
        wait_until(lambda: app.drops["droppable"] > 100)
        data = b""
        while b'"gap":true' not in data:
            data = data[-1000:] + slow.recv(1 << 20)
        on_loop(app, app.publish, "t", "last")
        while b'"last"' not in data:
            data += slow.recv(1 << 20)
        gap = json.loads(re.search(rb'{"topic":"t","gap":true[^}]*}', data)[0])
        last = json.loads(re.search(rb'{"topic":"t","payload":"last"[^}]*}', data)[0])
        assert last["offset"] == gap["offset"] + 1
        slow.close()


def test_who_is_closed_while_it_subscribes_leaves_nothing():
    with running() as app:
        app.html("page")(lambda: "<p></p>")
        close = lambda event: [each.close() for each in app.sessions.values()]
        app.on_core("topic.occupied")(close)
        with hl.connect(app.url) as client:
            client.send({"action": "subscribe", "topic": "t"})
            assert client.recv(5) is None
        with hl.connect(app.url + "/ws/html") as client:
            assert client.recv(5) is None
        app.on_core("player_connected")(lambda event: event.client.close())
        for _ in range(5):
            with hl.connect(app.url + "/ws/html") as client:
                assert client.recv(5) is None
        wait_until(lambda: not app.sessions)
        on_loop(app, app.topics._check)


def test_loops_and_costly_requests_are_told_and_charged():
    with running(max_messages_per_s=120, burst=60) as app, hl.connect(app.url) as client:
        app.subscribe("ping")(lambda message: app.publish("pong", 1))
        app.subscribe("pong")(lambda message: app.publish("ping", 1))
        app.on_client("a", "b")(lambda event: app.publish("ping", 1))
        for message in ({"action": "publish", "topic": "ping"}, {"namespace": "a", "event": "b"}):
            client.send({**message, "id": 7})
            answer = client.recv(5)
            assert (answer["id"], answer["error"]["code"]) == (7, "publish_loop")
        assert app.metrics["horizon_topics_loops_total"] == 2 == app.metrics['horizon_requests_refused_total{code="publish_loop"}']
        for n in range(50):
            on_loop(app, app.topics.subscribe, f"x.{n}", lambda message: None)
        with raw(app, b"POST /pub/ping HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nConnection: close\r\n\r\n1") as sock:
            assert b" 400 " in read_all(sock)
        for since in ({"epoch": "x", "offset": 10**30}, {"epoch": app.topics._epoch, "seq": 10**30}):
            client.send({"action": "subscribe", "topic": "t", "since": since, "id": 3})
            assert client.recv(5).get("id", 3) == 3
        ask = b"POST /pub/x.> HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"
        with raw(app, ask * 3) as sock:
            answers = b""
            while answers.count(b"HTTP/1.1") < 2:
                answers += sock.recv(65536)
        assert answers.count(b" 202 ") == 1 and b" 429 " in answers      # fifty topics are fifty messages


def test_a_rate_can_be_changed_and_a_gap_is_heard_in_spite_of_it():
    with running() as app, hl.connect(app.url) as client:
        app.topic("v", replay="last")
        client.subscribe("v", rate=0.1)
        for n in range(3):
            on_loop(app, app.publish, "v", n)
            time.sleep(.03)
        assert client.recv(5)["payload"] == 0
        client.subscribe("v")                           # what was held comes, and from here on everything
        assert client.recv(5)["payload"] == 2
        for n in range(3, 6):
            on_loop(app, app.publish, "v", n)
            assert client.recv(5)["payload"] == n
        client.subscribe("v", rate=0.1, since={"epoch": "other", "offset": 1})
        got = [client.recv(5), client.recv(5)]
        assert got[0]["gap"] and got[1]["payload"] == 5


def test_a_newcomer_to_presence_gets_all_states_also_those_who_come_back():
    with running(presence_debounce_s=.1) as app, hl.connect(app.url) as one:
        one.send({"namespace": "system", "event": "heartbeat", "data": {"interval_s": .1, "multiplier": 2, "state": "away", "metadata": 5}, "id": 1})
        assert one.recv(5)["ok"]
        mine, = app.presence.users()
        time.sleep(.2)
        with hl.connect(app.url) as two:
            two.subscribe("presence")                   # in the tick of its own joining, or after it
            assert two.recv(5)["states"] == {mine: "away"}
        time.sleep(.3)
        on_loop(app, app.presence.sweep)
        wait_until(lambda: mine not in app.presence.users())
        one.send({"namespace": "system", "event": "heartbeat", "id": 2})
        assert one.recv(5)["ok"]
        assert app.presence.connections(mine)[0]["metadata"] == 5
        time.sleep(.3)
        on_loop(app, app.presence.sweep)
        wait_until(lambda: mine not in app.presence.users())        # its promise still counts


def test_settings_given_to_the_command_reach_every_part(tmp_path):
    app = hl.Engine(port=0, batch_size=20, cache_ttl_s=30)      # as prod has it, but said
    app.configure(profile="dev")
    assert (app.config.batch_size, app.config.cache_ttl_s, app.config.batch_wait_ms) == (20, 30, 10)
    app = hl.Engine(port=0, batch_size=7)
    app.configure(profile="high-scale", cache_entries=5, presence_debounce_s=0, dedup_ttl_s=1, outbox_messages=9)
    assert (app.config.log_level, app.config.max_connections, app.config.batch_size, app.config.port) == ("warn", 50_000, 7, 0)
    assert (app.fragments.max_entries, app.fragments.ttl_s, app.presence.debounce_ns, app.topics.dedup_ns) == (5, 60, 0, 10**9)
    assert (app.topics.max_batch, app._worker.batch_size, app._worker.wait_ms, app.server.limits.max_connections) == (9, 7, 2, 50_000)
    app.configure(profile="dev")
    assert (app.config.log_level, app.config.max_connections, app.config.cache_entries) == ("debug", 10_000, 5)
    assert app.bus._mask == 0                           # every call is timed
    with pytest.raises(hl.ConfigError, match="profile"):
        app.configure(profle="dev")
    app.stop()


def send_leavers_away(app):
    for session in list(app.sessions.values()):
        session.close() if session.user == "leaver" else None


def test_views_with_defaults_failures_and_visitors_who_leave():
    with running() as app:
        broken = [True]
        for room in ("a", "b"):
            @app.html(f"room.{room}")
            def named(room=room):
                return f"<p id={room}></p>"

        @app.html("late")
        def late():
            if broken[0]:
                raise ValueError("not yet")
            return "<p id=late></p>"

        @app.html("bye")
        def bye():
            send_leavers_away(app)
            return "<p id=bye></p>"
        with hl.connect(app.url + "/ws/html?topics=room.a,late") as first:
            assert first.recv(5) == "<p id=a></p>"
            broken[0] = False
            with hl.connect(app.url + "/ws/html?topics=late") as second:     # tried again for who comes later
                assert second.recv(5) == "<p id=late></p>"
        with hl.connect(app.url + "/ws/html?topics=bye") as leaver:
            leaver.recv(5)
            on_loop(app, lambda: [setattr(each, "user", "leaver") for each in app.sessions.values()])
            on_loop(app, app.publish, "bye", 1)
            assert leaver.recv(5) is None
        wait_until(lambda: not app.sessions)
        assert not any(view.shown or view.audience for views in app._views.values() for view in views)


def test_newcomers_to_a_view_cost_little_and_starve_nobody():
    with running(max_messages_per_s=120, burst=60) as app:
        fails = [True]

        @app.html("s.*")
        def slow(message):
            time.sleep(.002)
            return f"<p id={message.topic[2:]}>{message.payload}</p>"

        @app.html("f")
        def failing():
            if fails[0]:
                raise ValueError("not yet")
            return "<p id=f></p>"

        @app.html("who")
        def sends_away():
            send_leavers_away(app)
            return "<p id=who></p>"
        app.topic("s.*", history=1)
        on_loop(app, lambda: [app.publish(f"s.{n}", 0) for n in range(100)])
        pages = []
        for _ in range(3):                              # rendering is the server's own cost
            pages.append(hl.connect(app.url + "/ws/html?topics=s.*,f,s.1"))
        for page in pages:
            assert {page.recv(5) for _ in range(101)} >= {f"<p id={n}>0</p>" for n in range(100)}
        late = hl.connect(app.url + "/ws/html?topics=f")
        wait_until(lambda: len(app.sessions) == 4)

        def in_one_tick():
            fails[0] = False
            app.publish("s.1", "new")
            session = next(each for each in app.sessions.values() if "s.*" not in each.subscriptions)
            app._act("subscribe", session, "s.*", {})
        on_loop(app, in_one_tick)
        on_loop(app, app.publish, "f", 1)
        for page in (*pages, late):                     # who looked before gets it, too
            seen = set()
            while not seen >= {"<p id=1>new</p>", "<p id=f></p>"}:
                seen.add(page.recv(5))
        leaver = hl.connect(app.url + "/ws/html?topics=who")
        leaver.recv(5)
        on_loop(app, lambda: [setattr(each, "user", "leaver") for each in app.sessions.values() if "who" in each.subscriptions])
        on_loop(app, app.publish, "who", 1)
        assert leaver.recv(5) is None
        on_loop(app, app.publish, "s.2", "still")
        while pages[0].recv(5) != "<p id=2>still</p>":
            pass
        for page in (*pages, late):
            page.close()


def test_who_is_here_by_html_is_shown_to_who_reloads():
    with running(presence_debounce_s=5) as app:
        app.authenticate(lambda request: "al")
        app.html("presence")(lambda message: f"<p id=on>{','.join(message.payload['users'])}</p>")
        for _ in range(3):
            with hl.connect(app.url + "/ws/html") as page:
                assert page.recv(5) == "<p id=on>al</p>"
            wait_until(lambda: not app.sessions)


def test_a_view_registered_while_another_is_looked_at_stays():
    with running() as app:
        app.html("room.*")(lambda message: f"<p id=all>{message.payload}</p>")
        with hl.connect(app.url + "/ws/html?topics=room.a"):
            wait_until(lambda: app._made_views)
            app.html("room.a")(lambda: "<p id=a></p>")
        wait_until(lambda: not app.sessions)
        assert list(app._views) == ["room.*", "room.a"] and not app._made_views
        with hl.connect(app.url + "/ws/html?topics=room.a") as page:
            assert page.recv(5) == "<p id=a></p>"


def test_a_view_of_everything_is_not_for_who_may_see_one():
    with running() as app:
        app.allow("room.a", subscribe=True)
        app.html("room.*")(lambda: "<p id=all>all rooms' secrets</p>")
        with hl.connect(app.url + "/ws/html?topics=room.a,room.*") as page:
            assert sorted(page.recv(5)["error"]["code"] for _ in range(2)) == ["forbidden", "no_fragment"]


def test_who_asks_twice_keeps_the_place_it_had():
    with running(tick_hz=5) as app, hl.connect(app.url, reconnect=10) as client:
        app.topic("t", history=100)
        client.subscribe("t")
        for again in ({}, {"rate": 5}, {}):
            session, = app.sessions.values()
            on_loop(app, lambda: [app.publish("t", n) for n in range(3)])
            before = dict(client.positions)
            client.subscribe("t", **again)
            assert client.positions == before           # nothing of it has come yet
            on_loop(app, session.connection.abort, "cut")
            got = [client.recv(5)["payload"]] if again else [client.recv(5)["payload"] for _ in range(3)]
            assert got == ([2] if again else [0, 1, 2])


def test_a_wildcards_gap_is_not_that_of_an_exact_topic():
    with running() as app, hl.connect(app.url, reconnect=10) as client:
        app.topic("a.1", history=100)
        app.topic("a.2", history=1)
        client.subscribe("a.>")
        client.subscribe("a.1")
        session, = app.sessions.values()
        on_loop(app, lambda: (session.connection.abort("cut"), [app.publish("a.1", n) for n in range(5)], [app.publish("a.2", n) for n in range(2)]))
        got = [client.recv(5) for _ in range(6)]
        assert sum(m.get("gap", False) for m in got) == 1 and [m["payload"] for m in got if m["topic"] == "a.1"] == [0, 1, 2, 3, 4]


def test_a_client_of_many_topics_comes_back_without_haste(monkeypatch):
    monkeypatch.setattr(hl, "_UNPACED", 20)
    with running(max_messages_per_s=120, burst=40) as app, hl.connect(app.url, reconnect=20) as client:
        app.topic("t.*", history=5)
        for n in range(60):
            client.subscribe(f"t.{n}")
            time.sleep(.009 if n > 20 else 0)
        session, = app.sessions.values()
        on_loop(app, lambda: (session.connection.abort("cut"), app.publish("t.59", "missed")))
        assert client.recv(10)["payload"] == "missed" and client.reconnects == 1


def test_a_state_that_is_cleared_is_told_also_with_newcomers():
    with running() as app, hl.connect(app.url) as one:
        one.subscribe("presence")
        one.recv(5)
        mine, = app.presence.users()
        def change(*states):
            for user, state in states:
                app.presence.join(user, user)
                app.presence.set_state(user, state)
            app._presence_now("presence")               # as if somebody subscribed meanwhile
        on_loop(app, change, ("al", 1), ("bo", 2))
        while one.recv(5).get("states") != {"al": 1, "bo": 2}:
            pass
        on_loop(app, change, ("al", None))
        assert one.recv(5)["states"] == {"al": None, "bo": 2} and mine in app.presence.users()
        on_loop(app, lambda: [app.presence.leave(user) for user in ("al", "bo")])


def test_what_a_rate_holds_back_is_not_lost_for_another_subscription():
    with running(tick_hz=0) as app, hl.connect(app.url, reconnect=10) as client:
        app.topic("a.*", history=100)
        client.subscribe("a.*", rate=0.2)
        client.subscribe("a.x")
        for topic, value in (("a.y", 1), ("a.y", 2), ("a.x", 3)):
            on_loop(app, app.publish, topic, value)
        assert [client.recv(5)["payload"] for _ in range(2)] == [1, 3]
        session, = app.sessions.values()
        on_loop(app, session.connection.abort, "cut")
        got = []
        while 2 not in got:
            got.append(client.recv(5)["payload"])


def test_batches_lost_at_the_end_are_told(caplog):
    app = hl.Engine(port=0).start()
    gate = threading.Event()
    app.on("a:b", lambda events: gate.wait(5), batch=2, wait_ms=0, blocking=True)
    for n in range(10):
        app.call_soon(app.emit, "a:b", n).result()
    app.stop(0.2)
    gate.set()
    assert "events waited in batches" in caplog.text and app.metrics["horizon_batch_dropped_total"] in (8, 9)


def test_every_form_takes_whatever_there_is():
    with running() as app, hl.connect(app.url + "/ws/html") as page:
        app.topic("t", history=2)
        events = Events(app, "world.moves")
        on_loop(app, app.movement.move, b"a" * 16, 1, 2, 3)
        told = [events.next()]
        while not told[-1][1]["payload"]["players"]:            # it may have come before the move
            told.append(events.next())
        assert told[-1][0] is None and told[0][1]["payload"]["full"]
        assert told[-1][1]["payload"]["players"] == {"61616161-6161-6161-6161-616161616161": [1, 2, 3]}
        who = Events(app, "presence")
        assert len(who.next()[1]["users"]) == 1
        for topic in ("world.moves", "presence", "t"):
            page.send({"action": "subscribe", "topic": topic, "id": 1})
            assert page.recv(5)["error"]["code"] == "no_fragment"
        on_loop(app, app.publish, "t", 1)
        with hl.connect(app.url) as client:
            client.send({"action": "subscribe", "topic": "t", "since": 0, "id": 1})     # from the first
            answer = client.recv(5)
            assert answer == {"id": 1, "ok": True, "epoch": answer["epoch"], "offset": 0} and client.recv(5)["offset"] == 1
        for session in list(app.sessions.values()):
            on_loop(app, session.send, {"n": 1})
        assert page.recv(5) == {"n": 1} and who.next() == (None, {"n": 1})


def test_messages_that_come_before_the_answer_are_not_asked_for_again():
    with running(tick_hz=1) as app, hl.connect(app.url) as client:
        app.topic("t", history=5)
        plain = hl.Engine._reply

        def late(self, session, *rest):                 # a critical message leaves before the answer
            self.publish("t", "critical", critical=True)
            plain(self, session, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hl.Engine, "_reply", late)
            client.subscribe("t")
        assert client.positions["t"]["offset"] == 1 and client.recv(5)["payload"] == "critical"
        with pytest.raises(hl.UsageError):
            client.subscribe("a..b")
        assert list(client.positions) == ["t"]


def test_waiting_on_the_loop_for_the_loop_is_refused():
    with running() as app, hl.connect(app.url) as client:
        seen = []
        app.on_client("a", "sync")(lambda event: app.call_soon(app.publish, "t", 1).result())

        @app.on_client("a", "async")
        async def asynchronous(event):
            seen.append(await app.call_soon(app.publish, "t", 2))
        client.send({"namespace": "a", "event": "sync", "id": 1})
        assert client.recv(5)["error"]["code"] == "failed"
        client.emit("a", "async")
        wait_until(lambda: seen == [0])
        future = on_loop(app, app.call_soon, app.publish, "t", 1)
        assert future.result(5) == 0
        with pytest.raises(hl.StateError, match="own thread"):
            on_loop(app, lambda: app.call_soon(print).exception())


def test_wildcards_leave_presence_to_those_who_ask_for_it():
    with running() as app, hl.connect(app.url) as client, hl.connect(app.url) as other:
        client.subscribe(">")
        client.subscribe("*")
        other.subscribe("presence")
        assert other.recv(5)["type"] == "presence_update"
        on_loop(app, app.publish, "t", 1)
        assert client.recv(5)["topic"] == "t"
        app.subscribe("presence")(lambda message: got.append(message.payload))
        got = []
        with hl.connect(app.url):
            wait_until(lambda: got and got[-1]["joined"])


def test_topics_are_told_when_somebody_listens():
    with running() as app:
        told = []
        app.on_core("topic.occupied")(lambda event: told.append("+" + event.data["topic"]))
        app.on_core("topic.vacated")(lambda event: told.append("-" + event.data["topic"]))
        app.topic("feed.a")
        with hl.connect(app.url) as one, hl.connect(app.url) as two:
            one.subscribe("feed.*")
            two.subscribe("feed.a")
            one.unsubscribe("feed.*")
            assert told == ["+feed.*", "+feed.a", "-feed.*"]
        wait_until(lambda: told[3:] == ["-feed.a"])


def test_too_many_subscriptions_of_one_client_are_refused():
    with running() as app, hl.connect(app.url) as client:
        for n in range(1_500):
            client.send({"action": "subscribe", "topic": f"t.{n}", "id": n})
        answers = [client.recv(5) for _ in range(1_500)]
        assert sum(answer.get("ok", False) for answer in answers) == 1_000
        assert answers[-1]["error"]["code"] == "too_many_subscriptions" and answers[-1]["id"] == 1_499
        assert app.metrics['horizon_requests_refused_total{code="too_many_subscriptions"}'] == 500
        assert len(app.topics) >= 1_000
    on_loop_free = app.topics
    on_loop_free._check()


def test_clients_that_come_and_go_leave_no_trace(rng):
    with running() as app:
        app.topic("t.*", history=5)
        app.html("t.1")(lambda: "<p id=t></p>")
        for _ in range(int(3 * SOAK)):
            clients = [hl.connect(app.url + rng.choice(["/ws/data", "/ws/html"])) for _ in range(30)]
            for client in clients:
                if "html" not in client.url:
                    for _ in range(rng.randrange(3)):
                        client.subscribe(rng.choice(["t.*", "t.1", ">", "presence", "world.moves"]), **rng.choice([{}, {"rate": 5}]))
                    client.send({"namespace": "system", "event": "heartbeat", "data": {"interval_s": 1}})
                    client.publish("t.1", 1)
            rng.shuffle(clients)
            for client in clients:
                client._sock.close() if rng.random() < .5 else client.close()
        wait_until(lambda: not app.sessions)
        on_loop(app, app.topics._check)
        assert not app.topics.matching("t.1") and app.presence.online() == 0
        assert not app._waiting and not app._urgent and not app._users and app._present.total() == 0


def test_above_its_memory_a_server_takes_in_nobody_more(caplog):
    with running() as app, hl.connect(app.url) as old:
        alerts = []
        app.on_core("alert")(lambda event: alerts.append((event.data["name"], event.data["active"])))
        small, large = (hl.Config(max_memory_mb=limit) for limit in (1, 100_000))
        app.config = small
        on_loop(app, app._check_alerts)             # as each second
        assert status_of(app, "/healthz") == 503 and app.metrics['horizon_refused_total{reason="max_memory"}'] >= 1
        old.send({"namespace": "system", "event": "ping"})
        assert old.recv(5)["event"] == "pong" and "memory" in app.report()["alerts"] and not app.report()["healthy"]
        app.config = large
        on_loop(app, app._check_alerts)
        assert status_of(app, "/healthz") == 200 and alerts == [("memory", True), ("memory", False)]
        assert caplog.text.count("alert:") == 1


def test_fragments_of_the_engine_are_cached_and_counted():
    app = hl.Engine(port=0, cache_entries=2, cache_ttl_s=60)
    calls = []
    for key in ("a", "a", "b", "c", "a"):
        assert app.fragment(f"f:{key}", lambda: calls.append(key) or hl.html("<b>{k}</b>", k=key)) == f"<b>{key}</b>".encode()
    assert calls == ["a", "b", "c", "a"]
    figures = [app.metrics[f"horizon_fragment{name}"] for name in ("_hits_total", "_misses_total", "_evictions_total", "s_cached", "_render_seconds_count")]
    assert figures == [1, 4, 2, 2, 4]
    app.stop()


# -- the world over sockets --

def hear(client, check, seconds=5.0):
    """Take what comes until *check* holds; return the messages."""
    heard, deadline = [], time.monotonic() + seconds
    while not check():
        with contextlib.suppress(TimeoutError):
            heard.append(client.recv(0.02))
        assert time.monotonic() < deadline, heard[-5:]
    return heard


@pytest.mark.parametrize("protocol", ["json", "proto", "packed"])
def test_a_client_sees_what_is_near_its_player(protocol):
    with running() as app, hl.connect(app.url, protocol="json" if protocol == "json" else "proto") as client:
        if protocol == "packed":
            client.subscribe("gorc", packed="f64")
        rock = Rock()
        id = on_loop(app, app.world.add, rock, 10, 0, 0)
        client.move(0, 0)
        hear(client, lambda: client.world.zones == {(id, 0), (id, 1), (id, 3)})
        seen = client.world[id]
        assert (seen.type, seen.position, seen.health, seen.mood, seen.loot) == ("Rock", (10.0, 0.0, 0.0), 100, "calm", [])
        assert client.world.of_type(Rock) == client.world.of_type("Rock") == [seen] and client.world.of_type("Tree") == []
        with pytest.raises(AttributeError, match="'health'"):
            client.world[id].helth
        on_loop(app, app.world.move, id, 11.1, 2, 3)
        on_loop(app, setattr, rock, "health", 3)
        hear(client, lambda: seen.position == (11.1, 2.0, 3.0) and seen.health == 3)
        assert app.events_sent["GORC"] >= 3 and (client.protocol == "json" or app.renders["horizon.proto.v1"])
        client.move(100, 0)
        hear(client, lambda: client.world.zones == {(id, 1), (id, 3)})
        on_loop(app, app.world.remove, id)
        hear(client, lambda: not client.world)
        on_loop(app, app.world.add, rock, 0, 0, 0)
        hear(client, lambda: len(client.world) == 1)
        client.unsubscribe("gorc")
        assert on_loop(app, app.world.observers) == 0
        client.move(1, 1)
        client.subscribe("gorc")                    # where it is by now
        hear(client, lambda: len(client.world.zones) == 3)
        assert on_loop(app, app.world.observers) == 1
    assert app.world.observers() == 0


def test_random_worlds_over_sockets_are_what_brute_force_says(rng):
    with running(tick_hz=100, replication_wait_ms=0) as app, contextlib.ExitStack() as stack:
        clients = {}
        for n in range(6):
            client = stack.enter_context(hl.connect(app.url, protocol=("json", "proto")[n % 2]))
            wait_until(lambda: len(app.sessions) > n)
            clients[client] = list(app.sessions)[-1]
        list(clients)[1].subscribe("gorc", packed="f64")
        rocks = []

        def stir():
            """Change the world as its own handlers would."""
            for _ in range(3):
                rocks.append(Rock())
                app.world.add(rocks[-1], *[rng.uniform(-300, 300) for _ in range(3)])
            for rock in rocks:
                if rng.random() < 0.5:
                    rock.position = [each + rng.uniform(-40, 40) for each in rock.position]
                rock.health, rock.name = rng.randrange(99), f"{rng.random()}"
            if len(rocks) > 30:
                app.world.remove(rocks.pop(rng.randrange(len(rocks))))
        for _ in range(int(40 * max(1, SOAK))):
            on_loop(app, stir)
            for client in rng.sample(list(clients), 2):
                client.move(*[rng.uniform(-300, 300) for _ in range(3)])
            time.sleep(rng.choice((0, 0.01)))
        truth = {rock.id: rock for rock in rocks}
        for client, own in clients.items():
            def is_right():
                zones = on_loop(app, lambda: app.world.seen_by(own) if app.world.observes(own) else set())
                return client.world.zones == zones and all(
                    properties == json.loads(json.dumps({name: getattr(truth[id], name) for name in properties}))
                    for id, seen in client.world.items() for properties in seen.channels.values())
            hear(client, is_right)
        on_loop(app, app.world._check)


def test_a_tick_of_the_world_is_one_write_for_each_client():
    with running(tick_hz=20) as app, hl.connect(app.url) as one, hl.connect(app.url) as two:
        rocks = [Rock() for _ in range(50)]
        for rock in rocks:
            on_loop(app, app.world.add, rock, 1, 0, 0)
        for client in (one, two):
            client.subscribe("news")
            client.move(0, 0)
            hear(client, lambda: len(client.world.zones) == 150)

        def change():
            app.publish("news", "now")
            for rock in rocks:
                rock.health -= 1
            return app.server.writes, app.renders.total(), app.reused.total(), app.tick_count
        for _ in range(3):
            writes, renders, reused, tick = on_loop(app, change)
            wait_until(lambda: app.tick_count > tick)
            on_loop(app, lambda: None)
            assert app.server.writes - writes == 2
            assert (app.renders.total() - renders, app.reused.total() - reused) == (1, 1)     # both see the same
        hear(one, lambda: {each.health for each in one.world.values()} == {97})


def test_a_client_that_does_not_read_gets_the_newest_and_delays_nobody():
    with running(tick_hz=100, replication_wait_ms=0) as app, hl.connect(app.url) as other:
        sock = raw_websocket(app, small=True)
        sock.sendall(masked(0x81, b'{"namespace":"movement","event":"position","data":{"x":0}}'))
        other.move(0, 0)
        wait_until(lambda: app.world.observers() == 0 and len(app.sessions) == 2)
        for session in app.sessions.values():
            if session.form == "":
                session.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        rocks = [Rock() for _ in range(40)]

        def fill():
            for rock in rocks:
                rock.name = "x" * 500
                app.world.add(rock, 1, 0, 0, channels=(0, 3))
        on_loop(app, fill)
        hear(other, lambda: len(other.world.zones) == 80)

        def change(n):
            for rock in rocks:
                rock.health = n
                rock.name = f"{n}" * 200
            app.world.move(rocks[0].id, n % 40, 0, 0)

        numbers = itertools.count(1_000)

        def is_slow():
            on_loop(app, change, next(numbers))
            with contextlib.suppress(TimeoutError):
                other.recv(0.01)
            return any(each.connection.unsent for each in app.sessions.values())
        wait_until(is_slow)
        for n in range(60):
            on_loop(app, change, n)
            time.sleep(0.01)
        on_loop(app, app.world.remove, rocks.pop().id)
        hear(other, lambda: len(other.world) == 39 and {each.health for each in other.world.values()} == {59})
        slow = next(each for each in app.sessions.values() if each.backlog)
        stats = on_loop(app, app.world.stats, slow.id)
        assert stats["coalesced"] > 100 and stats["owed"] and not slow.outbox.items
        assert on_loop(app, app.world.stats, next(each.id for each in app.sessions.values() if each is not slow))["coalesced"] < 20
        view, ws = hl.SeenWorld(), hl.WebSocketConnection("client", 1 << 24)
        deadline = time.monotonic() + 5
        while not (len(view) == 39 and {each.channels[0]["health"] for each in view.values()} == {59}):
            ws.receive(sock.recv(65536))
            for event in ws.take_events():
                view.apply(json.loads(event))
            assert time.monotonic() < deadline
        assert view.zones == on_loop(app, app.world.seen_by, slow.id)
        sock.close()


def test_what_clients_say_to_objects_reaches_those_who_handle_it():
    app, said, told = hl.Engine(port=0, max_messages_per_s=0), [], []

    @app.on_gorc(Rock, 0, "mined")
    def mined(event):
        said.append((event.object.id, event.channel, event.data, event.client.user, event.metadata["channel"]))
        if event.data == "no":
            event.cancel("not here")
        if event.data == "raise":
            raise ValueError
        event.told = app.emit_gorc(event.object, 0, "chips", {"n": 1}).told

    @app.on("gorc_instance:Rock:*", filter=hl.Propagator.channel(0, 1, 3))
    def heard(event):
        told.append((event.key.split(":")[2:], event.object.type_name, event.client and event.client.user))
    with app, hl.connect(app.url) as client, hl.connect(app.url, protocol="proto") as other:
        client.move(0, 0)
        other.move(1_000, 0)
        rock = Rock()
        id = on_loop(app, app.world.add, rock, 0, 0, 0)
        hear(client, lambda: len(client.world) == 1)
        client.emit_gorc(client.world[id], 0, "mined", {"by": "hand"})
        chips = next(each for each in iter(lambda: client.recv(5), None) if each.get("event") == "chips")
        assert (chips["type"], chips["event"], chips["object_id"], chips["channel"], chips["data"]) == ("gorc_event", "chips", id, 0, {"n": 1})
        user = next(session.user for session in app.sessions.values() if session.form == "horizon.json.v1")
        assert said == [(id, 0, {"by": "hand"}, user, 0)]
        # as seed 002's clients write it; who they say they are does not matter
        client.send({"type": "gorc_event", "object_id": f"GorcObjectId({id})", "channel": 0, "event": "mined", "data": 2, "player_id": "somebody", "id": 7})
        answers = [client.recv(5), client.recv(5)]
        assert {"id": 7, "ok": True} in answers and said[-1][2:4] == (2, user)
        for change, code in [({"object_id": "nobody"}, "unknown_object"), ({"object_id": 3}, "unknown_object"), ({"object_id": None}, "unknown_object"),
                             ({"channel": 2}, "unknown_channel"), ({"channel": "0"}, "unknown_channel"), ({"channel": True}, "unknown_channel"),
                             ({"channel": -1}, "unknown_channel"), ({"channel": []}, "unknown_channel"), ({"event": "a:b"}, "bad_name"), ({"event": None}, "bad_name"),
                             ({"event": "other"}, "no_handler"), ({"channel": 1}, "no_handler"), ({"data": "no"}, "cancelled"), ({"data": "raise"}, "failed")]:
            client.send({"type": "gorc_event", "object_id": id, "channel": 0, "event": "mined", "data": 0, "id": 1, **change})
            while "error" not in (answer := client.recv(5)):
                pass
            assert answer["error"]["code"] == code, (change, answer)
            assert app.refusals[code]
        hear(other, lambda: other.world.zones == {(id, 3)})
        other.emit_gorc(id, 0, "mined", 1)              # it sees it, but not on that channel
        assert next(reply for reply in iter(lambda: other.recv(5), None) if reply.type == "REPLY").reply.code == "not_in_zone"
        other.move(0, 0)
        hear(other, lambda: len(other.world.zones) == 3)
        other.emit_gorc(id, 0, "mined", {"by": "proto"})
        hear(other, lambda: said[-1][2] == {"by": "proto"})
        on_loop(app, app.world.remove, id)
        hear(client, lambda: not client.world)
        client.emit_gorc(id, 0, "mined")
        assert next(each for each in iter(lambda: client.recv(5), None) if "error" in each)["error"]["code"] == "unknown_object"
        with pytest.raises(hl.StateError, match=re.escape("app.call_soon(app.emit_gorc, ...)")):
            app.emit_gorc(rock, 0, "x")
        assert told[0] == (["0", "register"], "Rock", None) and [each for each in told if each[2] == user][:3] == [([f"{n}", "enter"], "Rock", user) for n in (0, 1, 3)]
        assert (["0", "chips"], "Rock", None) in told and told[-1][0][1] == "unregister"
        assert sorted(each[0] for each in told if each[0][1] == "exit" and each[2] == user) == [["0", "exit"], ["1", "exit"], ["3", "exit"]]


def test_a_handler_can_keep_an_event_of_an_object_from_being_told():
    app = hl.Engine(port=0)
    app.on("gorc_instance:Rock:0:secret")(lambda event: event.cancel())
    rock = Rock()
    app.world.add(rock, 0, 0, 0)
    app.world.observe("npc", 0, 0, 0)
    app.world.tick(1)
    assert app.emit_gorc(rock, 0, "secret").cancelled and app.world.stats("npc")["updates"] == 3
    assert app.emit_gorc(rock, 0, "open", {"n": 1}).told == 1
    with pytest.raises(hl.UsageError):
        app.emit_gorc(rock, 0, "exit")
    app.stop()


def test_other_threads_are_told_how_to_change_the_world():
    rock = Rock()
    with running() as app:
        on_loop(app, app.world.add, rock, 0, 0, 0)
        for attempt, way in [(lambda: app.world.add(Rock(), 0, 0, 0), "app.call_soon(app.world.add, ...)"), (lambda: app.world.move(rock.id, 0, 0, 0), "app.world.move, ..."),
                             (lambda: app.world.remove(rock), "app.world.remove, ..."), (lambda: setattr(rock, "health", 1), "app.call_soon(setattr, it, 'health', value)"),
                             (lambda: app.world.observe("x", 0, 0, 0), "app.world.observe, ..."), (lambda: setattr(rock, "position", (1, 2, 3)), "app.world.move"),
                             (lambda: rock.touch("loot"), "app.call_soon(it.touch, ...)")]:
            with pytest.raises(hl.StateError, match=re.escape(way)):
                attempt()
        assert rock.health == 100
        on_loop(app, setattr, rock, "health", 1)


def test_critical_events_do_not_wait_for_the_tick_and_lags_are_measured():
    with running(tick_hz=4) as app, hl.connect(app.url) as client:
        rock = Rock()
        on_loop(app, app.world.add, rock, 0, 0, 0)
        client.move(0, 0)
        hear(client, lambda: len(client.world.zones) == 3)
        tick = app.tick_count
        for n in range(5):
            on_loop(app, app.emit_gorc, rock, 0, "hit", n)
            assert next(each["data"] for each in iter(lambda: client.recv(5), None) if each.get("event") == "hit") == n
        assert app.tick_count <= tick + 2               # one at a time, each within its pass
        on_loop(app, app.emit_gorc, rock, 1, "calm")    # with the tick
        on_loop(app, setattr, rock, "health", 5)
        hear(client, lambda: client.world[rock.id].health == 5)
        wait_until(lambda: "0" in app.report()["replication"]["lag_p99_ms"])
        report = app.report()["replication"]
        assert report["lag_p99_ms"]["critical"] < report["lag_p99_ms"]["0"] and report["objects"] == 1 and report["channels"]["0"]["subscribers"] == 1
        text = get(app, "/metrics")[2].decode()
        assert 'horizon_replication_lag_seconds_count{channel="0"} 1' in text and "horizon_critical_event_seconds_count 5" in text
        assert "horizon_replication_objects 1" in text and 'horizon_replication_put_off_total{reason="coalesced"} 0' in text
        assert json.loads(get(app, "/stats.json")[2])["replication"]["warnings"]


def test_the_settings_of_the_world_are_checked_and_used():
    app = hl.Engine(port=0, region_min=10, region_max=20, region_split=5, region_merge=2, hysteresis=0.5, replication_batch=7, replication_wait_ms=3, compress=False)
    assert (app.world._space._min, app.world._space._max, app.world._space._split, app.world._space._merge) == (10, 20, 5, 2)
    assert (app.world.hysteresis, app.world.batch, app.world.wait_ns, app.world.compress_above_bytes) == (0.5, 7, 3_000_000, 0)
    rock = Rock()
    app.world.add(rock, 50, 0, 0, channels=(0,))
    app.world.observe("npc", 0, 0, 0)
    app.world.tick(1)
    app.configure(hysteresis=0, region_split=9)         # what is there stays
    app.world.tick(2)
    app.world._check()
    assert app.world.seen_by("npc") == {(rock.id, 0)}
    rock.position = 51, 0, 0
    app.world.tick(3)
    assert app.world.seen_by("npc") == set()
    for settings in ({"region_min": 2_000}, {"region_merge": 60}, {"hysteresis": 2}, {"region_max": 0}, {"replication_wait_ms": 60_000}):
        with pytest.raises(hl.ConfigError, match="region|replication"):
            hl.Engine(**settings)


def test_the_seeds_names_of_the_worlds_settings_are_understood(tmp_path):
    (tmp_path / "a.toml").write_text("[spatial]\nmin_region_size = 50.0\nmax_region_size = 500.0\nsplit_threshold = 40\nmerge_threshold = 5\n"
                                     "[network]\nenable_compression = false\ncompression_threshold = 256\n")
    config = hl.Config.load(tmp_path / "a.toml", {})
    assert (config.region_min, config.region_max, config.region_split, config.region_merge) == (50, 500, 40, 5)
    assert (config.compress, config.compress_above_bytes) == (False, 256)


def test_lags_are_of_what_was_put_off_too():
    with running(tick_hz=100, replication_wait_ms=0) as app, hl.connect(app.url) as client:
        rock = Rock()
        on_loop(app, app.world.add, rock, 0, 0, 0, channels=(0,))
        client.move(0, 0)
        hear(client, lambda: len(client.world.zones) == 1)
        (key,) = app.sessions
        held = True
        app._is_ready, ready = lambda observer: not held and ready(observer), app._is_ready
        on_loop(app, setattr, rock, "health", 5)
        time.sleep(0.3)
        held = False
        hear(client, lambda: client.world[rock.id].health == 5)
        wait_until(lambda: app.report()["replication"]["lag_p99_ms"].get("0", 0) >= 290)
        assert on_loop(app, app.world.stats, key)["left_out"] == 1


@pytest.mark.parametrize("message", [
    {"type": "gorc_zone_enter", "object_id": "x", "channel": 0, "position": 5}, {"type": "gorc_zone_enter", "object_id": "x", "channel": 0, "position": "abc", "zone_data": {}},
    {"type": "gorc_zone_enter", "object_id": "x", "channel": 0, "position": [1, 2, {}], "zone_data": {}},
    {"type": "gorc_zone_enter", "object_id": "x", "channel": 0, "position": [1, 2, 3], "zone_data": {"position": 5}},
    {"type": "gorc_zone_enter", "object_id": "x", "channel": 0, "position": [1, 2, 3], "zone_data": 5}, {"type": "gorc_zone_exit", "object_id": "x", "channel": []},
    {"type": "gorc_zone_enter", "object_id": 5, "channel": 0, "position": [1, 2, 3], "zone_data": {}},
    ("gorc_event", {"object_id": "seen", "event": "update", "data": b"{bad"}), ("gorc_event", {"object_id": "seen", "event": "update", "data": b"[" * 100_000}),
    ("gorc_event", {"object_id": "seen", "event": "update", "data": b"\xff\xfe"}), ("gorc_event", {"object_id": "seen", "event": "update", "data": b"1" * 5_000}),
    ("gorc_event", {"object_id": "seen", "event": "update", "data": b"[1]"}), ("zone_enter", {"object_id": "x", "data": b'{"position":7}'}), ("zone_enter", {"object_id": "x"}),
    ("zone_enter", {"object_id": "x", "data": zlib.compress(b"1" * 99), "original_size": 5})])
def test_a_client_ends_a_connection_that_tells_nonsense_of_the_world(message):
    app, schema = hl.Engine(port=0), hl.builtin_schema()

    @app.on_client("go", "on")
    def go(event):
        if isinstance(message, dict):
            return event.client.send(message)
        kind, fields = message
        seen = schema.ZoneEnter(object_id="seen", object_type="Rock", data=b"{}", position=schema.Vec3())
        cls = {"gorc_event": schema.GorcEvent, "zone_enter": schema.ZoneEnter}[kind]
        event.client.send(hl._batch_of(type="ZONE_ENTER", zone_enter=seen) + hl._batch_of(type="X", **{kind: cls(**fields)}))
    with app, hl.connect(app.url, protocol="json" if isinstance(message, dict) else "proto") as client:
        client.emit("go", "on")
        while client.recv(5) is not None:
            pass
        assert client.closed.code in (1007, 1009)


def test_without_ticks_channels_keep_their_rates():
    with running(tick_hz=0) as app, hl.connect(app.url) as client:
        rock = Rock()
        on_loop(app, app.world.add, rock, 0, 0, 0)
        client.move(0, 0)
        hear(client, lambda: len(client.world.zones) == 3)
        for n in range(5):
            began = time.monotonic()
            on_loop(app, setattr, rock, "health", n)
            hear(client, lambda: client.world[rock.id].health == n)
            assert time.monotonic() - began < 0.2
        on_loop(app, setattr, rock, "name", "x")
        hear(client, lambda: client.world[rock.id].name == "x", 0.6)
        wait_until(lambda: on_loop(app, app.world.wait_s) == math.inf)


def test_the_clients_world_is_what_it_was_told_last():
    class Twice(hl.Replicated):
        layers = (hl.Layer(0, 50, 60, ("health",)), hl.Layer(3, 400, 5, ("health", "name")))
        health, name = 1, "a"
    with running() as app, hl.connect(app.url) as client:
        rock = Twice()
        on_loop(app, app.world.add, rock, 0, 0, 0)
        client.move(100, 0)
        hear(client, lambda: len(client.world.zones) == 1)
        client.move(0, 0)
        hear(client, lambda: len(client.world.zones) == 2)
        on_loop(app, setattr, rock, "health", 2)
        hear(client, lambda: client.world[rock.id].channels[0]["health"] == 2)
        assert client.world[rock.id].health == 2 and client.world[rock.id].get("armour", 7) == 7
        client.move(100, 0)
        hear(client, lambda: len(client.world.zones) == 1)
        assert client.world[rock.id].health == 2
        client.unsubscribe("gorc")
        assert not client.world
        on_loop(app, app.world.remove, rock)
        client.subscribe("gorc")
        assert not client.world


def test_a_refused_event_of_an_object_is_told_to_nobody():
    app, heard = hl.Engine(port=0), []
    rock = Rock()
    app.world.add(rock, 0, 0, 0)
    app.on("gorc_instance:Rock:*")(lambda event: heard.append(event.key) or event.key.endswith("last") and app.world.remove(event.object))
    for arguments in [(rock, 9, "x"), (rock, 0, "enter", {"observer": "forged"}), (rock, 0, "ok", {1, 2}), (rock, [1], "x"), (rock, 0, "b ad:name"), ("nobody", 0, "x")]:
        with pytest.raises(hl.UsageError):
            app.emit_gorc(*arguments)
    assert heard == []
    assert app.emit_gorc(rock, 0, "last").told == 0 and rock.id == ""


def test_handlers_hear_of_those_who_leave_by_going():
    app, heard = hl.Engine(port=0, max_messages_per_s=0), []
    app.on("gorc_instance:Rock:*")(lambda event: heard.append((event.key.split(":")[-1], event.data["object_id"], event.data["observer"])))
    with app:
        rock = Rock()
        id = on_loop(app, app.world.add, rock, 0, 0, 0, channels=(0,))
        for _ in range(2):
            with hl.connect(app.url) as client:
                client.move(0, 0)
                hear(client, lambda: len(client.world.zones) == 1)
                (key,) = app.sessions
                if not _:
                    client.unsubscribe("gorc")
            wait_until(lambda: heard[-1:] == [("exit", id, key)])
        assert [name for name, _, _ in heard] == ["register", "enter", "exit", "enter", "exit"]


def test_the_world_needs_no_rule_and_is_told_where_it_can_be():
    with running() as app, hl.connect(app.url) as client, hl.connect(app.url.replace("http", "ws") + "/ws/html") as page:
        on_loop(app, app.allow, "chat.>", publish=True, subscribe=True)
        on_loop(app, app.world.add, Rock(), 0, 0, 0)
        client.move(0, 0)
        hear(client, lambda: len(client.world.zones) == 3)
        client.subscribe("gorc")
        for options in ({"rate": 1}, {"since": 3}):
            with pytest.raises(hl.UsageError, match="no since and no rate"):
                client.request("subscribe", "gorc", **options)
        assert get(app, "/sub/gorc")[0] == 400 and app.refusals["bad_topic"] == 1
        page.send({"action": "subscribe", "topic": "gorc", "id": 1})
        assert "/ws/data" in page.recv(5)["error"]["message"]
        with pytest.raises(hl.StateError, match=re.escape("app.world.limit")):
            app.world.limit("x", 5)
        for attempt in (lambda: app.world.tick(1), lambda: app.world.tune(1, 2, 3, 4, 0.5)):
            with pytest.raises(hl.StateError):
                attempt()
    with running() as app, hl.connect(app.url, protocol="proto") as client:
        client.send_envelope(gorc_event=hl.builtin_schema().GorcEvent(object_id="x", data=zlib.compress(b"1"), original_size=1))
        assert client.recv(5) is None and client.closed.code == 1007


def test_large_properties_and_many_events_hold_up_nothing_else():
    with running(tick_hz=50) as app, hl.connect(app.url) as client:
        big, small = Rock(), Rock()
        for rock in (big, small):
            on_loop(app, app.world.add, rock, 0, 0, 0)
        client.move(0, 0)
        hear(client, lambda: len(client.world.zones) == 6)
        for n in range(1, 12):
            on_loop(app, lambda: (setattr(big, "health", f"{n}" * 400_000), setattr(small, "name", n)))
            client.recv(5)
        hear(client, lambda: client.world[small.id].name == 11)
        rocks = [Rock() for _ in range(300)]

        def burst():
            return [app.emit_gorc(small, 1, "x", "y" * 2_000).told for _ in rocks]
        assert on_loop(app, burst) == [1] * 300
        heard = 0
        while heard < 300:
            heard += client.recv(5).get("event") == "x"
        assert on_loop(app, app.world.put_off)["dropped"] == 0


def test_who_jumps_through_many_zones_pays_for_it_as_for_messages():
    with running(max_messages_per_s=120, burst=240) as app, hl.connect(app.url) as rude, hl.connect(app.url) as calm:
        def fill():
            for n in range(800):
                app.world.add(Rock(), 5_000 * (n % 2), n % 40, 0)
        on_loop(app, fill)
        calm.move(200, 0)
        hear(calm, lambda: len(calm.world.zones) == 400)        # on channel 3
        with contextlib.suppress(OSError, hl.StateError):
            for n in range(40):                                 # a jump a tick
                rude.move(5_000 * (n % 2), 0)
                time.sleep(0.03)
        while rude.recv(5) is not None:
            pass
        assert rude.closed.code in (1006, 1008) and app.server.refused["rate"] == 1     # 1006: it spoke on
        calm.move(5_000, 0)                                     # once is free
        hear(calm, lambda: len(calm.world.zones) == 400 * 3)
        on_loop(app, app.world._check)


def test_who_is_too_slow_for_critical_events_is_sent_away_and_the_others_hear_them():
    with running(outbox_messages=20) as app, hl.connect(app.url) as other:
        socks = [raw_websocket(app, small=True) for _ in range(3)]
        for sock in socks:
            sock.sendall(masked(0x81, b'{"namespace":"movement","event":"position","data":{"x":0}}'))
        rock = Rock()
        on_loop(app, app.world.add, rock, 0, 0, 0, channels=(0,))
        other.move(0, 0)
        hear(other, lambda: len(other.world) == 1)
        wait_until(lambda: on_loop(app, app.world.stats, rock)["0"]["subscribers"] == 4)
        for session in app.sessions.values():
            if session.form == "":
                session.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        told, n = 4, 0
        while told > 1:
            told, n = on_loop(app, app.emit_gorc, rock, 0, "hit", "x" * 20_000).told, n + 1
            assert n < 500 and next(each for each in iter(lambda: other.recv(5), None) if each.get("event") == "hit")
        assert app.server.refused["slow"] == 3 and app.bus.errors == 0
        for sock in socks:
            sock.close()


def test_limits_can_not_be_shaken_off():
    with running() as app, hl.connect(app.url) as client:
        for _ in range(50):
            on_loop(app, app.world.add, Rock(), 0, 0, 0)
        (key,) = app.sessions
        on_loop(app, app.world.limit, key, 2_000)               # before it is anywhere
        client.move(0, 0)
        began, enters = time.monotonic(), 0
        while time.monotonic() - began < 0.5:
            client.unsubscribe("gorc")
            client.subscribe("gorc")
            with contextlib.suppress(TimeoutError):
                while True:
                    enters += client.recv(0.03).get("type") == "gorc_zone_enter"
        assert 0 < enters < 25
    assert not app.world._terms


def test_the_report_of_a_large_world_is_cheap():
    world = hl.World()
    for n in range(3_000):
        world.add(Rock(), n, 0, 0)
    world.observe("anna", 0, 0, 0)
    world.tick(1)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"
    sys.setprofile(count)
    try:
        report = world.report()
    finally:
        sys.setprofile(None)
    assert calls < 4 * 3_000 and report["channels"]["3"]["subscribers"] == world.stats("anna")["sees"] - sum(
        report["channels"][each]["subscribers"] for each in "01")


def test_the_demos_world_grows_and_shrinks_a_little_at_a_time():
    app = hl.Engine(port=0)
    demo = hl.DemoWorld(app, 2, 300)
    for count in (5_000, 100):
        event = app.emit_client("demo", "density", {"count": count})
        assert not event.cancelled
        before = len(app.world)
        demo.walk(0.02)
        assert abs(len(app.world) - before) == 60
    for _ in range(10):
        demo.walk(0.02)
    assert len(app.world) == 100


def test_a_client_that_connects_again_sees_the_world_anew():
    with running() as app:
        rock = Rock()
        on_loop(app, app.world.add, rock, 0, 0, 0)
        with hl.connect(app.url, reconnect=5) as client:
            client.move(0, 0)
            hear(client, lambda: len(client.world.zones) == 3)
            on_loop(app, lambda: [each.connection.close(1012, "again") for each in list(app.sessions.values())])
            while client.reconnects == 0:
                with contextlib.suppress(TimeoutError):
                    client.recv(0.05)
            assert not client.world
            client.move(0, 0)
            hear(client, lambda: len(client.world.zones) == 3)


def test_compressed_states_are_bounded_where_they_are_read(monkeypatch):
    assert hl._inflate(zlib.compress(b"a" * 1_000), 1_000, "x") == b"a" * 1_000
    for data, size, error in [(zlib.compress(b"a" * 1_000), 999, hl.TooBig), (zlib.compress(b"a"), 2, hl.TooBig), (b"junk", 4, hl.WireError),
                              (zlib.compress(b"a" * ((1 << 24) + 1)), (1 << 24) + 1, hl.TooBig), (zlib.compress(b"a")[:-1], 1, hl.TooBig)]:
        with pytest.raises(error):
            hl._inflate(data, size, "x")


# -- streams --

SITES = {"model": {"name": "m", "version": "v1"}, "output_topic": "out.{site}",
         "sources": {"t": "plant.{site}.t", "limit": "limit"}, "mapping": {"hot": "t > limit", "f": "t * 9/5 + 32", "n": "count()"}}


def test_topics_are_mapped_to_topics_in_process_and_over_the_wire():
    app = hl.Engine(port=0)
    got = []
    app.subscribe("out.>")(lambda each: got.append((each.topic, each.payload)))
    stream = app.stream.load(SITES)
    app.stream.load({"model": {"name": "next", "version": "v2"}, "output_topic": "more", "sources": {"f": "out.a._m_v1.f"}, "mapping": {"k": "f + 273"}})
    with running_app(app), hl.connect(app.url) as client:
        client.subscribe("out.a.>")
        client.subscribe("more._next_v2.k")
        client.publish("plant.a.t", {"value": 100, "timestamp_ms": 7})
        first = [heard(client) for _ in range(3)]
        assert [(each["topic"], each["payload"]) for each in first] == [
            ("out.a._m_v1.f", {"value": 212.0, "timestamp_ms": 7}), ("more._next_v2.k", {"value": 485.0, "timestamp_ms": 7}),
            ("out.a._m_v1.n", {"value": 1, "timestamp_ms": 7})]
        assert got == [("out.a._m_v1.f", {"value": 212.0, "timestamp_ms": 7}), ("out.a._m_v1.n", {"value": 1, "timestamp_ms": 7})]
        client.publish("limit", {"value": 50, "timestamp_ms": 8})
        assert heard(client)["payload"] == {"value": True, "timestamp_ms": 8}
        for bad in ("text", 5, {"value": 5}, [1], None, {"value": {"a": {}}, "timestamp_ms": 1}):
            client.publish("plant.b.t", bad)
        wait_until(lambda: stream.processed == 8)
        assert stream.errored["not_object"] == 4 and stream.errored["bad_timestamp"] == 1 and stream.errored["type"] >= 1
        assert alive(client)
        assert on_loop(app, app.stream.process, "plant.a.t", b'{"value":1,"timestamp_ms":1}', {})[0].topic == "out.a._m_v1.hot"
        assert on_loop(app, app.stream.process, "elsewhere", b"{}", {}) == [] == on_loop(app, app.stream.process, None, b"{}", [1])
        with pytest.raises(hl.StateError, match="call_soon"):
            app.stream.process("plant.a.t", b"{}")
        sample = app.metrics.__getitem__
        assert sample('horizon_stream_errors_total{reason="not_object"}') == 4 and sample('horizon_stream_dropped_total{reason="unknown_topic"}') == 1
        assert sample('horizon_stream_outputs_total{mapping="_m_v1.f"}') == stream.stats()["mappings"]["f"]["outputs"]
        assert sample("horizon_stream_messages_total") == app.report()["stream"]["processed"] > 8 and sample("horizon_stream_mappings") == 4
        assert sample("horizon_stream_matches") == 2 and sample("horizon_stream_message_seconds_count") >= 1 and sample("horizon_stream_cache_hits_total") > 0
        before = dict(app.metrics)
        app.stream.unload(stream)
        app.stream.unload(stream)
        client.publish("plant.a.t", {"value": 1, "timestamp_ms": 1})
        alive(client)
        assert stream.processed == 9 and [each.name for each in app.stream] == ["_next_v2"]
        gone = [name for name, value in before.items() if "stream" in name and "_total" in name and app.metrics.get(name, 0) < value]
        assert not gone                         # counters never go back


def heard(client):
    """The next message of a topic."""
    while "topic" not in (message := client.recv(5)):
        pass
    return message


@contextlib.contextmanager
def running_app(app):
    with app:
        yield app
        on_loop(app, app._check)


def test_what_is_published_as_json_is_json_for_everybody():
    topics, got = hl.Topics(), []
    topics.subscribe("t", lambda each: got.append(each.payload))
    topics.subscribe("t", lambda batch: got.append(batch.items[0].json()), batched=True)
    topics.publish("t", hl.Rendered(b'{"a":1}'))
    topics.flush()
    assert got[0] == {"a": 1} and json.loads(got[1])["payload"] == {"a": 1}


def test_a_function_maps_what_a_pattern_covers():
    app, got = hl.Engine(port=0), []
    app.subscribe("alerts.>")(lambda each: got.append((each.topic, each.payload)))

    @app.map("plant.*.temp", to="alerts.{site}")
    def hot(message):
        if message["value"] > 80:
            return {"hot": message["value"], **({"site": "field"} if message["value"] > 90 else {})}

    @app.map("plant.{line}.speed", to="alerts.{line}.{id}")
    def fast(value, timestamp_ms, line, topic):
        return [value, timestamp_ms, line, topic]

    @app.map("raw.*", to="alerts.raw")
    def same(value, line=3):
        return value
    with app:
        def go():
            for topic, payload in (("plant.a.temp", {"value": 85}), ("plant.b.temp", {"value": 20}), ("plant.b.temp", {"value": 95}), ("plant.c.temp", {"value": 85, "site": "its"}), ("plant.c.temp", "odd"),
                                   ("plant.x.speed", {"value": 1, "timestamp_ms": 2, "id": 7}), ("plant.x.speed", {"value": 1, "timestamp_ms": 2}), ("plant.x.speed", {"value": 1}), ("raw.z", 3), ("raw.z", {"value": [4]})):
                app.publish(topic, payload)
        on_loop(app, go)
        assert got == [("alerts.a", {"hot": 85}), ("alerts.field", {"hot": 95, "site": "field"}), ("alerts.its", {"hot": 85}), ("alerts.x.7", [1, 2, "x", "plant.x.speed"]), ("alerts.raw", 3), ("alerts.raw", [4])]
        report = app.report()["stream"]
        assert report["errored"] == {"type": 1} and report["dropped"] == {"no_field": 2} and report["processed"] == 10 and report["mappings"] == 3
        assert {name.rpartition(".")[2]: count for name, count in report["made"].items()} == {"hot": 3, "fast": 1, "same": 2}
    for fn, why in ((lambda: 1, "must take the payload"), (lambda a, b: 1, "takes 'b'")):
        with pytest.raises(hl.UsageError, match=why):
            app.map("a.*", to="b")(fn)
    for pattern, to in (("a.*", "a.{x}"), ("a.>", "a.b.c"), ("a", "a"), ("a.*", "a.{x}.*"), ("a..b", "c"), ("a", "b.{")):
        with pytest.raises(hl.UsageError):
            app.map(pattern, to=to)(lambda message: 1)
    with pytest.raises(hl.UsageError, match="async"):
        app.map("a", to="b")(one_async)


async def one_async(message):
    return message


def test_what_would_come_back_as_its_own_input_is_refused_and_a_longer_loop_ends():
    app = hl.Engine(port=0)
    with pytest.raises(hl.ConfigError, match="a stream is a dict or the path"):
        app.stream.load(5)
    with pytest.raises(hl.ConfigError, match="would come back"):
        app.stream.load({"model": {"name": "m", "version": "v1"}, "output_topic": "a", "sources": {"x": "a.>"}, "mapping": {"p": "x"}})
    assert not [*app.stream] and not app.topics.matching("a.b")
    app.map("one", to="two")(lambda message: message)
    app.map("two", to="one")(lambda message: message)
    with app:
        on_loop(app, app.publish, "one", 1)
        assert app.topics.loops == 1 and app.report()["stream"]["errored"] == {"value": 1} or app.report()["stream"]["errored"]


def test_mappings_of_a_plugin_go_with_it(tmp_path):
    class Maps(hl.Plugin):
        def register(self, app):
            app.stream.load({**SITES, "state_file": str(tmp_path / "state")})
            app.map("raw", to="cooked")(lambda message: message)
    with running() as app:
        app.load(Maps)
        assert len([*app.stream]) == 1
        assert on_loop(app, app.publish, "plant.a.t", {"value": 1, "timestamp_ms": 1}) == 1 == on_loop(app, app.publish, "raw", 1)
        app.unload("maps")
        assert not [*app.stream] and not on_loop(app, app.publish, "plant.a.t", {}) and not on_loop(app, app.publish, "raw", 1)
    assert json.loads((tmp_path / "state").read_bytes().partition(b"\n")[2])["matches"][0]["match"] == []


def test_a_file_of_mappings_is_read_anew_and_its_state_stays(tmp_path, caplog):
    file = tmp_path / "m.toml"

    def write(mapping):
        file.write_text(f'output_topic = "out"\nmodel = {{name = "m", version = "v1"}}\nsources = {{x = "in.x"}}\n[mapping]\n{mapping}\n')
    write('n = "count()"\nold = "x"')
    with running(streams=str(file)) as app:
        got = []
        app.subscribe("out.>")(lambda each: got.append((each.topic[10:], each.payload["value"])))
        on_loop(app, app.publish, "in.x", {"value": 5, "timestamp_ms": 1})
        write('n = "count()"\nnew = "x * 2"\nwith = "x + prev(x)"')
        app.stream.reload()
        on_loop(app, app.publish, "in.x", {"value": 6, "timestamp_ms": 2})
        write("broken = 'x +'")
        app.stream.reload()
        assert "is as it was" in caplog.text
        file.unlink()
        app.stream.reload()
        on_loop(app, app.publish, "in.x", {"value": 7, "timestamp_ms": 3})
        assert got == [("n", 1), ("old", 5), ("n", 2), ("new", 12), ("n", 3), ("new", 14), ("with", 13)]
        assert len([*app.stream]) == 1 and app.report()["stream"]["made"] == {"_m_v1.n": 3, "_m_v1.old": 1, "_m_v1.new": 2, "_m_v1.with": 1}
    with pytest.raises(hl.ConfigError, match="m.toml"):
        hl.Engine(port=0, streams=str(file)).start()


def test_a_file_that_is_read_anew_keeps_its_handle_and_its_counts(tmp_path, monkeypatch):
    file = tmp_path / "m.toml"
    text = 'output_topic = "out"\nmodel = {name = "m", version = "v1"}\nsources = {x = "in.x"}\n[mapping]\n'
    file.write_text(text + 'a = "x"\nb = "x / 0"\n')
    monkeypatch.chdir(tmp_path)

    class Maps(hl.Plugin):
        def register(self, app):
            app.stream.load("m.toml")
    with running() as app:
        app.load(Maps)
        (stream,) = app.stream
        assert app.stream.load(str(file)) is stream is app.stream.load("./m.toml")       # the same by any name
        on_loop(app, app.publish, "in.x", {"value": 5, "timestamp_ms": 1})
        before = {name: value for name, value in app.metrics.items() if "stream" in name and "_total" in name}
        file.write_text(text + 'a = "x * 2"\n')
        app.stream.reload()
        assert [*app.stream] == [stream] and stream.state() == {"x": 5}
        now = dict(app.metrics)
        assert all(now.get(name, -1) >= value for name, value in before.items()) and now['horizon_stream_outputs_total{mapping="_m_v1.a"}'] == 1
        on_loop(app, app.publish, "in.x", {"value": 5, "timestamp_ms": 1})
        assert app.metrics['horizon_stream_outputs_total{mapping="_m_v1.a"}'] == 2 and stream.processed == 2
        app.unload("maps")
        assert not [*app.stream] and not on_loop(app, app.publish, "in.x", {})
        file.write_text("model = 5\n")
        with pytest.raises(hl.ConfigError, match="m.toml: output_topic is required"):
            app.stream.load(file)


def test_states_have_one_owner_and_are_written_in_their_order(tmp_path):
    config = {"model": {"name": "m", "version": "v1"}, "output_topic": "out", "sources": {"x": "in.x"}, "mapping": {"n": "count()"}, "state_every_s": 1e-9}
    (tmp_path / "a").mkdir()
    with running() as app:
        app.stream.load(config | {"state_file": str(tmp_path / "state")})
        with pytest.raises(hl.ConfigError, match="another stream's"):
            app.stream.load(config | {"state_file": str(tmp_path / "a" / ".." / "state")})
        (stream,) = app.stream
        app.stream.unload(stream)
        for n in range(int(100 * SOAK) + 10):           # what unloading saves is never older than what was under way
            stream = app.stream.load(config | {"state_file": str(tmp_path / "state")})

            def turn():
                app.publish("in.x", {"value": n, "timestamp_ms": 1})
                app._save_streams()
                app.publish("in.x", {"value": -n - 1, "timestamp_ms": 1})
                app._streams.unload(stream)
            on_loop(app, turn)
            assert hl.Stream(config | {"state_file": str(tmp_path / "state")}).state() == {"x": -n - 1}
        assert app.metrics["horizon_stream_unsaved_total"] == 0 and [each.name for each in tmp_path.iterdir() if each.is_file()] == ["state"]


def test_a_mapping_may_end_itself_and_functions_change_only_their_own(caplog):
    app, got = hl.Engine(port=0), []
    app.subscribe("out.>")(lambda each: got.append(each.topic))
    stream = app.stream.load({"model": {"name": "m", "version": "v1"}, "output_topic": "out", "sources": {"x": "in.x"},
                              "mapping": {"a": "x", "b": lambda x: app.stream.unload(stream) or 1, "c": "x"}})
    seen = []

    @app.map("in.y", to="to.y")
    def change(message):
        message["value"] = "gone"
        return [message]
    app.subscribe("in.y")(lambda each: seen.append(each.payload))

    @app.map("in.z", to="to.z")
    def odd(message):
        return {1, 2}
    app.topic("to.z", history=1)
    with app:
        on_loop(app, app.publish, "in.x", {"value": 1, "timestamp_ms": 1})
        assert got == [] and not [*app.stream]
        on_loop(app, app.publish, "in.y", {"value": 1})
        assert seen == [{"value": 1}]
        on_loop(app, app.publish, "in.z", {"value": 1})
        assert app.report()["stream"]["errored"] == {"value": 1} and "can't be written as JSON" in caplog.text


def test_a_table_of_a_stream_in_the_settings_may_be_wrong_or_have_tests(tmp_path):
    file = tmp_path / "h.toml"
    file.write_text('[server]\nport = 0\n[stream]\nmode = "timeseries"\noutput_topic = "o"\n')
    with pytest.raises(hl.ConfigError, match="model name is required"):
        hl.Engine(hl.Config.load(file, {})).start()
    file.write_text('streams = ["other.toml"]\n[stream]\noutput_topic = "o"\nmodel = {name = "m", version = "v1"}\nsources = {x = "in"}\n[[test]]\ninput = []\n')
    assert hl.Config.load(file, {}).streams == ("other.toml", str(file)) and hl.Stream(file).rules == []


def test_a_state_is_saved_on_stop_and_every_so_often(tmp_path):
    path = tmp_path / "state"

    def saved():
        return json.loads(path.read_bytes().partition(b"\n")[2])["matches"][0]["values"]["x"] if path.exists() else None
    config = {"model": {"name": "m", "version": "v1"}, "output_topic": "out", "sources": {"x": "in.x"}, "mapping": {"n": "count()"}, "state_file": str(path), "state_every_s": 0.5}
    with running() as app:
        app.stream.load(config)
        with pytest.raises(hl.ConfigError, match="another stream's"):
            app.stream.load(config)
        on_loop(app, app.publish, "in.x", {"value": 1, "timestamp_ms": 1})
        wait_until(lambda: saved() == 1)
        on_loop(app, app.publish, "in.x", {"value": 2, "timestamp_ms": 1})
    assert saved() == 2
    app = hl.Engine(port=0)
    app.stream.load(config)
    assert next(iter(app.stream)).state() == {"x": 2}
    path.unlink()
    (tmp_path / "state").mkdir()                # it can't be written any more
    with app:
        wait_until(lambda: app.metrics["horizon_stream_unsaved_total"] >= 1)


# =============================================================================
# 21  CLIENT
# =============================================================================

def test_a_client_is_iterable_and_ends_with_the_server():
    app = hl.Engine(port=0).start()
    client = hl.connect(app.url.replace("http", "ws") + "/ws/data")
    client.subscribe("t")
    for number in range(3):
        on_loop(app, app.publish, "t", number)
    threading.Timer(0.2, app.stop).start()
    assert [message["payload"] for message in client] == [0, 1, 2]
    with pytest.raises(hl.StateError, match="1001"):
        client.send("x")
    client.close()
    client.close()


def test_a_client_says_what_is_wrong():
    for url in ("localhost:8080", "ftp://x", "http://", ""):
        with pytest.raises(hl.UsageError, match="write it like"):
            hl.connect(url)
    with pytest.raises(hl.UsageError):
        hl.connect("http://127.0.0.1:1", protocol="xml")
    with pytest.raises(OSError):
        hl.connect(f"http://127.0.0.1:{free_port()}")
    with running() as app:
        with pytest.raises(hl.HandshakeError, match="404"):
            hl.connect(app.url + "/nothing")
        with hl.connect(app.url) as client, pytest.raises(TimeoutError):
            client.recv(0.05)


@contextlib.contextmanager
def bad_server(*answers, upgrade=True):
    """A server that upgrades and then sends what it should not, connection by connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen, socks = [], []

    def serve():
        for answer in answers:
            sock, _ = listener.accept()
            socks.append(sock)
            sock.settimeout(5)
            head = b""
            while upgrade and b"\r\n\r\n" not in head:
                head += sock.recv(4096)
            if upgrade:
                key = re.search(r"Sec-WebSocket-Key: (\S+)", head.decode())[1]
                sock.sendall(b"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
                             + hl._accept_key(key).encode() + b"\r\n\r\n")
            if callable(answer):
                answer(sock)
                continue
            with contextlib.suppress(OSError):
                sock.sendall(answer)
                while piece := sock.recv(4096):
                    seen.append(piece)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    listener.close()
    for sock in socks:
        sock.close()


def test_a_client_is_strict_with_its_server():
    with bad_server(b"\x81\x02\"\"" + b"\x81\x82\1\2\3\4\1\2") as (url, seen), hl.connect(url) as client:
        assert client.recv(5) == "" and client.recv(5) is None and client.closed.code == 1002
        wait_until(lambda: seen and take("server", b"".join(seen))[0].code == 1002)
    with bad_server(b"\x81\x04null\x81\x0c" + b'{"id": "1"' + b" }" + b"\x81\x7f" + (200_000).to_bytes(8, "big") + b"[" * 200_000
                    + b"\x88\x00") as (url, _), hl.connect(url) as client:
        got = list(client)
        assert got[:2] == [None, {"id": "1"}] and len(got[2]) == 200_000 and client.closed.code == 1005

    def last_words(sock):
        sock.sendall(b"\x89\x00\x89\x00\x81\x0blast words!")
        sock.close()
    with bad_server(last_words) as (url, _), hl.connect(url) as client:
        time.sleep(0.3)
        assert client.recv(5) == "last words!" and client.recv(5) is None and client.closed.code == 1006
    with bad_server(lambda sock: time.sleep(2)) as (url, _), hl.connect(url, timeout_s=0.5) as client:
        with pytest.raises(TimeoutError):
            client.send("x" * 50_000_000)
        with pytest.raises(hl.StateError):                  # in the middle of a frame there is no way on
            client.send("small")


@pytest.mark.parametrize("answer, status", [
    (b"HTTP/1.0 503 busy\r\n\r\n", 503), (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", 302), (b"FOO\r\n\r\n", 400),
    (b"HTTP/1.0 200 OK\r\n\r\n", 200), (b"garbage", 400), (b"", 400)])
def test_a_client_reads_the_status(answer, status):
    def say(sock):
        sock.recv(4096)
        sock.sendall(answer)
        sock.close()
    with bad_server(say, upgrade=False) as (url, _), pytest.raises(hl.HandshakeError) as caught:
        hl.connect(url)
    assert caught.value.http_status == status


def test_a_dripping_handshake_has_one_deadline():
    def drip(sock):
        with contextlib.suppress(OSError):
            for byte in b"HTTP/1.1 101 OK" * 9:
                sock.sendall(bytes((byte,)))
                time.sleep(0.1)
    began = time.monotonic()
    with bad_server(drip, upgrade=False) as (url, _), pytest.raises(TimeoutError):
        hl.connect(url, timeout_s=0.6)
    assert time.monotonic() - began < 3


def test_a_client_says_everything_before_it_closes():
    with running() as app:
        got = []

        @app.websocket("/sink")
        def sink(client, message):
            time.sleep(0.005)
            got.append(message)
            client.send("ok")
        with hl.connect(app.url + "/sink") as client:
            for number in range(50):
                client.send(f"{number}".ljust(20_000))
        wait_until(lambda: not app.sessions)
        assert len(got) == 50 and client.closed.code == 1000
        with hl.connect(app.url + "/sink") as client:
            with pytest.raises(TimeoutError):
                client.recv(0.01)
            assert client._sock.gettimeout() == 10.0        # not what was left of recv's
        with pytest.raises(hl.UsageError, match="ssl_context"):
            hl.connect(app.url, ssl_context=object())


def test_a_client_that_polls_comes_back_too_and_drops_what_is_refused(caplog):
    port = free_port()
    with hl.Engine(port=port, handshake_s=0.4):
        client = hl.connect(f"http://127.0.0.1:{port}", reconnect=20)
        client.subscribe("a")
        client.subscribe("b")
    app = hl.Engine(port=port)
    app.allow("b", subscribe=True)
    with app:
        deadline = time.monotonic() + 10
        while not client.reconnects and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                client.recv(timeout=0.05)
        on_loop(app, app.publish, "b", 5)
        assert client.recv(5)["payload"] == 5 and list(client._topics) == ["b"] and "forbidden" in caplog.text
        client.close()

    def says_nothing(sock):
        time.sleep(1.3)
    with bad_server(b"\x88\x02\x03\xf4", says_nothing) as (url, _), hl.connect(url, reconnect=60) as client:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            client.recv(0.6)                                # not timeout_s, which is ten seconds
        assert time.monotonic() - began < 1.25
        client._lose(hl.Close(1006, "enough"))              # no goodbye: nobody would answer it


def test_a_client_of_many_topics_misses_none_when_it_comes_back():
    """Replays of one subscription must not move another's position before it has its own."""
    with running(tick_hz=0) as app:
        app.topic(">", history=1000)
        with hl.connect(app.url, reconnect=20) as client:
            for n in range(20):
                client.subscribe(f"own.{n}")
            client.subscribe(">")
            number = 0
            for _ in range(4):
                session, = app.sessions.values()
                on_loop(app, session.connection.abort, "cut")
                for _ in range(50):
                    number += 1
                    on_loop(app, app.publish, f"{'own' if number % 3 else 'other'}.{number % 20}", number)
                got = [client.recv(5) for _ in range(50)]
                assert sorted(each["payload"] for each in got) == list(range(number - 49, number + 1))
            with pytest.raises(TimeoutError):
                client.recv(.1)
            assert client.reconnects == 4


def test_a_client_comes_back_and_keeps_to_its_timeout():
    with bad_server(b"\x88\x02\x03\xf4", b"\x81\x01" + b"2") as (url, _), hl.connect(url, reconnect=5, timeout_s=0.5) as client:
        assert client.recv(5) == 2 and client.reconnects == 1       # 1012: the server restarts
    def deaf(sock):
        time.sleep(0.5)
    with bad_server(deaf) as (url, _), hl.connect(url, timeout_s=0.2) as client:
        client._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client._sock.send(b"x" * 8_000)             # until nothing goes out any more
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < 1.2
    port = free_port()
    with hl.Engine(port=port, handshake_s=0.4) as app:
        client = hl.connect(app.url, reconnect=0.7)
        listed = hl.connect(app.url, reconnect=0.4, timeout_s=0.2)
    assert list(listed) == []                               # no deadline was asked for, so none has passed
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        client.recv(0.3)
    assert time.monotonic() - began < 1
    assert client.recv() is None and 0.5 < time.monotonic() - began < 5
    client.close()


# =============================================================================
# 22  CLI - whole programs
# =============================================================================

@contextlib.contextmanager
def program(*arguments, cwd=HERE, module="horizon_lite", **environ):
    """`python -m horizon_lite ...` that has said where it listens; yields (process, url)."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=cwd, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environ})
    try:
        said = []
        while not said or not said[-1].startswith("listening "):
            said.append(process.stdout.readline())
            assert said[-1], process.stderr.read()
        process.said = said
        yield process, said[-1].split()[1]
    finally:
        process.kill()
        process.communicate()


def run_cli(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "horizon_lite", *arguments], cwd=options.pop("cwd", HERE),
                          capture_output=True, text=True, timeout=60, **options)


def test_the_command_alone_shows_a_moving_world():
    with program("--port", "0") as (process, url):
        said = "".join(process.stdout.readline() for _ in range(4))
        assert f"{url}/metrics" in said and f"{url.replace('http', 'ws')}/ws/data" in said and "100 players" in said
        with hl.connect(url, protocol="proto") as client:
            client.subscribe("world.moves", packed="f32")
            blocks = [hl.unpack_moves(client.recv(5).packed_movement.data) for _ in range(10)]
            assert all(len(block) == 100 for block in blocks[1:])
            assert blocks[1].keys() == blocks[-1].keys() and blocks[1] != blocks[-1]
            client.emit("chat", "message", {"text": "hi"})
            client.emit("chat", "message", "no text")


# -- map --

def run_map(*arguments, lines=(), **options):
    done = subprocess.run([sys.executable, "-m", "horizon_lite", "map", *map(str, arguments)], cwd=HERE, timeout=60, capture_output=True,
                          input="".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines), text=True, **options)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_map_computes_an_expression_for_every_line():
    assert run_map("-e", "temp * 9/5 + 32", lines=[{"temp": 100}, "\n", {"temp": 0, "x": None}]) == (0, [212.0, 32.0], "")
    assert run_map("-e", "value + count()", lines=[1, 2, "3"])[:2] == (0, [2, 4, 6])
    assert run_map("-e", "this['a b'] if 'a b' in this else None", lines=[{"a b": "ü"}, {}])[:2] == (0, ["ü", None])
    assert run_map("-e", "x - prev(x)", lines=[{"x": 1}, {"x": 5}])[:2] == (0, [4])
    assert run_map("-e", "window(x, 10).mean", lines=[{"x": 1, "timestamp_ms": 1}, {"x": 2, "timestamp_ms": 5000}, {"x": 3, "timestamp_ms": 12000}])[1] == [1, 1.5, 2.5]
    status, got, said = run_map("-e", "x / y", lines=[{"x": 1, "y": 2}, {"x": 1, "y": 0}, "bad\n", {"x": 1}, "[1]\n", {"x": 3, "y": 1}])
    assert (status, got) == (0, [0.5, 3.0]) and "line 2: x / y: division by zero" in said and "failures: lookup 2, zero_division 1, not_json 1" in said
    status, got, said = run_map("-e", "tmp * 2", lines=[{"temp": 1}])
    assert (status, got) == (1, []) and "tmp is missing" in said       # not one came through
    for arguments, status, hint in ((["-e", "a && b"], 2, "in Python: a and b"), ([], 2, "say -e EXPRESSION"), (["-e", "a", "--config", "x"], 2, "say -e"), (["-e", "a", "--workers", "2"], 2, "--workers"),
                                    (["--config", "none.toml"], 3, "No such file"), (["--workers", "0", "-e", "a"], 2, "--workers"), (["--check"], 2, "say -e")):
        done = run_map(*arguments)
        assert done[0] == status and hint in done[2] and "Traceback" not in done[2]


MAP = """output_topic = "out.{site}"
model = {name = "m", version = "v1"}
sources = {t = "plant.{site}.t", u = "plant.{site}.u"}
[mapping]
n = "count()"
sum = "t + u"
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_map_maps_messages_by_a_file_and_keeps_the_order_of_each_match(tmp_path, workers):
    file, state = tmp_path / "m.toml", tmp_path / "state"
    file.write_text(f'state_file = "{state}"\n' + MAP)
    lines = [{"topic": f"plant.s{n % 7}.{'tu'[n % 2]}", "payload": {"value": n, "timestamp_ms": n + 1}} for n in range(400)]
    lines[5] = {"topic": "plant.s5.u", "value": 5, "timestamp_ms": 6, "metadata": {"k": "v"}}
    lines[6] = {"topic": "plant.s6.t", "payload": '{"value": 6, "timestamp_ms": 7}'}
    whole = hl.Stream({**hl._read_stream(file), "state_file": ""})
    expected = [each for n, line in enumerate(lines) for each in whole.process(line["topic"], sample(n, n + 1), line.get("metadata"))]
    got = []
    for half in (lines[:200], ["junk\n", *lines[200:], {"topic": "else", "payload": {"value": 1, "timestamp_ms": 1}}, "5\n"]):
        status, out, said = run_map("--config", file, "--workers", workers, lines=half)
        got += out
        assert status == 0
    assert "not_json 1" in said and "not_object 1" in said and "unknown_topic 1" in said
    for site in range(7):
        assert [(each["topic"], json.dumps(each["payload"], separators=(",", ":")).encode()) for each in got if f".s{site}." in each["topic"]] == [
            each[:2] for each in expected if f".s{site}." in each.topic]
    assert len(got) == len(expected) and sum("metadata" in each for each in got) == 1
    stream = hl.Stream(file)
    assert stream.state() == whole.state() and state.exists()


def test_map_says_what_workers_cant_divide(tmp_path):
    (tmp_path / "m.toml").write_text(MAP.replace("{t", '{k = "k", t'))
    status, _, said = run_map("--config", tmp_path / "m.toml", "--workers", 2)
    assert status == 2 and "k has no wildcard" in said


def test_map_checks_a_file_by_its_own_tests(tmp_path):
    file = tmp_path / "m.toml"

    def check(text):
        file.write_text(MAP + text)
        done = subprocess.run([sys.executable, "-m", "horizon_lite", "map", "--config", str(file), "--check"], cwd=HERE, capture_output=True, text=True)
        return done.returncode, done.stdout or done.stderr
    good = """[[test]]
name = "adds"
input = [{topic = "plant.a.t", value = 0.1, timestamp_ms = 1}, {topic = "plant.a.u", payload = {value = 0.2, timestamp_ms = 2}}]
output = [{topic = "out.a._m_v1.n", value = 1}, {topic = "out.a._m_v1.n", payload = {value = 2, timestamp_ms = 2}}, {value = 0.3, metadata = {umh_topic = "out.a._m_v1.sum"}}]
"""
    assert check("") == (0, f"{file}: right; it has no [[test]]\n")
    assert check(good + "[[test]]\ninput = {topic = 'x', payload = 'junk'}\n") == (0, f"ok    adds\nok    test 2   (failures: not_json 1)\n{file}: 2 of 2 tests passed\n")
    for change, hint in (("value = 0.3", "output 3: got "), ("value = 1}", "output 1: got "), ("{topic = \"out.a._m_v1.n\", value = 1}, ", "output 3: got"), ("timestamp_ms = 2}}, {v", "output 2: got")):
        status, said = check(good.replace(change, {"value = 0.3": "value = 0.31", "value = 1}": "value = true}", "timestamp_ms = 2}}, {v": "timestamp_ms = 3}}, {v"}.get(change, "")))
        assert status == 1 and "FAIL  adds" in said and hint in said and "0 of 1 tests passed" in said
    status, said = check(good.replace("output = [", "output = [{}, {}, {}, "))
    assert status == 1 and "output 6: got       nothing" in said
    for bad, hint in (("[[test]]\ninputt = 3\n", "did you mean 'input'"), ("[test]\n", "[[test]]"), ("[mapping.x]\ny = 'z &&'\n", "mapping.x.y"), ("[[test]]\ninput = [3]\n", "")):
        status, said = check(bad)
        assert status in (2, 3) and hint in said and "Traceback" not in said


def test_map_emits_lines_as_they_come_and_ends_silently_with_its_reader(tmp_path):
    with subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "-e", "x + 1"], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for n in range(3):
            process.stdin.write(b'{"x": %d}\n' % n)
            process.stdin.flush()
            assert process.stdout.readline() == b"%d\n" % (n + 1)
        process.stdin.write(b'{"x": "' + b"y" * (3 << 20) + b'"}\n{"x": 9}')      # a line that is too long, and one without an end
        process.stdin.close()
        assert process.stdout.read() == b"10\n" and b"too_big 1" in process.stderr.read()
    done = subprocess.run(f"yes '{{\"x\": 1}}' | {sys.executable} -m horizon_lite map -e x | head -3", shell=True, cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "1\n1\n1\n" and done.stderr == ""
    with subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "-e", "x"], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b'{"x": 1}\n')
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130 and process.stderr.read() == b""


def test_map_survives_odd_metadata_a_bom_and_a_closed_stdout(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text(MAP)
    good = json.dumps({"topic": "plant.a.t", "payload": {"value": 1, "timestamp_ms": 1}, "metadata": {"k": "v"}}) + "\n"
    odd = [good.replace('"v"', each) for each in ("1e400", '"\\ud800"', "{}", "[" * 70 + "]" * 70)] + [good.replace('{"k": "v"}', "5")]
    for workers in (1, 2):
        status, got, said = run_map("--config", file, "--workers", workers, lines=["\ufeff" + good, *odd, good])
        assert status == 0 and [each["payload"]["value"] for each in got] == [1, 2, 3] and "Traceback" not in said and "too_deep 1" in said
    done = subprocess.run(f"echo '{{}}' | {sys.executable} -m horizon_lite map -e 1 >&-", shell=True, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "horizon_lite: stdout is closed\n"
    done = subprocess.run(f"echo x | {sys.executable} -m horizon_lite map -e 1 2>&-", shell=True, cwd=HERE, capture_output=True, text=True)
    assert done.stdout == ""


def test_map_with_workers_ends_as_it_does_alone(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text(f'state_file = "{tmp_path}/state"\n' + MAP)
    line = json.dumps({"topic": "plant.a.t", "payload": {"value": 1, "timestamp_ms": 1}})
    done = subprocess.run(f"for n in $(seq 20000); do echo '{line}'; done | {sys.executable} -m horizon_lite map --config {file} --workers 2 | head -1",
                          shell=True, cwd=HERE, capture_output=True, text=True)
    assert json.loads(done.stdout)["payload"]["value"] == 1 and done.stderr == ""
    for when, number in ((0.0, signal.SIGINT), (1.5, signal.SIGINT), (1.5, signal.SIGTERM), (1.5, signal.SIGHUP)):
        (tmp_path / "state").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "--config", str(file), "--workers", "2"], cwd=HERE, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        process.stdin.write(line + "\n")
        process.stdin.flush()
        if when:
            assert process.stdout.readline()
        else:                           # while workers start
            wait_until(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(), 20)
        os.killpg(process.pid, number)          # as a terminal does, and systemd
        assert process.wait(20) == 128 + number
        said = process.stderr.read()
        assert "Traceback" not in said and (not when or (tmp_path / "state").exists()), said
        process.stdin.close()
        process.stdout.close()
        process.stderr.close()


def test_workers_share_a_state_of_more_matches_than_one_has(tmp_path):
    file, state = tmp_path / "m.toml", tmp_path / "state"
    file.write_text(f'state_file = "{state}"\noutput_topic = "out"\nmodel = {{name = "m", version = "v1"}}\nsources = {{t = "plant.*.t"}}\nmapping = {{n = "count()"}}\n')
    lines = [json.dumps({"topic": f"plant.m{n}.t", "payload": {"value": n, "timestamp_ms": 1}}) + "\n" for n in range(hl._MAX_MATCHES + 2000)]
    for turn in (1, 2):
        status, got, said = run_map("--config", file, "--workers", 2, lines=lines)
        assert status == 0 and said == "" and [each["payload"]["value"] for each in got] == [turn] * len(lines)
    assert len(json.loads(state.read_bytes().partition(b"\n")[2])["matches"]) == len(lines)
    state.write_bytes(b"damaged")
    status, got, said = run_map("--config", file, "--workers", 2, lines=lines[:5])
    assert len(got) == 5 and said.count("set aside") == 1 and (tmp_path / "state.damaged").exists()
    state.write_bytes(b"damaged")
    done = subprocess.run([sys.executable, "-m", "horizon_lite", "map", "--config", str(file), "--check"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and state.read_bytes() == b"damaged"           # it only looks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_map_has_counted_is_also_written_whatever_ends_it(tmp_path, number):
    file, state = tmp_path / "m.toml", tmp_path / "state"
    file.write_text(f'state_file = "{state}"\n' + MAP.replace('sum = "t + u"\n', ""))
    line = json.dumps({"topic": "plant.a.t", "payload": {"value": 1, "timestamp_ms": 1}}).encode() + b"\n"
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "--config", str(file)], cwd=HERE, stdin=subprocess.PIPE, stdout=out)
        end = time.monotonic() + 0.8
        with contextlib.suppress(BrokenPipeError):
            while process.poll() is None:
                process.stdin.write(line * 500)
                if time.monotonic() > end:
                    end = math.inf
                    process.send_signal(number)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        assert process.wait(10) == 128 + number
    written = (tmp_path / "out").read_bytes().splitlines()
    assert json.loads(written[-1])["payload"]["value"] == len(written) > 500
    (match,) = json.loads(state.read_bytes().partition(b"\n")[2])["matches"]
    assert match["cells"] == [["n", "count()", len(written)]]


def test_workers_end_with_the_process_that_began_them(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text(MAP)
    process = subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "--config", str(file), "--workers", "2"], cwd=HERE,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdin.write(b'{"topic": "plant.a.t", "payload": {"value": 1, "timestamp_ms": 1}}\n')
    process.stdin.flush()
    assert process.stdout.readline()
    children = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.communicate(timeout=20)
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2] for child in children), 10)


def test_map_tells_of_a_worker_that_is_gone(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text(MAP)
    line = json.dumps({"topic": "plant.a.t", "payload": {"value": 1, "timestamp_ms": 1}}) + "\n"
    process = subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "--config", str(file), "--workers", "2"], cwd=HERE, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(line)
    process.stdin.flush()
    assert process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    _, said = process.communicate(line, timeout=20)
    assert process.returncode == 1 and said.startswith("horizon_lite: a worker has ended") or "a worker has ended" in said and "Traceback" not in said


def test_map_shows_progress_on_a_terminal():
    import pty
    import select
    reader, writer = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "horizon_lite", "map", "-e", "x"], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=writer)
    count, end = 0, time.monotonic() + 20
    while not select.select([reader], [], [], 0.1)[0] and time.monotonic() < end:
        process.stdin.write(b'{"x": 1}\n' * 10)
        process.stdin.flush()
        count += 10
    shown = os.read(reader, 10_000).decode()
    assert re.fullmatch(r"\r\x1b\[K\d+ lines, [\d,]+/s", shown)
    process.stdin.write(b"junk\n")
    process.stdin.close()
    assert process.wait(10) == 0
    os.close(writer)
    shown = ""
    with contextlib.suppress(OSError):          # the other end is closed
        while "not_json" not in shown:
            shown += os.read(reader, 10_000).decode()
    os.close(reader)
    assert f"\r\x1b[K{count + 1} lines, " in shown and "/s; failures: not_json 1" in shown


def test_sighup_reads_mappings_anew_and_a_terminal_that_is_gone_ends_it(tmp_path):
    file = tmp_path / "horizon.toml"
    text = '[server]\ntick_hz = 100\n[stream]\noutput_topic = "out"\nmodel = {name = "m", version = "v1"}\nsources = {x = "in.x"}\n[stream.mapping]\n'
    file.write_text(text + 'n = "count()"\n')
    with program("serve", "--port", "0", "--config", str(file)) as (process, url), hl.connect(url) as client:
        client.subscribe("out.>")
        client.publish("in.x", {"value": 1, "timestamp_ms": 1})
        assert heard(client)["payload"]["value"] == 1
        file.write_text(text + 'n = "count()"\nd = "x - prev(x)"\nx = "x"\n')
        process.send_signal(signal.SIGHUP)
        said = process.stderr.readline()
        assert "read anew" in said
        client.publish("in.x", {"value": 5, "timestamp_ms": 1})
        assert [heard(client)["payload"]["value"] for _ in range(2)] == [2, 5]
    with program("serve", "--port", "0") as (process, url):
        process.send_signal(signal.SIGHUP)
        assert process.wait(5) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_gracefully(number):
    with program("serve", "--port", "0") as (process, url), hl.connect(url) as client:
        process.send_signal(number)
        assert client.recv(5) is None and client.closed.code == 1001
        assert process.wait(5) == 0 and process.stderr.read() == ""


def test_a_second_signal_ends_it_at_once(tmp_path):
    (tmp_path / "app.py").write_text("import time, horizon_lite as hl\napp = hl.Engine()\n"
                                     "app.on_core('server_stopping')(lambda event: print('going', flush=True))\n")
    with program("serve", os.fspath(tmp_path / "app.py"), "--port", "0") as (process, url):
        sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        sock.sendall(UPGRADE + b"\r\n")
        sock.recv(1000)                         # and never answers the goodbye
        process.send_signal(signal.SIGINT)
        while "going" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(5) == 130 and time.monotonic() - began < 1
        sock.close()


def test_the_next_free_port_is_taken_and_said_unless_one_was_asked_for():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):      # somebody else has it: as good
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        with program() as (process, url):
            assert int(url.rpartition(":")[2]) > 8080 and "(port 8080 is taken)" in process.said[-1]
            assert "WARN" not in process.said[-1]
        done = run_cli("serve", "--port", "8080")
        assert done.returncode == 4 and "in use" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, status, words", [
    (["--help"], 0, "examples:"), (["--version"], 0, f"horizon_lite {hl.__version__} (Python "),
    (["serve", "--help"], 0, "--max-connections"), (["load", "--help"], 0, "--players"), (["proto"], 0, 'syntax = "proto3"'),
    (["dance"], 2, "invalid choice"), (["serve", "--nothing"], 2, "unrecognized"), (["load", "--players", "0"], 2, "int from 1"),
    (["serve", "--port", "x"], 2, "invalid int"), (["serve", "--port", "70000"], 3, "65535"), (["serve", "--host", "0.0.0.0", "--port", "0"], 3, "insecure"),
    (["serve", "--config", "missing.toml"], 3, "missing.toml"), (["demo", "--tick-hz", "0"], 3, "tick_hz"),
    (["serve", "missing.py"], 2, "no file"), (["serve", "no_such_module"], 2, "no module"),
    (["serve", "no.such.module:app"], 2, "no module"), (["serve", ""], 2, "neither"), (["serve", ":app"], 2, "neither"),
    (["serve", "./x"], 2, "neither"), (["serve", "json:dumps"], 2, "no Engine"),
    (["load", "--url", "http://127.0.0.1:1"], 1, "refused"), (["load", "--url", "http://.x/"], 1, "label"),
    (["load", "--url", "nonsense"], 2, "write it like"),
])
def test_exit_statuses(arguments, status, words):
    done = run_cli(*arguments)
    assert done.returncode == status, done
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert status == 0 or not done.stdout


def test_a_broken_pipe_is_silent():
    done = subprocess.run(f"{sys.executable} -m horizon_lite proto | head -1", shell=True, cwd=HERE,
                          capture_output=True, text=True)
    assert done.stdout.startswith("//") and done.stderr == ""


APP = """
import horizon_lite as hl
app = hl.Engine(tick_hz=10)
@app.get("/who")
def who(request):
    import __main__
    return {"same": hl.Engine is __main__.Engine, "hz": app.config.tick_hz, "module": hl.__file__}
"""


@pytest.mark.parametrize("ending", ["", "if __name__ == '__main__': app.run()\n", "app.run()\n",
                                    "def main():\n    app.run()\nmain()\nprint('after')\n"])
def test_serve_runs_a_users_file_with_the_very_same_engine(tmp_path, ending):
    (tmp_path / "mine.py").write_text(APP + ending)
    for target in ("mine.py", "mine:app"):
        with program("serve", target, "--port", "0", "--tick-hz", "20", cwd=tmp_path, PYTHONPATH=os.fspath(HERE)) as (
                process, url):
            answer = json.loads(urllib.request.urlopen(url + "/who").read())
            assert answer["same"] is True and answer["hz"] == 20.0
            process.terminate()
            assert process.wait(5) == 0
            assert ("after" in process.stdout.read()) == ("after" in ending)


def test_serve_runs_a_file_that_keeps_its_engine_to_itself(tmp_path):
    (tmp_path / "factory.py").write_text("import horizon_lite as hl\ndef main():\n    app = hl.Engine(port=0)\n"
                                         "    print('at', app.url, flush=True)\n    app.run()\nmain()\n")
    with program("serve", "factory.py", cwd=tmp_path, PYTHONPATH=os.fspath(HERE)) as (process, url):
        process.terminate()
        assert process.wait(5) == 0 and process.stderr.read() == ""


def test_the_file_works_when_it_was_copied_into_a_package(tmp_path):
    package = tmp_path / "game"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "horizon_lite.py").write_text(TEXT)
    (tmp_path / "mine.py").write_text(APP.replace("import horizon_lite as hl", "from game import horizon_lite as hl"))
    with program("serve", "mine.py", "--port", "0", cwd=tmp_path, module="game.horizon_lite") as (process, url):
        answer = json.loads(urllib.request.urlopen(url + "/who").read())
        assert answer["same"] is True and answer["module"] == os.fspath(package / "horizon_lite.py")


def test_load_drives_a_server_of_its_own_and_loses_nothing():
    done = run_cli("load", "--players", "20", "--hz", "50", "--for", str(SOAK), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= {"events_sent", "events_received", "frames_received", "lost", "latency_ms", "overruns",
                           "server_cpu_s", "server_rss_mb"}
    sent = 20 * 50 * SOAK
    assert abs(result["events_sent"] - sent) < sent * 0.1 and result["lost"] == 0
    assert result["critical_received"] == result["critical_sent"] * 20 > 0
    assert 5 < result["events_per_frame"] <= 22 and 0 < result["latency_ms"]["p50"] < 200
    assert result["latency_samples"] > sent / 4


def test_load_by_html_sees_every_line_that_was_said():
    done = run_cli("load", "--endpoint", "html", "--players", "20", "--hz", "60", "--for", "0.5", "--json")
    assert done.returncode == 0, done
    result = json.loads(done.stdout)
    assert result["players"] == 20 and 25 <= result["events_sent"] == result["events_seen"] and result["lost"] == 0
    assert result["fragments_received"] >= result["frames_received"] > 20 * 10 and result["latency_ms"]["p99"] > 0
    with running() as app:                              # one without fragments
        done = run_cli("load", "--url", app.url, "--endpoint", "html", "--players", "2", "--for", "0.1")
        assert done.returncode == 1 and "@app.html" in done.stderr and not done.stdout
    with program("serve", "--port", "0") as (process, url):
        text = run_cli("load", "--url", url, "--endpoint", "html", "--players", "2", "--for", "0.3").stdout
        assert "readers" in text and "latency ms" in text and "nan" not in text


def test_config_shows_every_setting_and_where_it_comes_from(tmp_path):
    path = tmp_path / "h.toml"
    path.write_text("[network]\ntick_hz = 30\nbatch_size = 4\n")
    done = run_cli("config", "--show", "--config", str(path), "--profile", "dev", "--port", "9000", env={**os.environ, "HORIZON_BATCH_SIZE": "6"})
    lines = dict(re.fullmatch(r"(\w+) = (.*\S) +# (.*)", line).group(1, 0) for line in done.stdout.splitlines())
    assert lines.keys() == hl._CONFIG_TYPES.keys()
    told = {name: tuple(map(str.strip, line.partition(" = ")[2].split("#"))) for name, line in lines.items()}
    assert told["tick_hz"] == ("30.0", str(path)) and told["batch_size"] == ("6", "HORIZON_BATCH_SIZE")
    assert told["firm_port"] == ("true", "--port") and told["batch_wait_ms"] == ("10.0", "profile dev") and told["port"] == ("9000", "--port") and told["idle_s"] == ("60.0", "default")
    plain = run_cli("config", "--profile", "high-scale")
    path.write_text(plain.stdout)                       # what it prints is a file that says the same
    assert hl.Config.load(path, {}).max_memory_mb == 2048 and "metrics = false" in plain.stdout
    path.write_text("tick_hx = 5")
    wrong = run_cli("config", "--config", str(path))
    assert wrong.returncode == 3 and "tick_hz" in wrong.stderr


def test_load_drives_a_running_server_and_speaks_to_people():
    with program("--port", "0") as (_, url):
        done = run_cli("load", "--url", url, "--players", "3", "--for", "1")
    assert done.returncode == 0 and re.search(r"^lost +0 ", done.stdout, re.MULTILINE), done


def test_load_says_when_the_server_goes_away():
    with program("serve", "--port", "0") as (process, url):
        load = subprocess.Popen([sys.executable, "-m", "horizon_lite", "load", "--url", url.replace("http", "ws") + "/ws/data",
                                 "--players", "3", "--for", "30"], cwd=HERE, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while b'type="PLAYER_MOVE"' not in urllib.request.urlopen(url + "/metrics").read():
            time.sleep(0.1)
        process.terminate()
        out, error = load.communicate(timeout=20)
    assert load.returncode == 1 and out == "" and "the server" in error and "Traceback" not in error


def test_a_short_load_is_short_and_measures_nothing_it_did_not_see():
    began = time.monotonic()
    done = run_cli("load", "--players", "1", "--hz", "0.1", "--for", "0.2", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and time.monotonic() - began < 8
    assert result["latency_ms"]["p50"] is None and result["latency_samples"] == 0


def test_load_fails_when_something_is_lost(tmp_path, monkeypatch, capsys):
    (tmp_path / "lossy.py").write_text("""
import itertools
import horizon_lite as hl
app = hl.Engine()
plain, numbers = hl.Topics.publish, itertools.count()
def lossy(self, *arguments, **options):
    return 0 if next(numbers) % 3 == 1 else plain(self, *arguments, **options)
hl.Topics.publish = lossy
""")
    with program("serve", os.fspath(tmp_path / "lossy.py"), "--port", "0") as (_, url):
        monkeypatch.setattr(hl, "_PATIENCE_S", 0.3)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        assert hl.main(["load", "--url", url, "--players", "4", "--for", "0.5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["lost"] > 0


# -- the page in a real browser --

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1200,800").split()


class Tab:
    """A page in Chromium, driven over its DevTools socket by our own client."""

    def __init__(self, address, url):
        ask = urllib.request.Request(f"http://{address}/json/new?{url}", method="PUT")
        target = json.loads(urllib.request.urlopen(ask).read())
        self.client = hl.connect(target["webSocketDebuggerUrl"])
        self.number = 0
        self.errors = []
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.number += 1
        self.client.send({"id": self.number, "method": method, "params": parameters})
        while True:
            message = self.client.recv(20)
            if message.get("id") == self.number:
                return message["result"]
            self.note(message)

    def note(self, message):
        entry = message.get("params", {}).get("entry", {})
        if message["method"] == "Runtime.exceptionThrown" or (
                message["method"] == "Log.entryAdded" and entry["level"] == "error" and entry["source"] != "network"):
            self.errors.append(message["params"])
        elif message["method"] == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
            self.errors.append(message["params"])

    def eval(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=15):
        wait_until(lambda: self.eval(expression), seconds)


@pytest.fixture
def chromium(tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not here: apt-get install chromium")
    process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "about:blank"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = tmp_path / "profile" / "DevToolsActivePort"
        wait_until(lambda: port.exists() and port.read_text().count("\n") >= 1, 30)
        yield f"127.0.0.1:{port.read_text().split()[0]}"
    finally:
        process.kill()
        process.wait()


def test_the_page_lives_in_a_real_browser(chromium):
    port = free_port()
    with contextlib.ExitStack() as server:
        _, url = server.enter_context(program("--port", str(port)))
        one, two = Tab(chromium, url), Tab(chromium, url)
        for tab in (one, two):
            tab.wait("document.querySelector('#status')?.textContent === 'connected'")
            tab.wait("players.size === 102")            # 100 walkers and two windows
        before = one.eval("JSON.stringify([...players])")
        one.wait(f"JSON.stringify([...players]) !== {json.dumps(before)}")

        # the keyboard moves you, and the other window sees it
        mine, at = one.eval("me"), one.eval("own.x")
        seen = two.eval(f"players.get('{mine}').x")
        key = "ArrowLeft" if at > 500 else "d"
        one.call("Page.bringToFront")               # pages behind do not draw, nor walk
        one.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        one.wait(f"Math.abs(own.x - {at}) > 30")
        one.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        two.wait(f"Math.abs(players.get('{mine}').x - {seen}) > 30")
        # so does the mouse
        box = one.eval("JSON.stringify(document.querySelector('#world').getBoundingClientRect())")
        box = json.loads(box)
        for kind in ("mousePressed", "mouseReleased"):
            one.call("Input.dispatchMouseEvent", type=kind, x=box["x"] + box["width"] / 2,
                     y=box["y"] + box["height"] / 2, button="left", clickCount=1)
        one.wait("Math.hypot(own.x - 500, own.y - 500) < 5")

        # chat, presence, figures
        one.eval("document.querySelector('#text').value = '<b>hello</b>'; document.querySelector('#say').requestSubmit()")
        two.wait("document.querySelector('#log').textContent.includes('<b>hello</b>')")
        two.wait("document.querySelector('#online').textContent === '2'")
        two.wait("document.querySelector('#count').textContent.startsWith('102 players moving about, 2 online')")
        two.wait("document.querySelector('#connections').textContent === '2' && parseFloat(document.querySelector('#tick').textContent) > 0")
        drawn = ("(() => { const c = document.querySelector('#world'); const d = c.getContext('2d')"
                 ".getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n })()")
        two.call("Page.bringToFront")
        two.wait(f"{drawn} > 3000")

        # what others publish into the chat can't hurt
        with hl.connect(url) as rude:
            for payload in (None, 5, {"from": 1}, {"text": {}}, {"from": None, "text": "fine"}):
                rude.publish("chat.lobby", payload)
        two.wait("document.querySelector('#log').textContent.includes('somebody: fine')")

        # the server is killed and comes back
        server.pop_all().close()
        for tab in (one, two):
            tab.wait("document.querySelector('#status').textContent.includes('trying again')")
            tab.eval("document.querySelector('#text').value = 'kept'; document.querySelector('#say').requestSubmit()")
            assert tab.eval("document.querySelector('#text').value") == "kept"
        with program("--port", str(port)):
            for tab in (one, two):
                tab.wait("document.querySelector('#status')?.textContent === 'connected' && players.size === 102", 30)
            assert one.errors == two.errors == []


def test_the_page_shows_what_you_see_of_the_world(chromium):
    with program("--port", "0", "--objects", "500", "--players", "3") as (_, url):
        tab = Tab(chromium, url)
        tab.wait("document.querySelector('#status')?.textContent === 'connected' && told !== null && stones.size > 5")
        tab.call("Page.bringToFront")
        assert tab.eval("document.querySelector('#demo').hidden") is False
        tab.wait("document.querySelector('#count').textContent.includes('stones near you')")
        # objects are where the server says they are, in the zones it says
        tab.eval("emit('movement', 'position', {x: own.x = 500, y: own.y = 500}); moved = true")
        tab.wait("[...stones.values()].every(each => Math.hypot(each.x - 500, each.y - 500) < 400 * 1.05 + 60) && stones.size > 150")
        tab.wait("[...stones.values()].some(each => each.channels.has(0)) && [...stones.values()].some(each => !each.channels.has(2))")
        before = tab.eval("JSON.stringify([...stones.values()].map(each => each.x))")
        tab.wait(f"JSON.stringify([...stones.values()].map(each => each.x)) !== {json.dumps(before)}")
        # you go, and some enter and some leave, visibly
        known = tab.eval("JSON.stringify([...stones.keys()])")
        tab.eval("own.x = 100; own.y = 100; moved = true")
        tab.wait(f"(() => {{ const old = new Set({known}); return [...stones.keys()].some(id => !old.has(id)) && leaving.length > 0 }})()")
        tab.wait("leaving.length === 0")
        rings = ("(() => { const pen = document.querySelector('#world').getContext('2d'), r = devicePixelRatio || 1; let n = 0;"
                 "for (let a = 0; a < 6.28; a += 0.02) { const x = (fit.x + (own.x + 60 * Math.cos(a)) * fit.scale) * r, y = (fit.y + (own.y + 60 * Math.sin(a)) * fit.scale) * r;"
                 "const [red, , blue, alpha] = pen.getImageData(x, y, 1, 1).data; n += alpha > 60 && blue > red } return n })()")
        tab.wait(f"{rings} > 150")
        # the slider
        tab.eval("$('density').value = 1500; $('density').dispatchEvent(new Event('input'))")
        tab.wait("told.objects === 1500 && $('stones').textContent === '1,500' && parseFloat($('now').textContent) > 0 && $('load').max > 0")
        # a slow client
        tab.eval("own.x = 500; own.y = 500; moved = true")
        tab.wait("told.owed === 0 && stones.size > 500")
        tab.eval("$('slow').click()")
        tab.wait("told.slow && told.left_out > 0 && told.coalesced > 100 && told.dropped > 0")
        tab.wait("parseInt($('bytes').textContent.replace(',', '')) < 8000")
        assert tab.eval("$('coalesced').textContent") != "0"
        tab.eval("$('slow').click()")
        tab.wait("!told.slow && told.owed === 0")
        for data in ({"count": 99}, {"count": 5_001}, {"count": True}, {}, None):
            with hl.connect(url) as rude:
                rude.emit("demo", "density", data)
                assert rude.recv(5)["error"]["code"] == "cancelled"
        with hl.connect(url) as rude:
            rude.emit("demo", "slow", {"on": 1})
            assert rude.recv(5)["error"]["code"] == "cancelled"
        assert tab.errors == []
    with program("serve", "--port", "0") as (_, url):
        plain = Tab(chromium, url)
        plain.wait("document.querySelector('#status')?.textContent === 'connected'")
        assert plain.eval("document.querySelector('#demo').hidden") and plain.errors == []


# -- a long run --

def test_a_steady_engine_keeps_no_memory():
    with running() as app, hl.connect(app.url, protocol="proto") as client:
        client.subscribe("t")

        def events(count):
            for number in range(count):
                app.publish("t", number)
                app.movement.move(b"a" * 16, number, 0, 0)
                app.emit("core:x", number)

        def drain(last):
            while json.loads(client.recv(5).topic_message.payload) != last:
                pass
        for _ in range(20):
            on_loop(app, events, 200)
            drain(199)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(int(20 * SOAK)):
            on_loop(app, events, 200)
            drain(199)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert grown < 100_000 and app.drops.total() == 0


def test_html_fragments_live_in_a_real_browser(chromium):
    port = free_port()
    with contextlib.ExitStack() as server:
        _, url = server.enter_context(program("serve", "--port", str(port), "--presence-debounce-s", "0"))
        one, two = Tab(chromium, url + "/html"), Tab(chromium, url + "/html")
        for tab in (one, two):
            tab.wait("document.querySelector('#online')?.textContent.startsWith('2 online')")
        say = "document.querySelector('input[name=text]').value = '%s'; document.querySelector('form').requestSubmit()"
        one.eval(say % "1 < 2 & <b>so</b>")
        for tab in (one, two):
            tab.wait("document.querySelector('#log li')?.textContent.endsWith('1 < 2 & <b>so</b>')")
        assert one.eval("document.querySelector('input[name=text]').value") == "" and not one.eval("!!document.querySelector('#log li b b')")
        one.eval("document.addEventListener('horizon:reply', event => { window.reply = event.detail; })")
        one.eval(say % "   ")
        one.wait("window.reply?.error?.code === 'cancelled'")
        server.close()
        server.enter_context(program("serve", "--port", str(port)))
        for tab in (one, two):                          # it comes back by itself
            tab.wait("document.querySelector('#online').textContent.startsWith('2 online') && !document.querySelector('#log li')")
        assert one.errors == two.errors == []


def test_the_page_asks_for_the_chat_that_it_missed(chromium):
    with running() as app:
        app.topic("chat.lobby", history=3)
        tab = Tab(chromium, app.url)
        tab.wait("document.querySelector('#status')?.textContent === 'connected'")
        wait_until(lambda: app.topics.matching("chat.lobby"))
        say = lambda n: app.publish("chat.lobby", {"from": "ada", "text": str(n)})
        log = "[...document.querySelectorAll('#log li')].map(each => each.textContent.slice(-1)).join('')"
        on_loop(app, lambda: (say(1), say(2)))
        tab.wait(f"{log} === '12'")
        session, = app.sessions.values()
        on_loop(app, lambda: (session.connection.abort("cut"), say(3), say(4)))
        tab.wait(f"{log} === '1234'")
        session, = app.sessions.values()
        on_loop(app, lambda: (session.connection.abort("cut"), [say(n) for n in range(5, 10)]))
        tab.wait(f"{log} === '1234)'")                  # "(what was said before is lost)"
        on_loop(app, say, 0)
        tab.wait(f"{log} === '1234)0'")
        tab.client.close()


def node_module(path):
    node = shutil.which("node")
    found = subprocess.run([node, "-p", f"require.resolve({path!r})"], capture_output=True, text=True) if node else None
    if found is None or found.returncode:
        pytest.skip("install Node, npm install htmx.org@2 htmx-ext-ws@2 htmx4@npm:htmx.org@4, and set NODE_PATH to its node_modules")
    return Path(found.stdout.strip())


@pytest.mark.parametrize("scripts, connect, send", [
    (("htmx.org/dist/htmx.js", "htmx-ext-ws/dist/ws.js"), 'hx-ext="ws" ws-connect="/ws/html"', "ws-send"),
    (("htmx4/dist/htmx.js", "htmx4/dist/ext/hx-ws.js"), 'hx-ws:connect="/ws/html" hx-swap="none"', "hx-ws:send"),
])
def test_htmx_puts_our_fragments_in_their_places(chromium, scripts, connect, send):
    scripts = list(map(node_module, scripts))
    with running() as app:
        for number, script in enumerate(scripts):
            app.get(f"/{number}.js")(lambda request, script=script: hl.Response(script.read_text(), content_type="text/javascript"))

        @app.html("presence")
        def online():
            return hl.html('<p id="online" hx-swap-oob="true">{n}</p>', n=app.presence.online())

        @app.on_client("chat", "message")
        def say(event):
            app.broadcast(hl.html('<ul id="log" hx-swap-oob="beforeend"><li>{x}</li></ul>', x=event.data["text"]), endpoint="html")

        app.get("/own")(lambda request: hl.Response(f"""<!doctype html><script src="/0.js"></script><script src="/1.js"></script>
            <body><div {connect}><p id="online"></p><ul id="log"></ul>
            <form {send}><input type="hidden" name="namespace" value="chat"><input type="hidden" name="event" value="message">
            <input name="text"></form></div></body>""", content_type="text/html; charset=utf-8"))
        tab = Tab(chromium, app.url + "/own")
        tab.wait("document.querySelector('#online')?.textContent === '1'")
        for text in ("one", "<two>"):
            tab.eval(f"document.querySelector('input[name=text]').value = {text!r}; document.querySelector('form').requestSubmit()")
            tab.wait(f"document.querySelector('#log li:last-child')?.textContent === {text!r}")
        assert tab.eval("document.querySelectorAll('#log li').length") == 2 and tab.errors == []
        with hl.connect(app.url):
            tab.wait("document.querySelector('#online')?.textContent === '2'")
        tab.client.close()


def code_blocks(kind, path=README):
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_the_plugin_of_the_readme_is_started_and_filters(tmp_path):
    (text,) = [each for each in python_blocks(README) if "plugin.run()" in each]
    (table,) = [each for each in code_blocks("toml") if "[[plugins]]" in each]
    assert len([line for line in text.splitlines() if line.strip() and not line.startswith("import")]) <= 12
    (tmp_path / "filter.py").write_text(text)
    (tmp_path / "horizon_lite.py").write_text(TEXT)
    (tmp_path / "plugins.toml").write_text(table.replace('"python3"', repr(sys.executable)))
    with program("serve", "--port", "0", "--plugins", "plugins.toml", cwd=tmp_path) as (_, url), hl.connect(url) as client:
        client.subscribe("chat.lobby")
        deadline = time.monotonic() + 15
        while json.loads(fetch(f"{url}/stats.json"))["programs"]["filter"].get("wanted") != ["CHAT", "PLAYER_JOIN"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        client.send({"namespace": "chat", "event": "message", "data": {"text": "spam"}, "id": 1})
        assert client.recv(5)["error"]["message"] == "no spam, please"
        client.send({"namespace": "chat", "event": "message", "data": {"text": "darn it"}})
        assert client.recv(5)["payload"]["text"] == "d**n it"
        with hl.connect(url) as other:                  # its welcome is in the lobby, too
            assert other.recv(5)["data"]["text"].startswith("welcome, guest-")
            said = [client.recv(5) for _ in range(2)]
            assert any(each.get("payload", {}).get("from") == "filter" for each in said)


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def test_the_readmes_plugin_in_javascript_filters_by_a_protobuf_library(tmp_path):
    if shutil.which("node") is None or subprocess.run(["node", "-e", "require('protobufjs')"], capture_output=True).returncode:
        pytest.skip("install Node, npm install protobufjs, and set NODE_PATH to its node_modules")
    (text,) = [each for each in code_blocks("js") if "protobufjs" in each]
    (tmp_path / "filter.js").write_text(text)
    (tmp_path / "horizon.proto").write_text(run_cli("proto").stdout)
    (tmp_path / "plugins.toml").write_text('[[plugins]]\nid = "filter"\ncommand = "node"\narguments = ["filter.js"]\n')
    with running(plugins=[f"{tmp_path}/plugins.toml"], plugin_reply_ms=5000) as app:
        app.on_client("chat", "message")(lambda event: event.client.send(event.data))
        wait_until(lambda: app.host.wants("CHAT"), 20)
        with hl.connect(app.url) as client:
            for text in ["spam"] * 3 + ["hello"] * 3:
                client.send({"namespace": "chat", "event": "message", "data": {"text": text}, "id": 1})
            got = [client.recv(5) for _ in range(9)]
            assert [each for each in got if "id" in each] == [{"id": 1, "error": {
                "code": "cancelled", "message": "plugin filter has cancelled it"}}] * 3 + [{"id": 1, "ok": True}] * 3
            assert got.count({"text": "hello"}) == 3 and app.host.answers["answered"] == 6


def test_the_demo_worlds_movement_reaches_a_plugin(tmp_path):
    address = f"unix://{tmp_path}/p.sock"
    with program("--port", "0", "--players", "150", "--plugins-listen", address) as (_, url):
        plugin, moves = hl.RemotePlugin("watcher", address), collections.defaultdict(list)
        batches = []
        plugin.on("PLAYER_MOVE")(lambda event: moves[event.player_uuid].append((event.x, event.y)))
        with plugin:
            while not moves or min(map(len, moves.values())) < 10:
                assert plugin.step(5)
                batches.append(sum(map(len, moves.values())))
        assert len(moves) == 150 and all(len(set(path)) > 5 for path in moves.values())
        assert b"horizon_plugins_events_sent_total" in fetch(f"{url}/metrics")


def test_a_served_file_is_read_again_when_it_changes(tmp_path):
    text = """\
import horizon_lite as hl
import parts
from bought import Bought
class Mine(hl.Engine): pass
app = Mine(port=8080)
class Inner(hl.Plugin):
    def register(self, app):
        app.on_client("inner", "ask")(lambda event: event.client.send("inner ANSWER"))
app.load(Inner, Bought, "kept.py")
@app.on_client("hot", "ask")
def ask(event):
    event.client.send("ANSWER" + parts.MORE)
@app.get("/answer")
def get(request):
    return "ANSWER" + parts.MORE
@app.authenticate
def who(request):
    return "ANSWER"
parts.register(app)
LAST
assert "ANSWER" == "one"
"""
    plugin = "import horizon_lite as hl\nclass {}(hl.Plugin):\n    starts = 0\n    def on_start(self):\n        self.starts += 1\n    def register(self, app):\n        app.get('/{}')(lambda request: str(self.starts))\n"
    (tmp_path / "kept.py").write_text(plugin.format("Kept", "kept"))
    (tmp_path / "bought.py").write_text(plugin.format("Bought", "bought"))
    stamps = itertools.count(1)

    def put(name, text):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, ns=(0, next(stamps)))     # as if within the same second

    def write(answer, last=""):
        put("app.py", text.replace("ANSWER", answer).replace("LAST", last))

    def write_parts(more):
        put("parts.py", f"MORE = {more!r}\ndef register(app):\n    app.get('/parts')(lambda request: MORE)\n")

    write("one", "app.run()")
    write_parts("")
    with program("serve", "app.py", "--reload", "--port", "0", cwd=tmp_path, PYTHONPATH=os.fspath(HERE)) as (process, url):
        with hl.connect(url) as client:
            def answers():
                client.emit("hot", "ask")
                client.emit("inner", "ask")
                return {client.recv(5), client.recv(5), fetch(f"{url}/answer").decode()}, fetch(f"{url}/parts").decode()

            def wait_for(answer, more=""):
                deadline = time.monotonic() + 10
                while answers() != ({answer + more, f"inner {answer}"}, more):
                    assert time.monotonic() < deadline, answers()
                    time.sleep(0.1)

            wait_for("one")

            def counted():
                text = fetch(f"{url}/metrics").decode()
                return re.search(r"^event_handlers_registered (\d+)", text, re.M)[1]

            handlers = counted()
            write("two", "app.run()")
            wait_for("two")
            write_parts("!")                            # a module of its own
            wait_for("two", "!")
            for wrong in ("1 / 0", "raise SystemExit(1)"):      # after all was registered
                write("bad", wrong)
                time.sleep(0.5)
                wait_for("two", "!")
            write("six", "app.run()")
            wait_for("six", "!")
            write_parts("?")                            # both at once
            write("ten", "app.run()")
            wait_for("ten", "?")
            assert counted() == handlers
            assert client.closed is None and fetch(f"{url}/kept") == b"1"       # what has not changed goes on
            plugins = json.loads(fetch(f"{url}/stats.json"))["plugins"]
            assert {name: each["state"] for name, each in plugins.items()} == dict.fromkeys(("inner", "bought", "kept"), "running")
        process.terminate()
        said = process.communicate()[1]
        assert "ZeroDivisionError" in said and "what it was stays" in said and process.returncode == 0
