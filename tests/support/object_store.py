"""A server of Google Cloud Storage's JSON API on this machine, with buckets in memory.

It implements what gcsfs, google-cloud-storage and TensorStore call, as the API's reference says:
generations and `ifGenerationMatch`, listings with a delimiter, ranges, uploads of each kind. No
package does: gcp-storage-emulator knows no generations, which locks and TensorStore need.
"""

import base64
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

ERRORS = {404: "notFound", 412: "conditionNotMet", 403: "forbidden", 503: "backendError"}


@dataclasses.dataclass(frozen=True)
class Blob:
    data: bytes
    generation: int
    updated: str


class Refused(Exception):
    def __init__(self, status: int):
        self.status = status


class ObjectStore(ThreadingHTTPServer):
    """The server. `url` is its address; `buckets` its objects by bucket and name.

    Attributes:
      answer: called with the method and the path of each request, with the name of what is uploaded; returns the status of an error to
        answer with, or 0.
      requests: the methods and paths of all requests.
    """

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, Blob]] = {name: {} for name in buckets}
        self.answer: Callable[[str, str], int] = lambda method, path: 0
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.uploads: dict[str, dict[str, Any]] = {}
        self.generation = 10**15

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use this server, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS": json.dumps({"token": "anon"}),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def put(self, bucket: str, name: str, data: bytes, condition: str | None = None) -> Blob:
        with self.lock:
            objects = self._objects(bucket)
            current = objects[name].generation if name in objects else 0
            if condition is not None and int(condition) != current:
                raise Refused(412)
            self.generation += 1
            now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
            objects[name] = Blob(data, self.generation, now)
            return objects[name]

    def get(self, bucket: str, name: str, condition: str | None = None) -> Blob:
        with self.lock:
            blob = self._objects(bucket).get(name)
            if blob is None:
                raise Refused(404)
            if condition is not None and int(condition) != blob.generation:
                raise Refused(412)
            return blob

    def delete(self, bucket: str, name: str, condition: str | None = None) -> None:
        with self.lock:
            self.get(bucket, name, condition)
            del self.buckets[bucket][name]

    def _objects(self, bucket: str) -> dict[str, Blob]:
        if bucket not in self.buckets:
            raise Refused(404)
        return self.buckets[bucket]


