"""A small Hugging Face Hub on this machine: real HTTP, real bytes, real hashes, and faults on request.

It answers the calls that ``huggingface_hub`` makes to push a model and to load it back: whoami, repository creation,
settings, pre-upload, LFS batch with upload and verification, commit, tags, information, tree, resolve. There is no Xet
storage. It checks what it is given: every uploaded object against its hash, a commit against its parent, the card's
metadata, who may read and write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REGULAR_LIMIT = 10 << 20
"""Larger files are stored through LFS whatever they are called, as on the Hub."""
NO_REPO = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


@dataclass(frozen=True)
class Blob:
    """A file of a commit; ``lfs`` tells how it is stored."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the pre-upload call compares: SHA-256 of an LFS file, git's SHA-1 of another."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, dict[str, Blob]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, message: str, files: dict[str, Blob]) -> str:
        names = [f"{path}:{blob.oid}" for path, blob in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([len(self.commits), message, names]).encode()).hexdigest()
        self.commits.append((oid, message, files))
        return oid

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[-1][2]

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        wanted = self.head if revision == "main" else self.tags.get(revision, revision)
        return next(((oid, files) for oid, _, files in self.commits if oid == wanted), None)


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose ``METHOD path`` matches: a status, a cut, or silence.

    Attributes:
        status: of the answer; 0: none comes.
        silent: the connection stays open without an answer until the other side gives up; else it is cut.
        late: the request is carried out all the same before the Hub falls silent.
    """

    pattern: str
    status: int = 0
    body: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1000
    silent: bool = False
    late: bool = False


class Answer(Exception):
    """Ends a request with a status, a body and headers."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class FakeHub:
    """The state of the Hub. ``users`` maps a token to ``(name, role)``."""

    def __init__(self, users: dict[str, tuple[str, str]]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, int]] = []
        self.url = self.storage = ""

    def sent(self, pattern: str) -> list[int]:
        """Sizes of the bodies of all requests whose ``METHOD path`` matches."""
        return [size for line, size in self.requests if re.search(pattern, line)]

    def fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None


