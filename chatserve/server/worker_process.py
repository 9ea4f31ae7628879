"""The process around a worker: HTTP first, then the model, then the controller; and the way out.

Composes; the routes are in `worker.py`. Imports no torch before the model loads, so that health and
load progress can be asked for at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from chatserve import environment
from chatserve.byte_bar import ByteBar
from chatserve.config import WorkerConfig, served_names
from chatserve.errors import DoesNotFit, GenerationFailed, StartupError, UsageError
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.models.memory import (
    address_space_left,
    available_host_bytes,
    in_gb,
    is_out_of_memory,
)
from chatserve.models.packing import choose_packing
from chatserve.progress import Progress
from chatserve.server.adapter_routes import nobody_to_tell
from chatserve.server.connection import within_file_limit
from chatserve.server.contract import Engine, ServedModel
from chatserve.server.control_token import shared_token
from chatserve.server.conversations import store_for
from chatserve.server.edge import AccessPolicy, check_exposure
from chatserve.server.heartbeat import LEAVE_TIMEOUT_S, HeartbeatSender
from chatserve.server.lifeline import report_to_parent, tie_to_parent
from chatserve.server.listener import Listener, bind, bind_path, port_of, url_of
from chatserve.server.model_slot import ModelSlot
from chatserve.server.process import (
    EXIT_INTERRUPTED,
    Report,
    StopSignals,
    cancelled,
    configure_logging,
    outlive,
    print_failure,
    run_process,
    run_until,
)
from chatserve.server.recording import RecordingEngine
from chatserve.server.replay_log import ReplayLog, default_path
from chatserve.server.response_store import ResponseStore
from chatserve.server.service_manager import ServiceManager
from chatserve.server.tls import client_context, server_context
from chatserve.server.tracing import traced
from chatserve.server.worker import create_slot_app

logger = logging.getLogger(__name__)

ENGINE_CHECK_S = 0.5
LOAD_THREAD = "load"
LEAST_ADDRESSES = 640 << 20
"""Native code that finds none ends the process: whoever has fewer should not begin."""
_SWITCH_S = 1e-4
"""How long the web server's thread may keep the interpreter lock while the engine wants it back.

