"""A real HTTP server that speaks the chat protocol, or misbehaves, as a test tells it to; loaded by conftest."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

GOOD = "A red ball rolls slowly from left to right across a wooden table in warm evening light while the camera stands still."


def completion(text=GOOD, finish="stop", refusal=None, tokens=(100, 20)):
    """The body of a proper answer."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Request:
    """What arrived: headers, body, when, and the frames and words in it."""

    def __init__(self, headers, body):
        self.headers, self.body, self.at = {name.lower(): value for name, value in headers.items()}, body, time.monotonic()
        content = body["messages"][0]["content"]
        self.prompt = content[-1]["text"]
        self.frames = [_read_frame(part["image_url"]["url"]) for part in content[:-1]]

    @property
    def levels(self):
        """Mean grey level of each frame."""
        return [round(float(frame.mean())) for frame in self.frames]


def _read_frame(url):
    kind, data = url.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


class ChatServer:
    """`reply(request, number)` gives the body, or (status, headers, body), or a function that writes to the connection itself."""

    def __init__(self, reply=None):
        self.reply = reply or (lambda request, number: completion())
        self.requests, self.outstanding, self.most_outstanding = [], 0, 0
        self._lock, self.closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = Request(self.headers, json.loads(self.rfile.read(int(self.headers["content-length"]))))
                with outer._lock:
                    outer.requests.append(request)
                    number = len(outer.requests) - 1
                    outer.outstanding += 1
                    outer.most_outstanding = max(outer.most_outstanding, outer.outstanding)
                try:
                    reply = outer.reply(request, number)
                    if callable(reply):
                        reply(self)
                        self.close_connection = True
                        return
                    status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                    self.send_response(status)
                    for name, value in ({"content-type": "application/json", "content-length": str(len(data))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the other end has given up, as some tests want it to
                finally:
                    with outer._lock:
                        outer.outstanding -= 1

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
