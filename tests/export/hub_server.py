"""A stand-in for the Hugging Face Hub: repositories in memory, served over HTTP on this machine."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import huggingface_hub

TOKEN = "hf_secretsecretsecret"


class Hub:
    """What the stand-in knows.

    Attributes:
        repositories: name -> path -> contents.
        private: names of private ones.
        tokens: seen in requests.
        refuse: HTTP status to answer every commit with, 0 for none.
    """

    def __init__(self):
        self.repositories, self.private, self.tokens, self.refuse = {}, set(), set(), 0

    def create(self, body):
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": self._url(name)}
        self.repositories[name] = {}
        if body.get("private") or body.get("visibility") == "private":
            self.private.add(name)
        return 200, {"url": self._url(name), "name": name, "id": name}

    def info(self, name):
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "private": name in self.private, "sha": "0" * 40, "siblings": []}

    def tree(self, name):
        files = self.repositories[name].items()
        return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files]

    def preupload(self, body):
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        return 200, {"files": [{"path": file["path"], **modes} for file in body["files"]]}

    def commit(self, name, lines):
        if self.refuse:
            return self.refuse, {"error": "refused"}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.repositories[name][value["path"]]
        url = f"{self._url(name)}/commit/{'1' * 40}"
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}

    def _url(self, name):
        return f"{self.endpoint}/{name}"


@contextlib.contextmanager
def serving(patch):
    """A hub that answers at ``endpoint``, where the client now goes, with its token."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlparse(self.path).path.removeprefix("/api/models/").split("/")
            name = "/".join(parts[:2])
            self._answer(*(hub.tree(name) if parts[2:3] == ["tree"] else hub.info(name)))

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlparse(self.path).path
            name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if path == "/api/repos/create":
                self._answer(*hub.create(json.loads(text)))
            elif path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                self._answer(*hub.preupload(json.loads(text)))
            elif "/commit/" in path:
                self._answer(*hub.commit(name, map(json.loads, text.splitlines())))
            else:
                self._answer(404, {"error": path})

        def _answer(self, status, value):
            hub.tokens.add(self.headers.get("Authorization"))
            anyone = self.path == "/api/validate-yaml"
            if not anyone and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, value = 401, {"error": "Invalid username or password."}
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
