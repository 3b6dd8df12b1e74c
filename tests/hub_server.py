"""A Hub in memory, on a free loopback port: as much of the protocol as huggingface_hub and datasets speak.

Anonymous readers get 401 for what is private or not there, as on the Hub; files of the kinds that the Hub's default
`.gitattributes` names go through LFS, in parts where they are large, and are read through a redirect. Cards are checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import socket
import socketserver
import sys
import threading
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, quote, unquote, urlsplit

from card_rules import errors_in_card

USER, TOKEN = "alice", "hf_loopback"
OTHER_TOKEN = "hf_other"
USERS = {TOKEN: USER, OTHER_TOKEN: "bob"}  # each may write to what is their own, and propose pull requests to others
LFS_KINDS = (".parquet", ".safetensors", ".arrow", ".bin")
LFS_SIZE = 10 << 20
PART_SIZE = 4096  # the Hub's are of megabytes
DATE = "2025-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid, **lfs}


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    parent: Commit | None


@dataclass
class Repository:
    id: str
    private: bool
    branches: dict[str, Commit]
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)

    def commits(self, head: Commit | None):
        while head is not None:
            yield head
            head = head.parent

    def find(self, revision: str) -> Commit:
        """A branch, a tag, or a commit of any of them by its id."""
        named = {**self.tags, **self.branches, **self.pulls}
        for commit in [named[revision]] if revision in named else (c for h in named.values() for c in self.commits(h)):
            if revision in named or commit.oid == revision:
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Refusal(Exception):
    """An HTTP error, with the code that clients look for in `X-Error-Code`."""

    def __init__(self, status: int, code: str | None, message: str, **content: str) -> None:
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **content}


ROUTES: list[tuple[str, re.Pattern, str]] = []


def route(methods: str, pattern: str):
    """`{repo}`, `{rev}` and `{path}` of a pattern become arguments."""
    pattern = pattern.replace("{kind}", "(?P<kind>models|datasets|spaces)").replace("{repo}", "(?P<repo>[^/]+/[^/]+?)")
    pattern = pattern.replace("{rev}", "(?P<rev>[^/]+)").replace("{path}", "(?P<path>.+)")
    compiled = re.compile(pattern.replace("{oid}", "(?P<oid>[0-9a-f]{64})"))

    def register(function):
        ROUTES.extend((method, compiled, function.__name__) for method in methods.split())
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        with self.server.lock:
            try:
                for method, pattern, name in ROUTES:
                    match = pattern.fullmatch(url.path)
                    if match and method == self.command.replace("HEAD", "GET"):
                        arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        reply = getattr(self, name)(**arguments)
                        break
                else:
                    raise Refusal(404, None, f"no route for {self.command} {url.path}")
            except Refusal as refusal:
                headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
                reply = (refusal.status, json.dumps(refusal.content).encode(), headers)
        if not isinstance(reply, tuple):
            reply = (200, json.dumps(reply).encode(), {"Content-Type": "application/json"})
        self._send(*reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _read_body(self) -> bytes:
        """A body cut short is no request at all."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline() or self._broken(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        return body if len(body) == length else self._broken()

    def _broken(self):
        raise ConnectionAbortedError("the request ended before its body")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self) -> dict:
        return json.loads(self.body)

    def _endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    def _storage(self, oid: str) -> str:
        """Content behind LFS is at another host than the Hub, where clients send no token."""
        return f"http://localhost:{self.server.server_port}/lfs/{oid}"

    # Who may do what

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        user = USERS.get((header or "").removeprefix("Bearer "))
        if header is not None and user is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def _require_user(self) -> str:
        return self._user() or self._refuse_anonymous()

    def _refuse_anonymous(self):
        raise Refusal(401, None, "Invalid username or password.")

    def _repository(self, kind: str, repo: str, *, write: bool = False, own: bool = True) -> Repository:
        """The repository, if it may be read, or written to; `own` says that only its owner may."""
        user, found = self._user(), self.server.repositories.get((kind, repo))
        if user is None and (found is None or found.private or write):
            self._refuse_anonymous()
        if found is None or (found.private and user != repo.split("/")[0]):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if write and own and user != repo.split("/")[0]:
            raise Refusal(403, None, "You don't have the rights to write to this repository")
        return found

    def _proposed(self) -> bool:
        """Whether a pull request is asked for."""
        return self.query.get("create_pr") == ["1"]

    # Repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": self._require_user(), "orgs": [], "auth": {"accessToken": token}}

    def _named(self) -> tuple[str, str]:
        wanted = self._json()
        return f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or self._require_user()}/{wanted['name']}"

    def _url(self, kind: str, repo: str) -> str:
        return f"{self._endpoint()}/{repo}" if kind == "models" else f"{self._endpoint()}/{kind}/{repo}"

    @route("POST", "/api/repos/create")
    def create_repository(self):
        user = self._require_user()
        kind, repo = self._named()
        if user != repo.split("/")[0]:
            raise Refusal(403, None, "You don't have the rights to create a repository under this namespace")
        if (kind, repo) in self.server.repositories:
            raise Refusal(409, None, "You already created this repo", url=self._url(kind, repo))
        private = bool(self._json().get("private")) or self._json().get("visibility") == "private"
        attributes = "".join(f"*{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in LFS_KINDS).encode()
        first = self._new_commit("initial commit", {".gitattributes": File(attributes, lfs=False)}, None)
        self.server.repositories[kind, repo] = Repository(repo, private, {"main": first})
        return {"url": self._url(kind, repo), "name": repo, "id": repo}

    @route("DELETE", "/api/repos/delete")
    def delete_repository(self):
        self._repository(*self._named(), write=True)
        del self.server.repositories[self._named()]
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        errors = errors_in_card(self._json()["content"], self._json()["repoType"])
        content = {"errors": [{"message": error} for error in errors], "warnings": []}
        return 400 if errors else 200, json.dumps(content).encode(), {"Content-Type": "application/json"}

    @route("GET", "/api/{kind}/{repo}")
    @route("GET", "/api/{kind}/{repo}/revision/{rev}")
    def repository_info(self, kind, repo, rev="main"):
        repository = self._repository(kind, repo)
        commit = repository.find(rev)
        return {
            "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
            "id": repo,
            "author": repo.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "lastModified": DATE,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    @route("GET", "/api/{kind}/{repo}/refs")
    def references(self, kind, repo):
        repository = self._repository(kind, repo)
        named = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        return {
            key: [{"name": name, "ref": f"refs/{at}/{name}", "targetCommit": commit.oid} for name, commit in refs.items()]
            for key, (at, refs) in named.items()
        } | {"converts": []}

    @route("GET", "/api/{kind}/{repo}/commits/{rev}")
    def list_commits(self, kind, repo, rev):
        repository = self._repository(kind, repo)
        return [
            {"id": commit.oid, "title": commit.title, "message": "", "date": DATE, "authors": [{"user": USER}]}
            for commit in repository.commits(repository.find(rev))
        ]

    @route("POST DELETE", "/api/{kind}/{repo}/branch/{rev}")
    def change_branch(self, kind, repo, rev):
        repository = self._repository(kind, repo, write=True)
        start = (self._json() if self.body else {}).get("startingPoint") or "main"
        return self._change_reference(repository.branches, rev, repository.find(start))

    @route("POST DELETE", "/api/{kind}/{repo}/tag/{rev}")
    def change_tag(self, kind, repo, rev):
        repository = self._repository(kind, repo, write=True)
        if self.command == "DELETE":
            return self._change_reference(repository.tags, rev, None)
        return self._change_reference(repository.tags, self._json()["tag"], repository.find(rev))

    def _change_reference(self, references, name, commit):
        if self.command == "DELETE":
            if references.pop(name, None) is None:
                raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {name}")
        elif name in references:
            raise Refusal(409, None, f"Reference already exists: {name}")
        else:
            references[name] = commit
        return {}

    # Files

    @route("GET", "/api/{kind}/{repo}/tree/{rev}")
    @route("GET", "/api/{kind}/{repo}/tree/{rev}/{path}")
    def tree(self, kind, repo, rev, path=""):
        files = self._repository(kind, repo).find(rev).files
        prefix = f"{path.rstrip('/')}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {rev}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for name, file in sorted(inside.items()):
            parts = name[len(prefix) :].split("/")
            folders = [prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))]
            entries |= {folder: _folder_entry(folder) for folder in folders[: None if recursive else 1]}
            if recursive or len(parts) == 1:
                entries[name] = file.entry(name)
        return list(entries.values())

    @route("POST", "/api/{kind}/{repo}/paths-info/{rev}")
    def paths_info(self, kind, repo, rev):
        files = self._repository(kind, repo).find(rev).files
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = self._json()["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        entries = [files[path].entry(path) for path in paths if path in files]
        return entries + [_folder_entry(path) for path in paths if any(name.startswith(f"{path}/") for name in files)]

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def resolve_model(self, repo, rev, path):
        return self._resolve("models", repo, rev, path)

    @route("GET", "/{kind}/{repo}/resolve/{rev}/{path}")
    def resolve(self, kind, repo, rev, path):
        return self._resolve(kind, repo, rev, path)

    def _resolve(self, kind, repo, rev, path):
        commit = self._repository(kind, repo).find(rev)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        file, headers = commit.files[path], {"X-Repo-Commit": commit.oid}
        if not file.lfs:
            return self._content(file.content, {**headers, "ETag": f'"{file.git_oid}"'})
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return 302, b"", {**headers, **linked, "Location": self._storage(file.sha256)}

    def _content(self, content: bytes, headers: dict[str, str]):
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
        return 206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}

    # Uploads

    @route("POST", "/api/{kind}/{repo}/preupload/{rev}")
    def preupload(self, kind, repo, rev):
        files = self._repository(kind, repo, write=True, own=not self._proposed()).find(rev).files

        def answer(wanted):
            path, old = wanted["path"], files.get(wanted["path"])
            lfs = path.endswith(LFS_KINDS) or wanted["size"] > LFS_SIZE
            oid = {"oid": old.sha256 if old.lfs else old.git_oid} if old else {}
            return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid}

        return {"files": [answer(wanted) for wanted in self._json()["files"]]}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def batch_model(self, repo):
        return self._batch("models", repo)

    @route("POST", "/{kind}/{repo}.git/info/lfs/objects/batch")
    def batch(self, kind, repo):
        return self._batch(kind, repo)

    def _batch(self, kind, repo):
        self._repository(kind, repo, write=True, own=False)  # it may be for a pull request

        in_parts = "multipart" in self._json()["transfers"]

        def answer(wanted):
            if wanted["oid"] in self.server.lfs:
                return wanted
            href = self._storage(wanted["oid"])
            upload = {"href": href}
            if in_parts and (n_parts := math.ceil(wanted["size"] / PART_SIZE)) > 1:
                parts = {f"{part:05d}": f"{href}/part/{part}" for part in range(1, n_parts + 1)}
                upload = {"href": f"{href}/complete", "header": {"chunk_size": str(PART_SIZE), **parts}}
            return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{href}/verify"}}}

        transfer = "multipart" if in_parts else "basic"
        return {"transfer": transfer, "objects": [answer(wanted) for wanted in self._json()["objects"]]}

    @route("GET", "/lfs/{oid}")
    def read_lfs(self, oid):
        return self._content(self.server.lfs[oid], {"ETag": f'"{oid}"'})

    @route("PUT", "/lfs/{oid}")
    def write_lfs(self, oid):
        self._refuse_authorization()
        return self._store(oid, self.body)

    def _refuse_authorization(self):
        if "Authorization" in self.headers:
            raise Refusal(400, None, "Only one auth mechanism allowed")

    def _store(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, None, "The content is not what its oid says")
        self.server.lfs[oid] = content
        return {}

    @route("PUT", "/lfs/{oid}/part/(?P<part>[0-9]+)")
    def write_part(self, oid, part):
        self._refuse_authorization()
        self.server.parts[oid, int(part)] = self.body
        return 200, b"", {"ETag": self._part_tag(oid, int(part))}

    def _part_tag(self, oid, part):
        return f'"{hashlib.md5(self.server.parts[oid, part]).hexdigest()}"'

    @route("POST", "/lfs/{oid}/complete")
    def complete_parts(self, oid):
        if oid in self.server.lfs:  # the same content under two names
            return {}
        parts = self._json()["parts"]
        numbers = [part["partNumber"] for part in parts]
        if numbers != list(range(1, len(parts) + 1)) or any(
            part["etag"] != self._part_tag(oid, part["partNumber"]) for part in parts
        ):
            raise Refusal(400, None, "Parts are missing, or are not those that were sent")
        self._store(oid, b"".join(self.server.parts.pop((oid, number)) for number in numbers))
        self.server.n_multipart += 1
        return {}

    @route("POST", "/lfs/{oid}/verify")
    def verify_lfs(self, oid):
        if len(self.server.lfs.get(oid, b"")) != self._json()["size"]:
            raise Refusal(404, None, "No such object of that size")
        return {}

    @route("POST", "/api/{kind}/{repo}/commit/{rev}")
    def commit(self, kind, repo, rev):
        proposed = self._proposed()
        repository = self._repository(kind, repo, write=True, own=not proposed)
        if rev not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        head, title = repository.branches[rev], ""
        files = dict(head.files)
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                parent = value.get("parentCommit") or ""
                if proposed and parent:
                    head = repository.find(parent)
                    files = dict(head.files)
                if not head.oid.startswith(parent):
                    raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] in self.server.lfs:
                files[value["path"]] = File(self.server.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(folder)}
            else:
                raise Refusal(400, None, f"Cannot apply {key} to {value.get('path')}")
        new = self._new_commit(title, files, head)
        reply = {"success": True, "commitOid": new.oid, "commitUrl": f"{self._url(kind, repo)}/commit/{quote(new.oid)}"}
        if not proposed:
            repository.branches[rev] = new
            return reply
        number = len(repository.pulls) + 1
        repository.pulls[f"refs/pr/{number}"] = new
        return {**reply, "pullRequestUrl": f"{self._url(kind, repo)}/discussions/{number}"}

    def _new_commit(self, title: str, files: dict[str, File], parent: Commit | None) -> Commit:
        oid = hashlib.sha1(f"commit {next(self.server.clock)}".encode()).hexdigest()
        return Commit(oid, title, files, parent)


