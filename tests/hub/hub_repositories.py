"""What a Hub for tests keeps: repositories, their commits, and who may see and change them."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blob:
    """A file of a commit, as git keeps it or, above some size, as Git LFS does."""

    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """Git's id of the file: of an LFS file that of the pointer, which does not matter here."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        """As a tree or `paths-info` lists it."""
        listed = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            listed["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return listed


@dataclass
class Repository:
    """Commits by id, each a whole listing of files; branches and tags point to them."""

    name: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "main", "initial commit")

    def commit(self, files: dict[str, Blob], branch: str, message: str) -> str:
        """Make `files` the branch's new listing; returns the commit's id."""
        number = len(self.commits)
        oid = hashlib.sha1(f"{self.name} {branch} {number}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[branch] = oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        """Commit and files of a branch, a tag or a commit; None if there is no such revision."""
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """Contents on `main`, by path."""
        return {path: blob.content for path, blob in self.commits[self.refs["main"]].items()}


class Repositories:
    """All repositories, the objects uploaded for them, and whose token is whose."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.named: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.part_size: int | None = None  # larger objects are uploaded in parts of so many bytes
        self.parts: dict[tuple[str, int], bytes] = {}  # of objects that are not complete, by number from 1

    def user(self, authorization: str | None) -> str | None:
        """Who a request comes from; None without a token.

        Raises:
            PermissionError: the token is nobody's.
        """
        if not authorization:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in self.tokens:
            raise PermissionError("Invalid credentials in Authorization header")
        return self.tokens[token]

    def visible(self, name: str, user: str | None) -> Repository | None:
        """The repository, if it exists and the user may know of it."""
        found = self.named.get(name)
        if found is None or (found.private and user != name.partition("/")[0]):
            return None
        return found
