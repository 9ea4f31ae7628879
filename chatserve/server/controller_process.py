"""The process around a controller that supervises nobody: workers of any machine register."""

from __future__ import annotations

import contextlib
import logging
import time
from functools import partial

from chatserve import environment
from chatserve.config import ControllerConfig
from chatserve.errors import ShuttingDown
from chatserve.options import TimeLimits
from chatserve.server.connection import within_file_limit
from chatserve.server.control_token import own_token
from chatserve.server.controller import create_controller_app
from chatserve.server.conversations import store_for
from chatserve.server.edge import AccessPolicy, check_exposure, is_loopback
from chatserve.server.listener import Listener, bind, url_of
from chatserve.server.moves import ResumePolicy
from chatserve.server.process import (
    EXIT_INTERRUPTED,
    StopSignals,
    configure_logging,
    run_process,
)
from chatserve.server.registry import WorkerRegistry
from chatserve.server.response_store import ResponseStore
from chatserve.server.service_manager import ServiceManager
from chatserve.server.tls import server_context
from chatserve.server.tracing import traced

logger = logging.getLogger(__name__)


def run_controller(config: ControllerConfig) -> int:
    """Serve until a signal comes. Returns the exit code."""
    configure_logging("controller", debug=config.debug, log_format=config.log_format)
    return run_process(partial(_serve, config), debug=config.debug)


def access_policy(config: ControllerConfig, control_token: str) -> AccessPolicy:
    """Who may come in, by the settings. Raises `UsageError` for strangers without a key."""
    keys = environment.api_keys(config.api_key_file)
    check_exposure(config.host, has_key=bool(keys), insecure_no_auth=config.insecure_no_auth)
    if not keys and not is_loopback(config.host):
        logger.warning("anyone who reaches %s can use this server without a key", config.host)
    file = config.api_key_file
    if file and environment.is_open_to_others(file):
        logger.warning("others can read the API keys in %s; run chmod 600 on it", file)
    return AccessPolicy.build(
        config.host, api_keys=keys, control_token=control_token, allow_hosts=config.allow_host,
        allow_origins=config.allow_origin,
    )  # fmt: skip


async def _serve(config: ControllerConfig) -> int:
    token = own_token()
    policy = access_policy(config, token)
    given_s = config.stall_timeout_s
    stall_s = TimeLimits.token_gap_timeout_s if given_s is None else given_s
    registry = WorkerRegistry(time.monotonic, expiry_s=config.heartbeat_expiry_s, stall_s=stall_s)
    edge = create_controller_app(
        registry,
        control_token=token,
        policy=policy,
        heartbeat_interval_s=config.heartbeat_interval_s,
        response_store=ResponseStore.at_home() if config.store_responses else None,
        conversations=store_for(config, config.host, policy),
        resume=ResumePolicy(config.resume, config.resume_timeout_s),
    )
    tls = server_context(config.ssl_certfile, config.ssl_keyfile)
    sock = bind(config.host, config.port, tls)
    listener = Listener(
        edge, sock, max_connections=within_file_limit(config.max_connections, tls),
        write_timeout_s=config.write_timeout_s,
    )  # fmt: skip
    stop = StopSignals()
    manager = ServiceManager.of_environment()

    async def abort() -> None:
        registry.abort(ShuttingDown("the server has shut down; try again when it is back"))

    async with contextlib.AsyncExitStack() as stack:
        edge.tracing = stack.enter_context(traced(config.otlp_traces_endpoint, "controller"))
        stack.enter_context(stop.installed())
        await stack.enter_async_context(manager.told(lambda: "controller"))
        await listener.start()
        manager.ready()
        print(f"ready: {url_of(config.host, sock)}/v1", flush=True)
        await stop.asked.wait()
        manager.stopping()
        registry.close()
        await listener.drain(seconds=config.drain_timeout_s, hurry=stop.insisted, abort=abort)
        await listener.close()
    return EXIT_INTERRUPTED if stop.is_interrupted else 0
