"""
A small Hub on 127.0.0.1: the parts of its protocol that huggingface_hub uses to publish and to load models.

Repositories live in memory. Weights and images go the way of large files (LFS), the rest into the commits themselves,
as on the Hub. Failures can be asked for, and every request is on record.

```python
with HubServer() as hub:
    hub.users["hf_secret"] = ("ann", ["lab"])
    ...  # a client whose endpoint is hub.url
```
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

import yaml
from huggingface_hub import constants

try:
    from huggingface_hub.utils import close_session
except ImportError:  # before huggingface_hub 1.0
    from huggingface_hub.utils import reset_sessions as close_session

TOKEN = "hf_annsSecretToken0123456789"  # a made-up one, of the user that the tests are
LARGE_FILES = (".safetensors", ".bin", ".png")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "openrail", "other", "unknown")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
PIPELINE_TAGS = ("unconditional-image-generation", "text-to-image", "image-to-image", "image-classification")


@dataclass
class Repository:
    """Commits are numbered by their hash; `files` are those of one commit: path to (content, whether large)."""

    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    messages: dict = field(default_factory=dict)

    def commit(self, branch: str, changes: dict, message: str) -> str:
        files = {**self.commits.get(self.branches.get(branch), {}), **changes}
        files = {path: content for path, content in files.items() if content is not None}
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch], self.messages[oid] = files, oid, message
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


class HubServer:
    """The server, running from `with` on. `users` maps a token to the name and the organisations of its owner."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, tuple[str, list[str]]] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, token
        self.failures: list[list] = []
        self.damaged: set[str] = set()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage_url = self.url.replace("127.0.0.1", "localhost")  # another host, as the Hub's storage is

    def __enter__(self) -> "HubServer":
        close_session()  # of this process's client, so that it reads its settings anew
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop: clients find the Hub out of reach."""
        self.server.shutdown()
        self.server.server_close()
        close_session()  # which would go on with the connections that it has

    def environment(self, home) -> dict[str, str]:
        """Of a process whose client talks to this server, with its cache in the folder `home`."""
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
        }

    def fail(self, method: str, pattern: str, how: int | str, times: int = 1) -> None:
        """The next `times` requests whose path matches fail: with a status, or with the connection cut ("cut")."""
        self.failures.append([method, re.compile(pattern), how, times])

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        repository = self.repositories[repo_id]
        return {path: content for path, (content, _) in repository.commits[repository.resolve(revision)].items()}

    def publish(self, repo_id: str, folder, private: bool = False) -> None:
        """A repository with a folder's files, without any client."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        changes = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                changes[path.relative_to(folder).as_posix()] = (path.read_bytes(), path.name.endswith(LARGE_FILES))
        repository.commit("main", changes, "Published")


