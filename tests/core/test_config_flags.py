"""No silent change: the table of flags. Each is honoured, refused by name, or listed as ignored with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tessera.core.config import BY_KEY, FLAGS, VARIABLES, Flag, Ignored, Notes, read, read_environment
from tessera.core.config.flag import real, size, switch, whole

GOLDEN = Path(__file__).with_name("flags.txt")
SGLANG = Path(__file__).with_name("sglang.txt")

# The keys of the two seed recipes and the flags that their text names.
RECIPE = (
    "served-model-name model-path trust-remote-code attention-backend "
    "kv-cache-dtype tensor-parallel-size data-parallel-size expert-parallel-size "
    "mamba-scheduler-strategy disable-radix-cache mamba-track-interval mamba-ssm-dtype "
    "disaggregation-mode mem-fraction-static chunked-prefill-size load-balance-method "
    "watchdog-timeout quantization moe-runner-backend tp-size "
    "dp-size ep-size enable-dp-attention enable-dp-lm-head "
    "moe-dense-tp-size cuda-graph-max-bs decode-log-interval stream-interval "
    "tp dp enable-mixed-chunk disable-cuda-graph "
    "tbo-token-distribution-threshold "
)
SEED_VARIABLES = (
    "SGLANG_DG_CACHE_DIR SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE "
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT SGLANG_DISAGGREGATION_WAITING_TIMEOUT "
    "SGLANG_MOONCAKE_CUSTOM_MEM_POOL SGLANG_USE_MESSAGE_QUEUE_BROADCASTER "
    "SGLANG_DISABLE_TP_MEMORY_INBALANCE_CHECK SGLANG_DECODE_BOOTSTRAP_TIMEOUT "
    "SGLANG_HACK_SEQ_BOOTSTRAP_ROOM MC_FORCE_MNNVL "
)
PREFILL = {
    "trust-remote-code": True, "attention-backend": "trtllm_mha", "kv-cache-dtype": "fp8_e4m3",
    "tensor-parallel-size": 4, "data-parallel-size": 1, "mamba-scheduler-strategy": "no_buffer",
    "mamba-track-interval": 2048, "disaggregation-mode": "prefill", "watchdog-timeout": 1000000,
}  # fmt: skip


def other_value(flag: Flag) -> object:
    """A valid value that asks for something."""
    for value in (*flag.choices, *flag.unbuilt) or (True, "2", "7", "0.3", "some text"):
        try:
            parsed = flag.parse(value)
        except ValueError:
            continue
        if not flag.neutral_value(parsed) and parsed is not False:
            return value
    raise AssertionError(f"no value for {flag.name}")


def ask(flag: Flag, value: object, spelling: str | None = None) -> Notes:
    notes = Notes()
    read({spelling or flag.name: value}, notes)
    return notes


def test_names_and_spellings_are_unique() -> None:
    keys = [key for flag in FLAGS for key in flag.keys]
    assert len(keys) == len(set(keys)) == len(BY_KEY)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda f: f.name)
def test_a_flag_is_honoured_refused_by_name_or_ignored_with_a_reason_in_every_spelling(flag: Flag) -> None:
    assert flag.help.endswith(".")
    assert flag.group
    value = other_value(flag)
    for spelling in (*flag.spellings, *flag.keys):
        notes = ask(flag, value, spelling)
        if flag.refused(flag.parse(value)):
            (conflict,) = notes.conflicts
            assert flag.spellings[0] in str(conflict)
            assert "not built yet" in str(conflict)
            assert conflict.remedy
        else:
            assert not notes.conflicts
        told = [d for d in notes.decisions if flag.spellings[0] in d.what]
        assert bool(told) == isinstance(flag.state, Ignored)


@pytest.mark.parametrize(
    "flag", [f for f in FLAGS if f.state is None and other_value(f) not in f.unbuilt], ids=lambda f: f.name
)
def test_a_value_that_is_honoured_is_kept(flag: Flag) -> None:
    value = other_value(flag)
    notes = Notes()
    values = read({flag.name: value}, notes)
    assert values.gave(flag.name)
    assert values._all[flag.name] == flag.parse(value)


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.choices], ids=lambda f: f.name)
def test_values_that_are_not_built_or_unknown_are_refused_with_the_choices(flag: Flag) -> None:
    for value in (*filter(flag.refused, flag.unbuilt), "nonsense"):
        (conflict,) = ask(flag, value).conflicts
        assert value in str(conflict)
        assert all(choice in conflict.remedy for choice in flag.choices)
    assert not set(flag.choices) & set(flag.unbuilt)
    assert bool(flag.unbuilt) <= bool(flag.instead)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda f: f.name)
def test_neutral_values_ask_for_nothing(flag: Flag) -> None:
    for value in (flag.default, *flag.neutral):
        if value is not None:
            assert not ask(flag, value).conflicts


def test_the_seeds_flags_are_all_known() -> None:
    assert [key for key in RECIPE.split() if key.replace("-", "_") not in BY_KEY] == []


def test_every_flag_of_sglangs_server_is_known() -> None:
    """Those of its page "Server Arguments", but for other hardware, diffusion, images and offloading by others."""
    assert [key for key in SGLANG.read_text().split() if key.replace("-", "_") not in BY_KEY] == []


@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
def test_a_secret_is_in_no_refusal(name: str) -> None:
    notes = Notes()
    read({name: "s3cret", f"--{name.replace('_', '-')}": "oth3r"}, notes)
    assert notes.conflicts
    assert not re.search("s3cret|oth3r", "".join(map(str, notes.conflicts)))


def test_the_seeds_prefill_line_is_refused_for_what_is_not_built_and_for_nothing_else() -> None:
    notes = Notes()
    read(PREFILL, notes)
    refused = {flag.split()[0] for conflict in notes.conflicts for flag in conflict.flags}
    assert refused == {"--attention-backend"}
    assert {d.what.split()[0] for d in notes.decisions} == {"--trust-remote-code", "--mamba-track-interval"}


def line(flag: Flag) -> str:
    state = "built" if flag.state is None else type(flag.state).__name__.lower()
    values = f" {{{','.join(flag.choices)}}}" if flag.choices else ""
    refused = f" not {{{','.join(flag.unbuilt)}}}" if flag.unbuilt else ""
    return f"{flag.group}: {' '.join(flag.spellings)} = {flag.default!r}{values}{refused} [{state}]"


def test_the_list_of_flags_changes_on_purpose_only() -> None:
    """After a change that is meant: write `lines` into tests/core/flags.txt."""
    lines = "".join(line(flag) + "\n" for flag in FLAGS)
    assert lines == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (whole(1, 8, also=(-1,)), {"3": 3, 8: 8, -1: -1}, ("0", 9, 1.5, True, "x", None)),
        (real(0, 1), {"0": 0.0, 1: 1.0, 0.5: 0.5}, ("nan", -0.1, "inf", False, None)),
        (size, {"64M": 64 << 20, "2GiB": 2 << 30, 100: 100, "1.5k": 1536}, ("", "M", 0, -1, "nan", "1T", True)),
        (switch, {"true": True, True: True, "off": False}, ("maybe", 2, None)),
    ],
)
def test_values(parse: object, good: dict[object, object], bad: tuple[object, ...]) -> None:
    assert callable(parse)
    for raw, value in good.items():
        assert parse(raw) == value
    for raw in bad:
        with pytest.raises(ValueError, match="expected"):
            parse(raw)


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda v: v.name)
def test_a_variable_is_read_under_both_names_or_listed_as_ignored(variable) -> None:  # type: ignore[no-untyped-def]
    for name in variable.names:
        found = read_environment({name: "7", "PATH": "/bin"})
        if variable.flag:
            assert found.asked == {variable.flag: "7"}
            assert variable.flag in BY_KEY
            assert not found.ignored
        else:
            (told,) = found.ignored
            assert (told.what, told.value, told.why) == (name, "ignored", variable.reason)
            assert variable.reason


def test_unknown_variables_with_a_known_prefix_are_listed_and_ours_wins() -> None:
    found = read_environment({"SGLANG_NEW": "1", "TESSERA_PROT": "2", "MC_X": "3", "OTHER": "4"})
    assert [d.what for d in found.ignored] == ["MC_X", "SGLANG_NEW", "TESSERA_PROT"]
    assert read_environment({"TESSERA_PORT": "1"}).asked == {"port": "1"}


def test_the_seeds_variables_are_known() -> None:
    seed = SEED_VARIABLES.split()
    known = {name for variable in VARIABLES for name in variable.names}
    assert set(seed) <= known
    assert {"TESSERA_" + name.split("_", 1)[1] for name in seed} <= known
