"""States of a matrix after a block of chunks."""

from titans_pytorch.ops.inner_gradient import ends as final_state
