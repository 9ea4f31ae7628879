"""The fault rig: real processes and sockets, and everything that can go wrong between them.

- `worker`: a worker process without weights or torch. What a request's prompt asks for it does: so
  many tokens of known text, one every 5 ms, and then an end, a hang, a crash, a lie or a flood.
- `serve`, `controller`: `chatserve serve` and `chatserve controller` over such workers.
- `window`: a socket into each of these processes, which tells its tasks, memory, files, threads,
  requests under way and how late its event loop was.
- `proxy`: a TCP proxy that delays, stalls, resets, cuts after byte n, closes one half or sends one
  byte at a time: by script, by seed, or while it runs.
- `client`: a load client that keeps what happened to each request; `history` reads it, and
  `invariants` says what must hold of every such history, whatever the faults were.
- `raw_http`: requests that no client library would send.
- `loop_lag`: how late an event loop runs, without what the machine's other work adds.

Used by tests/integration/test_faults_*.py (seconds) and tests/soak (`make soak`).
Every guard has its teeth there: a bug put in on purpose that must be found.
"""
