"""Values that a JSON Schema allows, for Hypothesis: of the words that our own document uses."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# what a field may hold that the schema calls anything
ANYTHING = st.sampled_from([None, True, 0, 1.5, "x", [], {}])
KNOWN = {
    "$ref", "anyOf", "oneOf", "enum", "const", "type", "properties", "required", "items",
    "additionalProperties", "propertyNames", "minProperties", "maxProperties", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "description", "title", "default", "format", "examples", "deprecated",
}  # fmt: skip


def values_of(schema: dict[str, Any], schemas: dict[str, Any]) -> st.SearchStrategy[Any]:
    """`schemas`: what references name, by name."""
    assert schema.keys() <= KNOWN, f"unknown words {schema.keys() - KNOWN}"
    if "$ref" in schema:
        return st.deferred(lambda: values_of(schemas[schema["$ref"].rpartition("/")[2]], schemas))
    if "anyOf" in schema or "oneOf" in schema:
        choices = schema.get("anyOf") or schema["oneOf"]
        return st.one_of([values_of(each, schemas) for each in choices])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([values_of({**schema, "type": each}, schemas) for each in kind])
    if kind == "object":
        return _objects(schema, schemas)
    if kind == "array":
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", 4), least + 3)
        return st.lists(values_of(schema.get("items", {}), schemas), min_size=least, max_size=most)
    if kind == "string" and "pattern" in schema:
        return st.from_regex(schema["pattern"].removesuffix("$") + r"\Z")
    if kind == "string":
        least = schema.get("minLength", 0)
        most = min(schema.get("maxLength", 20), least + 20)
        return st.text(min_size=least, max_size=most)
    if kind == "integer":
        return st.integers(_least(schema), _most(schema))
    if kind == "number":
        return _numbers(schema)
    return {"boolean": st.booleans(), "null": st.none(), None: ANYTHING}[kind]


def _least(schema: dict[str, Any]) -> int | None:
    if "exclusiveMinimum" in schema:
        return int(schema["exclusiveMinimum"]) + 1
    return schema.get("minimum")


def _most(schema: dict[str, Any]) -> int | None:
    if "exclusiveMaximum" in schema:
        return int(schema["exclusiveMaximum"]) - 1
    return schema.get("maximum")


def _numbers(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    floats = st.floats(
        low, high, allow_nan=False, allow_infinity=False,
        exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema,
    )  # fmt: skip
    # JSON does not know 1 from 1.0, and people write both
    return floats.map(lambda value: int(value) if value.is_integer() else value)


def _objects(schema: dict[str, Any], schemas: dict[str, Any]) -> st.SearchStrategy[Any]:
    properties = {
        name: values_of(each, schemas) for name, each in schema.get("properties", {}).items()
    }
    required = set(schema.get("required", ()))
    optional = {name: each for name, each in properties.items() if name not in required}
    known = st.fixed_dictionaries({name: properties[name] for name in required})
    # a few of the others at a time, or everything collides with everything
    some = (
        st.lists(st.sampled_from(sorted(optional)), max_size=3, unique=True) if optional else None
    )
    if some is not None:
        extra = some.flatmap(lambda names: st.fixed_dictionaries({n: optional[n] for n in names}))
        known = st.tuples(known, extra).map(lambda both: {**both[0], **both[1]})
    others = schema.get("additionalProperties", {})
    if properties or others is False:
        return known
    names = values_of({"type": "string", **schema.get("propertyNames", {})}, schemas)
    least = schema.get("minProperties", 0)
    most = min(schema.get("maxProperties", 3), least + 3)
    return st.dictionaries(
        names, values_of(others if isinstance(others, dict) else {}, schemas),
        min_size=least, max_size=most,
    )  # fmt: skip
