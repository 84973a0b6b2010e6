"""Flash attention over runs of different lengths, on the CPU, as CUDA's kernel reads its arguments."""

import torch


def flash(q, k, v, starts_q, starts_k, most_q, most_k, dropout, causal, debug, *, scale=None, seqused_k=None, **other):
    """aten::_flash_attention_forward over runs of different lengths, as CUDA's kernel reads its arguments."""
    assert (dropout, debug) == (0.0, False)
    assert (other.get("window_size_left") or -1, other.get("window_size_right")) in [
        (-1, None),
        (-1, 0 if causal else -1),
    ]
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.bfloat16, torch.float16)
    numbers = [starts_q, starts_k] + ([] if seqused_k is None else [seqused_k])
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in numbers)
    assert [len(one) for one in numbers] == [len(starts_q), len(starts_q), len(starts_q) - 1][: len(numbers)]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    firsts, starts, ends = starts_q.tolist(), starts_k.tolist(), starts_k[1:].tolist()
    if seqused_k is not None:
        ends = [start + used for start, used in zip(starts, seqused_k.tolist(), strict=False)]
    out, log_sums = torch.full_like(q, float("nan")), torch.zeros(q.shape[1], len(q))
    for first, last, start, end in zip(firsts, firsts[1:], starts, ends, strict=False):
        assert last - first <= most_q
        assert end - start <= most_k
        assert end <= len(k)
        mine = (x.transpose(0, 1)[None].float() for x in (q[first:last], k[start:end], v[start:end]))
        grouped = q.shape[1] != k.shape[1]
        seen = torch.ones(last - first, end - start, dtype=torch.bool)  # the last query sees all keys, causal or not
        seen = seen.tril(end - start - (last - first)) if causal else seen
        found = torch.nn.functional.scaled_dot_product_attention(*mine, seen, scale=scale, enable_gqa=grouped)
        out[first:last] = found[0].transpose(0, 1).to(q.dtype)
    return out, log_sums, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(0, dtype=q.dtype)


ATEN = torch.library.Library("aten", "IMPL")
ATEN.impl("_flash_attention_forward", flash, "CPU")
