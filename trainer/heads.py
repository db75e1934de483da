"""Which numbers of ranks can share the heads of a model's attention. Imports no torch, for the planner."""


def check_heads(size: int, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless each of `size` ranks gets whole key-value heads, or one that it shares with others."""
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if size not in fitting:
        raise ValueError(
            f"sequence_parallel_size: {size} ranks cannot share this model's {heads} heads with {kv_heads} key-value "
            f"heads; possible: {', '.join(map(str, fitting))}"
        )
