"""The OpenAPI document: a piece for each room of the API, put together in `document`. No torch."""