Python's default is half a step of the engine; with 16 streams a step then takes 4 % longer.
"""

Load = Callable[[WorkerConfig, Progress], tuple[Engine, ServedModel]]


def load_engine(config: WorkerConfig, progress: Progress) -> tuple[Engine, ServedModel]:
    """The real thing: weights, network, engine."""
    sys.setswitchinterval(_SWITCH_S)
    environment.limit_spinning()
    try:
        _refuse_what_cannot_fit(config)
        # here and not above: this is where torch comes in
        from chatserve.engine.serving import load
        from chatserve.models.templates.render_process import RenderProcess

        renderer = RenderProcess()
        with contextlib.ExitStack() as stack:
            stack.callback(renderer.close)
            engine, model = load(config, progress, renderer)
            stack.pop_all()  # the model's from here on
    except StartupError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFit(_no_memory_for(config.weights, error)) from error
        raise
    model = dataclasses.replace(model, renderer=renderer)
    if model.description.get("embeddings_only"):
        return engine, model
    grammars = GrammarCompiler(model.tokenizer, model.vocab_size, model.stop_token_ids)
    if config.prepare_grammars:
        grammars.prepare()
    return engine, dataclasses.replace(model, grammars=grammars)


def _refuse_what_cannot_fit(config: WorkerConfig) -> None:
    """PyTorch alone takes seconds to load, on a busy machine many; headers tell most at once.

    Of the CPU and a path only: PyTorch knows what GPUs there are. Raises `DoesNotFit`.
    """
    path = Path(config.weights)
    if config.device != "cpu" or not path.exists():
        return
    from chatserve.models.fit import check_fit_on_cpu

    packing = choose_packing("cpu", config.load_8bit, config.load_4bit, config.quant_group)
    check_fit_on_cpu(path, config.dtype, packing, config.max_num_batched_tokens)


def _refuse_few_addresses(weights: str) -> None:
    """Before threads and sockets are made, which would want some. Raises `DoesNotFit`."""
    if address_space_left() < LEAST_ADDRESSES:
        reason = MemoryError(f"PyTorch takes {in_gb(LEAST_ADDRESSES)} of addresses by itself")
        raise DoesNotFit(_no_memory_for(weights, reason))


def _no_memory_for(weights: str, error: Exception) -> str:
    """What the plan has not seen coming: another program has taken the memory in the meantime, or a
    limit is set to this process."""
    left = in_gb(available_host_bytes())
    words = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"{weights}: the memory ran out while it was loaded, of which {left} are left ({words}); "
        "free some, lift `ulimit -v`, or use --load-8bit, a smaller --context-length or a smaller "
        "model"
    )


def run_worker(config: WorkerConfig, load: Load) -> int:
    """Serve the model that `load` returns until a signal comes. Returns the exit code.

    `load` runs in a thread of its own and reports `(loaded_bytes, total_bytes)`. Raises
    `UsageError` for a name that cannot be shown.
    """
    names = served_names(config.weights, config.model_names)
    configure_logging(f"worker {names[0]}", debug=config.debug, log_format=config.log_format)
    report: Report = print_failure
    if config.parent_pipe is not None:
        report = partial(report_to_parent, config.parent_pipe)
    try:
        _refuse_few_addresses(config.weights)
    except DoesNotFit as error:
        report(error.message, True)
        return error.exit_code
    if config.parent_pipe is not None:
        tie_to_parent(config.parent_pipe, by_kernel=True)
    others = set(threading.enumerate())
    exit_code = run_process(partial(_serve, config, load), debug=config.debug, report=report)
    if any(each.daemon and each not in others for each in threading.enumerate()):
        # in the middle of loading, or of a step: native code must not outlive the interpreter
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


async def _serve(config: WorkerConfig, load: Load) -> int:
    stop = StopSignals()
    stall_s = config.token_gap_timeout_s or math.inf
    slot = ModelSlot(served_names(config.weights, config.model_names), stall_s=stall_s)
    token = shared_token() if config.controller and not config.no_register else None
    policy = _policy(config, token)
    replay_log = ReplayLog(default_path()) if config.replay_log else None
    tls = server_context(config.ssl_certfile, config.ssl_keyfile)
    if tls is not None and token is not None:
        raise UsageError(
            "a worker behind a controller is reached over http; leave --ssl-certfile out, and put "
            "a tunnel between machines that do not trust the network"
        )
    if config.socket_path is not None:
        sock = bind_path(Path(config.socket_path))
    else:
        sock = bind(config.host, config.port, tls)
    heartbeat = _heartbeat(config, token, slot, port_of(sock))
    edge = create_slot_app(
        slot, policy=policy, control_token=token, is_lenient=config.lenient,
        on_change=heartbeat.deliver if heartbeat is not None else nobody_to_tell,
        response_store=(
            ResponseStore.at_home() if token is None and config.store_responses else None
        ),
        conversations=store_for(config, config.host, policy) if token is None else None,
    )  # fmt: skip
    listener = Listener(
        edge, sock, max_connections=within_file_limit(config.max_connections, tls),
        # a controller knows its client: what the worker takes for a deaf one may be slow
        write_timeout_s=0 if token is not None else config.write_timeout_s,
    )  # fmt: skip
    manager = ServiceManager.of_environment()
    async with contextlib.AsyncExitStack() as stack:
        edge.tracing = stack.enter_context(traced(config.otlp_traces_endpoint, "worker"))
        stack.enter_context(stop.installed())
        await stack.enter_async_context(manager.told(slot.describe_progress))
        await listener.start()
        url = url_of(config.host, sock)
        logger.info("listening on %s", url)
        on_ready = partial(_announce, heartbeat, slot, url, manager)
        jobs = [_fill(slot, config, load, replay_log, on_ready=on_ready)]
        beating: asyncio.Task[None] | None = None
        if heartbeat is not None:
            # to its last stream: a worker that hangs on its way out is to be missed, too
            beating = asyncio.create_task(heartbeat.run())
            stack.push_async_callback(cancelled, [beating])
            jobs.append(outlive(beating))
        drain_s = 0.0
        try:
            try:
                await run_until(stop.asked, *jobs, _watch_engine(slot, 2 * stall_s))
            except MemoryError as error:
                if slot.engine is not None:
                    raise
                # what goes on beside the loading may be the first to find none left
                raise DoesNotFit(_no_memory_for(config.weights, error)) from error
            drain_s = config.drain_timeout_s
        finally:
            slot.is_draining = True
            manager.stopping()
            if heartbeat is not None and beating is not None and not beating.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(heartbeat.deliver(), LEAVE_TIMEOUT_S)
            await listener.drain(
                seconds=drain_s, hurry=stop.insisted, abort=partial(_stop_engine, slot)
            )
            await listener.close()
            await _stop_engine(slot)
            if replay_log is not None:
                replay_log.close()
            slot.close()
    return EXIT_INTERRUPTED if stop.is_interrupted else 0


def _policy(config: WorkerConfig, token: str | None) -> AccessPolicy:
    """Behind a controller only its token opens; alone, the rules of a controller hold."""
    if token is not None:
        return AccessPolicy.build(config.host, api_keys=(token,), control_token=token)
    keys = environment.api_keys(None)
    check_exposure(config.host, has_key=bool(keys))
    return AccessPolicy.build(config.host, api_keys=keys)


def _heartbeat(
    config: WorkerConfig, token: str | None, slot: ModelSlot, port: int | None
) -> HeartbeatSender | None:
    if token is None or config.controller is None:
        return None
    worker_id = config.worker_id or uuid.uuid4().hex
    return HeartbeatSender(
        config.controller, token, worker_id=worker_id, port=port, status=slot.status,
        tls=client_context(config.ssl_ca_certs),
    )  # fmt: skip


def _announce(
    heartbeat: HeartbeatSender | None, slot: ModelSlot, url: str, manager: ServiceManager
) -> None:
    manager.ready()
    if heartbeat is not None:
        heartbeat.announce()
    else:
        print(f"ready: {url}/v1 ({', '.join(card.name for card in slot.cards())})", flush=True)


async def _fill(
    slot: ModelSlot,
    config: WorkerConfig,
    load: Load,
    replay_log: ReplayLog | None,
    *,
    on_ready: Callable[[], None],
) -> None:
    config = dataclasses.replace(config, model_names=slot.names)

    def work() -> tuple[Engine, ServedModel]:
        with ByteBar(f"loading {slot.names[0]}", sys.stderr) as bar:

            def progress(loaded_bytes: int, total_bytes: int) -> None:
                slot.progress(loaded_bytes, total_bytes)
                bar(loaded_bytes, total_bytes)

            return load(config, progress)

    engine, model = await _in_daemon_thread(work)
    if replay_log is not None:
        engine = RecordingEngine(engine, model, replay_log)
    engine.start()
    slot.fill(engine, model)
    logger.info("%s is ready", slot.names[0])
    on_ready()


async def _in_daemon_thread(
    work: Callable[[], tuple[Engine, ServedModel]],
) -> tuple[Engine, ServedModel]:
    """As `asyncio.to_thread`, but a process that is told to stop does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Engine, ServedModel]] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # it is raised where the future is awaited
            outcome: tuple[Callable[[Any], None], Any] = (future.set_exception, error)
        else:
            outcome = (future.set_result, result)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name=LOAD_THREAD, daemon=True).start()
    return await future


async def _watch_engine(slot: ModelSlot, patience_s: float) -> None:
    """Raises `GenerationFailed` when the engine thread has died, or hangs for longer than
    `patience_s`: a new process is the only cure.

    By looks, not by the clock alone: a process that was stopped and goes on has a step to make.
    """
    hung_s = 0.0
    while True:
        if slot.engine is not None:
            stats = slot.engine.stats()
            if not stats.is_alive:
                raise GenerationFailed("the engine has died")
            hung_s = min(hung_s, stats.last_token_age_s)
            if hung_s > patience_s:
                raise GenerationFailed(f"the engine has made no step for {patience_s:g} s")
        await asyncio.sleep(ENGINE_CHECK_S)
        hung_s += ENGINE_CHECK_S


async def _stop_engine(slot: ModelSlot) -> None:
    if slot.engine is not None:
        await slot.engine.stop()
