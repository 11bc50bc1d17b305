"""Benchmarks of horizon_lite, beside its peers in the same run.

    python bench_horizon_lite.py                    all rows
    python bench_horizon_lite.py --only 'bus|echo'  rows whose name matches
    python bench_horizon_lite.py --json new.json    also as JSON
    python bench_horizon_lite.py --against old.json exit 1 if a row is over 20 % worse

Every row is a cost, so less is better, and every row checks its own answer before it is
timed.  A ratio is the peer's cost divided by ours.  Peers that are not installed are
skipped and said so:  pip install prometheus_client pyee blinker psygnal websockets aiohttp
picows protobuf grpcio-tools.  Servers run in processes of their own, clients here; CPU time
is the server's, read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import platform
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import horizon_lite as hl

HERE = Path(__file__).parent
ROWS = []
MISSING = set()


def bench(name, unit):
    """Register a row: a function that returns {who: cost}, ours first."""
    def register(fn):
        ROWS.append((name, unit, fn))
        return fn
    return register


def peer(name):
    """Return a peer's module, or None, and remember that it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        MISSING.add(name.partition(".")[0])
        return None


def best_ns(fn, per_call=1, repeats=7):
    """Return nanoseconds per operation: the best of some runs."""
    timer = timeit.Timer(fn)
    loops, _ = timer.autorange()
    return min(timer.repeat(repeats, max(1, loops // 2))) / max(1, loops // 2) / per_call * 1e9


def loop(call, *arguments, times=1000):
    """Return a function that makes the same call many times, so that the loop weighs little."""
    def run():
        for _ in range(times):
            call(*arguments)
    return run


def compare(**calls):
    """Time calls of no arguments, each a thousand times."""
    return {who: best_ns(loop(call), 1000) for who, call in calls.items() if call is not None}


# =============================================================================
# 0  SELF
# =============================================================================

@bench("0.self.import", "ms")
def _():
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import horizon_lite; best = 9e9\n"
            "for _ in range(10):\n"
            "    del sys.modules['horizon_lite']; began = time.perf_counter(); import horizon_lite\n"
            "    best = min(best, time.perf_counter() - began)\n"
            "print(best * 1e3)")
    with tempfile.TemporaryDirectory() as folder:       # warm: with bytecode, as Python keeps it
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run([sys.executable, "-c", code, os.fspath(HERE)], capture_output=True,
                              text=True, check=True, env=environ)
    return {"horizon_lite": float(done.stdout)}


# =============================================================================
# 2  METRICS
# =============================================================================

@bench("2.metrics.inc", "ns")
def _():
    metrics, calls = hl.Metrics(), {}
    calls["horizon_lite"] = functools.partial(metrics.inc, "a_total")
    if client := peer("prometheus_client"):
        counter = client.Counter("a", "x", registry=client.CollectorRegistry())
        calls["prometheus_client"] = counter.inc
    result = compare(**calls)
    assert metrics["a_total"] % 1000 == 0 and metrics["a_total"] > 0
    return result


@bench("2.metrics.observe", "ns")
def _():
    metrics, calls = hl.Metrics(), {}
    calls["horizon_lite"] = functools.partial(metrics.observe, "h_seconds", 0.3)
    if client := peer("prometheus_client"):
        histogram = client.Histogram("h", "x", registry=client.CollectorRegistry(), buckets=hl.BUCKETS_S)
        calls["prometheus_client"] = functools.partial(histogram.observe, 0.3)
    result = compare(**calls)
    assert metrics['h_seconds_bucket{le="0.25"}'] == 0 < metrics['h_seconds_bucket{le="0.5"}']
    return result


# =============================================================================
# 4  SCHEMA
# =============================================================================

MOVE = {"player_uuid": "8f14e45f-ceea-467f-a0e6-1f1a4b2c3d4e", "x": 101.5, "y": 64.0, "z": -33.25,
        "yaw": 90.0, "pitch": -12.5, "on_ground": True}


@functools.cache
def upb_move():
    """Return Google's PlayerMoveEvent, compiled from our own schema, or None."""
    if not (peer("google.protobuf") and peer("grpc_tools.protoc")):
        return None
    folder = tempfile.mkdtemp()
    Path(folder, "horizon.proto").write_text(hl.builtin_proto())
    importlib.import_module("grpc_tools.protoc").main(
        ["protoc", f"-I{folder}", f"--python_out={folder}", "horizon.proto"])
    sys.path.insert(0, folder)
    return importlib.import_module("horizon_pb2").PlayerMoveEvent


def read_all(move):
    return move.player_uuid, move.x, move.y, move.z, move.yaw, move.pitch, move.on_ground


@bench("4.schema.move_build_encode", "ns")
def _():
    ours, theirs = hl.builtin_schema().PlayerMoveEvent, upb_move()
    assert theirs is None or ours(**MOVE).encode() == theirs(**MOVE).SerializeToString()
    return compare(horizon_lite=lambda: ours(**MOVE).encode(),
                   protobuf=theirs and (lambda: theirs(**MOVE).SerializeToString()))


@bench("4.schema.move_decode_read", "ns")
def _():
    ours, theirs = hl.builtin_schema().PlayerMoveEvent, upb_move()
    data = ours(**MOVE).encode()
    assert read_all(ours.decode(data)) == tuple(MOVE.values())
    return compare(horizon_lite=lambda: read_all(ours.decode(data)),
                   protobuf=theirs and (lambda: read_all(theirs.FromString(data))))


@bench("5.proto.packed_100", "us")
def _():
    moves = {os.urandom(16): (float(n), 2.0, 3.0) for n in range(100)}
    assert hl.unpack_moves(hl.pack_moves(moves)) == moves
    schema, theirs = hl.builtin_schema(), upb_move()
    result = {"horizon_lite": best_ns(lambda: hl.pack_moves(moves)) / 1000}
    if theirs is not None:
        batch, envelope = (getattr(sys.modules["horizon_pb2"], name) for name in ("EventBatch", "EventEnvelope"))
        names = [hl._uuid_text(player) for player in moves]

        def events():
            return batch(events=[envelope(type="PLAYER_MOVE", player_move=theirs(player_uuid=name, x=x, y=y, z=z))
                                 for name, (x, y, z) in zip(names, moves.values())]).SerializeToString()
        assert len(schema.EventBatch.decode(events()).events) == 100
        result["protobuf (batch of events)"] = best_ns(events) / 1000
    return result


# =============================================================================
# 7  BUS
# =============================================================================

@bench("7.bus.100000_events", "ns")
def _():
    """Seed 002's benchmark: 100,000 events to one handler, over 50,000 a second."""
    bus, seen = hl.Bus(), []
    handler = bus.on("core:benchmark", lambda event: None)
    bus.on("core:check", lambda event: seen.append(event.data))
    bus.emit("core:check", {"id": 1})
    assert seen == [{"id": 1}]

    def run():
        for number in range(100_000):
            bus.emit("core:benchmark", {"id": number, "timestamp": number})
    cost = best_ns(run, 100_000, repeats=3)
    assert handler.calls % 100_000 == 0 and handler.calls > 0
    assert 1e9 / cost > 50_000
    return {"horizon_lite": cost}


def emitters(handlers):
    """Return, for each library, a call that emits one value to *handlers*."""
    bus, calls = hl.Bus(), {}
    for handler in handlers:
        bus.on("bench:event", handler)
    calls["horizon_lite"] = functools.partial(bus.emit, "bench:event", 1)
    if pyee := peer("pyee"):
        emitter = pyee.EventEmitter()
        for handler in handlers:
            emitter.on("event", handler)
        calls["pyee"] = functools.partial(emitter.emit, "event", 1)
    if blinker := peer("blinker"):
        signal = blinker.Signal()
        for handler in handlers:
            signal.connect(handler, weak=False)
        calls["blinker"] = functools.partial(signal.send, 1)
    if psygnal := peer("psygnal"):
        instance = psygnal.SignalInstance((int,))
        for handler in handlers:
            instance.connect(handler)
        calls["psygnal"] = functools.partial(instance.emit, 1)
    return calls


def emit_peers(count):
    """Return emitters to *count* handlers that do nothing, after checking that all are reached."""
    reached = []
    for who, call in emitters([lambda value, n=n: reached.append(n) for n in range(count)]).items():
        reached.clear()
        call()
        assert sorted(reached) == list(range(count)), who
    return emitters([eval("lambda value: None") for _ in range(count)])


@bench("7.bus.emit_1", "ns")
def _():
    return compare(**emit_peers(1))


@bench("7.bus.emit_4", "ns")
def _():
    return compare(**emit_peers(4))


# =============================================================================
# 14, 20  servers: each in a process of its own
# =============================================================================

CLIENTS = 300
TEXT = "x" * 100


def serve_horizon_lite():
    app = hl.Engine(port=0, tick_hz=50, max_messages_per_s=0, log_level="error")
    work = [0, 0]                           # ticks to go, messages per tick

    @app.on_client("bench", "go")
    def go(event):
        work[:] = event.data

    @app.on_core("server_tick")
    def tick(event):
        if work[0]:
            work[0] -= 1
            for _ in range(work[1]):
                app.broadcast(TEXT)
    print(app.url.rpartition(":")[2], flush=True)
    app.run()


def asyncio_server(start, send):
    """A server in asyncio: *start* gives a port, *send* sends one text to every client."""
    import asyncio

    async def fan_out(ticks, messages):
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(ticks):
            for _ in range(messages):
                await send(TEXT)
            due += 0.02
            await asyncio.sleep(max(0, due - loop.time()))

    def command(text):
        if text.startswith("go "):
            asyncio.get_running_loop().create_task(fan_out(*map(int, text.split()[1:])))
            return True
        return False

    async def main():
        print(await start(command), flush=True)
        await asyncio.Event().wait()
    asyncio.run(main())


def serve_websockets():
    from websockets.asyncio.server import broadcast, serve
    clients = set()

    async def start(command):
        async def handler(socket):
            clients.add(socket)
            try:
                async for text in socket:
                    if not command(text):
                        await socket.send(text)
            finally:
                clients.discard(socket)
        server = await serve(handler, "127.0.0.1", 0, compression=None, ping_interval=None)
        return server.sockets[0].getsockname()[1]

    async def send(text):
        broadcast(clients, text)
    asyncio_server(start, send)


def serve_aiohttp():
    from aiohttp import web
    clients = set()

    async def start(command):
        async def handler(request):
            socket = web.WebSocketResponse(compress=False)
            await socket.prepare(request)
            clients.add(socket)
            try:
                async for message in socket:
                    if not command(message.data):
                        await socket.send_str(message.data)
            finally:
                clients.discard(socket)
            return socket
        app = web.Application()
        app.router.add_get("/ws/data", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    async def send(text):
        for socket in list(clients):
            await socket.send_str(text)
    asyncio_server(start, send)


def serve_picows():
    import picows
    clients = set()

    async def start(command):
        class Listener(picows.WSListener):
            def on_ws_connected(self, transport):
                clients.add(transport)

            def on_ws_disconnected(self, transport):
                clients.discard(transport)

            def on_ws_frame(self, transport, frame):
                if frame.msg_type == picows.WSMsgType.CLOSE:
                    transport.disconnect()
                elif not command(text := frame.get_payload_as_utf8_text()):
                    transport.send(picows.WSMsgType.TEXT, text.encode())
        server = await picows.ws_create_server(lambda request: Listener(), "127.0.0.1", 0)
        return server.sockets[0].getsockname()[1]

    async def send(text):
        data = text.encode()
        for transport in clients:
            transport.send(picows.WSMsgType.TEXT, data)
    asyncio_server(start, send)


SERVERS = {"horizon_lite": serve_horizon_lite, "websockets": serve_websockets, "aiohttp": serve_aiohttp,
           "picows": serve_picows}


def installed():
    return [name for name in SERVERS if name == "horizon_lite" or peer(name)]


def process_stat(pid):
    """Return CPU seconds and resident bytes of a process."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    # schedstat counts nanoseconds where stat counts hundredths of a second
    with open(f"/proc/{pid}/schedstat") as file:
        cpu = int(file.read().split()[0]) / 1e9
    return cpu or (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def server(name):
    """Start one of SERVERS; yield its process id and a function that connects to it."""
    process = subprocess.Popen([sys.executable, __file__, "--serve", name], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    try:
        port = int(process.stdout.readline())

        def connect():
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"GET /ws/data HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n" % port)
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += sock.recv(1)
            assert b" 101 " in answer, answer
            return sock
        yield process.pid, connect
    finally:
        process.kill()
        process.wait()


def send_text(sock, text):
    sock.sendall(hl._frame(1, text.encode(), b"\1\2\3\4"))


def frames_in(data):
    """Return how many whole unmasked frames *data* holds, and what is left over."""
    at = count = 0
    while len(data) - at >= 4:
        size, start = data[at + 1], at + 2
        if size == 126:
            size, start = int.from_bytes(data[at + 2:at + 4], "big"), at + 4
        if len(data) < start + size:
            break
        at, count = start + size, count + 1
    return count, data[at:]


def fan_out(name, ticks, messages):
    """Return the server's CPU microseconds per delivered message, every one of them counted."""
    with server(name) as (pid, connect), selectors.DefaultSelector() as selector:
        socks = [connect() for _ in range(CLIENTS)]
        counts, rest = dict.fromkeys(socks, 0), dict.fromkeys(socks, b"")
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        before = process_stat(pid)[0]
        send_text(socks[0], '{"namespace":"bench","event":"go","data":[%d,%d]}' % (ticks, messages)
                  if name == "horizon_lite" else f"go {ticks} {messages}")
        left, deadline = CLIENTS, time.monotonic() + 120
        while left and time.monotonic() < deadline:
            for key, _ in selector.select(1):
                sock = key.fileobj
                data = sock.recv(1 << 20)
                assert data, f"{name} hung up"
                got, rest[sock] = frames_in(rest[sock] + data)
                counts[sock] += got
                left -= counts[sock] == ticks * messages and got > 0
        assert set(counts.values()) == {ticks * messages}, name
        spent = process_stat(pid)[0] - before
        for sock in socks:
            sock.close()
    return spent / (CLIENTS * ticks * messages) * 1e6


def in_turns(cost, rounds):
    """Return everybody's least cost over some rounds, in turns: a noisy minute hits them all."""
    results = [{name: cost(name) for name in installed()} for _ in range(rounds)]
    return {name: min(result[name] for result in results) for name in results[0]}


@bench("14.fanout.50_per_tick", "us CPU/message")
def _():
    return in_turns(lambda name: fan_out(name, 100, 50), 3)


@bench("14.fanout.1_per_tick", "us CPU/message")
def _():
    return in_turns(lambda name: fan_out(name, 100, 1), 5)


def ping_text(name):
    return '{"namespace":"system","event":"ping","data":"hello hello"}' if name == "horizon_lite" else "x" * 58


def echo_p50(name):
    with server(name) as (_, connect):
        sock, text, times = connect(), ping_text(name), []
        for _ in range(3000):
            began = time.perf_counter_ns()
            send_text(sock, text)
            data = sock.recv(4096)
            times.append(time.perf_counter_ns() - began)
            assert frames_in(data) == (1, b"") and (b"hello" in data or b"xxx" in data)
        sock.close()
    return sorted(times)[len(times) // 2] / 1000


def echo_cpu(name, echoes=40_000):
    with server(name) as (pid, connect), selectors.DefaultSelector() as selector:
        frame, rest = hl._frame(1, ping_text(name).encode(), b"\1\2\3\4"), {}
        for _ in range(16):
            sock = connect()
            rest[sock] = b""
            selector.register(sock, selectors.EVENT_READ)
        before, done, sent = process_stat(pid)[0], 0, 0
        for sock in rest:
            sock.sendall(frame * 8)
            sent += 8
        while done < sent:
            for key, _ in selector.select(5):
                sock = key.fileobj
                got, rest[sock] = frames_in(rest[sock] + sock.recv(65536))
                done += got
                if sent < echoes:
                    sock.sendall(frame * got)
                    sent += got
        assert done == sent >= echoes
        return (process_stat(pid)[0] - before) / done * 1e6


@bench("20.engine.echo_p50", "us")
def _():
    return in_turns(echo_p50, 12)


@bench("20.engine.echo_cpu", "us CPU/echo")
def _():
    """16 clients with 8 messages under way each: what an echo costs a busy server."""
    return in_turns(echo_cpu, 3)


@bench("14.transport.idle_connection", "bytes")
def _():
    """Resident memory per idle WebSocket: what 4,000 more take when 2,000 are there already."""
    result = {}
    for name in installed():
        with server(name) as (pid, connect):
            socks = [connect() for _ in range(2000)]
            time.sleep(0.5)
            before = process_stat(pid)[1]
            socks += [connect() for _ in range(4000)]
            time.sleep(0.5)
            result[name] = (process_stat(pid)[1] - before) / 4000
            for sock in socks[::500]:
                send_text(sock, ping_text(name))        # they are alive
                assert frames_in(sock.recv(4096))[0] == 1
            for sock in socks:
                sock.close()
    return result


# =============================================================================
# 22  CLI
# =============================================================================

@bench("22.cli.serve_answers", "ms")
def _():
    """From typing `python -m horizon_lite serve` to the first answer of /healthz."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "horizon_lite", "serve", "--port", "0"], cwd=HERE,
                                   stdout=subprocess.PIPE, text=True)
        line = ""
        while not line.startswith("listening "):
            line = process.stdout.readline()
        with socket.create_connection(("127.0.0.1", int(line.rpartition(":")[2]))) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(1000).endswith(b"ok\n")
            times.append(time.perf_counter() - began)
        process.kill()
        process.communicate()
    return {"horizon_lite": min(times) * 1000}


@bench("22.cli.load_100x50", "ms CPU/s")
def _():
    """The seed's load test: 100 players, 50 moves a second each; what it costs the server."""
    done = subprocess.run([sys.executable, "-m", "horizon_lite", "load", "--for", "10", "--json"], cwd=HERE,
                          capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["lost"] == 0 and result["events_sent"] >= 49_000
    print(f"    {done.stdout.strip()}", file=sys.stderr)
    return {"horizon_lite": result["server_cpu_s"] * 1000 / 10}


# =============================================================================
# running them
# =============================================================================

def machine():
    with contextlib.suppress(OSError, IndexError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        return f"{platform.system()} {platform.machine()}, {os.cpu_count()} x {model}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def measure(name, unit, fn):
    """Run one row and print it."""
    ours, *others = fn().items()
    value = ours[1]
    peers = {who: {"value": round(cost, 3), "ratio": round(cost / value, 2)} for who, cost in others}
    shown = "   ".join(f"{who} {each['value']:,.4g} ({each['ratio']:g} x)" for who, each in peers.items())
    print(f"{name:<30} {value:>9,.4g} {unit:<15} {shown}", flush=True)
    return {"name": name, "unit": unit, "value": round(value, 3), "peers": peers}


def worse(rows, path):
    """Return what is over 20 % worse than in the file at *path*."""
    old = {row["name"]: row["value"] for row in json.loads(Path(path).read_text())["rows"]}
    return [f"{row['name']}: {row['value']:g} {row['unit']}, was {old[row['name']]:g}" for row in rows
            if row["name"] in old and row["value"] > old[row["name"]] * 1.2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="REGEX", default="", help="rows whose name matches")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--against", metavar="FILE", help="exit 1 if a row is over 20 %% worse than there")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return SERVERS[args.serve]()
    hl._raise_file_limit()
    head = {"python": sys.version.split()[0], "machine": machine(), "commit": commit()}
    print(f"Python {head['python']}, {head['machine']}, commit {head['commit']}")
    rows = [measure(*row) for row in ROWS if re.search(args.only, row[0])]
    if MISSING:
        print(f"not installed, so not measured: {', '.join(sorted(MISSING))}")
    if args.json:
        Path(args.json).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    if args.against and (found := worse(rows, args.against)):
        print("over 20 % worse:", *found, sep="\n    ")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
