"""A Hugging Face Hub on loopback: what `huggingface_hub` needs to push and pull models, with commits kept in memory."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "user"
TOKEN = "hf_loopback"
REPO_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    oid: str
    message: str
    # path -> content
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    # branch -> id of its last commit
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        listing = "".join(f"{path} {hashlib.sha1(content).hexdigest()}\n" for path, content in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}\n{listing}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body


class HubServer:
    """Serves in a thread of its own from `with` to the end of it.

    Args:
        is_lfs (callable): (repository, path) -> whether the file is to be uploaded by the LFS protocol.
    """

    def __init__(self, is_lfs=lambda repo_id, path: False):
        self.is_lfs = is_lfs
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        # every request answered: method, path, status
        self.log: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home) -> dict[str, str]:
        """What a process needs in its environment, before any import, to have this for its Hub and `home` for its cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def file(self, repo_id: str, path: str, revision: str = "main") -> str:
        return self.repos[repo_id].at(revision).files[path].decode()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    ###############################
    # Plumbing
    ###############################

    def _handle(self):
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b"".join(self._chunks())
        else:
            self.body = self.rfile.read(length)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for route_method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and route_method == method:
                    with self.hub.lock:
                        arguments = {key: unquote(value) for key, value in match.groupdict().items() if value}
                        getattr(self, name)(**arguments)
                    return
            raise Refused(501, f"no route {self.command} {url.path}")
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._json(refused.body or {"error": str(refused)}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None):
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    @property
    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_token(self):
        if not self._authorized:
            raise Refused(401, "Invalid username or password.")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._authorized):
            # the Hub, too, does not tell the two apart
            raise Refused(404 if self._authorized else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo_id: str, revision: str) -> Commit:
        commit = self._repo(repo_id).at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _entry(self, repo_id: str, path: str, content: bytes) -> dict:
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if self.hub.is_lfs(repo_id, path):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        return entry

    ###############################
    # Routes
    ###############################

    def whoami(self):
        self._require_token()
        self._json({"name": USER, "type": "user", "orgs": []})

    def create_repo(self):
        self._require_token()
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", body=answer)
        repo = self.hub.repos[repo_id] = Repo(private=request.get("visibility") == "private")
        repo.add("main", "initial commit", {})
        self._json(answer)

    def create_branch(self, repo_id, branch):
        self._require_token()
        repo = self._repo(repo_id)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repo.branches[branch] = self._commit(repo_id, start).oid
        self._json({}, 201)

    def validate_yaml(self):
        card = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        metadata = yaml.safe_load(block[1]) if block else {}
        base_model = metadata.get("base_model", "user/model")
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base_model):
            message = f'"base_model" with value "{base_model}" is not valid. Use a model id from https://hf.co/models.'
            raise Refused(400, "Bad request", body={"errors": [{"message": message}], "warnings": []})
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        self._require_token()
        present = self._commit(repo_id, revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = self.hub.is_lfs(repo_id, path)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:
                entry = self._entry(repo_id, path, present[path])
                answer["oid"] = entry["lfs"]["oid"] if lfs else entry["oid"]
            files.append(answer)
        self._json({"files": files})

    def lfs_batch(self, repo_id):
        self._require_token()
        self._repo(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.lfs_objects:
                url = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(wanted)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(422, "the content is not what its id says")
        self.hub.lfs_objects[oid] = self.body
        self._send(b"")

    def lfs_verify(self, oid):
        if len(self.hub.lfs_objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "no such object")
        self._send(b"")

    def commit(self, repo_id, revision):
        self._require_token()
        repo = self._repo(repo_id)
        if revision not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repo.at(revision).files)
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            else:
                raise Refused(400, f"no operation {key}")
        oid = repo.add(revision, message, files).oid
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"})

    def model_info(self, repo_id, revision="main"):
        commit = self._commit(repo_id, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = self._repo(repo_id).private
        self._json({"id": repo_id, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo_id, revision, folder=""):
        commit = self._commit(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        inside = {path: content for path, content in commit.files.items() if path.startswith(prefix)}
        self._json(
            [
                self._entry(repo_id, path, content)
                for path, content in inside.items()
                if recursive or "/" not in path.removeprefix(prefix)
            ]
        )

    def resolve(self, repo_id, revision, path):
        commit = self._commit(repo_id, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        entry = self._entry(repo_id, path, content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        self._send(content, headers=headers)


MODEL = f"/api/models/{REPO_ID}"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"{MODEL}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", f"{MODEL}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("GET", MODEL, "model_info"),
    ("GET", f"{MODEL}/revision/(?P<revision>[^/]+)", "model_info"),
    ("GET", f"{MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"/{REPO_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", f"/{REPO_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
