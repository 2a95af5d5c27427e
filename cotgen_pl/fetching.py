"""Fetching what a config needs, each file whole and the right one.

A recipe (`configs/recipes/*.yaml`) lists files with their addresses. A broken download is resumed
where the server allows it; size and sha256 are checked before a file takes its place. A file whose
sha256 nobody published is pinned by its first download: revision and sha256 go into `fetch.lock`,
beside the folder of downloads, and later downloads must match.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from cotgen_pl.downloads import Downloader, UnreachableError
from cotgen_pl.files import write_whole

LOCK = "fetch.lock"
SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
REVISION = re.compile(r"\w[\w./-]*")
WILD = re.compile(r"[*?\[]")
# The same weights as in safetensors, for other readers; no loader of this package opens them then.
OTHER_FORMATS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".tflite")


@dataclass(frozen=True)
class RecipeFile:
    """One file, or all of a hub repository that match a pattern.

    Where weights lie there in safetensors, a pattern leaves out those in other formats.

    Args:
        target: Where it goes inside the folder of downloads; for a pattern a folder.
        url: Its address; or else hub and file.
        hub: A repository of models on the Hugging Face hub, "owner/name".
        file: The file's name there, or a pattern such as "*.json".
        revision: A branch, tag or commit there.
        sha256: 64 hexadecimal digits, where they were published; absent means pinned by the first
            download.
        size: Bytes, where they were published.
    """

    target: str
    url: str | None = None
    hub: str | None = None
    file: str | None = None
    revision: str = "main"
    sha256: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        check_target(self.target)
        by_hub = self.hub is not None and self.file is not None and self.url is None
        if not by_hub and not (self.url and self.hub is None and self.file is None):
            raise ValueError(f"{self.target}: expected either a url or hub and file; give one")
        if self.url is not None and not re.match(r"https?://", self.url):
            raise ValueError(f"{self.target}: expected an http(s) url, got {self.url}; correct it")
        if self.hub is not None and not HUB_ID.fullmatch(self.hub):
            raise ValueError(f"{self.target}: expected a hub id, got {self.hub!r}; correct it")
        if not REVISION.fullmatch(self.revision) or ".." in self.revision:
            raise ValueError(f"{self.target}: expected a revision, got {self.revision!r}")
        if self.sha256 is not None and not SHA256.fullmatch(self.sha256):
            raise ValueError(
                f"{self.target}: expected a sha256 of 64 digits 0-9a-f, got {self.sha256}"
            )
        if self.is_pattern and (self.sha256 or self.size):
            raise ValueError(f"{self.target}: expected no sha256 or size beside a pattern")

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for several files of a repository."""
        return self.file is not None and bool(WILD.search(self.file))

    @property
    def key(self) -> str:
        """Its name in the lock: where it comes from, whatever the mirror."""
        return self.url or f"hub:{self.hub}@{self.revision}/{self.file}"


@dataclass(frozen=True)
class RecipeConversion:
    """What `tools/convert.py` makes of the files.

    Args:
        format: One that it knows.
        source: A file or folder inside the folder of downloads.
        target: The folder to make there.
        arguments: Further arguments of the format.
        folders: Further arguments that are folders inside the folder of downloads.
    """

    format: str
    source: str
    target: str
    arguments: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for target in (self.source, self.target, *self.folders.values()):
            check_target(target)


@dataclass(frozen=True)
class RecipePhrases:
    """A phrase file that spaCy makes of the files, which hold a prompt per line.

    Args:
        target: The file to make, inside the folder of downloads.
        model: spaCy's, which must be installed.
    """

    target: str
    model: str

    def __post_init__(self) -> None:
        check_target(self.target)


@dataclass(frozen=True)
class Recipe:
    """What one config needs.

    Args:
        files: What to download.
        folder: The folder of downloads, where no other is asked for.
        convert: What to make of it then.
        phrases: What to parse it into then.
    """

    files: list[RecipeFile]
    folder: str = "weights"
    convert: RecipeConversion | None = None
    phrases: RecipePhrases | None = None