@contextmanager
def fake_hub(users: dict[str, tuple[str, str]]) -> Iterator[FakeHub]:
    """A Hub that listens on a free port of this machine for as long as the block lasts."""
    hub = FakeHub(users)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.storage = f"http://localhost:{server.server_address[1]}/storage"  # another host, as the Hub's is
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        line = f"{self.command} {unquote(parts.path)}"
        fault = self.hub.fault(line)
        if fault and not fault.status and not fault.silent:
            self.rfile.read(min(1024, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read()
        self.hub.requests.append((line, len(self.body)))
        try:
            if fault and fault.silent and not fault.late:
                self._hold()
                return
            if fault and fault.status:
                echo = self.headers.get("Authorization", "")
                raise Answer(fault.status, fault.body.replace("{authorization}", echo).encode(), **fault.headers)
            self._route(line)
        except Answer as answer:
            (self._hold if fault and fault.silent else partial(self._reply, answer))()

    def _hold(self) -> None:
        """Say nothing for as long as the other side waits."""
        self.close_connection = True
        with suppress(OSError):
            while self.connection.recv(1 << 16):
                pass

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, **answer.headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, line: str) -> None:
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, line):
                action(self, *match.groups())
        raise Answer(404, {"error": f"no such call: {line}"})

    # who

    def _user(self) -> tuple[str, str] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        return user

    def _readable(self, name: str) -> Repo:
        repo, user = self.hub.repos.get(name), self._user()
        if repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
            raise Answer(404 if user else 401, {"error": "Repository not found"}, **NO_REPO)
        return repo

    def _writer(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Answer(401, {"error": "Unauthorized"})
        if user[0] != owner or user[1] == "read":
            message = f"You don't have the rights to write to the namespace {owner!r}"
            raise Answer(403, {"error": message}, X_Error_Message=message)

    def _writable(self, name: str) -> Repo:
        repo = self._readable(name)
        self._writer(name.split("/")[0])
        return repo

    def _json(self) -> Any:
        return json.loads(self.body)

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        found = self._readable(name).at(unquote(revision))
        if found is None:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return found

    # calls

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Answer(401, {"error": "Unauthorized"})
        token = {"displayName": "test", "role": user[1]}
        raise Answer(200, {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": token}})

    def create(self) -> None:
        asked = self._json()
        owner = asked.get("organization") or (self._user() or ("",))[0]
        self._writer(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.add("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        raise Answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def settings(self, name: str) -> None:
        repo, asked = self._writable(name), self._json()
        repo.private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
        raise Answer(200, {"private": repo.private})

    def validate(self) -> None:
        try:
            metadata = yaml.safe_load(self._json()["content"].split("---\n")[1])
            for result in metadata.get("model-index", [{"results": []}])[0]["results"]:
                kinds = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
                numbers = [(metric["type"], float(metric["value"])) for metric in result["metrics"]]
                assert all(kinds) and all(name for name, _ in numbers)
        except (IndexError, KeyError, AssertionError, TypeError, ValueError, yaml.YAMLError) as error:
            raise Answer(400, {"errors": [{"message": repr(error)}], "warnings": []}) from None
        raise Answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = self._writable(name).at(unquote(revision))
        assert files is not None
        rows = []
        for asked in self._json()["files"]:
            lfs = asked["path"].endswith((".safetensors", ".png")) or asked["size"] > REGULAR_LIMIT
            here = files[1].get(asked["path"])
            row = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            rows.append({**row, "oid": here.oid} if here else row)
        raise Answer(200, {"files": rows})

    def batch(self, name: str) -> None:
        self._writable(name)
        rows = []
        for asked in self._json()["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage}/{asked['oid']}"}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
                row["actions"] = {"upload": upload, "verify": verify}
            rows.append(row)
        raise Answer(200, {"transfer": "basic", "objects": rows})

    def _no_token(self) -> None:
        if "Authorization" in self.headers:
            raise Answer(400, {"error": "a signed address takes no token"})

    def store(self, oid: str) -> None:
        self._no_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, {"error": "the content does not have this hash"})
        self.hub.objects[oid] = self.body
        raise Answer(200, {})

    def verify(self, name: str) -> None:
        self._writable(name)
        asked = self._json()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Answer(404, {"error": "object not found"})
        raise Answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        repo = self._writable(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repo.head) != repo.head:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Answer(400, {"error": f"LFS object {value['oid']} was never uploaded"})
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        oid = repo.add(header["summary"], files)
        raise Answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def tag(self, name: str, revision: str) -> None:
        repo, tag = self._writable(name), self._json()["tag"]
        if tag in repo.tags:
            raise Answer(409, {"error": f"Tag {tag} already exists"})
        found = repo.at(unquote(revision))
        assert found is not None
        repo.tags[tag] = found[0]
        raise Answer(200, {})

    def refs(self, name: str) -> None:
        repo = self._readable(name)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
        raise Answer(200, {"branches": [main], "converts": [], "tags": tags})

    def info(self, name: str, revision: str | None = None) -> None:
        oid, files = self._at(name, revision or "main")
        card = files["README.md"].content.decode().split("---\n") if "README.md" in files else []
        data = {
            "_id": oid, "id": name, "modelId": name, "sha": oid, "private": self.hub.repos[name].private,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": path} for path in files],
            "cardData": yaml.safe_load(card[1]) if len(card) > 2 else None,
        }  # fmt: skip
        raise Answer(200, data)

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        _, files = self._at(name, revision)
        rows: list[dict[str, Any]] = []
        for path, blob in files.items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                row |= {"oid": hashlib.sha1(blob.oid.encode()).hexdigest()}
                row["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}
            rows.append(row)
        if folder and not rows:
            raise Answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        raise Answer(200, rows)

    def resolve(self, name: str, revision: str, path: str) -> None:
        oid, files = self._at(name, revision)
        blob = files.get(path)
        if blob is None:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        headers = {"X_Repo_Commit": oid, "ETag": f'"{blob.oid}"'}
        if blob.lfs:
            headers |= {"X_Linked_Etag": f'"{blob.oid}"', "X_Linked_Size": str(len(blob.content))}
            raise Answer(302, {}, Location=f"{self.hub.storage}/{blob.oid}", **headers)
        raise Answer(200, blob.content, **headers)

    def fetch(self, oid: str) -> None:
        self._no_token()
        content, asked = self.hub.objects[oid], self.headers.get("Range")
        if asked is None:
            raise Answer(200, content, ETag=f'"{oid}"')
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        raise Answer(206, content[start:], ETag=f'"{oid}"')


NAME, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"PUT /api/models/{NAME}/settings", Handler.settings),
    (rf"POST /api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (rf"POST /api/models/{NAME}/tag/{REVISION}", Handler.tag),
    (rf"GET /api/models/{NAME}/refs", Handler.refs),
    (rf"GET /api/models/{NAME}/tree/{REVISION}(?:/(.+))?", Handler.tree),
    (rf"GET /api/models/{NAME}(?:/revision/{REVISION})?", Handler.info),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (rf"POST /{NAME}\.git/info/lfs/objects/verify", Handler.verify),
    (r"PUT /storage/(\w+)", Handler.store),
    (r"(?:GET|HEAD) /storage/(\w+)", Handler.fetch),
    (rf"(?:GET|HEAD) /{NAME}/resolve/{REVISION}/(.+)", Handler.resolve),
]
