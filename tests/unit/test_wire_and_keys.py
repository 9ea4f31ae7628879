"""What the sources may not do: read objects from a wire, or compare a secret as any text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from tests.unit.test_layering import names, sources

# whatever makes objects of bytes that come from elsewhere
UNPICKLERS = (
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle",
    "multiprocessing", "joblib", "zmq", "recv_pyobj", "send_pyobj", "xmlrpc", "yaml", "Pyro5",
    "rpyc", "eval", "exec", "__import__",
)  # fmt: skip
NETWORKS = ("models/", "train/")
# pipes to processes that it has started itself, and that listen to nobody else
OWN_CHILDREN = {"train/data/workers.py"}
# what holds a secret, or what a client gives as one
SECRETS = frozenset(
    {"api_key", "api_keys", "control_keys", "control_token", "token", "given", "secret", "keys",
     "proof", "_token", "_control_token", "bearer"}
)  # fmt: skip
# rooms that see secrets; `given` and `token` are words of their own in others
ROOMS = ("server/edge.py", "server/cache_salt.py", "server/control_token.py",
         "server/controller.py", "server/worker.py", "server/relay.py", "server/heartbeat.py",
         "server/journal.py", "protocol/control.py", "environment.py")  # fmt: skip


@cache
def trees() -> dict[str, ast.Module]:
    return dict(sources())


@cache
def words_of(file: str) -> frozenset[str]:
    return frozenset(words(trees()[file]))


def words(tree: ast.Module) -> Iterator[str]:
    for name in names(tree):
        yield from name.split(".")


@pytest.mark.parametrize("word", UNPICKLERS)
def test_no_objects_come_off_a_wire(word: str) -> None:
    users = {file for file in trees() if word in words_of(file)}
    # a network is told to evaluate, which runs no text
    evaluates = {file for file in users if word == "eval" and file.startswith(NETWORKS)}
    assert not users - evaluates - (OWN_CHILDREN if word == "multiprocessing" else set()), users


def secret_comparisons(tree: ast.Module) -> Iterator[str]:
    """Comparisons by value, or by membership, in which a secret takes part."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(
            isinstance(operator, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for operator in node.ops
        ):
            sides = [node.left, *node.comparators]
            if any(_name_of(side) in SECRETS for side in sides):
                yield ast.unparse(node)


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("room", ROOMS)
def test_secrets_are_never_compared_as_texts(room: str) -> None:
    assert list(secret_comparisons(trees()[room])) == []


@pytest.mark.parametrize(
    "line",
    ["if token not in api_keys: pass", "ok = self._token == given", "x = given in keys",
     "assert request.api_key != secret"],
)  # fmt: skip
def test_such_a_comparison_is_found(line: str) -> None:
    assert list(secret_comparisons(ast.parse(line)))


def test_there_is_one_way_to_compare() -> None:
    """Each call of `compare_digest` stands in a room that is looked at above."""
    users = {file for file in trees() if "compare_digest" in words_of(file)}
    assert users == {room for room in ROOMS if "compare_digest" in words_of(room)} != set()
