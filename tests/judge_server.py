"""A chat completion server on 127.0.0.1 whose replies a test scripts, and which writes down what it was sent."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """One scripted HTTP response; `delay` is in seconds, `drip` in seconds between two bytes of it."""

    body: str = ""
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0
    drip: float = 0
    drop: bool = False


def chat(content: str | None, finish_reason: str = "stop", refusal: str | None = None) -> Reply:
    """Return a chat completion that took 100 prompt tokens and 10 answer tokens."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    body = {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    return Reply(json.dumps(body))


def document(request: dict) -> dict:
    """Return the row that a request carries."""
    return json.loads(request["messages"][1]["content"])


def verdict(request: dict, label: str, reason: str = "because") -> Reply:
    """Return the reply of a judge that would choose this label."""
    right = document(request)["prediction"] == label
    answer = {"label": label, "verdict": "correct" if right else "incorrect", "reason": reason}
    return chat(json.dumps(answer))


def agree(request: dict, number: int) -> Reply:
    """Return the reply of a judge that finds every prediction correct."""
    return verdict(request, document(request)["prediction"])


class JudgeServer(ThreadingHTTPServer):
    """Answers each request with `script(request, number)`, where `number` counts from 1.

    `requests` holds the bodies in order of arrival, `arrivals` their times, `finished` those answered in full,
    `authorizations` their key headers, and `most_open` how many were ever open together.
    """

    daemon_threads = True

    def __init__(self, script: Callable[[dict, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.lock = script, threading.Lock()
        self.requests, self.arrivals, self.finished, self.authorizations = [], [], [], []
        self.open = self.most_open = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent when a client is killed or gives up."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.requests.append(body)
            server.arrivals.append(time.monotonic())
            server.authorizations.append(self.headers.get("authorization"))
            number = len(server.requests)
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self._send(server.script(body, number))
            with server.lock:
                server.finished.append(body)
        finally:
            with server.lock:
                server.open -= 1

    def _send(self, reply: Reply) -> None:
        time.sleep(reply.delay)
        if reply.drop:
            self.close_connection = True
            return
        body = reply.body.encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
        head = [f"HTTP/1.1 {reply.status} scripted", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        data = "\r\n".join(head).encode() + body
        pieces = [data[i : i + 1] for i in range(len(data))] if reply.drip else [data]
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(reply.drip)

    def log_message(self, format: str, *args: object) -> None:
        pass
