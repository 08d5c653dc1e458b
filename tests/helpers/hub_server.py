"""A stand-in for the Hugging Face Hub over real HTTP, for unmodified clients: repositories with branches, commits and
pull requests, LFS uploads, private repositories, organizations, tokens with and without the right to write.

It binds the loopback address. A request that it does not know is answered 404 and kept in `unexpected`.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fork_server import ForkServer

ROOT = Path(__file__).parents[2]
VERBS = """
import contextlib, io, json, sys
from dq.cli.main import main
for line in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(line.split())
    print(json.dumps([code, out.getvalue(), error.getvalue()]))
"""
WRITER = "hf_writer00000000"  # a token
LFS = (".parquet", ".safetensors", ".png")


@dataclass
class Repository:
    kind: str
    name: str
    private: bool = False
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    branches: dict[str, str] = field(default_factory=dict)
    requests: int = 0  # pull requests

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = uuid.uuid4().hex + "0" * 8  # 40 digits, as git has them
        self.trees[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.trees else None


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.imports = imports  # of the process of a client, once for all that it runs
        self.repos: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens = {
            WRITER: ("me", ("lab",), True),
            "hf_reader00000000": ("me", ("lab",), False),
            "hf_guest000000000": ("guest", (), True),
        }
        self.unexpected: list[str] = []
        self.puts: list[str] = []  # every upload that was begun, by digest
        self.commits = 0
        # faults: what a hook returns is the status to answer with (0 drops the connection), None lets it pass
        self.on_put: Callable[[int], int | None] = lambda number: None
        self.on_commit: Callable[[Repository], int | None] = lambda repo: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, kind: str = "dataset", revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[kind, name]
        return repo.trees[repo.branches[revision]]

    def put(self, name: str, files: dict[str, bytes], kind: str = "dataset", *, private: bool = False) -> None:
        """A commit by somebody else; content None deletes."""
        repo = self.repos.setdefault((kind, name), Repository(kind, name, private))
        before = repo.trees[repo.branches["main"]] if repo.branches else {}
        repo.commit("main", {**before, **files})

    def reset_faults(self) -> None:
        self.on_put = lambda number: None
        self.on_commit = lambda repo: None
        self.puts.clear()

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """For a client in another process: the library reads these at its import."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    @functools.cached_property
    def home(self) -> Path:
        """HF_HOME of the clients."""
        self._home = tempfile.TemporaryDirectory()
        return Path(self._home.name)

    @functools.cached_property
    def client(self) -> ForkServer:
        """A process of a client, in whose forks code runs."""
        return ForkServer(self.environment(self.home, None), *self.imports)

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()
        if "home" in self.__dict__:
            self._home.cleanup()

    def process(
        self, code: str, cwd: Path, *args: str, token: str | None = WRITER
    ) -> subprocess.CompletedProcess[str]:
        """Python code in a process of its own, whose client has cached nothing but what others before it have."""
        return self.client.run(code, *args, cwd=cwd, environment=self.environment(self.home, token))

    def run(self, code: str, cwd: Path, *args: str, token: str | None = WRITER) -> str:
        """Python code in a process of its own, which must succeed; returns what it printed."""
        done = self.process(code, cwd, *args, token=token)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def verbs(self, cwd: Path, *lines: str, token: str | None = WRITER) -> list[tuple[int, str, str]]:
        """Command lines of dq in one process: exit code, standard output and error of each."""
        return [tuple(json.loads(line)) for line in self.run(VERBS, cwd, *lines, token=token).splitlines()]

    def cli(self, cwd: Path, *args: str, token: str | None = WRITER) -> subprocess.CompletedProcess[str]:
        """A command line of dq in a process of its own."""
        return self.process("import sys\nfrom dq.cli.main import main\nsys.exit(main())", cwd, *args, token=token)


