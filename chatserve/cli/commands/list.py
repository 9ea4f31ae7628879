"""`chatserve list`: what the cache holds, how large it is, and how to chat with it."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

from chatserve import cache, config, hub
from chatserve.flags import CommandParser
from chatserve.settings import setting


@dataclass(frozen=True)
class ListConfig:
    """Settings of `chatserve list`."""

    json: bool = setting(False, "print JSON: name, revision, num_bytes, path")


def main(argv: list[str]) -> int:
    """Print the cached models on stdout. Raises `UsageError`."""
    parser = CommandParser(
        "chatserve list", "List the downloaded models, their sizes and places.", ListConfig
    )
    options = config.build(ListConfig, parser.flags(argv))
    models = hub.cached_models()
    if options.json:
        print(json.dumps([dataclasses.asdict(model) for model in models], default=str, indent=1))
        return 0
    if not models:
        print(f"no models in {cache.models_folder()}; `chatserve pull` fetches {hub.DEFAULT_NAME}")
        return 0
    width = max(len(_title(model)) for model in models)
    for model in models:
        print(f"{_title(model):{width}}  {model.num_bytes / 1e6:>9,.1f} MB  {model.path}")
    print(f"chat with one: chatserve chat {_argument(models[0])}", file=sys.stderr)
    return 0


def _title(model: hub.CachedModel) -> str:
    is_plain = model.revision == hub.DEFAULT_REVISION
    return model.name if is_plain else f"{model.name} ({model.revision})"


def _argument(model: hub.CachedModel) -> str:
    is_plain = model.revision == hub.DEFAULT_REVISION
    return model.name if is_plain else f"{model.name} --revision {model.revision}"