def _folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


class _Background(AbstractContextManager):
    """Serves from a thread while its `with` block lasts."""

    daemon_threads = True

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    @property
    def endpoint(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client may hang up whenever it likes
            super().handle_error(request, client_address)


class HubServer(_Background, ThreadingHTTPServer):
    """`with HubServer() as hub:` and point `HF_ENDPOINT` at `hub.endpoint`, `HF_TOKEN` at `TOKEN`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.clock = count()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.n_multipart = 0  # objects that came in parts


class _Relay(socketserver.BaseRequestHandler):
    server: CuttingProxy

    def handle(self) -> None:
        if self.server.has_cut or not (chunk := self.request.recv(1 << 16)):
            return
        url = urlsplit(chunk.split(b" ", 2)[1].decode())
        with socket.create_connection((url.hostname, url.port or 80)) as upstream:
            threading.Thread(target=self._return, args=(upstream,), daemon=True).start()
            while chunk and not self.server.has_cut:
                if self.server.meets(chunk):
                    head, blank, body = chunk.partition(b"\r\n\r\n")
                    body = body or self.request.recv(1 << 16)
                    chunk = head + blank + body[: len(body) // 2]
                upstream.sendall(chunk.replace(f" http://{url.netloc}/".encode(), b" /"))
                chunk = b"" if self.server.has_cut else self.request.recv(1 << 16)

    def _return(self, upstream: socket.socket) -> None:
        with suppress(OSError):
            while chunk := upstream.recv(1 << 16):
                self.request.sendall(chunk)


class CuttingProxy(_Background, socketserver.ThreadingTCPServer):
    """An HTTP proxy that breaks off in the middle of a request with `marker` in its head, and is dead from then on.

    Args:
        passes (`int`): Such requests that it lets pass before.
    """

    def __init__(self, marker: bytes, *, passes: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.marker = marker
        self.passes = passes
        self.has_cut = False
        self.lock = threading.Lock()

    def meets(self, chunk: bytes) -> bool:
        """Whether this is where to break off."""
        with self.lock:
            if self.marker in chunk:
                self.has_cut = self.has_cut or self.passes == 0
                self.passes -= 1
            return self.has_cut and self.marker in chunk
