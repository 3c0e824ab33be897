"""A stand-in for the model hub: a real HTTP server on loopback with the hub's own answers, as far as a push needs them.

Files go the ways that they go there: small text in the commit, weights by LFS. A commit that changes nothing is
refused, so that a test sees it when somebody makes one.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "t" * 34
USER = "somebody"
Fault = int | str  # an HTTP status; "hang": no answer while the hub runs; "drop": done, but the answer is lost


@dataclass
class Branch:
    files: dict[str, bytes] = field(default_factory=dict)
    oids: dict[str, str] = field(default_factory=dict)
    commits: list[dict[str, str]] = field(default_factory=list)  # title, description, oid


@dataclass
class Hub:
    """``faults``: what to do instead of the next requests for ``create``, ``branch``, ``preupload`` or ``commit``."""

    url: str = ""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    repos: dict[str, dict[str, Branch]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def main(self, repo: str) -> Branch:
        return self.repos[repo]["main"]

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if repo in self.repos else 200
        if status == 200:
            self.repos[repo] = {"main": Branch(commits=[{"title": "initial commit", "oid": "0" * 40}])}
            self.private[repo] = wanted.get("visibility") == "private"
        return status, {"url": f"{self.url}/{repo}"}

    def branch(self, repo: str, name: str) -> tuple[int, Any]:
        branches = self.repos[repo]
        if name in branches:
            return 409, {"error": "Reference already exists"}
        branches[name] = Branch(commits=branches["main"].commits[:1])
        return 201, {}

    def validate(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        card = yaml.safe_load(wanted["content"].split("---")[1])
        if str(card.get("base_model") or "").startswith("/"):
            return 400, {"errors": [{"message": '"base_model" with value "/…" is not valid.'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str, wanted: dict[str, Any]) -> tuple[int, Any]:
        oids = self.repos[repo][revision].oids
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                "shouldIgnore": False,
                "oid": oids.get(file["path"]),
            }
            for file in wanted["files"]
        ]
        return 200, {"files": files, "commitOid": self.repos[repo][revision].commits[-1]["oid"]}

    def batch(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        objects = []
        for blob in wanted["objects"]:
            upload = {"upload": {"href": f"{self.url}/blobs/{blob['oid']}", "header": {}}}
            objects.append(blob if blob["oid"] in self.blobs else {**blob, "actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo: str, revision: str, body: bytes) -> tuple[int, Any]:
        branch = self.repos[repo][revision]
        title, changed = {}, 0
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value
                continue
            is_lfs = line["key"] == "lfsFile"
            data = self.blobs[value["oid"]] if is_lfs else base64.b64decode(value["content"])
            oid = value["oid"] if is_lfs else hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            changed += branch.oids.get(value["path"]) != oid
            branch.files[value["path"]], branch.oids[value["path"]] = data, oid
        if not changed:
            return 400, {"error": "an empty commit"}
        oid = hashlib.sha1(body + str(len(branch.commits)).encode()).hexdigest()
        branch.commits.append({"title": title["summary"], "description": title["description"], "oid": oid})
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}

    def answer(self, method: str, path: str, body: bytes) -> tuple[str, int, Any]:
        """(which kind of request, status, answer)."""
        path = path.partition("?")[0]
        wanted = json.loads(body) if body[:1] == b"{" and b"\n" not in body.strip() else {}
        if found := re.fullmatch(r"/api/models/(.+?/.+?)/(branch|preupload|commit|revision)/(.+)", path):
            repo, kind, revision = found.groups()
            if repo not in self.repos:
                return kind, 404, {"error": "Repository not found"}
            match kind:
                case "branch":
                    return kind, *self.branch(repo, revision)
                case "preupload":
                    return kind, *self.preupload(repo, revision, wanted)
                case "commit":
                    return kind, *self.commit(repo, revision, body)
            return kind, 200, {"id": repo, "sha": self.repos[repo][revision].commits[-1]["oid"]}
        if path == "/api/repos/create":
            return "create", *self.create(wanted)
        if path == "/api/validate-yaml":
            return "validate", *self.validate(wanted)
        if path.endswith(".git/info/lfs/objects/batch"):
            return "batch", *self.batch(wanted)
        if path.startswith("/blobs/") and method == "PUT":
            self.blobs[path.removeprefix("/blobs/")] = body
            return "blob", 200, {}
        return "other", 404, {"error": "not found"}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = next((name for name in ("create", "branch", "preupload", "commit") if f"/{name}" in self.path), "")
            hub.asked.append(f"{self.command} {self.path}")
            fault = hub.faults[kind].pop(0) if hub.faults.get(kind) else None
            if fault == "hang":
                hub.stopped.wait()
                self.close_connection = True
                return
            if isinstance(fault, int):
                self.say(fault, {"error": "as the test says"})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/blobs/" not in self.path:
                self.say(401, {"error": "Invalid username or password."})
            else:
                _, status, answer = hub.answer(self.command, self.path, body)
                if fault == "drop":
                    self.close_connection = True
                    return
                self.say(status, answer)

        do_GET = do_POST = do_PUT = do_HEAD = reply

        def say(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return

    return Handler


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()
