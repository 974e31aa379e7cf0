"""The runner of one rank: launches steps on the device and turns what comes back into outputs.

`launch` describes a step on the host and starts its device work: the change, the forward, the drawing. Tokens drawn are
written to the device's token table at once, so that the next step can be launched before they reach the host. `collect`
waits for a step, decides which sequences ended (EOS, stop token, length), and drops what is past an end: a sequence is
known by its `Sequence` object and not by its row, which may be somebody else's by then.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.core.messages import Output
from tessera.ops.greedy import whole
from tessera.ops.precision import wide
from tessera.plan.step import Change, Ints, Part, Send, Step, StepDone
from tessera.run.batch import Batch, Model, Wanted, drawn_of, make_batch
from tessera.run.graphs import Graphs, Size, columns_of, places_of
from tessera.run.host import Download, Executor, Inline
from tessera.run.pools import Pools, SlotWatch
from tessera.run.poster import Order, Poster, Seat
from tessera.run.profiling import ProfileOrder, Tracer
from tessera.run.recording import ALONE, Act, perform, record
from tessera.run.report import Tally, tally
from tessera.run.results import finish, logprobs_at, no_part, note_prompt_scores, scored_only
from tessera.run.rowparams import RowParams
from tessera.run.sampler import GREEDY, DrawPlan, Sampler, Scores, plan_draws, plan_prompt_scores
from tessera.run.stages import Stages
from tessera.run.table import Known, RowTable, Sequence
from tessera.run.trials import Trials
from tessera.run.waiter import Watch


@dataclass(frozen=True, slots=True)
class Work:
    """The device's side of a step. `entered`: sampling parameters of rows that enter; `batch`: None when none run."""

    change: Change
    known: list[Known]
    entered: Any
    batch: Batch | Replay | None
    draw_plan: DrawPlan = GREEDY
    prompt_scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """A step that runs as a graph of `size`, with its packed columns; `draws.index`: which padded ranges draw."""

    size: Size
    columns: Ints
    draws: Wanted


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way. `drawn` and `scored`: whose each drawn and each prompt position is; `through`: sequences that
    draw nothing and end with this step. `tallies`: for logs. `sends`: what is to be written elsewhere then."""

    index: int
    work: Work
    drawn: list[Sequence]
    scored: list[Sequence]
    through: list[Sequence]
    tallies: list[Tally]
    result: Future[Download]
    sends: tuple[Send, ...] = ()


class Runner:
    """One rank: the row table's mirror, the pools, the model. `debug` checks the position of every slot read."""

    def __init__(
        self,
        model: Model,
        table: RowTable,
        params: RowParams,
        pools: Pools,
        sampler: Sampler,
        page_size: int,
        executor: Executor | None = None,
        dp_rank: int = 0,
        debug: bool = False,
        graphs: Graphs | None = None,
        post: Poster | None = None,
        stages: Stages | None = None,
        tracer: Tracer | None = None,
        trials: Trials | None = None,
    ) -> None:
        self.model, self.table, self.params, self.pools, self.sampler = model, table, params, pools, sampler
        self.page_size, self.dp_rank, self.graphs = page_size, dp_rank, graphs
        self._executor = executor or Inline()
        self.post, self.stages, self.tracer, self._trials = post, stages or Stages(), tracer, trials
        self._steps = Watch()
        self._watch = SlotWatch(pools.num_slots) if debug and pools.num_slots else None

    def launch(self, step: Step) -> Launched:
        """Starts a step. On CUDA nothing here waits for the device."""
        if self.tracer is not None:
            self.tracer.before(step.index)
        part = step.parts[self.dp_rank]
        known = self.table.apply(part.change)
        entered = self.params.note(part.change.enter)
        if self._watch is not None:
            self._watch.apply(part.change)
            self._watch.advance(part, self.table.slots)
        work, drawn, scored, through = self._work(step, known, entered)
        result = self._executor.submit(lambda: self._execute(work))
        if self.tracer is not None:
            self.tracer.after()
        return Launched(step.index, work, drawn, scored, through, [tally(part, self.table)], result, part.sends)

    def _work(
        self, step: Step, known: list[Known], entered: Any
    ) -> tuple[Work, list[Sequence], list[Sequence], list[Sequence]]:
        """What the device has to do; whose the drawn and the scored positions are; who draws nothing and is through."""
        part, device = step.parts[self.dp_rank], self.pools.device
        size = self.graphs.size_of(step) if self.graphs is not None else None
        if size is not None:
            return self._replay(step, size, known, entered)
        batch = make_batch(step, self.dp_rank, self.table, self.page_size, device)
        if batch is None:
            return Work(part.change, known, entered, None), [], [], []
        drawn, scored = self._at(batch.draws.host_rows), self._at(batch.prompts.host_rows)
        plan = plan_draws(batch.draws, drawn, self.table, self.params, device)
        scores = plan_prompt_scores(scored, device) if scored else None
        return Work(part.change, known, entered, batch, plan, scores), drawn, scored, self._through(part)

    def _replay(
        self, step: Step, size: Size, known: list[Known], entered: Any
    ) -> tuple[Work, list[Sequence], list[Sequence], list[Sequence]]:
        part, device = step.parts[self.dp_rank], self.pools.device
        halves = [half.parts[self.dp_rank] for half in step.halves]
        columns = columns_of(halves, size, self.table.slots, self.table.scratch)
        plain = not self.params.flags[part.rows[part.samples]].any()  # then only the host asks where tokens are drawn
        places = places_of(halves, size)
        replay = Replay(size, columns, drawn_of(step, self.dp_rank, places, None if plain else device))
        drawn = self._at(replay.draws.host_rows)
        plan = GREEDY if plain else plan_draws(replay.draws, drawn, self.table, self.params, device)
        return Work(part.change, known, entered, replay, plan), drawn, [], self._through(part)

    def _through(self, part: Part) -> list[Sequence]:
        through = self._at(part.rows[self.table.limit[part.rows] <= part.starts + part.lengths])
        return [sequence for sequence in through if sequence.params.max_new_tokens == 0]

    def _at(self, rows: Ints) -> list[Sequence]:
        sequences = [self.table.occupants[row] for row in rows.tolist()]
        assert None not in sequences, f"a range for an empty row among {rows.tolist()}"
        return sequences  # type: ignore[return-value]

    @torch.inference_mode()
    def _execute(self, work: Work) -> Download:
        """The device's side: [tokens drawn, their scores..., scores of prompt positions...]."""
        self.pools.apply(work.change)
        self.table.write_known(work.known, work.change)
        self.params.write(work.entered)
        batch = work.batch
        if batch is None:
            return Download([], self.pools.device)
        if isinstance(batch, Replay):
            return self._run_graph(batch, work.draw_plan)
        hidden = self.model.forward(batch.inputs(self.table.tokens), self.pools.tensors)
        results: list[Tensor] = []
        if any(batch.draws.counts):
            logits = self.model.logits(hidden[batch.draws.index], batch.draws.counts)
            results += self._draw(logits, batch.draws, work.draw_plan)
        if any(batch.prompts.counts):
            wanted = hidden[batch.prompts.index]
            results += self.sampler.score_prompts(
                wanted, self.model.logits, batch.prompts, work.prompt_scores, self.model.vocab_size
            )
        return Download(results, self.pools.device)

    def _run_graph(self, replay: Replay, plan: DrawPlan) -> Download:
        """The likeliest tokens of all ranges come with the graph; where somebody asks for more, it is done after it."""
        assert self.graphs is not None
        ran = self.graphs.run(replay.size, replay.columns)
        if plan is GREEDY:
            return Download([ran.tokens], self.pools.device)
        logits = whole(ran.logits[replay.draws.index], self.model.vocab_size)
        return Download(self._draw(logits.to(wide(logits.dtype)), replay.draws, plan), self.pools.device)

    def _draw(self, logits: Tensor, draws: Wanted, plan: DrawPlan) -> list[Tensor]:
        if not len(draws):
            return []
        results = self.sampler.draw(logits, draws, plan)
        self.table.tokens[draws.rows, draws.positions] = results[0].to(torch.int32)
        return results

    def wait(self, launched: Launched | None, news: int | None, seconds: float) -> bool:
        """See `Runs.wait`."""
        return self._steps.wait([launched.result] if launched is not None else (), news, seconds)

    def collect(self, launched: Launched) -> tuple[StepDone, list[Output]]:
        """Waits for a step; its tokens, which sequences ended, and the outputs. Raises what the step raised."""
        arrays = launched.result.result().wait()
        if launched.sends and self.post is not None:
            self.post.post(launched.sends)
        work, batch = launched.work, launched.work.batch
        done, outputs = no_part(), []
        if isinstance(batch, Replay) and work.draw_plan is GREEDY:
            arrays = [arrays[0][batch.draws.index.numpy()]]
        if isinstance(batch, Batch) and work.prompt_scores is not None:
            scores, arrays = arrays[-3:], arrays[:-3]
            note_prompt_scores(launched.scored, batch.prompts.host_positions, scores)
        if batch is not None and launched.drawn:
            logprobs = logprobs_at(work.draw_plan.scores, arrays[1:], launched.drawn)
            done, outputs = finish(self.table, launched.drawn, batch.draws.host_positions, arrays[0], logprobs)
        return StepDone(launched.index, (done,)), outputs + scored_only(launched.through)

    def drop(self, request_id: str, choice: int) -> None:
        """The choice has ended elsewhere: nothing of it may come out any more."""
        sequence = self.table.find(request_id, choice)
        if sequence is not None:
            sequence.ended = True

    @property
    def seats(self) -> list[Seat]:
        """How other servers reach it."""
        return [] if self.post is None else [self.post.seat]

    def order(self, order: Order) -> None:
        """See `Runs.order`."""
        assert self.post is not None
        self.post.order(order)

    def trace(self, order: ProfileOrder) -> int:
        """See `Runs.trace`."""
        assert self.tracer is not None
        self.tracer.order(order)
        return 1

    def record(self, size: Size) -> None:
        """See `Runs.record`."""
        record(ALONE, lambda act: self.everywhere(act, size))

    def everywhere(self, act: Act, of: Size | Step) -> dict[int, str]:
        """Has all ranks perform an act of a size or of a dry step, and waits for them; what memory each lacked."""
        return {0: self.perform(act, of)}

    def perform(self, act: Act, of: Size | Step) -> str:
        """An act on this rank; waits until it is over. What memory is missing, empty when none is."""
        doer = self._trials if isinstance(of, Step) else self.graphs
        assert doer is not None

        @torch.inference_mode()
        def work() -> str:
            return perform(doer.acts, act, of)

        return self._executor.submit(work).result()

    def close(self) -> None:
        """Waits for steps under way; what is being written elsewhere fails."""
        self._executor.close()
        self._steps.close()
        if self.post is not None:
            self.post.close()
