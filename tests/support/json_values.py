"""JSON that an engine might send, and that no reader may fail on."""

from __future__ import annotations

from hypothesis import strategies as st

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "object", "choices", "delta", "usage", "message", "code", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)
