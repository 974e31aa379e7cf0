"""Phase of `resolve`: whether this server computes prompts for others, or answers what others computed."""

from __future__ import annotations

from tessera.core.config.ask import Asked
from tessera.core.config.flags_server import HANDOVER
from tessera.core.config.types import HandoverConfig, Notes

ROLES = ("prefill", "decode")
INSIDE = {"local": "cpu", "cuda_ipc": "cuda"}  # the engines of one host, and whose memory they read


def handover_phase(values: Asked, device: str, notes: Notes) -> HandoverConfig:
    """The part that this server plays, and by which deadlines."""
    role = values.word("disaggregation_mode")
    if role not in ROLES:
        for flag in HANDOVER:
            if flag.name != "disaggregation_mode" and values.gave(flag.name):
                notes.decide(flag.spellings[0], "ignored", "only read with --disaggregation-mode prefill or decode")
    engine = values.word("disaggregation_transfer_backend")
    if engine == "auto":
        engine = "cuda_ipc" if device == "cuda" else "local"
        if role in ROLES:
            why = "moves bytes between processes of one host; across hosts name another"
            notes.decide("disaggregation-transfer-backend", engine, why)
    if role in ROLES and INSIDE.get(engine, device) != device:
        notes.refuse(
            (f"--disaggregation-transfer-backend {engine}", f"--device {device}"),
            f"it copies memory of {INSIDE[engine]} only",
            "Use auto, mooncake or nixl.",
        )
    if role in ROLES and engine in INSIDE and values.gave("disaggregation_ib_device"):
        notes.decide("--disaggregation-ib-device", "ignored", f"{engine} moves bytes inside one host, by no network")
    interval = values.amount("disaggregation_heartbeat_interval")
    return HandoverConfig(
        role=role if role in ROLES else "null",
        engine=engine,
        bootstrap_port=values.number("disaggregation_bootstrap_port"),
        devices=values.text("disaggregation_ib_device"),
        bootstrap_timeout=values.amount("disaggregation_bootstrap_timeout"),
        waiting_timeout=values.amount("disaggregation_waiting_timeout"),
        decode_bootstrap_timeout=values.amount("disaggregation_decode_bootstrap_timeout"),
        silence=interval * (values.number("disaggregation_heartbeat_max_failure") + 0.5),  # the last may be late
        heartbeat_interval=interval,
    )
