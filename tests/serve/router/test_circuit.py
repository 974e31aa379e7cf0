"""A server's standing: only faults count, they take it down, and a success brings it back."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tessera.serve.router.circuit import Circuit, Standing


def up(threshold: int = 3) -> Circuit:
    circuit = Circuit(threshold)
    circuit.probed(None, 0)
    return circuit


def test_nothing_is_sent_before_the_first_good_probe() -> None:
    circuit = Circuit()
    for _ in range(5):
        circuit.probed("503", 1)
    assert (circuit.takes, circuit.reason) == (False, "503")
    circuit.probed(None, 2)
    assert circuit.takes


def test_only_faults_in_a_row_take_it_down() -> None:
    circuit = up()
    for end in [circuit.fault, circuit.fault, None, circuit.fault, circuit.fault]:
        circuit.sent()
        circuit.good(1) if end is None else end("500", 1)
    for _ in range(9):
        circuit.sent()
        circuit.dropped()
    assert circuit.takes
    circuit.sent()
    circuit.fault("500", 1)
    assert circuit.standing is Standing.DOWN


def test_one_that_says_it_is_well_but_fails_gets_one_request_at_a_time() -> None:
    circuit = up(1)
    circuit.sent()
    circuit.fault("500", 1)
    circuit.probed(None, 2)
    assert circuit.standing is Standing.TRIAL
    circuit.sent()
    assert not circuit.takes
    circuit.fault("500 again", 3)
    assert circuit.standing is Standing.DOWN
    circuit.probed(None, 4)
    circuit.sent()
    circuit.answered(5)
    assert circuit.standing is Standing.UP


def test_one_that_was_away_takes_everything_once_it_is_back() -> None:
    circuit = up(2)
    circuit.probed("refused", 1)
    circuit.probed("refused", 2)
    assert circuit.standing is Standing.DOWN
    circuit.probed(None, 3)
    assert circuit.standing is Standing.UP
    assert circuit.reason == ""


class Circuits(RuleBasedStateMachine):
    """Whatever happens, it can always come back, and takes nothing while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.told, self.flying, self.now = Standing.UNKNOWN, 0, 0.0
        self.circuit = Circuit(2, changed=self.change)

    def change(self, seconds: float) -> None:
        assert self.circuit.standing is not self.told, "told of changes only"
        assert seconds >= 0
        self.told = self.circuit.standing

    @precondition(lambda self: self.circuit.takes)
    @rule()
    def send(self) -> None:
        self.circuit.sent()
        self.flying += 1

    @precondition(lambda self: self.flying)
    @rule(how=st.sampled_from(["good", "fault", "dropped"]))
    def end(self, how: str) -> None:
        self.flying -= 1
        self.now += 1
        {"good": lambda: self.circuit.good(self.now), "fault": lambda: self.circuit.fault("500", self.now),
         "dropped": self.circuit.dropped}[how]()  # fmt: skip

    @rule(why=st.sampled_from([None, "refused"]))
    def probe(self, why: str | None) -> None:
        self.circuit.probed(why, self.now)

    @invariant()
    def consistent(self) -> None:
        circuit = self.circuit
        assert circuit._tries == self.flying
        assert circuit.standing is self.told, "every change is told"
        assert not (circuit.takes and circuit.standing in (Standing.DOWN, Standing.UNKNOWN))
        if circuit.standing is not Standing.UP:
            assert circuit.reason
        elif not (circuit._faults or circuit._misses):
            assert circuit.reason in ("", "refused"), "a bad probe is told until a request ends well"

    def teardown(self) -> None:
        for _ in range(self.flying):
            self.circuit.dropped()
        self.circuit.probed(None, self.now)
        assert self.circuit.takes


TestCircuits = Circuits.TestCase
