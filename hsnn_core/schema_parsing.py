"""From plain dicts to a checked `Schema`; every SchemaError starts with the dotted path of the entry."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .errors import SchemaError
from .keys import KeyType
from .schema import ITEM_SPACE, OWNERS, Encoding, Feature, Interaction, Kind, Owner, Schema, Task
from .schema_eligibility import EXCLUDED_ITEMS, Attribute, AttributeKind
from .terms import most_list_weight

Choice = TypeVar("Choice", bound=str)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DEFAULT_MATCHES = 4
# Ids are int32 and two of them are taken.
MAX_SIZE = 2**31 - 3
LARGEST = 3.4e38

ENCODINGS: dict[str, Encoding] = {"vocab": "vocab", "hash": "hash", "range": "range", "of": "item"}
KINDS: dict[str, Kind] = {"dense": "dense", "sparse": "sparse", "sequence": "sequence"}
TYPES: dict[str, KeyType] = {"int": "int", "string": "string"}
SETTINGS = {
    "dense": ("kind", "dim", "default"),
    "sparse": ("kind", *ENCODINGS, "type", "max", "same_as", "from"),
    "sequence": ("kind", *ENCODINGS, "type", "length", "same_as", "from"),
}
ATTRIBUTE_KINDS: dict[str, AttributeKind] = {"set": "set", "range": "range", "flag": "flag", "key": "key"}
ATTRIBUTE_SETTINGS = {
    "set": ("kind", "type", "max", "ask"),
    "range": ("kind", "from", "until", "default"),
    "flag": ("kind",),
    "key": ("kind", "type"),
}
SECTIONS = ("name", "keys", "tasks", "features", "interactions", "eligibility", "bid")


def parse_schema(raw: Any) -> Schema:
    """See `Schema.from_dict`."""
    top = _mapping("schema", raw)
    _known("schema", top, SECTIONS)
    for section in ("name", "keys", "tasks", "features"):
        if section not in top:
            raise SchemaError(f"{section}: missing; a schema needs name, keys, tasks and features")
    name = _text("name", top["name"])
    keys = _keys(top["keys"])
    tasks = _tasks(top["tasks"])
    features = _features(top["features"], tasks)
    interactions = _interactions(top.get("interactions"), features)
    by_owner = {owner: tuple(f for f in features.values() if f.owner == owner) for owner in OWNERS}
    eligibility = _eligibility(top.get("eligibility"), features)
    bid = top.get("bid")
    return Schema(
        name,
        keys["user"],
        keys["item"],
        keys.get("time"),
        tasks,
        by_owner["user"],
        by_owner["item"],
        interactions,
        eligibility,
        None if bid is None else _text("bid", bid),
    )


def _keys(raw: Any) -> dict[str, str]:
    entries = _mapping("keys", raw)
    _known("keys", entries, ("user", "item", "time"))
    for key in OWNERS:
        if entries.get(key) is None:
            raise SchemaError(f"keys.{key}: missing; expected the column with the {key}'s key")
    keys = {key: _text(f"keys.{key}", column) for key, column in entries.items() if column is not None}
    if len(set(keys.values())) != len(keys):
        raise SchemaError(
            f"keys: got columns {', '.join(keys.values())}, expected a column of its own for each"
        )
    return keys


def _tasks(raw: Any) -> tuple[Task, ...]:
    if not isinstance(raw, list) or not raw:
        raise SchemaError(
            f"tasks: got {raw!r}, expected a list with at least one task, e.g. [{{name: click}}]"
        )
    tasks: list[Task] = []
    for number, entry in enumerate(raw):
        path = f"tasks.{number}"
        entry = _mapping(path, entry)
        _known(path, entry, ("name", "weight", "rank", "given"))
        if "name" not in entry:
            raise SchemaError(f"{path}.name: missing; expected the name of a label column")
        name = _name(f"{path}.name", entry["name"])
        if any(task.name == name for task in tasks):
            raise SchemaError(f"{path}.name: {name!r} is declared twice, expected a name of its own")
        weight = _number(f"{path}.weight", entry.get("weight", 1.0))
        rank = _number(f"{path}.rank", entry.get("rank", 0.0 if tasks else 1.0))
        if weight < 0:
            raise SchemaError(f"{path}.weight: got {weight}, expected a number >= 0")
        tasks.append(Task(name, weight, rank, entry.get("given")))
    _given(tasks)
    if all(task.rank == 0 for task in tasks):
        raise SchemaError("tasks: every rank is 0, expected at least one task to rank by")
    return tuple(tasks)


def _given(tasks: list[Task]) -> None:
    """SchemaError where a task is given what is no other task, or in the end itself, or ranks without what it is given:
    by the probability of a click on items that nobody would be shown."""
    known = {task.name: task for task in tasks}
    for number, task in enumerate(tasks):
        if task.given is None:
            continue
        other = known.get(task.given) if isinstance(task.given, str) else None
        if other is None:
            others = ", ".join(name for name in known if name != task.name) or "there is none"
            raise SchemaError(f"tasks.{number}.given: got {task.given!r}, expected another task ({others})")
        if task.rank > 0 and other.rank <= 0:
            raise SchemaError(
                f"tasks.{number}.given: {task.name} ranks items (rank {task.rank:g}) and {other.name}, which it is "
                f"given, does not; expected rank 1 of {other.name} too, since a search multiplies the two"
            )
    for number, task in enumerate(tasks):
        chain = [task]
        while (given := chain[-1].given) is not None:
            chain.append(known[given])
            if len(chain) > len(tasks):
                names = " given ".join(link.name for link in chain[:3])
                raise SchemaError(
                    f"tasks.{number}.given: {names}: a circle, expected a task that is given none at its end"
                )


def _features(raw: Any, tasks: tuple[Task, ...]) -> dict[str, Feature]:
    sections = _mapping("features", raw)
    _known("features", sections, OWNERS)
    entries: dict[str, tuple[str, Owner, dict[str, Any]]] = {}
    for owner in OWNERS:
        section = _mapping(f"features.{owner}", sections.get(owner) or {})
        if not section:
            raise SchemaError(f"features.{owner}: no features, expected at least one feature of the {owner}")
        for name, entry in section.items():
            path = f"features.{owner}.{name}"
            _name(path, name)
            if name in entries:
                raise SchemaError(f"{path}: the name is taken by {entries[name][0]}; expected one of its own")
            entries[name] = (path, owner, _mapping(path, entry))
    features: dict[str, Feature] = {}
    # Features that own their space come first, so that `same_as` finds it whatever the order in the file.
    for name in sorted(entries, key=lambda name: "same_as" in entries[name][2]):
        path, owner, entry = entries[name]
        features[name] = _feature(path, name, owner, entry, features, tasks)
    _one_type_of_item_keys(features)
    return {name: features[name] for name in entries}


def _feature(
    path: str,
    name: str,
    owner: Owner,
    entry: dict[str, Any],
    known: dict[str, Feature],
    tasks: tuple[Task, ...],
) -> Feature:
    kind = _choice(f"{path}.kind", entry.get("kind"), KINDS)
    _known(path, entry, SETTINGS[kind], f"{kind} ")
    if kind == "dense":
        dim = _whole(f"{path}.dim", entry.get("dim", 1))
        return Feature(
            name, owner, kind, dim=dim, default=_number(f"{path}.default", entry.get("default", 0.0))
        )
    shared = _shared(path, entry["same_as"], known) if "same_as" in entry else None
    encoding, size = _encoding(path, entry, shared)
    key_type = _choice(f"{path}.type", entry.get("type", shared.type if shared else "int"), TYPES)
    if shared and (encoding, size, key_type) != (shared.encoding, shared.size, shared.type):
        raise SchemaError(
            f"{path}.same_as: {encoding}: {size} of type {key_type} differs from {shared.name}'s "
            f"{shared.encoding}: {shared.size} of type {shared.type}; leave them out to take the shared ones"
        )
    if encoding == "range" and key_type == "string":
        raise SchemaError(f"{path}.type: got string, expected int with range; use vocab or hash for strings")
    if name == ITEM_SPACE and encoding != "item":
        raise SchemaError(
            f"{path}: the name 'item' is kept for the item's own id; add `of: item` or rename it"
        )
    if kind == "sequence" and "length" not in entry:
        raise SchemaError(f"{path}.length: missing; expected the number of ids that a row keeps")
    setting = "max" if kind == "sparse" else "length"
    length = _whole(f"{path}.{setting}", entry.get(setting, 1))
    derive_from = entry.get("from")
    if derive_from is not None:
        _choice(f"{path}.from", derive_from, {task.name: task.name for task in tasks})
        if (
            encoding != "item"
            or (owner, kind) not in (("user", "sequence"), ("item", "sparse"))
            or name == ITEM_SPACE
        ):
            raise SchemaError(
                f"{path}.from: only a user's sequence `of: item` (a history) and an item's sparse feature `of: item` "
                "(its neighbours) can be derived from a task"
            )
    return Feature(
        name,
        owner,
        kind,
        encoding=encoding,
        size=size,
        length=length,
        type=key_type,
        derive_from=derive_from,
        same_as=shared.name if shared else None,
    )


def _shared(path: str, name: Any, known: dict[str, Feature]) -> Feature:
    feature = known.get(name) if isinstance(name, str) else None
    if feature is None or feature.encoding is None or feature.encoding == "item":
        usable = [f.name for f in known.values() if f.encoding not in (None, "item") and f.same_as is None]
        raise SchemaError(
            f"{path}.same_as: got {name!r}, expected a sparse or sequence feature with an id space of its "
            f"own ({', '.join(usable) or 'there is none'}); for item ids write `of: item`"
        )
    if feature.same_as is not None:
        raise SchemaError(f"{path}.same_as: {name!r} itself shares a space; write same_as: {feature.same_as}")
    return feature


def _encoding(path: str, entry: dict[str, Any], shared: Feature | None) -> tuple[Encoding, int]:
    given = [setting for setting in ENCODINGS if setting in entry]
    if not given and shared is not None and shared.encoding is not None:
        return shared.encoding, shared.size
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise SchemaError(f"{path}: got {got} of vocab, hash, range, of; expected exactly one id encoding")
    setting = given[0]
    if setting == "of":
        if entry["of"] != ITEM_SPACE:
            raise SchemaError(
                f"{path}.of: got {entry['of']!r}, expected item; to share another feature's ids use same_as"
            )
        return "item", 0
    return ENCODINGS[setting], _whole(f"{path}.{setting}", entry[setting], MAX_SIZE)


def _one_type_of_item_keys(features: dict[str, Feature]) -> None:
    of_item = [feature for feature in features.values() if feature.encoding == "item"]
    for feature in of_item[1:]:
        if feature.type != of_item[0].type:
            raise SchemaError(
                f"features.{feature.owner}.{feature.name}.type: item keys are {feature.type} here and "
                f"{of_item[0].type} in {of_item[0].name}; expected one type"
            )


def _interactions(raw: Any, features: dict[str, Feature]) -> tuple[Interaction, ...]:
    found = []
    for name, entry in _mapping("interactions", raw or {}).items():
        path = f"interactions.{name}"
        _name(path, name)
        entry = _mapping(path, entry)
        _known(path, entry, ("user", "item", "via", "matches", "fade", "nodes"))
        user, item = (_side(path, owner, entry.get(owner), features) for owner in OWNERS)
        via = _via(path, entry["via"], user, item, features) if "via" in entry else None
        through = via is None and user.space != item.space
        if through and user.space != ITEM_SPACE:
            raise SchemaError(
                f"{path}: ids of {user.name} (space {user.space}) and {item.name} (space {item.space}) can "
                "never match; share a space with same_as, or take a user feature `of: item` to go through "
                "items"
            )
        matches = _whole(f"{path}.matches", entry.get("matches", min(DEFAULT_MATCHES, item.length)))
        if matches > item.length:
            raise SchemaError(
                f"{path}.matches: got {matches}, expected at most {item.length}, the ids that a row of "
                f"{item.name} has"
            )
        fade = _number(f"{path}.fade", entry.get("fade", 1.0))
        if not 0 < fade <= 1:
            raise SchemaError(f"{path}.fade: got {fade}, expected a number above 0, at most 1")
        if fade < 1 and user.kind != "sequence":
            raise SchemaError(
                f"{path}.fade: {user.name} is no sequence, so nothing in it is older; leave it out"
            )
        nodes = entry.get("nodes", "representative")
        if nodes not in ("representative", "members"):
            raise SchemaError(f"{path}.nodes: got {nodes!r}, expected representative or members")
        members = nodes == "members"
        if members and (item.space != ITEM_SPACE or item.length != 1):
            raise SchemaError(
                f"{path}.nodes: members are counted by the item itself; {item.name} is not, cross a feature of one id "
                "`of: item`"
            )
        found.append(Interaction(name, user.name, item.name, matches, through, fade, members, via))
    return tuple(found)


def _via(path: str, name: Any, user: Feature, item: Feature, features: dict[str, Feature]) -> str:
    if user.space != ITEM_SPACE:
        raise SchemaError(
            f"{path}.user: got {user.name} (space {user.space}), expected a feature `of: item`: via follows the lists "
            "of the user's items"
        )
    lists = [
        f.name
        for f in features.values()
        if f.owner == "item" and f.encoding is not None and f.space == item.space
    ]
    if name not in lists:
        raise SchemaError(
            f"{path}.via: got {name!r}, expected an item feature with the ids of {item.name} ({', '.join(lists)})"
        )
    length = features[str(name)].length
    if most_list_weight(user.length, length) >= 2**31:
        raise SchemaError(
            f"{path}.via: {user.length} ids of {user.name} with lists of {length} in {name} can weigh 2^31 and more; "
            "expected shorter ones"
        )
    return str(name)


def _side(path: str, owner: Owner, name: Any, features: dict[str, Feature]) -> Feature:
    usable = [f.name for f in features.values() if f.owner == owner and f.encoding is not None]
    if name not in usable:
        raise SchemaError(
            f"{path}.{owner}: got {name!r}, expected a sparse or sequence feature of the {owner} "
            f"({', '.join(usable) or 'there is none'})"
        )
    return features[name]


def _eligibility(raw: Any, features: dict[str, Feature]) -> tuple[Attribute, ...]:
    found = []
    taken = {
        feature.name: f"features.user.{feature.name}"
        for feature in features.values()
        if feature.owner == "user"
    }
    if EXCLUDED_ITEMS.name in taken:
        raise SchemaError(
            f"{taken[EXCLUDED_ITEMS.name]}: the name is kept for the items that a request excludes; rename it"
        )
    taken[EXCLUDED_ITEMS.name] = "the items that a request excludes"
    for name, entry in _mapping("eligibility", raw or {}).items():
        path = f"eligibility.{name}"
        _name(path, name)
        attribute = _attribute(path, name, _mapping(path, entry))
        tensor = attribute.wire().name
        if attribute.kind != "flag" and tensor in taken:
            raise SchemaError(
                f"{path}: its request tensor {tensor} has the name of {taken[tensor]}; rename one of them"
            )
        found.append(attribute)
    return tuple(found)


def _attribute(path: str, name: str, entry: dict[str, Any]) -> Attribute:
    kind = _choice(f"{path}.kind", entry.get("kind"), ATTRIBUTE_KINDS)
    _known(path, entry, ATTRIBUTE_SETTINGS[kind], f"{kind} ")
    if kind == "range":
        columns = [_text(f"{path}.{side}", entry.get(side)) for side in ("from", "until")]
        if columns[0] == columns[1]:
            raise SchemaError(
                f"{path}: from and until are both {columns[0]}, expected a column of its own for each"
            )
        now = entry.get("default")
        if now not in (None, "now"):
            raise SchemaError(
                f"{path}.default: got {now!r}, expected now (the server's clock), or leave it out"
            )
        return Attribute(name, kind, start=columns[0], until=columns[1], now=now == "now")
    if kind == "flag":
        return Attribute(name, kind)
    key_type = _choice(f"{path}.type", entry.get("type", "int"), TYPES)
    if kind == "key":
        return Attribute(name, kind, key_type)
    most, ask = (_whole(f"{path}.{setting}", entry.get(setting, 1)) for setting in ("max", "ask"))
    return Attribute(name, kind, key_type, most, ask)


def _mapping(path: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise SchemaError(f"{path}: got {raw!r} ({type(raw).__name__}), expected a mapping")
    return raw


def _known(path: str, entry: dict[str, Any], known: Iterable[str], what: str = "") -> None:
    known = list(known)
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            dotted = f"{key}" if path == "schema" else f"{path}.{key}"
            raise SchemaError(f"{dotted}: unknown {what}setting, expected one of {', '.join(known)}{hint}")


def _text(path: str, raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise SchemaError(f"{path}: got {raw!r}, expected a text that is not empty")
    return raw


def _name(path: str, raw: Any) -> str:
    if not isinstance(raw, str) or not NAME.fullmatch(raw):
        raise SchemaError(f"{path}: the name {raw!r} is not letters, digits and _ with no digit in front")
    return raw


def _choice(path: str, raw: Any, choices: Mapping[str, Choice]) -> Choice:
    if not isinstance(raw, str) or raw not in choices:
        got = "missing" if raw is None else f"got {raw!r}"
        raise SchemaError(f"{path}: {got}, expected one of {', '.join(choices)}")
    return choices[raw]


def _whole(path: str, raw: Any, most: int = 2**20) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= most:
        raise SchemaError(f"{path}: got {raw!r}, expected a whole number from 1 to {most}")
    return raw


def _number(path: str, raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) <= LARGEST:
        raise SchemaError(f"{path}: got {raw!r}, expected a number that float32 can hold")
    return float(raw) + 0.0  # -0.0 would be an equal schema of another hash
