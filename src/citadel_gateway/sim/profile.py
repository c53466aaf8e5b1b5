"""How fast, how wide and how deep a simulated engine is.

The numbers are invented; only their order is meant to look like the real models', with the large
mixture slowest and the small model fastest.  All are quick enough to watch a demo.
"""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class EngineProfile:
    """One engine serving one model.  Rates are tokens a second, sizes are tokens.

    :param decode_rate: of one sequence that has the engine to itself.
    :param crowding: how much each further running request slows every token, as a fraction.
    :param max_batch: requests that run at once.
    :param max_queue: requests that may wait; the next one gets a 503.
    :param kv_tokens: what ``vllm:kv_cache_usage_perc`` is a fraction of.
    :param prefix_cache_tokens: prompt tokens remembered between requests; 0 turns it off.
    :param jitter: every wait is stretched or shrunk by up to this fraction.
    """

    model: str
    prefill_rate: float = 20_000.0
    decode_rate: float = 200.0
    crowding: float = 0.02
    max_batch: int = 16
    max_queue: int = 64
    context_window: int = 8_192
    kv_tokens: int = 131_072
    prefix_cache_tokens: int = 65_536
    jitter: float = 0.0
    embedding_width: int = 384

    def prefill_seconds(self, tokens: int) -> float:
        """Time to read *tokens* that are not in the prefix cache."""
        return tokens / self.prefill_rate

    def token_seconds(self, batch: int) -> float:
        """Time between two tokens of a sequence while *batch* requests run.

        Grows in a straight line: ``(1 + crowding * (batch - 1)) / decode_rate``.
        """
        return (1 + self.crowding * (batch - 1)) / self.decode_rate


PROFILES: dict[str, EngineProfile] = {
    profile.model: profile
    for profile in (
        EngineProfile(
            model="mixtral-8x7b", prefill_rate=6_000, decode_rate=110, context_window=32_768
        ),
        EngineProfile(model="hermes-2", prefill_rate=12_000, decode_rate=170),
        EngineProfile(model="openchat-3.5", prefill_rate=14_000, decode_rate=210),
        EngineProfile(
            model="phi-3-mini", prefill_rate=25_000, decode_rate=330, context_window=4_096
        ),
    )
}


def profile_for(model: str) -> EngineProfile:
    """The profile of *model*, or a middling one under that name."""
    return PROFILES.get(model) or EngineProfile(model=model)
