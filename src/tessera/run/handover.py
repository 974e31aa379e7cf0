"""Hand-overs of an engine: its manifest, its courier, and who hears what its ranks have to say."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tessera.core.config.types import Config
from tessera.core.messages import Address
from tessera.core.spec import ModelSpec
from tessera.core.tensors import cache_table
from tessera.models.folder import weights_version
from tessera.plan.handoff import Errand, Wire
from tessera.run.courier import Courier
from tessera.run.poster import Connected, News, Order, Seat
from tessera.run.profiling import Traced
from tessera.transfer.manifest import Manifest, Member, new_instance

log = logging.getLogger(__name__)


class Handover:
    """Made before the ranks are, so that they have somebody to tell; `open` when they are there."""

    def __init__(self, config: Config, spec: ModelSpec, post: Callable[[Wire | Order], object]) -> None:
        self._config, self._spec, self._post = config, spec, post
        self._courier: Courier | None = None

    def tell(self, news: News) -> None:
        """A rank has something to say. From any thread."""
        assert not isinstance(news, Traced), "the engine itself hears of profiles"
        if not isinstance(news, Connected):
            self._post(news)
        elif self._courier is not None:
            self._courier.news(news)

    def open(self, seats: list[Seat]) -> None:
        """Other servers may come. Raises `ConfigError` when a port cannot be had."""
        config = self._config
        manifest = manifest_of(config, self._spec, tuple(seat.member for seat in seats))
        names = tuple(seat.name for seat in seats)
        self._courier = Courier(config.handover, config.serving.host, manifest, names, self._post)
        if self.bootstrap is not None:
            log.info("Decode servers meet this one at %s", self.bootstrap)

    @property
    def bootstrap(self) -> Address | None:
        """Where decode servers meet this one; None at decode."""
        return self._courier.bootstrap if self._courier is not None else None

    def do(self, errand: Errand) -> None:
        """Runs an errand of the planner."""
        assert self._courier is not None
        self._courier.do(errand)

    def close(self) -> None:
        """Ends every session."""
        if self._courier is not None:
            self._courier.close()


def manifest_of(config: Config, spec: ModelSpec, members: tuple[Member, ...]) -> Manifest:
    """What a server so configured keeps of a sequence. `members`: its ranks."""
    return Manifest(
        instance=new_instance(),
        weights=weights_version(config.model),
        parts=config.kernels.parts,
        mesh=config.mesh.mesh,
        page_size=config.memory.page_size,
        caches=cache_table(spec, config.memory.page_size, config.memory.dtypes),
        members=members,
    )
