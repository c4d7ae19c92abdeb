"""Seeds for stochastic rounding, from a stream that is nobody else's."""

from __future__ import annotations

from typing import Any

from gradckpt_dist.errors import StorageError

_MASK = (1 << 64) - 1


class NoiseSource:
    """Hands out one seed a call, on the host: the user's random numbers stay as they are, and no device is waited for.

    SplitMix64 (Steele, Lea and Flood, 2014) over a counter. The ranks of a job that start from the same ``seed`` and
    make the same calls get the same seeds, so that tensors which are replicated over ranks stay replicated.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.draws = 0

    def draw(self) -> int:
        """The next seed, an int32."""
        self.draws += 1
        mixed = (self.seed * 0xD1342543DE82EF95 + self.draws * 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return (mixed >> 32) - (1 << 31)

    def state_dict(self) -> dict[str, int]:
        """Plain numbers, to be saved in a checkpoint."""
        return {"seed": self.seed, "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            StorageError: it is not what ``state_dict`` gives.
        """
        if set(state) != {"seed", "draws"} or not all(type(value) is int and value >= 0 for value in state.values()):
            raise StorageError(
                f"the state of the noise source is {state!r}; give what state_dict() returned, seed and draws >= 0"
            )
        self.seed, self.draws = state["seed"], state["draws"]
