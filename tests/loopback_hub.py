"""A small Hub on the loopback interface: what huggingface_hub asks to fetch and to push a model, nothing more."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"
USER = "mini"
CUT = 0  # in place of a status: the line is cut without an answer


class LoopbackHub:
    """Serves folders as repositories; those in `private` ask for the token. `requests` lists what was asked.

    New repositories go into `storage`. `trouble` may answer a request, "PUT /lfs/...", by a status or CUT.
    """

    def __init__(
        self, repositories: dict[str, Path], private: frozenset[str] = frozenset(), storage: Path | None = None
    ) -> None:
        self.requests: list[str] = []
        self.repositories = dict(repositories)
        self.private = set(private)
        self.storage = storage
        self.revisions = {"main", "v1", COMMIT}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.trouble: Callable[[str], int | None] = lambda request: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(hub.read)

            def do_GET(self) -> None:
                self.answer(hub.read)

            def do_POST(self) -> None:
                self.answer(hub.write)

            def do_PUT(self) -> None:
                self.answer(hub.write)

            def answer(self, find: Callable[..., tuple[int, bytes, dict[str, str]]]) -> None:
                request = f"{self.command} {self.path}"
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append(request)
                status = hub.trouble(request)
                data, headers = b"", {}
                if status is None:
                    may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                    status, data, headers = find(self.path.split("?")[0], body, may)
                if status == CUT:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def read(self, path: str, _: bytes, may: bool) -> tuple[int, bytes, dict[str, str]]:
        """Who I am, what a repository is and holds, and its files."""
        if path == "/api/whoami-v2":
            return _json({"type": "user", "name": USER}) if may else _refusal(401)
        match = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/(\w+)/([\w.-]+)(?:/(.*))?)?", path)
        repository = self.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return _refusal(404, "RepoNotFound")
        if match[1] in self.private and not may:
            return _refusal(401, "RepoNotFound")
        kind, revision, name = match[2] or "revision", match[3] or "main", match[4]
        if revision not in self.revisions:
            return _refusal(404, "RevisionNotFound")
        files = {f.relative_to(repository).as_posix(): f for f in sorted(repository.rglob("*")) if f.is_file()}
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            private = match[1] in self.private
            return _json({"id": match[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": private})
        if kind == "tree":
            sizes = {path: file.stat().st_size for path, file in files.items()}
            return _json([{"type": "file", "path": p, "size": size, "oid": "0" * 40} for p, size in sizes.items()])
        if kind != "resolve" or not (repository / name).is_file():
            return _refusal(404, "EntryNotFound")
        data = (repository / name).read_bytes()
        return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}

    def write(self, path: str, body: bytes, may: bool) -> tuple[int, bytes, dict[str, str]]:
        """Create a repository or a branch; take large files; commit."""
        if match := re.fullmatch(r"/lfs/(\w+)", path):  # with the right to it in the address, as on S3
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.large[match[1]] = body
            return 200, b"", {}
        if not may:
            return _refusal(401)
        if path == "/api/validate-yaml":
            valid = json.loads(body)["content"].startswith("---\n")
            return _json({"warnings": [], "errors": [] if valid else [{"message": "no front matter"}]})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._offer(json.loads(body)["objects"])
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(branch|preupload|commit)/([\w.-]+)", path)
        if match is None or match[1] not in self.repositories:
            return _refusal(404, "RepoNotFound")
        repository = self.repositories[match[1]]
        if match[2] == "branch":
            self.revisions.add(match[3])
            return 200, b"", {}
        if match[3] not in self.revisions:
            return _refusal(404, "RevisionNotFound")
        if match[2] == "preupload":
            return _json({"files": [_choose_mode(repository, file) for file in json.loads(body)["files"]]})
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] != "header":
                (repository / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                (repository / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "deletedFile":
                (repository / value["path"]).unlink()
            elif operation["key"] == "lfsFile":
                (repository / value["path"]).write_bytes(self.large[value["oid"]])
        return _json({"commitUrl": f"{self.endpoint}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})

    def _create(self, wanted: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        owner = wanted["organization"] or USER
        if owner != USER:
            return _refusal(403)
        name = f"{owner}/{wanted['name']}"
        exists = name in self.repositories
        if not exists:
            assert self.storage is not None
            self.repositories[name] = self.storage / wanted["name"]
            self.repositories[name].mkdir()
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.private.add(name)
        return 409 if exists else 200, *_json({"url": f"{self.endpoint}/{name}"})[1:]

    def _offer(self, objects: list[dict[str, Any]]) -> tuple[int, bytes, dict[str, str]]:
        """Where to put the large files that are not there yet."""
        answers = []
        for wanted in objects:
            upload = {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}
            answers.append(wanted | ({} if wanted["oid"] in self.large else {"actions": upload}))
        return _json({"objects": answers})


def _choose_mode(repository: Path, file: dict[str, Any]) -> dict[str, Any]:
    """What is no text is large; what is there already is known by its digest."""
    large = b"\0" in base64.b64decode(file["sample"])
    there = repository / file["path"]
    digest = None
    if there.is_file():
        data = there.read_bytes()
        digest = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": digest and digest.hexdigest()}


def _json(value: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _refusal(status: int, code: str = "") -> tuple[int, bytes, dict[str, str]]:
    return status, b"", {"X-Error-Code": code} if code else {}