def check_target(target: str) -> None:
    """Raise a ValueError for a path that could lead out of the folder of downloads."""
    path = PurePosixPath(target)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\:]", target):
        raise ValueError(
            f"expected a relative path inside the folder of downloads, got {target!r}; write it "
            "with / and without .."
        )


def read_recipe(file: Path) -> Recipe:
    """A recipe from its YAML file.

    Raises:
        ValueError: It is not one, or an entry of it would lead out of the folder of downloads.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        read = parser.parse_path(str(file)).as_dict()
        files = [RecipeFile(**entry) for entry in read["files"]]
        convert = RecipeConversion(**read["convert"]) if read["convert"] else None
        phrases = RecipePhrases(**read["phrases"]) if read["phrases"] else None
        recipe = Recipe(files, read["folder"], convert, phrases)
    except (ArgumentError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected a recipe, got: {error}") from error
    targets = [entry.target for entry in recipe.files if not entry.is_pattern]
    twice = {target for target in targets if targets.count(target) > 1}
    if twice or not recipe.files:
        raise ValueError(f"{file}: expected files, each target once, got {sorted(twice) or 'none'}")
    return recipe


class Lock:
    """What first downloads were like; a JSON file to be committed.

    Args:
        file: Made by the first entry.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: dict[str, dict[str, Any]] = {}
        if file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                self.entries = {key: dict(entry) for key, entry in found.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}: expected JSON with an entry per file, got a damaged file; restore it "
                    "from version control"
                ) from error

    def record(self, key: str, **entry: Any) -> None:
        """Pin a file, or the list of a repository's files."""
        self.entries[key] = entry
        text = json.dumps(self.entries, indent=2, sort_keys=True) + "\n"
        write_whole(self.file, lambda path: path.write_text(text, encoding="utf-8"))


