"""horizon_lite - a real-time engine in one file, with nothing but the standard library.

    import horizon_lite as hl

    app = hl.Engine()

    @app.on_client("chat", "message")
    def chat(event):
        if "spam" in event.data["text"]:
            event.cancel("no spam, please")
        else:
            app.publish("chat.lobby", {"from": event.client.user, "text": event.data["text"]})

    app.run()                       # page, WebSocket and /metrics on one port

Copy this file into your project, or look at it first:  python -m horizon_lite

Map.  Each section uses only the sections above it (the tests check).  Numbers that are
missing here are kept for sections that are still to be built.

     1  ERRORS       what can go wrong, sorted by whose fault it is
     2  METRICS      counters, gauges, histograms, and their text form
     3  WIRE         varints and tags: integers <-> bytes
     4  SCHEMA       message classes; the only section that generates code
     5  PROTO        .proto text to classes and back; the built-in schema; packed movement
     6  POOLS        free lists: objects reused instead of allocated
     7  BUS          events between the parts of one program
     8  TOPICS       subjects, wildcards, history, who is here, HTML fragments
     9  STREAM       expressions, mappings, topic templates
    10  SPACE        who is near
    11  REPLICATION  where everybody is; who is told what of things, how often
    12  TICKS        when to run, and what waits for whom until then
    13  PROTOCOLS    HTTP/1.1 and WebSocket without sockets
    14  TRANSPORT    the selector loop; all server sockets live here
    15  PLUGINS      what is added: classes in this process, programs beside it
    17  MONITOR      garbage collection, memory, processor time
    18  CONFIG       the settings, their presets, and where a value came from
    19  PAGE         the browser page, one string
    20  ENGINE       the parts joined: start reading here if in a hurry
    21  CLIENT       a small blocking client
    22  CLI          python -m horizon_lite

Rules kept throughout.  One thread runs the loop and all synchronous handlers; everything
else enters by Engine.call_soon.  Times are integer nanoseconds inside, float seconds at
the edge.  Sizes are bytes.  The peer's mistakes raise PeerError, yours UsageError.  Code
marked HOT is written for speed; each has a plain twin in the tests and a row in
bench_horizon_lite.py.
"""

from __future__ import annotations

import ast
import bisect
import codecs
import contextlib
import dataclasses
import difflib
import enum
import errno
import functools
import gc
import heapq
import itertools
import json
import keyword
import linecache
import logging
import math
import operator
import os
import re
import reprlib
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import warnings
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import (Callable, Collection, Container, Hashable, Iterable, Iterator, Mapping,
                             MappingView, Sequence)
from types import ModuleType, SimpleNamespace
from typing import (TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar,
                    dataclass_transform, overload)

if TYPE_CHECKING:                   # costly to import, and needed only by those who use it
    import argparse
    import asyncio
    import ssl
    from concurrent.futures import Future, ThreadPoolExecutor

__version__ = "0.1.0"

__all__ = [
    # 1 ERRORS
    "HorizonError", "UsageError", "SchemaError", "StateError", "ConfigError",
    "ExpressionError", "BufferTooSmall", "PeerError", "WireError", "FrameError",
    "HandshakeError", "TooBig", "LimitError", "PoolExhausted", "SlowPeer",
    "Metrics",                                                                  # 2 METRICS
    "Message", "field",                                                         # 4 SCHEMA
    "load_proto", "parse_proto", "proto_text", "builtin_schema", "builtin_proto",   # 5 PROTO
    "pack_moves", "pack_moves_into", "unpack_moves",
    "Pool", "BufferPool",                                                       # 6 POOLS
    "Bus", "Event", "Handler", "Propagator",                                    # 7 BUS
    "Topics", "Subscription", "Publication", "Presence",                        # 8 TOPICS
    "FragmentCache", "Fragment", "Safe", "escape", "html",
    "Stream", "Output", "Expression",                                           # 9 STREAM
    "Movement", "World", "Replicated", "Layer", "Update", "ObjectEvent",        # 11 REPLICATION
    "Ticker", "Batcher", "Outbox",                                              # 12 TICKS
    "HTTPConnection", "WebSocketConnection", "Request", "Response",             # 13 PROTOCOLS
    "Ping", "Pong", "Close", "Deflate", "DelimitedReader", "encode_delimited",
    "Plugin", "Plugins", "PluginHost", "PluginSpec", "Verdict",                 # 15 PLUGINS
    "Config",                                                                   # 18 CONFIG
    "Engine", "Session", "sign_token", "verify_token",                          # 20 ENGINE
    "Client", "connect", "RemotePlugin", "PluginEvent",                         # 21 CLIENT
    "main",                                                                     # 22 CLI
]

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])
_M = TypeVar("_M", bound="Message")
_E = TypeVar("_E", bound="Event")
_Bytes = bytes | bytearray | memoryview
_log = logging.getLogger("horizon_lite")        # no NullHandler: a handler's traceback must show


# =============================================================================
# 1  ERRORS - sorted by whose fault it is
# =============================================================================
# Knows: nothing.     Never: anything else.
#
#     HorizonError
#         UsageError          the caller of this module did it; never caused by the network
#             SchemaError         (TypeError)     a Message class that cannot be
#             StateError          (RuntimeError)  the right call at the wrong moment or place
#             ConfigError         (ValueError)    a setting that cannot be
#             ExpressionError     (ValueError)    a mapping expression that cannot be
#             BufferTooSmall      (ValueError)    .needed says how large
#         PeerError           the other side did it; carries the goodbye
#             WireError           undecodable protobuf bytes
#             FrameError          broken WebSocket or HTTP framing
#             HandshakeError      a request or upgrade that is refused
#             TooBig              a limit of ours that the peer passed
#         LimitError          nobody's fault: our own ceiling
#             PoolExhausted
#             SlowPeer            what waits for a peer passed its bound


class HorizonError(Exception):
    """Root of every error raised here on purpose."""


class UsageError(HorizonError):
    """The caller of this module made a mistake; the text names what to change."""


class SchemaError(UsageError, TypeError):
    """A message class or .proto text that cannot be; raised when it is declared."""


class StateError(UsageError, RuntimeError):
    """The right call at the wrong moment, or from the wrong thread."""


class ConfigError(UsageError, ValueError):
    """A setting that is unknown, malformed or impossible."""


class ExpressionError(UsageError, ValueError):
    """A mapping expression that is malformed or not allowed."""


class BufferTooSmall(UsageError, ValueError):
    """The message does not fit; ``needed`` is the space it takes in bytes."""

    def __init__(self, needed: int, room: int) -> None:
        super().__init__(f"{needed} bytes needed, {room} given")
        self.needed = needed


class PeerError(HorizonError):
    """The other side sent something wrong. Hang up with these codes.

    ``label`` is the short reason under which metrics count it; ``at`` the byte offset.
    """

    close_code = 1002               # RFC 6455 7.4.1: protocol error
    http_status = 400

    def __init__(self, reason: str, *, at: int | None = None, label: str = "",
                 close_code: int = 0, http_status: int = 0) -> None:
        super().__init__(reason if at is None else f"{reason} (byte {at})")
        self.reason = reason
        self.at = at
        self.label = label or type(self).__name__
        self.close_code = close_code or type(self).close_code
        self.http_status = http_status or type(self).http_status


class WireError(PeerError):
    """Bytes that are not a valid protobuf message."""

    close_code = 1007               # RFC 6455 7.4.1: data inconsistent with its type


class FrameError(PeerError):
    """Broken HTTP or WebSocket framing."""


class HandshakeError(PeerError):
    """A request or an upgrade that is refused."""


class TooBig(PeerError):
    """The peer passed one of our size limits."""

    close_code = 1009
    http_status = 413


class LimitError(HorizonError):
    """One of our own ceilings was reached."""


class PoolExhausted(LimitError):
    """More objects are out of a pool than it may lend."""


class SlowPeer(LimitError):
    """What waits for a peer passed its bound; it is closed with 1013."""

    close_code = 1013               # IANA close code registry: try again later


def _did_you_mean(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


# =============================================================================
# 2  METRICS - counters, gauges, histograms, and their text form
# =============================================================================
# Knows: numbers, and a clock that is handed in.     Never: sockets.
#
# Two ways in.  inc/gauge/observe count at the moment something happens.  watch() hands over
# a function that is read when somebody looks: hot paths count in plain integers and pay
# nothing here.
#
# Why no lock: it costs more than the counting (0.11 us becomes 0.27).  One thread counts, as
# everywhere in this file; any thread may read.
#
# The mapping and the text agree: a key of the mapping is a sample's name in the text.

BUCKETS_S = (.001, .005, .01, .025, .05, .1, .25, .5, 1.0, 2.5, 5.0, 10.0)     # seed 002
_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def _label_text(labels: Mapping[str, object]) -> str:
    """Return labels as the text formats write them: sorted, quoted, escaped."""
    parts = []
    for name, value in sorted(labels.items()):
        if not _LABEL_NAME.fullmatch(name) or name.startswith("__"):
            raise UsageError(f"label name {name!r} must match {_LABEL_NAME.pattern}")
        text = str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        parts.append(f'{name}="{text}"')
    return "{" + ",".join(parts) + "}" if parts else ""


_NUMBER_TEXTS = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}   # where Python writes otherwise


def _number_text(value: float) -> str:
    return _NUMBER_TEXTS.get(text := str(value), text)


class _Family:
    """One metric name: its kind, its help, and a cell per set of labels."""

    __slots__ = ("kind", "help", "bounds", "cells")

    def __init__(self, kind: str, text: str, bounds: tuple[float, ...]) -> None:
        self.kind = kind            # "counter", "gauge", "histogram"
        self.help = text
        self.bounds = bounds
        self.cells: dict[str, Any] = {}     # label text -> list cell, or a function to ask


class Metrics(Mapping[str, float]):
    """The metrics dict: sample name -> value, and the Prometheus text of it.

    Counting: inc, gauge, observe, observe_many, time (one thread; others by ``call_soon``).
    Declaring: describe, watch.   Reading: the mapping itself, exposition (any thread).

    *clock* returns integer nanoseconds; only ``time`` uses it.

    >>> metrics = Metrics()
    >>> metrics.inc("hits_total", page="/")
    >>> metrics['hits_total{page="/"}']
    1
    """

    __slots__ = ("clock", "_families", "_cells", "_plain")

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self._families: dict[str, _Family] = {}
        self._plain: dict[str, float] = {}          # counters without labels, as callers name them
        self._cells: dict[object, list[Any]] = {}   # all others: what a caller says -> its cell

    # -- counting --

    def inc(self, name: str, /, n: float = 1, **labels: object) -> None:
        """Add *n* to a counter. A name without ``_total`` gets it, as Prometheus asks.

        Raises:
            UsageError: *n* is negative, or the name is taken by another kind.
        """
        # HOT: a third of prometheus_client's time (bench 2.metrics.inc)
        if not n >= 0:              # NaN, too
            raise UsageError(f"counter {name!r} can only go up, not by {n}")
        if labels:
            key = (name, *labels.items())
            (self._cells.get(key) or self._new_cell("counter", name, key, labels))[0] += n
            return
        try:
            self._plain[name] += n
        except KeyError:
            self._family("counter", name)
            self._plain[name] = n

    def gauge(self, name: str, value: float, /, **labels: object) -> None:
        """Set a gauge to *value*."""
        if not isinstance(value, int | float):
            raise UsageError(f"gauge {name!r} must be a number, not {value!r}")
        key = (name, *labels.items(), "gauge")
        (self._cells.get(key) or self._new_cell("gauge", name, key, labels))[0] = value

    def observe(self, name: str, value: float, /, **labels: object) -> None:
        """Count *value* in a histogram (seconds for durations, bytes for sizes)."""
        # HOT: a quarter of prometheus_client's time (bench 2.metrics.observe)
        key = (name, *labels.items(), "histogram") if labels else name
        cell = self._cells.get(key) or self._new_cell("histogram", name, key, labels)
        cell[bisect.bisect_left(cell[0], value) + 3] += 1
        cell[1] += value

    def observe_many(self, name: str, value: float, times: int, **labels: object) -> None:
        """Count *value* as often as *times*, at the price of once."""
        if times < 0:
            raise UsageError(f"histogram {name!r} can't count {times} times")
        key = (name, *labels.items(), "histogram") if labels else name
        cell = self._cells.get(key) or self._new_cell("histogram", name, key, labels)
        cell[bisect.bisect_left(cell[0], value) + 3] += times
        cell[1] += value * times

    @contextlib.contextmanager
    def time(self, name: str, /, **labels: object) -> Iterator[None]:
        """Return a context manager that observes how long its block took, in seconds."""
        began_ns = self.clock()
        try:
            yield
        finally:
            self.observe(name, (self.clock() - began_ns) / 1e9, **labels)

    # -- declaring --

    def describe(self, name: str, text: str, *, kind: str = "counter",
                 buckets: tuple[float, ...] = BUCKETS_S) -> None:
        """Give a metric its HELP text, its kind and a histogram's upper bounds; before its use."""
        if kind not in ("counter", "gauge", "histogram"):
            raise UsageError(f"kind of {name!r} is counter, gauge or histogram, not {kind!r}")
        if list(buckets) != sorted(set(buckets)) or not all(map(math.isfinite, buckets)):
            raise UsageError(f"buckets of {name!r} must be finite and rising; +Inf is added")
        family = self._family(kind, name, text, buckets)
        if family.cells and family.bounds != buckets:
            raise UsageError(f"histogram {name!r} is in use; describe it before")
        family.help, family.bounds = text, buckets

    def watch(self, name: str, read: Callable[[], Any], text: str, *,
              kind: str = "counter", label: str = "") -> None:
        """Read ``read()`` whenever somebody looks; with *label*, it returns a dict of values."""
        def values() -> dict[str, float]:
            if not label:
                return {"": read()}
            return {_label_text({label: each}): n for each, n in list(read().items())}
        self._family(kind, name, text).cells["watch " + label] = values

    def _family(self, kind: str, name: str, text: str = "",
                bounds: tuple[float, ...] = BUCKETS_S) -> _Family:
        if not _METRIC_NAME.fullmatch(name):
            raise UsageError(f"metric name {name!r} must match {_METRIC_NAME.pattern}")
        if kind == "counter" and not name.endswith("_total"):
            name += "_total"
        family = self._families.get(name)
        # OpenMetrics knows a counter by its name without the suffix: that must be free, too
        like = name.removesuffix("_total") if kind == "counter" else name + "_total"
        rival = self._families.get(like)
        if rival is not None and rival is not family:
            raise UsageError(f"metric {name!r} is too like another one, a {rival.kind}")
        if family is None:
            family = self._families[name] = _Family(kind, text or name.replace("_", " "), bounds)
        elif family.kind != kind:
            raise UsageError(f"metric {name!r} is a {family.kind}, not a {kind}")
        return family

    def _new_cell(self, kind: str, name: str, key: object, labels: dict[str, object]) -> list[Any]:
        family = self._family(kind, name)
        if kind == "histogram" and "le" in labels:
            raise UsageError(f"histogram {name!r}: the label le is its own")
        text = _label_text(labels)
        # a histogram's cell: bounds, sum, labels, then a count per bucket, +Inf last
        histogram = [family.bounds, 0.0, labels] + [0] * (len(family.bounds) + 1)
        cell: list[Any] = family.cells.setdefault(text, histogram if kind == "histogram" else [0])
        self._cells[key] = cell
        return cell

    # -- reading --

    def _family_samples(self, name: str, family: _Family) -> Iterator[tuple[str, float]]:
        if family.kind == "counter":
            said = (name, name.removesuffix("_total"))
            if plain := [self._plain[each] for each in said if each in self._plain]:
                yield name, sum(plain)
        for text, cell in list(family.cells.items()):
            if callable(cell):
                for labels, value in cell().items():
                    yield name + labels, value
            elif family.kind == "histogram":
                bounds = (*cell[0], math.inf)
                for bound, count in zip(bounds, itertools.accumulate(cell[3:])):
                    labels = _label_text({**cell[2], "le": _number_text(bound)})
                    yield f"{name}_bucket{labels}", count
                yield f"{name}_sum{text}", cell[1]
                yield f"{name}_count{text}", count
            else:
                yield name + text, cell[0]

    def _samples(self) -> dict[str, float]:
        return {sample: value for name, family in list(self._families.items())
                for sample, value in self._family_samples(name, family)}

    def __getitem__(self, key: str) -> float:
        samples = self._samples()
        return samples[key if key in samples else key + "_total"]   # also as inc() was told

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples())

    def __len__(self) -> int:
        return len(self._samples())

    def exposition(self, *, openmetrics: bool = False) -> bytes:
        """Return Prometheus text format 0.0.4, or OpenMetrics 1.0.

        Cost: O(series); every watched value is read once.
        """
        lines = []
        for name, family in sorted(self._families.items()):
            samples = list(self._family_samples(name, family))
            if not samples:
                continue
            # OpenMetrics names a counter's family without the suffix of its sample
            title = name.removesuffix("_total") if openmetrics else name
            text = family.help.replace("\\", r"\\").replace("\n", r"\n")
            lines.append(f"# HELP {title} {text}\n# TYPE {title} {family.kind}\n")
            lines += [f"{sample} {_number_text(value)}\n" for sample, value in samples]
        if openmetrics:
            lines.append("# EOF\n")
        return "".join(lines).encode(errors="replace")


# =============================================================================
# 3  WIRE - integers <-> bytes
# =============================================================================
# Knows: bytes, ERRORS.     Never: messages.
#
# A protobuf message is a run of fields, each a tag (number << 3 | wire type) and a value:
#
#     0  varint      little groups of seven bits, the eighth says "more follows"
#     1  eight bytes, 5  four bytes, little endian
#     2  a length as varint, then so many bytes
#     3, 4  a group's start and end: proto2's, only ever skipped here
#
# Readers take (data, at) and return (value, at after it).  Reading past the end of *data*
# raises IndexError or struct.error, which Message.decode turns into WireError: one handler
# at the door instead of a check per byte.  (protobuf.dev, "Encoding")

_VARINT, _I64, _LEN, _GROUP, _GROUP_END, _I32 = range(6)
_MASK64 = (1 << 64) - 1
_MAX_FIELD = (1 << 29) - 1
_MAX_DEPTH = 100                    # nesting, as Google's runtimes have it
_SMALL = 4096                       # up to here one more copy costs less than many steps
_ONE = tuple(bytes((n,)) for n in range(128))       # every varint of one byte


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: _Bytes, at: int) -> tuple[int, int]:
    """Return a varint's value, cut to 64 bits as the specification says, and its end."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK64, at
        shift += 7
    raise WireError("varint longer than ten bytes", at=at - 10)


def _read_short(data: _Bytes, at: int) -> tuple[int, int]:
    """Return a tag or a length and its end; they have 32 bits, in at most five bytes."""
    value, stop = _read_varint(data, at)
    if stop - at > 5 or value >> 32:
        raise WireError("tag or length of more than 32 bits", at=at)
    return value, stop


def _read_varints(data: _Bytes, at: int, stop: int) -> list[int]:
    """Return all varints from *at* to *stop*, which is where the last one must end."""
    raw = bytes(data[at:stop])
    if raw.isascii():               # one byte each
        return list(raw)
    values = []
    value = shift = 0
    for byte in raw:
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            values.append(value & _MASK64)
            value = shift = 0
        else:
            shift += 7
            if shift == 70:
                raise WireError("varint longer than ten bytes", at=at)
    if shift:
        raise WireError("packed field ends inside a varint", at=stop)
    return values


def _zigzag(value: int) -> int:
    """Fold the sign into the lowest bit, so that small negatives stay short.

    >>> [_zigzag(n) for n in (0, -1, 1, -2)]
    [0, 1, 2, 3]
    """
    return value << 1 if value >= 0 else ~(value << 1)


def _unzigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def _sign32(value: int) -> int:
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def _sign64(value: int) -> int:
    return (value ^ 1 << 63) - (1 << 63)


def _too_long(at: int, size: int) -> WireError:
    return WireError(f"length of {size} runs past the end of its message", at=at)


def _too_deep(at: int) -> WireError:
    return WireError(f"nested deeper than {_MAX_DEPTH}", at=at)


def _skip(data: _Bytes, start: int, at: int, end: int, tag: int, depth: int) -> int:
    """Return where the value at *at*, whose tag is at *start*, ends; groups end by themselves.

    Raises:
        WireError: field number 0, wire type 6 or 7, a group that is not closed, or a
            length past *end*.
    """
    wire_type = tag & 7
    if tag < 8:
        raise WireError("field number 0", at=start)
    if wire_type == _VARINT:
        at = _read_varint(data, at)[1]
    elif wire_type in (_I64, _I32):
        at += 8 if wire_type == _I64 else 4
    elif wire_type == _LEN:
        size, at = _read_short(data, at)
        at += size
    elif wire_type == _GROUP:
        at = _skip_group(data, at, end, tag + 1, depth - 1)
    else:
        raise WireError(f"wire type {wire_type}", at=start)
    if at > end:
        raise WireError("field runs past the end of its message", at=start)
    return at


def _skip_group(data: _Bytes, at: int, end: int, end_tag: int, depth: int) -> int:
    if depth < 0:
        raise _too_deep(at)
    while at < end:
        start = at
        tag, at = _read_short(data, at)
        if tag == end_tag:
            return at
        at = _skip(data, start, at, end, tag, depth)
    raise WireError("group is not closed", at=end)


# =============================================================================
# 4  SCHEMA - message classes, and the code that is generated for them
# =============================================================================
# Knows: bytes, ERRORS, WIRE.     Never: transport.
#
# A Message class declares its fields by assignment; the metaclass turns them into slots and
# writes the code that a patient person would write by hand for exactly that class: one
# straight function each to build, clear, write and read it.  Text is data here: a row of
# _KINDS holds the expressions for one scalar type, the builders below only indent and join
# them, and _compile is the one place that executes anything.  `Cls.__source__` shows it.
#
# Writing appends parts to a list and returns their size, so that a nested message's length
# is known without building it first, and nothing is copied before the one join at the end.
#
# Tricks that are allowed in generated text, and only there: one-byte varints in line, tags
# as literals, no call per field, no bounds check per byte (Message.decode catches the
# IndexError), no type check per value (_name_field finds the culprit afterwards), and runs:
# neighbours of fixed width are packed and unpacked by one struct call with their tags.  A
# string before a run joins it when the two are the whole message (`pack_whole[size]`: one
# Struct per length of that string).
#
# class Move(Message): entity = field(1, "uint32"); name = field(2, "string") gives exactly:
#
#     def _put(self, out, depth):
#         total = 0
#         value = self.entity
#         if value:
#             if 0 <= value < 0x80:
#                 out.append(head_1[value])
#                 total += 2
#             else:
#                 raw = put_uint32(value)
#                 out.append(b'\x08' + raw)
#                 total += len(raw) + 1
#         elif value.__class__ is not int: put_uint32(value)
#         value = self.name
#         if value:
#             raw = to_utf8(value)
#             size = len(raw)
#             if size < 0x80:
#                 out.append(head_2[size])
#                 total += size + 2
#             else:
#                 head = b'\x12' + varint(size)
#                 out.append(head)
#                 total += size + len(head)
#             out.append(raw)
#         elif value != '': raise TypeError
#         if self._unknown:
#             out.append(self._unknown)
#             total += len(self._unknown)
#         return total


class _Kind(NamedTuple):
    """One scalar type: how its values are written and read in generated text."""

    wire_type: int
    default: Any
    put: str                        # an expression: the bytes of `value`, without a length
    get: str                        # lines that read `value` at `at` and move it on
    put_all: str = ""               # an expression: the bytes of all `values`, if there is a
    get_all: str = ""               # quick way; and all values that are packed up to `stop`
    small: bool = False             # whether values below 128 are their own byte


_RANGES = {                         # of the integer types
    **dict.fromkeys(("int32", "sint32", "sfixed32", "enum"), (-1 << 31, (1 << 31) - 1)),
    **dict.fromkeys(("int64", "sint64", "sfixed64"), (-1 << 63, (1 << 63) - 1)),
    **dict.fromkeys(("uint32", "fixed32"), (0, (1 << 32) - 1)),
    **dict.fromkeys(("uint64", "fixed64"), (0, _MASK64)),
}
_FIXED = {"double": "d", "float": "f", "fixed64": "Q", "fixed32": "I", "sfixed64": "q",
          "sfixed32": "i"}


def _put(kind: str, value: Any) -> _Bytes:
    """Return one value's bytes, without a length: the careful way, which says what is wrong."""
    try:
        if kind in _RANGES:
            value = int(value.__index__())
            low, high = _RANGES[kind]
            if not low <= value <= high:
                raise ValueError(f"{value} is out of range for {kind}")
        if kind in _FIXED:
            return struct.pack("<" + _FIXED[kind], _f32(value) if kind == "float" else value)
        if kind in _RANGES:
            return _varint(_zigzag(value) if kind[0] == "s" else value & _MASK64)
        if kind == "bool" and isinstance(value, int):
            return b"\x01" if value else b"\x00"
        if kind == "string" and isinstance(value, str):
            return value.encode()
        if kind == "bytes" and isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)         # a memoryview's items and strides may be any
    except (AttributeError, struct.error):
        pass
    raise TypeError(f"{reprlib.repr(value)} is not of type {kind}")


def _f32(value: Any) -> Any:
    """Return *value*, or infinity when 32 bits can't hold it, as Google's runtimes have it."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return math.copysign(math.inf, value)
    return value


def _items(values: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise TypeError(f"{reprlib.repr(values)} is not a list")
    return values


def _pack_varints(put: Callable[[Any], bytes], values: Iterable[Any]) -> bytes:
    """Return a packed field of integers; quick when they are all below 128."""
    try:
        raw = bytes(values)
        if raw.isascii():
            return raw
    except (TypeError, ValueError):
        pass                        # larger ones, or none at all
    return b"".join(map(put, values))


def _pack_fixed(form: str, values: list[Any]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}{form}", *values)
    except OverflowError:
        return struct.pack(f"<{len(values)}{form}", *map(_f32, values))


def _unpack_fixed(form: str, data: _Bytes, at: int, stop: int) -> tuple[Any, ...]:
    count, rest = divmod(stop - at, struct.calcsize("<" + form))
    if rest:
        raise WireError("packed field ends inside a value", at=stop)
    return struct.unpack_from(f"<{count}{form}", data, at)


def _map_value(entry: Any) -> Any:
    """Return a map entry's value; a message that was left out is an empty one."""
    return entry._fields[1].target.decode(b"") if entry.value is None else entry.value


def _map_items(values: Any) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{reprlib.repr(values)} is not a dict")
    return values.items()


_GET_VARINT = """\
value = data[at]
at += 1
if value >= 0x80:
    value, at = read_varint(data, at - 1)"""

_GET_LENGTH = """\
size = data[at]
at += 1
if size >= 0x80: size, at = read_short(data, at - 1)
stop = at + size
if stop > end: raise too_long(at, size)
"""


def _varint_kind(name: str, wide: str = "", convert: str = "", *, small: bool = True) -> _Kind:
    """Return the row of a varint type; *wide* is what is done to one of several bytes."""
    get, get_all = _GET_VARINT, "read_varints(data, at, stop)"
    for pad, value in (("    ", wide), ("", convert)):
        if value:
            get += f"\n{pad}value = {value}"
            get_all = f"[{value} for value in {get_all}]"
    put_all = f"pack_varints(put_{name}, values)" if small else ""
    return _Kind(_VARINT, 0, f"put_{name}(value)", get, put_all, get_all, small)


def _fixed_kind(name: str, form: str) -> _Kind:
    wire_type, width = (_I64, 8) if form in "dQq" else (_I32, 4)
    put = "put_float(value)" if name == "float" else f"pack_{name}(value)"
    return _Kind(wire_type, 0.0 if form in "df" else 0, put,
                 f"value, = unpack_{name}(data, at)\nat += {width}",
                 f"pack_fixed('{form}', values)", f"unpack_fixed('{form}', data, at, stop)")


_KINDS = {
    "int32": _varint_kind("int32", "sign32(value)"),
    "int64": _varint_kind("int64", "sign64(value)"),
    "uint32": _varint_kind("uint32", "value & 0xFFFFFFFF"),
    "uint64": _varint_kind("uint64"),
    "sint32": _varint_kind("sint32", "value & 0xFFFFFFFF", "unzigzag(value)", small=False),
    "sint64": _varint_kind("sint64", "", "unzigzag(value)", small=False),
    "bool": _varint_kind("bool", "", "value != 0", small=False)._replace(
        default=False, put="ONE[1] if value is True else put_bool(value)"),
    "enum": _varint_kind("enum", "sign32(value)", "member(value, value)"),
    **{name: _fixed_kind(name, form) for name, form in _FIXED.items()},
    "string": _Kind(_LEN, "", "to_utf8(value)",
                    _GET_LENGTH + "value = str(data[at:stop], 'utf-8')\nat = stop"),
    "bytes": _Kind(_LEN, b"", "value if value.__class__ is bytes else put_bytes(value)",
                   _GET_LENGTH + "value = bytes(data[at:stop])\nat = stop"),
}
_MAP_KEYS = [each for each in _KINDS if each not in ("enum", "double", "float", "bytes")]
_GENERATED_NAMES: dict[str, Any] = {                # what generated text may call
    "ONE": _ONE, "to_utf8": str.encode, "new": object.__new__, "UsageError": UsageError,
    **{f"put_{name}": functools.partial(_put, name) for name in _KINDS},
    **{f"pack_{name}": struct.Struct("<" + form).pack for name, form in _FIXED.items()},
    **{f"unpack_{name}": struct.Struct("<" + form).unpack_from for name, form in _FIXED.items()},
    **{each.__name__[1:]: each for each in (
        _varint, _read_varint, _read_short, _read_varints, _unzigzag, _sign32, _sign64, _skip,
        _f32, _items, _map_items, _map_value, _pack_varints, _pack_fixed, _unpack_fixed,
        _too_long, _too_deep)},
}


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class _Field:
    """One declared field; ``kind`` is a key of _KINDS, or "message"."""

    number: int
    target: Any                     # as declared; a class once resolved, for enum and message
    repeated: bool = False
    packed: bool = False
    optional: bool = False
    oneof: str = ""
    map: tuple[Any, Any] | None = None
    always: bool = False            # written even if it is the default
    name: str = ""
    kind: str = ""

    @property
    def explicit(self) -> bool:
        """Whether an unset field is None rather than its type's default."""
        return self.optional or bool(self.oneof) or self.kind == "message" and not self.repeated

    @property
    def fusible(self) -> bool:
        """Whether the field can be part of a run: of one width, and without presence."""
        return self.kind in _FIXED and not (self.repeated or self.explicit or self.always)

    @property
    def wire_type(self) -> int:
        return _LEN if self.kind == "message" else _KINDS[self.kind].wire_type

    @property
    def is_packed(self) -> bool:
        return self.repeated and self.packed and self.wire_type != _LEN

    @property
    def tag(self) -> bytes:
        """The tag as it is written; when reading, both forms of a repeated scalar are known."""
        return _varint(self.number << 3 | (_LEN if self.is_packed else self.wire_type))

    def default(self) -> Any:
        """Return what an unset field reads as."""
        if self.repeated or self.explicit:
            return {} if self.map else [] if self.repeated else None
        if self.kind == "enum":
            return self.target._value2member_map_.get(0, 0)
        return _KINDS[self.kind].default

    @property
    def blank(self) -> str:
        """The default as generated text has it."""
        fresh = self.repeated or self.explicit
        return repr(self.default()) if fresh else f"default_{self.number}"

    def check(self, value: Any) -> None:
        """Raise what is wrong with *value*, if anything is."""
        if self.map:
            for pair in _map_items(value):
                for part, one in zip(self.target._fields, pair, strict=True):
                    part.check(one)
        elif self.repeated:
            for one in _items(value):
                self._check_one(one)
        elif value is not None or self.always or not self.explicit:
            self._check_one(value)

    def _check_one(self, value: Any) -> None:
        if self.kind == "enum" and not isinstance(value, int):
            raise TypeError(f"{reprlib.repr(value)} is not of type {self.target.__name__}: "
                            f"{', '.join(map(str, self.target.__members__))}, or a number")
        if self.kind != "message":
            _put(self.kind, value)
            if self.kind in _RANGES or self.kind == "float":
                _ = value > 0               # generated text compares them
        elif not isinstance(value, self.target):
            twin = type(value).__name__ == self.target.__name__
            raise TypeError(f"{reprlib.repr(value)} is not of type {self.target.__name__}"
                            f"{', but of another class of that name' if twin else ''}")


def field(number: int, type: Any = None, /, *, repeated: bool = False, packed: bool = True,
          optional: bool = False, oneof: str = "", map: tuple[Any, Any] | None = None) -> Any:
    """Declare a field of a Message class.

    *type* is one of protobuf's 15 scalar names, a Message class, an ``enum.IntEnum``, or the
    name of a class as a string, which may come later. *map* is ``(key type, value type)``.
    Absent ``optional``, ``oneof`` and message fields read as None. Repeated scalars are
    packed unless ``packed=False``.

    Raises:
        SchemaError: the number is outside 1 to 536,870,911 or in protobuf's reserved range
            19,000 to 19,999, or the options do not go together.
    """
    if number.__class__ is not int or not 1 <= number <= _MAX_FIELD or 19000 <= number < 20000:
        raise SchemaError(f"field number {number!r}: use 1 to {_MAX_FIELD}, not 19000 to 19999")
    if (type is None) == (map is None):
        raise SchemaError(f"field {number}: give it either a type or map=(key, value)")
    if repeated + optional + bool(oneof) + bool(map) > 1:
        raise SchemaError(f"field {number}: repeated, optional, oneof and map exclude each other")
    if map is not None and (not isinstance(map, tuple) or len(map) != 2 or map[0] not in _MAP_KEYS):
        raise SchemaError(f"field {number}: map={map!r} must be (key type, value type), and a key "
                          "is bool, string or any integer type")
    if oneof and not (isinstance(oneof, str) and oneof.isascii() and oneof.isidentifier()):
        raise SchemaError(f"field {number}: oneof={oneof!r} must be a name of ASCII letters")
    return _Field(number, type, repeated or map is not None, packed, optional, oneof, map)


# -- building the text: one field --
#
# Generated functions know these locals:  self, out (parts so far), total (their bytes),
# depth (levels left);  data, at, end, start (of the tag), tag;  value, raw (its bytes),
# size;  v<number> and t<number> for the values and tags of a run.

def _indent(text: str, depth: int) -> str:
    pad = "    " * depth
    return "".join(pad + line + "\n" for line in text.splitlines())


def _put_sized(field_: _Field) -> str:
    """Return lines that append the tag, the length and the bytes in `raw`."""
    return ("size = len(raw)\n"
            "if size < 0x80:\n"
            f"    out.append(head_{field_.number}[size])\n"
            f"    total += size + {len(field_.tag) + 1}\n"
            "else:\n"
            f"    head = {field_.tag!r} + varint(size)\n"
            "    out.append(head)\n"
            "    total += size + len(head)\n"
            "out.append(raw)\n")


def _put_message(heads: str, tag: str, class_: str, name: str) -> str:
    """Return lines that append the tag, the length and the parts of the message in `value`."""
    return (f"if not isinstance(value, {class_}): raise TypeError\n"
            f"if depth <= 0: raise UsageError(f'{{type(self).__name__}}.{name}: "
            f"nested deeper than {_MAX_DEPTH}')\n"
            "mark = len(out)\n"
            "out.append(b'')\n"
            "size = value._put(out, depth - 1)\n"
            f"out[mark] = head = {heads}[size] if size < 0x80 else {tag} + varint(size)\n"
            "total += size + len(head)\n")


def _put_one(field_: _Field) -> str:
    """Return lines that append the tag and one `value` of a field."""
    n, tag = field_.number, field_.tag
    if field_.kind == "message":
        return _put_message(f"head_{n}", repr(tag), f"class_{n}", field_.name)
    text = f"raw = {_KINDS[field_.kind].put}\n"
    if field_.wire_type == _LEN:
        return text + _put_sized(field_)
    text += f"out.append({tag!r} + raw)\ntotal += len(raw) + {len(tag)}\n"
    if not _KINDS[field_.kind].small:
        return text
    return ("if 0 <= value < 0x80:\n"
            f"    out.append(head_{n}[value])\n    total += {len(tag) + 1}\n"
            "else:\n" + _indent(text, 1))


def _put_lines(field_: _Field) -> str:
    """Return the lines that write a field that is in no oneof and no run."""
    name, put = f"self.{field_.name}", _put_one(field_)
    if field_.map:                  # one entry object serves them all
        return (f"value = class_{field_.number}()\n"
                f"for value.key, value.value in map_items({name}):\n" + _indent(put, 1))
    if field_.is_packed:
        kind = _KINDS[field_.kind]
        raw = kind.put_all or f"b''.join([{kind.put} for value in values])"
        return (f"values = items({name})\nif values:\n"
                + _indent(f"raw = {raw}\n" + _put_sized(field_), 1))
    if field_.repeated:
        return f"for value in items({name}):\n" + _indent(put, 1)
    if field_.always:
        return f"value = {name}\n" + put
    if field_.explicit:
        return f"value = {name}\nif value is not None:\n" + _indent(put, 1)
    blank = _KINDS[field_.kind].default
    wrong = (f"value != {blank!r}: raise TypeError" if field_.wire_type == _LEN else
             f"value.__class__ is not {type(blank).__name__}: put_{field_.kind}(value)")
    return f"value = {name}\nif value:\n" + _indent(put, 1) + f"elif {wrong}\n"


def _store(field_: _Field, value: str = "value") -> str:
    if field_.repeated:
        return f"self.{field_.name}.append({value})"
    if field_.oneof:
        return f"self._set_{field_.oneof} = {field_.name!r}\nself._value_{field_.oneof} = {value}"
    return f"self.{field_.name} = {value}"


def _get_message(field_: _Field) -> str:
    old = "" if field_.repeated else f", self.{field_.name}"        # which the bytes are added to
    load = "class_{0}._load(class_{0}, data, at, stop, depth - 1{1})".format(field_.number, old)
    text = f"{_GET_LENGTH}if depth <= 0: raise too_deep(at)\n"
    if field_.map:
        # an entry with a field that is unknown is kept as it is, as Google's runtime does
        text += (f"value = {load}\n"
                 "if value._unknown:\n    unknown = unknown or []\n"
                 "    unknown.append(bytes(data[start:stop]))\n"
                 f"else: self.{field_.name}[value.key] = map_value(value)\n")
    else:
        text += _store(field_, load) + "\n"
    return text + "at = stop\n"


def _get_lines(field_: _Field) -> str:
    """Return the branch that reads a field; scalars that repeat get one for each form."""
    tag = field_.number << 3 | field_.wire_type
    if field_.kind == "message":
        return f"if tag == {tag}:\n" + _indent(_get_message(field_) + "continue", 1)
    kind = _KINDS[field_.kind]
    text = f"if tag == {tag}:\n" + _indent(f"{kind.get}\n{_store(field_)}\ncontinue", 1)
    if field_.repeated and field_.wire_type != _LEN:
        text += (f"if tag == {field_.number << 3 | _LEN}:\n" + _indent(_GET_LENGTH, 1)
                 + f"    self.{field_.name} += {kind.get_all}\n    at = stop\n    continue\n")
    return text.replace("member(", f"member_{field_.number}(")


# -- building the text: runs, oneofs, whole messages --

class _Run:
    """Neighbours of fixed width: one struct call with their tags.

    ``reads`` and ``writes`` are its formats: tags are compared quickest as numbers, and
    packed quickest as bytes. ``spans`` is where each value stands. A run that is a whole
    message may have a ``lead``, a string or bytes field before it, and bools at its end.
    """

    def __init__(self, fields: list[_Field], lead: _Field | None = None) -> None:
        self.fields = fields
        self.lead = lead
        self.reads = self.writes = "<"
        self.spans: list[tuple[int, int, int]] = []         # of a tag, its value, the value's end
        self.width = 0
        if lead:
            self.reads += _tag_form(lead) + "B%ds"
            self.writes += f"{len(lead.tag) + 1}s%ds"
        for each in fields:
            tag, form = len(each.tag), _FIXED.get(each.kind, "B")
            self.reads += _tag_form(each) + form
            self.writes += f"{tag}s{form}" if form != "B" else f"{tag + 1}s"
            at, self.width = self.width, self.width + tag + struct.calcsize("<" + form)
            self.spans.append((at, at + tag, self.width))

    @property
    def size(self) -> str:
        """An expression for the bytes of the whole, where `size` is what the lead has."""
        return f"size + {self.width + len(self.lead.tag) + 1}" if self.lead else str(self.width)

    def names(self, name: str = "") -> dict[str, Any]:
        """Return the functions that the text calls, for a run of this name."""
        name = name or str(self.fields[0].number)
        return {f"pack_{name}": _struct_calls(self.writes, "pack"),
                f"unpack_{name}": _struct_calls(self.reads, "unpack_from")}

    def _packed(self, floats: str = "{}") -> str:
        """Return what struct packs: tags and values; a bool is known to be true."""
        return ", ".join(repr(f.tag + b"\1") if f.kind == "bool" else
                         f"{f.tag!r}, {floats if f.kind == 'float' else '{}'}".replace(
                             "{}", f"v{f.number}") for f in self.fields)

    def _locals(self) -> str:
        return "".join(f"v{each.number} = self.{each.name}\n" for each in self.fields)

    def put_lines(self) -> str:
        """Return the lines that write the run: all of it, then what is default is cut out."""
        pack = f"pack_{self.fields[0].number}"
        text = f"raw = {pack}({self._packed()})\n"
        if any(each.kind == "float" for each in self.fields):
            text = f"try: {text}except OverflowError: raw = {pack}({self._packed('f32({})')})\n"
        for each, (at, value, end) in reversed(list(zip(self.fields, self.spans, strict=True))):
            zero = f" and raw[{value}:{end}] == {bytes(end - value)!r}"
            text += (f"if not {_is_set(each)}{zero if each.kind in ('float', 'double') else ''}: "
                     f"raw = raw[:{at}] + raw[{end}:]\n")
        return self._locals() + text + "out.append(raw)\ntotal += len(raw)\n"

    def get_lines(self) -> str:
        """Return the branches that read the run: whole if it is there, else by field."""
        first, *rest = self.fields
        single = [_get_lines(each) for each in self.fields]
        if not rest:
            return single[0]
        tag = self.spans[0][1]
        names = ", ".join(["_", f"v{first.number}", *(f"t{f.number}, v{f.number}" for f in rest)])
        whole = (f"if at + {self.width - tag} <= end:\n"
                 f"    {names} = unpack_{first.number}(data, at - {tag})\n"
                 f"    if {self._tags_fit(rest)}:\n"
                 + _indent(self._stores() + f"at += {self.width - tag}\ncontinue\n", 2))
        head, _, body = single[0].partition("\n")
        return f"{head}\n" + _indent(whole, 1) + body + "".join(single[1:])

    def _tags_fit(self, fields: list[_Field]) -> str:
        return " and ".join([f"t{f.number} == {_tag_value(f)}" for f in fields]
                            + [f"v{f.number} < 0x80" for f in self.fields if f.kind == "bool"])

    def _stores(self) -> str:
        return "".join(
            f"self.{f.name} = v{f.number}{' != 0' if f.kind == 'bool' else ''}\n"
            for f in self.fields)

    def short_lines(self, done: str) -> str:
        """Return the lines that write a message that is only this run and has no defaults.

        *done* is what to do with the bytes, as text. What does not fit, or fails, goes on
        to the careful lines, which also find out what is wrong.
        """
        tests = [*map(_is_set, self.fields), "not self._unknown"]
        read, call = "", f"pack_whole({self._packed()})"
        if self.lead:
            raw = _KINDS[self.lead.kind].put.replace("value", f"self.{self.lead.name}")
            read = f"raw = {raw}\nsize = len(raw)\n"
            tests.insert(0, "0 < size < 0x80")
            call = f"pack_whole[size](head_{self.lead.number}[size], raw, {self._packed()})"
        body = (f"{read}{self._locals()}if {' and '.join(tests)}:\n"
                + _indent(done.replace("{}", call), 1))
        return "try:\n" + _indent(body, 1) + "except Exception: pass\n"

    def load_lines(self) -> str:
        """Return the lines that read a message that is only this run, and holds all of it."""
        names = ", ".join(f"t{f.number}, v{f.number}" for f in self.fields)
        fit, store = self._tags_fit(self.fields), self._stores()
        size, room, unpack = "", f"end - at == {self.width}", "unpack_whole"
        if self.lead:
            size, room = f"{self.size.replace('+', '= end - at -')}\n", "0 <= size < 0x80"
            names, unpack = f"tag, length, raw, {names}", "unpack_whole[size]"
            fit = f"tag == {_tag_value(self.lead)} and length == size and {fit}"
            value = "raw.decode()" if self.lead.kind == "string" else "raw"
            store = f"self.{self.lead.name} = {value}\n" + store
        body = (f"{names} = {unpack}(data, at)\nif {fit}:\n    self = new(cls)\n"
                + _indent(store + "self._unknown = b''\nreturn self\n", 1))
        return (f"{size}if {room}:\n    try:\n" + _indent(body, 2)
                + "    except UnicodeDecodeError: pass     # the loop says where\n")


def _struct_calls(form: str, name: str) -> Any:
    """Return a method of struct; of a form with a size, a list for sizes below 128.

    Those are made at their first call.
    """
    if "%" not in form:
        return getattr(struct.Struct(form), name)
    calls: list[Callable[..., Any]] = []

    def first_call(size: int, *values: Any) -> Any:
        calls[size] = getattr(struct.Struct(form % size), name)
        return calls[size](*values)
    calls += [functools.partial(first_call, size) for size in range(128)]
    return calls


def _tag_form(field_: _Field) -> str:
    return "B" if len(field_.tag) == 1 else f"{len(field_.tag)}s"


def _tag_value(field_: _Field) -> str:
    """Return a tag as it is unpacked: a number if it is one byte."""
    return str(field_.tag[0]) if len(field_.tag) == 1 else repr(field_.tag)


def _is_set(field_: _Field) -> str:
    """Return a test for values that are surely not the default."""
    name = f"v{field_.number}"
    if field_.kind == "float":      # up to half of the least f32 becomes 0.0
        return f"({name} > {2 ** -150} or {name} < {-2 ** -150})"
    return name + " is True" * (field_.kind == "bool")


class _Choice:
    """Members of one oneof with neighbouring numbers: messages share one branch."""

    def __init__(self, fields: list[_Field]) -> None:
        self.group = fields[0].oneof
        self.scalars = [each for each in fields if each.kind != "message"]
        self.messages = [each for each in fields if each.kind == "message"]
        self.label = f"members_{fields[0].number}"

    def names(self) -> dict[str, Any]:
        """Return the table that the text looks into: by name to write, by tag to read."""
        table: dict[Any, tuple[Any, Any]] = {}
        for each in self.messages:
            table[each.name] = _heads(each.tag), each.target
            table[each.number << 3 | _LEN] = each.name, each.target
        return {self.label: table}

    def put_lines(self) -> str:
        cases = [f"if which == {each.name!r}:\n" + _indent(_put_one(each), 1)
                 for each in self.scalars]
        if self.messages:
            put = _put_message("heads", "heads[0][:-1]", "kind", "{which}")
            cases.insert(0, f"if which in {self.label}:\n"
                         + _indent(f"heads, kind = {self.label}[which]\n{put}", 1))
        return (f"which = self._set_{self.group}\nvalue = self._value_{self.group}\n"
                + "el".join(cases))

    def get_lines(self) -> str:
        text = ""
        if self.messages:
            text = f"if tag in {self.label}:\n    which, kind = {self.label}[tag]\n" + _indent(
                f"{_GET_LENGTH}if depth <= 0: raise too_deep(at)\n"
                f"old = self._value_{self.group} if self._set_{self.group} is which else None\n"
                f"self._value_{self.group} = kind._load(kind, data, at, stop, depth - 1, old)\n"
                f"self._set_{self.group} = which\n"
                "at = stop\ncontinue\n", 1)
        return text + "".join(map(_get_lines, self.scalars))


_Part = _Run | _Choice | _Field


def _parts_of(fields: Iterable[_Field]) -> list[_Part]:
    """Return the fields by number, with neighbours joined into runs and choices."""
    parts: list[_Part] = []
    ordered = sorted(fields, key=lambda each: each.number)
    for (fusible, group), some in itertools.groupby(ordered, lambda f: (f.fusible, f.oneof)):
        neighbours = list(some)
        parts += ([_Run(neighbours)] if fusible else
                  [_Choice(neighbours)] if group else neighbours)
    return parts


def _whole(parts: list[_Part]) -> _Run | None:
    """Return the run that a message consists of, if it does."""
    plain = [each for each in parts if isinstance(each, _Field)
             and not (each.repeated or each.explicit or each.always)]
    lead = [each for each in plain[:1] if each is parts[0] and each.kind in ("string", "bytes")]
    bools = [each for each in plain if each.kind == "bool"]
    match parts[len(lead):]:
        case [_Run() as run, *rest] if rest == bools:
            return _Run(run.fields + bools, *lead)
    return None


def _clear_lines(fields: Iterable[_Field]) -> str:
    lines = [f"self.{each.name} = {each.blank}\n" for each in fields if not each.oneof]
    lines += [f"self._set_{group} = self._value_{group} = None\n"
              for group in dict.fromkeys(each.oneof for each in fields if each.oneof)]
    return "".join(lines) + "self._unknown = b''\n"


def _init_source(fields: Iterable[_Field]) -> str:
    sets = ""
    members: dict[str, list[_Field]] = {}
    for each in fields:
        if each.oneof:
            members.setdefault(each.oneof, []).append(each)
        else:
            fresh = f"{each.blank} if {each.name} is None else " if each.repeated else ""
            sets += f"self.{each.name} = {fresh}{each.name}\n"
    for group, some in members.items():                 # the last one that is given wins
        sets += "el".join(
            f"if {each.name} is not None:\n    self._set_{group} = {each.name!r}\n"
            f"    self._value_{group} = {each.name}\n" for each in reversed(some))
        sets += f"else:\n    self._set_{group} = self._value_{group} = None\n"
    arguments = ", ".join(["self", *(f"{each.name}={'None' if each.repeated else each.blank}"
                                     for each in fields)])
    return f"def __init__({arguments}):\n" + _indent(sets + "self._unknown = b''\n", 1)


def _load_source(parts: list[_Part], clear: str, short: str) -> str:
    branches = "".join(_get_lines(each) if isinstance(each, _Field) else each.get_lines()
                       for each in parts)
    unknown = ("at = skip(data, start, at, end, tag, depth)\n"
               "unknown = unknown or []\n"
               "unknown.append(bytes(data[start:at]))\n")
    return (
        "def _load(cls, data, at, end, depth, self=None):\n"
        "    if self is None:\n"
        + _indent(f"{short}self = new(cls)\n{clear}", 2) +
        "    unknown = None\n"
        "    while at < end:\n"
        "        start = at\n"
        "        tag = data[at]\n"
        "        at += 1\n"
        "        if tag >= 0x80:\n"
        "            tag += (data[at] << 7) - 0x80\n"
        "            at += 1\n"
        "            if tag >= 0x4000: tag, at = read_short(data, start)\n"
        + _indent(branches + unknown, 2) +
        "    if at > end: raise too_long(start, at - start)\n"
        "    if unknown and self._unknown: self._unknown += b''.join(unknown)\n"
        "    elif unknown: self._unknown = bytearray().join(unknown)    # which grows in place\n"
        "    return self\n")


def _sources(fields: tuple[_Field, ...], parts: list[_Part],
             whole: _Run | None) -> dict[str, str]:
    """Return the text of all functions that are generated for one class."""
    clear, load = _clear_lines(fields), whole.load_lines() if whole else ""
    put = "".join([_put_lines(each) if isinstance(each, _Field) else each.put_lines()
                   for each in parts])
    sources = {
        "_put": "def _put(self, out, depth):\n" + _indent(
            (whole.short_lines("out.append({})\nreturn " + whole.size) if whole else "")
            + f"total = 0\n{put}if self._unknown:\n    out.append(self._unknown)\n"
            "    total += len(self._unknown)\nreturn total\n", 1),
        "clear": "def clear(self):\n"
                 '    """Set every field back to its default and forget unknown fields."""\n'
                 + _indent(clear, 1),
    }
    if whole:
        short = load.replace("end - at", "len(data)").replace("(data, at)", "(data)")
        sources["encode"] = "def encode(self):\n" + _indent(
            whole.short_lines("return {}") + "return encode_parts(self)\n", 1)
        sources["decode"] = ("def decode(cls, data):\n    if type(data) is bytes:\n"
                             + _indent(short, 2) + "    return decode_parts(cls, data)\n")
    return sources | {"_load": _load_source(parts, clear, load), "__init__": _init_source(fields)}


@functools.lru_cache(maxsize=256)
def _heads(tag: bytes) -> list[bytes]:
    """Return *tag* with each length, or small value, of one byte after it."""
    return [tag + one for one in _ONE]


def _names_for(fields: tuple[_Field, ...], parts: list[_Part],
               whole: _Run | None) -> dict[str, Any]:
    """Return what the text of one class refers to, beside _GENERATED_NAMES."""
    names = dict(_GENERATED_NAMES)
    for each in fields:
        names |= {f"class_{each.number}": each.target, f"default_{each.number}": each.default()}
        if not each.fusible:
            names[f"head_{each.number}"] = _heads(each.tag)
        if each.kind == "enum":
            names[f"member_{each.number}"] = each.target._value2member_map_.get
    for part in parts:
        if not isinstance(part, _Field):
            names |= part.names()
    return names | (whole.names("whole") if whole else {})


def _compile(source: str, label: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute generated text and return what it defines.

    Tracebacks can show its lines, unless it has no *label*: then nothing of it is kept.
    """
    filename = f"<horizon_lite {label or 'expression'}>"
    if label:
        if "".join(linecache.getlines(filename)) not in ("", source):
            filename = f"<horizon_lite {label} {hash(source):x}>"   # another class of that name
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace = dict(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # nobody wrote these lines
        exec(compile(source, filename, "exec"), namespace)
    return namespace


# -- the class --

def _is_taken(name: str) -> bool:
    """Whether a field can't have *name* as attribute: a keyword, private, or a method's."""
    return (keyword.iskeyword(name) or name.startswith("_") or name == "self"
            or name in vars(Message))


def _oneof_member(name: str, group: str) -> property:
    """Return the property through which one member of a oneof is read and set."""
    chosen, value_of = f"_set_{group}", f"_value_{group}"

    def read(self: Any) -> Any:
        return getattr(self, value_of) if getattr(self, chosen) == name else None

    def write(self: Any, value: Any) -> None:
        if value is not None or getattr(self, chosen) == name:
            setattr(self, chosen, None if value is None else name)
            setattr(self, value_of, value)

    return property(read, write)


def _is_type(found: object) -> bool:
    """Whether *found* is a class that fields can have: a message's, or an enum's."""
    return isinstance(found, type) and issubclass(found, Message | enum.IntEnum)


def _scopes(cls: type) -> list[Any]:
    """Return the module of *cls* and the classes around it, from the outside in."""
    scopes: list[Any] = [sys.modules.get(cls.__module__)]
    for part in cls.__qualname__.split(".")[:-1]:
        scopes.append(getattr(scopes[-1], part, None))
    return scopes


def _find_class(owner: type, name: str) -> Any:
    """Return the class called *name*: in the module, then in the classes around *owner*."""
    if name == owner.__name__:
        return owner
    around = owner.__qualname__.rpartition(".")[0]
    found: list[Any] = []
    if "<locals>" in around:        # a class inside a function can only be found by its kin
        found = [each for each in Message.__subclasses__() if each.__name__ == name
                 and (each.__module__, each.__qualname__) == (owner.__module__, f"{around}.{name}")]
    found = found[-1:] or [getattr(scope, name, None) for scope in _scopes(owner)]
    return next(filter(_is_type, found), None)


_MEANT = {str: "string", int: "int64", float: "double", bytes: "bytes", bool: "bool"}


def _resolve_kind(field_: _Field, owner: type, name: str) -> None:
    """Settle what a declared type means."""
    said = field_.target
    if isinstance(said, str) and said in _KINDS and said != "enum":
        field_.kind = said
        return
    target = _find_class(owner, said) if isinstance(said, str) else said
    if not _is_type(target) or target is Message:
        names = sorted(set(_KINDS) - {"enum"})
        meant = _MEANT.get(said, said) if isinstance(said, type) else said
        raise SchemaError(f"{owner.__name__}.{name}: {said!r} is no field type: "
                          f"use {', '.join(names)}, a Message or an IntEnum, or the name of one"
                          f"{_did_you_mean(meant, names) if isinstance(meant, str) else ''}")
    field_.kind = "message" if issubclass(target, Message) else "enum"
    field_.target = target


class _MessageMeta(type):
    """Turn field declarations into slots and, on first use, into generated code."""

    _fields: tuple[_Field, ...]
    _source: dict[str, str] | None          # None until the code is made
    _made: dict[str, Callable[..., Any]]    # then what it defines, by name

    @property
    def __source__(cls) -> dict[str, str]:
        """The generated text, by function name."""
        return dict(cls._prepare()._source or {})

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _MessageMeta:
        own = {key: value for key, value in namespace.items() if isinstance(value, _Field)}
        namespace = {key: value for key, value in namespace.items() if key not in own}
        with_fields = {each for base in bases for each in base.__mro__ if vars(each).get("_fields")}
        if len(with_fields) > 1:
            raise SchemaError(f"{name}: a message can't have the fields of two classes")
        if own and with_fields:
            raise SchemaError(f"{name}: a message can't add fields to {bases[0].__name__}; "
                              "protobuf has no inheritance, use a sub-message")
        for key, each in own.items():
            if each.name:
                raise SchemaError(f"{name}.{key}: this field() is another field already; "
                                  "call field() for each")
            each.name = sys.intern(key)     # generated text compares names by identity
            if _is_taken(key):
                raise SchemaError(f"{name}.{key}: this name is taken by Message; choose another")
        numbers = Counter(each.number for each in own.values())
        if twice := [n for n, count in numbers.items() if count > 1]:
            raise SchemaError(f"{name}: field number {twice[0]} is used twice")
        groups = dict.fromkeys(each.oneof for each in own.values() if each.oneof)
        if both := groups.keys() & own.keys():
            raise SchemaError(f"{name}.{min(both)}: a oneof and a field can't share a name")
        slots = [key for key, each in own.items() if not each.oneof]
        slots += [f"_{part}_{g}" for g in groups for part in ("set", "value")]
        namespace["__slots__"] = (*slots, *(() if bases else ("_unknown",)))
        namespace |= {key: _oneof_member(key, each.oneof)
                      for key, each in own.items() if each.oneof}
        made = super().__new__(mcs, name, bases, namespace)
        if own or not bases:            # a class without fields has those of its base
            made._fields = tuple(own.values())
            made._source = None
        return made

    def _prepare(cls) -> _MessageMeta:
        """Resolve names, generate, compile: once, when the class is first used.

        Returns the class that declares the fields: *cls* or the one it is derived from.
        """
        if cls is Message:
            raise UsageError("Message itself has no fields: derive a class from it")
        owner = next((each for each in cls.__mro__ if vars(each).get("_fields")), cls)
        assert isinstance(owner, _MessageMeta)
        return owner if vars(owner).get("_source") is not None else owner._generate()

    def _generate(cls) -> _MessageMeta:
        for each in cls._fields:
            if each.map and not each.kind:
                each.target = _map_entry(cls, each)
            _resolve_kind(each, cls, each.name)
        parts = _parts_of(cls._fields)
        whole = _whole(parts)
        names = _names_for(cls._fields, parts, whole)
        sources = _sources(cls._fields, parts, whole)
        names |= {"encode_parts": Message.encode, "decode_parts": vars(Message)["decode"].__func__}
        made = {label: _compile(source, f"{cls.__name__}.{label}", names)[label]
                for label, source in sources.items()}
        cls._made = made
        for label, function in made.items():            # what makes instances comes last:
            function.__qualname__ = f"{cls.__qualname__}.{label}"
            # another thread may use what is there; a user's own method stays; and a class
            # without fields keeps Message's, for it may be the base of one with some
            first = next((vars(each)[label] for each in cls.__mro__ if label in vars(each)), None)
            if label == "_put" or cls._fields and (
                    label == "_load" or first is vars(Message).get(label)):
                setattr(cls, label, classmethod(function) if label == "decode" else function)
        cls._source = sources
        return cls


def _map_entry(owner: type, field_: _Field) -> type:
    """Return the message that protobuf defines for a map's entries: 1 key, 2 value."""
    assert field_.map is not None
    entry = {"key": field(1, field_.map[0]), "value": field(2, field_.map[1])}
    for each in entry.values():
        each.always = True
        _resolve_kind(each, owner, field_.name)
    return _MessageMeta(f"{owner.__name__}.{field_.name}", (Message,), entry | {
        "__module__": owner.__module__, "__qualname__": f"{owner.__qualname__}.{field_.name}"})


@dataclass_transform(kw_only_default=True)
class Message(metaclass=_MessageMeta):
    """Base of message classes: standard protobuf on the wire, slots in memory.

    Writing: encode, encode_into, append_to, byte_size.   Reading: decode, decode_from.
    Values: clear, which, to_dict, from_dict, ``==``, ``repr``.

    Constructors take keywords, or positional values in declaration order (cheaper).

    >>> class Point(Message):
    ...     x: int = field(1, "sint32")
    ...     y: int = field(2, "sint32")
    >>> Point(x=1, y=-2).encode()
    b'\\x08\\x02\\x10\\x03'
    >>> Point.decode(b'\\x08\\x02')
    Point(x=1)
    """

    _unknown: _Bytes
    _proto: ClassVar[Any] = None    # where the class was read from, if it was
    __hash__ = None                 # type: ignore[assignment]  # messages are values that change

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # only the first construction comes here: _prepare gives the class its own
        type(self)._prepare()._made["__init__"](self, *args, **kwargs)

    if TYPE_CHECKING:               # generated for each class
        _fields: tuple[_Field, ...]
        def _put(self, out: list[_Bytes], depth: int) -> int: ...

    # -- writing --

    def _parts(self) -> tuple[list[_Bytes], int]:
        """Return what ``encode`` joins, and its length."""
        parts: list[_Bytes] = []
        try:
            return parts, self._put(parts, _MAX_DEPTH)
        except Exception as error:
            raise _name_field(error, self) from error

    def encode(self) -> bytes:
        """Return standard protobuf bytes: fields in number order, defaults left out.

        Raises:
            UsageError: a value has the wrong type or does not fit; names message and field.
        """
        return b"".join(self._parts()[0])

    def append_to(self, out: bytearray) -> None:
        """Append what ``encode`` returns to *out*; on an error *out* is as it was."""
        if not isinstance(out, bytearray):
            raise UsageError(f"append_to grows a bytearray, not {type(out).__name__}")
        out += self.encode()

    def encode_into(self, buffer: bytearray | memoryview, at: int = 0) -> int:
        """Write into *buffer* from *at* and return the end; never resizes it.

        Cost: for small messages more than ``encode``; a large one is not copied twice.

        Raises:
            BufferTooSmall: with ``needed``, before the first byte is written.
        """
        parts, size = self._parts()
        with _room(size, buffer, at) as view:   # a bytearray's slice would copy once more
            if size <= _SMALL:          # joining is quicker, and a copy costs little
                parts = [b"".join(parts)]
            for part in parts:
                end = at + len(part)
                view[at:end] = part
                at = end
        return at

    def byte_size(self) -> int:
        """Return the exact length of ``encode()``; costs as much, less the joining."""
        return self._parts()[1]

    # -- reading --

    @classmethod
    def decode(cls, data: _Bytes) -> Self:
        """Return a new message from *data*; unknown fields are kept and written back.

        Raises:
            WireError: the bytes are not a valid message of this class; ``at`` says where.
        """
        message: Self = _reading(cls, data, None)
        return message

    def decode_from(self, data: _Bytes) -> None:
        """Clear this message and read *data* into it; raises as ``decode`` does."""
        self.clear()
        _reading(type(self), data, self)

    def _load(cls: Any, data: _Bytes, at: int, end: int, depth: int, self: Any = None) -> Any:
        # a function of the class, for it is called without binding; like __init__, this
        # one serves only until the class has its own
        return cls._prepare()._made["_load"](cls, data, at, end, depth, self)

    # -- values --

    def clear(self) -> None:
        """Set every field back to its default and forget unknown fields."""
        type(self)._prepare()._made["clear"](self)

    def which(self, oneof: str) -> str | None:
        """Return the name of the field that is set in *oneof*, or None."""
        try:
            name: str | None = getattr(self, f"_set_{oneof}")
        except AttributeError:
            raise UsageError(f"{type(self).__name__} has no oneof {oneof!r}") from None
        return name

    def _present(self) -> Iterator[tuple[_Field, Any]]:
        for each in self._fields:
            value = getattr(self, each.name)
            if value is not None if each.explicit else value != each.default() or (
                    isinstance(value, float) and math.copysign(1, value) < 0):
                yield each, value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set as plain dicts, lists and values."""
        return {each.name: _plain(value) for each, value in self._present()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return a message from what ``to_dict`` gives; an unknown key is a UsageError."""
        if not isinstance(values, Mapping):
            raise UsageError(f"{cls.__name__}.from_dict takes a dict, not {values!r}")
        message = cls.decode(b"")           # whatever arguments its constructor takes
        fields = {each.name: each for each in cls._fields}
        for key, value in values.items():
            if key not in fields:
                raise UsageError(f"{cls.__name__} has no field {key!r}{_did_you_mean(key, fields)}")
            if value is None and fields[key].explicit:
                continue
            try:
                setattr(message, key, _from_plain(fields[key], value))
            except (AttributeError, TypeError, ValueError):
                raise UsageError(f"{cls.__name__}.{key}: {value!r} does not fit") from None
        return message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).decode, (self.encode(),)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._unknown == other._unknown and all(
            getattr(self, each.name) == getattr(other, each.name) for each in self._fields)

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        shown = [f"{each.name}={value!r}" for each, value in self._present()]
        if self._unknown:
            shown.append(f"<{len(self._unknown)} bytes of unknown fields>")
        return f"{type(self).__name__}({', '.join(shown)})"


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _from_plain(field_: _Field, value: Any, *, one: bool = False) -> Any:
    """Return a field's value, or *one* of a list's, from what ``to_dict`` made of it."""
    if field_.map:
        keys, values = field_.target._prepare()._fields
        return {_key_from_plain(keys, key): _from_plain(values, each)
                for key, each in value.items()}
    if field_.repeated and not one:
        return [_from_plain(field_, each, one=True) for each in _items(value)]
    convert = field_.kind == "message" and not isinstance(value, Message)
    return field_.target.from_dict(value) if convert else value


def _key_from_plain(field_: _Field, key: Any) -> Any:
    """Return a map's key; JSON has made a text of it, whatever it was."""
    if field_.kind == "string" or not isinstance(key, str):
        return key
    return key == "true" if key in ("true", "false") else int(key)


def _generated_local(error: BaseException, name: str, default: Any) -> Any:
    """Return a local of the innermost generated function that *error* passed through."""
    found, trace = default, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith("<horizon_lite "):
            found = trace.tb_frame.f_locals.get(name, found)    # a comprehension's has it not
        trace = trace.tb_next
    return found


def _name_field(error: Exception, message: Message) -> Exception:
    """Turn what went wrong while encoding into an error that names message and field.

    Generated text does not look at types: it fails somehow, and only then every value of
    the message that it was writing is looked at.
    """
    if isinstance(error, HorizonError):
        return error
    message = _generated_local(error, "self", message)
    for each in message._fields:
        try:
            each.check(getattr(message, each.name))
        except Exception as why:
            return UsageError(f"{type(message).__name__}.{each.name}: {why}")
    return UsageError(f"{type(message).__name__}: {error}")


def _reading(cls: Any, data: _Bytes, message: Message | None) -> Any:
    """Read *data* into *message*, or a new one; what goes wrong becomes a WireError."""
    try:
        if type(data) is bytes:
            return cls._load(cls, data, 0, len(data), _MAX_DEPTH, message)
        with _view(data) as view:       # released even if a traceback keeps it
            return cls._load(cls, view, 0, len(view), _MAX_DEPTH, message)
    except (IndexError, struct.error):
        raise WireError("message is cut short", at=memoryview(data).nbytes) from None
    except UnicodeDecodeError as error:
        at: int = _generated_local(error, "at", 0) + error.start
        raise WireError("text is not UTF-8", at=at) from None


def _view(data: _Bytes) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError:
        what = "a memoryview with gaps" if isinstance(data, memoryview) else type(data).__name__
        raise UsageError(f"bytes, bytearray or memoryview is wanted here, not {what}") from None


def _room(size: int, buffer: bytearray | memoryview, at: int) -> memoryview:
    """Return a view of *buffer* into which *size* bytes fit from *at*."""
    view = _view(buffer)
    if view.readonly:
        raise UsageError(f"{type(buffer).__name__} can't be written to: use a bytearray")
    if at < 0:
        raise UsageError(f"at is {at}: it counts from the start of the buffer")
    if at + size > len(view):
        raise BufferTooSmall(size, max(0, len(view) - at))
    return view


# =============================================================================
# 5  PROTO - .proto text to classes and back; the built-in schema; packed movement
# =============================================================================
# Knows: text, SCHEMA.     Never: files that nobody named, transport.
#
# One pass: the text is cut into tokens, a statement at a time is read, each `message`
# becomes a namespace for the metaclass of section 4, and every name goes into one table of
# what can be seen.  Types are looked up at the end of the file, so order does not matter.
# What protoc refuses is refused here.  (protobuf.dev, "Protocol Buffers Version 3 Language
# Specification"; name resolution as in "Packages and name resolution")

_TOKEN = re.compile(r"""
    (?P<blank>\s+|//[^\n]*|/\*.*?\*/|\A\ufeff)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<number>(?>0[xX][\da-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?[fF]?)(?![\w.]))
  | (?P<text>"(?:[^"\\\n]|\\[^\n])*"|'(?:[^'\\\n]|\\[^\n])*')
  | (?P<bad>/\*|["'\d\\`]|[^\x00-\x7f])
  | (?P<sign>[^\s\w])
""", re.VERBOSE | re.DOTALL | re.ASCII)
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\?'\"])|[xX]([\da-fA-F]{1,2})|([0-7]{1,3})|u([\da-fA-F]{4})"
    r"|U([\da-fA-F]{8})|(.))")
_INTEGER = re.compile(r"0[xX][\da-fA-F]+|0[0-7]*|[1-9]\d*")
_ESCAPES = dict(zip("abfnrtv\\?'\"", "\a\b\f\n\r\t\v\\?'\"", strict=True))
_PROTO2 = "is proto2; only proto3 is read here"
_NO_EXTEND = ("'extend' is not supported: options need no definition here, so leave it out, and "
              "the import of files that only define options")
_MAX_NESTED = 32                    # messages in messages, as protoc has it
_PACKAGE = object()
_NOT_CLOSED = {"/*": "this comment is not closed", '"': "this text is not closed",
               "'": "this text is not closed"}


def _unescape(match: re.Match[str]) -> str:
    simple, hexadecimal, octal, short, long, wrong = match.groups()
    if wrong:
        raise ValueError(f"invalid escape \\{wrong}")
    return _ESCAPES[simple] if simple else chr(
        int(octal, 8) if octal else int(hexadecimal or short or long, 16))


def _attribute(name: str, taken: Callable[[str], bool], *others: Container[str]) -> str:
    """Return the attribute for a name of .proto text: itself, or with underscores after it."""
    if taken(name):
        name = name.lstrip("_") + "_"
        name = name if name[0].isalpha() else "f" + name        # it was _ or _1
        while taken(name) or any(name in each for each in others):
            name += "_"
    return name


def _is_no_member(name: str) -> bool:
    """Whether an enum of Python's can't have the value *name*."""
    return keyword.iskeyword(name) or name.startswith("_") or name == "mro"


def _find_type(known: Mapping[str, Any], name: str, scope: str) -> Any:
    """Return the type that *name* means in *scope*: innermost first, then outwards."""
    if name.startswith("."):
        return known.get(name[1:])
    first, dot, _ = name.partition(".")
    while True:
        found = known.get(f"{scope}.{first}".lstrip("."))
        if isinstance(found, type) or dot and found is _PACKAGE:
            return known.get(f"{scope}.{name}".lstrip("."))         # protoc looks no further
        if not scope:
            return None
        scope = scope.rpartition(".")[0]


class _Origin(NamedTuple):
    """Where a class was read from, and what its attributes do not tell."""

    full_name: str = ""
    file: str = ""
    names: Mapping[str, str] = {}   # by attribute: of its fields, or of an enum's values
    reserved: tuple[str, ...] = ()


class _ProtoFile:
    """What one file declares."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.package = ""
        self.types: dict[str, Any] = {}                     # top-level classes
        self.services: dict[str, dict[str, str]] = {}       # methods and their types, as text
        self.imports: list[tuple[str, str]] = []            # "public", "weak" or "", path
        self.names: dict[str, Any] = {}                     # full name -> what can be seen here
        self.exports: dict[str, Any] = {}                   # and by those who import this


class _ProtoReader:
    """Read the tokens of one proto3 text into a _ProtoFile."""

    def __init__(self, text: str, label: str, load: Callable[[str], _ProtoFile]) -> None:
        self._file = _ProtoFile(label)
        self._load = load
        self._text = text
        self._tokens: list[str] = []
        self._offsets: list[int] = []
        self._at = 0
        self._options: dict[str, str] = {}                              # see _option
        self._waiting: list[tuple[str, str, int, _Field | None]] = []   # for _look_up
        for match in _TOKEN.finditer(text):
            if match.lastgroup != "blank":
                self._tokens.append(match[0])
                self._offsets.append(match.start())
            if match.lastgroup == "bad":
                raise self._fail(_NOT_CLOSED.get(match[0], f"unexpected {match[0]!r}"), -1)
        self._tokens.append("")
        self._offsets.append(len(text.rstrip()))

    # -- tokens --

    def _fail(self, what: str, at: int | None = None) -> SchemaError:
        """Return an error that says where: at the next token, or at that of index *at*."""
        offset = self._offsets[self._at if at is None else at]
        line = self._text.count("\n", 0, offset) + 1
        column = offset - self._text.rfind("\n", 0, offset)
        return SchemaError(f"{self._file.label}:{line}:{column}: {what}")

    def _peek(self) -> str:
        return self._tokens[self._at]           # the last one is empty

    def _take(self, fits: object, wanted: str) -> str:
        """Pass the next token and return it, if it is what was wanted."""
        if not fits:
            raise self._fail(f"expected {wanted}, got {self._peek() or 'the end'!r}")
        self._at += 1
        return self._tokens[self._at - 1]

    def _accept(self, *signs: str) -> str:
        """Pass one of *signs* if it comes next, and return it."""
        return self._take(True, "") if self._peek() in signs else ""

    def _expect(self, sign: str) -> None:
        self._take(self._peek() == sign, repr(sign))

    def _word(self, wanted: str) -> str:
        return self._take(self._peek().isidentifier(), wanted)

    def _path(self, wanted: str) -> str:
        """Return dotted words, perhaps with a dot before them."""
        return self._accept(".") + ".".join(self._word(wanted) for _ in self._list("."))

    def _integer(self, wanted: str = "an integer") -> int:
        sign = -1 if self._accept("-") else 1
        if len(self._peek()) > 24:
            raise self._fail(f"{self._peek()[:20]}... is too large")
        token = self._take(_INTEGER.fullmatch(self._peek()), wanted)
        return sign * int(token, 8 if token[0] == "0" and token.isdigit() else 0)

    def _block(self, empty: str = ";") -> Iterator[None]:
        """Yield for each statement between braces that is no option; the caller passes it."""
        self._expect("{")
        while not self._accept("}"):
            if self._accept("option"):
                self._option()
            elif not self._accept(empty):
                yield

    def _list(self, separator: str) -> Iterator[None]:
        """Yield for each item of a list; the caller passes it."""
        yield
        while self._accept(separator):
            yield

    def _string(self, wanted: str) -> str:
        pieces: list[str] = []
        while not pieces or self._peek()[:1] in ('"', "'"):
            token = self._take(self._peek()[:1] in ('"', "'"), wanted)
            try:
                pieces.append(_ESCAPE.sub(_unescape, token[1:-1]))
            except (ValueError, OverflowError) as error:
                raise self._fail(str(error), self._at - 1) from None
        return "".join(pieces)

    # -- names --

    def _enter(self, full: str, what: object, at: int) -> None:
        """Put what a name means into the table; it can't mean two things."""
        if self._file.names.setdefault(full, what) is not what:
            raise self._fail(f"{full!r} is declared twice", at)
        self._file.exports[full] = what

    def _name(self, scope: str, wanted: str) -> tuple[str, str, int]:
        """Pass a new name; return it, its full form, and where it stands."""
        at, name = self._at, self._word(wanted)
        full = f"{scope}.{name}".lstrip(".")
        self._enter(full, object(), at)         # nothing else is the same
        return name, full, at

    def _declare(self, body: _Body) -> Any:
        """Make the type that was read, and put it in the place of its name."""
        for name, number, at, _ in body.fields:
            if name in body.reserved_names or body.is_reserved(number, number):
                raise self._fail(f"{name!r} or its number {number} is reserved", at)
        made = body.make(self._file)
        self._file.names[body.full] = self._file.exports[body.full] = made
        if body.full == f"{self._file.package}.{made.__name__}".lstrip("."):
            self._file.types[made.__name__] = made
        return made

    def _look_up(self, name: str, scope: str, at: int, field_: _Field | None) -> None:
        """Find the type that a field, or a service, asks for."""
        found = _find_type(self._file.names, name, scope)
        if not isinstance(found, type) or not field_ and not isinstance(found, _MessageMeta):
            raise self._fail(f"there is no {'type' if field_ else 'message'} {name!r} here"
                             f"{self._hint(name)}", at)
        if field_ and field_.map:
            field_.map = field_.map[0], found
        elif field_:
            field_.target = found

    def _hint(self, name: str) -> str:
        for each in _WELL_KNOWN:
            path = f"google/protobuf/{each}.proto"
            if name.lstrip(".") in _well_known(path).exports:
                return f'; add: import "{path}";'
        known = [each for each, what in self._file.names.items() if isinstance(what, type)]
        last = name.rpartition(".")[2]
        elsewhere = [each for each in known if each.rpartition(".")[2] == last]
        return _did_you_mean(elsewhere[0] if elsewhere else name, [*known, *_KINDS])

    # -- statements --

    def read(self) -> _ProtoFile:
        """Return what the file declares.

        Raises:
            SchemaError: file, line and column, and what was expected there.
        """
        if self._accept("edition"):
            raise self._fail("editions are not supported; use syntax = \"proto3\"", 0)
        if self._accept("syntax"):
            self._expect("=")
            if (syntax := self._string('"proto3"')) != "proto3":
                why = _PROTO2 if syntax == "proto2" else "is unknown; say \"proto3\""
                raise self._fail(f"syntax {syntax!r} {why}", self._at - 1)
            self._expect(";")
        while self._peek():
            word = self._take(self._peek() in _STATEMENTS,
                              "message, enum, service, import, package or option")
            _STATEMENTS[word](self, self._file.package)
        for each in self._waiting:
            self._look_up(*each)
        return self._file

    def _import(self, scope: str) -> None:
        at = self._at
        how = self._accept("public", "weak")
        path = self._string("the path of a file")
        try:
            found = self._load(path)
        except OSError as error:
            raise self._fail(str(error), at) from None
        self._expect(";")
        if any(path == before for _, before in self._file.imports):
            raise self._fail(f"{path!r} is imported twice", at)
        self._file.imports.append((how, path))
        for full, what in found.exports.items():
            if self._file.names.setdefault(full, what) is not what:
                raise self._fail(f"{full!r} of {path!r} is declared already", at)
            if how == "public":
                self._file.exports[full] = what

    def _package(self, scope: str) -> None:
        at = self._at
        if scope or self._file.types:
            raise self._fail("package comes once, and before all types", at - 1)
        self._file.package = ".".join(self._word("a package's name") for _ in self._list("."))
        self._expect(";")
        for full in itertools.accumulate(self._file.package.split("."), "{}.{}".format):
            self._enter(full, _PACKAGE, at)

    def _option(self, scope: str = "") -> None:
        """Pass an option; what a block says stays in ``_options``."""
        name, value = self._one_option()
        self._options[name] = value
        self._expect(";")

    def _one_option(self) -> tuple[str, str]:
        """Pass `name = value` and return both as text."""
        start = self._at
        for _ in self._list("."):
            if self._accept("("):
                self._path("an option's name")
                self._expect(")")
            else:
                self._word("an option's name")
        name = "".join(self._tokens[start:self._at])
        self._expect("=")
        start = self._at
        if self._peek() == "{":
            self._aggregate()
        elif self._peek()[:1] in ('"', "'"):
            self._string("a value")
        else:
            self._accept("-", "+")
            self._take(re.match(r"[\w.]", self._peek()), "an option's value")
        return name, "".join(self._tokens[start:self._at])

    def _aggregate(self) -> None:
        """Pass `{ ... }` in text format."""
        closing: list[str] = []
        while token := self._peek():
            self._at += 1
            if end := {"{": "}", "[": "]", "<": ">"}.get(token):
                closing.append(end)
            elif token in ("}", "]", ">") and token != closing.pop():
                raise self._fail(f"unexpected {token!r}", self._at - 1)
            if not closing:
                return
        self._expect("}")

    def _refuse(self, scope: str) -> None:
        word = self._tokens[self._at - 1]
        raise self._fail(_NO_EXTEND if word == "extend" else f"{word!r} {_PROTO2}", self._at - 1)

    def _message(self, scope: str) -> Any:
        _, full, at = self._name(scope, "a message's name")
        if full.removeprefix(self._file.package + ".").count(".") >= _MAX_NESTED:
            raise self._fail(f"messages nested {_MAX_NESTED} deep", at)
        body = _Body(full, _MAX_FIELD)
        for _ in self._block():
            if word := self._accept("message", "enum", *_REFUSED):
                body.nested.append(_STATEMENTS[word](self, full))
            elif self._accept("reserved"):
                self._reserved(body)
            elif self._accept("oneof"):
                self._oneof(body)
            else:
                label = self._accept("repeated", "optional")
                self._field(body, **({label: True} if label else {}))
        return self._declare(body)

    def _oneof(self, body: _Body) -> None:
        group, _, at = self._name(body.full, "a oneof's name")
        before = len(body.fields)
        for _ in self._block(empty="}"):        # it has no empty statements
            if self._peek() in ("repeated", "optional", "required", "map"):
                raise self._fail(f"a oneof can't hold {self._peek()!r} fields")
            self._field(body, oneof=group)
        if len(body.fields) == before:
            raise self._fail(f"oneof {group!r} has no field", at)

    def _numbered(self, scope: str, what: str) -> tuple[str, int, int, int, dict[str, str]]:
        """Pass `name = number [options];` and return all three, and where the first two are."""
        name, _, at = self._name(scope, f"a {what}'s name")
        self._expect("=")
        number_at, number = self._at, self._integer(f"a {what}'s number")
        options: dict[str, str] = {}
        if self._accept("["):
            for _ in self._list(","):
                if self._peek() == "default":
                    raise self._fail(f"a default {_PROTO2}")
                options.update([self._one_option()])
            self._expect("]")
        self._expect(";")
        return name, at, number, number_at, options

    def _field(self, body: _Body, **options: Any) -> None:
        type_at, kind = self._at, self._path("a field's type")
        if kind == "group":
            raise self._fail(f"a group {_PROTO2}", type_at)
        if kind == "map" and self._accept("<"):
            if options:
                raise self._fail("a map can't be repeated or optional", type_at)
            key = self._word("a map's key type")
            if key not in _MAP_KEYS:
                raise self._fail("a map's key is bool, string or any integer type", self._at - 1)
            self._expect(",")
            type_at, kind = self._at, self._path("a map's value type")
            self._expect(">")
            options["map"] = key, kind
        name, at, number, number_at, said = self._numbered(body.full, "field")
        packed = said.get("packed")
        try:
            made: _Field = field(number, None if "map" in options else kind, **options,
                                 packed=packed != "false")
        except SchemaError as error:
            raise self._fail(str(error), number_at) from None
        if packed == "true" and (not made.repeated or made.map or kind in ("string", "bytes")):
            raise self._fail("only repeated numbers, bools and enums can be packed", at)
        if (other := body.numbers.setdefault(number, name)) != name:
            raise self._fail(f"number {number} is {other!r} already", number_at)
        body.fields.append((name, number, at, made))
        if kind not in _KINDS or kind == "enum":
            self._waiting.append((kind, body.full, type_at, made))

    def _reserved(self, body: _Body) -> None:
        """Read `reserved` of a message or an enum: numbers, or names in quotes."""
        names = self._peek()[:1] in ('"', "'")
        for _ in self._list(","):
            at = self._at
            if names:
                if (name := self._string("a name in quotes")) in body.reserved_names:
                    raise self._fail(f"{name!r} is reserved already", at)
                body.reserved_names[name] = None
                continue
            low = high = self._integer("a number, or a name in quotes")
            if self._accept("to"):
                high = body.top if self._accept("max") else self._integer()
            if low < 1 and body.is_message or high > body.top:
                raise self._fail(f"{low} to {high} are no field numbers", at)
            if low > high or body.is_reserved(low, high):
                raise self._fail(f"{low} to {high} is backwards, or reserved already", at)
            bisect.insort(body.reserved, (low, high))
        self._expect(";")

    def _enum(self, scope: str) -> Any:
        name, full, at = self._name(scope, "an enum's name")
        body = _Body(full, (1 << 31) - 1)
        self._options.clear()
        for _ in self._block():
            if self._accept("reserved"):
                self._reserved(body)
                continue
            # a value is named beside the enum, not in it: as C++ has it
            key, key_at, number, number_at, _ = self._numbered(scope, "value")
            if number and not body.fields:
                raise self._fail("the first value of an enum must be 0", number_at)
            if not -1 << 31 <= number < 1 << 31:
                raise self._fail(f"{number} does not fit into 32 bits", number_at)
            body.numbers.setdefault(number, key)
            body.fields.append((key, number, key_at, None))
        if not body.fields:
            raise self._fail(f"enum {name!r} has no value", at)
        twice = [(number, at) for name, number, at, _ in body.fields
                 if body.numbers[number] != name]
        if twice and self._options.get("allow_alias") != "true":
            raise self._fail(f"number {twice[0][0]} is used twice; for that, say "
                             "option allow_alias = true;", twice[0][1])
        return self._declare(body)

    def _service(self, scope: str) -> None:
        name, full, _ = self._name(scope, "a service's name")
        methods = self._file.services[name] = {}
        for _ in self._block():
            self._expect("rpc")
            method = self._name(full, "a method's name")[0]
            takes = self._rpc_type(scope)
            self._expect("returns")
            methods[method] = f"{takes} returns {self._rpc_type(scope)}"
            if not self._accept(";"):
                for _ in self._block():
                    self._expect("option")      # nothing else can stand there

    def _rpc_type(self, scope: str) -> str:
        self._expect("(")
        stream = "stream " if self._accept("stream") else ""
        at, name = self._at, self._path("a message's name")
        self._waiting.append((name, scope, at, None))
        self._expect(")")
        return f"({stream}{name})"


_REFUSED = ("extend", "extensions", "required", "group")
_STATEMENTS: dict[str, Callable[[_ProtoReader, str], Any]] = {
    "import": _ProtoReader._import, "package": _ProtoReader._package,
    "option": _ProtoReader._option, "message": _ProtoReader._message, "enum": _ProtoReader._enum,
    "service": _ProtoReader._service, ";": lambda reader, scope: None,
    **dict.fromkeys(_REFUSED, _ProtoReader._refuse),
}


class _Body:
    """What stands between the braces of a message or an enum."""

    def __init__(self, full: str, top: int) -> None:
        self.full = full
        self.top = top                                      # the largest number it can hold
        self.is_message = top == _MAX_FIELD
        self.fields: list[tuple[str, int, int, _Field | None]] = []     # or values: see _numbered
        self.nested: list[Any] = []
        self.numbers: dict[int, str] = {}
        self.reserved: list[tuple[int, int]] = []           # ranges, in order
        self.reserved_names: dict[str, None] = {}

    def is_reserved(self, low: int, high: int) -> bool:
        """Whether any number of a range is reserved."""
        at = bisect.bisect_right(self.reserved, (high, _MASK64))
        return at > 0 and self.reserved[at - 1][1] >= low

    def make(self, file: _ProtoFile) -> Any:
        """Return the class: fields or values under names that Python can take, types inside."""
        said = {name for name, *_ in self.fields} | {each.__name__ for each in self.nested}
        said |= {each.oneof for *_, each in self.fields if each}
        names: dict[str, str] = {}
        members: dict[str, Any] = {}
        for name, number, _, field_ in self.fields:
            attribute = _attribute(name, _is_taken if field_ else _is_no_member, said, names)
            names[attribute], members[attribute] = name, field_ or number
        name, module = self.full.rpartition(".")[2], os.path.basename(file.label)
        qualname = self.full.removeprefix(file.package + ".")
        make: Any = enum.IntEnum    # mypy wants its first argument written out
        if self.is_message:
            members |= {"__module__": module, "__qualname__": qualname}
            made: Any = _MessageMeta(name, (Message,), members)
        else:
            made = make(name, members, module=module, qualname=qualname)
        ranges = [f"{low}" if low == high else f"{low} to {'max' if high == self.top else high}"
                  for low, high in self.reserved]
        quoted = [json.dumps(name) for name in self.reserved_names]
        made._proto = _Origin(self.full, file.label, names,
                              tuple(", ".join(each) for each in (ranges, quoted) if each))
        for each in self.nested:
            each._outer = made
            setattr(made, _attribute(each.__name__, _is_taken, said, vars(made)), each)
        return made


# -- files --

_WELL_KNOWN = {                     # protobuf.dev, "Well-Known Types"
    "timestamp": "message Timestamp { int64 seconds = 1; int32 nanos = 2; }",
    "duration": "message Duration { int64 seconds = 1; int32 nanos = 2; }",
    "any": "message Any { string type_url = 1; bytes value = 2; }",
    "empty": "message Empty {}",
    "field_mask": "message FieldMask { repeated string paths = 1; }",
    "struct": """
        message Struct { map<string, Value> fields = 1; }
        message Value { oneof kind {
          NullValue null_value = 1; double number_value = 2; string string_value = 3;
          bool bool_value = 4; Struct struct_value = 5; ListValue list_value = 6; } }
        enum NullValue { NULL_VALUE = 0; }
        message ListValue { repeated Value values = 1; }""",
    "wrappers": "".join(f"message {name}Value {{ {name.lower()} value = 1; }}" for name in (
        "Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")),
    "descriptor": "",               # what imports it goes on to `extend`, and is told there
}


@functools.cache
def _well_known(path: str) -> _ProtoFile:
    """Return a file of google/protobuf: the same classes for everybody who imports it."""
    name = path.removeprefix("google/protobuf/").removesuffix(".proto")
    if path != f"google/protobuf/{name}.proto" or name not in _WELL_KNOWN:
        raise FileNotFoundError(f"there is no file {path!r}")
    text = f'syntax = "proto3"; package google.protobuf; {_WELL_KNOWN[name]}'
    return _ProtoReader(text, path, _well_known).read()


_Path = str | os.PathLike[str]


class _ProtoLoader:
    """Find and read files and what they import, each once."""

    def __init__(self, roots: Iterable[_Path]) -> None:
        self._roots = [os.fspath(each) for each in roots]
        self._files: dict[str, _ProtoFile] = {}
        self._open: list[str] = []          # what is being read: imports must not lead back

    def load(self, path: str) -> _ProtoFile:
        """Return what an import asks for."""
        with contextlib.suppress(FileNotFoundError):
            return _well_known(path)
        if path.startswith("/") or {"", ".", ".."} & set(path.split("/")) or "\\" in path:
            raise FileNotFoundError(f"{path!r} must be relative, with single slashes and no '..'")
        for root in self._roots:
            if os.path.isfile(full := os.path.join(root, path)):
                return self.read(full)
        raise FileNotFoundError(
            f"there is no file {path!r} in {', '.join(self._roots)}" if self._roots else
            f"{path!r} can't be imported by a text: load_proto(path, include=...) finds files")

    def read(self, full: str) -> _ProtoFile:
        """Return what the file at *full* declares."""
        key = os.path.realpath(full)
        if key in self._open:
            raise FileNotFoundError("imports lead back to where they came from: "
                                    + " -> ".join(map(os.path.basename, [*self._open, key])))
        if key not in self._files:
            if len(self._open) > _MAX_DEPTH:
                raise FileNotFoundError(f"imports nested deeper than {_MAX_DEPTH}")
            # comments may hold any bytes, and lines end where protoc ends them
            with open(full, encoding="utf-8", errors="surrogateescape", newline="") as file:
                text = file.read()
            self._open.append(key)
            self._files[key] = _ProtoReader(text, full, self.load).read()
            self._open.pop()
        return self._files[key]


class _Namespace(SimpleNamespace):
    """The top-level types of a file, as attributes; or a package, with all that is seen in it."""

    __slots__ = ("__file__", "__services__", "__proto__")

    def __init__(self, file: _ProtoFile, scope: str = "") -> None:
        super().__init__(**({} if scope else file.types))
        self.__file__ = file.label
        self.__services__ = {name: tuple(methods) for name, methods in file.services.items()}
        self.__proto__ = file, scope

    def __dir__(self) -> list[str]:
        file, scope = self.__proto__
        inside = [full.removeprefix(f"{scope}.") for full, what in file.names.items()
                  if full.startswith(f"{scope}.") and (what is _PACKAGE or isinstance(what, type))]
        return [*super().__dir__(), *inside]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)      # while it is copied
        file, scope = self.__proto__
        full = f"{scope}.{name}".lstrip(".")
        found = file.names.get(full)
        if found is _PACKAGE:
            return _Namespace(file, full)
        if isinstance(found, type):
            return found
        raise AttributeError(f"there is no type or package {full!r}"
                             f"{_did_you_mean(full, file.names)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _Namespace, self.__proto__


def load_proto(path: _Path, include: _Path | Iterable[_Path] = ()) -> SimpleNamespace:
    """Return the classes that a proto3 file declares, as attributes; no protoc is needed.

    Imports are looked for in *include*, a folder or several, then beside the file;
    ``google/protobuf/timestamp``, ``duration``, ``any``, ``wrappers``, ``empty``, ``struct``
    and ``field_mask`` are built in. Nested types are attributes of their class; what is
    imported is there by its full name (``schema.google.protobuf.Timestamp``). A field named
    like a Python keyword or a method of Message gets an underscore after it as attribute, not
    on the wire. Comments and options are parsed and ignored, services too: ``__services__``
    names them and their methods. A file that does not say its syntax is taken for proto3.

    Raises:
        SchemaError: file, line, column, and what was expected there.
        OSError: *path* itself can't be read.
    """
    return _Namespace(_read_proto(path, include))


def _read_proto(path: _Path, include: Any) -> _ProtoFile:
    folders = [include] if isinstance(include, str | os.PathLike) else list(include)
    path = os.fspath(path)
    if not os.path.exists(path):        # as protoc's -I: the file itself may be in a folder too
        with contextlib.suppress(FileNotFoundError):    # the error of opening it says more
            return _ProtoLoader(folders).load(path)
    return _ProtoLoader([*folders, os.path.dirname(path) or "."]).read(path)


def parse_proto(text: str) -> SimpleNamespace:
    """Return the classes that a proto3 *text* declares: ``load_proto`` from a string.

    Only well-known types can be imported.

    Raises:
        SchemaError: line, column, and what was expected there.
    """
    if not isinstance(text, str):
        raise UsageError(f"parse_proto reads text, not {type(text).__name__}")
    if text.endswith(".proto"):
        raise UsageError(f"parse_proto reads text; load_proto({text!r}) reads a file")
    return _Namespace(_ProtoReader(text, "<text>", _ProtoLoader(()).load).read())


# -- and back --

_NO_TYPES = {*_KINDS, *_STATEMENTS, "map", "oneof", "optional", "repeated", "reserved"}


class _ProtoWriter:
    """Write classes as .proto text; ``outside`` are those that other files declare."""

    def __init__(self, package: str, outside: Iterable[Any]) -> None:
        self._package = package
        self._outside: dict[Any, _Origin] = {each: each._proto for each in outside}
        self._names: dict[str, Any] = {each.full_name: cls for cls, each in self._outside.items()}
        self._full_names: dict[Any, str] = {}       # of what is written
        self._used: set[str] = set()                # files of what was referred to outside

    def write(self, classes: Iterable[Any], imports: list[str] | None = None) -> str:
        """Return the text of *classes*, and of all that they refer to."""
        tops, queue = [], list(classes)
        for cls in queue:                           # which grows
            while outer := _outer(cls):
                cls = outer
            if cls not in self._outside and cls not in self._full_names:
                tops.append(cls)
                queue += self._add(cls, self._package)
        for full in list(self._names):
            while full := full.rpartition(".")[0]:
                self._names.setdefault(full, _PACKAGE)
        lines = [line for cls in tops for line in ("", *self._type(cls))]
        head = ['syntax = "proto3";', *([f"package {self._package};"] if self._package else ())]
        head += imports or [f'import "{path}";' for path in sorted(self._used)]
        return "\n".join(head + lines) + "\n"

    def _add(self, cls: Any, around: str) -> Iterator[Any]:
        """Name a class and all that is nested in it; yield what their fields refer to."""
        full = f"{around}.{_origin(cls).full_name.rpartition('.')[2] or cls.__name__}".lstrip(".")
        self._full_names[cls] = full
        self._names[full] = cls
        yield from _targets(cls)
        for each in _nested_types(cls):
            yield from self._add(each, full)

    def _refer(self, target: Any, scope: str) -> str:
        """Return the shortest name that means *target* in *scope*."""
        if origin := self._outside.get(target):
            self._used.add(origin.file)
            full, most = origin.full_name, 0        # of another file: its full name
        else:
            full = self._full_names[target]
            most = full.count(".")
        names = (".".join(full.split(".")[at:]) for at in range(most, -1, -1))
        return next((each for each in names if each.partition(".")[0] not in _NO_TYPES
                     and _find_type(self._names, each, scope) is target), "." + full)

    def _type(self, cls: Any) -> list[str]:
        """Return the lines that declare a class."""
        full, origin, comment = self._full_names[cls], _origin(cls), []
        lines = [f"reserved {each};" for each in origin.reserved]
        if isinstance(cls, _MessageMeta):
            comment = [f"// {''.join(filter(str.isprintable, line)).strip()}".rstrip()
                       for line in (vars(cls).get("__doc__") or "").strip().splitlines()]
            for each in _nested_types(cls):
                lines += self._type(each)
            lines += self._fields(cls, full, origin.names)
        else:
            lines += self._values(cls, origin.names)
        word = "message" if isinstance(cls, _MessageMeta) else "enum"
        return comment + _braces(f"{word} {full.rpartition('.')[2]}", lines)

    def _values(self, cls: Any, names: Mapping[str, str]) -> list[str]:
        values = {names.get(key, key): each.value for key, each in cls.__members__.items()}
        if 0 not in values.values():
            raise SchemaError(f"{cls.__name__} has no value 0, which proto3 needs as the default")
        alias = len(set(values.values())) < len(values)
        return ["option allow_alias = true;"] * alias + [
            f"{key} = {value};"
            for key, value in sorted(values.items(), key=lambda each: each[1] != 0)]

    def _fields(self, cls: Any, scope: str, names: Mapping[str, str]) -> list[str]:
        parts: dict[object, list[str]] = {}         # the members of a oneof stand together
        for each in cls._fields:
            loose = each.repeated and not each.packed and each.wire_type != _LEN
            parts.setdefault(each.oneof or each, []).append(
                f"{self._kind(each, scope)} {names.get(each.name, each.name)} = {each.number}"
                f"{' [packed = false]' if loose else ''};")
        return [line for part, lines in parts.items() for line in (
            _braces(f"oneof {part}", lines) if isinstance(part, str) else lines)]

    def _kind(self, field_: _Field, scope: str) -> str:
        """Return a field's type, with the label before it."""
        if field_.map:
            return f"map<{', '.join(self._kind(each, scope) for each in field_.target._fields)}>"
        label = "repeated " if field_.repeated else "optional " if field_.optional else ""
        named = field_.kind in ("message", "enum")
        return label + (self._refer(field_.target, scope) if named else field_.kind)


def _braces(head: str, lines: list[str]) -> list[str]:
    return [head + " {", *(f"  {each}" for each in lines), "}"] if lines else [head + " {}"]


def _origin(cls: Any) -> _Origin:
    return vars(cls).get("_proto") or _Origin()             # not that of a base class


def _nested_types(cls: Any) -> list[Any]:
    """Return the messages and enums that are declared inside *cls*."""
    return [each for each in vars(cls).values() if isinstance(cls, _MessageMeta) and _is_type(each)
            and each.__qualname__ == f"{cls.__qualname__}.{each.__name__}"]


def _outer(cls: Any) -> Any:
    """Return the message in which *cls* is declared, or None."""
    if vars(cls).get("_proto"):
        return vars(cls).get("_outer")
    found = _scopes(cls)[-1]
    return found if isinstance(found, _MessageMeta) else None


def _targets(cls: Any) -> Iterator[Any]:
    """Yield the types that the fields of *cls* have."""
    for each in cls._prepare()._fields if isinstance(cls, _MessageMeta) else ():
        if each.map:
            yield from _targets(each.target)
        elif each.kind in ("message", "enum"):
            yield each.target


def proto_text(*classes: type[Message] | type[enum.IntEnum]) -> str:
    """Return .proto text that declares *classes* and all that they refer to.

    protoc accepts it, and ``parse_proto`` reads it back. All are declared in one package, that
    of the first class; well-known types are imported. Docstrings of messages become comments.

    Raises:
        SchemaError: no .proto text can say it, such as an enum without 0.
    """
    if wrong := [each for each in classes if not _is_type(each)]:
        raise UsageError(f"proto_text() takes Message and IntEnum classes, not {wrong[0]!r}")
    first = _origin(classes[0]).full_name if classes else ""
    package = first.removesuffix(classes[0].__qualname__).rstrip(".") if first else ""
    well_known = [each for name in _WELL_KNOWN
                  for each in _well_known(f"google/protobuf/{name}.proto").types.values()]
    text = _ProtoWriter(package, set(well_known) - set(classes)).write(classes)
    try:
        parse_proto(text)
    except SchemaError as error:
        raise SchemaError(f"these classes can't be written as .proto text: {error}") from None
    return text


def _file_text(file: _ProtoFile) -> str:
    """Return a file as the writer writes it, with its imports and services."""
    seen = {each for each in file.names.values() if isinstance(each, type)}
    writer = _ProtoWriter(file.package, (each for each in seen if _origin(each).file != file.label))
    imports = [f'import {how + " " if how else ""}"{path}";' for how, path in file.imports]
    return writer.write(file.types.values(), imports) + "".join(
        "\n".join([f"\nservice {name} {{", *(f"  rpc {key}{types};" for key, types in rpcs.items()),
                   "}\n"]) for name, rpcs in file.services.items())


# Numbers of seed 000 as its repository had them when the seed was written; where the seed is
# silent, as that repository settled later.  Our own additions start at 100.
_BUILTIN_PROTO = """\
// horizon_lite's built-in schema. Any protobuf library can speak it.
syntax = "proto3";
package horizon;

// ---- between a host and its plugins: varint-delimited frames -----------------

message HostToPlugin {
  string plugin_id = 1;
  oneof payload {
    HostHello hello = 10; HostShutdown shutdown = 11;
    EventEnvelope event = 20; EventBatch events = 21; CompressedEventBatch compressed_events = 22;
    ActionResult action_result = 100; PackedMovement packed_movement = 105;
  }
}
message PluginToHost {
  string plugin_id = 1;
  oneof payload {
    PluginHello hello = 10; EventSubscribe subscribe = 11;
    ActionBatch actions = 20; LogMessage log = 30; EventResult event_result = 40;
  }
}

message HostHello { string api_version = 1; string boot_id = 2; }
message HostShutdown { string reason = 1; }
message PluginHello {
  string name = 1; string version = 2; string api_version = 3;
  repeated CommandSpec commands = 4; string token = 100;
  bool uncompressed = 101;               // it wants no compressed_events
}
message CommandSpec { string name = 1; string description = 2; }
message EventSubscribe {
  repeated string events = 1;            // "CHAT", "PLAYER_MOVE", ..., "ALL"; replaces the last
  string packed = 100;                   // "f32" or "f64": movement as one block a tick
}
message LogMessage { string level = 1; string message = 2; }

message EventResult {
  string event_id = 1; optional bool cancel = 2; string reason = 100;   // of cancelling
  oneof update { ChatMutation chat = 10; BlockBreakMutation block_break = 11; }
}
message ChatMutation { optional string message = 1; }
message BlockBreakMutation { repeated ItemStack drops = 1; optional int32 xp = 2; }
message ItemStack { string name = 1; int32 meta = 2; int32 count = 3; }

message ActionBatch { repeated Action actions = 1; }
message Action {
  optional string correlation_id = 1;
  oneof kind { SendChatAction send_chat = 10; TeleportAction teleport = 11; KickAction kick = 12; }
}
message SendChatAction { string target_uuid = 1; string message = 2; }    // no target: everybody
message TeleportAction { string player_uuid = 1; Vec3 position = 2; Vec3 rotation = 3; }
message KickAction { string player_uuid = 1; string reason = 2; }
message ActionResult { string correlation_id = 1; optional ActionStatus status = 2; }
message ActionStatus { bool ok = 1; optional string error = 2; }
message Vec3 { double x = 1; double y = 2; double z = 3; }

// data is an RFC 1950 zlib stream of an EventBatch
message CompressedEventBatch { bytes data = 1; int32 original_size = 2; }

// ---- events, both to plugins and to clients (subprotocol horizon.proto.v1) ----

message EventBatch { repeated EventEnvelope events = 1; }
message EventEnvelope {
  string event_id = 1;
  string type = 2;                       // "PLAYER_MOVE", "CHAT", ...
  bool expects_response = 3;
  oneof payload {
    PlayerJoinEvent player_join = 10; PlayerQuitEvent player_quit = 11; ChatEvent chat = 12;
    CommandEvent command = 13; BlockBreakEvent block_break = 14; WorldCloseEvent world_close = 15;
    PlayerMoveEvent player_move = 16; ClientEvent client_event = 101;
    TopicMessage topic_message = 102; ZoneEnter zone_enter = 103; ZoneExit zone_exit = 104;
    PackedMovement packed_movement = 105; ClientRequest request = 106; Reply reply = 107;
    GorcEvent gorc_event = 108;
  }
}

message PlayerJoinEvent { string player_uuid = 1; string name = 2; }
message PlayerQuitEvent { string player_uuid = 1; string name = 2; }
message ChatEvent { string player_uuid = 1; string name = 2; string message = 3; }
message CommandEvent { string player_uuid = 1; string name = 2; string raw = 3; }
message BlockBreakEvent {
  string player_uuid = 1; string name = 2; string world = 3;
  int32 x = 4; int32 y = 5; int32 z = 6;
}
message WorldCloseEvent {}
message PlayerMoveEvent {
  string player_uuid = 1;
  double x = 2; double y = 3; double z = 4;
  float yaw = 5; float pitch = 6; bool on_ground = 7;
}

// data is JSON in the next seven; where there is an original_size, a zlib stream of so many bytes
message ClientEvent { string namespace = 1; string event = 2; bytes data = 3; string id = 4; }
message TopicMessage {
  string topic = 1; bytes payload = 2; uint64 offset = 3; string epoch = 4;
  uint64 seq = 5;                        // where the topic is kept: subscribe again since here
  bool gap = 6;                          // what came before is lost, and this goes on from now
}
message Position { string epoch = 1; uint64 offset = 2; uint64 seq = 3; }
message ZoneEnter {
  string object_id = 1; string object_type = 2; uint32 channel = 3; bytes data = 4;
  uint32 original_size = 5; Vec3 position = 6;
}
message ZoneExit { string object_id = 1; string object_type = 2; uint32 channel = 3; }
message GorcEvent {                      // of an object, "update" for what has changed; or to it
  string object_id = 1; string object_type = 2; uint32 channel = 3; string event = 4;
  bytes data = 5; uint32 original_size = 6; string id = 7;     // id: an answer is wanted
}
message ClientRequest {
  string id = 1;                         // empty: no answer wanted
  string action = 2;                     // subscribe, unsubscribe, publish
  string topic = 3; bytes payload = 4; bool critical = 5;
  string packed = 6;                     // "f32" or "f64" when subscribing to movement
  Position since = 7;                    // where the subscriber was: it gets what it missed
  double rate = 8;                       // the newest of each topic, so many times a second
  string msg_id = 9;                     // a publication that comes again is dropped
}
message Reply {
  string id = 1; bool ok = 2; string code = 3; string message = 4; bytes data = 5;
  Position position = 6;                 // where a subscription begins, if its topic is kept
}

// data: u32 count, then per player 16 bytes of uuid and x y z, all little-endian;
// x y z are f32 (28 bytes a player), or f64 when wide (40 bytes a player).
// full: these are all the players there are, not only those that moved.
message PackedMovement { bytes data = 1; bool wide = 2; bool full = 3; }
"""


def builtin_proto() -> str:
    """Return the text of the built-in schema, as ``python -m horizon_lite proto`` prints it."""
    return _BUILTIN_PROTO


@functools.cache
def builtin_schema() -> SimpleNamespace:
    """Return the classes of the built-in schema (``EventBatch``, ``PlayerMoveEvent``, ...).

    Cost: some milliseconds at the first call, nothing afterwards.
    """
    return _Namespace(_ProtoReader(_BUILTIN_PROTO, "builtin.proto", _well_known).read())


# -- packed movement --

_Position = tuple[float, float, float]


_MOVES_AT_ONCE = 512


@functools.lru_cache(maxsize=32)    # a Struct of 512 players holds 50 KB
def _moves_struct(count: int, wide: bool) -> struct.Struct:
    return struct.Struct("<" + ("16sddd" if wide else "16sfff") * count)


def _rows(moves: Mapping[bytes, _Position],
          wide: bool) -> Iterator[tuple[struct.Struct, list[Any]]]:
    """Yield what is to be packed, 512 players at a time."""
    flat: list[Any] = []
    for player, position in moves.items():
        flat.append(player)
        flat += position
    if not {*map(len, moves)} <= {16} or len(flat) != 4 * len(moves):
        raise ValueError                # struct would cut and fill
    for first in range(0, len(flat), 4 * _MOVES_AT_ONCE):
        part = flat[first:first + 4 * _MOVES_AT_ONCE]
        yield _moves_struct(len(part) // 4, wide), part


def pack_moves(moves: Mapping[bytes, _Position], *, wide: bool = False) -> bytes:
    """Return one block of positions: ``u32 count``, then ``uuid16 x y z`` a player.

    *moves* maps 16-byte ids to coordinates; *wide* writes them as f64 instead of f32.
    Little-endian (DESIGN 3, Packed movement; seed 000 item 8). Cost: a struct call per 512.

    Raises:
        UsageError: an id that is not 16 bytes, or a position that is not three numbers.
    """
    try:
        return b"".join([len(moves).to_bytes(4, "little"),
                         *(row.pack(*part) for row, part in _rows(moves, wide))])
    except (AttributeError, struct.error, OverflowError, TypeError, ValueError):
        raise _wrong_move(moves, wide) from None


def pack_moves_into(moves: Mapping[bytes, _Position], buffer: bytearray | memoryview, at: int = 0,
                    *, wide: bool = False) -> int:
    """Write what ``pack_moves`` returns into *buffer* from *at* and return its end.

    Raises:
        BufferTooSmall: with ``needed``, before the first byte is written.
        UsageError: as there.
    """
    with _room(4 + len(moves) * (40 if wide else 28), buffer, at) as view:
        try:
            struct.pack_into("<I", view, at, len(moves))
            at += 4
            for row, part in _rows(moves, wide):
                row.pack_into(view, at, *part)
                at += row.size
            return at
        except (AttributeError, struct.error, OverflowError, TypeError, ValueError):
            raise _wrong_move(moves, wide) from None


def _wrong_move(moves: Any, wide: bool) -> UsageError:
    """Return an error that names the move which can't be packed."""
    for player, position in moves.items() if isinstance(moves, Mapping) else ():
        try:
            if len(player) != 16:
                raise ValueError("the id has another length")
            struct.pack("<16s3d" if wide else "<16s3f", player, *position)
        except (struct.error, OverflowError, TypeError, ValueError) as error:
            return UsageError(f"{player!r}: {position!r} must be 16 bytes (a uuid's .bytes) and "
                              f"three numbers that fit {'f64' if wide else 'f32'}: {error}")
    return UsageError(f"moves are {{uuid16: (x, y, z)}}, not {type(moves).__name__}")


def unpack_moves(data: _Bytes, *, wide: bool = False) -> dict[bytes, _Position]:
    """Return what ``pack_moves`` packed.

    Raises:
        WireError: the length does not match the count.
    """
    size, data = 40 if wide else 28, _view(data)
    count = int.from_bytes(data[:4], "little")
    if len(data) != 4 + count * size:
        other = ": it is a block of the other width" * (len(data) == 4 + count * (68 - size))
        raise WireError(f"{len(data)} bytes can't hold a count of {count} and so many players"
                        f"{other}", at=0)
    rows = _moves_struct(1, wide).iter_unpack(data[4:])
    return {player: (x, y, z) for player, x, y, z in rows}


# =============================================================================
# 6  POOLS - objects reused instead of allocated
# =============================================================================
# Knows: objects, ERRORS.     Never: messages, clocks.
#
# Last in, first out: the object released last is the one still in the processor's cache.
# CPython's allocator has free lists of its own, and they win: making a message or a small
# buffer costs less than acquire and release (the bench's rows 6.pools.*).  So the engine
# uses no pool.  What a pool gives is that nothing is allocated in steady state, for which
# one may want it: for objects that are dear to make, and to keep the collector still.


class Pool(Generic[_T]):
    """A free list of at most *cap* objects that *factory* makes (seeds 000, 002).

    *reset* is called on what comes back. ``hits``, ``misses`` (had to be made) and
    ``discarded`` (the list was full) count since the start; one thread uses a pool.

    >>> pool = Pool(list, reset=list.clear)
    >>> with pool.lease() as items:
    ...     items.append(1)
    >>> pool.acquire(), pool.hits, pool.misses
    ([], 1, 1)
    """

    __slots__ = ("_factory", "_cap", "_reset", "_free", "hits", "misses", "discarded")

    def __init__(self, factory: Callable[[], _T], cap: int = 1000,
                 reset: Callable[[_T], object] | None = None) -> None:
        self._factory = factory
        self._cap = cap
        self._reset = reset
        self._free: dict[int, _T] = {}      # by id, to notice a second release
        self.hits = self.misses = self.discarded = 0

    def __len__(self) -> int:
        return len(self._free)

    def acquire(self) -> _T:
        """Return a free object, or a new one."""
        if not self._free:
            self.misses += 1
            return self._factory()
        self.hits += 1
        return self._free.popitem()[1]

    def release(self, item: _T) -> None:
        """Give *item* back; nobody may use it any more.

        Raises:
            StateError: it is in the pool already.
        """
        if id(item) in self._free:
            raise StateError(f"{type(item).__name__} was released twice")
        if self._reset is not None:
            self._reset(item)
        if len(self._free) < self._cap:
            self._free[id(item)] = item
        else:
            self.discarded += 1

    @contextlib.contextmanager
    def lease(self) -> Iterator[_T]:
        """Return a context manager that acquires and releases around its block."""
        item = self.acquire()
        try:
            yield item
        finally:
            self.release(item)


class BufferPool:
    """Byte buffers in classes of 512 bytes and 4 KiB; larger ones are let go (seed 000).

    A buffer is at least as long as asked, and holds what its last user wrote. It pays only
    where nothing may be allocated: ``Message.encode`` is cheaper than a pooled buffer.

    >>> pool = BufferPool()
    >>> buffer = pool.acquire(600)
    >>> len(buffer), pool.release(buffer), len(pool), pool.misses
    (4096, None, 1, 1)
    """

    __slots__ = ("_classes", "oversize")

    def __init__(self, cap: int = 1000, sizes: Iterable[int] = (512, 4096)) -> None:
        self._classes = {size: Pool(functools.partial(bytearray, size), cap)
                         for size in sorted(sizes)}
        self.oversize = 0               # buffers that fitted no class

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    @property
    def hits(self) -> int:
        """Buffers that were reused."""
        return sum(pool.hits for pool in self._classes.values())

    @property
    def misses(self) -> int:
        """Buffers that had to be made, oversize ones included."""
        return self.oversize + sum(pool.misses for pool in self._classes.values())

    def acquire(self, size: int = 0) -> bytearray:
        """Return a buffer of at least *size* bytes."""
        for length, pool in self._classes.items():
            if size <= length:
                return pool.acquire()
        self.oversize += 1
        return bytearray(size)

    def release(self, buffer: bytearray) -> None:
        """Give *buffer* back; one of another length than the classes' is forgotten."""
        if type(buffer) is not bytearray:
            raise UsageError(f"this pool lends bytearrays, not {type(buffer).__name__}")
        if len(buffer) in self._classes:
            self._classes[len(buffer)].release(buffer)


# =============================================================================
# 7  BUS - events between the parts of one program
# =============================================================================
# Knows: callables, ERRORS.     Never: sockets, ticks.
#
# A key is a path, `client:chat:message`.  For every key with a registration there is a
# route: the handlers' functions, flat and in order, wildcards mixed in.  Registering is
# slow and rebuilds routes; emitting is one dict look-up and a loop.
#
# Counting costs the emitter one addition: a handler's calls are its routes' emits since it
# joined.  Only handlers that may be passed over (once, filter, ignore_cancelled, weak) count
# for themselves.  Times are sampled, the first and every 64th emit of a key, or all while
# debugging.
#
# Keys that nobody registered have no route of their own, so that strangers who invent keys
# can't grow memory: they share the route of the wildcards that match them.

_SAMPLE_MASK = 63
_MAX_STRANGE_KEYS = 1024            # remembered look-ups of keys without a registration
_MAX_UNHEARD = 100                  # emitted keys without a handler that are remembered
_RECENT_TIMES = 100                 # of which the 95th percentile is told
_KEY_SEGMENT = re.compile(r"\*|[^\s:*]+")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")        # namespaces and events that clients may give


def _check_key(key: str) -> list[str]:
    segments = key.split(":") if isinstance(key, str) else [""]
    if not all(map(_KEY_SEGMENT.fullmatch, segments)):
        raise UsageError(f"event key {key!r}: write it as segments with ':' between, like "
                         "'client:chat:message'; '*' stands for a whole one")
    return segments


def _key_matches(pattern: list[str], key: list[str]) -> bool:
    """Whether a wildcard pattern covers a key; ``*`` is one segment, or the rest when last."""
    if len(key) < len(pattern) or len(key) > len(pattern) and pattern[-1] != "*":
        return False
    return all(want in ("*", got) for want, got in zip(pattern, key))


class Event:
    """What a handler gets: the key, the data, and for client events who sent it."""

    __slots__ = ("key", "data", "client", "_reason", "_sealed", "_failed", "_metadata")

    _sealed: bool                   # set when it is too late to cancel
    _failed: bool                   # set when a handler raised
    _metadata: dict[str, Any]       # made when somebody asks

    def __init__(self, key: str, data: Any, client: Any = None) -> None:
        self.key = key
        self.data = data
        self.client = client
        self._reason: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What filters decide by: ``namespace``, ``channel`` and ``position`` where it has them.

        The namespace is the second segment of a client's or plugin's key, else the first; the
        channel is that of a replicated object's event; the position is the data's x, y, z, or
        those of its "position". Filters may add to it.
        """
        if not hasattr(self, "_metadata"):
            head, *rest = self.key.split(":")
            self._metadata = {"namespace": rest[0] if head in ("client", "plugin") else head}
            if head.startswith("gorc_") and len(rest) > 1 and rest[1].isdigit():
                self._metadata["channel"] = int(rest[1])
            if (position := _position_in(self.data)) is not None:
                self._metadata["position"] = position
        return self._metadata

    def altered(self, data: Any) -> Event:
        """Return this event with other data; to cancel that one cancels this one."""
        return _Altered(self, data)

    @property
    def cancelled(self) -> bool:
        """Whether a handler cancelled the event."""
        return self._reason is not None

    @property
    def reason(self) -> str:
        """The reason given when it was cancelled."""
        return self._reason or ""

    @property
    def failed(self) -> bool:
        """Whether a synchronous handler raised; the log says what."""
        return getattr(self, "_failed", False)

    def cancel(self, reason: str = "cancelled") -> None:
        """Veto what the event announces; later handlers still run and see it.

        Raises:
            StateError: called from an async or blocking handler, when it is too late.
        """
        if getattr(self, "_sealed", False):
            raise StateError("only a synchronous handler can cancel; this one runs afterwards")
        self._reason = reason

    def __repr__(self) -> str:
        return f"Event({self.key!r}, {self.data!r})"


_new_event = Event.__new__


class _Altered(Event):
    """What ``Event.altered`` returns."""

    __slots__ = ("_original",)

    def __init__(self, original: Event, data: Any) -> None:
        super().__init__(original.key, data, original.client)
        self._reason = original._reason
        if data is original.data:           # else it is found out anew
            self._metadata = dict(original.metadata)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._original, name)    # events may carry more than these

    def cancel(self, reason: str = "cancelled") -> None:
        """Cancel the event that this one stands for."""
        self._original.cancel(reason)
        self._reason = reason


def _position_in(data: Any) -> tuple[float, float, float] | None:
    """Return the x, y and z in an event's data, or of its "position"; None if there are none."""
    get = data.get if isinstance(data, Mapping) else functools.partial(getattr, data)
    if (inner := get("position", None)) is not None:
        return _position_in(inner)
    x, y, z = (get(axis, None) for axis in "xyz")
    try:
        return float(x), float(y), float(z or 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


class Propagator:
    """A filter that says which events reach a handler; ``a & b``, ``a | b``, ``~a`` combine them.

    For ``filter=``, as any function of the event: true lets it pass, and an Event that it
    returns is what the handler gets instead (upstream's propagators, seed 001).

    >>> bus, got = Bus(), []
    >>> near = Propagator.near((0, 0, 0), 10)
    >>> handler = bus.on("game:*", got.append, filter=near & ~Propagator.exact("game:tick"))
    >>> for x in (3, 30):
    ...     _ = bus.emit("game:shot", {"x": x, "y": 4})
    >>> [(event.data, event.metadata["distance"]) for event in got]
    [({'x': 3, 'y': 4}, 5.0)]
    """

    __slots__ = ("_decide",)

    def __init__(self, decide: Callable[[Event], Any]) -> None:
        self._decide = decide

    def __call__(self, event: Event) -> Any:
        return self._decide(event)

    def __and__(self, other: Callable[[Event], Any]) -> Propagator:
        return Propagator.all_of(self, other)

    def __or__(self, other: Callable[[Event], Any]) -> Propagator:
        return Propagator.any_of(self, other)

    def __invert__(self) -> Propagator:
        return Propagator(lambda event: not self._decide(event))

    @classmethod
    def exact(cls, *keys: str) -> Propagator:
        """Let events of these keys pass."""
        wanted = frozenset(keys)
        return cls(lambda event: event.key in wanted)

    @classmethod
    def namespace(cls, allow: Iterable[str] = (), block: Iterable[str] = ()) -> Propagator:
        """Let keys pass that begin with what is allowed, like "client:chat", and not blocked.

        With nothing allowed, all are.
        """
        if isinstance(allow, str) or isinstance(block, str):
            raise UsageError('allow and block are several texts, like ("client:chat", "core")')
        ours, theirs = (tuple(each.rstrip(":*") + ":" for each in texts)
                        for texts in (allow, block))
        return cls(lambda event: not (key := event.key + ":").startswith(theirs)
                   and (not ours or key.startswith(ours)))

    @classmethod
    def near(cls, place: Any, distance: float) -> Propagator:
        """Let events pass that happen within *distance* of *place*: x, y, z or a function of none.

        An event without a position passes; others are told their ``metadata["distance"]``.
        """
        if not distance >= 0 or not callable(place) and not (
                isinstance(place, Sequence) and len(place) == 3):
            raise UsageError(f"near((x, y, z), distance), or near(function, distance), not "
                             f"{place!r}, {distance!r}")

        def decide(event: Event) -> Any:
            here, there = place() if callable(place) else place, event.metadata.get("position")
            if here is None or there is None:
                return True
            if not (away := math.dist(here, there)) <= distance:
                return False
            found = event.altered(event.data)       # others are at other distances
            found.metadata["distance"] = away
            return found

        return cls(decide)

    @classmethod
    def channel(cls, *numbers: int) -> Propagator:
        """Let replicated objects' events of these channels pass, and events that have none."""
        if not numbers:
            raise UsageError("channel(0, 1, ...) needs the numbers of channels")
        return cls(lambda event: event.metadata.get("channel", numbers[0]) in numbers)

    @classmethod
    def all_of(cls, *filters: Callable[[Event], Any]) -> Propagator:
        """Let pass what all *filters* let pass, each asked with what the one before made of it."""
        def decide(event: Event) -> Any:
            for each in filters:
                if not (found := each(event)):
                    return False
                event = found if isinstance(found, Event) else event
            return event

        return cls(decide)

    @classmethod
    def any_of(cls, *filters: Callable[[Event], Any]) -> Propagator:
        """Let pass what one of *filters* does, as that one makes it; without any, everything."""
        return cls(lambda event: not filters or next(
            filter(None, (each(event) for each in filters)), False))

    @classmethod
    def transform(cls, change: Callable[[Any], Any]) -> Propagator:
        """Let everything pass, with the data that *change* makes of its own."""
        return cls(lambda event: event.altered(change(event.data)))


class _Times:
    """How long something took, in nanoseconds; percentiles are of the last hundred."""

    __slots__ = ("count", "total", "least", "most", "_recent")

    def __init__(self) -> None:
        self.count = self.total = self.most = 0
        self.least = sys.maxsize
        self._recent: deque[int] | None = None

    def add(self, spent_ns: int) -> None:
        """Note one more."""
        self.count += 1
        self.total += spent_ns
        if spent_ns < self.least:
            self.least = spent_ns
        if spent_ns > self.most:
            self.most = spent_ns
        if self._recent is None:
            self._recent = deque(maxlen=_RECENT_TIMES)
        self._recent.append(spent_ns)

    def figures(self) -> dict[str, int]:
        """Return how many were timed, and their least, mean, most and 95th percentile."""
        recent = sorted(self._recent or (0,))
        return {"timed": self.count, "min_ns": self.least if self.count else 0,
                "avg_ns": self.total // max(self.count, 1), "max_ns": self.most,
                "p95_ns": recent[(len(recent) * 95 + 99) // 100 - 1]}


class Handler:
    """One registration. ``remove()`` ends it; calls, errors and times are its statistics."""

    __slots__ = ("key", "fn", "order", "once", "filter", "ignore_cancelled", "elsewhere", "batch",
                 "wait_ms", "then", "spawned", "invoke", "errors", "times", "queued", "running",
                 "_name", "_weak", "_bus", "_calls", "_routes", "_gone", "_logged_ns", "_unlogged",
                 "_slow_ns")

    def __init__(self, bus: Bus, key: str, fn: Callable[[Any], Any], order: tuple[float, int],
                 once: bool, filter: Callable[[Any], Any] | None, ignore_cancelled: bool,
                 elsewhere: bool, batch: int, wait_ms: float | None,
                 then: Callable[[Any, Any], object] | None, weak: bool) -> None:
        self.key = key
        self._name = getattr(fn, "__qualname__", repr(fn))
        self._weak = None
        if weak:
            import weakref
            # its end may come at any time, in any thread: the bus looks for it later
            self._weak, fn = weakref.WeakMethod(fn, lambda _: bus._dead.append(self)), (
                self._call_weak)
        self.fn = fn
        self.order = order                  # (priority, registration)
        self.once = once
        self.filter = filter
        self.ignore_cancelled = ignore_cancelled
        self.elsewhere = elsewhere          # async or blocking: not on the loop's thread
        self.batch = batch                  # 0: called with each event; True: as is configured
        self.wait_ms = wait_ms
        self.then = then                    # gets what was returned elsewhere
        self.spawned = elsewhere or batch > 0       # runs afterwards
        # only handlers that are always called can let their routes count for them
        guard = (self._guarded if once or ignore_cancelled or weak else
                 self._filtered if filter else fn)
        self.invoke = self._start if self.spawned else guard
        self.errors = self._calls = 0
        self.times = _Times()
        self.queued: _Times | None = _Times() if elsewhere else None    # before it began
        self.running = 0                    # calls under way elsewhere
        self._bus = bus
        self._routes: list[_Route] = []
        self._gone = False
        self._logged_ns, self._unlogged = -1 << 62, 0
        self._slow_ns = -1 << 62            # when it was last said that it is slow

    @property
    def name(self) -> str:
        """The function's qualified name."""
        return self._name

    @property
    def calls(self) -> int:
        """How many events the function was given; exact."""
        if self.invoke is not self.fn:
            return self._calls
        return self._calls + sum(route.emits - route.settled for route in self._routes)

    def take(self, event: Event) -> Event | None:
        """Return what this handler gets of *event*; counts it, and ends what is for once."""
        if self._weak is not None and self._weak() is None:
            self.remove()
            return None
        if (self.once and self._gone                # a nested emit was first
                or self.ignore_cancelled and event.cancelled):
            return None
        if self.filter is not None:
            if not (found := self.filter(event)):
                return None
            event = found if isinstance(found, Event) else event
        if self.once:
            if self._gone:                          # the filter has emitted
                return None
            self.remove()
        self._calls += 1
        return event

    def _filtered(self, event: Event) -> None:
        found = self.filter(event)                  # type: ignore[misc]
        if found:
            self._calls += 1
            self.fn(found if found is not True and isinstance(found, Event) else event)

    def _guarded(self, event: Event) -> None:
        if (given := self.take(event)) is not None:
            self.fn(given)

    def _call_weak(self, event: Event) -> None:
        if self._weak is not None and (method := self._weak()) is not None:
            method(event)

    def _start(self, event: Event) -> None:
        if event._reason is None and (given := self.take(event)) is not None:
            event._sealed = given._sealed = True
            assert self._bus.spawn is not None
            try:
                self._bus.spawn(self, given)
            except LimitError:
                self._calls -= 1
                raise

    def took(self, spent_ns: int) -> None:
        """Note the time of one call."""
        self.times.add(spent_ns)
        if not self.elsewhere:
            self.kept_loop(spent_ns)

    def kept_loop(self, spent_ns: int) -> None:
        """Warn, once a second at most, if that is too long."""
        if 0 < self._bus.slow_ns < spent_ns:
            self._bus.slow += 1
            now = self._bus._clock()
            if now - self._slow_ns >= 1_000_000_000:
                self._slow_ns = now
                _log.warning("handler %s of %s took %.1f ms; what waits can be an async def, or "
                             "blocking=True", self.name, self.key, spent_ns / 1e6)

    def remove(self) -> None:
        """End this registration; doing it twice is harmless."""
        self._bus._remove(self)


class _Route:
    """The handlers of one key, ready to run."""

    __slots__ = ("key", "handlers", "pinned", "emits", "settled", "errors", "times")

    def __init__(self, key: str) -> None:
        self.key = key
        self.handlers: tuple[Handler, ...] = ()
        self.pinned = False                         # an emitter counts here
        self.emits = self.settled = self.errors = 0
        self.times = _Times()

    def set(self, handlers: list[Handler]) -> None:
        """Replace the handlers; what the old ones were called is settled with them first."""
        for handler in self.handlers:
            handler._calls += self.emits - self.settled if handler.invoke is handler.fn else 0
            handler._routes.remove(self)
        self.settled = self.emits
        handlers.sort(key=lambda handler: (handler.spawned, handler.order))
        self.handlers = tuple(handlers)
        for handler in handlers:
            handler._routes.append(self)


class Bus:
    """Deliver events to handlers by key, in order of (priority, registration).

    Registering: on, remove.   Emitting: emit, emit_many, emitter.   Looking: stats, validate.

    An exception in a handler is logged with its traceback (at most once a second per
    handler), counted, and never reaches the emitter. *spawn* runs ``async def`` and
    ``blocking=True`` handlers; without one they are refused. *on_time* is told the seconds
    of sampled emits. A handler that took longer than *slow_ms* when it was timed is warned
    about (see ``watch``). With *debug* all are timed, and keys that nobody listens to are told
    with the nearest one that has a handler.

    >>> bus = Bus()
    >>> handler = bus.on("round:*", lambda event: print(event.key, event.data))
    >>> event = bus.emit("round:start", 1)
    round:start 1
    >>> handler.calls
    1
    """

    __slots__ = ("spawn", "slow_ns", "_clock", "_on_time", "_mask", "_handlers", "_wild", "_routes",
                 "_strange_route", "_shared", "_nobody", "_numbers", "errors", "slow", "_unheard",
                 "_dead", "_debug", "_watched_until_ns", "_hints")

    def __init__(self, *, spawn: Callable[[Handler, Event], object] | None = None,
                 clock: Callable[[], int] = time.monotonic_ns, debug: bool = False,
                 on_time: Callable[[float], object] | None = None, slow_ms: float = 0.0) -> None:
        self.spawn = spawn
        self.slow_ns = int(slow_ms * 1e6)           # 0: nothing is slow
        self._clock = clock
        self._on_time = on_time
        self._handlers: dict[str, list[Handler]] = {}       # by key as it was registered
        self._wild: dict[str, list[str]] = {}       # keys with wildcards, and their segments
        self._routes: dict[str, _Route] = {}        # keys with a registration or an emitter
        self._shared: dict[tuple[str, ...], _Route] = {}    # of other keys, by patterns matched
        self._strange_route = functools.lru_cache(_MAX_STRANGE_KEYS)(self._shared_route)
        self._nobody = _Route("")                   # counts what no handler wanted
        self._numbers = itertools.count()
        self.errors = 0                             # handler calls that raised
        self.slow = 0                               # timed ones that took too long
        self._unheard: OrderedDict[str, None] = OrderedDict()   # emitted keys that nobody wanted
        self._dead: deque[Handler] = deque()        # weak ones whose object is gone
        self._watched_until_ns = self._clock()
        self._hints = 0, 0                          # in which second, how many
        self.debug(debug)

    def debug(self, yes: bool) -> None:
        """Time every emit, and tell of keys that nobody listens to; else time a few."""
        self._debug = yes
        self._mask = 0 if yes else _SAMPLE_MASK
        self._strange_route.cache_clear()

    def watch(self, spent_ns: int) -> None:
        """Hear how long a pass of the loop took: after a slow one every emit is timed for 10 s.

        So a handler that is slow now and then is found, and others cost nothing.
        """
        if 0 < self.slow_ns < spent_ns:
            self._mask, self._watched_until_ns = 0, self._clock() + 10_000_000_000
        elif not (self._mask or self._debug) and self._clock() > self._watched_until_ns:
            self._mask = _SAMPLE_MASK

    def _bury(self) -> None:
        """Remove weak handlers whose objects are gone."""
        while self._dead:
            self._remove(self._dead.popleft())

    # -- registering --

    @overload
    def on(self, key: str, *, priority: int = 0, once: bool = False,
           filter: Callable[[Any], Any] | None = None, ignore_cancelled: bool = False,
           blocking: bool = False, batch: int = 0, wait_ms: float | None = None,
           then: Callable[[Any, Any], object] | None = None,
           weak: bool = False) -> Callable[[_F], _F]: ...
    @overload
    def on(self, key: str, fn: Callable[[Any], Any], *, priority: int = 0, once: bool = False,
           filter: Callable[[Any], Any] | None = None, ignore_cancelled: bool = False,
           blocking: bool = False, batch: int = 0, wait_ms: float | None = None,
           then: Callable[[Any, Any], object] | None = None, weak: bool = False) -> Handler: ...

    def on(self, key: str, fn: Callable[[Any], Any] | None = None, *, priority: int = 0,
           once: bool = False, filter: Callable[[Any], Any] | None = None,
           ignore_cancelled: bool = False, blocking: bool = False, batch: int = 0,
           wait_ms: float | None = None, then: Callable[[Any, Any], object] | None = None,
           weak: bool = False) -> Any:
        """Register *fn* for *key*, which may hold wildcards; without *fn*, a decorator.

        Lower priorities run first. *once* ends the registration at the first call; *filter*
        is asked with the event, and may return another to be given instead (see Propagator);
        *ignore_cancelled* skips events that were cancelled before. With *batch*, *fn* gets a
        list of so many events, or of those of *wait_ms*. *then* is called on the loop with the
        event and what an ``async def`` or *blocking* function returned. A *weak* method does
        not keep its object alive; the registration ends with it.

        Returns: the Handler; as a decorator, the function unchanged.

        Raises:
            UsageError: a malformed key, something that can't be called, or an ``async def``,
                blocking or batched handler on a bus without *spawn*.
        """
        segments = _check_key(key)
        if type(priority) not in (int, float) or math.isnan(priority):
            raise UsageError(f"priority of {key!r} must be a number, not {priority!r}")
        if not isinstance(batch, int) or batch < 0 or once and batch or (
                wait_ms is not None and not 0 <= wait_ms < math.inf):
            raise UsageError(f"batch of {key!r} is a number of events, wait_ms a time in ms, and "
                             f"once has none; not {batch!r}, {wait_ms!r}")
        for what, each in (("filter", filter), ("handler", fn), ("then", then)):
            if each is not None and not callable(each):
                raise UsageError(f"{what} of {key!r} must be callable, got {each!r}")
            if each is not None and each is not fn and _is_async(each):
                raise UsageError(f"{what} of {key!r} can't be an async def: nobody would await it")
        if fn is None:
            def decorate(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
                self.on(key, function, priority=priority, once=once, filter=filter, batch=batch,
                        ignore_cancelled=ignore_cancelled, blocking=blocking, wait_ms=wait_ms,
                        then=then, weak=weak)
                return function
            return decorate
        elsewhere = blocking or _is_async(fn)
        if (elsewhere or batch) and self.spawn is None:
            raise UsageError(f"handler of {key!r} is async, blocking or batched; "
                             "this bus has no spawn= for it")
        if then is not None and not elsewhere:
            raise UsageError(f"then of {key!r} is for async def and blocking=True")
        if weak and (elsewhere or batch or not hasattr(fn, "__func__") or not hasattr(
                getattr(fn, "__self__", None), "__weakref__")):
            raise UsageError(f"weak of {key!r} is for a method of an object that weakref can refer "
                             "to, called on the loop")
        self._bury()
        key = sys.intern(key)
        handler = Handler(self, key, fn, (priority, next(self._numbers)), once, filter,
                          ignore_cancelled, elsewhere, batch, wait_ms, then, weak)
        self._handlers.setdefault(key, []).append(handler)
        if "*" in segments:
            self._wild[key] = segments
        self._changed(key)
        return handler

    def remove(self, pattern: str) -> int:
        """End every registration whose key is *pattern* or is covered by it; return how many."""
        segments = _check_key(pattern)
        gone = [handler for key, each in self._handlers.items() for handler in each
                if key == pattern or _key_matches(segments, key.split(":"))]
        for handler in gone:
            self._remove(handler)
        return len(gone)

    def _remove(self, handler: Handler) -> None:
        if handler._gone:
            return
        handler._gone = True
        self._handlers[handler.key].remove(handler)
        if not self._handlers[handler.key]:
            del self._handlers[handler.key]
            self._wild.pop(handler.key, None)
        self._changed(handler.key)

    def _changed(self, key: str) -> None:
        """Bring the routes that a registration at *key* touches up to date."""
        if "*" in key.split(":"):
            self._strange_route.cache_clear()
            for patterns, route in list(self._shared.items()):
                self._fill(route, patterns)
                if not self._wild.keys() >= set(patterns):
                    self._retire(self._shared, patterns)
            for name in self._routes:
                self._own_route(name)
        elif not self._own_route(key).pinned and key not in self._handlers:
            self._retire(self._routes, key)

    def _retire(self, routes: dict[Any, _Route], key: object) -> None:
        """Let go of a route that is no longer needed; the totals keep its counts."""
        route = routes.pop(key)
        route.set([])
        self._nobody.emits += route.emits
        self._nobody.settled = self._nobody.emits

    def _fill(self, route: _Route, keys: Iterable[str]) -> None:
        route.set([handler for key in keys for handler in self._handlers.get(key, ())])

    def _own_route(self, key: str) -> _Route:
        """Return the route of a key that has a registration or an emitter, up to date."""
        route = self._routes.setdefault(key, _Route(key))
        self._fill(route, {key, *self._matching(key)})
        return route

    def _matching(self, key: str) -> tuple[str, ...]:
        """Return the wildcard patterns that cover *key*."""
        segments = key.split(":")
        return tuple(p for p, wanted in self._wild.items() if _key_matches(wanted, segments))

    def _shared_route(self, key: str) -> _Route:
        """Return the route of a key that has no registration of its own."""
        _check_key(key)
        patterns = self._matching(key)
        if not patterns:
            self._note_unheard(key)
        route = self._shared.get(patterns) if patterns else self._nobody
        if route is None:
            route = self._shared[patterns] = _Route(" ".join(patterns))
            self._fill(route, patterns)
        return route

    def _note_unheard(self, key: str) -> None:
        """Remember a key for ``validate``; while debugging tell of it, 20 times a second at most.
        """
        self._unheard[key] = None
        if len(self._unheard) > _MAX_UNHEARD:
            self._unheard.popitem(last=False)
        if self._debug:
            second, count = self._clock() // 1_000_000_000, self._hints[1]
            count = count + 1 if second == self._hints[0] else 1
            self._hints = second, count
            if count <= 20 and (similar := _did_you_mean(key, self._handlers)):
                _log.warning("nobody listens to %r%s", key, similar)

    # -- emitting --

    def emit(self, key: str, data: Any = None, client: Any = None) -> Event:
        """Run the handlers of *key* with an Event and return it.

        Cost: about 0.3 us and a call per handler.
        """
        # HOT: 2.5 x pyee, 4 x blinker (bench 7.bus.emit_1, emit_4). Twin: PlainBus in the tests.
        # Event is built in place: its __init__ would cost a third of the whole.
        try:
            route = self._routes[key]
        except KeyError:
            route = self._strange_route(key)
        event = _new_event(Event)
        event.key = key
        event.data = data
        event.client = client
        event._reason = None
        emits = route.emits
        route.emits = emits + 1
        if not emits & self._mask:
            return self._run_timed(route, event)
        for handler in route.handlers:
            invoke = handler.invoke     # two steps: as a method call it costs twice as much
            try:
                invoke(event)
            except Exception:
                event._failed = True
                self.failed(handler, route)
        return event

    def fire(self, event: _E) -> _E:
        """Run the handlers of an event that was made before, as it may carry more than others."""
        route = self._routes.get(event.key) or self._strange_route(event.key)
        route.emits += 1
        self._run_timed(route, event)
        return event

    def handles(self, key: str) -> bool:
        """Whether somebody would get an event of *key*."""
        if self._dead:
            self._bury()
        return bool((self._routes.get(key) or self._strange_route(key)).handlers)

    def emit_many(self, key: str, items: Iterable[Any]) -> int:
        """Emit each of *items* under one key; return how many."""
        return sum(1 for _ in map(self.emitter(key), items))

    def emitter(self, key: str) -> Callable[..., Event]:
        """Return ``emit`` for one key, which gets statistics of its own."""
        _check_key(key)
        key = sys.intern(key)
        (self._routes.get(key) or self._own_route(key)).pinned = True
        return functools.partial(self.emit, key)

    def _run_timed(self, route: _Route, event: Event) -> Event:
        """Do what emit does, with a clock around every handler."""
        clock = self._clock
        began = now = clock()
        for handler in route.handlers:
            calls = handler._calls
            try:
                handler.invoke(event)
            except Exception:
                event._failed = True
                self.failed(handler, route)
            before, now = now, clock()
            # what is spawned is timed where it runs; who was passed over took no time
            if not handler.spawned and (handler.invoke is handler.fn or handler._calls > calls):
                handler.took(now - before)
        route.times.add(now - began)
        if self._on_time is not None and route.handlers:
            self._on_time((now - began) / 1e9)
        return event

    def failed(self, handler: Handler, route: _Route | None = None) -> None:
        """Count the exception being handled as *handler*'s; log it, once a second at most."""
        handler.errors += 1
        self.errors += 1
        if route is not None:
            route.errors += 1
        now = self._clock()
        if now - handler._logged_ns < 1_000_000_000:
            handler._unlogged += 1
            return
        more = f" ({handler._unlogged} more not shown)" if handler._unlogged else ""
        handler._logged_ns, handler._unlogged = now, 0
        _log.error("handler %s of %s failed%s", handler.name, handler.key, more, exc_info=True)

    # -- looking --

    @property
    def emits(self) -> int:
        """How many events were emitted, wanted or not."""
        return self._nobody.emits + sum(route.emits for route in self._all_routes())

    def _all_routes(self) -> Iterator[_Route]:
        return itertools.chain(list(self._routes.values()), list(self._shared.values()))

    @property
    def handler_count(self) -> int:
        """How many registrations there are."""
        return sum(each._weak is None or each._weak() is not None
                   for handlers in list(self._handlers.values()) for each in handlers)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return per key its emits, errors and handlers, and of both the sampled times.

        These are ``timed`` (how many were), ``min_ns``, ``avg_ns``, ``max_ns`` and ``p95_ns``.
        A handler has ``calls`` and ``errors``, which are exact; one that runs elsewhere also
        ``running``, and the times it waited before it began, as ``queued``.
        """
        def of_handler(each: Handler) -> dict[str, Any]:
            figures = {"name": each.name, "key": each.key, "calls": each.calls,
                       "errors": each.errors, **each.times.figures()}
            return figures if each.queued is None else {
                **figures, "running": each.running, "queued": each.queued.figures()}

        return {route.key: {
            "emits": route.emits, "errors": route.errors, **route.times.figures(),
            "handlers": list(map(of_handler, route.handlers))} for route in self._all_routes()}

    def validate(self) -> list[str]:
        """Return what looks wrong: keys emitted to nobody, keys with over 100 handlers."""
        lonely = [each.key for each in self._all_routes() if each.emits and not each.handlers]
        lonely += [key for key in self._unheard if key not in lonely and not self.handles(key)]
        crowded = [each for each in self._all_routes() if len(each.handlers) > 100]
        return ([f"nobody listens to {key!r}{_did_you_mean(key, self._handlers)}" for key in lonely]
                + [f"{each.key!r} has {len(each.handlers)} handlers" for each in crowded])


def _is_async(fn: Any) -> bool:
    """Whether calling *fn* makes a coroutine (inspect's rule, without importing inspect)."""
    fn = getattr(fn, "func", fn)            # functools.partial
    code = getattr(fn, "__code__", None) or getattr(
        getattr(type(fn), "__call__", None), "__code__", None)
    return bool(code and code.co_flags & 0x80)      # CO_COROUTINE


# =============================================================================
# 8  TOPICS - subjects, wildcards, history, who is here, HTML fragments
# =============================================================================
# Knows: strings, callables, a clock that is handed in, ERRORS, PROTO.     Never: sockets.
#
# Names are tokens with dots between: `chat.lobby`.  In a pattern `*` is one token and `>`
# all that remain (NATS; MQTT's `+` and `#` are taken for them).  Exact subscriptions hang at
# the topic's record; wildcards in a tree of tokens, walked only when a topic is new or the
# wildcards have changed.  A sink subscribed twice, exactly and by a wildcard, gets a message
# once.
#
# A message has two numbers: `offset` counts its topic from 1, `seq` all topics.  What a topic
# keeps is found again by either, unless the epoch, which names this counting, is another.

_TOPIC_TOKEN = re.compile(r"[^\s.*>\x00-\x20\x7f\ud800-\udfff]+")
_WILDCARDS = {"+": "*", "#": ">"}   # MQTT's, as NATS writes them
_MAX_TOPIC_LENGTH = 255
_MAX_TOKENS = 32                    # of one topic: it bounds the walk through the tree
_MAX_IDLE_TOPICS = 10_000           # records of topics that nobody is subscribed to
_MAX_KEPT_BYTES = 32 << 20          # history of topics that a pattern declares, together
_MAX_MSG_IDS = 10_000               # remembered per topic
_MAX_MSG_ID = 128                   # characters
_MAX_PUBLISH_DEPTH = 32             # of publications made by subscribers of publications
_MAX_COMPARISONS = 100_000          # of patterns with topics, when a subscriber comes back
_EPOCH_LENGTH = 8                   # characters all epochs of one Topics begin with
_FORGOTTEN = object()               # in place of a payload that is rendered

_dump_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not JSON, or out of range")
    return number


_load_json = json.JSONDecoder(parse_constant=_finite, parse_float=_finite).decode


class Rendered(bytes):
    """A payload that is JSON already; who subscribes in process gets what it says."""

    __slots__ = ()


def _json_bytes(value: Any) -> bytes:
    if type(value) is Rendered:
        return bytes(value)
    try:
        return _dump_json(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"payload can't be written as JSON: {error}") from None


def _check_topic(name: str, *, wildcards: bool) -> list[str]:
    """Return a topic's tokens; the caller's mistake is a UsageError."""
    tokens = name.split(".") if isinstance(name, str) and len(name) <= _MAX_TOPIC_LENGTH else [""]
    tokens = [_WILDCARDS.get(token, token) for token in tokens]
    for at, token in enumerate(tokens):
        wild = token == "*" or token == ">" and at == len(tokens) - 1
        if not (wild and wildcards or _TOPIC_TOKEN.fullmatch(token)):
            raise UsageError(f"topic {str(name)[:80]!r}: write tokens with '.' between"
                             + (", '*' for one of them, a last '>' for the rest" if wildcards else
                                "; only subscriptions have wildcards"))
    if len(tokens) > _MAX_TOKENS:
        raise UsageError(f"topic {name[:80]!r} has {len(tokens)} tokens; {_MAX_TOKENS} are enough")
    return tokens


def _is_pattern(tokens: list[str]) -> bool:
    return "*" in tokens or tokens[-1] == ">"


def _contains(pattern: list[str], other: list[str]) -> bool:
    """Whether *pattern* covers all that *other*, a topic or a pattern itself, covers.

    >>> _contains(["chat", "*"], ["chat", "lobby"]), _contains(["chat", "*"], ["chat", ">"])
    (True, False)
    """
    if pattern[-1] == ">":
        if len(other) < len(pattern):
            return False
        pattern = pattern[:-1]
        other = other[:len(pattern)]
    return len(pattern) == len(other) and all(
        mine == their or mine == "*" and their != ">" for mine, their in zip(pattern, other))


def _inert(text: bytes) -> bytes:
    """Return the same JSON without a character that means something in HTML."""
    for mark in (b"<", b">", b"&"):             # which JSON has in strings alone
        text = text.replace(mark, b"\\u%04x" % ord(mark))
    return text


@functools.lru_cache(maxsize=1024)
def _topic_json(topic: str) -> bytes:
    return _json_bytes(topic)


class Publication:
    """One message on a topic, rendered at most once per form, whatever the audience.

    ``offset`` counts from 1 within its topic and ``epoch``, which changes when counting
    starts anew; ``seq`` counts over all topics. Clients are told ``seq`` of what is kept.
    """

    __slots__ = ("topic", "offset", "epoch", "critical", "seq", "size", "bare", "gap", "kept_ns",
                 "_payload", "_body", "_json", "_envelope")

    key = None                      # see Outbox: publications are never coalesced
    count = 1

    @property
    def label(self) -> str:
        """What it counts as when it is sent."""
        return "TOPIC_MESSAGE" if self.topic else "DIRECT"

    def __init__(self, topic: str, payload: Any, offset: int, epoch: str, critical: bool,
                 seq: int, bare: bool = False) -> None:
        self.topic = topic
        self._payload = payload
        self.offset = offset
        self.epoch = epoch
        self.critical = critical
        self.seq = seq              # keeps the order over topics
        self.size = 0               # as JSON, once it is rendered
        self.bare = bare            # clients get the payload alone
        self.gap = False            # it stands for what is no longer known
        self.kept_ns: int | None = None                     # since when its topic keeps it
        self._body = self._json = self._envelope = b""      # the payload; all, in both forms

    def __repr__(self) -> str:
        return f"Publication({self.topic!r}, {self.payload!r}, offset={self.offset})"

    @property
    def payload(self) -> Any:
        """What was published; once it waits to be sent or is kept, as it is read from JSON."""
        if type(self._payload) is Rendered:
            self._payload = json.loads(self._payload)
        return json.loads(self._body) if self._payload is _FORGOTTEN else self._payload

    @property
    def debt(self) -> Any:
        """What a client is to be told when this was dropped for it (see Outbox.owed)."""
        return ("gap", self.topic) if self.kept_ns is not None else None

    def forget(self) -> None:
        """Keep the rendered payload only: objects may take twenty times its bytes."""
        if self._body:
            self._payload = _FORGOTTEN

    def measure(self) -> int:
        """Render the payload and set and return ``size``; later changes to it don't matter.

        Raises:
            UsageError: it can't be JSON.
        """
        if not self._body:
            self._body = _json_bytes(self._payload)
            self.size = len(self._body) + 64
        return self.size

    @property
    def mark(self) -> bytes:
        """What a reader of Server-Sent Events comes back with; empty for what is not on a topic."""
        return b"%b:%d" % (self.epoch[:_EPOCH_LENGTH].encode(), self.seq) if self.epoch else b""

    def json(self) -> bytes:
        """Return the JSON object a client gets."""
        if not self._json:
            self.measure()
            kept = b',"seq":%d' % self.seq if self.kept_ns is not None else b""
            self._json = self._body if self.bare or not self.topic else (
                b'{"topic":%b,"payload":%b,"offset":%d,"epoch":"%b"%b}' % (
                    _topic_json(self.topic), self._body, self.offset, self.epoch.encode(), kept))
        return self._json

    def envelope(self, form: str) -> bytes:
        """Return it as one member of an encoded EventBatch."""
        if not self._envelope:
            self.measure()
            kept = self.kept_ns is not None or self.gap
            self._envelope = _batch_of(
                type="TOPIC_MESSAGE", topic_message=builtin_schema().TopicMessage(
                    self.topic, self._body, offset=self.offset, epoch=self.epoch,
                    seq=self.seq if kept else 0, gap=self.gap))
        return self._envelope

    def html(self) -> bytes:
        """Return what a client of HTML gets: JSON that no browser takes for elements."""
        return _inert(self.json())


def _batch_of(**envelope: Any) -> bytes:
    """Return an encoded EventBatch of one envelope; batches are joined by concatenation."""
    schema = builtin_schema()
    batch: bytes = schema.EventBatch(events=[schema.EventEnvelope(**envelope)]).encode()
    return batch


class Batch(NamedTuple):
    """Publications that are handed over together: a tick's, on one topic."""

    items: tuple[Publication, ...]
    size: int                       # bytes as JSON, of all
    critical: bool                  # one of them is

    @classmethod
    def of(cls, items: Iterable[Publication]) -> Batch:
        """Return a batch of publications that were measured."""
        items = tuple(items)
        return cls(items, sum(each.size for each in items), any(each.critical for each in items))


class Subscription:
    """A pattern and where its messages go; ``remove()`` ends it.

    ``gap`` tells that what came after ``since`` is no longer known; the sink first got a
    Publication that says so. ``position`` is where it begins; empty if nothing is kept.
    """

    __slots__ = ("pattern", "sink", "batched", "rate", "gap", "begin", "position", "_topics")

    def __init__(self, topics: Topics, pattern: str, sink: Callable[[Any], object],
                 batched: bool, rate: float | None) -> None:
        self.pattern = pattern
        self.sink = sink
        self.batched = batched
        self.rate = rate
        self.gap = False
        self.begin = 0              # the subscriber has, or gets by it, all of a greater seq
        self.position: dict[str, Any] = {}
        self._topics = topics

    def remove(self, *, hand_on: bool = False) -> None:
        """Unsubscribe; doing it twice is harmless. What is held by its rate may be handed on."""
        self._topics._remove(self)
        if isinstance(self.sink, _Throttle):
            self.sink.end(hand_on)


class _Throttle:
    """Conflation: hands on at most so often, of every topic the newest, or all that came.

    What is critical is handed on at once, with all that was held before it.
    """

    __slots__ = ("topics", "sink", "batched", "period_ns", "newest", "held", "due_ns", "entry")

    def __init__(self, topics: Topics, sink: Callable[[Any], object], batched: bool,
                 period_ns: int, newest: bool) -> None:
        self.topics = topics
        self.sink = sink
        self.batched = batched
        self.period_ns = period_ns
        self.newest = newest
        # in order, by topic or by seq; with the size it came with, for it may be rendered yet
        self.held: dict[Any, tuple[Publication, int]] = {}
        self.due_ns = 0
        self.entry: tuple[int, int, _Throttle] | None = None    # in Topics._due

    def __call__(self, what: Any) -> None:
        topics, now = self.topics, self.topics.clock()
        for item in what.items if self.batched else (what,):
            alone = item.critical or item.gap or not self.newest
            key = item.seq if alone else item.topic
            _, before = self.held.pop(key, (None, 0))       # to be the last again
            self.held[key] = item, item.size
            topics._held[self.sink] += item.size - before
        if what.critical or now >= self.due_ns or topics._held[self.sink] > topics.max_bytes or (
                not self.newest and len(self.held) >= topics.max_batch):
            self.release(now)
        elif self.entry is None:
            self.entry = (self.due_ns, id(self), self)
            bisect.insort(topics._due, self.entry)

    def release(self, now: int) -> None:
        """Hand on what is held."""
        items = self.take()
        self.due_ns = now + self.period_ns
        for what in [Batch.of(items)] if self.batched else items:
            self.topics._call((self.sink,), what)

    def take(self) -> list[Publication]:
        """Return what is held, and hold it no longer."""
        topics, held = self.topics, self.held.values()
        if self.entry is not None:
            del topics._due[bisect.bisect_left(topics._due, self.entry)]
            self.entry = None
        topics._held[self.sink] -= sum(size for _, size in held)
        if not topics._held[self.sink]:
            del topics._held[self.sink]
        self.held = {}
        return [item for item, _ in held]

    def end(self, hand_on: bool) -> None:
        """Be no longer due."""
        if self.held and hand_on:
            self.release(0)
        self.take()


class _Keep(NamedTuple):
    """What a topic keeps (``Topics.topic``)."""

    history: int = 0                # messages
    ttl_ns: float = math.inf
    replay: Any = None              # "last", "all", or a function that returns what to send
    bare: bool = False              # clients get the payload alone


class _Topic:
    """One topic's record."""

    __slots__ = ("name", "offset", "epoch", "exact", "sinks", "batched", "version", "pending",
                 "size", "keep", "history", "kept", "lost_seq", "ids", "occupied")

    def __init__(self, name: str, epoch: str, keep: _Keep, lost_seq: int) -> None:
        self.name = name
        self.offset = 0
        self.epoch = epoch
        self.exact: dict[Subscription, None] = {}
        self.sinks: tuple[Callable[[Publication], object], ...] = ()
        self.batched: tuple[Callable[[Batch], object], ...] = ()
        self.version = -1           # of the wildcards, when these were made; -1: make them anew
        self.pending: list[Publication] = []        # for the batched ones
        self.size = 0                               # bytes of these
        self.keep = keep
        self.history: deque[Publication] = deque()
        self.kept = 0                               # bytes of these
        self.lost_seq = lost_seq    # the last publication that can't be had again
        self.ids: OrderedDict[str, int] | None = None       # seen msg_ids, and when
        self.occupied: bool | None = None           # None: it was not declared by name

    @property
    def last_seq(self) -> int:
        """The last publication's."""
        return self.history[-1].seq if self.history else self.lost_seq


def _position(since: Any, wild: bool) -> tuple[str, int, bool]:
    """Return where a subscriber was: an epoch or "", a number, and whether that is a seq."""
    if type(since) is int:
        since = {"offset": since}
    if isinstance(since, Mapping):
        by_seq = "seq" in since
        epoch, number = since.get("epoch") or "", since.get("seq" if by_seq else "offset")
        if isinstance(epoch, str) and type(number) is int and number >= 0 and (
                epoch if by_seq else not wild):
            return epoch, number, by_seq
    raise UsageError('since is {"epoch", "offset"} of the last message seen, or {"epoch", "seq"}, '
                     f"which patterns need; not {reprlib.repr(since)}")


# a node of the wildcard tree: token -> node, and under "" the subscriptions that end there
_Branch = dict[Any, Any]


class Topics:
    """Publish by topic to whoever subscribed to it.

    Plain sinks are called at once. Batched ones get a Batch per topic at ``flush``: what a
    tick brings costs them once per topic, not once per message. Who subscribes or leaves in
    between gets exactly what was published while it was subscribed. A sink's exception is
    logged and counted, and the others get their message all the same.

    *max_batch* and *max_bytes* bound what is flushed at once, *max_bytes* also a topic's
    history. *on_occupied* is told a name, and whether somebody or nobody is subscribed to it.

    >>> topics, got = Topics(), []
    >>> subscription = topics.subscribe("chat.*", lambda message: got.append(message.payload))
    >>> topics.publish("chat.lobby", "hello"), topics.publish("news", "nobody"), got
    (1, 0, ['hello'])
    """

    __slots__ = ("clock", "max_batch", "max_bytes", "dedup_ns", "seq", "published", "delivered",
                 "errors", "duplicates", "loops", "_topics", "_root", "_of_sink", "_version",
                 "_epoch", "_epochs", "_pending", "_everybody", "_count", "_size", "_keeps",
                 "_kept", "_trim_at", "_forgotten", "_due", "_held", "_aging", "_depth", "_looped",
                 "_on_occupied")

    def __init__(self, max_batch: int = 256, max_bytes: int = 1 << 20, *,
                 dedup_ttl_s: float = 60.0, clock: Callable[[], int] = time.monotonic_ns,
                 on_occupied: Callable[[str, bool], object] = lambda name, occupied: None) -> None:
        self.clock = clock
        self.max_batch = max_batch or sys.maxsize
        self.max_bytes = max_bytes or sys.maxsize
        self.dedup_ns = int(dedup_ttl_s * 1e9)
        self.seq = itertools.count(1)
        self.published = self.delivered = self.errors = 0
        self.duplicates = self.loops = 0
        self._topics: dict[str, _Topic] = {}
        self._root: _Branch = {}
        self._of_sink: dict[Any, dict[Subscription, None]] = {}
        self._version = 0
        self._epoch = os.urandom(_EPOCH_LENGTH // 2).hex()
        self._epochs = itertools.count(1)
        self._pending: list[_Topic] = []    # those with something for batched sinks
        self._everybody = _Topic("", "", _Keep(), 0)        # what is broadcast waits here
        self._count = self._size = 0        # of what is pending
        self._keeps: dict[str, _Keep] = {}  # by name or pattern, the latest last
        self._kept = 0                      # bytes of all histories
        self._trim_at = _MAX_KEPT_BYTES
        self._forgotten = 0                 # the last seq of a topic that has no record any more
        self._due: list[tuple[int, int, _Throttle]] = []    # sorted
        self._held: Counter[Any] = Counter()        # bytes that throttles hold, by sink
        self._aging: dict[_Topic, None] = {}                # those with msg_ids or history
        self._depth = 0                     # publications within publications
        self._looped = False
        self._on_occupied = on_occupied

    def __len__(self) -> int:
        return len(self._topics)

    # -- subscribing --

    def subscribe(self, pattern: str, sink: Callable[[Any], object], *, batched: bool = False,
                  since: Any = None, rate: float | None = None, keep: str = "all") -> Subscription:
        """Call *sink* with every Publication whose topic *pattern* covers, or with Batches.

        With *since*, the position of the last message seen, it first gets what it missed, or a
        Publication with ``gap``. With *rate* it is called so many times a second at most, with all
        that came, or with *keep* "last" the newest of every topic; ``flush`` sees to it.

        Raises:
            UsageError: a malformed pattern or option.
        """
        tokens = _check_topic(pattern, wildcards=True)
        wild, name = _is_pattern(tokens), ".".join(tokens)
        position = None if since is None else _position(since, wild)
        self.flush()
        sink = self._conflated(sink, batched, rate, keep)
        subscription = Subscription(self, name, sink, batched, rate)
        self._of_sink.setdefault(sink, {})[subscription] = None
        record = None if wild else self._record(name)
        audience = self._path(tokens)[-1] if record is None else record.exact
        first = not audience
        audience[subscription] = None
        self._changed(record)
        self._replay(subscription, wild, position)
        if first:
            self._tell_occupied(name, tokens, wild)
        return subscription

    def _conflated(self, sink: Callable[[Any], object], batched: bool, rate: float | None,
                   keep: str) -> Callable[[Any], object]:
        if keep not in ("all", "last"):
            raise UsageError(f'keep is "all" or "last", not {keep!r}')
        if rate is None and keep == "all":
            return sink
        if rate is not None and (type(rate) not in (int, float) or not 0.001 <= rate <= 10_000):
            raise UsageError(f"rate is 0.001 to 10000 times a second, not {rate!r}")
        return _Throttle(self, sink, batched, int(1e9 / rate) if rate else 0, keep == "last")

    def _remove(self, subscription: Subscription) -> None:
        self.flush()
        tokens = subscription.pattern.split(".")
        record = None
        if (siblings := self._of_sink.get(subscription.sink)) is not None:
            siblings.pop(subscription, None)
            if not siblings:
                del self._of_sink[subscription.sink]
        if wild := _is_pattern(tokens):
            path = self._path(tokens)
            gone = path[-1].pop(subscription, self)
            last = not path[-1]
            for parent, token in reversed([*zip(path, (*tokens, ""))]):
                if parent[token]:               # leave no empty branches behind
                    break
                del parent[token]
        elif record := self._topics.get(subscription.pattern):
            gone = record.exact.pop(subscription, self)
            last = not record.exact
        else:
            return
        self._changed(record)
        if gone is None and last:
            self._tell_occupied(subscription.pattern, tokens, wild)

    def _changed(self, record: _Topic | None) -> None:
        if record is None:
            self._version += 1
        else:
            record.version = -1

    def _path(self, tokens: list[str]) -> list[_Branch]:
        """Return the branches on the way to a pattern's subscriptions; these are the last."""
        path = [self._root]
        for token in (*tokens, ""):
            path.append(path[-1].setdefault(token, {}))
        return path

    def matching(self, topic: str) -> list[Subscription]:
        """Return the subscriptions that *topic* reaches, exact ones first."""
        tokens = _check_topic(topic, wildcards=False)
        record = self._topics.get(topic)
        found = list(record.exact) if record else []
        branches = [self._root]
        for token in tokens:
            found += [each for branch in branches if ">" in branch for each in branch[">"][""]]
            branches = [branch[step] for branch in branches for step in (token, "*")
                        if step in branch]
        return found + [each for branch in branches for each in branch.get("", ())]

    def live(self, pattern: str) -> list[str]:
        """Return the topics there are that *pattern* covers. Cost: O(topics)."""
        tokens = _check_topic(pattern, wildcards=True)
        if not _is_pattern(tokens):
            return [name for name in (".".join(tokens),) if name in self._topics]
        steps = {"*": r"[^.]+", ">": ".+"}
        matches = re.compile(r"\.".join(steps.get(each) or re.escape(each) for each in tokens))
        return [name for name in self._topics if matches.fullmatch(name)]

    def _tell_occupied(self, name: str, tokens: list[str], wild: bool) -> None:
        """Say that the first came or the last went; topics declared by name count wildcards."""
        for each in (name, *(each for each in self._keeps if wild and each in self._topics)):
            record = self._topics.get(each)
            if each != name and not _contains(tokens, each.split(".")):
                continue
            if record is None or record.occupied is None:
                self._on_occupied(each, bool(record.exact if record else self._find(tokens)))
            elif record.occupied != (occupied := bool(self.matching(each))):
                record.occupied = occupied
                self._on_occupied(each, occupied)

    def _find(self, tokens: list[str]) -> _Branch:
        """Return the subscriptions of one pattern."""
        branch = self._root
        for token in (*tokens, ""):
            branch = branch.get(token, {})
        return branch

    # -- publishing --

    def publish(self, topic: str, payload: Any, *, critical: bool = False,
                msg_id: str | None = None) -> int:
        """Hand *payload* to every sink subscribed to *topic*; return how many.

        A pattern reaches every topic it covers that there is. A *msg_id* that the topic has
        seen within ``dedup_ttl_s`` makes it a repetition, which is counted and not delivered.

        Cost: O(plain sinks); topics of other names cost nothing.

        Raises:
            UsageError: a malformed topic, no JSON where a batched sink or history needs it, or
                subscribers that publish what calls them again.
        """
        # HOT: once per message (bench 14.fanout)
        record = self._topics.get(topic)
        if record is None:
            if _is_pattern(_check_topic(topic, wildcards=True)):
                return sum([self.publish(each, payload, critical=critical, msg_id=msg_id)
                            for each in self.live(topic)])
            record = self._record(topic)
        if record.version != self._version:
            self._find_sinks(topic, record)
        if self._depth:
            self._check_depth(topic)
        if msg_id is not None and self._is_repeated(record, msg_id):
            return 0
        record.offset += 1
        publication = Publication(topic, payload, record.offset, record.epoch, critical,
                                  next(self.seq), record.keep.bare)
        if record.batched or record.keep.history:
            self._enqueue(record, publication)
        else:
            record.lost_seq = publication.seq
        if msg_id is not None:
            self._remember(record, msg_id)
        if record.sinks:
            self._call(record.sinks, publication)
        publication.forget()
        count = len(record.sinks) + len(record.batched)
        self.published += 1
        self.delivered += count
        return count

    def broadcast(self, payload: Any, sink: Callable[[Batch], object], *,
                  critical: bool = False) -> None:
        """Hand *payload* to *sink*, in its place among what is published."""
        self._everybody.batched = (sink,)
        publication = Publication("", payload, 0, "", critical, next(self.seq))
        self._enqueue(self._everybody, publication)
        publication.forget()

    def _call(self, sinks: Iterable[Callable[[Any], object]], what: Publication | Batch) -> None:
        self._depth += 1
        try:
            for sink in sinks:
                try:
                    sink(what)
                except Exception:
                    self.errors += 1
                    if not self._looped:        # else it is only what the loop's end is told
                        topic = what.items[0].topic if isinstance(what, Batch) else what.topic
                        _log.exception("subscriber of %s failed", topic)
        finally:
            self._depth -= 1
            self._looped = self._looped and self._depth > 0

    def _check_depth(self, topic: str) -> None:
        """Refuse what is published too deep within publications, and then all else there."""
        if self._depth >= _MAX_PUBLISH_DEPTH and not self._looped:
            self._looped = True
            self.loops += 1
            _log.error("publishing %s: subscribers call each other in a loop", topic)
        if self._looped:
            raise UsageError(f"publishing {topic}: its subscribers publish what calls them again")

    def _find_sinks(self, topic: str, record: _Topic) -> None:
        found = list(record.exact) if record.keep.bare else self.matching(topic)
        record.sinks = tuple(dict.fromkeys(each.sink for each in found if not each.batched))
        record.batched = tuple(dict.fromkeys(each.sink for each in found if each.batched))
        record.version = self._version

    def _enqueue(self, record: _Topic, publication: Publication) -> None:
        if record.keep.history:
            publication.kept_ns = self.clock()
        try:
            publication.measure()               # here, so that the publisher hears of it
        except UsageError:
            record.offset -= 1
            raise
        if record.keep.history:
            self._keep(record, publication)
        else:
            record.lost_seq = publication.seq
        if not record.batched:
            return
        if self._size + publication.size > self.max_bytes:
            self.flush()
        if not record.pending:
            self._pending.append(record)
            record.size = 0
        record.pending.append(publication)
        record.size += publication.size
        self._size += publication.size
        self._count += 1
        if publication.critical or self._count >= self.max_batch:
            self.flush()

    def flush(self) -> None:
        """Hand batched sinks what was published since the last time, and what is due by rate.

        That is never more than fits an empty outbox, so that sinks can sort it over topics.
        """
        self._count = self._size = 0
        pending, self._pending = self._pending, []          # what sinks publish comes next time
        for record in pending:
            items, record.pending = tuple(record.pending), []
            self._call(record.batched, Batch(items, record.size, items[-1].critical))
        if self._due:
            now = self.clock()
            while self._due and self._due[0][0] <= now:
                self._due[0][2].release(now)

    @property
    def pending(self) -> bool:
        """Whether batched sinks have something to come."""
        return bool(self._pending)

    def wait_s(self) -> float:
        """Return in how many seconds ``flush`` has something to hand on by its rate."""
        return max(0.0, (self._due[0][0] - self.clock()) / 1e9) if self._due else math.inf

    # -- remembering --

    def topic(self, name: str, history: int = 0, ttl: float | None = None,
              replay: str | Callable[[], Publication | None] | None = None,
              bare: bool = False) -> None:
        """Say what a topic, or every topic of a pattern, keeps for who comes late or again.

        The newest *history* messages, for *ttl* seconds, and no more than ``max_bytes``. With
        *replay* "last" or "all" every new subscriber gets them; a function returns what it gets
        instead. Of patterns the one declared last counts; all they keep is bounded, too. Of
        what is *bare*, clients get the payload alone, and only by the topic's own name.

        Raises:
            UsageError: a malformed name or option.
        """
        tokens = _check_topic(name, wildcards=True)
        if type(history) is not int or history < 0:
            raise UsageError(f"history is a number of messages, not {history!r}")
        if ttl is not None and (type(ttl) not in (int, float) or not 0 < ttl < math.inf):
            raise UsageError(f"ttl is a time in seconds, or None for ever; not {ttl!r}")
        if replay not in (None, "last", "all") and not callable(replay):
            raise UsageError(f'replay is "last", "all" or None, not {replay!r}')
        if replay == "all" and not history:
            raise UsageError('replay="all" needs a history, like history=100')
        name = ".".join(tokens)
        self._keeps.pop(name, None)             # to be the last again
        self._keeps[name] = _Keep(max(history, int(replay == "last")),
                                  math.inf if ttl is None else int(ttl * 1e9), replay, bare)
        if not _is_pattern(tokens):
            record = self._record(name)
            if record.occupied is None:
                record.occupied = bool(record.exact)
                self._tell_occupied(name, tokens, False)
        for each in self.live(name):
            self._topics[each].keep = self._keep_of(each)
            self._expire(self._topics[each])

    def _keep_of(self, topic: str) -> _Keep:
        if topic in self._keeps:
            return self._keeps[topic]
        tokens = topic.split(".")
        return next((keep for name, keep in reversed(self._keeps.items())
                     if _contains(name.split("."), tokens)), _Keep())

    def history(self, topic: str) -> list[Publication]:
        """Return what *topic* keeps, oldest first."""
        if record := self._topics.get(topic):
            self._expire(record)
            return list(record.history)
        return []

    def position(self, pattern: str) -> dict[str, Any]:
        """Return where a subscriber of *pattern* is now, for ``since``; {} if nothing is kept."""
        record = self._topics.get(pattern)
        if record is not None and record.keep.history:
            return {"epoch": record.epoch, "offset": record.offset}
        tokens = _check_topic(pattern, wildcards=True)
        if _is_pattern(tokens) and any(keep.history for keep in self._keeps.values()):
            return {"epoch": self._epoch, "seq": next(self.seq)}
        return {}

    def mark(self, seq: int) -> bytes:
        """Return what a reader of Server-Sent Events begins with; see ``Publication.mark``."""
        return b"%b:%d" % (self._epoch.encode(), seq)

    def gap(self, pattern: str, after: Sequence[Publication] = ()) -> Publication:
        """Return what tells a client that it missed something, and where it goes on: *after*."""
        record = self._topics.get(pattern)
        seq = after[0].seq - 1 if after else next(self.seq)
        at: dict[str, Any] = {"epoch": self._epoch, "offset": 0, "seq": seq}
        if record is not None:
            at = {"epoch": record.epoch, "offset": record.offset}
            if after:
                at["offset"] = after[0].offset - 1
        publication = Publication(pattern, {"topic": pattern, "gap": True, **at}, at["offset"],
                                  at["epoch"], False, seq, bare=True)
        publication.gap = True
        publication.measure()
        return publication

    def _replay(self, subscription: Subscription, wild: bool,
                since: tuple[str, int, bool] | None) -> None:
        """Hand a new subscriber what it missed, or what its topics repeat for everybody."""
        pattern = subscription.pattern
        position = subscription.position = self.position(pattern)
        subscription.begin = position.get("seq") or next(self.seq)
        if since is None and not self._keeps:
            return
        records = [record for record in map(self._topics.__getitem__, self.live(pattern))
                   if not (wild and record.keep.bare)]
        for record in records:
            self._expire(record)
        items = None if since is None else self._missed(records, wild, *since)
        items = items and self._unknown(items, subscription)
        subscription.gap = since is not None and items is None
        if items is None:
            items = self._unknown([each for record in records for each in self._repeated(
                record.keep, record)], subscription) or []
        items.sort(key=operator.attrgetter("seq"))
        if since is not None and not subscription.gap:      # all before, it says, it has
            subscription.begin = 0
        elif items:
            subscription.begin = items[0].seq - 1
        if position and since is not None and not subscription.gap:
            position.clear()
            position |= {"epoch": since[0] or self._topics[pattern].epoch,
                         "seq" if since[2] else "offset": since[1]}
        elif position and items:
            by = "seq" if wild else "offset"
            position[by] = getattr(items[0], by) - 1
        if subscription.gap:
            items.insert(0, self.gap(pattern, items))
        batches = [Batch.of(items)._replace(critical=False)] if items else []
        for what in batches if subscription.batched else items:
            self._call((subscription.sink,), what)

    def _unknown(self, items: list[Publication],
                 subscription: Subscription) -> list[Publication] | None:
        """Return what other subscriptions of the same sink leave out; None if they are too many."""
        others = [each for each in self._of_sink[subscription.sink]
                  if each.pattern != subscription.pattern]      # asked again, it wants it again
        exact = {each.pattern: each.begin for each in others}
        wild = [(tokens, each.begin) for each in others
                if _is_pattern(tokens := each.pattern.split("."))]
        topics = {each.topic for each in items}
        if len(wild) * len(topics) > _MAX_COMPARISONS:
            return None
        begins = {topic: min([exact.get(topic, sys.maxsize), *(
            begin for tokens, begin in wild if _contains(tokens, topic.split(".")))])
            for topic in topics}
        return [each for each in items if each.seq <= begins[each.topic] or each.bare]

    @staticmethod
    def _repeated(keep: _Keep, record: _Topic) -> list[Publication]:
        if callable(keep.replay):
            return [each] if (each := keep.replay()) is not None else []
        return list(record.history)[{"all": 0, "last": -1}.get(keep.replay, sys.maxsize):]

    def _missed(self, records: list[_Topic], wild: bool, epoch: str, number: int,
                by_seq: bool) -> list[Publication] | None:
        """Return what was published after a position, or None if it is no longer known."""
        if by_seq:
            known = epoch[:_EPOCH_LENGTH] == self._epoch and (
                number >= max([self._forgotten * wild, *(each.lost_seq for each in records)]))
            missed = [item for each in records for item in each.history if item.seq > number]
        else:
            (record,) = records
            first = record.offset + 1 - len(record.history)
            known = epoch in ("", record.epoch) and first - 1 <= number <= record.offset
            missed = [each for each in record.history if each.offset > number]
        return missed if known and sum(each.size for each in missed) <= self.max_bytes else None

    def _keep(self, record: _Topic, publication: Publication) -> None:
        record.history.append(publication)
        record.kept += publication.size
        self._kept += publication.size
        self._aging[record] = None
        self._expire(record)
        if self._kept > self._trim_at:
            self._trim()

    def _expire(self, record: _Topic) -> None:
        """Let go of what a record keeps no longer."""
        keep, history, now = record.keep, record.history, self.clock()
        while history and (len(history) > keep.history or record.kept > self.max_bytes
                           or now - (history[0].kept_ns or 0) > keep.ttl_ns):
            self._lose(record)

    def _lose(self, record: _Topic) -> None:
        gone = record.history.popleft()
        record.kept -= gone.size
        self._kept -= gone.size
        record.lost_seq = gone.seq

    def _trim(self) -> None:
        """Let go of history that strangers could fill: topics that only a pattern declares."""
        for record in self._topics.values():
            if record.occupied is None and self._kept > _MAX_KEPT_BYTES * 3 // 4:
                while record.history:
                    self._lose(record)
        self._trim_at = max(_MAX_KEPT_BYTES, self._kept * 5 // 4)

    def _is_repeated(self, record: _Topic, msg_id: str) -> bool:
        if not isinstance(msg_id, str) or not 0 < len(msg_id) <= _MAX_MSG_ID:
            raise UsageError(f"msg_id is a text of 1 to {_MAX_MSG_ID} characters, "
                             f"not {reprlib.repr(msg_id)}")
        self._forget_ids(record)
        repeated = record.ids is not None and msg_id in record.ids
        self.duplicates += repeated
        return repeated

    def _remember(self, record: _Topic, msg_id: str) -> None:
        if record.ids is None:
            record.ids = OrderedDict()
        self._aging[record] = None
        record.ids[msg_id] = self.clock()
        if len(record.ids) > _MAX_MSG_IDS:
            record.ids.popitem(last=False)

    def _forget_ids(self, record: _Topic) -> None:
        limit = self.clock() - self.dedup_ns
        while record.ids and next(iter(record.ids.values())) <= limit:
            record.ids.popitem(last=False)

    def sweep(self) -> None:
        """Let go of what is too old; to be called now and then. Cost: O(topics that keep)."""
        for record in list(self._aging):
            self._forget_ids(record)
            self._expire(record)
            if not record.ids and not record.history:
                del self._aging[record]

    def _record(self, topic: str) -> _Topic:
        """Return a topic's record, made if need be; forget idle ones when there are many."""
        if topic not in self._topics:
            _check_topic(topic, wildcards=False)
            if len(self._topics) >= _MAX_IDLE_TOPICS:
                idle = [each for each in self._topics.values()
                        if not each.exact and not each.pending and each.occupied is None]
                idle.sort(key=lambda each: (bool(each.sinks or each.batched), each.last_seq))
                for each in idle[:_MAX_IDLE_TOPICS // 10]:
                    self._forget(each)
            self._topics[topic] = _Topic(topic, f"{self._epoch}{next(self._epochs):x}",
                                         self._keep_of(topic), self._forgotten)
        return self._topics[topic]

    def _forget(self, record: _Topic) -> None:
        while record.history:
            self._lose(record)
        self._forgotten = max(self._forgotten, record.lost_seq)
        self._aging.pop(record, None)
        del self._topics[record.name]

    def _check(self) -> None:
        """Assert that nothing is left where nobody is subscribed (tests)."""
        records = self._topics.values()
        assert not self._root and not self._due and not any(each.exact for each in records)
        assert not self._of_sink and not self._held
        assert self._kept == sum(each.kept for each in records)
        assert all(each.kept == sum(item.size for item in each.history) for each in records)
        assert not self._depth and set(self._aging) <= set(records)


class _Here:
    """One connection of somebody who is here."""

    __slots__ = ("user", "seen_ns", "patience_ns", "metadata")

    def __init__(self, user: str, seen_ns: int, patience_ns: int, metadata: Any) -> None:
        self.user = user
        self.seen_ns = seen_ns
        self.patience_ns = patience_ns      # silence after which it is stale; 0: never
        self.metadata = metadata


class Presence:
    """Who is here: users with at least one connection (seed 004).

    A user with three tabs joins once, and leaves when the last tab is gone for *debounce_s*:
    a reload is silent. Whoever promised heartbeats is gone when they stay out. All is recorded
    at once; changes are told together, *updates_per_s* times a second at most.

    >>> presence = Presence(debounce_s=0)
    >>> presence.join("bo", 1), presence.join("al", 2), presence.join("al", 3), presence.users()
    (None, None, None, ['al', 'bo'])
    >>> presence.leave(2), presence.online(), presence.take_changes()["joined"]
    (None, 2, ['al', 'bo'])
    """

    __slots__ = ("version", "swept", "debounce_ns", "_clock", "_pause_ns", "_next_ns",
                 "_connections", "_users", "_leaving", "_states", "_told", "_changed", "_sorted")

    def __init__(self, debounce_s: float = 5.0, updates_per_s: float = 10.0,
                 clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.version = 0                    # changes with users and states
        self.swept = 0                      # connections that were silent for too long
        self._clock = clock
        self.debounce_ns = int(debounce_s * 1e9)
        self._pause_ns = int(1e9 / updates_per_s)
        self._next_ns = 0                   # when changes may be told again
        self._connections: dict[Any, _Here] = {}
        self._users: Counter[str] = Counter()       # how many connections they have
        self._leaving: dict[str, int] = {}  # when; in this order
        self._states: dict[str, Any] = {}
        self._told: set[str] = set()        # who is here, as it was told
        self._changed: dict[str, None] = {}
        self._sorted: list[str] | None = None

    def join(self, user: str, connection: Any, *, heartbeat_s: float | None = None,
             multiplier: float = 3.0, metadata: Any = None) -> None:
        """Record a connection of *user*, any key; again with the same key for other details.

        With *heartbeat_s* it is stale after *multiplier* times as long without a heartbeat; 0
        promises none.
        """
        old = self._connections.get(connection)
        if old is not None and old.user != user:        # who only changes names is gone at once
            self._leave(connection, old, 0)
        patience_ns = 0 if old is None else old.patience_ns
        if heartbeat_s is not None:
            patience_ns = int(heartbeat_s * multiplier * 1e9)
        if metadata is None and old is not None:
            metadata = old.metadata
        self._connections[connection] = _Here(user, self._clock(), patience_ns, metadata)
        here = user in self._users or self._leaving.pop(user, None) is not None
        self._users[user] += old is None or old.user != user
        if not here:
            self._change(user)

    def heartbeat(self, connection: Any) -> bool:
        """Note a sign of life; return whether this connection is known (a stale one is not)."""
        if (here := self._connections.get(connection)) is None:
            return False
        here.seen_ns = self._clock()
        return True

    def leave(self, connection: Any, *, at_once: bool = False) -> None:
        """Forget a connection; twice is harmless. *at_once* its user does not come back."""
        if (here := self._connections.get(connection)) is not None:
            self._leave(connection, here, 0 if at_once else self.debounce_ns)

    def _leave(self, connection: Any, here: _Here, debounce_ns: int) -> None:
        del self._connections[connection]
        self._users[here.user] -= 1
        if not self._users[here.user]:
            del self._users[here.user]
            self._leaving[here.user] = self._clock() + debounce_ns
            if not debounce_ns:
                self._let_go(here.user)

    def set_state(self, user: str, state: Any) -> None:
        """Keep the latest state of a user who is here, like {"status": "away"}; None is none."""
        if user in self and self._states.get(user) != state:
            self._states[user] = state
            if state is None:
                del self._states[user]
            self._change(user)

    def __contains__(self, user: str) -> bool:
        return user in self._users or user in self._leaving

    def online(self) -> int:
        """Return how many users are here."""
        return len(self._users) + len(self._leaving)

    def users(self) -> list[str]:
        """Return who is here, sorted."""
        if self._sorted is None:
            self._sorted = sorted([*self._users, *self._leaving])
        return list(self._sorted)

    def state(self, user: str) -> Any:
        """Return a user's latest state, or None."""
        return self._states.get(user)

    def connections(self, user: str) -> list[dict[str, Any]]:
        """Return a user's connections: their metadata, and the seconds since they were heard.

        Cost: O(connections of all).
        """
        now = self._clock()
        found = [each for each in self._connections.values() if each.user == user]
        return [{"metadata": each.metadata, "silent_s": round((now - each.seen_ns) / 1e9, 3)}
                for each in found]

    def sweep(self) -> None:
        """Let go of who is silent for too long. Cost: O(connections)."""
        now = self._clock()
        for key, each in list(self._connections.items()):
            if 0 < each.patience_ns < now - each.seen_ns:
                self.swept += 1
                self.leave(key)

    @property
    def pending(self) -> bool:
        """Whether there may be something to tell."""
        return bool(self._changed)

    def snapshot(self) -> dict[str, Any]:
        """Return everything as clients are told it, as if all had just joined."""
        return self._update(self.users(), [], self._states)

    def take_changes(self) -> dict[str, Any] | None:
        """Return what to tell since the last time, if it is time: users, joined, left, states."""
        now = self._clock()
        while self._leaving and self._leaving[user := next(iter(self._leaving))] <= now:
            self._let_go(user)
        if not self._changed or now < self._next_ns:
            return None
        changed, self._changed = self._changed, {}
        joined = [user for user in changed if user in self and user not in self._told]
        left = [user for user in changed if user not in self and user in self._told]
        states = {user: self._states.get(user) for user in changed
                  if user in self and (user in self._told or user in self._states)}
        self._told.update(joined)
        self._told.difference_update(left)
        if not (joined or left or states):      # came and went
            return None
        self._next_ns = now + self._pause_ns
        return self._update(sorted(joined), sorted(left), states)

    def _update(self, joined: list[str], left: list[str], states: dict[str, Any]) -> dict[str, Any]:
        update = {"type": "presence_update", "users": self.users(), "joined": joined, "left": left}
        return {**update, "states": dict(states)} if states else update

    def _let_go(self, user: str) -> None:
        del self._leaving[user]
        self._states.pop(user, None)
        self._change(user)

    def _change(self, user: str) -> None:
        self._changed[user] = None
        self._sorted = None
        self.version += 1

    def _check(self) -> None:
        """Assert that nobody is left who has no connection (tests)."""
        assert self._users == Counter(each.user for each in self._connections.values())
        assert all(self._users.values())
        assert not self._users.keys() & self._leaving.keys()
        assert {*self._states} <= {*self._users, *self._leaving}


# -- HTML --

class Safe(str):
    """Text that is HTML already: ``escape`` and ``html`` leave it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)


class Fragment(bytes):
    """Rendered HTML; ``html`` takes it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        return self.decode()


def escape(value: object) -> Safe:
    """Return *value* as text that HTML shows as it is; what is Safe stays (``__html__``)."""
    from html import escape as quote
    if hasattr(type(value), "__html__"):        # its type's: an object may answer any name
        return Safe(value.__html__())           # type: ignore[attr-defined]
    if type(value) in (list, tuple, deque) or isinstance(value, Iterator | MappingView):
        return Safe("".join(map(escape, value)))        # type: ignore[call-overload]
    return Safe(quote(str(value)))


class _Text(str):
    """Text in a template that was asked for as such, by ``!s`` or ``!r``: escaped at the end."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return escape(str.__format__(self, spec))


class _Slot:
    """A value in a template: formatted as the template says, then escaped."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __format__(self, spec: str) -> str:
        value = _slot_value(self)
        if not spec:
            return escape(value)
        if hasattr(type(value), "__html__"):
            return format(value.__html__(), spec)
        return escape(format(value, spec))

    def __getattribute__(self, name: str) -> _Slot:
        return _Slot(getattr(_slot_value(self), name))      # the value's, whatever its name

    def __getitem__(self, key: Any) -> _Slot:
        return _Slot(_slot_value(self)[key])

    def __str__(self) -> str:
        value = _slot_value(self)
        return value.__html__() if hasattr(type(value), "__html__") else _Text(value)

    def __repr__(self) -> str:
        return _Text(repr(_slot_value(self)))


_slot_value = _Slot.__dict__["value"].__get__


class _Slots(dict[str, _Slot]):
    def __missing__(self, name: str) -> _Slot:
        raise UsageError(f"the template uses {{{name}}}; the values given are "
                         f"{', '.join(self) or 'none'}. Braces are written {{{{ and }}}}")


def html(template: str, /, **values: Any) -> Safe:
    """Return *template*, with values escaped in the places ``{name}`` (as ``str.format`` has it).

    What ``html`` and ``Safe`` made is put in as it is, lists of it joined. The template itself
    is trusted: never put in what people wrote by an f-string. Quote attributes.

    >>> html('<p class="{kind}">{lines}</p>', kind="a b", lines=[html("<b>{x}</b>", x="<3")])
    '<p class="a b"><b>&lt;3</b></p>'

    Raises:
        UsageError: a name without a value, or a brace that is not closed.
    """
    try:
        return Safe(template.format_map(_Slots({name: _Slot(values[name]) for name in values})))
    except ValueError as error:
        raise UsageError(f"template {template[:60]!r}: {error}") from error


def _fragment(rendered: Any, what: object) -> Fragment:
    """Return what a render function returned as bytes."""
    if hasattr(type(rendered), "__html__"):
        rendered = rendered.__html__()
    if isinstance(rendered, str):
        return Fragment(rendered.encode(errors="replace"))
    if isinstance(rendered, bytes):
        return Fragment(rendered)
    raise UsageError(f"{what} must render to a str or bytes, not {type(rendered).__name__}")


class FragmentCache:
    """Rendered HTML by key, for a time; the least recently used go first (seed 004).

    >>> cache = FragmentCache()
    >>> cache.get("count:3", lambda: "<b>3</b>"), cache.get("count:3", lambda: "never called")
    (b'<b>3</b>', b'<b>3</b>')
    """

    __slots__ = ("hits", "misses", "evictions", "max_entries", "ttl_s", "_entries", "_clock",
                 "_on_render", "_rendering")

    def __init__(self, max_entries: int = 1000, ttl_s: float = 30.0, *,
                 clock: Callable[[], int] = time.monotonic_ns,
                 on_render: Callable[[float], object] = lambda seconds: None) -> None:
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[object, tuple[Fragment, float]] = OrderedDict()  # until when
        self.max_entries = max_entries or sys.maxsize      # a limit of 0 means none
        self.ttl_s = ttl_s
        self._clock = clock
        self._on_render = on_render         # told the seconds it took
        self._rendering: set[object] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: object, render: Callable[[], Any], ttl_s: float | None = None) -> Fragment:
        """Return what *render* returned for *key*, at most *ttl_s* seconds ago; 0 is for ever.

        Raises:
            UsageError: *render* asks for its own key, or returns neither str nor bytes.
        """
        entry = self._entries.get(key)
        if entry is not None and self._clock() < entry[1]:
            self.hits += 1
            self._entries.move_to_end(key)
            return entry[0]
        self.misses += 1
        if key in self._rendering:
            raise UsageError(f"fragment {key!r} asks for itself while it is rendered")
        self._rendering.add(key)
        try:
            fragment = self.render(render, f"fragment {key!r}")
        finally:
            self._rendering.discard(key)
        ttl_s = self.ttl_s if ttl_s is None else ttl_s
        self._entries[key] = fragment, self._clock() + int(ttl_s * 1e9) if ttl_s else math.inf
        self._entries.move_to_end(key)
        if len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)
            self.evictions += 1
        return fragment

    def render(self, render: Callable[[], Any], what: str) -> Fragment:
        """Render without keeping it; the time is told."""
        began = self._clock()
        fragment = _fragment(render(), what)
        self._on_render((self._clock() - began) / 1e9)
        return fragment

    def discard(self, key: object) -> None:
        """Forget *key*: it is rendered anew when asked for."""
        self._entries.pop(key, None)


class Markup:
    """HTML on its way to clients: a fragment that replaces its older self, or a message."""

    __slots__ = ("key", "topic", "data", "seq", "size", "critical")

    label, count = "FRAGMENT", 1

    def __init__(self, data: bytes, seq: int, topic: str = "", critical: bool = False) -> None:
        self.data = data
        self.key = topic or None        # see Outbox
        self.topic = topic
        self.seq = seq
        self.size = len(data)
        self.critical = critical

    def measure(self) -> int:
        """Return how many bytes it is."""
        return self.size

    def replaces(self, _older: Markup) -> Markup:
        """Return what a client gets in place of an older one: this."""
        return self

    def html(self) -> bytes:
        """Return what a client of HTML gets."""
        return self.data


# =============================================================================
# 9  STREAM - expressions, mappings, topic templates
# =============================================================================
# Knows: JSON, SCHEMA's _compile, the patterns of TOPICS, clocks that are handed in.
# Never: sockets.
#
# An expression is Python's, as far as a table here allows it, and is written out anew as
# Python text in which every name and every call is one of ours.  What could grow without
# bound (products, powers, texts, loops) becomes a call that looks first, unless the types
# already say that it can't: floats don't grow, so arithmetic stays arithmetic.
#
# A Stream becomes one function per source topic, which updates the state, runs the mappings
# that depend on that source, and formats what they give (Stream.__source__).  State is a
# tuple per match of the sources' wildcards, replaced whole: who reads it in another thread
# sees one moment.  Seed 003; what a mapping means is benthos-umh's stream_processor.

_MAX_EXPRESSION = 4_096             # characters
_MAX_NESTING = 64                   # of an expression, and of a value
_MAX_LOOPS = 8                      # within each other
_MAX_STEPS = 100_000                # of one evaluation: items gone through, or 64 characters
_MAX_HINTED = 500                   # characters of what is put into Python, if it is JavaScript
_MAX_FOLDED = 1_000                 # characters of a text that is computed beforehand
_MAX_BITS = 1 << 11                 # of a whole number that is computed
_MAX_INT_BITS = 1_024               # of one that comes in
_MAX_ITEMS = 10_000                 # of a value that comes in, at all depths
_MAX_WINDOW = 10_000                # samples of a window; then the oldest go
_MAX_LATE = 10                      # samples older than a window; then it begins anew
_MAX_SAMPLES = 1_000_000            # of all windows of a stream; then they don't grow
_MAX_HELD = 32 << 20                # bytes of JSON of texts, lists and objects in a state
_MAX_AT_MS = 1 << 63
_IDLE_NS = 60_000_000_000           # for how long a match is kept, when there are too many
_MAX_MATCHES = 10_000               # of one stream's wildcards
_MISSING = object()
_FLAT = frozenset({int, float, bool, type(None)})
_FORMAT_SPEC = re.compile(
    r"(?:.?[<>=^])?[-+ ]?#?0?\d{0,3}[,_]?(?:\.\d{1,2})?[bcdeEfFgGosxX%]?", re.DOTALL)


class _Stop(ExpressionError):
    """There is no result here; ``reason`` is what that counts as."""

    def __init__(self, text: str, reason: str = "limit") -> None:
        super().__init__(text)
        self.reason = reason


# -- what expressions call: each looks before it computes --

def _kind_of(value: object) -> str:
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false",
            list: "a list", tuple: "a tuple", dict: "an object", type(None): "null"}.get(
                type(value), f"a {type(value).__name__}")


def _charge(left: list[int], steps: int) -> None:
    left[0] -= steps
    if left[0] < 0:
        raise _Stop(f"takes more than {_MAX_STEPS} steps")


def _weight(value: object, most: int) -> int:
    """Return what it costs to read *value* as a whole; above *most* it need not be exact."""
    total, todo = 0, [value]
    while todo and total <= most:
        each = todo.pop()
        if isinstance(each, str):
            total += len(each) >> 6
        elif isinstance(each, list | tuple | dict):
            total += len(each) + 1
            inner = [*each, *each.values()] if isinstance(each, dict) else each
            kinds = {*map(type, inner)}
            if not kinds <= _FLAT:
                todo += inner
            elif int in kinds:
                total += sum([one.bit_length() for one in inner if type(one) is int]) >> 8
        elif isinstance(each, int):
            total += each.bit_length() >> 8
    return total


def _use(value: Any, left: list[int]) -> Any:
    """Return *value*, which is about to be read as a whole."""
    if type(value) not in _FLAT:
        _charge(left, _weight(value, left[0]))
    return value


def _take(value: Any, left: list[int], steps: int) -> Any:
    """Return *value*, which is about to be looped over; each turn takes some steps."""
    if not isinstance(value, list | tuple | dict | str):
        raise TypeError(f"can't loop over {_kind_of(value)}")
    _charge(left, (len(value) + 1) * steps)
    return value


def _key(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a key of an object is a text, not {_kind_of(value)}")
    return value


def _plus(a: Any, b: Any, left: list[int]) -> Any:
    if isinstance(a, str | list | tuple) and isinstance(b, str | list | tuple):
        _charge(left, (len(a) + len(b)) >> (6 if isinstance(a, str) else 0))
    return a + b


def _times(a: Any, b: Any, left: list[int]) -> Any:
    for one, other in ((a, b), (b, a)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            _charge(left, len(one) * max(other, 0) >> (6 if isinstance(one, str) else 0))
    if isinstance(a, int) and isinstance(b, int):
        _check_bits(a.bit_length() + b.bit_length())
    return a * b


def _check_bits(count: int) -> None:
    if count > _MAX_BITS:
        raise _Stop(f"a whole number of more than {_MAX_BITS} bits")


def _modulo(a: Any, b: Any, left: list[int]) -> Any:
    if isinstance(a, str):
        raise TypeError('% can\'t format a text; write an f-string, like f"{x:.1f}"')
    return a % b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1:
        _check_bits(a.bit_length() * b)
    result = a ** b
    if isinstance(result, complex):
        raise ValueError("a root of a negative number")
    return result


def _shifted(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        _check_bits(a.bit_length() + b)
    return a << b


def _of_bits(value: Any) -> Any:
    if not isinstance(value, int):
        raise TypeError(f"bits are of whole numbers, not of {_kind_of(value)}; a power is **")
    return value


def _as_int(value: Any, base: int | None = None) -> int:
    result = int(value) if base is None else int(value, base)
    _check_bits(result.bit_length())
    return result


def _rounded(value: Any, digits: int | None = None) -> Any:
    if digits is not None and abs(digits) > 400:
        raise _Stop("round() to more than 400 digits")
    return round(value, digits)


def _text_of(value: Any, spec: str, left: list[int]) -> str:
    text = format(_use(value, left), spec)
    _charge(left, len(text) >> 6)
    return text


def _joined(parts: tuple[str, ...], left: list[int]) -> str:
    _charge(left, sum(map(len, parts)) >> 6)
    return "".join(parts)


def _text_method(name: str) -> Callable[..., Any]:
    act = getattr(str, name)
    # the first argument that the result, or the work, is a multiple of
    grows = {"replace": 1, "join": 0, "strip": 0, "lstrip": 0, "rstrip": 0}.get(name, 9)

    def call(left: list[int], text: Any, *args: Any) -> Any:
        if type(text) is not str:
            raise TypeError(f".{name}() is for texts, not for {_kind_of(text)}")
        longest = filled = 0
        for n, each in enumerate(args):
            if isinstance(each, int):
                filled += max(each, 0)
            elif isinstance(each, str | list | tuple) and len(_use(each, left)) > longest and (
                    n >= grows):
                longest = len(each)
        # the most that replacing, joining, filling and stripping give or take
        _charge(left, ((len(text) + 1) * (longest + 1) + filled) >> 6)
        return _use(act(text, *args), left)

    return call


def _object_method(name: str) -> Callable[..., Any]:
    act = getattr(dict, name)

    def call(left: list[int], value: Any, *args: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(f".{name}() is for objects, not for {_kind_of(value)}")
        if args:
            return act(value, _use(args[0], left), *args[1:])
        return _use([*act(value)], left)

    return call


class _Function(NamedTuple):
    """What an expression may call."""

    act: Callable[..., Any]
    least: int                      # arguments
    most: int
    bits: int | None                # of the number it gives; 0: a float; None: it may be no number
    reads: bool = False             # its arguments as a whole
    keywords: tuple[str, ...] = ()


_FUNCTIONS = {
    "abs": _Function(abs, 1, 1, _MAX_BITS), "bool": _Function(bool, 1, 1, 1),
    "round": _Function(_rounded, 1, 2, _MAX_BITS), "len": _Function(len, 1, 1, 64),
    "int": _Function(_as_int, 1, 2, _MAX_BITS, True), "float": _Function(float, 1, 1, 0, True),
    "min": _Function(min, 1, 50, None, True, ("default",)),
    "max": _Function(max, 1, 50, None, True, ("default",)),
    "sum": _Function(sum, 1, 1, _MAX_BITS, True), "any": _Function(any, 1, 1, 1, True),
    "all": _Function(all, 1, 1, 1, True),
    "sorted": _Function(sorted, 1, 1, None, True, ("reverse",)),
    "str": _Function(str, 1, 1, None, True)}
_MATH = {name: _Function(getattr(math, name), int(arity[0]), int(arity[1]), bits)
         for bits, names in ((0, "sqrt:11 cbrt:11 exp:11 exp2:11 expm1:11 log:12 log2:11 log10:11 "
                              "log1p:11 sin:11 cos:11 tan:11 asin:11 acos:11 atan:11 atan2:22 "
                              "sinh:11 cosh:11 tanh:11 asinh:11 acosh:11 atanh:11 hypot:19 fabs:11 "
                              "degrees:11 radians:11 fmod:22 copysign:22"),
                             (1, "isclose:22 isfinite:11 isinf:11 isnan:11"),
                             (_MAX_BITS, "floor:11 ceil:11 trunc:11 gcd:29"))
         for name, arity in (each.split(":") for each in names.split())}
_TEXT_METHODS = {name: (_text_method(name), int(arity[0]), int(arity[1])) for name, arity in (
    each.split(":") for each in (
        "upper:00 lower:00 title:00 capitalize:00 swapcase:00 casefold:00 strip:01 lstrip:01 "
        "rstrip:01 split:02 rsplit:02 splitlines:00 partition:11 rpartition:11 startswith:11 "
        "endswith:11 removeprefix:11 removesuffix:11 replace:23 join:11 find:13 rfind:13 count:13 "
        "zfill:11 ljust:12 rjust:12 center:12 isdigit:00 isdecimal:00 isnumeric:00 isalpha:00 "
        "isalnum:00 isspace:00 isupper:00 islower:00").split())}
_CALLS = _TEXT_METHODS | {name: (_object_method(name), least, most) for name, least, most in (
    ("get", 1, 2), ("keys", 0, 0), ("values", 0, 0), ("items", 0, 0))}
_KNOWN_NAMES = {*_FUNCTIONS, *_MATH, "math", "pi"}
_EXPRESSION_NAMES: dict[str, Any] = {
    "missing": _MISSING, "use": _use, "take": _take, "plus": _plus, "times": _times,
    "modulo": _modulo, "power": _power, "shifted": _shifted, "whole": _of_bits, "text_of": _text_of,
    "joined": _joined, "text_key": _key,
    **{f"call_{name}": each.act for name, each in (_FUNCTIONS | _MATH).items()},
    **{f"method_{name}": each[0] for name, each in _CALLS.items()}}


# -- what comes in, and what expressions remember --

def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Stop("half a surrogate pair is no text", "bad_value") from None


def _admit(value: Any) -> Any:
    """Return a value from outside.

    Raises:
        _Stop: it is none of JSON's, or larger or deeper than allowed.
    """
    level, items = [[value]], 0
    for _ in range(_MAX_NESTING):
        inner: list[Any] = []
        for each in level:
            items += len(each)
            if items > _MAX_ITEMS:
                raise _Stop(f"a value of more than {_MAX_ITEMS} items", "too_big")
            if isinstance(each, dict):
                if not all(isinstance(key, str) for key in each):
                    raise _Stop("an object's keys are texts", "bad_value")
                _check_text("".join(each))
                each = [*each.values()]
            for one in each:
                kind = type(one)
                if kind is dict or kind is list:
                    inner.append(one)
                elif kind is int and one.bit_length() > _MAX_INT_BITS:
                    raise _Stop(f"a whole number of more than {_MAX_INT_BITS} bits", "too_big")
                elif kind is float and not math.isfinite(one):
                    raise _Stop(f"a value of {one}", "not_finite")
                elif kind is str:
                    _check_text(one)
                elif kind not in _FLAT:
                    raise _Stop(f"{_kind_of(one)} is no value of JSON", "bad_value")
        if not inner:
            return value
        level = inner
    raise _Stop(f"a value nested deeper than {_MAX_NESTING} levels", "too_deep")


def _copied(value: Any) -> Any:
    """Return a value that whoever gets it may change."""
    return json.loads(_dump_json(value)) if isinstance(value, dict | list) else value


def _as_number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"must be a number, not {_kind_of(value)}")
    return value


class _Window:
    """The samples of the last so many milliseconds of a variable, by their own timestamps."""

    __slots__ = ("times", "values", "late", "total")

    def __init__(self, total: list[int]) -> None:
        self.late = 0                   # samples in succession that came a whole span late
        self.times: list[int] = []
        self.values: list[float] = []
        self.total = total              # samples of all windows: one number

    def add(self, value: float, at_ms: int, span_ms: float) -> None:
        """Add a sample; late ones in their place, and too late ones not.

        When many are too late it is the newest that is wrong, and the window begins anew.
        """
        times, values, before = self.times, self.values, len(self.times)
        _admit(_as_number(value))
        self.late = self.late + 1 if times and at_ms <= times[-1] - span_ms else 0
        if 0 < self.late < _MAX_LATE:
            return
        if self.late:
            times.clear()
            values.clear()
        at = bisect.bisect_right(times, at_ms)
        times.insert(at, at_ms)
        values.insert(at, value)
        most = _MAX_WINDOW if self.total[0] < _MAX_SAMPLES else max(before, 1)
        old = max(bisect.bisect_right(times, times[-1] - span_ms), len(times) - most)
        if old > 0:
            del times[:old], values[:old]
        self.total[0] += len(times) - before


def _step_window(total: list[int], window: Any, value: Any, at_ms: int, span_s: float) -> _Window:
    window = _Window(total) if window is _MISSING else window
    window.add(value, at_ms, span_s * 1000)
    return window       # type: ignore[no-any-return]


def _step_prev(pair: Any, value: Any, _at_ms: int, _: float) -> Any:
    if type(value) is not float or value - value != 0.0:
        value = _copied(_admit(value))
    return (_MISSING, value) if pair is _MISSING else (pair[1], value)


def _step_ewma(average: Any, value: Any, _at_ms: int, alpha: float) -> Any:
    value = float(_as_number(value))
    if not math.isfinite(value):                # it would stay so for ever
        raise FloatingPointError(f"ewma() of {value}")
    if average is _MISSING or alpha == 1.0:
        return value
    change = alpha * (value - average)
    return average + change if math.isfinite(change) else (1 - alpha) * average + alpha * value


def _load_prev(saved: Any, _: list[int]) -> Any:
    before, now = (_MISSING, *map(_admit, saved))[-2:]
    return before, now


def _load_window(saved: Any, total: list[int]) -> _Window:
    window = _Window(total)
    for at_ms, value in saved[-_MAX_WINDOW:]:
        window.times.append(_of_bits(at_ms))
        window.values.append(_admit(_as_number(value)))
    if window.times != sorted(window.times):
        raise ValueError("samples out of order")
    return window


_LOOKS: dict[str, Callable[[_Window], Any]] = {
    "mean": lambda window: math.fsum(window.values) / len(window.values),
    "min": lambda window: min(window.values), "max": lambda window: max(window.values),
    "sum": lambda window: math.fsum(window.values), "last": lambda window: window.values[-1],
    "count": lambda window: len(window.values)}


class _CellKind(NamedTuple):
    """How a function that remembers does it: from a state, _MISSING at first, to the next."""

    step: Callable[..., Any]
    dump: Callable[[Any], Any]      # to JSON, and back
    load: Callable[[Any, list[int]], Any]
    bits: int | None


_CELLS = {
    "prev": _CellKind(_step_prev, lambda pair: [each for each in pair if each is not _MISSING],
                      _load_prev, None),
    "ewma": _CellKind(_step_ewma, lambda average: average,
                      lambda saved, _: float(_admit(_as_number(saved))), 0),
    "count": _CellKind(lambda count, _value, _at, _: 1 if count is _MISSING else count + 1,
                       lambda count: count, lambda saved, _: _of_bits(saved), 64),
    "window": _CellKind(_step_window, lambda window: [*zip(window.times, window.values)],
                        _load_window, _MAX_BITS)}
_EXPRESSION_NAMES |= {f"step_{name}": each.step for name, each in _CELLS.items()} | {
    f"look_{name}": each for name, each in _LOOKS.items()}


class _Cell(NamedTuple):
    """One place in an expression that remembers."""

    kind: str
    said: str                       # as Python writes it: the same again after a reload
    code: str                       # of what it is told
    needs: frozenset[str]           # variables: it is told when one of them has changed
    argument: float
    look: str                       # of a window
    after: frozenset[int]           # cells whose value it is told
    default: str                    # of prev(), as text

    def step(self, state: str) -> str:
        """Return the text that makes the next state of *state*."""
        samples = "samples, " if self.kind == "window" else ""
        return f"step_{self.kind}({samples}{state}, {self.code}, timestamp_ms, {self.argument!r})"

    def peek(self, state: str) -> str:
        """Return the text of its value."""
        if self.kind == "count":
            return state
        look = {"prev": f"{state}[0]", "window": f"look_{self.look}({state})"}.get(self.kind, state)
        text = look if look == state else f"missing if {state} is missing else {look}"
        if not self.default:
            return text
        return f"{self.default} if ({text}) is missing else {look}"


# -- expressions --

class _Code(NamedTuple):
    """The text of a part of an expression, and what is known of its value."""

    text: str
    number: bool = False            # it is one, or it can't be computed
    bits: int = _MAX_BITS           # of a whole number, at most; 0: it is a float
    atom: bool = False              # it may be written twice


_OPERATORS: dict[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.Pow: "**", ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|",
    ast.BitXor: "^", ast.USub: "-", ast.UAdd: "+", ast.Not: "not ",
    ast.And: " and ", ast.Or: " or ", ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=",
    ast.Gt: ">", ast.GtE: ">=", ast.In: "in", ast.NotIn: "not in", ast.Is: "is",
    ast.IsNot: "is not"}
_NOT_HERE = {
    ast.Lambda: "functions", ast.NamedExpr: ":=", ast.Starred: "*",
    ast.Set: "sets (a list is [a, b], a variable stands without braces)", ast.SetComp: "sets",
    ast.Await: "await", ast.Yield: "yield"}
# what people write who come from JavaScript, and what they mean; tried in this order
_HABITS: tuple[tuple[str, str], ...] = (
    (r";\s*$", ""), (r"===", "=="), (r"!==", "!="), (r"&&", " and "), (r"\|\|", " or "),
    (r"^\s*(\w+)\s*\?\?\s*(\w+)\s*$", r"\2 if \1 is None else \1"), (r"!\s*(\w+)", r"(not \1)"),
    (r"^([^?:]+)\?([^?:]+):([^?:]+)$", r"\2 if \1 else \3"), (r"\bMath\.PI\b", "pi"),
    (r"\bMath\.pow\(([^(),]+),([^(),]+)\)", r"((\1) ** (\2))"),
    (r"\bMath\.(?=[a-z]\w*\()", ""), (r"\bDate\.now\(\)", "(now() * 1000)"), (r"\btrue\b", "True"),
    (r"\bfalse\b", "False"), (r"\b(null|undefined)\b", "None"), (r"\bparseInt\(", "int("),
    (r"\b(parseFloat|Number)\(", "float("), (r"\bString\(", "str("), (r"\bisNaN\(", "isnan("),
    (r"\b(\w+)\.toFixed\((\d)\)", r'f"{\1:.\2f}"'), (r"\.toUpperCase\(", ".upper("),
    (r"\.toLowerCase\(", ".lower("), (r"\.trim\(", ".strip("), (r"\.startsWith\(", ".startswith("),
    (r"\.endsWith\(", ".endswith("), (r"\b(\w+)\.toString\(\)", r"str(\1)"),
    (r"([\w\[\]]+)\.length\b", r"len(\1)"), (r"\b(\w+)\.includes\((\w+)\)", r"(\2 in \1)"),
    (r"(?<=[\w\]])\??\.([A-Za-z]\w*)\b(?!\()", r"['\1']"))
_LITERAL = re.compile(r"""f?(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
                      r"""|`[^`"{}]*(?:\$\{[^`"{}]*\}[^`"{}]*)*`""")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_OTHER_WORDS = {"true": "True", "false": "False", "null": "None", "undefined": "None"}


def _pythonic(text: str) -> str:
    """Return the hint for an expression that can't be read: itself, in Python, if it is JavaScript.

    >>> _pythonic("a && b === 3 ? 'x' : Math.max(a, b.c)")
    "; in Python: 'x' if a and b == 3 else max(a, b['c'])"
    """
    if len(text) > _MAX_HINTED:
        return ""
    literals: list[str] = []

    def put_aside(literal: re.Match[str]) -> str:
        said = literal[0]
        if said[0] == "`" or "${" in said:
            said = f'f"{said[1:-1]}"'.replace("${", "{")
        literals.append(said)
        return f"s__{len(literals) - 1}__"

    meant = _LITERAL.sub(put_aside, text)
    if re.search(r"//|--|\+\+|(?<!&)&(?!&)|(?<!\|)\|(?!\|)", meant):      # these mean else there
        return ""
    for habit, python in _HABITS:
        meant = re.sub(habit, python, meant, flags=re.DOTALL)
    meant = re.sub(r"\s+", " ", meant).strip()
    for n, each in enumerate(literals):
        meant = meant.replace(f"s__{n}__", each)
    if "Math" in meant:
        return ""
    try:
        _Writer(None).write_whole(meant, hint=False)
    except ExpressionError:
        return ""
    return f"; in Python: {meant}" if meant != text.strip() else ""


def _is_variable(name: object) -> bool:
    """Whether *name* can be a variable of expressions; Python must take it for what it is."""
    return (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
            and not name.startswith("_") and len(name) <= 64
            and ast.unparse(ast.parse(name)) == name)


class _Writer(ast.NodeVisitor):
    """Writes the Python text of one expression, and notes what it needs."""

    __slots__ = ("variables", "given", "used", "names", "cells", "moving", "looped", "scopes",
                 "temps", "after")

    def __init__(self, variables: Collection[str] | None,
                 given: Mapping[str, _Code] | None = None) -> None:
        self.variables = variables              # None: any
        self.given = given or {}                # what else has a name
        self.used: set[str] = set()             # of these
        self.names: dict[str, None] = {}        # of variables it depends on
        self.cells: list[_Cell] = []
        self.moving = False                     # it has another value every time
        self.looped = 0                         # inside of so many loops
        self.scopes: list[set[str]] = []        # names that loops bind
        self.temps = 0
        self.after: set[int] = set()            # cells whose values it has

    def write_whole(self, text: str, hint: bool = True) -> str:
        """Return the Python text of the expression *text*.

        Raises:
            ExpressionError: it is none, or not allowed.
        """
        if not isinstance(text, str) or not text.strip():
            raise ExpressionError("an expression is missing" if isinstance(text, str) else
                                  f"an expression is a text, not {_kind_of(text)}")
        if len(text) > _MAX_EXPRESSION:
            raise ExpressionError(f"the expression has {len(text)} characters; "
                                  f"{_MAX_EXPRESSION} are allowed")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text.strip().replace("\n", " "), "<expression>", "eval").body
            _check_tree(tree)
            return self.write(_Folder({*(self.variables or ()), *self.given}).visit(tree)).text
        except _Stop as error:
            raise _Stop(f"{_shown(text)}: {error}", error.reason) from None
        except ExpressionError as error:
            why = str(error)
        except SyntaxError as error:
            at = error.offset or 0
            where = f"at character {at}" if 0 < at <= len(text.strip()) else "at its end"
            why = f"{error.msg} ({where})"
        except (ValueError, MemoryError, RecursionError) as error:      # NUL, too deep
            why = f"can't be read: {error}"
        if hint:
            why += _pythonic(text)
        raise ExpressionError(f"{_shown(text)}: {why}") from None

    def write(self, node: ast.AST) -> _Code:
        """Return a node's text; what has a method below is allowed, and nothing else."""
        part: _Code = self.visit(node)
        return part

    def generic_visit(self, node: ast.AST) -> Any:
        """Refuse a node without a method."""
        raise ExpressionError(f"{_NOT_HERE.get(type(node), type(node).__name__)} can't be used in "
                              "an expression")

    def _used(self, part: _Code) -> str:
        """Return the text of a part that is read as a whole."""
        return part.text if part.number else f"use({part.text}, left)"

    def settled_cells(self) -> list[_Cell]:
        """Return the cells; count() counts the changes of all that is needed."""
        return [each._replace(needs=frozenset(self.names)) if each.kind == "count" else each
                for each in self.cells]

    def visit_Constant(self, node: ast.Constant) -> _Code:
        value = node.value
        if type(value) is float and not math.isfinite(value):
            raise ExpressionError("a number is too large")
        if type(value) is int:
            _check_bits(value.bit_length())
        elif type(value) not in (bool, float, str, type(None)):
            raise ExpressionError(f"{_shown(repr(value))} is no value of JSON")
        if not isinstance(value, int | float):
            return _Code(repr(value), atom=True)
        bits = max(value.bit_length(), 1) if isinstance(value, int) else 0
        return _Code(repr(value) if value >= 0 else f"({value!r})", True, bits, True)

    def visit_Name(self, node: ast.Name) -> _Code:
        name = node.id
        if any(name in scope for scope in self.scopes):
            return _Code(f"c_{name}", atom=True)
        any_name = self.variables is None and name != "pi" and name not in _OTHER_WORDS
        if any_name or name in (self.variables or ()):
            if not _is_variable(name):
                raise ExpressionError(f"{name!r} can't be used in an expression")
            self.names[name] = None
            return _Code(f"v_{name}", bits=_MAX_INT_BITS, atom=True)
        if name in self.given:
            self.used.add(name)
            return self.given[name]
        if name == "pi":
            return _Code(repr(math.pi), True, 0, True)
        if name in _OTHER_WORDS:
            raise ExpressionError(f"{name} is written {_OTHER_WORDS[name]}")
        if name in _FUNCTIONS | _MATH:
            raise ExpressionError(f"{name} is a function; write {name}(...)")
        known = [*(self.variables or ()), *self.given]
        hint = _did_you_mean(name, [*known, *_FUNCTIONS, *_MATH])
        raise ExpressionError(f"there is no variable {name!r}"
                              + (hint or f"; there are {', '.join(known)}"))

    def visit_BinOp(self, node: ast.BinOp) -> _Code:
        a, b, sign = self.write(node.left), self.write(node.right), _OPERATORS.get(type(node.op))
        exact, bits = a.number and b.number, max(a.bits, b.bits)
        is_float = 0 in (a.bits, b.bits)
        plain = f"({a.text} {sign} {b.text})"
        match sign:
            case "/":
                return _Code(plain, True, 0)
            case "-" | "//":
                return _Code(plain, True, 0 if is_float else bits + 1)
            case "+":
                if a.number or b.number:
                    return _Code(plain, True, 0 if is_float else bits + 1)
                return self._guarded("plus", a, sign, b)
            case "*":
                if is_float or exact and a.bits + b.bits <= _MAX_BITS:
                    return _Code(plain, True, 0 if is_float else a.bits + b.bits)
                return self._guarded("times", a, sign, b, exact)
            case "%":
                return _Code(plain, True, 0 if is_float else bits) if a.number else (
                    self._guarded("modulo", a, sign, b, True))
            case "**":
                small = isinstance(node.right, ast.Constant) and type(node.right.value) is int
                if a.bits == 0 and small:
                    return _Code(plain, True, 0)
                return _Code(f"power({a.text}, {b.text})", True)
            case "<<":
                return _Code(f"shifted({a.text}, {b.text})", True)
            case ">>" | "&" | "^" | "|":
                return _Code(f"(whole({a.text}) {sign} whole({b.text}))", True, bits)
        raise ExpressionError("@ is for matrices")

    def _guarded(self, helper: str, a: _Code, sign: str, b: _Code, number: bool = False) -> _Code:
        """Return an operation that a helper does, unless the one that may be a text is a float."""
        one, other = (a, b) if not a.number else (b, a)
        if self.looped or not other.atom:
            return _Code(f"{helper}({a.text}, {b.text}, left)", number)
        test = name = one.text
        if not one.atom:
            self.temps += 1
            name = f"t_{self.temps}"
            test = f"{name} := {one.text}"
        first, second = (name, b.text) if one is a else (a.text, name)
        return _Code(f"({first} {sign} {second} if type({test}) is float else "
                     f"{helper}({first}, {second}, left))", number)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> _Code:
        part = self.write(node.operand)
        if isinstance(node.op, ast.Invert):     # of a bool, too
            return _Code(f"(-1 - whole({part.text}))", True, part.bits + 1)
        bits = 1 if isinstance(node.op, ast.Not) else part.bits
        return _Code(f"({_OPERATORS[type(node.op)]}{part.text})", True, bits)

    def visit_BoolOp(self, node: ast.BoolOp) -> _Code:
        return self._one_of(_OPERATORS[type(node.op)], node.values)

    def visit_IfExp(self, node: ast.IfExp) -> _Code:
        test = self.write(node.test).text
        return self._one_of(f" if {test} else ", [node.body, node.orelse])

    def _one_of(self, between: str, nodes: Sequence[ast.AST]) -> _Code:
        parts = [self.write(each) for each in nodes]
        return _Code(f"({between.join(each.text for each in parts)})",
                     all(each.number for each in parts), max(each.bits for each in parts))

    def visit_Compare(self, node: ast.Compare) -> _Code:
        parts = [self.write(each) for each in (node.left, *node.comparators)]
        signs = [_OPERATORS[type(each)] for each in node.ops]
        dear = not {*signs} <= {"==", "!=", "is", "is not"}
        text = self._operand(parts[0], dear)
        for sign, right, part in zip(signs, node.comparators, parts[1:]):
            if sign in ("is", "is not") and (
                    isinstance(node.left, ast.Constant) or not isinstance(right, ast.Constant)
                    or not isinstance(right.value, bool | None)):
                raise ExpressionError(f"{sign} is for None; write {'==' if sign == 'is' else '!='}")
            listed = isinstance(right, ast.List | ast.Tuple) and all(
                isinstance(each, ast.Constant) for each in right.elts)
            text += f" {sign} {part.text if listed else self._operand(part, dear)}"
        return _Code(f"({text})", True, 1)

    def _operand(self, part: _Code, dear: bool = False) -> str:
        # what came in is small enough, what is computed may share its parts a thousand times
        if part.atom and not (self.looped or dear):
            return part.text
        return f"({part.text} if type({part.text}) is float else {self._used(part)})" if (
            part.atom and not part.number and part.text.isidentifier()) else self._used(part)

    def visit_Subscript(self, node: ast.Subscript) -> _Code:
        value = self.write(node.value)
        if value.number or isinstance(node.value, ast.Constant) and node.value.value is None:
            raise ExpressionError(f"{_shown(ast.unparse(node.value))} has no [...]")
        if isinstance(node.slice, ast.Slice):
            ends = (node.slice.lower, node.slice.upper, node.slice.step)
            at = ":".join("" if each is None else self.write(each).text for each in ends)
            return _Code(f"use({value.text}[{at}], left)")
        return _Code(f"{value.text}[{self._operand(self.write(node.slice))}]")

    def visit_List(self, node: ast.List) -> _Code:
        return _Code(f"[{', '.join(self.write(each).text for each in node.elts)}]")

    def visit_Tuple(self, node: ast.Tuple) -> _Code:
        return _Code(f"({''.join(self.write(each).text + ', ' for each in node.elts)})")

    def visit_Dict(self, node: ast.Dict) -> _Code:
        if None in node.keys:
            raise ExpressionError("** can't be used in an expression")
        pairs = (f"text_key({self.write(key).text}): {self.write(value).text}"
                 for key, value in zip(node.keys, node.values) if key is not None)
        return _Code(f"{{{', '.join(pairs)}}}")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> _Code:
        texts = []
        for each in node.values:
            if isinstance(each, ast.Constant):
                texts.append(repr(each.value))
                continue
            assert isinstance(each, ast.FormattedValue)
            spec = ""
            if isinstance(each.format_spec, ast.JoinedStr):
                known = [part.value for part in each.format_spec.values
                         if isinstance(part, ast.Constant)]
                spec = "".join(map(str, known))
                if len(known) < len(each.format_spec.values) or not _FORMAT_SPEC.fullmatch(spec):
                    raise ExpressionError(f"format {_shown(ast.unparse(each))}: write a width "
                                          "below 1000, and .digits below 100, like {x:8.1f}")
            if each.conversion not in (-1, 115):
                raise ExpressionError("!r, !a and = can't be used in an f-string here")
            value = self.write(each.value).text
            value = f"text_of({value}, '', left)" if each.conversion == 115 else value
            texts.append(f"text_of({value}, {spec!r}, left)")
        return _Code(f"joined(({''.join(each + ', ' for each in texts)}), left)")

    # -- loops --

    def visit_ListComp(self, node: ast.ListComp) -> _Code:
        return self._loop(node.generators, "[", node.elt)

    def visit_DictComp(self, node: ast.DictComp) -> _Code:
        return self._loop(node.generators, "{", node.key, node.value)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> _Code:
        raise ExpressionError("a loop stands in [...], or alone in a function like sum(...)")

    def _loop(self, generators: list[ast.comprehension], bracket: str, *results: ast.expr) -> _Code:
        self.looped += 1
        if self.looped > _MAX_LOOPS:        # CPython 3.12's compiler crashes at twenty
            raise ExpressionError(f"loops are nested deeper than {_MAX_LOOPS} levels")
        depth, text = len(self.scopes), ""
        steps = 1 + sum(1 for each in (*results, *generators) for _ in ast.walk(each)) // 8
        for each in generators:
            over = self.write(each.iter).text
            targets = each.target.elts if isinstance(each.target, ast.Tuple) else [each.target]
            names = [name.id for name in targets if isinstance(name, ast.Name)]
            if each.is_async or not names or len(names) < len(targets):
                raise ExpressionError("a loop is: for name in ..., or: for name, other in ...")
            self.scopes.append(set(names))
            target = "".join(f"c_{name}, " for name in names) if isinstance(
                each.target, ast.Tuple) else f"c_{names[0]}"
            text += f" for {target} in take({over}, left, {steps})"
            text += "".join(f" if {self.write(test).text}" for test in each.ifs)
        result = [self.write(each).text for each in results]
        del self.scopes[depth:]
        self.looped -= 1
        said = f"text_key({result[0]}): {result[1]}" if bracket == "{" else result[0]
        return _Code(f"{bracket}{said}{text}{_CLOSING[bracket]}")

    # -- calls --

    def visit_Call(self, node: ast.Call) -> _Code:
        func = node.func
        if isinstance(func, ast.Name):
            if func.id in _CELLS or func.id == "now":
                return self._remember(node, func.id, "")
            if func.id in (each := _FUNCTIONS | _MATH):
                return self._function(node, func.id, each[func.id])
            raise ExpressionError(f"there is no function {func.id!r}"
                                  + _did_you_mean(func.id, [*_FUNCTIONS, *_MATH, *_CELLS, "now"]))
        if not isinstance(func, ast.Attribute):
            raise ExpressionError("only functions that have a name can be called")
        if _is_math(func):
            if func.attr in _MATH:
                return self._function(node, func.attr, _MATH[func.attr])
            raise ExpressionError(f"there is no function math.{func.attr}"
                                  + _did_you_mean(func.attr, _MATH))
        if func.attr not in _CALLS:
            window = isinstance(func.value, ast.Call) and func.attr in _LOOKS
            raise ExpressionError(f"there is no method .{func.attr}()"
                                  + (f"; write .{func.attr} without ()" if window else
                                     _did_you_mean(func.attr, _CALLS)))
        _, least, most = _CALLS[func.attr]
        args = self._arguments(node, func.attr, least, most, False)
        return _Code(f"method_{func.attr}(left, {', '.join([self.write(func.value).text, *args])})")

    def _function(self, node: ast.Call, name: str, function: _Function) -> _Code:
        args = self._arguments(node, name, function.least, function.most, function.reads,
                               function.keywords)
        bits = function.bits
        return _Code(f"call_{name}({', '.join(args)})", bits is not None,
                     _MAX_BITS if bits is None else bits)

    def _arguments(self, node: ast.Call, name: str, least: int, most: int, reads: bool,
                   keywords: tuple[str, ...] = ()) -> list[str]:
        if not least <= len(node.args) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ExpressionError(f"{name}() takes {wanted} argument{'s' * (most != 1)}, not "
                                  f"{len(node.args)}")
        args = []
        for each in node.args:
            if isinstance(each, ast.GeneratorExp):      # of any() and all() the rest is not run
                bracket = "(" if name in ("any", "all") else "["
                part = self._loop(each.generators, bracket, each.elt)
            else:
                part = self.write(each)
            args.append(self._used(part) if reads else part.text)
        for n, word in enumerate(node.keywords):
            if word.arg not in keywords[n:]:
                raise ExpressionError(f"{name}() has no argument {word.arg or '**'}, or not twice")
            args.append(f"{word.arg}={self.write(word.value).text}")
        return args

    def visit_Attribute(self, node: ast.Attribute) -> _Code:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and (
                call.func.id == "window"):
            if node.attr not in _LOOKS:
                raise ExpressionError(f"a window has {', '.join(_LOOKS)}, not {node.attr!r}")
            return self._remember(call, "window", node.attr)
        if _is_math(node) and node.attr in ("pi", "tau", "e"):
            return _Code(repr(getattr(math, node.attr)), True, 0, True)
        if node.attr.startswith("_"):
            raise ExpressionError(f"{node.attr!r} can't be used in an expression")
        said = _shown(_members_text(node.value))
        raise ExpressionError(f".{node.attr} can't be read; a member of an object is "
                              f"{said}[{node.attr!r}], or {said}.get({node.attr!r})")

    def _remember(self, node: ast.Call, name: str, look: str) -> _Code:
        """Return a function whose value depends on what was before, or on the time."""
        wanted = {"now": 0, "count": 0, "prev": 1, "ewma": 2, "window": 2}[name]
        if len(node.args) not in (wanted, wanted + (name == "prev")) or node.keywords:
            form = {"prev": "prev(x), or prev(x, 0) with what it is at first",
                    "ewma": "ewma(x, 0.1)", "window": "window(x, 60).mean"}
            raise ExpressionError(f"write {form.get(name, name + '()')}")
        if name == "window" and not look:
            raise ExpressionError(f"a window is asked for {', '.join(_LOOKS)}: "
                                  f"{ast.unparse(node)}.mean")
        if name == "now":
            self.moving = True
            return _Code("now()", True, 0)
        if self.looped:
            raise ExpressionError(f"{name}() can't stand in a loop")
        argument, inner = self._cell_argument(name, node), _Writer(self.variables, self.given)
        inner.cells, inner.temps, inner.used = self.cells, self.temps, self.used
        code = inner.write(node.args[0]).text if wanted else "None"
        self.temps = inner.temps
        self.names |= inner.names
        if wanted and not inner.names:
            raise ExpressionError(f"{name}() follows a variable, and there is none in "
                                  f"{_shown(ast.unparse(node.args[0]))}")
        self.moving = self.moving or inner.moving or not wanted
        said = ast.unparse(node) + (f".{look}" if look else "")
        bits = _CELLS[name].bits
        at = next((n for n, each in enumerate(self.cells) if each.said == said), len(self.cells))
        if at == len(self.cells):
            default = self.write(node.args[1]).text if name == "prev" and node.args[1:] else ""
            self.cells.append(_Cell(name, said, code, frozenset(inner.names), argument, look,
                                    frozenset(inner.after), default))
        self.after.add(at)
        return _Code(f"k_{at}", bits is not None, _MAX_BITS if bits is None else bits, True)

    def _cell_argument(self, name: str, node: ast.Call) -> float:
        if len(node.args) < 2:
            return 0.0
        said = node.args[1]
        if name == "prev" and isinstance(said, ast.Constant):
            return 0.0
        if name == "prev":
            raise ExpressionError("what prev(x, ...) is at first must be a constant")
        value = said.value if isinstance(said, ast.Constant) else None
        most = 1.0 if name == "ewma" else 366 * 86_400.0
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            what = ("a weight above 0, up to 1" if name == "ewma"
                    else "a number of seconds above 0, up to a year")
            raise ExpressionError(f"{name}(x, ...) takes {what}, not {_shown(ast.unparse(said))}")
        return float(value)


class _Folder(ast.NodeTransformer):
    """Puts values in the place of what depends on nothing."""

    def __init__(self, variables: Collection[str]) -> None:
        self.variables = variables
        self._left = [_MAX_STEPS]       # of all that is folded

    def visit(self, node: ast.AST) -> ast.AST:
        """Return the node, or its value. What is too large always will be: that is raised."""
        if isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp):
            return node
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call | ast.Compare | ast.BoolOp
                      | ast.IfExp | ast.Subscript) and all(map(self._is_fixed, ast.walk(node))):
            try:
                value = _function_of(_Writer(()).write(node).text, left=self._left)(0, [])
            except _Stop:
                raise
            except (ExpressionError, ArithmeticError, LookupError, TypeError, ValueError):
                value = []
            if type(value) in _FLAT or isinstance(value, str) and len(value) <= _MAX_FOLDED:
                return ast.Constant(value)
        visited: ast.AST = self.generic_visit(node)
        return visited

    def _is_fixed(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in _KNOWN_NAMES and node.id not in self.variables
        return not isinstance(node, ast.comprehension)


def _function_of(code: str, names: Iterable[str] = (), cells: Sequence[_Cell] = (),
                 left: list[int] | None = None) -> Any:
    """Return the function of an expression: of its variables, the time, and what it remembers.

    With *left*, its steps are taken from there.
    """
    arguments = ", ".join([*(f"v_{name}" for name in names), "timestamp_ms", "memory"])
    lines = f"left = [{_MAX_STEPS}]\n" if left is None else ""
    lines += _cell_lines(cells, 0, set(names))
    if cells:
        lines += f"if {_any_missing(map('k_{}'.format, range(len(cells))))}: raise waiting()\n"
    source = f"def expression({arguments}):\n" + _indent(f"{lines}return {code}\n", 1)
    try:
        function = _compile(
            source, "", _EXPRESSION_NAMES | {"samples": [0], "left": left})["expression"]
    except (SyntaxError, RecursionError, MemoryError, UnicodeError) as error:
        raise ExpressionError(f"it can't be compiled: {error}") from None
    function.source = source
    return function


def _any_missing(names: Iterable[str]) -> str:
    return " or ".join(f"{name} is missing" for name in names)


def _cell_lines(cells: Sequence[_Cell], first: int, changed: Container[str],
                memory: str = "memory") -> str:
    """Return the text that tells cells what has changed, and reads them: k_0, k_1, ..."""
    several = len(cells) > 1                # what fails for one is told to the others
    text = "failed = None\n" if several else ""
    for n, cell in enumerate(cells):
        state = f"{memory}[{first + n}]"
        if any(name in changed for name in cell.needs) or not cell.needs:
            unsure = [f"v_{name}" for name in sorted(cell.needs) if name not in changed]
            unsure += [f"k_{at}" for at in sorted(cell.after)]
            step = f"{state} = {cell.step(state)}\n"
            if several:
                step = f"try: {step}except Exception as error: failed = error\n"
            tests = [f"not ({_any_missing(unsure)})"] * bool(unsure) + (
                ["failed is None"] if several and cell.after else [])
            text += f"if {' and '.join(tests)}:\n{_indent(step, 1)}" if tests else step
        text += f"k_{n} = {cell.peek(state)}\n"
    return text + ("if failed is not None:\n    try: raise failed\n    finally: failed = None\n"
                   if several else "")


def _members_text(node: ast.expr) -> str:
    """Return ``a.b`` as it should be written."""
    if isinstance(node, ast.Attribute):
        return f"{_members_text(node.value)}[{node.attr!r}]"
    return ast.unparse(node)


def _is_math(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "math"


def _shown(text: object, most: int = 80) -> str:
    """Return a text as an error shows it."""
    said = str(text)
    said = said if len(said) <= most else said[:most - 3] + "..."
    return said if said.isprintable() else said.encode("unicode_escape").decode()


def _check_tree(tree: ast.AST) -> None:
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > _MAX_NESTING:
            raise ExpressionError(f"it is nested deeper than {_MAX_NESTING} levels")
        for each in level:
            if isinstance(each, ast.Constant) and isinstance(each.value, str) and re.search(
                    r"\$\{\s*\w", each.value):
                raise ExpressionError("${} is JavaScript's; Python fills in {} where an f is "
                                      "before the quotes, and for that text write '$' '{'")
        level = [child for each in level for child in ast.iter_child_nodes(each)]


def _waiting() -> _Stop:
    return _Stop("it has no value yet", "waiting")


_EXPRESSION_NAMES["waiting"] = _waiting


def _value_text(value: Any) -> str:
    """Return a result as JSON.

    Raises:
        Exception: it can't be.
    """
    kind = type(value)
    if kind is float and value - value == 0.0 or kind is int:
        return repr(value)
    if kind is float:
        raise FloatingPointError(f"the result is {value}")
    if kind not in _FLAT:
        _use(value, [_MAX_STEPS])
    text = _dump_json(value)
    _check_text(text)
    return text


class Expression:
    """A small, safe piece of Python that maps values to a value, compiled once.

    Arithmetic, comparisons, ``and or not``, ``a if c else b``, indexing, ``.get``, f-strings,
    lists, objects and loops over them; the functions abs, all, any, bool, float, int, len, max,
    min, round, sorted, str, sum, those of ``math`` by name, and the methods of texts. ``now()`` is
    the time in seconds, ``pi`` itself. What came before is in ``prev(x)``, or ``prev(x, 0)`` with
    what it is at first, ``ewma(x, 0.1)``, ``count()`` and ``window(x, 60).mean``, also .min .max
    .sum .last .count, of so many seconds by ``timestamp_ms``, if that is given. All of these are
    told of every call, wherever they stand. Seed 003.

    Raises:
        ExpressionError: it can't be read, or uses what is not in this list; JavaScript is
            answered with the Python of it.

    >>> Expression("temp * 9/5 + 32")(temp=100)
    212.0
    >>> sorted(Expression("a + len(b)").names)
    ['a', 'b']
    """

    __slots__ = ("text", "names", "is_static", "__source__", "_order", "_run", "_memory", "_wall")

    def __init__(self, text: str, *, wall: Callable[[], float] = time.time) -> None:
        writer = _Writer(None)
        code = writer.write_whole(text)
        self.text = text
        self.names = frozenset(writer.names)    # the variables it depends on
        self.is_static = not (writer.names or writer.moving)
        self._order = tuple(writer.names)
        self._run = _function_of(code, writer.names, writer.settled_cells())
        self.__source__: str = self._run.source
        self._run.__globals__["now"] = wall
        self._memory: list[Any] = [_MISSING] * len(writer.cells)
        self._wall = wall

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __call__(self, /, **values: Any) -> Any:
        """Return the value; of *values*, those that it does not name don't matter.

        Raises:
            ExpressionError: a variable is missing, or no value of JSON; the value can't be
                computed, is not finite, or takes too many steps.
        """
        at_ms: Any = 0
        if self._memory and (type(at_ms := values.get("timestamp_ms")) is not int
                             or abs(at_ms) >= _MAX_AT_MS):
            at_ms = int(self._wall() * 1000)
        try:
            said = [values[name] for name in self._order]
            for value in said:
                if type(value) is not float or value - value != 0.0:
                    _admit(value)
            result = self._run(*said, at_ms, self._memory)
            if type(result) is not float:
                _value_text(result)             # it can't be anything but JSON
                return result
            if result - result != 0.0:
                raise FloatingPointError(f"the result is {result}")
            return result
        except Exception as error:
            name = next((each for each in self._order if each not in values), "")
            why = f"{name} is missing" if name else _why(error)
            raise _Stop(f"{_shown(self.text)}: {why}", _reason_of(error)) from error


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ZeroDivisionError, "zero_division"), (ArithmeticError, "not_finite"), (LookupError, "lookup"),
    (TypeError, "type"), (RecursionError, "limit"), (MemoryError, "limit"), (ValueError, "value"),
    (UsageError, "value"))


def _reason_of(error: Exception) -> str:
    """Return what an error is counted as."""
    if isinstance(error, _Stop):
        return error.reason
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "other")


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no {_shown(error)}"
    return _shown(str(error) or type(error).__name__, 200)


# -- topics --

class _Template:
    """A topic with places for fields: `alerts.{site}`."""

    __slots__ = ("text", "names", "fill", "_parts", "_field")

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise UsageError(f"a topic is a text, not {_kind_of(text)}")
        self._parts = re.split(r"\{(\w+)\}", text)
        self.text = text
        self.names = self._parts[1::2]
        _check_topic("x".join(self._parts[::2]), wildcards=False)
        if re.search(r"[{}]", "".join(self._parts[::2])):
            raise UsageError(f"topic {text!r}: a place is a name in braces, like {{site}}")
        # what fills a place must not be more than one token, however these are divided
        self._field = re.compile(r"[^\s.*>\x00-\x20\x7f\ud800-\udfff%s]{1,64}"
                                 % ("/" if "/" in text else ""))
        self.fill = functools.lru_cache(_MAX_CACHED)(self._filled)

    def _filled(self, *values: Any) -> str:
        parts = self._parts[:]
        for n, value in enumerate(values):
            text = str(value)
            if not self._field.fullmatch(text):
                raise _Stop(f"{{{self.names[n]}}} of {self.text} can't be {_shown(repr(value))}",
                            "bad_field")
            parts[2 * n + 1] = text
        topic = "".join(parts)
        try:
            _check_topic(topic, wildcards=False)
        except UsageError as error:
            raise _Stop(str(error), "bad_field") from None
        return topic

    def places(self, wildcards: Sequence[str]) -> list[tuple[str, int]]:
        """Return the names, or "" for wildcards of that name, and where in a match they are.

        For what no field has, it is the next one of the wildcards without a name, or -1.
        """
        plain = iter([n for n, each in enumerate(wildcards) if each.isdigit()])
        return [("", wildcards.index(name)) if name in wildcards else (name, next(plain, -1))
                for name in self.names]

    def topic(self, places: Sequence[tuple[str, int]], key: Sequence[str], *fields: Any) -> str:
        """Return the topic, filled from the match, and the first of *fields* that has a name."""
        values = []
        for name, at in places:
            for each in fields if name else ():
                if type(each) is dict and name in each:
                    if type(each[name]) not in (int, str):
                        raise _Stop(f"{{{name}}} of {self.text} can't be {_kind_of(each[name])}",
                                    "bad_field")
                    values.append(each[name])
                    break
            else:
                if not 0 <= at < len(key):
                    raise _Stop(f"there is no {name or 'match'} for {self.text}", "no_field")
                values.append(key[at])
        return self.fill(*values)


class _Pattern:
    """Topics that a source covers: `plant.*.temp`; `plant.{site}.temp` names the wildcard."""

    __slots__ = ("text", "tokens", "names")

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise UsageError(f"a topic is a text, not {_kind_of(text)}")
        named = [re.fullmatch(r"\{([A-Za-z]\w*)\}", token) for token in text.split(".")]
        self.text = text
        self.tokens = _check_topic(".".join(
            "*" if name else token for name, token in zip(named, text.split("."))), wildcards=True)
        number = itertools.count(1)
        self.names = [name[1] if name else str(next(number)) for name, token in zip(
            named, self.tokens) if token in ("*", ">")]
        if len({*self.names}) < len(self.names):
            raise UsageError(f"topic {text!r} has two wildcards of one name")

    @property
    def topics(self) -> str:
        """The pattern as Topics knows it."""
        return ".".join(self.tokens)

    def match(self, topic: str) -> list[str] | None:
        """Return what the wildcards stand for in *topic*; None if it is not covered."""
        tokens = topic.split(".")
        if not _contains(self.tokens, tokens):
            return None
        return [".".join(tokens[n:]) if step == ">" else tokens[n]
                for n, step in enumerate(self.tokens) if step in ("*", ">")]


# -- mappings --

_MAX_CACHED = 4_096                 # topics, of each kind
_STREAM_KEYS = ("mode", "model", "output_topic", "sources", "mapping", "state_file",
                "state_every_s", "test")
_MAX_PAYLOAD = 1 << 20
_SAMPLED = 64                       # of so many messages, one is timed
_SAFE_INT = 1 << 53                 # below it, arithmetic needs no look
_DROPS = {"no_topic", "unknown_topic", "too_many_matches", "no_field", "bad_field"}
_STATE_FORMAT = "horizon_lite stream state 1"
_plain_json = json.JSONDecoder(parse_constant=_finite)
_scan_json = _plain_json.raw_decode


class Output(NamedTuple):
    """What a Stream gives for a message: JSON bytes for a topic."""

    topic: str
    payload: bytes                  # {"value": ..., "timestamp_ms": ...}
    metadata: dict[str, Any]        # the message's, with this topic as umh_topic


def _load_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    import tomllib
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from None


def _read_stream(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping in a TOML file, or in the [stream] of one."""
    said = _load_toml(path)
    inner = said.get("stream")
    if isinstance(inner, dict) and "sources" not in said:
        return {key: said[key] for key in ("test",) if key in said} | inner
    return said


# what a [[test]] may say, and each of its messages
_TEST_KEYS = {"name": "name", "input": "input", "inputs": "input", "messages": "input",
              "output": "output", "outputs": "output", "expect": "output", "expected": "output"}
_MESSAGE_KEYS = ("topic", "payload", "value", "timestamp_ms", "metadata")


def _tests_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tests of a mapping: name, input and output, lists of messages."""
    tests, found = config.get("test", []), []
    if not isinstance(tests, list) or not all(isinstance(each, dict) for each in tests):
        raise ConfigError("write a test as [[test]]")
    for n, test in enumerate(tests, 1):
        said: dict[str, Any] = {"name": f"test {n}", "input": [], "output": []}
        for key, value in test.items():
            where = _TEST_KEYS.get(key, "")
            if key in _STREAM_KEYS or not where:
                raise ConfigError(f"test {n} has no {key!r}" + (
                    "; what is the stream's stands above the first [table]" if key in _STREAM_KEYS
                    else _did_you_mean(key, _TEST_KEYS)))
            if sum(_TEST_KEYS.get(each) == where for each in test) > 1:
                raise ConfigError(f"test {n} has {where} twice")
            said[where] = value if where == "name" or isinstance(value, list) else [value]
        for message in said["input"] + said["output"]:
            wrong = [key for key in message if key not in _MESSAGE_KEYS] if isinstance(
                message, dict) else [message]
            if wrong:
                raise ConfigError(f"test {n} has a message with {wrong[0]!r}; it has "
                                  f"{', '.join(_MESSAGE_KEYS)}")
        found.append(said)
    return found


def _leaves(mapping: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the expressions of a nested mapping by their virtual paths."""
    if not isinstance(mapping, Mapping):
        yield path, mapping
        return
    if len(path) > _MAX_TOPIC_LENGTH:
        raise ConfigError(f"mapping.{_shown(path)} is too long")
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            raise ConfigError(f"mapping.{path}: {key!r} is no name")
        yield from _leaves(value, f"{path}.{key}" if path else key)


def _result_text(value: Any) -> str:
    if value is None:
        raise _Stop("the result is None", "no_result")
    return _value_text(value)


def _parameters_of(fn: Callable[..., Any]) -> list[tuple[str, bool]]:
    """Return the parameters that *fn* must be given, and whether they must be named."""
    import inspect
    if _is_async(fn):
        raise UsageError("the function is async; a mapping has its result at once")
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):
        raise UsageError(f"what {fn!r} takes can't be read; write a lambda around it") from None
    return [(each.name, each.kind == each.KEYWORD_ONLY) for each in parameters
            if each.default is each.empty and each.kind not in (
                each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _not_loaded() -> None:
    """Do nothing: in place of what removes a mapping, until it is in an engine."""


class _Rule:
    """One mapping of a stream: from its variables to a topic."""

    __slots__ = ("path", "said", "needs", "cells", "code", "moving", "fn", "template", "static",
                 "places", "first", "placed", "shared")

    def __init__(self, path: str, said: Any, variables: Collection[str], topic: str,
                 wildcards: Sequence[str]) -> None:
        self.path = path
        if not callable(said) and not isinstance(said, str | int | float | list):
            raise ConfigError(f"mapping.{path} is an expression, not {_kind_of(said)}")
        self.said = said if isinstance(said, str) or callable(said) else repr(said)
        self.cells: Sequence[_Cell] = ()
        self.fn: Callable[..., Any] | None = None
        self.static: Any = _MISSING             # its JSON, or why there is none
        self.first = 0                          # of its cells in a match's memory
        self.placed = False                     # its topic names a match
        self.shared = False                     # it belongs to no match
        given = {"timestamp_ms": _Code("timestamp_ms", True, 64, True), **{
            name: _Code(f"key[{n}]", atom=True) for n, name in enumerate(wildcards)
            if not name.isdigit()}}
        given = {name: each for name, each in given.items() if name not in variables}
        try:
            self.template = _Template(topic)
            self.places = self.template.places(wildcards)
            self._check_places(self.places, wildcards)
            writer = _Writer(variables, given)
            if callable(said):
                self.code = self._call(said, writer)
            else:
                self.code = writer.write_whole(self.said)
            self.cells, self.needs = writer.settled_cells(), frozenset(writer.names)
            self.moving = writer.moving or bool(writer.used) and not self.needs
            self.placed = any(at >= 0 for _, at in self.places) or bool(writer.used & {*wildcards})
            if not callable(said):              # it may be what Python can't compile
                _function_of(self.code, writer.names, self.cells)
        except ExpressionError as error:
            hint = f"; a text has quotes of its own: \"'{said}'\"" if isinstance(
                said, str) and re.fullmatch(r"\w[\w :.,/-]*", said) else ""
            raise ExpressionError(f"mapping.{path}: {error}{hint}") from None
        except UsageError as error:
            raise ConfigError(f"mapping.{path}: {error}") from None

    @staticmethod
    def _check_places(places: Iterable[tuple[str, int]], wildcards: Sequence[str]) -> None:
        for name, at in places:
            if name and at < 0 and (hint := _did_you_mean(name, wildcards)):
                raise UsageError(f"the topic has a place {{{name}}}{hint}")

    def _call(self, fn: Callable[..., Any], writer: _Writer) -> str:
        """Return the text of the arguments of a function."""
        self.fn = fn
        wanted = _parameters_of(fn)
        writer.moving = not wanted
        values: list[str] = []
        for name, named in wanted:
            try:
                text = writer.visit_Name(ast.Name(name)).text
            except ExpressionError as error:
                raise UsageError(f"the function takes {name!r}: {error}") from None
            text = f"({text} if type({text}) is float else copied({text}))"
            values.append(f"{name}={text}" if named else text)
        return f"({', '.join(values)})"

    @property
    def is_static(self) -> bool:
        """Whether it is the same for every message."""
        return not (self.needs or self.moving)

    def evaluate(self) -> None:
        """Compute a static one; what fails, fails for every message."""
        if self.is_static:
            try:
                self.static = '{"value":' + _result_text(_function_of(self.code)(0, []))
            except Exception as error:
                self.static = error


def _row_text(names: Iterable[str]) -> str:
    return " ".join(f"v_{name}," for name in names)


def _parsed(payload: Any) -> Any:
    """Return JSON that somebody sent."""
    if not isinstance(payload, str | _Bytes):
        raise _Stop(f"a payload is bytes of JSON, not {_kind_of(payload)}", "bad_payload")
    if len(payload) > _MAX_PAYLOAD:
        raise _Stop(f"a payload of {len(payload)} bytes; {_MAX_PAYLOAD} are allowed", "too_big")
    try:
        return _plain_json.decode(payload if isinstance(payload, str) else str(payload, "utf-8"))
    except RecursionError:
        raise _Stop("JSON nested too deep", "too_deep") from None
    except ValueError as error:
        raise _Stop(f"not JSON: {error}", "not_json") from None


def _value_of(message: Any) -> tuple[Any, int]:
    """Return the value and the timestamp of a message."""
    if not isinstance(message, dict):
        raise _Stop(f"a message is an object, not {_kind_of(message)}", "not_object")
    if "value" not in message:
        raise _Stop("a message without a value", "no_value")
    value, at_ms = message["value"], message.get("timestamp_ms")
    if value is None:
        raise _Stop("a value of null", "null_value")
    if type(at_ms) is not int or not 0 < abs(at_ms) < _MAX_AT_MS:
        raise _Stop("timestamp_ms is a whole number, and not 0; not "
                    f"{_shown(repr(at_ms))}", "bad_timestamp")
    return _admit(value), at_ms


def _write_state(path: str, state: Any) -> None:
    path = os.path.realpath(path)
    # a match at a time: no other thread waits for all of it
    matches = ",".join([_dump_json(each) for each in state["matches"]])
    body = f'{_dump_json({**state, "matches": []})[:-2]}{matches}]}}'.encode()
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            head = {"format": _STATE_FORMAT, "crc32": zlib.crc32(body)}
            file.write(_dump_json(head).encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _take_state(path: str, take: Callable[[Any], object]) -> None:
    """Hand over what a file has; what is damaged is set aside."""
    try:
        take(_read_state(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"state_file = {path!r}: {error.strerror}") from None
    except (ExpressionError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
            MemoryError) as error:
        try:
            os.replace(path, path + ".damaged")
        except OSError as problem:
            raise ConfigError(f"state_file = {path!r} is damaged ({_why(error)}), and can't be "
                              f"set aside: {problem.strerror}") from None
        _log.error("the state file %s is damaged (%s); it is set aside as %s.damaged, and the "
                   "state begins anew", path, _why(error), path)


def _read_state(path: str) -> Any:
    with open(path, "rb") as file:
        head, _, body = file.read().partition(b"\n")
    said = json.loads(head)
    if said["format"] != _STATE_FORMAT:
        raise ValueError(f"its format is {said['format']!r}")
    if zlib.crc32(body) != said["crc32"]:
        raise ValueError("its checksum is another")
    return json.loads(body)


class Stream:
    """Messages of some topics mapped to messages of others (seed 003).

    *config* is a dict, or the path of a TOML file: ``model`` {name, version}, ``output_topic``,
    ``sources`` {variable: topic}, ``mapping``, nested, of expressions or functions of variables.
    A message is JSON, ``{"value", "timestamp_ms"}``, sets the variables of its topic and gives
    an Output for every mapping without variables, and for every one that depends on what it set
    and has all it needs, in the order of the config, at
    ``<output_topic>._<name>_<version>.<path>``. What can't be mapped is counted by its reason,
    and the rest goes on.

    A source with wildcards, ``plant.*.temp``, has a state for each match; sources without them
    are shared, and change all matches. ``{site}`` instead of ``*`` names one, for expressions
    and for places in ``output_topic``; what has no variables, but such a place, comes with the
    messages of matches. A topic that several sources cover is the exact one's, or the first's.

    One thread processes; ``state`` and ``stats`` are for any. Cost: some 5 us a message.

    Raises:
        ConfigError: what is wrong with *config*.
        ExpressionError: what is wrong with one of its expressions.

    >>> stream = Stream({"model": {"name": "pump", "version": "v1"}, "output_topic": "plant",
    ...                  "sources": {"temp": "plant.temp"},
    ...                  "mapping": {"fahrenheit": "temp * 9/5 + 32"}})
    >>> stream.process("plant.temp", b'{"value": 100, "timestamp_ms": 1700000000000}')[0][:2]
    ('plant._pump_v1.fahrenheit', b'{"value":212.0,"timestamp_ms":1700000000000}')
    """

    __slots__ = ("path", "name", "config", "patterns", "rules", "processed", "errored", "forgotten",
                 "where", "_held", "_samples", "_seen", "_looked_ns", "_counted_ns", "_view",
                 "dropped", "state_every_s", "state_file", "__source__", "_clock", "_observe",
                 "_wall", "_wildcards", "_own", "_shared", "_rows", "_memories", "_made", "_failed",
                 "_waits", "_times", "_told", "_exact", "_wild", "_find", "_fault_turn", "remove")

    def __init__(self, config: Mapping[str, Any] | str | os.PathLike[str], *,
                 observe: Callable[[str, float], object] = lambda name, value: None,
                 wall: Callable[[], float] = time.time,
                 clock: Callable[[], int] = time.monotonic_ns) -> None:
        if not isinstance(config, Mapping | str | os.PathLike):
            raise ConfigError(f"a stream is a dict or the path of a TOML file, not {config!r}")
        self.path = "" if isinstance(config, Mapping) else os.fspath(config)
        self._observe, self._wall, self._clock = observe, wall, clock
        self.processed = self._fault_turn = self.forgotten = 0
        self.where = ""                             # what errors begin with: a line of a file
        self.remove: Callable[[], object] = _not_loaded
        self.errored: Counter[str] = Counter()      # by reason: messages, and mappings of one
        self.dropped: Counter[str] = Counter()      # by reason: messages that nothing came of
        self._times: deque[int] = deque(maxlen=1024)    # what messages took, of those looked at
        self._told: dict[str, int] = {}             # when it was last said what is wrong
        self._configure(config if isinstance(config, Mapping) else _read_stream(config))
        if self.state_file:
            _take_state(self.state_file, self.restore)
        self._show()

    def _configure(self, config: Mapping[str, Any]) -> None:
        try:
            self._read(config)
        except UsageError as error:
            raise type(error)(f"{self.path}: {error}" if self.path else str(error)) from None
        self._rows: dict[tuple[str, ...], tuple[Any, ...]] = {}
        self._memories: dict[tuple[str, ...], list[Any]] = {}
        self._held, self._samples = 0, [0]          # bytes of texts and such; of all windows
        self._counted_ns = -1 << 62                 # when these bytes were
        self._seen: dict[tuple[str, ...], tuple[Any, ...]] = {}     # rows, when it was full
        self._looked_ns = -1 << 62                  # when that was
        self._made, self._failed, self._waits = ([0] * len(self.rules) for _ in range(3))
        self._build()

    def reload(self, check: Callable[[Stream], object] = lambda stream: None) -> None:
        """Read the file anew; the state goes on.

        Raises:
            UsageError: what is wrong with it, or what *check* has against it; then nothing has
                changed.
        """
        before = {name: getattr(self, name) for name in self.__slots__}
        past = {rule.path: (self._made[n], self._failed[n], self._waits[n])
                for n, rule in enumerate(self.rules)}
        try:
            state = self.snapshot()
            self._configure(_read_stream(self.path))
            check(self)
            self.restore(state)
            for n, rule in enumerate(self.rules if self.name == before["name"] else ()):
                self._made[n], self._failed[n], self._waits[n] = past.get(rule.path, (0, 0, 0))
            self._show()
        except BaseException:
            for name, each in before.items():
                setattr(self, name, each)
            raise

    # -- the configuration --

    def _read(self, config: Mapping[str, Any]) -> None:
        for key in config:
            if key not in _STREAM_KEYS:
                raise ConfigError(f"a stream has no {key!r}{_did_you_mean(key, _STREAM_KEYS)}")
        mode, model = config.get("mode", "timeseries"), config.get("model") or {}
        name, version = (model.get("name"), model.get("version")) if isinstance(
            model, Mapping) else (None, None)
        topic, sources = config.get("output_topic"), config.get("sources")
        mapping, file = config.get("mapping") or {}, config.get("state_file") or ""
        every_s = config.get("state_every_s", 30.0)
        form = '; model = {name = "pump", version = "v1"}'
        # upstream's order and texts
        for wrong, text in ((not mode, "mode is required"),
                            (mode != "timeseries", f"unsupported mode: {mode} (only 'timeseries' "
                             "is supported)"),
                            (not topic, "output_topic is required"),
                            (not name, "model name is required" + form),
                            (not version, "model version is required" + form),
                            (not sources, "at least one source mapping is required"),
                            (not isinstance(topic, str), "output_topic is a text"),
                            (not isinstance(sources, Mapping), "sources are variable = topic"),
                            (not isinstance(mapping, Mapping), "mapping is path = expression"),
                            (not re.fullmatch(r"[^\s.*>{}]+", f"{name}{version}"),
                             f"model name and version are texts without dots, spaces and braces, "
                             f"not {name!r} and {version!r}"),
                            (type(every_s) not in (int, float) or not 0 < every_s <= 1e9,
                             "state_every_s is a number of seconds above 0"),
                            (not isinstance(file, str | os.PathLike) or "\0" in os.fspath(file)
                             or not os.path.isdir(os.path.dirname(os.path.abspath(file))),
                             f"state_file = {file!r} must be in a folder that there is")):
            if wrong:
                raise ConfigError(text)
        assert isinstance(sources, Mapping)
        _tests_of(config)
        self.config = dict(config)
        self.name = f"_{name}_{version}"
        self.state_file, self.state_every_s = os.fspath(file), every_s
        self._read_sources(sources)
        self._read_mapping(mapping, f"{topic}.{self.name}")

    def _read_mapping(self, mapping: Mapping[str, Any], base: str) -> None:
        leaves = [*_leaves(mapping)]
        paths = Counter(path for path, _ in leaves)
        if twice := [path for path, count in paths.items() if count > 1]:
            raise ConfigError(f"mapping.{twice[0]} is given twice")
        self.rules = [_Rule(path, said, self.patterns, f"{base}.{path}", self._wildcards)
                      for path, said in leaves]
        first = 0
        for rule in self.rules:
            rule.first, first = first, first + len(rule.cells)
            rule.shared = bool(rule.needs) and not (rule.needs & {*self._own} or rule.placed)
            rule.evaluate()

    def _read_sources(self, sources: Mapping[Any, Any]) -> None:
        self.patterns: dict[str, _Pattern] = {}
        for name, topic in sources.items():
            if not _is_variable(name):
                raise ConfigError(f"sources.{name}: a variable is a name, like temp_1")
            try:
                self.patterns[name] = _Pattern(topic)
            except UsageError as error:
                raise ConfigError(f"sources.{name}: {error}") from None
        wild = [each for each in self.patterns.values() if each.names]
        self._wildcards = wild[0].names if wild else []
        for each in wild:
            if sorted(each.names) != sorted(self._wildcards):
                raise ConfigError(
                    f"sources {wild[0].text} and {each.text}: a state belongs to a match, so "
                    "their wildcards must be as many, or have the same names, like {site}")
        self._own = [name for name, each in self.patterns.items() if each.names or not wild]
        self._shared = [name for name in self.patterns if name not in self._own]

    # -- the code of it --

    def _build(self) -> None:
        """Generate and compile a function for every source topic, and one that looks at times."""
        groups: dict[str, list[str]] = {}       # topic: variables
        for name, pattern in self.patterns.items():
            groups.setdefault(pattern.text, []).append(name)
        names: dict[str, Any] = _EXPRESSION_NAMES | {
            "now": self._wall, "rows": self._rows, "memories": self._memories, "made": self._made,
            "waits": self._waits, "fail": self._fail, "fresh": self._fresh, "new": tuple.__new__,
            "Output": Output, "result_text": _result_text, "clock": self._clock,
            "spent": self._spent, "samples": self._samples, "copied": _copied}
        for n, rule in enumerate(self.rules):
            names |= {f"t_{n}": rule.template.text, f"static_{n}": rule.static,
                      f"function_{n}": rule.fn, f"fill_{n}": rule.template.fill,
                      f"topic_{n}": functools.partial(
                          rule.template.topic, rule.places)}
        self.__source__ = "\n\n".join(
            self._source_text(n, topic, variables, timed="")
            for n, (topic, variables) in enumerate(groups.items()))
        timed = "\n\n".join(self._source_text(n, topic, variables, timed="timed_")
                            for n, (topic, variables) in enumerate(groups.items()))
        plain = _compile(self.__source__, f"stream {self.name}", names)
        looking = _compile(timed, f"stream {self.name}, timed", names)
        self._exact: dict[str, Any] = {}
        self._wild: list[Any] = []
        for n, (topic, variables) in enumerate(groups.items()):
            pattern = self.patterns[variables[0]]
            order = [pattern.names.index(each) for each in self._wildcards] if pattern.names else []
            found = pattern, order, plain[f"source_{n}"], looking[f"timed_source_{n}"]
            if pattern.names:
                self._wild.append(found)
            else:
                self._exact[topic] = (plain[f"source_{n}"], looking[f"timed_source_{n}"], ())
        if not self._wildcards or self._shared:
            self._fresh(())
        self._find = functools.lru_cache(_MAX_CACHED)(self._look_up)

    def _look_up(self, topic: str) -> Any:
        """Return what maps messages of *topic*: two functions, and the match."""
        if topic in self._exact:
            return self._exact[topic]
        for pattern, order, run, timed in self._wild:
            if (match := pattern.match(topic)) is not None:
                return run, timed, tuple([match[n] for n in order])
        return None

    def _fresh(self, key: tuple[str, ...]) -> tuple[Any, ...]:
        """Return the state of a new match."""
        if key and len(self._rows) - (() in self._rows) >= _MAX_MATCHES:
            self._make_room()
        count = len(self._own if key or not self._wildcards else self._shared)
        self._memories[key] = [_MISSING] * sum(len(rule.cells) for rule in self.rules)
        row = self._rows[key] = (_MISSING,) * count
        return row

    def _make_room(self) -> None:
        """Forget the matches that have not changed for a while; look once in that while."""
        now = self._clock()
        if now - self._looked_ns >= _IDLE_NS:
            idle = [key for key, row in self._rows.items() if key and self._seen.get(key) is row]
            for key in idle:
                self._samples[0] -= sum(len(each.times) for each in self._memories[key]
                                        if isinstance(each, _Window))
                del self._rows[key], self._memories[key]
            self.forgotten += len(idle)
            self._looked_ns, self._seen = now, dict(self._rows)
        if len(self._rows) - (() in self._rows) >= _MAX_MATCHES:
            raise _Stop(f"more than {_MAX_MATCHES} matches of the sources", "too_many_matches")

    def _hold(self, value: Any) -> None:
        """Account for a value that is no number: too high, until all are counted again."""
        size = len(_dump_json(value))
        if self._held + size > _MAX_HELD:
            now = self._clock()
            if now - self._counted_ns >= 1_000_000_000:
                self._counted_ns = now
                self._held = sum(len(_dump_json(each)) for row in self._rows.values()
                                 for each in row if type(each) in (str, list, dict))
            if self._held + size > _MAX_HELD:
                raise _Stop(f"the state would take more than {_MAX_HELD} bytes", "too_much")
        self._held += size

    def _source_text(self, n: int, topic: str, variables: list[str], timed: str) -> str:
        """Return the text of the function for messages of one source."""
        # HOT: what is generated; the twin in the tests interprets (bench 9.stream)
        changed = {*variables}
        own = changed <= {*self._own}
        rules = [(at, rule) for at, rule in sorted(enumerate(self.rules), key=lambda each:
                                                   not each[1].is_static)
                 if rule.is_static or rule.moving or rule.needs & changed]
        mine, common = _row_text(self._own), _row_text(self._shared)
        sets = "".join(f"v_{name} = " for name in variables) + "value\n"
        remember = "memory = memories[key]\n" if any(rule.cells for _, rule in rules) else ""
        shared = "common = memories[()]\n" if any(
            rule.cells and rule.shared for _, rule in rules) else ""
        text = "tail = f',\"timestamp_ms\":{timestamp_ms}}}'\n"
        if own:
            text += ("row = rows.get(key)\nif row is None: row = fresh(key)\n"
                     f"{mine} = row\n{sets}rows[key] = ({mine})\n"
                     + (f"{common} = rows[()]\n" if self._shared else "") + remember + shared)
            text += "".join(self._rule_text(at, rule, changed, timed) for at, rule in rules)
        else:
            text += f"{common} = rows[()]\n{sets}rows[()] = ({common})\n{remember}{shared}"
            text += "".join(self._rule_text(at, rule, changed, timed) for at, rule in rules
                            if rule.shared or not (rule.needs or rule.placed))
            if each := "".join(self._rule_text(at, rule, changed, timed) for at, rule in rules
                               if rule.needs and not rule.shared):
                text += ("for key, row in [*rows.items()]:\n"
                         "    if key not in memories or not key: continue\n"
                         + _indent(f"{mine} = row\n{remember}{each}", 1))
        return (f"def {timed}source_{n}(key, value, timestamp_ms, metadata, out):"
                f"    # {', '.join(variables)}: {topic}\n" + _indent(text, 1))

    def _rule_text(self, n: int, rule: _Rule, changed: set[str], timed: str) -> str:
        """Return the text that runs one mapping; a failure is its own."""
        place, topic = "", f"t_{n}"
        if rule.template.names:
            place, topic = (f"topic = topic_{n}(key, {{}}, metadata)\n", "topic") if any(
                name for name, _ in rule.places) else (
                f"topic = fill_{n}({', '.join(f'key[{at}]' for _, at in rule.places)})\n", "topic")
        put = (f"out.append(new(Output, ({topic}, text.encode(), "
               f"{{**metadata, 'umh_topic': {topic}}})))\nmade[{n}] += 1\n")
        if isinstance(rule.static, Exception):
            body = f"fail({n}, static_{n})\n"
        elif rule.is_static:
            body = f"text = static_{n} + tail\n{place.format(None)}{put}"
        else:
            run = f"result = {f'function_{n}' * (rule.fn is not None)}{rule.code}\n"
            if timed:
                run = f"began = clock()\n{run}spent(clock() - began)\n"
            put = ("if type(result) is float and result - result == 0.0: "
                   "text = f'{{\"value\":{result!r}{tail}'\n"
                   "else: text = '{\"value\":' + result_text(result) + tail\n"
                   + place.format("result") + put)
            if rule.fn:
                put = f"if result is None: waits[{n}] += 1\nelse:\n" + _indent(put, 1)
            unsure = [f"v_{name}" for name in sorted(rule.needs - changed)]
            unsure += [f"k_{at}" for at in range(len(rule.cells))]
            body = run + put if not unsure else (
                f"if {_any_missing(unsure)}: waits[{n}] += 1\nelse:\n" + _indent(run + put, 1))
            body = _cell_lines(rule.cells, rule.first, changed,
                               "common" if rule.shared else "memory") + body
        if "left" in body:
            body = f"left = [{_MAX_STEPS}]\n" + body
        said = _shown(" ".join(str(rule.said).split()))
        return (f"# {rule.path}: {said}\ntry:\n{_indent(body, 1)}"
                f"except Exception as error: fail({n}, error)\n")

    # -- messages --

    def process(self, topic: str | None, payload: bytes | str,
                metadata: Mapping[str, Any] | None = None) -> list[Output]:
        """Return what comes of one message.

        Without *topic*, it is the one that *metadata* has as umh_topic.
        """
        out: list[Output] = []
        self._process(topic, payload, metadata, out)
        return out

    def process_batch(self, messages: Iterable[tuple[Any, ...]]) -> list[Output]:
        """Return what comes of messages, each (topic, payload) or (topic, payload, metadata)."""
        out: list[Output] = []
        process = self._process
        for each in messages:
            if type(each) is tuple and len(each) == 3:
                topic, payload, metadata = each
                process(topic, payload, metadata, out)
            elif isinstance(each, tuple | list) and 2 <= len(each) <= 3:
                process(each[0], each[1], each[2] if len(each) > 2 else None, out)
            else:
                self.processed += 1
                self.refuse(_Stop("a message is (topic, payload) or (topic, payload, metadata), "
                                  f"not {reprlib.repr(each)}", "bad_message"))
        return out

    def _process(self, topic: Any, payload: Any, metadata: Any, out: list[Output]) -> None:
        # HOT: what is usual; the rest goes the longer way (bench 9.stream)
        self.processed = turn = self.processed + 1
        looked = turn % _SAMPLED == 1
        began = self._clock() if looked else 0
        before = len(out)
        usual = False
        try:
            run, looking, key = self._find(topic)
            if len(payload) <= _MAX_PAYLOAD:
                text = payload.decode()
                message, end = _scan_json(text, 0)
                value, at_ms = message["value"], message["timestamp_ms"]
                usual = ((type(value) is float and value - value == 0.0
                          or type(value) is int and -_SAFE_INT < value < _SAFE_INT)
                         and type(at_ms) is int and 0 < at_ms < _MAX_AT_MS and end == len(text)
                         and type(metadata) is dict)
        except Exception:
            pass                    # it is said what is wrong when it is looked at again
        if usual:
            try:
                (looking if looked else run)(key, value, at_ms, metadata, out)
            except _Stop as error:
                self.refuse(error, topic)
        else:
            self._accept(topic, payload, metadata, out)
        if looked or len(out) == before:
            self._settle(began, len(out) == before)

    def _settle(self, began_ns: int, empty: bool) -> None:
        if empty and self._fault_turn != self.processed:
            self.dropped["no_output"] += 1
        if began_ns:
            spent = self._clock() - began_ns
            self._times.append(spent)
            self._observe("horizon_stream_message_seconds", spent / 1e9)

    def accept(self, topic: Any, message: Any,
               metadata: Mapping[str, Any] | None = None) -> list[Output]:
        """Return what comes of a message that is parsed: {"value", "timestamp_ms"}."""
        self.processed = turn = self.processed + 1
        looked, out = turn % _SAMPLED == 1, list[Output]()
        began = self._clock() if looked else 0
        self._accept(topic, message, metadata, out, parsed=True)
        if looked or not out:
            self._settle(began, not out)
        return out

    def covers(self, topic: str) -> bool:
        """Whether *topic* is one of the sources."""
        return self._find(topic) is not None

    @property
    def outputs(self) -> int:
        """How many it has given."""
        return sum(self._made)

    def _accept(self, topic: Any, payload: Any, metadata: Any, out: list[Output],
                parsed: bool = False) -> None:
        """Map any message, or say why not."""
        try:
            if metadata is not None and not isinstance(metadata, Mapping):
                raise _Stop(f"metadata is an object, not {_kind_of(metadata)}", "bad_metadata")
            metadata = dict(metadata or ())
            topic = metadata.get("umh_topic") if topic is None else topic
            if not isinstance(topic, str) or not topic:
                raise _Stop("a message without a topic", "no_topic")
            value, at_ms = _value_of(payload if parsed else _parsed(payload))
            value = _copied(value) if parsed else value         # somebody else may change it
            found = self._find(topic)
            if found is None:
                raise _Stop(f"{_shown(topic)} is no source" + _did_you_mean(topic, self._exact),
                            "unknown_topic")
            if type(value) not in _FLAT:
                self._hold(value)
            found[self.processed % _SAMPLED == 1](found[2], value, at_ms, metadata, out)
        except _Stop as error:
            self.refuse(error, topic)

    def refuse(self, error: _Stop, topic: object = None) -> None:
        """Count and tell that a message can't be mapped."""
        self._count(error.reason)
        of = f" of {_shown(topic)}" if topic else ""
        self._tell(f" {error.reason}", f"a message{of} can't be mapped: {error}")

    def _fail(self, n: int, error: Exception) -> None:
        """Count what one mapping could not do."""
        rule = self.rules[n]
        self._failed[n] += 1
        self._count(_reason_of(error))
        self._tell(rule.path, f"mapping.{rule.path}: {_why(error)}", error if rule.fn else None)

    def _count(self, reason: str) -> None:
        self._fault_turn = self.processed
        (self.dropped if reason in _DROPS else self.errored)[reason] += 1

    def _tell(self, what: str, text: str, error: Exception | None = None) -> None:
        """Log, at most once a second of each thing."""
        now = self._clock()
        if now - self._told.get(what, -1 << 62) >= 1_000_000_000:
            self._told[what] = now
            _log.warning("%sstream %s: %s", self.where, self.name, text, exc_info=error)

    def _spent(self, ns: int) -> None:
        self._observe("horizon_stream_expression_seconds", ns / 1e9)

    # -- looking --

    def _show(self) -> None:
        """Let other threads see how all is now: by one reference."""
        self._view = (self.patterns, self._own, self._shared, self._wildcards, self._rows,
                      self.rules, self._made, self._failed, self._waits, self._find)

    def state(self) -> dict[str, Any]:
        """Return the variables that there are, at one moment; from any thread.

        A variable with wildcards is a dict of its matches, whose tokens are joined by dots.
        """
        patterns, own, shared, wildcards, rows = self._view[:5]
        rows = rows.copy()
        found = dict(zip(shared, rows.get((), ())))
        for n, name in enumerate(own):
            each = {".".join(key): row[n] for key, row in rows.items()
                    if (key or not wildcards) and row[n] is not _MISSING}
            found[name] = each or _MISSING if wildcards else each.get("", _MISSING)
        return {name: json.loads(_dump_json(found[name])) for name in patterns
                if found.get(name, _MISSING) is not _MISSING}

    def stats(self) -> dict[str, Any]:
        """Return what was counted, and how long a message takes, in microseconds."""
        rows, rules, made, failed, waits, find = self._view[4:]
        times, count = sorted(self._times) or [0], len(self._times)
        info = find.cache_info()
        filled = [rule.template.fill.cache_info() for rule in rules]
        return {
            "processed": self.processed, "outputs": sum(made), "errored": dict(self.errored),
            "dropped": dict(self.dropped), "forgotten": self.forgotten,
            "matches": len(rows) - (() in rows),
            "mappings": {rule.path: {"static": rule.is_static, "outputs": made[n],
                                     "failed": failed[n], "waited": waits[n]}
                         for n, rule in enumerate(rules)},
            "cache": {"hits": info.hits + sum(each.hits for each in filled),
                      "misses": info.misses + sum(each.misses for each in filled)},
            "latency_us": {f"p{part}": times[min(count * part // 100, len(times) - 1)] / 1e3
                           for part in (50, 95, 99)}}

    # -- what outlives a stop, or a change of the mapping --

    def snapshot(self) -> dict[str, Any]:
        """Return the state as JSON; ``restore`` takes it back."""
        matches = []
        for key, row in self._rows.items():
            names = self._own if key or not self._wildcards else self._shared
            memory = self._memories[key]
            matches.append({
                "match": [*key],
                "values": {name: each for name, each in zip(names, row) if each is not _MISSING},
                "cells": [[rule.path, cell.said, _CELLS[cell.kind].dump(memory[rule.first + n])]
                          for rule in self.rules for n, cell in enumerate(rule.cells)
                          if memory[rule.first + n] is not _MISSING]})
        return {"sources": {name: each.text for name, each in self.patterns.items()},
                "wildcards": self._wildcards, "matches": matches}

    def restore(self, saved: Any) -> None:
        """Go on from a ``snapshot``; of a changed config, what is still the same.

        Raises:
            ValueError, TypeError, LookupError: it is none; nothing has changed then.
        """
        known = {name for name, each in self.patterns.items()
                 if saved["sources"].get(name) == each.text}
        places = {(rule.path, cell.said): (rule.first + n, _CELLS[cell.kind].load)
                  for rule in self.rules for n, cell in enumerate(rule.cells)
                  if cell.needs <= known}
        was = saved["wildcards"]
        order = [was.index(name) for name in self._wildcards] if (
            sorted(was) == sorted(self._wildcards)) else None
        rows: dict[tuple[str, ...], tuple[Any, ...]] = {}
        memories: dict[tuple[str, ...], list[Any]] = {}
        for each in saved["matches"]:
            key = tuple(map(str, each["match"]))
            if len(key) != len(was if key else ()) or (
                    order is None if key and was else () not in self._rows):
                continue
            key = tuple([key[n] for n in order]) if key and order else key
            row = self._row_of(key, known, each["values"])
            if all(value is _MISSING for value in row) or len(rows) > _MAX_MATCHES:
                continue
            rows[key] = row
            memories[key] = memory = [_MISSING] * sum(len(rule.cells) for rule in self.rules)
            for path, said, value in each["cells"]:
                if (path, said) in places:
                    at, load = places[path, said]
                    memory[at] = load(value, self._samples)
        self._memories.update(memories)         # first: what has a row has a memory
        self._rows.update(rows)
        self._samples[0] = sum(len(each.times) for memory in self._memories.values()
                               for each in memory if isinstance(each, _Window))
        self._held = _MAX_HELD                  # to be counted when it matters

    def _row_of(self, key: tuple[str, ...], known: set[str], said: Any) -> tuple[Any, ...]:
        values = {name: said[name] for name in known if name in said}
        if None in values.values():
            raise ValueError("a value of null")
        names = self._own if key or not self._wildcards else self._shared
        return tuple([_admit(values[name]) if name in values else _MISSING for name in names])

    def save(self) -> None:
        """Write the state to ``state_file``, whole or not at all.

        Raises:
            StateError: there is no such file in the config.
            OSError: it can't be written; the old file stays.
        """
        if not self.state_file:
            raise StateError("this stream has no state_file")
        _write_state(self.state_file, self.snapshot())


# -- in an engine --

class _FunctionMap:
    """A function that maps messages of a pattern, and what it has done."""

    __slots__ = ("name", "pattern", "template", "remove", "made", "failed", "waited", "_fn",
                 "_places", "_first", "_names")

    def __init__(self, pattern: str, to: str, fn: Callable[..., Any]) -> None:
        self.name = getattr(fn, "__qualname__", type(fn).__qualname__)
        self.pattern, self.template = _Pattern(pattern), _Template(to)
        self.remove: Callable[[], object] = _not_loaded
        self.made = self.failed = self.waited = 0
        self._fn = fn
        self._places = self.template.places(self.pattern.names)
        names = _parameters_of(fn)
        if not names or names[0][1]:
            raise UsageError(f"{self.name}() must take the payload")
        self._first, *self._names = [name for name, _ in names]
        known = ("topic", "value", "timestamp_ms", *self.pattern.names)
        for name in self._names:
            if name not in known:
                raise UsageError(f"{self.name}() takes {name!r}: after the payload there are "
                                 f"{', '.join(known)}{_did_you_mean(name, known)}")

    def __call__(self, topic: str, payload: Any) -> tuple[str, Any] | None:
        """Return what is to be published, and where; None if nothing is."""
        match = self.pattern.match(topic) or ()
        fields = payload if isinstance(payload, dict) else {}
        given = {"topic": topic, **dict(zip(self.pattern.names, match)),
                 **{name: fields[name] for name in ("value", "timestamp_ms") if name in fields}}
        if missing := [each for each in self._names if each not in given]:
            raise _Stop(f"a message without {missing[0]}", "no_field")
        first = given.get("value", payload) if self._first == "value" else payload
        result = self._fn(first, **{name: given[name] for name in self._names})
        if result is None:
            self.waited += 1
            return None
        return self.template.topic(self._places, match, result, payload), result


class Streams:
    """The mappings of an engine: their sources are its topics, and what they give goes to topics.

    It counts what functions do, and what streams that are gone have done.
    """

    __slots__ = ("topics", "observe", "settle", "errored", "dropped", "made", "failed", "counts",
                 "_streams", "_functions", "_told", "_saved")

    def __init__(self, topics: Topics,
                 observe: Callable[[str, float], object] = lambda name, value: None,
                 settle: Callable[[], object] = _not_loaded) -> None:
        self.topics, self.observe = topics, observe
        self.settle = settle            # waits for states that are being written elsewhere
        self.errored: Counter[str] = Counter()      # by reason
        self.dropped: Counter[str] = Counter()
        self.made: Counter[str] = Counter()         # outputs, and failures, by mapping
        self.failed: Counter[str] = Counter()
        self.counts = Counter(processed=0, hits=0, misses=0, unsaved=0)
        self._streams: dict[Stream, list[Subscription]] = {}
        self._functions: dict[_FunctionMap, None] = {}
        self._told: dict[_FunctionMap, int] = {}
        self._saved: dict[Stream, int] = {}         # when

    def __iter__(self) -> Iterator[Stream]:
        return iter([*self._streams])

    def load(self, config: Mapping[str, Any] | str | os.PathLike[str]) -> Stream:
        """Map from now on; a file that was loaded before takes its own place, and its state.

        Raises:
            ConfigError, ExpressionError: what is wrong with it; nothing has changed then.
        """
        path = os.path.realpath(config) if isinstance(config, str | os.PathLike) else ""
        if path and (old := next((each for each in self if path == os.path.realpath(
                each.path) and each.path), None)) is not None:
            self._reread(old)
            return old
        stream = Stream(config, observe=self.observe)
        self._check(stream)
        stream.remove = functools.partial(self.unload, stream)
        self._follow(stream)
        return stream

    def _check(self, stream: Stream) -> None:
        for rule in stream.rules:
            self._must_not_loop(rule.template, [*stream.patterns.values()])
        if stream.state_file and os.path.realpath(stream.state_file) in [
                os.path.realpath(each.state_file) for each in self
                if each is not stream and each.state_file]:
            raise ConfigError(f"state_file = {stream.state_file!r} is another stream's")

    def _follow(self, stream: Stream) -> None:
        for each in self._streams.get(stream, ()):
            each.remove()
        sink = functools.partial(self._feed, stream)
        self._streams[stream] = [self.topics.subscribe(each, sink) for each in dict.fromkeys(
            pattern.topics for pattern in stream.patterns.values())]

    def _reread(self, stream: Stream) -> None:
        before, name = stream.stats(), stream.name
        stream.reload(self._check)
        self._follow(stream)
        self.counts.update(before["cache"])             # they begin anew
        now = stream.stats()["mappings"] if stream.name == name else {}
        for path, each in before["mappings"].items():
            if path not in now:                         # else it goes on counting
                self.made[f"{name}.{path}"] += each["outputs"]
                self.failed[f"{name}.{path}"] += each["failed"]

    def unload(self, stream: Stream) -> None:
        """Map no longer; doing it twice is harmless."""
        if (subscriptions := self._streams.pop(stream, None)) is None:
            return
        for each in subscriptions:
            each.remove()
        self.save(stream)
        self._saved.pop(stream, None)
        self.errored += stream.errored
        self.dropped += stream.dropped
        stats = stream.stats()
        self.counts += Counter(processed=stream.processed, **stats["cache"])
        for path, each in stats["mappings"].items():
            self.made[f"{stream.name}.{path}"] += each["outputs"]
            self.failed[f"{stream.name}.{path}"] += each["failed"]

    def reload(self) -> None:
        """Read all files of mappings anew; the state stays, and of a wrong one all stays."""
        for stream in self:
            if stream.path:
                try:
                    self._reread(stream)
                    _log.info("%s is read anew", stream.path)
                except UsageError as error:
                    _log.error("it is as it was: %s", error)

    def map(self, pattern: str, to: str, fn: Callable[..., Any]) -> _FunctionMap:
        """Publish what ``fn(payload)`` returns for messages of *pattern* on the topic *to*."""
        mapped = _FunctionMap(pattern, to, fn)
        self._must_not_loop(mapped.template, [mapped.pattern])
        subscription = self.topics.subscribe(
            mapped.pattern.topics, functools.partial(self._call, mapped))
        self._functions[mapped] = None

        def remove() -> None:
            subscription.remove()
            self._told.pop(mapped, None)
            if self._functions.pop(mapped, self) is None:
                self.made[mapped.name] += mapped.made
                self.failed[mapped.name] += mapped.failed

        mapped.remove = remove
        return mapped

    def process(self, topic: str | None, payload: bytes | str,
                metadata: Mapping[str, Any] | None = None) -> list[Output]:
        """Return what all streams that have *topic* as a source give for a message."""
        name = metadata.get("umh_topic") if topic is None and isinstance(
            metadata, Mapping) else topic
        streams = [each for each in self if isinstance(name, str) and each.covers(name)]
        if not streams:
            self.counts["processed"] += 1
            self.dropped["unknown_topic" if name else "no_topic"] += 1
        return [output for each in streams for output in each.process(topic, payload, metadata)]

    def _must_not_loop(self, template: _Template, patterns: Iterable[_Pattern]) -> None:
        tokens = [re.sub(r".*\{.*", "*", token) for token in template.text.split(".")]
        for each in patterns:
            if _contains(each.tokens, tokens):
                raise ConfigError(f"what goes to {template.text} would come back as {each.text}")

    def _feed(self, stream: Stream, publication: Publication) -> None:
        for output in stream.accept(publication.topic, publication.payload):
            if stream in self._streams:         # a function may end it
                self.topics.publish(output.topic, Rendered(output.payload))

    def _call(self, mapped: _FunctionMap, publication: Publication) -> None:
        self.counts["processed"] += 1
        try:
            if (made := mapped(publication.topic, _copied(publication.payload))) is not None:
                self.topics.publish(*made)
                mapped.made += 1
        except Exception as error:
            mapped.failed += 1
            reason = _reason_of(error)
            (self.dropped if reason in _DROPS else self.errored)[reason] += 1
            now = self.topics.clock()
            if now - self._told.get(mapped, -1 << 62) >= 1_000_000_000:
                self._told[mapped] = now
                _log.warning("mapping %s: %s", mapped.name, _why(error),
                             exc_info=None if isinstance(error, HorizonError) else error)

    # -- what outlives a stop --

    def due(self) -> list[tuple[str, Any]]:
        """Return the files that states are to be written to now, and these."""
        now, found = self.topics.clock(), []
        for stream in self:
            if stream.state_file and now - self._saved.setdefault(stream, now) >= (
                    stream.state_every_s * 1e9):
                self._saved[stream] = now
                found.append((stream.state_file, stream.snapshot()))
        return found

    def save(self, stream: Stream) -> None:
        """Write a stream's state, if it has a file for it."""
        if stream.state_file:
            self.settle()
            try:
                stream.save()
            except (OSError, ValueError) as error:
                self.tell_unsaved(stream.state_file, error)

    def tell_unsaved(self, path: str, error: Exception) -> None:
        """Count and tell that a state could not be written."""
        self.counts["unsaved"] += 1
        _log.error("the state of a stream can't be written to %s: %s", path, error)

    # -- what is counted, of all --

    def total(self, what: str) -> Any:
        """Return a number of all streams; of errored, dropped, made and failed, by what."""
        if what == "mappings":
            return len(self._functions) + sum(len(each.rules) for each in self)
        mine = getattr(self, what, None)
        total: Any = self.counts[what] if mine is None else mine.copy()
        if what in ("made", "failed"):
            for each in [*self._functions]:
                total[each.name] += getattr(each, what)
        for stream in self:
            stats = stream.stats()
            if what in ("made", "failed"):
                for path, each in stats["mappings"].items():
                    total[f"{stream.name}.{path}"] += each["outputs" if what == "made" else what]
            elif isinstance(total, Counter):
                total.update(stats[what])
            else:
                total += stats.get(what, stats["cache"].get(what, 0))
        return total


# =============================================================================
# 10  SPACE - who is near
# =============================================================================
# Knows: points.     Never: sockets, messages, what is at a point.
#
# Space is a grid of cubes, made where something is.  A cube that holds too many is divided
# into eight, again and again down to a smallest size; one that has lost most of them is made
# one again.  So a question about a place looks at few regions where little is, and at small
# ones where much is (seed 002, "Spatial Partitioning Tuning").

_MAX_COORDINATE = 3.0e38            # what an f32 can carry; NaN fails the comparison too


def _place(x: Any, y: Any, z: Any) -> _Position | None:
    """Return coordinates as floats, or None if they are not finite numbers below 3e38."""
    limit = _MAX_COORDINATE
    try:
        if -limit < x < limit and -limit < y < limit and -limit < z < limit:
            return float(x), float(y), float(z)
    except (TypeError, ValueError, ArithmeticError):
        pass
    return None


def _must_be_place(x: Any, y: Any, z: Any, what: str) -> _Position:
    if (place := _place(x, y, z)) is None:
        raise UsageError(f"{what} can't be at ({x!r}, {y!r}, {z!r}): "
                         "coordinates are finite numbers below 3e38")
    return place


class Located(Protocol):
    """What a Space holds."""

    at: _Position                   # say ``settle`` after it has changed
    region: _Region | None          # the Space's own


class _Region:
    """A cube of space, with what is in it; or with its parts, as far as something is there."""

    __slots__ = ("x", "y", "z", "size", "box", "parent", "key", "entries", "parts", "count")

    def __init__(self, x: float, y: float, z: float, size: float, parent: _Region | None,
                 key: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.x, self.y, self.z, self.size = x, y, z, size
        self.box = x, x + size, y, y + size, z, z + size
        self.parent = parent
        self.key = key                                      # of one of the largest
        self.entries: dict[Any, None] = {}
        self.parts: dict[int, _Region] | None = None        # by which half of x, y, z: bits 1, 2, 4
        self.count = 0                                      # of the parts, too

    def part_of(self, at: _Position) -> _Region:
        """Return the part that holds *at*, new if there was none."""
        half, number, parts = self.size / 2, 0, self.parts
        corner = [self.x, self.y, self.z]
        for axis in range(3):
            if at[axis] >= corner[axis] + half:
                number |= 1 << axis
                corner[axis] += half
        assert parts is not None
        if (part := parts.get(number)) is None:
            part = parts[number] = _Region(corner[0], corner[1], corner[2], half, self)
        return part

    def misses(self, x: float, y: float, z: float, radius: float) -> bool:
        """Whether a sphere does not touch it."""
        size = self.size
        a = self.x - x if x < self.x else x - self.x - size if x > self.x + size else 0.0
        b = self.y - y if y < self.y else y - self.y - size if y > self.y + size else 0.0
        c = self.z - z if z < self.z else z - self.z - size if z > self.z + size else 0.0
        return a * a + b * b + c * c > radius * radius

    def leaves(self) -> Iterator[_Region]:
        """Yield it, or the undivided parts it has."""
        if self.parts is None:
            yield self
        else:
            for part in self.parts.values():
                yield from part.leaves()


class Space:
    """Things by where they are, in regions that adapt to how many there are.

    Regions are cubes of *max_region* at most, divided while more than *split* are in one and
    its parts are not smaller than *min_region*, and put together again below *merge*.
    Cost: to add, remove or move something some microseconds; to ask, what the regions hold.
    """

    __slots__ = ("_min", "_max", "_split", "_merge", "_roots")

    def __init__(self, min_region: float = 100.0, max_region: float = 1000.0, split: int = 50,
                 merge: int = 10) -> None:
        if not 1e-6 <= min_region <= max_region <= 1e12:
            raise UsageError(f"regions are of 1e-6 <= min_region <= max_region <= 1e12, not "
                             f"{min_region!r}, {max_region!r}")
        if not 0 <= merge <= split or max_region / min_region > 1 << 20:
            raise UsageError(f"merge = {merge!r} must be 0 to split = {split!r}; max_region at "
                             "most a million times min_region")
        self._min, self._max = float(min_region), float(max_region)
        self._split, self._merge = split, merge
        self._roots: dict[tuple[int, int, int], _Region] = {}

    def __len__(self) -> int:
        return sum(root.count for root in self._roots.values())

    def add(self, entry: Located) -> None:
        """Take in *entry* where it is."""
        at, size = entry.at, self._max
        key = (int(at[0] // size), int(at[1] // size), int(at[2] // size))
        region = self._roots.get(key)
        if region is None:
            region = self._roots[key] = _Region(key[0] * size, key[1] * size, key[2] * size,
                                                size, None, key)
        while region.parts is not None:
            region.count += 1
            region = region.part_of(at)
        region.count += 1
        region.entries[entry] = None
        entry.region = region
        if region.count > self._split and region.size / 2 >= self._min:
            self._divide(region)

    def _divide(self, region: _Region) -> None:
        entries, region.entries, region.parts = region.entries, {}, {}
        for entry in entries:
            part = region.part_of(entry.at)
            part.entries[entry] = None
            part.count += 1
            entry.region = part
        for part in region.parts.values():
            if part.count > self._split and part.size / 2 >= self._min:
                self._divide(part)

    def remove(self, entry: Located) -> None:
        """Forget *entry*."""
        region, entry.region = entry.region, None
        assert region is not None
        del region.entries[entry]
        sparse = None
        while region is not None:
            region.count -= 1
            if region.parts is not None and region.count < self._merge:
                sparse = region
            root, region = region, region.parent
        if sparse is not None:
            self._unite(sparse)
        if not root.count:
            del self._roots[root.key]

    def _unite(self, region: _Region) -> None:
        entries = {entry: None for leaf in region.leaves() for entry in leaf.entries}
        region.entries, region.parts = entries, None
        for entry in entries:
            entry.region = region

    def settle(self, entry: Located) -> None:
        """Note that *entry* has moved."""
        x, y, z = entry.at
        left, right, bottom, top, near, far = entry.region.box      # type: ignore[union-attr]
        if not (left <= x < right and bottom <= y < top and near <= z < far):
            self.remove(entry)
            self.add(entry)

    def around(self, x: float, y: float, z: float, radius: float) -> list[Any]:
        """Return all in the regions that a sphere touches: those in it, and some beside it."""
        found: list[Any] = []
        radius += 4 * math.ulp(max(abs(x), abs(y), abs(z)))     # regions' sides are rounded
        regions = self._touched(x, y, z, radius)
        while regions:
            region = regions.pop()
            if region.misses(x, y, z, radius):
                continue
            if region.parts is None:
                found += region.entries
            else:
                regions += region.parts.values()
        return found

    def _touched(self, x: float, y: float, z: float, radius: float) -> list[_Region]:
        """Return the largest regions that may be touched."""
        size, roots = self._max, self._roots
        if (2 * radius / size + 2) ** 3 > len(roots):
            return list(roots.values())
        xs, ys, zs = (range(int((each - radius) // size), int((each + radius) // size) + 1)
                      for each in (x, y, z))
        return [roots[key] for key in itertools.product(xs, ys, zs) if key in roots]

    def nearby(self, x: float, y: float, z: float, radius: float) -> list[Any]:
        """Return all that are within *radius*, the boundary included."""
        here = (x, y, z)
        return [entry for entry in self.around(x, y, z, radius)
                if math.dist(here, entry.at) <= radius]

    def regions(self) -> list[tuple[float, int]]:
        """Return size and number of entries of every region there is."""
        return [(leaf.size, leaf.count) for root in self._roots.values()
                for leaf in root.leaves()]

    def _check(self) -> None:
        """Assert that everything is where it should be, and regions as divided as they should."""
        for key, root in self._roots.items():
            assert root.count and root.key == key
            for leaf in root.leaves():
                assert leaf.count == len(leaf.entries)
                assert leaf.count <= self._split or leaf.size / 2 < self._min
                for entry in leaf.entries:
                    assert entry.region is leaf
                    assert not leaf.misses(*entry.at, 1e-9 * max(map(abs, entry.at)))
                parent = leaf.parent
                while parent is not None:
                    assert parent.count >= self._merge
                    parent = parent.parent


# =============================================================================
# 11  REPLICATION - where everybody is; who is told what of things, how often
# =============================================================================
# Knows: positions, SPACE, PROTO.     Never: sockets.
#
# Movement is state, not history: of ten positions in one tick only the last matters.  So a
# tick yields one Moves for everybody: those who moved, or all players when somebody left
# (the block has no word for leaving: who is not in a full one is gone).  A peer that fell
# behind gets the tick's full one in place of all it missed.

_MOVES_A_PIECE = 100                # events of movement that stay together
_PACKED_A_PIECE = 1_500             # players in one block for plugins: under 64 KiB also when wide


def _uuid_text(player: bytes) -> str:
    text = player.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


@functools.cache
def _move_event() -> tuple[bytes, bytes, struct.Struct]:
    """Return how each PLAYER_MOVE of a batch begins, its tags, and what packs all of it."""
    schema, player = builtin_schema(), _uuid_text(bytes(16))
    move = schema.PlayerMoveEvent(player, 1.0, 1.0, 1.0)
    sample = _batch_of(type="PLAYER_MOVE", player_move=move)
    before = sample[:sample.index(player.encode())]
    return before, sample[-27::9], struct.Struct(f"<{len(before)}s{len(player)}sBdBdBd")


class Moves:
    """One tick's movement, rendered at most once per form; see Outbox for key and replaces."""

    __slots__ = ("players", "full", "size", "moved", "_movement", "_rendered")

    key = "movement"
    critical = False
    topic = "world.moves"
    kind = label = "PLAYER_MOVE"    # kind and alone are for plugins
    alone = False
    mark = b""                      # see Publication
    seq = sys.maxsize               # after all that was published in its tick

    def __init__(self, movement: Movement, players: dict[bytes, _Position], full: bool) -> None:
        self.players = players
        self.full = full
        self.moved = players                    # since the last tick
        self.size = 4 + 28 * len(players)       # packed
        self._movement = movement
        self._rendered: dict[str, bytes] = {}

    @property
    def count(self) -> int:
        """How many events it is."""
        return len(self.players)

    def measure(self) -> int:
        """Return how many bytes it takes packed."""
        return self.size

    def replaces(self, _older: Moves) -> Moves:
        """Return what a peer gets that has not been sent *older* yet: everything."""
        return self._movement.snapshot()

    def json(self) -> bytes:
        """Return the JSON object a client gets."""
        if "json" not in self._rendered:
            players = {_uuid_text(each): at for each, at in self.players.items()}
            self._rendered["json"] = _json_bytes(
                {"topic": self.topic, "payload": {"full": self.full, "players": players}})
        return self._rendered["json"]

    def envelope(self, form: str) -> bytes:
        """Return it for an EventBatch: packed when *form* is f32 or f64, else an event each."""
        if form not in self._rendered:
            wide = form == "f64"
            self._rendered[form] = self._events() if not form else _batch_of(
                type="PACKED_MOVEMENT", packed_movement=builtin_schema().PackedMovement(
                    pack_moves(self.players, wide=wide), wide, self.full))
        return self._rendered[form]

    def _events(self) -> bytes:
        # HOT: each tick (bench 15.plugins.marshal). All events are of one length; zeros are
        # written, too. Twin: the schema's own encoding, in the tests.
        before, (x_tag, y_tag, z_tag), row = _move_event()
        pack, ids = row.pack, self._movement.texts
        return b"".join([pack(before, ids[player], x_tag, x, y_tag, y, z_tag, z)
                         for player, (x, y, z) in self.players.items()])


class PlayerMoves(Moves):
    """The same for who hears of leaving otherwise: only those who moved, the newest of each."""

    __slots__ = ()

    def replaces(self, older: Moves) -> Moves:
        """Return what stands for *older*, which was not sent, and this; itself for what was lost.
        """
        players = self._movement.positions if older is self else older.players | self.players
        return PlayerMoves(self._movement, dict(players), full=False)

    def rows(self) -> list[tuple[bytes, _Position]]:
        """Return players and positions, without those who have left meanwhile: it was told."""
        here = self._movement.positions
        return [each for each in self.players.items() if each[0] in here]

    def pieces(self, form: str) -> list[tuple[int, bytes]]:
        """Return envelopes in parts, each with how many they are: 100, or a packed block."""
        players, step = self.players, _PACKED_A_PIECE if form else _MOVES_A_PIECE
        if len(players) <= step and players.keys() <= self._movement.positions.keys():
            return [(1 if form else len(players), self.envelope(form))]
        rows = self.rows()
        return [(1 if form else len(rows[at:at + step]), PlayerMoves(
            self._movement, dict(rows[at:at + step]), full=False).envelope(form))
            for at in range(0, len(rows), step)]


class Movement:
    """The latest position of every player, by 16-byte id."""

    __slots__ = ("positions", "texts", "moves", "coalesced", "_moved", "_left", "_snapshot")

    def __init__(self) -> None:
        self.positions: dict[bytes, _Position] = {}
        self.texts: dict[bytes, bytes] = {}     # players' ids as text
        self.moves = self.coalesced = 0     # accepted; replaced within their tick
        self._moved: dict[bytes, _Position] = {}
        self._left = False
        self._snapshot: Moves | None = None

    def move(self, player: bytes, x: float, y: float, z: float) -> None:
        """Set where a player is.

        Raises:
            UsageError: a coordinate that is no finite number below 3e38, or an id that is
                not 16 bytes.
        """
        position = _place(x, y, z)
        if position is None or not isinstance(player, bytes) or len(player) != 16:
            raise UsageError(f"can't move {player!r} to ({x!r}, {y!r}, {z!r}): "
                             "an id has 16 bytes, coordinates are finite numbers")
        if player not in self.positions:
            self.texts[player] = _uuid_text(player).encode()
        self.coalesced += player in self._moved
        self.positions[player] = self._moved[player] = position
        self.moves += 1

    def remove(self, player: bytes) -> None:
        """Forget a player; everybody is told with the next tick."""
        if self.positions.pop(player, None) is not None:
            self._moved.pop(player, None)
            del self.texts[player]
            self._left = True

    def snapshot(self) -> Moves:
        """Return where everybody is, shared by all who ask within a tick."""
        if self._snapshot is None:
            self._snapshot = Moves(self, dict(self.positions), full=True)
        return self._snapshot

    def take(self) -> Moves | None:
        """Return what changed since the last call, or None."""
        self._snapshot = None
        moved, left = self._moved, self._left
        self._moved, self._left = {}, False
        if left:
            everybody = self.snapshot()
            everybody.moved = moved
            return everybody
        return Moves(self, moved, full=False) if moved else None

    def for_plugins(self, moves: Moves) -> PlayerMoves | None:
        """Return what *moves*, which ``take`` returned, comes to for plugins.

        Where both are of the same players, what is encoded for one serves the other.
        """
        if not moves.moved:
            return None
        news = PlayerMoves(self, moves.moved, full=False)
        if not moves.full:
            news._rendered = moves._rendered
        return news


# -- objects that are told to those who are near --
#
# An object has layers: what is told of it within a radius, how often.  Who is inside a layer's
# zone gets its whole state once, then what changes, then a goodbye.
#
# Who sees what is exact after every tick, and costs what has moved.  For each observer it is
# known how much must happen before a pair can cross an edge: its slack, the distance to the
# nearest edge.  As long as observer and objects have not moved that far together since, nobody
# looks at the pair again.  Only a few are that close to an edge at any time.

_CHANNELS = ((50.0, 60.0, 30.0), (150.0, 30.0, 15.0), (300.0, 15.0, 5.0), (1000.0, 5.0, 1.0))
_MAX_CHANNELS = 8
_PRIORITIES = ("critical", "high", "normal", "low")
_ENTER, _EXIT, _EVENT = "gorc_zone_enter", "gorc_zone_exit", "gorc_event"
_OWN_EVENTS = ("enter", "exit", "update", "register", "unregister")
_FAR = 500.0                        # a radius that is warned about (systems.md 2.5)
_TURN = 64                          # parts of a channel's period, over which objects are spread
_AT_ONCE = 500                      # zones that are told in one tick without looking at bytes
_PLAN_NS = 100_000_000              # an order of what waits is good for so long
_MANY = 16                          # objects that are looked at one by one, each by who is near
_AHEAD = 40                         # ticks of movement that a survey is made for
_SHY, _HAIR = 1 - 1e-6, 1e-6       # what is as close to an edge is looked at sooner
_SAVED_S = 0.1                      # for so long an observer's bandwidth may be saved up
_first = operator.itemgetter(0)


class Layer:
    """What is told of an object on one channel: within *radius*, *hz* times a second at most.

    *properties* are names of attributes, and "position". Radius and rate are the channel's
    unless given: 0 critical 50, 60 Hz; 1 detailed 150, 30 Hz; 2 cosmetic 300, 15 Hz; 3 metadata
    1,000, 5 Hz (seed 002); 4 to 7 as 3. *priority*, "critical", "high", "normal" or "low", is
    the channel's, too; *compression* "zlib" packs large states for clients that speak protobuf.
    """

    __slots__ = ("channel", "radius", "hz", "properties", "priority", "compression")

    def __init__(self, channel: int, radius: float | None = None, hz: float | None = None,
                 properties: Iterable[str] = (), priority: str | int | None = None,
                 compression: str | None = None) -> None:
        if type(channel) is not int or not 0 <= channel < _MAX_CHANNELS:
            raise UsageError(f"a channel is 0 to {_MAX_CHANNELS - 1}, not {channel!r}")
        usual = _CHANNELS[min(channel, 3)]
        self.channel = channel
        self.radius = _positive(usual[0] if radius is None else radius, "radius", _MAX_COORDINATE)
        self.hz = _positive(usual[1] if hz is None else hz, "hz", 1000.0)
        if isinstance(properties, str) or not isinstance(properties, Iterable):
            raise UsageError(f"properties = ({properties!r},) with a comma, for one")
        self.properties = tuple(dict.fromkeys(properties))
        if not all(isinstance(each, str) for each in self.properties):
            raise UsageError(f"properties are names, not {self.properties!r}")
        rank: Any = min(channel, 3) if priority is None else priority
        rank = _PRIORITIES.index(rank) if rank in _PRIORITIES else rank
        if rank not in range(4):
            raise UsageError(f"priority is one of {', '.join(_PRIORITIES)}, not {priority!r}")
        self.priority = int(rank)
        if compression not in (None, "zlib"):
            raise UsageError(f'compression is "zlib" or None, not {compression!r}')
        self.compression = compression

    def __repr__(self) -> str:
        return f"Layer({self.channel}, {self.radius:g}, {self.hz:g}, {self.properties})"


def _positive(value: Any, name: str, most: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        raise UsageError(f"{name} = {value!r} must be a number above 0, {most:g} at most")
    return float(value)


def _check_layers(layers: Sequence[Any], name: str) -> None:
    if not all(isinstance(each, Layer) for each in layers):
        raise UsageError(f"{name}.layers are a tuple of Layer(...), not {layers!r}")
    if len({each.channel for each in layers}) < len(layers):
        raise UsageError(f"{name}.layers name a channel twice: {layers!r}")


def _rate(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UsageError(f"{name} = {value!r} must be 0 or more; 0 is no limit")
    return float(value)


DEFAULT_LAYERS = tuple(Layer(channel, properties=("position",)) for channel in range(4))


class Replicated:
    """A thing in a World: subclass it, name what is told of it on which channel, set attributes.

        class Asteroid(hl.Replicated):
            layers = (hl.Layer(0, 50, 60, ("position", "health")), hl.Layer(3, 400, 5, ("name",)))
            health = 100
            name = ""

    Without ``layers`` its position is told on the four default channels. ``type_name`` is the
    class's name unless given. To set an attribute marks it to be told; after changing a list
    or dict in place, say ``touch("name")``.
    """

    __slots__ = ("_replica",)
    type_name: ClassVar[str] = "Replicated"
    layers: ClassVar[Sequence[Layer]] = DEFAULT_LAYERS
    _replica: _Replica | None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Make one that is in no world yet."""
        self = super().__new__(cls)
        object.__setattr__(self, "_replica", None)
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.type_name in [base.__name__ for base in cls.__mro__[1:]]:
            cls.type_name = cls.__name__            # inherited, and never named
        if not (isinstance(cls.type_name, str) and _NAME.fullmatch(cls.type_name)):
            raise UsageError(f"type_name = {cls.type_name!r} must match {_NAME.pattern}")
        own = {"id", "position", "touch"}
        for name in own & {*vars(cls), *vars(cls).get("__annotations__", ())}:
            raise UsageError(f"{cls.__name__}.{name}: {name!r} is Replicated's own; where it is, "
                             "the world knows")
        cls.layers = (cls.layers,) if isinstance(cls.layers, Layer) else tuple(cls.layers)
        _check_layers(cls.layers, cls.__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        replica = self._replica
        if replica is None or name not in replica.routes or name == "position":
            return object.__setattr__(self, name, value)
        if replica.world.guard is not None:
            replica.world.guard(f"{self.type_name}.{name}", f"setattr, it, {name!r}, value")
        try:
            old = getattr(self, name, None)
        except Exception:                       # a property of the class; it may be better now
            old = None
        object.__setattr__(self, name, value)
        # what can be changed in place may have been
        if not (value.__class__ in _PLAIN and old.__class__ is value.__class__ and old == value):
            replica.mark(name)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        if self._replica is not None and name in self._replica.routes:
            self._replica.mark(name)            # the class may have a value of its own

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by a protocol that makes new ones by ``__new__``."""
        return super().__reduce_ex__(max(2, protocol))

    def __getstate__(self) -> Any:
        """Return what a copy begins with: it is in no world."""
        state = super().__getstate__()
        if isinstance(state, tuple):
            state[1].pop("_replica", None)
        return state

    def __repr__(self) -> str:
        place = f"{self.id} at {self.position}" if self._replica is not None else "in no world"
        return f"<{self.type_name} {place}>"

    def touch(self, *names: str) -> None:
        """Tell of properties that were changed in place, or are computed from others that were.

        Raises:
            UsageError: no layer of it has such a property.
        """
        if (replica := self._replica) is not None:
            if replica.world.guard is not None:
                replica.world.guard(f"{self.type_name}.touch", "it.touch, ...")
            for name in names:
                if name not in replica.routes:
                    raise UsageError(f"no layer of {self.type_name} has a property {name!r}"
                                     f"{_did_you_mean(name, replica.routes)}")
                replica.mark(name)

    @property
    def id(self) -> str:
        """Its id in the world, a UUID; empty outside."""
        return self._replica.id if self._replica is not None else ""

    @property
    def position(self) -> _Position | None:
        """Where it is; None outside a world. Set it to move it."""
        return self._replica.at if self._replica is not None else None

    @position.setter
    def position(self, position: Sequence[float]) -> None:
        if self._replica is None:
            raise StateError(f"this {self.type_name} is in no world, and so has no position; "
                             "world.add(it, x, y, z)")
        try:
            x, y, z = position
        except (TypeError, ValueError):
            raise UsageError(f"position = {position!r} must be x, y and z") from None
        self._replica.world.move(self._replica.id, x, y, z)


_COUNTED = ("updates", "bytes", "transitions", "left_out", "dropped")
_PUT_OFF = ("coalesced", "left_out", "dropped")     # what an observer was not told at once
_PLAIN = frozenset({int, float, str, bool, bytes, type(None)})


class _Profile(NamedTuple):
    """What a distance means to a set of layers, by where it falls among their edges."""

    edges: tuple[float, ...]        # -inf, where zones begin and end, inf
    enter: tuple[int, ...]          # by bisect_left: the channels whose zones it is in, as bits
    stay: tuple[int, ...]           # and those that are not left yet
    reach: float

    @classmethod
    def of(cls, layers: Sequence[Layer], hysteresis: float) -> _Profile:
        """Return the profile of *layers*: in at d <= r, out at d > r * (1 + hysteresis)."""
        ends = {each: each.radius * (1 + hysteresis) for each in layers}
        edges = sorted({-math.inf, math.inf, *ends.values(), *(each.radius for each in layers)})
        enter, stay = (tuple(sum([1 << layer.channel for layer, end in zone.items() if end >= edge])
                             for edge in edges)
                       for zone in ({each: each.radius for each in layers}, ends))
        return cls(tuple(edges), enter, stay, max(ends.values(), default=0.0))


_NOWHERE = _Profile.of((), 0.0)


class _Plan:
    """What objects with the same layers have in common."""

    __slots__ = ("layers", "profile", "routes", "rates", "uses")

    def __init__(self, layers: tuple[Layer, ...], hysteresis: float) -> None:
        self.layers = layers
        self.profile = _Profile.of(layers, hysteresis)
        # property -> the layers that tell it, by number, and its bit there
        self.routes: dict[str, tuple[tuple[int, int], ...]] = {}
        for number, layer in enumerate(layers):
            for bit, name in enumerate(layer.properties):
                self.routes[name] = (*self.routes.get(name, ()), (number, 1 << bit))
        self.rates = [(each.channel, each.hz) for each in layers]
        self.uses = 0


class _Share:
    """One layer of one object: who sees it, and what has changed since it was told."""

    __slots__ = ("replica", "layer", "bit", "viewers", "changed", "since_ns", "wheel", "slots",
                 "slot", "place", "updates", "bytes", "transitions", "left_out", "dropped")

    def __init__(self, replica: _Replica, layer: Layer, wheel: _Wheel, slot: int) -> None:
        self.replica, self.layer = replica, layer
        self.bit = 1 << layer.channel
        self.viewers: dict[_Observer, None] = {}
        self.changed = 0                        # of layer.properties, as bits
        self.since_ns = 0                       # when the first of them was changed
        self.wheel, self.slots, self.slot = wheel, wheel.slots, slot
        self.place = 0                          # the bit of its position
        if "position" in layer.properties:
            self.place = 1 << layer.properties.index("position")
        self.updates = self.bytes = self.transitions = self.left_out = self.dropped = 0

    @property
    def whole(self) -> int:
        """The bits of all its properties."""
        return (1 << len(self.layer.properties)) - 1

    def stats(self) -> dict[str, int]:
        """Return its counters."""
        return {"subscribers": len(self.viewers),
                **{name: getattr(self, name) for name in _COUNTED}}

    def count(self, update: Update, times: int = 1) -> None:
        """Count an update that is told, or is not."""
        self.add("updates", times)
        self.add("bytes", times * (update.size or update.measure()))

    def drop(self, update: Update) -> None:
        """Count an event that is not told after all."""
        self.count(update, -1)
        self.add("dropped", 1)

    def add(self, name: str, count: int) -> None:
        """Add to a counter, and to the channel's."""
        for each in (self, self.wheel):
            setattr(each, name, getattr(each, name) + count)
        if not self.wheel.uses:                 # it is summed up already
            self.replica.world._past[self.wheel.channel, name] += count

    def show(self, observer: _Observer) -> None:
        """Tell an observer from now on."""
        self.viewers[observer] = None
        self.wheel.subscribers += 1
        if len(self.viewers) == 1:
            self.replica.note_viewers()

    def hide(self, observer: _Observer) -> None:
        """Tell an observer no more."""
        if observer in self.viewers:
            del self.viewers[observer]
            self.wheel.subscribers -= 1
            if not self.viewers:
                self.replica.note_viewers()

    def data(self, changed: int) -> dict[str, Any]:
        """Return properties by name; without those that raise, which are the class's own."""
        obj, found = self.replica.obj, {}
        for number, name in enumerate(self.layer.properties):
            if changed >> number & 1:
                try:
                    found[name] = getattr(obj, name)
                except Exception as error:
                    self.replica.world.complain(f"{obj.type_name}.{name} raised", error)
        return found


class _Replica:
    """An object in a world."""

    __slots__ = ("id", "uuid", "obj", "world", "at", "region", "plan", "profile", "shares",
                 "routes", "moving", "marked", "seers", "_head", "_place")

    def __init__(self, world: World, obj: Replicated, at: _Position,
                 layers: tuple[Layer, ...]) -> None:
        self.uuid = os.urandom(16)
        self.id = _uuid_text(self.uuid)
        self.obj, self.world, self.at = obj, world, at
        self.region: _Region | None = None
        self.plan = plan = world._use(layers, obj)
        self.profile, self.routes = plan.profile, plan.routes
        slot = world._next_slot()
        self.shares = tuple([_Share(self, layer, world._wheels[rate], slot)
                             for layer, rate in zip(layers, plan.rates)])
        self.moving: tuple[tuple[_Share, int], ...] = ()    # where its position is told, to some
        self.marked = False                     # there it is known that it has moved
        self.seers: dict[_Observer, None] = {}  # who has it in a zone
        self._head = b""
        self._place: tuple[Any, bytes] = (None, b"")

    def mark(self, name: str) -> None:
        """Note that a property is to be told."""
        now_ns = self.world.clock()
        for number, bit in self.routes[name]:
            share = self.shares[number]
            if share.viewers:
                if not share.changed:
                    share.slots[share.slot].append(share)
                    share.since_ns = now_ns
                share.changed |= bit

    def note_viewers(self) -> None:
        """Note which channels with its position have viewers."""
        self.moving = tuple([(self.shares[number], bit) for number, bit in
                             self.routes.get("position", ()) if self.shares[number].viewers])
        self.marked = False

    def share(self, channel: Any) -> _Share:
        """Return what is told on *channel*."""
        for share in self.shares:
            if share.layer.channel == channel and type(channel) is int:
                return share
        raise UsageError(f"a {self.obj.type_name} has the channels "
                         f"{[each.layer.channel for each in self.shares]}, not {channel!r}")

    @property
    def head(self) -> bytes:
        """How all that is told of it begins in JSON."""
        if not self._head:
            self._head = b'"object_id":"%b","object_type":"%b","channel":' % (
                self.id.encode(), self.obj.type_name.encode())
        return self._head

    @property
    def place(self) -> bytes:
        """Its position as JSON."""
        place = self._place
        if place[0] is not self.at:
            place = self._place = self.at, b"[%r,%r,%r]" % self.at
        return place[1]


class Update:
    """What a zone has to tell in one tick, rendered at most once per form for all who see it.

    ``type`` is "gorc_zone_enter", "gorc_zone_exit" or "gorc_event"; of these ``event`` is
    "update" for what has changed, else the name given to ``emit_gorc``.
    """

    __slots__ = ("share", "type", "event", "changed", "size", "critical", "stamp", "since_ns",
                 "at", "lag", "_data", "_body", "_json", "_envelope")

    key = None                      # see Outbox: the World knows what replaces what
    label, count = "GORC", 1
    topic = "gorc"
    seq = sys.maxsize
    mark = b""

    def __init__(self, share: _Share, kind: str, event: str, data: Any, stamp: bytes,
                 changed: int = 0, since_ns: int = 0) -> None:
        self.share = share
        self.type = kind
        self.event = event
        self.changed = changed                  # which properties, as bits
        self.stamp = stamp                      # Unix time, as text
        self.since_ns = since_ns                # of the first change
        self.at = share.replica.at
        self.lag = (share.layer.channel, since_ns) if since_ns and changed else None
        self.critical = False
        self.size = 0
        self._data = data
        self._json = self._envelope = b""

    @property
    def data(self) -> Any:
        """A zone's state by property, those that have changed, or an event's data."""
        return {"position": self.at} if self.changed and self._data is None else self._data

    object_id = property(lambda self: self.share.replica.id)
    object_type = property(lambda self: self.share.replica.obj.type_name)
    channel = property(lambda self: self.share.layer.channel)

    def __repr__(self) -> str:
        return f"Update({self.type}, {self.object_type} {self.channel} {self.event} {self.data!r})"

    def measure(self) -> int:
        """Render it as JSON, whose length is its ``size``; return that."""
        if not self._json:
            replica, channel, kind = self.share.replica, self.share.layer.channel, self.type
            head, stamp = replica.head, self.stamp
            if self._data is None and self.changed:             # most are of this kind
                self._body = b'{"position":%b}' % replica.place     # shared by its channels
            else:
                self._body = self._safe_json() if kind is not _EXIT else b""
            if kind is _EVENT:
                self._json = b'{"type":"gorc_event","event":"%b",%b%d,"data":%b,"timestamp":%b}' % (
                    self.event.encode(), head, channel, self._body, stamp)
            elif kind is _ENTER:
                self._json = (b'{"type":"gorc_zone_enter",%b%d,"position":%b,"zone_data":%b,'
                              b'"timestamp":%b}' % (head, channel, replica.place, self._body,
                                                    stamp))
            else:
                self._json = b'{"type":"gorc_zone_exit",%b%d,"timestamp":%b}' % (
                    head, channel, stamp)
            self.size = len(self._json)
        return self.size

    def _safe_json(self) -> bytes:
        """Return the data as JSON, without those properties that can't be."""
        try:
            return _json_bytes(self._data)
        except UsageError as error:
            if self.type is _EVENT and self.event != "update":
                raise
            fit = {}
            for name, value in self._data.items():
                with contextlib.suppress(UsageError):
                    _json_bytes(value)
                    fit[name] = value
            unfit = ", ".join(self._data.keys() - fit.keys())
            self.share.replica.world.complain(f"{self.object_type}.{unfit}: {error}")
            self._data = fit
            return _json_bytes(fit)

    def json(self) -> bytes:
        """Return the JSON object a client gets."""
        self.measure()
        return self._json

    def html(self) -> bytes:
        """Return what a client of HTML gets: JSON that no browser takes for elements."""
        return _inert(self.json())

    def envelope(self, _form: str) -> bytes:
        """Return it as one member of an encoded EventBatch."""
        if not self._envelope:
            self.measure()
            schema, body, size = builtin_schema(), self._body, 0
            if self.share.layer.compression and (
                    len(body) >= self.share.replica.world.compress_above_bytes > 0):
                packed = zlib.compress(body)
                if len(packed) < len(body):
                    body, size = packed, len(body)
            about = {"object_id": self.object_id, "object_type": self.object_type,
                     "channel": self.channel}
            if self.type is _EVENT:
                self._envelope = _batch_of(type="GORC_EVENT", gorc_event=schema.GorcEvent(
                    **about, event=self.event, data=body, original_size=size))
            elif self.type is _ENTER:
                self._envelope = _batch_of(type="ZONE_ENTER", zone_enter=schema.ZoneEnter(
                    **about, data=body, original_size=size, position=schema.Vec3(*self.at)))
            else:
                self._envelope = _batch_of(type="ZONE_EXIT", zone_exit=schema.ZoneExit(**about))
        return self._envelope


class ZoneMoves:
    """The positions of one channel that one observer is told in one tick, as one packed block."""

    __slots__ = ("players", "wide", "count", "size", "critical")

    key = None
    label = "GORC"
    topic = "gorc"
    seq = sys.maxsize
    mark = b""

    def __init__(self, players: dict[bytes, _Position], wide: bool) -> None:
        self.players = players
        self.wide = wide
        self.count = len(players)
        self.size = 4 + (40 if wide else 28) * len(players)
        self.critical = False

    def measure(self) -> int:
        """Return how many bytes it takes."""
        return self.size

    def envelope(self, _form: str) -> bytes:
        """Return it as one member of an encoded EventBatch."""
        return _batch_of(type="GORC_MOVES", packed_movement=builtin_schema().PackedMovement(
            pack_moves(self.players, wide=self.wide), self.wide, False))


class ObjectEvent(Event):
    """An event of a replicated object: ``object`` and ``channel`` say of which.

    ``client`` is whose event it is, or who entered or left; ``told`` how many were told of it.
    """

    __slots__ = ("object", "channel", "told")

    def __init__(self, key: str, data: Any, client: Any, obj: Replicated, channel: int) -> None:
        super().__init__(key, data, client)
        self.object = obj
        self.channel = channel
        self.told = 0


_Due = tuple[tuple[float, float], _Share]       # how urgent: importance less age, distance


class _Terms:
    """How much an observer may be told."""

    __slots__ = ("bytes_per_s", "allowance", "crossings", "fed_ns")

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None       # None: as the world says
        self.allowance = self.crossings = math.inf  # bytes, crossings that it may be told now
        self.fed_ns = 0                             # when these were added to

    def spend(self, size: int, rate: float) -> None:
        """Take bytes; what is told without asking takes a second's at most."""
        if rate:
            self.allowance = max(self.allowance - size, -rate)


class _Observer:
    """Somebody who sees."""

    __slots__ = ("key", "at", "region", "masks", "inbox", "due", "debts", "plan", "planned_ns",
                 "path", "limit", "looked", "stirs", "thresholds", "who", "surveyed_tick", "spent",
                 "terms", "waits_since_ns", "updates", "bytes", "transitions", "coalesced",
                 "left_out", "dropped")

    def __init__(self, key: Any, at: _Position, terms: _Terms) -> None:
        self.key, self.at, self.terms = key, at, terms
        self.region: _Region | None = None
        self.masks: dict[_Replica, int] = {}        # in which zones it is, exactly
        self.inbox: list[Update] = []               # this tick's
        # what it is to be told and was not, the oldest first.  Zones it has entered or left,
        # since when; of zones it is in [properties as bits, when changed, since when owed]
        self.due: dict[_Share, int] = {}
        self.debts: dict[_Share, list[int]] = {}
        # the order to pay them in, crossings and updates, the next one last; and when it was made
        self.plan: tuple[list[_Due], list[_Due]] = ([], [])
        self.planned_ns = -1 << 62
        # its survey: pairs that may cross an edge, by how far the two must have moved for it
        self.path = 0.0                             # how far it has moved, less what objects had
        self.limit = -math.inf                      # the movement that the survey is good for
        self.looked = self.stirs = 0                # what had moved when pairs were looked at; own
        self.thresholds: list[float] = []
        self.who: list[_Replica] = []               # the object of each threshold
        self.surveyed_tick = self.spent = 0         # when; pairs looked at since, less its cost
        self.waits_since_ns = 0                     # when the first came that waits
        self.updates = self.bytes = self.transitions = 0
        self.coalesced = self.left_out = self.dropped = 0

    def owe(self, share: _Share, changed: int, since_ns: int, now_ns: int) -> None:
        """Keep in mind an update that it is not told now."""
        if (debt := self.debts.get(share)) is not None:
            debt[0] |= changed
            self.coalesced += 1
        else:
            self.debts[share] = [changed, since_ns, now_ns]
            self.left_out += 1
            share.add("left_out", 1)

    def stats(self) -> dict[str, Any]:
        """Return its counters."""
        return {"sees": sum([mask.bit_count() for mask in list(self.masks.values())]),
                "owed": len(self.debts) + len(self.due),
                "coalesced": self.coalesced, **{name: getattr(self, name) for name in _COUNTED}}


class _Wheel:
    """Whose turn it is on one channel at one rate: objects are spread over its period."""

    __slots__ = ("channel", "hz", "slowest_hz", "uses", "slots", "subscribers", "updates",
                 "bytes", "transitions", "left_out", "dropped", "_clock", "_done")

    def __init__(self, channel: int, hz: float) -> None:
        self.channel, self.hz = channel, hz
        self.slowest_hz = min(hz, _CHANNELS[min(channel, 3)][2])
        self.uses = self.subscribers = 0            # plans with it, viewers of all its objects
        self.updates = self.bytes = self.transitions = self.left_out = self.dropped = 0
        self.slots: list[list[_Share]] = [[] for _ in range(_TURN)]
        self._clock = 0.0
        self._done = -_TURN                         # so that the first turn is a whole one

    def turn(self, seconds: float, load: float, usual_s: float) -> list[_Share]:
        """Return who has something to tell and may, after so many seconds.

        *usual_s* are those of most ticks: what has its turn about once a tick has it with each,
        however uneven they are.
        """
        rate = max(self.slowest_hz, self.hz * (1 - 0.5 * load))
        self._clock += seconds * _TURN * rate
        due = int(self._clock) - self._done
        if due > _TURN or rate * usual_s > 15 / 16:
            due, self._done = _TURN, int(self._clock) - _TURN
        turn = []
        for number in range(self._done, self._done + due):
            if self.slots[number % _TURN]:
                turn += self.slots[number % _TURN]
                self.slots[number % _TURN].clear()
        self._done += due
        return turn


class World:
    """Objects and observers in space, and who is told what of them (seed 002's GORC).

        world = hl.World()
        rock = Asteroid()
        world.add(rock, 10, 0, 0)
        world.observe("anna", 0, 0, 0)
        for observer, update in world.tick(now_ns):     # a gorc_zone_enter for each zone
            send(observer, update.json())

    A zone is entered at ``d <= radius`` and left beyond ``radius * (1 + hysteresis)``, in three
    dimensions; ``seen_by`` is exact after every tick. *crossings_per_s* limits how many enters
    and exits an observer is told, ``bytes_per_s`` how much in all, the most important and
    nearest first (0: no limit); what is left out is told later, as it is then. With
    ``adaptive``, rates sink with ``load`` (0 to 1) to half of theirs (systems.md 2.5).

    Cost of a tick: grows with what has moved or changed, not with what there is.
    """

    __slots__ = ("hysteresis", "_crossings_per_s", "_bytes_per_s", "adaptive", "load", "batch",
                 "wait_ns", "max_bytes", "compress_above_bytes", "clock", "guard", "urgent",
                 "watched", "crossed", "lags", "made", "quiet", "warnings", "ticks", "complaints",
                 "_space", "_audience", "_replicas", "_observers", "_moved", "_moved_since_ns",
                 "_restless", "_drift", "_stirs", "_reach", "_plans", "_wheels", "_slot",
                 "_last_ns", "_period_ns", "_usual_s", "_stamp", "_remade", "_past", "_gone",
                 "_terms", "_complained_ns", "_surveys")

    def __init__(self, min_region: float = 100.0, max_region: float = 1000.0, split: int = 50,
                 merge: int = 10, hysteresis: float = 0.05,
                 crossings_per_s: float | None = None, *,
                 clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.hysteresis = self._bytes_per_s = self.load = 0.0
        self.crossings_per_s = crossings_per_s or 0.0
        self.adaptive = False
        self.batch = self.wait_ns = 0           # updates wait for so many, or so long
        self.max_bytes = sys.maxsize            # for one observer in one tick
        self.compress_above_bytes = 512
        self.clock = clock
        self.guard: Callable[..., object] | None = None         # raises in a strange thread
        self.urgent: Callable[[Any, Update], object] | None = None  # takes critical events at once
        self.watched = False                    # crossed is wanted
        self.crossed: list[tuple[str, _Replica, int, Any]] = []     # event, object, channel, who
        # how often this tick tells of changes, by (channel, when they were made)
        self.lags: Counter[tuple[int, int] | None] = Counter()
        self.made = 0                           # updates, whoever gets them
        self.quiet = True                       # it is empty, and everybody knows
        self.warnings: dict[str, str] = {}      # by type
        self.ticks = self.complaints = 0
        self._replicas: dict[str, _Replica] = {}
        self._observers: dict[Any, _Observer] = {}
        self._moved: dict[_Replica, _Position] = {}     # since the last tick, and from where
        self._moved_since_ns = 0
        self._restless: dict[_Replica, None] = {}       # to be looked at one by one
        self._drift = 0.0                       # how far any object has moved, without the restless
        self._stirs = 0                         # in how many ticks any did
        self._reach = 0.0                       # of the largest zone
        self._plans: dict[tuple[Layer, ...], _Plan] = {}
        self._wheels: dict[tuple[int, float], _Wheel] = {}
        self._slot = self._surveys = 0
        self._last_ns: int | None = None        # when the last tick was
        self._period_ns = 0                     # and how long after the one before
        self._usual_s = 0.0                     # that, on average
        self._stamp = b"0"
        self._remade: dict[tuple[_Share, int | str], Update] = {}   # this tick's, by what they tell
        self._past: Counter[tuple[int, str]] = Counter()        # counters of wheels that have gone
        self._gone: Counter[str] = Counter()            # and of observers
        self._terms: dict[Any, _Terms] = {}             # of those who do not observe at the moment
        self._complained_ns = -1 << 62
        self.tune(min_region, max_region, split, merge, hysteresis)

    def tune(self, min_region: float, max_region: float, split: int, merge: int,
             hysteresis: float) -> None:
        """Change the regions' settings, and the hysteresis; everything stays where it is."""
        self._guard("tune")
        if not isinstance(hysteresis, int | float) or not 0 <= hysteresis <= 1:
            raise UsageError(f"hysteresis = {hysteresis!r} must be 0 to 1; 0.05 is 5 %")
        space, audience = (Space(min_region, max_region, split, merge) for _ in range(2))
        for index, entries in ((space, self._replicas), (audience, self._observers)):
            for entry in entries.values():
                index.add(entry)
        self._space, self._audience = space, audience
        if hysteresis != self.hysteresis:
            self.hysteresis = float(hysteresis)
            for plan in self._plans.values():
                plan.profile = _Profile.of(plan.layers, self.hysteresis)
                self._reach = max(self._reach, plan.profile.reach)
            for replica in self._replicas.values():
                replica.profile = replica.plan.profile
            self._survey_anew()

    @property
    def crossings_per_s(self) -> float:
        """How many enters and exits an observer is told a second at most; 0: any number."""
        return self._crossings_per_s

    @crossings_per_s.setter
    def crossings_per_s(self, rate: float) -> None:
        self._crossings_per_s = _rate(rate, "crossings_per_s")

    @property
    def bytes_per_s(self) -> float:
        """How much an observer is told, if ``limit`` says nothing else; 0: any amount."""
        return self._bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, rate: float) -> None:
        self._bytes_per_s = _rate(rate, "bytes_per_s")

    # -- objects --

    def __len__(self) -> int:
        return len(self._replicas)

    def __contains__(self, what: object) -> bool:
        key = what.id if isinstance(what, Replicated) else what
        return isinstance(key, str) and key in self._replicas

    def __iter__(self) -> Iterator[Replicated]:
        return iter([each.obj for each in self._replicas.values()])

    def get(self, id: str) -> Replicated | None:
        """Return the object with an id, or None."""
        replica = self._replicas.get(id)
        return replica.obj if replica is not None else None

    def _find(self, what: str | Replicated) -> _Replica:
        key = what.id if isinstance(what, Replicated) else what
        replica = self._replicas.get(key) if isinstance(key, str) else None
        if replica is None:
            raise UsageError(f"{what!r} is not in this world" if isinstance(what, Replicated) else
                             f"there is nothing with the id {what!r} in this world")
        return replica

    def _guard(self, what: str) -> None:
        if self.guard is not None:
            self.guard(f"app.world.{what}")

    def add(self, obj: Replicated, x: float, y: float, z: float,
            channels: Iterable[int] | None = None) -> str:
        """Put an object somewhere; return its id. *channels* are those of its layers it has here.

        Raises:
            UsageError: it is in a world already, has not the channels or not the properties its
                layers name, or coordinates that are not finite.
        """
        self._guard("add")
        if not isinstance(obj, Replicated):
            raise UsageError(f"{obj!r} is not an instance of a subclass of hl.Replicated")
        if obj._replica is not None and obj._replica.obj is obj:
            raise UsageError(f"this {obj.type_name} is in a world already, as {obj.id}")
        at = _must_be_place(x, y, z, f"a {obj.type_name}")
        layers = self._layers_of(obj, channels)
        for layer in layers:
            for name in layer.properties:
                if not hasattr(obj, name) or name.startswith("_") or callable(getattr(obj, name)):
                    raise UsageError(f"layer {layer.channel} of {obj.type_name} names {name!r}; it "
                                     f"has no such property{_did_you_mean(name, dir(obj))}")
        replica = _Replica(self, obj, at, layers)
        object.__setattr__(obj, "_replica", replica)
        self._replicas[replica.id] = replica
        self.quiet = False
        self._space.add(replica)
        self._restless[replica] = None
        if self.watched and layers:
            self.crossed.append(("register", replica, layers[0].channel, None))
        return replica.id

    def _layers_of(self, obj: Replicated, channels: Iterable[int] | None) -> tuple[Layer, ...]:
        _check_layers(obj.layers, obj.type_name)
        layers = tuple(sorted(obj.layers, key=operator.attrgetter("channel")))
        if channels is not None:
            known = [each.channel for each in layers]
            wanted = [*channels] if isinstance(channels, Iterable) else [channels]
            if any(type(each) is not int or each not in known for each in wanted):
                raise UsageError(f"a {obj.type_name} has the channels {known}, not {wanted}")
            layers = tuple(each for each in layers if each.channel in wanted)
        far = [each for each in layers if each.radius > _FAR]
        if far and obj.type_name not in self.warnings:
            self.warnings[obj.type_name] = (
                f"channel {far[0].channel} of {obj.type_name} reaches {far[0].radius:g} m; beyond "
                f"{_FAR:g} m there is much to tell to many")
            usual = all(each.radius <= _CHANNELS[min(each.channel, 3)][0] for each in far)
            _log.log(logging.DEBUG if usual else logging.WARNING, "%s",
                     self.warnings[obj.type_name])
        return layers

    def move(self, what: str | Replicated, x: float, y: float, z: float) -> None:
        """Move an object, given or by its id; of several moves in a tick the last counts.

        Raises:
            UsageError: it is not here, or the coordinates are not finite numbers below 3e38.
        """
        # HOT: once per object per tick (bench 11.replication)
        if self.guard is not None:
            self.guard("app.world.move")
        replica = self._replicas.get(what) if what.__class__ is str else None
        if replica is None:
            replica = self._find(what)
        at = _place(x, y, z) or _must_be_place(x, y, z, f"{replica.obj.type_name} {replica.id}")
        if replica not in self._moved:
            if not self._moved:
                self._moved_since_ns = self.clock()
            self._moved[replica] = replica.at
        replica.at = at
        self._space.settle(replica)

    def remove(self, what: str | Replicated) -> None:
        """Take an object out; who sees it is told that it has left, with the next tick.

        Raises:
            UsageError: it is not here.
        """
        self._guard("remove")
        replica = self._find(what)
        for share in replica.shares:
            if share.changed and share.viewers:     # its last words
                self.say(self._event(share, "update", share.data(share.changed), False))
        if replica.id not in self._replicas:        # a property of its own was quicker
            return
        for observer in list(replica.seers):
            self._cross(observer, replica, observer.masks[replica], 0)
        del self._replicas[replica.id]
        self._space.remove(replica)
        self._moved.pop(replica, None)
        self._restless.pop(replica, None)
        for share in replica.shares:
            if share.changed:
                share.slots[share.slot].remove(share)
        self._let_go(replica.plan)
        replica.profile = _NOWHERE              # surveys may know it still
        object.__setattr__(replica.obj, "_replica", None)
        if self.watched and replica.shares:
            self.crossed.append(("unregister", replica, replica.shares[0].layer.channel, None))

    def nearby(self, x: float, y: float, z: float, radius: float) -> list[str]:
        """Return the ids of all objects within *radius*.

        Raises:
            UsageError: coordinates or a radius that are not finite, or a negative radius.
        """
        if not isinstance(radius, int | float) or not 0 <= radius < _MAX_COORDINATE:
            raise UsageError(f"radius = {radius!r} must be 0 or more, and finite")
        at = _must_be_place(x, y, z, "somebody who looks around")
        return [each.id for each in self._space.nearby(*at, radius)]

    def emit(self, what: str | Replicated, channel: int, name: str, data: Any = None) -> int:
        """Tell an event of an object to everybody in a channel's zone; return to how many.

        Those of critical layers are told at once where the engine runs, others with the next tick;
        these are dropped for observers who can't take them then.

        Raises:
            UsageError: no such object or channel, a name that the world uses itself or that
                is malformed, or data that can't be JSON.
        """
        self._guard("emit")
        return self.say(self.prepare(what, channel, name, data))

    def prepare(self, what: str | Replicated, channel: int, name: str, data: Any) -> Update:
        """Return an event that can be told; raises as ``emit``."""
        share = self._find(what).share(channel)
        if not (isinstance(name, str) and _NAME.fullmatch(name)) or name in _OWN_EVENTS:
            raise UsageError(f"{name!r} can't be an event: names match {_NAME.pattern}, and "
                             f"{', '.join(_OWN_EVENTS)} are the world's own")
        return self._event(share, name, data, self.urgent is not None)

    def _event(self, share: _Share, name: str, data: Any, urgent: bool) -> Update:
        update = Update(share, _EVENT, name, data, b"%.3f" % time.time())
        update.critical = urgent and share.layer.priority == 0
        update.measure()
        return update

    def say(self, update: Update) -> int:
        """Tell an event to all in its zone who know of it, at once if it is critical.

        Returns: to how many.
        """
        share = update.share
        viewers = list(share.viewers)           # one who is too slow for it may be sent away
        for observer in viewers:
            share.count(update)
            if update.critical:
                observer.updates += 1
                observer.bytes += update.size
                observer.terms.spend(update.size, self._rate_of(observer))
                self.urgent(observer.key, update)           # type: ignore[misc]
            else:
                observer.inbox.append(update)
        for observer in share.replica.seers:    # those who were not told yet that it is there
            if share in observer.due:
                observer.dropped += 1
                share.add("dropped", 1)
        return len(viewers)

    # -- observers --

    def observe(self, observer: Any, x: float, y: float, z: float) -> None:
        """Let somebody see from somewhere: *observer* is any key; again, to move it.

        Raises:
            UsageError: coordinates that are not finite.
        """
        self._guard("observe")
        if not isinstance(observer, Hashable):
            raise UsageError(f"{observer!r} can't be an observer: a key is hashable")
        if observer in self._observers:
            return self.move_observer(observer, x, y, z)
        at = _must_be_place(x, y, z, f"observer {observer!r}")
        entry = _Observer(observer, at, self._terms.pop(observer, _Terms()))
        self._observers[observer] = entry
        self._audience.add(entry)

    def move_observer(self, observer: Any, x: float, y: float, z: float) -> None:
        """Move an observer.

        Raises:
            UsageError: it does not observe, or coordinates that are not finite.
        """
        if self.guard is not None:
            self.guard("app.world.move_observer")
        entry = self._observer(observer)
        at = _place(x, y, z) or _must_be_place(x, y, z, f"observer {observer!r}")
        entry.path += math.dist(entry.at, at)       # a long way makes for a new survey
        entry.stirs += 1
        entry.at = at
        self._audience.settle(entry)

    def _observer(self, key: Any) -> _Observer:
        entry = self._observers.get(key) if isinstance(key, Hashable) else None
        if entry is None:
            raise UsageError(f"{key!r} does not observe this world; a client does once it has told "
                             "where it is (movement:position), others by observe(key, x, y, z)")
        return entry

    def unobserve(self, observer: Any) -> None:
        """Let an observer go, without a word; harmless if it does not observe."""
        self._guard("unobserve")
        self.blind(observer)
        self._terms.pop(observer, None)

    def blind(self, observer: Any) -> None:
        """Do the same, but its limits stay as they are, should it observe again."""
        entry = self._observers.pop(observer, None)
        if entry is None:
            return
        self._terms[observer] = entry.terms
        self._gone.update({name: getattr(entry, name) for name in _PUT_OFF})
        self._audience.remove(entry)
        for each in entry.inbox:
            each.share.count(each, -1)
        for replica, mask in entry.masks.items():
            del replica.seers[entry]
            for share in replica.shares:
                share.hide(entry)
                if mask & share.bit:
                    share.add("transitions", 1)
                    if self.watched:
                        self.crossed.append(("exit", replica, share.layer.channel, observer))

    def place_of(self, observer: Any) -> _Position:
        """Return where an observer is."""
        return self._observer(observer).at

    def observes(self, observer: Any) -> bool:
        """Whether somebody sees this world."""
        return observer in self._observers

    def seen_by(self, observer: Any) -> set[tuple[str, int]]:
        """Return the (id, channel) of all zones an observer is in, as of the last tick."""
        entry = self._observer(observer)
        return {(replica.id, share.layer.channel) for replica, mask in list(entry.masks.items())
                for share in replica.shares if mask & share.bit}

    def must_have(self, what: str | Replicated, channel: Any) -> None:
        """Raise UsageError if an object has not such a channel here."""
        self._find(what).share(channel)

    def sees(self, observer: Any, what: str | Replicated, channel: int) -> bool:
        """Whether an observer is in the zone of a channel of an object."""
        entry = self._observers.get(observer)
        replica = self._find(what)
        return entry is not None and bool(
            entry.masks.get(replica, 0) & replica.share(channel).bit)

    def limit(self, observer: Any, bytes_per_s: float | None) -> None:
        """Give one observer a bandwidth of its own; None: the world's, 0: any.

        It may begin to observe later.
        """
        self._guard("limit")
        rate = None if bytes_per_s is None else _rate(bytes_per_s, "bytes_per_s")
        if not isinstance(observer, Hashable):
            raise UsageError(f"{observer!r} can't be an observer: a key is hashable")
        entry = self._observers.get(observer)
        terms = entry.terms if entry is not None else self._terms.setdefault(observer, _Terms())
        terms.bytes_per_s = rate

    def _rate_of(self, observer: _Observer) -> float:
        own = observer.terms.bytes_per_s
        return self._bytes_per_s if own is None else own

    # -- ticks --

    def tick(self, now_ns: int) -> list[tuple[Any, Update]]:
        """Return what every observer is to be told now, in order; *now_ns* never goes back."""
        return [(observer.key, update) for observer, updates in self.gather(now_ns)
                for update in updates]

    def gather(self, now_ns: int, ready: Callable[[Any], bool] | None = None,
               ) -> list[tuple[_Observer, list[Update]]]:
        """Do the same for who sends: by observer, and only for those who are *ready*.

        The others are told what they have missed, as it is then, when they are.
        """
        self._guard("tick")
        last_ns = now_ns if self._last_ns is None else self._last_ns
        self._last_ns, self._period_ns = now_ns, max(0, now_ns - last_ns)
        self.ticks += 1
        self._usual_s += (self._period_ns / 1e9 - self._usual_s) * max(
            0.01, 1 / max(1, self.ticks - 1))
        self._stamp = b"%.3f" % time.time()
        self._remade.clear()
        self.lags.clear()
        self._note_moves()
        self._take_turns(self._period_ns / 1e9)
        self._look_around()
        told = [(observer, updates) for observer in list(self._observers.values())
                if (observer.inbox or observer.due or observer.debts)
                and observer.region is not None         # gone by a property of somebody told before
                and (updates := self._tell(observer, now_ns, ready))
                and observer.region is not None]
        self.quiet = not self._replicas and not any(
            [each.due for each in self._observers.values()])
        return told

    def wait_s(self) -> float:
        """Return in how many seconds somebody may have to be told something: 1/60, or infinite."""
        busy = self._moved or self._restless or self.crossed or any([
            each.debts or each.due or each.inbox or each.limit < 0
            or each.looked != each.stirs + self._stirs for each in self._observers.values()])
        turns = any([any(each.slots) for each in self._wheels.values()])
        return 1 / 60 if busy or turns else math.inf

    def _note_moves(self) -> None:
        """Add to the drift what objects have moved; who moved far is looked at by itself."""
        # HOT: for each object that moves (bench 11.replication)
        moved, self._moved = self._moved, {}
        since_ns, restless = self._moved_since_ns, self._restless
        steps = list(map(math.dist, moved.values(), [each.at for each in moved]))
        real, far = [step for step in steps if step], 0.0
        if len(real) * 32 > len(self._replicas):        # else each costs less than all observers
            sample = sorted(real[::len(real) // 500 + 1])
            far = 4 * sample[len(sample) * 3 // 4]
        drift = max(real, default=0.0)
        if drift > far:
            restless.update([(replica, None) for replica, step in zip(moved, steps) if step > far])
            drift = max([step for step in real if step <= far], default=0.0)
        for replica in moved:
            if not replica.marked:
                replica.marked = True
                for share, bit in replica.moving:
                    if not share.changed:
                        share.slots[share.slot].append(share)
                        share.since_ns = since_ns
                    share.changed |= bit
        self._drift += drift
        self._stirs += drift > 0
        if self._drift > 1e5:                   # sums lose their last digits
            self._drift = 0.0
            self._survey_anew()

    def _take_turns(self, seconds: float) -> None:
        """Hand what has changed, where it is its turn, to those who see it."""
        # HOT: for all that is told (bench 11.replication)
        load = min(max(self.load, 0.0), 1.0) if self.adaptive else 0.0
        now_ns = self._last_ns or 0
        for wheel in list(self._wheels.values()):
            for share in wheel.turn(seconds, load, self._usual_s):
                changed, share.changed, share.replica.marked = share.changed, 0, False
                update, told = None, 0
                for observer in list(share.viewers):        # a property may do anything
                    if observer.debts:
                        observer.owe(share, changed, share.since_ns, now_ns)
                        continue
                    if update is None:
                        update = Update(share, _EVENT, "update",
                                        None if changed == share.place else share.data(changed),
                                        self._stamp, changed, share.since_ns)
                        update.measure()
                        self.made += 1
                    told += 1
                    observer.inbox.append(update)
                if update is not None:
                    share.updates += told               # less those it is put off for, below
                    share.bytes += told * update.size
                    wheel.updates += told
                    wheel.bytes += told * update.size

    def pack(self, updates: list[Update], wide: bool) -> list[Any]:
        """Return *updates* with the positions told on channel 0 as one ZoneMoves, f32 or *wide*."""
        block: dict[bytes, _Position] = {}
        rest: list[Any] = []
        for each in updates:
            share = each.share
            if each.changed & share.place and share.layer.channel == 0:
                block[share.replica.uuid] = each.at
                if each.changed == share.place:
                    continue
                each = self._make(share, each.changed & ~share.place, _EVENT)
            rest.append(each)
        return [*rest, ZoneMoves(block, wide)] if block else rest

    # -- who sees what --

    def _survey_anew(self) -> None:
        for observer in self._observers.values():
            observer.limit = -math.inf

    def _look_around(self) -> None:
        """Bring up to date who is in which zone."""
        restless, self._restless = self._restless, {}
        if len(restless) > 64 + len(self._replicas) // 8:
            self._survey_anew()
        elif restless:
            self._look_at(restless)
        for observer in self._observers.values():
            travelled, stirs = observer.path + self._drift, observer.stirs + self._stirs
            if travelled > observer.limit:
                self._survey(observer)
            elif stirs != observer.looked:
                due = bisect.bisect_right(observer.thresholds, travelled)
                self._review(observer, observer.who[:due])
                self._spend(observer, due)
            observer.looked = stirs

    def _spend(self, observer: _Observer, count: int) -> None:
        """Note what a survey has cost since; at some time a new one costs no more."""
        observer.spent += count
        if observer.spent > 0:
            observer.limit = -math.inf

    def _look_at(self, restless: dict[_Replica, None]) -> None:
        """Look at some objects from all who may see them, or may soon."""
        todo: dict[_Observer, list[_Replica]] = {}
        if len(restless) > _MANY:
            todo = dict.fromkeys(self._observers.values(), list(restless))
        else:
            for replica in restless:
                for observer in {*replica.seers, *self._audience.around(
                        *replica.at, replica.profile.reach + self._reach / 4)}:
                    todo.setdefault(observer, []).append(replica)
        for observer, who in todo.items():
            travelled = observer.path + self._drift
            if travelled > observer.limit:
                continue                        # a survey comes anyway
            near = self._look(observer, who, observer.limit - travelled)
            for slack, replica in near:
                at = bisect.bisect(observer.thresholds, travelled + slack)
                observer.thresholds.insert(at, travelled + slack)
                observer.who.insert(at, replica)
            self._spend(observer, len(near))

    def _review(self, observer: _Observer, who: list[_Replica]) -> None:
        """Look which zones of some objects an observer is in."""
        # HOT: for all that is near an edge, every tick (bench 11.replication)
        masks = observer.masks
        for replica, distance in zip(who, map(math.dist, itertools.repeat(observer.at),
                                              [each.at for each in who])):
            edges, enter, stay, _ = replica.profile
            where = bisect.bisect_left(edges, distance)
            old = masks.get(replica, 0)
            if (new := old & stay[where] | enter[where]) != old:
                self._cross(observer, replica, old, new)

    def _look(self, observer: _Observer, who: list[_Replica],
              limit: float) -> list[tuple[float, _Replica]]:
        """Do the same, and return those within *limit* of an edge, with how far they are."""
        # HOT: for every observer, every few ticks (bench 11.replication)
        masks, at = observer.masks, observer.at
        near, crossed = [], []
        for replica, distance in zip(who, map(math.dist, itertools.repeat(at),
                                              [each.at for each in who])):
            edges, enter, stay, _ = replica.profile
            where = bisect.bisect_left(edges, distance)
            old = masks.get(replica, 0)
            if (new := old & stay[where] | enter[where]) != old:
                crossed.append((replica, old, new))
            slack, more = distance - edges[where - 1], edges[where] - distance
            if more < slack:
                slack = more
            if slack <= limit:
                near.append((slack * _SHY - _HAIR, replica))
        for each in crossed:
            self._cross(observer, *each)
        return near

    def _survey(self, observer: _Observer) -> None:
        """Look at all that is around, and note when each may cross an edge."""
        travelled = max(0.0, min(observer.path + self._drift, self._reach))
        pace = travelled / max(1, self.ticks - observer.surveyed_tick)
        self._surveys += 1                      # so that not all come in the same tick
        limit = (0.7 + self._surveys * 0.618034 % 0.6) * min(
            max(_AHEAD * pace, self._reach / 64), self._reach / 6)
        who = self._space.around(*observer.at, self._reach + limit)
        who += observer.masks.keys() - {*who}
        near = self._look(observer, who, limit)
        near.sort(key=_first)
        observer.thresholds, observer.who = [each[0] for each in near], [each[1] for each in near]
        observer.path, observer.limit = -self._drift, limit * _SHY
        observer.surveyed_tick, observer.spent = self.ticks, -2 * len(who) - 8

    def _cross(self, observer: _Observer, replica: _Replica, old: int, new: int) -> None:
        """Note that an observer is in other zones of an object than before."""
        if new:
            observer.masks[replica] = new
            replica.seers[observer] = None
        else:
            del observer.masks[replica]
            del replica.seers[observer]
        for share in replica.shares:
            if (old ^ new) & share.bit:
                inside = bool(new & share.bit)
                share.transitions += 1
                share.wheel.transitions += 1
                observer.transitions += 1
                self._owe_crossing(observer, share, inside)
                if self.watched:
                    self.crossed.append(("enter" if inside else "exit", replica,
                                         share.layer.channel, observer.key))

    def _owe_crossing(self, observer: _Observer, share: _Share, inside: bool) -> None:
        """Note that an observer is to be told that it is in a zone, or no more."""
        if observer.due.pop(share, None) is None:
            observer.due[share] = self._last_ns or 0
        elif inside:                            # back before it was told of having left
            share.show(observer)
            if share.whole:
                observer.owe(share, share.whole, 0, self._last_ns or 0)
        elif not observer.due:                  # it was not told of having come, and has gone
            observer.plan[0].clear()
        if not inside:
            share.hide(observer)
            observer.debts.pop(share, None)     # what has changed there is told no more

    # -- who is told what --

    def _tell(self, observer: _Observer, now_ns: int,
              ready: Callable[[Any], bool] | None) -> list[Update]:
        """Return what an observer is told now; keep in mind what it is not."""
        inbox, observer.inbox = observer.inbox, []
        if observer.due and inbox:
            inbox = self._still(observer, inbox)
        if ready is not None and not ready(observer.key):
            self._drop(observer, self._put_off(observer, inbox, now_ns))
            return []
        if self._waits(observer, inbox, now_ns):
            observer.inbox = inbox
            return []
        observer.waits_since_ns = 0
        rate = self._rate_of(observer)
        if rate or observer.due or observer.debts:
            inbox = self._pay(observer, inbox, rate, now_ns)
        observer.updates += len(inbox)
        observer.bytes += sum([each.size for each in inbox])
        self.lags.update([each.lag for each in inbox])
        return inbox

    def _still(self, observer: _Observer, inbox: list[Update]) -> list[Update]:
        """Return an inbox without updates of what the observer has just left."""
        left = []
        for each in inbox:
            if each.changed and observer not in each.share.viewers:
                each.share.count(each, -1)
            else:
                left.append(each)
        return left

    def _waits(self, observer: _Observer, inbox: list[Update], now_ns: int) -> bool:
        """Whether a batch is not full, has nothing urgent, and can wait for the next tick."""
        if not 0 < self._period_ns < self.wait_ns or observer.due or observer.debts or (
                len(inbox) >= self.batch) or (
                not all([each.share.layer.priority for each in inbox])):
            return False
        observer.waits_since_ns = observer.waits_since_ns or now_ns
        return now_ns + self._period_ns - observer.waits_since_ns <= self.wait_ns

    def _put_off(self, observer: _Observer, inbox: list[Update], now_ns: int) -> list[Update]:
        """Owe an observer the updates of its inbox; return its events, which can't wait."""
        events = []
        for each in inbox:
            if each.changed:
                each.share.count(each, -1)
                observer.owe(each.share, each.changed, each.since_ns, now_ns)
                if each.stamp is self._stamp:   # it is this tick's, and tells the newest
                    self._remade.setdefault((each.share, each.changed), each)
            else:
                events.append(each)
        return events

    def _drop(self, observer: _Observer, events: list[Update]) -> None:
        for each in events:
            each.share.drop(each)
            observer.dropped += 1

    def _pay(self, observer: _Observer, inbox: list[Update], rate: float,
             now_ns: int) -> list[Update]:
        """Return what an observer is told of its inbox and its debts, within its limits."""
        bound, terms = self._allowed(observer, rate, now_ns), observer.terms
        told, size = inbox, 0
        if rate:
            told = self._put_off(observer, inbox, now_ns)       # its events
            if terms.allowance <= 0:
                self._drop(observer, told)
                told = []
            size = sum([each.size for each in told])
        if not rate and terms.crossings == math.inf and (
                len(observer.due) + len(observer.debts) <= _AT_ONCE):
            masks = observer.masks
            exits = [share for share in observer.due
                     if not masks.get(share.replica, 0) & share.bit]
            order = iter(dict.fromkeys([*exits, *observer.due, *observer.debts]))
        else:
            self._make_plan(observer, now_ns)
            order = self._by_plan(observer)
        for share in order if size < bound else ():
            if (update := self._settle(observer, share, now_ns)) is not None:
                told.append(update)
                size += update.size
                if size >= bound:
                    break
        terms.spend(size, rate)
        return told

    def _allowed(self, observer: _Observer, rate: float, now_ns: int) -> float:
        """Return how many bytes an observer may be told now; add to what it may be."""
        terms = observer.terms
        seconds = max(0, now_ns - (terms.fed_ns or now_ns)) / 1e9
        terms.fed_ns = now_ns
        crossings = self._crossings_per_s
        saved_s = max(_SAVED_S, min(1.5 * self._period_ns / 1e9, 1.0))
        terms.crossings = min(terms.crossings + crossings * seconds,
                              max(1.0, crossings * saved_s)) if crossings else math.inf
        if not rate:
            terms.allowance = math.inf
            return self.max_bytes
        terms.allowance = min(terms.allowance + rate * seconds, rate * saved_s)
        # few and large writes rather than many small ones
        return min(terms.allowance, self.max_bytes) if (
            terms.allowance >= rate * _SAVED_S / 2) else 0

    def _make_plan(self, observer: _Observer, now_ns: int) -> None:
        """Put what an observer is owed in order: importance, and age in seconds; then distance.

        Ten times a second at most, and the more there is, the more seldom.
        """
        at, count = observer.at, len(observer.due) + len(observer.debts)
        if late := now_ns >= observer.planned_ns:
            self._surveys += 1                  # so that not all come in the same tick
            observer.planned_ns = now_ns + int((0.5 + self._surveys * 0.618034 % 1.0) * max(
                _PLAN_NS, count * _PLAN_NS // 100))
        for plan, waiting in zip(observer.plan, (observer.due.items(), [
                (share, debt[2]) for share, debt in observer.debts.items()])):
            if late or not plan:
                plan[:] = [((share.layer.priority - (now_ns - since_ns) // 1_000_000_000,
                             math.dist(at, share.replica.at)), share)
                           for share, since_ns in waiting]
                plan.sort(key=_first, reverse=True)

    def _by_plan(self, observer: _Observer) -> Iterator[_Share]:
        """Yield what is to be paid next, zones only as far as the limit of crossings allows."""
        zones, updates = observer.plan
        while updates or zones and observer.terms.crossings >= 1:
            crosses = zones and observer.terms.crossings >= 1 and (
                not updates or zones[-1][0] <= updates[-1][0])
            yield (zones if crosses else updates).pop()[1]

    def _settle(self, observer: _Observer, share: _Share, now_ns: int) -> Update | None:
        """Return what pays a debt: what has changed, or that a zone was entered or left."""
        kind, changed, terms = _EVENT, 0, observer.terms
        if share in observer.due:
            if terms.crossings < 1:
                return None
            terms.crossings -= 1
            del observer.due[share]
            kind = _EXIT
            if observer.masks.get(share.replica, 0) & share.bit:
                kind, changed = _ENTER, share.whole
                share.show(observer)
        elif (debt := observer.debts.pop(share, None)) is not None:
            changed, since_ns, owed_ns = debt
            if since_ns:
                self.lags[share.layer.channel, since_ns] += 1
            if owed_ns == now_ns:               # it did not have to wait
                share.add("left_out", -1)
                observer.left_out -= 1
        else:
            return None                         # since the plan was made it has come to nothing
        update = self._make(share, changed, kind)
        if observer.region is None:             # a property ended it
            share.hide(observer)
            return None
        share.count(update)
        return update

    def _make(self, share: _Share, changed: int, kind: str) -> Update:
        """Return an update that tells of *changed* as it is now, made once a tick."""
        key = (share, changed) if kind is _EVENT else (share, kind)
        if (update := self._remade.get(key)) is None:
            data = None if kind is _EXIT else share.data(changed)
            name = {_ENTER: "enter", _EXIT: "exit"}.get(kind, "update")
            update = self._remade[key] = Update(share, kind, name, data, self._stamp,
                                                changed if kind is _EVENT else 0)
            update.measure()
            self.made += 1
        return update

    # -- looking --

    def complain(self, what: str, error: Exception | None = None) -> None:
        """Log an object's fault, once a second at most, and count it."""
        self.complaints += 1
        if (now_ns := self.clock()) - self._complained_ns >= 1_000_000_000:
            self._complained_ns = now_ns
            _log.error("replication: %s", what, exc_info=error)

    def _use(self, layers: tuple[Layer, ...], obj: Replicated) -> _Plan:
        """Return what all objects with the same layers have in common; one more has."""
        if (plan := self._plans.get(layers)) is None:
            _check_layers(layers, obj.type_name)
            plan = self._plans[layers] = _Plan(layers, self.hysteresis)
            self._reach = max(self._reach, plan.profile.reach)
            for key in plan.rates:
                self._wheels.setdefault(key, _Wheel(*key)).uses += 1
        plan.uses += 1
        return plan

    def _let_go(self, plan: _Plan) -> None:
        """One less has these layers."""
        plan.uses -= 1
        if not plan.uses:
            del self._plans[plan.layers]
            reach = max([each.profile.reach for each in self._plans.values()], default=0.0)
            if reach < self._reach:
                self._reach = reach
                self._survey_anew()             # those there are were made with the old one
            for key in plan.rates:
                self._wheels[key].uses -= 1
                if not self._wheels[key].uses:
                    wheel = self._wheels.pop(key)
                    for name in _COUNTED:
                        self._past[wheel.channel, name] += getattr(wheel, name)

    def _next_slot(self) -> int:
        self._slot = (self._slot + 37) % _TURN          # neighbours are far from each other
        return self._slot

    def stats(self, what: Any) -> dict[str, Any]:
        """Return the counters of an object, by channel ("0" to "7"), or of an observer.

        Raises:
            UsageError: it is neither.
        """
        if isinstance(what, Hashable) and not isinstance(what, Replicated) and (
                what in self._observers):
            return self._observers[what].stats()
        return {f"{share.layer.channel}": share.stats() for share in self._find(what).shares}

    def observers(self) -> int:
        """Return how many observe."""
        return len(self._observers)

    def put_off(self) -> dict[str, int]:
        """Return how much observers were not told at once, or never, by why."""
        return {name: sum([getattr(each, name) for each in list(self._observers.values())],
                          self._gone[name]) for name in _PUT_OFF}

    def report(self, top: int = 10) -> dict[str, Any]:
        """Return counters by channel, and those of the busiest objects and observers.

        Cost: a microsecond or two per object.
        """
        channels: dict[int, Counter[str]] = {}
        for (channel, name), count in list(self._past.items()):
            channels.setdefault(channel, Counter())[name] += count
        for wheel in list(self._wheels.values()):
            channels.setdefault(wheel.channel, Counter()).update(
                {name: getattr(wheel, name) for name in ("subscribers", *_COUNTED)})
        replicas, observers = list(self._replicas.values()), list(self._observers.values())
        busiest = heapq.nlargest(top, observers, operator.attrgetter("bytes"))
        told = heapq.nlargest(top, replicas,
                              lambda each: sum([share.bytes for share in each.shares]))
        regions = self._space.regions()
        return {
            "objects": len(self._replicas), "observers": len(self._observers),
            "regions": len(regions), "smallest_region": min(regions, default=(0.0, 0))[0],
            "ticks": self.ticks, "made": self.made, "faults": self.complaints,
            "warnings": [*self.warnings.values()],
            **self.put_off(),
            "channels": {str(each): dict(channels[each]) for each in sorted(channels)},
            "busiest_observers": {each.key if isinstance(each.key, str) else repr(each.key):
                                  each.stats() for each in busiest},
            "busiest_objects": {each.id: {"type": each.obj.type_name, **self.stats(each.id)}
                                for each in told}}

    def _check(self) -> None:
        """Assert by brute force that everybody sees what they should (tests; after a tick)."""
        self._space._check()
        self._audience._check()
        assert len(self._space) == len(self._replicas)
        assert len(self._audience) == len(self._observers)
        for observer in self._observers.values():
            for replica in self._replicas.values():
                distance = math.dist(observer.at, replica.at)
                mask = observer.masks.get(replica, 0)
                assert (observer in replica.seers) == (mask > 0)
                for share in replica.shares:
                    radius, inside = share.layer.radius, bool(mask & share.bit)
                    assert inside or distance > radius
                    assert not inside or distance <= radius * (1 + self.hysteresis)
                    told, due = observer in share.viewers, share in observer.due
                    assert not told if due else told == inside
                    assert share not in observer.debts or told
            assert observer.masks.keys() <= {*self._replicas.values()}
        assert all(plan.uses for plan in self._plans.values())


# =============================================================================
# 12  TICKS - when to run, and what waits for whom until then
# =============================================================================
# Knows: a nanosecond clock that is handed in, ERRORS.     Never: sockets. Never sleeps:
# it says how long to wait.


class Ticker:
    """Decide when ticks are due, without drift: tick n is due at start + n / hz.

    ``dropped`` counts ticks that were forgiven after stalls.
    """

    __slots__ = ("hz", "period_ns", "dropped", "_clock", "_max_catchup", "_start_ns", "_done")

    def __init__(self, hz: float, clock: Callable[[], int] = time.monotonic_ns, *,
                 max_catchup: int = 5) -> None:
        if not 1e-6 <= hz <= 10_000:
            raise UsageError(f"hz must be 0.000001 to 10000, got {hz!r}")
        self.hz = hz
        self.period_ns = round(1_000_000_000 / hz)      # a tick's budget
        self.dropped = 0
        self._clock = clock
        self._max_catchup = max_catchup or sys.maxsize      # a limit of 0 means none
        self._start_ns = clock()
        self._done = 0              # ticks run or forgiven since the start

    def _next_ns(self) -> int:
        return self._start_ns + int((self._done + 1) * 1_000_000_000 / self.hz)

    def wait_s(self) -> float:
        """Return how long select() may block before the next tick."""
        return max(0, self._next_ns() - self._clock()) / 1e9

    def take_due(self) -> int:
        """Return how many ticks to run now; forgive what cannot be caught up.

        After a stall longer than ``max_catchup`` ticks the rest are counted in
        ``dropped`` and never run: a late world beats a world that spirals.
        """
        behind_ns = self._clock() - self._next_ns()
        if behind_ns < 0:
            return 0
        due = int(behind_ns * self.hz / 1_000_000_000) + 1
        self._done += due
        run = min(due, self._max_catchup)
        self.dropped += due - run
        return run


class Batcher(Generic[_T]):
    """Collect items, and hand them on as a list: *max_size* of them, or those of *max_wait_ms*.

    *flush* gets a list of its own each time, of at most *max_size* items in order. It may
    return False, for "not now": then they wait until somebody calls ``flush``, *max_pending*
    items at most (0: any number). What is too much is dropped by *overflow*, the "oldest" or
    the "newest", and counted, or "refuse" raises LimitError (seeds 002, 004).

    >>> batcher = Batcher(print, max_size=2)
    >>> batcher.add("a"), batcher.add("b"), batcher.add("c"), batcher.flush()
    ['a', 'b']
    ['c']
    (None, None, None, True)
    """

    __slots__ = ("dropped", "_hand_on", "_max_size", "_wait_ns", "_max_pending", "_overflow",
                 "_clock", "_items", "_since_ns", "_refused", "_flushing")

    def __init__(self, flush: Callable[[list[_T]], object], max_size: int = 20,
                 max_wait_ms: float = 5.0, *, max_pending: int = 1000, overflow: str = "oldest",
                 clock: Callable[[], int] = time.monotonic_ns) -> None:
        if type(max_size) is not int or max_size < 1 or not 0 <= max_wait_ms < math.inf:
            raise UsageError(f"a batch is of 1 item or more, and waits 0 ms or longer; not "
                             f"{max_size!r}, {max_wait_ms!r}")
        if max_pending and max_pending < max_size:
            raise UsageError(f"max_pending = {max_pending} must be max_size = {max_size} or more")
        if overflow not in ("oldest", "newest", "refuse"):
            raise UsageError(f'overflow is "oldest", "newest" or "refuse", not {overflow!r}')
        self.dropped = 0
        self._hand_on = flush
        self._max_size = max_size
        self._wait_ns = int(max_wait_ms * 1e6)
        self._max_pending = max_pending or sys.maxsize
        self._overflow = overflow
        self._clock = clock
        self._items: deque[_T] = deque()
        self._since_ns = 0                  # when the oldest came
        self._refused = False               # "not now"
        self._flushing = False

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: _T, *, immediate: bool = False) -> None:
        """Add an item; an *immediate* one is handed on now, after all that came before.

        Raises:
            LimitError: there is no room, and the policy is to refuse.
        """
        if len(self._items) >= self._max_pending and not self._make_room():
            return
        if not self._items:
            self._since_ns = self._clock()
        self._items.append(item)
        if (immediate or len(self._items) >= self._max_size) and not self._refused:
            self.flush()

    def _make_room(self) -> bool:
        if self._overflow == "refuse":
            raise LimitError(f"{len(self._items)} items wait in this batcher already")
        self.dropped += 1
        if self._overflow == "oldest":
            self._items.popleft()
        return self._overflow == "oldest"

    def flush(self) -> bool:
        """Hand on what there is now, not what is added meanwhile; return whether it was taken."""
        if self._flushing:
            return True
        self._flushing, self._refused, left = True, False, len(self._items)
        try:
            while left and not self._refused:
                batch = [self._items.popleft() for _ in range(min(left, self._max_size))]
                left -= len(batch)
                if self._hand_on(batch) is False:
                    self._items.extendleft(reversed(batch))
                    self._refused = True
        finally:
            self._flushing = False
            self._since_ns = self._clock() if not self._refused else self._since_ns
        return not self._refused

    def due(self) -> bool:
        """Whether the oldest item has waited long enough."""
        return self.wait_s() == 0.0

    def wait_s(self) -> float:
        """Return in how many seconds ``flush`` is due; infinite if there is nothing to do."""
        if not self._items or self._refused:
            return math.inf
        return max(0, self._since_ns + self._wait_ns - self._clock()) / 1e9


class Sendable(Protocol):
    """What an Outbox holds: a Publication, Moves, Markup, or anything with these.

    It has also the forms its receivers ask for: ``json()``, ``envelope(form)``, ``html()``.
    """

    size: int                       # bytes it counts for; 0 until measured

    def measure(self) -> int:
        """Set and return ``size``."""
    @property
    def critical(self) -> bool:
        """Never dropped."""
    @property
    def key(self) -> str | None:
        """Newest wins among those with the same key; None for all others."""
    @property
    def seq(self) -> int:
        """Its place among what was sent."""
    @property
    def label(self) -> str:
        """What it counts as when it is sent."""
    @property
    def count(self) -> int:
        """As how many."""


class Outbox:
    """What waits for one peer until its tick, or until it reads again; bounded.

    Three classes (DESIGN 4): *critical* is never dropped; *latest* (it has a key) is
    replaced by the newest; all else is dropped, oldest first, when the bound is passed.
    """

    __slots__ = ("items", "size", "dropped", "coalesced", "_max_items", "max_bytes", "mixed",
                 "urgent", "owed", "_on_drop")

    def __init__(self, max_items: int, max_bytes: int,
                 on_drop: Callable[[Any], object] = lambda item: None) -> None:
        self.items: tuple[Any, ...] = ()    # never changed in place: peers share them
        self.size = 0
        self.dropped = self.coalesced = 0
        self.urgent = False                 # to leave with this pass
        self.owed: set[Any] = set()         # keys, or debts, of what was dropped: to be told
        self.mixed = False                  # filled from several topics: to be sorted
        self._max_items = max_items or sys.maxsize      # a limit of 0 means none
        self.max_bytes = max_bytes or sys.maxsize
        self._on_drop = on_drop             # called with each item that is dropped

    def put(self, item: Any, ahead: int = 0) -> None:
        """Add *item*; *ahead* bytes are waiting elsewhere for the same peer.

        Raises:
            SlowPeer: the bound is passed and only critical items are left.
        """
        item = self.settle(item)
        if item.key is None or not self._replace(item):
            self.put_many((item,), item.size or item.measure(), ahead)
        elif self.size + ahead > self.max_bytes:
            self._make_room(ahead)

    def settle(self, item: Any) -> Any:
        """Return *item*, or what stands also for an older one that was dropped."""
        if item.key not in self.owed:
            return item
        self.owed.discard(item.key)
        return item.replaces(item)

    def put_many(self, items: tuple[Any, ...], size: int, ahead: int = 0) -> None:
        """Add items of *size* bytes in all, none of which replaces another; raises as ``put``."""
        self.add(items, size)
        if len(self.items) > self._max_items or self.size + ahead > self.max_bytes:
            self._make_room(ahead)

    def overflows(self, count: int, size: int) -> bool:
        """Whether so much more would pass the bound."""
        return len(self.items) + count > self._max_items or self.size + size > self.max_bytes

    def add(self, items: tuple[Any, ...], size: int) -> None:
        """Add without a bound, for who empties it at once."""
        if self.items:
            self.mixed = True
            items = self.items + items
        self.items = items
        self.size += size

    def _replace(self, item: Any) -> bool:
        for at, old in enumerate(self.items):
            if old.key == item.key:
                newest = item.replaces(old)
                self.size += newest.size - old.size
                self.items = (*self.items[:at], newest, *self.items[at + 1:])
                self.mixed = True
                self.coalesced += 1
                return True
        return False

    def _make_room(self, ahead: int) -> None:
        self._sort()
        items = list(self.items)
        # where nothing is left, what is ahead fills the bound alone
        while items and (len(items) > self._max_items or self.size + ahead > self.max_bytes):
            # droppable before latest: of state there is only one, and it is wanted
            at = next((n for n, each in enumerate(items) if not each.critical and each.key is None),
                      next((n for n, each in enumerate(items) if not each.critical), None))
            if at is None:
                raise SlowPeer(f"{len(items)} critical messages, {self.size} bytes wait")
            gone = items.pop(at)
            self.size -= gone.size
            self.dropped += 1
            self._on_drop(gone)
            if (debt := getattr(gone, "debt", gone.key)) is not None:
                self.owed.add(debt)
        self.items = tuple(items)

    def _sort(self) -> None:
        if self.mixed:
            self.items = tuple(sorted(self.items, key=operator.attrgetter("seq")))
            self.mixed = False

    def take(self) -> tuple[Any, ...]:
        """Return everything in order and be empty."""
        self._sort()
        items, self.items, self.size, self.urgent = self.items, (), 0, False
        return items


# =============================================================================
# 13  PROTOCOLS - HTTP/1.1 and WebSocket without sockets
# =============================================================================
# Knows: bytes, ERRORS.     Never: sockets, clocks, engine state.
#
# Both protocols have the same doors:
#     receive(data)     bytes from the peer go in
#     take_events()     what they meant comes out; PeerError if they meant nothing.  What came
#                       before the fault is returned first, the next call raises
#     send_...(x)       returns bytes to send; the caller owns the sending

# -- HTTP/1.1 (RFC 9110, RFC 9112) --

_TOKEN_CHARS = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                          # RFC 9110 5.6.2
_REQUEST_LINE = re.compile(rb"(" + _TOKEN_CHARS.encode() + rb") ([!-~]+) HTTP/(\d)\.(\d)")
_HEADER_LINE = re.compile(rb"(" + _TOKEN_CHARS.encode() + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?")    # RFC 3986
_MAX_TARGET = 8192                  # RFC 9112 3: at least 8000 should work
_CHUNKED, _TRAILERS = -1, -2        # instead of a body's length
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
_SINGLE_HEADERS = ("host", "content-length", "transfer-encoding", "sec-websocket-key",
                   "sec-websocket-version", "origin", "authorization", "content-type", "expect")


class Request:
    """An HTTP request: method, path, query, headers (lower-case names), body.

    ``address`` is the client's, ``user`` who ``authenticate`` says it is and ``claims`` what
    else its token says, ``params`` what the ``{names}`` of the route matched.
    """

    __slots__ = ("method", "target", "path", "query", "headers", "body", "version", "params",
                 "address", "user", "claims")

    def __init__(self, method: str, target: str, headers: dict[str, str], version: tuple[int, int]):
        self.method = method
        self.target = target
        self.path, _, self.query = target.partition("?")
        if "%" in self.path:
            from urllib.parse import unquote
            self.path = unquote(self.path, errors="replace")
        self.headers = headers
        self.body = b""
        self.version = version
        self.params: dict[str, str] = {}
        self.address = self.user = ""
        self.claims: dict[str, Any] = {}

    @property
    def keep_alive(self) -> bool:
        """Whether the connection persists after the response (RFC 9112 9.3)."""
        options = self.tokens("connection")
        return "close" not in options and (self.version >= (1, 1) or "keep-alive" in options)

    def tokens(self, name: str) -> list[str]:
        """Return a comma-separated header's members, lower case."""
        members = self.headers.get(name, "").lower().split(",")
        return [each.strip(" \t") for each in members if each.strip(" \t")]

    @property
    def args(self) -> dict[str, str]:
        """The query's fields, decoded; of a repeated one the last."""
        from urllib.parse import parse_qsl
        return dict(parse_qsl(self.query, keep_blank_values=True, errors="replace"))

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies (RFC 6265 4.2); of a repeated one the first, which is the most specific."""
        pairs = [each.partition("=") for each in self.headers.get("cookie", "").split(";")]
        return {name.strip(): value.strip(' "') for name, found, value in reversed(pairs) if found}

    @property
    def token(self) -> str:
        """The bearer token (RFC 6750), or else the query's ``token``, for browsers' sockets."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else self.args.get("token", "")

    def json(self) -> Any:
        """Return the body, parsed.

        Raises:
            FrameError: it is not JSON; answered with 400.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise FrameError("the body is not JSON", label="bad_json") from None

    def __repr__(self) -> str:
        return f"Request({self.method} {self.target})"


@functools.cache
def _reason_phrase(status: int) -> str:
    from http import HTTPStatus
    return next((each.phrase for each in HTTPStatus if each == status), "Unknown")


def _header_lines(headers: Mapping[str, str | list[str]]) -> Iterator[tuple[str, str]]:
    for name, value in headers.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            yield name, each


class Response:
    """An HTTP response. *body* is str, bytes, or a dict or list that is sent as JSON.

    A header's value may be a list, for one that is repeated, like Set-Cookie. A *body* of
    pieces, any iterator of bytes, is sent as the client takes it; ``length`` says how long it
    will be, or -1 to send until it ends (chunked, or to the end of the connection).
    """

    __slots__ = ("status", "body", "headers", "pieces", "length")

    def __init__(self, body: Any = b"", status: int = 200,
                 headers: Mapping[str, str | list[str]] | None = None,
                 content_type: str = "", length: int = -1) -> None:
        guess = "text/plain; charset=utf-8"
        self.pieces: Iterator[bytes] | None = None
        if isinstance(body, dict | list):
            body, guess = _json_bytes(body), "application/json"
        elif isinstance(body, str):
            guess = "text/html; charset=utf-8" if body.lstrip()[:1] == "<" else guess
            body = body.encode()
        elif isinstance(body, Iterator):
            self.pieces, body = body, b""
        elif not isinstance(body, bytes):
            raise UsageError(f"a body is str, bytes, dict, list or iterator of bytes, not {body!r}")
        self.status = status
        self.body: bytes = body
        self.headers: dict[str, str | list[str]] = dict(headers or {})
        self.length = length                # of the pieces
        if body or self.pieces or content_type:
            self.headers.setdefault("Content-Type", content_type or guess)
        self.check()

    def check(self) -> None:
        """Look whether it can be sent.

        Raises:
            UsageError: it can't.
        """
        if not isinstance(self.status, int) or not 100 <= self.status <= 599:
            raise UsageError(f"status {self.status!r} must be a number from 100 to 599")
        if not isinstance(self.body, bytes):
            raise UsageError(f"a body that is set must be bytes, not {self.body!r}")
        for name, value in _header_lines(self.headers):
            if not (isinstance(value, str) and re.fullmatch(_TOKEN_CHARS, name)) or (
                    re.search(r"[\0-\x08\n-\x1f\x7f]", value)):
                raise UsageError(f"header {name!r}: {value!r} can't be sent")
            if name.lower() in ("content-length", "transfer-encoding"):
                raise UsageError(f"header {name!r} is set by the server itself")

    @property
    def bodiless(self) -> bool:
        """Whether its status has no body (RFC 9112 6.3)."""
        return self.status < 200 or self.status in (204, 304)

    def encode(self, *, head_only: bool = False, close: bool = False, **more: str) -> bytes:
        """Return the bytes on the wire; *head_only* answers HEAD (RFC 9110 9.3.2).

        *more* is headers of the connection's, where the response has none of its own; pieces
        are for the caller to send.
        """
        if close:
            more["Connection"] = "close"
        own = {name.lower() for name in self.headers}
        headers = self.headers | {key: text for key, text in more.items() if key.lower() not in own}
        lines = [f"HTTP/1.1 {self.status} {_reason_phrase(self.status)}"]
        lines += [f"{name}: {value}" for name, value in _header_lines(headers)]
        length = len(self.body) if self.pieces is None else self.length
        if not self.bodiless and length >= 0:
            lines.append(f"Content-Length: {length}")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
        return head if head_only or self.bodiless else head + self.body


class HTTPConnection:
    """The server's side of HTTP/1.1, as bytes in and Requests out.

    Bodies come by Content-Length or chunked and are collected up to *max_body_bytes*.
    After a request that asks for an upgrade nothing more is parsed: ``trailing`` holds what
    came after it.
    """

    __slots__ = ("_buffer", "_max_header", "_max_body", "_request", "_left", "_chunks", "_stop",
                 "_scanned", "_fault", "head_only", "expects_continue")

    def __init__(self, max_header_bytes: int = 16384, max_body_bytes: int = 65536) -> None:
        self._buffer = bytearray()
        self._max_header = max_header_bytes or sys.maxsize
        self._max_body = max_body_bytes or sys.maxsize
        self._request: Request | None = None    # whose body is being read
        self._left = 0                          # body bytes to come, or one of the two below 0
        self._chunks = bytearray()              # chunked body so far
        self._stop = False
        self._scanned = 0                       # of the head, or the trailers
        self._fault: PeerError | None = None
        self.head_only = False                  # the last request was HEAD: its answer has no body
        self.expects_continue = False           # the peer waits for "100 Continue"

    @property
    def started(self) -> bool:
        """Whether part of a request has arrived."""
        return bool(self._buffer) or self._request is not None

    @property
    def trailing(self) -> bytes:
        """What arrived after the last request."""
        return bytes(self._buffer)

    def receive(self, data: _Bytes) -> None:
        """Store *data*; parse nothing yet."""
        self._buffer += data

    def take_events(self) -> list[Request]:
        """Return the next complete request in a list, or an empty one: one at a time, so that
        responses keep their order.

        Raises:
            FrameError, TooBig, HandshakeError: with the status to answer in ``http_status``.
        """
        if self._fault is not None:
            raise self._fault
        try:
            return [] if self._stop else self._take_request()
        except PeerError as error:
            self._fault = error
            raise

    def _take_request(self) -> list[Request]:
        if self._request is None:
            self.head_only = False
            self._request = self._take_head()
        take = {_CHUNKED: self._take_chunks, _TRAILERS: self._take_trailers}
        if self._request is None or (body := take.get(self._left, self._take_body)()) is None:
            return []
        request, self._request = self._request, None
        request.body = body
        self.expects_continue = False
        self._scanned = 0
        self._stop = "upgrade" in request.tokens("connection") and "upgrade" in request.headers
        return [request]

    def _take(self, size: int, more: int = 0) -> bytes:
        """Return so many bytes; drop them, and as many more."""
        data = bytes(self._buffer[:size])
        del self._buffer[:size + more]
        return data

    def _take_head(self) -> Request | None:
        buffer = self._buffer
        if not self._scanned:               # RFC 9112 2.2: ignore empty lines before a request
            while buffer[:2] == b"\r\n":
                del buffer[:2]
            if bytes(buffer[:2]) in (b"", b"\r"):
                return None
        end = buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        self._scanned = len(buffer)
        if (end if end >= 0 else len(buffer) - 3) > self._max_header:
            status = 414 if b"\r\n" not in buffer[:_MAX_TARGET] else 431
            raise TooBig("the header block is too big", http_status=status, label="header_too_big")
        if end < 0:
            self._check_early()
            return None
        self._scanned = 0
        request = _parse_head(self._take(end, 4))
        self.head_only = request.method == "HEAD"
        self._left = _body_length(request)
        if self._left > self._max_body:
            raise TooBig(f"body of {self._left} bytes; the limit is {self._max_body}",
                         label="body_too_big")
        expect = request.headers.get("expect", "").lower()
        if expect not in ("", "100-continue"):
            raise FrameError("unknown Expect", http_status=417, label="bad_request")
        # RFC 9110 10.1.1: not to HTTP/1.0
        self.expects_continue = bool(expect) and request.version >= (1, 1)
        self._chunks = bytearray()
        return request

    def _check_early(self) -> None:
        """Refuse what can't become a request without waiting for its end."""
        line, found, _ = self._buffer[:_MAX_TARGET].partition(b"\n")
        if found and not line.endswith(b"\r"):
            raise FrameError("lines end with CR LF", label="bad_request")
        if found and not _REQUEST_LINE.fullmatch(line[:-1]):
            _parse_request_line(bytes(line[:-1]))
        if not found and re.search(rb"[^\t\r -~]", line):
            raise FrameError("that is not HTTP", label="bad_request")

    def _take_body(self) -> bytes | None:
        return self._take(self._left) if len(self._buffer) >= self._left else None

    def _take_chunks(self) -> bytes | None:
        """Read chunks as far as they are here (RFC 9112 7.1); extensions are ignored."""
        while True:
            end = self._buffer.find(b"\r\n")
            if end < 0 and len(self._buffer) <= 256:
                return None
            match = _CHUNK_LINE.fullmatch(self._buffer, 0, max(end, 0))
            if match is None or end > 255:
                raise FrameError("chunk size is malformed, or too long", label="bad_chunk")
            size = int(match[1], 16)
            if len(self._chunks) + size > self._max_body:
                raise TooBig("chunked body", label="body_too_big")
            if size == 0:
                self._take(end, 2)
                self._left = _TRAILERS
                return self._take_trailers()
            if len(self._buffer) < end + 2 + size + 2:
                return None
            if self._buffer[end + 2 + size:end + 4 + size] != b"\r\n":
                raise FrameError("chunk without CR LF behind it", label="bad_chunk")
            self._take(end, 2)
            self._chunks += self._take(size, 2)

    def _take_trailers(self) -> bytes | None:
        """Pass over trailer fields after the last chunk."""
        while self._scanned <= self._max_header and (end := self._buffer.find(b"\r\n")) >= 0:
            if not (line := self._take(end, 2)):
                return bytes(self._chunks)
            self._scanned += end
            if not _HEADER_LINE.fullmatch(line):
                raise FrameError("malformed trailer", label="bad_chunk")
        if self._scanned + len(self._buffer) - 1 > self._max_header:
            raise TooBig("trailers", http_status=431, label="header_too_big")
        return None


def _parse_request_line(line: bytes) -> tuple[str, str, tuple[int, int]]:
    match = _REQUEST_LINE.fullmatch(line)
    if len(match[2] if match else line) > _MAX_TARGET:
        raise TooBig("request target", http_status=414, label="header_too_big")
    if match is None:
        raise FrameError("malformed request line", label="bad_request")
    if match[3] != b"1":
        raise FrameError("only HTTP/1 is spoken here", http_status=505, label="http_version")
    if match[1].decode() not in _METHODS:       # RFC 9110 9.1
        raise FrameError("unknown method", http_status=501, label="bad_method")
    return match[1].decode(), match[2].decode(), (1, int(match[4]))


def _parse_head(head: bytes) -> Request:
    """Parse a request's head; strict, for what two parsers read differently is an attack.

    Header names keep no order; repeated ones are joined with commas (RFC 9110 5.3) unless
    repeating them is a fault.
    """
    first, *lines = head.split(b"\r\n")
    method, target, version = _parse_request_line(first)
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line)    # no obs-fold, no space before the colon
        if match is None:
            raise FrameError(f"malformed header line {line[:40]!r}", label="bad_request")
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if name in headers:
            if name in _SINGLE_HEADERS:
                raise FrameError(f"{name} given twice", label="bad_request")
            value = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}"
        headers[name] = value
    if version >= (1, 1) and "host" not in headers:     # RFC 9112 3.2
        raise FrameError("the Host header is missing", label="bad_request")
    target = _origin_form(method, target, headers)
    if not _HOST.fullmatch(headers.get("host", "")):
        raise FrameError("malformed Host", label="bad_request")
    return Request(method, target, headers, version)


def _origin_form(method: str, target: str, headers: dict[str, str]) -> str:
    """Return the path of a request target; of an absolute form the host rules (RFC 9112 3.2.2)."""
    if target.startswith("/") and "#" not in target or target == "*" and method == "OPTIONS":
        return target
    if match := re.fullmatch(r"(?i:https?)://([^/?#@]+)(/[^#]*|\?[^#]*)?", target):
        headers["host"] = match[1]
        return "/" + (match[2] or "").removeprefix("/")
    raise FrameError("malformed request target", label="bad_request")


def _body_length(request: Request) -> int:
    """Return the body's length, or that it is chunked (RFC 9112 6.3)."""
    coding = request.headers.get("transfer-encoding")
    length = request.headers.get("content-length")
    if coding is not None:
        if length is not None or request.version < (1, 1):      # smuggling: RFC 9112 6.1
            raise FrameError("Transfer-Encoding can't be here", label="bad_request")
        codings = request.tokens("transfer-encoding")
        if codings != ["chunked"]:              # RFC 9112 6.1; 6.3: it must be the last
            status = 400 if "chunked" in codings[:-1] else 501
            raise FrameError("unknown transfer coding", http_status=status, label="bad_request")
        return _CHUNKED
    if length is None and request.method in ("POST", "PUT", "PATCH"):
        raise FrameError("say how long the body is: Content-Length, or chunked (curl -d '')",
                         http_status=411, label="bad_request")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise FrameError("malformed Content-Length", label="bad_request")
    return int(length or 0)


# -- WebSocket (RFC 6455) --

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
_COMPRESSED = 0x40                  # RSV1 (RFC 7692 6)
_FLUSHED = b"\0\0\xff\xff"          # what ends a flushed block, and is left out (RFC 7692 7.2.1)


class Ping(NamedTuple):
    """A ping frame; answer it with ``send_pong(data)``."""

    data: bytes


class Pong(NamedTuple):
    """A pong frame."""

    data: bytes


class Close(NamedTuple):
    """A close frame; code 1005 means the peer gave none (RFC 6455 7.1.5)."""

    code: int
    reason: str


def _accept_key(key: str) -> str:
    """Return Sec-WebSocket-Accept for a key (RFC 6455 4.2.2)."""
    import base64
    import hashlib
    digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode())
    return base64.b64encode(digest.digest()).decode()


def _mask(data: _Bytes, key: bytes) -> bytes:
    """XOR *data* with the four bytes of *key*, over and over (RFC 6455 5.3).

    Why integers: one long XOR takes 3 us per KiB; a loop over bytes would take 60.
    """
    size = len(data)
    pad = int.from_bytes((key * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ pad).to_bytes(size, "little")


def _frame(opcode: int, payload: _Bytes, mask_key: bytes = b"") -> bytes:
    """Return one final frame; clients give a mask key."""
    size = len(payload)
    masked = 0x80 if mask_key else 0
    if size < 126:
        head = bytes((0x80 | opcode, masked | size))
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, masked | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, masked | 127, size)
    return head + mask_key + _mask(payload, mask_key) if mask_key else head + payload


def _sendable_code(code: int) -> bool:
    """Whether a close code may stand in a frame (RFC 6455 7.4, IANA's registry)."""
    return 1000 <= code <= 1014 and code not in (1004, 1005, 1006) or 3000 <= code <= 4999


class Deflate(NamedTuple):
    """What one side of a connection agreed on for permessage-deflate (RFC 7692 7.1).

    ``bits`` are window sizes, 9 to 15; without takeover every message stands for itself.
    """

    send_bits: int = 15
    send_takeover: bool = False
    receive_bits: int = 15
    receive_takeover: bool = False
    above_bytes: int = 512          # shorter messages are sent as they are


def _deflater(bits: int) -> zlib._Compress:
    return zlib.compressobj(wbits=-bits)


def _squeeze(deflater: zlib._Compress, payload: _Bytes) -> bytes:
    return (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4] or b"\0"


class _Incoming:
    """A message that has not arrived completely."""

    __slots__ = ("data", "decoder", "inflater", "size", "left", "key", "final")

    def __init__(self, text: bool, inflater: zlib._Decompress | None) -> None:
        self.data = bytearray()
        self.decoder = codecs.getincrementaldecoder("utf-8")() if text else None
        self.inflater = inflater
        self.size = 0               # payload bytes that were announced
        self.left = 0               # of the frame under way, how many have not come
        self.key = b""              # for the next of them
        self.final = False          # that frame is the last


class WebSocketConnection:
    """One side of a WebSocket after the handshake, as bytes in and events out.

    Events are ``str`` (a text message), ``bytes`` (a binary one), Ping, Pong and Close. Each
    fault is a PeerError with the close code to send. *role* is "server" or "client": clients
    mask what they send, servers insist on it. *deflate* is what both agreed on, if they did.

    What arrives of a frame is unmasked, inflated and checked at once, so that the time is
    linear, however the bytes are cut, and wrong text fails at its first impossible byte.
    """

    __slots__ = ("_client", "_max_bytes", "_deflate", "_deflater", "_inflater", "_buffer",
                 "_incoming", "_inflated", "_fault", "frames", "closed_by_peer", "close_sent")

    def __init__(self, role: str = "server", max_message_bytes: int = 65536,
                 deflate: Deflate | None = None) -> None:
        if role not in ("server", "client"):
            raise UsageError(f"role is 'server' or 'client', not {role!r}")
        self._client = role == "client"
        self._max_bytes = max_message_bytes or 1 << 62
        self._deflate = deflate
        self._deflater: zlib._Compress | None = None        # kept only with takeover
        self._inflater: zlib._Decompress | None = None
        self._buffer = b""                  # an unfinished head, or control frame
        self._incoming: _Incoming | None = None
        self._inflated = 0                  # bytes in the events to be returned
        self._fault: PeerError | None = None
        self.frames = 0                     # received, fragments and control frames included
        self.closed_by_peer = False
        self.close_sent = False

    # -- receiving --

    def receive(self, data: _Bytes) -> None:
        """Store *data*; parse nothing yet. After a close frame or a fault all is ignored."""
        if not self.closed_by_peer and self._fault is None:
            # in the common case one whole frame arrives and nothing is copied
            self._buffer = self._buffer + data if self._buffer else bytes(data)

    def take_events(self) -> list[Any]:
        """Return what has arrived completely, in order; call it until it returns nothing.

        Raises:
            FrameError, TooBig: the peer broke the protocol; nothing more comes.
        """
        events: list[Any] = []
        data, at, self._inflated = self._buffer, 0, 0
        try:        # many small bombs are not one large one: the caller may look in between
            while at < len(data) and not self.closed_by_peer and self._inflated <= self._max_bytes:
                if (end := self._take_frame(data, at, events)) == at:
                    break
                at = end
        except PeerError as error:
            self._fault, at = error, len(data)
        if at:
            self._buffer = data[at:]
        if self._fault is not None and not events:
            raise self._fault
        return events

    def _take_frame(self, data: bytes, at: int, events: list[Any]) -> int:
        """Handle the frame, or the part of one, at *at*; return its end, or *at* to wait."""
        # HOT: once per frame; checks in the order of the bytes, so that a bad head fails early
        incoming = self._incoming
        if incoming is not None and incoming.left:
            return self._take_part(incoming, data, at, events)
        if len(data) - at < 2:
            return at
        first, size = data[at], data[at + 1] & 0x7F
        opcode = first & 0x0F
        self._check_head(first, data[at + 1], at)
        start, shortest = at + 2, 0
        if size > 125:                          # RFC 6455 5.2
            start, shortest = (at + 4, 126) if size == 126 else (at + 10, 65536)
            if len(data) < start:
                return at
            size = int.from_bytes(data[at + 2:start], "big")
        if size < shortest or size >> 63:       # RFC 6455 5.2: minimal, below 2**63
            raise FrameError("length is not minimal", at=at, label="bad_length")
        if opcode < 8:
            most, whole = self._max_bytes, size     # what is inflated is counted then
            if first & _COMPRESSED or incoming is not None and incoming.inflater is not None:
                most += (most >> 3) + 64            # deflate may add some bytes to a frame
            elif incoming is not None:
                whole += incoming.size
            if whole > most:
                raise TooBig(f"message of more than {most} bytes", label="message_too_big")
        key = b"" if self._client else data[start:start + 4]
        start += 0 if self._client else 4
        end = start + size
        if len(data) < (end if opcode >= 8 else start):
            return at
        self.frames += 1
        if opcode < 8 and (len(data) < end or incoming is not None or first & 0xC0 != 0x80):
            if incoming is None:
                inflater = self._new_inflater() if first & _COMPRESSED else None
                incoming = self._incoming = _Incoming(opcode == _TEXT, inflater)
            incoming.size += size
            incoming.left, incoming.key, incoming.final = size, key, first >= 0x80
            return self._take_part(incoming, data, start, events)
        payload = _mask(data[start:end], key) if key else data[start:end]
        if opcode >= 8:
            events.append(self._control(opcode, payload))
        else:                               # a plain message in one frame
            events.append(payload if opcode == _BINARY else _text(payload))
        return end

    def _take_part(self, incoming: _Incoming, data: bytes, at: int, events: list[Any]) -> int:
        part = data[at:at + incoming.left]
        incoming.left -= len(part)
        at += len(part)
        if key := incoming.key:
            part = _mask(part, key)
            if incoming.left:               # the next part goes on within the key
                incoming.key = (key + key)[len(part) % 4:][:4]
        last = incoming.final and not incoming.left
        if incoming.inflater is not None:
            part = self._inflate(incoming, incoming.inflater, part + _FLUSHED if last else part)
        if incoming.decoder is not None:        # RFC 6455 8.1: fail as soon as it can't be UTF-8
            try:
                incoming.decoder.decode(part, last)
            except UnicodeDecodeError:
                raise _bad_text() from None
            # CPython sees only at the third byte that a surrogate is none
            if b"\xed\x9f" < incoming.decoder.getstate()[0] < b"\xee":
                raise _bad_text()
        incoming.data += part
        if last:
            message = incoming.data
            events.append(bytes(message) if incoming.decoder is None else message.decode())
            self._incoming = None
            if self._deflate is not None and self._deflate.receive_takeover:
                self._inflater = incoming.inflater or self._inflater
        return at

    def _new_inflater(self) -> zlib._Decompress:
        assert self._deflate is not None
        return self._inflater or zlib.decompressobj(-self._deflate.receive_bits)

    def _inflate(self, incoming: _Incoming, inflater: zlib._Decompress, data: bytes) -> bytes:
        """Inflate a part of a message; what passes the limit is never made."""
        room, plain = self._max_bytes - len(incoming.data) + 1, b""
        for _ in range(8):
            try:
                plain += inflater.decompress(data, room - len(plain))
            except zlib.error as error:
                raise FrameError(str(error), close_code=1007, label="bad_deflate") from None
            if len(plain) >= room:
                raise TooBig(f"message inflates to over {self._max_bytes} bytes",
                             label="message_too_big")
            if not inflater.eof:
                self._inflated += len(plain)
                return plain
            # RFC 7692 7.2.3.4: a block may say that it is the last, and another follow
            self._inflater, data = None, inflater.unused_data
            inflater = incoming.inflater = self._new_inflater()
        raise FrameError("too many last blocks", close_code=1007, label="bad_deflate")

    def _check_head(self, first: int, second: int, at: int) -> None:
        opcode = first & 0x0F
        # RFC 6455 5.2, RFC 7692 6: RSV1 where compression was agreed, on a message's first frame
        if first & 0x70 and (
                first & 0x70 != _COMPRESSED or self._deflate is None or opcode not in (1, 2)):
            raise FrameError("reserved bit is set", at=at, label="reserved_bit")
        if (second >= 0x80) == self._client:    # RFC 6455 5.1
            wrong, label = (("a server must not mask", "masked") if self._client else
                            ("a client must mask", "unmasked"))
            raise FrameError(wrong, at=at, label=label)
        if opcode & 7 > 2:
            raise FrameError(f"reserved opcode {opcode}", at=at, label="reserved_opcode")
        if opcode >= 8 and (first < 0x80 or second & 0x7F > 125):       # RFC 6455 5.5
            raise FrameError("control frame is fragmented or too long", at=at, label="bad_control")
        if opcode < 8 and (opcode == _CONTINUATION) == (self._incoming is None):    # RFC 6455 5.4
            raise FrameError("fragments out of order", at=at, label="bad_fragment")

    def _control(self, opcode: int, payload: bytes) -> Ping | Pong | Close:
        if opcode != _CLOSE:
            return Ping(payload) if opcode == _PING else Pong(payload)
        self.closed_by_peer = True
        if not payload:
            return Close(1005, "")
        code = int.from_bytes(payload[:2], "big")
        if not _sendable_code(code):            # of a single byte, neither
            raise FrameError("malformed close frame", label="bad_close")
        return Close(code, _text(payload[2:]))

    # -- sending --

    def _encode(self, opcode: int, payload: _Bytes) -> bytes:
        if self.close_sent:
            raise StateError("a close frame was sent; nothing may follow it (RFC 6455 5.5.1)")
        deflate = self._deflate
        if deflate is not None and opcode < 8 and len(payload) >= deflate.above_bytes:
            deflater = self._deflater or _deflater(deflate.send_bits)
            self._deflater = deflater if deflate.send_takeover else None
            opcode, payload = opcode | _COMPRESSED, _squeeze(deflater, payload)
        return _frame(opcode, payload, os.urandom(4) if self._client else b"")

    def send_text(self, text: str) -> bytes:
        """Return a text message's frame."""
        return self._encode(_TEXT, text.encode())

    def send_binary(self, data: _Bytes) -> bytes:
        """Return a binary message's frame."""
        return self._encode(_BINARY, data)

    def send_ping(self, data: bytes = b"") -> bytes:
        """Return a ping frame of at most 125 bytes."""
        if len(data) > 125:
            raise UsageError("a ping carries at most 125 bytes")
        return self._encode(_PING, data)

    def send_pong(self, data: bytes = b"") -> bytes:
        """Return the pong that answers a ping with *data*."""
        return self._encode(_PONG, data)

    def send_close(self, code: int = 1000, reason: str = "") -> bytes:
        """Return a close frame, or nothing if one was sent already.

        A reason is cut to 123 bytes. Code 1005 sends none (RFC 6455 7.1.5).
        """
        if self.close_sent:
            return b""
        if code != 1005 and not _sendable_code(code):
            raise UsageError(f"close code {code} can't be sent; use 1000 to 1014 or 3000 to 4999")
        text = reason.encode()[:123].decode(errors="ignore").encode()
        frame = self._encode(_CLOSE, code.to_bytes(2, "big") + text if code != 1005 else b"")
        self.close_sent = True
        return frame


def _bad_text() -> PeerError:
    return FrameError("text is not UTF-8", close_code=1007, label="bad_utf8")


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise _bad_text() from None


def _check_upgrade(request: Request) -> None:
    """Check a client's opening handshake (RFC 6455 4.2.1).

    Raises:
        HandshakeError: with the status to answer.
    """
    if request.version < (1, 1):
        raise HandshakeError("upgrade with HTTP/1.1", label="bad_handshake")
    if not ("websocket" in request.tokens("upgrade") and "upgrade" in request.tokens("connection")):
        raise HandshakeError("WebSocket is spoken here", http_status=426, label="not_websocket")
    if request.headers.get("sec-websocket-version") != "13":
        raise HandshakeError("WebSocket version 13 is needed", http_status=426, label="ws_version")
    if not re.fullmatch(r"[A-Za-z0-9+/]{21}[AQgw]==", request.headers.get("sec-websocket-key", "")):
        raise HandshakeError("Sec-WebSocket-Key is not 16 bytes in base64", label="bad_handshake")


def _choose_subprotocol(request: Request, known: Iterable[str]) -> str:
    """Return the first protocol the client offers that we know, or "" (RFC 6455 4.2.2)."""
    offered = request.headers.get("sec-websocket-protocol", "").split(",")
    return next((each.strip() for each in offered if each.strip() in known), "")


_DEFLATE_OPTIONS = {                # RFC 7692 7.1
    "server_no_context_takeover": "", "client_no_context_takeover": "",
    "server_max_window_bits": "[89]|1[0-5]", "client_max_window_bits": "|[89]|1[0-5]"}
_NO_WINDOW = "8"                    # bits of one that zlib can't compress with
_EXTENSION = re.compile(rf'[ \t]*({_TOKEN_CHARS})[ \t]*(?:=[ \t]*("?)({_TOKEN_CHARS})\2[ \t]*)?')


def _extensions(header: str) -> Iterator[dict[str, str] | None]:
    """Yield each permessage-deflate's options in Sec-WebSocket-Extensions (RFC 6455 9.1).

    Of another extension, and of options that can't be, None.
    """
    for offer in filter(str.strip, header.split(",")):
        parts = [_EXTENSION.fullmatch(part) for part in offer.split(";")]
        found = [(match[1], match[3] or "") for match in parts if match]
        if None in parts or found[0][1]:
            raise HandshakeError("malformed Sec-WebSocket-Extensions", label="bad_handshake")
        options = dict(found[1:])
        right = found[0][0].lower() == "permessage-deflate" and len(options) == len(found) - 1
        yield options if right and all(re.fullmatch(_DEFLATE_OPTIONS.get(name, "(?!)"), value)
                                       for name, value in options.items()) else None


def _agree_deflate(request: Request, above_bytes: int) -> tuple[Deflate | None, str]:
    """Return what the first acceptable offer comes to, and the header that says so.

    Neither side remembers anything between messages: a window would take 300 KB a connection,
    and what goes to many is compressed once.
    """
    for options in _extensions(request.headers.get("sec-websocket-extensions", "")):
        bits = options.get("server_max_window_bits", "") if options is not None else _NO_WINDOW
        if bits != _NO_WINDOW:
            return Deflate(int(bits or 15), above_bytes=above_bytes), (
                "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
                + f"; server_max_window_bits={bits}" * bool(bits))
    return None, ""


def _deflate_answer(header: str, offered: bool) -> Deflate | None:
    """Return what a server's answer to our offer means (RFC 7692 7.1).

    Raises:
        HandshakeError: it names what was not offered.
    """
    agreed: Deflate | None = None
    for options in _extensions(header):
        if options is None or not offered or agreed is not None or (
                options.get("client_max_window_bits") in ("", _NO_WINDOW)):
            raise HandshakeError("the server chose an extension that was not offered")
        agreed = Deflate(int(options.get("client_max_window_bits", 15)),
                         "client_no_context_takeover" not in options,
                         int(options.get("server_max_window_bits", 15)),
                         "server_no_context_takeover" not in options)
    return agreed


def _accept_upgrade(request: Request, subprotocol: str, extensions: str) -> bytes:
    headers = {"Upgrade": "websocket", "Connection": "Upgrade",
               "Sec-WebSocket-Accept": _accept_key(request.headers["sec-websocket-key"]),
               "Sec-WebSocket-Protocol": subprotocol, "Sec-WebSocket-Extensions": extensions}
    return Response(status=101, headers={
        name: value for name, value in headers.items() if value}).encode()


# -- delimited messages (Java's writeDelimitedTo, Go's protodelim) --

def encode_delimited(message: Message) -> bytes:
    """Return *message* with its length before it, as a varint; raises as ``encode`` does."""
    if not isinstance(message, Message):
        raise UsageError(f"encode_delimited takes a Message, not {type(message).__name__}")
    parts, size = message._parts()
    return b"".join((_varint(size), *parts))


class DelimitedReader(Generic[_M]):
    """Cut a stream of length-prefixed messages, however its bytes are split.

    A length over *max_bytes* is refused before any of its message is stored. What came
    before a fault is returned first; the next ``feed`` raises, and so do all after it and
    ``close``, which one calls when the stream ends. ``position`` is where in the stream the
    last whole message ended: a file that was cut short can be truncated there.

    >>> class Note(Message):
    ...     text: str = field(1, "string")
    >>> reader = DelimitedReader(Note, max_bytes=100)
    >>> [reader.feed(bytes((byte,))) for byte in encode_delimited(Note(text="hi"))]
    [[], [], [], [], [Note(text='hi')]]
    >>> reader.close(), reader.position
    (None, 5)
    """

    __slots__ = ("max_bytes", "_cls", "_buffer", "_fault", "position", "pending")

    def __init__(self, cls: type[_M], max_bytes: int = 1 << 20) -> None:
        if not (isinstance(cls, type) and issubclass(cls, Message)):
            raise UsageError(f"DelimitedReader reads a class of messages, not {cls!r}")
        self._cls = cls
        self.max_bytes = max_bytes
        self._buffer = bytearray()
        self._fault: tuple[type[PeerError], str] | None = None
        self.position = 0
        self.pending = 0                # bytes after position, kept or not

    def feed(self, data: _Bytes) -> list[_M]:
        """Return the messages that *data* completes.

        Raises:
            TooBig: a length passes the limit.
            WireError: a length or a message is malformed; says where in the stream.
        """
        messages: list[_M] = []
        try:
            for message in self.each(data):
                messages.append(message)
        except PeerError:
            if not messages:
                raise
        return messages

    def each(self, data: _Bytes) -> Iterator[_M]:
        """Yield the messages that *data* completes, each decoded when it is its turn.

        *data* is taken when the first one is asked for.

        Raises:
            TooBig, WireError: as ``feed``, after those that came before.
        """
        with _view(data) as view:
            self.pending += len(view)
            if self._fault is None:
                self._buffer += view
        while self._fault is None and (message := self._cut()) is not None:
            yield message
        self._raise_fault()

    def close(self) -> None:
        """Say that the stream has ended.

        Raises:
            WireError: within a message; or the fault that ``feed`` has still to raise.
        """
        self._raise_fault()
        if self.pending:
            raise WireError(f"the stream ends {self.pending} bytes into the message at byte "
                            f"{self.position}")

    def _raise_fault(self) -> None:
        if self._fault is not None:     # a new one each time: a kept one would keep its frames
            error, text = self._fault
            raise error(f"{text}, in the message at byte {self.position} of the stream")

    def _cut(self) -> _M | None:
        """Take the first whole message out of the buffer; None if there is none."""
        try:
            size, start = _delimiter(self._buffer[:5])
            if size > self.max_bytes:
                raise TooBig(f"a message of {size} bytes; the limit is {self.max_bytes}")
            end = start + size
            if not start or end > len(self._buffer):
                return None
            with memoryview(self._buffer) as view:
                data = bytes(view[start:end])
            message = self._cls.decode(data)
        except PeerError as fault:
            self._fault = type(fault), str(fault)
            self._buffer.clear()
            return None
        del self._buffer[:end]              # cheap at the front
        self.position += end
        self.pending -= end
        return message


def _delimiter(head: _Bytes) -> tuple[int, int]:
    """Return a length and where it ends; (0, 0) while it is incomplete."""
    try:
        return _read_short(head, 0)
    except IndexError:
        if len(head) == 5:
            raise WireError("tag or length of more than 32 bits", at=0) from None
        return 0, 0


# =============================================================================
# 14  TRANSPORT - the selector loop; all server sockets live here
# =============================================================================
# Knows: ERRORS, PROTOCOLS.     Never: schema, topics, space. What the bytes mean is told to
# an Application, which is handed in.
#
# TLS stands between the socket and the connection and never touches the socket itself.
#
# One pass of the loop: wait for sockets or for the time that was asked, read what came, run
# what was called from elsewhere, run timers, then write - once per connection, everything
# that the pass made for it.
#
# A connection is open, then finishing (its last bytes go out, input is thrown away, then our
# half is shut and the peer's end awaited, so that no reset eats the goodbye), then closed.
# PeerError is caught in exactly one place, Connection._advance.

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_RECV_BYTES = 65536
_STREAM_BYTES = 4096                # a ByteStream's frames may be short, and many of them dear
_FINISH_S = 2.0                     # how long a goodbye may take
_HTTP_BACKLOG = 1 << 20             # pipelined requests wait while this much is unsent
_MAX_ACCEPTS = 64                   # per pass, so that a flood of connects starves nobody
_FIRST_FD = 3                       # of what systemd hands over (sd_listen_fds(3))


@functools.lru_cache(maxsize=64)
def _http_date(seconds: float) -> str:
    """Return an IMF-fixdate (RFC 9110 5.6.7)."""
    from email.utils import formatdate
    return formatdate(seconds, usegmt=True)


def _now_date() -> str:
    return _http_date(int(time.time()))


class _Networks:
    """A set of addresses and CIDR blocks; "unix" in it stands for Unix sockets.

    Cost of ``in``: a look-up for each length of prefix. Raises ValueError for other texts.
    """

    __slots__ = ("_unix", "_blocks")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        import ipaddress
        texts = list(texts)
        self._unix = "unix" in texts
        self._blocks: dict[tuple[int, int], set[int]] = {}      # by version and bits of the host
        for text in (each for each in texts if each != "unix"):
            block: Any = ipaddress.ip_network(text, strict=False)
            mapped = block.version == 6 and block.prefixlen >= 96 and block[0].ipv4_mapped
            if mapped:
                block = ipaddress.ip_network((int(mapped), block.prefixlen - 96))
            bits = block.max_prefixlen - block.prefixlen
            self._blocks.setdefault((block.version, bits), set()).add(int(block[0]) >> bits)

    def __bool__(self) -> bool:
        return self._unix or bool(self._blocks)

    def __contains__(self, address: str) -> bool:
        import ipaddress
        if address == "unix" or not self._blocks:
            return address == "unix" and self._unix
        found = ipaddress.ip_address(address)
        return any(version == found.version and int(found) >> bits in numbers
                   for (version, bits), numbers in self._blocks.items())


def _plain_address(text: str) -> str:
    """Return an IP address without a port, brackets, or the prefix of a mapped IPv4 one; or ""."""
    import ipaddress
    match = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+|(.*)", text)
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(match[1] or match[2] or match[3] if match else "")
        return str(getattr(found, "ipv4_mapped", None) or found)
    return ""


def is_loopback(address: str) -> bool:
    """Whether a peer's or a bind address is this machine's own."""
    return address in ("unix", "localhost", "::1") or bool(re.fullmatch(r"127(\.\d+){3}", address))


class Limits(NamedTuple):
    """What the transport enforces; 0 means no limit (DESIGN 4)."""

    max_connections: int = 10_000
    max_connections_per_address: int = 100
    idle_s: float = 60.0
    handshake_s: float = 10.0
    ping_s: float = 20.0
    max_header_bytes: int = 16_384
    max_message_bytes: int = 65_536
    max_messages_per_s: float = 120.0
    burst: float = 240.0
    outbox_bytes: int = 1 << 20
    banned: _Networks = _Networks()
    trusted_proxies: _Networks = _Networks()


class ByteStream(Protocol):
    """What takes a connection's bytes where they are neither HTTP nor WebSocket."""

    def receive(self, data: bytes) -> None:
        """Take what came; PeerError ends the connection."""
    def farewell(self, reason: str) -> bytes:
        """Return what is to be said last."""
    def closed(self, reason: str) -> None:
        """Forget the connection; told once."""
    def drained(self) -> None:
        """Everything that waited for a slow peer is sent."""


class Application(Protocol):
    """What the transport tells the sections below it."""

    def on_request(self, connection: Connection, request: Request) -> Response | None:
        """Answer a request, or take the connection over and return None."""
    def on_message(self, connection: Connection, message: str | bytes) -> None:
        """Take a WebSocket message; PeerError ends the connection with its code."""
    def on_close(self, connection: Connection, code: int, reason: str) -> None:
        """Forget the owner; told once for every connection that was taken over."""
    def on_drain(self, connection: Connection) -> None:
        """Everything that waited for a slow peer is sent."""


@functools.cache
def _heeded_future() -> type[Future[Any]]:
    """Return a Future class that logs an exception which nobody asks for."""
    from concurrent.futures import Future

    class HeededFuture(Future[Any]):
        asked = False
        on_loop: Callable[[], bool] = staticmethod(lambda: False)   # whether asked from there

        def _ask(self) -> None:
            if not self.done() and self.on_loop():
                raise StateError("to wait here for the loop would be for ever: this is the loop's "
                                 "own thread; take add_done_callback, or call the function itself, "
                                 "without call_soon")
            self.asked = True

        def result(self, timeout: float | None = None) -> Any:
            self._ask()
            return super().result(timeout)

        def exception(self, timeout: float | None = None) -> BaseException | None:
            self._ask()
            return super().exception(timeout)

        def __await__(self) -> Iterator[Any]:
            import asyncio
            return asyncio.wrap_future(self).__await__()

        def __del__(self) -> None:
            error = self._exception
            if error is not None and not self.asked and not self.cancelled():
                _log.error("a function given to call_soon failed", exc_info=error)

    return HeededFuture


class Loop:
    """The selector loop: sockets, timers, and calls from other threads."""

    __slots__ = ("selector", "clock", "now_ns", "closed", "_calls", "_timers", "_numbers",
                 "_dirty", "_waker", "_wakee")

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.selector = selectors.DefaultSelector()
        self.clock = clock
        self.now_ns = clock()               # of this pass
        self.closed = False
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...], Any]] = deque()
        self._timers: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._dirty: deque[Connection] = deque()
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self.selector.register(self._wakee, _READ, self._drain_wakes)

    def _drain_wakes(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):      # what is left wakes the next pass, too
            self._wakee.recv(4096)

    def wake(self) -> None:
        """Make a waiting pass return; any thread, also a signal handler."""
        with contextlib.suppress(OSError):      # full: it will wake anyway
            self._waker.send(b"\0")

    def call_soon(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``fn(*args)`` in the next pass; the one thread-safe door."""
        if not callable(fn):
            raise UsageError(f"call_soon(fn, *args) needs a function, not {fn!r}")
        future = _heeded_future()()
        self._calls.append((fn, args, future))
        self.wake()
        if self.closed:             # close() may have looked before the append
            self._cancel_calls()
        return future

    def call_later(self, delay_s: float, fn: Callable[[], object]) -> None:
        """Run *fn* once, after *delay_s* seconds."""
        due_ns = self.clock() + int(delay_s * 1e9)
        heapq.heappush(self._timers, (due_ns, next(self._numbers), fn))

    def mark_dirty(self, connection: Connection) -> None:
        """Flush *connection* at the end of this pass."""
        self._dirty.append(connection)

    def wait_s(self) -> float:
        """Return how long a pass may wait if no socket has anything to tell."""
        if self._calls or self._dirty:
            return 0.0
        return max(0.0, (self._timers[0][0] - self.clock()) / 1e9) if self._timers else 3600.0

    def run_once(self, timeout_s: float) -> None:
        """Run one pass; wait at most *timeout_s* for something to happen."""
        ready = self.selector.select(max(0.0, min(timeout_s, self.wait_s())))
        self.now_ns = self.clock()
        for key, mask in ready:
            key.data(mask)
        for _ in range(len(self._calls)):       # what these call comes next pass
            self._run_call(*self._calls.popleft())
        while self._timers and self._timers[0][0] <= self.now_ns:
            heapq.heappop(self._timers)[2]()

    def _run_call(self, fn: Callable[..., Any], args: tuple[Any, ...], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(fn(*args))
        except BaseException as error:      # sys.exit(), too, is the caller's to hear of
            future.set_exception(error)
        del future                  # else its traceback would keep it, and it the traceback

    def flush(self) -> None:
        """Write what this pass made, once per connection."""
        while self._dirty:
            self._dirty.popleft().flush()

    def close(self) -> None:
        """Give the file descriptors back; calls still waiting are cancelled."""
        self.closed = True
        self._cancel_calls()
        self.selector.close()
        self._waker.close()
        self._wakee.close()

    def _cancel_calls(self) -> None:
        with contextlib.suppress(IndexError):       # several threads may be at it
            while True:
                self._calls.popleft()[2].cancel()


class _TLS:
    """One connection's TLS, from memory to memory: no handshake can stall the loop."""

    __slots__ = ("_incoming", "_outgoing", "_object", "closed_by_peer")

    def __init__(self, context: ssl.SSLContext) -> None:
        import ssl
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.closed_by_peer = False

    def receive(self, data: bytes) -> bytes:
        """Return what the peer's bytes say; their answer comes with what is sealed next.

        Raises:
            HandshakeError: they are not TLS, or not what was agreed.
        """
        import ssl
        self._incoming.write(data)
        plain = []
        try:
            while piece := self._object.read(_RECV_BYTES):
                plain.append(piece)
            self.closed_by_peer = True          # its close_notify
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise HandshakeError(error.reason or "TLS failed", label="tls") from None
        return b"".join(plain)

    def seal(self, data: _Bytes) -> bytes:
        """Return what TLS itself has to send, and *data* as the peer's TLS reads it.

        Before both have agreed, *data* can't be said, and is not.
        """
        import ssl
        view = memoryview(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            while view:                     # a record at a time
                view = view[self._object.write(view):]
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        """Return the close_notify, once (RFC 8446 6.1)."""
        import ssl
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        return self._outgoing.read()


_REFUSAL_HEADERS = {                # RFC 9110 7.8, 11.6.1, 15.5.22
    401: {"Connection": "close", "WWW-Authenticate": "Bearer"},
    426: {"Connection": "Upgrade, close", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}}


def _measured(pieces: Iterator[bytes], length: int) -> Iterator[bytes]:
    """Yield *length* bytes of *pieces*: others would put the next answer out of step."""
    while length > 0:
        piece = next(pieces, None)
        if piece is None:
            raise HorizonError(f"the body is {length} bytes shorter than was announced")
        yield piece[:length]
        length -= len(piece)


def _chunks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yield *pieces* in the chunked coding (RFC 9112 7.1)."""
    for piece in filter(None, pieces):      # an empty one would be the last
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


class Connection:
    """One accepted socket: HTTP at first; then perhaps a WebSocket, or a stream of events.

    A connection of a server of streams is a ByteStream's from the start.
    """

    __slots__ = ("server", "sock", "peer", "address", "owner", "http", "ws", "stream_of", "tls",
                 "heard_ns",
                 "_out", "_queued", "unsent", "_pieces", "_state", "_since_ns", "_fresh", "_slow",
                 "_pings", "_tokens", "_refilled_ns", "_mask", "_end")

    def __init__(self, server: Server, sock: socket.socket, address: str) -> None:
        now = server.loop.now_ns
        self.server = server
        self.sock = sock
        self.peer = address                 # the socket's
        self.address = address              # the client's, as a trusted proxy tells it
        self.owner: Any = None              # the application's, once it took the connection over
        self.http: HTTPConnection | None = HTTPConnection(
            server.limits.max_header_bytes, server.limits.max_message_bytes)
        self.ws: WebSocketConnection | None = None
        self.stream_of: ByteStream | None = None
        self.tls = _TLS(server.tls) if server.tls is not None else None
        self.heard_ns = now                 # last sign of life: bytes came, or were taken
        self._out: list[bytes] | None = None        # this pass's; no container until first use
        self._queued = 0                    # bytes in _out
        self.unsent: bytes | memoryview = b""      # what the socket did not take
        self._pieces: Iterator[bytes] | None = None     # of a body, still to be sent
        self._state = "open"
        self._since_ns = now  # when the request began, the last was answered, it finished
        self._fresh = True                  # no request was answered yet
        self._slow = False                  # given up on
        self._pings = 0                     # unanswered
        self._tokens = max(1.0, server.limits.burst or server.limits.max_messages_per_s)
        self._refilled_ns = now
        self._mask = _READ
        self._end: tuple[int, str] | None = None    # what on_close was told

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return self._queued + len(self.unsent)

    @property
    def is_open(self) -> bool:
        """Whether it still takes messages."""
        return self._state == "open"

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way: HTTP between two requests."""
        return (self._state == "open" and self.http is not None and not self.http.started
                and not self.backlog and self._pieces is None)

    # -- reading --

    def ready(self, mask: int) -> None:
        """Do what the selector found possible."""
        if mask & _WRITE:
            self._guarded(self._writable)
        if mask & _READ and self._state != "closed":
            self._guarded(self._readable)

    def _guarded(self, act: Callable[[], None]) -> None:
        """A bug here must neither end the loop nor stop what it does for others."""
        try:
            act()
        except Exception:
            _log.exception("connection from %s failed; it is closed", self.address)
            self.abort("bug")

    def _readable(self) -> None:
        try:
            data = self.sock.recv(_RECV_BYTES if self.stream_of is None else _STREAM_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            return self.abort("reset")
        if not data:
            return self.abort("eof")
        self.server.bytes_received += len(data)
        if self.tls is not None:
            data = self._decipher(self.tls, data)
        if data and self._state != "open":
            self._await_close(data)
        elif data:
            self.heard_ns = self.server.loop.now_ns
            self._pings = 0
            self._advance(data)
        self._heed_end()

    def _heed_end(self) -> None:
        """Close when the peer's TLS has ended and what it asked before is answered."""
        if self.tls is not None and self.tls.closed_by_peer and self._state == "open" and not (
                self.backlog or self._pieces is not None):
            self._finish()
            self._tell_end(1006, "eof")

    def _decipher(self, tls: _TLS, data: bytes) -> bytes:
        """Return what *data* says in plain, and send what TLS answers."""
        try:
            plain = tls.receive(data)
        except HandshakeError as error:
            # nothing that was meant for TLS may leave without it
            self.tls, self._pieces, self._out, self._queued, plain = None, None, None, 0, b""
            self.server.refused[error.label] += 1
            _log.debug("%s: TLS: %s", self.address, error)
            self._finish()
            self._tell_end(1006, "tls")
            if error.reason == "HTTP_REQUEST" and self.stream_of is None:
                self._queue(Response("this port speaks TLS; say https\n", 400).encode(close=True))
        if answer := tls.seal(b""):
            self._write(answer)
        return plain

    def _advance(self, data: bytes) -> None:
        """Do what *data*, and what was left before it, asks; a peer's fault ends the connection."""
        try:
            if self.ws is not None:
                self._feed_websocket(self.ws, data)
            elif self.stream_of is not None:
                self.stream_of.receive(data)
            elif self.http is not None:         # of a stream of events nothing is asked any more
                if data.strip(b"\r\n") and not (self._fresh or self.http.started):
                    self._since_ns = self.server.loop.now_ns
                self.http.receive(data)
                self._serve_http(self.http)
        except PeerError as error:
            self._goodbye(error)

    def _feed_websocket(self, ws: WebSocketConnection, data: bytes) -> None:
        ws.receive(data)
        before = ws.frames
        while events := ws.take_events():
            self.charge(ws.frames - before)
            before = ws.frames
            for event in events:
                if self._state != "open":
                    return
                if isinstance(event, str | bytes):
                    self.server.messages_received += 1
                    self.server.app.on_message(self, event)
                elif isinstance(event, Ping):
                    self.send(ws.send_pong(event.data))
                elif isinstance(event, Close):
                    self.close(event.code, event.reason)
        self.charge(ws.frames - before)         # fragments of what is not complete yet

    def _await_close(self, data: bytes) -> None:
        """Look for nothing but the peer's close frame; then the server closes first (7.1.1)."""
        if self.ws is not None:
            with contextlib.suppress(PeerError):
                self.ws.receive(data)
                while self.ws.take_events():
                    pass
            if self.ws.closed_by_peer and not self.backlog:
                self.abort("closed")

    def charge(self, messages: int) -> None:
        """Take *messages* from the peer's bucket (DESIGN 4: rate).

        Raises:
            PeerError: the bucket is empty; 1008.
        """
        limits = self.server.limits
        if not limits.max_messages_per_s or not messages:
            return
        now = self.server.loop.now_ns
        earned = (now - self._refilled_ns) * limits.max_messages_per_s / 1e9
        self._refilled_ns = now
        most = max(1.0, limits.burst or limits.max_messages_per_s)
        self._tokens = min(most, self._tokens + earned) - messages
        if self._tokens < 0:
            raise PeerError(f"too many messages: over {limits.max_messages_per_s:g} per second "
                            "(max_messages_per_s)", close_code=1008, http_status=429, label="rate")

    def _serve_http(self, http: HTTPConnection) -> None:
        """Answer complete requests in order, as long as the peer takes the answers."""
        while self._state == "open" and self.backlog < _HTTP_BACKLOG and self._pieces is None:
            if not (requests := http.take_events()):
                if http.expects_continue:
                    http.expects_continue = False
                    self.send(Response(status=100).encode())
                return
            request = requests[0]
            self.server.requests += 1
            self.server.identify(self, request)
            response = self.server.app.on_request(self, request)
            if response is None:                # taken over; frames may have come along
                if self.ws is not None and (trailing := http.trailing):
                    self._feed_websocket(self.ws, trailing)
                return
            self._respond(request, response)

    def _respond(self, request: Request, response: Response) -> None:
        old = request.version < (1, 1)
        endless = response.pieces is not None and response.length < 0
        said = [value for name, value in _header_lines(response.headers)
                if name.lower() == "connection"]
        close = (not request.keep_alive or "upgrade" in request.headers or self.server.draining
                 or endless and old or "close" in "".join(said).lower())
        more = {"Connection": "keep-alive"} if old and not close else {}
        if endless and not (old or response.bodiless):
            more["Transfer-Encoding"] = "chunked"       # so that a cut can be seen
        head_only = request.method == "HEAD"
        self.send(response.encode(head_only=head_only, close=close, Date=_now_date(), **more))
        if response.pieces is not None and not head_only and not response.bodiless:
            self._pieces = (_measured(response.pieces, response.length) if not endless else
                            response.pieces if old else _chunks(response.pieces))
        self._since_ns = self.server.loop.now_ns
        self._fresh = False
        if close:
            self._finish()

    def upgrade(self, request: Request, owner: Any, subprotocol: str = "",
                deflate: Deflate | None = None, extensions: str = "") -> None:
        """Become a WebSocket that belongs to *owner*."""
        self.send(_accept_upgrade(request, subprotocol, extensions))
        self.ws = WebSocketConnection("server", self.server.limits.max_message_bytes, deflate)
        self._belong(owner)

    def stream(self, response: Response, owner: Any) -> None:
        """Send the head of *response*; its body is what *owner* sends until the end."""
        self.send(response.encode(head_only=True, close=True, Date=_now_date()))
        self._belong(owner)

    def begin(self, stream: ByteStream) -> None:
        """Become *stream*'s."""
        self.stream_of = stream
        self._belong(stream)

    def _belong(self, owner: Any) -> None:
        self.http = None
        self.owner = owner
        self.server.websockets += 1

    def _goodbye(self, error: PeerError) -> None:
        """Answer what a peer did wrong: a status or a close code, and a count."""
        self.server.refused[error.label] += 1
        _log.debug("%s refused: %s", self.address, error)
        if self.ws is not None or self.stream_of is not None:
            return self.close(error.close_code, error.reason)
        headers = _REFUSAL_HEADERS.get(error.http_status)
        response = Response(error.reason + "\n", error.http_status, headers)
        head_only = self.http is not None and self.http.head_only
        self.send(response.encode(head_only=head_only, close=True, Date=_now_date()))
        self._finish()

    # -- writing --

    def send(self, data: bytes) -> None:
        """Send *data* at the end of this pass; a WebSocket that is too far behind is closed."""
        if self._state != "open":
            return
        bound = self.server.limits.outbox_bytes
        if self.owner is not None and bound and self.backlog > bound:
            self.flush()                        # perhaps it only was not asked yet
            if self.backlog > bound:
                return self.slow()
        self._queue(data)

    def _queue(self, data: bytes) -> None:
        if self._out is None:
            self._out = []
            self.server.loop.mark_dirty(self)
        self._out.append(data)
        self._queued += len(data)

    def slow(self) -> None:
        """Give up on a peer that does not read: 1013, in the next pass.

        Why not at once: closing tells handlers, and these may send to others as slow.
        """
        if not self._slow:
            self._slow = True
            self.server.loop.call_later(0.0, self._close_slow)

    def _close_slow(self) -> None:
        if self._state != "open":
            return
        self.server.refused["slow"] += 1
        self._out, self._queued = None, 0
        self.close(SlowPeer.close_code, "too slow")

    def flush(self) -> None:
        """Write what waits, as far as the socket takes it."""
        self._guarded(self._flush)

    def _flush(self) -> None:
        if self.unsent or self._state == "closed":
            return
        if out := self._out:
            data = out[0] if len(out) == 1 else b"".join(out)
            self._out, self._queued = None, 0
            self.server.writes += 1
            self.server.bytes_sent += len(data)
            self.send_now(data)
        if self._pieces is not None and not self.unsent:
            self._send_piece(self._pieces)
        if self.unsent or self._pieces is not None:
            return
        if self._state == "finishing":
            if self.tls is not None and (goodbye := self.tls.goodbye()):
                self._write(goodbye)
            if self.ws is not None and self.ws.closed_by_peer or self.unsent:
                return self.abort("closed")
            self._since_ns = self.server.loop.now_ns
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
        elif self._state == "open" and self.http is not None and self.http.started:
            self._advance(b"")                  # requests that waited for room
        self._heed_end()

    def send_now(self, data: bytes) -> None:
        """Write *data* in one call; the caller counts it, what the socket does not take waits."""
        # HOT: once per client per tick (bench 14.fanout)
        if self._out:
            self.server.bytes_sent += self._queued
            self._out.append(data)
            data = b"".join(self._out)
            self._out, self._queued = None, 0
        self._write(data if self.tls is None else self.tls.seal(data))

    def _send_piece(self, pieces: Iterator[bytes]) -> None:
        """Send one more piece of a body; the next when the selector says so: others wait, too."""
        piece = next(pieces, None)
        self._since_ns = self.heard_ns = self.server.loop.now_ns    # the last one was taken
        if piece is None:
            self._pieces = None
        else:
            self.server.bytes_sent += len(piece)
            self.send_now(piece)
            self._watch(self._mask | _WRITE)

    def _write(self, data: _Bytes) -> None:
        if self.unsent:                     # TLS has its own to say, in order
            self.unsent = memoryview(bytes(self.unsent) + data)
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.server.bytes_sent -= len(data)
            return self.abort("reset")
        if sent < len(data):
            self.server.bytes_sent -= len(data) - sent      # not yet
            self.unsent = memoryview(data)[sent:]
            self._watch(self._mask | _WRITE)

    def _writable(self) -> None:
        if waiting := self.unsent:
            self.unsent = b""
            self.server.bytes_sent += len(waiting)      # _write takes back what is not sent
            self._write(waiting)
            if len(self.unsent) < len(waiting):
                self.heard_ns = self.server.loop.now_ns     # it reads, so it lives
            if self.unsent or self._state == "closed":
                return
        self._watch(_READ)
        self.flush()
        if self._state == "open" and self.owner is not None and not self.unsent:
            if self.stream_of is not None:
                self.stream_of.drained()
            else:
                self.server.app.on_drain(self)

    def _watch(self, mask: int) -> None:
        # an HTTP peer that does not take its answers is not read from either
        if self.http is not None and mask & _WRITE:
            mask = _WRITE
        if mask != self._mask and self._state != "closed":
            self._mask = mask
            self.server.loop.selector.modify(self.sock, mask, self.ready)

    # -- ending --

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye with *code*, send what waits, then close."""
        if self._state != "open":
            return
        if self.ws is not None:
            self._queue(self.ws.send_close(code, reason))
        elif self.stream_of is not None:
            self._queue(self.stream_of.farewell(reason))
        self._finish()                      # first, so that nothing follows the close frame
        self._tell_end(code, reason)

    def _finish(self) -> None:
        self._state = "finishing"
        self._since_ns = self.server.loop.now_ns
        self.server.loop.mark_dirty(self)

    def abort(self, reason: str) -> None:
        """Close at once; RFC 6455 7.1.5 calls this 1006."""
        if self._state == "closed":
            return
        self._state = "closed"
        if self._pieces is not None:        # a reset: an end would look like the body's
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.unsent, self._out, self._queued, self._pieces = b"", None, 0, None
        self.server.forget(self)
        self._tell_end(1006, reason)

    def _tell_end(self, code: int, reason: str) -> None:
        if self.owner is not None and self._end is None:
            self._end = (code, reason)
            self.server.websockets -= 1
            if self.stream_of is not None:
                self.stream_of.closed(reason)
            else:
                self.server.app.on_close(self, code, reason)

    def check_time(self, now: int) -> None:
        """Apply the time limits; called once a second, or oftener where they are short."""
        limits = self.server.limits
        quiet_s = (now - self.heard_ns) / 1e9
        waited_s = (now - self._since_ns) / 1e9
        busy = self.backlog or self._pieces is not None
        if self._state == "finishing":
            if busy:                # as long as it takes its bytes, it may have them
                waited_s = min(quiet_s, waited_s)
            patience_s = limits.idle_s if busy and self.http is not None else _FINISH_S
            if patience_s and waited_s > patience_s:
                self.abort("finish_timeout")
        elif self.owner is not None:
            if self.stream_of is None:
                self._check_ping(quiet_s, limits)
        elif busy or self.http is None or not self.http.started:
            label, limit_s = (("write_timeout", limits.idle_s) if busy else
                              ("handshake_timeout", limits.handshake_s) if self._fresh else
                              ("idle", limits.idle_s))
            if limit_s and (quiet_s if busy else waited_s) > limit_s:
                self.server.refused[label] += 1
                self.abort(label)
        elif limits.handshake_s and waited_s > limits.handshake_s:
            self._goodbye(PeerError("no complete request in time", http_status=408,
                                    label="handshake_timeout"))

    def _check_ping(self, quiet_s: float, limits: Limits) -> None:
        """Ping a quiet peer; after two unanswered ones it is dead (DESIGN 4)."""
        ping_s = limits.ping_s
        if self.ws is None and not self.unsent:         # who reads events says nothing
            if ping_s and quiet_s >= ping_s:
                self.heard_ns = self.server.loop.now_ns
                self.send(b":\n\n")                    # a comment
            return
        if not ping_s and limits.idle_s and quiet_s > limits.idle_s:
            self.server.refused["idle"] += 1
            return self.close(1001, "idle")
        if not ping_s or quiet_s < ping_s * (self._pings + 1):
            return
        if self._pings == 2:
            self.server.refused["ping_timeout"] += 1
            return self.abort("ping timeout")
        self._pings += 1
        if self.ws is not None:
            self.send(self.ws.send_ping())


def _tell_systemd(state: str) -> None:
    """Send a line to the service manager, if there is one (sd_notify(3))."""
    if path := os.environ.get("NOTIFY_SOCKET", ""):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)


def _tls_context(cert: str, key: str) -> ssl.SSLContext:
    """Return a server's TLS: 1.2 or later, HTTP/1.1 (RFC 7301); OSError, if a file won't do."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(cert, key or None)
    return context


class Server:
    """Listening sockets and the connections that came through them.

    *app* answers what comes; where it is a function, connections are neither HTTP nor
    WebSocket, but belong to the ByteStream that it makes of each.
    """

    __slots__ = ("loop", "app", "limits", "connections", "draining", "full", "refused",
                 "websockets", "accepted", "requests", "messages_received", "bytes_received",
                 "bytes_sent", "writes", "tls", "_listeners", "_per_address", "_unix_file")

    def __init__(self, loop: Loop, app: Application | Callable[[Connection], ByteStream],
                 limits: Limits) -> None:
        self.loop = loop
        self.app: Any = app
        self.limits = limits
        self.connections: dict[int, Connection] = {}        # by file descriptor
        self.draining = False
        self.full = False                           # there is too little memory for more
        self.refused: Counter[str] = Counter()      # peers' faults and our limits, by reason
        self.websockets = self.accepted = self.requests = self.messages_received = 0
        self.bytes_received = self.bytes_sent = self.writes = 0
        self.tls: ssl.SSLContext | None = None      # for connections to come
        self._listeners: list[socket.socket] = []
        self._per_address: Counter[str] = Counter()
        self._unix_file = "", 0                     # path and inode
        self._check_times()

    def listen(self, host: str, port: int, reuse_port: bool = False) -> int:
        """Listen on TCP; return the port, chosen by the system if it was 0.

        With *reuse_port* several processes share a port, and the system shares out connections.

        Raises:
            OSError: the address can't be used; errno says why.
        """
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._listen(listener, address)
        return int(listener.getsockname()[1])

    def listen_unix(self, path: str, mode: int | None = None) -> None:
        """Listen on a Unix socket; one that a dead process left behind is replaced.

        *mode* says who may connect, as chmod does.

        Raises:
            OSError: somebody listens there, or the path can't be used.
        """
        import stat
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError(errno.EEXIST, "there is a file that is no socket")
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except BlockingIOError:             # its backlog is full
                pass
            if os.path.lexists(path):
                raise OSError(errno.EADDRINUSE, "somebody listens on this socket")
        self._listen(socket.socket(socket.AF_UNIX), path, mode)
        self._unix_file = path, os.lstat(path).st_ino

    def listen_inherited(self) -> int:
        """Listen on what systemd opened for this process; return how many (sd_listen_fds(3))."""
        text = os.environ.get("LISTEN_FDS", "0")
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return 0
        if not re.fullmatch(r"\d{1,4}", text):
            raise ConfigError(f"LISTEN_FDS = {text!r} in the environment must be a number")
        for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):     # not for our children
            os.environ.pop(name, None)
        for number in range(_FIRST_FD, _FIRST_FD + int(text)):
            os.set_inheritable(number, False)
            self._listen(socket.socket(fileno=number), None)
        return int(text)

    def _listen(self, listener: socket.socket, address: Any, mode: int | None = None) -> None:
        try:
            if address is not None:
                listener.bind(address)
            if mode is not None:
                os.chmod(address, mode)         # before anybody can connect
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._listeners.append(listener)
        self._resume(listener)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses and ports that are listened on; ("unix", 0) for a Unix socket."""
        names = [each.getsockname() for each in self._listeners]
        return [name[:2] if isinstance(name, tuple) else ("unix", 0) for name in names]

    def _accept(self, listener: socket.socket, _mask: int) -> None:
        for _ in range(_MAX_ACCEPTS if listener in self._listeners else 0):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:        # no descriptors left: let some be closed first
                self.refused["accept_error"] += 1
                _log.error("can't accept: %s", error)
                self.loop.selector.unregister(listener)
                self.loop.call_later(0.2, functools.partial(self._resume, listener))
                return
            self.accepted += 1
            self._admit(sock, _plain_address(address[0]) if isinstance(address, tuple) else "unix")

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self.loop.selector.register(listener, _READ, functools.partial(self._accept, listener))

    def _refusal(self, address: str) -> PeerError | None:
        """Return why *address* may not have one more connection, if it may not."""
        limits, label = self.limits, "max_connections_per_address"
        if address in limits.banned:
            return HandshakeError("this address is banned", http_status=403, label="banned")
        if 0 < limits.max_connections_per_address <= self._per_address[address] and not (
                is_loopback(address) or address in limits.trusted_proxies):
            return HandshakeError("too many connections", http_status=503, label=label)
        if self.full:
            return HandshakeError("out of memory", http_status=503, label="max_memory")
        return None

    def _admit(self, sock: socket.socket, address: str) -> None:
        """Take a new connection in, or refuse it with 503, or 403."""
        refusal = self._refusal(address)
        if 0 < self.limits.max_connections <= len(self.connections):
            label = "max_connections"
            refusal = HandshakeError("too many connections", http_status=503, label=label)
        sock.setblocking(False)
        if refusal is not None:
            self.refused[refusal.label] += 1
            with contextlib.suppress(OSError):
                if self.tls is None and not callable(self.app):
                    answer = Response(refusal.reason + "\n", refusal.http_status)
                    sock.send(answer.encode(close=True, Date=_now_date()))
                sock.shutdown(socket.SHUT_WR)
            return sock.close()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):         # a pulled cable
                timeout_ms = int(min(3000 * self.limits.ping_s, 0x7FFFFFFF))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        connection = Connection(self, sock, address)
        self.connections[sock.fileno()] = connection
        self._per_address[address] += 1
        self.loop.selector.register(sock, _READ, connection.ready)
        if callable(self.app):
            connection.begin(self.app(connection))

    def identify(self, connection: Connection, request: Request) -> None:
        """Find out whom a request comes from; only trusted proxies may speak for others.

        Raises:
            HandshakeError: that address may not have one more connection.
        """
        address, trusted = connection.peer, self.limits.trusted_proxies
        hops = request.headers.get("x-forwarded-for", "").split(",") if trusted else []
        while hops and address in trusted and (hop := _plain_address(hops.pop().strip())):
            address = hop
        if address != connection.address:
            if refusal := self._refusal(address):
                raise refusal
            self._per_address[address] += 1
            self._leave(connection.address)
            connection.address = address
        request.address = address

    def _leave(self, address: str) -> None:
        self._per_address[address] -= 1
        if not self._per_address[address]:
            del self._per_address[address]

    def forget(self, connection: Connection) -> None:
        """Close a connection's socket and drop every trace of it."""
        del self.connections[connection.sock.fileno()]
        self.loop.selector.unregister(connection.sock)
        connection.sock.close()
        self._leave(connection.address)

    def _check_times(self) -> None:
        if self.draining and not self.connections:
            return                          # nobody will come any more
        limits = (self.limits.idle_s, self.limits.handshake_s, self.limits.ping_s)
        shortest = min((each for each in limits if each), default=4.0)
        self.loop.call_later(min(1.0, max(0.05, shortest / 4)), self._check_times)
        for connection in list(self.connections.values()):
            connection.check_time(self.loop.now_ns)

    def stop_accepting(self) -> None:
        """Close the listening sockets; connections stay."""
        self.draining = True
        for listener in self._listeners:
            with contextlib.suppress(KeyError):     # paused at the moment
                self.loop.selector.unregister(listener)
            listener.close()
        self._listeners.clear()
        path, inode = self._unix_file
        with contextlib.suppress(OSError):
            if path and os.lstat(path).st_ino == inode:     # it may be somebody else's now
                os.unlink(path)
        self._unix_file = "", 0

    def _check(self) -> None:
        """Assert that every registry agrees (tests)."""
        assert sum(self._per_address.values()) == len(self.connections)
        assert self.websockets == sum(
            each.owner is not None and each._end is None for each in self.connections.values())
        assert all(fd == each.sock.fileno() for fd, each in self.connections.items())


# =============================================================================
# 15  PLUGINS - what is added: classes in this process, programs beside it
# =============================================================================
# Knows: PROTO, TICKS, PROTOCOLS, TRANSPORT.     Never: topics, sessions: what an action does,
# and what a class registers with, is handed in.
#
# A Plugin is a class in this process (seed 001).  All register, then all start, each after
# what it requires; what a plugin registered is remembered, so that it can go without a trace.
#
# A plugin program speaks frames of the built-in schema over a Unix socket or TCP (seed 000):
# it says hello and what it wants to hear of.  An event is encoded once, whoever wants it; what
# a tick made for a plugin leaves in one EventBatch.  An event that plugins may change is sent
# at once to all of them, and the answers are awaited by the clock, never by the loop.


class Plugin:
    """Code that is added to an engine by ``app.load``: a class to derive from.

    ``name`` is the class's in lower case unless it says so. ``requires`` names the plugins
    that must run before this one, with the version it needs if that matters: ("economy",
    "chat 1.2"), or {"chat": "1.2"}; the major version must be the same, the rest not older.
    "horizon_lite" in it means this file. ``app`` is the engine, from ``register`` on: what is
    registered through it goes with the plugin.
    """

    name = ""
    version = "1.0.0"
    requires: Iterable[str] | Mapping[str, str] = ()
    app: Any = None                 # the engine, from ``register`` on

    def register(self, app: Any) -> None:
        """Register handlers; all plugins do before the first is started."""

    def on_reload(self, before: Any) -> None:
        """Take over from the plugin in whose place this one comes; it has stopped already."""

    def on_start(self) -> None:
        """Begin; what is required runs already."""

    def on_stop(self) -> None:
        """End; handlers are removed afterwards."""


def _version(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?(?:[-+.].*)?", text)
    if match is None:
        raise UsageError(f"{text!r} is no version like 1.2.3")
    return tuple(int(part or 0) for part in match.groups())


_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]{1,64})[\s>=]*(.*)")


def _requirements(plugin: Plugin) -> dict[str, str]:
    """Return the names of what *plugin* requires, and the versions; "" where any will do."""
    wanted = plugin.requires
    if isinstance(wanted, Mapping):
        return {str(name): str(version) for name, version in wanted.items()}
    matches = [_REQUIREMENT.fullmatch(each) for each in (
        (wanted,) if isinstance(wanted, str) else wanted)]
    return {match[1]: match[2].strip() for match in matches if match}


def _check_plugin(plugin: Plugin) -> None:
    """Raise UsageError if what a plugin says of itself can't be."""
    what = f"plugin {plugin.name!r}"
    try:
        if not _PLUGIN_ID.fullmatch(plugin.name):
            raise UsageError("a name is 1 to 64 of A-Z a-z 0-9 _ . -")
        for text in (plugin.version, *filter(None, _requirements(plugin).values())):
            _version(text)
    except (TypeError, AttributeError, UsageError) as error:
        raise UsageError(f'{what}: {error}; write name = "shop", version = "1.2.0", requires = '
                         '("bank 1.0",)') from None
    for each in ("register", "on_reload", "on_start", "on_stop"):
        if _is_async(getattr(plugin, each)):
            raise UsageError(f"{what}: {each} can't be an async def; it may emit an event that "
                             "has an async handler")


class _Unit:
    """A plugin, the file it came from, how it is, and how to undo what it registered."""

    __slots__ = ("plugin", "name", "path", "state", "error", "undo", "owners", "before", "lacks")

    def __init__(self, plugin: Plugin | None, name: str, path: str) -> None:
        self.plugin = plugin            # None: its file can't be imported
        self.name = name
        self.path = path
        self.state = "loaded"       # "registered", "starting", "running", "stopped", "failed"
        self.error = ""
        self.undo: list[Callable[[], object]] = []
        self.owners: set[int] = set()       # who has loaded it, and may let it go
        self.before: _Unit | None = None    # what it has replaced, until that is final
        self.lacks = False                  # it failed for want of another one

    def again(self) -> _Unit:
        """Return the same plugin, to be added once more."""
        unit = _Unit(self.plugin, self.name, self.path)
        unit.owners = self.owners
        return unit


_BEING_WRITTEN_NS = 200_000_000      # a file that is younger may be half written
_PLUGIN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _file_stamp(path: str) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return info.st_mtime_ns, info.st_size
    return 0, 0


def _run_source(name: str, path: str) -> ModuleType:
    """Import *path* as module *name*, from its source as it is now."""
    import importlib.util
    from importlib.machinery import SourceFileLoader
    loader = SourceFileLoader(name, path)
    # bytecode is known by its time in seconds: an edit within one would not be seen
    loader.get_code = (                     # type: ignore[method-assign]
        lambda fullname: loader.source_to_code(loader.get_data(path), path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module, before = importlib.util.module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def import_target(target: str, *, again: bool = False) -> ModuleType:
    """Import ``file.py``, ``module`` or ``module:name``; *again* from its source as it is now."""
    import importlib
    name = target.partition(":")[0]
    if name.endswith(".py"):
        if not os.path.isfile(name):
            raise UsageError(f"there is no file {name!r}")
        folder, stem = os.path.dirname(os.path.abspath(name)), os.path.basename(name)[:-3]
        if stem in sys.modules and stem in sys.stdlib_module_names:
            raise UsageError(f"{name} has the name of a module of Python's own; rename the file")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        return _run_source(stem, name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{target!r} is neither a file.py nor a module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if again and (path := str(getattr(sys.modules.get(name), "__file__", ""))).endswith(".py"):
        return _run_source(name, path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise                       # the module is there, what it imports is not
        raise UsageError(f"there is no module {name!r}; for a file say {name}.py") from None


class Plugins(Mapping[str, Plugin]):
    """The plugins in this process, by name: what runs, in the order in which it was started."""

    __slots__ = ("replacing", "_scope", "_tell", "_settle", "_units", "_running", "_busy",
                 "_halting", "_order", "_files")

    def __init__(self, scope: Callable[[list[Callable[[], object]]], Any],
                 tell: Callable[[str, dict[str, Any]], object],
                 settle: Callable[[], object] = lambda: None) -> None:
        self.replacing = False          # whoever is loaded may take the place of another
        self._scope = scope             # makes what register gets, and notes how to undo it
        self._tell = tell               # of what happens
        self._settle = settle           # called before handlers are removed
        self._units: dict[str, _Unit] = {}
        self._running = False
        self._busy = False                  # registering or starting: others are next
        self._halting = False
        self._order: list[_Unit] = []       # as they were started
        # by path: how it was, and what is to be called with what when it is otherwise
        self._files: dict[str, tuple[tuple[int, int], dict[tuple[Any, ...], None]]] = {}

    def __getitem__(self, name: str) -> Plugin:
        if (unit := self._units.get(name)) in self._order and unit and unit.plugin:
            return unit.plugin
        raise KeyError(f"plugin {name!r} " + (
            f"does not run: it is {unit.state}" if unit else "is not loaded")
            + "; who requires it finds it in on_start")

    def __iter__(self) -> Iterator[str]:
        return iter([each.name for each in self._order])

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        return f"Plugins({', '.join(self)})"

    def load(self, *targets: Any, owner: int = 0) -> list[Plugin]:
        """Load classes, objects, modules, files or all files of folders; see Engine.load."""
        units = [unit for each in targets for unit in self._made(each)]
        new = [each for each in units if each is not self._units.get(each.name)]
        for unit in units:
            unit.owners.add(owner)
        self._add(new)
        for path in {each.path for each in new}:
            self._watch_plugins(path)
        return [each.plugin for each in units if each.plugin is not None]

    def _made(self, target: Any) -> list[_Unit]:
        if isinstance(target, Plugin):
            return [self._unit(target, "")]
        if isinstance(target, type) and issubclass(target, Plugin):
            return self._tried(target.__name__.lower(), "", lambda: [self._unit(target(), "")])
        if not isinstance(target, str | os.PathLike):
            raise UsageError(f"load a Plugin class, an object of one, a module or a file, not "
                             f"{target!r}")
        path = os.fspath(target)
        if not os.path.isdir(path):
            return self._of_file(path)
        found = [unit for name in sorted(os.listdir(path))
                 if name.endswith(".py") and not name.startswith(("_", "."))
                 for unit in self._of_folder(os.path.join(path, name))]
        if not found:
            raise UsageError(f"{path} has no file with a class of hl.Plugin")
        return found

    def _of_file(self, path: str) -> list[_Unit]:
        return self._unchanged(path) or self._tried(
            os.path.basename(path).removesuffix(".py"), path, lambda: self._units_in(path))

    def _of_folder(self, path: str) -> list[_Unit]:
        try:
            return self._of_file(path)
        except UsageError as error:             # a helper of the others, perhaps
            _log.info("passed over: %s", error)
            return []

    def _unchanged(self, path: str) -> list[_Unit]:
        """Return what runs of a file that is to take its own place, and has not changed."""
        known = self._files.get(os.path.abspath(path))
        if not self.replacing or known is None or known[0] != _file_stamp(path):
            return []
        found = [each for each in self._units.values() if each.path == path]
        return [] if any(each.state == "failed" for each in found) else found

    def _tried(self, name: str, path: str, make: Callable[[], list[_Unit]]) -> list[_Unit]:
        """Return what *make* makes; what can't be imported is isolated like a plugin that fails."""
        try:
            return make()
        except UsageError:
            raise
        except (Exception, SystemExit) as error:
            unit = _Unit(None, name, path)
            self._fail(unit, "can't be imported", error)
            return [unit]

    def _units_in(self, path: str, again: bool = False) -> list[_Unit]:
        module, name = import_target(path, again=again), path.partition(":")[2]
        found = dict.fromkeys(each for each in vars(module).values() if isinstance(each, type)
                              and issubclass(each, Plugin)
                              and f"{each.__module__}.".startswith(f"{module.__name__}."))
        # what others derive from is no plugin itself
        classes = [each for each in found if each.__name__ == name or not name and not any(
            issubclass(other, each) for other in found if other is not each)]
        if not classes:
            raise UsageError(f"{path} has no class of hl.Plugin")
        return [self._unit(each(), path) for each in classes]

    def _unit(self, plugin: Plugin, path: str) -> _Unit:
        plugin.name = plugin.name or type(plugin).__name__.lower()
        _check_plugin(plugin)
        return _Unit(plugin, plugin.name, path)

    def _add(self, units: list[_Unit]) -> None:
        """Let plugins register, and start them if the others are."""
        names = Counter(each.name for each in units)
        for unit in units:
            old = self._units.get(unit.name)
            if names[unit.name] > 1 or old is not None and old.state != "failed" and not (
                    self.replacing or unit.path and unit.path == old.path):
                raise UsageError(f"there is a plugin {unit.name!r} already; give each a name of "
                                 "its own")
        replaced = {name: self._units[name] for name in names if name in self._units}
        lacking = [each for each in self._units.values() if each.lacks]     # it may be there now
        left = self._remove([*replaced.values(), *lacking]) + lacking
        busy, self._busy = self._busy, True
        try:
            for unit in [*units, *(each.again() for each in left if each.name not in names)]:
                if unit.name in self._units:        # one of those before has loaded it
                    _log.error("plugin %s is there already; it was loaded twice", unit.name)
                    continue
                self._units[unit.name] = unit
                unit.before = replaced.get(unit.name)
                if unit.plugin is not None:
                    self._register(unit, unit.plugin)
                if unit.before is not None:
                    unit.before.before = None       # one is enough
                if not self.replacing:
                    unit.before = None
        finally:
            self._busy = busy
        if self._running:
            self.start()

    def _remove(self, units: list[_Unit]) -> list[_Unit]:
        """Stop plugins and forget them; return those that required them, to be added again."""
        halted = self._halt(list(dict.fromkeys(units)))
        for unit in halted:
            self._units.pop(unit.name, None)        # on_stop may have unloaded it
        # what one of them has loaded, it loads again
        lists = {id(each.undo) for each in halted}
        return [each for each in halted if each not in units and each.plugin is not None
                and not each.owners & lists]

    def _register(self, unit: _Unit, plugin: Plugin) -> None:
        try:
            plugin.app = self._scope(unit.undo)
            if unit.before is not None and unit.before.plugin is not None:
                plugin.on_reload(unit.before.plugin)
            plugin.register(plugin.app)
        except (Exception, SystemExit) as error:
            return self._fail(unit, "can't register", error)
        unit.state = "registered"
        if self._units.get(unit.name) is not unit:      # it has unloaded itself
            self._undo(unit)

    def start(self) -> None:
        """Start what is registered: each after what it requires, else as they were loaded."""
        self._running = True
        if self._busy:
            return

        def registered() -> list[_Unit]:
            return [each for each in self._units.values() if each.state == "registered"]

        self._busy, before = True, len(self._order)
        try:
            while unit := next((each for each in registered() if not self._lacks(each)), None):
                self._start(unit)
        finally:
            self._busy = False
        for unit in registered():
            unit.lacks = True
            self._fail(unit, f"can't start: {self._lacks(unit)}")
        if started := self._order[before:]:
            _log.info("plugins started: %s", ", ".join(
                f"{each.name} {each.plugin.version}" for each in started if each.plugin))

    def _lacks(self, unit: _Unit) -> str:
        """Return what *unit* requires and is not there, or "" if it can start."""
        assert unit.plugin is not None
        for name, wanted in _requirements(unit.plugin).items():
            found = self._units.get(name)
            version = __version__ if name == "horizon_lite" else (
                found.plugin.version if found and found.plugin else "")
            if not version:
                return (f"it requires {name!r}, which is not loaded"
                        f"{_did_you_mean(name, self._units)}")
            if wanted and (_version(version)[0] != _version(wanted)[0]
                           or _version(version) < _version(wanted)):
                return f"it requires {name} {wanted}, and there is {version}"
            if found is not None and found.state != "running":
                return f"it requires {name!r}, which " + (
                    "has failed" if found.state == "failed" else
                    "waits for others, perhaps in a circle")
        return ""

    def _start(self, unit: _Unit) -> None:
        assert unit.plugin is not None
        unit.state = "starting"
        try:
            unit.plugin.on_start()
        except (Exception, SystemExit) as error:
            return self._fail(unit, "can't start", error)
        if self._units.get(unit.name) is not unit:      # it has unloaded itself
            return self._undo(unit)
        unit.state = "running"
        self._order.append(unit)
        self._tell("plugin_loaded", {"plugin_name": unit.name, "version": unit.plugin.version})

    def _fail(self, unit: _Unit, what: str, error: BaseException | None = None) -> None:
        """Isolate a plugin: what it registered is removed, and it is said why."""
        unit.state, unit.error = "failed", f"{what}: {error!r}" if error is not None else what
        _log.error("plugin %s %s", unit.name, what, exc_info=error)
        self._undo(unit)
        self._tell("plugin_failed", {"plugin_name": unit.name, "error": unit.error})

    def _undo(self, unit: _Unit) -> None:
        while unit.undo:
            try:
                unit.undo.pop()()
            except Exception:
                _log.exception("what plugin %s registered can't be removed", unit.name)

    def _halt(self, units: list[_Unit]) -> list[_Unit]:
        """Stop plugins, what requires them and what they have loaded, the last one first.

        Returns: all of them.
        """
        halted = [*units]
        for unit in halted:                         # which grows
            halted += [each for each in self._units.values() if each not in halted and (
                id(unit.undo) in each.owners or each.plugin is not None
                and unit.name in _requirements(each.plugin))]
        running = [each for each in self._order if each in halted]
        self._order = [each for each in self._order if each not in halted]
        if running:
            self._settle()
        for unit in reversed(running):
            unit.state = "stopped"
            try:
                unit.plugin.on_stop()               # type: ignore[union-attr]
            except (Exception, SystemExit):
                _log.exception("plugin %s failed to stop", unit.name)
            self._tell("plugin_unloaded", {"plugin_name": unit.name})
        halting, self._halting = self._halting, True
        for unit in reversed(halted):
            self._undo(unit)
        self._halting = halting
        return halted

    def stop(self) -> None:
        """Stop everything, in reverse order of starting."""
        self._running = False
        self._halt(list(self._units.values()))

    def unload(self, name: str) -> None:
        """Stop a plugin, and what requires it, and forget them."""
        if name not in self._units:
            raise UsageError(f"there is no plugin {name!r}{_did_you_mean(name, self._units)}")
        unit = self._units[name]
        self._remove([unit])
        if unit.path and all(each.path != unit.path for each in self._units.values()):
            if (file := self._file_of(unit.path)) in self._files:
                self._files[file][1].pop((self.reload, unit.path), None)

    def discard(self, plugins: list[Plugin], owner: int) -> None:
        """Let go of what *owner* has loaded; what it has replaced comes back."""
        for plugin in plugins if not self._halting else ():     # it goes with who has loaded it
            unit = self._units.get(plugin.name)
            if unit is None or owner not in unit.owners:
                continue
            unit.owners.discard(owner)
            if not unit.owners:
                before = unit.before
                self.unload(unit.name)
                if before is not None and before.plugin is not None:
                    self._add([before.again()])

    def modules(self) -> set[str]:
        """Return the modules, and packages around them, that are loaded for their plugins' sake."""
        names = {type(each.plugin).__module__ for each in self._units.values() if each.path}
        return names | {name[:at] for name in names for at in range(len(name)) if name[at] == "."}

    def confirm(self) -> None:
        """Make replacements final."""
        self.replacing = False
        for unit in self._units.values():
            unit.before = None

    def reload(self, path: str) -> None:
        """Put a file's plugins in the place of those it had; if that can't be, they stay."""
        try:
            new = self._units_in(path, again=True)
        except (Exception, SystemExit) as error:
            _log.error("%s has changed, but the old plugin stays: %s", path, error, exc_info=error)
            return
        names = [each.name for each in new]
        _log.info("%s has changed: %s", path, ", ".join(names))
        old = [each for each in self._units.values() if each.path == path]
        for unit in new:
            unit.owners = {owner for each in old for owner in each.owners} or {0}
        running = [*self._order]
        try:
            left = self._remove([each for each in old if each.name not in names])
            self._add(new + [each.again() for each in left])
            stays = any(each.state == "failed" and each.name in [unit.name for unit in running]
                        for each in new)
        except UsageError as error:
            _log.error("%s: %s", path, error)
            stays = True
        if stays:
            _log.error("%s has changed, but the old plugin stays", path)
            left = self._remove([each for each in new if self._units.get(each.name) is each])
            back = {each.name: each for each in [*left, *running]}
            lists = {id(each.undo) for each in back.values()}
            back = {name: each for name, each in back.items() if not each.owners & lists}
            self._add([each.again() for name, each in back.items() if name not in self._units or (
                self._units[name].state == "failed")])
        self.confirm()

    def _file_of(self, path: str) -> str:
        """Return the source file of a plugin's target, or ""."""
        file = path.partition(":")[0]
        if not file.endswith(".py"):
            file = str(getattr(sys.modules.get(file), "__file__", None) or "")
        return os.path.abspath(file) if file.endswith(".py") else ""

    def _watch_plugins(self, path: str) -> None:
        """Watch the file of plugins, if they came from one."""
        if file := self._file_of(path):
            self.watch(file, self.reload, path)

    def watch(self, path: str, changed: Callable[..., object], *arguments: Any) -> None:
        """Have *changed* called when ``look`` finds that a file has; once for all its files."""
        path = os.path.abspath(path)
        stamp, calls = self._files.get(path) or (_file_stamp(path), {})
        self._files[path] = stamp, {**calls, (changed, *arguments): None}

    def look(self) -> None:
        """Look at every file, and reload what has changed."""
        found: dict[tuple[Any, ...], None] = {}
        changed = {path: (now, calls) for path, (stamp, calls) in self._files.items()
                   if (now := _file_stamp(path)) not in (stamp, (0, 0))}
        if any(0 <= time.time_ns() - now[0] < _BEING_WRITTEN_NS for now, _ in changed.values()):
            return                              # others may be about to be written as well
        self._files |= changed
        for _, calls in changed.values():
            found |= calls
        for call, *arguments in found:
            try:
                call(*arguments)
            except Exception:
                _log.exception("a file has changed, and can't be loaded")

    def report(self) -> dict[str, dict[str, str]]:
        """Return how every plugin is, by name."""
        return {each.name: {"state": each.state, "version": each.plugin.version if each.plugin
                            else "", **({"error": each.error} if each.error else {})}
                for each in self._units.values()}


# -- programs --

_API_VERSION = "v1"
_HELLO_S = 2.0                      # DESIGN 4
_EVENTS_A_BATCH = 100
_BATCH_BYTES = 65_536
_SQUEEZE_ABOVE = 1_024              # bytes of a batch (seed 000 item 13)
_MAX_PROGRAMS = 1_000               # connections
_HELLO_BYTES = 16_384               # the first frame of a program
_MAX_FRAMES_PER_S = 20_000          # of one plugin
_MAX_ACTIONS = 256                  # in one frame: the tick waits as long
_MAX_COMMANDS = 100                 # of one plugin that are remembered
_MAX_LAST_WORDS = 16                # reads of a program's output when it has ended
_MAX_LOG_LINE = 2_000               # characters
_LINES_A_SECOND = 50                # of one program's output
_SIGKILL, _SIGTERM = 9, 15          # signal(7): the same on every POSIX system
_FIRST_RESTART_S, _LAST_RESTART_S = 0.5, 30.0
_LAST_WORDS_S = 1.0                 # for a program to end by itself when the host does
_STEADY_S = 30.0                    # a program that ran so long begins anew with short pauses
_NEVER_DROPPED = ("PLAYER_JOIN", "PLAYER_QUIT", "CHAT", "COMMAND", "WORLD_CLOSE")
_PLUGIN_LOGS = {"debug": logging.DEBUG, "warn": logging.WARNING, "warning": logging.WARNING,
                "error": logging.ERROR}
_ADDRESS = re.compile(r"(?:unix:(?://)?([^\0]*[^/\0])|(/[^\0]*[^/\0]))|"
                      r"(?:(tcp|tls)://)?(\[[^\]]+\]|[^:/]+):(\d{1,5})")


def plugin_address(text: str) -> tuple[str, str, int]:
    """Return what an address means: "unix" and a path, or "tcp" or "tls", a host and a port."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[5] or 0) > 65535:
        raise ConfigError(f"{text!r} is no address of plugins: write unix:///path, "
                          "tcp://127.0.0.1:7000 or tls://host:7000")
    if path := match[1] or match[2]:
        return "unix", path, 0
    return match[3] or "tcp", match[4].strip("[]"), int(match[5])


class PluginSpec(NamedTuple):
    """A ``[[plugins]]`` table of plugins.toml; without a command the program starts itself."""

    id: str
    command: str = ""
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    folder: str = ""                # where it runs; relative to the file
    restart: bool = True            # when it has ended


def read_plugins(path: str) -> list[PluginSpec]:
    """Return what a plugins.toml declares, in its order.

    Raises:
        ConfigError: it names the file and what is wrong.
    """
    tables = _load_toml(path)
    found = tables.get("plugins")
    if tables.keys() - {"plugins"} or not isinstance(found, list) or not all(
            isinstance(each, dict) for each in found):
        raise ConfigError(f"{path}: it holds [[plugins]] tables, each with an id")
    specs: dict[str, PluginSpec] = {}
    for table in tables["plugins"]:
        spec = _plugin_spec(path, table)
        if spec.id in specs:
            raise ConfigError(f"{path}: there are two plugins {spec.id!r}")
        specs[spec.id] = spec
    return list(specs.values())


def _plugin_spec(path: str, table: dict[str, Any]) -> PluginSpec:
    """Return what one table says; its folder is relative to the file's."""
    where = f"{path}: plugin {table.get('id', '?')!r}"
    for key, value in table.items():
        if key not in PluginSpec._fields:
            raise ConfigError(f"{where}: there is no key {key!r}"
                              f"{_did_you_mean(key, PluginSpec._fields)}")
        wanted = {"arguments": list, "environment": dict, "restart": bool}.get(key, str)
        texts = value.values() if isinstance(value, dict) else value
        if not isinstance(value, wanted) or wanted in (list, dict) and not all(
                isinstance(each, str) for each in texts):
            raise ConfigError(f"{where}: {key} = {value!r} must be "
                              f"{'true or false' if wanted is bool else 'text'}"
                              f"{'s' * (wanted in (list, dict))}")
    if not _PLUGIN_ID.fullmatch(table.get("id", "")):
        raise ConfigError(f"{where}: an id is 1 to 64 of A-Z a-z 0-9 _ . -")
    environment = table.get("environment", {})
    texts = [*table.get("arguments", ()), *environment, *environment.values(),
             table.get("command", ""), table.get("folder", "")]
    if any("\0" in each for each in texts) or any("=" in name for name in environment):
        raise ConfigError(f"{where}: no text holds a NUL, no name in environment a '='")
    folder = os.path.join(os.path.dirname(os.path.abspath(path)), table.get("folder", ""))
    return PluginSpec(**{**table, "folder": folder,
                         "arguments": tuple(table.get("arguments", ()))})


def _delimited(*parts: bytes) -> bytes:
    return b"".join((_varint(sum(map(len, parts))), *parts))


class _Dialect:
    """What a host needs to know of a schema: the built-in one, or upstream's where they agree."""

    __slots__ = ("native", "writes", "reads", "payloads", "_fields", "_numbered")

    def __init__(self, schema: Any) -> None:
        self.native = schema is builtin_schema()
        try:
            self.writes, self.reads = schema.HostToPlugin, schema.PluginToHost
            self._fields = {each.name: each for each in self.writes._prepare()._fields}
            inside = {each.name: each for each in self._fields["event"].target._prepare()._fields}
            self._numbered = inside["type"].kind == "enum"
            self.make("event", event_id="", expects_response=True).which("payload")
            self.part("hello", self.make("hello", api_version=_API_VERSION, boot_id=""))
            self.writes(plugin_id="", shutdown=self.make("shutdown", reason="")).which("payload")
            said = self.reads(plugin_id="", hello=None, subscribe=None, actions=None, log=None,
                              event_result=None)
            said.which("payload")
        except (AttributeError, KeyError, TypeError, UsageError) as error:
            raise ConfigError(f"plugins_schema has not the messages of a plugin host: {error}"
                              ) from None
        # by the name of their type: payloads of events
        self.payloads = {name.upper(): each for name, each in inside.items() if each.oneof}

    def says(self, name: str) -> bool:
        """Whether the host may send that, like batches."""
        return name in self._fields

    def make(self, name: str, **values: Any) -> Any:
        """Return the message of one of the host's frames."""
        return self._fields[name].target(**values)

    def part(self, name: str, message: Any) -> bytes:
        """Return a frame's payload, all of it but the plugin's id."""
        data = message if isinstance(message, bytes) else message.encode()
        return _varint(self._fields[name].number << 3 | _LEN) + _delimited(data)

    def alone(self, member: bytes) -> bytes:
        """Return the payload of a frame with one event, a member of a batch."""
        return _varint(self._fields["event"].number << 3 | _LEN) + member[1:]

    def kind(self, message: Message) -> str:
        """Return the type of the event whose payload *message* is, or "" if it is none."""
        return next((name for name, each in self.payloads.items()
                     if each.target is type(message)), "")

    def payload(self, kind: str, **values: Any) -> Any:
        """Return an event's payload, with those of *values* that it has fields for."""
        cls = self.payloads[kind].target
        known = {each.name for each in cls._prepare()._fields}
        if "position" in known and "x" in values:       # upstream's shape
            place = next(each.target for each in cls._fields if each.name == "position")
            values["position"] = place(x=values["x"], y=values["y"], z=values["z"])
        return cls(**{name: each for name, each in values.items() if name in known})

    def event(self, kind: str, payload: Any, event_id: str = "", asks: bool = False) -> bytes:
        """Return an encoded envelope."""
        named: Any = self.payloads[kind].number if self._numbered else kind
        envelope: Message = self.make("event", event_id=event_id, type=named, expects_response=asks,
                                      **{kind.lower(): payload})
        return envelope.encode()

    def wanted(self, events: Iterable[Any]) -> set[str]:
        """Return the types of a subscription; those that are unknown are passed over."""
        known = {each.number if self._numbered else name: name
                 for name, each in self.payloads.items()}
        everything = 1 if self._numbered else "ALL"     # upstream's EVENT_TYPE_ALL
        events = set(events)
        return {*known.values()} if everything in events else {
            known[each] for each in events if each in known}

    def moves(self, moves: PlayerMoves, packed: str) -> list[tuple[int, bytes]]:
        """Return movement as members of a batch, each with how many events it is."""
        if self.native:
            return moves.pieces(packed)
        return [(1, b"\n" + _delimited(self.event("PLAYER_MOVE", self.payload(
            "PLAYER_MOVE", player_uuid=_uuid_text(player), x=x, y=y, z=z))))
            for player, (x, y, z) in moves.rows()]


class _HostEvent:
    """Something on its way to plugins, encoded once for all of them; see Outbox."""

    __slots__ = ("kind", "data", "size", "seq", "critical", "alone")

    key = None
    count = 1

    def __init__(self, kind: str, data: bytes, seq: int, critical: bool, alone: bool) -> None:
        self.kind = kind                # its type; "" for what is no event
        self.data = data                # a member of a batch, or a frame's payload
        self.size = len(data)
        self.seq = seq
        self.critical = critical
        self.alone = alone              # in a frame of its own, and at once


class Verdict:
    """What plugins said to an event: whether it may be, and what has become of it.

    ``event`` is the payload with the changes; ``update`` the mutation message that holds those
    of all plugins, or None; ``by`` the plugin that cancelled, ``reason`` what it says to that;
    ``answers`` the plugins' own words, by id.
    """

    __slots__ = ("event", "cancelled", "by", "reason", "update", "answers")

    def __init__(self, event: Any) -> None:
        self.event = event
        self.cancelled = False
        self.by = self.reason = ""
        self.update: Any = None
        self.answers: dict[str, Any] = {}

    def __repr__(self) -> str:
        what = f"cancelled by {self.by}" if self.cancelled else f"{self.event!r}"
        return f"Verdict({what}, {len(self.answers)} answers)"


class _Ask:
    """An event that plugins are asked about."""

    __slots__ = ("id", "kind", "verdict", "waiting", "future", "began_ns", "item")

    def __init__(self, event_id: str, kind: str, payload: Any, future: Any, now_ns: int,
                 item: _HostEvent | None) -> None:
        self.id = event_id
        self.kind = kind
        self.verdict = Verdict(payload)
        self.waiting: dict[PluginPeer, None] = {}
        self.future = future
        self.began_ns = now_ns
        self.item = item                # what waits in outboxes until it is sent


class PluginPeer:
    """One plugin program, from its connection to its goodbye (a ByteStream).

    ``id`` as the configuration knows it, ``name``, ``version`` and ``commands`` as it says
    itself, ``wanted`` the types of events it subscribed to (None before the first time).
    """

    __slots__ = ("host", "connection", "id", "name", "version", "commands", "wanted", "packed",
                 "squeezes", "outbox", "sent", "timeouts", "goodbye", "_reader", "_head", "_logged")

    def __init__(self, host: PluginHost, connection: Connection) -> None:
        self.host = host
        self.connection = connection
        self.id = self.name = self.version = ""
        self.commands: list[str] = []
        self.wanted: set[str] | None = None
        self.packed = ""
        self.squeezes = False
        self.outbox = Outbox(host.max_items, host.limits.outbox_bytes, functools.partial(
            host.count_drop, self))
        self.sent: Counter[str] = Counter(frames=0, events=0, bytes=0)
        self.timeouts = 0
        self.goodbye = ""               # why it ends, to be said when it has read the rest
        self._reader = DelimitedReader(host.dialect.reads, _HELLO_BYTES)
        self._head = b""                # of its frames: its id
        self._logged = _LineLimit()

    def __repr__(self) -> str:
        return f"plugin {self.id or '?'} ({self.connection.address})"

    # -- what the transport tells (ByteStream) --

    def receive(self, data: bytes) -> None:
        """Take what came."""
        for message in self._reader.each(data):
            if not self.connection.is_open:
                return
            self.connection.charge(1)
            self._take(message)

    def farewell(self, reason: str) -> bytes:
        """Return the HostShutdown that says why."""
        dialect = self.host.dialect
        return encode_delimited(dialect.writes(
            plugin_id=self.id, shutdown=dialect.make("shutdown", reason=reason)))

    def closed(self, reason: str) -> None:
        """Forget it."""
        if self._reader.pending and reason in ("eof", "reset"):
            reason = "cut"
            self.host.refused["cut"] += 1
        self.host.forget(self, reason)

    def drained(self) -> None:
        """Send what waited for it to read, and what stands for movement that was dropped."""
        self.host.flush([self])
        if self.outbox.owed and not self.connection.unsent and self.host.last_moves is not None:
            self.outbox.owed.clear()
            self.put(self.host.last_moves.replaces(self.host.last_moves))
            self.host.flush([self])
        if self.goodbye:
            self.leave(self.goodbye)

    def leave(self, reason: str) -> None:
        """Say goodbye, after what waits for it."""
        self.goodbye = reason
        self.host.flush([self])
        if not (self.connection.unsent or self.outbox.items):
            self.connection.close(1001, reason)

    # -- what it says --

    def _take(self, message: Any) -> None:
        kind = message.which("payload") or ""
        said: Any = getattr(message, kind) if kind else None
        if not self.id:
            self.host.admit(self, message.plugin_id, said if kind == "hello" else None)
            self._head = self.host.dialect.writes(plugin_id=self.id).encode()
            self._reader.max_bytes = self.host.limits.max_message_bytes or 1 << 26
            self.host.welcome(self)
        elif message.plugin_id not in ("", self.id):
            raise PeerError(f"this is the connection of {self.id!r}, not of "
                            f"{message.plugin_id[:64]!r}", label="wrong_id", close_code=1008)
        elif kind == "subscribe":
            self.wanted = self.host.dialect.wanted(said.events)
            if "PLAYER_MOVE" not in self.wanted:
                self.outbox.owed.clear()
            self.packed = getattr(said, "packed", "")
            if self.packed not in ("", "f32", "f64"):
                raise PeerError('packed is "f32" or "f64"', label="bad_subscribe", close_code=1008)
            self.host.sort_peers()
        elif kind == "actions":
            if len(said.actions) > _MAX_ACTIONS:
                raise PeerError(f"an ActionBatch holds {_MAX_ACTIONS} actions at most",
                                label="too_many_actions", close_code=1008)
            for action in said.actions:
                self.host.act(self, action)
        elif kind == "event_result":
            self.host.answer(self, said)
        elif kind == "log":
            self.note(said.message, _PLUGIN_LOGS.get(said.level.lower(), logging.INFO))
        else:
            self.host.answers["unknown_frame"] += 1
            self.note("a frame that this host does not know", logging.WARNING)

    def note(self, text: str, level: int) -> None:
        """Log a line of it."""
        self._logged.say(self.id, text, level, self.host.loop.now_ns)

    # -- what it is told --

    def put(self, item: Any) -> None:
        """Queue something for the tick, or for the end of this pass if it is for at once."""
        if not self.connection.is_open:
            return
        outbox, ahead = self.outbox, len(self.connection.unsent)
        size = item.size or item.measure()
        self.host.waiting[self] = None
        if item.alone:
            self.host.urgent[self] = None
        try:
            if not ahead and outbox.overflows(1, size):
                self.host.flush([self])         # one that reads loses nothing
                ahead = len(self.connection.unsent)
                if not ahead:
                    return outbox.add((outbox.settle(item),), size)
            outbox.put(item, ahead)
        except SlowPeer:
            outbox.take()
            self.connection.slow()

    def frames(self, parts: list[bytes]) -> bytes:
        """Return *parts* as this plugin gets them."""
        return b"".join([_delimited(self._head, each) for each in parts])


class _LineLimit:
    """Log lines that somebody else wrote: so many a second, in one line each."""

    __slots__ = ("_since_ns", "_said", "_unsaid")

    def __init__(self) -> None:
        self._since_ns = self._said = self._unsaid = 0

    def say(self, who: str, text: str, level: int, now_ns: int) -> None:
        """Log *text*, what can't be printed escaped."""
        if now_ns - self._since_ns >= 1_000_000_000:
            if self._unsaid:
                _log.warning("[%s] %d more lines are not shown", who, self._unsaid)
            self._since_ns, self._said, self._unsaid = now_ns, 0, 0
        if self._said >= _LINES_A_SECOND:
            self._unsaid += 1
            return
        self._said += 1
        text = "".join(each if each.isprintable() or each == "\t" else repr(each)[1:-1]
                       for each in text[:_MAX_LOG_LINE])
        _log.log(level, "[%s] %s", who, text)


class PluginProgram:
    """A program that the host has started: its output goes to the log, its end starts it again."""

    __slots__ = ("spec", "restarts", "_loop", "_environment", "_process", "_pause_s", "_since_ns",
                 "_due_ns", "_line", "_logged", "stopping")

    def __init__(self, spec: PluginSpec, loop: Loop, environment: dict[str, str]) -> None:
        self.spec = spec
        self.restarts = 0
        self._loop = loop
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment,
                             **spec.environment, "HORIZON_PLUGIN_ID": spec.id}
        self._process: Any = None
        self._pause_s = _FIRST_RESTART_S
        self._since_ns = 0                  # when it was started
        self._due_ns: int | None = None     # when it is to be started again
        self._line = b""
        self._logged = _LineLimit()
        self.stopping = False               # it is not started again

    @property
    def pid(self) -> int:
        """Its process's id; 0 if it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it; when that can't be, it is tried again later."""
        import subprocess
        self._since_ns, self._due_ns = self._loop.clock(), None
        spec = self.spec
        try:
            self._process = subprocess.Popen(
                [spec.command, *spec.arguments], cwd=spec.folder, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True)
        except OSError as error:
            hint = "; what follows the program goes into arguments" * (" " in spec.command)
            return self._plan(f"can't be started: {error}{hint}")
        _log.info("plugin %s started, pid %d", spec.id, self._process.pid)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._loop.selector.register(self._process.stdout, _READ, self._read)

    def _read(self, _mask: int = 0) -> bool:
        """Log what it printed; return whether there was something."""
        try:
            data = os.read(self._process.stdout.fileno(), _RECV_BYTES)
        except BlockingIOError:
            return False
        *lines, rest = (self._line + data).split(b"\n")
        if len(rest) > _MAX_LOG_LINE:
            lines, rest = [*lines, rest], b""
        self._line = rest
        for line in lines:
            self._say(line)
        if not data:
            self._close_output()
        return bool(data)

    def _say(self, line: bytes) -> None:
        text = line[:_MAX_LOG_LINE].decode(errors="replace").rstrip("\r")
        self._logged.say(self.spec.id, text, logging.INFO, self._loop.now_ns)

    def _close_output(self) -> None:
        if self._process.stdout is not None:
            self._loop.selector.unregister(self._process.stdout)
            self._process.stdout.close()
            self._process.stdout = None
            if self._line:
                self._say(self._line)
            self._line = b""

    def check(self) -> None:
        """Notice its end, and start it again when it is time."""
        now = self._loop.clock()
        if self._process is not None and (status := self._process.poll()) is not None:
            for _ in range(_MAX_LAST_WORDS):
                if self._process.stdout is None or not self._read():
                    break
            self._close_output()            # a child of its may hold it still,
            self._signal(_SIGKILL)          # and shall not outlive it
            self._process = None
            if now - self._since_ns > _STEADY_S * 1e9:
                self._pause_s = _FIRST_RESTART_S
            self._plan(f"ended with status {status}" if status >= 0
                       else f"ended by signal {-status}")
        elif self._due_ns is not None and now >= self._due_ns and not self.stopping:
            self.restarts += 1
            self.start()

    def _plan(self, what: str) -> None:
        if self.stopping or not self.spec.restart:
            _log.log(logging.INFO if self.stopping else logging.WARNING, "plugin %s %s",
                     self.spec.id, what)
            return
        _log.warning("plugin %s %s; it is started again in %g s", self.spec.id, what, self._pause_s)
        self._due_ns = self._loop.clock() + int(self._pause_s * 1e9)
        self._pause_s = min(2 * self._pause_s, _LAST_RESTART_S)

    def stop(self, kill: bool = False) -> None:
        """Ask it to end, or end it."""
        self.stopping, self._due_ns = True, None
        self._signal(_SIGKILL if kill else _SIGTERM)
        if self._process is not None and kill:
            self._process.wait()
            self.check()

    def _signal(self, number: int) -> None:
        """Send a signal to the program and all that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


class PluginHost:
    """Plugin programs: who is connected, who wants what, what they were asked.

    Telling: tell, move, ask, tick.   Knowing: wants, peers, report.   It is driven by the
    engine's loop; *perform* does an action and returns what is wrong with it, or "".
    """

    __slots__ = ("loop", "dialect", "limits", "max_items", "reply_s", "peers", "programs",
                 "waiting", "urgent", "server", "address", "answers", "actions", "events", "drops",
                 "batches", "squeezed", "renders", "reused", "coalesced", "_perform", "_observe",
                 "_future", "_boot_id", "_token", "_specs", "_by_type", "_ranks", "_asks",
                 "_number", "_seq", "_told_ns", "_folder", "stopping", "last_moves")

    def __init__(self, loop: Loop, perform: Callable[[PluginPeer, str, Any], str],
                 observe: Callable[[str, float], object], future: Callable[[], Any]) -> None:
        self.loop = loop
        self.dialect: Any = None            # until there are plugins to speak to
        self.limits = Limits()
        self.max_items = 256
        self.reply_s = 0.25
        self.peers: dict[str, PluginPeer] = {}
        self.programs: dict[str, PluginProgram] = {}
        self.waiting: dict[PluginPeer, None] = {}       # whose outbox is not empty
        self.urgent: dict[PluginPeer, None] = {}        # whose outbox leaves with this pass
        self.server: Server | None = None
        self.address = ""
        self.answers: Counter[str] = Counter()          # to what was asked, by outcome
        self.actions: Counter[str] = Counter()          # by kind
        self.events: Counter[str] = Counter()           # sent, by type
        self.drops: Counter[str] = Counter(latest=0, droppable=0)
        self.batches = self.squeezed = self.renders = self.reused = self.coalesced = 0
        self._perform = perform
        self._observe = observe
        self._future = future
        self._boot_id = os.urandom(8).hex()
        self._token = ""
        self._specs: dict[str, PluginSpec] = {}
        self._by_type: dict[str, list[PluginPeer]] = {}     # in configured order
        self._ranks: dict[str, int] = {}
        self._asks: dict[str, _Ask] = {}
        self._number = 0                    # of the last event
        self._seq = itertools.count()
        self._told_ns: dict[str, int] = {}
        self._folder = ""                   # of a socket that we made a place for
        self.stopping = False
        self.last_moves: PlayerMoves | None = None

    @property
    def refused(self) -> Counter[str]:
        """Programs' faults and our limits, by reason."""
        return self.server.refused if self.server is not None else Counter()

    # -- coming up --

    def open(self, listen: str, token: str, specs: list[PluginSpec], schema: Any,
             tls: Callable[[], ssl.SSLContext | None]) -> None:
        """Listen where plugins are expected, and start those that are to be started.

        Raises:
            ConfigError: an address that can't be, or that would let strangers in.
        """
        started = [each for each in specs if each.command]
        if not (listen or started):
            return
        self.dialect = _Dialect(schema)
        self._specs = {each.id: each for each in specs}
        if len(self._specs) < len(specs):
            raise ConfigError("two plugins have the same id: "
                              f"{', '.join(each.id for each in specs)}")
        self._ranks = {each.id: number for number, each in enumerate(specs)}
        self._token = token or (os.urandom(16).hex() if started else "")
        self.server = Server(self.loop, self._accept, self.limits._replace(
            max_connections=_MAX_PROGRAMS, max_connections_per_address=0,
            max_messages_per_s=_MAX_FRAMES_PER_S, burst=_MAX_FRAMES_PER_S))
        try:
            self.address = self._listen(listen or self._own_place(), tls)
        except OSError as error:
            raise OSError(error.errno or errno.EINVAL, f"{error.strerror or error}: "
                          f"plugins_listen = {listen!r}") from None
        _log.info("plugins are expected at %s%s", self.address,
                  ": " * bool(specs) + ", ".join(self._specs))
        environment = {"HORIZON_PLUGIN_ADDRESS": self.address, "HORIZON_PLUGIN_TOKEN": self._token}
        for spec in started:
            self.programs[spec.id] = PluginProgram(spec, self.loop, environment)
            self.programs[spec.id].start()
        if started:
            self._check_programs()

    def _own_place(self) -> str:
        if os.name != "posix":
            return "tcp://127.0.0.1:0"
        import tempfile
        self._folder = tempfile.mkdtemp(prefix="horizon_lite-")
        return f"unix://{self._folder}/plugins.sock"

    def _listen(self, listen: str, tls: Callable[[], ssl.SSLContext | None]) -> str:
        kind, where, port = plugin_address(listen)
        assert self.server is not None
        if kind == "unix":
            self._token = ""                    # who may open the file is trusted
            self.server.listen_unix(where, 0o600)
            return f"unix://{os.path.abspath(where)}"
        if kind == "tcp" and not is_loopback(where):
            raise ConfigError(f"plugins_listen = {listen!r} can be reached from beyond this "
                              f"machine: write tls://{where}:{port}, with tls_cert")
        if not self._token:
            raise ConfigError(f"plugins_listen = {listen!r} needs plugins_token (or "
                              "HORIZON_PLUGIN_TOKEN): any program here can reach a port. A Unix "
                              "socket needs none")
        if kind == "tls":
            self.server.tls = tls()
            if self.server.tls is None:
                raise ConfigError(f"plugins_listen = {listen!r} needs tls_cert")
        port = self.server.listen(where, port)
        return f"{kind}://{f'[{where}]' if ':' in where else where}:{port}"

    def _accept(self, connection: Connection) -> PluginPeer:
        peer = PluginPeer(self, connection)
        self.loop.call_later(_HELLO_S, functools.partial(self._expect_hello, peer))
        return peer

    def _expect_hello(self, peer: PluginPeer) -> None:
        if not peer.id and peer.connection.is_open:
            self.refused["hello_timeout"] += 1
            peer.connection.close(1008, f"no hello within {_HELLO_S:g} s")

    def admit(self, peer: PluginPeer, plugin_id: str, hello: Any) -> None:
        """Let a program in that has said hello.

        Raises:
            PeerError: it is not the one it should be, or has not.
        """
        import hmac
        def refuse(text: str, label: str) -> PeerError:
            return HandshakeError(text, label=label, close_code=1008)

        if hello is None:
            raise refuse("the first frame is a PluginHello", "no_hello")
        if not _PLUGIN_ID.fullmatch(plugin_id):
            raise refuse("plugin_id is 1 to 64 of A-Z a-z 0-9 _ . -", "unknown_plugin")
        token = getattr(hello, "token", "")
        if self._token and not hmac.compare_digest(token.encode(), self._token.encode()):
            raise refuse("the token is wrong" if token else "a token is needed "
                         "(HORIZON_PLUGIN_TOKEN)", "bad_token")
        if self._specs and plugin_id not in self._specs:
            raise refuse(f"there is no plugin {plugin_id!r} here; a [[plugins]] table with that id "
                         "would expect it", "unknown_plugin")
        if hello.api_version not in ("", _API_VERSION):
            raise refuse(f"this host speaks {_API_VERSION}, not {hello.api_version[:20]!r}",
                         "api_version")
        if (old := self.peers.get(plugin_id)) is not None:
            self.refused["replaced"] += 1
            old.connection.close(1000, "replaced by a newer connection")
        peer.id, peer.name, peer.version = plugin_id, hello.name[:200], hello.version[:50]
        peer.commands = [each.name[:64] for each in hello.commands[:_MAX_COMMANDS]]
        peer.squeezes = self.dialect.says("compressed_events") and not getattr(
            hello, "uncompressed", True)

    def welcome(self, peer: PluginPeer) -> None:
        """Say hello to who was let in."""
        self.peers[peer.id] = peer
        self._ranks.setdefault(peer.id, len(self._specs) + next(self._seq))
        _log.info("plugin %s is connected: %s %s", peer.id, peer.name, peer.version)
        self._control(peer, "hello", api_version=_API_VERSION, boot_id=self._boot_id)

    def _control(self, peer: PluginPeer, name: str, **values: Any) -> None:
        data = self.dialect.part(name, self.dialect.make(name, **values))
        peer.put(_HostEvent("", data, next(self._seq), True, alone=True))

    def forget(self, peer: PluginPeer, reason: str) -> None:
        """Drop every trace of a program that has gone."""
        self.waiting.pop(peer, None)
        self.urgent.pop(peer, None)
        self.coalesced += peer.outbox.coalesced
        if not self.stopping:
            self._say(reason, f"{peer!r} is gone: {reason}")
        if self.peers.get(peer.id) is peer:
            del self.peers[peer.id]
        self.sort_peers()
        for ask in [each for each in self._asks.values() if peer in each.waiting]:
            self.answers["gone"] += 1
            ask.waiting.pop(peer, None)         # one may settle another
            self._settle(ask)
        if peer.id not in self._specs and peer.id not in self.peers:
            self._ranks.pop(peer.id, None)

    def _say(self, what: str, text: str) -> None:
        """Warn, once a second at most of each kind."""
        if len(self._told_ns) > 100:
            self._told_ns.clear()
        if self.loop.now_ns - self._told_ns.get(what, -1 << 62) >= 1_000_000_000:
            self._told_ns[what] = self.loop.now_ns
            _log.warning("%s", text)

    def sort_peers(self) -> None:
        """Bring up to date who wants what."""
        self._by_type = {}
        for peer in sorted(self.peers.values(), key=lambda each: self._ranks[each.id]):
            for kind in peer.wanted or ():
                self._by_type.setdefault(kind, []).append(peer)

    # -- events to plugins --

    def wants(self, kind: str) -> bool:
        """Whether some plugin hears of events of this type."""
        return kind in self._by_type

    def tell(self, kind: str, payload: Any = None, **values: Any) -> None:
        """Tell all who want to hear of it, with the tick; *values* are the payload's fields."""
        if peers := self._by_type.get(kind):
            data = b"\n" + _delimited(self.dialect.event(
                kind, payload or self.dialect.payload(kind, **values), self._next_id()))
            item = _HostEvent(kind, data, next(self._seq), kind in _NEVER_DROPPED, alone=False)
            for peer in list(peers):
                peer.put(item)

    def move(self, moves: PlayerMoves) -> None:
        """Tell who moved in this tick; of what a plugin has not read the newest stays."""
        self.last_moves = moves
        for peer in list(self._by_type.get("PLAYER_MOVE", ())):
            peer.put(moves)

    def kind(self, message: Any) -> str:
        """Return the type of event that *message* is the payload of, or "" if it is none."""
        if self.dialect is None and isinstance(message, Message):
            self.dialect = _Dialect(builtin_schema())
        return str(self.dialect.kind(message)) if isinstance(message, Message) else ""

    def ask(self, payload: Any) -> Any:
        """Ask all who want to hear of it; returns the Future of a Verdict.

        It is done when all have answered, one cancels, or ``plugin_reply_ms`` is over; who
        can't be told is not waited for.
        """
        future, kind, item = self._future(), self.kind(payload), None
        event_id, peers = self._next_id(), self._by_type.get(kind, [])
        if peers:
            data = self.dialect.part("event", self.dialect.event(kind, payload, event_id, True))
            item = _HostEvent(kind, data, next(self._seq), kind in _NEVER_DROPPED, alone=True)
        ask = self._asks[event_id] = _Ask(event_id, kind, payload, future, self.loop.clock(), item)
        if item is not None:
            able = [each for each in peers if item.critical or not each.connection.unsent
                    or not each.outbox.overflows(1, item.size)]
            self.answers["skipped"] += len(peers) - len(able)
            ask.waiting = dict.fromkeys(able)       # all of them first: one may go with the next
            for peer in able:
                peer.put(item)
            if self.reply_s:
                self.loop.call_later(self.reply_s, functools.partial(self._expire, ask))
        self._settle(ask)
        return future

    def answer(self, peer: PluginPeer, result: Any) -> None:
        """Take a plugin's answer, if it was asked and has not answered before."""
        ask, outcome = self._asks.get(result.event_id), ""
        if ask is None:
            number = result.event_id if len(result.event_id) < 20 else ""
            late = number.isascii() and number.isdigit() and 0 < int(number) <= self._number
            outcome = "late" if late else "unknown"
        elif peer not in ask.waiting:
            outcome = "duplicate" if peer.id in ask.verdict.answers else "not_asked"
        if outcome or ask is None:
            self.answers[outcome] += 1
            self._say(f"answer {outcome} {peer.id}",
                      f"{peer!r} answered event {result.event_id[:40]!r}, which counts for "
                      f"nothing: {outcome.replace('_', ' ')}")
        else:
            self.answers["answered"] += 1
            del ask.waiting[peer]
            ask.verdict.answers[peer.id] = result
            if result.cancel and not ask.verdict.cancelled:
                self.answers["cancelled"] += 1
                ask.verdict.cancelled, ask.verdict.by = True, peer.id
                ask.verdict.reason = getattr(result, "reason", "")[:_MAX_LOG_LINE]
            self._settle(ask)

    def _next_id(self) -> str:
        self._number += 1
        return str(self._number)

    def _expire(self, ask: _Ask) -> None:
        for peer in ask.waiting:
            self.answers["timeout"] += 1
            peer.timeouts += 1
            self._say(f"late {peer.id}", f"{peer!r} has not answered {ask.kind} within "
                      f"{self.reply_s * 1000:g} ms")
        ask.waiting.clear()
        self._settle(ask)

    def _settle(self, ask: _Ask) -> None:
        """Tell the verdict when it can't change any more; forget the question after all answers."""
        if not ask.waiting:
            self._asks.pop(ask.id, None)
        if (ask.waiting and not ask.verdict.cancelled) or ask.future.done():
            return
        if not ask.verdict.cancelled:
            try:
                self._apply(ask)
            except Exception:
                _log.exception("the answers to %s can't be applied", ask.kind)
        if ask.verdict.answers:
            self._observe("horizon_plugins_ask_seconds", (self.loop.clock() - ask.began_ns) / 1e9)
        ask.future.set_result(ask.verdict)

    def _apply(self, ask: _Ask) -> None:
        """Apply what plugins changed, in configured order; what is absent changes nothing."""
        verdict, name = ask.verdict, ask.kind.lower()
        for plugin_id in sorted(verdict.answers, key=lambda each: self._ranks.get(
                each, sys.maxsize)):                    # it may have gone
            answer = verdict.answers[plugin_id]
            if (which := answer.which("update")) != name:
                self.answers["wrong_update"] += which is not None
                continue
            change = getattr(answer, name)
            if verdict.update is None:
                verdict.update = type(change)()
                verdict.event = type(verdict.event).decode(verdict.event.encode())
            for each in change._fields:
                if (value := getattr(change, each.name)) or value is not None and each.explicit:
                    setattr(verdict.update, each.name, value)
                    if hasattr(verdict.event, each.name):
                        setattr(verdict.event, each.name, value)

    # -- actions of plugins --

    def act(self, peer: PluginPeer, action: Any) -> None:
        """Do what a plugin asks for; it hears how that went if it gave a correlation_id."""
        kind = action.which("kind") or "unknown"
        self.actions[kind] += 1
        try:
            wrong = "this host knows no such action" if kind == "unknown" else (
                self._perform(peer, kind, getattr(action, kind)))
        except UsageError as error:
            wrong = str(error)
        except Exception:
            _log.exception("action %s of %r failed", kind, peer)
            wrong = "it failed; the host's log says why"
        self.actions["failed"] += bool(wrong)
        if action.correlation_id and self.dialect.says("action_result"):
            result = self.dialect.make("action_result")
            status = next(each.target for each in result._fields if each.name == "status")
            self._control(peer, "action_result", correlation_id=action.correlation_id,
                          status=status(ok=not wrong, error=wrong or None))

    # -- leaving --

    def tick(self) -> None:
        """Send what waits for each plugin, in one batch."""
        if self.waiting:
            waiting, self.waiting = self.waiting, {}
            self.flush(waiting)

    def flush_urgent(self) -> None:
        """Send what can't wait for the tick, and what stands before it."""
        if self.urgent:
            urgent, self.urgent = self.urgent, {}
            self.flush(urgent)

    def flush(self, peers: Iterable[PluginPeer]) -> None:
        """Encode and write the outboxes of *peers*; equal contents are encoded once."""
        began_ns, rendered, ready = self.loop.clock(), {}, []
        for peer in peers:
            if not peer.outbox.items or peer.connection.unsent:
                continue                        # sent already, or to be sent when it has read
            items = peer.outbox.take()
            key = (peer.packed, peer.squeezes, *items)
            if key in rendered:
                self.reused += 1
            else:
                self.renders += 1
                rendered[key] = self._render(items, peer.packed, peer.squeezes)
            ready.append((peer, items, len(rendered[key]), peer.frames(rendered[key])))
        if ready:
            self._observe("horizon_plugins_marshal_seconds", (self.loop.clock() - began_ns) / 1e9)
        for peer, items, frames, data in ready:
            for item in items:
                self.events[item.kind or "CONTROL"] += item.count
            peer.sent.update(frames=frames, events=sum([each.count for each in items]),
                             bytes=len(data))
            assert self.server is not None
            self.server.writes += 1
            self.server.bytes_sent += len(data)
            peer.connection.send_now(data)

    def _render(self, items: tuple[Any, ...], packed: str, squeeze: bool) -> list[bytes]:
        """Return the payloads of frames: batches of at most 100 events, and what goes alone."""
        parts: list[bytes] = []
        batch: list[bytes] = []
        count = size = 0
        for item in items:
            pieces = self.dialect.moves(item, packed) if isinstance(item, PlayerMoves) else [
                (1, item.data)]
            for events, data in pieces:
                if batch and (item.alone or count + events > _EVENTS_A_BATCH
                              or size + len(data) > _BATCH_BYTES):
                    parts += self._batch(batch, count, squeeze)
                    batch, count, size = [], 0, 0
                if item.alone:
                    parts.append(data)
                else:
                    batch.append(data)
                    count, size = count + events, size + len(data)
        return parts + self._batch(batch, count, squeeze) if batch else parts

    def _batch(self, members: list[bytes], count: int, squeeze: bool) -> list[bytes]:
        """Return frames that hold encoded members of an EventBatch, compressed if that helps."""
        if not self.dialect.says("events"):             # upstream has no batches
            return [self.dialect.alone(each) for each in members]
        data = b"".join(members)
        self.batches += 1
        self._observe("horizon_plugins_batch_events", count)
        if squeeze and len(data) > _SQUEEZE_ABOVE:
            small = builtin_schema().CompressedEventBatch(
                data=zlib.compress(data, 1), original_size=len(data)).encode()
            if len(small) < len(data):
                self.squeezed += 1
                return [self.dialect.part("compressed_events", small)]
        return [self.dialect.part("events", data)]

    def count_drop(self, peer: PluginPeer, item: Any) -> None:
        """Count what a plugin that reads too slowly will not get, nor be waited for."""
        self.drops["latest" if item.key is not None else "droppable"] += 1
        self._say("drop", f"{peer!r} reads too slowly: {item.kind or 'something'} is dropped")
        for ask in [each for each in self._asks.values() if each.item is item]:
            if peer in ask.waiting:
                self.answers["skipped"] += 1
                del ask.waiting[peer]
                self.loop.call_later(0.0, functools.partial(self._settle, ask))

    # -- ending --

    def begin_stop(self, reason: str) -> None:
        """Tell every plugin that it is over, and why."""
        if self.stopping:
            return
        self.stopping = True
        if self.server is not None:
            self.tell("WORLD_CLOSE")
            self.flush(list(self.peers.values()))
            self.server.stop_accepting()
            for connection in list(self.server.connections.values()):
                connection.owner.leave(reason)
        for program in self.programs.values():
            program.stopping = True             # it ends by itself, or is told to
            self.loop.call_later(_LAST_WORDS_S, program.stop)

    @property
    def idle(self) -> bool:
        """Whether every program has gone, and every question is settled."""
        return not (self._asks or self.server is not None and self.server.connections
                    or any(each.pid for each in self.programs.values()))

    @property
    def asking(self) -> bool:
        """Whether some question is open."""
        return bool(self._asks)

    def settle(self, *futures: Any) -> None:
        """Decide what is asked, or only these, by the answers there are."""
        for ask in list(self._asks.values()):
            if not futures or ask.future in futures:
                self._expire(ask)

    def stop(self) -> None:
        """End what is left."""
        for program in self.programs.values():
            program.stop(kill=True)
        if self.server is not None:
            self.server.stop_accepting()
            for connection in list(self.server.connections.values()):
                connection.abort("stopped")
        self.settle()
        with contextlib.suppress(OSError):
            if self._folder:
                os.rmdir(self._folder)
        self.programs = {}

    def _check_programs(self) -> None:
        if self.programs:
            self.loop.call_later(0.1, self._check_programs)
        for program in self.programs.values():
            program.check()

    @property
    def restarts(self) -> int:
        """How often programs were started again."""
        return sum(each.restarts for each in self.programs.values())

    @property
    def replaced(self) -> int:
        """States that were replaced unsent."""
        return self.coalesced + sum(each.outbox.coalesced for each in list(self.peers.values()))

    def report(self) -> dict[str, dict[str, Any]]:
        """Return how every program is, by id."""
        return {plugin_id: {
            "connected": (peer := self.peers.get(plugin_id)) is not None,
            **({"name": peer.name, "version": peer.version, "commands": peer.commands,
                "wanted": None if peer.wanted is None else sorted(peer.wanted), **peer.sent,
                "waiting": len(peer.outbox.items), "dropped": peer.outbox.dropped,
                "timeouts": peer.timeouts} if peer is not None else {}),
            **({"pid": program.pid, "restarts": program.restarts} if (
                program := self.programs.get(plugin_id)) is not None else {})}
            for plugin_id in {**self._specs, **self.peers}}

    def _check(self) -> None:
        """Assert that every index agrees (tests)."""
        if self.server is None:
            return
        self.server._check()
        assert all(peer.id == name for name, peer in self.peers.items())
        assert {peer for peers in self._by_type.values() for peer in peers} <= {
            *self.peers.values()}
        assert all(peer.id in self.peers for ask in self._asks.values() for peer in ask.waiting)


# =============================================================================
# 17  MONITOR - garbage collection, memory, processor time
# =============================================================================
# Knows: this process.     Never: sockets, what the engine does.


_OTHER_FILES = 32                   # open besides connections


class GCWatch:
    """Time the garbage collector's pauses through ``gc.callbacks``."""

    __slots__ = ("pauses", "slowest_ns", "_began_ns", "_untold")

    def __init__(self) -> None:
        self.pauses = self.slowest_ns = self._began_ns = 0
        self._untold: deque[int] = deque(maxlen=1000)

    def start(self) -> None:
        """Begin to watch."""
        gc.callbacks.append(self._called)

    def stop(self) -> None:
        """Watch no longer; doing it twice is harmless."""
        with contextlib.suppress(ValueError):
            gc.callbacks.remove(self._called)

    def _called(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._began_ns = time.monotonic_ns()
        elif self._began_ns:
            spent_ns = time.monotonic_ns() - self._began_ns
            self.pauses += 1
            self.slowest_ns = max(self.slowest_ns, spent_ns)
            self._untold.append(spent_ns)

    def take_pauses(self) -> list[int]:
        """Return the pauses since the last call, in nanoseconds."""
        return [self._untold.popleft() for _ in range(len(self._untold))]


def _memory_bytes() -> tuple[int, int]:
    """Return resident and virtual memory of this process; zeros where nobody tells."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            virtual, resident = file.read().split()[:2]
        page = os.sysconf("SC_PAGE_SIZE")
        return int(resident) * page, int(virtual) * page
    except (OSError, ValueError):
        return _peak_memory_bytes(), 0


def _peak_memory_bytes() -> int:
    try:
        import resource
    except ImportError:             # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_s() -> float:
    return time.process_time()


def _raise_file_limit(connections: int = 0) -> None:
    """Lift the soft limit of open files to the hard one; say so if there is room for fewer."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if 0 <= hard < connections + _OTHER_FILES:
            _log.warning("this process may open %d files: too few for max_connections = %d",
                         hard, connections)


# =============================================================================
# 18  CONFIG - the settings, their presets, and where a value came from
# =============================================================================
# Knows: text files, the environment, ERRORS.     Never: what a setting does.
#
# What is said closest to the start wins: flags and keywords, then HORIZON_<KEY> in the
# environment, then the TOML file, then the profile's preset, then the defaults here.  Tables
# in TOML ([server], [network], ...) only group; a key means the same in any of them.

_TRUTHS = {"true": True, "yes": True, "on": True, "1": True,
           "false": False, "no": False, "off": False, "0": False}
_PRESETS: dict[str, dict[str, Any]] = {
    "dev": {"log_level": "debug", "batch_size": 5, "batch_wait_ms": 10.0, "cache_ttl_s": 5.0},
    "prod": {},
    "high-scale": {"log_level": "warn", "metrics": False, "batch_size": 50, "batch_wait_ms": 2.0,
                   "cache_ttl_s": 60.0, "max_connections": 50_000, "max_memory_mb": 2048}}
# seed 002's names, and systems.md 2.1's: what each means here
_ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "bind_address": lambda text: dict(zip(("host", "port"), re.fullmatch(
        r"\[?([^\]]+?)\]?:(\d+)", text).groups())),     # type: ignore[union-attr]
    "connection_timeout": lambda seconds: {"idle_s": seconds},
    "use_reuse_port": lambda yes: {"reuse_port": yes},
    "tick_interval_ms": lambda ms: {"tick_hz": ms and 1000 / ms},
    "enable_rate_limiting": lambda yes: {} if _TRUTHS[str(yes).lower()] else {
        "max_messages_per_s": 0},
    "max_requests_per_minute": lambda count: {"max_messages_per_s": count / 60},
    "max_message_size": lambda size: {"max_message_bytes": size},
    "max_batch_delay": lambda ms: {"batch_wait_ms": ms},
    "plugin_token": lambda token: {"plugins_token": token},     # DESIGN 3
    "max_string_length": lambda length: {"max_json_string": length},
    "max_collection_size": lambda count: {"max_json_items": count},
    "banned_ips": lambda addresses: {"banned": addresses},
    "min_region_size": lambda size: {"region_min": size},
    "max_region_size": lambda size: {"region_max": size},
    "split_threshold": lambda count: {"region_split": count},
    "merge_threshold": lambda count: {"region_merge": count},
    "enable_compression": lambda yes: {"compress": yes},
    "compression_threshold": lambda size: {"compress_above_bytes": size},
    "max_connections_per_ip": lambda count: {"max_connections_per_address": count}}
_LOG_LEVELS = ("debug", "info", "warn", "error")


def _cpu_numbers(texts: Iterable[str]) -> set[int]:
    """Return the processors in texts like "2" and "4-7"."""
    numbers: set[int] = set()
    for text in texts:
        if not (match := re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)) or (
                int(match[2] or match[1]) < int(match[1])):
            raise ValueError(f"{text!r} must be a number, or two like 0-3")
        numbers |= {*range(int(match[1]), int(match[2] or match[1]) + 1)}
    return numbers


def _setting(default: _T, text: str) -> _T:
    """Declare a setting; *text* is what --help says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every setting. Times in seconds, sizes in bytes, 0 means no limit (DESIGN 2, 4)."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "TCP port; 0 is any free one")
    unix_socket: str = _setting("", "listen on this path; on a port as well if that is given")
    reuse_port: bool = _setting(False, "share the port with other processes (SO_REUSEPORT)")
    tls_cert: str = _setting("", "file with the certificate chain: speak TLS; SIGHUP reads it anew")
    tls_key: str = _setting("", "file with its key, if that is another one")
    firm_port: bool = _setting(False, "fail if the port is taken; on when it is given")
    profile: str = _setting("prod", "dev, prod or high-scale")
    tick_hz: float = _setting(50.0, "ticks per second; 0: everything leaves at once")
    max_catchup_ticks: int = _setting(5, "ticks made up for after a stall")
    max_connections: int = _setting(10_000, "open sockets; more get 503")
    max_connections_per_address: int = _setting(100, "of one address; this machine is exempt")
    banned: tuple[str, ...] = _setting((), "addresses and blocks like 203.0.113.0/24; get 403")
    trusted_proxies: tuple[str, ...] = _setting(
        (), "addresses whose X-Forwarded-For is believed; 'unix' for a Unix socket's")
    idle_s: float = _setting(60.0, "silence after which HTTP is closed")
    handshake_s: float = _setting(10.0, "time for a complete request")
    ping_s: float = _setting(20.0, "silence before a ping; after two unanswered ones it is dead")
    max_header_bytes: int = _setting(16_384, "a request's header block; more gets 431")
    max_message_bytes: int = _setting(65_536, "a message or body; more gets 1009 or 413")
    max_json_depth: int = _setting(10, "nesting of a client's JSON; more gets 1008")
    max_json_string: int = _setting(0, "characters of a text in a client's JSON; more gets 1008")
    max_json_items: int = _setting(0, "members of a list or object there; more gets 1008")
    max_messages_per_s: float = _setting(120.0, "of one client, on average; more gets 1008")
    burst: float = _setting(240.0, "messages of one client at once")
    max_subscriptions: int = _setting(1_000, "of one client")
    max_memory_mb: int = _setting(512, "resident; above it new connections get 503")
    allowed_origins: tuple[str, ...] = _setting((), "browsers' origins, besides our own; by comma")
    insecure: bool = _setting(False, "let strangers in from beyond this machine")
    outbox_messages: int = _setting(256, "messages that may wait for one client")
    outbox_bytes: int = _setting(1 << 20, "bytes that may wait for one client, or of one history")
    slow_handler_ms: float = _setting(50.0, "a handler that keeps the loop longer is warned about")
    plugins: tuple[str, ...] = _setting(
        (), "files, modules or folders of plugins; and a plugins.toml of programs")
    plugins_listen: str = _setting(
        "", "where plugin programs connect: unix:///path, tcp://127.0.0.1:7000, tls://host:7000")
    plugins_token: str = _setting("", "what they show by TCP; HORIZON_PLUGIN_TOKEN says it, too")
    plugins_schema: str = _setting("", "a .proto file that they speak instead of the built-in one")
    plugin_reply_ms: float = _setting(250.0, "time for a plugin to answer an event")
    reload: bool = _setting(False, "load files of plugins anew when they change")
    region_min: float = _setting(100.0, "side of the smallest region of the world")
    region_max: float = _setting(1000.0, "side of the largest; where little is, less is divided")
    region_split: int = _setting(50, "objects above which a region is divided")
    region_merge: int = _setting(10, "objects below which its parts are one again")
    hysteresis: float = _setting(0.05, "a zone is left beyond radius * (1 + this)")
    replication_batch: int = _setting(32, "updates for one client that leave without waiting")
    replication_wait_ms: float = _setting(16.0, "how long fewer wait; no longer than a slow tick")
    streams: tuple[str, ...] = _setting(
        (), "TOML files of mappings; a [stream] in the settings' own file counts, too")
    batch_size: int = _setting(20, "events of a handler with batch=True")
    batch_wait_ms: float = _setting(5.0, "how long the first of them waits")
    presence_debounce_s: float = _setting(5.0, "time to come back before one has left")
    dedup_ttl_s: float = _setting(60.0, "how long a topic knows a msg_id again; 0: never")
    cache_ttl_s: float = _setting(30.0, "how long a fragment is kept, if it does not say so")
    cache_entries: int = _setting(1_000, "fragments kept")
    compress: bool = _setting(True, "permessage-deflate for clients that offer it")
    compress_above_bytes: int = _setting(512, "shorter messages are sent as they are")
    grace_s: float = _setting(5.0, "time for clients to read what waits when the server ends")
    cpus: tuple[str, ...] = _setting((), "processors to run on, like 0,2 or 0-1")
    log_level: str = _setting("info", "debug, info, warn or error; debug times every handler")
    metrics: bool = _setting(True, "serve /metrics")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = _config_value(each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ConfigError(f"{each.name} = {value!r} must be 0 or more")
        if self.port > 65535:
            raise ConfigError(f"port = {self.port} must be 0 to 65535")
        if self.tick_hz and not 0.001 <= self.tick_hz <= 10_000:
            raise ConfigError(f"tick_hz = {self.tick_hz} must be 0, or 0.001 to 10000")
        if self.replication_wait_ms > 1000:
            raise ConfigError(f"replication_wait_ms = {self.replication_wait_ms} must be 0 to 1000")
        for name, known in (("profile", _PRESETS), ("log_level", _LOG_LEVELS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")
        for name, parse in (("banned", _Networks), ("trusted_proxies", _Networks),
                            ("cpus", _cpu_numbers)):
            try:
                parse(getattr(self, name))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None
        try:
            World(self.region_min, self.region_max, self.region_split, self.region_merge,
                  self.hysteresis)
        except UsageError as error:
            raise ConfigError(f"region_* and hysteresis: {error}") from None
        if self.tls_key and not self.tls_cert:
            raise ConfigError("tls_key is given, but no tls_cert")

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None,
             environ: Mapping[str, str] | None = None, **said: Any) -> Config:
        """Return the settings from presets, a TOML file, the environment and *said*.

        Raises:
            ConfigError: an unknown key (the nearest is named), a value of the wrong type or
                out of range, or a file that can't be read.
        """
        return cls(**{key: value for _, layer in _layers(path, environ, said)
                      for key, value in layer.items()})


def _layers(path: str | os.PathLike[str] | None, environ: Mapping[str, str] | None,
            said: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return where settings come from, and what each says; the last one wins."""
    for key in said:
        _must_be_setting(key)
    layers = [("", {}) if path is None else (os.fspath(path), _read_toml(path)),
              ("environment", _read_environment(os.environ if environ is None else environ)),
              ("said", dict(said))]
    ports = [layer for _, layer in layers if "port" in layer]
    if ports and not any("firm_port" in layer for _, layer in layers):
        ports[-1]["firm_port"] = True           # who names a port means it
    profile = next((layer["profile"] for _, layer in reversed(layers) if "profile" in layer), "")
    return [(f"profile {profile}", _PRESETS.get(str(profile), {})), *layers]


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    text: Any
    for name, text in environ.items():
        key = name.removeprefix("HORIZON_").lower()
        if key in ("plugin_id", "plugin_address"):      # what a host tells this very program
            continue
        if name == f"HORIZON_{key.upper()}" and key in _CONFIG_TYPES:
            values[key] = text
        elif name == f"HORIZON_{key.upper()}" and key in _ALIASES:
            with contextlib.suppress(ValueError):
                text = json.loads(text) if key != "plugin_token" else text
            _merge(values, key, text, "environment")
        # a slip of the pen; others may be somebody else's
        elif key != name.lower() and key not in _CONFIG_TYPES and (
                close := difflib.get_close_matches(key, [*_CONFIG_TYPES, *_ALIASES], 1, 0.7)):
            raise ConfigError(f"{name} in the environment: did you mean "
                              f"HORIZON_{close[0].upper()}?")
    return values


_CONFIG_TYPES: dict[str, type] = {
    each.name: type(each.default) for each in dataclasses.fields(Config)}
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
               tuple: "a list of texts"}


def _must_be_setting(key: str, where: str = "") -> None:
    if key not in _CONFIG_TYPES:
        raise ConfigError(f"{where}there is no setting {key!r}{_did_you_mean(key, _CONFIG_TYPES)}")


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    tables = [_load_toml(path)]
    values: dict[str, Any] = {}
    mapping = tables[0].get("stream")
    if own := isinstance(mapping, dict) and not mapping.keys().isdisjoint(_STREAM_KEYS):
        for name in ("stream", "test"):
            tables[0].pop(name, None)
    while tables:
        for name, value in tables.pop().items():
            if isinstance(value, dict):
                tables.append(value)
                continue
            _merge(values, name, value, os.fspath(path))
    if own:
        values["streams"] = (*_config_value("streams", values.get("streams", ())), os.fspath(path))
    return values


def _merge(values: dict[str, Any], name: str, said: Any, where: str) -> None:
    """Add what a key says; a rate limit that is switched off stays off."""
    for key, value in _plain_setting(name, said, where).items():
        if key in values and not (name in _ALIASES and key == "max_messages_per_s"):
            raise ConfigError(f"{where}: {key} is given twice")
        values[key] = values.get(key, value) and value


def _plain_setting(name: str, value: Any, where: str) -> dict[str, Any]:
    """Return what a key of a file says; seed 002's keys are known, too."""
    if name in _ALIASES:
        try:
            if isinstance(value, bool) and name not in ("use_reuse_port", "enable_rate_limiting",
                                                        "enable_compression"):
                raise TypeError
            return _ALIASES[name](value)
        except (TypeError, AttributeError, KeyError, ZeroDivisionError):
            raise ConfigError(f"{where}: {name} = {value!r} can't be understood") from None
    _must_be_setting(name, f"{where}: ")
    return {name: value}


def _config_value(key: str, value: Any) -> Any:
    """Return *value* in the type of setting *key*; text, from wherever, is converted."""
    wanted = _CONFIG_TYPES[key]
    try:
        if wanted is tuple:
            parts = value.split(",") if isinstance(value, str) else [
                str(each) if isinstance(each, str | int) else os.fspath(each) for each in value]
            return tuple(part.strip() for part in parts if part.strip())
        if wanted is bool:
            return value if isinstance(value, bool) else _TRUTHS[str(value).lower()]
        if wanted is str and isinstance(value, str | os.PathLike):
            return os.fspath(value)
        if wanted in (int, float) and not isinstance(value, bool):
            number = float(value) if wanted is float else int(value)
            if isinstance(value, str) or number == value:
                return number
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    hint = '; [[plugins]] tables go into a file: plugins = ["plugins.toml"]' * (key == "plugins")
    raise ConfigError(f"{key} = {value!r} must be {_TYPE_NAMES[wanted]}{hint}")


# =============================================================================
# 19  PAGE - the browser page, one string
# =============================================================================
# Knows: the wire.     Never: anything in Python.
#
# It speaks horizon.proto.v1, as any client might: 40 lines of JavaScript read and write the
# protobuf it needs.  Nothing comes from elsewhere, and the policy it is served with allows
# nothing else.

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='6' fill='%23e8590c'/%3E%3C/svg%3E">
<title>horizon_lite</title>
<style>
:root { color-scheme: light dark; --back: #f6f5f2; --card: #fff; --ink: #1d1f23; --soft: #666b75;
  --line: #dcdad4; --me: #d9480f; --good: #2b8a3e; --bad: #c92a2a; --hue: 42%; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1c1f25; --ink: #e9e8e4;
  --soft: #9aa0ab; --line: #31353d; --me: #ff8b3d; --good: #69db7c; --bad: #ff8787; --hue: 66%; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; color: var(--ink);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem; padding: .7rem 1rem; }
h1 { font-size: 1.15rem; margin: 0; }
h2 { font-size: .95rem; margin: 0 0 .4rem; }
#status::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .4em;
  border-radius: 50%; background: var(--bad); }
#status.on::before { background: var(--good); }
#count { color: var(--soft); }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(0, 1fr) 20rem; gap: .8rem;
  grid-template-rows: minmax(0, 1fr); padding: 0 1rem 1rem; }
section, figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure { padding: .4rem; display: flex; flex-direction: column; }
canvas { flex: 1; width: 100%; min-height: 0; height: 0; border-radius: 5px; touch-action: none; cursor: crosshair; }
:focus-visible { outline: 2px solid var(--me); outline-offset: 1px; }
figcaption { color: var(--soft); font-size: .85rem; padding: .3rem .4rem 0; }
aside { display: flex; flex-direction: column; gap: .8rem; min-height: 0; overflow: auto; }
dl { display: grid; grid-template-columns: 1fr auto; gap: .1rem .8rem; margin: 0; }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
dt { color: var(--soft); }
meter { width: 100%; height: .7rem; grid-column: 1 / 3; }
#log { list-style: none; margin: 0 0 .5rem; padding: 0; height: 8rem; overflow: auto; overflow-wrap: anywhere; }
#log b { color: var(--me); font-weight: 600; }
#log i { color: var(--soft); }
form { display: flex; gap: .4rem; }
input { flex: 1; min-width: 0; }
input, button { font: inherit; color: inherit; padding: .35rem .6rem; border: 1px solid var(--line);
  border-radius: 5px; background: var(--back); }
button { cursor: pointer; }
#users { list-style: none; margin: 0; padding: 0; max-height: 9rem; overflow: auto; color: var(--soft); }
#users .me { color: var(--me); }
#demo[hidden] { display: none; }
#demo label { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .1rem .6rem; color: var(--soft); margin-bottom: .3rem; }
#demo label:has([type=checkbox]) { justify-content: flex-start; margin: .4rem 0 0; cursor: pointer; }
#demo output { color: var(--ink); font-variant-numeric: tabular-nums; }
[type=range], [type=checkbox] { accent-color: var(--me); }
[type=range] { width: 100%; flex: 1 0 100%; padding: 0; }
[type=checkbox] { flex: none; }
@media (max-width: 50rem) { body { height: auto; } main { grid-template: none / 1fr; } figure { height: 115vw; max-height: 80vh; } }
</style>
</head>
<body>
<header>
  <h1>horizon_lite</h1>
  <span id="status" role="status">connecting</span>
  <span id="count"></span>
</header>
<main>
  <figure>
    <canvas id="world" tabindex="0" role="application" aria-label="The world. Move with W A S D or the arrow keys." aria-describedby="count"></canvas>
    <figcaption>You are the ringed dot: move with W A S D, the arrow keys, or by dragging. <span id="legend" hidden>Rings are how far you see: the nearer a stone, the more often you are told of it. </span>Open a second window to meet yourself.</figcaption>
  </figure>
  <aside>
    <section id="demo" aria-labelledby="h-demo" hidden>
      <h2 id="h-demo">Who needs to know what</h2>
      <label>stones in the world <output id="stones" for="density">-</output>
        <input id="density" type="range" min="100" max="5000" step="100"></label>
      <dl>
        <dt>tick now / its budget</dt><dd id="now">-</dd>
        <meter id="load" min="0" max="20" low="10" high="16" optimum="0" value="0" aria-label="tick time now against its budget"></meter>
        <dt>zones you are in</dt><dd id="sees">-</dd>
        <dt>told you / s</dt><dd id="updates">-</dd>
        <dt>bytes / s</dt><dd id="bytes">-</dd>
        <dt>left for later</dt><dd id="left_out">-</dd>
        <dt>coalesced</dt><dd id="coalesced">-</dd>
        <dt>flashes dropped</dt><dd id="dropped">-</dd>
      </dl>
      <label><input id="slow" type="checkbox"> be a slow client (6 kB/s)</label>
    </section>
    <section aria-labelledby="h-chat">
      <h2 id="h-chat">Chat</h2>
      <ul id="log" role="log" aria-live="polite" tabindex="0" aria-label="Chat messages"></ul>
      <form id="say"><input id="text" maxlength="300" autocomplete="off" placeholder="Say something" aria-label="Say something"><button>Send</button></form>
    </section>
    <section aria-labelledby="h-live">
      <h2 id="h-live">Live</h2>
      <dl>
        <dt>messages in / s</dt><dd id="messages_in_per_s">-</dd>
        <dt>events out / s</dt><dd id="messages_out_per_s">-</dd>
        <dt>bytes out / s</dt><dd id="bytes_out_per_s">-</dd>
        <dt>connections</dt><dd id="connections">-</dd>
        <dt>drops</dt><dd id="drops">-</dd>
        <dt>tick overruns</dt><dd id="overruns">-</dd>
        <dt>tick / its budget</dt><dd id="tick">-</dd>
        <meter id="budget" min="0" max="20" low="10" high="16" optimum="0" value="0" aria-label="tick time against its budget"></meter>
      </dl>
    </section>
    <section aria-labelledby="h-online">
      <h2 id="h-online">Online: <span id="online">0</span></h2>
      <ul id="users" tabindex="0" aria-label="Who is online"></ul>
    </section>
  </aside>
</main>
<script>
"use strict";
const $ = id => document.getElementById(id);

// ---- protobuf: just what this page needs (protobuf.dev, "Encoding") ----
const utf8 = new TextEncoder(), text8 = new TextDecoder();
function varint(n) {
  const out = [];
  while (n > 127) { out.push(n % 128 + 128); n = Math.floor(n / 128); }
  return [...out, n];
}
function part(number, data) {                    // a length-delimited field
  const bytes = typeof data === "string" ? utf8.encode(data) : data;
  return [...varint(number * 8 + 2), ...varint(bytes.length), ...bytes];
}
function double(number, value) {
  return [...varint(number * 8 + 1), ...new Uint8Array(new Float64Array([value]).buffer)];
}
function fields(bytes) {                         // number -> last value; envelopes have few fields
  const found = {all: []};
  let at = 0;
  const read = () => {
    let value = 0, scale = 1, byte;
    do { byte = bytes[at++]; value += (byte & 127) * scale; scale *= 128; } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = read(), wire = tag & 7;
    let value;
    if (wire === 0) value = read();
    else if (wire === 2) { const size = read(); value = bytes.subarray(at, at + size); at += size; }
    else { value = bytes.subarray(at, at + (wire === 1 ? 8 : 4)); at += wire === 1 ? 8 : 4; }
    found[Math.floor(tag / 8)] = value;
    if (tag === 10) found.all.push(value);
  }
  return found;
}
const string = bytes => bytes ? text8.decode(bytes) : "";
const number = bytes => bytes ? new DataView(bytes.buffer, bytes.byteOffset, 8).getFloat64(0, true) : 0;

// ---- the connection ----
let socket = null, wait = 500, me = null, user = "", hz = 50;
let heard = null;                                // how far the chat was heard: its epoch, its offset
function send(number, body) {
  if (socket && socket.readyState === 1) socket.send(new Uint8Array(part(1, part(number, body))));
}
const act = (action, topic, packed, since) =>
  send(106, [...part(2, action), ...part(3, topic), ...packed ? part(6, packed) : [],
    ...since ? part(7, [...part(1, since.epoch), 16, ...varint(since.offset)]) : []]);
const emit = (namespace, event, data) =>
  send(101, [...part(1, namespace), ...part(2, event), ...part(3, JSON.stringify(data))]);
function connect() {
  const scheme = location.protocol === "https:" ? "wss://" : "ws://";
  socket = new WebSocket(scheme + location.host + "/ws/data" + location.search, "horizon.proto.v1");
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    wait = 500;
    say("connected", true);
    emit("system", "hello", null);
    act("subscribe", "world.moves", "f32");
    for (const topic of ["presence", "system.stats"]) act("subscribe", topic);
    act("subscribe", "chat.lobby", null, heard);
    moveTo(own.x, own.y);
  };
  socket.onmessage = event => {
    for (const each of fields(new Uint8Array(event.data)).all) receive(fields(each));
  };
  socket.onclose = event => {
    const pause = wait * (0.7 + Math.random() * 0.6);
    say(`connection lost${event.reason ? " (" + event.reason + ")" : ""}, trying again in ${(pause / 1000).toFixed(1)} s`, false);
    wait = Math.min(wait * 2, 10000);
    players.clear();
    stones.clear();
    told = null;
    $("demo").hidden = $("legend").hidden = true;
    $("slow").checked = false;
    presence([]);
    setTimeout(connect, pause);
  };
}
function say(text, on) { $("status").textContent = text; $("status").className = on ? "on" : ""; }
function receive(envelope) {
  if (envelope[105]) return moves(fields(envelope[105]));
  if (envelope[103]) return enter(fields(envelope[103]));
  if (envelope[104]) return exit(fields(envelope[104]));
  if (envelope[108]) return change(fields(envelope[108]));
  if (envelope[107]) {
    const reply = fields(envelope[107]);
    if (!reply[2]) chat("", string(reply[4]));
  }
  if (!envelope[102]) return;
  const message = fields(envelope[102]), topic = string(message[1]);
  const data = JSON.parse(string(message[2]) || "null");
  if (topic === "chat.lobby" && (message[5] || message[6])) heard = {epoch: string(message[4]), offset: message[3] || 0};
  if (message[6]) chat("", "(what was said before is lost)");
  else if (topic === "chat.lobby") { if (data && typeof data.text === "string") chat(String(data.from || "somebody"), data.text); }
  else if (topic === "system.stats") figures(data);
  else if (data && data.type === "presence_update") presence(data.users);
  else if (data && data.namespace === "demo") demo(data.data);
  else if (data && data.event === "hello") { me = data.data.id.replaceAll("-", ""); user = data.data.user; hz = data.data.tick_hz || 50; }
}

// ---- the things around you: what you are told of them, by channel ----
const stones = new Map(), leaving = [];          // id -> {x, y, fromX, fromY, at, hue, channels, born, flash}
let told = null;                                 // the demo's figures
const period = stone => told ? 1000 / (told.layers[Math.min(...stone.channels)] || {hz: 5}).hz : 200;
function goTo(stone, x, y, now) {
  [stone.fromX, stone.fromY] = glide(stone, now, period(stone));
  Object.assign(stone, {x, y, at: now});
}
function enter(zone) {
  const id = string(zone[1]), now = performance.now(), data = JSON.parse(string(zone[4]) || "{}");
  const at = fields(zone[6] || new Uint8Array()), x = number(at[1]), y = number(at[2]);
  let stone = stones.get(id);
  if (!stone) stones.set(id, stone = {x, y, fromX: x, fromY: y, at: now, hue: 40, channels: new Set(), born: now, flash: 0});
  stone.channels.add(zone[3] || 0);
  if ("hue" in data) stone.hue = data.hue;
}
function exit(zone) {
  const id = string(zone[1]), stone = stones.get(id);
  if (!stone) return;
  stone.channels.delete(zone[3] || 0);
  if (stone.channels.size) return;
  stones.delete(id);
  leaving.push({...stone, gone: performance.now()});
}
function change(event) {
  const stone = stones.get(string(event[1])), now = performance.now();
  if (!stone) return;
  if (string(event[4]) === "flash") stone.flash = now;
  if (string(event[4]) !== "update") return;
  const data = JSON.parse(string(event[5]) || "{}");
  if (data.position) goTo(stone, data.position[0], data.position[1], now);
  if ("hue" in data) stone.hue = data.hue;
}
function demo(data) {
  const old = told, span = old ? (data.at - old.at) || 1 : 0;
  told = data;
  $("demo").hidden = $("legend").hidden = false;
  if (document.activeElement !== $("density") || !old) $("density").value = data.wanted;
  $("stones").textContent = data.objects.toLocaleString("en");
  $("now").textContent = `${data.tick_ms.toFixed(2)} / ${data.budget_ms.toFixed(0)} ms`;
  meter($("load"), data.tick_ms, data.budget_ms);
  for (const name of ["sees", "coalesced", "left_out", "dropped"]) $(name).textContent = short(data[name]);
  for (const name of ["updates", "bytes"]) if (span) $(name).textContent = short(Math.max(0, data[name] - old[name]) / span);
  if (document.activeElement !== $("slow")) $("slow").checked = data.slow;
}
$("density").addEventListener("input", event => {
  $("stones").textContent = Number(event.target.value).toLocaleString("en");
  emit("demo", "density", {count: Number(event.target.value)});
});
$("slow").addEventListener("change", event => emit("demo", "slow", {on: event.target.checked}));

// ---- what the server tells ----
const players = new Map();                       // id -> {x, y, fromX, fromY, at}
function moves(block) {
  const view = new DataView(block[1].buffer, block[1].byteOffset, block[1].length);
  const now = performance.now(), seen = new Set();
  for (let at = 4; at < view.byteLength; at += 28) {
    let id = "";
    for (let n = 0; n < 16; n++) id += block[1][at + n].toString(16).padStart(2, "0");
    const x = view.getFloat32(at + 16, true), y = view.getFloat32(at + 20, true);
    const old = players.get(id), from = old ? place(old, now) : [x, y];
    players.set(id, {x, y, fromX: from[0], fromY: from[1], at: now, hue: old ? old.hue : parseInt(id.slice(0, 4), 16) % 360});
    seen.add(id);
  }
  if (block[3]) for (const id of players.keys()) if (!seen.has(id)) players.delete(id);
}
function glide(thing, now, ms) {                 // to the last position within so many ms
  const part = Math.max(0, Math.min(1, (now - thing.at) / ms));
  return [thing.fromX + (thing.x - thing.fromX) * part, thing.fromY + (thing.y - thing.fromY) * part];
}
const place = (player, now) => glide(player, now, 1000 / hz);
let online = [];
function presence(users) {
  online = users;
  $("online").textContent = users.length;
  $("users").replaceChildren(...users.slice(0, 100).map(name => {
    const item = document.createElement("li");
    item.textContent = name + (name === user ? " (you)" : "");
    if (name === user) item.className = "me";
    return item;
  }));
}
function chat(from, text) {
  const log = $("log"), item = document.createElement("li");
  const who = document.createElement(from ? "b" : "i");
  who.textContent = from ? from + ": " : text;
  item.append(who, from ? text : "");
  const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.append(item);
  while (log.children.length > 200) log.firstChild.remove();
  if (below) log.scrollTop = log.scrollHeight;
}
const short = n => n >= 1e6 ? (n / 1e6).toFixed(1) + " M" : n >= 1e4 ? (n / 1e3).toFixed(0) + " k" : Math.round(n).toLocaleString("en");
function figures(data) {
  for (const name of ["messages_in_per_s", "messages_out_per_s", "bytes_out_per_s", "connections", "drops", "overruns"])
    $(name).textContent = short(data[name]);
  $("tick").textContent = `${data.tick_ms.toFixed(2)} / ${data.budget_ms.toFixed(0)} ms`;
  meter($("budget"), data.tick_ms, data.budget_ms);
}
function meter(bar, value, most) {
  bar.max = most || 20; bar.low = bar.max / 2; bar.high = bar.max * 0.8; bar.value = value;
}

// ---- yourself ----
const own = {x: 100 + Math.random() * 800, y: 100 + Math.random() * 800}, held = new Set();
let goal = null, moved = true;
const KEYS = {w: [0, -1], a: [-1, 0], s: [0, 1], d: [1, 0], arrowup: [0, -1], arrowleft: [-1, 0], arrowdown: [0, 1], arrowright: [1, 0]};
function moveTo(x, y) { send(16, [...double(2, x), ...double(3, y)]); moved = false; }
addEventListener("keydown", event => {
  const key = event.key.toLowerCase();
  if (["log", "users"].includes(event.target.id) || event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey || !KEYS[key]) return;
  held.add(key); goal = null;
  event.preventDefault();
});
addEventListener("keyup", event => held.delete(event.key.toLowerCase()));
addEventListener("blur", () => held.clear());
const canvas = $("world");
canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); goal = toWorld(event); });
canvas.addEventListener("pointermove", event => { if (event.buttons) goal = toWorld(event); });
let last = performance.now();
function walk(now) {
  const step = Math.min(0.1, (now - last) / 1000) * 260;
  last = now;
  let dx = 0, dy = 0;
  for (const key of held) { dx += KEYS[key][0]; dy += KEYS[key][1]; }
  if (goal) { dx = goal[0] - own.x; dy = goal[1] - own.y; if (Math.hypot(dx, dy) < 3) goal = null; }
  const length = Math.hypot(dx, dy);
  if (!length) return;
  const far = goal ? Math.min(step, length) : step;
  own.x = Math.max(0, Math.min(1000, own.x + dx / length * far));
  own.y = Math.max(0, Math.min(1000, own.y + dy / length * far));
  moved = true;
}
setInterval(() => { if (moved) moveTo(own.x, own.y); }, 1000 / 30);
$("say").addEventListener("submit", event => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (socket.readyState !== 1) return chat("", "not connected: your line is kept, try again");
  if (text) emit("chat", "message", {text});
  $("text").value = "";
});

// ---- the picture ----
let fit = {scale: 1, x: 0, y: 0};
function toWorld(event) { return [(event.offsetX - fit.x) / fit.scale, (event.offsetY - fit.y) / fit.scale]; }
function draw(now) {
  walk(now);
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d"), css = getComputedStyle(document.documentElement);
  const ink = css.getPropertyValue("--ink"), mine = css.getPropertyValue("--me"), light = css.getPropertyValue("--hue");
  const scale = Math.min(width, height) / 1040;
  fit = {scale, x: (width - 1000 * scale) / 2, y: (height - 1000 * scale) / 2};
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.strokeStyle = css.getPropertyValue("--line");
  pen.lineWidth = 1;
  pen.beginPath();
  for (let n = 0; n <= 1000; n += 100) {
    pen.moveTo(fit.x + n * scale, fit.y); pen.lineTo(fit.x + n * scale, fit.y + 1000 * scale);
    pen.moveTo(fit.x, fit.y + n * scale); pen.lineTo(fit.x + 1000 * scale, fit.y + n * scale);
  }
  pen.stroke();
  pen.font = "12px system-ui, sans-serif";
  pen.textAlign = "center";
  const people = new Set(online.map(name => name.slice(6)));
  const dot = (x, y, size, color, label) => {
    const left = fit.x + x * scale, top = fit.y + y * scale;
    pen.fillStyle = color;
    pen.beginPath(); pen.arc(left, top, size, 0, 7); pen.fill();
    if (!label) return;
    pen.strokeStyle = color; pen.lineWidth = 2;
    pen.beginPath(); pen.arc(left, top, size + 4, 0, 7); pen.stroke();
    pen.fillStyle = ink; pen.fillText(label, left, top - size - 9);
  };
  zones(pen, scale, now, ink, light);
  for (const [id, player] of players) {
    if (id === me) continue;
    const [x, y] = place(player, now), person = people.has(id.slice(0, 8));
    dot(x, y, person ? 6 : 4, `hsl(${player.hue} 65% ${light})`, person && online.length < 30 ? "guest-" + id.slice(0, 8) : "");
  }
  dot(own.x, own.y, 7, mine, "you");
  requestAnimationFrame(draw);
}
const FADE = [1, 0.8, 0.55, 0.3], SIZE = [5.5, 4.5, 3.5, 2.8];      // by channel
function zones(pen, scale, now, ink, light) {
  if (!told) return;
  const at = (x, y) => [fit.x + x * scale, fit.y + y * scale], [left, top] = at(own.x, own.y);
  pen.save();
  pen.beginPath(); pen.rect(fit.x, fit.y, 1000 * scale, 1000 * scale); pen.clip();
  pen.lineWidth = 1;
  pen.font = "11px system-ui, sans-serif";
  Object.entries(told.layers).forEach(([channel, layer]) => {
    pen.globalAlpha = 0.25 + 0.5 * FADE[channel];
    pen.strokeStyle = pen.fillStyle = `hsl(210 60% ${light})`;
    pen.setLineDash(channel === "0" ? [] : [2 + 2 * channel, 4]);
    pen.beginPath(); pen.arc(left, top, layer.radius * scale, 0, 7); pen.stroke();
    pen.globalAlpha = 0.04;
    pen.fill();
    pen.globalAlpha = 0.8;
    pen.fillText(`${layer.hz} Hz`, left, top + layer.radius * scale - 4);
  });
  pen.setLineDash([]);
  const stone = (x, y, size, hue, alpha, turn) => {
    pen.globalAlpha = alpha; pen.fillStyle = `hsl(${hue} 70% ${light})`;
    const [a, b] = at(x, y);
    pen.translate(a, b); pen.rotate(turn); pen.fillRect(-size, -size, 2 * size, 2 * size); pen.rotate(-turn); pen.translate(-a, -b);
  };
  const ring = (x, y, size, alpha) => {
    const [a, b] = at(x, y);
    pen.globalAlpha = alpha; pen.strokeStyle = ink;
    pen.beginPath(); pen.arc(a, b, size, 0, 7); pen.stroke();
  };
  for (const each of stones.values()) {
    const near = Math.min(3, ...each.channels), [x, y] = glide(each, now, period(each));
    const age = Math.min(1, (now - each.born) / 500), flash = (now - each.flash) / 400;
    stone(x, y, SIZE[near] * (0.4 + 0.6 * age), each.hue, FADE[near], now / 900 + each.hue);
    if (age < 1) ring(x, y, 4 + 10 * (1 - age), age * 0.6);             // it comes in
    if (flash < 1) { ring(x, y, 6 + 14 * flash, 1 - flash); stone(x, y, SIZE[near] + 2, each.hue, 1 - flash, 0.8); }
  }
  while (leaving.length && now - leaving[0].gone > 600) leaving.shift();
  for (const each of leaving) {                                         // it goes
    const part = (now - each.gone) / 600;
    stone(each.x, each.y, 3 * (1 - part), each.hue, 0.4 * (1 - part), now / 300);
    ring(each.x, each.y, 3 + 8 * part, 0.5 * (1 - part));
  }
  pen.restore();
}
setInterval(() => {
  $("count").textContent = `${players.size} player${players.size === 1 ? "" : "s"} moving about, ${online.length} online${told ? `, ${stones.size} stones near you` : ""}`;
}, 500);
connect();
requestAnimationFrame(draw);
</script>
</body>
</html>
"""

# The command's page for /ws/html.
HTML_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>horizon_lite by HTML fragments</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 40rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
ul { min-height: 10rem; padding: 1rem; list-style: none; border: 1px solid #8886; border-radius: 8px; overflow-wrap: anywhere; }
form { display: flex; gap: .5rem; }
input { flex: 1; min-width: 0; }
input, button { font: inherit; padding: .4rem .7rem; border: 1px solid #8888; border-radius: 6px; }
</style>
<h1>horizon_lite</h1>
<p id="online">connecting</p>
<ul id="log" aria-live="polite"></ul>
<form ws-send>
  <input type="hidden" name="namespace" value="chat"><input type="hidden" name="event" value="message">
  <input name="text" maxlength="300" autocomplete="off" aria-label="Say something" placeholder="Say something">
  <button>Send</button>
</form>
<script src="/swap.js"></script>
</html>
"""

# For pages of one's own: <script src="/swap.js"></script>.  It does what htmx's ws extension
# does: elements from /ws/html take the place of those with their ids, or go where
# hx-swap-oob says; forms with ws-send are sent.  Replies are events of the document.
SWAP_SCRIPT = r"""(() => {
  const url = document.currentScript.dataset.url || "/ws/html", query = url.includes("?") ? location.search.replace("?", "&") : location.search;
  const reply = detail => document.dispatchEvent(new CustomEvent("horizon:reply", {detail})), replace = (old, it) => old.replaceWith(it);
  const put = {true: replace, outerHTML: replace, innerHTML: (old, it) => old.replaceChildren(...it.childNodes), delete: old => old.remove(),
    beforeend: (old, it) => old.append(...it.childNodes), afterbegin: (old, it) => old.prepend(...it.childNodes),
    beforebegin: (old, it) => old.before(...it.childNodes), afterend: (old, it) => old.after(...it.childNodes)};
  let socket, wait = 500;
  function swap(it) {
    const [how, target] = (it.getAttribute("hx-swap-oob") || "true").split(/:(.*)/s);
    const old = target ? document.querySelector(target) : document.getElementById(it.id);
    it.removeAttribute("hx-swap-oob");
    if (old && Object.hasOwn(put, how)) put[how](old, it);
  }
  (function connect() {
    socket = new WebSocket(location.origin.replace("http", "ws") + url + query);
    socket.onopen = () => { wait = 500; };
    socket.onclose = () => { setTimeout(connect, wait * (0.7 + Math.random() * 0.6)); wait = Math.min(wait * 2, 10000); };
    socket.onmessage = ({data}) => {
      try { if (/^[[{]/.test(data)) return [JSON.parse(data)].flat().forEach(reply); } catch { /* HTML may begin so, too */ }
      [...Object.assign(document.createElement("template"), {innerHTML: data}).content.children].forEach(it => {
        try { swap(it); } catch (error) { console.error(error); }
      });
    };
  })();
  addEventListener("submit", event => {
    if (!event.target.hasAttribute("ws-send")) return;
    event.preventDefault();
    if (socket.readyState !== 1) return reply({error: {code: "offline", message: "not connected"}});
    const data = Object.create(null);
    for (const [name, value] of new FormData(event.target, event.submitter)) data[name] = Object.hasOwn(data, name) ? [data[name], value].flat() : value;
    socket.send(JSON.stringify(data));
    event.target.reset();
  });
})();
"""


# =============================================================================
# 20  ENGINE - the parts joined
# =============================================================================
# Knows: everything above.     Never: argv.
#
# What a client sends becomes an event on the bus or a request to the topics.  What is
# published goes to the outboxes of the sessions subscribed, as one shared object; at the
# tick each session's outbox is rendered in its own form and leaves in one write.  Sessions
# whose outboxes hold the same objects share the bytes, so that a broadcast is encoded and
# framed once per form, whatever the number of clients.
#
# Three moments to leave at: replies at the end of the pass that asked for them, critical
# messages likewise (with all that waits before them), everything else at the tick.

_RESERVED_TOPICS = ("system", "presence", "gorc", "world")
_NO_HANDLER = "no_handler"          # told only to who wants an answer
_PRESENCE_TOPIC, _CHANGES_TOPIC = "presence", "presence.changes"
_PORTS_TO_TRY = 100
_MAX_USER = 128                     # characters of a user's name
_MAX_DROPPED_TOPICS = 1_000         # counted by name; more only by class
_MAX_PENDING = 10_000               # events that wait for a batched handler
_MAX_RUNNING = 1_000                # calls of one async or blocking handler at once
_LOOK_S = 0.25                      # between two looks at files that may change
_CLEANUP_S = 1.0                    # for handlers that are cancelled at the end
_MAX_STATE = 1_024                  # bytes of a user's state, and of a connection's metadata
_MAX_ASKED = 64                     # events of one session that wait for plugins to answer
_ASKED_KINDS = {"chat": "CHAT", "command": "COMMAND"}       # of clients' namespaces
_TOPICS_A_MESSAGE = 2_000           # a subscription that looks through so many counts as one more
_REPLAYED_A_MESSAGE = 100           # or gets so many messages from before
_MAX_TOLD = 1 << 16                 # bytes of zones that a client enters in one tick
_FAR_JUMP = 100.0                   # metres; who goes so far in a tick pays for what it crosses
_CROSSED_A_MESSAGE = 100            # zones
_ZONES = "gorc"                     # the topic that stands for it in subscriptions
_MAX_VIEWS = 1_000                  # fragments of one view of a pattern


_Framer = Callable[[int, bytes], bytes]


def _render_objects(frame: _Framer, items: tuple[Any, ...], _packed: str) -> bytes:
    """One JSON object per text frame: for clients that named no subprotocol."""
    return b"".join([frame(_TEXT, item.json()) for item in items])


def _render_array(frame: _Framer, items: tuple[Any, ...], _packed: str) -> bytes:
    """One text frame a tick: an object, or an array when there are several."""
    if len(items) == 1:
        return frame(_TEXT, items[0].json())
    return frame(_TEXT, b"[" + b",".join([item.json() for item in items]) + b"]")


def _render_batch(frame: _Framer, items: tuple[Any, ...], packed: str) -> bytes:
    """One binary frame a tick: an EventBatch."""
    return frame(_BINARY, b"".join([item.envelope(packed) for item in items]))


def _render_events(frame: _Framer, items: tuple[Any, ...], _packed: str) -> bytes:
    """Server-Sent Events (WHATWG HTML 9.2); JSON has no line breaks."""
    return b"".join([b"id: %b\ndata: %b\n\n" % (item.mark, item.json()) if item.mark else
                     b"data: %b\n\n" % item.json() for item in items])


def _render_html(frame: _Framer, items: tuple[Any, ...], _packed: str) -> bytes:
    """A text frame for each fragment: joined, a table's row might be lost on its way."""
    return b"".join([frame(_TEXT, item.html()) for item in items])


_PROTO, _EVENTS, _HTML = "horizon.proto.v1", "events", "html"
# payloads of a client's envelope: the members of the JSON message that means the same
_ENVELOPES = {"client_event": ("namespace", "event", "data"),
              "gorc_event": ("object_id", "channel", "event", "data"),
              "request": ("action", "topic", "payload", "packed", "critical", "since", "rate",
                          "msg_id")}
_NOT_FIELDS = ("namespace", "event", "id", "HEADERS")       # of a form; the last is htmx's
_TEXTS = {"chat": "message", "command": "raw"}      # payloads that are a text, and where it stands
_FORMS = {"": _render_objects, "horizon.json.v1": _render_array, _PROTO: _render_batch,
          _EVENTS: _render_events, _HTML: _render_html}


def _frame_squeezed(deflate: Deflate, opcode: int, payload: bytes) -> bytes:
    if len(payload) < deflate.above_bytes:
        return _frame(opcode, payload)
    return _frame(opcode | _COMPRESSED, _squeeze(_deflater(deflate.send_bits), payload))


@functools.cache
def _renderer(form: str, deflate: Deflate | None) -> Callable[[tuple[Any, ...], str], bytes]:
    """Return what renders outboxes for every connection that agreed on the same."""
    return functools.partial(
        _FORMS[form], functools.partial(_frame_squeezed, deflate) if deflate else _frame)


def _plain_function(fn: _F) -> _F:
    """Return *fn*, unless it is one whose result nobody would await."""
    if _is_async(fn):
        raise UsageError(f"{fn.__qualname__} is async; only handlers of events can be")
    return fn


def _shape_fault(value: Any, depth: int, string: int, items: int) -> tuple[str, str]:
    """Return which limit parsed JSON passes, and how: of nesting, texts' length, or members."""
    layer, level = [value], 0
    while layer:
        longest = max((len(each) for each in layer if isinstance(each, str)), default=0)
        if longest > string:
            return "json_string", f"a text of {longest} characters"
        layer = [each for each in layer if isinstance(each, list | dict)]
        if layer and (most := max(map(len, layer))) > items:
            return "json_items", f"{most} members"
        level += bool(layer)
        if level > depth:
            return "json_depth", f"nesting deeper than {depth}"
        layer = [part for each in layer for part in (
            itertools.chain(each, each.values()) if isinstance(each, dict) else each)]
    return "", ""


# -- who may come in --

def _base64(data: bytes) -> str:
    import base64
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _hmac(secret: str | bytes, signed: str) -> str:
    import hmac
    key = secret.encode() if isinstance(secret, str) else secret
    if not key or not isinstance(key, bytes):
        raise UsageError(f"a secret is a str or bytes and not empty, not a {type(key).__name__}; "
                         "several are given as verify_token(token, *secrets)")
    return _base64(hmac.digest(key, signed.encode(), "sha256"))


def sign_token(user: str | Mapping[str, Any], secret: str | bytes, *,
               expires_s: float = 3600.0) -> str:
    """Return a token for *user*, or for a mapping of claims: a JWT (RFC 7519), HMAC-SHA256.

    Use 32 random bytes or more as *secret* (RFC 7518 3.2).
    """
    if not isinstance(user, str | Mapping):
        raise UsageError(f"a token is for a user's name or a mapping of claims, not {user!r}")
    claims = {"sub": user} if isinstance(user, str) else dict(user)
    claims = {"iat": int(time.time()), "exp": int(time.time() + expires_s), **claims}
    signed = f'{_base64(b"""{"alg":"HS256","typ":"JWT"}""")}.{_base64(_json_bytes(claims))}'
    return f"{signed}.{_hmac(secret, signed)}"


def verify_token(token: str, *secrets: str | bytes) -> dict[str, Any]:
    """Return the claims of a token that one of *secrets* signed; "sub" is the user.

    To change the secret, sign with the new one and verify with both until old tokens have
    expired. Signatures are compared in constant time; a token without "exp" is refused.

    Raises:
        HandshakeError: answered with 401.
    """
    import base64
    import hmac
    for secret in secrets or ("",):
        _hmac(secret, "")                   # a mistake here is not the stranger's
    why = "the token is not valid"
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if not token:
            why = "no token: send Authorization: Bearer, or ?token="
        signed, _, signature = token.rpartition(".")
        head, _, body = signed.partition(".")
        matches = [hmac.compare_digest(_hmac(secret, signed).encode(), signature.encode())
                   for secret in secrets]
        header, claims = (json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
                          for part in (head, body))
        if any(matches) and header["alg"] == "HS256" and "crit" not in header:
            if claims.get("nbf", 0) <= time.time() < claims["exp"]:
                return dict(claims)
            why = "the token has expired, or is not valid yet"
    raise HandshakeError(why, http_status=401, label="unauthenticated")


_Who = bool | str | Iterable[str] | Callable[[str], bool]


def _is_among(user: str, who: _Who) -> bool:
    if isinstance(who, bool | str):
        return who is True or user == who
    return bool(who(user)) if callable(who) else user in who


# -- files --

def _with_slash(request: Request) -> Response:
    """Send a browser on to the folder's own address, else relative links would miss."""
    path, _, query = request.target.partition("?")
    location = f"./{path.rpartition('/')[2]}/{'?' * bool(query)}{query}"
    return Response(status=301, headers={"Location": location})


def _serve_file(root: str, cache_control: str, request: Request, path: str) -> Response:
    """Answer with the file *path* under *root*: nothing hidden, nothing beyond it."""
    import mimetypes
    missing = Response("not found\n", 404)
    name = os.path.realpath(os.path.join(root, path)) if "\0" not in path else ""
    if os.path.isabs(path) or re.search(r"(?:^|[/\\])\.", path) or not (
            (name + os.sep).startswith(root + os.sep)):
        return missing
    if os.path.isdir(name):
        if path and not path.endswith("/"):
            return _with_slash(request)
        name = os.path.realpath(os.path.join(name, "index.html"))
    if not (name.startswith(root + os.sep)
            and os.path.isfile(name)):          # to open a pipe would wait for its writer
        return missing
    try:
        file = open(name, "rb")
    except OSError as error:
        busy = error.errno in (errno.EMFILE, errno.ENFILE)
        return Response("too many open files\n", 503) if busy else missing
    info = os.fstat(file.fileno())
    tag = f'"{info.st_mtime_ns:x}-{info.st_size:x}"'
    headers = {"ETag": tag, "Cache-Control": cache_control, "X-Content-Type-Options": "nosniff",
               "Last-Modified": _http_date(info.st_mtime)}
    if {tag, "*"} & {each.removeprefix("w/") for each in request.tokens("if-none-match")}:
        file.close()
        return Response(status=304, headers=headers)
    kind, packed = mimetypes.guess_type(name)
    kind = "application/octet-stream" if packed or not kind else kind
    kind += "; charset=utf-8" * (kind.startswith("text/") or kind == "application/javascript")
    if info.st_size > _RECV_BYTES:
        return Response(iter(functools.partial(file.read, _RECV_BYTES), b""), 200, headers, kind,
                        length=info.st_size)
    with file:
        return Response(file.read(), 200, headers, kind)


def _is_html(endpoint: str) -> bool:
    if endpoint not in ("data", "html"):
        raise UsageError(f'endpoint is "data" or "html", not {endpoint!r}')
    return endpoint == "html"


def _user_fault(user: object) -> str:
    """Return why *user* can't be a user's name, or ""."""
    if isinstance(user, str) and 0 < len(user) <= _MAX_USER:
        with contextlib.suppress(UnicodeEncodeError):
            user.encode()
            return ""
    return f"{reprlib.repr(user)}; a user is a text of 1 to {_MAX_USER} characters"


class Session:
    """One client, from its handshake to its goodbye: on a WebSocket, or a reader of events.

    ``id`` is a UUID, ``user`` who it is (one user may have several sessions), ``address``
    where from, ``backlog`` the bytes that wait for it, ``metadata`` a dict of your own.
    """

    __slots__ = ("id", "player", "_user", "connection", "render", "form", "packed", "outbox",
                 "engine", "handler", "subscriptions", "goodbye", "beats", "endpoint",
                 "asking", "left", "judging", "path", "known", "zones", "_metadata", "_told_ns")

    def __init__(self, engine: Engine, connection: Connection, user: str, form: str = "",
                 deflate: Deflate | None = None,
                 handler: Callable[[Session, str | bytes], object] | None = None) -> None:
        self.player = os.urandom(16)            # the id in its 16-byte form
        self.id = _uuid_text(self.player)
        self._user = user or "guest-" + self.id[:8]
        self.connection = connection
        self.form = form                        # one of _FORMS
        self.render = _renderer(form, deflate)
        self.packed = ""                        # "f32", "f64": asked for packed movement
        self.outbox: Outbox | None = None       # no container until its first use
        self.engine = engine
        self.handler = handler                  # of a route of the user's own
        self.subscriptions: dict[str, Callable[[], object]] | None = None   # and what ends each
        self.goodbye: tuple[int, str] | None = None     # to be said when it has read the rest
        self.beats: dict[str, Any] | None = None        # the heartbeats it promised, its metadata
        # what it said that plugins are asked about, in order: their verdict, its result, the event
        self.asking: deque[tuple[Any, Any, str, Any]] | None = None
        self.left: Callable[[], object] | None = None       # tells that it has gone
        self.judging = False                    # one of these happens at the moment
        self.path = ""                          # of a WebSocket route of the user's own
        self.known = False                      # no stranger
        # where broadcasts reach it: "" for streams and other WebSockets
        self.endpoint = "" if handler or form == _EVENTS else "html" if form == _HTML else "data"
        # how it is told of the world where it is: "", packed as "f32" or "f64", or not at all
        self.zones: str | None = "" if self.endpoint == "data" else None
        self._metadata: dict[str, Any] | None = None
        self._told_ns = 0                       # when it was last said that this one is slow

    @property
    def user(self) -> str:
        """Who it is; set it when you know better than the "guest-..." it begins as."""
        return self._user

    @user.setter
    def user(self, user: str) -> None:
        self.engine._on_loop("client.user")
        if fault := _user_fault(user):
            raise UsageError(f"client.user = {fault}")
        if self.connection.is_open:
            self.engine._forget_user(self)
            self._user = user
            self.engine._know_user(self)

    @property
    def address(self) -> str:
        """The peer's IP address."""
        return self.connection.address

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return self.connection.backlog + (self.outbox.size if self.outbox else 0)

    @property
    def metadata(self) -> dict[str, Any]:
        """A dict for whatever the application keeps about this client."""
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    def send(self, message: str | bytes | dict[str, Any] | list[Any]) -> None:
        """Send one message at the end of this pass: text, binary, or JSON for dict and list.

        Raises:
            UsageError: the value can't be JSON.
            StateError: called from another thread; use ``app.call_soon(client.send, ...)``.
        """
        self.engine._on_loop("client.send")
        ws = self.connection.ws
        if ws is None or not isinstance(message, str | bytes | bytearray | memoryview):
            direct = Publication("", message, 0, "", True, 0)
            self.say(self.render((direct,), ""))
            self.engine.events_sent["DIRECT"] += 1
        elif self.connection.is_open:
            try:
                self.say(ws.send_text(message) if isinstance(message, str)
                         else ws.send_binary(message))
            except UnicodeEncodeError as error:
                raise UsageError(f"this text can't be sent: {error}") from None

    def say(self, data: bytes) -> None:
        """Send frames at the end of this pass, after what is critical and came before."""
        if self.outbox is not None and self.outbox.urgent:
            self.engine._flush([self])
        self.connection.send(data)

    def close(self, code: int = 1000, reason: str = "", patience_s: float = 5.0) -> None:
        """Say goodbye with a close code (1000 to 1014, or 3000 to 4999) and a short reason.

        What was sent before goes before; a client that reads slowly has *patience_s* for it.
        """
        self.engine._on_loop("client.close")
        if not _sendable_code(code):
            raise UsageError(f"close code {code} can't be sent; use 1000 to 1014 or 3000 to 4999")
        self.engine.topics.flush()
        self.engine._flush([self])
        if not (self.connection.unsent or self.outbox is not None and self.outbox.items):
            self.connection.close(code, reason)
        elif self.goodbye is None:
            self.goodbye = (code, reason)       # said by Engine.on_drain
            self.engine.loop.call_later(patience_s, lambda: self.connection.close(code, reason))

    def put(self, item: Sendable) -> None:
        """Queue a shared item for the tick, or for the end of this pass if it is critical."""
        self._add((item,), item.size or item.measure(), item.critical)

    def box(self) -> Outbox:
        """Return its outbox, made at the first use."""
        if self.outbox is None:
            config = self.engine.config
            self.outbox = Outbox(config.outbox_messages, config.outbox_bytes,
                                 self.engine._count_drop)
        return self.outbox

    def put_many(self, batch: Batch) -> None:
        """Queue what was published on one topic; the sink of this session's subscriptions."""
        # HOT: once per subscriber per topic per tick (bench 14.fanout)
        outbox = self.outbox
        if outbox is None or outbox.items or batch.critical or (
                batch.size > outbox.max_bytes or self.connection.unsent or self.goodbye):
            self._add(batch.items, batch.size, batch.critical)
        else:                                   # the common case: the outbox becomes the batch
            outbox.items, outbox.size = batch.items, batch.size
            self.engine._waiting[self] = None

    def _add(self, items: tuple[Any, ...], size: int, critical: bool) -> None:
        """Put into the outbox; what is dropped for it is told, once a second at most."""
        engine = self.engine
        if not self.connection.is_open or self.goodbye is not None:
            return
        outbox = self.box()
        engine._waiting[self] = None
        if critical:
            outbox.urgent = True
            engine._urgent[self] = None
        ahead, before, now = len(self.connection.unsent), outbox.dropped, engine.loop.now_ns
        try:
            if not ahead and outbox.overflows(len(items), size):
                engine._flush([self])           # a peer that reads loses nothing, and no order:
                ahead = len(self.connection.unsent)         # what came before leaves before
                if not ahead:
                    items = tuple(map(outbox.settle, items))
                    return outbox.add(items, sum([each.size for each in items]))
            if items[0].key is not None:        # state comes alone
                outbox.put(items[0], ahead)
            else:
                outbox.put_many(items, size, ahead)
        except SlowPeer:
            outbox.take()
            return self.connection.slow()
        if outbox.dropped > before and now - self._told_ns >= 1_000_000_000:
            self._told_ns = now
            engine.loop.call_soon(engine._tell_slow, self, outbox.dropped)

    def __repr__(self) -> str:
        return f"Session({self.user!r} from {self.address})"


class _Refused(Exception):
    """A client's request that is answered with an error; the connection goes on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _asked_topic(topic: Any) -> str:
    """Return a topic or pattern that a client asks for, as we write it."""
    if not isinstance(topic, str):
        raise _Refused("bad_topic", '"topic" must be text')
    try:
        return ".".join(_check_topic(topic, wildcards=True))
    except UsageError as error:
        raise _Refused("bad_topic", str(error)) from None


class _Call:
    """One call of a handler away from the loop, and when it was asked for, began and ended."""

    __slots__ = ("handler", "event", "asked_ns", "began_ns", "ended_ns")

    def __init__(self, handler: Handler, event: Event | list[Event]) -> None:
        self.handler = handler
        self.event = event
        self.asked_ns = self.began_ns = self.ended_ns = time.monotonic_ns()

    def run(self) -> Any:
        """Call a blocking handler, in the pool."""
        self.began_ns = time.monotonic_ns()
        try:
            return self.handler.fn(self.event)
        finally:
            self.ended_ns = time.monotonic_ns()

    async def run_async(self) -> Any:
        """Call an ``async def`` one, on the asyncio loop."""
        self.began_ns = time.monotonic_ns()
        try:
            return await self.handler.fn(self.event)
        except (SystemExit, KeyboardInterrupt) as error:    # they would end the thread
            raise StateError(f"{error!r} ends a program only from its own thread; from here say "
                             "app.call_soon(app.stop)") from None
        finally:
            self.ended_ns = time.monotonic_ns()


class _Worker:
    """Where ``async def`` and ``blocking=True`` handlers run: away from the loop."""

    __slots__ = ("batch_size", "wait_ms", "running", "_loop", "_asyncio", "_thread", "_pool",
                 "_busy", "_batchers", "_dropped")

    def __init__(self, loop: Loop) -> None:
        self.batch_size, self.wait_ms = 20, 5.0     # of who has not said it
        self.running = Counter(asynchronous=0, blocking=0)      # calls under way, or waiting
        self._loop = loop
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None        # asyncio's
        self._pool: ThreadPoolExecutor | None = None
        self._busy: set[Handler] = set()        # whose batch is under way elsewhere
        self._batchers: dict[Handler, Batcher[Event]] = {}
        self._dropped = 0                       # by batchers that are no more

    def spawn(self, handler: Handler, event: Event) -> None:
        """Run *handler*, or put the event into its batch.

        Raises:
            LimitError: too many calls of it are under way; the bus counts that as its failure.
        """
        if not handler.batch:
            if handler.running >= _MAX_RUNNING:
                raise LimitError(f"{handler.running} calls of {handler.name} are under way")
            return self._run(handler, event)
        if (batcher := self._batchers.get(handler)) is None:
            size = self.batch_size if handler.batch is True else handler.batch
            wait_ms = self.wait_ms if handler.wait_ms is None else handler.wait_ms
            batcher = self._batchers[handler] = Batcher(
                functools.partial(self._run_batch, handler), size, wait_ms,
                max_pending=max(_MAX_PENDING, size))
        batcher.add(event)

    def _run_batch(self, handler: Handler, events: list[Event]) -> bool:
        """Run a batch; one after the other, so that order is kept."""
        if handler in self._busy:
            return False
        if handler.elsewhere:
            self._run(handler, events)
            self._busy.add(handler)
            return True
        began_ns = time.monotonic_ns()
        try:
            handler.fn(events)
        except Exception:
            handler._bus.failed(handler)
        handler.took(time.monotonic_ns() - began_ns)
        return True

    def _run(self, handler: Handler, event: Event | list[Event]) -> None:
        """Start *handler*; its times, its result and its error come back through the loop."""
        call, kind = _Call(handler, event), "asynchronous" if _is_async(handler.fn) else "blocking"
        if kind == "asynchronous":
            import asyncio
            if self._asyncio is None:
                self._asyncio = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._asyncio.run_forever, name="horizon_lite asyncio", daemon=True)
                self._thread.start()
            future: Any = asyncio.run_coroutine_threadsafe(call.run_async(), self._asyncio)
        else:
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor
                self._pool = ThreadPoolExecutor(thread_name_prefix="horizon_lite")
            future = self._pool.submit(call.run)
        handler.running += 1
        self.running[kind] += 1
        future.add_done_callback(lambda done: self._loop.call_soon(self._done, call, kind, done))

    def _done(self, call: _Call, kind: str, future: Any) -> None:
        handler = call.handler
        handler.running -= 1
        self.running[kind] -= 1
        handler.took(call.ended_ns - call.began_ns)
        if handler.queued is not None:
            handler.queued.add(call.began_ns - call.asked_ns)
        try:
            result = future.result()
            if handler.then is not None:
                began_ns = time.monotonic_ns()
                handler.then(call.event, result)
                handler.kept_loop(time.monotonic_ns() - began_ns)
        except BaseException:               # sys.exit() in a worker is a failure like others
            handler._bus.failed(handler)
        if handler.batch:
            self._busy.discard(handler)
            if self._batchers[handler].wait_s() == math.inf:    # the next one had to wait for it
                self._batchers[handler].flush()

    def flush(self, *, all: bool = False) -> None:
        """Hand on the batches that are due, or all."""
        for handler, batcher in list(self._batchers.items()):
            if all or batcher.due():
                batcher.flush()
            if handler._gone and not batcher and handler not in self._busy:
                self._dropped += self._batchers.pop(handler).dropped

    def wait_s(self) -> float:
        """Return in how many seconds ``flush`` is due."""
        return min([each.wait_s() for each in self._batchers.values()], default=math.inf)

    @property
    def dropped(self) -> int:
        """How many events found no room in a batch."""
        return self._dropped + sum(each.dropped for each in list(self._batchers.values()))

    @property
    def idle(self) -> bool:
        """Whether every batch and every call is done."""
        return not (self.running.total() or any(self._batchers.values()))

    def stop(self) -> None:
        """Cancel what is under way or waits; what is lost is told."""
        if lost := sum(map(len, self._batchers.values())):
            self._dropped += lost
            self._batchers = {}
            _log.error("%d events waited in batches when the time to stop was over", lost)
        if cut := self.running.total():
            _log.warning("%d calls of handlers were under way when the time to stop was over; "
                         "coroutines are cancelled, threads end with their calls", cut)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._asyncio is not None and self._thread is not None:
            self._asyncio.call_soon_threadsafe(self._stop_asyncio)
            self._thread.join(_CLEANUP_S)       # their finally: blocks

    def _stop_asyncio(self) -> None:
        import asyncio
        loop = asyncio.get_running_loop()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: loop.stop())


class _View:
    """What ``@app.html`` registered: HTML that is rendered anew when its topic has changed."""

    __slots__ = ("pattern", "fn", "takes_message", "audience", "changed", "shown", "number",
                 "subscription", "source")

    def __init__(self, pattern: str, fn: Callable[..., Any], number: int,
                 source: _View | None = None) -> None:
        import inspect
        self.source = source or self        # the registered one, of a pattern's
        self.pattern = pattern
        self.fn = fn
        self.takes_message = any(each.default is each.empty and each.kind <= each.VAR_POSITIONAL
                                 for each in inspect.signature(fn).parameters.values())
        self.number = number
        self.audience: dict[Session, None] = {}
        self.changed: dict[str, Publication | None] = {}    # topics, and the newest of each
        self.shown: dict[str, Markup] = {}                  # by topic
        self.subscription: Subscription | None = None       # as long as somebody looks

    def note(self, batch: Batch) -> None:
        """Remember the newest of a topic; the sink of the subscription."""
        self.changed[batch.items[-1].topic if self.takes_message else ""] = batch.items[-1]

    def leave(self, session: Session) -> None:
        """Show it to *session* no longer."""
        self.audience.pop(session, None)
        if not self.audience and self.subscription is not None:
            self.subscription.remove()
            self.subscription = None
            self.changed, self.shown = {}, {}


def _nothing() -> None:
    """End a subscription to what is not there any more."""


def _added(items: list[Any], item: Any, at: int | None = None) -> Callable[[], object]:
    """Add to a list, at its end or *at*; return what takes it out again."""
    items.insert(len(items) if at is None else at, item)
    return functools.partial(items.remove, item)


_CORE_EVENTS = (                    # that the engine emits
    "player_connected", "player_disconnected", "slow_client", "alert", "topic.occupied",
    "topic.vacated", "server_started", "server_stopping", "server_tick", "plugin_loaded",
    "plugin_unloaded", "plugin_failed")


def _key_of(*parts: str) -> str:
    if not all(isinstance(each, str) for each in parts):
        raise UsageError(f"write @app.on_{parts[0]} with names in brackets, like "
                         '@app.on_core("server_started") or @app.on_client("chat", "message")')
    return ":".join(parts)


class _Endpoint(NamedTuple):
    """An HTTP or WebSocket address and what answers it."""

    method: str                     # one of _SERVES
    pattern: re.Pattern[str]
    answer: Callable[..., Any]
    public: bool                    # needs no user
    rank: int                       # the lower is tried first


_WEBSOCKETS = ("/ws/data", "/ws/html", "/app/ws/data", "/app/ws/html")  # the last two are Goby's
_SERVES = {"GET": ("GET", "HEAD"), "POST": ("POST",), "WEBSOCKET": ("GET",), "EVENTS": ("GET",)}


_WATCHED = (                        # name, by which label, where in the engine it is counted, help
    ("server_active_connections", "server.websockets", "Open WebSockets."),
    ("server_memory_usage_mb", "_resident_mb", "Resident memory."),
    ("memory_resident_mb", "_resident_mb", "Resident memory."),
    ("memory_virtual_mb", "_virtual_mb", "Virtual memory."),
    ("server_uptime_seconds", "_uptime_s", "Time since the engine was made."),
    ("event_handlers_registered", "bus.handler_count", "Handlers on the bus."),
    ("horizon_presence_users", "presence.online", "Users with a connection."),
    ("horizon_topics_known", "topics.__len__", "Topics with a record."),
    ("horizon_transport_connections", "server.connections.__len__", "Open sockets."),
    ("events_processed_total", "bus.emits", "Events emitted on the bus."),
    ("horizon_bus_errors_total", "bus.errors", "Handler calls that raised."),
    ("horizon_messages_received_total", "server.messages_received", "From WebSockets."),
    ("horizon_bytes_received_total", "server.bytes_received", "Read from sockets."),
    ("horizon_bytes_sent_total", "server.bytes_sent", "Written to sockets."),
    ("horizon_writes_total", "server.writes", "Calls that wrote to a socket."),
    ("horizon_http_requests_total", "server.requests", "Requests, upgrades included."),
    ("horizon_accepts_total", "server.accepted", "Connections accepted."),
    ("horizon_ticks_total", "tick_count", "Ticks run."),
    ("horizon_tick_overruns_total", "overruns", "Ticks that outlasted their period."),
    ("horizon_ticks_dropped_total", "_ticks_dropped", "Ticks forgiven after a stall."),
    ("horizon_outbox_dropped_total by class", "drops", "Messages dropped, by class."),
    ("horizon_outbox_coalesced_total", "_replaced", "States replaced unsent."),
    ("horizon_moves_total", "movement.moves", "Positions accepted."),
    ("horizon_replication_objects", "world.__len__", "Objects in the world."),
    ("horizon_replication_observers", "world.observers", "Who sees some of it."),
    ("horizon_replication_put_off_total by reason", "world.put_off", "Updates not told at once."),
    ("horizon_replication_faults_total", "world.complaints", "Properties that can't be told."),
    ("horizon_stream_mappings", "_streams.total mappings", "Mappings loaded."),
    ("horizon_stream_matches", "_streams.total matches", "Matches of wildcards that have a state."),
    ("horizon_stream_messages_total", "_streams.total processed", "Messages to map."),
    ("horizon_stream_errors_total by reason", "_streams.total errored",
     "Messages, and mappings of one, that failed."),
    ("horizon_stream_dropped_total by reason", "_streams.total dropped",
     "Messages that nothing came of."),
    ("horizon_stream_outputs_total by mapping", "_streams.total made", "What mappings gave."),
    ("horizon_stream_failures_total by mapping", "_streams.total failed", "What they could not."),
    ("horizon_stream_cache_hits_total", "_streams.total hits", "Topics found in a cache."),
    ("horizon_stream_cache_misses_total", "_streams.total misses", "Topics looked up or made."),
    ("horizon_stream_unsaved_total", "_streams.total unsaved", "States that no file took."),
    ("horizon_topics_errors_total", "topics.errors", "Subscribers' calls that raised."),
    ("horizon_topics_published_total", "topics.published", "Publications."),
    ("horizon_topics_delivered_total", "topics.delivered", "Publications times sinks."),
    ("horizon_topics_duplicates_total", "topics.duplicates", "Publications with a known msg_id."),
    ("horizon_topics_loops_total", "topics.loops", "Subscribers that called each other in a loop."),
    ("horizon_presence_swept_total", "presence.swept", "Connections without their heartbeats."),
    ("horizon_fragments_cached", "fragments.__len__", "Fragments in the cache."),
    ("horizon_fragment_hits_total", "fragments.hits", "Fragments that were in the cache."),
    ("horizon_fragment_misses_total", "fragments.misses", "Fragments that had to be rendered."),
    ("horizon_fragment_evictions_total", "fragments.evictions", "Fragments that had no room."),
    ("horizon_html_unchanged_total", "unchanged", "Renderings that equalled the last, not sent."),
    ("horizon_batch_dropped_total", "_worker.dropped", "Events that found no room in a batch."),
    ("horizon_handlers_running by kind", "_worker.running", "Calls of handlers beside the loop."),
    ("horizon_handlers_slow_total", "bus.slow", "Timed calls over slow_handler_ms."),
    ("plugins_loaded", "plugins.__len__", "Plugins that run in this process."),
    ("horizon_plugins_connected", "host.peers.__len__", "Plugin programs that said hello."),
    ("horizon_plugins_events_sent_total by type", "host.events", "Events sent to plugin programs."),
    ("horizon_plugins_batches_total", "host.batches", "EventBatches made for them."),
    ("horizon_plugins_compressed_total", "host.squeezed", "Batches that were compressed."),
    ("horizon_plugins_encode_misses_total", "host.renders", "Outboxes encoded for them."),
    ("horizon_plugins_encode_hits_total", "host.reused", "Outboxes that were encoded already."),
    ("horizon_plugins_answers_total by outcome", "host.answers", "Answers to what they are asked."),
    ("horizon_plugins_actions_total by kind", "host.actions", "Actions they asked for."),
    ("horizon_plugins_dropped_total by class", "host.drops", "Events dropped for slow ones."),
    ("horizon_plugins_coalesced_total", "host.replaced", "Movement replaced unsent."),
    ("horizon_plugins_refused_total by reason", "host.refused", "Their faults and our limits."),
    ("horizon_plugins_restarts_total", "host.restarts", "Programs started again."),
    ("horizon_encode_hits_total by form", "reused", "Rendered outboxes that served one more."),
    ("horizon_renders_total by form", "renders", "Outboxes rendered, whoever shares the bytes."),
    ("horizon_events_sent_total by type", "events_sent", "Events sent, by type."),
    ("horizon_refused_total by reason", "server.refused", "Peers' faults and our limits."),
    ("horizon_requests_refused_total by code", "refusals", "Requests answered with an error."))
_LAGS_S = (.0005, .001, .002, .004, .008, .016, .032, .064, .25, 1.0)  # seed 002: 1 ms, 16 ms
_MAPPED_S = (1e-6, 2e-6, 5e-6, 1e-5, 1.5e-5, 2.5e-5, 5e-5, 1e-4, 1e-3, 1e-2)     # seed 003
_TIMED = (                          # name, help, buckets
    ("event_processing_duration", "Seconds per emitted event; sampled.", BUCKETS_S),
    ("horizon_tick_seconds", "Time a tick takes.", BUCKETS_S),
    ("horizon_marshal_seconds", "Time to render one tick's messages.", BUCKETS_S),
    ("horizon_fragment_render_seconds", "Time to render one fragment of HTML.", BUCKETS_S),
    ("horizon_replication_seconds", "Time to find out who is told what of the world.", BUCKETS_S),
    ("horizon_replication_lag_seconds", "From a change to the socket, by channel.", _LAGS_S),
    ("horizon_critical_event_seconds", "From emit_gorc on a critical layer to the socket.",
     _LAGS_S),
    ("horizon_stream_message_seconds", "Time to map a message; sampled.", _MAPPED_S),
    ("horizon_stream_expression_seconds", "Time of one expression; sampled.", _MAPPED_S),
    ("horizon_plugins_marshal_seconds", "Time to encode a tick for all plugins.", BUCKETS_S),
    ("horizon_plugins_ask_seconds", "From a question to its verdict.", BUCKETS_S),
    ("horizon_plugins_batch_events", "Events per batch to plugins.",
     (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)),
    ("horizon_gc_pause_seconds", "Pauses by the garbage collector.", BUCKETS_S),
    ("horizon_batch_messages", "Messages per write.", (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)))


_CSP = ("default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


@functools.cache
def _page() -> Response:
    """Return the page with a Content-Security-Policy that names exactly its own code."""
    import base64
    import hashlib

    def source(tag: str) -> str:
        text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return Response(PAGE, headers={
        "Content-Security-Policy": _CSP.format(script=source("script"), style=source("style")),
        "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer"}, content_type="text/html; charset=utf-8")


class StreamDoor:
    """What ``app.stream`` is: the mappings of expressions, from topics to topics (seed 003)."""

    __slots__ = ("_app",)

    def __init__(self, app: Engine) -> None:
        self._app = app

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._app._streams)

    def load(self, config: Mapping[str, Any] | str | os.PathLike[str]) -> Stream:
        """Map topics to topics from now on, as a ``Stream`` of *config* does; return it.

        Of a file that is loaded again the new mapping goes on with the state of the old one.

        Raises:
            ConfigError, ExpressionError: what is wrong with it; nothing has changed then.
        """
        stream: Stream = self._app._register(self._app._streams.load, config)
        return stream

    def unload(self, stream: Stream) -> None:
        """End a mapping; its state is saved if it has a file."""
        self._app._there(self._app._streams.unload, stream)

    def reload(self) -> None:
        """Read all files of mappings anew, as SIGHUP does; of a wrong one all stays as it was."""
        self._app._there(self._app._streams.reload)

    def process(self, topic: str | None, payload: bytes | str,
                metadata: Mapping[str, Any] | None = None) -> list[Output]:
        """Return what the mappings give for a message, in process; nothing is published."""
        self._app._on_loop("stream.process", "app.stream.process, ...")
        return self._app._streams.process(topic, payload, metadata)


class Engine:
    """A real-time server: events, topics, movement, one port, one loop.

    Handlers: on, on_core, on_client, on_plugin, on_gorc, every, subscribe, get, post, websocket,
    static, html.   Who may: authenticate, allow.   What is kept: topic, fragment.
    Plugins: load, unload, ask.   Sending: publish, broadcast, send, emit, emit_core, emit_client,
    emit_plugin, emit_gorc.   Running: run, start, stop, ``with``, step, wait_s, fileno, call_soon.
    Looking: url, metrics, report, bus, topics, presence, movement, world, sessions, plugins, host.

    Settings are Config's fields as keywords, or a Config. Everything but ``call_soon``,
    registering and looking is for the loop's own thread, where handlers run.
    """

    _undo: ClassVar[list[Callable[[], object]] | None] = None   # of a plugin's view of the engine
    _moved = False                          # to another port than was wanted
    _local = True                           # listens for this machine only
    _guarded = _ruled = False               # there was an authenticator, a rule: without it nobody
    _farewell = "server is stopped"         # to plugins
    _reviewing = False                      # views or routes have changed
    _ticker: Ticker | None = None
    _thread_id: int | None = None
    _thread: threading.Thread | None = None
    _stepping = False                       # inside a pass
    _repeat_told_ns = -1 << 62              # when it was said that a repetition failed
    _begun: Any = None                      # the Future of the plugins' start
    _saving: threading.Thread | None = None     # writes states of streams

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        if config is not None and (settings or not isinstance(config, Config)):
            raise UsageError("settings are keywords, Engine(port=8080), or one Config; a file is "
                             "read by Config.load(path, port=8080)")
        self.config = config or Config.load(None, **settings)
        self._said = {*settings}
        self.metrics = Metrics()
        self.topics = Topics(on_occupied=self._tell_occupied)
        self.presence = Presence()
        self.fragments = FragmentCache(on_render=functools.partial(
            self.metrics.observe, "horizon_fragment_render_seconds"))
        self._streams = Streams(self.topics, self.metrics.observe, self._settle_states)
        self.movement, self.world = Movement(), World()
        self.sessions: dict[str, Session] = {}
        self.loop = Loop()
        self._worker = _Worker(self.loop)
        self.bus = Bus(spawn=self._worker.spawn,
                       on_time=functools.partial(self.metrics.observe, "event_processing_duration"))
        self.server = Server(self.loop, self, self._limits())
        self.plugins = Plugins(self._scoped, lambda name, data: self.bus.emit(f"core:{name}", data),
                               lambda: self._worker.flush(all=True))
        self.host = PluginHost(self.loop, self._perform, self.metrics.observe, self._future)
        self._apply_config()
        self.tick_count = self.overruns = self.coalesced = self.unchanged = 0
        self.renders: Counter[str] = Counter()          # of outboxes, by form
        self.reused: Counter[str] = Counter()           # rendered ones that went to one more
        self.alerts: dict[str, str] = {}                # what is wrong now, and how
        self._drops_told = 0                            # by batches
        self.drops = Counter(latest=0, droppable=0)     # by class
        self._dropped_topics: Counter[str] = Counter()
        self._authenticators: list[Callable[[Request], Any]] = []      # the newest is asked
        self._rules: list[tuple[list[str], dict[str, _Who]]] = []   # patterns, and who may do what
        self.events_sent: Counter[str] = Counter()      # by type
        self.refusals: Counter[str] = Counter()         # requests answered with an error, by code
        self._users: dict[str, list[Session]] = {}
        self._present = Counter(data=0, html=0)         # sessions by endpoint
        self._movers: dict[Session, None] = {}          # who gets movement
        self._views: dict[str, list[_View]] = {}        # HTML, by topic or pattern
        self._made_views: dict[str, list[_View]] = {}   # for one topic, from views of a pattern
        self._view_numbers = itertools.count()
        self._presence_owed = False                     # the next change is for new ones, too
        self._presence_told: dict[str, tuple[int, Publication]] = {}    # for new subscribers
        self._waiting: dict[Session, None] = {}         # whose outbox is not empty
        self._urgent: dict[Session, None] = {}          # whose outbox leaves with this pass
        self._repeats: list[tuple[Ticker, Callable[[], object]]] = []
        self._routes: list[_Endpoint] = []              # newest first
        self._gc = GCWatch()
        self._done = threading.Event()                  # everything is given back
        self._state = "making"                          # "new", "open", "stopping", "stopped"
        self._signals = self._stop_at_ns = self._last_words_ns = self._port = 0
        self._started_ns = time.monotonic_ns()
        self._tick_ns: deque[int] = deque(maxlen=500)
        self._lags: dict[str, deque[float]] = {}        # the newest, by channel, and "critical"
        self._critical_ns: list[int] = []               # when critical events were emitted
        self._jumps: dict[Session, int] = {}            # who went far, the zones crossed before
        self._rates: dict[str, float] = {}
        self._rate_marks = (0, 0, 0, self._started_ns)
        self._emit_tick = self.bus.emitter("core:server_tick")
        self._add_routes()
        self._add_metrics()
        self._state = "new"

    def _limits(self) -> Limits:
        said = (getattr(self.config, name) for name in Limits._fields)
        return Limits._make(_Networks(each) if isinstance(each, tuple) else each for each in said)

    def configure(self, **settings: Any) -> None:
        """Change settings before the engine runs; what is not named stays."""
        if self._state != "new":
            raise StateError("the engine runs already; configure it before")
        for key in settings:
            _must_be_setting(key)
        self._said |= settings.keys()
        if "port" in settings:
            settings.setdefault("firm_port", True)
        if "profile" in settings:               # it changes what nobody has said otherwise
            old, new = (Config.load(None, {}, profile=each) for each in (
                self.config.profile, settings["profile"]))
            settings = {name: getattr(new, name) for name in _CONFIG_TYPES
                        if getattr(self.config, name) == getattr(old, name)
                        and name not in self._said} | settings
        self.config = dataclasses.replace(self.config, **settings)
        self._apply_config()

    def _apply_config(self) -> None:
        """Tell the parts their settings; what is registered with them stays."""
        config, worker = self.config, self._worker
        self.server.limits = self._limits()
        self.bus.debug(config.log_level == "debug")
        self.bus.slow_ns = int(config.slow_handler_ms * 1e6)
        self.topics.max_batch = config.outbox_messages or sys.maxsize
        self.topics.max_bytes = config.outbox_bytes or sys.maxsize
        self.topics.dedup_ns = int(config.dedup_ttl_s * 1e9)
        self.presence.debounce_ns = int(config.presence_debounce_s * 1e9)
        self.host.limits, self.host.reply_s = self.server.limits, config.plugin_reply_ms / 1e3
        self.host.max_items = config.outbox_messages
        self.fragments.max_entries = config.cache_entries or sys.maxsize
        self.fragments.ttl_s = config.cache_ttl_s
        self.world.guard, self.world.urgent = self._on_loop, self._tell_at_once
        self.world.watched = True
        self.world.tune(config.region_min, config.region_max, config.region_split,
                        config.region_merge, config.hysteresis)
        self.world.batch = config.replication_batch
        self.world.wait_ns = int(config.replication_wait_ms * 1e6)
        self.world.max_bytes = min(config.outbox_bytes or _MAX_TOLD, _MAX_TOLD)
        self.world.compress_above_bytes = config.compress_above_bytes * config.compress
        worker.batch_size, worker.wait_ms = config.batch_size or _MAX_PENDING, config.batch_wait_ms

    # -- handlers --

    @overload
    def on(self, key: str, **options: Any) -> Callable[[_F], _F]: ...
    @overload
    def on(self, key: str, fn: Callable[[Event], Any], **options: Any) -> Handler: ...

    def on(self, key: str, fn: Callable[[Event], Any] | None = None, **options: Any) -> Any:
        """Register a handler for any bus key, wildcards included; see ``Bus.on``."""
        if fn is None:
            return self._decorator(lambda fn: self.bus.on(key, fn, **options))
        return self._register(self.bus.on, key, fn, **options)

    def _decorator(self, register: Callable[[Any], object]) -> Callable[[_F], _F]:
        """Return a decorator that registers a function, where it is safe, and returns it."""
        def decorate(fn: _F) -> _F:
            if not callable(fn):
                raise UsageError(f"this decorates a function, not {fn!r}")
            self._register(register, fn)
            return fn
        return decorate

    def on_core(self, name: str, **options: Any) -> Callable[[_F], _F]:
        """Decorate a handler of the engine's own events: player_connected, player_disconnected,
        server_tick, server_started, server_stopping, and what ``emit_core`` emits."""
        key = _key_of("core", name)
        if name not in _CORE_EVENTS and (close := difflib.get_close_matches(
                name, _CORE_EVENTS, 1, 0.85)):
            _log.warning("the engine emits core:%s; %s is another event", close[0], key)
        return self._decorator(lambda fn: self.bus.on(key, fn, **options))

    def on_client(self, namespace: str, event: str, **options: Any) -> Callable[[_F], _F]:
        """Decorate a handler of what clients send; ``event.client`` is the session."""
        key = _key_of("client", namespace, event)
        return self._decorator(lambda fn: self.bus.on(key, fn, **options))

    def on_plugin(self, plugin: str, event: str, **options: Any) -> Callable[[_F], _F]:
        """Decorate a handler of events one plugin emits to others."""
        key = _key_of("plugin", plugin, event)
        return self._decorator(lambda fn: self.bus.on(key, fn, **options))

    def on_gorc(self, kind: str | type[Replicated], channel: int | str, event: str,
                **options: Any) -> Callable[[_F], _F]:
        """Decorate a handler of what clients say to objects of a type, in a channel's zone.

        It gets an ObjectEvent: ``object``, ``channel``, ``data`` and ``client``. Only a client that
        is in the zone can say it. *kind* is a class or its type_name, *channel* may be "*".

        Raises:
            UsageError: there can't be such a channel.
        """
        channels = range(_MAX_CHANNELS) if isinstance(kind, str) else (
            each.channel for each in getattr(kind, "layers", ()))
        if channel not in ("*", *channels) or isinstance(channel, bool):
            raise UsageError(f"{getattr(kind, '__name__', kind)} has no channel {channel!r}")
        name = kind if isinstance(kind, str) else kind.type_name
        key = _key_of("gorc_client", name, f"{channel}", event)
        return self._decorator(lambda fn: self.bus.on(key, fn, **options))

    def every(self, seconds: float | None = None, *, hz: float | None = None) -> Callable[[_F], _F]:
        """Decorate a function that the loop calls at its own rate, without drift."""
        given = seconds if hz is None else hz
        if (hz is None) == (seconds is None) or not isinstance(given, int | float) or given <= 0:
            raise UsageError("write @app.every(hz=5) or @app.every(seconds=0.2)")
        rate = given if seconds is None else 1 / given
        return self._decorator(lambda fn: _added(
            self._repeats, (Ticker(rate, max_catchup=1), _plain_function(fn))))

    def subscribe(self, pattern: str, **options: Any) -> Callable[[_F], _F]:
        """Decorate a function that gets every Publication *pattern* covers, in process.

        For *options* like ``rate=2, keep="last"`` see ``Topics.subscribe``.
        """
        if pattern == Moves.topic:
            raise UsageError(f"{pattern} is for clients; here are app.movement and the event "
                             "client:movement:position")
        return self._decorator(
            lambda fn: self.topics.subscribe(pattern, _plain_function(fn), **options))

    def topic(self, name: str, history: int = 0, ttl: float | None = None,
              replay: str | None = None) -> None:
        """Say what a topic, or all of a pattern, keep: the newest *history*, for *ttl* seconds.

        Clients that come back with ``since`` get what they missed; with *replay* "last" or
        "all", new subscribers get that as well. A topic keeps ``outbox_bytes`` at most.
        """
        if name in (_PRESENCE_TOPIC, _CHANGES_TOPIC, Moves.topic):
            raise UsageError(f"{name} is the engine's own; it tells newcomers how things are")
        self._register(self.topics.topic, name, history, ttl, replay)

    def map(self, pattern: str, to: str) -> Callable[[_F], _F]:
        """Decorate a function that maps messages of *pattern* to what is published on *to*.

        It gets the payload, and by name, if it asks, topic, value, timestamp_ms, and the
        wildcards that *pattern* names: ``plant.{site}.temp``. What it returns is published, None
        is not. A place in *to*, ``alerts.{site}``, is the wildcard of that name, or a field of the
        result or of the payload, or the next wildcard without a name. For expressions there is
        ``stream.load``.

        Raises:
            UsageError: the topics are malformed, or would feed each other.
        """
        return self._decorator(lambda fn: self._streams.map(pattern, to, _plain_function(fn)))

    @property
    def stream(self) -> StreamDoor:
        """The mappings of topics to topics: load, unload, reload, process."""
        return StreamDoor(self)

    def html(self, topic: str) -> Callable[[_F], _F]:
        """Decorate a function that renders *topic* for the clients of ``/ws/html``.

        It returns an element with an id (``hl.html`` escapes what is put in), and may take the
        newest Publication. It is called once per tick at most, when something was published
        there; what it returns takes the place of the last, if it differs. What is to be
        appended is for ``broadcast(..., endpoint="html")``.
        """
        pattern = ".".join(_check_topic(topic, wildcards=True))
        if pattern == Moves.topic:
            raise UsageError(f"{pattern} has no form in HTML; use client:movement:position")
        return self._decorator(lambda fn: self._add_view(
            _View(pattern, _plain_function(fn), next(self._view_numbers))))

    def _add_view(self, view: _View) -> Callable[[], object]:
        self._views.setdefault(view.pattern, []).append(view)
        self._review()
        return functools.partial(self._remove_view, view)

    def _remove_view(self, view: _View) -> None:
        self._views[view.pattern].remove(view)
        if not self._views[view.pattern]:
            del self._views[view.pattern]
        self._review()

    def _review(self) -> None:
        """Have open connections served by the views and routes that there will be in a moment."""
        if self.sessions and not self._reviewing:
            self._reviewing = True
            self.loop.call_later(0.0, self._serve_anew)

    def _serve_anew(self) -> None:
        """Show pages the views that there are now, and hand WebSockets to the routes there are."""
        self._reviewing = False
        self.topics.flush()                     # what was published before is shown before
        for view in self._all_views():
            if view.changed:
                self._show_changes(view)
        answers = {route.answer for route in self._routes}
        for session in list(self.sessions.values()):
            mine = session.subscriptions or {}
            for topic in list(mine) if self._ruled else ():
                if topic in mine and not self._may(session.user, "subscribe", topic):
                    mine.pop(topic)()
            if session.handler is None and self._guarded and not session.known:
                session.close(1012, "who are you? come again")     # it came when nobody asked
            elif session.form == _HTML:
                self._show_anew(session, mine)
            elif session.handler is not None and session.handler not in answers:
                found = [route for route in self._routes if route.method == "WEBSOCKET"
                         and route.pattern.fullmatch(session.path)]
                route = min(found, key=lambda each: each.rank, default=None)
                if route is None or self._guarded and not (route.public or session.known):
                    session.close(1012, "this address is served otherwise now")
                else:
                    session.handler = route.answer

    def _show_anew(self, session: Session, mine: dict[str, Callable[[], object]]) -> None:
        for topic, end in list(mine.items()):
            shown = getattr(end, "args", ((), ()))[1]
            if [each.source for each in shown] == self._sources(topic):
                continue
            mine[topic] = _nothing              # perhaps it comes back later
            end()
            if session.connection.is_open:
                with contextlib.suppress(_Refused):
                    self._act("subscribe", session, topic, {})

    def fragment(self, key: str, render: Callable[[], Any], ttl: float | None = None) -> bytes:
        """Return HTML from the cache; *render* makes it if it is not there, or older than *ttl*.

        ``ttl`` is in seconds, ``cache_ttl_s`` by default; 0 is for ever. ``hl.html`` takes
        fragments as they are.
        """
        self._on_loop("fragment")
        return self.fragments.get(key, render, ttl)

    def get(self, path: str, *, public: bool = False) -> Callable[[_F], _F]:
        """Decorate the answer to GET *path*, which may hold ``{names}``, or ``{rest:path}``.

        The function gets the Request, and the names as keywords, and returns a Response, or
        the body of one: str, bytes, dict or list. With ``authenticate`` set, only those whom
        it lets in get there, unless the route is *public*.
        """
        return self._endpoint("GET", path, public)

    def post(self, path: str, *, public: bool = False) -> Callable[[_F], _F]:
        """Decorate the answer to POST *path*; see ``get``."""
        return self._endpoint("POST", path, public)

    def websocket(self, path: str, *, public: bool = False) -> Callable[[_F], _F]:
        """Decorate ``handler(client, message: str | bytes)`` for WebSockets at *path*."""
        return self._endpoint("WEBSOCKET", path, public)

    def static(self, path: str, folder: str | os.PathLike[str], *,
               cache_control: str = "no-cache", public: bool = True) -> None:
        """Serve the files of *folder* under *path*, with ETags (RFC 9110 8.8.3).

        Hidden files and what lies beyond the folder, by ``..`` or a link, are not found; for a
        folder there is its index.html. Browsers ask each time whether a file has changed,
        unless *cache_control* says else, like ``"max-age=31536000, immutable"``.
        """
        root = os.path.realpath(folder)
        if not os.path.isdir(root):
            raise UsageError(f"there is no folder {os.fspath(folder)!r}")
        path = path.rstrip("/")
        if path:
            self._endpoint("GET", path, public)(_with_slash)
        self._endpoint("GET", path + "/{path:path}", public)(
            functools.partial(_serve_file, root, cache_control))

    def _endpoint(self, method: str, path: str, public: bool) -> Callable[[_F], _F]:
        if not isinstance(path, str) or not path.startswith("/"):
            raise UsageError(f"{path!r}: write a path that starts with '/', like @app.get('/me')")
        if path in _WEBSOCKETS and self._state != "making":
            raise UsageError(f"{path} is the engine's own; take another path, like /ws/game")
        parts = re.split(r"\{(\w+)(:path)?\}", path)
        pattern = re.escape(parts[0])
        for name, rest, text in zip(parts[1::3], parts[2::3], parts[3::3]):
            pattern += f"(?P<{name}>{'.*' if rest else '[^/]+'}){re.escape(text)}"

        # what takes whole paths comes last, the longest first; of others the newest
        rank = 10_000 - len(path) if ":path}" in path else 0
        return self._decorator(lambda fn: self._add_route(_Endpoint(
            method, re.compile(pattern), _plain_function(fn), public, rank)))

    def _add_route(self, route: _Endpoint) -> Callable[[], object]:
        remove = _added(self._routes, route, 0)

        def undo() -> None:
            remove()
            self._review()

        return undo

    def authenticate(self, fn: _F) -> _F:
        """Decorate the function that says who a request comes from; of several all must agree.

        It gets the Request before anything is done for it (``request.token``, ``.cookies``,
        ``.headers``, ``.address``) and returns the user's name, or the claims of
        ``verify_token``; nothing for strangers, who are refused with 401. It may raise
        PermissionError, for 403. WebSockets, ``/sub``, ``/pub``, ``/stats.json``, ``/metrics``
        and all routes that are not public are then closed to strangers.
        """
        self._guarded = True
        self._review()
        return self._decorator(lambda fn: _added(self._authenticators, fn))(_plain_function(fn))

    def allow(self, pattern: str, *, publish: _Who = False, subscribe: _Who = False) -> None:
        """Let clients publish to, or subscribe to, the topics of *pattern*.

        Who may is True (everybody), a user's name, several names, or a function of the name.
        Once there is a rule, clients may do nothing else; a wildcard subscription needs a rule
        that contains it. What the program itself does is not asked about.
        """
        for who in (publish, subscribe):
            if not isinstance(who, bool | str | Iterable) and not callable(who):
                raise UsageError(f"{who!r}: write True, a name, several, or a function of one")
        who_may, self._ruled = {"publish": publish, "subscribe": subscribe}, True
        self._review()
        self._register(_added, self._rules, (_check_topic(pattern, wildcards=True), who_may))

    def _may(self, user: str, act: str, topic: str) -> bool:
        tokens = _check_topic(topic, wildcards=True)
        try:
            return not self._ruled or any(
                _contains(pattern, tokens) and _is_among(user, who_may[act])
                for pattern, who_may in self._rules)
        except Exception:
            self.metrics.inc("horizon_route_errors_total")
            _log.exception("a rule for %s failed; so nobody may", topic)
            return False

    def _register(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Register something where it is safe; a plugin's is noted, to be undone with it."""
        made = self._there(fn, *args, **options)
        if (undo := self._undo) is not None and made is not None and self._state != "making":
            if not (len(undo) + 1) % 256:           # of what has gone by itself nothing is kept
                undo[:] = [each for each in undo if not getattr(
                    getattr(each, "__self__", None), "_gone", False)]
            undo.append(getattr(made, "remove", made))
        return made

    def _there(self, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call *fn* where it is safe: on the loop, if that runs elsewhere."""
        if self._thread_id in (None, threading.get_ident()) or self._state == "stopped":
            return fn(*args, **options)
        return self.loop.call_soon(lambda: fn(*args, **options)).result()

    # -- plugins --

    def load(self, *targets: str | os.PathLike[str] | Plugin | type[Plugin]) -> list[Plugin]:
        """Load plugins: classes of Plugin, objects of one, files, modules, or folders.

        They register at once, and start with the engine, or now if it runs. One that fails is
        isolated: it is logged, what it registered is removed, ``report()`` says why. With the
        setting ``reload`` files are loaded anew when they have changed.

        Raises:
            UsageError: there is no such file or module, no plugin in it, or one of that name.
        """
        owner = id(self._undo)                  # the plugin, or the reading of a file
        made: list[Plugin] = self._there(self.plugins.load, *targets, owner=owner)
        if self._undo is not None:
            self._undo.append(functools.partial(self.plugins.discard, made, owner))
        return made

    def unload(self, name: str) -> None:
        """Stop a plugin, and what requires it, and remove what they registered."""
        self._there(self.plugins.unload, name)

    def _scoped(self, undo: list[Callable[[], object]]) -> Self:
        """Return this engine as a plugin sees it: what is registered through it is noted."""
        view: Self = object.__new__(type("Engine", (type(self),), {"_undo": undo}))
        view.__dict__ = self.__dict__
        return view

    def _future(self) -> Any:
        future: Any = _heeded_future()()
        future.on_loop = self._is_on_loop
        return future

    def ask(self, message: Message) -> Future[Verdict]:
        """Ask the plugin programs that subscribed to it about an event; returns a Future.

        *message* is a payload of the schema's EventEnvelope, like ``BlockBreakEvent``. The
        Verdict comes when all have answered, when one has cancelled, or after
        ``plugin_reply_ms``; ``add_done_callback`` calls back on the loop. Nothing waits for it.
        """
        self._on_loop("ask")
        if not self.host.kind(message):
            raise UsageError(f"{message!r} is no event of the plugins' schema: take a payload of "
                             "its EventEnvelope, like hl.builtin_schema().BlockBreakEvent(...)")
        future: Future[Verdict] = self.host.ask(message)
        return future

    def _open_plugins(self) -> None:
        """Load what the settings name, and expect plugin programs."""
        config, specs = self.config, []
        for target in config.plugins:
            if target.endswith(".toml"):
                specs += read_plugins(target)
            else:
                self.plugins.load(target)
        schema = load_proto(config.plugins_schema) if config.plugins_schema else builtin_schema
        self.host.open(config.plugins_listen, config.plugins_token, specs,
                       schema() if schema is builtin_schema else schema, lambda: self.server.tls)

    def _perform(self, peer: PluginPeer, kind: str, action: Any) -> str:
        """Do what a plugin program asks for, if no handler objects; return what is wrong."""
        key = f"plugin:{peer.id}:{kind}"
        event = self.bus.emit(key, action.to_dict())
        if event.cancelled:
            return event.reason or "cancelled"
        perform = {"send_chat": self._plugin_chat, "teleport": self._plugin_teleport,
                   "kick": self._plugin_kick}.get(kind)
        if perform is None:
            return "" if self.bus.handles(key) else f"nobody here does {kind}"
        return perform(peer, action)

    def _plugin_chat(self, peer: PluginPeer, action: Any) -> str:
        line = {"namespace": "chat", "event": "message",
                "data": {"from": peer.name or peer.id, "text": action.message}}
        if not action.target_uuid:
            self.broadcast(line, critical=True)
        elif not self.send(action.target_uuid, line):
            return f"there is no player {action.target_uuid[:64]!r}"
        return ""

    def _plugin_teleport(self, _peer: PluginPeer, action: Any) -> str:
        to, player = action.position, b""
        with contextlib.suppress(ValueError):
            player = bytes.fromhex(action.player_uuid.replace("-", ""))
        session = self.sessions.get(_uuid_text(player))
        if session is None and player not in self.movement.positions:
            return f"there is no player {action.player_uuid[:64]!r}"
        if to is None:
            return "a teleport has a position"
        try:
            self.movement.move(player, to.x, to.y, to.z)
        except UsageError:
            return "coordinates are finite numbers below 3e38"
        if session is not None:
            self.send(session, {"namespace": "movement", "event": "teleport", "data": {
                "x": to.x, "y": to.y, "z": to.z}})
        return ""

    def _plugin_kick(self, _peer: PluginPeer, action: Any) -> str:
        if (session := self.sessions.get(action.player_uuid)) is None:
            return f"there is no player {action.player_uuid[:64]!r}"
        session.close(1008, action.reason or "kicked")
        return ""

    # -- sending --

    def emit(self, key: str, data: Any = None) -> Event:
        """Emit on the bus, in process only; returns the event, perhaps cancelled by a handler."""
        self._on_loop("emit")
        return self.bus.emit(key, data)

    def emit_core(self, name: str, data: Any = None) -> Event:
        """Emit ``core:<name>``; plugin programs hear of *data* that is an event of their schema."""
        event = self.emit(f"core:{name}", data)
        if isinstance(data, Message) and not event.cancelled and (kind := self.host.kind(data)):
            self.host.tell(kind, data)
        return event

    def emit_client(self, namespace: str, event: str, data: Any = None) -> Event:
        """Emit ``client:<namespace>:<event>`` as if a client had; sends nothing."""
        return self.emit(f"client:{namespace}:{event}", data)

    def emit_plugin(self, plugin: str, event: str, data: Any = None) -> Event:
        """Emit ``plugin:<plugin>:<event>``."""
        return self.emit(f"plugin:{plugin}:{event}", data)

    def emit_gorc(self, obj: str | Replicated, channel: int, name: str,
                  data: Any = None) -> ObjectEvent:
        """Tell an event of an object to everybody in the zone of one of its channels.

        First ``gorc_instance:<Type>:<channel>:<name>`` is fired here; a handler that cancels it
        keeps it from being told. The returned event's ``told`` says to how many it goes.

        Raises:
            UsageError: as ``World.emit``.
        """
        self._on_loop("emit_gorc")
        began_ns, update = self.loop.clock(), self.world.prepare(obj, channel, name, data)
        event = self._fire_instance(update.share.replica.obj, channel, name, data, None)
        if not event.cancelled:
            event.told = self.world.say(update)
            if update.critical and event.told:
                self._critical_ns.append(began_ns)
        return event

    def _fire_instance(self, obj: Replicated, channel: int, name: str, data: Any,
                       client: Any) -> ObjectEvent:
        key = f"gorc_instance:{obj.type_name}:{channel}:{name}"
        event = ObjectEvent(key, data, client, obj, channel)
        return event if not self.bus.handles(key) else self.bus.fire(event)

    def publish(self, topic: str, payload: Any, *, critical: bool = False,
                msg_id: str | None = None) -> int:
        """Publish JSON-able *payload*; return to how many subscribers.

        It leaves with the tick, or with this pass if *critical*: such messages are never
        dropped, a client that can't keep up with them is closed with 1013 instead. A pattern
        reaches every topic it covers that there is. With a *msg_id* that the topic has seen
        within ``dedup_ttl_s`` nothing is delivered.

        Raises:
            UsageError: a malformed topic, or a payload that can't be JSON and somebody subscribed
                over the wire.
            StateError: called from another thread; use ``app.call_soon(app.publish, ...)``.
        """
        self._on_loop("publish")
        return self.topics.publish(topic, payload, critical=critical, msg_id=msg_id)

    def broadcast(self, payload: Any, *, critical: bool = False, endpoint: str = "data") -> int:
        """Send *payload* as it is to every client on ``/ws/data``; return to how many.

        With *endpoint* "html", to those on ``/ws/html``, where it is HTML: a str or bytes.
        """
        self._on_loop("broadcast")
        if _is_html(endpoint):
            self.topics.flush()
            markup = Markup(_fragment(payload, "a broadcast"), next(self.topics.seq), "", critical)
            for session in self._at(endpoint):
                session.put(markup)
        else:
            self.topics.broadcast(payload, self._to_everybody, critical=critical)
        return self._present[endpoint]

    def _at(self, endpoint: str) -> list[Session]:
        return [each for each in self.sessions.values() if each.endpoint == endpoint]

    def _to_everybody(self, batch: Batch) -> None:
        for session in self._at("data"):
            session.put_many(batch)

    def send(self, to: str | Session, payload: Any, *, endpoint: str = "data") -> int:
        """Send *payload*, never dropped, to a session (or its id) or all sessions of a user.

        With *endpoint* "html", to the user's sessions on ``/ws/html``, where it is HTML; else
        to all others. One session gets it wherever it is. Returns: to how many it goes.
        """
        self._on_loop("send")
        one, markup = to if isinstance(to, Session) else self.sessions.get(to), _is_html(endpoint)
        sessions = [one] if one is not None else [
            each for each in self._users.get(str(to), ()) if (each.form == _HTML) == markup]
        sessions = [each for each in sessions if each.connection.is_open]
        if one is not None:                     # text is meant to be shown
            markup = one.form == _HTML and isinstance(payload, str | bytes)
        item: Any = Publication("", payload, 0, "", True, next(self.topics.seq))
        if markup:
            item = Markup(_fragment(payload, "what is sent"), item.seq, "", critical=True)
        item.measure()
        self.topics.flush()                    # what was said before arrives before
        for session in sessions:
            session.put(item)
        return len(sessions)

    def _tell_occupied(self, topic: str, occupied: bool) -> None:
        """Say that somebody listens now, or nobody any more, so that feeds run when needed."""
        self.bus.emit(f"core:topic.{'occupied' if occupied else 'vacated'}", {"topic": topic})

    # -- running --

    def call_soon(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run ``fn(*args)`` on the loop; the one door for other threads.

        Returns: its Future, for ``result(timeout)`` there, or ``await`` in coroutines.
        """
        if self._state == "stopped":
            raise StateError("the engine is stopped")
        future: Any = self.loop.call_soon(fn, *args)
        future.on_loop = self._is_on_loop
        return future       # type: ignore[no-any-return]

    def _is_on_loop(self) -> bool:
        return self._thread_id == threading.get_ident()

    def _on_loop(self, what: str, call: str = "") -> None:
        if self._thread_id != threading.get_ident() and self._thread_id is not None:
            call = call or f"{what if '.' in what else 'app.' + what}, ..."
            raise StateError(f"{what} belongs to the engine's thread; from others say "
                             f"app.call_soon({call})")

    @property
    def url(self) -> str:
        """Where the engine listens, with the real port; opens it if need be."""
        self._open()
        if not self._port:
            return f"unix:{self.config.unix_socket}"
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return (f"http{'s' if self.config.tls_cert else ''}://"
                f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host)}:{self._port}")

    def _open(self) -> None:
        """Listen and start the clocks, once."""
        if self._state != "new":
            return
        self.reload_tls()
        try:
            self._listen()
            self._open_plugins()
            for path in self.config.streams:
                self._streams.load(path)
            addresses = self.server.addresses
            self._port = next((port for _, port in addresses if port), 0)
            self._local = all(is_loopback(address) for address, _ in addresses)
            if not (self._local or self._guarded or self.config.insecure):
                raise ConfigError(
                    f"host = {self.config.host!r} lets strangers in, and nothing asks who they "
                    "are: decorate a function with @app.authenticate, bind to 127.0.0.1, or say "
                    "insecure = true (--insecure)")
        except BaseException:                   # it may be tried again
            self.server.stop_accepting()
            self.server.draining = False
            self.host.stop()
            raise
        self._state = "open"
        if self.config.tick_hz:
            self._ticker = Ticker(self.config.tick_hz, max_catchup=self.config.max_catchup_ticks)
        self._gc.start()
        self.loop.call_later(1.0, self._each_second)
        if self.config.reload:
            self._look_at_files()
        self._begun = self.loop.call_soon(self.plugins.start)
        self.loop.call_soon(lambda: self.emit_core(
            "server_started", {"url": self.url, "timestamp": time.time()}))

    def _listen(self) -> None:
        """Listen on what systemd hands over, or a Unix socket, or a port, or two of them."""
        config = self.config
        where = "LISTEN_FDS"
        try:
            inherited = self.server.listen_inherited()
            if where := config.unix_socket:
                self.server.listen_unix(where)
            if inherited or where and not config.firm_port:
                return
            tries = 1 if config.firm_port or not config.port else _PORTS_TO_TRY
            ports = range(config.port, min(config.port + tries, 65536))
            for port in ports:
                where = f"{config.host} port {port}"
                try:
                    self.server.listen(config.host, port, config.reuse_port)
                    self._moved = port != config.port
                    return
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or port == ports[-1]:
                        raise
        except OSError as error:
            raise OSError(error.errno or errno.EINVAL,
                          f"{error.strerror or error}: {where}") from None

    def reload_tls(self) -> None:
        """Read certificate and key anew, for connections to come; open ones go on.

        Raises:
            ConfigError: they can't be used; the old ones stay.
        """
        if not self.config.tls_cert:
            return
        try:
            self.server.tls = _tls_context(self.config.tls_cert, self.config.tls_key)
            if self.host.server is not None and self.host.server.tls is not None:
                self.host.server.tls = self.server.tls
        except OSError as error:            # ssl.SSLError, too
            raise ConfigError(f"tls_cert = {self.config.tls_cert!r}, tls_key = "
                              f"{self.config.tls_key!r}: {error.strerror or error}") from None

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, which end it gracefully; a second one at once.

        Raises:
            OSError: the address can't be used (errno EADDRINUSE: taken).
        """
        self._set_up_logging()
        self._must_be_unstarted()
        self._run_until_signal(lambda: _log.info("listening on %s%s - Ctrl-C stops", self.url,
                                                 self._moved_text()))

    def _moved_text(self) -> str:
        """Say so when the port that was wanted is taken, and another is used."""
        return f" (port {self.config.port} is taken)" if self._moved else ""

    def _must_be_unstarted(self) -> None:
        if self._thread is not None or self._state not in ("new", "open") or (
                self._thread_id is not None):
            raise StateError("this engine was started already; make a new one")

    def _set_up_logging(self) -> None:
        """Show our log on stderr, unless the program set up logging by itself."""
        if not _log.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
            _log.addHandler(handler)
        if _log.level == logging.NOTSET:
            _log.setLevel(self.config.log_level.upper())

    def _run_until_signal(self, ready: Callable[[], object]) -> None:
        """Serve; *ready* is called when the port is open and a signal would end it gracefully."""
        signals: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._signalled)
        if hasattr(signal, "SIGHUP"):
            signals[signal.SIGHUP] = self._hung_up
        main = threading.current_thread() is threading.main_thread()
        before = {each: signal.signal(each, do) for each, do in signals.items()} if main else {}
        try:
            self._pin()
            _raise_file_limit(self.config.max_connections)
            self._open()
            ready()
            _tell_systemd("READY=1")
            self._gc.stop()         # this pause is at nobody's cost
            gc.collect()
            gc.freeze()             # what lives now lives on: the collector need not look again
            self._gc.start()
            self._run_loop()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _signalled(self, number: int, _frame: Any) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)          # asked twice: now
        self.loop.call_soon(self._begin_stop, self.config.grace_s)     # not in mid-handler

    def _hung_up(self, number: int, frame: Any) -> None:
        """Read files anew; without any, the terminal is gone, and so are we."""
        if self.config.tls_cert or any(each.path for each in self._streams):
            self.loop.call_soon(self._reload)
        else:
            self._signalled(number, frame)

    def _reload(self) -> None:
        self._streams.reload()
        if self.config.tls_cert:
            try:
                self.reload_tls()
                _log.info("certificate and key are read anew")
            except ConfigError as error:
                _log.error("the old certificate stays: %s", error)

    def _pin(self) -> None:
        """Keep this thread on the processors that were asked for."""
        if cpus := _cpu_numbers(self.config.cpus):
            try:
                os.sched_setaffinity(0, cpus)
            except (AttributeError, OSError) as error:
                raise ConfigError(f"cpus = {sorted(cpus)}: this system can't run us there "
                                  f"({error})") from None

    def _run_loop(self) -> None:
        self._thread_id = threading.get_ident()
        try:
            while self._state != "stopped":
                try:
                    self.step(3600.0)
                except Exception:           # ours, for handlers' are caught: never end for it
                    _log.exception("a pass of the loop failed")
                except SystemExit:          # a handler said so
                    self._begin_stop(self.config.grace_s)
        finally:
            if self._state != "stopped":       # something worse than an end
                self._closed()

    def start(self) -> Self:
        """Serve from a thread of its own and return when it listens (notebooks, tests)."""
        self._must_be_unstarted()
        self._open()
        if moved := self._moved_text():
            _log.warning("listening on %s%s", self.url, moved)
        self._thread = threading.Thread(target=self._run_loop, name="horizon_lite", daemon=True)
        self._thread.start()
        self._thread_id = self._thread.ident
        with contextlib.suppress(Exception):        # it may be stopped already
            self._begun.exception()                 # plugins have started
        return self

    def stop(self, grace_s: float | None = None, *, restart: bool = False) -> None:
        """End gracefully: no new connections, what waits is sent, clients get 1001.

        They have ``grace_s`` to read it; with *restart* they get 1012, to come again. It
        returns when all is closed; from a handler at once.
        """
        grace_s = self.config.grace_s if grace_s is None else grace_s
        if not 0 <= grace_s < 1e9:
            raise UsageError(f"grace_s = {grace_s!r} must be a time in seconds")
        if self._thread_id in (None, threading.get_ident()):
            self._begin_stop(grace_s, restart)
            while self._state != "stopped" and not self._stepping:      # nobody else drives it
                self.step(0.1)
            return
        with contextlib.suppress(StateError):       # stopped meanwhile
            self.call_soon(self._begin_stop, grace_s, restart)
        self._done.wait(grace_s + 5)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _begin_stop(self, grace_s: float, restart: bool = False) -> None:
        if self._state in ("stopping", "stopped"):
            return
        self._state = "stopping"
        self._stop_at_ns = self.loop.clock() + int(grace_s * 1e9)
        self._last_words_ns = int(min(_LAST_WORDS_S, grace_s / 4) * 1e9)
        _tell_systemd("STOPPING=1")
        with contextlib.suppress(SystemExit):       # it is what we are about
            self.bus.emit("core:server_stopping", {"timestamp": time.time()})
        self.server.stop_accepting()
        code, what = (1012, "restarting") if restart else (1001, "shutting down")
        for session in list(self.sessions.values()):
            with contextlib.suppress(SystemExit):
                session.close(code, f"server is {what}", grace_s)
        self._farewell = f"server is {what}"    # to plugins, when players are gone

    def _closed(self) -> None:
        """Give everything back; only loop.wake and the mapping of metrics stay usable."""
        for connection in list(self.server.connections.values()):
            with contextlib.suppress(SystemExit):
                connection.abort("stopped")
        self.host.settle()
        self.host.begin_stop(self._farewell)
        self.loop.flush()
        self.plugins.stop()
        for stream in self._streams:
            self._streams.save(stream)
        self._state = "stopped"
        self.host.stop()
        self.server.stop_accepting()
        self._gc.stop()
        self._worker.flush(all=True)
        self._worker.stop()
        self.loop.close()
        self._thread_id = None
        self._done.set()

    def fileno(self) -> int:
        """Return a descriptor that is readable when ``step`` has work (not on Windows)."""
        self._open()
        return int(self.loop.selector.fileno())

    def wait_s(self) -> float:
        """Return how long ``step`` may be put off if ``fileno`` stays unreadable, in seconds."""
        return min(self.loop.wait_s(), self._wait_s())

    def _wait_s(self) -> float:
        """The same, the loop's own timers and calls left out."""
        if self._urgent or self.host.urgent or self._ticker is None and (
                self._waiting or self.host.waiting or self.topics.pending):
            return 0.0
        waits = [ticker.wait_s() for ticker, _ in self._repeats]
        waits += [0.05 if self._state == "stopping" else 3600.0, self._worker.wait_s(),
                  self.topics.wait_s() if self._ticker is None else self._ticker.wait_s()]
        if self._ticker is None and not self.world.quiet:
            waits.append(self.world.wait_s())
        return min(waits)

    def step(self, timeout_s: float = 0.0) -> None:
        """Run one pass of the loop, from whatever loop you have; wait at most *timeout_s*."""
        if self._state == "stopped" or self._stepping:
            raise StateError("step() within a step" if self._stepping else "the engine is stopped")
        self._thread_id = self._thread_id or threading.get_ident()
        self._on_loop("step")
        self._open()
        self._stepping = True
        try:
            self._pass(timeout_s)
        finally:
            self._stepping = False
        if self._state != "stopping":
            return
        if self.host.peers and self.loop.clock() > self._stop_at_ns - self._last_words_ns:
            for connection in list(self.server.connections.values()):
                connection.abort("stopped")     # the rest of the time is the plugins'
            self.host.settle()
        if not (self.sessions or self.host.reply_s):    # nobody is there to wait for
            self.host.settle()
        if not (self.sessions or self.host.asking):     # they have heard of everybody's leaving
            self.host.begin_stop(self._farewell)
        if self.loop.clock() > self._stop_at_ns or self._idle:
            self._closed()

    @property
    def _idle(self) -> bool:
        """Whether nothing is under way any more."""
        return self._worker.idle and self.host.idle and all(
            each.is_idle for each in self.server.connections.values())

    def _pass(self, timeout_s: float) -> None:
        self.loop.run_once(min(timeout_s, self._wait_s()))
        for ticker, fn in list(self._repeats):
            if ticker.take_due():
                try:
                    fn()
                except Exception:
                    self.metrics.inc("horizon_repeat_errors_total")
                    if self.loop.now_ns - self._repeat_told_ns >= 1_000_000_000:
                        self._repeat_told_ns = self.loop.now_ns
                        _log.exception("%s failed", getattr(fn, "__qualname__", fn))
        self._worker.flush(all=self._state == "stopping")
        if self._ticker is None:
            self._tick_once()
        elif due := self._ticker.take_due():
            self._tick(due, self._ticker.period_ns)
        self._flush_urgent()
        self.host.flush_urgent()
        self.loop.flush()
        self.bus.watch(self.loop.clock() - self.loop.now_ns)

    # -- ticks --

    def _tick(self, due: int, budget_ns: int) -> None:
        """Run the ticks that are due; all they made leaves in one write per client."""
        began = self.loop.clock()
        self._flush_urgent()                    # a tick takes longer than critical events may wait
        for _ in range(due):
            self.tick_count += 1
            self._emit_tick({"tick_count": self.tick_count, "timestamp": time.time()})
        self._flush_urgent()
        self._tick_once()
        spent = self.loop.clock() - began
        self.world.load += 0.1 * (spent / budget_ns - self.world.load)
        self._tick_ns.append(spent)
        self.metrics.observe("horizon_tick_seconds", spent / 1e9)
        self.overruns += spent > budget_ns

    def _tick_once(self) -> None:
        if (moves := self.movement.take()) is not None:
            self._follow_players(moves.moved)
            for session in list(self._movers):
                session.put(moves)
            if self.host.wants(moves.kind) and (news := self.movement.for_plugins(moves)):
                self.host.move(news)
        self.host.tick()
        self._tell_presence()
        self.topics.flush()
        for view in self._all_views():
            if view.changed:
                self._show_changes(view)
        if not self.world.quiet:
            self._replicate(self.loop.clock())
        waiting, self._waiting = self._waiting, {}
        self._flush(waiting)
        self._note_lags()

    def _flush_urgent(self) -> None:
        """Let out what does not wait for the tick."""
        if self._urgent:
            urgent, self._urgent = self._urgent, {}
            self._flush(urgent)
        if self._critical_ns:
            now_ns = self.loop.clock()
            for each in self._critical_ns:
                self._note_lag("horizon_critical_event_seconds", now_ns - each, 1, "critical")
            self._critical_ns.clear()

    # -- the world --

    def _replicate(self, now_ns: int) -> None:
        """Put what is told of the world into the outboxes of those who can take it."""
        for observer, updates in self.world.gather(now_ns, self._is_ready):
            if (session := self.sessions.get(observer.key)) is None:
                continue                        # an observer of the application's own
            items: Any = updates
            if session.zones and session.form == _PROTO:
                items = self.world.pack(updates, session.zones == "f64")
            session.box().add(tuple(items), sum([each.size for each in items]))
            self._waiting[session] = None       # to be sent at once: bounded by what is told
        self.metrics.observe("horizon_replication_seconds", (self.loop.clock() - now_ns) / 1e9)
        self._charge_jumps()
        crossed, self.world.crossed = self.world.crossed, []
        heard: dict[tuple[str, int, str], bool] = {}
        for name, replica, channel, who in crossed:
            kind = replica.obj.type_name
            if (hears := heard.get((kind, channel, name))) is None:
                hears = self.bus.handles(f"gorc_instance:{kind}:{channel}:{name}")
                heard[kind, channel, name] = hears
            if hears:
                self._fire_instance(replica.obj, channel, name, {
                    "object_id": replica.id, "observer": who}, self.sessions.get(who))

    def _is_ready(self, observer: Any) -> bool:
        """Whether an observer has read what it was sent."""
        session = self.sessions.get(observer)
        return session is None or (session.connection.is_open and not session.connection.unsent
                                   and session.goodbye is None)

    def _tell_at_once(self, observer: Any, update: Update) -> None:
        if (session := self.sessions.get(observer)) is not None:
            session.put(update)

    def _note_lags(self) -> None:
        now_ns, lags = self.loop.clock(), self.world.lags
        for key, times in lags.items():
            if key is not None:
                self._note_lag("horizon_replication_lag_seconds", now_ns - key[1], times, key[0])
        lags.clear()

    def _note_lag(self, name: str, lag_ns: int, times: int, channel: int | str) -> None:
        labels = {"channel": channel} if isinstance(channel, int) else {}
        self.metrics.observe_many(name, lag_ns / 1e9, times, **labels)
        self._lags.setdefault(f"{channel}", deque(maxlen=1_000)).append(lag_ns / 1e6)

    def _lag_p99_ms(self) -> dict[str, float]:
        """Return how long the slowest of a hundred took, among the newest."""
        return {name: round(sorted(lags)[len(lags) * 99 // 100], 3)
                for name, lags in sorted(self._lags.items())}

    def _follow_players(self, moved: Mapping[bytes, _Position]) -> None:
        """Let clients see the world from where their players are."""
        for player, at in moved.items():
            session = self.sessions.get(self.movement.texts[player].decode())
            if session is None or session.zones is None:
                continue
            if self.world.observes(session.id) and (
                    math.dist(self.world.place_of(session.id), at) > _FAR_JUMP):
                self._jumps[session] = self.world.stats(session.id)["transitions"]
            self.world.observe(session.id, *at)

    def _charge_jumps(self) -> None:
        """Count a jump through many zones as several messages: it costs the others' time."""
        jumps, self._jumps = self._jumps, {}
        for session, before in jumps.items():
            if self.world.observes(session.id):
                crossed = self.world.stats(session.id)["transitions"] - before
                try:
                    session.connection.charge(crossed // _CROSSED_A_MESSAGE)
                except PeerError as error:
                    self.server.refused[error.label] += 1
                    session.close(error.close_code, "too many jumps through too many zones")

    # -- outboxes --

    def _tell_presence(self) -> None:
        update = self.presence.take_changes()
        if update is None and self._presence_owed and not self.presence.pending:
            update = self.presence.snapshot()       # what was awaited has come to nothing
        if update is None:
            return
        all_states = self.presence.snapshot().get("states") if self._presence_owed else None
        if all_states:                              # for who has none of them yet
            update["states"] = {**all_states, **update.get("states", {})}
        self._presence_owed = False
        self.topics.publish(_PRESENCE_TOPIC, update)
        self.topics.publish(_CHANGES_TOPIC, {
            name: each for name, each in update.items() if name != "users"})

    def _presence_now(self, topic: str) -> Publication | None:
        """Return what a new subscriber of presence gets, shared as long as nothing changes."""
        if topic == _PRESENCE_TOPIC and self.presence.pending:
            self._presence_owed = True              # the change that is to come says it all
            return None
        version, publication = self._presence_told.get(topic, (-1, None))
        if publication is None or version != self.presence.version:
            publication = Publication(topic, self.presence.snapshot(), 0, "", False,
                                      next(self.topics.seq), bare=True)
            publication.measure()
            self._presence_told[topic] = self.presence.version, publication
        return publication

    def _show_changes(self, view: _View) -> None:
        """Render what has changed, and send it to who looks if it looks different."""
        changed, view.changed = view.changed, {}
        for topic, message in changed.items():
            old = view.shown.get(topic)
            if self._render_view(view, topic, message) and view.shown[topic] is not old:
                for session in list(view.audience):
                    session.put(view.shown[topic])
        if not view.audience:                   # the function sent the last one away
            view.shown = {}

    def _render_view(self, view: _View, topic: str, message: Publication | None) -> bool:
        """Render one fragment; return whether that worked. What looks the same stays the same."""
        what = f"@app.html({view.pattern!r}) {getattr(view.fn, '__qualname__', view.fn)}"
        try:
            render = functools.partial(view.fn, message) if view.takes_message else view.fn
            data = self.fragments.render(render, what)
        except Exception:
            self.metrics.inc("horizon_html_errors_total")
            _log.exception("%s failed", what)
            return False
        if topic in view.shown and view.shown[topic].data == data:
            self.unchanged += 1
            return True
        if view.shown.pop(topic, None) is None and len(view.shown) >= _MAX_VIEWS:
            del view.shown[next(iter(view.shown))]
        view.shown[topic] = Markup(data, next(self.topics.seq), f"{view.number} {topic}")
        return True

    def _look(self, view: _View, session: Session) -> None:
        """Show a view to one more session; what is not rendered yet, with the next tick."""
        if view.subscription is None:
            view.subscription = self.topics.subscribe(view.pattern, view.note, batched=True)
        view.audience[session] = None
        for markup in view.shown.values():
            session.put(markup)
        for name in self.topics.live(view.pattern) if view.takes_message else [""]:
            if name not in view.shown and len(view.shown) + len(view.changed) < _MAX_VIEWS:
                kept = self.topics.history(name)
                if kept or not name:
                    view.changed.setdefault(name, kept[-1] if kept else None)

    def _sources(self, topic: str) -> list[_View]:
        """Return the views of *topic*, or those of patterns that cover it."""
        tokens = topic.split(".")
        return list(self._views.get(topic, ())) or [
            view for pattern, views in self._views.items() for view in views
            if view.takes_message and _contains(pattern.split("."), tokens)]

    def _views_of(self, topic: str) -> list[_View]:
        """Return what renders *topic*: views of it, or made for it from those of a pattern."""
        sources = self._sources(topic)
        if not sources:
            raise _Refused("no_fragment", f"nothing renders {topic[:80]!r}"
                           + f", only {', '.join(self._views)[:200]}" * bool(self._views))
        if topic in self._views:
            return sources
        made = self._made_views.get(topic, [])
        if [each.source for each in made] != sources:
            made = self._made_views[topic] = [_View(topic, view.fn, next(self._view_numbers), view)
                                              for view in sources]
        return made

    def _all_views(self) -> list[_View]:
        return [view for views in (*self._views.values(), *self._made_views.values())
                for view in views]

    def _look_away(self, topic: str, views: list[_View], session: Session) -> None:
        for view in views:
            view.leave(session)
        if self._made_views.get(topic) is views and not views[0].audience:
            del self._made_views[topic]

    def _flush(self, sessions: Iterable[Session]) -> None:
        """Render and write the outboxes of *sessions*; equal contents are rendered once."""
        # HOT: once per client per tick (bench 14.fanout)
        rendered: dict[tuple[Any, ...], list[Any]] = {}
        known: dict[tuple[Any, ...], list[Any]] = {}        # the same by the tuple's identity
        kept = []                                           # so that no identity is given twice
        for session in sessions:
            outbox, connection = session.outbox, session.connection
            if outbox is None or not outbox.items or connection.unsent:
                continue                # gone, sent already, or to be sent by on_drain
            if outbox.mixed or outbox.urgent:
                items = outbox.take()
            else:                               # the common case, in line
                items, outbox.items, outbox.size = outbox.items, (), 0
            key = (session.render, session.packed, id(items))
            if (entry := known.get(key)) is None:
                whole = (session.render, session.packed, *items)
                if (entry := rendered.get(whole)) is None:
                    entry = rendered[whole] = [
                        self._render(session, items), items, 0, session.form or "json"]
                known[key] = entry
                kept.append(items)
            entry[2] += 1
            connection.send_now(entry[0])
        for entry in rendered.values():
            self._count_sent(*entry)

    def _render(self, session: Session, items: tuple[Any, ...]) -> bytes:
        began = self.loop.clock()
        try:
            data = session.render(items, session.packed)
        except Exception:                       # ours; the others get theirs all the same
            _log.exception("what waits for %s can't be rendered", session)
            return b""
        self.renders[session.form or "json"] += 1
        self.metrics.observe("horizon_marshal_seconds", (self.loop.clock() - began) / 1e9)
        return data

    def _count_sent(self, data: bytes, items: tuple[Any, ...], times: int, form: str) -> None:
        self.reused[form] += times - 1
        self.server.writes += times
        self.server.bytes_sent += times * len(data)
        for item in items:
            self.events_sent[item.label] += times * item.count
        self.metrics.observe_many("horizon_batch_messages", len(items), times)

    # -- what the transport tells (Application) --

    def on_request(self, connection: Connection, request: Request) -> Response | None:
        """Answer an HTTP request by the routes (the transport calls this)."""
        self._check_host(connection, request)
        upgrade = "websocket" in request.tokens("upgrade")
        found = [(match, route) for route in self._routes
                 if (match := route.pattern.fullmatch(request.path))]
        for match, route in sorted(found, key=lambda each: (
                each[1].rank, (each[1].method == "WEBSOCKET") != upgrade)):
            if request.method in _SERVES[route.method]:
                request.params = match.groupdict()
                return self._enter(connection, request, route)
        allowed = [method for _, route in found for method in _SERVES[route.method]]
        if not allowed and request.path != "*":
            self.server.refused["not_found"] += 1
            return Response("not found\n", 404)
        allow = {"Allow": ", ".join(dict.fromkeys([*allowed, "OPTIONS"]))}
        if request.method == "OPTIONS":
            return Response(status=204, headers=allow)
        self.server.refused["bad_method"] += 1
        return Response("method not allowed\n", 405, allow)

    def _enter(self, connection: Connection, request: Request, route: _Endpoint) -> Response | None:
        """Let a request in to its route, or refuse it."""
        if route.method == "WEBSOCKET":
            _check_upgrade(request)
        if route.method in ("WEBSOCKET", "POST"):
            self._check_origin(request)
        self._identify(request, route.public)
        if route.method in ("WEBSOCKET", "EVENTS"):
            if self.server.draining:
                raise HandshakeError("this server is about to end", http_status=503,
                                     label="draining")
            return (self._upgrade if route.method == "WEBSOCKET" else self._stream)(
                connection, request, route)
        if request.method == "POST":
            connection.charge(1)                # it counts as a message
        if route.answer == self._serve_publish:
            route = route._replace(answer=functools.partial(self._serve_publish, connection))
        return self._answer(route, request)

    def _identify(self, request: Request, public: bool) -> None:
        """Ask the user's function who this is; strangers come only to what is public."""
        if not self._guarded:
            return
        try:
            if not self._authenticators:        # a plugin's, that is gone
                raise PermissionError("nobody is let in at the moment")
            for ask in self._authenticators:    # of several, all; the newest says who it is
                found = ask(request)
                user = found.get("sub") if isinstance(found, Mapping) else found
                if user in (None, False, ""):
                    break
                if fault := _user_fault(user):
                    raise UsageError(f"authenticate returned {fault}")
            request.user = user or ""
            request.claims = dict(found) if isinstance(found, Mapping) else {}
        except (PeerError, PermissionError) as error:
            if public:                      # as for a stranger
                return
            if isinstance(error, PeerError):
                raise
            raise HandshakeError(str(error) or "forbidden", http_status=403,
                                 label="forbidden") from None
        except Exception:
            self.metrics.inc("horizon_route_errors_total")
            _log.exception("authenticate failed for %s", request)
            if not public:
                raise HandshakeError("internal server error", http_status=500,
                                     label="bug") from None
        if not request.user and not public:
            raise HandshakeError("who are you?", http_status=401, label="unauthenticated")

    def _answer(self, route: _Endpoint, request: Request) -> Response:
        try:
            result = route.answer(request, **request.params)
            response = result if isinstance(result, Response) else Response(result)
            response.check()                # its headers may have been changed
            if response.status < 200:
                raise UsageError(f"status {response.status} is no answer; use 200 to 599")
            return response
        except PeerError:               # say, of a body that was decoded: the peer's fault
            raise
        except _Refused as refusal:
            self.refusals[refusal.code] += 1
            return Response(f"{refusal}\n", 403 if refusal.code == "forbidden" else 400)
        except Exception:
            self.metrics.inc("horizon_route_errors_total")
            _log.exception("%s %s failed", request.method, request.path)
            return Response("internal server error\n", 500)

    def _check_host(self, connection: Connection, request: Request) -> None:
        """On loopback only loopback's names are ours: else any page could rebind its own."""
        if not self._local or connection.peer == "unix":
            return
        host = re.sub(r":\d*$", "", request.headers.get("host", "localhost").lower())
        names = {origin.partition("://")[2].partition(":")[0]
                 for origin in self.config.allowed_origins}
        if host not in {"localhost", "127.0.0.1", "[::1]", self.config.host, *names}:
            raise HandshakeError(f"this server is not {host[:60]!r}; allowed_origins may name it",
                                 http_status=421, label="bad_host")

    def _check_origin(self, request: Request) -> None:
        """Refuse browsers that come from another site; absent passes, "null" fails."""
        origin = request.headers.get("origin")
        if origin is None:
            if request.headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
                return
        elif {"*", origin} & {*self.config.allowed_origins} or (
                origin.partition("://")[2].lower() == request.headers.get("host", "-").lower()):
            return
        raise HandshakeError("this origin may not connect", http_status=403, label="bad_origin")

    def _upgrade(self, connection: Connection, request: Request, route: _Endpoint) -> None:
        ours = {self._on_data: "data", self._on_html: _HTML}.get(route.answer, "")
        subprotocol = _choose_subprotocol(
            request, ("horizon.json.v1", _PROTO)) if ours == "data" else ""
        deflate, extensions = _agree_deflate(
            request, self.config.compress_above_bytes) if self.config.compress else (None, "")
        session = Session(self, connection, request.user, _HTML if ours == _HTML else subprotocol,
                          deflate, None if ours else route.answer)
        session.path, session.known = "" if ours else request.path, bool(request.user)
        self.topics.flush()            # what was broadcast before is not for it
        connection.upgrade(request, session, subprotocol, deflate, extensions)
        self._enroll(session)
        event = self.bus.emit("core:player_connected", self._about(session), session)
        if event.cancelled:
            self.refusals["player_connected"] += 1
            self.presence.leave(session.id, at_once=True)
            connection.close(1013, event.reason)
            return
        self.host.tell("PLAYER_JOIN", player_uuid=session.id, name=session.user)
        if ours == _HTML and connection.is_open and session.goodbye is None:
            asked = request.args.get("topics", "")
            for topic in filter(None, map(str.strip, asked.split(","))):
                self._answer_request(session, None, self._do, {
                    "action": "subscribe", "topic": topic})
            for topic in [] if asked else list(self._views):
                with contextlib.suppress(_Refused):         # a page shows what it may
                    self._act("subscribe", session, topic, {})

    def _stream(self, connection: Connection, request: Request, route: _Endpoint) -> None:
        """Answer GET /sub/<pattern> with Server-Sent Events."""
        session = Session(self, connection, request.user, _EVENTS)
        session.known = bool(request.user)
        try:
            pattern = _asked_topic(request.params["pattern"])
            self._check_subscription(session, pattern)
        except _Refused as refusal:
            self.refusals[refusal.code] += 1
            raise HandshakeError(str(refusal), http_status=403 if refusal.code == "forbidden"
                                 else 400, label=refusal.code) from None
        connection.stream(Response(iter(()), 200, {
            "Cache-Control": "no-cache", "X-Accel-Buffering": "no",
            "Content-Type": "text/event-stream; charset=utf-8"}), session)
        self._enroll(session)
        options, seen = {}, request.headers.get("last-event-id")
        if seen is not None:
            mark = re.fullmatch(r"([0-9a-f]{1,40}):(\d{1,18})", seen) or ("", "unknown", 0)
            options["since"] = {"epoch": mark[1], "seq": int(mark[2])}
        self._act("subscribe", session, pattern, options)

    def _enroll(self, session: Session) -> None:
        self.sessions[session.id] = session
        self._present[session.endpoint] += 1
        self._know_user(session)

    def _about(self, session: Session) -> dict[str, Any]:
        return {"player_id": session.id, "connection_id": session.id,
                "remote_addr": session.address, "timestamp": time.time()}

    def _count_drop(self, item: Sendable) -> None:
        self.drops["latest" if item.key is not None else "droppable"] += 1
        topic = getattr(item, "topic", "")
        if topic in self._dropped_topics or len(self._dropped_topics) < _MAX_DROPPED_TOPICS:
            self._dropped_topics[topic] += 1

    def _tell_slow(self, session: Session, dropped: int) -> None:
        _log.warning("%s reads too slowly: %d messages dropped, %d bytes wait", session, dropped,
                     session.backlog)
        self.bus.emit("core:slow_client", {**self._about(session), "backlog": session.backlog,
                                           "dropped": dropped}, session)

    def on_message(self, connection: Connection, message: str | bytes) -> None:
        """Take one message of a client (the transport calls this)."""
        session: Session = connection.owner
        if session.goodbye is not None:
            return
        if session.beats and not self.presence.heartbeat(session.id):
            # it was silent for too long, and is back
            self.presence.join(session.user, session.id, **session.beats)
        if session.handler is None:
            return self._on_data(session, message)
        try:
            session.handler(session, message)
        except Exception:
            self.metrics.inc("horizon_route_errors_total")
            _log.exception("handler of %s failed", session)

    def on_close(self, connection: Connection, code: int, reason: str) -> None:
        """Drop every trace of a session (the transport calls this)."""
        session: Session = connection.owner
        while session.subscriptions:
            session.subscriptions.popitem()[1]()
        outbox, session.outbox = session.outbox, None
        self.coalesced += outbox.coalesced if outbox else 0
        self._waiting.pop(session, None)
        self.movement.remove(session.player)
        self.world.unobserve(session.id)
        del self.sessions[session.id]
        self._present[session.endpoint] -= 1
        self._forget_user(session)
        self.presence.leave(session.id)
        if code == SlowPeer.close_code and reason == "too slow":
            self._tell_slow(session, outbox.dropped if outbox else 0)
        if session.form != _EVENTS:
            session.left = functools.partial(self._tell_left, session, code, reason)
            if session.asking and not self.host.reply_s:        # there is no other limit
                self.host.settle(*(each[0] for each in session.asking))
            self._go_on(session)                # or when what it said last has happened

    def _tell_left(self, session: Session, code: int, reason: str) -> None:
        self.bus.emit("core:player_disconnected", {
            **self._about(session), "reason": reason, "code": code}, session)
        self.host.tell("PLAYER_QUIT", player_uuid=session.id, name=session.user)

    def _know_user(self, session: Session) -> None:
        self._users.setdefault(session.user, []).append(session)
        if session.endpoint:
            self.presence.join(session.user, session.id)

    def _forget_user(self, session: Session) -> None:
        self._users[session.user].remove(session)
        if not self._users[session.user]:
            del self._users[session.user]

    def on_drain(self, connection: Connection) -> None:
        """Send a client that reads again what waited for it (the transport calls this)."""
        session: Session = connection.owner
        self._flush([session])
        while session.outbox is not None and session.outbox.owed and not connection.unsent:
            self.topics.flush()                     # what was said before it goes before it
            self._flush([session])
            if connection.unsent or session.outbox is None:
                break
            if (item := self._repayment(session, session.outbox.owed.pop())) is not None:
                session.put(item)
                self._flush([session])
        if session.goodbye is not None and not connection.unsent:
            connection.close(*session.goodbye)

    def _repayment(self, session: Session, debt: Any) -> Sendable | None:
        """Return what stands for something that was dropped for a session."""
        if debt == Moves.key:
            return self.movement.snapshot()
        if isinstance(debt, tuple):
            return self.topics.gap(debt[1])
        return next((markup for view in self._all_views() if session in view.audience
                     for markup in view.shown.values() if markup.key == debt), None)

    # -- /ws/data and /ws/html: what clients say --

    def _on_html(self, session: Session, message: str | bytes) -> None:
        self._on_data(session, message)         # the same, but _upgrade tells them apart

    def _on_data(self, session: Session, message: str | bytes) -> None:
        if isinstance(message, str):
            asked = self._parse(message)
            request_id = asked.get("id") if isinstance(asked, dict) else None
            if isinstance(request_id, dict | list):
                request_id, asked = None, None      # refused below: no id to answer with
            self._answer_request(session, request_id, self._do, asked)
        else:
            try:
                events = builtin_schema().EventBatch.decode(message).events
            except WireError as error:
                error.label = "bad_protobuf"
                raise
            session.connection.charge(max(0, len(events) - 1))      # the frame was charged
            for envelope in events:
                if session.connection.is_open:              # one may have ended it
                    self._on_envelope(session, envelope)

    def _parse(self, text: str) -> Any:
        try:
            value = _load_json(text)
            if "\\u" in text:
                _json_bytes(value)          # half a surrogate pair can't be sent on
        except (ValueError, RecursionError, UsageError):
            raise PeerError("that is not JSON", close_code=1007, label="bad_json") from None
        depth, string, items = (
            self.config.max_json_depth, self.config.max_json_string, self.config.max_json_items)
        # seldom: without brackets enough it can't be too deep
        if string or items or 0 < depth < text.count("[") + text.count("{"):
            label, fault = _shape_fault(value, *(each or sys.maxsize for each in (
                depth, string, items)))
            if label:
                raise PeerError(f"JSON with {fault}", close_code=1008, label=label)
        return value

    def _answer_request(self, session: Session, request_id: Any, act: Callable[..., Any],
                        *args: Any) -> None:
        """Do what a client asked; answer if it gave an id, and always if it can't be done."""
        try:
            result = self._checked(act, session, *args)
        except _Refused as refusal:
            return self._tell_result(session, request_id, refusal)
        if hasattr(result, "add_done_callback"):        # plugins are asked first
            result.add_done_callback(
                lambda done: self._tell_result(session, request_id, done.exception()))
        else:
            self._tell_result(session, request_id, None, result)

    def _tell_result(self, session: Session, request_id: Any, refusal: _Refused | None,
                     position: Mapping[str, Any] | None = None) -> None:
        if refusal is None:
            if request_id is not None:
                self._reply(session, request_id, None, position)
            return
        self.refusals[refusal.code] += 1
        if request_id is not None or refusal.code not in (_NO_HANDLER, "failed"):
            self._reply(session, request_id, refusal)

    def _checked(self, act: Callable[..., Any], *args: Any) -> Any:
        loops = self.topics.loops
        result = act(*args)
        if self.topics.loops > loops:
            raise _Refused("publish_loop", "the server's subscribers call each other in a loop")
        return result

    def _reply(self, session: Session, request_id: Any, refusal: _Refused | None,
               position: Mapping[str, Any] | None = None) -> None:
        """Answer a request; a subscription to what is kept is told where it begins."""
        if session.form == _PROTO:
            schema = builtin_schema()
            reply = schema.Reply(
                id=str(request_id or ""), ok=refusal is None,
                code=refusal.code if refusal else "", message=str(refusal or ""),
                position=schema.Position(**position) if position else None)
            frame = _frame(_BINARY, _batch_of(type="REPLY", reply=reply))
        else:
            answer = {} if request_id is None else {"id": request_id}
            answer |= {"ok": True, **(position or {})} if refusal is None else {
                "error": {"code": refusal.code, "message": str(refusal)}}
            text = _json_bytes(answer)
            frame = _frame(_TEXT, _inert(text) if session.form == _HTML else text)
        self.events_sent["REPLY"] += 1
        # before what a subscription begins with, so that a client knows where it is
        (session.say if position is None else session.connection.send)(frame)

    def _do(self, session: Session, message: Any) -> Any:
        """Do what one message asks; of a subscription return where it begins.

        An event that plugins are asked about first returns the Future of its result.
        """
        if not isinstance(message, dict):
            raise _Refused("bad_request", "a message is a JSON object; its id, text or a number")
        if message.get("type") == _EVENT:
            return self._object_event(session, message)
        if "namespace" in message:
            data = message.get("data")
            if session.form == _HTML and "data" not in message:     # a form that htmx sent
                data = {name: value for name, value in message.items() if name not in _NOT_FIELDS}
            return self._client_event(session, message["namespace"], message.get("event"), data)
        if "action" in message:
            result = self._act(message["action"], session, message.get("topic"), message)
            return result if isinstance(result, Mapping) else None
        raise _Refused("bad_request",
                       'a message has "namespace" and "event", or "action" and "topic"')

    def _on_envelope(self, session: Session, envelope: Any) -> None:
        """Do what one protobuf envelope asks: the same as the JSON that means it."""
        kind = envelope.which("payload")
        asked = getattr(envelope, kind or "type")
        if getattr(asked, "original_size", 0):
            raise PeerError("data that is compressed", close_code=1007, label="bad_protobuf")
        if kind == "player_move":
            return self._answer_request(session, None, self._move_event, asked)
        if kind in _TEXTS:
            text = getattr(asked, _TEXTS[kind])
            message = {"namespace": kind, "event": "message", "data": {"text": text}}
        else:
            message = {name: getattr(asked, name) for name in _ENVELOPES.get(kind, ())}
            for name in message.keys() & {"data", "payload"}:       # JSON, or nothing
                message[name] = self._parse(_text(message[name])) if message[name] else None
            message |= {name: message.get(name) or None for name in ("rate", "msg_id")}
            message["type"] = kind
            if (since := message.get("since")) is not None:
                by = "seq" if since.seq else "offset"
                message["since"] = {"epoch": since.epoch, by: getattr(since, by)}
        self._answer_request(session, getattr(asked, "id", None) or None, self._do, message)

    def _move_event(self, session: Session, move: Any) -> None:
        if not self.bus.emit("client:movement:position", move, session).cancelled:
            self._move(session, move.x, move.y, move.z)

    def _move(self, session: Session, x: Any, y: Any, z: Any) -> None:
        if not session.connection.is_open:      # a handler ended it
            return
        try:
            self.movement.move(session.player, x, y, z)
        except UsageError:
            raise _Refused("bad_position", "coordinates are finite numbers below 3e38") from None

    def _client_event(self, session: Session, namespace: Any, event: Any, data: Any) -> Any:
        for name in (namespace, event):
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise _Refused("bad_name", f"namespace and event match {_NAME.pattern}")
        if namespace == "system":
            return self._system_event(session, event, data)
        key, kind = f"client:{namespace}:{event}", _ASKED_KINDS.get(namespace, "")
        if kind and (session.asking or self.host.wants(kind)):
            return self._ask_plugins(session, kind, key, data)
        self._fire(session, key, data)
        if namespace != "movement" and not self.bus.handles(key):
            raise _Refused(_NO_HANDLER, f"nobody handles {namespace}:{event}")
        if namespace == "movement" and event == "position":
            if not isinstance(data, dict):
                raise _Refused("bad_position", 'data is {"x", "y", "z"}')
            self._move(session, data.get("x", 0), data.get("y", 0), data.get("z", 0))
        return None

    def _object_event(self, session: Session, message: dict[str, Any]) -> None:
        """Hand what a client says to an object to its handlers, if it is in the zone.

        Who it says it is does not matter: the connection tells.
        """
        key, name = message.get("object_id"), message.get("event")
        channel: Any = message.get("channel")
        if isinstance(key, str) and (match := re.fullmatch(r"GorcObjectId\((.*)\)", key)):
            key = match[1]                      # as seed 002's clients write it
        obj = self.world.get(key.lower()) if isinstance(key, str) else None
        if obj is None:
            raise _Refused("unknown_object", f"there is no object {str(key)[:64]!r}")
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise _Refused("bad_name", f"an event matches {_NAME.pattern}")
        try:
            self.world.must_have(obj, channel)
        except UsageError as error:
            raise _Refused("unknown_channel", str(error)) from None
        if not self.world.sees(session.id, obj, channel):
            raise _Refused("not_in_zone", f"you are not in the zone of channel {channel}"
                           + "; you have not told where you are (movement:position)"
                           * (not self.world.observes(session.id)))
        event = ObjectEvent(f"gorc_client:{obj.type_name}:{channel}:{name}", message.get("data"),
                            session, obj, channel)
        if not self.bus.handles(event.key):
            raise _Refused(_NO_HANDLER, f"nobody handles {name} of a {obj.type_name}")
        self._must_have_worked(self.bus.fire(event))

    def _fire(self, session: Session, key: str, data: Any) -> None:
        self._must_have_worked(self.bus.emit(key, data, session))

    def _must_have_worked(self, emitted: Event) -> None:
        if emitted._reason is not None:
            raise _Refused("cancelled", emitted.reason)
        if emitted.failed:
            raise _Refused("failed", "a handler failed; the server's log says why")

    def _ask_plugins(self, session: Session, kind: str, key: str, data: Any) -> Any:
        """Ask plugin programs before handlers get an event; return the Future of its result.

        All are asked at once, and the events of one session happen in their order.
        """
        queue = session.asking = session.asking or deque()
        if len(queue) >= _MAX_ASKED:
            raise _Refused("busy", f"{_MAX_ASKED} of your events wait for plugins to answer")
        text = data.get("text") if isinstance(data, dict) else data
        if not isinstance(text, str):
            text = "" if kind == "CHAT" else key.rpartition(":")[2]
        payload = self.host.dialect.payload(
            kind, player_uuid=session.id, name=session.user, message=text, raw=text)
        verdict, result = self.host.ask(payload), self._future()
        queue.append((verdict, result, key, data))
        verdict.add_done_callback(lambda _: self._go_on(session))
        return result

    def _go_on(self, session: Session) -> None:
        """Let the events of a session happen that plugins have judged, in their order."""
        queue = session.asking
        if session.judging:                     # a handler has caused this; it comes next
            return
        while queue and queue[0][0].done():
            asked, result, key, data = queue.popleft()
            session.judging = True
            try:
                self._judge(session, asked.result(), key, data)
                result.set_result(None)
            except _Refused as refusal:
                result.set_exception(refusal)
            except BaseException:               # a handler ends the program; but first the rest
                result.set_exception(_Refused("failed", "a handler ended the server"))
                session.judging = False
                self._go_on(session)
                raise
            finally:
                session.judging = False
        if not queue and (left := session.left) is not None:
            session.left = None
            left()

    def _judge(self, session: Session, verdict: Verdict, key: str, data: Any) -> None:
        """Let an event happen as plugins have changed it, unless they have cancelled it."""
        if verdict.cancelled:
            raise _Refused("cancelled",
                           verdict.reason or f"plugin {verdict.by} has cancelled it")
        if (update := verdict.update) is not None and update.message is not None:
            data = {**data, "text": update.message} if isinstance(data, dict) else update.message
        self._fire(session, key, data)

    def _system_event(self, session: Session, event: str, data: Any) -> None:
        if event == "ping":
            session.send({"namespace": "system", "event": "pong", "data": data})
        elif event == "hello":
            session.send({"namespace": "system", "event": "hello", "data": {
                "id": session.id, "user": session.user, "tick_hz": self.config.tick_hz,
                "version": __version__}})
        elif event == "heartbeat":
            self._heartbeat(session, {} if data is None else data)
        else:
            raise _Refused("unknown_event", "system has the events ping, hello and heartbeat")

    def _heartbeat(self, session: Session, data: Any) -> None:
        """Note what a client says of itself: how often it will be heard, its user's state."""
        known = {"interval_s", "multiplier", "metadata", "state"}
        if not isinstance(data, dict) or data.keys() - known:
            raise _Refused("bad_request", f"a heartbeat's data are {', '.join(sorted(known))}")
        interval, multiplier = data.get("interval_s"), data.get("multiplier", 3)
        if any(type(each) not in (int, float) or not 0 <= each <= 86_400
               for each in (0 if interval is None else interval, multiplier)) or multiplier < 1:
            raise _Refused("bad_request", "interval_s and multiplier are numbers up to 86400, "
                           "the multiplier from 1")
        if any(len(_json_bytes(data.get(each))) > _MAX_STATE for each in ("metadata", "state")):
            raise _Refused("bad_request", f"metadata and state are of {_MAX_STATE} bytes at most")
        if not session.endpoint:
            return
        beats = session.beats = session.beats or {}
        if interval is not None:
            beats |= {"heartbeat_s": interval, "multiplier": multiplier}
        if "metadata" in data:
            beats["metadata"] = data["metadata"]
        self.presence.join(session.user, session.id, heartbeat_s=interval, multiplier=multiplier,
                           metadata=data.get("metadata"))
        if "state" in data:
            self.presence.set_state(session.user, data["state"])

    def _act(self, action: Any, who: Session | Request, topic: Any, message: dict[str, Any]) -> Any:
        """Do what a client asks of a topic; how many a publication went to is for HTTP."""
        acts: dict[Any, Callable[[Any, str, dict[str, Any]], Any]] = {
            "subscribe": self._subscribe, "unsubscribe": self._unsubscribe,
            "publish": self._publish_for}
        if (act := acts.get(action if isinstance(action, str) else "")) is None:
            raise _Refused("unknown_action", "actions are subscribe, unsubscribe and publish")
        topic = _asked_topic(topic)
        try:
            return act(who, topic, message)
        except UsageError as error:
            raise _Refused("bad_request", str(error)) from None

    def _check_subscription(self, session: Session, topic: str) -> None:
        if topic == _ZONES and session.endpoint != "data":
            raise _Refused("bad_topic", "the world is told on /ws/data")
        if topic != _ZONES and not self._may(session.user, "subscribe", topic):
            raise _Refused("forbidden", f"no rule lets you subscribe to {topic[:80]!r}")
        mine = session.subscriptions or {}
        if topic not in mine and 0 < self.config.max_subscriptions <= len(mine):
            raise _Refused("too_many_subscriptions", f"at most {self.config.max_subscriptions}")

    def _subscribe(self, session: Session, topic: str, message: dict[str, Any]) -> dict[str, Any]:
        """Subscribe; again with other options changes it. Returns where it begins, if kept.

        Who is subscribed already is not told a position: some of it may still be under way.
        """
        mine = session.subscriptions = session.subscriptions or {}
        options = {each: message[each] for each in ("since", "rate")
                   if message.get(each) is not None}
        if mine.get(topic, _nothing) is not _nothing and not {"since", "packed"} & {
                each for each in message if message[each]} and (
                options.get("rate") == getattr(
                    getattr(mine[topic], "__self__", None), "rate", None)):
            return {}                               # asking twice is harmless
        self._check_subscription(session, topic)
        if session.outbox is not None and session.outbox.urgent:
            self._flush([session])                  # what came before it leaves before its answer
        position: dict[str, Any] = {}
        if session.form == _HTML:
            views = self._views_of(topic)
            for view in views:
                self._look(view, session)
            mine[topic] = functools.partial(self._look_away, topic, views, session)
        elif topic == Moves.topic:
            session.packed = self._packing(session, message)
            self._movers[session] = None
            session.put(self.movement.snapshot())
            mine[topic] = functools.partial(self._movers.pop, session, None)
        elif topic == _ZONES:
            if options:
                raise _Refused("bad_request", "what is told of the world has no since and no rate")
            session.zones = self._packing(session, message)
            mine[topic] = functools.partial(self._leave_zones, session)
            if session.player in self.movement.positions:
                self.world.observe(session.id, *self.movement.positions[session.player])
        else:
            dropped = session.outbox.dropped if session.outbox else 0
            goes_on = topic in mine and "since" not in options
            if goes_on and (at := self.topics.position(topic)):
                options["since"] = at               # it has what is repeated for newcomers
            subscription = self.topics.subscribe(
                topic, session.put_many, batched=True, keep="last" if "rate" in options else "all",
                **options)
            if topic in mine:
                mine[topic](hand_on=True)           # type: ignore[call-arg]
            mine[topic] = subscription.remove
            if session.outbox and session.outbox.dropped > dropped:     # it reads too slowly
                session.put(self.topics.gap(topic))
            self._charge_for(session, topic)
            position = {} if goes_on else subscription.position
            if session.form == _EVENTS and position and "since" not in options:
                session.connection.send(b":\nid: %b\n\n" % self.topics.mark(subscription.begin))
        if not session.connection.is_open:          # somebody who was told of it ended it
            mine.pop(topic)()
        return position

    def _charge_for(self, session: Session, topic: str) -> None:
        """Count a costly subscription as several messages."""
        waiting = len(session.outbox.items) if session.outbox else 0
        searched = len(self.topics) if _is_pattern(topic.split(".")) else 0
        session.connection.charge(waiting // _REPLAYED_A_MESSAGE + searched // _TOPICS_A_MESSAGE)

    def _packing(self, session: Session, message: dict[str, Any]) -> str:
        """Return how a client wants positions: packed as "f32" or "f64", or not."""
        packed = message.get("packed") or ""
        if packed not in ("", "f32", "f64"):
            raise _Refused("bad_request", '"packed" is "f32" or "f64"')
        if packed and session.form != _PROTO:
            raise _Refused("bad_request", '"packed" needs the subprotocol horizon.proto.v1')
        return str(packed)

    def _leave_zones(self, session: Session) -> None:
        session.zones = None
        self.world.blind(session.id)

    def _unsubscribe(self, session: Session, topic: str, _message: dict[str, Any]) -> None:
        mine = session.subscriptions or {}
        if topic == _ZONES and session.zones is not None:       # it is, without having asked
            mine.setdefault(topic, functools.partial(self._leave_zones, session))
        if topic not in mine:
            raise _Refused("not_subscribed", f"there is no subscription to {topic[:80]!r}")
        mine.pop(topic)()

    def _publish_for(self, who: Session | Request, topic: str, message: dict[str, Any]) -> int:
        if topic.partition(".")[0] in _RESERVED_TOPICS:
            raise _Refused("forbidden", f"clients don't publish under {topic.partition('.')[0]}")
        if not self._may(who.user or "guest-post", "publish", topic):
            raise _Refused("forbidden", f"no rule lets you publish to {topic[:80]!r}")
        topics = [topic]
        if _is_pattern(topic.split(".")):           # each topic counts as a message
            topics = [each for each in self.topics.live(topic)
                      if each.partition(".")[0] not in _RESERVED_TOPICS]
            if 0 < self.config.burst < len(topics):
                raise _Refused("too_many_topics", f"{topic[:80]!r} reaches {len(topics)} topics")
            connection = who.connection if isinstance(who, Session) else message["connection"]
            connection.charge(max(0, len(topics) - 1))
        return sum([self.topics.publish(
            each, message.get("payload"), critical=message.get("critical") is True,
            msg_id=message.get("msg_id")) for each in topics])

    # -- looking --

    def _add_routes(self) -> None:
        for topic in (_PRESENCE_TOPIC, _CHANGES_TOPIC):
            self.topics.topic(topic, replay=functools.partial(self._presence_now, topic), bare=True)
        for path in _WEBSOCKETS:
            self.websocket(path)(self._on_html if path.endswith("html") else self._on_data)
        self._endpoint("EVENTS", "/sub/{pattern}", False)(lambda: None)
        self.post("/pub/{topic}")(self._serve_publish)
        self.get("/", public=True)(lambda request: _page())
        self._routes[0] = self._routes[0]._replace(rank=20_000)     # give way to static("/", ...)
        self.get("/metrics")(self._serve_metrics)
        self.get("/healthz", public=True)(lambda request: "ok\n")
        self.get("/readyz", public=True)(lambda request: Response(
            *(("ok\n", 200) if self._state == "open" else ("draining\n", 503))))
        self.get("/stats.json")(lambda request: self.report())
        self.get("/swap.js", public=True)(lambda request: Response(
            SWAP_SCRIPT, headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"},
            content_type="text/javascript; charset=utf-8"))
        self.get("/presence")(self._serve_presence)
        self.get("/presence/{user}")(self._serve_presence)

    def _serve_publish(self, connection: Connection, request: Request, topic: str) -> Response:
        """Publish what was posted: JSON, or text as it is if it isn't; say to how many it goes."""
        text = _text(request.body)
        try:
            payload = self._parse(text)
        except PeerError as error:
            if error.label != "bad_json" or "json" in request.headers.get("content-type", ""):
                raise
            payload = text
        message = {"payload": payload, "critical": request.args.get("critical") in ("1", "true"),
                   "msg_id": request.args.get("msg_id"), "connection": connection}
        return Response({"delivered": self._checked(
            self._act, "publish", request, topic, message)}, 202)

    def _serve_presence(self, request: Request, user: str | None = None) -> Response:
        """Say who is here, or how one user is: 404 for who is not."""
        if not self._may(request.user or "guest-get", "subscribe", _PRESENCE_TOPIC):
            raise _Refused("forbidden", "no rule lets you see who is here")
        presence = self.presence
        if user is None:
            states = {each: presence.state(each) for each in presence.users()}
            return Response({"count": presence.online(), "users": presence.users(), "states": {
                each: state for each, state in states.items() if state is not None}})
        return Response({"user": user, "online": user in presence, "state": presence.state(user),
                         "connections": presence.connections(user)},
                        200 if user in presence else 404)

    def _serve_metrics(self, request: Request) -> Response:
        if not self.config.metrics:
            return Response("metrics are switched off\n", 404)
        wants_open = "application/openmetrics-text" in request.headers.get("accept", "")
        kind = "application/openmetrics-text; version=1.0.0" if wants_open else (
            "text/plain; version=0.0.4")
        return Response(self.metrics.exposition(openmetrics=wants_open),
                        content_type=f"{kind}; charset=utf-8")

    def _add_metrics(self) -> None:
        """Name what is counted elsewhere; the README's table lists these."""
        def read(path: str) -> Any:
            path, *arguments = path.split()
            value = operator.attrgetter(path)(self)
            return value(*arguments) if callable(value) else value

        for name, path, text in _WATCHED:
            name, _, label = name.partition(" by ")
            self.metrics.watch(name, functools.partial(read, path), text, label=label,
                               kind="counter" if name.endswith("_total") else "gauge")
        for name, text, buckets in _TIMED:
            self.metrics.describe(name, text, kind="histogram", buckets=buckets)
        self.metrics.describe("horizon_route_errors_total", "Answers of routes that raised.")
        self.metrics.describe("horizon_html_errors_total", "Functions of HTML that raised.")
        self.metrics.describe("horizon_repeat_errors_total",
                              "Calls of repeated functions that raised.")

    def _resident_mb(self) -> float:
        return _memory_bytes()[0] / 1e6

    def _virtual_mb(self) -> float:
        return _memory_bytes()[1] / 1e6

    def _ticks_dropped(self) -> int:
        return self._ticker.dropped if self._ticker else 0

    def _replaced(self) -> int:
        boxes = [each.outbox for each in list(self.sessions.values()) if each.outbox is not None]
        return self.coalesced + self.movement.coalesced + sum(box.coalesced for box in boxes)

    def _uptime_s(self) -> float:
        return (time.monotonic_ns() - self._started_ns) / 1e9

    def _each_second(self) -> None:
        """Work out rates, publish them to who watches, tell metrics of the collector's pauses."""
        self.loop.call_later(1.0, self._each_second)
        for pause in self._gc.take_pauses():
            self.metrics.observe("horizon_gc_pause_seconds", pause / 1e9)
        self.topics.sweep()
        self.presence.sweep()
        self._save_streams()
        self._check_alerts()
        server, now = self.server, self.loop.clock()
        marks = (server.messages_received, sum(self.events_sent.values()), server.bytes_sent, now)
        spent_s = (now - self._rate_marks[3]) / 1e9 or 1.0
        names = ("messages_in_per_s", "messages_out_per_s", "bytes_out_per_s")
        self._rates = {name: round((new - old) / spent_s, 1)
                       for name, new, old in zip(names, marks, self._rate_marks)}
        self._rate_marks = marks
        if self.topics.matching("system.stats"):
            self.publish("system.stats", self._live_figures())

    def _save_streams(self) -> None:
        """Have states written that are due, away from the loop: a disk may be slow."""
        if (self._saving is None or not self._saving.is_alive()) and (due := self._streams.due()):
            self._saving = threading.Thread(target=self._write_states, args=(due,), daemon=True,
                                            name="horizon_lite state")
            self._saving.start()

    def _settle_states(self) -> None:
        if self._saving is not None:
            self._saving.join()

    def _write_states(self, due: list[tuple[str, Any]]) -> None:
        for path, state in due:
            try:
                _write_state(path, state)
            except (OSError, ValueError) as error:
                with contextlib.suppress(StateError):
                    self.call_soon(self._streams.tell_unsaved, path, error)

    def _look_at_files(self) -> None:
        self.loop.call_later(_LOOK_S, self._look_at_files)
        self.plugins.look()

    def _check_alerts(self) -> None:
        """Tell what is wrong when it begins and when it ends; too full, take in nobody more."""
        limit_mb, resident_mb = self.config.max_memory_mb, self._resident_mb()
        self.server.full = 0 < limit_mb < resident_mb
        dropped, self._drops_told = self._worker.dropped - self._drops_told, self._worker.dropped
        found = {"memory": f"{resident_mb:.0f} MB are resident, of max_memory_mb = {limit_mb}"
                 if self.server.full else "",
                 "batches": f"{dropped} events found no room in a batch" if dropped else "",
                 "plugins": ", ".join(f"{name} has failed" for name, each in
                                      self.plugins.report().items() if each["state"] == "failed")}
        for name, text in found.items():
            if bool(text) == (name in self.alerts):
                continue
            if text:
                self.alerts[name] = text
                _log.warning("alert: %s", text)
            else:
                del self.alerts[name]
                _log.info("the alert is over: %s", name)
            self.bus.emit("core:alert", {"name": name, "active": bool(text), "text": text})

    def _live_figures(self) -> dict[str, Any]:
        ticks = sorted(self._tick_ns) or [0]
        return {
            **self._rates, "connections": self.server.websockets,
            "players": len(self.movement.positions),
            "tick_ms": round(ticks[len(ticks) // 2] / 1e6, 3),
            "tick_p99_ms": round(ticks[len(ticks) * 99 // 100] / 1e6, 3),
            "budget_ms": round(1000 / self.config.tick_hz, 3) if self.config.tick_hz else 0.0,
            "overruns": self.overruns, "drops": self.drops.total()}

    def report(self) -> dict[str, Any]:
        """Return what an operator asks first: health, throughput, ticks, memory, drops."""
        (resident, virtual), server = _memory_bytes(), self.server
        figures, slow = self._live_figures(), server.refused["slow"]
        return {
            "version": __version__, "uptime_s": round(self._uptime_s(), 3), "state": self._state,
            "healthy": self._state == "open" and not (figures["drops"] or slow or self.alerts),
            "alerts": dict(self.alerts),
            "connections": {"websockets": server.websockets, "sockets": len(server.connections),
                            "users": self.presence.online(), "accepted": server.accepted},
            "throughput": {**self._rates, "messages_received": server.messages_received,
                           "events_sent": sum(self.events_sent.values()), "writes": server.writes,
                           "bytes_sent": server.bytes_sent, "events_processed": self.bus.emits},
            "tick": {"hz": self.config.tick_hz, "count": self.tick_count,
                     "overruns": self.overruns, "dropped": self._ticks_dropped(),
                     **{key: figures[key] for key in ("tick_ms", "tick_p99_ms", "budget_ms")}},
            "memory": {"rss_mb": round(resident / 1e6, 3), "virtual_mb": round(virtual / 1e6, 3),
                       "gc_pauses": self._gc.pauses, "gc_slowest_ms": self._gc.slowest_ns / 1e6},
            "cpu_s": round(_cpu_s(), 4),
            "drops": {"dropped": figures["drops"], "slow_closed": slow,
                      "coalesced": self._replaced(), "by_class": dict(self.drops),
                      "by_topic": dict(self._dropped_topics.most_common(10))},
            "refused": dict(server.refused), "requests_refused": dict(self.refusals),
            "handler_errors": self.bus.errors,
            "replication": {**self.world.report(), "lag_p99_ms": self._lag_p99_ms()},
            "stream": {name: self._streams.total(name) for name in (
                "mappings", "processed", "errored", "dropped", "made", "failed")},
            "plugins": self.plugins.report(), "programs": self.host.report()}

    def _check(self) -> None:
        """Assert that every index agrees with the sessions there are (tests)."""
        self.server._check()
        assert sum(map(len, self._users.values())) == len(self.sessions)
        self.presence._check()
        self.host._check()
        assert set(self._movers) <= set(self.sessions.values())
        assert self._present.total() == len(self.sessions)
        views = self._all_views()
        assert {session for view in views for session in view.audience} <= {*self.sessions.values()}
        assert all(bool(view.audience) == (view.subscription is not None) for view in views)
        if not self.sessions:
            assert not self.presence._connections and not self._users


# =============================================================================
# 21  CLIENT - a small blocking client
# =============================================================================
# Knows: PROTO, PROTOCOLS, PLUGINS' addresses, its own socket.     Never: ENGINE.


_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 5.0        # between two tries to connect again
_FINAL_CODES = (1000, 1002, 1003, 1007, 1008, 1009)     # who is told this need not come again
_UNPACED = 100                      # subscriptions that are made anew at once
_AT = ("epoch", "offset", "seq")    # of a position
_END = object()                     # instead of a message: there are no more
_ZONE_TYPES = {"zone_enter": _ENTER, "zone_exit": _EXIT, "gorc_event": _EVENT}
_MAX_BATCH = 1 << 24                # bytes of what a server may send, inflated or not


class _Options(NamedTuple):
    """How a client connects."""

    timeout_s: float = 10.0
    headers: Mapping[str, str] = {}
    ssl_context: ssl.SSLContext | None = None
    compress: bool = False
    reconnect_s: float = 0.0


def _inflate(data: bytes, size: int, what: str) -> bytes:
    """Return what a zlib stream of *size* bytes holds, bounded before it is stored."""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(data, _MAX_BATCH)
    except zlib.error as error:
        raise WireError(f"{what}: {error}") from None
    if not inflater.eof or inflater.unused_data or len(inflated) != size:
        raise TooBig(f"{what} not of {size} bytes, or over {_MAX_BATCH}")
    return inflated


class SeenObject:
    """An object as a client sees it: ``id``, ``type``, ``position``, and what it was told of it.

    Properties are read as attributes, ``rock.health`` or ``rock.get("health")``; ``channels`` has
    them by channel, of the zones the client is in. The position is where it was last told to
    be: layers that are to know where things are have "position" among their properties.
    """

    __slots__ = ("id", "type", "position", "channels", "_newest")

    def __init__(self, id: str, kind: str) -> None:
        self.id, self.type = id, kind
        self.position: tuple[float, ...] | None = None
        self.channels: dict[int, dict[str, Any]] = {}
        self._newest: dict[str, Any] = {}       # whichever channel told it last

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._newest:
            raise AttributeError(f"of this {self.type} there is no {name!r} in the zones it is "
                                 f"seen from{_did_you_mean(name, self._newest)}")
        return self._newest[name]

    def _tell(self, channel: int, data: dict[str, Any]) -> None:
        self.channels[channel] |= data
        self._newest |= data
        if "position" in data:
            x, y, z = data["position"]
            self.position = _must_be_place(x, y, z, "what is seen")

    def _leave(self, channel: int) -> None:
        self.channels.pop(channel, None)
        self._newest = {name: value for name, value in self._newest.items()
                        if any(name in each for each in self.channels.values())}

    def get(self, name: str, default: Any = None) -> Any:
        """Return a property, or *default* if it is not told here."""
        return getattr(self, name, default)

    def __repr__(self) -> str:
        return f"SeenObject({self.type} at {self.position}, {self.channels})"


class SeenWorld(dict[str, SeenObject]):
    """What a client may see of a World, by id: what has entered and not left, as last told.

    It changes as the client reads: by ``recv``, in a loop over messages, waiting for an answer.
    ``zones`` are the (id, channel) it is in, as ``World.seen_by`` has them.
    """

    __slots__ = ()

    @property
    def zones(self) -> set[tuple[str, int]]:
        """The (id, channel) of every zone."""
        return {(each.id, channel) for each in self.values() for channel in each.channels}

    def of_type(self, kind: str | type[Replicated]) -> list[SeenObject]:
        """Return the objects of one type, given by its name or class."""
        name = kind if isinstance(kind, str) else kind.type_name
        return [each for each in self.values() if each.type == name]

    def apply(self, message: Mapping[str, Any]) -> None:
        """Take note of a message of replication; of others that are none, nothing.

        Raises:
            PeerError: it can't be understood.
        """
        try:
            if (kind := message.get("type")) in (_ENTER, _EXIT, _EVENT):
                self._apply(str(kind), message)
        except (TypeError, ValueError, KeyError, UsageError):
            raise PeerError(f"{reprlib.repr(message)} can't be understood", close_code=1007,
                            label="bad_json") from None

    def _apply(self, kind: str, message: Mapping[str, Any]) -> None:
        id, channel = message["object_id"], message["channel"]
        if not isinstance(id, str) or type(channel) is not int:
            raise TypeError
        seen = self.get(id)
        if kind == _ENTER:
            x, y, z = message["position"]
            place, data = _must_be_place(x, y, z, "what is seen"), message["zone_data"]
            if seen is None:
                seen = self[id] = SeenObject(id, str(message["object_type"]))
            seen.position, seen.channels[channel] = place, {}
            seen._tell(channel, {**data})
        elif seen is not None and kind == _EXIT:
            seen._leave(channel)
            if not seen.channels:
                del self[id]
        elif seen is not None and message.get("event") == "update" and channel in seen.channels:
            seen._tell(channel, {**message["data"]})

    def move(self, moves: Mapping[bytes, _Position]) -> None:
        """Take note of packed positions, of channel 0."""
        for uuid, position in moves.items():
            seen = self.get(_uuid_text(uuid))
            if seen is not None and 0 in seen.channels:
                seen._tell(0, {"position": list(position)})


class Client:
    """A blocking client of ``/ws/data``: a context manager, and iterable over messages.

    Asking: subscribe, unsubscribe, publish, emit, emit_gorc, move, request.
    Taking: recv, iteration.   ``world`` is what it sees of the server's, a SeenWorld.
    Messages are what the server sent, as parsed JSON; with ``protocol="proto"``, the
    EventEnvelopes of the built-in schema. ``positions`` tells how far the topics that the
    server keeps were heard, for ``subscribe(topic, since=...)``. One thread uses a client.
    """

    __slots__ = ("url", "protocol", "reconnects", "positions", "_options", "_sock", "_ws",
                 "_waiting", "_number", "closed", "_topics", "_heard", "_asked", "_lost_at",
                 "_next_try", "world")

    def __init__(self, url: str, protocol: str, options: _Options) -> None:
        self.url = url
        self.protocol = protocol
        self.reconnects = 0                 # how often the connection was made anew
        self.positions: dict[str, dict[str, Any]] = {}      # by topic or pattern
        self.world = SeenWorld()
        self._heard: set[str] = set()       # those of them that this connection is subscribed to
        self._asked = ("", "")              # the request to subscribe that is not answered yet
        self._options = options
        self._waiting: deque[Any] = deque()
        self._number = 0                    # of the last request
        self._topics: dict[str, dict[str, Any]] = {}    # subscribed to, with what options
        self._lost_at = self._next_try = 0.0    # when the connection was lost; 0: it is there
        self._connect(options)

    def _connect(self, options: _Options) -> None:
        host, port, path, secure = _split_url(self.url)
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if options.ssl_context is not None and not secure:
            raise UsageError(f"ssl_context is for https and wss, not for {self.url!r}")
        self._sock = socket.create_connection((host, port), timeout=options.timeout_s)
        try:
            if secure:
                import ssl
                context = options.ssl_context or ssl.create_default_context()
                self._sock = context.wrap_socket(self._sock, server_hostname=host)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            subprotocol = f"horizon.{self.protocol}.v1"
            deflate, rest = _shake_hands(self._sock, name, path, subprotocol, options)
            self._ws = WebSocketConnection("client", 1 << 26, deflate)
            self._heard = set()
            self.world.clear()              # somebody new, who is nowhere yet
            self.closed: Close | None = None    # with what code and reason the server closed
            self._ws.receive(rest)
            self._take_events()             # a welcome may have come along
        except BaseException:
            self._sock.close()
            raise

    def _reconnect(self, deadline: float | None) -> bool:
        """Connect again, later and later, if that was asked for; subscribe to what was.

        Raises:
            TimeoutError: *deadline* has passed before; the next call goes on.
        """
        import random
        if self.closed is None or self.closed.code in _FINAL_CODES:
            return False
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        while now - self._lost_at < self._options.reconnect_s:
            if self._next_try <= now:       # as long again as it was waited, but not all at once
                pause_s = min(max(now - self._lost_at, _FIRST_DELAY_S), _LAST_DELAY_S)
                self._next_try = now + random.uniform(0.5, 1.0) * pause_s
            if deadline is not None and self._next_try > deadline:
                time.sleep(max(0.0, deadline - now))
                raise TimeoutError("no message in time; the connection is lost")
            time.sleep(self._next_try - now)
            if self._try_again(math.inf if deadline is None else deadline - time.monotonic()):
                return True
            now = time.monotonic()
        return False

    def _try_again(self, left_s: float) -> bool:
        # a second at least: else who polls with less would never come in
        timeout_s = min(max(1.0, left_s), self._options.timeout_s)
        try:
            self._connect(self._options._replace(timeout_s=timeout_s))
            self._sock.settimeout(self._options.timeout_s)
            for number, (topic, options) in enumerate(list(self._topics.items())):
                if number >= _UNPACED:              # slower than servers allow by default
                    time.sleep(0.01)
                try:
                    since = self.positions.get(topic)
                    self._follow(topic, options if since is None else {**options, "since": since},
                                 timeout_s)
                except StateError:
                    raise
                except UsageError as error:
                    del self._topics[topic]
                    _log.warning("connected again, but: %s", error)
        except HandshakeError as error:
            if error.http_status not in (429, 500, 502, 503, 504):      # these may pass
                raise
            return False
        except (OSError, StateError) as error:
            self._lose(Close(1006, str(error)))
            return False
        self.reconnects += 1
        self._lost_at = self._next_try = 0.0
        return True

    # -- asking --

    def emit(self, namespace: str, event: str, data: Any = None) -> None:
        """Send ``{"namespace", "event", "data"}``: fires ``client:<namespace>:<event>`` there."""
        if self.protocol == "proto":
            self.send_envelope(client_event=builtin_schema().ClientEvent(
                namespace=namespace, event=event, data=_json_bytes(data)))
        else:
            self.send({"namespace": namespace, "event": event, "data": data})

    def move(self, x: float, y: float, z: float = 0.0) -> None:
        """Tell the server where this client's player is, and so what it sees."""
        self.emit("movement", "position", {"x": x, "y": y, "z": z})

    def emit_gorc(self, obj: str | SeenObject, channel: int, event: str, data: Any = None) -> None:
        """Say something to an object in whose zone this client is; see ``Engine.on_gorc``."""
        key = obj.id if isinstance(obj, SeenObject) else obj
        if self.protocol == "proto":
            self.send_envelope(gorc_event=builtin_schema().GorcEvent(
                object_id=key, channel=channel, event=event, data=_json_bytes(data)))
        else:
            self.send({"type": _EVENT, "object_id": key, "channel": channel, "event": event,
                       "data": data})

    def subscribe(self, topic: str, **options: Any) -> None:
        """Subscribe and wait until the server agreed (UsageError if it refuses).

        *options* are ``since``, a position as in ``positions``: first comes what was missed
        since, or a message with "gap"; ``rate``, for the newest so many times a second; and
        ``packed`` for movement, and for "gorc", what is told of the world.
        """
        self._follow(topic, options, 10.0)

    def _follow(self, topic: str, options: dict[str, Any], timeout_s: float) -> None:
        self._asked = (f"{self._number + 1}", topic)
        self.request("subscribe", topic, timeout_s=timeout_s, **options)
        self._topics[topic] = {name: each for name, each in options.items() if name != "since"}

    def unsubscribe(self, topic: str) -> None:
        """End a subscription and wait until the server agreed."""
        self.request("unsubscribe", topic)
        if topic == "gorc":
            self.world.clear()
        self._topics.pop(topic, None)
        self.positions.pop(topic, None)
        self._heard.discard(topic)

    def publish(self, topic: str, payload: Any, *, critical: bool = False,
                msg_id: str | None = None) -> None:
        """Publish and wait until the server accepted it (UsageError if it refuses).

        With a *msg_id* of one's own, it may be said again without being delivered again.
        """
        more: dict[str, Any] = {} if msg_id is None else {"msg_id": msg_id}
        self.request("publish", topic, payload=payload, critical=critical, **more)

    def request(self, action: str, topic: str, *, timeout_s: float = 10.0, **fields: Any) -> Any:
        """Send an action and return its answer; messages that come meanwhile are kept.

        Raises:
            UsageError: the server refused; its words are in the text.
            TimeoutError: there was no answer in time.
        """
        self._number += 1
        request_id = f"{self._number}"
        if self.protocol == "proto":
            payload = _json_bytes(fields.pop("payload")) if "payload" in fields else b""
            if (since := fields.get("since")) is not None:
                fields["since"] = builtin_schema().Position(
                    **(since if isinstance(since, Mapping) else {"offset": since}))
            self.send_envelope(request=builtin_schema().ClientRequest(
                id=request_id, action=action, topic=topic, payload=payload, **fields))
        else:
            self.send({"action": action, "topic": topic, "id": request_id, **fields})
        deadline = time.monotonic() + timeout_s
        kept: list[Any] = []
        try:
            while not self._is_answer(message := self._take(deadline), request_id):
                kept.append(message)
        finally:
            self._waiting.extendleft(reversed(kept))
        if error := self._refusal(message):
            raise UsageError(f"{action} {topic}: {error}")
        return message

    def _is_answer(self, message: Any, request_id: str) -> bool:
        if message is _END:
            raise StateError(f"the connection is closed: {self.closed}")
        if hasattr(message, "which"):
            return bool(message.which("payload") == "reply" and message.reply.id == request_id)
        return isinstance(message, dict) and message.get("id") == request_id

    def _refusal(self, message: Any) -> str:
        if hasattr(message, "reply"):
            return "" if message.reply.ok else f"{message.reply.code}: {message.reply.message}"
        error = message.get("error")
        return f"{error.get('code')}: {error.get('message')}" if isinstance(error, dict) else (
            str(error or ""))

    def send(self, message: str | bytes | dict[str, Any] | list[Any]) -> None:
        """Send one message: text, binary, or JSON for dict and list."""
        if not isinstance(message, str | bytes):
            message = _json_bytes(message).decode()
        frame = self._ws.send_binary if isinstance(message, bytes) else self._ws.send_text
        self._send(frame, message)

    def send_envelope(self, **envelope: Any) -> None:
        """Send one EventEnvelope, given by its fields, as an EventBatch."""
        self._send(self._ws.send_binary, _batch_of(**envelope))

    def _send(self, frame: Callable[[Any], bytes], message: str | bytes) -> None:
        if self.closed is not None:
            raise StateError(f"the connection is closed: {self.closed}")
        try:
            self._write(frame(message))
        except OSError as error:            # perhaps in the middle of a frame
            self._lose(Close(1006, str(error)))
            raise

    def _write(self, data: bytes) -> None:
        self._sock.sendall(data)

    # -- taking --

    def recv(self, timeout: float | None = None) -> Any:
        """Return the next message; None when the server has closed.

        Raises:
            TimeoutError: none came within *timeout* seconds.
            HandshakeError: it wanted to reconnect, and the server refuses for good.
        """
        return None if (message := self._next(timeout)) is _END else message

    def _next(self, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self._take(deadline)) is _END and self._reconnect(deadline):
            pass
        return message

    def _take(self, deadline: float | None) -> Any:
        while not self._waiting:
            if self.closed is not None:
                return _END
            left = None if deadline is None else max(1e-6, deadline - time.monotonic())
            self._sock.settimeout(left)
            try:
                data, why = self._sock.recv(_RECV_BYTES), "the connection was lost"
            except TimeoutError:
                raise TimeoutError("no message in time") from None
            except OSError as error:
                data, why = b"", str(error)
            finally:
                self._sock.settimeout(self._options.timeout_s)
            if not data:
                self._lose(Close(1006, why))
            self._ws.receive(data)
            self._take_events()
        return self._waiting.popleft()

    def _lose(self, why: Close, goodbye: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            if goodbye:                     # sendall waits, even with nothing to send
                self._sock.sendall(goodbye)
        self.closed = self.closed or why
        self._sock.close()

    def _take_events(self) -> None:
        try:
            while events := self._ws.take_events():
                self._take_each(events)
        except PeerError as error:          # RFC 6455 7.1.7
            self._lose(Close(error.close_code, str(error)),
                       self._ws.send_close(error.close_code, error.reason))

    def _take_each(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, Ping):
                with contextlib.suppress(OSError, StateError):  # what came is worth more
                    self._send(self._ws.send_pong, event.data)
            elif isinstance(event, Close):
                self._lose(event, self._ws.send_close(event.code))
            elif isinstance(event, str):
                message: Any = event        # a route of one's own may send plain text
                with contextlib.suppress(ValueError, RecursionError):
                    message = json.loads(event)
                # an array is several objects of one tick
                self._keep(message if isinstance(message, list) else [message])
            elif isinstance(event, bytes):
                self._keep(builtin_schema().EventBatch.decode(event).events
                           if self.protocol == "proto" else [event])

    def _keep(self, messages: list[Any]) -> None:
        """Let messages wait to be taken, and note how far their topics are heard with them."""
        self._waiting.extend(messages)
        for message in messages:
            self._see(message)
        for message in messages if self._heard or self._asked[0] else ():
            if hasattr(message, "which"):
                message = self._plain(message)
            if not isinstance(message, dict):
                continue
            if self._asked[0] == message.get("id"):
                self._answered(message)
            elif isinstance(message.get("epoch"), str) and type(message.get("offset")) is int and (
                    message.get("seq") or message.get("gap")):
                self._note(str(message.get("topic")), message)

    def _see(self, message: Any) -> None:
        """Note what a message tells of the world."""
        if not hasattr(message, "which"):
            if isinstance(message, dict) and "object_id" in message:
                self.world.apply(message)
        elif message.type == "GORC_MOVES" and (block := message.packed_movement) is not None:
            self.world.move(unpack_moves(block.data, wide=block.wide))
        elif (kind := message.which("payload")) in _ZONE_TYPES:
            told = getattr(message, kind)
            place = getattr(told, "position", None)
            data = self._unpacked(told) if kind != "zone_exit" else None
            self.world.apply({
                "type": _ZONE_TYPES[kind], "object_id": told.object_id, "channel": told.channel,
                "object_type": told.object_type, "event": getattr(told, "event", ""),
                "zone_data": data, "data": data,
                "position": (place.x, place.y, place.z) if place else None})

    @staticmethod
    def _unpacked(told: Any) -> Any:
        """Return the data of a zone's message, inflated and parsed."""
        body = told.data
        if told.original_size:
            body = _inflate(body, told.original_size, "data of a zone")
        try:
            return json.loads(body) if body else None
        except (ValueError, RecursionError):
            raise WireError("data of a zone that is not JSON") from None

    @staticmethod
    def _plain(envelope: Any) -> dict[str, Any]:
        """Return of an envelope what a client of JSON would get, as far as positions go."""
        reply, told = envelope.reply, envelope.topic_message
        if reply is not None:
            at, answer = reply.position, {"id": reply.id, "ok": reply.ok}
            by = "seq" if at and at.seq else "offset"
            return {**answer, "epoch": at.epoch, by: getattr(at, by)} if at else answer
        return {name: getattr(told, name) for name in ("topic", "gap", *_AT)} if told else {}

    def _answered(self, reply: dict[str, Any]) -> None:
        """Begin to note where a subscription is, from here on in what the server sends."""
        topic, self._asked = self._asked[1], ("", "")
        if reply.get("ok") and "epoch" in reply:
            self.positions[topic] = {each: reply[each] for each in _AT if each in reply}
            self._heard.add(topic)
        elif reply.get("ok") and topic not in self._heard:      # the server keeps nothing
            self.positions.pop(topic, None)

    def _note(self, topic: str, message: dict[str, Any]) -> None:
        tokens, gap = topic.split("."), message.get("gap")
        patterns = {name: _check_topic(name, wildcards=True) for name in self._heard}
        covering = [name for name in patterns if (
            name == topic if gap else _contains(patterns[name], tokens))]
        for name in covering:
            if len(covering) > 1 and "rate" in self._topics.get(name, ()):
                continue                    # it may hold back what another has brought already
            by, epoch, old = "offset", message["epoch"], self.positions[name]
            if _is_pattern(patterns[name]):
                by, epoch = "seq", epoch[:_EPOCH_LENGTH]
            if gap or old["epoch"] != epoch or message[by] > old.get(by, -1):
                self.positions[name] = {"epoch": epoch, by: message[by]}

    def __iter__(self) -> Iterator[Any]:
        return iter(functools.partial(self._next, None), _END)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, wait two seconds at most for the server's, and close; twice is harmless."""
        self._options = self._options._replace(reconnect_s=0.0)
        deadline = time.monotonic() + min(2.0, self._options.timeout_s)
        with contextlib.suppress(OSError):      # RFC 6455 7.1.1; what is unread would be a reset
            if self.closed is None:
                self._sock.settimeout(deadline - time.monotonic())
                self._sock.sendall(self._ws.send_close(code, reason))
            while not self._ws.closed_by_peer and self.closed is None:
                self._sock.settimeout(max(1e-3, deadline - time.monotonic()))
                data = self._sock.recv(_RECV_BYTES)
                self._ws.receive(data)
                with contextlib.suppress(PeerError):
                    while self._ws.take_events():
                        pass
                if not data or time.monotonic() > deadline:
                    break
        self._lose(Close(code, reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _split_url(url: str) -> tuple[str, int, str, bool]:
    match = re.fullmatch(r"(https?|wss?)://(\[[^\]]+\]|[^/:?#]+)(?::(\d+))?(/[^#]*)?", url)
    if match is None:
        raise UsageError(f"url {url!r}: write it like http://127.0.0.1:8080 or ws://host/ws/data")
    secure = match[1] in ("https", "wss")
    path = match[4] if match[4] and match[4] != "/" else "/ws/data"
    return match[2].strip("[]"), int(match[3] or (443 if secure else 80)), path, secure


def _shake_hands(sock: socket.socket, host: str, path: str, subprotocol: str,
                 options: _Options) -> tuple[Deflate | None, bytes]:
    """Upgrade *sock* to a WebSocket (RFC 6455 4.1).

    Returns: what was agreed on for compression, and what came behind the answer.

    Raises:
        HandshakeError: the answer is not a correct 101.
    """
    import base64
    key = base64.b64encode(os.urandom(16)).decode()
    headers = {"Host": host, "Upgrade": "websocket", "Connection": "Upgrade",
               "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Protocol": subprotocol, **options.headers}
    if options.compress:
        headers["Sec-WebSocket-Extensions"] = "permessage-deflate; client_max_window_bits"
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer, deadline, data = b"", time.monotonic() + options.timeout_s, b"more"
    while data and b"\r\n\r\n" not in answer and len(answer) < 65536:
        sock.settimeout(max(1e-3, deadline - time.monotonic()))
        data = sock.recv(4096)
        answer += data
    sock.settimeout(options.timeout_s)
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    got: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in fields):
        name, value = name.strip().lower(), value.strip()
        got[name] = f"{got[name]}, {value}" if name in got else value
    if not re.match(r"HTTP/1\.1 101(?: |$)", status):
        match = re.match(r"HTTP/\d\.\d (\d{3})", status)
        raise HandshakeError(f"the server answered {status!r} "
                             f"{rest[:200].decode(errors='replace').strip()}",
                             http_status=int(match[1]) if match else 0)
    for name, right in (("upgrade", "websocket"), ("connection", "upgrade"),
                        ("sec-websocket-accept", _accept_key(key))):
        value = got.get(name, "")
        if right not in (value, *map(str.strip, value.lower().split(","))):
            raise HandshakeError(f"the server's {name.title()} is {value!r}")
    if got.get("sec-websocket-protocol", "") not in ("", subprotocol):
        raise HandshakeError("the server chose a subprotocol that was not offered")
    return _deflate_answer(got.get("sec-websocket-extensions", ""), options.compress), rest


def connect(url: str, *, token: str | None = None, protocol: str = "json",
            timeout_s: float = 10.0, headers: Mapping[str, str] | None = None,
            ssl_context: ssl.SSLContext | None = None, compress: bool = False,
            reconnect: bool | float = False) -> Client:
    """Return a client connected to *url*, like ``app.url`` or ``ws://host:port/ws/data``.

    *protocol* is "json" or "proto"; *token* is sent as a bearer token (RFC 6750). For wss,
    *ssl_context* may trust another authority than the system's. With *reconnect*, ``recv``
    connects again when the connection was lost, for so many seconds at most (True: five
    minutes), at growing intervals, and subscribes anew. Of topics that keep a history it then
    gets what it missed, or a message with "gap"; of others that is lost.

    Raises:
        OSError: nobody listens there.
        HandshakeError: the server refuses; ``http_status`` tells with what.
    """
    if protocol not in ("json", "proto"):
        raise UsageError(f"protocol is 'json' or 'proto', not {protocol!r}")
    bearer = {"Authorization": f"Bearer {token}"} if token is not None else {}
    return Client(url, protocol, _Options(
        timeout_s, {**bearer, **(headers or {})}, ssl_context, compress,
        300.0 if reconnect is True else float(reconnect)))


# -- a plugin program --



class PluginEvent:
    """What a handler of a plugin program gets: the payload's fields, and how to answer.

    ``type`` is like "CHAT", ``payload`` the message of the schema, whose fields are read as the
    event's own: ``event.message``. Of "PACKED_MOVEMENT" there is ``moves``: id -> (x, y, z).
    """

    __slots__ = ("type", "payload", "expects_response", "result")

    def __init__(self, envelope: Any) -> None:
        self.type = envelope.type
        self.payload: Any = getattr(envelope, envelope.which("payload") or "type")
        self.expects_response = envelope.expects_response
        self.result = builtin_schema().EventResult(event_id=envelope.event_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.payload, name)

    def __repr__(self) -> str:
        return f"PluginEvent({self.type}, {self.payload!r})"

    @property
    def moves(self) -> dict[bytes, _Position]:
        """The positions of a packed block."""
        return unpack_moves(self.payload.data, wide=self.payload.wide)

    def _must_be_asked(self) -> None:
        if not self.expects_response:
            raise StateError(f"{self.type} is not asked about; it can't be cancelled or changed")

    def cancel(self, reason: str = "") -> None:
        """Veto the event; what other plugins change is then of no account."""
        self._must_be_asked()
        self.result.cancel, self.result.reason = True, str(reason)

    def change(self, **fields: Any) -> None:
        """Change what happens, like ``change(message="...")`` of a CHAT."""
        self._must_be_asked()
        schema = builtin_schema()
        kinds = {"CHAT": ("chat", schema.ChatMutation),
                 "BLOCK_BREAK": ("block_break", schema.BlockBreakMutation)}
        if self.type not in kinds:
            raise UsageError(f"{self.type} can be cancelled, but not changed")
        name, cls = kinds[self.type]
        for each in fields.keys() - (known := {each.name for each in cls._prepare()._fields}):
            raise UsageError(f"of {self.type} there is no {each!r} to change, only "
                             f"{', '.join(sorted(known))}{_did_you_mean(each, known)}")
        change = cls(**fields)
        change.encode()                     # a wrong value is told here
        setattr(self.result, name, change)


class RemotePlugin:
    """A plugin program: a blocking client of an engine's ``plugins_listen``.

    Where the host has started it, id, address and token come from the environment. Register
    handlers with ``on``, then ``run``. One thread uses it.

    *packed* ("f32" or "f64") asks for movement as PACKED_MOVEMENT events; *compress* False
    for batches as they are.
    """

    __slots__ = ("id", "version", "commands", "packed", "compress", "boot_id", "closed", "errors",
                 "_address", "_token", "_timeout_s", "_ssl_context", "_handlers", "_sock",
                 "_reader", "_out", "_stepping", "_awaited", "_number", "_ended")

    def __init__(self, plugin_id: str = "", address: str = "", token: str = "", *,
                 version: str = "1.0.0", commands: Mapping[str, str] | None = None,
                 packed: str = "", compress: bool = True, timeout_s: float = 10.0,
                 ssl_context: ssl.SSLContext | None = None) -> None:
        self.id = plugin_id or os.environ.get("HORIZON_PLUGIN_ID", "")
        where = address or os.environ.get("HORIZON_PLUGIN_ADDRESS", "")
        if not self.id or not where:
            raise UsageError("a plugin needs its id and the host's address: RemotePlugin('shop', "
                             "'unix:///path'), or HORIZON_PLUGIN_ID and HORIZON_PLUGIN_ADDRESS")
        if packed not in ("", "f32", "f64"):
            raise UsageError(f'packed is "f32" or "f64", not {packed!r}')
        self._address = plugin_address(where)
        self._token = token or os.environ.get("HORIZON_PLUGIN_TOKEN", "")
        self.version = version
        self.commands = dict(commands or {})        # name: what it does
        self.packed = packed
        self.compress = compress
        self.boot_id = ""                   # of the host: another one after it was started again
        self.closed: str | None = None      # why the connection ended
        self.errors = 0                     # handlers' calls that raised
        self._timeout_s = timeout_s
        self._ssl_context = ssl_context
        self._handlers: dict[str, list[Callable[[PluginEvent], object]]] = {}
        self._sock: socket.socket | None = None
        self._reader: Any = None
        self._out: list[bytes] = []
        self._stepping = False
        self._awaited: dict[str, Callable[[str], object]] = {}      # results of actions
        self._number = 0
        self._ended = False                 # by itself

    def on(self, *types: str) -> Callable[[_F], _F]:
        """Decorate a handler of events: "CHAT", "PLAYER_JOIN", ..., or "ALL"."""
        known = {"ALL", "PACKED_MOVEMENT", *(each.name.upper() for each in
                 builtin_schema().EventEnvelope._fields if each.oneof)}
        for each in types:
            if each not in known:
                raise UsageError(f"there is no event {each!r}{_did_you_mean(each, known)}")

        def decorate(fn: _F) -> _F:
            if _is_async(fn):
                raise UsageError("a handler of a plugin program can't be an async def")
            for each in types:
                self._handlers.setdefault(each, []).append(fn)
            if self._sock is not None:
                self._subscribe()
            return fn

        return decorate

    # -- the connection --

    def connect(self) -> None:
        """Connect and say hello.

        Raises:
            OSError: the host can't be reached.
        """
        kind, where, port = self._address
        if kind == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(self._timeout_s)
        try:
            if kind == "unix":
                sock.connect(where)
            else:
                sock = socket.create_connection((where, port), timeout=self._timeout_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if kind == "tls":
                import ssl
                context = self._ssl_context or ssl.create_default_context()
                sock = context.wrap_socket(sock, server_hostname=where)
        except OSError as error:
            if kind == "unix":
                sock.close()
            if type(error).__module__ != "builtins" or not error.strerror:     # ssl's, say
                raise
            address = f"unix://{where}" if kind == "unix" else f"{kind}://{where}:{port}"
            raise OSError(error.errno, f"{error.strerror}: is there a host at {address}?") from None
        schema = builtin_schema()
        self._sock, self.closed, self.boot_id, self._ended = sock, None, "", False
        self._reader = DelimitedReader(schema.HostToPlugin, _MAX_BATCH)
        self._awaited, self._out = {}, []
        self._send(hello=schema.PluginHello(
            name=self.id, version=self.version, api_version=_API_VERSION, token=self._token,
            uncompressed=not self.compress, commands=[
                schema.CommandSpec(name=name, description=text)
                for name, text in self.commands.items()]))
        self._subscribe()

    def _subscribe(self) -> None:
        wanted = {"PLAYER_MOVE" if each == "PACKED_MOVEMENT" else each for each in self._handlers}
        self._send(subscribe=builtin_schema().EventSubscribe(
            events=sorted(wanted), packed=self.packed))

    def _send(self, **payload: Any) -> None:
        if self._sock is None:
            raise StateError("the plugin is not connected")
        self._out.append(encode_delimited(
            builtin_schema().PluginToHost(plugin_id=self.id, **payload)))
        if not self._stepping:
            self._flush()

    def _flush(self) -> None:
        if self._sock is not None and self._out:
            data, self._out = b"".join(self._out), []
            self._sock.settimeout(self._timeout_s)
            self._sock.sendall(data)

    def close(self, reason: str = "") -> None:
        """Hang up, and let ``run`` return."""
        self._ended, self.closed = True, reason
        if not self._stepping:                  # else after what this step has still to say
            self._hang_up(reason)

    def _hang_up(self, reason: str) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock, self.closed = None, reason

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, reconnect_s: float = 0.0) -> None:
        """Connect, and serve until the host ends the connection; ``closed`` tells why.

        With *reconnect_s* it is tried again, later and later, until the host was away so long.

        Raises:
            OSError: the host can't be reached.
            HandshakeError: it refuses this plugin.
        """
        seen, pause_s, self._ended = time.monotonic(), _FIRST_DELAY_S, False
        while True:
            try:
                self.connect()
                while self.step():
                    seen, pause_s = time.monotonic(), _FIRST_DELAY_S
            except OSError:
                self._hang_up("the connection was lost")
                if time.monotonic() - seen >= reconnect_s:
                    raise
            except HandshakeError:
                if not (reconnect_s and (self.closed or "").startswith("server is ")):
                    raise                       # else it ends at the moment
            if self._ended or time.monotonic() - seen >= reconnect_s:
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_DELAY_S)

    def step(self, timeout: float | None = None) -> bool:
        """Wait for what the host says next, and handle it; False when the connection has ended.

        Raises:
            TimeoutError: nothing came within *timeout* seconds.
            HandshakeError: the host refuses this plugin.
            PeerError: what came is malformed.
        """
        if self._sock is None:
            return False
        self._sock.settimeout(timeout)
        try:
            data = self._sock.recv(_RECV_BYTES)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if not data:
            self._hang_up("the host hung up")
            return False
        self._stepping = True
        try:
            for message in self._reader.each(data):
                if not self._ended:
                    self._take(message)
            self._flush()
            if self._ended:
                self._hang_up(self.closed or "")
        except PeerError:
            self._hang_up("malformed")
            raise
        except OSError:
            self._hang_up("the host hung up")
        finally:
            self._stepping = False
        return self._sock is not None

    def _take(self, message: Any) -> None:
        kind = message.which("payload")
        if kind == "hello":
            self.boot_id = message.hello.boot_id
        elif kind == "shutdown":
            self._hang_up(message.shutdown.reason)
            if not self.boot_id:
                raise HandshakeError(f"the host refuses plugin {self.id!r}: {self.closed}")
            if not self.closed.startswith("server is "):        # type: ignore[union-attr]
                _log.warning("the host has ended plugin %s: %s", self.id, self.closed)
        elif kind == "event":
            self._handle(message.event)
        elif kind == "events":
            self._handle_all(message.events)
        elif kind == "compressed_events":
            packed = message.compressed_events
            self._handle_all(builtin_schema().EventBatch.decode(
                _inflate(packed.data, packed.original_size, "compressed_events")))
        elif kind == "action_result":
            then = self._awaited.pop(message.action_result.correlation_id, None)
            status = message.action_result.status
            if then is not None and status is not None:
                self._call(then, "" if status.ok else status.error or "failed")

    def _handle_all(self, batch: Any) -> None:
        for envelope in batch.events:
            if not self._ended:                 # by a handler of one before
                self._handle(envelope)

    def _handle(self, envelope: Any) -> None:
        handlers = (*self._handlers.get(envelope.type, ()), *self._handlers.get("ALL", ()))
        if not handlers and not envelope.expects_response:
            return
        event = PluginEvent(envelope)
        for handler in handlers:
            self._call(handler, event)
        if envelope.expects_response and self._sock is not None:
            self._send(event_result=event.result)

    def _call(self, fn: Callable[[Any], object], argument: Any) -> None:
        try:
            fn(argument)
        except Exception:
            self.errors += 1
            _log.exception("handler %s of %s failed", getattr(fn, "__qualname__", fn), self.id)

    # -- what it can do --

    def act(self, then: Callable[[str], object] | None = None, **kind: Any) -> None:
        """Ask the host for an action, given as its message: ``act(kick=schema.KickAction(...))``.

        *then* is called when it is done, with what went wrong, or "".
        """
        action = builtin_schema().Action(**kind)
        if then is not None:
            self._number += 1
            action.correlation_id = str(self._number)
            self._awaited[action.correlation_id] = then
        self._send(actions=builtin_schema().ActionBatch(actions=[action]))

    def send_chat(self, message: str, to: str = "",
                  then: Callable[[str], object] | None = None) -> None:
        """Say something to a player, by its id, or to everybody."""
        self.act(then, send_chat=builtin_schema().SendChatAction(target_uuid=to, message=message))

    def teleport(self, player: str, x: float, y: float, z: float,
                 then: Callable[[str], object] | None = None) -> None:
        """Put a player somewhere else."""
        schema = builtin_schema()
        self.act(then, teleport=schema.TeleportAction(
            player_uuid=player, position=schema.Vec3(x=x, y=y, z=z)))

    def kick(self, player: str, reason: str = "",
             then: Callable[[str], object] | None = None) -> None:
        """Disconnect a player."""
        self.act(then, kick=builtin_schema().KickAction(player_uuid=player, reason=reason))

    def log(self, message: str, level: str = "info") -> None:
        """Write a line to the host's log; levels are debug, info, warn and error."""
        self._send(log=builtin_schema().LogMessage(level=level, message=message))


# =============================================================================
# 22  CLI - python -m horizon_lite
# =============================================================================
# Knows: everything above, argv.  The only section that prints.
#
# Exit statuses: 0 fine, 1 failed, 2 usage, 3 bad configuration, 4 address in use.

_WORLD_SIZE = 1000.0
_SLOW_BYTES_PER_S = 6_000.0
_EPILOG = """\
examples:
  python -m horizon_lite                          a moving world at http://127.0.0.1:8080
  python -m horizon_lite serve app.py --port 9000 your own engine file
  python -m horizon_lite load --players 100 --hz 50 --for 10
  python -m horizon_lite map -e 'temp * 9/5 + 32' < data.ndjson
  python -m horizon_lite config --show            every setting, and where it comes from
  python -m horizon_lite proto > horizon.proto    the wire, for other languages
"""


class Stone(Replicated):
    """What the demo's world is full of: told the more often, the nearer it is."""

    layers = (Layer(0, 60, 30, ("position",)), Layer(1, 140, 15, ("position",)),
              Layer(2, 250, 8, ("position", "hue")), Layer(3, 400, 3, ("position",)))
    __slots__ = ("hue", "middle", "radius", "speed", "angle")

    hue: int
    middle: tuple[float, float]     # it goes round this
    radius: float
    speed: float                    # along the circle
    angle: float


class DemoWorld:
    """Simulated players that walk about among stones, and what the page asks of it."""

    def __init__(self, app: Engine, players: int, objects: int = 0) -> None:
        from random import gauss, random, uniform as roll
        self._app, self._roll, self._random = app, roll, random
        self._move, self._turn = app.movement.move, gauss
        # a walker: id, x, y, heading in radians, speed in units a second
        self._walkers: list[list[Any]] = [
            [os.urandom(16), roll(0, _WORLD_SIZE), roll(0, _WORLD_SIZE), roll(-math.pi, math.pi),
             roll(20, 90)] for _ in range(players)]
        self._stones: list[Stone] = []
        self._wanted = objects
        self._ticks = 0
        self._slow: set[str] = set()
        self.fill(objects)
        app.on_client("demo", "density")(self.on_density)
        app.on_client("demo", "slow")(self.on_slow)
        app.every(hz=4)(self.tell)

    def fill(self, count: int) -> None:
        """Have so many stones."""
        while len(self._stones) > count:
            self._app.world.remove(self._stones.pop(self._turned(len(self._stones))))
        while len(self._stones) < count:
            stone, roll = Stone(), self._roll
            stone.middle = (roll(0, _WORLD_SIZE), roll(0, _WORLD_SIZE))
            stone.radius, stone.speed = roll(5, 60), roll(6, 30) * self._turn(0, 1)
            stone.angle, stone.hue = roll(0, math.tau), round(roll(0, 360))
            self._stones.append(stone)
            self._app.world.add(stone, *self._place(stone))

    def _turned(self, count: int) -> int:
        return int(self._random() * count)

    @staticmethod
    def _place(stone: Stone) -> _Position:
        x, y = stone.middle
        return (x + stone.radius * math.cos(stone.angle), y + stone.radius * math.sin(stone.angle),
                0.0)

    def walk(self, seconds: float) -> None:
        """Let everybody walk for *seconds*, turning a little, and back from the walls."""
        for walker in self._walkers:
            player, x, y, heading, speed = walker
            heading += self._turn(0, 2.2) * math.sqrt(seconds)
            x += math.cos(heading) * speed * seconds
            y += math.sin(heading) * speed * seconds
            if not (0 <= x <= _WORLD_SIZE and 0 <= y <= _WORLD_SIZE):
                x, y = min(max(x, 0.0), _WORLD_SIZE), min(max(y, 0.0), _WORLD_SIZE)
                heading = math.atan2(_WORLD_SIZE / 2 - y, _WORLD_SIZE / 2 - x)
            walker[1:4] = x, y, heading
            self._move(player, x, y, 0.0)
        self._ticks += 1
        count = len(self._stones)
        self.fill(min(max(self._wanted, count - 60), count + 60))
        for stone in self._stones[self._ticks % 3::3]:      # each in every third tick
            stone.angle += 3 * seconds * stone.speed / stone.radius
            self._app.world.move(stone, *self._place(stone))
        for _ in range(len(self._stones) // 400 + 1):
            if self._stones:
                stone = self._stones[self._turned(len(self._stones))]
                self._app.emit_gorc(stone, 1, "flash")

    def on_density(self, event: Event) -> None:
        """Change how many stones there are, for everybody."""
        count = event.data.get("count") if isinstance(event.data, dict) else None
        if type(count) is not int or not 100 <= count <= 5_000:
            return event.cancel("count is 100 to 5000")
        self._wanted = count                    # a few a tick: a slider says it often

    def on_slow(self, event: Event) -> None:
        """Give a client little bandwidth, or all it wants."""
        on = event.data.get("on") if isinstance(event.data, dict) else None
        if type(on) is not bool:
            return event.cancel('say {"on": true or false}')
        self._app.world.limit(event.client.id, _SLOW_BYTES_PER_S if on else None)
        (self._slow.add if on else self._slow.discard)(event.client.id)

    def tell(self) -> None:
        """Tell every client on the page how the world and itself are doing."""
        app = self._app
        self._slow &= app.sessions.keys()
        ticks = list(app._tick_ns)[-25:] or [0]
        figures = {"objects": len(self._stones), "wanted": self._wanted, "at": time.time(),
                   "tick_ms": round(sum(ticks) / len(ticks) / 1e6, 3),
                   "budget_ms": round(1000 / app.config.tick_hz, 3),
                   "layers": {each.channel: {"radius": each.radius, "hz": each.hz}
                              for each in Stone.layers}}
        for client in list(app.sessions.values()):
            if app.world.observes(client.id) and not client.backlog:
                client.send({"namespace": "demo", "event": "figures", "data": {
                    **figures, **app.world.stats(client.id), "slow": client.id in self._slow}})


def _add_chat(app: Engine) -> None:
    """Give the page's chat line somebody to talk to, and HTML to show it in."""
    app.topic("chat.lobby", history=50, ttl=3600, replay="all")

    @app.html("presence")
    def online() -> str:
        return html('<p id="online">{count} online: {users}</p>', count=app.presence.online(),
                    users=", ".join(app.presence.users()[:100]))

    @app.html("chat.lobby")
    def log() -> str:
        lines = [html("<li><b>{line[from]}</b> {line[text]}</li>", line=each.payload)
                 for each in app.topics.history("chat.lobby")]
        return html('<ul id="log">{lines}</ul>', lines=lines)

    @app.get("/html", public=True)
    def page(request: Request) -> Response:
        return Response(HTML_PAGE, content_type="text/html; charset=utf-8")

    @app.on_client("chat", "message")
    def chat(event: Event) -> None:
        text = event.data.get("text") if isinstance(event.data, dict) else None
        if not isinstance(text, str) or not text.strip():
            return event.cancel('say something: {"text": "..."}')
        app.publish("chat.lobby", {"from": event.client.user, "text": text[:300]}, critical=True)

    @app.on("plugin:*:send_chat")
    def said(event: Event) -> None:
        if not event.data.get("target_uuid"):
            app.publish("chat.lobby", {"from": event.key.split(":")[1],
                                       "text": event.data.get("message", "")[:300]}, critical=True)


def _banner(app: Engine, what: str) -> None:
    url = app.url
    print(f"horizon_lite {__version__}  pid {os.getpid()}  Python {sys.version.split()[0]}"
          f"  profile {app.config.profile}")
    print(f"listening {url}{app._moved_text()}")
    if url.startswith("http"):              # of a Unix socket there are no addresses to click on
        print(f"  page       {url}/\n"
              f"  websocket  {url.replace('http', 'ws', 1)}/ws/data\n"
              f"  metrics    {url}/metrics")
    for stream in app.stream:
        print(f"  stream     {stream.name}: {', '.join(stream.patterns)} -> "
              f"{len(stream.rules)} mapping{'s' * (len(stream.rules) != 1)}")
    print(f"{what}  Ctrl-C stops.", flush=True)


def _serve_engine(app: Engine, what: str) -> int:
    app._set_up_logging()
    app._must_be_unstarted()
    app._run_until_signal(lambda: _banner(app, what))
    print("stopped", flush=True)
    return 0


def _said(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given as flags."""
    return {key: value for key, value in vars(args).items() if key in _CONFIG_TYPES}


def _demo(args: argparse.Namespace) -> int:
    """Run a world of simulated players."""
    app = Engine(Config.load(args.config, **_said(args)))
    world = DemoWorld(app, args.players, args.objects)
    hz = app.config.tick_hz
    if not hz:
        raise ConfigError("the demo's players walk at every tick; tick_hz can't be 0")
    _add_chat(app)
    app.on_core("server_tick")(lambda event: world.walk(1 / hz))
    return _serve_engine(app, f"world: {args.players} players walk about among {args.objects} "
                         f"stones at {hz:g} ticks/s.")


def _serve(args: argparse.Namespace) -> int:
    """Run the user's engine, or a plain one."""
    if args.app is None:
        app = Engine(Config.load(args.config, **_said(args)))
        _add_chat(app)
        return _serve_engine(app, f"an empty world at {app.config.tick_hz:g} ticks/s.")
    if args.config is not None:
        raise ConfigError("--config is for a server without an app; "
                          "the app says hl.Engine(hl.Config.load(...))")
    ran: list[Engine] = []
    undo: list[Callable[[], object]] = []       # of what the file registers

    def run(app: Engine) -> None:       # also for files that call app.run() themselves
        if ran:                         # the file is read again, so far
            raise _Enough
        ran.append(app)
        if said := _said(args):
            app.configure(**said)
        if app.config.reload and args.app.partition(":")[0].endswith(".py"):
            _Served(app, args.app, undo).watch()
        elif app.config.reload:
            _log.warning("only the files of plugins are watched; say serve app.py to have that "
                         "file read again, too")
        _serve_engine(app, f"serving {args.app}.")

    original, Engine.run = Engine.run, run      # type: ignore[method-assign, assignment]
    Engine._undo = undo
    try:
        module = import_target(args.app)
        if not ran:
            run(_find_engine(module, args.app))
    finally:
        Engine.run = original           # type: ignore[method-assign]
        Engine._undo = None
    return 0


class _Enough(BaseException):
    """Ends the reading of a file where it runs its engine: that one runs already."""


def _own_modules(app: Engine, target: str) -> dict[str, ModuleType]:
    """Return the modules that the user's file consists of: those of its folder.

    Without those of plugins, which are loaded anew by themselves.
    """
    folder = os.path.dirname(os.path.abspath(target.partition(":")[0])) + os.sep
    others = {"__main__", *app.plugins.modules()}
    return {name: each for name, each in list(sys.modules.items())
            if name not in others and each is not sys.modules[__name__]
            and (path := os.path.abspath(getattr(each, "__file__", None) or "")).endswith(".py")
            and path.startswith(folder) and "site-packages" not in path}


class _Served:
    """The user's file, that is read again when it, or what it imports beside it, has changed.

    What it registered before goes then; if it can't be run, that stays.
    """

    __slots__ = ("app", "target", "undo")

    def __init__(self, app: Engine, target: str, undo: list[Callable[[], object]]) -> None:
        self.app = app
        self.target = target
        self.undo = undo                # of what is registered; Engine._undo is this list

    def watch(self, *more: str) -> None:
        """Have the files watched that it consists of."""
        for path in {self.target.partition(":")[0], *more, *(
                str(each.__file__) for each in _own_modules(self.app, self.target).values())}:
            self.app.plugins.watch(path, self.again)

    def again(self) -> None:
        """Run the file again, for the engine that runs."""
        from importlib.util import cache_from_source
        here: Any = sys.modules[__name__]
        app, kind, modules = self.app, Engine, _own_modules(self.app, self.target)
        guards, more, made = (app._guarded, app._ruled), [self.target.partition(":")[0]], 0

        class Same(kind):               # type: ignore[valid-type, misc]
            def __new__(cls, *_: Any, **__: Any) -> Any:    # what hl.Engine() makes in the file
                nonlocal made
                made += 1
                if made > 1:
                    raise StateError("a file with several engines can't be read again")
                return app

        for name, module in modules.items():
            del sys.modules[name]
            with contextlib.suppress(OSError):      # its bytecode may be as old as this second
                os.unlink(cache_from_source(str(module.__file__)))
        old, self.undo = self.undo, []
        here.Engine, kind._undo, app.plugins.replacing = Same, self.undo, True
        try:
            with contextlib.suppress(_Enough):
                import_target(self.target)
            _log.info("%s has changed, and was read again", self.target)
        except (Exception, SystemExit) as error:
            _log.exception("%s has changed, but what it was stays", self.target)
            more += _files_of(error)
            sys.modules.update(modules)
            old, self.undo = self.undo, old
            kind._undo = self.undo
            app._guarded, app._ruled = guards
        finally:
            here.Engine = kind
        for each in reversed(old):
            try:
                each()
            except Exception:
                _log.exception("what %s registered can't be removed", self.target)
        app.plugins.confirm()
        self.watch(*more)


def _files_of(error: BaseException) -> list[str]:
    """Return the files that an error came through, for that they may be mended."""
    paths, trace = [getattr(error, "filename", None)], error.__traceback__
    while trace is not None:
        paths.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return [each for each in paths if isinstance(each, str) and os.path.isfile(each)]


def _find_engine(module: ModuleType, target: str) -> Engine:
    """Return the Engine of *module*: the one that is named, ``app``, or the only one."""
    attribute = target.partition(":")[2]
    engines = {name: each for name, each in vars(module).items() if isinstance(each, Engine)}
    found = getattr(module, attribute or "app", None)
    if found is None and not attribute and len(engines) == 1:
        (found,) = engines.values()
    if not isinstance(found, Engine):
        hint = f"; it has {', '.join(engines)}" if engines else "; write app = hl.Engine()"
        raise UsageError(f"{target} has no Engine {attribute or 'app'!r}{hint} (say module:name)")
    return found


def _print_config(args: argparse.Namespace) -> int:
    """Print every setting as a server would have it; with --show also where it comes from."""
    said = _said(args)
    config = Config.load(args.config, **said)
    layers = _layers(args.config, None, said)
    for name in _CONFIG_TYPES:
        value = getattr(config, name)
        shown = json.dumps(list(value) if isinstance(value, tuple) else value)
        if name == "plugins_token" and value:
            shown = '"..."'                 # a secret: terminals are seen, and logs are kept
        origin = next((where for where, layer in reversed(layers) if name in layer), "default")
        if origin == "said":
            origin = f"--{name.replace('_', '-')}" if name in said else "--port"
        elif origin == "environment" and f"HORIZON_{name.upper()}" in os.environ:
            origin = f"HORIZON_{name.upper()}"
        print(f"{name + ' = ' + shown:<40}  # {origin}" if args.show else f"{name} = {shown}")
    return 0


def _print_proto(args: argparse.Namespace) -> int:
    """Print the built-in schema, or files in one form; with --check only what is wrong."""
    if not args.files:
        print("builtin.proto: ok\n" if args.check else builtin_proto(), end="")
    wrong = 0
    for path in args.files:
        try:
            file = _read_proto(path, args.include)
        except SchemaError as error:
            print(f"horizon_lite: {error}", file=sys.stderr)
            wrong = 2
            continue
        if args.check:
            print(f"{path}: ok, {len(file.types)} top-level types"
                  f"{''.join(f', service {name}' for name in file.services)}")
        else:
            print(_file_text(file), end="" if path == args.files[-1] else "\n")
    return wrong


# -- the load test --

class _Player(Client):
    """One client of the load test; what all of them get is counted there."""

    __slots__ = ("load", "id", "decodes", "sent_ns", "_latest")

    def __init__(self, load: _Load, decodes: bool) -> None:
        self.load = load
        self.decodes = decodes              # everything, not only the counts
        self.sent_ns: list[int] = []        # when each move left; its number travels as z
        self._latest: dict[bytes, float] = {}       # of each player, the last move seen
        super().__init__(load.url, "proto", _Options())
        try:
            self.subscribe(load.topic)
        except UsageError as error:
            raise HandshakeError(f"the server turned a player away: {error}") from None
        self.emit("system", "hello")
        hello = next((envelope.topic_message for envelope in iter(lambda: self.recv(10.0), None)
                      if envelope.which("payload") == "topic_message"), None)
        if hello is None:
            raise HandshakeError(f"the server closed: {self.closed}")
        self.id = bytes.fromhex(json.loads(hello.payload)["data"]["id"].replace("-", ""))

    def _write(self, data: bytes) -> None:
        """Send all of *data*; a full socket is waited for, and counted."""
        sock, sent = self._sock, 0
        try:
            with contextlib.suppress(BlockingIOError):
                sent = sock.send(data)
            if sent < len(data):
                self.load.blocked += 1
                sock.settimeout(10.0)
                sock.sendall(data[sent:])
                sock.setblocking(False)
        except OSError as error:
            raise HandshakeError(f"the server hung up: {error}") from None

    def receive(self, _mask: int) -> None:
        """Count what arrived, and check that the counts are true."""
        with contextlib.suppress(BlockingIOError):
            data = self._sock.recv(_RECV_BYTES)
            if not data:
                raise HandshakeError("the server hung up")
            self._ws.receive(data)
        for event in self._ws.take_events():
            if isinstance(event, bytes):
                self.load.frames += 1
                for envelope in builtin_schema().EventBatch.decode(event).events:
                    self._count(envelope)
            elif isinstance(event, Ping):
                self._send(self._ws.send_pong, event.data)
            elif isinstance(event, Close):
                raise HandshakeError(f"the server closed: {event.code} {event.reason}")

    def _count(self, envelope: Any) -> None:
        kind, load = envelope.which("payload"), self.load
        if kind == "packed_movement":
            data = envelope.packed_movement.data
            count = int.from_bytes(data[:4], "little")
            if len(data) != 4 + 28 * count:
                raise WireError("a block's length does not match its count")
            load.events += count
            if self.decodes:
                self._decode(data)
        elif kind == "topic_message":
            load.events += 1
            load.heard += envelope.topic_message.topic == load.topic
        elif kind == "reply":
            load.accepted += envelope.reply.ok
            load.refused += not envelope.reply.ok

    def _decode(self, data: bytes) -> None:
        now = time.monotonic_ns()
        for player, (_, _, number) in unpack_moves(data).items():
            sent_ns = self.load.sent_ns.get(player, ())
            if 0 < number <= len(sent_ns) and number != self._latest.get(player):
                self._latest[player] = number
                self.load.latencies_ns.append(now - sent_ns[int(number) - 1])


_PATIENCE_S = 2.0                   # for what is under way when the time is over
_LOAD_TEXT = """\
players         {players} at {hz:g} moves/s for {seconds:g} s
events sent     {events_sent:,}   ({critical_sent} critical)
events received {events_received:,}   in {frames_received:,} frames, {events_per_frame:g} per frame
lost            {lost}   (server drops {server_drops}, coalesced {coalesced:,})
latency ms      p50 {p50:g}   p95 {p95:g}   p99 {p99:g}   max {max:g}
tick overruns   {overruns} of {ticks:,}
server          {server_cpu_s:g} s CPU, {server_rss_mb:g} MB resident"""


class _Load:
    """Seed 000's load test: players that move at a rate, over real sockets."""

    text = _LOAD_TEXT

    def __init__(self, url: str, players: int, hz: float, seconds: float) -> None:
        self.url = url
        self.hz = hz
        self.seconds = seconds
        self.topic = f"load.{os.urandom(4).hex()}"
        self.sent = self.criticals = 0      # moves, and critical messages, that left
        self.accepted = self.refused = 0    # answers to the critical ones
        self.frames = self.events = 0       # what arrived,
        self.heard = 0                      # and of it the critical ones
        self.blocked = 0
        self.latencies_ns: list[int] = []
        self.players = [_Player(self, decodes=number % 10 == 0) for number in range(players)]
        self.sent_ns = {player.id: player.sent_ns for player in self.players}

    def run(self, show: bool) -> None:
        """Drive all players for the time that was asked, then wait for what is under way.

        Raises:
            HorizonError, OSError: a player was disconnected.
        """
        loop = Loop()
        for player in self.players:
            player.subscribe("world.moves", packed="f32")
            player._sock.setblocking(False)
            loop.selector.register(player._sock, _READ, player.receive)
        began = time.monotonic()
        per_s = self.hz * len(self.players)
        while (spent := time.monotonic() - began) < self.seconds:
            while self.sent < int(spent * per_s):
                self._send_next()
            loop.run_once(min((self.sent + 1) / per_s, self.seconds) - spent)
            if show and self.sent % 500 < 20:
                print(f"\r{spent:5.1f} s of {self.seconds:g}   {self.sent:,} moves sent   "
                      f"{self.frames:,} frames received", end="", file=sys.stderr, flush=True)
        missing, patience = self._missing(), time.monotonic() + _PATIENCE_S
        while missing and time.monotonic() < patience:
            loop.run_once(0.05)
            before, missing = missing, self._missing()
            if missing != before:           # still coming in
                patience = time.monotonic() + _PATIENCE_S
        for player in self.players:
            player._sock.setblocking(True)
            player.close()

    def _send_next(self) -> None:
        """Let the next player in turn make a step; now and then one says something critical."""
        schema = builtin_schema()
        turn, seat = divmod(self.sent, len(self.players))
        player, angle = self.players[seat], (turn + 1) / 50 + seat
        move = schema.PlayerMoveEvent(x=500 + 400 * math.cos(angle), y=500 + 400 * math.sin(angle),
                                      z=turn + 1.0)
        player.sent_ns.append(time.monotonic_ns())
        player.send_envelope(player_move=move)
        if self.sent % max(1, int(self.hz * len(self.players) / 10)) == 0:
            self.criticals += 1
            player.send_envelope(request=schema.ClientRequest(
                id=str(self.criticals), action="publish", topic=self.topic,
                payload=b'{"n":%d}' % self.criticals, critical=True))
        self.sent += 1

    def _missing(self) -> int:
        """Return how many accepted critical messages have not arrived everywhere."""
        unanswered = self.criticals - self.accepted - self.refused
        return unanswered + self.accepted * len(self.players) - self.heard

    def result(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return the figures; *before* and *after* are the server's reports."""
        return {
            **_figures(self, self.players, before, after, self._missing()),
            "events_sent": self.sent + self.criticals, "events_received": self.events,
            "events_per_frame": round(self.events / max(self.frames, 1), 1),
            "critical_sent": self.criticals, "critical_received": self.heard,
            "coalesced": after["drops"]["coalesced"] - before["drops"]["coalesced"],
            "latency_samples": len(self.latencies_ns), "sends_blocked": self.blocked}


def _figures(load: _Load | _HtmlLoad, clients: list[Any], before: dict[str, Any],
             after: dict[str, Any], missing: int) -> dict[str, Any]:
    """Return what every load test measures; the reports are the server's."""
    latencies = sorted(load.latencies_ns)

    def latency_ms(part: float) -> float | None:
        at = int((len(latencies) - 1) * part)
        return round(latencies[at] / 1e6, 3) if latencies else None

    def grown(group: str, key: str) -> Any:
        return after[group][key] - before[group][key]

    drops = grown("drops", "dropped") + grown("drops", "slow_closed")
    return {
        "players": len(clients), "hz": load.hz, "seconds": load.seconds,
        "frames_received": load.frames, "lost": missing + drops, "server_drops": drops,
        "latency_ms": {"p50": latency_ms(0.5), "p95": latency_ms(0.95), "p99": latency_ms(0.99),
                       "max": latency_ms(1.0)},
        "overruns": grown("tick", "overruns"), "ticks": grown("tick", "count"),
        "server_cpu_s": round(after["cpu_s"] - before["cpu_s"], 3),
        "server_rss_mb": after["memory"]["rss_mb"]}


class _HtmlReader(Client):
    """One client of the HTML load test: it has the page, and talks now and then."""

    __slots__ = ("load", "said")

    def __init__(self, load: _HtmlLoad) -> None:
        self.load = load
        self.said: deque[tuple[int, str]] = deque()         # when, and what to look for
        super().__init__(load.url, "json", _Options())

    def receive(self, _mask: int) -> None:
        """Count the fragments that arrived, and look for one's own words."""
        data = self._sock.recv(_RECV_BYTES)
        if not data:
            raise HandshakeError("the server hung up")
        self._ws.receive(data)
        for event in self._ws.take_events():
            if isinstance(event, Ping):
                self._send(self._ws.send_pong, event.data)
            elif isinstance(event, Close):
                raise HandshakeError(f"the server closed: {event.code} {event.reason}")
            elif isinstance(event, str) and event.startswith("<"):
                self.load.frames += 1
                self.load.fragments += 1 + event.count("\n<")
                while self.said and self.said[0][1] in event:
                    self.load.latencies_ns.append(time.monotonic_ns() - self.said.popleft()[0])


class _HtmlLoad:
    """Seed 004's load test: readers of ``/app/ws/html`` that talk, *hz* lines a second in all."""

    text = """\
readers         {players} for {seconds:g} s, {hz:g} lines/s by all of them
lines said      {events_sent:,}   seen by who said them {events_seen:,}
fragments       {fragments_received:,}   in {frames_received:,} frames
lost            {lost}   (server drops {server_drops})
latency ms      p50 {p50:g}   p95 {p95:g}   p99 {p99:g}   max {max:g}
tick overruns   {overruns} of {ticks:,}
server          {server_cpu_s:g} s CPU, {server_rss_mb:g} MB resident"""

    def __init__(self, url: str, players: int, hz: float, seconds: float) -> None:
        self.url = url.rstrip("/") + "/app/ws/html"
        self.hz = hz
        self.seconds = seconds
        self.sent = self.frames = self.fragments = 0
        self.latencies_ns: list[int] = []
        self.readers = [_HtmlReader(self) for _ in range(players)]

    def run(self, show: bool) -> None:
        """Let readers talk in turn for the time that was asked, then wait for the last words.

        Raises:
            HorizonError, OSError: a reader was disconnected.
        """
        loop = Loop()
        for reader in self.readers:
            loop.selector.register(reader._sock, _READ, reader.receive)
        began = time.monotonic()
        while (spent := time.monotonic() - began) < self.seconds + _PATIENCE_S:
            while spent < self.seconds and self.sent < spent * self.hz:
                self._say_next()
            if spent > self.seconds and not (self.fragments and any(
                    each.said for each in self.readers)):
                break
            loop.run_once(min((self.sent + 1) / self.hz - spent, 0.1))
        for reader in self.readers:             # without waiting for a server that may be stuck
            reader._lose(Close(1000, ""), reader._ws.send_close(1000))
        if not self.fragments:
            raise HandshakeError(f"no fragment came from {self.url}: has the server an @app.html?")

    def _say_next(self) -> None:
        reader = self.readers[self.sent % len(self.readers)]
        text = f"line {self.sent} of {os.urandom(4).hex()}"
        reader.said.append((time.monotonic_ns(), text))
        reader.send({"namespace": "chat", "event": "message", "text": text})
        self.sent += 1

    def result(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return the figures; *before* and *after* are the server's reports."""
        unseen = sum(len(each.said) for each in self.readers)
        return {**_figures(self, self.readers, before, after, unseen), "events_sent": self.sent,
                "events_seen": len(self.latencies_ns), "fragments_received": self.fragments}


def _fetch_report(url: str) -> Any:
    import http.client              # not urllib, which would ask a proxy
    host, port, _, secure = _split_url(url)
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    with contextlib.closing(kind(host, port, timeout=10)) as connection:
        try:
            connection.request("GET", "/stats.json")
            return json.load(connection.getresponse())
        except (http.client.HTTPException, ValueError) as error:
            raise HandshakeError(f"{url} has no /stats.json: {error}") from None


@contextlib.contextmanager
def _own_server(hz: float) -> Iterator[str]:
    """Start a server in a process of its own; yield its address."""
    import subprocess
    command = [sys.executable, os.path.abspath(__file__), "serve", "--port", "0", "--tick-hz", "50",
               "--max-messages-per-s", str(max(120, int(hz * 4)))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = map(str.split, process.stdout or ())
            url = next((words[1] for words in said if words[:1] == ["listening"]), None)
            if url is None:
                raise HorizonError("the server did not start")
            yield url
        finally:
            process.terminate()


def _load(args: argparse.Namespace) -> int:
    """Run the load test and say what it measured."""
    _raise_file_limit()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _own_server(args.hz) if args.url is None else contextlib.nullcontext(args.url) as url:
        try:
            kind = _HtmlLoad if args.endpoint == "html" else _Load
            load = kind(url, args.players, args.hz, args.seconds)
        except OSError as error:
            raise HandshakeError(f"{url}: {error.strerror or error}") from None
        before = _fetch_report(url)
        show = sys.stderr.isatty() and not args.json
        load.run(show)
        result = load.result(before, _fetch_report(url))
    if show:
        print("\r\033[K", end="", file=sys.stderr)
    latency = {name: math.nan if value is None else value
               for name, value in result["latency_ms"].items()}
    print(json.dumps(result) if args.json else load.text.format(**result, **latency))
    return 1 if result["lost"] else 0


# -- mapping lines --

_CHUNK = 1 << 16                    # bytes of input that are read together, if they are there
_LINES_AT_ONCE = 100                # lines that are mapped before they are written
_ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
         if hasattr(signal, name)]
_MAX_AHEAD = 4                      # chunks that may wait for one worker
_LINE_HEAD = re.compile(rb'\{"topic": ?"([^"\\]+)", ?"payload": ?\{"value": ?[-+.\deE]+, ?'
                        rb'"timestamp_ms": ?\d+\}\}\s*$')


class _ExpressionLines:
    """Maps lines of JSON to values of an expression, whose variables are their fields."""

    __slots__ = ("expression", "lines", "failed", "_told_s")
    every_s, file = math.inf, ""

    def __init__(self, text: str) -> None:
        self.expression = Expression(text)
        self.lines = 0
        self.failed: Counter[str] = Counter()
        self._told_s = -math.inf

    def feed(self, lines: Iterable[bytes]) -> bytes:
        """Return the lines that come of these."""
        out = []
        for line in lines:
            self.lines += 1
            try:
                value = _parsed(line)
                fields = value if isinstance(value, dict) else {"value": value}
                result = self.expression(**{"this": value, **fields})
                out.append(_value_text(result).encode() + b"\n")
            except Exception as error:
                self._fail(error)
        return b"".join(out)

    def _fail(self, error: Exception) -> None:
        if (reason := _reason_of(error)) == "waiting":
            return
        self.failed[reason] += 1
        if time.monotonic() - self._told_s >= 1:
            self._told_s = time.monotonic()
            _log.warning("line %d: %s", self.lines, _why(error))

    def save(self) -> None:
        """Keep nothing."""


class _StreamLines:
    """Maps lines {"topic", "payload", "metadata"?} by a stream, to such lines."""

    __slots__ = ("stream", "lines", "file", "every_s", "numbered")

    def __init__(self, config: Mapping[str, Any] | str, numbered: bool = True) -> None:
        self.stream = Stream(config)
        self.lines = 0
        self.numbered = numbered        # a worker does not know what line it has
        self.file, self.every_s = self.stream.state_file, self.stream.state_every_s

    @property
    def failed(self) -> Counter[str]:
        """Lines, and mappings of one, that failed, by reason."""
        dropped = {reason: count for reason, count in self.stream.dropped.items()
                   if reason != "no_output"}
        return self.stream.errored + Counter(dropped)

    def feed(self, lines: Iterable[bytes]) -> bytes:
        """Return the lines that come of these."""
        out = []
        for line in lines:
            self.lines += 1
            self.stream.where = f"line {self.lines}: " if self.numbered else ""
            for output in self._map(line):
                told = output.metadata.keys() != {"umh_topic"}
                more = b',"metadata":%b' % _json_bytes(output.metadata) if told else b""
                out.append(b'{"topic":%b,"payload":%b%b}\n' % (
                    _topic_json(output.topic), output.payload, more))
        return b"".join(out)

    def _map(self, line: bytes) -> list[Output]:
        try:
            topic, payload, metadata = _addressed(_parsed(line))
            _admit(metadata)
        except _Stop as error:
            self.stream.processed += 1
            self.stream.refuse(error)
            return []
        act = self.stream.process if isinstance(payload, str) else self.stream.accept
        return act(topic, payload, metadata)

    def save(self) -> None:
        """Write the state, if it has a file."""
        if self.file:
            self.stream.save()


def _addressed(said: Any) -> tuple[Any, Any, Any]:
    """Return a line's topic, payload and metadata; the payload may be the line itself."""
    if not isinstance(said, dict):
        raise _Stop(f'a line is {{"topic", "payload"}}, not {_kind_of(said)}', "not_object")
    payload = said["payload"] if "payload" in said else said
    return said.get("topic"), payload, said.get("metadata")


@functools.cache
def _lines_of_worker(path: str) -> _StreamLines:
    config = _read_stream(path)
    return _StreamLines({**config, "state_file": ""}, numbered=False)


def _begin_worker(path: str, state: Any, parent: int) -> None:
    """Begin with the state of the worker's matches; end with the process that began it."""
    if state is not None:
        _lines_of_worker(path).stream.restore(state)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: None if os.getppid() == parent else os._exit(1))
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)


def _feed_worker(path: str, lines: bytes) -> tuple[bytes, int, Counter[str]]:
    """Map lines in a worker's process; return also what it has counted so far."""
    mapper = _lines_of_worker(path)
    return mapper.feed(lines.split(b"\n")), mapper.lines, mapper.failed


def _worker_state(path: str) -> Any:
    return _lines_of_worker(path).stream.snapshot()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Hold signals that end a program back until the end of the block; they are not lost."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing.resource_tracker import ensure_running
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        ensure_running()                # which lets some of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WorkerLines:
    """Maps lines in several processes; those of one match in one of them, in their order."""

    __slots__ = ("file", "every_s", "_path", "_stream", "_pools", "_waiting", "_counts", "_write",
                 "_trouble")

    def __init__(self, path: str, count: int, write: Callable[[bytes], object]) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        config = _read_stream(path)
        self._stream = Stream({**config, "state_file": ""})
        if self._stream._shared:
            raise UsageError(
                f"--workers: {', '.join(self._stream._shared)} has no wildcard and belongs to all "
                "matches; only mappings whose sources have the same wildcards can be divided")
        self.file, self.every_s = str(config.get("state_file") or ""), self._stream.state_every_s
        self._path, self._write = path, write
        self._trouble: OSError | None = None            # with what is written
        self._counts: list[tuple[int, Counter[str]]] = [(0, Counter())] * count
        with _held_back():              # workers inherit it: only this process heeds signals
            self._pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                           for _ in range(count)]
            self._waiting = [deque([pool.submit(_begin_worker, path, None, os.getpid())])
                             for pool in self._pools]
        if self.file:
            _take_state(self.file, self._share_out)

    def _share_out(self, state: Any) -> None:
        shares = [[each for each in state["matches"] if self._owner(each["match"]) == n]
                  for n in range(len(self._pools))]
        for share, pool in zip(shares, self._pools):
            pool.submit(_begin_worker, self._path, {**state, "matches": share},
                        os.getpid()).result()

    @property
    def lines(self) -> int:
        """How many are mapped."""
        return sum(lines for lines, _ in self._counts)

    @property
    def failed(self) -> Counter[str]:
        """Lines, and mappings of one, that failed, by reason."""
        return sum((failed for _, failed in self._counts), Counter())

    def _owner(self, key: Sequence[str]) -> int:
        return zlib.crc32(".".join(key).encode()) % len(self._pools)

    def _worker_of(self, line: bytes) -> int:
        try:
            if head := _LINE_HEAD.match(line):          # as we write them: the rest is the worker's
                topic = head[1].decode()
            else:
                topic, _, metadata = _addressed(_parsed(line))
                topic = (metadata or {}).get("umh_topic") if topic is None else topic
            return self._owner(self._stream._find(topic)[2])
        except Exception:           # whoever gets it says what is wrong
            return 0

    def feed(self, lines: Iterable[bytes]) -> bytes:
        """Hand lines to their workers; what comes of them is written as it comes."""
        if self._trouble is not None:
            raise self._trouble
        shares: list[list[bytes]] = [[] for _ in self._pools]
        for line in lines:
            shares[self._worker_of(line)].append(line)
        for n, share in enumerate(shares):
            if share:
                while len(self._waiting[n]) >= _MAX_AHEAD:
                    self._waiting[n].popleft().result()
                future: Future[Any] = self._pools[n].submit(
                    _feed_worker, self._path, b"\n".join(share))
                self._waiting[n].append(future)
                future.add_done_callback(functools.partial(self._done, n))
        return b""

    def _done(self, n: int, future: Future[Any]) -> None:
        if not (future.cancelled() or future.exception()):
            data, *counts = future.result()
            self._counts[n] = counts[0], counts[1]
            try:
                self._write(data)
            except OSError as error:            # this is no place to raise it
                self._trouble = error

    def save(self) -> None:
        """Wait for what is under way, and write the state of all, if it has a file."""
        for waiting in self._waiting:
            while waiting:
                waiting.popleft().result()
        if self.file:
            states = [pool.submit(_worker_state, self._path).result() for pool in self._pools]
            _write_state(self.file, {**states[0], "matches": [
                each for state in states for each in state["matches"]]})
        if self._trouble is not None:
            raise self._trouble

    def close(self) -> None:
        """End the workers."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


class _Lines:
    """Lines of stdin, a few at a time, as they come; of one that is too long only a part.

    A signal ends it between them: what is mapped is also written.
    """

    __slots__ = ("ended_by", "_reading")

    def __init__(self) -> None:
        self.ended_by = 0
        self._reading = False
        for each in _ENDS:
            signal.signal(each, self._end)

    def _end(self, number: int, _frame: Any) -> None:
        again, self.ended_by = self.ended_by, number
        if self._reading or again:
            sys.exit(128 + number)

    def __iter__(self) -> Iterator[list[bytes]]:
        rest, first = b"", True
        while data := self._read():
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:_MAX_PAYLOAD + 1]
            if lines and first:
                lines[0], first = lines[0].removeprefix(codecs.BOM_UTF8), False
            lines = [line for line in lines if line.strip()]
            for at in range(0, len(lines), _LINES_AT_ONCE):
                yield lines[at:at + _LINES_AT_ONCE]
                if self.ended_by:
                    sys.exit(128 + self.ended_by)
        if rest.strip():
            yield [rest.removeprefix(codecs.BOM_UTF8) if first else rest]

    def _read(self) -> bytes:
        self._reading = True
        try:
            return os.read(0, _CHUNK)
        finally:
            self._reading = False


def _map(args: argparse.Namespace) -> int:
    """Map lines of JSON from stdin to lines on stdout."""
    if (args.expression is None) == (args.config is None):
        raise UsageError("say -e EXPRESSION, for lines of fields, or --config FILE, for messages")
    if args.config is None and (args.check or args.workers > 1):
        raise UsageError("--check and --workers are for a --config FILE")
    if sys.stdout is None:
        raise OSError("stdout is closed")
    try:
        return _check_mapping(args.config) if args.check else _map_lines(args)
    except ExpressionError as error:
        if args.config is None:
            raise
        raise ConfigError(str(error)) from None


def _map_lines(args: argparse.Namespace) -> int:
    from concurrent.futures import BrokenExecutor
    written, out = 0, sys.stdout.buffer

    def write(data: bytes) -> None:
        nonlocal written
        written += len(data)
        out.write(data)
        out.flush()

    mapper: Any = (_ExpressionLines(args.expression) if args.config is None else
                   _StreamLines(args.config) if args.workers < 2 else
                   _WorkerLines(args.config, args.workers, write))
    show, input_lines = _Progress(mapper), _Lines()
    try:
        try:
            saved = time.monotonic()
            for lines in input_lines:
                write(mapper.feed(lines))
                if time.monotonic() - saved >= mapper.every_s and mapper.file:
                    saved = time.monotonic()
                    mapper.save()
                show.now_and_then()
        finally:
            mapper.save()
    except BrokenExecutor:
        raise HorizonError("a worker has ended, and its state since the last save") from None
    finally:
        if args.workers > 1:
            mapper.close()
        show.at_end()
    return 1 if mapper.failed.total() >= mapper.lines > 0 == written else 0


class _Progress:
    """Says on a terminal how far the mapping of lines is; and everywhere what has failed."""

    __slots__ = ("mapper", "began", "shown", "clear")

    def __init__(self, mapper: Any) -> None:
        self.mapper = mapper
        self.began = self.shown = time.monotonic()
        self.clear = "\r\033[K" if sys.stderr is not None and sys.stderr.isatty() else ""

    def now_and_then(self) -> None:
        """Say it, twice a second."""
        if self.clear and time.monotonic() - self.shown >= 0.5:
            self.shown = time.monotonic()
            print(self.clear + self._text(), end="", file=sys.stderr, flush=True)

    def at_end(self) -> None:
        """Say it for the last time."""
        if self.clear or self.mapper.failed and sys.stderr is not None:
            print(self.clear + self._text(), file=sys.stderr)

    def _text(self) -> str:
        lines, failed = self.mapper.lines, self.mapper.failed
        rate = lines / max(time.monotonic() - self.began, 0.001)
        faults = ", ".join(f"{reason} {count}" for reason, count in failed.most_common())
        return (f"{lines:,} line{'s' * (lines != 1)}, {rate:,.0f}/s"
                + (f"; failures: {faults}" if failed else ""))


# -- tests of a mapping --

def _check_mapping(path: str) -> int:
    """Run the [[test]] blocks of a mapping's file; tell what is otherwise than expected."""
    config = {key: each for key, each in _read_stream(path).items() if key != "state_file"}
    try:
        Stream(config)
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from None
    tests, wrong = _tests_of(config), 0
    for test in tests:
        stream = Stream(config)
        faults = _differences(stream, test["input"], test["output"])
        wrong += bool(faults)
        refused = ", ".join(f"{reason} {count}" for reason, count in (
            stream.errored + stream.dropped).items() if reason != "no_output")
        print(f"{'FAIL' if faults else 'ok  '}  {test['name']}"
              f"{f'   (failures: {refused})' if refused else ''}", *faults, sep="\n      ")
    print(f"{path}: {len(tests) - wrong} of {len(tests)} tests passed" if tests else
          f"{path}: right; it has no [[test]]")
    return 1 if wrong else 0


def _differences(stream: Stream, messages: list[Any], expected: list[Any]) -> list[str]:
    """Return how the outputs for some messages differ from what is expected of them."""
    outputs: list[Output] = []
    for each in messages:
        topic, payload, metadata = _addressed(each)
        act = stream.process if isinstance(payload, str) else stream.accept
        outputs += act(topic, payload, metadata)
    got = [{"topic": each.topic, "payload": json.loads(each.payload), "metadata": each.metadata}
           for each in outputs]
    wanted, faults = [_with_payload(each) for each in expected], []
    for n, (one, other) in enumerate(itertools.zip_longest(wanted, got), 1):
        if not _is_like(one, other):
            shown = {key: other[key] for key in ("topic", "payload", *(one or ()))} if other else {}
            told = json.dumps(shown, default=str) if other else "nothing"
            faults.append(f"output {n}: got       {told}\n"
                          f"      {' ' * len(f'output {n}: ')}expected  "
                          f"{json.dumps(one, default=str) if one else 'nothing'}")
    return faults


def _with_payload(said: dict[str, Any]) -> dict[str, Any]:
    """Return an expected message as outputs are: with a payload, or what is said of it."""
    payload = said.get("payload", {})
    if isinstance(payload, str):
        try:
            payload = json.loads(payload)
        except ValueError as error:
            raise ConfigError(
                f"an expected payload {_shown(payload)!r} is not JSON: {error}") from None
    if isinstance(payload, dict):
        payload = payload | {key: said[key] for key in ("value", "timestamp_ms") if key in said}
    return {key: said[key] for key in ("topic", "metadata") if key in said} | {"payload": payload}


def _is_like(wanted: Any, got: Any, top: int = 2) -> bool:
    """Whether *got* has what is wanted: numbers nearly, and in a message at least these keys."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        return (top > 0 or wanted.keys() == got.keys()) and all(
            key in got and _is_like(each, got[key], top - 1) for key, each in wanted.items())
    if isinstance(wanted, list) and isinstance(got, list):
        return len(wanted) == len(got) and all(
            _is_like(one, other, 0) for one, other in zip(wanted, got))
    if isinstance(wanted, bool) or isinstance(got, bool) or not (
            isinstance(wanted, int | float) and isinstance(got, int | float)):
        return type(wanted) is type(got) and wanted == got
    return math.isclose(wanted, got, rel_tol=1e-9, abs_tol=1e-12)


# -- the arguments --

def _number(kind: Callable[[str], Any], least: float, most: float, default: float, text: str,
            metavar: str = "N") -> dict[str, Any]:
    """Return the options of an argument that is a number between two others."""
    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    convert.__name__ = f"{kind.__name__} from {least:g} to {most:g}"    # argparse says so
    return {"type": convert, "default": default, "metavar": metavar,
            "help": f"{text}, default {default:g}"}


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Give *parser* a flag for every setting of Config."""
    import argparse
    group = parser.add_argument_group("settings")
    group.add_argument("--config", metavar="FILE", help="a TOML file with settings")
    for each in dataclasses.fields(Config):
        default = each.default
        shown = ",".join(default) or "none" if isinstance(default, tuple) else default
        text = f"{each.metadata['help']} (default {shown})".replace("%", "%%")
        options: dict[str, Any] = {"metavar": "TEXT"}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, int | float):
            options = {"metavar": "N", "type": type(default)}
        group.add_argument("--" + each.name.replace("_", "-"), help=text,
                           default=argparse.SUPPRESS, **options)


# name: what runs it, its help, its usage, an example, its arguments
_COMMANDS: dict[str, tuple[Any, str, str, str, dict[str, dict[str, Any]]]] = {
    "demo": (_demo, "a world of simulated players (what no command at all runs)",
             "[--players N] [--objects N] [settings]", "--players 500 --port 9000", {
        "--players": _number(int, 0, 100_000, 100, "how many"),
        "--objects": _number(int, 0, 5_000, 600, "stones among which they walk")}),
    "serve": (_serve, "run your own engine file, or an empty world",
              "[app.py | module:name] [settings]", "app.py --port 9000", {
        "app": {"nargs": "?", "help": "app.py, or module:name"}}),
    "load": (_load, "drive a server with real WebSocket clients and measure it",
             "[--url URL] [--endpoint data|html] [--players N] [--hz N] [--for SECONDS] [--json]",
             "--players 100 --hz 50 --for 10", {
        "--url": {"help": "a running server; without it one is started"},
        "--endpoint": {"choices": ("data", "html"), "default": "data",
                       "help": "data: players that move; html: readers of fragments that talk"},
        "--players": _number(int, 1, 10_000, 100, "clients"),
        "--hz": _number(float, 0.1, 1000, 50.0, "moves per second each; or lines by all"),
        "--for": _number(float, 0.1, 86_400, 10.0, "how long", "SECONDS") | {"dest": "seconds"},
        "--json": {"action": "store_true", "help": "print one JSON object"}}),
    "map": (_map, "map lines of JSON by an expression, or messages by a file of mappings",
            "(-e EXPRESSION | --config FILE) [--check] [--workers N]",
            "-e 'temp * 9/5 + 32' < data.ndjson", {
        "-e --expression": {"metavar": "EXPRESSION", "help": "of the fields of each line; value is "
                            "a line that is no object, this is the line itself"},
        "--config": {"metavar": "FILE", "help": 'TOML with sources and mapping; lines are {"topic",'
                     ' "payload"}, as a server sends them'},
        "--check": {"action": "store_true",
                    "help": "run the [[test]] blocks of the file; 1 if one fails"},
        "--workers": _number(int, 1, 64, 1, "processes; the lines of one match stay in order")}),
    "config": (_print_config, "print all settings, as TOML; --show says where each comes from",
               "[--show] [settings]", "--show --config horizon.toml --profile dev", {
        "--show": {"action": "store_true", "help": "say where each value comes from"}}),
    "proto": (_print_proto, "print the built-in .proto schema, or tidy and check your own",
              "[--check] [-I FOLDER] [FILE...]", "> horizon.proto", {
        "files": {"nargs": "*", "metavar": "FILE", "help": "proto3 files to print in one form"},
        "--check": {"action": "store_true", "help": "only say whether they are right"},
        "-I --include": {"action": "append", "default": [], "metavar": "FOLDER",
                         "help": "where imports are looked for, beside the file's own folder"}}),
}


def _parser() -> argparse.ArgumentParser:
    import argparse
    parser = argparse.ArgumentParser(
        prog="python -m horizon_lite", description="A real-time engine in one file.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version",
                        version=f"horizon_lite {__version__} (Python {sys.version.split()[0]})")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (act, text, usage, example, arguments) in _COMMANDS.items():
        start = f"python -m horizon_lite {name} "
        command = commands.add_parser(name, help=text, description=text, usage=start + usage,
                                      epilog=f"example: {start}{example}")
        command.set_defaults(act=act)
        for flags, options in arguments.items():
            command.add_argument(*flags.split(), **options)
        if "[settings]" in usage:
            _add_settings(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status; without a command, the demo."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    # settings may be given without a command: they are the demo's
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        argv = ["demo", *argv]
    args = parser.parse_args(argv)
    try:
        return int(args.act(args))
    except BrokenPipeError:             # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130
    except (HorizonError, OSError, UnicodeError) as problem:
        taken = getattr(problem, "errno", None) == errno.EADDRINUSE
        address = "the address is in use: " if taken else ""
        print(f"horizon_lite: {address}{problem}", file=sys.stderr)
        return (4 if taken else 3 if isinstance(problem, ConfigError)
                else 2 if isinstance(problem, UsageError) else 1)


def _be_importable() -> None:
    """Let ``import horizon_lite`` find this very module, so that there is one Engine class.

    Also when the file was copied into a package and runs as ``python -m package.horizon_lite``.
    """
    sys.modules["horizon_lite"] = here = sys.modules["__main__"]
    if spec := globals()["__spec__"]:
        sys.modules[spec.name] = here
        parent, _, name = spec.name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, here)


if __name__ == "__main__":
    _be_importable()
    raise SystemExit(main())