def _hash(content: bytes, large: bool) -> str:
    return hashlib.sha256(content).hexdigest() if large else _git_hash(content)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _RefusalError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, self.token))
            how = self._failure()
            if how == "cut":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            try:
                if how is not None:
                    raise _RefusalError(how, "The Hub is having a bad day")
                for method, pattern, action in _ROUTES:
                    found = re.fullmatch(pattern, url.path)
                    if found and self.command in method.split():
                        action(self, *map(unquote, found.groups()))
                        return
                raise _RefusalError(404, f"No route for {self.command} {self.path}")
            except _RefusalError as refusal:
                headers = {"X-Error-Message": str(refusal)}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self._send(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _failure(self) -> int | str | None:
        for failure in self.hub.failures:
            method, pattern, how, times = failure
            if times and method == self.command and pattern.search(self.path):
                failure[3] -= 1
                return how
        return None

    def _send(self, content: bytes = b"", status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    # Who may do what

    def _user(self) -> tuple[str, list[str]]:
        if self.token not in self.hub.users:
            raise _RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.users[self.token]

    def _owns(self, repo_id: str) -> bool:
        name, organisations = self.hub.users.get(self.token, (None, []))
        return repo_id.removeprefix("spaces/").split("/")[0] in (name, *organisations)

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._owns(repo_id)):
            # the Hub does not tell strangers what exists
            status = 404 if self.token in self.hub.users else 401
            raise _RefusalError(status, "Repository not found", "RepoNotFound")
        if write and not self._owns(repo_id):
            raise _RefusalError(403, "You don't have the rights to write to this repository")
        return repository

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict]:
        repository = self._repository(repo_id)
        oid = repository.resolve(revision)
        if oid is None:
            raise _RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # What the Hub does

    def who_am_i(self):
        name, organisations = self._user()
        self._send_json({"type": "user", "name": name, "orgs": [{"name": o, "type": "org"} for o in organisations]})

    def create_repository(self):
        name, organisations = self._user()
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or name
        if owner not in (name, *organisations):
            raise _RefusalError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") not in ("gradio", "docker", "static"):
                raise _RefusalError(400, '"sdk" must be one of gradio, docker, static')
            repo_id = f"spaces/{repo_id}"
        status = 409 if repo_id in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[repo_id] = Repository(
                wanted.get("visibility") == "private" or wanted.get("private", False)  # so before huggingface_hub 1.0
            )
            self.hub.repositories[repo_id].commit("main", {".gitattributes": (b"", False)}, "initial commit")
        self._send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, status)

    def validate_card(self):
        """Some of the Hub's rules: kinds of values, known licences and tasks, names of data sets."""
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        if not found:
            self._send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
            return
        try:
            card = yaml.safe_load(found[1])
        except yaml.YAMLError as error:
            self._send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        errors = []
        rules = {"license": LICENSES, "pipeline_tag": PIPELINE_TAGS}
        if json.loads(self.body).get("repoType") == "space":
            rules |= {"sdk": ("gradio", "docker", "static"), "colorFrom": COLOURS, "colorTo": COLOURS}
            errors += [f'"{key}" is missing' for key in ("title", "sdk", "app_file") if key not in card]
        for key, known in rules.items():
            if key in card and card[key] not in known:
                errors.append(f'"{key}" must be one of {known}')
        for key in ("tags", "datasets"):
            if not all(isinstance(value, str) for value in card.get(key, [])):
                errors.append(f'"{key}" must be a list of strings')
        if not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in card.get("datasets", [])):
            errors.append('"datasets" must be names of data sets on the Hub')
        self._send_json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def describe(self, repo_id: str, revision: str = "main"):
        oid, files = self._commit(repo_id, revision)
        self._send_json(
            {
                "_id": repo_id,
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": self.hub.repositories[repo_id].private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def list_tree(self, repo_id: str, revision: str):
        tree = []
        for path, (content, large) in self._commit(repo_id, revision)[1].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            if large:
                entry["lfs"] = {"oid": _hash(content, True), "size": len(content), "pointerSize": 130}
            tree.append(entry)
        self._send_json(tree)

    def list_refs(self, repo_id: str):
        repository = self._repository(repo_id)

        def describe(kind, refs):
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        heads, tags = describe("heads", repository.branches), describe("tags", repository.tags)
        self._send_json({"branches": heads, "tags": tags, "converts": []})

    def create_branch(self, repo_id: str, branch: str):
        repository = self._repository(repo_id, write=True)
        if branch in repository.branches:
            raise _RefusalError(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self._commit(repo_id, start)[0]
        self._send_json({})

    def create_tag(self, repo_id: str, revision: str):
        repository, tag = self._repository(repo_id, write=True), json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise _RefusalError(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = self._commit(repo_id, revision)[0]
        self._send_json({})

    def plan_upload(self, repo_id: str, revision: str):
        self._repository(repo_id, write=True)
        present = self._commit(repo_id, revision)[1]
        plan = []
        for file in json.loads(self.body)["files"]:
            entry = {"path": file["path"], "shouldIgnore": False}
            entry["uploadMode"] = "lfs" if file["path"].endswith(LARGE_FILES) else "regular"
            if file["path"] in present:
                entry["oid"] = _hash(*present[file["path"]])
            plan.append(entry)
        self._send_json({"files": plan})

    def plan_large_files(self, repo_id: str):
        self._repository(repo_id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                href = f"{self.hub.url}/storage/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(entry)
        self._send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusalError(400, "The content is not what its hash says")
        self.hub.large_files[oid] = self.body
        self._send()

    def verify(self):
        wanted = json.loads(self.body)
        if len(self.hub.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise _RefusalError(404, "No such object")
        self._send()

    def take_commit(self, repo_id: str, branch: str):
        repository = self._repository(repo_id, write=True)
        if branch not in repository.branches:
            raise _RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        changes, message = {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                changes[value["path"]] = (base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise _RefusalError(400, "Large file was not uploaded")
                changes[value["path"]] = (self.hub.large_files[value["oid"]], True)
            else:
                changes[value["path"]] = None
        oid = repository.commit(branch, changes, message)
        if self._failure_after_commit():
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def _failure_after_commit(self) -> bool:
        for failure in self.hub.failures:
            if failure[0] == "ANSWER" and failure[3] and failure[1].search(self.path):
                failure[3] -= 1
                return True
        return False

    def serve_file(self, repo_id: str, revision: str, path: str):
        oid, files = self._commit(repo_id, revision)
        headers = {constants.HUGGINGFACE_HEADER_X_REPO_COMMIT: oid}
        if path not in files:
            self._send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content, large = files[path]
        etag = _hash(content, large)
        if path in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if not large:
            self._send(content, 200, {**headers, "ETag": f'"{etag}"'})
            return
        key = _hash(content, True)
        self.hub.large_files[key] = content
        headers[constants.HUGGINGFACE_HEADER_X_LINKED_ETAG] = f'"{etag}"'
        headers[constants.HUGGINGFACE_HEADER_X_LINKED_SIZE] = len(content)
        self._send(b"", 302, {**headers, "Location": f"{self.hub.storage_url}/storage/{quote(key)}"})

    def fetch(self, oid: str):
        content = self.hub.large_files[oid]
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            begin = int(start[1])
            headers = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
            self._send(content[begin:], 206, headers)
        else:
            self._send(content)


_REPO = r"((?:spaces/)?[^/]+/[^/]+)"  # by which Spaces are told from models
_API = r"/api/(?:models/|(?=spaces/))"
_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("POST", r"/api/repos/create", _Handler.create_repository),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("GET", rf"{_API}{_REPO}", _Handler.describe),
    ("GET", rf"{_API}{_REPO}/revision/([^/]+)", _Handler.describe),
    ("GET", rf"{_API}{_REPO}/tree/([^/]+)", _Handler.list_tree),
    ("GET", rf"{_API}{_REPO}/refs", _Handler.list_refs),
    ("POST", rf"{_API}{_REPO}/branch/([^/]+)", _Handler.create_branch),
    ("POST", rf"{_API}{_REPO}/tag/([^/]+)", _Handler.create_tag),
    ("POST", rf"{_API}{_REPO}/preupload/([^/]+)", _Handler.plan_upload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.plan_large_files),
    ("PUT", r"/storage/(\w+)", _Handler.store),
    ("GET HEAD", r"/storage/(\w+)", _Handler.fetch),
    ("POST", r"/verify", _Handler.verify),
    ("POST", rf"{_API}{_REPO}/commit/([^/]+)", _Handler.take_commit),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.serve_file),
)
