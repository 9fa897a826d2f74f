"""The Hub's protocol, as far as `huggingface_hub` speaks it to push and pull models."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from hub.card_rules import card_metadata, card_problems
from hub.hub_repositories import Blob, Repositories, Repository


LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".png")
HUB = "https://huggingface.co"
STORAGE = "https://cdn-lfs.huggingface.test"


@dataclass
class Request:
    """One request; `user` is None without a token."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    user: str | None

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """Status, content (JSON unless bytes) and headers of a response."""

    status: int = 200
    content: object = None
    headers: dict[str, str] = field(default_factory=dict)


def error(status: int, message: str, code: str | None = None) -> Answer:
    """As the Hub says that something went wrong."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, headers)


def answer(repositories: Repositories, request: Request) -> Answer:
    """What the Hub answers."""
    for method, pattern, route in ROUTES:
        match = re.fullmatch(pattern, request.path)
        if match and request.method in method.split():
            return route(repositories, request, *match.groups())
    return error(404, f"no route for {request.method} {request.path}")


def who_am_i(hub: Repositories, request: Request) -> Answer:
    if request.user is None:
        return error(401, "Invalid username or password.")
    return Answer(content={"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {}}})


def create(hub: Repositories, request: Request) -> Answer:
    asked = request.json
    if request.user is None:
        return error(401, "Invalid username or password.")
    owner = asked.get("organization") or request.user
    if owner != request.user:
        return error(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    name = f"{owner}/{asked['name']}"
    if name in hub.named:
        return Answer(409, {"error": "You already created this model repo", "url": f"{HUB}/{name}"})
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    hub.named[name] = Repository(name, private)
    return Answer(content={"url": f"{HUB}/{name}", "name": name, "id": name})


def validate_card(hub: Repositories, request: Request) -> Answer:
    problems = [{"message": one} for one in card_problems(request.json["content"])]
    return Answer(400 if problems else 200, {"errors": problems, "warnings": []})


def with_repository(route):
    """Find the repository of a route first; what may not be seen looks as if it were not there."""

    def found(hub: Repositories, request: Request, name: str, *rest: str) -> Answer:
        repository = hub.visible(name, request.user)
        if repository is None:
            return error(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
        writes = request.method in ("POST", "PUT") and route is not paths_info
        if writes and request.user != name.partition("/")[0]:
            return error(401 if request.user is None else 403, "You don't have write access to this repository")
        return route(hub, request, repository, *rest)

    return found


def no_revision(revision: str) -> Answer:
    return error(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def preupload(hub: Repositories, request: Request, repository: Repository, revision: str) -> Answer:
    """Which files go to LFS, which are ignored by the `.gitignore` that comes with them, which are there already."""
    ignored = [line for line in request.json.get("gitIgnore", "").splitlines() if line and not line.startswith("#")]
    there = (repository.at(unquote(revision)) or ("", {}))[1]
    files = []
    for entry in request.json["files"]:
        path = entry["path"]
        told = {"path": path, "uploadMode": "lfs" if path.endswith(LFS_ENDINGS) else "regular"}
        told["shouldIgnore"] = any(_ignores(line, path) for line in ignored)
        told["oid"] = there[path].oid if path in there and not there[path].lfs else None
        files.append(told)
    return Answer(content={"files": files})


def _ignores(line: str, path: str) -> bool:
    """Git's rule, for the lines used here: `/name` or `/name-*/` at the top."""
    top = re.escape(line.strip("/")).replace(r"\*", "[^/]*")
    return re.match(f"{top}(/|$)", path) is not None


def lfs_batch(hub: Repositories, request: Request, repository: Repository) -> Answer:
    objects = []
    for one in request.json["objects"]:
        upload = _in_parts(hub, one) or {"href": f"{STORAGE}/objects/{one['oid']}"}
        verify = {"href": f"{HUB}/api/lfs/verify"}
        missing = {} if one["oid"] in hub.objects else {"actions": {"upload": upload, "verify": verify}}
        objects.append({"oid": one["oid"], "size": one["size"], **missing})
    return Answer(content={"transfer": "basic", "objects": objects})


