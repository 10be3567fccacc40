"""Which fields of its records a converter or a mapping does not look at: what they say would be lost in silence."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from schemas.errors import Reject

VALUES = 4  # are shown of each field


def unread(records: Iterable[dict[str, Any]], convert: Callable[[dict[str, Any]], Any]) -> dict[str, list[Any]]:
    """The fields, as `meta.status` and `messages[].rating`, that are in a record and are read in none, each with some
    of its values. A field is read with all that it holds, unless some of that is read by itself."""
    read, there = set[str](), dict[str, list[Any]]()
    for record in records:
        try:
            convert(_Watched(record, "", read))
        except Reject:
            continue  # it may not have been read to its end
        for path, value in _fields(record, ""):
            shown = there.setdefault(path, [])
            if len(shown) < VALUES and value is not None and value not in shown:
                shown.append(value)
    looked_into = {path.rpartition(".")[0] for path in read}
    return {
        path: values
        for path, values in there.items()
        if values and path not in read and path.rpartition(".")[0] in looked_into
    }


def _fields(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield _within(path, key), one
            yield from _fields(one, _within(path, key))
    elif isinstance(value, list):
        for one in value:
            yield from _fields(one, f"{path}[]")


def _within(path: str, key: str) -> str:
    """The path of a field; replies within replies are as deep as the first."""
    return path.removesuffix("[]") if path.endswith(f".{key}[]") else f"{path}.{key}"


def _watched(value: Any, path: str, read: set[str]) -> Any:
    if isinstance(value, dict):
        return _Watched(value, path, read)
    return [_watched(one, f"{path}[]", read) for one in value] if isinstance(value, list) else value


class _Watched(dict[str, Any]):
    """An object that notes which of its fields are read."""

    def __init__(self, record: dict[str, Any], path: str, read: set[str]):
        super().__init__({key: _watched(value, _within(path, key), read) for key, value in record.items()})
        self.path, self.read = path, read

    def __getitem__(self, key: str) -> Any:
        self.read.add(_within(self.path, key))
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(_within(self.path, key))
        return super().get(key, default)

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]

    def __iter__(self) -> Iterator[str]:  # makes dict(self) and {**self} read every field by itself
        return super().__iter__()
