"""A hub of repositories on this host, as huggingface_hub's downloads need it.

It answers the routes that `snapshot_download` of 0.34 to 2.4 calls: a revision, the tree of a
commit, and a file of a commit.
"""

import functools
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with commits by revision, each of them files by path.

    Attributes:
      repositories: name -> revision -> the files; the newest commit is that of 'main'.
      gated: names of the repositories whose terms are not accepted.
      status: of every answer, if it is not None: of a hub in trouble.
      fetched: the files that were sent, in their order.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.status: int | None = None
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def upload(self, folder: Path, name: str, revision: str = "main", **others: bytes) -> str:
        """Stores the files of a folder, and others; returns the commit."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()} | others
        commit = hashlib.sha1(
            b"".join(key.encode() + files[key] for key in sorted(files))
        ).hexdigest()
        self.repositories.setdefault(name, {}).update({revision: files, commit: files})
        return commit

    def commit_of(self, name: str, revision: str) -> str:
        commits = self.repositories[name]
        if len(revision) == 40:
            return revision
        return next(
            c for c, files in commits.items() if len(c) == 40 and files is commits[revision]
        )


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.status:
            return self.refuse(self.server.status, "")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind, revision = "/".join(parts[2:4]), *parts[4:6]
        else:
            name, kind, revision = "/".join(parts[:2]), *parts[2:4]
        if name not in self.server.repositories:
            return self.refuse(401, "RepoNotFound")
        if name in self.server.gated and kind != "revision":
            return self.refuse(403, "GatedRepo")
        if revision not in self.server.repositories[name]:
            return self.refuse(404, "RevisionNotFound")
        files = self.server.repositories[name][revision]
        commit = self.server.commit_of(name, revision)
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.send_json({"id": name, "sha": commit, "siblings": siblings})
        if kind == "tree":
            return self.send_json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                    for path, data in files.items()
                ]
            )
        path = "/".join(parts[4:])
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append(path)
        self.send(200, files[path], {"ETag": f'"{_etag(files[path])}"', "X-Repo-Commit": commit})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@functools.cache
def _server_of_this_process() -> Hub:
    """One for all tests, as the library keeps its addresses."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An empty hub that this process's huggingface_hub uses, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = _server_of_this_process()
    server.clear()
    # Not the variables HF_*, which the library reads once: another test may have imported it.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return server
