"""What hypothesis draws sizes, gates and seeds from."""

from hypothesis import strategies as st

GATES = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(0, 2)
BATCHES = st.sampled_from([(), (1,), (3,), (2, 3)])
CHANNELS = st.sampled_from([1, 2, 3, 5])
WIDTHS = st.sampled_from([1, 2, 5, 7, 16])
SEEDS = st.integers(0, 2**31)
