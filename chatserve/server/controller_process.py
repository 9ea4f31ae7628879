"""The process around a controller that supervises nobody: workers of any machine register."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

from chatserve import config as settings
from chatserve.config import ControllerConfig
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.server.control_token import own_token
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, check_exposure, is_loopback
from chatserve.server.listener import Listener, bind, url_of
from chatserve.server.process import (
    EXIT_INTERRUPTED,
    StopSignals,
    configure_logging,
    print_error,
    run_process,
)
from chatserve.server.registry import WorkerRegistry

logger = logging.getLogger(__name__)

DRAIN_S = 30.0


def run_controller(argv: Sequence[str]) -> int:
    """`chatserve controller`. Returns the exit code."""
    parser = CommandParser(
        "chatserve controller",
        "The OpenAI API over workers that register, on any machine.",
        ControllerConfig,
    )
    try:
        flags = parser.flags(argv)
        config = settings.build(ControllerConfig, flags, file=settings.settings_file())
    except UsageError as error:
        print_error(error.message)
        return error.exit_code
    configure_logging("controller", debug=config.debug)
    return run_process(partial(_serve, config), debug=config.debug)


def access_policy(config: ControllerConfig, control_token: str) -> AccessPolicy:
    """Who may come in, by the settings. Raises `UsageError` for strangers without a key."""
    keys = settings.api_keys(config.api_key_file)
    check_exposure(config.host, has_key=bool(keys), insecure_no_auth=config.insecure_no_auth)
    if not keys and not is_loopback(config.host):
        logger.warning("anyone who reaches %s can use this server without a key", config.host)
    return AccessPolicy.build(
        config.host, api_keys=keys, control_token=control_token, allow_hosts=config.allow_host
    )


async def _serve(config: ControllerConfig) -> int:
    token = own_token()
    policy = access_policy(config, token)
    registry = WorkerRegistry(time.monotonic, expiry_s=config.heartbeat_expiry_s)
    edge = create_controller_app(
        registry,
        control_token=token,
        policy=policy,
        heartbeat_interval_s=config.heartbeat_interval_s,
    )
    sock = bind(config.host, config.port)
    listener = Listener(edge, sock)
    stop = StopSignals()
    with stop.installed():
        await listener.start()
        print(f"ready: {url_of(config.host, sock)}/v1", flush=True)
        await stop.asked.wait()
        await listener.stop(drain_s=DRAIN_S, hurry=stop.insisted)
    return EXIT_INTERRUPTED if stop.is_interrupted else 0
