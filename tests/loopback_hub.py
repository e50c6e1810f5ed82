"""A small Hub on the loopback interface: the calls that huggingface_hub makes to fetch a model, nothing more."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


class LoopbackHub:
    """Serves folders as repositories; those in `private` ask for the token. `requests` lists what was asked."""

    def __init__(self, repositories: dict[str, Path], private: frozenset[str] = frozenset()) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                match = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+)/(\w+)/([\w.-]+)(?:/([^?]*))?", self.path)
                repository = repositories.get(match[1]) if match else None
                if match is None or repository is None:
                    return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
                if match[1] in private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.send(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
                kind, revision, path = match[2], match[3], match[4]
                if revision not in ("main", "v1", COMMIT):
                    return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
                if kind == "revision":
                    siblings = [{"rfilename": file.name} for file in sorted(repository.iterdir())]
                    answer = {"id": match[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                    return self.send(200, json.dumps(answer).encode(), {}, body)
                if kind == "tree":
                    files = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                        for file in sorted(repository.iterdir())
                    ]
                    return self.send(200, json.dumps(files).encode(), {}, body)
                file = repository / path
                if kind != "resolve" or not file.is_file():
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                data = file.read_bytes()
                tag = hashlib.sha256(data).hexdigest()
                return self.send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

            def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
