"""An HTTP server of byte ranges that can misbehave, and the fsspec filesystem that reads it."""

import contextlib
import hashlib
import http.client
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from fsspec.spec import AbstractFileSystem


class RangeServer:
    """Serves ``files``; ``asked`` lists the (name, start) of every range asked for.

    Attributes:
        failures: ranges still to be answered with ``status``.
        short: ranges still to be answered with half the bytes.
        delay: seconds before every range is answered.
        ranges: False sends the whole file, whatever is asked.
        versions: whether files have ETags.
        lists_sizes: whether the listing tells them.
        questions: names of the files whose size was asked for; "" is the listing.
        most_at_once: of these.
    """

    def __init__(self, files):
        self.files, self.asked = dict(files), []
        self.failures, self.short, self.delay, self.status = 0, 0, 0.0, 503
        self.ranges, self.versions, self.lists_sizes = True, True, True
        self.questions, self.at_once, self.most_at_once = [], 0, 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"ranges://127.0.0.1:{self.http.server_port}/data"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def info(self, name):
        content = self.files[name]
        version = {"etag": hashlib.sha256(content).hexdigest()} if self.versions else {}
        return {"size": len(content), "type": "file", **version}

    def tell(self, name):
        """What is known of a file, or of all."""
        with self.lock:
            self.questions.append(name)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        with self.lock:
            self.at_once -= 1
        if name:
            more = {"VersionId": "1"} if self.versions else {}  # listings know less
            return self.info(name) | more if name in self.files else None
        hidden = {} if self.lists_sizes else {"size": None}
        return {name: self.info(name) | hidden for name in self.files}

    def answer(self, name, start, stop):
        """Status and body of a range."""
        with self.lock:
            self.asked.append((name, start))
            failing, short = self.failures > 0, self.short > 0
            self.failures -= failing
            self.short -= short and not failing
        time.sleep(self.delay)
        if failing:
            return self.status, b""
        body = self.files[name][start:stop] if self.ranges else self.files[name]
        return 206, body[: len(body) // 2] if short else body


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("/")[-1].split("?")[0]
            if self.path.endswith(("?list", "?info")):
                told = server.tell(name if self.path.endswith("?info") else "")
                self.send(404 if told is None else 200, json.dumps(told).encode())
            elif name not in server.files:
                self.send(404, b"")
            else:
                start, end = self.headers["Range"].removeprefix("bytes=").split("-")
                self.send(*server.answer(name, int(start), int(end) + 1))

        def send(self, status, body):
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler


class RefusedError(Exception):
    """Carries the HTTP status, as clients' errors do."""

    def __init__(self, status, url):
        super().__init__(f"HTTP {status} for https://user:secret@{url}?signature=secret")
        self.status = status


class RangeFileSystem(AbstractFileSystem):
    protocol = "ranges"

    def __init__(self, **options):
        super().__init__(**options)
        self.known = {}

    def invalidate_cache(self, path=None):
        self.known.clear()

    def ls(self, path, detail=True, **kwargs):
        return [
            {"name": f"{path}/{name}", **info} for name, info in self.asked(path, "?list").items()
        ]

    def info(self, path, **kwargs):
        return {"name": path, **self.asked(path, "?info")}

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self.get(path, "", {"Range": f"bytes={start}-{end - 1}"})

    def asked(self, path, question):
        if (path, question) not in self.known:
            self.known[path, question] = json.loads(self.get(path, question, {}))
        return self.known[path, question]

    def get(self, path, question, headers):
        host, _, rest = self._strip_protocol(path).partition("/")
        connection = http.client.HTTPConnection(host, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", f"/{rest}{question}", headers=headers)
            response = connection.getresponse()
            body = response.read()
        if response.status == 404:
            raise FileNotFoundError(path)
        if response.status >= 400:
            raise RefusedError(response.status, path)
        return body


fsspec.register_implementation("ranges", RangeFileSystem, clobber=True)
