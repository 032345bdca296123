"""The gated delta rule in chunks (arXiv 2412.06464, section 3.3), for where no kernel runs."""

import torch
import torch.nn.functional as F

_EPSILON = 1e-6
"""In the length of queries and keys, as in the kernels."""


def delta_scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`S_t = exp(g_t) S_(t-1) + k_t u_tᵀ`, `y_t = S_tᵀ q_t / √key_dim`, `u_t = beta_t (v_t - exp(g_t) S_(t-1)ᵀ k_t)`.

    What transformers' `torch_chunk_gated_delta_rule` computes. That one indexes whole tensors chunk by chunk, and the
    backward of each index fills a tensor of the whole size with zeros: time that grows with the square of the context.

    Args:
        query: `[batch, time, key heads, key_dim]`.
        key: Of the same shape.
        value: `[batch, time, value heads, value_dim]`; a key head serves so many neighbouring value heads.
        g: Logarithms of the decay, not above 0, `[batch, time, value heads]`.
        beta: Strengths of writing, of the same shape.
        chunk_size: Tokens that are computed together.
        initial_state: S before the first token, `[batch, value heads, key_dim, value_dim]`.
        output_final_state: Whether S after the last token is returned as well.
        use_qk_l2norm_in_kernel: Whether queries and keys are first brought to length 1.

    Returns:
        y in the dtype of `query`, of the shape of `value`, and S in float32 or None.
    """
    batch, time, value_heads, value_dim = value.shape
    key_dim = key.shape[-1]

    def chunks(values: torch.Tensor) -> torch.Tensor:
        """`[batch, time, heads, channels]` -> `[batch, value heads, chunks, chunk, channels]`, in float32.

        A padded token has a key, a strength and a logarithm of 0: it leaves the state as it is.
        """
        values = values.float().repeat_interleave(value_heads // values.shape[2], 2)
        return F.pad(values, (0, 0, 0, 0, 0, -time % chunk_size)).transpose(1, 2).unflatten(2, (-1, chunk_size))

    queries, keys, values, strengths = chunks(query), chunks(key), chunks(value), chunks(beta[..., None])
    if use_qk_l2norm_in_kernel:
        queries, keys = _of_length_1(queries), _of_length_1(keys)
    fallen = chunks(g[..., None]).squeeze(-1).cumsum(-1)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=query.device).triu(1)
    # Of a later token the exponent would be positive, and may be too large before it is masked.
    within = (fallen[..., :, None] - fallen[..., None, :]).masked_fill(later, -torch.inf).exp()
    faded = fallen.exp()[..., None]

    # What is written in a chunk solves a triangular system; it is linear in the state before the chunk.
    system = (strengths * keys @ keys.mT) * within
    known = torch.cat([values, keys * faded], -1) * strengths
    new, read = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split(
        [value_dim, key_dim], -1
    )
    queries = queries * key_dim**-0.5
    scores = (queries @ keys.mT) * within
    left = (keys * (fallen[..., -1:] - fallen).exp()[..., None]).mT

    state = values.new_zeros(batch, value_heads, key_dim, value_dim)
    if initial_state is not None:
        state = initial_state.to(state)
    outputs = []
    parts = (new, read, queries * faded, scores, left, faded[..., -1:, :])
    for new_, read_, queries_, scores_, left_, kept in zip(*(part.unbind(2) for part in parts), strict=True):
        written = new_ - read_ @ state
        outputs.append(queries_ @ state + scores_ @ written)
        state = state * kept + left_ @ written
    y = torch.stack(outputs, 2).flatten(2, 3)[:, :, :time].transpose(1, 2)
    return y.to(query.dtype, memory_format=torch.contiguous_format), state if output_final_state else None


def _of_length_1(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * (vectors.square().sum(-1, keepdim=True) + _EPSILON).rsqrt()