class Fetcher:
    """Puts the files of recipes into a folder.

    Args:
        root: The folder of downloads; the lock lies beside it.
        downloader: What talks to servers.
        hub: Address of the Hugging Face hub or a mirror of it.
    """

    def __init__(
        self, root: Path, downloader: Downloader, hub: str = "https://huggingface.co"
    ) -> None:
        self.root = root.absolute()
        self.downloader, self.hub = downloader, hub.rstrip("/")
        self.lock = Lock(self.root.parent / LOCK)

    def fetch(self, recipe: Recipe) -> Iterator[str]:
        """Fetch what is not there; gives a line on each file.

        Raises:
            ValueError: A file that is not what it should be, or out of reach.
        """
        for entry in recipe.files:
            for file in self._expand(entry):
                yield self._fetch_file(file)

    def place(self, target: str) -> Path:
        """Where a target of a recipe lies."""
        check_target(target)
        return self.root / target

    def _fetch_file(self, entry: RecipeFile) -> str:
        path = self.place(entry.target)
        pin = self.lock.entries.get(entry.key, {})
        expected = entry.sha256 or pin.get("sha256")
        if path.exists():
            return self._accept(entry, path, expected)
        part = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        address = self._address(entry, pin)
        try:
            answer = self.downloader.download(address, part)
        except UnreachableError as error:
            raise ValueError(_advice(str(error), address, path)) from error
        size, sha256 = part.stat().st_size, hash_file(part)
        wrong = _describe_mismatch(entry, expected, size, sha256)
        if wrong:
            self.downloader.discard(part)
            raise ValueError(
                f"{address}: {wrong}; the download was removed. If it should have changed, remove "
                f"its entry from {self.lock.file if pin else 'the recipe'}"
            )
        if expected is None:
            self.lock.record(
                entry.key, revision=answer.revision, etag=answer.etag, sha256=sha256, size=size
            )
        part.replace(path)
        self.downloader.discard(part)
        return (
            f"{path}: {size} bytes, sha256 {'as pinned' if expected else f'{sha256}, now pinned'}"
        )

    def _accept(self, entry: RecipeFile, path: Path, expected: str | None) -> str:
        """Take a file that is there already, if it is the right one."""
        size, sha256 = path.stat().st_size, hash_file(path)
        wrong = _describe_mismatch(entry, expected, size, sha256)
        if wrong:
            raise ValueError(f"{path}: {wrong}; it was left as it is: move it away and fetch again")
        if expected is None:
            self.lock.record(entry.key, revision=None, etag=None, sha256=sha256, size=size)
            return f"{path}: was there, now pinned as it is"
        return f"{path}: is there"

    def _address(self, entry: RecipeFile, pin: dict[str, Any]) -> str:
        if entry.url is not None:
            return entry.url
        revision = pin.get("revision") or entry.revision
        return f"{self.hub}/{entry.hub}/resolve/{quote(revision)}/{quote(entry.file or '')}"

    def _expand(self, entry: RecipeFile) -> Sequence[RecipeFile]:
        """The files that an entry stands for; those of a pattern are listed once and pinned."""
        if not entry.is_pattern:
            return [entry]
        listed = self.lock.entries.get(entry.key) or self._list(entry)
        folder = PurePosixPath(entry.target)
        return [
            replace(entry, file=name, target=str(folder / name), revision=listed["revision"])
            for name in listed["files"]
        ]

    def _list(self, entry: RecipeFile) -> dict[str, Any]:
        address = f"{self.hub}/api/models/{entry.hub}/revision/{quote(entry.revision, safe='')}"
        try:
            answer = self.downloader.read_json(address)
            names, commit = [item["rfilename"] for item in answer["siblings"]], answer["sha"]
        except (UnreachableError, KeyError, TypeError) as error:
            placed = self._find_placed(entry)
            if placed:
                return {"revision": entry.revision, "files": placed}
            raise ValueError(
                f"expected a list of files at {address}, got: {error}; where there is a network "
                f"run `hf download {entry.hub} --include '{entry.file}' --local-dir FOLDER`, put "
                f"FOLDER at {self.place(entry.target)} and run the same command again"
            ) from error
        chosen = sorted(in_one_format(fnmatch.filter(names, entry.file or "")))
        for name in chosen:
            check_target(name)
        if not chosen:
            raise ValueError(
                f"expected files like {entry.file} in the hub repository {entry.hub}, got none "
                f"among its {len(names)}; correct the recipe"
            )
        self.lock.record(entry.key, revision=commit, files=chosen)
        return self.lock.entries[entry.key]

    def _find_placed(self, entry: RecipeFile) -> list[str]:
        """The files of a pattern that somebody has put in their place."""
        folder = self.place(entry.target)
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        visible = [name for name in names if not name.startswith(".") and "/." not in name]
        return sorted(fnmatch.filter(visible, entry.file or ""))


def in_one_format(names: Sequence[str]) -> list[str]:
    """Those of a repository's files that are wanted: with safetensors, no weights in other formats.

    >>> in_one_format(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"])
    ['config.json', 'model.safetensors']
    """
    if not any(name.endswith(".safetensors") for name in names):
        return list(names)
    return [name for name in names if not name.endswith(OTHER_FORMATS)]


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _describe_mismatch(entry: RecipeFile, expected: str | None, size: int, sha256: str) -> str:
    if entry.size is not None and size != entry.size:
        return f"expected {entry.size} bytes, got {size}"
    if expected is not None and sha256 != expected:
        return f"expected sha256 {expected}, got {sha256}"
    return ""


def _advice(reason: str, address: str, path: Path) -> str:
    return (
        f"expected to download {address}, got: {reason}; where there is a network download that "
        f"address with any tool, put the file at {path} and run the same command again"
    )
