"""The part that a server plays in hand-overs, and its deadlines: from flags, or the variables of the seed's recipe."""

from __future__ import annotations

from core.test_config import config_of, decided, refusals, resolved
from tessera.core.config import Hardware, read_environment


def test_a_role_with_its_deadlines() -> None:
    config = config_of(disaggregation_mode="decode", disaggregation_waiting_timeout=7.0).handover
    assert (config.role, config.waiting_timeout, config.bootstrap_port) == ("decode", 7.0, 8998)
    assert config_of().handover.role == "null"


def test_the_variables_of_the_recipe_set_them() -> None:
    found = read_environment(
        {
            "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "100000",
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "100000",
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "100000",
            "SGLANG_DECODE_BOOTSTRAP_TIMEOUT": "1000",
            "TESSERA_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
        }
    )
    assert not found.ignored
    handover = config_of(disaggregation_mode="prefill", **found.asked).handover
    assert (handover.bootstrap_timeout, handover.waiting_timeout) == (100000.0, 100000.0)
    assert handover.decode_bootstrap_timeout == 1000.0
    assert (handover.heartbeat_interval, handover.silence) == (2.0, 200001.0)


def test_one_missed_sign_of_life_is_more_than_the_time_between_two() -> None:
    """Else a peer that is well would be given up, since its next sign takes a while to come."""
    times = {"disaggregation_heartbeat_interval": 1.0, "disaggregation_heartbeat_max_failure": 1}
    assert config_of(disaggregation_mode="decode", **times).handover.silence == 1.5


def test_without_a_role_the_other_flags_are_ignored_aloud() -> None:
    result = resolved(disaggregation_ib_device="mlx5_0")
    assert decided(result, "--disaggregation-ib-device").value == "ignored"


def test_network_devices_are_ignored_aloud_where_no_network_is_used() -> None:
    asked = {"disaggregation_mode": "decode", "disaggregation_ib_device": "mlx5_0"}
    for engine in ("auto", "local"):
        found = decided(resolved(disaggregation_transfer_backend=engine, **asked), "--disaggregation-ib-device")
        assert (found.value, "inside one host" in found.why) == ("ignored", True)
    across = resolved(disaggregation_transfer_backend="nixl", **asked)
    assert across.config.handover.devices == "mlx5_0"
    assert not [d for d in across.decisions if d.what == "--disaggregation-ib-device"]


def test_which_engine_moves_the_bytes_is_said_where_nobody_chose_it() -> None:
    result = resolved(disaggregation_mode="prefill")
    assert result.config.handover.engine == "local"
    assert "one host" in decided(result, "disaggregation-transfer-backend").why
    assert config_of(disaggregation_mode="prefill", disaggregation_transfer_backend="nixl").handover.engine == "nixl"


def test_an_engine_that_cannot_read_the_device_is_refused() -> None:
    gpu = Hardware("cuda", 1 << 34)
    assert config_of(None, gpu, disaggregation_mode="prefill").handover.engine == "cuda_ipc"
    for device, engine in ((gpu, "local"), (None, "cuda_ipc")):
        asked = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": engine}
        (reason,) = refusals(None, *([device] if device else []), **asked)
        assert f"--disaggregation-transfer-backend {engine} with --device" in reason
    asked = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "nixl"}
    assert config_of(None, gpu, **asked).handover.engine == "nixl"