@contextlib.contextmanager
def running(*imports: str) -> Iterator[Hub]:
    hub = Hub(imports)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.close()
        hub.shutdown()
        hub.server_close()
        thread.join()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if path.endswith(LFS):
        fields["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return fields


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/refs", "refs"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/revision/(?P<rev>[^/]+)", "info"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+(?:/[^/]+)?)", "info"),
        ("POST", r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
        ("GET", r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self._chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            if verb == method and (matched := re.fullmatch(pattern, url.path)):
                groups = {k: unquote(v) for k, v in matched.groupdict().items() if v is not None}
                getattr(self, name)(**groups)
                return
        self.server.unexpected.append(f"{self.command} {self.path}")
        self.answer(404, {"error": "unknown route"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        data = json.dumps(value).encode() if raw is None else raw
        self.send_response(status)
        for k, v in (headers or {}).items():
            self.send_header(k, v)
        self.send_header("Content-Type", "application/json" if raw is None else "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str | None = None) -> None:
        """An error that says who asked, as a careless server would."""
        message = f"refused for {self.headers.get('Authorization')}"
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, {"error": message}, headers)

    # --- who asks for what ----------------------------------------------------------------------------------------

    @property
    def user(self) -> tuple[str, tuple[str, ...], bool] | None:
        return self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def may_write(self, owner: str) -> bool:
        return bool(self.user and self.user[2] and owner in (self.user[0], *self.user[1]))

    def repository_at(self, kind: str | None, name: str, rev: str | None = None) -> tuple[Repository, str] | None:
        """The repository and commit, or an answer that it is not there."""
        repo = self.server.repos.get(("dataset" if kind and kind.startswith("dataset") else "model", name))
        owner = name.split("/")[0]
        if repo is None or (repo.private and not (self.user and owner in (self.user[0], *self.user[1]))):
            self.refuse(404 if self.user else 401, "RepoNotFound")
            return None
        sha = repo.at(rev or "main")
        if sha is None:
            self.refuse(404, "RevisionNotFound")
            return None
        return repo, sha

    # --- routes ---------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            return self.refuse(401)
        orgs = [{"name": o} for o in self.user[1]]
        return self.answer(200, {"type": "user", "name": self.user[0], "orgs": orgs, "auth": {"type": "access_token"}})

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        requested = json.loads(self.body)
        if self.user is None:
            return self.refuse(401)
        owner = requested.get("organization") or self.user[0]
        kind, name = requested.get("type") or "model", f"{owner}/{requested['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if not self.may_write(owner):
            return self.refuse(403)
        if (kind, name) in self.server.repos:
            return self.answer(409, {"url": url, "error": "You already created this repo"})
        private = requested.get("visibility") == "private" or bool(requested.get("private"))
        repo = self.server.repos[kind, name] = Repository(kind, name, private)
        repo.commit("main", {".gitattributes": b"*.parquet filter=lfs\n"})
        return self.answer(200, {"url": url, "name": name})

    def branch(self, kind: str, id: str, rev: str) -> None:
        if (at := self.repository_at(kind, id)) is None:
            return None
        if not self.may_write(id.split("/")[0]):
            return self.refuse(403)
        if rev in at[0].branches:
            return self.answer(409, {"error": "Reference already exists"})
        at[0].branches[rev] = at[1]
        return self.answer(200, {})

    def refs(self, kind: str, id: str) -> None:
        if (at := self.repository_at(kind, id)) is None:
            return
        results = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha} for b, sha in at[0].branches.items()]
        self.answer(200, {"branches": results, "converts": [], "tags": []})

    def info(self, kind: str, id: str, rev: str | None = None) -> None:
        if (at := self.repository_at(kind, id, rev)) is None:
            return
        repo, sha = at
        siblings = [{"rfilename": path} for path in repo.trees[sha]]
        facts = {"id": id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        self.answer(200, facts)

    def preupload(self, kind: str, id: str, rev: str) -> None:
        if (at := self.repository_at(kind, id, rev)) is None:
            return None
        if not self.may_write(id.split("/")[0]) and "create_pr" not in self.query:
            return self.refuse(403)
        tree = at[0].trees[at[1]]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in tree:
                fields = entry(path, tree[path])
                answers[-1]["oid"] = fields["lfs"]["oid"] if mode == "lfs" else fields["oid"]
        return self.answer(200, {"files": answers})

    def batch(self, id: str, kind: str | None = None) -> None:
        if self.repository_at(kind, id) is None:
            return
        objects = []
        for o in json.loads(self.body)["objects"]:
            fields = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.server.blobs:
                fields["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}
            objects.append(fields)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        self.server.puts.append(oid)
        status = self.server.on_put(len(self.server.puts))
        if status == 0:
            self.close_connection = True
            return self.connection.shutdown(2)
        if status:
            return self.refuse(status)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400)
        self.server.blobs[oid] = self.body
        return self.answer(200, {})

    def commit(self, kind: str, id: str, rev: str) -> None:
        if (at := self.repository_at(kind, id, rev)) is None:
            return None
        repo = at[0]
        request = "create_pr" in self.query
        if self.user is None or not (request or self.may_write(id.split("/")[0])):
            return self.refuse(403)
        status = self.server.on_commit(repo)
        if status:
            return self.refuse(status)
        head = repo.at(rev)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.trees[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                return self.refuse(412)
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.refuse(400)
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    return self.refuse(404, "EntryNotFound")
                del files[value["path"]]
        self.server.commits += 1
        repo.requests += request
        sha = repo.commit(f"refs/pr/{repo.requests}" if request else rev, files)
        url = f"{self.server.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        if request:
            answer["pullRequestUrl"] = f"{url}/discussions/{repo.requests}"
        return self.answer(200, answer)

    def tree(self, kind: str, id: str, rev: str, path: str = "") -> None:
        if (at := self.repository_at(kind, id, rev)) is None:
            return None
        inside = {p: d for p, d in at[0].trees[at[1]].items() if not path or p.startswith(f"{path}/")}
        if not inside and path:
            return self.refuse(404, "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rest = {p: p[len(path) + 1 if path else 0 :] for p in inside}
        results = [entry(p, d) for p, d in inside.items() if deep or "/" not in rest[p]]
        folders = {f"{path}/{r.split('/')[0]}".lstrip("/") for r in rest.values() if "/" in r}
        results += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
        return self.answer(200, results)

    def paths_info(self, kind: str, id: str, rev: str) -> None:
        if (at := self.repository_at(kind, id, rev)) is None:
            return
        requested = parse_qs(self.body.decode()).get("paths") or []
        if self.body[:1] == b"{":
            requested = json.loads(self.body)["paths"]
        tree = at[0].trees[at[1]]
        results = [entry(p, tree[p]) for p in requested if p in tree]
        folders = [p for p in requested if any(q.startswith(f"{p}/") for q in tree)]
        results += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        self.answer(200, results)

    def resolve(self, id: str, rev: str, path: str, kind: str | None = None) -> None:
        if (at := self.repository_at(kind, id, rev)) is None:
            return None
        data = at[0].trees[at[1]].get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        fields = entry(path, data)
        etag = fields["lfs"]["oid"] if "lfs" in fields else fields["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": at[1], "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if byte_range:
            first, last = int(byte_range[1]), min(int(byte_range[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(206, headers=headers, raw=data[first : last + 1])
        return self.answer(200, headers=headers, raw=data)
