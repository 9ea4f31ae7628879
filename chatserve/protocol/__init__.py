"""Wire formats: OpenAI schemas, server-sent events, the control plane."""
