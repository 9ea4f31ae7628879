"""Controller, worker, relay: everything that speaks HTTP."""
