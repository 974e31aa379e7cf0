"""`tessera router`: one address before several servers, until a signal."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from tessera.core.config.flag import size
from tessera.core.errors import ConfigError, Conflict
from tessera.serve.router.launch import launch
from tessera.serve.router.router import Options
from tessera.serve.router.servers import Address, Role


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Routes. Raises `ConfigError` with everything that is wrong."""
    wrong: list[Conflict] = []
    servers = _servers(options, wrong)
    _together(servers, wrong)
    try:
        largest = size(options.max_body_size)
    except ValueError as error:
        wrong.append(Conflict((f"--max-body-size {options.max_body_size}",), str(error), "For instance 64M."))
    if wrong:
        raise ConfigError(wrong)
    own: dict[Role, str | None] = {"prefill": options.prefill_policy, "decode": options.decode_policy}
    made = Options(
        servers=tuple(servers),
        policy=options.policy,
        policies={role: policy for role, policy in own.items() if policy is not None},
        api_key=options.api_key or environ.get("TESSERA_API_KEY"),
        silence=options.request_timeout_secs,
        threshold=options.cb_failure_threshold,
        interval=options.health_check_interval_secs,
        probe_timeout=options.health_check_timeout_secs,
        drain_timeout=options.drain_timeout,
        max_body_size=largest,
        log_requests=options.log_requests,
    )
    trace = (options.enable_trace, options.otlp_traces_endpoint)
    return launch(made, options.host, options.port, options.log_level, trace)


def _servers(options: Namespace, wrong: list[Conflict]) -> list[Address]:
    named: list[tuple[Role, str, list[str]]] = [("prefill", url, more) for url, *more in options.prefill]
    named += [("decode", url, []) for url in options.decode]
    named += [("worker", url, []) for urls in options.worker for url in urls]
    return [_address(role, url, more, wrong) for role, url, more in named]


def _address(role: Role, text: str, more: list[str], wrong: list[Conflict]) -> Address:
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _port(parts):
        wrong.append(Conflict((f"--{role} {text}",), "it is no address of a server", "For instance http://HOST:30000."))
    port = more[0] if more else "none"
    if len(more) > 1 or not (port.lower() == "none" or (port.isdecimal() and 0 < int(port) < 1 << 16)):
        remedy = "Give one bootstrap port from 1 to 65535 behind the URL, or none."
        wrong.append(Conflict((f"--{role} {' '.join([text, *more])}",), "found no bootstrap port", remedy))
        port = "none"
    return Address(url, role, int(port) if port.isdecimal() else None)


def _port(parts: SplitResult) -> bool:
    """Whether its port is one, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _together(servers: list[Address], wrong: list[Conflict]) -> None:
    """Pairs need both halves; pairs and servers that do both do not mix; each is named once."""
    roles = {server.role for server in servers}
    if not roles:
        wrong.append(Conflict(("servers",), "no server was named", "Give --prefill and --decode, or --worker."))
    elif "worker" in roles and len(roles) > 1:
        remedy = "Give --prefill and --decode, or --worker."
        wrong.append(Conflict(("--worker", "--prefill or --decode"), "a router serves one kind", remedy))
    elif len(roles) == 1 and "worker" not in roles:
        (have,) = roles
        missing = "decode" if have == "prefill" else "prefill"
        wrong.append(Conflict((f"--{have}", f"no --{missing}"), "there are no pairs", f"Give --{missing} URL."))
    urls = [server.url for server in servers]
    if twice := sorted({url for url in urls if urls.count(url) > 1}):
        wrong.append(Conflict((", ".join(twice),), "named more than once", "Name each server once."))