def _in_parts(hub: Repositories, wanted: dict) -> dict | None:
    """Where each part of a large object goes, and where to say that all are there."""
    if hub.part_size is None or wanted["size"] <= hub.part_size:
        return None
    places = {
        f"{number:05d}": f"{STORAGE}/objects/{wanted['oid']}/{number}"
        for number in range(1, -(-wanted["size"] // hub.part_size) + 1)
    }
    header = {"chunk_size": str(hub.part_size), **places}
    return {"href": f"{HUB}/api/complete_multipart/{wanted['oid']}", "header": header}


def put_part(hub: Repositories, request: Request, oid: str, number: str) -> Answer:
    hub.parts[oid, int(number)] = request.body
    return Answer(headers={"ETag": _part_etag(request.body)})


def complete_object(hub: Repositories, request: Request, oid: str) -> Answer:
    """All parts in their order, each as its receipt says."""
    told = [(part["partNumber"], part["etag"]) for part in request.json["parts"]]
    there = sorted((number, _part_etag(content)) for (one, number), content in hub.parts.items() if one == oid)
    if told != there:
        return error(400, "these are not the parts that are there")
    whole = b"".join(hub.parts[oid, number] for number, _ in told)
    if hashlib.sha256(whole).hexdigest() != oid:
        return error(400, "the content does not have this hash")
    for number, _ in told:
        del hub.parts[oid, number]
    hub.objects[oid] = whole
    return Answer()


def _part_etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def put_object(hub: Repositories, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        return error(400, "the content does not have this hash")
    hub.objects[oid] = request.body
    return Answer(headers={"ETag": f'"{oid}"'})


def verify_object(hub: Repositories, request: Request) -> Answer:
    return Answer(200 if request.json["oid"] in hub.objects else 404, {})


def get_object(hub: Repositories, request: Request, oid: str) -> Answer:
    return Answer(content=hub.objects[oid], headers={"ETag": f'"{oid}"'})


def commit(hub: Repositories, request: Request, repository: Repository, branch: str) -> Answer:
    found = repository.at(unquote(branch))
    if found is None:
        return no_revision(branch)
    files, message = dict(found[1]), ""
    for line in request.body.splitlines():
        key, value = (json.loads(line)[part] for part in ("key", "value"))
        if key == "header":
            message = value["summary"]
            if value.get("parentCommit", found[0]) != found[0]:
                return error(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in hub.objects:
                return error(400, f"the object of {value['path']} was not uploaded")
            files[value["path"]] = Blob(hub.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(value["path"], None)
    if problems := card_problems(files["README.md"].content.decode()) if "README.md" in files else []:
        return error(400, f"Invalid metadata in README.md: {problems}")
    oid = repository.commit(files, unquote(branch), message)
    url = f"{HUB}/{repository.name}/commit/{oid}"
    return Answer(content={"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def info(hub: Repositories, request: Request, repository: Repository, revision: str | None) -> Answer:
    found = repository.at(unquote(revision or "main"))
    if found is None:
        return no_revision(revision)
    oid, files = found
    card = card_metadata(files["README.md"].content.decode()) if "README.md" in files else {}
    tags = [*card.get("tags", []), *([f"license:{card['license']}"] if "license" in card else [])]
    siblings = [{"rfilename": path, "size": len(blob.content)} for path, blob in files.items()]
    told = {"id": repository.name, "sha": oid, "private": repository.private, "tags": tags, "siblings": siblings}
    return Answer(content={**told, "cardData": card, "downloads": 0, "likes": 0})


def tree(hub: Repositories, request: Request, repository: Repository, revision: str) -> Answer:
    found = repository.at(unquote(revision))
    if found is None:
        return no_revision(revision)
    return Answer(content=[blob.entry(path) for path, blob in found[1].items()])


def paths_info(hub: Repositories, request: Request, repository: Repository, revision: str) -> Answer:
    found = repository.at(unquote(revision))
    if found is None:
        return no_revision(revision)
    wanted = request.json["paths"] if request.body[:1] == b"{" else re.findall("paths=([^&]+)", request.body.decode())
    return Answer(content=[found[1][path].entry(path) for path in map(unquote, wanted) if path in found[1]])


def tag(hub: Repositories, request: Request, repository: Repository, revision: str) -> Answer:
    found = repository.at(unquote(revision))
    if found is None:
        return no_revision(revision)
    repository.refs[request.json["tag"]] = found[0]
    return Answer()


def resolve(hub: Repositories, request: Request, repository: Repository, revision: str, path: str) -> Answer:
    """A file itself, or where the storage has it."""
    found = repository.at(unquote(revision))
    if found is None:
        return no_revision(revision)
    oid, files = found
    if path not in files:
        return Answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
    blob = files[path]
    headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"'}
    if not blob.lfs:
        return Answer(content=blob.content, headers=headers)
    headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
    return Answer(302, None, {**headers, "Location": f"{STORAGE}/objects/{blob.sha256}"})


# Methods, the whole path, and what answers.
ROUTES = (
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate_card),
    ("PUT", "/objects/([0-9a-f]{64})", put_object),
    ("GET HEAD", "/objects/([0-9a-f]{64})", get_object),
    ("PUT", r"/objects/([0-9a-f]{64})/(\d+)", put_part),
    ("POST", "/api/complete_multipart/([0-9a-f]{64})", complete_object),
    ("POST", "/api/lfs/verify", verify_object),
    ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", with_repository(lfs_batch)),
    ("POST", r"/api/models/([\w.-]+/[\w.-]+)/preupload/([^/]+)", with_repository(preupload)),
    ("POST", r"/api/models/([\w.-]+/[\w.-]+)/commit/([^/]+)", with_repository(commit)),
    ("POST", r"/api/models/([\w.-]+/[\w.-]+)/tag/([^/]+)", with_repository(tag)),
    ("POST", r"/api/models/([\w.-]+/[\w.-]+)/paths-info/([^/]+)", with_repository(paths_info)),
    ("GET", r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)", with_repository(tree)),
    ("GET", r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?", with_repository(info)),
    ("GET HEAD", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", with_repository(resolve)),
)