@contextlib.contextmanager
def serving(*buckets: str) -> Iterator[ObjectStore]:
    """Yields a server with these buckets, empty."""
    with ObjectStore(*buckets) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.name = self._uploaded() if url.path.startswith("/upload") else ""
        path = urllib.parse.unquote(url.path) + (self.name and f"/{self.name}")
        self.server.requests.append((self.command, path))
        try:
            if status := self.server.answer(self.command, path):
                raise Refused(status)
            self._route(re.sub(r"^/(download/|upload/)?storage/v1", "", url.path), url.path)
        except Refused as refused:
            reason = ERRORS.get(refused.status, "error")
            text = {"code": refused.status, "message": reason, "errors": [{"reason": reason}]}
            self._json({"error": text}, refused.status)

    def _route(self, path: str, whole: str) -> None:
        found = re.fullmatch(
            r"/b/([^/]+)(?:/o(?:/([^/]+)(?:/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+))?)?)?/?", path
        )
        if not found:
            raise Refused(404)
        bucket, name, to_bucket, to_name = (
            part and urllib.parse.unquote(part) for part in found.groups()
        )
        condition = self.query.get("ifGenerationMatch")
        if whole.startswith("/upload"):
            self._upload(bucket, condition)
        elif name is None:
            self.server._objects(bucket)
            if path.rstrip("/").endswith("/o"):
                self._list(bucket)
            else:
                self._json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        elif to_name:
            blob = self.server.put(
                to_bucket, to_name, self.server.get(bucket, name).data, condition
            )
            about = _about(to_bucket, to_name, blob)
            self._json(
                {"kind": "storage#rewriteResponse", "done": True, "resource": about}
                if "rewriteTo" in path
                else about
            )
        elif self.command == "DELETE":
            self.server.delete(bucket, name, condition)
            self._send(b"", 204)
        elif self.query.get("alt") == "media":
            self._media(self.server.get(bucket, name, condition))
        else:
            self._json(_about(bucket, name, self.server.get(bucket, name, condition)))

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        items, prefixes = [], set()
        for name in self.server.names(bucket, prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            elif self.query.get("startOffset", "") <= name:
                items.append(_about(bucket, name, self.server.buckets[bucket][name]))
        # One page holds everything, as none of the tests has more than the thousand of a real one.
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _parts(self) -> tuple[dict[str, Any], bytes]:
        """The two parts of a multipart upload: what is known of the object, and its content."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, about, content, _ = self.body.split(b"--" + boundary)
        about, content = (
            re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content)
        )
        return json.loads(about), content.removesuffix(b"\n").removesuffix(b"\r")

    def _uploaded(self) -> str:
        """The name of the object that is uploaded."""
        if name := self.query.get("name", ""):
            return name
        if self.query.get("upload_id"):
            return self.server.uploads[self.query["upload_id"]]["at"][1]
        multipart = self.query["uploadType"] == "multipart"
        return (self._parts()[0] if multipart else json.loads(self.body))["name"]

    def _upload(self, bucket: str, condition: str | None) -> None:
        kind, name = self.query["uploadType"], self.name
        if upload := self.query.get("upload_id"):
            return self._resume(upload)
        if kind == "resumable":
            upload = f"{len(self.server.uploads)}"
            self.server.uploads[upload] = {"at": (bucket, name, condition), "data": b""}
            where = f"{self.server.url}{self.path}&upload_id={upload}"
            return self._send(b"", 200, {"Location": where, "X-GUploader-UploadID": upload})
        data = self.body if kind == "media" else self._parts()[1]
        self._json(_about(bucket, name, self.server.put(bucket, name, data, condition)))

    def _resume(self, upload: str) -> None:
        if self.command == "DELETE":
            self.server.uploads.pop(upload, None)
            return self._send(b"", 204)
        started = self.server.uploads[upload]
        started["data"] += self.body
        total = self.headers.get("Content-Range", "bytes 0-0/*").rpartition("/")[2]
        if total == "*" or len(started["data"]) < int(total):
            return self._send(b"", 308, {"Range": f"bytes=0-{len(started['data']) - 1}"})
        bucket, name, condition = started["at"]
        self._json(_about(bucket, name, self.server.put(bucket, name, started["data"], condition)))

    def _media(self, blob: Blob) -> None:
        headers = {
            "X-Goog-Generation": str(blob.generation),
            "X-Goog-Metageneration": "1",
            "X-Goog-Stored-Content-Encoding": "identity",
            "X-Goog-Stored-Content-Length": str(len(blob.data)),
            "X-Goog-Hash": f"crc32c={_crc32c(blob.data)}",
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(blob.data, 200, headers)
        size = len(blob.data)
        first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        end = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
        if first >= size:
            raise Refused(416)
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self._send(blob.data[first:end], 206, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(
            json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=UTF-8"}
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _crc32c(data: bytes) -> str:
    import google_crc32c  # of the extra `gcs`

    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _about(bucket: str, name: str, blob: Blob) -> dict[str, Any]:
    """The JSON of an object's metadata."""
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{blob.generation}",
        "name": name,
        "bucket": bucket,
        "generation": str(blob.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "size": str(len(blob.data)),
        "md5Hash": base64.b64encode(hashlib.md5(blob.data).digest()).decode(),
        "crc32c": _crc32c(blob.data),
        "etag": str(blob.generation),
        "timeCreated": blob.updated,
        "updated": blob.updated,
    }


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket of a server that this process uses as Google's."""

    server: ObjectStore
    name: str

    def url(self, folder: str) -> str:
        return f"gs://{self.name}/{folder}"

    def names(self, prefix: str = "") -> list[str]:
        return self.server.names(self.name, prefix)


@functools.cache
def _server_of_this_process() -> ObjectStore:
    """One for all tests, as the libraries keep their connections."""
    server = ObjectStore()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    os.environ |= server.environment
    return server


@pytest.fixture
def store() -> Iterator[Bucket]:
    """A bucket of its own for a test; skips it without the extra `gcs`."""
    server = _server_of_this_process()
    pytest.importorskip("gcsfs")  # reads the environment
    from rdm_jax.runtime import mounts

    bucket = Bucket(server, f"bucket-{len(server.buckets)}")
    server.buckets[bucket.name] = {}
    try:
        yield bucket
    finally:
        server.answer = lambda method, path: 0
        for url in [url for url in mounts._mounts if url.startswith(bucket.url(""))]:
            del mounts._mounts[url]
