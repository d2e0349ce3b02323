"""What a pool is told to start: an engine with its settings."""

from dataclasses import dataclass

from deltaray.generate.engine import Engine
from deltaray.generate.engine_settings import EngineSettings


@dataclass(frozen=True)
class EngineSpec(EngineSettings):
    """What makes an engine, in the process of a replica."""

    def start(self) -> Engine:
        """A running engine in this process; blocks until it is ready and raises what vLLM raises when it cannot."""
        return Engine(self)
