"""A page of the items of a kept response."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from chatserve.errors import InvalidRequest

MAX_PAGE = 100
USUAL_PAGE = 20


def page_of(items: list[Any], query: Mapping[str, str]) -> dict[str, Any]:
    """A piece of a list, newest item first unless the query says otherwise."""
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order must be asc or desc, not {order[:20]!r}", param="order")
    asked = query.get("limit", str(USUAL_PAGE))
    limit = int(asked) if re.fullmatch("[0-9]{1,3}", asked, re.ASCII) else 0
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(
            f"limit must be a number from 1 to {MAX_PAGE}, not {asked[:20]!r}", param="limit"
        )
    rest = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(rest) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after: there is no item {after[:100]!r}", param="after")
        rest = rest[places[0] + 1 :]
    page = rest[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(rest) > limit,
    }
